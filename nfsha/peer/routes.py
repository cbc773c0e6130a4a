"""Asks the kernel for routes: the gateway of an interface, and how an address is reached over it.

Reads only, and changes nothing, by pyroute2's route netlink. A listing is restricted to one
interface by the kernel, and of the routes there only the default ones are decoded: pyroute2 takes
35 us for each, and would hold the loop for 87 ms with 2,000 of them.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from pyroute2 import AsyncIPRoute
from pyroute2.netlink import NLM_F_DUMP, NLM_F_MULTI, NLM_F_REQUEST
from pyroute2.netlink.exceptions import NetlinkDecodeError, NetlinkError
from pyroute2.netlink.nlsocket import NetlinkRequest
from pyroute2.netlink.rtnl import RTM_GETROUTE, RTM_NEWROUTE, rt_type
from pyroute2.netlink.rtnl.rtmsg import rtmsg

IPAddress = IPv4Address | IPv6Address

_RT_TABLE_MAIN = 254
_ANSWER_WITHIN_S = 1.0  # some 100,000 routes; the kernel itself answers inside the call
_PASSED_OVER = {"header": {"type": 0, "flags": NLM_F_MULTI, "error": None}}
_UNREACHABLE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL})


@dataclass(frozen=True, slots=True)
class Path:
    """How an address is reached: directly on the link or by a gateway, and from which address."""

    on_link: bool
    source: IPAddress | None


class RouteSocket:
    """A route netlink socket of the network namespace in which it is first asked."""

    def __init__(self) -> None:
        """Opens nothing yet."""
        self._route = _route_netlink()

    def close(self) -> None:
        """Closes the socket."""
        self._route.close()

    async def default_gateway(self, family: int, index: int) -> IPAddress | None:
        """Returns the gateway of the best default route over the interface, None without one.

        The main table comes before others, then the lowest metric (ip-route(8)). A gateway may be
        of the other family (RFC 5549). Raises OSError.
        """
        request = rtmsg()
        request["family"] = family
        request["attrs"] = [("RTA_OIF", index)]
        found: list[tuple[bool, int, IPAddress]] = []
        for route in await self._ask(request, NLM_F_DUMP, self._default_only):
            if route["type"] != rt_type["unicast"] or route["dst_len"]:
                continue
            if (gateway := _gateway(route, index)) is not None:
                table = route.get_attr("RTA_TABLE") or route["table"]
                metric = route.get_attr("RTA_PRIORITY") or 0
                found.append((table != _RT_TABLE_MAIN, metric, gateway))
        return min(found, key=lambda each: each[:2])[2] if found else None

    async def path(self, target: IPAddress, index: int) -> Path | None:
        """Returns how the target is reached over the interface.

        None when it is not, or when it is this machine's own address. Raises OSError.
        """
        request = rtmsg()
        request["family"] = socket.AF_INET if target.version == 4 else socket.AF_INET6
        request["dst_len"] = target.max_prefixlen
        request["attrs"] = [("RTA_DST", str(target)), ("RTA_OIF", index)]
        try:
            routes = await self._ask(request)
        except OSError as error:
            if error.errno in _UNREACHABLE:
                return None
            raise
        if not routes or routes[0]["type"] != rt_type["unicast"]:
            return None
        source = routes[0].get_attr("RTA_PREFSRC")
        on_link = _gateway(routes[0], index) is None
        return Path(on_link=on_link, source=ip_address(source) if source else None)

    async def _ask(
        self, body: rtmsg, flags: int = 0, parser: Callable[..., Any] | None = None
    ) -> list[Any]:
        """Sends one request and returns the routes of its answer. Raises OSError."""
        request = NetlinkRequest(
            self._route,
            body,
            parser=parser,
            msg_type=RTM_GETROUTE,
            msg_flags=NLM_F_REQUEST | flags,
        )
        try:
            async with asyncio.timeout(_ANSWER_WITHIN_S):
                await request.send()
                answer = [message async for message in request.response()]
        except TimeoutError as error:
            # The rest of the answer would stay in pyroute2's queue: a new socket has none.
            self._route.close()
            self._route = _route_netlink()
            raise OSError(errno.ETIMEDOUT, "the kernel's list of routes has no end") from error
        except NetlinkError as error:
            raise OSError(error.code, os.strerror(error.code)) from error
        except NetlinkDecodeError as error:
            raise OSError(errno.EPROTO, f"a route cannot be read: {error}") from error
        return [message for message in answer if message["header"]["type"] == RTM_NEWROUTE]

    def _default_only(self, data: bytes, offset: int, length: int) -> Any:  # noqa: ANN401
        """Decodes one message of a listing, unless it is a route to less than everything."""
        kind, flags, sequence = struct.unpack_from("=HHI", data, offset + 4)  # nlmsghdr
        if kind == RTM_NEWROUTE and data[offset + 17]:  # rtm_dst_len (rtnetlink(7))
            return _PASSED_OVER
        return self._route.marshal.parse_one_message(kind, flags, sequence, data, offset, length)


def _route_netlink() -> AsyncIPRoute:
    # With strict checks the kernel obeys the filters of a listing.
    return AsyncIPRoute(groups=0, strict_check=True)


def _gateway(route: Any, index: int) -> IPAddress | None:  # noqa: ANN401 - pyroute2 has no types
    """The gateway; of a route with several next hops, that of the first over the interface."""
    hops = route.get_attr("RTA_MULTIPATH") or []
    hop = next((each for each in hops if each["oif"] == index), route)
    if gateway := hop.get_attr("RTA_GATEWAY"):
        return ip_address(gateway)
    # struct rtvia: a gateway of the other family
    via = hop.get_attr("RTA_VIA")
    return ip_address(via["addr"]) if via else None

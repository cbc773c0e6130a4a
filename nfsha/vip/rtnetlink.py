"""Addresses and links of this network namespace, by pyroute2: requests, and what the kernel tells.

It turns pyroute2's messages into values and refusals into `VipError`; it knows no lease and decides
nothing. Up to the system call nothing here gives the loop back; the answer comes through the loop.
"""

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Final

from pyroute2 import AsyncIPRoute
from pyroute2.netlink import NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST
from pyroute2.netlink.exceptions import NetlinkDecodeError, NetlinkError
from pyroute2.netlink.rtnl import (
    RTM_GETADDR,
    RTM_GETLINK,
    RTMGRP_IPV4_IFADDR,
    RTMGRP_IPV6_IFADDR,
    RTMGRP_LINK,
)
from pyroute2.netlink.rtnl.ifaddrmsg import (
    IFA_F_DADFAILED,
    IFA_F_NODAD,
    IFA_F_NOPREFIXROUTE,
    IFA_F_PERMANENT,
    IFA_F_TENTATIVE,
    ifaddrmsg,
)
from pyroute2.netlink.rtnl.ifinfmsg import IFF_LOWER_UP, IFF_RUNNING, IFF_UP, ifinfmsg

Vip = IPv4Address | IPv6Address

INFINITY_S: Final = 0xFFFFFFFF  # INFINITY_LIFE_TIME (net/addrconf.h): an address without an end

_ANSWER_WITHIN_S: Final = 1.0  # the kernel answers inside the call; the loop has to come to read it
_DUMP_TRIES_MAX: Final = 3
_DATAGRAM_BYTES: Final = 65536
_DRAIN_MAX: Final = 2048
_ABLE: Final = IFF_UP | IFF_RUNNING | IFF_LOWER_UP


class VipError(Exception):
    """The kernel could not do, or could not prove, what was asked; the message says what to do."""


class VipRefused(VipError):  # noqa: N818 - what happened, not that something did
    """The interface cannot carry the VIPs as it is: an operator has to change something first."""


@dataclass(frozen=True, slots=True)
class AddressEntry:
    """One address of an interface as the kernel shows it.

    `valid_s` is the rest of its life in seconds, rounded up by the kernel (INFINITY_S: no end).
    `touched_cs` is when its lifetime was last set, in hundredths of a second of the kernel's
    tick count since boot, modulo 2**32. `port` is the netlink port that asked for the change
    (0: the kernel itself, and always 0 for IPv6).
    """

    index: int
    address: Vip
    prefixlen: int
    flags: int
    valid_s: int
    touched_cs: int
    port: int

    @property
    def permanent(self) -> bool:
        """True if the address has no end of life."""
        return self.valid_s == INFINITY_S or bool(self.flags & IFA_F_PERMANENT)

    @property
    def usable(self) -> bool:
        """False while (or after) duplicate address detection keeps it from answering."""
        return not self.flags & (IFA_F_TENTATIVE | IFA_F_DADFAILED)


@dataclass(frozen=True, slots=True)
class LinkEntry:
    """One interface as the kernel shows it; `carrier` is true only while it can carry traffic."""

    index: int
    name: str
    up: bool
    carrier: bool


class RouteSocket:
    """Asks and changes. Its methods raise VipError."""

    def __init__(self) -> None:
        # With strict checks the kernel lists the addresses of the wanted interface only.
        self._route = AsyncIPRoute(groups=0, strict_check=True)

    async def open(self) -> None:
        """Opens the socket, in the network namespace of the calling thread."""
        async with _in_time("netlink socket not opened"):
            await self._route.setup_endpoint()

    def close(self) -> None:
        """Closes the socket. Idempotent."""
        self._route.close()

    async def put(self, index: int, vip: Vip, valid_s: int) -> int:
        """Adds a VIP with a lifetime, or sets the lifetime of one that is there; returns an errno.

        IPv6 goes without duplicate address detection (the old holder may still be there, silenced),
        and deprecated from the start, so that the node never picks the VIP as the source of its own
        connections (RFC 6724 rule 3); a /32 is not picked by IPv4 beside an address of the subnet.
        """
        ipv6 = vip.version == 6
        return await _errno(
            self._route.addr(
                "replace",
                index=index,
                address=str(vip),
                prefixlen=vip.max_prefixlen,
                flags=IFA_F_NODAD | IFA_F_NOPREFIXROUTE if ipv6 else 0,
                preferred_lft=0 if ipv6 else valid_s,
                valid_lft=valid_s,
            )
        )

    async def delete(self, index: int, vip: Vip, prefixlen: int) -> int:
        """Removes one address; returns an errno, EADDRNOTAVAIL if it is not there."""
        return await _errno(
            self._route.addr("delete", index=index, address=str(vip), prefixlen=prefixlen)
        )

    async def addresses(self, index: int) -> list[AddressEntry]:
        """All addresses of one interface, or of all for 0; none if it does not exist."""
        for _ in range(_DUMP_TRIES_MAX):
            request = ifaddrmsg()
            request["index"] = index
            async with _in_time("addresses cannot be listed"):
                try:
                    answer = await self._route.nlm_request(
                        request, RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP
                    )
                    found = [message async for message in answer]
                except NetlinkError as error:
                    if error.code == errno.ENODEV:
                        return []
                    raise
            # Somebody changed addresses between two parts of the list: it may have holes.
            if not any(message["header"]["flags"] & NLM_F_DUMP_INTR for message in found):
                entries = [entry for entry in map(address_entry, found) if entry is not None]
                return [entry for entry in entries if index in (0, entry.index)]
        raise VipError("the kernel's list of addresses changes faster than it can be read")

    async def link(self, name: str) -> LinkEntry | None:
        """The interface of that name, None if there is none."""
        request = ifinfmsg()
        request["attrs"] = [("IFLA_IFNAME", name)]
        async with _in_time(f"interface {name} cannot be looked up"):
            try:
                # Not by pyroute2's link("get"): that asks for an acknowledgement besides the
                # answer, which nobody awaits, so that it stays in a queue for ever.
                answer = await self._route.nlm_request(request, RTM_GETLINK, NLM_F_REQUEST)
                [message] = [message async for message in answer]
            except NetlinkError as error:
                if error.code == errno.ENODEV:
                    return None
                raise
        return link_entry(message)


class EventSocket(AsyncIPRoute):  # type: ignore[misc] # pyroute2 ships no types
    """Hears of all changes of addresses and links, and calls `told` with each message at once.

    `told` gets None when events were lost (the kernel's queue was full): pyroute2 takes no more
    from this socket then, so that a new one is needed, and a look at what is there.
    """

    def __init__(self, told: Callable[[Any], None]) -> None:
        super().__init__(groups=RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR)
        self._told = told
        self._lossy = False

    async def open(self) -> None:
        """Opens the socket and begins to listen. Raises VipError."""
        async with _in_time("netlink events cannot be heard"):
            try:
                await self.bind()
            except KeyError as error:  # pyroute2 tried 180 port numbers
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)) from error

    def enqueue(self, data: bytes, addr: tuple[int, int] | None) -> None:
        """Called by pyroute2 for each datagram, and without an address for an error or the end."""
        if addr is not None:
            for message in self.marshal.parse(data):
                self._told(message)
        elif "error" in self.status and not self._lossy:
            self._lossy = True
            self._told(None)

    def drain(self) -> None:
        """Tells all that the kernel has queued until now, without waiting for the loop."""
        try:
            for _ in range(_DRAIN_MAX):
                self.enqueue(self.recv(_DATAGRAM_BYTES), (0, 0))
        except BlockingIOError:
            return
        except OSError as error:
            self.status["error"] = error
        else:
            self.status["error"] = OSError(errno.ENOBUFS, "more events than can be read")
        self.enqueue(b"", None)


def address_entry(message: Any) -> AddressEntry | None:  # noqa: ANN401 - pyroute2 ships no types
    """Reads an RTM_NEWADDR or RTM_DELADDR message; None if it is of another family."""
    if message["family"] not in (socket.AF_INET, socket.AF_INET6):
        return None
    # IFA_LOCAL is the own address; IFA_ADDRESS may be that of a point-to-point peer (if_addr.h).
    address = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
    lifetime = message.get_attr("IFA_CACHEINFO") or {"ifa_valid": INFINITY_S, "tstamp": 0}
    return AddressEntry(
        index=message["index"],
        address=ip_address(address),
        prefixlen=message["prefixlen"],
        flags=message.get_attr("IFA_FLAGS") or message["flags"],
        valid_s=lifetime["ifa_valid"],
        touched_cs=lifetime["tstamp"],
        port=message["header"]["pid"],
    )


def link_entry(message: Any) -> LinkEntry | None:  # noqa: ANN401 - pyroute2 ships no types
    """Reads an RTM_NEWLINK or RTM_DELLINK message.

    None if it is not about the link itself: a bridge says with family AF_BRIDGE that a port left
    it, by the same message type.
    """
    if message["family"] != socket.AF_UNSPEC:
        return None
    flags = message["flags"]
    name = message.get_attr("IFLA_IFNAME")
    return LinkEntry(message["index"], name, bool(flags & IFF_UP), flags & _ABLE == _ABLE)


async def _errno(call: Awaitable[object]) -> int:
    async with _in_time("the kernel did not answer"):
        try:
            await call
        except NetlinkError as error:
            return int(error.code)
    return 0


@asynccontextmanager
async def _in_time(what: str) -> AsyncIterator[None]:
    """Turns what fails, or takes too long, into VipError."""
    try:
        async with asyncio.timeout(_ANSWER_WITHIN_S):
            yield
    except TimeoutError as error:
        raise VipError(f"{what}: no answer within {_ANSWER_WITHIN_S:.0f} s") from error
    except NetlinkError as error:
        raise VipError(f"{what}: {os.strerror(error.code)}") from error
    except (OSError, NetlinkDecodeError) as error:
        raise VipError(f"{what}: {error}") from error

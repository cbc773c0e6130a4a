"""Asks the kernel for routes: the gateway of an interface, and how an address is reached over it.

Reads only, and changes nothing. Raw route netlink (rtnetlink(7), linux/rtnetlink.h): the kernel
does its work inside sendmsg(2) and recvmsg(2), so the answer lies there when they return and
nothing is waited for. A lookup takes some 20 microseconds; a listing is restricted to one interface
by the kernel, so that a host with very many routes does not cost many messages.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

IPAddress = IPv4Address | IPv6Address

_SOL_NETLINK = 270
_NETLINK_GET_STRICT_CHK = 12  # linux/netlink.h: the kernel obeys the filters of a listing

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ROUTE = struct.Struct("=BBBBBBBBI")  # rtmsg: family, dst and src length, tos, table, ..., flags
_ATTRIBUTE = struct.Struct("=HH")  # rtattr: length, type
_NEXT_HOP = struct.Struct("=HBBi")  # rtnexthop: length, flags, hops, interface

_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_RTM_NEWROUTE = 24
_RTM_GETROUTE = 26
_NLM_F_REQUEST = 0x1
_NLM_F_DUMP = 0x300

_RTA_DST = 1
_RTA_OIF = 4
_RTA_GATEWAY = 5
_RTA_PRIORITY = 6
_RTA_PREFSRC = 7
_RTA_MULTIPATH = 9
_RTA_TABLE = 15
_RTA_VIA = 18
_NLA_TYPE_MASK = 0x3FFF

_RTN_UNICAST = 1
_RT_TABLE_MAIN = 254

_BUFFER_BYTES = 65536
_MESSAGES_MAX = 10_000  # of one listing; far more than one interface's routes
_UNREACHABLE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL})


@dataclass(frozen=True, slots=True)
class Path:
    """How an address is reached: directly on the link or by a gateway, and from which address."""

    on_link: bool
    source: IPAddress | None


@dataclass(frozen=True, slots=True)
class _Route:
    kind: int
    prefix_length: int
    table: int
    metric: int
    source: IPAddress | None
    gateway: IPAddress | None


class RouteSocket:
    """A route netlink socket of the network namespace it is opened in. Opening raises OSError."""

    def __init__(self) -> None:
        """Opens the socket."""
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()

    def default_gateway(self, family: int, index: int) -> IPAddress | None:
        """Returns the gateway of the best default route over the interface, None without one.

        The main table comes before others, then the lowest metric (ip-route(8)). A gateway may be
        of the other family (RFC 5549). Raises OSError.
        """
        body = _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0) + _attribute(_RTA_OIF, _u32(index))
        best: _Route | None = None
        for payload in self._ask(body, _NLM_F_DUMP):
            route = _parse(payload, index)
            if route.kind != _RTN_UNICAST or route.prefix_length or route.gateway is None:
                continue
            if best is None or _rank(route) < _rank(best):
                best = route
        return best.gateway if best is not None else None

    def path(self, target: IPAddress, index: int) -> Path | None:
        """Returns how the target is reached over the interface.

        None when it is not, or when it is this machine's own address. Raises OSError.
        """
        family = socket.AF_INET if target.version == 4 else socket.AF_INET6
        body = _ROUTE.pack(family, target.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
        body += _attribute(_RTA_DST, target.packed) + _attribute(_RTA_OIF, _u32(index))
        try:
            found = next(self._ask(body, 0), None)
        except OSError as error:
            if error.errno in _UNREACHABLE:
                return None
            raise
        route = _parse(found, index) if found is not None else None
        if route is None or route.kind != _RTN_UNICAST:
            return None
        return Path(on_link=route.gateway is None, source=route.source)

    def _ask(self, body: bytes, flags: int) -> Iterator[bytes]:
        """Sends one request and yields the bodies of the routes in its answer. Raises OSError."""
        self._sequence += 1
        length = _HEADER.size + len(body)
        flags |= _NLM_F_REQUEST
        header = _HEADER.pack(length, _RTM_GETROUTE, flags, self._sequence, 0)
        self._socket.send(header + body)
        for _ in range(_MESSAGES_MAX):
            for kind, sequence, payload in _messages(self._socket.recv(_BUFFER_BYTES)):
                if sequence != self._sequence:
                    continue  # the rest of an answer that nobody read to its end
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    code = -int.from_bytes(payload[:4], sys.byteorder, signed=True)
                    raise OSError(code, os.strerror(code))
                if kind == _RTM_NEWROUTE:
                    yield payload
        raise OSError(errno.EMSGSIZE, "the kernel's list of routes has no end")


def _rank(route: _Route) -> tuple[bool, int]:
    return route.table != _RT_TABLE_MAIN, route.metric


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, _, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size:
            return
        yield kind, sequence, data[offset + _HEADER.size : offset + length]
        offset += _aligned(length)


def _parse(payload: bytes, index: int) -> _Route:
    _, prefix_length, _, _, table, _, _, kind, _ = _ROUTE.unpack_from(payload)
    attributes = dict(_attributes(payload[_ROUTE.size :]))
    if _RTA_TABLE in attributes:
        table = int.from_bytes(attributes[_RTA_TABLE], sys.byteorder)
    source = attributes.get(_RTA_PREFSRC)
    return _Route(
        kind=kind,
        prefix_length=prefix_length,
        table=table,
        metric=int.from_bytes(attributes.get(_RTA_PRIORITY, b""), sys.byteorder),
        source=ip_address(source) if source is not None else None,
        gateway=_gateway(_hop_over(attributes, index)),
    )


def _hop_over(attributes: dict[int, bytes], index: int) -> dict[int, bytes]:
    """Of a route with several next hops, the attributes of the first one over the interface."""
    hops = attributes.get(_RTA_MULTIPATH, b"")
    while len(hops) >= _NEXT_HOP.size:
        length, _, _, interface = _NEXT_HOP.unpack_from(hops)
        if interface == index:
            return dict(_attributes(hops[_NEXT_HOP.size : length]))
        hops = hops[max(_aligned(length), _NEXT_HOP.size) :]
    return attributes


def _gateway(attributes: dict[int, bytes]) -> IPAddress | None:
    if _RTA_GATEWAY in attributes:
        return ip_address(attributes[_RTA_GATEWAY])
    if _RTA_VIA in attributes:  # struct rtvia: two bytes of family, then the address
        return ip_address(attributes[_RTA_VIA][2:])
    return None


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _NLA_TYPE_MASK, data[_ATTRIBUTE.size : length]
        data = data[_aligned(length) :]


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(_aligned(length) - length)


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _u32(value: int) -> bytes:
    return struct.pack("=I", value)

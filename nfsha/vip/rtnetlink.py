"""Route netlink (addresses, links) as bytes: builds requests, reads answers and events.

Pure: opens no socket, reads no clock, decides nothing. Numbers are from linux/netlink.h,
linux/rtnetlink.h, linux/if_addr.h and linux/if_link.h. A cut or malformed message ends the
reading of its buffer; nothing here raises for what it receives.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, NamedTuple

Vip = IPv4Address | IPv6Address

NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
RTM_NEWLINK: Final = 16
RTM_DELLINK: Final = 17
RTM_GETLINK: Final = 18
RTM_NEWADDR: Final = 20
RTM_DELADDR: Final = 21
RTM_GETADDR: Final = 22

NLM_F_REQUEST: Final = 0x001
NLM_F_ACK: Final = 0x004
NLM_F_DUMP_INTR: Final = 0x010
NLM_F_DUMP: Final = 0x300
NLM_F_REPLACE: Final = 0x100
NLM_F_CREATE: Final = 0x400

# Multicast groups of the event socket: RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR.
EVENT_GROUPS: Final = 0x1 | 0x10 | 0x100

SOL_NETLINK: Final = 270
NETLINK_GET_STRICT_CHK: Final = 12

INFINITY_S: Final = 0xFFFFFFFF  # INFINITY_LIFE_TIME: an address without an end

_AF_INET: Final = 2
_AF_INET6: Final = 10
_IFA_ADDRESS: Final = 1
_IFA_LOCAL: Final = 2
_IFA_CACHEINFO: Final = 6
_IFA_FLAGS: Final = 8
_IFA_F_NODAD: Final = 0x02
_IFA_F_DADFAILED: Final = 0x08
_IFA_F_TENTATIVE: Final = 0x40
_IFA_F_PERMANENT: Final = 0x80
_IFA_F_NOPREFIXROUTE: Final = 0x200
_IFLA_IFNAME: Final = 3
_IFF_UP: Final = 0x1
_IFF_RUNNING: Final = 0x40
_IFF_LOWER_UP: Final = 0x10000

_HEADER: Final = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE: Final = struct.Struct("=HH")  # rtattr: length, type
_ADDRESS: Final = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefixlen, flags, scope, index
_LINK: Final = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_CACHEINFO: Final = struct.Struct("=IIII")  # preferred, valid, created, touched


class Request(NamedTuple):
    """One request without its header: message type, flags and payload."""

    kind: int
    flags: int
    payload: bytes


class Message(NamedTuple):
    """One received message: its header's fields and its payload."""

    kind: int
    flags: int
    sequence: int
    port: int
    payload: bytes


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
        return self.valid_s == INFINITY_S or bool(self.flags & _IFA_F_PERMANENT)

    @property
    def usable(self) -> bool:
        """False while (or after) duplicate address detection keeps it from answering."""
        return not self.flags & (_IFA_F_TENTATIVE | _IFA_F_DADFAILED)


@dataclass(frozen=True, slots=True)
class LinkEntry:
    """One interface as the kernel shows it; `carrier` is true only while it can carry traffic."""

    index: int
    name: str
    up: bool
    carrier: bool


def add_address(index: int, vip: Vip, valid_s: int) -> Request:
    """Adds a VIP with a lifetime of `valid_s`, or sets the lifetime of one that is there.

    IPv6 goes without duplicate address detection (the old holder may still be there, silenced),
    and deprecated from the start, so that the node never picks the VIP as the source of its own
    connections (RFC 6724 rule 3); a /32 is not picked by IPv4 beside an address of the subnet.
    """
    preferred_s, flags = valid_s, 0
    if vip.version == 6:
        preferred_s, flags = 0, _IFA_F_NODAD | _IFA_F_NOPREFIXROUTE
    payload = (
        _ADDRESS.pack(_family(vip), vip.max_prefixlen, 0, 0, index)
        + _attribute(_IFA_LOCAL, vip.packed)
        + _attribute(_IFA_ADDRESS, vip.packed)
        + _attribute(_IFA_FLAGS, struct.pack("=I", flags))
        + _attribute(_IFA_CACHEINFO, _CACHEINFO.pack(preferred_s, valid_s, 0, 0))
    )
    return Request(RTM_NEWADDR, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, payload)


def delete_address(index: int, vip: Vip, prefixlen: int) -> Request:
    """Removes one address; the kernel answers EADDRNOTAVAIL if it is not there."""
    payload = (
        _ADDRESS.pack(_family(vip), prefixlen, 0, 0, index)
        + _attribute(_IFA_LOCAL, vip.packed)
        + _attribute(_IFA_ADDRESS, vip.packed)
    )
    return Request(RTM_DELADDR, NLM_F_REQUEST | NLM_F_ACK, payload)


def dump_addresses(index: int) -> Request:
    """Lists the addresses of one interface, of all interfaces for index 0.

    The kernel looks at the index only on a socket with NETLINK_GET_STRICT_CHK.
    """
    return Request(RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP, _ADDRESS.pack(0, 0, 0, 0, index))


def get_link(name: str) -> Request:
    """Asks for one interface by name; the kernel answers ENODEV if there is none."""
    payload = _LINK.pack(0, 0, 0, 0, 0) + _attribute(_IFLA_IFNAME, name.encode() + b"\0")
    return Request(RTM_GETLINK, NLM_F_REQUEST | NLM_F_ACK, payload)


def frame(request: Request, sequence: int) -> bytes:
    """The request with its header, as it goes into the socket."""
    length = _HEADER.size + len(request.payload)
    return _HEADER.pack(length, request.kind, request.flags, sequence, 0) + request.payload


def messages(buffer: bytes) -> Iterator[Message]:
    """Reads all messages of one received buffer."""
    offset = 0
    while offset + _HEADER.size <= len(buffer):
        length, kind, flags, sequence, port = _HEADER.unpack_from(buffer, offset)
        if length < _HEADER.size or offset + length > len(buffer):
            return
        payload = buffer[offset + _HEADER.size : offset + length]
        yield Message(kind, flags, sequence, port, payload)
        offset += _align(length)


def error_code(message: Message) -> int:
    """The errno that an NLMSG_ERROR or NLMSG_DONE message carries, 0 for an acknowledgement."""
    if len(message.payload) < 4:
        return 0
    (code,) = struct.unpack_from("=i", message.payload)
    return -int(code)


def address_entry(message: Message) -> AddressEntry | None:
    """Reads an RTM_NEWADDR or RTM_DELADDR message; None if it is cut or of another family."""
    if len(message.payload) < _ADDRESS.size:
        return None
    family, prefixlen, flags, _, index = _ADDRESS.unpack_from(message.payload)
    if family not in (_AF_INET, _AF_INET6):
        return None
    attributes = dict(_attributes(message.payload, _ADDRESS.size))
    # IFA_LOCAL is the own address; IFA_ADDRESS may be that of a point-to-point peer (if_addr.h).
    raw = attributes.get(_IFA_LOCAL, attributes.get(_IFA_ADDRESS, b""))
    if len(raw) != (4 if family == _AF_INET else 16):
        return None
    valid_s, touched_cs = INFINITY_S, 0
    if len(cacheinfo := attributes.get(_IFA_CACHEINFO, b"")) >= _CACHEINFO.size:
        _, valid_s, _, touched_cs = _CACHEINFO.unpack_from(cacheinfo)
    if len(wide := attributes.get(_IFA_FLAGS, b"")) >= 4:
        (flags,) = struct.unpack_from("=I", wide)
    return AddressEntry(index, ip_address(raw), prefixlen, flags, valid_s, touched_cs, message.port)


def link_entry(message: Message) -> LinkEntry | None:
    """Reads an RTM_NEWLINK or RTM_DELLINK message.

    None if it is cut, or not about the link itself: a bridge says with family AF_BRIDGE that
    a port left it, by the same message type.
    """
    if len(message.payload) < _LINK.size:
        return None
    family, _, index, flags, _ = _LINK.unpack_from(message.payload)
    if family != 0:
        return None
    raw = dict(_attributes(message.payload, _LINK.size)).get(_IFLA_IFNAME, b"")
    name = raw.rstrip(b"\0").decode(errors="replace")
    able = _IFF_UP | _IFF_RUNNING | _IFF_LOWER_UP
    return LinkEntry(index, name, bool(flags & _IFF_UP), flags & able == able)


def _family(vip: Vip) -> int:
    return _AF_INET if vip.version == 4 else _AF_INET6


def _align(length: int) -> int:
    return (length + 3) & ~3


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(_align(length) - length)


def _attributes(payload: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    while offset + _ATTRIBUTE.size <= len(payload):
        length, kind = _ATTRIBUTE.unpack_from(payload, offset)
        if length < _ATTRIBUTE.size or offset + length > len(payload):
            return
        yield kind & 0x3FFF, payload[offset + _ATTRIBUTE.size : offset + length]
        offset += _align(length)

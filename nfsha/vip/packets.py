"""ARP and IPv6 neighbour discovery as Ethernet frames, and the kernel filters that pick them out.

Pure: opens no socket, reads no clock. What is received may be anything: `heard` returns None for
all that is short, malformed or of no interest, and never raises.

ARP is RFC 826, probes and announcements RFC 5227, neighbour discovery RFC 4861.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from nfsha.vip.rtnetlink import Vip

ETH_P_ARP: Final = 0x0806
ETH_P_IPV6: Final = 0x86DD
FRAME_BYTES_MAX: Final = 256  # what is read of a frame: more than any ARP or advertisement needs
FILTER_VIPS_MAX: Final = 64  # the filter's jumps reach 255 steps

_BROADCAST: Final = b"\xff" * 6
_NOBODY: Final = bytes(6)
_ALL_NODES: Final = IPv6Address("ff02::1")
_ARP_REQUEST: Final = 1
_ARP_REPLY: Final = 2
_ETHERNET: Final = struct.Struct("!6s6sH")
_ARP: Final = struct.Struct("!HHBBH6s4s6s4s")
_ARP_KIND: Final = (1, 0x0800, 6, 4)  # Ethernet, IPv4, and the lengths of their addresses
_IPV6: Final = struct.Struct("!IHBB16s16s")
_ICMPV6: Final = 58
_NEIGHBOUR: Final = struct.Struct("!BBHI16s")  # type, code, checksum, flags, target
_SOLICITATION: Final = 135
_ADVERTISEMENT: Final = 136
_OVERRIDE: Final = 0x20000000
_SOURCE_LINK_ADDRESS: Final = 1
_TARGET_LINK_ADDRESS: Final = 2
_HOP_LIMIT: Final = 255  # RFC 4861 section 7.1: anything lower came through a router

# linux/bpf_common.h
_LOAD_WORD: Final = 0x20
_LOAD_HALF: Final = 0x28
_LOAD_BYTE: Final = 0x30
_JUMP_IF_EQUAL: Final = 0x15
_RETURN: Final = 0x06


@dataclass(frozen=True, slots=True)
class Heard:
    """One host said in a frame that it has `address`, at the link address `mac`.

    `answer` is true for an ARP reply or a neighbour advertisement, false for an ARP request.
    """

    address: Vip
    mac: bytes
    answer: bool


def arp_announcements(mac: bytes, vip: IPv4Address) -> list[bytes]:
    """Gratuitous ARP as request (RFC 5227) and as reply: some hosts learn only from one of them.

    In the reply the target's link address is our own too, else Linux does not take it as
    gratuitous and keeps a young cache entry (arp_is_garp in net/ipv4/arp.c).
    """
    return [
        _arp(_BROADCAST, _ARP_REQUEST, mac, vip, _NOBODY, vip),
        _arp(_BROADCAST, _ARP_REPLY, mac, vip, mac, vip),
    ]


def arp_request(mac: bytes, sender: IPv4Address, target: IPv4Address) -> bytes:
    """Asks who has `target`. With sender 0.0.0.0 it is a probe, which changes no cache."""
    return _arp(_BROADCAST, _ARP_REQUEST, mac, sender, _NOBODY, target)


def unsolicited_advertisement(mac: bytes, vip: IPv6Address) -> bytes:
    """Tells all nodes, with the override flag, that the VIP is at our link address."""
    option = bytes([_TARGET_LINK_ADDRESS, 1]) + mac
    body = _NEIGHBOUR.pack(_ADVERTISEMENT, 0, 0, _OVERRIDE, vip.packed) + option
    return _icmpv6(mac, vip, _ALL_NODES, body)


def solicitation(mac: bytes, source: IPv6Address, target: IPv6Address) -> bytes:
    """Asks who has `target`, from an address of our own."""
    option = bytes([_SOURCE_LINK_ADDRESS, 1]) + mac
    body = _NEIGHBOUR.pack(_SOLICITATION, 0, 0, 0, target.packed) + option
    group = IPv6Address(int(IPv6Address("ff02::1:ff00:0")) | int(target) & 0xFFFFFF)
    return _icmpv6(mac, source, group, body)


def heard(data: bytes) -> Heard | None:
    """Reads a received Ethernet frame; None if it does not say who has which address."""
    if len(data) < _ETHERNET.size:
        return None
    _, source, kind = _ETHERNET.unpack_from(data)
    if kind == ETH_P_ARP:
        return _heard_arp(data[_ETHERNET.size :])
    if kind == ETH_P_IPV6:
        return _heard_advertisement(source, data[_ETHERNET.size :])
    return None


def printable_mac(mac: bytes) -> str:
    """The link address as people write it."""
    return mac.hex(":")


def arp_filter(vips: Iterable[IPv4Address]) -> bytes:
    """A socket filter that passes ARP replies, and requests whose sender claims one of the VIPs."""
    claimed = [int(vip) for vip in vips]
    tests = [_step(_JUMP_IF_EQUAL, vip, len(claimed) - n) for n, vip in enumerate(claimed)]
    return b"".join(
        [
            _step(_LOAD_HALF, 20),  # operation
            _step(_JUMP_IF_EQUAL, _ARP_REPLY, len(claimed) + 2),
            _step(_LOAD_WORD, 28),  # sender's address
            *tests,
            _step(_RETURN, 0),
            _step(_RETURN, FRAME_BYTES_MAX),
        ]
    )


def advertisement_filter() -> bytes:
    """A socket filter that passes neighbour advertisements; for a socket that gets IPv6 only."""
    return b"".join(
        [
            _step(_LOAD_BYTE, 20),  # next header
            _step(_JUMP_IF_EQUAL, _ICMPV6, 0, 3),
            _step(_LOAD_BYTE, 54),  # type of ICMPv6
            _step(_JUMP_IF_EQUAL, _ADVERTISEMENT, 0, 1),
            _step(_RETURN, FRAME_BYTES_MAX),
            _step(_RETURN, 0),
        ]
    )


def _step(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One struct sock_filter (linux/filter.h): jumps count the steps that they leave out."""
    return struct.pack("=HBBI", code, if_true, if_false, operand)


def _arp(
    to: bytes, operation: int, mac: bytes, sender: IPv4Address, other: bytes, target: IPv4Address
) -> bytes:
    body = _ARP.pack(*_ARP_KIND, operation, mac, sender.packed, other, target.packed)
    return _ETHERNET.pack(to, mac, ETH_P_ARP) + body


def _icmpv6(mac: bytes, source: IPv6Address, group: IPv6Address, body: bytes) -> bytes:
    total = _checksum(source.packed, group.packed, body)
    body = body[:2] + struct.pack("!H", total) + body[4:]
    header = _IPV6.pack(6 << 28, len(body), _ICMPV6, _HOP_LIMIT, source.packed, group.packed)
    to = b"\x33\x33" + group.packed[-4:]  # RFC 2464 section 7
    return _ETHERNET.pack(to, mac, ETH_P_IPV6) + header + body


def _checksum(source: bytes, destination: bytes, body: bytes) -> int:
    """RFC 4443 section 2.3; 0 over a body that holds its right checksum already."""
    data = source + destination + struct.pack("!II", len(body), _ICMPV6) + body
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def _heard_arp(body: bytes) -> Heard | None:
    if len(body) < _ARP.size:
        return None
    *kind, operation, mac, sender, _, _ = _ARP.unpack_from(body)
    if tuple(kind) != _ARP_KIND or operation not in (_ARP_REQUEST, _ARP_REPLY):
        return None
    return Heard(IPv4Address(sender), mac, operation == _ARP_REPLY)


def _heard_advertisement(mac: bytes, packet: bytes) -> Heard | None:
    if len(packet) < _IPV6.size + _NEIGHBOUR.size:
        return None
    _, length, following, hops, source, destination = _IPV6.unpack_from(packet)
    body = packet[_IPV6.size : _IPV6.size + length]
    if following != _ICMPV6 or hops != _HOP_LIMIT or not _NEIGHBOUR.size <= len(body) == length:
        return None
    kind, code, _, _, target = _NEIGHBOUR.unpack_from(body)
    if kind != _ADVERTISEMENT or code != 0 or _checksum(source, destination, body) != 0:
        return None
    return Heard(IPv6Address(target), _told_mac(body[_NEIGHBOUR.size :]) or mac, answer=True)


def _told_mac(options: bytes) -> bytes | None:
    """The target's link address among the options, if it is there."""
    while len(options) >= 8 and options[1] > 0:
        if options[0] == _TARGET_LINK_ADDRESS:
            return options[2:8]
        options = options[8 * options[1] :]
    return None

"""The packets by which a witness is asked, and the filters that let only their answers in.

Pure computing but for `attach`: builds and takes apart ARP (RFC 826), ICMP echo (RFC 792), ICMPv6
echo (RFC 4443) and neighbour discovery (RFC 4861). What does not fit is None, whatever the bytes.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

TOKEN_BYTES = 16
"""Length of the random token in an echo: nobody who does not see the request can guess it."""

HOP_LIMIT = 255
"""Hop limit of neighbour discovery: a router would lower it, so 255 proves "this link"."""

_ARP = struct.Struct("!HHBBH6s4s6s4s")
_ETHERNET = 1
_IPV4 = 0x0800
_ARP_REQUEST = 1
_ARP_REPLY = 2

_ECHO = struct.Struct(f"!BBHHH{TOKEN_BYTES}s")
_ECHO_REQUEST = 8
_ECHO_REPLY = 0
_ECHO6_REQUEST = 128
_ECHO6_REPLY = 129

_NEIGHBOUR = struct.Struct("!BBHI16s")
_SOLICITATION = 135
_ADVERTISEMENT = 136
_SOLICITED = 1 << 30
_OPTION_SOURCE = 1  # the solicitation's own hardware address; the length counts units of 8 bytes
_ALL_BUT_24 = int(IPv6Address("ff02::1:ff00:0"))

_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
_INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter of linux/filter.h
_LOAD_BYTE = 0x30  # BPF_LD | BPF_B | BPF_ABS
_LOAD_HALF = 0x28  # BPF_LD | BPF_H | BPF_ABS
_LOAD_HALF_AFTER_X = 0x48  # BPF_LD | BPF_H | BPF_IND
_LOAD_BYTE_AFTER_X = 0x50  # BPF_LD | BPF_B | BPF_IND
_LOAD_X_HEADER = 0xB1  # BPF_LDX | BPF_B | BPF_MSH: X = 4 * the low half of the byte
_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_PACKET_TYPE = 0xFFFFF000 + 4  # SKF_AD_OFF + SKF_AD_PKTTYPE: 0 when sent to this machine alone
_ALL = 0xFFFFFFFF

Instruction = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class ArpReply:
    """Who says so, and to whom it is said."""

    sender: IPv4Address
    to_mac: bytes
    to: IPv4Address


@dataclass(frozen=True, slots=True)
class EchoReply:
    """What an echo brought back."""

    sequence: int
    token: bytes


def arp_request(mac: bytes, source: IPv4Address, target: IPv4Address) -> bytes:
    """Asks who has the target, as an ARP payload without the Ethernet header."""
    return _ARP.pack(
        _ETHERNET, _IPV4, 6, 4, _ARP_REQUEST, mac, source.packed, bytes(6), target.packed
    )


def parse_arp_reply(data: bytes) -> ArpReply | None:
    """Takes an ARP payload apart; None if it is no reply for IPv4 over Ethernet."""
    if len(data) < _ARP.size:
        return None
    *kind, _, sender, to_mac, to = _ARP.unpack_from(data)
    if kind != [_ETHERNET, _IPV4, 6, 4, _ARP_REPLY]:
        return None
    return ArpReply(IPv4Address(sender), to_mac, IPv4Address(to))


def echo_request(version: int, identity: int, sequence: int, token: bytes) -> bytes:
    """An echo request of IP version 4 or 6; in 6 the kernel fills in the checksum (RFC 3542)."""
    if version == 6:
        return _ECHO.pack(_ECHO6_REQUEST, 0, 0, identity, sequence, token)
    unsummed = _ECHO.pack(_ECHO_REQUEST, 0, 0, identity, sequence, token)
    return _ECHO.pack(_ECHO_REQUEST, 0, checksum(unsummed), identity, sequence, token)


def parse_echo_reply(version: int, data: bytes, identity: int) -> EchoReply | None:
    """Takes an ICMP message apart; None if it is no echo reply for this identity.

    A raw socket gives the IP header too in version 4 (raw(7)), and not in 6.
    """
    if version == 4:
        data = data[(data[0] & 15) * 4 :] if data else data
    if len(data) != _ECHO.size:
        return None
    kind, code, _, found, sequence, token = _ECHO.unpack(data)
    wanted = _ECHO_REPLY if version == 4 else _ECHO6_REPLY
    if (kind, code, found) != (wanted, 0, identity):
        return None
    return EchoReply(sequence, token)


def solicitation(mac: bytes, target: IPv6Address) -> bytes:
    """Asks on the link for the target (RFC 4861 section 4.3); the kernel fills in the checksum."""
    return _NEIGHBOUR.pack(_SOLICITATION, 0, 0, 0, target.packed) + bytes([_OPTION_SOURCE, 1]) + mac


def solicited_node(target: IPv6Address) -> IPv6Address:
    """The multicast address to which a solicitation goes (RFC 4291 section 2.7.1)."""
    return IPv6Address(_ALL_BUT_24 | int(target) & 0xFFFFFF)


def parse_advertisement(data: bytes) -> IPv6Address | None:
    """Whom a solicited neighbour advertisement speaks for; None if it is none."""
    if len(data) < _NEIGHBOUR.size:
        return None
    kind, code, _, flags, target = _NEIGHBOUR.unpack_from(data)
    if (kind, code) != (_ADVERTISEMENT, 0) or not flags & _SOLICITED:
        return None
    return IPv6Address(target)


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def arp_filter() -> list[Instruction]:
    """ARP replies sent to this machine alone. The packet socket must be of SOCK_DGRAM."""
    return [
        (_LOAD_BYTE, 0, 0, _PACKET_TYPE),
        (_IF_EQUAL, 0, 3, 0),
        (_LOAD_HALF, 0, 0, 6),
        (_IF_EQUAL, 0, 1, _ARP_REPLY),
        (_RETURN, 0, 0, _ALL),
        (_RETURN, 0, 0, 0),
    ]


def echo_filter(identity: int) -> list[Instruction]:
    """Echo replies for this identity, behind an IPv4 header of any length."""
    return [
        (_LOAD_X_HEADER, 0, 0, 0),
        (_LOAD_BYTE_AFTER_X, 0, 0, 0),
        (_IF_EQUAL, 0, 3, _ECHO_REPLY),
        (_LOAD_HALF_AFTER_X, 0, 0, 4),
        (_IF_EQUAL, 0, 1, identity),
        (_RETURN, 0, 0, _ALL),
        (_RETURN, 0, 0, 0),
    ]


def icmp6_filter(identity: int) -> list[Instruction]:
    """Echo replies for this identity, and neighbour advertisements."""
    return [
        (_LOAD_BYTE, 0, 0, 0),
        (_IF_EQUAL, 3, 0, _ADVERTISEMENT),
        (_IF_EQUAL, 0, 3, _ECHO6_REPLY),
        (_LOAD_HALF, 0, 0, 4),
        (_IF_EQUAL, 0, 1, identity),
        (_RETURN, 0, 0, _ALL),
        (_RETURN, 0, 0, 0),
    ]


def attach(receiver: socket.socket, instructions: Sequence[Instruction]) -> None:
    """Lets a socket receive only what the classic BPF program takes (socket(7)). Raises OSError."""
    code = b"".join(_INSTRUCTION.pack(*each) for each in instructions)
    program = ctypes.create_string_buffer(code, len(code))
    head = struct.pack("@HP", len(instructions), ctypes.addressof(program))  # struct sock_fprog
    receiver.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, head)

"""Tickles: a bare TCP acknowledgement from a VIP to a client of the server that was before.

The client's kernel still believes in its connection, and waits for its next retransmission: 10 s
and more after a long outage. What it hears with a sequence number that cannot be, it answers with
its own acknowledgement (RFC 9293 section 3.10.7.4); that reaches a kernel that knows of no such
connection, and resets it; the client connects anew at once.

Only builds and sends packets: when, and whether this node may, is said by whoever sends.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable
from ipaddress import IPv4Address
from typing import Final

from nfsha.vip.connections import Ends, ends_of
from nfsha.vip.rtnetlink import Vip, VipError

_TCP: Final = struct.Struct("!HHIIBBHHH")  # RFC 9293 section 3.1
_IPV4: Final = struct.Struct("!BBHHHBBH4s4s")
_IPV6: Final = struct.Struct("!IHBB16s16s")
_OFFSET: Final = (_TCP.size // 4) << 4
SYN: Final = 0x02
RST: Final = 0x04
_ACK: Final = 0x10
_WINDOW: Final = 8192  # not 0: should a number fit by chance, the client must not stop sending
_HOPS: Final = 64
_DONT_FRAGMENT: Final = 0x4000


class TickleSocket:
    """Sends tickles; hears nothing. Made in the network namespace of the calling thread."""

    def __init__(self, interface: str, *, ipv6: bool) -> None:
        """`interface` is that of link-local clients. Raises VipError without CAP_NET_RAW."""
        self._interface = interface
        self._sockets: dict[int, socket.socket] = {}
        try:
            for family in (socket.AF_INET, socket.AF_INET6) if ipv6 else (socket.AF_INET,):
                # IPPROTO_RAW: the header is ours, and nothing that arrives is copied to us.
                kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
                self._sockets[family] = socket.socket(family, kind, socket.IPPROTO_RAW)
        except OSError as error:
            self.close()
            raise VipError(
                f"no raw socket to wake clients with: {error.strerror}; nfsha needs CAP_NET_RAW"
            ) from error

    def close(self) -> None:
        """Closes the sockets. Idempotent."""
        for one in self._sockets.values():
            one.close()
        self._sockets.clear()

    def send(self, connections: Iterable[bytes]) -> tuple[int, str]:
        """One tickle for each; returns how many went out, and why the last of the others did not.

        Takes about 30 us for each.
        """
        sent, trouble = 0, ""
        for one in connections:
            ends = ends_of(one)
            try:
                self.put(ends.client, tickle(ends, *struct.unpack("=II", os.urandom(8))))
            except OSError as error:  # no route, a full queue: the next round tries again
                trouble = f"{ends.client}: {error.strerror}"
            else:
                sent += 1
        return sent, trouble

    def put(self, to: Vip, packet: bytes) -> None:
        """Sends one whole packet. Raises OSError."""
        if isinstance(to, IPv4Address):
            self._sockets[socket.AF_INET].sendto(packet, (str(to), 0))
            return
        sockets = self._sockets.get(socket.AF_INET6)
        if sockets is None:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        scope = socket.if_nametoindex(self._interface) if to.is_link_local else 0
        sockets.sendto(packet, (str(to), 0, 0, scope))


def tickle(ends: Ends, sequence: int, acknowledged: int) -> bytes:
    """The whole packet, with its IP header and right checksums.

    The numbers may be any. Other ones in each round: a pair that the client takes for a good one
    (one chance in some ten thousand) does nothing at all.
    """
    return bare(ends, sequence, acknowledged, _ACK)


def bare(ends: Ends, sequence: int, acknowledged: int, flags: int) -> bytes:
    """A packet from the VIP to the client that holds a segment without data."""
    segment = _segment(ends, sequence, acknowledged, flags, 0)
    check = checksum(_pseudo(ends.vip, ends.client, len(segment)) + segment)
    segment = _segment(ends, sequence, acknowledged, flags, check)
    if isinstance(ends.vip, IPv4Address):
        return _ipv4(ends, len(segment)) + segment
    header = _IPV6.pack(
        6 << 28,
        len(segment),
        socket.IPPROTO_TCP,
        _HOPS,
        ends.vip.packed,
        ends.client.packed,
    )
    return header + segment


def checksum(data: bytes) -> int:
    """RFC 1071; 0 over data that holds its right checksum already."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def _segment(ends: Ends, sequence: int, acknowledged: int, flags: int, check: int) -> bytes:
    return _TCP.pack(
        ends.port, ends.client_port, sequence, acknowledged, _OFFSET, flags, _WINDOW, check, 0
    )


def _ipv4(ends: Ends, length: int) -> bytes:
    """RFC 791. The kernel sets the identification, the length and the checksum (raw(7))."""
    return _IPV4.pack(
        0x45,
        0,
        _IPV4.size + length,
        0,
        _DONT_FRAGMENT,
        _HOPS,
        socket.IPPROTO_TCP,
        0,
        ends.vip.packed,
        ends.client.packed,
    )


def _pseudo(source: Vip, destination: Vip, length: int) -> bytes:
    """What TCP's checksum covers besides the segment (RFC 9293 3.1, RFC 8200 8.1)."""
    layout = "!HH" if isinstance(source, IPv4Address) else "!II"
    return source.packed + destination.packed + struct.pack(layout, socket.IPPROTO_TCP, length)

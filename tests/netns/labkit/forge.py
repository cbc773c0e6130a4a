"""Sends UDP datagrams under a foreign source address, for tests of replayed and forged messages."""

from __future__ import annotations

import socket
import struct

from tests.netns.labkit.observe import Datagram


def send_forged(datagram: Datagram) -> None:
    """Sends it from this thread's namespace with the source address and port that it bears (IPv4).

    The checksum is left out, which UDP over IPv4 allows (RFC 768).
    """
    udp = struct.pack(
        "!HHHH", datagram.source_port, datagram.target_port, 8 + len(datagram.content), 0
    )
    # version and length, tos, total length and id (the kernel's work), flags, ttl 64, UDP, checksum
    header = struct.pack("!BBHHHBBH", 0x45, 0, 0, 0, 0, 64, socket.IPPROTO_UDP, 0)
    ends = socket.inet_aton(datagram.source) + socket.inet_aton(datagram.target)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        sock.sendto(header + ends + udp + datagram.content, (datagram.target, 0))

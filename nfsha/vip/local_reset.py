"""Ends this node's own old connections where the kernel was built without INET_DIAG_DESTROY.

A kernel ends a connection for a reset with exactly the sequence number that it expects next (RFC
5961 section 3), and says that number itself: to a SYN in the client's name it answers with an
acknowledgement (section 4), which is read as it leaves the machine. So this works only while the
firewall lets it leave: as soon as the node serves again. What leaves does a client no harm.

It must only be given connections that are known to be old: it would end good ones as well.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from typing import Final

from nfsha.vip.connections import MAPPED, Ends, ends_of
from nfsha.vip.tickle import RST, SYN, TickleSocket, bare

AT_ONCE: Final = 200
"""So many at once: the filter has at most 11 steps for each, and 4,096 in all (BPF_MAXINSNS)."""

WITHIN_S: Final = 0.2

_ETH_P_ALL: Final = 0x0003
_SO_ATTACH_FILTER: Final = 26  # asm-generic/socket.h
_LOAD_WORD: Final = 0x20  # linux/bpf_common.h
_JUMP_IF_EQUAL: Final = 0x15
_RETURN: Final = 0x06
_HEADERS_BYTES: Final = 128
_PORTS_BYTES: Final = 2


def reset(connections: Sequence[bytes], sender: TickleSocket) -> int:
    """Ends these connections of this machine, the first `AT_ONCE`; returns how many it reset.

    Blocks for at most `WITHIN_S`: for a thread. Raises OSError without CAP_NET_RAW.
    """
    left = set(connections[:AT_ONCE])
    done = 0
    with _listening(left) as ear:
        for one in left:
            sender.put(ends_of(one).vip, bare(_swapped(one), _any(), 0, SYN))
        deadline = time.monotonic() + WITHIN_S
        while left and (rest_s := deadline - time.monotonic()) > 0:
            ear.settimeout(rest_s)
            try:
                said = _said(ear.recv(_HEADERS_BYTES))
            except TimeoutError:
                break
            if said is not None and said[0] in left:
                left.remove(said[0])
                sender.put(ends_of(said[0]).vip, bare(_swapped(said[0]), said[1], 0, RST))
                done += 1
    return done


def _swapped(one: bytes) -> Ends:
    """The ends as the client has them: what is built with these is in its name."""
    vip, port, client, client_port = ends_of(one)
    return Ends(client, client_port, vip, port)


def _any() -> int:
    return int.from_bytes(os.urandom(4), "big")


def _listening(wanted: Iterable[bytes]) -> socket.socket:
    """A socket that gets what this machine sends on these connections, from its IP header on."""
    ear = socket.socket(
        socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, socket.htons(_ETH_P_ALL)
    )
    try:
        steps = b"".join(map(_steps, wanted)) + _step(_RETURN, 0)
        buffer = ctypes.create_string_buffer(steps, len(steps))
        program = struct.pack("@HP", len(steps) // 8, ctypes.addressof(buffer))  # sock_fprog
        ear.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    except OSError:
        ear.close()
        raise
    return ear


def _steps(one: bytes) -> bytes:
    """Passes packets with the client's address and both ports. Whose they are is looked at later.

    A header of the other IP version has other bytes there: one that fits all the same is found out.
    """
    _, port, client, client_port = ends_of(one)
    ipv4 = client.version == 4
    address, ports = (16, 20) if ipv4 else (24, 40)
    words = [*struct.iter_unpack("!I", client.packed), (port << 16 | client_port,)]
    places = [*range(address, address + len(client.packed), 4), ports]
    steps = b""
    for number, ((word,), place) in enumerate(zip(words, places, strict=True), start=1):
        further = 2 * (len(words) - number) + 1  # past the other tests and the return
        steps += _step(_LOAD_WORD, place) + _step(_JUMP_IF_EQUAL, word, 0, further)
    return steps + _step(_RETURN, _HEADERS_BYTES)


def _step(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One struct sock_filter (linux/filter.h): jumps count the steps that they leave out."""
    return struct.pack("=HBBI", code, if_true, if_false, operand)


def _said(packet: bytes) -> tuple[bytes, int] | None:
    """The connection that this packet belongs to, from the server's side, and what it expects."""
    version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= 40 and packet[0] == 0x45 and packet[9] == socket.IPPROTO_TCP:
        source, target, at = MAPPED + packet[12:16], MAPPED + packet[16:20], 20
    elif version == 6 and len(packet) >= 60 and packet[6] == socket.IPPROTO_TCP:
        source, target, at = packet[8:24], packet[24:40], 40
    else:
        return None
    server, client = packet[at : at + _PORTS_BYTES], packet[at + _PORTS_BYTES : at + 4]
    return source + server + target + client, int.from_bytes(packet[at + 8 : at + 12], "big")

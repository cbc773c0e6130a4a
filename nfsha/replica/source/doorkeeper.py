"""Lets one address reach a listening socket of a child; the kernel drops what others send.

rsync accepts a connection, and starts a process for it, before it looks at the address. So
whoever reaches the port could fill the unit's limit of tasks with connections that say nothing, and
the daemon could start no thread or child any more. A socket filter (socket(7), SO_ATTACH_FILTER) on
the listening socket drops the packets instead: others see a port that does not answer.

It takes the socket out of the child by pidfd_getfd(2), which needs the right to trace it
(ptrace(2): same user, and with Yama's ptrace_scope 1 a descendant). It never reads or writes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final

_PIDFD_GETFD: Final = 438  # the same on all architectures (Linux 5.6)
_SO_ATTACH_FILTER: Final = 26  # asm-generic/socket.h
_INSTRUCTION: Final = struct.Struct("=HBBI")  # struct sock_filter of linux/filter.h
_LOAD_WORD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_IF_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K
_NETWORK_HEADER: Final = -0x100000  # SKF_NET_OFF
_SOURCE_AT: Final = {4: 12, 6: 8}  # RFC 791 section 3.1, RFC 8200 section 3
_libc = ctypes.CDLL(None, use_errno=True)


def admit_only(pid: int, port: int, peer: IPv4Address | IPv6Address) -> None:
    """Closes the listening sockets of a process on `port` to all addresses but the peer's.

    Raises OSError when the kernel does not allow it, or when there is no such socket.
    """
    closed = 0
    handle = os.pidfd_open(pid)
    try:
        for descriptor in _sockets(pid):
            with socket.socket(fileno=_take(handle, descriptor)) as taken:
                if _listens(taken, port):
                    attach(taken, peer)
                    closed += 1
    finally:
        os.close(handle)
    if not closed:
        raise OSError(0, "it has no listening socket")


def attach(listener: socket.socket, peer: IPv4Address | IPv6Address) -> None:
    """Has the kernel drop what this socket gets from others; accepted sockets inherit that."""
    instructions = filter_for(peer)
    program = ctypes.create_string_buffer(b"".join(_INSTRUCTION.pack(*one) for one in instructions))
    head = struct.pack("@HP", len(instructions), ctypes.addressof(program))  # struct sock_fprog
    listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, head)


def filter_for(peer: IPv4Address | IPv6Address) -> list[tuple[int, int, int, int]]:
    """The filter's instructions (code, jump if true, jump if false, constant)."""
    words = struct.unpack(f"!{len(peer.packed) // 4}I", peer.packed)
    instructions = []
    for number, word in enumerate(words):
        at = (_NETWORK_HEADER + _SOURCE_AT[peer.version] + 4 * number) & 0xFFFFFFFF
        to_the_end = 2 * (len(words) - number) - 1
        instructions += [(_LOAD_WORD, 0, 0, at), (_JUMP_IF_EQUAL, 0, to_the_end, word)]
    return [*instructions, (_RETURN, 0, 0, 0xFFFFFFFF), (_RETURN, 0, 0, 0)]


def _sockets(pid: int) -> Iterator[int]:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if str(entry.readlink()).startswith("socket:"):
                yield int(entry.name)


def _take(handle: int, descriptor: int) -> int:
    taken = int(_libc.syscall(_PIDFD_GETFD, handle, descriptor, 0))
    if taken < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return taken


def _listens(taken: socket.socket, port: int) -> bool:
    return (
        taken.family in (socket.AF_INET, socket.AF_INET6)
        and bool(taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        and taken.getsockname()[1] == port
    )

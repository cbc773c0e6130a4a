"""The kernel's TCP connections: lists those at the VIPs, and destroys them (linux/inet_diag.h).

One netlink socket for each question, closed after it. Everything here blocks, if only inside the
kernel: for a thread. A look costs 0.4 ms of CPU on a machine whose table of connections has room
for 262,144, and 1 us for each connection that was known already. pyroute2 takes 0.1 ms for each, so
that only its numbers are used.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from pyroute2.netlink import (
    NETLINK_SOCK_DIAG,
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
)
from pyroute2.netlink.diag import (
    SOCK_DESTROY,
    SOCK_DIAG_BY_FAMILY,
    SS_CLOSE_WAIT,
    SS_CLOSING,
    SS_ESTABLISHED,
    SS_FIN_WAIT1,
    SS_FIN_WAIT2,
    SS_LAST_ACK,
    SS_SYN_RECV,
)

from nfsha.vip.connections import MAPPED, Places

SOCKETS_MAX: Final = 65536
"""Most connections that are read at once: what is beyond is neither listed nor destroyed."""

_ANSWER_WITHIN_S: Final = 2
_BUFFER_BYTES: Final = 65536
_DESTROY_AT_ONCE: Final = 64
_ROUNDS_MAX: Final = 3

LISTED: Final = 1 << SS_ESTABLISHED | 1 << SS_CLOSE_WAIT
"""States in which the client still believes in the connection and waits for answers."""

LEFT: Final = (
    LISTED
    | 1 << SS_SYN_RECV
    | 1 << SS_FIN_WAIT1
    | 1 << SS_FIN_WAIT2
    | 1 << SS_CLOSING
    | 1 << SS_LAST_ACK
)
"""States in which the kernel would still answer the client. Not TIME_WAIT: a new SYN ends that."""

_HEADER: Final = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_REQUEST: Final = struct.Struct("=BBBxI48s")  # inet_diag_req_v2: family, protocol, extensions,
# states, inet_diag_sockid
_ATTRIBUTE: Final = struct.Struct("=HH")  # nlattr: length, type
_STEP: Final = struct.Struct("=BBH")  # inet_diag_bc_op: code, bytes to go on yes, and on no
_BYTECODE: Final = 1  # INET_DIAG_REQ_BYTECODE
_JUMP: Final = 1  # INET_DIAG_BC_JMP
_PORT_IS: Final = 11  # INET_DIAG_BC_S_EQ, since Linux 4.16
_LENGTH_AND_TYPE: Final = struct.Struct("=IH")  # the beginning of nlmsghdr
_ID_BYTES: Final = 48  # inet_diag_sockid: ports, source, destination, interface, cookie
_KEY_OFFSET: Final = _HEADER.size + 4  # in inet_diag_msg, after family, state, timer, retransmits
_KEY_END: Final = _KEY_OFFSET + _ID_BYTES


class DiagError(Exception):
    """The kernel does not tell of its connections, or does not end them: one sentence."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One connection as the kernel has it. `key` names exactly this socket, while it lives."""

    connection: bytes
    family: int
    key: bytes


class Watch:
    """Who is connected, look by look: only what is new is taken apart."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._keys: dict[int, set[bytes]] = {}
        self._clients: dict[bytes, bytes] = {}

    def look(self, without: Container[bytes]) -> tuple[bytes, ...] | None:
        """The clients' connections, by when they were first seen; None if nothing has changed.

        The kernel tells no age, so new is what was not there before; of what is new at once, none
        is newer. `without`: keys of connections that do not count. Raises DiagError.
        """
        keys = _keys(self._places, LISTED)
        if keys == self._keys:
            return None
        there = set().union(*keys.values())
        self._clients = {key: one for key, one in self._clients.items() if key in there}
        for family, found in keys.items():
            for key in found - self._keys.get(family, set()):
                one = _connection(family, key)
                if key not in without and self._places.has(one) and self._places.has_client(one):
                    self._clients[key] = one
        self._keys = keys
        return tuple(dict.fromkeys(self._clients.values()))


def connections(places: Places, states: int = LISTED) -> list[Entry]:
    """The TCP connections at these places. Raises DiagError."""
    found = (
        Entry(_connection(family, key), family, key)
        for family, keys in _keys(places, states).items()
        for key in keys
    )
    return [entry for entry in found if places.has(entry.connection)]


def _keys(places: Places, states: int) -> dict[int, set[bytes]]:
    """The keys of all connections at these ports, by family, at most `SOCKETS_MAX` of each.

    Sockets of IPv6 serve mapped IPv4 clients too.
    """
    wanted = _wanted(places.ports.values())
    found: dict[int, set[bytes]] = {}
    for family in (socket.AF_INET, socket.AF_INET6):
        with _Line() as line:
            found[family] = set(line.dump(family, states, wanted))
    return found


def destroy(entries: Sequence[Entry]) -> int:
    """Ends these connections at once, and tells their owners; returns how many it ended.

    The kernel sends a reset to each client; where the firewall drops that, the client learns
    nothing. One that is gone already does not count. Raises DiagError.
    """
    ended = 0
    with _Line() as line:
        for start in range(0, len(entries), _DESTROY_AT_ONCE):
            for code in line.destroy(entries[start : start + _DESTROY_AT_ONCE]):
                if code == 0:
                    ended += 1
                elif code not in (errno.ENOENT, errno.ESTALE):
                    raise DiagError(f"a connection could not be ended: {os.strerror(code)}")
    return ended


def destroy_all(places: Places) -> tuple[int, tuple[bytes, ...]]:
    """Ends all connections at these places, and makes sure of it; returns how many, and which.

    Raises DiagError, also when there are always others.
    """
    ended, which = 0, dict[bytes, None]()
    for _ in range(_ROUNDS_MAX):
        left = connections(places, LEFT)
        if not left:
            return ended, tuple(which)
        which |= dict.fromkeys(entry.connection for entry in left)
        ended += destroy(left)
    left_over = len(connections(places, LEFT))
    if left_over:
        raise DiagError(f"{left_over} connections at the VIPs could not be ended")
    return ended, tuple(which)


def can_destroy() -> bool:
    """Was this kernel built with INET_DIAG_DESTROY? Asks it to end a connection that is none.

    Raises DiagError where it does not tell (no inet_diag, or no CAP_NET_ADMIN).
    """
    nobody = Entry(b"", socket.AF_INET, bytes(40) + b"\xff" * 8)  # INET_DIAG_NOCOOKIE
    with _Line() as line:
        (code,) = line.destroy([nobody])
    if code in (0, errno.ENOENT, errno.ESTALE):
        return True
    if code == errno.EOPNOTSUPP:
        return False
    raise DiagError(f"inet_diag gives no answer: {os.strerror(code)}")


class _Line:
    """One netlink socket, in the network namespace of the thread that made it."""

    def __init__(self) -> None:
        self._sequence = 0
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG
            )
            # Not settimeout: that asks poll(2) before each answer, and all of them are there.
            patience = struct.pack("@ll", _ANSWER_WITHIN_S, 0)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        except OSError as error:
            raise DiagError(f"inet_diag cannot be asked: {error.strerror}") from error

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def dump(self, family: int, states: int, wanted: bytes) -> list[bytes]:
        """The keys of one list. Plain and without calls: thousands of connections go through it."""
        request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, states, bytes(_ID_BYTES))
        self._send([(SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, request + wanted)])
        found: list[bytes] = []
        while len(found) < SOCKETS_MAX:
            data = self._recv()
            at = 0
            while at < len(data):
                length, kind = _LENGTH_AND_TYPE.unpack_from(data, at)
                if kind == SOCK_DIAG_BY_FAMILY:
                    found.append(data[at + _KEY_OFFSET : at + _KEY_END])
                elif kind == NLMSG_DONE:
                    return found
                elif kind == NLMSG_ERROR:
                    code = _code(data[at + _HEADER.size :])
                    raise DiagError(f"inet_diag lists no connections: {os.strerror(code)}")
                at += max(_HEADER.size, length + 3 & ~3)
        return found

    def destroy(self, entries: Sequence[Entry]) -> list[int]:
        """Asks for the end of a few; an errno for each."""
        flags = NLM_F_REQUEST | NLM_F_ACK
        self._send(
            (SOCK_DESTROY, flags, _REQUEST.pack(one.family, socket.IPPROTO_TCP, 0, LEFT, one.key))
            for one in entries
        )
        codes: list[int] = []
        while len(codes) < len(entries):
            codes += [_code(payload) for kind, payload in self._receive() if kind == NLMSG_ERROR]
        return codes

    def _send(self, requests: Iterable[tuple[int, int, bytes]]) -> None:
        data = b""
        for kind, flags, payload in requests:
            self._sequence += 1
            length = _HEADER.size + len(payload)
            data += _HEADER.pack(length, kind, flags, self._sequence, 0) + payload
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise DiagError(f"inet_diag cannot be asked: {error.strerror}") from error

    def _recv(self) -> bytes:
        try:
            return self._socket.recv(_BUFFER_BYTES)
        except BlockingIOError as error:
            raise DiagError(f"inet_diag gave no answer within {_ANSWER_WITHIN_S} s") from error
        except OSError as error:
            raise DiagError(f"inet_diag gave no answer: {error.strerror}") from error

    def _receive(self) -> Iterator[tuple[int, bytes]]:
        data = self._recv()
        at = 0
        while at + _HEADER.size <= len(data):
            length, kind, _, _, _ = _HEADER.unpack_from(data, at)
            yield kind, data[at + _HEADER.size : at + length]
            at += max(_HEADER.size, length + 3 & ~3)


def _wanted(ports: Iterable[int]) -> bytes:
    """The attribute that has the kernel choose by the local port: it walks the rest in silence.

    Each port is a comparison of two steps and a jump to the end, which means yes; beyond the end
    means no (inet_diag_bc_run of net/ipv4/inet_diag.c).
    """
    chosen = sorted(set(ports))
    steps = b""
    for number, port in enumerate(chosen, start=1):
        steps += _STEP.pack(_PORT_IS, 2 * _STEP.size, 3 * _STEP.size) + _STEP.pack(0, 0, port)
        if number < len(chosen):
            rest = 3 * _STEP.size * (len(chosen) - number)
            steps += _STEP.pack(_JUMP, _STEP.size, rest)
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(steps), _BYTECODE) + steps


def _connection(family: int, key: bytes) -> bytes:
    if family == socket.AF_INET:
        server, client = MAPPED + key[4:8], MAPPED + key[20:24]
    else:
        server, client = key[4:20], key[20:36]
    return server + key[:2] + client + key[2:4]


def _code(payload: bytes) -> int:
    """The errno of an answer: nlmsgerr begins with its negative, 0 means done."""
    return -int(struct.unpack_from("=i", payload)[0])

"""nf_tables over nfnetlink, as far as the service lease needs it: changes, questions, events.

It decides nothing, reads no clock and knows no rules. libnftables is not used for this because
it lists all chains and tables of the host for each command: with 5,000 chains of somebody else
a renewal took 3.1 ms, with 500 tables 16.8 ms, against 0.1 ms. Numbers are from
linux/netfilter/nf_tables.h and linux/netfilter/nfnetlink.h.

nfnetlink does its work inside sendmsg(2) and has queued the answer when that returns, so nothing
here waits, except for another process's change of nftables that is under way (one lock per
network namespace).
"""

import ctypes
import errno
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from pyroute2.netlink import (
    NETLINK_ADD_MEMBERSHIP,
    NETLINK_NETFILTER,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    SOL_NETLINK,
)

TIMEOUT_MARK: Final = b"\xf5nfsha\xf5\x01"
"""Stands for an element's timeout (eight bytes) in a batch that is prepared once."""

_GROUP_NFTABLES: Final = 7  # NFNLGRP_NFTABLES
_BUFFER_BYTES: Final = 65536
_ANSWERS_MAX: Final = 65536  # datagrams read for one request; our table fits into a few
_DUMP_TRIES_MAX: Final = 5
_EVENTS_PER_CALL_MAX: Final = 256

_NFPROTO_INET: Final = 1
_SUBSYSTEM: Final = 10  # NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN: Final = 0x10
_BATCH_END: Final = 0x11
_GETTABLE: Final = _SUBSYSTEM << 8 | 1
_DELTABLE: Final = _SUBSYSTEM << 8 | 2
_GETCHAIN: Final = _SUBSYSTEM << 8 | 4
_GETRULE: Final = _SUBSYSTEM << 8 | 7
_GETSET: Final = _SUBSYSTEM << 8 | 10
_NEWSETELEM: Final = _SUBSYSTEM << 8 | 12
_GETSETELEM: Final = _SUBSYSTEM << 8 | 13
_DELSETELEM: Final = _SUBSYSTEM << 8 | 14
_NEWGEN: Final = _SUBSYSTEM << 8 | 15

# Attributes. The table's name is the first one, number 1, in tables, chains, rules, sets, elements.
_TABLE: Final = 1
_TABLE_FLAGS: Final = 2
_TABLE_USE: Final = 3
_CHAIN_NAME: Final = 3
_CHAIN_KEPT: Final = frozenset({3, 4, 5, 7, 10})  # name, hook, policy, type, flags
_RULE_KEPT: Final = frozenset({2, 4})  # chain, expressions
_SET_NAME: Final = 2
_SET_FLAGS: Final = 3
_SET_KEPT: Final = frozenset({2, 3, 4, 5, 11})  # name, flags, type and length of keys, timeout
_SET_TIMEOUT: Final = 0x10  # NFT_SET_TIMEOUT
_LIST_SET: Final = 2
_LIST_ELEMENTS: Final = 3
_ELEMENT: Final = 1  # NFTA_LIST_ELEM
_ELEMENT_KEY: Final = 1
_ELEMENT_TIMEOUT: Final = 4
_ELEMENT_EXPIRATION: Final = 5
_DATA_VALUE: Final = 1
_GEN_PROC_PID: Final = 2
_GEN_PROC_NAME: Final = 3
_NESTED: Final = 0x8000

_HEADER: Final = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE: Final = struct.Struct("=HH")  # nlattr: length, type
_FAMILY: Final = struct.Struct("!BBH")  # nfgenmsg: family, version, resource
_PORT_OFFSET: Final = 12  # of nlmsg_pid in nlmsghdr

# linux/filter.h and linux/bpf_common.h; asm-generic/socket.h for the option.
_BPF_INSTRUCTION: Final = struct.Struct("=HBBI")
_BPF_LOAD_WORD: Final = 0x20
_BPF_JUMP_IF_EQUAL: Final = 0x15
_BPF_RETURN: Final = 0x06
_SO_ATTACH_FILTER: Final = 26


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
class TablePicture:
    """All of a table that decides about packets, fit for comparison with another table.

    `flags` is the table's own (1: dormant, 2: owned by a process). `body` holds chains, rules, and
    sets with the elements of those without timeout, without the names and handles in which equal
    tables differ.
    """

    flags: int
    body: tuple[bytes, ...]


def add_elements(table: str, set_name: str, keys: Sequence[bytes]) -> Request:
    """Adds elements whose timeout, in milliseconds, takes the place of TIMEOUT_MARK."""
    timeout = _attribute(_ELEMENT_TIMEOUT, TIMEOUT_MARK)
    return _change(_NEWSETELEM, NLM_F_CREATE, _elements(table, set_name, keys, timeout))


def delete_elements(table: str, set_name: str, keys: Sequence[bytes]) -> Request:
    """Deletes elements; the kernel answers ENOENT if one of them is not there or has expired."""
    return _change(_DELSETELEM, 0, _elements(table, set_name, keys, b""))


def flush_set(table: str, set_name: str) -> Request:
    """Deletes whatever elements a set has; the kernel answers ENOENT if there is no such set."""
    return _change(_DELSETELEM, 0, _name(_TABLE, table) + _name(_LIST_SET, set_name))


def delete_table(table: str) -> Request:
    """Deletes one table with all that is in it; the kernel answers ENOENT if it is not there."""
    return _change(_DELTABLE, 0, _name(_TABLE, table))


def messages(buffer: bytes) -> Iterator[Message]:
    """Reads all messages of one received buffer; a cut one ends the reading."""
    offset = 0
    while offset + _HEADER.size <= len(buffer):
        length, kind, flags, sequence, port = _HEADER.unpack_from(buffer, offset)
        if length < _HEADER.size or offset + length > len(buffer):
            return
        payload = buffer[offset + _HEADER.size : offset + length]
        yield Message(kind, flags, sequence, port, payload)
        offset += _align(length)


def batch(changes: Sequence[Request]) -> bytes:
    """One transaction: all of the changes or none. The kernel acknowledges the last one."""
    edge = _FAMILY.pack(0, 0, _SUBSYSTEM)
    framed = [_frame(Request(_BATCH_BEGIN, NLM_F_REQUEST, edge), 0)]
    for sequence, change in enumerate(changes, 1):
        last = NLM_F_ACK if sequence == len(changes) else 0
        framed.append(_frame(change._replace(flags=change.flags | last), sequence))
    framed.append(_frame(Request(_BATCH_END, NLM_F_REQUEST, edge), len(changes) + 1))
    return b"".join(framed)


class Nfnetlink:
    """One socket of this network namespace for changes and questions in the family `inet`.

    Raises OSError where the kernel has no nfnetlink at all.
    """

    def __init__(self) -> None:
        self._socket = _netfilter_socket(0)

    @property
    def port(self) -> int:
        """The netlink port that events of our own changes bear."""
        return int(self._socket.getsockname()[0])

    def change(self, prepared: bytes) -> None:
        """Does one batch; raises OSError with the kernel's errno if nothing was changed."""
        self._socket.send(prepared)
        answers = list(_received(self._socket, _ANSWERS_MAX))
        codes = [_error_code(answer) for answer in answers if answer.kind == NLMSG_ERROR]
        _raise(next((code for code in codes if code), 0))
        if not codes:
            raise OSError(errno.EPROTO, "the kernel did not acknowledge the change")

    def picture(self, table: str, chains: Iterable[str]) -> TablePicture | None:
        """A table as it stands, None if it or one of the chains is missing.

        Chains are asked for by name because a list of them holds the whole host's; one that is not
        in `chains` still shows, in the number of things that the table counts.
        """
        try:
            return self._picture(table, chains)
        except FileNotFoundError:
            return None

    def elements(self, table: str, set_name: str) -> dict[bytes, int | None]:
        """The living elements of a set and their remaining milliseconds (None: no timeout).

        Raises FileNotFoundError if there is no such set.
        """
        found: dict[bytes, int | None] = {}
        question = _name(_TABLE, table) + _name(_LIST_SET, set_name)
        for answer in self._dump(_GETSETELEM, question):
            for kind, elements in _attributes(answer.payload[_FAMILY.size :]):
                if kind == _LIST_ELEMENTS:
                    found.update(_element(element) for _, element in _attributes(elements))
        return found

    def shut(self) -> None:
        """Closes the socket."""
        self._socket.close()

    def _picture(self, table: str, chains: Iterable[str]) -> TablePicture:
        own = _name(_TABLE, table)
        [answer] = self._ask(_GETTABLE, own)
        facts = dict(_attributes(answer.payload[_FAMILY.size :]))
        parts = [facts[_TABLE_USE]]
        for chain in chains:
            [answer] = self._ask(_GETCHAIN, own + _name(_CHAIN_NAME, chain))
            parts.append(_kept(answer, _CHAIN_KEPT))
        parts += [_kept(rule, _RULE_KEPT) for rule in self._dump(_GETRULE, own)]
        sets = {_set_name(answer): answer for answer in self._dump(_GETSET, own)}
        for name in sorted(sets):
            parts.append(_kept(sets[name], _SET_KEPT))
            if not _set_flags(sets[name]) & _SET_TIMEOUT:
                parts += sorted(self.elements(table, name))
        return TablePicture(int.from_bytes(facts[_TABLE_FLAGS]), tuple(parts))

    def _dump(self, kind: int, attributes: bytes) -> list[Message]:
        for _ in range(_DUMP_TRIES_MAX):
            answers = self._ask(kind, attributes, NLM_F_DUMP)
            # Somebody changed the rules between two parts of the list: it may have holes.
            if not any(answer.flags & NLM_F_DUMP_INTR for answer in answers):
                return answers
        raise OSError(errno.EAGAIN, "the rules change faster than they can be listed")

    def _ask(self, kind: int, attributes: bytes, flags: int = 0) -> list[Message]:
        payload = _FAMILY.pack(_NFPROTO_INET, 0, 0) + attributes
        self._socket.send(_frame(Request(kind, NLM_F_REQUEST | flags, payload), 1))
        received = list(_received(self._socket, _ANSWERS_MAX))
        ends = [message for message in received if message.kind in (NLMSG_ERROR, NLMSG_DONE)]
        _raise(next((_error_code(end) for end in ends if _error_code(end)), 0))
        answers = [message for message in received if message not in ends]
        if not received:
            raise OSError(errno.EPROTO, "the kernel did not answer")
        return answers


class NftablesEvents:
    """Tells when somebody other than `own_port` touches one table, and who it was."""

    def __init__(self, table: str, own_port: int) -> None:
        self._name = table
        self._table = table.encode() + b"\0"
        self._own_port = own_port
        self._touched = False
        # The filter before the membership: else events of ours could slip in between.
        self._socket = _netfilter_socket(_GROUP_NFTABLES, silent_port=own_port)

    def fileno(self) -> int:
        """Readable when anything in nftables has changed, by anybody."""
        return self._socket.fileno()

    def read(self) -> str | None:
        """Reads what is there (bounded; the rest stays readable).

        Returns a sentence that names who touched the table, or says that events were lost so that
        nobody knows; None if nobody else touched it.
        """
        sentence: str | None = None
        try:
            for message in _received(self._socket, _EVENTS_PER_CALL_MAX, self._about_us):
                if message.kind == _NEWGEN and self._touched:
                    sentence = f"{_author(message)} changed the nftables table inet {self._name}"
                    self._touched = False
                elif message.kind != _NEWGEN and self._foreign(message):
                    self._touched = True
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            return f"events were lost: the nftables table inet {self._name} may have been changed"
        return sentence

    def discard(self) -> None:
        """Forgets all events so far."""
        while True:
            try:
                self._socket.recv(_BUFFER_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
        self._touched = False

    def shut(self) -> None:
        """Closes the socket."""
        self._socket.close()

    def _about_us(self, datagram: bytes) -> bool:
        # Thousands of another table's events pass here for the price of a search in bytes.
        return self._touched or self._table in datagram

    def _foreign(self, message: Message) -> bool:
        if message.kind >> 8 != _SUBSYSTEM or message.port == self._own_port:
            return False
        if message.payload[:1] != bytes([_NFPROTO_INET]):
            return False
        attributes = dict(_attributes(message.payload[_FAMILY.size :]))
        return attributes.get(_TABLE) == self._table


def _netfilter_socket(group: int, silent_port: int = 0) -> socket.socket:
    link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    try:
        link.bind((0, 0))
        if silent_port:
            _drop_from(link, silent_port)
        if group:
            link.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        else:
            link.connect((0, 0))
        link.setblocking(False)
    except OSError:
        link.close()
        raise
    return link


def _drop_from(link: socket.socket, port: int) -> None:
    """Lets the kernel drop events of what this port asked for: they would wake us for nothing.

    A renewal, dozens of times a second, has two. One transaction's events bear one port, so the
    first message (its nlmsg_pid, 12 bytes in) tells for the datagram. Classic BPF, as socket(7)'s
    SO_ATTACH_FILTER takes it; its loads read big-endian.
    """
    seen = int.from_bytes(port.to_bytes(4, sys.byteorder))
    program = b"".join(
        _BPF_INSTRUCTION.pack(*step)
        for step in (
            (_BPF_LOAD_WORD, 0, 0, _PORT_OFFSET),
            (_BPF_JUMP_IF_EQUAL, 0, 1, seen),
            (_BPF_RETURN, 0, 0, 0),
            (_BPF_RETURN, 0, 0, 0xFFFFFFFF),
        )
    )
    steps = ctypes.create_string_buffer(program, len(program))
    count = len(program) // _BPF_INSTRUCTION.size
    link.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", count, ctypes.addressof(steps))
    )


def _received(
    link: socket.socket, datagrams_max: int, wanted: Callable[[bytes], bool] = bool
) -> Iterator[Message]:
    for _ in range(datagrams_max):
        try:
            datagram = link.recv(_BUFFER_BYTES)
        except BlockingIOError:
            return
        if wanted(datagram):
            yield from messages(datagram)


def _frame(request: Request, sequence: int) -> bytes:
    length = _HEADER.size + len(request.payload)
    return _HEADER.pack(length, request.kind, request.flags, sequence, 0) + request.payload


def _error_code(message: Message) -> int:
    """The errno that an NLMSG_ERROR or NLMSG_DONE message carries, 0 for an acknowledgement."""
    return -int.from_bytes(message.payload[:4], sys.byteorder, signed=True)


def _raise(code: int) -> None:
    if code:
        raise OSError(code, os.strerror(code))


def _change(kind: int, flags: int, attributes: bytes) -> Request:
    return Request(kind, NLM_F_REQUEST | flags, _FAMILY.pack(_NFPROTO_INET, 0, 0) + attributes)


def _elements(table: str, set_name: str, keys: Sequence[bytes], more: bytes) -> bytes:
    listed = b"".join(
        _attribute(
            _ELEMENT | _NESTED,
            _attribute(_ELEMENT_KEY | _NESTED, _attribute(_DATA_VALUE, key)) + more,
        )
        for key in keys
    )
    names = _name(_TABLE, table) + _name(_LIST_SET, set_name)
    return names + _attribute(_LIST_ELEMENTS | _NESTED, listed)


def _element(raw: bytes) -> tuple[bytes, int | None]:
    attributes = dict(_attributes(raw))
    # Somebody else's set may hold an element without a key: one that catches all.
    key = dict(_attributes(attributes.get(_ELEMENT_KEY, b""))).get(_DATA_VALUE, b"")
    expiration = attributes.get(_ELEMENT_EXPIRATION)
    return key, None if expiration is None else int.from_bytes(expiration)


def _set_name(answer: Message) -> str:
    name = dict(_attributes(answer.payload[_FAMILY.size :]))[_SET_NAME]
    return name.rstrip(b"\0").decode()


def _set_flags(answer: Message) -> int:
    # The kernel leaves the attribute out when it is 0.
    flags = dict(_attributes(answer.payload[_FAMILY.size :])).get(_SET_FLAGS, b"\0")
    return int.from_bytes(flags)


def _author(message: Message) -> str:
    facts = dict(_attributes(message.payload[_FAMILY.size :]))
    name = facts.get(_GEN_PROC_NAME, b"").rstrip(b"\0").decode(errors="replace")
    return f"{name or 'somebody'} (pid {int.from_bytes(facts.get(_GEN_PROC_PID, b''))})"


def _kept(answer: Message, kinds: frozenset[int]) -> bytes:
    attributes = _attributes(answer.payload[_FAMILY.size :])
    return b"".join(_attribute(kind, value) for kind, value in attributes if kind in kinds)


def _name(kind: int, name: str) -> bytes:
    return _attribute(kind, name.encode() + b"\0")


def _align(length: int) -> int:
    return (length + 3) & ~3


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(_align(length) - length)


def _attributes(payload: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + _ATTRIBUTE.size <= len(payload):
        length, kind = _ATTRIBUTE.unpack_from(payload, offset)
        if length < _ATTRIBUTE.size or offset + length > len(payload):
            return
        yield kind & 0x3FFF, payload[offset + _ATTRIBUTE.size : offset + length]
        offset += _align(length)

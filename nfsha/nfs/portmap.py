"""What rpcbind tells clients: which program listens on which port of this host (RFC 1833).

It asks for the list and nothing else: it registers and removes nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from nfsha.nfs.facts import Document, Fields
from nfsha.nfs.rpc import Answered, Call, RpcConnection
from nfsha.nfs.xdr import Reader, XdrError

RPCBIND_PROGRAM: Final = 100000
_VERSION, _DUMP = 4, 4  # RFC 1833, section 2.2.1: RPCBVERS4, RPCBPROC_DUMP
_LIST_MAX_BYTES: Final = 1 << 18
_ENTRIES_MAX: Final = 1024
_TEXT_MAX: Final = 255  # netids, addresses and owners have no bound of their own
_PROGRAM_MAX, _PORT_MAX = (1 << 32) - 1, 65_535


@dataclass(frozen=True, order=True, slots=True)
class Registered:
    """A program that rpcbind knows of. `transport` is `tcp` or `udp`, for IPv4 and IPv6 alike."""

    program: int
    version: int
    transport: str
    port: int


async def registered(connection: RpcConnection, *, timeout_ms: int) -> tuple[Registered, ...] | str:
    """Returns all that rpcbind has for TCP and UDP, sorted; a text says why there is no list."""
    call = Call(RPCBIND_PROGRAM, _VERSION, _DUMP, max_bytes=_LIST_MAX_BYTES)
    result = await connection.call(call, timeout_ms=timeout_ms)
    if not isinstance(result, Answered):
        return str(result)
    try:
        return decode_list(result.results)
    except XdrError as error:
        return f"not a list of programs: {error}"


def decode_list(results: bytes) -> tuple[Registered, ...]:
    """Reads an rpcblist (section 2.1): program, version, netid, address, owner. Raises XdrError."""
    reader = Reader(results)
    found: set[Registered] = set()
    for _ in range(_ENTRIES_MAX):
        if not reader.more():
            return tuple(sorted(found))
        program, version = reader.number(), reader.number()
        netid, address, _owner = (reader.text(_TEXT_MAX) for _ in range(3))
        # tcp, tcp6, udp, udp6; `local` is a socket's path. The port is the last two numbers.
        transport = re.fullmatch(r"(tcp|udp)6?", netid)
        port = re.search(r"\.(\d{1,3})\.(\d{1,3})$", address)
        if transport is not None and port is not None:
            number = int(port[1]) * 256 + int(port[2])
            found.add(Registered(program, version, transport[1], min(number, _PORT_MAX)))
    raise XdrError(f"more than {_ENTRIES_MAX} programs")


def as_json(entry: Registered) -> Document:
    """Returns an entry as JSON can carry it."""
    return {
        "program": entry.program,
        "version": entry.version,
        "transport": entry.transport,
        "port": entry.port,
    }


def from_json(document: object) -> Registered:
    """Returns the entry that `as_json` made a document of; FactsError for anything else."""
    fields = Fields("programs", document, "program", "version", "transport", "port")
    return Registered(
        fields.number("program", _PROGRAM_MAX),
        fields.number("version", _PROGRAM_MAX),
        fields.choice("transport", "tcp", "udp"),
        fields.number("port", _PORT_MAX),
    )

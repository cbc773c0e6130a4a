"""ONC RPC over TCP, just enough to ask whether a server is there: the NULL procedure (RFC 5531).

It sends no other procedure and no credentials. Every failure that a network or a server can cause
is a value, not an exception.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import struct
from dataclasses import dataclass

NFS_PROGRAM = 100003  # RFC 1813
MOUNT_PROGRAM = 100005  # RFC 1813, appendix I

# RFC 5531, section 9
_CALL, _REPLY = 0, 1
_RPC_VERSION = 2
_MSG_ACCEPTED, _MSG_DENIED = 0, 1
_SUCCESS, _PROG_UNAVAIL, _PROG_MISMATCH = 0, 1, 2
_ACCEPT_WORDS = {3: "procedure unavailable", 4: "garbage arguments", 5: "system error"}
_DENY_WORDS = {0: "RPC version mismatch", 1: "authentication error"}
_MAX_VERIFIER = 400  # section 8.2
_LAST_FRAGMENT = 1 << 31  # section 11

_MAX_RECORD = 4096  # a NULL reply has 24 to 432 bytes
_MAX_FRAGMENTS = 64


@dataclass(frozen=True, slots=True)
class Answered:
    """The program runs in this version."""

    def __str__(self) -> str:
        return "answered"


@dataclass(frozen=True, slots=True)
class ProgramMismatch:
    """The program runs, but not in this version; it has the versions from `low` to `high`."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"version not supported (the server has {self.low} to {self.high})"


@dataclass(frozen=True, slots=True)
class ProgramUnavailable:
    """Something that speaks RPC listens there, but not this program."""

    def __str__(self) -> str:
        return "another RPC program answers there"


@dataclass(frozen=True, slots=True)
class Denied:
    """The server understood and answered that it will not or cannot."""

    reason: str

    def __str__(self) -> str:
        return f"the server says: {self.reason}"


@dataclass(frozen=True, slots=True)
class Refused:
    """Nobody listens on the port."""

    def __str__(self) -> str:
        return "connection refused"


@dataclass(frozen=True, slots=True)
class Unreachable:
    """No connection, for a reason of the network or of this machine."""

    reason: str

    def __str__(self) -> str:
        return f"cannot connect: {self.reason}"


@dataclass(frozen=True, slots=True)
class Closed:
    """The server closed a fresh connection instead of answering."""

    def __str__(self) -> str:
        return "the server closed the connection without an answer"


@dataclass(frozen=True, slots=True)
class TimedOut:
    """No answer in time; `connected` tells whether the kernel took the connection."""

    connected: bool

    def __str__(self) -> str:
        return "no answer in time" if self.connected else "no connection in time"


@dataclass(frozen=True, slots=True)
class Garbage:
    """What came back is no reply to the call."""

    reason: str

    def __str__(self) -> str:
        return f"not an RPC reply: {self.reason}"


RpcResult = (
    Answered
    | ProgramMismatch
    | ProgramUnavailable
    | Denied
    | Refused
    | Unreachable
    | Closed
    | TimedOut
    | Garbage
)


class RpcConnection:
    """Asks one TCP port, over one connection that is kept and made again when it is lost.

    One call at a time: it is for one task.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._xids = itertools.count(secrets.randbits(32))

    async def null_call(self, program: int, version: int, *, timeout_ms: int) -> RpcResult:
        """Calls procedure 0 of a program and version; returns within `timeout_ms` in any case.

        A kept connection that turns out to be lost is made again once, within the same limit.
        """
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                return await self._call(program, version)
        except TimeoutError:
            connected = self._streams is not None
            self.close()  # a late answer must not be taken for the next one
            return TimedOut(connected)

    def close(self) -> None:
        """Drops the connection; the next call makes a new one. Idempotent."""
        if self._streams is not None:
            self._streams[1].transport.abort()
        self._streams = None

    async def _call(self, program: int, version: int) -> RpcResult:
        result: RpcResult = Closed()
        if self._streams is not None:
            result = await self._exchange(*self._streams, program, version)
        if isinstance(result, Closed):
            try:
                self._streams = await asyncio.open_connection(
                    self.host, self.port, limit=_MAX_RECORD
                )
            except ConnectionRefusedError:
                return Refused()
            except OSError as error:
                return Unreachable(error.strerror or str(error))
            result = await self._exchange(*self._streams, program, version)
        return result

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        program: int,
        version: int,
    ) -> RpcResult:
        """Sends one call on the open connection and reads its reply; closes it when that fails."""
        xid = next(self._xids) & 0xFFFFFFFF
        try:
            writer.write(encode_null_call(xid, program, version))
            result = decode_reply(await _read_record(reader), xid)
        except (asyncio.IncompleteReadError, OSError):
            result = Closed()
        except ValueError as error:
            result = Garbage(str(error))
        if isinstance(result, Closed | Garbage):
            self.close()
        return result


def encode_null_call(xid: int, program: int, version: int) -> bytes:
    """Returns the record of a call of procedure 0 with AUTH_NONE (RFC 5531, sections 9 and 11)."""
    body = struct.pack(">10I", xid, _CALL, _RPC_VERSION, program, version, 0, 0, 0, 0, 0)
    return struct.pack(">I", _LAST_FRAGMENT | len(body)) + body


def decode_reply(record: bytes, xid: int) -> RpcResult:
    """Reads one reassembled record as the reply to the call `xid`. Raises nothing."""
    try:
        return _decode_reply(record, xid)
    except struct.error:
        return Garbage(f"a record of {len(record)} bytes is too short")


def _decode_reply(record: bytes, xid: int) -> RpcResult:
    got_xid, kind, status = struct.unpack_from(">3I", record)
    if kind != _REPLY:
        return Garbage(f"message type {kind}")
    if got_xid != xid:
        return Garbage("it answers another call")
    if status == _MSG_DENIED:
        (reason,) = struct.unpack_from(">I", record, 12)
        return Denied(_DENY_WORDS.get(reason, f"denied, reason {reason}"))
    if status != _MSG_ACCEPTED:
        return Garbage(f"reply status {status}")
    _, length = struct.unpack_from(">2I", record, 12)
    if length > _MAX_VERIFIER:
        return Garbage(f"a verifier of {length} bytes")
    return _decode_accepted(record, 20 + (length + 3) // 4 * 4)


def _decode_accepted(record: bytes, offset: int) -> RpcResult:
    (status,) = struct.unpack_from(">I", record, offset)
    if status == _SUCCESS:
        return Answered()
    if status == _PROG_UNAVAIL:
        return ProgramUnavailable()
    if status == _PROG_MISMATCH:
        return ProgramMismatch(*struct.unpack_from(">2I", record, offset + 4))
    return Denied(_ACCEPT_WORDS.get(status, f"accept status {status}"))


async def _read_record(reader: asyncio.StreamReader) -> bytes:
    """Joins the fragments of one record (RFC 5531, section 11). ValueError: it is too large."""
    record = b""
    for _ in range(_MAX_FRAGMENTS):
        (mark,) = struct.unpack(">I", await reader.readexactly(4))
        length = mark & (_LAST_FRAGMENT - 1)
        if len(record) + length > _MAX_RECORD:
            raise ValueError(f"a record of more than {_MAX_RECORD} bytes")
        record += await reader.readexactly(length)
        if mark & _LAST_FRAGMENT:
            return record
    raise ValueError(f"a record of more than {_MAX_FRAGMENTS} fragments")

"""ONC RPC, just enough to ask a server what it is and has: over TCP, and NULL over UDP (RFC 5531).

It sends no credentials and knows no procedure but NULL: what arguments and results mean, others
say. Every failure that a network or a server can cause is a value, not an exception.
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

_NULL = 0
_MAX_RECORD = 4096  # a NULL reply has 24 to 432 bytes
_MAX_FRAGMENTS = 64
_RESEND_MS = 300  # a datagram may be lost


@dataclass(frozen=True, slots=True)
class Answered:
    """The program runs in this version; `results` are the procedure's (NULL has none)."""

    results: bytes = b""

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


@dataclass(frozen=True, slots=True)
class Call:
    """One procedure of a program, which must do no harm when it is called twice.

    A reply of more than `max_bytes` is garbage.
    """

    program: int
    version: int
    procedure: int = _NULL
    arguments: bytes = b""
    max_bytes: int = _MAX_RECORD


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
        """Calls procedure 0 of a program and version, as `call` does."""
        return await self.call(Call(program, version), timeout_ms=timeout_ms)

    async def call(self, call: Call, *, timeout_ms: int) -> RpcResult:
        """Calls a procedure; returns within `timeout_ms` in any case.

        A kept connection that turns out to be lost is made again once, within the same limit.
        """
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                return await self._call(call)
        except TimeoutError:
            connected = self._streams is not None
            self.close()  # a late answer must not be taken for the next one
            return TimedOut(connected)

    def close(self) -> None:
        """Drops the connection; the next call makes a new one. Idempotent."""
        if self._streams is not None:
            self._streams[1].transport.abort()
        self._streams = None

    async def _call(self, call: Call) -> RpcResult:
        result: RpcResult = Closed()
        if self._streams is not None:
            result = await self._exchange(*self._streams, call)
        if isinstance(result, Closed):
            try:
                self._streams = await asyncio.open_connection(
                    self.host, self.port, limit=_MAX_RECORD
                )
            except ConnectionRefusedError:
                return Refused()
            except OSError as error:
                return Unreachable(error.strerror or str(error))
            result = await self._exchange(*self._streams, call)
        return result

    async def _exchange(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        call: Call,
    ) -> RpcResult:
        """Sends one call on the open connection and reads its reply; closes it when that fails."""
        xid = next(self._xids) & 0xFFFFFFFF
        try:
            writer.write(encode_record(encode_call(xid, call)))
            result = decode_reply(await _read_record(reader, call.max_bytes), xid)
        except (asyncio.IncompleteReadError, OSError):
            result = Closed()
        except ValueError as error:
            result = Garbage(str(error))
        if isinstance(result, Closed | Garbage):
            self.close()
        return result


async def null_call_by_udp(
    host: str, port: int, program: int, version: int, *, timeout_ms: int
) -> RpcResult:
    """Calls procedure 0 by datagrams, again and again until one is answered; see `null_call`.

    Refused: the host said that nobody listens. Silence may be that, too, or a lost datagram.
    """
    xid = secrets.randbits(32)
    call = encode_call(xid, Call(program, version))
    try:
        transport, replies = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: _Replies(xid), remote_addr=(host, port)
        )
    except OSError as error:
        return Unreachable(error.strerror or str(error))
    try:
        async with asyncio.timeout(timeout_ms / 1000):
            while not replies.result.done():
                transport.sendto(call)
                await asyncio.wait([replies.result], timeout=_RESEND_MS / 1000)
        return replies.result.result()
    except TimeoutError:
        return TimedOut(connected=True)  # nothing was taken, but that is how datagrams are
    finally:
        transport.abort()


class _Replies(asyncio.DatagramProtocol):
    """Waits for the reply to one call; what answers another one (a late answer) is passed over."""

    def __init__(self, xid: int) -> None:
        self._xid = xid
        self.result: asyncio.Future[RpcResult] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: object) -> None:  # noqa: ARG002
        if data[:4] == struct.pack(">I", self._xid):
            self._end(decode_reply(data, self._xid))

    def error_received(self, exc: Exception) -> None:
        refused = isinstance(exc, ConnectionRefusedError)
        self._end(Refused() if refused else Unreachable(str(exc)))

    def _end(self, result: RpcResult) -> None:
        if not self.result.done():
            self.result.set_result(result)


def encode_call(xid: int, call: Call) -> bytes:
    """Returns the message of a call with AUTH_NONE (RFC 5531, section 9)."""
    header = (xid, _CALL, _RPC_VERSION, call.program, call.version, call.procedure, 0, 0, 0, 0)
    return struct.pack(">10I", *header) + call.arguments


def encode_record(message: bytes) -> bytes:
    """Returns the message as TCP carries it: one record of one fragment (RFC 5531, section 11)."""
    return struct.pack(">I", _LAST_FRAGMENT | len(message)) + message


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
        return Answered(record[offset + 4 :])
    if status == _PROG_UNAVAIL:
        return ProgramUnavailable()
    if status == _PROG_MISMATCH:
        return ProgramMismatch(*struct.unpack_from(">2I", record, offset + 4))
    return Denied(_ACCEPT_WORDS.get(status, f"accept status {status}"))


async def _read_record(reader: asyncio.StreamReader, max_bytes: int) -> bytes:
    """Joins the fragments of one record (RFC 5531, section 11). ValueError: it is too large."""
    record = b""
    for _ in range(_MAX_FRAGMENTS):
        (mark,) = struct.unpack(">I", await reader.readexactly(4))
        length = mark & (_LAST_FRAGMENT - 1)
        if len(record) + length > max_bytes:
            raise ValueError(f"a record of more than {max_bytes} bytes")
        record += await reader.readexactly(length)
        if mark & _LAST_FRAGMENT:
            return record
    raise ValueError(f"a record of more than {_MAX_FRAGMENTS} fragments")

"""The NULL call against a scripted server on loopback: in pieces, wrong, slow, silent, gone."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfsha.nfs.rpc import (
    NFS_PROGRAM,
    Answered,
    Call,
    Closed,
    Denied,
    Garbage,
    ProgramMismatch,
    ProgramUnavailable,
    Refused,
    RpcConnection,
    RpcResult,
    TimedOut,
    Unreachable,
    decode_reply,
    encode_call,
    encode_record,
)

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
LAST = 1 << 31


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def record(body: bytes) -> bytes:
    return words(LAST | len(body)) + body


async def call(reader: asyncio.StreamReader) -> int:
    """Reads one call and returns its xid."""
    data = await reader.readexactly(44)
    return int(struct.unpack_from(">I", data, 4)[0])


def replies(*tail: int, xid_off: int = 0) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            xid = await call(reader)
            writer.write(record(words(xid + xid_off, 1, *tail)))

    return talk


def sends(data: bytes) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await call(reader)
        writer.write(data)

    return talk


class Server:
    def __init__(self) -> None:
        self.port = 0
        self.connections = 0


@contextlib.asynccontextmanager
async def server(talk: Talk) -> AsyncIterator[Server]:
    found = Server()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.connections += 1
        try:
            await talk(reader, writer)
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        found.port = listening.sockets[0].getsockname()[1]
        yield found
    finally:
        listening.close()
        await asyncio.sleep(0.01)  # the handlers see the end of their connections


async def ask(port: int, *, timeout_ms: int = 5000) -> RpcResult:
    connection = RpcConnection("127.0.0.1", port)
    try:
        return await connection.null_call(NFS_PROGRAM, 3, timeout_ms=timeout_ms)
    finally:
        connection.close()


def ask_of(talk: Talk, *, timeout_ms: int = 5000) -> RpcResult:
    async def main() -> RpcResult:
        async with server(talk) as found:
            return await ask(found.port, timeout_ms=timeout_ms)

    return asyncio.run(main())


def test_the_call_is_what_the_standard_says() -> None:
    assert (
        encode_record(encode_call(0x01020304, Call(100003, 3))).hex()
        == (
            "80000028"  # last fragment, 40 bytes
            "01020304" + "00000000" + "00000002"  # xid, CALL, RPC version 2
            "000186a3" + "00000003" + "00000000"  # program, version, procedure NULL
            "0000000000000000" + "0000000000000000"  # AUTH_NONE twice
        )
    )


@pytest.mark.parametrize(
    ("tail", "result"),
    [
        ((0, 0, 0, 0), Answered()),
        ((0, 0, 0, 2, 3, 4), ProgramMismatch(3, 4)),
        ((0, 0, 0, 1), ProgramUnavailable()),
        ((0, 0, 0, 3), Denied("procedure unavailable")),
        ((0, 0, 0, 5), Denied("system error")),
        ((0, 0, 0, 77), Denied("accept status 77")),
        ((1, 0, 2, 2), Denied("RPC version mismatch")),
        ((1, 1, 5), Denied("authentication error")),
        ((0, 1, 5, 0x61626364, 0x65000000, 0), Answered()),  # a verifier of 5 bytes, padded to 8
        ((2,), Garbage("reply status 2")),
        ((0, 0, 401, 0), Garbage("a verifier of 401 bytes")),
        ((0, 0, 0), Garbage("a record of 20 bytes is too short")),
        ((0, 0, 0, 2, 3), Garbage("a record of 28 bytes is too short")),
    ],
)
def test_each_reply_of_the_standard(tail: tuple[int, ...], result: RpcResult) -> None:
    assert ask_of(replies(*tail)) == result


def test_a_reply_to_another_call_is_garbage() -> None:
    assert ask_of(replies(0, 0, 0, 0, xid_off=1)) == Garbage("it answers another call")


def test_a_reply_in_fragments_and_single_bytes_is_joined() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = words(await call(reader), 1, 0, 0, 0, 0)
        data = words(5) + body[:5] + words(0) + words(LAST | 19) + body[5:]
        for position in range(len(data)):
            writer.write(data[position : position + 1])
            await writer.drain()
            await asyncio.sleep(0.001)

    assert ask_of(talk) == Answered()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" * 20, "a record of more than 4096 bytes"),
        (words(LAST | 0x7FFFFFFF), "a record of more than 4096 bytes"),
        (words(0) * 65, "a record of more than 64 fragments"),
        (record(words(0, 0, 2)), "message type 0"),
        (record(b""), "a record of 0 bytes is too short"),
    ],
)
def test_garbage_is_bounded_and_said(data: bytes, reason: str) -> None:
    assert ask_of(sends(data)) == Garbage(reason)


@given(st.binary(max_size=64))
def test_no_record_raises(data: bytes) -> None:
    decode_reply(data, 0)


def test_a_closed_port_refuses() -> None:
    async def main() -> RpcResult:
        async with server(sends(b"")) as found:
            port = found.port
        return await ask(port)

    assert asyncio.run(main()) == Refused()


def test_an_impossible_address_is_unreachable() -> None:
    async def main() -> RpcResult:
        connection = RpcConnection("255.255.255.255", 2049)
        return await connection.null_call(NFS_PROGRAM, 3, timeout_ms=1000)

    assert isinstance(asyncio.run(main()), Unreachable)


def test_a_server_that_hangs_up_is_closed() -> None:
    assert ask_of(sends(b"")) == Closed()
    assert ask_of(sends(words(LAST | 24, 1, 1))) == Closed()


@pytest.mark.parametrize("sent", [b"", words(LAST | 24), words(LAST | 24, 1, 1, 0)])
def test_a_silent_or_stuck_server_times_out_in_time(sent: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await call(reader)
        writer.write(sent)
        await reader.read()

    before = time.monotonic()
    assert ask_of(talk, timeout_ms=200) == TimedOut(connected=True)
    assert 0.2 <= time.monotonic() - before < 2


def test_a_server_that_drips_for_ever_times_out_too() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await call(reader)
        while True:
            writer.write(words(0))
            await asyncio.sleep(0.05)
            await writer.drain()

    assert ask_of(talk, timeout_ms=300) == TimedOut(connected=True)


def test_a_late_answer_is_not_taken_for_the_next_one() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        xid = await call(reader)
        await asyncio.sleep(0.2)
        writer.write(record(words(xid, 1, 0, 0, 0, 0)))

    async def main() -> list[RpcResult]:
        async with server(talk) as found:
            connection = RpcConnection("127.0.0.1", found.port)
            first = await connection.null_call(NFS_PROGRAM, 3, timeout_ms=100)
            await asyncio.sleep(0.2)
            second = await connection.null_call(NFS_PROGRAM, 3, timeout_ms=2000)
            connection.close()
            return [first, second]

    assert asyncio.run(main()) == [TimedOut(connected=True), Answered()]


def test_one_connection_is_kept_and_made_again_when_it_is_lost() -> None:
    async def twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            writer.write(record(words(await call(reader), 1, 0, 0, 0, 0)))
            await writer.drain()

    async def main() -> None:
        async with server(twice) as found:
            connection = RpcConnection("127.0.0.1", found.port)
            for expected in (1, 1, 2, 2, 3):
                result = await connection.null_call(NFS_PROGRAM, 3, timeout_ms=2000)
                assert (result, found.connections) == (Answered(), expected)
            connection.close()
            connection.close()

    asyncio.run(main())

"""The proof that clients stay on v3: which answers prove it, and what is said of the others."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from dataclasses import replace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfsha.nfs import portmap, v3_fence
from nfsha.nfs.portmap import Registered
from nfsha.nfs.rpc import (
    Answered,
    Closed,
    Denied,
    Garbage,
    ProgramMismatch,
    ProgramUnavailable,
    Refused,
    RpcResult,
    TimedOut,
    null_call_by_udp,
)
from nfsha.nfs.v3_fence import Answers, FenceFacts, Version4
from nfsha.nfs.xdr import XdrError, opaque

PORTS = {"rpcbind": 111, "nfs": 2049, "mountd": 20048, "statd": 20049, "lockd": 20050}
GOOD = Answers("answered", Version4.REFUSED, "version not supported", "answered")
LIST = (
    Registered(100000, 2, "tcp", 111),
    Registered(100003, 3, "tcp", 2049),
    Registered(100005, 3, "tcp", 20048),
    Registered(100021, 4, "tcp", 20050),
    Registered(100024, 1, "tcp", 20049),
)
FACTS = FenceFacts("127.0.0.1", GOOD, None, LIST, "answered")


@pytest.mark.parametrize(
    ("result", "judged"),
    [
        (ProgramMismatch(3, 3), Version4.REFUSED),
        (ProgramMismatch(2, 3), Version4.REFUSED),
        (ProgramMismatch(3, 4), Version4.UNPROVED),
        (ProgramMismatch(4, 4), Version4.UNPROVED),
        (Answered(), Version4.SPOKEN),
        (TimedOut(connected=True), Version4.UNPROVED),
        (ProgramUnavailable(), Version4.UNPROVED),
        (Denied("system error"), Version4.UNPROVED),
        (Refused(), Version4.UNPROVED),
        (Closed(), Version4.UNPROVED),
        (Garbage("message type 7"), Version4.UNPROVED),
    ],
)
def test_only_a_refusal_proves_that_v4_is_off(result: RpcResult, judged: Version4) -> None:
    assert v3_fence.version4(result) is judged


def told(facts: FenceFacts) -> list[str]:
    return [str(one) for one in v3_fence.objections(facts, PORTS)]


def test_v3_alone_on_its_ports_is_fine() -> None:
    assert told(FACTS) == []
    assert told(replace(FACTS, udp=GOOD)) == []
    assert told(replace(FACTS, registered=None, rpcbind="connection refused")) == []
    assert told(replace(FACTS, registered=LIST[:3])) == []  # no locks: clients mount with nolock


def test_v4_that_is_spoken_and_v4_that_is_unproved_are_told_apart() -> None:
    spoken = replace(GOOD, version4=Version4.SPOKEN, said4="answered")
    (line,) = told(replace(FACTS, tcp=spoken))
    assert line.startswith("NFS v4 over TCP at 127.0.0.1: it is spoken; switch v4 off (vers4=n")
    silent = replace(GOOD, version4=Version4.UNPROVED, said4="no answer in time")
    (line,) = told(replace(FACTS, udp=silent))
    assert line.startswith(
        "the proof that NFS v4 is off, over UDP at 127.0.0.1: no answer in time; "
    )


def test_a_server_that_is_away_is_said_once() -> None:
    away = Answers(*("connection refused", Version4.UNPROVED, "connection refused", "answered"))
    (line,) = told(replace(FACTS, tcp=away))
    assert line.startswith("NFS v3 over TCP at 127.0.0.1: connection refused; ")


def test_mountd_that_is_away_is_said() -> None:
    (line,) = told(replace(FACTS, tcp=replace(GOOD, mountd3="no connection in time")))
    assert line.startswith("mountd v3 over TCP at 127.0.0.1: no connection in time; ")


def test_ports_that_the_lock_does_not_close_are_said() -> None:
    (line,) = told(replace(FACTS, registered=(*LIST[:4], Registered(100024, 1, "udp", 4711))))
    assert line == (
        "the port of statd in the list of rpcbind: 4711; give it the port 20049 on both nodes, or"
        " say firewall.ports.statd = 4711: another port is not closed while this node does not"
        " serve"
    )


def test_v4_in_the_list_of_rpcbind_is_said() -> None:
    (line,) = told(replace(FACTS, registered=(*LIST, Registered(100003, 4, "tcp", 2049))))
    assert line.startswith("NFS v4: it is in the list of rpcbind; ")


def test_two_nodes_that_serve_the_same_do_not_differ() -> None:
    there = replace(FACTS, address="10.0.0.2")
    assert v3_fence.differences(FACTS, there) == ()


def test_what_clients_would_miss_on_the_other_node_is_said() -> None:
    without = tuple(entry for entry in LIST if entry.program != 100021)
    there = replace(FACTS, udp=GOOD, registered=without)
    udp, lockd = v3_fence.differences(FACTS, there)
    assert (udp.what, udp.here, udp.there) == ("NFS over UDP", "not served", "served")
    assert (lockd.here, lockd.there) == ("tcp 20050", "missing")
    nothing = replace(FACTS, registered=None, rpcbind="connection refused")
    assert "no list (connection refused)" in str(v3_fence.differences(FACTS, nothing)[0])


# --- the list of rpcbind


def entry(program: int, version: int, netid: str, address: str) -> bytes:
    texts = b"".join(opaque(text.encode()) for text in (netid, address, "superuser"))
    return struct.pack(">3I", 1, program, version) + texts


END = struct.pack(">I", 0)


def test_addresses_of_both_families_are_one_entry() -> None:
    content = (
        entry(100003, 3, "tcp", "0.0.0.0.8.1")
        + entry(100003, 3, "tcp6", "::.8.1")
        + entry(100024, 1, "udp", "0.0.0.0.78.81")
        + entry(100000, 4, "local", "/run/rpcbind.sock")
        + END
    )
    found = (Registered(100003, 3, "tcp", 2049), Registered(100024, 1, "udp", 20049))
    assert portmap.decode_list(content) == found


@pytest.mark.parametrize(
    "content",
    [
        b"",
        entry(1, 1, "tcp", "0.0.0.0.8.1"),  # no end
        struct.pack(">I", 2),
        struct.pack(">4I", 1, 100003, 3, 1 << 31),
        entry(1, 1, "t" * 256, "a") + END,
        entry(1, 1, "tcp", "a") * 1025 + END,
    ],
)
def test_a_list_that_is_torn_or_too_long_is_refused(content: bytes) -> None:
    with pytest.raises(XdrError):
        portmap.decode_list(content)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_list_or_refused(content: bytes) -> None:
    with contextlib.suppress(XdrError):
        portmap.decode_list(content)


# --- UDP against a scripted server on loopback


class Scripted(asyncio.DatagramProtocol):
    """Answers the second datagram (the first one got lost), after one that answers another call."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.heard.append(data)
        if len(self.heard) == 2:
            tail = struct.pack(">5I", 1, 0, 0, 0, 2) + struct.pack(">2I", 3, 3)
            self.transport.sendto(b"late" + tail, addr)
            self.transport.sendto(data[:4] + tail, addr)


def test_a_lost_datagram_is_sent_again() -> None:
    async def main() -> tuple[RpcResult, list[bytes]]:
        loop = asyncio.get_running_loop()
        transport, server = await loop.create_datagram_endpoint(
            Scripted, local_addr=("127.0.0.1", 0)
        )
        port = transport.get_extra_info("sockname")[1]
        result = await null_call_by_udp("127.0.0.1", port, 100003, 4, timeout_ms=5000)
        transport.close()
        return result, server.heard

    result, heard = asyncio.run(main())
    assert result == ProgramMismatch(3, 3)
    assert len(heard) == 2
    assert heard[0] == heard[1]
    assert heard[0][4:] == struct.pack(">9I", 0, 2, 100003, 4, 0, 0, 0, 0, 0)


def test_silence_and_refusal_over_udp_are_told_apart() -> None:
    async def main() -> tuple[RpcResult, RpcResult]:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(
            asyncio.DatagramProtocol, local_addr=("127.0.0.1", 0)
        )
        port = transport.get_extra_info("sockname")[1]
        silent = await null_call_by_udp("127.0.0.1", port, 100003, 3, timeout_ms=50)
        transport.abort()
        await asyncio.sleep(0)
        refused = await null_call_by_udp("127.0.0.1", port, 100003, 3, timeout_ms=5000)
        return silent, refused

    assert asyncio.run(main()) == (TimedOut(connected=True), Refused())

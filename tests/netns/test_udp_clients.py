"""Clients over UDP: served when the server is so configured, and led and held as those over TCP."""

from __future__ import annotations

import asyncio
import json
import sys
import time

import pytest

from nfsha.nfs.rpc import NFS_PROGRAM, Answered, RpcResult, TimedOut, null_call_by_udp
from tests.netns.lab import Lab
from tests.netns.labkit.network import VIP
from tests.netns.labkit.nfs_client import RECORD_BYTES, Attempt
from tests.netns.labkit.place import LabError, Process
from tests.netns.labkit.records import Records
from tests.netns.labkit.udp_client import UdpMount
from tests.netns.namespaces import inside
from tests.netns.pair import BUSY_MS, HOLD_MS, Pair

NAME = "udp-records"


@pytest.fixture
def pair(lab: Lab) -> Pair:
    """A pair whose servers serve UDP too; its daemons do not run yet."""
    for node in (lab.a, lab.b):
        node.nfs.stop()
        node.nfs.udp = True
        node.nfs.start()
    return Pair(lab)


class UdpWriter:
    """The record writer, over UDP."""

    def __init__(self, lab: Lab) -> None:
        argv = [sys.executable, "-m", "tests.netns.labkit.udp_client", "--server", VIP]
        argv += ["--export", "/nfs/data", "--name", NAME]
        self.process: Process = lab.c.spawn(argv, name="udp-records")

    def records(self) -> Records:
        lines = [line for line in self.process.output().splitlines(True) if line.endswith("\n")]
        return Records(tuple(Attempt(**json.loads(line)) for line in lines if line[0] == "{"))

    def wait_acked(self, count: int) -> None:
        goal = len(self.records().acked) + count
        deadline = time.monotonic() + 30
        while len(self.records().acked) < goal:
            if time.monotonic() > deadline or not self.process.alive:
                raise LabError(f"not {goal} records acknowledged\n{self.process.tail(5)}")
            time.sleep(0.02)

    def stop(self) -> Records:
        self.process.stop()
        return self.records()


def numbers_in(content: bytes) -> set[int]:
    """The records that a file holds, each at its place."""
    found = set()
    for at in range(0, len(content), RECORD_BYTES):
        line = content[at : at + RECORD_BYTES]
        if line.strip(b"\0"):
            assert int(line.split()[0]) == at // RECORD_BYTES
            found.add(at // RECORD_BYTES)
    return found


def ask_by_udp(lab: Lab, *addresses: str, timeout_ms: int = 1000) -> list[RpcResult]:
    async def main() -> list[RpcResult]:
        asked = (
            null_call_by_udp(address, 2049, NFS_PROGRAM, 3, timeout_ms=timeout_ms)
            for address in addresses
        )
        return await asyncio.gather(*asked)

    with inside(lab.c.namespace):
        return asyncio.run(main())


def test_writes_over_udp_go_on_through_a_takeover(pair: Pair) -> None:
    lab = pair.lab
    own_addresses = ("10.77.0.1", "10.77.0.2")
    assert ask_by_udp(lab, *own_addresses, timeout_ms=5000) == [Answered(), Answered()]
    pair.settle()
    writer = UdpWriter(lab)
    writer.wait_acked(20)
    assert ask_by_udp(lab, VIP, timeout_ms=5000) == [Answered()]
    silent = TimedOut(connected=True)  # dropped, not refused
    assert ask_by_udp(lab, *own_addresses) == [silent, silent]

    killed_ms = pair.now_ms()
    pair.daemon("a").kill()  # its NFS server, and for a while the address, live on
    served = pair.wait_phase("b", "ACTIVE", since_ms=killed_ms)
    writer.wait_acked(20)
    records = writer.stop()
    assert not records.failed

    closed_ms = killed_ms + HOLD_MS + BUSY_MS
    ended_ms = {one.number: one.ended_ns // 1_000_000 for one in records.attempts}
    assert not [n for n, at in ended_ms.items() if closed_ms < at < served.at_ms]
    old = {n for n, at in ended_ms.items() if at <= closed_ms}
    assert old <= numbers_in(lab.a.path(f"/nfs/data/{NAME}").read_bytes())

    def read_back() -> bytes:
        mount = UdpMount(VIP, "/nfs/data", cap_s=10)
        content = mount.read(mount.lookup(NAME))
        mount.close()
        return content

    new = set(ended_ms) - old
    assert len(new) >= 20
    assert new <= numbers_in(lab.c.inside(read_back))
    assert new <= numbers_in(lab.b.path(f"/nfs/data/{NAME}").read_bytes())

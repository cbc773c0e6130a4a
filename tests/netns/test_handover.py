"""The service moves by an operator's word: real daemons, NFS server, client, rsync and journals."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.netns.copies import Copies
from tests.netns.lab import VIP, Lab
from tests.netns.labkit.records import Records

pytestmark = pytest.mark.timeout(120)

MOVE_S = 60.0


@pytest.fixture
def copies(lab: Lab) -> Copies:
    return Copies(lab)


def move(copies: Copies, node: str, command: str, *, check: bool = True) -> tuple[int, str]:
    """Asks for a move on a node; its exit code and all that it printed."""
    done = copies.lab.node(node).nfsha(command, "--yes", check=check, timeout_s=MOVE_S)
    return done.returncode, done.stdout + done.stderr


def assert_held_not_failed(records: Records, moves: int) -> None:
    """No operation by path failed. One that had its file open at a move may: its handle is stale.

    A copy file by file has other inodes (docs/limits.md); that write was never acknowledged.
    """
    assert all("NFS3ERR_STALE" in (one.error or "") for one in records.failed), records.failed
    assert len(records.failed) <= moves, records.failed


def assert_one_at_a_time(copies: Copies, moves: int) -> None:
    """Never two holders of the address; and whoever answers, the other one has ceased to."""
    seen = copies.lab.look()
    seen.require_complete()
    assert seen.address_overlap_ms(VIP, 0) == 0.0, seen.render(VIP, 0)
    answered = [reply.node for reply in seen.replies(VIP)]
    changes = sum(one != other for one, other in pairwise(answered))
    assert changes == moves, seen.render(VIP, 0)


def assert_all_there(copies: Copies, records: Records) -> None:
    """Every acknowledged record is on both nodes, and both trees are equal."""
    copies.wait(lambda: (copies.mark() or {}).get("walk") != "handover", "a pass of the new epoch")
    copies.sync()
    assert copies.differences() == []
    assert set(records.acked) <= set(copies.lab.read_records())


def test_there_and_back_under_load_nothing_is_lost(copies: Copies) -> None:
    copies.settle_whole()
    records = copies.lab.write_records()
    records.wait_acked(20)
    assert move(copies, "a", "switchover")[0] == 0
    copies.wait_phase("a", "PASSIVE")
    records.wait_acked(20)
    code, told = move(copies, "b", "failback")
    assert code == 0, told
    assert "FINAL_SYNC" in told or "PREPARED" in told
    assert "done: the primary serves" in told
    copies.wait_phase("b", "PASSIVE", since_ms=copies.events("b")[-1].at_ms - 5000)
    records.wait_acked(20)
    found = records.stop()
    assert_held_not_failed(found, moves=2)
    assert_all_there(copies, found)
    assert_one_at_a_time(copies, moves=2)


def test_home_again_after_a_crash_with_all_that_was_written_meanwhile(copies: Copies) -> None:
    copies.settle_whole()
    records = copies.lab.write_records(cap_s=60)
    records.wait_acked(20)
    copies.sync()
    copies.lab.power_cut("a")
    copies.wait_phase("b", "ACTIVE")
    records.wait_acked(50)
    copies.lab.boot("a")
    copies.start("a")
    since_ms = copies.now_ms()
    copies.wait_phase("a", "PASSIVE", since_ms=since_ms - 10_000, within_s=30)
    reign = records.so_far()
    code, told = move(copies, "a", "failback")
    assert code == 0, told
    assert copies.phase("a") == "ACTIVE"
    records.wait_acked(20)
    found = records.stop()
    assert_all_there(copies, found)
    assert set(reign.acked) <= set(copies.lab.read_records())
    assert_one_at_a_time(copies, moves=2)


def test_refused_where_a_guard_says_no_and_nothing_changes(copies: Copies) -> None:
    copies.settle_whole()
    code, told = move(copies, "a", "failback", check=False)
    assert code == 3
    assert "it serves there already" in told
    copies.lab.b.run(["umount", "/nfs/data"])
    copies.wait(lambda: copies.volume("a")["paired"] != "paired", "an unmounted volume")
    before = (copies.events("a")[-1], copies.lab.a.status()["epoch"])
    code, told = move(copies, "a", "switchover", check=False)
    assert code == 3
    assert "NO" in told
    assert "volume data has no copy" in told
    assert (copies.events("a")[-1], copies.lab.a.status()["epoch"]) == before

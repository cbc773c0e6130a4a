"""Replication by real daemons, rsync and fanotify: what must never go wrong (I3, I4, I5)."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable

import psutil
import pytest

from tests.netns.copies import SYNC, Copies
from tests.netns.lab import Lab
from tests.netns.treewalk import make_odd_tree

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def copies(lab: Lab) -> Copies:
    return Copies(lab)


# ------------------------------------------------------------------ the ordinary course


def test_what_a_client_writes_arrives_and_both_nodes_know_since_when(copies: Copies) -> None:
    copies.settle_whole()
    records = copies.lab.write_records()
    time.sleep(3)
    records.stop()
    copies.sync()
    assert copies.differences() == []
    here, there = copies.volume("b"), copies.volume("a")
    assert here["paired"] == there["paired"] == "paired"
    assert here["uuid"] == there["uuid"]
    assert here["here"]["stamp"] == there["here"]["stamp"]
    last = here["sync"]["last"]
    assert last["epoch"] == 1
    assert abs(time.time_ns() - last["started_ns"]) < 5e9
    copies.lab.b.nfsha("sync", "--pause")  # else there may be a new one each time one looks
    copies.wait(lambda: copies.mark("a") == copies.mark("b"), "equal marks on both nodes")
    assert copies.lab.b.status()["replication"]["whole"] is True


def test_the_ordinary_pass_asks_for_the_changed_folders_only(copies: Copies) -> None:
    copies.settle_whole()
    folder = copies.here("a") / "changed"
    folder.mkdir()
    (folder / "one").write_bytes(b"1")
    copies.sync()
    before = copies.copy()
    (folder / "one").write_bytes(b"12")
    (folder / "two").write_bytes(b"2")
    copies.sync()
    after = copies.copy()
    assert after["last"]["walk"] == "folders"
    assert after["full_walks"] == before["full_walks"]
    assert copies.differences() == []


def test_everything_odd_arrives_equal_as_a_first_copy_and_as_changes(
    make_lab: Callable[..., Lab],
) -> None:
    copies = Copies(make_lab(volume_mib=512))  # from there on blocks are large enough for its ACLs
    make_odd_tree(copies.here("a") / "first")
    copies.settle_whole()
    assert copies.differences() == []
    before = copies.copy()["full_walks"]
    make_odd_tree(copies.here("a") / "changes", seed=2)  # passes come while it is made
    copies.sync()
    assert copies.differences() == []
    assert (copies.copy()["full_walks"], copies.copy()["missed_by_journal"]) == (before, 0)


# ------------------------------------------------------------------ guards


def test_a_thousand_of_five_thousand_deletions_are_held_until_the_plan_is_accepted(
    copies: Copies,
) -> None:
    folder = copies.here("a") / "many"
    folder.mkdir()
    for number in range(5000):
        (folder / f"{number:05}").touch()
    copies.settle_whole()
    for number in range(1000):
        (folder / f"{number:05}").unlink()
    (folder / "new").write_text("arrives all the same")
    copies.wait(lambda: copies.copy()["state"] == "held", "held deletions")
    held = copies.copy()
    assert held["plan"]["count"] == 1000
    assert (copies.here("b") / "many" / "new").exists()
    assert len(copies.names("b", "many")) == 5001
    said = copies.sync("data", "--accept-deletes", "0" * 12, check=False)
    assert "no plan is named" in said
    copies.sync("data", "--accept-deletes", held["plan"]["hash"])
    assert copies.differences() == []
    assert len(copies.names("b", "many")) == 4001


def test_an_empty_source_empties_no_copy(copies: Copies) -> None:
    (copies.here("a") / "few").mkdir()
    (copies.here("a") / "few" / "one").write_text("1")
    copies.settle_whole()
    shutil.rmtree(copies.here("a") / "few")
    copies.wait(lambda: copies.copy()["state"] == "held", "held deletions")
    assert (copies.here("b") / "few" / "one").read_text() == "1"


def test_an_unmounted_target_gets_nothing_and_nothing_lands_beneath(copies: Copies) -> None:
    copies.settle_whole()
    node = copies.lab.b
    copies.lab.b.nfs.stop()
    node.run("umount", "-l", "/nfs/data")
    (copies.here("a") / "later").write_text("later")
    time.sleep(3)
    assert list(copies.here("b").iterdir()) == []
    # It is noticed with the next look at the volumes, at most five seconds after the last one.
    copies.wait(lambda: copies.lab.b.status()["replication"]["whole"] is False, "word of it")


def test_an_unmounted_source_is_not_taken_for_an_empty_one(copies: Copies) -> None:
    (copies.here("a") / "kept").write_text("kept")
    copies.settle_whole()
    copies.lab.a.nfs.stop()
    copies.lab.a.run("umount", "-l", "/nfs/data")
    time.sleep(3)
    assert (copies.here("b") / "kept").read_text() == "kept"


# ------------------------------------------------------------------ processes


def _rsyncs(daemon_pid: int) -> list[psutil.Process]:
    try:
        children = psutil.Process(daemon_pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [one for one in children if one.is_running()]


def test_a_killed_daemon_takes_its_children_with_it(copies: Copies) -> None:
    copies.settle_whole()
    daemon = copies.daemon("a")
    children = _rsyncs(daemon.pid)
    assert children, "the source's rsync daemon"
    daemon.kill()
    deadline = time.monotonic() + 2
    while any(one.is_running() for one in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [one for one in children if one.is_running()] == []


def test_what_changed_while_the_source_was_down_is_found_by_a_full_walk(copies: Copies) -> None:
    copies.settle_whole()
    copies.daemon("b").stop(5.0)  # or it would take over
    copies.daemon("a").kill()
    (copies.here("a") / "meanwhile").write_text("seen by nobody")
    began_ms = copies.now_ms()
    copies.start("a", "b")
    copies.wait_phase("b", "PASSIVE", since_ms=began_ms)
    copies.wait(lambda: "meanwhile" in copies.names("b"), "the file")
    assert copies.copy()["full_walks"]["the change journal began anew, after the last pass"] == 1
    assert "a full walk: the change journal began anew" in copies.log("b")


def test_a_pass_under_way_is_dead_before_the_taker_serves(
    make_lab: Callable[..., Lab],
) -> None:
    lab = make_lab(volume_mib=512)
    copies = Copies(lab, sync=SYNC + 'bandwidth = "2MB"\n')
    copies.settle_whole()
    big = copies.here("a") / "big"
    big.write_bytes(os.urandom(64 << 20))
    copies.wait(lambda: copies.copy()["state"] == "running", "a pass under way")
    time.sleep(1)
    children = _rsyncs(copies.daemon("b").pid)
    assert children
    died_ms = copies.now_ms()
    copies.lab.power_cut("a")
    served = copies.wait_phase("b", "ACTIVE", since_ms=died_ms)
    assert served.at_ms - died_ms < 2500
    alive = [one for one in children if one.is_running() and one.status() != "zombie"]
    assert [one.cmdline() for one in alive if "rsync" in " ".join(one.cmdline())] == []
    assert not (copies.here("b") / "big").exists()
    mine = copies.here("b") / "mine"
    mine.write_text("written after the takeover")
    time.sleep(2)
    assert mine.read_text() == "written after the takeover"
    log = copies.log("b")
    assert "writes of the last" in log


def test_a_returned_node_is_resynced_and_what_only_it_had_is_kept(copies: Copies) -> None:
    (copies.here("a") / "common").write_text("common")
    copies.settle_whole()
    # Paused, so that the last write of the first reign is surely not replicated.
    copies.lab.b.nfsha("sync", "--pause")
    (copies.here("a") / "only-there").write_text("acknowledged, never copied")
    died_ms = copies.now_ms()
    copies.lab.power_cut("a")
    copies.wait_phase("b", "ACTIVE", since_ms=died_ms)
    (copies.here("b") / "second-reign").write_text("by the standby")
    copies.lab.boot("a")
    copies.start("a")
    copies.wait_phase("a", "RETURNED", since_ms=died_ms)
    copies.wait_phase("a", "PASSIVE", since_ms=died_ms, within_s=30)
    assert copies.differences() == []
    assert (copies.here("a") / "second-reign").exists()
    listed = copies.lab.a.nfsha("quarantine", "list").stdout
    assert "resync" in listed
    kept = list((copies.here("a") / ".nfsha-quarantine").rglob("only-there"))
    assert [path.read_text() for path in kept] == ["acknowledged, never copied"]

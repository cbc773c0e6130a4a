"""The service moves by an operator's word: real daemons, NFS server, client, rsync and journals."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from tests.netns.copies import SYNC, Copies, hanging
from tests.netns.lab import Lab
from tests.netns.labkit.network import VIP
from tests.netns.labkit.nfs_client import RECORD_BYTES
from tests.netns.labkit.records import Records
from tests.netns.test_handover_guards import Tried, ask, standing

pytestmark = pytest.mark.timeout(120)

SELDOM = '[sync]\nevery = "1h"\njitter = "0s"\n'
"""After the first pass none comes by itself."""

MOVE_S = 60.0
ABORT_MS = 1000
"""So soon after an abort the giver serves again."""


@pytest.fixture
def copies(lab: Lab) -> Copies:
    return Copies(lab)


def move(copies: Copies, node: str, command: str, *, check: bool = True) -> tuple[int, str]:
    """Asks for a move on a node; its exit code and all that it printed."""
    done = copies.lab.node(node).nfsha(command, "--yes", check=check, timeout_s=MOVE_S)
    return done.returncode, done.stdout + done.stderr


class Moving(threading.Thread):
    """A move that is asked for on a node, and watched by its command, beside the test."""

    def __init__(self, copies: Copies, node: str, command: str) -> None:
        super().__init__()
        self._copies, self._node, self._command = copies, node, command
        self.code, self.told = -1, ""
        self.start()

    def run(self) -> None:
        self.code, self.told = move(self._copies, self._node, self._command, check=False)


@contextmanager
def source_that_hangs(copies: Copies, node: str) -> Iterator[None]:
    """From the freeze on, the giver's rsync daemon does not answer: the last pass cannot end."""
    copies.wait_phase(node, "FREEZING", since_ms=copies.now_ms() - 2000, within_s=20)
    with hanging(copies, node):
        yield


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


def numbers_in(content: bytes) -> set[int]:
    """The numbers of the records in what a file holds, counted from its begin."""
    return {
        number
        for number in range(len(content) // RECORD_BYTES)
        if content[number * RECORD_BYTES :][:RECORD_BYTES].strip(b"\0")
    }


def assert_equal_copies(copies: Copies) -> None:
    """Once a pass of the new epoch is complete, both trees are equal by a walk of our own."""
    copies.wait(lambda: (copies.mark() or {}).get("walk") != "handover", "a pass of the new epoch")
    copies.sync()
    assert copies.differences() == []


# ------------------------------------------------------------------ the straight way


def there_and_back(copies: Copies, rounds: int) -> Records:
    """So many moves there and back under load; what became of each record."""
    copies.settle_whole()
    records = copies.lab.write_records()
    records.wait_acked(20)
    for _ in range(rounds):
        for command, asked, left in (("switchover", "a", "a"), ("failback", "b", "b")):
            since_ms = copies.now_ms()
            code, told = move(copies, asked, command)
            assert code == 0, told
            assert "PRESYNC" in told
            copies.wait_phase(left, "PASSIVE", since_ms=since_ms)
            records.wait_acked(20)
    found = records.stop()
    assert_held_not_failed(found, moves=2 * rounds)
    assert_equal_copies(copies)
    assert set(found.acked) <= set(copies.lab.read_records())
    assert_one_at_a_time(copies, moves=2 * rounds)
    return found


def test_there_and_back_twice_under_load_nothing_is_lost(
    copies: Copies, record_property: Callable[[str, object], None]
) -> None:
    record_property("longest_stall_ms", there_and_back(copies, 2).longest_gap_ms)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_there_and_back_ten_times_under_load_nothing_is_lost(
    copies: Copies, record_property: Callable[[str, object], None]
) -> None:
    found = there_and_back(copies, 10)
    record_property("longest_stall_ms", found.longest_gap_ms)
    print(f"20 moves: the longest stall was {found.longest_gap_ms:.0f} ms")


def rewrite_unseen(file: Path, content: bytes) -> None:
    """Other content under the size and the time of before: a pass by these takes it for equal."""
    before = file.stat()
    assert len(content) == before.st_size
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_home_again_after_a_crash_and_what_was_never_replicated_is_kept(lab: Lab) -> None:
    copies = Copies(lab, sync=SELDOM)
    copies.settle_whole()
    (copies.here("a") / "quiet").mkdir()
    for name in ("primary", "quiet/standby"):
        (copies.here("a") / name).write_bytes(b"of the first sync")
    records = lab.write_records(cap_s=60)
    records.wait_acked(20)
    copies.sync()
    replicated = set(records.so_far().acked)
    rewrite_unseen(copies.here("a") / "primary", b"never replicated.")
    records.wait_acked(20)
    lab.power_cut("a")
    cut_ns = lab.now_ns()
    took_ms = copies.wait_phase("b", "ACTIVE").at_ms
    records.wait_acked(20)
    since_ms = copies.now_ms()
    lab.boot("a")
    copies.start("a")
    copies.wait_phase("a", "PASSIVE", since_ms=since_ms, within_s=30)
    # What looks equal and is not was found by the resync; the next by no pass, but on the way home.
    assert (copies.here("a") / "primary").read_bytes() == b"of the first sync"
    rewrite_unseen(copies.here("b") / "quiet/standby", b"of the standby...")
    lab.a.nfsha("sync", "--wait")
    assert (copies.here("a") / "quiet/standby").read_bytes() == b"of the first sync"
    since_ms = copies.now_ms()
    code, told = move(copies, "a", "failback")
    assert code == 0, told
    copies.wait_phase("b", "PASSIVE", since_ms=since_ms)
    records.wait_acked(20)
    found = records.stop()
    assert (copies.here("a") / "quiet/standby").read_bytes() == b"of the standby..."
    copies.sync()
    assert copies.differences() == []
    served = set(lab.read_records())
    assert set(found.since(took_ms * 1_000_000).acked) <= served
    # What the primary acknowledged after the last pass and before its crash is in quarantine.
    kept = set[int]()
    quarantine = copies.here("a") / ".nfsha-quarantine"
    for file in quarantine.rglob("records"):
        kept |= numbers_in(file.read_bytes())
    before = {one.number for one in found.attempts if one.error is None and one.sent_ns < cut_ns}
    assert before - replicated - served, "the primary acknowledged nothing after the last pass"
    assert before - served <= kept
    assert set(found.acked) <= served | kept
    assert [file.read_bytes() for file in quarantine.rglob("primary")] == [b"never replicated."]
    assert_one_at_a_time(copies, moves=2)


@pytest.mark.parametrize(
    ("resync", "refused"), [("automatic", {"copies"}), ("on-failback", {"room"})]
)
def test_no_resync_without_room_for_what_it_keeps(
    make_lab: Callable[..., Lab], resync: str, refused: set[str]
) -> None:
    """By itself it is refused before it begins; and so is the move that would begin it."""
    copies = Copies(make_lab(volume_mib=64), sync=f'{SELDOM}resync = "{resync}"\n')
    (copies.here("a") / "on both").write_text("else a resync would leave no file at all")
    copies.settle_whole()
    with (copies.here("a") / "mine").open("wb") as file:
        file.write(b"\1" * (30 << 20))
        os.fsync(file.fileno())
    copies.lab.power_cut("a")
    copies.wait_phase("b", "ACTIVE")
    (copies.here("b") / "new").write_bytes(b"\2" * (35 << 20))
    copies.wait(
        lambda: copies.volume("b")["here"]["free_bytes"] < 30 << 20, "a look at the new size"
    )
    since_ms = copies.now_ms()
    copies.lab.boot("a")
    copies.start("a")
    copies.wait_phase("a", "RETURNED", since_ms=since_ms)
    why = "bytes are needed" if resync == "automatic" else "`nfsha sync` begins the resync"
    copies.wait(lambda: why in copies.copy("a")["why"], "a refusal")
    assert copies.copy("a")["state"] == "refused"
    assert (copies.here("a") / "mine").exists() and not (copies.here("a") / "new").exists()
    assert copies.phase("a") == "RETURNED"
    for node in ("a", "b"):
        for how, failing in (("--dry-run", {"room"} | refused), ("--yes", refused)):
            before = standing(copies)
            found = Tried(before, ask(copies, how, on=node), standing(copies))
            found.assert_refused(failing)
            if "room" in failing:
                assert "bytes are needed" in found.asked.found("room")
    (copies.here("a") / "mine").unlink()
    copies.lab.a.nfsha("sync", "--wait")
    copies.wait_phase("a", "PASSIVE", since_ms=since_ms, within_s=20)
    assert (copies.here("a") / "new").stat().st_size == 35 << 20


def test_a_final_stop_of_the_serving_node_loses_nothing(lab: Lab) -> None:
    copies = Copies(lab, sync=SYNC, env={"NFSHA_STOP_REASON": "stop"})
    copies.settle_whole()
    records = copies.lab.write_records()
    records.wait_acked(20)
    stopped_ms = copies.now_ms()
    assert copies.daemon("a").stop(60) == 0
    assert copies.wait_phase("b", "ACTIVE", since_ms=stopped_ms).row == "X20"
    assert "stops without" not in copies.log("a")
    records.wait_acked(20)
    found = records.stop()
    assert_held_not_failed(found, moves=1)
    assert set(found.acked) <= set(copies.lab.read_records())
    assert_one_at_a_time(copies, moves=1)


def test_a_final_stop_waits_for_the_handover_that_is_under_way(lab: Lab) -> None:
    copies = Copies(lab, sync=SYNC, env={"NFSHA_STOP_REASON": "stop"})
    copies.settle_whole()
    records = copies.lab.write_records()
    records.wait_acked(20)
    first = Moving(copies, "b", "switchover")
    with source_that_hangs(copies, "a"):
        stopped_ms = copies.wait_phase("a", "PREPARED", within_s=10).at_ms
        copies.daemon("a").signal(signal.SIGTERM)
        copies.wait(lambda: "before it stops" in copies.log("a"), "a stop that waits")
    assert copies.wait_phase("b", "ACTIVE", since_ms=stopped_ms, within_s=20).row == "X20"
    assert copies.daemon("a").wait(20) == 0
    first.join(MOVE_S)
    assert first.code == 0, first.told
    records.wait_acked(20)
    found = records.stop()
    assert_held_not_failed(found, moves=1)
    assert set(found.acked) <= set(copies.lab.read_records())


@pytest.mark.slow
def test_a_final_stop_ends_a_handover_that_takes_its_time_and_begins_one_in_haste(
    lab: Lab,
) -> None:
    copies = Copies(lab, sync=SYNC, env={"NFSHA_STOP_REASON": "stop"})
    copies.settle_whole()
    records = copies.lab.write_records()
    records.wait_acked(20)
    first = Moving(copies, "b", "switchover")
    copies.wait_phase("b", "PRESYNC", within_s=10)
    with hanging(copies, "a"):  # as a walk that takes minutes
        stopped_ms = copies.now_ms()
        copies.daemon("a").signal(signal.SIGTERM)
        copies.wait(lambda: "waits for the handover" in copies.log("a"), "a stop that waits")
        copies.wait(lambda: "hands over before it stops" in copies.log("a"), "haste", 30)
    assert copies.wait_phase("b", "ACTIVE", since_ms=stopped_ms, within_s=20).row == "X20"
    assert copies.daemon("a").wait(20) == 0
    first.join(MOVE_S)  # it ends with the first move, or sees the next one and is content
    assert "in haste, has begun" in copies.log("b")
    assert "the other node is about to stop" in copies.log("b")
    records.wait_acked(20)
    found = records.stop()
    assert_held_not_failed(found, moves=1)
    assert set(found.acked) <= set(copies.lab.read_records())
    assert_one_at_a_time(copies, moves=1)


def test_a_stop_that_cannot_hand_over_says_why_and_releases(lab: Lab) -> None:
    copies = Copies(lab, sync=SYNC, env={"NFSHA_STOP_REASON": "stop"})
    copies.settle_whole()
    copies.lab.b.nfsha("maintenance", "on")
    stopped_ms = copies.now_ms()
    assert copies.daemon("a").stop(60) == 0
    assert "stops without handing over first" in copies.log("a")
    copies.wait_event("a", lambda e: e.row == "C62", "release", since_ms=stopped_ms, within_s=2)
    assert copies.moves("b", stopped_ms) == []


# ------------------------------------------------------------------ refused


def test_refused_where_a_guard_says_no_and_nothing_changes(copies: Copies) -> None:
    copies.settle_whole()
    code, told = move(copies, "a", "failback", check=False)
    assert code == 3
    assert "it serves there already" in told
    copies.lab.b.run("umount", "-l", "/nfs/data")
    copies.wait(lambda: copies.volume("a")["paired"] != "paired", "an unmounted volume")
    before = (copies.events("a")[-1], copies.lab.a.status()["epoch"])
    code, told = move(copies, "a", "switchover", check=False)
    assert code == 3
    assert "NO" in told
    assert "volume data has no copy" in told
    after = (copies.events("a")[-1], copies.lab.a.status()["epoch"])
    assert after == before
    assert copies.lab.a.nfsha("abort", check=False).returncode == 3


def test_a_second_one_is_refused_while_the_first_goes_on(copies: Copies) -> None:
    copies.settle_whole()
    first = Moving(copies, "a", "switchover")
    with source_that_hangs(copies, "a"):
        code, told = move(copies, "b", "switchover", check=False)
        assert code == 3
        assert "under way" in told
    first.join(MOVE_S)
    assert first.code == 0, first.told


# ------------------------------------------------------------------ ended, cut, killed


def test_what_is_not_equal_is_not_proved_and_the_giver_serves_on(copies: Copies) -> None:
    copies.settle_whole()
    records = copies.lab.write_records()
    (copies.here("a") / "identical").write_bytes(b"intact")
    records.wait_acked(10)
    copies.sync()
    first = Moving(copies, "a", "switchover")
    with source_that_hangs(copies, "a"):
        froze_ms = copies.wait_phase("b", "FINAL_SYNC", within_s=10).at_ms
        # In a folder of the last pass, and with nothing that this would see.
        rewrite_unseen(copies.here("b") / "identical", b"broken")
    served = copies.wait_phase("a", "ACTIVE", since_ms=froze_ms, within_s=15)
    first.join(MOVE_S)
    assert first.code == 4, first.told
    aborted = [event for event in copies.events("b") if event.row == "Z30"]
    assert "volume data is not proved equal" in aborted[0].detail
    assert "/identical differs" in aborted[0].detail
    assert served.at_ms > froze_ms
    records.wait_acked(10)
    # The next one compares by content before it holds anybody.
    assert move(copies, "a", "switchover")[0] == 0
    found = records.stop()
    copies.lab.a.nfsha("sync", "--wait")
    assert copies.differences() == []
    assert set(found.acked) <= set(copies.lab.read_records())


def test_a_write_in_the_freeze_ends_it(copies: Copies) -> None:
    copies.settle_whole()
    first = Moving(copies, "a", "switchover")
    copies.wait_phase("a", "PREPARED", within_s=20)
    prepared_ms = copies.now_ms()
    file = copies.here("a") / "by a program on the giver"
    while copies.phase("a") == "PREPARED":
        with file.open("ab") as more:
            more.write(b"x")
    copies.wait_phase("a", "ACTIVE", since_ms=prepared_ms, within_s=15)
    first.join(MOVE_S)
    assert first.code == 4, first.told
    assert "is not proved equal" in copies.log("b")


@pytest.mark.parametrize("node", ["a", "b"])
def test_aborted_in_the_freeze_the_giver_serves_again_within_a_second(
    copies: Copies, node: str
) -> None:
    copies.settle_whole()
    records = copies.lab.write_records()
    records.wait_acked(10)
    first = Moving(copies, "a", "switchover")
    with source_that_hangs(copies, "a"):
        copies.wait_phase("b", "FINAL_SYNC", within_s=10)
        asked_ms = copies.now_ms()
        copies.lab.node(node).nfsha("abort")
        served = copies.wait_phase("a", "ACTIVE", since_ms=asked_ms, within_s=5)
    first.join(MOVE_S)
    assert first.code == 4, first.told
    # The command's own start is in it; the margin is for a busy machine.
    assert served.at_ms - asked_ms < 2 * ABORT_MS
    records.wait_acked(10)
    found = records.stop()
    assert found.failed == ()
    assert copies.phase("b") == "PASSIVE"
    assert_one_at_a_time(copies, moves=0)


def test_what_is_not_proved_in_time_ends_by_itself(lab: Lab) -> None:
    copies = Copies(lab, sync=SYNC + '[handover]\nmax_stall = "1s"\n')
    copies.settle_whole()
    first = Moving(copies, "b", "switchover")
    with source_that_hangs(copies, "a"):
        froze_ms = copies.wait_phase("a", "PREPARED", within_s=10).at_ms
        served = copies.wait_phase("a", "ACTIVE", since_ms=froze_ms, within_s=10)
    first.join(MOVE_S)
    assert first.code == 4, first.told
    assert 2000 <= served.at_ms - froze_ms < 4000
    aborted = [event for event in copies.events("b") if event.row == "Z30"]
    assert "not proved within 2000 ms" in aborted[0].detail


def test_the_receiver_killed_in_its_last_pass_leaves_all_to_the_giver(copies: Copies) -> None:
    copies.settle_whole()
    records = copies.lab.write_records()
    records.wait_acked(10)
    first = Moving(copies, "a", "switchover")
    with source_that_hangs(copies, "a"):
        copies.wait_phase("b", "FINAL_SYNC", within_s=10)
        killed_ms = copies.now_ms()
        copies.daemon("b").kill()
        copies.daemon("b").wait(5)
        served = copies.wait_phase("a", "ACTIVE", since_ms=killed_ms, within_s=10)
    # Nobody says that the epoch given away will never be: so it takes one above that.
    assert served.row == "T20"
    assert copies.lab.a.status()["epoch"]["number"] == 3
    first.join(MOVE_S)
    assert first.code == 4, first.told
    records.wait_acked(10)
    found = records.stop()
    assert found.failed == ()
    copies.start("b")
    copies.wait_phase("b", "PASSIVE", since_ms=killed_ms, within_s=20)
    assert move(copies, "a", "switchover")[0] == 0
    assert set(found.acked) <= set(copies.lab.read_records())


def test_the_giver_killed_when_prepared_never_serves_what_it_gave_away(copies: Copies) -> None:
    copies.settle_whole()
    first = Moving(copies, "b", "switchover")
    with source_that_hangs(copies, "a"):
        copies.wait_phase("b", "FINAL_SYNC", within_s=10)
        copies.daemon("a").signal(signal.SIGKILL)
        copies.daemon("a").wait(5)
    killed_ms = copies.now_ms()
    # The receiver hears nobody, takes nothing that was not proved, and takes over by the rules.
    copies.wait_phase("b", "ACTIVE", since_ms=killed_ms - 2000, within_s=20)
    copies.start("a")
    copies.wait_phase("a", "PASSIVE", since_ms=killed_ms, within_s=20)
    assert ("STARTING", "PREPARED") in copies.moves("a", killed_ms)
    # One above the one given away is left free: the giver might have taken it unheard.
    assert copies.lab.b.status()["epoch"]["number"] == 4
    first.join(MOVE_S)
    copies.assert_never_two()

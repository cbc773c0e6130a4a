"""The way home after a crash, with many files and with a large one that grows; and many volumes.

And a final stop, which has no time for a walk through many files.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.netns.copies import Copies
from tests.netns.lab import Lab
from tests.netns.labkit.nfs_client import RECORD_BYTES
from tests.netns.test_handover import (
    SELDOM,
    Moving,
    assert_held_not_failed,
    assert_one_at_a_time,
    numbers_in,
    rewrite_unseen,
)

pytestmark = pytest.mark.timeout(120)

A_LONG_WHILE_S = 240

FOLDERS = 100


def make_files(volume: Path, numbers: range, content: bytes) -> None:
    """Small files, spread over folders; those that are there get other content."""
    for number in numbers:
        folder = volume / f"folder-{number % FOLDERS}"
        folder.mkdir(exist_ok=True)
        (folder / f"file-{number}").write_bytes(content + b" %d" % number)


def appended(file: Path, from_byte: int) -> set[int]:
    """The numbers of the records behind a place of a file."""
    with file.open("rb") as opened:
        opened.seek(from_byte)
        return numbers_in(opened.read())


@pytest.mark.parametrize(
    ("count", "mib"),
    [
        (10_000, 64),
        pytest.param(100_000, 1, marks=(pytest.mark.slow, pytest.mark.timeout(900))),
        pytest.param(1_000, 2048, marks=(pytest.mark.slow, pytest.mark.timeout(900))),
    ],
)
def test_home_after_a_crash_with_many_files_and_a_large_one_that_grows(
    make_lab: Callable[..., Lab],
    count: int,
    mib: int,
    record_property: Callable[[str, object], None],
) -> None:
    lab = make_lab(volume_mib=5 * mib + count // 50, inodes=4 * count)
    copies = Copies(lab, sync=SELDOM)
    copies.settle_whole()
    make_files(copies.here("a"), range(count // 2), b"of the primary")
    with (copies.here("a") / "large").open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(1 << 20))
    lab.b.nfsha("sync", "--wait", timeout_s=A_LONG_WHILE_S)
    end = (mib << 20) // RECORD_BYTES
    writers = [
        lab.write_records(cap_s=A_LONG_WHILE_S),
        lab.write_records(path="/large", first=end, cap_s=A_LONG_WHILE_S),
    ]
    for writer in writers:
        writer.wait_acked(10)
    lab.power_cut("a")
    took_ms = copies.wait_phase("b", "ACTIVE", within_s=20).at_ms
    make_files(copies.here("b"), range(count // 4, count), b"of the standby")
    for number in range(count // 8):
        (copies.here("b") / f"folder-{number % FOLDERS}/file-{number}").unlink()
    since_ms = copies.now_ms()
    lab.boot("a")
    copies.start("a")
    copies.wait_phase("a", "PASSIVE", since_ms=since_ms, within_s=A_LONG_WHILE_S)
    since_ms = copies.now_ms()
    lab.a.nfsha("failback", "--yes", timeout_s=A_LONG_WHILE_S)
    copies.wait_phase("b", "PASSIVE", since_ms=since_ms)
    for writer in writers:
        writer.wait_acked(10, timeout_s=60)
    small, large = (writer.stop().since(took_ms * 1_000_000) for writer in writers)
    lab.b.nfsha("sync", "--wait", timeout_s=A_LONG_WHILE_S)
    assert copies.differences() == []
    assert set(small.acked) <= set(lab.read_records())
    assert {number - end for number in large.acked} <= appended(
        copies.here("a") / "large", mib << 20
    )
    files = sum(1 for _ in copies.here("a").glob("folder-*/file-*"))
    assert files == count - count // 8
    for found in (small, large):
        assert_held_not_failed(found.since((took_ms + 1) * 1_000_000), moves=1)
    assert_one_at_a_time(copies, moves=2)
    stall_ms = small.since(since_ms * 1_000_000).longest_gap_ms
    record_property("longest_stall_ms", stall_ms)
    print(f"{count} files, {mib} MiB: the longest stall was {stall_ms:.0f} ms")


@pytest.mark.parametrize(
    ("count", "within_ms"),
    [
        (5_000, 10_000),
        pytest.param(100_000, 10_000, marks=(pytest.mark.slow, pytest.mark.timeout(400))),
    ],
)
def test_a_final_stop_hands_over_without_a_walk_through_many_files(
    make_lab: Callable[..., Lab],
    count: int,
    within_ms: int,
    record_property: Callable[[str, object], None],
) -> None:
    """All files changed in this reign: to compare all of them by content would take the time."""
    lab = make_lab(volume_mib=64 + count // 50, inodes=2 * count)
    copies = Copies(lab, sync=SELDOM, env={"NFSHA_STOP_REASON": "stop"})
    copies.settle_whole()
    make_files(copies.here("a"), range(count), b"of the primary")
    (copies.here("a") / "quiet").mkdir()
    (copies.here("a") / "quiet/file").write_bytes(b"first")
    lab.b.nfsha("sync", "--wait", timeout_s=A_LONG_WHILE_S)
    records = lab.write_records(cap_s=60)
    records.wait_acked(10)
    # Not what a pass sees by size and time: what the journal names is copied by content.
    rewrite_unseen(copies.here("a") / "quiet/file", b"other")
    stopped_ms = copies.now_ms()
    assert copies.daemon("a").stop(60) == 0
    served = copies.wait_phase("b", "ACTIVE", since_ms=stopped_ms)
    assert served.row == "X20", "it was no handover"
    log = copies.log("b")
    assert "the other node is about to stop" in log
    assert "a full walk: the schedule's" not in log
    assert "are compared by content" not in log
    assert served.at_ms - stopped_ms < within_ms
    records.wait_acked(10)
    found = records.stop()
    assert_held_not_failed(found, moves=1)
    assert set(found.acked) <= set(lab.read_records())
    assert (copies.here("b") / "quiet/file").read_bytes() == b"other"
    # All else of both trees is equal; the clients write on.
    assert [one for one in copies.differences() if "records" not in one] == []
    record_property("handed_over_ms", served.at_ms - stopped_ms)
    print(f"{count} files: handed over {served.at_ms - stopped_ms} ms after the stop")


@pytest.mark.slow
def test_ten_volumes_are_held_hardly_longer_than_one(make_lab: Callable[..., Lab]) -> None:
    """Every volume has changed in the last moment: ten last passes and ten proofs."""
    held_ms = {}
    for count in (1, 10):
        names = ("data", *(f"volume{number}" for number in range(1, count)))
        copies = Copies(make_lab(volumes=names), sync=SELDOM)
        copies.settle_whole(*names)
        records = copies.lab.write_records()
        records.wait_acked(10)
        since_ms = copies.now_ms()
        moving = Moving(copies, "a", "switchover")
        while not (froze := [e for e in copies.events("a", since_ms) if e.to == "FREEZING"]):
            assert moving.is_alive(), moving.told
            for name in names:
                (copies.here("a", name) / "changed").write_text(str(copies.now_ms()))
        moving.join(60)
        assert moving.code == 0, moving.told
        served = copies.wait_phase("b", "ACTIVE", since_ms=since_ms)
        held_ms[count] = served.at_ms - froze[0].at_ms
        records.wait_acked(10)
        found = records.stop()
        assert set(found.acked) <= set(copies.lab.read_records())
        for node in ("a", "b"):
            copies.daemon(node).stop(60)
    print(f"clients were held for (ms, by volumes): {held_ms}")
    assert held_ms[10] < held_ms[1] + 3000

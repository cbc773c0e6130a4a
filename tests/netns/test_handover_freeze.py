"""What keeps a handover from its end: who writes too fast, and changes that nobody could name."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.netns.copies import SYNC, Copies
from tests.netns.lab import ROLES, Lab
from tests.netns.labkit.nfs_client import RECORD_BYTES
from tests.netns.labkit.place import LabError
from tests.netns.test_handover import (
    SELDOM,
    Moving,
    assert_held_not_failed,
    assert_one_at_a_time,
    move,
)

pytestmark = pytest.mark.timeout(120)

QUEUE = Path("/proc/sys/fs/fanotify/max_queued_events")
SERVES_AGAIN_WITHIN_MS = 1000

# ------------------------------------------------------------------ who writes too fast

SLOW = SELDOM.replace("[sync]\n", '[sync]\nbandwidth = "1MB"\n') + '[handover]\nmax_stall = "1s"\n'
WRITTEN_BYTES = 300_000
"""Of each of four files; a pass at 1 MB/s takes more than a second for them."""


class Program(threading.Thread):
    """A program on the serving node that writes some files anew, all the time, until it is told."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        folder.mkdir()
        self._folder = folder
        self._end = threading.Event()
        self.write_all()
        self.start()

    def write_all(self) -> None:
        for number in range(4):
            new = self._folder / f"new-{number}"
            new.write_bytes(os.urandom(WRITTEN_BYTES))
            new.rename(self._folder / f"table-{number}")

    def run(self) -> None:
        while not self._end.wait(0.05):
            self.write_all()

    def stop(self) -> None:
        self._end.set()
        self.join()


@pytest.fixture
def programs() -> Iterator[list[Program]]:
    """Those that a test started, and are ended with it."""
    begun: list[Program] = []
    yield begun
    for one in begun:
        one.stop()


def test_what_writes_too_fast_is_named_with_its_rates_and_holds_no_client(
    lab: Lab, programs: list[Program], record_property: Callable[[str, object], None]
) -> None:
    copies = Copies(lab, sync=SLOW)
    copies.settle_whole()
    records = lab.write_records()
    records.wait_acked(10)
    programs.append(Program(copies.here("a") / "tables"))
    since_ms = copies.now_ms()
    code, told = move(copies, "a", "switchover", check=False)
    assert code == 4, told
    assert "Volume data is written too fast, in the folders tables: files of 1.2 MB changed" in told
    assert " kB/s of them (sync.bandwidth allows 999 kB/s)" in told
    assert "the largest is tables/table-" in told
    assert "handover.max_stall is 1 s: after 4 rounds" in told
    # Before any freeze: no client waited, and this node never ceased to serve.
    assert copies.moves("a", since_ms) == []
    assert "FREEZING" not in copies.log("a")
    records.wait_acked(10)
    stall_ms = records.so_far().since(since_ms * 1_000_000).longest_gap_ms
    record_property("longest_gap_ms", stall_ms)
    programs.pop().stop()
    assert move(copies, "a", "switchover")[0] == 0
    records.wait_acked(10)
    found = records.stop()
    assert_held_not_failed(found, moves=1)
    copies.lab.a.nfsha("sync", "--wait")
    assert copies.differences() == []
    assert set(found.acked) <= set(lab.read_records())
    assert_one_at_a_time(copies, moves=1)


@pytest.mark.slow
def test_a_file_too_large_for_the_stall_is_named_before_clients_are_held(
    make_lab: Callable[..., Lab],
) -> None:
    """It only grows by some records: what takes long is to read it, for the pass and the proof."""
    lab = make_lab(volume_mib=4096)
    copies = Copies(lab, sync=SELDOM + '[handover]\nmax_stall = "1s"\n')
    copies.settle_whole()
    with (copies.here("a") / "large").open("wb") as file:
        for _ in range(1024):
            file.write(os.urandom(1 << 20))
    lab.b.nfsha("sync", "--wait", timeout_s=60)
    records = lab.write_records(path="/large", first=(1 << 30) // RECORD_BYTES, cap_s=60)
    records.wait_acked(10)
    ahead = lab.a.nfsha("switchover", "--dry-run", timeout_s=60).stdout
    assert "large files of 1.1 GB change" in " ".join(ahead.split())
    since_ms = copies.now_ms()
    code, told = move(copies, "a", "switchover", check=False)
    assert code == 4, told
    assert "handover.max_stall is 1 s" in told
    assert "the largest is large with 1.1 GB, which is read as a whole" in told
    assert copies.moves("a", since_ms) == []
    records.wait_acked(10)
    assert records.stop().failed == ()
    parts = copies.here("b") / ".nfsha-partial"
    copies.wait(lambda: not parts.exists(), "an end of its spare copy")
    # At rest it is not read at all.
    lab.b.nfsha("sync", "--wait", timeout_s=60)
    assert move(copies, "a", "switchover")[0] == 0


# ------------------------------------------------------------------ changes that nobody could name


class Held(Copies):
    """A pair whose daemons wait where a test wants it (`labkit/held`)."""

    def folder(self, name: str) -> Path:
        """Where the files that hold the daemon of a node are."""
        return self.lab.folder / f"hold-{name}"

    def start(self, *names: str) -> None:
        for name in names or tuple(ROLES):
            node = self.lab.node(name)
            node.path("/run/nfsha").mkdir(mode=0o750, exist_ok=True)
            self.folder(name).mkdir(exist_ok=True)
            argv = [sys.executable, "-m", "tests.netns.labkit.held", str(self.folder(name))]
            node.daemon = node.spawn(argv, name="daemon")

    @contextmanager
    def holding(self, name: str, what: str) -> Iterator[Callable[[], None]]:
        """Holds it for the length of a block; what it gives waits until it stands there."""
        file = self.folder(name) / what
        reached = file.with_suffix(".reached")
        reached.unlink(missing_ok=True)
        file.touch()
        try:
            yield lambda: self.wait(reached.exists, f"{what} of {name} that is held")
        finally:
            file.unlink(missing_ok=True)

    def overflow(self, name: str) -> None:
        """More changes on a node's volume than the kernel keeps, while nobody reads them.

        By a program on that node: the ports of clients are closed. Two events of one name are one.
        """
        file = self.here(name) / "renamed"
        file.write_text("again and again")
        limit = int(QUEUE.read_text())
        if limit > 100_000:
            raise LabError(f"{QUEUE} is {limit}: that takes too long to fill")
        with self.holding(name, "journals"):
            for number in range(limit + 100):
                file = file.rename(file.with_name(f"renamed-{number}"))


@pytest.mark.parametrize(
    ("node", "where", "phase"),
    [("a", "rest", "FREEZING"), ("b", "proof", "FINAL_SYNC")],
    ids=["before the last pass", "after the proof"],
)
def test_changes_that_the_kernel_did_not_keep_end_it_and_the_next_one_works(
    lab: Lab, node: str, where: str, phase: str
) -> None:
    copies = Held(lab, sync=SYNC)
    copies.settle_whole()
    records = lab.write_records()
    records.wait_acked(10)
    with copies.holding(node, where) as wait_there:
        first = Moving(copies, "a", "switchover")
        wait_there()
        assert copies.phase(node) == phase
        copies.overflow("a")
    first.join(60)
    assert first.code == 4, first.told
    assert "more changes at once than the kernel keeps" in first.told
    ended = [event for event in copies.events("b") if event.row == "Z30"]
    assert len(ended) == 1
    served = copies.wait_phase("a", "ACTIVE", since_ms=ended[0].at_ms, within_s=5)
    assert served.at_ms - ended[0].at_ms < SERVES_AGAIN_WITHIN_MS
    assert copies.moves("b", ended[0].at_ms)[-1][1] == "PASSIVE"
    records.wait_acked(10)
    assert move(copies, "a", "switchover")[0] == 0
    records.wait_acked(10)
    found = records.stop()
    assert_held_not_failed(found, moves=1)
    lab.a.nfsha("sync", "--wait")
    assert copies.differences() == []
    assert set(found.acked) <= set(lab.read_records())
    assert_one_at_a_time(copies, moves=1)

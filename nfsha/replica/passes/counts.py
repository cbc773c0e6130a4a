"""What the runs of one pass did, added up, and the verdict on all of them. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from nfsha.replica.rsync.exits import Complaints, Ending, Verdict
from nfsha.replica.rsync.progress import Progress, Stats

VANISHED: Final = 24
"""The exit code of rsync when files went away while it read them (rsync(1))."""

_SEVERITY: Final = (
    Verdict.COMPLETE,
    Verdict.INCOMPLETE,
    Verdict.HELD,
    Verdict.RETRY,
    Verdict.STOPPED,
    Verdict.REFUSED,
    Verdict.FAILED,
    Verdict.KILLED,
)


@dataclass(slots=True)
class Run:
    """What came out of one rsync."""

    ending: Ending
    complaints: Complaints
    stats: Stats | None

    @property
    def went_through(self) -> bool:
        """It did its whole work: nothing failed, at most files vanished."""
        return self.ending.code in (0, VANISHED)


@dataclass(slots=True)
class Counts:
    """Of one pass. `full`: what a program said of a full disk. `entries`: of the volume.

    `vanished_count` is of all; names are kept of the first.
    """

    endings: list[Ending] = field(default_factory=list)
    vanished: list[bytes] = field(default_factory=list)
    vanished_count: int = 0
    wire_bytes: int = 0
    transferred_files: int = 0
    transferred_bytes: int = 0
    created: int = 0
    deletions: int = 0
    entries: int | None = None
    full: str = ""

    def add(self, run: Run) -> None:
        """Notes a run that copied nothing."""
        self.endings.append(run.ending)
        self.full = self.full or run.complaints.full
        self.vanished += run.complaints.vanished
        self.vanished_count += run.complaints.vanished_count
        if run.stats is not None:
            self.wire_bytes += run.stats.wire_bytes

    def add_copy(self, run: Run, progress: Progress) -> None:
        """Notes a copying run, and how far it came if it gave no counts."""
        self.add(run)
        if run.stats is None:
            self.add_cut(progress)
        else:
            self.add_copied(run.stats)
            self.entries = run.stats.entries

    def add_copied(self, stats: Stats) -> None:
        """Notes what a run copied, whatever else came of it."""
        self.transferred_files += stats.transferred
        self.transferred_bytes += stats.transferred_bytes
        self.created += stats.created
        self.deletions += stats.deleted

    def add_cut(self, progress: Progress) -> None:
        """Notes what a copying run did that was cut: rsync gives no counts then."""
        self.transferred_files += progress.files
        self.transferred_bytes += progress.bytes

    def fail(self, reason: str) -> None:
        """Notes what this node could not do."""
        self.endings.append(Ending(Verdict.FAILED, 11, reason))

    @property
    def worst(self) -> Ending:
        """The newest of the worst."""
        endings = reversed(self.endings)
        return max(endings, key=lambda ending: _SEVERITY.index(ending.verdict))

    def verdict(self, held: str) -> Verdict:
        """On the whole pass. `held`: why deletions have to wait, or nothing."""
        verdict = self.worst.verdict
        if held and _SEVERITY.index(verdict) < _SEVERITY.index(Verdict.HELD):
            return Verdict.HELD
        return verdict

"""What is known of one volume's copy: how its passes went, what runs, what holds it up.

For an operator and for the choice of the next pass; it moves no data and reads no clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from nfsha.core.model import Epoch
from nfsha.replica.files.beneath import shown
from nfsha.replica.rsync.deletions import DeletionPlan
from nfsha.replica.rsync.progress import Progress
from nfsha.replica.volume.marks import Mark

NAMES_SHOWN = 20


class State(StrEnum):
    """Where the copy of one volume stands."""

    OFF = "off"
    IDLE = "idle"
    RUNNING = "running"
    HELD = "held"
    FAILED = "failed"
    REFUSED = "refused"


@dataclass(slots=True)
class Copy:
    """One volume's copy. `attempts`: passes that failed in a row."""

    uuid: str
    state: State = State.OFF
    why: str = ""
    attempts: int = 0
    progress: Progress | None = None
    plan: DeletionPlan | None = None
    said: str = ""
    """What the log said last of its troubles."""
    accepted: str | None = None
    """The hash of the plan of deletions that the operator accepted for the next pass."""
    folders: tuple[bytes, ...] | None = None
    """What the last complete pass asked for; None: all of the volume."""
    compared: tuple[Epoch, int, int] | None = None
    """All that had changed in an epoch until then (by this node's clock, in milliseconds, and by
    the source's wall clock, in nanoseconds) was compared by content."""
    brought: Mapping[bytes, int] = field(default_factory=dict)
    """The files that the last pass brought, and their sizes, as far as they were named."""
    spares: dict[bytes, int] = field(default_factory=dict)
    """Large files with a spare copy for the next pass, and its size."""
    looked_ms: int | None = None
    """What looking for what differs took of the last pass."""
    full_walks: Counter[str] = field(default_factory=Counter)
    missed_by_journal: int = 0
    verified_ns: int | None = None
    damaged: int = 0
    missed: int = 0

    def take_progress(self, now: Progress) -> None:
        """What a pass reports while it runs."""
        self.progress = now

    def rest(self, state: State, why: str) -> None:
        """Nothing runs any more."""
        self.state = state
        self.why = why
        self.progress = None

    def as_json(self, mark: Mark | None, age_ms: int | None, next_ms: int | None) -> dict[str, Any]:
        """For an operator; see docs/replication.md for the words."""
        return {
            "state": str(self.state),
            "why": self.why,
            "last": None if mark is None else last_as_json(mark),
            "age_ms": age_ms,
            "next_ms": next_ms,
            "progress": None if self.progress is None else _progress(self.progress),
            "plan": None if self.plan is None else _plan(self.plan),
            "full_walks": dict(self.full_walks),
            "missed_by_journal": self.missed_by_journal,
            "verify": None
            if self.verified_ns is None
            else {"last_ns": self.verified_ns, "damaged": self.damaged, "missed": self.missed},
        }


def last_as_json(mark: Mark) -> dict[str, Any]:
    """The last complete pass."""
    return {
        "started_ns": mark.started_ns,
        "epoch": mark.epoch.number,
        "files": mark.files,
        "bytes": mark.bytes,
        "transferred_bytes": mark.transferred_bytes,
        "deletions": mark.deletions,
        "duration_ms": mark.duration_ms,
        "walk": mark.walk,
    }


def _progress(progress: Progress) -> dict[str, Any]:
    return {
        "stage": str(progress.stage),
        "bytes": progress.bytes,
        "total_bytes": progress.total_bytes,
        "files": progress.files,
        "rate_bytes_s": progress.rate_bytes_s,
        "eta_s": progress.eta_s,
        "percent": progress.percent,
    }


def _plan(plan: DeletionPlan) -> dict[str, Any]:
    names = [shown(name) for name in plan.names[:NAMES_SHOWN]]
    return {"hash": plan.hash, "count": plan.count, "names": names}

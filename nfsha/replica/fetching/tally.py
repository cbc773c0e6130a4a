"""What the receiver of a handover has done to each volume so far, for its report and its progress.

Counts only. `Fetching` adds what each pass did, `Receiving` what the rounds were; nothing is ever
decided from it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final

MAX_ROUNDS: Final = 100
"""More than a handover may make (receiving.MAX_ROUNDS, and the last one)."""

MAX_VOLUMES: Final = 1000
"""So many volumes a report lists, those with which most was done; its rounds count all."""

SHAPE: Final = {
    "volumes": [
        {
            "name": str,
            "passes": int,
            "copied_files": int,
            "copied_bytes": int,
            "deleted": int,
            "quarantined": int,
        }
    ],
    "rounds": [
        {"what": str, "took_ms": int, "copied_files": int, "copied_bytes": int, "trouble": str}
    ],
}
"""What `Tally.as_json` gives."""


@dataclass(slots=True)
class VolumeTally:
    """One volume: what all passes of this handover did, whether they were complete or not.

    `quarantined`: files that were put aside instead of being overwritten or deleted; they are among
    the copied or deleted ones.
    """

    name: str
    passes: int = 0
    copied_files: int = 0
    copied_bytes: int = 0
    deleted: int = 0
    quarantined: int = 0


@dataclass(frozen=True, slots=True)
class Round:
    """One pass of each volume. `what` is "full", "changes" (the journal's), or "last" (frozen)."""

    what: str
    took_ms: int
    copied_files: int
    copied_bytes: int
    trouble: str = ""
    """Why it does not count; "" for one that was complete."""


@dataclass(slots=True)
class Tally:
    """All of one handover."""

    volumes: dict[str, VolumeTally] = field(default_factory=dict)
    """By identity."""
    rounds: list[Round] = field(default_factory=list)
    running: str = ""
    """What the round that runs now is; "" between rounds."""
    _before: tuple[int, int] = (0, 0)

    def add(
        self,
        uuid: str,
        name: str,
        *,
        copied_files: int,
        copied_bytes: int,
        deleted: int,
        quarantined: int = 0,
    ) -> None:
        """Counts one pass of one volume."""
        one = self.volumes.setdefault(uuid, VolumeTally(name))
        one.passes += 1
        one.copied_files += copied_files
        one.copied_bytes += copied_bytes
        one.deleted += deleted
        one.quarantined += quarantined

    def put_aside(self, uuid: str, name: str, files: int) -> None:
        """Counts files that a comparison by content replaced; their old copies are kept."""
        if files:
            one = self.volumes.setdefault(uuid, VolumeTally(name))
            one.copied_files += files
            one.quarantined += files

    def begin_round(self, what: str) -> None:
        """A round begins."""
        self.running = what
        self._before = self._copied()

    def end_round(self, took_ms: int, trouble: str = "") -> None:
        """It has ended; the oldest rounds beyond a bound are forgotten."""
        files, size = self.so_far()
        ended = Round(self.running, took_ms, files, size, trouble)
        self.rounds = [*self.rounds[1 - MAX_ROUNDS :], ended]
        self.running = ""

    def so_far(self) -> tuple[int, int]:
        """Files and bytes that were copied in this round."""
        (files, size), (files_before, size_before) = self._copied(), self._before
        return files - files_before, size - size_before

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        busiest = sorted(self.volumes.values(), key=_amount, reverse=True)[:MAX_VOLUMES]
        listed = sorted(busiest, key=lambda one: one.name)
        return {
            "volumes": [asdict(one) for one in listed],
            "rounds": [asdict(one) for one in self.rounds],
        }

    def _copied(self) -> tuple[int, int]:
        every = self.volumes.values()
        return sum(one.copied_files for one in every), sum(one.copied_bytes for one in every)


def _amount(one: VolumeTally) -> int:
    return one.copied_files + one.deleted + one.quarantined

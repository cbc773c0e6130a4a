"""Whether the passes of a handover come near enough to a node that goes on writing.

Pure: it takes what each round of passes took, and judges. A round is one pass of each volume that
changed since the round before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nfsha.replica.files.beneath import shown

FROZEN_SHARE = 2
"""What clients wait for is reckoned as so many of the last rounds: the last pass, and its proof,
which reads the same files once more."""

SHRINKS_BY = 0.8
"""A round that takes more than this share of the one before does not come nearer."""

PATIENCE = 3
"""So many rounds in a row may come no nearer."""

FOLDERS_SHOWN = 3
MAX_FOLDERS = 100_000
"""Of so many folders it is counted how often they changed."""


@dataclass(frozen=True, slots=True)
class Took:
    """One volume's pass of a round."""

    duration_ms: int
    folders: tuple[bytes, ...]


class Convergence:
    """The rounds of one handover, while the giver serves."""

    def __init__(self, max_stall_ms: int) -> None:
        self._max_stall_ms = max_stall_ms
        self._far = 0
        self._before_ms: int | None = None
        self._folders: dict[str, Counter[bytes]] = {}
        self._slowest = ""
        self.rounds = 0
        self.last_ms = 0

    @property
    def predicted_ms(self) -> int:
        """How long clients would be held if the freeze came now."""
        return self.last_ms * FROZEN_SHARE

    @property
    def near(self) -> bool:
        """Whether that fits what clients may be held for."""
        return self.rounds > 0 and self.predicted_ms <= self._max_stall_ms

    @property
    def hopeless(self) -> bool:
        """Whether it comes no nearer."""
        return self._far >= PATIENCE

    def add(self, took_ms: int, volumes: Mapping[str, Took]) -> None:
        """Takes one round, and the passes that it was made of by the volume's name."""
        if self._before_ms is not None and took_ms >= self._before_ms * SHRINKS_BY:
            self._far += 1
        else:
            self._far = 0
        self.rounds += 1
        self._before_ms = self.last_ms = took_ms
        for name, one in volumes.items():
            self._count(self._folders.setdefault(name, Counter()), one.folders)
        self._slowest = max(volumes, key=lambda name: volumes[name].duration_ms, default="")

    def sentence(self) -> str:
        """Why it cannot come near, and what writes too fast."""
        return (
            f"the last changes would hold clients for about {self.predicted_ms / 1000:.1f} s, and "
            f"handover.max_stall is {self._max_stall_ms / 1000:g} s: after {self.rounds} rounds a "
            f"pass still takes {self.last_ms / 1000:.1f} s. {self._who()}"
        )

    def _who(self) -> str:
        if not self._slowest:
            return "Nothing was written meanwhile: the link or the other node is too slow"
        busiest = self._folders[self._slowest].most_common(FOLDERS_SHOWN)
        names = ", ".join(shown(folder) for folder, _ in busiest)
        return (
            f"Volume {self._slowest} is written too fast, in the folders {names}: stop what writes "
            "there, or raise handover.max_stall"
        )

    @staticmethod
    def _count(counted: Counter[bytes], folders: Iterable[bytes]) -> None:
        for folder in folders:
            if folder in counted or len(counted) < MAX_FOLDERS:
                counted[folder] += 1

"""Whether the passes of a handover come near enough to a node that goes on writing.

Pure: it takes what each round of passes took, and judges. A round is one pass of each volume that
changed since the round before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from nfsha.replica.files.beneath import shown

SHRINKS_BY = 0.8
"""A round that takes more than this share of the one before does not come nearer."""

PATIENCE = 3
"""So many rounds in a row may come no nearer."""

FOLDERS_SHOWN = 3
LEAST_SHARE = 20
"""A folder in which less than this part (one in twenty) of the most was written is not named."""

MAX_FOLDERS = 100_000
"""Of so many folders it is counted how often they changed."""


@dataclass(frozen=True, slots=True)
class Took:
    """One volume's pass of a round."""

    duration_ms: int
    folders: tuple[bytes, ...]
    brought_bytes: int = 0
    """The sizes of the files that it brought."""
    files: Mapping[bytes, int] = field(default_factory=dict)
    """These, with their sizes, as far as they were named."""
    limit_kib_s: int | None = None
    """What `sync.bandwidth` allows it."""

    @property
    def rate_bytes_s(self) -> int:
        """How fast it brought them, all that a pass does included."""
        return self.brought_bytes * 1000 // max(1, self.duration_ms)


class Convergence:
    """The rounds of one handover, while the giver serves."""

    def __init__(self, max_stall_ms: int) -> None:
        self._max_stall_ms = max_stall_ms
        self._far = 0
        self._before_ms: int | None = None
        self._folders: dict[str, Counter[bytes]] = {}
        self._bytes: dict[str, Counter[bytes]] = {}
        self._slowest = ""
        self._took: Took | None = None
        self._within_ms = 0
        self._began_ms: int | None = None
        self.rounds = 0
        self.last_ms = 0
        self.proof_ms = 0

    @property
    def predicted_ms(self) -> int:
        """How long clients would be held if the freeze came now: the last pass, and its proof."""
        return self.last_ms + self.proof_ms

    @property
    def near(self) -> bool:
        """Whether that fits what clients may be held for."""
        return self.rounds > 0 and self.predicted_ms <= self._max_stall_ms

    @property
    def hopeless(self) -> bool:
        """Whether it comes no nearer."""
        return self._far >= PATIENCE

    def add(
        self,
        took_ms: int,
        volumes: Mapping[str, Took],
        *,
        proof_ms: int | None = None,
        began_ms: int = 0,
    ) -> None:
        """Takes one round, and the passes that it was made of by the volume's name.

        `proof_ms`: what it took of the round to look for what differs, by content, as the proof
        does; None where that is not known: then as long as all of it.
        """
        if self._before_ms is not None and took_ms >= self._before_ms * SHRINKS_BY:
            self._far += 1
        else:
            self._far = 0
        self.rounds += 1
        self._before_ms = self.last_ms = took_ms
        self.proof_ms = took_ms if proof_ms is None else min(proof_ms, took_ms)
        self._within_ms = began_ms - self._began_ms if self._began_ms is not None else 0
        self._began_ms = began_ms
        for name, one in volumes.items():
            self._count(self._folders.setdefault(name, Counter()), dict.fromkeys(one.folders, 1))
            self._count(self._bytes.setdefault(name, Counter()), _by_folder(one.files))
        self._slowest = max(volumes, key=lambda name: volumes[name].duration_ms, default="")
        self._took = volumes.get(self._slowest)

    def sentence(self) -> str:
        """Why it cannot come near, and what writes too fast."""
        return (
            f"the last changes would hold clients for about {self.predicted_ms / 1000:.1f} s, and "
            f"handover.max_stall is {self._max_stall_ms / 1000:g} s: after {self.rounds} rounds a "
            f"pass still takes {self.last_ms / 1000:.1f} s. {self._who()}"
        )

    def _who(self) -> str:
        if self._took is None:
            return "Nothing was written meanwhile: the link or the other node is too slow"
        names = ", ".join("the root" if one == b"." else shown(one) for one in self._busiest())
        return (
            f"Volume {self._slowest} is written too fast, in the folders {names}: "
            f"{self._rates(self._took)}. Stop what writes there, or raise handover.max_stall"
        )

    def _busiest(self) -> list[bytes]:
        """The folders into which most was written, and those that changed most often."""
        often, most = self._folders[self._slowest], self._bytes[self._slowest]
        ordered = sorted(often, key=lambda one: (-most[one], -often[one]))[:FOLDERS_SHOWN]
        return [one for one in ordered if most[one] * LEAST_SHARE >= most[ordered[0]]]

    def _rates(self, took: Took) -> str:
        within = f" within {self._within_ms / 1000:.1f} s" if self._within_ms else ""
        words = f"files of {_size(took.brought_bytes)} changed{within}"
        words += f", and a pass brings {_size(took.rate_bytes_s)}/s of them"
        if took.limit_kib_s is not None:
            words += f" (sync.bandwidth allows {_size(took.limit_kib_s * 1024)}/s)"
        if took.files:
            name, size = max(took.files.items(), key=lambda one: one[1])
            words += f"; the largest is {shown(name)} with {_size(size)}, which is read as a whole"
        return words

    @staticmethod
    def _count(counted: Counter[bytes], folders: Mapping[bytes, int]) -> None:
        for folder, amount in folders.items():
            if folder in counted or len(counted) < MAX_FOLDERS:
                counted[folder] += amount


def _by_folder(files: Mapping[bytes, int]) -> Counter[bytes]:
    found: Counter[bytes] = Counter()
    for name, size in files.items():
        found[name.rpartition(b"/")[0] or b"."] += size
    return found


def _size(count: int) -> str:
    for unit, one in (("GB", 10**9), ("MB", 10**6)):
        if count >= one:
            return f"{count / one:.1f} {unit}"
    return f"{count / 1000:.0f} kB"

"""What a move of the service would copy, delete and put aside, and how long clients would be held.

The receiver looks at each volume by a dry run of rsync (`Fetching.look_ahead`): of the folders that
the change journal names where that vouches, else of all. Nothing is changed on either side, nothing
is decided here, and what does not come in time is said to be unknown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from nfsha.replica.clocks import Clocks
from nfsha.replica.files.beneath import shown
from nfsha.replica.passes.request import Planned
from nfsha.replica.source.listing import Listing
from nfsha.replica.volume.marks import Mark

WITHIN_S: Final = 300
"""All looks together; what is not known by then is said so. A walk of a million files takes 16 s
(docs/replication.md)."""

MAX_VOLUMES_TOLD: Final = 1000
MAX_NAMES: Final = 1000
MAX_NAMES_BYTES: Final = 128 << 10
"""Of all names that one answer carries, as they are shown."""

FIRST_NAMES: Final = 5
"""Of each volume, where not all of them are asked for."""

FREEZE_MS: Final = 200
"""What a freeze takes beside the last pass and the proof: the giver's quiet (two looks, 50 ms
apart), two writes into journals and three heartbeats that are sent at once."""

QUICK_MS: Final = 130
"""A look at a few folders, where none was measured (docs/replication.md)."""

TURNS: Final = 2
"""The last pass, and its proof: each looks at the same folders."""

LARGE_BYTES_S: Final = 1_400_000_000
"""So much of a large file that changes is read in a second, by the last pass as by the proof, where
both nodes have it in memory (docs/failback.md). From a disk it takes longer."""

Facts = dict[str, Any]

SHAPE: Final[Facts] = {
    "volumes": [
        {
            "name": str,
            "uuid": str,
            "walk": str,
            "why_full": str,
            "copy_files": int,
            "copy_bytes": int,
            "deletions": int,
            "held": str,
            "plan": str,
            "quarantine": int,
            "names": [str],
            "lacking": str,
            "note": str,
            "trouble": str,
        }
    ],
    "sum": {
        "volumes": int,
        "unknown": int,
        "copy_files": int,
        "copy_bytes": int,
        "deletions": int,
        "quarantine": int,
    },
    "stall": {
        "ms": int,
        "pass_ms": int,
        "writes_bytes_s": int,
        "rate_bytes_s": (int, None),
        "unmeasured": int,
        "large_bytes": int,
    },
    "took_ms": int,
}
"""What `as_facts` gives."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """What a pass of one volume would do now.

    `walk` is "none" where the change journal named nothing, "folders", or "full" (`why_full`: for
    what reason). `deletions` counts files.
    `held`: why the deletions would wait for an operator, with the hash of their `plan`; else "".
    `quarantine` files would be put aside; `names` are the first of them. `lacking`: what room that
    misses. `note`: what is not known. `trouble`: why nothing is known; then all else is empty.
    `large_bytes` of `copy_bytes` are in large files.
    """

    uuid: str
    walk: str = ""
    why_full: str = ""
    copy_files: int = 0
    copy_bytes: int = 0
    deletions: int = 0
    held: str = ""
    plan: str = ""
    quarantine: int = 0
    names: tuple[bytes, ...] = ()
    took_ms: int = 0
    lacking: str = ""
    note: str = ""
    trouble: str = ""
    large_bytes: int = 0


def of_volume(uuid: str, walk: str, why_full: str, planned: Planned, *, keeps: bool) -> Ahead:
    """What was found of one volume; `keeps`: what it replaces and deletes goes to quarantine."""
    return Ahead(
        uuid,
        walk=walk,
        why_full=why_full,
        copy_files=planned.copy_files,
        copy_bytes=planned.copy_bytes,
        deletions=planned.deletions,
        held=planned.held,
        plan=planned.plan.hash if planned.plan is not None else "",
        quarantine=planned.replaced + planned.deletions if keeps else 0,
        names=planned.names if keeps else (),
        lacking=planned.lacking,
        trouble=planned.trouble,
        large_bytes=planned.large_bytes,
    )


@dataclass(slots=True)
class Estimate:
    """The looks at all volumes, while they come in and afterwards."""

    total: int
    began_ms: int
    found: dict[str, Ahead] = field(default_factory=dict)
    listing_ms: int = 0
    """What it took to fetch what the source publishes of all volumes."""
    took_ms: int | None = None
    """None while it runs."""


class Estimating:
    """Makes one estimate at a time; who asks while one runs gets that one."""

    def __init__(
        self,
        listing: Callable[[], Awaitable[Listing | str]],
        look: Callable[[str, Listing, int], Awaitable[Ahead]],
        *,
        parallel: int,
        clocks: Clocks,
        watch: Callable[[asyncio.Task[None]], None],
    ) -> None:
        """`listing`: what the source publishes, or why it cannot be had.

        `look`: at the volume of this identity, within so many seconds; tells its own trouble.
        """
        self._listing = listing
        self._look = look
        self._parallel = parallel
        self._clocks = clocks
        self._watch = watch
        self._task: asyncio.Task[None] | None = None
        self._now: Estimate | None = None

    def begin(self, uuids: Iterable[str]) -> Estimate:
        """Begins to look at these volumes, or joins those who wait for what runs already."""
        if self._now is not None and self._now.took_ms is None:
            return self._now
        wanted = sorted(uuids)
        self._now = Estimate(len(wanted), self._clocks.now_ms())
        self._task = asyncio.ensure_future(self._run(self._now, wanted))
        self._watch(self._task)
        return self._now

    async def close(self) -> None:
        """Ends what runs."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self, estimate: Estimate, wanted: Sequence[str]) -> None:
        listing = await self._listing()
        estimate.listing_ms = self._clocks.now_ms() - estimate.began_ms
        if isinstance(listing, str):
            estimate.found = {uuid: Ahead(uuid, trouble=listing) for uuid in wanted}
        else:
            await self._look_at(estimate, wanted, listing)
        estimate.took_ms = self._clocks.now_ms() - estimate.began_ms

    async def _look_at(self, estimate: Estimate, wanted: Sequence[str], listing: Listing) -> None:
        lanes = asyncio.Semaphore(self._parallel)

        async def one(uuid: str) -> None:
            async with lanes:
                left_ms = estimate.began_ms + WITHIN_S * 1000 - self._clocks.now_ms()
                if left_ms < 1000:
                    found = Ahead(uuid, trouble=f"not looked at within {WITHIN_S} s")
                else:
                    found = await self._look(uuid, listing, left_ms // 1000)
                estimate.found[uuid] = found

        async with asyncio.TaskGroup() as group:
            for uuid in wanted:
                group.create_task(one(uuid))


def as_facts(
    estimate: Estimate,
    names: Callable[[str], str],
    *,
    all_names: bool,
    stall: Mapping[str, Any],
) -> Facts:
    """The estimate for an operator, within the bounds of what one answer carries."""
    by_name = sorted(estimate.found.values(), key=lambda one: names(one.uuid))
    known = [one for one in by_name if not one.trouble]
    room = _Room(None if all_names else FIRST_NAMES)
    return {
        "volumes": [
            {
                "name": names(one.uuid),
                "uuid": one.uuid,
                "walk": one.walk,
                "why_full": one.why_full,
                "copy_files": one.copy_files,
                "copy_bytes": one.copy_bytes,
                "deletions": one.deletions,
                "held": one.held,
                "plan": one.plan,
                "quarantine": one.quarantine,
                "names": room.take(one.names),
                "lacking": one.lacking,
                "note": one.note,
                "trouble": one.trouble,
            }
            for one in by_name[:MAX_VOLUMES_TOLD]
        ],
        "sum": {
            "volumes": estimate.total,
            "unknown": estimate.total - len(known),
            "copy_files": sum(one.copy_files for one in known),
            "copy_bytes": sum(one.copy_bytes for one in known),
            "deletions": sum(one.deletions for one in known),
            "quarantine": sum(one.quarantine for one in known),
        },
        "stall": dict(stall),
        "took_ms": estimate.took_ms or 0,
    }


class _Room:
    """How many names one answer still carries."""

    def __init__(self, of_each: int | None) -> None:
        self._of_each = of_each
        self._names = MAX_NAMES
        self._bytes = MAX_NAMES_BYTES

    def take(self, names: Sequence[bytes]) -> list[str]:
        taken = []
        for name in names[: self._of_each]:
            text = shown(name)
            if self._names < 1 or len(text) > self._bytes:
                break
            self._names -= 1
            self._bytes -= len(text)
            taken.append(text)
        return taken


def stall(
    estimate: Estimate,
    marks: Mapping[str, Mark],
    *,
    rate_bytes_s: int | None,
    parallel: int,
    now_ns: int,
) -> Facts:
    """How long clients would be held, and what that rests on. Pure.

    The last pass and its proof fetch one list each, and look at the folders that change while such
    a pass runs: what both take was measured just now. What clients write meanwhile crosses over at
    `rate_bytes_s`, the measured rate of a pass (None: none was measured); they are taken to write
    as they have since the last complete pass. A large file that changes is read as a whole.
    """
    looks_ms, longest_ms, unmeasured, large_bytes = 0, 0, 0, 0
    writes_bytes_s = 0.0
    for one in estimate.found.values():
        mark = marks.get(one.uuid)
        if one.walk == "none":
            continue
        look_ms = one.took_ms
        if one.walk == "folders" and mark is not None:
            written = one.copy_bytes - one.large_bytes
            writes_bytes_s += written * 1000 / max(1000, mark.age_ms(now_ns))
            large_bytes += one.large_bytes
        else:
            unmeasured += 1
            look_ms = QUICK_MS
        looks_ms += look_ms
        longest_ms = max(longest_ms, look_ms)
    pass_ms = estimate.listing_ms + max(longest_ms, looks_ms // parallel)
    cross_ms = round(writes_bytes_s * pass_ms / rate_bytes_s) if rate_bytes_s else 0
    return {
        "ms": FREEZE_MS + TURNS * (pass_ms + cross_ms + large_bytes * 1000 // LARGE_BYTES_S),
        "pass_ms": pass_ms,
        "writes_bytes_s": round(writes_bytes_s),
        "rate_bytes_s": rate_bytes_s,
        "unmeasured": unmeasured,
        "large_bytes": large_bytes,
    }

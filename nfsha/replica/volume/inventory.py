"""This node's volumes as they are now, and the other node's as it told: which belong together.

It looks at the filesystems again and again, in threads, and keeps the newest answer: a disk that
hangs hides no other volume. It writes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nfsha.core.model import Epoch
from nfsha.replica.files.own_names import IDENTITY_NAME
from nfsha.replica.volume.facts import VolumeError, VolumeFacts, differences
from nfsha.replica.volume.survey import Survey
from nfsha.replica.volume.volumes import only_volumes


@dataclass(frozen=True, slots=True)
class Pair:
    """One volume of the pair, by name and identity: here, there, or on both."""

    name: str
    uuid: str | None
    here: VolumeFacts | None
    there: VolumeFacts | None
    paired: str
    """`paired`, `unpaired-here`, `unpaired-there`, or `new` (no identity on either side)."""
    differs: tuple[str, ...]

    def obstacles(self) -> Iterator[str]:
        """Why this volume forbids to move the service: it has no copy, or one side is not sound."""
        if self.paired != "paired":
            yield f"volume {self.name} has no copy: {self._why_alone()}"
        for where, one in (("here", self.here), ("there", self.there)):
            if one is not None and (one.failing or one.read_only):
                yield f"volume {self.name} {where}: {one.failing or 'mounted read-only'}"

    def _why_alone(self) -> str:
        for where, one in (("here", self.here), ("there", self.there)):
            if one is not None and one.refused:
                return (
                    f"what is mounted {where} cannot be one: {one.refused}; unmount it, or mount "
                    "it elsewhere than below nfs.root"
                )
        for where, one in (("here", self.here), ("there", self.there)):
            if one is None:
                return f"it is not mounted {where}: mount it, and see `nfsha volumes`"
        for where, one in (("here", self.here), ("there", self.there)):
            if one is not None and one.identity is None and self.uuid is not None:
                return (
                    f"its identity {one.path}/{IDENTITY_NAME} is missing {where}: put {self.uuid} "
                    f"back, or `nfsha volumes pair {self.name}` if it is another filesystem"
                )
        return f"it is {self.paired}: see `nfsha volumes`"


class Inventory:
    """What is known of the volumes of both nodes."""

    def __init__(self, root: Path, clock_ms: Callable[[], int]) -> None:
        self._survey = Survey(root, lambda: clock_ms() / 1000)
        self._clock_ms = clock_ms
        self._turn = asyncio.Lock()
        self.here: tuple[VolumeFacts, ...] = ()
        self.there: tuple[VolumeFacts, ...] | None = None
        """None: the other node has not told yet."""
        self.told = asyncio.Event()
        """The other node has told."""
        self._index: tuple[Sequence[VolumeFacts], dict[str, VolumeFacts | None]] = ((), {})
        self._pairs: tuple[object, object, tuple[Pair, ...]] = (None, None, ())
        self.looked = asyncio.Event()
        """The filesystems here were looked at, or could not be (`trouble`)."""
        self.looked_ms: int | None = None
        self.trouble = "the volumes were not looked at yet"

    async def look(self) -> tuple[VolumeFacts, ...]:
        """Looks at the filesystems; returns the newest answer, with `trouble` when it is old."""
        async with self._turn:
            try:
                found = await self._survey.look()
            except VolumeError as error:
                self.trouble = str(error)
            else:
                self._take(found)
                self.trouble = ""
                self.looked_ms = self._clock_ms()
        self.looked.set()
        return self.here

    def hear(self, there: tuple[VolumeFacts, ...]) -> None:
        """Takes the other node's volumes, as it told them."""
        self.there = there
        self.told.set()

    def _take(self, found: Sequence[VolumeFacts]) -> None:
        """The root is there for its mount points; where it cannot be a volume it is none."""
        fit = only_volumes(found)
        self.here = tuple(one for one in fit if one.name != "." or not one.refused)

    async def look_at(self, uuid: str) -> None:
        """Looks at the one volume here that bears this identity; at all if it is not known well."""
        known = self.by_uuid(uuid)
        if known is None or known.refused:
            await self.look()
            return
        async with self._turn:
            try:
                found = await self._survey.look_again(known.path)
            except VolumeError as error:
                self.trouble = str(error)
                return
            now = (found if one.path == known.path else one for one in self.here)
            self._take([one for one in now if one is not None])

    def by_uuid(self, uuid: str) -> VolumeFacts | None:
        """The volume here that bears this identity; None also when two do (a copied disk)."""
        if self._index[0] is not self.here:
            index: dict[str, VolumeFacts | None] = {}
            for one in self.here:
                if one.identity is not None:
                    index[one.identity] = None if one.identity in index else one
            self._index = (self.here, index)
        return self._index[1].get(uuid)

    def name_of(self, uuid: str) -> str:
        """What to call a volume: its name here, or where it is not here its identity."""
        one = self.by_uuid(uuid)
        return one.name if one is not None else uuid

    def by_name(self, name: str) -> VolumeFacts | None:
        """The volume here of that name, or mounted at that path."""
        return next((one for one in self.here if name in (one.name, str(one.path))), None)

    def cloned(self) -> dict[str, list[str]]:
        """Identities that more than one volume here bears, with their names."""
        names: dict[str, list[str]] = {}
        for one in self.here:
            if one.identity is not None:
                names.setdefault(one.identity, []).append(one.name)
        return {uuid: found for uuid, found in names.items() if len(found) > 1}

    def newest_stamp(self) -> Epoch | None:
        """The highest epoch that a volume here bears."""
        stamps = [one.stamp for one in self.here if one.stamp is not None]
        return max(stamps, key=lambda stamp: stamp.number, default=None)

    def pairs(self) -> tuple[Pair, ...]:
        """All volumes of both nodes, those that belong together as one, by name."""
        if self._pairs[0] is not self.here or self._pairs[1] is not self.there:
            self._pairs = (self.here, self.there, self._paired())
        return self._pairs[2]

    def _paired(self) -> tuple[Pair, ...]:
        there = list(self.there or ())
        found = []
        for one in self.here:
            other = _counterpart(one, there)
            if other is not None:
                there.remove(other)
            found.append(_pair(one, other))
        found += [_pair(None, other) for other in there]
        return tuple(sorted(found, key=lambda pair: pair.name))


def _counterpart(one: VolumeFacts, there: list[VolumeFacts]) -> VolumeFacts | None:
    """By identity; where one side has none, by name."""
    if one.identity is not None:
        same = next((other for other in there if other.identity == one.identity), None)
        if same is not None:
            return same
    named = next((other for other in there if other.name == one.name), None)
    if named is None or (one.identity is not None and named.identity is not None):
        return None
    return named


def _pair(here: VolumeFacts | None, there: VolumeFacts | None) -> Pair:
    one = here or there
    if one is None:
        raise ValueError("a pair of nothing")
    differs = differences(here, there) if here is not None and there is not None else ()
    identities = {side.identity for side in (here, there) if side is not None}
    uuid = next((identity for identity in identities if identity is not None), None)
    if here is not None and there is not None and identities == {uuid} and uuid is not None:
        paired = "paired"
    elif uuid is None:
        paired = "new"
    elif here is None or here.identity is None:
        paired = "unpaired-there"
    else:
        paired = "unpaired-here"
    return Pair(one.name, uuid, here, there, paired, differs)

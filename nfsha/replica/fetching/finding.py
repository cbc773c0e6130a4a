"""Both sides of a volume, found for a pass: what the source published, and what is mounted here.

It fetches from the source's control module, and opens the root here. It changes no volume.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from nfsha.core.model import Epoch
from nfsha.replica.fetching.control import fetch_control
from nfsha.replica.fetching.desk import Desk
from nfsha.replica.fetching.guards import RefusedError, guard, guard_against_a_clone
from nfsha.replica.journal.published import Published
from nfsha.replica.rsync.child import ChildError
from nfsha.replica.rsync.exits import Verdict
from nfsha.replica.source.facts import SourceFacts
from nfsha.replica.source.listing import Listing, names_in, read_listing
from nfsha.replica.volume import volumes
from nfsha.replica.volume.dense import dense_name
from nfsha.replica.volume.facts import VolumeFacts

_FRESH_AGAIN = 2


@dataclass(frozen=True, slots=True)
class Found:
    """Both sides of one volume as a pass found them, with all guards passed."""

    epoch: Epoch
    here: VolumeFacts
    root_fd: int
    facts: SourceFacts
    changes: Published | None
    scratch: Path

    @property
    def growth_bytes(self) -> int:
        """So much will a first copy grow: an empty filesystem has something in use, or reserved."""
        there = self.facts.used_bytes(self.here.identity or "")
        return max(0, there - self.here.used_bytes) if self.here.empty else there


class Finding:
    """Finds volumes for passes and looks; all raise RefusedError and `TROUBLES`."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    @asynccontextmanager
    async def open(
        self, uuid: str, epoch: Epoch, scratch: Path, listing: Listing | None = None
    ) -> AsyncIterator[Found]:
        """Both sides of a volume, past all guards, its root open here; nothing is changed yet.

        By a listing, or by what the source publishes now.
        """
        await asyncio.to_thread(fresh_folder, scratch)
        listing = listing or self._desk.listed or await self._listing([uuid], epoch, scratch)
        facts, changes = listing.facts, listing.changes.get(uuid)
        await self._desk.inventory.look_at(uuid)
        here = guard(uuid, epoch, self._desk.inventory.by_uuid(uuid), facts)
        if here.stamp is not None and here.identity is not None:
            guard_against_a_clone(here, facts, await asyncio.to_thread(volumes.written_at_ns, here))
        root_fd = await asyncio.to_thread(volumes.open_root, here)
        try:
            yield Found(epoch, here, root_fd, facts, changes, scratch)
        finally:
            self._desk.under_way.close_unused(root_fd)

    async def published(
        self, uuid: str, epoch: Epoch, scratch: Path
    ) -> tuple[SourceFacts, Published | None]:
        """What the source publishes of one volume now, or published for all of them at once."""
        listing = self._desk.listed or await self._listing([uuid], epoch, scratch)
        return listing.facts, listing.changes.get(uuid)

    async def list_all(self, epoch: Epoch, folder: str = "listing") -> Listing:
        """What the source publishes of all volumes now. Raises RefusedError and `TROUBLES`."""
        listing = await self._list_once(epoch, folder)
        for _ in range(_FRESH_AGAIN):
            if listing.is_fresh:
                break
            # It was fetched while it was being published, or one of the volumes is slow.
            listing = await self._list_once(epoch, folder)
        return listing

    async def _list_once(self, epoch: Epoch, folder: str) -> Listing:
        scratch = self._desk.scratch / folder
        await asyncio.to_thread(fresh_folder, scratch)
        return await self._listing(sorted(self._desk.copies), epoch, scratch)

    async def _listing(self, uuids: Sequence[str], epoch: Epoch, scratch: Path) -> Listing:
        names = [*names_in(uuids), *(dense_name(uuid) for uuid in uuids)]
        ending = await fetch_control(self._desk.source(epoch), scratch, names)
        if ending.verdict is Verdict.REFUSED:
            raise RefusedError(f"the source's facts cannot be had: {ending.reason}")
        if ending.verdict is not Verdict.COMPLETE:
            raise ChildError(f"the source's facts cannot be had: {ending.reason}")
        return await asyncio.to_thread(read_listing, scratch, uuids)

    async def answer(self, epoch: Epoch, scratch: Path, name: str) -> Path | None:
        """What the source published under this name; None: nothing."""
        ending = await fetch_control(self._desk.source(epoch), scratch, [name])
        path = scratch / name
        return path if ending.verdict is Verdict.COMPLETE and path.exists() else None


def fresh_folder(path: Path) -> None:
    """An empty folder in this place. It blocks; OSError."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True, mode=0o700)

"""Looks at copies that change nothing: what a pass would do, and whether a copy is all there.

For a move of the service: its plan, and the proof of its last pass.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from nfsha.core.model import Epoch
from nfsha.replica.content import unreplicated
from nfsha.replica.fetching import estimate
from nfsha.replica.fetching.copying import Copy
from nfsha.replica.fetching.desk import Desk
from nfsha.replica.fetching.estimate import Ahead
from nfsha.replica.fetching.finding import Finding, Found, fresh_folder
from nfsha.replica.fetching.guards import TROUBLES, RefusedError, guard
from nfsha.replica.fetching.passing import UNLIMITED, Passing
from nfsha.replica.fetching.schedule import Cause, Reason
from nfsha.replica.files.beneath import shown
from nfsha.replica.passes.pull import Pull
from nfsha.replica.passes.request import PassRequest
from nfsha.replica.rsync.child import Priority
from nfsha.replica.rsync.deletions import DeleteLimits
from nfsha.replica.source.listing import Listing
from nfsha.replica.volume import volumes
from nfsha.replica.volume.facts import VolumeFacts
from nfsha.replica.volume.writable import Writable


class Proving:
    """Says in words what is not as it should be."""

    def __init__(self, desk: Desk, finding: Finding, passing: Passing) -> None:
        self._desk = desk
        self._finding = finding
        self._passing = passing
        self._writable = Writable(lambda: desk.clocks.now_ms() / 1000)

    async def list_ahead(self) -> Listing | str:
        """What `look_ahead` goes by, of all volumes; or why it cannot be had."""
        if self._desk.epoch is None:
            return "nothing is copied to this node now"
        try:
            return await self._finding.list_all(
                self._desk.epoch, "listing-ahead"
            )  # a handover may begin
        except (RefusedError, *TROUBLES) as error:
            return str(error)

    async def look_ahead(self, uuid: str, listing: Listing, longest_s: int) -> Ahead:
        """What a pass of this volume would do now. Changes nothing; tells its own trouble."""
        epoch = self._desk.epoch
        if epoch is None:
            return Ahead(uuid, trouble="nothing is copied to this node any more")
        scratch, began_ms = self._desk.scratch / f"{uuid}-ahead", self._desk.clocks.now_ms()
        try:
            async with self._finding.open(uuid, epoch, scratch, listing) as found:
                ahead = await self._looked(self._desk.copy_of(uuid), found, longest_s)
        except (RefusedError, *TROUBLES) as error:
            return Ahead(uuid, trouble=str(error))
        return replace(ahead, took_ms=self._desk.clocks.now_ms() - began_ms)

    async def _looked(self, copy: Copy, found: Found, longest_s: int) -> Ahead:
        began_ms, resync = self._desk.clocks.now_ms(), self._passing.is_resync(copy.uuid, found)
        keeps = resync and not found.here.empty
        folders, why_full = self._passing.choose(copy, Reason(Cause.COMMAND), found, resync=resync)
        request = replace(
            self._passing.request(copy, found, None), folders=folders, longest_s=longest_s
        )
        if keeps:  # what it deletes goes to quarantine, which needs room
            limits = replace(request.limits, files=UNLIMITED)
            request = replace(request, limits=limits, resync_backup="the quarantine")
        pull = Pull(request, found.scratch, self._desk.clocks.now_ms)
        with self._desk.under_way.noted(copy.uuid, pull):
            planned = await pull.look()
        walk = "full" if folders is None else "folders" if folders else "none"
        ahead = estimate.of_volume(copy.uuid, walk, why_full, planned, keeps=keeps)
        left_s = longest_s - (self._desk.clocks.now_ms() - began_ms) // 1000
        return await self._with_alike(ahead, found, max(1, left_s)) if keeps else ahead

    async def _with_alike(self, ahead: Ahead, found: Found, longest_s: int) -> Ahead:
        """With what a resync puts aside although a walk takes it for equal."""
        told = self._desk.store.peer.get(ahead.uuid)
        from_ns = unreplicated.since_ns(found.here.stamp, found.epoch, told)
        if from_ns is None or ahead.trouble:
            return ahead
        with self._desk.under_way.noted(
            ahead.uuid, self._passing.comparison(ahead.uuid, found)
        ) as verify:
            try:
                async with asyncio.timeout(longest_s):
                    alike, note = await unreplicated.look_ahead(verify, found.root_fd, from_ns)
            except TimeoutError:
                alike, note = (), f"contents were not compared within {longest_s} s"
        return replace(
            ahead,
            copy_files=ahead.copy_files + len(alike),
            quarantine=ahead.quarantine + len(alike),
            names=(*ahead.names, *alike),
            note=note,
        )

    def lacking(self) -> str:
        """Why this node could not have all that the source has; "" when each volume has its copy.

        A daemon that has just started knows of no volume yet: that is not to have them all.
        """
        if self._desk.inventory.there is None:
            return "the other node has not told its volumes yet"
        pairs = self._desk.inventory.pairs()
        bad = [sentence for pair in pairs for sentence in pair.obstacles()]
        bad += [
            f"volume {pair.name} is not looked after yet"
            for pair in pairs
            if not bad and pair.uuid not in self._desk.copies
        ]
        return "; ".join(bad) or ("" if pairs else "there is no volume to copy")

    async def unwritable(self, uuids: Iterable[str], *, durable: bool) -> str:
        """Says which of these volumes take no write now, and why; "" when all do.

        `durable`: none that comes to the disk. One that is not mounted here is not asked: other
        guards tell of it.
        """
        by_uuid = self._desk.inventory.by_uuid
        here = [one for uuid in tuple(uuids) if (one := by_uuid(uuid)) is not None]
        return await self._writable.lacking(here, durable=durable)

    async def look_for_hangs(self, uuids: Iterable[str]) -> None:
        """Asks these volumes; what hangs `hung` tells from then on."""
        await self.unwritable(uuids, durable=False)

    def hung(self) -> dict[str, str]:
        """The volumes, by name, that a write was seen to hang in, and still does."""
        return self._writable.hung()

    async def vouch(self, uuid: str, epoch: Epoch, listing: Listing) -> str:
        """Says why a copy is not known to be all that the source has, or "".

        The guards of a pass hold, and the source's journal knows of no change since its last one.
        """
        await self._desk.inventory.look_at(uuid)
        mark = self._desk.store.own.get(uuid)
        if mark is None or mark.epoch != epoch:
            return "it is not a whole replica"
        try:
            guard(uuid, epoch, self._desk.inventory.by_uuid(uuid), listing.facts)
        except RefusedError as error:
            return str(error)
        late, why = listing.since(mark)
        if late is None:
            return why
        return f"{shown(late[0])} changed after the freeze" if late else ""

    async def compare(self, uuid: str, epoch: Epoch, folders: tuple[bytes, ...]) -> str:
        """Says what a dry pass over these folders, by content, finds different; "" for nothing."""
        here = self._desk.inventory.by_uuid(uuid)
        if here is None:
            return "it is not mounted here any more"
        scratch = self._desk.scratch / f"{uuid}-proof"
        try:
            await asyncio.to_thread(fresh_folder, scratch)
            return await self._compare(here, epoch, folders, scratch)
        except TROUBLES as error:
            return str(error)

    async def _compare(
        self, here: VolumeFacts, epoch: Epoch, folders: tuple[bytes, ...], scratch: Path
    ) -> str:
        root_fd = await asyncio.to_thread(volumes.open_root, here)
        try:
            request = PassRequest(
                uuid=here.identity or "",
                root_fd=root_fd,
                source=self._desk.source(epoch),
                folders=folders,
                limits=DeleteLimits(0, 0, 0, None, target_empty=False),
                timeout_s=self._desk.sync.timeout_s,
                connect_timeout_s=self._desk.sync.connect_timeout_s,
                checksum=True,
                name=f"volume {here.name}",
                priority=Priority.NORMAL,
            )
            return await self._looked_equal(here, request, scratch)
        finally:
            os.close(root_fd)

    async def _looked_equal(self, here: VolumeFacts, request: PassRequest, scratch: Path) -> str:
        pull = Pull(request, scratch, self._desk.clocks.now_ms)
        with self._desk.under_way.noted(request.uuid, pull):
            found = await pull.look()
        if found.trouble or not found.differ:
            return found.trouble
        more = f", and {found.differ - 1} more" if found.differ > 1 else ""
        return f"{here.path}/{shown(found.first)} differs from the source's{more}"

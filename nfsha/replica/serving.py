"""The active node's side: its volumes bear the epoch's stamp, are offered, and their changes noted.

It runs while this node serves, and is gone before authority leaves. It never fetches anything, and
writes nothing into a volume but its identity and its stamp.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import uuid as uuids
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nfsha.core.model import Epoch
from nfsha.replica import volumes
from nfsha.replica.changes import ChangeJournal
from nfsha.replica.child import ChildStuckError
from nfsha.replica.clocks import Clocks
from nfsha.replica.durable import write_durably
from nfsha.replica.inventory import Inventory
from nfsha.replica.published import ChangesError
from nfsha.replica.source import EpochToken, Source, SourceVolume
from nfsha.replica.volume_facts import VolumeError, VolumeFacts, as_json

log = logging.getLogger(__name__)

FACTS_NAME = "facts.json"
PUBLISH_EVERY_S = 1.0
"""How old the published lists of changes are at most, and with them a sync mark's start."""


def changes_name(uuid: str) -> str:
    """The file of one volume's changed folders in the control module."""
    return f"changes-{uuid}"


class Serving:
    """Offers this node's volumes while it serves."""

    def __init__(
        self,
        inventory: Inventory,
        source: Source,
        notes: Path,
        *,
        token: Callable[[Epoch], EpochToken],
        clocks: Clocks,
        max_changed_folders: int,
        changed: Callable[[], None],
    ) -> None:
        """`notes`: the durable folder of the change journals. `changed`: a volume was marked."""
        self._inventory = inventory
        self.source = source
        self._notes = notes
        self._token = token
        self._clocks = clocks
        self._max_changed_folders = max_changed_folders
        self._changed = changed
        self.journals: dict[str, ChangeJournal] = {}
        self.epoch: Epoch | None = None
        self.troubles: dict[str, str] = {}
        """What keeps a volume from being offered, by its name."""
        self._offered: dict[str, VolumeFacts] = {}
        self._unwatched: set[str] = set()

    async def run(self, epoch: Epoch) -> None:
        """Offers the volumes of this epoch until it is cancelled; then all of it is gone."""
        self.epoch = epoch
        self._unwatched.clear()
        try:
            while True:
                await self._inventory.look()
                await self._offer(epoch)
                for _ in range(5):
                    await self._publish(epoch)
                    await asyncio.sleep(PUBLISH_EVERY_S)
        finally:
            await self._end()

    async def _end(self) -> None:
        self.epoch = None
        try:
            await self.source.stop()
        except ChildStuckError as error:
            log.error("the source's rsync daemon cannot be ended: %s", error)
        for journal in self.journals.values():
            journal.close()
        self.journals.clear()
        self._offered.clear()
        self.troubles.clear()

    # ------------------------------------------------------------- what is offered

    async def _offer(self, epoch: Epoch) -> None:
        fit: dict[str, VolumeFacts] = {}
        troubles: dict[str, str] = {}
        marked = False
        cloned = self._inventory.cloned()
        for one in self._inventory.here:
            if one.refused and one.name == ".":
                continue  # the root is there for its mount points
            if one.identity in cloned:
                names = ", ".join(cloned[one.identity])
                troubles[one.name] = f"{names} bear one identity: a disk was copied block by block"
                continue
            try:
                ready = await asyncio.to_thread(_own, one, epoch)
            except (VolumeError, OSError) as error:
                troubles[one.name] = str(error)
                continue
            if ready.identity is not None:
                fit[ready.identity] = ready
                marked = marked or ready != one
        for name in troubles.keys() - self.troubles.keys():
            log.warning("volume %s is not offered: %s", name, troubles[name])
        self.troubles = troubles
        if marked:
            await self._inventory.look()
            self._changed()
        await self._watch(fit)
        self._offered = fit
        offered = [SourceVolume(uuid, one.path) for uuid, one in sorted(fit.items())]
        try:
            await self.source.serve(self._token(epoch), offered)
        except ChildStuckError as error:
            log.error("the data is not offered: %s", error)
        for uuid, why in self.source.refused.items():
            self.troubles[fit[uuid].name] = why

    async def _watch(self, fit: Mapping[str, VolumeFacts]) -> None:
        for uuid in self.journals.keys() - fit.keys():
            self.journals.pop(uuid).close()
        for uuid, one in fit.items():
            known = self.journals.get(uuid)
            if known is not None and not known.ended:
                continue
            if known is not None:
                log.warning("volume %s: the change journal ended: %s", one.name, known.ended)
                self.journals.pop(uuid).close()
            await self._begin_journal(uuid, one)

    async def _begin_journal(self, uuid: str, one: VolumeFacts) -> None:
        try:
            root_fd = await asyncio.to_thread(volumes.open_root, one)
        except (VolumeError, OSError) as error:
            log.warning("volume %s: no change journal: %s", one.name, error)
            return
        try:
            journal = ChangeJournal(
                one.path,
                root_fd,
                uuid,
                self._notes,
                self._clocks.now_ms,
                self._clocks.wall_ns,
                max_folders=self._max_changed_folders,
            )
            await asyncio.to_thread(journal.start)
        except ChangesError as error:
            if uuid not in self._unwatched:
                self._unwatched.add(uuid)
                log.warning("volume %s: each pass is a full walk: %s", one.name, error)
        else:
            self.journals[uuid] = journal
        finally:
            os.close(root_fd)

    # ------------------------------------------------------------- what is published

    async def _publish(self, epoch: Epoch) -> None:
        as_of_ns = self._clocks.wall_ns()
        public = self.source.public
        for uuid, journal in tuple(self.journals.items()):
            try:
                await asyncio.to_thread(journal.publish, public / changes_name(uuid))
            except ChangesError as error:
                log.warning("the changes of volume %s are not published: %s", uuid, error)
        for uuid in _published(public) - self.journals.keys():
            with contextlib.suppress(FileNotFoundError):
                (public / changes_name(uuid)).unlink()
        facts = {
            "nfsha_facts": 1,
            "epoch": {"number": epoch.number, "id": epoch.id, "authority": str(epoch.authority)},
            "as_of_ns": as_of_ns,
            "volumes": [as_json(one) for one in self._offered.values()],
        }
        data = json.dumps(facts, sort_keys=True).encode()
        try:
            await asyncio.to_thread(write_durably, public / FACTS_NAME, data)
        except OSError as error:
            log.warning("the facts for the other node cannot be written: %s", error)

    def acknowledge(self, applied: Mapping[str, tuple[str, int]]) -> None:
        """The other node has applied so much of each volume's journal: (journal id, sequence)."""
        for uuid, (journal_id, seq) in applied.items():
            journal = self.journals.get(uuid)
            if journal is not None:
                journal.acknowledge(journal_id, seq)

    def facts(self) -> dict[str, Any]:
        """For an operator."""
        return {"running": self.source.running, "trouble": self.source.trouble or None}


def _own(one: VolumeFacts, epoch: Epoch) -> VolumeFacts:
    """Gives a volume of the authority its identity and stamp. It blocks.

    Raises VolumeError for one that cannot be the truth of this epoch.
    """
    if one.failing:
        raise VolumeError(f"{one.path}: {one.failing}")
    if one.stamp is not None and one.stamp != epoch and one.stamp.number >= epoch.number:
        raise VolumeError(
            f"{one.path} bears the stamp of epoch {one.stamp}, but this node serves epoch {epoch}: "
            "its data belongs to another history. Mount the right volume there"
        )
    if one.identity is None:
        one = volumes.write_identity(one, str(uuids.uuid4()), pair=True)
    if one.stamp != epoch:
        volumes.write_stamp(one, epoch)
    return replace(one, stamp=epoch)


def _published(public: Path) -> set[str]:
    prefix = changes_name("")
    if not public.is_dir():
        return set()
    names = [one.name for one in public.iterdir()]
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}

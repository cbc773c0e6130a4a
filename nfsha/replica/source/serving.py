"""The active node's side: its volumes bear the epoch's stamp, are offered, and their changes noted.

It runs while this node serves, and is gone before authority leaves. It never fetches anything, and
writes nothing into a volume but its identity and its stamp.

What is published is published anew before each fetch, or it is said that it is still true; so a
pass that begins after a write knows of it. In between only the kernel's queues of changes are
emptied, and the notes for a restart written.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import uuid as uuids
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nfsha.core.model import Epoch
from nfsha.replica.clocks import Clocks
from nfsha.replica.files.durable import names_after, write_durably
from nfsha.replica.journal.changes import COLLECT_EVERY_MS, ChangeJournal
from nfsha.replica.journal.published import ChangesError
from nfsha.replica.rsync.child import ChildStuckError
from nfsha.replica.source.dense_lists import DenseLists
from nfsha.replica.source.fresh import FRESH_WITHIN_S, Coalesced, NotFreshError
from nfsha.replica.source.source import EpochToken, Source, SourceVolume
from nfsha.replica.volume import volumes
from nfsha.replica.volume.aside import Aside, HangsError
from nfsha.replica.volume.beginning import follow_clock
from nfsha.replica.volume.facts import (
    VolumeError,
    VolumeFacts,
    as_json,
    epoch_as_json,
    is_of_another_history,
)
from nfsha.replica.volume.inventory import Inventory

log = logging.getLogger(__name__)

FACTS_NAME = "facts.json"
LOOK_EVERY_MS = 5000
"""How often to look at the volumes, and to write the notes of what changed."""

QUIET_S = 0.05
"""So long without a write event, after all is on the disk, is rest."""

LISTS_WITHIN_S = FRESH_WITHIN_S / 3  # a fetch may have to wait for two of them
"""A list of changes that takes longer (a search after a huge move, a disk that hangs) is left as it
is, for the other volumes' sake. It says itself how old it is (`as_of_ns`), and a mark goes by that.
"""


SIZES_WITHIN_S = 1.0
OWN_WITHIN_S = 2.0
"""So long the identity and the stamp of a volume may take: two small files, mostly only read."""

REST_WITHIN_S = 4.5
"""Shorter than the decisions wait for the rest (`freeze_limit_ms`): so that it is said what hangs.
"""


def changes_name(uuid: str) -> str:
    """The file of one volume's changed folders in the control module."""
    return f"changes-{uuid}"


_Owned = tuple[VolumeFacts, VolumeFacts, tuple[int, int]]


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
        self._drains: dict[str, Coalesced] = {}
        self._lists: dict[str, Coalesced] = {}
        self.fresh = Coalesced(self._publish)
        """Publishes anew: what changed before it is called is in. Raises NotFreshError."""
        source.fresh = self.fresh
        self._aside = Aside(lambda: clocks.now_ms() / 1000)
        self._dense = DenseLists(source.public, clocks.now_ms)
        self.epoch: Epoch | None = None
        self.leaving = False
        """This node is about to stop for good: the other one is told with what it fetches."""
        self.troubles: dict[str, str] = {}
        """What keeps a volume from being offered, by its name."""
        self._offered: dict[str, VolumeFacts] = {}
        self._written_ns: dict[str, tuple[int, int]] = {}
        self._unwatched: set[str] = set()
        self._said = ""

    async def run(self, epoch: Epoch) -> None:
        """Offers the volumes of this epoch until it is cancelled; then all of it is gone."""
        self.epoch = epoch
        self._unwatched.clear()
        try:
            while True:
                await self._inventory.look()
                await self._offer(epoch)
                await self._publish_at_times()
                await self._collect_until(self._clocks.now_ms() + LOOK_EVERY_MS)
        finally:
            await self._end()

    async def _end(self) -> None:
        self.epoch = None
        for end in (self.source.stop, self._dense.end):
            try:
                await end()
            except ChildStuckError as error:
                log.error("what reads for the other node cannot be ended: %s", error)
        for uuid in tuple(self.journals):
            self._end_journal(uuid)
        self._offered.clear()
        self.troubles.clear()

    # ------------------------------------------------------------- what is offered

    async def _offer(self, epoch: Epoch) -> None:
        fit: dict[str, VolumeFacts] = {}
        marked = False
        owned, troubles = await self._owned(epoch)
        for one, ready, written_ns in owned:
            if ready.identity is not None:
                fit[ready.identity] = ready
                self._written_ns[ready.identity] = written_ns
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

    async def _owned(self, epoch: Epoch) -> tuple[list[_Owned], dict[str, str]]:
        """Each volume that is the truth: as it was, as it is, and when its own files were written.

        And what keeps the others from it. One that hangs holds up none of the others.
        """
        cloned = self._inventory.cloned()
        troubles: dict[str, str] = {}
        owned: list[_Owned] = []
        now_ns = self._clocks.wall_ns()

        async def own(one: VolumeFacts) -> None:
            try:
                found = await self._aside.run(
                    one.name, lambda: _own(one, epoch, now_ns), within_s=OWN_WITHIN_S
                )
            except HangsError as error:
                troubles[one.name] = f"{one.path}: what nfsha writes there hangs: {error}"
            except (VolumeError, OSError) as error:
                troubles[one.name] = str(error)
            else:
                owned.append((one, *found))

        alone = []
        for one in self._inventory.here:
            if one.identity in cloned:
                names = ", ".join(cloned[one.identity])
                troubles[one.name] = f"{names} bear one identity: a disk was copied block by block"
            else:
                alone.append(one)
        await asyncio.gather(*(own(one) for one in alone))
        return owned, troubles

    async def _watch(self, fit: Mapping[str, VolumeFacts]) -> None:
        for uuid in self.journals.keys() - fit.keys():
            self._end_journal(uuid)
        for uuid, one in fit.items():
            known = self.journals.get(uuid)
            if known is not None and not known.ended:
                continue
            if known is not None:
                log.warning("volume %s: the change journal ended: %s", one.name, known.ended)
                self._end_journal(uuid)
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
            path = self.source.public / changes_name(uuid)
            self.journals[uuid] = journal
            self._drains[uuid] = _threaded(journal.collect)
            self._lists[uuid] = _threaded(journal.publish, path)
        finally:
            os.close(root_fd)

    def _end_journal(self, uuid: str) -> None:
        del self._drains[uuid], self._lists[uuid]
        self.journals.pop(uuid).close()

    async def _collect_until(self, end_ms: int) -> None:
        """Empties the kernel's queues before they are full, each journal as often as it asks."""
        while (rest_ms := end_ms - self._clocks.now_ms()) > 0:
            again_ms = (one.collect_again_in_ms for one in self.journals.values())
            await asyncio.sleep(min(rest_ms, COLLECT_EVERY_MS, *again_ms) / 1000)
            busy = await asyncio.to_thread(_busy, tuple(self.journals.items()))
            drains = [self._drains[uuid] for uuid in busy if uuid in self._drains]
            await _all_within(drains, COLLECT_EVERY_MS / 1000)

    # ------------------------------------------------------------- what is published

    async def _publish_at_times(self) -> None:
        """Also without a fetch: for the journals' notes, and to say it when it does not work."""
        try:
            await self.fresh()
        except NotFreshError as error:
            if str(error) != self._said:
                log.warning("%s", error)
            self._said = str(error)
        else:
            self._said = ""

    async def _publish(self) -> None:
        epoch, public = self.epoch, self.source.public
        if epoch is None:
            raise NotFreshError("this node does not serve any more")
        as_of_ns = self._clocks.wall_ns()
        still_ns = await asyncio.to_thread(_still_ns, public, tuple(self.journals.items()))
        lists = [publish for uuid, publish in self._lists.items() if uuid not in still_ns]
        for error in await _all_within(lists, LISTS_WITHIN_S):
            raise NotFreshError(f"the changes are not published: {error}") from error
        first = self._not_copied_yet(epoch)
        await self._look_at(first)
        facts = {
            "nfsha_facts": 1,
            "epoch": epoch_as_json(epoch),
            "as_of_ns": as_of_ns,
            "volumes": [as_json(one) for one in self._offered.values()],
            "written_ns": {uuid: self._written_ns[uuid] for uuid in self._offered},
            "still_ns": still_ns,
            "leaving": self.leaving,
        }
        data = json.dumps(facts, sort_keys=True).encode()
        try:
            for uuid in names_after(public, changes_name("")) - self.journals.keys():
                (public / changes_name(uuid)).unlink(missing_ok=True)
            await self._dense.publish(first)
            await asyncio.to_thread(write_durably, public / FACTS_NAME, data)
        except OSError as error:
            raise NotFreshError(f"cannot write into {public}: {error.strerror}") from error

    def _not_copied_yet(self, epoch: Epoch) -> dict[str, VolumeFacts]:
        """What is offered, and has an empty filesystem waiting for it on the other node."""
        waiting = {
            pair.uuid
            for pair in self._inventory.pairs()
            if pair.there is not None and pair.there.empty and pair.there.stamp != epoch
        }
        return {uuid: one for uuid, one in self._offered.items() if uuid in waiting}

    async def _look_at(self, uuids: Iterable[str]) -> None:
        """How much they hold now: a first copy goes by it to tell how far it is.

        A disk that hangs holds up nobody else.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SIZES_WITHIN_S):
                for uuid in uuids:
                    await self._inventory.look_at(uuid)
                    now, known = self._inventory.by_uuid(uuid), self._offered.get(uuid)
                    if now is not None and known is not None:
                        self._offered[uuid] = replace(
                            known, free_bytes=now.free_bytes, free_inodes=now.free_inodes
                        )

    async def come_to_rest(self) -> str:
        """Puts all on the disk, and waits until nothing writes. Returns why it cannot, or "".

        Who waits sets the limit. Nothing may be on its way any more: a request that was taken
        before the ports were closed is answered, and its write seen by the change journals.
        """
        if unwatched := self.unwatched():
            return f"no change journal vouches for volume {', '.join(unwatched)}"
        busy: dict[str, str] = {}
        seen = -1
        try:
            async with asyncio.timeout(REST_WITHIN_S):
                while (now := await self._settled(busy)) != seen:
                    seen = now
                    await asyncio.sleep(QUIET_S)
        except TimeoutError:
            late = "; ".join(f"volume {name}: {what}" for name, what in sorted(busy.items()))
            told = late or "something goes on writing"
            return f"no rest within {REST_WITHIN_S:g} s: {told}"
        except (VolumeError, OSError) as error:
            return str(error)
        return ""

    async def _settled(self, busy: dict[str, str]) -> int:
        """Puts all on the disk, and takes what waits in the kernel's queues of changes.

        Returns how many changes there were until now. `busy`: what each volume is waited for.
        """

        async def settle(one: VolumeFacts, drain: Coalesced | None) -> None:
            busy[one.name] = "what was written does not come to its disk"
            await asyncio.to_thread(volumes.sync, one)
            if drain is not None:
                busy[one.name] = "its change journal does not answer"
                await drain()
            del busy[one.name]

        offered = self._offered.items()
        await asyncio.gather(*(settle(one, self._drains.get(uuid)) for uuid, one in offered))
        return sum(one.counters.events for one in self.journals.values())

    def unwatched(self) -> list[str]:
        """The volumes that are offered without a change journal: none of them could be proved."""
        missing = self._offered.keys() - self.journals.keys()
        return sorted(self._offered[uuid].name for uuid in missing)

    def acknowledge(self, applied: Mapping[str, tuple[str, int]]) -> None:
        """The other node has applied so much of each volume's journal: (journal id, sequence)."""
        for uuid, (journal_id, seq) in applied.items():
            journal = self.journals.get(uuid)
            if journal is not None:
                journal.acknowledge(journal_id, seq)

    def facts(self) -> dict[str, Any]:
        """For an operator."""
        return {"running": self.source.running, "trouble": self.source.trouble or None}


def _own(one: VolumeFacts, epoch: Epoch, now_ns: int) -> tuple[VolumeFacts, tuple[int, int]]:
    """Gives a volume of the authority its identity and stamp. It blocks.

    Returns its facts, and the ctimes of its identity and stamp: no other filesystem has both, be
    it equal in all else. Raises VolumeError for one that cannot be the truth of this epoch.
    """
    if one.failing:
        raise VolumeError(f"{one.path}: {one.failing}")
    if is_of_another_history(one.stamp, epoch):
        raise VolumeError(
            f"{one.path} bears the stamp of epoch {one.stamp}, but this node serves epoch {epoch}: "
            "its data belongs to another history. Mount the right volume there"
        )
    if one.identity is None:
        one = volumes.write_identity(one, str(uuids.uuid4()), pair=True)
    if one.stamp != epoch:
        volumes.write_stamp(one, epoch)
    else:
        follow_clock(one, now_ns)
    return replace(one, stamp=epoch), volumes.written_at_ns(one)


def _busy(journals: Iterable[tuple[str, ChangeJournal]]) -> list[str]:
    return [uuid for uuid, journal in journals if not journal.at_rest()]


def _still_ns(public: Path, journals: Iterable[tuple[str, ChangeJournal]]) -> dict[str, int]:
    """Which lists need not be published anew, and up to when each is all that changed.

    Most of many volumes are at rest, and publishing costs a thread's turn and a file for each.
    """
    found = {}
    for uuid, journal in journals:
        still_ns = journal.still_true_ns()
        if still_ns is not None and (public / changes_name(uuid)).exists():
            found[uuid] = still_ns
    return found


def _threaded(call: Callable[..., object], *args: object) -> Coalesced:
    return Coalesced(lambda: asyncio.to_thread(call, *args))


async def _all_within(
    calls: Iterable[Callable[[], Awaitable[None]]], within_s: float
) -> list[ChangesError]:
    """Waits for all calls, or so long; returns what the journals refused."""
    tasks = [asyncio.ensure_future(call()) for call in calls]
    if not tasks:
        return []
    try:
        done, _ = await asyncio.wait(tasks, timeout=within_s)
    finally:
        for task in tasks:
            task.cancel()
    failures = []
    for task in done:
        try:
            task.result()
        except ChangesError as error:
            failures.append(error)
    return failures

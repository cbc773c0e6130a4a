"""The passive node's side: passes that bring each volume's copy up to date, with every guard.

One pass of one volume: look at the volume here; fetch what the source published; refuse what is not
the same volume, or not older data; then rsync, of the changed folders where the change journal
vouches, else of all. The mark, then the stamp, come last. Who may run at all is not decided here
(`nfsha.core.replication`): `begin` and `end` tell.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from nfsha.config import Sync
from nfsha.core.model import Epoch
from nfsha.replica import estimate, unreplicated, volumes
from nfsha.replica.arguments import From
from nfsha.replica.beneath import shown
from nfsha.replica.changed_files import ChangedQuestion
from nfsha.replica.child import ChildError, ChildStuckError, Priority
from nfsha.replica.clocks import Clocks
from nfsha.replica.control import fetch_control
from nfsha.replica.copying import Copy, State
from nfsha.replica.deletions import DeleteLimits
from nfsha.replica.dense import NOTHING_DENSE, DenseError, DenseFiles, dense_name, read_dense
from nfsha.replica.estimate import Ahead
from nfsha.replica.exits import Verdict
from nfsha.replica.inventory import Inventory
from nfsha.replica.listing import Listing, names_in, read_listing
from nfsha.replica.marks import EVERYTHING, Mark, MarksError, MarkStore
from nfsha.replica.passes import PassOutcome, PassRequest
from nfsha.replica.published import ChangesError, Published
from nfsha.replica.pull import Pull
from nfsha.replica.quarantine import Entry, Quarantine, QuarantineError
from nfsha.replica.questions import Asking
from nfsha.replica.schedule import Cause, Kind, Plan, Reason, Schedule
from nfsha.replica.source_facts import SourceFacts
from nfsha.replica.suspects import SuspectAnswer, SuspectQuestion
from nfsha.replica.tally import Tally
from nfsha.replica.verify import Helpers, Verify, VerifyOutcome, VerifyRequest
from nfsha.replica.volume_facts import (
    VolumeError,
    VolumeFacts,
    is_of_another_history,
)

log = logging.getLogger(__name__)

_T = TypeVar("_T")

END_WITHIN_S = 5.0
"""So long may what was killed take to be gone, a process or a thread that writes: then it is stuck,
in a dead disk."""

MAX_ATTEMPTS_COUNTED = 10
MEASURED_BYTES = 1 << 20
"""A pass that copied less says nothing of the rate."""
UNLIMITED = (1 << 31) - 1
_FRESH_AGAIN = 2
_END_SHARE = 0.9  # what is left is for naming the processes that are still there
VERIFY_PAUSES_MS = 300_000
"""How long a verify goes on without an ordinary pass where these come by a cron line."""


TROUBLES = (VolumeError, ChangesError, QuarantineError, ChildError, MarksError, OSError)
"""What the world can do to a pass: it failed, and is tried again."""


class RefusedError(Exception):
    """A guard forbids a pass; the text says what was found on both sides and what to do."""


@dataclass(frozen=True, slots=True)
class _Found:
    """Both sides of one volume as a pass found them, with all guards passed."""

    epoch: Epoch
    here: VolumeFacts
    root_fd: int
    facts: SourceFacts
    changes: Published | None
    scratch: Path


class Fetching:
    """All passes of this node while it is passive or returned."""

    def __init__(
        self,
        sync: Sync,
        inventory: Inventory,
        store: MarkStore,
        scratch: Path,
        *,
        source: Callable[[Epoch], From],
        clocks: Clocks,
        watch: Callable[[asyncio.Task[None]], None],
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called when a mark, a taint or a stamp changed."""
        self._sync = sync
        self._inventory = inventory
        self._store = store
        self._scratch = scratch
        self._source = source
        self._clocks = clocks
        self._changed = changed
        self.copies: dict[str, Copy] = {}
        self.epoch: Epoch | None = None
        self.may_start = False
        self.careful = False
        """Passes of listed folders compare by content: in a handover, until clients are held."""
        self.pressing = False
        """Clients wait for what runs: it competes with everything else on equal terms."""
        self.listed: Listing | None = None
        """What passes go by instead of asking the source each for itself."""
        self._late: dict[str, Reason] = {}
        self.bandwidth_kib_s: int | None = sync.bandwidth_kib_s
        self.bandwidth_set = False
        self._pulls: dict[str, Pull] = {}
        self._writes: set[asyncio.Future[Any]] = set()
        self.asking = Asking(changed)
        self._verifies: dict[str, Verify] = {}
        self._looks: dict[str, Pull | Verify] = {}
        self.rate_bytes_s: int | None = None
        """Of the last pass that copied enough to measure it, its walk and its end included."""
        self.tally: Tally | None = None
        """Where the passes of a handover are counted, while one is under way."""
        self.schedule = Schedule(
            self._run, parallel=sync.parallel, watch=watch, since_ms=self._since_ms
        )

    # ------------------------------------------------------------- who may run

    def start(self) -> None:
        """Begins to count; no pass runs before `begin`."""
        self.schedule.start()

    def begin(self, epoch: Epoch) -> None:
        """Passes of this epoch may run from now on."""
        self.epoch = epoch
        self.may_start = True

    def let(self, *, start: bool) -> None:
        """Whether passes may start: the source is there. When it comes back, the late ones do."""
        self.may_start = start
        if not start or self.epoch is None:
            return
        late, self._late = self._late, {}
        for uuid, reason in late.items():
            if uuid in self.copies:
                self.schedule.trigger(uuid, reason)

    async def end(self, within_s: float = END_WITHIN_S) -> str:
        """Ends all passes; their processes are gone then. Returns what is stuck, or "".

        Takes `within_s` and the schedule's `STOP_WITHIN_S` at most, whatever hangs.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + within_s
        self.epoch = None
        self.may_start = False
        self._late.clear()
        under_way: list[tuple[str, Pull | Verify]] = [
            *self._pulls.items(),
            *self._verifies.items(),
            *self._looks.items(),
        ]
        ends = await asyncio.gather(
            *(self._end_one(uuid, one, deadline_s) for uuid, one in under_way)
        )
        stuck = [words for words in ends if words]
        left = await self.schedule.cancel()
        if self._writes:  # in threads, which no cancelling ends
            await asyncio.wait(self._writes, timeout=max(0.0, deadline_s - loop.time()))
        stuck += [f"{self._inventory.name_of(uuid)}: its pass does not end" for uuid in left]
        if self._writes:
            stuck.append(f"{len(self._writes)} threads of this process, at work on the volumes")
        return "; ".join(stuck)

    async def _end_one(self, uuid: str, running: Pull | Verify, deadline_s: float) -> str:
        within_s = deadline_s - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(deadline_s):
                await running.end(within_s * _END_SHARE, at_once=True)
        except ChildStuckError as error:
            return f"{self._inventory.name_of(uuid)}: {error}"
        except TimeoutError:
            return f"{self._inventory.name_of(uuid)}: what runs for it does not end"
        return ""

    async def _write(self, call: Callable[..., _T], *args: Any, **more: Any) -> _T:  # noqa: ANN401
        """Writes into a volume, or beside it, in a thread that `end` waits for."""
        work = asyncio.ensure_future(asyncio.to_thread(call, *args, **more))
        self._writes.add(work)
        work.add_done_callback(self._writes.discard)
        return await asyncio.shield(work)

    async def stop(self) -> None:
        """Ends everything for good."""
        await self.end()
        await self.schedule.stop()

    # ------------------------------------------------------------- the volumes

    def follow_volumes(self) -> None:
        """Gives each volume that may be copied its place in the schedule."""
        wanted = {
            pair.uuid: pair.name
            for pair in self._inventory.pairs()
            if pair.uuid is not None and pair.here is not None and pair.there is not None
        }
        for uuid in self.copies.keys() - wanted.keys():
            self.schedule.remove(uuid)
            del self.copies[uuid]
        for uuid in wanted:
            self._plan(uuid)

    def _copy_of(self, uuid: str) -> Copy:
        """RefusedError for a volume that has gone meanwhile, from here or from the other node."""
        copy = self.copies.get(uuid)
        if copy is None:
            raise RefusedError("it is not mounted on both nodes any more")
        return copy

    def _plan(self, uuid: str) -> None:
        one = self._inventory.by_uuid(uuid)
        sync = self._sync
        own = sync.of(one.path) if one is not None else None
        plan = Plan(
            every_ms=own.every_ms if own else sync.every_ms,
            cron=own.cron if own else sync.cron,
            jitter_ms=sync.jitter_ms,
            full_every_ms=sync.full_every_ms,
            verify_every_ms=sync.verify_every_ms,
        )
        new = uuid not in self.copies
        if new:
            self.copies[uuid] = Copy(uuid)
        self.schedule.set(uuid, plan)
        if new and self.may_start:
            self.schedule.trigger(uuid, Reason(Cause.START))

    def _since_ms(self, uuid: str, kind: Kind) -> int | None:
        return self._store.since_ms(uuid, str(kind), self._clocks.wall_ns())

    def start_all(self) -> None:
        """A pass of each volume now: the source has come."""
        for uuid in self.copies:
            self.schedule.trigger(uuid, Reason(Cause.START))

    # ------------------------------------------------------------- one pass

    async def _run(self, uuid: str, reason: Reason) -> None:
        copy = self.copies.get(uuid)
        epoch = self.epoch
        if copy is None or epoch is None:
            return
        if not self.may_start:
            before = self._late.get(uuid)
            self._late[uuid] = reason if before is None else before.with_(reason)
            return
        copy.state, copy.why = State.RUNNING, f"a pass by {reason.cause}"
        try:
            if reason.kind is Kind.VERIFY:
                await self._verify(copy, epoch)
            else:
                await self._ordinary_or_full(copy, epoch, reason)
        except RefusedError as refused:
            self._refused(copy, str(refused))
        except TROUBLES as error:
            self._failed(copy, str(error))
        except asyncio.CancelledError:
            copy.rest(State.OFF, "ended: the state of this node changed")
            raise

    async def _ordinary_or_full(self, copy: Copy, epoch: Epoch, reason: Reason) -> None:
        mark = self._store.own.get(copy.uuid)
        known = mark is not None and mark.epoch == epoch
        if reason.kind is Kind.FULL and known and not self.careful:
            # First what the journal names, so that the walk shows what it did not name.
            await self._pass(copy, epoch, Reason(reason.cause))
            if copy.state is not State.IDLE:
                return
            copy.state, copy.why = State.RUNNING, "a full walk"
        await self._pass(copy, epoch, reason)
        if self.careful and reason.kind is Kind.FULL and copy.state is State.IDLE:
            await self._compare_changed(copy, epoch)

    def _refused(self, copy: Copy, why: str) -> None:
        self._say(copy, f"volume {self._inventory.name_of(copy.uuid)} is not copied: {why}")
        copy.rest(State.REFUSED, why)

    def _say(self, copy: Copy, words: str) -> None:
        """Once, until something else is to be said: a pass that fails is tried again and again."""
        if words != copy.said:
            copy.said = words
            log.warning("%s", words)

    def _failed(self, copy: Copy, why: str) -> None:
        copy.attempts = min(copy.attempts + 1, MAX_ATTEMPTS_COUNTED)
        self._say(copy, f"volume {self._inventory.name_of(copy.uuid)}: the pass failed: {why}")
        copy.rest(State.FAILED, why)
        self.schedule.retry(copy.uuid, copy.attempts)

    async def _pass(self, copy: Copy, epoch: Epoch, reason: Reason) -> None:
        async with self._found(copy.uuid, epoch, self._scratch / copy.uuid) as found:
            await self._into(copy, reason, found)

    @asynccontextmanager
    async def _found(
        self, uuid: str, epoch: Epoch, scratch: Path, listing: Listing | None = None
    ) -> AsyncIterator[_Found]:
        """Both sides of a volume, past all guards, its root open here; nothing is changed yet.

        By a listing, or by what the source publishes now.
        """
        await asyncio.to_thread(_fresh_folder, scratch)
        listing = listing or self.listed or await self._listing([uuid], epoch, scratch)
        facts, changes = listing.facts, listing.changes.get(uuid)
        await self._inventory.look_at(uuid)
        here = self._guard(uuid, epoch, facts)
        if here.stamp is not None and here.identity is not None:
            stamped_ns = await asyncio.to_thread(volumes.stamped_at_ns, here)
            if stamped_ns == facts.stamped_ns.get(here.identity):
                raise RefusedError(
                    f"{here.path} is the same filesystem as the source's, or a copy of it block by "
                    "block: give this node a filesystem of its own"
                )
        root_fd = await asyncio.to_thread(volumes.open_root, here)
        try:
            yield _Found(epoch, here, root_fd, facts, changes, scratch)
        finally:
            os.close(root_fd)

    async def _published(
        self, uuid: str, epoch: Epoch, scratch: Path
    ) -> tuple[SourceFacts, Published | None]:
        listing = self.listed or await self._listing([uuid], epoch, scratch)
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
        scratch = self._scratch / folder
        await asyncio.to_thread(_fresh_folder, scratch)
        return await self._listing(sorted(self.copies), epoch, scratch)

    async def _listing(self, uuids: Sequence[str], epoch: Epoch, scratch: Path) -> Listing:
        names = [*names_in(uuids), *(dense_name(uuid) for uuid in uuids)]
        ending = await fetch_control(self._source(epoch), scratch, names)
        if ending.verdict is Verdict.REFUSED:
            raise RefusedError(f"the source's facts cannot be had: {ending.reason}")
        if ending.verdict is not Verdict.COMPLETE:
            raise ChildError(f"the source's facts cannot be had: {ending.reason}")
        return await asyncio.to_thread(read_listing, scratch, uuids)

    def _guard(self, uuid: str, epoch: Epoch, facts: SourceFacts) -> VolumeFacts:
        """Everything that must be so before a byte is written (I3, I5)."""
        if facts.epoch != epoch:
            raise RefusedError(
                f"the source offers epoch {facts.epoch}, this node follows epoch {epoch}"
            )
        here, there = self._inventory.by_uuid(uuid), facts.of(uuid)
        if here is None:
            raise RefusedError("it is not mounted here, or its identity file is missing: mount it")
        if there is None:
            raise RefusedError(
                "the source does not offer it: see `nfsha volumes` on the other node"
            )
        if there.stamp != epoch:
            raise RefusedError(f"the source's volume bears the stamp {there.stamp}, not {epoch}")
        if here.failing or here.read_only:
            what = here.failing or "it is mounted read-only"
            raise RefusedError(f"the copy at {here.path} cannot be written: {what}")
        if is_of_another_history(here.stamp, epoch):
            raise RefusedError(
                f"the copy at {here.path} bears the stamp {here.stamp}, the source {there.stamp}: "
                "what lies here is newer, or of another history. If the source's data is the "
                f"truth, remove {here.path}/{volumes.STAMP_NAME} here: what differs then goes to "
                "quarantine. If this node's is: stop nfsha on the other one, and run "
                "`nfsha activate --force` here"
            )
        if there.used_bytes > here.size_bytes:
            raise RefusedError(
                f"the source uses {there.used_bytes} bytes, the copy's filesystem at {here.path} "
                f"has {here.size_bytes} in all: make it larger"
            )
        return here

    async def _into(self, copy: Copy, reason: Reason, found: _Found) -> None:
        here, resync = found.here, self._is_resync(copy.uuid, found)
        folders, why_full = self._choose(copy, reason, found, resync=resync)
        if resync and not here.empty and not self._may_resync(reason):
            raise RefusedError(
                f"the copy holds the data of {here.stamp or 'no epoch'}, and sync.resync is "
                '"on-failback": `nfsha sync` begins the resync'
            )
        entry = await self._taint(copy, found) if resync else None
        request = replace(
            self._request(copy, found, entry),
            folders=folders,
            is_replica=not resync,
            checksum=self.careful and folders is not None,
            priority=Priority.NORMAL if self.pressing else Priority.LOW,
        )
        if resync and here.empty:
            dense = await asyncio.to_thread(_dense, copy.uuid, found)
            log.info("volume %s: %d large files without holes", here.name, len(dense.files))
            request = replace(request, dense=dense)
        if why_full:
            copy.full_walks[why_full] += 1
            log.info("volume %s: a full walk: %s", here.name, why_full)
        outcome = await self._pull(copy, request, found.scratch)
        kept = None
        if entry is not None:
            if outcome.verdict is Verdict.COMPLETE:
                outcome = await self._settle_unreplicated(copy, found, entry, outcome)
            kept = await self._write(Quarantine(found.root_fd).finish, entry)
        self._count(copy, outcome, kept)
        if outcome.verdict is not Verdict.COMPLETE:
            self._not_completed(copy, outcome)
            return
        done = _mark(copy.uuid, found, outcome, full=folders is None)
        if reason.kind is Kind.FULL and not resync and not self.careful:
            copy.missed_by_journal += await self._missed(copy, found, outcome)
        copy.folders = folders
        await self._completed(copy, here, done)

    async def _settle_unreplicated(
        self, copy: Copy, found: _Found, entry: Entry, outcome: PassOutcome
    ) -> PassOutcome:
        """Puts aside what this node wrote and nobody replicated, whatever it looks like."""
        told = self._store.peer.get(copy.uuid)
        from_ns = unreplicated.since_ns(found.here.stamp, found.epoch, told)
        if from_ns is None:
            return outcome
        verify = self._comparison(copy.uuid, found)
        self._verifies[copy.uuid] = verify
        try:
            why = await unreplicated.settle(
                verify, found.root_fd, Quarantine(found.root_fd), entry, from_ns
            )
        finally:
            self._verifies.pop(copy.uuid, None)
        return replace(outcome, verdict=Verdict.RETRY, sentence=why) if why else outcome

    def _comparison(self, uuid: str, found: _Found) -> Verify:
        request = VerifyRequest(
            uuid,
            found.root_fd,
            self._source(found.epoch),
            timeout_s=self._sync.timeout_s,
            connect_timeout_s=self._sync.connect_timeout_s,
        )
        return Verify(request, found.scratch, self._clocks.now_ms)

    def _is_resync(self, uuid: str, found: _Found) -> bool:
        return found.here.stamp != found.epoch or bool(self._store.taint_of(uuid))

    async def list_ahead(self) -> Listing | str:
        """What `look_ahead` goes by, of all volumes; or why it cannot be had."""
        if self.epoch is None:
            return "nothing is copied to this node now"
        try:
            return await self.list_all(self.epoch, "listing-ahead")  # a handover may begin
        except (RefusedError, *TROUBLES) as error:
            return str(error)

    async def look_ahead(self, uuid: str, listing: Listing, longest_s: int) -> Ahead:
        """What a pass of this volume would do now. Changes nothing; tells its own trouble."""
        epoch = self.epoch
        if epoch is None:
            return Ahead(uuid, trouble="nothing is copied to this node any more")
        scratch, began_ms = self._scratch / f"{uuid}-ahead", self._clocks.now_ms()
        try:
            async with self._found(uuid, epoch, scratch, listing) as found:
                ahead = await self._looked(self._copy_of(uuid), found, longest_s)
        except (RefusedError, *TROUBLES) as error:
            return Ahead(uuid, trouble=str(error))
        return replace(ahead, took_ms=self._clocks.now_ms() - began_ms)

    async def _looked(self, copy: Copy, found: _Found, longest_s: int) -> Ahead:
        began_ms, resync = self._clocks.now_ms(), self._is_resync(copy.uuid, found)
        keeps = resync and not found.here.empty
        folders, why_full = self._choose(copy, Reason(Cause.COMMAND), found, resync=resync)
        request = replace(self._request(copy, found, None), folders=folders, longest_s=longest_s)
        if keeps:  # what it deletes goes to quarantine, which needs room
            limits = replace(request.limits, files=UNLIMITED)
            request = replace(request, limits=limits, resync_backup="the quarantine")
        pull = Pull(request, found.scratch, self._clocks.now_ms)
        self._looks[copy.uuid] = pull
        try:
            planned = await pull.look()
        finally:
            self._looks.pop(copy.uuid, None)
        walk = "full" if folders is None else "folders" if folders else "none"
        ahead = estimate.of_volume(copy.uuid, walk, why_full, planned, keeps=keeps)
        left_s = longest_s - (self._clocks.now_ms() - began_ms) // 1000
        return await self._with_alike(ahead, found, max(1, left_s)) if keeps else ahead

    async def _with_alike(self, ahead: Ahead, found: _Found, longest_s: int) -> Ahead:
        """With what a resync puts aside although a walk takes it for equal."""
        told = self._store.peer.get(ahead.uuid)
        from_ns = unreplicated.since_ns(found.here.stamp, found.epoch, told)
        if from_ns is None or ahead.trouble:
            return ahead
        verify = self._looks[ahead.uuid] = self._comparison(ahead.uuid, found)
        try:
            async with asyncio.timeout(longest_s):
                alike, note = await unreplicated.look_ahead(verify, found.root_fd, from_ns)
        except TimeoutError:
            alike, note = (), f"contents were not compared within {longest_s} s"
        finally:
            self._looks.pop(ahead.uuid, None)
        return replace(
            ahead,
            copy_files=ahead.copy_files + len(alike),
            quarantine=ahead.quarantine + len(alike),
            names=(*ahead.names, *alike),
            note=note,
        )

    def _count(self, copy: Copy, outcome: PassOutcome, kept: Entry | None) -> None:
        if outcome.transferred_bytes >= MEASURED_BYTES and outcome.seconds > 0:
            self.rate_bytes_s = round(outcome.transferred_bytes / outcome.seconds)
        if self.tally is not None:
            self.tally.add(
                copy.uuid,
                self._inventory.name_of(copy.uuid),
                copied_files=outcome.transferred_files,
                copied_bytes=outcome.transferred_bytes,
                deleted=outcome.deletions,
                quarantined=(kept.files or 0) if kept is not None else 0,
            )

    def _request(self, copy: Copy, found: _Found, entry: Entry | None) -> PassRequest:
        """A full walk; what it overwrites and deletes goes to the entry of the quarantine."""
        mark = self._store.own.get(copy.uuid)
        return PassRequest(
            uuid=copy.uuid,
            root_fd=found.root_fd,
            source=self._source(found.epoch),
            folders=None,
            resync_backup=entry.backup_dir if entry is not None else None,
            limits=DeleteLimits(
                # What a resync deletes goes to quarantine; only an emptied copy waits for a word.
                files=self._sync.max_deletes if entry is None else UNLIMITED,
                percent=self._sync.max_deletes_percent,
                known_files=mark.files if mark is not None else 0,
                accepted_plan=copy.accepted,
                target_empty=found.here.empty,
            ),
            bandwidth_kib_s=self._bandwidth(found.here),
            timeout_s=self._sync.timeout_s,
            connect_timeout_s=self._sync.connect_timeout_s,
            name=f"volume {found.here.name}",
            expected_bytes=_expected_bytes(copy.uuid, found),
        )

    def _choose(
        self, copy: Copy, reason: Reason, found: _Found, *, resync: bool
    ) -> tuple[tuple[bytes, ...] | None, str]:
        """The folders to ask for, or None and why all of the volume must be walked."""
        mark = self._store.own.get(copy.uuid)
        if resync:
            return None, "resync"
        if mark is None or mark.epoch != found.epoch:
            return None, "no complete pass of this epoch yet"
        if reason.kind is not Kind.ORDINARY:
            return None, f"the schedule's {reason.kind} walk"
        if found.changes is None:
            return None, "the source has no change journal"
        folders, why = found.changes.since(mark.changes_id, mark.changes_seq)
        return folders, why

    def _may_resync(self, reason: Reason) -> bool:
        return self._sync.resync == "automatic" or reason.cause is Cause.COMMAND

    async def _taint(self, copy: Copy, found: _Found) -> Entry | None:
        """Durable before the first byte of a resync: until its end this is no replica."""
        epoch, here = found.epoch, found.here
        if here.empty:
            await self._write(self._store.taint, [copy.uuid], f"first copy of epoch {epoch}")
            self._changed()
            return None
        entry = await self._write(
            Quarantine(found.root_fd).begin,
            "resync",
            why=f"the copy held the data of {here.stamp or 'no epoch'}; resync to epoch {epoch}",
            epoch=here.stamp,
            operation="resync",
            by="nfsha",
        )
        await self._write(self._store.taint, [copy.uuid], f"resync to epoch {epoch}")
        self._changed()
        return entry

    async def _pull(self, copy: Copy, request: PassRequest, scratch: Path) -> PassOutcome:
        pull = Pull(request, scratch, self._clocks.now_ms)
        self._pulls[copy.uuid] = pull
        try:
            outcome = await pull.run(copy.take_progress)
        finally:
            self._pulls.pop(copy.uuid, None)
        # Wherever it is shown the volume's name stands before it already.
        return replace(outcome, sentence=outcome.sentence.removeprefix(f"{request.name}: "))

    async def _missed(self, copy: Copy, found: _Found, outcome: PassOutcome) -> int:
        """How many differences a full walk found that the change journal had not named.

        The walk came right after a pass of all that the journal named. On a volume that changed
        during the walk nobody can tell them apart; then none is counted.
        """
        count, changes = outcome.transferred_files + outcome.deletions, found.changes
        if not count or changes is None:
            return 0
        _, after = await self._published(copy.uuid, found.epoch, found.scratch)
        folders = after.since(changes.journal_id, changes.last)[0] if after is not None else None
        return count if folders == () else 0

    async def _completed(self, copy: Copy, here: VolumeFacts, mark: Mark) -> None:
        await self._write(self._store.put_own, mark)
        if self._store.names.get(copy.uuid) != here.name:
            await self._write(self._store.put_names, {copy.uuid: here.name})
        if here.stamp != mark.epoch:
            await self._write(volumes.write_stamp, here, mark.epoch)
        await self._write(self._untaint, copy.uuid, mark.epoch)
        copy.attempts = 0
        copy.plan, copy.accepted, copy.said = None, None, ""
        copy.rest(State.IDLE, "up to date")
        await self._inventory.look_at(copy.uuid)
        self._changed()

    def _untaint(self, uuid: str, epoch: Epoch) -> None:
        """This copy is whole again. A taint of all goes with the last copy. It blocks."""
        store = self._store
        if uuid in store.tainted:
            store.untaint([uuid])
        marks = [store.own.get(other) for other in self.copies]
        if EVERYTHING in store.tainted and all(m is not None and m.epoch == epoch for m in marks):
            store.untaint()

    def _not_completed(self, copy: Copy, outcome: PassOutcome) -> None:
        copy.plan = outcome.plan if outcome.verdict is Verdict.HELD else copy.plan
        match outcome.verdict:
            case Verdict.HELD:
                self._say(copy, f"volume {self._inventory.name_of(copy.uuid)}: {outcome.sentence}")
                copy.rest(State.HELD, outcome.sentence)
                self._changed()
            case Verdict.STOPPED | Verdict.REFUSED:
                self._refused(copy, outcome.sentence)
            case Verdict.KILLED | Verdict.RETRY if self.epoch is None:
                copy.rest(State.OFF, "ended: the state of this node changed")
            case Verdict.INCOMPLETE:
                # The next pass must find what vanished gone, or copy it; it comes in a second.
                log.info("volume %s: %s", self._inventory.name_of(copy.uuid), outcome.sentence)
                copy.rest(State.IDLE, outcome.sentence)
                self.schedule.retry(copy.uuid, 1)
            case _:
                self._failed(copy, outcome.sentence)

    # ------------------------------------------------------------- proving

    def lacking(self) -> str:
        """Why this node could not have all that the source has; "" when each volume has its copy.

        A daemon that has just started knows of no volume yet: that is not to have them all.
        """
        if self._inventory.there is None:
            return "the other node has not told its volumes yet"
        pairs = self._inventory.pairs()
        bad = [sentence for pair in pairs for sentence in pair.obstacles()]
        bad += [
            f"volume {pair.name} is not looked after yet"
            for pair in pairs
            if not bad and pair.uuid not in self.copies
        ]
        return "; ".join(bad) or ("" if pairs else "there is no volume to copy")

    async def vouch(self, uuid: str, epoch: Epoch, listing: Listing) -> str:
        """Says why a copy is not known to be all that the source has, or "".

        The guards of a pass hold, and the source's journal knows of no change since its last one.
        """
        await self._inventory.look_at(uuid)
        mark = self._store.own.get(uuid)
        if mark is None or mark.epoch != epoch:
            return "it is not a whole replica"
        try:
            self._guard(uuid, epoch, listing.facts)
        except RefusedError as error:
            return str(error)
        late, why = listing.since(mark)
        if late is None:
            return why
        return f"{shown(late[0])} changed after the freeze" if late else ""

    async def compare(self, uuid: str, epoch: Epoch, folders: tuple[bytes, ...]) -> str:
        """Says what a dry pass over these folders, by content, finds different; "" for nothing."""
        here = self._inventory.by_uuid(uuid)
        if here is None:
            return "it is not mounted here any more"
        scratch = self._scratch / f"{uuid}-proof"
        try:
            await asyncio.to_thread(_fresh_folder, scratch)
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
                source=self._source(epoch),
                folders=folders,
                limits=DeleteLimits(0, 0, 0, None, target_empty=False),
                timeout_s=self._sync.timeout_s,
                connect_timeout_s=self._sync.connect_timeout_s,
                checksum=True,
                name=f"volume {here.name}",
                priority=Priority.NORMAL,
            )
            return await self._looked_equal(here, request, scratch)
        finally:
            os.close(root_fd)

    async def _looked_equal(self, here: VolumeFacts, request: PassRequest, scratch: Path) -> str:
        pull = Pull(request, scratch, self._clocks.now_ms)
        self._looks[request.uuid] = pull
        try:
            found = await pull.look()
        finally:
            self._looks.pop(request.uuid, None)
        if found.trouble or not found.differ:
            return found.trouble
        more = f", and {found.differ - 1} more" if found.differ > 1 else ""
        return f"{here.path}/{shown(found.first)} differs from the source's{more}"

    # ------------------------------------------------------------- verifying

    async def _compare_changed(self, copy: Copy, epoch: Epoch) -> None:
        """Compares by content what changed since the epoch began, or was compared last.

        For what a walk cannot see: a file that was changed, with size and time set back.
        """
        copy.state, copy.why = State.RUNNING, "asks the source which files changed"
        began_ms = self._clocks.now_ms()
        question = ChangedQuestion(copy.uuid, self._compared_ago_ms(copy, epoch), began_ms)
        scratch = self._scratch / f"{copy.uuid}-changed"
        await asyncio.to_thread(_fresh_folder, scratch)
        changed = await self.asking.ask_changed(
            question, lambda name: self._answer(epoch, scratch, name)
        )
        if changed is None:
            self._failed(copy, "the source did not tell which files changed")
            return
        log.info(
            "volume %s: %s are compared by content", self._inventory.name_of(copy.uuid),
            "all files" if changed.more else f"{len(changed.names)} files that changed",
        )  # fmt: skip
        copy.rest(State.IDLE, "no file changed")
        if changed.more or changed.names:
            await self._verify(copy, epoch, None if changed.more else changed.names)
        if copy.state is State.IDLE:
            copy.compared = (epoch, began_ms)

    def _compared_ago_ms(self, copy: Copy, epoch: Epoch) -> int | None:
        """How long ago all that had changed was compared by content; None: not in this epoch."""
        if copy.compared is None or copy.compared[0] != epoch:
            return None
        return self._clocks.now_ms() - copy.compared[1]

    async def _verify(self, copy: Copy, epoch: Epoch, names: Sequence[bytes] | None = None) -> None:
        """Compares contents; ordinary passes take turns with it. What differs is repaired.

        With `names` only these, as fast as it goes.
        """
        began_ms = self._clocks.now_ms()
        if names is None:
            await self._pass(copy, epoch, Reason(Cause.SCHEDULE))
        mark = self._store.own.get(copy.uuid)
        if copy.state is not State.IDLE or mark is None:
            return
        here = self._inventory.by_uuid(copy.uuid)
        if here is None:
            raise RefusedError("it is not mounted here any more")
        scratch = self._scratch / f"{copy.uuid}-verify"
        await asyncio.to_thread(_fresh_folder, scratch)
        root_fd = await asyncio.to_thread(volumes.open_root, here)
        try:
            outcome = await self._verified(copy, epoch, mark, root_fd, scratch, names)
        finally:
            os.close(root_fd)
        if names is None:
            copy.verified_ns = self._clocks.wall_ns()
            copy.damaged, copy.missed = outcome.damaged, outcome.missed
        else:  # what the last whole verify found still stands
            copy.damaged += outcome.damaged
            copy.missed += outcome.missed
        for found in outcome.findings:
            log.error(
                "volume %s: %s: %s: %s", here.name, shown(found.name), found.kind, found.evidence
            )
        if outcome.verdict is Verdict.KILLED and self.epoch is None:
            copy.rest(State.OFF, "ended: the state of this node changed")
            return
        if outcome.verdict not in (Verdict.COMPLETE, Verdict.INCOMPLETE):
            self._failed(copy, outcome.sentence)
            return
        whole = outcome.verdict is Verdict.COMPLETE and not outcome.more
        if names is not None and not (whole and not outcome.unrepaired):
            self._failed(copy, f"not all that changed could be made equal: {outcome.sentence}")
            return
        if copy.verified_ns is not None and names is None:
            await self._write(self._store.note_verify, copy.uuid, copy.verified_ns)
            copy.compared = (epoch, began_ms)
        log.info("volume %s: verified: %s", here.name, outcome.sentence)
        copy.rest(State.IDLE, f"verified: {outcome.sentence}")

    async def _verified(
        self,
        copy: Copy,
        epoch: Epoch,
        mark: Mark,
        root_fd: int,
        scratch: Path,
        names: Sequence[bytes] | None,
    ) -> VerifyOutcome:
        verify = Verify(
            VerifyRequest(
                copy.uuid,
                root_fd,
                self._source(epoch),
                read_kib_s=None if self.careful else self._sync.verify_bandwidth_kib_s,
                timeout_s=self._sync.timeout_s,
                connect_timeout_s=self._sync.connect_timeout_s,
                expected_bytes=mark.bytes,
            ),
            scratch,
            self._clocks.now_ms,
        )
        self._verifies[copy.uuid] = verify

        async def fresh_pass() -> bool:
            await self._pass(copy, epoch, Reason(Cause.SCHEDULE))
            done = copy.state is State.IDLE
            copy.state, copy.why = State.RUNNING, "verifies the contents"
            return done

        async def ask(question: SuspectQuestion) -> tuple[SuspectAnswer, ...] | None:
            return await self.asking.ask(question, lambda name: self._answer(epoch, scratch, name))

        @asynccontextmanager
        async def turn() -> AsyncIterator[None]:
            now = self._store.own.get(copy.uuid)
            age_ms = (
                (self._clocks.wall_ns() - now.started_ns) // 1_000_000 if now is not None else 0
            )
            if age_ms > (self._sync.every_ms or VERIFY_PAUSES_MS):
                await fresh_pass()
            yield

        copy.state, copy.why = State.RUNNING, "verifies the contents"
        try:
            return await verify.run(
                Helpers(turn, fresh_pass, ask, Quarantine(root_fd), epoch, mark),
                copy.take_progress,
                names=names,
            )
        finally:
            self._verifies.pop(copy.uuid, None)

    async def _answer(self, epoch: Epoch, scratch: Path, name: str) -> Path | None:
        ending = await fetch_control(self._source(epoch), scratch, [name])
        path = scratch / name
        return path if ending.verdict is Verdict.COMPLETE and path.exists() else None

    # ------------------------------------------------------------- what operators ask

    def _bandwidth(self, here: VolumeFacts) -> int | None:
        if self.bandwidth_set:
            return self.bandwidth_kib_s
        return self._sync.of(here.path).bandwidth_kib_s

    async def set_bandwidth(self, kib_s: int | None, *, default: bool = False) -> None:
        """Takes another limit (None: none); transfers that run begin again with it."""
        self.bandwidth_set = not default
        self.bandwidth_kib_s = self._sync.bandwidth_kib_s if default else kib_s
        for uuid, pull in tuple(self._pulls.items()):
            here = self._inventory.by_uuid(uuid)
            if here is not None:
                await pull.limit_bandwidth(self._bandwidth(here))


def _mark(uuid: str, found: _Found, outcome: PassOutcome, *, full: bool) -> Mark:
    facts, changes = found.facts, found.changes
    return Mark(
        volume=uuid,
        epoch=found.epoch,
        started_ns=facts.as_of_ns if changes is None else min(changes.as_of_ns, facts.as_of_ns),
        files=outcome.files,
        bytes=facts.used_bytes(uuid),
        transferred_bytes=outcome.transferred_bytes,
        deletions=outcome.deletions,
        duration_ms=round(outcome.seconds * 1000),
        walk="full" if full else "folders",
        changes_id=changes.journal_id if changes is not None else "",
        changes_seq=changes.last if changes is not None else 0,
    )


def _expected_bytes(uuid: str, found: _Found) -> int:
    """What the copy will have grown by: an empty filesystem has something in use, or reserved."""
    there_bytes, here = found.facts.used_bytes(uuid), found.here
    return max(0, there_bytes - here.used_bytes) if here.empty else there_bytes


def _dense(uuid: str, found: _Found) -> DenseFiles:
    """What the source told of large files; without it their copying takes longer."""
    try:
        return read_dense(found.scratch / dense_name(uuid))
    except (DenseError, OSError) as error:
        log.warning("volume %s: the source's list of large files: %s", found.here.name, error)
        return NOTHING_DENSE


def _fresh_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True, mode=0o700)

"""One pass of one volume, past its guards: rsync, then the mark, then the stamp.

Of the changed folders where the change journal vouches, else of all. A resync is tainted first, and
keeps in quarantine what it overwrites or deletes. When to make a pass is not decided here.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

from nfsha.core.model import Epoch
from nfsha.replica.content import unreplicated
from nfsha.replica.content.verify import Verify, VerifyRequest
from nfsha.replica.fetching.copying import Copy, State
from nfsha.replica.fetching.desk import Desk
from nfsha.replica.fetching.finding import Finding, Found
from nfsha.replica.fetching.guards import RefusedError
from nfsha.replica.fetching.schedule import Cause, Kind, Reason
from nfsha.replica.passes.pull import Pull
from nfsha.replica.passes.request import PassOutcome, PassRequest
from nfsha.replica.quarantine.quarantine import Entry, Quarantine
from nfsha.replica.rsync.child import Priority
from nfsha.replica.rsync.deletions import DeleteLimits
from nfsha.replica.rsync.exits import Verdict
from nfsha.replica.volume import volumes
from nfsha.replica.volume.dense import NOTHING_DENSE, DenseError, DenseFiles, dense_name, read_dense
from nfsha.replica.volume.facts import VolumeFacts
from nfsha.replica.volume.marks import EVERYTHING, Mark

log = logging.getLogger(__name__)

MEASURED_BYTES = 1 << 20
"""A pass that copied less says nothing of the rate."""

UNLIMITED = (1 << 31) - 1


class Passing:
    """Makes passes; what came of each stands in its `Copy`."""

    def __init__(self, desk: Desk, finding: Finding) -> None:
        self._desk = desk
        self._finding = finding

    async def make(self, copy: Copy, epoch: Epoch, reason: Reason) -> None:
        """One pass to its end. Raises RefusedError and `TROUBLES`."""
        scratch = self._desk.scratch / copy.uuid
        async with self._finding.open(copy.uuid, epoch, scratch) as found:
            await self._into(copy, reason, found)

    async def _into(self, copy: Copy, reason: Reason, found: Found) -> None:
        here, resync = found.here, self.is_resync(copy.uuid, found)
        folders, why_full = self.choose(copy, reason, found, resync=resync)
        if resync and not here.empty and not self._may_resync(reason):
            raise RefusedError(
                f"the copy holds the data of {here.stamp or 'no epoch'}, and sync.resync is "
                '"on-failback": `nfsha sync` begins the resync'
            )
        entry = await self._taint(copy, found) if resync else None
        request = replace(
            self.request(copy, found, entry),
            folders=folders,
            is_replica=not resync,
            checksum=self._desk.careful and folders is not None,
            priority=Priority.NORMAL if self._desk.pressing else Priority.LOW,
            spares=copy.spares,
        )
        copy.spares = {}
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
            kept = await self._desk.under_way.write(Quarantine(found.root_fd).finish, entry)
        self._count(copy, outcome, kept)
        copy.brought, copy.looked_ms = outcome.brought, round(outcome.looked_s * 1000)
        if outcome.verdict is not Verdict.COMPLETE:
            self._not_completed(copy, outcome)
            return
        done = _mark(copy.uuid, found, outcome, full=folders is None)
        if reason.kind is Kind.FULL and not resync and not self._desk.careful:
            copy.missed_by_journal += await self._missed(copy, found, outcome)
        copy.folders = folders
        await self._completed(copy, here, done)

    async def _settle_unreplicated(
        self, copy: Copy, found: Found, entry: Entry, outcome: PassOutcome
    ) -> PassOutcome:
        """Puts aside what this node wrote and nobody replicated, whatever it looks like."""
        told = self._desk.store.peer.get(copy.uuid)
        from_ns = unreplicated.since_ns(found.here.stamp, found.epoch, told)
        if from_ns is None:
            return outcome
        verify = self.comparison(copy.uuid, found)
        with self._desk.under_way.noted(copy.uuid, verify):
            why = await unreplicated.settle(
                verify, found.root_fd, Quarantine(found.root_fd), entry, from_ns
            )
        return replace(outcome, verdict=Verdict.RETRY, sentence=why) if why else outcome

    def comparison(self, uuid: str, found: Found) -> Verify:
        """Compares contents, once it is run."""
        request = VerifyRequest(
            uuid,
            found.root_fd,
            self._desk.source(found.epoch),
            timeout_s=self._desk.sync.timeout_s,
            connect_timeout_s=self._desk.sync.connect_timeout_s,
        )
        return Verify(request, found.scratch, self._desk.clocks.now_ms)

    def is_resync(self, uuid: str, found: Found) -> bool:
        """The copy is of older data, or was begun to be made equal and is not yet."""
        return found.here.stamp != found.epoch or bool(self._desk.store.taint_of(uuid))

    def _count(self, copy: Copy, outcome: PassOutcome, kept: Entry | None) -> None:
        if outcome.transferred_bytes >= MEASURED_BYTES and outcome.seconds > 0:
            self._desk.rate_bytes_s = round(outcome.transferred_bytes / outcome.seconds)
        if self._desk.tally is not None:
            self._desk.tally.add(
                copy.uuid,
                self._desk.name_of(copy.uuid),
                copied_files=outcome.transferred_files,
                copied_bytes=outcome.transferred_bytes,
                deleted=outcome.deletions,
                quarantined=(kept.files or 0) if kept is not None else 0,
            )

    def request(self, copy: Copy, found: Found, entry: Entry | None) -> PassRequest:
        """A full walk; what it overwrites and deletes goes to the entry of the quarantine."""
        mark = self._desk.store.own.get(copy.uuid)
        return PassRequest(
            uuid=copy.uuid,
            root_fd=found.root_fd,
            source=self._desk.source(found.epoch),
            folders=None,
            resync_backup=entry.backup_dir if entry is not None else None,
            limits=DeleteLimits(
                # What a resync deletes goes to quarantine; only an emptied copy waits for a word.
                files=self._desk.sync.max_deletes if entry is None else UNLIMITED,
                percent=self._desk.sync.max_deletes_percent,
                known_files=mark.files if mark is not None else 0,
                accepted_plan=copy.accepted,
                target_empty=found.here.empty,
            ),
            bandwidth_kib_s=self._desk.bandwidth(found.here),
            timeout_s=self._desk.sync.timeout_s,
            connect_timeout_s=self._desk.sync.connect_timeout_s,
            name=f"volume {found.here.name}",
            expected_bytes=found.growth_bytes,
        )

    def choose(
        self, copy: Copy, reason: Reason, found: Found, *, resync: bool
    ) -> tuple[tuple[bytes, ...] | None, str]:
        """The folders to ask for, or None and why all of the volume must be walked."""
        mark = self._desk.store.own.get(copy.uuid)
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
        return self._desk.sync.resync == "automatic" or reason.cause is Cause.COMMAND

    async def _taint(self, copy: Copy, found: Found) -> Entry | None:
        """Durable before the first byte of a resync: until its end this is no replica."""
        epoch, here = found.epoch, found.here
        if here.empty:
            await self._desk.under_way.write(
                self._desk.store.taint, [copy.uuid], f"first copy of epoch {epoch}"
            )
            self._desk.changed()
            return None
        entry = await self._desk.under_way.write(
            Quarantine(found.root_fd).begin,
            "resync",
            why=f"the copy held the data of {here.stamp or 'no epoch'}; resync to epoch {epoch}",
            epoch=here.stamp,
            operation="resync",
            by="nfsha",
        )
        await self._desk.under_way.write(
            self._desk.store.taint, [copy.uuid], f"resync to epoch {epoch}"
        )
        self._desk.changed()
        return entry

    async def _pull(self, copy: Copy, request: PassRequest, scratch: Path) -> PassOutcome:
        pull = Pull(request, scratch, self._desk.clocks.now_ms)
        with self._desk.under_way.noted(copy.uuid, pull):
            outcome = await pull.run(copy.take_progress)
        # Wherever it is shown the volume's name stands before it already.
        return replace(outcome, sentence=outcome.sentence.removeprefix(f"{request.name}: "))

    async def _missed(self, copy: Copy, found: Found, outcome: PassOutcome) -> int:
        """How many differences a full walk found that the change journal had not named.

        The walk came right after a pass of all that the journal named. On a volume that changed
        during the walk nobody can tell them apart; then none is counted.
        """
        count, changes = outcome.transferred_files + outcome.deletions, found.changes
        if not count or changes is None:
            return 0
        _, after = await self._finding.published(copy.uuid, found.epoch, found.scratch)
        folders = after.since(changes.journal_id, changes.last)[0] if after is not None else None
        return count if folders == () else 0

    async def _completed(self, copy: Copy, here: VolumeFacts, mark: Mark) -> None:
        await self._desk.under_way.write(self._desk.store.put_own, mark)
        if self._desk.store.names.get(copy.uuid) != here.name:
            await self._desk.under_way.write(self._desk.store.put_names, {copy.uuid: here.name})
        if here.stamp != mark.epoch:
            await self._desk.under_way.write(volumes.write_stamp, here, mark.epoch)
        await self._desk.under_way.write(self._untaint, copy.uuid, mark.epoch)
        copy.attempts = 0
        copy.plan, copy.accepted, copy.said = None, None, ""
        copy.rest(State.IDLE, "up to date")
        await self._desk.inventory.look_at(copy.uuid)
        self._desk.changed()

    def _untaint(self, uuid: str, epoch: Epoch) -> None:
        """This copy is whole again. A taint of all goes with the last copy. It blocks."""
        store = self._desk.store
        if uuid in store.tainted:
            store.untaint([uuid])
        marks = [store.own.get(other) for other in self._desk.copies]
        if EVERYTHING in store.tainted and all(m is not None and m.epoch == epoch for m in marks):
            store.untaint()

    def _not_completed(self, copy: Copy, outcome: PassOutcome) -> None:
        copy.plan = outcome.plan if outcome.verdict is Verdict.HELD else copy.plan
        match outcome.verdict:
            case Verdict.HELD:
                self._desk.say(copy, f"volume {self._desk.name_of(copy.uuid)}: {outcome.sentence}")
                copy.rest(State.HELD, outcome.sentence)
                self._desk.changed()
            case Verdict.STOPPED | Verdict.REFUSED:
                self._desk.refused(copy, outcome.sentence)
            case Verdict.KILLED | Verdict.RETRY if self._desk.epoch is None:
                copy.rest(State.OFF, "ended: the state of this node changed")
            case Verdict.INCOMPLETE:
                # The next pass must find what vanished gone, or copy it; it comes in a second.
                log.info("volume %s: %s", self._desk.name_of(copy.uuid), outcome.sentence)
                copy.rest(State.IDLE, outcome.sentence)
                self._desk.retry(copy.uuid, 1)
            case _:
                self._desk.failed(copy, outcome.sentence)


def _mark(uuid: str, found: Found, outcome: PassOutcome, *, full: bool) -> Mark:
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


def _dense(uuid: str, found: Found) -> DenseFiles:
    """What the source told of large files; without it their copying takes longer."""
    try:
        return read_dense(found.scratch / dense_name(uuid))
    except (DenseError, OSError) as error:
        log.warning("volume %s: the source's list of large files: %s", found.here.name, error)
        return NOTHING_DENSE

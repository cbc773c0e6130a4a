"""All of one node's replication: which side it is on now, and what it tells and is told.

The decisions are the core's: `follow` takes which way the data may flow after each turn. Towards
the peer, `serving` runs; from the peer, `fetching`; else neither, and `stop_receivers` proves that
nothing of this node receives any more. What the other node must know (its volumes, its marks)
travels as one blob of JSON that the daemon carries both ways.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from nfsha.config import IPAddress, Settings
from nfsha.core.model import Epoch, FinalChanged, PresyncChanged, ReplicaChanged
from nfsha.core.replication import Fetch, Finish, Flow, Offer, Rest
from nfsha.replica import exchange, forgetting
from nfsha.replica.clocks import Clocks
from nfsha.replica.content.questions import Answering
from nfsha.replica.exchange import ExchangeError
from nfsha.replica.fetching.estimate import Estimating
from nfsha.replica.fetching.fetching import END_WITHIN_S, Fetching
from nfsha.replica.fetching.schedule import Cause, Kind, Reason
from nfsha.replica.forgetting import NotForgottenError
from nfsha.replica.handover.receiving import Receiving
from nfsha.replica.overview import FETCHES, Overview
from nfsha.replica.quarantines import Quarantines
from nfsha.replica.rsync import rsync_version
from nfsha.replica.rsync.arguments import From
from nfsha.replica.rsync.child import end_leftovers
from nfsha.replica.source.serving import Serving
from nfsha.replica.source.source import RSYNC, Source, epoch_token
from nfsha.replica.volume import volumes
from nfsha.replica.volume.facts import VolumeError, VolumeFacts
from nfsha.replica.volume.inventory import Inventory
from nfsha.replica.volume.marks import Mark, MarksError, MarkStore, wholeness

log = logging.getLogger(__name__)

HELD_WITHIN_S = 2.0
"""So long may the end of what receives take while clients are held by a handover: a process that
hangs in a dead disk then ends the handover, and the giver serves again."""

LOOK_EVERY_S = 5.0
"""How often the filesystems are looked at while nothing else asks."""

TOLD_WITHIN_S = 5.0
"""A peer that is heard tells its volumes in a fraction of this; and ours are seen in less."""

_UNTOLD = (
    f"the other node has not told its volumes within {TOLD_WITHIN_S:.0f} s: `nfsha status` says "
    "whether it is heard"
)

Facts = dict[str, Any]


class ReplicaError(Exception):
    """What an operator asked cannot be done; the text says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Ends:
    """The two addresses that the data takes."""

    here: IPAddress
    there: IPAddress


class Replicator:
    """The replication of this node."""

    def __init__(
        self,
        settings: Settings,
        secret: bytes,
        ends: Ends,
        *,
        clock_ms: Callable[[], int],
        report: Callable[[ReplicaChanged | PresyncChanged | FinalChanged], None],
        tell: Callable[[Facts], None],
        watch: Callable[[asyncio.Task[None]], None],
    ) -> None:
        """`report` gives the core what it must know; `tell` carries facts to the other node."""
        self._settings = settings
        self._secret = secret
        self._ends = ends
        self._clock_ms = clock_ms
        self._report = report
        self._tell = tell
        self._watch = watch
        clocks = Clocks(clock_ms, time.time_ns)
        runtime, state = settings.paths.runtime, settings.paths.state
        self.inventory = Inventory(settings.nfs.root, clock_ms)
        self.store = MarkStore(state / "marks")
        self.source = Source(
            runtime / "source", ends.here, settings.sync.port, ends.there, clock_ms
        )
        self.serving = Serving(
            self.inventory,
            self.source,
            state / "changes",
            token=lambda epoch: epoch_token(secret, epoch),
            clocks=clocks,
            max_changed_folders=settings.sync.max_changed_folders,
            changed=self._changed,
        )
        self.fetching = Fetching(
            settings.sync,
            self.inventory,
            self.store,
            runtime / "fetch",
            source=self._source_of,
            clocks=clocks,
            watch=watch,
            changed=self._changed,
        )
        self.receiving = Receiving(
            self.fetching,
            settings.handover.max_stall_ms,
            parallel=settings.sync.parallel,
            clocks=clocks,
            name_of=self.inventory.name_of,
            marks=lambda: self.store.own,
            report=report,
            watch=watch,
        )
        self.estimating = Estimating(
            self.fetching.proving.list_ahead,
            self.fetching.proving.look_ahead,
            parallel=settings.sync.parallel,
            clocks=clocks,
            watch=watch,
        )
        self.answering = Answering(self.source.public)
        self.quarantines = Quarantines(self.inventory, settings.sync, clock_ms)
        self.overview = Overview(
            self.inventory,
            self.store,
            self.fetching,
            self.serving,
            self.quarantines,
            lambda: self._flow,
        )
        self._flow: Flow = Rest("the daemon is starting")
        self._epoch: Epoch | None = None
        self._reported: ReplicaChanged | None = None
        self._told: Facts | None = None
        self._refused = ""
        self._bell = asyncio.Event()
        self._known = asyncio.Event()
        self._serving_task: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[str] | None = None
        self._conductor: asyncio.Task[None] | None = None

    # ------------------------------------------------------------- life

    async def start(self) -> None:
        """Kills what a former run left behind, and begins to look at the volumes.

        Raises ReplicaError when rsync is missing or cannot do what a copy needs.
        """
        for left in await end_leftovers():
            log.warning("a process of a former run was still there: %s", left)
        for folder in (self._settings.paths.state / "changes", self._settings.paths.runtime):
            await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        found = await rsync_version.check(RSYNC)
        if found.refused:
            raise ReplicaError(found.refused)
        self.overview.rsync, self.overview.warnings = found.version, found.warnings
        for warning in found.warnings:
            log.warning("%s", warning)
        try:
            lost = await asyncio.to_thread(self.store.load)
        except MarksError as error:
            raise ReplicaError(str(error)) from error
        for trouble in lost:
            log.error("%s", trouble)
        self.fetching.start()
        self._conductor = asyncio.ensure_future(self._conduct())
        self._watch(self._conductor)

    async def close(self) -> None:
        """Ends everything; no process is left when it returns."""
        if self._conductor is not None:
            self._conductor.cancel()
            await asyncio.wait([self._conductor])
        await self.estimating.close()
        await self.fetching.stop()
        await self._end_serving()

    # ------------------------------------------------------------- which way

    def follow(self, flow: Flow, epoch: Epoch | None) -> None:
        """Takes which way data may flow, after each turn; cheap when nothing changed."""
        if flow == self._flow and epoch == self._epoch:
            return
        before, self._flow = self._flow, flow
        self._known.clear()
        moved = epoch != self._epoch
        self._epoch = epoch
        if not _same_side(before, flow):
            # At once, not in the conductor's next round: what may not run any more is killed now.
            if isinstance(before, FETCHES):
                self.fetching.let(start=False)
                self._end_fetching(HELD_WITHIN_S if isinstance(before, Finish) else END_WITHIN_S)
            if self._serving_task is not None:
                self._serving_task.cancel()
        elif isinstance(flow, Fetch):
            self.fetching.let(start=flow.start)
        self.receiving.follow(flow)
        if moved:
            self._changed()
        self._bell.set()

    async def stop_receivers(self) -> str:
        """Ends all that receives, and proves it gone; returns what is stuck, or ""."""
        self._end_fetching()
        return await self._ended()

    async def come_to_rest(self) -> str:
        """Puts all on the disk and waits until nothing writes; returns why it cannot, or ""."""
        if self.serving.epoch is None:
            return "the volumes are not offered yet"
        return await self.serving.come_to_rest()

    def _end_fetching(self, within_s: float = END_WITHIN_S) -> None:
        if self._ending is None or self._ending.done():
            self._ending = asyncio.ensure_future(self.fetching.end(within_s))
            self._ending.add_done_callback(_log_failure)

    async def _ended(self) -> str:
        """Waits for the end of all that receives; a second one waits for the same."""
        ending = self._ending
        return await asyncio.shield(ending) if ending is not None else ""

    async def _end_serving(self) -> None:
        task, self._serving_task = self._serving_task, None
        if task is not None:
            if not task.cancelling():  # a second time would break off the end of the first
                task.cancel()
            # Not `await task`: its end and the cancelling of who waits here would look alike.
            await asyncio.wait([task])

    async def _conduct(self) -> None:
        """Looks at the volumes from time to time, and keeps the side that runs the right one."""
        while True:
            self._bell.clear()
            await self._take_sides()
            if not isinstance(self._flow, Offer):  # `serving` looks by itself
                await self.inventory.look()
            await self._pair_up()
            await self._name_volumes()
            self.fetching.follow_volumes()
            if isinstance(self._flow, Fetch) and self.inventory.there is not None:
                self._known.set()
            self._changed()
            await self.quarantines.keep()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._bell.wait()

    async def _take_sides(self) -> None:
        flow = self._flow
        ending = self._serving_task is not None and self._serving_task.cancelling()
        if not isinstance(flow, Offer) or self.serving.epoch not in (None, flow.epoch) or ending:
            await self._end_serving()
        if not isinstance(flow, FETCHES) or self.fetching.epoch not in (None, flow.epoch):
            self._end_fetching()
            if await self._ended():
                return  # something may still write: nothing begins before it is gone
        if flow != self._flow:
            return  # it changed meanwhile: the bell has rung
        if isinstance(flow, Offer) and self._serving_task is None:
            if self.store.tainted:  # an operator made this data the truth, whatever it is
                await self._remember(self.store.untaint)
            self._serving_task = asyncio.ensure_future(self.serving.run(flow.epoch))
            self._watch(self._serving_task)
        if isinstance(flow, Fetch):
            if flow.proved:
                await self._stamp_proved(flow.epoch)
            self._fetch(flow)

    async def _stamp_proved(self, epoch: Epoch) -> None:
        """Marks the volumes that a handover proved equal as complete copies of its epoch.

        Those that bear the newest of this node's own stamps: it was the giver. One that was not
        offered then bears an older one, and is resynced.
        """
        await self.inventory.look()
        own = [one.stamp for one in self.inventory.here if one.stamp is not None]
        given = max(
            (
                stamp
                for stamp in own
                if stamp.authority is self._settings.role and stamp.number < epoch.number
            ),
            key=lambda stamp: stamp.number,
            default=None,
        )
        for one in self.inventory.here:
            if one.identity is None or one.stamp is None or one.stamp != given:
                continue
            try:
                before = self.store.peer.get(one.identity)
                mark = _given_mark(one, epoch, before.files if before is not None else 0)
                await asyncio.to_thread(self.store.put_own, mark)
                await asyncio.to_thread(volumes.write_stamp, one, epoch)
            except (VolumeError, MarksError, OSError) as error:
                log.warning("volume %s is resynced, for it cannot be marked: %s", one.name, error)
        await self.inventory.look()

    def _fetch(self, flow: Fetch) -> None:
        came = self.fetching.epoch != flow.epoch
        if came:
            self.fetching.begin(flow.epoch)
        self.fetching.let(start=flow.start)
        if came and flow.start and not flow.proved:  # who holds the same data can wait
            self.fetching.start_all()

    def _source_of(self, epoch: Epoch) -> From:
        token = epoch_token(self._secret, epoch)
        return From(str(self._ends.there), self._settings.sync.port, token, str(self._ends.here))

    async def _pair_up(self) -> None:
        """Gives an empty volume here the identity of the source's volume of the same name."""
        if not isinstance(self._flow, FETCHES):
            return
        for pair in self.inventory.pairs():
            here, there = pair.here, pair.there
            if here is None or there is None or there.identity is None:
                continue
            if here.identity is None and here.empty and not here.failing:
                await self._adopt(here, there.identity, pair=False)

    async def _name_volumes(self) -> None:
        """Keeps what volumes are called, for the day when one of them is missing."""
        known = self.store.own.keys() | self.store.peer.keys()
        called = {one.identity: one.name for one in self.inventory.here if one.identity in known}
        if called.items() - self.store.names.items():
            await self._remember(self.store.put_names, called)

    async def _adopt(self, here: VolumeFacts, uuid: str, *, pair: bool) -> None:
        try:
            await asyncio.to_thread(volumes.write_identity, here, uuid, pair=pair)
        except (VolumeError, OSError) as error:
            log.warning("volume %s is not paired: %s", here.name, error)
            return
        log.info("volume %s is paired with that of the other node (%s)", here.name, uuid)
        await self.inventory.look()

    # ------------------------------------------------------------- what is told

    def _changed(self) -> None:
        """Tells the core and the other node what is new."""
        found = self._replica()
        if found is not None and found != self._reported:
            self._reported = found
            self._report(found)
        facts = self._own_facts()
        if facts != self._told:
            self._told = facts
            self._tell(facts)

    def _replica(self) -> ReplicaChanged | None:
        if self.inventory.looked_ms is None:
            return None
        stamp = self.inventory.newest_stamp()
        if self._epoch is None:
            return ReplicaChanged(False, "no epoch is known yet", stamp is not None, None, stamp)
        whole, why = self._wholeness(self._epoch)
        return ReplicaChanged(whole, why, stamp is not None, self._epoch, stamp)

    def _wholeness(self, epoch: Epoch) -> tuple[bool, str]:
        if self.inventory.trouble:
            return False, self.inventory.trouble
        missing = [uuid for uuid in self.store.own if self.inventory.by_uuid(uuid) is None]
        if missing:
            called = ", ".join(self.store.names.get(uuid, uuid) for uuid in missing)
            return False, (
                f"a volume that was copied is not mounted here: {called} (if it was removed for "
                "good: `nfsha volumes forget`)"
            )
        return wholeness(
            self.overview.paired(),
            self.store,
            epoch,
            time.time_ns(),
            self._settings.sync.max_data_age_ms,
        )

    def _own_facts(self) -> Facts:
        asked = self.fetching.asking.as_json()
        return {
            **exchange.own_facts(self.inventory.here, self.store, asked),
            "held": self.overview.held(),
        }

    @property
    def parallel(self) -> int:
        """So many passes run side by side."""
        return self._settings.sync.parallel

    async def heard(self, facts: object) -> None:
        """Takes the other node's facts. What is malformed changes nothing, and is logged once."""
        try:
            told = await asyncio.to_thread(exchange.read_node, facts)
        except ExchangeError as error:
            if str(error) != self._refused:
                log.warning("the other node's facts are refused: %s", error)
            self._refused = str(error)
            return
        self._refused = ""
        self.inventory.hear(told.volumes)
        self.overview.taints_there = told.tainted
        if isinstance(self._flow, Offer):
            await self._remember(self.store.put_peer, told.marks)
            await self._name_volumes()
            self.serving.acknowledge(
                {mark.volume: (mark.changes_id, mark.changes_seq) for mark in told.marks}
            )
            await self.answering.heard(told.questions, self.inventory.by_uuid)
        self._bell.set()

    async def _remember(self, call: Callable[..., None], *args: object) -> None:
        """Writes a mark or a taint that nothing rests on now: a full disk is only worth a line."""
        try:
            await asyncio.to_thread(call, *args)
        except MarksError as error:
            log.warning("%s", error)

    # ------------------------------------------------------------- before a handover

    async def look(self) -> None:
        """Looks at the volumes now, and tells what is new."""
        await self.inventory.look()
        self._changed()

    # ------------------------------------------------------------- for operators

    def chosen(self, name: str | None) -> list[str]:
        """The identities of the named volume, or of all that are copied here. ReplicaError."""
        if not isinstance(self._flow, Fetch) or not self._flow.start:
            raise ReplicaError(f"nothing is copied to this node now: {self.overview.why_not()}")
        if name is None:
            return list(self.fetching.copies)
        one = self.inventory.by_name(name)
        if one is None or one.identity not in self.fetching.copies:
            raise ReplicaError(f"there is no paired volume {name!r} here: see `nfsha volumes`")
        return [one.identity]

    def why_no_look_ahead(self) -> str:
        """Why nobody can say here what a pass would do; "" where the volumes can be looked at."""
        if not isinstance(self._flow, Fetch) or not self._flow.start:
            return self.overview.why_not()
        return ""

    async def sync(
        self,
        name: str | None,
        *,
        full: bool = False,
        verify: bool = False,
        accept_deletes: str | None = None,
        wait: bool = False,
    ) -> list[asyncio.Task[bool]]:
        """Asks for a pass of one volume, or of all; with `wait`, what is done as each has ended.

        A daemon that has just begun to fetch waits for the list of what there is to fetch.
        """
        if isinstance(self._flow, Fetch) and self._flow.start:
            await self._know_the_volumes()
        chosen = self.chosen(name)
        if self.fetching.schedule.paused:
            raise ReplicaError("passes are paused: `nfsha sync --resume` lets them go on")
        if accept_deletes is not None:
            self._accept(chosen, accept_deletes)
        kind = Kind.VERIFY if verify else Kind.FULL if full else Kind.ORDINARY
        reason = Reason(Cause.COMMAND, kind)
        schedule = self.fetching.schedule
        if wait:
            return [asyncio.ensure_future(schedule.make(uuid, reason)) for uuid in chosen]
        for uuid in chosen:
            schedule.trigger(uuid, reason)
        return []

    async def _know_the_volumes(self) -> None:
        if not await _within(self._known.wait()) and isinstance(self._flow, Fetch):
            raise ReplicaError(_UNTOLD)

    async def seen(self) -> None:
        """Waits until the volumes here were looked at: a daemon that has just begun knows none.

        Raises ReplicaError when that takes too long.
        """
        if not await _within(self.inventory.looked.wait()):
            raise ReplicaError(f"the volumes are not looked at yet: {self.inventory.trouble}")

    async def _both_seen(self) -> None:
        await self.seen()
        if not await _within(self.inventory.told.wait()):
            raise ReplicaError(_UNTOLD)

    def _accept(self, chosen: Sequence[str], accepted: str) -> None:
        for uuid in chosen:
            copy = self.fetching.copies[uuid]
            if copy.plan is not None and copy.plan.hash == accepted:
                copy.accepted = accepted
                return
        raise ReplicaError(
            f"no held deletions have the plan {accepted!r} now: `nfsha volumes` names the plan"
        )

    def results(self, chosen: Sequence[str]) -> list[Facts]:
        """How the copies of these volumes stand."""
        return [
            {"name": self.inventory.name_of(uuid), "state": str(copy.state), "why": copy.why}
            for uuid in chosen
            if (copy := self.fetching.copies.get(uuid)) is not None
        ]

    def pause(self, *, on: bool) -> None:
        """Holds all scheduled passes back, or lets them go on. ReplicaError on the source."""
        if isinstance(self._flow, Offer):
            raise ReplicaError("this node serves, passes run on the other node: pause them there")
        if on:
            self.fetching.schedule.pause()
        else:
            self.fetching.schedule.resume()

    async def set_bandwidth(self, kib_s: int | None, *, default: bool) -> None:
        """Limits each transfer from now on; None: not at all."""
        await self.fetching.set_bandwidth(kib_s, default=default)

    async def pair(self, name: str) -> str:
        """Pairs a volume here, which may hold data, with the other node's of the same name."""
        await self._both_seen()
        here = self.inventory.by_name(name)
        there = next((one for one in self.inventory.there or () if one.name == name), None)
        if here is None or there is None:
            raise ReplicaError(f"there is no volume {name!r} on both nodes: see `nfsha volumes`")
        if here.identity is not None and here.identity == there.identity:
            return f"volume {name} is paired already"
        if there.identity is None:
            raise ReplicaError(
                f"the other node's volume {name!r} has no identity yet: it gets one once that node "
                "serves"
            )
        if here.identity is not None:
            raise ReplicaError(
                f"volume {name!r} bears another identity here: it belonged to another pair. If its "
                f"data may go to quarantine, remove {here.path}/.nfsha-volume and repeat"
            )
        await self._adopt(here, there.identity, pair=True)
        self._bell.set()
        return f"volume {name} is paired: what lies there goes to quarantine as it is replaced"

    async def forget(self, wanted: str) -> str:
        """Forgets a volume that was removed for good, by its name or UUID; says what that was."""
        await self._both_seen()
        await self.inventory.look()
        try:
            uuid = forgetting.choose(wanted, self.inventory, self.store)
        except NotForgottenError as error:
            raise ReplicaError(str(error)) from error
        called = self.store.names.get(uuid, "without a name")
        try:
            found = await asyncio.to_thread(
                forgetting.forget, uuid, self.store, self._settings.paths.state / "changes"
            )
        except MarksError as error:
            raise ReplicaError(f"{error}; mend that, and repeat") from error
        words = f"volume {called} ({uuid}) is forgotten: {', '.join(found) or 'nothing was left'}"
        log.warning("%s", words)
        self._changed()
        return words


def _same_side(one: Flow, other: Flow) -> bool:
    if isinstance(one, Rest) or isinstance(other, Rest):
        return isinstance(one, Rest) and isinstance(other, Rest)
    return isinstance(one, Offer) is isinstance(other, Offer) and one.epoch == other.epoch


def _given_mark(one: VolumeFacts, epoch: Epoch, files: int) -> Mark:
    """The proof of a handover is a complete sync, of this moment."""
    return Mark(
        volume=one.identity or "",
        epoch=epoch,
        started_ns=time.time_ns(),
        files=files,
        bytes=one.used_bytes,
        transferred_bytes=0,
        deletions=0,
        duration_ms=0,
        walk="handover",
        changes_id="",
        changes_seq=0,
    )


def _log_failure(task: asyncio.Task[str]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the passes could not be ended: %s", error)


async def _within(waiting: Coroutine[Any, Any, object]) -> bool:
    """Whether what is waited for came in time."""
    try:
        async with asyncio.timeout(TOLD_WITHIN_S):
            await waiting
    except TimeoutError:
        return False
    return True

"""The passive node's side: which volumes are copied, when, and whether a pass may run at all.

A pass of one volume is `passing`'s, a verify `verifying`'s. Who may run is not decided here
(`nfsha.core.replication`): `begin`, `let` and `end` tell.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from nfsha.config import Sync
from nfsha.core.model import Epoch
from nfsha.replica.clocks import Clocks
from nfsha.replica.fetching.copying import Copy, State
from nfsha.replica.fetching.desk import Desk
from nfsha.replica.fetching.finding import Finding
from nfsha.replica.fetching.guards import TROUBLES, RefusedError
from nfsha.replica.fetching.passing import Passing
from nfsha.replica.fetching.proving import Proving
from nfsha.replica.fetching.schedule import Cause, Kind, Plan, Reason, Schedule
from nfsha.replica.fetching.sparing import Sparing
from nfsha.replica.fetching.verifying import Verifying
from nfsha.replica.rsync.arguments import From
from nfsha.replica.volume.inventory import Inventory
from nfsha.replica.volume.marks import MarkStore

END_WITHIN_S = 5.0
"""So long may what was killed take to be gone, a process or a thread that writes: then it is stuck,
in a dead disk."""


class Fetching(Desk):
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
        self.schedule = Schedule(
            self._run, parallel=sync.parallel, watch=watch, since_ms=self._since_ms
        )
        super().__init__(
            sync, inventory, store, scratch, source=source, clocks=clocks, changed=changed,
            retry=self.schedule.retry,
        )  # fmt: skip
        self._late: dict[str, Reason] = {}
        self.may_start = False
        self.finding = Finding(self)
        self._passing = Passing(self, self.finding)
        self._verifying = Verifying(self, self.finding, self._passing)
        self.proving = Proving(self, self.finding, self._passing)
        self.sparing = Sparing(self)

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
        deadline_s = asyncio.get_running_loop().time() + within_s
        self.epoch = None
        self.may_start = False
        self._late.clear()
        stuck = await self.under_way.end(deadline_s, self.name_of)
        left = await self.schedule.cancel()
        threads = await self.under_way.end_writes(deadline_s)
        stuck += [f"{self.name_of(uuid)}: its pass does not end" for uuid in left]
        if threads:
            stuck.append(f"{threads} threads of this process, at work on the volumes")
        return "; ".join(stuck)

    async def stop(self) -> None:
        """Ends everything for good."""
        await self.end()
        await self.schedule.stop()

    # ------------------------------------------------------------- the volumes

    def follow_volumes(self) -> None:
        """Gives each volume that may be copied its place in the schedule."""
        wanted = {
            pair.uuid: pair.name
            for pair in self.inventory.pairs()
            if pair.uuid is not None and pair.here is not None and pair.there is not None
        }
        for uuid in self.copies.keys() - wanted.keys():
            self.schedule.remove(uuid)
            del self.copies[uuid]
        for uuid in wanted:
            self._plan(uuid)

    def _plan(self, uuid: str) -> None:
        one = self.inventory.by_uuid(uuid)
        sync = self.sync
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
        return self.store.since_ms(uuid, str(kind), self.clocks.wall_ns())

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
            self.refused(copy, str(refused))
        except TROUBLES as error:
            self.failed(copy, str(error))
        except asyncio.CancelledError:
            copy.rest(State.OFF, "ended: the state of this node changed")
            raise

    async def _ordinary_or_full(self, copy: Copy, epoch: Epoch, reason: Reason) -> None:
        mark = self.store.own.get(copy.uuid)
        known = mark is not None and mark.epoch == epoch
        if reason.kind is Kind.FULL and known and not self.careful:
            # First what the journal names, so that the walk shows what it did not name.
            await self._passing.make(copy, epoch, Reason(reason.cause))
            if copy.state is not State.IDLE:
                return
            copy.state, copy.why = State.RUNNING, "a full walk"
        await self._passing.make(copy, epoch, reason)
        if self.thorough and reason.kind is Kind.FULL and copy.state is State.IDLE:
            await self._verifying.compare_changed(copy, epoch)

    async def _verify(self, copy: Copy, epoch: Epoch) -> None:
        await self._verifying.verify(copy, epoch)

    # ------------------------------------------------------------- what operators ask

    async def set_bandwidth(self, kib_s: int | None, *, default: bool = False) -> None:
        """Takes another limit (None: none); transfers that run begin again with it."""
        self.bandwidth_set = not default
        self.bandwidth_kib_s = self.sync.bandwidth_kib_s if default else kib_s
        for uuid, pull in self.under_way.pulls():
            here = self.inventory.by_uuid(uuid)
            if here is not None:
                await pull.limit_bandwidth(self.bandwidth(here))

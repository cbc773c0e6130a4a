"""Carries actions out: exactly one executor for each type of action.

An executor checks the goal, acts, and verifies; its result returns to the inbox under the action's
number. Actions on the two locks run strictly one after the other, in the order in which they were
ordered; the others stand on their own. Nothing here decides.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable

from nfsha.core import model
from nfsha.core.model import Numbered, Result
from nfsha.daemon.inbox import Inbox
from nfsha.daemon.world import World
from nfsha.host.journal import JournalError, encode_journal
from nfsha.peer.limited_log import LimitedLog
from nfsha.vip.address import LeaseResult
from nfsha.vip.freeze import FirewallError, LeaseOutcome
from nfsha.vip.rtnetlink import VipError

log = logging.getLogger(__name__)

LockAction = (
    model.AddAddress
    | model.RenewAddress
    | model.RemoveAddress
    | model.OpenService
    | model.RenewService
    | model.CloseService
    | model.ExtendLeases
)

OwnAction = (
    model.Persist
    | model.Survey
    | model.StopReceivers
    | model.Freeze
    | model.Thaw
    | model.MountVolumes
    | model.UnmountVolumes
)

MAX_LOCK_QUEUE = 64


class Executors:
    """The hands of the engine."""

    def __init__(self, world: World, inbox: Inbox, leave: Callable[[str], None]) -> None:
        self._world = world
        self._inbox = inbox
        self._leave = leave
        self._locks: deque[tuple[int, LockAction]] = deque(maxlen=MAX_LOCK_QUEUE)
        self._locks_task: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._freezing: asyncio.Future[str] | None = None
        self._log = LimitedLog(log, world.clock_ms)

    def perform(self, numbered: Numbered) -> None:
        """Starts one action; its result, if it has one, comes to the inbox."""
        action = numbered.action
        match action:
            case model.SendHeartbeat():
                self._world.links.send(action.datagram)
                self._world.replication.tick()
                self._world.clients.tick()
                self._world.locks.tick()
                self._world.nfs_facts.tick()
            case model.AskWitness():
                self._world.ask_witness()
            case model.Announce():
                self._world.announcer.announce()
            case model.Exit():
                self._after_locks(action.reason)
            case (
                model.AddAddress()
                | model.RenewAddress()
                | model.RemoveAddress()
                | model.OpenService()
                | model.RenewService()
                | model.CloseService()
                | model.ExtendLeases()
            ):
                self._lock(numbered.number, action)
            case (
                model.Persist()
                | model.Survey()
                | model.StopReceivers()
                | model.Freeze()
                | model.Thaw()
                | model.MountVolumes()
                | model.UnmountVolumes()
            ):
                self._start(numbered, self._alone(action))
            case model.TakeToken() | model.DropToken() | model.PublishRecord() | model.Fence():
                raise AssertionError(f"{type(action).__name__} without a token or fence agent")

    async def settle(self) -> None:
        """Waits until no action is under way."""
        while self._locks_task is not None or self._tasks:
            pending = [*self._tasks]
            if self._locks_task is not None:
                pending.append(self._locks_task)
            await asyncio.wait(pending)

    # ------------------------------------------------------------- each on its own

    def _alone(self, action: OwnAction) -> Awaitable[Result]:
        match action:
            case model.Persist():
                return self._persist(action)
            case model.Survey():
                return self._survey()
            case model.StopReceivers():
                return self._stop_receivers()
            case model.Freeze():
                return self._freeze()
            case model.Thaw():
                return self._thaw()
            case model.MountVolumes():
                return self._world.volumes.mount(action.epoch)
            case model.UnmountVolumes():
                return self._world.volumes.unmount(action.epoch)

    def _start(self, numbered: Numbered, work: Awaitable[Result | None]) -> None:
        self._keep(asyncio.ensure_future(self._report(numbered, work)))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._inbox.watch(task)

    async def _report(self, numbered: Numbered, work: Awaitable[Result | None]) -> None:
        result = await work
        self._inbox.put(model.Completed(numbered.number, result))

    async def _persist(self, action: model.Persist) -> Result:
        try:
            await self._world.journal.save_async(encode_journal(action.journal))
        except JournalError as error:
            self._log.warning("journal", str(error))
            return model.PersistFailed(str(error))
        return model.Persisted(action.journal)

    async def _survey(self) -> Result:
        settings = self._world.settings
        found = await self._world.announcer.survey(
            settings.vips, self._world.others(), over_ms=settings.timing.survey_ms
        )
        answered = next(iter(found.answered.values()), None)
        return model.Surveyed(found.started_ms, found.ended_ms, answered, found.heard_other)

    async def _stop_receivers(self) -> Result:
        trouble = await self._world.replication.stop_receivers()
        return model.ReceiversStopped(ok=not trouble, detail=trouble)

    async def _freeze(self) -> Result:
        self._freezing = freezing = asyncio.ensure_future(self._come_to_rest())
        await asyncio.wait([freezing])
        if freezing.cancelled():
            return model.Frozen(ok=False, detail="the freeze was ended")
        trouble = freezing.result()
        return model.Frozen(ok=not trouble, detail=trouble)

    async def _come_to_rest(self) -> str:
        # After the call that closes the service: what is written later would escape the freeze.
        while self._locks_task is not None:
            await asyncio.wait([self._locks_task])
        return await self._world.replication.come_to_rest()

    async def _thaw(self) -> Result:
        """The volumes stay writable in a freeze; so it ends with the waiting for its rest."""
        if self._freezing is not None:
            self._freezing.cancel()
        return model.Thawed(ok=True)

    # ------------------------------------------------------------- the two locks, in order

    def _lock(self, number: int, action: LockAction) -> None:
        self._locks.append((number, action))
        if self._locks_task is None:
            self._locks_task = asyncio.ensure_future(self._run_locks())
            self._inbox.watch(self._locks_task)

    async def _run_locks(self) -> None:
        try:
            while self._locks:
                number, action = self._locks.popleft()
                result = await self._on_lock(action)
                if isinstance(result, model.LeaseHeld):
                    self._inbox.put_quietly(model.Completed(number, result))
                elif result is not None:
                    self._inbox.put(model.Completed(number, result))
        finally:
            # Here, not in a callback of the task: what is ordered between would wait for ever.
            self._locks_task = None

    async def _on_lock(self, action: LockAction) -> Result | None:
        try:
            match action:
                case model.AddAddress() | model.RenewAddress() | model.RemoveAddress():
                    return await self._on_address(action)
                case model.OpenService() | model.RenewService():
                    return await self._on_service(action)
                case model.CloseService():
                    self._world.announcer.silence()
                    self._world.clients.closed()
                    self._world.locks.closed()
                    await self._world.lease.close()
                case model.ExtendLeases():
                    await self._extend(action.deadline_ms)
        except VipError as error:
            self._log.warning("address", str(error))
            return model.LeaseLost("address", str(error))
        except FirewallError as error:
            self._log.warning("firewall", str(error))
            return model.LeaseLost("service", str(error))
        return None

    async def _on_address(
        self, action: model.AddAddress | model.RenewAddress | model.RemoveAddress
    ) -> Result:
        address = self._world.address
        match action:
            case model.RemoveAddress():
                await address.remove()
                await self._world.clients.end_own()
                return model.AddressChanged(held=False)
            case model.AddAddress():
                return _lease("address", await address.add(action.deadline_ms))
            case model.RenewAddress():
                return _lease("address", await address.renew(action.deadline_ms))

    async def _on_service(self, action: model.OpenService | model.RenewService) -> Result:
        lease = self._world.lease
        if isinstance(action, model.OpenService):
            outcome = await lease.open(action.deadline_ms)
            if outcome.held:
                self._world.clients.opened()
                self._world.locks.opened()
            return _lease("service", outcome)
        return _lease("service", await lease.renew(action.deadline_ms))

    async def _extend(self, deadline_ms: int) -> None:
        """Both leases to the end of the absence; the address in whole seconds, rounded down."""
        rest_ms = deadline_ms - self._world.clock_ms()
        if rest_ms < self._world.settings.timing.address_lease_ms:
            return
        await self._world.lease.renew(deadline_ms)
        await self._world.address.extend(rest_ms // 1000, deadline_ms)

    def _after_locks(self, reason: str) -> None:
        self._keep(asyncio.ensure_future(self._leave_when_done(reason)))

    async def _leave_when_done(self, reason: str) -> None:
        while self._locks_task is not None:
            await asyncio.wait([self._locks_task])
        self._leave(reason)


def _lease(lock: str, outcome: LeaseResult | LeaseOutcome) -> Result:
    return model.LeaseHeld(lock) if outcome.held else model.LeaseLost(lock, outcome.why)

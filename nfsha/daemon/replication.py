"""Joins replication to the rest: the core's word on the way of data, the other node's facts.

`follow` is called after each turn, `tick` with each heartbeat. Where replication is off, all of it
is nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from nfsha.config import RSYNC, Settings
from nfsha.core.model import FinalChanged, Phase, PresyncChanged, ReplicaChanged
from nfsha.core.replication import flow
from nfsha.core.state import State
from nfsha.daemon.inbox import Inbox
from nfsha.nfs import v3_fence
from nfsha.peer import pages
from nfsha.peer.keys import KeyRing
from nfsha.peer.links import Links
from nfsha.peer.pages import FactsError, Pages
from nfsha.peer.wire import PageKind, Wire
from nfsha.replica.replicator import Ends, Replicator

log = logging.getLogger(__name__)


class Replication:
    """The replication of this node; `replicator` is None where somebody else replicates."""

    def __init__(
        self,
        settings: Settings,
        ring: KeyRing,
        wire: Wire,
        links: Links,
        inbox: Inbox,
        clock_ms: Callable[[], int],
    ) -> None:
        self._settings = settings
        self._inbox = inbox
        self._sessions = (0, 0)
        self._phase = Phase.STARTING
        self._takes_a_copy = False
        self._packing: asyncio.Task[None] | None = None
        self._facts: dict[str, Any] | None = None
        self._said: dict[str, Any] = {}
        self._next_facts: dict[str, Any] | None = None
        self._hearing: asyncio.Task[None] | None = None
        self._next_blob: bytes | None = None
        self.told: Mapping[str, Any] = {}
        """What the other node told last, as it came: of another process, be it a newer one."""
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []
        """Who else wants to know what the other node tells."""
        self.replicator: Replicator | None = None
        if settings.replication != RSYNC:
            return
        self._pages = Pages.over(
            links, wire, PageKind.FACTS, lambda: self._sessions, clock_ms, self._told
        )
        self.replicator = Replicator(
            settings,
            ring.sealing.secret,
            Ends(settings.sync_link.local, settings.sync_link.peer),
            clock_ms=clock_ms,
            report=self._report,
            tell=self._tell,
            watch=inbox.watch,
        )

    async def start(self) -> None:
        """Begins to look at the volumes. Raises ReplicaError where nothing could be copied."""
        if self.replicator is not None:
            await self.replicator.start()

    async def close(self) -> None:
        """Ends all that copies; no process of it is left."""
        for task in (self._packing, self._hearing):
            if task is not None:
                task.cancel()
        if self.replicator is not None:
            await self.replicator.close()

    def follow(self, state: State, now_ms: int) -> None:
        """Takes which way data may flow after this turn."""
        if self.replicator is None:
            return
        self._sessions = (state.session, state.peer_session)
        self.replicator.follow(flow(state, now_ms), state.durable.epoch)
        if state.phase is not self._phase:
            if state.phase is Phase.TAKEOVER:
                self._takes_a_copy = not state.is_authority
            if state.phase is Phase.ACTIVE and self._phase is Phase.TAKEOVER and self._takes_a_copy:
                for window in self.replicator.overview.takeover_windows():
                    log.warning("takeover: %s", window)
            self._phase = state.phase

    def tick(self) -> None:
        """With each heartbeat: pages of facts go out while the other node lacks them."""
        if self.replicator is not None:
            self._pages.tick()

    async def stop_receivers(self) -> str:
        """Ends all that receives; returns what is stuck, or ""."""
        return await self.replicator.stop_receivers() if self.replicator is not None else ""

    async def come_to_rest(self) -> str:
        """Waits until nothing writes any more, all on the disk; returns why not, or ""."""
        return await self.replicator.come_to_rest() if self.replicator is not None else ""

    def hurry(self) -> None:
        """This daemon is about to stop for good: who fetches the last changes leaves out the rest.

        Until the end of this process.
        """
        if self.replicator is not None:
            self.replicator.serving.leaving = True

    # ------------------------------------------------------------- facts, both ways

    def _report(self, changed: ReplicaChanged | PresyncChanged | FinalChanged) -> None:
        if isinstance(changed, FinalChanged) and changed.proved:
            self._inbox.watch(asyncio.ensure_future(self._prove_service(changed)))
        else:
            self._inbox.put(changed)

    async def _prove_service(self, proved: FinalChanged) -> None:
        """The data is equal: the last proof is that the server here answers v3, and refuses v4."""
        nfs = self._settings.nfs
        trouble = await v3_fence.not_fenced(
            str(nfs.check_address),
            nfs.nfs_port,
            refuses4=nfs.version4 == "refuse",
            timeout_ms=nfs.check_timeout_ms,
        )
        if trouble:
            log.warning("the handover cannot go on: %s", trouble)
            proved = replace(proved, proved=False, failed=trouble)
        self._inbox.put(proved)

    def say(self, key: str, value: object) -> None:
        """Tells the other node this too, in place of what was said under this key; None: no more.

        What JSON can carry. Nothing is told where replication is off.
        """
        if value is None:
            self._said.pop(key, None)
        else:
            self._said[key] = value
        if self._facts is not None:
            self._tell(self._facts)

    @property
    def delivered(self) -> bool:
        """Does the other node hold what was said last?"""
        packed = self._packing is None or self._packing.done()
        return self.replicator is not None and packed and self._pages.delivered

    def _tell(self, facts: dict[str, Any]) -> None:
        self._facts = facts
        self._next_facts = {**self._said, **facts}
        if self._packing is None or self._packing.done():
            self._packing = asyncio.ensure_future(self._pack())
            self._inbox.watch(self._packing)

    async def _pack(self) -> None:
        while self._next_facts is not None:
            facts, self._next_facts = self._next_facts, None
            try:
                self._pages.publish(await asyncio.to_thread(pages.pack, facts))
            except FactsError as error:
                log.error("the other node is not told of this node's volumes: %s", error)

    def _told(self, blob: bytes) -> None:
        self._next_blob = blob
        if self._hearing is None or self._hearing.done():
            self._hearing = asyncio.ensure_future(self._hear())
            self._inbox.watch(self._hearing)

    async def _hear(self) -> None:
        """One after the other, so that what was told last counts; what it replaces is left out."""
        while self.replicator is not None and self._next_blob is not None:
            blob, self._next_blob = self._next_blob, None
            try:
                facts = await asyncio.to_thread(pages.unpack, blob)
            except FactsError as error:
                log.warning("%s", error)
                continue
            if isinstance(facts, Mapping):
                self.told = facts
                for listener in self.listeners:
                    listener(facts)
            await self.replicator.heard(facts)

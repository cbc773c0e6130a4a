"""Joins the clients' connections to the rest: they travel to the other node in pages of their own.

The executors tell when the service opens and closes and when the VIPs are away; `follow` is called
after each turn, `tick` with each heartbeat. Nothing here decides.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from nfsha.config import Settings
from nfsha.core.state import State
from nfsha.daemon.inbox import Inbox
from nfsha.peer.links import Links
from nfsha.peer.pages import FactsError, Pages
from nfsha.peer.wire import PageKind, Wire
from nfsha.vip.connections import Places
from nfsha.vip.reconnect import Reconnect

log = logging.getLogger(__name__)


class Clients:
    """Who is connected: what this node sees, and what the other one told."""

    def __init__(
        self,
        settings: Settings,
        wire: Wire,
        links: Links,
        inbox: Inbox,
        clock_ms: Callable[[], int],
        may_serve: Callable[[], bool],
    ) -> None:
        self._sessions = (0, 0)
        self._inbox = inbox
        self._clock_ms = clock_ms
        self._confirmed_ms: int | None = None
        self._pages = Pages.over(
            links, wire, PageKind.CLIENTS, lambda: self._sessions, clock_ms, self._told
        )
        self._reconnect = Reconnect(
            settings.interface,
            Places(settings.vips, settings.firewall.ports),
            clock_ms,
            allowed=may_serve,
            publish=self._publish,
            watch=inbox.watch,
        )

    async def start(self, *, adopted: bool) -> None:
        """Begins; `adopted`: the VIPs that a former run left are held. Raises VipError."""
        await self._reconnect.start(adopted=adopted)

    async def close(self) -> None:
        """Ends all tasks."""
        await self._reconnect.close()

    def follow(self, state: State) -> None:
        """Takes the sessions of both nodes after each turn."""
        self._sessions = (state.session, state.peer_session)

    def tick(self) -> None:
        """With each heartbeat: pages go out while the other node lacks them."""
        self._pages.tick()
        if self._pages.fresh:
            self._confirmed_ms = self._pages.heard_ms

    def opened(self) -> None:
        """The service is open: looks who is connected, and wakes those who were elsewhere."""
        self._reconnect.opened()

    def closed(self) -> None:
        """The service is closed: wakes nobody any more."""
        self._reconnect.closed()

    async def end_own(self) -> None:
        """The VIPs are away: ends this node's own connections there."""
        await self._reconnect.end_own()

    async def facts(self) -> dict[str, Any]:
        """For `nfsha clients`."""
        facts = await asyncio.to_thread(self._reconnect.facts)
        confirmed_ms = self._confirmed_ms
        age_ms = None if confirmed_ms is None else self._clock_ms() - confirmed_ms
        facts["here"]["delivered"] = self._pages.delivered
        facts["saved"]["age_ms"] = age_ms
        return facts

    # ------------------------------------------------------------- both ways

    def _publish(self, data: bytes) -> None:
        try:
            self._pages.publish(data)
        except FactsError as error:
            log.error("the other node is not told of the clients here: %s", error)

    def _told(self, data: bytes) -> None:
        self._inbox.watch(asyncio.ensure_future(self._reconnect.heard(data)))

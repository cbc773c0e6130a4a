"""Clients that find their new server at once: who is connected, waking them, ending what is old.

While this node serves it looks every two seconds who is connected, and tells when that changed.
Once it has opened its service it sends tickles (`nfsha.vip.tickle`) to those that the server before
it had. When it has given the VIPs away it destroys its own connections there: the next time that
this node serves, an old one would answer the client for minutes instead of resetting it. Where the
kernel cannot do that, it resets them when it serves again (`nfsha.vip.local_reset`).

It must not decide who serves: it asks before each batch of tickles, and stops at a no.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from nfsha.vip import connections, local_reset, sockdiag
from nfsha.vip.connections import ClientList, ConnectionsError, Places
from nfsha.vip.sockdiag import LEFT, LISTED, DiagError, Entry, Watch
from nfsha.vip.tickle import TickleSocket

log = logging.getLogger(__name__)

_T = TypeVar("_T")

LOOK_EVERY_S: Final = 2.0
"""How often connections are listed while this node serves: 0.03 % of a core."""

TICKLE_AT_MS: Final = (0, 100, 300, 600, 1500, 3000)
"""When tickles go out, in ms from the opening. A client answers one of them each 0.5 s
(tcp_invalid_ratelimit), and its first answer goes astray while its neighbours believe that the VIP
is where it was."""

END_WITHIN_S: Final = 1.0
"""How long the way of the VIPs waits for the end of old connections: 4,096 take 0.1 s."""

_AT_ONCE: Final = 16
_PAUSE_S: Final = 0.002
"""So many tickles, and then a pause: 8,000 a second at most, and 0.5 ms of the loop at a time."""

DESTROYS: Final = "SOCK_DESTROY"
RESETS: Final = "local reset, when it serves again (the kernel lacks INET_DIAG_DESTROY)"


class Reconnect:
    """The client connections of one node. All calls are made on one loop, by one caller at a time.

    `allowed` says whether this node may serve at this moment. `publish` takes what the other node
    is to know; `watch` the tasks whose failure is the daemon's.
    """

    def __init__(
        self,
        interface: str,
        places: Places,
        clock_ms: Callable[[], int],
        *,
        allowed: Callable[[], bool],
        publish: Callable[[bytes], None],
        watch: Callable[[asyncio.Task[None]], None],
    ) -> None:
        self._interface = interface
        self._places = places
        self._clock_ms = clock_ms
        self._allowed = allowed
        self._publish = publish
        self._watch = watch
        # One thread of its own: what hangs elsewhere (a dead disk) must not hold up a release, and
        # its work is done in the order in which it was asked for.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sock-diag")
        self._sender: TickleSocket | None = None
        self._open = False
        self._period = 0
        self._watching = Watch(places)
        self._known: tuple[bytes, ...] = ()
        self._told: ClientList | None = None
        self._saved = ClientList(0)
        self._old: dict[bytes, bytes] = {}
        """Connections of an earlier time of serving that the kernel could not end, by their key."""
        self._looked_ms: int | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._means = ""
        self._trouble = ""
        self.tickles = 0
        """Sent since the start."""
        self.ended = 0
        """Connections destroyed since the start."""
        self.refused = 0
        """Lists of the other node that were none."""

    @property
    def means(self) -> str:
        """How this node ends its own connections; "" before `start`."""
        return self._means

    async def start(self, *, adopted: bool) -> None:
        """Begins. Without an adopted VIP, ends the connections that a former run left there.

        Raises VipError without the right to open raw sockets.
        """
        self._sender = TickleSocket(
            self._interface, ipv6=any(vip.version == 6 for vip in self._places.vips)
        )
        try:
            able = await self._in_thread(sockdiag.can_destroy)
        except DiagError as error:
            self._means = f"none: {error}"
        else:
            self._means = DESTROYS if able else RESETS
        log.info("connections at a VIP that was given away are ended by: %s", self._means)
        if not adopted:
            await self.end_own()

    async def close(self) -> None:
        """Ends all tasks; connections stay as they are."""
        await self._halt()
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._sender is not None:
            self._sender.close()

    # ------------------------------------------------------------- what this node does

    def opened(self) -> None:
        """The service was opened: wakes the clients that had another server, and begins to look."""
        if not self._open:
            self._period = self._clock_ms()
        self._open = True
        self._cancel()
        self._begin(self._wake(self._known))
        self._begin(self._look_on())

    def closed(self) -> None:
        """The service was closed: sends no tickle any more, and notes who was connected."""
        if not self._open:
            return
        self._open = False
        self._cancel()
        self._begin(self._look())

    async def end_own(self) -> None:
        """The VIPs are away: destroys what connections this node's kernel still has there.

        The firewall must drop what it would send: a reset now would have the client knock at a
        closed door, and wait longer before it knocks again. Takes `END_WITHIN_S` at most; what is
        not done by then is done a little later.
        """
        if self._means not in (DESTROYS, RESETS):
            return
        work = self._end_own() if self._means == DESTROYS else self._note_old()
        ending = asyncio.ensure_future(work)
        self._tasks.append(ending)
        self._watch(ending)
        await asyncio.wait([ending], timeout=END_WITHIN_S)

    async def _end_own(self) -> None:
        try:
            ended, which = await self._in_thread(sockdiag.destroy_all, self._places)
        except DiagError as error:
            self._note(str(error))
            return
        self.ended += ended
        # A daemon that was killed left them, and this one knows of them from nowhere else: if it is
        # the next that serves, they are woken as all who were connected here.
        self._known = tuple(dict.fromkeys([*self._known, *which]))
        if ended:
            log.info("%d connections of clients to the VIPs ended here", ended)

    async def _note_old(self) -> None:
        found = await self._list(LEFT)
        if found is not None:
            self._old = {entry.key: entry.connection for entry in found}

    # ------------------------------------------------------------- what the other node has

    async def heard(self, data: bytes) -> None:
        """Takes the other node's list in place of the one before; what is none is refused."""
        try:
            told = await self._in_thread(connections.decode, data, self._places)
        except ConnectionsError as error:
            self.refused += 1
            log.warning("the other node's list of clients is refused: %s", error)
            return
        self._saved = told
        if told.connections and not self._open and self._known:
            # It served after this node did: who was connected here is of no use any more.
            self._known = ()
            self._watching = Watch(self._places)
            await self._tell()

    # ------------------------------------------------------------- looking

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await self._look()

    async def _look(self) -> None:
        """Lists who is connected, and tells the other node when that changed."""
        try:
            found = await self._in_thread(self._watching.look, self._old)
        except DiagError as error:
            self._note(str(error))
            return
        self._looked_ms = self._clock_ms()
        if found is not None:
            self._known = found
        await self._tell()

    async def _list(self, states: int = LISTED) -> list[Entry] | None:
        try:
            return await self._in_thread(sockdiag.connections, self._places, states)
        except DiagError as error:
            self._note(str(error))
            return None

    async def _tell(self) -> None:
        listed = self._known[-connections.CONNECTIONS_MAX :]
        told = ClientList(self._period, listed, len(self._known))
        if told != self._told:
            self._told = told
            self._publish(await self._in_thread(connections.encode, told))

    async def _in_thread(self, work: Callable[..., _T], *args: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    # ------------------------------------------------------------- waking

    async def _wake(self, former: Sequence[bytes]) -> None:
        """Sends tickles by the schedule to those that have not come back.

        `former`: who was connected here when this node last served.
        """
        began_ms = self._clock_ms()
        for at_ms in TICKLE_AT_MS:
            await asyncio.sleep(max(0, began_ms + at_ms - self._clock_ms()) / 1000)
            targets = dict.fromkeys([*self._saved.connections, *former])
            if not targets and not self._old:
                continue
            old = await self._reset_old()
            for entry in await self._list() or ():
                if entry.key not in old:
                    targets.pop(entry.connection, None)
            if not await self._round([*targets][-connections.CONNECTIONS_MAX :]):
                return
        if self._saved.connections:
            log.info("the clients of the node before, told to connect anew: %d", self._saved.total)
        self._saved = ClientList(self._saved.period)

    async def _reset_old(self) -> dict[bytes, bytes]:
        """Resets what the kernel could not end; returns what is left of it."""
        if not self._old:
            return self._old
        there = {entry.key for entry in await self._list(LEFT) or ()}
        self._old = {key: one for key, one in self._old.items() if key in there}
        listed = [*self._old.values()]
        for start in range(0, len(listed), local_reset.AT_ONCE):
            if self._sender is None or not self._allowed():
                break
            some = listed[start : start + local_reset.AT_ONCE]
            try:
                self.ended += await self._in_thread(local_reset.reset, some, self._sender)
            except OSError as error:
                self._note(f"old connections were not reset: {error.strerror}")
        return self._old

    async def _round(self, targets: Sequence[bytes]) -> bool:
        """One tickle for each; False if this node may not any more."""
        for start in range(0, len(targets), _AT_ONCE):
            if start:
                await asyncio.sleep(_PAUSE_S)
            if self._sender is None or not self._allowed():
                return False
            sent, trouble = self._sender.send(targets[start : start + _AT_ONCE])
            self.tickles += sent
            self._note(trouble)
        return True

    # ------------------------------------------------------------- telling

    def facts(self) -> dict[str, Any]:
        """For `nfsha clients`. Takes some 10 ms for thousands of clients: for a thread."""
        looked_ms, known, saved = self._looked_ms, self._known, self._saved
        return {
            "serving": self._open,
            "here": {
                "age_ms": None if looked_ms is None else self._clock_ms() - looked_ms,
                "total": len(known),
                "clients": _by_client(known[-connections.CONNECTIONS_MAX :], self._places),
            },
            "saved": {
                "total": saved.total,
                "clients": _by_client(saved.connections, self._places),
            },
            "ends_own_by": self._means,
            "tickles": self.tickles,
            "ended": self.ended,
            "refused_lists": self.refused,
            "trouble": self._trouble,
        }

    def _note(self, trouble: str) -> None:
        if trouble and trouble != self._trouble:
            log.warning("connections of clients: %s", trouble)
        self._trouble = trouble

    # ------------------------------------------------------------- tasks

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks = [task for task in self._tasks if not task.done()]
        task = asyncio.ensure_future(work)
        self._tasks.append(task)
        self._watch(task)

    def _cancel(self) -> list[asyncio.Task[None]]:
        ending, self._tasks = self._tasks, []
        for task in ending:
            task.cancel()
        return ending

    async def _halt(self) -> None:
        for task in self._cancel():
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _by_client(listed: Sequence[bytes], places: Places) -> list[dict[str, Any]]:
    """The connections by client, VIP and port, in this order of addresses."""
    names = {port: name for name, port in places.ports.items()}
    found: dict[tuple[int, int, int, int], dict[str, Any]] = {}
    for one in listed:
        vip, port, client, client_port = connections.ends_of(one)
        entry = found.setdefault(
            (client.version, int(client), int(vip), port),
            {
                "client": str(client),
                "vip": str(vip),
                "port": port,
                "service": names.get(port, ""),
                "client_ports": [],
            },
        )
        entry["client_ports"].append(client_port)
    for entry in found.values():
        entry["client_ports"].sort()
    return [found[key] for key in sorted(found)]

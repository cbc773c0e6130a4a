"""Joins the holders of locks to the rest: they are known to both nodes, and told of each move.

The node that serves tells the other one, in pages of their own, which clients its statd watches;
that one keeps the list on its disk. A node that begins a reign tells the clients of the reigns
before, from the VIP, that their server changed, so that they claim their locks again. All of it
runs beside the service: nothing waits for it, and nothing here decides.

The executors tell when the service opens and closes; `follow` is called after each turn, `tick`
with each heartbeat.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from nfsha.config import Settings
from nfsha.core.model import Epoch
from nfsha.core.state import State
from nfsha.daemon.inbox import Inbox
from nfsha.host.clock import boot_id
from nfsha.nfs import statd
from nfsha.nfs.facts import FactsError, Fields
from nfsha.nfs.names import IPAddress, Resolver
from nfsha.nfs.nsm import TRY_AT_S, NsmError, Round, Teller
from nfsha.nfs.statd import CLIENTS_MAX, STATE_MAX, Holders
from nfsha.peer import pages
from nfsha.peer.limited_log import LimitedLog
from nfsha.peer.links import Links
from nfsha.peer.pages import Pages
from nfsha.peer.wire import PageKind, Wire
from nfsha.replica.files.durable import read_small, write_durably

log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 1.0
"""How often statd's list is looked at while this node serves."""

RECLAIM_S: Final = 90.0
"""So long a client that was told counts as a holder, whether it is back in statd's list or not:
the longest grace period of the servers (nfsd(7), ganesha-core-config(8))."""

DURABLE_WITHIN_S: Final = 1.0
"""So long the first word to clients waits for the disk."""

RETRY_S: Final = 5.0

_RECORD_MAX_BYTES: Final = 4 << 20  # two lists of names of 255 bytes, and one more


@dataclass(frozen=True, slots=True)
class Record:
    """What this node remembers: `reign` is the last one of its own, by epoch, its id, and boot.

    `mine` are the holders of that one as the other node was told, `there` those of the other
    node's last one, `pending` those that the clients of this reign's begin are.
    """

    reign: str = ""
    state: int = 0
    mine: Holders = field(default_factory=Holders)
    there: Holders = field(default_factory=Holders)
    pending: tuple[str, ...] = ()


class Locks:
    """The lock holders of one node. All calls are made on one loop."""

    def __init__(
        self,
        settings: Settings,
        wire: Wire,
        links: Links,
        inbox: Inbox,
        clock_ms: Callable[[], int],
        may_serve: Callable[[], bool],
        *,
        folders: Sequence[Path] = statd.FOLDERS,
    ) -> None:
        self._vips = settings.vips
        self._path = settings.paths.state / "lock-holders"
        self._folders = folders
        self._inbox = inbox
        self._may_serve = may_serve
        self._log = LimitedLog(log, clock_ms)
        self._sessions = (0, 0)
        self._epoch: Epoch | None = None
        self._pages = Pages.over(
            links, wire, PageKind.LOCKS, lambda: self._sessions, clock_ms, self._told
        )
        self._resolver = Resolver()
        self._names: dict[IPAddress, str] = {}
        self._record = self._written = Record()
        self._writer: asyncio.Task[None] | None = None
        self._hearing = asyncio.Lock()
        self._packed = Holders()
        self._round: Round | None = None
        self._reign: Epoch | None = None
        """The epoch for which the service is open; None while it is closed."""
        self._tasks: list[asyncio.Task[None]] = []
        self._reign_tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Reads what a former run left; what cannot be read is told, and forgotten."""
        try:
            self._record = self._written = await asyncio.to_thread(load, self._path)
        except (OSError, ValueError) as error:
            log.error(
                "the list of lock holders %s cannot be read (%s): after a move, clients that "
                "held locks before are not told",
                self._path,
                error,
            )
        self._begin(self._learn_names(), self._tasks)

    async def close(self) -> None:
        """Ends all tasks."""
        ending = [*_cancel(self._reign_tasks), *_cancel(self._tasks)]
        if self._writer is not None:
            self._writer.cancel()
            ending.append(self._writer)
        if ending:
            await asyncio.wait(ending)

    def follow(self, state: State) -> None:
        """Takes the sessions of both nodes, and the epoch, after each turn."""
        self._sessions = (state.session, state.peer_session)
        self._epoch = state.durable.epoch

    def tick(self) -> None:
        """With each heartbeat: pages go out while the other node lacks them."""
        self._pages.tick()

    def opened(self) -> None:
        """The service is open: tells who held locks before, and begins to look who does now."""
        if self._epoch is None or self._reign == self._epoch:
            return
        self._reign = self._epoch
        _cancel(self._reign_tasks)
        self._begin(self._serve(self._epoch), self._reign_tasks)

    def closed(self) -> None:
        """The service is closed: tells no client any more, and the other node once more."""
        if self._reign is None:
            return
        self._reign = self._round = None
        _cancel(self._reign_tasks)
        self._begin(self._look(), self._reign_tasks)

    # ------------------------------------------------------------- while this node serves

    async def _serve(self, epoch: Epoch) -> None:
        reign = f"{epoch.number} {epoch.id} {boot_id()}"
        if self._record.reign != reign:
            self._note(begun(self._record, reign, epoch.number))
            if self._writer is not None:  # so that no other reign begins with the same number
                await asyncio.wait([self._writer], timeout=DURABLE_WITHIN_S)
        self._begin(self._tell(self._record.pending), self._reign_tasks)
        while True:
            await self._look()
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look(self) -> None:
        """Sees who holds locks now, and tells the other node when that changed."""
        try:
            watched = await asyncio.to_thread(statd.read, self._folders)
        except OSError as error:
            self._log.warning("statd", f"the list of lock holders cannot be read: {error}")
            return
        clients = _joined(self._record.pending, watched)
        if len(clients) > CLIENTS_MAX:
            self._log.warning(
                "locks",
                f"{len(clients)} clients hold locks, and the other node knows {CLIENTS_MAX} of "
                "them: after a move the others would not be told",
            )
        mine = replace(self._record.mine, clients=clients[:CLIENTS_MAX])
        if mine == self._packed:
            return
        self._note(replace(self._record, mine=mine))
        try:
            self._pages.publish(await asyncio.to_thread(pages.pack, statd.as_json(mine)))
        except pages.FactsError as error:
            self._log.warning("pages", f"the other node is not told who holds locks: {error}")
        self._packed = mine

    async def _tell(self, clients: Sequence[str]) -> None:
        """Tells all of them; they count as holders until it is over."""
        if not clients:
            return
        loop = asyncio.get_running_loop()
        over_s = loop.time() + RECLAIM_S
        async with contextlib.AsyncExitStack() as stack:
            tellers = []
            for vip in self._vips:
                try:
                    teller = await Teller.open(vip, self._may_serve)
                except NsmError as error:
                    log.warning("clients that held locks are not told of the move: %s", error)
                    continue
                stack.callback(teller.close)
                tellers.append(teller)
            told = self._round = Round(tellers, self._record.state, self._names, self._resolver)
            log.info(
                "clients that held locks at the server before, told to claim them again: %d",
                len(clients),
            )
            self._begin(self._learn_names(), self._reign_tasks)
            await told.tell_all(clients)
        if told.tally.given_up:
            log.warning(
                "%d of %d clients that held locks did not answer within %d s: they may believe "
                "in locks that they have not",
                told.tally.given_up,
                told.tally.total,
                TRY_AT_S[-1],
            )
        await asyncio.sleep(over_s - loop.time())
        left = tuple(one for one in self._record.pending if one not in set(clients))
        self._note(replace(self._record, pending=left))

    async def _learn_names(self) -> None:
        """What the VIPs are called: some clients know their server by that only."""
        for vip in self._vips:
            name = await self._resolver.name_of(vip)
            if name:
                self._names[vip] = name

    # ------------------------------------------------------------- what the other node tells

    def _told(self, blob: bytes) -> None:
        self._begin(self._hear(blob), self._tasks)

    async def _hear(self, blob: bytes) -> None:
        async with self._hearing:  # one after the other, as they came: the last one counts
            try:
                told = statd.from_json(await asyncio.to_thread(pages.unpack, blob))
            except (pages.FactsError, FactsError) as error:
                log.warning("the other node's list of lock holders is refused: %s", error)
                return
            self._take(told)

    def _take(self, told: Holders) -> None:
        record = self._record
        if told.epoch < record.there.epoch:
            return  # of an earlier reign than what is known
        if self._reign is None:
            if told != record.there:
                self._note(heard(record, told))
            return
        # The last word of the node before: it came when this reign had begun.
        late = tuple(one for one in told.clients if one not in set(record.pending))
        if late and told.epoch < self._reign.number:
            pending = _joined(record.pending, late)[:CLIENTS_MAX]
            self._note(replace(record, pending=pending))
            self._begin(self._tell(late), self._reign_tasks)

    # ------------------------------------------------------------- the record

    def _note(self, record: Record) -> None:
        """Remembers it, and has it written."""
        self._record = record
        if self._writer is None or self._writer.done():
            self._writer = asyncio.ensure_future(self._write())
            self._inbox.watch(self._writer)

    async def _write(self) -> None:
        """Puts the newest on the disk. On a full one it goes on trying: nothing waits for it."""
        while self._written != self._record:
            record = self._record
            try:
                await asyncio.to_thread(write_durably, self._path, encode(record), mode=0o600)
            except OSError as error:
                self._log.warning("disk", f"the lock holders are not on the disk: {error}")
                await asyncio.sleep(RETRY_S)
            else:
                self._written = record

    # ------------------------------------------------------------- telling, tasks

    def facts(self) -> dict[str, Any]:
        """For `nfsha clients`."""
        record = self._record
        told = self._round.tally if self._round is not None else None
        return {
            "here": [*record.mine.clients] if self._reign is not None else [],
            "saved": [*record.there.clients] if self._reign is None else [],
            "delivered": self._pages.delivered,
            "state": record.state,
            "told": {
                "total": told.total if told else 0,
                "answered": told.answered if told else 0,
                "given_up": told.given_up if told else 0,
            },
        }

    def _begin(self, work: Coroutine[Any, Any, None], among: list[asyncio.Task[None]]) -> None:
        among[:] = [task for task in among if not task.done()]
        task = asyncio.ensure_future(work)
        among.append(task)
        self._inbox.watch(task)


def _cancel(tasks: list[asyncio.Task[None]]) -> list[asyncio.Task[None]]:
    ending = [*tasks]
    tasks.clear()
    for task in ending:
        task.cancel()
    return ending


def _joined(first: Iterable[str], second: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*first, *second]))


# --- the record ----------------------------------------------------------------------------------


def begun(before: Record, reign: str, epoch: int) -> Record:
    """A reign begins: those who held locks before, on either node, are to be told."""
    former = _joined(before.there.clients, before.mine.clients)[:CLIENTS_MAX]
    state = next_state(before, epoch)
    there = replace(before.there, clients=())
    return Record(reign, state, Holders(epoch, state, former), there, former)


def heard(before: Record, told: Holders) -> Record:
    """The other node's list: who held locks here before its reign has been told there."""
    mine = before.mine
    if told.epoch > mine.epoch:
        mine = replace(mine, clients=())
    return replace(before, mine=mine, there=told)


def next_state(before: Record, epoch: int) -> int:
    """An odd number, above all that either node has told; with both records lost, by the epoch."""
    above = max(before.state, before.there.state, 2 * epoch)
    return min(above + 1 + above % 2, STATE_MAX)


def encode(record: Record) -> bytes:
    """The record as the disk has it."""
    document = {
        "nfsha_locks": 1,
        "reign": record.reign,
        "state": record.state,
        "mine": statd.as_json(record.mine),
        "there": statd.as_json(record.there),
        "pending": [*record.pending],
    }
    return json.dumps(document, indent=1).encode()


def load(path: Path) -> Record:
    """Reads what `encode` wrote; an empty one where there is none. Raises OSError, ValueError."""
    try:
        document: object = json.loads(read_small(path, _RECORD_MAX_BYTES))
    except FileNotFoundError:
        return Record()
    names = ("nfsha_locks", "reign", "state", "mine", "there", "pending")
    fields = Fields("lock holders", document, *names)
    return Record(
        fields.text("reign"),
        fields.number("state", STATE_MAX),
        statd.from_json(fields.optional("mine", _as_it_is)),
        statd.from_json(fields.optional("there", _as_it_is)),
        fields.texts("pending", CLIENTS_MAX),
    )


def _as_it_is(document: object) -> object:
    return document

"""The progress of a move while it goes on, and its report afterwards; on both nodes.

What the receiver does travels to the giver with its facts while it works, and each node's part of
the report afterwards: both keep both parts. The report is for people, nothing rests on it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping
from typing import Any, Final

from nfsha.core import handover
from nfsha.core.handover import GIVER_ENDED
from nfsha.core.model import RECEIVING_PHASES, Phase
from nfsha.core.state import State
from nfsha.daemon.handover_track import Part, Tracker
from nfsha.daemon.inbox import Inbox
from nfsha.daemon.report_shape import GIVER, RECEIVER, sound
from nfsha.daemon.shapes import fits
from nfsha.daemon.world import World
from nfsha.host.reports import FOLDER, SIDES, ReportError, ReportStore, as_report, has_both
from nfsha.peer.limited_log import LimitedLog
from nfsha.replica.handover.receiving import Receiving
from nfsha.replica.rsync.progress import Progress

log = logging.getLogger(__name__)

Facts = dict[str, Any]

MOVE: Final = "move"
REPORT: Final = "report"
ENDS: Final = "move_ends"
"""In the facts that the nodes tell each other: how far the move is, the newest own part, and who
ends the move from here."""

TELL_EVERY_MS: Final = 400
BOTH_WITHIN_MS: Final = 3000
"""The other node's part comes in some 100 ms; without it the event goes to the log all the same."""

WORDS_WITHIN_MS: Final = 1000
"""So long a receiver whose move was ended by the giver waits to be told by whom; and so long that
node tries to tell it before it ends the move, while nobody is held."""

POLL_S: Final = 0.01

SETTLED_WITHIN_S: Final = 2.0
"""A daemon that ends waits so long until its reports are on the disk."""

ROW: Final = "report"
"""Stands in the event log where decisions have the id of their rule."""

_MOVE: Final = {
    "round": int,
    "what": str,
    "volumes": int,
    "files": int,
    "bytes": int,
    "total_bytes": (int, None),
    "eta_s": (int, None),
}
_ENDS: Final = {"n": str, "why": str}
_REPORT: Final = (
    {"id": str, "side": str, "part": GIVER},
    {"id": str, "side": str, "part": RECEIVER},
)


class Moves:
    """The moves of the service, as one daemon sees them."""

    def __init__(self, world: World, inbox: Inbox) -> None:
        self._world = world
        self._inbox = inbox
        self._replication = world.replication
        self.store = ReportStore(world.settings.paths.state / FOLDER, sound)
        self._log = LimitedLog(log, world.clock_ms)
        self._tracker = Tracker()
        self._lock = asyncio.Lock()
        self._told_ms = 0
        self._telling = False
        self._round = (0, "")
        self._progress: Facts | None = None
        self._waiting: dict[str, int] = {}
        """Reports of which the log does not know yet, and until when they wait to be whole."""
        self._state: State | None = None
        self._why = ""
        """Who ends the move from here; "" while nobody does."""
        self._words_n = ""
        """The last word of the other node that was used, or came before the move."""
        self._unsaid: tuple[Part, int] | None = None
        """A part whose end the giver has yet to explain, and how long that is waited for."""
        self._keeping: set[asyncio.Task[None]] = set()
        self._ended = False
        self._known = asyncio.Event()
        self.last_why = ""
        """Why the last move that ended here ended; "" once one was done."""

    async def start(self) -> None:
        """Reads the reports of earlier lives; says the newest own part again."""
        await asyncio.to_thread(self.store.load)
        self._known.set()
        node = self._world.settings.name
        for report in reversed(self.store.all()):
            own = [side for side in SIDES if report.get(side, {}).get("node") == node]
            if own:
                part = {"id": report["id"], "side": own[0], "part": report[own[0]]}
                self._replication.say(REPORT, part)
                break

    # ------------------------------------------------------------- each turn

    def follow(self, state: State, now_ms: int) -> None:
        """Takes the state after a turn."""
        self._state = state
        before = self._tracker.epoch
        part = self._tracker.follow(state, now_ms, time.time_ns())
        if before is None and self._tracker.epoch is not None:
            self._words_n = self._words()[0]
        if part is not None:
            self._unsaid = part, now_ms + WORDS_WITHIN_MS
        self._say_part(now_ms)
        if self._why and self._tracker.epoch is None and not handover.under_way(state, now_ms):
            self._why = ""
        if state.phase in RECEIVING_PHASES:
            self._tell(now_ms)
        elif self._telling:
            self._telling = False
            self._progress = None
            self._replication.say(MOVE, None)
        if self._waiting:
            self._log_whole(now_ms)

    async def ending(self, why: str) -> None:
        """Somebody is about to end the move from here: the reports of both nodes shall say who.

        The core only knows that it is ended. While nobody is held yet, the other node is told
        before it is; a giver has no part in the report then.
        """
        self._why = why
        if not self._holds_nobody():
            return
        self._replication.say(ENDS, {"n": secrets.token_hex(4), "why": why})
        latest_ms = self._world.clock_ms() + WORDS_WITHIN_MS
        while self._world.clock_ms() < latest_ms:
            if self._replication.delivered or not self._holds_nobody():
                return
            await asyncio.sleep(POLL_S)

    @property
    def followed(self) -> bool:
        """No move is followed any more: each was to its end, until one of the nodes served."""
        return self._tracker.epoch is None

    def _holds_nobody(self) -> bool:
        return self._state is not None and self._state.phase is Phase.ACTIVE

    def goes_on(self) -> None:
        """The move could not be ended."""
        self._why = ""
        self._replication.say(ENDS, None)

    def _words(self) -> tuple[str, str]:
        """What the other node says of who ends the move from there, and the number of that."""
        told = self._replication.told.get(ENDS)
        if isinstance(told, Mapping) and fits(told, _ENDS):
            return str(told["n"]), str(told["why"])
        return "", ""

    def _say_part(self, now_ms: int) -> None:
        """Keeps the part of a move that ended, with the word of who ended it."""
        if self._unsaid is None:
            return
        part, latest_ms = self._unsaid
        number, words = self._words()
        told = part.side == "receiver" and part.why == GIVER_ENDED and not self._why
        if told and number == self._words_n and now_ms < latest_ms:
            return
        self._unsaid = None
        facts = self._whole(part)
        if self._why and not part.done:
            facts["why"] = self._why
        elif told and number != self._words_n:
            facts["why"] = words
        self._why, self._words_n = "", number
        self.last_why = "" if part.done else str(facts["why"])
        self._keep(part.number, part.side, facts, own=True)

    async def settle(self) -> None:
        """Waits until what is known of the last move is on the disk; `SETTLED_WITHIN_S` at most.

        The daemon ends: what comes of the other node now, the next one is told again.
        """
        self._ended = True
        now_ms = self._world.clock_ms()
        self._say_part(now_ms + WORDS_WITHIN_MS)
        if self._keeping:
            await asyncio.wait(self._keeping, timeout=SETTLED_WITHIN_S)
        self._log_whole(now_ms + SETTLED_WITHIN_S * 1000 + BOTH_WITHIN_MS)

    def _tell(self, now_ms: int) -> None:
        replicator = self._replication.replicator
        if replicator is None:
            return
        counted = replicator.receiving.tally
        made = (len(counted.rounds), counted.running)
        if made == self._round and now_ms - self._told_ms < TELL_EVERY_MS:
            return
        self._telling, self._told_ms, self._round = True, now_ms, made
        running = [copy.progress for copy in replicator.fetching.copies.values()]
        self._progress = progress(replicator.receiving, running)
        self._replication.say(MOVE, self._progress)

    def progress(self, side: str | None) -> Facts | None:
        """How far the receiver's passes are, on either side; None while none is under way."""
        if side == "receiver":
            return self._progress
        told = self._replication.told.get(MOVE) if side == "giver" else None
        return dict(told) if isinstance(told, Mapping) and fits(told, _MOVE) else None

    # ------------------------------------------------------------- reports

    def _whole(self, part: Part) -> Facts:
        """With what was copied, where this node received."""
        facts = part.as_json(self._world.settings.name)
        replicator = self._replication.replicator
        if part.side == "receiver" and replicator is not None:
            facts |= replicator.receiving.tally.as_json()
        return facts

    def _keep(self, number: str, side: str, part: Mapping[str, Any], *, own: bool) -> None:
        task = asyncio.ensure_future(self._kept(number, side, part))
        self._keeping.add(task)
        task.add_done_callback(self._keeping.discard)
        self._inbox.watch(task)
        if own:
            self._replication.say(REPORT, {"id": number, "side": side, "part": dict(part)})

    async def _kept(self, number: str, side: str, part: Mapping[str, Any]) -> None:
        await self.known()  # else a part that is told early would take the place of both
        try:
            async with self._lock:
                new = await asyncio.to_thread(self.store.put, number, side, part)
        except ReportError as error:  # what the other node tells is tried with all that it tells
            self._log.warning("report", str(error))
            return
        if new:
            self._waiting.setdefault(number, self._world.clock_ms() + BOTH_WITHIN_MS)

    def heard(self, facts: Mapping[str, Any]) -> None:
        """Takes the other node's facts: its part of the newest report may be in them."""
        told = facts.get(REPORT)
        if told is None or self._ended:
            return
        if not fits(told, _REPORT):
            log.warning("the other node's report of a move is refused: it is of another form")
            return
        number, side, part = told["id"], told["side"], told["part"]
        known = self.store.get(number)
        if known is None or known.get(side) != part:
            self._keep(number, side, part, own=False)

    def _log_whole(self, now_ms: float) -> None:
        """Writes a report's line into the event log once both parts are there, or time is up."""
        for number, latest_ms in tuple(self._waiting.items()):
            report = self.store.get(number)
            if report is None or (not has_both(report) and now_ms < latest_ms):
                continue
            del self._waiting[number]
            phase = "" if self._state is None else str(self._state.phase)
            said = str(as_report(report)["summary"])
            self._world.events.append(
                at_ms=self._world.clock_ms(),
                row=ROW,
                phase=phase,
                to=phase,
                why=said,
                detail=f"nfsha events --report {number}",
            )
            log.info("%s (nfsha events --report %s)", said, number)

    async def known(self) -> None:
        """Waits until the reports of earlier lives are read: a daemon that just began has none."""
        await self._known.wait()

    def reports(self) -> list[Facts]:
        """All reports as operators see them, oldest first, without the parts of each node."""
        return [
            {key: value for key, value in as_report(one).items() if key not in SIDES}
            for one in self.store.all()
        ]

    def report(self, number: str) -> Facts | None:
        """One report, whole."""
        found = self.store.get(number)
        return None if found is None else as_report(found)


def progress(receiving: Receiving, running: list[Progress | None]) -> Facts:
    """How far the passes of a receiver are. Bytes are those of this round."""
    counted = receiving.tally
    files, size = counted.so_far()
    at_work = [one for one in running if one is not None]
    totals = [one.total_bytes for one in at_work if one.total_bytes is not None]
    left = [one.eta_s for one in at_work if one.eta_s is not None]
    return {
        "round": len(counted.rounds) + bool(counted.running),
        "what": counted.running,
        "volumes": len(running),
        "files": files + sum(one.files for one in at_work),
        "bytes": size + sum(one.bytes for one in at_work),
        "total_bytes": size + sum(totals) if totals else None,
        "eta_s": max(left) if left else None,
    }

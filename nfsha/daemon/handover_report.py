"""The progress of a move while it goes on, and its report afterwards; on both nodes.

What the receiver does travels to the giver with its facts while it works, and each node's part of
the report afterwards: both keep both parts. The report is for people, nothing rests on it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any, Final

from nfsha.core.model import RECEIVING_PHASES
from nfsha.core.state import State
from nfsha.daemon.handover_track import Part, Tracker
from nfsha.daemon.inbox import Inbox
from nfsha.daemon.shapes import fits
from nfsha.daemon.world import World
from nfsha.host.reports import FOLDER, SIDES, ReportError, ReportStore, as_report, has_both
from nfsha.replica.fetching import tally
from nfsha.replica.handover.receiving import Receiving
from nfsha.replica.rsync.progress import Progress

log = logging.getLogger(__name__)

Facts = dict[str, Any]

MOVE: Final = "move"
REPORT: Final = "report"
"""In the facts that the nodes tell each other: how far the move is, and the newest own part."""

TELL_EVERY_MS: Final = 400
BOTH_WITHIN_MS: Final = 3000
"""The other node's part comes in some 100 ms; without it the event goes to the log all the same."""

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
_GIVER: Final = {
    "node": str,
    "epoch": int,
    "to": str,
    "began_ns": int,
    "done": bool,
    "why": str,
    "took_ms": int,
    "stall_ms": (int, None),
    "stall_how": str,
    "steps": {str: int},
}
_RECEIVER: Final = {**_GIVER, **tally.SHAPE}
_REPORT: Final = (
    {"id": str, "side": str, "part": _GIVER},
    {"id": str, "side": str, "part": _RECEIVER},
)


class Moves:
    """The moves of the service, as one daemon sees them."""

    def __init__(self, world: World, inbox: Inbox) -> None:
        self._world = world
        self._inbox = inbox
        self._replication = world.replication
        self.store = ReportStore(world.settings.paths.state / FOLDER)
        self._tracker = Tracker()
        self._lock = asyncio.Lock()
        self._told_ms = 0
        self._telling = False
        self._round = (0, "")
        self._progress: Facts | None = None
        self._waiting: dict[str, int] = {}
        """Reports of which the log does not know yet, and until when they wait to be whole."""
        self._phase = ""
        self._by_operator = False

    async def start(self) -> None:
        """Reads the reports of earlier lives; says the newest own part again."""
        await asyncio.to_thread(self.store.load)
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
        self._phase = str(state.phase)
        part = self._tracker.follow(state, now_ms, time.time_ns())
        if part is not None:
            self._keep(part.number, part.side, self._whole(part), own=True)
        if self._tracker.epoch is None:
            self._by_operator = False
        if state.phase in RECEIVING_PHASES:
            self._tell(now_ms)
        elif self._telling:
            self._telling = False
            self._progress = None
            self._replication.say(MOVE, None)
        if self._waiting:
            self._log_whole(now_ms)

    def ended_by_operator(self) -> None:
        """An operator's `abort` was accepted here; the core may only know that it is ended."""
        self._by_operator = True

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
        if self._by_operator and not part.done:
            facts["why"] = "the operator ended it"
        self._by_operator = False
        replicator = self._replication.replicator
        if part.side == "receiver" and replicator is not None:
            facts |= replicator.receiving.tally.as_json()
        return facts

    def _keep(self, number: str, side: str, part: Mapping[str, Any], *, own: bool) -> None:
        self._inbox.watch(asyncio.ensure_future(self._kept(number, side, part)))
        if own:
            self._replication.say(REPORT, {"id": number, "side": side, "part": dict(part)})

    async def _kept(self, number: str, side: str, part: Mapping[str, Any]) -> None:
        try:
            async with self._lock:
                new = await asyncio.to_thread(self.store.put, number, side, part)
        except ReportError as error:
            log.warning("%s", error)
            return
        if new:
            self._waiting.setdefault(number, self._world.clock_ms() + BOTH_WITHIN_MS)

    def heard(self, facts: Mapping[str, Any]) -> None:
        """Takes the other node's facts: its part of the newest report may be in them."""
        told = facts.get(REPORT)
        if told is None:
            return
        if not fits(told, _REPORT):
            log.warning("the other node's report of a move is refused: it is of another form")
            return
        number, side, part = told["id"], told["side"], told["part"]
        known = self.store.get(number)
        if known is None or known.get(side) != part:
            self._keep(number, side, part, own=False)

    def _log_whole(self, now_ms: int) -> None:
        """Writes a report's line into the event log once both parts are there, or time is up."""
        for number, latest_ms in tuple(self._waiting.items()):
            report = self.store.get(number)
            if report is None or (not has_both(report) and now_ms < latest_ms):
                continue
            del self._waiting[number]
            said = str(as_report(report)["summary"])
            self._world.events.append(
                at_ms=now_ms,
                row=ROW,
                phase=self._phase,
                to=self._phase,
                why=said,
                detail=f"nfsha events --report {number}",
            )
            log.info("%s (nfsha events --report %s)", said, number)

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

"""The loop of the daemon: drain, decide, act; once more when something happens or time is due.

A turn is whole: the sockets are drained before any timer is looked at, one decision is made on one
snapshot, its actions are handed out in order. Only a whole turn feeds systemd's watchdog.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
from collections.abc import Callable
from typing import Final

from nfsha.core import handover, lease
from nfsha.core.engine import Decision, Engine, begin
from nfsha.core.model import (
    GIVING_PHASES,
    RECEIVING_PHASES,
    Command,
    CommandKind,
    Fired,
    Phase,
    Reply,
)
from nfsha.daemon.executors import Executors
from nfsha.daemon.handover_report import Moves
from nfsha.daemon.inbox import Inbox
from nfsha.daemon.world import World, new_session
from nfsha.host.systemd import Systemd, own_unit, stop_is_restart

log = logging.getLogger(__name__)

HAND_OVER_WITHIN_S = 40.0
"""So long a final stop may take to move the service away first: well below `TimeoutStopSec=`."""

UNHURRIED_WITHIN_S = 10.0
"""So long a final stop waits for a handover that was begun without haste, and holds nobody yet: it
may be at a walk of minutes. Then it is ended, and one in haste begins."""

POLL_S = 0.02

LEAVE_WITHIN_S = 3.0
"""A stopping daemon whose engine does not come to an end is ended after this time."""

_HELD: Final = frozenset({*GIVING_PHASES, Phase.FINAL_SYNC, Phase.RESTORING})
"""In these phases of a handover clients are held."""


class Shell:
    """One daemon: the engine, its hands, and its ears."""

    def __init__(self, world: World, inbox: Inbox, systemd: Systemd) -> None:
        self.world = world
        self.inbox = inbox
        self.systemd = systemd
        self.engine: Engine | None = None
        self.moves = Moves(world, inbox)
        self._executors = Executors(world, inbox, self._leave)
        self._left = ""
        self._replies: dict[int, asyncio.Future[Reply]] = {}
        self._next_command = 1
        self._logged_row = ""
        self._stop_task: asyncio.Task[None] | None = None

    # ------------------------------------------------------------- the loop

    async def run(self) -> str:
        """Runs until the engine lets the daemon end; returns the reason.

        Raises what a driver raises at its start, and BrokenInvariantError.
        """
        remembered = self.world.remember()
        adopted = await self.world.start()
        await self.moves.start()
        clock_ms = self.world.clock_ms
        self.engine = Engine(
            begin(
                self.world.core_config(),
                new_session(),
                clock_ms(),
                journal=remembered.journal,
                corrupt=remembered.corrupt,
                address_held=adopted,
            )
        )
        self.world.may_serve = self._may_serve
        self.world.serving = self._serving
        if remembered.corrupt:
            log.error("the journal is corrupt: %s", remembered.corrupt)
        self._listen_for_signals()
        self._turn(self.engine)
        self.systemd.ready()
        gc.collect()
        gc.freeze()  # what start-up made lives to the end: not to be walked again and again
        while not self._left:
            wait_ms = self.engine.wake_at_ms() - clock_ms()
            await self.inbox.wait(wait_ms / 1000)
            self._turn(self.engine)
        await self.moves.settle()
        await self.world.volumes.end()  # a hook that outlived the time for a stop
        await self._executors.settle()
        return self._left

    def _turn(self, engine: Engine) -> None:
        self.world.drain()
        now_ms = self.world.clock_ms()
        decision = engine.turn(self.inbox.take(), now_ms)
        for numbered in decision.actions:
            self._executors.perform(numbered)
        self._tell(decision, now_ms)
        self.world.replication.follow(decision.state, now_ms)
        self.world.clients.follow(decision.state)
        self.world.locks.follow(decision.state)
        self.moves.follow(decision.state, now_ms)
        self.world.nfs_facts.follow(decision.state, now_ms)
        self.systemd.watchdog(now_ms)

    def _may_serve(self) -> bool:
        """By the clock of now, not by that of the last turn."""
        if self.engine is None:
            return False
        now_ms = self.world.clock_ms()
        state = self.engine.state
        fresh = now_ms - state.last_turn_ms <= state.config.timings.hold_ms
        return state.serving and fresh and now_ms < lease.serve_deadline_ms(state, now_ms)

    def _serving(self) -> bool:
        return self.engine is not None and self.engine.state.serving

    def _leave(self, reason: str) -> None:
        self._left = reason
        self.inbox.ring()

    # ------------------------------------------------------------- telling

    def _tell(self, decision: Decision, now_ms: int) -> None:
        for fired in decision.fired:
            self._record(fired)
        state = decision.state
        if state.row != self._logged_row:
            known = any(fired.row == state.row for fired in decision.fired)
            self._logged_row = state.row
            if not known:
                self._record(Fired(now_ms, state.row, state.phase, state.phase, state.why))
            self.systemd.status(f"{state.phase}: {state.why}")
        for reply in decision.replies:
            waiting = self._replies.pop(reply.number, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(reply)

    def _record(self, fired: Fired) -> None:
        level = logging.INFO if fired.phase is not fired.to else logging.DEBUG
        if fired.to in (Phase.ISOLATED, Phase.FAULT, Phase.DIVERGED) and fired.phase != fired.to:
            level = logging.WARNING
        moved = f"{fired.phase} -> {fired.to}" if fired.phase is not fired.to else f"{fired.to}"
        log.log(level, "%s %s: %s (%s)", fired.row, moved, fired.why, fired.detail or "no change")
        self.world.events.append(
            at_ms=fired.at_ms,
            row=fired.row,
            phase=fired.phase,
            to=fired.to,
            why=fired.why,
            detail=fired.detail,
        )

    # ------------------------------------------------------------- commands

    async def command(self, kind: CommandKind, **options: object) -> Reply:
        """Puts a command to the engine and waits for its answer of the next turn."""
        number = self._next_command
        self._next_command += 1
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._replies[number] = answer
        self.inbox.put(Command(kind, number, **options))  # type: ignore[arg-type]
        return await answer

    def _listen_for_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_end)

    def _asked_to_end(self) -> None:
        if self._stop_task is None:
            self.systemd.stopping()
            self._stop_task = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        restart = await stop_is_restart(own_unit())
        await (self._settle_move() if restart else self._hand_over_first())
        kind = CommandKind.RESTART if restart else CommandKind.STOP
        reply = await self.command(kind)
        log.info("%s: %s", reply.row, reply.why)
        within_s = LEAVE_WITHIN_S + self.world.volumes.unmount_within_s
        await asyncio.sleep(within_s)
        if not self._left:
            log.error("the engine did not come to an end within %.0f s", within_s)
            self._leave("ended by force")

    async def _settle_move(self) -> None:
        """Before a restart: ends a handover that holds nobody yet, waits for one that does.

        So no client waits for this daemon's return: one node serves when it goes, and where that is
        this one, it keeps the address. The other one could not go on alone with the handover.
        """
        engine = self.engine
        if engine is None:
            return
        if engine.state.phase in _HELD:
            log.info("waits for the handover that is under way before it restarts")
            await self._await_handover(engine, "restart")
        elif handover.under_way(engine.state, self.world.clock_ms()):
            await self._end_move(engine, "restarted")
        await self._served_again()

    async def _end_move(self, engine: Engine, word: str, *, anew: bool = False) -> None:
        """Ends a handover because this daemon is about to go, and says so on both nodes."""
        node = self.world.settings.name
        then = "nothing has moved: repeat the command when nfsha is back there"
        if anew:
            then = "this move took too long for that, and the next one, in haste, has begun"
        await self.moves.ending(f"nfsha was {word} on {node}; {then}")
        reply = await self.command(CommandKind.ABORT)
        log.warning("ends the handover that is under way: %s (%s)", reply.why, reply.row)
        if not reply.accepted:
            self.moves.goes_on()
        await self._ends_within(engine, LEAVE_WITHIN_S)

    async def _hand_over_first(self) -> None:
        """A final stop of the serving node moves the service away, if that can be within the time.

        Else the node releases, and the other one takes over what its copy has: the log says why.
        Only where nfsha replicates: of somebody else's copies nothing is gained.
        """
        engine = self.engine
        if engine is None or not engine.state.config.replication:
            return
        if engine.state.phase in RECEIVING_PHASES:
            await self._end_move(engine, "stopped")
        if engine.state.phase not in GIVING_PHASES | {Phase.ACTIVE}:
            return
        asked_ms = self.world.clock_ms()
        self.world.replication.hurry()
        if not await self._is_joined(engine):
            reply = await self.command(CommandKind.HANDOVER, to=engine.state.me.other)
            if not reply.accepted:
                log.warning("stops without handing over first: %s (%s)", reply.why, reply.row)
                return
            log.info("hands over before it stops: %s (%s)", reply.why, reply.row)
        await self._await_handover(engine, "stop")
        await self._served_again()
        ended = engine.state.last_handover
        if ended is None or ended.at_ms < asked_ms:
            log.warning("stops without having handed over: the other node did not begin")
        elif not ended.done:
            log.warning("stops without having handed over: %s", ended.why)

    async def _is_joined(self, engine: Engine) -> bool:
        """Whether the stop can wait for a handover that was begun before.

        One that holds nobody yet, and does not come to it soon, is ended.
        """

        def stays() -> bool:
            under_way = handover.under_way(engine.state, self.world.clock_ms())
            return engine.state.phase is not Phase.ACTIVE or not under_way

        if not handover.under_way(engine.state, self.world.clock_ms()):
            return False
        log.info("waits for the handover that is under way before it stops")
        if await self._within(stays, UNHURRIED_WITHIN_S):
            return True
        await self._end_move(engine, "stopped", anew=True)
        return False

    async def _await_handover(self, engine: Engine, word: str) -> None:
        """Waits for the end of the handover; aborts it when its time is over."""
        if await self._ends_within(engine, HAND_OVER_WITHIN_S):
            return
        node = self.world.settings.name
        await self.moves.ending(f"it took too long for the {word} of nfsha on {node}")
        reply = await self.command(CommandKind.ABORT)
        log.warning("the handover takes too long for a %s: %s", word, reply.why)
        if reply.accepted:
            await self._ends_within(engine, LEAVE_WITHIN_S)
        else:
            self.moves.goes_on()

    async def _ends_within(self, engine: Engine, within_s: float) -> bool:
        def ended() -> bool:
            return not handover.under_way(engine.state, self.world.clock_ms())

        return await self._within(ended, within_s)

    async def _served_again(self) -> None:
        """Waits until one of the nodes serves after a move, so that the report is whole."""
        await self._within(lambda: self.moves.followed, LEAVE_WITHIN_S)

    async def _within(self, done: Callable[[], bool], within_s: float) -> bool:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + within_s
        while not done():
            if loop.time() >= end_s:
                return False
            await asyncio.sleep(POLL_S)
        return True

    async def close(self) -> None:
        """Ends what the shell itself started."""
        if self._stop_task is not None:
            self._stop_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._stop_task

"""The pure step, and the engine that holds the state between steps.

`decide` is a function: same state, inputs and time give the same decision. `Engine` keeps the
newest state, answers for actions that outlive their deadline, and says when the next turn is due.
Neither reads a clock, sleeps, or touches the world: the shell (`daemon`, or the simulator) does.

A turn is whole: all that has arrived is taken in first, then the table is asked, then the duties.
Only a whole turn feeds the leases in the kernel and the watchdog.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nfsha.core import duties, effects, guards, handover, invariants, model
from nfsha.core.facts import absorb
from nfsha.core.model import (
    Command,
    CoreConfig,
    Fired,
    Input,
    Journal,
    Numbered,
    Phase,
    Reply,
)
from nfsha.core.orders import OVERDUE, Orders
from nfsha.core.state import State
from nfsha.core.table import HOOK, INDEX, TURN, Row

MAX_ROWS_A_TURN = 12
"""More rows than this in one turn would be a loop in the table."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What one turn decided: the next state, actions in order, rows fired, answers."""

    state: State
    actions: tuple[Numbered, ...]
    fired: tuple[Fired, ...]
    replies: tuple[Reply, ...]


def begin(
    config: CoreConfig,
    session: int,
    now_ms: int,
    *,
    journal: Journal | None,
    corrupt: str = "",
    address_held: bool = False,
) -> State:
    """The state of a node whose daemon just started.

    `journal` is None when it is missing or corrupt (`corrupt` then says what was wrong);
    `address_held` says that the VIP of a former run stands on the interface.
    """
    known = journal if journal is not None else Journal()
    state = State(config, session, now_ms, phase_since_ms=now_ms, durable=known, want=known)
    state.journal_missing = journal is None and not corrupt
    state.journal_corrupt = corrupt
    state.address_held = address_held
    if address_held:
        state.leftover = ("address", "service") if config.service_lease else ("address",)
    # Until somebody has looked, a volume may bear a stamp: a node is blank only by a look.
    state.stamped = config.replication
    state.volumes_seen = not config.replication
    state.last_turn_ms = now_ms
    state.chain_since_ms = now_ms
    state.adopted = (
        address_held and known.active and known.boot_id == config.boot_id and state.is_authority
    )
    if config.has_hooks and state.adopted:
        state.volumes_mounted = True
    return state


def decide(state: State, inputs: Sequence[Input], now_ms: int) -> Decision:
    """One whole turn. Raises `BrokenInvariantError` when the rules contradict themselves."""
    after = state.copy()
    orders = Orders(after, now_ms)
    fired: list[Fired] = []
    replies: list[Reply] = []
    _begin_turn(after, now_ms)
    _overdue(after, now_ms)
    for what in inputs:
        if isinstance(what, Command):
            replies.append(_obey(after, what, orders, fired, now_ms))
        else:
            absorb(what, after, now_ms)
    _tell_hook(after, fired, now_ms)
    if not after.exited:
        _run_table(after, orders, fired, now_ms)
        duties.all_duties(after, orders, now_ms)
    invariants.check(after)
    return Decision(after, tuple(orders.actions), tuple(fired), tuple(replies))


def _begin_turn(state: State, now_ms: int) -> None:
    gap_ms = now_ms - state.last_turn_ms
    state.turn_gap_ms = gap_ms
    if gap_ms > 2 * state.config.timings.interval_ms:
        state.chain_since_ms = now_ms
        state.count("late_turns")
    state.last_turn_ms = now_ms


def _overdue(state: State, now_ms: int) -> None:
    """Answers for actions that outlived their deadline; their own results will be stale."""
    for slot, flight in tuple(state.flights.items()):
        if now_ms < flight.deadline_ms:
            continue
        del state.flights[slot]
        state.count(f"overdue_{slot}")
        reason = OVERDUE.get(slot, "")
        if slot == "persist":
            absorb(model.PersistFailed(reason), state, now_ms)
        elif slot in ("address", "service"):
            absorb(model.LeaseLost(slot, reason), state, now_ms)
        elif slot == "receivers":
            absorb(model.ReceiversStopped(ok=False, detail=reason), state, now_ms)
        elif slot == "freeze" and state.phase is Phase.FREEZING:
            absorb(model.Frozen(ok=False, detail=reason), state, now_ms)
        elif slot == "freeze":
            absorb(model.Thawed(ok=False, detail=reason), state, now_ms)
        elif slot == "volumes" and state.mounting:
            absorb(model.VolumesMounted(ok=False, detail=reason), state, now_ms)
        elif slot == "volumes":
            absorb(model.VolumesUnmounted(ok=False, detail=reason), state, now_ms)
        elif slot == "fence":
            absorb(model.FenceReported(off=False, detail="no end within its time"), state, now_ms)


def _obey(state: State, command: Command, orders: Orders, fired: list[Fired], now_ms: int) -> Reply:
    guard = guards.on_command(state, command, now_ms)
    row = INDEX[(state.phase, str(command.kind), guard)]
    if not row.refuses:
        state.forced = command.force
    _fire(state, row, orders, fired, now_ms)
    return Reply(command.number, not row.refuses, row.id, row.why)


def _run_table(state: State, orders: Orders, fired: list[Fired], now_ms: int) -> None:
    for _ in range(MAX_ROWS_A_TURN):
        guard = guards.TURN_GUARDS[state.phase](state, now_ms)
        row = INDEX[(state.phase, TURN, guard)]
        if row.effect is effects.nothing and row.to is None:
            _rest(state, row, now_ms)
            return
        _fire(state, row, orders, fired, now_ms)
    raise invariants.BrokenInvariantError(
        f"the table does not come to rest in {state.phase} (last row {state.row})"
    )


def _tell_hook(state: State, fired: list[Fired], now_ms: int) -> None:
    """The end of a hook has a row of its own in each phase; what follows is the turn's business."""
    if state.hook_news:
        row = INDEX[(state.phase, HOOK, guards.on_hook(state, now_ms))]
        fired.append(
            Fired(now_ms, row.id, state.phase, state.phase, row.why, _detail(state, now_ms))
        )
        state.hook_news = ""


def _rest(state: State, row: Row, now_ms: int) -> None:
    if state.row != row.id:
        state.row = row.id
        state.why = row.why
        state.row_since_ms = now_ms


def _fire(state: State, row: Row, orders: Orders, fired: list[Fired], now_ms: int) -> None:
    before = state.phase
    detail = _detail(state, now_ms)
    row.effect(state, orders, now_ms)
    if row.to is not None and row.to is not state.phase:
        state.phase = row.to
        state.phase_since_ms = now_ms
        if before is Phase.STARTING:
            state.adopted = False
    if not row.refuses:
        _rest(state, row, now_ms)
    fired.append(Fired(now_ms, row.id, before, state.phase, row.why, detail))


def _detail(state: State, now_ms: int) -> str:
    """The numbers behind a row, for the log."""
    parts = [f"epoch {state.epoch}" if state.epoch else "no epoch"]
    if state.report is not None:
        parts.append(f"peer {state.report.phase} heard {now_ms - state.heard_ms} ms ago")
    else:
        parts.append("peer not heard")
    if state.serving:
        parts.append(f"newest echo {_age(state.echo_ms, now_ms)}")
        parts.append(f"witness {_age(state.witness_ms, now_ms)}")
    if state.turn_gap_ms > 2 * state.config.timings.interval_ms:
        parts.append(f"own turn {state.turn_gap_ms} ms after the last")
    if state.lease_lost:
        parts.append(state.lease_lost)
    if state.fit is False:
        parts.append(state.fitness_reason)
    if state.handover is not None:
        parts.append(f"handover to epoch {state.handover}")
        off = handover.why_off(state, now_ms)
        parts += [off] if off else []
    parts += [words for words in (state.mount_trouble, state.unmount_trouble) if words]
    if state.repair:
        parts.append(f"taken away: {state.repair}")
    return ", ".join(parts)


def _age(at_ms: int, now_ms: int) -> str:
    return "never" if at_ms < 0 else f"{now_ms - at_ms} ms old"


class Engine:
    """Holds one node's state between turns."""

    def __init__(self, state: State) -> None:
        self.state = state

    def turn(self, inputs: Sequence[Input], now_ms: int) -> Decision:
        """Takes one whole turn. Raises ValueError when time goes backwards."""
        if now_ms < self.state.last_turn_ms:
            raise ValueError(f"time went back from {self.state.last_turn_ms} to {now_ms} ms")
        decision = decide(self.state, inputs, now_ms)
        self.state = decision.state
        return decision

    def wake_at_ms(self) -> int:
        """When the next turn is due at the latest."""
        return duties.wake_at_ms(self.state, self.state.last_turn_ms)

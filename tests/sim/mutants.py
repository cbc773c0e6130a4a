"""For each trace the simpler rule that it broke, patched into the production rules.

A mutant names the trace and what it puts back. While its `patched()` runs, functions of `nfsha` (or
of the simulated driver, where a driver's rule is meant) are replaced where they are looked up; at
the end all is as it was. Where several rules protect, the mutant removes each that does, as the
scenario's docstring tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from nfsha import config as configuration
from nfsha.config import relations
from nfsha.core import duties, effects, engine, facts, guards, lease, model
from nfsha.core.engine import Decision, begin
from nfsha.core.model import (
    CoreConfig,
    Datagram,
    Echo,
    Epoch,
    Input,
    Phase,
)
from nfsha.core.orders import Orders
from nfsha.core.state import State
from tests.sim import node as simulated
from tests.sim.arbiters import Connection, Record
from tests.sim.kernel import AddressDriver
from tests.sim.scenarios import STAYS_DOWN

Patch = pytest.MonkeyPatch
LONG_MS = 3_600_000
RECONNECT_US = 20_000


@dataclass(frozen=True, slots=True)
class Mutant:
    """One simpler rule: the trace that must catch it, what it says, and how it is put in.

    `kind` is the failure that it leads to, where that is not the one that the trace is named for.
    """

    trace: int
    name: str
    apply: Callable[[Patch], None]
    kind: str = ""

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Plays by the simpler rule inside."""
        with pytest.MonkeyPatch.context() as patch:
            self.apply(patch)
            yield


# --------------------------------------------------------------------------- parts of mutants


def _service_never_closes(patch: Patch) -> None:
    """The service's element gets no deadline worth the name: the address's lease is all."""

    def opened(deadline_ms: int) -> model.OpenService:
        return model.OpenService(deadline_ms + LONG_MS)

    def renewed(deadline_ms: int) -> model.RenewService:
        return model.RenewService(deadline_ms + LONG_MS)

    patch.setattr(effects, "OpenService", opened)
    patch.setattr(duties, "RenewService", renewed)


def _no_probe_rule(patch: Patch) -> None:
    """Nobody asks whether somebody answers for the VIP."""
    patch.setattr(lease, "vip_unanswered", lambda state, now_ms: True)


# --------------------------------------------------------------------------- the mutants


def _trace_1(patch: Patch) -> None:
    _service_never_closes(patch)
    _no_probe_rule(patch)


def _trace_2_one_probe(patch: Patch) -> None:
    _service_never_closes(patch)
    patch.setattr(simulated.Node, "survey_rounds", 1)


def _trace_2_deaf(patch: Patch) -> None:
    _service_never_closes(patch)

    def unanswered(state: State, now_ms: int) -> bool:
        return lease.survey_fresh(state, now_ms) and state.survey.answered_by is None

    patch.setattr(lease, "vip_unanswered", unanswered)


def _trace_8(patch: Patch) -> None:
    def grants(state: State) -> bool:
        return not state.serving and state.withhold_since_ms is None

    def take_evidence(state: State, datagram: Datagram, echo: Echo) -> None:
        if echo is datagram.echo and datagram.echo_grants and not datagram.serving:
            state.echo_ms = max(state.echo_ms, facts.sent_at_ms(state, echo.seq))

    def peer_serves(state: State, now_ms: int) -> bool:
        report = state.report
        return report is not None and lease.peer_heard(state, now_ms) and report.serving

    patch.setattr(lease, "grants", grants)
    patch.setattr(facts, "_take_evidence", take_evidence)
    patch.setattr(lease, "peer_serves", peer_serves)


def _trace_9_silence(patch: Patch) -> None:
    patch.setattr(duties, "withhold", lambda state, now_ms: None)


def _trace_9_fault(patch: Patch) -> None:
    patch.setattr(lease, "IDLE_PHASES", lease.IDLE_PHASES - {Phase.FAULT})


def _trace_10(patch: Patch) -> None:
    real = lease.standing_evidence

    def standing_evidence(state: State) -> str:
        journal = state.durable
        served = journal.active and journal.boot_id == state.config.boot_id
        unheard = state.peer_session == 0
        return real(state) or ("journal" if served and unheard else "")

    patch.setattr(lease, "standing_evidence", standing_evidence)


def _trace_11_witness(patch: Patch) -> None:
    real_deadline_ms, real_ask = lease.return_deadline_ms, duties.ask_witness

    def return_deadline_ms(state: State, now_ms: int) -> int:
        hold_ms = state.config.timings.hold_ms
        return max(real_deadline_ms(state, now_ms), state.witness_ms + hold_ms)

    def ask_witness(state: State, orders: Orders, now_ms: int) -> None:
        if state.phase is not Phase.ISOLATED:
            real_ask(state, orders, now_ms)
        elif now_ms - state.witness_asked_ms >= state.config.timings.interval_ms:
            orders.order(model.AskWitness())
            state.witness_asked_ms = now_ms

    patch.setattr(lease, "return_deadline_ms", return_deadline_ms)
    patch.setattr(duties, "ask_witness", ask_witness)


def _trace_11_standing(patch: Patch) -> None:
    real = lease.vip_unanswered

    def unanswered(state: State, now_ms: int) -> bool:
        return state.phase is Phase.ISOLATED or real(state, now_ms)

    patch.setattr(lease, "vip_unanswered", unanswered)


def _trace_12(patch: Patch) -> None:
    _no_probe_rule(patch)
    real_decide, real_takeover = engine.decide, guards.takeover

    def timers_first(state: State, inputs: Sequence[Input], now_ms: int) -> Decision:
        first = real_decide(state, [], now_ms)
        second = real_decide(first.state, inputs, now_ms)
        return Decision(
            second.state,
            first.actions + second.actions,
            first.fired + second.fired,
            second.replies,
        )

    def deaf_takeover(state: State, now_ms: int) -> guards.Guard:
        if state.commit_ordered:
            return real_takeover(state, now_ms)
        exclusive = lease.exclusive(state, now_ms)
        return guards.Guard.EXCLUSIVE if exclusive else guards.Guard.GATHERING

    patch.setattr(engine, "decide", timers_first)
    patch.setattr(lease, "silence_since_ms", lambda state: state.heard_ms)
    patch.setitem(guards.TURN_GUARDS, Phase.TAKEOVER, deaf_takeover)


def _trace_13(patch: Patch) -> None:
    real_obstacle = lease.takeover_obstacle

    def takeover_obstacle(state: State) -> str:
        obstacle = real_obstacle(state)
        return "" if obstacle == "unknown-to-peer" else obstacle

    def begin_free(
        config: CoreConfig,
        session: int,
        now_ms: int,
        *,
        journal: model.Journal | None,
        corrupt: str = "",
        address_held: bool = False,
    ) -> State:
        state = begin(
            config, session, now_ms, journal=journal, corrupt=corrupt, address_held=address_held
        )
        state.journal(promise=False)
        return state

    patch.setattr(simulated, "begin", begin_free)
    patch.setattr(lease, "takeover_obstacle", takeover_obstacle)


def _trace_14(patch: Patch) -> None:
    real = lease.standing_evidence

    def standing_evidence(state: State) -> str:
        own = state.record_epoch is not None and state.record_epoch == state.epoch
        return real(state) or ("record" if own else "")

    patch.setattr(lease, "standing_evidence", standing_evidence)


class ReconnectingConnection(Connection):
    """As a client library's automatic reconnection: nobody is told that the token was lost."""

    _pinging = False

    def _lost(self) -> None:
        self.open = False
        self._world.at(RECONNECT_US, self._arrive)

    def _connected(self, record: Record | None) -> None:
        if not self._pinging:
            self._pinging = True
            super()._connected(record)
        elif self._mine() and self._asked and self._broker.holder is self:
            self.open = True
            self._ping()


def _trace_15_library(patch: Patch) -> None:
    patch.setattr(simulated, "Connection", ReconnectingConnection)


def _trace_15_isolated(patch: Patch) -> None:
    real = duties._may_take_token

    def may_take_token(state: State, now_ms: int) -> bool:
        if state.phase is not Phase.ISOLATED or not state.is_authority:
            return real(state, now_ms)
        waited_ms = now_ms - state.token_tried_ms
        return state.token_since_ms is None and waited_ms >= duties.TOKEN_RETRY_MS

    patch.setattr(duties, "_may_take_token", may_take_token)


def _trace_16(patch: Patch) -> None:
    refuses = relations._check_disjoint_links
    kept = tuple(one for one in relations.RELATIONS if one.check is not refuses)
    patch.setattr(configuration, "RELATIONS", kept)


def _trace_17_told(patch: Patch) -> None:
    real_duties, real_higher = duties.all_duties, lease.higher_epoch

    def all_duties(state: State, orders: Orders, now_ms: int) -> None:
        told = state.report.epoch if state.report is not None else None
        if state.durable.epoch is None and told is not None and told.authority is state.me:
            state.journal_if(epoch=told)
        real_duties(state, orders, now_ms)

    def higher_epoch(state: State) -> Epoch | None:
        higher = real_higher(state)
        own = higher is not None and higher.authority is state.me
        return None if own and state.epoch is None else higher

    patch.setattr(duties, "all_duties", all_duties)
    patch.setattr(lease, "higher_epoch", higher_epoch)


def _trace_17_stamps(patch: Patch) -> None:
    def blank(state: State) -> bool:
        return state.journal_missing and state.durable.epoch is None

    patch.setattr(State, "blank", property(blank))


def _trace_18(patch: Patch) -> None:
    patch.setattr(AddressDriver, "rechecks", False)


MUTANTS: tuple[Mutant, ...] = (
    Mutant(1, "the address lease is all, and nobody is asked for the VIP", _trace_1),
    Mutant(2, "one probe", _trace_2_one_probe),
    Mutant(2, "a survey counts though the interface hears nobody", _trace_2_deaf),
    Mutant(8, "a taker's echo grants and is evidence", _trace_8),
    Mutant(9, "only silence ends a grant", _trace_9_silence),
    Mutant(9, "a peer in FAULT holds the takeover off for ever", _trace_9_fault),
    Mutant(10, "an adopted address is renewed at once", _trace_10),
    Mutant(11, "the gateway's answer brings a node back", _trace_11_witness),
    Mutant(11, "standing evidence needs no look at the VIP", _trace_11_standing),
    Mutant(12, "timers before sockets, and silence by the clock", _trace_12),
    Mutant(13, "a promise ends with the boot", _trace_13),
    Mutant(14, "the broker's record permits", _trace_14),
    Mutant(15, "the token reconnects by itself", _trace_15_library),
    Mutant(15, "who lost the token always takes it back", _trace_15_isolated, STAYS_DOWN),
    Mutant(16, "one link and a mere witness are taken", _trace_16),
    Mutant(17, "the peer's word stands for the own journal", _trace_17_told),
    Mutant(17, "no journal is a new node, whatever the volumes say", _trace_17_stamps),
    Mutant(18, "no look at the clock after a renewal", _trace_18),
)
"""All of them; each trace of `scenarios.SCENARIOS` has one at least."""

"""Each schedule of the handover holds, and its simpler rules are caught by it.

A mutant counts as caught only by the failure that its schedule is about; without it the same
schedule holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from nfsha.core import duties, effects, guards, handover, lease
from nfsha.core.engine import begin
from nfsha.core.guards import Guard
from nfsha.core.model import CoreConfig, Epoch, Journal, Phase
from nfsha.core.orders import Orders
from nfsha.core.state import State
from tests.sim import node as simulated
from tests.sim.checks import SimulationError
from tests.sim.handovers import FURTHER, TRACES
from tests.sim.scenarios import STAYS_DOWN, Scenario

Patch = pytest.MonkeyPatch
SCENARIOS = {scenario.play.__name__: scenario for scenario in (*TRACES.values(), *FURTHER)}

GAVE_UP_MS = 500
"""So long a giver of the simpler rules waits for the receiver."""


# --------------------------------------------------------------------------- parts of mutants


def _receiver_grants(patch: Patch) -> None:
    """A receiver's echo grants all the time, and its phase says nothing; it asks nothing back."""
    receiving = {Phase.FINAL_SYNC, Phase.RESTORING}
    patch.setattr(lease, "NO_EVIDENCE_PHASES", lease.NO_EVIDENCE_PHASES - receiving)
    patch.setattr(lease, "ABOUT_TO_SERVE", lease.ABOUT_TO_SERVE - receiving)
    patch.setattr(handover, "receiving_off", lambda state, now_ms: "")
    patch.setattr(handover, "giver_bound", lambda state, now_ms: True)


def _giver_takes_back(patch: Patch, when: Callable[[State], bool]) -> None:
    """A giver in PREPARED serves on by itself, after a while and if `when` says so."""
    real = guards.prepared

    def prepared(state: State, now_ms: int) -> Guard:
        late = now_ms - state.phase_since_ms >= GAVE_UP_MS and when(state)
        found = real(state, now_ms)
        return Guard.ABORTED if late and found is Guard.RECEIVER_WORKS else found

    patch.setitem(guards.TURN_GUARDS, Phase.PREPARED, prepared)


# --------------------------------------------------------------------------- the mutants


def _prepared_ends_with_the_daemon(patch: Patch) -> None:
    _receiver_grants(patch)

    def begin_free(
        config: CoreConfig,
        session: int,
        now_ms: int,
        *,
        journal: Journal | None,
        corrupt: str = "",
        address_held: bool = False,
    ) -> State:
        state = begin(
            config, session, now_ms, journal=journal, corrupt=corrupt, address_held=address_held
        )
        given = state.prepared
        state.durable = state.want = Journal(state.durable.epoch)
        assert given is None or state.prepared is None
        return state

    patch.setattr(simulated, "begin", begin_free)


def _a_timeout_ends_prepared(patch: Patch) -> None:
    _receiver_grants(patch)
    _giver_takes_back(patch, lambda state: True)


def _committed_needs_no_evidence(patch: Patch) -> None:
    real_committed, real_deadline_ms = guards._restoring_committed, lease.serve_deadline_ms

    def committed(state: State, now_ms: int) -> Guard:
        return Guard.EVIDENCE if state.committed else real_committed(state, now_ms)

    def deadline_ms(state: State, now_ms: int) -> int:
        hold_ms = state.config.timings.hold_ms
        fresh = state.phase is Phase.RESTORING or now_ms - state.phase_since_ms < 2 * hold_ms
        return now_ms + hold_ms if fresh else real_deadline_ms(state, now_ms)

    patch.setattr(guards, "_restoring_committed", committed)
    patch.setattr(lease, "serve_deadline_ms", deadline_ms)


def _the_giver_takes_over_with_the_number_that_it_gave(patch: Patch) -> None:
    real = effects.new_epoch

    def new_epoch(state: State) -> Epoch:
        epoch, given = real(state), state.prepared
        return epoch if given is None else Epoch(given.number, epoch.id, epoch.authority)

    patch.setattr(effects, "new_epoch", new_epoch)


def _the_giver_is_no_replica(patch: Patch) -> None:
    real = lease.takeover_obstacle

    def obstacle(state: State) -> str:
        return "not-whole" if state.prepared is not None else real(state)

    patch.setattr(lease, "takeover_obstacle", obstacle)


def _a_receiver_that_forgot_says_nothing(patch: Patch) -> None:
    patch.setattr(handover, "disowned", lambda state, now_ms: None)


def _health_is_looked_at_later(patch: Patch) -> None:
    real = handover.receiving_off

    def receiving_off(state: State, now_ms: int) -> str:
        return "" if state.fit is False else real(state, now_ms)

    patch.setattr(handover, "receiving_off", receiving_off)


def _no_last_pass(patch: Patch) -> None:
    def final_sync(state: State, now_ms: int) -> Guard:
        return Guard.PROVED

    patch.setitem(guards.TURN_GUARDS, Phase.FINAL_SYNC, final_sync)


def _unfrozen_before_the_proof(patch: Patch) -> None:
    _receiver_grants(patch)
    _giver_takes_back(
        patch, lambda state: state.report is not None and state.report.phase is Phase.FINAL_SYNC
    )


def _ordered_is_durable(patch: Patch, phase: Phase) -> None:
    real = duties.persist

    def persist(state: State, orders: Orders, now_ms: int) -> None:
        real(state, orders, now_ms)
        if state.phase is phase:
            state.durable = state.want
            state.commit_durable_ms = now_ms

    patch.setattr(duties, "persist", persist)


def _committed_before_the_disk(patch: Patch) -> None:
    _ordered_is_durable(patch, Phase.RESTORING)


def _prepared_before_the_disk(patch: Patch) -> None:
    _ordered_is_durable(patch, Phase.PREPARED)


def _aborts_are_not_told(patch: Patch) -> None:
    """An operator's wish ends nothing: only the time limits do."""
    real = handover.receiving_off

    def receiving_off(state: State, now_ms: int) -> str:
        found = real(state, now_ms)
        return "" if found in ("the giver ended it", "the operator ended it") else found

    patch.setattr(handover, "receiving_off", receiving_off)


def _a_thaw_waits_for_the_freeze(patch: Patch) -> None:
    real = Orders.cancel

    def cancel(orders: Orders, slot: str) -> None:
        if slot != "freeze":
            real(orders, slot)

    patch.setattr(Orders, "cancel", cancel)


def _aborted_is_said_before_the_disk(patch: Patch) -> None:
    patch.setattr(duties, "_shown_aborted", lambda state: state.want.aborted)


def _prepared_holds_a_takeover_off(patch: Patch) -> None:
    patch.setattr(lease, "IDLE_PHASES", lease.IDLE_PHASES - {Phase.PREPARED})


def _only_the_own_disk_gives_back(patch: Patch) -> None:
    def prepared(state: State) -> Epoch | None:
        on_its_way = state.writing.prepared if "persist" in state.flights else None
        known = (state.want.prepared, state.durable.prepared, on_its_way, state.unsure_prepared)
        given = [one for one in known if one is not None and one.number > state.epoch_number]
        return given[0] if given else None

    patch.setattr(State, "prepared", property(prepared))


def _a_receiver_that_is_heard_is_awaited(patch: Patch) -> None:
    patch.setattr(handover, "receiver_works", lease.peer_heard)


def _silence_is_enough_in_prepared(patch: Patch) -> None:
    patch.setattr(duties, "touch", lambda state, now_ms: None)


def _the_next_number_is_free(patch: Patch) -> None:
    real = effects.new_epoch

    def new_epoch(state: State) -> Epoch:
        twin = state.copy()
        if twin.report is not None:
            twin.report = dataclasses.replace(twin.report, phase=Phase.ACTIVE)
        return real(twin)

    patch.setattr(effects, "new_epoch", new_epoch)


def _prepared_stays_frozen(patch: Patch) -> None:
    real = duties.thaw

    def thaw(state: State, orders: Orders, now_ms: int) -> None:
        if state.phase is not Phase.PREPARED:
            real(state, orders, now_ms)

    patch.setattr(duties, "thaw", thaw)


def _a_stop_waits_for_nobody(patch: Patch) -> None:
    patch.setattr(duties, "_receiver_needs_it", lambda state, now_ms: False)


def _without(patch: Patch, function: str, field: str, value: object) -> None:
    """A judgement of `handover` that does not look at this field."""
    real = getattr(handover, function)

    def blind(state: State, now_ms: int) -> bool:
        twin = state.copy()
        setattr(twin, field, value)
        return bool(real(twin, now_ms))

    patch.setattr(handover, function, blind)


def _frozen_volumes_may_be_moved_to(patch: Patch) -> None:
    _without(patch, "possible", "froze", value=False)


def _who_leaves_may_freeze(patch: Patch) -> None:
    _without(patch, "receiver_ready", "stopping", value="")


def _a_broken_service_releases_at_once(patch: Patch) -> None:
    patch.setattr(handover, "rescuable", lambda state, now_ms: False)


def _a_rescue_has_no_end(patch: Patch) -> None:
    patch.setattr(handover, "ANSWER_MS", 3_600_000)


def _a_rescue_is_not_called_off(patch: Patch) -> None:
    real = guards.active

    def active(state: State, now_ms: int) -> Guard:
        twin = state.copy()
        if state.fit:
            twin.rescue_since_ms = None
        return real(twin, now_ms)

    patch.setitem(guards.TURN_GUARDS, Phase.ACTIVE, active)


MUTANTS = (
    ("trace_3", _prepared_ends_with_the_daemon),
    ("trace_4", _a_timeout_ends_prepared),
    ("trace_5", _committed_needs_no_evidence),
    ("trace_5", _the_giver_takes_over_with_the_number_that_it_gave),
    ("trace_6", _the_giver_is_no_replica),
    ("trace_6", _a_receiver_that_forgot_says_nothing),
    ("trace_7", _health_is_looked_at_later),
    ("the_last_pass_comes_first", _no_last_pass),
    ("clients_are_held_until_the_end", _unfrozen_before_the_proof),
    ("nothing_is_shown_before_the_disk_has_it", _committed_before_the_disk),
    ("nothing_is_shown_before_the_disk_has_it", _prepared_before_the_disk),
    ("aborted_at_each_step", _aborts_are_not_told),
    ("aborted_while_the_freeze_hangs", _a_thaw_waits_for_the_freeze),
    ("the_disk_fails_at_the_commit", _aborted_is_said_before_the_disk),
    ("the_receiver_restarts_at_the_commit", _a_receiver_that_forgot_says_nothing),
    ("each_dies_at_each_step", _the_giver_is_no_replica),
    ("the_giver_is_deaf", _prepared_holds_a_takeover_off),
    ("the_givers_disk_is_full", _only_the_own_disk_gives_back),
    ("the_giver_takes_back_with_a_slow_disk", _only_the_own_disk_gives_back),
    ("the_receivers_disk_is_full", _a_receiver_that_is_heard_is_awaited),
    ("the_giver_was_cut_off", _silence_is_enough_in_prepared),
    ("the_receiver_was_cut_off", _the_next_number_is_free),
    ("a_thaw_fails_in_the_takeover", _prepared_stays_frozen),
    ("the_giver_is_stopped_in_prepared", _a_stop_waits_for_nobody),
    ("it_goes_back_before_the_thaw", _frozen_volumes_may_be_moved_to),
    ("a_restart_comes_before_the_freeze", _who_leaves_may_freeze),
    ("the_service_breaks_but_not_the_data", _a_broken_service_releases_at_once),
    ("the_data_cannot_be_fetched_any_more", _a_rescue_has_no_end),
    ("the_service_is_mended_at_once", _a_rescue_is_not_called_off),
)
KINDS: dict[Callable[[Patch], None], str] = {
    _the_giver_takes_over_with_the_number_that_it_gave: STAYS_DOWN,
    _aborted_is_said_before_the_disk: "I6",
}
"""What a mutant leads to, where that is not what its schedule is named for."""


@pytest.mark.parametrize("name", SCENARIOS)
def test_schedule_holds(name: str) -> None:
    SCENARIOS[name].play(None)


@pytest.mark.parametrize(("name", "mutant"), MUTANTS, ids=lambda one: getattr(one, "__name__", one))
def test_simpler_rule_is_caught(name: str, mutant: Callable[[Patch], None]) -> None:
    scenario: Scenario = SCENARIOS[name]
    kind = KINDS.get(mutant, scenario.kind)
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        with pytest.raises(SimulationError) as caught:
            scenario.play(kind)
    assert caught.value.invariant == kind
    scenario.play(kind)


def test_each_schedule_but_the_straight_way_has_a_simpler_rule() -> None:
    assert {name for name, _ in MUTANTS} == set(SCENARIOS) - {"the_straight_way"}

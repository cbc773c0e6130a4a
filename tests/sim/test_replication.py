"""What replication adds to the traces: schedules that the simulator found, and their simpler rules.

Each holds under the production rules; with the rule removed it is caught by what it is named for.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nfsha.core import effects, guards, lease, model
from nfsha.core.model import Phase
from nfsha.core.state import State
from tests.sim.checks import SimulationError
from tests.sim.scenarios import LOST, TraceWorld, expect
from tests.sim.world import WorldConfig

COPIED = WorldConfig(replication=True)
MS_US = 1_000
Patch = pytest.MonkeyPatch


def a_receiver_outlives_the_source(only: str | None) -> None:
    """I3: A loses power while B fetches, and the receiver takes 1.5 s to die.

    B may take over, but neither commits nor serves before nothing of it receives any more.
    """
    world = TraceWorld(COPIED, only)
    world.settle()
    world.wait(5, lambda: world.b.volumes.receiving is not None, "B fetches")
    world.b.volumes.kill_takes_us = 1500 * MS_US
    world.a.power_off()
    world.disturb()  # the bound of I9 does not hold for a receiver that is slow to die
    world.serves_within(world.b, 4, "B must take over when its receiver is gone")


def the_newer_data_has_lost_its_journal(only: str | None) -> None:
    """L: B serves as epoch 2, its system disk is restored to epoch 1, A boots beside it.

    Both journals say that A is the authority of epoch 1; only the stamps of B's volumes know
    better.
    B's look at its volumes takes a while, and all that time it must not grant.
    """
    world = TraceWorld(COPIED, only)
    world.settle()
    world.wait(5, lambda: world.b.volumes.stamp is not None, "B is a copy")
    world.a.power_off()
    world.serves_within(world.b, 3, "B must take over")
    world.run_for(2)
    world.b.power_off()
    older = next(one for one in world.b.disk.history if one.epoch and one.epoch.number == 1)
    world.b.disk.journal = older
    world.b.volumes.look_takes_us = 900 * MS_US
    world.a.power_on(100 * MS_US)
    world.b.power_on(100 * MS_US)
    for _ in range(50):
        world.run_for(0.1)
        if world.a.accepts():
            world.checks.fail(LOST, "A serves epoch 1, and B's volumes hold epoch 2")
    expect(world.a.phase() is Phase.WAITING, "A waits for the operator")


def a_node_without_a_journal_stops_cleanly(only: str | None) -> None:
    """L: as before, but B is asked to stop: its promise would let A serve the older data alone."""
    world = TraceWorld(COPIED, only)
    world.settle()
    world.wait(5, lambda: world.b.volumes.stamp is not None, "B is a copy")
    world.a.power_off()
    world.serves_within(world.b, 3, "B must take over")
    world.run_for(2)
    world.b.power_off()
    world.b.disk.journal = next(
        one for one in world.b.disk.history if one.epoch and one.epoch.number == 1
    )
    world.a.power_on(100 * MS_US)
    world.b.power_on(100 * MS_US)
    world.run_for(3)
    world.b.command(model.CommandKind.STOP)
    for _ in range(50):
        world.run_for(0.1)
        if world.a.accepts():
            world.checks.fail(LOST, "A serves epoch 1 on B's promise")


# --------------------------------------------------------------------------- the simpler rules


def _receivers_are_not_awaited(patch: Patch) -> None:
    real = guards._takeover_gathering

    def gathering(state: State, now_ms: int) -> guards.Guard:
        kept, state.receivers_stopped = state.receivers_stopped, True
        try:
            return real(state, now_ms)
        finally:
            state.receivers_stopped = kept

    patch.setattr(guards, "_takeover_gathering", gathering)


def _stamps_say_nothing(patch: Patch) -> None:
    patch.setattr(lease, "recorded_epoch", lambda state: state.record_epoch)


def _grants_before_the_look(patch: Patch) -> None:
    patch.setattr(
        lease,
        "grants",
        lambda state: (
            state.phase not in lease.NO_EVIDENCE_PHASES
            and not state.serving
            and not lease.peer_is_behind(state)
            and state.withhold_since_ms is None
        ),
    )


def _promises_whatever_it_knows(patch: Patch) -> None:
    patch.setattr(effects, "_may_promise", lambda state: not state.is_authority)


SCENARIOS = (
    a_receiver_outlives_the_source,
    the_newer_data_has_lost_its_journal,
    a_node_without_a_journal_stops_cleanly,
)
MUTANTS = (
    (a_receiver_outlives_the_source, _receivers_are_not_awaited, "I3"),
    (the_newer_data_has_lost_its_journal, _stamps_say_nothing, LOST),
    (the_newer_data_has_lost_its_journal, _grants_before_the_look, LOST),
    (a_node_without_a_journal_stops_cleanly, _promises_whatever_it_knows, LOST),
)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.__name__)
def test_scenario_holds(scenario: Callable[[str | None], None]) -> None:
    scenario(None)


@pytest.mark.parametrize(
    ("scenario", "mutant", "kind"), MUTANTS, ids=lambda one: getattr(one, "__name__", one)
)
def test_simpler_rule_is_caught(
    scenario: Callable[[str | None], None], mutant: Callable[[Patch], None], kind: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        with pytest.raises(SimulationError) as caught:
            scenario(kind)
    assert caught.value.invariant == kind
    scenario(kind)

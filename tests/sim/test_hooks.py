"""What hooks add to the traces: schedules in which a simpler rule serves what is not mounted.

Each holds under the production rules; with the rule removed it is caught by what it is named for.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nfsha.core import volumes
from nfsha.core.model import CommandKind, Phase
from nfsha.core.state import State
from tests.sim.checks import SimulationError
from tests.sim.scenarios import TraceWorld, expect
from tests.sim.world import WorldConfig

HOOKED = WorldConfig(hooks=True)
MS_US = 1_000
VOLUMES = "volumes"
STAYS_DOWN = "S"
Patch = pytest.MonkeyPatch


def settled(only: str | None) -> TraceWorld:
    world = TraceWorld(HOOKED, only)
    for node in world.nodes.values():
        node.block.takes_us = 20 * MS_US  # and nothing by chance
    world.settle()
    expect(world.a.block.mounted and not world.b.block.mounted, "A alone has it mounted")
    return world


def a_mount_takes_its_time(only: str | None) -> None:
    """A loses power, and B's mount hook takes 1.5 s: nobody serves before it is done."""
    world = settled(only)
    world.b.block.takes_us = 1500 * MS_US
    world.a.power_off()
    world.disturb()  # the bound of I9 does not hold for a slow hook
    world.serves_within(world.b, 5, "B must take over when it has mounted")
    expect(world.b.block.mounted, "B has it mounted")


def a_stopping_node_is_slow_to_unmount(only: str | None) -> None:
    """A is stopped, and its unmount hook takes 4 s: B is refused, tries again, and serves then."""
    world = settled(only)
    world.a.block.takes_us = 4000 * MS_US
    world.a.command(CommandKind.STOP)
    world.disturb()
    world.wait(8, lambda: world.tally.fired["mount-refused"] > 0, "B is refused")
    expect(world.b.phase() is Phase.TAKEOVER, "B goes on trying")
    for _ in range(80):
        world.run_for(0.1)
        if world.b.accepts():
            return
    world.checks.fail(STAYS_DOWN, "B does not serve although A gave the volumes up")


def a_node_that_fell_silent_is_cut_off_for_good(only: str | None) -> None:
    """A is cut off from everything: it gives the volumes up by itself, and B serves."""
    world = settled(only)
    world.network.cut.add(*((link, node.role) for link in range(2) for node in (world.a, world.b)))
    world.network.witness_cut.add(world.a.role)
    world.disturb()
    world.wait(3, lambda: world.a.phase() is Phase.ISOLATED, "A is ISOLATED")
    for _ in range(60):
        world.run_for(0.1)
        if world.b.accepts():
            return
    world.checks.fail(STAYS_DOWN, "B does not serve: A still has the volumes mounted")


# --------------------------------------------------------------------------- the simpler rules


def _served_at_once(patch: Patch) -> None:
    patch.setattr(volumes, "ready", lambda state: True)


def _never_tried_again(patch: Patch) -> None:
    real = volumes.mount_due

    def mount_due(state: State, now_ms: int) -> bool:
        return real(state, now_ms) and not state.mount_failures

    patch.setattr(volumes, "mount_due", mount_due)


def _given_up_with_the_lock(patch: Patch) -> None:
    def unmount_due(state: State, now_ms: int) -> bool:
        return not volumes.given_up(state) and not volumes.kept(state, now_ms)

    patch.setattr(volumes, "unmount_due", unmount_due)


def _kept_by_an_authority(patch: Patch) -> None:
    real = volumes.kept
    patch.setattr(volumes, "kept", lambda state, now_ms: state.is_authority or real(state, now_ms))


SCENARIOS = (
    a_mount_takes_its_time,
    a_stopping_node_is_slow_to_unmount,
    a_node_that_fell_silent_is_cut_off_for_good,
)
MUTANTS = (
    (a_mount_takes_its_time, _served_at_once, VOLUMES),
    (a_stopping_node_is_slow_to_unmount, _never_tried_again, STAYS_DOWN),
    (a_stopping_node_is_slow_to_unmount, _given_up_with_the_lock, VOLUMES),
    (a_node_that_fell_silent_is_cut_off_for_good, _kept_by_an_authority, STAYS_DOWN),
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

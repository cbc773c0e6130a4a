"""Each trace holds under the production rules, and its simpler rule is caught by it.

A mutant counts as caught only by the failure that its trace is about: all others are passed over
while it is played, and a schedule that did not come about is an error of its own.
"""

from __future__ import annotations

import pytest

from tests.sim.checks import SimulationError
from tests.sim.handovers import TRACES
from tests.sim.mutants import MUTANTS, Mutant
from tests.sim.scenarios import SCENARIOS

WITHOUT_HANDOVER = {1, 2, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18}
"""Of the 18 traces; 3 to 7 need a handover (test_handovers.py)."""


@pytest.mark.parametrize("number", SCENARIOS)
def test_trace_holds(number: int) -> None:
    SCENARIOS[number].play(None)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.trace}: {mutant.name}")
def test_mutant_of_trace_is_caught(mutant: Mutant) -> None:
    scenario = SCENARIOS[mutant.trace]
    kind = mutant.kind or scenario.kind
    with mutant.patched(), pytest.raises(SimulationError) as caught:
        scenario.play(kind)
    assert caught.value.invariant == kind
    # And it was the mutant: without it the same schedule holds.
    scenario.play(kind)


def test_no_trace_is_left_out() -> None:
    assert set(SCENARIOS) == WITHOUT_HANDOVER
    assert WITHOUT_HANDOVER | set(TRACES) == set(range(1, 19))
    assert {mutant.trace for mutant in MUTANTS} == WITHOUT_HANDOVER

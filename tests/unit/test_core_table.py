"""The table of transitions: every cell has a row, every row a cell, and nothing is said twice."""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from typing import get_args

import pytest

from nfsha.core import guards, model, table
from nfsha.core.engine import begin, decide
from nfsha.core.guards import TURN_GUARDS, Guard
from nfsha.core.model import (
    Action,
    Command,
    CommandKind,
    CoreConfig,
    Epoch,
    FitChanged,
    Heard,
    Journal,
    Phase,
    Role,
)
from nfsha.core.table import ALL, INDEX, ROWS, TURN, Row
from nfsha.daemon import executors


def _functions() -> dict[str, ast.FunctionDef]:
    tree = ast.parse(inspect.getsource(guards))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


FUNCTIONS = _functions()


def named_guards(function: str, seen: frozenset[str] = frozenset()) -> set[Guard]:
    """Every guard that a classifier, or a function that it calls, can return."""
    found: set[Guard] = set()
    for node in ast.walk(FUNCTIONS[function]):
        if isinstance(node, ast.Return) and node.value is not None:
            named = [part for part in ast.walk(node.value) if isinstance(part, ast.Attribute)]
            found |= {Guard[one.attr] for one in named if ast.unparse(one.value) == "Guard"}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called = node.func.id
            if called in FUNCTIONS and called not in seen:
                found |= named_guards(called, seen | {function})
    return found


COMMAND_CLASSIFIERS = {
    CommandKind.ACTIVATE: "_on_activate",
    CommandKind.MAINTENANCE_ON: "_on_maintenance",
    CommandKind.MAINTENANCE_OFF: "_on_maintenance_off",
    CommandKind.CONFIRM_PEER_DOWN: "_on_confirm",
    CommandKind.RESOLVE: "_on_resolve",
    CommandKind.STOP: "_on_stop",
    CommandKind.RESTART: "_on_stop",
    CommandKind.HANDOVER: "_on_handover",
    CommandKind.ABORT: "_on_abort",
}


def test_the_table_reaches_every_phase() -> None:
    assert list(ALL) == list(Phase)
    assert set(TURN_GUARDS) == set(Phase)


@pytest.mark.parametrize("phase", list(Phase))
def test_every_guard_of_a_turn_has_its_row_and_every_row_its_guard(phase: Phase) -> None:
    can_be = named_guards(TURN_GUARDS[phase].__name__)
    rows = {guard for (of, event, guard) in INDEX if of is phase and event == TURN}
    assert rows - can_be == set()
    assert can_be - rows == set()


@pytest.mark.parametrize("kind", list(CommandKind))
def test_every_guard_of_a_command_has_a_row_in_some_phase(kind: CommandKind) -> None:
    can_be = named_guards(COMMAND_CLASSIFIERS[kind])
    if kind not in (CommandKind.STOP, CommandKind.RESTART):
        can_be |= {Guard.STOPPING}
    rows = {guard for (_, event, guard) in INDEX if event == kind}
    assert rows == can_be


@pytest.mark.parametrize("kind", list(CommandKind))
@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("variant", range(16))
def test_every_command_in_every_phase_finds_a_row(
    phase: Phase, kind: CommandKind, variant: int
) -> None:
    stopping, promise, fit, serving = (bool(variant & bit) for bit in (1, 2, 4, 8))
    authority = Role.PRIMARY if phase in (Phase.ACTIVE, Phase.ISOLATED) else Role.STANDBY
    epoch = Epoch(3, "0123456789abcdef", authority)
    held = promise and phase not in (Phase.ACTIVE, Phase.STARTING)
    journal = Journal(epoch=epoch, promise=held and not serving)
    state = begin(CoreConfig(Role.PRIMARY, "boot"), 7, 1000, journal=journal)
    state.phase = phase
    state.service_fit = fit
    state.stopping = "stop" if stopping else ""
    state.maintenance_serving = serving and phase is Phase.MAINTENANCE
    guard = guards.on_command(state, Command(kind, 1, keep=Role.PRIMARY), 5000)
    assert isinstance(INDEX[(phase, str(kind), guard)], Row)


def test_ids_are_unique_and_name_their_phase() -> None:
    assert [row for row, times in Counter(row.id for row in ROWS).items() if times > 1] == []
    letters = {row.id[0]: row.phases for row in ROWS if row.event == TURN}
    assert len(letters) == len(Phase)


def test_every_row_says_why_in_one_line() -> None:
    for row in ROWS:
        assert row.why
        assert "\n" not in row.why
        assert not row.why.endswith(".")


def test_two_rows_for_one_cell_are_refused() -> None:
    with pytest.raises(ValueError, match="match the same cell"):
        table._index((ROWS[0], ROWS[0]))


def test_every_action_has_exactly_one_executor() -> None:
    source = inspect.getsource(executors.Executors.perform)
    for action in get_args(Action):
        assert source.count(f"model.{action.__name__}(") == 1, action.__name__


def test_every_effect_is_used_by_a_row() -> None:
    from nfsha.core import effects

    shared = {"new_epoch"}
    public = {
        name
        for name, value in vars(effects).items()
        if inspect.isfunction(value) and value.__module__ == effects.__name__
        if not name.startswith("_")
    }
    assert {row.effect.__name__ for row in ROWS} == public - shared


def test_the_same_state_inputs_and_time_give_the_same_decision() -> None:
    state = begin(CoreConfig(Role.PRIMARY, "boot"), 7, 1000, journal=None)
    before = repr(state)
    one = decide(state, [FitChanged(ok=True)], 1010)
    two = decide(state, [FitChanged(ok=True)], 1010)
    assert repr(state) == before, "the input state was changed"
    assert repr(one) == repr(two)
    assert one.actions
    after = repr(one.state)
    decide(one.state, [], 1100)
    assert repr(one.state) == after


def test_a_state_shares_nothing_with_the_next_one() -> None:
    state = begin(CoreConfig(Role.PRIMARY, "boot"), 7, 1000, journal=None)
    twin = state.copy()
    twin.flights["survey"] = twin.flights.get("survey")  # type: ignore[assignment]
    twin.count("late_turns")
    assert "survey" not in state.flights
    assert state.counters == {}


def test_an_input_without_a_rule_is_refused() -> None:
    state = begin(CoreConfig(Role.PRIMARY, "boot"), 7, 1000, journal=None)
    with pytest.raises(TypeError, match="no rule for input"):
        decide(state, ["nonsense"], 1010)  # type: ignore[list-item]


def test_every_fact_and_result_has_its_rule() -> None:
    from nfsha.core.facts import absorb

    for kind in (*get_args(model.Fact), *get_args(model.Result), model.Completed):
        assert absorb.dispatch(kind) is not absorb.dispatch(object), kind.__name__
    assert Heard in absorb.registry

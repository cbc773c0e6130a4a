"""`nfsha abort` at each step of a move: the giver serves again within a second, nothing is lost.

Up to the order of the new epoch; from there on there is no way back, and the abort says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.netns.handover_cases import GIVER, RECEIVER, Action, Boundary, played
from tests.netns.lab import Lab
from tests.netns.stepping import Stepped
from tests.netns.test_handover_matrix import MakeLab

SERVES_AGAIN_WITHIN_MS = 1000

COMMIT = Action(RECEIVER, "RESTORING: writes epoch")
"""Before it all can be taken back, after it nothing."""

STEPS = (
    (Action(GIVER, "ACTIVE: asks the peer"), GIVER),
    (Action(RECEIVER, "PRESYNC: shows its phase"), GIVER),
    (Action(RECEIVER, "PRESYNC: shows that it is ready"), RECEIVER),
    (Action(GIVER, "FREEZING: comes to rest"), GIVER),
    (Action(GIVER, "PREPARED: writes prepared"), RECEIVER),
    (Action(GIVER, "PREPARED: shows that it is ready"), GIVER),
    (Action(RECEIVER, "Finish: last pass"), RECEIVER),
    (Action(RECEIVER, "Finish: proof"), GIVER),
    (Action(RECEIVER, "RESTORING: ends what receives"), GIVER),
)
"""One action of each step, and where the abort is asked for; `make test-all` takes all of them."""


def abort(pair: Stepped, action: Action, side: str) -> None:
    """Asks for a move, ends it before this action by a command on this side, and looks."""
    boundary = Boundary(action, "before")
    with pair.judged(f"abort on the {side}, {boundary}"):
        giver, asked = pair.giver, pair.node_of(side)
        held = pair.node_of(action.side)
        with pair.stopped_at(boundary) as go_on:
            if asked != held:
                assert pair.ask(asked, "abort")["ok"]
            asked_ms = pair.now_ms()
            go_on()
            if asked == held:
                assert pair.ask(asked, "abort")["ok"]
        pair.wait_at_rest()
        assert pair.giver == giver, "the move was not ended"
        moves = [event for event in pair.events(giver, asked_ms) if event.phase != event.to]
        back_ms = [event.at_ms for event in moves if event.to == "ACTIVE"]
        took_ms = back_ms[-1] - asked_ms if moves else 0
        assert took_ms <= SERVES_AGAIN_WITHIN_MS, f"served again after {took_ms} ms: {moves}"


def play(make_lab: MakeLab, cases: Sequence[tuple[Action, str]]) -> None:
    with Stepped(make_lab(state_mib=8)) as pair:
        for action, side in cases:
            abort(pair, action, side)
        pair.assert_equal()
        assert not pair.writer.stop().failed, "a client saw an error, though nothing moved"


@pytest.mark.timeout(300)
def test_aborted_at_each_step_on_either_node(make_lab: MakeLab) -> None:
    assert {action for action, _ in STEPS} <= set(played()[0])
    play(make_lab, STEPS)


@pytest.mark.timeout(120)
def test_once_the_new_epoch_is_ordered_an_abort_is_refused(lab: Lab) -> None:
    with Stepped(lab) as pair, pair.judged("an abort that is too late"):
        receiver = pair.receiver
        with pair.stopped_at(Boundary(COMMIT, "before")) as go_on:
            go_on()
            answer = pair.ask(receiver, "abort")
        assert not answer["ok"], answer
        pair.wait_at_rest()
        assert pair.giver == receiver


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("side", [GIVER, RECEIVER])
def test_aborted_before_each_action(make_lab: MakeLab, side: str) -> None:
    actions = played()[0]
    actions = actions[: actions.index(COMMIT)]
    if side == RECEIVER:
        # Before it is asked it knows of nothing; and once it stands still where it has nothing
        # left to wait for, its own command comes too late.
        own = [one for one in actions if one.name.startswith("RESTORING")]
        actions = [one for one in actions[1:] if one not in own]
    play(make_lab, [(action, side) for action in actions])

"""A daemon that stands still for a while (SIGSTOP), in each step of a move, on either side."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.netns.handover_cases import GIVER, RECEIVER, Action, Boundary
from tests.netns.lab import Lab
from tests.netns.stepping import Stepped

STEPS = (
    Action(RECEIVER, "Approach: pass"),
    Action(GIVER, "FREEZING: comes to rest"),
    Action(GIVER, "PREPARED: shows that it is ready"),
    Action(RECEIVER, "Finish: last pass"),
    Action(RECEIVER, "Finish: proof"),
    Action(RECEIVER, "RESTORING: writes epoch"),
)


def pause(pair: Stepped, action: Action, side: str, seconds: float) -> None:
    """Stops the daemon of this side just before an action, whoever makes it."""
    with pair.judged(f"the {side} stands still for {seconds} s before {action}"):
        pid = pair.daemon(pair.node_of(side)).pid
        with pair.stopped_at(Boundary(action, "before")) as go_on:
            os.kill(pid, signal.SIGSTOP)
            try:
                go_on()
                time.sleep(seconds)
            finally:
                os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seconds", [0.5, 3.0])
def test_a_pause_of_either_daemon_in_each_step(lab: Lab, seconds: float) -> None:
    with Stepped(lab) as pair:
        for action in STEPS:
            for side in (GIVER, RECEIVER):
                pause(pair, action, side, seconds)
        pair.assert_equal()
        assert not [one for one in pair.writer.stop().failed if not one.stale]

"""What must hold of one node's state after every decision.

A broken one means that a rule is wrong; the engine raises, and the daemon stops, so that the leases
in the kernel end. The pair's invariants (I1, I2, ..) are checked by the simulator.
"""

from __future__ import annotations

from nfsha.core import volumes
from nfsha.core.model import Phase
from nfsha.core.state import State


class BrokenInvariantError(AssertionError):
    """A decision led to a state that must not be."""


def broken(state: State) -> str:
    """The first invariant that this state breaks, as a sentence; "" when none."""
    epoch = state.durable.epoch
    if state.phase is Phase.ACTIVE and not state.is_authority:
        return f"ACTIVE, but the journal's epoch is {epoch}"
    if state.phase is Phase.PASSIVE and (epoch is None or state.is_authority):
        return f"PASSIVE, but the journal's epoch is {epoch}"
    if state.phase is Phase.ISOLATED and state.want.epoch is None:
        return "ISOLATED without an epoch"
    if state.durable.promise and state.serving:
        return "serves although it promised not to take over"
    if state.serving and not volumes.ready(state):
        return "serves, but the hooks have not mounted the volumes"
    if epoch is not None and state.want.epoch is None:
        return "the journal would forget its epoch"
    if epoch is not None and state.want.epoch is not None:
        if state.want.epoch.number < epoch.number:
            return f"the journal would go back from {epoch} to {state.want.epoch}"
        if state.want.epoch.number == epoch.number and state.want.epoch != epoch:
            return f"the journal would replace {epoch} by {state.want.epoch}"
    if state.commit_ordered and state.phase is not Phase.TAKEOVER:
        return "a commit is ordered outside of TAKEOVER"
    return ""


def check(state: State) -> None:
    """Raises `BrokenInvariantError` when an invariant does not hold."""
    sentence = broken(state)
    if sentence:
        raise BrokenInvariantError(sentence)

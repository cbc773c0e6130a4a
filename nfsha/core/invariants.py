"""What must hold of one node's state after every decision.

A broken one means that a rule is wrong; the engine raises, and the daemon stops, so that the leases
in the kernel end. The pair's invariants (I1, I2, ..) are checked by the simulator.
"""

from __future__ import annotations

from nfsha.core import volumes
from nfsha.core.model import RECEIVING_PHASES, Phase
from nfsha.core.state import State


class BrokenInvariantError(AssertionError):
    """A decision led to a state that must not be."""


def broken(state: State) -> str:
    """The first invariant that this state breaks, as a sentence; "" when none."""
    return _phase_broken(state) or _journal_broken(state) or _handover_broken(state)


def _phase_broken(state: State) -> str:
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
    return ""


def _journal_broken(state: State) -> str:
    epoch, wanted = state.durable.epoch, state.want.epoch
    if epoch is None:
        return ""
    if epoch == state.durable.aborted:
        return f"the journal has {epoch} both committed and aborted"
    if wanted is None:
        return "the journal would forget its epoch"
    if wanted.number < epoch.number:
        return f"the journal would go back from {epoch} to {wanted}"
    if wanted.number == epoch.number and wanted != epoch:
        return f"the journal would replace {epoch} by {wanted}"
    return ""


def _handover_broken(state: State) -> str:
    if state.commit_ordered and state.phase not in (Phase.TAKEOVER, Phase.RESTORING):
        return f"a commit is ordered in {state.phase}"
    if state.serving and state.prepared is not None:
        return f"serves although it gave its authority away to {state.prepared}"
    if state.handover is not None and state.phase not in RECEIVING_PHASES | {Phase.FREEZING}:
        return f"works on the handover {state.handover} in {state.phase}"
    return ""


def check(state: State) -> None:
    """Raises `BrokenInvariantError` when an invariant does not hold."""
    sentence = broken(state)
    if sentence:
        raise BrokenInvariantError(sentence)

"""Which way data may flow, by one node's state: to the peer, from the peer, or not at all (I3).

Pure judgements, asked after each turn by whoever moves data; nothing here moves any.
"""

from __future__ import annotations

from dataclasses import dataclass

from nfsha.core import lease
from nfsha.core.model import Epoch, Phase
from nfsha.core.state import State


@dataclass(frozen=True, slots=True)
class Offer:
    """This node's data is the truth of this epoch: it may be fetched."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Fetch:
    """This node fetches the data of this epoch.

    `start` False: what runs may go on, but nothing new begins (`why`).
    """

    epoch: Epoch
    start: bool
    why: str = ""
    proved: bool = False
    """The volumes hold this epoch's data already, by the proof of a handover: they are stamped
    before anything is fetched."""


@dataclass(frozen=True, slots=True)
class Approach:
    """This node fetches the data of this epoch, pass after pass, until what is left fits a freeze.

    `more` False: it came near enough, and only keeps near.
    """

    epoch: Epoch
    handover: Epoch
    more: bool
    urgent: bool = False
    """The giver's service is broken: its clients wait for this."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The giver stands still: the last pass, and the proof that both copies are equal."""

    epoch: Epoch
    handover: Epoch


@dataclass(frozen=True, slots=True)
class Rest:
    """No data flows; whatever runs is to be ended."""

    why: str


Flow = Offer | Fetch | Approach | Finish | Rest


def flow(state: State, now_ms: int) -> Flow:
    """The way of the data, by the state after a turn."""
    if not state.config.replication:
        return Rest("replication is off")
    epoch = state.durable.epoch
    if epoch is None:
        return Rest("no epoch is known yet")
    if state.want.epoch != epoch:
        return Rest("a new epoch is on its way to the disk")
    if state.is_authority and state.phase is Phase.PREPARED:
        return Offer(epoch)  # the receiver's last pass and proof; a stop waits for them
    if state.stopping:
        return Rest("the daemon is stopping")
    if state.is_authority:
        if state.serving and state.phase is not Phase.STARTING:
            return Offer(epoch)
        return Rest(f"this node has the truth of epoch {epoch.number}, but does not serve")
    return _flow_to(state, epoch, now_ms)


def _flow_to(state: State, epoch: Epoch, now_ms: int) -> Flow:
    if state.handover is not None and state.phase is Phase.PRESYNC:
        urgent = state.report is not None and not state.report.healthy
        return Approach(epoch, state.handover, more=not state.presync_ready, urgent=urgent)
    if state.handover is not None and state.phase is Phase.FINAL_SYNC:
        return Finish(epoch, state.handover)
    if state.phase not in (Phase.PASSIVE, Phase.RETURNED):
        return Rest(f"nothing is fetched in {state.phase}")
    if state.froze:
        return Fetch(epoch, start=False, why="the volumes are not thawed yet")
    report = state.report
    if report is None:
        return Rest("the peer was not heard yet")
    if report.epoch != epoch:
        return Rest("the peer shows another epoch than the journal here")
    if not lease.peer_heard(state, now_ms):
        return Fetch(epoch, start=False, why="the peer is silent", proved=state.handed_over)
    if not report.serving:
        why = f"the peer does not serve: it is {report.phase}"
        return Fetch(epoch, start=False, why=why, proved=state.handed_over)
    return Fetch(epoch, start=True, proved=state.handed_over)

"""What replication adds to the decisions: the way of the data, a taker's receivers, the stamps."""

from __future__ import annotations

import pytest

from nfsha.core import model
from nfsha.core.model import (
    CommandKind,
    Epoch,
    Journal,
    Phase,
    ReceiversStopped,
    ReplicaChanged,
    Role,
)
from nfsha.core.replication import Fetch, Offer, Rest, flow
from nfsha.core.state import State
from tests.unit import situations
from tests.unit.situations import EPOCH, Node, Pair, replicating

NEWER = Epoch(EPOCH.number + 2, "00000000000000ff", Role.STANDBY)


def told(epoch: Epoch, *, whole: bool = True, stamp: Epoch | None = None) -> ReplicaChanged:
    return ReplicaChanged(whole, "", True, epoch, stamp or epoch)


def settled(*, whole: bool = True) -> Pair:
    """The primary serves, the standby is (or is not) a whole replica; the test ends receivers."""
    pair = Pair(Journal(EPOCH), Journal(EPOCH), replicating)
    pair.standby.unanswered.add(model.StopReceivers)
    pair.primary.inbox.append(told(EPOCH))
    pair.standby.inbox.append(told(EPOCH, whole=whole))
    return pair.run(3000)


def phase_of(node: Node) -> Phase:
    return node.state.phase


def way(pair: Pair, node: Node) -> object:
    return flow(node.state, pair.now_ms)


# --------------------------------------------------------------------------- the way of the data


def test_data_flows_from_the_one_that_serves_to_the_other() -> None:
    pair = settled()
    assert phase_of(pair.primary) is Phase.ACTIVE
    assert way(pair, pair.primary) == Offer(EPOCH)
    assert way(pair, pair.standby) == Fetch(EPOCH, start=True)


def test_a_node_that_is_not_whole_fetches_too() -> None:
    pair = settled(whole=False)
    assert phase_of(pair.standby) is Phase.RETURNED
    assert way(pair, pair.standby) == Fetch(EPOCH, start=True)


def test_with_the_peer_silent_what_runs_goes_on_and_nothing_begins() -> None:
    pair = settled(whole=False)
    pair.primary.on = False
    pair.run(1500)
    assert way(pair, pair.standby) == Fetch(EPOCH, start=False, why="the peer is silent")


def test_nothing_flows_without_an_epoch_with_replication_off_or_while_stopping() -> None:
    other = situations.settled()
    assert way(other, other.primary) == Rest("replication is off")
    fresh = Pair(None, None, replicating)
    assert way(fresh, fresh.primary) == Rest("no epoch is known yet")
    pair = settled()
    pair.ask(pair.primary, CommandKind.RESTART)
    assert way(pair, pair.primary) == Rest("the daemon is stopping")


def test_an_authority_that_does_not_serve_offers_nothing() -> None:
    pair = Pair(Journal(EPOCH), Journal(EPOCH), replicating)
    pair.standby.on = False
    pair.run(1000)
    found = way(pair, pair.primary)
    assert isinstance(found, Rest)
    assert "does not serve" in found.why


# --------------------------------------------------------------------------- takeover


def test_a_takeover_waits_until_nothing_receives_any_more() -> None:
    pair = settled()
    pair.primary.on = False
    pair.run(3000)
    assert phase_of(pair.standby) is Phase.TAKEOVER
    assert way(pair, pair.standby) == Rest("nothing is fetched in TAKEOVER")
    number = pair.standby.state.flights["receivers"].number
    pair.standby.inbox.append(model.Completed(number, ReceiversStopped(ok=True)))
    pair.run(100)
    assert phase_of(pair.standby) is Phase.ACTIVE


def test_a_receiver_that_cannot_be_ended_is_a_fault_and_is_tried_again() -> None:
    pair = settled()
    pair.primary.on = False
    pair.run(3000)
    number = pair.standby.state.flights["receivers"].number
    stuck = ReceiversStopped(ok=False, detail="rsync 4711 waits for its disk")
    pair.standby.inbox.append(model.Completed(number, stuck))
    pair.run(50)
    state = pair.standby.state
    assert phase_of(pair.standby) is Phase.FAULT
    assert "rsync 4711" in state.fitness_reason
    number = state.flights["receivers"].number
    pair.standby.inbox.append(model.Completed(number, ReceiversStopped(ok=True)))
    pair.primary.on = True
    pair.run(1000)
    assert phase_of(pair.standby) is Phase.PASSIVE


def test_an_answer_that_never_comes_is_a_fault_too() -> None:
    pair = settled()
    pair.primary.on = False
    pair.run(13_000)
    assert phase_of(pair.standby) is Phase.FAULT
    assert "within 10 s" in pair.standby.state.fitness_reason


def test_a_node_that_is_not_whole_serves_by_force_only() -> None:
    pair = settled(whole=False)
    pair.primary.on = False
    pair.run(3000)
    assert phase_of(pair.standby) is Phase.RETURNED
    assert pair.ask(pair.standby, CommandKind.ACTIVATE).row == "C18"
    assert pair.ask(pair.standby, CommandKind.ACTIVATE, force=True).row == "C10"


def test_whole_of_another_epoch_is_not_whole() -> None:
    pair = settled()
    state = pair.standby.state
    assert state.whole
    state.durable = Journal(Epoch(EPOCH.number + 1, "1" * 16, Role.PRIMARY))
    after: State = pair.standby.state
    assert not after.whole
    assert after.whole_reason == "the volumes hold the data of another epoch"


# --------------------------------------------------------------------------- stamps


def test_until_the_volumes_were_looked_at_nothing_is_granted() -> None:
    pair = Pair(Journal(EPOCH), Journal(EPOCH), replicating).run(2000)
    assert phase_of(pair.primary) is Phase.WAITING
    pair.standby.inbox.append(told(EPOCH))
    pair.run(300)
    assert phase_of(pair.primary) is Phase.ACTIVE


def test_a_stamp_above_the_journal_forbids_the_older_data_to_serve() -> None:
    pair = Pair(Journal(EPOCH), Journal(EPOCH), replicating)
    pair.primary.inbox.append(told(EPOCH))
    pair.standby.inbox.append(told(EPOCH, whole=False, stamp=NEWER))
    pair.run(3000)
    assert phase_of(pair.primary) is Phase.WAITING
    assert pair.standby.state.row == "R92"
    assert pair.ask(pair.standby, CommandKind.STOP).accepted
    pair.run(2000)
    assert phase_of(pair.primary) is Phase.WAITING, "no promise for older data"


@pytest.mark.parametrize("name", ["primary", "standby"])
def test_an_operator_who_chooses_gets_an_epoch_above_every_stamp(name: str) -> None:
    pair = Pair(Journal(EPOCH), Journal(EPOCH), replicating)
    for node in (pair.primary, pair.standby):
        node.unanswered.add(model.StopReceivers)
    pair.primary.inbox.append(told(EPOCH))
    pair.standby.inbox.append(told(EPOCH, whole=False, stamp=NEWER))
    pair.run(3000)
    chosen: Node = getattr(pair, name)
    assert pair.ask(chosen, CommandKind.ACTIVATE, force=True).accepted
    pair.run(2500)
    number = chosen.state.flights["receivers"].number
    chosen.inbox.append(model.Completed(number, ReceiversStopped(ok=True)))
    pair.run(2500)
    assert phase_of(chosen) is Phase.ACTIVE
    assert chosen.state.epoch_number == NEWER.number + 1


def test_a_node_is_blank_only_by_a_look() -> None:
    pair = Pair(None, None, replicating).run(1000)
    assert phase_of(pair.primary) is Phase.WAITING
    assert not pair.primary.state.blank
    for node in (pair.primary, pair.standby):
        node.inbox.append(ReplicaChanged(whole=False, stamped=False))
    pair.run(500)
    assert phase_of(pair.primary) is Phase.ACTIVE

"""The planned move of the authority, by two production engines, step by step."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nfsha.core import handover, model
from nfsha.core.model import (
    CommandKind,
    CoreConfig,
    Epoch,
    FinalChanged,
    Journal,
    Persisted,
    PersistFailed,
    Phase,
    PresyncChanged,
    Role,
)
from nfsha.core.replication import Approach, Fetch, Finish, Offer, Rest, flow
from nfsha.core.state import Flight
from tests.unit import situations
from tests.unit.situations import EPOCH, Node, Pair, given

A_PRIMARY, B_STANDBY = Role.PRIMARY, Role.STANDBY


def phases(pair: Pair) -> tuple[Phase, Phase]:
    return pair.primary.state.phase, pair.standby.state.phase


def phase_of(node: Node) -> Phase:
    return node.state.phase


def exited(node: Node) -> bool:
    return node.state.exited


def holds_address(node: Node) -> bool:
    return node.state.address_held


def rows(pair: Pair) -> tuple[str, str]:
    return pair.primary.state.row, pair.standby.state.row


def ways(pair: Pair) -> tuple[object, object]:
    return tuple(flow(node.state, pair.now_ms) for node in (pair.primary, pair.standby))  # type: ignore[return-value]


def answer(node: Node, slot: str, result: model.Result) -> None:
    """The action in flight in this slot ends so."""
    node.inbox.append(model.Completed(node.state.flights[slot].number, result))


def written(node: Node) -> None:
    """The write in flight reaches the disk."""
    answer(node, "persist", Persisted(node.state.writing))


def restart(pair: Pair, node: Node) -> Node:
    """The daemon is killed, and starts with what its disk has."""
    kept = node.state.durable
    fresh = Node(node.state.config, kept)
    fresh.engine.state.session = node.state.session + 100
    fresh.engine.state.started_ms = fresh.engine.state.last_turn_ms = pair.now_ms
    fresh.engine.state.chain_since_ms = pair.now_ms
    if node.state.config.replication:
        fresh.inbox.append(
            model.ReplicaChanged(whole=True, stamped=True, epoch=EPOCH, newest_stamp=EPOCH)
        )
    if node is pair.primary:
        pair.primary = fresh
    else:
        pair.standby = fresh
    return fresh


# --------------------------------------------------------------------------- the straight way


def test_the_straight_way_and_the_way_of_the_data() -> None:
    pair = situations.approaching()
    epoch = given(pair)
    assert epoch.number == EPOCH.number + 1
    assert epoch.authority is B_STANDBY
    assert ways(pair) == (Offer(EPOCH), Approach(EPOCH, epoch, more=True))

    pair.primary.unanswered.add(model.Freeze)
    pair.standby.inbox.append(PresyncChanged(epoch, ready=True))
    pair.run(100)
    assert phases(pair) == (Phase.FREEZING, Phase.PRESYNC)
    assert rows(pair) == ("G90", "Y91")
    assert ways(pair) == (Offer(EPOCH), Approach(EPOCH, epoch, more=False))
    assert holds_address(pair.primary)

    answer(pair.primary, "freeze", model.Frozen(ok=True))
    pair.run(100)
    assert phases(pair) == (Phase.PREPARED, Phase.FINAL_SYNC)
    assert rows(pair) == ("Q90", "Z90")
    assert pair.primary.state.durable == Journal(EPOCH, boot_id="boot", prepared=epoch)
    assert not holds_address(pair.primary)
    assert ways(pair) == (Offer(EPOCH), Finish(EPOCH, epoch))

    pair.standby.inbox.append(FinalChanged(epoch, proved=True))
    pair.run(300)
    assert phases(pair) == (Phase.PASSIVE, Phase.ACTIVE)
    for node in (pair.primary, pair.standby):
        assert node.state.durable.epoch == epoch
        assert node.state.prepared is None
        assert node.state.handover is None
    assert not pair.primary.state.froze
    assert ways(pair) == (Fetch(epoch, start=True, proved=True), Offer(epoch))
    assert pair.primary.state.whole

    told = model.ReplicaChanged(whole=True, stamped=True, epoch=epoch, newest_stamp=epoch)
    pair.primary.inbox.append(told)
    pair.run(200)
    assert pair.primary.state.durable.prepared is None
    assert ways(pair)[0] == Fetch(epoch, start=True)


def test_without_replication_there_is_nothing_to_prove_and_it_goes_back_too() -> None:
    pair = situations.settled()
    assert pair.ask(pair.standby, CommandKind.HANDOVER, to=B_STANDBY).row == "C82"
    pair.run(300)
    assert phases(pair) == (Phase.PASSIVE, Phase.ACTIVE)
    assert pair.ask(pair.primary, CommandKind.HANDOVER, to=A_PRIMARY).row == "C82"
    pair.run(300)
    assert phases(pair) == (Phase.ACTIVE, Phase.PASSIVE)
    assert pair.primary.state.epoch_number == EPOCH.number + 2


def test_the_giver_asks_and_the_receiver_begins_once_for_each_request() -> None:
    pair = situations.copied()
    assert pair.ask(pair.primary, CommandKind.HANDOVER, to=B_STANDBY).row == "C83"
    pair.run(100)
    assert phases(pair) == (Phase.ACTIVE, Phase.PRESYNC)
    assert pair.standby.state.row == "Y90"
    assert pair.primary.state.asks == 0
    assert pair.ask(pair.standby, CommandKind.ABORT).row == "C87"
    pair.run(3000)
    assert phases(pair) == (Phase.ACTIVE, Phase.PASSIVE)


def test_a_request_that_nobody_takes_up_ends_by_itself() -> None:
    pair = situations.copied()
    pair.standby.state.unsure = True  # its disk gives no answer, so it cannot begin
    pair.standby.unanswered.add(model.Persist)
    assert pair.ask(pair.primary, CommandKind.HANDOVER, to=B_STANDBY).accepted
    pair.run(handover.ANSWER_MS - 500)
    assert pair.primary.state.asks
    pair.run(1000)
    assert not pair.primary.state.asks
    assert phases(pair) == (Phase.ACTIVE, Phase.PASSIVE)


# --------------------------------------------------------------------------- commands


def _in(pair: Callable[[], Pair], side: str) -> tuple[Pair, Node]:
    made = pair()
    node: Node = getattr(made, side)
    return made, node


@pytest.mark.parametrize(
    ("pair", "side", "kind", "to", "row"),
    [
        (situations.copied, "primary", CommandKind.HANDOVER, A_PRIMARY, "C85"),
        (situations.copied, "standby", CommandKind.HANDOVER, A_PRIMARY, "C85"),
        (situations.waiting, "primary", CommandKind.HANDOVER, A_PRIMARY, "C86"),
        (situations.in_maintenance, "primary", CommandKind.HANDOVER, B_STANDBY, "C86"),
        (situations.in_maintenance, "standby", CommandKind.HANDOVER, B_STANDBY, "C86"),
        (situations.approaching, "standby", CommandKind.HANDOVER, B_STANDBY, "C84"),
        (situations.frozen, "primary", CommandKind.HANDOVER, B_STANDBY, "C84"),
        (situations.prepared, "primary", CommandKind.HANDOVER, B_STANDBY, "C84"),
        (situations.copied, "primary", CommandKind.ABORT, None, "C78"),
        (situations.copied, "standby", CommandKind.ABORT, None, "C78"),
        (situations.proved, "standby", CommandKind.ABORT, None, "C77"),
        (situations.approaching, "standby", CommandKind.ACTIVATE, None, "C19"),
        (situations.frozen, "primary", CommandKind.ACTIVATE, None, "C11"),
        (situations.prepared, "primary", CommandKind.ACTIVATE, None, "C14"),
        (situations.approaching, "standby", CommandKind.MAINTENANCE_ON, None, "C25"),
        (situations.frozen, "primary", CommandKind.MAINTENANCE_ON, None, "C25"),
        (situations.prepared, "primary", CommandKind.MAINTENANCE_ON, None, "C25"),
        (situations.prepared, "standby", CommandKind.MAINTENANCE_ON, None, "C25"),
    ],
)
def test_a_refused_command_changes_nothing(
    pair: Callable[[], Pair], side: str, kind: CommandKind, to: Role | None, row: str
) -> None:
    made, node = _in(pair, side)
    before = phases(made)
    reply = made.ask(node, kind, to=to)
    assert (reply.accepted, reply.row) == (False, row)
    assert phases(made) == before


def test_a_node_whose_volumes_thaw_still_cannot_receive() -> None:
    pair = situations.copied()
    pair.standby.unanswered.add(model.Thaw)
    pair.standby.state.froze = True
    assert pair.ask(pair.standby, CommandKind.HANDOVER, to=B_STANDBY).row == "C86"


@pytest.mark.parametrize(("field", "value"), [("stopping", "restart"), ("unsure", True)])
def test_who_is_about_to_leave_or_doubts_its_disk_does_not_freeze(
    field: str, value: object
) -> None:
    pair = situations.frozen()
    state = pair.primary.state
    state.phase, state.handover = Phase.ACTIVE, None
    assert handover.receiver_ready(state, pair.now_ms)
    setattr(state, field, value)
    assert not handover.receiver_ready(state, pair.now_ms)


# --------------------------------------------------------------------------- how it ends early


@pytest.mark.parametrize("side", ["primary", "standby"])
@pytest.mark.parametrize("pair", [situations.approaching, situations.frozen, situations.prepared])
def test_an_abort_on_either_side_gives_the_service_back_at_once(
    pair: Callable[[], Pair], side: str
) -> None:
    made, node = _in(pair, side)
    epoch = given(made)
    began_frozen = made.standby.state.presync_ready
    assert made.ask(node, CommandKind.ABORT).accepted
    made.run(500)
    assert phases(made) == (Phase.ACTIVE, Phase.PASSIVE)
    assert made.primary.state.epoch == EPOCH
    assert made.standby.state.durable.aborted == (epoch if began_frozen else None)
    assert made.primary.state.durable.prepared is None
    made.run(3000)
    assert phases(made) == (Phase.ACTIVE, Phase.PASSIVE)
    assert made.ask(made.standby, CommandKind.HANDOVER, to=B_STANDBY).accepted
    assert given(made).number > epoch.number or not began_frozen


def _begun_unseen() -> Pair:
    """The receiver has begun what the giver asked for, and the giver does not know it yet."""
    pair = situations.copied()
    assert pair.ask(pair.primary, CommandKind.HANDOVER, to=B_STANDBY).accepted
    while phase_of(pair.standby) is not Phase.PRESYNC:
        assert pair.primary.state.report is not None
        assert pair.primary.state.report.handover is None
        pair.run(situations.STEP_MS)
    return pair


def test_an_abort_of_the_giver_reaches_a_receiver_that_has_just_begun() -> None:
    pair = _begun_unseen()
    epoch = given(pair)
    pair.primary.inbox.insert(0, model.Command(CommandKind.ABORT, 9))
    pair.standby.inbox.append(PresyncChanged(epoch, ready=True))
    pair.run(1000)
    assert pair.primary.replies[-1].accepted
    assert phases(pair) == (Phase.ACTIVE, Phase.PASSIVE)
    assert not pair.primary.state.froze
    assert pair.primary.state.epoch == EPOCH


def test_an_abort_before_the_receiver_begins_ends_no_later_handover() -> None:
    pair = situations.copied()
    assert pair.ask(pair.primary, CommandKind.HANDOVER, to=B_STANDBY).accepted
    pair.primary.inbox.append(model.Command(CommandKind.ABORT, 9))
    pair.standby.deaf = True  # what was asked never arrives
    pair.run(500)
    pair.standby.deaf = False
    pair.run(500)
    assert phases(pair) == (Phase.ACTIVE, Phase.PASSIVE)
    assert pair.ask(pair.standby, CommandKind.HANDOVER, to=B_STANDBY).accepted
    pair.run(1000)
    assert phases(pair) == (Phase.ACTIVE, Phase.PRESYNC)


@pytest.mark.parametrize(
    ("pair", "cause", "why"),
    [
        (
            situations.approaching,
            lambda pair: pair.standby.inbox.append(
                PresyncChanged(given(pair), ready=False, failed="it does not shrink")
            ),
            "it does not shrink",
        ),
        (
            situations.prepared,
            lambda pair: pair.standby.inbox.append(
                FinalChanged(given(pair), proved=False, failed="a difference")
            ),
            "a difference",
        ),
        (
            situations.prepared,
            lambda pair: pair.standby.inbox.append(model.FitChanged(ok=False, reason="nfsd")),
            "nfsd",
        ),
        (
            situations.prepared,
            lambda pair: pair.ask(pair.standby, CommandKind.RESTART),
            "the daemon is stopping",
        ),
    ],
)
def test_what_fails_at_the_receiver_ends_it_and_the_giver_serves_on(
    pair: Callable[[], Pair], cause: Callable[[Pair], object], why: str
) -> None:
    made = pair()
    cause(made)
    made.run(400)
    assert phase_of(made.primary) is Phase.ACTIVE
    assert made.standby.state.last_handover is not None
    assert made.standby.state.last_handover.why == why
    assert not made.standby.state.last_handover.done


def test_a_freeze_that_fails_ends_it() -> None:
    pair = situations.frozen()
    answer(pair.primary, "freeze", model.Frozen(ok=False, detail="a request does not end"))
    pair.run(400)
    assert phases(pair) == (Phase.ACTIVE, Phase.PASSIVE)
    ended = pair.primary.state.last_handover
    assert ended is not None
    assert ended.why == "a request does not end"


@pytest.mark.parametrize(
    ("pair", "after_ms", "why"),
    [
        (situations.frozen, 5_000, "nothing came to rest"),
        (situations.prepared, 20_000, "the other node ended it"),
    ],
)
def test_each_step_has_its_deadline(pair: Callable[[], Pair], after_ms: int, why: str) -> None:
    made = pair()
    made.run(after_ms - 1000)
    assert phase_of(made.primary) is not Phase.ACTIVE
    made.run(1500)
    assert phases(made) == (Phase.ACTIVE, Phase.PASSIVE)
    ended = made.primary.state.last_handover
    assert ended is not None
    assert ended.why.startswith(why)


def test_a_freeze_for_a_receiver_that_is_silent_ends() -> None:
    pair = situations.frozen()
    pair.standby.on = False
    pair.run(1200)
    ended = pair.primary.state.last_handover
    assert ended is not None
    assert ended.why == "the receiver is not heard any more"
    assert phase_of(pair.primary) is not Phase.FREEZING


def test_a_giver_that_does_not_come_to_rest_is_not_awaited_for_ever() -> None:
    """Its disk is so slow that PREPARED is never shown."""
    pair = situations.frozen()
    pair.primary.unanswered.add(model.Persist)
    answer(pair.primary, "freeze", model.Frozen(ok=True))
    pair.run(4900)
    assert rows(pair) == ("Q91", "Y91")
    pair.primary.state.flights["persist"] = Flight(10**9, pair.now_ms + 10**6)
    pair.run(11_000)
    ended = pair.standby.state.last_handover
    assert ended is not None
    assert ended.why == "the giver did not come to rest"


def test_a_giver_that_never_freezes_is_not_awaited_for_ever() -> None:
    pair = situations.approaching()
    pair.primary.state.refuses = given(pair)
    pair.standby.inbox.append(PresyncChanged(given(pair), ready=True))
    pair.run(100)
    assert phases(pair) == (Phase.ACTIVE, Phase.PASSIVE), "refused"
    pair = situations.approaching()
    pair.primary.state.unsure = True
    pair.primary.unanswered.add(model.Persist)
    pair.standby.inbox.append(PresyncChanged(given(pair), ready=True))
    pair.run(handover.ANSWER_MS - 100)
    assert phase_of(pair.standby) is Phase.PRESYNC
    pair.run(300)
    assert phase_of(pair.standby) is Phase.PASSIVE
    ended = pair.standby.state.last_handover
    assert ended is not None
    assert ended.why == "the giver did not freeze"


# --------------------------------------------------------------------------- disks


def test_prepared_is_shown_once_it_is_durable() -> None:
    pair = situations.frozen()
    pair.primary.unanswered.add(model.Persist)
    answer(pair.primary, "freeze", model.Frozen(ok=True))
    pair.run(300)
    assert rows(pair) == ("Q91", "Y91")
    written(pair.primary)
    pair.run(50)
    assert rows(pair) == ("Q90", "Z90")


def test_a_giver_whose_disk_is_full_serves_on() -> None:
    pair = situations.frozen()
    pair.primary.persist_error = "No space left on device"
    answer(pair.primary, "freeze", model.Frozen(ok=True))
    pair.run(500)
    state = pair.primary.state
    assert phases(pair) == (Phase.ACTIVE, Phase.PASSIVE)
    assert state.unsure
    assert state.unsure_prepared == state.given_back
    assert state.prepared is None


def test_what_was_given_back_may_be_served_before_the_disk_says_so() -> None:
    pair = situations.prepared()
    pair.primary.unanswered.add(model.Persist)
    assert pair.ask(pair.standby, CommandKind.ABORT).accepted
    pair.run(300)
    assert phases(pair) == (Phase.ACTIVE, Phase.PASSIVE)
    assert pair.primary.state.durable.prepared is not None
    fresh = restart(pair, pair.primary)
    pair.run(100)
    assert fresh.state.row in ("Q96", "Q90", "Q93", "I20", "A90")
    pair.run(1000)
    assert phases(pair) == (Phase.ACTIVE, Phase.PASSIVE)


def test_a_commit_that_cannot_be_written_becomes_an_abort() -> None:
    pair = situations.proved()
    epoch = given(pair)
    answer(pair.standby, "persist", PersistFailed("I/O error"))
    pair.run(100)
    state = pair.standby.state
    assert state.phase is Phase.PASSIVE
    assert state.want.epoch == EPOCH
    assert state.want.aborted == epoch
    assert phase_of(pair.primary) is Phase.PREPARED, "nothing is durable yet"
    pair.standby.unanswered.clear()
    pair.run(6000)
    assert state.last_handover is not None
    assert "I/O error" in state.last_handover.why
    assert pair.primary.state.epoch != epoch


def test_a_receiver_that_can_tell_neither_is_given_two_seconds() -> None:
    pair = situations.prepared()
    pair.standby.persist_error = "I/O error"
    pair.standby.inbox.append(FinalChanged(given(pair), proved=True))
    pair.run(1000)
    assert rows(pair)[0] == "Q96"
    pair.run(3000)
    assert phase_of(pair.primary) is Phase.ACTIVE
    assert pair.primary.state.epoch_number == EPOCH.number + 2
    ended = pair.primary.state.last_handover
    assert ended is not None
    assert not ended.done


def test_a_commit_is_not_served_without_a_young_grant() -> None:
    pair = situations.proved()
    pair.linked = False
    pair.run(900)
    written(pair.standby)
    pair.run(100)
    assert pair.standby.state.witness_ms > pair.now_ms - 600, "a witness is not enough"
    assert pair.standby.state.row == "X93"
    pair.run(600)
    assert phase_of(pair.standby) is Phase.ISOLATED
    ended = pair.standby.state.last_handover
    assert ended is not None
    assert ended.done
    pair.linked = True
    pair.standby.unanswered.clear()
    pair.run(500)
    assert phases(pair) == (Phase.ACTIVE, Phase.RETURNED), "the giver has taken over meanwhile"
    assert pair.standby.state.want.epoch == pair.primary.state.epoch
    assert pair.primary.state.epoch_number == EPOCH.number + 2


def test_no_commit_is_ordered_without_a_young_grant() -> None:
    pair = situations.prepared()
    pair.standby.state.echo_ms = model.NEVER_MS
    pair.primary.on = False
    pair.standby.inbox.append(FinalChanged(given(pair), proved=True))
    pair.run(200)
    assert pair.standby.state.row == "X91"
    assert not pair.standby.state.commit_ordered


# --------------------------------------------------------------------------- restarts and deaths


def test_a_giver_that_restarts_in_prepared_waits_and_the_receiver_goes_on() -> None:
    pair = situations.prepared()
    epoch = given(pair)
    restart(pair, pair.primary)
    pair.run(300)
    assert phases(pair) == (Phase.PREPARED, Phase.FINAL_SYNC)
    assert ways(pair)[0] == Offer(EPOCH)
    pair.standby.inbox.append(FinalChanged(epoch, proved=True))
    pair.run(500)
    assert phases(pair) == (Phase.PASSIVE, Phase.ACTIVE)


def test_a_giver_that_boots_alone_in_prepared_takes_nothing_over() -> None:
    pair = situations.prepared()
    pair.standby.on = False
    restart(pair, pair.primary)
    pair.run(20_000)
    assert rows(pair)[0] == "Q93"
    assert pair.ask(pair.primary, CommandKind.ACTIVATE).row == "C10"
    pair.run(3000)
    assert phase_of(pair.primary) is Phase.ACTIVE
    assert pair.primary.state.epoch_number == EPOCH.number + 2


def test_a_receiver_that_forgot_says_so_durably() -> None:
    pair = situations.prepared()
    epoch = given(pair)
    restart(pair, pair.standby)
    pair.run(1000)
    assert phases(pair) == (Phase.ACTIVE, Phase.PASSIVE)
    assert pair.standby.state.durable.aborted == epoch


def test_a_receiver_that_may_have_committed_in_a_lost_journal_disowns_nothing() -> None:
    pair = situations.prepared()
    epoch = given(pair)
    fresh = restart(pair, pair.standby)
    fresh.inbox.append(
        model.ReplicaChanged(whole=False, stamped=True, epoch=EPOCH, newest_stamp=epoch)
    )
    pair.run(1000)
    assert fresh.state.durable.aborted is None
    assert fresh.state.row == "R92"


def test_a_giver_whose_receiver_died_takes_over_above_the_epoch_that_it_gave() -> None:
    pair = situations.prepared()
    pair.standby.on = False
    pair.run(2500)
    state = pair.primary.state
    assert state.phase is Phase.ACTIVE
    assert state.epoch == Epoch(EPOCH.number + 2, state.durable.epoch.id, A_PRIMARY)  # type: ignore[union-attr]
    assert state.durable.prepared is None
    assert state.last_handover is not None
    assert state.last_handover.why == "the receiver was gone: this node took over"


def test_a_takeover_from_prepared_that_is_given_up_leads_back_there() -> None:
    pair = situations.prepared()
    pair.primary.unanswered.add(model.Thaw)
    pair.standby.on = False
    pair.run(1500)
    assert phase_of(pair.primary) is Phase.TAKEOVER
    answer(pair.primary, "freeze", model.Thawed(ok=False, detail="busy"))
    pair.run(50)
    assert phase_of(pair.primary) is Phase.PREPARED
    assert pair.primary.state.row == "Q93"
    pair.primary.unanswered.clear()
    pair.run(3000)
    assert phase_of(pair.primary) is Phase.ACTIVE


def test_a_giver_that_was_cut_off_does_not_take_over_by_silence() -> None:
    """The receiver may have taken over, served, and died meanwhile."""
    pair = situations.prepared()
    pair.primary.witness = False
    pair.linked = False
    pair.run(700)
    pair.primary.witness = True
    pair.run(5000)
    assert rows(pair)[0] == "Q93"
    assert phase_of(pair.standby) is Phase.ACTIVE
    pair.standby.on = False
    pair.linked = True
    pair.run(5000)
    assert rows(pair)[0] == "Q93"
    pair.standby.on = True
    pair.run(500)
    assert pair.primary.state.durable.epoch == pair.standby.state.epoch


def test_a_giver_that_stood_still_waits_for_a_word_of_now() -> None:
    pair = situations.prepared()
    kept = pair.primary.inbox
    pair.primary.on = False
    pair.run(700)
    pair.primary.on = True
    pair.primary.inbox = kept
    pair.run(10)
    assert pair.primary.state.out_of_touch_ms is not None
    pair.run(200)
    assert pair.primary.state.out_of_touch_ms is None


def test_a_receiver_whose_giver_died_after_the_proof_has_all_and_serves() -> None:
    pair = situations.proved()
    pair.primary.on = False
    written(pair.standby)
    pair.standby.unanswered.clear()
    pair.run(3000)
    assert phase_of(pair.standby) is Phase.ACTIVE
    assert pair.standby.state.epoch_number == EPOCH.number + 1


def test_a_stopping_giver_stays_for_the_proof() -> None:
    pair = situations.prepared()
    epoch = given(pair)
    assert pair.ask(pair.primary, CommandKind.STOP).row == "C60"
    pair.run(5000)
    assert not exited(pair.primary)
    assert ways(pair)[0] == Offer(EPOCH)
    pair.standby.inbox.append(FinalChanged(epoch, proved=True))
    pair.run(500)
    assert exited(pair.primary)
    assert pair.primary.state.durable.epoch == epoch
    assert phase_of(pair.standby) is Phase.ACTIVE


def test_a_stopping_giver_stays_no_longer_than_the_proof_may_take() -> None:
    pair = situations.prepared()
    pair.standby.state.final_since_ms = pair.now_ms + 100_000  # it never ends by itself
    assert pair.ask(pair.primary, CommandKind.STOP).accepted
    pair.run(25_000)
    assert not exited(pair.primary)
    pair.run(2000)
    assert exited(pair.primary)


@pytest.mark.parametrize(("kind", "row"), [(CommandKind.STOP, "C60"), (CommandKind.RESTART, "C70")])
def test_a_stop_in_the_freeze_waits_for_the_handover(kind: CommandKind, row: str) -> None:
    pair = situations.frozen()
    epoch = given(pair)
    assert pair.ask(pair.primary, kind).row == row
    pair.run(2000)
    assert phase_of(pair.primary) is Phase.FREEZING
    answer(pair.primary, "freeze", model.Frozen(ok=True))
    pair.run(100)
    pair.standby.inbox.append(FinalChanged(epoch, proved=True))
    pair.run(500)
    assert exited(pair.primary)
    assert not pair.primary.state.froze
    assert phase_of(pair.standby) is Phase.ACTIVE


def test_a_stop_in_a_freeze_that_fails_thaws_first() -> None:
    pair = situations.frozen()
    pair.primary.unanswered.add(model.Thaw)
    assert pair.ask(pair.primary, CommandKind.STOP).row == "C60"
    answer(pair.primary, "freeze", model.Frozen(ok=False, detail="busy"))
    pair.run(300)
    assert not exited(pair.primary), "the volumes are frozen still"
    answer(pair.primary, "freeze", model.Thawed(ok=True))
    pair.run(50)
    assert exited(pair.primary)


def test_a_restart_at_the_commit_announces_its_absence_once_it_serves() -> None:
    pair = situations.proved()
    assert pair.ask(pair.standby, CommandKind.RESTART).row == "C70"
    written(pair.standby)
    pair.standby.unanswered.clear()
    pair.run(300)
    assert exited(pair.standby)
    assert phase_of(pair.standby) is Phase.ACTIVE
    assert pair.primary.state.report is not None
    assert pair.primary.state.report.absence_ms > 0


def test_a_giver_in_prepared_holds_a_takeover_off_for_two_seconds_only() -> None:
    """It hears nothing any more, and is heard for ever."""
    pair = situations.prepared()
    pair.primary.deaf = True
    pair.primary.witness = False
    pair.primary.answered_by = situations.OTHER_MAC
    assert pair.ask(pair.standby, CommandKind.ABORT).accepted
    pair.run(1900)
    assert phases(pair) == (Phase.PREPARED, Phase.PASSIVE)
    assert pair.standby.state.row == "P91"
    assert not pair.standby.state.withhold_since_ms
    pair.run(2000)
    assert phase_of(pair.standby) is Phase.ACTIVE
    assert pair.standby.state.epoch_number == EPOCH.number + 3, "the giver may have taken 9"


# --------------------------------------------------------------------------- hooks


def hooked(role: Role) -> CoreConfig:
    return CoreConfig(role, boot_id="boot", hook_timeout_ms=5000)


class HookedNode(Node):
    """A node whose hooks do what they are asked, but `mount_fails` says otherwise."""

    mount_fails = ""

    def _result(self, action: model.Action, now_ms: int) -> model.Result | None:
        if type(action) in self.unanswered:
            return None
        if isinstance(action, model.MountVolumes):
            return model.VolumesMounted(ok=not self.mount_fails, detail=self.mount_fails)
        if isinstance(action, model.UnmountVolumes):
            return model.VolumesUnmounted(ok=True)
        return super()._result(action, now_ms)


def hooked_pair() -> tuple[Pair, HookedNode, HookedNode]:
    pair = Pair()
    primary = HookedNode(hooked(A_PRIMARY), Journal(EPOCH))
    standby = HookedNode(hooked(B_STANDBY), Journal(EPOCH))
    pair.primary, pair.standby = primary, standby
    pair.run(4000)
    assert phases(pair) == (Phase.ACTIVE, Phase.PASSIVE)
    return pair, primary, standby


def test_the_giver_shows_that_it_is_prepared_once_it_gave_its_volumes_up() -> None:
    pair, primary, _ = hooked_pair()
    primary.unanswered.add(model.UnmountVolumes)
    assert pair.ask(pair.standby, CommandKind.HANDOVER, to=B_STANDBY).accepted
    pair.run(1000)
    assert phases(pair) == (Phase.PREPARED, Phase.PRESYNC)
    answer(primary, "volumes", model.VolumesUnmounted(ok=True))
    primary.unanswered.clear()
    pair.run(500)
    assert phases(pair) == (Phase.PASSIVE, Phase.ACTIVE)
    assert pair.standby.state.volumes_mounted is True


def test_a_receiver_that_cannot_mount_commits_nothing() -> None:
    pair, _, standby = hooked_pair()
    standby.mount_fails = "the other node is primary still"
    assert pair.ask(pair.standby, CommandKind.HANDOVER, to=B_STANDBY).accepted
    pair.run(2000)
    assert phases(pair) == (Phase.PREPARED, Phase.RESTORING)
    assert pair.standby.state.row == "X94"
    pair.run(21_000)
    assert phases(pair) == (Phase.ACTIVE, Phase.PASSIVE)
    assert pair.primary.state.volumes_mounted is True
    assert pair.standby.state.volumes_mounted is False


def test_nothing_is_fetched_into_volumes_that_are_not_thawed() -> None:
    pair = situations.proved()
    pair.primary.unanswered.add(model.Thaw)
    written(pair.standby)
    pair.standby.unanswered.clear()
    pair.run(500)
    assert phases(pair) == (Phase.PASSIVE, Phase.ACTIVE)
    waits = Fetch(given_epoch(pair), start=False, why="the volumes are not thawed yet")
    assert ways(pair)[0] == waits
    answer(pair.primary, "freeze", model.Thawed(ok=True))
    pair.run(50)
    assert ways(pair)[0] == Fetch(given_epoch(pair), start=True, proved=True)


def given_epoch(pair: Pair) -> Epoch:
    epoch = pair.primary.state.epoch
    assert epoch is not None
    return epoch


def test_a_restored_journal_proves_nothing_about_newer_volumes() -> None:
    """Found by seed 70000025: what a later epoch wrote was taken for the data of the proof."""
    epoch = Epoch(EPOCH.number + 1, "00000000000000aa", B_STANDBY)
    later = Epoch(EPOCH.number + 3, "00000000000000bb", A_PRIMARY)
    pair = Pair(Journal(epoch, prepared=epoch), Journal(epoch), situations.replicating)
    pair.standby.inbox.append(
        model.ReplicaChanged(whole=True, stamped=True, epoch=epoch, newest_stamp=epoch)
    )
    pair.primary.inbox.append(
        model.ReplicaChanged(whole=False, stamped=True, epoch=epoch, newest_stamp=later)
    )
    pair.run(3000)
    assert not pair.primary.state.handed_over
    assert rows(pair)[0] == "R92"
    assert phase_of(pair.standby) is not Phase.ACTIVE, "its data is the older one"


def test_nothing_flows_in_restoring() -> None:
    pair = situations.proved()
    assert isinstance(ways(pair)[1], Rest)

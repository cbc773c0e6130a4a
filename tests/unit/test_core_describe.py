"""The table in words, and a node's state in words: complete, plain, and true of real engines."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from nfsha.core import describe, model
from nfsha.core.describe import UnknownRowError, alarms_of, explain, next_step, situation
from nfsha.core.model import CommandKind, CoreConfig, Epoch, Exclusivity, Journal, Phase, Role
from nfsha.core.table import ROWS, TURN
from tests.unit import situations
from tests.unit.situations import EPOCH, OTHER_MAC, Node, Pair

Situation = dict[str, Any]


def seen(pair: Pair, node: Node) -> Situation:
    return pair.seen(node)


def alarms(pair: Pair, node: Node) -> list[str]:
    return [alarm["name"] for alarm in seen(pair, node)["alarms"]]


def condition(facts: Situation, number: int) -> tuple[bool, str]:
    one = facts["takeover"]["conditions"][number - 1]
    assert one["number"] == number
    return one["ok"], one["reason"]


# --------------------------------------------------------------------------- the table


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_every_row_is_explained(row: Any) -> None:
    lines = explain(row.id.lower()).splitlines()
    told = "\n".join(lines)
    assert told.startswith(f"{row.id}\n")
    assert str(row.guard) in told
    assert " ".join(row.why.split()) in " ".join(told.split())
    if row.to is not None:
        assert f"to      {row.to}" in told
    effect = " ".join(told.split()).split(" effect ")[1].split(" to ")[0]
    assert re.match(r"none|\w+: [A-Z]", effect), told
    assert max(map(len, lines)) <= 96


def test_a_row_with_an_effect_says_what_it_does() -> None:
    assert explain("T10").splitlines() == [
        "T10",
        "  phase   TAKEOVER",
        "  event   each turn",
        "  guard   exclusive",
        "  effect  commit: Orders the new epoch into the journal: from here there is no way back.",
        "  to      stays",
        "  why     proved that the other node cannot serve: the new epoch is ordered, no way back",
    ]


def test_a_refusing_row_says_so_and_phases_are_short() -> None:
    told = explain("C32")
    assert "phase   MAINTENANCE" in told
    assert "event   command maintenance-off" in told
    assert "to      refused" in explain("C15")
    assert "phase   any\n" in explain("C15")
    assert "phase   any but ACTIVE\n" in explain("C60")


@pytest.mark.parametrize(("unknown", "near"), [("P11", "P10"), ("w99", "W98"), ("C300", "C30")])
def test_an_unknown_row_names_the_nearest(unknown: str, near: str) -> None:
    with pytest.raises(UnknownRowError, match=f"there is no row '{unknown}'; .*{near}"):
        explain(unknown)


def test_a_row_without_a_neighbour_is_just_unknown() -> None:
    with pytest.raises(UnknownRowError) as caught:
        describe.row("?" * 50)
    assert str(caught.value) == f"there is no row '{'?' * 20}'"


def test_the_table_names_every_row_once_in_each_of_its_chapters() -> None:
    listed = re.findall(r"^  ([A-Z]\d\d)  ", describe.table_text(), re.MULTILINE)
    assert listed == [row.id for row in ROWS if row.event == TURN] + [
        row.id for row in ROWS if row.event != TURN
    ]
    assert max(map(len, describe.table_text().splitlines())) <= 96
    assert [one["id"] for one in describe.rows()] == [row.id for row in ROWS]


def test_the_diagram_has_exactly_the_transitions() -> None:
    first, *lines = describe.mermaid().splitlines()
    assert first == "stateDiagram-v2"
    drawn = set()
    for line in lines:
        arrow = re.fullmatch(r"    (\S+) --> (\w+)(?:: (.+))?", line)
        assert arrow, line
        drawn |= {(arrow[1], arrow[2], row) for row in (arrow[3] or "start").split()}
    expected = {
        (str(phase), str(row.to), row.id)
        for row in ROWS
        for phase in row.phases
        if row.to not in (None, phase)
    }
    assert drawn == expected | {("[*]", "STARTING", "start")}


def test_rows_are_plain_json() -> None:
    assert json.loads(json.dumps(describe.rows()))[0]["id"] == ROWS[0].id
    assert describe.row("C14")["refuses"] is True
    assert describe.row("P90")["to"] is None


# --------------------------------------------------------------------------- situations


def test_a_serving_node() -> None:
    pair = situations.settled()
    facts = seen(pair, pair.primary)
    assert (facts["role"], facts["phase"], facts["row"]) == ("primary", "ACTIVE", "A90")
    assert 5000 <= facts["since_ms"] <= 8000
    assert facts["serving"] is True
    assert facts["authority"] == "primary"
    assert facts["epoch"] == {"number": 7, "id": EPOCH.id, "authority": "primary"}
    counting = [one for one in facts["evidence"] if one["counts"]]
    assert [one["kind"] for one in counting] == ["echo"]
    assert facts["lease_remaining_ms"] == 600 - counting[0]["age_ms"]
    assert facts["peer"]["heard"]
    assert facts["peer"]["session_known"]
    assert facts["peer"]["phase"] == "PASSIVE"
    assert facts["takeover"] is None
    assert facts["vip"]["held"]
    assert facts["alarms"] == []
    assert facts["next"] == "nothing"
    assert facts["replication"]["text"] == describe.REPLICATION_OFF


def test_a_passive_node() -> None:
    pair = situations.settled()
    facts = seen(pair, pair.standby)
    assert (facts["phase"], facts["row"], facts["next"]) == ("PASSIVE", "P90", "nothing")
    assert facts["lease_remaining_ms"] is None
    assert [one["ok"] for one in facts["takeover"]["conditions"]] == [
        False, True, True, False, False,
    ]  # fmt: skip
    assert condition(facts, 1)[1].startswith("the peer serves (heard ")
    assert facts["takeover"]["obstacle"] is None
    assert facts["alarms"] == []


def test_a_node_that_boots_alone_says_what_it_waits_for() -> None:
    pair = situations.waiting()
    facts = seen(pair, pair.primary)
    assert (facts["phase"], facts["row"]) == ("WAITING", "W90")
    assert facts["peer"]["age_ms"] is None
    assert facts["peer"]["phase"] is None
    assert not facts["peer"]["session_known"]
    assert "`nfsha activate`" in facts["next"]


def test_an_isolated_node() -> None:
    pair = situations.isolated()
    facts = seen(pair, pair.primary)
    assert (facts["phase"], facts["row"]) == ("ISOLATED", "I90")
    assert not any(one["counts"] for one in facts["evidence"])
    assert not facts["vip"]["held"]
    assert "`nfsha confirm-peer-down`" in facts["next"]


def test_clients_that_nobody_serves_are_an_alarm_after_some_seconds() -> None:
    pair = situations.settled()
    pair.linked = False
    pair.primary.witness = pair.standby.witness = False
    pair.run(5000)
    assert "unserved" not in alarms(pair, pair.primary)
    assert "unserved" not in alarms(pair, pair.standby)
    pair.run(2000)
    assert "unserved" in alarms(pair, pair.primary)
    assert "unserved" in alarms(pair, pair.standby)


def test_silence_is_counted_towards_the_takeover() -> None:
    pair = situations.settled()
    pair.primary.on = False
    pair.run(500)
    ok, reason = condition(seen(pair, pair.standby), 1)
    assert not ok
    assert re.fullmatch(r"the peer serves \(heard \d+ ms ago\)", reason)
    pair.standby.state.chain_since_ms = pair.now_ms - 700  # a gap: silence counts anew
    pair.standby.state.heard_ms = pair.now_ms - 1500
    assert condition(seen(pair, pair.standby), 1) == (False, "silent for 700 of 1000 ms")


def test_a_dead_daemon_whose_kernel_answers_is_an_alarm_only_after_its_lease() -> None:
    pair = situations.vip_answered(2000)
    facts = seen(pair, pair.standby)
    assert (facts["phase"], facts["row"]) == ("PASSIVE", "P94")
    assert condition(facts, 1)[0]
    assert condition(facts, 4) == (False, f"{OTHER_MAC} answers for it")
    assert condition(facts, 5)[0]
    assert facts["vip"]["answered_by"] == OTHER_MAC
    assert facts["alarms"] == []
    pair.run(400)
    assert alarms(pair, pair.standby) == []
    pair.run(400)
    assert alarms(pair, pair.standby) == ["vip-held"]
    assert next_step(pair.standby.state, pair.now_ms).startswith("look at the machine")
    pair.standby.state.report = None  # never heard: its own lease is the measure
    assert alarms(pair, pair.standby) == ["vip-held"]
    pair.standby.state.vip_answered_since_ms = None
    assert alarms(pair, pair.standby) == []


def test_an_announced_absence_delays_the_alarm() -> None:
    pair = situations.settled()
    assert pair.ask(pair.primary, CommandKind.RESTART).accepted
    pair.run(200)
    pair.primary.on = False
    pair.standby.answered_by = OTHER_MAC
    pair.run(10_000)
    assert alarms(pair, pair.standby) == []
    pair.run(1000)
    assert alarms(pair, pair.standby) == ["vip-held"]


def test_a_third_machine_at_the_vip_is_an_alarm_while_the_peer_is_heard() -> None:
    pair = situations.settled()
    state = pair.primary.state
    state.phase = Phase.ISOLATED
    state.survey = replace(
        state.survey, started_ms=pair.now_ms, ended_ms=pair.now_ms, answered_by=OTHER_MAC
    )
    state.vip_answered_since_ms = pair.now_ms - 2400
    assert "vip-held" not in alarms_of(state, pair.now_ms)
    state.vip_answered_since_ms = pair.now_ms - 2600
    assert OTHER_MAC in alarms_of(state, pair.now_ms)["vip-held"]


def test_an_interface_that_hears_nobody_proves_nothing() -> None:
    pair = situations.vip_answered(2000)
    state = pair.standby.state
    state.survey = replace(state.survey, answered_by=None, heard_other=False)
    assert condition(situation(state, pair.now_ms), 4) == (
        False,
        "no answer, but this interface hears nobody else either",
    )
    state.survey = replace(state.survey, heard_other=True)
    assert condition(situation(state, pair.now_ms), 4)[0]


def test_diverged_names_both_histories() -> None:
    pair = situations.diverged()
    facts = seen(pair, pair.standby)
    assert facts["phase"] == "DIVERGED"
    assert alarms(pair, pair.standby) == ["diverged"]
    assert "fedcba98" in facts["alarms"][0]["text"]
    assert "01234567" in facts["alarms"][0]["text"]
    assert "--keep standby` (here)" in facts["next"]
    pair.standby.state.report = None
    assert alarms(pair, pair.standby) == ["diverged"]


def test_maintenance_and_its_promise() -> None:
    pair = situations.in_maintenance()
    standby, primary = seen(pair, pair.standby), seen(pair, pair.primary)
    assert standby["maintenance"] is True
    assert standby["promise"]["own"] == "standing"
    assert standby["next"] == "when the work is done: `nfsha maintenance off`"
    assert primary["promise"]["peer"] == "standing"
    assert [one["kind"] for one in primary["evidence"] if one["counts"]] == ["promise"]
    assert primary["lease_remaining_ms"] == 600
    assert primary["alarms"] == []
    pair.standby.on = False
    pair.run(3000)
    assert alarms(pair, pair.primary) == []


def test_a_promise_forbids_the_takeover_and_says_so() -> None:
    pair = situations.in_maintenance()
    pair.primary.on = False
    pair.run(3000)
    assert pair.ask(pair.standby, CommandKind.MAINTENANCE_OFF).accepted
    state = pair.standby.state
    state.phase, state.row = Phase.PASSIVE, "P93"
    facts = situation(state, pair.now_ms)
    assert facts["takeover"]["promised"] is True  # type: ignore[index]
    assert facts["takeover"]["obstacle"] == "promised"  # type: ignore[index]
    assert "activate --force" in str(facts["next"])


def test_a_fault_says_what_is_broken() -> None:
    pair = situations.faulty()
    facts = seen(pair, pair.primary)
    assert facts["phase"] == "FAULT"
    assert facts["health"]["fit"] is False
    assert alarms(pair, pair.primary) == ["unfit"]
    assert "connection refused" in facts["next"]
    assert alarms(pair, pair.standby) == ["peer-unable"]
    assert "its NFS service or storage not sound" in seen(pair, pair.standby)["alarms"][0]["text"]
    assert seen(pair, pair.standby)["next"] == "look at `nfsha status` on the other node"


def test_a_serving_node_without_a_peer_says_that_nobody_could_take_over() -> None:
    pair = situations.settled()
    pair.standby.on = False
    pair.run(3000)
    assert seen(pair, pair.primary)["phase"] == "ACTIVE"
    assert [o["kind"] for o in seen(pair, pair.primary)["evidence"] if o["counts"]] == ["witness"]
    assert alarms(pair, pair.primary) == ["peer-silent"]
    assert seen(pair, pair.primary)["next"].startswith("start the other node")


def test_a_silent_witness_is_an_alarm_where_it_is_needed() -> None:
    pair = situations.settled()
    pair.standby.witness = False
    assert alarms(pair, pair.standby) == []
    pair.primary.on = False
    pair.run(800)
    assert alarms(pair, pair.standby) == []
    pair.run(400)
    assert alarms(pair, pair.standby) == ["witness-silent"]


def test_a_disk_that_refuses_the_journal() -> None:
    pair = situations.settled()
    pair.standby.persist_error = "No space left on device"
    assert pair.ask(pair.standby, CommandKind.MAINTENANCE_ON).accepted
    pair.run(100)
    assert alarms(pair, pair.standby) == ["persist-failed"]
    assert "No space left" in seen(pair, pair.standby)["alarms"][0]["text"]


def test_a_corrupt_journal_is_said_even_after_a_new_one() -> None:
    pair = Pair(None, Journal(EPOCH), corrupt="the checksum does not match").run(1000)
    assert "journal-corrupt" in alarms(pair, pair.primary)
    state = pair.primary.state
    state.durable = Journal()
    assert alarms_of(state, pair.now_ms)["journal-corrupt"].startswith("the journal cannot be used")
    state.durable = Journal(EPOCH)
    assert "a new one is written" in alarms_of(state, pair.now_ms)["journal-corrupt"]


def test_short_timings_of_the_peer() -> None:
    def configure(role: Role) -> CoreConfig:
        timings = model.Timings(takeover_after_ms=1000 if role is Role.PRIMARY else 800)
        return CoreConfig(role, boot_id="boot", timings=timings)

    pair = Pair(Journal(EPOCH), Journal(EPOCH), configure).run(3000)
    assert "timings-short" in alarms(pair, pair.primary)
    facts = seen(pair, pair.primary)
    assert facts["peer"]["timings_suffice"] is False
    assert "800 ms" in facts["alarms"][0]["text"]
    assert "900 ms" in facts["alarms"][0]["text"]
    assert facts["next"].startswith("give both nodes the same [timing]")


def test_somebody_who_claims_the_vip_of_a_serving_node() -> None:
    pair = situations.settled()
    pair.primary.inbox.append(model.VipClaimed(OTHER_MAC))
    pair.run(100)
    assert alarms(pair, pair.primary) == ["vip-claimed"]
    pair.primary.state.claimed_ms -= describe.CLAIM_SHOWN_MS
    assert alarms(pair, pair.primary) == []
    pair.primary.state.claimed_ms += describe.CLAIM_SHOWN_MS
    pair.primary.state.phase = Phase.ISOLATED
    assert "vip-claimed" not in alarms(pair, pair.primary)


def test_the_operators_word_and_a_fence_proof_count() -> None:
    pair = situations.vip_answered(2000)
    assert pair.ask(pair.standby, CommandKind.CONFIRM_PEER_DOWN).accepted
    assert condition(seen(pair, pair.standby), 5) == (True, "the operator's word")
    assert seen(pair, pair.standby)["promise"]["peer_down"] == "operator"
    pair.standby.state.peer_down = "fence"
    assert condition(seen(pair, pair.standby), 5) == (True, "a fence agent proved it")


def test_a_silent_witness_fails_the_fifth_condition() -> None:
    pair = situations.settled()
    pair.standby.witness = False
    pair.primary.on = False
    pair.run(2000)
    ok, reason = condition(seen(pair, pair.standby), 5)
    assert not ok
    assert reason.startswith("the witness has not answered lately")


def with_token(role: Role) -> CoreConfig:
    return CoreConfig(role, boot_id="boot", exclusivity=Exclusivity.TOKEN)


def test_a_token_is_evidence_and_the_fifth_condition() -> None:
    pair = Pair(Journal(EPOCH), Journal(EPOCH), with_token).run(5000)
    state = pair.primary.state
    assert state.phase is Phase.ACTIVE
    state.token_since_ms = pair.now_ms - 5000
    state.token_acked_ms = pair.now_ms - 20
    state.echo_ms = pair.now_ms - 40
    kinds = {one["kind"]: one for one in seen(pair, pair.primary)["evidence"]}
    assert set(kinds) == {"echo", "token"}
    assert kinds["token"] == {"kind": "token", "age_ms": 20, "fresh": True, "counts": True}
    state.phase = Phase.ISOLATED
    kinds = {one["kind"]: one for one in seen(pair, pair.primary)["evidence"]}
    assert kinds["token"] == {"kind": "token", "age_ms": None, "fresh": False, "counts": False}
    state.token_own_record = True
    kinds = {one["kind"]: one for one in seen(pair, pair.primary)["evidence"]}
    assert kinds["token"]["counts"]
    passive = pair.standby.state
    assert condition(seen(pair, pair.standby), 5)[1] == "asked for only in the takeover itself"
    passive.token_since_ms, passive.token_acked_ms = pair.now_ms - 1000, pair.now_ms - 10
    assert condition(seen(pair, pair.standby), 5) == (True, "the token is held")


def test_replication_that_is_on() -> None:
    pair = situations.settled()
    state = pair.standby.state
    state.config = replace(state.config, replication=True)
    state.replica_whole, state.replica_epoch, state.replica_reason = True, state.epoch, ""
    facts = situation(state, pair.now_ms)
    assert facts["replication"] == {"mode": "on", "whole": True, "text": "a whole replica"}
    assert condition(facts, 2) == (True, "whole")
    state.replica_whole, state.replica_reason = False, "volume data: never synced"
    facts = situation(state, pair.now_ms)
    assert facts["replication"]["text"].endswith("volume data: never synced")  # type: ignore[index]
    assert condition(facts, 2) == (False, "volume data: never synced")


def test_a_peer_that_is_there_but_does_not_serve() -> None:
    pair = situations.settled()
    pair.primary.inbox.append(model.FitChanged(ok=False, reason="nfsd is gone"))
    pair.run(700)
    facts = seen(pair, pair.standby)
    assert facts["row"] == "P91"
    assert condition(facts, 1)[1].startswith("the peer does not serve, but is there (heard ")


def test_a_stopping_daemon_needs_nothing() -> None:
    pair = situations.settled()
    assert pair.ask(pair.primary, CommandKind.STOP).accepted
    facts = seen(pair, pair.primary)
    assert facts["stopping"] == "stop"
    assert facts["next"] == "nothing: the daemon is stopping"


def test_an_adopted_address_has_no_lease_to_show() -> None:
    pair = situations.settled()
    state = pair.primary.state
    state.phase, state.adopted = Phase.STARTING, True
    assert situation(state, pair.now_ms)["lease_remaining_ms"] is None


def test_a_node_without_an_epoch() -> None:
    pair = Pair(None, None)
    pair.standby.on = False
    pair.run(100)
    facts = seen(pair, pair.primary)
    assert facts["epoch"] is None
    assert facts["authority"] is None


# --------------------------------------------------------------------------- handover


def moved(pair: Pair, node: Node) -> Situation:
    facts = seen(pair, node)["handover"]
    assert isinstance(facts, dict)
    return facts


def test_nothing_is_moved_and_nothing_was() -> None:
    pair = situations.copied()
    assert moved(pair, pair.primary) == {
        "side": None,
        "step": None,
        "to": None,
        "epoch": None,
        "text": None,
        "since_ms": None,
        "held_ms": None,
        "last": None,
    }


@pytest.mark.parametrize(
    ("made", "giver", "receiver"),
    [
        (
            situations.approaching,
            ("PRESYNC", "the other node comes near to this one's data, and this one serves on"),
            ("PRESYNC", "comes near to the other node's data, which still serves"),
        ),
        (
            situations.frozen,
            ("FREEZING", "clients are held; waits until nothing writes any more"),
            ("PRESYNC", "near enough: the other node is asked to hold its clients"),
        ),
        (
            situations.prepared,
            ("PREPARED", "gave its authority away; waits for the other node's word"),
            ("FINAL_SYNC", "last pass and proof; clients are held"),
        ),
        (
            situations.proved,
            ("PREPARED", "gave its authority away; waits for the other node's word"),
            ("RESTORING", "both copies are proved equal; the new epoch goes to the disk"),
        ),
    ],
)
def test_both_sides_say_how_far_a_handover_is(
    made: Any, giver: tuple[str, str], receiver: tuple[str, str]
) -> None:
    pair = made()
    for node, side, told in (
        (pair.primary, "giver", giver),
        (pair.standby, "receiver", receiver),
    ):
        facts = moved(pair, node)
        assert (facts["side"], facts["to"], facts["epoch"]) == (side, "standby", 8)
        assert (facts["step"], facts["text"]) == told
        assert seen(pair, node)["alarms"] == []
        assert seen(pair, node)["next"] == describe._NEXT_BY_ROW.get(node.state.row, "nothing")


def test_it_is_said_how_long_clients_are_held() -> None:
    pair = situations.prepared()
    before = moved(pair, pair.primary)["held_ms"]
    pair.run(3000)
    assert moved(pair, pair.primary)["held_ms"] == before + 3000
    assert 3000 <= moved(pair, pair.standby)["held_ms"] < 3200
    assert moved(pair, pair.standby)["since_ms"] >= 3000


def test_a_request_is_shown_until_it_is_taken_up() -> None:
    pair = situations.copied()
    pair.standby.state.unsure = True
    pair.standby.unanswered.add(model.Persist)
    assert pair.ask(pair.primary, CommandKind.HANDOVER, to=Role.STANDBY).accepted
    pair.run(1000)
    facts = moved(pair, pair.primary)
    assert (facts["side"], facts["step"], facts["epoch"]) == ("giver", "ASKED", None)
    assert facts["since_ms"] == 1000


def test_how_the_last_handover_ended() -> None:
    pair = situations.prepared()
    assert pair.ask(pair.standby, CommandKind.ABORT).accepted
    pair.run(1000)
    last = moved(pair, pair.standby)["last"]
    assert (last["epoch"], last["to"], last["done"]) == (8, "standby", False)
    assert last["why"] == "the operator ended it"
    assert 900 <= last["age_ms"] <= 1000
    assert "its `nfsha status` says why" in moved(pair, pair.primary)["last"]["why"]
    pair = situations.proved()
    number = pair.standby.state.flights["persist"].number
    pair.standby.unanswered.clear()
    pair.standby.inbox.append(model.Completed(number, model.Persisted(pair.standby.state.writing)))
    pair.run(500)
    for node in (pair.primary, pair.standby):
        last = moved(pair, node)["last"]
        assert (last["done"], last["why"]) == (True, "done")


def test_a_node_in_prepared_shows_the_conditions_of_a_takeover() -> None:
    pair = situations.prepared()
    facts = seen(pair, pair.primary)
    assert condition(facts, 1)[1].startswith("the peer works on the handover (heard ")
    assert condition(facts, 2)[0]
    assert facts["next"].endswith("or end it with `nfsha abort`")
    pair.primary.witness = False
    pair.standby.on = False
    pair.run(8000)
    facts = seen(pair, pair.primary)
    assert facts["row"] == "Q93"
    assert facts["next"].startswith("start the other node: it may have taken over")
    assert moved(pair, pair.primary)["side"] == "giver"
    assert not condition(facts, 5)[0]
    assert "unserved" in alarms(pair, pair.primary)


def test_a_receiver_that_cannot_tell_is_named_as_the_trouble() -> None:
    pair = situations.prepared()
    pair.standby.persist_error = "No space left on device"
    epoch = situations.given(pair)
    pair.standby.inbox.append(model.FinalChanged(epoch, proved=True))
    pair.run(500)
    facts = seen(pair, pair.primary)
    assert facts["row"] == "Q96"
    assert "the disk of its journal?" in facts["next"]
    assert "persist-failed" in alarms(pair, pair.standby)


def test_a_handover_is_no_reason_to_doubt_the_other_node() -> None:
    pair = situations.approaching()
    pair.run(6000)
    assert alarms(pair, pair.primary) == []
    assert alarms(pair, pair.standby) == []


def test_every_hint_is_of_a_row_that_stays_where_it_is() -> None:
    stays = {row.id for row in ROWS if row.to is None and row.event == TURN}
    assert set(describe._NEXT_BY_ROW) <= stays
    assert set(describe._NEXT_BY_OBSTACLE) == {
        "promised",
        "not-whole",
        "unknown-to-peer",
        "unfit",
        "out-of-touch",
    }


@pytest.mark.parametrize(
    "pair",
    [
        situations.settled, situations.waiting, situations.isolated, situations.diverged,
        situations.in_maintenance, situations.faulty, lambda: situations.vip_answered(4000),
        situations.copied, situations.approaching, situations.frozen, situations.prepared,
        situations.proved,
    ],
)  # fmt: skip
def test_a_situation_is_plain_json_and_changes_nothing(pair: Any) -> None:
    made = pair()
    for node in (made.primary, made.standby):
        before = repr(node.state)
        facts = made.seen(node)
        assert json.loads(json.dumps(facts)) == facts
        assert repr(node.state) == before


def test_an_epoch_of_the_peer_is_shown_whole() -> None:
    pair = situations.settled()
    peer = seen(pair, pair.standby)["peer"]
    assert peer["epoch"] == {"number": 7, "id": EPOCH.id, "authority": "primary"}
    assert Epoch(**{**peer["epoch"], "authority": Role(peer["epoch"]["authority"])}) == EPOCH

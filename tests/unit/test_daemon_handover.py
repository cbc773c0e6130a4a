"""What a daemon tells of a move: each node's part of the report, the plan's id, what it accepts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nfsha.core import model
from nfsha.core.model import CommandKind, Epoch, Phase, Role
from nfsha.daemon import handover_plan
from nfsha.daemon.handover_plan import Plans
from nfsha.daemon.handover_report import Moves, progress
from nfsha.daemon.handover_track import SERVED_WITHIN_MS, Part, Tracker
from nfsha.daemon.shapes import MAX_BYTES, fits
from nfsha.host.control import CommandError
from nfsha.replica.fetching.tally import Tally
from nfsha.replica.rsync.progress import Progress, Stage
from tests.unit import situations
from tests.unit.situations import Pair, given

Facts = dict[str, Any]

# --------------------------------------------------------------------------- the parts


class Watched:
    """A pair with a tracker on each node, as the daemon's loop has one."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.trackers = (Tracker(), Tracker())
        self.parts: list[Part] = []

    def run(self, duration_ms: int) -> None:
        for _ in range(duration_ms // situations.STEP_MS):
            self.pair.run(situations.STEP_MS)
            for node, tracker in zip(
                (self.pair.primary, self.pair.standby), self.trackers, strict=True
            ):
                part = tracker.follow(node.state, self.pair.now_ms, self.pair.now_ms * 10**6)
                if part is not None:
                    self.parts.append(part)

    def part(self, side: str) -> Part:
        found = [one for one in self.parts if one.side == side]
        assert len(found) == 1, self.parts
        return found[0]


def moved(held_ms: int) -> Watched:
    """A switchover from its begin; clients were held for about so long."""
    watched = Watched(situations.copied())
    pair = watched.pair
    assert pair.ask(pair.standby, CommandKind.HANDOVER, to=Role.STANDBY).accepted
    watched.run(500)
    pair.standby.inbox.append(model.PresyncChanged(given(pair), ready=True))
    watched.run(held_ms)
    assert pair.standby.state.phase is Phase.FINAL_SYNC
    return watched


def test_both_parts_of_a_move_that_was_done() -> None:
    watched = moved(held_ms=700)
    epoch = given(watched.pair)
    watched.pair.standby.inbox.append(model.FinalChanged(epoch, proved=True))
    watched.run(1000)
    giver, receiver = watched.part("giver"), watched.part("receiver")
    assert giver.done
    assert receiver.done
    assert giver.number == receiver.number == f"{epoch.number}-{epoch.id[:8]}"
    assert giver.stall_ms is not None
    assert receiver.stall_ms is not None
    assert 700 <= giver.stall_ms <= 850
    assert receiver.stall_ms <= giver.stall_ms
    assert "by the giver's clock" in giver.stall_how
    assert set(giver.steps) == {"FREEZING", "PREPARED"}
    assert set(receiver.steps) == {"PRESYNC", "FINAL_SYNC", "RESTORING"}
    assert receiver.steps["PRESYNC"] >= 480
    assert sum(receiver.steps.values()) == receiver.took_ms


def test_an_aborted_freeze_is_measured_to_the_opening_on_the_same_node() -> None:
    watched = moved(held_ms=300)
    assert watched.pair.ask(watched.pair.standby, CommandKind.ABORT).accepted
    watched.run(2000)
    giver, receiver = watched.part("giver"), watched.part("receiver")
    assert watched.pair.primary.state.phase is Phase.ACTIVE
    assert (giver.done, receiver.done) == (False, False)
    assert receiver.why == "the operator ended it"
    assert receiver.stall_ms is None
    assert giver.stall_ms is not None
    assert 300 <= giver.stall_ms <= 600
    assert "on the same node" in giver.stall_how
    assert giver.number == receiver.number


def test_two_that_end_before_the_freeze_have_two_ids_though_one_epoch() -> None:
    watched = Watched(situations.copied())
    pair = watched.pair
    epochs = []
    for _ in range(2):
        assert pair.ask(pair.standby, CommandKind.HANDOVER, to=Role.STANDBY).accepted
        watched.run(200)
        epochs.append(given(pair))
        assert pair.ask(pair.standby, CommandKind.ABORT).accepted
        watched.run(200)
    assert [part.side for part in watched.parts] == ["receiver", "receiver"]
    assert epochs[0] == epochs[1]
    assert watched.parts[0].number != watched.parts[1].number


def test_a_giver_restarted_meanwhile_does_not_know_the_stall() -> None:
    pair = situations.prepared()
    pair.primary.state.froze_ms = model.NEVER_MS
    watched = Watched(pair)
    watched.run(100)
    pair.standby.inbox.append(model.FinalChanged(given(pair), proved=True))
    watched.run(1000)
    assert watched.part("giver").stall_ms is None
    assert "restarted" in watched.part("giver").stall_how


def test_a_stall_whose_end_nobody_sees_is_not_known() -> None:
    watched = moved(held_ms=300)
    pair = watched.pair
    pair.primary.thaw_error = "a volume hangs"
    assert pair.ask(pair.standby, CommandKind.ABORT).accepted
    watched.run(100)
    pair.standby.on = False
    watched.run(SERVED_WITHIN_MS + 1000)
    assert pair.primary.state.phase is not Phase.ACTIVE
    assert watched.part("giver").stall_ms is None
    assert "nobody was seen" in watched.part("giver").stall_how


# --------------------------------------------------------------------------- the plan


class World:
    """As much of a daemon as its plans look at: of a volume on both nodes."""

    def __init__(self, role: Role = Role.PRIMARY) -> None:
        self.epoch = Epoch(7, "0123456789abcdef", Role.STANDBY)
        self.held: Facts = {}
        self.said: list[tuple[str, object]] = []
        self.told: Facts = {}
        self.why_not = ""
        one = SimpleNamespace(empty=False, stamp=self.epoch)
        self.pair = SimpleNamespace(name="data", uuid="u-1", here=one, there=one)
        self.replicator: Any = SimpleNamespace(
            inventory=SimpleNamespace(pairs=lambda: [self.pair]),
            store=SimpleNamespace(taints={}),
            overview=SimpleNamespace(held=lambda: self.held),
            why_no_look_ahead=lambda: self.why_not,
        )
        self.listeners: list[Callable[[Facts], None]] = []
        state = SimpleNamespace(durable=SimpleNamespace(epoch=self.epoch))
        self.shell = SimpleNamespace(
            engine=SimpleNamespace(state=state),
            world=SimpleNamespace(replication=self, settings=SimpleNamespace(role=role)),
            inbox=SimpleNamespace(watch=lambda _: None),
        )
        self.guards = [{"name": "journal", "ok": True, "found": "sound"}]

    def say(self, key: str, value: object) -> None:
        self.said.append((key, value))

    async def look(self, *, young_ms: int = 0) -> None:
        self.said.append(("looked", None))

    def plan(self, to: Role) -> Facts:
        return {"to": str(to), "ok": True, "guards": self.guards}


def plans_of(world: World) -> Plans:
    return Plans(cast("Any", world.shell), cast("Any", world))


def test_an_approval_is_for_the_plan_that_was_shown() -> None:
    world = World()
    plans = plans_of(world)
    shown = plans.plan(Role.PRIMARY)["plan"]
    plans.require(Role.PRIMARY, shown)
    with pytest.raises(CommandError, match="the target: before primary, now standby"):
        plans.require(Role.STANDBY, shown)
    with pytest.raises(CommandError, match="no plan 'x' is known") as refusal:
        plans.require(Role.PRIMARY, "x")
    assert refusal.value.details["refused"] is True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: setattr(w.shell.engine.state.durable, "epoch", Epoch(8, "f" * 16, Role.PRIMARY)),
         "the epoch: before 7"),
        (lambda w: setattr(w.pair, "uuid", "u-2"), r"the volumes: before data \(u-1\), now data"),
        (lambda w: setattr(w.pair.here, "stamp", None), "quarantine: before none, now data"),
        (lambda w: w.replicator.store.taints.update({"u-1": "resync"}),
         "quarantine: before none, now data"),
    ],
)  # fmt: skip
def test_what_matters_voids_an_approval_and_is_named(
    change: Callable[[World], None], words: str
) -> None:
    world = World()
    plans = plans_of(world)
    shown = plans.plan(Role.PRIMARY)["plan"]
    change(world)
    with pytest.raises(CommandError, match=words):
        plans.require(Role.PRIMARY, shown)


def test_a_guard_that_fails_now_and_held_deletions_refuse() -> None:
    world = World()
    plans = plans_of(world)
    shown = plans.plan(Role.PRIMARY)["plan"]
    world.held = {"u-1": "ab" * 32}
    with pytest.raises(CommandError, match="volume data: plan abababababababab waits"):
        plans.require(Role.PRIMARY, shown)
    world.held = {}
    world.guards[0] = {"name": "journal", "ok": False, "found": "torn"}
    with pytest.raises(CommandError, match="journal: torn"):
        plans.require(Role.PRIMARY, shown)


def test_the_giver_goes_by_what_the_receiver_told() -> None:
    here, there = World(Role.PRIMARY), World(Role.STANDBY)
    assert plans_of(here).plan(Role.PRIMARY)["plan"] == plans_of(there).plan(Role.PRIMARY)["plan"]
    here.held = {"u-1": "ab" * 32}
    there.told = {"held": {"u-1": "ab" * 32}}
    found = [plans_of(one).plan(Role.PRIMARY) for one in (here, there)]
    assert found[0]["plan"] == found[1]["plan"]
    assert not found[1]["ok"]
    there.told = {"held": {"u-1": 5}, "tainted": "nonsense"}
    assert plans_of(there).plan(Role.PRIMARY)["ok"]


def test_so_many_plans_are_remembered_and_no_more() -> None:
    world = World()
    plans = plans_of(world)
    first = plans.plan(Role.PRIMARY)["plan"]
    for number in range(handover_plan.REMEMBERED):
        world.pair.uuid = f"u-{number + 2}"
        plans.plan(Role.PRIMARY)
    with pytest.raises(CommandError, match="no plan"):
        plans.require(Role.PRIMARY, first)


async def answers_of(plans: Plans, to: str = "primary") -> list[Facts]:
    who = cast("Any", None)
    return [one async for one in plans.numbers("handover-numbers", {"to": to}, who)]


def test_why_there_are_no_numbers() -> None:
    world = World()
    world.why_not = "the peer is silent"
    last = asyncio.run(answers_of(plans_of(world)))[-1]
    assert (last["done"], last["numbers"], last["why"]) == (True, None, "the peer is silent")
    world.replicator = None
    assert "somebody else" in asyncio.run(answers_of(plans_of(world)))[-1]["why"]
    assert "somebody else" in asyncio.run(answers_of(plans_of(world), "standby"))[-1]["why"]


def test_a_node_that_does_not_answer_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover_plan, "ANSWER_WITHIN_S", 0.2)
    world = World()
    last = asyncio.run(answers_of(plans_of(world), "standby"))[-1]
    assert last["numbers"] is None
    assert "told nothing" in last["why"]
    asked = [value for key, value in world.said if key == "numbers_asked"]
    assert len(asked) == 2
    assert asked[1] is None  # no more


def test_a_node_that_dies_while_it_looks_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover_plan, "ANSWER_WITHIN_S", 0.3)
    monkeypatch.setattr(Plans, "_heard", lambda _: False)
    world = World()

    def told_at_once(key: str, value: object) -> None:
        if isinstance(value, dict):
            world.told = {"numbers": {"id": value["id"], "looked_at": 1, "volumes": 2}}

    world.say = told_at_once  # type: ignore[method-assign]
    answers = asyncio.run(answers_of(plans_of(world), "standby"))
    assert {"progress": {"looked_at": 1, "volumes": 2}} in answers
    assert "told nothing" in answers[-1]["why"]


class Receiver:
    """The other node of a giver's plans: it answers the question that stands, when it is let."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(handover_plan, "ANSWER_WITHIN_S", 1.0)
        monkeypatch.setattr(Plans, "_heard", lambda _: True)
        monkeypatch.setattr(handover_plan, "_answer_of", lambda told: {**told, "why": ""})
        self.world = world
        self.asked: list[Facts | None] = []
        world.say = lambda key, value: self.asked.append(cast("Any", value))  # type: ignore[method-assign]

    def answer(self) -> None:
        asked = self.asked[-1]
        assert asked is not None, "no question stands"
        self.world.told = {"numbers": {"id": asked["id"], "numbers": {"volumes": []}}}


async def asking(plans: Plans, *, names: bool = False) -> asyncio.Task[Facts]:
    async def last() -> Facts:
        args = {"to": "standby", "list": names}
        said = [one async for one in plans.numbers("handover-numbers", args, cast("Any", None))]
        return said[-1]

    task = asyncio.ensure_future(last())
    await asyncio.sleep(0.02)
    return task


def test_who_asks_while_another_one_waits_gets_the_same_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def play() -> None:
        receiver = Receiver(World(), monkeypatch)
        plans = plans_of(receiver.world)
        gone, *others = [await asking(plans) for _ in range(3)]
        assert len(receiver.asked) == 1
        gone.cancel()
        await asyncio.wait([gone])
        receiver.answer()
        for one in await asyncio.gather(*others):
            assert one["id"] == receiver.asked[0]["id"]  # type: ignore[index]
        assert receiver.asked[1:] == [None]
        # What comes later is another question: an answer of before may be old.
        later = await asking(plans)
        assert not later.done()
        assert receiver.asked[2]["id"] != receiver.asked[0]["id"]  # type: ignore[index]

    asyncio.run(play())


def test_who_wants_all_names_asks_for_the_others_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        receiver = Receiver(World(), monkeypatch)
        plans = plans_of(receiver.world)
        tasks = [await asking(plans, names=names) for names in (False, True, False)]
        assert [one["list"] for one in receiver.asked if one is not None] == [False, True]
        receiver.answer()
        assert len({one["id"] for one in await asyncio.gather(*tasks)}) == 1

    asyncio.run(play())


def test_numbers_of_another_form_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()

    def told_at_once(key: str, value: object) -> None:
        if isinstance(value, dict):
            world.told = {"numbers": {"id": value["id"], "numbers": {"sum": 5}, "why": ""}}

    world.say = told_at_once  # type: ignore[method-assign]
    monkeypatch.setattr(Plans, "_heard", lambda _: True)
    last = asyncio.run(answers_of(plans_of(world), "standby"))[-1]
    assert last["numbers"] is None
    assert "another form" in last["why"]


# --------------------------------------------------------------------------- both parts, one report


class Events:
    def __init__(self) -> None:
        self.lines: list[Facts] = []

    def append(self, **line: object) -> None:
        self.lines.append(line)


def moves_in(folder: Path, *, read: bool = True) -> tuple[Moves, Any]:
    """`read`: the reports of earlier lives are, and there were none."""
    tasks: list[Any] = []
    world = SimpleNamespace(
        settings=SimpleNamespace(paths=SimpleNamespace(state=folder), name="here"),
        replication=SimpleNamespace(replicator=None, told={}, say=lambda *_: None),
        events=Events(),
        clock_ms=lambda: 5000,
    )
    moves = Moves(cast("Any", world), cast("Any", SimpleNamespace(watch=tasks.append)))
    world.tasks = tasks
    if read:
        moves._known.set()
    return moves, world


PART: Facts = {
    "node": "there", "epoch": 8, "to": "primary", "began_ns": 10**18, "done": True, "why": "done",
    "took_ms": 2200, "stall_ms": 310, "stall_how": "measured", "steps": {"FREEZING": 40},
}  # fmt: skip
RECEIVED: Facts = {
    **PART, "stall_ms": 290, "steps": {"PRESYNC": 1900, "FINAL_SYNC": 290},
    "volumes": [
        {"name": "data", "passes": 3, "copied_files": 4, "copied_bytes": 5, "deleted": 6,
         "quarantined": 7},
    ],
    "rounds": [
        {"what": "full", "took_ms": 900, "copied_files": 4, "copied_bytes": 5, "trouble": ""},
    ],
}  # fmt: skip


def test_both_parts_are_kept_and_logged_once_as_one(tmp_path: Path) -> None:
    async def scene() -> tuple[Facts | None, list[Facts]]:
        moves, world = moves_in(tmp_path)
        state = situations.copied().primary.state
        for _ in range(2):  # it is told again and again
            for side, part in (("giver", PART), ("receiver", RECEIVED)):
                moves.heard({"report": {"id": "8-0123abcd", "side": side, "part": part}})
                await asyncio.gather(*world.tasks)
            moves.follow(state, 5000)
        return moves.report("8-0123abcd"), world.events.lines

    report, lines = asyncio.run(scene())
    assert report is not None
    assert report["stall_ms"] == 310  # the giver's: it saw both ends
    assert report["whole"]
    assert len(lines) == 1
    assert lines[0]["why"] == (
        "failback to the primary: done in 2.2 s, clients were held for 0.31 s"
    )
    assert lines[0]["detail"] == "nfsha events --report 8-0123abcd"


def test_what_is_told_or_asked_before_the_reports_are_read_waits_for_them(tmp_path: Path) -> None:
    async def scene() -> tuple[bool, Facts | None]:
        before, world = moves_in(tmp_path)
        before.heard({"report": {"id": "8-0123abcd", "side": "receiver", "part": RECEIVED}})
        await asyncio.gather(*world.tasks)
        moves, world = moves_in(tmp_path, read=False)
        moves.heard({"report": {"id": "8-0123abcd", "side": "giver", "part": PART}})
        waiting = [*world.tasks, asyncio.ensure_future(moves.known())]
        early, _ = await asyncio.wait(waiting, timeout=0.05)
        await moves.start()
        await asyncio.gather(*waiting)
        return bool(early), moves.report("8-0123abcd")

    early, report = asyncio.run(scene())
    assert not early
    assert report is not None
    assert report["whole"]


@pytest.mark.parametrize(
    "told",
    [
        "nonsense",
        {"id": "8-0123abcd", "side": "giver", "part": {**PART, "took_ms": "long"}},
        {"id": "../x", "side": "giver", "part": PART},
        {"id": "8-0123abcd", "side": "both", "part": PART},
    ],
)
def test_a_report_that_is_none_is_refused(
    told: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> list[Facts]:
        moves, world = moves_in(tmp_path)
        moves.heard({"report": told})
        await asyncio.gather(*world.tasks)
        return moves.reports()

    assert asyncio.run(scene()) == []
    assert len(caplog.records) == 1


class Ended:
    """The moves of a receiver whose giver ended the move before it held anybody."""

    def __init__(self, folder: Path) -> None:
        self.moves, self.world = moves_in(folder)
        self.now_ms = 5000
        self.world.clock_ms = lambda: self.now_ms
        self.pair = situations.copied()

    def turn(self) -> None:
        self.moves.follow(self.pair.standby.state, self.now_ms)

    def begin(self) -> None:
        assert self.pair.ask(self.pair.standby, CommandKind.HANDOVER, to=Role.STANDBY).accepted
        self.pair.run(200)
        self.turn()

    def end(self) -> None:
        assert self.pair.ask(self.pair.primary, CommandKind.ABORT).accepted
        self.pair.run(200)
        assert self.pair.standby.state.phase is Phase.PASSIVE
        self.turn()

    def hear(self, number: str, why: str) -> None:
        self.world.replication.told = {"move_ends": {"n": number, "why": why}}

    async def whys(self) -> list[str]:
        await asyncio.gather(*self.world.tasks)
        return [str(one["why"]) for one in self.moves.reports()]


@pytest.mark.parametrize("early", [True, False])
def test_the_receiver_says_by_whom_the_giver_was_made_to_end_it(
    tmp_path: Path, early: bool
) -> None:
    async def scene() -> list[str]:
        ended = Ended(tmp_path)
        ended.hear("1", "of a move before")
        ended.begin()
        if early:
            ended.hear("2", "an operator there")
        ended.end()
        assert bool(ended.world.tasks) is early
        ended.hear("2", "an operator there")
        ended.turn()
        assert ended.moves.last_why == "an operator there"
        return await ended.whys()

    assert asyncio.run(scene()) == ["an operator there"]


@pytest.mark.parametrize("stops", [True, False])
def test_a_word_that_does_not_come_is_not_waited_for_long(tmp_path: Path, stops: bool) -> None:
    async def scene() -> list[str]:
        ended = Ended(tmp_path)
        ended.hear("1", "of a move before")
        ended.begin()
        ended.end()
        assert not ended.world.tasks
        if stops:
            await ended.moves.settle()
            assert len(ended.world.events.lines) == 1  # the log has its line before the end
        else:
            ended.now_ms += 1000
            ended.turn()
        return await ended.whys()

    assert asyncio.run(scene()) == ["the giver ended it"]


def test_a_word_of_another_form_is_none(tmp_path: Path) -> None:
    async def scene() -> list[str]:
        ended = Ended(tmp_path)
        ended.begin()
        ended.world.replication.told = {"move_ends": {"n": 2, "why": ["nonsense"]}}
        ended.end()
        ended.now_ms += 1000
        ended.turn()
        return await ended.whys()

    assert asyncio.run(scene()) == ["the giver ended it"]


def test_a_giver_that_holds_nobody_tells_who_ends_it_before_it_does(tmp_path: Path) -> None:
    async def scene() -> list[tuple[str, object]]:
        moves, world = moves_in(tmp_path)
        said: list[tuple[str, object]] = []
        world.replication.say = lambda key, value: said.append((key, value))
        world.replication.delivered = False
        moves.follow(situations.settled().primary.state, 5000)
        telling = asyncio.ensure_future(moves.ending("an operator here"))
        await asyncio.sleep(0.05)
        assert not telling.done()
        world.replication.delivered = True
        await telling
        moves.goes_on()
        return said

    first, last = asyncio.run(scene())
    assert first[0] == "move_ends"
    assert cast("Facts", first[1])["why"] == "an operator here"
    assert last == ("move_ends", None)


def test_progress_is_of_this_round_and_of_what_runs() -> None:
    tally = Tally()
    tally.begin_round("full")
    tally.add("u-1", "a", copied_files=2, copied_bytes=100, deleted=0)
    tally.end_round(50)
    tally.begin_round("changes")
    tally.add("u-1", "a", copied_files=1, copied_bytes=10, deleted=0)
    running = Progress(Stage.COPY, bytes=30, files=1, total_bytes=90, eta_s=4)
    found = progress(cast("Any", SimpleNamespace(tally=tally)), [running, None])
    assert found == {
        "round": 2, "what": "changes", "volumes": 2, "files": 2, "bytes": 40, "total_bytes": 100,
        "eta_s": 4,
    }  # fmt: skip


def test_the_others_progress_is_shown_only_in_its_form(tmp_path: Path) -> None:
    moves, world = moves_in(tmp_path)
    now = progress(cast("Any", SimpleNamespace(tally=Tally())), [])
    world.replication.told = {"move": now}
    assert moves.progress("giver") == now
    assert moves.progress(None) is None
    world.replication.told = {"move": {**now, "bytes": "many"}}
    assert moves.progress("giver") is None


# --------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("value", "shape", "good"),
    [
        (5, int, True),
        (True, int, False),
        (1 << 70, int, False),
        ("x", str, True),
        (None, (int, None), True),
        ("x", (int, None), False),
        ([1, 2], [int], True),
        ([1, "2"], [int], False),
        ({"a": 1}, {"a": int}, True),
        ({"a": 1, "b": 2}, {"a": int}, False),
        ({}, {"a": int}, False),
        ({"x": 1}, {str: int}, True),
        ({"x": "1"}, {str: int}, False),
        ("x" * MAX_BYTES, str, False),
    ],
)
def test_shapes(value: object, shape: object, good: bool) -> None:
    assert fits(value, shape) is good

"""The receiver's rounds: when they are near enough, what ends them, and what the proof wants."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nfsha.core.model import Epoch, FinalChanged, PresyncChanged, Role
from nfsha.core.replication import Approach, Fetch, Finish, Flow, Offer, Rest
from nfsha.replica.clocks import Clocks
from nfsha.replica.fetching.copying import Copy, State
from nfsha.replica.fetching.fetching import Fetching
from nfsha.replica.fetching.guards import RefusedError
from nfsha.replica.fetching.schedule import Kind, Reason
from nfsha.replica.handover import receiving as receiving_module
from nfsha.replica.handover.convergence import Convergence, Took
from nfsha.replica.handover.receiving import MAX_FAILURES, Receiving
from nfsha.replica.journal.published import Published, encode_published
from nfsha.replica.source.facts import SourceFacts
from nfsha.replica.source.listing import Listing, names_in, read_listing
from nfsha.replica.volume.marks import Mark


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed round is made again at once."""
    monkeypatch.setattr(receiving_module, "RETRY_AFTER_S", 0.0)


EPOCH = Epoch(3, "00000000000000aa", Role.STANDBY)
NEXT = Epoch(4, "00000000000000bb", Role.PRIMARY)
UUIDS = ("0d8ab111-3c0a-4d4f-9d7c-0123456789ab", "0d8ab111-3c0a-4d4f-9d7c-0123456789ac")
JOURNAL = "00000000000000cc"
FACTS = SourceFacts(EPOCH, 100, (), {})


def mark(uuid: str, seq: int, walk: str = "folders") -> Mark:
    return Mark(uuid, EPOCH, 1, 0, 0, 0, 0, 10, walk, JOURNAL, seq)


def published(uuid: str, last: int, folders: Mapping[bytes, int], **more: Any) -> Published:
    changed = tuple(sorted(folders.items()))
    return replace(Published(uuid, JOURNAL, 1, last, 0, "", 100, changed), **more)


class Spares:
    """Notes of which volumes the large files get spares, and that those left are removed."""

    def __init__(self) -> None:
        self.done: list[str] = []

    async def make(self, uuid: str) -> None:
        self.done.append(f"make {UUIDS.index(uuid)}")

    async def drop(self) -> None:
        self.done.append("drop")


class Source:
    """A giver, and a `Fetching` in front of it that notes what is asked of it."""

    def __init__(self, *uuids: str) -> None:
        self.copies = {uuid: Copy(uuid) for uuid in uuids}
        self.proving = self.finding = self
        self.marks: dict[str, Mark] = {}
        self.lists: dict[str, Published] = {uuid: published(uuid, 0, {}) for uuid in uuids}
        self.now_ms = 0
        self.takes_ms: dict[Kind, list[int]] = {Kind.FULL: [], Kind.ORDINARY: []}
        self.done: list[str] = []
        self.differs: dict[str, str] = {}
        self.after_freeze: dict[str, Published] = {}
        self.troubles: list[Exception] = []
        self.lacks: list[str] = []
        self.hangs: list[str] = []
        self.asked: list[tuple[str, list[str]]] = []
        self.states: list[State] = []
        self.facts = FACTS
        self.careful = self.thorough = False
        self.transferred_bytes = 0
        self.sparing = Spares()
        self.pressing = False
        self.was_pressing: list[bool] = []
        self.listed: Listing | None = None
        self.tally: object = None
        self.schedule = SimpleNamespace(
            make=self.make, hold=lambda: None, let_go=lambda: self.done.append("let go")
        )

    def change(self, uuid: str, folder: bytes) -> None:
        known = self.lists[uuid]
        folders = dict(known.folders) | {folder: known.last + 1}
        self.lists[uuid] = published(uuid, known.last + 1, folders)

    async def end(self) -> str:
        return ""

    def begin(self, epoch: Epoch) -> None:
        assert epoch == EPOCH

    async def list_all(self, epoch: Epoch) -> Listing:
        self.done.append("list")
        if self.troubles:
            raise self.troubles.pop(0)
        return Listing(self.facts, dict(self.lists))

    def limit_of(self, uuid: str) -> int | None:
        return 1000 if uuid == UUIDS[1] else None

    def lacking(self) -> str:
        return self.lacks.pop(0) if self.lacks else ""

    async def unwritable(self, uuids: Iterable[str], *, durable: bool) -> str:
        self.asked.append(("durable" if durable else "", [*uuids]))
        return self.hangs.pop(0) if self.hangs else ""

    async def look_for_hangs(self, uuids: Iterable[str]) -> None:
        self.asked.append(("after it", [*uuids]))

    async def make(self, uuid: str, reason: Reason) -> bool:
        care = " thorough" if self.thorough else " careful" if self.careful else ""
        self.done.append(f"{reason.kind} {UUIDS.index(uuid)}{care}")
        self.was_pressing.append(self.pressing)
        assert (self.listed is None) is (reason.kind is Kind.FULL)
        times = self.takes_ms[reason.kind]
        self.now_ms += times.pop(0) if times else 100
        done = mark(uuid, self.lists[uuid].last)
        self.marks[uuid] = replace(done, transferred_bytes=self.transferred_bytes)
        self.copies[uuid].state = self.states.pop(0) if self.states else State.IDLE
        return True

    async def compare(self, uuid: str, epoch: Epoch, folders: tuple[bytes, ...]) -> str:
        self.done.append(f"compare {UUIDS.index(uuid)} {b' '.join(folders).decode()}")
        if uuid in self.after_freeze:
            self.lists[uuid] = self.after_freeze[uuid]
        return self.differs.get(uuid, "")

    async def vouch(self, uuid: str, epoch: Epoch, listing: Listing) -> str:
        late, why = listing.since(self.marks[uuid])
        return why if late is None else f"{late} changed" if late else ""


Report = PresyncChanged | FinalChanged


def receive(
    source: Source,
    step: Approach | Finish,
    max_stall_ms: int = 10_000,
    then: Sequence[Flow] = (Rest("it is over"),),
) -> Report:
    """What the core is told of one step."""

    async def scene() -> Report:
        told: asyncio.Future[Report] = asyncio.get_running_loop().create_future()
        begun: list[asyncio.Task[None]] = []
        receiving = Receiving(
            cast("Fetching", source), max_stall_ms, parallel=2,
            clocks=Clocks(lambda: source.now_ms, lambda: 0),
            name_of=lambda uuid: f"v{UUIDS.index(uuid)}", marks=lambda: source.marks,
            report=told.set_result, watch=begun.append,
        )  # fmt: skip
        receiving.follow(step)
        found = await told
        for flow in then:
            receiving.follow(flow)
        await asyncio.wait(begun)
        return found

    return asyncio.run(scene())


APPROACH = Approach(EPOCH, NEXT, more=True)
FINISH = Finish(EPOCH, NEXT)


def test_a_full_walk_comes_first_and_then_only_what_changed_until_it_fits() -> None:
    source = Source(*UUIDS)
    source.change(UUIDS[0], b"a")
    writes = source.make

    async def make(uuid: str, reason: Reason) -> bool:
        done = await writes(uuid, reason)
        if reason.kind is Kind.FULL:
            source.change(UUIDS[0], b"b")
        return done

    source.schedule.make = make
    assert receive(source, APPROACH) == PresyncChanged(NEXT, True)
    # Both walks were before the second change: the pass of it is by content.
    assert source.done == [
        "list",
        "full 0 thorough",
        "full 1 thorough",
        "list",
        "ordinary 0 thorough",
        "let go",
    ]
    assert not source.careful and not source.thorough
    # What changed until now may change on: the last pass of it should not write all of it anew.
    assert source.sparing.done == ["make 0", "make 1"] * 2  # also after the walk


@pytest.mark.parametrize(
    ("step", "pressing"),
    [
        (APPROACH, False),
        (Approach(EPOCH, NEXT, more=True, urgent=True), True),
        (FINISH, True),
    ],
)
def test_what_clients_wait_for_is_not_held_back_by_a_low_priority(
    step: Approach | Finish, pressing: bool
) -> None:
    source = Source(UUIDS[0])
    source.marks[UUIDS[0]] = mark(UUIDS[0], 0)
    source.change(UUIDS[0], b"a")
    receive(source, step)
    assert set(source.was_pressing) == {pressing}
    assert not source.pressing


def test_what_does_not_shrink_ends_it_and_names_the_volume_and_its_busiest_folders() -> None:
    source = Source(*UUIDS)
    source.takes_ms[Kind.ORDINARY] = [8000] * 20
    source.transferred_bytes = 4_000_000
    source.copies[UUIDS[1]].brought = {b"mail/queue/box": 2_100_000_000, b"lock": 4000, b"log": 1}
    listing = source.list_all

    async def list_all(epoch: Epoch) -> Listing:
        source.change(UUIDS[1], b"mail/queue")
        if source.done.count("list") == 3:
            source.change(UUIDS[1], b"cold")
        return await listing(epoch)

    source.list_all = list_all  # type: ignore[method-assign]
    found = receive(source, APPROACH)
    assert isinstance(found, PresyncChanged) and not found.ready
    assert "about 16.0 s, and handover.max_stall is 10 s" in found.failed
    assert (
        "Volume v1 is written too fast, in the folders mail/queue: files of 4.0 MB" in found.failed
    )
    assert source.done.count("list") == 5  # for the walk, the first, and three no nearer
    # The rates are of the last round, which began 8 s after the one before.
    assert "files of 4.0 MB changed within 8.0 s, and a pass brings 400.0 MB/s of them" in (
        found.failed
    )
    assert "(sync.bandwidth allows 1.0 MB/s)" in found.failed
    assert "largest is mail/queue/box with 2.1 GB, which is read as a whole" in found.failed


def test_a_journal_that_is_lost_after_the_walk_means_another_walk() -> None:
    source = Source(UUIDS[0])
    listing = source.list_all

    async def list_all(epoch: Epoch) -> Listing:
        found = await listing(epoch)
        if source.done.count("list") == 2:
            lost = published(UUIDS[0], 5, {}, complete_from=5, walk_reason="too many")
            source.lists[UUIDS[0]] = lost
            return Listing(FACTS, dict(source.lists))
        return found

    source.list_all = list_all  # type: ignore[method-assign]
    assert receive(source, APPROACH) == PresyncChanged(NEXT, True)
    walks = ["list", "full 0 thorough"]
    assert source.done == [*walks, "list", *walks, "list", "let go"]


def leaving(source: Source) -> Source:
    source.facts = replace(FACTS, leaving=True)
    return source


def test_a_giver_that_is_about_to_stop_is_not_kept_by_a_walk_of_what_has_a_copy() -> None:
    source = leaving(frozen())
    assert receive(source, APPROACH) == PresyncChanged(NEXT, True)
    # By content all the same: what a pass overlooks would end the move by the proof.
    assert source.done == ["list", "list", "ordinary 0 careful", "let go"]
    assert source.was_pressing == [True]


def test_a_giver_that_is_about_to_stop_is_walked_where_nobody_vouches_for_the_copy() -> None:
    source = leaving(frozen())
    del source.marks[UUIDS[1]]
    assert receive(source, APPROACH) == PresyncChanged(NEXT, True)
    assert source.done == [
        "list", "list", "full 1 careful", "list", "ordinary 0 careful", "let go"
    ]  # fmt: skip


def test_a_large_file_that_takes_long_gets_a_spare_before_the_next_round() -> None:
    source = frozen()
    source.takes_ms[Kind.ORDINARY] = [7000, 5000]
    listing = source.list_all

    async def list_all(epoch: Epoch) -> Listing:
        source.change(UUIDS[0], b"a")
        source.copies[UUIDS[0]].looked_ms = 2500
        return await listing(epoch)

    source.list_all = list_all  # type: ignore[method-assign]
    # 7 s and 2.5 s are too much, 5 s and 2.5 s are not: the proof only looks.
    assert receive(source, APPROACH, max_stall_ms=7500) == PresyncChanged(NEXT, True)
    assert source.done.count("ordinary 0 thorough") == 2
    assert source.sparing.done == ["make 0", "make 1"] * 3


def test_when_it_comes_to_nothing_passes_go_on_once_the_spares_are_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = frozen()
    source.differs[UUIDS[0]] = "a/file differs"
    source.sparing.done.append("let go")  # the list of both
    source.done = source.sparing.done
    receive(source, FINISH, then=[Fetch(EPOCH, start=True)])
    assert source.done[-2:] == ["drop", "let go"]
    # A disk that hangs keeps its own volume.
    monkeypatch.setattr(receiving_module, "SPARES_GO_WITHIN_S", 0.01)
    monkeypatch.setattr(source.sparing, "drop", lambda: asyncio.sleep(60))
    step = Approach(EPOCH, NEXT, more=True)
    receive(source, step, then=[Fetch(EPOCH, start=True)])
    assert source.done[-1] == "let go"


def test_a_takeover_does_not_wait_for_the_spares_which_are_removed_after_it() -> None:
    source = Source(UUIDS[0])
    away = Rest("nothing is fetched in TAKEOVER")
    receive(source, APPROACH, then=[away, replace(away)])
    assert "drop" not in source.sparing.done
    receive(source, APPROACH, then=[away, Offer(NEXT), Offer(NEXT)])
    assert source.sparing.done.count("drop") == 1


def test_passes_that_fail_again_and_again_end_it() -> None:
    source = Source(UUIDS[0])
    source.troubles = [OSError("no answer")] * MAX_FAILURES
    found = receive(source, APPROACH)
    assert isinstance(found, PresyncChanged) and found.failed == "no answer"
    source.troubles = [OSError("no answer")] * (MAX_FAILURES - 1)
    assert receive(source, APPROACH) == PresyncChanged(NEXT, True)


def test_a_giver_that_does_not_offer_its_volumes_yet_is_asked_again() -> None:
    source = Source(UUIDS[0])
    source.troubles = [RefusedError("another epoch")]
    source.states = [State.REFUSED, State.IDLE]
    assert receive(source, APPROACH) == PresyncChanged(NEXT, True)
    source.states = [State.REFUSED] * MAX_FAILURES
    found = receive(source, APPROACH)
    assert isinstance(found, PresyncChanged) and "v0" in found.failed


def test_held_deletions_end_it_at_once() -> None:
    source = Source(UUIDS[0])
    source.states = [State.HELD]
    found = receive(source, APPROACH)
    assert isinstance(found, PresyncChanged) and "v0" in found.failed
    assert source.done.count("full 0 thorough") == 1


def test_who_knows_of_no_volume_yet_is_not_near() -> None:
    source = Source(UUIDS[0])
    source.lacks = ["not told yet", "not told yet"]
    assert receive(source, APPROACH) == PresyncChanged(NEXT, True)
    assert source.done[:2] == ["list", "full 0 thorough"]
    source.lacks = ["volume data has no copy"] * MAX_FAILURES
    found = receive(source, APPROACH)
    assert isinstance(found, PresyncChanged) and found.failed == "volume data has no copy"


def test_each_volume_must_take_a_write_before_the_first_pass_and_after_the_last() -> None:
    source = Source(*UUIDS)
    assert receive(source, APPROACH) == PresyncChanged(NEXT, True)
    assert source.asked == [("", [*UUIDS]), ("durable", [*UUIDS])]
    for fits in (0, 1):
        source.hangs = [""] * fits + ["volume v1: a write to it hangs"]
        found = receive(source, APPROACH)
        assert found == PresyncChanged(NEXT, False, "volume v1: a write to it hangs")


async def _never(uuid: str, _: object, __: object = None) -> bool:
    return await asyncio.Event().wait()


def test_a_pass_that_hangs_in_its_volume_ends_the_approach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving_module, "HANGS_AFTER_S", 0.01)
    source = Source(*UUIDS)
    source.schedule.make = _never
    source.hangs = ["", "", "volume v0: a write to it hangs"]
    found = receive(source, APPROACH)
    assert found == PresyncChanged(NEXT, False, "volume v0: a write to it hangs")
    assert [durable for durable, _ in source.asked] == ["", "", ""]


@pytest.mark.parametrize(
    ("hangs", "why"),
    [
        ("make", "volume v0: its last pass has not ended"),
        ("compare", "volume v0: the comparison with the giver's has not ended"),
    ],
)
def test_what_is_not_proved_in_time_is_named(hangs: str, why: str) -> None:
    source = frozen()
    where = source.schedule if hangs == "make" else source
    setattr(where, hangs, _never)
    found = receive(source, FINISH, max_stall_ms=50)
    assert found == FinalChanged(NEXT, False, f"not proved within 0.1 s of freeze: {why}")
    assert source.asked == [("after it", [UUIDS[0]])]


def test_nothing_is_proved_while_a_volume_has_no_copy() -> None:
    source = frozen()
    source.lacks = ["not told yet"]
    found = receive(source, FINISH)
    assert isinstance(found, FinalChanged) and not found.proved and found.failed == "not told yet"
    source = frozen()
    alone = SimpleNamespace(name="new", identity="0d8ab111-3c0a-4d4f-9d7c-0123456789ad")
    source.facts = SourceFacts(EPOCH, 100, (cast("Any", alone),), {})
    found = receive(source, FINISH)
    assert isinstance(found, FinalChanged) and not found.proved
    assert found.failed == "the giver has volumes without a copy here: new"


def frozen() -> Source:
    source = Source(*UUIDS)
    for uuid in UUIDS:
        source.marks[uuid] = mark(uuid, 0)
    source.change(UUIDS[0], b"a")
    return source


def test_frozen_only_what_changed_is_copied_and_compared_between_two_lists() -> None:
    source = frozen()
    assert receive(source, FINISH) == FinalChanged(NEXT, True)
    assert source.done == ["list", "ordinary 0", "compare 0 a", "list", "let go"]
    assert source.sparing.done == ["drop"]  # a spare that no pass used is nothing to serve
    assert source.asked == [("", [*UUIDS])]
    source.hangs = ["volume v1: a write to it hangs"]
    assert receive(source, FINISH) == FinalChanged(NEXT, False, "volume v1: a write to it hangs")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"differs": "a/file differs"}, "v0 is not proved equal: a/file differs"),
        ({"after": {"last": 2, "folders": ((b"late", 2),)}}, "is not proved equal: (b'late',)"),
        ({"after": {"complete_from": 2, "last": 2, "walk_reason": "overflow"}}, "equal: overflow"),
        ({"after": {"as_of_ns": 99}}, "could not tell the newest changes in time"),
        ({"after": {"journal_id": "00000000000000dd"}}, "began anew"),
        ({"before": {"complete_from": 1, "walk_reason": "lost"}}, "cannot be proved equal: lost"),
        ({"before": {"as_of_ns": 99}}, "could not tell the newest changes in time"),
    ],
)
def test_whatever_is_not_proved_ends_it(change: dict[str, Any], why: str) -> None:
    source = frozen()
    if "differs" in change:
        source.differs[UUIDS[0]] = change["differs"]
    if "after" in change:
        source.after_freeze[UUIDS[0]] = replace(source.lists[UUIDS[0]], **change["after"])
    if "before" in change:
        source.lists[UUIDS[1]] = replace(source.lists[UUIDS[1]], **change["before"], last=1)
    found = receive(source, FINISH)
    assert isinstance(found, FinalChanged) and not found.proved
    assert why in found.failed


def test_a_copy_that_is_no_whole_replica_is_not_proved() -> None:
    source = frozen()
    del source.marks[UUIDS[1]]
    found = receive(source, FINISH)
    assert isinstance(found, FinalChanged) and "it is not a whole replica" in found.failed


def test_a_listing_is_read_whole(tmp_path: Path) -> None:
    assert names_in(UUIDS[:1]) == ["facts.json", f"changes-{UUIDS[0]}"]
    facts = (
        b'{"nfsha_facts": 1, "epoch": {"number": 3, "id": "00000000000000aa", '
        b'"authority": "standby"}, "as_of_ns": 5, "volumes": [], "written_ns": {}}'
    )
    (tmp_path / "facts.json").write_bytes(facts)
    (tmp_path / f"changes-{UUIDS[0]}").write_bytes(encode_published(published(UUIDS[0], 0, {})))
    found = read_listing(tmp_path, UUIDS)
    assert found.is_fresh and found.since(mark(UUIDS[0], 0)) == ((), "")
    assert found.since(mark(UUIDS[1], 0)) == (None, "the source has no change journal")


def test_rounds_that_shrink_are_not_hopeless() -> None:
    near = Convergence(1000)
    for took_ms in (9000, 7000, 5600, 4400):
        near.add(took_ms, {"data": Took(took_ms, (b".",))})
        assert not near.near and not near.hopeless
    for took_ms in (4000, 3900, 3800):
        near.add(took_ms, {})
    assert near.hopeless and "too slow" in near.sentence()
    near.add(500, {})
    assert near.near and near.predicted_ms == 1000

"""How two nodes ask each other for facts that are young: questions, answers, lives, silence."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nfsha import config
from nfsha.core.model import Phase, Role
from nfsha.daemon import nfs_facts
from nfsha.daemon.inbox import Inbox
from nfsha.daemon.nfs_facts import Eyes, NfsFacts
from nfsha.nfs.served import Root, Served
from nfsha.peer import pages
from nfsha.peer.wire import Page, PageKind
from tests.unit.situations import Pair, settled
from tests.unit.test_config import MINIMAL
from tests.unit.test_nfs_facts import SERVED

VIP = "192.0.2.10"


class Link:
    """The way to the other node: what is sealed here arrives there at the next step."""

    def __init__(self) -> None:
        self.there: Link | None = None
        self.routes: dict[PageKind, Callable[[Page], None]] = {}
        self.on_the_way: list[tuple[PageKind, Page]] = []
        self.loses: set[PageKind] = set()

    def seal_page(self, page: Page, kind: PageKind) -> bytes:
        if kind not in self.loses:
            self.on_the_way.append((kind, page))
        return b""

    def open_page(self, sealed: bytes, kind: PageKind) -> Page:
        raise AssertionError((sealed, kind))

    def send_page(self, sealed: bytes) -> None:
        assert sealed == b""

    def route_pages(self, _unseal: object, deliver: Callable[[Page], None], kind: PageKind) -> None:
        self.routes[kind] = deliver

    def carry(self) -> None:
        assert self.there is not None
        sent, self.on_the_way = self.on_the_way, []
        for kind, page in sent:
            self.there.routes[kind](page)


class Node:
    """One node's facts, with eyes that see what the test says."""

    def __init__(self, pair: Pair, role: Role, session: int) -> None:
        self.looks = 0
        self.version = 1
        self.link = Link()
        self.pair, self.role, self.session = pair, role, session
        eyes = Eyes(
            replication=cast("Any", SimpleNamespace(replicator=None)),
            address=cast("Any", SimpleNamespace(held=self._held)),
            announcer=cast("Any", SimpleNamespace(survey=self._survey, link_address="02:00")),
            others=lambda: (),
        )
        key = SimpleNamespace(sealing=SimpleNamespace(fingerprint="1122aabb"))
        self.facts = NfsFacts(
            config.parse(MINIMAL + 'replication = "off"\n'),
            cast("Any", key),
            cast("Any", self.link),
            cast("Any", self.link),
            Inbox(),
            lambda: pair.now_ms,
            eyes,
        )

    async def _held(self) -> frozenset[str]:
        self.looks += 1
        return frozenset({f"seen-{self.looks}"})

    async def _survey(self, *_args: object, **_options: object) -> SimpleNamespace:
        return SimpleNamespace(answered={VIP: "02:01"})

    def follow(self, peer_session: int) -> None:
        """A turn of the daemon, and its heartbeat."""
        node = self.pair.primary if self.role is Role.PRIMARY else self.pair.standby
        state = node.state
        state.session, state.peer_session = self.session, peer_session
        self.facts.follow(state, self.pair.now_ms)
        self.facts.tick()


class Both:
    """Two nodes, and a task that lets time pass for them."""

    def __init__(self) -> None:
        self.pair = settled()
        self.silent = False
        assert self.pair.primary.state.phase is Phase.ACTIVE
        self.here = Node(self.pair, Role.PRIMARY, 1)
        self.there = Node(self.pair, Role.STANDBY, 2)
        self.join()

    def join(self) -> None:
        self.here.link.there, self.there.link.there = self.there.link, self.here.link

    async def pass_time(self) -> None:
        while True:
            self.pair.now_ms += 10
            for node in (self.pair.primary, self.pair.standby):
                if not self.silent:
                    node.state.heard_ms = self.pair.now_ms
            self.here.follow(self.there.session)
            self.there.follow(self.here.session)
            self.here.link.carry()
            self.there.link.carry()
            await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Looker:
        def __init__(self, _where: object) -> None:
            pass

        async def look(self, roots: Sequence[Root], *, whole: bool) -> Served:
            assert roots == []
            return SERVED

    monkeypatch.setattr(nfs_facts, "Looker", Looker)
    monkeypatch.setattr(nfs_facts, "ANSWER_WITHIN_S", 0.5)
    yield


async def until(done: Callable[[], bool]) -> None:
    for _ in range(5000):
        if done():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came")


def run(test: Callable[[Both], Awaitable[None]]) -> None:
    async def main() -> None:
        both = Both()
        time = asyncio.ensure_future(both.pass_time())
        for node in (both.here, both.there):
            node.facts.start()
        try:
            async with asyncio.timeout(20):
                await until(lambda: both.here.facts.heard is not None)
                await until(lambda: both.there.facts.heard is not None)
                await test(both)
        finally:
            for node in (both.here, both.there):
                await node.facts.close()
            time.cancel()
            await asyncio.wait([time])
            if not time.cancelled():
                time.result()

    asyncio.run(main())


def held(both: Both) -> tuple[str, ...]:
    assert both.here.facts.heard is not None
    return both.here.facts.heard.told.held


def test_who_asks_gets_what_both_saw_after_the_question() -> None:
    async def test(both: Both) -> None:
        await both.here.facts.ask()
        looks = both.there.looks
        own, heard = both.here.facts.own, both.here.facts.heard
        assert own is not None
        assert heard is not None
        assert heard.answer
        assert heard.told.seen == own.seen == {VIP: "02:01"}
        assert held(both) == (f"seen-{looks}",)
        await both.here.facts.ask()
        assert both.there.looks > looks
        assert held(both) == (f"seen-{both.there.looks}",)

    run(test)


def test_a_young_answer_will_do_where_the_asker_says_so() -> None:
    async def test(both: Both) -> None:
        await both.here.facts.ask()
        looks = both.there.looks
        await both.here.facts.ask(young_ms=1_000_000)
        assert both.there.looks == looks
        both.pair.now_ms += 1_000_000
        await both.here.facts.ask(young_ms=1_000_000)
        assert both.there.looks > looks

    run(test)


def test_what_a_node_looked_up_by_itself_is_no_answer() -> None:
    async def test(both: Both) -> None:
        await both.there.facts.ask()  # so both look, and this node hears the other's facts
        assert both.here.facts.heard is not None
        assert not both.here.facts.heard.answer

    run(test)


@pytest.mark.parametrize("lost", [PageKind.NFS, PageKind.QUESTIONS])
def test_without_an_answer_the_old_facts_are_not_taken_for_one(lost: PageKind) -> None:
    async def test(both: Both) -> None:
        await both.here.facts.ask()
        before = held(both)
        (both.there if lost is PageKind.NFS else both.here).link.loses.add(lost)
        await both.here.facts.ask(young_ms=0)
        assert both.here.facts.heard is not None
        assert not both.here.facts.heard.answer
        assert held(both) == before
        both.there.link.loses.clear()
        both.here.link.loses.clear()
        await both.here.facts.ask()
        assert both.here.facts.heard.answer

    run(test)


def test_nobody_waits_for_a_node_that_is_not_heard() -> None:
    async def test(both: Both) -> None:
        await both.here.facts.ask()
        both.silent = True
        both.pair.now_ms += 60_000
        looks = both.there.looks
        await both.there.facts.ask()
        await until(lambda: both.here.looks > looks)
        began_s = asyncio.get_running_loop().time()
        both.there.link.loses |= {*PageKind}
        await both.here.facts.ask()
        assert asyncio.get_running_loop().time() - began_s < nfs_facts.ANSWER_WITHIN_S / 2
        assert both.here.facts.heard is not None
        assert not both.here.facts.heard.answer

    run(test)


def test_garbage_is_refused_in_words_and_the_next_facts_are_taken() -> None:
    async def test(both: Both) -> None:
        await both.here.facts.ask()
        both.there.facts._pages.publish(pages.pack({"nfsha_nfs": 7}))
        await until(lambda: both.here.facts.refused != "")
        assert "facts of a node" in both.here.facts.refused
        both.there.facts._questions.publish(b"-1")
        both.there.facts._questions.publish(b"x")
        await both.here.facts.ask()
        assert both.here.facts.refused == ""
        assert both.here.facts.heard is not None
        assert both.here.facts.heard.answer

    run(test)

"""Pages of facts over real links: loss, cuts, restarts, hostile bytes; heartbeats do not suffer."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import socket
import time
from collections.abc import Callable, Coroutine, Iterator

import pytest

from nfsha.core.model import Datagram, Role
from nfsha.host.clock import now_ms
from nfsha.peer.keys import Key, KeyRing
from nfsha.peer.links import DRAIN_LIMIT, Links, LinkSpec
from nfsha.peer.pages import PAGES_A_TICK, Pages, pack, unpack
from nfsha.peer.wire import NO_DIGEST, Page, Wire
from tests.datagrams import WAITING
from tests.netns.namespaces import Namespace, connect, inside, namespaces

PORT = 9850
INTERVAL_S = 0.1
KEYS = KeyRing((Key(bytes(range(32))),))
STRANGERS = KeyRing((Key(bytes(range(1, 33))),))
SPECS = {
    Role.PRIMARY: [
        LinkSpec("lan", "192.0.2.1", "192.0.2.2", PORT, "lan0"),
        LinkSpec("cross", "198.51.100.1", "198.51.100.2", PORT, "cross0"),
    ],
    Role.STANDBY: [
        LinkSpec("lan", "192.0.2.2", "192.0.2.1", PORT, "lan0"),
        LinkSpec("cross", "198.51.100.2", "198.51.100.1", PORT, "cross0"),
    ],
}


class Node:
    """One end as the daemon has it: heartbeats and then pages, each interval."""

    def __init__(self, role: Role, namespace: Namespace, session: int) -> None:
        self.role, self.namespace, self.session = role, namespace, session
        self.confirmed = 0
        self.got: list[bytes] = []
        self.late_ms: list[float] = []
        self.wire = Wire(KEYS, role)
        self.state = dataclasses.replace(WAITING, role=role, session=session)
        self.links = Links(SPECS[role], self.wire.seal, self.wire.open, self._heard, now_ms)
        self.pages = Pages(
            self.wire.seal_page,
            self.links.send_page,
            lambda: (self.session, self.confirmed),
            now_ms,
            self.got.append,
        )
        self.links.route_pages(self.wire.open_page, self.pages.received)
        self._beating: asyncio.Task[None] | None = None

    async def start(self) -> None:
        with inside(self.namespace):
            await self.links.start()
        self._beating = asyncio.ensure_future(self._beat())

    async def close(self) -> None:
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait([self._beating])
        self.links.close()

    async def _beat(self) -> None:
        while True:
            # The number says when it was sent, in us.
            self.state = dataclasses.replace(self.state, seq=int(time.monotonic() * 1e6))
            self.links.send(self.state)
            self.pages.tick()
            await asyncio.sleep(INTERVAL_S)

    def status(self) -> Page:
        """A page that says nothing."""
        return Page(self.session, self.confirmed, 1, NO_DIGEST, NO_DIGEST, 0, 0, b"")

    def _heard(self, link: str, datagram: Datagram, at_ms: int) -> None:
        self.late_ms.append(time.monotonic() * 1e3 - datagram.seq / 1e3)


Scenario = Callable[[Node, Node], Coroutine[None, None, None]]


@pytest.fixture
def net() -> Iterator[tuple[Namespace, Namespace]]:
    with namespaces("one", "two") as (one, two):
        for interface, prefix in (("lan0", "192.0.2."), ("cross0", "198.51.100.")):
            connect(one, interface, two, interface)
            one.ip("address", "add", f"{prefix}1/24", "dev", interface)
            two.ip("address", "add", f"{prefix}2/24", "dev", interface)
        yield one, two


def lose(namespace: Namespace, percent: int) -> None:
    rule = f"udp dport {PORT} numgen random mod 100 < {percent} drop"
    chain = f"chain input {{\ntype filter hook input priority 0\n{rule}\n}}"
    namespace.exec("nft", f"table inet fault {{\n{chain}\n}}")


def play(net: tuple[Namespace, Namespace], scenario: Scenario) -> None:
    async def run() -> None:
        one, two = Node(Role.PRIMARY, net[0], 11), Node(Role.STANDBY, net[1], 22)
        try:
            await one.start()
            await two.start()
            meet(one, two)
            await scenario(one, two)
        finally:
            await one.close()
            await two.close()

    asyncio.run(run())


def meet(one: Node, two: Node) -> None:
    one.confirmed, two.confirmed = two.session, one.session


async def until(condition: Callable[[], bool], limit_s: float) -> float:
    """Returns after how many seconds it came true."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < limit_s, "did not come true in time"
        await asyncio.sleep(0.01)
    return time.monotonic() - began_s


def noise(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


def test_200_kib_of_facts_arrive_through_a_third_of_loss(net: tuple[Namespace, Namespace]) -> None:
    for namespace in net:
        lose(namespace, 30)
    blobs = (noise(200 << 10, 1), noise(200 << 10, 2))

    async def scenario(one: Node, two: Node) -> None:
        one.pages.publish(blobs[0])
        two.pages.publish(blobs[1])
        # A round of 160 pages takes 2 s, and both links lose 9 of 100: three rounds mostly.
        await until(lambda: one.pages.delivered and two.pages.delivered, 20.0)
        assert (two.got, one.got) == ([blobs[0]], [blobs[1]])
        counters = two.links.counters()["lan"]
        assert counters.malformed == counters.forged == 0
        assert counters.pages_received > 160 * 0.5

    play(net, scenario)


def test_facts_go_on_when_one_link_is_cut_and_heartbeats_stay_prompt(
    net: tuple[Namespace, Namespace],
) -> None:
    facts = {f"volume {number}": {"free": number} for number in range(5000)}

    async def scenario(one: Node, two: Node) -> None:
        net[1].ip("link", "set", "cross0", "down")
        blob = pack(facts)
        one.pages.publish(blob + noise(100 << 10))
        two.late_ms.clear()
        took_s = await until(lambda: one.pages.delivered, 10.0)
        # 8 pages each 100 ms: as many as are wanted, and no more at a time
        wanted_s = (len(blob) + (100 << 10)) / 1280 / PAGES_A_TICK * INTERVAL_S
        assert took_s < wanted_s + 2.0
        assert unpack(two.got[0][: len(blob)]) == facts
        late_ms = sorted(two.late_ms)
        assert len(late_ms) >= took_s / INTERVAL_S * 0.6
        assert late_ms[len(late_ms) // 2] < 5.0

    play(net, scenario)


def test_a_restart_of_either_side_brings_the_facts_again(net: tuple[Namespace, Namespace]) -> None:
    async def scenario(one: Node, two: Node) -> None:
        one.pages.publish(noise(5000))
        await until(lambda: one.pages.delivered, 3.0)
        await two.close()
        again = Node(Role.STANDBY, net[1], 23)
        await again.start()
        try:
            meet(one, again)
            await until(lambda: again.got == [noise(5000)], 3.0)
            sent = one.links.counters()["lan"].pages_sent
            await asyncio.sleep(1.5)
            assert one.links.counters()["lan"].pages_sent - sent <= 3  # statuses of the calm
        finally:
            await again.close()

    play(net, scenario)


def test_garbage_forged_and_replayed_pages_change_nothing(
    net: tuple[Namespace, Namespace], caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(4)
    recorded: list[bytes] = []

    async def scenario(one: Node, two: Node) -> None:
        seal = one.pages._seal  # a recorder on the wire: what left the node, byte for byte

        def recording(page: Page) -> bytes:
            recorded.append(seal(page))
            return recorded[-1]

        one.pages._seal = recording
        for seed in (1, 2):
            one.pages.publish(noise(20_000, seed))
            await until(lambda: one.pages.delivered, 5.0)
        before = dataclasses.replace(two.pages.counters)
        forger = Wire(STRANGERS, Role.PRIMARY)
        forged = forger.seal_page(two.wire.open_page(recorded[-1]))
        attacks = [
            lambda: rng.choice(recorded),
            lambda: forged,
            lambda: recorded[0][:5] + b"\x10" + rng.randbytes(rng.randrange(1400)),
            lambda: rng.choice(recorded)[: rng.randrange(1, 1300)],
        ]
        with inside(net[0]), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as attacker:
            attacker.bind(("192.0.2.1", 0))
            for number in range(2000):
                attacker.sendto(rng.choice(attacks)(), ("192.0.2.2", PORT))
                if number % 20 == 19:
                    two.links.drain()
        await until(two.links.drain, 5.0)
        assert two.got == [noise(20_000, 1), noise(20_000, 2)]
        assert two.pages.counters.blobs == before.blobs
        assert two.pages.counters.doubled > before.doubled + 300
        counters = two.links.counters()["lan"]
        assert counters.forged > 300
        assert counters.malformed + counters.forged > 900
        assert len(caplog.records) <= 2
        one.pages.publish(noise(20_000, 3))
        await until(lambda: two.got[-1] == noise(20_000, 3), 5.0)

    play(net, scenario)


def test_a_flood_of_true_pages_is_drained_in_bounded_pieces(
    net: tuple[Namespace, Namespace],
) -> None:
    async def scenario(one: Node, two: Node) -> None:
        one.pages.publish(noise(200 << 10))
        await until(lambda: len(two.links.counters()) == 2, 1.0)
        sealed = one.wire.seal_page(one.status())
        for _ in range(DRAIN_LIMIT + 6):
            one.links.send_page(sealed)
        before = two.links.counters()["lan"].pages_received
        assert two.links.drain() is False
        assert two.links.counters()["lan"].pages_received - before == DRAIN_LIMIT
        assert two.links.drain() is True

    play(net, scenario)

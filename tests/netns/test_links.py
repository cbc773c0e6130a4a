"""The heartbeat links over real interfaces: loss, cuts, interfaces that go and come, floods."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence

import pytest

from nfsha.core.model import Datagram, Role
from nfsha.host.clock import now_ms
from nfsha.peer import links as links_module
from nfsha.peer.keys import Key, KeyRing
from nfsha.peer.links import LinkCounters, Links, LinkSetupError, LinkSpec
from nfsha.peer.wire import Wire
from tests.datagrams import WAITING
from tests.netns.namespaces import Namespace, connect, inside, namespaces

PORT = 9850
KEYS = KeyRing((Key(bytes(range(32))),))

LAN = LinkSpec("lan", "192.0.2.1", "192.0.2.2", PORT, "lan0")
CROSS = LinkSpec("cross", "fd00::1", "fd00::2", PORT, "cross0")
LINK_LOCAL = LinkSpec("local", None, "fe80::2", PORT + 1, "cross0")
UNBOUND = LinkSpec("unbound", "198.51.100.1", "198.51.100.2", PORT)


class Side:
    """One end of the links: its namespace, what it heard, and its own sequence numbers."""

    def __init__(self, role: Role, namespace: Namespace, specs: Sequence[LinkSpec]) -> None:
        self.namespace = namespace
        self.heard: list[tuple[str, int]] = []
        self.wire = Wire(KEYS, role)
        self.state = dataclasses.replace(WAITING, role=role)
        self.links = Links(specs, self.wire.seal, self.wire.open, self._deliver, now_ms)

    async def start(self) -> None:
        with inside(self.namespace):
            await self.links.start()

    def send(self) -> int:
        """Sends the next datagram, inside the namespace since sockets may be made anew."""
        self.state = dataclasses.replace(self.state, seq=self.state.seq + 1)
        with inside(self.namespace):
            self.links.send(self.state)
        return self.state.seq

    def counters(self, link: str) -> LinkCounters:
        return self.links.counters()[link]

    def _deliver(self, link: str, datagram: Datagram, at_ms: int) -> None:
        assert 0 <= now_ms() - at_ms < 5000
        self.heard.append((link, datagram.seq))


def turned(spec: LinkSpec) -> LinkSpec:
    """The same link as the peer sees it."""
    local = spec.local if spec.local is not None else "fe80::1"
    return dataclasses.replace(spec, local=None if spec is LINK_LOCAL else spec.peer, peer=local)


@pytest.fixture
def net() -> Iterator[tuple[Namespace, Namespace]]:
    with namespaces("one", "two") as (one, two):
        wire_up(one, two, "lan0", "192.0.2.", 24)
        wire_up(one, two, "cross0", "fd00::", 64)
        wire_up(one, two, "cross0", "fe80::", 64)
        wire_up(one, two, "free0", "198.51.100.", 24)
        yield one, two


def wire_up(one: Namespace, two: Namespace, interface: str, prefix: str, length: int) -> None:
    if f"{interface}@" not in one.ip("link", "show"):
        for namespace in (one, two):
            namespace.exec("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0")
            namespace.exec("sysctl", "-qw", "net.ipv6.conf.default.addr_gen_mode=1")
        connect(one, interface, two, interface)
    for namespace, last in ((one, "1"), (two, "2")):
        namespace.ip("address", "add", f"{prefix}{last}/{length}", "dev", interface)


def firewall(namespace: Namespace, hook: str, *rules: str) -> None:
    head = f"type filter hook {hook} priority 0"
    lines = "\n".join([head, *rules])
    namespace.exec("nft", f"table inet fault {{\nchain {hook}_chain {{\n{lines}\n}}\n}}")


async def until(condition: Callable[[], bool], limit_s: float = 5.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        await asyncio.sleep(0.005)


def play(
    net: tuple[Namespace, Namespace],
    specs: Sequence[LinkSpec],
    scenario: Callable[[Side, Side], Coroutine[None, None, None]],
    peer_specs: Sequence[LinkSpec] | None = None,
) -> None:
    """Runs a scenario with both ends started, and closes them."""
    if peer_specs is None:
        peer_specs = [turned(spec) for spec in specs]

    async def run() -> None:
        one = Side(Role.PRIMARY, net[0], specs)
        two = Side(Role.STANDBY, net[1], peer_specs)
        try:
            await one.start()
            await two.start()
            await scenario(one, two)
        finally:
            one.links.close()
            two.links.close()

    asyncio.run(run())


def test_datagrams_arrive_on_every_link_of_both_families(
    net: tuple[Namespace, Namespace],
) -> None:
    specs = [LAN, CROSS, LINK_LOCAL, UNBOUND]

    async def scenario(one: Side, two: Side) -> None:
        for here, there in ((one, two), (two, one)):
            for _ in range(20):
                here.send()
            await until(lambda there=there: len(there.heard) == 80)  # type: ignore[misc]
            for spec in specs:
                assert [seq for link, seq in there.heard if link == spec.name] == [*range(1, 21)]
                assert here.counters(spec.name).sent == 20
                assert here.counters(spec.name).errors == 0
                assert there.counters(spec.name).received == 20
                assert there.counters(spec.name).last_heard_ms is not None

    play(net, specs, scenario)


def test_drain_takes_what_lies_there_before_the_loop_turns(
    net: tuple[Namespace, Namespace],
) -> None:
    async def scenario(one: Side, two: Side) -> None:
        for _ in range(links_module.DRAIN_LIMIT + 6):
            one.send()
        assert two.heard == []
        assert two.links.drain() is False
        assert len(two.heard) == 2 * links_module.DRAIN_LIMIT
        assert two.links.drain() is True
        assert len(two.heard) == 2 * (links_module.DRAIN_LIMIT + 6)
        assert two.links.drain() is True

    play(net, [LAN, CROSS], scenario)


def test_packets_are_marked_as_network_control(net: tuple[Namespace, Namespace]) -> None:
    rules = ("ip dscp cs6 udp dport 9850 counter", "ip6 dscp cs6 udp dport 9850 counter")
    firewall(net[1], "input", *rules)

    async def scenario(one: Side, two: Side) -> None:
        for _ in range(5):
            one.send()
        await until(lambda: len(two.heard) == 10)
        assert net[1].exec("nft", "list", "ruleset").count("counter packets 5 ") == 2

    play(net, [LAN, CROSS], scenario)


def test_with_a_third_of_the_datagrams_lost_the_rest_arrives(
    net: tuple[Namespace, Namespace],
) -> None:
    for namespace in net:
        firewall(namespace, "input", "udp dport 9850 numgen random mod 100 < 30 drop")

    async def scenario(one: Side, two: Side) -> None:
        for _ in range(1000):
            one.send()
            two.links.drain()
        await until(two.links.drain)
        for name in ("lan", "cross"):
            # 700 wanted; 60 is over four standard deviations (14.5)
            assert abs(two.counters(name).received - 700) < 60
            assert one.counters(name).sent == 1000
        heard_at_all = {seq for _, seq in two.heard}
        assert abs(len(heard_at_all) - 910) < 45

    play(net, [LAN, CROSS], scenario)


def test_one_link_cut_leaves_the_other_alone(net: tuple[Namespace, Namespace]) -> None:
    async def scenario(one: Side, two: Side) -> None:
        firewall(net[1], "input", "iifname lan0 drop")
        for _ in range(10):
            one.send()
        await until(lambda: len(two.heard) == 10)
        assert {link for link, _ in two.heard} == {"cross"}
        assert two.counters("lan").last_heard_ms is None
        net[1].exec("nft", "flush", "ruleset")
        one.send()
        await until(lambda: two.counters("lan").received == 1)

    play(net, [LAN, CROSS], scenario)


def test_a_firewall_that_forbids_sending_is_counted_and_logged_once(
    net: tuple[Namespace, Namespace], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(one: Side, two: Side) -> None:
        firewall(net[0], "output", "oifname lan0 drop")
        for _ in range(30):
            one.send()
        await until(lambda: two.counters("cross").received == 30)
        assert one.counters("lan").errors == 30
        assert one.counters("lan").sent == 0
        assert [record.message for record in caplog.records] == [
            "link lan, error: cannot send: Operation not permitted"
            " (192.0.2.1 on lan0 to 192.0.2.2, port 9850)"
        ]
        net[0].exec("nft", "flush", "ruleset")
        one.send()
        await until(lambda: two.counters("lan").received == 1)

    play(net, [LAN, CROSS], scenario)


@pytest.mark.parametrize(
    ("spec", "interface", "address"),
    [
        (LAN, "lan0", None),
        (CROSS, "cross0", "fd00::1/64"),
        (LINK_LOCAL, "cross0", "fe80::1/64"),
        (UNBOUND, "free0", None),
    ],
    ids=lambda value: value.name if isinstance(value, LinkSpec) else "",
)
def test_an_interface_that_goes_down_and_up_is_used_again(
    net: tuple[Namespace, Namespace], spec: LinkSpec, interface: str, address: str | None
) -> None:
    async def scenario(one: Side, two: Side) -> None:
        one.send()
        await until(lambda: len(two.heard) == 1)
        net[0].ip("link", "set", interface, "down")
        for _ in range(5):
            one.send()
        assert one.counters(spec.name).errors == 5
        net[0].ip("link", "set", interface, "up")
        if address is not None:  # the kernel removes IPv6 addresses when an interface goes down
            net[0].ip("address", "replace", address, "dev", interface)
        await heard_again(one, two)
        await heard_again(two, one)

    play(net, [spec], scenario)


async def heard_again(one: Side, two: Side) -> None:
    """Sends every 50 ms until something arrives."""
    before = len(two.heard)
    for _ in range(100):
        one.send()
        await asyncio.sleep(0.05)
        if len(two.heard) > before:
            return
    raise AssertionError("nothing arrives in 5 s")


@pytest.mark.parametrize("spec", [LAN, CROSS, LINK_LOCAL], ids=lambda spec: spec.name)
def test_an_interface_that_is_made_anew_is_used_again(
    net: tuple[Namespace, Namespace], spec: LinkSpec
) -> None:
    interface = spec.interface
    assert interface is not None

    async def scenario(one: Side, two: Side) -> None:
        one.send()
        await until(lambda: len(two.heard) == 1)
        net[0].ip("link", "delete", interface)  # the other end goes with it
        for _ in range(5):
            one.send()
            two.send()
        assert one.counters(spec.name).errors == two.counters(spec.name).errors == 5
        prefix, length = ("192.0.2.", 24) if spec is LAN else ("fd00::", 64)
        prefix = "fe80::" if spec is LINK_LOCAL else prefix
        wire_up(*net, interface, prefix, length)
        await asyncio.gather(heard_again(one, two), heard_again(two, one))

    play(net, [spec], scenario)


@pytest.mark.parametrize("spec", [LAN, CROSS, UNBOUND], ids=lambda spec: spec.name)
def test_an_address_that_comes_late_or_goes_and_comes_is_used(
    net: tuple[Namespace, Namespace], spec: LinkSpec
) -> None:
    interface = {"lan": "lan0", "cross": "cross0", "unbound": "free0"}[spec.name]
    address = f"{spec.local}/{64 if spec is CROSS else 24}"
    net[0].ip("address", "delete", address, "dev", interface)

    async def scenario(one: Side, two: Side) -> None:
        for _ in range(2):
            for _ in range(3):
                one.send()
            net[0].ip("address", "add", address, "dev", interface)
            both = len(two.heard) + len(one.heard) + 2
            one.send()  # the very next one: nothing waits for a new socket
            two.send()
            await until(lambda both=both: len(two.heard) + len(one.heard) == both)  # type: ignore[misc]
            net[0].ip("address", "delete", address, "dev", interface)

    play(net, [spec], scenario)


def test_an_interface_that_comes_late_is_used(net: tuple[Namespace, Namespace]) -> None:
    spec = LinkSpec("late", "203.0.113.1", "203.0.113.2", PORT, "late0")

    async def scenario(one: Side, two: Side) -> None:
        one.send()
        two.send()
        assert one.counters("late").errors == 1
        wire_up(*net, "late0", "203.0.113.", 24)
        await asyncio.gather(heard_again(one, two), heard_again(two, one))

    play(net, [spec], scenario)


def test_a_link_bound_to_an_interface_hears_no_other(net: tuple[Namespace, Namespace]) -> None:
    """Who can reach another network of this node must not reach the heartbeat."""

    async def scenario(one: Side, two: Side) -> None:
        with inside(net[0]), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"free0\0")
            sender.sendto(one.wire.seal(one.state), ("198.51.100.2", PORT))
        one.send()
        await until(lambda: len(two.heard) == 1)
        assert two.counters("lan").from_stranger == 0

    play(net, [LAN], scenario, [dataclasses.replace(turned(LAN), local=None)])


def test_replays_are_delivered_for_the_core_to_refuse(net: tuple[Namespace, Namespace]) -> None:
    async def scenario(one: Side, two: Side) -> None:
        sealed = one.wire.seal(one.state)
        with inside(net[0]), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as recorder:
            recorder.bind(("192.0.2.1", 0))
            for _ in range(5):
                recorder.sendto(sealed, ("192.0.2.2", PORT))
        await until(lambda: len(two.heard) == 5)
        assert two.heard == [("lan", 0)] * 5

    play(net, [LAN], scenario)


@pytest.mark.parametrize("spec", [LAN, CROSS], ids=lambda spec: spec.name)
def test_ten_thousand_hostile_datagrams_are_counted_and_change_nothing(
    net: tuple[Namespace, Namespace], spec: LinkSpec, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(4)
    length = 64 if spec is CROSS else 24
    family = socket.AF_INET6 if spec is CROSS else socket.AF_INET
    stranger_address = "fd00::9" if spec is CROSS else "192.0.2.9"
    net[0].ip("address", "add", f"{stranger_address}/{length}", "dev", str(spec.interface))

    async def scenario(one: Side, two: Side) -> None:
        true = one.wire.seal(one.state)
        other = Wire(KeyRing((Key(bytes(range(1, 33))),)), Role.PRIMARY).seal(one.state)
        attacks = [
            lambda: rng.randbytes(rng.randrange(1400)),
            lambda: true[: rng.randrange(len(true))],
            lambda: flipped(true, rng),
            lambda: other,
            lambda: rng.randbytes(3000),
            lambda: two.wire.seal(two.state),
        ]
        with (
            inside(net[0]),
            socket.socket(family, socket.SOCK_DGRAM) as peer,
            socket.socket(family, socket.SOCK_DGRAM) as stranger,
        ):
            peer.bind((str(spec.local), 0))
            stranger.bind((stranger_address, 0))
            for number in range(10_000):
                sender = stranger if number % 5 == 0 else peer
                sender.sendto(rng.choice(attacks)(), (spec.peer, PORT))
                if number % 20 == 19:  # or the socket's buffer drops some before they are counted
                    two.links.drain()
        await until(two.links.drain)
        seen = two.counters(spec.name)
        assert two.heard == []
        assert seen.received == 0
        assert seen.last_heard_ms is None
        assert seen.from_stranger == 2000
        assert seen.own_role > 1000
        assert seen.forged > 2000
        assert seen.malformed > 2000
        assert seen.own_role + seen.forged + seen.malformed == 8000
        assert len(caplog.records) == 4  # one line for each sort, none for each datagram
        one.send()
        await until(lambda: len(two.heard) == 1)

    play(net, [spec], scenario)


def flipped(sealed: bytes, rng: random.Random) -> bytes:
    changed = bytearray(sealed)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def test_a_flood_while_nobody_reads_is_bounded_and_then_the_peer_is_heard(
    net: tuple[Namespace, Namespace],
) -> None:
    async def scenario(one: Side, two: Side) -> None:
        with inside(net[0]), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flood:
            flood.bind(("192.0.2.1", 0))
            for _ in range(10_000):
                flood.sendto(b"x" * 200, ("192.0.2.2", PORT))
        turns = 0
        while not two.links.drain():
            turns += 1
        assert two.counters("lan").malformed < 2000  # the rest fell off a full buffer
        assert turns < 2000 // links_module.DRAIN_LIMIT
        one.send()
        await until(lambda: len(two.heard) == 1)

    play(net, [LAN], scenario)


def test_a_port_that_is_taken_is_said_at_the_start(net: tuple[Namespace, Namespace]) -> None:
    async def scenario(one: Side, two: Side) -> None:
        second = Side(Role.PRIMARY, net[0], [CROSS, LAN])
        with pytest.raises(LinkSetupError, match=r"link cross: Address already in use \(fd00::1"):
            await second.start()
        two.send()
        await until(lambda: len(one.heard) == 2)

    play(net, [LAN, CROSS], scenario)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (("bad", "192.0.2.1", "fd00::2", PORT, None), "two families"),
        (("bad", None, "192.0.2.2", PORT, None), "needs a local address or an interface"),
        (("bad", "fe80::1", "fe80::2", PORT, None), "link-local, needs an interface"),
        (("bad", "192.0.2.1", "192.0.2.2", 0, None), "port 0"),
        (("bad", "192.0.2.1", "peer.example", PORT, None), "peer.example"),
    ],
)
def test_what_cannot_be_a_link_is_refused(
    spec: tuple[str, str | None, str, int, str | None], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        LinkSpec(*spec)

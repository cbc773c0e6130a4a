"""The freeze against the real kernel: what both backends promise, tried with both."""

import asyncio
import contextlib
import re
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from nfsha.vip.freeze import Firewall, LeaseVerdict, ServiceLease, choose
from nfsha.vip.rtnetlink import Vip
from tests.netns.freezekit import (
    GUARDED,
    LOOPBACK,
    OWN,
    UNGUARDED,
    VIPS,
    Probe,
    Yard,
    boottime_ms,
    every,
    yard,
)
from tests.netns.namespaces import Namespace, inside

BOTH = [Firewall.NFTABLES, Firewall.IPTABLES]
LONG_MS = 20_000  # longer than any test here takes, so nothing ends by itself

# The client's packets from before a change may still be under way: then this long, and no longer.
SETTLE_S = 0.1


@pytest.fixture(scope="module")
def built() -> Iterator[Yard]:
    with yard() as here:
        yield here


@pytest.fixture(params=BOTH)
def firewall(request: pytest.FixtureRequest) -> Firewall:
    chosen: Firewall = request.param
    return chosen


@pytest.fixture
def place(built: Yard) -> Iterator[Yard]:
    """The yard without any rules, before and after."""
    clear(built.node)
    yield built
    clear(built.node)


def clear(node: Namespace) -> None:
    node.exec("nft", "flush", "ruleset")
    for program in ("iptables-legacy", "ip6tables-legacy"):
        node.exec(program, "-F")
        node.exec(program, "-X")


def play(place: Yard, firewall: Firewall, body: Callable[[ServiceLease], Awaitable[None]]) -> None:
    """Runs `body` with a fresh lease, inside the node."""

    async def start() -> None:
        lease = await choose(firewall, GUARDED, boottime_ms)
        try:
            await body(lease)
        finally:
            lease.shut()

    with inside(place.node):
        asyncio.run(start())


def after_ms(duration_ms: int) -> int:
    return boottime_ms() + duration_ms


def rules(node: Namespace) -> str:
    """Everybody's rules, but for the counters of the built-in chains and the time of day."""
    legacy = node.exec("iptables-legacy-save") + node.exec("ip6tables-legacy-save")
    kept = [line for line in legacy.splitlines() if not line.startswith("#")]
    return node.exec("nft", "list", "ruleset") + re.sub(r"\[\d+:\d+\]", "", "\n".join(kept))


def test_closed_means_silence_on_every_address_and_port(place: Yard, firewall: Firewall) -> None:
    assert place.answers(place.client, every([*OWN, *VIPS])) == {"answer"}

    async def body(lease: ServiceLease) -> None:
        await lease.install()
        assert await lease.intact()
        assert await lease.live() == {}

    play(place, firewall, body)
    assert place.answers(place.client, every([*OWN, *VIPS])) == {"silence"}
    assert place.answers(place.client, every([*OWN, *VIPS], [UNGUARDED])) == {"answer"}


def test_the_node_itself_and_the_peer_pass_while_it_is_closed(
    place: Yard, firewall: Firewall
) -> None:
    play(place, firewall, lambda lease: lease.install())
    assert place.answers(place.node, every([*LOOPBACK, *OWN, *VIPS])) == {"answer"}
    assert place.answers(place.peer, every(OWN)) == {"answer"}
    # A closed VIP is closed to the peer as well: it may be a client of ours, too.
    place.servers.received.clear()
    assert place.answers(place.peer, every(VIPS)) == {"silence"}
    assert place.servers.received == []


def test_open_means_every_vip_at_once_and_no_other_address(place: Yard, firewall: Firewall) -> None:
    async def body(lease: ServiceLease) -> None:
        await lease.install()
        outcome = await lease.open(after_ms(LONG_MS))
        assert outcome.verdict is LeaseVerdict.HELD
        assert (await lease.live()).keys() == set(VIPS)
        assert place.answers(place.client, every(VIPS)) == {"answer"}
        assert place.answers(place.peer, every(VIPS)) == {"answer"}
        assert place.answers(place.client, every(OWN)) == {"silence"}
        assert (await lease.renew(after_ms(LONG_MS))).held
        await lease.close()
        await lease.close()
        assert await lease.live() == {}
        assert place.answers(place.client, every(VIPS)) == {"silence"}

    play(place, firewall, body)


def test_a_dead_port_is_silent_too(place: Yard, firewall: Firewall) -> None:
    """Nobody listens on the VIP of the peer's side: without the freeze the kernel refuses."""
    place.node.ip("addr", "add", "10.91.1.50/24", "dev", "c0")
    dead = [Probe("tcp", type(VIPS[0])("10.91.1.50"), 2049)]
    try:
        assert place.answers(place.client, dead) == {"refused"}
        play(place, firewall, lambda lease: lease.install())
        assert place.answers(place.client, dead) == {"silence"}
    finally:
        place.node.ip("addr", "delete", "10.91.1.50/24", "dev", "c0")


@pytest.mark.parametrize("vip", [VIPS[0], VIPS[2]], ids=["v4", "v6"])
def test_closing_silences_an_established_connection_in_both_directions(
    place: Yard, firewall: Firewall, vip: Vip
) -> None:
    async def body(lease: ServiceLease) -> None:
        await lease.install()
        await lease.open(after_ms(LONG_MS))
        with place.connected(vip, 2049) as connection:
            name = connection.getsockname()
            server_side = place.servers.connections[name[0], name[1]]
            await lease.close()
            await asyncio.sleep(SETTLE_S)
            place.capture.take()
            connection.setblocking(False)
            connection.send(b"more")  # must not arrive, nor be acknowledged
            server_side.send(b"reply")  # the kernel sends it again and again
            await asyncio.sleep(1.5)
            assert place.capture.take() == []
            with pytest.raises(BlockingIOError):
                connection.recv(16)
            await lease.open(after_ms(LONG_MS))
            assert await received(connection, 9) == b"replymore"

    play(place, firewall, body)


async def received(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = await asyncio.wait_for(
            asyncio.get_running_loop().sock_recv(connection, length - len(data)), 20
        )
        assert part
        data += part
    return data


def test_a_server_that_dies_while_closed_sends_no_farewell(place: Yard, firewall: Firewall) -> None:
    """A FIN or RST from the VIP would make clients fail or reconnect to nothing."""

    async def body(lease: ServiceLease) -> None:
        await lease.install()
        await lease.open(after_ms(LONG_MS))
        with place.connected(VIPS[0], 2049) as connection:
            name = connection.getsockname()
            server_side = place.servers.connections[name[0], name[1]]
            await lease.close()
            await asyncio.sleep(SETTLE_S)
            place.capture.take()
            server_side.shutdown(socket.SHUT_RDWR)
            await asyncio.sleep(0.5)
            assert place.capture.take() == []

    play(place, firewall, body)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("place_of_client", ["client", "peer"])
def test_a_late_reply_by_udp_does_not_leave(
    place: Yard, firewall: Firewall, version: int, place_of_client: str
) -> None:
    """Also to the peer none leaves from a closed VIP; from the node's own address it may."""
    vip = next(one for one in VIPS if one.version == version)
    own = next(one for one in OWN if one.version == version)
    client = place.client if place_of_client == "client" else place.peer

    async def body(lease: ServiceLease) -> None:
        await lease.install()
        assert reply(place, client, vip) == reply(place, client, own, 111) == b""
        assert reply(place, client, vip, UNGUARDED) == b"late"
        await lease.open(after_ms(LONG_MS))
        assert reply(place, client, vip) == b"late"
        await lease.close()
        assert reply(place, client, vip) == b""

    async def probed(lease: ServiceLease) -> None:
        await lease.install()
        assert reply(place, client, vip) == b""
        assert reply(place, client, own) == b"late"

    play(place, firewall, body if place_of_client == "client" else probed)


def reply(place: Yard, client: Namespace, source: Vip, port: int = 2049) -> bytes:
    """What a client gets of a datagram that the node sends it, unasked, from a served port."""
    family = socket.AF_INET if source.version == 4 else socket.AF_INET6
    with contextlib.ExitStack() as end:
        with inside(client):
            receiver = end.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        near = "10.91.1.2" if source.version == 4 else "fd91:1::2"
        far = "10.91.2.2" if source.version == 4 else "fd91:2::2"
        receiver.bind((near if client is place.client else far, 0))
        receiver.settimeout(0.2)
        with contextlib.suppress(PermissionError):
            place.servers.udp[str(source), port].sendto(b"late", receiver.getsockname())
        with contextlib.suppress(TimeoutError):
            return receiver.recv(16)
        return b""


@pytest.mark.parametrize("vip", [VIPS[0], VIPS[2]], ids=["v4", "v6"])
def test_fragments_follow_the_same_rules(place: Yard, firewall: Firewall, vip: Vip) -> None:
    def sent(port: int) -> bool:
        place.servers.received.clear()
        family = socket.AF_INET if vip.version == 4 else socket.AF_INET6
        with inside(place.client), socket.socket(family, socket.SOCK_DGRAM) as client:
            client.settimeout(0.5)
            client.sendto(b"x" * 6000, (str(vip), port))
            with contextlib.suppress(TimeoutError):
                return len(client.recv(65535)) == 6000
        return bool(place.servers.received)

    async def body(lease: ServiceLease) -> None:
        await lease.install()
        assert not sent(2049)
        assert sent(UNGUARDED)
        await lease.open(after_ms(LONG_MS))
        assert sent(2049)

    play(place, firewall, body)


def test_nobody_elses_rule_can_refuse_while_it_is_closed(place: Yard, firewall: Firewall) -> None:
    if firewall is Firewall.NFTABLES:
        place.node.exec(
            "nft",
            "table inet other { chain i { type filter hook input priority filter - 20;"
            " tcp dport 2049 reject with icmpx type port-unreachable; }; }",
        )
    else:
        reject = ["-p", "tcp", "--dport", "2049", "-j", "REJECT"]
        place.node.exec("iptables-legacy", "-A", "INPUT", *reject)
    probe = [Probe("tcp", VIPS[0], 2049)]

    async def body(lease: ServiceLease) -> None:
        assert place.answers(place.client, probe) == {"refused"}
        await lease.install()
        assert place.answers(place.client, probe) == {"silence"}
        await lease.open(after_ms(LONG_MS))  # opens for us: others' rules go on to count
        assert place.answers(place.client, probe) == {"refused"}

    play(place, firewall, body)


def test_other_rules_stay_as_they_are_and_remove_leaves_nothing(
    place: Yard, firewall: Firewall
) -> None:
    place.node.exec(
        "nft",
        "table inet filter { set nfsha { type ipv4_addr; elements = { 10.0.0.1 }; };"
        " chain input { type filter hook input priority 0; counter; ip saddr @nfsha accept; }; };"
        " table ip nfsha { chain c { accept; }; }",
    )
    place.node.exec("iptables-legacy", "-N", "NFSHA")
    place.node.exec("iptables-legacy", "-A", "INPUT", "-s", "10.0.0.1/32", "-j", "NFSHA")
    place.node.exec("ip6tables-legacy", "-A", "OUTPUT", "-d", "fd00::1/128", "-j", "ACCEPT")
    place.node.exec("nft", "reset", "counters")
    before = counterless(rules(place.node))

    async def body(lease: ServiceLease) -> None:
        await lease.remove()
        for _ in range(2):
            await lease.install()
            await lease.open(after_ms(LONG_MS))
            installed = counterless(rules(place.node))
            assert [line for line in before.splitlines() if line not in installed] == []
            assert installed != before
            await lease.close()
            await lease.remove()
            assert counterless(rules(place.node)) == before
        await lease.remove()
        assert not await lease.intact()
        assert counterless(rules(place.node)) == before

    play(place, firewall, body)
    assert place.answers(place.client, every([VIPS[0]])) == {"answer"}


def counterless(text: str) -> str:
    return re.sub(r"packets \d+ bytes \d+", "", text)


def test_a_restarted_daemon_interrupts_nobody(place: Yard, firewall: Firewall) -> None:
    lost: list[int] = []
    stop = threading.Event()

    def client() -> None:
        with inside(place.client), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ask:
            ask.settimeout(2)
            ask.connect((str(VIPS[0]), 2049))
            number = 0
            while not stop.is_set():
                ask.send(number.to_bytes(4))
                try:
                    ask.recv(16)
                except OSError:
                    lost.append(number)
                number += 1

    async def first(lease: ServiceLease) -> None:
        await lease.install()
        assert (await lease.open(after_ms(LONG_MS))).held

    async def again(lease: ServiceLease) -> None:
        await lease.install()
        assert (await lease.live()).keys() == set(VIPS)
        assert (await lease.renew(after_ms(LONG_MS))).held

    play(place, firewall, first)
    thread = threading.Thread(target=client)
    thread.start()
    try:
        time.sleep(0.2)
        for _ in range(5):
            play(place, firewall, again)
    finally:
        stop.set()
        thread.join()
    assert lost == []


def test_an_install_for_another_configuration_starts_closed(
    place: Yard, firewall: Firewall
) -> None:
    async def body(lease: ServiceLease) -> None:
        await lease.install()
        await lease.open(after_ms(LONG_MS))
        fewer = type(GUARDED)(VIPS, GUARDED.peers[:1], GUARDED.ports)
        other = await choose(firewall, fewer, boottime_ms)
        try:
            assert not await other.intact()
            await other.install()
            assert await other.intact()
            assert await other.live() == {}
        finally:
            other.shut()
        assert not await lease.intact()

    play(place, firewall, body)
    assert place.answers(place.client, every(VIPS)) == {"silence"}


def test_a_deadline_that_has_passed_closes_at_once(place: Yard, firewall: Firewall) -> None:
    async def body(lease: ServiceLease) -> None:
        await lease.install()
        await lease.open(after_ms(LONG_MS))
        outcome = await lease.renew(after_ms(-1))
        assert outcome.verdict is LeaseVerdict.LATE
        assert await lease.live() == {}
        outcome = await lease.open(after_ms(-1))
        assert outcome.verdict is LeaseVerdict.LATE
        assert await lease.live() == {}

    play(place, firewall, body)
    assert place.answers(place.client, every(VIPS)) == {"silence"}


def test_a_clock_that_jumps_past_the_deadline_during_the_call_closes_at_once(
    place: Yard, firewall: Firewall
) -> None:
    jump_at = [0, 0]  # the reading that leaps, and how many there were

    def clock_ms() -> int:
        jump_at[1] += 1
        late = jump_at[0] and jump_at[1] >= jump_at[0]
        return boottime_ms() + (LONG_MS if late else 0)

    async def body(_: ServiceLease) -> None:
        lease = await choose(firewall, GUARDED, clock_ms)
        try:
            await lease.install()
            for action in (lease.open, lease.renew):
                jump_at[:] = [0, 0]
                assert (await lease.open(after_ms(5000))).held
                readings = jump_at[1]
                jump_at[:] = [readings, 0]  # the last look at the clock in a good attempt
                outcome = await action(after_ms(5000))
                assert outcome.verdict is LeaseVerdict.LATE
                assert await lease.live() == {}
        finally:
            lease.shut()

    play(place, firewall, body)


def test_a_renewal_after_a_close_opens_nothing(place: Yard, firewall: Firewall) -> None:
    async def body(lease: ServiceLease) -> None:
        await lease.install()
        await lease.open(after_ms(LONG_MS))
        await lease.close()
        outcome = await lease.renew(after_ms(LONG_MS))
        assert outcome.verdict is LeaseVerdict.LOST
        assert await lease.live() == {}
        assert (await lease.open(after_ms(LONG_MS))).held

    play(place, firewall, body)


def test_rules_flushed_by_somebody_else_are_noticed_and_repaired_within_a_second(
    place: Yard, firewall: Firewall
) -> None:
    async def body(lease: ServiceLease) -> None:
        await lease.install()
        await lease.open(after_ms(LONG_MS))
        assert await lease.intact()
        clear(place.node)
        started_ms = boottime_ms()
        assert not await lease.intact()
        assert (await lease.renew(after_ms(LONG_MS))).verdict is LeaseVerdict.BROKEN
        assert (await lease.open(after_ms(LONG_MS))).verdict is LeaseVerdict.BROKEN
        await lease.install()
        assert (await lease.open(after_ms(LONG_MS))).held
        assert boottime_ms() - started_ms < 1000
        assert await lease.intact()
        assert place.answers(place.client, every(VIPS)) == {"answer"}
        assert place.answers(place.client, every(OWN)) == {"silence"}

    play(place, firewall, body)


def test_a_close_after_a_flush_restores_the_rules(place: Yard, firewall: Firewall) -> None:
    async def body(lease: ServiceLease) -> None:
        await lease.install()
        await lease.open(after_ms(LONG_MS))
        clear(place.node)
        await lease.close()
        assert await lease.intact()

    play(place, firewall, body)
    assert place.answers(place.client, every([*OWN, *VIPS])) == {"silence"}


def test_without_the_right_to_change_rules_it_says_so(place: Yard, firewall: Firewall) -> None:
    program = (
        "import asyncio\n"
        "from nfsha.vip.freeze import *\n"
        "from tests.netns.freezekit import GUARDED, boottime_ms\n"
        "try:\n"
        f"    asyncio.run(choose(Firewall('{firewall}'), GUARDED, boottime_ms))\n"
        "except FirewallError as error:\n"
        "    print(error)\n"
    )
    drop = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    tree = f"PYTHONPATH={Path(__file__).parents[2]}"
    said = place.node.exec(*drop, "env", tree, sys.executable, "-c", program)
    assert "CAP_NET_ADMIN" in said
    assert "Traceback" not in said


def test_the_kit_sees_a_refusal_as_one(place: Yard) -> None:
    """The other tests rest on it that silence and refusal look different from here."""
    nowhere = every([OWN[0]], [UNGUARDED + 1])
    assert place.answers(place.client, nowhere) == {"refused"}

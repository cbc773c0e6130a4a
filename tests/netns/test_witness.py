"""The reachability witness against real gateways: who answers, by what, and dated how."""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest

from nfsha.host.clock import now_ms
from nfsha.peer import probes
from nfsha.peer.witness import GATEWAY, Witness
from tests.netns.namespaces import Namespace, connect, inside, namespaces

ETH_P_ARP = 0x0806


@dataclass(frozen=True)
class Net:
    """node (lan0) - gateway (lan0, far0) - far (far0); one more gateway address for changes."""

    node: Namespace
    gateway: Namespace
    far: Namespace


@pytest.fixture
def net() -> Iterator[Net]:
    with namespaces("node", "gateway", "far") as (node, gateway, far):
        for namespace in (node, gateway, far):
            namespace.exec("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0")
            namespace.exec("sysctl", "-qw", "net.ipv4.ip_forward=1")
            namespace.exec("sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")
        lan(node, gateway)
        connect(gateway, "far0", far, "far0")
        gateway.ip("address", "add", "198.51.100.1/24", "dev", "far0")
        gateway.ip("address", "add", "fd01::1/64", "dev", "far0")
        far.ip("address", "add", "198.51.100.9/24", "dev", "far0")
        far.ip("address", "add", "fd01::9/64", "dev", "far0")
        far.ip("route", "add", "default", "via", "198.51.100.1")
        far.ip("route", "add", "default", "via", "fd01::1")
        yield Net(node, gateway, far)


def lan(node: Namespace, gateway: Namespace) -> None:
    connect(node, "lan0", gateway, "lan0")
    node.ip("address", "add", "192.0.2.1/24", "dev", "lan0")
    node.ip("address", "add", "fd00::1/64", "dev", "lan0")
    for last in ("fe", "fd"):
        gateway.ip("address", "add", f"192.0.2.{int(last, 16)}/24", "dev", "lan0")
        gateway.ip("address", "add", f"fd00::{last}/64", "dev", "lan0")
    default_routes(node, "fe")


def default_routes(node: Namespace, last: str) -> None:
    via = f"192.0.2.{int(last, 16)}"
    node.ip("route", "replace", "default", "via", via, "dev", "lan0")
    node.ip("-6", "route", "replace", "default", "via", f"fd00::{last}", "dev", "lan0")


class Asker:
    """The node's witness with what it reported."""

    def __init__(self, hosts: Sequence[str], gateway: bool, window_ms: int) -> None:
        self.answers: list[tuple[str, int]] = []
        self.witness = Witness(
            "lan0", hosts, gateway, self._answered, now_ms, neighbour_window_ms=window_ms
        )

    def _answered(self, name: str, sent_ms: int) -> None:
        assert sent_ms <= now_ms()
        self.answers.append((name, sent_ms))

    async def rounds(self, count: int, every_s: float = 0.02) -> None:
        for _ in range(count):
            self.witness.ask()
            await asyncio.sleep(every_s)

    def names(self) -> set[str]:
        return {name for name, _ in self.answers}


def play(
    net: Net,
    scenario: Callable[[Asker], Awaitable[None]],
    hosts: Sequence[str] = (),
    *,
    gateway: bool = True,
    window_ms: int = 2000,  # on a busy machine an answer waits in its socket
) -> None:
    async def run() -> None:
        asker = Asker(hosts, gateway, window_ms)
        await asker.witness.start()
        try:
            await scenario(asker)
        finally:
            asker.witness.close()

    with inside(net.node):
        asyncio.run(run())


async def until(condition: Callable[[], bool], limit_s: float = 8.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        await asyncio.sleep(0.01)


async def answers_again(asker: Asker, name: str = GATEWAY, limit_s: float = 8.0) -> None:
    asker.answers.clear()
    deadline = time.monotonic() + limit_s
    while name not in asker.names():
        assert time.monotonic() < deadline, f"{name} does not answer"
        await asker.rounds(1, 0.05)


def firewall(namespace: Namespace, family: str, hook: str, *rules: str) -> None:
    lines = "\n".join([f"type filter hook {hook} priority 0", *rules])
    namespace.exec("nft", f"table {family} fault {{\nchain {hook}_chain {{\n{lines}\n}}\n}}")


def test_the_gateways_answer_by_echo_and_as_neighbours(net: Net) -> None:
    async def scenario(asker: Asker) -> None:
        started_ms = now_ms()
        await asker.rounds(1, 0.2)
        before_second_ms = now_ms()
        assert {str(each) for each in asker.witness.addresses()} == {"192.0.2.254", "fd00::fe"}
        assert len(asker.answers) == 4
        assert all(started_ms <= sent_ms < before_second_ms for _, sent_ms in asker.answers)
        await asker.rounds(1, 0.2)
        counters = asker.witness.counters()[GATEWAY]
        assert (counters.answered_echo, counters.answered_neighbour) == (4, 4)
        assert counters.address == "192.0.2.254, fd00::fe"
        assert counters.last_answer_ms is not None
        assert counters.last_answer_ms >= before_second_ms

    play(net, scenario)


@pytest.mark.parametrize(
    ("host", "neighbour"),
    [("192.0.2.254", 5), ("fd00::fe", 5), ("198.51.100.9", 0), ("fd01::9", 0)],
)
def test_listed_hosts_answer_by_the_ways_there_are(net: Net, host: str, neighbour: int) -> None:
    async def scenario(asker: Asker) -> None:
        await asker.rounds(5, 0.1)
        counters = asker.witness.counters()[host]
        assert (counters.asked, counters.errors) == (5, 0)
        assert (counters.answered_echo, counters.answered_neighbour) == (5, neighbour)
        assert asker.names() == {host}

    play(net, scenario, [host], gateway=False)


def test_a_host_that_blocks_echo_answers_as_a_neighbour(net: Net) -> None:
    echo = ("icmp type echo-request drop", "icmpv6 type echo-request drop")
    firewall(net.gateway, "inet", "input", *echo)

    async def scenario(asker: Asker) -> None:
        await asker.rounds(5, 0.05)
        counters = asker.witness.counters()[GATEWAY]
        assert (counters.answered_echo, counters.answered_neighbour) == (0, 10)

    play(net, scenario)


def test_a_wrong_hardware_address_spoils_the_echo_and_not_arp(net: Net) -> None:
    wrong = ("lladdr", "02:00:00:00:00:99", "dev", "lan0", "nud", "permanent")
    net.node.ip("neigh", "replace", "192.0.2.254", *wrong)
    net.node.ip("neigh", "replace", "198.51.100.9", *wrong)

    async def scenario(asker: Asker) -> None:
        await asker.rounds(5, 0.05)
        counters = asker.witness.counters()
        assert counters["192.0.2.254"].answered_echo == 0
        assert counters["192.0.2.254"].answered_neighbour == 5
        assert counters["198.51.100.9"].answered_echo == 0

    play(net, scenario, ["192.0.2.254", "198.51.100.9"], gateway=False)


def test_a_gateway_that_is_gone_does_not_answer_and_does_when_it_is_back(net: Net) -> None:
    async def scenario(asker: Asker) -> None:
        await answers_again(asker)
        net.gateway.ip("link", "set", "lan0", "down")
        asker.answers.clear()
        await asker.rounds(20, 0.02)
        assert asker.answers == []
        net.gateway.ip("link", "set", "lan0", "up")
        await answers_again(asker)

    play(net, scenario)


def test_a_host_that_never_was_does_not_answer(net: Net) -> None:
    async def scenario(asker: Asker) -> None:
        await asker.rounds(20, 0.05)
        assert asker.answers == []
        assert asker.witness.counters()["192.0.2.77"].asked == 20

    play(net, scenario, ["192.0.2.77"], gateway=False)


def test_the_gateway_is_found_when_its_route_comes_and_when_it_changes(
    net: Net, caplog: pytest.LogCaptureFixture
) -> None:
    net.node.ip("route", "delete", "default")
    net.node.ip("-6", "route", "delete", "default")

    async def scenario(asker: Asker) -> None:
        await asker.rounds(5)
        assert asker.answers == []
        assert asker.witness.counters()[GATEWAY].address is None
        assert [r.message for r in caplog.records] == [
            "witness, gateway: there is no default route over lan0"
        ]
        default_routes(net.node, "fe")
        await until(lambda: len(asker.witness.addresses()) == 2, 1.5)
        await answers_again(asker)
        default_routes(net.node, "fd")
        expected = {ip_address("192.0.2.253"), ip_address("fd00::fd")}
        await until(lambda: set(asker.witness.addresses()) == expected, 3.5)
        await answers_again(asker)

    play(net, scenario)


def test_the_best_default_route_over_this_interface_counts(net: Net) -> None:
    connect(net.node, "other0", net.far, "other0")
    net.node.ip("address", "add", "203.0.113.1/24", "dev", "other0")
    net.node.ip("-4", "route", "flush", "default")
    add = ("route", "add", "default")
    net.node.ip(*add, "via", "203.0.113.2", "dev", "other0", "metric", "1")
    net.node.ip(*add, "via", "192.0.2.200", "dev", "lan0", "table", "77")
    net.node.ip(*add, "via", "192.0.2.201", "dev", "lan0", "metric", "900")
    net.node.ip(
        *add, "metric", "50", "nexthop", "via", "203.0.113.2", "dev", "other0",
        "nexthop", "via", "192.0.2.253", "dev", "lan0",
    )  # fmt: skip

    async def scenario(asker: Asker) -> None:
        found = {str(each) for each in asker.witness.addresses()}
        assert found == {"192.0.2.253", "fd00::fe"}

    play(net, scenario)


def test_a_gateway_of_the_other_family_is_asked(net: Net) -> None:
    net.node.ip("-6", "route", "delete", "default")
    net.node.ip("-4", "route", "replace", "default", "via", "inet6", "fd00::fd", "dev", "lan0")

    async def scenario(asker: Asker) -> None:
        assert [str(each) for each in asker.witness.addresses()] == ["fd00::fd"]
        await answers_again(asker)

    play(net, scenario)


def test_a_link_local_gateway_answers(net: Net) -> None:
    net.gateway.ip("address", "add", "fe80::fe/64", "dev", "lan0")
    net.node.ip("-6", "route", "replace", "default", "via", "fe80::fe", "dev", "lan0")
    net.node.ip("route", "delete", "default")

    async def scenario(asker: Asker) -> None:
        await asker.rounds(4, 0.1)
        counters = asker.witness.counters()[GATEWAY]
        assert (counters.answered_echo, counters.answered_neighbour) == (4, 4)

    play(net, scenario)


def test_this_machines_own_addresses_are_no_witness(net: Net) -> None:
    own = ["192.0.2.1", "fd00::1", "192.0.2.100"]
    net.node.ip("address", "add", "192.0.2.100/32", "dev", "lan0")

    async def scenario(asker: Asker) -> None:
        assert asker.witness.addresses() == ()
        await asker.rounds(5)
        assert asker.answers == []

    play(net, scenario, own, gateway=False)


def test_an_interface_that_goes_down_and_up_is_asked_over_again(net: Net) -> None:
    async def scenario(asker: Asker) -> None:
        await answers_again(asker)
        net.node.ip("link", "set", "lan0", "down")
        asker.answers.clear()
        await asker.rounds(10)
        assert asker.answers == []
        net.node.ip("link", "set", "lan0", "up")
        net.node.ip("address", "replace", "fd00::1/64", "dev", "lan0")
        default_routes(net.node, "fe")
        await answers_again(asker, "192.0.2.254")
        await answers_again(asker, GATEWAY)

    play(net, scenario, ["192.0.2.254"])


def test_an_interface_that_comes_late_or_is_made_anew_is_used(net: Net) -> None:
    net.node.ip("link", "delete", "lan0")

    async def scenario(asker: Asker) -> None:
        for _ in range(2):
            await asker.rounds(5)
            assert asker.answers == []
            lan(net.node, net.gateway)
            await answers_again(asker, "fd00::fe")
            await answers_again(asker, GATEWAY)
            net.node.ip("link", "delete", "lan0")
            asker.answers.clear()
            await until(lambda: asker.witness.addresses() == (), 3.5)

    play(net, scenario, ["fd00::fe"])


# --------------------------------------------------------------------------- dates


class HandMadeGateway:
    """Answers ARP by hand and nothing else: 192.0.2.77, which no kernel has."""

    ADDRESS = "192.0.2.77"

    def __init__(self, namespace: Namespace) -> None:
        with inside(namespace):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, ETH_P_ARP)
            self._socket.bind(("lan0", ETH_P_ARP))
        self._socket.setblocking(False)
        self._mac = self._socket.getsockname()[4]

    def close(self) -> None:
        self._socket.close()

    def requests(self) -> list[tuple[bytes, bytes]]:
        """Hardware and IP address of each who asked for `ADDRESS` since the last call."""
        found = []
        while select.select([self._socket], [], [], 0)[0]:
            data = self._socket.recv(100)
            if data[6:8] == b"\0\1" and data[24:28] == ip_address(self.ADDRESS).packed:
                found.append((data[8:14], data[14:18]))
        return found

    def answer(
        self, to_mac: bytes, to: bytes, sender: str = ADDRESS, frame_to: bytes | None = None
    ) -> None:
        reply = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 2)
        reply += self._mac + ip_address(sender).packed + to_mac + to
        self._socket.sendto(reply, ("lan0", ETH_P_ARP, 0, 0, frame_to or to_mac))


@pytest.fixture
def by_hand(net: Net) -> Iterator[HandMadeGateway]:
    gateway = HandMadeGateway(net.gateway)
    yield gateway
    gateway.close()


def test_an_arp_answer_is_dated_by_the_oldest_open_request(
    net: Net, by_hand: HandMadeGateway
) -> None:
    async def scenario(asker: Asker) -> None:
        window_s = 1.0
        first_ms = now_ms()
        asker.witness.ask()
        await asyncio.sleep(0.05)
        second_ms = now_ms()
        asker.witness.ask()
        await asyncio.sleep(0.05)
        requests = by_hand.requests()
        who = requests[0]
        by_hand.answer(*who)  # to whichever: it is dated by the older one
        await until(lambda: len(asker.answers) == 1)
        assert first_ms <= asker.answers[0][1] < second_ms
        by_hand.answer(*who)
        await until(lambda: len(asker.answers) == 2)
        assert asker.answers[1][1] >= second_ms
        by_hand.answer(*who)  # nothing is open any more
        await until(lambda: asker.witness.not_asked_for == 1)
        assert len(asker.answers) == 2
        # A request that got no answer makes later ones look old only for the window.
        asker.witness.ask()
        await asyncio.sleep(window_s + 0.05)
        third_ms = now_ms()
        asker.witness.ask()
        await asyncio.sleep(0.02)
        by_hand.answer(*who)
        await until(lambda: len(asker.answers) == 3)
        assert asker.answers[2][1] >= third_ms

    play(net, scenario, [by_hand.ADDRESS], gateway=False, window_ms=1000)


def test_an_arp_answer_after_its_window_counts_for_nothing(
    net: Net, by_hand: HandMadeGateway
) -> None:
    async def scenario(asker: Asker) -> None:
        asker.witness.ask()
        await asyncio.sleep(0.15)
        by_hand.answer(*by_hand.requests()[0])
        await until(lambda: asker.witness.not_asked_for == 1)
        assert asker.answers == []

    play(net, scenario, [by_hand.ADDRESS], gateway=False, window_ms=100)


# --------------------------------------------------------------------------- forgeries


def test_arp_that_answers_something_else_counts_for_nothing(
    net: Net, by_hand: HandMadeGateway
) -> None:
    async def scenario(asker: Asker) -> None:
        asker.witness.ask()
        await asyncio.sleep(0.02)
        mac, address = by_hand.requests()[0]
        by_hand.answer(mac, address, sender="192.0.2.78")  # somebody whom nobody asked
        by_hand.answer(mac, ip_address("192.0.2.99").packed)  # an answer to somebody else
        by_hand.answer(mac, address, frame_to=b"\xff" * 6)  # a broadcast: the filter drops it
        await until(lambda: asker.witness.not_asked_for == 2)
        await asyncio.sleep(0.05)
        assert asker.witness.not_asked_for == 2
        assert asker.answers == []
        by_hand.answer(mac, address)
        await until(lambda: len(asker.answers) == 1)

    play(net, scenario, [by_hand.ADDRESS], gateway=False, window_ms=2000)


@pytest.mark.parametrize("version", [4, 6])
def test_a_forged_echo_counts_for_nothing(net: Net, version: int) -> None:
    host, other = ("192.0.2.254", "192.0.2.253") if version == 4 else ("fd00::fe", "fd00::fd")
    node = "192.0.2.1" if version == 4 else "fd00::1"
    firewall(net.gateway, "inet", "input", "icmp type echo-request drop",
             "icmpv6 type echo-request drop")  # fmt: skip
    firewall(net.gateway, "arp", "input", "drop")
    net.node.ip("neigh", "replace", host, "lladdr", mac_of(net.gateway), "dev", "lan0")
    net.gateway.ip("neigh", "replace", node, "lladdr", mac_of(net.node), "dev", "lan0")
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    protocol = socket.IPPROTO_ICMP if version == 4 else socket.IPPROTO_ICMPV6

    async def scenario(asker: Asker) -> None:
        with inside(net.gateway):
            spy = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        with spy:
            spy.settimeout(5)
            spy.bind(("lan0", 0x0800 if version == 4 else 0x86DD))
            asker.witness.ask()
            await asyncio.sleep(0.05)
            request = b""
            while len(request) != 24 or request[0] != (8 if version == 4 else 128):
                request = spy.recv(2000)[20 if version == 4 else 40 :]
            neighbours = len(asker.answers)
            _, _, _, identity, sequence, token = struct.unpack("!BBHHH16s", request)
            kind = 0 if version == 4 else 129

            def reply(identity: int, sequence: int, token: bytes) -> bytes:
                unsummed = struct.pack("!BBHHH16s", kind, 0, 0, identity, sequence, token)
                if version == 6:
                    return unsummed
                summed = probes.checksum(unsummed)
                return struct.pack("!BBHHH16s", kind, 0, summed, identity, sequence, token)

            def send(source: str, packet: bytes) -> None:
                with inside(net.gateway), socket.socket(family, socket.SOCK_RAW, protocol) as raw:
                    raw.bind((source, 0))
                    raw.sendto(packet, (node, 0))

            send(host, reply(identity, sequence, bytes(16)))  # another token
            send(host, reply(identity, sequence + 1 & 0xFFFF, token))  # another number
            send(other, reply(identity, sequence, token))  # another machine
            send(host, reply(identity, sequence, token)[:-1])  # torn
            send(host, reply(identity ^ 1, sequence, token))  # another identity: filtered
            await until(lambda: asker.witness.not_asked_for >= 3)
            await asyncio.sleep(0.05)
            assert len(asker.answers) == neighbours
            send(host, reply(identity, sequence, token))
            await until(lambda: len(asker.answers) == neighbours + 1)
            seen = asker.witness.not_asked_for
            send(host, reply(identity, sequence, token))  # the same once more
            await until(lambda: asker.witness.not_asked_for == seen + 1)
            assert len(asker.answers) == neighbours + 1

    play(net, scenario, [host], gateway=False)


def test_an_advertisement_from_beyond_the_link_counts_for_nothing(net: Net) -> None:
    firewall(net.gateway, "ip6", "input", "icmpv6 type { nd-neighbor-solicit, echo-request } drop")
    host = ip_address("fd00::fe")

    def advertise(hop_limit: int, flags: int, target: bytes, source: str = "fd00::fe") -> None:
        with inside(net.gateway):
            raw = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        with raw:
            raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, hop_limit)
            raw.bind((source, 0))
            raw.sendto(struct.pack("!BBHI16s", 136, 0, 0, flags, target), ("fd00::1", 0))

    async def scenario(asker: Asker) -> None:
        asker.witness.ask()
        solicited = 1 << 30
        mac = net.node.exec("cat", "/sys/class/net/lan0/address").strip()
        net.gateway.ip("neigh", "replace", "fd00::1", "lladdr", mac, "dev", "lan0")
        advertise(64, solicited, host.packed)
        advertise(255, 0, host.packed)
        advertise(255, solicited, ip_address("fd00::fd").packed, source="fd00::fd")
        advertise(255, solicited, host.packed, source="fd00::fd")
        await asyncio.sleep(0.1)
        assert asker.answers == []
        advertise(255, solicited, host.packed)
        await until(lambda: len(asker.answers) == 1)

    play(net, scenario, [str(host)], gateway=False, window_ms=3000)


# --------------------------------------------------------------------------- cost, permission


def test_other_traffic_does_not_wake_it(net: Net) -> None:
    async def scenario(asker: Asker) -> None:
        await answers_again(asker)
        await asyncio.sleep(0.05)
        sockets = asker.witness._sockets
        assert sockets is not None
        assert sockets.icmp6 is not None
        with inside(net.gateway):
            for family, address in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "fd00::1")):
                with socket.socket(family, socket.SOCK_DGRAM) as sender:
                    for _ in range(500):
                        sender.sendto(b"n" * 1000, (address, 2049))
        for address in ("192.0.2.254", "fd00::fe"):
            net.node.exec("ping", "-q", "-c", "3", "-i", "0.02", address)
            net.gateway.exec("ping", "-q", "-c", "3", "-i", "0.02", "192.0.2.1")
        # The loop took nothing meanwhile: this coroutine did not let it turn. All that can be
        # there is what the gateway tells this kernel as its neighbour, some of it by broadcast.
        for receiver, most, kinds in (
            (sockets.arp, 2, {0}),
            (sockets.icmp, 0, set()),
            (sockets.icmp6, 4, {136}),
        ):
            woken_by = everything_in(receiver)
            assert len(woken_by) <= most
            assert {packet[0] for packet in woken_by} <= kinds

    play(net, scenario)


def everything_in(receiver: socket.socket) -> list[bytes]:
    found = []
    while select.select([receiver], [], [], 0)[0]:
        found.append(receiver.recv(2000))
    return found


def mac_of(namespace: Namespace) -> str:
    return namespace.exec("cat", "/sys/class/net/lan0/address").strip()


def test_without_the_permission_the_start_says_so() -> None:
    code = (
        "import asyncio\n"
        "from nfsha.peer.witness import Witness\n"
        "asyncio.run(Witness('lo', ['192.0.2.1'], False, print, int).start())\n"
    )
    done = subprocess.run(
        ["setpriv", "--bounding-set=-net_raw", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.stderr.strip().endswith("witness: needs CAP_NET_RAW: Operation not permitted")

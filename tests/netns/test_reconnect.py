"""Clients and their connections, on real kernels and both IPs: listed, woken by tickles, ended."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import selectors
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import ip_address
from typing import Any, TypeVar

import pytest

from nfsha.host.clock import now_ms
from nfsha.vip import connections, reconnect, sockdiag
from nfsha.vip.connections import ClientList, Ends, Places, ends_of
from nfsha.vip.reconnect import DESTROYS, RESETS, TICKLE_AT_MS, Reconnect
from nfsha.vip.rtnetlink import Vip
from tests.netns.lab import Lab
from tests.netns.labkit.network import VIP
from tests.netns.labkit.records import RecordWriter
from tests.netns.namespaces import Namespace, connect, inside, namespaces
from tests.netns.pair import BUSY_MS, Pair, assert_only_moved

V4, V6 = ip_address("10.77.0.100"), ip_address("fd77::100")
OWN4 = ip_address("10.77.0.1")
OUTAGE_S = 4.0
"""Retransmissions come after some 0.2, 0.6, 1.5, 3.2, 6.7 and 14 s: the next is long after it."""
PORT, OTHER_PORT = 2049, 3260
PLACES = Places((V4, V6), {"nfs": PORT, "mountd": 20048})
DROP = f"""table inet freeze {{
    chain out {{
        type filter hook output priority 0
        tcp sport {PORT} drop
    }}
}}"""

_Kept = TypeVar("_Kept", "EchoServer", "Client")


class EchoServer:
    """Answers each byte on any connection to its ports, IPv4 and IPv6 on one socket as ganesha."""

    def __init__(self, namespace: Namespace) -> None:
        self.errors: list[int] = []
        self._selector = selectors.DefaultSelector()
        self._end = threading.Event()
        with inside(namespace):
            for port in (PORT, OTHER_PORT):
                listener = socket.create_server(
                    ("::", port), family=socket.AF_INET6, dualstack_ipv6=True
                )
                self._selector.register(listener, selectors.EVENT_READ, "listener")
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.is_set():
            for key, _ in self._selector.select(0.02):
                assert isinstance(key.fileobj, socket.socket)
                if key.data == "listener":
                    accepted, _ = key.fileobj.accept()
                    self._selector.register(accepted, selectors.EVENT_READ, "")
                    continue
                try:
                    data = key.fileobj.recv(100)
                    key.fileobj.sendall(data)
                except OSError as error:
                    self.errors.append(error.errno or 0)
                    data = b""
                if not data:
                    self._selector.unregister(key.fileobj)
                    key.fileobj.close()

    def close(self) -> None:
        self._end.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()


class Client:
    """Asks a byte each 20 ms, and connects anew when it is reset, as an NFS client does."""

    def __init__(self, namespace: Namespace, address: Vip, port: int = 0) -> None:
        self.answers: list[float] = []
        self._port = port
        self.ports: list[int] = []
        self._namespace = namespace
        self._address = address
        self._end = threading.Event()
        self._socket = self._connected()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _connected(self) -> socket.socket:
        family = socket.AF_INET if self._address.version == 4 else socket.AF_INET6
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("", self._port))
        made.settimeout(5)
        made.connect((str(self._address), PORT))
        made.settimeout(0.05)
        self.ports.append(made.getsockname()[1])
        return made

    def _run(self) -> None:
        asked = False
        with inside(self._namespace):
            while not self._end.is_set():
                try:
                    if not asked:
                        self._socket.sendall(b"?")
                        asked = True
                    if self._socket.recv(1):
                        self.answers.append(time.monotonic())
                        asked = False
                        self._end.wait(0.02)
                        continue
                except TimeoutError:
                    continue
                except ConnectionResetError:
                    pass
                self._socket.close()
                self._socket, asked = self._connected(), False

    def last_before(self, moment: float) -> float:
        return max(at for at in self.answers if at < moment)

    def first_after(self, moment: float) -> float | None:
        return next((at for at in self.answers if at > moment), None)

    def close(self) -> None:
        self._end.set()
        self._thread.join()
        self._socket.close()


class Lan:
    """Two servers and a client on one bridge; the VIPs are moved by hand."""

    def __init__(
        self, bridge: Namespace, one: Namespace, two: Namespace, client: Namespace
    ) -> None:
        self.one, self.two, self.client = one, two, client
        bridge.ip("link", "add", "br0", "type", "bridge", "forward_delay", "0")
        bridge.ip("link", "set", "br0", "up")
        for number, node in enumerate((one, two, client), start=1):
            connect(node, "e0", bridge, f"p{number}")
            bridge.ip("link", "set", f"p{number}", "master", "br0")
            # Until duplicate address detection has ended, the link-local address cannot be used.
            node.exec("sysctl", "-q", "-w", "net.ipv6.conf.e0.accept_dad=0")
            node.ip("link", "set", "e0", "down")
            node.ip("link", "set", "e0", "up")
            node.ip("address", "add", f"10.77.0.{number}/24", "dev", "e0")
            node.ip("address", "add", f"fd77::{number}/64", "dev", "e0", "nodad")
        self.closing = contextlib.ExitStack()
        self.servers = [self.keep(EchoServer(node)) for node in (one, two)]

    def keep(self, one: _Kept) -> _Kept:
        self.closing.callback(one.close)
        return one

    def dial(self, address: Vip, port: int = 0) -> Client:
        with inside(self.client):
            return self.keep(Client(self.client, address, port))

    def hold(self, node: Namespace) -> None:
        node.ip("address", "add", f"{V4}/32", "dev", "e0")
        node.ip("address", "add", f"{V6}/128", "dev", "e0", "nodad")

    def release(self, node: Namespace) -> None:
        node.ip("address", "del", f"{V4}/32", "dev", "e0")
        node.ip("address", "del", f"{V6}/128", "dev", "e0")

    def point(self, node: Namespace) -> None:
        """The client is told where the VIPs are, as the announcer would."""
        words = node.ip("link", "show", "e0").split()
        mac = words[words.index("link/ether") + 1]
        for vip in (V4, V6):
            self.client.ip(
                "neigh", "replace", str(vip), "lladdr", mac, "dev", "e0", "nud", "reachable"
            )


@pytest.fixture
def lan() -> Iterator[Lan]:
    with namespaces("lan", "one", "two", "client") as (bridge, one, two, client):
        made = Lan(bridge, one, two, client)
        with made.closing:
            yield made


class Told:
    """A driver, and what it told; to be started inside a node."""

    def __init__(self) -> None:
        self.published: list[bytes] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.driver = Reconnect(
            "e0",
            PLACES,
            now_ms,
            allowed=lambda: True,
            publish=self.published.append,
            watch=self.tasks.append,
        )


def run(
    node: Namespace,
    body: Callable[[Reconnect, list[bytes]], Awaitable[None]],
    allowed: Callable[[], bool] = lambda: True,
) -> Reconnect:
    """Runs `body` with a started driver on a node; a failed task fails it."""
    published: list[bytes] = []
    tasks: list[asyncio.Task[None]] = []

    async def scene() -> Reconnect:
        driver = Reconnect(
            "e0", PLACES, now_ms, allowed=allowed, publish=published.append, watch=tasks.append
        )
        await driver.start(adopted=True)
        try:
            await body(driver, published)
        finally:
            await driver.close()
        assert [task for task in tasks if not task.cancelled() and task.exception()] == []
        return driver

    with inside(node):
        return asyncio.run(scene())


def listed(node: Namespace) -> list[Ends]:
    with inside(node):
        return [ends_of(entry.connection) for entry in sockdiag.connections(PLACES)]


async def until(condition: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        await asyncio.sleep(0.01)


def decoded(data: bytes) -> ClientList:
    return connections.decode(data, PLACES)


# ------------------------------------------------------------------ listing


def test_only_clients_of_the_vips_are_listed_of_both_families(lan: Lan) -> None:
    lan.hold(lan.one)
    lan.point(lan.one)
    four, six, elsewhere = lan.dial(V4), lan.dial(V6), lan.dial(OWN4)
    with inside(lan.client), socket.create_connection((str(V4), OTHER_PORT), timeout=2):
        found = listed(lan.one)
    assert elsewhere.ports
    assert {one.vip: (one.port, one.client, one.client_port) for one in found} == {
        V4: (PORT, ip_address("10.77.0.3"), four.ports[0]),
        V6: (PORT, ip_address("fd77::3"), six.ports[0]),
    }
    assert len(found) == 2


def test_a_serving_node_tells_who_came_and_who_went(
    lan: Lan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconnect, "LOOK_EVERY_S", 0.2)
    lan.hold(lan.one)
    lan.point(lan.one)
    first = lan.dial(V4)

    async def body(driver: Reconnect, published: list[bytes]) -> None:
        await asyncio.sleep(0.5)
        assert published == [], "a node that does not serve tells nothing"
        driver.opened()
        await until(lambda: len(published) == 1, 3.0)
        (only,) = decoded(published[0]).connections
        assert ends_of(only).client_port == first.ports[0]
        second = await asyncio.to_thread(lan.dial, V6)
        await until(lambda: len(published) == 2, 3.0)
        told = [ends_of(one).client_port for one in decoded(published[1]).connections]
        assert told == [first.ports[0], second.ports[0]]
        await asyncio.to_thread(first.close)
        # Until the server has closed its end, too.
        await until(lambda: len(sockdiag.connections(PLACES)) == 1, 2.0)
        driver.closed()
        await until(lambda: len(published) == 3, 1.0)
        (left,) = decoded(published[2]).connections
        assert ends_of(left).client_port == second.ports[0]
        await asyncio.sleep(0.5)
        assert len(published) == 3
        assert driver.tickles == 0

    run(lan.one, body)


def test_who_served_before_takes_its_list_back_when_the_other_one_has_clients(
    lan: Lan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconnect, "LOOK_EVERY_S", 0.1)
    lan.hold(lan.one)
    lan.point(lan.one)
    lan.dial(V4)
    elsewhere = connections.connection(Ends(V4, PORT, ip_address("10.77.0.3"), 5000))

    async def body(driver: Reconnect, published: list[bytes]) -> None:
        driver.opened()
        await until(lambda: len(published) == 1, 3.0)
        driver.closed()
        await driver.heard(connections.encode(ClientList(1, (), 0)))
        assert len(published) == 1, "one without clients may have been told before"
        await driver.heard(connections.encode(ClientList(2, (elsewhere,), 1)))
        await until(lambda: len(published) == 2, 1.0)
        assert decoded(published[1]).connections == ()
        saved = driver.facts()["saved"]
        assert [one["client_ports"] for one in saved["clients"]] == [[5000]]

    run(lan.one, body)


# ------------------------------------------------------------------ ending


def test_who_gave_the_vips_away_ends_its_connections_and_no_others(lan: Lan) -> None:
    lan.hold(lan.one)
    lan.point(lan.one)
    four, six, elsewhere = lan.dial(V4), lan.dial(V6), lan.dial(OWN4)
    lan.one.exec("nft", DROP)
    lan.release(lan.one)

    async def body(driver: Reconnect, published: list[bytes]) -> None:
        assert driver.means == DESTROYS
        await driver.end_own()
        assert driver.ended == 2
        await driver.end_own()
        assert driver.ended == 2

    run(lan.one, body)
    assert listed(lan.one) == []
    assert lan.servers[0].errors == [errno.ECONNABORTED] * 2
    lan.one.exec("nft", "delete table inet freeze")
    assert (len(four.ports), len(six.ports)) == (1, 1), "the clients heard of it"
    moment = time.monotonic()
    while elsewhere.first_after(moment) is None:
        assert time.monotonic() < moment + 5, "another connection was ended too"
        time.sleep(0.01)
    assert len(elsewhere.ports) == 1


# ------------------------------------------------------------------ waking


def test_woken_clients_are_back_at_once_and_others_are_not(lan: Lan) -> None:
    lan.hold(lan.one)
    lan.point(lan.one)
    woken = [lan.dial(V4), lan.dial(V6)]
    asleep = [lan.dial(V4), lan.dial(V6)]
    ports = {client.ports[0] for client in woken}
    with inside(lan.one):
        entries = sockdiag.connections(PLACES)
    known = tuple(
        entry.connection for entry in entries if ends_of(entry.connection).client_port in ports
    )
    assert len(known) == 2
    lan.release(lan.one)
    gone = time.monotonic()
    time.sleep(OUTAGE_S)
    lan.hold(lan.two)
    lan.point(lan.two)
    moment = time.monotonic()

    async def body(driver: Reconnect, published: list[bytes]) -> None:
        await driver.heard(connections.encode(ClientList(1, known, 2)))
        driver.opened()
        await until(lambda: all(one.first_after(moment) for one in woken), 1.0)
        await asyncio.sleep(1.0)  # the others have all this time

    driver = run(lan.two, body)
    for client in woken:
        back = client.first_after(moment)
        assert back is not None
        assert back - moment < 0.5
        assert gone - client.last_before(moment) < 0.5
        assert len(client.ports) == 2
    assert [client.first_after(moment) for client in asleep] == [None, None]
    assert driver.tickles % 2 == 0
    assert driver.tickles <= 2 * len(TICKLE_AT_MS)


@pytest.mark.parametrize("means", [DESTROYS, RESETS], ids=["destroyed", "reset"])
def test_a_client_that_keeps_its_port_goes_there_and_back(
    lan: Lan, means: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As kernels' NFS clients do: the server before has a connection of the same ends."""
    monkeypatch.setattr(sockdiag, "can_destroy", lambda: means == DESTROYS)
    nodes = {lan.one: Told(), lan.two: Told()}
    stalls: list[float] = []

    async def move(old: Namespace, new: Namespace) -> None:
        nodes[old].driver.closed()
        old.exec("nft", DROP)
        lan.release(old)
        await nodes[old].driver.end_own()
        await asyncio.sleep(1.8)  # the client tries after 1.5 s, and then after 3.2 s
        new.exec("nft", "add table inet freeze; delete table inet freeze")
        lan.hold(new)
        lan.point(new)
        moment = time.monotonic()
        await nodes[new].driver.heard(nodes[old].published[-1])
        nodes[new].driver.opened()
        await until(lambda: all(one.first_after(moment) for one in clients), 5.0)
        stalls.extend((one.first_after(moment) or 0) - moment for one in clients)

    async def scene() -> None:
        for node, told in nodes.items():
            with inside(node):
                await told.driver.start(adopted=True)
            assert told.driver.means == means
        nodes[lan.one].driver.opened()
        await until(lambda: bool(nodes[lan.one].published), 3.0)
        await move(lan.one, lan.two)
        await move(lan.two, lan.one)
        for told in nodes.values():
            await told.driver.close()
            assert [t for t in told.tasks if not t.cancelled() and t.exception()] == []

    lan.hold(lan.one)
    lan.point(lan.one)
    clients = [lan.dial(V4, 700), lan.dial(V6, 701)]
    asyncio.run(scene())
    assert max(stalls) < 1.0, stalls
    assert [one.ports for one in clients] == [[700] * 3, [701] * 3]
    assert nodes[lan.one].driver.ended == 2


def test_who_waits_for_an_answer_of_a_daemon_that_was_killed_hears_of_its_end(lan: Lan) -> None:
    """The request was received, so the client says nothing more; the node serves again itself."""
    lan.hold(lan.one)
    lan.point(lan.one)
    with inside(lan.client):
        waiting = socket.create_connection((str(V4), PORT), timeout=5)
    with waiting:
        waiting.settimeout(0.05)
        waiting.sendall(b"x")
        assert waiting.recv(1) == b"x"
        lan.one.exec("nft", DROP)
        lan.release(lan.one)

        async def body(driver: Reconnect, published: list[bytes]) -> None:
            await driver.end_own()
            lan.one.exec("nft", "delete table inet freeze")
            lan.hold(lan.one)
            lan.point(lan.one)
            with pytest.raises(TimeoutError):
                waiting.recv(1)  # nobody told the client
            driver.opened()
            await until(lambda: driver.tickles >= 1, 1.0)
            waiting.settimeout(1.0)
            with pytest.raises(ConnectionResetError):
                await asyncio.to_thread(waiting.recv, 1)

        run(lan.one, body)


def test_a_node_that_may_not_serve_wakes_nobody(lan: Lan) -> None:
    lan.hold(lan.one)
    lan.point(lan.one)
    client = ip_address("10.77.0.3")
    known = tuple(
        connections.connection(Ends(V4, PORT, client, port)) for port in range(5000, 5100)
    )
    asked: list[int] = []

    def allowed() -> bool:
        asked.append(1)
        return len(asked) < 3

    async def body(driver: Reconnect, published: list[bytes]) -> None:
        await driver.heard(connections.encode(ClientList(1, known, 100)))
        driver.opened()
        await until(lambda: len(asked) >= 3, 2.0)
        await asyncio.sleep(0.5)
        assert (len(asked), driver.tickles) == (3, 32)  # two batches of 16, and then a no

    run(lan.one, body, allowed)


def test_a_closed_service_wakes_nobody(lan: Lan) -> None:
    lan.hold(lan.one)
    lan.point(lan.one)
    known = connections.connection(Ends(V4, PORT, ip_address("10.77.0.3"), 5000))

    async def body(driver: Reconnect, published: list[bytes]) -> None:
        await driver.heard(connections.encode(ClientList(1, (known,), 1)))
        driver.opened()
        await until(lambda: driver.tickles == 2, 1.0)
        driver.closed()
        await asyncio.sleep(0.5)
        assert driver.tickles == 2

    run(lan.one, body)


def test_a_list_with_garbage_is_refused_and_the_one_before_stays(lan: Lan) -> None:
    client = ip_address("10.77.0.3")
    good = connections.connection(Ends(V4, PORT, client, 5000))
    other = connections.connection(Ends(ip_address("10.77.0.99"), PORT, client, 5000))

    async def body(driver: Reconnect, published: list[bytes]) -> None:
        await driver.heard(connections.encode(ClientList(1, (good,), 1)))
        for garbage in (b"", b"nfsha", connections.encode(ClientList(2, (good, other), 2))):
            await driver.heard(garbage)
        assert driver.refused == 3
        saved = driver.facts()["saved"]
        assert [one["client_ports"] for one in saved["clients"]] == [[5000]]

    run(lan.one, body)


# ------------------------------------------------------------------ both daemons

FROZEN_S = 7.0
"""With the takeover, service is back after 8.3 s; the client would try again after some 14 s."""


def saved_by(lab: Lab, name: str, count: int, within_s: float = 5.0) -> dict[str, Any]:
    """What a node has saved of the other one's clients, once it is so many connections."""
    deadline = time.monotonic() + within_s
    while True:
        told: dict[str, Any] = json.loads(lab.node(name).nfsha("clients", "--json").stdout)
        # Its age is known with the next page, which says that the list is the newest one.
        if told["saved"]["total"] == count and told["saved"]["age_ms"] is not None:
            return told
        assert time.monotonic() < deadline, told
        time.sleep(0.1)


def first_ack_after(lab: Lab, writer: RecordWriter, moment_ms: int) -> int:
    """When the first record was acknowledged after a time, both in ms of the boot clock."""
    deadline = time.monotonic() + 20
    while True:
        ends = [one.ended_ns // 1_000_000 for one in writer.so_far().attempts if one.error is None]
        if (found := next((end for end in ends if end > moment_ms), None)) is not None:
            return found
        assert time.monotonic() < deadline, "the client did not come back"
        time.sleep(0.05)


def test_after_a_crash_and_a_long_outage_the_client_is_back_at_once(lab: Lab) -> None:
    pair = Pair(lab)
    pair.settle()
    writer = lab.write_records()
    writer.wait_acked(5)
    told = saved_by(lab, "b", 1)
    (client,) = told["saved"]["clients"]
    assert (client["client"], client["vip"], client["service"]) == ("10.77.0.10", VIP, "nfs")
    assert told["saved"]["age_ms"] < 2000
    pair.daemon("b").freeze()
    died_ms = pair.now_ms()
    lab.power_cut("a")
    time.sleep(FROZEN_S)
    pair.daemon("b").thaw()
    served = pair.wait_phase("b", "ACTIVE", since_ms=died_ms)
    back_ms = first_ack_after(lab, writer, served.at_ms)
    assert back_ms - served.at_ms < 500 + BUSY_MS
    writer.wait_acked(5)
    assert_only_moved(writer.stop(), served)
    assert served.at_ms - died_ms > 1000 * FROZEN_S


def test_the_server_before_answers_no_client_and_the_way_back_is_short(lab: Lab) -> None:
    pair = Pair(lab)
    pair.settle()
    writer = lab.write_records()
    writer.wait_acked(5)
    saved_by(lab, "b", 1)
    cut_ms = pair.now_ms()
    lab.cut("a")
    pair.wait_phase("a", "ISOLATED", since_ms=cut_ms)
    there = pair.wait_phase("b", "ACTIVE", since_ms=cut_ms)
    assert first_ack_after(lab, writer, there.at_ms) - there.at_ms < 500 + BUSY_MS
    left = json.loads(lab.a.nfsha("clients", "--json").stdout)
    assert left["ended"] == 1
    sockets = lab.a.run("ss", "-Htn", "src", VIP).stdout
    assert sockets == ""
    lab.heal()
    pair.wait_phase("a", "PASSIVE", since_ms=there.at_ms)
    saved_by(lab, "a", 1)
    died_ms = pair.now_ms()
    lab.power_cut("b")
    again = pair.wait_phase("a", "ACTIVE", since_ms=died_ms)
    assert first_ack_after(lab, writer, again.at_ms) - again.at_ms < 500 + BUSY_MS
    writer.stop()
    # Only the new server ever reset the client: what the old one said when it ended was dropped.
    seen = lab.look()
    resets = seen.refusals(VIP, cut_ms * 1_000_000, again.at_ms * 1_000_000)
    assert {one.node for one in resets} == {"b"}
    replies = seen.replies(VIP, there.at_ms * 1_000_000, again.at_ms * 1_000_000)
    assert {one.node for one in replies} == {"b"}
    assert seen.address_overlap_ms(VIP) == 0

"""A yard for the freeze: a node with servers on every guarded port, a client, and the peer.

    client e0 ---- c0 node p0 ---- e0 peer

The servers echo, on every address of the node, by TCP and UDP. What reached a UDP server and what
left the node towards the client is on record, so a test need not trust an answer that is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Protocol, TypeVar

from nfsha.vip.freeze import DEFAULT_PORTS, Guarded
from nfsha.vip.rtnetlink import Vip
from tests.netns.namespaces import Namespace, connect, inside, namespaces

VIPS: tuple[Vip, ...] = (
    IPv4Address("10.91.1.100"),
    IPv4Address("10.91.1.101"),
    IPv6Address("fd91:1::100"),
)
OWN: tuple[Vip, ...] = (
    IPv4Address("10.91.1.1"),
    IPv4Address("10.91.2.1"),
    IPv6Address("fd91:1::1"),
    IPv6Address("fd91:2::1"),
)
PEERS: tuple[Vip, ...] = (IPv4Address("10.91.2.2"), IPv6Address("fd91:2::2"))
LOOPBACK: tuple[Vip, ...] = (IPv4Address("127.0.0.1"), IPv6Address("::1"))
GUARDED = Guarded(VIPS, PEERS, DEFAULT_PORTS)
PORTS = tuple(GUARDED.port_names())
UNGUARDED = 7777
_WINDOW_S = 0.7  # below the first retransmission of a SYN, so each probe is one packet
_PACKET_ALL = 0x0003  # ETH_P_ALL


class Shuttable(Protocol):
    """A lease, whichever firewall carries it."""

    def shut(self) -> None:
        """Closes its sockets."""


_Lease = TypeVar("_Lease", bound=Shuttable)


def play(
    node: Namespace, make: Callable[[], _Lease], body: Callable[[_Lease], Awaitable[None]]
) -> None:
    """Makes a lease in the node, hands it to the body, and shuts it whatever happens."""

    async def start() -> None:
        lease = make()
        try:
            await body(lease)
        finally:
            lease.shut()

    with inside(node):
        asyncio.run(start())


def boottime_ms() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


@dataclass(frozen=True)
class Probe:
    """One attempt: `tcp` or `udp`, to an address and a port."""

    protocol: str
    address: Vip
    port: int


def every(addresses: Iterable[Vip], ports: Iterable[int] = PORTS) -> list[Probe]:
    listed = list(ports)
    return [
        Probe(protocol, address, port)
        for address in addresses
        for port in listed
        for protocol in ("tcp", "udp")
    ]


@dataclass
class Servers:
    """Echo servers in a thread of their own; `received` are the datagrams that arrived."""

    node: Namespace
    received: list[bytes] = field(default_factory=list)
    connections: dict[tuple[str, int], socket.socket] = field(default_factory=dict)
    udp: dict[tuple[str, int], socket.socket] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._stop, self._stopped = socket.socketpair()
        self._selector.register(self._stopped, selectors.EVENT_READ, "stop")
        with inside(self.node):
            for probe in every([*OWN, *VIPS, *LOOPBACK], [*PORTS, UNGUARDED]):
                self._serve(probe)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def shut(self) -> None:
        self._stop.send(b"x")
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._stop.close()
        self._selector.close()

    def _serve(self, probe: Probe) -> None:
        server = _socket(probe)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((str(probe.address), probe.port))
        if probe.protocol == "tcp":
            server.listen(64)
        else:
            self.udp[str(probe.address), probe.port] = server
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ, probe.protocol)

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                assert isinstance(key.fileobj, socket.socket)
                if key.data == "stop":
                    return
                self._turn(key.fileobj, key.data)

    def _turn(self, ready: socket.socket, kind: str) -> None:
        if kind == "tcp":
            connection, client = ready.accept()
            connection.setblocking(False)
            self.connections[client[0], client[1]] = connection
            self._selector.register(connection, selectors.EVENT_READ, "connection")
        elif kind == "udp":
            data, client = ready.recvfrom(65535)
            self.received.append(data)
            with contextlib.suppress(PermissionError):  # what the firewall drops on its way out
                ready.sendto(data, client)
        else:
            self._echo(ready)

    def _echo(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(65535)
        except ConnectionError:
            data = b""
        if data:
            connection.send(data)
        else:
            self._selector.unregister(connection)
            connection.close()


class Capture:
    """All packets on the client's link that left a guarded port of the node."""

    def __init__(self, client: Namespace) -> None:
        with inside(client):
            self._socket = socket.socket(
                socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_PACKET_ALL)
            )
            self._socket.bind(("e0", _PACKET_ALL))
        self._socket.setblocking(False)

    def take(self) -> list[tuple[str, int]]:
        """Source address and port of each such packet since the last call."""
        found: list[tuple[str, int]] = []
        while True:
            try:
                packet, (_, _, direction, *_) = self._socket.recvfrom(65535)
            except BlockingIOError:
                return found
            source = _source(packet)
            if direction != socket.PACKET_OUTGOING and source and source[1] in PORTS:
                found.append(source)

    def shut(self) -> None:
        self._socket.close()


@dataclass
class Yard:
    """The three namespaces and what runs in them."""

    node: Namespace
    client: Namespace
    peer: Namespace
    servers: Servers
    capture: Capture

    def outcomes(self, source: Namespace, probes: Iterable[Probe]) -> dict[Probe, str]:
        """Tries all at the same time: `answer`, `refused` or `silence` for each."""
        waiting: dict[socket.socket, Probe] = {}
        results: dict[Probe, str] = {}
        with inside(source), selectors.DefaultSelector() as selector:
            for probe in probes:
                waiting[attempt := _attempt(probe)] = probe
                mask = selectors.EVENT_WRITE if probe.protocol == "tcp" else selectors.EVENT_READ
                selector.register(attempt, mask)
            until_s = time.monotonic() + _WINDOW_S
            while waiting and (left_s := until_s - time.monotonic()) > 0:
                for key, _ in selector.select(left_s):
                    assert isinstance(key.fileobj, socket.socket)
                    selector.unregister(key.fileobj)
                    results[waiting.pop(key.fileobj)] = _result(key.fileobj)
            for attempt, probe in waiting.items():
                results[probe] = "silence"
                attempt.close()
        return results

    def answers(self, source: Namespace, probes: Iterable[Probe]) -> set[str]:
        """The different outcomes among the probes."""
        return set(self.outcomes(source, probes).values())

    def connected(self, address: Vip, port: int) -> socket.socket:
        """A TCP connection of the client that has proved itself by one echo."""
        with inside(self.client):
            connection = _socket(Probe("tcp", address, port))
        connection.settimeout(5)
        connection.connect((str(address), port))
        connection.sendall(b"hello")
        assert connection.recv(16) == b"hello"
        return connection


@contextlib.contextmanager
def yard() -> Iterator[Yard]:
    """Builds the yard and takes it down again."""
    with (
        namespaces("node", "client", "peer") as (node, client, peer),
        contextlib.ExitStack() as end,
    ):
        connect(node, "c0", client, "e0")
        connect(node, "p0", peer, "e0")
        for space, link, net, host in (
            (node, "c0", 1, 1),
            (client, "e0", 1, 2),
            (node, "p0", 2, 1),
            (peer, "e0", 2, 2),
        ):
            space.ip("addr", "add", f"10.91.{net}.{host}/24", "dev", link)
            space.ip("addr", "add", f"fd91:{net}::{host}/64", "dev", link, "nodad")
        for vip in VIPS:
            flags = ["nodad"] if vip.version == 6 else []
            node.ip("addr", "add", f"{vip}/{vip.max_prefixlen}", "dev", "c0", *flags)
        client.ip("route", "add", "10.91.2.0/24", "via", "10.91.1.1")
        client.ip("route", "add", "fd91:2::/64", "via", "fd91:1::1")
        peer.ip("route", "add", "10.91.1.0/24", "via", "10.91.2.1")
        peer.ip("route", "add", "fd91:1::/64", "via", "fd91:2::1")
        servers = Servers(node)
        end.callback(servers.shut)
        capture = Capture(client)
        end.callback(capture.shut)
        yield Yard(node, client, peer, servers, capture)


def _socket(probe: Probe) -> socket.socket:
    family = socket.AF_INET if probe.address.version == 4 else socket.AF_INET6
    kind = socket.SOCK_STREAM if probe.protocol == "tcp" else socket.SOCK_DGRAM
    return socket.socket(family, kind)


def _attempt(probe: Probe) -> socket.socket:
    attempt = _socket(probe)
    attempt.setblocking(False)
    attempt.connect_ex((str(probe.address), probe.port))
    if probe.protocol == "udp":
        attempt.send(b"probe")
    return attempt


def _result(attempt: socket.socket) -> str:
    with attempt:
        if attempt.type == socket.SOCK_STREAM:
            failed = attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            return "refused" if failed else "answer"
        try:
            attempt.recv(16)
        except OSError:
            return "refused"
        return "answer"


def _source(packet: bytes) -> tuple[str, int] | None:
    kind, body = packet[12:14], packet[14:]
    if kind == b"\x08\x00" and body[9] in (6, 17):
        header = (body[0] & 15) * 4
        return str(ip_address(body[12:16])), struct.unpack_from("!H", body, header)[0]
    if kind == b"\x86\xdd" and body[6] in (6, 17):
        return str(ip_address(body[8:24])), struct.unpack_from("!H", body, 40)[0]
    return None

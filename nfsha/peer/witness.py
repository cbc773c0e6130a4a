"""The reachability witness: does the gateway, or a listed host, answer this node?

An answer shows that this node is not cut off. It says nothing about the other node, and what it is
worth is decided by the core. Asks by ICMP echo, and those on the link also by ARP or neighbour
solicitation, since many gateways answer no ping. Nothing blocks, and no process is started.

An answer is dated by the sending of what it answers, and counts only from the address that was
asked. An echo also has to bring back a random token. ARP and neighbour advertisements name no
request: each one is taken for the answer to the oldest request that is still open, so that its date
errs to the old side, and a request is open for `neighbour_window_ms` only, or one lost answer would
make all later ones look old. They can be forged by a machine on the same link; an echo can be only
by one that sees the requests.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import secrets
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address, ip_address

from nfsha.peer import probes
from nfsha.peer.limited_log import LimitedLog
from nfsha.peer.routes import IPAddress, Path, RouteSocket

GATEWAY = "gateway"
"""The name under which answers of the default gateway are reported."""

RESOLVE_EVERY_S = 3.0
"""How often routes and the interface are looked at again while all witnesses can be asked."""

RESOLVE_AGAIN_S = 1.0
"""The same while one of them cannot."""

ECHO_PATIENCE_MS = 2000
"""An echo that takes longer tells nothing that is still of use."""

DRAIN_LIMIT = 64
"""Most packets taken from one socket at a time."""

_OPEN_ECHOES_MAX = 2048  # 18 addresses, 20 rounds a second, 2 seconds: 720
_BUFFER_BYTES = 2048
_RECEIVE_BUFFER_BYTES = 128 * 1024
_SIOCGIFHWADDR = 0x8927  # netdevice(7)
_IFREQ_BYTES = 40
_ARPHRD_ETHER = 1
_ETH_P_ARP = 0x0806
_BROADCAST = b"\xff" * 6
_SOLICITATION_OPTIONS = [
    (socket.IPPROTO_IPV6, socket.IPV6_HOPLIMIT, struct.pack("=i", probes.HOP_LIMIT))
]


class WitnessError(Exception):
    """The witness cannot be asked on this machine at all; the message says why."""


@dataclass(slots=True)
class WitnessCounters:
    """What one witness was asked and answered since the start."""

    address: str | None = None
    """The address asked now; None while the gateway is not known or a host has no path."""
    asked: int = 0
    answered_echo: int = 0
    answered_neighbour: int = 0
    errors: int = 0
    last_answer_ms: int | None = None
    """When the newest answer was taken from its socket (not the date of its request)."""


@dataclass(slots=True)
class _Target:
    """An address to ask now."""

    name: str
    address: IPAddress
    path: Path
    open_ms: deque[int] = field(default_factory=lambda: deque(maxlen=64))
    """When the neighbour requests were sent that have no answer yet, oldest first."""


@dataclass(frozen=True, slots=True)
class _Echo:
    """An echo request on its way."""

    target: _Target
    token: bytes
    sent_ms: int


@dataclass(frozen=True, slots=True)
class _Sockets:
    """The sockets on one incarnation of the interface."""

    index: int
    arp: socket.socket
    icmp: socket.socket
    icmp6: socket.socket | None
    """None on a machine without IPv6."""

    def each(self) -> list[socket.socket]:
        return [each for each in (self.arp, self.icmp, self.icmp6) if each is not None]


class Witness:
    """Asks all witnesses of this node over one interface, and reports who answers."""

    def __init__(
        self,
        interface: str,
        hosts: Sequence[str | IPAddress],
        gateway: bool,
        answered: Callable[[str, int], None],
        clock_ms: Callable[[], int],
        *,
        neighbour_window_ms: int = 200,
    ) -> None:
        """Takes whom to ask; opens nothing before `start`.

        `hosts` are numeric addresses, each reported by its own text; `gateway` asks those of the
        default routes too, of both families, as `GATEWAY`. `answered(name, sent_ms)` is called from
        the loop or from `drain`; one request can be answered by echo and as a neighbour, so twice.
        `neighbour_window_ms` bounds both how old an ARP answer can look and how late a true one can
        be: a third of the hold time is right. Raises ValueError for a host that is no address.
        """
        self._interface = interface
        self._hosts = [ip_address(str(host)) for host in hosts]
        self._gateway = gateway
        self._answered = answered
        self._clock_ms = clock_ms
        self._neighbour_window_ms = neighbour_window_ms
        self._log = LimitedLog(logging.getLogger(__name__), clock_ms)
        self._routes: RouteSocket | None = None
        self._sockets: _Sockets | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._targets: list[_Target] = []
        self._echoes: dict[int, _Echo] = {}
        self._identity = secrets.randbits(16)
        self._sequence = secrets.randbits(16)
        names = [str(host) for host in self._hosts] + [GATEWAY] * gateway
        self._counters = {name: WitnessCounters() for name in names}
        self._unasked = 0

    async def start(self) -> None:
        """Opens the sockets and looks up whom to ask. A missing interface or route is waited for.

        Raises WitnessError when this process may not open such sockets.
        """
        try:
            self._routes = RouteSocket()
            await self._resolve(self._routes)
        except PermissionError as error:
            self.close()
            raise WitnessError(f"witness: needs CAP_NET_RAW: {error.strerror}") from error
        except OSError as error:
            self.close()
            raise WitnessError(f"witness: {error.strerror}") from error
        self._keeper = asyncio.create_task(self._keep(self._routes))

    def ask(self) -> None:
        """Sends one round to all witnesses by all methods. Failures are counted, never raised."""
        sockets = self._sockets
        if sockets is None:
            return
        self._forget_old_echoes()
        mac = self._mac(sockets)
        for target in self._targets:
            self._counters[target.name].asked += 1
            try:
                self._send_echo(sockets, target)
            except OSError as error:
                self._failed(target, error)
            try:
                if mac is not None and target.path.on_link:
                    self._send_neighbour(sockets, target, mac)
            except OSError as error:
                self._failed(target, error)

    def drain(self) -> None:
        """Takes the answers that have arrived, before the loop comes to it."""
        sockets = self._sockets
        if sockets is not None:
            self._drain_arp(sockets.arp)
            self._drain_icmp(sockets.icmp)
            if sockets.icmp6 is not None:
                self._drain_icmp6(sockets.icmp6)

    def addresses(self) -> tuple[IPAddress, ...]:
        """The addresses that are asked now: the gateway's too, as far as it is known."""
        return tuple(target.address for target in self._targets)

    def counters(self) -> dict[str, WitnessCounters]:
        """Returns a copy of the counters of each witness, by its name."""
        return {name: replace(counters) for name, counters in self._counters.items()}

    @property
    def not_asked_for(self) -> int:
        """How many packets came through the filters but answered nothing.

        Late, doubled or forged ones, and what neighbours told the kernel at its own asking.
        """
        return self._unasked

    def close(self) -> None:
        """Closes everything. Idempotent."""
        if self._keeper is not None:
            self._keeper.cancel()
            self._keeper = None
        self._close_sockets()
        if self._routes is not None:
            self._routes.close()
            self._routes = None

    # ------------------------------------------------------------- whom to ask

    async def _keep(self, routes: RouteSocket) -> None:
        while True:
            whole = all(counters.address is not None for counters in self._counters.values())
            await asyncio.sleep(RESOLVE_EVERY_S if whole else RESOLVE_AGAIN_S)
            try:
                await self._resolve(routes)
            except OSError as error:
                self._log.warning("witness, set-up", str(error.strerror))

    async def _resolve(self, routes: RouteSocket) -> None:
        """Looks up the interface and all paths. Raises OSError for what should not fail."""
        try:
            index = socket.if_nametoindex(self._interface)
        except OSError:
            self._log.warning("witness, interface", f"there is no interface {self._interface}")
            self._close_sockets()
            self._set_targets([])
            return
        if self._sockets is None or self._sockets.index != index:
            self._close_sockets()
            self._sockets = self._open_sockets(index)
        self._set_targets(await self._look_up(routes, index))

    async def _look_up(self, routes: RouteSocket, index: int) -> list[_Target]:
        wanted = [(str(host), host) for host in self._hosts]
        if self._gateway:
            families = (socket.AF_INET, socket.AF_INET6)
            gateways = [await routes.default_gateway(family, index) for family in families]
            # One gateway can serve both families.
            found = dict.fromkeys(each for each in gateways if each is not None)
            wanted += [(GATEWAY, each) for each in found]
            if not found:
                text = f"there is no default route over {self._interface}"
                self._log.warning("witness, gateway", text)
        targets = []
        for name, address in wanted:
            path = await routes.path(address, index)
            if path is None:
                text = f"no way over {self._interface}, or this machine's own address"
                self._log.warning(f"witness {name}, {address}", text)
            else:
                targets.append(_Target(name, address, path))
        return targets

    def _set_targets(self, targets: list[_Target]) -> None:
        """Takes the new list; who was on the old one keeps its open requests."""
        old = {(target.name, target.address): target for target in self._targets}
        for target in targets:
            if (target.name, target.address) in old:
                target.open_ms = old[target.name, target.address].open_ms
        self._targets = targets
        for name, counters in self._counters.items():
            now = [str(target.address) for target in targets if target.name == name]
            counters.address = ", ".join(now) or None

    # ------------------------------------------------------------- sockets

    def _open_sockets(self, index: int) -> _Sockets:
        opened: list[socket.socket] = []
        try:
            # Protocol 0 receives nothing until the filter is there; bind(2) then names ARP.
            arp = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, 0)
            opened.append(arp)
            probes.attach(arp, probes.arp_filter())
            arp.bind((self._interface, _ETH_P_ARP))
            icmp = self._open_raw(socket.AF_INET, socket.IPPROTO_ICMP, opened)
            probes.attach(icmp, probes.echo_filter(self._identity))
            icmp6 = self._open_icmp6(opened)
        except OSError:
            for each in opened:
                each.close()
            raise
        loop = asyncio.get_running_loop()
        loop.add_reader(arp, self._drain_arp, arp)
        loop.add_reader(icmp, self._drain_icmp, icmp)
        if icmp6 is not None:
            loop.add_reader(icmp6, self._drain_icmp6, icmp6)
        return _Sockets(index, arp, icmp, icmp6)

    def _open_icmp6(self, opened: list[socket.socket]) -> socket.socket | None:
        try:
            icmp6 = self._open_raw(socket.AF_INET6, socket.IPPROTO_ICMPV6, opened)
        except OSError as error:
            if error.errno in (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT):
                return None
            raise
        probes.attach(icmp6, probes.icmp6_filter(self._identity))
        icmp6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
        icmp6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 0)
        return icmp6

    def _open_raw(self, family: int, protocol: int, opened: list[socket.socket]) -> socket.socket:
        raw = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
        opened.append(raw)
        device = os.fsencode(self._interface) + b"\0"
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
        return raw

    def _close_sockets(self) -> None:
        if self._sockets is not None:
            loop = asyncio.get_running_loop()
            for each in self._sockets.each():
                loop.remove_reader(each)
                each.close()
            self._sockets = None

    def _mac(self, sockets: _Sockets) -> bytes | None:
        """The interface's hardware address of this moment; None if it has none of Ethernet."""
        request = struct.pack("16s24x", os.fsencode(self._interface))
        try:
            answer = fcntl.ioctl(sockets.icmp, _SIOCGIFHWADDR, request)
        except OSError:
            return None
        (kind,) = struct.unpack_from("=H", answer, 16)
        return answer[18:24] if kind == _ARPHRD_ETHER else None

    # ------------------------------------------------------------- asking

    def _failed(self, target: _Target, error: OSError) -> None:
        self._counters[target.name].errors += 1
        text = f"cannot be asked at {target.address}: {error.strerror}"
        self._log.warning(f"witness {target.name}, error", text)

    def _send_echo(self, sockets: _Sockets, target: _Target) -> None:
        version = target.address.version
        sender = sockets.icmp if version == 4 else sockets.icmp6
        if sender is None:
            return
        self._sequence = (self._sequence + 1) & 0xFFFF
        token = secrets.token_bytes(probes.TOKEN_BYTES)
        request = probes.echo_request(version, self._identity, self._sequence, token)
        sent_ms = self._clock_ms()  # before sending, so that the date errs to the old side
        sender.sendto(request, self._socket_address(sockets, target.address))
        self._echoes[self._sequence] = _Echo(target, token, sent_ms)

    def _send_neighbour(self, sockets: _Sockets, target: _Target, mac: bytes) -> None:
        sent_ms = self._clock_ms()
        address, source = target.address, target.path.source
        if isinstance(address, IPv6Address):
            if sockets.icmp6 is None:
                return
            group = self._socket_address(sockets, probes.solicited_node(address))
            request = probes.solicitation(mac, address)
            sockets.icmp6.sendmsg([request], _SOLICITATION_OPTIONS, 0, group)
        elif isinstance(source, IPv4Address):
            request = probes.arp_request(mac, source, address)
            destination = (self._interface, _ETH_P_ARP, 0, 0, _BROADCAST)
            sockets.arp.sendto(request, destination)
        else:
            return
        self._close_old_requests(target, sent_ms)
        target.open_ms.append(sent_ms)

    def _socket_address(
        self, sockets: _Sockets, address: IPAddress
    ) -> tuple[str, int] | tuple[str, int, int, int]:
        if address.version == 4:
            return str(address), 0
        return str(address), 0, 0, sockets.index

    # ------------------------------------------------------------- answers

    def _drain_arp(self, receiver: socket.socket) -> None:
        for _ in range(DRAIN_LIMIT):
            data = self._receive(receiver)
            if data is None:
                return
            reply = probes.parse_arp_reply(data[0])
            if reply is not None:
                self._take_neighbour(reply.sender, reply)

    def _drain_icmp(self, receiver: socket.socket) -> None:
        for _ in range(DRAIN_LIMIT):
            data = self._receive(receiver)
            if data is None:
                return
            self._take_echo(probes.parse_echo_reply(4, data[0], self._identity), data[2])

    def _drain_icmp6(self, receiver: socket.socket) -> None:
        for _ in range(DRAIN_LIMIT):
            data = self._receive(receiver)
            if data is None:
                return
            payload, hop_limit, source = data
            echo = probes.parse_echo_reply(6, payload, self._identity)
            speaks_for = probes.parse_advertisement(payload)
            if echo is not None or speaks_for is None:
                self._take_echo(echo, source)
            elif hop_limit == probes.HOP_LIMIT and speaks_for == IPv6Address(source):
                self._take_neighbour(speaks_for, None)

    def _receive(self, receiver: socket.socket) -> tuple[bytes, int, str] | None:
        """One packet with its hop limit (IPv6) and source; None when there is none."""
        try:
            data, ancillary, _, source = receiver.recvmsg(_BUFFER_BYTES, socket.CMSG_SPACE(4))
        except BlockingIOError:
            return None
        except OSError as error:  # ENETDOWN, once, when the interface goes down (packet(7))
            self._log.warning("witness, error", f"cannot receive: {error.strerror}")
            return None
        hop_limit = 0
        for level, kind, value in ancillary:
            if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_HOPLIMIT):
                (hop_limit,) = struct.unpack("=i", value[:4])
        return data, hop_limit, source[0]

    def _take_echo(self, reply: probes.EchoReply | None, source: str) -> None:
        echo = self._echoes.get(reply.sequence) if reply is not None else None
        if (
            reply is None
            or echo is None
            or ip_address(source) != echo.target.address
            or not secrets.compare_digest(reply.token, echo.token)
        ):
            self._unasked += 1
            return
        del self._echoes[reply.sequence]
        self._counters[echo.target.name].answered_echo += 1
        self._report(echo.target, echo.sent_ms)

    def _take_neighbour(self, sender: IPAddress, reply: probes.ArpReply | None) -> None:
        now_ms = self._clock_ms()
        taken = False
        for target in self._targets:
            if target.address != sender:
                continue
            if reply is not None and reply.to != target.path.source:
                continue
            self._close_old_requests(target, now_ms)
            if target.open_ms:
                taken = True
                self._counters[target.name].answered_neighbour += 1
                self._report(target, target.open_ms.popleft())
        self._unasked += not taken

    def _report(self, target: _Target, sent_ms: int) -> None:
        self._counters[target.name].last_answer_ms = self._clock_ms()
        self._answered(target.name, sent_ms)

    def _close_old_requests(self, target: _Target, now_ms: int) -> None:
        while target.open_ms and now_ms - target.open_ms[0] >= self._neighbour_window_ms:
            target.open_ms.popleft()

    def _forget_old_echoes(self) -> None:
        """Oldest first, as they were put in: stops at the first one that is young enough."""
        oldest_ms = self._clock_ms() - ECHO_PATIENCE_MS
        while self._echoes:
            sequence = next(iter(self._echoes))
            too_old = self._echoes[sequence].sent_ms <= oldest_ms
            if not too_old and len(self._echoes) <= _OPEN_ECHOES_MAX:
                return
            del self._echoes[sequence]

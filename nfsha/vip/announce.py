"""Tells the network where the VIPs are, hears who else claims them, and asks who answers for them.

Gratuitous ARP and unsolicited neighbour advertisements, by packet sockets on the VIPs' interface.
It must not decide anything, touch an address, wait for the network in place of the loop, or start
a process. The kernel never answers its own machine's questions here: a survey says nothing of an
address that this machine holds itself.
"""

import asyncio
import ctypes
import errno
import socket
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from typing import Final

from nfsha.vip import packets
from nfsha.vip.packets import Heard
from nfsha.vip.rtnetlink import AddressEntry, RouteSocket, Vip, VipError, VipRefused

# When an announcement is sent, in ms from its start: one frame may be lost, or come before a
# switch has opened its port.
ANNOUNCE_AT_MS: Final = (0, 100, 300, 1000, 3000)

_FRAMES_PER_WAKE_MAX: Final = 64
_FRAMES_PER_LOOK_MAX: Final = 1024
_CLAIM_EVERY_MS: Final = 1000
_CLAIMS_REMEMBERED_MAX: Final = 64
_OTHERS_MAX: Final = 64
_REBIND_S: Final = 1.0
_ARPHRD_ETHER: Final = 1  # linux/if_arp.h
_SO_ATTACH_FILTER: Final = 26  # asm-generic/socket.h
_PACKET_HOST: Final = 0  # linux/if_packet.h: to our link address; 1 and 2 are groups of ours
_PACKET_MULTICAST: Final = 2
_NOT_ANY: Final = IPv4Address(0)


@dataclass(frozen=True, slots=True)
class Survey:
    """Who answered for the VIPs, and whether silence means anything.

    `answered` holds the link address that answered, for each VIP for which one did. `others` are
    those besides the VIPs who answered us on the same interface in the same time. `rounds` counts
    the rounds of which every frame went out. `heard_other` is true if there are such others and
    no round is missing: only then does silence count. Times are ms of the given clock.
    """

    answered: Mapping[Vip, str]
    others: frozenset[Vip]
    heard_other: bool
    rounds: int
    started_ms: int
    ended_ms: int


class Announcer:
    """Announces the VIPs, watches for others who do, and surveys who answers for them.

    `claimed` is called on the loop's thread with a VIP and the link address (as text) of another
    machine that says it has it, at most once a second for each pair; also while that machine is
    the rightful holder. It must not block. `allowed` is asked before each frame of a schedule goes
    out: may this node still say that it has the VIPs?
    """

    def __init__(
        self,
        interface: str,
        vips: Sequence[Vip],
        clock_ms: Callable[[], int],
        claimed: Callable[[Vip, str], None],
        allowed: Callable[[], bool],
    ) -> None:
        if not 1 <= len(vips) <= packets.FILTER_VIPS_MAX:
            raise ValueError(f"{len(vips)} VIPs: 1 to {packets.FILTER_VIPS_MAX} can be watched")
        self._interface = interface
        self._vips = tuple(vips)
        self._clock_ms = clock_ms
        self._claimed = claimed
        self._allowed = allowed
        self._ports: dict[int, _Port] = {}
        self._kernel: RouteSocket | None = None
        self._pending: list[asyncio.TimerHandle] = []
        self._rebind: asyncio.TimerHandle | None = None
        self._listening: list[_Listening] = []
        self._claims_ms: dict[tuple[Vip, bytes], int] = {}
        self._trouble: str | None = None

    @property
    def trouble(self) -> str | None:
        """Why the newest frame could not be sent or awaited; None while all is well."""
        return self._trouble

    @property
    def link_address(self) -> str:
        """This node's own link address on the interface, as a survey of the other node shows it."""
        return packets.printable_mac(self._mac())

    async def start(self) -> None:
        """Opens the sockets and begins to watch.

        Raises VipRefused if the interface does not exist or is not Ethernet, VipError without
        the right to open packet sockets (CAP_NET_RAW).
        """
        if self._kernel is not None:
            raise RuntimeError("started twice")
        filters = {packets.ETH_P_ARP: packets.arp_filter(_only_v4(self._vips))}
        if any(vip.version == 6 for vip in self._vips):
            filters[packets.ETH_P_IPV6] = packets.advertisement_filter()
        try:
            self._kernel = RouteSocket()
            await self._kernel.open()
            for kind, steps in filters.items():
                self._ports[kind] = _Port(self._interface, kind, steps)
        except OSError as error:
            self.close()
            raise _not_opened(self._interface, error) from error
        except VipError:
            self.close()
            raise
        for port in self._ports.values():
            asyncio.get_running_loop().add_reader(port, self._on_readable, port)

    def close(self) -> None:
        """Stops announcing and watching, and closes the sockets. Idempotent."""
        self.silence()
        if self._rebind is not None:
            self._rebind.cancel()
            self._rebind = None
        for port in self._ports.values():
            asyncio.get_running_loop().remove_reader(port)
            port.close()
        self._ports.clear()
        if self._kernel is not None:
            self._kernel.close()
            self._kernel = None

    def announce(self) -> None:
        """Announces all VIPs now and by the schedule; an announcement under way begins anew.

        Never raises for the network's sake: what cannot be sent shows in `trouble`.
        """
        self.silence()
        loop = asyncio.get_running_loop()
        self._announce_once()
        self._pending = [
            loop.call_later(at_ms / 1000, self._announce_once) for at_ms in ANNOUNCE_AT_MS[1:]
        ]

    def silence(self) -> None:
        """Announces nothing any more. Idempotent."""
        for handle in self._pending:
            handle.cancel()
        self._pending = []

    async def survey(
        self, vips: Iterable[Vip], others: Iterable[Vip], rounds: int = 3, over_ms: int = 300
    ) -> Survey:
        """Asks `rounds` times, spread over `over_ms`, who has the VIPs, and listens all the time.

        `others` (the gateway, witnesses, the peer's own addresses; the first 64 count) are asked
        in the same breath: while none of them answers, silence means nothing. Without an IPv6 VIP
        among those given to the constructor, IPv6 ones are not asked. Never raises for the
        network's sake.
        """
        if rounds < 1 or over_ms < rounds:
            raise ValueError(f"{rounds} rounds over {over_ms} ms")
        wanted = frozenset(vips)
        asked = [other for other in others if other not in wanted][:_OTHERS_MAX]
        listening = _Listening(wanted)
        self._listening.append(listening)
        whole_rounds = 0
        try:
            questions = await self._questions([*wanted, *asked])
            started_ms = self._clock_ms()
            for done in range(1, rounds + 1):
                whole_rounds += self._send_all(questions)
                until_ms = started_ms + over_ms * done // rounds
                await asyncio.sleep(max(0, until_ms - self._clock_ms()) / 1000)
            # What has arrived counts, however late this loop has come to read it.
            for port in self._ports.values():
                self._read(port, _FRAMES_PER_LOOK_MAX)
        finally:
            self._listening.remove(listening)
        others_heard = frozenset(listening.others)
        heard_other = bool(others_heard) and whole_rounds == rounds
        return Survey(
            listening.answered,
            others_heard,
            heard_other,
            whole_rounds,
            started_ms,
            self._clock_ms(),
        )

    # Sending.

    def _announce_once(self) -> None:
        if not self._allowed():
            # The timer of a schedule that outlived its reason: a process that thaws runs it first.
            self.silence()
            return
        frames: list[tuple[int, bytes]] = []
        mac = self._mac()
        for vip in self._vips:
            if isinstance(vip, IPv4Address):
                pair = packets.arp_announcements(mac, vip)
                frames += [(packets.ETH_P_ARP, frame) for frame in pair]
            else:
                frame = packets.unsolicited_advertisement(mac, vip)
                frames.append((packets.ETH_P_IPV6, frame))
        self._send_all(frames)

    async def _questions(self, targets: Iterable[Vip]) -> list[tuple[int, bytes]]:
        """The frames of one round.

        IPv4 is asked twice: from 0.0.0.0 (RFC 5227: changes no cache, needs no address here), and
        from an address of our own, for switches that let no other sender pass.
        """
        mac, own = self._mac(), await self._own_addresses()
        frames: list[tuple[int, bytes]] = []
        for target in targets:
            if isinstance(target, IPv4Address):
                for sender in [_NOT_ANY, *_near(own, target)]:
                    question = packets.arp_request(mac, sender, target)
                    frames.append((packets.ETH_P_ARP, question))
            elif packets.ETH_P_IPV6 in self._ports:
                source = _source_v6(own)
                if source is None:  # counts as a frame that cannot be sent
                    self._trouble = f"{self._interface} has no IPv6 address to ask from"
                    frames.append((packets.ETH_P_IPV6, b""))
                else:
                    frame = packets.solicitation(mac, source, target)
                    frames.append((packets.ETH_P_IPV6, frame))
        return frames

    async def _own_addresses(self) -> list[AddressEntry]:
        if self._kernel is None:
            raise RuntimeError("not started")
        try:
            link = await self._kernel.link(self._interface)
            entries = await self._kernel.addresses(link.index) if link is not None else []
        except VipError as error:
            self._trouble = str(error)
            return []
        return [e for e in entries if e.usable and e.address not in self._vips]

    def _mac(self) -> bytes:
        """Our link address now: a bond may change it. Zeros while the interface is gone."""
        for port in self._ports.values():
            if mac := port.mac():
                return mac
        return bytes(6)

    def _send_all(self, frames: Iterable[tuple[int, bytes]]) -> bool:
        """Sends what can be sent; True if that was everything."""
        whole = True
        for kind, frame in frames:
            try:
                if not frame or not self._ports[kind].send(frame):
                    whole = False
            except OSError as error:
                self._on_trouble(error)
                whole = False
        if whole:
            self._trouble = None
        return whole

    # Hearing.

    def _on_readable(self, port: "_Port") -> None:
        self._read(port, _FRAMES_PER_WAKE_MAX)

    def _read(self, port: "_Port", limit: int) -> None:
        mac = port.mac()
        for _ in range(limit):
            try:
                data, packet_type = port.receive()
            except BlockingIOError:
                return
            except OSError as error:
                self._on_trouble(error)
                return
            said = packets.heard(data)
            if said is not None and said.mac != mac and packet_type <= _PACKET_MULTICAST:
                self._on_said(said, packet_type == _PACKET_HOST)

    def _on_said(self, said: Heard, to_us: bool) -> None:
        for listening in self._listening:
            listening.hear(said, to_us)
        if said.address not in self._vips:
            return
        now_ms = self._clock_ms()
        last_ms = self._claims_ms.get((said.address, said.mac))
        if last_ms is not None and now_ms - last_ms < _CLAIM_EVERY_MS:
            return
        if len(self._claims_ms) >= _CLAIMS_REMEMBERED_MAX:
            fresh = {k: at for k, at in self._claims_ms.items() if now_ms - at < _CLAIM_EVERY_MS}
            self._claims_ms = fresh
            if len(fresh) >= _CLAIMS_REMEMBERED_MAX:  # a flood of made-up senders
                return
        self._claims_ms[said.address, said.mac] = now_ms
        self._claimed(said.address, packets.printable_mac(said.mac))

    # The interface down, up, gone and back.

    def _on_trouble(self, error: OSError) -> None:
        self._trouble = f"{self._interface}: {error.strerror}"
        if self._rebind is None and error.errno != errno.ENOBUFS:
            loop = asyncio.get_running_loop()
            self._rebind = loop.call_later(_REBIND_S, self._bind_again)

    def _bind_again(self) -> None:
        """A link that went down and up is heard again by itself; one made anew wants this.

        While it is down or gone, each attempt ends in `_on_trouble`, which asks for the next.
        """
        self._rebind = None
        for port in self._ports.values():
            try:
                port.bind()
            except OSError as error:
                self._on_trouble(error)


@dataclass(slots=True)
class _Listening:
    """What has been heard for one survey so far."""

    vips: frozenset[Vip]
    answered: dict[Vip, str] = field(default_factory=dict)
    others: set[Vip] = field(default_factory=set)

    def hear(self, said: Heard, to_us: bool) -> None:
        """Takes in one statement; `to_us`: the frame was sent to our link address alone."""
        if said.address in self.vips:
            self.answered.setdefault(said.address, packets.printable_mac(said.mac))
        elif said.answer and to_us and len(self.others) < _OTHERS_MAX:
            self.others.add(said.address)


class _Port:
    """One packet socket: frames of one EtherType on one interface. Its methods raise OSError."""

    def __init__(self, interface: str, kind: int, steps: bytes) -> None:
        self._interface = interface
        self._kind = kind
        # EtherType 0: deaf until filter and interface are set.
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        try:
            self._socket.setblocking(False)
            self._attach(steps)
            self.bind()
            hardware = self._socket.getsockname()[3]
            if hardware != _ARPHRD_ETHER:
                raise VipRefused(
                    f"{interface} is not Ethernet (hardware type {hardware}), so no VIP can move "
                    "there: name another interface in the configuration"
                )
        except (OSError, VipRefused):
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def bind(self) -> None:
        self._socket.bind((self._interface, self._kind))

    def mac(self) -> bytes:
        """The interface's link address now, empty while it is gone."""
        return bytes(self._socket.getsockname()[4])

    def send(self, frame: bytes) -> bool:
        return self._socket.send(frame) == len(frame)

    def receive(self) -> tuple[bytes, int]:
        """The next frame, cut to what matters, and its packet type."""
        data, origin = self._socket.recvfrom(packets.FRAME_BYTES_MAX)
        return data, origin[2]

    def _attach(self, steps: bytes) -> None:
        """The kernel copies the filter; the buffer needs to live only as long as this call."""
        buffer = ctypes.create_string_buffer(steps, len(steps))
        program = struct.pack("@HP", len(steps) // 8, ctypes.addressof(buffer))  # sock_fprog
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def _only_v4(vips: Iterable[Vip]) -> list[IPv4Address]:
    return [vip for vip in vips if isinstance(vip, IPv4Address)]


def _near(own: Iterable[AddressEntry], target: IPv4Address) -> list[IPv4Address]:
    """The first of our addresses whose network holds the target, if there is one."""
    for entry in own:
        address = entry.address
        if isinstance(address, IPv4Address):
            network = IPv4Network((address, entry.prefixlen), strict=False)
            if target in network:
                return [address]
    return []


def _source_v6(own: Iterable[AddressEntry]) -> IPv6Address | None:
    """Our link-local address, or else any other IPv6 one."""
    addresses = [e.address for e in own if isinstance(e.address, IPv6Address)]
    return min(addresses, key=lambda address: not address.is_link_local, default=None)


def _not_opened(interface: str, error: OSError) -> VipError:
    if error.errno in (errno.ENODEV, errno.ENXIO):
        return VipRefused(
            f"interface {interface} does not exist: "
            "correct its name in the configuration, or create it before nfsha starts"
        )
    if error.errno in (errno.EPERM, errno.EACCES):
        return VipError("no right to send ARP: nfsha needs CAP_NET_RAW; run it as root")
    return VipError(f"no packet socket on {interface}: {error}")

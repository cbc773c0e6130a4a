"""The heartbeat links: UDP sockets over which the two nodes' datagrams go, any number of them.

Carries and counts, and decides nothing: what is replayed or out of date is the core's to know. What
a link cannot send is counted and logged, never raised; the link comes back by itself. Nothing here
blocks, and what a stranger sends costs no more than a look at its address.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv6Address, ip_address

from nfsha.core.model import Datagram
from nfsha.peer.limited_log import LimitedLog
from nfsha.peer.wire import Page, PageKind, Refusal, Refused, page_kind

DRAIN_LIMIT = 64
"""Most datagrams taken from one link at a time: six seconds of a peer, 0.5 ms of forgeries."""

REOPEN_EVERY_MS = 1000
"""The least time between two attempts to open a socket whose interface is gone."""

_DATAGRAM_BUFFER_BYTES = 2048
_RECEIVE_BUFFER_BYTES = 128 * 1024
_DSCP_CS6 = 48 << 2  # network control, RFC 4594 section 3.1; the DSCP is the upper six bits
_PRIORITY_INTERACTIVE = 6  # TC_PRIO_INTERACTIVE of linux/pkt_sched.h, the highest without privilege
_IP_FREEBIND = 15  # linux/in.h; Python has no names for these two
_IPV6_FREEBIND = 78  # linux/in6.h

# What only an operator can change. Anything else may pass by itself.
_SETUP_ERRORS = frozenset({errno.EADDRINUSE, errno.EACCES, errno.EPERM})


class LinkSetupError(Exception):
    """A link that cannot work as it is configured: which one, and why."""


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """One link. Addresses are numeric; both nodes use the same port.

    `local` may be None (any address; then give the interface). With `interface` the link uses that
    one and no other, whatever the routes say. A link-local IPv6 address needs it.
    """

    name: str
    local: str | None
    peer: str
    port: int
    interface: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be a link."""
        peer = ip_address(self.peer)
        if self.local is not None and ip_address(self.local).version != peer.version:
            raise ValueError(f"link {self.name}: {self.local} and {self.peer} are of two families")
        if self.local is None and self.interface is None:
            raise ValueError(f"link {self.name}: needs a local address or an interface")
        if isinstance(peer, IPv6Address) and peer.is_link_local and self.interface is None:
            raise ValueError(f"link {self.name}: {self.peer} is link-local, needs an interface")
        if not 0 < self.port < 65536:
            raise ValueError(f"link {self.name}: port {self.port} is not in 1 to 65535")


@dataclass(slots=True)
class LinkCounters:
    """What one link saw since the start. `received` counts only the peer's heartbeats."""

    sent: int = 0
    received: int = 0
    pages_sent: int = 0
    pages_received: int = 0
    forged: int = 0
    malformed: int = 0
    other_version: int = 0
    own_role: int = 0
    from_stranger: int = 0
    errors: int = 0
    last_heard_ms: int | None = None
    """When the peer's last heartbeat was taken from the socket."""


@dataclass(frozen=True, slots=True)
class _PageRoute:
    """How pages are opened, and who takes them."""

    unseal: Callable[[bytes], Page]
    deliver: Callable[[Page], None]


class Links:
    """All heartbeat links of this node."""

    def __init__(
        self,
        links: Sequence[LinkSpec],
        seal: Callable[[Datagram], bytes],
        open: Callable[[bytes], Datagram],  # noqa: A002 - the counterpart of seal
        deliver: Callable[[str, Datagram, int], None],
        clock_ms: Callable[[], int],
    ) -> None:
        """Takes the links and how to seal and open; nothing is opened before `start`.

        `open` refuses by raising `Refused`. `deliver(link_name, datagram, now_ms)` is called for
        each datagram of the peer, from the loop or from `drain`; it must only take note of it.
        """
        log = LimitedLog(logging.getLogger(__name__), clock_ms)
        self._seal = seal
        self._links = [_Link(spec, open, deliver, clock_ms, log) for spec in links]

    def route_pages(
        self,
        unseal: Callable[[bytes], Page],
        deliver: Callable[[Page], None],
        kind: PageKind = PageKind.FACTS,
    ) -> None:
        """Takes pages of this kind too from now on; before, they are refused as malformed.

        `unseal` refuses by raising `Refused`. `deliver(page)` is called for each page of the peer,
        from the loop or from `drain`, on each link that it came over.
        """
        for link in self._links:
            link.page_routes[kind] = _PageRoute(unseal, deliver)

    async def start(self) -> None:
        """Opens all sockets. An interface or address that is not there yet is waited for.

        Raises LinkSetupError when a port is taken or a permission is missing; then all are closed.
        """
        try:
            for link in self._links:
                link.open()
        except LinkSetupError:
            self.close()
            raise

    def send(self, datagram: Datagram) -> None:
        """Seals the datagram once and sends it on every link. Failures are counted, not raised."""
        sealed = self._seal(datagram)
        for link in self._links:
            link.counters.sent += link.send(sealed)

    def send_page(self, sealed: bytes) -> None:
        """Sends a sealed page on every link. Failures are counted, not raised."""
        for link in self._links:
            link.counters.pages_sent += link.send(sealed)

    def drain(self) -> bool:
        """Takes what has arrived, at most `DRAIN_LIMIT` datagrams per link, and delivers it.

        Returns True when every socket is empty now, False when the limit left something in one.
        """
        emptied = [link.drain() for link in self._links]
        return all(emptied)

    def counters(self) -> dict[str, LinkCounters]:
        """Returns a copy of the counters of each link, by its name."""
        return {link.spec.name: replace(link.counters) for link in self._links}

    def close(self) -> None:
        """Closes all sockets. Idempotent."""
        for link in self._links:
            link.close()


class _Link:
    """One socket, which is made again when its interface is."""

    def __init__(
        self,
        spec: LinkSpec,
        unseal: Callable[[bytes], Datagram],
        deliver: Callable[[str, Datagram, int], None],
        clock_ms: Callable[[], int],
        log: LimitedLog,
    ) -> None:
        self.spec = spec
        self.counters = LinkCounters()
        self.page_routes: dict[PageKind | None, _PageRoute] = {}
        self._unseal = unseal
        self._deliver = deliver
        self._clock_ms = clock_ms
        self._log = log
        self._family = socket.AF_INET if ip_address(spec.peer).version == 4 else socket.AF_INET6
        # As the kernel and recvfrom write it, so that comparing strings is enough.
        packed = socket.inet_pton(self._family, spec.peer)
        self._peer = socket.inet_ntop(self._family, packed)
        self._socket: socket.socket | None = None
        self._destination: tuple[str, int] | tuple[str, int, int, int] = (self._peer, spec.port)
        self._interface_index = 0
        self._reopen_at_ms: int | None = None

    def open(self) -> None:
        """Opens the socket, or notes that it has to be tried again. Raises LinkSetupError."""
        try:
            self._open()
        except OSError as error:
            if error.errno in _SETUP_ERRORS:
                raise LinkSetupError(f"link {self.spec.name}: {self._describe(error)}") from error
            self._retry_later("cannot be opened yet", error)

    def send(self, sealed: bytes) -> bool:
        """Sends on this link and says whether that went; never raises."""
        if self._reopen_at_ms is not None and self._clock_ms() >= self._reopen_at_ms:
            self._reopen()
        if self._socket is None:
            self.counters.errors += 1
            return False
        try:
            self._socket.sendto(sealed, self._destination)
        except OSError as error:
            self._failed("cannot send", error)
            return False
        return True

    def drain(self) -> bool:
        """Takes up to `DRAIN_LIMIT` datagrams; says whether the socket was left empty."""
        for _ in range(DRAIN_LIMIT):
            if self._socket is None:
                return True
            try:
                sealed, source = self._socket.recvfrom(_DATAGRAM_BUFFER_BYTES)
            except BlockingIOError:
                return True
            except OSError as error:
                self._failed("cannot receive", error)
                return True
            self._take(sealed, source[0])
        return False

    def close(self) -> None:
        """Closes the socket and stops listening to it."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def _take(self, sealed: bytes, source: str) -> None:
        if source != self._peer:
            self.counters.from_stranger += 1
            text = f"a datagram from {source}, which is not the peer ({self._peer})"
            self._log.warning(f"link {self.spec.name}, stranger", text)
            return
        try:
            if (route := self.page_routes.get(page_kind(sealed))) is not None:
                page = route.unseal(sealed)
                self.counters.pages_received += 1
                route.deliver(page)
                return
            datagram = self._unseal(sealed)
        except Refused as refused:
            self._count(refused.kind)
            text = f"refused a datagram from {source}: {refused.reason}"
            self._log.warning(f"link {self.spec.name}, {refused.kind}", text)
            return
        now_ms = self._clock_ms()
        self.counters.received += 1
        self.counters.last_heard_ms = now_ms
        self._deliver(self.spec.name, datagram, now_ms)

    def _count(self, refusal: Refusal) -> None:
        match refusal:
            case Refusal.MALFORMED:
                self.counters.malformed += 1
            case Refusal.FORGED:
                self.counters.forged += 1
            case Refusal.OTHER_VERSION:
                self.counters.other_version += 1
            case Refusal.OWN_ROLE:
                self.counters.own_role += 1

    def _open(self) -> None:
        spec = self.spec
        index = socket.if_nametoindex(spec.interface) if spec.interface is not None else 0
        opened = socket.socket(self._family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._set_options(opened)
            if self._family == socket.AF_INET:
                opened.bind((spec.local or "0.0.0.0", spec.port))
                self._destination = (self._peer, spec.port)
            else:
                # The kernel looks at the scope only where an address is link-local.
                opened.bind((spec.local or "::", spec.port, 0, index))
                self._destination = (self._peer, spec.port, 0, index)
            asyncio.get_running_loop().add_reader(opened, self.drain)
        except OSError:
            opened.close()
            raise
        self._socket = opened
        self._interface_index = index
        self._reopen_at_ms = None

    def _set_options(self, opened: socket.socket) -> None:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
        if self.spec.interface is not None:
            device = os.fsencode(self.spec.interface) + b"\0"
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
        # FREEBIND: bind(2) succeeds before the address is there, so it need not be watched for.
        if self._family == socket.AF_INET:
            opened.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
            opened.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, _DSCP_CS6)
        else:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            opened.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, _DSCP_CS6)
        # After IP_TOS, which sets a priority of its own (socket(7)).
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, _PRIORITY_INTERACTIVE)

    def _failed(self, what: str, error: OSError) -> None:
        self.counters.errors += 1
        self._retry_later(what, error)

    def _retry_later(self, what: str, error: OSError) -> None:
        self._log.warning(f"link {self.spec.name}, error", f"{what}: {self._describe(error)}")
        if self._reopen_at_ms is None:
            self._reopen_at_ms = self._clock_ms() + REOPEN_EVERY_MS

    def _reopen(self) -> None:
        """After an error: makes the socket again when its interface is another one than it was.

        A socket bound to an interface goes on being bound to the number of the one that is gone,
        also when a new one bears its name. All other errors pass without a new socket.
        """
        self._reopen_at_ms = None
        if self._socket is not None and not self._interface_changed():
            return
        self.close()
        try:
            self._open()
        except OSError as error:
            self._retry_later("cannot be opened", error)

    def _interface_changed(self) -> bool:
        if self.spec.interface is None:
            return False
        try:
            return socket.if_nametoindex(self.spec.interface) != self._interface_index
        except OSError:
            return True

    def _describe(self, error: OSError) -> str:
        reason = os.strerror(error.errno) if error.errno else str(error)
        via = f" on {self.spec.interface}" if self.spec.interface is not None else ""
        local = self.spec.local or "any address"
        return f"{reason} ({local}{via} to {self._peer}, port {self.spec.port})"

"""What every service lease promises, whatever firewall carries it: words, values, interface.

The service lease is the first of the two locks (DESIGN 4): while it is closed, the ports of the
NFS service are dropped, never rejected, on all addresses of this node, in both directions, so
that clients stall and retry instead of failing. It must not decide when to open, and it must not
touch rules that are not ours. NFS over RDMA passes below every firewall: it is not covered.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from nfsha.vip.rtnetlink import Vip

VIPS_MAX: Final = 64
PEERS_MAX: Final = 64
PORTS_MAX: Final = 32
_SERVICE_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,32}")

DEFAULT_PORTS: Final[Mapping[str, int]] = {
    "rpcbind": 111,
    "nfs": 2049,
    "mountd": 20048,
    "statd": 20049,
    "lockd": 20050,
}


class FirewallError(Exception):
    """The firewall cannot do, or did not do, what was asked: one sentence, with the remedy."""


class LeaseVerdict(StrEnum):
    """How an attempt to open or renew ended."""

    HELD = "held"  # open at every VIP until the deadline, by the kernel's own clock if has_lease
    LATE = "late"  # the deadline has passed by our clock: closed
    LOST = "lost"  # the lease had ended before the renewal came: closed, and not opened again
    BROKEN = "broken"  # the rules are not there or the kernel refused: install() first


@dataclass(frozen=True, slots=True)
class LeaseOutcome:
    """What came of an attempt to open or renew, with the times that prove it.

    `started_ms` was read before the first change and `ended_ms` after the last one (both by the
    given clock). `why` is one sentence for the log.
    """

    verdict: LeaseVerdict
    started_ms: int
    ended_ms: int
    why: str

    @property
    def held(self) -> bool:
        """True if clients are served until the deadline."""
        return self.verdict is LeaseVerdict.HELD


@dataclass(frozen=True, slots=True)
class Guarded:
    """What is guarded, and from whom.

    `vips` open and close as one. `peers` are the addresses from which the other node probes the
    service: they reach it at this node's own addresses at all times, at a VIP only while it is
    open. `ports` maps a service's name to its port; TCP and UDP are guarded both.

    Raises ValueError for no or too many VIPs, a VIP that is also a peer, no or too many ports, a
    port outside 1 to 65535, a name other than letters, digits, `_`, `.` and `-`.
    """

    vips: Sequence[Vip]
    peers: Sequence[Vip]
    ports: Mapping[str, int]

    def __post_init__(self) -> None:
        _count("VIPs", len(set(self.vips)), 1, VIPS_MAX)
        _count("addresses of the peer", len(set(self.peers)), 0, PEERS_MAX)
        _count("ports", len(self.ports), 1, PORTS_MAX)
        for address in set(self.vips) & set(self.peers):
            raise ValueError(f"{address} cannot be both a VIP and an address of the peer")
        for name, port in self.ports.items():
            if not _SERVICE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name for a service: letters, digits, _ . -")
            if not 1 <= port <= 65535:
                raise ValueError(f"port {port} of {name} is outside 1 to 65535")

    def port_names(self) -> dict[int, str]:
        """The guarded ports in order, each with the names of its services."""
        names: dict[int, list[str]] = {}
        for name, port in sorted(self.ports.items()):
            names.setdefault(port, []).append(name)
        return {port: " ".join(names[port]) for port in sorted(names)}


class ServiceLease(Protocol):
    """The freeze and its opening at the VIPs; both backends behave the same behind it.

    Deadlines are milliseconds of the clock that the backend was made with. One caller at a time:
    the engine's shell. All methods raise FirewallError when the firewall cannot be brought into
    the state that they promise.
    """

    @property
    def has_lease(self) -> bool:
        """True if the kernel closes by itself at the deadline; False: only this process does."""

    async def check(self) -> None:
        """Proves that this host can carry the rules; changes no packet's way."""

    async def install(self) -> None:
        """Puts our rules in place, closed, in one step; repairs or replaces what is not right.

        Rules that are already ours and right stay as they are, and so does what is open in them:
        a restarted daemon interrupts nobody.
        """

    async def open(self, deadline_ms: int) -> LeaseOutcome:
        """Lets clients reach the VIPs until the deadline, whether or not they could before."""

    async def renew(self, deadline_ms: int) -> LeaseOutcome:
        """Moves the deadline of what is open; never opens what has closed (LOST)."""

    async def close(self) -> None:
        """Closes at every VIP, and verifies it; also when the rules are gone (it restores them)."""

    async def intact(self) -> bool:
        """True if our rules are all there and work; cheap enough for several times a second."""

    async def live(self) -> dict[Vip, int | None]:
        """The VIPs that are open now, each with its remaining milliseconds (None: without end)."""

    async def remove(self) -> None:
        """Takes our rules away, and nothing else: clients reach every address again."""

    @property
    def watch_fd(self) -> int | None:
        """A descriptor that turns readable when rules change; None: ask intact() at intervals."""

    def disturbed(self) -> str | None:
        """Reads what `watch_fd` announced: who changed our rules, None if nobody else did.

        A sentence means: ask intact(), and if it denies, install() and open() again.
        """

    def shut(self) -> None:
        """Gives back the descriptors; the rules stay as they are."""


def _count(what: str, number: int, least: int, most: int) -> None:
    if not least <= number <= most:
        raise ValueError(f"{number} {what}: from {least} to {most} are possible")

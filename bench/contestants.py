"""Who is measured: a pair of nfsha daemons or a pair of keepalived, behind the same few verbs.

A contestant lives in one lab. Node a is the primary (keepalived: MASTER), node b the standby. It
knows nothing of faults of the wires, of clients or of figures.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from signal import SIGTERM

from tests.netns.lab import ROLES, Lab
from tests.netns.labkit.keepalived import Keepalived
from tests.netns.labkit.network import VIP
from tests.netns.labkit.storage_node import node_config
from tests.netns.pair import FAST_TIMINGS_MS, TAKEOVER_AFTER_MS, Pair

_PREEMPTION_S = 0.5


@dataclass(frozen=True)
class Move:
    """One change of phase of one node; `at_ns` by CLOCK_BOOTTIME, in whole milliseconds."""

    node: str
    at_ns: int
    row: str
    phase: str
    to: str


class Contestant(ABC):
    """Two nodes of one lab under one supervisor."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    @abstractmethod
    def settle(self) -> None:
        """Starts both nodes and waits until a serves and b stands by. Raises LabError."""

    @abstractmethod
    def kill(self) -> None:
        """SIGKILL to the supervisor of node a; nobody starts it again."""

    @abstractmethod
    def freeze(self) -> None:
        """SIGSTOP to the supervisor of node a."""

    @abstractmethod
    def thaw(self) -> None:
        """SIGCONT to the supervisor of node a."""

    @abstractmethod
    def stop(self) -> None:
        """Tells the supervisor of node a to end, as `systemctl stop` does, and does not wait."""

    @abstractmethod
    def configurations(self) -> dict[str, str]:
        """The configuration file of each node."""

    def moves(self, since_ns: int) -> list[Move]:
        """What the supervisors say that they did since a time, where they keep such a log."""
        del since_ns
        return []


class NfshaPair(Contestant):
    """Both daemons with their shipped timings; nothing else differs from the defaults."""

    def __init__(self, lab: Lab, profile: str | None) -> None:
        super().__init__(lab)
        self.pair = Pair(lab, profile=profile)
        self._profile = profile

    def settle(self) -> None:
        """See Contestant."""
        self.pair.settle()
        self.lab.wait_holder("a")

    def kill(self) -> None:
        """See Contestant."""
        self.pair.daemon("a").kill()

    def freeze(self) -> None:
        """See Contestant."""
        self.pair.daemon("a").freeze()

    def thaw(self) -> None:
        """See Contestant."""
        self.pair.daemon("a").thaw()

    def stop(self) -> None:
        """See Contestant."""
        self.pair.daemon("a").signal(SIGTERM)

    def configurations(self) -> dict[str, str]:
        """See Contestant."""
        return {name: node_config(role, profile=self._profile) for name, role in ROLES.items()}

    def moves(self, since_ns: int) -> list[Move]:
        """Every change of phase of both nodes since a time, in order."""
        found = [
            Move(name, event.at_ms * 1_000_000, event.row, event.phase, event.to)
            for name in ROLES
            for event in self.pair.events(name, since_ns // 1_000_000)
            if event.phase != event.to
        ]
        return sorted(found, key=lambda move: move.at_ns)


class KeepalivedPair(Contestant):
    """Debian's keepalived in both nodes, configured by bench/keepalived/keepalived.conf."""

    def __init__(self, lab: Lab, advert_s: float) -> None:
        super().__init__(lab)
        self._a, self._b = (Keepalived(node, advert_s=advert_s) for node in (lab.a, lab.b))
        self._advert_s = advert_s

    def settle(self) -> None:
        """See Contestant. b has heard an advert before this ends."""
        self._a.start()
        self._a.wait_holder()
        self._b.start()
        time.sleep(self._advert_s + _PREEMPTION_S)
        self.lab.wait_holder("a")

    def kill(self) -> None:
        """See Contestant."""
        self._a.kill()

    def freeze(self) -> None:
        """See Contestant."""
        self._a.freeze()

    def thaw(self) -> None:
        """See Contestant."""
        self._a.thaw()

    def stop(self) -> None:
        """See Contestant."""
        self._a.process.signal(SIGTERM)

    def configurations(self) -> dict[str, str]:
        """See Contestant."""
        return {"a": self._a.config(), "b": self._b.config()}


@dataclass(frozen=True)
class Kind:
    """One column of the tables. Exactly one of profile (nfsha) and advert_s (keepalived) counts."""

    name: str
    title: str
    takeover_after_ms: int | None = None
    profile: str | None = None
    advert_s: float | None = None

    @property
    def ours(self) -> bool:
        """Whether it is nfsha."""
        return self.advert_s is None

    def make(self, lab: Lab) -> Contestant:
        """This contestant in a lab, not started."""
        if self.advert_s is not None:
            return KeepalivedPair(lab, self.advert_s)
        return NfshaPair(lab, self.profile)


KINDS = (
    Kind("nfsha", "nfsha", TAKEOVER_AFTER_MS),
    Kind("nfsha-fast", "nfsha, `fast`", FAST_TIMINGS_MS["takeover_after"], profile="fast"),
    Kind("keepalived-1s", "keepalived, 1 s", advert_s=1.0),
    Kind("keepalived-100ms", "keepalived, 0.1 s", advert_s=0.1),
)
BY_NAME = {kind.name: kind for kind in KINDS}
ADDRESS = VIP

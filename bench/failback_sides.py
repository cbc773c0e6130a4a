"""Who brings the service home: nfsha, or an operator with the runbook that is used today.

Both begin alike: the primary (a) was lost, the standby (b) serves its clients, and the primary is
up again. `approach` brings its old data near to the standby's, which still serves; `go_home` is the
move. They know nothing of clients or figures.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

from bench.replication_sides import PASS_S, RSYNCD, SYNC
from tests.netns.copies import Copies
from tests.netns.lab import Lab
from tests.netns.labkit.keepalived import Keepalived
from tests.netns.labkit.network import PLACES
from tests.netns.labkit.place import LabError, Process

ADVERT_S = 0.1
"""Ten times as quick as keepalived's default: what is compared is the copying, not the election."""

RUNBOOK = (
    ("b", "rsync --daemon", "the source of the way back"),
    ("a", "rsync -aHAX --numeric-ids --delete rsync://{b}/nfs/ /nfs/", "clients are served"),
    ("b", "systemctl stop keepalived", "the VIP is away: no service from here on"),
    ("a", "rsync -aHAX --numeric-ids --delete rsync://{b}/nfs/ /nfs/", "the last changes"),
    ("a", "systemctl start keepalived", "service again once it has the VIP"),
    ("b", "systemctl start keepalived", "as the backup"),
)
"""(node, what is typed there, why)."""

_RSYNC = ("rsync", "-aHAX", "--numeric-ids", "--delete")
_SOON_S = 30.0
_WHOLE = (0, 24)
"""24: a file vanished meanwhile, as it may while clients are served (rsync(1))."""


@dataclass(frozen=True)
class Moved:
    """One move. parts: what the time without service went into, each with its end (ns)."""

    asked_ns: int
    ended_ns: int
    began_ns: int
    parts: tuple[tuple[str, int], ...]


class Side(ABC):
    """One way home. `name` is for the samples, `title` for people."""

    name: str
    title: str

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    @abstractmethod
    def begin(self) -> None:
        """The primary serves, the standby waits. Raises LabError."""

    @abstractmethod
    def lose_the_primary(self) -> None:
        """The primary dies, the standby takes over, and the primary is up again."""

    @abstractmethod
    def approach(self) -> None:
        """Brings the primary's data near to the standby's, which serves."""

    @abstractmethod
    def go_home(self) -> Moved:
        """Moves the service to the primary."""

    @abstractmethod
    def settle(self) -> None:
        """Waits until the standby is ready for the next round."""

    @abstractmethod
    def end(self) -> None:
        """Ends all that it started."""


class Nfsha(Side):
    """Both daemons of nfsha; the move is `nfsha failback --yes`."""

    name = "nfsha"
    title = "nfsha"

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.pair = Copies(lab, sync=SYNC, mounts=[f"/nfs/{name}" for name in lab.volumes])
        self._since_ms = 0

    def pair_up(self) -> None:
        """Gives the empty volumes their identities, while there is nothing to copy."""
        self.begin()
        for volume in self.lab.volumes:
            self.pair.wait(lambda volume=volume: self.pair.mark("b", volume) is not None, "a mark")  # type: ignore[misc]
        self.stop()

    def begin(self) -> None:
        """See Side."""
        since_ms = self.pair.now_ms()
        self.pair.start()
        self.pair.wait_phase("a", "ACTIVE", since_ms=since_ms, within_s=_SOON_S)
        self.pair.wait_phase("b", "PASSIVE", since_ms=since_ms, within_s=_SOON_S)

    def copy(self) -> None:
        """A pass of every volume to the standby."""
        for volume in self.lab.volumes:
            self.lab.b.nfsha("sync", volume, "--wait", timeout_s=PASS_S)

    def lose_the_primary(self) -> None:
        """See Side."""
        since_ms = self.pair.now_ms()
        self.lab.power_cut("a")
        self.pair.wait_phase("b", "ACTIVE", since_ms=since_ms, within_s=_SOON_S)
        self.lab.boot("a")

    def approach(self) -> None:
        """See Side: the resync that a returned node begins by itself."""
        since_ms = self.pair.now_ms()
        self.pair.start("a")
        self.pair.wait_phase("a", "PASSIVE", since_ms=since_ms, within_s=PASS_S)

    def go_home(self) -> Moved:
        """See Side."""
        self._since_ms = self.pair.now_ms()
        asked_ns = self.lab.now_ns()
        self.lab.a.nfsha("failback", "--yes", timeout_s=PASS_S)
        ended_ns = self.lab.now_ns()
        froze, prepared = (self._came("b", phase) for phase in ("FREEZING", "PREPARED"))
        final, proved, served = (
            self._came("a", phase) for phase in ("FINAL_SYNC", "RESTORING", "ACTIVE")
        )
        parts = (
            ("ports closed, all on the disk, given away", prepared),
            ("the other node knows it", final),
            ("last pass and proof", proved),
            ("new epoch on the disk, VIP, ports open", served),
        )
        return Moved(asked_ns, ended_ns, froze, parts)

    def settle(self) -> None:
        """See Side."""
        self.pair.wait_phase("b", "PASSIVE", since_ms=self._since_ms, within_s=_SOON_S)

    def stop(self) -> None:
        """Ends both daemons, the passive one first."""
        for name in ("b", "a"):
            self.pair.daemon(name).stop(_SOON_S)

    def end(self) -> None:
        """See Side; nothing of nfsha is left in the volumes, or on the nodes.

        So that the runbook finds the same trees, and nothing else.
        """
        self.stop()
        for node in (self.lab.a, self.lab.b):
            node.nfsha("release")
            for volume in self.lab.volumes:
                own = ("-maxdepth", "1", "-name", ".nfsha-*", "-exec", "rm", "-rf", "{}", "+")
                node.run("find", f"/nfs/{volume}", *own)

    def _came(self, node: str, phase: str) -> int:
        found = self.pair.wait_phase(node, phase, since_ms=self._since_ms, within_s=_SOON_S)
        return found.at_ms * 1_000_000


class Runbook(Side):
    """keepalived on both nodes, rsyncd on the standby, and the steps of `RUNBOOK` without a pause.

    As a careful operator does it: rsyncd is started, and a first rsync run, while clients are
    served, so that the one without service finds only what changed since. A script types it all.
    """

    name = "runbook"
    title = "manual runbook"

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._a, self._b = (Keepalived(node, advert_s=ADVERT_S) for node in (lab.a, lab.b))
        self._server: Process | None = None

    def configuration(self) -> dict[str, str]:
        """The configuration files of this side, by name."""
        return {
            "keepalived-a.conf": self._a.config(),
            "keepalived-b.conf": self._b.config(),
            "rsyncd.conf": RSYNCD.format(peer=_replication_address("a")),
        }

    def begin(self) -> None:
        """See Side."""
        self._a.start()
        self._a.wait_holder()
        self._b.start()
        self.settle()

    def lose_the_primary(self) -> None:
        """See Side. keepalived is not started at its boot: it would serve the old data."""
        self.lab.power_cut("a")
        self._b.wait_holder()
        self.lab.boot("a")

    def approach(self) -> None:
        """See Side."""
        self._start_rsyncd()
        self._rsync()

    def go_home(self) -> Moved:
        """See Side."""
        asked_ns = self.lab.now_ns()
        self._b.stop()
        stopped_ns = self.lab.now_ns()
        self._rsync()
        copied_ns = self.lab.now_ns()
        self._a.start()
        self._a.wait_holder()
        served_ns = self.lab.wait_holder("a").start_ns
        self._b.start()
        parts = (
            ("keepalived of the standby stops", stopped_ns),
            ("the last rsync", copied_ns),
            ("keepalived of the primary starts, and has the VIP", served_ns),
        )
        return Moved(asked_ns, self.lab.now_ns(), asked_ns, parts)

    def settle(self) -> None:
        """See Side. The backup has heard adverts by the end; rsyncd is stopped."""
        if self._server is not None:
            self._server.stop()
            self._server = None
        time.sleep(10 * ADVERT_S)
        self.lab.wait_holder("a")

    def end(self) -> None:
        """See Side."""
        self._b.stop()
        self._a.stop()

    def _start_rsyncd(self) -> None:
        config = self.lab.folder / "failback-rsyncd.conf"
        config.write_text(self.configuration()["rsyncd.conf"])
        argv = ["rsync", "--daemon", "--no-detach", f"--config={config}"]
        self._server = self.lab.b.spawn(argv, name="rsyncd")
        deadline_s = time.monotonic() + _SOON_S
        while self.lab.a.run("rsync", _source(), check=False).returncode != 0:
            if time.monotonic() > deadline_s:
                raise LabError(f"the rsync daemon does not answer:\n{self._server.tail()}")
            time.sleep(0.05)

    def _rsync(self) -> None:
        done = self.lab.a.run(*_RSYNC, _source(), "/nfs/", check=False, timeout_s=PASS_S)
        if done.returncode not in _WHOLE:
            raise LabError(f"the rsync of the runbook ended with {done.returncode}: {done.stderr}")


def _source() -> str:
    return f"rsync://{_replication_address('b')}/nfs/"


def _replication_address(node: str) -> str:
    return PLACES[node].all()[-1].ipv4

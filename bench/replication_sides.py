"""Who is measured: nfsha's own replication, and the rsync that people run from cron.

Both copy from node a to node b of one lab, over the same network, to filesystems made alike. They
know nothing of trees, figures or bars.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.replication_usage import Cost, Meter
from tests.netns.copies import Copies
from tests.netns.lab import Lab
from tests.netns.labkit.network import PLACES
from tests.netns.labkit.nfs_server import make_disks
from tests.netns.labkit.place import LabError, Process

PASS_S = 1800.0
_RSYNC_PORT = 873

SYNC = """[sync]
every = "12h"
jitter = "0s"
full_every = "7d"
verify_every = "never"
"""
"""Nothing by itself while the bench runs; all else as shipped."""

RSYNCD = """# What people run today: the server's side
uid = root
gid = root
use chroot = yes
max connections = 4

[nfs]
    path = /nfs
    read only = yes
    hosts allow = {peer}
"""
CRON = "*/5 * * * * root rsync -aHAX --numeric-ids --delete rsync://{peer}/nfs/ /nfs/\n"
_RSYNC = ("rsync", "-aHAX", "--numeric-ids", "--delete")


@dataclass(frozen=True)
class Pass:
    """One pass. walk: how nfsha went ("folders", "full"); full_walks: how many it made in it."""

    cost: Cost
    walk: str = ""
    full_walks: int = 0


class Side(ABC):
    """One way to copy. `name` is for the samples, `title` for people."""

    name: str
    title: str

    @abstractmethod
    def sync(self, volume: str) -> Pass:
        """One pass of one volume. Raises LabError when it is not complete."""

    @abstractmethod
    def first(self) -> Pass:
        """Copies all volumes of the lab to empty filesystems."""

    @abstractmethod
    def target(self, volume: str) -> Path:
        """The copy of a volume, as this process reaches it."""


class Cron(Side):
    """The rsync of a crontab, over an rsync daemon that always runs."""

    name = "cron"
    title = "rsync from cron"

    def __init__(self, lab: Lab, volume_mib: int, inodes: int | None = None) -> None:
        self._lab = lab
        self._server: Process | None = None
        folder = lab.folder / "cron"
        folder.mkdir()
        disks = make_disks(folder, ("cron",), lab.volumes, volume_mib, inodes)["cron"]
        for disk in disks:
            at = f"/run/cron/{Path(disk.mountpoint).name}"
            lab.b.run("mkdir", "-p", at)
            lab.b.run("mount", "-o", "loop", disk.image, at)

    @staticmethod
    def configuration() -> dict[str, str]:
        """The files of both servers, by name."""
        here, there = PLACES["a"].all()[-1].ipv4, PLACES["b"].all()[-1].ipv4
        return {"rsyncd.conf": RSYNCD.format(peer=there), "cron": CRON.format(peer=here)}

    def start(self) -> None:
        """Starts the rsync daemon of node a."""
        config = self._lab.folder / "rsyncd.conf"
        config.write_text(self.configuration()["rsyncd.conf"])
        self._server = self._lab.a.spawn(
            ["rsync", "--daemon", "--no-detach", f"--config={config}"], name="rsyncd"
        )
        deadline_s = time.monotonic() + 5
        while self._lab.b.run("rsync", self._url(""), check=False).returncode != 0:
            if time.monotonic() > deadline_s:
                raise LabError(f"the rsync daemon does not answer:\n{self._server.tail()}")
            time.sleep(0.05)

    def sync(self, volume: str) -> Pass:
        """See Side."""
        return self._copy(self._url(f"{volume}/"), f"/run/cron/{volume}/")

    def first(self) -> Pass:
        """See Side."""
        return self._copy(self._url(""), "/run/cron/")

    def target(self, volume: str) -> Path:
        """See Side."""
        return self._lab.b.path(f"/run/cron/{volume}")

    def _copy(self, source: str, target: str) -> Pass:
        if self._server is None:
            raise LabError("the rsync daemon was not started")
        with Meter(self._lab, [self._server.pid], children=True) as meter:
            client = self._lab.b.spawn([*_RSYNC, source, target], name="cron-rsync")
            meter.also(client.pid)
            code = client.wait(PASS_S)
        if code != 0:
            raise LabError(f"the cron rsync ended with {code}:\n{client.tail()}")
        return Pass(meter.cost)

    def _url(self, path: str) -> str:
        return f"rsync://{PLACES['a'].all()[-1].ipv4}/nfs/{path}"


class Nfsha(Side):
    """Both daemons of nfsha, asked by `nfsha sync VOLUME --wait`: its start counts too."""

    name = "nfsha"
    title = "nfsha"

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.pair = Copies(lab, sync=SYNC, mounts=[f"/nfs/{name}" for name in lab.volumes])

    def start(self) -> None:
        """Starts both daemons and waits until node a serves and node b has copied everything."""
        since_ms = self.pair.now_ms()
        self.pair.start()
        self.pair.wait_phase("a", "ACTIVE", since_ms=since_ms, within_s=30)
        self.wait_copied(time.monotonic() + PASS_S)
        self.pair.wait_phase("b", "PASSIVE", since_ms=since_ms, within_s=30)

    def stop(self) -> None:
        """Ends both daemons, the passive one first."""
        for name in ("b", "a"):
            self.pair.daemon(name).stop(60.0)

    def sync(self, volume: str) -> Pass:
        """See Side."""
        before = self._full_walks(volume)
        with Meter(self._lab, self._daemons()) as meter:
            self._lab.b.nfsha("sync", volume, "--wait", timeout_s=PASS_S)
        walk = str((self.pair.mark("b", volume) or {}).get("walk", ""))
        return Pass(meter.cost, walk, self._full_walks(volume) - before)

    def first(self) -> Pass:
        """See Side: both daemons are started, and copy by themselves.

        The time is from the beginning of the first volume's pass (as its mark says) to the moment
        when the last volume's mark was written.
        """
        began_ns = time.time_ns()
        self.pair.start()
        with Meter(self._lab, self._daemons()) as meter:
            self.wait_copied(time.monotonic() + PASS_S)
            ended_ns = max(file.stat().st_mtime_ns for file in self._marks())
        marks = [self.pair.mark("b", volume) for volume in self._lab.volumes]
        first_ns = min(int(mark["started_ns"]) for mark in marks if mark is not None)
        wall_s = round((ended_ns - max(first_ns, began_ns)) / 1e9, 4)
        cost = Cost(wall_s, meter.cost.cpu_s, meter.cost.wire_bytes, meter.cost.peak_mib)
        return Pass(cost, "full", len(marks))

    def target(self, volume: str) -> Path:
        """See Side."""
        return self._lab.b.path(f"/nfs/{volume}")

    def wait_copied(self, deadline_s: float) -> None:
        """Waits until each volume has a mark. Raises LabError when a daemon ends."""
        while len(self._marks()) < len(self._lab.volumes):
            for name in ("a", "b"):
                if not (daemon := self.pair.daemon(name)).alive:
                    raise LabError(f"the daemon of {name} has ended:\n{daemon.tail(5)}")
            if time.monotonic() > deadline_s:
                raise LabError(f"not all volumes were copied: {self.pair.volumes('b')}")
            time.sleep(0.01)

    def _marks(self) -> Sequence[Path]:
        return list((self._lab.folder / "b" / "lib" / "marks").glob("own-*"))

    def daemon_of_source(self) -> int:
        """The pid of the active node's daemon."""
        return self.pair.daemon("a").pid

    def _daemons(self) -> list[int]:
        return [self.pair.daemon(name).pid for name in ("a", "b")]

    def _full_walks(self, volume: str) -> int:
        return sum(self.pair.copy("b", volume)["full_walks"].values())

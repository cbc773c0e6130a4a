"""The netns lab: two storage nodes, a client and a third place in one machine; faults as functions.

    with Lab() as lab:                # a, b: storage nodes; c: client; w: third place, gateway
        lab.a.add_vip()
        writer = lab.write_records()  # NFS v3 through the VIP, by path
        lab.power_cut("a")
        ...

Used by the demo, the tests and the bench alike. Needs root. All that it makes goes with it: at the
end of the block, when its owner is killed, or at the latest when the next lab starts. It judges
nfsha, so it imports none of it.

For people: python -m tests.netns.lab up | status | shell NODE | down
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from tests.netns.labkit import kernel, registry, wall_clock
from tests.netns.labkit.forge import send_forged
from tests.netns.labkit.network import PLACES, VIP, Switch
from tests.netns.labkit.nfs_server import make_disk, make_disks
from tests.netns.labkit.observe import Datagram, Hold, Observations, Observer
from tests.netns.labkit.place import LabError, Place
from tests.netns.labkit.prober import NullProber
from tests.netns.labkit.records import RecordWriter, read_records
from tests.netns.labkit.registry import Description, ProcessId
from tests.netns.labkit.storage_node import STATE, StorageNode, cluster_key, node_config

STORAGE = ("a", "b")
ROLES = {"a": "primary", "b": "standby"}
_STANDING = "standing"


class Lab:
    """See the module. One thread drives it. `made`: the names of all labs of this process."""

    made: ClassVar[set[str]] = set()

    def __init__(
        self,
        *,
        volumes: tuple[str, ...] = ("data",),
        volume_mib: int = 64,
        inodes: int | None = None,
        state_mib: int | None = None,
        protocols: str = "3",
        standing_name: str | None = None,
    ) -> None:
        """Makes nothing yet. Volumes are mounted at /nfs/NAME; protocols (of NFS): "3" or "3,4".

        inodes: of each volume (None: mkfs's choice).

        state_mib: /var/lib/nfsha is a disk of its own, so large, that can be filled; else it is a
        folder of the lab, which the owner reads at FOLDER/a/lib, also while the node is off.

        standing_name: for a lab that outlives this process, until `down`; nobody watches it.
        """
        self.name = standing_name or f"{os.getpid()}-{secrets.token_hex(3)}"
        Lab.made.add(self.name)
        self.volumes = volumes
        self.key = cluster_key()
        self._volume_mib = volume_mib
        self._inodes = inodes
        self._state_mib = state_mib
        self._protocols = protocols
        self._stands = standing_name is not None
        self._description: Description | None = None
        self._switch: Switch | None = None
        self._places: dict[str, Place] = {}
        self._observer: Observer | None = None
        self._made_ns = kernel.now_ns()

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def up(self) -> None:
        """Sweeps what dead owners left, makes all places, waits until both NFS servers answer."""
        require_root()
        registry.sweep()
        folder = Path(tempfile.mkdtemp(prefix=f"nfsha-lab-{self.name}-", dir="/tmp"))
        self._description = Description(self.name, ProcessId.of(os.getpid()), str(folder))
        self._description.save()
        try:
            self._make(folder)
            if self._stands:
                self._description.owner = None
                self._description.save()
        except BaseException:
            self.close()
            raise

    def _make(self, folder: Path) -> None:
        disks = make_disks(folder, STORAGE, self.volumes, self._volume_mib, self._inodes)
        if self._state_mib is not None:
            for name in STORAGE:
                disks[name] += (make_disk(folder / f"{name}-state.img", STATE, self._state_mib),)
        self._switch = Switch.make()
        self._record("switch", self._switch.namespace.name)
        for name in PLACES:
            home = folder / name
            if name in STORAGE:
                self._places[name] = StorageNode(
                    name,
                    self.name,
                    home,
                    disks[name],
                    protocols=self._protocols,
                    stay=self._stands,
                )
            else:
                self._places[name] = Place(name, self.name, home, stay=self._stands)
        if not self._stands:
            path = self._switch.namespace.path
            self._observer = Observer(self.name, path, folder / "events.jsonl")
        for name in PLACES:
            self.boot(name)

    def _record(self, name: str, namespace: str, holder_pid: int | None = None) -> None:
        description = self.description
        description.namespaces[name] = namespace
        holder = ProcessId.of(holder_pid) if holder_pid else None
        if holder is not None:
            description.processes[name] = holder
        description.save()

    def close(self) -> None:
        """Removes everything. Idempotent."""
        try:
            for place in self._places.values():
                place.remove()
            if self._observer is not None:
                self._observer.stop()
        finally:
            self._places.clear()
            self._observer = self._switch = None
            if self._description is not None:
                registry.remove(self._description)
                self._description = None

    @property
    def description(self) -> Description:
        """What the lab has on this host."""
        if self._description is None:
            raise LabError("the lab is down")
        return self._description

    @property
    def folder(self) -> Path:
        """Logs, disks and kept folders of all places: FOLDER/a/log, FOLDER/a/etc, FOLDER/a/lib."""
        return Path(self.description.folder)

    @property
    def switch(self) -> Switch:
        """The wires."""
        if self._switch is None:
            raise LabError("the lab is down")
        return self._switch

    @property
    def observer(self) -> Observer:
        """What watches the lab (a standing one is not watched)."""
        if self._observer is None:
            raise LabError("nobody watches this lab")
        return self._observer

    def look(self) -> Observations:
        """Everything that was seen until this moment: holds, replies, overlaps."""
        return self.observer.look()

    @staticmethod
    def now_ns() -> int:
        """The clock of all observations (CLOCK_BOOTTIME)."""
        return kernel.now_ns()

    def node(self, name: str) -> StorageNode:
        """Storage node a or b."""
        place = self._places[name]
        if not isinstance(place, StorageNode):
            raise LabError(f"{name} is not a storage node")
        return place

    @property
    def a(self) -> StorageNode:
        """The primary."""
        return self.node("a")

    @property
    def b(self) -> StorageNode:
        """The standby."""
        return self.node("b")

    @property
    def c(self) -> Place:
        """The client."""
        return self._places["c"]

    @property
    def w(self) -> Place:
        """The third place: witness, gateway, later the broker."""
        return self._places["w"]

    @property
    def places(self) -> tuple[Place, ...]:
        """All four."""
        return tuple(self._places.values())

    # Machines

    def boot(self, name: str) -> None:
        """Switches a place on: wires, fresh /run, new boot id, its NFS service. Not the daemon."""
        place = self._places[name]
        namespace = place.make_namespace()
        self._record(name, namespace.name)
        self.switch.attach(name, namespace)
        if self._observer is not None and name in STORAGE:
            self._observer.watch(name, namespace.path)
        place.boot()
        self._record(name, namespace.name, place.holder_pid)
        if isinstance(place, StorageNode):
            place.nfs.start()

    def power_cut(self, name: str) -> int:
        """Node death: silence on all its wires at once, then SIGKILL to all, then the wires go.

        So no FIN, no farewell. Returns when it fell silent (CLOCK_BOOTTIME, ns).
        """
        place = self._places[name]
        self.switch.silence(name)
        dead_ns = kernel.now_ns()
        if self._observer is not None and name in STORAGE:
            self._observer.forget(name, dead_ns)
        place.kill_all()
        self.switch.detach(name)
        place.remove()
        return dead_ns

    @staticmethod
    def wall_clock_stepped(seconds: float) -> AbstractContextManager[None]:
        """The whole machine's wall clock stepped inside the block; see labkit/wall_clock.py."""
        return wall_clock.stepped(seconds)

    # Wires

    def cut(
        self,
        source: str,
        target: str = "*",
        *,
        network: str | None = None,
        both_ways: bool = True,
        udp_only: bool = False,
    ) -> None:
        """Cuts source from target (`*`: everybody) on one network or on all; links stay up."""
        self.switch.lose(
            source, target, network=network, both_ways=both_ways, what="udp" if udp_only else "all"
        )

    def lose(
        self,
        source: str,
        target: str = "*",
        *,
        percent: int,
        network: str | None = None,
        both_ways: bool = True,
        udp_only: bool = False,
    ) -> None:
        """Loses so many percent of the frames, each by its own throw."""
        self.switch.lose(
            source,
            target,
            percent=percent,
            network=network,
            both_ways=both_ways,
            what="udp" if udp_only else "all",
        )

    def heal(self) -> None:
        """Ends every cut and loss."""
        self.switch.heal()

    def unplug(self, name: str, network: str = "lan") -> None:
        """Pulls a cable: the place sees its carrier go."""
        self.switch.unplug(name, network)

    def plug(self, name: str, network: str = "lan") -> None:
        """Puts the cable back."""
        self.switch.plug(name, network)

    def gateway_gone(self) -> None:
        """Nobody reaches the third place any more (gateway, and whatever else runs there)."""
        self.cut("w")

    def gateway_back(self) -> None:
        """The third place is reachable again."""
        self.switch.mend("w")

    # nfsha

    def configure(self, name: str, config: str | None = None) -> None:
        """Writes a node's configuration (default: node_config of its role) and the pair's key."""
        self.node(name).write_config(config or node_config(ROLES[name]), self.key)

    def start_daemons(self, *names: str) -> None:
        """Starts nfsha on these nodes (default: both); one without a configuration gets its own."""
        for name in names or STORAGE:
            node = self.node(name)
            if not node.path("/etc/nfsha/nfsha.toml").exists():
                self.configure(name)
            node.start_daemon()

    def wait_holder(self, name: str, *, address: str = VIP, timeout_s: float = 10.0) -> Hold:
        """Waits until this node, and no other, holds the address. Raises LabError."""
        deadline = time.monotonic() + timeout_s
        while True:
            seen = self.look()
            if seen.holders(address) == {name}:
                return next(hold for hold in seen.holds(address) if hold.open)
            if time.monotonic() > deadline:
                said = seen.render(address, self._made_ns)
                raise LabError(f"{name} does not hold {address} after {timeout_s} s\n{said}")
            time.sleep(0.01)

    # The client

    def write_records(
        self,
        *,
        server: str = VIP,
        path: str = "/records",
        interval_ms: float = 20.0,
        cap_s: float = 30.0,
        first: int = 1,
    ) -> RecordWriter:
        """Starts a client in c that writes numbered records through the VIP; see RecordWriter."""
        return RecordWriter(
            self.c,
            server=server,
            export=f"/nfs/{self.volumes[0]}",
            path=path,
            interval_ms=interval_ms,
            cap_s=cap_s,
            first=first,
        )

    def probe(self, *, server: str = VIP, interval_ms: float = 5.0) -> NullProber:
        """Starts a prober in c: a fresh RPC NULL on a new connection every interval_ms."""
        return NullProber(self.c, server=server, interval_ms=interval_ms)

    def inject(self, name: str, datagram: Datagram) -> None:
        """Sends a datagram that was seen, from another place, under its old source address."""
        place = next(one for one in self.places if one.name == name)
        place.inside(lambda: send_forged(datagram))

    def read_records(
        self, *, server: str = VIP, path: str = "/records", cap_s: float = 10.0
    ) -> dict[int, int]:
        """Reads them back on a new connection: number to the time it was sent."""
        return read_records(
            self.c, server=server, export=f"/nfs/{self.volumes[0]}", path=path, cap_s=cap_s
        )


def require_root() -> None:
    """Raises LabError, in words for a person, when this cannot work."""
    if os.geteuid() != 0:
        raise LabError("the lab makes network namespaces and mounts: run it as root")
    missing = [
        name
        for name in _PROGRAMS
        if shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") is None
    ]
    if missing:
        raise LabError(f"the lab needs these programs: {', '.join(missing)}")


_PROGRAMS = ("ip", "nft", "mkfs.ext4", "mount", "rpcbind", "ganesha.nfsd", "arping")


def _up(name: str) -> None:
    if _standing(name) is not None:
        print("the lab stands already")
        return
    lab = Lab(standing_name=name)
    lab.up()
    for node in STORAGE:
        lab.configure(node)
    print(f"the lab stands: places {', '.join(PLACES)}; logs and disks in {lab.folder}")
    print(
        "a shell in one: python -m tests.netns.lab shell a; its end: python -m tests.netns.lab down"
    )


def _standing(name: str) -> Description | None:
    return next((one for one in registry.descriptions() if one.name == name), None)


def _down(name: str) -> None:
    swept = registry.sweep()
    standing = _standing(name)
    if standing is not None:
        registry.remove(standing)
        swept.append(standing.name)
    print(f"removed: {', '.join(swept)}" if swept else "there was no lab")


def _status() -> None:
    labs = registry.descriptions()
    if not labs:
        print("no lab")
    for lab in labs:
        owner = f"pid {lab.owner.pid}" if lab.owner else "stays until `down`"
        print(f"{lab.name}: {'abandoned, ' if lab.abandoned else ''}{owner}, files in {lab.folder}")
        for place, holder in lab.processes.items():
            namespace = lab.namespaces[place]
            state = "up" if holder.alive else "down"
            print(f"  {place}: {state}, netns {namespace}, pid {holder.pid}")


def _shell(name: str, place: str, argv: list[str]) -> None:
    standing = _standing(name)
    if standing is None or place not in standing.processes:
        raise LabError("no such place: the lab is down (python -m tests.netns.lab up), or misspelt")
    target = str(standing.processes[place].pid)
    command = argv or [os.environ.get("SHELL", "/bin/bash")]
    enter = ["nsenter", "-t", target, "--mount", "--net", "--uts", "--pid"]
    os.execvp("nsenter", [*enter, "--wd=/root", *command])


def main() -> int:
    """The command line: a lab that stays, for people."""
    parser = argparse.ArgumentParser(prog="python -m tests.netns.lab", description="a standing lab")
    parser.add_argument("--name", default=_STANDING, help="for more than one at a time")
    parser.add_argument("action", choices=("up", "status", "shell", "down"))
    parser.add_argument("place", nargs="?", default="a", help="for shell: a, b, c or w")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="for shell: run this instead")
    options = parser.parse_args()
    try:
        require_root()
        match options.action:
            case "up":
                _up(options.name)
            case "status":
                _status()
            case "shell":
                _shell(options.name, options.place, options.command)
            case _:
                _down(options.name)
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

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

import os
import secrets
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.netns.labkit import registry
from tests.netns.labkit.network import PLACES, VIP, Switch
from tests.netns.labkit.nfs_server import make_disks
from tests.netns.labkit.place import LabError, Place
from tests.netns.labkit.records import RecordWriter, read_records
from tests.netns.labkit.registry import Description, ProcessId
from tests.netns.labkit.storage_node import StorageNode, cluster_key, node_config

STORAGE = ("a", "b")
ROLES = {"a": "primary", "b": "standby"}
_PERSISTENT = "standing"


class Lab:
    """See the module. Not thread-safe: one thread drives it."""

    def __init__(
        self,
        *,
        volumes: tuple[str, ...] = ("data",),
        volume_mib: int = 64,
        protocols: str = "3",
        persistent: bool = False,
    ) -> None:
        """Makes nothing yet. Volumes are mounted at /nfs/NAME; protocols (of NFS): "3" or "3,4"."""
        self.name = _PERSISTENT if persistent else f"{os.getpid()}-{secrets.token_hex(3)}"
        self.volumes = volumes
        self.key = cluster_key()
        self._volume_mib = volume_mib
        self._protocols = protocols
        self._persistent = persistent
        self._description: Description | None = None
        self._switch: Switch | None = None
        self._places: dict[str, Place] = {}

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
            if self._persistent:
                self._description.owner = None
                self._description.save()
        except BaseException:
            self.close()
            raise

    def _make(self, folder: Path) -> None:
        disks = make_disks(folder, STORAGE, self.volumes, self._volume_mib)
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
                    stay=self._persistent,
                )
            else:
                self._places[name] = Place(name, self.name, home, stay=self._persistent)
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
        for place in self._places.values():
            place.power_cut()
        self._places.clear()
        self._switch = None
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
        place.boot()
        self._record(name, namespace.name, place.holder_pid)
        if isinstance(place, StorageNode):
            place.nfs.start()

    def power_cut(self, name: str) -> None:
        """Node death: first its wires (no FIN, no farewell), then all its processes, by SIGKILL."""
        self.switch.detach(name)
        self._places[name].power_cut()

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

"""The NFS service of a storage node: disks, rpcbind and nfs-ganesha.

The filesystems of a volume are made twice with one UUID, never copied: ganesha's handle of the root
is then equal on both nodes, so work by path goes on after a move, and all other handles differ, as
they do after a copy file by file.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from tests.netns.labkit.holder import Disk
from tests.netns.labkit.place import REPOSITORY, LabError, Place, Process

NFS_PORT = 2049
MOUNTD_PORT = 20048
_CONFIG = "/etc/ganesha/ganesha.conf"
_START_S = 30.0
_RPC_TIMEOUT_S = 1.0
_NFS_PROGRAM = 100003  # RFC 1813
_LAST_FRAGMENT = 0x80000000  # RFC 5531 section 11


def make_disks(
    folder: Path,
    nodes: tuple[str, ...],
    volumes: tuple[str, ...],
    size_mib: int,
    inodes: int | None = None,
) -> dict[str, tuple[Disk, ...]]:
    """One sparse ext4 image for each volume and node, for /nfs/VOLUME; equal UUIDs on all nodes.

    inodes: so many, all tables written at once (default: mkfs's number, written bit by bit later).
    """
    many = ["-N", str(inodes), "-E", "lazy_itable_init=0,lazy_journal_init=0"] if inodes else []
    disks: dict[str, list[Disk]] = {node: [] for node in nodes}
    for volume in volumes:
        identity = ["-U", str(uuid.uuid4())]
        for node in nodes:
            image = folder / f"{node}-{volume}.img"
            disks[node].append(make_disk(image, f"/nfs/{volume}", size_mib, *many, *identity))
    return {node: tuple(made) for node, made in disks.items()}


def make_disk(image: Path, mountpoint: str, size_mib: int, *options: str) -> Disk:
    """One sparse ext4 image; the options are mkfs's."""
    image.touch()
    os.truncate(image, size_mib << 20)
    argv = ["mkfs.ext4", "-q", "-F", *options, str(image)]
    subprocess.run(argv, check=True, capture_output=True, timeout=60)
    return Disk(str(image), mountpoint)


def ganesha_config(mountpoints: list[str], protocols: str, *, udp: bool = False) -> str:
    """A configuration for ganesha 4: what we ship, but for locks, which would need statd."""
    core = (REPOSITORY / "etc" / "ganesha" / "nfsha.conf").read_text(encoding="utf-8")
    wanted = {
        "Protocols = 3;": f"Protocols = {protocols};",
        "Enable_NLM = true;": "Enable_NLM = false;",
        "Enable_UDP = false;": f"Enable_UDP = {str(udp).lower()};",
    }
    for shipped, here in wanted.items():
        if core.count(shipped) != 1:
            raise LabError(f"etc/ganesha/nfsha.conf does not say {shipped!r} once")
        core = core.replace(shipped, here)
    core += "NFSV4 { Graceless=true; }\nLOG { Default_Log_Level=WARN; }\n"
    return core + "".join(
        f"EXPORT {{ Export_Id={number}; Path={path}; Pseudo={path}; Access_Type=RW; Squash=none;"
        f" SecType=sys; Protocols={protocols}; FSAL {{ Name=VFS; }} }}\n"
        for number, path in enumerate(mountpoints, 1)
    )


class NfsServer:
    """rpcbind and ganesha in one place. `udp`: whether it serves UDP too, when it starts next."""

    def __init__(self, place: Place, mountpoints: list[str], protocols: str = "3") -> None:
        self.place = place
        self.mountpoints = mountpoints
        self.protocols = protocols
        self.udp = False
        self.rpcbind: Process | None = None
        self.ganesha: Process | None = None

    def start(self, protocols: str | None = None) -> None:
        """Starts both and waits until NFS answers a NULL call (at most 30 s, else LabError)."""
        self.protocols = protocols or self.protocols
        self.place.path(_CONFIG).write_text(
            ganesha_config(self.mountpoints, self.protocols, udp=self.udp)
        )
        self.start_on_what_is_there()

    def start_on_what_is_there(self) -> None:
        """The same, on the configuration that stands in the place's /etc/ganesha/ganesha.conf."""
        deadline = time.monotonic() + _START_S
        if self.rpcbind is None or not self.rpcbind.alive:
            self.rpcbind = self.place.spawn(["rpcbind", "-w", "-f", "-s"], name="rpcbind")
            self._await(
                self.rpcbind, lambda: self.place.path("/run/rpcbind.sock").exists(), deadline
            )
        log = self.place.logs / "ganesha.log"
        argv: list[str | Path] = ["ganesha.nfsd", "-F", "-f", _CONFIG, "-L", log]
        argv += ["-p", "/run/ganesha.pid"]
        self.ganesha = self.place.spawn(argv, name="ganesha-output")
        self._await(self.ganesha, self.answers, deadline)

    def stop(self) -> None:
        """Ends ganesha (SIGTERM, then SIGKILL after 10 s); rpcbind stays."""
        if self.ganesha is None:
            return
        if self.ganesha.alive:
            try:
                self.ganesha.stop(10.0)
            except LabError:
                self.ganesha.kill()
        self.ganesha = None

    def forget(self) -> None:
        """After a power cut: nothing runs any more."""
        self.rpcbind = self.ganesha = None

    def answers(self, version: int = 3) -> bool:
        """Whether an RPC NULL of this version succeeds on the node's own loopback."""
        return self.place.inside(
            lambda: rpc_null("127.0.0.1", NFS_PORT, _NFS_PROGRAM, version) == 0
        )

    def _await(self, process: Process, ready: Callable[[], bool], deadline: float) -> None:
        while not ready():
            if not process.alive or time.monotonic() > deadline:
                log = self.place.logs / "ganesha.log"
                text = log.read_text(errors="replace")[-2000:] if log.exists() else ""
                raise LabError(
                    f"{process.name} on {self.place.name} does not serve:\n{process.tail()}\n{text}"
                )
            time.sleep(0.01)


def null_call(program: int, version: int, xid: int = 1) -> bytes:
    """An ONC RPC NULL call with its TCP record mark (RFC 5531 sections 9 and 11)."""
    body = struct.pack(">10I", xid, 0, 2, program, version, 0, 0, 0, 0, 0)
    return struct.pack(">I", _LAST_FRAGMENT | len(body)) + body


def rpc_null(
    host: str, port: int, program: int, version: int, timeout_s: float = _RPC_TIMEOUT_S
) -> int | None:
    """RPC NULL over TCP: its accept_stat (0 success, 2 PROG_MISMATCH), or None: no answer."""
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as sock:
            sock.settimeout(timeout_s)
            sock.sendall(null_call(program, version))
            reply = sock.recv(256)
    except OSError:
        return None
    # mark, xid, type 1 (reply), reply_stat 0 (accepted), verifier flavor and length 0, accept_stat
    if len(reply) < 28 or struct.unpack_from(">II", reply, 8) != (1, 0):
        return None
    return int(struct.unpack_from(">I", reply, 24)[0])

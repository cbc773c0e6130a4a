"""A storage node: a place with disks, an NFS service, and the nfsha daemon with its files."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.netns.labkit.holder import Disk
from tests.netns.labkit.network import PLACES, VIP, Address, PlaceAddresses
from tests.netns.labkit.nfs_server import NfsServer
from tests.netns.labkit.place import LabError, Place, Process

_PROGRAM = Path(sys.executable).parent / "nfsha"

STATE = "/var/lib/nfsha"
"""Where the daemon keeps what lasts. A lab may give it a disk of its own."""


class StorageNode(Place):
    """Node a or b. `nfs`: its NFS service; `daemon`: the nfsha started last (None: never)."""

    def __init__(
        self,
        name: str,
        lab_name: str,
        folder: Path,
        disks: tuple[Disk, ...],
        *,
        protocols: str = "3",
        stay: bool = False,
    ) -> None:
        super().__init__(name, lab_name, folder, disks, stay)
        served = [disk.mountpoint for disk in disks if disk.mountpoint != STATE]
        self.nfs = NfsServer(self, served, protocols)
        self.daemon: Process | None = None

    @property
    def addresses(self) -> PlaceAddresses:
        """Its own addresses."""
        return PLACES[self.name]

    def kill_all(self) -> None:
        """See Place; forgets the dead services too."""
        super().kill_all()
        self.nfs.forget()
        self.daemon = None

    def write_config(self, config: str, key: str) -> None:
        """Writes nfsha.toml and cluster.key (0600) in /etc/nfsha; they outlive a power cut."""
        folder = self.path("/etc/nfsha")
        (folder / "nfsha.toml").write_text(config)
        key_file = folder / "cluster.key"
        key_file.touch(0o600)
        key_file.chmod(0o600)
        key_file.write_text(key)

    def start_daemon(self, env: Mapping[str, str] | None = None) -> Process:
        """Starts `nfsha run` on the configuration written last; its output is in `daemon.log`."""
        if self.daemon is not None and self.daemon.alive:
            raise LabError(f"the daemon of {self.name} runs already")
        self.path("/run/nfsha").mkdir(mode=0o750, exist_ok=True)  # systemd's RuntimeDirectory
        self.daemon = self.spawn([_PROGRAM, "run"], name="daemon", env=env)
        return self.daemon

    def nfsha(
        self, *argv: str, check: bool = True, timeout_s: float = 30.0
    ) -> subprocess.CompletedProcess[str]:
        """Runs an nfsha command in the node."""
        return self.run(_PROGRAM, *argv, check=check, timeout_s=timeout_s)

    def status(self) -> dict[str, Any]:
        """`nfsha status --json`, parsed."""
        parsed: dict[str, Any] = json.loads(self.nfsha("status", "--json").stdout)
        return parsed

    def wipe_state(self) -> None:
        """Empties /var/lib/nfsha and /etc/nfsha, as on a node whose system disk was replaced."""
        self.run("find", "/etc/nfsha", "/var/lib/nfsha", "-mindepth", "1", "-delete")

    def add_vip(self, address: str = VIP, announce: bool = True) -> None:
        """By hand, for tests of the lab: adds an address and announces it once."""
        length = 128 if ":" in address else 32
        options = ["nodad"] if ":" in address else []
        self.run("ip", "addr", "add", f"{address}/{length}", "dev", "eth0", *options)
        if announce:
            tell = _neighbour_advertisement if ":" in address else _gratuitous_arp
            self.inside(lambda: tell(self.addresses.lan, address))

    def drop_vip(self, address: str = VIP) -> None:
        """By hand: removes the address."""
        length = 128 if ":" in address else 32
        self.run("ip", "addr", "del", f"{address}/{length}", "dev", "eth0")

    def holds(self, address: str = VIP) -> bool:
        """Whether the address is on the node's interface now."""
        shown = json.loads(self.run("ip", "-j", "addr", "show", "dev", "eth0").stdout)
        return any(entry.get("local") == address for entry in shown[0]["addr_info"])


def _gratuitous_arp(here: Address, address: str) -> None:
    """One broadcast ARP request in which sender and target are the same address (RFC 5944, 4.6)."""
    own = bytes.fromhex(here.mac.replace(":", ""))
    ip = socket.inet_aton(address)
    ethernet = b"\xff" * 6 + own + struct.pack("!H", 0x0806)
    frame = ethernet + struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + own + ip + bytes(6) + ip
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind((here.interface, 0))
        sock.send(frame)


def _neighbour_advertisement(here: Address, address: str) -> None:
    """One unsolicited advertisement that overrides what neighbours know (RFC 4861, 7.2.6)."""
    ip = socket.inet_pton(socket.AF_INET6, address)
    own = bytes.fromhex(here.mac.replace(":", ""))
    # type 136, code, checksum (the kernel's work), override flag; option 2: link-layer address
    message = struct.pack("!BBHI", 136, 0, 0, 0x20000000) + ip + bytes((2, 1)) + own
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        sock.sendto(message, ("ff02::1", 0, 0, socket.if_nametoindex(here.interface)))


def node_config(
    role: str,
    *,
    vips: Sequence[str] = (VIP,),
    profile: str | None = None,
    mounts: Sequence[str] = ("/nfs/data",),
    links: Sequence[str] = ("lan", "hb"),
    witness: Sequence[str] = ("gateway",),
    replication: str = "off",
    top: str = "",
    tables: str = "",
) -> str:
    """A configuration file for node a (role primary) or b (standby).

    top: more lines before the first table; tables: more tables at the end. [timing] and [nfs] are
    made here.
    """
    here, there = ("a", "b") if role == "primary" else ("b", "a")
    pairs = {at.network: at.ipv4 for at in PLACES[here].all()}
    peers = {at.network: at.ipv4 for at in PLACES[there].all()}
    drawn = ", ".join(f'{{local = "{pairs[net]}", peer = "{peers[net]}"}}' for net in links)
    lines = [
        f'role = "{role}"',
        'interface = "eth0"',
        f"vip = {json.dumps(list(vips))}",
        f"witness = {json.dumps(list(witness))}",
        f"links = [{drawn}]",
        f'replication = "{replication}"',
        top,
    ]
    if profile is not None:
        lines += ["[timing]", f'profile = "{profile}"']
    lines += ["[nfs]", f"mounts = {json.dumps(list(mounts))}", tables]
    return "\n".join(line for line in lines if line) + "\n"


def cluster_key() -> str:
    """A fresh key for the key file of both nodes."""
    return os.urandom(32).hex() + "\n"

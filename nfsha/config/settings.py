"""The settings that the rest of nfsha sees: plain frozen values. Nothing here reads or checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeAlias

from nfsha.core.model import Role, Timings

IPAddress: TypeAlias = IPv4Address | IPv6Address

SINGLE_LINK_WITNESS: Final = "single-link-witness"
"""The accepted risk of a pair whose heartbeat links can all be cut by one fault."""

RSYNC: Final = "rsync"
"""`replication`: this nfsha copies the volumes."""

OFF: Final = "off"
"""`replication`: somebody else keeps the two copies equal."""

KNOWN_RISKS: Final = (SINGLE_LINK_WITNESS,)

PROFILES: Final[Mapping[str, Timings]] = MappingProxyType(
    {
        "default": Timings(),
        "fast": Timings(interval_ms=50, hold_ms=300, takeover_after_ms=450, margin_ms=50),
    }
)
"""Shipped sets of timings; keys of [timing] that are given override the profile's."""


@dataclass(frozen=True, slots=True)
class Link:
    """One heartbeat link: UDP between `local` and `peer` on the same `port` of both nodes."""

    name: str
    local: IPAddress
    peer: IPAddress
    port: int
    interface: str | None
    """Sends and listens on this interface only; None leaves it to the routing table."""


@dataclass(frozen=True, slots=True)
class Witness:
    """Who shows that this node is not cut off; each is asked by ARP (or ND) and by ICMP."""

    gateway: bool
    """The gateway of the default route is one."""
    hosts: tuple[IPAddress, ...]


@dataclass(frozen=True, slots=True)
class Nfs:
    """The NFS service that the address leads to, and how its health is checked."""

    root: Path
    mounts: tuple[Path, ...]
    """Mount points that must be mounted before this node serves."""
    nfs_port: int
    mountd_port: int
    check_address: IPAddress
    check_every_ms: int
    check_timeout_ms: int
    check_mountd: bool
    version4: str
    """`refuse`: a server that speaks v4 does not serve; `warn`: it does, with an alarm."""


@dataclass(frozen=True, slots=True)
class Firewall:
    """What closes the NFS ports while this node may not serve."""

    backend: str
    ports: Mapping[str, int]
    """Port of each service, TCP and UDP alike: rpcbind, nfs, mountd, statd, lockd."""

    @property
    def service_lease(self) -> bool:
        """The kernel closes the ports by itself, by a timeout: only nftables can."""
        return self.backend == "nftables"


@dataclass(frozen=True, slots=True)
class Takeover:
    """What the operator decided beforehand about serving without the peer."""

    start_alone_after_ms: int | None
    """A booting node that hears nobody serves after this time; None: never."""
    accept: tuple[str, ...]
    """Risks accepted by name, of `KNOWN_RISKS`."""


@dataclass(frozen=True, slots=True)
class SyncVolume:
    """How one volume is copied: its own table, with what it does not say taken from [sync].

    Exactly one of `every_ms` and `cron` is set.
    """

    path: Path
    every_ms: int | None
    cron: str | None
    """Five fields: minute, hour, day of the month, month, weekday by name; in local time."""
    bandwidth_kib_s: int | None
    """None: unlimited."""


@dataclass(frozen=True, slots=True)
class Sync:
    """How the volumes are copied. Means something only where `replication` is `rsync`.

    Exactly one of `every_ms` and `cron` is set.
    """

    link: str
    """Name of the heartbeat link whose addresses carry the data."""
    port: int
    every_ms: int | None
    cron: str | None
    jitter_ms: int
    full_every_ms: int
    verify_every_ms: int | None
    """None: never."""
    verify_bandwidth_kib_s: int | None
    bandwidth_kib_s: int | None
    """Of each volume's transfer; None: unlimited."""
    parallel: int
    timeout_s: int
    connect_timeout_s: int
    max_deletes: int
    max_deletes_percent: int
    max_data_age_ms: int | None
    """None: no limit."""
    resync: str
    """`automatic`, or `on-failback`: a returned node waits for the operator."""
    quarantine_max_age_ms: int | None
    quarantine_max_bytes: int | None
    quarantine_drop: bool
    """Whether the limits of the quarantine drop entries, or only raise alarms."""
    max_changed_folders: int
    volumes: tuple[SyncVolume, ...]
    """Those with a table of their own; `of` has the answer for any."""

    def of(self, path: Path) -> SyncVolume:
        """How the volume mounted there is copied: by its own table, else like all."""
        own = (volume for volume in self.volumes if volume.path == path)
        return next(own, SyncVolume(path, self.every_ms, self.cron, self.bandwidth_kib_s))


@dataclass(frozen=True, slots=True)
class Hooks:
    """Programs that mount and give up the volumes of a block replica; both, or none."""

    mount: Path | None
    unmount: Path | None
    timeout_ms: int

    @property
    def given(self) -> bool:
        """There are hooks: a node that does not serve has its volumes unmounted."""
        return self.mount is not None


@dataclass(frozen=True, slots=True)
class Handover:
    """How the service is moved on an operator's word."""

    max_stall_ms: int


@dataclass(frozen=True, slots=True)
class Scheduling:
    """How the daemon asks the kernel to be run."""

    realtime: bool
    lock_memory: bool


@dataclass(frozen=True, slots=True)
class Log:
    """What goes to the log."""

    level: str


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the daemon keeps its own files."""

    state: Path
    runtime: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Settings:
    """One node's whole configuration, checked: every value in range, all relations hold."""

    role: Role
    name: str
    interface: str
    vips: tuple[IPAddress, ...]
    links: tuple[Link, ...]
    witness: Witness
    profile: str
    timing: Timings
    nfs: Nfs
    firewall: Firewall
    replication: str
    """`RSYNC` or `OFF`."""
    sync: Sync
    hooks: Hooks
    takeover: Takeover
    handover: Handover
    scheduling: Scheduling
    log: Log
    paths: Paths
    control_group: str

    @property
    def sync_link(self) -> Link:
        """The link whose addresses carry the data."""
        return next(link for link in self.links if link.name == self.sync.link)

    @property
    def disjoint_links(self) -> bool:
        """Two heartbeat links share neither an address nor (as far as given) an interface."""
        return any(
            one.local != two.local
            and one.peer != two.peer
            and (one.interface is None or one.interface != two.interface)
            for one in self.links
            for two in self.links
        )

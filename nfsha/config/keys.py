"""The table of keys: every key of the file stands here once, with kind, default and meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from types import MappingProxyType
from typing import Any, Final

from nfsha.config.kinds import (
    FLAG,
    GROUP,
    HOST,
    INTERFACE,
    NAME,
    OWN_ADDRESS,
    PATH,
    PORT,
    ROLE,
    VIP,
    WITNESS,
    Finding,
    Kind,
    WrongError,
    choice,
    duration,
    duration_or_never,
    list_of,
    one_or_more,
    word_or,
)
from nfsha.config.reading import Key, Reader, optional, required
from nfsha.config.settings import (
    KNOWN_RISKS,
    OFF,
    PROFILES,
    RSYNC,
    SINGLE_LINK_WITNESS,
    IPAddress,
    Link,
    Witness,
)
from nfsha.config.sync_keys import SYNC_KEYS, SYNC_VOLUMES_KEY, VOLUME_KEYS
from nfsha.core.model import Role

_NO_ADDRESS: Final[IPAddress] = IPv4Address(0)
_ANY_INTERFACE: Final[Key[str | None]] = Key(
    "interface",
    Kind(INTERFACE.right, INTERFACE.read),
    None,
    "",
    "as the routing table says",
    "Sends and listens on this interface only.",
)

LINK_KEYS: Final[tuple[Key[Any], ...]] = (
    LINK_LOCAL := required("local", HOST, _NO_ADDRESS, "This node's address on the link."),
    LINK_PEER := required("peer", HOST, _NO_ADDRESS, "The other node's, of the same family."),
    LINK_NAME := Key(
        "name", NAME, "", "", "link1, link2, ...", "How log and status call the link."
    ),
    LINK_PORT := optional("port", PORT, "7910", "The UDP port, the same on both nodes."),
    LINK_INTERFACE := _ANY_INTERFACE,
)
"""The keys of one table of `links`."""


def _read_link(value: object) -> Link:
    """Reads one table of `links`; all its errors at once."""
    if not isinstance(value, dict):
        raise WrongError(("", value, "must be a table with local and peer"))
    reader = Reader({(name,): entry for name, entry in value.items()})
    link = Link(
        name=reader.take(LINK_NAME),
        local=reader.take(LINK_LOCAL),
        peer=reader.take(LINK_PEER),
        port=reader.take(LINK_PORT),
        interface=reader.take(LINK_INTERFACE),
    )
    reader.refuse_unknown(LINK_KEYS)
    findings: list[Finding] = [(f".{name}", what, why) for name, what, why in reader.findings]
    if not findings and link.local.version != link.peer.version:
        findings.append((".peer", str(link.peer), f"must be of the family of local ({link.local})"))
    if not findings and link.local == link.peer:
        findings.append((".peer", str(link.peer), "must differ from local: it is the other node"))
    if findings:
        raise WrongError(*findings)
    return link


_LINK_TABLES: Final = list_of(Kind("a table with local and peer", _read_link), 1, 8)


def _read_links(value: object) -> tuple[Link, ...]:
    """Reads the list and names the nameless: link1, link2, ..."""
    links = [
        replace(link, name=link.name or f"link{number}")
        for number, link in enumerate(_LINK_TABLES.read(value), start=1)
    ]
    names = [link.name for link in links]
    twice = [number for number, name in enumerate(names) if name in names[:number]]
    if twice:
        raise WrongError(
            *(
                (f"[{number + 1}].name", names[number], "must not be given twice")
                for number in twice
            )
        )
    return tuple(links)


LINKS: Final = Kind(_LINK_TABLES.right, _read_links)

KEYS: Final[tuple[Key[Any], ...]] = (
    ROLE_KEY := required(
        "role",
        ROLE,
        Role.PRIMARY,
        "Which of the two this node is; it never changes, and the other node has the other one.",
    ),
    NAME_KEY := Key("name", NAME, "", "", "the role", "How the log and status call this node."),
    INTERFACE_KEY := required(
        "interface", INTERFACE, "", "The network interface that bears the floating address."
    ),
    VIP_KEY := required(
        "vip",
        one_or_more(VIP, 64),
        (),
        "The floating address (or several, which move as one) that clients mount.",
    ),
    WITNESS_KEY := required(
        "witness",
        WITNESS,
        Witness(gateway=False, hosts=()),
        "Who shows that this node is not cut off: the gateway of the default route, or hosts"
        " beside it. Never the other node.",
    ),
    LINKS_KEY := required(
        "links",
        LINKS,
        (),
        "The heartbeat links, at least two that share no cable or switch, one of them on the"
        " network of the floating address.",
    ),
    REPLICATION_KEY := optional(
        "replication",
        choice(RSYNC, OFF),
        '"rsync"',
        "What keeps the two copies equal: this nfsha by rsync, or with `off` something else.",
    ),
    GROUP_KEY := optional(
        "control_group",
        GROUP,
        '"nfsha"',
        "Members of this group may talk to the daemon through its socket.",
    ),
    PROFILE_KEY := optional(
        "timing.profile",
        choice(*PROFILES),
        '"default"',
        "A shipped set of timings that the other keys override; `fast` is for hosts that grant"
        " real-time scheduling.",
    ),
    INTERVAL_KEY := optional(
        "timing.interval",
        duration(20, 5000),
        '"100ms"',
        "Time between two heartbeats on a link.",
    ),
    HOLD_KEY := optional(
        "timing.hold",
        duration(60, 60_000),
        '"600ms"',
        "How long evidence that no other node may take over lets this one serve.",
    ),
    TAKEOVER_AFTER_KEY := optional(
        "timing.takeover_after",
        duration(100, 120_000),
        '"1s"',
        "Silence of the serving node after which this one may take over.",
    ),
    MARGIN_KEY := optional(
        "timing.margin",
        duration(20, 10_000),
        '"100ms"',
        "Reserve for rounding and clocks that run at different rates.",
    ),
    ADDRESS_LEASE_KEY := optional(
        "timing.address_lease",
        duration(1000, 60_000),
        '"2s"',
        "Lifetime of the floating address in the kernel, in whole seconds: a dead daemon's address"
        " is gone after it.",
    ),
    RENEW_EVERY_KEY := optional(
        "timing.renew_every",
        duration(50, 20_000),
        '"300ms"',
        "Time between two renewals of that lifetime.",
    ),
    ABSENCE_KEY := optional(
        "timing.absence",
        duration(1000, 30_000),
        '"8s"',
        "Longest absence that a planned restart of the daemon announces.",
    ),
    IDLE_PEER_KEY := optional(
        "timing.idle_peer",
        duration(100, 60_000),
        '"2s"',
        "How long a peer that is heard but does not serve holds a takeover off.",
    ),
    ROOT_KEY := optional(
        "nfs.root", PATH, '"/nfs"', "The folder under which the volumes are mounted."
    ),
    MOUNTS_KEY := optional(
        "nfs.mounts",
        list_of(PATH, 0, 1024),
        "[]",
        "Mount points at or under the root that must be mounted before this node serves; with"
        " hooks they are looked at only then.",
    ),
    NFS_PORT_KEY := optional("nfs.nfs_port", PORT, "2049", "The port of the NFS server."),
    MOUNTD_PORT_KEY := optional(
        "nfs.mountd_port", PORT, "20048", "The port of mountd; fixed, and the same on both nodes."
    ),
    CHECK_ADDRESS_KEY := optional(
        "nfs.check_address", OWN_ADDRESS, '"127.0.0.1"', "Where the own NFS service is asked."
    ),
    CHECK_EVERY_KEY := optional(
        "nfs.check_every", duration(100, 60_000), '"1s"', "Time between two checks of it."
    ),
    CHECK_TIMEOUT_KEY := optional(
        "nfs.check_timeout",
        duration(100, 60_000),
        '"3s"',
        "How long one answer may take; a busy server is slow, not dead.",
    ),
    CHECK_MOUNTD_KEY := optional(
        "nfs.check_mountd", FLAG, "true", "Whether mountd must answer too before this node serves."
    ),
    VERSION4_KEY := optional(
        "nfs.version4",
        choice("refuse", "warn"),
        '"refuse"',
        "What happens when the NFS server speaks v4, whose clients lose state in a move: this node"
        " does not serve, or serves with an alarm.",
    ),
    BACKEND_KEY := optional(
        "firewall.backend",
        choice("nftables", "iptables"),
        '"nftables"',
        "What closes the NFS ports; iptables cannot close them by a timeout in the kernel and so"
        " needs a longer timing.takeover_after.",
    ),
    RPCBIND_PORT_KEY := optional("firewall.ports.rpcbind", PORT, "111", "The port of rpcbind."),
    NFS_LOCK_PORT_KEY := optional(
        "firewall.ports.nfs", PORT, "2049", "The port of the NFS server.", "(follows nfs.nfs_port)"
    ),
    MOUNTD_LOCK_PORT_KEY := optional(
        "firewall.ports.mountd", PORT, "20048", "The port of mountd.", "(follows nfs.mountd_port)"
    ),
    STATD_PORT_KEY := optional("firewall.ports.statd", PORT, "20049", "The port of statd."),
    LOCKD_PORT_KEY := optional("firewall.ports.lockd", PORT, "20050", "The port of lockd."),
    START_ALONE_KEY := optional(
        "takeover.start_alone_after",
        duration_or_never(5000, 3_600_000),
        '"never"',
        "A booting node that hears nobody serves after this time, without proof that its data is"
        " the newest; with `never` it waits for the peer or for `nfsha activate`.",
    ),
    ACCEPT_KEY := optional(
        "takeover.accept",
        list_of(choice(*KNOWN_RISKS), 0, len(KNOWN_RISKS)),
        "[]",
        f"Risks that you accept by name: `{SINGLE_LINK_WITNESS}` (one fault can cut all heartbeat"
        " links while both nodes reach the witness: then both serve).",
    ),
    *SYNC_KEYS,
    MOUNT_HOOK_KEY := optional(
        "hooks.mount",
        word_or("", PATH),
        '""',
        "The program that mounts (and exports) the volumes of a block replica before this node"
        " serves; none where the volumes are always mounted.",
    ),
    UNMOUNT_HOOK_KEY := optional(
        "hooks.unmount",
        word_or("", PATH),
        '""',
        "The program that gives them up again once this node does not serve any more.",
    ),
    HOOK_TIMEOUT_KEY := optional(
        "hooks.timeout",
        duration(1000, 300_000),
        '"30s"',
        "How long a hook may run; then it is killed, and counts as failed.",
    ),
    MAX_STALL_KEY := optional(
        "handover.max_stall",
        duration(500, 600_000),
        '"10s"',
        "How long a `nfsha failback` or `switchover` may hold the clients: it freezes them only"
        " once the last pass and its proof would fit into it, and ends by itself after twice of"
        " it.",
    ),
    REALTIME_KEY := optional(
        "scheduling.realtime", FLAG, "true", "Ask for SCHED_RR, so that a busy host delays nothing."
    ),
    LOCK_MEMORY_KEY := optional(
        "scheduling.lock_memory", FLAG, "true", "Keep the daemon's memory from being swapped out."
    ),
    LEVEL_KEY := optional(
        "log.level",
        choice("debug", "info", "warning", "error"),
        '"info"',
        "The least important lines that are logged; decisions are at info.",
    ),
    STATE_KEY := optional(
        "paths.state", PATH, '"/var/lib/nfsha"', "The journal and the events; survives boots."
    ),
    RUNTIME_KEY := optional("paths.runtime", PATH, '"/run/nfsha"', "The control socket."),
    SECRET_KEY := optional(
        "paths.key",
        PATH,
        '"/etc/nfsha/cluster.key"',
        "The key that seals the heartbeats, made by `nfsha keygen`; mode 0600.",
    ),
)

TIMING_KEYS: Final[Mapping[str, Key[int]]] = MappingProxyType(
    {
        "interval_ms": INTERVAL_KEY,
        "hold_ms": HOLD_KEY,
        "takeover_after_ms": TAKEOVER_AFTER_KEY,
        "margin_ms": MARGIN_KEY,
        "address_lease_ms": ADDRESS_LEASE_KEY,
        "renew_every_ms": RENEW_EVERY_KEY,
        "absence_ms": ABSENCE_KEY,
        "idle_peer_ms": IDLE_PEER_KEY,
    }
)
"""The field of `Timings` that each key of [timing] sets."""


EACH_TABLE_OF: Final[Mapping[str, tuple[Key[Any], ...]]] = MappingProxyType(
    {LINKS_KEY.name: LINK_KEYS, SYNC_VOLUMES_KEY.name: VOLUME_KEYS}
)
"""The keys that are lists of tables, each with the keys of one of its tables."""


# --------------------------------------------------------------------------- in words


@dataclass(frozen=True, slots=True)
class Description:
    """One key in words, for the reference and the commented default."""

    table: str
    """The table it stands in: empty at the top, `timing`, `links` for the keys of one link."""
    name: str
    """Its own name in that table."""
    right: str
    default: str
    remark: str
    meaning: str


def describe_keys() -> tuple[Description, ...]:
    """Every key, table by table."""
    keys = [(key.name.rpartition("."), key) for key in KEYS]
    for listed, its_keys in EACH_TABLE_OF.items():
        keys += [((listed, ".", key.name), key) for key in its_keys]
    return tuple(
        Description(table, name, key.kind.right, key.default, key.remark, key.meaning)
        for (table, _, name), key in keys
    )

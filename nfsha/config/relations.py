"""Rules between several keys. A broken one names both keys and both numbers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Final

from nfsha.config.keys import (
    ADDRESS_LEASE_KEY,
    LINKS_KEY,
    MOUNT_HOOK_KEY,
    MOUNTD_PORT_KEY,
    MOUNTS_KEY,
    NFS_PORT_KEY,
    RENEW_EVERY_KEY,
    TIMING_KEYS,
    UNMOUNT_HOOK_KEY,
    WITNESS_KEY,
)
from nfsha.config.kinds import Finding
from nfsha.config.problems import Problem, show, show_ms
from nfsha.config.reading import Reader
from nfsha.config.settings import (
    OFF,
    RSYNC,
    SINGLE_LINK_WITNESS,
    IPAddress,
    Settings,
    Sync,
    Witness,
)
from nfsha.config.sync_keys import (
    SYNC_CRON_KEY,
    SYNC_EVERY_KEY,
    SYNC_JITTER_KEY,
    SYNC_LINK_KEY,
    SYNC_MAX_DATA_AGE_KEY,
    SYNC_PORT_KEY,
    SYNC_QUARANTINE_DROP_KEY,
    SYNC_VOLUMES_KEY,
)
from nfsha.core.model import ADDRESS_LATE_MS

_NAMES_SHOWN: Final = 4


@dataclass(frozen=True, slots=True)
class Relation:
    """A rule between several keys; checked only when each of them is well by itself."""

    rule: str
    """For the reference, in one sentence."""
    keys: tuple[str, ...]
    """Keys, or tables whose every key matters."""
    check: Callable[[Settings], Iterator[Problem]]


def applies(relation: Relation, bad: Collection[str]) -> bool:
    """None of the relation's keys is wrong by itself."""
    return not any(
        wrong == key or wrong.startswith(f"{key}.") for wrong in bad for key in relation.keys
    )


SYNC_PLACE: Final = f'`[sync]` goes with `replication = "{RSYNC}"` only.'
"""The rule of `misplaced_sync`, for the reference."""


def misplaced_sync(settings: Settings, reader: Reader) -> Iterator[Finding]:
    """Finds fault with a whole table [sync] that would do nothing."""
    given = [name.removeprefix("sync.") for name in reader.given("sync")]
    if given and settings.replication == OFF:
        names = ", ".join([*given[:_NAMES_SHOWN], *(["..."] if len(given) > _NAMES_SHOWN else [])])
        right = f'must be left out ({names}): with replication = "{OFF}" nfsha copies nothing'
        yield "sync", None, right


def _named(settings: Settings, field: str) -> str:
    return f"{TIMING_KEYS[field].name} ({show_ms(getattr(settings.timing, field))})"


def _at_least(settings: Settings, field: str, least_ms: int, because: str) -> Iterator[Problem]:
    value_ms: int = getattr(settings.timing, field)
    if value_ms < least_ms:
        right = f"must be at least {least_ms}ms = {because}"
        yield Problem(TIMING_KEYS[field].name, show_ms(value_ms), right)


def _check_hold(settings: Settings) -> Iterator[Problem]:
    because = f"2 x {_named(settings, 'interval_ms')}"
    return _at_least(settings, "hold_ms", 2 * settings.timing.interval_ms, because)


def _check_margin(settings: Settings) -> Iterator[Problem]:
    because = _named(settings, "interval_ms")
    return _at_least(settings, "margin_ms", settings.timing.interval_ms, because)


def _check_takeover_after(settings: Settings) -> Iterator[Problem]:
    lease = settings.firewall.service_lease
    terms = [_named(settings, "hold_ms")]
    if lease:
        terms.append(f"2 x {_named(settings, 'interval_ms')}")
    else:
        terms += [_named(settings, "address_lease_ms"), f"{ADDRESS_LATE_MS}ms"]
    because = " + ".join([*terms, _named(settings, "margin_ms")])
    if not lease:
        because += f', since firewall.backend is "{settings.firewall.backend}"'
    least_ms = settings.timing.required_takeover_after_ms(service_lease=lease)
    return _at_least(settings, "takeover_after_ms", least_ms, because)


def _check_address_lease(settings: Settings) -> Iterator[Problem]:
    lease_ms, renew_ms = settings.timing.address_lease_ms, settings.timing.renew_every_ms
    if lease_ms % 1000:
        right = "must be whole seconds, as the kernel counts the lifetime of an address"
        yield Problem(ADDRESS_LEASE_KEY.name, show_ms(lease_ms), right)
    if 3 * renew_ms > lease_ms:
        third = f"a third of {_named(settings, 'address_lease_ms')}"
        right = f"must be at most {lease_ms // 3}ms = {third}"
        yield Problem(RENEW_EVERY_KEY.name, show_ms(renew_ms), right)


def _check_disjoint_links(settings: Settings) -> Iterator[Problem]:
    if SINGLE_LINK_WITNESS in settings.takeover.accept:
        return
    lift = f'or accept the risk: takeover.accept = ["{SINGLE_LINK_WITNESS}"]'
    given = f"({len(settings.links)} given)"
    if not settings.disjoint_links:
        right = (
            "must have two links that share no address and no interface, since a witness"
            f" ({_show_witness(settings.witness)}) cannot tell a cut link from a dead peer; {lift}"
        )
        yield Problem(LINKS_KEY.name, given, right)
    elif all(link.interface not in (None, settings.interface) for link in settings.links):
        right = (
            "must have one link on the floating address's network, that is without interface or"
            f' with interface = "{settings.interface}"; {lift}'
        )
        yield Problem(LINKS_KEY.name, given, right)


def _show_witness(witness: Witness) -> str:
    return ", ".join([*(["gateway"] if witness.gateway else []), *map(str, witness.hosts)])


def _check_addresses(settings: Settings) -> Iterator[Problem]:
    who: dict[IPAddress, str] = dict.fromkeys(settings.vips, "the floating address (vip)")
    peers = {link.peer for link in settings.links}
    for number, link in enumerate(settings.links, start=1):
        for part, address in (("local", link.local), ("peer", link.peer)):
            if address in who:
                right = f"must not be {who[address]}, which moves"
                yield Problem(f"links[{number}].{part}", str(address), right)
        if link.local in peers:
            right = "must not be the peer of another link too"
            yield Problem(f"links[{number}].local", str(link.local), right)
    who |= dict.fromkeys((link.local for link in settings.links), "this node (a link's local)")
    who |= dict.fromkeys(peers, "the other node (a link's peer)")
    for host in settings.witness.hosts:
        if host in who:
            right = f"must be a third machine: {who[host]} can witness nothing"
            yield Problem(WITNESS_KEY.name, str(host), right)


def _check_link_sockets(settings: Settings) -> Iterator[Problem]:
    closed = {port: f"firewall.ports.{name}" for name, port in settings.firewall.ports.items()}
    seen: dict[tuple[IPAddress, int], str] = {}
    for number, link in enumerate(settings.links, start=1):
        name = f"links[{number}].port"
        if link.port in closed:
            right = f"must not be {closed[link.port]} ({link.port}), which is closed at times"
            yield Problem(name, str(link.port), right)
        if (link.local, link.port) in seen:
            other = seen[link.local, link.port]
            right = f"must differ from {other} ({link.port}): both listen on {link.local}"
            yield Problem(name, str(link.port), right)
        seen.setdefault((link.local, link.port), name)


def _check_service_ports(settings: Settings) -> Iterator[Problem]:
    seen: dict[int, str] = {}
    for service, port in settings.firewall.ports.items():
        name = f"firewall.ports.{service}"
        if port in seen:
            yield Problem(name, str(port), f"must differ from {seen[port]} ({port})")
        seen.setdefault(port, name)
    for service, checked, port in (
        ("nfs", NFS_PORT_KEY.name, settings.nfs.nfs_port),
        ("mountd", MOUNTD_PORT_KEY.name, settings.nfs.mountd_port),
    ):
        closed = settings.firewall.ports[service]
        if closed != port:
            right = f"must be {checked} ({port}): the port that is checked is the one that closes"
            yield Problem(f"firewall.ports.{service}", str(closed), right)


def _check_mounts(settings: Settings) -> Iterator[Problem]:
    for number, mount in enumerate(settings.nfs.mounts, start=1):
        if not mount.is_relative_to(settings.nfs.root):
            right = f"must be at or under nfs.root ({show(str(settings.nfs.root))})"
            yield Problem(f"{MOUNTS_KEY.name}[{number}]", show(str(mount)), right)


def _check_hooks(settings: Settings) -> Iterator[Problem]:
    """One complaint at a time: each of them makes the others moot."""
    hooks = settings.hooks
    given = hooks.mount or hooks.unmount
    if given is None:
        return
    if settings.replication == RSYNC:
        right = f'goes with replication = "{OFF}" only: volumes that rsync copies stay mounted'
        yield Problem("hooks", show(str(given)), right)
    elif hooks.mount is None or hooks.unmount is None:
        missing = MOUNT_HOOK_KEY if hooks.mount is None else UNMOUNT_HOOK_KEY
        right = f"is missing: must be given together with the other hook ({show(str(given))})"
        yield Problem(missing.name, "", right)
    elif not settings.nfs.mounts:
        right = "must list what the mount hook mounts: so it is seen whether it did"
        yield Problem(MOUNTS_KEY.name, "[]", right)


def _check_sync_times(settings: Settings) -> Iterator[Problem]:
    sync = settings.sync
    if sync.every_ms is not None and sync.cron is not None:
        right = f"must not stand beside sync.every ({show_ms(sync.every_ms)}): only one can hold"
        yield Problem(SYNC_CRON_KEY.name, show(sync.cron), right)
    for name, every_ms in _intervals(sync):
        if 2 * sync.jitter_ms > every_ms:
            right = f"must be at most {every_ms // 2}ms = half of {name} ({show_ms(every_ms)})"
            yield Problem(SYNC_JITTER_KEY.name, show_ms(sync.jitter_ms), right)
            return


def _intervals(sync: Sync) -> Iterator[tuple[str, int]]:
    """Each interval between passes that is in force, by the name of its key."""
    if sync.every_ms is not None:
        yield SYNC_EVERY_KEY.name, sync.every_ms
    for number, volume in enumerate(sync.volumes, start=1):
        if volume.every_ms is not None:
            yield f"{SYNC_VOLUMES_KEY.name}[{number}].every", volume.every_ms


def _check_sync_link(settings: Settings) -> Iterator[Problem]:
    names = [link.name for link in settings.links]
    if settings.sync.link not in names:
        right = f"must be the name of one of links: {', '.join(names)}"
        yield Problem(SYNC_LINK_KEY.name, show(settings.sync.link), right)


def _check_sync_port(settings: Settings) -> Iterator[Problem]:
    port = settings.sync.port
    for service, closed in settings.firewall.ports.items():
        if closed == port:
            right = f"must not be firewall.ports.{service} ({closed}), which is closed at times"
            yield Problem(SYNC_PORT_KEY.name, str(port), right)


def _check_max_data_age(settings: Settings) -> Iterator[Problem]:
    age_ms = settings.sync.max_data_age_ms
    for name, every_ms in _intervals(settings.sync) if age_ms is not None else ():
        if age_ms is not None and age_ms < 2 * every_ms:
            right = (
                f'must be "never" or at least {show_ms(2 * every_ms)} = 2 x {name}'
                f" ({show_ms(every_ms)}): a copy grows so old between two passes"
            )
            yield Problem(SYNC_MAX_DATA_AGE_KEY.name, show_ms(age_ms), right)
            return


def _check_quarantine_drop(settings: Settings) -> Iterator[Problem]:
    sync = settings.sync
    if sync.quarantine_drop and (sync.quarantine_max_age_ms, sync.quarantine_max_bytes) == (
        None,
        None,
    ):
        right = "must be false where neither quarantine_max_age nor quarantine_max_size is a limit"
        yield Problem(SYNC_QUARANTINE_DROP_KEY.name, "true", right)


def _check_sync_volumes(settings: Settings) -> Iterator[Problem]:
    for number, volume in enumerate(settings.sync.volumes, start=1):
        if not volume.path.is_relative_to(settings.nfs.root):
            right = f"must be at or under nfs.root ({show(str(settings.nfs.root))})"
            name = f"{SYNC_VOLUMES_KEY.name}[{number}].path"
            yield Problem(name, show(str(volume.path)), right)


RELATIONS: Final = (
    Relation(
        "`timing.hold` is at least 2 x `timing.interval`: one lost heartbeat ends nothing.",
        ("timing.profile", "timing.hold", "timing.interval"),
        _check_hold,
    ),
    Relation(
        "`timing.margin` is at least `timing.interval`.",
        ("timing.profile", "timing.margin", "timing.interval"),
        _check_margin,
    ),
    Relation(
        "`timing.takeover_after` is at least `timing.hold` + 2 x `timing.interval` +"
        " `timing.margin`; with `firewall.backend` iptables at least `timing.hold` +"
        f" `timing.address_lease` + {ADDRESS_LATE_MS}ms + `timing.margin`.",
        (
            "timing.profile",
            "timing.takeover_after",
            "timing.hold",
            "timing.interval",
            "timing.margin",
            "timing.address_lease",
            "firewall.backend",
        ),
        _check_takeover_after,
    ),
    Relation(
        "`timing.address_lease` is in whole seconds, `timing.renew_every` at most a third of it.",
        ("timing.profile", "timing.address_lease", "timing.renew_every"),
        _check_address_lease,
    ),
    Relation(
        "With a mere witness two of the `links` share no address and no interface, and one can be"
        f" on `interface`, unless `takeover.accept` has `{SINGLE_LINK_WITNESS}`.",
        ("links", "witness", "interface", "takeover.accept"),
        _check_disjoint_links,
    ),
    Relation(
        "No address is two things at once: `vip`, a link's `local` or `peer`, a witness.",
        ("vip", "links", "witness"),
        _check_addresses,
    ),
    Relation(
        "A link's `port` is none of `firewall.ports`, and no two links share address and port.",
        ("links", "firewall.ports"),
        _check_link_sockets,
    ),
    Relation(
        "`firewall.ports` all differ; its `nfs` and `mountd` are `nfs.nfs_port` and"
        " `nfs.mountd_port`.",
        ("firewall.ports", "nfs.nfs_port", "nfs.mountd_port"),
        _check_service_ports,
    ),
    Relation("`nfs.mounts` are at or under `nfs.root`.", ("nfs.mounts", "nfs.root"), _check_mounts),
    Relation(
        "`hooks.mount` and `hooks.unmount` are given together, or none of them; with"
        f' `replication = "{OFF}"` only, and with all that they mount in `nfs.mounts`.',
        ("hooks", "replication", "nfs.mounts"),
        _check_hooks,
    ),
    Relation(
        "Only one of `sync.every` and `sync.cron` is given; `sync.jitter` is at most half of each"
        " `every`.",
        ("sync.every", "sync.cron", "sync.jitter", "sync.volumes"),
        _check_sync_times,
    ),
    Relation(
        "`sync.link` is the name of one of `links`.", ("sync.link", "links"), _check_sync_link
    ),
    Relation(
        "`sync.port` is none of `firewall.ports`.",
        ("sync.port", "firewall.ports"),
        _check_sync_port,
    ),
    Relation(
        "`sync.max_data_age` is at least twice each `every`.",
        ("sync.max_data_age", "sync.every", "sync.cron", "sync.volumes"),
        _check_max_data_age,
    ),
    Relation(
        "`sync.quarantine_drop` needs `sync.quarantine_max_age` or `sync.quarantine_max_size`.",
        ("sync.quarantine_drop", "sync.quarantine_max_age", "sync.quarantine_max_size"),
        _check_quarantine_drop,
    ),
    Relation(
        "The `path` of each table of `sync.volumes` is at or under `nfs.root`.",
        ("sync.volumes", "nfs.root"),
        _check_sync_volumes,
    ),
)

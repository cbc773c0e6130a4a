"""The configuration: one TOML file becomes validated, frozen settings, or a list of its errors.

It reads that one file and nothing else: it must not look at interfaces, mounts or the peer (the
daemon does, at run time). Every key stands once, in the table of `keys`; what is read, refused and
documented comes from there.
"""

from __future__ import annotations

import stat
import tomllib
from pathlib import Path
from types import MappingProxyType
from typing import Final

from nfsha.config import keys, sync_keys
from nfsha.config.problems import ConfigError, Problem, show, show_ms
from nfsha.config.reading import Reader, flatten, tables_of
from nfsha.config.relations import RELATIONS, applies, misplaced_sync
from nfsha.config.settings import (
    OFF,
    PROFILES,
    RSYNC,
    SINGLE_LINK_WITNESS,
    Firewall,
    Handover,
    Hooks,
    IPAddress,
    Link,
    Log,
    Nfs,
    Paths,
    Scheduling,
    Settings,
    Sync,
    SyncVolume,
    Takeover,
    Witness,
)
from nfsha.core.model import Timings

__all__ = [
    "OFF",
    "RSYNC",
    "ConfigError",
    "Firewall",
    "Handover",
    "Hooks",
    "IPAddress",
    "Link",
    "Log",
    "Nfs",
    "Paths",
    "Problem",
    "Scheduling",
    "Settings",
    "Sync",
    "SyncVolume",
    "Takeover",
    "Witness",
    "load",
    "parse",
    "show_ms",
    "warnings",
]

MAX_FILE_BYTES: Final = 1 << 20
"""A larger file is refused unread: a full configuration with comments has about 10 KiB."""

_LONG_EVERY_MS: Final = 3_600_000
_LONG_FULL_EVERY_MS: Final = 86_400_000
_LONG_HOOK_MS: Final = 60_000
"""TimeoutStopSec= of the shipped service is 90 s: time for a hook, and for its end by force."""
_ALL_PERCENT: Final = 100

MAX_PROBLEMS: Final = 50
"""So many problems are listed; the rest is only counted."""


def load(path: Path | str) -> Settings:
    """Reads and checks one configuration file.

    Raises:
        ConfigError: with every problem found, whatever the file contains or is.
    """
    return parse(_read_file(Path(path)), str(path))


def parse(text: str, source: str = "configuration") -> Settings:
    """Checks the text of a configuration; `source` names it where no key can.

    Raises:
        ConfigError: with every problem found.
    """
    reader = Reader(flatten(_parse_toml(text, source), tables_of(keys.KEYS)))
    settings = _assemble(reader)
    reader.refuse_unknown(keys.KEYS)
    reader.findings += misplaced_sync(settings, reader)
    problems = [Problem(name, show(value), right) for name, value, right in reader.findings]
    for relation in RELATIONS:
        if applies(relation, reader.bad):
            problems += relation.check(settings)
    if len(problems) > MAX_PROBLEMS:
        more = Problem(source, "", f"has {len(problems) - MAX_PROBLEMS} more problems")
        problems = [*problems[:MAX_PROBLEMS], more]
    if problems:
        raise ConfigError(problems)
    return settings


def warnings(settings: Settings) -> tuple[str, ...]:
    """What the operator has accepted and should see in `check-config` and `status`."""
    found = [
        "only a reachability witness arbitrates: the loss of all heartbeat links at once is not"
        " covered; if both nodes reach the witness then, both may serve"
    ]
    if not settings.disjoint_links:
        found.append(
            f'takeover.accept has "{SINGLE_LINK_WITNESS}": the heartbeat links are not disjoint,'
            " so one fault is enough for that"
        )
    if not settings.firewall.service_lease:
        found.append(
            f'firewall.backend is "{settings.firewall.backend}": when the daemon dies, the service'
            " closes only as the address lease ends"
        )
    if settings.nfs.version4 == "warn":
        found.append('nfs.version4 is "warn": clients that use NFS v4 lose state in a move')
    if settings.takeover.start_alone_after_ms is not None:
        found.append(
            f'takeover.start_alone_after is "{show_ms(settings.takeover.start_alone_after_ms)}":'
            " after a common power cut the node with the older data may serve it"
        )
    if settings.profile == "fast" and not settings.scheduling.realtime:
        found.append(
            'timing.profile is "fast" without scheduling.realtime: a busy host may be mistaken for'
            " a dead one"
        )
    if settings.hooks.given and settings.hooks.timeout_ms > _LONG_HOOK_MS:
        found.append(
            f'hooks.timeout is "{show_ms(settings.hooks.timeout_ms)}": a stop of the daemon waits'
            " so long for the unmount hook; give the service a longer TimeoutStopSec too"
        )
    if settings.replication == RSYNC:
        found += _sync_warnings(settings.sync)
    return tuple(found)


def _sync_warnings(sync: Sync) -> list[str]:
    found = []
    if sync.every_ms is not None and sync.every_ms > _LONG_EVERY_MS:
        found.append(
            f'sync.every is "{show_ms(sync.every_ms)}": a takeover may lose as much newest work'
        )
    if sync.full_every_ms > _LONG_FULL_EVERY_MS:
        found.append(
            f'sync.full_every is "{show_ms(sync.full_every_ms)}": what the change journal missed'
            " is missing in the copy for so long"
        )
    if sync.verify_every_ms is None:
        found.append(
            'sync.verify_every is "never": damage on a copy that changes neither size nor time'
            " is never found"
        )
    if sync.max_deletes_percent == _ALL_PERCENT:
        found.append(
            "sync.max_deletes_percent is 100: no number of deletions is held for confirmation"
        )
    if sync.resync == "on-failback":
        found.append(
            'sync.resync is "on-failback": after a takeover there is no replica until `nfsha sync`'
        )
    if sync.quarantine_drop:
        found.append(
            "sync.quarantine_drop is true: files that exist nowhere else are deleted by their age"
            " or size"
        )
    return found


def _read_file(path: Path) -> str:
    def refuse(right: str) -> ConfigError:
        return ConfigError([Problem(str(path), "", right)])

    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise refuse("is not a regular file")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise refuse(f"is larger than {MAX_FILE_BYTES} bytes, so not a configuration of nfsha")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse(f"is not UTF-8 (at byte {error.start})") from None


def _parse_toml(text: str, source: str) -> dict[str, object]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        why = "is nested too deeply"
    except ValueError as error:  # TOMLDecodeError, and integers too long to convert
        words = "".join(one if one.isprintable() else "?" for one in str(error)[:200])
        why = f"is not TOML: {words}"
    raise ConfigError([Problem(source, "", why)])


def _assemble(reader: Reader) -> Settings:
    """Takes every key; what is wrong or missing stands with its default, and in `reader.bad`."""
    role, profile = reader.take(keys.ROLE_KEY), reader.take(keys.PROFILE_KEY)
    links, nfs = reader.take(keys.LINKS_KEY), _assemble_nfs(reader)
    return Settings(
        role=role,
        name=reader.take(keys.NAME_KEY) or str(role),
        interface=reader.take(keys.INTERFACE_KEY),
        vips=reader.take(keys.VIP_KEY),
        links=links,
        witness=reader.take(keys.WITNESS_KEY),
        profile=profile,
        timing=_assemble_timing(reader, PROFILES[profile]),
        nfs=nfs,
        firewall=_assemble_firewall(reader, nfs),
        replication=reader.take(keys.REPLICATION_KEY),
        sync=_assemble_sync(reader, links),
        hooks=Hooks(
            mount=reader.take(keys.MOUNT_HOOK_KEY),
            unmount=reader.take(keys.UNMOUNT_HOOK_KEY),
            timeout_ms=reader.take(keys.HOOK_TIMEOUT_KEY),
        ),
        takeover=Takeover(
            start_alone_after_ms=reader.take(keys.START_ALONE_KEY),
            accept=reader.take(keys.ACCEPT_KEY),
        ),
        handover=Handover(max_stall_ms=reader.take(keys.MAX_STALL_KEY)),
        scheduling=Scheduling(
            realtime=reader.take(keys.REALTIME_KEY),
            lock_memory=reader.take(keys.LOCK_MEMORY_KEY),
        ),
        log=Log(level=reader.take(keys.LEVEL_KEY)),
        paths=Paths(
            state=reader.take(keys.STATE_KEY),
            runtime=reader.take(keys.RUNTIME_KEY),
            key=reader.take(keys.SECRET_KEY),
        ),
        control_group=reader.take(keys.GROUP_KEY),
    )


def _assemble_timing(reader: Reader, profile: Timings) -> Timings:
    return Timings(
        **{
            field: reader.take(key, getattr(profile, field))
            for field, key in keys.TIMING_KEYS.items()
        }
    )


def _assemble_nfs(reader: Reader) -> Nfs:
    return Nfs(
        root=reader.take(keys.ROOT_KEY),
        mounts=reader.take(keys.MOUNTS_KEY),
        nfs_port=reader.take(keys.NFS_PORT_KEY),
        mountd_port=reader.take(keys.MOUNTD_PORT_KEY),
        check_address=reader.take(keys.CHECK_ADDRESS_KEY),
        check_every_ms=reader.take(keys.CHECK_EVERY_KEY),
        check_timeout_ms=reader.take(keys.CHECK_TIMEOUT_KEY),
        check_mountd=reader.take(keys.CHECK_MOUNTD_KEY),
        version4=reader.take(keys.VERSION4_KEY),
    )


def _assemble_firewall(reader: Reader, nfs: Nfs) -> Firewall:
    ports = {
        "rpcbind": reader.take(keys.RPCBIND_PORT_KEY),
        "nfs": reader.take(keys.NFS_LOCK_PORT_KEY, nfs.nfs_port),
        "mountd": reader.take(keys.MOUNTD_LOCK_PORT_KEY, nfs.mountd_port),
        "statd": reader.take(keys.STATD_PORT_KEY),
        "lockd": reader.take(keys.LOCKD_PORT_KEY),
    }
    return Firewall(reader.take(keys.BACKEND_KEY), MappingProxyType(ports))


def _assemble_sync(reader: Reader, links: tuple[Link, ...]) -> Sync:
    every_ms, cron = reader.take(sync_keys.SYNC_EVERY_KEY), reader.take(sync_keys.SYNC_CRON_KEY)
    if every_ms is None and cron is None:
        every_ms = sync_keys.EVERY_OTHERWISE_MS
    bandwidth_kib_s = reader.take(sync_keys.SYNC_BANDWIDTH_KEY)
    volumes = tuple(
        _assemble_volume(table, every_ms, cron, bandwidth_kib_s)
        for table in reader.take(sync_keys.SYNC_VOLUMES_KEY)
    )
    return Sync(
        link=reader.take(sync_keys.SYNC_LINK_KEY) or (links[-1].name if links else ""),
        port=reader.take(sync_keys.SYNC_PORT_KEY),
        every_ms=every_ms,
        cron=cron,
        jitter_ms=reader.take(
            sync_keys.SYNC_JITTER_KEY, _jitter_ms(every_ms, *(one.every_ms for one in volumes))
        ),
        full_every_ms=reader.take(sync_keys.SYNC_FULL_EVERY_KEY),
        verify_every_ms=reader.take(sync_keys.SYNC_VERIFY_EVERY_KEY),
        verify_bandwidth_kib_s=reader.take(sync_keys.SYNC_VERIFY_BANDWIDTH_KEY),
        bandwidth_kib_s=bandwidth_kib_s,
        parallel=reader.take(sync_keys.SYNC_PARALLEL_KEY),
        timeout_s=reader.take(sync_keys.SYNC_TIMEOUT_KEY),
        connect_timeout_s=reader.take(sync_keys.SYNC_CONNECT_TIMEOUT_KEY),
        max_deletes=reader.take(sync_keys.SYNC_MAX_DELETES_KEY),
        max_deletes_percent=reader.take(sync_keys.SYNC_MAX_DELETES_PERCENT_KEY),
        max_data_age_ms=reader.take(sync_keys.SYNC_MAX_DATA_AGE_KEY),
        resync=reader.take(sync_keys.SYNC_RESYNC_KEY),
        quarantine_max_age_ms=reader.take(sync_keys.SYNC_QUARANTINE_MAX_AGE_KEY),
        quarantine_max_bytes=reader.take(sync_keys.SYNC_QUARANTINE_MAX_SIZE_KEY),
        quarantine_drop=reader.take(sync_keys.SYNC_QUARANTINE_DROP_KEY),
        max_changed_folders=reader.take(sync_keys.SYNC_MAX_CHANGED_FOLDERS_KEY),
        volumes=volumes,
    )


def _jitter_ms(*periods_ms: int | None) -> int:
    """What is not said otherwise: 2 s, but never more than half of a period."""
    given = [period_ms for period_ms in periods_ms if period_ms is not None]
    return min([sync_keys.JITTER_OTHERWISE_MS, *(period_ms // 2 for period_ms in given)])


def _assemble_volume(
    table: sync_keys.VolumeTable,
    every_ms: int | None,
    cron: str | None,
    bandwidth_kib_s: int | None,
) -> SyncVolume:
    """Fills in from [sync] what the volume's own table does not say."""
    own_times = table.every_ms is not None or table.cron is not None
    own_bandwidth = table.bandwidth_kib_s != sync_keys.AS_ALL
    return SyncVolume(
        path=table.path,
        every_ms=table.every_ms if own_times else every_ms,
        cron=table.cron if own_times else cron,
        bandwidth_kib_s=table.bandwidth_kib_s if own_bandwidth else bandwidth_kib_s,
    )

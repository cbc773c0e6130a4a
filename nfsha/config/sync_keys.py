"""The keys of [sync] and of its volumes: how the volumes are copied.

A part of the table in `keys`, with the same rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nfsha.config.kinds import (
    CRON,
    FLAG,
    NAME,
    PATH,
    PORT,
    Finding,
    Kind,
    WrongError,
    bandwidth,
    choice,
    duration,
    duration_or_never,
    duration_s,
    list_of,
    number,
    size,
    word_or,
)
from nfsha.config.reading import Key, Reader, optional, required

_HOUR_MS: Final = 3_600_000
_DAY_MS: Final = 24 * _HOUR_MS

_EVERY: Final = duration(1000, _DAY_MS)
_OWN_EVERY: Final[Kind[int | None]] = Kind(_EVERY.right, _EVERY.read)
_BANDWIDTH: Final = word_or("unlimited", bandwidth())

AS_ALL: Final = -1
"""The bandwidth of a volume that has none of its own."""

EVERY_OTHERWISE_MS: Final = 30_000
JITTER_OTHERWISE_MS: Final = 2000
"""`sync.every` where neither it nor `sync.cron` is given."""


@dataclass(frozen=True, slots=True)
class VolumeTable:
    """One table of `sync.volumes` as it was read; what it does not give is taken from [sync]."""

    path: Path
    every_ms: int | None
    cron: str | None
    bandwidth_kib_s: int | None
    """`AS_ALL` where it is not given."""


VOLUME_KEYS: Final[tuple[Key[Any], ...]] = (
    VOLUME_PATH := required(
        "path", PATH, Path("/"), "Where the volume is mounted, at or under `nfs.root`."
    ),
    VOLUME_EVERY := Key("every", _OWN_EVERY, None, "", "as all", "Time between two of its passes."),
    VOLUME_CRON := Key("cron", CRON, None, "", "as all", "Its passes by the clock instead."),
    VOLUME_BANDWIDTH := Key(
        "bandwidth", _BANDWIDTH, AS_ALL, "", "as all", "Bytes per second of its transfers."
    ),
)
"""The keys of one table of `sync.volumes`."""


def _read_volume(value: object) -> VolumeTable:
    """Reads one table of `sync.volumes`; all its errors at once."""
    if not isinstance(value, dict):
        raise WrongError(("", value, "must be a table with path"))
    reader = Reader({(name,): entry for name, entry in value.items()})
    volume = VolumeTable(
        path=reader.take(VOLUME_PATH),
        every_ms=reader.take(VOLUME_EVERY),
        cron=reader.take(VOLUME_CRON),
        bandwidth_kib_s=reader.take(VOLUME_BANDWIDTH),
    )
    reader.refuse_unknown(VOLUME_KEYS)
    findings: list[Finding] = [(f".{name}", what, why) for name, what, why in reader.findings]
    if not findings and volume.every_ms is not None and volume.cron is not None:
        findings.append((".cron", volume.cron, "must not stand beside every: only one can hold"))
    if findings:
        raise WrongError(*findings)
    return volume


_VOLUME_TABLES: Final = list_of(Kind("a table with path", _read_volume), 0, 1024)


def _read_volumes(value: object) -> tuple[VolumeTable, ...]:
    volumes = _VOLUME_TABLES.read(value)
    paths = [volume.path for volume in volumes]
    twice = [number for number, path in enumerate(paths) if path in paths[:number]]
    if twice:
        raise WrongError(
            *((f"[{n + 1}].path", str(paths[n]), "must not be given twice") for n in twice)
        )
    return volumes


def _read_full_every(value: object) -> int:
    if value == "never":
        right = f"must be {_FULL_EVERY.right}: without full walks, what the journal missed stays"
        raise WrongError(("", value, right))
    return _FULL_EVERY.read(value)


_FULL_EVERY: Final = duration(60_000, 7 * _DAY_MS)

SYNC_KEYS: Final[tuple[Key[Any], ...]] = (
    SYNC_LINK_KEY := Key(
        "sync.link",
        NAME,
        "",
        "",
        "the last of `links`",
        "Name of the heartbeat link whose addresses carry the data. It travels authenticated but"
        " not encrypted: use a cable of your own.",
    ),
    SYNC_PORT_KEY := optional(
        "sync.port", PORT, "7911", "The TCP port of the data, the same on both nodes."
    ),
    SYNC_EVERY_KEY := Key(
        "sync.every",
        _OWN_EVERY,
        None,
        '"30s"',
        "",
        "Time between two passes of a volume, and so about the newest work that a takeover can"
        " lose.",
    ),
    SYNC_CRON_KEY := optional(
        "sync.cron",
        CRON,
        '""',
        'Passes by the clock instead of `every`: five fields, such as `"*/5 * * * *"`, in local'
        " time.",
    ),
    SYNC_JITTER_KEY := optional(
        "sync.jitter",
        duration(0, _HOUR_MS),
        '"2s"',
        "Each pass begins up to so much later, so that not all volumes begin at once.",
        "(at most half of each `every`)",
    ),
    SYNC_FULL_EVERY_KEY := optional(
        "sync.full_every",
        Kind(_FULL_EVERY.right, _read_full_every),
        '"6h"',
        "Time between two full walks of a volume; passes between them ask only for the folders"
        " that changed.",
    ),
    SYNC_VERIFY_EVERY_KEY := optional(
        "sync.verify_every",
        duration_or_never(_HOUR_MS, 365 * _DAY_MS),
        '"7d"',
        "Time between two comparisons of all contents by checksum.",
    ),
    SYNC_VERIFY_BANDWIDTH_KEY := optional(
        "sync.verify_bandwidth",
        _BANDWIDTH,
        '"20MB"',
        "Bytes per second that such a comparison reads.",
    ),
    SYNC_BANDWIDTH_KEY := optional(
        "sync.bandwidth",
        _BANDWIDTH,
        '"unlimited"',
        'Bytes per second of one volume\'s transfer, such as `"100MB"`; `parallel` of them run'
        " side by side. `nfsha sync --bandwidth` changes it for a while.",
    ),
    SYNC_PARALLEL_KEY := optional(
        "sync.parallel", number(1, 16), "2", "So many volumes are copied side by side."
    ),
    SYNC_TIMEOUT_KEY := optional(
        "sync.timeout",
        duration_s(5, 3600),
        '"60s"',
        "A transfer during which nothing moves for so long is ended.",
    ),
    SYNC_CONNECT_TIMEOUT_KEY := optional(
        "sync.connect_timeout", duration_s(1, 60), '"5s"', "How long a connection may take."
    ),
    SYNC_MAX_DELETES_KEY := optional(
        "sync.max_deletes",
        number(0, 1_000_000),
        "100",
        "A pass that would delete more files than this, and more than `max_deletes_percent`,"
        " deletes nothing until `nfsha sync --accept-deletes`.",
    ),
    SYNC_MAX_DELETES_PERCENT_KEY := optional(
        "sync.max_deletes_percent", number(0, 100), "10", "The same as a share of the files."
    ),
    SYNC_MAX_DATA_AGE_KEY := optional(
        "sync.max_data_age",
        duration_or_never(10_000, 365 * _DAY_MS),
        '"never"',
        "A node whose copy is older does not take over by itself.",
    ),
    SYNC_RESYNC_KEY := optional(
        "sync.resync",
        choice("automatic", "on-failback"),
        '"automatic"',
        "When a node that was away is brought up to date: by itself, or only by `nfsha sync`.",
    ),
    SYNC_QUARANTINE_MAX_AGE_KEY := optional(
        "sync.quarantine_max_age",
        duration_or_never(_HOUR_MS, 3650 * _DAY_MS),
        '"never"',
        "An older entry of the quarantine raises an alarm.",
    ),
    SYNC_QUARANTINE_MAX_SIZE_KEY := optional(
        "sync.quarantine_max_size",
        word_or("unlimited", size(10**6, 1000 * 10**12)),
        '"unlimited"',
        "A larger quarantine of one volume raises an alarm.",
    ),
    SYNC_QUARANTINE_DROP_KEY := optional(
        "sync.quarantine_drop",
        FLAG,
        "false",
        "Whether these two limits drop the oldest entries instead of raising alarms.",
    ),
    SYNC_MAX_CHANGED_FOLDERS_KEY := optional(
        "sync.max_changed_folders",
        number(1000, 1_000_000),
        "50000",
        "So many changed folders are remembered for a volume; more of them mean a full walk.",
    ),
    SYNC_VOLUMES_KEY := optional(
        "sync.volumes",
        Kind(_VOLUME_TABLES.right, _read_volumes),
        "[]",
        "Volumes that are copied otherwise than the others, each with a table `[[sync.volumes]]`.",
    ),
)
"""The keys of [sync]."""

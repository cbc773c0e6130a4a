"""What is asked of one pass, and what came of it: plain values.

Nothing here runs or looks at a volume.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from nfsha.replica.rsync.arguments import From
from nfsha.replica.rsync.child import Priority
from nfsha.replica.rsync.deletions import DeleteLimits, DeletionPlan
from nfsha.replica.rsync.exits import Verdict
from nfsha.replica.volume.dense import NOTHING_DENSE, DenseFiles

_LONGEST_S: Final = 7 * 24 * 3600


@dataclass(frozen=True, slots=True)
class PassRequest:
    """What one pass is to do.

    `root_fd`: the checked root of the volume; it stays the caller's and open until the end.
    `folders`: relative to it, b"." for itself; each is compared one level deep. None: a full walk.
    `resync_backup`: a folder relative to the root where that goes which the pass overwrites or
    deletes. `longest_s`: no single run of rsync takes longer. `expected_bytes`: how much a first
    copy will be, for its progress. `dense`: which large files the source knows to have no holes; a
    first copy is faster by it. `is_replica`: what is there may be served after a takeover, be
    it empty; so nothing half-received may lie where a client could see it. `priority`: of the runs
    of rsync on this node. `spares`: files with a spare copy (`nfsha.replica.passes.spares`), and
    its size; the pass uses them up.
    """

    uuid: str
    root_fd: int
    source: From
    folders: tuple[bytes, ...] | None
    limits: DeleteLimits
    resync_backup: str | None = None
    bandwidth_kib_s: int | None = None
    timeout_s: int = 60
    connect_timeout_s: int = 5
    checksum: bool = False
    name: str = ""
    longest_s: int = _LONGEST_S
    expected_bytes: int | None = None
    dense: DenseFiles = NOTHING_DENSE
    is_replica: bool = False
    priority: Priority = Priority.LOW
    spares: Mapping[bytes, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PassOutcome:
    """How a pass ended. Counts are of what was done, also when it ended early.

    `exit_code`: rsync's, of the run that gave the verdict. `files`: entries of the volume (of the
    source, after a full walk; else reckoned on from `known_files`). `plan`: what waits, or what was
    deleted; None when nothing was to be deleted or no plan could be made. `sentence` is for people.
    `vanished`: names that went away while they were read. A second look found them gone, or copied
    them, unless the verdict is INCOMPLETE. `brought`: files that the plan named to be copied, and
    their sizes, not more than `deletions.MAX_WANTED`. `looked_s`: what the plan took of `seconds`.
    """

    verdict: Verdict
    exit_code: int
    files: int
    transferred_files: int
    transferred_bytes: int
    wire_bytes: int
    deletions: int
    plan: DeletionPlan | None
    sentence: str
    vanished: tuple[bytes, ...]
    seconds: float
    brought: Mapping[bytes, int] = field(default_factory=dict)
    looked_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Planned:
    """What a pass would do, by a dry run that changed nothing. `deletions` counts files.

    `held`: why `plan` would have to wait. `names`: the first of what would be replaced or deleted.
    `lacking`: what room a resync misses here. `trouble`: why nothing is known. `differ`: how many
    things the pass would copy, delete or set right in whatever way; `first` is the name of one.
    `large_bytes`: the sizes of the large files (as a spare is for) among what would be copied.
    """

    copy_files: int = 0
    copy_bytes: int = 0
    deletions: int = 0
    replaced: int = 0
    names: tuple[bytes, ...] = ()
    plan: DeletionPlan | None = None
    held: str = ""
    lacking: str = ""
    trouble: str = ""
    differ: int = 0
    large_bytes: int = 0
    first: bytes = b""

"""What is mounted at and below a folder, as /proc/self/mountinfo tells it (man 5 proc).

It reads that one file (and resolves the folder's own name) and touches no filesystem below, so a
hung one cannot hold it up. It knows nothing of volumes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MOUNTINFO: Final = Path("/proc/self/mountinfo")
_ESCAPED: Final = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo. `device_number` as st_rdev has it (for btrfs: of no real device)."""

    mount_id: int
    parent_id: int
    device_number: int
    subtree: str  # which folder of the filesystem is its root here: "/" unless bound or a subvolume
    mount_point: str
    options: tuple[str, ...]  # of this mount
    fstype: str
    source: str
    super_options: tuple[str, ...]  # of the filesystem, wherever it is mounted


def read_mounts(mountinfo: Path = MOUNTINFO) -> tuple[Mount, ...]:
    """Returns all mounts, in the kernel's order. OSError if /proc cannot be read."""
    return tuple(_mount(line) for line in _lines(mountinfo))


def mount_id_of(fd: int) -> int:
    """Returns the id of the mount on which an open file or folder is. OSError without /proc."""
    text = Path(f"/proc/self/fdinfo/{fd}").read_bytes()
    lines = (line.split() for line in text.splitlines())
    return next(int(words[1]) for words in lines if words[0] == b"mnt_id:")


def mount_of(fd: int, mountinfo: Path = MOUNTINFO) -> Mount | None:
    """Returns the mount on which an open file or folder is; None when it is unmounted meanwhile."""
    begin = b"%d " % mount_id_of(fd)
    return next((_mount(line) for line in _lines(mountinfo) if line.startswith(begin)), None)


def visible(mounts: Sequence[Mount]) -> tuple[Mount, ...]:
    """Returns those that a path leads to: not the ones that a later mount covers."""
    by_id = {mount.mount_id: mount for mount in mounts}
    places = {(mount.parent_id, mount.mount_point) for mount in mounts}
    known: dict[int, bool] = {}
    return tuple(
        mount
        for mount in mounts
        if (mount.mount_id, mount.mount_point) not in places  # nothing stacked on its root
        and _reachable(mount, by_id, places, known)
    )


def at_and_below(mounts: Iterable[Mount], folder: str) -> tuple[Mount | None, tuple[Mount, ...]]:
    """Returns the visible mount that `folder` itself is on, and those below it, by path.

    `folder` is absolute and without symbolic links.
    """
    inside = folder.rstrip("/") + "/"
    own: Mount | None = None
    below = []
    for mount in mounts:
        point = mount.mount_point
        if point.startswith(inside) and point != folder:
            below.append(mount)
        elif _leads_to(point, folder) and (own is None or len(point) >= len(own.mount_point)):
            own = mount
    return own, tuple(sorted(below, key=lambda mount: mount.mount_point))


def _leads_to(point: str, folder: str) -> bool:
    return folder == point or folder.startswith(point.rstrip("/") + "/")


def _reachable(
    mount: Mount, by_id: dict[int, Mount], places: set[tuple[int, str]], known: dict[int, bool]
) -> bool:
    """Whether no later mount covers a folder on the way to it, here or further up."""
    chain = []
    found = True
    while True:
        if mount.mount_id in known:
            found = known[mount.mount_id]
            break
        chain.append(mount.mount_id)
        parent = by_id.get(mount.parent_id)
        if _covered(mount, parent, places):
            found = False
            break
        if parent is None or parent is mount or len(chain) > len(by_id):
            break
        mount = parent
    known.update(dict.fromkeys(chain, found))
    return found


def _covered(mount: Mount, parent: Mount | None, places: set[tuple[int, str]]) -> bool:
    """A sibling on a folder above: had it been there first, this mount would be the sibling's."""
    top = "" if parent is None else parent.mount_point.rstrip("/")
    above = mount.mount_point.rpartition("/")[0]
    while len(above) > len(top):
        if (mount.parent_id, above) in places:
            return True
        above = above.rpartition("/")[0]
    # Stacked on the parent's own root, over the folder that this mount is in.
    return (
        parent is not None
        and mount.mount_point != parent.mount_point
        and (mount.parent_id, parent.mount_point) in places
    )


def _lines(mountinfo: Path) -> list[bytes]:
    """The kernel escapes blanks and newlines, but not the carriage return of splitlines()."""
    return [line for line in mountinfo.read_bytes().split(b"\n") if line]


def _mount(line: bytes) -> Mount:
    fields = line.split(b" ")
    end = fields.index(b"-", 6)  # optional fields end with a single hyphen
    major, minor = fields[2].split(b":")
    return Mount(
        mount_id=int(fields[0]),
        parent_id=int(fields[1]),
        device_number=os.makedev(int(major), int(minor)),
        subtree=_text(fields[3]),
        mount_point=_text(fields[4]),
        options=tuple(_text(fields[5]).split(",")),
        fstype=_text(fields[end + 1]),
        source=_text(fields[end + 2]),
        super_options=tuple(_text(fields[end + 3]).split(",")),
    )


def _text(field: bytes) -> str:
    if b"\\" in field:
        field = _ESCAPED.sub(lambda found: bytes([int(found[1], 8)]), field)
    return os.fsdecode(field)

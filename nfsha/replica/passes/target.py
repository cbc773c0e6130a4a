"""What a pass does in the root of its target beside rsync: names, parts, room. All of it blocks.

By the root's open descriptor only. It starts nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from nfsha.replica.files.beneath import look_at, make_private, parent_of, parts_of
from nfsha.replica.files.own_names import INCOMING, OWN_ROOT_NAMES, PARTIAL
from nfsha.replica.passes.request import PassRequest
from nfsha.replica.rsync.arguments import folder_list
from nfsha.replica.volume.dense import DenseFiles
from nfsha.replica.volume.mountinfo import at_and_below, read_mounts, visible

_FEW_INODES: Final = 16


def folders_of(request: PassRequest) -> bytes:
    """The list of a pass by folders; empty for a full walk. It blocks; OSError."""
    if request.folders is None:
        return b""
    return folder_list(of_this_volume(request.root_fd, request.folders))


def of_this_volume(root_fd: int, names: Sequence[bytes]) -> list[bytes]:
    """Those that belong to this volume: not its own files, and nothing mounted inside it.

    Raises OSError EINVAL for what is no plain name: a list with a mistake in it is no list.
    """
    inside = _mounted_inside(root_fd)
    kept = []
    for name in names:
        try:
            parts = () if name == b"." else parts_of(name.rstrip(b"/"))
        except ValueError as error:
            raise OSError(errno.EINVAL, f"in the list of changed folders one {error}") from error
        if (parts[:1] and parts[0] in OWN_ROOT_NAMES) or PARTIAL in parts:
            continue
        if not any(parts[: len(mount)] == mount for mount in inside):
            kept.append(name)
    return kept


def _mounted_inside(root_fd: int) -> list[tuple[bytes, ...]]:
    root = str(Path(f"/proc/self/fd/{root_fd}").readlink())
    _, below = at_and_below(visible(read_mounts()), root)
    begin = len(os.fsencode(root.rstrip("/"))) + 1
    return [tuple(os.fsencode(mount.mount_point)[begin:].split(b"/")) for mount in below]


def shortage(root_fd: int) -> str:
    """What a full volume lacks, and what helps."""
    found = os.fstatvfs(root_fd)
    free_mib = found.f_bavail * found.f_frsize >> 20
    size_mib = found.f_blocks * found.f_frsize >> 20
    lack = f"{free_mib} of {size_mib} MiB are free now"
    few = max(_FEW_INODES, found.f_files // 1000)
    if found.f_files and found.f_favail < few and free_mib * 100 > size_mib:
        lack = f"hardly an inode is left ({found.f_favail} of {found.f_files} are free)"
    return (
        f"the volume on this node is full: {lack}; make its filesystem as large as the"
        " source's, or drop what is in its quarantine; the next pass goes on where this one ended"
    )


def make_incoming(root_fd: int) -> None:
    """An empty folder for what is being received, in place of what a cut pass left."""
    with _times_kept(root_fd):
        _remove_incoming(root_fd)
        os.close(make_private(root_fd, INCOMING))


def drop_incoming(root_fd: int) -> None:
    """Removes that folder and what is in it."""
    with _times_kept(root_fd):
        _remove_incoming(root_fd)


def _remove_incoming(root_fd: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(INCOMING, dir_fd=root_fd)


def remove_grown(root_fd: int, dense: DenseFiles) -> None:
    """Those that are longer than the source said: the disk may be nearly full with them."""
    for name, told_bytes in dense.files:
        found = look_at(root_fd, name)
        if found is not None and found.st_size > told_bytes and stat.S_ISREG(found.st_mode):
            with parent_of(root_fd, name) as (folder, last):
                os.unlink(last, dir_fd=folder)


@contextlib.contextmanager
def _times_kept(root_fd: int) -> Iterator[None]:
    """Else each pass would find the root changed by the one before."""
    before = os.fstat(root_fd)
    try:
        yield
    finally:
        os.utime(root_fd, ns=(before.st_atime_ns, before.st_mtime_ns))

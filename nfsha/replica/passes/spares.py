"""Spare copies of large files: so that the last pass writes what changed, and not all of them anew.

rsync never changes a file in its place here: one that grew by a line is written anew as a whole,
and renamed over the old one. While clients are held that is too slow for a large file. So a second
copy of it is made before, where rsync keeps the part of a file that was cut: such a part rsync does
change in its place (receiver.c, `one_inplace`), compares as a whole with the source's checksum, and
renames over the file. What clients may be served after a takeover is never half of one and half of
another. All of it blocks.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Iterable, Mapping
from typing import Final

from nfsha.replica.files.beneath import make_private, parent_of, same_times, step_into
from nfsha.replica.files.own_names import PARTIAL

LEAST_BYTES: Final = 64 << 20
"""A smaller file is written anew in a tenth of a second or two."""

MAX_GROWTH_BYTES: Final = 256 << 20
"""One that has grown by more since its spare was made may have got holes: they are looked for."""

ROOM_SHARE: Final = 2
"""A spare takes at most this part of what is free: half."""

_CHUNK_BYTES: Final = 8 << 20
_SYNC_EVERY_BYTES: Final = 64 << 20
_BLOCK_BYTES: Final = 512  # as stat(2) counts
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


def large(sizes: Mapping[bytes, int]) -> list[bytes]:
    """The files that are large enough, the largest first."""
    found = [name for name, size in sizes.items() if size >= LEAST_BYTES]
    return sorted(found, key=lambda name: -sizes[name])


def make(root_fd: int, name: bytes, stop: threading.Event) -> int:
    """Makes a spare of a file, durable; its size, or 0 where the file is none that needs one.

    Only of a file with one name, without holes, and where there is room. `stop` ends it early, then
    nothing is left. Raises OSError.
    """
    with parent_of(root_fd, name) as (folder, last):
        fd = os.open(last, _FILE, dir_fd=folder)
        try:
            found = os.fstat(fd)
            if not _is_worth_it(root_fd, found):
                return 0
            with same_times(folder):
                size, trouble = _tried(folder, last, fd, stop)
        finally:
            os.close(fd)
    if trouble is not None:
        raise trouble
    return size


def drop(root_fd: int, names: Iterable[bytes]) -> None:
    """Removes the spares that are left of these files. Raises OSError."""
    for name in names:
        with (
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            parent_of(root_fd, name) as (folder, last),
        ):
            if _is_there(folder, last):
                with same_times(folder):
                    _drop_in(folder, last)


def _is_worth_it(root_fd: int, found: os.stat_result) -> bool:
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_size < LEAST_BYTES:
        return False
    room = os.fstatvfs(root_fd)
    fits = found.st_size * ROOM_SHARE <= room.f_bavail * room.f_frsize
    return fits and found.st_blocks * _BLOCK_BYTES >= found.st_size


def _tried(folder: int, last: bytes, fd: int, stop: threading.Event) -> tuple[int, OSError | None]:
    """What came of it; of what failed nothing is left."""
    _drop_in(folder, last)
    size, trouble = 0, None
    try:
        size = _make_in(folder, last, fd, stop)
    except OSError as error:
        trouble = error
    if not size:
        _drop_in(folder, last)
    return size, trouble


def _make_in(folder: int, last: bytes, fd: int, stop: threading.Event) -> int:
    try:
        parts = make_private(folder, PARTIAL)
    except FileExistsError:
        parts = step_into(folder, PARTIAL)
    try:
        new = os.open(last, _NEW, 0o600, dir_fd=parts)
        try:
            return _copy(fd, new, stop)
        finally:
            os.close(new)
    finally:
        os.close(parts)


def _copy(fd: int, new: int, stop: threading.Event) -> int:
    """Copies in the kernel; XFS shares the blocks. 0 when it was stopped."""
    done = unsynced = 0
    while count := os.copy_file_range(fd, new, _CHUNK_BYTES):
        done, unsynced = done + count, unsynced + count
        if unsynced >= _SYNC_EVERY_BYTES:  # else the last pass would wait for the disk
            os.fdatasync(new)
            unsynced = 0
        if stop.is_set():
            return 0
    os.fdatasync(new)
    return done


def _is_there(folder: int, last: bytes) -> bool:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.stat(PARTIAL + b"/" + last, dir_fd=folder, follow_symlinks=False)
        return True
    return False


def _drop_in(folder: int, last: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):
        parts = step_into(folder, PARTIAL)
        try:
            os.unlink(last, dir_fd=parts)
        finally:
            os.close(parts)
        with contextlib.suppress(OSError):  # other parts are in it
            os.rmdir(PARTIAL, dir_fd=folder)

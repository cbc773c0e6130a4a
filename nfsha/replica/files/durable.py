"""Small files that survive a power cut, and are whole: written aside, fsynced, then renamed.

It knows nothing of what is in them. One writer at a time for each file: two would share the
temporary one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import Final

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK so that a FIFO in this place cannot stop us; O_NOFOLLOW because a rename would replace
# a symbolic link instead of the file behind it.
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


def write_durably(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replaces `path`: when this returns, `data` is there after a power cut too. It blocks.

    `mode` is exact (no umask). Raises OSError; the old content then stands, except when the fsync
    of the folder failed: then either of the two may be there after a power cut.
    """
    folder = os.open(path.parent, _FOLDER)
    try:
        write_durably_at(folder, path.name, data, mode=mode)
    finally:
        os.close(folder)


def write_durably_at(folder: int, name: str, data: bytes, *, mode: int = 0o644) -> None:
    """As `write_durably`, for a name in a folder that is open already: no path is walked."""
    temporary = temporary_name(name)
    try:
        _write_new(folder, temporary, data, mode)
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise
    os.fsync(folder)


def names_after(folder: Path, prefix: str) -> set[str]:
    """What follows the prefix in the names that have it; nothing of a folder that is not there."""
    if not folder.is_dir():
        return set()
    names = [one.name for one in folder.iterdir()]
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def read_small(path: Path, limit_bytes: int) -> bytes:
    """Returns the content of a regular file of at most `limit_bytes`; OSError for anything else.

    EFBIG when it is larger, EINVAL when it is no regular file, ELOOP when it is a symbolic link.
    """
    return _read(os.open(path, _READ), limit_bytes)


def read_small_at(folder: int, name: str, limit_bytes: int) -> bytes:
    """As `read_small`, for a name in a folder that is open already."""
    return _read(os.open(name, _READ, dir_fd=folder), limit_bytes)


def temporary_name(name: str) -> str:
    """Under which name a file is written before it takes its own; a crash may leave it."""
    return f"{name}.new" if name.startswith(".") else f".{name}.new"


def _write_new(folder: int, name: str, data: bytes, mode: int) -> None:
    # Removed first: what a crash (or anybody else) left under this name is not written through.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
    fd = os.open(name, _CREATE, 0o600, dir_fd=folder)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fchmod(fd, mode)
        os.fsync(fd)
    finally:
        os.close(fd)


def _read(fd: int, limit_bytes: int) -> bytes:
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        with open(fd, "rb", closefd=False) as file:
            data = file.read(limit_bytes + 1)
    finally:
        os.close(fd)
    if len(data) > limit_bytes:
        raise OSError(errno.EFBIG, f"it has more than {limit_bytes} bytes")
    return data

"""Files below a folder that is open already: the only way in which nfsha touches a client's tree.

Clients make symbolic links and rename folders while we look. So every step goes from one open
folder to the next by name, follows no link, and never leaves the filesystem where it began. It must
not take paths from the root of the machine, nor decide what may be touched.

Names are bytes, as the kernel has them; `shown` makes text of one that is safe on a terminal and in
JSON, and `from_shown` makes the same bytes of it again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import stat
from collections.abc import Iterator
from itertools import islice
from typing import Final

MAX_NAME_BYTES: Final = 4095  # PATH_MAX less its end (linux/limits.h)
BATCH: Final = 4096
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_RENAME_NOREPLACE: Final = 1  # linux/fs.h
_ACLS: Final = ("system.posix_acl_access", "system.posix_acl_default")
_KEPT: Final = ("user.", "trusted.", "security.", *_ACLS)
_TWICE: Final = "trusted.SGI_ACL_"  # as which xfs shows each ACL once more
_libc = ctypes.CDLL(None, use_errno=True)


def parts_of(name: bytes) -> tuple[bytes, ...]:
    """The components of a name relative to the folder. ValueError if it is not plain and inside."""
    parts = tuple(name.split(b"/"))
    if len(name) > MAX_NAME_BYTES or b"\0" in name:
        raise ValueError("longer than a path may be, or with a zero byte in it")
    if any(part in (b"", b".", b"..") for part in parts):
        raise ValueError("not a plain name relative to the volume's root")
    return parts


def open_folder(base: int, name: bytes = b"") -> int:
    """Opens the folder `name` below `base` (b"": `base` itself); the caller closes it.

    Raises OSError: ENOTDIR or ELOOP where a component is no folder or is a symbolic link, EXDEV
    where another filesystem is mounted, ENOENT; ValueError as `parts_of` does.
    """
    fd = os.open(b".", _FOLDER, dir_fd=base)
    for part in parts_of(name) if name else ():
        try:
            deeper = step_into(fd, part)
        finally:
            os.close(fd)
        fd = deeper
    return fd


def step_into(folder: int, part: bytes) -> int:
    """Opens one folder in an open one, on the same filesystem; the caller closes it. OSError."""
    fd = os.open(part, _FOLDER, dir_fd=folder)
    if os.fstat(fd).st_dev != os.fstat(folder).st_dev:
        os.close(fd)
        raise OSError(errno.EXDEV, "another filesystem is mounted there")
    return fd


@contextlib.contextmanager
def folder_at(base: int, name: bytes = b"") -> Iterator[int]:
    """`open_folder` for the length of a block."""
    fd = open_folder(base, name)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def parent_of(base: int, name: bytes) -> Iterator[tuple[int, bytes]]:
    """The open folder in which `name` is, or would be, and its last component."""
    parts = parts_of(name)
    with folder_at(base, b"/".join(parts[:-1])) as fd:
        yield fd, parts[-1]


def look_at(base: int, name: bytes) -> os.stat_result | None:
    """What lstat(2) says of a name below `base`; None if it is not there. OSError."""
    try:
        with parent_of(base, name) as (folder, last):
            return os.stat(last, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def batches(folder: int, size: int = BATCH) -> Iterator[list[os.DirEntry[str]]]:
    """The entries of an open folder, `size` at a time; those seen may be removed meanwhile."""
    # What came since it was opened is told only after a rewind (readdir(3p)); btrfs means it.
    os.lseek(folder, 0, os.SEEK_SET)
    with os.scandir(folder) as entries:
        while batch := list(islice(entries, size)):
            yield batch


def rename_noreplace(from_folder: int, old: bytes, to_folder: int, new: bytes) -> None:
    """renameat2(2) with RENAME_NOREPLACE: atomic; FileExistsError if anything has the new name."""
    if _libc.renameat2(from_folder, old, to_folder, new, _RENAME_NOREPLACE) != 0:
        raise _last_error()


def sync_filesystem(fd: int) -> None:
    """syncfs(2): when it returns, all that was changed on that filesystem is durable. OSError."""
    if _libc.syncfs(fd) != 0:
        raise _last_error()


def copy_attributes(source: int, target: int) -> None:
    """Gives a folder of `make_private` owner, mode, xattrs and ACLs of another; not times. OSError.

    Both are open.
    """
    found = os.fstat(source)
    wanted = {name: os.getxattr(source, name) for name in _xattrs(source)}
    os.fchown(target, found.st_uid, found.st_gid)
    os.fchmod(target, stat.S_IMODE(found.st_mode))
    for name, value in wanted.items():
        os.setxattr(target, name, value)


def copy_times(found: os.stat_result, target: int) -> None:
    """Gives an open folder the times that another has, or had. OSError."""
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))


@contextlib.contextmanager
def same_times(folder: int) -> Iterator[None]:
    """What is made in the folder meanwhile, or removed, leaves its times as they are. OSError."""
    before = os.fstat(folder)
    yield
    copy_times(before, folder)


def make_private(folder: int, part: bytes) -> int:
    """Makes a folder of mode 0700 without what it would inherit, and opens it. OSError."""
    os.mkdir(part, 0o700, dir_fd=folder)
    fd = step_into(folder, part)
    try:
        for name in _xattrs(fd):
            if name in _ACLS:
                os.removexattr(fd, name)
        os.fchown(fd, os.geteuid(), os.getegid())
        os.fchmod(fd, 0o700)
    except BaseException:
        os.close(fd)
        raise
    return fd


def shown(name: bytes) -> str:
    """Text for people and JSON: what cannot be printed, and the backslash, in hex."""
    text = name.decode("utf-8", "surrogateescape")
    return "".join(one if one.isprintable() and one != "\\" else _escaped(one) for one in text)


def from_shown(text: str) -> bytes:
    """The bytes of a name that `shown` wrote. ValueError for a backslash with anything else."""
    if re.search(r"\\(?!x[0-9a-f]{2})", text):
        raise ValueError(f"a backslash in {text!r} is not followed by x and two hex digits")
    pieces = re.split(r"\\x([0-9a-f]{2})", text)
    plain, escaped = pieces[0::2], [*pieces[1::2], ""]
    return b"".join(
        one.encode() + bytes.fromhex(two) for one, two in zip(plain, escaped, strict=True)
    )


def _escaped(character: str) -> str:
    data = character.encode("utf-8", "surrogateescape")
    return "".join(f"\\x{byte:02x}" for byte in data)


def _xattrs(fd: int) -> list[str]:
    try:
        found = os.listxattr(fd)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return []
        raise
    return [name for name in found if name.startswith(_KEPT) and not name.startswith(_TWICE)]


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))

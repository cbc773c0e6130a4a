"""The file handles of a few known files, to tell a copy of files from a copy of blocks.

A file handle holds the inode's number and generation. Copied files have others, so an old handle
gives ESTALE after a move. On a filesystem that was cloned block by block the old handles are good;
once files are copied over it they name whatever the copy put there. btrfs counts its generations
up, so that two fresh filesystems have equal handles by chance: the time of birth, which no copy
takes along, tells them from a clone. It opens nothing by a handle and changes nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nfsha.nfs.facts import Document, Fields, Objection

FOLDERS_MAX: Final = 16
_ENTRIES_MAX: Final = 20_000
_ROOT_OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_HANDLE_BYTES: Final = 128  # MAX_HANDLE_SZ, linux/exportfs.h
_HEADER: Final = struct.Struct("Ii")  # struct file_handle: handle_bytes, handle_type
_MADE_BY_MKFS: Final = frozenset({"lost+found"})  # the same inode, generation 0, on every ext4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.name_to_handle_at.argtypes = [
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_int),
    ctypes.c_int,
]
_libc.statx.argtypes = [
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_char_p,
]
_AT_EMPTY_PATH: Final = 0x1000
_AT_SYMLINK_NOFOLLOW: Final = 0x100
_STATX_BTIME: Final = 0x800  # linux/stat.h, as what follows
_STATX_BYTES: Final = 256
_STATX_MASK: Final = struct.Struct("I")
_STATX_BIRTH: Final = struct.Struct("qI")
_STATX_BIRTH_AT: Final = 80
_NS_MAX: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Handle:
    """The name of something in a volume's root, its handle in hexadecimal, and its birth.

    `birth_ns` is in nanoseconds since 1970; 0: the filesystem does not keep it.
    """

    name: str
    handle: str
    birth_ns: int


@dataclass(frozen=True, slots=True)
class HandleFacts:
    """Handles in one volume's root. `trouble` says why they could not be had."""

    volume: str
    handles: tuple[Handle, ...]
    trouble: str = ""


def read_handles(volume: str, root: Path, files: Sequence[str]) -> HandleFacts:
    """Takes the handles of these files and of the first sixteen folders by name. Raises nothing.

    `files` that are missing are left out, as is what is another filesystem. It blocks as long as
    the filesystem does not answer.
    """
    try:
        fd = os.open(root, _ROOT_OPEN)
    except OSError as error:
        return HandleFacts(volume, (), f"{root}: {error.strerror}")
    try:
        folders = _folders(fd)
        names = [*sorted(files), *(name for name in folders if name not in files)]
        own_mount = _handle_at(fd, "")[1]
        found = [(name, *_handle_at(fd, name)) for name in names if _is_there(fd, name)]
        handles = tuple(
            Handle(name, raw.hex(), _birth_ns(fd, name))
            for name, raw, mount in found
            if mount == own_mount
        )
    except OSError as error:
        return HandleFacts(volume, (), f"{root}: {error.strerror}")
    finally:
        os.close(fd)
    return HandleFacts(volume, handles)


def _folders(fd: int) -> list[str]:
    names = []
    with os.scandir(fd) as entries:
        for count, entry in enumerate(entries):
            if count == _ENTRIES_MAX:
                break
            if entry.is_dir(follow_symlinks=False) and entry.name not in _MADE_BY_MKFS:
                names.append(entry.name)
    return sorted(names)[:FOLDERS_MAX]


def _is_there(fd: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _handle_at(fd: int, name: str) -> tuple[bytes, int]:
    """The handle and the id of its mount (name_to_handle_at(2)). Raises OSError."""
    buffer = ctypes.create_string_buffer(_HEADER.size + _MAX_HANDLE_BYTES)
    _HEADER.pack_into(buffer, 0, _MAX_HANDLE_BYTES, 0)
    mount = ctypes.c_int()
    flags = 0 if name else _AT_EMPTY_PATH
    if _libc.name_to_handle_at(fd, os.fsencode(name), buffer, ctypes.byref(mount), flags) != 0:
        number = ctypes.get_errno()
        if number == errno.EOPNOTSUPP:
            raise OSError(number, "its filesystem has no file handles")
        raise OSError(number, os.strerror(number))
    return buffer.raw[: _HEADER.size + _HEADER.unpack_from(buffer)[0]], mount.value


def _birth_ns(fd: int, name: str) -> int:
    """When it was made (statx(2)), or 0. Raises OSError."""
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    path = os.fsencode(name)
    if _libc.statx(fd, path, _AT_SYMLINK_NOFOLLOW, _STATX_BTIME, buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    if not _STATX_MASK.unpack_from(buffer)[0] & _STATX_BTIME:
        return 0
    seconds, nanoseconds = _STATX_BIRTH.unpack_from(buffer, _STATX_BIRTH_AT)
    return max(0, int(seconds) * 1_000_000_000 + int(nanoseconds))


def clone_objections(here: HandleFacts, there: HandleFacts) -> tuple[Objection, ...]:
    """Says whether the two are, or were, the same blocks; only for copies that nfsha makes.

    Where the blocks are kept equal all the time (DRBD), equal handles are what clients need.
    """
    what = f"file handles of volume {here.volume}"
    if here.trouble or there.trouble:
        remedy = "make the volume readable: else nobody can tell a clone of blocks from a copy"
        return (Objection(what, here.trouble or "read", remedy, there.trouble or "read"),)
    right = {(one.handle, one.birth_ns): one.name for one in there.handles}
    keys = [(one.name, (one.handle, one.birth_ns)) for one in here.handles]
    equal = [(name, right[key]) for name, key in keys if key in right]
    if not equal:
        return ()
    remedy = (
        "this filesystem was cloned block by block, and old handles would lead to wrong files: make"
        " an empty filesystem on the node that does not serve and let nfsha copy the files"
    )
    mine, other = (", ".join(map(repr, side)) for side in zip(*equal, strict=True))
    return (Objection(what, f"those of {mine}", remedy, f"the same, of {other}"),)


def as_json(facts: HandleFacts) -> Document:
    """Returns the facts as JSON can carry them, to the other node or to a command."""
    return {
        "volume": facts.volume,
        "handles": [
            {"name": one.name, "handle": one.handle, "birth_ns": one.birth_ns}
            for one in facts.handles
        ],
        "trouble": facts.trouble,
    }


def from_json(document: object) -> HandleFacts:
    """Returns the facts that `as_json` made a document of; FactsError for anything else."""
    fields = Fields("facts of file handles", document, "volume", "handles", "trouble")
    return HandleFacts(
        volume=fields.text("volume"),
        handles=fields.each("handles", FOLDERS_MAX + 16, _handle_from_json),
        trouble=fields.text("trouble"),
    )


def _handle_from_json(document: object) -> Handle:
    fields = Fields("a file handle", document, "name", "handle", "birth_ns")
    return Handle(fields.text("name"), fields.text("handle"), fields.number("birth_ns", _NS_MAX))

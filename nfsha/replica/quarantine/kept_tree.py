"""The files of one quarantine entry: put aside, walked, counted, shown in pages, deleted.

It works on open folders only (`beneath`), and knows nothing of entries and their records. What is
walked is bounded by what is there, what is held in memory by a page or by the folders of a tree.
"""

from __future__ import annotations

import errno
import heapq
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nfsha.replica.files import beneath
from nfsha.replica.files.beneath import shown
from nfsha.replica.files.own_names import OWN_PREFIX


@dataclass(frozen=True, slots=True)
class Item:
    """One thing in an entry: its path below the volume's root, and what lstat(2) says of it."""

    name: bytes
    kind: str
    size: int
    mtime_ns: int
    mode: int
    uid: int
    gid: int
    links: int

    @property
    def shown(self) -> str:
        """The name as text that is safe to print; `beneath.from_shown` takes it back."""
        return shown(self.name)

    def as_json(self) -> dict[str, Any]:
        """What JSON can carry: the name as `shown`."""
        return {**asdict(self), "name": self.shown}


def keep_one(root: int, tree: int, name: bytes, *, in_place: bool) -> None:
    """Puts one file of the volume into the tree, below folders like its own.

    OSError, ValueError.
    """
    parts = beneath.parts_of(name)
    if parts[0].startswith(OWN_PREFIX):
        raise ValueError("a name that nfsha keeps for itself at the volume's root")
    source, target = beneath.open_folder(root), beneath.open_folder(tree)
    try:
        for part in parts[:-1]:
            source, target = _step_both(source, target, part)
        _put_aside(source, target, parts[-1], in_place=in_place)
    finally:
        os.close(source)
        os.close(target)


def _step_both(source: int, target: int, part: bytes) -> tuple[int, int]:
    """One folder deeper on both sides, made in the tree like it is in the volume."""
    deeper = beneath.step_into(source, part)
    try:
        try:
            mirrored = beneath.step_into(target, part)
        except FileNotFoundError:
            with beneath.same_times(target):
                mirrored = _mirror(deeper, target, part)
    except BaseException:
        os.close(deeper)
        raise
    os.close(source)
    os.close(target)
    return deeper, mirrored


def _mirror(like: int, target: int, part: bytes) -> int:
    fd = beneath.make_private(target, part)
    try:
        beneath.copy_attributes(like, fd)
        beneath.copy_times(os.fstat(like), fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _put_aside(source: int, target: int, leaf: bytes, *, in_place: bool) -> None:
    found = os.stat(leaf, dir_fd=source, follow_symlinks=False)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "a folder; only files are put aside one by one")
    with beneath.same_times(target):
        stays = in_place and stat.S_ISREG(found.st_mode) and _try_link(source, target, leaf)
        if not stays:
            beneath.rename_noreplace(source, leaf, target, leaf)


def _try_link(source: int, target: int, leaf: bytes) -> bool:
    """False where a file may have no second name: too many, or the filesystem has none."""
    try:
        os.link(leaf, leaf, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP):
            return False
        raise
    return True


def leaves(tree: int, start: bytes) -> Iterator[tuple[bytes, list[bytes]]]:
    """(folder, some names of what is no folder in it), a folder before those in it."""
    pending = [start]
    while pending:
        folder = pending.pop()
        with beneath.folder_at(tree, folder.rstrip(b"/")) as fd:
            any_batch = False
            for batch in beneath.batches(fd):
                any_batch = True
                kinds = [(os.fsencode(e.name), e.is_dir(follow_symlinks=False)) for e in batch]
                pending += [folder + name + b"/" for name, is_folder in kinds if is_folder]
                yield folder, [name for name, is_folder in kinds if not is_folder]
            if not any_batch:
                yield folder, []


def in_order(tree: int, after: bytes | None, room: int) -> Iterator[bytes]:
    """Paths behind `after`, a folder before what is in it; keeps `room` names per folder at most.

    `room` is more than the caller will take, so that names that did not fit are never missed.
    """
    behind = () if after is None else beneath.parts_of(after)
    levels = [(b"", _names_from(tree, b"", behind[0] if behind else b"", room))]
    while levels:
        prefix, names = levels[-1]
        name, is_folder = next(names, (b"", False))
        if not name:
            levels.pop()
            continue
        path = prefix + name
        on_the_way = behind[: len(levels)] == tuple(path.split(b"/"))
        if not on_the_way:
            yield path
        if is_folder:
            deep = on_the_way and len(behind) > len(levels)
            start = behind[len(levels)] if deep else b""
            levels.append((path + b"/", _names_from(tree, path, start, room)))


def _names_from(tree: int, folder: bytes, start: bytes, room: int) -> Iterator[tuple[bytes, bool]]:
    with beneath.folder_at(tree, folder) as fd, os.scandir(fd) as entries:
        found = ((os.fsencode(e.name), e.is_dir(follow_symlinks=False)) for e in entries)
        return iter(heapq.nsmallest(room, (one for one in found if one[0] >= start)))


def item_of(name: bytes, found: os.stat_result) -> Item:
    """A thing in the tree, by its name and what lstat(2) says of it."""
    return Item(
        name, kind_of(found.st_mode), found.st_size, found.st_mtime_ns, found.st_mode,
        found.st_uid, found.st_gid, found.st_nlink,
    )  # fmt: skip


def kind_of(mode: int) -> str:
    """In a word what a thing of this mode is."""
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "folder"
    return "symlink" if stat.S_ISLNK(mode) else "special file"


def count(tree: int) -> tuple[int, int]:
    """Files (names), and bytes as allocated, each inode once."""
    files = size = 0
    seen: set[int] = set()
    for folder, names in leaves(tree, b""):
        with beneath.folder_at(tree, folder.rstrip(b"/")) as fd:
            for leaf in names:
                found = os.stat(leaf, dir_fd=fd, follow_symlinks=False)
                files += 1
                if found.st_nlink > 1 and found.st_ino in seen:
                    continue
                if found.st_nlink > 1:
                    seen.add(found.st_ino)
                size += found.st_blocks * 512  # the unit of st_blocks (stat(3type))
    return files, size


def prune(tree: int, folders: Sequence[bytes]) -> None:
    """Removes the folders that are empty now, and those above them that become so."""
    for folder in reversed(folders):
        name = folder.rstrip(b"/")
        while name:
            try:
                with beneath.parent_of(tree, name) as (parent, last):
                    os.rmdir(last, dir_fd=parent)
            except OSError:
                break  # not empty, or gone already
            name = name.rpartition(b"/")[0]


def empty(top: int) -> None:
    """Deletes all in a folder of ours, however deep, with two open folders at most.

    A folder in a folder in it is moved up to `top` before its parent goes.
    """
    left = True
    while left:
        left = False
        for batch in beneath.batches(top):
            left = True
            for one in batch:
                _remove(top, one)


def _remove(top: int, one: os.DirEntry[str]) -> None:
    name = os.fsencode(one.name)
    if not one.is_dir(follow_symlinks=False):
        os.unlink(name, dir_fd=top)
        return
    with beneath.folder_at(top, name) as folder:
        for batch in beneath.batches(folder):
            for inner in batch:
                old = os.fsencode(inner.name)
                if inner.is_dir(follow_symlinks=False):
                    beneath.rename_noreplace(folder, old, top, secrets.token_hex(16).encode())
                else:
                    os.unlink(old, dir_fd=folder)
    os.rmdir(name, dir_fd=top)


def words(error: OSError | ValueError) -> str:
    """Why a file was left where it is, for an operator."""
    if isinstance(error, FileExistsError):
        return "something is in its place"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)

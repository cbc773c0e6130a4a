"""A volume's tree as the change journal sees it: by file handles, never by what a path said before.

Only looks; changes nothing and keeps nothing. A `Tree` holds the volume's root open, and so keeps
the filesystem from being unmounted: it is opened for one piece of work and closed after it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Generator, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from nfsha.replica.journal import fanotify

_GONE = frozenset({errno.ENOENT, errno.ESTALE, errno.ENOTDIR})
_LOOKS_MAX = 3  # a rename between two system calls is looked at again


class NotThereError(Exception):
    """The volume is not mounted at its place any more; the text says what is there instead."""


class UnresolvedError(Exception):
    """What exists cannot be given a path; the text says in what way."""


class Place(NamedTuple):
    """A name in a folder, which is given by its handle."""

    folder: bytes
    name: bytes


class Tree:
    """The open tree of a volume. Everything raises OSError for a filesystem that fails."""

    def __init__(self, root: Path, device: int, inode: int) -> None:
        """Opens the root; NotThereError when it is not that folder of that filesystem (any more).

        device and inode are the root's st_dev and st_ino. Close it, or use it as a context.
        """
        try:
            self._fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise NotThereError(f"{root} cannot be opened: {error.strerror}") from error
        try:
            found = os.fstat(self._fd)
            if (found.st_dev, found.st_ino) != (device, inode):
                raise NotThereError(f"another filesystem, or none, is mounted at {root}")
            self._device = device
            self.root_handle, self._mount_id = fanotify.handle_of(self._fd)
            self._path = path_of_fd(self._fd)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets the filesystem go."""
        os.close(self._fd)

    @contextlib.contextmanager
    def opened(self, handle: bytes, flags: int = os.O_PATH) -> Iterator[int | None]:
        """What a handle names, open; None when it is gone, or not of this volume.

        Events tell of a whole filesystem; what is in a btrfs subvolume below the root is no data of
        this volume (its inode numbers say nothing here, and rsync stays out of it).
        """
        try:
            fd = fanotify.open_handle(self._fd, handle, flags)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            yield None
            return
        try:
            yield fd if os.fstat(fd).st_dev == self._device else None
        finally:
            os.close(fd)

    def path_of(self, handle: bytes) -> bytes | None:
        """The path of a folder or file now, relative to the root; b"." for the root.

        None when it is gone, or where no path below the root leads to it (hidden under another
        mount; outside, where only a part of the filesystem is mounted). UnresolvedError for a file
        that the kernel knows by its handle only, and for a path that is too long or never the same.
        """
        prefix = self._path.rstrip(b"/") + b"/"
        for _ in range(_LOOKS_MAX):
            with self.opened(handle) as fd:
                if fd is None:
                    return None
                found = os.fstat(fd)
                path = _readable_path(fd)
            if found.st_nlink == 0:
                return None
            if path == self._path:
                return b"."
            if path == b"/" and not stat.S_ISDIR(found.st_mode):
                raise UnresolvedError("the kernel knows the file by its handle, without a name")
            if not path.startswith(prefix):
                return None
            relative = path[len(prefix) :]
            named = _stat_at(self._fd, relative)
            if named is not None and os.path.samestat(named, found):
                return relative
            if self._is_covered(relative):
                return None
        raise UnresolvedError("a folder above is renamed all the time")

    def _is_covered(self, path: bytes) -> bool:
        """Whether another filesystem is mounted on the way."""
        status = _stat_at(self._fd, path)
        while status is None and path:
            path = path.rpartition(b"/")[0]
            status = _stat_at(self._fd, path) if path else None
        return status is not None and status.st_dev != self._device

    def place_of(self, handle: bytes) -> Place | None:
        """One of the names of a file, if the kernel has one at hand. Raises as `path_of`."""
        path = self.path_of(handle)
        if path is None or path == b".":
            return None
        parent, _, name = path.rpartition(b"/")
        if not parent:
            return Place(self.root_handle, name)
        folder = self._handle_at(self._fd, parent)
        return None if folder is None else Place(folder, name)

    def status(self, handle: bytes) -> os.stat_result | None:
        """The status of what a handle names; None when it is gone (or has no name any more)."""
        with self.opened(handle) as fd:
            found = None if fd is None else os.fstat(fd)
        return None if found is None or found.st_nlink == 0 else found

    def status_at(self, place: Place) -> os.stat_result | None:
        """The status of what the name stands for now; None without one."""
        with self.opened(place.folder) as fd:
            return None if fd is None else _stat_at(fd, place.name)

    def statuses(self, folder: bytes, names: list[bytes]) -> list[os.stat_result | None]:
        """The same for many names in one folder."""
        with self.opened(folder) as fd:
            if fd is None:
                return [None] * len(names)
            return [_stat_at(fd, name) for name in names]

    def walk(self, folder: bytes) -> Generator[tuple[bytes, os.DirEntry[str] | None]]:
        """All entries of a folder and of the folders below, each with its folder's handle.

        A folder comes first by itself, with None. Symbolic links and mount points are not followed;
        what vanishes meanwhile is left out. An entry may be asked for its status only until the
        next one. Close it (contextlib.closing) when it is not read to the end.
        """
        waiting = [folder]
        while waiting:
            handle = waiting.pop()
            with self.opened(handle, os.O_RDONLY | os.O_DIRECTORY) as fd:
                if fd is None:
                    continue
                yield handle, None
                with os.scandir(fd) as entries:
                    for entry in entries:
                        yield handle, entry
                        if entry.is_dir(follow_symlinks=False):
                            below = self._handle_at(fd, os.fsencode(entry.name))
                            if below is not None:
                                waiting.append(below)

    def _handle_at(self, folder_fd: int, name: bytes) -> bytes | None:
        try:
            handle, mount_id = fanotify.handle_of(folder_fd, name)
        except OSError as error:
            if error.errno in _GONE:
                return None
            raise
        return handle if mount_id == self._mount_id else None


def path_of_fd(fd: int) -> bytes:
    """What the kernel says now to be the path of an open file. OSError ENAMETOOLONG."""
    return os.readlink(b"/proc/self/fd/%d" % fd)  # noqa: PTH115 - paths here are bytes


def _readable_path(fd: int) -> bytes:
    try:
        return path_of_fd(fd)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UnresolvedError("its path is longer than the kernel tells, 4096 bytes") from error
        raise


def _stat_at(folder_fd: int, name: bytes) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise

"""One restore from a quarantine entry: looks at all places first, then moves file after file.

It never replaces anything, follows no link, and makes missing folders like they were. It knows
nothing of entries' records and does not decide whether a restore may be.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from nfsha.replica.files import beneath
from nfsha.replica.files.beneath import shown
from nfsha.replica.files.own_names import OWN_PREFIX
from nfsha.replica.quarantine import kept_tree

MAX_REFUSALS: Final = 100
_MAKING: Final = b"making"
_MAX_FILE_NAME: Final = 255  # NAME_MAX (linux/limits.h)


@dataclass(frozen=True, slots=True)
class Refusal:
    """One file that was left where it is, and why."""

    name: bytes
    why: str


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did.

    `beside` are the places that were taken, with the name that was written beside them.
    `refused_count` counts all refusals; at most `MAX_REFUSALS` of them, and of `beside`, are named.
    `emptied`: nothing is left in the entry, so it is gone.
    """

    files: int
    beside: tuple[tuple[bytes, bytes], ...]
    refused: tuple[Refusal, ...]
    refused_count: int
    emptied: bool


class Restore:
    """One restore: looks at all places first, then moves."""

    def __init__(
        self, root: int, entry_folder: int, entry: str, *, to: bytes | None, beside: bool
    ) -> None:
        self._root = root
        self._entry_folder = entry_folder
        self._suffix = f".nfsha-restored-{entry}".encode()
        self._prefix = b"" if to is None else b"/".join(beneath.parts_of(to)) + b"/"
        self._beside = beside
        self._made: list[tuple[bytes, os.stat_result, int]] = []
        self._refused: list[Refusal] = []
        self._written_beside: list[tuple[bytes, bytes]] = []
        self.refused_count = 0
        self._files = 0

    def result(self, *, emptied: bool) -> Restored:
        """What happened."""
        return Restored(
            self._files, tuple(self._written_beside), tuple(self._refused), self.refused_count,
            emptied,
        )  # fmt: skip

    def look(self, tree: int, names: Sequence[bytes] | None) -> None:
        """Refuses what is not in the entry, not allowed, or stands in a place already."""
        for folder, leaves in self._chosen(tree, names):
            for leaf in leaves:
                name = folder + leaf
                try:
                    self._look_at_place(name)
                except (OSError, ValueError) as error:
                    self._refuse(name, kept_tree.words(error))

    def _look_at_place(self, name: bytes) -> None:
        place = self._prefix + name
        if place.startswith(OWN_PREFIX):
            raise ValueError("a name that nfsha keeps for itself at the volume's root")
        found = beneath.look_at(self._root, place)  # ENOTDIR, ELOOP: the way there is blocked
        if found is not None and not self._beside:
            raise ValueError(f"{kept_tree.kind_of(found.st_mode)} is in its place, {shown(place)}")

    def move(self, tree: int, names: Sequence[bytes] | None) -> None:
        """Moves file after file; a place that was taken meanwhile is refused like before."""
        emptied: list[bytes] = []
        for folder, leaves in self._chosen(tree, names):
            try:
                self._move_all(tree, folder, leaves)
            except OSError as error:
                self._refuse(folder, kept_tree.words(error))
            emptied.append(folder)
        self._set_times()
        kept_tree.prune(tree, emptied)

    def _move_all(self, tree: int, folder: bytes, leaves: Iterable[bytes]) -> None:
        with beneath.folder_at(tree, folder.rstrip(b"/")) as source:
            target = self._make_folders(tree, folder)
            try:
                for leaf in leaves:
                    try:
                        self._move_one(source, leaf, target, folder)
                    except OSError as error:
                        self._refuse(folder + leaf, kept_tree.words(error))
            finally:
                os.close(target)

    def _move_one(self, source: int, leaf: bytes, target: int, folder: bytes) -> None:
        try:
            beneath.rename_noreplace(source, leaf, target, leaf)
        except FileExistsError:
            if not self._beside:
                raise
            other = leaf[: _MAX_FILE_NAME - len(self._suffix)] + self._suffix
            beneath.rename_noreplace(source, leaf, target, other)
            if len(self._written_beside) < MAX_REFUSALS:
                place = self._prefix + folder
                self._written_beside.append((place + leaf, place + other))
        self._files += 1

    def _make_folders(self, tree: int, folder: bytes) -> int:
        """Opens the place of `folder`, making what is missing on the way like it is in the tree."""
        target = self._open_prefix()
        done = b""
        for part in folder.split(b"/")[:-1]:
            done += part + b"/"
            try:
                deeper = self._step(target, part, tree, done)
            finally:
                os.close(target)
            target = deeper
        return target

    def _open_prefix(self) -> int:
        target = beneath.open_folder(self._root)
        for part in self._prefix.split(b"/")[:-1]:
            try:
                try:
                    deeper = beneath.step_into(target, part)
                except FileNotFoundError:
                    deeper = beneath.make_private(target, part)
            finally:
                os.close(target)
            target = deeper
        return target

    def _step(self, target: int, part: bytes, tree: int, folder: bytes) -> int:
        with contextlib.suppress(FileNotFoundError):
            return beneath.step_into(target, part)
        with (
            contextlib.suppress(FileExistsError),
            beneath.folder_at(tree, folder.rstrip(b"/")) as like,
        ):
            return self._make_like(like, target, part, self._prefix + folder)
        return beneath.step_into(target, part)  # somebody made it meanwhile

    def _make_like(self, like: int, target: int, part: bytes, place: bytes) -> int:
        """Made where no client can reach it, and moved when it has its attributes."""
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(_MAKING, dir_fd=self._entry_folder)
        made = beneath.make_private(self._entry_folder, _MAKING)
        try:
            beneath.copy_attributes(like, made)
            beneath.rename_noreplace(self._entry_folder, _MAKING, target, part)
        except BaseException:
            os.close(made)
            raise
        self._made.append((place.rstrip(b"/"), os.fstat(like), os.fstat(made).st_ino))
        return made

    def _set_times(self) -> None:
        """The deepest first: files that moved in changed the times of their folder."""
        for place, times, inode in reversed(self._made):
            with contextlib.suppress(OSError), beneath.folder_at(self._root, place) as fd:
                if os.fstat(fd).st_ino == inode:
                    beneath.copy_times(times, fd)

    def _chosen(
        self, tree: int, names: Sequence[bytes] | None
    ) -> Iterator[tuple[bytes, list[bytes]]]:
        """(folder with a slash at its end, names in it), over all that was asked for."""
        if names is None:
            yield from kept_tree.leaves(tree, b"")
            return
        for name in names:
            try:
                found = beneath.look_at(tree, name)
            except (OSError, ValueError) as error:
                self._refuse(name, kept_tree.words(error))
                continue
            if found is None:
                self._refuse(name, "not in this entry")
            elif stat.S_ISDIR(found.st_mode):
                yield from kept_tree.leaves(tree, name + b"/")
            else:
                folder, slash, leaf = name.rpartition(b"/")
                yield folder + slash, [leaf]

    def _refuse(self, name: bytes, why: str) -> None:
        self.refused_count += 1
        if len(self._refused) < MAX_REFUSALS:
            self._refused.append(Refusal(name, why))

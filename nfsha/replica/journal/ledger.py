"""What events mean: which folders changed, and how far the list of them can vouch.

It keeps folders by their handles and asks for a full walk when it cannot know. It reads no queue
and writes no file: `changes` hands it the events and an open tree, and asks it for the list. What
one event cannot tell is settled only when the list is wanted: what is in a folder that was moved in
(rsync asks one level deep), the other names of a file with hard links, and the name of a file that
somebody wrote by a handle alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from nfsha.replica.files.own_names import OWN_PREFIX, PARTIAL
from nfsha.replica.journal import fanotify
from nfsha.replica.journal.handles import Place, Tree, UnresolvedError
from nfsha.replica.journal.published import MAX_REASON_CHARS

MAX_WANTED = 10_000
"""The most files at a time with names to be found; for more, a full walk is cheaper."""

_MAX_NAMES = 64  # of one file
_MAX_KNOWN = 10_000  # files whose names are remembered
_MAX_SEARCHES = 3  # for one list
_MAX_MOVED = 10_000  # folders moved between two lists
_MAX_SETTLE_MS = 30_000
_PAUSE_EVERY_ENTRIES = 20_000  # the kernel's queue goes on filling while a search runs
_LOOKED_AT_AGAIN = 64  # paths, for each list, in turn
_UNKNOWN = -1
_HAS_A_FILE = (
    fanotify.FAN_MODIFY | fanotify.FAN_ATTRIB | fanotify.FAN_CREATE | fanotify.FAN_MOVED_TO
)
_PATHS_CHANGE = (
    fanotify.FAN_MOVED_FROM | fanotify.FAN_MOVED_TO | fanotify.FAN_MOVE_SELF | fanotify.FAN_DELETE
)

_log = logging.getLogger(__name__)


class WalkReason(StrEnum):
    """Why a full walk was asked for; the keys of `Counters.full_walks`."""

    QUEUE_OVERFLOW = "queue-overflow"
    TOO_MANY_FOLDERS = "too-many-folders"
    NAMELESS = "nameless"
    HARD_LINKS = "hard-links"
    MOVED_FOLDER = "moved-folder"
    CLOCK = "clock-stepped-back"
    TROUBLE = "trouble"
    ENDED = "ended"


@dataclass(slots=True)
class Counters:
    """What was seen since the start, and `folders`, how many are in the list now.

    nameless: events about a file without its folder. hard_links: looks at a changed file with more
    names than one. searches: walks over the folders (not the files) of the volume for such names.
    moved_folders: folders that were moved in and looked through. durable_failures: notes that could
    not be written. full_walks: how often one was asked for, by reason.
    """

    events: int = 0
    nameless: int = 0
    overflows: int = 0
    folders: int = 0
    hard_links: int = 0
    searches: int = 0
    moved_folders: int = 0
    durable_failures: int = 0
    full_walks: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Folder:
    """A changed folder: the sequence of the last change, and its path as of a generation."""

    seq: int
    path: bytes = b""
    generation: int = _UNKNOWN


@dataclass(slots=True)
class _Wanted:
    """A file of which names are to be found: its handle, where known, and the names seen."""

    handle: bytes | None = None
    places: set[Place] = field(default_factory=set)


class _TooMuchError(Exception):
    """Looking through folders came to a bound; the text says to which."""


class _Look:
    """Looks through folders within bounds of entries and time, for one list."""

    def __init__(
        self, clock_ms: Callable[[], int], entries: int, pause: Callable[[], None]
    ) -> None:
        self._clock_ms = clock_ms
        self._left = self._entries = entries
        self._until_ms = clock_ms() + _MAX_SETTLE_MS
        self._pause = pause

    def through(self, tree: Tree, handle: bytes) -> Iterator[tuple[bytes, os.DirEntry[str] | None]]:
        """As `Tree.walk`, but raises _TooMuchError at a bound."""
        with contextlib.closing(tree.walk(handle)) as walk:
            for item in walk:
                self._left -= 1
                if self._left <= 0:
                    raise _TooMuchError(f"more than {self._entries} entries")
                if self._left % _PAUSE_EVERY_ENTRIES == 0:
                    self.breathe()
                yield item

    def breathe(self) -> None:
        """Lets events be taken; _TooMuchError when the time is over."""
        if self._clock_ms() > self._until_ms:
            raise _TooMuchError(f"it takes longer than {_MAX_SETTLE_MS // 1000} s")
        self._pause()


class Ledger:
    """The changed folders of one volume. Not for two threads at a time."""

    def __init__(
        self, name: str, clock_ms: Callable[[], int], *, max_folders: int, max_entries: int
    ) -> None:
        """name: of the volume, for the log. The bounds are as in `ChangeJournal`."""
        self.seq = 0
        self.complete_from = 0
        self.walk_reason = ""
        self.counters = Counters()
        self._name = name
        self._clock_ms = clock_ms
        self._max_folders = max_folders
        self._max_entries = max_entries
        self._folders: dict[bytes, _Folder] = {}
        self._generation = 0
        self._turn: list[bytes] = []
        self._moved: set[bytes] = set()
        self._wanted: dict[int, _Wanted] = {}
        self._known: dict[bytes, Place] = {}
        self._linked: dict[int, frozenset[Place]] = {}
        self._logged: set[WalkReason] = set()

    def __len__(self) -> int:
        return len(self._folders)

    @property
    def empty(self) -> bool:
        """No folder changed, and nothing is left open of what happened."""
        return not (self._folders or self._moved or self._wanted)

    def ask_walk(self, reason: WalkReason, sentence: str, *, level: int = logging.WARNING) -> None:
        """From here on only who walks the whole volume anew knows what changed.

        Logged once for each reason between two lists, counted each time.
        """
        self.seq += 1
        self._generation += 1  # a rename may be among what is not known
        self.complete_from = self.seq
        self.walk_reason = sentence[:MAX_REASON_CHARS]
        counted = self.counters.full_walks
        counted[reason] = counted.get(reason, 0) + 1
        if reason not in self._logged:
            self._logged.add(reason)
            _log.log(level, "%s needs a full walk: %s", self._name, sentence)

    def forget(self, seq: int) -> None:
        """Forgets what did not change after `seq`."""
        for handle in [handle for handle, kept in self._folders.items() if kept.seq <= seq]:
            del self._folders[handle]

    # ---- events

    def digest(self, tree: Tree, events: dict[bytes, int]) -> None:
        """Takes events as `fanotify.merge_events` gives them. OSError, EventFormatError."""
        self.seq += 1
        named: dict[bytes, dict[bytes, bytes | None]] = {}
        nameless: list[bytes] = []
        for records, mask in events.items():
            if mask & fanotify.FAN_Q_OVERFLOW:
                self._overflow()
                continue
            folder, name, target = fanotify.parse_subject(records)
            if folder is None:
                if target is not None and mask & fanotify.CHANGES:
                    nameless.append(target)
            elif not _is_ours(folder == tree.root_handle, name):
                self._touch(folder, path_changed=name == b".")
                if mask & fanotify.FAN_ONDIR and mask & _PATHS_CHANGE:
                    self._folder_moved(mask, folder, name, target)
                if mask & _HAS_A_FILE and name != b".":
                    named.setdefault(folder, {})[name] = target
        for folder, names in named.items():
            self._look_at(tree, folder, names)
        for handle in nameless:
            self._look_at_nameless(tree, handle)

    def _overflow(self) -> None:
        self.counters.overflows += 1
        self.ask_walk(WalkReason.QUEUE_OVERFLOW, "more changes at once than the kernel keeps")

    def _touch(self, folder: bytes, *, path_changed: bool = False) -> None:
        kept = self._folders.get(folder)
        if kept is None:
            if len(self._folders) >= self._max_folders:
                self._folders.clear()
                sentence = f"more than {self._max_folders} folders changed since the last pass"
                self.ask_walk(WalkReason.TOO_MANY_FOLDERS, sentence)
            kept = self._folders[folder] = _Folder(self.seq)
        kept.seq = self.seq
        if path_changed:
            kept.generation = _UNKNOWN

    def _folder_moved(self, mask: int, folder: bytes, name: bytes, target: bytes | None) -> None:
        """A folder came or went: paths change, of itself and of what is below it.

        What is below one that came is looked through before the next list, and looked up then.
        """
        if target is None and mask & fanotify.FAN_DELETE:
            self._generation += 1  # which one it was is not told
        elif target is not None and target in self._folders:
            self._folders[target].generation = _UNKNOWN
        if mask & fanotify.FAN_MOVED_TO and target is not None:
            self._moved.add(target)
        elif mask & fanotify.FAN_MOVE_SELF and name == b".":
            self._moved.add(folder)
        if len(self._moved) > _MAX_MOVED:
            self._moved.clear()
            self.ask_walk(WalkReason.MOVED_FOLDER, f"more than {_MAX_MOVED} folders were moved")

    def _look_at(self, tree: Tree, folder: bytes, names: dict[bytes, bytes | None]) -> None:
        """Looks whether changed files have other names, and remembers the ones seen here."""
        found = tree.statuses(folder, list(names))
        for (name, target), status in zip(names.items(), found, strict=True):
            if status is None or stat.S_ISDIR(status.st_mode):
                continue
            place = Place(folder, name)
            if status.st_nlink > 1:
                self.counters.hard_links += 1
                earlier = None if target is None else self._known.get(target)
                self._want(status.st_ino, target, place, earlier)
            if target is not None:
                self._remember(target, place)

    def _look_at_nameless(self, tree: Tree, handle: bytes) -> None:
        """A change of a file that the kernel knew by its handle only, or of its count of names."""
        self.counters.nameless += 1
        status = tree.status(handle)
        if status is None:
            return  # gone; the event of its removal names the folder
        if stat.S_ISDIR(status.st_mode):
            self._touch(handle)
            return
        place = self._place(tree, handle, status)
        if place is None or status.st_nlink > 1:
            self._want(status.st_ino, handle, place)
        else:
            self._touch(place.folder)

    def _place(self, tree: Tree, handle: bytes, status: os.stat_result) -> Place | None:
        """A name of a file by what is remembered, or by what the kernel has at hand."""
        place = self._known.get(handle)
        if place is not None and _is_at(tree, status.st_ino, place):
            return place
        with contextlib.suppress(UnresolvedError):
            place = tree.place_of(handle)
            if place is not None and _is_at(tree, status.st_ino, place):
                self._remember(handle, place)
                return place
        return None

    def _remember(self, handle: bytes, place: Place) -> None:
        self._known.pop(handle, None)
        self._known[handle] = place
        if len(self._known) > _MAX_KNOWN:
            del self._known[next(iter(self._known))]

    def _want(self, inode: int, handle: bytes | None, *places: Place | None) -> None:
        wanted = self._wanted.setdefault(inode, _Wanted())
        wanted.handle = handle or wanted.handle
        wanted.places.update(place for place in places if place is not None)
        if len(self._wanted) > MAX_WANTED or len(wanted.places) > _MAX_NAMES:
            self._wanted.clear()
            self.ask_walk(WalkReason.HARD_LINKS, "too many changed files with several names")

    # ---- the list

    def settle(self, tree: Tree, pause: Callable[[], None]) -> None:
        """Finds out what the events so far left open. OSError when the filesystem fails.

        `pause` is called now and then while it lasts; it may digest more events. What these leave
        open is not settled before the next time.
        """
        if not self._moved and not self._wanted:
            return
        look = _Look(self._clock_ms, self._max_entries, pause)
        self._expand(tree, look)
        wanted, self._wanted = self._wanted, {}
        self.seq += 1
        missing = {inode: one for inode, one in wanted.items() if not self._found(tree, inode, one)}
        if missing:
            self._search(tree, missing, look)

    def _expand(self, tree: Tree, look: _Look) -> None:
        """Everything below a folder that was moved in is new at its place."""
        moved, self._moved = self._moved, set()
        self.seq += 1
        try:
            for handle in moved:
                self.counters.moved_folders += 1
                for folder, entry in look.through(tree, handle):
                    if entry is None:
                        self._touch(folder, path_changed=True)
                    else:
                        self._look_at_moved(folder, entry)
        except _TooMuchError as error:
            self.ask_walk(WalkReason.MOVED_FOLDER, f"too much is in a moved folder: {error}")

    def _look_at_moved(self, folder: bytes, entry: os.DirEntry[str]) -> None:
        with contextlib.suppress(FileNotFoundError):
            status = entry.stat(follow_symlinks=False)
            if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
                self.counters.hard_links += 1
                self._want(status.st_ino, None, Place(folder, os.fsencode(entry.name)))

    def _found(self, tree: Tree, inode: int, wanted: _Wanted) -> bool:
        """Whether all names of a file are known now; then their folders are in the list."""
        if wanted.handle is not None and tree.status(wanted.handle) is None:
            return True  # gone meanwhile
        names, valid = 0, []
        for place in wanted.places | self._linked.get(inode, frozenset()):
            status = tree.status_at(place)
            if status is not None and status.st_ino == inode:
                names = status.st_nlink
                valid.append(place)
        if not valid or len(valid) < names:
            return False
        for place in valid:
            self._touch(place.folder)
        if names > 1:
            self._remember_links(inode, frozenset(valid))
        elif wanted.handle is not None:
            self._remember(wanted.handle, valid[0])
        return True

    def _remember_links(self, inode: int, places: frozenset[Place]) -> None:
        self._linked.pop(inode, None)
        self._linked[inode] = places
        if len(self._linked) > _MAX_KNOWN:
            del self._linked[next(iter(self._linked))]

    def _search(self, tree: Tree, missing: dict[int, _Wanted], look: _Look) -> None:
        """Looks for the names of files by their inode numbers in all folders of the volume.

        This reads folders and not one inode, so it is far cheaper than a full walk by rsync. A name
        that is moved meanwhile may be seen at neither place: then the events of that tell it, or
        another search does.
        """
        for _ in range(_MAX_SEARCHES):
            events = self.counters.events
            self.counters.searches += 1
            try:
                for folder, entry in look.through(tree, tree.root_handle):
                    if entry is not None and entry.inode() in missing:
                        place = Place(folder, os.fsencode(entry.name))
                        missing[entry.inode()].places.add(place)
                look.breathe()
            except _TooMuchError as error:
                self._give_up(missing, f": {error}")
                return
            self.seq += 1
            missing = {inode: one for inode, one in missing.items() if self._lost(tree, inode, one)}
            if not missing:
                return
            if self.counters.events == events:
                break  # nothing moved: another search would see the same
        self._give_up(missing, "")

    def _lost(self, tree: Tree, inode: int, wanted: _Wanted) -> bool:
        """Whether names of a file are unknown also with those that events told meanwhile."""
        told = self._wanted.get(inode)
        if told is not None:
            wanted.places.update(told.places)
        return not self._found(tree, inode, wanted)

    def _give_up(self, missing: dict[int, _Wanted], why: str) -> None:
        if all(wanted.places for wanted in missing.values()):
            sentence = f"not all names of {len(missing)} changed files are known{why}"
            self.ask_walk(WalkReason.HARD_LINKS, sentence)
        else:
            sentence = f"{len(missing)} files changed whose folders are not known{why}"
            self.ask_walk(WalkReason.NAMELESS, sentence)

    def list_folders(self, tree: Tree) -> None:
        """Looks up the paths that are not known or may have changed. OSError as `settle`.

        A few others are looked up again each time, so that nothing that no event tells (another
        filesystem mounted on top) stays in the list for long.
        """
        if not self._turn:
            self._turn = list(self._folders)
        again = {self._turn.pop() for _ in range(min(_LOOKED_AT_AGAIN, len(self._turn)))}
        for handle, kept in list(self._folders.items()):
            if kept.generation != self._generation or handle in again:
                self._look_up(tree, handle, kept)

    def _look_up(self, tree: Tree, handle: bytes, kept: _Folder) -> None:
        generation = self._generation
        try:
            path = tree.path_of(handle)
        except UnresolvedError as error:
            kept.path = b""
            self.ask_walk(WalkReason.TROUBLE, f"a changed folder has no path: {error}")
            return
        if path is None or _is_own_path(path):
            del self._folders[handle]
        else:
            kept.path, kept.generation = path, generation

    def listed(self) -> dict[bytes, int]:
        """The paths and sequences as `list_folders` found them; the log may repeat a reason."""
        self._logged.clear()
        found: dict[bytes, int] = {}
        for kept in self._folders.values():
            if kept.path:
                found[kept.path] = max(kept.seq, found.get(kept.path, 0))
        return found

    def drop_all(self) -> None:
        """Forgets all folders: the list was too long to tell."""
        self._folders.clear()


def _is_at(tree: Tree, inode: int, place: Place) -> bool:
    status = tree.status_at(place)
    return status is not None and status.st_ino == inode


def _is_ours(in_root: bool, name: bytes) -> bool:
    return name == PARTIAL or (in_root and name.startswith(OWN_PREFIX))


def _is_own_path(path: bytes) -> bool:
    return path.startswith(OWN_PREFIX) or PARTIAL in path.split(b"/")

"""Which deletions a pass would do, and whether it may.

A plan is read from a dry run of rsync, `--out-format='%i %n %l %M'`: the deletions by name, and
what is to be copied. A file that only moved is both: deleted here, new there, of the same name,
size and time. It must not delete, and it must not look at a volume except to see whether anything
would be left of it (`leaves_something`), and which of the deletions are such moves (`moved`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from nfsha.replica.files.beneath import folder_at, shown
from nfsha.replica.files.own_names import OWN_ROOT_NAMES, PARTIAL
from nfsha.replica.rsync.exits import decode_name
from nfsha.replica.rsync.progress import Tail

__all__ = ["DeleteLimits", "DeletionPlan", "PlanReader", "leaves_something", "moved", "ruling"]

MAX_NAMES: Final = 50_000
"""So many names a plan keeps; its count and its hash are always of all."""
MAX_ARRIVALS: Final = 200_000
"""Of so many new files the plan remembers what they look like; others are no moves for it."""
MAX_REPLACED_NAMES: Final = 1_000
"""So many names of things that would be replaced are kept; their count is of all."""
MAX_WANTED: Final = 2_000
"""Up to so many things to copy are asked for by name, not by a second look at all folders."""
MAX_FOLDERS: Final = 20_000
"""With more folders than this to set right a whole walk is cheaper than a list."""
_DIGEST_BYTES: Final = 16
_FILE: Final = b"f"
_FOLDER: Final = b"d"
_STRAY: Final = b"t"


@dataclass(frozen=True, slots=True)
class DeleteLimits:
    """How much a pass may delete by itself: the larger of the two, and never everything."""

    files: int
    percent: int
    known_files: int
    """What the last mark counted on this volume."""
    accepted_plan: str | None
    """The hash of a plan that an operator accepted."""
    target_empty: bool
    """There is nothing on the target that could be deleted, so no plan is needed."""

    @property
    def allowed(self) -> int:
        """So many deletions need nobody's word."""
        return max(self.files, self.known_files * self.percent // 100)


@dataclass(frozen=True, slots=True)
class DeletionPlan:
    """What would be deleted. `hash` names exactly this set of names."""

    names: tuple[bytes, ...]
    """Relative to the volume's root; folders end with a slash. Sorted; at most `MAX_NAMES`."""
    hash: str
    count: int
    files: int
    """All that are not folders."""
    strays: int = 0
    """Those of `files` that bear a name as rsync gives to what it is receiving."""


def ruling(
    plan: DeletionPlan, limits: DeleteLimits, *, leaves_something: bool, moved: int = 0
) -> str:
    """Why the plan must wait for an operator; empty when it may be carried out.

    Files that only `moved` are not lost by it, and folders alone hold no data.
    """
    if plan.count == 0 or plan.hash == limits.accepted_plan:
        return ""
    lost = plan.files - moved
    first = shown(plan.names[0])
    what = f"deletions of {lost} files (the first of all: {first})"
    if not leaves_something:
        return f"{what} would leave no file at all on this copy"
    if lost > limits.allowed:
        return (
            f"{what} are more than {limits.files}, and more than {limits.percent} % of the"
            f" {limits.known_files} files of the last pass"
        )
    return ""


# rsync's receiver.c, get_tmpname: a dot, the name (cut if it is long), a dot, six characters.
_TEMPORARY = re.compile(rb"(?:.*/)?\.[^/]*\.[A-Za-z0-9]{6}", re.S)
_DELETION: Final = b"*deleting   "
# Size and time, behind the name; rsync escapes a line's end in a name, so this is the last.
_LOOKS = re.compile(rb" (\d+) (\d{4}/\d\d/\d\d-\d\d:\d\d:\d\d)\Z")
_NEW: Final = b"+++++++++"
_ITEM = re.compile(rb"([<>ch.])([fdLDS]).{9} ")


class PlanReader:
    """Takes the output of the dry run, line by line.

    `spared` are files of which a part lies here on purpose: that is no deletion.
    """

    def __init__(self, spared: Iterable[bytes] = ()) -> None:
        self._spared = {part for name in spared for part in _part_of(name)}
        self.items = 0
        """All that differs: to be copied, to be deleted (again counted by its parent, where a
        listed folder is gone), or a folder's own attributes."""
        self.first = b""
        """The name of the first of these."""
        self.copies = 0
        """Entries that only a copying run can set right."""
        self.wanted: set[bytes] = set()
        """Their names, as long as they are few."""
        self.wanted_files = 0
        """How many of these are no folders."""
        self.wanted_bytes: dict[bytes, int] = {}
        """The sizes of these, at the source."""
        self.replaced = 0
        """Existing things, no folders, in whose place something else would come."""
        self.replaced_names: list[bytes] = []
        self.touched: set[bytes] = set()
        """Existing folders whose own attributes differ."""
        self.parents: set[bytes] = set()
        """Folders that stay, in which something would be deleted."""
        self.old_parts = 0
        """Deletions of partial files that nothing needs; they are not in the plan."""
        self.rest = Tail()
        """What is not an item: the counts, and rsync's remarks."""
        self.arrivals: Counter[bytes] = Counter()
        """What new files look like: name without folders, size, time."""
        self._names: list[bytes] = []
        self._digests = bytearray()
        self._too_many_folders = False
        self._linked = False

    def take(self, line: bytes) -> None:
        """Takes one line, without its end."""
        looks = _LOOKS.search(line)
        found = _ITEM.match(line)
        if looks is None:
            self.rest.add(line)
            return
        size, time = looks.groups()
        line = line[: looks.start()]
        if line.startswith(_DELETION):
            self._deletion(decode_name(line[len(_DELETION) :]))
        elif not found:
            self.rest.add(line)
        elif found[1] == b"." and found[2] == b"d":
            name = decode_name(line[found.end() :])
            self._item(name)
            self._touched(name)
        else:
            self.copies += 1
            name = decode_name(line[found.end() :])
            self._item(name)
            if line[2:11] != _NEW:
                # Where attributes alone differ (`.`), nothing comes in its place.
                if found[2] != b"d" and found[1] != b".":
                    self._replaces(name)
            elif found[2] != b"d" and len(self.arrivals) < MAX_ARRIVALS:
                self.arrivals[_looks(name, size, time)] += 1
            self._linked = self._linked or found[1] == b"h"
            self._want(name.rstrip(b"/"), int(size), folder=found[2] == b"d")
            # A folder that was emptied to make way for this: it is no folder to look into.
            self.parents.discard(name)

    def finish(self) -> DeletionPlan:
        """The plan, once all is read; a second or so for a million names: call it in a thread."""
        size = _DIGEST_BYTES + 1
        marked = (bytes(self._digests[at : at + size]) for at in range(0, len(self._digests), size))
        every = sorted(set(marked))
        total = hashlib.sha256()
        for digest in every:
            total.update(digest)
        names = tuple(sorted(set(self._names)))
        kinds = Counter(digest[-1:] for digest in every)
        return DeletionPlan(
            names=names,
            hash=total.hexdigest() if every else "",
            count=len(every),
            files=kinds[_FILE] + kinds[_STRAY],
            strays=kinds[_STRAY],
        )

    @property
    def too_many_folders(self) -> bool:
        """`touched` and `parents` are empty, because there were more than `MAX_FOLDERS`."""
        return self._too_many_folders

    @property
    def by_name(self) -> bool:
        """Whether `wanted` is all that a copying run needs.

        Not where something is to be a hard link: the other names must be in rsync's list too.
        """
        return not self._linked and not self._too_many_folders and len(self.wanted) <= MAX_WANTED

    def _replaces(self, name: bytes) -> None:
        self.replaced += 1
        if len(self.replaced_names) < MAX_REPLACED_NAMES:
            self.replaced_names.append(name)

    def _item(self, name: bytes) -> None:
        self.items += 1
        self.first = self.first or name

    def _want(self, name: bytes, size: int, *, folder: bool) -> None:
        if len(self.wanted) <= MAX_WANTED and name not in self.wanted:
            self.wanted.add(name)
            if not folder:
                self.wanted_files += 1
                self.wanted_bytes[name] = size

    def _touched(self, name: bytes) -> None:
        if not self._too_many_folders:
            self.touched.add(name.rstrip(b"/") or b".")
            self._bound()

    def _deletion(self, name: bytes) -> None:
        path = name.rstrip(b"/")
        if path in self._spared:
            return
        parts = path.split(b"/")
        if PARTIAL in parts:
            self.old_parts += 1
            self._parent(b"/".join(parts[: parts.index(PARTIAL)]))
            return
        self._item(path)
        # The same name may come twice: with a listed folder that is gone, and with its parent.
        self._digests += hashlib.blake2b(name, digest_size=_DIGEST_BYTES).digest()
        self._digests += _kind(name)
        if len(self._names) < MAX_NAMES:
            self._names.append(name)
        self.parents.discard(path)  # rsync names what is in a folder before the folder
        self._parent(b"/".join(parts[:-1]))

    def _parent(self, path: bytes) -> None:
        if not self._too_many_folders:
            self.parents.add(path or b".")
            self._bound()

    def _bound(self) -> None:
        if len(self.touched) + len(self.parents) > MAX_FOLDERS:
            self._too_many_folders = True
            self.touched.clear()
            self.parents.clear()


def _part_of(name: bytes) -> tuple[bytes, bytes]:
    """Where rsync keeps the part of a file: the folder, and the part in it."""
    folder, slash, last = name.rpartition(b"/")
    parts = folder + slash + PARTIAL
    return parts, parts + b"/" + last


def _kind(name: bytes) -> bytes:
    if name.endswith(b"/"):
        return _FOLDER
    return _STRAY if _TEMPORARY.fullmatch(name) else _FILE


def _looks(name: bytes, size: bytes, time: bytes) -> bytes:
    text = b"\0".join((name.rpartition(b"/")[2], size, time))
    return hashlib.blake2b(text, digest_size=_DIGEST_BYTES).digest()


def moved(root_fd: int, plan: DeletionPlan, arrivals: Counter[bytes]) -> int:
    """How many of the files that would be deleted also arrive, under the same name elsewhere.

    The same last name, size and second of the last change; each arrival counts once. `arrivals`
    is in UTC, as the plan's rsync was told to write it. Blocks; looks at the files of the plan.
    """
    left = arrivals.copy()
    found = 0
    for name in plan.names:
        if name.endswith(b"/"):
            continue
        try:
            facts = os.stat(name, dir_fd=root_fd, follow_symlinks=False)
        except OSError:
            continue  # it proves nothing
        second = datetime.fromtimestamp(facts.st_mtime_ns // 10**9, UTC)
        text = second.strftime("%Y/%m/%d-%H:%M:%S").encode()
        looks = _looks(name, b"%d" % facts.st_size, text)
        if left[looks] > 0:
            left[looks] -= 1
            found += 1
    return found


def leaves_something(root_fd: int, deleted_files: int) -> bool:
    """Whether a volume has more files than would be deleted; folders do not count.

    Blocking; it stops as soon as it has seen one file more. Only this filesystem, no symbolic
    links, and none of what is nfsha's own. Raises OSError.
    """
    seen = 0
    waiting = [b""]
    while waiting:
        path = waiting.pop()
        try:
            files, folders = _count(root_fd, path)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            continue  # gone meanwhile, or longer than a path may be: it proves nothing
        except OSError as error:
            if error.errno == errno.EXDEV:
                continue
            raise
        seen += files
        if seen > deleted_files:
            return True
        waiting.extend(folders)
    return False


def _count(root_fd: int, path: bytes) -> tuple[int, list[bytes]]:
    own = frozenset() if path else frozenset(map(os.fsdecode, OWN_ROOT_NAMES))
    skip = own | {os.fsdecode(PARTIAL)}
    files = 0
    folders = []
    begin = path + b"/" if path else b""
    with folder_at(root_fd, path) as fd, os.scandir(fd) as entries:
        for entry in entries:
            if entry.name in skip:
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(begin + os.fsencode(entry.name))
            else:
                files += 1
    return files, folders

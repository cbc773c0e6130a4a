"""The quarantine: where files go that a resync or a repair would overwrite or delete (I4).

One store per volume, `.nfsha-quarantine/` at the volume's root, 0700 and root's: same filesystem,
never replicated. Each operation has an entry there: a folder `<UTC time>-<reason>-<id>` with
`entry.json` (why, when, which epoch, which operation, by whom, complete or not) and `tree/`, which
holds the files at their paths below the volume's root. rsync's --backup-dir may point at it.

Nothing in a store is ever changed or dropped but by `restore`, `drop` and `drop_expired`. It must
not decide when these may be called: what is restored on the passive node is overwritten or deleted
again by the next pass (unless it was put where no pass looks), and on the active node a restore is
a write that clients see. Two operations on one store at a time, or a restore from an entry that a
pass still fills, are the caller's to prevent.

Everything blocks on the disk: call it in a thread. A crash at any step leaves each file in exactly
one of its two places; what was begun and never finished is listed as such, and can be restored.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from nfsha.core.model import Epoch, Role
from nfsha.replica import beneath
from nfsha.replica.beneath import shown
from nfsha.replica.durable import read_small_at, write_durably_at
from nfsha.replica.volumes import QUARANTINE_NAME

STORE: Final = QUARANTINE_NAME
MAX_ENTRIES: Final = 10_000
MAX_NAMES: Final = 10_000
MAX_PAGE: Final = 10_000
MAX_REFUSALS: Final = 100
_OWN: Final = b".nfsha-"
_VERSION: Final = 1
_RECORD: Final = "entry.json"
_MAX_RECORD_BYTES: Final = 64 << 10
_MAX_TEXT: Final = 2000
_TREE: Final = b"tree"
_MAKING: Final = b"making"
_DROPPED: Final = ".dropped"
_TIME: Final = "%Y%m%dT%H%M%S"
_NAME: Final = re.compile(r"(\d{8}T\d{6})\.(\d{3})Z-([a-z][a-z0-9-]{0,31})-[0-9a-f]{8}")
_REASON: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")
_EPOCH_ID: Final = re.compile(r"[0-9a-f]{16}")
_MAX_FILE_NAME: Final = 255  # NAME_MAX (linux/limits.h)
_OLDEST: Final = datetime(1970, 1, 1, tzinfo=UTC)

Document = dict[str, Any]


class QuarantineError(Exception):
    """The quarantine cannot do it; the text says what and why, for an operator."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What one operation put aside.

    `created_ns` is wall clock. `files` and `bytes` (as allocated on the disk) are None until the
    entry is finished, and while a restore from it is under way. `trouble` says what is wrong with
    the record of an entry that was not written to its end; the files of it are still there.
    """

    name: str
    reason: str
    why: str
    created_ns: int
    epoch: Epoch | None
    operation: str
    by: str
    complete: bool
    files: int | None = None
    bytes: int | None = None
    trouble: str = ""

    @property
    def backup_dir(self) -> str:
        """Where its files go, relative to the volume's root: what rsync's --backup-dir takes."""
        return f"{STORE}/{self.name}/{_TREE.decode()}"


@dataclass(frozen=True, slots=True)
class Listing:
    """The entries, the oldest first; `more` when there are more than `MAX_ENTRIES`."""

    entries: tuple[Entry, ...]
    more: bool = False


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

    def as_json(self) -> Document:
        """What JSON can carry: the name as `shown`."""
        return {**asdict(self), "name": self.shown}


@dataclass(frozen=True, slots=True)
class Page:
    """A part of what an entry holds, in the order of the names; ask on with the last name."""

    items: tuple[Item, ...]
    more: bool


@dataclass(frozen=True, slots=True)
class Refusal:
    """One file that was left where it is, and why."""

    name: bytes
    why: str


@dataclass(frozen=True, slots=True)
class Kept:
    """What `keep` put aside: these names, in this order. `refused` were not touched."""

    names: tuple[bytes, ...]
    refused: tuple[Refusal, ...]


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


@dataclass(frozen=True, slots=True)
class Usage:
    """What the store takes: entries, files, bytes allocated, and since when (wall clock)."""

    entries: int
    files: int
    bytes: int
    oldest_ns: int | None
    unfinished: int


class Quarantine:
    """The store of the volume whose root folder is open as `root_fd`, which stays the caller's.

    `clock_ns` is the wall clock. All methods raise QuarantineError, with the reason in words, when
    the store is not one that nfsha made (a link, another owner), or the disk refuses.
    """

    def __init__(self, root_fd: int, *, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._root = root_fd
        self._clock_ns = clock_ns

    def begin(
        self, reason: str, *, why: str, epoch: Epoch | None, operation: str, by: str
    ) -> Entry:
        """Makes a durable, empty entry. `reason` is part of its name: a-z, 0-9 and dashes.

        ValueError for another reason. QuarantineError also when there are `MAX_ENTRIES` already.
        """
        if not _REASON.fullmatch(reason):
            raise ValueError(f"{reason!r} is no reason: a-z, 0-9 and dashes, at most 32")
        now_ns = self._clock_ns()
        entry = Entry(
            _entry_name(now_ns, reason), reason, why[:_MAX_TEXT], now_ns, epoch,
            operation[:_MAX_TEXT], by[:_MAX_TEXT], complete=False,
        )  # fmt: skip
        with _in_words("cannot begin a quarantine entry"), self._store(make=True) as store:
            with contextlib.suppress(OSError):  # an old drop, and no reason to refuse a new entry
                _sweep(store)
            if len(_entry_names(store)) >= MAX_ENTRIES:
                raise QuarantineError(
                    f"the quarantine holds {MAX_ENTRIES} entries, which is the limit: restore or"
                    " drop some"
                )
            try:
                _make_entry(store, entry)
            except OSError:
                with contextlib.suppress(OSError):
                    _drop(store, entry.name)
                raise
        return entry

    def finish(self, entry: Entry) -> Entry | None:
        """Counts what the entry holds and marks it complete, durably.

        Returns None, and removes the entry, when nothing was put there. Idempotent.
        """
        with self._entry(entry.name, "finish") as (store, folder):
            with beneath.folder_at(folder, _TREE) as tree:
                beneath.sync_filesystem(tree)
                files, size = _count(tree)
            if not files:
                _drop(store, entry.name)
                return None
            done = replace(entry, complete=True, files=files, bytes=size, trouble="")
            _write_record(folder, done)
            return done

    def keep(self, entry: Entry, names: Sequence[bytes], *, in_place: bool = False) -> Kept:
        """Moves files (not folders) into the entry by rename: they stay what they are.

        `in_place` gives regular files a second name in the entry instead (a hard link), for a
        transfer that replaces them by rename next: so there is no moment without the file. Where
        links are impossible it moves. At most `MAX_NAMES` names (else ValueError). Durable when it
        returns.
        """
        if len(names) > MAX_NAMES:
            raise ValueError(f"{len(names)} names at once; at most {MAX_NAMES}")
        kept: list[bytes] = []
        refused: list[Refusal] = []
        with (
            self._entry(entry.name, "put files into") as (_, folder),
            beneath.folder_at(folder, _TREE) as tree,
        ):
            for name in names:
                try:
                    _keep_one(self._root, tree, name, in_place=in_place)
                except (OSError, ValueError) as error:
                    refused.append(Refusal(name, _words(error)))
                else:
                    kept.append(name)
            beneath.sync_filesystem(tree)
        return Kept(tuple(kept), tuple(refused))

    def list(self) -> Listing:
        """All entries, the oldest first, those without a sound record too."""
        with _in_words("cannot list the quarantine"), self._store(make=False) as store:
            if store is None:
                return Listing(())
            names = sorted(_entry_names(store))
            found = (_read_entry(store, name) for name in names[:MAX_ENTRIES])
            return Listing(
                tuple(entry for entry in found if entry is not None), len(names) > MAX_ENTRIES
            )

    def show(self, name: str, *, after: bytes | None = None, limit: int = 1000) -> Page:
        """What an entry holds, `limit` (1 to `MAX_PAGE`) things at a time, behind `after`."""
        limit = max(1, min(limit, MAX_PAGE))
        with (
            self._entry(name, "show") as (_, folder),
            beneath.folder_at(folder, _TREE) as tree,
        ):
            items = []
            for path in _in_order(tree, after, limit + 2):
                found = beneath.look_at(tree, path)
                if found is not None:
                    items.append(_item(path, found))
                if len(items) > limit:
                    break
        return Page(tuple(items[:limit]), len(items) > limit)

    def restore(
        self,
        name: str,
        names: Sequence[bytes] | None = None,
        *,
        to: bytes | None = None,
        beside: bool = False,
    ) -> Restored:
        """Moves files back to their places, or below the folder `to` of the same volume.

        `names` are paths as `show` tells them (a folder means all below it), None means all. Each
        file moves in one atomic step that never replaces anything. If anything stands in one of the
        places, nothing is moved and the refusals say what is in the way; with `beside`, those files
        go to `NAME.nfsha-restored-ENTRY` instead. Missing folders are made with the attributes that
        they had. An entry with nothing left is removed.

        On the active node only, where clients see it like any other write; on the passive node only
        with a `to` that the operator will copy from before the next pass deletes it.
        """
        with self._entry(name, "restore from") as (store, folder):
            entry = _read_entry(store, name)
            job = _Restore(self._root, folder, name, to=to, beside=beside)
            with beneath.folder_at(folder, _TREE) as tree:
                job.look(tree, names)
                if job.refused_count:
                    return job.result(emptied=False)
                if entry is not None and not entry.trouble:
                    _write_record(folder, replace(entry, files=None, bytes=None))
                job.move(tree, names)
                beneath.sync_filesystem(tree)
                files, size = _count(tree)
            if not files:
                _drop(store, name)
            elif entry is not None and entry.complete:
                _write_record(folder, replace(entry, files=files, bytes=size))
            return job.result(emptied=not files)

    def drop(self, name: str, *, confirm: str) -> None:
        """Deletes an entry for good. `confirm` repeats its name, so that no slip does it."""
        if confirm != name:
            raise QuarantineError(
                f"to drop {name} for good, confirm it by its name; got {confirm!r}"
            )
        with self._entry(name, "drop") as (store, _):
            _drop(store, name)

    def usage(self) -> Usage:
        """What the store takes. Walks only the entries that are not finished."""
        entries = [self._counted(entry) for entry in self.list().entries]
        return Usage(
            entries=len(entries),
            files=sum(entry.files or 0 for entry in entries),
            bytes=sum(entry.bytes or 0 for entry in entries),
            oldest_ns=min((entry.created_ns for entry in entries), default=None),
            unfinished=sum(not entry.complete for entry in entries),
        )

    def expired(self, max_age_ms: int | None, max_bytes: int | None) -> tuple[Entry, ...]:
        """The entries beyond the limits: those too old, and the oldest ones while all is too large.

        An alarm, and nothing more, unless the operator configured `drop_expired`. Unfinished
        entries count, so that what a crash left does not stay forever unseen.
        """
        entries = [self._counted(entry) for entry in self.list().entries]
        total = sum(entry.bytes or 0 for entry in entries)
        now_ns = self._clock_ns()
        beyond = []
        for entry in sorted(entries, key=lambda one: one.created_ns):
            old = max_age_ms is not None and now_ns - entry.created_ns > max_age_ms * 1_000_000
            if old or (max_bytes is not None and total > max_bytes):
                beyond.append(entry)
                total -= entry.bytes or 0
        return tuple(beyond)

    def drop_expired(self, max_age_ms: int | None, max_bytes: int | None) -> tuple[Entry, ...]:
        """Drops the finished entries that `expired` names, for good, and returns them.

        Only where the operator configured it, and never while an operation is under way.
        """
        gone = [entry for entry in self.expired(max_age_ms, max_bytes) if entry.complete]
        for entry in gone:
            self.drop(entry.name, confirm=entry.name)
        return tuple(gone)

    def _counted(self, entry: Entry) -> Entry:
        if entry.files is not None:
            return entry
        files = size = 0
        with (
            self._entry(entry.name, "count") as (_, folder),
            contextlib.suppress(FileNotFoundError),  # cut before it had a tree
            beneath.folder_at(folder, _TREE) as tree,
        ):
            files, size = _count(tree)
        return replace(entry, files=files, bytes=size)

    @contextlib.contextmanager
    def _store(self, *, make: bool) -> Iterator[Any]:
        """The open store; None where there is none and it is not to be made."""
        fd = _open_store(self._root, make=make)
        try:
            yield fd
        finally:
            if fd is not None:
                os.close(fd)

    @contextlib.contextmanager
    def _entry(self, name: str, verb: str) -> Iterator[tuple[int, int]]:
        """The open store and entry folder, for one operation named by `verb`."""
        if not _NAME.fullmatch(name):
            raise QuarantineError(f"{name!r} is not the name of a quarantine entry")
        with _in_words(f"cannot {verb} {name}"), self._store(make=False) as store:
            if store is None:
                raise QuarantineError(f"there is no {name}: the volume has no quarantine")
            try:
                folder = beneath.step_into(store, name.encode())
            except FileNotFoundError:
                raise QuarantineError(f"there is no quarantine entry {name}") from None
            try:
                yield store, folder
            finally:
                os.close(folder)


class _Restore:
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
                    self._refuse(name, _words(error))

    def _look_at_place(self, name: bytes) -> None:
        place = self._prefix + name
        if place.startswith(_OWN):
            raise ValueError("a name that nfsha keeps for itself at the volume's root")
        found = beneath.look_at(self._root, place)  # ENOTDIR, ELOOP: the way there is blocked
        if found is not None and not self._beside:
            raise ValueError(f"{_kind(found.st_mode)} is in its place, {shown(place)}")

    def move(self, tree: int, names: Sequence[bytes] | None) -> None:
        """Moves file after file; a place that was taken meanwhile is refused like before."""
        emptied: list[bytes] = []
        for folder, leaves in self._chosen(tree, names):
            try:
                self._move_all(tree, folder, leaves)
            except OSError as error:
                self._refuse(folder, _words(error))
            emptied.append(folder)
        self._set_times()
        _prune(tree, emptied)

    def _move_all(self, tree: int, folder: bytes, leaves: Iterable[bytes]) -> None:
        with beneath.folder_at(tree, folder.rstrip(b"/")) as source:
            target = self._make_folders(tree, folder)
            try:
                for leaf in leaves:
                    try:
                        self._move_one(source, leaf, target, folder)
                    except OSError as error:
                        self._refuse(folder + leaf, _words(error))
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
            yield from _leaves(tree, b"")
            return
        for name in names:
            try:
                found = beneath.look_at(tree, name)
            except (OSError, ValueError) as error:
                self._refuse(name, _words(error))
                continue
            if found is None:
                self._refuse(name, "not in this entry")
            elif stat.S_ISDIR(found.st_mode):
                yield from _leaves(tree, name + b"/")
            else:
                folder, slash, leaf = name.rpartition(b"/")
                yield folder + slash, [leaf]

    def _refuse(self, name: bytes, why: str) -> None:
        self.refused_count += 1
        if len(self._refused) < MAX_REFUSALS:
            self._refused.append(Refusal(name, why))


def over_limits(usage: Usage, now_ns: int, max_age_ms: int | None, max_bytes: int | None) -> str:
    """The alarm in words when the store is older or larger than the limits; else nothing."""
    said = []
    if max_bytes is not None and usage.bytes > max_bytes:
        said.append(f"it holds {usage.bytes:,} bytes, the limit is {max_bytes:,}")
    if max_age_ms is not None and usage.oldest_ns is not None:
        age_ms = (now_ns - usage.oldest_ns) // 1_000_000
        if age_ms > max_age_ms:
            said.append(
                f"its oldest entry is {age_ms // 3_600_000:,} h old, the limit is"
                f" {max_age_ms // 3_600_000:,} h"
            )
    return "; ".join(said)


def _open_store(root: int, *, make: bool) -> int | None:
    name = STORE.encode()
    try:
        fd = beneath.step_into(root, name)
    except FileNotFoundError:
        if not make:
            return None
        with beneath.same_times(root):
            fd = beneath.make_private(root, name)
        os.fsync(root)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise QuarantineError(
                f"{STORE} at the volume's root is not a folder that nfsha made: move it away"
            ) from error
        raise
    try:
        _check_store(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_store(fd: int) -> None:
    found = os.fstat(fd)
    if found.st_uid != os.geteuid():
        raise QuarantineError(
            f"{STORE} at the volume's root belongs to user {found.st_uid}, not to nfsha: move it"
            " away"
        )
    if stat.S_IMODE(found.st_mode) != 0o700:  # somebody had a look, and left it open
        os.fchmod(fd, 0o700)


def _entry_names(store: int) -> list[str]:
    """At most `MAX_ENTRIES` + 1 of them."""
    found: list[str] = []
    for batch in beneath.batches(store):
        found += [one.name for one in batch if _NAME.fullmatch(one.name)]
        if len(found) > MAX_ENTRIES:
            break
    return found[: MAX_ENTRIES + 1]


def _entry_name(now_ns: int, reason: str) -> str:
    when = _OLDEST + timedelta(microseconds=now_ns // 1000)
    return f"{when.strftime(_TIME)}.{when.microsecond // 1000:03d}Z-{reason}-{secrets.token_hex(4)}"


def _make_entry(store: int, entry: Entry) -> None:
    folder = beneath.make_private(store, entry.name.encode())
    try:
        _write_record(folder, entry)
        os.close(beneath.make_private(folder, _TREE))
        os.fsync(folder)
    finally:
        os.close(folder)
    os.fsync(store)


def _read_entry(store: int, name: str) -> Entry | None:
    """None when it is gone meanwhile, or is no folder."""
    try:
        with beneath.folder_at(store, name.encode()) as folder:
            return _decode_record(name, _read_record(folder))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read_record(folder: int) -> bytes:
    """Nothing where there is none, or where something stands in its place that is none."""
    try:
        return read_small_at(folder, _RECORD, _MAX_RECORD_BYTES)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.EINVAL, errno.EFBIG):
            return b""
        raise


def _write_record(folder: int, entry: Entry) -> None:
    """Whole or not at all, and durable."""
    document = asdict(entry)
    del document["trouble"]
    data = json.dumps({"nfsha_quarantine": _VERSION, **document}, indent=1).encode() + b"\n"
    write_durably_at(folder, _RECORD, data, mode=0o600)


def _decode_record(name: str, data: bytes) -> Entry:
    matched = _NAME.fullmatch(name)
    if matched is None:
        raise ValueError(f"{name!r} is not the name of an entry")
    when = datetime.strptime(matched[1], _TIME).replace(tzinfo=UTC)
    created_ns = (int((when - _OLDEST).total_seconds()) * 1000 + int(matched[2])) * 1_000_000
    blank = Entry(name, matched[3], "", created_ns, None, "", "", complete=False)
    if not data:
        return replace(blank, trouble="it has no record: cut when it began, or altered")
    try:
        document = json.loads(data)
        if not isinstance(document, dict):
            raise ValueError("not an object")
        return _entry_of(blank, document)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return replace(blank, trouble=f"its record is damaged ({error})"[:_MAX_TEXT])


def _entry_of(blank: Entry, document: Document) -> Entry:
    if document.pop("nfsha_quarantine") != _VERSION:
        raise ValueError("not a version that this nfsha reads")
    epoch = document.pop("epoch")
    entry = Entry(epoch=None if epoch is None else _epoch_of(epoch), **document)
    texts = (entry.reason, entry.why, entry.operation, entry.by)
    numbers = (entry.files, entry.bytes)
    if entry.name != blank.name or entry.trouble or not all(isinstance(one, str) for one in texts):
        raise ValueError("a text is wrong")
    if type(entry.created_ns) is not int or type(entry.complete) is not bool:
        raise ValueError("the time or the mark of completeness is wrong")
    if not all(one is None or (type(one) is int and one >= 0) for one in numbers):
        raise ValueError("a count is wrong")
    return entry


def _epoch_of(document: Document) -> Epoch:
    number, identity = document["number"], document["id"]
    if type(number) is not int or number < 1 or not _EPOCH_ID.fullmatch(identity):
        raise ValueError("the epoch is wrong")
    return Epoch(number, identity, Role(document["authority"]))


def _keep_one(root: int, tree: int, name: bytes, *, in_place: bool) -> None:
    parts = beneath.parts_of(name)
    if parts[0].startswith(_OWN):
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


def _leaves(tree: int, start: bytes) -> Iterator[tuple[bytes, list[bytes]]]:
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


def _in_order(tree: int, after: bytes | None, room: int) -> Iterator[bytes]:
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


def _item(name: bytes, found: os.stat_result) -> Item:
    return Item(
        name, _kind(found.st_mode), found.st_size, found.st_mtime_ns, found.st_mode,
        found.st_uid, found.st_gid, found.st_nlink,
    )  # fmt: skip


def _kind(mode: int) -> str:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "folder"
    return "symlink" if stat.S_ISLNK(mode) else "special file"


def _count(tree: int) -> tuple[int, int]:
    """Files (names), and bytes as allocated, each inode once."""
    files = size = 0
    seen: set[int] = set()
    for folder, leaves in _leaves(tree, b""):
        with beneath.folder_at(tree, folder.rstrip(b"/")) as fd:
            for leaf in leaves:
                found = os.stat(leaf, dir_fd=fd, follow_symlinks=False)
                files += 1
                if found.st_nlink > 1 and found.st_ino in seen:
                    continue
                if found.st_nlink > 1:
                    seen.add(found.st_ino)
                size += found.st_blocks * 512  # the unit of st_blocks (stat(3type))
    return files, size


def _prune(tree: int, folders: Sequence[bytes]) -> None:
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


def _drop(store: int, name: str) -> None:
    """First out of the list, in one step; then piece by piece. A crash between is swept up."""
    os.rename(name, name + _DROPPED, src_dir_fd=store, dst_dir_fd=store)
    os.fsync(store)
    _sweep(store)


def _sweep(store: int) -> None:
    """Removes what a drop that was cut has left."""
    for batch in beneath.batches(store):
        for one in batch:
            if one.name.endswith(_DROPPED) and one.is_dir(follow_symlinks=False):
                name = os.fsencode(one.name)
                with beneath.folder_at(store, name) as folder:
                    _empty(folder)
                os.rmdir(name, dir_fd=store)


def _empty(top: int) -> None:
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


@contextlib.contextmanager
def _in_words(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise QuarantineError(f"{what}: {_words(error)}") from error


def _words(error: OSError | ValueError) -> str:
    if isinstance(error, FileExistsError):
        return "something is in its place"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)

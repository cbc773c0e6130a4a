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
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from nfsha.core.model import Epoch
from nfsha.replica.files import beneath
from nfsha.replica.quarantine import kept_tree
from nfsha.replica.quarantine.entry import (
    MAX_TEXT,
    NAME,
    REASON,
    STORE,
    TREE,
    Entry,
    decode_record,
    entry_name,
    read_record,
    write_record,
)
from nfsha.replica.quarantine.kept_tree import Item
from nfsha.replica.quarantine.restoring import MAX_REFUSALS, Refusal, Restore, Restored

__all__ = [
    "MAX_REFUSALS",
    "STORE",
    "Entry",
    "Item",
    "Kept",
    "Listing",
    "Page",
    "Quarantine",
    "QuarantineError",
    "Refusal",
    "Restored",
    "Usage",
    "over_limits",
]

MAX_ENTRIES: Final = 10_000
MAX_NAMES: Final = 10_000
MAX_PAGE: Final = 10_000
_DROPPED: Final = ".dropped"


class QuarantineError(Exception):
    """The quarantine cannot do it; the text says what and why, for an operator."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Entries, the oldest first; `more` when there are more than were asked for."""

    entries: tuple[Entry, ...]
    more: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """A part of what an entry holds, in the order of the names; ask on with the last name."""

    items: tuple[Item, ...]
    more: bool


@dataclass(frozen=True, slots=True)
class Kept:
    """What `keep` put aside: these names, in this order. `refused` were not touched."""

    names: tuple[bytes, ...]
    refused: tuple[Refusal, ...]


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
        if not REASON.fullmatch(reason):
            raise ValueError(f"{reason!r} is no reason: a-z, 0-9 and dashes, at most 32")
        now_ns = self._clock_ns()
        entry = Entry(
            entry_name(now_ns, reason), reason, why[:MAX_TEXT], now_ns, epoch,
            operation[:MAX_TEXT], by[:MAX_TEXT], complete=False,
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
            with beneath.folder_at(folder, TREE) as tree:
                beneath.sync_filesystem(tree)
                files, size = kept_tree.count(tree)
            if not files:
                _drop(store, entry.name)
                return None
            done = replace(entry, complete=True, files=files, bytes=size, trouble="")
            write_record(folder, done)
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
            beneath.folder_at(folder, TREE) as tree,
        ):
            for name in names:
                try:
                    kept_tree.keep_one(self._root, tree, name, in_place=in_place)
                except (OSError, ValueError) as error:
                    refused.append(Refusal(name, kept_tree.words(error)))
                else:
                    kept.append(name)
            beneath.sync_filesystem(tree)
        return Kept(tuple(kept), tuple(refused))

    def list(self, *, after: str = "", limit: int = MAX_ENTRIES) -> Listing:
        """The first `limit` entries behind the one named `after`, oldest first.

        Those without a sound record too.
        """
        with _in_words("cannot list the quarantine"), self._store(make=False) as store:
            if store is None:
                return Listing(())
            names = sorted(name for name in _entry_names(store) if name > after)
            found = (_read_entry(store, name) for name in names[:limit])
            return Listing(tuple(entry for entry in found if entry is not None), len(names) > limit)

    def holds(self, name: str) -> bool:
        """Whether there is an entry of this name."""
        with _in_words(f"cannot look for {name[:80]!r}"), self._store(make=False) as store:
            return (
                store is not None
                and NAME.fullmatch(name) is not None
                and beneath.look_at(store, name.encode()) is not None
            )

    def show(self, name: str, *, after: bytes | None = None, limit: int = 1000) -> Page:
        """What an entry holds, `limit` (1 to `MAX_PAGE`) things at a time, behind `after`."""
        limit = max(1, min(limit, MAX_PAGE))
        with (
            self._entry(name, "show") as (_, folder),
            beneath.folder_at(folder, TREE) as tree,
        ):
            items = []
            for path in kept_tree.in_order(tree, after, limit + 2):
                found = beneath.look_at(tree, path)
                if found is not None:
                    items.append(kept_tree.item_of(path, found))
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
            job = Restore(self._root, folder, name, to=to, beside=beside)
            with beneath.folder_at(folder, TREE) as tree:
                job.look(tree, names)
                if job.refused_count:
                    return job.result(emptied=False)
                if entry is not None and not entry.trouble:
                    write_record(folder, replace(entry, files=None, bytes=None))
                job.move(tree, names)
                beneath.sync_filesystem(tree)
                files, size = kept_tree.count(tree)
            if not files:
                _drop(store, name)
            elif entry is not None and entry.complete:
                write_record(folder, replace(entry, files=files, bytes=size))
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
            beneath.folder_at(folder, TREE) as tree,
        ):
            files, size = kept_tree.count(tree)
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
        if not NAME.fullmatch(name):
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
        found += [one.name for one in batch if NAME.fullmatch(one.name)]
        if len(found) > MAX_ENTRIES:
            break
    return found[: MAX_ENTRIES + 1]


def _make_entry(store: int, entry: Entry) -> None:
    folder = beneath.make_private(store, entry.name.encode())
    try:
        write_record(folder, entry)
        os.close(beneath.make_private(folder, TREE))
        os.fsync(folder)
    finally:
        os.close(folder)
    os.fsync(store)


def _read_entry(store: int, name: str) -> Entry | None:
    """None when it is gone meanwhile, or is no folder."""
    try:
        with beneath.folder_at(store, name.encode()) as folder:
            return decode_record(name, read_record(folder))
    except (FileNotFoundError, NotADirectoryError):
        return None


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
                    kept_tree.empty(folder)
                os.rmdir(name, dir_fd=store)


@contextlib.contextmanager
def _in_words(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise QuarantineError(f"{what}: {kept_tree.words(error)}") from error

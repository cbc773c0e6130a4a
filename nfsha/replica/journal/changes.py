"""The change journal: which folders of a volume changed, so that a pass costs what changed.

It watches one mounted filesystem on the active node and tells the passive one. It never guesses: as
soon as it cannot vouch for its list it says so, and from which sequence number on, and the other
side walks the whole volume. It copies nothing and writes nothing on the volume.

Between two calls it holds nothing open on the volume, so it does not keep it from being unmounted;
that ends the journal, which then says so.

Not seen, because the kernel tells nothing of it: writes through a memory mapping on this machine
(none come by NFS), and POSIX ACLs set by knfsd before Linux 6.2. The slower full walk finds these.

`start`, `collect` and `publish` block, on the filesystem or on each other: call them in a thread,
or in several. A publish may take half a minute when it has to search. All the others never wait.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from nfsha.replica.files.durable import write_durably
from nfsha.replica.journal import fanotify
from nfsha.replica.journal.handles import NotThereError, Tree, UnresolvedError
from nfsha.replica.journal.ledger import Counters, Ledger, WalkReason
from nfsha.replica.journal.published import (
    ChangesError,
    LastRun,
    Published,
    encode_published,
    last_run_path,
    read_last,
    read_published,
)

__all__ = [
    "ChangeJournal",
    "ChangesError",
    "Counters",
    "LastRun",
    "Published",
    "WalkReason",
    "read_last",
    "read_published",
]

COLLECT_EVERY_MS = 1000
"""How often to collect at rest: long enough for the kernel to make one of equal events."""

COLLECT_BUSY_MS = 100
"""How often while so many events come that a second of them could fill the queue (16,384)."""

NOTES_EVERY_MS = 5000
"""The least time between two writes of the notes: an fsync each."""

MAX_COLLECT_BYTES = 8 << 20
"""The most that one `collect` takes, about 90,000 events."""

_BUSY_EVENTS = 3000
_MAX_DRAIN_BYTES = 1 << 30  # one publish, and only what waited when it began
_MAX_ENTRIES = 5_000_000
_CLOCK_SLACK_MS = 250  # a slewed clock is no stepped clock: chrony slews by 8 % at most
_CLOCK_SLEW_DIVISOR = 10

_log = logging.getLogger(__name__)


class ChangeJournal:
    """The journal of one mounted volume. See the module; nothing happens before `start`."""

    def __init__(  # noqa: PLR0913 - plain values; the last three are bounds
        self,
        root: Path,
        root_fd: int,
        uuid: str,
        folder: Path,
        clock_ms: Callable[[], int],
        wall_ns: Callable[[], int],
        *,
        max_folders: int = 50_000,
        max_entries: int = _MAX_ENTRIES,
        unlimited_queue: bool = False,
    ) -> None:
        """Takes the volume's root, open (for `start` only), and the durable folder for its notes.

        clock_ms: CLOCK_BOOTTIME; wall_ns: CLOCK_REALTIME. max_folders: more changed folders than
        that mean a full walk. max_entries: the most entries of folders that one publish looks at
        (in moved folders, in search of names). unlimited_queue: let the kernel keep any number of
        events, in this service's memory accounting, instead of `fs.fanotify.max_queued_events`.
        """
        self._root = root
        self._root_fd = root_fd
        self._uuid = uuid
        self._folder = folder
        self._notes = last_run_path(folder, uuid)
        self._clock_ms = clock_ms
        self._wall_ns = wall_ns
        self._unlimited = unlimited_queue
        self._lock = threading.Lock()
        self._ledger = Ledger(str(root), clock_ms, max_folders=max_folders, max_entries=max_entries)
        self._group: fanotify.Group | None = None
        self._identity = (0, 0)
        self._journal_id = secrets.token_hex(8)
        self._acknowledged = 0
        self._ended = ""
        self._closing = self._closed = False
        self._applied: int | None = None
        self._clocks: tuple[int, int] | None = None
        self._as_of_ns = 0
        self._again_ms = COLLECT_EVERY_MS
        self._inherited: frozenset[bytes] = frozenset()
        self._note_again_ms = clock_ms()
        self._noted: tuple[object, ...] = ()
        self._looked_well = False
        self._listed_nothing: tuple[object, ...] | None = None

    def start(self) -> None:
        """Begins to watch; what the last run left unacknowledged stays in the notes.

        ChangesError, in words, where the kernel, the filesystem or a capability does not allow it:
        then every pass is a full walk. The root_fd is not used after this.
        """
        with self._alone():
            self._inherit()
            group = self._open_group()
            try:
                found = os.fstat(self._root_fd)
                self._identity = (found.st_dev, found.st_ino)
                self._mark(group)
                self._prove_handles()
            except BaseException:
                os.close(group.fd)
                raise
            self._group = group

    def fileno(self) -> int:
        """The descriptor that is readable while events wait; ChangesError when it is not open."""
        if self._group is None:
            raise ChangesError(f"the change journal of {self._root} does not run")
        return self._group.fd

    def close(self) -> None:
        """Ends it, also one that never started; never waits, idempotent.

        Another call that is at work ends early, and the volume is in use until it does. A later
        publish says that it ended.
        """
        self._closing = True
        self._end_if_closing()

    @property
    def journal_id(self) -> str:
        """Random, new with each journal."""
        return self._journal_id

    @property
    def ended(self) -> str:
        """Why it watches no more (unmounted, closed), or ""; go on with a new one."""
        return self._ended

    @property
    def collect_again_in_ms(self) -> int:
        """When to call `collect` next: in a second, or soon while many events come."""
        return self._again_ms

    @property
    def counters(self) -> Counters:
        """A copy of the counters."""
        now = self._ledger.counters
        return replace(now, folders=len(self._ledger), full_walks=dict(now.full_walks))

    def collect(self) -> None:
        """Takes the events that wait, at most `MAX_COLLECT_BYTES`. Does not raise."""
        with self._alone():
            self._look_at_clocks()
            before = self._ledger.counters.events
            self._with_tree(lambda tree: self._drain(tree, MAX_COLLECT_BYTES))
            busy = self._ledger.counters.events - before > _BUSY_EVENTS
            self._again_ms = COLLECT_BUSY_MS if busy else COLLECT_EVERY_MS

    def publish(self, path: Path) -> Published:
        """Takes all events, then writes the list to `path` (atomically).

        The notes are written too, durably, when they are not up to date and the last ones are
        `NOTES_EVERY_MS` old.

        ChangesError when `path` cannot be written, and before `start`. A volume that is gone or
        fails is no error: the list says that it cannot vouch. Notes that cannot be written are
        counted and logged.
        """
        with self._alone():
            if self._group is None and not self._ended:
                raise ChangesError(f"the change journal of {self._root} was not started")
            self._as_of_ns = self._look_at_clocks()
            self._with_tree(self._bring_up_to_date)
            self._listed_nothing = None
            published, data = self._list()
            noted = self._write_notes(published)
            try:
                _write(path, data)
            except OSError as error:
                raise ChangesError(f"cannot write {path}: {_words(error)}") from error
            if noted and self._looked_well and self._ledger.empty:
                self._listed_nothing = self._state()
            return published

    def still_true_ns(self) -> int | None:
        """Up to when (wall clock, ns) the list that was published last, of no folders, is all.

        None when it must be published anew to know: something happened, or may have. Costs a
        twentieth of that, for it does not look at the volume; waits for nobody, and never raises.
        """
        return self._at_once(self._nothing_since)

    def at_rest(self) -> bool:
        """Whether nothing waits to be collected, and it watches; as cheap as `still_true_ns`."""
        if self._at_once(self._quiet_ns) is None:
            return False
        self._again_ms = COLLECT_EVERY_MS
        return True

    def _at_once(self, look: Callable[[], int | None]) -> int | None:
        """None while another call is at work."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            return look()
        except OSError:
            return None
        finally:
            self._lock.release()
            self._end_if_closing()

    def _nothing_since(self) -> int | None:
        as_of_ns = self._quiet_ns()
        applied = self._applied
        forgets = applied is not None and (applied != self._acknowledged or bool(self._inherited))
        if as_of_ns is None or forgets or self._state() != self._listed_nothing:
            return None
        self._as_of_ns = as_of_ns
        return as_of_ns

    def _quiet_ns(self) -> int | None:
        """The wall clock before it was seen that no event waits and the mark is there."""
        if self._group is None:
            return None
        as_of_ns = self._look_at_clocks()
        if fanotify.queued_bytes(self._group) or not fanotify.is_marked(self._group):
            return None
        return as_of_ns

    def _state(self) -> tuple[object, ...]:
        """Another one as soon as anything is different that a list says."""
        ledger = self._ledger
        return (ledger.counters.events, ledger.seq, ledger.complete_from, self._acknowledged)

    def acknowledge(self, journal_id: str, seq: int) -> None:
        """Takes note that the passive node has applied so much in a complete pass; never waits.

        The next call of another method forgets it. Nothing changes for another journal's id, or for
        a sequence number that cannot be.
        """
        if journal_id == self._journal_id and 0 <= seq <= self._ledger.seq:
            self._applied = seq

    # ---- start and end

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One call at a time; what was acknowledged or closed meanwhile is done here."""
        try:
            with self._lock:
                self._forget_applied()
                yield
        finally:
            self._end_if_closing()

    def _forget_applied(self) -> None:
        if self._applied is not None and self._applied >= self._acknowledged:
            self._acknowledged = self._applied
            self._inherited = frozenset()
            self._ledger.forget(self._acknowledged)
        self._applied = None

    def _end_if_closing(self) -> None:
        """Whoever has the lock does this after letting it go, so one of both always ends it."""
        while self._closing and not self._closed and self._lock.acquire(blocking=False):
            try:
                self._end("it was closed", level=logging.DEBUG)
                self._closed = True
            finally:
                self._lock.release()

    def _inherit(self) -> None:
        try:
            last = read_last(self._folder, self._uuid)
        except ChangesError as error:
            _log.warning("what the last run noted as changed is lost: %s", error)
            return
        if last is not None:
            self._inherited = frozenset(path for path, _ in last.published.folders)

    def _open_group(self) -> fanotify.Group:
        try:
            return fanotify.open_group(unlimited=self._unlimited)
        except OSError as error:
            raise ChangesError(f"cannot watch {self._root}: {_why_no_group(error)}") from error

    def _mark(self, group: fanotify.Group) -> None:
        try:
            fanotify.mark_filesystem(group, self._root_fd)
        except OSError as error:
            raise ChangesError(f"cannot watch {self._root}: {_why_no_mark(error)}") from error

    def _prove_handles(self) -> None:
        try:
            with Tree(self._root, *self._identity) as tree:
                if tree.path_of(tree.root_handle) != b".":
                    raise ChangesError(f"cannot watch {self._root}: its handle leads elsewhere")
        except (NotThereError, UnresolvedError) as error:
            raise ChangesError(f"cannot watch {self._root}: {error}") from error
        except OSError as error:
            raise ChangesError(f"cannot watch {self._root}: {_why_no_handle(error)}") from error

    def _end(self, why: str, *, level: int = logging.WARNING) -> None:
        if not self._ended:
            self._ended = why
            sentence = f"the change journal ended: {why}"
            self._ledger.ask_walk(WalkReason.ENDED, sentence, level=level)
        if self._group is not None:
            os.close(self._group.fd)
            self._group = None

    # ---- events

    def _with_tree(self, work: Callable[[Tree], object]) -> None:
        """Does work on the mounted volume; ends the journal when it is not there any more.

        The mark is looked at after the work: as long as it is there nothing was missed before. It
        is the only thing that tells an unmount with a new mount of the same filesystem.
        """
        self._looked_well = False
        if self._group is None:
            return
        try:
            with Tree(self._root, *self._identity) as tree:
                work(tree)
            if fanotify.is_marked(self._group):
                self._looked_well = True
            else:
                self._end("the filesystem was unmounted")
        except NotThereError as error:
            self._end(str(error))
        except (OSError, fanotify.EventFormatError) as error:
            why = _words(error) if isinstance(error, OSError) else str(error)
            self._ledger.ask_walk(WalkReason.TROUBLE, f"cannot look at {self._root}: {why}")

    def _drain(self, tree: Tree, limit_bytes: int) -> None:
        """Takes what waits, up to a limit. Equal events of one round are looked at once."""
        if self._group is None:
            return
        events: dict[bytes, int] = {}
        taken = 0
        while taken < limit_bytes and (data := fanotify.read_events(self._group)):
            taken += len(data)
            self._ledger.counters.events += fanotify.merge_events(data, events)
        if events:
            self._ledger.digest(tree, events)

    def _bring_up_to_date(self, tree: Tree) -> None:
        """All that was queued when this begins is in the list when it ends."""
        if self._group is None:
            return
        waiting = fanotify.queued_bytes(self._group)
        if waiting > _MAX_DRAIN_BYTES:
            raise OSError(errno.EOVERFLOW, f"{waiting} bytes of events wait")
        for _ in range(0, waiting, MAX_COLLECT_BYTES):
            self._drain(tree, MAX_COLLECT_BYTES)
        self._ledger.settle(tree, lambda: self._pause(tree))
        self._ledger.list_folders(tree)

    def _pause(self, tree: Tree) -> None:
        """Now and then during a search: the kernel's queue must not fill up, nor a close wait."""
        if self._closing:
            raise OSError(errno.ECANCELED, "it is being closed")
        self._drain(tree, MAX_COLLECT_BYTES)

    def _look_at_clocks(self) -> int:
        """Reads both clocks, notices a step back, and returns the wall clock."""
        wall_ns, now_ms = self._wall_ns(), self._clock_ms()
        if self._clocks is not None:
            wall_ms, boot_ms = (wall_ns - self._clocks[0]) // 1_000_000, now_ms - self._clocks[1]
            slack_ms = _CLOCK_SLACK_MS + boot_ms // _CLOCK_SLEW_DIVISOR
            if wall_ms < boot_ms - slack_ms or wall_ns < self._as_of_ns:
                sentence = f"the wall clock stepped back by {boot_ms - wall_ms} ms"
                self._ledger.ask_walk(WalkReason.CLOCK, sentence)
        self._clocks = (wall_ns, now_ms)
        return wall_ns

    # ---- the list

    def _list(self) -> tuple[Published, bytes]:
        try:
            published = self._published(self._ledger.listed())
            return published, encode_published(published)
        except ValueError as error:
            self._ledger.drop_all()
            self._ledger.ask_walk(WalkReason.TOO_MANY_FOLDERS, str(error))
        published = self._published({})
        return published, encode_published(published)

    def _published(self, folders: dict[bytes, int]) -> Published:
        ledger = self._ledger
        # Once it has ended nobody, whatever he has applied, can go by this list.
        complete_from = ledger.seq + 1 if self._ended else ledger.complete_from
        return Published(
            uuid=self._uuid,
            journal_id=self._journal_id,
            first=self._acknowledged + 1,
            last=ledger.seq,
            complete_from=complete_from,
            walk_reason=ledger.walk_reason,
            as_of_ns=self._as_of_ns,
            folders=tuple(sorted(folders.items())),
        )

    def _write_notes(self, published: Published) -> bool:
        """Keeps the list, with what the last run left, for a failback after a crash.

        Returns whether the notes say now what the list says.
        """
        now_ms = self._clock_ms()
        folders = dict.fromkeys(self._inherited, 0) | dict(published.folders)
        kept = replace(published, folders=tuple(sorted(folders.items())))
        content = (kept.folders, kept.complete_from, kept.first)
        if content == self._noted or now_ms < self._note_again_ms:
            return content == self._noted
        self._note_again_ms = now_ms + NOTES_EVERY_MS
        try:
            write_durably(self._notes, encode_published(kept), mode=0o600)
        except (OSError, ValueError) as error:
            self._ledger.counters.durable_failures += 1
            why = _words(error) if isinstance(error, OSError) else str(error)
            _log.warning("cannot note durably what changed, in %s: %s", self._notes, why)
            return False
        self._noted = content
        return True


def _write(path: Path, data: bytes) -> None:
    """Replaces a file of the runtime folder: whole or not at all, but gone with a power cut."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), 0o644)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _why_no_group(error: OSError) -> str:
    if error.errno == errno.EPERM:
        return "CAP_SYS_ADMIN is missing"
    if error.errno == errno.EINVAL:
        return "this kernel has no fanotify events with names (Linux 5.9 has)"
    if error.errno == errno.ENOSYS:
        return "this kernel has no fanotify, or a seccomp filter forbids it"
    if error.errno == errno.EMFILE:
        return _too_many_groups()
    return f"fanotify_init failed: {_words(error)}"


def _too_many_groups() -> str:
    """EMFILE has two meanings, see fanotify_init(2): only one of them also forbids a pipe."""
    try:
        for fd in os.pipe():
            os.close(fd)
        limit = fanotify.groups_max()
    except OSError as error:
        return f"too many files are open ({_words(error)})"
    return (
        f"all {limit} change watches that one user may have are in use: raise the sysctl "
        f"fs.fanotify.max_user_groups, one for each volume and some more"
    )


def _why_no_mark(error: OSError) -> str:
    if error.errno == errno.EPERM:
        return "CAP_SYS_ADMIN is missing"
    if error.errno == errno.EXDEV:
        return "it is a btrfs subvolume, of which the kernel tells no changes"
    if error.errno in (errno.ENODEV, errno.EOPNOTSUPP):
        return "its filesystem has no file handles of its own (an overlay, FUSE)"
    if error.errno == errno.ENOSPC:
        return "too many change watches are in use: raise the sysctl fs.fanotify.max_user_marks"
    return f"fanotify_mark failed: {_words(error)}"


def _why_no_handle(error: OSError) -> str:
    if error.errno == errno.EPERM:
        return "CAP_DAC_READ_SEARCH is missing"
    return f"it cannot be opened by its file handle: {_words(error)}"


def _words(error: OSError) -> str:
    return error.strerror or str(error)

"""One pass: makes a volume on this node equal to what the source's volume is, and says how it went.

At most three runs of rsync, each for one purpose, so that a deletion rests on a list that is whole:

1. plan: a dry run that names what differs. When nothing does, the pass is over: one walk.
2. copy: brings what differs, and deletes nothing (only what stands in the way, if the plan's
   deletions may be carried out). What is little is asked for by the names of the plan.
3. settle: deletes what the plan named and sets folders' attributes right, looking at the folders
   concerned only. Not after a run in which the source reported an I/O error.

It pulls into an open folder, never into a path, so that an unmount cannot turn it aside. It must
not decide whether to pull (epoch, identity and stamps are its caller's), and does not write the
stamp or the mark.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Final

from nfsha.replica.arguments import FETCH_TIMEOUT_S, INCOMING_NAME, Course, From, fetch, folder_list
from nfsha.replica.beneath import make_private, parts_of, sync_filesystem
from nfsha.replica.child import (
    GRACE_S,
    Child,
    ChildError,
    ChildStuckError,
    Line,
    Priority,
    Stream,
)
from nfsha.replica.deletions import (
    MAX_REPLACED_NAMES,
    OWN_ROOT_NAMES,
    PARTIAL_NAME,
    DeleteLimits,
    DeletionPlan,
    PlanReader,
    leaves_something,
    moved,
    ruling,
)
from nfsha.replica.exits import Complaints, Ending, Verdict, judge
from nfsha.replica.filling import watch_filling
from nfsha.replica.mountinfo import at_and_below, read_mounts, visible
from nfsha.replica.progress import Progress, ProgressReader, Stage, Stats, StatsError, Tail
from nfsha.replica.room import lacking
from nfsha.replica.stall import Activity, StallWatch, activity

__all__ = [
    "DeleteLimits",
    "DeletionPlan",
    "From",
    "PassOutcome",
    "PassRequest",
    "Planned",
    "Progress",
    "Pull",
    "Stage",
    "Verdict",
    "fetch_control",
]

_END_WITHIN_S: Final = 5.0
_LONGEST_S: Final = 7 * 24 * 3600
_FEW_INODES: Final = 16
_CHECKSUM_PATIENCE: Final = 30
_INT_MAX: Final = (1 << 31) - 1
_LOOKS_MAX: Final = 3
_VANISHED: Final = 24
_TIMED_OUT: Final = 30  # as rsync itself calls it
_WITH_COUNTS: Final = (0, 23, _VANISHED, 25)
MAX_CONTROL_BYTES: Final = 32 << 20


@dataclass(frozen=True, slots=True)
class PassRequest:
    """What one pass is to do.

    `root_fd`: the checked root of the volume; it stays the caller's and open until the end.
    `folders`: relative to it, b"." for itself; each is compared one level deep. None: a full walk.
    `resync_backup`: a folder relative to the root where that goes which the pass overwrites or
    deletes. `longest_s`: no single run of rsync takes longer. `expected_bytes`: how much a first
    copy will be, for its progress. `is_replica`: what is there may be served after a takeover, be
    it empty; so nothing half-received may lie where a client could see it. `priority`: of the runs
    of rsync on this node.
    """

    uuid: str
    root_fd: int
    source: From
    folders: tuple[bytes, ...] | None
    limits: DeleteLimits
    resync_backup: str | None = None
    bandwidth_kib_s: int | None = None
    timeout_s: int = 60
    connect_timeout_s: int = 5
    checksum: bool = False
    name: str = ""
    longest_s: int = _LONGEST_S
    expected_bytes: int | None = None
    is_replica: bool = False
    priority: Priority = Priority.LOW


@dataclass(frozen=True, slots=True)
class PassOutcome:
    """How a pass ended. Counts are of what was done, also when it ended early.

    `exit_code`: rsync's, of the run that gave the verdict. `files`: entries of the volume (of the
    source, after a full walk; else reckoned on from `known_files`). `plan`: what waits, or what was
    deleted; None when nothing was to be deleted or no plan could be made. `sentence` is for people.
    `vanished`: names that went away while they were read. A second look found them gone, or copied
    them, unless the verdict is INCOMPLETE.
    """

    verdict: Verdict
    exit_code: int
    files: int
    transferred_files: int
    transferred_bytes: int
    wire_bytes: int
    deletions: int
    plan: DeletionPlan | None
    sentence: str
    vanished: tuple[bytes, ...]
    seconds: float


_SEVERITY: Final = (
    Verdict.COMPLETE,
    Verdict.INCOMPLETE,
    Verdict.HELD,
    Verdict.RETRY,
    Verdict.STOPPED,
    Verdict.REFUSED,
    Verdict.FAILED,
    Verdict.KILLED,
)


@dataclass(frozen=True, slots=True)
class Planned:
    """What a pass would do, by a dry run that changed nothing. `deletions` counts files.

    `held`: why `plan` would have to wait. `names`: the first of what would be replaced or deleted.
    `trouble`: why nothing is known. `differ`: how many things the pass would copy, delete or set
    right in whatever way, and `first` is the name of one.
    """

    copy_files: int = 0
    copy_bytes: int = 0
    deletions: int = 0
    replaced: int = 0
    names: tuple[bytes, ...] = ()
    plan: DeletionPlan | None = None
    held: str = ""
    trouble: str = ""
    differ: int = 0
    first: bytes = b""


@dataclass(slots=True)
class _Run:
    """What came out of one rsync."""

    ending: Ending
    complaints: Complaints
    stats: Stats | None

    @property
    def went_through(self) -> bool:
        """It did its whole work: nothing failed, at most files vanished."""
        return self.ending.code in (0, _VANISHED)


@dataclass(slots=True)
class _Tally:
    endings: list[Ending] = field(default_factory=list)
    vanished: list[bytes] = field(default_factory=list)
    vanished_count: int = 0
    wire_bytes: int = 0
    transferred_files: int = 0
    transferred_bytes: int = 0
    created: int = 0
    deletions: int = 0
    entries: int | None = None
    full: str = ""

    def add(self, run: _Run) -> None:
        self.endings.append(run.ending)
        self.full = self.full or run.complaints.full
        self.vanished += run.complaints.vanished
        self.vanished_count += run.complaints.vanished_count
        if run.stats is not None:
            self.wire_bytes += run.stats.wire_bytes

    def add_copy(self, run: _Run, progress: Progress) -> None:
        self.add(run)
        if run.stats is None:
            self.add_cut(progress)
            return
        self.transferred_files += run.stats.transferred
        self.transferred_bytes += run.stats.transferred_bytes
        self.created += run.stats.created
        self.deletions += run.stats.deleted
        self.entries = run.stats.entries

    def add_cut(self, progress: Progress) -> None:
        """Notes what a copying run did that was cut: rsync gives no counts then."""
        self.transferred_files += progress.files
        self.transferred_bytes += progress.bytes


class _ScratchError(Exception):
    """The folder for short-lived files cannot be used."""


class Pull:
    """One pass. `clock_ms` is a clock in milliseconds that only goes forward.

    `scratch` is a folder of nfsha's own for short-lived files. Call `run` once, or `look` once.
    """

    def __init__(self, request: PassRequest, scratch: Path, clock_ms: Callable[[], int]) -> None:
        self.request = request
        self._scratch = scratch
        self._clock_ms = clock_ms
        self._bandwidth_kib_s = request.bandwidth_kib_s
        self._child: Child | None = None
        self._starting = asyncio.Lock()
        self._running: asyncio.Event | None = None
        self._again = False
        self._ending = False
        self._report: Callable[[Progress], None] = _nobody
        self._tally = _Tally()
        self._plan: DeletionPlan | None = None
        self._differed = False

    async def run(self, progress: Callable[[Progress], None]) -> PassOutcome:
        """Runs the pass to its end, and says what came of it; all troubles are in the outcome.

        `progress` is called on the loop, at most five times a second. Raises ChildStuckError when a
        process of the pass cannot be killed.
        """
        self._report = progress
        self._running = asyncio.Event()
        begun_ms = self._clock_ms()
        held = ""
        try:
            held = await self._pass()
        except (ChildError, _ScratchError) as error:
            self._fail(str(error))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._tally.full = str(error)
            self._fail(f"this node's volume: {error.strerror}")
        finally:
            self._running.set()
        if self._tally.full:
            shortage = await asyncio.to_thread(_shortage, self.request.root_fd)
            self._fail(f"{shortage} ({self._tally.full})")
        return self._outcome(held, (self._clock_ms() - begun_ms) / 1000)

    async def look(self) -> Planned:
        """Only the dry run: what the pass would do now. Changes nothing here nor at the source.

        All troubles are in what it returns, but for ChildStuckError as `run` raises it.
        """
        self._running = asyncio.Event()
        try:
            return await self._planned()
        except ChildStuckError:
            raise
        except (ChildError, _ScratchError) as error:
            return Planned(trouble=str(error))
        except OSError as error:
            return Planned(trouble=f"this node's volume: {error.strerror}")
        finally:
            self._running.set()

    async def _planned(self) -> Planned:
        if self.request.folders == ():
            return Planned()
        reader = PlanReader()
        data = await asyncio.to_thread(_folders_of, self.request)
        with await asyncio.to_thread(self._listed, data) as listed:
            argv = self._course(listed.name).plan()
            run = await self._rsync("look", argv, reader.take, reader.rest)
        if run.stats is None or not run.went_through:
            return Planned(trouble=run.ending.reason)
        plan = self._plan = await asyncio.to_thread(reader.finish)
        held = await asyncio.to_thread(self._ruling, reader) if plan.count else ""
        gone = tuple(name for name in plan.names if not name.endswith(b"/"))
        return Planned(
            copy_files=run.stats.transferred,
            copy_bytes=run.stats.transferred_bytes,
            deletions=plan.files,
            replaced=reader.replaced,
            names=(*reader.replaced_names, *gone[:MAX_REPLACED_NAMES]),
            plan=plan if plan.count else None,
            held=held,
            differ=reader.items,
            first=reader.first,
        )

    async def end(self, within_s: float = _END_WITHIN_S, *, at_once: bool = False) -> None:
        """Kills the pass; when this returns, nothing of it can touch the volume any more.

        A moment is left to rsync to keep what it has of a large file. Not with `at_once`: one that
        waits for a dead source would use it up, and a takeover waits with it.
        Raises ChildStuckError when a process, or a thread of this one, still hangs in the disk.
        """
        self._ending = True
        deadline_s = asyncio.get_running_loop().time() + within_s
        async with self._starting:  # so that no child is between its start and its name here
            child = self._child
        if child is not None:
            await child.end(within_s, grace_s=0.0 if at_once else GRACE_S)
        if self._running is not None:
            try:
                async with asyncio.timeout_at(deadline_s):
                    await self._running.wait()
            except TimeoutError as error:
                stuck = "a thread of this process, at work on the volume's root"
                raise ChildStuckError(self._called("pull"), [stuck]) from error

    async def limit_bandwidth(self, kib_s: int | None) -> None:
        """Gives the copying another limit, also while it runs: it begins again where it was."""
        if kib_s == self._bandwidth_kib_s:
            return
        self._bandwidth_kib_s = kib_s
        child = self._child
        if child is not None and child.name == self._called("copy"):
            self._again = True
            await child.end(_END_WITHIN_S)

    # ------------------------------------------------------------- the pass

    async def _pass(self) -> str:
        """Goes through the steps; returns why deletions are held, or nothing."""
        request = self.request
        if request.folders == ():
            self._tally.endings.append(Ending(Verdict.COMPLETE, 0, "no folder changed"))
            return ""
        data = await asyncio.to_thread(_folders_of, request)
        with await asyncio.to_thread(self._listed, data) as listed:
            course = self._course(listed.name)
            held = ""
            if request.limits.target_empty:
                await self._copy(course, total_bytes=request.expected_bytes, make_way=0)
            else:
                held = await self._by_plan(course)
            if self._worst.verdict is Verdict.INCOMPLETE and self._worst.code == _VANISHED:
                await self._look_again(course)
        if self._worst.verdict in (Verdict.COMPLETE, Verdict.INCOMPLETE):
            self._report(Progress(Stage.CHECK))
            await asyncio.to_thread(sync_filesystem, request.root_fd)
        return held

    def _course(self, list_path: str) -> Course:
        request = self.request
        return Course(
            source=request.source,
            module=f"v-{request.uuid}",
            target=f"/proc/self/fd/{request.root_fd}/",
            timeout_s=request.timeout_s,
            connect_timeout_s=request.connect_timeout_s,
            list_path=None if request.folders is None else list_path,
            backup=request.resync_backup,
            checksum=request.checksum,
        )

    async def _by_plan(self, course: Course) -> str:
        reader = PlanReader()
        self._report(Progress(Stage.PLAN))
        run = await self._rsync("plan", course.plan(), reader.take, reader.rest)
        self._tally.add(run)
        if run.stats is None:
            return ""
        self._tally.entries = run.stats.entries
        self._differed = bool(reader.copies or reader.touched or reader.too_many_folders)
        held = ""
        may_delete = False
        # An I/O error there makes a list with gaps: what is missing in it may still exist.
        if run.went_through:
            plan = await asyncio.to_thread(reader.finish)
            self._plan = plan if plan.count else None
            held = await asyncio.to_thread(self._ruling, reader)
            may_delete = bool(plan.count or reader.old_parts) and not held
            if lack := await asyncio.to_thread(self._lacking, run.stats):
                self._tally.endings.append(Ending(Verdict.REFUSED, 0, lack))
                return ""
        ceiling = min(self._ceiling + reader.old_parts, _INT_MAX) if may_delete else 0
        if reader.copies:
            copied = await self._copy_planned(course, reader, run.stats, ceiling)
            may_delete = may_delete and copied.went_through
        if may_delete or (run.went_through and reader.touched and not reader.copies):
            await self._settle(course, reader, ceiling if may_delete else None)
        return held

    async def _copy_planned(
        self, course: Course, reader: PlanReader, planned: Stats, make_way: int
    ) -> _Run:
        """Copies what the plan named, by name if that is little: no second look at all the rest."""
        total_bytes = planned.transferred_bytes
        if reader.by_name:
            names = (reader.wanted | reader.touched) - {b"."}
            above = {over for name in names for over in _upwards(name.rpartition(b"/")[0])}
            data = folder_list((), [b".", *sorted(names - above)])
            with await asyncio.to_thread(self._listed, data) as listed:
                few = replace(course, list_path=listed.name)
                run = await self._copy(few, total_bytes=total_bytes, make_way=make_way)
            self._tally.entries = planned.entries  # of what was walked, not of this list
            if not run.went_through or _files_in(run) == reader.wanted_files:
                return run
            # Something has another name by now, and may have been changed before this pass began.
        return await self._copy(course, total_bytes=total_bytes, make_way=make_way)

    async def _look_again(self, course: Course) -> None:
        """Asks once more for what vanished: it must be gone, or come now.

        Else a volume on which files come and go all the time would never have a complete pass.
        """
        tally = self._tally
        if len(tally.vanished) != tally.vanished_count:
            return  # too many to be named
        wanted = tally.vanished
        entries = tally.entries
        for _ in range(_LOOKS_MAX):
            parents = {name.rpartition(b"/")[0] or b"." for name in wanted}
            names = folder_list((), sorted({*wanted, *parents}))
            with await asyncio.to_thread(self._listed, names) as listed:
                again = replace(course, list_path=listed.name)
                run = await self._copy(again, total_bytes=None, make_way=0)
            tally.entries = entries  # of the volume, not of this list
            if run.ending.code == 0:
                tally.endings = [Ending(Verdict.COMPLETE, _VANISHED, "complete")]
                return
            if run.ending.code != _VANISHED:
                return
            wanted = run.complaints.vanished

    async def _copy(self, course: Course, *, total_bytes: int | None, make_way: int) -> _Run:
        """Copies; begins again, where it was, when somebody changed the bandwidth meanwhile."""
        root_fd = self.request.root_fd
        # Beside their places is faster, but a killed rsync leaves files there that a client could
        # see. A first copy may: it is no replica before its end, and the next pass mends them.
        aside = self.request.is_replica or not self.request.limits.target_empty
        if aside:
            await asyncio.to_thread(_make_incoming, root_fd)
        try:
            while True:
                self._again = False
                reader = ProgressReader(Stage.COPY, total_bytes, self._clock_ms())
                self._report(reader.last)
                argv = course.copy(
                    make_way=make_way, bandwidth_kib_s=self._bandwidth_kib_s, aside=aside
                )
                async with self._onlooker(reader, aside=aside):
                    run = await self._rsync("copy", argv, self._reporter(reader), reader.rest)
                if not self._again or self._ending or run.ending.verdict is not Verdict.KILLED:
                    self._tally.add_copy(run, reader.last)
                    return run
                self._tally.add_cut(reader.last)
                if total_bytes is not None:
                    total_bytes = max(0, total_bytes - reader.last.bytes)
        finally:
            if aside:
                await asyncio.to_thread(_drop_incoming, root_fd)

    def _onlooker(
        self, reader: ProgressReader, *, aside: bool
    ) -> AbstractAsyncContextManager[None]:
        """Who tells of a copy that tells nothing itself."""
        if aside:
            return contextlib.nullcontext()

        def grown(done: int, files: int) -> None:
            self._report(reader.grown(done, files, self._clock_ms()))

        return watch_filling(self.request.root_fd, grown)

    def _reporter(self, reader: ProgressReader) -> Callable[[bytes], None]:
        def take(line: bytes) -> None:
            if (news := reader.take(line, self._clock_ms())) is not None:
                self._report(news)

        return take

    async def _settle(self, course: Course, reader: PlanReader, deletions: int | None) -> None:
        """Deletes, if it may, and sets folders right, in the folders that the plan named."""
        self._report(Progress(Stage.CHECK))
        rest = Tail()
        parents = reader.parents if deletions is not None else set()
        data = folder_list(sorted(parents), sorted(reader.touched - parents))
        with await asyncio.to_thread(self._listed, data) as listed:
            list_path = None if reader.too_many_folders else listed.name
            argv = course.settle(list_path, deletions=deletions)
            run = await self._rsync("settle", argv, rest.add, rest)
        self._tally.add(run)
        if run.stats is not None:
            self._tally.deletions += max(0, run.stats.deleted - reader.old_parts)

    async def _rsync(
        self,
        what: str,
        argv: Sequence[str],
        take: Callable[[bytes], None],
        rest: Tail,
    ) -> _Run:
        """Runs one rsync to its end and judges it."""
        complaints = Complaints()

        def on_line(line: Line) -> None:
            if line.stream is Stream.OUTPUT:
                take(line.data)
            else:
                complaints.take([line.data])

        code = await self._child_code(what, argv, on_line)
        if isinstance(code, str):
            return _Run(Ending(Verdict.RETRY, _TIMED_OUT, code), complaints, None)
        ending = judge(code, complaints)
        if code == _VANISHED and await asyncio.to_thread(self._only_gone, complaints):
            ending = Ending(Verdict.COMPLETE, code, "complete")
        try:
            return _Run(ending, complaints, rest.stats() if code in _WITH_COUNTS else None)
        except StatsError as error:
            words = f"what rsync counted cannot be read: {error}"
            return _Run(Ending(Verdict.FAILED, code, words), complaints, None)

    async def _child_code(
        self,
        what: str,
        argv: Sequence[str],
        on_line: Callable[[Line], None],
    ) -> int | str:
        """The exit code, or why it was ended here; nothing of the child is left."""
        async with self._starting:
            if self._ending:
                return -signal.SIGTERM
            self._child = child = await Child.start(
                argv,
                name=self._called(what),
                # Times of a plan are compared with those of files here: by one time zone.
                env={"RSYNC_PASSWORD": self.request.source.token.password, "TZ": "UTC"},
                pass_fds=(self.request.root_fd,),
                priority=self.request.priority,
                on_line=on_line,
            )
        try:
            return await self._wait(child)
        finally:
            if child.alive:
                await child.end(_END_WITHIN_S)
            self._child = None

    async def _wait(self, child: Child) -> int | str:
        """Waits for the end, or for a reason to give up; looks at it four times a timeout."""
        request = self.request
        now_ms = self._clock_ms()
        latest_ms = now_ms + request.longest_s * 1000
        # While the source reads a large file for its checksum, nothing else comes from it.
        patience_s = request.timeout_s * (_CHECKSUM_PATIENCE if request.checksum else 1)
        watch = StallWatch(patience_s * 1000, now_ms)
        while now_ms < latest_ms:
            pause_ms = min(request.timeout_s * 250, latest_ms - now_ms)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_ms / 1000):
                    return await child.wait()
            now_ms = self._clock_ms()
            if watch.stalled(await asyncio.to_thread(_activity_of, child), now_ms):
                return f"nothing moved for {patience_s} s, so it was ended"
        return f"it was ended after {request.longest_s} s, the longest that it may take"

    # ------------------------------------------------------------- judging

    def _lacking(self, planned: Stats) -> str:
        """Why a resync cannot begin, for nothing that it replaces becomes free; it blocks."""
        if self.request.resync_backup is None:
            return ""
        found = os.fstatvfs(self.request.root_fd)
        return lacking(
            planned.transferred + planned.created_folders,
            planned.transferred_bytes,
            used_there_bytes=self.request.expected_bytes or 0,
            free_bytes=found.f_bavail * found.f_frsize,
            free_inodes=found.f_favail if found.f_files else None,
        )

    def _ruling(self, reader: PlanReader) -> str:
        """Why the plan has to wait; looks at the volume, so it blocks."""
        plan = self._plan
        if plan is None:
            return ""
        limits = self.request.limits
        # Before the first complete pass, what a killed one left of rsync's own is no data.
        files = plan.files if limits.known_files else plan.files - plan.strays
        left = not files or leaves_something(self.request.root_fd, plan.files)
        moves = moved(self.request.root_fd, plan, reader.arrivals) if reader.arrivals else 0
        return ruling(plan, limits, leaves_something=left or moves == plan.files, moved=moves)

    def _only_gone(self, complaints: Complaints) -> bool:
        """Whether all that vanished are listed folders, or folders on the way to them.

        These were gone before anything was read. What has to go with them here goes with them, or
        with their parents, where their removal is a change.
        """
        folders = self.request.folders
        if folders is None or complaints.vanished_count != len(complaints.vanished):
            return False
        wanted = frozenset(complaints.vanished)
        found = {above for name in folders for above in _upwards(name) if above in wanted}
        if found != wanted:
            return False
        complaints.vanished.clear()
        complaints.vanished_count = 0
        return True

    @property
    def _ceiling(self) -> int:
        """At most so many deletions in one run: what is allowed, or what was accepted."""
        planned = 0 if self._plan is None else self._plan.count
        return max(planned, self.request.limits.allowed)

    @property
    def _worst(self) -> Ending:
        """The newest of the worst."""
        endings = reversed(self._tally.endings)
        return max(endings, key=lambda ending: _SEVERITY.index(ending.verdict))

    def _outcome(self, held: str, seconds: float) -> PassOutcome:
        tally, worst = self._tally, self._worst
        verdict = worst.verdict
        if held and _SEVERITY.index(verdict) < _SEVERITY.index(Verdict.HELD):
            verdict = Verdict.HELD
        if self._ending:
            verdict = Verdict.KILLED
        return PassOutcome(
            verdict=verdict,
            exit_code=worst.code,
            files=self._files(),
            transferred_files=tally.transferred_files,
            transferred_bytes=tally.transferred_bytes,
            wire_bytes=tally.wire_bytes,
            deletions=tally.deletions,
            plan=self._plan,
            sentence=f"{self.request.name or self.request.uuid}: {self._sentence(verdict, held)}",
            vanished=tuple(dict.fromkeys(tally.vanished)),
            seconds=seconds,
        )

    def _files(self) -> int:
        known, tally = self.request.limits.known_files, self._tally
        if self.request.folders is None and tally.entries is not None:
            return max(0, tally.entries - 1)  # the root itself is one of them
        return max(0, known + tally.created - tally.deletions)

    def _sentence(self, verdict: Verdict, held: str) -> str:
        tally = self._tally
        if verdict is Verdict.KILLED and self._ending:
            return "the pass was ended by this node"
        if verdict is Verdict.HELD and self._plan is not None:
            return f"{held}; nothing was deleted, plan {self._plan.hash[:16]}"
        if verdict is not Verdict.COMPLETE:
            return self._worst.reason
        if not (tally.transferred_files or tally.created or tally.deletions):
            return "nothing but attributes differed" if self._differed else "nothing differed"
        return (
            f"copied {tally.transferred_files} files ({tally.transferred_bytes} bytes),"
            f" deleted {tally.deletions}"
        )

    def _fail(self, reason: str) -> None:
        self._tally.endings.append(Ending(Verdict.FAILED, 11, reason))

    def _called(self, what: str) -> str:
        return f"{what}-{self.request.uuid}"

    def _listed(self, data: bytes) -> IO[bytes]:
        """A file for rsync, gone when it is closed; it blocks.

        With a name, because rsync 3.5 does not open one that has none by /proc/self/fd.
        """
        try:
            file = tempfile.NamedTemporaryFile(  # noqa: SIM115 - the caller closes it
                dir=self._scratch, prefix="folders-"
            )
            file.write(data)
            file.flush()
        except OSError as error:
            raise _ScratchError(f"cannot write into {self._scratch}: {error.strerror}") from error
        return file


async def fetch_control(
    source: From,
    into: Path,
    names: Sequence[str],
    *,
    max_bytes: int = MAX_CONTROL_BYTES,
) -> Ending:
    """Fetches files by name from the source's control module into a folder of nfsha's own.

    Each is there whole or not at all, and one that the source does not have (or that is larger) is
    not there afterwards. The ending is COMPLETE, or says in words why not. Raises ChildError and
    ChildStuckError.
    """
    complaints = Complaints()

    def on_line(line: Line) -> None:
        if line.stream is Stream.ERRORS:
            complaints.take([line.data])

    child = await Child.start(
        fetch(source, f"{into}/", names, max_bytes),
        name="fetch-control",
        env={"RSYNC_PASSWORD": source.token.password},
        priority=Priority.NORMAL,
        on_line=on_line,
    )
    try:
        async with asyncio.timeout(2 * FETCH_TIMEOUT_S):
            return judge(await child.wait(), complaints)
    except TimeoutError:
        return Ending(Verdict.RETRY, 30, "the source's facts did not come in time")
    finally:
        if child.alive:
            await child.end(_END_WITHIN_S)


# --- the volume's root, blocking ------------------------------------------------------------------


def _folders_of(request: PassRequest) -> bytes:
    return b"" if request.folders is None else folder_list(_own(request.root_fd, request.folders))


def _own(root_fd: int, folders: Sequence[bytes]) -> list[bytes]:
    """Those that belong to this volume: not its own files, and nothing mounted inside it.

    Raises OSError EINVAL for what is no plain name: a list with a mistake in it is no list.
    """
    inside = _mounted_inside(root_fd)
    kept = []
    for name in folders:
        try:
            parts = () if name == b"." else parts_of(name.rstrip(b"/"))
        except ValueError as error:
            raise OSError(errno.EINVAL, f"in the list of changed folders one {error}") from error
        if (parts[:1] and parts[0] in OWN_ROOT_NAMES) or PARTIAL_NAME in parts:
            continue
        if not any(parts[: len(mount)] == mount for mount in inside):
            kept.append(name)
    return kept


def _files_in(run: _Run) -> int:
    """How many things that are no folders were in rsync's list."""
    return 0 if run.stats is None else run.stats.entries - run.stats.folders


def _upwards(name: bytes) -> Iterator[bytes]:
    name = name.rstrip(b"/")
    while name:
        yield name
        name = name.rpartition(b"/")[0]


def _mounted_inside(root_fd: int) -> list[tuple[bytes, ...]]:
    root = str(Path(f"/proc/self/fd/{root_fd}").readlink())
    _, below = at_and_below(visible(read_mounts()), root)
    begin = len(os.fsencode(root.rstrip("/"))) + 1
    return [tuple(os.fsencode(mount.mount_point)[begin:].split(b"/")) for mount in below]


def _shortage(root_fd: int) -> str:
    """What a full volume lacks, and what helps."""
    found = os.fstatvfs(root_fd)
    free_mib = found.f_bavail * found.f_frsize >> 20
    size_mib = found.f_blocks * found.f_frsize >> 20
    lack = f"{free_mib} of {size_mib} MiB are free now"
    few = max(_FEW_INODES, found.f_files // 1000)
    if found.f_files and found.f_favail < few and free_mib * 100 > size_mib:
        lack = f"hardly an inode is left ({found.f_favail} of {found.f_files} are free)"
    return (
        f"the volume on this node is full: {lack}; make its filesystem as large as the"
        " source's, or drop what is in its quarantine; the next pass goes on where this one ended"
    )


def _activity_of(child: Child) -> Activity:
    return activity(child.pids())


def _make_incoming(root_fd: int) -> None:
    """An empty folder for what is being received, in place of what a cut pass left."""
    with _times_kept(root_fd):
        _remove_incoming(root_fd)
        os.close(make_private(root_fd, INCOMING_NAME))


def _drop_incoming(root_fd: int) -> None:
    with _times_kept(root_fd):
        _remove_incoming(root_fd)


def _remove_incoming(root_fd: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(INCOMING_NAME, dir_fd=root_fd)


@contextlib.contextmanager
def _times_kept(root_fd: int) -> Iterator[None]:
    """Else each pass would find the root changed by the one before."""
    before = os.fstat(root_fd)
    try:
        yield
    finally:
        os.utime(root_fd, ns=(before.st_atime_ns, before.st_mtime_ns))


def _nobody(_: Progress) -> None:
    """For a pass whose progress nobody watches."""

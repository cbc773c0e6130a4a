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
import errno
import os
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import IO, Final

from nfsha.replica.files.beneath import sync_filesystem
from nfsha.replica.passes import spares
from nfsha.replica.passes.counts import VANISHED, Counts, Run
from nfsha.replica.passes.first_copy import FirstCopy
from nfsha.replica.passes.request import PassOutcome, PassRequest, Planned
from nfsha.replica.passes.running import END_WITHIN_S, Runner, called, upwards
from nfsha.replica.passes.target import folders_of, shortage
from nfsha.replica.passes.transfer import Transfer
from nfsha.replica.quarantine.room import lacking
from nfsha.replica.rsync.arguments import Course, folder_list
from nfsha.replica.rsync.child import ChildError, ChildStuckError
from nfsha.replica.rsync.deletions import (
    MAX_REPLACED_NAMES,
    DeletionPlan,
    PlanReader,
    leaves_something,
    moved,
    ruling,
)
from nfsha.replica.rsync.exits import Ending, Verdict
from nfsha.replica.rsync.lists import ScratchError, listed
from nfsha.replica.rsync.progress import Progress, Stage, Stats, Tail

__all__ = ["Pull"]

_INT_MAX: Final = (1 << 31) - 1
_LOOKS_MAX: Final = 3


class Pull:
    """One pass. `clock_ms` is a clock in milliseconds that only goes forward.

    `scratch` is a folder of nfsha's own for short-lived files. Call `run` once, or `look` once.
    """

    def __init__(self, request: PassRequest, scratch: Path, clock_ms: Callable[[], int]) -> None:
        self.request = request
        self._scratch = scratch
        self._clock_ms = clock_ms
        self._running: asyncio.Event | None = None
        self._report: Callable[[Progress], None] = _nobody
        self._counts = Counts()
        self._runner = Runner(request, clock_ms)
        self._transfer = Transfer(request, self._runner, self._counts, self._tell, clock_ms)
        self._plan: DeletionPlan | None = None
        self._differed = False
        self._brought: Mapping[bytes, int] = {}
        self._looked_s = 0.0

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
        except (ChildError, ScratchError) as error:
            self._counts.fail(str(error))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._counts.full = str(error)
            self._counts.fail(f"this node's volume: {error.strerror}")
        finally:
            self._running.set()
        if self._counts.full:
            lack = await asyncio.to_thread(shortage, self.request.root_fd)
            self._counts.fail(f"{lack} ({self._counts.full})")
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
        except (ChildError, ScratchError) as error:
            return Planned(trouble=str(error))
        except OSError as error:
            return Planned(trouble=f"this node's volume: {error.strerror}")
        finally:
            self._running.set()

    async def _planned(self) -> Planned:
        if self.request.folders == ():
            return Planned()
        reader = PlanReader()
        data = await asyncio.to_thread(folders_of, self.request)
        with await asyncio.to_thread(self._listed, data) as listed:
            argv = self._course(listed.name).plan()
            run = await self._runner.run("look", argv, reader.take, reader.rest)
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
            lacking=await asyncio.to_thread(self._lacking, run.stats),
            differ=reader.items,
            first=reader.first,
            large_bytes=sum(
                map(reader.wanted_bytes.__getitem__, spares.large(reader.wanted_bytes))
            ),
        )

    async def end(self, within_s: float = END_WITHIN_S, *, at_once: bool = False) -> None:
        """Kills the pass; when this returns, nothing of it can touch the volume any more.

        A moment is left to rsync to keep what it has of a large file. Not with `at_once`: one that
        waits for a dead source would use it up, and a takeover waits with it.
        Raises ChildStuckError when a process, or a thread of this one, still hangs in the disk.
        """
        deadline_s = asyncio.get_running_loop().time() + within_s
        await self._runner.end(within_s, at_once=at_once)
        if self._running is not None:
            try:
                async with asyncio.timeout_at(deadline_s):
                    await self._running.wait()
            except TimeoutError as error:
                stuck = "a thread of this process, at work on the volume's root"
                raise ChildStuckError(called("pull", self.request), [stuck]) from error

    async def limit_bandwidth(self, kib_s: int | None) -> None:
        """Gives the copying another limit, also while it runs: it begins again where it was."""
        await self._transfer.limit_bandwidth(kib_s)

    # ------------------------------------------------------------- the pass

    async def _pass(self) -> str:
        """Goes through the steps; returns why deletions are held, or nothing."""
        request = self.request
        if request.folders == ():
            self._counts.endings.append(Ending(Verdict.COMPLETE, 0, "no folder changed"))
            return ""
        data = await asyncio.to_thread(folders_of, request)
        with await asyncio.to_thread(self._listed, data) as listed:
            course = self._course(listed.name)
            held = ""
            if request.limits.target_empty and not request.is_replica:
                await self._first_copy().run(course)
            elif request.limits.target_empty:
                await self._transfer.copy(course, request.expected_bytes, make_way=0)
            else:
                held = await self._by_plan(course)
            worst = self._counts.worst
            if worst.verdict is Verdict.INCOMPLETE and worst.code == VANISHED:
                await self._look_again(course)
        if self._counts.worst.verdict in (Verdict.COMPLETE, Verdict.INCOMPLETE):
            self._report(Progress(Stage.CHECK))
            await asyncio.to_thread(sync_filesystem, request.root_fd)
        return held

    def _first_copy(self) -> FirstCopy:
        return FirstCopy(self.request, self._scratch, self._runner, self._transfer, self._counts)

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
        reader = PlanReader(self.request.spares)
        self._report(Progress(Stage.PLAN))
        begun_ms = self._clock_ms()
        run = await self._runner.run("plan", course.plan(), reader.take, reader.rest)
        self._looked_s = (self._clock_ms() - begun_ms) / 1000
        self._counts.add(run)
        if run.stats is None:
            return ""
        self._counts.entries = run.stats.entries
        self._differed = bool(reader.copies or reader.touched or reader.too_many_folders)
        self._brought = reader.wanted_bytes
        held = ""
        may_delete = False
        # An I/O error there makes a list with gaps: what is missing in it may still exist.
        if run.went_through:
            plan = await asyncio.to_thread(reader.finish)
            self._plan = plan if plan.count else None
            held = await asyncio.to_thread(self._ruling, reader)
            may_delete = bool(plan.count or reader.old_parts) and not held
            if lack := await asyncio.to_thread(self._lacking, run.stats):
                self._counts.endings.append(Ending(Verdict.REFUSED, 0, lack))
                return ""
        ceiling = min(self._ceiling + reader.old_parts, _INT_MAX) if may_delete else 0
        if reader.copies:
            copied = await self._copy_planned(course, reader, run.stats, ceiling)
            may_delete = may_delete and copied.went_through
        if self.request.spares:
            await asyncio.to_thread(spares.drop, self.request.root_fd, self.request.spares)
        if may_delete or (run.went_through and reader.touched and not reader.copies):
            await self._settle(course, reader, ceiling if may_delete else None)
        return held

    async def _copy_planned(
        self, course: Course, reader: PlanReader, planned: Stats, make_way: int
    ) -> Run:
        """Copies what the plan named, by name if that is little: no second look at all the rest."""
        total_bytes = planned.transferred_bytes
        if reader.by_name:
            spared = self._spared(reader)
            rest = (reader.wanted | reader.touched) - {b"."} - spared.keys()
            copied_files = 0
            for names, size, sparse in (
                (spared.keys(), sum(spared.values()), False),
                (rest, total_bytes - sum(spared.values()), True),
            ):
                if not names and (spared or not sparse):
                    continue
                run = await self._copy_named(course, names, size, make_way, sparse=sparse)
                self._counts.entries = planned.entries  # of what was walked, not of this list
                copied_files += _files_in(run)
                if not run.went_through or copied_files == reader.wanted_files:
                    return run
            # Something has another name by now, and may have been changed before this pass began.
        return await self._transfer.copy(course, total_bytes, make_way=make_way)

    def _spared(self, reader: PlanReader) -> dict[bytes, int]:
        """The files to copy with a spare that is good for them, and their sizes at the source."""
        return {
            name: reader.wanted_bytes[name]
            for name, size in self.request.spares.items()
            if reader.wanted_bytes.get(name, _INT_MAX << 31) <= size + spares.MAX_GROWTH_BYTES
        }

    async def _copy_named(
        self, course: Course, names: Set[bytes], size: int, make_way: int, *, sparse: bool
    ) -> Run:
        above = {over for name in names for over in upwards(name.rpartition(b"/")[0])}
        data = folder_list((), [b".", *sorted(names - above)])
        with await asyncio.to_thread(self._listed, data) as listed:
            # What the plan named by content need not be read for that once more.
            few = replace(course, list_path=listed.name, again=course.checksum)
            return await self._transfer.copy(few, max(0, size), make_way=make_way, sparse=sparse)

    async def _look_again(self, course: Course) -> None:
        """Asks once more for what vanished: it must be gone, or come now.

        Else a volume on which files come and go all the time would never have a complete pass.
        """
        counts = self._counts
        if len(counts.vanished) != counts.vanished_count:
            return  # too many to be named
        wanted = counts.vanished
        entries = counts.entries
        for _ in range(_LOOKS_MAX):
            parents = {name.rpartition(b"/")[0] or b"." for name in wanted}
            names = folder_list((), sorted({*wanted, *parents}))
            with await asyncio.to_thread(self._listed, names) as listed:
                again = replace(course, list_path=listed.name)
                run = await self._transfer.copy(again, None, make_way=0)
            counts.entries = entries  # of the volume, not of this list
            if run.ending.code == 0:
                counts.endings = [Ending(Verdict.COMPLETE, VANISHED, "complete")]
                return
            if run.ending.code != VANISHED:
                return
            wanted = run.complaints.vanished

    async def _settle(self, course: Course, reader: PlanReader, deletions: int | None) -> None:
        """Deletes, if it may, and sets folders right, in the folders that the plan named."""
        self._report(Progress(Stage.CHECK))
        rest = Tail()
        parents = reader.parents if deletions is not None else set()
        data = folder_list(sorted(parents), sorted(reader.touched - parents))
        with await asyncio.to_thread(self._listed, data) as listed:
            list_path = None if reader.too_many_folders else listed.name
            argv = course.settle(list_path, deletions=deletions)
            run = await self._runner.run("settle", argv, rest.add, rest)
        self._counts.add(run)
        if run.stats is not None:
            self._counts.deletions += max(0, run.stats.deleted - reader.old_parts)

    def _tell(self, news: Progress) -> None:
        self._report(news)

    def _listed(self, data: bytes) -> IO[bytes]:
        return listed(self._scratch, data)

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

    @property
    def _ceiling(self) -> int:
        """At most so many deletions in one run: what is allowed, or what was accepted."""
        planned = 0 if self._plan is None else self._plan.count
        return max(planned, self.request.limits.allowed)

    def _outcome(self, held: str, seconds: float) -> PassOutcome:
        counts = self._counts
        verdict = Verdict.KILLED if self._runner.ended else counts.verdict(held)
        return PassOutcome(
            verdict=verdict,
            exit_code=counts.worst.code,
            files=self._files(),
            transferred_files=counts.transferred_files,
            transferred_bytes=counts.transferred_bytes,
            wire_bytes=counts.wire_bytes,
            deletions=counts.deletions,
            plan=self._plan,
            sentence=f"{self.request.name or self.request.uuid}: {self._sentence(verdict, held)}",
            vanished=tuple(dict.fromkeys(counts.vanished)),
            seconds=seconds,
            brought=self._brought,
            looked_s=self._looked_s,
        )

    def _files(self) -> int:
        known, counts = self.request.limits.known_files, self._counts
        if self.request.folders is None and counts.entries is not None:
            return max(0, counts.entries - 1)  # the root itself is one of them
        return max(0, known + counts.created - counts.deletions)

    def _sentence(self, verdict: Verdict, held: str) -> str:
        counts = self._counts
        if verdict is Verdict.KILLED and self._runner.ended:
            return "the pass was ended by this node"
        if verdict is Verdict.HELD and self._plan is not None:
            return f"{held}; nothing was deleted, plan {self._plan.hash[:16]}"
        if verdict is not Verdict.COMPLETE:
            return self._counts.worst.reason
        if not (counts.transferred_files or counts.created or counts.deletions):
            return "nothing but attributes differed" if self._differed else "nothing differed"
        return (
            f"copied {counts.transferred_files} files ({counts.transferred_bytes} bytes),"
            f" deleted {counts.deletions}"
        )


def _files_in(run: Run) -> int:
    """How many things that are no folders were in rsync's list."""
    return 0 if run.stats is None else run.stats.entries - run.stats.folders


def _nobody(_: Progress) -> None:
    """For a pass whose progress nobody watches."""

"""Runs rsync for one pass: one program at a time, to its end, and none any more once it is told so.

It judges how each run ended, and gives up on one in which nothing moves. It must not know what the
runs are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from nfsha.replica.passes.counts import VANISHED, Run
from nfsha.replica.passes.request import PassRequest
from nfsha.replica.rsync.child import (
    GRACE_S,
    Child,
    Line,
    Stream,
)
from nfsha.replica.rsync.exits import Complaints, Ending, Verdict, judge
from nfsha.replica.rsync.progress import StatsError, Tail
from nfsha.replica.rsync.stall import Activity, StallWatch, activity

END_WITHIN_S: Final = 5.0
_CHECKSUM_PATIENCE: Final = 30
_TIMED_OUT: Final = 30  # as rsync itself calls it
_WITH_COUNTS: Final = (0, 23, VANISHED, 25)


class Runner:
    """The programs of one pass. `clock_ms` is a clock in milliseconds that only goes forward."""

    def __init__(self, request: PassRequest, clock_ms: Callable[[], int]) -> None:
        self._request = request
        self._clock_ms = clock_ms
        self._child: Child | None = None
        self._starting = asyncio.Lock()
        self.ended = False
        """No program is started any more."""

    async def end(self, within_s: float, *, at_once: bool) -> None:
        """Ends the program that runs, and lets no other one begin. Raises ChildStuckError."""
        self.ended = True
        async with self._starting:  # so that no child is between its start and its name here
            child = self._child
        if child is not None:
            await child.end(within_s, grace_s=0.0 if at_once else GRACE_S)

    async def cut(self, what: str) -> bool:
        """Ends the program that runs if it is this one; others may follow. True if it was."""
        child = self._child
        if child is None or child.name != called(what, self._request):
            return False
        await child.end(END_WITHIN_S)
        return True

    async def run(
        self,
        what: str,
        argv: Sequence[str],
        take: Callable[[bytes], None],
        rest: Tail,
    ) -> Run:
        """Runs one rsync to its end and judges it. Raises ChildError, ChildStuckError.

        `take` gets each line that it prints; `rest` has those of its counts then.
        """
        complaints = Complaints()

        def on_line(line: Line) -> None:
            if line.stream is Stream.OUTPUT:
                take(line.data)
            else:
                complaints.take([line.data])

        code = await self._child_code(what, argv, on_line)
        if isinstance(code, str):
            return Run(Ending(Verdict.RETRY, _TIMED_OUT, code), complaints, None)
        ending = judge(code, complaints)
        if code == VANISHED and await asyncio.to_thread(self._only_gone, complaints):
            ending = Ending(Verdict.COMPLETE, code, "complete")
        try:
            return Run(ending, complaints, rest.stats() if code in _WITH_COUNTS else None)
        except StatsError as error:
            words = f"what rsync counted cannot be read: {error}"
            return Run(Ending(Verdict.FAILED, code, words), complaints, None)

    async def _child_code(
        self,
        what: str,
        argv: Sequence[str],
        on_line: Callable[[Line], None],
    ) -> int | str:
        """The exit code, or why it was ended here; nothing of the child is left."""
        async with self._starting:
            if self.ended:
                return -signal.SIGTERM
            self._child = child = await Child.start(
                argv,
                name=called(what, self._request),
                # Times of a plan are compared with those of files here: by one time zone.
                env={"RSYNC_PASSWORD": self._request.source.token.password, "TZ": "UTC"},
                pass_fds=(self._request.root_fd,),
                priority=self._request.priority,
                on_line=on_line,
            )
        try:
            return await self._wait(child)
        finally:
            if child.alive:
                await child.end(END_WITHIN_S)
            self._child = None

    async def _wait(self, child: Child) -> int | str:
        """Waits for the end, or for a reason to give up; looks at it four times a timeout."""
        request = self._request
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

    def _only_gone(self, complaints: Complaints) -> bool:
        """Whether all that vanished are listed folders, or folders on the way to them.

        These were gone before anything was read. What has to go with them here goes with them, or
        with their parents, where their removal is a change.
        """
        folders = self._request.folders
        if folders is None or complaints.vanished_count != len(complaints.vanished):
            return False
        wanted = frozenset(complaints.vanished)
        found = {above for name in folders for above in upwards(name) if above in wanted}
        if found != wanted:
            return False
        complaints.vanished.clear()
        complaints.vanished_count = 0
        return True


def called(what: str, request: PassRequest) -> str:
    """The name of a program of the pass, for messages and for who looks for leftovers."""
    return f"{what}-{request.uuid}"


def upwards(name: bytes) -> Iterator[bytes]:
    """A name and all folders above it, but for the root."""
    name = name.rstrip(b"/")
    while name:
        yield name
        name = name.rpartition(b"/")[0]


def _activity_of(child: Child) -> Activity:
    return activity(child.pids())

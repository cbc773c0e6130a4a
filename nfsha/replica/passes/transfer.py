"""The copying runs of a pass: how far they are, and a bandwidth that can be changed meanwhile.

They bring what differs and delete nothing. What is to be copied is their caller's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

from nfsha.replica.passes.counts import Counts, Run
from nfsha.replica.passes.filling import Filling, Room
from nfsha.replica.passes.request import PassRequest
from nfsha.replica.passes.running import Runner
from nfsha.replica.passes.target import drop_incoming, make_incoming
from nfsha.replica.rsync.arguments import Course
from nfsha.replica.rsync.exits import Verdict
from nfsha.replica.rsync.progress import Progress, ProgressReader, Stage


class Transfer:
    """`report` gets the progress, on the loop; what runs did that were cut goes to `counts`."""

    def __init__(
        self,
        request: PassRequest,
        runner: Runner,
        counts: Counts,
        report: Callable[[Progress], None],
        clock_ms: Callable[[], int],
    ) -> None:
        self._request = request
        self._runner = runner
        self._counts = counts
        self._report = report
        self._clock_ms = clock_ms
        self._bandwidth_kib_s = request.bandwidth_kib_s
        self._again = False

    async def limit_bandwidth(self, kib_s: int | None) -> None:
        """Gives the copying another limit, also while it runs: it begins again where it was."""
        if kib_s != self._bandwidth_kib_s:
            self._bandwidth_kib_s = kib_s
            self._again = True
            await self._runner.cut("copy")

    async def copy(
        self,
        course: Course,
        total_bytes: int | None,
        *,
        make_way: int,
        filling: Filling | None = None,
        sparse: bool = True,
    ) -> Run:
        """As `run`, and counted."""
        run, last = await self.run(
            course, total_bytes, make_way=make_way, filling=filling, sparse=sparse
        )
        self._counts.add_copy(run, last)
        return run

    async def run(
        self,
        course: Course,
        total_bytes: int | None,
        *,
        make_way: int = 0,
        filling: Filling | None = None,
        room: Room | None = None,
        dense_up_to_bytes: int | None = None,
        sparse: bool = True,
    ) -> tuple[Run, Progress]:
        """Copies; begins again, where it was, when somebody changed the bandwidth meanwhile.

        Returns also how far the last run came by itself. With `filling` files are received beside
        their places.
        """
        aside = filling is None
        if aside:
            await asyncio.to_thread(make_incoming, self._request.root_fd)
        try:
            while True:
                self._again = False
                begun_bytes = 0 if filling is None else filling.bytes
                reader = ProgressReader(Stage.COPY, total_bytes, self._clock_ms(), begun_bytes)
                self._report(reader.last)
                argv = course.copy(
                    make_way=make_way,
                    bandwidth_kib_s=self._bandwidth_kib_s,
                    aside=aside,
                    dense_up_to_bytes=dense_up_to_bytes,
                    sparse=sparse,
                )
                async with self._onlooker(reader, filling, room):
                    run = await self._runner.run("copy", argv, self._reporter(reader), reader.rest)
                own = replace(reader.last, bytes=max(0, reader.last.bytes - begun_bytes))
                cut = run.ending.verdict is Verdict.KILLED and not self._runner.ended
                if not (self._again and cut):
                    return run, own
                self._counts.add_cut(own)
                if total_bytes is not None and aside:
                    total_bytes = max(0, total_bytes - own.bytes)
        finally:
            if aside:
                await asyncio.to_thread(drop_incoming, self._request.root_fd)

    def _onlooker(
        self, reader: ProgressReader, filling: Filling | None, room: Room | None
    ) -> AbstractAsyncContextManager[None]:
        """Who tells of a copy that tells nothing itself."""
        if filling is None:
            return contextlib.nullcontext()

        def grown(done: int, files: int) -> None:
            self._report(reader.grown(done, files, self._clock_ms()))

        return filling.watch(grown, room)

    def _reporter(self, reader: ProgressReader) -> Callable[[bytes], None]:
        def take(line: bytes) -> None:
            if (news := reader.take(line, self._clock_ms())) is not None:
                self._report(news)

        return take

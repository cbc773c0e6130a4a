"""Fills an empty volume: first what can be written in large pieces, then all the rest.

The second run looks at everything, so it does not matter what came of the first. Files are received
beside their places: that is faster, but a killed rsync leaves files there that a client could see.
They may be: it is no replica before its end, and the next pass mends them.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from nfsha.replica.passes.counts import Counts
from nfsha.replica.passes.filling import Filling, Room, room_for
from nfsha.replica.passes.request import PassRequest
from nfsha.replica.passes.running import Runner
from nfsha.replica.passes.target import of_this_volume, remove_grown
from nfsha.replica.passes.transfer import Transfer
from nfsha.replica.rsync.arguments import Course, folder_list
from nfsha.replica.rsync.exits import Ending, Verdict
from nfsha.replica.rsync.lists import listed


class FirstCopy:
    """One first copy; what came of it is in `counts`."""

    def __init__(
        self,
        request: PassRequest,
        scratch: Path,
        runner: Runner,
        transfer: Transfer,
        counts: Counts,
    ) -> None:
        self._request = request
        self._scratch = scratch
        self._runner = runner
        self._transfer = transfer
        self._counts = counts
        self._filling = Filling(request.root_fd)
        self._outgrown = False

    async def run(self, course: Course) -> None:
        """Copies everything. Raises ScratchError, OSError, ChildError, ChildStuckError."""
        request, room_bytes = self._request, None
        if request.dense.files:
            room_bytes = await asyncio.to_thread(room_for, request.root_fd, request.dense.bytes)
        if room_bytes is None or await self._copy_dense(course, room_bytes):
            await self._transfer.copy(
                course, request.expected_bytes, make_way=0, filling=self._filling
            )

    async def _copy_dense(self, course: Course, room_bytes: int) -> bool:
        """Copies the large files without holes; True if the rest may follow.

        One of them may have got holes, or become another file, since the source looked. It arrives
        equal, but takes what it would without holes; so the run is stopped before the disk is full.
        """
        request, dense = self._request, self._request.dense
        files = [name for name, _ in dense.files]
        names = await asyncio.to_thread(of_this_volume, request.root_fd, files)
        data = folder_list((), sorted(names))
        with await asyncio.to_thread(listed, self._scratch, data) as file:
            run, last = await self._transfer.run(
                replace(course, list_path=file.name),
                request.expected_bytes,
                filling=self._filling,
                room=Room(room_bytes, self._stop),
                dense_up_to_bytes=dense.largest_bytes,
            )
        if run.ending.verdict in (Verdict.COMPLETE, Verdict.INCOMPLETE) and run.stats is not None:
            self._counts.wire_bytes += run.stats.wire_bytes
            self._counts.add_copied(run.stats)
            return True
        if self._outgrown and not self._runner.ended:
            await asyncio.to_thread(remove_grown, request.root_fd, dense)
            words = "a large file got holes while it was copied; the next pass looks for them"
            run = replace(run, ending=Ending(Verdict.RETRY, run.ending.code, words))
        self._counts.add_copy(run, last)
        return False

    async def _stop(self) -> None:
        self._outgrown = True
        await self._runner.cut("copy")

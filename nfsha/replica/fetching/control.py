"""Fetches what the source publishes of itself, from its control module. It copies no data."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from nfsha.replica.rsync.arguments import FETCH_TIMEOUT_S, From, fetch
from nfsha.replica.rsync.child import Child, Line, Priority, Stream
from nfsha.replica.rsync.exits import Complaints, Ending, Verdict, judge

MAX_CONTROL_BYTES: Final = 32 << 20
_END_WITHIN_S: Final = 5.0


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

"""What a returned node holds that was never replicated, and that a pass by size and time overlooks.

A resync puts aside all that it overwrites or deletes. A file that was changed here after the last
complete sync, with the size and the time of the source's, it takes for equal. So the files that
changed since that sync, by this node's own clock, are compared by content; what differs goes to
the resync's entry of the quarantine, and the source's comes in its place. It must not delete.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from nfsha.core.model import Epoch
from nfsha.replica.content.changed_files import ChangedFiles, changed_since
from nfsha.replica.content.verify import Look, Verify
from nfsha.replica.quarantine.quarantine import Entry, Quarantine
from nfsha.replica.rsync.exits import Verdict
from nfsha.replica.volume.marks import Mark

MAX_LOOKS: Final = 100
"""Each look finds at most `suspects.MAX_SUSPECTS` files."""


def since_ns(stamp: Epoch | None, epoch: Epoch, told: Mark | None) -> int | None:
    """From when on, by this node's clock, what it wrote may not have been replicated; else None.

    `stamp` is what the volume bears, `epoch` the one that it is resynced to, `told` the last
    complete sync that the other node told while this one was the authority. 0: from ever.
    """
    if stamp is None or stamp.authority is epoch.authority:
        return None  # a copy: what was written here came from the authority
    if told is None or told.epoch != stamp:
        return 0
    return told.started_ns


async def look_ahead(verify: Verify, root_fd: int, from_ns: int) -> tuple[tuple[bytes, ...], str]:
    """What `settle` would put aside now, and what is not known of that, in words. Changes nothing.

    Not where too many files were written to be named: all of them would have to be read.
    """
    changed = await asyncio.to_thread(changed_since, root_fd, from_ns)
    if changed.more:
        return (), "too many files were written here to compare the contents of those alike"
    found = await verify.look_at(changed.names, _turn)
    if found.verdict is not Verdict.COMPLETE:
        return found.suspects, f"not all contents could be compared: {found.sentence}"
    return found.suspects, "more files have other contents" if found.more else ""


async def settle(
    verify: Verify, root_fd: int, quarantine: Quarantine, entry: Entry, from_ns: int
) -> str:
    """Makes equal what changed since then and differs; returns why it could not, or ""."""
    changed = await asyncio.to_thread(changed_since, root_fd, from_ns)
    for _ in range(MAX_LOOKS):
        found = await _look(verify, changed)
        if found.verdict is not Verdict.COMPLETE:
            return f"what was written here before cannot be compared: {found.sentence}"
        if not found.suspects:
            return ""
        why = await _put_aside(verify, quarantine, entry, found.suspects)
        if why or not found.more:
            return why
    return "too many files differ from the source's under the same size and time"


async def _put_aside(
    verify: Verify, quarantine: Quarantine, entry: Entry, names: Sequence[bytes]
) -> str:
    ending = await verify.repair(entry, quarantine, _turn, names)
    if ending.verdict is not Verdict.COMPLETE:
        return f"what was written here before cannot be put aside: {ending.reason}"
    again = await verify.look_at(names, _turn)
    if again.verdict is not Verdict.COMPLETE:
        return f"what was put aside cannot be compared again: {again.sentence}"
    return f"{len(again.suspects)} files still differ" if again.suspects else ""


async def _look(verify: Verify, changed: ChangedFiles) -> Look:
    if changed.more:
        return await verify.look(_turn, lambda _: None)
    return await verify.look_at(changed.names, _turn)


@asynccontextmanager
async def _turn() -> AsyncIterator[None]:
    """A resync is the only one on its volume."""
    yield

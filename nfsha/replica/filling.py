"""Looks on while an empty filesystem is filled: how far it is, and what is there goes to the disk.

For a first copy. rsync says nothing then, so what it has done is read off the filesystem's own
counters. And what it wrote is written out while it still copies: at the end everything must be
durable, and a disk that only then begins would take that long once more. It changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from nfsha.replica.beneath import sync_filesystem

__all__ = ["watch_filling"]

LOOK_EVERY_S: Final = 0.25
SYNC_FROM_BYTES: Final = 64 << 20
"""So much more on the filesystem since the last look is worth the wait of those who write."""


@dataclass(frozen=True, slots=True)
class _Used:
    bytes: int
    files: int


@asynccontextmanager
async def watch_filling(root_fd: int, grown: Callable[[int, int], None]) -> AsyncIterator[None]:
    """For the length of a block; `grown` is told bytes and files since its begin, on the loop.

    At the end nothing of it is at work any more. An OSError of the filesystem ends the looking
    only: whoever writes there has it too.
    """
    enough = asyncio.Event()
    watching = asyncio.ensure_future(_watch(root_fd, grown, enough))
    try:
        yield
    finally:
        enough.set()
        with contextlib.suppress(OSError):
            await watching


async def _watch(root_fd: int, grown: Callable[[int, int], None], enough: asyncio.Event) -> None:
    before = await asyncio.to_thread(_used, root_fd)
    synced_bytes = before.bytes
    while not enough.is_set():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_EVERY_S):
                await enough.wait()
        now = await asyncio.to_thread(_used, root_fd)
        grown(max(0, now.bytes - before.bytes), max(0, now.files - before.files))
        if now.bytes - synced_bytes >= SYNC_FROM_BYTES and not enough.is_set():
            synced_bytes = now.bytes
            await asyncio.to_thread(sync_filesystem, root_fd)


def _used(root_fd: int) -> _Used:
    found = os.fstatvfs(root_fd)
    return _Used((found.f_blocks - found.f_bfree) * found.f_frsize, found.f_files - found.f_ffree)

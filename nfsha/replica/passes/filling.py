"""Looks on while an empty filesystem is filled: how far it is, and what is there goes to the disk.

For a first copy. rsync says nothing then, so what it has done is read off the filesystem's own
counters. And what it wrote is written out while it still copies: at the end everything must be
durable, and a disk that only then begins would take that long once more. Whoever writes more than
he said can be stopped by it (`Room`). It changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from nfsha.replica.files.beneath import sync_filesystem

__all__ = ["Filling", "Room", "room_for"]

LOOK_EVERY_S: Final = 0.05
LOOKS_TOLD: Final = 4
"""Of so many looks one is told."""

SYNC_FROM_BYTES: Final = 64 << 20
"""So much more on the filesystem since the last sync is worth the wait of those who write."""

SYNC_FIRST_FROM_BYTES: Final = 16 << 20
"""The first time it is worth it sooner, for the disk has nothing to do yet; then twice as much each
time, up to `SYNC_FROM_BYTES`."""

LEAST_SPARE_BYTES: Final = 256 << 20
"""More than is written between two looks: at 5 GB/s it is just as much."""


@dataclass(frozen=True, slots=True)
class Room:
    """How much the filesystem may grow, from the begin on, and what to do when it grows more."""

    bytes: int
    outgrown: Callable[[], Awaitable[None]]


def room_for(root_fd: int, needed_bytes: int) -> int | None:
    """So much may somebody write who says that he needs so much; None where it is too little.

    All of it, and half of what is free then: the disk cannot be full before he is stopped. It
    blocks; OSError.
    """
    found = os.fstatvfs(root_fd)
    spare_bytes = (found.f_bavail * found.f_frsize - needed_bytes) // 2
    return needed_bytes + spare_bytes if spare_bytes >= LEAST_SPARE_BYTES else None


@dataclass(frozen=True, slots=True)
class _Used:
    bytes: int
    files: int


class Filling:
    """One filesystem that is filled, perhaps by several programs one after the other."""

    def __init__(self, root_fd: int) -> None:
        self._root_fd = root_fd
        self._begin: _Used | None = None
        self.bytes = 0
        """By so much it has grown since the begin, as of the last look."""

    @asynccontextmanager
    async def watch(
        self, grown: Callable[[int, int], None], room: Room | None = None
    ) -> AsyncIterator[None]:
        """For the length of a block; `grown` is told bytes and files since the begin, on the loop.

        At the end nothing of it is at work any more. An OSError of the filesystem ends the looking
        only: whoever writes there has it too.
        """
        enough, more = asyncio.Event(), asyncio.Event()
        syncing = asyncio.ensure_future(self._sync(more, enough))
        looking = asyncio.ensure_future(self._look_on(grown, room, more, enough))
        try:
            yield
        finally:
            enough.set()
            more.set()
            await asyncio.wait((looking, syncing))
            for one in (looking, syncing):
                with contextlib.suppress(OSError):
                    one.result()

    async def _look_on(
        self,
        grown: Callable[[int, int], None],
        room: Room | None,
        more: asyncio.Event,
        enough: asyncio.Event,
    ) -> None:
        if self._begin is None:
            self._begin = await asyncio.to_thread(_used, self._root_fd)
        looks = 0
        while not enough.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await enough.wait()
            now = await asyncio.to_thread(_used, self._root_fd)
            self.bytes = max(0, now.bytes - self._begin.bytes)
            more.set()
            looks += 1
            if looks % LOOKS_TOLD == 0 or enough.is_set():
                grown(self.bytes, max(0, now.files - self._begin.files))
            if room is not None and self.bytes > room.bytes and not enough.is_set():
                await room.outgrown()
                return

    async def _sync(self, more: asyncio.Event, enough: asyncio.Event) -> None:
        """Beside the looks: while it waits for the disk, more may be written than there is room."""
        synced_bytes, from_bytes = self.bytes, SYNC_FIRST_FROM_BYTES
        while not enough.is_set():
            await more.wait()
            more.clear()
            if (
                self.bytes - synced_bytes >= min(from_bytes, SYNC_FROM_BYTES)
                and not enough.is_set()
            ):
                synced_bytes, from_bytes = self.bytes, 2 * from_bytes
                await asyncio.to_thread(sync_filesystem, self._root_fd)


def _used(root_fd: int) -> _Used:
    found = os.fstatvfs(root_fd)
    return _Used((found.f_blocks - found.f_bfree) * found.f_frsize, found.f_files - found.f_ffree)

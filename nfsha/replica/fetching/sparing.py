"""Makes spare copies of the large files that change, before clients are held for the last pass.

What a spare is for, and how one is made: `nfsha.replica.passes.spares`. The next pass of the volume
uses them up. Without one the last pass takes longer, and nothing else: no trouble here ends a move.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from nfsha.replica.fetching.desk import Desk
from nfsha.replica.files.beneath import shown
from nfsha.replica.passes import spares
from nfsha.replica.rsync.child import ChildStuckError
from nfsha.replica.volume import volumes
from nfsha.replica.volume.facts import VolumeError, VolumeFacts

log = logging.getLogger(__name__)

MAX_SPARES: Final = 16
"""Of one volume: more large files than that would hold clients for longer anyway."""

_T = TypeVar("_T")


class Sparing:
    """The spares of all copies of this node."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def make(self, uuid: str) -> None:
        """Makes them for the large files that the last pass of this volume brought."""
        copy, here = self._desk.copies.get(uuid), self._desk.inventory.by_uuid(uuid)
        names = spares.large(copy.brought)[:MAX_SPARES] if copy is not None else ()
        if copy is None or here is None or not names:
            return

        def work(root_fd: int, stop: threading.Event) -> dict[bytes, int]:
            return _made(root_fd, names, stop)

        copy.spares |= await self._at_root(here, work) or {}

    async def drop(self) -> None:
        """Removes what no pass has used."""
        for copy in tuple(self._desk.copies.values()):
            here, names = self._desk.inventory.by_uuid(copy.uuid), tuple(copy.spares)
            copy.spares = {}
            if here is not None and names:
                await self._at_root(here, lambda root_fd, _, names=names: _drop(root_fd, names))  # type: ignore[misc]

    async def _at_root(
        self, here: VolumeFacts, work: Callable[[int, threading.Event], _T]
    ) -> _T | None:
        try:
            root_fd = await asyncio.to_thread(volumes.open_root, here)
            try:
                writing = _Writing(f"spares-{here.identity}")
                with self._desk.under_way.noted(here.identity or "", writing):
                    return await writing.run(lambda: work(root_fd, writing.stop))
            finally:
                os.close(root_fd)
        except (VolumeError, OSError) as error:
            log.info("volume %s: its large files are copied anew: %s", here.name, error)
            return None


class _Writing:
    """One thread that writes on a volume, and can be ended."""

    def __init__(self, name: str) -> None:
        self.stop = threading.Event()
        self._name = name
        self._done = asyncio.Event()

    async def run(self, work: Callable[[], _T]) -> _T:
        """Until it has ended, also when the caller is cancelled."""
        thread = asyncio.ensure_future(asyncio.to_thread(work))
        thread.add_done_callback(lambda _: self._done.set())
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:
            self.stop.set()
            await asyncio.wait({thread})
            raise

    async def end(self, within_s: float, *, at_once: bool) -> None:  # noqa: ARG002 - no child
        """At once or not: it stops after the piece that it copies. Raises ChildStuckError."""
        self.stop.set()
        try:
            async with asyncio.timeout(within_s):
                await self._done.wait()
        except TimeoutError as error:
            stuck = "a thread of this process, at work on a large file"
            raise ChildStuckError(self._name, [stuck]) from error


def _made(root_fd: int, names: Sequence[bytes], stop: threading.Event) -> dict[bytes, int]:
    made = {}
    for name in names:
        if stop.is_set():
            break
        try:
            size = spares.make(root_fd, name, stop)
        except OSError as error:
            log.info("%s has no spare, and is copied anew: %s", shown(name), error)
            continue
        if size:
            made[name] = size
    return made


def _drop(root_fd: int, names: Sequence[bytes]) -> None:
    spares.drop(root_fd, names)

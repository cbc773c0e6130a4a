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
from typing import Final

from nfsha.replica.fetching.desk import Desk
from nfsha.replica.files.beneath import shown
from nfsha.replica.passes import spares
from nfsha.replica.rsync.child import ChildStuckError
from nfsha.replica.volume import volumes
from nfsha.replica.volume.facts import VolumeError, VolumeFacts

log = logging.getLogger(__name__)

MAX_SPARES: Final = 16
"""Of one volume: more large files than that would hold clients for longer anyway."""

_Work = Callable[[int, threading.Event], None]


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
        made: dict[bytes, int] = {}
        try:
            await self._write(here, lambda root_fd, stop: _make(root_fd, names, stop, made))
        finally:  # also what was made before it was broken off
            copy.spares |= made

    async def drop(self) -> None:
        """Removes what no pass has used."""
        for copy in tuple(self._desk.copies.values()):
            here, names = self._desk.inventory.by_uuid(copy.uuid), tuple(copy.spares)
            copy.spares = {}
            if here is not None and names:
                await self._write(here, _dropping(names))

    async def _write(self, here: VolumeFacts, work: _Work) -> None:
        writing = _Writing(here, work)
        try:
            with self._desk.under_way.noted(here.identity or "", writing):
                await writing.run()
        except (VolumeError, OSError) as error:
            log.info("volume %s: spare copies of its large files: %s", here.name, error)


class _Writing:
    """One thread that writes on a volume, and can be ended."""

    def __init__(self, here: VolumeFacts, work: _Work) -> None:
        self._here = here
        self._work = work
        self._stop = threading.Event()
        self._done = asyncio.Event()

    async def run(self) -> None:
        """Until it has ended, also when the caller is cancelled. Raises VolumeError, OSError."""
        thread = asyncio.ensure_future(asyncio.to_thread(self._in_thread))
        thread.add_done_callback(lambda _: self._done.set())
        try:
            await asyncio.shield(thread)
        except asyncio.CancelledError:
            self._stop.set()
            await asyncio.wait({thread})
            raise

    def _in_thread(self) -> None:
        root_fd = volumes.open_root(self._here)
        try:
            self._work(root_fd, self._stop)
        finally:
            os.close(root_fd)

    async def end(self, within_s: float, *, at_once: bool) -> None:  # noqa: ARG002 - no child
        """At once or not: it stops after the piece that it copies. Raises ChildStuckError."""
        self._stop.set()
        try:
            async with asyncio.timeout(within_s):
                await self._done.wait()
        except TimeoutError as error:
            stuck = "a thread of this process, at work on a large file"
            raise ChildStuckError(f"spares-{self._here.identity}", [stuck]) from error


def _dropping(names: Sequence[bytes]) -> _Work:
    return lambda root_fd, _: spares.drop(root_fd, names)


def _make(
    root_fd: int, names: Sequence[bytes], stop: threading.Event, made: dict[bytes, int]
) -> None:
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

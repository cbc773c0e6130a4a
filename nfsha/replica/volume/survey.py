"""A look at all volumes that a hung filesystem cannot hold up, for the loop to await.

One thread looks at one place after the other. When a place does not answer in time its thread is
left behind with it (nothing can interrupt a system call on a dead disk) and another one goes on
with the rest. A place whose thread is still stuck is not looked at again. The threads are daemons:
they do not keep the process from ending. This module decides nothing about a volume.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

from nfsha.replica.volume.volumes import (
    Place,
    VolumeError,
    VolumeFacts,
    look,
    only_volumes,
    places,
    unanswering,
)

LOOK_WITHIN_S: Final = 5.0
"""How long one filesystem may take to answer; a healthy one takes well below a millisecond."""

MAX_STUCK: Final = 64
"""Threads left behind at most. Beyond that, nothing more is looked at until some come back."""


class Survey:
    """Looks at the volumes below `root`, again and again; one look at a time.

    `clock_s` must not stand still while a look hangs (time.monotonic).
    """

    def __init__(
        self,
        root: Path,
        clock_s: Callable[[], float],
        *,
        within_s: float = LOOK_WITHIN_S,
        keep_empty_root: bool = False,
    ) -> None:
        self._root = root
        self._clock_s = clock_s
        self._within_s = within_s
        self._keep_empty_root = keep_empty_root
        self._stuck: dict[Path, _Walker] = {}
        self._last: dict[Path, VolumeFacts] = {}

    async def look(self) -> tuple[VolumeFacts, ...]:
        """Returns what `discover` does; who does not answer is `failing`, with what was last known.

        It takes at most about `within_s` for each place that began to hang since the last look.
        Raises VolumeError when the root itself is not usable, or does not answer.
        """
        self._stuck = {path: one for path, one in self._stuck.items() if one.is_alive()}
        found = await self._places()
        seen = await self._look_at([place for place in found if place.path not in self._stuck])
        facts = [seen.get(place.path) or self._unanswering(place) for place in found]
        self._last = {one.path: one for one in facts}
        return only_volumes(facts, keep_empty_root=self._keep_empty_root)

    async def look_again(self, path: Path) -> VolumeFacts | None:
        """Looks at the one volume that is mounted there; None when nothing is any more.

        In the time of `look` for one place. Raises VolumeError as that does.
        """
        self._stuck = {path: one for path, one in self._stuck.items() if one.is_alive()}
        place = next((one for one in await self._places() if one.path == path), None)
        if place is None:
            return None
        seen = {} if path in self._stuck else await self._look_at([place])
        facts = self._last[path] = seen.get(path) or self._unanswering(place)
        return facts

    async def _places(self) -> tuple[Place, ...]:
        if self._root in self._stuck or len(self._stuck) >= MAX_STUCK:
            raise VolumeError(f"the NFS root {self._root}, or too much below it, does not answer")
        result: list[tuple[Place, ...] | VolumeError] = []
        walker = _Walker([self._root], lambda _: result.append(_tried(self._root)), self._clock_s)
        await self._walk(walker)
        if not result:
            raise VolumeError(
                f"the NFS root {self._root} does not answer within {self._within_s:.0f} s; a disk "
                f"or a server that it is on is dead"
            )
        if isinstance(result[0], VolumeError):
            raise result[0]
        return result[0]

    async def _look_at(self, wanted: list[Place]) -> dict[Path, VolumeFacts]:
        seen: dict[Path, VolumeFacts] = {}
        by_path = {place.path: place for place in wanted}

        def look_at(path: Path) -> None:
            seen[path] = look(by_path[path])

        waiting = list(by_path)
        while waiting and len(self._stuck) < MAX_STUCK:
            waiting = await self._walk(_Walker(waiting, look_at, self._clock_s))
        return dict(seen)

    async def _walk(self, walker: _Walker) -> list[Path]:
        """Waits until all is done, or one hangs; returns what was not begun."""
        walker.begin(asyncio.get_running_loop())
        while True:
            left_s = walker.began_s + self._within_s - self._clock_s()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, left_s)):
                    await walker.done.wait()
            if walker.done.is_set():
                return []
            hung, rest = walker.leave_if_hung(self._within_s)
            if hung is not None:
                self._stuck[hung] = walker
                return rest

    def _unanswering(self, place: Place) -> VolumeFacts:
        why = (
            f"does not answer within {self._within_s:.0f} s; its disk is dead or overloaded, see "
            f"the kernel's log"
        )
        last = self._last.get(place.path)
        if last is None or last.device != place.mount.source:
            return unanswering(place, why)
        return replace(last, failing=why)


class _Walker(threading.Thread):
    """Does the same with one path after the other, until it is left behind."""

    def __init__(
        self, paths: Iterable[Path], work: Callable[[Path], None], clock_s: Callable[[], float]
    ) -> None:
        super().__init__(name="nfsha-look", daemon=True)
        self.done = asyncio.Event()
        self.began_s = clock_s()
        self._work = work
        self._clock_s = clock_s
        self._waiting = deque(paths)
        self._now: Path | None = None
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the thread; `done` is set in this loop when all is done."""
        self._loop = loop
        self.start()

    def leave_if_hung(self, within_s: float) -> tuple[Path | None, list[Path]]:
        """If it is at one path for longer: lets it do no more; returns that one and the rest."""
        with self._lock:
            if self._now is None or self._clock_s() - self.began_s < within_s:
                return None, []
            rest = list(self._waiting)
            self._waiting.clear()
            return self._now, rest

    def run(self) -> None:
        """What the thread does."""
        while (path := self._next()) is not None:
            self._work(path)
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                self._loop.call_soon_threadsafe(self.done.set)

    def _next(self) -> Path | None:
        with self._lock:
            self._now = self._waiting.popleft() if self._waiting else None
            self.began_s = self._clock_s()
            return self._now


def _tried(root: Path) -> tuple[Place, ...] | VolumeError:
    try:
        return places(root)
    except VolumeError as error:
        return error

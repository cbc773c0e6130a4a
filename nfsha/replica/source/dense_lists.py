"""The source's lists of large files without holes, of volumes that the other node has nothing of.

rsync looks for holes in all that it writes under -S, and so writes it in pieces of 1 KiB: 0.8 s of
CPU time for a GiB. A file without holes needs none of that, but only the source can see that it is
one. find(1) looks, at low priority: a walk in a thread of this process would hold up its loop. It
is ended when it takes too long; what it found by then is good.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from nfsha.replica.files.durable import names_after, read_small, write_durably
from nfsha.replica.files.own_names import OWN_ROOT_NAMES, PARTIAL
from nfsha.replica.rsync.child import Child, ChildError, ChildStuckError, Priority
from nfsha.replica.volume import volumes
from nfsha.replica.volume.dense import MAX_BYTES, as_bytes, dense_name, dense_of
from nfsha.replica.volume.facts import VolumeError, VolumeFacts

log = logging.getLogger(__name__)

LEAST_KIB: Final = 256
"""Below, looking for holes costs less than making the file."""

LOOK_WITHIN_MS: Final = 1500
"""For all volumes together: a fetch waits for it."""

GOOD_FOR_MS: Final = 300_000
"""A list is not made anew before: an old one costs time, and no data."""

_END_WITHIN_S: Final = 2.0


class DenseLists:
    """Made in the folder of what is published; `clock_ms` only goes forward."""

    def __init__(self, public: Path, clock_ms: Callable[[], int]) -> None:
        self._public = public
        self._clock_ms = clock_ms
        self._made_ms: dict[str, int] = {}
        self._until_ms = 0
        self._child: Child | None = None

    async def publish(self, wanted: Mapping[str, VolumeFacts]) -> None:
        """Publishes the lists of these volumes, by identity, and no others. Raises OSError.

        Not to be called while it runs.
        """
        for uuid in names_after(self._public, dense_name("")) - wanted.keys():
            (self._public / dense_name(uuid)).unlink(missing_ok=True)
            self._made_ms.pop(uuid, None)
        self._until_ms = self._clock_ms() + LOOK_WITHIN_MS
        for uuid, one in wanted.items():
            now_ms = self._clock_ms()
            made_ms = self._made_ms.get(uuid)
            if now_ms < self._until_ms and (made_ms is None or now_ms - made_ms >= GOOD_FOR_MS):
                self._made_ms[uuid] = now_ms
                await self._make(uuid, one)

    async def end(self) -> None:
        """Nothing looks into a volume any more, and no list is good. Raises ChildStuckError."""
        self._until_ms = 0
        self._made_ms.clear()
        if self._child is not None:
            await self._child.end(_END_WITHIN_S, grace_s=0)

    async def _make(self, uuid: str, one: VolumeFacts) -> None:
        found = self._public / f".{dense_name(uuid)}.found"
        try:
            root_fd = await asyncio.to_thread(volumes.open_root, one)
            try:
                await self._look(uuid, root_fd, found)
            finally:
                os.close(root_fd)
            await asyncio.to_thread(_publish, found, self._public / dense_name(uuid))
        except (VolumeError, ChildError, ChildStuckError, OSError) as error:
            log.warning(
                "volume %s: its first copy looks for holes in all files: %s", one.name, error
            )
        finally:
            found.unlink(missing_ok=True)

    async def _look(self, uuid: str, root_fd: int, into: Path) -> None:
        child = await Child.start(
            _find(root_fd, into), name=f"dense-{uuid}", pass_fds=(root_fd,), priority=Priority.LOW
        )
        self._child = child
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout((self._until_ms - self._clock_ms()) / 1000):
                    await child.wait()
        finally:
            if child.alive:
                await child.end(_END_WITHIN_S, grace_s=0)
            self._child = None


def _find(root_fd: int, into: Path) -> list[str]:
    """Blocks, size and name of each large file, at most so many bytes of them."""
    root = f"/proc/self/fd/{root_fd}/"
    not_data = [
        word for name in OWN_ROOT_NAMES for word in ("-path", f"{root}{name.decode()}", "-o")
    ]
    skipped = ["(", *not_data, "-name", PARTIAL.decode(), ")", "-prune", "-o"]
    large = ["-type", "f", "-size", f"+{LEAST_KIB - 1}k"]
    said = ["-fprintf", str(into), r"%b %s %P\0"]
    return ["prlimit", f"--fsize={MAX_BYTES}", "find", root, "-xdev", *skipped, *large, *said]


def _publish(found: Path, name: Path) -> None:
    """The list is shorter than what find wrote: each entry has one number less."""
    write_durably(name, as_bytes(dense_of(read_small(found, MAX_BYTES))))

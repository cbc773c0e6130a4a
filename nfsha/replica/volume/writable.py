"""Whether a volume takes writes now: asked before the service moves to it, and when a pass hangs.

A filesystem can be mounted for writing and refuse each write, or never answer one: frozen for a
snapshot that was forgotten, a thin pool that is full, a dead disk. Nothing but a write tells. This
one sets the times of the volume's root to what they are. Who asks, and what comes of it, is not
decided here.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable

from nfsha.replica.volume import volumes
from nfsha.replica.volume.aside import Aside, HangsError
from nfsha.replica.volume.facts import VolumeError, VolumeFacts

WRITES_WITHIN_S = 10.0
"""A healthy disk takes milliseconds, a busy one some seconds."""


class Writable:
    """Asks; at most one question of a volume at a time, whatever hangs."""

    def __init__(self, clock_s: Callable[[], float]) -> None:
        """`clock_s` goes on while a disk hangs."""
        self._aside = Aside(clock_s)

    async def lacking(self, wanted: Iterable[VolumeFacts], *, durable: bool) -> str:
        """Says which of these volumes do not take a write, and why; "" when all do.

        `durable`: and brings it to the disk. Where much was written just now that may take long.
        """
        found = await asyncio.gather(*(self._ask(one, durable) for one in wanted))
        return "; ".join(words for words in found if words)

    def hung(self) -> dict[str, str]:
        """The volumes by name that have not answered yet, in time; each with a sentence."""
        return {
            name: f"volume {name}: {_hangs()}"
            for name, hung_s in sorted(self._aside.hung().items())
            if hung_s >= WRITES_WITHIN_S
        }

    async def _ask(self, one: VolumeFacts, durable: bool) -> str:
        try:
            await self._aside.run(one.name, lambda: _write(one, durable), within_s=WRITES_WITHIN_S)
        except HangsError:
            return f"volume {one.name}: {_hangs()}"
        except (VolumeError, OSError) as error:
            words = getattr(error, "strerror", None) or str(error)
            return f"volume {one.name}: nothing can be written to {one.path}: {words}"
        return ""


def _hangs() -> str:
    return (
        f"a write to it has not come back within {WRITES_WITHIN_S:g} s: its filesystem is frozen "
        "(fsfreeze, a snapshot), or its disk is dead; the kernel's log may say more"
    )


def _write(one: VolumeFacts, durable: bool) -> None:
    with volumes.root_of(one) as root_fd:
        found = os.fstat(root_fd)
        os.utime(root_fd, ns=(found.st_atime_ns, found.st_mtime_ns))
        if durable:
            os.fsync(root_fd)

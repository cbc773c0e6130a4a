"""The quarantines of all volumes here: their limits are kept, and operators' questions answered."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from nfsha.config import Sync
from nfsha.replica.quarantine.quarantine import Quarantine, QuarantineError, over_limits
from nfsha.replica.volume import volumes
from nfsha.replica.volume.inventory import Inventory
from nfsha.replica.volume.volumes import VolumeError, VolumeFacts

T = TypeVar("T")

log = logging.getLogger(__name__)

KEEP_EVERY_MS = 60_000
"""How often the limits are looked at."""


class Quarantines:
    """The quarantines of this node's volumes."""

    def __init__(self, inventory: Inventory, sync: Sync, clock_ms: Callable[[], int]) -> None:
        self._inventory = inventory
        self._sync = sync
        self._clock_ms = clock_ms
        self._kept_ms = 0
        self.over: Mapping[str, str] = {}
        """What is beyond its limits, in words, by the volume's name."""

    async def keep(self) -> None:
        """Looks at each one's limits, where it is time to, and drops what is beyond if it may."""
        limits = (self._sync.quarantine_max_age_ms, self._sync.quarantine_max_bytes)
        if limits == (None, None) or self._clock_ms() - self._kept_ms < KEEP_EVERY_MS:
            return
        self._kept_ms = self._clock_ms()
        over = {}
        for one in self._inventory.here:
            if one.identity is None:
                continue
            try:
                over[one.name] = await asyncio.to_thread(
                    _inside,
                    one,
                    lambda store: _limited(store, limits, drop=self._sync.quarantine_drop),
                )
            except (VolumeError, QuarantineError, OSError) as error:
                over[one.name] = f"cannot be read: {error}"
        self.over = {name: words for name, words in over.items() if words}

    async def ask(self, volume: str, call: Callable[[Quarantine], T]) -> T:
        """Does something with the quarantine of one volume, by its name or path; its answer.

        Raises QuarantineError also where there is no such volume, VolumeError and OSError.
        """
        for one in self._inventory.here:
            if volume in (one.name, str(one.path)):
                return await asyncio.to_thread(_inside, one, call)
        raise QuarantineError(f"there is no volume {volume!r} here: see `nfsha volumes`")


def _limited(store: Quarantine, limits: tuple[int | None, int | None], *, drop: bool) -> str:
    if drop:
        for entry in store.drop_expired(*limits):
            log.warning("quarantine entry %s was beyond its limits, and is dropped", entry.name)
    return over_limits(store.usage(), time.time_ns(), *limits)


def _inside(one: VolumeFacts, call: Callable[[Quarantine], T]) -> T:
    with volumes.root_of(one) as root_fd:
        return call(Quarantine(root_fd))

"""What all work of the passive node on its copies shares: settings, stores, and what is under way.

With the words for a copy that is refused or failed. It begins no pass and fetches nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from nfsha.config import Sync
from nfsha.core.model import Epoch
from nfsha.replica.clocks import Clocks
from nfsha.replica.content.questions import Asking
from nfsha.replica.fetching.copying import Copy, State
from nfsha.replica.fetching.guards import RefusedError
from nfsha.replica.fetching.tally import Tally
from nfsha.replica.fetching.under_way import UnderWay
from nfsha.replica.rsync.arguments import From
from nfsha.replica.source.listing import Listing
from nfsha.replica.volume.facts import VolumeFacts
from nfsha.replica.volume.inventory import Inventory
from nfsha.replica.volume.marks import MarkStore

log = logging.getLogger(__name__)

MAX_ATTEMPTS_COUNTED = 10


class Desk:
    """`retry` is told when a pass failed: of which volume, and how often in a row."""

    def __init__(
        self,
        sync: Sync,
        inventory: Inventory,
        store: MarkStore,
        scratch: Path,
        *,
        source: Callable[[Epoch], From],
        clocks: Clocks,
        changed: Callable[[], None],
        retry: Callable[[str, int], object],
    ) -> None:
        """`changed` is called when a mark, a taint or a stamp changed."""
        self.sync = sync
        self.inventory = inventory
        self.store = store
        self.scratch = scratch
        self.source = source
        self.clocks = clocks
        self.changed = changed
        self.retry = retry
        self.copies: dict[str, Copy] = {}
        self.epoch: Epoch | None = None
        self.careful = False
        """Passes of listed folders compare by content: in a handover, until clients are held."""
        self.thorough = False
        """A full walk is followed by a comparison by content of what changed since the takeover."""
        self.pressing = False
        """Clients wait for what runs: it competes with everything else on equal terms."""
        self.listed: Listing | None = None
        """What passes go by instead of asking the source each for itself."""
        self.bandwidth_kib_s: int | None = sync.bandwidth_kib_s
        self.bandwidth_set = False
        self.rate_bytes_s: int | None = None
        """Of the last pass that copied enough to measure it, its walk and its end included."""
        self.tally: Tally | None = None
        """Where the passes of a handover are counted, while one is under way."""
        self.asking = Asking(changed)
        self.under_way = UnderWay()

    def copy_of(self, uuid: str) -> Copy:
        """RefusedError for a volume that has gone meanwhile, from here or from the other node."""
        copy = self.copies.get(uuid)
        if copy is None:
            raise RefusedError("it is not mounted on both nodes any more")
        return copy

    def name_of(self, uuid: str) -> str:
        """What to call a volume."""
        return self.inventory.name_of(uuid)

    def refused(self, copy: Copy, why: str) -> None:
        """A guard forbade the pass."""
        self.say(copy, f"volume {self.name_of(copy.uuid)} is not copied: {why}")
        copy.rest(State.REFUSED, why)

    def say(self, copy: Copy, words: str) -> None:
        """Once, until something else is to be said: a pass that fails is tried again and again."""
        if words != copy.said:
            copy.said = words
            log.warning("%s", words)

    def failed(self, copy: Copy, why: str) -> None:
        """The pass failed, and is tried again: ever later, but in a handover, which is in haste."""
        if self.tally is None or copy.attempts == 0:
            copy.attempts = min(copy.attempts + 1, MAX_ATTEMPTS_COUNTED)
        self.say(copy, f"volume {self.name_of(copy.uuid)}: the pass failed: {why}")
        copy.rest(State.FAILED, why)
        self.retry(copy.uuid, copy.attempts)

    def limit_of(self, uuid: str) -> int | None:
        """The limit for the passes of this volume now, in KiB a second; None: none."""
        here = self.inventory.by_uuid(uuid)
        return None if here is None else self.bandwidth(here)

    def bandwidth(self, here: VolumeFacts) -> int | None:
        """The limit for this volume now."""
        if self.bandwidth_set:
            return self.bandwidth_kib_s
        return self.sync.of(here.path).bandwidth_kib_s

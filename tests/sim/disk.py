"""A node's disk, as far as the journal goes: slow, failing, torn, restored, replaced.

A write is either wholly there or not at all (it is a rename); what was under way when the power
went, or the process was killed, or the write reported a failure, may be there or not.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from nfsha.core.model import Completed, Journal, Persisted, PersistFailed

if TYPE_CHECKING:
    from tests.sim.node import Node

HISTORY_KEPT = 32


class Disk:
    """What is durable, and what is on its way."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._world = node.world
        self.journal: Journal | None = None
        self.corrupt = ""
        self.history: list[Journal] = []
        self.slow_us = 0
        self.failing = False
        self.cut_power_at_write = False
        self._queue: deque[tuple[int, Journal]] = deque()
        self._busy = False

    def write(self, number: int, journal: Journal) -> None:
        """Begins to write; the result comes into the node's inbox."""
        self._queue.append((number, journal))
        if not self._busy:
            self._begin()

    def drop_power(self) -> None:
        """The machine stops: what was under way is there or not."""
        if self._queue and self._world.random.random() < 0.5:
            self._store(self._queue[0][1])
        self.forget_results()

    def in_flight(self) -> bool:
        """Is a write under way?"""
        return self._busy

    def complete_silently(self) -> None:
        """The daemon is killed in fsync: the kernel ends the rename all the same."""
        if self._queue:
            self._store(self._queue[0][1])

    def forget_results(self) -> None:
        """The daemon that waited is gone."""
        self._queue.clear()
        self._busy = False

    def replace(self) -> None:
        """Another disk: nothing is known."""
        self.journal, self.corrupt = None, ""

    def restore(self) -> bool:
        """An older state of the disk comes back; False when there is none."""
        older = [kept for kept in self.history if kept != self.journal]
        if not older:
            return False
        self.journal, self.corrupt = self._world.random.choice(older), ""
        return True

    def tear(self) -> None:
        """The file cannot be read any more."""
        self.journal, self.corrupt = None, "its checksum is wrong"

    def _begin(self) -> None:
        self._busy = True
        world = self._world
        if self.cut_power_at_write:
            self.cut_power_at_write = False
            world.at(world.random.randrange(200, 3000), self._node.power_off_during_write)
        fsync_us = world.random.randrange(800, 6000)
        world.at(fsync_us + self.slow_us, self._end, self._node.life)

    def _end(self, life: int) -> None:
        if life != self._node.life or not self._queue:
            return
        number, journal = self._queue.popleft()
        if self.failing:
            if self._world.random.random() < 0.5:
                self._store(journal)
            self._node.take(Completed(number, PersistFailed("no space left on device")))
        else:
            self._store(journal)
            self._node.take(Completed(number, Persisted(journal)))
        if self._queue:
            self._begin()
        else:
            self._busy = False

    def _store(self, journal: Journal) -> None:
        self.journal, self.corrupt = journal, ""
        self.history.append(journal)
        del self.history[:-HISTORY_KEPT]

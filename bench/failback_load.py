"""The clients of the bench of failback, and what became of their operations.

One writes numbered records, each made stable at once; from its acknowledgements comes the time
without service. Another one changes the same 20 files in different folders, one each 25 ms, from
before the move to after it: so whatever a pass before the stall has brought, all 20 have changed
again when service stops. Both go by path through the VIP, as hard mounts do.
"""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from bench.measure import Gap, longest_gap
from bench.replication_trees import CHANGES, Tree
from tests.netns.lab import Lab
from tests.netns.labkit.network import VIP
from tests.netns.labkit.nfs_client import Attempt, Mount, NfsError
from tests.netns.labkit.place import LabError
from tests.netns.labkit.records import Records

CAP_S = 180.0
"""So long an operation may wait: a hard mount waits for ever."""

CHANGE_EVERY_S = 0.025
RECORD_EVERY_MS = 20.0
BEFORE_NS = 500_000_000
"""The window of the outage begins so long before the move is asked for."""

AROUND_NS = 1_000_000_000
"""Operations so long before and after the outage are kept."""

_AT = 200
_STOP_S = 10.0


class Changer(threading.Thread):
    """Changes `CHANGES` files of a tree in turns, until `end`."""

    def __init__(self, lab: Lab, tree: Tree) -> None:
        super().__init__(name="bench-changer", daemon=True)
        self._lab = lab
        self._export = f"/nfs/{tree.volume}"
        self._paths = changed_paths(tree)
        self._ended = threading.Event()
        self._acked: dict[str, int] = {}
        self._trouble = ""
        self.acknowledged = self.stale = self.failed = 0

    def run(self) -> None:
        """In the client's place."""
        try:
            self._lab.c.inside(self._work)
        except (LabError, OSError) as error:
            self._trouble = str(error)

    def end(self) -> None:
        """Ends it; an operation that waits gets one more second."""
        self._ended.set()

    def wait(self) -> None:
        """Waits for the end. Raises LabError when it does not come, or something went wrong."""
        self.join(_STOP_S)
        if self.is_alive() or self._trouble:
            raise LabError(f"the client that changes files: {self._trouble or 'it does not end'}")

    def lost(self) -> list[str]:
        """Acknowledged changes that cannot be read back through the VIP, in words."""
        return self._lab.c.inside(self._missing)

    def _work(self) -> None:
        mount: Mount | None = None
        for number in itertools.count(1):
            if self._ended.is_set():
                break
            path = self._paths[number % len(self._paths)]
            try:
                if mount is None:
                    mount = Mount(VIP, self._export, cap_s=CAP_S, should_stop=self._ended.is_set)
                mount.put(path, _AT, change(number))
                self._acked[path] = number
                self.acknowledged += 1
            except NfsError as error:
                stale = error.errno in (errno.ESTALE, errno.ENOENT)
                self.stale, self.failed = self.stale + stale, self.failed + (not stale)
                if mount is not None and mount.broken:
                    mount.close()
                    mount = None
            self._ended.wait(CHANGE_EVERY_S)
        if mount is not None:
            mount.close()

    def _missing(self) -> list[str]:
        mount = Mount(VIP, self._export)
        try:
            found = {path: number_in(mount.get(path)[_AT:]) for path in self._acked}
        finally:
            mount.close()
        return [
            f"{path}: change {number} was acknowledged, {found[path]} is there"
            for path, number in self._acked.items()
            if found[path] < number
        ]


def changed_paths(tree: Tree) -> list[str]:
    """The files that change, each in a folder of its own if the tree has twenty."""
    step = max(1, tree.folders // CHANGES)
    return [f"/{tree.name(number * step, number)}" for number in range(CHANGES)]


def change(number: int) -> bytes:
    """What is written by one change: always of one length, so that no file grows."""
    return f"changed {number:010d}\n".encode()


def number_in(content: bytes) -> int:
    """The number of a change; 0 when there is none. Raises LabError for what nobody wrote."""
    words = content.split()
    if not words:
        return 0
    if len(words) != 2 or content != change(int(words[1])):
        raise LabError(f"a changed file holds {content!r}")
    return int(words[1])


@dataclass(frozen=True)
class Seen:
    """What the writer saw of one move. Times of `operations`: ms after the outage began."""

    outage: Gap
    operations: tuple[tuple[float, float, str], ...]
    stale: int
    failed: int


def seen(records: Records, asked_ns: int) -> Seen:
    """The outage around a move that was asked for then, and all that did not go well."""
    attempts = [one for one in records.attempts if one.ended_ns >= asked_ns - BEFORE_NS]
    if not attempts or attempts[-1].error is not None:
        raise LabError("the client had no service at the end")
    acked = [one.ended_ns for one in attempts if one.error is None]
    outage = longest_gap(acked, acked[0], acked[-1])
    stale = sum(one.stale for one in attempts)
    failed = sum(one.error is not None for one in attempts) - stale
    return Seen(outage, _around(attempts, outage), stale, failed)


def _around(attempts: Sequence[Attempt], outage: Gap) -> tuple[tuple[float, float, str], ...]:
    start_ns, end_ns = outage.start_ns - AROUND_NS, outage.end_ns + AROUND_NS

    def after_ms(time_ns: int) -> float:
        return round((time_ns - outage.start_ns) / 1e6, 2)

    return tuple(
        (after_ms(one.sent_ns), after_ms(one.ended_ns), one.error or "")
        for one in attempts
        if start_ns <= one.ended_ns <= end_ns
    )

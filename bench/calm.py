"""False takeovers: every contestant undisturbed for minutes while all cores are busy.

All contestants at once, each in its own lab, on the same busy cores: that can only make a false
takeover more likely, never less. The busy loops are processes of ordinary priority, one bound to
each core, that end by themselves.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import psutil

from bench.contestants import ADDRESS, Contestant, Kind
from tests.netns.lab import Lab

_SETTLE_S = 2.0
_GRACE_S = 30.0
_LOOP = """
import sys, time
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    pass
"""


@dataclass(frozen=True)
class Calm:
    """What became of one contestant. Times in ms after the beginning.

    takeovers: how often a node got the address; releases: how often one lost it; both should be 0.
    moves: changes of phase, for nfsha. late_turns: turns of both daemons that came more than two
    heartbeats after the last (None: no such counter).
    """

    contestant: str
    minutes: float
    busy_percent: float
    takeovers: int
    releases: int
    holders_at_end: tuple[str, ...]
    moves: tuple[tuple[str, float, str, str, str], ...]
    late_turns: int | None
    holds: tuple[tuple[str, float, float], ...]

    @property
    def undisturbed(self) -> bool:
        """Nothing at all happened."""
        nothing = not self.takeovers and not self.releases and not self.moves
        return nothing and self.holders_at_end == ("a",)


def measure(kinds: Sequence[Kind], minutes: float, say: Callable[[str], None]) -> list[Calm]:
    """Runs all of them for so many minutes. Raises LabError when one does not even settle."""
    with contextlib.ExitStack() as stack:
        pairs = [(kind, kind.make(stack.enter_context(Lab()))) for kind in kinds]
        for _, contestant in pairs:
            contestant.settle()
        time.sleep(_SETTLE_S)
        stack.enter_context(busy_cores(minutes * 60 + _GRACE_S))
        before = [_late_turns(kind, contestant) for kind, contestant in pairs]
        start_ns = Lab.now_ns()
        psutil.cpu_percent()
        _wait(minutes, pairs, start_ns, say)
        busy_percent = psutil.cpu_percent()
        return [
            _calm(kind, contestant, start_ns, minutes, busy_percent, late_before)
            for (kind, contestant), late_before in zip(pairs, before, strict=True)
        ]


@contextlib.contextmanager
def busy_cores(longest_s: float) -> Iterator[None]:
    """One busy loop on each core that this process may use, inside the block."""
    loops = []
    try:
        for core in sorted(os.sched_getaffinity(0)):
            loop = subprocess.Popen(
                [sys.executable, "-c", _LOOP, str(longest_s)], stdin=subprocess.DEVNULL
            )
            loops.append(loop)
            os.sched_setaffinity(loop.pid, {core})
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def _wait(
    minutes: float,
    pairs: Sequence[tuple[Kind, Contestant]],
    start_ns: int,
    say: Callable[[str], None],
) -> None:
    end_ns = start_ns + int(minutes * 60e9)
    while (left_s := (end_ns - Lab.now_ns()) / 1e9) > 0:
        time.sleep(min(60.0, left_s))
        changes = {kind.name: len(one.lab.look().holds(ADDRESS)) - 1 for kind, one in pairs}
        passed_s = (Lab.now_ns() - start_ns) / 1e9
        say(f"calm: {passed_s:.0f} of {minutes * 60:.0f} s; takeovers so far {changes}")


def _late_turns(kind: Kind, contestant: Contestant) -> int | None:
    if not kind.ours:
        return None
    total = 0
    for node in (contestant.lab.a, contestant.lab.b):
        counters = node.status()["counters"]
        total += counters.get("late_turns", 0) if isinstance(counters, dict) else 0
    return total


def _calm(
    kind: Kind,
    contestant: Contestant,
    start_ns: int,
    minutes: float,
    busy_percent: float,
    late_before: int | None,
) -> Calm:
    late_after = _late_turns(kind, contestant)
    holds = contestant.lab.look().holds(ADDRESS)

    def after_ms(time_ns: int) -> float:
        return round((time_ns - start_ns) / 1e6, 3)

    return Calm(
        contestant=kind.name,
        minutes=minutes,
        busy_percent=busy_percent,
        takeovers=sum(one.start_ns > start_ns for one in holds),
        releases=sum(one.end_ns > start_ns and not one.open for one in holds),
        holders_at_end=tuple(sorted(one.node for one in holds if one.open)),
        moves=tuple(
            (one.node, after_ms(one.at_ns), one.row, one.phase, one.to)
            for one in contestant.moves(start_ns)
        ),
        late_turns=None if late_after is None else late_after - (late_before or 0),
        holds=tuple((one.node, after_ms(one.start_ns), after_ms(one.end_ns)) for one in holds),
    )

"""From what was observed to figures: longest gaps and overlaps. Pure, so that it can be tested.

Times are CLOCK_BOOTTIME in ns, windows [start, end].
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol


class Answer(Protocol):
    """One frame with NFS data from the VIP (tests.netns.labkit.observe.Reply)."""

    @property
    def node(self) -> str:
        """Whose port it left."""
        ...

    @property
    def time_ns(self) -> int:
        """When."""
        ...

    @property
    def again(self) -> bool:
        """TCP sent the same bytes before."""
        ...


@dataclass(frozen=True)
class Gap:
    """The longest time without a success."""

    start_ns: int
    end_ns: int

    @property
    def ms(self) -> float:
        """Its length."""
        return (self.end_ns - self.start_ns) / 1e6


@dataclass(frozen=True)
class Spread:
    """Minimum, median and maximum of some runs, in ms."""

    least: float
    median: float
    most: float

    @staticmethod
    def of(values: Iterable[float]) -> Spread | None:
        """None without values."""
        found = sorted(values)
        if not found:
            return None
        return Spread(found[0], statistics.median(found), found[-1])


def longest_gap(successes_ns: Iterable[int], start_ns: int, end_ns: int) -> Gap:
    """The longest time without a success in a window; its ends count as successes."""
    inside = sorted(time for time in successes_ns if start_ns <= time <= end_ns)
    pairs = pairwise([start_ns, *inside, end_ns])
    return max((Gap(one, other) for one, other in pairs), key=lambda gap: gap.ms)


def answers_overlap_ms(
    answers: Sequence[Answer], windows: Sequence[tuple[int, int]], *, with_repeats: bool
) -> float:
    """How long two nodes answered clients at once, summed over windows with one move in each.

    In each window: from the first answer of the other node to the last answer of the node that
    answered first. A window ends where a fault does, because a node may then take over back.
    with_repeats: frames that only repeat bytes (TCP retransmission) count as answers.
    """
    total_ns = 0
    for start_ns, end_ns in windows:
        within = [
            one
            for one in answers
            if start_ns <= one.time_ns <= end_ns and (with_repeats or not one.again)
        ]
        total_ns += _overlap_ns(within)
    return total_ns / 1e6


def _overlap_ns(answers: Sequence[Answer]) -> int:
    if not answers:
        return 0
    ordered = sorted(answers, key=lambda one: one.time_ns)
    old = ordered[0].node
    new_ns = next((one.time_ns for one in ordered if one.node != old), None)
    if new_ns is None:
        return 0
    last_of_old_ns = max(one.time_ns for one in ordered if one.node == old)
    return max(0, last_of_old_ns - new_ns)

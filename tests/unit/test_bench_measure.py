"""From times to gaps and overlaps."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from bench.faults import Times
from bench.measure import Gap, Spread, answers_overlap_ms, longest_gap

MS = 1_000_000


@dataclass(frozen=True)
class Frame:
    node: str
    time_ns: int
    again: bool = False


def frames(*seen: tuple[str, int]) -> list[Frame]:
    return [Frame(node, at_ms * MS) for node, at_ms in seen]


def test_the_longest_gap_lies_between_two_successes() -> None:
    gap = longest_gap([0, 5 * MS, 1005 * MS, 1010 * MS], 0, 1010 * MS)
    assert gap == Gap(5 * MS, 1005 * MS)
    assert gap.ms == 1000


def test_a_service_that_never_comes_back_is_a_gap_to_the_end() -> None:
    assert longest_gap([0, 5 * MS], 0, 3000 * MS) == Gap(5 * MS, 3000 * MS)
    assert longest_gap([], 0, 3000 * MS) == Gap(0, 3000 * MS)


def test_successes_outside_the_window_do_not_count() -> None:
    assert longest_gap([10 * MS, 9000 * MS], 100 * MS, 300 * MS) == Gap(100 * MS, 300 * MS)


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(1.0, 3.0, 10.0)
    assert Spread.of([3.0, 1.0]) == Spread(1.0, 2.0, 3.0)
    assert Spread.of([]) is None


@pytest.mark.parametrize(
    ("seen", "overlap_ms"),
    [
        ([], 0),
        ([("a", 10), ("a", 500)], 0),
        ([("a", 10), ("b", 500)], 0),
        ([("a", 10), ("b", 500), ("a", 740), ("b", 800)], 240),
        ([("b", 500), ("a", 10), ("a", 740)], 240),
    ],
)
def test_overlap_of_answers(seen: list[tuple[str, int]], overlap_ms: float) -> None:
    window = (0, 1000 * MS)
    assert answers_overlap_ms(frames(*seen), [window], with_repeats=True) == overlap_ms


def test_a_move_back_after_the_healing_is_no_overlap_but_a_late_answer_there_is() -> None:
    there_and_back = frames(("a", 10), ("b", 300), ("b", 990), ("a", 1010), ("a", 1900))
    windows = Times(0, 1000 * MS, 2000 * MS).windows()
    assert answers_overlap_ms(there_and_back, windows, with_repeats=True) == 0
    late = [*there_and_back, Frame("b", 1005 * MS), Frame("b", 1060 * MS)]
    assert answers_overlap_ms(late, windows, with_repeats=True) == 50


def test_windows_without_a_healing() -> None:
    assert Times(5, None, 9).windows() == ((5, 9),)


def test_repetitions_by_tcp_count_only_when_asked_for() -> None:
    seen = [*frames(("a", 10), ("b", 500)), Frame("a", 900 * MS, again=True)]
    window = (0, 1000 * MS)
    assert answers_overlap_ms(seen, [window], with_repeats=False) == 0
    assert answers_overlap_ms(seen, [window], with_repeats=True) == 400

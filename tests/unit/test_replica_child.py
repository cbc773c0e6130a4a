"""What a child printed: cut into lines, within bounds, whatever the bytes; and who left whom."""

from __future__ import annotations

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfsha.replica.rsync import child
from nfsha.replica.rsync.child import (
    MAX_LINE_BYTES,
    TAIL_BYTES,
    TAIL_LINES,
    ChildStuckError,
    Line,
    LineSplitter,
    Stream,
    Tail,
)


def split(*pieces: bytes) -> list[Line]:
    splitter = LineSplitter(Stream.OUTPUT)
    lines = [line for piece in pieces for line in splitter.feed(piece)]
    return lines + list(splitter.rest())


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_lines_do_not_depend_on_how_the_bytes_arrive(pieces: list[bytes]) -> None:
    expected = [each for each in re.split(rb"[\r\n]", b"".join(pieces)) if each]
    assert [line.data for line in split(*pieces)] == expected
    assert not any(line.cut for line in split(*pieces))


def test_progress_ends_in_carriage_returns() -> None:
    assert [line.data for line in split(b"  10%\r", b"  20%\r\ndone\n")] == [
        b"  10%",
        b"  20%",
        b"done",
    ]


def test_a_long_line_is_cut_and_says_so_and_the_next_one_is_whole() -> None:
    lines = split(*[b"x" * 1000] * 50, b"\nshort\n")
    assert lines == [
        Line(Stream.OUTPUT, b"x" * MAX_LINE_BYTES, cut=True),
        Line(Stream.OUTPUT, b"short"),
    ]
    exact = b"y" * MAX_LINE_BYTES
    assert split(exact + b"\n") == [Line(Stream.OUTPUT, exact)]


def test_an_endless_line_takes_no_more_memory_than_a_long_one() -> None:
    splitter = LineSplitter(Stream.ERRORS)
    for _ in range(1000):
        assert not list(splitter.feed(b"z" * 10_000))
    (line,) = splitter.rest()
    assert (len(line.data), line.cut, line.stream) == (MAX_LINE_BYTES, True, Stream.ERRORS)
    assert not list(splitter.rest())


@given(st.lists(st.integers(1, MAX_LINE_BYTES), max_size=3 * TAIL_LINES))
def test_a_tail_keeps_the_newest_within_both_limits(sizes: list[int]) -> None:
    tail = Tail()
    lines = [b"%d " % number + b"." * size for number, size in enumerate(sizes)]
    for data in lines:
        tail.add(Line(Stream.OUTPUT, data))
    kept = tail.lines
    assert kept == tuple(lines[len(lines) - len(kept) :])
    assert len(kept) <= TAIL_LINES
    assert sum(map(len, kept)) <= TAIL_BYTES
    if len(kept) < min(len(lines), TAIL_LINES):
        assert sum(map(len, lines[-len(kept) - 1 :])) > TAIL_BYTES


def test_who_is_left_over_is_told_from_the_start_time_of_its_starter() -> None:
    own = child._own_mark("rsync-source")
    namespace, pid, ticks, _ = own.split(":")
    assert child._left_by_the_dead(own) is None
    other_life = f"{namespace}:{pid}:{int(ticks) - 1}:rsync-source"
    assert child._left_by_the_dead(other_life) == "rsync-source"
    assert child._left_by_the_dead(f"{int(namespace) + 1}:{pid}:1:x") is None


@pytest.mark.parametrize("mark", ["", "x", "1:2:3", "a:b:c:d", "1:2:3:"])
def test_what_is_no_mark_leaves_nobody_behind(mark: str) -> None:
    assert child._left_by_the_dead(mark) is None


def test_the_start_time_is_read_past_odd_program_names() -> None:
    assert child._started_ticks(os.getpid()) is not None
    assert child._started_ticks(2**22 + 1) is None  # above the kernel's largest pid


def test_stuck_names_who_and_where() -> None:
    error = ChildStuckError("pull-x", ["12 rsync (disk-sleep, in io_schedule)"])
    assert "pull-x" in str(error)
    assert "io_schedule" in str(error)

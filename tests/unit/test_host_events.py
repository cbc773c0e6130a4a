"""The event log: bounded, rotated, read back; trouble with its disk is counted and never raised."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfsha.host import events
from nfsha.host.events import Event, EventLog, read_events

WALL = datetime(2026, 11, 21, 6, 52, 3, 456789, tzinfo=UTC)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


@pytest.fixture
def start() -> Iterator[Callable[..., EventLog]]:
    started: list[EventLog] = []

    def make(path: Path, **options: int) -> EventLog:
        log = EventLog(path, wall=lambda: WALL, **options)
        log.start()
        started.append(log)
        return log

    yield make
    for log in started:
        log.close()


def append(log: EventLog, number: int, why: str = "the peer is silent") -> Event:
    return log.append(at_ms=number, row="P100", phase="PASSIVE", to="TAKEOVER", why=why)


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_an_event_is_one_line_with_both_clocks(path: Path, start: Callable[..., EventLog]) -> None:
    log = start(path)
    log.append(at_ms=7, row="A1", phase="ACTIVE", to="ISOLATED", why="no echo", detail="612 ms")
    log.close()
    assert json.loads(path.read_text()) == {
        "wall": "2026-11-21T06:52:03.456Z",
        "at_ms": 7,
        "row": "A1",
        "phase": "ACTIVE",
        "to": "ISOLATED",
        "why": "no echo",
        "detail": "612 ms",
    }
    assert path.stat().st_mode & 0o777 == 0o600


def test_tail_knows_this_life_and_the_ones_before(
    path: Path, start: Callable[..., EventLog]
) -> None:
    first = start(path)
    earlier = [append(first, n) for n in range(3)]
    first.close()
    second = start(path)
    later = append(second, 3)
    assert second.tail(10) == [*earlier, later]
    assert second.tail(2) == [earlier[2], later]
    assert second.tail(0) == []
    second.close()
    assert read_events(path, 10) == [*earlier, later]


def test_rotation_keeps_the_newest_and_is_bounded(
    path: Path, start: Callable[..., EventLog]
) -> None:
    log = start(path, max_bytes=2000, kept=2)
    written = [append(log, n) for n in range(100)]
    log.close()
    files = sorted(entry.name for entry in path.parent.iterdir())
    assert files == ["events.jsonl", "events.jsonl.1", "events.jsonl.2"]
    assert all(entry.stat().st_size <= 2000 for entry in path.parent.iterdir())
    kept = read_events(path, 1000, kept=2)
    assert 30 < len(kept) < 60
    assert kept == written[-len(kept) :]
    assert read_events(path, 5, kept=2) == written[-5:]


def test_what_memory_holds_is_bounded(path: Path, start: Callable[..., EventLog]) -> None:
    log = start(path)
    for number in range(events.REMEMBERED + 50):
        append(log, number, why="x" * 5000)
    assert len(log.tail(10**6)) == events.REMEMBERED
    assert log.tail(1)[0].at_ms == events.REMEMBERED + 49
    assert len(log.tail(1)[0].why) == 2000


def test_a_torn_line_of_an_earlier_life_costs_only_itself(
    path: Path, start: Callable[..., EventLog]
) -> None:
    log = start(path)
    whole = append(log, 1)
    append(log, 2)
    log.close()
    path.write_bytes(path.read_bytes()[:-20])
    again = start(path)
    next_one = append(again, 3)
    again.close()
    assert read_events(path, 10) == [whole, next_one]


@given(st.lists(st.binary(max_size=60)))
def test_lines_that_are_not_events_are_skipped(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("events") / "events.jsonl"
    wrong = [b"{}", b"[1]", b'{"wall": 1}', b"[" * 9999]
    good = Event("w", 1, "r", "p", "t", "y", "d")
    odd = b'{"wall":1,"at_ms":1,"row":"","phase":"","to":"","why":"","detail":""}'
    line = json.dumps({name: getattr(good, name) for name in Event.__slots__}).encode()
    path.write_bytes(b"\n".join([*lines, *wrong, odd, line]))
    assert read_events(path, 10) == [good]


def test_no_file_is_no_event(path: Path) -> None:
    assert read_events(path, 10) == []


def test_disk_trouble_is_counted_and_what_waited_is_written_later(
    path: Path, start: Callable[..., EventLog]
) -> None:
    missing = path.parent / "unmounted" / "events.jsonl"
    log = start(missing)
    first = append(log, 1)
    second = append(log, 2)
    eventually(lambda: log.trouble.failed_writes == 2)
    assert log.trouble.last_error == f"{missing}: No such file or directory"
    assert log.trouble.lost == 0
    missing.parent.mkdir()
    third = append(log, 3)
    log.close()
    assert read_events(missing, 10) == [first, second, third]


def test_what_waits_for_the_disk_is_bounded_and_the_newest_survive(
    path: Path, start: Callable[..., EventLog]
) -> None:
    missing = path.parent / "unmounted" / "events.jsonl"
    log = start(missing)
    for number in range(1500):
        append(log, number)
        if number % 500 == 0:
            eventually(lambda n=number: log.trouble.failed_writes > n - 1)  # type: ignore[misc]
    eventually(lambda: log.trouble.failed_writes == 1500)
    missing.parent.mkdir()
    append(log, 1500)
    log.close()
    assert log.trouble.lost == 501
    assert [event.at_ms for event in read_events(missing, 2000)] == list(range(501, 1501))


def test_a_full_disk_does_not_stop_the_thread(start: Callable[..., EventLog]) -> None:
    log = start(Path("/dev/full"))
    append(log, 1)
    eventually(lambda: log.trouble.failed_writes == 1)
    assert log.trouble.last_error == "/dev/full: No space left on device"
    append(log, 2)
    eventually(lambda: log.trouble.failed_writes == 2)


def test_a_hanging_disk_blocks_nobody(
    path: Path, start: Callable[..., EventLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = threading.Event()
    real_open = os.open

    def hang(path: Path, flags: int, mode: int) -> int:
        disk.wait(30)
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", hang)
    log = start(path)
    before = time.monotonic()
    for number in range(3000):
        append(log, number)
    log.close(timeout_s=0.1)
    assert time.monotonic() - before < 5
    assert 1990 <= log.trouble.lost <= 2000
    disk.set()


def test_followers_see_what_was_and_what_comes_without_a_gap(path: Path) -> None:
    async def main() -> None:
        log = EventLog(path)
        for number in range(5):
            append(log, number)
        seen: list[int] = []

        async def reader() -> None:
            async for event in log.follow(2):
                seen.append(event.at_ms)
                if event.at_ms == 5:
                    append(log, 6)  # while this reader is busy
                    await asyncio.sleep(0.01)
                if event.at_ms == 6:
                    return

        task = asyncio.create_task(reader())
        await asyncio.sleep(0)
        append(log, 5)
        await asyncio.wait_for(task, 5)
        assert seen == [3, 4, 5, 6]

    asyncio.run(main())


def test_a_follower_that_is_too_slow_misses_the_oldest(path: Path) -> None:
    async def main() -> None:
        log = EventLog(path)
        follower = log.follow()
        first = asyncio.ensure_future(anext(follower))
        await asyncio.sleep(0)
        for number in range(300):
            append(log, number)
        assert (await first).at_ms == 44  # 300 - 256
        assert (await anext(follower)).at_ms == 45
        await follower.aclose()

    asyncio.run(main())


def test_followers_are_bounded_and_a_place_becomes_free_again(path: Path) -> None:
    async def main() -> None:
        log = EventLog(path)
        append(log, 1)
        followers = [log.follow(1) for _ in range(events.MAX_FOLLOWERS)]
        for follower in followers:
            await anext(follower)
        with pytest.raises(ValueError, match="32 readers"):
            await anext(log.follow(1))
        await followers[0].aclose()
        another = log.follow(1)
        assert (await anext(another)).at_ms == 1
        for follower in (*followers, another):
            await follower.aclose()

    asyncio.run(main())

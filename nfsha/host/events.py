"""The event log: what this node decided, when and why, on disk and for those who watch.

Append only and bounded: `events.jsonl`, one JSON object per line, rotated by size. It is a record
for people. Nothing is ever decided from it, and trouble with its disk never blocks or stops the
daemon: lines wait in a bounded queue of a thread, and what is lost is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

MAX_BYTES = 1 << 20
KEPT = 4
REMEMBERED = 1000
MAX_FOLLOWERS = 32
_MAX_WAITING = 1000
_MAX_TEXT = 2000
_FOLLOWER_BACKLOG = 256


@dataclass(frozen=True, slots=True)
class Event:
    """One decision: a row of the transition table that fired, or anything else worth a line.

    `wall` is UTC in ISO 8601 with milliseconds, `at_ms` is CLOCK_BOOTTIME. `row` is the rule's id,
    `phase` and `to` are the same where the phase stayed.
    """

    wall: str
    at_ms: int
    row: str
    phase: str
    to: str
    why: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class EventTrouble:
    """What went wrong with the disk so far: lines lost, writes that failed, and the last reason."""

    lost: int
    failed_writes: int
    last_error: str


class EventLog:
    """The event log at `path`; `append`, `tail` and `follow` belong to the event loop's thread."""

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int = MAX_BYTES,
        kept: int = KEPT,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._writer = _Writer(path, max_bytes, kept)
        self._wall = wall
        self._recent: deque[Event] = deque(maxlen=REMEMBERED)
        self._followers: list[asyncio.Queue[Event]] = []
        self._path = path
        self._kept = kept

    def start(self) -> None:
        """Reads what earlier lives left (blocks, a few MiB at most); starts the writing thread."""
        self._recent.extend(read_events(self._path, REMEMBERED, kept=self._kept))
        self._writer.start()

    def append(
        self, *, at_ms: int, row: str, phase: str, to: str, why: str, detail: str = ""
    ) -> Event:
        """Records one event and returns it. Never blocks and never raises for the disk's sake."""
        wall = self._wall().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        event = Event(wall, at_ms, row, phase, to, why[:_MAX_TEXT], detail[:_MAX_TEXT])
        self._recent.append(event)
        self._writer.put(json.dumps(asdict(event), ensure_ascii=True).encode("ascii") + b"\n")
        for follower in self._followers:
            _offer(follower, event)
        return event

    def tail(self, count: int) -> list[Event]:
        """Returns the newest events, oldest first; at most `REMEMBERED`."""
        return list(self._recent)[-count:] if count > 0 else []

    async def follow(self, count: int = 0) -> AsyncGenerator[Event, None]:
        """Yields the newest `count` events and then each one appended, without a gap between.

        A reader that falls 256 events behind misses the oldest of them.
        Raises ValueError when `MAX_FOLLOWERS` are following already.
        """
        if len(self._followers) >= MAX_FOLLOWERS:
            raise ValueError(f"{MAX_FOLLOWERS} readers follow the events already")
        backlog: asyncio.Queue[Event] = asyncio.Queue(_FOLLOWER_BACKLOG)
        self._followers.append(backlog)
        earlier = self.tail(count)
        try:
            for event in earlier:
                yield event
            while True:
                yield await backlog.get()
        finally:
            self._followers.remove(backlog)

    @property
    def trouble(self) -> EventTrouble:
        """What the disk refused so far."""
        return self._writer.trouble

    def close(self, *, timeout_s: float = 1.0) -> None:
        """Writes what waits and ends the thread; gives up after the timeout. Idempotent."""
        self._writer.close(timeout_s)


def read_events(path: Path, count: int, *, kept: int = KEPT) -> list[Event]:
    """Returns the newest `count` events on disk, oldest first; also while no daemon runs.

    Blocks. Lines that are torn or unknown are skipped, and files that cannot be read are taken as
    empty: this is a record for people.
    """
    found: deque[Event] = deque()
    for number in range(kept + 1):
        if len(found) >= count:
            break
        found.extendleft(reversed(list(_read_file(_rotated(path, number)))))
    return list(found)[-count:] if count > 0 else []


class _Writer:
    """The thread that owns the files. `put` never blocks."""

    def __init__(self, path: Path, max_bytes: int, kept: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._kept = kept
        self._incoming: queue.Queue[bytes | None] = queue.Queue(_MAX_WAITING)
        self._unwritten: deque[bytes] = deque()
        self._torn = True  # what an earlier life left may end in half a line
        self._overflowed = 0  # counted by the loop's thread
        self._dropped = 0  # counted by this one
        self._failed_writes = 0
        self._last_error = ""
        # A daemon thread: a disk that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="nfsha-events", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, line: bytes) -> None:
        try:
            self._incoming.put_nowait(line)
        except queue.Full:
            self._overflowed += 1

    def close(self, timeout_s: float) -> None:
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._incoming.put(None, timeout=timeout_s)
            self._thread.join(timeout_s)

    @property
    def trouble(self) -> EventTrouble:
        lost = self._overflowed + self._dropped
        return EventTrouble(lost, self._failed_writes, self._last_error)

    def _run(self) -> None:
        while (line := self._incoming.get()) is not None:
            self._unwritten.append(line)
            if len(self._unwritten) > _MAX_WAITING:
                self._unwritten.popleft()
                self._dropped += 1
            self._try_to_write()

    def _try_to_write(self) -> None:
        try:
            while self._unwritten:
                self._write(self._unwritten[0])
                self._unwritten.popleft()
        except OSError as error:
            self._torn = True  # perhaps half of the line is there
            self._failed_writes += 1
            self._last_error = f"{self._path}: {error.strerror}"

    def _write(self, line: bytes) -> None:
        # No fsync: it would make the journal's own fsync on the same filesystem wait.
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size == 0 or size + len(line) <= self._max_bytes:
                self._write_whole(fd, b"\n" + line if self._torn and size else line)
                return
        finally:
            os.close(fd)
        self._rotate()
        self._write(line)

    def _write_whole(self, fd: int, data: bytes) -> None:
        if os.write(fd, data) != len(data):
            raise OSError(28, "No space left on device")
        self._torn = False

    def _rotate(self) -> None:
        for number in range(self._kept - 1, -1, -1):
            with contextlib.suppress(FileNotFoundError):
                _rotated(self._path, number).replace(_rotated(self._path, number + 1))


def _rotated(path: Path, number: int) -> Path:
    return path if number == 0 else path.with_name(f"{path.name}.{number}")


def _read_file(path: Path) -> Iterator[Event]:
    try:
        with path.open("rb") as file:
            lines: Iterable[bytes] = file.read(4 * MAX_BYTES).splitlines()
    except OSError:
        return
    for line in lines:
        event = _parse(line)
        if event is not None:
            yield event


def _parse(line: bytes) -> Event | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    names = [field.name for field in fields(Event)]
    if not isinstance(value, dict) or set(value) != set(names):
        return None
    texts = [name for name in names if name != "at_ms"]
    if not all(isinstance(value[name], str) for name in texts) or type(value["at_ms"]) is not int:
        return None
    return Event(**value)


def _offer(follower: asyncio.Queue[Event], event: Event) -> None:
    if follower.full():
        follower.get_nowait()
    follower.put_nowait(event)

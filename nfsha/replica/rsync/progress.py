"""What rsync prints while it works and when it is done: its progress and its counts, as numbers.

It reads line by line and holds no more than the last few lines. It must not guess: a final count
that is missing or has another form is an error (StatsError). The forms are those of
`--info=progress2,stats2 --no-human-readable` under LC_ALL=C (rsync's progress.c and main.c, 3.2.7
to 3.5.0).
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

__all__ = ["Progress", "ProgressReader", "Stage", "Stats", "StatsError", "Tail", "parse_stats"]

_REPORT_EVERY_MS: Final = 200
_RATE_OVER_MS: Final = 5_000
_TAIL_LINES: Final = 40
_TAIL_LINE_BYTES: Final = 400


class Stage(StrEnum):
    """What a pass is doing."""

    PLAN = "plan"
    """Comparing; nothing is changed yet."""
    COPY = "copy"
    CHECK = "check"
    """Deletions, times of folders, and everything to the disk."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a pass stands. Bytes are sizes of files, not what is on the wire."""

    stage: Stage
    bytes: int = 0
    files: int = 0
    total_bytes: int | None = None
    """None while nobody knows."""
    rate_bytes_s: int = 0
    eta_s: int | None = None
    percent: int | None = None


class StatsError(ValueError):
    """rsync's final counts are missing or not of the form that this version reads."""


@dataclass(frozen=True, slots=True)
class Stats:
    """The final counts of one rsync."""

    entries: int
    """Everything in the source's list: files, folders, symbolic links and so on."""
    folders: int
    created: int
    created_folders: int
    deleted: int
    transferred: int
    """Regular files whose content was (or, in a plan, would be) sent."""
    transferred_bytes: int
    """The sizes of these."""
    total_bytes: int
    wire_bytes: int
    """Both directions."""


_COUNT = re.compile(
    rb"^Number of (files|created files|deleted files): (\d+)"
    rb"(?: \(([a-z]+: \d+(?:, [a-z]+: \d+)*)\))?$",
    re.M,
)
_PLAIN = {
    "transferred": re.compile(rb"^Number of regular files transferred: (\d+)$", re.M),
    "total_bytes": re.compile(rb"^Total file size: (\d+) bytes$", re.M),
    "transferred_bytes": re.compile(rb"^Total transferred file size: (\d+) bytes$", re.M),
    "sent": re.compile(rb"^Total bytes sent: (\d+)$", re.M),
    "received": re.compile(rb"^Total bytes received: (\d+)$", re.M),
}


def parse_stats(text: bytes) -> Stats:
    """The counts in the last lines of rsync's output. Raises StatsError."""
    counts = {found[1]: (int(found[2]), _kinds(found[3])) for found in _COUNT.finditer(text)}
    plain = {name: _plain(name, form, text) for name, form in _PLAIN.items()}
    try:
        entries, kinds = counts[b"files"]
        created, created_kinds = counts[b"created files"]
        deleted, _ = counts[b"deleted files"]
    except KeyError as error:
        raise StatsError(f"rsync's counts lack {error}") from error
    return Stats(
        entries=entries,
        folders=kinds.get(b"dir", 0),
        created=created,
        created_folders=created_kinds.get(b"dir", 0),
        deleted=deleted,
        transferred=plain["transferred"],
        transferred_bytes=plain["transferred_bytes"],
        total_bytes=plain["total_bytes"],
        wire_bytes=plain["sent"] + plain["received"],
    )


def _kinds(text: bytes | None) -> dict[bytes, int]:
    if text is None:
        return {}
    pairs = (part.split(b": ") for part in text.split(b", "))
    return {kind: int(count) for kind, count in pairs}


def _plain(name: str, form: re.Pattern[bytes], text: bytes) -> int:
    found = form.findall(text)
    if len(found) != 1:
        raise StatsError(f"rsync's counts have {len(found)} lines for {name}, expected 1")
    return int(found[0])


class Tail:
    """The last lines of an output, at most `_TAIL_LINES`; the counts are in it."""

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque(maxlen=_TAIL_LINES)

    def add(self, line: bytes) -> None:
        """Takes one line, without its end."""
        self._lines.append(line[:_TAIL_LINE_BYTES])

    def stats(self) -> Stats:
        """The counts. Raises StatsError."""
        return parse_stats(b"\n".join(self._lines))


_LINE = re.compile(
    rb"\s*(\d+) +(\d+)% +[\d.]+[kMGT]?B/s +[\d:?]+(?: +\(xfr#(\d+), (to|ir)-chk=\d+/\d+\))?\s*"
)


class ProgressReader:
    """Takes the output of a copying rsync and gives a Progress at most five times a second.

    `total_bytes` is what a plan said will be copied; without a plan rsync's own percentage is
    used, once it knows the whole list. Times are milliseconds of one clock that the caller reads.
    `done_bytes` were there before, and count.
    """

    def __init__(
        self, stage: Stage, total_bytes: int | None, now_ms: int, done_bytes: int = 0
    ) -> None:
        self.last = Progress(stage, bytes=done_bytes, total_bytes=total_bytes)
        self.rest = Tail()
        """What is no progress: the counts, and rsync's remarks."""
        self._next_ms = now_ms
        self._listed = False
        self._samples: deque[tuple[int, int]] = deque([(now_ms, done_bytes)])

    def take(self, line: bytes, now_ms: int) -> Progress | None:
        """Takes one line, without its end; gives news, or None when there is none that is due."""
        found = _LINE.fullmatch(line)
        if found is None:
            self.rest.add(line)
            return None
        if now_ms < self._next_ms:
            self._count(found)
            return None
        self._next_ms = now_ms + _REPORT_EVERY_MS
        self._note(found, now_ms)
        return self.last

    def grown(self, done: int, files: int, now_ms: int) -> Progress:
        """Takes by how much the target's filesystem has grown, where no lines tell it."""
        self._advance(done, files, None, now_ms)
        return self.last

    def _count(self, line: re.Match[bytes]) -> None:
        """Keeps the numbers alone: with many small files there are many lines."""
        files = int(line[3]) if line[3] else self.last.files
        self.last = replace(self.last, bytes=int(line[1]), files=files)

    def _note(self, line: re.Match[bytes], now_ms: int) -> None:
        done = int(line[1])
        self._listed = self._listed or line[4] == b"to"
        files = int(line[3]) if line[3] else self.last.files
        self._advance(done, files, int(line[2]), now_ms)

    def _advance(self, done: int, files: int, rsync_percent: int | None, now_ms: int) -> None:
        self._samples.append((now_ms, done))
        while len(self._samples) > 2 and self._samples[1][0] < now_ms - _RATE_OVER_MS:
            self._samples.popleft()
        total, percent = self._whole(done, rsync_percent)
        rate = self._rate()
        self.last = Progress(
            stage=self.last.stage,
            bytes=done,
            files=files,
            total_bytes=total,
            rate_bytes_s=rate,
            eta_s=-(-max(total - done, 0) // rate) if total is not None and rate else None,
            percent=percent,
        )

    def _whole(self, done: int, rsync_percent: int | None) -> tuple[int | None, int | None]:
        """The total and the percentage, where they are known."""
        total = self.last.total_bytes
        if total is not None:
            total = max(total, done)  # files grew since the plan
            return total, min(100, done * 100 // total) if total else 100
        known = self._listed and rsync_percent is not None
        return None, min(100, rsync_percent or 0) if known else None

    def _rate(self) -> int:
        (then_ms, then), (now_ms, now) = self._samples[0], self._samples[-1]
        return max(now - then, 0) * 1000 // max(now_ms - then_ms, 1)

"""The reports of planned moves of the service: small files of JSON, durable, the newest ones kept.

Each node writes its own part of a report, and the other one's when it is told. A record for people:
nothing is ever decided from it. What cannot be read is no report.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

FOLDER: Final = "handovers"
"""Below the daemon's folder for what must last."""

KEPT: Final = 50
MAX_FILES: Final = 1000
"""So many files are looked at; what nfsha wrote is at most `KEPT`."""

MAX_BYTES: Final = 512 << 10
"""Of one report: half of what one answer of the control socket carries."""

SIDES: Final = ("giver", "receiver")
_TOLD_SO: Final = ("the giver ended it", "the other node ended it")
"""So begin the reasons of one that was told by the other (nfsha.core.handover, effects)."""
_VERSION: Final = 1
_ID: Final = re.compile(r"\d{1,19}-[0-9a-f]{8}")

Report = dict[str, Any]
Sound = Callable[[str, object], bool]


class ReportError(Exception):
    """A report that is none, is too large, or cannot be written; the text says which and why."""


class ReportStore:
    """The reports in a folder, which is made when the first one comes.

    `load`, `put` and the files block: they belong into a thread, one call at a time.
    """

    def __init__(self, folder: Path, sound: Sound, *, kept: int = KEPT) -> None:
        """`sound`: whether what stands on the disk has the form of that side's part."""
        self._folder = folder
        self._sound = sound
        self._kept = kept
        self._reports: dict[str, Report] = {}

    def load(self) -> None:
        """Reads what earlier lives left."""
        self._reports = {one["id"]: one for one in read_reports(self._folder, self._sound)}

    def put(self, number: str, side: str, part: Mapping[str, Any]) -> bool:
        """Adds one side's part to the report of that id, durably. False where it was there already.

        Raises ReportError.
        """
        if _ID.fullmatch(number) is None or side not in SIDES:
            raise ReportError(f"no report is called {number[:40]!r}, or has a side {side[:40]!r}")
        before = self._reports.get(number, {})
        if before.get(side) == part:
            return False
        report = {**before, "nfsha_report": _VERSION, "id": number, side: dict(part)}
        data = json.dumps(report, sort_keys=True).encode()
        if len(data) > MAX_BYTES:
            raise ReportError(f"report {number} has {len(data)} bytes, allowed are {MAX_BYTES}")
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            _write_durably(self._folder / f"{number}.json", data)
            self._reports = {**self._reports, number: report}
            self._drop_oldest()
        except OSError as error:
            raise ReportError(
                f"report {number} is not kept: {self._folder}: {error.strerror}"
            ) from error
        return True

    def all(self) -> list[Report]:
        """The reports, oldest first."""
        return sorted(self._reports.values(), key=began_ns)

    def get(self, number: str) -> Report | None:
        """The report of this id."""
        return self._reports.get(number)

    def _drop_oldest(self) -> None:
        for one in self.all()[: -self._kept]:
            (self._folder / f"{one['id']}.json").unlink(missing_ok=True)
            self._reports = {key: kept for key, kept in self._reports.items() if key != one["id"]}


def began_ns(report: Mapping[str, Any]) -> int:
    """When the move began, by the wall clock of the receiver, or else of the giver."""
    for side in ("receiver", "giver"):
        part = report.get(side)
        moment = part.get("began_ns") if isinstance(part, Mapping) else None
        if isinstance(moment, int):
            return moment
    return 0


def as_report(stored: Report) -> Report:
    """Both parts as one report. The stall is the giver's, where it measured it."""
    receiver, giver = stored.get("receiver"), stored.get("giver")
    first = receiver or giver or {}
    stalls = [one for one in (giver, receiver) if one is not None and one["stall_ms"] is not None]
    done = any(one["done"] for one in (receiver, giver) if one is not None)
    stall_ms = stalls[0]["stall_ms"] if stalls else None
    facts = {
        "id": stored["id"],
        "to": first.get("to", ""),
        "epoch": first.get("epoch", 0),
        "began_ns": began_ns(stored),
        "done": done,
        "why": "done" if done else _why(receiver, giver),
        "took_ms": first.get("took_ms", 0),
        "stall_ms": stall_ms,
        "stall_how": stalls[0]["stall_how"] if stalls else "",
        "receiver": receiver,
        "giver": giver,
        "whole": has_both(stored),
    }
    return {**facts, "summary": _summary(facts)}


def _why(*parts: Report | None) -> str:
    """The reason of who ended it: the other one was only told that it is ended."""
    whys = [str(one["why"]) for one in parts if one is not None and not one["done"]]
    own = [why for why in whys if not why.startswith(_TOLD_SO)]
    return (own or whys or [""])[0]


def has_both(report: Report) -> bool:
    """Nothing is missing: a giver that never froze has no part."""
    receiver = report.get("receiver")
    froze = receiver is None or "FINAL_SYNC" in receiver["steps"]
    return receiver is not None and ("giver" in report or not froze)


def _summary(facts: Report) -> str:
    word = "failback to the primary" if facts["to"] == "primary" else "switchover to the standby"
    took = f"{facts['took_ms'] / 1000:.1f} s"
    held = (
        f", clients were held for {facts['stall_ms'] / 1000:.2f} s"
        if facts["stall_ms"] is not None
        else ""
    )
    if facts["done"]:
        return f"{word}: done in {took}{held}"
    return f"{word}: ended after {took}{held}: {facts['why']}"


def read_reports(folder: Path, sound: Sound) -> list[Report]:
    """The reports in a folder, oldest first; it blocks. What is none is left out."""
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(islice(folder.glob("*.json"), MAX_FILES)):
            report = _read(path, sound)
            if report is not None:
                found.append(report)
    return sorted(found, key=began_ns)


def _read(path: Path, sound: Sound) -> Report | None:
    try:
        report = json.loads(_content(path))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(report, dict) or report.get("nfsha_report") != _VERSION:
        return None
    if report.get("id") != path.stem or _ID.fullmatch(path.stem) is None:
        return None
    parts = [side for side in SIDES if side in report]
    return report if parts and all(sound(side, report[side]) for side in parts) else None


def _content(path: Path) -> bytes:
    """Of an ordinary file: a pipe in its place would hang whoever reads it, for ever. OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
            return b""
        return file.read(MAX_BYTES + 1)


def _write_durably(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

"""What the end of an rsync means: its exit code and its messages become a verdict and a sentence.

Pure: it reads bytes and says what they mean. It must not start anything, look at a disk, or decide
what happens next; that is the caller's. The codes are those of rsync(1), EXIT VALUES; the messages
are those of rsync 3.2.7 to 3.5.0 under LC_ALL=C, each seen for real in the tests.
"""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from nfsha.replica.files.beneath import shown

__all__ = ["Complaints", "Ending", "Verdict", "decode_name", "judge"]

MAX_VANISHED: Final = 10_000
MAX_LINES: Final = 20
_LINE_MAX_BYTES: Final = 16_384  # a path has at most 4,095 bytes, each escaped by five


class Verdict(StrEnum):
    """What became of a pass, in the words that the caller acts on."""

    COMPLETE = "complete"
    """The target equals what the source was; the mark may be written."""
    HELD = "held"
    """Everything is copied, but deletions wait for an operator."""
    INCOMPLETE = "incomplete"
    """Something went away while it was read: go again now."""
    RETRY = "retry"
    """The network or the other side: go again after a pause."""
    STOPPED = "stopped"
    """More deletions than were planned: alarm, no further deletion until a new plan."""
    REFUSED = "refused"
    """The source refused: another epoch, no such volume there, not its peer."""
    FAILED = "failed"
    """This side or the source cannot: disk full, read-only, damaged. Somebody has to look."""
    KILLED = "killed"
    """Ended from outside: by us at a change of epoch, or by a signal."""


@dataclass(frozen=True, slots=True)
class Ending:
    """The meaning of one rsync's end. `reason` is a clause that a sentence can go on with."""

    verdict: Verdict
    code: int
    reason: str


_ESCAPED = re.compile(rb"\\#([0-7]{3})")


def decode_name(shown: bytes) -> bytes:
    """The exact bytes of a name as rsync prints it.

    rsync writes a byte that it does not print as a backslash, `#` and three octal digits, and so
    too a backslash that could be taken for the start of that (rsync's log.c, filtered_fwrite).
    """
    if b"\\#" not in shown:
        return shown
    return _ESCAPED.sub(lambda found: bytes((int(found[1], 8) & 0xFF,)), shown)


_VANISHED = re.compile(rb'^(?:rsync: )?(?:\[\w+\] )?(?:file|directory) has vanished: "(.*)"')
_ERRNO = re.compile(rb"\((\d{1,3})\)$")
_MAKE_WAY = b"could not make way for "
_SUMMARY = (b"rsync error:", b"rsync warning:", b"Deletions stopped due to", b"*** Skipping ")
# ENOENT, ENOTDIR, ELOOP: what is opened there has been moved, or replaced by something else.
# On this side the same (but for ENOENT) comes when the source changed between two runs of a pass.
_GONE_AT_SOURCE = re.compile(
    rb"^rsync: (?:\[sender\] .*\((?:2|20|40)\)|\[generator\] .*\((?:20|40)\))$"
)


@dataclass(slots=True)
class Complaints:
    """What one rsync said on its standard error, read line by line and kept within bounds."""

    vanished: list[bytes] = field(default_factory=list)
    """Names relative to the volume's root that were there when listed and gone when read."""
    vanished_count: int = 0
    lines: list[str] = field(default_factory=list)
    """The first `MAX_LINES` messages, vanished names and rsync's own summary left out."""
    errnos: Counter[int] = field(default_factory=Counter)
    first_of: dict[int, str] = field(default_factory=dict)
    """The first message with each errno of this side."""
    blocked: int = 0
    """Places where something stands that only a deletion could move away."""
    gone: int = 0
    """Things that were asked for by name and are not at the source."""
    count: int = 0
    """All messages but vanished names and rsync's own summary."""

    def take(self, lines: Iterable[bytes]) -> None:
        """Reads further lines, with or without their ends."""
        for line in lines:
            self._line(line.rstrip(b"\r\n")[:_LINE_MAX_BYTES])

    def _line(self, line: bytes) -> None:
        if not line:
            return
        if found := _VANISHED.match(line):
            self.vanished_count += 1
            if len(self.vanished) < MAX_VANISHED:
                self.vanished.append(decode_name(found[1]).lstrip(b"/"))
            return
        if line.startswith(_SUMMARY):
            return
        self.count += 1
        text = shown(line)
        if len(self.lines) < MAX_LINES:
            self.lines.append(text)
        if line.startswith(_MAKE_WAY):
            self.blocked += 1
        if _GONE_AT_SOURCE.match(line):
            self.gone += 1
        elif found := _ERRNO.search(line):
            number = int(found[1])
            self.errnos[number] += 1
            if b"[sender]" not in line:
                self.first_of.setdefault(number, text)

    def says(self, *words: str) -> bool:
        """Whether one of these stands in what was said."""
        return any(word in line for line in self.lines for word in words)

    @property
    def first(self) -> str:
        """The first message, or a word for none."""
        return self.lines[0] if self.lines else "rsync gave no reason"

    @property
    def full(self) -> str:
        """The first message that this side's filesystem had no room, or a quota stopped it."""
        return self.first_of.get(errno.ENOSPC) or self.first_of.get(errno.EDQUOT) or ""

    @property
    def only_changed(self) -> bool:
        """Nothing was wrong but what left the source, or became something else there."""
        return 0 < self.blocked + self.gone == self.count


_SIGNALLED: Final = frozenset({19, 20})
_KNOWN: Final = {
    1: (Verdict.FAILED, "rsync did not understand its options (another version?)"),
    2: (Verdict.FAILED, "the two rsyncs speak no common protocol"),
    3: (Verdict.FAILED, "a folder cannot be entered"),
    4: (Verdict.FAILED, "an option is not supported by one of the two rsyncs"),
    6: (Verdict.FAILED, "the source's rsync cannot write its log"),
    10: (Verdict.RETRY, "the connection to the source failed"),
    11: (Verdict.FAILED, "a file cannot be read or written"),
    12: (Verdict.RETRY, "the stream from the source broke off"),
    13: (Verdict.FAILED, "rsync met a state that it does not know"),
    14: (Verdict.RETRY, "rsync's own processes lost each other"),
    21: (Verdict.RETRY, "rsync lost one of its own processes"),
    22: (Verdict.FAILED, "rsync had not enough memory"),
    25: (Verdict.STOPPED, "more would have been deleted than was planned"),
    30: (Verdict.RETRY, "nothing came from the source within the time allowed"),
    35: (Verdict.RETRY, "the source did not answer the connection in time"),
}


def judge(code: int, complaints: Complaints) -> Ending:
    """Says what an exit code means together with what was said.

    `code` is that of the process: 0 to 255, or the negative number of a signal.
    """
    if code == 0:
        return Ending(Verdict.COMPLETE, code, "complete")
    if code < 0 or code > 128 or code in _SIGNALLED:
        return Ending(Verdict.KILLED, code, f"rsync was ended from outside ({_signal(code)})")
    if (mine := _of_this_side(code, complaints)) is not None:
        return mine
    if code == 24:
        return Ending(Verdict.INCOMPLETE, code, _vanished(complaints))
    if code == 23:
        return _partial(complaints)
    if code in (5, 10):
        return _no_session(code, complaints)
    verdict, words = _KNOWN.get(code, (Verdict.FAILED, f"rsync ended with the code {code}"))
    said = "" if code in (25, 30) else f": {complaints.first}"
    return Ending(verdict, code, words + said)


def _of_this_side(code: int, complaints: Complaints) -> Ending | None:
    """A full, read-only or failing target; the code then may be 11, 12 or 23."""
    for number, words in (
        (errno.ENOSPC, "the volume on this node is full"),
        (errno.EDQUOT, "a quota on this node's volume is used up"),
        (errno.EROFS, "the volume on this node is read-only"),
        (errno.EIO, "this node's disk gave an I/O error"),
    ):
        if number in complaints.first_of:
            return Ending(Verdict.FAILED, code, f"{words}: {complaints.first_of[number]}")
    return None


def _partial(complaints: Complaints) -> Ending:
    if complaints.only_changed:
        words = f"{_number(complaints.count, 'thing')} at the source changed during the pass"
        return Ending(Verdict.INCOMPLETE, 23, f"{words}, the first: {complaints.first}")
    words = f"{_number(complaints.count, 'thing')} could not be copied, the first"
    return Ending(Verdict.FAILED, 23, f"{words}: {complaints.first}")


_NOT_FRESH: Final = "nothing fresh to send"
"""The source's daemon did not bring its lists up to date in time (`fresh`): it may next time."""

_REFUSALS: Final = (
    ("auth failed", "it does not accept this node's key and epoch"),
    ("Unknown module", "it does not have this volume"),
    ("access denied", "it does not accept this node's address"),
    ("chroot failed", "the volume's folder is missing there"),
    ("chdir failed", "the volume's folder is missing there"),
    ("pre-xfer exec", "its own check of the volume failed"),
    ("early exec", "its own check of the volume failed"),
)


def _no_session(code: int, complaints: Complaints) -> Ending:
    """The source answered, but gave no session; or (10) nobody answered."""
    if complaints.says("max connections"):
        return Ending(Verdict.RETRY, code, "the source serves as many copies as it may already")
    stale = next((line for line in complaints.lines if _NOT_FRESH in line), "")
    if stale:
        return Ending(Verdict.RETRY, code, stale)
    for said, words in _REFUSALS:
        if complaints.says(said):
            return Ending(Verdict.REFUSED, code, f"the source refused: {words}")
    if code == 10:
        return Ending(Verdict.RETRY, code, f"{_KNOWN[10][1]}: {complaints.first}")
    return Ending(Verdict.REFUSED, code, f"the source refused: {complaints.first}")


def _vanished(complaints: Complaints) -> str:
    count = _number(complaints.vanished_count, "file")
    first = f", the first {shown(complaints.vanished[0])}" if complaints.vanished else ""
    return f"{count} vanished at the source during the pass{first}"


def _signal(code: int) -> str:
    number = -code if code < 0 else code - 128 if code > 128 else 0
    return f"signal {number}" if number else os.strerror(errno.EINTR)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"

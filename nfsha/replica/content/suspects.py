"""What a verify asks the source about files that look equal and are not, and what follows from it.

rsync does not carry ctime, and only ctime tells whether a file was written after it was copied: a
client may set size and mtime back, but not ctime. So the node that verifies asks the source for the
facts of a bounded number of files (`SuspectQuestion`, `answer`), takes the same facts of its own
copies, and judges (`classify`). It must not start a process, and must not change a file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final, Protocol, Self

from nfsha.replica.content import file_names
from nfsha.replica.files import beneath
from nfsha.replica.files.own_names import STAMP_NAME
from nfsha.replica.volume.facts import cut

MAX_SUSPECTS: Final = 1000
MAX_NAMES_BYTES: Final = 512 << 10
MAX_HASHED_FILE_BYTES: Final = 64 << 20
MAX_HASHED_BYTES: Final = 1 << 30
GONE: Final = "gone"
_MAX_PROBLEM: Final = 200
_CHUNK: Final = 1 << 20
_NUMBERS: Final = ("size", "mtime_ns", "ctime_ns", "nlink", "told_ns", "epoch_since_ns")

_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
# O_NONBLOCK so that a pipe in the place of a file cannot stop us, O_NOATIME so that looking leaves
# no trace. Both as root, or as the owner of the files.
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOATIME
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

Document = dict[str, Any]


class SuspectError(ValueError):
    """What came from the other node is no question, or no answer to ours; the text says why."""


class PassTimes(Protocol):
    """When the last complete pass ran (a `Mark`): begun by the source's clock, and how long."""

    @property
    def started_ns(self) -> int:
        """Everything written before, by the source's wall clock, was looked at by that pass."""

    @property
    def duration_ms(self) -> int:
        """How long it ran."""


@dataclass(frozen=True, slots=True)
class SuspectQuestion:
    """The names, relative to the root of the volume `uuid`, whose facts the source shall tell."""

    uuid: str
    names: tuple[bytes, ...]

    def __post_init__(self) -> None:
        """Refuses (SuspectError) what no node may ask: too much, or names that lead elsewhere."""
        if not _UUID.fullmatch(self.uuid):
            raise SuspectError(f"{cut(self.uuid)} is no volume's UUID")
        if len(self.names) > MAX_SUSPECTS or sum(map(len, self.names)) > MAX_NAMES_BYTES:
            raise SuspectError(
                f"more than {MAX_SUSPECTS} names, or {MAX_NAMES_BYTES} bytes of them"
            )
        for name in self.names:
            try:
                file_names.require_data(name)
            except ValueError as error:
                raise SuspectError(str(error)) from error

    def to_json(self) -> Document:
        """What JSON can carry."""
        return {"uuid": self.uuid, "names": [file_names.to_text(name) for name in self.names]}

    @classmethod
    def from_json(cls, document: object) -> Self:
        """Reads what `to_json` made. SuspectError for anything else."""
        fields = _fields(document, {"uuid", "names"})
        uuid, names = fields["uuid"], fields["names"]
        if not isinstance(uuid, str) or not isinstance(names, list) or len(names) > MAX_SUSPECTS:
            raise SuspectError("the uuid is no text, or the names are no list of a bounded length")
        return cls(uuid, tuple(_name_of(name) for name in names))


@dataclass(frozen=True, slots=True)
class SuspectAnswer:
    """What a node sees of one file.

    Where `problem` is not empty ("gone", or why it could not be read), the numbers of the file may
    be 0. The checksum is None for a file that is too large, that changed while it was read, or
    could not be. `told_ns` is the node's wall clock when it told, `epoch_since_ns` when its volume
    got the stamp of the present epoch (0: it bears none), by the same clock.
    """

    name: bytes
    size: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    nlink: int = 0
    sha256: str | None = None
    problem: str = ""
    told_ns: int = 0
    epoch_since_ns: int = 0

    def to_json(self) -> Document:
        """What JSON can carry."""
        return {
            "name": file_names.to_text(self.name), "size": self.size, "mtime_ns": self.mtime_ns,
            "ctime_ns": self.ctime_ns, "nlink": self.nlink, "sha256": self.sha256,
            "problem": self.problem, "told_ns": self.told_ns,
            "epoch_since_ns": self.epoch_since_ns,
        }  # fmt: skip

    @classmethod
    def from_json(cls, document: object) -> Self:
        """Reads what `to_json` made. SuspectError for anything else."""
        fields = _fields(document, {*_NUMBERS, "name", "sha256", "problem"})
        for key in _NUMBERS:
            if type(fields[key]) is not int or not -(1 << 63) <= fields[key] < 1 << 63:
                raise SuspectError(f"{key} is {cut(fields[key])}, expected a whole number")
        sha256, problem = fields["sha256"], fields["problem"]
        if sha256 is not None and not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
            raise SuspectError("sha256 is neither null nor 64 hex digits")
        if not isinstance(problem, str) or len(problem) > _MAX_PROBLEM:
            raise SuspectError("the problem is no short text")
        return cls(**{**fields, "name": _name_of(fields["name"])})


class Kind(StrEnum):
    """What a difference under an equal size and mtime is."""

    MISSED = "missed"
    """The source's file was changed after it was copied, with size and mtime set back."""
    DAMAGED = "damaged"
    """The source's file was not changed since it was copied: one of both rotted or was altered."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One file whose content differs though size and mtime agree, and what speaks for its kind.

    `repair`: False where the source itself cannot be read, so that the copy is what is left.
    """

    name: bytes
    kind: Kind
    evidence: str
    repair: bool = True


@dataclass(frozen=True, slots=True)
class Judgement:
    """The findings, and the suspects that are none: (name, why)."""

    findings: tuple[Finding, ...]
    dropped: tuple[tuple[bytes, str], ...]


def answer(
    root_fd: int,
    question: SuspectQuestion,
    *,
    max_file_bytes: int = MAX_HASHED_FILE_BYTES,
    max_total_bytes: int = MAX_HASHED_BYTES,
    clock_ns: Callable[[], int] = time.time_ns,
) -> tuple[SuspectAnswer, ...]:
    """The facts of the files asked for, in their order; no symbolic link is followed.

    Blocks: reads at most `max_total_bytes`, and no file above `max_file_bytes`. Call it in a
    thread. The root of the volume is open as `root_fd`.
    """
    answers = []
    left = max_total_bytes
    since_ns = _epoch_since_ns(root_fd)
    for name in question.names:
        told, read = _facts(root_fd, name, min(max_file_bytes, left))
        left -= read
        answers.append(replace(told, told_ns=clock_ns(), epoch_since_ns=since_ns))
    return tuple(answers)


def answers_to_json(answers: Sequence[SuspectAnswer]) -> list[Document]:
    """What JSON can carry."""
    return [one.to_json() for one in answers]


def answers_from_json(document: object, question: SuspectQuestion) -> tuple[SuspectAnswer, ...]:
    """Reads the answer to this question. SuspectError if it is not one, name by name."""
    if not isinstance(document, list) or len(document) != len(question.names):
        raise SuspectError("not a list with one answer for each name")
    answers = tuple(SuspectAnswer.from_json(one) for one in document)
    if tuple(one.name for one in answers) != question.names:
        raise SuspectError("the answers are not about the names that were asked for")
    return answers


def classify(
    suspects: Sequence[bytes],
    answers: Sequence[SuspectAnswer],
    mark: PassTimes | None,
    local: Sequence[SuspectAnswer],
    *,
    source_ahead_ns: int = 0,
) -> Judgement:
    """Judges the suspects by the source's answers and the `local` facts of the copies.

    `mark` is the last complete pass before the verify began. Its time and the source's ctimes are
    by the source's clock, the copies' ctimes by ours; `source_ahead_ns` is how far the source's
    clock is ahead (an error of it matters only for files changed within that time around the copy).

    For files that neither side wrote since the source's epoch began, the order of the two ctimes
    says nothing: before, the copying went the other way.

    A ctime moves also without a change of content (a chmod to the same mode, a hard link): a
    missed change says that the file was touched after it was copied, and may hide a damage.
    """
    theirs = {one.name: one for one in answers}
    ours = {one.name: one for one in local}
    findings: list[Finding] = []
    dropped: list[tuple[bytes, str]] = []
    for name in suspects:
        source, copy = theirs.get(name), ours.get(name)
        if source is None or copy is None:
            why = "nothing was told about it"
        else:
            why = _no_finding(source, copy)
        if why:
            dropped.append((name, why))
        elif source is not None and copy is not None:
            findings.append(_judge(source, copy, mark, source_ahead_ns))
    return Judgement(tuple(findings), tuple(dropped))


def source_ahead_ns(answers: Sequence[SuspectAnswer], asked_ns: int, heard_ns: int) -> int:
    """How far the source's wall clock is at least ahead of ours (below 0: behind), in ns.

    The source told its time between `asked_ns` and `heard_ns` by our wall clock. While its time
    lies there too, both clocks are taken as equal, which is truer than any guess from the way.
    """
    told = [one.told_ns for one in answers if one.told_ns]
    if not told:
        return 0
    return max(0, min(told) - heard_ns) + min(0, max(told) - asked_ns)


def _no_finding(source: SuspectAnswer, copy: SuspectAnswer) -> str:
    if source.problem == GONE:
        return "gone from the source"
    if copy.problem == GONE:
        return "gone from the copy"
    if source.problem or copy.problem:
        return ""
    if (source.size, source.mtime_ns) != (copy.size, copy.mtime_ns):
        return "changed meanwhile: the next pass copies it"
    if source.sha256 is not None and source.sha256 == copy.sha256:
        return "equal by now"
    return ""


def _judge(
    source: SuspectAnswer, copy: SuspectAnswer, mark: PassTimes | None, source_ahead_ns: int
) -> Finding:
    if source.problem:
        return Finding(
            source.name, Kind.DAMAGED,
            f"the source cannot read its file ({source.problem}); the copy is left as it is",
            repair=False,
        )  # fmt: skip
    if copy.problem:
        return Finding(source.name, Kind.DAMAGED, f"the copy cannot be read ({copy.problem})")
    changed_ns, copied_ns = source.ctime_ns, copy.ctime_ns + source_ahead_ns
    times = f"source changed {_when(changed_ns)}, copy written {_when(copied_ns)}"
    if mark is not None and changed_ns > mark.started_ns:
        words = f"changed after the last complete pass began ({_when(mark.started_ns)})"
        return Finding(source.name, Kind.MISSED, f"{words}, size and mtime as before: {times}")
    if mark is not None and copied_ns > mark.started_ns + mark.duration_ms * 1_000_000:
        words = "the copy was written on this node after the last complete pass, the source was not"
        return Finding(source.name, Kind.DAMAGED, f"{words}: {times}")
    if max(changed_ns, copied_ns) < source.epoch_since_ns:
        words = f"neither was written since {_when(source.epoch_since_ns)}, when this epoch began"
        return Finding(source.name, Kind.DAMAGED, f"{words}: {times}")
    if changed_ns > copied_ns:
        words = "changed after it was copied, size and mtime as before"
        return Finding(source.name, Kind.MISSED, f"{words}: {times}")
    words = "not changed since it was copied, so the copy, or the source, was damaged"
    return Finding(source.name, Kind.DAMAGED, f"{words}: {times}")


def _epoch_since_ns(root_fd: int) -> int:
    """When the volume got its stamp: the authority stamps it once, when its epoch begins."""
    try:
        return os.stat(STAMP_NAME, dir_fd=root_fd, follow_symlinks=False).st_ctime_ns
    except OSError:
        return 0


def _facts(root_fd: int, name: bytes, max_bytes: int) -> tuple[SuspectAnswer, int]:
    """The facts of one file, and how many bytes were read for them."""
    try:
        with beneath.parent_of(root_fd, name) as (folder, last):
            fd = os.open(last, _READ, dir_fd=folder)
    except (FileNotFoundError, NotADirectoryError):
        return SuspectAnswer(name, problem=GONE), 0
    except OSError as error:
        gone = error.errno in (errno.ELOOP, errno.ENXIO, errno.EXDEV)  # a link, a device, a mount
        return SuspectAnswer(name, problem=GONE if gone else _words(error)), 0
    try:
        return _facts_of(fd, name, max_bytes)
    finally:
        os.close(fd)


def _facts_of(fd: int, name: bytes, max_bytes: int) -> tuple[SuspectAnswer, int]:
    before = os.fstat(fd)
    if not stat.S_ISREG(before.st_mode):
        return SuspectAnswer(name, problem=GONE), 0
    sha256, read, problem = None, 0, ""
    if before.st_size <= max_bytes:
        try:
            sha256, read = _checksum(fd, before.st_size)
        except OSError as error:
            problem = _words(error)
    after = os.fstat(fd)
    if (before.st_ctime_ns, before.st_size) != (after.st_ctime_ns, after.st_size):
        sha256 = None
    told = SuspectAnswer(
        name, after.st_size, after.st_mtime_ns, after.st_ctime_ns, after.st_nlink, sha256, problem
    )
    return told, read


def _checksum(fd: int, size: int) -> tuple[str, int]:
    digest = hashlib.sha256()
    read = 0
    while read < size and (data := os.read(fd, min(_CHUNK, size - read))):
        digest.update(data)
        read += len(data)
    return digest.hexdigest(), read


def _fields(document: object, keys: set[str]) -> Document:
    if not isinstance(document, dict) or set(document) != keys:
        raise SuspectError(f"not an object with exactly these fields: {', '.join(sorted(keys))}")
    return document


def _name_of(text: object) -> bytes:
    try:
        return file_names.from_text(text)
    except ValueError as error:
        raise SuspectError(str(error)) from error


def _when(moment_ns: int) -> str:
    moment = _EPOCH + timedelta(microseconds=moment_ns // 1000)
    return moment.strftime("%Y-%m-%d %H:%M:%S.") + f"{moment.microsecond // 1000:03d} UTC"


def _words(error: OSError) -> str:
    return (error.strerror or str(error))[:_MAX_PROBLEM]

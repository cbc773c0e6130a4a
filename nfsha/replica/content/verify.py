"""The verify pass: finds files of equal size and mtime but other content, and repairs the copy.

It reads the whole volume on both sides by rsync's checksums, in slices of a bounded number of files
and bytes, one rsync each: so a limit of the reading rate holds (rsync's --bwlimit limits what is
sent, and checksums are next to nothing), ordinary passes take turns, memory stays small, and no
connection is silent for longer than one slice takes to read.

What differs at the first look may merely have changed since: an ordinary pass follows, and a second
look at only these files. What differs then is judged by the facts of both sides (`suspects`), its
old copy goes to quarantine, and exactly these files are transferred anew. It must not delete, and
must not touch any other file. It does not decide when to run, nor speak with the other node: its
`Helpers` do.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeVar

from nfsha.core.model import Epoch
from nfsha.replica.content.content_files import content_files
from nfsha.replica.content.suspects import (
    MAX_NAMES_BYTES,
    MAX_SUSPECTS,
    Finding,
    Judgement,
    Kind,
    PassTimes,
    SuspectAnswer,
    SuspectQuestion,
    answer,
    classify,
    source_ahead_ns,
)
from nfsha.replica.files import beneath
from nfsha.replica.files.beneath import shown
from nfsha.replica.files.own_names import INCOMING
from nfsha.replica.quarantine.quarantine import Entry, Quarantine, QuarantineError
from nfsha.replica.rsync.arguments import Course, From, folder_list
from nfsha.replica.rsync.child import (
    GRACE_S,
    Child,
    ChildError,
    ChildStuckError,
    Line,
    Priority,
    Stream,
)
from nfsha.replica.rsync.exits import Complaints, Ending, Verdict, decode_name, judge
from nfsha.replica.rsync.progress import Progress, Stage

_T = TypeVar("_T")
SLICE_FILES: Final = 2000
SLICE_BYTES: Final = 256 << 20
MAX_TROUBLES: Final = 20
END_WITHIN_S: Final = 5.0
_MIN_SLICE_BYTES: Final = 1 << 20
_SLICE_S: Final = 10  # at a limited rate, a slice reads about as long as this
_SLOWEST_BYTES_S: Final = 5_000_000  # a disk that reads a large file slower than this is broken
_LOOK: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# A regular file whose content differs (c), size and mtime not (`man rsync`, --itemize-changes).
_DIFFERS: Final = re.compile(rb">fc\.\..{6} (.+)", re.S)


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """What to verify: the volume `uuid`, whose root here is open and checked as `root_fd`.

    `read_kib_s` limits the reading on each side, as an average; None: no limit. `timeout_s` is for
    a silent source; the time to read a slice comes on top. `expected_bytes` (of the last mark) is
    for the progress only.
    """

    uuid: str
    root_fd: int
    source: From
    read_kib_s: int | None = None
    timeout_s: int = 60
    connect_timeout_s: int = 10
    expected_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """Some regular files of the copy, and their bytes."""

    names: tuple[bytes, ...]
    size: int


@dataclass(frozen=True, slots=True)
class Look:
    """What one look over files found: `suspects` differ in content only.

    `more`: it stopped at the limit of suspects. `troubles` are files and slices that could not be
    compared, in words; the look went on.
    """

    verdict: Verdict
    sentence: str
    suspects: tuple[bytes, ...]
    more: bool
    files: int
    read_bytes: int
    troubles: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Helpers:
    """What a verify needs of its caller.

    `turn` is entered around each rsync (never two on one volume); `fresh_pass` runs an ordinary
    pass and says whether it was complete; `ask` carries the question to the source, None when no
    answer came. `mark` is the last complete pass before the verify.
    """

    turn: Callable[[], AbstractAsyncContextManager[object]]
    fresh_pass: Callable[[], Awaitable[bool]]
    ask: Callable[[SuspectQuestion], Awaitable[tuple[SuspectAnswer, ...] | None]]
    quarantine: Quarantine
    epoch: Epoch
    mark: PassTimes | None


@dataclass(frozen=True, slots=True)
class VerifyOutcome:
    """What a verify found and did.

    COMPLETE: every file was compared, and every finding that may be repaired is repaired and was
    compared again. `read_bytes` is what this side read in looks; the source read as much.
    """

    verdict: Verdict
    sentence: str
    files: int
    read_bytes: int
    seconds: float
    findings: tuple[Finding, ...] = ()
    dropped: tuple[tuple[bytes, str], ...] = ()
    repaired: tuple[bytes, ...] = ()
    entry: str | None = None
    """The quarantine entry that holds the old copies."""
    more: bool = False
    """There were more suspects than one verify takes: run it again."""
    troubles: tuple[str, ...] = ()

    @property
    def all_equal(self) -> bool:
        """Each file was compared, and is equal by now."""
        whole = self.verdict is Verdict.COMPLETE and not self.more
        return whole and not self.unrepaired

    @property
    def missed(self) -> int:
        """How many files of the source were changed unseen."""
        return sum(one.kind is Kind.MISSED for one in self.findings)

    @property
    def damaged(self) -> int:
        """How many files are damaged on one of both sides."""
        return sum(one.kind is Kind.DAMAGED for one in self.findings)

    @property
    def unrepaired(self) -> tuple[bytes, ...]:
        """Findings that still differ."""
        equal = set(self.repaired)
        return tuple(one.name for one in self.findings if one.name not in equal)


@dataclass(slots=True)
class _Tally:
    """What was compared so far."""

    files: int = 0
    read_bytes: int = 0
    suspects: list[bytes] = field(default_factory=list)
    suspect_bytes: int = 0
    troubles: list[str] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return len(self.suspects) >= MAX_SUSPECTS or self.suspect_bytes >= MAX_NAMES_BYTES // 2

    def add(self, names: Iterable[bytes]) -> None:
        for name in names:
            if not self.full:
                self.suspects.append(name)
                self.suspect_bytes += len(name)

    def trouble(self, words: str) -> None:
        if len(self.troubles) < MAX_TROUBLES:
            self.troubles.append(words)

    def look(self, ending: Ending) -> Look:
        return Look(
            ending.verdict, ending.reason, tuple(self.suspects), self.full, self.files,
            self.read_bytes, tuple(self.troubles),
        )  # fmt: skip


_GOES_ON: Final = frozenset({Verdict.COMPLETE, Verdict.INCOMPLETE})
_ENDED: Final = Ending(Verdict.KILLED, 0, "the verify was ended")


class Verify:
    """One verify of one volume.

    `scratch` is a folder of nfsha's own for short-lived files, `clock_ms` any clock that does not
    step back, `clock_ns` the wall clock.

    `run` does it all; `look`, `look_at` and `repair` are its steps. `end` ends it at any time: when
    it returns, no child is left and nothing is written any more.
    """

    def __init__(
        self,
        request: VerifyRequest,
        scratch: Path,
        clock_ms: Callable[[], int],
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._request = request
        self._scratch = scratch
        self._clock_ms = clock_ms
        self._clock_ns = clock_ns
        self._child: Child | None = None
        self._stop = asyncio.Event()
        self._starting = asyncio.Lock()
        self._own_writes = asyncio.Lock()

    async def run(
        self,
        helpers: Helpers,
        progress: Callable[[Progress], None],
        *,
        names: Sequence[bytes] | None = None,
        repair: bool = True,
    ) -> VerifyOutcome:
        """Verifies the whole volume, or only the files of these names.

        With `repair`, what differs is made equal to the source.
        """
        began_ms = self._clock_ms()
        if names is None:
            first = await self.look(helpers.turn, progress)
        else:
            first = await self.look_at(names, helpers.turn, progress)
        outcome = await self._after(first, helpers, repair=repair)
        return _with_seconds(outcome, (self._clock_ms() - began_ms) / 1000)

    async def look(
        self,
        turn: Callable[[], AbstractAsyncContextManager[object]],
        progress: Callable[[Progress], None],
    ) -> Look:
        """Compares all regular files of the copy with the source's, by checksum."""
        tally = _Tally()
        slices = _slices(self._request.root_fd, self._slice_bytes, tally.trouble)
        try:
            return await self._look(slices, tally, turn, progress)
        finally:
            await asyncio.to_thread(slices.close)

    async def look_at(
        self,
        names: Sequence[bytes],
        turn: Callable[[], AbstractAsyncContextManager[object]],
        progress: Callable[[Progress], None] = lambda _: None,
    ) -> Look:
        """Compares only these files."""
        tally = _Tally()
        sizes = await asyncio.to_thread(_sizes, self._request.root_fd, names)
        slices = _in_slices(zip(names, sizes, strict=True), self._slice_bytes)
        return await self._look(slices, tally, turn, progress)

    async def repair(
        self,
        entry: Entry,
        quarantine: Quarantine,
        turn: Callable[[], AbstractAsyncContextManager[object]],
        names: Sequence[bytes],
    ) -> Ending:
        """Puts the old copies into the entry, then transfers exactly these files by checksum.

        The old copies stay in their places until rsync replaces each by rename, so that no moment
        is without a file. Names that could not be put aside are not transferred.
        """
        kept = await self._writes(lambda: quarantine.keep(entry, names, in_place=True))
        if kept is None or self._stop.is_set():
            return _ENDED
        if not kept.names:
            why = kept.refused[0].why if kept.refused else "none was named"
            return Ending(Verdict.FAILED, 0, f"no old copy could be put aside: {why}")
        size = sum(await asyncio.to_thread(_sizes, self._request.root_fd, kept.names))
        async with turn():
            await self._writes(lambda: _make_incoming(self._request.root_fd))
            with _listed(self._scratch, kept.names) as listed:
                course = self._course(listed, self._timeout_s(size))
                copying = course.copy(make_way=0, bandwidth_kib_s=self._request.read_kib_s)
                ending, _ = await self._rsync(copying, size)
            await self._writes(lambda: _settle(self._request.root_fd))
        return ending

    async def end(self, within_s: float = END_WITHIN_S, *, at_once: bool = False) -> None:
        """Ends it, wherever it stands; `at_once` as in `Pull.end`. Idempotent.

        Raises ChildStuckError when a process, or a thread of this one, hangs in the disk.
        """
        self._stop.set()
        try:
            async with self._starting:  # so that no child is between its start and its name here
                child = self._child
            if child is not None:
                await child.end(within_s, grace_s=0.0 if at_once else GRACE_S)
            async with asyncio.timeout(within_s), self._own_writes:
                return
        except TimeoutError as error:
            stuck = "a thread of this process, at work on the quarantine"
            raise ChildStuckError(self._name, [stuck]) from error

    @property
    def _slice_bytes(self) -> int:
        if self._request.read_kib_s is None:
            return SLICE_BYTES
        return max(_MIN_SLICE_BYTES, min(SLICE_BYTES, self._request.read_kib_s * 1024 * _SLICE_S))

    async def _after(self, first: Look, helpers: Helpers, *, repair: bool) -> VerifyOutcome:
        """The way from a first look to the outcome."""
        if first.verdict not in _GOES_ON or not first.suspects:
            return _outcome(first, first.verdict, first.sentence)
        if not await helpers.fresh_pass():
            words = "the ordinary pass before the second look was not complete"
            return _outcome(first, Verdict.RETRY, words)
        second = await self.look_at(first.suspects, helpers.turn)
        if second.verdict not in _GOES_ON:
            return _outcome(first, second.verdict, second.sentence)
        suspects = second.suspects
        question = SuspectQuestion(self._request.uuid, suspects)
        asked_ns = self._clock_ns()
        theirs = await helpers.ask(question) if suspects else ()
        heard_ns = self._clock_ns()
        if theirs is None or tuple(one.name for one in theirs) != suspects:
            return _outcome(first, Verdict.RETRY, "the source told nothing about the suspects")
        ours = await asyncio.to_thread(answer, self._request.root_fd, question)
        judgement = await asyncio.to_thread(
            classify, suspects, theirs, helpers.mark, ours,
            source_ahead_ns=source_ahead_ns(theirs, asked_ns, heard_ns),
        )  # fmt: skip
        changed = set(first.suspects) - set(suspects)
        merely = tuple((name, "equal after the next pass") for name in sorted(changed))
        judgement = Judgement(judgement.findings, merely + judgement.dropped)
        return await self._act(first, judgement, helpers, repair=repair)

    async def _act(
        self, first: Look, judgement: Judgement, helpers: Helpers, *, repair: bool
    ) -> VerifyOutcome:
        names = [one.name for one in judgement.findings if one.repair]
        if not names or not repair:
            words = "compared" if not judgement.findings else "found, and nothing was repaired"
            return _outcome(first, first.verdict, words, judgement)
        try:
            repaired, kept_in, ending = await self._repair_all(names, judgement, helpers)
        except (QuarantineError, OSError) as error:
            return _outcome(first, Verdict.FAILED, f"cannot repair: {error}", judgement)
        verdict = first.verdict if len(repaired) == len(names) else ending.verdict
        if verdict is Verdict.COMPLETE and len(repaired) < len(names):
            verdict = Verdict.FAILED
        words = f"{len(repaired)} of {len(names)} repaired ({ending.reason})"
        return _outcome(first, verdict, words, judgement, repaired=repaired, entry=kept_in)

    async def _repair_all(
        self, names: Sequence[bytes], judgement: Judgement, helpers: Helpers
    ) -> tuple[tuple[bytes, ...], str | None, Ending]:
        """The names that are equal after the repair, the entry's name, and how rsync ended."""
        began = await self._writes(lambda: helpers.quarantine.begin(
            "verify", why=_why(judgement.findings), epoch=helpers.epoch, operation="verify",
            by="nfsha",
        ))  # fmt: skip
        if began is None:
            return (), None, _ENDED
        ending = await self.repair(began, helpers.quarantine, helpers.turn, names)
        done = await self._writes(lambda: helpers.quarantine.finish(began))
        kept_in = done.name if done else began.name if self._stop.is_set() else None
        if ending.verdict not in _GOES_ON:
            return (), kept_in, ending
        again = await self.look_at(names, helpers.turn)
        if again.verdict not in _GOES_ON:
            return (), kept_in, Ending(again.verdict, 0, again.sentence)
        differ = set(again.suspects)
        equal = tuple(name for name in names if name not in differ)
        return equal, kept_in, ending

    async def _look(
        self,
        slices: Iterator[Slice],
        tally: _Tally,
        turn: Callable[[], AbstractAsyncContextManager[object]],
        progress: Callable[[Progress], None],
    ) -> Look:
        worst = Ending(Verdict.COMPLETE, 0, "compared")
        while not tally.full and (part := await asyncio.to_thread(next, slices, None)) is not None:
            began_ms = self._clock_ms()
            async with turn():
                ending, found = await self._compare(part)
            tally.add(found)
            if ending.code == 23:  # some files could not be read, the others were compared
                tally.trouble(ending.reason)
                worst = Ending(Verdict.INCOMPLETE, 23, ending.reason)
            elif ending.verdict not in _GOES_ON:
                return tally.look(ending)
            tally.files += len(part.names)
            tally.read_bytes += part.size
            progress(self._progress(tally, part, self._clock_ms() - began_ms))
            await self._keep_rate(part.size, began_ms)
        if worst.verdict is Verdict.COMPLETE and tally.troubles:  # a folder that cannot be read
            worst = Ending(Verdict.INCOMPLETE, 0, tally.troubles[0])
        return tally.look(_ENDED if self._stop.is_set() else worst)

    async def _compare(self, part: Slice) -> tuple[Ending, list[bytes]]:
        await asyncio.to_thread(_forget_cached, self._request.root_fd, part.names)
        with _listed(self._scratch, part.names) as listed:
            argv = self._comparing(listed, self._timeout_s(part.size))
            return await self._rsync(argv, part.size)

    async def _rsync(self, argv: Sequence[str], size: int) -> tuple[Ending, list[bytes]]:
        """Runs one rsync to its end: how it ended, and the names that it says differ."""
        found: list[bytes] = []
        complaints = Complaints()

        def take(line: Line) -> None:
            if line.stream is Stream.ERRORS:
                complaints.take([line.data])
            elif (differs := _DIFFERS.fullmatch(line.data)) and not line.cut:
                found.append(decode_name(differs[1]))

        async with self._starting:
            if self._stop.is_set():
                return _ENDED, []
            try:
                child = self._child = await Child.start(
                    argv, name=self._name, priority=Priority.LOW, on_line=take,
                    env={"RSYNC_PASSWORD": self._request.source.token.password},
                    pass_fds=(self._request.root_fd,),
                )  # fmt: skip
            except ChildError as error:
                return Ending(Verdict.FAILED, 0, str(error)), []
        ending = await self._await(child, complaints, 2 * self._timeout_s(size))
        return (_ENDED if self._stop.is_set() else ending), found

    async def _await(self, child: Child, complaints: Complaints, limit_s: int) -> Ending:
        try:
            async with asyncio.timeout(limit_s):
                return judge(await child.wait(), complaints)
        except TimeoutError:
            return Ending(Verdict.RETRY, 0, f"one slice took longer than {limit_s} s")
        finally:
            await child.end(END_WITHIN_S)  # also when the caller is cancelled

    def _comparing(self, listed: str, timeout_s: int) -> list[str]:
        """Names what differs and changes nothing. Without -H: each name is read for itself."""
        source = self._request.source
        bind = () if source.bind is None else (f"--address={source.bind}",)
        return [
            "rsync", "-n", "-c", "-lt", "-d", "--modify-window=-1", "--out-format=%i %n",
            "--from0", f"--files-from={listed}", "--ignore-missing-args", "--trust-sender",
            "--no-motd", f"--timeout={timeout_s}",
            f"--contimeout={self._request.connect_timeout_s}", *bind,
            source.url(f"v-{self._request.uuid}"), self._target,
        ]  # fmt: skip

    def _course(self, listed: str, timeout_s: int) -> Course:
        return Course(
            source=self._request.source, module=f"v-{self._request.uuid}", target=self._target,
            timeout_s=timeout_s, connect_timeout_s=self._request.connect_timeout_s,
            list_path=listed, backup=None, checksum=True,
        )  # fmt: skip

    @property
    def _name(self) -> str:
        return f"verify-{self._request.uuid}"

    @property
    def _target(self) -> str:
        return f"/proc/self/fd/{self._request.root_fd}/"

    def _timeout_s(self, size: int) -> int:
        return self._request.timeout_s + size // _SLOWEST_BYTES_S

    async def _writes(self, act: Callable[[], _T]) -> _T | None:
        """Runs what writes in a thread; `end` waits for it, and nothing begins after `end`."""
        async with self._own_writes:
            if self._stop.is_set():
                return None
            thread = asyncio.ensure_future(asyncio.to_thread(act))
            try:
                return await asyncio.shield(thread)
            except asyncio.CancelledError:
                await asyncio.wait({thread})  # a thread cannot be cancelled
                raise

    async def _keep_rate(self, size: int, began_ms: int) -> None:
        if self._request.read_kib_s is None:
            return
        due_s = size / (self._request.read_kib_s * 1024)
        rest_s = due_s - (self._clock_ms() - began_ms) / 1000
        if rest_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rest_s):
                    await self._stop.wait()

    def _progress(self, tally: _Tally, part: Slice, took_ms: int) -> Progress:
        rate = part.size * 1000 // max(1, took_ms)
        if self._request.read_kib_s is not None:
            rate = min(rate, self._request.read_kib_s * 1024)
        total = self._request.expected_bytes
        if total is None:
            return Progress(Stage.CHECK, tally.read_bytes, tally.files, rate_bytes_s=rate)
        total = max(total, tally.read_bytes)
        return Progress(
            Stage.CHECK, tally.read_bytes, tally.files, total, rate,
            eta_s=(total - tally.read_bytes) // rate if rate else None,
            percent=tally.read_bytes * 100 // total if total else 100,
        )  # fmt: skip


@contextlib.contextmanager
def _listed(scratch: Path, names: Iterable[bytes]) -> Iterator[str]:
    """The path of a list of the names for rsync's --files-from with --from0.

    A named file: rsync 3.5 opens the list step by step and does not follow what has no name.
    """
    with tempfile.NamedTemporaryFile(dir=scratch, prefix="verify-") as file:
        file.write(folder_list((), names))
        file.flush()
        yield file.name


def _outcome(
    first: Look,
    verdict: Verdict,
    sentence: str,
    judgement: Judgement | None = None,
    *,
    repaired: tuple[bytes, ...] = (),
    entry: str | None = None,
) -> VerifyOutcome:
    judgement = judgement or Judgement((), ())
    return VerifyOutcome(
        verdict, sentence, first.files, first.read_bytes, 0.0, judgement.findings,
        judgement.dropped, repaired, entry, first.more, first.troubles,
    )  # fmt: skip


def _with_seconds(outcome: VerifyOutcome, seconds: float) -> VerifyOutcome:
    return replace(outcome, seconds=seconds)


def _why(findings: Sequence[Finding]) -> str:
    missed = sum(one.kind is Kind.MISSED for one in findings)
    first = findings[0]
    return (
        f"the verify found {missed} missed changes and {len(findings) - missed} damaged files;"
        f" the first, {shown(first.name)}: {first.evidence}"
    )


def _slices(
    root_fd: int, max_bytes: int, trouble: Callable[[str], None]
) -> Generator[Slice, None, None]:
    """All regular files of the volume that have content, in slices."""

    def unread(folder: bytes, error: OSError | ValueError) -> None:
        if isinstance(error, OSError):
            trouble(f"{shown(folder) or 'the root'}: {error.strerror}")
        else:  # deeper than a path may be: no pass brought it here
            trouble(f"{shown(folder)[:200]}...: {error}")

    files = ((name, found.st_size) for name, found in content_files(root_fd, unread))
    yield from _in_slices(files, max_bytes)


def _in_slices(files: Iterable[tuple[bytes, int]], max_bytes: int) -> Iterator[Slice]:
    names: list[bytes] = []
    total = 0
    for name, size in files:
        names.append(name)
        total += size
        if len(names) >= SLICE_FILES or total >= max_bytes:
            yield Slice(tuple(names), total)
            names, total = [], 0
    if names:
        yield Slice(tuple(names), total)


def _sizes(root_fd: int, names: Iterable[bytes]) -> list[int]:
    """The sizes of regular files; 0 for what is none, or cannot be seen."""
    sizes = []
    for name in names:
        size = 0
        with contextlib.suppress(OSError):
            found = beneath.look_at(root_fd, name)
            if found is not None and stat.S_ISREG(found.st_mode):
                size = found.st_size
        sizes.append(size)
    return sizes


def _forget_cached(root_fd: int, names: Iterable[bytes]) -> None:
    """Lets the kernel drop what it has of these files in memory, so that the disk is read.

    Only of the copy, which nobody else reads; the source's clients need its memory.
    """
    for name in names:
        with contextlib.suppress(OSError), beneath.parent_of(root_fd, name) as (folder, last):
            fd = os.open(last, _LOOK, dir_fd=folder)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def _make_incoming(root_fd: int) -> None:
    """Where files are received, invisible to clients, until each takes its place."""
    with beneath.same_times(root_fd):
        _remove_incoming(root_fd)
        os.close(beneath.make_private(root_fd, INCOMING))


def _remove_incoming(root_fd: int) -> None:
    """What a transfer that was cut has left goes too."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(INCOMING, dir_fd=root_fd)


def _settle(root_fd: int) -> None:
    """Makes durable what was transferred."""
    with beneath.same_times(root_fd):
        _remove_incoming(root_fd)
    beneath.sync_filesystem(root_fd)

"""Supervised child processes: started at ordinary or low priority, and proved gone at the end.

It runs one program for its caller, keeps the newest lines that it printed, and ends it together
with everything that it started. It must not know what the program is for, read its output's
meaning, or restart it.

Each program has a PID namespace of its own (pid_namespaces(7)), whose first process is a shell that
waits for it. When that first process ends, however it ends, the kernel kills whatever is left in
the namespace, other sessions and groups too, and only then reports the end. Two parent-death
signals (prctl(2), PR_SET_PDEATHSIG) tie the namespace to this process, so that a daemon killed by
SIGKILL takes its children along:

    this process -> wrapper (setpriv, sh, then unshare) -> first process (sh) -> the program

The first two compare their parent after their signal is armed, for a parent that died before that.
What still slips through is found by `end_leftovers` at the next start.

Programs of util-linux and a POSIX shell are used, because Python between fork and exec is not safe
in a process with threads. From the call to the running program 3 to 5 ms were measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import Path
from typing import Final, Self, TypeVar

import psutil

START_WITHIN_S: Final = 5.0
"""The wrapper is killed when the program does not run by then: a matter of milliseconds."""

GRACE_S: Final = 0.5
"""Default time between SIGTERM and SIGKILL."""

MAX_LINE_BYTES: Final = 20 * 1024
"""A longer line is cut: 4,096 bytes of path, each in five characters of octal, are below it."""

TAIL_LINES: Final = 200
TAIL_BYTES: Final = 64 * 1024
"""The newest lines of each stream are kept up to both limits."""

_CHUNK_BYTES: Final = 8 * 1024  # per turn of the loop: below 1 ms even for lines of ten bytes
_REPORT_BYTES: Final = 64
_WRAPPER_SAYS: Final = b"unshare: "  # it complains when what it waited for was killed
_DRAIN_WITHIN_S: Final = 5.0  # what the pipes still hold when everybody is dead
_POLL_S: Final = 0.02
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MARK: Final = "NFSHA_CHILD"
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_LINE_END: Final = re.compile(rb"[\r\n]")
_OOM_SCORE_ADJ: Final = 250  # proc(5): the daemon itself asks for -900, the NFS server has 0

_looker: Final = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nfsha-children")
_T = TypeVar("_T")

# $1 is the pid that must still be the parent: a parent that died before the signal was armed has
# been replaced by another. 125 is what env(1) and nohup(1) exit with when they fail themselves.
_OUTER: Final = """\
[ "$PPID" = "$1" ] || exit 125
inner=$2
shift 2
exec unshare --pid --fork --kill-child=KILL -- /bin/sh -c "$inner" nfsha-child "$$" "$@"
"""
# Process 1 of the namespace. Standard input is a pipe to the daemon: the pids of this shell and of
# the program go up at the start (as the outer /proc has them, which is where `Pid` and `PPid` come
# from), and at the end the exit code, as sh gives it. No second line: this shell was killed. What
# runs in the background has another standard input, hence the path.
_INNER: Final = f"""\
read_pids() {{
    while read -r key value; do
        case $key in
            Pid:) pid=$value ;;
            PPid:) parent=$value; break ;;
        esac
    done </proc/self/status
}}
read_pids
[ "$parent" = "$1" ] || exit 125
shift
first=$pid
ulimit -c 0
echo {_OOM_SCORE_ADJ} >/proc/self/oom_score_adj
( read_pids; echo "$first $pid" >"/proc/$first/fd/0"; exec "$@" </dev/null ) &
exec >/dev/null 2>&1
wait "$!"
echo "$?" >&0
"""


class Priority(Enum):
    """How a program competes with the NFS server for the processor and the disks.

    Both are SCHED_OTHER, whatever this process runs at. LOW is nice 10 and the last level of the
    best-effort I/O class (ioprio_set(2)); not the idle class, in which a busy disk starves it.
    """

    NORMAL = ("chrt", "--other", "0")
    LOW = ("chrt", "--other", "0", "ionice", "-c", "2", "-n", "7", "nice", "-n", "10")


class Stream(StrEnum):
    """Where a line was printed."""

    OUTPUT = "output"
    ERRORS = "errors"


@dataclass(frozen=True, slots=True)
class Line:
    """One line as printed, without the newline or carriage return that ended it; never empty.

    `cut`: it was longer than `MAX_LINE_BYTES`.
    """

    stream: Stream
    data: bytes
    cut: bool = False


class ChildError(Exception):
    """A program could not be started; the text says which and why, for an operator."""


class ChildStuckError(Exception):
    """Processes of a child are still there although they were killed.

    Such a process waits inside the kernel (D state), normally for a disk: it may still write.
    """

    def __init__(self, name: str, processes: Sequence[str]) -> None:
        """Takes the child's name and a few words on each process that is left."""
        super().__init__(f"{name}: killed, but not gone: {'; '.join(processes) or 'unknown'}")
        self.name = name
        self.processes = tuple(processes)


class LineSplitter:
    """Cuts a stream of bytes into lines, holding at most `MAX_LINE_BYTES` of an unfinished one."""

    def __init__(self, stream: Stream) -> None:
        """Takes the stream that the lines are said to come from."""
        self._stream = stream
        self._begun = bytearray()
        self._cut = False

    def feed(self, data: bytes) -> Iterator[Line]:
        """Yields each line that the data completes."""
        *ends, rest = _LINE_END.split(data)
        for piece in ends:
            self._add(piece)
            yield from self.rest()
        self._add(rest)

    def rest(self) -> Iterator[Line]:
        """Yields what there is of an unfinished line, as a line."""
        if self._begun:
            yield Line(self._stream, bytes(self._begun), self._cut)
            self._begun.clear()
        self._cut = False

    def _add(self, piece: bytes) -> None:
        room = MAX_LINE_BYTES - len(self._begun)
        self._begun += piece[:room]
        self._cut |= len(piece) > room


class Tail:
    """The newest lines of a stream, up to `TAIL_LINES` and `TAIL_BYTES`."""

    def __init__(self) -> None:
        """Starts empty."""
        self._lines: deque[bytes] = deque()
        self._bytes = 0

    def add(self, line: Line) -> None:
        """Takes a line, and forgets the oldest ones above the limits."""
        self._lines.append(line.data)
        self._bytes += len(line.data)
        while len(self._lines) > TAIL_LINES or self._bytes > TAIL_BYTES:
            self._bytes -= len(self._lines.popleft())

    @property
    def lines(self) -> tuple[bytes, ...]:
        """The lines, the oldest first."""
        return tuple(self._lines)


@dataclass(frozen=True, slots=True)
class _Place:
    """A namespace: its program, and a handle on its first process."""

    pid: int
    first_fd: int | None  # None: it had ended, and was reaped, before it could be held
    namespace: int | None


class Child:
    """One running program. Make it by `start`; whoever made it must `wait` for it or `end` it."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, report: int) -> None:
        """Not to be called: use `start`."""
        self.name = name
        self._process = process
        self._report = report
        self._said = b""
        self._place: _Place | None = None
        self._tails = {stream: Tail() for stream in Stream}
        self._ended: asyncio.Task[int] | None = None

    @classmethod
    async def start(
        cls,
        argv: Sequence[str | bytes],
        *,
        name: str,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        priority: Priority = Priority.LOW,
        on_line: Callable[[Line], None] | None = None,
    ) -> Self:
        """Starts a program and returns when it runs.

        Its environment is PATH, LC_ALL=C and `env`; its standard input is empty; its folder is /.
        `name` (lower case, digits, dots, dashes) is for messages and for `end_leftovers`.
        `on_line` gets each line at once, on the loop; it must be quick, and an exception of its
        comes out of `wait`. Secrets belong into `env`, never into `argv`.

        Call it in a thread that lives as long as the child: the parent-death signal follows the
        thread, not the process (prctl(2)). Raises ChildError.
        """
        if _NAME.fullmatch(name) is None:
            raise ValueError(f"the name of a child is {name!r}")
        program = os.fsdecode(argv[0])
        if shutil.which(program, path=_PATH) is None:
            raise ChildError(f"{name}: there is no program {program}, or it may not be run")
        report, wrapper_end = os.pipe()
        try:
            process = await _spawn(argv, name, env or {}, tuple(pass_fds), priority, wrapper_end)
        except OSError as error:
            os.close(report)
            raise ChildError(f"{name}: cannot be started: {error.strerror}") from error
        finally:
            os.close(wrapper_end)
        child = cls(name, process, report)
        try:
            await child._await_program()
        finally:
            child._ended = asyncio.create_task(child._run(on_line or _ignore))
            if child._place is None:
                child._kill()
        if child._place is None:
            await child._gone_by(time.monotonic() + START_WITHIN_S)
            words = b"; ".join(child.errors).decode(errors="replace") or "no reason was given"
            raise ChildError(f"{name}: cannot be started: {words}")
        return child

    @property
    def pid(self) -> int:
        """The program's own pid, as seen from here (not the wrapper's)."""
        return self._where.pid

    @property
    def alive(self) -> bool:
        """True until the program and all that it started are gone and their output is read."""
        return not self._end.done()

    @property
    def output(self) -> tuple[bytes, ...]:
        """The newest lines of standard output, the oldest first."""
        return self._tails[Stream.OUTPUT].lines

    @property
    def errors(self) -> tuple[bytes, ...]:
        """The newest lines of standard error, the oldest first."""
        return self._tails[Stream.ERRORS].lines

    async def wait(self) -> int:
        """Returns the program's exit code, -N if signal N ended it. Any number of callers."""
        return await asyncio.shield(self._end)

    async def end(self, within_s: float, *, grace_s: float = GRACE_S) -> None:
        """Ends the program and all that it started; returns when all of them are proved gone.

        SIGTERM to its process group, after `grace_s` (at most half of `within_s`) SIGKILL to the
        namespace. Idempotent; may be repeated after ChildStuckError, which it raises when a process
        is still there after `within_s`.
        """
        deadline_s = time.monotonic() + within_s
        self._terminate()
        if not await self._gone_by(time.monotonic() + min(grace_s, within_s / 2)):
            self._kill()
            if not await self._gone_by(deadline_s):
                raise ChildStuckError(self.name, await _aside(self._survivors))
        left = await _aside(self._survivors)
        if left:
            raise ChildStuckError(self.name, left)

    def pids(self) -> tuple[int, ...]:
        """All processes of the tree that live: the wrapper and those of the namespace.

        Blocks for some milliseconds (it looks at each process of the machine): call it in a thread.
        """
        return tuple(process.pid for process in self._living())

    # ------------------------------------------------------------- starting

    async def _await_program(self) -> None:
        """Learns the program's pid; none comes when the wrapper failed or hangs."""
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._report, readable.set)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(START_WITHIN_S):
                    await readable.wait()
        finally:
            loop.remove_reader(self._report)
        if readable.is_set():
            self._said = os.read(self._report, _REPORT_BYTES)
            pids = self._said.partition(b"\n")[0].split()
            if len(pids) == 2:
                self._place = _hold(int(pids[0]), int(pids[1]))

    def _exit_code(self) -> int:
        """What the first process reported at the end; it did not if it was killed."""
        os.set_blocking(self._report, False)
        with contextlib.suppress(BlockingIOError):  # a writer of the namespace still ends
            self._said += os.read(self._report, _REPORT_BYTES)
        os.close(self._report)
        _, _, code = self._said.rstrip(b"\n").partition(b"\n")
        if not code:
            return -signal.SIGKILL
        # XCU 2.8.2: a shell gives a command that signal N ended a number above 128; 128 + N in all.
        return int(code) if int(code) <= 128 else 128 - int(code)

    async def _run(self, on_line: Callable[[Line], None]) -> int:
        """Reads the output to its end, then gives the exit code."""
        output, errors = self._process.stdout, self._process.stderr
        if output is None or errors is None:
            raise RuntimeError("started without pipes")
        readers = (
            asyncio.create_task(self._read(output, Stream.OUTPUT, on_line)),
            asyncio.create_task(self._read(errors, Stream.ERRORS, on_line)),
        )
        await self._process.wait()
        code = self._exit_code()
        read, late = await asyncio.wait(readers, timeout=_DRAIN_WITHIN_S)
        for reader in late:
            reader.cancel()
        failures = [failure for reader in read if (failure := reader.exception()) is not None]
        if failures:
            raise failures[0]
        return code

    async def _read(
        self, source: asyncio.StreamReader, stream: Stream, on_line: Callable[[Line], None]
    ) -> None:
        splitter, tail, data = LineSplitter(stream), self._tails[stream], b"-"
        try:
            while data:
                data = await source.read(_CHUNK_BYTES)
                for line in splitter.feed(data) if data else splitter.rest():
                    if self._place is None or not line.data.startswith(_WRAPPER_SAYS):
                        tail.add(line)
                        on_line(line)
                await asyncio.sleep(0)  # `read` does not give the loop back while it has something
        finally:
            if data:  # `on_line` failed: nobody would empty the pipe
                self._kill()
                while await source.read(_CHUNK_BYTES):
                    pass

    # ------------------------------------------------------------- ending

    @property
    def _where(self) -> _Place:
        if self._place is None:
            raise RuntimeError("not started")
        return self._place

    @property
    def _end(self) -> asyncio.Task[int]:
        if self._ended is None:
            raise RuntimeError("not started")
        return self._ended

    def _terminate(self) -> None:
        # The wrapper leads the group and is not reaped while it has no exit code, so the number is
        # still its own. It blocks SIGTERM itself (unshare(1) with --fork).
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)

    def _kill(self) -> None:
        """Kills the namespace; the wrapper then ends by itself, after the last of its processes."""
        if self._place is not None:
            if self._place.first_fd is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._place.first_fd, signal.SIGKILL)
        elif self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _gone_by(self, deadline_s: float) -> bool:
        """Waits for the wrapper's end and the kernel's word that the namespace is empty."""
        await asyncio.wait({self._end}, timeout=max(0.0, deadline_s - time.monotonic()))
        if not self._end.done():
            return False
        # Normally the wrapper outlives the namespace; not so if somebody killed the wrapper.
        while not self._namespace_ended():
            if time.monotonic() >= deadline_s:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    def _namespace_ended(self) -> bool:
        """True once the first process is gone, which is after all others (pid_namespaces(7))."""
        if self._place is None or self._place.first_fd is None:
            return True
        poller = select.poll()
        poller.register(self._place.first_fd, select.POLLIN)
        return bool(poller.poll(0))

    def _living(self) -> Iterator[psutil.Process]:
        namespace = self._place.namespace if self._place is not None else None
        wrapper = self._process.pid if self._process.returncode is None else None
        for pid in psutil.pids():
            inside = namespace is not None and _pid_namespace(pid) == namespace
            if inside or pid == wrapper:
                yield from _living(pid)

    def _survivors(self) -> list[str]:
        return [_words(process) for process in self._living()]

    def __del__(self) -> None:
        """Closes the handle on the namespace's first process."""
        if self._place is not None and self._place.first_fd is not None:
            os.close(self._place.first_fd)


async def end_leftovers(within_s: float = 5.0) -> tuple[str, ...]:
    """Kills what daemons that no longer live left behind; returns the names of those children.

    A child names its starter in its environment (PID namespace, pid, start time). It is left over
    when no such process lives. Children of daemons that live, and processes of other PID
    namespaces and users, are not touched. Raises ChildStuckError when one is still there after
    `within_s`.
    """
    return await _aside(lambda: _end_leftovers(within_s))


def _end_leftovers(within_s: float) -> tuple[str, ...]:
    deadline_s = time.monotonic() + within_s
    names: set[str] = set()
    while left := list(_leftovers()):
        if time.monotonic() >= deadline_s:
            raise ChildStuckError("left by an earlier daemon", [_words(each) for _, each in left])
        for name, process in left:
            names.add(name)
            _kill_marked(process.pid, name)
        time.sleep(_POLL_S)
    return tuple(sorted(names))


def _kill_marked(pid: int, name: str) -> None:
    """Kills a process if, now that its number cannot change hands, it still bears the mark."""
    with contextlib.suppress(ProcessLookupError):
        pid_fd = os.pidfd_open(pid)
        try:
            if _left_by_the_dead(_mark_of(pid)) == name:
                signal.pidfd_send_signal(pid_fd, signal.SIGKILL)
        finally:
            os.close(pid_fd)


def _leftovers() -> Iterator[tuple[str, psutil.Process]]:
    for pid in psutil.pids():
        name = _left_by_the_dead(_mark_of(pid))
        if name is not None:
            yield from ((name, process) for process in _living(pid))


def _mark_of(pid: int) -> str:
    """The mark of a process of our own user; empty if it has none or is none of ours."""
    folder = Path(f"/proc/{pid}")
    with contextlib.suppress(OSError):
        if folder.stat().st_uid == os.geteuid():
            for entry in (folder / "environ").read_bytes().split(b"\0"):
                if entry.startswith(f"{_MARK}=".encode()):
                    return os.fsdecode(entry).removeprefix(f"{_MARK}=")
    return ""


def _left_by_the_dead(mark: str) -> str | None:
    """The child's name, if its starter was of our PID namespace and no longer lives."""
    fields = re.fullmatch(r"(\d+):(\d+):(\d+):(.+)", mark)
    if fields is None or int(fields[1]) != _pid_namespace(os.getpid()):
        return None
    return None if _started_ticks(int(fields[2])) == int(fields[3]) else fields[4]


def _own_mark(name: str) -> str:
    pid = os.getpid()
    return f"{_pid_namespace(pid)}:{pid}:{_started_ticks(pid)}:{name}"


def _started_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (proc_pid_stat(5), field 22)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[19])


def _pid_namespace(pid: int) -> int | None:
    try:
        return Path(f"/proc/{pid}/ns/pid").stat().st_ino
    except OSError:
        return None


def _living(pid: int) -> Iterator[psutil.Process]:
    """The process, unless it is dead and only waits for its parent to notice."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            yield process


def _words(process: psutil.Process) -> str:
    # Not psutil's name: it may read the command line, which waits for a process that hangs.
    folder = Path(f"/proc/{process.pid}")
    try:
        name = (folder / "comm").read_text(encoding="ascii", errors="replace").strip()
        waits = (folder / "wchan").read_text(encoding="ascii", errors="replace")
        return f"{process.pid} {name} ({process.status()}, in {waits or 'user space'})"
    except (OSError, psutil.Error):
        return f"{process.pid} (ending)"


async def _aside(look: Callable[[], _T]) -> _T:
    """Looks at processes in a thread kept for it: the common ones may all hang on a disk."""
    return await asyncio.get_running_loop().run_in_executor(_looker, look)


def _hold(first: int, program: int) -> _Place:
    """Takes a handle on the first process, so that its number cannot be taken for another's."""
    try:
        return _Place(program, os.pidfd_open(first), _pid_namespace(first))
    except ProcessLookupError:
        return _Place(program, None, None)


async def _spawn(
    argv: Sequence[str | bytes],
    name: str,
    env: Mapping[str, str],
    pass_fds: tuple[int, ...],
    priority: Priority,
    report: int,
) -> asyncio.subprocess.Process:
    wrapper = ("setpriv", "--pdeathsig", "KILL", "--", "/bin/sh", "-c", _OUTER, "nfsha-child")
    return await asyncio.create_subprocess_exec(
        *wrapper,
        str(os.getpid()),
        _INNER,
        *priority.value,
        *argv,
        stdin=report,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": _PATH, "LC_ALL": "C", **env, _MARK: _own_mark(name)},
        cwd="/",
        pass_fds=pass_fds,
        start_new_session=True,
    )


def _ignore(_: Line) -> None:
    """For a child whose lines nobody wants one by one."""

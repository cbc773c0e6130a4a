"""Runs the operator's mount and unmount hooks: one at a time, bounded, and gone before the next.

A hook is any program. It must not know or decide when it is due, nor look at what it did: whoever
orders it does both.

It runs as a session of its own (setsid(2)), at ordinary priority, with nothing of this process but
the environment that is given, a closed standard input, and a pipe for what it prints. One that is
replaced by a newer order, or runs for too long, is ended with everything of its session: SIGTERM,
then SIGKILL, then a look at /proc. What it started in a session of its own (the daemon of a FUSE
filesystem, a service of the init system) lives on: that is what a hook is for.

The session is found again by a mark in the environment, after this process too was killed: see
`end_leftovers`.

A daemon that systemd runs is fenced in: its mounts are its own, few powers, few system calls. So
there the hook is not its child, but a transient unit (systemd-run(1)), in which it is what any
program of the host is. Systemd ends it with all of its control group, and runs one of that name
only.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import stat
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MARK: Final = "NFSHA_HOOK_SESSION"
"""The variable that bears the session's id in the environment of a hook and all that it starts."""

STARTER: Final = "NFSHA_HOOK_STARTER"
"""The variable that names who started it: PID namespace, pid, start time. Another daemon that lives
runs its own hooks (in a namespace, say); they are left alone."""

GRACE_S: Final = 2.0
"""Time between SIGTERM and SIGKILL."""

GONE_WITHIN_S: Final = 5.0
"""A killed process that is still there then waits inside the kernel, normally for a disk."""

TAIL_LINES: Final = 5
MAX_LINE: Final = 200
"""So much of what a hook prints last goes to the log and the events."""

UNIT: Final = "nfsha-hook.service"
"""The transient unit in which a hook runs under systemd."""

_STOP_UNIT_S: Final = GRACE_S + GONE_WITHIN_S
_TAIL_BYTES: Final = 4096
_POLL_S: Final = 0.02
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH

# The real-time class is not inherited (SCHED_RESET_ON_FORK). The score is: whatever a hook leaves
# behind has no claim to outlive the NFS server (proc(5)).
_START: Final = (
    "/bin/sh",
    "-c",
    f'umask 022; echo 0 2>/dev/null >/proc/self/oom_score_adj; export {MARK}=$$; exec "$0"',
)


class HookError(Exception):
    """A hook cannot be used as it is configured: one sentence with the remedy."""


@dataclass(frozen=True, slots=True)
class HookEnd:
    """How a run ended. `ok`: with exit status 0; else `words` say what happened."""

    ok: bool
    words: str


def fault(path: Path) -> str:
    """What keeps a file from being a hook, with the remedy; "" when nothing does."""
    try:
        found = path.stat()
        folder = path.parent.stat()
    except OSError as error:
        return f"{path}: {error.strerror}; make it, or correct the configuration"
    if not stat.S_ISREG(found.st_mode):
        return f"{path} is not a regular file"
    if not os.access(path, os.X_OK):
        return f"{path} may not be executed: chmod 755 {path}"
    if found.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to somebody else, who could change it: chown root {path}"
    if found.st_mode & _OTHERS_WRITE:
        return f"{path} may be written by others: chmod go-w {path}"
    if folder.st_mode & _OTHERS_WRITE:
        return f"{path} may be replaced by others: chmod go-w {path.parent}"
    return ""


def under_systemd() -> bool:
    """Is this process part of a unit of systemd (systemd.exec(5), INVOCATION_ID)?"""
    return "INVOCATION_ID" in os.environ and Path("/run/systemd/system").is_dir()


def require(*paths: Path) -> None:
    """Raises HookError for the first of these files that is no hook."""
    for path in paths:
        if trouble := fault(path):
            raise HookError(f"the hook {trouble}")


class Hooks:
    """Runs hooks, one at a time. A newer order ends the older one first."""

    def __init__(self, timeout_ms: int) -> None:
        """Takes how long one may run."""
        self._timeout_s = timeout_ms / 1000
        self._turn = asyncio.Lock()
        self._newest = 0
        self._run: _Run | None = None

    async def run(self, path: Path, environment: Mapping[str, str]) -> HookEnd:
        """Runs a hook to its end, or to that of its time, or until a newer order replaces it.

        Returns only when nothing of its session is left, or says so. Never raises for a hook.
        """
        self._newest += 1
        number = self._newest
        self._cut_short()
        async with self._turn:
            if number != self._newest:
                return HookEnd(False, f"{path}: not run, a newer order came first")
            self._run = _Run(path, environment, self._timeout_s)
            try:
                return await asyncio.to_thread(self._run.to_the_end)
            finally:
                self._run.close()
                self._run = None

    async def end(self) -> None:
        """Ends the hook that runs, and waits for it."""
        self._newest += 1
        self._cut_short()
        async with self._turn:
            pass

    def _cut_short(self) -> None:
        if self._run is not None:
            self._run.cut_short()


class _Run:
    """One run, in a thread of its own."""

    def __init__(self, path: Path, environment: Mapping[str, str], timeout_s: float) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._argv = [*_START, str(path)]
        self._environment = {"PATH": _PATH, "LC_ALL": "C", STARTER: _name_of(os.getpid())}
        if under_systemd():
            self._argv = _transient_unit(path, environment, timeout_s)
        else:
            self._environment |= environment
        self._stop, self._stopper = os.pipe()

    def cut_short(self) -> None:
        """Asks for the end; from another thread."""
        os.write(self._stopper, b".")

    def close(self) -> None:
        os.close(self._stop)
        os.close(self._stopper)

    def to_the_end(self) -> HookEnd:
        """Starts the program and returns when it is gone."""
        if trouble := fault(self._path) or end_leftovers():
            return HookEnd(False, trouble)
        try:
            # The pipe is read to the program's end, not to its own: what stays behind may hold it.
            process = subprocess.Popen(  # noqa: S603 - the operator's own program
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._environment,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            return HookEnd(False, f"{self._path} cannot be started: {error.strerror}")
        with process:
            return self._supervise(process)

    def _supervise(self, process: subprocess.Popen[bytes]) -> HookEnd:
        tail = _Tail(process.stdout.fileno() if process.stdout is not None else -1)
        ended = _await_end(process.pid, self._stop, tail, time.monotonic() + self._timeout_s)
        if ended == "ended":
            status = process.wait()
            tail.read()
            if status == 0:
                return HookEnd(True, "")
            return HookEnd(False, f"{self._path}: {_status_words(status)}{tail.words()}")
        stuck = _end_unit() or _end_session(process.pid, reap=process.poll)
        tail.read()
        if stuck:
            return HookEnd(False, f"{self._path}: killed, but not gone: {stuck}")
        if ended == "stopped":
            return HookEnd(False, f"{self._path}: ended, a newer order came")
        return HookEnd(
            False, f"{self._path}: no end within {self._timeout_s:g} s, killed{tail.words()}"
        )


class _Tail:
    """The end of what a program prints."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._data = b""
        os.set_blocking(fd, False)

    def read(self) -> bool:
        """Takes what is there; False when nothing more can come."""
        while True:
            try:
                piece = os.read(self.fd, _TAIL_BYTES)
            except BlockingIOError:
                return True
            self._data = (self._data + piece)[-_TAIL_BYTES:]
            if not piece:
                return False

    def words(self) -> str:
        """The last lines, to be appended to a sentence."""
        lines = self._data.decode(errors="replace").splitlines()
        clean = ("".join(c if c.isprintable() else "?" for c in line).strip() for line in lines)
        last = deque((line[:MAX_LINE] for line in clean if line), maxlen=TAIL_LINES)
        return ": " + " | ".join(last) if last else ", and it said nothing"


def _await_end(pid: int, stop: int, tail: _Tail, until_s: float) -> str:
    """Reads until the program ends: "ended", "stopped" (by `stop`), or "late"."""
    poll = select.poll()
    pidfd = os.pidfd_open(pid)
    try:
        for fd in (pidfd, stop, tail.fd):
            poll.register(fd, select.POLLIN)
        while (left_s := until_s - time.monotonic()) > 0:
            ready = {fd for fd, _ in poll.poll(left_s * 1000)}
            if pidfd in ready:
                return "ended"
            if stop in ready:
                return "stopped"
            if tail.fd in ready and not tail.read():
                poll.unregister(tail.fd)
        return "late"
    finally:
        os.close(pidfd)


def _status_words(status: int) -> str:
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"exit status {status}"


# --------------------------------------------------------------------------- a unit of systemd


def _transient_unit(path: Path, environment: Mapping[str, str], timeout_s: float) -> list[str]:
    """The command that runs a hook as a unit, waits for it, and passes on its output and status."""
    properties = [
        # Else none could be started while the machine shuts down, and the volumes be given up.
        "DefaultDependencies=no",
        # Its last end, should this daemon die.
        f"RuntimeMaxSec={timeout_s + GRACE_S:g}",
        f"TimeoutStopSec={GRACE_S:g}",
    ]
    return [
        "systemd-run",
        *("--quiet", "--wait", "--pipe", "--collect", "--no-ask-password"),
        *("--service-type=exec", f"--unit={UNIT}", "--description=a hook of nfsha"),
        *(f"--property={one}" for one in properties),
        *(f"--setenv={name}={value}" for name, value in environment.items()),
        "--",
        str(path),
    ]


def _end_unit() -> str:
    """Ends the unit with all of its control group; returns what is stuck, or "". Blocks."""
    if not under_systemd():
        return ""
    try:
        subprocess.run(  # noqa: S603 - constant words
            ["systemctl", "stop", UNIT],  # noqa: S607 - found by the PATH of the unit
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_STOP_UNIT_S,
            check=False,  # there is none, mostly
        )
    except subprocess.TimeoutExpired:
        return f"{UNIT} (`systemctl status {UNIT}`)"
    except OSError as error:
        return f"{UNIT}: systemctl: {error.strerror}"
    return ""


# --------------------------------------------------------------------------- sessions


def end_leftovers() -> str:
    """Ends what hooks of a former daemon still run; returns what is stuck, or "". Blocks."""
    stuck = [_end_unit(), *(_end_session(session) for session in sorted(_sessions()))]
    words = "; ".join(filter(None, stuck))
    return f"an older hook was killed, but is not gone: {words}" if words else ""


def _sessions() -> set[int]:
    """Sessions in which hooks run that this process, or one that is dead, has started.

    A process of a hook bears its own session's id as its mark; one that left for another does not.
    """
    found = set()
    for pid, session in _processes():
        environment = _environment(pid)
        if environment.get(MARK.encode()) != str(session).encode():
            continue
        if _is_ours_or_nobodys(environment.get(STARTER.encode(), b"").decode(errors="replace")):
            found.add(session)
    return found


def _is_ours_or_nobodys(starter: str) -> bool:
    own = _name_of(os.getpid())
    namespace, _, rest = starter.partition(" ")
    pid = rest.partition(" ")[0]
    if namespace != own.partition(" ")[0] or not pid.isdigit():
        return False
    return starter == own or starter != _name_of(int(pid))


def _name_of(pid: int) -> str:
    """PID namespace, pid and start time of a process; only the first two when it is dead."""
    namespace = Path("/proc/self/ns/pid").readlink().name
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return f"{namespace} {pid}"
    return f"{namespace} {pid} {fields[19].decode()}"


def _end_session(session: int, *, reap: Callable[[], object] = lambda: None) -> str:
    """Ends all processes of a session; returns those that are not gone in time, in words."""
    began_s = time.monotonic()
    pids = _of_session(session)
    _signal(pids, signal.SIGTERM)  # once: a program that cleans up is left to it
    while pids:
        past_s = time.monotonic() - began_s
        if past_s > GRACE_S + GONE_WITHIN_S:
            return ", ".join(f"process {pid} ({_command(pid)})" for pid in pids)
        if past_s > GRACE_S:
            _signal(pids, signal.SIGKILL)
        time.sleep(_POLL_S)
        reap()
        pids = _of_session(session)
    return ""


def _of_session(session: int) -> list[int]:
    return [pid for pid, its in _processes() if its == session]


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _processes() -> list[tuple[int, int]]:
    """Every living process with its session. Fields of /proc/PID/stat: proc(5)."""
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            words = Path(entry.path, "stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        if words[0] not in (b"Z", b"X"):
            found.append((int(entry.name), int(words[3])))
    return found


def _environment(pid: int) -> dict[bytes, bytes]:
    try:
        data = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (entry.partition(b"=") for entry in data.split(b"\0"))
    return {name: value for name, _, value in pairs}


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "gone by now"

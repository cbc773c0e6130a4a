"""A place of the lab: a network namespace and a holder; starts and ends processes in it.

To its processes it is a machine: own /run, /proc, hostname and boot id. It knows nothing of
addresses, NFS or nfsha.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TypeVar

from tests.netns.labkit import kernel
from tests.netns.labkit.holder import Disk, Spec
from tests.netns.namespaces import Namespace

REPOSITORY = Path(__file__).resolve().parents[3]
MARK = "NFSHA_LAB"  # in the environment of everything that a lab starts
_READY_S = 30.0
_REAP_S = 10.0
_UNMOUNT_S = 60.0  # the last process unmounts the disks: seconds, with a million files in memory

_Result = TypeVar("_Result")


class LabError(RuntimeError):
    """The lab itself failed, not what is tested in it; the message says what."""


class Process:
    """One process in a place, the leader of its own session and process group."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.log = log
        self._popen = popen

    @property
    def pid(self) -> int:
        """Process id in the host's pid namespace."""
        return self._popen.pid

    @property
    def alive(self) -> bool:
        """False as soon as it has ended (a stopped process is alive)."""
        return self._popen.poll() is None

    def signal(self, number: int) -> None:
        """Sends a signal to the process alone."""
        self._popen.send_signal(number)

    def signal_group(self, number: int) -> None:
        """Sends a signal to the process and its children, as far as they stayed in its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to the process alone (children live on, as after a crash), and waits."""
        self.signal(signal.SIGKILL)
        self.wait(_REAP_S)

    def freeze(self) -> None:
        """SIGSTOP."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)

    def stop(self, timeout_s: float = 15.0) -> int:
        """SIGTERM, waits at most timeout_s (then LabError), and returns the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float) -> int:
        """Waits for the end; negative codes are signals. Raises LabError after timeout_s."""
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            text = f"{self.name} (pid {self.pid}) still runs after {timeout_s} s\n{self.tail()}"
            raise LabError(text) from None

    def output(self) -> str:
        """All that the process wrote so far (standard output and error)."""
        return self.log.read_text(errors="replace")

    def tail(self, lines: int = 40) -> str:
        """The last lines of its log."""
        return "\n".join(self.output().splitlines()[-lines:])


class Place:
    """See the module. `boot` brings it up, `kill_all` ends it; its folder outlives it."""

    def __init__(
        self,
        name: str,
        lab_name: str,
        folder: Path,
        disks: tuple[Disk, ...] = (),
        stay: bool = False,
    ) -> None:
        self.name = name
        self.folder = folder
        self.logs = folder / "log"
        self.logs.mkdir(parents=True)
        self.boots = 0
        self.boot_id = ""
        self.processes: list[Process] = []
        self._disks = disks
        self._stay = stay
        self._lab_name = lab_name
        self._namespace: Namespace | None = None
        self._holder: subprocess.Popen[bytes] | None = None

    @property
    def up(self) -> bool:
        """True between boot and kill_all."""
        return self._holder is not None and self._holder.poll() is None

    @property
    def namespace(self) -> Namespace:
        """Its network namespace: another one after each boot."""
        if self._namespace is None:
            raise LabError(f"place {self.name} is down")
        return self._namespace

    @property
    def holder_pid(self) -> int:
        """The process that keeps the place; its /proc/PID/root is the place's."""
        if self._holder is None:
            raise LabError(f"place {self.name} is down")
        return self._holder.pid

    def path(self, inside: str) -> Path:
        """A file of the place, as the host can reach it while the place is up."""
        return Path(f"/proc/{self.holder_pid}/root") / inside.lstrip("/")

    def make_namespace(self) -> Namespace:
        """Gives the place its network namespace, empty; the wires come before boot()."""
        if self._namespace is not None:
            raise LabError(f"place {self.name} is up already")
        self._namespace = Namespace(self.name)
        return self._namespace

    def boot(self) -> None:
        """Starts the holder: fresh root and /run, a new boot id, disks mounted. Raises LabError."""
        self.boots += 1
        self.boot_id = str(uuid.uuid4())
        spec = Spec(f"node-{self.name}", str(self.folder), self.boot_id, self._disks, self._stay)
        argv = [sys.executable, "-m", holder_module(), spec.dump()]
        log = self.logs / "holder.log"
        with log.open("ab") as errors:
            self._holder = kernel.in_own_thread(lambda: self._start_holder(argv, errors))
        stdout = self._holder.stdout
        if stdout is None or stdout.readline() != b"ready\n":
            raise LabError(f"place {self.name} did not come up:\n{log.read_text()}")

    def _start_holder(self, argv: list[str], errors: IO[bytes]) -> subprocess.Popen[bytes]:
        with self.namespace.path.open("rb") as netns:
            kernel.setns(netns.fileno(), kernel.CLONE_NEWNET)
        kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWUTS)
        kernel.mount(None, "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL if self._stay else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=REPOSITORY,
            env=self.environment(),
            start_new_session=True,
        )

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """What processes of the place get: a small plain environment, the lab's mark, the extra."""
        base = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "HOME": "/root",
            "PYTHONDONTWRITEBYTECODE": "1",
            MARK: self._lab_name,
        }
        return base | dict(extra or {})

    def spawn(
        self,
        argv: Sequence[str | Path],
        *,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Process:
        """Starts a process in the place and returns at once; output goes to `<name>.log`.

        Raises OSError when the program cannot be started.
        """
        name = name or Path(argv[0]).name
        log = self.logs / f"{name}.log"
        with log.open("ab") as output:
            popen = self.inside(
                lambda: subprocess.Popen(
                    [str(word) for word in argv],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd=REPOSITORY,
                    env=self.environment(env),
                    start_new_session=True,
                )
            )
        process = Process(name, popen, log)
        self.processes.append(process)
        return process

    def run(
        self, *argv: str | Path, timeout_s: float = 30.0, check: bool = True, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end. Raises LabError: non-zero exit (if check), or too long."""
        words = [str(word) for word in argv]
        try:
            done = self.inside(
                lambda: subprocess.run(
                    words,
                    input=stdin,
                    capture_output=True,
                    text=True,
                    timeout=timeout_s,
                    check=False,
                    cwd=REPOSITORY,
                    env=self.environment(),
                )
            )
        except subprocess.TimeoutExpired:
            raise LabError(f"{self.name}: {' '.join(words)}: no end after {timeout_s} s") from None
        if check and done.returncode != 0:
            said = done.stderr or done.stdout
            raise LabError(f"{self.name}: {' '.join(words)}: exit {done.returncode}: {said}")
        return done

    def inside(self, work: Callable[[], _Result]) -> _Result:
        """Runs work in a thread that is in all namespaces of the place.

        Work must not start threads: the kernel refuses (clone(2), EINVAL after setns to a pid
        namespace).
        """
        proc = Path(f"/proc/{self.holder_pid}/ns")

        def entered() -> _Result:
            kernel.unshare(kernel.CLONE_FS)
            with contextlib.ExitStack() as stack:
                opened = [
                    (stack.enter_context((proc / kind).open("rb")), flag)
                    for kind, flag in _ENTERED.items()
                ]
                for file, flag in opened:
                    kernel.setns(file.fileno(), flag)
            return work()

        return kernel.in_own_thread(entered)

    def kill_all(self) -> None:
        """SIGKILL to everything in the place; waits for the end of all. Idempotent.

        What the kernel had not yet written to the disks is written: a lab cannot lose its page
        cache.
        """
        if self._holder is None:
            return
        self._holder.kill()
        for process in self.processes:  # the pid namespace waits for us to reap our children
            process.wait(_UNMOUNT_S)
        self._holder.wait(_UNMOUNT_S)
        for stream in (self._holder.stdin, self._holder.stdout):
            if stream is not None:
                stream.close()
        self._holder = None
        self.processes.clear()

    def remove(self) -> None:
        """Kills everything, removes the network namespace; boot needs another one. Idempotent."""
        self.kill_all()
        if self._namespace is not None:
            self._namespace.delete()
            self._namespace = None

    def log_tails(self, lines: int = 25) -> Iterator[tuple[str, str]]:
        """(file name, last lines) of every log of the place that is not empty."""
        for log in sorted(self.logs.glob("*.log")):
            text = log.read_text(errors="replace").splitlines()
            if text:
                yield log.name, "\n".join(text[-lines:])


_ENTERED = {
    "mnt": kernel.CLONE_NEWNS,
    "net": kernel.CLONE_NEWNET,
    "uts": kernel.CLONE_NEWUTS,
    "pid": kernel.CLONE_NEWPID,
}


def holder_module() -> str:
    """The module that is run as a place's first process."""
    return "tests.netns.labkit.holder"

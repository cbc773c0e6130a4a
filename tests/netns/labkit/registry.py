"""Which labs exist on this host, who owns them, and how to remove one by its description alone.

Descriptions are in /run/nfsha-lab. All processes of a lab bear its name in their environment, and
the namespaces' names bear the pid of their maker, so a lab whose owner was killed at any moment is
removed by the next one (`sweep`) or by `lab down`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.netns.labkit import kernel
from tests.netns.labkit.place import MARK
from tests.netns.namespaces import run

FOLDER = Path("/run/nfsha-lab")
_GONE_S = 10.0


@dataclass
class ProcessId:
    """A process for good: its pid and when it started (a recycled pid has another start)."""

    pid: int
    start_time: int

    @staticmethod
    def of(pid: int) -> ProcessId | None:
        """The process that runs under this pid now, or None."""
        started = kernel.start_time(pid)
        return None if started is None else ProcessId(pid, started)

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return kernel.start_time(self.pid) == self.start_time


@dataclass
class Description:
    """All that a lab has on this host. `owner` None: a lab that stays until `lab down`."""

    name: str
    owner: ProcessId | None
    folder: str
    namespaces: dict[str, str] = field(default_factory=dict)
    processes: dict[str, ProcessId] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """Where it is kept."""
        return FOLDER / f"{self.name}.json"

    @property
    def abandoned(self) -> bool:
        """True when its owner is dead."""
        return self.owner is not None and not self.owner.alive

    def save(self) -> None:
        """Writes it, at once and whole."""
        FOLDER.mkdir(exist_ok=True)
        temporary = self.file.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(self), indent=1))
        temporary.rename(self.file)

    @staticmethod
    def load(file: Path) -> Description:
        """Reads what save wrote."""
        raw = json.loads(file.read_text())
        owner = raw.pop("owner")
        processes = {key: ProcessId(**value) for key, value in raw.pop("processes").items()}
        return Description(owner=ProcessId(**owner) if owner else None, processes=processes, **raw)


def descriptions() -> list[Description]:
    """Every lab that is known on this host."""
    found = []
    for file in sorted(FOLDER.glob("*.json")):
        with contextlib.suppress(FileNotFoundError):  # removed by its owner meanwhile
            found.append(Description.load(file))
    return found


def remove(description: Description) -> None:
    """Ends all processes of a lab, removes its namespaces and its folder. Idempotent."""
    deadline = time.monotonic() + _GONE_S
    while running := _processes_of(description):
        if time.monotonic() > deadline:
            raise RuntimeError(f"lab {description.name}: processes {running} do not end")
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    for namespace in description.namespaces.values():
        if (Path("/run/netns") / namespace).exists():
            run("ip", "netns", "delete", namespace)
    shutil.rmtree(description.folder, ignore_errors=True)
    description.file.unlink(missing_ok=True)


def _processes_of(description: Description) -> list[int]:
    """The recorded holders, which take all others with them, and what bears the mark otherwise."""
    holders = [one.pid for one in description.processes.values() if one.alive]
    return holders or [pid for pid, _ in marked_processes(description.name)]


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sweep() -> list[str]:
    """Removes the labs and test namespaces of dead owners; returns their names."""
    swept = []
    with _only_one():
        kept: set[str] = set()
        for description in descriptions():
            if description.abandoned:
                remove(description)
                swept.append(description.name)
            else:
                kept.update(description.namespaces.values())
        for name in _test_namespaces():
            if name not in kept and kernel.start_time(_owner_pid(name)) is None:
                run("ip", "netns", "delete", name, check=False)
                swept.append(name)
    return swept


def _test_namespaces() -> list[str]:
    """Names of the form nfsha-PID-NUMBER-LABEL (tests/netns/namespaces.py)."""
    folder = Path("/run/netns")
    names = [path.name for path in folder.glob("nfsha-*")] if folder.exists() else []
    return [name for name in names if name.split("-")[1].isdigit()]


def _owner_pid(namespace: str) -> int:
    return int(namespace.split("-")[1])


def leftovers(pid: int, lab_names: set[str]) -> list[str]:
    """What the process `pid` and its labs left on this host, each in words."""
    found = [f"namespace {name}" for name in _test_namespaces() if _owner_pid(name) == pid]
    for name in lab_names:
        folder = f"nfsha-lab-{name}"
        found += [f"mount {line}" for line in _lines("/proc/self/mountinfo") if folder in line]
        found += [f"loop device of {text}" for text in _loop_files() if folder in text]
        found += [f"process {pid} {comm}" for pid, comm in marked_processes(name)]
        found += [f"folder {path}" for path in Path("/tmp").glob(f"{folder}-*")]
        found += [f"description {name}"] if (FOLDER / f"{name}.json").exists() else []
    return found


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines()


def _loop_files() -> list[str]:
    texts = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # detached meanwhile
            texts.append(backing.read_text().strip())
    return texts


def marked_processes(lab_name: str) -> list[tuple[int, str]]:
    """(pid, name) of every process that a lab started, or that inherited its environment."""
    mark = f"{MARK}={lab_name}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append((int(folder.name), (folder / "comm").read_text().strip()))
    return found

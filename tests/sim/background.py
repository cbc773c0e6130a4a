"""Many seeds beside the other tests, of whom most wait: on processors that nobody else wants."""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.sim.runner import Summary, run_many

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of the seeds, and what they took of the processors, in seconds."""

    summary: Summary
    cpu_s: float


class Background:
    """Seeds that run in processes of their own until they are asked for, or closed."""

    def __init__(self, first: int, count: int) -> None:
        self._file = Path(tempfile.mkdtemp(prefix="nfsha-seeds-")) / "summary"
        words = [sys.executable, "-m", "tests.sim", "--from", str(first), "--seeds", str(count)]
        self._process = subprocess.Popen(
            [*words, "--into", str(self._file)], cwd=ROOT, start_new_session=True
        )

    def result(self) -> Ran:
        """Waits for the end."""
        if self._process.wait() != 0:
            raise RuntimeError(f"the seeds ended with exit code {self._process.returncode}")
        ran = pickle.loads(self._file.read_bytes())
        if not isinstance(ran, Ran):
            raise TypeError(f"{self._file} holds {type(ran).__name__}")
        return ran

    def close(self) -> None:
        """Ends what still runs."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._file.unlink(missing_ok=True)
        self._file.parent.rmdir()


def run_into(first: int, count: int, file: Path) -> None:
    """Runs seeds on the processors that nobody else wants, and writes what came of them."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    summary = run_many(range(first, first + count))
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = sum(one.ru_utime + one.ru_stime for one in used)
    file.write_bytes(pickle.dumps(Ran(summary, cpu_s)))

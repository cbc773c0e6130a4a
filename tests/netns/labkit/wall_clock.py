"""Steps the machine's wall clock for a moment, and puts it right again whatever happens.

CLOCK_REALTIME is one for the whole machine (time namespaces have only the monotonic clocks, man 7
time_namespaces), and a faked libc would not step what the kernel stamps, so the clock itself is
stepped. A guard process does it: it knows the right time by CLOCK_BOOTTIME, and restores it when
its standard input ends (so also when its owner is killed), after _LONGEST_S at the latest. A step
that somebody else makes meanwhile (NTP) is undone too.
"""

from __future__ import annotations

import contextlib
import fcntl
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.netns.labkit import kernel
from tests.netns.labkit.place import REPOSITORY, LabError

_LONGEST_S = 60.0
_LOCK = Path("/run/nfsha-lab/.wall-clock")


@contextlib.contextmanager
def stepped(seconds: float) -> Iterator[None]:
    """The machine's wall clock is ahead by so many seconds in the block (at most 60 s of it)."""
    argv = [sys.executable, "-m", "tests.netns.labkit.wall_clock", str(seconds)]
    guard = subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        text=True,
        start_new_session=True,
    )
    if guard.stdin is None or guard.stdout is None:
        raise LabError("the guard of the wall clock has no pipes")
    try:
        if guard.stdout.readline() != "stepped\n":
            raise LabError("the wall clock could not be stepped")
        yield
    finally:
        guard.stdin.close()
        guard.wait(10.0)
        guard.stdout.close()


def _offset_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_REALTIME) - kernel.now_ns()


def _set(offset_ns: int) -> None:
    time.clock_settime_ns(time.CLOCK_REALTIME, kernel.now_ns() + offset_ns)


def main() -> None:
    """wall_clock.py SECONDS: the guard."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    step_ns = int(float(sys.argv[1]) * 1e9)
    _LOCK.parent.mkdir(exist_ok=True)
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two steps at once could not both be undone
        right_ns = _offset_ns()
        _set(right_ns + step_ns)
        try:
            print("stepped", flush=True)
            select.select([sys.stdin], [], [], _LONGEST_S)
        finally:
            _set(right_ns)


if __name__ == "__main__":
    main()

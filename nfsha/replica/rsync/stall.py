"""Whether the processes of a transfer still move anything.

rsync's own --timeout does not end a transfer whose sender hangs or whose network is cut in the
middle of a file: its generator goes on sending keep-alives, each of which the kernel takes, and a
successful write counts as life (rsync's io.c, check_timeout; seen with 3.5.0). Nor does it end one
in which all three processes wait for each other and hand keep-alives around for ever (seen with
3.5.0: a full walk with hard links while the source changed). So the pass looks at what the kernel
counts for each process, and takes no notice of a few bytes. It must not end anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Activity", "StallWatch", "activity"]

MOVED_BYTES: Final = 2048
"""Keep-alives of 4 bytes, two in each timeout, from three processes, are far less."""

BUSY_TICKS: Final = 5
"""Of processor time, 50 ms (proc(5), _SC_CLK_TCK is 100): waiting takes less in a minute."""


@dataclass(frozen=True, slots=True)
class Activity:
    """What some processes have done since they began.

    `read_bytes` are from files, pipes and sockets; `disk_bytes` went to and from disks.
    """

    read_bytes: int
    disk_bytes: int
    ticks: int

    def moved_since(self, before: Activity) -> bool:
        """Whether this is more than what a hanging transfer does."""
        return (
            self.read_bytes >= before.read_bytes + MOVED_BYTES
            or self.disk_bytes >= before.disk_bytes + MOVED_BYTES
            or self.ticks >= before.ticks + BUSY_TICKS
        )


class StallWatch:
    """Tells when nothing has moved for `limit_ms`. Times are those of one clock of the caller."""

    def __init__(self, limit_ms: int, now_ms: int) -> None:
        self._limit_ms = limit_ms
        self._moved_ms = now_ms
        self._last = Activity(0, 0, 0)

    def stalled(self, found: Activity, now_ms: int) -> bool:
        """Takes what was found now."""
        if found.moved_since(self._last):
            self._last = found
            self._moved_ms = now_ms
        return now_ms - self._moved_ms >= self._limit_ms


def activity(pids: Iterable[int], proc: Path = Path("/proc")) -> Activity:
    """The sums over some processes (proc_pid_io(5), proc_pid_stat(5)); those gone count nothing."""
    read = disk = ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            counts = dict(
                line.split(": ") for line in (proc / f"{pid}/io").read_text().splitlines()
            )
            read += int(counts["rchar"])
            disk += int(counts["read_bytes"]) + int(counts["write_bytes"])
            fields = (proc / f"{pid}/stat").read_bytes().rpartition(b")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # utime and stime, fields 14 and 15
    return Activity(read, disk, ticks)

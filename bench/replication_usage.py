"""What a pass costs: CPU time, bytes on the wire and peak memory, read from outside.

CPU time is what the kernel charged to the processes of a side and to all their ended children
(proc(5), /proc/PID/stat). Memory is the sum of their proportional set sizes. To look at it takes
the time of those who are measured, most from the side with more processes: so it is looked at after
50 ms, and again each time a quarter of the time so far has gone by.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.netns.lab import Lab
from tests.netns.labkit.network import NETWORKS, port

_SAMPLE_S = 0.05
_SAMPLE_SHARE = 0.25
_TICKS_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cost:
    """Of one pass, on both nodes together. wire_bytes: over node b's ports, both ways."""

    wall_s: float
    cpu_s: float
    wire_bytes: int
    peak_mib: float


class Meter:
    """Measures what the process trees of these pids cost from entering to leaving; `cost` then.

    children: the children of this process too that begin and end in between (`also`).
    """

    def __init__(self, lab: Lab, roots: Sequence[int], *, children: bool = False) -> None:
        self._lab = lab
        self._roots = list(roots)
        self._children = children
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="bench-memory")
        self._peak_kib = 0
        self._cpu_s = 0.0
        self._wire = 0
        self._began_s = 0.0
        self._alone: int | None = None
        self.cost = Cost(0.0, 0.0, 0, 0.0)

    def __enter__(self) -> Meter:
        self._wire = wire_bytes(self._lab)
        self._cpu_s = self._used_s()
        self._began_s = time.monotonic()
        self._sampler.start()
        return self

    def __exit__(self, *_error: object) -> None:
        wall_s = time.monotonic() - self._began_s
        self._ended.set()
        self._sampler.join()
        time.sleep(_SAMPLE_S)  # until those who served it are reaped
        used_s = self._used_s()
        self.cost = Cost(
            round(wall_s, 4),
            round(used_s - self._cpu_s, 3),
            wire_bytes(self._lab) - self._wire,
            round(self._peak_kib / 1024, 1),
        )

    def also(self, pid: int) -> None:
        """Counts the memory of one more process, a child that has just begun."""
        self._alone = pid

    def _used_s(self) -> float:
        used_s = cpu_s(self._roots)
        if self._children:
            ended = resource.getrusage(resource.RUSAGE_CHILDREN)
            used_s += ended.ru_utime + ended.ru_stime
        return used_s

    def _until_next_s(self) -> float:
        return max(_SAMPLE_S, _SAMPLE_SHARE * (time.monotonic() - self._began_s))

    def _sample(self) -> None:
        while not self._ended.wait(self._until_next_s()):
            roots = self._roots if self._alone is None else [*self._roots, self._alone]
            self._peak_kib = max(self._peak_kib, sum(pss_kib(pid) for pid in trees(roots)))


def trees(roots: Sequence[int]) -> Iterator[int]:
    """The processes that these are, and all below them, as far as they live."""
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        yield pid
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += [int(word) for word in (task / "children").read_text().split()]


def cpu_s(roots: Sequence[int]) -> float:
    """CPU seconds so far of these trees: own, and of children that have ended and been reaped."""
    ticks = 0
    for pid in trees(roots):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
    return ticks / _TICKS_S


def pss_kib(pid: int) -> int:
    """Memory of one process, pages that are shared counted in parts; 0 when it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


def wire_bytes(lab: Lab) -> int:
    """Bytes that have gone over node b's ports of the switch, in and out."""
    total = 0
    for network in NETWORKS:
        shown = lab.switch.namespace.exec(
            "ip", "-j", "-s", "link", "show", "dev", port("b", network)
        )
        stats = json.loads(shown)[0]["stats64"]
        total += int(stats["rx"]["bytes"]) + int(stats["tx"]["bytes"])
    return total

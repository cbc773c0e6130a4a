"""What an idle daemon costs: share of one core and resident memory, of the active and the passive.

Idle: it heartbeats, renews, asks its witness and checks its NFS service, and no client is there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from bench.contestants import Kind, NfshaPair
from tests.netns.lab import Lab

IDLE_S = 60.0
_SETTLE_S = 3.0
_NODES = {"a": "active", "b": "passive"}


@dataclass(frozen=True)
class Idle:
    """One daemon over `seconds`. rss_mib: at the end."""

    contestant: str
    state: str
    seconds: float
    cpu_percent: float
    rss_mib: float


@dataclass(frozen=True)
class _Watched:
    kind: Kind
    state: str
    process: psutil.Process


def measure(
    kinds: Sequence[Kind], seconds: float = IDLE_S, say: Callable[[str], None] = print
) -> list[Idle]:
    """All pairs of nfsha at once, each in its own lab. Raises LabError when one does not settle.

    CPU time is what the kernel charged to the process (proc(5), /proc/PID/stat: utime and stime),
    so the other pairs and whatever else runs do not count.
    """
    with contextlib.ExitStack() as stack:
        watched = []
        for kind in kinds:
            pair = NfshaPair(stack.enter_context(Lab()), kind.profile)
            pair.settle()
            watched += [
                _Watched(kind, state, psutil.Process(pair.pair.daemon(node).pid))
                for node, state in _NODES.items()
            ]
        time.sleep(_SETTLE_S)
        say(f"idle: {seconds:.0f} s")
        start_s = time.monotonic()
        before = [_used_s(one.process) for one in watched]
        time.sleep(seconds)
        took_s = time.monotonic() - start_s
        return [
            Idle(
                one.kind.name,
                one.state,
                round(took_s, 3),
                round(100 * (_used_s(one.process) - used_s) / took_s, 3),
                round(one.process.memory_info().rss / 2**20, 2),
            )
            for one, used_s in zip(watched, before, strict=True)
        ]


def _used_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)

"""The two clocks of replication: one that never steps, and the wall clock that marks carry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clocks:
    """`now_ms`: CLOCK_BOOTTIME in milliseconds. `wall_ns`: time since 1970 in nanoseconds."""

    now_ms: Callable[[], int]
    wall_ns: Callable[[], int]

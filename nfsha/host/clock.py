"""The one clock that nfsha's timers use, and the id of this boot.

CLOCK_BOOTTIME goes on while the machine is suspended and never jumps when somebody sets the time,
so a lease counted by it ends when it should (clock_gettime(2)). Nothing here reads the wall clock.
"""

from __future__ import annotations

import time
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NS_PER_MS = 1_000_000


def now_ms() -> int:
    """Returns CLOCK_BOOTTIME in whole milliseconds since the boot."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // _NS_PER_MS


def boot_id() -> str:
    """Returns the kernel's random id of this boot, a UUID in lower case (random(4)).

    Readings of `now_ms` compare only within one boot id. Raises OSError where /proc is not mounted.
    """
    return _BOOT_ID.read_text(encoding="ascii").strip()

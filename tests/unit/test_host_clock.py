"""The clock is CLOCK_BOOTTIME in whole milliseconds, and the boot id is the kernel's."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

from nfsha.host.clock import boot_id, now_ms


def test_counts_from_the_boot_in_milliseconds() -> None:
    uptime_ms = float(Path("/proc/uptime").read_text().split()[0]) * 1000
    assert abs(now_ms() - uptime_ms) < 1000


def test_goes_on() -> None:
    before = now_ms()
    time.sleep(0.05)
    assert 50 <= now_ms() - before < 5000


def test_boot_id_is_a_uuid_and_stays() -> None:
    assert str(uuid.UUID(boot_id())) == boot_id() == boot_id()

"""At most one line per subject and minute, and what was kept back is counted."""

from __future__ import annotations

import logging

import pytest

from nfsha.peer.limited_log import EVERY_MS, LimitedLog


def test_a_flood_is_a_line_a_minute_for_each_subject(caplog: pytest.LogCaptureFixture) -> None:
    now_ms = 5
    limited = LimitedLog(logging.getLogger("test"), lambda: now_ms)
    for _ in range(1000):
        limited.warning("link a", "forged")
        limited.warning("link b", "forged")
    assert caplog.messages == ["link a: forged", "link b: forged"]
    now_ms += EVERY_MS - 1
    limited.warning("link a", "too early")
    assert len(caplog.messages) == 2
    now_ms += 1
    limited.warning("link a", "again")
    assert caplog.messages[2:] == ["link a: again (1000 more since the last line)"]
    now_ms += EVERY_MS
    limited.warning("link a", "once")
    assert caplog.messages[3:] == ["link a: once"]

"""Log lines about what others send or break, at most one per subject and minute.

Whoever can reach a socket could otherwise fill the log. The subjects must be few and fixed (a link
and a sort of refusal), never taken from what was received.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

EVERY_MS = 60_000
"""Least time between two lines on one subject: a fault shows at once, a flood once a minute."""


class LimitedLog:
    """A logger's warnings, limited by subject."""

    def __init__(self, log: logging.Logger, clock_ms: Callable[[], int]) -> None:
        """Takes the logger to write to, and the clock to count by."""
        self._log = log
        self._clock_ms = clock_ms
        self._next_ms: dict[str, int] = {}
        self._kept_back: dict[str, int] = {}

    def warning(self, subject: str, text: str) -> None:
        """Logs the text, unless the subject had a line less than `EVERY_MS` ago; then counts it."""
        now_ms = self._clock_ms()
        if now_ms < self._next_ms.get(subject, now_ms):
            self._kept_back[subject] = self._kept_back.get(subject, 0) + 1
            return
        self._next_ms[subject] = now_ms + EVERY_MS
        kept_back = self._kept_back.pop(subject, 0)
        more = f" ({kept_back} more since the last line)" if kept_back else ""
        self._log.warning("%s: %s%s", subject, text, more)

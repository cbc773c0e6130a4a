"""What to say of an exception that nobody foresaw: one line, with the place, for log and terminal.

An operator never sees a traceback; whoever mends it needs the places that it went through.
"""

from __future__ import annotations

import traceback
from pathlib import Path

MAX_PLACES = 6
_MAX_WORDS = 300


def one_line(error: BaseException) -> str:
    """The exception's kind, words and innermost places (`file:line`), the innermost first."""
    frames = traceback.extract_tb(error.__traceback__)[-MAX_PLACES:]
    places = " < ".join(f"{Path(one.filename).name}:{one.lineno}" for one in reversed(frames))
    words = " ".join(str(error).split())[:_MAX_WORDS]
    return f"{type(error).__name__}: {words} (at {places or 'an unknown place'})"

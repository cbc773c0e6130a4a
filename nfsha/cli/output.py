"""Where a command's words go: a terminal, a file on a full disk, a pipe that nobody reads, nothing.

What cannot be shown must not change what is done, nor the exit code that a script goes by; and what
comes from elsewhere must not be obeyed by a terminal.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from nfsha.cli.words import printable

_STANDARD: Final = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
_OUTPUT, _ERRORS = 1, 2


def complete() -> None:
    """Puts nothing in place of what was closed by who started this (`>&-`)."""
    for name, mode in _STANDARD:
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - to the end


def say(text: str, end: str = "\n") -> None:
    """Prints, for who looks on at what goes on without him: if nobody can read it, no more."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        silence()


def silence() -> None:
    """What is printed from now on, and what could not be so far, is lost without a word."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, _OUTPUT)
    os.close(nothing)


def trouble() -> str:
    """Brings out what was printed; says why that cannot be, and is silent from then on. Else ""."""
    try:
        print(end="", flush=True)
    except BrokenPipeError:  # who reads has enough, as in `nfsha events | head`
        silence()
    except OSError as error:
        silence()
        return f"the output cannot be written: {error.strerror}"
    return ""


def complain(text: str) -> None:
    """Prints to standard error what a terminal may have, if that takes it."""
    try:
        for line in text.splitlines():
            print(printable(line), file=sys.stderr, flush=True)
    except OSError:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, _ERRORS)
        os.close(nothing)

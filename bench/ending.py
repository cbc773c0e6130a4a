"""How every bench ends: what was found is written, each bar is told, and the exit code says it.

It knows nothing of what is measured.
"""

from __future__ import annotations

import compileall
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

from bench.findings import Bar, passed
from tests.netns.lab import require_root
from tests.netns.labkit import registry
from tests.netns.labkit.place import REPOSITORY, LabError

_WORDS = {True: "met", False: "NOT MET", None: "-"}


class Measuring(Protocol):
    """One run of a bench."""

    @property
    def found_something(self) -> bool:
        """There is something to write."""

    def run(self) -> None:
        """Measures. Raises LabError when it cannot go on."""

    def write(self) -> Path:
        """Writes what was found so far; returns where people read it."""

    def bars(self) -> Sequence[Bar]:
        """Every bar, each with what was found."""


def carry_out(make: Callable[[], Measuring]) -> int:
    """Makes a bench and runs it, as root.

    Returns 0, 1 when a bar is not met, 2 when it cannot run, 130 after ^C.
    """
    bench = None
    signal.signal(signal.SIGTERM, _end)
    try:
        require_root()
        _compile()
        bench = make()
        bench.run()
    except LabError as error:
        print(f"the bench cannot go on: {error}", file=sys.stderr)
        if bench is not None and bench.found_something:
            print(f"written, as far as it came: {bench.write()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ended; nothing was written", file=sys.stderr)
        return 130
    finally:
        registry.sweep()
    written = bench.write()
    judged = bench.bars()
    for bar in judged:
        print(f"{_WORDS[bar.met]:8}{bar.text}: {bar.found}")
    print(f"written: {written}")
    return 0 if passed(judged) else 1


def _compile() -> None:
    """As an installer does: the lab's processes keep no bytecode, and would compile each time."""
    compileall.compile_dir(REPOSITORY / "nfsha", quiet=1)


def _end(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt

"""One round: the same fault for several contestants, side by side, each trial a process of its own.

All settle first; then the faults come `STAGGER_S` apart, so that carrying out one does not disturb
the moment that matters of another; nobody takes its lab down before all have their figures.
Bounded: a trial that does not answer in time is ended and counts as failed. Nothing is repeated.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from bench.contestants import Kind
from bench.faults import Fault
from bench.trial import RECOVERY_S, Sample
from tests.netns.labkit.place import REPOSITORY

STAGGER_S = 0.7
_READY_S = 60.0
_FIGURES_S = 30.0
_END_S = 30.0
_ERROR_LINES = 12


class TrialError(Exception):
    """A trial gave no sample; the message says why, as far as it told."""


@dataclass
class Round:
    """What a round gave, by contestant."""

    samples: dict[str, Sample] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    configurations: dict[str, dict[str, str]] = field(default_factory=dict)


def play(kinds: Sequence[Kind], fault: Fault) -> Round:
    """One fault for all of these contestants, struck in this order."""
    found = Round()
    with contextlib.ExitStack() as stack:
        trials = {kind.name: stack.enter_context(_Trial(kind, fault)) for kind in kinds}

        def each(work: Callable[[str, _Trial], None]) -> None:
            for name, trial in trials.items():
                if name not in found.errors:
                    try:
                        work(name, trial)
                    except TrialError as error:
                        found.errors[name] = str(error)

        def strike(_name: str, trial: _Trial) -> None:
            trial.go()
            time.sleep(STAGGER_S)

        def take(name: str, trial: _Trial) -> None:
            found.samples[name], found.configurations[name] = trial.figures()

        each(lambda _name, trial: trial.wait_ready())
        each(strike)
        each(take)
        each(lambda _name, trial: trial.release())
    return found


class _Trial:
    """The owner's side of one `python -m bench.trial`."""

    def __init__(self, kind: Kind, fault: Fault) -> None:
        self._kind = kind
        self._fault = fault

    def __enter__(self) -> Self:
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.trial", self._kind.name, self._fault.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=REPOSITORY,
            text=True,
            bufsize=1,
            start_new_session=True,  # a ^C reaches it once, from here
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends it: by the end of its input, else by ^C, else by SIGKILL (its lab ends with it)."""
        self.release()
        if error is not None or not self._ended(_END_S):
            self._process.send_signal(signal.SIGINT)
            if not self._ended(_END_S):
                self._process.kill()
                self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def wait_ready(self) -> None:
        """Waits until its clients work."""
        if (said := self._line(_READY_S)) != "ready":
            raise self._failed(f"said {said[:80]!r} instead of ready")

    def go(self) -> None:
        """Lets it strike."""
        if self._process.stdin is None:
            raise self._failed("has no standard input")
        try:
            self._process.stdin.write("go\n")
        except BrokenPipeError:
            raise self._failed("ended before the fault") from None

    def figures(self) -> tuple[Sample, dict[str, str]]:
        """Waits for its sample, and returns it with the configuration files."""
        line = self._line(self._fault.watch_s + RECOVERY_S + _FIGURES_S)
        try:
            told = json.loads(line)
        except ValueError:
            raise self._failed(f"said {line[:80]!r} instead of its figures") from None
        return Sample.load(told["sample"]), told["configurations"]

    def release(self) -> None:
        """Lets it take its lab down."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def _ended(self, within_s: float) -> bool:
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _line(self, within_s: float) -> str:
        stdout = self._process.stdout
        if stdout is None:
            raise self._failed("has no standard output")
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if not selector.select(within_s):
                raise self._failed(f"said nothing for {within_s:.0f} s")
        return stdout.readline().strip()

    def _failed(self, what: str) -> TrialError:
        self._errors.seek(0)
        told = self._errors.read().splitlines()[-_ERROR_LINES:]
        words = "\n".join([f"the trial {what}", *told])
        return TrialError(words)

"""The bench of failover: nfsha and keepalived side by side in one run; `make bench-failover`.

It writes failover.md and failover.json, and ends with exit code 1 when a bar is not met. Needs
root. Bounded: about half an hour with ten runs and ten calm minutes.

    python -m bench.failover [--runs N] [--only PART,...] [--calm-minutes N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import calm, idle, machine, report, rounds
from bench.contestants import KINDS, Kind
from bench.ending import carry_out
from bench.faults import FAULTS, Fault
from bench.findings import OURS, Bar, Failure, Findings, bars
from bench.options import Options

PARTS = ("idle", *(fault.name for fault in FAULTS), "calm")
MAX_CALM_MINUTES = 120.0


class Bench:
    """One run of the bench: carries out the parts and keeps what they found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._began_s = time.monotonic()
        self._configurations: dict[str, dict[str, str]] = {}
        self.findings = Findings(machine.facts(), options.runs)

    def run(self) -> None:
        """All parts that were asked for. Raises LabError when a calm or idle pair cannot settle."""
        only: tuple[str, ...] = self._options.only
        if "idle" in only:
            self.findings.idle = idle.measure(OURS, say=self._say)
            for one in self.findings.idle:
                self._say(
                    f"idle: {one.contestant}, {one.state}: {one.cpu_percent:.2f} %, "
                    f"{one.rss_mib:.1f} MiB"
                )
        faults = [fault for fault in FAULTS if fault.name in only]
        for number in range(1, self._options.runs + 1):
            for place, fault in enumerate(faults):
                self._round(number, fault, _rotated(KINDS, number + place))
        if "calm" in only:
            self.findings.calm = calm.measure(KINDS, self._options.calm_minutes, self._say)

    @property
    def found_something(self) -> bool:
        """There is something to write."""
        return bool(self.findings.samples)

    def write(self) -> Path:
        """Writes what was found so far; returns the page."""
        out: Path = self._options.out
        report.write(out, self.findings, self._configurations)
        return out / "failover.md"

    def bars(self) -> list[Bar]:
        """Every bar, each with what was found."""
        return bars(self.findings)

    def _round(self, number: int, fault: Fault, kinds: Sequence[Kind]) -> None:
        found = rounds.play(kinds, fault)
        self.findings.samples += found.samples.values()
        self._configurations |= found.configurations
        for name, error in found.errors.items():
            self.findings.failures.append(Failure(name, fault.name, number, error))
            self._say(f"run {number}, {fault.name}, {name} FAILED: {error}")
        told = [
            f"{kind.name} {one.outage_null_ms:.0f} ({one.overlap_addresses_ms:.0f})"
            for kind in KINDS
            if (one := found.samples.get(kind.name)) is not None
        ]
        words = ", ".join(told)
        self._say(
            f"run {number} of {self._options.runs}, {fault.name}: outage (two holders), ms: {words}"
        )

    def _say(self, words: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._began_s), 60)
        print(f"[{minutes:3d}:{seconds:02d}] {words}", flush=True)


def _rotated(kinds: Sequence[Kind], by: int) -> list[Kind]:
    """Another one begins in each round, so that the order favours nobody."""
    start = by % len(kinds)
    return [*kinds[start:], *kinds[:start]]


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    options = Options("failover", "nfsha beside keepalived", runs=10, most_runs=100)
    options.add_choice("--only", PARTS)
    options.add_minutes("--calm-minutes", 10.0, "with busy cores")
    found = options.read(argv)
    if not 0 < found.calm_minutes <= MAX_CALM_MINUTES:
        options.refuse(f"--calm-minutes {found.calm_minutes:g}: at most {MAX_CALM_MINUTES:g}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the bench; returns the exit code (`carry_out`)."""
    options = _options(argv)
    return carry_out(lambda: Bench(options))


if __name__ == "__main__":
    sys.exit(main())

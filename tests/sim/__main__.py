"""`python -m tests.sim --seeds N [--from K]`, or one seed told line by line: `--seed S -v`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.sim.background import run_into
from tests.sim.runner import run_many, run_seed

FAILURES_TOLD = 5


def main() -> int:
    """Runs the simulator; 0 when nothing broke and every fault struck."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many seeds")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed")
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("-v", action="store_true", help="with its trace")
    parser.add_argument("--processes", type=int, help="default: one per processor")
    parser.add_argument("--into", type=Path, help="run as idle work, and write the summary there")
    options = parser.parse_args()
    if options.into is not None:
        run_into(options.first, options.seeds, options.into)
        return 0
    if options.seed is not None:
        return _one(options.seed, told=options.v)
    summary = run_many(range(options.first, options.first + options.seeds), options.processes)
    for outcome in summary.failures[:FAILURES_TOLD]:
        print(outcome.trace, end="\n\n")
    for outcome in summary.failures:
        print(f"FAILED seed {outcome.seed}: {outcome.failure}")
    print(summary.text())
    if never := summary.never_fired():
        print(f"FAILED: these faults never fired: {', '.join(never)}")
    return 1 if summary.failures or summary.never_fired() else 0


def _one(seed: int, *, told: bool) -> int:
    outcome = run_seed(seed, keep_trace=told)
    print(outcome.trace or f"seed {seed}: nothing broke")
    return 1 if outcome.failure else 0


if __name__ == "__main__":
    sys.exit(main())

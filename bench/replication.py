"""The bench of replication: nfsha beside the rsync of a crontab; `make bench-replication`.

It writes replication.md and replication.json, and ends with exit code 1 when a bar is not met.
Needs root, 30 GiB of disk below /tmp, and about an hour with three runs at all sizes.

    python -m bench.replication [--runs N] [--sizes N,...] [--only PART,...] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bench import machine
from bench import replication_report as report
from bench.ending import carry_out
from bench.findings import Bar
from bench.options import Options
from bench.replication_findings import FIRST, Equality, Findings, Journal, Sample, bars
from bench.replication_sides import Cron, Nfsha, Pass, Side
from bench.replication_trees import (
    Changes,
    Tree,
    forget_files,
    forget_names,
    look,
    make,
    make_large,
)
from bench.replication_usage import cpu_s
from tests.netns.lab import Lab
from tests.netns.labkit.place import LabError
from tests.netns.treewalk import differences

TREES = {files: Tree(files, files // 1000) for files in (10_000, 100_000, 1_000_000)}
PARTS = ("calm", "changes", "journal", *FIRST)
MAX_RUNS = 20
"""So many rounds change different files."""
VOLUMES = ("one", "two", "three", "four")
LARGE_BYTES = 1 << 30
SMALL_FILES = 100_000
JOURNAL_S = 20.0
JOURNAL_CHANGES_A_SECOND = 1000
_FREE_BYTES = 30 << 30
_COPY_S = 1800


class Bench:
    """One run of the bench: carries out the parts and keeps what they found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._began_s = time.monotonic()
        self.findings = Findings(_facts(), options.runs)

    def run(self) -> None:
        """All parts that were asked for. Raises LabError when a lab or a side fails for good."""
        _require_space()
        only: tuple[str, ...] = self._options.only
        if {"calm", "changes", "journal"} & set(only):
            for size in self._options.sizes:
                self._tree(TREES[size])
        for scenario in FIRST:
            if scenario in only:
                for run in range(1, self._options.runs + 1):
                    self._first(scenario, run)

    @property
    def found_something(self) -> bool:
        """There is something to write."""
        return bool(self.findings.samples)

    def write(self) -> Path:
        """Writes what was found so far; returns the page."""
        out: Path = self._options.out
        report.write(out, self.findings, Cron.configuration())
        return out / "replication.md"

    def bars(self) -> list[Bar]:
        """Every bar, each with what was found."""
        return bars(self.findings)

    # ------------------------------------------------------------- passes over one tree

    def _tree(self, tree: Tree) -> None:
        size_mib = max(1024, tree.files * 6 // 1024 + 1024)
        inodes = tree.files + 20_000
        with (
            Lab(volumes=(tree.volume,), volume_mib=size_mib, inodes=inodes) as lab,
            contextlib.ExitStack() as stack,
        ):
            stack.callback(forget_files)
            cron, nfsha = Cron(lab, size_mib, inodes), Nfsha(lab)
            self._say(f"{tree.files:,} files: making the tree and both copies")
            self._prepare(lab, tree, cron, nfsha)
            changes = Changes(lab)
            for run in range(1, self._options.runs + 1):
                sides: list[Side] = [nfsha, cron] if run % 2 else [cron, nfsha]
                if "calm" in self._options.only:
                    self._passes("calm", tree, run, sides)
                if "changes" in self._options.only:
                    changes.make(tree)
                    look(lab.a.path(f"/nfs/{tree.volume}"), *(s.target(tree.volume) for s in sides))
                    self._passes("changes", tree, run, sides)
            if "journal" in self._options.only and tree.files == max(self._options.sizes):
                self._journal(lab, tree, nfsha)
            for side in (cron, nfsha):
                side.sync(tree.volume)
            targets = [(one.name, tree.volume, one.target(tree.volume)) for one in (cron, nfsha)]
            self._compare(lab, targets, tree.files)

    def _prepare(self, lab: Lab, tree: Tree, cron: Cron, nfsha: Nfsha) -> None:
        """Pairs the volumes while they are empty, and fills all three while nobody looks."""
        nfsha.start()
        nfsha.stop()
        source = lab.a.path(f"/nfs/{tree.volume}")
        make(tree, source)
        _copy(source, [side.target(tree.volume) for side in (cron, nfsha)])
        os.sync()
        cron.start()
        nfsha.start()
        for side in (cron, nfsha):
            side.sync(tree.volume)
        look(source, cron.target(tree.volume), nfsha.target(tree.volume))

    def _passes(self, scenario: str, tree: Tree, run: int, sides: Sequence[Side]) -> None:
        told = []
        for side in sides:
            os.sync()
            done = self._try(
                lambda side=side: side.sync(tree.volume),  # type: ignore[misc]
                f"{side.name}, {scenario}, {tree.files:,} files, run {run}",
            )
            if done is not None:
                self._keep(side.name, scenario, tree.files, run, done)
                told.append(f"{side.title} {done.cost.wall_s:.2f} s ({done.walk or 'all'})")
        self._say(f"{tree.files:,} files, {scenario}, run {run}: {', '.join(told)}")

    # ------------------------------------------------------------- initial copies

    def _first(self, scenario: str, run: int) -> None:
        size_mib, inodes = 1024, SMALL_FILES // len(VOLUMES) + 5000
        with Lab(volumes=VOLUMES, volume_mib=size_mib, inodes=inodes) as lab:
            cron, nfsha = Cron(lab, size_mib, inodes), Nfsha(lab)
            for number, volume in enumerate(VOLUMES):
                _fill(scenario, lab.a.path(f"/nfs/{volume}"), number)
            cron.start()
            sides: list[Side] = [nfsha, cron] if run % 2 else [cron, nfsha]
            told = []
            for side in sides:
                os.sync()
                done = self._try(side.first, f"{side.name}, {scenario}, run {run}")
                synced_s = _time_of(os.sync)
                if done is not None:
                    durable_s = round(done.cost.wall_s + synced_s, 4)
                    self._keep(side.name, scenario, 0, run, done, durable_s)
                    told.append(f"{side.title} {done.cost.wall_s:.2f} s")
                    if run == self._options.runs:
                        targets = [(side.name, one, side.target(one)) for one in VOLUMES]
                        self._compare(lab, targets, 0, scenario)
            self._say(f"initial copy, {scenario}, run {run}: {', '.join(told)}")

    # ------------------------------------------------------------- the change journal

    def _journal(self, lab: Lab, tree: Tree, nfsha: Nfsha) -> None:
        pid = nfsha.daemon_of_source()
        idle_percent, _ = _watch(pid, lambda: time.sleep(JOURNAL_S))
        forget_names()
        root = lab.a.path(f"/nfs/{tree.volume}")
        made = 0

        def change() -> None:
            nonlocal made
            made = _change_all_the_time(root, tree)

        busy_percent, took_s = _watch(pid, change)
        found = Journal(round(took_s, 2), made / took_s, idle_percent, busy_percent)
        self.findings.journal = found
        self._say(f"journal: {found.percent:.2f} % at {found.changes_a_second:,.0f} changes/s")

    # ------------------------------------------------------------- keeping

    def _keep(
        self, side: str, scenario: str, size: int, run: int, done: Pass, durable_s: float = 0.0
    ) -> None:
        cost = done.cost
        self.findings.samples.append(
            Sample(
                side,
                scenario,
                size,
                run,
                cost.wall_s,
                cost.cpu_s,
                cost.wire_bytes,
                cost.peak_mib,
                done.walk,
                done.full_walks,
                durable_s,
            )
        )

    def _compare(
        self, lab: Lab, targets: Sequence[tuple[str, str, Path]], files: int, scenario: str = ""
    ) -> None:
        """Compares copies (side, volume, where it is) with their sources, two at a time."""
        self._say(f"comparing {', '.join(f'{volume} of {side}' for side, volume, _ in targets)}")
        with ProcessPoolExecutor(max_workers=2) as pool:
            compared = [
                pool.submit(differences, lab.a.path(f"/nfs/{volume}"), target, limit=10)
                for _, volume, target in targets
            ]
            for (side, volume, target), found in zip(targets, compared, strict=True):
                what = f"{scenario}, {volume}" if scenario else volume
                count = files or look(target)
                self.findings.equalities.append(Equality(side, what, count, tuple(found.result())))

    def _try(self, work: Callable[[], Pass], what: str) -> Pass | None:
        try:
            return work()
        except LabError as error:
            self.findings.failures.append(f"{what}: {error}")
            self._say(f"{what} FAILED: {error}")
            return None

    def _say(self, words: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._began_s), 60)
        print(f"[{minutes:3d}:{seconds:02d}] {words}", flush=True)


def _facts() -> dict[str, str]:
    facts = machine.facts()
    facts.pop("keepalived")
    said = subprocess.run(["rsync", "--version"], capture_output=True, text=True, check=False)
    return facts | {"rsync": said.stdout.split()[2] if said.stdout else "unknown"}


def _copy(source: Path, targets: Sequence[Path]) -> None:
    """On this machine, while no daemon runs: everything but what a side made for itself."""
    folders = [str(one) for one in source.iterdir() if one.name.startswith("folder")]
    with contextlib.ExitStack() as stack:
        copies = []
        for target in targets:
            copy = stack.enter_context(subprocess.Popen(["cp", "-a", "-t", str(target), *folders]))
            stack.callback(copy.kill)
            copies.append(copy)
        codes = [copy.wait(_COPY_S) for copy in copies]
    if any(codes):
        raise LabError(f"cp ended with {codes}")


def _fill(scenario: str, root: Path, seed: int) -> None:
    if scenario == "large":
        make_large(root, LARGE_BYTES // len(VOLUMES), 4, seed)
    else:
        make(Tree(SMALL_FILES // len(VOLUMES), 25), root)


def _time_of(work: Callable[[], None]) -> float:
    began_s = time.monotonic()
    work()
    return time.monotonic() - began_s


def _watch(pid: int, work: Callable[[], None]) -> tuple[float, float]:
    """CPU of a process and its children while work goes on, in percent of a core, and how long."""
    before_s, began_s = cpu_s([pid]), time.monotonic()
    work()
    took_s = time.monotonic() - began_s
    return 100 * (cpu_s([pid]) - before_s) / took_s, took_s


def _change_all_the_time(root: Path, tree: Tree) -> int:
    """Appends to so many files a second, in all folders; returns how many it made."""
    began_s, made = time.monotonic(), 0
    while (now_s := time.monotonic() - began_s) < JOURNAL_S:
        while made < now_s * JOURNAL_CHANGES_A_SECOND:
            with (root / tree.name(made, made // tree.folders)).open("ab", 0) as file:
                file.write(b"changed\n")
            made += 1
        time.sleep(0.005)
    return made


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    options = Options("replication", "nfsha beside cron", runs=3, most_runs=MAX_RUNS)
    options.add_choice("--sizes", TREES)
    options.add_choice("--only", PARTS)
    return options.read(argv)


def _require_space() -> None:
    free = shutil.disk_usage("/tmp").free
    if free < _FREE_BYTES:
        raise LabError(f"/tmp has {free >> 30} GiB free, {_FREE_BYTES >> 30} GiB are needed")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the bench; returns the exit code (`carry_out`)."""
    options = _options(argv)
    return carry_out(lambda: Bench(options))


if __name__ == "__main__":
    sys.exit(main())

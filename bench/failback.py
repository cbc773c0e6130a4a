"""The bench of failback: nfsha beside the manual runbook; `make bench-failback`.

It writes failback.md and failback.json, and ends with exit code 1 when a bar is not met. Needs
root, 20 GiB of disk below /tmp, and about twelve minutes with three rounds at all sizes.

    python -m bench.failback [--runs N] [--sizes N,...] [--only SIDE,...] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bench import failback_report as report
from bench import machine
from bench.ending import carry_out
from bench.failback_findings import SIDES, Equality, Findings, Sample, bars
from bench.failback_load import CAP_S, RECORD_EVERY_MS, Changer, seen
from bench.failback_sides import Moved, Nfsha, Runbook, Side
from bench.findings import Bar
from bench.options import Options
from bench.replication_trees import Tree, forget_files, make
from tests.netns.lab import Lab
from tests.netns.labkit.place import LabError
from tests.netns.labkit.records import Records
from tests.netns.treewalk import differences

TREES = {files: Tree(files, files // 500) for files in (10_000, 100_000, 1_000_000)}
"""Folders of one size, and at least twenty of them: the 20 changes are the same work everywhere."""

PAUSE_S = 2.0
"""The clients work for so long before the move: all 20 files have changed since the approach."""

AGED_S = 61.0
"""A failback compares by content what changed since a minute before the takeover. Of a large tree
that was made just now that would be all."""

_YOUNG_FILES = 100_000
_FREE_BYTES = 20 << 30
_READ_S = 60.0
_SHOWN = 10


class Bench:
    """One run of the bench: carries out the rounds and keeps what they found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._began_s = time.monotonic()
        self._configuration: dict[str, str] = {}
        self.findings = Findings(_facts(), options.runs)

    def run(self) -> None:
        """All sizes and sides that were asked for. Raises LabError when there is no room."""
        free = shutil.disk_usage("/tmp").free
        if free < _FREE_BYTES:
            raise LabError(f"/tmp has {free >> 30} GiB free, {_FREE_BYTES >> 30} GiB are needed")
        for size in self._options.sizes:
            try:
                self._tree(TREES[size])
            except LabError as error:
                self.findings.failures.append(f"{size:,} files: {error}")
                self._say(f"{size:,} files FAILED: {error}")

    @property
    def found_something(self) -> bool:
        """There is something to write."""
        return bool(self.findings.samples)

    def write(self) -> Path:
        """Writes what was found so far; returns the page."""
        out: Path = self._options.out
        report.write(out, self.findings, self._configuration)
        return out / "failback.md"

    def bars(self) -> list[Bar]:
        """Every bar, each with what was found."""
        return bars(self.findings)

    # ------------------------------------------------------------- one tree

    def _tree(self, tree: Tree) -> None:
        """All rounds of nfsha, then all of the runbook, on the same two filesystems."""
        size_mib = max(1024, tree.files * 6 // 1024 + 1024)
        lab = Lab(volumes=(tree.volume,), volume_mib=size_mib, inodes=tree.files + 20_000)
        with lab, contextlib.ExitStack() as stack:
            stack.callback(forget_files)
            self._say(f"{tree.files:,} files: making both trees")
            nfsha = Nfsha(lab) if "nfsha" in self._options.only else None
            if nfsha is not None:
                nfsha.pair_up()
            _make_both(lab, tree)
            made_s = time.monotonic()
            if nfsha is not None:
                nfsha.begin()
                nfsha.copy()
                if tree.files > _YOUNG_FILES:
                    time.sleep(max(0.0, made_s + AGED_S - time.monotonic()))
                self._rounds(nfsha, tree)
                self._compare(nfsha, tree)
                nfsha.end()
            if "runbook" in self._options.only:
                runbook = Runbook(lab)
                self._configuration = runbook.configuration()
                runbook.begin()
                self._rounds(runbook, tree)
                runbook.end()

    def _rounds(self, side: Side, tree: Tree) -> None:
        for run in range(1, self._options.runs + 1):
            sample = self._round(side, tree, run)
            self.findings.samples.append(sample)
            parts = ", ".join(f"{name} {ms:.0f}" for name, ms in sample.parts)
            self._say(
                f"{tree.files:,} files, {side.title}, round {run}: without service "
                f"{sample.outage_ms / 1000:.2f} s ({parts}); near in {sample.approach_s:.1f} s, "
                f"moved in {sample.move_s:.1f} s"
            )

    def _round(self, side: Side, tree: Tree, run: int) -> Sample:
        side.lose_the_primary()
        began_s = time.monotonic()
        side.approach()
        approach_s = time.monotonic() - began_s
        path = f"/{tree.folder(0)}/records-{side.name}-{run}"
        writer = side.lab.write_records(path=path, interval_ms=RECORD_EVERY_MS, cap_s=CAP_S)
        changer = Changer(side.lab, tree)
        changer.start()
        try:
            writer.wait_acked(20)
            time.sleep(PAUSE_S)
            moved = side.go_home()
            writer.wait_acked(50, timeout_s=CAP_S)
        finally:
            changer.end()
            records = writer.stop()
        changer.wait()
        side.settle()
        lost = [*_lost(side.lab, path, records), *changer.lost()]
        return _sample(side, tree, run, approach_s, moved, records, changer, lost)

    def _compare(self, nfsha: Nfsha, tree: Tree) -> None:
        self._say("comparing both copies of nfsha")
        nfsha.copy()
        left, right = (node.path(f"/nfs/{tree.volume}") for node in (nfsha.lab.a, nfsha.lab.b))
        here, there = (
            {one.name for one in root.iterdir() if not one.name.startswith(".nfsha-")}
            for root in (left, right)
        )
        found = [f"{name}: on one side only" for name in sorted(here ^ there)]
        pairs = [(left / name, right / name) for name in sorted(here & there)]
        with ProcessPoolExecutor(max_workers=2) as pool:
            for one in pool.map(_differences, pairs, chunksize=20):
                found += one
        self.findings.equalities.append(Equality(tree.files, tuple(found[:_SHOWN])))

    def _say(self, words: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._began_s), 60)
        print(f"[{minutes:3d}:{seconds:02d}] {words}", flush=True)


def _sample(
    side: Side,
    tree: Tree,
    run: int,
    approach_s: float,
    moved: Moved,
    records: Records,
    changer: Changer,
    lost: Sequence[str],
) -> Sample:
    found = seen(records, moved.asked_ns)
    ends = [*moved.parts, ("until the client's next acknowledgement", found.outage.end_ns)]
    starts = [moved.began_ns, *(end_ns for _, end_ns in moved.parts)]
    return Sample(
        side=side.name,
        size=tree.files,
        run=run,
        outage_ms=round(found.outage.ms, 2),
        approach_s=round(approach_s, 2),
        move_s=round((moved.ended_ns - moved.asked_ns) / 1e9, 2),
        parts=tuple(
            (name, round((end_ns - start_ns) / 1e6, 2))
            for (name, end_ns), start_ns in zip(ends, starts, strict=True)
        ),
        operations=found.operations,
        acknowledged=len(records.acked) + changer.acknowledged,
        stale=found.stale + changer.stale,
        failed=found.failed + changer.failed,
        lost=tuple(lost),
    )


def _lost(lab: Lab, path: str, records: Records) -> list[str]:
    """Acknowledged records that cannot be read back through the VIP, in words."""
    there = lab.read_records(path=path, cap_s=_READ_S)
    missing = sorted(set(records.acked) - there.keys())
    return [f"{path}: {len(missing)} records, {missing[0]} the first"] if missing else []


def _make_both(lab: Lab, tree: Tree) -> None:
    """The same tree on both nodes, times and all: made twice, for no volume is copied by blocks."""
    when_ns = time.time_ns()
    with ProcessPoolExecutor(max_workers=2) as pool:
        roots = [node.path(f"/nfs/{tree.volume}") for node in (lab.a, lab.b)]
        for made in [pool.submit(make, tree, root, when_ns) for root in roots]:
            made.result()
    os.sync()


def _differences(pair: tuple[Path, Path]) -> list[str]:
    return [f"{pair[0].name}: {one}" for one in differences(*pair, limit=_SHOWN)]


def _facts() -> dict[str, str]:
    said = subprocess.run(["rsync", "--version"], capture_output=True, text=True, check=False)
    return machine.facts() | {"rsync": said.stdout.split()[2] if said.stdout else "unknown"}


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    options = Options("failback", "nfsha beside the runbook", runs=3, most_runs=20)
    options.add_choice("--sizes", TREES)
    options.add_choice("--only", SIDES)
    return options.read(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the bench; returns the exit code (`carry_out`)."""
    options = _options(argv)
    return carry_out(lambda: Bench(options))


if __name__ == "__main__":
    sys.exit(main())

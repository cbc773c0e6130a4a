"""The findings as a page for people (replication.md) and as raw samples (replication.json)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from bench.replication_findings import (
    FIRST,
    PASSES,
    SIDES,
    Findings,
    Sample,
    bars,
    left_unequal,
    sizes,
)
from bench.tables import bars_table, facts_table, table

_Figure = tuple[str, str, Callable[[Sample], float]]
_DURABLE: _Figure = ("until all is on the disk (s)", ".2f", lambda one: one.durable_s)
_FIGURES: tuple[_Figure, ...] = (
    ("wall time (s)", ".2f", lambda one: one.wall_s),
    ("CPU time, both nodes (s)", ".2f", lambda one: one.cpu_s),
    ("on the wire (KiB)", ",.0f", lambda one: one.wire_bytes / 1024),
    ("peak memory, both nodes (MiB)", ".0f", lambda one: one.peak_mib),
)


def write(folder: Path, findings: Findings, configuration: dict[str, str]) -> None:
    """Writes replication.md, replication.json, and the files of the cron rsync beside."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = asdict(findings) | {"bars": [asdict(bar) for bar in bars(findings)]}
    (folder / "replication.json").write_text(json.dumps(raw, indent=1) + "\n")
    (folder / "replication.md").write_text(page(findings))
    for name, text in configuration.items():
        (folder / f"replication-{name}").write_text(text)


def page(findings: Findings) -> str:
    """The whole page."""
    parts = [
        "# Replication: nfsha beside rsync from cron",
        "Made by `make bench-replication`; the raw samples are in `replication.json`, the files of "
        "the cron rsync are beside it. Both copied from one storage node to the other in one lab "
        "of network namespaces, to filesystems made alike (ext4, loop-mounted), in turns, with a "
        "warm cache. The client's changes went through a real NFS server, after the kernel had "
        "dropped all names. nfsha's time is that of the whole command `nfsha sync VOLUME --wait`, "
        "its own start with it; its CPU time and memory are those of both daemons and all their "
        "children (with the daemons' start in initial copies). An initial copy of nfsha ends when "
        "everything is on the disk, that of the cron rsync while its last writes are still in "
        "memory; a row tells when these are on the disk too. Cells: minimum / **median** / "
        "maximum of "
        f"{findings.runs} run{'s' if findings.runs != 1 else ''}.",
        facts_table(findings.facts),
        "## Bars",
        bars_table(bars(findings)),
    ]
    for size in sizes(findings):
        for scenario, words in PASSES.items():
            parts += [f"## {size:,} files: {words}", _cells(findings, scenario, size)]
    for scenario, words in FIRST.items():
        if any(one.scenario == scenario for one in findings.samples):
            parts += [f"## {words[0].upper()}{words[1:]}", _cells(findings, scenario, 0)]
    parts += [*_walks(findings), *_journal(findings), *_equal(findings), *_failures(findings)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _cells(findings: Findings, scenario: str, size: int) -> str:
    figures = [_FIGURES[0], _DURABLE, *_FIGURES[1:]] if scenario in FIRST else _FIGURES
    rows = [
        [title, *(_cell(findings, side, scenario, size, form, figure) for side in SIDES)]
        for title, form, figure in figures
    ]
    return table(["", *SIDES.values()], rows)


def _cell(
    findings: Findings,
    side: str,
    scenario: str,
    size: int,
    form: str,
    figure: Callable[[Sample], float],
) -> str:
    spread = findings.spread(side, scenario, size, figure)
    if spread is None:
        return "-"
    return f"{spread.least:{form}} / **{spread.median:{form}}** / {spread.most:{form}}"


def _walks(findings: Findings) -> list[str]:
    timed = [one for one in findings.samples if one.side == "nfsha" and one.scenario in PASSES]
    if not timed:
        return []
    walks = sum(one.full_walks for one in timed)
    return [f"Full walks in the {len(timed)} timed passes of nfsha: {walks}."]


def _journal(findings: Findings) -> list[str]:
    found = findings.journal
    if found is None:
        return []
    return [
        "## The change journal",
        f"{found.changes_a_second:,.0f} changes a second for {found.seconds:.0f} s: the active "
        f"daemon used {found.busy_percent:.2f} % of a core, {found.idle_percent:.2f} % before. "
        f"The changes cost {found.percent:.2f} %.",
    ]


def _equal(findings: Findings) -> list[str]:
    if not findings.equalities:
        return []
    rows = [
        [
            SIDES[one.side],
            one.what,
            f"{one.files:,}",
            "equal" if not one.differences else f"**differs**: {one.differences[0]}",
        ]
        for one in findings.equalities
    ]
    head = ["copy", "tree", "files", "compared with its source, all contents read"]
    return ["## Trees afterwards", table(head, rows), *_of_cron(findings)]


def _of_cron(findings: Findings) -> list[str]:
    unequal = left_unequal(findings)
    if not unequal:
        return []
    trees = ", ".join(one.what for one in unequal)
    return [
        f"The cron rsync left {len(unequal)} of its own copies different from the source ({trees}) "
        "with exit code 0. Two times within the same second are equal for it, which explains "
        "nanoseconds that differ. No bar judges that."
    ]


def _failures(findings: Findings) -> list[str]:
    if not findings.failures:
        return []
    lines = [f"- {one.splitlines()[0]}" for one in findings.failures]
    return ["## What failed", "\n".join(lines)]

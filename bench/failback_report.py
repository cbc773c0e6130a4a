"""The findings as a page for people (failback.md) and as raw samples (failback.json)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from bench.failback_findings import SIDES, Findings, Sample, bars, sizes
from bench.failback_sides import ADVERT_S, RUNBOOK
from bench.measure import Spread
from bench.tables import bars_table, facts_table, table

_TITLES = {"a": "primary", "b": "standby"}


def write(folder: Path, findings: Findings, configuration: Mapping[str, str]) -> None:
    """Writes failback.md, failback.json, and the runbook's configuration files beside."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = asdict(findings) | {"bars": [asdict(bar) for bar in bars(findings)]}
    (folder / "failback.json").write_text(json.dumps(raw, indent=1) + "\n")
    (folder / "failback.md").write_text(page(findings))
    for name, text in configuration.items():
        (folder / f"failback-{name}").write_text(text)


def page(findings: Findings) -> str:
    """The whole page."""
    parts = [
        "# Failback: nfsha beside the manual runbook",
        _how(findings),
        facts_table(findings.facts),
        "## Bars",
        bars_table(bars(findings)),
        "## Time without service (s)",
        "Longest time from one acknowledged operation of a client (open by path, write, commit, "
        "close; one each 20 ms, on one connection) to the next, around the move.",
        _cells(findings, lambda one: one.outage_ms / 1000),
        "## The whole way home (s)",
        "From the primary's boot until it serves again, without the pause in which only clients "
        "work: the resync or the first rsync, and the move.",
        _cells(findings, lambda one: one.approach_s + one.move_s),
    ]
    for side, title in SIDES.items():
        parts += _parts(findings, side, title)
    parts += [*_losses(findings), *_equal(findings), *_failures(findings)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _how(findings: Findings) -> str:
    steps = "\n".join(f"- {_TITLES[node]}: `{typed}`: {why}" for node, typed, why in RUNBOOK)
    return (
        "Made by `make bench-failback`; the raw samples, with every operation of the client around "
        "each outage, are in `failback.json`; the runbook's files are beside it. For each tree one "
        "lab (two storage nodes with nfs-ganesha, a client, network namespaces of one machine): "
        "first all rounds of nfsha, then, on the same two filesystems, all of the runbook, so "
        "that it finds the warmer cache. In each round the primary is cut off its power while it "
        "serves, the standby takes over, the primary boots; then two clients work through the VIP: "
        "one writes a record each 20 ms, one changes 20 files in 20 folders (of 500 files each, in "
        "every tree), one each 25 ms, from before the move to after it. nfsha: the returned node "
        "resyncs by itself, then `nfsha failback --yes`, all as shipped (but that passes do not "
        "come by themselves meanwhile). The runbook, with no time lost for typing or "
        "thinking, and keepalived's advert at "
        f"{ADVERT_S:g} s (its default of 1 s makes each move about 3 s longer):\n\n{steps}\n\n"
        f"Cells: minimum / **median** / maximum of {findings.runs} "
        f"round{'s' if findings.runs != 1 else ''}."
    )


def _cells(findings: Findings, figure: Callable[[Sample], float]) -> str:
    rows = [
        [f"{size:,} files", *(_cell(findings.spread(side, size, figure)) for side in SIDES)]
        for size in sizes(findings)
    ]
    return table(["", *SIDES.values()], rows)


def _cell(spread: Spread | None, form: str = ".2f") -> str:
    if spread is None:
        return "-"
    return f"{spread.least:{form}} / **{spread.median:{form}}** / {spread.most:{form}}"


def _parts(findings: Findings, side: str, title: str) -> list[str]:
    found = {size: findings.parts_ms(side, size) for size in sizes(findings)}
    names = list(dict.fromkeys(name for parts in found.values() for name in parts))
    if not names:
        return []
    rows = [[name, *(_cell(parts.get(name), ".0f") for parts in found.values())] for name in names]
    head = [title, *(f"{size:,} files" for size in found)]
    return [f"## What the time without service goes into: {title} (ms)", table(head, rows)]


def _losses(findings: Findings) -> list[str]:
    rows = [
        [
            SIDES[side],
            f"{size:,}",
            str(len(found)),
            str(sum(one.acknowledged for one in found)),
            str(sum(one.stale for one in found)),
            str(sum(one.failed for one in found)),
            str(sum(len(one.lost) for one in found)),
        ]
        for side in SIDES
        for size in sizes(findings)
        if (found := findings.of(side, size))
    ]
    if not rows:
        return []
    head = ["", "files", "moves", "operations acknowledged", "stale", "failed", "lost"]
    return [
        "## What became of the clients' operations",
        "Stale: under way at the move, its file open on the old node (docs/limits.md). Lost: "
        "acknowledged, and not there afterwards, read through the VIP on a new connection.",
        table(head, rows),
    ]


def _equal(findings: Findings) -> list[str]:
    if not findings.equalities:
        return []
    rows = [
        [
            f"{one.size:,}",
            "equal" if not one.differences else f"**differs**: {one.differences[0]}",
        ]
        for one in findings.equalities
    ]
    head = ["files", "nfsha's two copies after all rounds and one pass, all contents read"]
    return ["## Trees afterwards", table(head, rows)]


def _failures(findings: Findings) -> list[str]:
    if not findings.failures:
        return []
    lines = [f"- {one.splitlines()[0]}" for one in findings.failures]
    return ["## What failed", "\n".join(lines)]

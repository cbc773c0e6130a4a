"""The findings as a page for people (failover.md) and as raw samples (failover.json)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from bench.contestants import KINDS, Kind
from bench.faults import FAULTS, Fault
from bench.findings import Findings, bars
from bench.measure import Spread
from bench.tables import bars_table, facts_table, table
from bench.trial import Sample

_FIGURES: tuple[tuple[str, str, Callable[[Sample], float]], ...] = (
    (
        "Outage of a fresh RPC NULL each 5 ms (ms)",
        "From the last success before to the first after, on a new TCP connection each time. Where "
        "keepalived shows next to none after `kill -9`, SIGSTOP or a cut, both nodes held the "
        "address meanwhile: see below.",
        lambda one: one.outage_null_ms,
    ),
    (
        "Outage of NFS operations (ms)",
        "Longest time from one acknowledged write (open by path, write, commit, close; one each "
        "20 ms, on one connection) to the next. TCP's retransmission quantises it.",
        lambda one: one.outage_nfs_ms,
    ),
    (
        "Two holders of the address (ms)",
        "How long both nodes had the VIP, by the kernel's address events, in the watched window "
        "(the same for all contestants: with nobody to intervene it would go on).",
        lambda one: one.overlap_addresses_ms,
    ),
    (
        "Both answer NFS (ms)",
        "From the first answer of the new node to the last of the old one, by packets that left "
        "their ports; repetitions of the same bytes by TCP left out (the bars count them too).",
        lambda one: one.overlap_answers_ms,
    ),
)


def write(folder: Path, findings: Findings, configurations: dict[str, dict[str, str]]) -> None:
    """Writes failover.md, failover.json, and the configuration files of keepalived beside."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = asdict(findings) | {
        "bars": [asdict(bar) for bar in bars(findings)],
        "configurations": configurations,
    }
    (folder / "failover.json").write_text(json.dumps(raw, indent=1) + "\n")
    (folder / "failover.md").write_text(page(findings))
    for kind in KINDS:
        if not kind.ours:
            for node, text in configurations.get(kind.name, {}).items():
                (folder / f"{kind.name}-{node}.conf").write_text(text)


def page(findings: Findings) -> str:
    """The whole page."""
    parts = [
        "# Failover: nfsha beside keepalived",
        "Made by `make bench-failover`; the raw samples with all times are in `failover.json`, the "
        "configuration of keepalived is beside it. All four contestants ran side by side, run by "
        "run, each in a lab of its own: two storage nodes with nfs-ganesha, a client, a third "
        "place, in network namespaces of one machine. Cells: minimum / **median** / maximum of "
        f"{findings.runs} run{'s' if findings.runs != 1 else ''}.",
        facts_table(findings.facts),
        "## Bars",
        bars_table(bars(findings)),
    ]
    for title, words, figure in _FIGURES:
        parts += [f"## {title}", words, _figures(findings, figure)]
    parts += ["## Without a fault", _calm(findings), _idle(findings), *_failures(findings)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _figures(findings: Findings, figure: Callable[[Sample], float]) -> str:
    head = ["fault", *(kind.title for kind in KINDS)]
    rows = [
        [fault.title, *(_cell(findings, kind, fault, figure) for kind in KINDS)] for fault in FAULTS
    ]
    return table(head, rows)


def _cell(findings: Findings, kind: Kind, fault: Fault, figure: Callable[[Sample], float]) -> str:
    spread = findings.spread(kind.name, fault.name, figure)
    if spread is None:
        return "-"
    lost = sum(not one.recovered for one in findings.of(kind.name, fault.name))
    return _spread(spread) + (f" ({lost} without service at the end)" if lost else "")


def _spread(spread: Spread) -> str:
    if spread.least == spread.most == 0:
        return "0"
    return f"{spread.least:.0f} / **{spread.median:.0f}** / {spread.most:.0f}"


def _calm(findings: Findings) -> str:
    if not findings.calm:
        return ""
    rows = [
        [
            next(kind.title for kind in KINDS if kind.name == one.contestant),
            f"{one.minutes:g}",
            f"{one.busy_percent:.0f} %",
            str(one.takeovers),
            str(one.releases),
            "-" if one.late_turns is None else str(one.late_turns),
        ]
        for one in findings.calm
    ]
    head = ["all cores busy", "minutes", "CPU used", "takeovers", "releases", "late turns"]
    return table(head, rows)


def _idle(findings: Findings) -> str:
    rows = [
        [
            f"{next(kind.title for kind in KINDS if kind.name == one.contestant)}, {one.state}",
            f"{one.seconds:.0f}",
            f"{one.cpu_percent:.2f} %",
            f"{one.rss_mib:.1f}",
        ]
        for one in findings.idle
    ]
    return table(["idle daemon", "seconds", "of a core", "MiB resident"], rows) if rows else ""


def _failures(findings: Findings) -> list[str]:
    if not findings.failures:
        return []
    lines = [
        f"- {one.contestant}, {one.fault}, run {one.run}: {one.error.splitlines()[0]}"
        for one in findings.failures
    ]
    return ["## Trials that gave no sample", "\n".join(lines)]

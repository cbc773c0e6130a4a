"""What one run of the bench of failback has found, and whether it meets the bars. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.findings import Bar
from bench.measure import Spread

SIDES = {"nfsha": "nfsha", "runbook": "manual runbook"}
SMALLEST, LARGEST = 10_000, 1_000_000
OUTAGE_MS = 1500.0
FLAT = 1.5
"""A hundred times as many files make the stall at most so much longer: flat, but for noise."""

GROWS = 2.0
_UNMEASURED = "not measured"


@dataclass(frozen=True)
class Sample:
    """One way home of one side. size: files of the tree.

    outage_ms: longest time between two acknowledged operations of the client that writes records.
    approach_s, move_s: how long its steps with and (mostly) without service took. parts: what the
    outage went into, in ms. operations: sent, ended (ms after the outage began), error, of all
    that ended within a second around it. stale, failed: operations of both clients that failed.
    acknowledged: operations of both. lost: what was, and is not there afterwards, in words.
    """

    side: str
    size: int
    run: int
    outage_ms: float
    approach_s: float
    move_s: float
    parts: tuple[tuple[str, float], ...]
    operations: tuple[tuple[float, float, str], ...]
    acknowledged: int
    stale: int
    failed: int
    lost: tuple[str, ...]


@dataclass(frozen=True)
class Equality:
    """Both copies of nfsha's tree, compared by a walk of our own. differences: the first few."""

    size: int
    differences: tuple[str, ...]


@dataclass
class Findings:
    """Everything of one run."""

    facts: dict[str, str]
    runs: int
    samples: list[Sample] = field(default_factory=list)
    equalities: list[Equality] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def of(self, side: str, size: int) -> list[Sample]:
        """The samples of one cell of the tables."""
        return [one for one in self.samples if (one.side, one.size) == (side, size)]

    def spread(self, side: str, size: int, figure: Callable[[Sample], float]) -> Spread | None:
        """Minimum, median and maximum of one figure of one cell; None without samples."""
        return Spread.of(figure(one) for one in self.of(side, size))

    def outage_ms(self, side: str, size: int) -> Spread | None:
        """The outages of one cell."""
        return self.spread(side, size, lambda one: one.outage_ms)

    def parts_ms(self, side: str, size: int) -> dict[str, Spread]:
        """What the outages of one cell went into."""
        found: dict[str, list[float]] = {}
        for one in self.of(side, size):
            for name, ms in one.parts:
                found.setdefault(name, []).append(ms)
        spreads = {name: Spread.of(values) for name, values in found.items()}
        return {name: spread for name, spread in spreads.items() if spread is not None}


def bars(findings: Findings) -> list[Bar]:
    """Every bar, each with what was found."""
    return [
        _short(findings),
        _growth(
            findings,
            "nfsha",
            f"nfsha: flat: at most {FLAT:g} times longer at {LARGEST:,} files than at {SMALLEST:,}",
            lambda times: times <= FLAT,
        ),
        _growth(
            findings,
            "runbook",
            f"the runbook's grows: more than {GROWS:g} times from {SMALLEST:,} to {LARGEST:,}",
            lambda times: times > GROWS,
        ),
        _nothing_lost(findings),
        _complete(findings),
    ]


def _short(findings: Findings) -> Bar:
    text = (
        f"nfsha: at {LARGEST:,} files, {_CHANGED}: longest time without service at most "
        f"{OUTAGE_MS / 1000:g} s"
    )
    found = findings.outage_ms("nfsha", LARGEST)
    if found is None:
        return Bar(text, _UNMEASURED, None)
    return Bar(text, f"{found.most / 1000:.2f} s", found.most <= OUTAGE_MS)


_CHANGED = "20 changed under a running writer"


def _growth(findings: Findings, side: str, text: str, good: Callable[[float], bool]) -> Bar:
    small, large = (findings.outage_ms(side, size) for size in (SMALLEST, LARGEST))
    if small is None or large is None:
        return Bar(text, _UNMEASURED, None)
    times = large.median / small.median
    said = f"{small.median / 1000:.2f} s, {large.median / 1000:.2f} s: {times:.2f} times"
    return Bar(text, said, good(times))


def _nothing_lost(findings: Findings) -> Bar:
    text = (
        "nfsha: every acknowledged record and change is there afterwards, both copies are equal, "
        "and no operation failed but those under way at the move (ESTALE, at most one of each "
        "client)"
    )
    ours = [one for one in findings.samples if one.side == "nfsha"]
    if not ours:
        return Bar(text, _UNMEASURED, None)
    lost = sum(len(one.lost) for one in ours)
    failed = sum(one.failed for one in ours)
    stale = max(one.stale for one in ours)
    other = sum(bool(one.differences) for one in findings.equalities)
    said = (
        f"{lost} lost, {other} of {len(findings.equalities)} trees differ, {failed} failed, at "
        f"most {stale} of both clients under way in one of {len(ours)} moves"
    )
    compared = {one.size for one in findings.equalities}
    good = not (lost or failed or other) and stale <= _CLIENTS
    if good and compared != {one.size for one in ours}:
        return Bar(text, said, None)
    return Bar(text, said, good)


_CLIENTS = 2


def _complete(findings: Findings) -> Bar:
    text = "every round gave a sample"
    if not findings.samples and not findings.failures:
        return Bar(text, _UNMEASURED, None)
    said = f"{len(findings.samples)} samples, {len(findings.failures)} failed"
    return Bar(text, said, not findings.failures)


def sizes(findings: Findings) -> Sequence[int]:
    """The sizes of trees that were measured, smallest first."""
    return sorted({one.size for one in findings.samples})

"""What one run of the bench of replication has found, and whether it meets the bars. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.findings import Bar
from bench.measure import Spread

SIDES = {"cron": "rsync from cron", "nfsha": "nfsha"}
PASSES = {"calm": "nothing changed", "changes": "20 changes in different folders"}
FIRST = {
    "large": "initial copy of 1 GiB in large files, four volumes",
    "small": "initial copy of 100,000 small files, four volumes",
}

LARGEST, SMALLEST = 1_000_000, 10_000
SHARE_OF_CRON = 1 / 20
GROWTH = 2.0
FIRST_SHARE = 1.1
JOURNAL_PERCENT = 3.0
CHANGES_A_SECOND = 1000.0
_UNMEASURED = "not measured"


@dataclass(frozen=True)
class Sample:
    """One pass of one side. size: files of the tree; scenario: of PASSES or FIRST."""

    side: str
    scenario: str
    size: int
    run: int
    wall_s: float
    cpu_s: float
    wire_bytes: int
    peak_mib: float
    walk: str = ""
    full_walks: int = 0
    durable_s: float = 0.0
    """Of an initial copy: until all of it is on the disk, the wall time included."""


@dataclass(frozen=True)
class Equality:
    """An independent comparison of a copy with its source. differences: the first few, in words."""

    side: str
    what: str
    files: int
    differences: tuple[str, ...]


@dataclass(frozen=True)
class Journal:
    """What the change journal cost while files changed: the active daemon's CPU, in percent."""

    seconds: float
    changes_a_second: float
    idle_percent: float
    busy_percent: float

    @property
    def percent(self) -> float:
        """What the changes added."""
        return self.busy_percent - self.idle_percent


@dataclass
class Findings:
    """Everything of one run."""

    facts: dict[str, str]
    runs: int
    samples: list[Sample] = field(default_factory=list)
    equalities: list[Equality] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    journal: Journal | None = None

    def of(self, side: str, scenario: str, size: int) -> list[Sample]:
        """The samples of one cell of the tables."""
        wanted = (side, scenario, size)
        return [one for one in self.samples if (one.side, one.scenario, one.size) == wanted]

    def spread(
        self, side: str, scenario: str, size: int, figure: Callable[[Sample], float]
    ) -> Spread | None:
        """Minimum, median and maximum of one figure of one cell; None without samples."""
        return Spread.of(figure(one) for one in self.of(side, scenario, size))

    def wall_s(self, side: str, scenario: str, size: int) -> float | None:
        """The median of the wall times of one cell."""
        spread = self.spread(side, scenario, size, lambda one: one.wall_s)
        return None if spread is None else spread.median


def bars(findings: Findings) -> list[Bar]:
    """Every bar, each with what was found."""
    return [
        _against_cron(findings),
        _growth(findings),
        *(_first(findings, scenario) for scenario in FIRST),
        _journal(findings),
        _full_walks(findings),
        _equal(findings),
    ]


def _against_cron(findings: Findings) -> Bar:
    text = f"20 changed of {LARGEST:,}: at most 1/20 of the cron rsync's time"
    ours = findings.wall_s("nfsha", "changes", LARGEST)
    cron = findings.wall_s("cron", "changes", LARGEST)
    if ours is None or cron is None:
        return Bar(text, _UNMEASURED, None)
    return Bar(
        text, f"{ours:.2f} s of {cron:.2f} s: 1/{cron / ours:.1f}", ours <= cron * SHARE_OF_CRON
    )


def _growth(findings: Findings) -> Bar:
    text = f"20 changed: less than {GROWTH:g} times longer in {LARGEST:,} than in {SMALLEST:,}"
    large = findings.wall_s("nfsha", "changes", LARGEST)
    small = findings.wall_s("nfsha", "changes", SMALLEST)
    if large is None or small is None:
        return Bar(text, _UNMEASURED, None)
    return Bar(
        text, f"{large:.2f} s, {small:.2f} s: {large / small:.2f} times", large / small < GROWTH
    )


def _first(findings: Findings, scenario: str) -> Bar:
    text = f"{FIRST[scenario]}: at most {FIRST_SHARE:g} times the plain rsync's time"
    ours = findings.wall_s("nfsha", scenario, 0)
    cron = findings.wall_s("cron", scenario, 0)
    if ours is None or cron is None:
        return Bar(text, _UNMEASURED, None)
    return Bar(
        text, f"{ours:.2f} s, {cron:.2f} s: {ours / cron:.2f} times", ours <= cron * FIRST_SHARE
    )


def _journal(findings: Findings) -> Bar:
    text = (
        f"the change journal: below {JOURNAL_PERCENT:g} % of a core at {CHANGES_A_SECOND:,.0f} "
        "changes a second"
    )
    found = findings.journal
    if found is None:
        return Bar(text, _UNMEASURED, None)
    said = f"{found.percent:.2f} % at {found.changes_a_second:,.0f}"
    if found.changes_a_second < 0.95 * CHANGES_A_SECOND:
        return Bar(text, f"{said}: too few to tell", None)
    return Bar(text, said, found.percent < JOURNAL_PERCENT)


def _full_walks(findings: Findings) -> Bar:
    text = "no full walk in a timed pass of nfsha"
    timed = [one for one in findings.samples if one.side == "nfsha" and one.scenario in PASSES]
    if not timed:
        return Bar(text, _UNMEASURED, None)
    walks = sum(one.full_walks for one in timed)
    others = sum(one.walk != "folders" for one in timed)
    said = f"{walks} in {len(timed)} passes, {others} that did not go by folders"
    return Bar(text, said, walks == 0 and others == 0)


def _equal(findings: Findings) -> Bar:
    text = "every tree of nfsha equal to its source afterwards, and no pass failed"
    if not findings.equalities and not findings.failures:
        return Bar(text, _UNMEASURED, None)
    ours = [one for one in findings.equalities if one.side == "nfsha"]
    other = [one for one in ours if one.differences]
    said = f"{len(ours)} trees, {len(other)} differ, {len(findings.failures)} failed"
    return Bar(text, said, not other and not findings.failures)


def left_unequal(findings: Findings) -> list[Equality]:
    """Copies of the other contestant that differ from their source: a fact of it, and no bar."""
    return [one for one in findings.equalities if one.side == "cron" and one.differences]


def sizes(findings: Findings) -> Sequence[int]:
    """The sizes of trees that were measured, smallest first."""
    return sorted({one.size for one in findings.samples if one.scenario in PASSES})

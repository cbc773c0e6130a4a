"""What one run of the bench has found, and whether it meets the bars. Pure: no lab, no files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.calm import Calm
from bench.contestants import KINDS, Kind
from bench.faults import BY_NAME as FAULT_BY_NAME
from bench.idle import Idle
from bench.measure import Spread
from bench.trial import Sample

DEATH_MS = {"nfsha": 1100.0, "nfsha-fast": 500.0}
STOP_MARGIN_MS = 100.0
CALM_MINUTES = 10.0
IDLE_PERCENT = 2.0
IDLE_MIB = 60.0
NEVER_TWO = ("kill", "freeze", "cut-active", "cut-passive")
OURS = tuple(kind for kind in KINDS if kind.ours)


@dataclass(frozen=True)
class Failure:
    """A trial that gave no sample: the lab or the contestant failed."""

    contestant: str
    fault: str
    run: int
    error: str


@dataclass
class Findings:
    """Everything of one run."""

    facts: dict[str, str]
    runs: int
    samples: list[Sample] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    idle: list[Idle] = field(default_factory=list)
    calm: list[Calm] = field(default_factory=list)

    def of(self, contestant: str, fault: str) -> list[Sample]:
        """The samples of one cell of the tables."""
        return [one for one in self.samples if one.contestant == contestant and one.fault == fault]

    def spread(
        self, contestant: str, fault: str, figure: Callable[[Sample], float]
    ) -> Spread | None:
        """Minimum, median and maximum of one figure of one cell; None without samples."""
        return Spread.of(figure(one) for one in self.of(contestant, fault))


@dataclass(frozen=True)
class Bar:
    """One bar. met None: this run did not measure it."""

    text: str
    found: str
    met: bool | None


_UNMEASURED = "not measured"


def bars(findings: Findings) -> list[Bar]:
    """Every bar, each with what was found."""
    found: list[Bar] = []
    for kind in OURS:
        found += [_death(findings, kind), _stop(findings, kind)]
        found += [_never_two(findings, kind, fault) for fault in NEVER_TWO]
        found += [_calm(findings, kind), *_idle(findings, kind)]
    return [*found, _complete(findings)]


def _death(findings: Findings, kind: Kind) -> Bar:
    text = f"{kind.title}: node death, median outage at most {DEATH_MS[kind.name]:.0f} ms"
    spread = findings.spread(kind.name, "death", lambda one: one.outage_null_ms)
    if spread is None:
        return Bar(text, _UNMEASURED, None)
    return Bar(text, f"{spread.median:.0f} ms", spread.median <= DEATH_MS[kind.name])


def _stop(findings: Findings, kind: Kind) -> Bar:
    limit_ms = (kind.takeover_after_ms or 0) + STOP_MARGIN_MS
    text = f"{kind.title}: clean stop, longest outage at most {limit_ms:.0f} ms"
    spread = findings.spread(kind.name, "stop", lambda one: one.outage_null_ms)
    if spread is None:
        return Bar(text, _UNMEASURED, None)
    return Bar(text, f"{spread.most:.0f} ms", spread.most <= limit_ms)


def _never_two(findings: Findings, kind: Kind, name: str) -> Bar:
    fault = FAULT_BY_NAME[name]
    text = (
        f"{kind.title}: {fault.title}: no overlap of holders, none of answers, "
        f"and {fault.right} alone holds the address at the end"
    )
    samples = findings.of(kind.name, name)
    if not samples:
        return Bar(text, _UNMEASURED, None)
    two_ms = max(one.overlap_addresses_ms for one in samples)
    answers_ms = max(one.overlap_frames_ms for one in samples)
    right = sum(one.holders_at_end == (fault.right,) for one in samples)
    return Bar(
        text,
        f"{two_ms:.1f} ms, {answers_ms:.1f} ms, {right} of {len(samples)} times",
        two_ms == 0 and answers_ms == 0 and right == len(samples),
    )


def _calm(findings: Findings, kind: Kind) -> Bar:
    text = f"{kind.title}: no false takeover in {CALM_MINUTES:.0f} minutes with all cores busy"
    calm = next((one for one in findings.calm if one.contestant == kind.name), None)
    if calm is None:
        return Bar(text, _UNMEASURED, None)
    said = (
        f"{calm.takeovers} takeovers, {calm.releases} releases, {len(calm.moves)} changes of phase "
        f"in {calm.minutes:g} minutes"
    )
    if calm.undisturbed and calm.minutes < CALM_MINUTES:
        return Bar(text, f"{said}: too short to tell", None)
    return Bar(text, said, calm.undisturbed)


def _idle(findings: Findings, kind: Kind) -> tuple[Bar, Bar]:
    cpu = f"{kind.title}: idle, at most {IDLE_PERCENT:g} % of a core"
    memory = f"{kind.title}: idle, at most {IDLE_MIB:g} MiB resident"
    idle = [one for one in findings.idle if one.contestant == kind.name]
    if not idle:
        return Bar(cpu, _UNMEASURED, None), Bar(memory, _UNMEASURED, None)
    percent = max(one.cpu_percent for one in idle)
    mib = max(one.rss_mib for one in idle)
    return (
        Bar(cpu, f"{percent:.2f} %", percent <= IDLE_PERCENT),
        Bar(memory, f"{mib:.1f} MiB", mib <= IDLE_MIB),
    )


def _complete(findings: Findings) -> Bar:
    """A trial that failed, or a client that never got service again, is no good result."""
    lost = [one for one in findings.samples if not one.recovered and _is_ours(one.contestant)]
    said = f"{len(findings.failures)} failed, {len(lost)} of nfsha without service at the end"
    text = "every trial gave a sample, and writes worked at the end of each of nfsha's"
    if not findings.samples and not findings.failures:
        return Bar(text, _UNMEASURED, None)
    return Bar(text, said, not findings.failures and not lost)


def _is_ours(contestant: str) -> bool:
    return contestant in {kind.name for kind in OURS}


def passed(judged: Sequence[Bar]) -> bool:
    """Whether no bar that was measured is missed."""
    return all(bar.met is not False for bar in judged)

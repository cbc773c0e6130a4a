"""What the bench makes of its samples: bars, the page, the raw file, the options."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bench import failover, report
from bench.calm import Calm
from bench.contestants import KINDS
from bench.faults import FAULTS
from bench.findings import OURS, Bar, Failure, Findings, bars, passed
from bench.idle import Idle
from bench.trial import Sample

OUTAGE_MS = {
    ("nfsha", "death"): 1000.0,
    ("nfsha-fast", "death"): 450.0,
    ("nfsha", "stop"): 1050.0,
    ("nfsha-fast", "stop"): 500.0,
}


def sample(contestant: str, fault: str) -> Sample:
    right = next(one.right for one in FAULTS if one.name == fault)
    outage_ms = OUTAGE_MS.get((contestant, fault), 2000.0)
    return Sample(
        contestant=contestant,
        fault=fault,
        outage_null_ms=outage_ms,
        outage_nfs_ms=outage_ms + 30,
        overlap_addresses_ms=0.0,
        overlap_answers_ms=0.0,
        overlap_frames_ms=0.0,
        holders_at_end=(right,),
        recovered=True,
        failed_operations=((-3.0, 900.0, "stale"),),
        worst_tick_ms=5.5,
        struck_at_boottime_ns=1,
        healed_after_ms=None,
        watched_ms=4000.0,
        outage_null=(-3.0, outage_ms - 3),
        outage_nfs=(-3.0, outage_ms + 27),
        holds=(("a", -5000.0, 0.0), ("b", 900.0, 4000.0)),
        answers=(("a", -500.0, -3.0), ("b", 900.0, 4000.0)),
        moves=(("b", 890.0, "P10", "PASSIVE", "TAKEOVER"),),
    )


def calm(contestant: str) -> Calm:
    holds = (("a", -5000.0, 600_000.0),)
    return Calm(contestant, 10.0, 100.0, 0, 0, ("a",), (), 3, holds)


@pytest.fixture
def good() -> Findings:
    """A run in which every bar is met."""
    return Findings(
        {"machine": "2 cores"},
        1,
        [sample(kind.name, fault.name) for kind in KINDS for fault in FAULTS],
        idle=[
            Idle(kind.name, state, 60.0, 1.0, 31.0)
            for kind in OURS
            for state in ("active", "passive")
        ],
        calm=[calm(kind.name) for kind in KINDS],
    )


def alter(findings: Findings, contestant: str, fault: str, **changes: object) -> None:
    findings.samples = [
        replace(one, **changes) if (one.contestant, one.fault) == (contestant, fault) else one  # type: ignore[arg-type]
        for one in findings.samples
    ]


def missed(findings: Findings) -> list[Bar]:
    return [bar for bar in bars(findings) if not bar.met]


def test_all_met(good: Findings) -> None:
    assert missed(good) == []
    assert passed(bars(good))


@pytest.mark.parametrize("contestant", ["nfsha", "nfsha-fast"])
@pytest.mark.parametrize(
    ("fault", "changes", "word"),
    [
        ("death", {"outage_null_ms": 1101.0}, "node death"),
        ("stop", {"outage_null_ms": 1101.0}, "clean stop"),
        ("kill", {"overlap_addresses_ms": 0.1}, "kill -9"),
        ("freeze", {"overlap_frames_ms": 0.1}, "SIGSTOP"),
        ("cut-active", {"overlap_addresses_ms": 5.0}, "active node cut off"),
        ("cut-active", {"holders_at_end": ("a",)}, "active node cut off"),
        ("cut-active", {"holders_at_end": ()}, "active node cut off"),
        ("cut-passive", {"holders_at_end": ("b",)}, "passive node cut off"),
        ("kill", {"recovered": False}, "every trial"),
    ],
)
def test_each_bar_can_be_missed(
    good: Findings, contestant: str, fault: str, changes: dict[str, object], word: str
) -> None:
    alter(good, contestant, fault, **changes)
    [bar] = missed(good)
    assert word in bar.text
    assert bar.met is False
    assert not passed(bars(good))


def test_fast_has_bars_of_its_own(good: Findings) -> None:
    alter(good, "nfsha-fast", "death", outage_null_ms=501.0)
    alter(good, "nfsha-fast", "stop", outage_null_ms=551.0)
    assert [bar.found for bar in missed(good)] == ["501 ms", "551 ms"]


def test_the_median_counts_for_node_death_and_the_longest_for_a_clean_stop(good: Findings) -> None:
    slow = replace(sample("nfsha", "death"), outage_null_ms=1500.0)
    good.samples += [sample("nfsha", "death"), slow]
    assert missed(good) == []
    good.samples.append(replace(sample("nfsha", "stop"), outage_null_ms=1500.0))
    assert [bar.found for bar in missed(good)] == ["1500 ms"]


def test_keepalived_has_no_bars(good: Findings) -> None:
    alter(good, "keepalived-1s", "kill", overlap_addresses_ms=5000.0, recovered=False)
    assert missed(good) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"takeovers": 1},
        {"releases": 1},
        {"moves": (("a", 5.0, "A60", "ACTIVE", "ISOLATED"),)},
        {"holders_at_end": ("b",)},
    ],
)
def test_any_disturbance_in_the_calm_is_a_miss_however_short_it_was(
    good: Findings, changes: dict[str, object]
) -> None:
    good.calm[0] = replace(good.calm[0], minutes=1.0, **changes)  # type: ignore[arg-type]
    [bar] = missed(good)
    assert "no false takeover" in bar.text
    assert bar.met is False


def test_a_short_calm_proves_nothing(good: Findings) -> None:
    good.calm[0] = replace(good.calm[0], minutes=1.0)
    [bar] = missed(good)
    assert bar.met is None
    assert "too short" in bar.found


def test_the_costlier_of_both_daemons_counts(good: Findings) -> None:
    good.idle[1] = replace(good.idle[1], cpu_percent=2.01, rss_mib=60.5)
    assert [bar.found for bar in missed(good)] == ["2.01 %", "60.5 MiB"]


def test_a_trial_without_a_sample_is_a_miss_and_is_told(good: Findings) -> None:
    good.failures.append(
        Failure("keepalived-1s", "kill", 1, "the trial said nothing for 60 s\n...")
    )
    [bar] = missed(good)
    assert "every trial" in bar.text
    assert "keepalived-1s, kill, run 1: the trial said nothing for 60 s" in report.page(good)


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    nothing = bars(Findings({}, 1))
    assert {bar.met for bar in nothing} == {None}
    assert passed(nothing)


def test_the_page_shows_every_cell_and_every_bar(good: Findings) -> None:
    alter(good, "keepalived-1s", "kill", overlap_addresses_ms=4920.4, recovered=False)
    page = report.page(good)
    for fault in FAULTS:
        assert page.count(f"| {fault.title} |") == 4
    assert "4920 / **4920** / 4920 (1 without service at the end)" in page
    assert page.count("| met |") == len(bars(good))
    assert "not met" not in page


def test_the_raw_file_holds_every_sample_and_gives_it_back(good: Findings, tmp_path: Path) -> None:
    configurations = {kind.name: {"a": f"{kind.name} a", "b": "b"} for kind in KINDS}
    report.write(tmp_path, good, configurations)
    raw = json.loads((tmp_path / "failover.json").read_text())
    assert [Sample.load(one) for one in raw["samples"]] == good.samples
    assert raw["configurations"] == configurations
    assert (tmp_path / "keepalived-1s-a.conf").read_text() == "keepalived-1s a"
    assert not list(tmp_path.glob("nfsha*"))
    assert len(raw["bars"]) == len(bars(good))


def test_a_sample_of_another_shape_is_refused() -> None:
    with pytest.raises(TypeError):
        Sample.load(asdict(sample("nfsha", "kill")) | {"news": 1})


@pytest.mark.parametrize(("failures", "code"), [(0, 0), (1, 1)])
def test_a_missed_bar_is_the_exit_code_and_the_results_are_written_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, good: Findings, failures: int, code: int
) -> None:
    def measured(bench: failover.Bench) -> None:
        good.failures += [Failure("nfsha", "kill", 1, "the trial said nothing")] * failures
        bench.findings = good

    monkeypatch.setattr("bench.ending.require_root", lambda: None)
    monkeypatch.setattr("bench.ending.registry.sweep", list)
    monkeypatch.setattr("bench.ending.signal.signal", lambda *_: None)
    monkeypatch.setattr("bench.failover.machine.facts", dict)
    monkeypatch.setattr(failover.Bench, "run", measured)
    assert failover.main(["--out", str(tmp_path)]) == code
    assert ("**not met**" in (tmp_path / "failover.md").read_text()) is bool(code)

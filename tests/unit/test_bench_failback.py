"""What the bench of failback makes of its samples: outages, bars, the page, the options."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import failback, failback_report
from bench.failback_findings import Equality, Findings, Sample, bars
from bench.failback_load import change, changed_paths, number_in, seen
from bench.findings import Bar, passed
from bench.replication_trees import Tree, make
from tests.netns.labkit.nfs_client import Attempt
from tests.netns.labkit.place import LabError
from tests.netns.labkit.records import Records
from tests.netns.treewalk import differences

OUTAGE_MS = {
    ("nfsha", 10_000): 800.0,
    ("nfsha", 1_000_000): 900.0,
    ("runbook", 10_000): 900.0,
    ("runbook", 1_000_000): 20_000.0,
}


def sample(side: str, size: int, run: int) -> Sample:
    return Sample(
        side, size, run, OUTAGE_MS[side, size], 20.0, 16.0, (("the copy", 700.0), ("rest", 100.0)),
        ((0.0, 5.0, ""), (20.0, 900.0, "")), 500, 1, 0, (),
    )  # fmt: skip


@pytest.fixture
def good() -> Findings:
    """Everything measured, and every bar met."""
    return Findings(
        {"machine": "two cores"},
        3,
        [sample(*cell, run) for run in (1, 2, 3) for cell in OUTAGE_MS],
        [Equality(size, ()) for size in (10_000, 1_000_000)],
    )


def turn(findings: Findings, side: str, size: int, run: int | None, **change: object) -> None:
    findings.samples = [
        replace(one, **change)  # type: ignore[arg-type]
        if (one.side, one.size) == (side, size) and run in (None, one.run)
        else one
        for one in findings.samples
    ]


def missed(findings: Findings) -> list[Bar]:
    return [bar for bar in bars(findings) if bar.met is False]


# ------------------------------------------------------------------ bars


def test_all_bars_can_be_met(good: Findings) -> None:
    assert [bar.met for bar in bars(good)] == [True] * 5
    assert passed(bars(good))


def test_what_was_not_measured_is_no_miss() -> None:
    nothing = bars(Findings({}, 1))
    assert [bar.met for bar in nothing] == [None] * 5
    assert passed(nothing)


def test_one_long_stall_of_three_misses_the_bar(good: Findings) -> None:
    turn(good, "nfsha", 1_000_000, 2, outage_ms=1501.0)
    (bar,) = missed(good)
    assert bar.found == "1.50 s"
    assert "at most 1.5 s" in bar.text
    assert not passed(bars(good))


def test_a_stall_that_grows_misses_the_bar(good: Findings) -> None:
    turn(good, "nfsha", 10_000, None, outage_ms=500.0)
    (bar,) = missed(good)
    assert "nfsha: flat" in bar.text
    assert bar.found == "0.50 s, 0.90 s: 1.80 times"


def test_a_runbook_that_does_not_grow_is_told(good: Findings) -> None:
    turn(good, "runbook", 1_000_000, None, outage_ms=1700.0)
    (bar,) = missed(good)
    assert "the runbook's grows" in bar.text


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"lost": ("a record",)}, "1 lost"),
        ({"failed": 1}, "1 failed"),
        ({"stale": 3}, "at most 3"),
    ],
)
def test_what_clients_lost_misses_the_bar(
    good: Findings, what: dict[str, object], words: str
) -> None:
    turn(good, "nfsha", 10_000, 1, **what)
    (bar,) = missed(good)
    assert words in bar.found


def test_the_runbook_may_lose_and_fail(good: Findings) -> None:
    turn(good, "runbook", 10_000, 1, lost=("a record",), failed=1, stale=5)
    assert missed(good) == []


def test_trees_must_be_equal_and_all_compared(good: Findings) -> None:
    good.equalities[0] = Equality(10_000, ("b'x': missing on the right",))
    (bar,) = missed(good)
    assert "1 of 2 trees differ" in bar.found
    good.equalities = [Equality(10_000, ())]
    assert missed(good) == []
    assert [bar.met for bar in bars(good)].count(None) == 1


def test_a_round_that_failed_misses_the_bar(good: Findings) -> None:
    good.failures = ["10,000 files: exit 4\nmore"]
    assert ["1 failed" in bar.found for bar in missed(good)] == [True]


# ------------------------------------------------------------------ the page


def test_the_page_and_the_raw_file_tell_everything(good: Findings, tmp_path: Path) -> None:
    good.failures = ["10,000 files: exit 4\nmore"]
    good.equalities.append(Equality(100_000, ("b'x': missing on the right",)))
    failback_report.write(tmp_path, good, {"rsyncd.conf": "read only = yes\n"})
    page = (tmp_path / "failback.md").read_text()
    row = "| 1,000,000 files | 0.90 / **0.90** / 0.90 | 20.00 / **20.00** / 20.00 |"
    assert row in page
    assert "| the copy | 700 / **700** / 700 | 700 / **700** / 700 |" in page
    assert "`systemctl stop keepalived`: the VIP is away" in page
    assert "**differs**: b'x': missing on the right" in page
    assert "- 10,000 files: exit 4\n" in page
    assert "**not met**" in page
    raw = json.loads((tmp_path / "failback.json").read_text())
    assert len(raw["samples"]) == 12
    assert raw["samples"][0]["operations"][1] == [20.0, 900.0, ""]
    assert len(raw["bars"]) == 5
    assert (tmp_path / "failback-rsyncd.conf").read_text() == "read only = yes\n"


def test_an_empty_page_can_be_written() -> None:
    assert "not measured" in failback_report.page(Findings({}, 1))


# ------------------------------------------------------------------ the clients


def attempt(sent_ms: int, ended_ms: int, error: str | None = None) -> Attempt:
    return Attempt(sent_ms, sent_ms * 1_000_000, ended_ms * 1_000_000, error)


def test_the_outage_is_the_longest_time_between_two_acknowledgements_around_the_move() -> None:
    early, before = attempt(0, 9000), attempt(9500, 9505)
    held = attempt(9525, 10_300, "[Errno 116] Stale file handle")
    after = [attempt(10_310, 10_315), attempt(10_330, 10_335), attempt(11_600, 11_605)]
    found = seen(Records((early, before, held, *after)), 9_600_000_000)
    assert found.outage.ms == 1270.0
    assert (found.stale, found.failed) == (1, 0)
    assert [one[2] for one in found.operations] == ["", held.error, "", "", ""]
    assert found.operations[-1] == (1265.0, 1270.0, "")
    found = seen(Records((early, before, held, *after[:2])), 9_600_000_000)
    assert found.outage.ms == 810.0


def test_a_client_without_service_at_the_end_gives_no_outage() -> None:
    with pytest.raises(LabError, match="no service at the end"):
        seen(Records((attempt(0, 5), attempt(20, 90, "[Errno 110] no answer"))), 0)
    with pytest.raises(LabError, match="no service at the end"):
        seen(Records(()), 0)


def test_an_error_that_is_not_stale_counts_as_failed() -> None:
    found = seen(Records((attempt(0, 5), attempt(20, 25, "[Errno 13] no"), attempt(40, 45))), 0)
    assert (found.stale, found.failed) == (0, 1)


def test_a_change_can_be_read_back() -> None:
    assert number_in(change(7)) == 7
    assert len(change(7)) == len(change(70_000))
    assert number_in(b"") == 0
    with pytest.raises(LabError, match="holds"):
        number_in(b"changed 7\n")


@pytest.mark.parametrize("files", failback.TREES)
def test_twenty_files_change_in_twenty_folders_of_one_size(files: int) -> None:
    tree = failback.TREES[files]
    assert tree.a_folder == 500
    paths = changed_paths(tree)
    assert len(set(paths)) == 20
    assert len({path.split("/")[1] for path in paths}) == 20


def test_trees_made_twice_are_equal(tmp_path: Path) -> None:
    roots = [tmp_path / name for name in ("a", "b")]
    for root in roots:
        root.mkdir()
        make(Tree(30, 3), root, 1_700_000_000_123_456_789)
    assert differences(*roots) == []
    (roots[1] / "folder0001" / "file000003").touch()
    assert len(differences(*roots)) == 1


def test_the_exit_code_says_whether_a_bar_was_missed(
    good: Findings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("bench.ending.require_root", lambda: None)
    monkeypatch.setattr("bench.ending.registry.sweep", list)
    monkeypatch.setattr("bench.ending.signal.signal", lambda *_: None)
    monkeypatch.setattr("bench.failback._facts", dict)
    monkeypatch.setattr(failback.Bench, "run", lambda self: setattr(self, "findings", good))
    assert failback.main(["--out", str(tmp_path)]) == 0
    turn(good, "nfsha", 1_000_000, 1, outage_ms=5000.0)
    assert failback.main(["--out", str(tmp_path)]) == 1

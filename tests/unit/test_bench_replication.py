"""What the bench of replication makes of its samples: bars, the page, the raw file, the options."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bench import replication, replication_report
from bench.findings import Bar, passed
from bench.replication_findings import Equality, Findings, Journal, Sample, bars
from bench.replication_sides import Cron
from bench.replication_trees import CHANGES, Tree, look, make, make_large
from bench.replication_usage import cpu_s, pss_kib, trees

WALL_S = {
    ("cron", "changes", 1_000_000): 14.0,
    ("nfsha", "changes", 1_000_000): 0.6,
    ("cron", "changes", 10_000): 0.2,
    ("nfsha", "changes", 10_000): 0.5,
    ("cron", "large", 0): 4.0,
    ("nfsha", "large", 0): 4.2,
    ("cron", "small", 0): 5.0,
    ("nfsha", "small", 0): 5.2,
}


def sample(side: str, scenario: str, size: int, run: int = 1) -> Sample:
    walk = {"cron": "", "nfsha": "folders" if size else "full"}[side]
    wall_s = WALL_S[side, scenario, size]
    return Sample(side, scenario, size, run, wall_s, 0.5, 2048, 40.0, walk, 0, 4.5)


@pytest.fixture
def good() -> Findings:
    """Everything measured, and every bar met."""
    return Findings(
        {"machine": "two cores"},
        3,
        [sample(*cell, run) for run in (1, 2, 3) for cell in WALL_S],
        [Equality(side, "files10000", 10_000, ()) for side in ("cron", "nfsha")],
        [],
        Journal(20.0, 1000.0, 1.2, 2.0),
    )


def slower(findings: Findings, cell: tuple[str, str, int], wall_s: float) -> None:
    findings.samples = [
        replace(one, wall_s=wall_s) if (one.side, one.scenario, one.size) == cell else one
        for one in findings.samples
    ]


def missed(findings: Findings) -> list[Bar]:
    return [bar for bar in bars(findings) if bar.met is False]


def test_all_bars_can_be_met(good: Findings) -> None:
    assert [bar.met for bar in bars(good)] == [True] * 7
    assert passed(bars(good))


def test_what_was_not_measured_is_no_miss() -> None:
    nothing = bars(Findings({}, 1))
    assert [bar.met for bar in nothing] == [None] * 7
    assert passed(nothing)


@pytest.mark.parametrize(
    ("cell", "wall_s", "words"),
    [
        (("nfsha", "changes", 1_000_000), 0.71, "at most 1/20"),
        (("nfsha", "changes", 10_000), 0.3, "less than 2 times"),
        (("nfsha", "large", 0), 4.41, "large files"),
        (("nfsha", "small", 0), 5.51, "small files"),
    ],
)
def test_each_slow_pass_misses_its_bar(
    good: Findings, cell: tuple[str, str, int], wall_s: float, words: str
) -> None:
    slower(good, cell, wall_s)
    (bar,) = missed(good)
    assert words in bar.text
    assert not passed(bars(good))


def test_a_dear_journal_misses_its_bar_and_a_bored_one_tells_nothing(good: Findings) -> None:
    good.journal = Journal(20.0, 1000.0, 1.0, 4.0)
    assert [bar.found for bar in missed(good)] == ["3.00 % at 1,000"]
    good.journal = Journal(20.0, 900.0, 1.0, 1.1)
    assert missed(good) == []
    assert [bar.met for bar in bars(good)].count(None) == 1


@pytest.mark.parametrize("change", [{"full_walks": 1}, {"walk": "full"}, {"walk": ""}])
def test_a_full_walk_in_a_timed_pass_misses_the_bar(
    good: Findings, change: dict[str, object]
) -> None:
    place = next(n for n, one in enumerate(good.samples) if one.side == "nfsha" and one.size)
    good.samples[place] = replace(good.samples[place], **change)  # type: ignore[arg-type]
    (bar,) = missed(good)
    assert "no full walk" in bar.text


def test_a_tree_that_differs_and_a_pass_that_failed_miss_the_bar(good: Findings) -> None:
    good.failures = ["nfsha, calm: exit 4\nmore"]
    assert ["1 failed" in bar.found for bar in missed(good)] == [True]
    good.failures = []
    good.equalities.append(Equality("nfsha", "files10000", 10_000, ("b'x': missing",)))
    assert ["1 differ" in bar.found for bar in missed(good)] == [True]


def test_what_the_other_contestant_left_unequal_is_a_fact_and_no_bar(good: Findings) -> None:
    assert "left" not in replication_report.page(good)
    good.equalities.append(Equality("cron", "files10000", 10_000, ("b'x': mtime 1, 2",)))
    assert missed(good) == []
    page = replication_report.page(good)
    assert "left 1 of its own copies different from the source (files10000)" in page
    assert "1 trees, 0 differ" in page


def test_the_page_and_the_raw_file_tell_everything(good: Findings, tmp_path: Path) -> None:
    good.failures = ["nfsha, calm, run 2: exit 4\nmore"]
    good.equalities.append(Equality("cron", "other", 7, ("b'x': missing on the right",)))
    replication_report.write(tmp_path, good, Cron.configuration())
    page = (tmp_path / "replication.md").read_text()
    assert "| wall time (s) | 14.00 / **14.00** / 14.00 | 0.60 / **0.60** / 0.60 |" in page
    assert "0.60 s of 14.00 s: 1/23.3" in page
    assert page.count("until all is on the disk (s) | 4.50 / **4.50** / 4.50 |") == 2
    assert "Full walks in the 6 timed passes of nfsha: 0." in page
    assert "**differs**: b'x': missing on the right" in page
    assert "- nfsha, calm, run 2: exit 4\n" in page
    assert "**not met**" in page
    raw = json.loads((tmp_path / "replication.json").read_text())
    assert len(raw["samples"]) == 24
    assert raw["journal"]["changes_a_second"] == 1000.0
    assert len(raw["bars"]) == 7
    assert "-aHAX --numeric-ids --delete" in (tmp_path / "replication-cron").read_text()
    assert "read only = yes" in (tmp_path / "replication-rsyncd.conf").read_text()


def test_an_empty_page_can_be_written() -> None:
    assert "not measured" in replication_report.page(Findings({}, 1))


def test_trees_are_what_they_say(tmp_path: Path) -> None:
    tree = Tree(300, 3)
    make(tree, tmp_path)
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "folder0000",
        "folder0001",
        "folder0002",
    ]
    assert look(tmp_path) == 300
    assert (tmp_path / tree.name(1, 7)).read_bytes().startswith(b"1 7 ")
    for tree in replication.TREES.values():
        assert tree.a_folder == 1000
    large = tmp_path / "large"
    large.mkdir()
    make_large(large, 4 << 20, 2, 1)
    assert [file.stat().st_size for file in large.iterdir()] == [2 << 20] * 2


@pytest.mark.parametrize("files", [10_000, 100_000, 1_000_000])
def test_the_changes_of_all_runs_are_in_different_folders_and_of_different_files(
    files: int,
) -> None:
    tree = replication.TREES[files]
    step = max(1, tree.folders // CHANGES)
    seen = set()
    for run in range(1, replication.MAX_RUNS + 1):
        places = [
            tree.name(number * step + run, run * CHANGES + number) for number in range(CHANGES)
        ]
        folders = {place.partition("/")[0] for place in places}
        assert len(folders) == min(CHANGES, tree.folders)
        seen.update(places)
    assert len(seen) == replication.MAX_RUNS * CHANGES


def test_a_process_tells_what_it_used() -> None:
    assert os.getpid() in set(trees([os.getpid()]))
    before_s, end_s = cpu_s([os.getpid()]), time.process_time() + 0.1
    while time.process_time() < end_s:
        pass
    assert cpu_s([os.getpid()]) - before_s >= 0.08
    assert pss_kib(os.getpid()) > 1000
    assert pss_kib(0) == 0


def test_the_exit_code_says_whether_a_bar_was_missed(
    good: Findings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("bench.ending.require_root", lambda: None)
    monkeypatch.setattr("bench.ending.registry.sweep", list)
    monkeypatch.setattr("bench.ending.signal.signal", lambda *_: None)
    monkeypatch.setattr("bench.replication._facts", dict)
    monkeypatch.setattr(replication.Bench, "run", lambda self: setattr(self, "findings", good))
    assert replication.main(["--out", str(tmp_path)]) == 0
    slower(good, ("nfsha", "changes", 1_000_000), 5.0)
    assert replication.main(["--out", str(tmp_path)]) == 1

"""Two thousand random lives of a pair, another two thousand with each commit."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from tests.sim.background import Background
from tests.sim.runner import run_seed

SEEDS = 2000
WITHIN_S = 300
"""On two cores that have nothing else to do; so twice as much of their time."""

RANGES = 10**6
ROOT = Path(__file__).parents[2]


def revision() -> str:
    """The commit, or where there is no repository a digest of the decisions' source."""
    asked = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if asked.returncode == 0:
        return asked.stdout.strip()
    sources = sorted((ROOT / "nfsha" / "core").glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def first_seed(revision: str) -> int:
    """Where the seeds of this revision begin: runs of many days explore."""
    return int(hashlib.sha256(revision.encode()).hexdigest(), 16) % RANGES * SEEDS


@pytest.mark.last
@pytest.mark.timeout(WITHIN_S + 120)
def test_no_seed_breaks_an_invariant_and_every_fault_fires(seeds: Background) -> None:
    ran = seeds.result()
    summary = ran.summary
    print(summary.text())
    told = "\n\n".join(one.trace for one in summary.failures[:2])
    failed = [(one.seed, one.failure) for one in summary.failures]
    assert not failed, f"{failed}\n{told}"
    assert summary.never_fired() == []
    assert summary.seeds == SEEDS
    assert summary.takeovers > SEEDS // 4
    assert summary.fired["handover-freeze"] > SEEDS // 2
    assert ran.cpu_s <= 2 * WITHIN_S, summary.text()


def test_a_seed_repeats_itself() -> None:
    one, again = run_seed(4711, keep_trace=True), run_seed(4711, keep_trace=True)
    assert one.trace == again.trace
    assert one.turns > 1000


def test_the_range_moves_with_therevision() -> None:
    assert first_seed("one") != first_seed("another")
    assert first_seed("one") == first_seed("one")

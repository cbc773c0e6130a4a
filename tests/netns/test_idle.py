"""An idle daemon is cheap; the figure of the bar is measured by the bench, over a minute."""

from __future__ import annotations

import pytest

from bench import idle
from bench.contestants import KINDS
from bench.findings import IDLE_MIB, IDLE_PERCENT

NOISE_PERCENT = 1.0
"""What cold caches and other work of the machine may add in a short time."""


@pytest.mark.pairs
@pytest.mark.timeout(60)
def test_idle_daemons_cost_little_time_and_memory() -> None:
    default = next(kind for kind in KINDS if kind.name == "nfsha")
    found = idle.measure([default], seconds=10.0)
    assert [one.state for one in found] == ["active", "passive"]
    for one in found:
        assert 0 < one.cpu_percent <= IDLE_PERCENT + NOISE_PERCENT, one
        assert 0 < one.rss_mib <= IDLE_MIB, one

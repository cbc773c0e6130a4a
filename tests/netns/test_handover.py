"""The service moves by an operator's word: real daemons, NFS server, client, rsync and journals."""

from __future__ import annotations

import pytest

from tests.netns.copies import Copies
from tests.netns.lab import Lab

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def copies(lab: Lab) -> Copies:
    return Copies(lab)


def test_there_and_back_under_load_nothing_is_lost(copies: Copies) -> None:
    copies.settle_whole()
    records = copies.lab.write_records()
    copies.lab.a.nfsha("switchover", "--yes", timeout_s=60)
    copies.wait_phase("b", "ACTIVE")
    copies.wait_phase("a", "PASSIVE")
    copies.lab.a.nfsha("failback", "--yes", timeout_s=60)
    copies.wait_phase("a", "ACTIVE")
    copies.wait_phase("b", "PASSIVE")
    found = records.stop()
    print(found.longest_stall_ms, len(found.acked))
    assert found.failed == ()
    copies.sync()
    assert copies.differences() == []
    there = copies.lab.read_records()
    assert set(found.acked) <= set(there)

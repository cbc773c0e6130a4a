"""The serving NFS server dies, its volumes do not: no acknowledged write is lost."""

from __future__ import annotations

import pytest

from tests.netns.copies import Copies
from tests.netns.lab import Lab

pytestmark = pytest.mark.timeout(120)

SELDOM = '[sync]\nevery = "1h"\njitter = "0s"\n'
"""After the first pass none comes by itself: what a handover does not bring is not there."""

SERVED_MS = 5000
"""Detection by two signs, a pass, freeze and proof: a takeover by silence would take as long."""


def test_the_last_writes_are_fetched_before_the_other_node_serves(lab: Lab) -> None:
    copies = Copies(lab, sync=SELDOM)
    copies.settle_whole()
    records = copies.lab.write_records()
    records.wait_acked(50)
    copied = (copies.mark("b") or {})["started_ns"]
    killed_ms = copies.now_ms()
    lab.a.nfs.stop()
    copies.wait_event(
        "a", lambda e: e.row == "A32", "request to fetch", since_ms=killed_ms, within_s=15
    )
    served = copies.wait_phase("b", "ACTIVE", since_ms=killed_ms, within_s=15)
    assert served.row == "X20"
    assert served.at_ms - killed_ms < SERVED_MS
    records.wait_acked(20)
    found = records.stop()
    before = [
        number for number in found.acked if number not in found.since(killed_ms * 10**6).acked
    ]
    assert len(before) >= 50
    assert set(found.acked) <= set(lab.read_records())
    lab.a.nfs.start()
    copies.wait_phase("a", "PASSIVE", since_ms=served.at_ms)
    copies.assert_never_two()
    copies.wait(lambda: copies.mark("a") is not None, "a complete pass back")
    assert copied < (copies.mark("a") or {})["started_ns"]


def test_a_server_that_is_restarted_at_once_stays_where_it_is(lab: Lab) -> None:
    copies = Copies(lab, sync=SELDOM + 'bandwidth = "1MB"\n')
    copies.settle_whole()
    (copies.here("a") / "large").write_bytes(b"\1" * (24 << 20))
    killed_ms = copies.now_ms()
    lab.a.nfs.stop()
    copies.wait_phase("b", "PRESYNC", since_ms=killed_ms, within_s=15)
    lab.a.nfs.start()
    copies.wait_event(
        "a", lambda e: e.row == "A34", "end of the request", since_ms=killed_ms, within_s=15
    )
    copies.wait_phase("b", "PASSIVE", since_ms=killed_ms, within_s=15)
    assert copies.moves("a", killed_ms) == []
    copies.assert_never_two()

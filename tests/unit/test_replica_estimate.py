"""What a dry run reckons: the stall, the bounds of an answer, one estimate at a time."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from nfsha.core.model import Epoch, Role
from nfsha.daemon.shapes import fits
from nfsha.replica.clocks import Clocks
from nfsha.replica.fetching import estimate
from nfsha.replica.fetching.estimate import (
    FIRST_NAMES,
    FREEZE_MS,
    LARGE_BYTES_S,
    MAX_NAMES,
    MAX_VOLUMES_TOLD,
    QUICK_MS,
    SHAPE,
    TURNS,
    Ahead,
    Estimate,
    Estimating,
    as_facts,
    stall,
)
from nfsha.replica.source.listing import Listing
from nfsha.replica.volume.marks import Mark

EPOCH = Epoch(7, "0123456789abcdef", Role.STANDBY)
NOW_NS = 1_800_000_000 * 10**9


def mark(age_s: int) -> Mark:
    return Mark("u", EPOCH, NOW_NS - age_s * 10**9, 1, 1, 1, 0, 100, "folders", "j", 1)


def made(*found: Ahead, listing_ms: int = 100) -> Estimate:
    looks = {one.uuid: one for one in found}
    return Estimate(len(looks), 0, looks, listing_ms=listing_ms, took_ms=50)


def test_the_stall_of_quiet_volumes_is_the_freeze_and_two_lists() -> None:
    quiet = made(*(Ahead(str(n), walk="none", took_ms=20) for n in range(500)))
    found = stall(quiet, {}, rate_bytes_s=None, parallel=2, now_ns=NOW_NS)
    assert found == {
        "ms": FREEZE_MS + TURNS * 100, "pass_ms": 100, "writes_bytes_s": 0, "rate_bytes_s": None,
        "unmeasured": 0, "large_bytes": 0,
    }  # fmt: skip


def test_what_clients_write_meanwhile_crosses_over_at_the_measured_rate() -> None:
    # 50 MB in 10 s; in a pass of 1 s they write 5 MB, which take half a second at 10 MB/s.
    found = stall(
        made(Ahead("u", walk="folders", took_ms=900, copy_bytes=50_000_000)),
        {"u": mark(10)}, rate_bytes_s=10_000_000, parallel=2, now_ns=NOW_NS,
    )  # fmt: skip
    assert found["writes_bytes_s"] == 5_000_000
    assert found["ms"] == FREEZE_MS + TURNS * 1500


def test_a_large_file_that_changes_is_read_as_a_whole_by_the_last_pass_and_by_the_proof() -> None:
    large = 2 * LARGE_BYTES_S
    look = Ahead("u", walk="folders", took_ms=900, copy_bytes=large + 10**7, large_bytes=large)
    found = stall(
        made(look, Ahead("v", walk="full", large_bytes=large)), {"u": mark(10)},
        rate_bytes_s=10_000_000, parallel=2, now_ns=NOW_NS,
    )  # fmt: skip
    assert (found["large_bytes"], found["writes_bytes_s"]) == (large, 1_000_000)
    assert found["ms"] == FREEZE_MS + TURNS * (1000 + 100 + 2000)


def test_many_volumes_share_the_lanes_and_what_is_walked_whole_is_not_measured() -> None:
    looks = [Ahead(str(n), walk="folders", took_ms=100) for n in range(10)]
    marks = {str(n): mark(10) for n in range(10)}
    found = stall(made(*looks), marks, rate_bytes_s=None, parallel=2, now_ns=NOW_NS)
    assert found["pass_ms"] == 100 + 500
    found = stall(
        made(Ahead("u", walk="full", took_ms=90_000, copy_bytes=10**12)),
        {"u": mark(1)}, rate_bytes_s=1, parallel=2, now_ns=NOW_NS,
    )  # fmt: skip
    assert (found["pass_ms"], found["unmeasured"], found["writes_bytes_s"]) == (
        100 + QUICK_MS, 1, 0,
    )  # fmt: skip


def test_an_answer_has_bounds_and_the_sum_is_of_all() -> None:
    looks = {
        f"u{n:05}": Ahead(
            f"u{n:05}", walk="full", copy_files=1, copy_bytes=10, deletions=2, quarantine=20,
            names=tuple(b"name-%d" % one for one in range(20)),
        )
        for n in range(MAX_VOLUMES_TOLD + 500)
    }  # fmt: skip
    looks["u00007"] = Ahead("u00007", trouble="it hangs")
    whole = Estimate(len(looks), 0, looks, took_ms=50)
    for all_names, most in ((False, FIRST_NAMES), (True, 20)):
        facts = as_facts(
            whole, lambda uuid: uuid, all_names=all_names,
            stall=stall(made(), {}, rate_bytes_s=None, parallel=1, now_ns=NOW_NS),
        )  # fmt: skip
        assert fits(facts, SHAPE)
        assert len(facts["volumes"]) == MAX_VOLUMES_TOLD
        assert len(facts["volumes"][0]["names"]) == most
        assert sum(len(one["names"]) for one in facts["volumes"]) == MAX_NAMES
        known = len(looks) - 1
        assert facts["sum"] == {
            "volumes": len(looks), "unknown": 1, "copy_files": known, "copy_bytes": 10 * known,
            "deletions": 2 * known, "quarantine": 20 * known,
        }  # fmt: skip


def test_one_at_a_time_in_lanes_and_within_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ms = 0
    at_once: list[int] = []
    running = 0
    tasks: list[asyncio.Task[None]] = []

    listing = cast("Listing", object())

    async def listed() -> Listing:
        return listing

    async def look(uuid: str, by: Listing, longest_s: int) -> Ahead:
        assert by is listing
        nonlocal now_ms, running
        running += 1
        at_once.append(running)
        assert longest_s <= 5
        await asyncio.sleep(0)
        now_ms += 2000
        running -= 1
        return Ahead(uuid, walk="full")

    async def scene() -> Estimate:
        monkeypatch.setattr(estimate, "WITHIN_S", 5)
        clocks = Clocks(lambda: now_ms, lambda: NOW_NS)
        one = Estimating(listed, look, parallel=2, clocks=clocks, watch=tasks.append)
        first = one.begin(map(str, range(8)))
        assert one.begin([]) is first
        await asyncio.gather(*tasks)
        assert one.begin(["x"]) is not first
        await one.close()
        return first

    found = asyncio.run(scene())
    assert max(at_once) == 2
    assert set(found.found) == set(map(str, range(8)))
    late = [one for one in found.found.values() if one.trouble]
    assert late
    assert "within 5 s" in late[0].trouble


def test_without_the_sources_list_no_volume_is_looked_at() -> None:
    async def listed() -> str:
        return "the source is dead"

    async def look(*_: object) -> Ahead:
        raise AssertionError("nothing is looked at")

    async def scene() -> Estimate:
        tasks: list[asyncio.Task[None]] = []
        clocks = Clocks(lambda: 0, lambda: NOW_NS)
        one = Estimating(listed, look, parallel=2, clocks=clocks, watch=tasks.append)
        found = one.begin(["u"])
        await asyncio.gather(*tasks)
        return found

    assert asyncio.run(scene()).found == {"u": Ahead("u", trouble="the source is dead")}

"""When real daemons copy: each volume by its own plan, by the clock, never two passes for one."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nfsha.replica.volume import marks
from tests.netns.copies import SYNC, Copies
from tests.netns.lab import Lab

pytestmark = pytest.mark.timeout(90)

HOUR_MS = 3_600_000
HOUR_NS = HOUR_MS * 1_000_000


def test_each_volume_has_its_own_interval_and_its_own_window_at_a_takeover(
    make_lab: Callable[..., Lab],
) -> None:
    copies = Copies(
        make_lab(volumes=("rarely", "often")),
        mounts=("/nfs/rarely", "/nfs/often"),
        sync='[sync]\nevery = "1h"\njitter = "0s"\n'
        '[[sync.volumes]]\npath = "/nfs/often"\nevery = "1s"\n',
    )
    copies.settle_whole("rarely", "often")
    for name in ("rarely", "often"):
        (copies.here("a", name) / "later").write_text("later")
    copies.wait((copies.here("b", "often") / "later").exists, "the file")
    time.sleep(1.0)  # many passes of the one, none of the other
    assert not (copies.here("b", "rarely") / "later").exists()
    due_ms = copies.copy("b", "rarely")["next_ms"]
    assert HOUR_MS - 60_000 < due_ms <= HOUR_MS
    assert copies.copy("b", "often")["next_ms"] <= 1000
    died_ms = copies.now_ms()
    rarely_ns = copies.pass_began_ns("rarely")
    copies.lab.power_cut("a")
    copies.wait_phase("b", "ACTIVE", since_ms=died_ms)
    windows = {
        name: float(line.partition("writes of the last ")[2].split()[0])
        for line in copies.log("b").splitlines()
        for name in ("rarely", "often")
        if f"takeover: volume {name}: writes of the last " in line
    }
    assert windows.keys() == {"rarely", "often"}
    assert windows["rarely"] == pytest.approx((time.time_ns() - rarely_ns) / 1e9, abs=1.5)
    assert windows["often"] < windows["rarely"] - 1


def test_each_volume_may_have_a_cron_line_that_is_met_by_the_local_clock(
    make_lab: Callable[..., Lab],
) -> None:
    # In a zone of our own a minute begins in eight seconds: nobody waits for a full one.
    lab = make_lab(volumes=("data", "own"))
    begins_s = int(time.time()) + 8
    ahead_s = -begins_s % 60
    for node in (lab.a, lab.b):
        (node.path("/etc/nfsha") / "zone").write_bytes(_zone(ahead_s))
    half_an_hour_later = ((begins_s + ahead_s) // 60 + 30) % 60
    copies = Copies(
        lab,
        mounts=("/nfs/data", "/nfs/own"),
        sync=f'[sync]\ncron = "{half_an_hour_later} * * * *"\njitter = "0s"\n'
        '[[sync.volumes]]\npath = "/nfs/own"\ncron = "* * * * *"\n',
        env={"TZ": "/etc/nfsha/zone"},
    )
    copies.settle_whole("data", "own")
    for name in ("data", "own"):
        (copies.here("a", name) / "later").write_text("later")
    first_ns = {name: copies.pass_began_ns(name) for name in ("data", "own")}
    assert max(first_ns.values()) < begins_s * 1e9, "settling took longer than this test can wait"
    for name, due_s in (("own", begins_s), ("data", begins_s + 1800)):
        assert time.time() + copies.copy("b", name)["next_ms"] / 1000 == pytest.approx(
            due_s, abs=0.7
        )
    assert not (copies.here("b", "own") / "later").exists()
    copies.wait(lambda: copies.pass_began_ns("own") != first_ns["own"], "the pass of the cron line")
    assert copies.pass_began_ns("own") / 1e9 == pytest.approx(begins_s + 0.5, abs=0.5)
    assert (copies.here("b", "own") / "later").exists()
    assert copies.pass_began_ns("data") == first_ns["data"]
    assert not (copies.here("b", "data") / "later").exists()


def _zone(ahead_s: int) -> bytes:
    """A time zone that is always so many seconds ahead of UTC (tzfile(5), version 1)."""
    counts = (0, 0, 0, 0, 1, 4)  # of one type of local time, with a name of three letters
    return (
        b"TZif"
        + bytes(16)
        + struct.pack("!6L", *counts)
        + struct.pack("!lBB", ahead_s, 0, 0)
        + b"OWN\0"
    )


def test_a_pass_that_outlasts_its_interval_is_not_made_up_for(
    make_lab: Callable[..., Lab],
) -> None:
    copies = Copies(make_lab(volume_mib=128), sync=SYNC + 'bandwidth = "2MB"\n')
    copies.settle_whole()
    began: list[int] = []
    (copies.here("a") / "big").write_bytes(os.urandom(8 << 20))  # four seconds, so four intervals
    end_s = time.monotonic() + 60
    arrived_s = None
    while arrived_s is None or time.monotonic() < arrived_s + 3:
        assert time.monotonic() < end_s
        now_ns = copies.pass_began_ns()
        if not began or now_ns != began[-1]:
            began.append(now_ns)
        if arrived_s is None and (copies.here("b") / "big").exists():
            arrived_s = time.monotonic()
        time.sleep(0.02)
    gaps_s = [(later - one) / 1e9 for one, later in pairwise(began)]
    long = [gap for gap in gaps_s if gap > 3]
    assert len(long) == 1, gaps_s
    assert all(gap > 0.7 for gap in gaps_s), gaps_s


def test_jitter_delays_passes_and_does_not_add_up(lab: Lab) -> None:
    every_s, jitter_s, passes = 1.0, 0.5, 10
    copies = Copies(lab, sync='[sync]\nevery = "1s"\njitter = "500ms"\n')
    copies.settle_whole()
    began: list[int] = []
    copies.wait(
        lambda: len(_note(began, copies.pass_began_ns())) > passes, "passes", within_s=3 * passes
    )
    at_s = [one_ns / 1e9 for one_ns in began[1:]]  # the first one may be that of the start
    # In each interval there is one, delayed by chance: the last ones by no more than the first.
    late_s = [one - number * every_s for number, one in enumerate(at_s)]
    assert 0.1 < max(late_s) - min(late_s) < jitter_s + 0.4, late_s


def _note(began: list[int], now_ns: int) -> list[int]:
    if not began or began[-1] != now_ns:
        began.append(now_ns)
    return began


def test_a_restart_of_the_daemon_does_not_put_off_full_walks_and_verifies(lab: Lab) -> None:
    copies = Copies(lab, sync=SYNC + 'full_every = "1h"\nverify_every = "1d"\n')
    copies.settle_whole()
    copies.sync("--verify")
    verified_ns = copies.copy()["verify"]["last_ns"]
    copies.daemon("b").stop(5.0)
    # As if it had been down for two hours: the walk is late by one, the verify by nothing.
    walks = next((lab.folder / "b" / "lib" / "marks").glob("walked-*"))
    known = json.loads(walks.read_bytes())["payload"]
    assert known["verify_ns"] == verified_ns
    _write_walks(walks, {**known, "full_ns": known["full_ns"] - 2 * HOUR_NS})
    late = "a full walk: the schedule's full walk"
    assert late not in copies.log("b")
    began_ms = copies.now_ms()
    copies.start("b")
    copies.wait_phase("b", "PASSIVE", since_ms=began_ms)
    copies.wait(
        lambda: json.loads(walks.read_bytes())["payload"]["full_ns"] > known["full_ns"],
        "the walk that is late",
    )
    assert copies.log("b").count(late) == 1
    now = json.loads(walks.read_bytes())["payload"]
    assert now["verify_ns"] == verified_ns
    copies.daemon("b").stop(5.0)
    _write_walks(walks, {**now, "verify_ns": verified_ns - 48 * HOUR_NS})
    copies.start("b")
    copies.wait(
        lambda: json.loads(walks.read_bytes())["payload"]["verify_ns"] > verified_ns,
        "the verify that is late",
    )


def _write_walks(file: Path, payload: dict[str, Any]) -> None:
    """As the daemon writes it, which is stopped."""
    file.write_bytes(marks._encode(payload))

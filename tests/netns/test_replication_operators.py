"""What operators see of the copies, say about them, and have configured: by both real daemons."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from nfsha.replica.quarantine.quarantine import Quarantine
from tests.netns.copies import SYNC, Copies
from tests.netns.lab import Lab

pytestmark = pytest.mark.timeout(90)

HOUR_NS = 3_600_000_000_000
PROGRAM = Path(sys.executable).parent / "nfsha"


@pytest.fixture
def copies(lab: Lab) -> Copies:
    return Copies(lab)


def slow(make_lab: Callable[..., Lab], sync: str = "") -> Copies:
    """A pair in the middle of a pass that takes half a minute: one file, at 2 MB/s."""
    copies = Copies(make_lab(volume_mib=512), sync=f'{SYNC}bandwidth = "2MB"\n{sync}')
    (copies.here("a") / "common").write_text("no first copy, so there is a plan")
    copies.settle_whole()
    copies.lab.b.nfsha("sync", "--pause")  # so that no pass finds it half written
    (copies.here("a") / "big").write_bytes(os.urandom(64 << 20))
    copies.lab.b.nfsha("sync", "--resume")
    copies.wait(lambda: progress(copies).get("bytes", 0) > 0, "bytes under way")
    return copies


def progress(copies: Copies) -> dict[str, Any]:
    """How far the pass under way is."""
    return dict(copies.copy()["progress"] or {})


def quarantine(copies: Copies, node: str, *argv: str) -> tuple[int, dict[str, Any]]:
    """`nfsha quarantine ... --json`: exit code and answer."""
    done = copies.lab.node(node).nfsha("quarantine", *argv, "--json", check=False)
    answer: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, answer


# ------------------------------------------------------------------ what is seen


def test_a_pass_shows_how_far_it_is_how_fast_and_how_long_yet(
    make_lab: Callable[..., Lab],
) -> None:
    copies = slow(make_lab)
    watching = copies.lab.b.spawn([PROGRAM, "volumes", "--watch"], name="watch")
    first = progress(copies)
    copies.wait(lambda: progress(copies)["bytes"] > first["bytes"] + (4 << 20), "more bytes")
    now = progress(copies)
    assert now["stage"] == "copy"
    assert now["total_bytes"] == 64 << 20
    assert now["percent"] == pytest.approx(100 * now["bytes"] / now["total_bytes"], abs=2)
    assert 500_000 < now["rate_bytes_s"] < 4_000_000
    assert now["eta_s"] == pytest.approx(
        (now["total_bytes"] - now["bytes"]) / now["rate_bytes_s"], rel=0.3
    )
    words = copies.lab.b.nfsha("status").stdout
    assert "copies" in words
    assert " per second" in words
    assert " left" in words
    watching.stop()
    screens = [line for line in watching.output().splitlines() if "progress:" in line]
    assert len(set(screens)) > 1, watching.output()


def test_both_nodes_show_how_old_the_copy_is(copies: Copies) -> None:
    copies.settle_whole()
    copies.lab.b.nfsha("sync", "--pause")
    copies.wait(lambda: copies.copy("b")["age_ms"] > 2500, "an age")
    copies.wait(lambda: copies.mark("a") == copies.mark("b"), "equal marks on both nodes")
    for node in "ab":
        began_ms = copies.pass_began_ns() // 1_000_000
        asked_ms = time.time_ns() // 1_000_000
        age_ms = copies.copy(node)["age_ms"]
        assert asked_ms - 1 <= began_ms + age_ms <= time.time_ns() // 1_000_000 + 1
        assert "the copy is " in copies.lab.node(node).nfsha("volumes").stdout


def test_a_volume_on_one_side_only_is_told_and_never_invented(
    make_lab: Callable[..., Lab],
) -> None:
    copies = Copies(make_lab(volumes=("data", "extra")))
    (copies.here("a", "extra") / "file").write_text("on one side only")
    copies.lab.b.nfs.stop()
    copies.lab.b.run("umount", "/nfs/extra")
    copies.lab.b.nfs.start()
    copies.settle_whole()
    copies.wait(lambda: copies.volume("a", "extra")["paired"] == "unpaired-here", "it, on a")
    copies.wait(lambda: copies.volume("b", "extra")["paired"] == "unpaired-there", "it, on b")
    assert copies.volume("b", "extra")["here"] is None
    assert copies.volume("a", "extra")["there"] is None
    for node in "ab":
        assert "unpaired extra" in [one["name"] for one in copies.lab.node(node).status()["alarms"]]
        assert "UNPAIRED" in copies.lab.node(node).nfsha("volumes").stdout
    assert list((copies.lab.b.path("/nfs/extra")).iterdir()) == []
    assert copies.lab.b.status()["replication"]["whole"] is True


def test_a_volume_that_was_removed_for_good_is_forgotten_by_a_command(
    make_lab: Callable[..., Lab],
) -> None:
    copies = Copies(make_lab(volumes=("data", "old")))
    copies.settle_whole("data", "old")
    uuid = copies.volume("b", "old")["uuid"]
    lab = copies.lab
    for words in ("old", uuid):
        refused = lab.b.nfsha("volumes", "forget", words, "--yes", check=False)
        assert (refused.returncode, "is mounted here" in refused.stderr) == (3, True)
    lab.b.run("umount", "-l", "/nfs/old")
    copies.wait(lambda: not lab.b.status()["replication"]["whole"], "word of it")
    text = lab.b.status()["replication"]["text"]
    assert "not mounted here: old" in text
    assert "`nfsha volumes forget`" in text
    refused = lab.b.nfsha("volumes", "forget", "old", "--yes", check=False)
    assert (refused.returncode, "the other node has this" in refused.stderr) == (3, True)

    lab.a.run("umount", "-l", "/nfs/old")
    copies.wait(
        lambda: [one["name"] for one in copies.volumes("b")["volumes"]] == ["data"], "one volume"
    )
    said = lab.b.nfsha("volumes", "forget", "old", "--yes").stdout
    assert f"volume old ({uuid}) is forgotten: the last pass into this node" in said
    said = lab.a.nfsha("volumes", "forget", uuid, "--yes").stdout
    assert f"volume old ({uuid}) is forgotten: the last pass into the other node" in said
    copies.wait(lambda: lab.b.status()["replication"]["whole"], "a whole replica")
    for node in "ab":
        assert uuid in lab.node(node).nfsha("volumes", "forget", uuid, "--yes", check=False).stderr
        assert list((lab.folder / node / "lib").rglob(f"*{uuid}*")) == []


# ------------------------------------------------------------------ what is configured


def test_a_copy_older_than_its_limit_takes_over_by_the_operators_word_only(lab: Lab) -> None:
    copies = Copies(lab, sync=SYNC + 'max_data_age = "10s"\n')
    (copies.here("a") / "old").write_text("old")
    copies.settle_whole()
    copies.sync()
    paused_ms = copies.now_ms()
    lab.b.nfsha("sync", "--pause")
    copies.wait_event(
        "b", lambda e: "not a whole replica any more" in e.why, "word of it",
        since_ms=paused_ms, within_s=20,
    )  # fmt: skip
    told = lab.b.status()["replication"]
    assert told["whole"] is False
    assert "its copy is older than max_data_age (10.0 s)" in told["text"]
    died_ms = copies.now_ms()
    lab.power_cut("a")
    time.sleep(2.5)  # a takeover would have been within 2
    assert copies.moves("b", died_ms) == []
    assert "older than max_data_age" in lab.b.nfsha("status").stdout
    refused = lab.b.nfsha("activate", "--yes", check=False)
    assert refused.returncode == 3
    assert "not a whole replica" in refused.stderr
    assert "--force" in refused.stderr
    lab.b.nfsha("activate", "--force", "--yes")
    copies.wait_phase("b", "ACTIVE", since_ms=died_ms)
    assert copies.names("b") == ["old"]


def test_a_resync_on_failback_waits_for_the_operators_word(lab: Lab) -> None:
    copies = Copies(lab, sync=SYNC + 'resync = "on-failback"\n')
    (copies.here("a") / "common").write_text("common")
    copies.settle_whole()
    lab.b.nfsha("sync", "--pause")
    (copies.here("a") / "only-there").write_text("acknowledged, never copied")
    died_ms = copies.now_ms()
    lab.power_cut("a")
    copies.wait_phase("b", "ACTIVE", since_ms=died_ms)
    (copies.here("b") / "second-reign").write_text("by the standby")
    lab.boot("a")
    copies.start("a")
    copies.wait_phase("a", "RETURNED", since_ms=died_ms)
    why = copies.wait_state("refused", node="a")["why"]
    assert "on-failback" in why
    assert "nfsha sync" in why
    time.sleep(2.5)  # more passes are due, and refused like the first
    assert copies.names("a") == ["common", "only-there"]
    assert copies.phase("a") == "RETURNED"
    lab.a.nfsha("sync", "--wait")
    copies.wait_phase("a", "PASSIVE", since_ms=died_ms)
    assert copies.differences() == []
    kept = list((copies.here("a") / ".nfsha-quarantine").rglob("only-there"))
    assert [path.read_text() for path in kept] == ["acknowledged, never copied"]


def test_a_transfer_that_is_stuck_ends_and_comes_again(make_lab: Callable[..., Lab]) -> None:
    copies = slow(make_lab, 'timeout = "5s"\n')
    senders = [
        one
        for one in psutil.Process(copies.daemon("a").pid).children(recursive=True)
        if one.name() == "rsync"
    ]
    assert len(senders) > 1, "the rsync daemon, and what it made for the transfer"
    sender = max(senders, key=lambda one: one.create_time())
    sender.send_signal(signal.SIGSTOP)
    stopped_s = time.monotonic()
    try:
        # By the log: it is tried again in a second, and a busy machine may not look in between.
        said = "the pass failed: nothing moved for 5 s"
        copies.wait(lambda: said in copies.log("b"), "the end of the pass")
        assert 4 < time.monotonic() - stopped_s < 12
        assert "big" not in copies.names("b")
        copies.lab.b.nfsha("sync", "--bandwidth", "unlimited")
        copies.wait(lambda: "big" in copies.names("b"), "the file after all")
    finally:
        with suppress(psutil.NoSuchProcess):
            sender.send_signal(signal.SIGCONT)
    copies.sync()
    assert copies.differences() == []


# ------------------------------------------------------------------ quarantine


def test_what_a_pairing_put_aside_comes_back_over_nothing(copies: Copies) -> None:
    (copies.here("a") / "truth").write_text("of a")
    (copies.here("b") / "truth").write_text("of b, another")
    (copies.here("b") / "only-b").write_text("only here")
    copies.start()
    copies.wait_phase("a", "ACTIVE")
    copies.wait(lambda: copies.volume("b")["paired"] == "unpaired-there", "an unpaired volume")
    copies.lab.b.nfsha("volumes", "pair", "data", "--yes")
    copies.wait_phase("b", "PASSIVE", within_s=20)
    entry = quarantine(copies, "b", "list")[1]["entries"][0]["name"]
    code, shown = quarantine(copies, "b", "show", entry)
    assert (code, [one["name"] for one in shown["items"]]) == (0, ["only-b", "truth"])

    code, told = quarantine(copies, "b", "restore", entry)
    assert code != 0
    assert "this node does not serve" in told["error"]
    copies.lab.b.nfsha("sync", "--pause")
    code, told = quarantine(copies, "b", "restore", entry, "only-b", "--to", "found")
    assert (code, told["files"]) == (0, 1)
    assert (copies.here("b") / "found" / "only-b").read_text() == "only here"

    died_ms = copies.now_ms()
    copies.lab.power_cut("a")
    copies.wait_phase("b", "ACTIVE", since_ms=died_ms)
    code, told = quarantine(copies, "b", "restore", entry)
    assert (code, told["refused_count"]) == (3, 1)
    assert (copies.here("b") / "truth").read_text() == "of a"
    code, told = quarantine(copies, "b", "restore", entry, "--beside")
    assert (code, told["emptied"]) == (0, True)
    beside = f"truth.nfsha-restored-{entry}"
    assert (copies.here("b") / "truth").read_text() == "of a"
    assert (copies.here("b") / beside).read_text() == "of b, another"
    assert quarantine(copies, "b", "list")[1]["entries"] == []


def test_limits_of_the_quarantine_are_an_alarm_and_drop_only_where_configured(lab: Lab) -> None:
    limits = 'quarantine_max_age = "1h"\nquarantine_max_size = "1MB"\n'
    copies = Copies(lab, sync=SYNC + limits)
    copies.settle_whole()
    kept = {
        why: _put_aside(copies.here("b"), why, age_ns, size)
        for why, age_ns, size in (
            ("old", 2 * HOUR_NS, 100), ("large", HOUR_NS // 2, 2_000_000), ("young", 0, 1000),
        )
    }  # fmt: skip
    _restart(copies)  # the limits are looked at once a minute, and first at the start
    copies.wait(lambda: bool(_alarm(copies)), "an alarm")
    assert "the limit is 1,000,000" in _alarm(copies)
    assert "its oldest entry is 2 h old" in _alarm(copies)
    listed = quarantine(copies, "b", "list")[1]
    assert [one["name"] for one in listed["entries"]] == sorted(kept.values())
    assert "OVER ITS LIMIT" in lab.b.nfsha("quarantine", "list").stdout

    config = lab.b.path("/etc/nfsha") / "nfsha.toml"
    config.write_text(config.read_text().replace(limits, f"{limits}quarantine_drop = true\n"))
    _restart(copies)
    copies.wait(
        lambda: len(list((copies.here("b") / ".nfsha-quarantine").iterdir())) == 1, "one left"
    )
    assert [one["name"] for one in quarantine(copies, "b", "list")[1]["entries"]] == [kept["young"]]
    for why in ("old", "large"):
        assert f"quarantine entry {kept[why]} was beyond its limits" in copies.log("b")
    assert _alarm(copies) == ""

    code, _ = quarantine(copies, "b", "drop", kept["young"], "--yes")
    assert code == 0
    assert list((copies.here("b") / ".nfsha-quarantine").iterdir()) == []
    assert quarantine(copies, "b", "drop", kept["young"], "--yes")[0] == 3


def _restart(copies: Copies) -> None:
    copies.daemon("b").stop(5.0)
    began_ms = copies.now_ms()
    copies.start("b")
    copies.wait_phase("b", "PASSIVE", since_ms=began_ms)


def _put_aside(root: Path, why: str, age_ns: int, size: int) -> str:
    """Makes a quarantine entry of that age, with a file of that size; returns its name."""
    (root / why).write_bytes(bytes(size))
    root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        store = Quarantine(root_fd, clock_ns=lambda: time.time_ns() - age_ns)
        entry = store.begin("resync", why=why, epoch=None, operation="test", by="test")
        store.keep(entry, [why.encode()])
        store.finish(entry)
    finally:
        os.close(root_fd)
    return entry.name


def _alarm(copies: Copies) -> str:
    alarms = {one["name"]: one["text"] for one in copies.lab.b.status()["alarms"]}
    return str(alarms.get("quarantine-full data", ""))

"""The plan of a move in numbers, its approval, and the report: both daemons, real data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nfsha.daemon.report_shape import sound
from nfsha.host import reports
from tests.netns.copies import Copies
from tests.netns.lab import Lab
from tests.netns.test_handover import Moving, source_that_hangs

pytestmark = pytest.mark.timeout(120)

BY_HAND = '[sync]\nevery = "1h"\njitter = "0s"\n'
"""Nothing is copied but by a command: what a dry run finds is what the test has written."""

BUSY_MS = 50
"""A turn of a busy machine between two clocks' readings of one moment."""


def ask(copies: Copies, node: str, *argv: str) -> tuple[int, dict[str, Any]]:
    """A command with --json on a node: its exit code and answer."""
    done = copies.lab.node(node).nfsha(*argv, "--json", check=False, timeout_s=60)
    return done.returncode, json.loads(done.stdout)


def dry_run(copies: Copies, node: str, command: str = "switchover") -> dict[str, Any]:
    code, plan = ask(copies, node, command, "--dry-run", "--list")
    assert code == 0, plan
    return plan


def refusal(copies: Copies, node: str, command: str = "switchover") -> str:
    """Why a plan that there never was is refused on a node: for its guards, if one fails."""
    code, told = ask(copies, node, command, "--plan", "nonsense")
    assert code == 3
    return str(told["error"])


def looks(root: Path) -> dict[str, tuple[int, ...]]:
    """Every name below a folder, with what a change of it would change (but for access times)."""
    found: dict[str, tuple[int, ...]] = {}
    for folder, _, names in os.walk(root):
        for path in [Path(folder), *(Path(folder) / name for name in names)]:
            facts = path.lstat()
            found[str(path.relative_to(root))] = (
                facts.st_ino, facts.st_mode, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns,
            )  # fmt: skip
    return found


def contents(root: Path) -> dict[str, bytes]:
    """What a node keeps for good: its journal, its marks, the source's notes of changes."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for part in ("journal", "marks", "changes")
        for path in [root / part, *(root / part).rglob("*")]
        if path.is_file()
    }


def noted(copies: Copies, folder: str) -> bool:
    """Do the serving node's notes have this folder? They are written a little after a change."""
    notes = (copies.lab.folder / "a" / "lib" / "changes").iterdir()
    return any(f" {folder}\0".encode() in path.read_bytes() for path in notes)


def everything(copies: Copies) -> dict[str, object]:
    """Both trees, and all that both daemons keep."""
    found: dict[str, object] = {}
    for node in ("a", "b"):
        found |= {f"{node} tree {name}": one for name, one in looks(copies.here(node)).items()}
        kept = contents(copies.lab.folder / node / "lib")
        found |= {f"{node} lib {name}": one for name, one in kept.items()}
    return found


def changed(before: dict[str, object], now: dict[str, object]) -> list[tuple[str, object, object]]:
    """What is another than before, with both."""
    names = sorted(before.keys() | now.keys())
    pairs = [(name, before.get(name), now.get(name)) for name in names]
    return [one for one in pairs if one[1] != one[2]]


def write_some(copies: Copies) -> None:
    here = copies.here("a")
    (here / "new").mkdir()
    (here / "new" / "small").write_bytes(b"x" * 1000)
    (here / "new" / "large").write_bytes(b"y" * 300_000)
    (here / "changed").write_bytes(b"z" * 5000)
    (here / "gone").unlink()


def report_of(copies: Copies, node: str, *, done: bool) -> dict[str, Any]:
    """The newest report on a node's disk; both nodes have both parts of it."""
    folder = copies.lab.folder / node / "lib" / reports.FOLDER

    def newest() -> dict[str, Any]:
        return reports.as_report(reports.read_reports(folder, sound)[-1])

    copies.wait(lambda: newest()["whole"] and newest()["done"] is done, "report", within_s=5)
    return newest()


def test_the_numbers_are_true_and_an_approval_is_for_one_plan(lab: Lab) -> None:
    copies = Copies(lab, sync=BY_HAND)
    copies.settle_whole()
    here = copies.here("a")
    for name in ("changed", "gone", "stays"):
        (here / name).write_bytes(b"before")
    (here / "many").mkdir()
    for number in range(150):
        (here / "many" / str(number)).touch()
    copies.sync()
    write_some(copies)

    # The numbers, from either node, and nothing is another than before.
    copies.wait(lambda: noted(copies, "new"), "note of what was written")
    before = everything(copies)
    first, second = dry_run(copies, "a"), dry_run(copies, "b")
    assert changed(before, everything(copies)) == []
    assert first["plan"] == second["plan"]
    for plan in (first, second):
        assert plan["numbers"]["sum"] == {
            "volumes": 1, "unknown": 0, "copy_files": 3, "copy_bytes": 306_000, "deletions": 1,
            "quarantine": 0,
        }  # fmt: skip
        assert plan["numbers"]["volumes"][0]["walk"] == "folders"
        assert plan["numbers"]["stall"]["ms"] > 0

    # Another plan by now: deletions above the limit.
    for path in (here / "many").iterdir():
        path.unlink()
    code, told = ask(copies, "b", "switchover", "--dry-run")
    assert code == 3, told
    assert "deletions of 151 files" in told["error"]
    assert "NO" in told["error"]
    copies.sync(check=False)
    copies.wait(lambda: "waits" in refusal(copies, "a"), "word of what is held")
    for node in ("a", "b"):
        code, told = ask(copies, node, "switchover", "--plan", first["plan"])
        assert code == 3
        assert "waits for an operator" in told["error"]
    copies.sync("--accept-deletes", copies.copy()["plan"]["hash"])

    # New writes of clients leave it as it is.
    present = dry_run(copies, "a")["plan"]
    (here / "later").write_bytes(b"later")
    since_ms = copies.now_ms()
    code, told = ask(copies, "a", "switchover", "--plan", present)
    assert code == 0, told
    froze = copies.wait_phase("a", "FREEZING", since_ms=since_ms)
    heard = copies.wait_phase("a", "RETURNED", since_ms=since_ms)
    here_and_there = [report_of(copies, node, done=True) for node in ("a", "b")]
    told = ask(copies, "b", "events", "--report", here_and_there[0]["id"])[1]["report"]
    assert here_and_there == [told, told]
    assert abs(told["stall_ms"] - (heard.at_ms - froze.at_ms)) <= BUSY_MS
    assert told["receiver"]["volumes"][0]["copied_files"] == 1
    assert "report" in [event.row for event in copies.events("a", since_ms)]

    # Of another epoch now; and there is no plan of that name.
    code, told = ask(copies, "b", "failback", "--plan", present)
    assert code == 3
    assert f"plan {present} was approved" in told["error"]
    assert "no plan 'nonsense' is known" in refusal(copies, "a", "failback")

    # One that is ended tells why, and how long the clients were held, on both nodes.
    since_ms = copies.now_ms()
    moving = Moving(copies, "b", "failback")
    with source_that_hangs(copies, "b"):
        copies.wait_phase("a", "FINAL_SYNC", since_ms=since_ms)
        aborted_ms = copies.now_ms()
        copies.lab.node("b").nfsha("abort")
        served = copies.wait_phase("b", "ACTIVE", since_ms=aborted_ms)
    moving.join(60)
    assert moving.code == 4, moving.told
    assert "an operator (uid 0) aborted it on standby" in " ".join(moving.told.split())
    froze = copies.wait_phase("b", "FREEZING", since_ms=since_ms)
    here_and_there = [report_of(copies, node, done=False) for node in ("a", "b")]
    assert here_and_there[0] == here_and_there[1]
    assert abs(here_and_there[0]["stall_ms"] - (served.at_ms - froze.at_ms)) <= BUSY_MS


def test_what_goes_to_quarantine_is_named_before(lab: Lab) -> None:
    copies = Copies(lab, sync=BY_HAND + 'resync = "on-failback"\n')
    copies.settle_whole()
    here = copies.here("a")
    for name in ("alike", "both", "same"):
        (here / name).write_bytes(b"before")
    copies.sync()
    facts = (here / "alike").stat()
    (here / "alike").write_bytes(b"beside")
    os.utime(here / "alike", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    (here / "both").write_bytes(b"never replicated")
    (here / "only-here").write_bytes(b"never replicated")
    copies.lab.power_cut("a")
    copies.wait_phase("b", "ACTIVE")
    (copies.here("b") / "reign").write_bytes(b"of the standby")
    (copies.here("b") / "both").write_bytes(b"of the standby, too")
    since_ms = copies.now_ms()
    copies.lab.boot("a")
    copies.start("a")
    copies.wait_phase("a", "RETURNED", since_ms=since_ms, within_s=30)
    copies.wait(lambda: copies.copy("a")["state"] == "refused", "a resync that waits")
    before = everything(copies)
    plans = [dry_run(copies, node, "failback") for node in ("a", "b")]
    assert changed(before, everything(copies)) == []
    for plan in plans:
        volume = plan["numbers"]["volumes"][0]
        assert volume["walk"] == "full"
        assert sorted(volume["names"]) == ["alike", "both", "only-here"]
        assert plan["numbers"]["sum"]["quarantine"] == 3
        assert plan["numbers"]["sum"]["copy_files"] == 3
    done = copies.lab.b.nfsha("failback", "--yes", check=False, timeout_s=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pass 1 (full walk, 1 volume)" in done.stdout  # as the receiver told it
    assert "3 in quarantine" in done.stdout
    kept = [path.name for path in (copies.here("a") / ".nfsha-quarantine").rglob("tree/*")]
    assert sorted(kept) == ["alike", "both", "only-here"]
    assert report_of(copies, "a", done=True)["receiver"]["volumes"][0]["quarantined"] == 3

"""`nfsha failback` from outside: what it shows and sends, how it ends; ^C only detaches."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nfsha.cli import client, handover, render_handover
from nfsha.cli.exits import CommandError, Exit
from nfsha.cli.main import main
from nfsha.daemon.report_shape import sound
from nfsha.host import control, reports
from tests.unit import situations
from tests.unit.fake_daemon import Daemon, Facts, configure, said

Said = pytest.CaptureFixture[str]

PLAN: Facts = {
    "to": "standby", "ok": True, "plan": "0123456789ab", "resync": [],
    "guards": [{"name": "journal", "ok": True, "found": "sound"}],
}  # fmt: skip
VOLUME: Facts = {
    "name": "data", "uuid": "u-1", "walk": "full", "why_full": "resync", "copy_files": 3,
    "copy_bytes": 306_000, "deletions": 1, "held": "", "plan": "", "quarantine": 12,
    "names": ["only-here", "a\\x0ab"], "lacking": "", "note": "", "trouble": "",
}  # fmt: skip
NUMBERS: Facts = {
    "volumes": [VOLUME, {**VOLUME, "name": "dead", "trouble": "its disk hangs"}],
    "sum": {"volumes": 2, "unknown": 1, "copy_files": 3, "copy_bytes": 306_000, "deletions": 1,
            "quarantine": 12},
    "stall": {"ms": 640, "pass_ms": 120, "writes_bytes_s": 2_000_000, "rate_bytes_s": 84_000_000,
              "unmeasured": 1, "large_bytes": 2_100_000_000},
    "took_ms": 300,
}  # fmt: skip
CLIENTS: Facts = {
    "serving": True, "ends_own_by": "SOCK_DESTROY", "tickles": 0, "ended": 0, "trouble": "",
    "here": {"age_ms": 5, "total": 3, "delivered": True, "clients": [
        {"client": "10.0.0.5", "client_ports": [700, 701], "service": "nfs", "vip": "10.0.0.1"},
        {"client": "10.0.0.6", "client_ports": [702], "service": "nfs", "vip": "10.0.0.1"},
    ]},
    "saved": {"age_ms": None, "total": 0, "clients": []},
}  # fmt: skip
PART: Facts = {
    "node": "here", "epoch": 8, "to": "standby", "began_ns": 10**18, "done": True, "why": "done",
    "took_ms": 2200, "stall_ms": 310, "stall_how": "measured so",
    "steps": {"PREPARED": 270, "FREEZING": 40},
}  # fmt: skip
RECEIVED: Facts = {
    **PART, "stall_ms": None, "steps": {"RESTORING": 5, "PRESYNC": 1900, "FINAL_SYNC": 290},
    "volumes": [{"name": "data", "passes": 3, "copied_files": 4, "copied_bytes": 5000,
                 "deleted": 6, "quarantined": 7}],
    "rounds": [{"what": "full", "took_ms": 900, "copied_files": 4, "copied_bytes": 5000,
                "trouble": "it was broken off"}],
}  # fmt: skip
REPORT = reports.as_report({"id": "8-0123abcd", "giver": PART, "receiver": RECEIVED})


def status(step: str | None = None, **other: Any) -> Facts:
    """The status of the primary, which serves, in a step of a switchover."""
    pair = situations.settled()
    facts = dict(pair.seen(pair.primary))
    facts["handover"] = {
        "side": "giver" if step else None, "step": step, "text": "", "held_ms": None, "last": None,
        "progress": None, **other,
    }  # fmt: skip
    return {"status": facts}


def served_there() -> Facts:
    """As the standby tells it, once it serves."""
    pair = situations.settled()
    facts = dict(pair.seen(pair.primary))
    return {"status": {**facts, "role": "standby", "handover": status()["status"]["handover"]}}


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    yield from prepare(tmp_path, monkeypatch)


def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    """A daemon that knows a plan, and would move the service by it."""
    one = Daemon(configure(tmp_path, monkeypatch) / "run" / "nfsha.sock")
    one.answers |= {
        "handover-plan": PLAN, "clients": {"clients": CLIENTS},
        "handover": {"ok": True, "row": "C83", "why": "asked"},
        "reports": {"reports": []}, "report": {"report": REPORT}, "status": status(),
    }  # fmt: skip
    one.stream = [
        {"progress": {"looked_at": 1, "volumes": 2}},
        {"done": True, "plan": PLAN, "numbers": NUMBERS, "why": ""},
    ]
    monkeypatch.setattr(handover, "POLL_S", 0.001)
    one.start()
    yield one
    one.stop()


def goes(daemon: Daemon, *steps: Facts) -> None:
    """What the daemon's status says, one after the other; a report is there at the end."""
    left = list(steps)

    def now() -> Facts:
        if len(left) == 1:
            daemon.answers["reports"] = {"reports": [REPORT]}
            return left[0]
        return left.pop(0)

    daemon.answers["status"] = now


def asked(daemon: Daemon, name: str) -> list[Facts]:
    return [args for command, args in daemon.asked if command == name]


def test_a_dry_run_shows_the_numbers_and_moves_nothing(daemon: Daemon, capsys: Said) -> None:
    assert main(["switchover", "--dry-run"]) == Exit.DONE
    out, _ = said(capsys)
    for words in (
        "3 files to copy (306 kB), 1 to delete, 12 files to quarantine in 2 volumes",
        "1 volume not known", "all was walked: resync", "to quarantine: only-here",
        "and 10 more to quarantine", "not known: its disk hangs", "about 640 ms", "84 MB/s",
        "large files of 2.1 GB change, and are read as a whole",
        "3 connections of 2 clients: 10.0.0.5 (2), 10.0.0.6 (1)", "0123456789ab",
    ):  # fmt: skip
        assert words in " ".join(out.split()), words
    assert asked(daemon, "handover") == []
    assert asked(daemon, "handover-numbers") == [{"to": "standby", "list": False}]
    assert main(["switchover", "--dry-run", "--list", "--json"]) == Exit.DONE
    told = json.loads(said(capsys)[0])
    assert told["numbers"] == NUMBERS
    assert told["clients"] == CLIENTS
    assert asked(daemon, "handover-numbers")[-1]["list"] is True


def test_where_nobody_knows_the_numbers_it_says_so(daemon: Daemon, capsys: Said) -> None:
    daemon.stream = [{"done": True, "plan": PLAN, "numbers": None, "why": "the peer is silent"}]
    assert main(["switchover", "--dry-run"]) == Exit.DONE
    assert "not known: the peer is silent" in said(capsys)[0]


def test_what_the_numbers_forbid_is_refused(daemon: Daemon, capsys: Said) -> None:
    bad = {**PLAN, "ok": False, "guards": [{"name": "room", "ok": False, "found": "too small"}]}
    daemon.stream = [{"done": True, "plan": bad, "numbers": NUMBERS, "why": ""}]
    assert main(["failback", "--dry-run"]) == Exit.REFUSED
    assert "NO  room  too small" in said(capsys)[1]


def test_it_asks_with_the_plan_and_approves_that_one(
    daemon: Daemon, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    goes(daemon, status(), status("PRESYNC"), status("FREEZING", held_ms=40), served_there())
    assert main(["switchover"]) == Exit.DONE
    out, _ = said(capsys)
    assert out.index("12 files to quarantine") < out.index("Type yes") < out.index("PRESYNC")
    assert asked(daemon, "handover") == [{"to": "standby", "plan": "0123456789ab"}]
    assert "clients are held from now on" in out
    assert "done: the standby serves" in out
    assert "310 ms: measured so" in " ".join(out.split())


def test_an_approval_by_its_name_asks_nothing(daemon: Daemon, capsys: Said) -> None:
    daemon.answers["handover"] = control.CommandError("plan fff is not it", {"refused": True})
    assert main(["switchover", "--plan", "fff"]) == Exit.REFUSED
    assert asked(daemon, "handover") == [{"to": "standby", "plan": "fff"}]
    assert asked(daemon, "handover-plan") == asked(daemon, "handover-numbers") == []
    assert "plan fff is not it" in said(capsys)[1]


def test_yes_takes_the_present_plan_without_a_look_at_all_volumes(
    daemon: Daemon, capsys: Said
) -> None:
    goes(daemon, status("PRESYNC"), served_there())
    assert main(["switchover", "--yes", "--json"]) == Exit.DONE
    told = json.loads(said(capsys)[0])
    assert (told["ok"], told["held_s"], told["report"]["id"]) == (True, 0.31, "8-0123abcd")
    assert asked(daemon, "handover-numbers") == []


def test_yes_looks_at_the_volumes_where_files_may_go_to_quarantine(
    daemon: Daemon, capsys: Said
) -> None:
    """Whether there is room for them is known only then."""
    resyncs = {**PLAN, "resync": ["data"]}
    daemon.answers["handover-plan"] = resyncs
    bad = {**resyncs, "ok": False, "guards": [{"name": "room", "ok": False, "found": "too small"}]}
    daemon.stream = [{"done": True, "plan": bad, "numbers": NUMBERS, "why": ""}]
    assert main(["failback", "--yes"]) == Exit.REFUSED
    assert asked(daemon, "handover") == []
    assert "NO  room  too small" in said(capsys)[1]


def test_the_progress_names_pass_bytes_and_what_is_left(daemon: Daemon, capsys: Said) -> None:
    move = {
        "round": 2, "what": "changes", "volumes": 3, "files": 5, "bytes": 4_000_000,
        "total_bytes": 9_000_000, "eta_s": 12,
    }  # fmt: skip
    goes(
        daemon, status("PRESYNC"), status("PRESYNC", progress=move),
        status("PREPARED", held_ms=250), served_there(),
    )  # fmt: skip
    assert main(["switchover", "--yes"]) == Exit.DONE
    assert "pass 2 (what changed, 3 volumes), 4.0 MB of 9.0 MB, 12 s left" in said(capsys)[0]
    between = {"progress": {**move, "what": "", "bytes": 0, "eta_s": None}, "held_ms": None}
    assert render_handover.progress(between) == "pass 2 has ended"
    assert render_handover.progress({"held_ms": 250}) == "clients held for 250 ms"
    assert render_handover.progress({"held_ms": None, "progress": None}) == ""


def test_on_a_terminal_the_progress_is_one_line_in_place(
    daemon: Daemon, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    goes(
        daemon, status("PRESYNC", held_ms=None), status("PREPARED", held_ms=250),
        status("PREPARED", held_ms=350), served_there(),
    )  # fmt: skip
    assert main(["switchover", "--yes"]) == Exit.DONE
    out, _ = said(capsys)
    lines = [line.rpartition("\r\x1b[K")[2] for line in out.split("\n")]
    assert "clients held for 350 ms" in out
    assert not any("clients held for" in line for line in lines)  # all of them were replaced


def test_interrupted_it_only_ceases_to_watch(
    daemon: Daemon, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes(daemon, status("PRESYNC"), status("PRESYNC"))

    def interrupt(_s: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nfsha.cli.handover.time.sleep", interrupt)
    assert main(["switchover", "--yes"]) == Exit.INTERRUPTED
    words = said(capsys)[1]
    assert "goes on by itself" in words
    assert "nfsha abort" in words
    assert "nfsha status --watch" in words
    assert asked(daemon, "abort") == []


def gone_for(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """After its first word the daemon does not answer so often, then says that it starts."""
    real, left = client.status, [*[Exit.UNREACHABLE] * times, Exit.CANNOT]

    def now(path: Path) -> Facts:
        facts = real(path)
        if facts["handover"]["step"] is None and left:
            raise CommandError(left.pop(0), "the daemon is not there")
        return facts

    monkeypatch.setattr(client, "status", now)


def test_a_daemon_that_is_restarted_is_waited_for(
    daemon: Daemon, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone_for(monkeypatch, times=3)
    goes(daemon, status("PRESYNC"), status())
    assert main(["switchover", "--yes"]) == Exit.ABORTED
    out, error = said(capsys)
    assert out.count("the daemon here does not answer; waits for its return") == 1
    assert "aborted and rolled back, the primary serves" in error


def test_a_daemon_that_does_not_come_back_is_waited_for_no_longer(
    daemon: Daemon, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "BACK_WITHIN_S", 0.05)
    gone_for(monkeypatch, times=1_000_000)
    goes(daemon, status("PRESYNC"), status())
    assert main(["switchover", "--yes"]) == Exit.UNREACHABLE
    words = said(capsys)[1]
    assert "how it ended is not known here" in words
    assert "`nfsha events --reports` on the other node" in words


def test_another_error_than_silence_is_told_at_once(
    daemon: Daemon, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone_for(monkeypatch, times=0)  # "it cannot", though it was never gone
    goes(daemon, status("PRESYNC"), status())
    assert main(["switchover", "--yes"]) == Exit.CANNOT
    assert "the daemon is not there" in said(capsys)[1]


def test_an_aborted_one_ends_with_its_report(daemon: Daemon, capsys: Said) -> None:
    parts = {"giver": {**PART, "done": False, "why": "the operator ended it"}}
    daemon.answers["report"] = {
        "report": reports.as_report(
            {"id": "8-0123abcd", **parts, "receiver": {**RECEIVED, "done": False, "why": "x"}}
        )
    }
    goes(daemon, status("PRESYNC"), status())
    assert main(["switchover", "--yes"]) == Exit.ABORTED
    words = " ".join(said(capsys)[1].split())
    assert "aborted and rolled back, the primary serves" in words
    assert "giver: here: FREEZING 40 ms, PREPARED 270 ms; ended: the operator ended it" in words


def test_reports_are_listed_and_shown_also_from_disk(
    daemon: Daemon, capsys: Said, tmp_path: Path
) -> None:
    daemon.answers["reports"] = {"reports": [REPORT]}
    assert main(["events", "--reports"]) == Exit.DONE
    assert "8-0123abcd switchover to the standby: done in 2.2 s" in " ".join(
        said(capsys)[0].split()
    )
    assert main(["events", "--report", "8-0123abcd"]) == Exit.DONE
    shown = " ".join(said(capsys)[0].split())
    assert "4 files copied (5.0 kB), 6 deleted, 7 in quarantine" in shown
    assert "receiver: here: PRESYNC 1.9 s, FINAL_SYNC 290 ms, RESTORING 5 ms" in shown
    assert "not complete: it was broken off" in shown
    daemon.answers["report"] = {"report": None}
    assert main(["events", "--report", "8-0123abce"]) == Exit.CANNOT
    said(capsys)


def test_reports_on_disk_while_no_daemon_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    configure(tmp_path, monkeypatch)
    store = reports.ReportStore(tmp_path / "state" / reports.FOLDER, sound)
    store.put("8-0123abcd", "giver", PART)
    assert main(["events", "--reports"]) == Exit.DONE
    assert "8-0123abcd" in said(capsys)[0]
    assert main(["events", "--report", "8-0123abcd", "--json"]) == Exit.DONE
    assert json.loads(said(capsys)[0])["report"]["giver"] == PART

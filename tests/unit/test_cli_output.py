"""What a command does where its words cannot go: closed, full, unread, narrow, or not permitted."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nfsha.cli import handover, output, watch
from nfsha.cli.exits import Exit
from nfsha.cli.main import main
from nfsha.host import control
from tests.unit.fake_daemon import Daemon, configure, said
from tests.unit.test_cli_commands import ROOT
from tests.unit.test_cli_handover import PLAN, asked, goes, prepare, served_there, status

PROGRAM = (sys.executable, "-c", "import sys; from nfsha.cli.main import main; sys.exit(main())")
FULL = "the output cannot be written: No space left on device"


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    yield from prepare(tmp_path, monkeypatch)


def run(
    *words: str, before: Callable[[], object] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(
        [*PROGRAM, *words], text=True, timeout=60, check=False, cwd=ROOT, preexec_fn=before, **given
    )


def close(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize(
    "words",
    [("status",), ("status", "--json"), ("events", "--reports"), ("--help",), ("status", "-h")],
)
def test_a_full_disk_is_told_and_is_no_internal_error(
    daemon: Daemon, words: tuple[str, ...]
) -> None:
    with Path("/dev/full").open("w") as full:
        done = run(*words, stdout=full)
    assert (done.returncode, done.stderr) == (Exit.CANNOT, f"nfsha: {FULL}\n")


def test_errors_that_cannot_be_shown_do_not_change_the_exit_code(daemon: Daemon) -> None:
    daemon.answers["handover"] = control.CommandError("no", {"refused": True})
    with Path("/dev/full").open("w") as full:
        assert run("failback", "--plan", "fff", stderr=full).returncode == Exit.REFUSED
    closed = run("failback", "--plan", "fff", before=lambda: os.close(2))
    assert closed.returncode == Exit.REFUSED


@pytest.mark.parametrize("closed", [(0,), (1,), (0, 1, 2)])
def test_what_was_closed_is_no_error(daemon: Daemon, closed: tuple[int, ...]) -> None:
    done = run("status", before=lambda: close(closed))
    assert (done.returncode, done.stderr) == (Exit.DONE, "")
    done = run("switchover", before=lambda: close(closed))
    assert done.returncode == Exit.USAGE
    assert asked(daemon, "handover") == []


def test_a_plan_that_cannot_be_shown_is_not_approved(daemon: Daemon) -> None:
    with Path("/dev/full").open("w") as full:
        done = run("switchover", "--yes", stdout=full)
    assert done.returncode == Exit.CANNOT
    assert "the plan cannot be shown: No space left on device: nothing has changed" in done.stderr
    assert asked(daemon, "handover") == []


def test_a_move_that_nobody_looks_at_any_more_still_tells_how_it_ended(daemon: Daemon) -> None:
    back = {**status()["status"]["handover"], "last": {"why": "the operator ended it"}}
    for last, code in ((served_there(), Exit.DONE), (status(**back), Exit.ABORTED)):
        goes(daemon, status(), *[status("PRESYNC")] * 3, last)
        with Path("/dev/full").open("w") as full:
            done = run("switchover", "--plan", PLAN["plan"], stdout=full)
        assert done.returncode == code, done.stderr


def test_an_empty_name_is_no_name(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["failback", "--yes", "--plan", ""]) == Exit.USAGE
    assert "--plan '' names no plan" in said(capsys)[1]
    assert asked(daemon, "handover") == []
    assert main(["events", "--report", ""]) == Exit.CANNOT
    assert "there is no report ''" in said(capsys)[1]


def test_no_terminal_obeys_what_comes_from_elsewhere(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.answers["handover"] = control.CommandError("x\x1b[31m\ny", {"refused": True})
    assert main(["failback", "--plan", "x\x1b[31m"]) == Exit.REFUSED
    assert said(capsys)[1] == "nfsha: refused: x?[31m\ny\n"
    daemon.answers["report"] = {"report": None}
    assert main(["events", "--report", "x" * 1000]) == Exit.CANNOT
    assert f"there is no report '{'x' * watch.MAX_SHOWN}';" in said(capsys)[1]


def test_who_may_not_ask_is_told_that_and_not_that_there_is_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(tmp_path, monkeypatch)

    def denied(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("socket.socket.connect", denied)
    for words in (["events"], ["events", "--reports"], ["failback", "--yes"], ["status"]):
        assert main(words) == Exit.CANNOT
        assert "be root or in the group nfsha" in said(capsys)[1]
    monkeypatch.undo()
    again = tmp_path / "again"
    again.mkdir()
    configure(again, monkeypatch)
    monkeypatch.setattr(os, "access", lambda *_: False)
    for words in (["events"], ["events", "--reports"]):
        assert main(words) == Exit.CANNOT
        assert "the daemon is not running, and there is no permission for" in said(capsys)[1]


def test_a_line_in_place_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(output, "say", lambda text, end: told.append(text))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for columns, shown in (("40", 39), ("300", handover.LINE_COLUMNS - 1)):
        monkeypatch.setenv("COLUMNS", columns)
        handover._Live(shown=True).show("x" * 500)
        assert told.pop() == "\r\x1b[K" + "x" * shown


def test_an_interrupt_while_it_is_asked_for_says_that_it_may_go_on(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nfsha.cli.client.command", interrupted)
    assert main(["failback", "--plan", PLAN["plan"]]) == Exit.INTERRUPTED
    assert "it goes on by itself" in said(capsys)[1]


def test_a_terminal_that_hangs_up_ends_nothing(daemon: Daemon) -> None:
    goes(daemon, status(), *[status("PRESYNC")] * 3, served_there())
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "switchover", "--plan", PLAN["plan"]], stdout=theirs, stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL, text=True, cwd=ROOT,
    )  # fmt: skip
    os.close(theirs)
    os.close(ours)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (Exit.DONE, "")

"""The commands from outside: what they print, what they send, and how they end.

The daemon's end of the socket is the real one, with answers given by the test.
"""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import nfsha
from nfsha import config
from nfsha.cli import release, setup, watch
from nfsha.cli.exits import Exit
from nfsha.cli.main import main
from nfsha.host import control
from nfsha.host.events import EventLog
from tests.unit import situations
from tests.unit.fake_daemon import Daemon, Facts, configure, said

ROOT = Path(__file__).resolve().parents[2]
EVENT = {
    "wall": "2026-01-02T03:04:05.678Z", "at_ms": 5, "row": "A60", "phase": "ACTIVE",
    "to": "ISOLATED", "why": "nothing proves any more", "detail": "",
}  # fmt: skip
ACCEPTED = {"ok": True, "row": "C10", "why": "the operator says that this node shall serve"}
REFUSED = {"ok": False, "row": "C14", "why": "the peer is heard and serves"}


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration whose paths are in a folder of the test's."""
    return configure(tmp_path, monkeypatch)


@pytest.fixture
def daemon(node: Path) -> Iterator[Daemon]:
    one = Daemon(node / "run" / "nfsha.sock")
    pair = situations.settled()
    one.answers["status"] = {"status": pair.seen(pair.primary)}
    one.start()
    yield one
    one.stop()


# --------------------------------------------------------------------------- looking


def test_status_for_people_and_for_programs(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status"]) == Exit.DONE
    assert said(capsys)[0].startswith("ACTIVE on primary for ")
    assert main(["status", "--json"]) == Exit.DONE
    assert json.loads(said(capsys)[0])["phase"] == "ACTIVE"
    assert daemon.asked == [("status", {})] * 2


@pytest.mark.parametrize(
    "words",
    [
        ["status"], ["events", "--follow"], ["activate", "--yes"], ["maintenance", "on"],
        ["confirm-peer-down", "--yes"], ["resolve", "--keep", "primary"],
    ],
)  # fmt: skip
def test_without_a_daemon_commands_end_with_six(
    words: list[str], node: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == Exit.UNREACHABLE
    out, err = said(capsys)
    assert out == ""
    assert err.startswith("nfsha: the daemon is not running (nobody answers at ")
    assert main([*words, "--json"]) == Exit.UNREACHABLE
    answer = json.loads(said(capsys)[0])
    assert (answer["ok"], answer["exit"]) == (False, 6)


def test_a_daemon_that_cannot_answer_is_quoted(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.answers["status"] = control.CommandError("the daemon is still starting", {"a": 1})
    assert main(["status"]) == Exit.CANNOT
    assert said(capsys) == ("", "nfsha: the daemon is still starting\n")
    assert main(["status", "--json"]) == Exit.CANNOT
    assert json.loads(said(capsys)[0])["a"] == 1


def test_another_socket_needs_no_configuration(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NFSHA_CONFIG", "/nonexistent")
    assert main(["status", "--socket", str(daemon.path)]) == Exit.DONE
    assert said(capsys)[0]
    assert main(["status"]) == Exit.USAGE
    assert "reached by --socket PATH" in said(capsys)[1]


def test_watching_survives_a_restart_of_the_daemon(
    node: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = Daemon(node / "run" / "nfsha.sock")
    daemon.answers["status"] = {"status": situations.settled().seen(situations.settled().primary)}
    rounds = iter([daemon.start, daemon.stop])

    def sleep(_seconds: float) -> None:
        step = next(rounds, None)
        if step is None:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr("nfsha.cli.watch.time.sleep", sleep)
    assert main(["status", "--watch"]) == Exit.INTERRUPTED
    screens = said(capsys)[0].split("\n\n")
    assert screens[0].startswith("nfsha: the daemon is not running")
    assert screens[1].startswith("ACTIVE on primary")
    assert screens[2].startswith("nfsha: the daemon is not running")


def test_watching_in_json_is_one_object_a_line(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sleep(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nfsha.cli.watch.time.sleep", sleep)
    assert main(["status", "--watch", "--json"]) == Exit.INTERRUPTED
    assert [json.loads(line)["phase"] for line in said(capsys)[0].splitlines()] == ["ACTIVE"]
    daemon.answers["status"] = control.CommandError("no")
    assert main(["status", "--watch"]) == Exit.CANNOT


class Terminal(io.StringIO):
    """Something that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_colour_only_on_a_terminal_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert watch.style().colour
    monkeypatch.setenv("NO_COLOR", "1")
    assert not watch.style().colour
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not watch.style().colour
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert not watch.style().colour


def test_watching_clears_a_terminal(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(_seconds: float) -> None:
        raise KeyboardInterrupt

    terminal = Terminal()
    monkeypatch.setattr("nfsha.cli.watch.time.sleep", sleep)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["status", "--watch"]) == Exit.INTERRUPTED
    assert terminal.getvalue().startswith("\x1b[H\x1b[2JACTIVE")


def test_events(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["events"] = {"events": [EVENT]}
    assert main(["events", "-n", "7"]) == Exit.DONE
    assert said(capsys)[0] == (
        "2026-01-02T03:04:05.678Z A60  ACTIVE -> ISOLATED: nothing proves any more\n"
    )
    assert daemon.asked[-1] == ("events", {"n": 7})
    assert main(["events", "--json"]) == Exit.DONE
    assert json.loads(said(capsys)[0]) == {"ok": True, "events": [EVENT]}


def test_events_that_are_followed_end_with_the_daemon(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.stream = [EVENT, EVENT]
    assert main(["events", "--follow", "-n", "0"]) == Exit.UNREACHABLE
    out, err = said(capsys)
    assert len(out.splitlines()) == 2
    assert "the daemon has ended" in err
    assert daemon.asked == [("follow", {"n": 0})]
    assert main(["events", "--follow", "--json"]) == Exit.UNREACHABLE
    lines = [json.loads(line) for line in said(capsys)[0].splitlines()]
    assert lines[:2] == [EVENT, EVENT]


def test_events_of_a_daemon_that_is_gone_are_read_from_its_file(
    node: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = EventLog(node / "state" / "events.jsonl")
    log.start()
    for number in range(3):
        log.append(at_ms=number, row="W90", phase="WAITING", to="WAITING", why=f"number {number}")
    log.close()
    assert main(["events", "-n", "2"]) == Exit.DONE
    out, _ = said(capsys)
    assert "number 0" not in out
    assert "number 2" in out
    assert "(the daemon is not running: read from " in out
    assert main(["events", "--json"]) == Exit.DONE
    assert json.loads(said(capsys)[0])["daemon"] is False
    assert main(["events", "--socket", str(node / "other.sock")]) == Exit.UNREACHABLE


# --------------------------------------------------------------------------- deciding


@pytest.mark.parametrize(
    ("words", "sent"),
    [
        (["maintenance", "on"], ("maintenance", {"on": True})),
        (["maintenance", "off"], ("maintenance", {"on": False})),
        (["confirm-peer-down", "--yes"], ("confirm-peer-down", {})),
        (["resolve", "--keep", "standby"], ("resolve", {"keep": "standby"})),
        (["activate", "--yes", "--wait", "0"], ("activate", {"force": False})),
        (["activate", "--yes", "--wait", "0", "--force"], ("activate", {"force": True})),
    ],
)
def test_a_decision_is_sent_once_and_its_rule_is_told(
    daemon: Daemon, words: list[str], sent: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.answers[sent[0]] = ACCEPTED
    assert main(words) == Exit.DONE
    assert "(C10): the operator says that this node shall serve" in said(capsys)[0]
    assert daemon.asked == [sent]
    daemon.answers[sent[0]] = REFUSED
    assert main(words) == Exit.REFUSED
    assert said(capsys) == ("", "nfsha: refused (C14): the peer is heard and serves\n")
    assert main([*words, "--json"]) == Exit.REFUSED
    answer = json.loads(said(capsys)[0])
    assert (answer["ok"], answer["exit"], answer["row"]) == (False, 3, "C14")


def status_of(*steps: tuple[str, bool]) -> Callable[[], Facts]:
    """Answers to `status`, one after the other, the last one for ever."""
    pair = situations.settled()
    left = list(steps)

    def answer() -> Facts:
        phase, serving = left.pop(0) if len(left) > 1 else left[0]
        facts = pair.seen(pair.standby) | {"phase": phase, "serving": serving, "row": "T90"}
        return {"status": facts}

    return answer


def test_activate_waits_until_the_node_serves(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.answers["activate"] = ACCEPTED
    daemon.answers["status"] = status_of(("TAKEOVER", False), ("ACTIVE", True))
    assert main(["activate", "--yes"]) == Exit.DONE
    assert said(capsys)[0] == "done (C10): this node serves\n"


def test_activate_that_is_given_up_is_aborted(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.answers["activate"] = ACCEPTED
    daemon.answers["status"] = status_of(("TAKEOVER", False), ("WAITING", False))
    assert main(["activate", "--yes", "--json"]) == Exit.ABORTED
    answer = json.loads(said(capsys)[0])
    assert (answer["ok"], answer["exit"], answer["phase"]) == (False, 4, "WAITING")
    assert answer["row"] == "C10"


def test_activate_that_takes_too_long_goes_on_by_itself(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.answers["activate"] = ACCEPTED
    daemon.answers["status"] = status_of(("TAKEOVER", False))
    assert main(["activate", "--yes", "--wait", "1"]) == Exit.INCOMPLETE
    assert "not complete after 1 s: TAKEOVER, T90" in said(capsys)[1]


@pytest.mark.parametrize("command", ["activate", "confirm-peer-down"])
def test_what_nobody_can_confirm_is_not_done(
    daemon: Daemon,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))
    assert main([command]) == Exit.USAGE
    assert "add --yes" in said(capsys)[1]
    assert daemon.asked == []


@pytest.mark.parametrize("command", ["activate", "confirm-peer-down"])
@pytest.mark.parametrize(("typed", "code"), [("yes\n", 0), ("y\n", 3), ("", 3)])
def test_a_terminal_is_told_what_it_means_and_asked(
    daemon: Daemon,
    command: str,
    typed: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    daemon.answers[command] = ACCEPTED
    assert main([command]) == code
    out, _ = said(capsys)
    assert out.startswith("ACTIVE on primary for ")
    assert "both may serve" in " ".join(out.split())
    assert (command in [asked for asked, _ in daemon.asked]) == (code == 0)


# --------------------------------------------------------------------------- set-up


def test_check_config_says_ok_and_what_was_accepted(
    node: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-config"]) == Exit.DONE
    first, *rest = said(capsys)[0].splitlines()
    assert first == f"OK: {node}/nfsha.toml: the primary, 192.0.2.10 on eth0"
    assert rest[0].startswith("warning: only a reachability witness arbitrates")
    assert main(["check-config", "--json"]) == Exit.DONE
    answer = json.loads(said(capsys)[0])
    assert answer["role"] == "primary"
    assert len(answer["warnings"]) == len(rest)


def test_check_config_lists_every_problem(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ROOT / "tests" / "invalid_config" / "many_errors_at_once.toml")
    assert main(["check-config", "--config", path]) == Exit.USAGE
    _, err = said(capsys)
    with pytest.raises(config.ConfigError) as caught:
        config.load(path)
    for problem in caught.value.problems:
        assert f"  {problem}\n" in err
    assert main(["check-config", "--config", path, "--json"]) == Exit.USAGE
    assert len(json.loads(said(capsys)[0])["problems"]) == len(caught.value.problems)


def test_run_with_a_wrong_configuration_ends_with_two(
    node: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--config", str(node / "none.toml")]) == Exit.USAGE
    assert "1 problem" in said(capsys)[1]


def test_run_hands_the_settings_to_the_daemon(
    node: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nfsha import daemon

    given: list[config.Settings] = []

    def runs(settings: config.Settings) -> int:
        given.append(settings)
        return 0

    monkeypatch.setattr(daemon, "run", runs)
    assert main(["run"]) == Exit.DONE
    assert given == [config.load(node / "nfsha.toml")]

    def fails(settings: config.Settings) -> int:
        raise daemon.DaemonError("interface eth0 does not exist: correct its name")

    monkeypatch.setattr(daemon, "run", fails)
    assert main(["run"]) == Exit.CANNOT
    assert said(capsys)[1] == "nfsha: interface eth0 does not exist: correct its name\n"


def test_run_of_half_an_installation_is_one_line(
    node: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(nfsha, "daemon", raising=False)
    monkeypatch.setitem(sys.modules, "nfsha.daemon", None)
    assert main(["run"]) == Exit.CANNOT
    assert said(capsys)[1].startswith("nfsha: nfsha is not completely installed: ")


def test_a_rotation_of_keys_step_by_step(node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def keygen(*words: str) -> Facts:
        assert main(["keygen", "--json", *words]) == Exit.DONE
        found: Facts = json.loads(said(capsys)[0])
        return found

    first = keygen()["seals"]
    assert (node / "cluster.key").stat().st_mode & 0o777 == 0o600
    assert main(["keygen"]) == Exit.CANNOT
    assert "there is a key file already" in said(capsys)[1]
    added = keygen("--add")
    second = added["opens"][1]
    assert (added["seals"], added["opens"][0]) == (first, first)
    used = keygen("--use", second)
    assert used["opens"] == [second, first]
    assert f"--drop {first}" in used["next"]
    assert keygen("--use", second)["opens"] == [second, first]
    assert keygen("--drop", first)["opens"] == [second]
    assert keygen("--show")["opens"] == [second]
    for words in (["--use", "00000000"], ["--drop", "00000000"]):
        assert main(["keygen", *words]) == Exit.CANNOT
        assert f"it holds {second}" in said(capsys)[1]
    secret = (node / "cluster.key").read_text(encoding="ascii").splitlines()[1].split()[0]
    assert main(["keygen", "--show"]) == Exit.DONE
    assert secret not in said(capsys)[0]


def test_a_key_is_made_before_there_is_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NFSHA_CONFIG", raising=False)
    monkeypatch.setattr(setup, "DEFAULT_CONFIG", tmp_path / "none.toml")
    monkeypatch.setattr(setup, "DEFAULT_KEY", tmp_path / "cluster.key")
    assert main(["keygen"]) == Exit.DONE
    assert (tmp_path / "cluster.key").is_file()
    assert main(["keygen", "--path", str(tmp_path / "other.key")]) == Exit.DONE
    assert main(["keygen", "--path", str(tmp_path / "none" / "cluster.key")]) == Exit.CANNOT
    assert "must exist and be writable" in said(capsys)[1]


def test_the_default_key_is_the_configurations() -> None:
    assert config.load(ROOT / "etc" / "nfsha.toml").paths.key == setup.DEFAULT_KEY


# --------------------------------------------------------------------------- release


def test_release_refuses_while_a_daemon_lives(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["release"]) == Exit.REFUSED
    assert "systemctl stop nfsha" in said(capsys)[1]


@pytest.mark.parametrize(("result", "releases"), [("success", False), (None, True)])
def test_release_if_stopped_leaves_a_restart_to_the_leases(
    node: Path,
    result: str | None,
    releases: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done: list[bool] = []

    async def pretend(settings: config.Settings, *, keep_rules: bool) -> list[Any]:
        done.append(keep_rules)
        return list(settings.vips)

    monkeypatch.setattr(release, "_release", pretend)
    monkeypatch.setenv("NFSHA_STOP_REASON", "restart" if result else "stop")
    assert main(["release", "--if-stopped"]) == Exit.DONE
    assert done == ([True] if releases else [])
    words = "removed 192.0.2.10 from eth0; the NFS ports stay closed" if releases else "nothing to"
    assert said(capsys)[0].startswith(words)


# --------------------------------------------------------------------------- the rest


def test_explain_and_its_unknown_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fsm", "explain", "p93"]) == Exit.DONE
    assert said(capsys)[0].startswith("P93\n")
    assert main(["fsm", "explain", "P93", "--json"]) == Exit.DONE
    assert json.loads(said(capsys)[0])["guard"] == "obstacle"
    assert main(["fsm", "explain", "P11"]) == Exit.USAGE
    assert "nearest are" in said(capsys)[1]


def test_table_diagram_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words, start in (
        (["fsm", "table"], "STARTING"),
        (["fsm", "mermaid"], "stateDiagram-v2"),
        (["version"], f"nfsha {nfsha.__version__}"),
    ):
        assert main(words) == Exit.DONE
        assert said(capsys)[0].startswith(start)
        assert main([*words, "--json"]) == Exit.DONE
        assert json.loads(said(capsys)[0])["ok"] is True


def test_no_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == Exit.USAGE
    assert "Exit codes:" in said(capsys)[1]
    assert main(["fsm"]) == Exit.USAGE


def test_an_error_of_the_system_is_one_line(
    node: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(settings: config.Settings) -> tuple[str, ...]:
        raise OSError(28, "No space left on device", "/somewhere")

    monkeypatch.setattr(setup, "warnings", full)
    assert main(["check-config"]) == Exit.CANNOT
    assert said(capsys) == ("", "nfsha: /somewhere: No space left on device\n")


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import sys; from nfsha.cli.main import main; sys.exit(main())",
         *words],
        capture_output=True, text=True, timeout=60, check=False, cwd=ROOT, **options,
    )  # fmt: skip


def test_a_reader_that_has_enough_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-c",
             "import sys; from nfsha.cli.main import main; sys.exit(main())", "fsm", "table"],
            stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False, cwd=ROOT,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_output_that_is_closed_is_no_error() -> None:
    done = run("version", preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_path_that_the_terminal_cannot_show_is_spelled_out() -> None:
    env = {"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "ascii"}
    done = run("check-config", "--json", "--config", "/nonexistent/ä.toml", env=env)
    assert done.returncode == Exit.USAGE
    assert "Traceback" not in done.stderr
    assert "\\u00e4" in done.stdout


def test_a_real_terminal_is_asked(daemon: Daemon) -> None:
    daemon.answers["confirm-peer-down"] = ACCEPTED
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from nfsha.cli.main import main; sys.exit(main())",
         "confirm-peer-down"],
        stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip
    os.close(theirs)
    os.write(ours, b"yes\n")
    out, _ = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == Exit.DONE, out
    assert "Type yes to go on: done (C10): " in out

"""Hooks as real processes: one at a time, bounded, gone before the next, and told in words."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nfsha.host import hooks
from nfsha.host.hooks import HookEnd, HookError, Hooks

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Makes a hook of a shell's lines; $F is its folder."""

    def make(*lines: str, name: str = "hook", mode: int = 0o755) -> Path:
        path = tmp_path / name
        path.write_text("\n".join(["#!/bin/sh", f"F={tmp_path}", *lines, ""]))
        path.chmod(mode)
        return path

    return make


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Of this process: others may run the same tests beside it."""
    yield
    own = hooks._name_of(os.getpid()).encode()
    marks = [hooks._environment(pid).get(hooks.STARTER.encode()) for pid, _ in hooks._processes()]
    assert own not in marks


def run(path: Path, timeout_ms: int = 10_000, **environment: str) -> HookEnd:
    return asyncio.run(Hooks(timeout_ms).run(path, environment))


def alive(pid: int) -> bool:
    return any(one == pid for one, _ in hooks._processes())


def wait_for(file: Path) -> str:
    deadline = time.monotonic() + 10
    while not file.exists() or not file.read_text().endswith("\n"):
        assert time.monotonic() < deadline, f"no {file}"
        time.sleep(0.005)
    return file.read_text().strip()


def test_a_hook_that_ends_well_is_told_what_it_needs_and_nothing_else(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_DAEMON", "x")
    path = write(
        "env >$F/env", "pwd >$F/pwd", "readlink /proc/self/fd/0 >$F/stdin", "umask >$F/umask"
    )
    assert run(path, NFSHA_HOOK="mount", NFSHA_MOUNTS="/a\n/b") == HookEnd(True, "")
    told = (tmp_path / "env").read_text()
    assert "NFSHA_HOOK=mount\n" in told
    assert "NFSHA_MOUNTS=/a\n/b\n" in told
    assert "PATH=/usr/local/sbin:" in told
    assert "SECRET" not in told
    assert (tmp_path / "pwd").read_text() == "/\n"
    assert (tmp_path / "stdin").read_text() == "/dev/null\n"
    assert (tmp_path / "umask").read_text() == "0022\n"


def test_it_has_a_session_of_its_own_and_no_real_time_class(write: Write, tmp_path: Path) -> None:
    path = write("cat /proc/self/stat >$F/stat", "chrt -p $$ >$F/class")
    policy = os.SCHED_RR | os.SCHED_RESET_ON_FORK
    os.sched_setscheduler(0, policy, os.sched_param(1))
    try:
        assert run(path).ok
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    assert int((tmp_path / "stat").read_text().split()[5]) != os.getsid(0)
    assert "SCHED_OTHER" in (tmp_path / "class").read_text()


def test_a_failure_has_its_status_and_the_last_lines(write: Write) -> None:
    path = write(
        "seq 100", "echo 'no such device' >&2", "printf 'caf\\351 \\033[31m\\n' >&2", "exit 7"
    )
    end = run(path)
    assert not end.ok
    assert end.words.startswith(f"{path}: exit status 7: 98 | 99 | 100 | no such device | caf")
    assert end.words.isprintable()
    assert run(write("exit 3")).words == f"{path}: exit status 3, and it said nothing"
    assert "ended by SIGSEGV" in run(write("kill -SEGV $$")).words


def test_endless_output_is_read_and_bounded(write: Write) -> None:
    end = run(write("head -c 3000000 /dev/zero | tr '\\0' x", "echo >&2", "echo end >&2", "exit 1"))
    assert end.words.endswith(" | end")
    assert len(end.words) < hooks.TAIL_LINES * (hooks.MAX_LINE + 10) + 200


def test_one_that_hangs_is_killed_with_all_it_started(write: Write, tmp_path: Path) -> None:
    path = write(
        "trap '' TERM", "sleep 1000 &", "echo $! >$F/pid", "echo stuck", "wait", "sleep 1000"
    )
    began_s = time.monotonic()
    end = run(path, timeout_ms=300)
    assert end.words == f"{path}: no end within 0.3 s, killed: stuck"
    assert time.monotonic() - began_s < 0.3 + hooks.GRACE_S + 2
    assert not alive(int((tmp_path / "pid").read_text()))


def test_what_it_leaves_in_a_session_of_its_own_lives_on(write: Write, tmp_path: Path) -> None:
    path = write("export F", "setsid sh -c 'echo $$ >$F/pid; exec sleep 1000' &",
                 "until test -s $F/pid; do sleep 0.01; done")  # fmt: skip
    assert run(path).ok, "the pipe that it holds keeps nobody waiting"
    pid = int(wait_for(tmp_path / "pid"))
    assert alive(pid)
    assert hooks.end_leftovers() == ""
    assert alive(pid)
    os.kill(pid, 9)
    while alive(pid):
        time.sleep(0.001)


def test_a_newer_order_ends_the_older_hook_before_it_begins(write: Write, tmp_path: Path) -> None:
    slow = write("trap 'sleep 0.2; echo gone >>$F/log; exit' TERM", "echo slow >>$F/log",
                 "while :; do sleep 0.01; done", name="slow")  # fmt: skip
    quick = write("echo quick >>$F/log", name="quick")

    async def both() -> tuple[HookEnd, HookEnd, HookEnd]:
        runner = Hooks(10_000)
        older = asyncio.ensure_future(runner.run(slow, {}))
        await asyncio.to_thread(wait_for, tmp_path / "log")
        between = asyncio.ensure_future(runner.run(slow, {}))
        await asyncio.sleep(0)
        newest = await runner.run(quick, {})
        return await older, await between, newest

    older, between, newest = asyncio.run(both())
    assert older.words == f"{slow}: ended, a newer order came"
    assert between.words == f"{slow}: not run, a newer order came first"
    assert newest.ok
    assert (tmp_path / "log").read_text().split() == ["slow", "gone", "quick"]


def test_the_end_ends_it(write: Write, tmp_path: Path) -> None:
    path = write("echo $$ >$F/pid", "sleep 1000")

    async def end() -> HookEnd:
        runner = Hooks(10_000)
        running = asyncio.ensure_future(runner.run(path, {}))
        pid = int(await asyncio.to_thread(wait_for, tmp_path / "pid"))
        await runner.end()
        assert not alive(pid)
        return await running

    assert not asyncio.run(end()).ok
    asyncio.run(Hooks(1000).end())


def test_the_loop_goes_on_while_a_hook_runs(write: Write) -> None:
    async def turns() -> int:
        running = asyncio.ensure_future(Hooks(5000).run(write("sleep 0.3"), {}))
        count = 0
        while not running.done():
            await asyncio.sleep(0.01)
            count += 1
        return count

    assert asyncio.run(turns()) > 10


def test_what_a_killed_daemon_left_is_ended_before_the_next_hook(
    write: Write, tmp_path: Path
) -> None:
    slow = write("echo $$ >$F/pid", "sleep 1000 & wait", name="slow")
    code = (
        "import asyncio, sys; from pathlib import Path; from nfsha.host.hooks import Hooks;"
        "asyncio.run(Hooks(60000).run(Path(sys.argv[1]), {}))"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(slow)]) as daemon:
        pid = int(wait_for(tmp_path / "pid"))
        daemon.kill()
    assert alive(pid)
    assert pid in hooks._sessions()
    assert run(write("echo next")).ok
    assert not alive(pid)


def test_hooks_of_another_daemon_that_lives_are_left_alone(write: Write, tmp_path: Path) -> None:
    slow = write("echo $$ >$F/pid", "sleep 1000", name="slow")
    code = (
        "import asyncio, sys; from pathlib import Path; from nfsha.host.hooks import Hooks;"
        "asyncio.run(Hooks(60000).run(Path(sys.argv[1]), {}))"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(slow)]) as daemon:
        pid = int(wait_for(tmp_path / "pid"))
        assert run(write("true")).ok
        assert alive(pid)
        daemon.kill()
    assert hooks.end_leftovers() == ""
    assert not alive(pid)


def _folder_open_to_all(path: Path) -> None:
    path.parent.chmod(0o777)


def _folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


FAULTS: list[tuple[Callable[[Path], object], str]] = [
    (Path.unlink, "No such file or directory; make it, or correct the configuration"),
    (lambda path: path.chmod(0o644), "may not be executed: chmod 755 "),
    (lambda path: path.chmod(0o775), "may be written by others: chmod go-w "),
    (lambda path: path.chmod(0o757), "may be written by others: chmod go-w "),
    (
        lambda path: os.chown(path, 65534, -1),
        "belongs to somebody else, who could change it: chown",
    ),
    (_folder_open_to_all, "may be replaced by others: chmod go-w "),
    (_folder_instead, "is not a regular file"),
]


@pytest.mark.parametrize(("spoil", "words"), FAULTS, ids=[words[:24] for _, words in FAULTS])
def test_a_file_that_others_may_change_or_that_is_no_program_is_refused(
    write: Write, spoil: Callable[[Path], object], words: str
) -> None:
    path = write("true")
    hooks.require(path)
    spoil(path)
    with pytest.raises(HookError, match="the hook ") as caught:
        hooks.require(write("true", name="other"), path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert words in run(path).words, "looked at again before each run"


def test_check_config_and_run_refuse_a_hook_that_is_missing(write: Write, tmp_path: Path) -> None:
    config = tmp_path / "nfsha.toml"
    config.write_text(
        'role = "primary"\ninterface = "eth0"\nvip = "192.0.2.10"\nwitness = "gateway"\n'
        'links = [{local = "192.0.2.1", peer = "192.0.2.2"}, '
        '{local = "10.9.9.1", peer = "10.9.9.2"}]\n'
        f'replication = "off"\n[nfs]\nmounts = ["/nfs/data"]\n[hooks]\nmount = "{write("true")}"\n'
        f'unmount = "{tmp_path}/nowhere"\n[paths]\nkey = "{tmp_path}/key"\n'
        f'state = "{tmp_path}/state"\nruntime = "{tmp_path}/run"\n'
    )
    (tmp_path / "key").touch(0o600)
    (tmp_path / "key").write_text(bytes(range(32)).hex() + "\n")
    program = Path(sys.executable).parent / "nfsha"
    for command, status in (("check-config", 2), ("run", 1)):
        done = subprocess.run(
            [program, command, "--config", config, *(["--json"] if status == 2 else [])],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        said = done.stdout + done.stderr
        assert done.returncode == status, said
        assert f"the hook {tmp_path}/nowhere: No such file or directory" in said
        assert "Traceback" not in said
        if status == 2:
            assert json.loads(done.stdout)["ok"] is False

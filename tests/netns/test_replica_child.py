"""Children for real: nothing of a tree survives its end, its parent's death, or a new daemon."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from nfsha.replica.rsync.child import (
    GRACE_S,
    MAX_LINE_BYTES,
    TAIL_BYTES,
    Child,
    ChildError,
    ChildStuckError,
    Line,
    Priority,
    Stream,
    end_leftovers,
)

REPOSITORY = Path(__file__).parents[2]
# A child of the shell, one in another session, and one whose own parent is gone.
FAMILY = "sleep 1000 & setsid sleep 1000 & (setsid sleep 1000 &) ; echo ready; wait"
PARENT = """
import asyncio, os, sys
from nfsha.replica.rsync.child import Child

async def main():
    child = await Child.start(["sh", "-c", sys.argv[1]], name="family")
    while not child.output:
        await asyncio.sleep(0.01)
    print(*await asyncio.to_thread(child.pids), flush=True)
    await child.wait()

asyncio.run(main())
"""


def shell(script: str, **options: Any) -> Any:
    return Child.start(["sh", "-c", script], name="test", **options)


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone_within(seconds: float, pids: list[int]) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(lives, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


async def until(condition: Callable[[], object], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - other processes set no events
            await asyncio.sleep(0.01)


@contextmanager
def parent(script: str = FAMILY) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process of its own that started a child; and the pids of that child's whole tree."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, script], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    pids: list[int] = []
    try:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        yield process, pids
    finally:
        process.kill()
        process.communicate()
        for pid in pids:
            if lives(pid):
                os.kill(pid, signal.SIGKILL)


def test_output_and_exit_code_arrive() -> None:
    async def main() -> None:
        lines: list[Line] = []
        child = await shell(
            r"echo a; printf '\377\0\r' ; echo b >&2; exit 23", on_line=lines.append
        )
        assert await child.wait() == 23
        assert await child.wait() == 23
        assert not child.alive
        assert child.output == (b"a", b"\xff\0")
        assert child.errors == (b"b",)
        assert sorted(lines, key=lambda line: line.stream.value) == [
            Line(Stream.ERRORS, b"b"),
            Line(Stream.OUTPUT, b"a"),
            Line(Stream.OUTPUT, b"\xff\0"),
        ]
        await child.end(1)

    asyncio.run(main())


def test_the_pid_is_the_programs_and_the_tree_is_listed() -> None:
    async def main() -> None:
        child = await Child.start(["sleep", "1000"], name="test")
        await until(lambda: psutil.Process(child.pid).name() == "sleep")
        pids = await asyncio.to_thread(child.pids)
        names = {psutil.Process(pid).name() for pid in pids}
        assert child.pid in pids
        assert names == {"sleep", "sh", "unshare"}
        await child.end(2)
        assert await asyncio.to_thread(child.pids) == ()
        assert await child.wait() == -signal.SIGTERM

    asyncio.run(main())


def test_the_environment_is_clean_and_a_secret_is_in_no_command_line() -> None:
    async def main() -> None:
        os.environ["NFSHA_TEST_LEAK"] = "1"
        try:
            child = await shell(
                "tr '\\0' '\\n' </proc/self/environ; echo $PWD; cat; ls /proc/self/fd; echo done;"
                " exec sleep 1000",
                env={"RSYNC_PASSWORD": "geheim"},
            )
        finally:
            del os.environ["NFSHA_TEST_LEAK"]
        # Not before: a program that has just ended is still to be reaped by the shell.
        await until(lambda: b"done" in child.output)
        names = {line.partition(b"=")[0] for line in child.output if b"=" in line}
        # A shell may set its own folder.
        assert names - {b"PWD"} == {b"PATH", b"LC_ALL", b"NFSHA_CHILD", b"RSYNC_PASSWORD"}
        assert b"LC_ALL=C" in child.output
        assert b"/" in child.output
        pids = await asyncio.to_thread(child.pids)
        commands.extend(psutil.Process(pid).cmdline() for pid in pids)
        await child.end(2)

    commands: list[list[str]] = []
    asyncio.run(main())
    assert any("sleep" in command for command in commands)
    assert "geheim" not in str(commands)


def test_a_descriptor_is_passed_under_its_own_number(tmp_path: Path) -> None:
    async def main() -> None:
        folder = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        high = os.dup2(folder, 200, inheritable=False)
        try:
            child = await shell(
                f"echo x >/proc/self/fd/{folder}/low; echo y >/proc/self/fd/{high}/high",
                pass_fds=(folder, high),
            )
            assert await child.wait() == 0
        finally:
            os.close(folder)
            os.close(high)

    asyncio.run(main())
    assert sorted(each.name for each in tmp_path.iterdir()) == ["high", "low"]


@pytest.mark.parametrize(
    ("priority", "nice", "io"),
    [(Priority.LOW, 10, "best-effort: prio 7"), (Priority.NORMAL, 0, "")],
)
def test_a_real_time_parent_has_ordinary_children(priority: Priority, nice: int, io: str) -> None:
    async def main() -> Any:
        child = await shell(
            "chrt -p $$; ionice -p $$; cat /proc/self/oom_score_adj", priority=priority
        )
        assert await child.wait() == 0
        return child

    before = os.sched_getscheduler(0), os.sched_getparam(0)
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(5))  # without the reset on fork
    try:
        child = asyncio.run(main())
    finally:
        os.sched_setscheduler(0, *before)
    text = b"\n".join(child.output).decode()
    assert "SCHED_OTHER" in text
    assert "SCHED_RR" not in text
    assert io in text
    assert "realtime" not in text
    assert text.endswith("250")

    async def niceness() -> int:
        child = await shell("nice", priority=priority)
        await child.wait()
        return int(child.output[0])

    assert asyncio.run(niceness()) == nice


@pytest.mark.parametrize(
    "script",
    [
        FAMILY,
        "trap '' TERM; " + FAMILY,
        "trap '' TERM; setsid sh -c 'trap \"\" TERM; echo ready; while :; do sleep 1; done'",
        "echo ready; kill -STOP $$",
        "unshare --pid --fork sh -c 'sleep 1000 & echo ready; wait'",
    ],
)
def test_the_end_is_the_end_of_the_whole_tree(script: str) -> None:
    async def main() -> tuple[list[int], float]:
        child = await shell(script)
        await until(lambda: child.output)
        await asyncio.sleep(0.05)
        pids = await asyncio.to_thread(child.pids)
        assert len(pids) >= 3
        began = time.monotonic()
        await child.end(2)
        return list(pids), time.monotonic() - began

    pids, took_s = asyncio.run(main())
    assert [pid for pid in pids if lives(pid)] == []
    assert took_s < GRACE_S + 0.5


def test_without_grace_the_end_is_at_once() -> None:
    async def main() -> float:
        child = await shell("trap '' TERM; echo ready; while :; do sleep 1; done")
        await until(lambda: child.output)
        began = time.monotonic()
        await child.end(1, grace_s=0)
        took_s = time.monotonic() - began
        assert await child.wait() == -signal.SIGKILL
        assert child.errors == ()  # nothing of the wrapper's own
        await child.end(1)
        return took_s

    assert asyncio.run(main()) < 0.2


def test_what_the_program_leaves_behind_ends_with_it() -> None:
    async def main() -> None:
        child = await shell("setsid sleep 1000 & echo $!; exit 5")
        assert await child.wait() == 5
        assert await asyncio.to_thread(child.pids) == ()

    asyncio.run(main())


@pytest.mark.parametrize("sort", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_killed_program_is_told_from_an_exit_code(sort: signal.Signals) -> None:
    async def main() -> None:
        child = await Child.start(["sleep", "1000"], name="test")
        await until(lambda: psutil.Process(child.pid).name() == "sleep")
        os.kill(child.pid, sort)
        assert await child.wait() == -sort

    asyncio.run(main())


def test_whoever_kills_the_wrapper_or_the_first_process_kills_the_tree() -> None:
    async def main(which: str) -> list[int]:
        child = await shell(FAMILY)
        await until(lambda: child.output)
        pids = await asyncio.to_thread(child.pids)
        parents = [process.pid for process in psutil.Process(child.pid).parents()[:2]]
        os.kill(parents[0 if which == "first" else 1], signal.SIGKILL)
        assert await child.wait() == -signal.SIGKILL
        await child.end(2)
        return list(pids)

    for which in ("first", "wrapper"):
        pids = asyncio.run(main(which))
        assert [pid for pid in pids if lives(pid)] == []


@pytest.mark.parametrize("script", [FAMILY, "trap '' TERM HUP INT; " + FAMILY])
def test_a_parent_killed_by_sigkill_takes_the_whole_tree_along(script: str) -> None:
    with parent(script) as (process, pids):
        assert len(pids) >= 6
        assert all(map(lives, pids))
        process.kill()
        assert gone_within(1.0, pids)


def test_a_parent_that_dies_at_any_moment_of_the_start_leaves_nobody() -> None:
    started = """
import asyncio
from nfsha.replica.rsync.child import Child
print("go", flush=True)
asyncio.run(Child.start(["sleep", "987654"], name="brief"))
"""
    for delay_ms in range(0, 16, 2):
        process = subprocess.Popen(
            [sys.executable, "-c", started], stdout=subprocess.PIPE, cwd=REPOSITORY
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay_ms / 1000)
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 1.0
    while left := [each for each in psutil.process_iter(["cmdline"])
                   if "987654" in (each.info["cmdline"] or [])]:  # fmt: skip
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def test_leftovers_of_a_dead_daemon_are_ended_and_those_of_a_living_one_are_not() -> None:
    with parent() as (_, living):
        # Without the parent-death signals: what would be left if they ever failed.
        with parent("exec 2>&1; " + FAMILY) as (dead, left):
            wrapper = min(left)
            environ = dict(
                each.split("=", 1)
                for each in Path(f"/proc/{wrapper}/environ").read_text().split("\0")
                if each
            )
            orphan = subprocess.Popen(["setsid", "sleep", "1000"], env=environ)
            dead.kill()
            dead.wait()
            try:
                assert gone_within(1.0, left)
                assert lives(orphan.pid)
                assert asyncio.run(end_leftovers()) == ("family",)
                assert not lives(orphan.pid)
                assert asyncio.run(end_leftovers()) == ()
            finally:
                orphan.kill()
                orphan.wait()
        assert all(map(lives, living))


def test_a_hundred_megabytes_of_output_take_no_memory() -> None:
    async def main() -> Any:
        line = "0123456789" * 20
        child = await shell(f"yes {line} | head -c 100000000; echo; head -c 3000000 /dev/zero")
        assert await child.wait() == 0
        return child

    asyncio.run(shell_once())  # whatever the first child costs
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = asyncio.run(main())
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib < 8 * 1024
    assert child.output[-1] == b"\0" * MAX_LINE_BYTES
    assert len(child.output) > 1
    assert sum(map(len, child.output)) <= TAIL_BYTES


def run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True, timeout=20)


async def shell_once() -> None:
    await (await shell("true")).wait()


def test_the_loop_goes_on_turning_while_a_child_prints() -> None:
    async def main() -> float:
        child = await shell("yes 0123456789 | head -c 5000000", on_line=lambda line: None)
        longest = 0.0
        while child.alive:
            began = time.thread_time()
            await asyncio.sleep(0)
            longest = max(longest, time.thread_time() - began)
        return longest

    assert asyncio.run(main()) < 0.02


def test_an_exception_of_the_listener_ends_the_child_and_is_told() -> None:
    def refuse(line: Line) -> None:
        raise KeyError(line.data)

    async def main() -> None:
        child = await shell("echo x; yes", on_line=refuse)
        with pytest.raises(KeyError):
            await child.wait()
        await child.end(2)
        assert await asyncio.to_thread(child.pids) == ()

    asyncio.run(main())


def test_what_cannot_be_started_says_why(tmp_path: Path) -> None:
    async def start(*argv: str) -> None:
        await Child.start(argv, name="test")

    plain = tmp_path / "plain"
    plain.write_text("no program")
    with pytest.raises(ChildError, match="there is no program /nowhere/rsync"):
        asyncio.run(start("/nowhere/rsync"))
    with pytest.raises(ChildError, match="may not be run"):
        asyncio.run(start(str(plain)))
    with pytest.raises(ValueError, match="name of a child"):
        asyncio.run(Child.start(["true"], name="a:b"))


def test_without_the_right_to_make_namespaces_it_says_so() -> None:
    script = """
import asyncio
from nfsha.replica.rsync.child import Child, ChildError
try:
    asyncio.run(Child.start(["true"], name="test"))
except ChildError as error:
    print(error)
"""
    done = subprocess.run(
        ["setpriv", "--bounding-set", "-sys_admin", sys.executable, "-c", script],
        check=True, capture_output=True, text=True, timeout=20, cwd=REPOSITORY,
    )  # fmt: skip
    assert (
        "test: cannot be started: unshare: unshare failed: Operation not permitted" in done.stdout
    )


def test_it_works_inside_other_namespaces() -> None:
    script = PARENT.replace("await child.wait()", "await child.end(2)\n    print('ended')")
    done = subprocess.run(
        ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child",
         sys.executable, "-c", script, FAMILY],
        check=True, capture_output=True, text=True, timeout=20, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "ended"
    assert len(done.stdout.splitlines()[0].split()) >= 6


def test_the_end_waits_for_no_thread_that_hangs_on_a_disk() -> None:
    async def main() -> None:
        loop, hung = asyncio.get_running_loop(), threading.Event()
        loop.set_default_executor(ThreadPoolExecutor(max_workers=1))
        waiting = loop.run_in_executor(None, hung.wait)
        try:
            child = await shell("sleep 1000")
            async with asyncio.timeout(2):
                await child.end(1)
                assert await end_leftovers() == ()
        finally:
            hung.set()
            await waiting

    asyncio.run(main())


def test_a_process_that_waits_in_the_kernel_is_reported_and_ended_later(tmp_path: Path) -> None:
    image, place = tmp_path / "image", tmp_path / "place"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    run("mkfs.ext4", "-q", str(image))
    run("mount", "-o", "loop", str(image), str(place))
    try:

        async def main() -> None:
            child = await shell(f"echo x >{place}/file")
            name = ""
            try:
                await until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_DISK_SLEEP)
                with pytest.raises(ChildStuckError) as caught:
                    await child.end(0.6, grace_s=0.1)
                name = " ".join(caught.value.processes)
            finally:
                run("fsfreeze", "--unfreeze", str(place))
            assert "disk-sleep" in name
            await child.end(2)
            assert await asyncio.to_thread(child.pids) == ()

        run("fsfreeze", "--freeze", str(place))
        asyncio.run(main())
    finally:
        run("umount", str(place))

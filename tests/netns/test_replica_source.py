"""The source for real: who gets what from it, who does not, and what is left of it afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from nfsha.core.model import Epoch, Role
from nfsha.replica.clocks import Clocks
from nfsha.replica.journal.published import Published, read_published
from nfsha.replica.rsync import rsync_version
from nfsha.replica.source import doorkeeper, fresh
from nfsha.replica.source.facts import read_facts
from nfsha.replica.source.fresh import Coalesced, NotFreshError
from nfsha.replica.source.serving import Serving, changes_name
from nfsha.replica.source.source import (
    CONTROL_MODULE,
    MAX_LOG_BYTES,
    RSYNC,
    EpochToken,
    Source,
    SourceVolume,
    epoch_token,
)
from nfsha.replica.volume.inventory import Inventory
from tests.netns.namespaces import Namespace, connect, inside, namespaces, run
from tests.netns.volumekit import LoopVolume, make_volume

__all__ = ["make_volume"]

PORT = 7911
OVER_IPV6: dict[str, Any] = {"listen": "fd00:9:1::1", "peer": "fd00:9:1::2"}
SECRET = b"k" * 32
EPOCH = Epoch(4, "00112233aabbccdd", Role.PRIMARY)
TOKEN = epoch_token(SECRET, EPOCH)
AUTH_OR_UNKNOWN = 5  # rsync(1): error starting client-server protocol
NO_ANSWER = 35  # rsync(1): timeout waiting for daemon connection


@dataclass
class Net:
    """A source, its peer, and a machine that is neither, each on its own link to the source."""

    source: Namespace
    peer: Namespace
    stranger: Namespace


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with namespaces("source", "peer", "stranger") as (source, peer, stranger):
        for number, other in ((1, peer), (2, stranger)):
            connect(source, f"to{number}", other, "eth0")
            for place, name, host in ((source, f"to{number}", 1), (other, "eth0", 2)):
                place.ip("addr", "add", f"10.9.{number}.{host}/24", "dev", name)
                address = f"fd00:9:{number}::{host}/64"
                place.ip("addr", "add", address, "dev", name, "nodad")
        stranger.ip("route", "add", "default", "via", "10.9.2.1")
        stranger.ip("-6", "route", "add", "default", "via", "fd00:9:2::1")
        yield Net(source, peer, stranger)


def clock_ms() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


@contextlib.asynccontextmanager
async def offered(
    folder: Path,
    *volumes: SourceVolume,
    listen: str = "10.9.1.1",
    peer: str = "10.9.1.2",
    fresh: Callable[[], Awaitable[None]] | None = None,
) -> AsyncIterator[Source]:
    source = Source(folder / "source", listen, PORT, peer, clock_ms)
    source.fresh = fresh
    try:
        await source.serve(TOKEN, volumes)
        yield source
    finally:
        await source.stop()


@dataclass
class Answer:
    code: int
    out: str
    said: str


async def rsync(
    place: Namespace,
    *argv: str,
    token: EpochToken | None = TOKEN,
    host: str = "10.9.1.1",
) -> Answer:
    """Runs rsync in a place; `SOURCE` in an argument stands for the daemon."""
    user = f"{token.user}@" if token is not None else ""
    words = [word.replace("SOURCE", f"rsync://{user}{host}:{PORT}") for word in argv]
    done = await asyncio.to_thread(
        subprocess.run,
        ["ip", "netns", "exec", place.name, "rsync", "-rlt", "--timeout=10", "--contimeout=5",
         *words],
        check=False, capture_output=True, text=True, errors="replace", timeout=30,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"}
        | ({"RSYNC_PASSWORD": token.password} if token is not None else {}),
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return Answer(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def volume(make_volume: Callable[..., LoopVolume]) -> Iterator[tuple[LoopVolume, SourceVolume]]:
    loop = make_volume()
    yield loop, prepared(loop)


def prepared(loop: LoopVolume) -> SourceVolume:
    identity = str(uuid.uuid4())
    (loop.path / ".nfsha-volume").write_text(identity + "\n")
    (loop.path / "file").write_text("content")
    (loop.path / "secret").symlink_to("/etc/hostname")
    return SourceVolume(identity, loop.path)


Fixture = tuple[LoopVolume, SourceVolume]


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - files and other tasks set no events
        await asyncio.sleep(0.01)


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def trouble_of(source: Source) -> str:
    return source.trouble


def daemon(source: Source) -> psutil.Process:
    assert source._child is not None
    return psutil.Process(source._child.pid)


def in_the_source(net: Net, main: Callable[[], object]) -> None:
    with inside(net.source):
        asyncio.run(main())  # type: ignore[arg-type]


def test_the_peer_with_the_token_gets_the_volume(net: Net, volume: Fixture, tmp_path: Path) -> None:
    _, one = volume

    async def main() -> None:
        began = time.monotonic()
        async with offered(tmp_path, one) as source:
            assert time.monotonic() - began < 1.0
            assert (source.running, source.trouble, source.refused) == (True, "", {})
            target = tmp_path / "target"
            answer = await rsync(net.peer, f"SOURCE/{one.module}/", str(target))
            assert (answer.code, answer.said) == (0, "")
            assert (target / "file").read_text() == "content"
            assert (target / "secret").readlink() == Path("/etc/hostname")
            (source.public / "facts.json").write_text("{}")
            answer = await rsync(net.peer, f"SOURCE/{CONTROL_MODULE}/", str(tmp_path / "facts"))
            assert answer.code == 0
            assert (tmp_path / "facts" / "facts.json").read_text() == "{}"
        assert not source.running

    in_the_source(net, main)


def test_its_files_are_nobody_elses(net: Net, volume: Fixture, tmp_path: Path) -> None:
    async def main() -> None:
        async with offered(tmp_path, volume[1]) as source:
            folder = tmp_path / "source"
            modes = {each.name: each.stat().st_mode & 0o777 for each in folder.iterdir()}
            assert folder.stat().st_mode & 0o777 == 0o700
            assert (modes["rsyncd.conf"], modes["secrets"]) == (0o600, 0o600)
            for process in [daemon(source), *daemon(source).parents()]:
                assert TOKEN.password not in " ".join(process.cmdline())
            assert TOKEN.password not in (folder / "rsyncd.conf").read_text()
        assert not (folder / "secrets").exists()
        assert not (folder / "rsyncd.conf").exists()

    in_the_source(net, main)


def test_whoever_has_not_the_epochs_token_is_refused(
    net: Net, volume: Fixture, tmp_path: Path
) -> None:
    stale = {
        "an earlier epoch": epoch_token(SECRET, Epoch(3, EPOCH.id, EPOCH.authority)),
        "another history": epoch_token(SECRET, Epoch(4, "ffffffffffffffff", EPOCH.authority)),
        "another key": epoch_token(b"x" * 32, EPOCH),
        "the right user, another password": EpochToken(TOKEN.user, "0" * 64),
        "the right password, another user": EpochToken("nfsha", TOKEN.password),
        "no password": EpochToken(TOKEN.user, ""),
        "nobody": None,
    }

    async def main() -> None:
        async with offered(tmp_path, volume[1]):
            for who, token in stale.items():
                for module in (volume[1].module, CONTROL_MODULE):
                    target = tmp_path / "target"
                    answer = await rsync(net.peer, f"SOURCE/{module}/", str(target), token=token)
                    assert answer.code == AUTH_OR_UNKNOWN, (who, answer)
                    assert not target.exists()

    in_the_source(net, main)


def test_another_address_gets_no_answer_with_the_right_token(
    net: Net, volume: Fixture, tmp_path: Path
) -> None:
    async def main() -> None:
        async with offered(tmp_path / "6", volume[1], **OVER_IPV6), offered(tmp_path, volume[1]):
            for place, host in (
                (net.stranger, "10.9.1.1"),
                (net.source, "10.9.1.1"),
                (net.stranger, "[fd00:9:1::1]"),
            ):
                for module in (volume[1].module, CONTROL_MODULE):
                    words = ("--contimeout=1", f"SOURCE/{module}/")
                    answer = await rsync(place, *words, host=host)
                    assert (answer.code, answer.out) == (NO_ANSWER, ""), (place, answer)
            answer = await rsync(net.stranger, f"SOURCE/{CONTROL_MODULE}/", host="10.9.2.1")
            assert answer.code == 10  # not bound to that address

    in_the_source(net, main)


def test_strangers_cannot_fill_it_with_connections(
    net: Net, volume: Fixture, tmp_path: Path
) -> None:
    async def main() -> None:
        async with offered(tmp_path, volume[1]) as source:
            with contextlib.ExitStack() as stack:
                with inside(net.stranger):
                    knocking = [stack.enter_context(socket.socket()) for _ in range(50)]
                for each in knocking:
                    each.setblocking(False)
                    each.connect_ex(("10.9.1.1", PORT))
                await asyncio.sleep(0.3)
                assert daemon(source).children() == []
                assert (await rsync(net.peer, f"SOURCE/{volume[1].module}/")).code == 0

    in_the_source(net, main)


def test_where_the_port_cannot_be_closed_the_daemon_refuses_others_itself(
    net: Net,
    volume: Fixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def not_allowed(*_: object) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    async def main() -> None:
        async with offered(tmp_path, volume[1]) as source:
            for module in (volume[1].module, CONTROL_MODULE):
                for place in (net.stranger, net.source):
                    answer = await rsync(place, f"SOURCE/{module}/")
                    assert (answer.code, answer.out) == (AUTH_OR_UNKNOWN, "")
                    assert "Unknown module" in answer.said
            assert "denied" in source.log_path.read_text()

    monkeypatch.setattr(doorkeeper, "_take", not_allowed)
    in_the_source(net, main)
    assert "cannot be closed to them: Operation not permitted" in caplog.text


def test_nothing_else_is_offered(net: Net, volume: Fixture, tmp_path: Path) -> None:
    one = volume[1]

    async def main() -> None:
        async with offered(tmp_path, one):
            listing = await rsync(net.peer, "SOURCE/")
            assert (listing.code, listing.out) == (0, "")
            for module in ("root", "v-", f"v-{uuid.uuid4()}", "global", "../etc"):
                answer = await rsync(net.peer, f"SOURCE/{module}/")
                assert answer.code == AUTH_OR_UNKNOWN, module
                assert answer.out == ""
            for path in ("../../etc/passwd", "../", "/etc/passwd", "secret/", "../source/secrets"):
                answer = await rsync(net.peer, "--copy-links", f"SOURCE/{one.module}/{path}")
                assert "root:" not in answer.out
                assert TOKEN.password not in answer.out
                names = set(re.findall(r"\d\d:\d\d:\d\d (.*)", answer.out))
                assert names <= {".", "file", "lost+found", ".nfsha-volume"}, (path, answer)

    in_the_source(net, main)


def test_nobody_can_write_into_it(net: Net, volume: Fixture, tmp_path: Path) -> None:
    loop, one = volume
    attempt = tmp_path / "attempt"
    attempt.mkdir()
    (attempt / "file").write_text("overwritten")
    (attempt / "new").write_text("new")

    def state() -> dict[str, str]:
        return {each.name: each.read_text() for each in loop.path.iterdir() if each.is_file()}

    async def main() -> None:
        before = state()
        async with offered(tmp_path, one):
            for argv in (
                [f"{attempt}/", f"SOURCE/{one.module}/"],
                ["--delete", f"{attempt}/", f"SOURCE/{one.module}/"],
                ["--remove-source-files", f"SOURCE/{one.module}/", str(tmp_path / "stolen")],
                ["--remove-sent-files", f"SOURCE/{one.module}/", str(tmp_path / "stolen")],
                ["--backup-dir=/x", "-b", f"{attempt}/", f"SOURCE/{one.module}/"],
                [f"{attempt}/", f"SOURCE/{CONTROL_MODULE}/"],
            ):
                answer = await rsync(net.peer, *argv)
                assert answer.code == 1, (argv, answer)
                assert "read only" in answer.said or "read-only" in answer.said
                assert state() == before

    in_the_source(net, main)


def test_an_unmounted_volume_is_refused_and_not_sent_as_empty(
    net: Net, volume: Fixture, tmp_path: Path
) -> None:
    loop, one = volume

    async def main() -> None:
        async with offered(tmp_path, one) as source:
            target = tmp_path / "target"
            pull = ("-r", "--delete", f"SOURCE/{one.module}/", f"{target}/")
            assert (await rsync(net.peer, *pull)).code == 0
            await asyncio.to_thread(loop.unmount)  # and nothing of ours keeps it busy
            for _ in range(3):
                answer = await rsync(net.peer, *pull)
                assert answer.code != 0
                assert "not mounted at its source" in answer.said
                assert (target / "file").read_text() == "content"
            # A copy of the identity on the bare folder below the mount point does not help.
            (loop.path / ".nfsha-volume").write_text(one.uuid + "\n")
            answer = await rsync(net.peer, *pull)
            assert answer.code != 0
            assert "not mounted at its source" in answer.said
            assert (target / "file").read_text() == "content"
            (loop.path / ".nfsha-volume").unlink()
            await source.serve(TOKEN, [one])
            assert "nothing with an identity" in source.refused[one.uuid]
            assert (await rsync(net.peer, *pull)).code == AUTH_OR_UNKNOWN
            await asyncio.to_thread(loop.mount)
            await source.serve(TOKEN, [one])
            assert (await rsync(net.peer, *pull)).code == 0

    in_the_source(net, main)


def test_an_empty_or_another_volume_in_its_place_is_refused(
    net: Net, volume: Fixture, make_volume: Callable[..., LoopVolume], tmp_path: Path
) -> None:
    loop, one = volume
    empty, other = make_volume(), make_volume()
    theirs = prepared(other)

    async def main() -> None:
        async with offered(tmp_path, one) as source:
            for intruder in (empty, other):
                await asyncio.to_thread(run, "mount", "--bind", str(intruder.path), str(loop.path))
                answer = await rsync(net.peer, f"SOURCE/{one.module}/")
                await asyncio.to_thread(run, "umount", str(loop.path))
                assert (answer.code != 0, answer.out) == (True, "")
                assert "not mounted at its source" in answer.said
            (loop.path / ".nfsha-volume").unlink()  # emptied by somebody, still mounted
            answer = await rsync(net.peer, f"SOURCE/{one.module}/")
            assert (answer.code != 0, answer.out) == (True, "")
            await source.serve(TOKEN, [SourceVolume(one.uuid, theirs.path)])
            assert "another volume" in source.refused[one.uuid]

    in_the_source(net, main)


def big(loop: LoopVolume) -> None:
    with (loop.path / "big").open("wb") as file:
        file.truncate(30 << 20)


@contextlib.asynccontextmanager
async def slow_pull(
    net: Net, one: SourceVolume, target: Path
) -> AsyncIterator[asyncio.Task[Answer]]:
    """A transfer that has begun, and takes half a minute when nobody ends it."""
    pull = ("--bwlimit=1000", f"SOURCE/{one.module}/", f"{target}/")
    task = asyncio.create_task(rsync(net.peer, *pull))
    async with asyncio.timeout(5):
        await until(lambda: any(each.stat().st_size for each in target.glob(".big.*")))
    yield task
    async with asyncio.timeout(5):
        await task


def test_a_new_token_ends_what_runs_under_the_old_one(
    net: Net, volume: Fixture, tmp_path: Path
) -> None:
    loop, one = volume
    big(loop)
    later = epoch_token(SECRET, Epoch(5, "ffffffffffffffff", Role.PRIMARY))

    async def main() -> None:
        target = tmp_path / "target"
        target.mkdir()
        async with offered(tmp_path, one) as source, slow_pull(net, one, target) as pull:
            old = {each.pid for each in daemon(source).children(recursive=True)}
            assert old
            began = time.monotonic()
            await source.serve(later, [one])
            assert time.monotonic() - began < 1.0
            assert not any(map(psutil.pid_exists, old))
            assert source.running
            assert (await asyncio.wait_for(pull, 5)).code in (10, 12)
            refused = await rsync(net.peer, f"SOURCE/{one.module}/")
            assert refused.code == AUTH_OR_UNKNOWN
            assert (await rsync(net.peer, f"SOURCE/{one.module}/", token=later)).code == 0

    in_the_source(net, main)


def test_another_volume_interrupts_nobody_but_the_loss_of_one_does(
    net: Net, volume: Fixture, make_volume: Callable[..., LoopVolume], tmp_path: Path
) -> None:
    loop, one = volume
    big(loop)
    added = prepared(make_volume())

    async def main() -> None:
        target = tmp_path / "target"
        target.mkdir()
        async with offered(tmp_path, one) as source, slow_pull(net, one, target) as pull:
            await source.serve(TOKEN, [one, added])
            assert (await rsync(net.peer, f"SOURCE/{added.module}/")).code == 0
            assert not pull.done()
            await source.serve(TOKEN, [added])
            assert (await asyncio.wait_for(pull, 5)).code in (10, 12)
            assert (await rsync(net.peer, f"SOURCE/{one.module}/")).code == AUTH_OR_UNKNOWN

    in_the_source(net, main)


def test_after_the_stop_nothing_of_it_is_left(net: Net, volume: Fixture, tmp_path: Path) -> None:
    loop, one = volume
    big(loop)

    async def main() -> None:
        target = tmp_path / "target"
        target.mkdir()
        async with offered(tmp_path, one) as source, slow_pull(net, one, target) as pull:
            wrapper = daemon(source).parents()[1]
            tree = [wrapper, *wrapper.children(recursive=True)]
            assert len(tree) >= 4
            os.kill(tree[-1].pid, signal.SIGSTOP)
            began = time.monotonic()
            await source.stop()
            assert time.monotonic() - began < 1.0
            assert not any(map(lives, tree))
            assert not source.running
            await asyncio.to_thread(loop.unmount)  # nothing keeps it busy
            assert (await asyncio.wait_for(pull, 15)).code in (10, 12)
            assert (await rsync(net.peer, f"SOURCE/{one.module}/")).code == 10
            await asyncio.to_thread(loop.mount)
            await source.stop()
            await source.serve(TOKEN, [one])
            assert (await rsync(net.peer, f"SOURCE/{one.module}/")).code == 0

    in_the_source(net, main)


def test_the_stop_waits_for_no_thread_that_hangs_on_a_disk(
    net: Net, volume: Fixture, tmp_path: Path
) -> None:
    async def main() -> None:
        loop, hung = asyncio.get_running_loop(), threading.Event()
        loop.set_default_executor(ThreadPoolExecutor(max_workers=1))
        async with offered(tmp_path, volume[1]) as source:
            waiting = loop.run_in_executor(None, hung.wait)
            later = asyncio.create_task(source.serve(TOKEN, []))  # waits for the disk
            try:
                await asyncio.sleep(0.05)
                assert not later.done()
                async with asyncio.timeout(2):
                    await source.stop()
            finally:
                hung.set()
                await asyncio.gather(waiting, later)
            assert not source.running  # it came too late
            assert (await rsync(net.peer, f"SOURCE/{CONTROL_MODULE}/")).code == 10

    in_the_source(net, main)


def test_a_killed_daemon_comes_back_and_says_so(
    net: Net, volume: Fixture, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with offered(tmp_path, volume[1]) as source:
            os.kill(daemon(source).pid, signal.SIGKILL)
            async with asyncio.timeout(3):
                await until(lambda: source.trouble)
                assert not source.running
                assert "was killed by signal 9; next start in 0.2 s" in source.trouble
                await until(lambda: source.running)
            assert trouble_of(source) == ""
            assert source.restarts == 1
            assert (await rsync(net.peer, f"SOURCE/{volume[1].module}/")).code == 0

    in_the_source(net, main)
    assert "was killed by signal 9" in caplog.text


def test_a_taken_port_and_a_missing_address_are_said_and_waited_for(
    net: Net, volume: Fixture, tmp_path: Path
) -> None:
    async def main() -> None:
        with socket.socket() as taker:
            taker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taker.bind(("10.9.1.1", PORT))
            taker.listen()
            async with offered(tmp_path, volume[1]) as source:
                assert not source.running
                assert "port 7911 of 10.9.1.1 is taken by another program" in source.trouble
                taker.close()
                async with asyncio.timeout(3):
                    await until(lambda: source.running)
                    await until(lambda: not source.trouble)
        async with offered(tmp_path, volume[1], listen="10.9.1.77") as source:
            assert "does not have the address 10.9.1.77" in source.trouble

    in_the_source(net, main)


def test_ipv6(net: Net, volume: Fixture, tmp_path: Path) -> None:
    async def main() -> None:
        async with offered(tmp_path, volume[1], **OVER_IPV6) as source:
            assert source.running, source.trouble
            answer = await rsync(net.peer, f"SOURCE/{volume[1].module}/", host="[fd00:9:1::1]")
            assert answer.code == 0, answer

    in_the_source(net, main)


@pytest.mark.parametrize(
    "name", ["two  words ", "back\\", "100%", "50%A", "%HOME", "#hash", "[x]", "'q\"$x", "\udcff"]
)
def test_a_volume_with_an_odd_name_is_served(net: Net, name: str, tmp_path: Path) -> None:
    place = tmp_path / name
    place.mkdir()
    one = SourceVolume(str(uuid.uuid4()), place)

    async def main() -> None:
        async with offered(tmp_path, one) as source:
            assert source.refused == {}
            answer = await rsync(net.peer, f"SOURCE/{one.module}/")
            assert (answer.code, " marker" in answer.out) == (0, True)

    subprocess.run(["mount", "-t", "tmpfs", "nfsha-test", place], check=True)
    try:
        (place / ".nfsha-volume").write_text(one.uuid + "\n")
        (place / "marker").write_text("x")
        in_the_source(net, main)
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_name_that_cannot_be_written_down_is_refused_alone(
    net: Net, volume: Fixture, tmp_path: Path
) -> None:
    odd = SourceVolume(str(uuid.uuid4()), tmp_path / "new\nline")
    odd.path.mkdir()
    (odd.path / ".nfsha-volume").write_text(odd.uuid + "\n")

    async def main() -> None:
        async with offered(tmp_path, odd, volume[1]) as source:
            assert "control character" in source.refused[odd.uuid]
            assert (await rsync(net.peer, f"SOURCE/{volume[1].module}/")).code == 0
            assert (await rsync(net.peer, f"SOURCE/{odd.module}/")).code == AUTH_OR_UNKNOWN

    in_the_source(net, main)


def test_connections_are_bounded(net: Net, volume: Fixture, tmp_path: Path) -> None:
    loop, one = volume
    big(loop)

    async def main() -> None:
        target = tmp_path / "target"
        target.mkdir()
        source = Source(
            tmp_path / "source", "10.9.1.1", PORT, "10.9.1.2", clock_ms, max_connections=1
        )
        try:
            await source.serve(TOKEN, [one])
            async with slow_pull(net, one, target):
                answer = await rsync(net.peer, f"SOURCE/{one.module}/")
                assert answer.code == AUTH_OR_UNKNOWN
                assert "max connections (1) reached" in answer.said
                await source.stop()
        finally:
            await source.stop()

    in_the_source(net, main)


def test_the_log_is_bounded(net: Net, volume: Fixture, tmp_path: Path) -> None:
    async def main() -> None:
        async with offered(tmp_path, volume[1]) as source:
            with source.log_path.open("ab") as file:
                file.write(b"x" * (MAX_LOG_BYTES + 1))
            source._put_log_aside()
            await rsync(net.peer, f"SOURCE/{volume[1].module}/")
            assert 0 < source.log_path.stat().st_size < 10_000
            assert {each.name for each in source.log_path.parent.glob("rsyncd.log*")} == {
                "rsyncd.log",
                "rsyncd.log.1",
            }

    in_the_source(net, main)


SOURCE_ALONE = """
import asyncio, sys, time
from pathlib import Path
from nfsha.replica.source.source import EpochToken, Source, SourceVolume

async def main():
    folder, user, password, uuid, volume = sys.argv[1:]
    clock_ms = lambda: time.monotonic_ns() // 10**6
    source = Source(Path(folder), "10.9.1.1", 7911, "10.9.1.2", clock_ms)
    await source.serve(EpochToken(user, password), [SourceVolume(uuid, Path(volume))])
    print(source.running, flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


def test_a_killed_nfsha_takes_its_source_along(net: Net, volume: Fixture, tmp_path: Path) -> None:
    loop, one = volume
    big(loop)
    target = tmp_path / "target"
    target.mkdir()
    words = [str(tmp_path / "source"), TOKEN.user, TOKEN.password, one.uuid, str(one.path)]

    async def main(process: subprocess.Popen[str]) -> None:
        tree = psutil.Process(process.pid).children(recursive=True)
        async with slow_pull(net, one, target) as pull:
            process.kill()
            await asyncio.to_thread(process.wait)
            began = time.monotonic()
            await until(lambda: not any(map(lives, tree)))
            assert time.monotonic() - began < 1.0
            assert (await asyncio.wait_for(pull, 5)).code in (10, 12)
        assert (await rsync(net.peer, f"SOURCE/{one.module}/")).code == 10
        await asyncio.to_thread(loop.unmount)
        await asyncio.to_thread(loop.mount)

    with inside(net.source):
        process = subprocess.Popen(
            [sys.executable, "-c", SOURCE_ALONE, *words], stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "True\n"
            asyncio.run(main(process))
        finally:
            process.kill()
            process.communicate()


def test_a_volume_that_comes_and_goes_is_never_sent_as_another(
    net: Net, volume: Fixture, make_volume: Callable[..., LoopVolume], tmp_path: Path
) -> None:
    """Mounts change all the time: a check before the change of root would be fooled here."""
    loop, one = volume
    empty = make_volume()
    codes: list[int] = []

    async def flip(stop: asyncio.Event) -> None:
        while not stop.is_set():
            await asyncio.to_thread(run, "mount", "--bind", str(empty.path), str(loop.path))
            await asyncio.sleep(0.004)
            await asyncio.to_thread(run, "umount", "--lazy", str(loop.path))
            await asyncio.sleep(0.004)

    async def pull(number: int) -> None:
        target = tmp_path / f"target{number}"
        answer = await rsync(net.peer, f"SOURCE/{one.module}/", f"{target}/")
        codes.append(answer.code)
        assert (answer.code == 0) == (target / "file").exists(), answer

    async def main() -> None:
        async with offered(tmp_path, one):
            stop = asyncio.Event()
            flipping = asyncio.create_task(flip(stop))
            try:
                for number in range(0, 32, 8):
                    await asyncio.gather(*map(pull, range(number, number + 8)))
            finally:
                stop.set()
                await flipping

    in_the_source(net, main)
    assert 0 in codes
    assert any(codes)


def test_the_installed_rsync_is_asked(tmp_path: Path) -> None:
    def program(name: str, script: str) -> str:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    async def refused(path: str) -> str:
        return (await rsync_version.check(path)).refused

    async def main() -> None:
        found = await rsync_version.check(RSYNC)
        version = await asyncio.to_thread(run, RSYNC, "--version")
        assert found.version == version.split()[2]
        assert found.refused == ""
        assert "there is no program /nowhere" in await refused("/nowhere")
        assert "no rsync's version" in await refused("/bin/ls")
        assert "failed with exit code 3 (broken)" in await refused(
            program("fails", "echo broken >&2; exit 3")
        )
        hangs = program("hangs", "sleep 1000")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rsync_version, "ANSWER_WITHIN_S", 0.2)
            assert "did not answer within 0.2 s" in await refused(hangs)
        old = version.replace(found.version, "3.2.3")
        assert "no --fsync" in await refused(program("old", f"cat <<'E'\n{old}\nE"))
        holey = await rsync_version.check(
            program("holey", f"cat <<'E'\n{version.replace(found.version, '3.2.7')}\nE")
        )
        assert "CVE-2026-43618" in holey.warnings[0]

    asyncio.run(main())


def test_a_package_that_mended_an_old_number_is_believed() -> None:
    async def left(package: str) -> str:
        mended = await rsync_version._mended_by(package)
        old = rsync_version.Abilities((3, 2, 7), 31, frozenset())
        return " ".join(rsync_version.warnings(old, package, mended))

    async def main() -> None:
        assert "CVE-2024-12084" in await left("3.2.7-1")
        assert "CVE-2024-12084" in await left("3.2.7-1ubuntu1.2")  # not known here
        assert "CVE-2024-12084" not in await left("3.2.7-1+deb12u2")
        assert "CVE-2026-43618" in await left("3.2.7-1+deb12u2")
        assert "CVE-2026-43618" not in await left("3.2.7-1+deb12u10")

    asyncio.run(main())


# --- what is published is fresh -------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(folder: Path, loop: LoopVolume) -> AsyncIterator[Serving]:
    """A node that serves this volume, and looks at it, watches it and publishes as the daemon."""
    notes = folder / "notes"
    notes.mkdir()
    one = Serving(
        Inventory(loop.path.parent, clock_ms),
        Source(folder / "source", "10.9.1.1", PORT, "10.9.1.2", clock_ms),
        notes,
        token=lambda _: TOKEN,
        clocks=Clocks(clock_ms, time.time_ns),
        max_changed_folders=10_000,
        changed=lambda: None,
    )
    task = asyncio.create_task(one.run(EPOCH))
    try:
        async with asyncio.timeout(10):
            await until(lambda: one.source.running and one.journals)
        yield one
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.fixture
def served(make_volume: Callable[..., LoopVolume], tmp_path: Path) -> LoopVolume:
    at = tmp_path / "nfs" / "data"
    at.mkdir(parents=True)
    return make_volume(at=at)


async def fetched(net: Net, into: Path) -> tuple[Published, int]:
    """The one volume's list, and since when all is in the facts, as the peer gets them now."""
    names = ("--include=/facts.json", "--include=/changes-*", "--exclude=*")
    answer = await rsync(net.peer, "-c", *names, f"SOURCE/{CONTROL_MODULE}/", f"{into}/")
    assert answer.code == 0, answer
    return read_fetched(into)


def read_fetched(into: Path) -> tuple[Published, int]:
    [path] = into.glob("changes-*")
    facts, published = read_facts(into / "facts.json"), read_published(path.read_bytes())
    still_ns = facts.still_ns.get(published.uuid, 0)
    return replace(published, as_of_ns=max(published.as_of_ns, still_ns)), facts.as_of_ns


def test_what_was_written_before_a_fetch_is_in_what_is_fetched(
    net: Net, served: LoopVolume, tmp_path: Path
) -> None:
    took_s = []

    async def main() -> None:
        async with serving(tmp_path, served):
            for number in range(50):
                folder = served.path / f"folder{number}"
                folder.mkdir()
                (folder / "file").write_text("x")
                written_ns, began = time.time_ns(), time.monotonic()
                published, facts_ns = await fetched(net, tmp_path / "into")
                took_s.append(time.monotonic() - began)
                assert folder.name.encode() in dict(published.folders)
                assert published.complete
                assert written_ns < facts_ns <= published.as_of_ns < time.time_ns()

    in_the_source(net, main)
    print(f"a fetch took {sorted(took_s)[25] * 1000:.0f} ms, at most {max(took_s) * 1000:.0f} ms")


def test_two_fetches_at_once_both_know_of_the_write_before(
    net: Net, served: LoopVolume, tmp_path: Path
) -> None:

    async def main() -> None:
        async with serving(tmp_path, served):
            for number in range(8):
                (served.path / f"folder{number}").mkdir()
                (served.path / f"folder{number}" / "file").touch()
                both = await asyncio.gather(
                    *(fetched(net, tmp_path / f"into{side}") for side in range(2))
                )
                for published, _ in both:
                    assert b"folder%d" % number in dict(published.folders)

    in_the_source(net, main)


def test_a_list_that_takes_long_is_left_as_it_is_and_says_how_old_it_is(
    net: Net, served: LoopVolume, tmp_path: Path
) -> None:

    async def main() -> None:
        async with serving(tmp_path, served) as one:
            before, _ = await fetched(net, tmp_path / "into")
            [journal] = one.journals.values()
            threads = threading.active_count()
            with journal._lock:  # as a search, or a disk that hangs, would hold it
                for _ in range(2):
                    began_ns = time.time_ns()
                    after, facts_ns = await fetched(net, tmp_path / "into")
                    assert after == replace(before, as_of_ns=after.as_of_ns)
                    assert after.as_of_ns <= before.as_of_ns < began_ns < facts_ns
                    assert 1.5e9 < time.time_ns() - began_ns < 6e9
                assert threading.active_count() <= threads + 2  # one to publish, one to collect
            after, facts_ns = await fetched(net, tmp_path / "into")
            assert facts_ns <= after.as_of_ns

    in_the_source(net, main)


def test_a_list_at_rest_is_not_published_anew_and_yet_is_fresh(
    net: Net, served: LoopVolume, tmp_path: Path
) -> None:
    (served.path / "folder").mkdir()

    async def main() -> None:
        async with serving(tmp_path, served) as one:
            [uuid] = one.journals
            file = one.source.public / changes_name(uuid)
            seen = []
            for _ in range(3):
                began_ns = time.time_ns()
                published, facts_ns = await fetched(net, tmp_path / "into")
                assert began_ns < facts_ns <= published.as_of_ns < time.time_ns()
                assert published.folders == ()
                seen.append(file.stat().st_ino)
            assert len(set(seen[1:])) == 1
            (served.path / "folder" / "file").write_text("new")
            for _ in range(3):  # as long as there is something to pull, it is looked at each time
                began_ns = time.time_ns()
                published, facts_ns = await fetched(net, tmp_path / "into")
                assert began_ns < facts_ns <= published.as_of_ns < time.time_ns()
                assert [name for name, _ in published.folders] == [b"folder"]
                seen.append(file.stat().st_ino)
            published, _ = await fetched(net, tmp_path / "into")
            one.acknowledge({uuid: (published.journal_id, published.last)})
            assert (await fetched(net, tmp_path / "into"))[0].folders == ()
            file.unlink()  # nobody's work; and yet a list that is not there is not vouched for
            assert (await fetched(net, tmp_path / "into"))[0].folders == ()
            assert file.exists()

    in_the_source(net, main)


class Publishing:
    """Publishes a number that grows; `hangs` until it is told to go on."""

    def __init__(self) -> None:
        self.public = Path()
        self.number = 0
        self.hangs = False
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()

    async def __call__(self) -> None:
        self.begun.set()
        if self.hangs:
            await self.go_on.wait()
        self.number += 1
        (self.public / "number").write_text(str(self.number))


@contextlib.asynccontextmanager
async def publishing(
    folder: Path, *volumes: SourceVolume
) -> AsyncIterator[tuple[Source, Publishing]]:
    call = Publishing()
    async with offered(folder, *volumes, fresh=Coalesced(call)) as source:
        call.public = source.public
        yield source, call


def control(net: Net, into: Path) -> Awaitable[Answer]:
    return rsync(net.peer, "-c", f"SOURCE/{CONTROL_MODULE}/", f"{into}/")


def test_nothing_is_sent_before_it_is_published(net: Net, volume: Fixture, tmp_path: Path) -> None:
    into = tmp_path / "into"

    async def main() -> None:
        async with publishing(tmp_path) as (_, call):
            assert (await control(net, into)).code == 0
            assert (into / "number").read_text() == "1"
            call.hangs = True
            call.begun.clear()
            fetch = asyncio.ensure_future(control(net, into))
            await call.begun.wait()
            await asyncio.sleep(0.3)
            assert not fetch.done()
            call.go_on.set()
            assert (await fetch).code == 0
            assert (into / "number").read_text() == "2"

    in_the_source(net, main)


def test_a_publishing_that_hangs_or_fails_refuses_the_fetch_in_time(
    net: Net,
    volume: Fixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    one, into = volume[1], tmp_path / "into"

    async def main() -> None:
        async with publishing(tmp_path, one) as (source, call):
            (source.public / "number").write_text("stale")
            call.hangs = True
            began = time.monotonic()
            answers = await asyncio.gather(*(control(net, into) for _ in range(3)))
            assert 1.0 < time.monotonic() - began < 3.0
            for answer in answers:
                assert answer.code != 0
                assert "nothing fresh to send: publishing takes longer than 1 s" in answer.said
            assert not (into / "number").exists()
            assert (await rsync(net.peer, f"SOURCE/{one.module}/")).code == 0  # no matter
            call.go_on.set()
            assert (await control(net, into)).code == 0
            assert (into / "number").read_text() != "stale"

            async def fails() -> None:
                raise NotFreshError("no room in /run")

            source.fresh = fails
            answer = await control(net, into)
            assert answer.code != 0
            assert "nothing fresh to send: no room in /run" in answer.said

    monkeypatch.setattr(fresh, "FRESH_WITHIN_S", 1.0)
    in_the_source(net, main)
    said = [each for each in caplog.messages if "fetch is refused" in each]
    assert len(said) == 2  # once for each cause


def test_without_its_nfsha_the_source_refuses(net: Net, volume: Fixture, tmp_path: Path) -> None:
    async def main() -> None:
        async with publishing(tmp_path) as (source, _):
            await source._doorbell.close()
            began = time.monotonic()
            answer = await control(net, tmp_path / "into")
            assert answer.code != 0
            assert "nothing fresh to send: it does not answer: No such file" in answer.said
            assert time.monotonic() - began < 1.5

    in_the_source(net, main)


PUBLISHING_ALONE = SOURCE_ALONE.replace(
    "    await source.serve(",
    "    source.fresh = lambda: asyncio.sleep(0)\n"
    "    fresh.ANSWER_WITHIN_S = 2.0\n"
    "    await source.serve(",
).replace("import asyncio,", "from nfsha.replica.source import fresh\nimport asyncio,")


def test_an_nfsha_that_is_stopped_makes_its_source_refuse_in_time(
    net: Net, volume: Fixture, tmp_path: Path
) -> None:
    _, one = volume
    words = [str(tmp_path / "source"), TOKEN.user, TOKEN.password, one.uuid, str(one.path)]

    async def main(process: subprocess.Popen[str]) -> None:
        assert (await control(net, tmp_path / "into")).code == 0
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        answer = await control(net, tmp_path / "into")
        assert answer.code != 0
        assert "nothing fresh to send: it did not answer within 2 s" in answer.said
        assert 2.0 < time.monotonic() - began < 4.0
        process.send_signal(signal.SIGCONT)
        assert (await control(net, tmp_path / "into")).code == 0

    with inside(net.source):
        process = subprocess.Popen(
            [sys.executable, "-c", PUBLISHING_ALONE, *words], stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "True\n"
            asyncio.run(main(process))
        finally:
            process.kill()
            process.communicate()


def test_a_script_that_is_killed_leaves_nothing_and_the_next_one_works(
    net: Net, volume: Fixture, tmp_path: Path
) -> None:
    folder, into = tmp_path / "source", tmp_path / "into"

    def script(source: Source) -> psutil.Process | None:
        for each in daemon(source).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if str(folder) in each.cmdline() and each.cmdline()[0] == sys.executable:
                    return each
        return None

    async def main() -> None:
        async with publishing(tmp_path) as (source, call):
            assert (await control(net, into)).code == 0
            before = sorted(each.name for each in folder.iterdir())
            for _ in range(3):
                call.hangs = True
                call.begun.clear()
                call.go_on.clear()
                fetch = asyncio.ensure_future(control(net, into))
                await call.begun.wait()
                found = script(source)
                assert found is not None
                found.kill()
                assert (await asyncio.wait_for(fetch, 3)).code != 0
                call.hangs = False
                call.go_on.set()
                assert sorted(each.name for each in folder.iterdir()) == before
                assert (await control(net, into)).code == 0
                await until(lambda: not source._doorbell._waiting)

    in_the_source(net, main)


def test_what_is_said_at_its_socket_does_no_harm(net: Net, volume: Fixture, tmp_path: Path) -> None:
    path = tmp_path / "source" / "fresh"

    def ring(said: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(5)
            line.connect(str(path))
            with contextlib.suppress(OSError):  # it hangs up before it has all
                line.sendall(said)
            with contextlib.suppress(ConnectionResetError):
                return line.recv(1000)
            return b""

    async def main() -> None:
        async with publishing(tmp_path) as (_, call):
            assert path.stat().st_mode & 0o777 == 0o600
            for said in (b"", b"\0" * 100, b"x" * (4 << 20)):
                assert await asyncio.to_thread(ring, said) in (b"fresh\n", b"")
            call.hangs = True
            with contextlib.ExitStack() as stack:
                answers = []
                for _ in range(2 * fresh.MAX_WAITING):
                    line = stack.enter_context(socket.socket(socket.AF_UNIX))
                    await asyncio.to_thread(line.connect, str(path))
                    answers.append(line)
                refused = [
                    await asyncio.to_thread(line.recv, 100) for line in answers[fresh.MAX_WAITING :]
                ]
                assert refused == [b"too many ask at once\n"] * fresh.MAX_WAITING
            call.go_on.set()
            call.hangs = False
            assert call.number <= 4
            assert (await control(net, tmp_path / "into")).code == 0
        assert not path.exists()

    in_the_source(net, main)

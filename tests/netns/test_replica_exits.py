"""Each way in which an rsync can end, provoked for real, and what the pass makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from nfsha.replica.passes.pull import Pull
from nfsha.replica.passes.request import PassOutcome
from nfsha.replica.rsync.arguments import From
from nfsha.replica.rsync.exits import Verdict
from nfsha.replica.rsync.progress import Progress, Stage
from tests.netns.pullkit import (
    UUID,
    Login,
    PlainSource,
    ask,
    clock_ms,
    free_port,
    limits,
    pull,
    root,
    small_disk,
)
from tests.netns.treewalk import differences
from tests.netns.volumekit import LoopVolume, make_volume

__all__ = ["make_volume"]

LARGE_BYTES = 5 << 19
SLOW: dict[str, Any] = {"bandwidth_kib_s": 1000}


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    with small_disk() as path:
        yield path


@pytest.fixture
def places(disk: Path) -> Iterator[tuple[Path, Path, Path]]:
    """Source, target, scratch."""
    home = Path(tempfile.mkdtemp(dir=disk))
    folders = home / "source", home / "target", home / "scratch"
    for folder in folders:
        folder.mkdir()
    yield folders
    shutil.rmtree(home)


@pytest.fixture
def daemon(places: tuple[Path, Path, Path], tmp_path: Path) -> Iterator[PlainSource]:
    with PlainSource(tmp_path / "daemon", {UUID: places[0]}) as source:
        yield source


def write(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def with_large(source: Path) -> None:
    write(source / "a large one", os.urandom(LARGE_BYTES))
    write(source / "b", b"small")


def visible(target: Path) -> list[str]:
    """What a client of the target would see, but for the folders of partial files."""
    return sorted(each.name for each in target.iterdir() if each.name != ".nfsha-partial")


def receives(one: Pull) -> bool:
    """The content of a file comes in: rsync has its list by then."""
    target = Path(f"/proc/self/fd/{one.request.root_fd}")
    incoming = target / ".nfsha-incoming"
    aside = any(incoming.iterdir()) if incoming.exists() else False
    return aside or any(target.glob(".a large one.*"))


async def when_copying(one: Pull) -> int:
    """Waits until the copy runs, and gives rsync's pid."""
    for _ in range(500):
        child = one._runner._child
        if child is not None and child.name.startswith("copy-") and receives(one):
            await asyncio.sleep(0.5)
            return child.pid
        await asyncio.sleep(0.01)
    raise AssertionError("nothing is copied")


def cut(daemon: PlainSource, places: tuple[Path, Path, Path], act: Callable[[int, Pull], Any],
        **changes: Any) -> PassOutcome:  # fmt: skip
    """A slow first copy into which `act(pid of rsync, pull)` falls."""

    async def meanwhile(one: Pull) -> None:
        done = act(await when_copying(one), one)
        if isinstance(done, Awaitable):
            await done

    return pull(daemon, places[1], places[2], meanwhile=meanwhile, **(SLOW | changes))


# --- the network and the source ------------------------------------------------------------------


def test_10_nobody_listens(places: tuple[Path, Path, Path]) -> None:
    outcome = pull(From("127.0.0.1", free_port(), Login()), places[1], places[2])
    assert (outcome.exit_code, outcome.verdict) == (10, Verdict.RETRY)
    assert "connection to the source failed" in outcome.sentence
    assert "Connection refused" in outcome.sentence


def test_35_the_connection_is_not_answered(places: tuple[Path, Path, Path]) -> None:
    """A listener whose queue is full: the kernel drops the SYN, as a dead host would."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect(("127.0.0.1", port))
        outcome = pull(From("127.0.0.1", port, Login()), places[1], places[2],
                       connect_timeout_s=1)  # fmt: skip
    assert (outcome.exit_code, outcome.verdict) == (35, Verdict.RETRY), outcome
    assert outcome.seconds < 3


def test_30_a_source_that_says_nothing(places: tuple[Path, Path, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = From("127.0.0.1", listener.getsockname()[1], Login())
        outcome = pull(where, places[1], places[2], timeout_s=1)
    assert (outcome.exit_code, outcome.verdict) == (30, Verdict.RETRY), outcome


def test_30_a_source_that_stops_in_the_middle(
    daemon: PlainSource, places: tuple[Path, Path, Path]
) -> None:
    with_large(places[0])

    def stop(_pid: int, _one: Pull) -> None:
        for pid in daemon.senders():
            os.kill(pid, signal.SIGSTOP)

    begun = time.monotonic()
    outcome = cut(daemon, places, stop, timeout_s=2)
    assert (outcome.exit_code, outcome.verdict) == (30, Verdict.RETRY), outcome
    assert time.monotonic() - begun < 8
    assert visible(places[1]) == []


def test_12_a_sender_that_dies(daemon: PlainSource, places: tuple[Path, Path, Path]) -> None:
    with_large(places[0])

    def kill(_pid: int, _one: Pull) -> None:
        for pid in daemon.senders():
            os.kill(pid, signal.SIGKILL)

    outcome = cut(daemon, places, kill)
    assert (outcome.exit_code, outcome.verdict) == (12, Verdict.RETRY), outcome
    assert visible(places[1]) == []
    assert (places[1] / ".nfsha-partial" / "a large one").stat().st_size > 0
    again = pull(daemon, places[1], places[2])
    assert again.verdict is Verdict.COMPLETE, again
    assert again.wire_bytes < LARGE_BYTES - 100_000  # it went on from the partial file
    assert differences(*places[:2]) == []
    assert not (places[1] / ".nfsha-partial").exists()


@pytest.mark.parametrize(
    ("login", "uuid", "words"),
    [
        (Login("nfsha-0-00000000000000aa"), UUID, "this node's key and epoch"),
        (Login(password="of another key"), UUID, "this node's key and epoch"),
        (Login(), "99999999-2222-4333-8444-555555555555", "does not have this volume"),
    ],
)
def test_5_refused(
    daemon: PlainSource, places: tuple[Path, Path, Path], login: Login, uuid: str, words: str
) -> None:
    write(places[0] / "file")
    outcome = pull(replace(daemon.where, token=login), places[1], places[2], uuid=uuid)
    assert (outcome.exit_code, outcome.verdict) == (5, Verdict.REFUSED), outcome
    assert words in outcome.sentence
    assert list(places[1].iterdir()) == []


def test_5_the_volumes_folder_is_gone(daemon: PlainSource, places: tuple[Path, Path, Path]) -> None:
    write(places[1] / "keep")
    places[0].rmdir()
    outcome = pull(daemon, places[1], places[2])
    assert (outcome.exit_code, outcome.verdict) == (5, Verdict.REFUSED), outcome
    assert "folder is missing" in outcome.sentence
    assert visible(places[1]) == ["keep"]


def test_5_too_many_connections_is_worth_another_try(
    places: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    options = {"max connections": "1", "lock file": str(tmp_path / "lock")}
    with_large(places[0])
    other = tmp_path / "other"
    other.mkdir()
    with PlainSource(tmp_path / "daemon", {UUID: places[0]}, options=options) as daemon:
        found: list[PassOutcome] = []

        async def second(one: Pull) -> None:
            await when_copying(one)
            with root(other) as root_fd:
                request = ask(daemon, root_fd)
                found.append(await Pull(request, places[2], clock_ms).run(lambda _: None))

        pull(daemon, places[1], places[2], meanwhile=second, **SLOW)
    assert (found[0].exit_code, found[0].verdict) == (5, Verdict.RETRY), found


ODD = b"z/odd \xff\n\\#012"


def test_24_what_vanished_is_looked_for_again(
    daemon: PlainSource, places: tuple[Path, Path, Path]
) -> None:
    with_large(places[0])
    odd = write(places[0] / os.fsdecode(ODD))
    outcome = cut(daemon, places, lambda _pid, _one: odd.unlink(), bandwidth_kib_s=500)
    assert (outcome.exit_code, outcome.verdict) == (24, Verdict.COMPLETE), outcome
    assert outcome.vanished == (ODD,)
    assert outcome.files == 4
    assert differences(*places[:2]) == []


def test_24_what_comes_and_goes_leaves_the_pass_incomplete(
    daemon: PlainSource, places: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nfsha.replica.passes.pull._LOOKS_MAX", 0)
    with_large(places[0])
    odd = write(places[0] / os.fsdecode(ODD))
    outcome = cut(daemon, places, lambda _pid, _one: odd.unlink(), bandwidth_kib_s=500)
    assert (outcome.exit_code, outcome.verdict) == (24, Verdict.INCOMPLETE), outcome
    assert outcome.vanished == (ODD,)
    assert "1 file vanished at the source during the pass, the first z/odd" in outcome.sentence
    again = pull(daemon, places[1], places[2])
    assert (again.verdict, again.vanished) == (Verdict.COMPLETE, ())
    assert differences(*places[:2]) == []


def test_25_more_deletions_than_planned(
    daemon: PlainSource, places: tuple[Path, Path, Path]
) -> None:
    source, target, scratch = places
    for number in range(50):
        write(source / "a" / f"{number:02}")
    assert pull(daemon, target, scratch, limits=limits(target_empty=True)).files == 51
    for number in range(5):
        (source / "a" / f"{number:02}").unlink()

    def more(progress: Progress) -> None:
        if progress.stage is Stage.CHECK and (source / "a" / "20").exists():
            for number in range(20, 40):
                (source / "a" / f"{number:02}").unlink()

    few = limits(files=5, percent=10, known_files=51)
    outcome = pull(daemon, target, scratch, limits=few, progress=more)
    assert (outcome.exit_code, outcome.verdict) == (25, Verdict.STOPPED), outcome
    assert outcome.deletions == 5
    assert len(list((target / "a").iterdir())) == 45


# --- I/O errors of the source --------------------------------------------------------------------


@pytest.mark.parametrize("walk", ["full", "folders"])
def test_23_an_unreadable_folder_stops_all_deletions(
    places: tuple[Path, Path, Path], tmp_path: Path, walk: str
) -> None:
    """The folder sorts last: rsync alone, fed folder by folder, has deleted the others by then."""
    source, target, scratch = places
    for name in ("a/gone", "a/keep", "b/gone", "b/keep", "z/file"):
        write(source / name)
    with PlainSource(tmp_path / "whole", {UUID: source}) as daemon:
        pull(daemon, target, scratch, limits=limits(target_empty=True))
    for name in ("a/gone", "b/gone"):
        (source / name).unlink()
    write(source / "a" / "new")
    (source / "z").chmod(0o700)
    folders = None if walk == "full" else (b".", b"a", b"b", b"z")
    with PlainSource(tmp_path / "part", {UUID: source}, options={"uid": "nobody"}) as daemon:
        outcome = pull(daemon, target, scratch, folders=folders)
    assert (outcome.exit_code, outcome.verdict) == (23, Verdict.FAILED), outcome
    assert (outcome.deletions, outcome.plan) == (0, None)
    assert 'opendir "/z" (in v-' in outcome.sentence
    assert (target / "a" / "new").exists()  # what can be read is copied
    assert all((target / name).exists() for name in ("a/gone", "b/gone", "z/file"))


@pytest.mark.parametrize("walk", ["full", "folders"])
def test_23_content_that_cannot_be_read_stops_all_deletions(
    make_volume: Callable[..., LoopVolume], tmp_path: Path, walk: str
) -> None:
    """The dry run sees nothing of it: the error comes when the file is read, after the plan."""
    source, target = make_volume("ext4"), make_volume("ext4")
    write(source.path / "a" / "gone")
    write(source.path / "a" / "keep")
    large = write(source.path / "b" / "damaged", b"old" * (8 << 20))
    with PlainSource(tmp_path / "daemon", {UUID: source.path}) as daemon:
        pull(daemon, target.path, tmp_path, limits=limits(target_empty=True))
        (source.path / "a" / "gone").unlink()
        os.utime(large, ns=(0, 1))
        source.remount_ro()  # a write behind the cut would make a readable hole of it
        fd = os.open(large, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        os.truncate(source.image, 8 << 20)
        folders = None if walk == "full" else (b".", b"a", b"b")
        outcome = pull(daemon, target.path, tmp_path, folders=folders)
    assert (outcome.exit_code, outcome.verdict) == (23, Verdict.FAILED), outcome
    assert "Input/output error (5)" in outcome.sentence
    assert outcome.deletions == 0
    assert (target.path / "a" / "gone").exists()
    assert (target.path / "b" / "damaged").read_bytes() == b"old" * (8 << 20)


def test_a_source_that_is_not_mounted_any_more_empties_nothing(
    make_volume: Callable[..., LoopVolume], tmp_path: Path
) -> None:
    source, target = make_volume("ext4"), make_volume("ext4")
    for number in range(30):
        write(source.path / "a" / f"{number}")
    with PlainSource(tmp_path / "daemon", {UUID: source.path}) as daemon:
        pull(daemon, target.path, tmp_path, limits=limits(target_empty=True))
        source.unmount(lazy=True)
        for folders in (None, (b".",), (b".", b"a")):
            outcome = pull(daemon, target.path, tmp_path, folders=folders,
                           limits=limits(known_files=31))  # fmt: skip
            assert (outcome.verdict, outcome.deletions) == (Verdict.HELD, 0), outcome
    assert len(list((target.path / "a").iterdir())) == 30


# --- the target ----------------------------------------------------------------------------------


def test_11_a_target_that_is_full(make_volume: Callable[..., LoopVolume], tmp_path: Path) -> None:
    source, target = make_volume("ext4"), make_volume("ext4", size_mib=16)
    write(source.path / "a", os.urandom(2 << 20))
    write(source.path / "large", os.urandom(30 << 20))
    write(source.path / "z", b"last")
    with PlainSource(tmp_path / "daemon", {UUID: source.path}) as daemon:
        outcome = pull(daemon, target.path, tmp_path)
        assert outcome.verdict is Verdict.FAILED, outcome
        assert outcome.sentence.startswith("data: the volume on this node is full: ")
        assert " MiB are free now; " in outcome.sentence
        assert 'large": No space left on device (28))' in outcome.sentence
        assert "drop what is in its quarantine" in outcome.sentence
        assert "large" not in visible(target.path)
        (source.path / "large").unlink()
        again = pull(daemon, target.path, tmp_path)
    assert again.verdict is Verdict.COMPLETE, again
    assert differences(source.path, target.path) == []


def test_23_a_target_without_inodes(make_volume: Callable[..., LoopVolume], tmp_path: Path) -> None:
    source, target = make_volume("ext4"), make_volume("ext4", inodes=64)
    for number in range(200):
        write(source.path / "a" / f"{number}")
    with PlainSource(tmp_path / "daemon", {UUID: source.path}) as daemon:
        outcome = pull(daemon, target.path, tmp_path)
    assert outcome.verdict is Verdict.FAILED, outcome
    assert "full: hardly an inode is left (" in outcome.sentence
    assert " of 64 are free)" in outcome.sentence


def test_a_target_that_is_read_only(make_volume: Callable[..., LoopVolume], tmp_path: Path) -> None:
    source, target = make_volume("ext4"), make_volume("ext4")
    write(source.path / "a")
    target.remount_ro()
    with PlainSource(tmp_path / "daemon", {UUID: source.path}) as daemon:
        outcome = pull(daemon, target.path, tmp_path)
    assert outcome.verdict is Verdict.FAILED, outcome
    assert "Read-only file system" in outcome.sentence


def test_a_target_whose_disk_is_lost(
    make_volume: Callable[..., LoopVolume], tmp_path: Path
) -> None:
    source, target = make_volume("ext4"), make_volume("ext4")
    write(source.path / "large", os.urandom(LARGE_BYTES))
    with PlainSource(tmp_path / "daemon", {UUID: source.path}) as daemon:
        outcome = cut(daemon, (source.path, target.path, tmp_path),
                      lambda _pid, _one: target.shut_down())  # fmt: skip
    assert outcome.verdict is Verdict.FAILED, outcome
    assert "this node" in outcome.sentence


def test_nothing_lands_on_the_root_filesystem_when_the_target_is_unmounted(
    make_volume: Callable[..., LoopVolume], tmp_path: Path
) -> None:
    source, target = make_volume("ext4"), make_volume("ext4")
    with_large(source.path)

    def unmount(_pid: int, _one: Pull) -> None:
        target.unmount(lazy=True)

    with PlainSource(tmp_path / "daemon", {UUID: source.path}) as daemon:
        cut(daemon, (source.path, target.path, tmp_path), unmount)
    assert list(target.path.iterdir()) == []


# --- killed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 20), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_20_killed_by_somebody(
    daemon: PlainSource, places: tuple[Path, Path, Path], number: int, code: int
) -> None:
    with_large(places[0])
    outcome = cut(daemon, places, lambda pid, _one: os.kill(pid, number))
    assert (outcome.exit_code, outcome.verdict) == (code, Verdict.KILLED), outcome
    assert visible(places[1]) == []
    again = pull(daemon, places[1], places[2])
    assert again.verdict is Verdict.COMPLETE, again
    assert differences(*places[:2]) == []


def test_a_first_copy_that_is_killed_is_put_in_order_by_the_next_pass(
    daemon: PlainSource, places: tuple[Path, Path, Path]
) -> None:
    with_large(places[0])
    first = limits(target_empty=True)
    cut(daemon, places, lambda pid, _one: os.kill(pid, signal.SIGKILL), limits=first)
    left = visible(places[1])
    assert len(left) == 1
    assert left[0].startswith(".a large one.")
    outcome = pull(daemon, places[1], places[2])
    assert (outcome.verdict, outcome.deletions) == (Verdict.COMPLETE, 1), outcome
    assert differences(*places[:2]) == []


def test_ended_by_us_nothing_is_left(daemon: PlainSource, places: tuple[Path, Path, Path]) -> None:
    with_large(places[0])
    took: list[float] = []

    async def end(one: Pull) -> None:
        child = one._runner._child
        assert child is not None
        pids = child.pids()
        assert len(pids) >= 2
        begun = time.monotonic()
        await one.end()
        took.append(time.monotonic() - begun)
        assert not [pid for pid in pids if psutil.pid_exists(pid)]

    outcome = cut(daemon, places, lambda _pid, one: end(one))
    assert outcome.verdict is Verdict.KILLED, outcome
    assert outcome.sentence == "data: the pass was ended by this node"
    assert took[0] < 1
    assert visible(places[1]) == []


def test_ended_before_it_began(daemon: PlainSource, places: tuple[Path, Path, Path]) -> None:
    async def main(root_fd: int) -> PassOutcome:
        one = Pull(ask(daemon, root_fd), places[2], clock_ms)
        await one.end()
        return await one.run(lambda _: None)

    write(places[0] / "file")
    with root(places[1]) as root_fd:
        assert asyncio.run(main(root_fd)).verdict is Verdict.KILLED
    assert list(places[1].iterdir()) == []


def test_a_pass_that_takes_too_long(daemon: PlainSource, places: tuple[Path, Path, Path]) -> None:
    with_large(places[0])
    outcome = pull(daemon, places[1], places[2], longest_s=1, **SLOW)
    assert outcome.verdict is Verdict.RETRY, outcome
    assert "ended after 1 s" in outcome.sentence
    assert visible(places[1]) == []


def test_what_a_killed_pass_left_is_gone_after_the_next(
    daemon: PlainSource, places: tuple[Path, Path, Path]
) -> None:
    write(places[0] / "file")
    write(places[1] / ".nfsha-incoming" / ".file.aB3dEf")
    assert pull(daemon, places[1], places[2]).verdict is Verdict.COMPLETE
    assert visible(places[1]) == ["file"]

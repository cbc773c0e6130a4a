"""Spare copies of large files against real rsync: changed in their place, and never half served."""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nfsha.replica.passes import spares
from nfsha.replica.passes.pull import Pull
from nfsha.replica.passes.request import PassOutcome
from nfsha.replica.rsync.exits import Verdict
from nfsha.replica.rsync.progress import Progress
from tests.netns.pullkit import UUID, PlainSource, limits, pull, root, small_disk
from tests.netns.treewalk import differences

MIB = 1 << 20
LARGE = b"folder/large"


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    with small_disk() as path:
        yield path


@dataclass
class Pair:
    """A source with one large file in a folder, its copy, and a daemon between them."""

    source: Path
    target: Path
    scratch: Path
    daemon: PlainSource

    @property
    def there(self) -> Path:
        return self.source / os.fsdecode(LARGE)

    @property
    def here(self) -> Path:
        return self.target / os.fsdecode(LARGE)

    @property
    def parts(self) -> Path:
        return self.here.parent / ".nfsha-partial"

    def pull(self, **changes: Any) -> PassOutcome:
        wanted: dict[str, Any] = {"folders": (b"folder",), "limits": limits(known_files=3)}
        return pull(self.daemon, self.target, self.scratch, **(wanted | changes))

    def make(self, name: bytes = LARGE, *, stop: bool = False) -> int:
        ending = threading.Event()
        if stop:
            ending.set()
        with root(self.target) as fd:
            return spares.make(fd, name, ending)

    def times(self) -> tuple[int, int]:
        found = self.here.parent.stat()
        return found.st_atime_ns, found.st_mtime_ns


@pytest.fixture
def pair(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr(spares, "LEAST_BYTES", MIB)
    with tempfile.TemporaryDirectory(dir=disk) as home:
        source, target = Path(home, "source"), Path(home, "target")
        for folder in (source / "folder", target, tmp_path / "scratch"):
            folder.mkdir(parents=True)
        (source / "folder/large").write_bytes(os.urandom(12 * MIB))
        (source / "folder/other").write_text("small")
        with PlainSource(tmp_path / "daemon", {UUID: source}) as daemon:
            found = Pair(source, target, tmp_path / "scratch", daemon)
            first = found.pull(folders=None, limits=limits(target_empty=True))
            assert first.verdict is Verdict.COMPLETE, first
            yield found


def append(file: Path, count: int = 1) -> None:
    with file.open("ab") as opened:
        opened.write(os.urandom(count * 4096))


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("change", ["grown", "shorter", "in the middle", "all of it"])
def test_the_spare_is_changed_in_its_place_and_takes_the_files(
    pair: Pair, change: str, checksum: bool
) -> None:
    assert pair.make() == 12 * MIB
    spare, before = (pair.parts / "large").stat().st_ino, pair.here.stat().st_ino
    match change:
        case "grown":
            append(pair.there)
        case "shorter":
            os.truncate(pair.there, 5 * MIB + 17)
        case "in the middle":
            with pair.there.open("r+b") as file:
                file.seek(3 * MIB)
                file.write(b"other")
        case _:
            pair.there.write_bytes(os.urandom(12 * MIB))
    pair.there.chmod(0o640)
    os.setxattr(pair.there, "user.colour", b"green")
    done = pair.pull(spares={LARGE: 12 * MIB}, checksum=checksum)
    assert done.verdict is Verdict.COMPLETE, done
    assert done.brought == {LARGE: pair.there.stat().st_size}
    assert differences(pair.source, pair.target) == []
    assert pair.here.stat().st_ino == spare != before
    assert not pair.parts.exists()
    again = pair.pull(checksum=True)
    assert (again.verdict, again.transferred_files) == (Verdict.COMPLETE, 0)


def test_small_files_of_the_same_pass_come_too_and_what_is_gone_is_deleted(pair: Pair) -> None:
    pair.make()
    append(pair.there)
    (pair.source / "folder/other").unlink()
    (pair.source / "folder/new").write_text("new")
    done = pair.pull(spares={LARGE: 12 * MIB}, checksum=True)
    assert (done.verdict, done.transferred_files, done.deletions) == (Verdict.COMPLETE, 2, 1), done
    assert differences(pair.source, pair.target) == []


def test_a_spare_that_no_pass_needs_is_gone_after_it_and_nothing_else_is_changed(
    pair: Pair,
) -> None:
    before = pair.times()
    pair.make()
    assert pair.times() == before
    (pair.source / "folder/other").write_text("the only one that changed")
    done = pair.pull(spares={LARGE: 12 * MIB})
    assert (done.verdict, done.transferred_files, done.deletions) == (Verdict.COMPLETE, 1, 0), done
    assert not pair.parts.exists()
    assert differences(pair.source, pair.target) == []
    pair.make()
    before = pair.times()
    with root(pair.target) as fd:
        spares.drop(fd, [LARGE, b"folder/other", b"gone/file"])
    assert not pair.parts.exists() and pair.times() == before


def test_a_pass_that_is_cut_leaves_the_file_as_it_was(pair: Pair) -> None:
    before = pair.here.read_bytes()
    pair.make()
    pair.there.write_bytes(os.urandom(12 * MIB))
    begun = asyncio.Event()

    def progress(now: Progress) -> None:
        if now.bytes > MIB:
            begun.set()

    async def cut(one: Pull) -> None:
        async with asyncio.timeout(20):
            await begun.wait()
        assert (pair.parts / "large").read_bytes() != before, "it writes elsewhere"
        await one.end()

    wanted = {"spares": {LARGE: 12 * MIB}, "bandwidth_kib_s": 4000}
    done = pair.pull(meanwhile=cut, progress=progress, **wanted)
    assert done.verdict is Verdict.KILLED
    assert pair.here.read_bytes() == before
    assert pair.pull().verdict is Verdict.COMPLETE  # whatever the cut one left
    assert differences(pair.source, pair.target) == []
    assert not pair.parts.exists()


def test_none_is_made_where_it_would_be_wrong_or_too_much(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pair.here.parent
    assert pair.make(b"folder/other") == 0  # too small
    with (folder / "holes").open("wb") as file:
        file.truncate(8 * MIB)
    assert pair.make(b"folder/holes") == 0
    (folder / "link").symlink_to("large")
    with pytest.raises(OSError, match="symbolic"):
        pair.make(b"folder/link")
    assert pair.make(stop=True) == 0
    (folder / "linked").hardlink_to(pair.here)
    assert pair.make() == 0
    (folder / "linked").unlink()
    monkeypatch.setattr(spares, "ROOM_SHARE", 1000)
    assert pair.make() == 0
    assert not pair.parts.exists()


def test_no_room_after_all_leaves_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    before, copy = pair.times(), os.copy_file_range

    def full(*args: Any) -> int:
        copy(*args)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="No space"):
        pair.make()
    assert not pair.parts.exists() and pair.times() == before


def test_a_part_of_a_cut_pass_gives_way(pair: Pair) -> None:
    pair.parts.mkdir(mode=0o700)
    (pair.parts / "large").write_text("half")
    (pair.parts / "another").write_text("half")
    assert pair.make() == 12 * MIB
    assert (pair.parts / "large").read_bytes() == pair.here.read_bytes()
    with root(pair.target) as fd:
        spares.drop(fd, [LARGE])
    assert [one.name for one in pair.parts.iterdir()] == ["another"]

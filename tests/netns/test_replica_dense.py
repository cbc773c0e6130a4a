"""Large files without holes: listed by find on a real filesystem, copied by rsync without looking.

What has holes never fills the disk, be it as it was listed or not.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nfsha.replica.passes import filling
from nfsha.replica.passes.request import PassOutcome
from nfsha.replica.rsync.exits import Verdict
from nfsha.replica.source import dense_lists
from nfsha.replica.source.dense_lists import DenseLists
from nfsha.replica.volume.dense import DenseFiles, dense_name, read_dense
from nfsha.replica.volume.facts import VolumeFacts
from nfsha.replica.volume.volumes import discover, write_identity
from tests.netns.copies import Copies
from tests.netns.lab import Lab
from tests.netns.pullkit import UUID, PlainSource, clock_ms, limits, pull
from tests.netns.treewalk import differences
from tests.netns.volumekit import LoopVolume, make_volume

__all__ = ["make_volume"]

MIB = 1 << 20


def noise(path: Path, size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(size))
    return path


def hole(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def used_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


# --- the source's list ---------------------------------------------------------------------------


def facts_of(volume: LoopVolume) -> VolumeFacts:
    (found,) = (one for one in discover(volume.path.parent) if one.path == volume.path)
    return write_identity(found, UUID)


@pytest.mark.parametrize("fstype", ["ext4", "xfs", "btrfs"])
def test_large_files_without_holes_are_listed_and_no_others(
    make_volume: Callable[..., LoopVolume], tmp_path: Path, fstype: str
) -> None:
    volume = make_volume(fstype)
    one, public = facts_of(volume), tmp_path / "public"
    public.mkdir()
    noise(volume.path / "a" / "odd\n\\ name", MIB + 1)
    os.link(volume.path / "a" / "odd\n\\ name", volume.path / "link")
    noise(volume.path / "a" / "small", 100 << 10)
    noise(volume.path / ".nfsha-quarantine" / "kept", MIB)
    noise(volume.path / "a" / ".nfsha-partial" / "part", MIB)
    hole(volume.path / "hole", 100 * MIB)
    with hole(volume.path / "half", 2 * MIB).open("r+b") as half:
        half.write(os.urandom(MIB))
    (volume.path / "symlink").symlink_to("link")

    async def scene() -> list[DenseFiles]:
        lists = DenseLists(public, clock_ms)
        seen = []
        await lists.publish({UUID: one})
        seen.append(read_dense(public / dense_name(UUID)))
        noise(volume.path / "later", MIB)
        await lists.publish({UUID: one})  # not again so soon
        seen.append(read_dense(public / dense_name(UUID)))
        await lists.publish({})
        assert list(public.iterdir()) == []
        await lists.publish({UUID: one})
        seen.append(read_dense(public / dense_name(UUID)))
        await lists.end()
        return seen

    first, second, third = asyncio.run(scene())
    assert sorted(first.files) == [(b"a/odd\n\\ name", MIB + 1), (b"link", MIB + 1)]
    assert second == first
    assert sorted({*third.files} - {*first.files}) == [(b"later", MIB)]
    assert [each.name for each in public.iterdir()] == [dense_name(UUID)]


def test_a_search_that_takes_long_is_ended_and_what_it_found_is_good(
    make_volume: Callable[..., LoopVolume], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = make_volume("ext4")
    one = facts_of(volume)
    noise(volume.path / "large", MIB)
    find = dense_lists._find

    def slow(root_fd: int, into: Path) -> list[str]:
        return ["sh", "-c", '"$@"; exec sleep 100', "sh", *find(root_fd, into)]

    monkeypatch.setattr(dense_lists, "_find", slow)
    monkeypatch.setattr(dense_lists, "LOOK_WITHIN_MS", 500)

    async def scene() -> None:
        lists = DenseLists(tmp_path, clock_ms)
        await lists.publish({UUID: one})
        assert read_dense(tmp_path / dense_name(UUID)).files == ((b"large", MIB),)
        await lists.publish({})
        begun = asyncio.create_task(lists.publish({UUID: one}))
        while lists._child is None:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0)
        await lists.end()
        await begun
        volume.unmount()  # nothing holds it

    asyncio.run(scene())


# --- a first copy by the list --------------------------------------------------------------------


def first(
    daemon: PlainSource, target: LoopVolume, scratch: Path, *listed: tuple[bytes, int]
) -> PassOutcome:
    return pull(
        daemon, target.path, scratch, limits=limits(target_empty=True), dense=DenseFiles(listed)
    )


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "LEAST_SPARE_BYTES", 16 * MIB)


@pytest.mark.usefixtures("little_room")
def test_a_first_copy_by_the_list_arrives_equal_with_holes_where_they_were(
    make_volume: Callable[..., LoopVolume], tmp_path: Path
) -> None:
    source, target = make_volume("ext4", size_mib=128), make_volume("ext4", size_mib=128)
    noise(source.path / "deep" / "er" / "odd\n# name", 3 * MIB)
    noise(source.path / "#large", MIB)
    os.link(source.path / "#large", source.path / "deep" / "link")
    (source.path / "deep" / "er").chmod(0o2750)
    os.utime(source.path / "deep" / "er", ns=(1, 1_000_000_001))
    hole(source.path / "image", 500 * MIB)
    # Listed when it had no holes.
    with noise(source.path / "punched", 8 * MIB).open("r+b") as file:
        file.truncate(MIB)
        file.truncate(8 * MIB)
    noise(source.path / "small", 10)
    with PlainSource(tmp_path / "source", {UUID: source.path}) as daemon:
        outcome = first(
            daemon, target, tmp_path, (b"deep/er/odd\n# name", 3 * MIB), (b"#large", MIB),
            (b"deep/link", MIB), (b"punched", 8 * MIB), (b"gone/long ago", MIB),
        )  # fmt: skip
        assert outcome.verdict is Verdict.COMPLETE, outcome
        found = differences(source.path, target.path)
        again = pull(daemon, target.path, tmp_path, limits=limits(known_files=outcome.files))
    # Only what was said to have no holes came without; so the list is what decides.
    assert len(found) == 1
    assert found[0].startswith("b'punched': "), found
    assert (target.path / "punched").read_bytes() == (source.path / "punched").read_bytes()
    assert outcome.transferred_files == 5
    assert outcome.transferred_bytes == 12 * MIB + 500 * MIB + 10
    assert again.sentence == "data: nothing differed"
    assert again.files == outcome.files == 8


@pytest.mark.usefixtures("little_room")
def test_what_is_larger_than_all_that_was_listed_comes_with_its_holes(
    make_volume: Callable[..., LoopVolume], tmp_path: Path
) -> None:
    source, target = make_volume("ext4", size_mib=128), make_volume("ext4", size_mib=128)
    noise(source.path / "other", MIB)
    hole(source.path / "replaced", 500 * MIB)
    with PlainSource(tmp_path / "source", {UUID: source.path}) as daemon:
        outcome = first(daemon, target, tmp_path, (b"other", MIB), (b"replaced", MIB))
    assert outcome.verdict is Verdict.COMPLETE, outcome
    assert differences(source.path, target.path) == []
    assert used_bytes(target.path / "replaced") == 0


@pytest.mark.usefixtures("little_room")
def test_files_that_got_holes_do_not_fill_the_disk_and_the_next_pass_has_them_right(
    make_volume: Callable[..., LoopVolume], tmp_path: Path
) -> None:
    """They were 1 MiB each when they were listed, and one of 120 MiB is gone."""
    source, target = make_volume("ext4", size_mib=512), make_volume("ext4", size_mib=512)
    names = [b"image%d" % number for number in range(8)]
    for name in names:
        hole(source.path / os.fsdecode(name), 110 * MIB)
    noise(source.path / "whole", MIB)
    least_free: list[int] = []

    def look(_: object) -> None:
        found = os.statvfs(target.path)
        least_free.append(found.f_bfree * found.f_frsize)

    listed = DenseFiles(((b"gone", 120 * MIB), *((name, MIB) for name in (*names, b"whole"))))
    with PlainSource(tmp_path / "source", {UUID: source.path}) as daemon:
        outcome = pull(
            daemon,
            target.path,
            tmp_path,
            limits=limits(target_empty=True),
            dense=listed,
            progress=look,
        )
        assert outcome.verdict is Verdict.RETRY, outcome
        assert "got holes" in outcome.sentence
        assert min(least_free) > 32 * MIB
        assert [one for one in names if (target.path / os.fsdecode(one)).exists()] == []
        again = pull(daemon, target.path, tmp_path)
    assert again.verdict is Verdict.COMPLETE, again
    assert differences(source.path, target.path) == []
    assert sum(used_bytes(target.path / os.fsdecode(name)) for name in names) == 0


def test_without_room_for_a_mistake_holes_are_looked_for_in_all_files(
    make_volume: Callable[..., LoopVolume], tmp_path: Path
) -> None:
    source, target = make_volume("ext4"), make_volume("ext4")
    hole(source.path / "image", 8 * MIB)
    with PlainSource(tmp_path / "source", {UUID: source.path}) as daemon:
        outcome = first(daemon, target, tmp_path, (b"image", 8 * MIB))
    assert outcome.verdict is Verdict.COMPLETE, outcome
    assert differences(source.path, target.path) == []


@pytest.mark.timeout(90)
def test_both_daemons_copy_by_the_list(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(volume_mib=1024)
    copies = Copies(lab)
    for number in range(3):
        noise(copies.here("a") / "folder" / f"large{number}", MIB)
    hole(copies.here("a") / "image", 1100 * MIB)
    copies.settle_whole()
    assert copies.differences() == []
    assert "volume data: 3 large files without holes" in copies.log("b")

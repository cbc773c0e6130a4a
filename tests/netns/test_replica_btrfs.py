"""Volumes on btrfs: what is there as elsewhere, and what subvolumes change."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nfsha.replica.journal.changes import ChangeJournal, ChangesError, Published
from nfsha.replica.rsync.exits import Verdict
from nfsha.replica.volume.volumes import VolumeFacts, discover
from tests.netns.namespaces import run
from tests.netns.pullkit import UUID, PlainSource, limits, pull
from tests.netns.treewalk import differences, make_odd_tree
from tests.netns.volumekit import LoopVolume, left_behind, make_volume

__all__ = ["make_volume"]  # a fixture

MakeVolume = Callable[..., LoopVolume]


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """An NFS root; what a test mounts by hand in it goes at the end."""
    folder = tmp_path / "nfs"
    folder.mkdir()
    yield folder
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    for point in [line.split()[4] for line in mounts if str(folder) in line][::-1]:
        subprocess.run(["umount", "-l", point], check=True)
    assert left_behind() == []


@pytest.fixture
def volume(root: Path) -> Iterator[LoopVolume]:
    with LoopVolume("btrfs", at=root / "data") as made:
        yield made


def subvolume(path: Path) -> Path:
    run("btrfs", "subvolume", "create", str(path))
    return path


def mount_subvolume(volume: LoopVolume, name: str, at: Path) -> Path:
    at.mkdir(exist_ok=True)
    run("mount", "-o", f"subvol={name}", volume.device, str(at))
    return at


def only(root: Path) -> VolumeFacts:
    (found,) = discover(root)
    return found


def started(path: Path, home: Path) -> ChangeJournal:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        journal = ChangeJournal(
            path, fd, UUID, home, lambda: time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000,
            time.time_ns,
        )  # fmt: skip
        journal.start()
    finally:
        os.close(fd)
    return journal


def folders_of(published: Published) -> set[bytes]:
    assert published.complete
    return {path for path, _ in published.folders}


def test_the_journal_tells_of_this_volume_only(volume: LoopVolume, tmp_path: Path) -> None:
    """An event in a subvolume below comes too; rsync, told that path, would copy what is in it."""
    inner = subvolume(volume.path / "inner")
    (inner / "deep").mkdir()
    (volume.path / "folder").mkdir()
    journal = started(volume.path, tmp_path)
    try:
        (volume.path / "folder/file").write_text("1")
        (inner / "file").write_text("1")
        (inner / "deep/file").write_text("1")
        os.link(inner / "deep/file", inner / "deep/other name")
        assert folders_of(journal.publish(tmp_path / "list")) == {b"folder"}
        assert journal.counters.searches == 0
    finally:
        journal.close()


def test_mounted_subvolumes_are_volumes_without_a_journal(
    root: Path, make_volume: MakeVolume, tmp_path: Path
) -> None:
    volume = make_volume("btrfs")
    subvolume(volume.path / "one")
    subvolume(volume.path / "two")
    places = [mount_subvolume(volume, name, root / name) for name in ("one", "two")]
    found = discover(root)
    assert [(one.name, one.refused, one.failing) for one in found] == [
        ("one", "", ""),
        ("two", "", ""),
    ]
    assert [one.device_number for one in found] == [place.stat().st_dev for place in places]
    assert len({one.device_number for one in found}) == 2
    with pytest.raises(
        ChangesError, match="a btrfs subvolume, of which the kernel tells no changes"
    ):
        started(places[0], tmp_path)


def test_a_volume_with_subvolumes_that_nobody_would_copy_is_refused(
    root: Path, volume: LoopVolume
) -> None:
    (volume.path / "a").mkdir()
    inner = subvolume(volume.path / "a/inner one")
    found = only(root)
    assert "'a/inner one'" in found.refused
    mount_subvolume(volume, "a/inner one", inner)
    assert [(one.name, one.refused) for one in discover(root)] == [
        ("data", ""),
        ("data/a/inner one", ""),
    ]
    run("umount", str(inner))
    assert only(root).refused
    run("btrfs", "property", "set", str(inner), "ro", "true")
    assert only(root).refused == ""
    run("btrfs", "property", "set", str(inner), "ro", "false")
    assert only(root).refused
    run("btrfs", "subvolume", "delete", str(inner))
    assert only(root).refused == ""


def test_many_subvolumes_are_refused_too(root: Path, volume: LoopVolume) -> None:
    for number in range(256):
        subvolume(volume.path / f"{number:03}")
    assert "('000', '001', '002')" in only(root).refused


@pytest.mark.parametrize("walk", ["full", "folders"])
def test_all_but_the_snapshots_arrives_and_snapshots_of_the_copy_stay(
    make_volume: MakeVolume, tmp_path: Path, walk: str
) -> None:
    source, target = make_volume("btrfs"), make_volume("btrfs")
    make_odd_tree(source.path / "odd")
    (source.path / "old").write_text("1")
    every = tuple(
        os.path.relpath(folder, os.fsencode(source.path))
        for folder, _, _ in os.walk(os.fsencode(source.path))
    )
    with PlainSource(tmp_path / "source", {UUID: source.path}) as daemon:

        def copied(**changes: Any) -> None:
            folders = every if walk == "folders" else None
            outcome = pull(daemon, target.path, tmp_path, folders=folders, **changes)
            assert outcome.verdict is Verdict.COMPLETE, outcome

        copied(limits=limits(target_empty=True))
        assert differences(source.path, target.path) == []
        snapshot = target.path / "before"
        run("btrfs", "subvolume", "snapshot", "-r", str(target.path), str(snapshot))
        (source.path / "old").unlink()
        (source.path / "new").write_text("2")
        copied(limits=limits(known_files=100))
        assert {path.name for path in target.path.iterdir()} == {"before", "new", "odd"}
        assert (snapshot / "old").read_text() == "1"
        run("btrfs", "subvolume", "snapshot", "-r", str(source.path), str(source.path / "taken"))
        copied(limits=limits(known_files=100))
        assert list((target.path / "taken").iterdir()) == []

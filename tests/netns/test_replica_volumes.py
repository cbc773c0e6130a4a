"""The volumes as they are: real filesystems, mounted, broken, filled, bound and taken away."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from nfsha.core.model import Epoch, Role
from nfsha.replica.files.durable import write_durably_at
from nfsha.replica.files.own_names import IDENTITY_NAME, OWN_NAMES, STAMP_NAME
from nfsha.replica.volume.superblock import listed_uuids, read_uuid
from nfsha.replica.volume.volumes import (
    VolumeError,
    VolumeFacts,
    discover,
    open_root,
    read_identity,
    read_stamp,
    write_identity,
    write_stamp,
)
from tests.netns.volumekit import LoopVolume, left_behind, loop_volumes

EPOCH = Epoch(7, "0123456789abcdef", Role.PRIMARY)
IDENTITY = str(uuid.UUID(int=1))
OTHER = str(uuid.UUID(int=2))


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """An NFS root that is a plain folder; whatever a test mounts by hand in it goes at the end."""
    folder = tmp_path / "nfs"
    folder.mkdir()
    yield folder
    mounts = os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).splitlines()
    for point in [line.split()[4] for line in mounts if str(folder) in line][::-1]:
        subprocess.run(["umount", "-l", point], check=True)
    assert left_behind() == []


@pytest.fixture(params=["ext4", "xfs"])
def volume(request: pytest.FixtureRequest, root: Path) -> Iterator[LoopVolume]:
    with LoopVolume(request.param, at=root / "ns1" / "data") as made:
        yield made


@pytest.fixture
def ext4(root: Path) -> Iterator[LoopVolume]:
    with LoopVolume("ext4", at=root / "data") as made:
        yield made


def only(root: Path) -> VolumeFacts:
    found = discover(root)
    assert len(found) == 1
    return found[0]


def mount(*argv: str | Path) -> None:
    subprocess.run(["mount", *argv], check=True, timeout=30)


# --- what is there -------------------------------------------------------------------------------


@pytest.mark.parametrize("volume", ["ext4", "xfs", "btrfs"], indirect=True)
def test_a_fresh_volume_is_found_with_all_its_facts(root: Path, volume: LoopVolume) -> None:
    found = only(root)
    numbers = os.statvfs(volume.path)
    assert found == VolumeFacts(
        name="ns1/data",
        path=volume.path,
        device=volume.device,
        device_number=volume.path.stat().st_dev,
        fstype=volume.fstype,
        fs_uuid=volume.fs_uuid,
        size_bytes=numbers.f_blocks * 4096,
        free_bytes=volume.free_bytes,
        inodes=numbers.f_files,
        free_inodes=numbers.f_favail,
        options=found.options,
        read_only=False,
        failing="",
        identity=None,
        stamp=None,
        empty=True,
        refused="",
    )
    assert found.options.startswith("rw,relatime")


@pytest.mark.parametrize("volume", ["ext4", "xfs", "btrfs"], indirect=True)
def test_the_uuid_is_read_from_the_device_and_agrees_with_blkid(volume: LoopVolume) -> None:
    said = subprocess.run(
        ["blkid", "-p", "-o", "value", "-s", "UUID", volume.device],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert read_uuid(volume.device, volume.fstype) == said.stdout.strip() == volume.fs_uuid
    for other in {"btrfs", "ext4", "xfs", "zfs"} - {volume.fstype}:
        assert read_uuid(volume.device, other) is None


def test_udevs_list_is_read_by_device_and_not_by_name(volume: LoopVolume, tmp_path: Path) -> None:
    (tmp_path / "by-uuid").mkdir()
    (tmp_path / "by-uuid" / OTHER).symlink_to(volume.device)
    (tmp_path / "by-uuid" / "dangling").symlink_to("/dev/nowhere")
    assert listed_uuids(tmp_path / "by-uuid") == {os.stat(volume.device).st_rdev: OTHER}  # noqa: PTH116


def test_volumes_in_volumes_and_odd_names_are_found_in_order(root: Path) -> None:
    with loop_volumes(root, "b", "b/inner one", "a\nnew line"):
        found = discover(root)
        assert [one.name for one in found] == ["a\nnew line", "b", "b/inner one"]
        assert [one.empty for one in found] == [True, True, True]
        assert len({one.device_number for one in found}) == 3


def test_a_filesystem_mounted_over_volumes_hides_them(root: Path) -> None:
    with loop_volumes(root, "a/one", "a/two") as volumes, LoopVolume("xfs", at=root / "a") as over:
        assert [(one.name, one.fs_uuid) for one in discover(root)] == [("a", over.fs_uuid)]
        over.unmount()
        assert [one.fs_uuid for one in discover(root)] == [one.fs_uuid for one in volumes]


def test_an_unmounted_volume_is_not_there_and_comes_back(root: Path, volume: LoopVolume) -> None:
    volume.unmount()
    assert discover(root) == ()
    volume.mount("noatime")
    assert "noatime" in only(root).options


@pytest.mark.parametrize(
    ("make", "empty"),
    [
        (lambda path: None, True),
        (lambda path: [(path / name).touch() for name in OWN_NAMES - {IDENTITY_NAME, STAMP_NAME}],
         True),
        (lambda path: (path / ".nfsha-quarantine" / "deep").mkdir(parents=True), True),
        (lambda path: (path / "file").touch(), False),
        (lambda path: (path / ".hidden").touch(), False),
        (lambda path: (path / "folder").mkdir(), False),
        (lambda path: (path / "symlink").symlink_to("nowhere"), False),
        (lambda path: (path / ".nfsha-volume.old").touch(), False),
    ],
)  # fmt: skip
def test_only_our_own_files_and_lost_and_found_are_no_data(
    root: Path, volume: LoopVolume, make: Callable[[Path], object], empty: bool
) -> None:
    make(volume.path)
    assert only(root).empty is empty


def test_a_file_in_place_of_lost_and_found_is_data(root: Path, ext4: LoopVolume) -> None:
    assert (ext4.path / "lost+found").is_dir()
    (ext4.path / "lost+found").rmdir()
    (ext4.path / "lost+found").write_text("a client's")
    assert only(root).empty is False


def test_a_mount_point_in_a_volume_is_no_data_but_other_folders_are(
    root: Path, ext4: LoopVolume
) -> None:
    with LoopVolume("xfs", at=ext4.path / "on" / "the way"):
        assert [one.empty for one in discover(root)] == [True, True]
        (ext4.path / "on" / "file").touch()
        assert [one.empty for one in discover(root)] == [False, True]


# --- the root's own filesystem -------------------------------------------------------------------


def test_a_root_counts_with_its_first_file_and_not_with_places_to_mount_at(root: Path) -> None:
    (root / "ns1" / "not mounted now").mkdir(parents=True)
    with LoopVolume("ext4", at=root / "ns1" / "data"):
        assert [one.name for one in discover(root)] == ["ns1/data"]
        (root / "ns1" / "file").touch()
        assert [one.name for one in discover(root)] == [".", "ns1/data"]
        (root / "ns1" / "file").unlink()
        (root / IDENTITY_NAME).write_text(f"{IDENTITY}\n")
        assert [one.identity for one in discover(root)] == [IDENTITY, None]


def test_a_mounted_root_is_a_volume_when_it_holds_data(tmp_path: Path) -> None:
    with LoopVolume("xfs", at=tmp_path / "nfs") as own:
        assert discover(own.path) == ()
        (empty,) = discover(own.path, keep_empty_root=True)
        assert (empty.name, empty.fs_uuid, empty.empty) == (".", own.fs_uuid, True)
        (own.path / "file").touch()
        with LoopVolume("ext4", at=own.path / "data") as inner:
            found = discover(own.path)
            assert [one.fs_uuid for one in found] == [own.fs_uuid, inner.fs_uuid]


# --- what can be no volume -----------------------------------------------------------------------


def test_a_second_mount_of_the_same_filesystem_is_refused(root: Path, ext4: LoopVolume) -> None:
    (ext4.path / "folder").mkdir()
    for name, source in (("same", ext4.path), ("a folder of it", ext4.path / "folder")):
        (root / name).mkdir()
        mount("--bind", source, root / name)
    found = {one.name: one.refused for one in discover(root)}
    assert sorted(found) == ["a folder of it", "data", "same"]
    assert [name for name, refused in found.items() if not refused] == ["a folder of it"]
    assert "is the same filesystem as a folder of it, mounted a second time" in found["same"]


def test_other_kinds_are_refused_with_a_reason(root: Path, tmp_path: Path) -> None:
    for name in ("memory", "layers", "lower", "upper", "work", "processes"):
        ((root if name in ("memory", "layers", "processes") else tmp_path) / name).mkdir()
    mount("-t", "tmpfs", "none", root / "memory")
    layers = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    mount("-t", "overlay", "-o", layers, "none", root / "layers")
    mount("-t", "proc", "none", root / "processes")
    found = {one.name: one.refused for one in discover(root)}
    assert "loses its content" in found["memory"]
    assert "made of other folders" in found["layers"]
    assert "proc is not a filesystem that nfsha knows" in found["processes"]
    memory = next(one for one in discover(root) if one.name == "memory")
    with pytest.raises(VolumeError, match="cannot be a volume: tmpfs"):
        write_identity(memory, IDENTITY, pair=True)
    assert list((root / "memory").iterdir()) == []


def test_a_filesystem_that_never_answers_and_can_be_no_volume_is_not_touched(root: Path) -> None:
    """A FUSE without a server: whoever so much as looks at its root waits for ever."""
    libc = ctypes.CDLL(None, use_errno=True)
    (root / "hangs").mkdir()
    with LoopVolume("ext4", at=root / "data"), Path("/dev/fuse").open("r+b", buffering=0) as server:
        options = f"fd={server.fileno()},rootmode=40000,user_id=0,group_id=0".encode()
        target = os.fsencode(root / "hangs")
        assert libc.mount(b"nobody", target, b"fuse", 0, options) == 0
        try:
            began = time.monotonic()
            found = {one.name: one.refused for one in discover(root)}
            assert time.monotonic() - began < 1
        finally:
            subprocess.run(["umount", "-l", root / "hangs"], check=True, timeout=30)
    assert found["data"] == ""
    assert "a program's filesystem" in found["hangs"]


# --- what is broken ------------------------------------------------------------------------------


def test_a_volume_that_an_operator_made_read_only_is_not_failing(
    root: Path, volume: LoopVolume
) -> None:
    volume.remount_ro()
    assert (only(root).read_only, only(root).failing) == (True, "")
    volume.remount_rw()
    assert (only(root).read_only, only(root).failing) == (False, "")


def test_a_volume_that_the_kernel_made_read_only_is_failing(root: Path) -> None:
    with LoopVolume("ext4", at=root / "data", options=["errors=remount-ro"]) as volume:
        assert only(root).failing == ""
        volume.count_an_error()
        assert only(root).read_only
        assert "the kernel made it read-only after an error" in only(root).failing


def test_errors_that_did_not_stop_it_are_told_and_stay_over_a_mount(
    root: Path, ext4: LoopVolume
) -> None:
    ext4.count_an_error()
    ext4.count_an_error()
    assert (only(root).read_only, "counts 2 errors" in only(root).failing) == (False, True)
    ext4.unmount()
    ext4.mount()
    assert "counts 2 errors since its last check" in only(root).failing


def test_a_lost_disk_makes_a_failing_volume_and_no_error(root: Path, volume: LoopVolume) -> None:
    with LoopVolume("ext4", at=root / "sound"):
        volume.shut_down()
        broken, sound = discover(root)
        assert broken.name == "ns1/data"
        assert broken.failing
        assert sound.failing == ""


def test_a_garbled_identity_is_told_and_nothing_is_written_there(
    root: Path, volume: LoopVolume
) -> None:
    (volume.path / IDENTITY_NAME).write_text("garbage")
    (volume.path / STAMP_NAME).write_text("7 0123456789abcdef primary\n")
    found = only(root)
    assert (found.identity, found.stamp, found.failing) == (None, None, "")
    assert str(volume.path / IDENTITY_NAME) in found.refused
    for write in (
        lambda: write_identity(found, IDENTITY, pair=True),
        lambda: write_stamp(replace(found, identity=IDENTITY), EPOCH),
        lambda: open_root(found),
        lambda: open_root(replace(found, refused="")),  # as it was before somebody garbled it
    ):
        with pytest.raises(VolumeError, match="garbage"):
            write()
    assert (volume.path / IDENTITY_NAME).read_text() == "garbage"


# --- identity and stamp --------------------------------------------------------------------------


@pytest.mark.parametrize("volume", ["ext4", "xfs", "btrfs"], indirect=True)
def test_identity_and_stamp_are_there_after_the_next_mount(root: Path, volume: LoopVolume) -> None:
    paired = write_identity(only(root), IDENTITY)
    write_stamp(paired, EPOCH)
    assert paired == replace(only(root), stamp=None, free_bytes=paired.free_bytes,
                             free_inodes=paired.free_inodes)  # fmt: skip
    volume.unmount()
    volume.mount()
    found = only(root)
    assert (found.identity, found.stamp, found.refused) == (IDENTITY, EPOCH, "")
    assert {entry.name for entry in volume.path.iterdir()} - {"lost+found"} == {
        IDENTITY_NAME, STAMP_NAME,
    }  # fmt: skip
    assert (volume.path / IDENTITY_NAME).stat().st_mode & 0o777 == 0o444
    root_fd = open_root(found)
    try:
        assert (read_identity(root_fd), read_stamp(root_fd)) == (IDENTITY, EPOCH)
    finally:
        os.close(root_fd)


def test_a_volume_with_data_gets_an_identity_only_from_an_operator(
    root: Path, volume: LoopVolume
) -> None:
    empty = only(root)
    (volume.path / "file").write_text("data")
    for facts in (only(root), empty):  # the second one was looked at before the file came
        with pytest.raises(VolumeError, match=r"it holds data; .*nfsha volumes pair"):
            write_identity(facts, IDENTITY)
    assert only(root).identity is None
    assert write_identity(only(root), IDENTITY, pair=True).identity == IDENTITY
    assert only(root).identity == IDENTITY


def test_a_root_that_is_no_mount_point_gets_one_only_from_an_operator(root: Path) -> None:
    (empty,) = discover(root, keep_empty_root=True)
    with pytest.raises(VolumeError, match="it is no mount point"):
        write_identity(empty, IDENTITY)
    assert write_identity(empty, IDENTITY, pair=True).identity == IDENTITY
    assert only(root).name == "."


def test_another_identity_is_never_overwritten(root: Path, volume: LoopVolume) -> None:
    write_identity(only(root), IDENTITY)
    assert write_identity(only(root), IDENTITY).identity == IDENTITY
    for pair in (False, True):
        with pytest.raises(VolumeError, match=rf"is the volume {IDENTITY} and does not become"):
            write_identity(only(root), OTHER, pair=pair)
    assert only(root).identity == IDENTITY
    with pytest.raises(VolumeError, match="'nonsense' is no identity"):
        write_identity(only(root), "nonsense", pair=True)


def test_a_stamp_wants_an_identity_and_never_goes_back(root: Path, volume: LoopVolume) -> None:
    with pytest.raises(VolumeError, match="bears no identity"):
        write_stamp(only(root), EPOCH)
    write_identity(only(root), IDENTITY)
    write_stamp(only(root), EPOCH)
    before = volume.path.stat()
    write_stamp(only(root), EPOCH)  # says so already: nothing is written
    assert volume.path.stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(VolumeError, match="newer than 6"):
        write_stamp(only(root), Epoch(6, "f" * 16, Role.STANDBY))
    assert only(root).stamp == EPOCH
    for higher in (Epoch(7, "f" * 16, Role.STANDBY), Epoch(8, "a" * 16, Role.STANDBY)):
        write_stamp(only(root), higher)
        assert only(root).stamp == higher


def test_nothing_is_written_on_a_read_only_or_full_volume_and_nothing_is_left(
    root: Path, volume: LoopVolume
) -> None:
    volume.remount_ro()
    with pytest.raises(VolumeError, match="gets no identity: it is mounted read-only"):
        write_identity(only(root), IDENTITY, pair=True)
    volume.remount_rw()
    paired = write_identity(only(root), IDENTITY)
    write_stamp(paired, EPOCH)
    volume.remount_ro()
    with pytest.raises(VolumeError, match=r"cannot write .*\.nfsha-stamp: Read-only"):
        write_stamp(paired, Epoch(8, "a" * 16, Role.STANDBY))
    volume.remount_rw()
    assert only(root).stamp == EPOCH
    assert not (volume.path / f"{STAMP_NAME}.new").exists()


def test_a_full_disk_keeps_the_old_stamp_whole(root: Path, ext4: LoopVolume) -> None:
    paired = write_identity(only(root), IDENTITY)
    write_stamp(paired, EPOCH)
    filler = ext4.fill()
    with pytest.raises(VolumeError, match="No space left on device"):
        write_stamp(paired, Epoch(8, "a" * 16, Role.STANDBY))
    assert only(root).stamp == EPOCH
    assert not (ext4.path / f"{STAMP_NAME}.new").exists()
    filler.unlink()
    write_stamp(paired, Epoch(8, "a" * 16, Role.STANDBY))
    assert only(root).stamp == Epoch(8, "a" * 16, Role.STANDBY)


# --- a path may lead elsewhere -------------------------------------------------------------------


def test_after_an_unmount_nothing_is_opened_and_nothing_written_below(
    root: Path, volume: LoopVolume
) -> None:
    paired = write_identity(only(root), IDENTITY)
    volume.unmount()
    for write in (
        lambda: open_root(paired),
        lambda: write_stamp(paired, EPOCH),
        lambda: write_identity(paired, IDENTITY, pair=True),
    ):
        with pytest.raises(VolumeError, match=r"nothing is mounted at .*ns1/data any more"):
            write()
    assert list(volume.path.iterdir()) == []
    volume.path.rmdir()
    with pytest.raises(VolumeError, match="cannot open the volume"):
        open_root(paired)


def test_another_volume_at_the_same_place_is_not_opened(root: Path, volume: LoopVolume) -> None:
    paired = write_identity(only(root), IDENTITY)
    unpaired = replace(paired, identity=None)
    with LoopVolume("ext4", at=volume.path) as other:
        for facts in (paired, unpaired):
            with pytest.raises(VolumeError, match="look what is mounted there"):
                open_root(facts)
        there = write_identity(only(root), OTHER)
        # Even on a device of the same number: the identity tells.
        with pytest.raises(VolumeError, match=rf"is the volume {OTHER}, expected {IDENTITY}"):
            open_root(replace(there, identity=IDENTITY))
        with pytest.raises(VolumeError, match=rf"is the volume {OTHER}, expected one without"):
            open_root(replace(there, identity=None))
        other.unmount()
    os.close(open_root(paired))


def test_the_descriptor_stays_on_its_volume_when_the_path_leads_elsewhere(
    root: Path, volume: LoopVolume
) -> None:
    root_fd = open_root(only(root))
    try:
        volume.unmount(lazy=True)
        write_durably_at(root_fd, "late", b"data")
        assert list(volume.path.iterdir()) == []  # the folder below, on the root's filesystem
    finally:
        os.close(root_fd)
    volume.mount()
    assert (volume.path / "late").read_bytes() == b"data"


def test_a_bind_of_a_volume_at_its_own_place_is_opened_as_the_volume(
    root: Path, ext4: LoopVolume
) -> None:
    """As container platforms do; the upper mount leads to the same root."""
    paired = write_identity(only(root), IDENTITY)
    mount("--bind", ext4.path, ext4.path)
    assert only(root).identity == IDENTITY
    os.close(open_root(paired))


def test_many_volumes_are_looked_at_quickly(root: Path) -> None:
    with ExitStack() as stack:
        for number in range(30):
            stack.enter_context(LoopVolume("ext4", at=root / f"v{number}", size_mib=8))
        spent_s = []
        for _ in range(5):
            began = time.process_time()
            assert len(discover(root)) == 30
            spent_s.append(time.process_time() - began)
    assert min(spent_s) / 30 * 500 < 0.5, spent_s

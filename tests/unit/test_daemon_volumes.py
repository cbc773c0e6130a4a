"""What a hook did is seen in the kernel's mounts, not believed; and what is told of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from nfsha import config
from nfsha.core.model import Epoch, Role, VolumesMounted, VolumesUnmounted
from nfsha.daemon.volumes import HookedVolumes
from nfsha.host.hooks import HookError

MOUNTED = "/proc"
NOT_MOUNTED = "/proc/sys/kernel"
EPOCH = Epoch(7, "0123456789abcdef", Role.PRIMARY)
Make = Callable[..., HookedVolumes]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Volumes with hooks of one line each."""

    def volumes(mount: str = "true", unmount: str = "true", mounts: str = MOUNTED) -> HookedVolumes:
        for name, line in (("mount", mount), ("unmount", unmount)):
            (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
            (tmp_path / name).chmod(0o755)
        return HookedVolumes(
            config.parse(
                'role = "primary"\nname = "store-a"\ninterface = "eth0"\nvip = "192.0.2.10"\n'
                'witness = "gateway"\nlinks = [{local = "192.0.2.1", peer = "192.0.2.2"}, '
                '{local = "10.9.9.1", peer = "10.9.9.2"}]\nreplication = "off"\n'
                f'nfs.root = "/"\nnfs.mounts = {[*mounts.split()]}\n[hooks]\n'
                f'mount = "{tmp_path}/mount"\nunmount = "{tmp_path}/unmount"\ntimeout = "7s"\n'
            )
        )

    return volumes


def mount(volumes: HookedVolumes, epoch: Epoch | None = EPOCH) -> VolumesMounted:
    return asyncio.run(volumes.mount(epoch))


def unmount(volumes: HookedVolumes) -> VolumesUnmounted:
    return asyncio.run(volumes.unmount(EPOCH))


def test_what_is_mounted_counts_and_what_is_not_does_not(make: Make) -> None:
    assert mount(make()) == VolumesMounted(ok=True)
    assert unmount(make(mounts=NOT_MOUNTED)) == VolumesUnmounted(ok=True)
    missing = mount(make(mounts=f"{MOUNTED} {NOT_MOUNTED}"))
    assert not missing.ok
    assert f"ended well, but nothing is mounted at {NOT_MOUNTED}: it must end" in missing.detail
    left = unmount(make(mounts=f"{MOUNTED} {NOT_MOUNTED}"))
    assert not left.ok
    assert f"ended well, but something is still mounted at {MOUNTED}: who uses it?" in left.detail


def test_many_mount_points_are_not_all_named(make: Make) -> None:
    many = " ".join(f"/nowhere/{number}" for number in range(9))
    detail = mount(make(mounts=many)).detail
    assert "/nowhere/0, /nowhere/1, /nowhere/2 and 6 more" in detail
    assert "/nowhere/3" not in detail


def test_a_failure_names_hook_status_words_and_remedy(make: Make, tmp_path: Path) -> None:
    end = mount(make(mount="echo 'no such device' >&2; exit 7"))
    assert end.detail == (
        f"mount hook: {tmp_path}/mount: exit status 7: no such device; "
        "mend that, it is run again by itself"
    )
    assert unmount(make(unmount="exit 1")).detail.startswith(f"unmount hook: {tmp_path}/unmount: ")


def test_a_hook_is_told_what_it_is_for(make: Make, tmp_path: Path) -> None:
    volumes = make(mount=f"env | grep ^NFSHA_ | sort >{tmp_path}/told", mounts="/proc /")
    assert mount(volumes).ok
    told = [
        line for line in (tmp_path / "told").read_text().splitlines() if "NFSHA_HOOK_" not in line
    ]
    assert told == [
        "NFSHA_EPOCH=7",
        "NFSHA_HOOK=mount",
        "NFSHA_MOUNTS=/proc",
        "NFSHA_NAME=store-a",
        "NFSHA_ROLE=primary",
        "NFSHA_TIMEOUT=7",
    ]
    assert mount(volumes, None).ok
    assert "NFSHA_EPOCH=\n" in (tmp_path / "told").read_text()


def test_a_start_looks_at_the_files_and_a_stop_waits_for_them(make: Make, tmp_path: Path) -> None:
    volumes = make()
    volumes.start()
    assert volumes.unmount_within_s == 7.0
    (tmp_path / "unmount").unlink()
    with pytest.raises(HookError, match="unmount: No such file"):
        volumes.start()

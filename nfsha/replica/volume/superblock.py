"""The UUID of a filesystem: as udev lists it, or read from the device itself.

It opens block devices for reading only, and reads a few bytes of them.
"""

from __future__ import annotations

import os
import stat
import uuid
from pathlib import Path
from typing import Final, NamedTuple

BY_UUID: Final = Path("/dev/disk/by-uuid")


class _Layout(NamedTuple):
    start: int  # of the bytes to read
    magic_at: int  # from there
    magic: bytes
    uuid_at: int  # from there


_EXT: Final = _Layout(0x400, 0x38, b"\x53\xef", 0x68)  # linux: fs/ext4/ext4.h, ext4_super_block
_LAYOUTS: Final = {
    "ext2": _EXT,
    "ext3": _EXT,
    "ext4": _EXT,
    "xfs": _Layout(0, 0, b"XFSB", 0x20),  # fs/xfs/libxfs/xfs_format.h, xfs_dsb
    "btrfs": _Layout(0x10000, 0x40, b"_BHRfS_M", 0x20),  # uapi/linux/btrfs_tree.h
}


def listed_uuids(folder: Path = BY_UUID) -> dict[int, str]:
    """Returns UUIDs by device number, as udev knows them now; empty without udev.

    Where two devices bear the same UUID udev lists one of them.
    """
    found = {}
    try:
        with os.scandir(folder) as links:
            for link in links:
                number = _block_device(link.path)
                if number is not None:
                    found[number] = link.name
    except OSError:  # no udev
        return {}
    return found


def read_uuid(device: str, fstype: str) -> str | None:
    """Returns the UUID in a device's superblock. It blocks on the device.

    None where it cannot be read, or is of no kind that is known here.
    """
    layout = _LAYOUTS.get(fstype)
    if layout is None or _block_device(device) is None:
        return None
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            data = os.pread(fd, 0x80, layout.start)
        finally:
            os.close(fd)
    except OSError:
        return None
    magic_end = layout.magic_at + len(layout.magic)
    if len(data) < 0x80 or data[layout.magic_at : magic_end] != layout.magic:
        return None
    return str(uuid.UUID(bytes=data[layout.uuid_at : layout.uuid_at + 16]))


def _block_device(path: str) -> int | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - a string from the kernel
    except OSError:
        return None
    return status.st_rdev if stat.S_ISBLK(status.st_mode) else None

"""The btrfs subvolumes inside a mounted one: their files belong to no volume, nobody copies them.

rsync stays on one filesystem, and takes a subvolume for another one. It asks the kernel for their
names and changes nothing. Numbers and layouts are those of include/uapi/linux/btrfs.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import Final

from nfsha.replica.files import beneath
from nfsha.replica.volume.mountinfo import mount_id_of

_ARGS_BYTES: Final = 4096
_GET_SUBVOL_ROOTREF: Final = 0xD000943D  # _IOWR(0x94, 61, 4096 bytes), since Linux 4.18
_INO_LOOKUP_USER: Final = 0xD000943E  # _IOWR(0x94, 62, 4096 bytes), since Linux 4.18
_SUBVOL_GETFLAGS: Final = 0x80089419  # _IOR(0x94, 25, __u64)
_SUBVOL_RDONLY: Final = 1 << 1
# struct btrfs_ioctl_get_subvol_rootref_args: min_treeid, 255 times (treeid, dirid), num_items
_REF: Final = struct.Struct("=QQ")
_REFS_AT, _REFS_MAX = 8, 255
_COUNT_AT: Final = _REFS_AT + _REFS_MAX * _REF.size
# struct btrfs_ioctl_ino_lookup_user_args: dirid, treeid, name, path of the folder that it is in
_NAME_AT, _PATH_AT = 16, 272

_GONE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV})


def writable_inside(root_fd: int) -> Iterator[str]:
    """The paths, relative to an open btrfs root, of subvolumes in which files can change.

    Not those that are read-only (snapshots, mostly), and not what another mount hides. 255 are
    looked at, and none inside of one of them. OSError.
    """
    mount_id = mount_id_of(root_fd)
    for tree, folder in _children(root_fd):
        try:
            path = _path(root_fd, tree, folder)
            if not _hidden_or_read_only(root_fd, path, mount_id):
                yield os.fsdecode(path)
        except OSError as error:  # removed or renamed meanwhile; or another is mounted on the way
            if error.errno not in _GONE:
                raise


def _children(root_fd: int) -> list[tuple[int, int]]:
    answer = bytearray(_ARGS_BYTES)
    try:
        fcntl.ioctl(root_fd, _GET_SUBVOL_ROOTREF, answer)
    except OSError as error:
        if error.errno != errno.EOVERFLOW:  # there are more than fit
            raise
    return [
        (tree, folder)
        for number in range(answer[_COUNT_AT])
        for tree, folder in [_REF.unpack_from(answer, _REFS_AT + number * _REF.size)]
    ]


def _path(root_fd: int, tree: int, folder: int) -> bytes:
    answer = bytearray(_ARGS_BYTES)
    _REF.pack_into(answer, 0, folder, tree)
    fcntl.ioctl(root_fd, _INO_LOOKUP_USER, answer)
    name, path = (bytes(answer[at:]).partition(b"\0")[0] for at in (_NAME_AT, _PATH_AT))
    return path + name


def _hidden_or_read_only(root_fd: int, path: bytes, mount_id: int) -> bool:
    with beneath.parent_of(root_fd, path) as (folder, name):
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
    try:
        if mount_id_of(fd) != mount_id:
            return True
        flags = bytearray(8)
        fcntl.ioctl(fd, _SUBVOL_GETFLAGS, flags)
        return bool(int.from_bytes(flags, "little") & _SUBVOL_RDONLY)
    finally:
        os.close(fd)

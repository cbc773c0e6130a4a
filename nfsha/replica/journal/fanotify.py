"""What the change journal asks of the kernel: fanotify and file handles, by ctypes.

Only system calls and parsing: what an event means, what is kept and what is forgotten is
`changes`'s to decide. Everything raises OSError as the kernel gives it, and
`EventFormatError` for bytes that no kernel known here writes. Constants and layouts are those of
include/uapi/linux/fanotify.h; the calls are in fanotify_init(2), fanotify_mark(2), fanotify(7),
open_by_handle_at(2).
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import struct
import termios
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

FAN_MODIFY = 0x00000002
FAN_ATTRIB = 0x00000004
FAN_MOVED_FROM = 0x00000040
FAN_MOVED_TO = 0x00000080
FAN_CREATE = 0x00000100
FAN_DELETE = 0x00000200
FAN_MOVE_SELF = 0x00000800
FAN_Q_OVERFLOW = 0x00004000
FAN_ONDIR = 0x40000000

CHANGES = FAN_MODIFY | FAN_ATTRIB | FAN_MOVED_FROM | FAN_MOVED_TO | FAN_CREATE | FAN_DELETE
"""All events that mean that a folder, a file or an entry of a folder changed."""

READ_BYTES = 1 << 18
"""How much one read takes: about 3,000 events."""

_FAN_CLOEXEC = 0x00000001
_FAN_NONBLOCK = 0x00000002
_FAN_UNLIMITED_QUEUE = 0x00000010
_FAN_REPORT_FID = 0x00000200
_FAN_REPORT_DIR_FID = 0x00000400
_FAN_REPORT_NAME = 0x00000800
_FAN_REPORT_TARGET_FID = 0x00001000  # Linux 5.17
_FAN_MARK_ADD = 0x00000001
_FAN_MARK_FILESYSTEM = 0x00000100
_FDINFO_BYTES = 4096
_METADATA_VERSION = 3
_INFO_FID = 1
_INFO_DFID_NAME = 2
_INFO_DFID = 3
_AT_EMPTY_PATH = 0x1000
_MAX_HANDLE_BYTES = 128  # MAX_HANDLE_SZ of linux/exportfs.h

# struct fanotify_event_metadata: event_len, vers, reserved, metadata_len, mask, (fd, pid)
_METADATA = struct.Struct("=IBxHQ")
_METADATA_BYTES = 24
# struct fanotify_event_info_fid: type, pad, len, fsid, then a struct file_handle: bytes, type
_INFO = struct.Struct("=BxH8xI4x")
_INFO_HANDLE = 12
_INFO_BYTES = 20
_HANDLE_HEADER = struct.Struct("=Ii")

_CREATING_S = 1.0
_ASK_AGAIN_S = 0.001
_GROUPS_MAX = Path("/proc/sys/fs/fanotify/max_user_groups")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_init.argtypes = [ctypes.c_uint, ctypes.c_uint]
_libc.fanotify_mark.argtypes = [
    ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p
]  # fmt: skip
_libc.open_by_handle_at.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
_libc.name_to_handle_at.argtypes = [
    ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int), ctypes.c_int
]  # fmt: skip


class EventFormatError(ValueError):
    """The kernel's bytes are not the events of fanotify(7) that this module knows."""


@dataclass(frozen=True, slots=True)
class Group:
    """An open fanotify group.

    `tells_targets`: an event about an entry of a folder carries the handle of what the entry names
    too (Linux 5.17 and later).
    """

    fd: int
    tells_targets: bool


class Subject(NamedTuple):
    """What one event is about. Handles are the raw bytes of a struct file_handle.

    folder: the folder, None where the kernel did not know it (a file opened by its handle).
    name: the entry in it; "." when the event is about the folder itself; b"" without a folder.
    target: the file or folder itself, where the event tells it.
    """

    folder: bytes | None
    name: bytes
    target: bytes | None


def open_group(*, unlimited: bool) -> Group:
    """Opens a group whose events carry handles and names; reading it never blocks.

    unlimited: the kernel queues without bound instead of `fs.fanotify.max_queued_events` events.
    OSError: EPERM without CAP_SYS_ADMIN, EINVAL before Linux 5.9, ENOSYS, EMFILE (too many groups:
    `fs.fanotify.max_user_groups`).
    """
    flags = _FAN_CLOEXEC | _FAN_NONBLOCK | _FAN_REPORT_FID | _FAN_REPORT_DIR_FID | _FAN_REPORT_NAME
    if unlimited:
        flags |= _FAN_UNLIMITED_QUEUE
    try:
        return Group(_init(flags | _FAN_REPORT_TARGET_FID), tells_targets=True)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return Group(_init(flags), tells_targets=False)


def groups_max() -> int:
    """How many groups one user may have, 128 by default. OSError without /proc."""
    return int(_GROUPS_MAX.read_text(encoding="ascii"))


def _init(flags: int) -> int:
    return _checked(_libc.fanotify_init(flags, os.O_RDONLY | os.O_CLOEXEC))


def mark_filesystem(group: Group, folder_fd: int) -> None:
    """Asks for the changes on the whole filesystem that the open folder is on.

    OSError: EPERM without CAP_SYS_ADMIN; ENODEV, EOPNOTSUPP, EXDEV where the filesystem has no
    handles or no id of its own (overlayfs, FUSE, a btrfs subvolume).
    """
    mask = CHANGES | FAN_ONDIR
    if not group.tells_targets:
        mask |= FAN_MOVE_SELF  # then it is this one that gives the handle of a moved folder
    flags = _FAN_MARK_ADD | _FAN_MARK_FILESYSTEM
    _checked(_libc.fanotify_mark(group.fd, flags, mask, folder_fd, None))


def is_marked(group: Group) -> bool:
    """Whether the mark is still there: the kernel removes it with the filesystem's last unmount.

    There is no event about that (IN_UNMOUNT is inotify's); /proc/PID/fdinfo is what tells it.
    """
    info = os.open(f"/proc/self/fdinfo/{group.fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:  # not by pathlib: it is asked for each volume each second
        return b"fanotify sdev:" in os.read(info, _FDINFO_BYTES)
    finally:
        os.close(info)


def queued_bytes(group: Group) -> int:
    """How many bytes of events wait now."""
    buffer = array.array("i", [0])
    fcntl.ioctl(group.fd, termios.FIONREAD, buffer)
    return buffer[0]


def read_events(group: Group) -> bytes:
    """Takes what one read gives; b"" when nothing waits."""
    try:
        return os.read(group.fd, READ_BYTES)
    except BlockingIOError:
        return b""


def merge_events(data: bytes, into: dict[bytes, int]) -> int:
    """Adds each event's mask to what `into` has under the event's info records; returns the count.

    That is all that is done with most events: equal ones become one, by their raw bytes. The key of
    an overflow is b"". Raises EventFormatError.
    """
    offset, count, end = 0, 0, len(data)
    unpack = _METADATA.unpack_from
    get = into.get
    try:
        while offset < end:
            length, version, header, mask = unpack(data, offset)
            after = offset + length
            if version != _METADATA_VERSION or header < _METADATA_BYTES or after > end:
                raise EventFormatError(f"an event of version {version} and {length} bytes")
            if length < header:
                raise EventFormatError(f"an event of {length} bytes, less than its header")
            key = data[offset + header : after]
            into[key] = get(key, 0) | mask
            offset = after
            count += 1
    except struct.error as error:
        raise EventFormatError(f"a torn event: {error}") from error
    return count


def parse_subject(records: bytes) -> Subject:
    """Reads the info records of one event (a key of `merge_events`). Raises EventFormatError."""
    folder: bytes | None = None
    target: bytes | None = None
    name = b""
    offset, end = 0, len(records)
    try:
        while offset < end:
            kind, length, handle_bytes = _INFO.unpack_from(records, offset)
            handle_end = offset + _INFO_BYTES + handle_bytes
            after = offset + length
            if not handle_end <= after <= end or handle_bytes > _MAX_HANDLE_BYTES:
                raise EventFormatError(f"an info record of {length} bytes with a longer handle")
            handle = records[offset + _INFO_HANDLE : handle_end]
            if kind == _INFO_DFID_NAME:
                folder = handle
                name = records[handle_end : records.index(b"\0", handle_end, after)]
            elif kind == _INFO_DFID:
                folder, name = handle, b"."
            elif kind == _INFO_FID:
                target = handle
            else:
                raise EventFormatError(f"an info record of the unknown type {kind}")
            offset = after
    except (struct.error, ValueError) as error:
        raise EventFormatError(f"a torn info record: {error}") from error
    return Subject(folder, name, target)


def handle_of(folder_fd: int, name: bytes = b"") -> tuple[bytes, int]:
    """Returns the handle of an entry of an open folder (b"": of itself) and the id of its mount.

    A symbolic link is not followed, a mount point is: compare the ids. OSError: ENOENT, EOPNOTSUPP
    where the filesystem has no handles.
    """
    buffer = ctypes.create_string_buffer(_HANDLE_HEADER.size + _MAX_HANDLE_BYTES)
    _HANDLE_HEADER.pack_into(buffer, 0, _MAX_HANDLE_BYTES, 0)
    mount_id = ctypes.c_int()
    flags = 0 if name else _AT_EMPTY_PATH
    _checked(_libc.name_to_handle_at(folder_fd, name, buffer, ctypes.byref(mount_id), flags))
    size = _HANDLE_HEADER.unpack_from(buffer)[0]
    return buffer.raw[: _HANDLE_HEADER.size + size], mount_id.value


def open_handle(mount_fd: int, handle: bytes, flags: int = os.O_PATH) -> int:
    """Opens what a handle names on the filesystem of `mount_fd` (an open folder, not O_PATH).

    OSError: ESTALE when it is gone, EPERM without CAP_DAC_READ_SEARCH.

    Linux says ENOMEM, too, on ext4, for a file that is gone and whose inode number is just being
    given to a new one (`iget_locked` finds an inode in I_CREATING). That lasts for a moment, so it
    is asked again for `_CREATING_S` at most.
    """
    until = time.monotonic() + _CREATING_S
    while True:
        try:
            return _checked(_libc.open_by_handle_at(mount_fd, handle, flags | os.O_CLOEXEC))
        except OSError as error:
            if error.errno != errno.ENOMEM or time.monotonic() > until:
                raise
        time.sleep(_ASK_AGAIN_S)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result

"""The volumes: what is mounted at and below the NFS root, what each bears, and in what state it is.

A volume says by itself which one it is (its identity, a UUID) and which epoch's data it holds (its
stamp), in two small files in its root. They are read and written through the open root folder,
never by a path: a path may lead elsewhere after an unmount. This module decides nothing: whether to
copy, and in which direction, is not its business, and it changes nothing but these two files.

Everything here blocks, for as long as a filesystem does not answer. `places` touches no filesystem
but the root's; `look` touches the one that it is given. So who must not wait for a hung one calls
`look` in a thread of its own for each, with a time limit, and takes `unanswering` for those that
did not come back (`nfsha.replica.volume.survey` does that).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Final

from nfsha.core.model import Epoch, Role
from nfsha.replica.files.beneath import sync_filesystem
from nfsha.replica.files.durable import read_small_at, write_durably_at
from nfsha.replica.files.own_names import IDENTITY_NAME, LOST_AND_FOUND, OWN_NAMES, STAMP_NAME
from nfsha.replica.volume import subvolumes
from nfsha.replica.volume.facts import (
    MAX_EPOCH,
    ROOT_NAME,
    VolumeError,
    VolumeFacts,
    as_json,
    differences,
    from_json,
    is_identity,
)
from nfsha.replica.volume.mountinfo import (
    MOUNTINFO,
    Mount,
    at_and_below,
    mount_id_of,
    mount_of,
    read_mounts,
    visible,
)
from nfsha.replica.volume.superblock import BY_UUID, listed_uuids, read_uuid

__all__ = [
    "ROOT_NAME",
    "Place",
    "VolumeError",
    "VolumeFacts",
    "as_json",
    "differences",
    "discover",
    "from_json",
    "is_identity",
    "look",
    "only_volumes",
    "open_root",
    "places",
    "read_identity",
    "read_stamp",
    "root_of",
    "unanswering",
    "write_identity",
    "write_stamp",
]

_FILE_LIMIT_BYTES: Final = 512
_EMPTY_FOLDERS_MAX: Final = 10_000  # more of them are data: somebody made them for something
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_STAMP: Final = re.compile(r"([1-9][0-9]{0,18}) ([0-9a-f]{16}) (primary|standby)")
_SYS_DEVICES: Final = Path("/sys/dev/block")
_SYS_EXT4: Final = Path("/sys/fs/ext4")

_VOLUME_KINDS: Final = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "jfs", "bcachefs", "zfs"}
)
_NO_VOLUME: Final = {
    "autofs": "autofs is a place where something is mounted on demand; mount the volume itself",
    "tmpfs": "tmpfs loses its content at a reboot",
    "ramfs": "ramfs loses its content at a reboot",
    "overlay": "overlay is made of other folders and has no stable file handles",
    "nfs": "nfs is another server's filesystem",
    "nfs4": "nfs4 is another server's filesystem",
    "cifs": "cifs is another server's filesystem",
    "smb3": "smb3 is another server's filesystem",
    "ceph": "ceph keeps its own copies",
    "vfat": "vfat keeps no owners and modes",
    "exfat": "exfat keeps no owners and modes",
    "iso9660": "iso9660 cannot be written",
    "squashfs": "squashfs cannot be written",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a filesystem is mounted, by the mount table alone.

    `mounts_inside` are the names, relative to it, of what is mounted in it. `refused` as in
    VolumeFacts. `fs_uuid` is udev's, or None.
    """

    name: str
    path: Path
    mount: Mount
    fs_uuid: str | None
    mounts_inside: tuple[str, ...]
    refused: str

    @property
    def options(self) -> tuple[str, ...]:
        """Those of the mount first, then those of the filesystem, none twice."""
        return tuple(dict.fromkeys((*self.mount.options, *self.mount.super_options)))


# --- discovery -----------------------------------------------------------------------------------


def discover(root: Path, *, keep_empty_root: bool = False) -> tuple[VolumeFacts, ...]:
    """Returns every filesystem mounted below `root`, by path, and first the root's own.

    The root's own is there only if it holds data or bears an identity (or with `keep_empty_root`:
    a new copy of it begins empty). lost+found, our own files, mount points and folders with nothing
    but such in them are no data. Filesystems that can be no volume are there too, `refused`.
    It blocks as long as any of them does not answer. Raises VolumeError without a usable root.
    """
    return only_volumes((look(place) for place in places(root)), keep_empty_root=keep_empty_root)


def only_volumes(
    found: Iterator[VolumeFacts] | Sequence[VolumeFacts], *, keep_empty_root: bool = False
) -> tuple[VolumeFacts, ...]:
    """Returns what `discover` returns, of facts about all places: drops an empty root.

    A filesystem that is mounted below a root that itself counts is refused if it is the root's own,
    bound there.
    """
    everything = tuple(found)
    own = next((facts for facts in everything if facts.name == ROOT_NAME), None)
    if own is None:
        return everything
    others = tuple(facts for facts in everything if facts is not own)
    if own.empty and own.identity is None and not own.failing and not own.refused:
        return (own, *others) if keep_empty_root else others
    return (own, *(_not_the_roots(facts, own) for facts in others))


def places(
    root: Path, *, mountinfo: Path = MOUNTINFO, by_uuid: Path = BY_UUID
) -> tuple[Place, ...]:
    """Returns the place of the root first, then all that is mounted below it, by path.

    Raises VolumeError when there is no such folder or the mount table cannot be read.
    """
    try:
        top = os.path.realpath(root, strict=True)
        if not stat.S_ISDIR(os.stat(top).st_mode):  # noqa: PTH116 - as realpath gives it
            raise NotADirectoryError(errno.ENOTDIR, "it is not a folder")
        own, below = at_and_below(visible(read_mounts(mountinfo)), top)
    except (OSError, ValueError) as error:
        raise VolumeError(
            f"cannot look for volumes below {root}: {_words(error)}; [nfs] root must be a folder "
            f"that is there, and /proc must be mounted"
        ) from error
    if own is None:
        raise VolumeError(f"cannot look for volumes below {root}: no mount leads to it")
    return _places(top, own, below, listed_uuids(by_uuid))


def look(place: Place) -> VolumeFacts:
    """Returns the facts of one place. It blocks as long as that filesystem does not answer.

    Raises nothing: what goes wrong is in `failing` or `refused`.
    """
    if place.refused and place.name != ROOT_NAME:
        return _unseen(place, failing="")  # an autofs would mount something, an nfs might hang
    try:
        return _look_inside(place)
    except OSError as error:
        return _unseen(place, failing=f"cannot be read: {_words(error)}")


def unanswering(place: Place, why: str) -> VolumeFacts:
    """Returns what can be said of a place whose filesystem does not answer: it is failing."""
    return _unseen(place, failing=why)


def _places(
    top: str, own: Mount, below: tuple[Mount, ...], uuids: Mapping[int, str]
) -> tuple[Place, ...]:
    first: dict[tuple[int, str], str] = {}
    names = [os.path.relpath(mount.mount_point, top) for mount in below]
    inside = _mounts_inside(names)
    found = [_place(ROOT_NAME, top, own, uuids, inside.get(ROOT_NAME, ()), "")]
    for name, mount in zip(names, below, strict=True):
        # Subvolumes of one btrfs are volumes of their own; folders of an ext4 or xfs are not.
        key = (mount.device_number, mount.subtree if mount.fstype == "btrfs" else "")
        earlier = first.setdefault(key, name)
        why = "" if earlier == name else _second_mount(mount.mount_point, earlier)
        found.append(_place(name, mount.mount_point, mount, uuids, inside.get(name, ()), why))
    return tuple(found)


def _place(
    name: str,
    path: str,
    mount: Mount,
    uuids: Mapping[int, str],
    inside: tuple[str, ...],
    why: str,
) -> Place:
    return Place(
        name=name,
        path=Path(path),
        mount=mount,
        fs_uuid=uuids.get(mount.device_number),
        mounts_inside=inside,
        refused=_no_volume(mount.fstype) or why,
    )


def _mounts_inside(names: list[str]) -> dict[str, tuple[str, ...]]:
    """For each place, what is mounted in it directly, relative to it."""
    known = set(names)
    found: dict[str, list[str]] = {}
    for name in names:
        above = name.rpartition("/")[0]
        while above and above not in known:
            above = above.rpartition("/")[0]
        relative = name[len(above) + 1 :] if above else name
        found.setdefault(above or ROOT_NAME, []).append(relative)
    return {name: tuple(inside) for name, inside in found.items()}


def _no_volume(fstype: str) -> str:
    if fstype in _VOLUME_KINDS:
        return ""
    if fstype.startswith("fuse"):
        return f"{fstype} is a program's filesystem, without stable file handles"
    reason = _NO_VOLUME.get(fstype)
    return reason or f"{fstype} is not a filesystem that nfsha knows how to copy"


def _second_mount(path: str, earlier: str) -> str:
    return (
        f"{path} is the same filesystem as {earlier}, mounted a second time: only the first is a "
        f"volume; unmount one of the two"
    )


def _not_the_roots(facts: VolumeFacts, own: VolumeFacts) -> VolumeFacts:
    if facts.device_number != own.device_number or facts.refused:
        return facts
    return replace(facts, refused=_second_mount(str(facts.path), str(own.path)))


def _look_inside(place: Place) -> VolumeFacts:
    fd = os.open(place.path, _FOLDER)
    try:
        status = os.fstat(fd)
        if mount_id_of(fd) != place.mount.mount_id:
            return _unseen(place, failing="was unmounted while it was looked at")
        numbers = os.fstatvfs(fd)
        identity, stamp, garbage = _own_files(fd)
        empty = not _holds_data(fd, place)
        within = _subvolumes(fd) if place.mount.fstype == "btrfs" else ""
    finally:
        os.close(fd)
    return replace(
        _unseen(place, failing=_failing(place)),
        device_number=status.st_dev,
        fs_uuid=place.fs_uuid or read_uuid(place.mount.source, place.mount.fstype),
        size_bytes=numbers.f_blocks * numbers.f_frsize,
        free_bytes=numbers.f_bavail * numbers.f_frsize,
        inodes=numbers.f_files,
        free_inodes=numbers.f_favail,
        read_only=_is_read_only(place) or bool(numbers.f_flag & os.ST_RDONLY),
        identity=identity,
        stamp=stamp,
        empty=empty,
        refused=place.refused or garbage or within,
    )


def _unseen(place: Place, *, failing: str) -> VolumeFacts:
    return VolumeFacts(
        name=place.name,
        path=place.path,
        device=place.mount.source,
        device_number=place.mount.device_number,
        fstype=place.mount.fstype,
        fs_uuid=place.fs_uuid,
        size_bytes=0,
        free_bytes=0,
        inodes=0,
        free_inodes=0,
        options=",".join(place.options),
        read_only=_is_read_only(place),
        failing=failing,
        identity=None,
        stamp=None,
        empty=False,
        refused=place.refused,
    )


def _is_read_only(place: Place) -> bool:
    return bool({"ro", "emergency_ro", "shutdown"} & set(place.options))


def _failing(place: Place) -> str:
    """What the kernel itself says of this filesystem's health; "" if nothing bad."""
    mount = place.mount
    if "shutdown" in mount.super_options:  # ext4 since Linux 6.15
        return "the kernel has shut the filesystem down after an error; see its log"
    broken = "the kernel made it read-only after an error; see its log, then unmount and check it"
    if "emergency_ro" in mount.super_options:  # ext4 since Linux 6.15
        return broken
    # An operator's remount sets both; an error sets only that of the filesystem.
    if "ro" in mount.super_options and "rw" in mount.options:
        return broken
    return _ext4_errors(mount)


def _ext4_errors(mount: Mount) -> str:
    if mount.fstype not in ("ext2", "ext3", "ext4"):
        return ""
    number = f"{os.major(mount.device_number)}:{os.minor(mount.device_number)}"
    try:
        name = os.path.basename(os.readlink(_SYS_DEVICES / number))  # noqa: PTH115, PTH119
        count = int((_SYS_EXT4 / name / "errors_count").read_text())
    except (OSError, ValueError):  # no /sys, or another driver serves this filesystem
        return ""
    if count == 0:
        return ""
    return f"ext4 counts {count} errors since its last check; unmount it and run e2fsck"


def _own_files(root_fd: int) -> tuple[str | None, Epoch | None, str]:
    try:
        return read_identity(root_fd), read_stamp(root_fd), ""
    except VolumeError as error:
        return None, None, str(error)


def _subvolumes(root_fd: int) -> str:
    """Why a btrfs cannot be copied whole; "" if it can."""
    found = [repr(name) for name in islice(subvolumes.writable_inside(root_fd), 3)]
    if not found:
        return ""
    return (
        f"it holds subvolumes, which are not copied with it ({', '.join(found)}): mount each "
        f"where it is, so that it is a volume of its own, or make it read-only, or move it out"
    )


def _holds_data(root_fd: int, place: Place) -> bool:
    """Whether anything is in it that somebody put there."""
    mounted = set(place.mounts_inside)
    leads = {above for name in mounted for above in _above(name)}
    folders_count = place.name != ROOT_NAME  # a root's empty folders are places to mount at
    waiting = [""]
    seen = 0
    while waiting:
        for entry, is_folder in _entries(root_fd, waiting.pop()):
            seen += 1
            if entry in mounted or entry in OWN_NAMES or (entry == LOST_AND_FOUND and is_folder):
                continue
            if not is_folder or (folders_count and entry not in leads) or seen > _EMPTY_FOLDERS_MAX:
                return True
            waiting.append(entry)
    return False


def _above(name: str) -> Iterator[str]:
    while name := name.rpartition("/")[0]:
        yield name


def _entries(root_fd: int, name: str) -> Iterator[tuple[str, bool]]:
    fd = os.open(name or ".", _FOLDER, dir_fd=root_fd)
    try:
        with os.scandir(fd) as entries:
            for entry in entries:
                path = f"{name}/{entry.name}" if name else entry.name
                yield path, entry.is_dir(follow_symlinks=False)
    finally:
        os.close(fd)


# --- identity and stamp --------------------------------------------------------------------------


def open_root(facts: VolumeFacts) -> int:
    """Returns a folder descriptor of the volume's root, checked to be the one that `facts` is of.

    The caller closes it. What it reaches by this descriptor is on this volume, even if it is
    unmounted meanwhile. Raises VolumeError if nothing is mounted there any more, or another
    filesystem, or one with another identity, or if it is refused.
    """
    if facts.refused:
        raise VolumeError(f"{facts.path} cannot be a volume: {facts.refused}")
    try:
        fd = os.open(facts.path, _FOLDER)
    except OSError as error:
        raise VolumeError(f"cannot open the volume {facts.path}: {_words(error)}") from error
    try:
        _check_root(fd, facts)
    except OSError as error:
        os.close(fd)
        raise VolumeError(f"cannot read the volume {facts.path}: {_words(error)}") from error
    except VolumeError:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def root_of(facts: VolumeFacts) -> Iterator[int]:
    """`open_root` for the length of a block."""
    fd = open_root(facts)
    try:
        yield fd
    finally:
        os.close(fd)


def read_identity(root_fd: int) -> str | None:
    """Returns the UUID in a volume's root; None if there is none.

    Raises VolumeError for a file that is not as nfsha writes it, OSError if it cannot be read.
    """
    line = _first_line(root_fd, IDENTITY_NAME)
    if line is None:
        return None
    if not is_identity(line):
        raise VolumeError(
            f"{_shown(root_fd, IDENTITY_NAME)} holds {line!r}, expected a UUID in lower case; "
            f"restore the file, or remove it and pair the volume again (nfsha volumes pair)"
        )
    return line


def read_stamp(root_fd: int) -> Epoch | None:
    """Returns the epoch whose data a volume holds; None if it bears no stamp.

    Raises as `read_identity` does.
    """
    line = _first_line(root_fd, STAMP_NAME)
    if line is None:
        return None
    found = _STAMP.fullmatch(line)
    if found is None or int(found[1]) > MAX_EPOCH:
        raise VolumeError(
            f"{_shown(root_fd, STAMP_NAME)} holds {line!r}, expected an epoch such as "
            f"'7 0123456789abcdef primary'; without a sound stamp nobody knows whose data this is: "
            f"remove the file if the other node's data is the newer, and it will be copied anew"
        )
    return Epoch(number=int(found[1]), id=found[2], authority=Role(found[3]))


def write_identity(facts: VolumeFacts, uuid: str, *, pair: bool = False) -> VolumeFacts:
    """Gives the volume its identity, durably, and returns the facts with it.

    Only an empty mounted filesystem gets one, unless an operator wants it (`pair`). Another
    identity is never overwritten. Raises VolumeError with the reason, or when the disk refuses.
    """
    if not is_identity(uuid):
        raise VolumeError(f"{uuid!r} is no identity for {facts.path}, expected a UUID")
    with root_of(facts) as root_fd:
        found = read_identity(root_fd)
        if found is not None and found != uuid:
            raise VolumeError(
                f"{facts.path} is the volume {found} and does not become {uuid}; if it shall, "
                f"remove {facts.path / IDENTITY_NAME} first"
            )
        if found is None:
            _may_be_adopted(root_fd, facts, pair=pair)
            text = (
                f"{uuid}\n# The identity of this volume for nfsha. Never edit, copy or remove it.\n"
            )
            _write_own(root_fd, facts, IDENTITY_NAME, text)
    return replace(facts, identity=uuid)


def sync(facts: VolumeFacts) -> None:
    """Makes all that was written to the volume durable. It blocks. VolumeError, OSError."""
    with root_of(facts) as root_fd:
        sync_filesystem(root_fd)


def write_stamp(facts: VolumeFacts, epoch: Epoch) -> None:
    """Records durably that the volume holds this epoch's data; nothing is written if it says so.

    Raises VolumeError without an identity, when the stamp there is of a higher epoch, or when the
    disk refuses.
    """
    if facts.identity is None:
        raise VolumeError(f"{facts.path} bears no identity, so it gets no stamp; pair it first")
    with root_of(facts) as root_fd:
        found = read_stamp(root_fd)
        if found is not None and found.number > epoch.number:
            raise VolumeError(
                f"{facts.path} holds the data of epoch {found}, newer than {epoch}: it does not "
                f"get the older stamp"
            )
        if found != epoch:
            text = f"{epoch.number} {epoch.id} {epoch.authority}\n"
            _write_own(root_fd, facts, STAMP_NAME, text)


def written_at_ns(facts: VolumeFacts) -> tuple[int, int]:
    """The ctimes of a volume's identity and of its stamp: two filesystems never share both.

    Nothing can set them. The stamp's alone does not do: after a handover both nodes may write one
    within the same tick of their clocks. Nor does one number made of both: what the one was
    written earlier the other may be later by. Raises VolumeError, OSError.
    """
    with root_of(facts) as root_fd:
        identity, stamp = (
            os.stat(name, dir_fd=root_fd, follow_symlinks=False).st_ctime_ns
            for name in (IDENTITY_NAME, STAMP_NAME)
        )
    return identity, stamp


def _check_root(fd: int, facts: VolumeFacts) -> None:
    mount = mount_of(fd)
    if mount is None or (facts.name != ROOT_NAME and mount.mount_point != str(facts.path)):
        raise VolumeError(f"nothing is mounted at {facts.path} any more; mount the volume")
    number = os.fstat(fd).st_dev
    if number != facts.device_number:
        raise VolumeError(
            f"{facts.path} is on the device {_numbers(number)} now, it was on "
            f"{_numbers(facts.device_number)} ({facts.device}): look what is mounted there"
        )
    identity = read_identity(fd)
    if identity != facts.identity:
        raise VolumeError(
            f"{facts.path} is the volume {identity or 'without an identity'}, expected "
            f"{facts.identity or 'one without an identity'}; look which volume is mounted there"
        )


def _may_be_adopted(root_fd: int, facts: VolumeFacts, *, pair: bool) -> None:
    if facts.read_only or facts.failing:
        why = facts.failing or "it is mounted read-only"
        raise VolumeError(f"{facts.path} gets no identity: {why}")
    if pair:
        return
    remedy = "an operator may pair it all the same: nfsha volumes pair"
    mount = mount_of(root_fd)
    if mount is None or mount.mount_point != str(facts.path):
        raise VolumeError(f"{facts.path} gets no identity: it is no mount point; {remedy}")
    inside = tuple(
        os.path.relpath(one.mount_point, facts.path)
        for one in at_and_below(visible(read_mounts()), str(facts.path))[1]
    )
    if _holds_data(root_fd, Place(facts.name, facts.path, mount, None, inside, "")):
        raise VolumeError(f"{facts.path} gets no identity: it holds data; {remedy}")


def _write_own(root_fd: int, facts: VolumeFacts, name: str, text: str) -> None:
    try:
        write_durably_at(root_fd, name, text.encode("ascii"), mode=0o444)
    except OSError as error:
        raise VolumeError(f"cannot write {facts.path / name}: {_words(error)}") from error


def _first_line(root_fd: int, name: str) -> str | None:
    """The first line; after it only lines that begin with `#`."""
    try:
        data = read_small_at(root_fd, name, _FILE_LIMIT_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ELOOP, errno.EFBIG, errno.ENXIO):
            raise VolumeError(
                f"{_shown(root_fd, name)} is not a file that nfsha wrote: {_words(error)}; look "
                f"who put it there, and remove it"
            ) from error
        raise
    first, *rest = data.decode("ascii", "backslashreplace").split("\n")
    if not rest or rest[-1] or not all(line.startswith("#") for line in rest[:-1]):
        return f"{first} (and more, or without a line's end)"
    return first


def _shown(root_fd: int, name: str) -> str:
    """The path of a file in an open folder, for an operator."""
    return f"{os.readlink(f'/proc/self/fd/{root_fd}')}/{name}"  # noqa: PTH115


def _numbers(device_number: int) -> str:
    return f"{os.major(device_number)}:{os.minor(device_number)}"


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)

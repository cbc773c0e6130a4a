"""An independent comparison of two trees, and a tree with everything odd in it to compare.

It reads both sides by itself: no rsync, no nfsha. Not compared: access and change times, sizes of
folders, the modification time of the two roots (nfsha writes its own files there), and what
`ignore` names in the roots.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import stat
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

OWN_NAMES = frozenset(
    {
        b".nfsha-volume",
        b".nfsha-stamp",
        b".nfsha-quarantine",
        b".nfsha-partial",
        b".nfsha-incoming",
        b"lost+found",
    }
)
"""What a volume's root holds that is not data: by default left out, in the roots only."""

_CHUNK_BYTES = 1 << 20
_HOLES_LOST_BYTES = 128 << 10  # filesystems may round an extent up; a lost hole is far more

# xfs lists each ACL twice; the other name is system.posix_acl_*, and that one is compared. (Note:
# `rsync -AX` from ext4 to xfs sees these as surplus and removes them, and with them the folder's
# default ACL; --filter='-x trusted.SGI_ACL_*' --filter='-x system.*' prevents that.)
_XFS_ACLS = frozenset({"trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT"})

_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "folder",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


def differences(
    left: Path,
    right: Path,
    *,
    ignore: Collection[bytes] = OWN_NAMES,
    content: bool = True,
    limit: int = 100,
) -> list[str]:
    """Says in what `right` is not equal to `left`, one line for each; empty when it is.

    Names are shown as Python bytes. After `limit` lines one more says that it stopped. With
    `content` False files are not read (everything else is compared).
    """
    comparison = _Comparison(os.fsencode(left), os.fsencode(right), frozenset(ignore), content)
    found = list(islice(comparison.run(), limit + 1))
    return found if len(found) <= limit else [*found[:limit], f"stopped after {limit} differences"]


@dataclass
class _Comparison:
    left: bytes
    right: bytes
    ignore: frozenset[bytes]
    content: bool
    left_links: dict[tuple[int, int], set[bytes]] = field(default_factory=dict)
    right_links: dict[tuple[int, int], set[bytes]] = field(default_factory=dict)

    def run(self) -> Iterator[str]:
        yield from self._entry(b"", os.stat(self.left), os.stat(self.right))  # noqa: PTH116
        waiting = [b""]
        while waiting:
            yield from self._folder(waiting.pop(), waiting)
        yield from self._hard_links()

    def _folder(self, name: bytes, waiting: list[bytes]) -> Iterator[str]:
        left, right = self._list(self.left, name), self._list(self.right, name)
        for entry in sorted(left.keys() | right.keys()):
            path = name + b"/" + entry if name else entry
            if entry not in right:
                yield f"{path!r}: missing on the right ({_kind(left[entry])})"
            elif entry not in left:
                yield f"{path!r}: only on the right ({_kind(right[entry])})"
            else:
                yield from self._entry(path, left[entry], right[entry])
                if stat.S_ISDIR(left[entry].st_mode) and stat.S_ISDIR(right[entry].st_mode):
                    waiting.append(path)

    def _list(self, root: bytes, name: bytes) -> dict[bytes, os.stat_result]:
        skip = frozenset() if name else self.ignore
        with os.scandir(_at(root, name)) as entries:
            return {
                entry.name: entry.stat(follow_symlinks=False)
                for entry in entries
                if entry.name not in skip
            }

    def _entry(self, name: bytes, left: os.stat_result, right: os.stat_result) -> Iterator[str]:
        if _kind(left) != _kind(right):
            yield f"{name!r}: type {_kind(left)}, on the right {_kind(right)}"
            return
        yield from _numbers(name, left, right)
        yield from self._xattrs(name)
        if stat.S_ISREG(left.st_mode):
            yield from self._file(name, left, right)
        elif stat.S_ISLNK(left.st_mode):
            here, there = (os.readlink(_at(root, name)) for root in (self.left, self.right))  # noqa: PTH115
            if here != there:
                yield f"{name!r}: target {here!r}, on the right {there!r}"
        if not stat.S_ISDIR(left.st_mode):
            self._note_links(name, left, right)

    def _file(self, name: bytes, left: os.stat_result, right: os.stat_result) -> Iterator[str]:
        if left.st_size != right.st_size:
            yield f"{name!r}: size {left.st_size}, on the right {right.st_size}"
        elif self.content and (at := self._first_difference(name)) is not None:
            yield f"{name!r}: other content from byte {at} on"
        if left.st_blocks * 512 < left.st_size:  # the left one has holes
            here, there = (_data_bytes(_at(root, name)) for root in (self.left, self.right))
            if there > here + _HOLES_LOST_BYTES:
                yield f"{name!r}: {here} bytes in extents, on the right {there}: holes were lost"

    def _first_difference(self, name: bytes) -> int | None:
        with open(_at(self.left, name), "rb") as left, open(_at(self.right, name), "rb") as right:  # noqa: PTH123
            offset = 0
            while True:
                here, there = left.read(_CHUNK_BYTES), right.read(_CHUNK_BYTES)
                if here != there:
                    pairs = enumerate(zip(here, there, strict=False))
                    shorter = min(len(here), len(there))
                    return offset + next((at for at, (a, b) in pairs if a != b), shorter)
                if not here:
                    return None
                offset += len(here)

    def _xattrs(self, name: bytes) -> Iterator[str]:
        left, right = _xattrs(_at(self.left, name)), _xattrs(_at(self.right, name))
        for key in sorted(left.keys() | right.keys()):
            if left.get(key) != right.get(key):
                yield f"{name!r}: xattr {key} {left.get(key)!r}, on the right {right.get(key)!r}"

    def _note_links(self, name: bytes, left: os.stat_result, right: os.stat_result) -> None:
        if left.st_nlink > 1 or right.st_nlink > 1:
            self.left_links.setdefault((left.st_dev, left.st_ino), set()).add(name)
            self.right_links.setdefault((right.st_dev, right.st_ino), set()).add(name)

    def _hard_links(self) -> Iterator[str]:
        left, right = _groups(self.left_links), _groups(self.right_links)
        for names in sorted(left - right):
            yield f"{list(names)}: one file, on the right they are not, or with others"
        for names in sorted(right - left):
            yield f"{list(names)}: one file on the right, on the left they are not, or with others"


def _numbers(name: bytes, left: os.stat_result, right: os.stat_result) -> Iterator[str]:
    here, there = stat.S_IMODE(left.st_mode), stat.S_IMODE(right.st_mode)
    if here != there and not stat.S_ISLNK(left.st_mode):
        yield f"{name!r}: mode {here:04o}, on the right {there:04o}"
    if left.st_uid != right.st_uid:
        yield f"{name!r}: uid {left.st_uid}, on the right {right.st_uid}"
    if left.st_gid != right.st_gid:
        yield f"{name!r}: gid {left.st_gid}, on the right {right.st_gid}"
    if left.st_mtime_ns != right.st_mtime_ns and name:
        yield f"{name!r}: mtime {left.st_mtime_ns} ns, on the right {right.st_mtime_ns}"
    if stat.S_IFMT(left.st_mode) in (stat.S_IFCHR, stat.S_IFBLK) and left.st_rdev != right.st_rdev:
        yield f"{name!r}: device {_device(left)}, on the right {_device(right)}"


def _at(root: bytes, name: bytes) -> bytes:
    return root + b"/" + name if name else root


def _kind(status: os.stat_result) -> str:
    return _KINDS[stat.S_IFMT(status.st_mode)]


def _device(status: os.stat_result) -> str:
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


def _xattrs(path: bytes) -> dict[str, bytes]:
    names = set(os.listxattr(path, follow_symlinks=False)) - _XFS_ACLS
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in names}


def _data_bytes(path: bytes) -> int:
    """How much of a file is in extents with data, by lseek(2)."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        total = position = 0
        while True:
            try:
                begin = os.lseek(fd, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no data from here to the end
                    return total
                raise
            position = os.lseek(fd, begin, os.SEEK_HOLE)
            total += position - begin
    finally:
        os.close(fd)


def _groups(links: dict[tuple[int, int], set[bytes]]) -> set[tuple[bytes, ...]]:
    return {tuple(sorted(names)) for names in links.values() if len(names) > 1}


# --- a tree with everything odd ------------------------------------------------------------------

ODD_NAMES = (
    b"new\nline",
    b"\nstarts with one",
    b"not \xff\xfe utf-8 \x80",
    b"n" * 255,
    "ä".encode() * 127,  # 254 bytes, and a multi-byte character at the end
    b"-rf",
    b"--delete",
    b" blank around ",
    b"tab\there",
    b"stars * and ? and [a-z]",
    b"**",
    b"back\\slash",
    b"\\#061",  # rsync's own way to write an odd name
    b"#comment",
    b";semicolon",
    b"'quote'",
    b'"double"',
    b"+ include me",
    b"- exclude me",
    b"! clear the rules",
    b"colon:name",
    b"host::module",
    b"...",
    b"~",
    b".hidden",
    b"bell\x07escape\x1b[31m",
    b"\x7f",
    b"cr\r",
    "é composed".encode(),
    "e\u0301 decomposed".encode(),
    b"Case",
    b"case",
    b"ends with a dot.",
    b"file.rsync~",
    b".file.aB3dEf",  # as rsync names its temporary files
)

_NOT_OURS = (b".nfsha-volume", b".nfsha-stamp", b"lost+found")
"""Below the root these names are a client's like any other."""


def make_odd_tree(path: Path, *, many: int = 1500, seed: int = 1) -> None:
    """Fills `path` (made if missing) with about `many` + 150 entries of every odd kind; as root.

    The same seed makes the same names and contents. `many` is the size of the huge folder.
    """
    path.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    _odd_names(path / "names", chance)
    _odd_kinds(path / "kinds", chance)
    _odd_modes(path / "modes")
    _odd_times(path / "times")
    _hard_links(path / "links", path / "links elsewhere")
    _odd_attributes(path / "attributes")
    _sparse_files(path / "sparse")
    _folders(path / "folders", many)
    _times_of_folders(path)


def _odd_names(folder: Path, chance: random.Random) -> None:
    folder.mkdir()
    for name in (*ODD_NAMES, *_NOT_OURS):
        (folder / os.fsdecode(name)).write_bytes(chance.randbytes(chance.randrange(200)))
    for name in ODD_NAMES:
        below = folder / "as folders" / os.fsdecode(name)
        below.mkdir(parents=True)
        (below / "inside").write_bytes(name)


def _odd_kinds(folder: Path, chance: random.Random) -> None:
    folder.mkdir()
    (folder / "empty").touch()
    (folder / "one byte").write_bytes(b"\0")
    (folder / "large").write_bytes(chance.randbytes((3 << 20) + 17))
    targets = {
        "dangling": "no/such/file",
        "absolute": "/etc/hostname",
        "to a folder": "../names",
        "to itself": "to itself",
        "long": "x" * 255 + ("/" + "y" * 250) * 3,  # 1008 bytes: xfs takes at most 1023
        "odd": os.fsdecode(b"not \xff utf-8\nand a line"),
        "upwards": "../../../../../../../../tmp",
    }
    for name, target in targets.items():
        (folder / f"symlink {name}").symlink_to(target)
        os.lchown(folder / f"symlink {name}", 1234, 5678)
    os.mkfifo(folder / "fifo", 0o640)
    with socket.socket(socket.AF_UNIX) as listener:
        home = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        listener.bind(f"/proc/self/fd/{home}/socket")  # a path of a socket has at most 107 bytes
        os.close(home)
    os.mknod(folder / "character device", stat.S_IFCHR | 0o600, os.makedev(1, 7))
    os.mknod(folder / "block device", stat.S_IFBLK | 0o660, os.makedev(259, 200_000))


def _odd_modes(folder: Path) -> None:
    folder.mkdir()
    for mode in (0o0, 0o400, 0o777, 0o4755, 0o2755, 0o6711, 0o1644, 0o4000, 0o7777):
        file = folder / f"file {mode:04o}"
        file.write_text(f"{mode:o}")
        os.chown(file, 70_000 + mode, 0 if mode % 2 else 4_000_000_000)
        file.chmod(mode)  # after chown, which takes setuid away
        below = folder / f"folder {mode:04o}"
        below.mkdir()
        (below / "inside").touch()
        os.chown(below, 65_534, 4_294_967_294)
        below.chmod(mode)


def _odd_times(folder: Path) -> None:
    folder.mkdir()
    second = 1_000_000_000
    for when in (0, 1, -1, -86_400 * second, 999_999_999, 1_700_000_000 * second + 123_456_789,
                 2_147_483_647 * second, 4_102_444_800 * second + 1):  # fmt: skip
        (folder / f"at {when}").write_text(str(when))
        os.utime(folder / f"at {when}", ns=(when, when))
    (folder / "symlink").symlink_to("anywhere")
    os.utime(folder / "symlink", ns=(7, 1_234_567_891), follow_symlinks=False)


def _hard_links(folder: Path, elsewhere: Path) -> None:
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "first").write_text("one file, four names")
    for name in (folder / "second", elsewhere / "third", elsewhere / "new\nline"):
        name.hardlink_to(folder / "first")
    for number in range(3):  # equal in all but the inode: no group
        (folder / f"alone {number}").write_text("equal, but not the same")
    (folder / "symlink").symlink_to("first")
    os.link(folder / "symlink", elsewhere / "symlink", follow_symlinks=False)
    os.mkfifo(folder / "fifo")
    os.link(folder / "fifo", elsewhere / "fifo")


def _odd_attributes(folder: Path) -> None:
    folder.mkdir()
    file = folder / "file"
    file.write_text("with attributes")
    os.setxattr(file, "user.empty", b"")
    os.setxattr(file, "user.binary", bytes(range(256)))
    os.setxattr(file, "user.large", b"x" * 1500)
    os.setxattr(file, os.fsencode(os.fsdecode(b"user.n\xc3\xa4me \n")), b"odd name")
    os.setxattr(file, "trusted.nfsha-test", b"only root sees it")
    os.setxattr(file, "system.posix_acl_access", acl(rwx=7, user=(4711, 5), mask=5, other=0))
    capable = folder / "capable"
    capable.write_text("has a file capability")
    # linux/capability.h: VFS_CAP_REVISION_2 with the effective bit; CAP_NET_BIND_SERVICE is bit 10
    os.setxattr(capable, "security.capability", struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0))
    below = folder / "folder"
    below.mkdir()
    os.setxattr(below, "user.on-a-folder", b"1")
    os.setxattr(below, "system.posix_acl_default", acl(rwx=7, user=(4712, 7), mask=7, other=5))
    (below / "inherits").write_text("has the ACL of its folder")
    (folder / "symlink").symlink_to("file")
    os.setxattr(folder / "symlink", "trusted.on-a-symlink", b"1", follow_symlinks=False)


def acl(*, rwx: int, user: tuple[int, int], mask: int, other: int) -> bytes:
    """A POSIX ACL as its xattr holds it (linux/posix_acl_xattr.h): owner, one user, group, rest."""
    nobody = 0xFFFFFFFF
    entries = ((0x01, rwx, nobody), (0x02, user[1], user[0]), (0x04, mask, nobody),
               (0x10, mask, nobody), (0x20, other, nobody))  # fmt: skip
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def _sparse_files(folder: Path) -> None:
    folder.mkdir()
    with (folder / "only a hole").open("wb") as file:
        file.truncate(16 << 20)
    with (folder / "data between holes").open("wb") as file:
        for offset in (5 << 20, 11 << 20):
            file.seek(offset)
            file.write(b"data" * 5000)
        file.truncate(20 << 20)
    with (folder / "hole at the start").open("wb") as file:
        file.seek(8 << 20)
        file.write(b"end")


def _folders(folder: Path, many: int) -> None:
    (folder / "empty").mkdir(parents=True)
    (folder / "nothing but empty folders" / "a" / "b" / "c").mkdir(parents=True)
    deep = folder.joinpath(*(f"{level:02} {'d' * 40}" for level in range(40)))
    deep.mkdir(parents=True)
    (deep / "at the bottom").write_text("deep")
    (folder / "huge").mkdir()
    for number in range(many):
        (folder / "huge" / f"{number:06} of many").write_bytes(
            b"%d" % number if number % 3 else b""
        )


def _times_of_folders(path: Path) -> None:
    """Folders too have times that a copy made now would not have; inner ones first."""
    for number, (folder, _, _) in enumerate(os.walk(path, topdown=False)):
        os.utime(folder, ns=(0, 1_600_000_000_000_000_000 + number * 1_000_000_007))

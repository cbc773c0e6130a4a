"""The comparer must be able to fail: one test per kind of difference, and none where none is."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.netns.treewalk import OWN_NAMES, acl, differences, make_odd_tree
from tests.netns.volumekit import LoopVolume

Trees = tuple[Path, Path]


@pytest.fixture(scope="module")
def disk() -> Iterator[LoopVolume]:
    with LoopVolume("ext4", size_mib=256) as volume:
        yield volume


@pytest.fixture
def trees(disk: LoopVolume) -> Iterator[Trees]:
    """Two equal small trees, made by hand and not by a copying program."""
    pair = disk.path / "left", disk.path / "right"
    for root in pair:
        (root / "folder").mkdir(parents=True)
        (root / "file").write_bytes(b"content")
        (root / "folder" / "one").write_bytes(b"linked")
        (root / "folder" / "two").hardlink_to(root / "folder" / "one")
        (root / "three").write_bytes(b"linked")
        (root / "symlink").symlink_to("file")
        os.mknod(root / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        with (root / "sparse").open("wb") as file:
            file.truncate(1 << 20)
        os.setxattr(root / "file", "user.name", b"value")
        for folder, folders, files in os.walk(root, topdown=False):
            for name in (*folders, *files, ""):
                os.utime(Path(folder, name), ns=(0, 1_111_111_111), follow_symlinks=False)
    yield pair
    for root in pair:
        shutil.rmtree(root)


def _touch(path: Path) -> None:
    os.utime(path, ns=(0, 1_111_111_111), follow_symlinks=False)


def _replace(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)
    _touch(path)
    _touch(path.parent)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _touch(path)


def _fill_the_hole(path: Path) -> None:
    path.write_bytes(bytes(1 << 20))
    _touch(path)


def _another_link(root: Path) -> None:
    (root / "three").unlink()
    (root / "three").hardlink_to(root / "folder" / "one")
    _touch(root)


def _no_link(root: Path) -> None:
    _replace(root / "folder" / "two", lambda path: _write(path, b"linked"))


def _only_on_the_right(root: Path) -> None:
    (root / "folder" / "new").touch()
    _touch(root / "folder")


def _missing(root: Path) -> None:
    (root / "folder" / "two").unlink()
    _touch(root / "folder")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "mode": (lambda r: (r / "file").chmod(0o4644), "b'file': mode 0644, on the right 4644"),
    "mode of the root": (lambda r: r.chmod(0o700), "b'': mode 0755, on the right 0700"),
    "uid": (lambda r: os.lchown(r / "symlink", 5, -1), "b'symlink': uid 0, on the right 5"),
    "gid": (lambda r: os.chown(r / "folder", -1, 6), "b'folder': gid 0, on the right 6"),
    "size": (
        lambda r: _write(r / "file", b"content, more"),
        "b'file': size 7, on the right 13",
    ),
    "content of equal size and time": (
        lambda r: _write(r / "file", b"contenT"),
        "b'file': other content from byte 6 on",
    ),
    "a nanosecond": (
        lambda r: os.utime(r / "file", ns=(0, 1_111_111_112)),
        "b'file': mtime 1111111111 ns, on the right 1111111112",
    ),
    "mtime of a symlink": (
        lambda r: os.utime(r / "symlink", ns=(0, 3), follow_symlinks=False),
        "b'symlink': mtime 1111111111 ns, on the right 3",
    ),
    "mtime of a folder": (
        lambda r: os.utime(r / "folder", ns=(0, 3)),
        "b'folder': mtime 1111111111 ns, on the right 3",
    ),
    "symlink target": (
        lambda r: _replace(r / "symlink", lambda p: p.symlink_to("fil3")),
        "b'symlink': target b'file', on the right b'fil3'",
    ),
    "type": (
        lambda r: _replace(r / "symlink", lambda p: _write(p, b"file")),
        "b'symlink': type symlink, on the right file",
    ),
    "device number": (
        lambda r: _replace(
            r / "device", lambda p: os.mknod(p, stat.S_IFCHR | 0o600, os.makedev(1, 5))
        ),
        "b'device': device 1:3, on the right 1:5",
    ),
    "xattr value": (
        lambda r: os.setxattr(r / "file", "user.name", b"other"),
        "b'file': xattr user.name b'value', on the right b'other'",
    ),
    "xattr gone": (
        lambda r: os.removexattr(r / "file", "user.name"),
        "b'file': xattr user.name b'value', on the right None",
    ),
    "xattr of a symlink": (
        lambda r: os.setxattr(r / "symlink", "trusted.new", b"", follow_symlinks=False),
        "b'symlink': xattr trusted.new None, on the right b''",
    ),
    "a default ACL": (
        lambda r: os.setxattr(
            r / "folder", "system.posix_acl_default", acl(rwx=7, user=(1, 7), mask=7, other=0)
        ),
        "b'folder': xattr system.posix_acl_default None, on the right b'\\x02",
    ),
    "an ACL": (
        lambda r: os.setxattr(
            r / "file", "system.posix_acl_access", acl(rwx=6, user=(1, 4), mask=4, other=4)
        ),
        "b'file': xattr system.posix_acl_access None, on the right b'\\x02",
    ),
    "a hard link too many": (_another_link, "b'three']: one file on the right, on the left they"),
    "a hard link broken": (_no_link, "[b'folder/one', b'folder/two']: one file, on the right they"),
    "a name too many": (_only_on_the_right, "b'folder/new': only on the right (file)"),
    "a name missing": (_missing, "b'folder/two': missing on the right (file)"),
    "a folder missing": (
        lambda r: shutil.rmtree(r / "folder"),
        "b'folder': missing on the right (folder)",
    ),
    "a hole lost": (
        lambda r: _fill_the_hole(r / "sparse"),
        "b'sparse': 0 bytes in extents, on the right 1048576: holes were lost",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_each_kind_of_difference_is_found(trees: Trees, kind: str) -> None:
    left, right = trees
    assert differences(left, right) == []
    change, expected = CHANGES[kind]
    change(right)
    assert any(expected in line for line in differences(left, right)), differences(left, right)


def test_a_name_of_other_bytes_is_another_name(trees: Trees) -> None:
    left, right = trees
    for root, name in ((left, b"name \xff"), (right, b"name \xfe")):
        (root / os.fsdecode(name)).touch()
        _touch(root / os.fsdecode(name))
    found = differences(left, right)
    assert "b'name \\xff': missing on the right (file)" in found
    assert "b'name \\xfe': only on the right (file)" in found


def test_a_difference_far_inside_a_large_file_is_found(trees: Trees) -> None:
    for root, last in zip(trees, (b"a", b"b"), strict=True):
        _write(root / "file", bytes((3 << 20) - 1) + last)
    assert differences(*trees) == [f"b'file': other content from byte {(3 << 20) - 1} on"]


def test_only_the_contents_may_be_left_out(trees: Trees) -> None:
    _write(trees[1] / "file", b"contenT")
    assert differences(*trees, content=False) == []
    (trees[1] / "file").chmod(0o600)
    assert len(differences(*trees, content=False)) == 1


def test_our_own_names_count_in_the_root_only_when_asked(trees: Trees) -> None:
    left, right = trees
    for name in OWN_NAMES:
        (right / os.fsdecode(name)).touch()
        (right / "folder" / os.fsdecode(name)).touch()
    _touch(right / "folder")
    found = differences(left, right)
    assert [line for line in found if "folder/" not in line] == []
    assert len(found) == len(OWN_NAMES)
    assert len(differences(left, right, ignore=())) == 2 * len(OWN_NAMES)


def test_the_list_has_an_end(trees: Trees) -> None:
    for number in range(20):
        (trees[1] / f"new {number:02}").touch()
    found = differences(*trees, limit=7)
    assert len(found) == 8
    assert found[-1] == "stopped after 7 differences"


@pytest.mark.parametrize(("source", "target"), [("ext4", "xfs"), ("xfs", "ext4")])
def test_a_faithful_copy_of_the_odd_tree_is_equal_and_a_plain_one_is_not(
    source: str, target: str
) -> None:
    """Copied by cp, which nfsha does not use."""
    with LoopVolume(source, size_mib=320) as left, LoopVolume(target, size_mib=320) as right:
        tree, faithful, plain = left.path / "tree", right.path / "faithful", right.path / "plain"
        make_odd_tree(tree, many=50)
        subprocess.run(["cp", "-a", tree, faithful], check=True)
        assert differences(tree, faithful) == []
        assert sum(len(files) for _, _, files in os.walk(tree)) > 180

        subprocess.run(["cp", "-r", "--sparse=never", tree, plain], check=True)
        found = "\n".join(differences(tree, plain, limit=10_000))
        for word in ("mode", "uid", "gid", "mtime", "xattr", "one file", "holes were lost"):
            assert word in found

"""The trees of the bench of replication, and how a client changes them through NFS."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

from tests.netns.lab import Lab
from tests.netns.labkit.network import VIP
from tests.netns.labkit.nfs_client import Mount

CHANGES = 20
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Tree:
    """So many small files in so many folders, on a volume of its own."""

    files: int
    folders: int

    @property
    def volume(self) -> str:
        """The name of its volume."""
        return f"files{self.files}"

    @property
    def a_folder(self) -> int:
        """Files in each folder."""
        return self.files // self.folders

    def folder(self, number: int) -> str:
        """The name of one folder."""
        return f"folder{number % self.folders:04d}"

    def name(self, folder: int, number: int) -> str:
        """The path of one file."""
        return f"{self.folder(folder)}/file{number % self.a_folder:06d}"


def make(tree: Tree, root: Path, when_ns: int | None = None) -> None:
    """Makes the tree: files of 20 to 200 bytes, no two alike.

    when_ns: the modification time of all in it, so that trees made twice are equal.
    """
    chance = random.Random(tree.files)
    for folder in range(tree.folders):
        (root / tree.folder(folder)).mkdir()
        for number in range(tree.a_folder):
            text = f"{folder} {number} ".encode()
            fd = os.open(root / tree.name(folder, number), os.O_CREAT | os.O_WRONLY, 0o644)
            os.write(fd, text.ljust(chance.randrange(20, 200), b"x"))
            if when_ns is not None:
                os.utime(fd, ns=(when_ns, when_ns))
            os.close(fd)
        if when_ns is not None:
            os.utime(root / tree.folder(folder), ns=(when_ns, when_ns))


def make_large(root: Path, total_bytes: int, files: int, seed: int) -> None:
    """Makes a few large files of noise."""
    chance = random.Random(seed)
    for number in range(files):
        with (root / f"large{number}").open("wb") as file:
            for _ in range(total_bytes // files // _BLOCK):
                file.write(chance.randbytes(_BLOCK))


def look(*roots: Path) -> int:
    """Looks at every file, so that all sides find a warm cache; returns how many there are."""
    count = 0
    for root in roots:
        for _folder, _folders, names in os.walk(root):
            count += len(names)
            for name in names:
                os.lstat(os.path.join(_folder, name))  # noqa: PTH118 - a million of them
    return count


def forget_names() -> None:
    """Makes the kernel drop dentries and inodes, so that a write by handle finds no name."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("2\n")


def forget_files() -> None:
    """Empties the kernel's caches: a filesystem with a million of inodes is unmounted for long."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


class Changes:
    """Makes `CHANGES` changes through NFS, other ones each time."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._round = 0

    def make(self, tree: Tree) -> None:
        """20 changes in different folders: 16 writes, 2 new files, a rename and a delete.

        Different as far as there are folders: a tree of ten gets two in each.
        """
        forget_names()
        self._round += 1
        self._lab.c.inside(lambda: self._make(tree))
        time.sleep(0.1)

    def _make(self, tree: Tree) -> None:
        mount = Mount(VIP, f"/nfs/{tree.volume}")
        step = max(1, tree.folders // CHANGES)
        try:
            for number in range(CHANGES):
                self._change(mount, tree, number, number * step + self._round)
        finally:
            mount.close()

    def _change(self, mount: Mount, tree: Tree, number: int, folder: int) -> None:
        path = "/" + tree.name(folder, self._round * CHANGES + number)
        match number:
            case 0:
                mount.rename(path, f"{path}-renamed-{self._round}")
            case 1:
                mount.unlink(path)
            case 2 | 3:
                mount.put(f"{path}-new-{self._round}", 0, b"new\n")
            case _:
                mount.put(path, 200, f"changed {self._round}\n".encode())

"""The change journal on real filesystems, under local writers and under a real NFS server."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from nfsha.replica.journal import changes, fanotify, handles, ledger, published
from nfsha.replica.journal.changes import (
    ChangeJournal,
    ChangesError,
    Published,
    WalkReason,
    read_last,
    read_published,
)
from nfsha.replica.journal.handles import Tree
from tests.netns.labkit import nfs_client
from tests.netns.labkit.nfs_server import NfsServer, make_disks
from tests.netns.labkit.place import Place
from tests.netns.namespaces import run
from tests.netns.treewalk import differences
from tests.netns.volumekit import LoopVolume, left_behind

UUID = "0b7a2e6e-2f40-4f8e-9d0c-9e6f6c1c5a11"


def boot_ms() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def drop_caches(root: Path) -> None:
    subprocess.run(["sync", "-f", root], check=True)  # what is dirty is not dropped
    Path("/proc/sys/vm/drop_caches").write_text("2")


class Watched:
    """A journal on a folder, and what a passive node would know of it."""

    def __init__(self, root: Path, home: Path, **options: object) -> None:
        self.root, self.home = root, home
        self.list = home / "public" / f"changes-{UUID}"
        (home / "public").mkdir(exist_ok=True)
        self.start(**options)

    def start(self, **options: object) -> None:
        root_fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.journal = ChangeJournal(
                self.root, root_fd, UUID, self.home, boot_ms, time.time_ns,
                **options,  # type: ignore[arg-type]
            )  # fmt: skip
            self.journal.start()
        finally:
            os.close(root_fd)
        self.applied = self.journal.publish(self.list).last

    def publish(self) -> Published:
        told = self.journal.publish(self.list)
        assert read_published(self.list.read_bytes()) == told
        return told

    def look(self) -> tuple[tuple[bytes, ...] | None, str]:
        """What to pull now; it is not taken as applied."""
        return self.publish().since(self.journal.journal_id, self.applied)

    def take(self) -> set[str]:
        """The folders to pull, which then count as applied; a full walk is a failure."""
        folders, why = self.look()
        assert folders is not None, why
        self.done()
        return {os.fsdecode(folder) for folder in folders}

    def done(self) -> None:
        """A pass over the last list, or a full walk after it, was complete."""
        self.applied = read_published(self.list.read_bytes()).last
        self.journal.acknowledge(self.journal.journal_id, self.applied)

    def close(self) -> None:
        self.journal.close()

    def walks(self) -> dict[str, int]:
        return self.journal.counters.full_walks


@pytest.fixture(params=["ext4", "xfs"])
def volume(request: pytest.FixtureRequest) -> Iterator[LoopVolume]:
    with LoopVolume(request.param, size_mib=320) as made:
        yield made
    deadline = time.monotonic() + 5  # the kernel frees a loop device a moment after its unmount
    while left_behind() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left_behind() == []


@pytest.fixture(autouse=True)
def no_second_chances(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes are written at once, and no path is looked up again without a reason."""
    monkeypatch.setattr(changes, "NOTES_EVERY_MS", 0)
    monkeypatch.setattr(ledger, "_LOOKED_AT_AGAIN", 0)


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[..., Watched]]:
    with ExitStack() as stack:

        def make(root: Path, **options: object) -> Watched:
            watched = Watched(root, tmp_path, **options)
            stack.callback(watched.close)
            return watched

        yield make


Watch = Callable[..., Watched]


# ---- what local writers do


@pytest.mark.parametrize("volume", ["ext4", "xfs", "btrfs"], indirect=True)
def test_each_kind_of_change_names_its_folders(volume: LoopVolume, watch: Watch) -> None:
    root = volume.path
    (root / "a/b").mkdir(parents=True)
    (root / "c").mkdir()
    (root / "a/old").write_text("old")
    (root / "a/b/mode").write_text("mode")
    watched = watch(root)
    assert watched.take() == set()
    steps: list[tuple[Callable[[], object], set[str]]] = [
        (lambda: (root / "a/new").write_text("new"), {"a"}),
        (lambda: (root / "top").write_text("top"), {"."}),
        (lambda: os.truncate(root / "a/b/mode", 1), {"a/b"}),
        (lambda: (root / "a/b/mode").chmod(0o600), {"a/b"}),
        (lambda: os.chown(root / "a/b/mode", 5, 6), {"a/b"}),
        (lambda: os.utime(root / "a/b/mode", (1, 2)), {"a/b"}),
        (lambda: os.setxattr(root / "a/b/mode", "user.x", b"1"), {"a/b"}),
        (lambda: (root / "a/b").chmod(0o700), {"a/b"}),
        (lambda: (root / "a/new").rename(root / "c/new"), {"a", "c"}),
        (lambda: (root / "c/new").rename(root / "c/newer"), {"c"}),
        (lambda: (root / "c/newer").rename(root / "a/old"), {"a", "c"}),
        ((root / "a/old").unlink, {"a"}),
        (lambda: (root / "c/link").symlink_to("nowhere"), {"c"}),
        (lambda: os.mkfifo(root / "c/fifo"), {"c"}),
        (lambda: (root / "c/d/e").mkdir(parents=True), {"c", "c/d"}),
        ((root / "c/d/e").rmdir, {"c/d"}),
        (lambda: shutil.rmtree(root / "c"), {"."}),
        ((root / "a/b/mode").read_text, set()),
    ]
    for number, (step, expected) in enumerate(steps):
        step()
        assert watched.take() == expected, f"step {number}"
    assert watched.walks() == {}


@pytest.mark.parametrize("volume", ["ext4", "xfs", "btrfs"], indirect=True)
def test_odd_names_come_through(volume: LoopVolume, watch: Watch) -> None:
    watched = watch(volume.path)
    names = [b"new\nline", b"\xff\xfe", b"x" * 255, b"gone (deleted)", b" ", b"-rf", b".nfsha-x y"]
    for name in names[:-1]:
        (volume.path / os.fsdecode(name)).mkdir()
        (volume.path / os.fsdecode(name) / os.fsdecode(names[-1])).write_text("x")
    assert watched.take() == {".", *map(os.fsdecode, names[:-1])}


def test_own_files_are_not_changes(volume: LoopVolume, watch: Watch) -> None:
    (volume.path / "a").mkdir()
    watched = watch(volume.path)
    (volume.path / ".nfsha-stamp.new").write_text("1")
    (volume.path / ".nfsha-stamp.new").rename(volume.path / ".nfsha-stamp")
    (volume.path / ".nfsha-quarantine/e").mkdir(parents=True)
    (volume.path / ".nfsha-quarantine/e/f").write_text("kept")
    (volume.path / "a/.nfsha-partial").mkdir()
    (volume.path / "a/.nfsha-partial/half").write_text("half")
    assert watched.take() == set()
    (volume.path / "a/.nfsha-stamp").write_text("a client's own file")
    assert watched.take() == {"a"}


def test_a_moved_folder_brings_all_below_it(volume: LoopVolume, watch: Watch) -> None:
    root = volume.path
    (root / "from/tree/x/y").mkdir(parents=True)
    (root / "to").mkdir()
    (root / "from/tree/x/y/file").write_text("1")
    watched = watch(root)
    (root / "from/tree").rename(root / "to/tree2")
    assert watched.take() == {"from", "to", "to/tree2", "to/tree2/x", "to/tree2/x/y"}


def test_a_folder_changed_before_a_folder_above_was_renamed(
    volume: LoopVolume, watch: Watch
) -> None:
    root = volume.path
    (root / "one/two/three").mkdir(parents=True)
    watched = watch(root)
    (root / "one/two/three/file").write_text("1")
    watched.journal.collect()
    (root / "one").rename(root / "uno")
    (root / "uno/two").rename(root / "uno/due")
    everything = {".", "uno", "uno/due", "uno/due/three"}
    assert watched.look()[0] == tuple(sorted(map(os.fsencode, everything)))
    (root / "uno").rename(root / "eins")  # after its paths were looked up, nothing acknowledged
    assert watched.take() == {".", "eins", "eins/due", "eins/due/three"}
    shutil.rmtree(root / "eins")
    assert watched.take() == {"."}
    assert watched.walks() == {}


def test_paths_in_a_long_list_stay_right(volume: LoopVolume, watch: Watch) -> None:
    """What is never acknowledged is not looked up again but where folders come and go."""
    busy = Busy(volume.path, 11)
    watched = watch(volume.path)
    for _ in range(40):
        busy.go(15)
        told = {os.fsdecode(path) for path, _ in watched.publish().folders}
        assert {path for path in told if not (volume.path / path).is_dir()} == set()
        standing = {str(one.relative_to(volume.path)) for one in busy.standing()}
        assert standing - {"."} <= told | {"."}
    assert watched.walks() == {}


def test_a_folder_replaced_by_another(volume: LoopVolume, watch: Watch) -> None:
    (volume.path / "a").mkdir()
    (volume.path / "b").mkdir()
    watched = watch(volume.path)
    (volume.path / "a/x").touch()
    (volume.path / "b/x").touch()
    watched.publish()
    (volume.path / "b/x").unlink()
    (volume.path / "a").rename(volume.path / "b")  # over the empty one
    watched.publish()
    (volume.path / "b").rename(volume.path / "c")
    assert watched.take() == {".", "c"}


def test_two_folders_that_change_places(volume: LoopVolume, watch: Watch) -> None:
    root = volume.path
    (root / "a/in-a").mkdir(parents=True)
    (root / "b/in-b").mkdir(parents=True)
    watched = watch(root)
    (root / "a").rename(root / "tmp")
    (root / "b").rename(root / "a")
    (root / "tmp").rename(root / "b")
    assert watched.take() == {".", "a", "a/in-b", "b", "b/in-a"}


def test_rename_of_a_folder_with_ten_thousand_files(volume: LoopVolume, watch: Watch) -> None:
    root = volume.path
    (root / "big/deep").mkdir(parents=True)
    for number in range(10_000):
        os.close(os.open(root / f"big/{number}", os.O_CREAT | os.O_WRONLY))
    watched = watch(root)
    (root / "big").rename(root / "large")
    used = cpu_s()
    assert watched.take() == {".", "large", "large/deep"}
    assert cpu_s() - used < 1.0
    assert watched.journal.counters.moved_folders == 1


def test_a_deep_tree_and_one_that_no_path_reaches(volume: LoopVolume, watch: Watch) -> None:
    root = volume.path
    deep = root / "/".join(["d"] * 300)
    deep.mkdir(parents=True)
    watched = watch(root)
    (root / "d").rename(root / "e")
    assert len(watched.take()) == 301
    here = os.open(root / "e", os.O_RDONLY)
    for _ in range(20):
        os.mkdir("n" * 250, dir_fd=here)
        inner = os.open("n" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    folders, why = watched.look()
    assert folders is None
    assert "longer than" in why
    watched.done()
    assert watched.take() == set()


def test_what_is_mounted_inside_is_not_this_volume(
    volume: LoopVolume, watch: Watch, tmp_path: Path
) -> None:
    (volume.path / "inner").mkdir()
    (volume.path / "tree").mkdir()
    with LoopVolume("ext4", at=volume.path / "tree/inner") as inner:
        watched = watch(volume.path)
        (inner.path / "theirs").mkdir()
        assert watched.take() == set()
        (volume.path / "tree/mine").write_text("1")
        assert watched.take() == {"tree"}
        (volume.path / "other/place").mkdir(parents=True)
        assert watched.take() == {".", "other"}
        (volume.path / "tree").rename(volume.path / "moved")
        assert watched.take() == {".", "moved"}
        (volume.path / "moved").rename(volume.path / "tree")


def test_a_folder_hidden_under_a_mount_is_not_listed(volume: LoopVolume, watch: Watch) -> None:
    (volume.path / "place/hidden").mkdir(parents=True)
    watched = watch(volume.path)
    held = os.open(volume.path / "place/hidden", os.O_RDONLY | os.O_DIRECTORY)
    with LoopVolume("ext4", at=volume.path / "place") as inner:
        (inner.path / "hidden").mkdir()
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=held))
        os.close(held)
        assert watched.take() == set()
    assert watched.walks() == {}


def test_a_folder_that_is_covered_later_leaves_the_list(
    volume: LoopVolume, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "_LOOKED_AT_AGAIN", 1)
    (volume.path / "place/folder").mkdir(parents=True)
    watched = watch(volume.path)
    (volume.path / "place/folder/file").write_text("1")
    assert watched.look()[0] == (b"place/folder",)
    with LoopVolume("ext4", at=volume.path / "place"):
        assert watched.take() == set()


def test_what_lies_outside_a_part_that_is_mounted(
    volume: LoopVolume, watch: Watch, tmp_path: Path
) -> None:
    (volume.path / "part/a").mkdir(parents=True)
    (volume.path / "other").mkdir()
    part = tmp_path / "part"
    part.mkdir()
    subprocess.run(["mount", "--bind", volume.path / "part", part], check=True)
    try:
        watched = watch(part)
        (volume.path / "other/x").write_text("1")
        (volume.path / "y").write_text("1")
        assert watched.take() == set()
        (volume.path / "part/a/x").write_text("1")
        (part / "y").write_text("1")
        assert watched.take() == {".", "a"}
        assert watched.walks() == {}
    finally:
        subprocess.run(["umount", part], check=True)


def test_a_path_is_believed_only_when_it_leads_back(
    volume: LoopVolume, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder above may be renamed between the two looks; then it is looked at again."""
    (volume.path / "a").mkdir()
    (volume.path / "b").mkdir()
    watched = watch(volume.path)
    told: list[bytes] = [os.fsencode(volume.path) + b"/b"]
    real = handles.path_of_fd

    def stale(fd: int) -> bytes:
        path = real(fd)
        return told.pop() if path.endswith(b"/a") and told else path

    monkeypatch.setattr(handles, "path_of_fd", stale)
    (volume.path / "a/file").write_text("1")
    assert watched.take() == {"a"}
    assert told == []
    told += [os.fsencode(volume.path) + b"/b"] * 10
    (volume.path / "a").chmod(0o700)
    (volume.path / "c").mkdir()
    (volume.path / "c").rmdir()
    folders, why = watched.look()
    assert folders is None
    assert "renamed all the time" in why


# ---- hard links


def test_all_names_of_a_changed_file_are_pulled_together(volume: LoopVolume, watch: Watch) -> None:
    root = volume.path
    for name in ("a", "b", "c", "d"):
        (root / name).mkdir()
    (root / "a/one").write_text("1")
    os.link(root / "a/one", root / "b/two")
    watched = watch(root)
    (root / "a/one").write_text("22")
    assert watched.take() == {"a", "b"}  # b was never named: looked for, by the inode
    assert watched.journal.counters.searches == 1
    (root / "b/two").write_text("333")
    assert watched.take() == {"a", "b"}
    os.link(root / "b/two", root / "c/three")
    assert watched.take() == {"a", "b", "c"}
    (root / "c/three").rename(root / "d/three")
    assert watched.take() == {"a", "b", "c", "d"}
    assert watched.journal.counters.searches == 1  # the others were remembered
    (root / "a/one").unlink()
    assert "a" in watched.take()
    assert watched.walks() == {}


def test_a_link_made_for_a_moment_costs_no_search(volume: LoopVolume, watch: Watch) -> None:
    (volume.path / "mail/new").mkdir(parents=True)
    (volume.path / "mail/tmp").mkdir()
    watched = watch(volume.path)
    (volume.path / "mail/tmp/1").write_text("letter")
    watched.journal.collect()
    os.link(volume.path / "mail/tmp/1", volume.path / "mail/new/1")
    watched.journal.collect()
    (volume.path / "mail/tmp/1").unlink()
    assert watched.take() == {"mail/tmp", "mail/new"}
    (volume.path / "mail/lock.tmp").write_text("pid")
    watched.journal.collect()
    os.link(volume.path / "mail/lock.tmp", volume.path / "mail/lock")
    assert watched.take() == {"mail"}
    assert watched.journal.counters.searches == 0


def test_a_name_that_is_gone_is_not_taken_for_the_file(volume: LoopVolume, watch: Watch) -> None:
    root = volume.path
    (root / "a").mkdir()
    (root / "b").mkdir()
    watched = watch(root)
    (root / "a/one").write_text("1")
    os.link(root / "a/one", root / "b/two")
    assert watched.take() == {"a", "b"}
    (root / "b/two").chmod(0o600)
    (root / "a/one").chmod(0o640)  # the last name that is remembered
    assert watched.take() == {"a", "b"}
    (root / "a/one").unlink()
    (root / "a/one").write_text("another file")
    assert watched.take() == {"a", "b"}
    os.close(write_by_handle(root, "b/two"))
    assert watched.take() == {"b"}


def test_a_moved_folder_with_links_out_of_it(volume: LoopVolume, watch: Watch) -> None:
    root = volume.path
    (root / "in/deep").mkdir(parents=True)
    (root / "out").mkdir()
    (root / "in/deep/one").write_text("1")
    os.link(root / "in/deep/one", root / "out/two")
    watched = watch(root)
    (root / "in").rename(root / "moved")
    assert watched.take() == {".", "moved", "moved/deep", "out"}


def test_names_that_are_too_dear_to_find_mean_a_full_walk(volume: LoopVolume, watch: Watch) -> None:
    root = volume.path
    (root / "a").mkdir()
    (root / "b").mkdir()
    (root / "a/one").write_text("1")
    os.link(root / "a/one", root / "b/two")
    watched = watch(root, max_entries=3)
    (root / "a/one").write_text("22")
    folders, why = watched.look()
    assert folders is None
    assert "not all names of 1 changed files are known: more than 3 entries" in why
    assert watched.walks() == {WalkReason.HARD_LINKS: 1}
    watched.done()
    assert watched.take() == set()


# ---- files that the kernel knows by their handles only


def write_by_handle(root: Path, name: str) -> int:
    """As an NFS server does whose caches are cold: opens a file by a handle, and writes."""
    root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        handle, _ = fanotify.handle_of(root_fd, os.fsencode(name))
        drop_caches(root)
        opened = fanotify.open_handle(root_fd, handle, os.O_RDWR)
        assert Path(f"/proc/self/fd/{opened}").readlink() == Path("/")  # no name, really
        os.write(opened, b"by handle")
    finally:
        os.close(root_fd)
    return opened


def move_during_a_search(
    monkeypatch: pytest.MonkeyPatch, root: Path, name: str, *, times: int = 1
) -> None:
    """Moves a file from its folder to the root while a search is between them, and back after it.

    A search reads the root before all other folders.
    """
    walk, left = Tree.walk, [times]
    here, there = root / name, root / Path(name).name

    def moving(tree: Tree, folder: bytes) -> Generator[tuple[bytes, os.DirEntry[str] | None]]:
        for handle, entry in walk(tree, folder):
            if entry is None and left[0] and here.exists() and tree.path_of(handle) == b"b":
                left[0] -= 1
                here.rename(there)
            yield handle, entry
        if left[0] and there.exists():
            there.rename(here)  # unseen by this search, and the next one begins with the root

    monkeypatch.setattr(Tree, "walk", moving)


def test_a_name_moved_during_the_search_for_it(
    volume: LoopVolume, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = volume.path
    (root / "a").mkdir()
    (root / "b").mkdir()
    (root / "a/one").write_text("1")
    os.link(root / "a/one", root / "b/two")
    watched = watch(root)
    (root / "a/one").write_text("22")
    move_during_a_search(monkeypatch, root, "b/two")
    assert watched.take() == {"a", "b", "."}
    assert watched.journal.counters.searches == 1  # the events named the place
    assert watched.walks() == {}


@pytest.mark.parametrize(("times", "searches", "walks"), [(1, 2, {}), (3, 3, {"nameless": 1})])
def test_a_file_known_by_its_handle_moved_during_the_search_for_it(
    volume: LoopVolume,
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
    times: int,
    searches: int,
    walks: dict[str, int],
) -> None:
    """It is searched for again, but not for ever."""
    (volume.path / "b").mkdir()
    (volume.path / "b/data").write_text("1")
    watched = watch(volume.path)
    os.close(write_by_handle(volume.path, "b/data"))
    move_during_a_search(monkeypatch, volume.path, "b/data", times=times)
    folders, _ = watched.look()
    assert (folders is None) == bool(walks)
    assert watched.journal.counters.searches == searches
    assert watched.walks() == walks


def test_a_file_written_by_its_handle_is_found(volume: LoopVolume, watch: Watch) -> None:
    (volume.path / "a/b").mkdir(parents=True)
    (volume.path / "a/b/data").write_text("1")
    watched = watch(volume.path)
    opened = write_by_handle(volume.path, "a/b/data")
    try:
        assert watched.take() == {"a/b"}
        os.write(opened, b"more")
        assert watched.take() == {"a/b"}
        os.fchmod(opened, 0o600)
        assert watched.take() == {"a/b"}
        (volume.path / "a/b/data").rename(volume.path / "a/data")
        os.write(opened, b"more")
        assert watched.take() == {"a", "a/b"}
        (volume.path / "a/data").unlink()
        os.write(opened, b"to nowhere")
        assert watched.take() == {"a"}
    finally:
        os.close(opened)
    assert watched.journal.counters.searches <= 1
    assert watched.journal.counters.nameless >= 3
    assert watched.walks() == {}


def test_a_file_that_is_not_found_means_a_full_walk(volume: LoopVolume, watch: Watch) -> None:
    (volume.path / "a/b").mkdir(parents=True)
    (volume.path / "a/b/data").write_text("1")
    watched = watch(volume.path, max_entries=2)
    os.close(write_by_handle(volume.path, "a/b/data"))
    folders, why = watched.look()
    assert folders is None
    assert "1 files changed whose folders are not known" in why
    assert watched.walks() == {WalkReason.NAMELESS: 1}


def test_a_search_neither_lets_the_queue_fill_nor_holds_up_a_close(
    volume: LoopVolume, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3000):
        (volume.path / f"{number}").touch()
    watched = watch(volume.path)
    taken: list[int] = []
    real = fanotify.read_events

    def slowly(group: fanotify.Group) -> bytes:
        time.sleep(0.005)
        data = real(group)
        taken.append(len(data))
        return data

    os.close(write_by_handle(volume.path, "7"))
    watched.journal.collect()
    monkeypatch.setattr(fanotify, "read_events", slowly)
    monkeypatch.setattr(ledger, "_PAUSE_EVERY_ENTRIES", 1)  # so it would take 15 s
    publisher = threading.Thread(target=watched.publish)
    publisher.start()
    time.sleep(0.2)
    (volume.path / "meanwhile").touch()
    time.sleep(0.1)
    assert publisher.is_alive()
    begun = time.monotonic()
    assert watched.journal.counters.searches == 1
    watched.journal.acknowledge(watched.journal.journal_id, 1)
    watched.journal.close()
    assert time.monotonic() - begun < 0.5  # the loop that renews leases may call these
    publisher.join(5)
    assert not publisher.is_alive()
    assert watched.journal.ended == "it was closed"
    with pytest.raises(ChangesError, match="does not run"):
        watched.journal.fileno()
    volume.unmount()
    assert any(taken)
    assert watched.look()[0] is None


# ---- bounds


def test_a_real_overflow_means_one_full_walk(volume: LoopVolume, watch: Watch) -> None:
    watched = watch(volume.path)
    limit = int(Path("/proc/sys/fs/fanotify/max_queued_events").read_text())
    assert limit < 20_000, "this host's queue is longer than the test fills"
    for number in range(limit + 1000):
        os.close(os.open(volume.path / f"{number}", os.O_CREAT | os.O_WRONLY))
    folders, why = watched.look()
    assert folders is None
    assert "more changes at once" in why
    assert watched.walks() == {WalkReason.QUEUE_OVERFLOW: 1}
    assert watched.journal.counters.overflows == 1
    watched.done()
    (volume.path / "after").mkdir()
    assert watched.take() == {"."}


def test_the_queue_without_bound_keeps_all(volume: LoopVolume, watch: Watch) -> None:
    watched = watch(volume.path, unlimited_queue=True)
    for number in range(20_000):
        os.close(os.open(volume.path / f"{number}", os.O_CREAT | os.O_WRONLY))
    watched.journal.collect()
    assert watched.journal.collect_again_in_ms == changes.COLLECT_BUSY_MS
    assert watched.take() == {"."}
    assert watched.journal.counters.events >= 20_000
    watched.journal.collect()
    assert watched.journal.collect_again_in_ms == changes.COLLECT_EVERY_MS


def test_more_folders_than_allowed(volume: LoopVolume, watch: Watch) -> None:
    for number in range(12):
        (volume.path / f"{number}").mkdir()
    watched = watch(volume.path, max_folders=10)
    for number in range(12):
        (volume.path / f"{number}/file").write_text("1")
    folders, why = watched.look()
    assert folders is None
    assert "more than 10 folders" in why
    watched.done()
    (volume.path / "3/file").unlink()
    assert watched.take() == {"3"}


# ---- at rest


def test_what_is_still_true_is_said_without_looking_at_the_volume(
    volume: LoopVolume, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    (volume.path / "folder").mkdir()
    (volume.path / "one").touch()
    (volume.path / "two").hardlink_to(volume.path / "one")
    watched = watch(volume.path)
    journal = watched.journal

    def none_until_published() -> None:
        """Whatever happened: only a list that is published anew is true again."""
        assert journal.still_true_ns() is None
        journal.collect()
        assert journal.still_true_ns() is None
        watched.take()
        watched.publish()

    for change in (
        lambda: (volume.path / "folder" / "file").write_text("x"),
        lambda: os.utime(volume.path / "folder"),
        lambda: (volume.path / "folder").rename(volume.path / "renamed"),
        lambda: (volume.path / "one").chmod(0o600),
        (volume.path / "renamed" / "file").unlink,
    ):
        before_ns = time.time_ns()
        still_ns = journal.still_true_ns()
        assert still_ns is not None
        assert before_ns < still_ns < time.time_ns()
        assert journal.at_rest()
        assert journal.still_true_ns() is not None, "it takes nothing out of the queue"
        change()
        assert not journal.at_rest()
        none_until_published()
    watched.publish()
    journal.acknowledge(journal.journal_id, watched.applied)
    assert journal.still_true_ns() is not None, "known already"
    with journal._lock:
        assert journal.still_true_ns() is None, "another call may be changing it"
        assert not journal.at_rest()
    monkeypatch.setattr(journal, "_wall_ns", lambda: time.time_ns() - 5_000_000_000)
    assert journal.still_true_ns() is None, "the clock was stepped back"
    assert watched.look()[0] is None


def test_a_list_that_waits_for_something_is_published_each_time(
    volume: LoopVolume, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = watch(volume.path)
    (volume.path / "file").touch()
    folders, _ = watched.look()
    assert folders == (b".",)
    assert watched.journal.still_true_ns() is None, "a folder may be covered by a mount meanwhile"
    watched.done()
    assert watched.journal.still_true_ns() is None, "what was applied is not forgotten yet"
    watched.publish()
    assert watched.journal.still_true_ns() is not None
    (volume.path / ".nfsha-stamp").touch()  # no change, and yet an event
    watched.publish()
    assert watched.journal.still_true_ns() is not None
    watched.done()
    assert watched.journal.still_true_ns() is None, "nor is this"
    watched.publish()
    monkeypatch.setattr(changes, "NOTES_EVERY_MS", 60_000)
    (volume.path / "file").write_text("x")
    watched.take()
    watched.publish()
    (volume.path / "file").write_text("y")
    watched.take()
    watched.publish()
    assert watched.journal.still_true_ns() is None, "its notes are not up to date"


@pytest.mark.alone  # a place that is made meanwhile has a copy of each mount, and keeps the volume
def test_a_volume_that_was_unmounted_or_fails_is_not_at_rest(
    volume: LoopVolume, watch: Watch
) -> None:
    watched = watch(volume.path)
    watched.publish()
    assert watched.journal.at_rest()
    volume.unmount()
    assert watched.journal.still_true_ns() is None
    assert not watched.journal.at_rest()
    volume.mount()
    (volume.path / "missed").touch()
    assert watched.journal.still_true_ns() is None
    watched.publish()
    assert watched.journal.ended
    assert watched.journal.still_true_ns() is None
    watched.close()
    assert watched.journal.still_true_ns() is None


# ---- unmounts, failures, restarts


def test_it_does_not_keep_the_volume_mounted(volume: LoopVolume, watch: Watch) -> None:
    watched = watch(volume.path)
    (volume.path / "last").write_text("1")
    watched.journal.collect()
    volume.unmount()
    watched.journal.collect()
    assert "another filesystem, or none, is mounted" in watched.journal.ended
    folders, why = watched.look()
    assert folders is None
    assert "ended" in why
    watched.done()
    assert watched.look()[0] is None  # nobody can go by it, whatever he applied
    watched.journal.collect()
    assert watched.walks() == {WalkReason.ENDED: 1}


def test_nothing_is_missed_between_an_unmount_and_a_new_mount(
    volume: LoopVolume, watch: Watch
) -> None:
    """The same device, the same root, the same inode: only the mark tells the difference."""
    volume.unmount()
    device = run("losetup", "--find", "--show", str(volume.image)).strip()
    try:
        options = ["-o", "nouuid"] if volume.fstype == "xfs" else []
        run("mount", *options, device, str(volume.path))
        watched, before = watch(volume.path), volume.path.stat()
        run("umount", str(volume.path))
        run("mount", *options, device, str(volume.path))
        assert os.path.samestat(before, volume.path.stat())
        (volume.path / "missed").write_text("1")
        folders, why = watched.look()
        run("umount", str(volume.path))
    finally:
        run("losetup", "--detach", device)
    if folders is None:
        assert "unmounted" in why
    else:  # another mount namespace of this host has the volume too: it was watched all the time
        assert folders == (b".",)


def test_a_lazy_unmount_ends_it(volume: LoopVolume, watch: Watch) -> None:
    watched = watch(volume.path)
    held = os.open(volume.path, os.O_RDONLY)
    try:
        volume.unmount(lazy=True)
        assert watched.look()[0] is None
        assert watched.journal.ended
    finally:
        os.close(held)


def test_a_failing_filesystem_is_not_vouched_for(
    volume: LoopVolume, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    (volume.path / "a/b").mkdir(parents=True)
    watched = watch(volume.path)
    (volume.path / "a/b/one").write_text("1")
    watched.publish()
    (volume.path / "a").rename(volume.path / "c")

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(fanotify, "open_handle", fail)
        folders, why = watched.look()
        assert folders is None
        assert f"cannot look at {volume.path}: Input/output error" in why
        (volume.path / "c/two").write_text("2")
        watched.journal.collect()
    assert watched.walks()[WalkReason.TROUBLE] == 2
    assert watched.look()[0] is None
    paths = {path for path, _ in watched.publish().folders}
    assert b"a/b" not in paths  # the rename was lost, its old path is not told
    watched.done()
    (volume.path / "c/two").write_text("3")
    assert watched.take() == {"c"}


def test_a_gone_file_whose_inode_is_being_given_away_is_gone(volume: LoopVolume) -> None:
    """ext4 says now and then that there is no memory: in one of six calls, here."""
    program = """
import os
print(flush=True)
while True:
    os.close(os.open("x", os.O_CREAT))
    os.unlink("x")
"""
    root_fd = os.open(volume.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        (volume.path / "x").write_text("1")
        handle, _ = fanotify.handle_of(root_fd, b"x")
        (volume.path / "x").unlink()
        command = [sys.executable, "-c", program]
        with subprocess.Popen(command, cwd=volume.path, stdout=subprocess.PIPE) as writer:
            try:
                assert writer.stdout is not None
                writer.stdout.readline()
                for _ in range(1000):
                    with pytest.raises(OSError, match="Stale file handle"):
                        os.close(fanotify.open_handle(root_fd, handle))
            finally:
                writer.kill()
    finally:
        os.close(root_fd)


def test_a_filesystem_that_was_shut_down_stays_away(volume: LoopVolume, watch: Watch) -> None:
    (volume.path / "a").mkdir()
    watched = watch(volume.path)
    (volume.path / "a/one").write_text("1")
    volume.shut_down()
    watched.publish()  # does not raise, whatever can be read of it
    volume.unmount()
    assert watched.look()[0] is None


def test_notes_that_cannot_be_written_hold_up_nothing(volume: LoopVolume, watch: Watch) -> None:
    watched = watch(volume.path)
    notes = watched.home / f"changes-{UUID}"
    notes.unlink(missing_ok=True)
    (notes / "in the way").mkdir(parents=True)
    (volume.path / "x").write_text("1")
    assert watched.take() == {"."}
    assert watched.journal.counters.durable_failures > 0
    shutil.rmtree(notes)
    (volume.path / "y").write_text("1")
    watched.publish()
    left = read_last(watched.home, UUID)
    assert left is not None
    assert [path for path, _ in left.published.folders] == [b"."]


def test_damaged_notes_of_the_last_run_are_no_reason_not_to_start(
    volume: LoopVolume, watch: Watch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / f"changes-{UUID}").write_text("garbage")
    watched = watch(volume.path)
    assert "what the last run noted as changed is lost" in caplog.text
    (volume.path / "x").write_text("1")
    assert watched.take() == {"."}


def test_a_list_too_long_to_tell_means_a_full_walk(
    volume: LoopVolume, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        (volume.path / f"{number}").mkdir()
    watched = watch(volume.path)
    for number in range(20):
        (volume.path / f"{number}/x").write_text("1")
    with monkeypatch.context() as patched:
        patched.setattr(published, "MAX_FOLDERS", 10)
        folders, why = watched.look()
        assert folders is None
        assert "20 folders in" in why
    assert watched.journal.counters.folders == 0
    watched.done()
    assert watched.take() == set()


def test_a_restart_is_a_new_journal_that_keeps_the_notes(volume: LoopVolume, watch: Watch) -> None:
    (volume.path / "a").mkdir()
    (volume.path / "b").mkdir()
    watched = watch(volume.path)
    (volume.path / "a/1").write_text("1")
    first = watched.publish()
    left = read_last(watched.home, UUID)
    assert left is not None
    assert left.published.folders == ((b"a", first.last),)
    watched.journal.close()
    watched.start()
    assert watched.journal.journal_id != first.journal_id
    assert watched.publish().since(first.journal_id, first.last)[0] is None
    (volume.path / "b/1").write_text("1")
    watched.publish()
    left = read_last(watched.home, UUID)
    assert left is not None
    assert [path for path, _ in left.published.folders] == [b"a", b"b"]
    watched.done()
    watched.publish()
    left = read_last(watched.home, UUID)
    assert left is not None
    assert left.published.folders == ()


def test_notes_are_written_only_when_something_changed(volume: LoopVolume, watch: Watch) -> None:
    watched = watch(volume.path)
    notes = watched.home / f"changes-{UUID}"
    (volume.path / "x").write_text("1")
    watched.take()
    watched.publish()
    before = notes.stat().st_ino, notes.stat().st_mtime_ns
    for _ in range(3):
        watched.publish()
    assert (notes.stat().st_ino, notes.stat().st_mtime_ns) == before


def test_notes_are_written_now_and_then_only(
    volume: LoopVolume, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "NOTES_EVERY_MS", 300)
    watched = watch(volume.path)
    notes = watched.home / f"changes-{UUID}"
    before = notes.read_bytes()
    (volume.path / "x").write_text("1")
    watched.publish()
    assert notes.read_bytes() == before
    time.sleep(0.35)
    watched.publish()
    left = read_last(watched.home, UUID)
    assert left is not None
    assert [path for path, _ in left.published.folders] == [b"."]


def test_a_foreign_acknowledgement_forgets_nothing(volume: LoopVolume, watch: Watch) -> None:
    watched = watch(volume.path)
    (volume.path / "x").write_text("1")
    last = watched.publish().last
    watched.journal.acknowledge("f" * 16, last)
    watched.journal.acknowledge(watched.journal.journal_id, last + 100)
    watched.journal.acknowledge(watched.journal.journal_id, -1)
    assert watched.take() == {"."}


def test_everything_before_as_of_is_in(volume: LoopVolume, watch: Watch) -> None:
    """A writer never stops; what it had finished before as_of is in the list of that moment."""
    watched = watch(volume.path)
    finished: list[tuple[int, str]] = []
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            (volume.path / f"f{number}").mkdir()
            (volume.path / f"f{number}/x").write_text("1")
            finished.append((time.time_ns(), f"f{number}"))
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            time.sleep(0.02)
            told = watched.publish()
            listed = {os.fsdecode(path) for path, _ in told.folders}
            before = {name for at, name in finished if at < told.as_of_ns}
            assert before <= listed
    finally:
        stop.set()
        writer.join()
    assert len(finished) > 20


def test_a_folder_without_handles_is_refused_in_words(tmp_path: Path) -> None:
    root_fd = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    try:
        journal = ChangeJournal(Path("/proc"), root_fd, UUID, tmp_path, boot_ms, time.time_ns)
        with pytest.raises(ChangesError, match="cannot watch /proc"):
            journal.start()
    finally:
        os.close(root_fd)


_TOO_MANY = """
import os, resource, sys, time
from pathlib import Path
from nfsha.replica.journal import fanotify
from nfsha.replica.journal.changes import ChangeJournal, ChangesError

def why():
    journal = ChangeJournal(root, root_fd, sys.argv[2], home, lambda: 0, time.time_ns)
    try:
        journal.start()
    except ChangesError as error:
        return str(error)
    journal.close()
    return ""

root, home = Path(sys.argv[1]), Path(sys.argv[3])
root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
limit = fanotify.groups_max()
resource.setrlimit(resource.RLIMIT_NOFILE, (limit + 200, limit + 200))
groups = [fanotify.open_group(unlimited=False) for _ in range(limit - 1)]
assert why() == ""
groups.append(fanotify.open_group(unlimited=False))
print(limit, why())
os.close(groups.pop().fd)
try:
    while True:
        os.dup(root_fd)
except OSError:
    print(limit, why())
"""


def test_more_volumes_than_the_kernel_allows_watches(volume: LoopVolume, tmp_path: Path) -> None:
    """As another user with root's powers: the kernel counts for each user, and others are here."""
    caps = "+sys_admin,+dac_override,+dac_read_search"
    done = run(
        "setpriv", "--reuid=54321", "--clear-groups", f"--inh-caps={caps}",
        f"--ambient-caps={caps}", sys.executable, "-c", _TOO_MANY, str(volume.path), UUID,
        str(tmp_path),
    )  # fmt: skip
    groups, files = done.splitlines()
    limit, _, why = groups.partition(" ")
    assert f"all {limit} change watches that one user may have are in use" in why
    assert "fs.fanotify.max_user_groups" in why
    assert "too many files are open" in files


# ---- a copy made by the journal's lists alone equals the volume


def pull(source: Path, target: Path, folders: tuple[bytes, ...] | None, scratch: Path) -> None:
    """What the passive node does: the listed folders one level deep, or everything."""
    options = ["-aHAXS", "--numeric-ids", "-x", "--modify-window=-1", "--delete"]
    if folders is not None:
        names = scratch / "names"
        names.write_bytes(b"".join(folder + b"/\0" for folder in folders))
        options += ["--dirs", "-R", "--from0", f"--files-from={names}"]
    argv = ["rsync", *options, "--exclude=/lost+found", f"{source}/", f"{target}/"]
    subprocess.run(argv, check=True, capture_output=True, timeout=60)


class Busy:
    """Random changes, by a seed: files, links, folders, renames of both, deletions.

    No two files are of one size: rsync takes another file of the same size and time, renamed over
    the first, for the first. That is not the journal's to find.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random = root, random.Random(seed)
        self.folders: list[Path] = [root]
        self.number = 0

    def go(self, steps: int) -> None:
        for _ in range(steps):
            step = self.random.choice(
                [self.make, self.make, self.change, self.change, self.link, self.folder,
                 self.move, self.move_folder, self.remove, self.remove_folder, self.meta]
            )  # fmt: skip
            step()

    def standing(self) -> list[Path]:
        """The folders that have something in them now (so they changed since it began)."""
        return [one for one in self.folders if one.is_dir() and any(one.iterdir())]

    def name(self) -> str:
        self.number += 1
        return f"n{self.number}"

    def some_folder(self) -> Path:
        self.folders = [folder for folder in self.folders if folder.is_dir()]
        return self.random.choice(self.folders)

    def some_file(self) -> Path | None:
        folder = self.some_folder()
        files = sorted(entry for entry in folder.iterdir() if entry.is_file())
        return self.random.choice(files) if files else None

    def make(self) -> None:
        (self.some_folder() / self.name()).write_text("x" * 64 * self.number)

    def change(self) -> None:
        if file := self.some_file():
            with file.open("a") as opened:
                opened.write("y")

    def meta(self) -> None:
        if file := self.some_file():
            file.chmod(self.random.choice([0o600, 0o640, 0o755]))

    def link(self) -> None:
        if file := self.some_file():
            os.link(file, self.some_folder() / self.name())

    def folder(self) -> None:
        made = self.some_folder() / self.name()
        made.mkdir()
        self.folders.append(made)

    def move(self) -> None:
        if file := self.some_file():
            over = self.some_file() if self.random.random() < 0.3 else None
            file.rename(over or self.some_folder() / self.name())

    def move_folder(self) -> None:
        folder, target = self.some_folder(), self.some_folder()
        if folder != self.root and not target.is_relative_to(folder):
            moved = target / self.name()
            folder.rename(moved)
            self.folders = [
                moved / one.relative_to(folder) if one.is_relative_to(folder) else one
                for one in self.folders
            ]

    def remove(self) -> None:
        if file := self.some_file():
            file.unlink()

    def remove_folder(self) -> None:
        folder = self.some_folder()
        if folder != self.root and self.random.random() < 0.3:
            shutil.rmtree(folder)


@pytest.mark.parametrize("seed", range(4))
def test_a_copy_by_the_lists_alone_is_equal(
    volume: LoopVolume, watch: Watch, tmp_path: Path, seed: int
) -> None:
    with LoopVolume(volume.fstype, size_mib=volume.size_mib) as copy:
        busy = Busy(volume.path, seed)
        busy.go(150)
        watched = watch(volume.path)
        pull(volume.path, copy.path, None, tmp_path)
        for _ in range(6):
            for look in (watched.journal.collect, watched.publish, watched.journal.collect):
                busy.go(15)
                look()  # a path that was looked up may be another's before it is pulled
            if seed % 2:
                drop_caches(volume.path)
            folders, why = watched.look()
            assert folders is not None, why
            pull(volume.path, copy.path, folders, tmp_path)
            watched.done()
            assert differences(volume.path, copy.path) == []
        assert watched.walks() == {}


def test_a_kernel_that_does_not_tell_targets(
    volume: LoopVolume, watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Linux 5.17: more is searched for, and a vanished hard link means a full walk."""
    monkeypatch.setattr(fanotify, "_FAN_REPORT_TARGET_FID", 1 << 30)  # EINVAL, as it was there
    (volume.path / "from/tree/x").mkdir(parents=True)
    (volume.path / "to").mkdir()
    (volume.path / "from/file").write_text("1")
    watched = watch(volume.path)
    (volume.path / "from/tree").rename(volume.path / "to/tree")
    assert watched.take() == {"from", "to", "to/tree", "to/tree/x"}
    (volume.path / "from/file").rename(volume.path / "to/file")
    assert watched.take() == {"from", "to"}
    assert watched.journal.counters.searches == 0
    os.close(write_by_handle(volume.path, "to/file"))
    assert watched.take() == {"to"}
    with LoopVolume(volume.fstype, size_mib=volume.size_mib) as copy:
        busy = Busy(volume.path, 3)
        busy.go(100)
        pull(volume.path, copy.path, None, tmp_path)
        for _ in range(6):
            busy.go(30)
            pull(volume.path, copy.path, watched.look()[0], tmp_path)
            watched.done()
            assert differences(volume.path, copy.path) == []


def test_a_copy_made_while_a_client_writes_becomes_equal(
    volume: LoopVolume, watch: Watch, tmp_path: Path
) -> None:
    """Passes run into renames and deletions; one that was not clean is not acknowledged."""
    stop = threading.Event()
    busy = Busy(volume.path, 7)

    def write() -> None:
        while not stop.is_set():
            busy.go(5)
            time.sleep(0.01)

    with LoopVolume(volume.fstype, size_mib=volume.size_mib) as copy:
        busy.go(150)
        watched = watch(volume.path)
        pull(volume.path, copy.path, None, tmp_path)
        writer = threading.Thread(target=write)
        writer.start()
        clean = 0
        try:
            for _ in range(15):
                folders, why = watched.look()
                assert folders is not None, why
                with contextlib.suppress(subprocess.CalledProcessError):
                    pull(volume.path, copy.path, folders, tmp_path)
                    watched.done()
                    clean += 1
        finally:
            stop.set()
            writer.join()
        pull(volume.path, copy.path, watched.look()[0], tmp_path)
        assert clean > 0
        assert watched.walks() == {}
        assert differences(volume.path, copy.path) == []


# ---- under a real NFS server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NfsServer]:
    disks = make_disks(tmp_path, ("server",), ("volume",), size_mib=64)
    place = Place("server", f"changes-{os.getpid()}", tmp_path / "server", disks["server"])
    try:
        place.make_namespace().ip("link", "set", "lo", "up")
        place.boot()
        yield NfsServer(place, ["/nfs/volume"])
    finally:
        place.remove()


def test_writes_by_nfs_with_cold_caches(server: NfsServer, watch: Watch) -> None:
    root = server.place.path("/nfs/volume")
    (root / "a/b").mkdir(parents=True)
    (root / "a/b/by-path").write_text("1")
    (root / "a/b/held").write_text("1")
    server.start()
    watched = watch(root)

    def steps() -> Iterator[str]:
        mount = nfs_client.Mount("127.0.0.1", "/nfs/volume")
        held = mount.open("/a/b/held", os.O_RDWR)
        yield "opened"
        mount.put("/a/b/by-path", 0, b"by path")
        yield "by path"
        mount.put("/a/new", 0, b"new")
        yield "made"
        mount.write(held, 0, b"by a handle kept open")
        mount.close_handle(held)
        yield "by handle"
        mount.unlink("/a/new")
        yield "removed"
        mount.close()

    expected = {"opened": set(), "by path": {"a/b"}, "made": {"a"}, "by handle": {"a/b"},
                "removed": {"a"}}  # fmt: skip
    going = steps()
    for _ in expected:
        drop_caches(root)
        step = server.place.inside(lambda: next(going))
        assert watched.take() == expected[step], step
    assert watched.walks() == {}


# ---- what it costs

_WRITER = """
import os, sys, time
root, seconds = sys.argv[1], float(sys.argv[2])
begun, done = time.monotonic(), 0
while (now := time.monotonic() - begun) < seconds:
    while done < now * 1000:
        folder, turn, kind = f"{root}/d{done % 100}", done // 100, done // 100 % 10
        if kind == 8:
            os.rename(f"{folder}/f{turn - 1}", f"{folder}/r{turn - 1}")
        elif kind == 9:
            os.unlink(f"{folder}/r{turn - 2}")
        else:
            with open(f"{folder}/f{turn}", "w") as file:
                file.write("hello")
        done += 1
    time.sleep(0.005)
"""


def test_a_thousand_changes_a_second_cost_little(volume: LoopVolume, watch: Watch) -> None:
    for number in range(100):
        (volume.path / f"d{number}").mkdir()
    watched = watch(volume.path)
    begun, used = time.monotonic(), cpu_s()
    argv = [sys.executable, "-c", _WRITER, str(volume.path), "4"]
    with subprocess.Popen(argv) as writer:
        while writer.poll() is None:
            time.sleep(1.0)
            watched.journal.collect()
        watched.take()
    share = (cpu_s() - used) / (time.monotonic() - begun)
    counted = watched.journal.counters
    print(f"{share:.2%} of a core, {counted}")
    assert writer.returncode == 0
    assert counted.events > 3500
    assert share < 0.03
    assert watched.walks() == {}


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

"""The quarantine on real filesystems: everything comes back equal, whatever is odd, full or cut."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nfsha.core.model import Epoch, Role
from nfsha.replica.files import beneath
from nfsha.replica.quarantine.quarantine import MAX_NAMES, STORE, Entry, Quarantine, QuarantineError
from tests.netns.namespaces import run
from tests.netns.treewalk import acl, differences, make_odd_tree
from tests.netns.volumekit import LoopVolume

EPOCH = Epoch(7, "0123456789abcdef", Role.PRIMARY)


@pytest.fixture(params=["ext4", "xfs"])
def volume(request: pytest.FixtureRequest) -> Iterator[LoopVolume]:
    with LoopVolume(request.param) as volume:
        yield volume


@pytest.fixture
def ext4() -> Iterator[LoopVolume]:
    with LoopVolume("ext4") as volume:
        yield volume


@contextlib.contextmanager
def opened(volume: LoopVolume) -> Iterator[Quarantine]:
    fd = os.open(volume.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield Quarantine(fd)
    finally:
        os.close(fd)


def begin(store: Quarantine) -> Entry:
    return store.begin("resync", why="a test", epoch=EPOCH, operation="test", by="pytest")


def files_below(root: Path, folder: Path) -> list[bytes]:
    found = []
    for here, folders, names in os.walk(os.fsencode(folder)):
        links = [
            name for name in folders if Path(os.fsdecode(here), os.fsdecode(name)).is_symlink()
        ]
        paths = (here + b"/" + name for name in names + links)
        found += [path.removeprefix(os.fsencode(root) + b"/") for path in paths]
    return found


def keep_all(store: Quarantine, entry: Entry, names: list[bytes]) -> None:
    for start in range(0, len(names), MAX_NAMES):
        kept = store.keep(entry, names[start : start + MAX_NAMES])
        assert kept.refused == ()


def remove_empty_folders(root: Path) -> None:
    """Without a change of the times of those that stay."""
    for folder, _, _ in os.walk(root, topdown=False):
        parent = Path(folder).parent.stat()
        with contextlib.suppress(OSError):
            Path(folder).rmdir()
            os.utime(Path(folder).parent, ns=(parent.st_atime_ns, parent.st_mtime_ns))


@pytest.mark.parametrize("volume", ["ext4", "xfs", "btrfs"], indirect=True)
def test_everything_odd_goes_in_and_comes_back_equal(volume: LoopVolume) -> None:
    data, reference = volume.path / "data", volume.path / "reference"
    make_odd_tree(data)
    run("cp", "-a", str(data), str(reference))
    assert differences(reference, data) == []
    remove_empty_folders(reference)
    names = files_below(volume.path, data)
    with opened(volume) as store:
        entry = begin(store)
        keep_all(store, entry, names)
        done = store.finish(entry)
        assert done is not None and done.files == len(names)
        shutil.rmtree(data)
        pages = []
        after = None
        while True:
            page = store.show(entry.name, after=after, limit=500)
            pages += [item.name for item in page.items if item.kind != "folder"]
            after = page.items[-1].name
            if not page.more:
                break
        assert sorted(pages) == sorted(names)
        result = store.restore(entry.name)
        assert (result.files, result.refused, result.emptied) == (len(names), (), True)
    assert differences(reference, data) == []
    assert list((volume.path / STORE).iterdir()) == []


def test_rsync_puts_what_it_replaces_into_an_entry(volume: LoopVolume, tmp_path: Path) -> None:
    """A resync: what it overwrites and deletes is in the entry, as it was."""
    source, before, copy = tmp_path / "source", tmp_path / "before", volume.path / "d"
    make_odd_tree(copy, many=50)
    for place in (source / "d", before):
        place.parent.mkdir(exist_ok=True)
        run("cp", "-a", str(copy), str(place))
    (source / "d/kinds/large").write_bytes(b"new content")
    shutil.rmtree(source / "d/names")
    shutil.rmtree(source / "d/links")
    shutil.rmtree(source / "d/links elsewhere")
    with opened(volume) as store:
        entry = begin(store)
        run("rsync", "-aHAXS", "--numeric-ids", "--delete", "--modify-window=-1",
            "--filter=-x trusted.SGI_ACL_*", "--filter=-x system.*",
            "--exclude=/.nfsha-quarantine", "--exclude=/lost+found",
            "--backup", f"--backup-dir={entry.backup_dir}",
            f"{source}/", f"{volume.path}/")  # fmt: skip
        done = store.finish(entry)
        assert done is not None and done.complete
        assert differences(source / "d", copy) == []
        assert store.restore(entry.name, to=b"back").refused == ()
    back = volume.path / "back" / "d"
    assert (back / "kinds/large").read_bytes() == (before / "kinds/large").read_bytes()
    for folder in ("names", "links", "links elsewhere"):
        remove_empty_folders(before / folder)
    (before / "kinds").rename(before.parent / "kinds")
    (back / "kinds/large").unlink()
    (back / "kinds").rmdir()
    for folder in ("modes", "times", "attributes", "sparse", "folders"):
        shutil.rmtree(before / folder)
    found = differences(before, back)
    # What rsync makes in its backup folder has not the times that the folders had.
    assert [one for one in found if "mtime" not in one] == []


def test_a_restore_gives_folders_their_owner_mode_acl_and_times(volume: LoopVolume) -> None:
    top = volume.path / "top"
    inner = top / "inner"
    inner.mkdir(parents=True)
    (inner / "file").write_text("content")
    for folder, number in ((inner, 1), (top, 2)):
        os.setxattr(folder, "user.number", b"%d" % number)
        os.setxattr(folder, "system.posix_acl_access", acl(rwx=7, user=(4711, 5), mask=5, other=0))
        os.setxattr(folder, "system.posix_acl_default", acl(rwx=7, user=(4712, 7), mask=7, other=5))
        os.chown(folder, 1000 + number, 2000 + number)
        folder.chmod(0o3750)
        os.utime(folder, ns=(0, 1_234_567_890_123_456_789 + number))
    reference = volume.path / "reference"
    run("cp", "-a", str(top), str(reference))
    os.setxattr(volume.path, "system.posix_acl_default",
                acl(rwx=7, user=(4713, 7), mask=7, other=7))  # fmt: skip
    volume.path.chmod(0o2777)
    with opened(volume) as store:
        entry = begin(store)
        keep_all(store, entry, [b"top/inner/file"])
        store.finish(entry)
        shutil.rmtree(top)
        for folder in (volume.path / STORE, volume.path / STORE / entry.name):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and folder.stat().st_gid == 0
            assert [name for name in os.listxattr(folder) if "acl" in name.lower()] == []
        store.restore(entry.name)
    assert differences(reference, top) == []


def test_nobody_but_root_sees_what_is_kept(ext4: LoopVolume) -> None:
    ext4.path.chmod(0o777)
    (ext4.path / "secret").write_text("content")
    (ext4.path / "secret").chmod(0o666)
    with opened(ext4) as store:
        entry = begin(store)
        keep_all(store, entry, [b"secret"])
    path = ext4.path / entry.backup_dir / "secret"
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    done = subprocess.run([*nobody, "cat", path], capture_output=True, check=False)
    assert done.returncode != 0 and b"Permission denied" in done.stderr


_SWAP = """
import contextlib, os, sys
while True:
    with contextlib.suppress(OSError):
        os.rename("d", "e")
    with contextlib.suppress(OSError):
        os.symlink(sys.argv[1], "d")
    with contextlib.suppress(OSError):
        os.unlink("d")
    with contextlib.suppress(OSError):
        os.rename("e", "d")
"""


def test_a_client_that_swaps_folders_for_links_gets_nothing_written_outside(
    ext4: LoopVolume, tmp_path: Path
) -> None:
    """For two seconds, restores and keeps race a client that owns the folders."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "other").mkdir()
    open_to_all = ext4.path / "open"
    (open_to_all / "d").mkdir(parents=True)
    names = [f"open/d/file{number}".encode() for number in range(20)]
    for name in names:
        (ext4.path / os.fsdecode(name)).write_bytes(name)
    for folder in (open_to_all, open_to_all / "d"):
        folder.chmod(0o777)
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    attacker = subprocess.Popen(
        [*nobody, sys.executable, "-c", _SWAP, str(outside)], cwd=open_to_all
    )
    kept = moved = refused = 0
    try:
        with opened(ext4) as store:
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline:
                entry = begin(store)
                result = store.keep(entry, names)
                kept += len(result.names)
                refused += len(result.refused)
                store.finish(entry)
                for one in store.list().entries:
                    back = store.restore(one.name, beside=True)
                    moved += back.files
                    refused += back.refused_count
    finally:
        attacker.kill()
        attacker.wait(5)
    assert kept > 20 and moved > 20 and refused > 0, (kept, moved, refused)
    assert [path.name for path in outside.iterdir()] == ["other"]
    content = [
        Path(folder, name).read_bytes() for folder, _, files in os.walk(ext4.path)
        for name in files if name.startswith("file")
    ]  # fmt: skip
    assert sorted(content) == sorted(names)  # each file exactly once, wherever it is


@pytest.mark.parametrize("work", ["keep", "keep in place", "finish", "restore", "drop"])
def test_killed_before_any_step_each_file_is_in_one_place(ext4: LoopVolume, work: str) -> None:
    names = [f"folder{number % 3}/deep/file{number}".encode() for number in range(7)]
    for step in itertools.count():
        for name in names:
            path = ext4.path / os.fsdecode(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name)
        with opened(ext4) as store:
            entry = begin(store)
            if not work.startswith("keep"):
                keep_all(store, entry, names)
            if work in ("restore", "drop"):
                store.finish(entry)
                for number in range(3):
                    shutil.rmtree(ext4.path / f"folder{number}")
            cut = _cut_before(step, lambda: _work(store, work, entry, names))  # noqa: B023
        with opened(ext4) as store:  # the next life
            _check_after_cut(ext4, store, work, names)
        if not cut:
            assert step >= 6
            return


def _work(store: Quarantine, work: str, entry: Entry, names: list[bytes]) -> None:
    match work:
        case "keep" | "keep in place":
            store.keep(entry, names, in_place=work != "keep")
        case "finish":
            store.finish(entry)
        case "restore":
            store.restore(entry.name)
        case _:
            store.drop(entry.name, confirm=entry.name)


_STEPS = ("mkdir", "rename", "link", "unlink", "rmdir", "fsync", "utime", "fchmod", "setxattr")


def _cut_before(step: int, act: Callable[[], None]) -> bool:
    """Runs it in a forked process that is killed before its `step`th change; True if it was."""
    pid = os.fork()
    if pid == 0:
        left = itertools.count(step, -1)

        def counted(change: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **options: object) -> object:
                if next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*args, **options)

            return call

        for name in _STEPS:
            setattr(os, name, counted(getattr(os, name)))
        for name in ("rename_noreplace", "sync_filesystem"):
            setattr(beneath, name, counted(getattr(beneath, name)))
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def _check_after_cut(volume: LoopVolume, store: Quarantine, work: str, names: list[bytes]) -> None:
    entries = store.list().entries
    here = _names_at(volume.path, names)
    aside = set[bytes]().union(*(_names_at(volume.path / one.backup_dir, names) for one in entries))
    if work == "drop":
        assert not here and aside in (set(), set(names))  # listed whole, or not at all
    elif work == "keep in place":
        assert here == set(names)
    else:
        assert here | aside == set(names) and not here & aside
    for one in entries:
        restored = store.restore(one.name, beside=work == "keep in place")
        assert restored.refused_count == 0
    store.finish(begin(store))  # sweeps up
    assert [path.name for path in (volume.path / STORE).iterdir()] == []
    if work != "drop":
        for name in names:
            assert (volume.path / os.fsdecode(name)).read_bytes() == name


def _names_at(root: Path, names: list[bytes]) -> set[bytes]:
    return {name for name in names if (root / os.fsdecode(name)).exists()}


def test_a_full_volume_loses_nothing_and_says_so(ext4: LoopVolume) -> None:
    (ext4.path / "a").mkdir()
    names = [f"a/file{number}".encode() for number in range(50)]
    for name in names:
        (ext4.path / os.fsdecode(name)).write_bytes(name)
    with opened(ext4) as store:
        entry = begin(store)
        keep_all(store, entry, names[:25])
        done = store.finish(entry)
        for fill in (ext4.fill, ext4.fill_inodes):
            filler = fill()
            with pytest.raises(QuarantineError, match="No space left on device"):
                begin(store)
            assert [path.name for path in (ext4.path / STORE).iterdir()] == [entry.name]
            assert store.list().entries == (done,)
            if filler.is_dir():
                shutil.rmtree(filler)
            else:
                filler.unlink()
        assert store.restore(entry.name).files == 25
    assert all((ext4.path / os.fsdecode(name)).read_bytes() == name for name in names)


def test_a_read_only_volume_can_be_looked_at(volume: LoopVolume) -> None:
    (volume.path / "file").write_text("content")
    with opened(volume) as store:
        entry = begin(store)
        keep_all(store, entry, [b"file"])
        store.finish(entry)
    volume.remount_ro()
    with opened(volume) as store:
        assert [one.name for one in store.list().entries] == [entry.name]
        assert [item.name for item in store.show(entry.name).items] == [b"file"]
        assert store.usage().files == 1
        for act in (
            lambda: begin(store),
            lambda: store.restore(entry.name),
            lambda: store.drop(entry.name, confirm=entry.name),
        ):
            with pytest.raises(QuarantineError, match="Read-only file system"):
                act()
    volume.remount_rw()


def test_what_nfsha_did_not_make_is_refused(ext4: LoopVolume) -> None:
    with opened(ext4) as store:
        begin(store)
        os.chown(ext4.path / STORE, 1000, 1000)
        with pytest.raises(QuarantineError, match="belongs to user 1000"):
            begin(store)
        os.chown(ext4.path / STORE, 0, 0)
        run("mount", "-t", "tmpfs", "tmpfs", str(ext4.path / STORE))
        try:
            acts: tuple[Callable[[], object], ...] = (lambda: begin(store), store.list)
            for act in acts:
                with pytest.raises(QuarantineError, match="another filesystem is mounted there"):
                    act()
        finally:
            run("umount", str(ext4.path / STORE))


def test_a_volume_mounted_inside_is_not_reached(ext4: LoopVolume) -> None:
    inner = ext4.path / "inner"
    inner.mkdir()
    with opened(ext4) as store:
        (inner / "file").write_text("below the mount")
        entry = begin(store)
        keep_all(store, entry, [b"inner/file"])
        run("mount", "-t", "tmpfs", "tmpfs", str(inner))
        try:
            (inner / "other").write_text("another volume's")
            refused = store.keep(entry, [b"inner/other"]).refused
            assert [one.why for one in refused] == ["another filesystem is mounted there"]
            result = store.restore(entry.name)
            assert result.files == 0 and result.refused_count == 1
            assert sorted(path.name for path in inner.iterdir()) == ["other"]
        finally:
            run("umount", str(inner))
        assert store.restore(entry.name).files == 1
    assert (inner / "file").read_text() == "below the mount"


def test_the_limit_of_names_for_one_file_is_no_hindrance(ext4: LoopVolume) -> None:
    """At 65,000 names ext4 gives no further one: then the file moves instead."""
    first = ext4.path / "first"
    first.write_text("content")
    (ext4.path / "many").mkdir()
    with contextlib.suppress(OSError):
        for number in itertools.count():
            os.link(first, ext4.path / "many" / str(number))
    with opened(ext4) as store:
        entry = begin(store)
        assert store.keep(entry, [b"first"], in_place=True).names == (b"first",)
    assert not first.exists()
    assert (ext4.path / entry.backup_dir / "first").read_text() == "content"


def test_ten_thousand_files_in_one_entry_are_quick(volume: LoopVolume) -> None:
    folder = volume.path / "many"
    folder.mkdir()
    names = [f"many/{number}".encode() for number in range(10_000)]
    for name in names:
        (volume.path / os.fsdecode(name)).touch()
    began = time.process_time()
    with opened(volume) as store:
        entry = begin(store)
        keep_all(store, entry, names)
        assert store.finish(entry) is not None
        assert store.restore(entry.name).files == 10_000
    assert len(list(folder.iterdir())) == 10_000
    assert time.process_time() - began < 10

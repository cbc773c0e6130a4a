"""Passes against a real rsync daemon, on real filesystems, compared by an independent walk."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from nfsha.core.model import Epoch, Role
from nfsha.replica.fetching.control import fetch_control
from nfsha.replica.passes import filling
from nfsha.replica.passes.pull import Pull
from nfsha.replica.passes.request import PassOutcome
from nfsha.replica.rsync.arguments import Course, From, folder_list
from nfsha.replica.rsync.child import Priority
from nfsha.replica.rsync.exits import Ending, Verdict
from nfsha.replica.rsync.progress import Progress, Stage
from nfsha.replica.source.source import Source, SourceVolume, epoch_token
from tests.netns.namespaces import run
from tests.netns.pullkit import (
    UUID,
    PlainSource,
    ask,
    clock_ms,
    free_port,
    limits,
    pull,
    root,
    small_disk,
)
from tests.netns.treewalk import ODD_NAMES, differences, make_odd_tree
from tests.netns.volumekit import LoopVolume, make_volume

__all__ = ["make_volume"]


@dataclass
class Pair:
    """Two folders and a daemon between them."""

    source: Path
    target: Path
    scratch: Path
    daemon: PlainSource
    known_files: int = 0

    def full(self, **changes: Any) -> PassOutcome:
        outcome = self.any_pass(folders=None, **changes)
        self.known_files = outcome.files
        return outcome

    def first(self) -> None:
        outcome = self.full(limits=limits(target_empty=True))
        assert outcome.verdict is Verdict.COMPLETE, outcome
        assert self.differences() == []

    def listed(self, *folders: bytes, **changes: Any) -> PassOutcome:
        """A folder pass; the source's journal names the parents of all that changed."""
        return self.any_pass(folders=folders, **changes)

    def any_pass(self, **changes: Any) -> PassOutcome:
        mine = {"limits": limits(known_files=self.known_files)}
        return pull(self.daemon, self.target, self.scratch, **(mine | changes))

    def differences(self) -> list[str]:
        return differences(self.source, self.target)


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    with small_disk() as path:
        yield path


@pytest.fixture
def pair(disk: Path, tmp_path: Path) -> Iterator[Pair]:
    home = Path(tempfile.mkdtemp(dir=disk))
    source, target, scratch = home / "source", home / "target", tmp_path / "scratch"
    for folder in (source, target, scratch):
        folder.mkdir()
    with PlainSource(tmp_path / "daemon", {UUID: source}) as daemon:
        yield Pair(source, target, scratch, daemon)
    assert list(scratch.iterdir()) == []
    shutil.rmtree(home)


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# --- equality ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("here", "there"), [("ext4", "ext4"), ("xfs", "xfs"), ("ext4", "xfs")])
def test_everything_arrives_equal_by_a_full_walk(
    make_volume: Callable[..., LoopVolume], tmp_path: Path, here: str, there: str
) -> None:
    source, target = make_volume(here), make_volume(there)
    make_odd_tree(source.path / "odd")
    with PlainSource(tmp_path / "source", {UUID: source.path}) as daemon:
        outcome = pull(daemon, target.path, tmp_path, limits=limits(target_empty=True))
        assert outcome.verdict is Verdict.COMPLETE, outcome
        assert differences(source.path, target.path) == []
        again = pull(daemon, target.path, tmp_path, limits=limits(known_files=outcome.files))
    assert (again.verdict, again.transferred_files) == (Verdict.COMPLETE, 0), again
    assert again.files == outcome.files
    assert not (target.path / ".nfsha-incoming").exists()


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_everything_arrives_equal_by_folders(
    make_volume: Callable[..., LoopVolume], tmp_path: Path, fstype: str
) -> None:
    source, target = make_volume(fstype), make_volume(fstype)
    make_odd_tree(source.path / "odd")
    every = tuple(folders_of(source.path))
    with PlainSource(tmp_path / "source", {UUID: source.path}) as daemon:
        outcome = pull(daemon, target.path, tmp_path, folders=every)
        assert outcome.verdict is Verdict.COMPLETE, outcome
        assert differences(source.path, target.path) == []
        again = pull(daemon, target.path, tmp_path, folders=every)
    assert again.sentence == "data: nothing differed"
    assert outcome.files == 1 + sum(1 for _ in (source.path / "odd").rglob("*"))


def folders_of(top: Path) -> Iterator[bytes]:
    for folder, _, _ in os.walk(os.fsencode(top)):
        yield os.path.relpath(folder, os.fsencode(top))


def test_same_size_same_second_other_nanoseconds_is_copied(pair: Pair) -> None:
    file = write(pair.source / "a" / "file", "old")
    os.utime(file, ns=(0, 1_700_000_000_000_000_001))
    pair.first()
    file.write_text("new")
    os.utime(file, ns=(0, 1_700_000_000_000_000_002))
    assert pair.full().transferred_files == 1
    assert pair.differences() == []
    file.write_text("two")
    os.utime(file, ns=(0, 1_700_000_000_000_000_003))
    assert pair.listed(b"a").transferred_files == 1
    assert pair.differences() == []


def test_checksums_find_what_size_and_time_hide(pair: Pair) -> None:
    file = write(pair.source / "file", "old")
    pair.first()
    before = file.stat().st_mtime_ns
    file.write_text("new")
    os.utime(file, ns=(0, before))
    assert pair.full().transferred_files == 0
    assert pair.full(checksum=True).transferred_files == 1
    assert pair.differences() == []


# --- one walk, and what is reported --------------------------------------------------------------


def stages_of(pair: Pair, **changes: Any) -> tuple[PassOutcome, list[Stage]]:
    seen: list[Progress] = []
    outcome = pair.any_pass(progress=seen.append, **changes)
    return outcome, [each.stage for each in seen]


def test_a_pass_without_change_is_one_walk(pair: Pair) -> None:
    write(pair.source / "a" / "file")
    pair.first()
    outcome, stages = stages_of(pair)
    assert outcome.verdict is Verdict.COMPLETE
    assert Stage.COPY not in stages
    assert connections(pair) == 2  # the first pass copied at once, this one planned


def test_deletions_alone_need_no_second_walk(pair: Pair) -> None:
    for number in range(20):
        write(pair.source / "a" / f"{number}")
    pair.first()
    (pair.source / "a" / "7").unlink()
    outcome, stages = stages_of(pair)
    assert (outcome.verdict, outcome.deletions) == (Verdict.COMPLETE, 1)
    assert Stage.COPY not in stages
    assert pair.differences() == []


def connections(pair: Pair) -> int:
    return (pair.daemon.folder / "log").read_text().count("rsync on v-")


@pytest.mark.parametrize("folders", [None, (b".", b"a")])
def test_what_was_planned_is_asked_for_by_name(
    pair: Pair, folders: tuple[bytes, ...] | None
) -> None:
    for number in range(2000):
        write(pair.source / "a" / f"{number}")
    pair.first()
    calm = pair.any_pass(folders=folders).wire_bytes
    write(pair.source / "a" / "7", "other")
    write(pair.source / "a" / "new" / "deep" / "file")
    pair.source.chmod(0o750)
    outcome = pair.any_pass(folders=folders)
    assert (outcome.verdict, outcome.transferred_files) == (Verdict.COMPLETE, 1 + (not folders))
    assert outcome.wire_bytes < calm * 1.1
    assert pair.full().verdict is Verdict.COMPLETE
    assert pair.differences() == []


@pytest.mark.parametrize("folders", [None, (b".", b"a")])
def test_what_has_another_name_since_the_plan_is_copied_all_the_same(
    pair: Pair, folders: tuple[bytes, ...] | None
) -> None:
    """It may have been changed before the pass began: then its content has to come with it."""
    write(pair.source / "a" / "old", "before")
    pair.first()
    write(pair.source / "a" / "old", "changed")
    write(pair.source / "keep")

    def rename(news: Progress) -> None:
        if news.stage is Stage.COPY and (pair.source / "a" / "old").exists():
            (pair.source / "a" / "old").rename(pair.source / "a" / "new")

    assert pair.any_pass(folders=folders, progress=rename).verdict is Verdict.COMPLETE
    assert (pair.target / "a" / "new").read_text() == "changed"


def test_a_new_link_to_a_file_that_is_not_new(pair: Pair) -> None:
    """Rsync makes it only when both names are in its list, and the plan names the new one alone."""
    old = write(pair.source / "a" / "old")
    write(pair.source / "a" / "other")
    pair.first()
    (pair.source / "a" / "new").hardlink_to(old)
    assert pair.listed(b"a").verdict is Verdict.COMPLETE
    assert pair.differences() == []
    write(old, "changed")
    assert pair.listed(b"a").verdict is Verdict.COMPLETE
    assert pair.differences() == []
    (pair.target / "a" / "new").unlink()
    shutil.copy2(pair.target / "a" / "old", pair.target / "a" / "new")
    write(pair.source / "a" / "other", "changed")
    assert pair.listed(b"a").verdict is Verdict.COMPLETE
    assert pair.differences() == []


def test_counts_are_those_of_the_trees(pair: Pair) -> None:
    for number in range(20):
        write(pair.source / "a" / f"{number}", "x" * 100)
    pair.first()
    assert pair.known_files == 21
    (pair.source / "a" / "3").unlink()
    write(pair.source / "a" / "4", "y" * 1000)
    write(pair.source / "b" / "new", "z" * 10)
    outcome = pair.listed(b".", b"a", b"b")
    assert outcome.transferred_files == 2
    assert outcome.transferred_bytes == 1010
    assert outcome.deletions == 1
    assert outcome.files == 22
    assert outcome.plan is not None
    assert outcome.plan.names == (b"a/3",)
    assert 1010 < outcome.wire_bytes < 20_000
    assert outcome.sentence == "data: copied 2 files (1010 bytes), deleted 1"
    assert pair.full().files == 22


def test_progress_knows_the_total_of_the_plan_and_an_eta(pair: Pair) -> None:
    write(pair.source / "small")
    pair.first()
    (pair.source / "large").write_bytes(os.urandom(3 << 20))
    seen: list[Progress] = []
    outcome = pair.full(progress=seen.append, bandwidth_kib_s=1500)
    assert outcome.verdict is Verdict.COMPLETE
    copying = [each for each in seen if each.stage is Stage.COPY]
    assert {each.total_bytes for each in copying} == {3 << 20}
    assert any(each.eta_s and each.rate_bytes_s and 0 < (each.percent or 0) < 100
               for each in copying)  # fmt: skip
    assert seen[0].stage is Stage.PLAN
    assert seen[-1].stage is Stage.CHECK
    assert sorted(each.bytes for each in copying) == [each.bytes for each in copying]


def test_a_first_copy_tells_how_the_filesystem_fills_and_writes_it_out_meanwhile(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[float] = []
    monkeypatch.setattr(filling, "SYNC_FROM_BYTES", 1)
    monkeypatch.setattr(filling, "sync_filesystem", lambda _: synced.append(time.monotonic()))
    (pair.source / "large").write_bytes(os.urandom(3 << 20))
    seen: list[Progress] = []
    outcome = pair.full(
        limits=limits(target_empty=True),
        expected_bytes=3 << 20,
        bandwidth_kib_s=1500,
        progress=seen.append,
    )
    assert outcome.verdict is Verdict.COMPLETE, outcome
    copying = [each for each in seen if each.stage is Stage.COPY]
    assert any(each.eta_s and each.rate_bytes_s and 0 < (each.percent or 0) < 100
               for each in copying)  # fmt: skip
    assert copying[-1].bytes >= 3 << 20
    assert synced[-1] - synced[0] > 0.5  # of 2 s that it takes
    assert pair.differences() == []


def test_a_first_copy_that_was_cut_goes_on_where_it_was(pair: Pair) -> None:
    (pair.source / "large").write_bytes(os.urandom(3 << 20))

    far_enough = asyncio.Event()

    def look(news: Progress) -> None:
        if news.bytes > 1 << 20:
            far_enough.set()

    async def cut(one: Pull) -> None:
        await far_enough.wait()
        await one.end()

    outcome = pair.full(
        limits=limits(target_empty=True), bandwidth_kib_s=1000, progress=look, meanwhile=cut
    )
    assert outcome.verdict is Verdict.KILLED, outcome
    assert 0 < (pair.target / "large").stat().st_size < 3 << 20
    assert pair.full().wire_bytes < 11 << 18  # of 12
    assert pair.differences() == []


def test_an_empty_replica_never_shows_what_is_half_received(pair: Pair) -> None:
    """A volume without files is a replica too: it may be served in the middle of a pass."""
    (pair.source / "large").write_bytes(os.urandom(1 << 20))
    seen: set[str] = set()
    begun = asyncio.Event()

    def told(news: Progress) -> None:
        if news.bytes > 100_000:
            begun.set()

    async def look(one: Pull) -> None:
        await begun.wait()
        seen.update(path.name for path in pair.target.iterdir())
        await one.end()

    outcome = pair.full(
        limits=limits(target_empty=True), is_replica=True, bandwidth_kib_s=200,
        meanwhile=look, progress=told,
    )  # fmt: skip
    assert outcome.verdict is Verdict.KILLED, outcome
    seen.update(path.name for path in pair.target.iterdir())
    assert seen <= {".nfsha-incoming", ".nfsha-partial"}, seen
    assert pair.full().verdict is Verdict.COMPLETE
    assert pair.differences() == []


@pytest.mark.parametrize(("priority", "nice"), [(Priority.LOW, 10), (Priority.NORMAL, 0)])
def test_rsync_competes_as_it_was_asked_to(pair: Pair, priority: Priority, nice: int) -> None:
    (pair.source / "large").write_bytes(os.urandom(1 << 20))
    begun = asyncio.Event()
    seen: list[int] = []

    async def look(one: Pull) -> None:
        await begun.wait()
        seen.extend(
            child.nice()
            for child in psutil.Process().children(recursive=True)
            if child.name() == "rsync" and str(pair.daemon.port) in " ".join(child.cmdline())
            and "--daemon" not in child.cmdline()
        )  # fmt: skip
        await one.end()

    pair.full(
        limits=limits(target_empty=True), is_replica=True, bandwidth_kib_s=200, priority=priority,
        meanwhile=look, progress=lambda news: begun.set() if news.bytes > 100_000 else None,
    )  # fmt: skip
    assert set(seen) == {nice}


def test_another_bandwidth_takes_hold_while_it_copies(pair: Pair) -> None:
    (pair.source / "large").write_bytes(os.urandom(6 << 20))

    async def faster(one: Pull) -> None:
        await asyncio.sleep(1.0)
        await one.limit_bandwidth(None)

    seen: list[Progress] = []
    outcome = pair.full(
        limits=limits(target_empty=True),
        expected_bytes=6 << 20,
        bandwidth_kib_s=500,
        meanwhile=faster,
        progress=seen.append,
    )
    assert 6 << 20 in {each.total_bytes for each in seen if each.stage is Stage.COPY}
    assert outcome.verdict is Verdict.COMPLETE, outcome
    assert outcome.seconds < 6  # 12 at the first limit
    assert pair.differences() == []


# --- folders, one level deep ---------------------------------------------------------------------


def test_only_the_listed_folders_are_looked_at(pair: Pair) -> None:
    for name in ("a/file", "a/deep/file", "b/file"):
        write(pair.source / name)
    pair.first()
    for name in ("a/file", "a/deep/file", "b/file"):
        write(pair.source / name, "other")
    assert pair.listed(b"a").transferred_files == 1
    assert (pair.target / "a" / "deep" / "file").read_text() == "x"
    assert pair.listed(b"a/deep", b"b").transferred_files == 2
    assert pair.differences() == []


def test_deletions_inside_a_listed_folder(pair: Pair) -> None:
    for name in ("a/keep", "a/gone", "a/below/file", "other/file"):
        write(pair.source / name)
    pair.first()
    (pair.source / "a" / "gone").unlink()
    shutil.rmtree(pair.source / "a" / "below")
    outcome = pair.listed(b"a")
    assert (outcome.verdict, outcome.deletions) == (Verdict.COMPLETE, 3)
    assert pair.differences() == []


@pytest.mark.parametrize("listed", [(b".", b"a", b"a/below"), (b".", b"a/below"), (b".",)])
def test_a_listed_folder_that_is_gone(pair: Pair, listed: tuple[bytes, ...]) -> None:
    for name in ("a/file", "a/below/file", "other"):
        write(pair.source / name)
    pair.first()
    shutil.rmtree(pair.source / "a")
    outcome = pair.listed(*listed)
    assert (outcome.verdict, outcome.deletions) == (Verdict.COMPLETE, 4), outcome
    assert pair.differences() == []


def test_a_folder_that_goes_after_it_was_listed_waits_for_its_parent(pair: Pair) -> None:
    """Its removal is a change of the parent, which then is in the next list."""
    for name in ("a/file", "a/below/file", "other"):
        write(pair.source / name)
    pair.first()
    shutil.rmtree(pair.source / "a")
    outcome = pair.listed(b"a", b"a/below")
    assert (outcome.verdict, outcome.deletions) == (Verdict.COMPLETE, 0), outcome
    assert pair.listed(b".").deletions == 4
    assert pair.differences() == []


def test_a_renamed_folder(pair: Pair) -> None:
    for name in ("a/old/file", "a/old/below/file", "keep"):
        write(pair.source / name)
    pair.first()
    (pair.source / "a" / "old").rename(pair.source / "new")
    outcome = pair.listed(b".", b"a", b"a/old", b"new", b"new/below")
    assert outcome.verdict is Verdict.COMPLETE, outcome
    assert pair.differences() == []


FILE, FOLDER, LINK, EMPTY = "file", "folder", "link", "empty"


def make(path: Path, kind: str) -> None:
    path.parent.mkdir(exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if kind == FOLDER:
        write(path / "inside")
        write(path / "below" / "inside")
    elif kind == FILE:
        write(path)
    elif kind == LINK:
        path.symlink_to("elsewhere")
    else:
        path.mkdir()


@pytest.mark.parametrize("walk", ["full", "folders"])
@pytest.mark.parametrize(
    ("before", "after"),
    [(FOLDER, FILE), (FILE, FOLDER), (FOLDER, LINK), (LINK, FOLDER), (EMPTY, FILE), (FILE, LINK),
     (LINK, FILE)],
)  # fmt: skip
def test_something_becomes_something_else(pair: Pair, before: str, after: str, walk: str) -> None:
    write(pair.source / "elsewhere" / "file")
    make(pair.source / "a" / "thing", before)
    pair.first()
    make(pair.source / "a" / "thing", after)
    if walk == "full":
        outcome = pair.full()
    else:
        # As the journal has it: folders only, so what is a folder no more is not listed.
        own = (b"a/thing", b"a/thing/below") if after == FOLDER else ()
        outcome = pair.listed(b"a", *own)
    assert outcome.verdict is Verdict.COMPLETE, outcome
    assert pair.differences() == []


def test_a_link_on_the_copy_never_leads_out_of_it(pair: Pair, tmp_path: Path) -> None:
    outside = write(tmp_path / "outside" / "keep").parent
    write(pair.source / "a" / "b" / "file")
    write(pair.source / "other")
    (pair.target / "a").symlink_to(outside)
    outcome = pair.listed(b".", b"a", b"a/b")
    assert outcome.verdict is Verdict.COMPLETE, outcome
    assert pair.differences() == []
    assert [entry.name for entry in outside.iterdir()] == ["keep"]


def test_settling_never_leads_out_either(pair: Pair, tmp_path: Path) -> None:
    """The source changes between two runs of a pass: a folder to look into is a link by now."""
    outside = write(tmp_path / "outside" / "b" / "keep").parent.parent
    write(pair.source / "a" / "b" / "file")
    (pair.target / "a").symlink_to(outside)
    listed = pair.scratch / "list"
    listed.write_bytes(folder_list([b"a/b"]))
    course = Course(pair.daemon.where, f"v-{UUID}", f"{pair.target}/", 5, 5, None, None, False)
    password = {"RSYNC_PASSWORD": pair.daemon.login.password}
    argv = course.settle(str(listed), deletions=100)
    subprocess.run(argv, env=os.environ | password, check=False, timeout=20)
    listed.unlink()
    assert (outside / "b" / "keep").exists()


def test_a_listed_folder_that_is_a_link_at_the_source_is_followed_and_healed(pair: Pair) -> None:
    """Rsync follows a name that ends with a slash. So the journal must list real folders only.

    It does; and a folder that is replaced after that has its parent in the next list, which sets
    it right.
    """
    write(pair.source / "real" / "file")
    write(pair.source / "a" / "b" / "file")
    pair.first()
    shutil.rmtree(pair.source / "a" / "b")
    (pair.source / "a" / "b").symlink_to("../real")
    assert pair.listed(b"a", b"a/b").verdict is Verdict.COMPLETE
    assert (pair.target / "a" / "b").is_dir()
    assert not (pair.target / "a" / "b").is_symlink()
    assert pair.listed(b"a").verdict is Verdict.COMPLETE
    assert pair.differences() == []


def test_odd_names_as_listed_folders(pair: Pair) -> None:
    names = [name for name in ODD_NAMES if len(name) < 200]
    for name in names:
        write(pair.source / os.fsdecode(name) / os.fsdecode(name), "one")
    write(pair.source / "keep")
    pair.first()
    for name in names:
        write(pair.source / os.fsdecode(name) / os.fsdecode(name), "other")
        write(pair.source / os.fsdecode(name) / "new")
    outcome = pair.listed(*names)
    assert (outcome.verdict, outcome.transferred_files) == (Verdict.COMPLETE, 2 * len(names))
    assert pair.differences() == []
    for name in names:
        (pair.source / os.fsdecode(name) / os.fsdecode(name)).unlink()
    outcome = pair.listed(*names)
    assert outcome.plan is not None
    assert outcome.plan.names == tuple(sorted(name + b"/" + name for name in names))
    assert pair.differences() == []


def test_folders_of_another_volume_inside_are_left_alone(
    pair: Pair, make_volume: Callable[..., LoopVolume]
) -> None:
    write(pair.source / "a" / "file")
    pair.first()
    make_volume("ext4", at=pair.source / "inner")
    inner = make_volume("ext4", at=pair.target / "inner", size_mib=16)
    write(pair.source / "inner" / "of the inner volume")
    write(inner.path / "also there" / "file")
    for outcome in (pair.full(), pair.listed(b".", b"inner", b"inner/lost+found")):
        assert outcome.verdict is Verdict.COMPLETE, outcome
    assert not (inner.path / "of the inner volume").exists()
    assert (inner.path / "also there" / "file").exists()
    run("umount", str(pair.source / "inner"))
    (pair.source / "inner").rmdir()
    outcome = pair.full()  # the copy's inner volume is not deleted with its mount point
    assert (inner.path / "also there" / "file").exists(), outcome


def test_own_files_are_neither_sent_nor_deleted(pair: Pair) -> None:
    write(pair.source / ".nfsha-volume", "theirs")
    write(pair.source / ".nfsha-quarantine" / "theirs")
    write(pair.source / "lost+found" / "theirs")
    write(pair.source / "a" / ".nfsha-volume", "a client's")
    write(pair.target / ".nfsha-stamp", "ours")
    write(pair.target / ".nfsha-quarantine" / "ours")
    for folders in (None, (b".", b"a", b".nfsha-quarantine", b"lost+found")):
        assert pair.any_pass(folders=folders).verdict is Verdict.COMPLETE
    assert sorted(each.name for each in pair.target.iterdir()) == [
        ".nfsha-quarantine", ".nfsha-stamp", "a"
    ]  # fmt: skip
    assert [each.name for each in (pair.target / ".nfsha-quarantine").iterdir()] == ["ours"]
    assert (pair.target / "a" / ".nfsha-volume").read_text() == "a client's"


@pytest.mark.slow
def test_fifty_thousand_listed_folders(
    make_volume: Callable[..., LoopVolume], tmp_path: Path
) -> None:
    source, target = (make_volume("ext4", inodes=70_000, size_mib=400).path for _ in range(2))
    names = [b"%03d/%03d" % (outer, inner) for outer in range(200) for inner in range(250)]
    for name in names:
        (source / name.decode()).mkdir(parents=True)
    for number in range(0, len(names), 100):
        write(source / names[number].decode() / "file")
    with PlainSource(tmp_path / "daemon", {UUID: source}) as daemon:
        pair = Pair(source, target, tmp_path, daemon)
        outcome = pair.listed(*names)
        assert (outcome.verdict, outcome.transferred_files) == (Verdict.COMPLETE, 500), outcome
        again = pair.listed(*names)
    assert again.sentence == "data: nothing differed"
    assert again.seconds < 20, again  # 2 s; it would be minutes if each name met each folder
    assert pair.differences() == []


def test_hard_links_across_folders_need_a_full_walk(pair: Pair) -> None:
    """A folder pass sees one of the names only: the other keeps the old content.

    The source marks a volume for a full walk when a changed file has more than one link.
    """
    first = write(pair.source / "a" / "one", "old")
    (pair.source / "b").mkdir()
    (pair.source / "b" / "two").hardlink_to(first)
    pair.first()
    first.write_text("newer")
    pair.listed(b"a")
    assert (pair.target / "a" / "one").read_text() == "newer"
    assert (pair.target / "b" / "two").read_text() == "old"
    assert pair.full().verdict is Verdict.COMPLETE
    assert pair.differences() == []


def test_a_list_with_a_mistake_in_it_is_no_list(pair: Pair) -> None:
    write(pair.source / "a")
    pair.first()
    outcome = pair.listed(b"a/../../b")
    assert outcome.verdict is Verdict.FAILED
    assert "list of changed folders" in outcome.sentence


def test_no_changed_folder_is_no_work_at_all(pair: Pair) -> None:
    write(pair.source / "a" / "file")
    pair.first()
    assert pair.listed().verdict is Verdict.COMPLETE
    assert connections(pair) == 1


def test_a_scratch_folder_that_is_not_there(pair: Pair) -> None:
    write(pair.source / "a")
    pair.scratch.rmdir()
    outcome = pair.full()
    pair.scratch.mkdir()
    assert outcome.verdict is Verdict.FAILED
    assert f"cannot write into {pair.scratch}" in outcome.sentence


# --- deletions -----------------------------------------------------------------------------------


def many(pair: Pair, count: int) -> None:
    for number in range(count):
        write(pair.source / f"{number % 10}" / f"{number}")
    pair.first()


@pytest.mark.parametrize("walk", ["full", "folders"])
def test_too_many_deletions_are_held_and_the_rest_is_copied(pair: Pair, walk: str) -> None:
    many(pair, 1000)
    for number in range(200):
        (pair.source / f"{number % 10}" / f"{number}").unlink()
    write(pair.source / "0" / "new")
    folders = None if walk == "full" else tuple(b"%d" % each for each in range(10))
    outcome = pair.any_pass(folders=folders)
    assert outcome.verdict is Verdict.HELD, outcome
    assert outcome.deletions == 0
    assert outcome.transferred_files == 1
    assert outcome.plan is not None
    assert len(outcome.plan.names) == outcome.plan.count == 200
    assert "200 files (" in outcome.sentence
    assert "0/0) are more than 100, and more than 10 %" in outcome.sentence
    assert (pair.target / "0" / "new").exists()
    assert (pair.target / "0" / "0").exists()
    again = pair.any_pass(folders=folders)
    assert again.plan is not None
    assert again.plan.hash == outcome.plan.hash
    accepted = limits(known_files=pair.known_files, accepted_plan=outcome.plan.hash)
    done = pair.any_pass(folders=folders, limits=accepted)
    assert (done.verdict, done.deletions) == (Verdict.COMPLETE, 200), done
    assert pair.differences() == []


def test_a_plan_that_was_accepted_is_good_for_just_these_names(pair: Pair) -> None:
    many(pair, 300)
    for number in range(200):
        (pair.source / f"{number % 10}" / f"{number}").unlink()
    held = pair.full()
    assert held.plan is not None
    (pair.source / "1" / "201").unlink()
    outcome = pair.full(limits=limits(known_files=300, accepted_plan=held.plan.hash))
    assert (outcome.verdict, outcome.deletions) == (Verdict.HELD, 0)


def test_held_deletions_also_hold_what_became_something_else(pair: Pair) -> None:
    many(pair, 300)
    for number in range(0, 300, 2):
        (pair.source / f"{number % 10}" / f"{number}").unlink()
    shutil.rmtree(pair.source / "1")
    write(pair.source / "1")
    write(pair.source / "3" / "new")
    outcome = pair.full()
    assert outcome.verdict is Verdict.HELD, outcome
    assert (pair.target / "1").is_dir()
    assert (pair.target / "3" / "new").exists()


@pytest.mark.parametrize("walk", ["full", "folders"])
def test_a_source_without_files_never_empties_a_copy(pair: Pair, walk: str) -> None:
    for number in range(5):
        write(pair.source / "a" / f"{number}")
    pair.first()
    shutil.rmtree(pair.source / "a")
    (pair.source / "a folder is no file").mkdir()
    folders = None if walk == "full" else (b".",)
    outcome = pair.any_pass(folders=folders, limits=limits(files=10**6, percent=100))
    assert (outcome.verdict, outcome.deletions) == (Verdict.HELD, 0), outcome
    assert "would leave no file at all" in outcome.sentence
    assert len(list((pair.target / "a").iterdir())) == 5


def test_an_empty_target_needs_no_plan(pair: Pair) -> None:
    outcome = pair.full(limits=limits(target_empty=True))
    assert outcome.verdict is Verdict.COMPLETE
    assert connections(pair) == 1


def test_the_cron_rsync_would_have_wiped_it(pair: Pair) -> None:
    """What the guard is for: the same source and target, and rsync by itself."""
    for number in range(5):
        write(pair.source / "a" / f"{number}")
    pair.first()
    shutil.rmtree(pair.source / "a")
    run("rsync", "-a", "--delete", f"{pair.source}/", f"{pair.target}/")
    assert list(pair.target.iterdir()) == []


def test_deletions_are_in_the_planned_folders_only(pair: Pair) -> None:
    """Also when the root's own attributes differ: it is set right without a look into it."""
    for name in ("a/gone", "a/keep", "gone", "b/gone"):
        write(pair.source / name)
    pair.first()
    for name in ("a/gone", "gone", "b/gone"):
        (pair.source / name).unlink()
    pair.source.chmod(0o750)
    (pair.source / "b").chmod(0o750)
    outcome = pair.listed(b"a")
    assert (outcome.verdict, outcome.deletions) == (Verdict.COMPLETE, 1)
    assert stat.S_IMODE(pair.target.stat().st_mode) == 0o750
    assert (pair.target / "gone").exists()
    write(pair.source / "gone")
    outcome = pair.full()
    assert (outcome.verdict, outcome.deletions) == (Verdict.COMPLETE, 1)
    assert pair.differences() == []


def test_the_root_s_attributes_alone_are_set_right(pair: Pair) -> None:
    write(pair.source / "a" / "file")
    pair.first()
    for folders in (None, (b".",), (b"a",)):
        os.utime(pair.source, ns=(1, pair.source.stat().st_mtime_ns + 1))
        write(pair.source / "a" / "file", "x")
        assert pair.any_pass(folders=folders).verdict is Verdict.COMPLETE
        assert pair.source.stat().st_mtime_ns == pair.target.stat().st_mtime_ns
    os.utime(pair.source, ns=(1, 1))
    outcome, stages = stages_of(pair)
    assert outcome.sentence == "data: nothing but attributes differed"
    assert Stage.COPY not in stages
    assert pair.target.stat().st_mtime_ns == 1


def test_partial_files_that_nothing_needs_are_deleted_and_are_in_no_plan(pair: Pair) -> None:
    write(pair.source / "a" / "file")
    write(pair.source / "b" / "file")
    write(pair.source / "keep")
    write(pair.source / ".nfsha-partial" / "of the source")
    pair.first()
    assert not (pair.target / ".nfsha-partial").exists()
    for folder in (".", "a", "b"):
        write(pair.target / folder / ".nfsha-partial" / "old")
    (pair.source / "b" / "file").unlink()
    outcome = pair.listed(b"b")
    assert (outcome.deletions, outcome.plan and outcome.plan.names) == (1, (b"b/file",))
    assert not (pair.target / "b" / ".nfsha-partial").exists()
    outcome = pair.full()
    assert (outcome.verdict, outcome.deletions, outcome.plan) == (Verdict.COMPLETE, 0, None)
    assert not list(pair.target.rglob(".nfsha-partial"))
    assert pair.full().sentence == "data: nothing differed"
    write(pair.target / "a" / ".nfsha-partial" / "old")
    shutil.rmtree(pair.source / "a")
    assert pair.full().verdict is Verdict.COMPLETE
    assert pair.differences() == []


# --- a resync keeps what it overwrites and deletes -----------------------------------------------


def test_what_a_resync_keeps(pair: Pair) -> None:
    """Owner, mode, times, attributes and hard links of files, and folders they were in.

    Not kept: deleted empty folders, and the attributes of a folder that is deleted.
    """
    for number in range(20):
        write(pair.source / "keep" / f"{number}")
    pair.first()
    old = write(pair.target / "gone" / "below" / "old", "never replicated")
    os.setxattr(old, "user.note", b"mine")
    os.chown(old, 4711, 4712)
    old.chmod(0o640)
    os.utime(old, ns=(1, 1_600_000_000_123_456_789))
    (pair.target / "gone" / "twin").hardlink_to(old)
    (pair.target / "gone" / "empty").mkdir()
    (pair.target / "gone" / "link").symlink_to("below/old")
    os.mkfifo(pair.target / "gone" / "fifo")
    write(pair.target / "keep" / "3", "written on the wrong side")
    backup = ".nfsha-quarantine/entry"
    (pair.target / ".nfsha-quarantine").mkdir(mode=0o700)
    outcome = pair.full(resync_backup=backup)
    assert outcome.verdict is Verdict.COMPLETE, outcome
    assert pair.differences() == []
    kept = pair.target / backup
    found = kept / "gone" / "below" / "old"
    status = found.stat()
    assert found.read_text() == "never replicated"
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (4711, 4712, 0o640)
    assert status.st_mtime_ns == 1_600_000_000_123_456_789
    assert os.getxattr(found, "user.note") == b"mine"
    assert (kept / "gone" / "twin").stat().st_ino == status.st_ino
    assert (kept / "gone" / "link").readlink() == Path("below/old")
    assert stat.S_ISFIFO((kept / "gone" / "fifo").stat().st_mode)
    assert (kept / "keep" / "3").read_text() == "written on the wrong side"
    assert not (kept / "gone" / "empty").exists()


# --- from nfsha's own source ---------------------------------------------------------------------

EPOCH = Epoch(3, "00000000000000aa", Role.PRIMARY)
LATER = Epoch(4, "00000000000000bb", Role.PRIMARY)


def test_from_the_real_source(make_volume: Callable[..., LoopVolume], tmp_path: Path) -> None:
    """Under its token only; and not from a folder in which the volume is not mounted any more."""
    there, here = make_volume("ext4"), make_volume("ext4")
    write(there.path / ".nfsha-volume", f"{UUID}\n")
    for number in range(30):
        write(there.path / "a" / f"{number}")

    async def scene(root_fd: int) -> tuple[list[PassOutcome], Ending]:
        port = free_port()
        source = Source(tmp_path / "source", "127.0.0.1", port, "127.0.0.1", clock_ms)
        outcomes = []

        async def one_pass(epoch: Epoch, **changes: Any) -> None:
            where = From("127.0.0.1", port, epoch_token(b"key", epoch), "127.0.0.1")
            request = ask(where, root_fd, **changes)
            outcomes.append(await Pull(request, tmp_path, clock_ms).run(lambda _: None))

        try:
            volumes = [SourceVolume(UUID, there.path)]
            await source.serve(epoch_token(b"key", EPOCH), volumes)
            await one_pass(EPOCH, limits=limits(target_empty=True))
            await one_pass(EPOCH)
            await one_pass(LATER)
            (source.public / "facts.json").write_text("{}")
            where = From("127.0.0.1", port, epoch_token(b"key", EPOCH))
            ending = await fetch_control(where, tmp_path / "into", ["facts.json"])
            there.unmount(lazy=True)
            await one_pass(EPOCH)
            await one_pass(EPOCH, folders=(b".", b"a"))
        finally:
            await source.stop()
        return outcomes, ending

    (tmp_path / "into").mkdir()
    with root(here.path) as root_fd:
        outcomes, ending = asyncio.run(scene(root_fd))
    verdicts = [outcome.verdict for outcome in outcomes]
    assert verdicts == [Verdict.COMPLETE] * 2 + [Verdict.REFUSED] * 3, outcomes
    assert outcomes[0].transferred_files == 30
    assert outcomes[1].sentence == "data: nothing differed"
    assert "its own check of the volume failed" in outcomes[3].sentence
    assert ending.verdict is Verdict.COMPLETE, ending
    assert (tmp_path / "into" / "facts.json").read_text() == "{}"
    assert len(list((here.path / "a").iterdir())) == 30


# --- the control module --------------------------------------------------------------------------


def test_the_control_files_come_whole_or_not_at_all(tmp_path: Path) -> None:
    public, into = tmp_path / "public", tmp_path / "into"
    for folder in (public, into):
        folder.mkdir()
    write(public / "facts.json", "{}")
    write(public / "changes-1", "a")
    write(public / "changes-2", "b")
    with PlainSource(tmp_path / "daemon", {}, public=public) as daemon:
        names = ("facts.json", "changes-1")

        def fetch(**options: Any) -> Verdict:
            return asyncio.run(fetch_control(daemon.where, into, names, **options)).verdict

        assert fetch() is Verdict.COMPLETE
        assert sorted(each.name for each in into.iterdir()) == ["changes-1", "facts.json"]
        assert stat.S_IMODE((into / "facts.json").stat().st_mode) == 0o600
        (public / "facts.json").write_text("[]")  # the same size, within the same second
        (public / "changes-1").unlink()
        assert fetch() is Verdict.COMPLETE
        assert (into / "facts.json").read_text() == "[]"
        assert not (into / "changes-1").exists()
        (public / "facts.json").write_text("x" * 1000)
        assert fetch(max_bytes=100) is Verdict.COMPLETE
        assert (into / "facts.json").read_text() != "x" * 1000
    assert fetch() is Verdict.RETRY

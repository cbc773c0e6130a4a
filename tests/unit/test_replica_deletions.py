"""Plans of deletions: how they are read, what they are called, and which may be carried out."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfsha.replica.files.own_names import PARTIAL
from nfsha.replica.rsync import deletions
from nfsha.replica.rsync.deletions import (
    DeleteLimits,
    DeletionPlan,
    PlanReader,
    leaves_something,
    ruling,
)

OLD = b" 0 1970/01/01-00:00:00"
ITEM = re.compile(rb"(?:\*deleting|[<>ch.][fdL])")


def read(*lines: bytes) -> PlanReader:
    reader = PlanReader()
    for line in lines:
        reader.take(line + OLD if ITEM.match(line) else line)
    return reader


def plan_of(*names: bytes) -> DeletionPlan:
    return read(*(b"*deleting   " + name for name in names)).finish()


def limits(**changes: Any) -> DeleteLimits:
    values: dict[str, Any] = {
        "files": 100,
        "percent": 10,
        "known_files": 0,
        "accepted_plan": None,
        "target_empty": False,
    }
    return DeleteLimits(**values | changes)


def test_a_plan() -> None:
    reader = read(
        b".d..t...... ./",
        b"cd+++++++++ new/",
        b">f+++++++++ new/file",
        b">f.st...... a/changed",
        b".f....og... a/owner",
        b"hf+++++++++ a/link",
        b"*deleting   a/gone/inside",
        b"*deleting   a/gone/",
        b"*deleting   b/odd\\#012name",
        b".d..tp..... c/",
        b"",
        b"Number of files: 9 (reg: 9)",
    )
    plan = reader.finish()
    assert plan.names == (b"a/gone/", b"a/gone/inside", b"b/odd\nname")
    assert (plan.count, plan.files) == (3, 2)
    assert reader.copies == 5
    assert reader.touched == {b".", b"c"}
    assert reader.parents == {b"a", b"b"}


def test_a_folder_emptied_to_make_way_is_not_looked_into() -> None:
    reader = read(b"*deleting   a/thing/inside", b"cL+++++++++ a/thing")
    assert reader.parents == set()
    assert reader.finish().count == 1


def test_nothing_to_do() -> None:
    reader = read(b"", b"Number of files: 9 (reg: 9)")
    assert reader.finish() == DeletionPlan((), "", 0, 0, 0)
    assert (reader.copies, reader.touched, reader.parents) == (0, set(), set())


# What lies in a folder of partial files is no data: it is in no plan.
names = st.binary(min_size=1, max_size=20).filter(
    lambda name: b"\n" not in name and PARTIAL not in name
)


@given(st.lists(names, min_size=1, unique=True), st.randoms())
def test_the_hash_is_of_the_set_of_names(found: list[bytes], chance: Any) -> None:
    other = list(found)
    chance.shuffle(other)
    assert plan_of(*found) == plan_of(*other, *found[:3])
    assert plan_of(*found).hash != plan_of(*found[1:]).hash


def test_a_folder_and_a_file_of_one_name_are_two_plans() -> None:
    assert plan_of(b"a").hash != plan_of(b"a/").hash


def test_what_rsync_left_is_counted_apart() -> None:
    plan = plan_of(
        b".file.aB3dEf", b"a/.\n.aaaaaa", b"a/.file.aB3dE/", b"file.aB3dEf", b".a.aB3dE_"
    )
    assert (plan.files, plan.strays) == (4, 2)


def test_names_are_bounded_and_the_count_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletions, "MAX_NAMES", 10)
    monkeypatch.setattr(deletions, "MAX_FOLDERS", 5)
    reader = read(*(b"*deleting   %d/x" % number for number in range(100)))
    plan = reader.finish()
    assert (len(plan.names), plan.count) == (10, 100)
    assert reader.too_many_folders
    assert reader.parents == set()


@pytest.mark.parametrize(
    ("count", "known", "held"),
    [(0, 0, False), (100, 0, False), (101, 0, True), (100, 1000, False), (101, 1009, True),
     (200, 2000, False), (201, 2000, True)],
)  # fmt: skip
def test_the_larger_of_both_limits_counts(count: int, known: int, held: bool) -> None:
    plan = plan_of(*(b"%d" % number for number in range(count)))
    assert bool(ruling(plan, limits(known_files=known), leaves_something=True)) is held


def test_nothing_left_is_held_whatever_the_limits() -> None:
    plan = plan_of(b"only")
    wide = limits(files=10**9, percent=100)
    assert "no file at all" in ruling(plan, wide, leaves_something=False)


def test_an_accepted_plan_is_carried_out() -> None:
    plan = plan_of(*(b"%d" % number for number in range(500)))
    assert ruling(plan, limits(accepted_plan=plan.hash), leaves_something=False) == ""
    assert ruling(plan, limits(accepted_plan="0" * 64), leaves_something=True)
    assert ruling(plan, limits(accepted_plan=""), leaves_something=True)


def test_whether_something_is_left(tmp_path: Path) -> None:
    for name in ("a/1", "a/b/2", "3", ".nfsha-quarantine/no", "lost+found/no", ".nfsha-stamp",
                 "a/.nfsha-partial/no", ".nfsha-incoming/no"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "loop").symlink_to("..")
    (tmp_path / "only folders" / "x" / "y").mkdir(parents=True)
    root = os.open(tmp_path, os.O_RDONLY)
    try:
        assert leaves_something(root, 3)
        assert not leaves_something(root, 4)
    finally:
        os.close(root)


def test_a_file_that_only_moved_is_no_loss(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name in ("one", "two"):
        (tmp_path / "old" / name).write_text(name)
        os.utime(tmp_path / "old" / name, (0, 86400))
    reader = PlanReader()
    for line in (
        b">f+++++++++ new/one 3 1970/01/02-00:00:00",
        b">f+++++++++ new/two 4 1970/01/02-00:00:00",
        b"*deleting   old/one 0 1970/01/01-00:00:00",
        b"*deleting   old/two 0 1970/01/01-00:00:00",
        b"*deleting   old/ 0 1970/01/01-00:00:00",
    ):
        reader.take(line)
    plan = reader.finish()
    root = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert deletions.moved(root, plan, reader.arrivals) == 1, "two is of another size there"
    finally:
        os.close(root)
    strict = limits(files=0, percent=0)
    assert "deletions of 1 files" in ruling(plan, strict, leaves_something=True, moved=1)
    assert ruling(plan, strict, leaves_something=True, moved=2) == ""


def test_one_arrival_stands_for_one_deletion_only(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x").write_text("same")
        os.utime(tmp_path / folder / "x", (0, 0))
    reader = PlanReader()
    for line in (
        b">f+++++++++ c/x 4 1970/01/01-00:00:00",
        b"*deleting   a/x 0 1970/01/01-00:00:00",
        b"*deleting   b/x 0 1970/01/01-00:00:00",
    ):
        reader.take(line)
    root = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert deletions.moved(root, reader.finish(), reader.arrivals) == 1
    finally:
        os.close(root)

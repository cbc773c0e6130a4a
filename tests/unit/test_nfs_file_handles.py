"""Equal file handles on two nodes: a clone of blocks, told from a copy of files."""

from __future__ import annotations

import time
from pathlib import Path

from nfsha.nfs.file_handles import (
    FOLDERS_MAX,
    Handle,
    HandleFacts,
    clone_objections,
    read_handles,
)

IDENTITY = ".nfsha-volume"


def test_handles_of_the_known_file_and_the_first_folders(tmp_path: Path) -> None:
    (tmp_path / IDENTITY).write_text("an identity\n")
    (tmp_path / "a file").write_text("data")
    (tmp_path / "lost+found").mkdir()
    for number in range(FOLDERS_MAX + 3):
        (tmp_path / f"folder-{number:02}").mkdir()
    facts = read_handles("data", tmp_path, [IDENTITY, "missing"])
    names = [one.name for one in facts.handles]
    assert names == [IDENTITY, *(f"folder-{number:02}" for number in range(FOLDERS_MAX))]
    assert len({one.handle for one in facts.handles}) == len(names)
    assert facts == read_handles("data", tmp_path, [IDENTITY, "missing"])
    now_ns = time.time_ns()
    assert all(now_ns - 60_000_000_000 < one.birth_ns <= now_ns for one in facts.handles)


def test_a_volume_that_cannot_be_read_proves_nothing(tmp_path: Path) -> None:
    facts = read_handles("data", tmp_path / "gone", [IDENTITY])
    assert facts.trouble.endswith("No such file or directory")
    (objection,) = clone_objections(HandleFacts("data", ()), facts)
    assert objection.there == facts.trouble
    no_handles = read_handles("proc", Path("/proc/sys"), [])
    assert no_handles.trouble == "/proc/sys: its filesystem has no file handles"


def facts(birth_ns: int = 7, **handles: str) -> HandleFacts:
    made = (Handle(name, handle, birth_ns) for name, handle in handles.items())
    return HandleFacts("data", tuple(made))


def test_other_handles_are_a_copy_of_files() -> None:
    assert clone_objections(facts(a="01", b="02"), facts(a="03", b="04")) == ()


def test_one_equal_handle_is_a_clone_of_blocks() -> None:
    (objection,) = clone_objections(facts(a="01", b="02"), facts(a="03", b="02"))
    assert objection.here == "those of 'b'"
    assert "cloned block by block" in objection.remedy


def test_equal_handles_of_files_that_were_born_at_other_times_are_chance() -> None:
    assert clone_objections(facts(7, a="01"), facts(8, a="01")) == ()


def test_a_handle_that_leads_to_another_name_is_found_too() -> None:
    (objection,) = clone_objections(facts(a="01"), facts(a="09", b="01"))
    assert (objection.here, objection.there) == ("those of 'a'", "the same, of 'b'")

"""Which files changed, what of them was never replicated, and whether there is room to keep it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from nfsha.core.model import Epoch, Role
from nfsha.replica.content import unreplicated
from nfsha.replica.content.changed_files import (
    SLACK_NS,
    ChangedError,
    ChangedFiles,
    ChangedQuestion,
    answer,
    changed_since,
)
from nfsha.replica.content.verify import Look, Verify
from nfsha.replica.quarantine.quarantine import Entry, Quarantine
from nfsha.replica.quarantine.room import BLOCK_BYTES, lacking
from nfsha.replica.rsync.exits import Ending, Verdict
from nfsha.replica.volume.marks import Mark

UUID = "0d8ab111-3c0a-4d4f-9d7c-0123456789ab"
OWN = Epoch(2, "00000000000000aa", Role.PRIMARY)
THEIRS = Epoch(3, "00000000000000bb", Role.STANDBY)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_a_ctime_tells_what_no_mtime_does(tmp_path: Path, root: int) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a", "deep/b", ".nfsha-stamp", "empty"):
        (tmp_path / name).write_bytes(b"" if name == "empty" else b"content")
        os.utime(tmp_path / name, ns=(0, 0))
    (tmp_path / "link").symlink_to("a")
    now_ns = time.time_ns()
    assert set(changed_since(root, now_ns).names) == {b"a", b"deep/b"}
    assert changed_since(root, now_ns + 2 * SLACK_NS) == ChangedFiles(())
    assert changed_since(root, 0, max_names=1) == ChangedFiles((), more=True)
    assert changed_since(root, 0, max_bytes=3) == ChangedFiles((), more=True)
    # Never further back than the stamp of the epoch, here of this moment.
    assert set(answer(root, ChangedQuestion(UUID, 10**9, 1)).names) == {b"a", b"deep/b"}
    assert set(answer(root, ChangedQuestion(UUID, None, 1)).names) == {b"a", b"deep/b"}


def test_a_clock_that_was_set_forward_hides_nothing(
    tmp_path: Path, root: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", ".nfsha-stamp"):
        (tmp_path / name).write_bytes(b"content")
    right_ns = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: right_ns + 3600 * 10**9)
    assert answer(root, ChangedQuestion(UUID, 1000, 1, right_ns)).names == (b"a",)
    # And one that is set back counts from now: there all that is young has the new time.
    assert answer(root, ChangedQuestion(UUID, 3600_000, 1, right_ns + 7200 * 10**9)).names == (
        b"a",
    )
    assert answer(root, ChangedQuestion(UUID, 1000, 1, right_ns + 3600 * 10**9)).names == ()


def test_questions_and_answers_travel() -> None:
    for question in (ChangedQuestion(UUID, None, 7), ChangedQuestion(UUID, 5, 7, 9)):
        assert ChangedQuestion.from_json(question.to_json()) == question
        assert ChangedQuestion.is_meant(question.to_json())
    found = ChangedFiles((b"a/\xff", b"c"), more=True)
    assert ChangedFiles.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    "garbage",
    [
        None,
        [],
        {},
        {"uuid": UUID, "age_ms": None, "asked_ms": 1},
        {"uuid": 1, "age_ms": None, "asked_ms": 1, "since_ns": 0},
        {"uuid": UUID, "age_ms": -1, "asked_ms": 1, "since_ns": 0},
        {"uuid": UUID, "age_ms": True, "asked_ms": 1, "since_ns": 0},
        {"uuid": UUID, "age_ms": 1, "asked_ms": 1, "since_ns": 1 << 63},
    ],
)
def test_garbage_is_no_question(garbage: object) -> None:
    with pytest.raises(ChangedError):
        ChangedQuestion.from_json(garbage)


@pytest.mark.parametrize("name", ["Li4vYQ==", "L2E=", "YQ", 5, "Lm5mc2hhLXN0YW1w"])
def test_names_that_lead_elsewhere_are_no_answer(name: object) -> None:
    with pytest.raises(ChangedError):
        ChangedFiles.from_json({"names": [name], "more": False})


def told(epoch: Epoch) -> Mark:
    return Mark(UUID, epoch, 1000, 0, 0, 0, 0, 0, "full", "", 0)


@pytest.mark.parametrize(
    ("stamp", "mark", "since"),
    [
        (None, told(OWN), None),
        (Epoch(2, "00000000000000cc", Role.STANDBY), told(OWN), None),
        (OWN, told(OWN), 1000),
        (OWN, told(Epoch(1, "00000000000000cc", Role.PRIMARY)), 0),
        (OWN, None, 0),
    ],
)
def test_only_what_this_node_wrote_itself_is_suspect(
    stamp: Epoch | None, mark: Mark | None, since: int | None
) -> None:
    assert unreplicated.since_ns(stamp, THEIRS, mark) == since


class Scripted:
    """A verify whose looks are told."""

    def __init__(self, *looks: Look, ending: Verdict = Verdict.COMPLETE) -> None:
        self.looks = list(looks)
        self.ending = ending
        self.asked: list[tuple[bytes, ...]] = []
        self.repaired: list[tuple[bytes, ...]] = []

    async def look_at(self, names: tuple[bytes, ...], turn: object) -> Look:
        self.asked.append(names)
        return self.looks.pop(0)

    async def repair(
        self, entry: object, quarantine: object, turn: object, names: tuple[bytes, ...]
    ) -> Ending:
        self.repaired.append(names)
        return Ending(self.ending, 0, "in words")


def seen(*suspects: bytes, verdict: Verdict = Verdict.COMPLETE, more: bool = False) -> Look:
    return Look(verdict, "in words", suspects, more=more, files=3, read_bytes=30)


def settle(root: int, verify: Scripted) -> str:
    nothing = cast("Any", None)
    return asyncio.run(
        unreplicated.settle(
            cast("Verify", verify), root, cast("Quarantine", nothing), cast("Entry", nothing), 0
        )
    )


def test_what_differs_is_put_aside_until_nothing_does(tmp_path: Path, root: int) -> None:
    (tmp_path / "a").write_bytes(b"content")
    verify = Scripted(seen(b"a", more=True), seen(), seen())
    assert settle(root, verify) == ""
    assert verify.repaired == [(b"a",)]
    assert verify.asked == [(b"a",)] * 3
    assert settle(root, Scripted(seen())) == ""


@pytest.mark.parametrize(
    ("verify", "why"),
    [
        (Scripted(seen(verdict=Verdict.INCOMPLETE)), "cannot be compared"),
        (Scripted(seen(b"a"), ending=Verdict.FAILED), "cannot be put aside"),
        (Scripted(seen(b"a"), seen(b"a")), "1 files still differ"),
        (Scripted(seen(b"a"), seen(verdict=Verdict.RETRY)), "cannot be compared again"),
        (Scripted(*(seen(b"a", more=True), seen()) * 100), "too many files differ"),
    ],
)
def test_what_cannot_be_settled_is_said(root: int, verify: Scripted, why: str) -> None:
    assert why in settle(root, verify)


def test_room_is_for_all_that_comes_while_all_that_goes_stays() -> None:
    room: dict[str, Any] = {"used_there_bytes": 10**9, "free_bytes": 10**6, "free_inodes": 100}
    assert lacking(1, 10**6 - BLOCK_BYTES, **room) == ""
    assert "1000001 bytes are needed, 1000000 are free" in lacking(
        1, 10**6 + 1 - BLOCK_BYTES, **room
    )
    assert "100 inodes are free" in lacking(101, 0, **room)
    assert lacking(101, 0, **(room | {"free_inodes": None})) == ""
    # A file with holes is larger than all that its filesystem has in use.
    assert lacking(1, 10**12, **(room | {"used_there_bytes": 10**5})) == ""

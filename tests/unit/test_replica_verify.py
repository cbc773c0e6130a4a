"""What is asked and told about suspects, how they are judged, and how a volume is cut in slices."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfsha.core.model import Epoch, Role
from nfsha.replica.content import verify as verify_module
from nfsha.replica.content.suspects import (
    MAX_NAMES_BYTES,
    MAX_SUSPECTS,
    Finding,
    Kind,
    SuspectAnswer,
    SuspectError,
    SuspectQuestion,
    answer,
    answers_from_json,
    answers_to_json,
    classify,
    source_ahead_ns,
)
from nfsha.replica.content.verify import Helpers, Look, Verify, VerifyOutcome, VerifyRequest
from nfsha.replica.quarantine.quarantine import Quarantine
from nfsha.replica.rsync.arguments import From
from nfsha.replica.rsync.child import ChildStuckError
from nfsha.replica.rsync.exits import Verdict

UUID = "0d8ab111-3c0a-4d4f-9d7c-0123456789ab"
SECOND = 1_000_000_000
HASH_A, HASH_B = "a" * 64, "b" * 64


@dataclass(frozen=True)
class Times:
    started_ns: int
    duration_ms: int


MARK = Times(1000 * SECOND, 2000)
names = st.binary(min_size=1, max_size=40).filter(
    lambda name: (
        b"\0" not in name
        and not name.startswith(b".nfsha-")
        and all(part not in (b"", b".", b"..") for part in name.split(b"/"))
    )
)
whole = st.integers(-(1 << 63), (1 << 63) - 1)
answers = st.builds(
    SuspectAnswer,
    names, whole, whole, whole, whole,
    st.none() | st.text("0123456789abcdef", min_size=64, max_size=64),
    st.text(max_size=200), whole, whole,
)  # fmt: skip


@given(st.lists(names, max_size=20))
def test_a_question_travels(asked: list[bytes]) -> None:
    question = SuspectQuestion(UUID, tuple(asked))
    assert SuspectQuestion.from_json(json.loads(json.dumps(question.to_json()))) == question


@given(st.lists(answers, max_size=20))
def test_answers_travel(told: list[SuspectAnswer]) -> None:
    question = SuspectQuestion(UUID, tuple(one.name for one in told))
    carried = json.loads(json.dumps(answers_to_json(told)))
    assert answers_from_json(carried, question) == tuple(told)


@pytest.mark.parametrize(
    "name",
    [b"", b"/", b"/etc/passwd", b"..", b"a/../b", b"a//b", b"./a", b"a/", b"a\0b", b"x" * 4096,
     b".nfsha-stamp", b".nfsha-quarantine/a", b".nfsha-quarantine"],
)  # fmt: skip
def test_names_that_lead_elsewhere_are_not_asked_for(name: bytes) -> None:
    with pytest.raises(SuspectError):
        SuspectQuestion(UUID, (b"good", name))
    text = SuspectQuestion(UUID, (b"good",)).to_json()
    text["names"].append(base64.b64encode(name).decode())
    with pytest.raises(SuspectError):
        SuspectQuestion.from_json(text)


def test_a_question_is_bounded() -> None:
    SuspectQuestion(UUID, (b"x",) * MAX_SUSPECTS)
    with pytest.raises(SuspectError, match="more than"):
        SuspectQuestion(UUID, (b"x",) * (MAX_SUSPECTS + 1))
    with pytest.raises(SuspectError, match="more than"):
        SuspectQuestion(UUID, (b"x" * 4000,) * (MAX_NAMES_BYTES // 4000 + 1))


GOOD_QUESTION: dict[str, Any] = {"uuid": UUID, "names": ["YQ=="]}


@pytest.mark.parametrize(
    "document",
    [
        None, [], "x", {}, {"uuid": UUID}, GOOD_QUESTION | {"more": 1}, GOOD_QUESTION | {"uuid": 1},
        GOOD_QUESTION | {"uuid": "../x"}, GOOD_QUESTION | {"uuid": UUID.upper()},
        GOOD_QUESTION | {"names": "YQ=="}, GOOD_QUESTION | {"names": [1]},
        GOOD_QUESTION | {"names": ["YQ"]}, GOOD_QUESTION | {"names": ["Y Q=="]},
        GOOD_QUESTION | {"names": ["YR=="]}, GOOD_QUESTION | {"names": ["ä"]},
        GOOD_QUESTION | {"names": ["YQ=="] * (MAX_SUSPECTS + 1)},
        GOOD_QUESTION | {"names": ["Y" * 100_000]},
    ],
)  # fmt: skip
def test_garbage_is_no_question(document: object) -> None:
    with pytest.raises(SuspectError):
        SuspectQuestion.from_json(document)


GOOD_ANSWER: dict[str, Any] = SuspectAnswer(b"a", 1, 2, 3, 4, HASH_A).to_json()


@pytest.mark.parametrize(
    "document",
    [
        None, {}, [None], [{}], [], [GOOD_ANSWER] * 2, [GOOD_ANSWER | {"more": 1}],
        [GOOD_ANSWER | {"name": "Yg=="}], [GOOD_ANSWER | {"size": True}],
        [GOOD_ANSWER | {"size": "1"}], [GOOD_ANSWER | {"size": 1.0}],
        [GOOD_ANSWER | {"mtime_ns": 1 << 63}], [GOOD_ANSWER | {"sha256": "A" * 64}],
        [GOOD_ANSWER | {"sha256": 1}], [GOOD_ANSWER | {"problem": None}],
        [GOOD_ANSWER | {"problem": "x" * 201}],
    ],
)  # fmt: skip
def test_garbage_is_no_answer(document: object) -> None:
    question = SuspectQuestion(UUID, (b"a",))
    assert answers_from_json([GOOD_ANSWER], question)[0].size == 1
    with pytest.raises(SuspectError):
        answers_from_json(document, question)


def facts(ctime_s: float, sha256: str | None = HASH_A, **changes: Any) -> SuspectAnswer:
    base = SuspectAnswer(b"a", 10, 5 * SECOND, int(ctime_s * SECOND), 1, sha256)
    return replace(base, **changes)


@pytest.mark.parametrize(
    ("source", "copy", "kind", "words"),
    [
        # The source's file as it was when it was copied.
        (facts(500), facts(510, HASH_B), Kind.DAMAGED, "not changed since it was copied"),
        (facts(500, None), facts(510, None), Kind.DAMAGED, "not changed since it was copied"),
        # Changed at the source after it was copied, long before the last pass, which saw nothing.
        (facts(600), facts(510, HASH_B), Kind.MISSED, "changed after it was copied"),
        # Changed after the last pass began.
        (facts(1001), facts(510, HASH_B), Kind.MISSED, "after the last complete pass began"),
        (facts(1001), facts(1010, HASH_B), Kind.MISSED, "after the last complete pass began"),
        # The copy was written when no pass ran any more (it ended at 1002).
        (facts(500), facts(1003, HASH_B), Kind.DAMAGED, "written on this node"),
        # One side cannot be read.
        (facts(500), facts(510, problem="Input/output error"), Kind.DAMAGED, "cannot be read"),
        (facts(500, problem="Input/output error"), facts(510), Kind.DAMAGED, "source cannot read"),
    ],
)
def test_a_missed_change_and_damage_are_told_apart(
    source: SuspectAnswer, copy: SuspectAnswer, kind: Kind, words: str
) -> None:
    judged = classify([b"a"], [source], MARK, [copy])
    assert judged.dropped == ()
    (finding,) = judged.findings
    assert (finding.name, finding.kind) == (b"a", kind) and words in finding.evidence
    assert finding.repair is not bool(source.problem)


def test_the_clocks_of_both_nodes_are_brought_together() -> None:
    """The source's clock is 100 s ahead: it changed at 550 of its own, which is 450 of ours."""
    source, copy = facts(550), facts(500, HASH_B)
    assert classify([b"a"], [source], MARK, [copy]).findings[0].kind is Kind.MISSED
    ahead = classify([b"a"], [source], MARK, [copy], source_ahead_ns=100 * SECOND)
    assert ahead.findings[0].kind is Kind.DAMAGED


@pytest.mark.parametrize(
    ("told_s", "ahead_s"),
    [((), 0), ((100,), 0), ((110,), 0), ((105, 107), 0), ((111,), 1), ((113, 112), 2), ((99,), -1),
     ((90, 95), -5), ((0,), 0)],
)  # fmt: skip
def test_only_a_clock_that_is_surely_off_is_corrected(
    told_s: tuple[int, ...], ahead_s: int
) -> None:
    told = [facts(5, told_ns=one * SECOND) for one in told_s]
    assert source_ahead_ns(told, 100 * SECOND, 110 * SECOND) == ahead_s * SECOND


def test_what_neither_wrote_in_this_epoch_was_copied_the_other_way() -> None:
    source, copy = facts(600, epoch_since_ns=900 * SECOND), facts(510, HASH_B)
    judged = classify([b"a"], [source], MARK, [copy])
    assert judged.findings[0].kind is Kind.DAMAGED
    assert "when this epoch began" in judged.findings[0].evidence
    judged = classify([b"a"], [replace(source, epoch_since_ns=550 * SECOND)], MARK, [copy])
    assert judged.findings[0].kind is Kind.MISSED


def test_the_stamp_and_the_clock_are_told(tmp_path: Path, root: int) -> None:
    question = SuspectQuestion(UUID, (b"a",))
    (without,) = answer(root, question, clock_ns=lambda: 42)
    assert (without.told_ns, without.epoch_since_ns) == (42, 0)
    stamp = tmp_path / ".nfsha-stamp"
    stamp.write_text("3")
    (told,) = answer(root, question)
    assert told.epoch_since_ns == stamp.stat().st_ctime_ns


def test_without_a_mark_the_two_ctimes_decide() -> None:
    assert classify([b"a"], [facts(600)], None, [facts(5)]).dropped == ((b"a", "equal by now"),)
    judged = classify([b"a"], [facts(600)], None, [facts(5, HASH_B)])
    assert judged.findings[0].kind is Kind.MISSED


@pytest.mark.parametrize(
    ("source", "copy", "why"),
    [
        (facts(5, problem="gone"), facts(5), "gone from the source"),
        (facts(5), facts(5, problem="gone"), "gone from the copy"),
        (facts(5, size=11), facts(5), "changed meanwhile: the next pass copies it"),
        (facts(5, mtime_ns=5), facts(5), "changed meanwhile: the next pass copies it"),
        (facts(5), facts(5), "equal by now"),
        (facts(5, name=b"other"), facts(5), "nothing was told about it"),
    ],
)
def test_what_is_no_finding_is_dropped_with_the_reason(
    source: SuspectAnswer, copy: SuspectAnswer, why: str
) -> None:
    judged = classify([b"a"], [source], MARK, [copy])
    assert (judged.findings, judged.dropped) == ((), ((b"a", why),))


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_an_answer_reads_no_more_than_it_may(tmp_path: Path, root: int) -> None:
    for name, size in (("a", 100), ("b", 300), ("c", 100), ("d", 100)):
        (tmp_path / name).write_bytes(b"x" * size)
    question = SuspectQuestion(UUID, (b"a", b"b", b"c", b"d"))
    told = answer(root, question, max_file_bytes=200, max_total_bytes=250)
    assert [one.sha256 is not None for one in told] == [True, False, True, False]
    assert [one.size for one in told] == [100, 300, 100, 100]


def test_a_file_that_is_written_while_it_is_read_has_no_checksum(
    tmp_path: Path, root: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100)
    read = os.read

    def read_and_write(fd: int, size: int) -> bytes:
        data = read(fd, size)
        path.write_bytes(b"y" * 99)
        return data

    monkeypatch.setattr(os, "read", read_and_write)
    (told,) = answer(root, SuspectQuestion(UUID, (b"a",)))
    assert told.sha256 is None and told.size == 99 and told.problem == ""


def test_a_file_that_cannot_be_read_says_why(
    tmp_path: Path, root: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"x")

    def broken(fd: int, size: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "read", broken)
    (told,) = answer(root, SuspectQuestion(UUID, (b"a",)))
    assert told.problem == "Input/output error" and told.sha256 is None


def test_all_files_with_content_are_in_exactly_one_slice(tmp_path: Path, root: int) -> None:
    for number in range(25):
        folder = tmp_path / f"d{number % 3}" / "e"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f{number}").write_bytes(b"x" * 10)
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("d0")
    os.mkfifo(tmp_path / "pipe")
    for own in (".nfsha-quarantine", "lost+found", "d0/.nfsha-partial"):
        (tmp_path / own).mkdir()
        (tmp_path / own / "own").write_text("not data")
    (tmp_path / ".nfsha-stamp").write_text("not data")
    (tmp_path / ".nfsha-of-a-client").write_text("not asked for")
    (tmp_path / "d1/.nfsha-stamp").write_text("a client's")
    troubles: list[str] = []
    slices = list(verify_module._slices(root, 100, troubles.append))
    assert [part.size for part in slices] == [100, 100, 60] and troubles == []
    found = [name for part in slices for name in part.names]
    wanted = {f"d{number % 3}/e/f{number}".encode() for number in range(25)}
    assert len(found) == 26 and set(found) == wanted | {b"d1/.nfsha-stamp"}


def test_a_folder_that_cannot_be_read_is_said_and_the_rest_is_compared(
    tmp_path: Path, root: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("content")
    scan = os.scandir

    def broken(fd: int) -> Any:
        if Path(f"/proc/self/fd/{fd}").readlink().name == "a":
            raise OSError(5, "Input/output error")
        return scan(fd)

    monkeypatch.setattr(os, "scandir", broken)
    troubles: list[str] = []
    slices = list(verify_module._slices(root, 100, troubles.append))
    assert [part.names for part in slices] == [(b"b/file",)]
    assert troubles == ["a/: Input/output error"]


def test_what_is_deeper_than_a_path_may_be_is_said(tmp_path: Path, root: int) -> None:
    fd = os.dup(root)
    for _ in range(17):
        os.mkdir("d" * 255, dir_fd=fd)
        deeper = os.open("d" * 255, os.O_RDONLY, dir_fd=fd)
        with os.fdopen(os.open("f" * 255, os.O_CREAT | os.O_WRONLY, dir_fd=deeper), "w") as file:
            file.write("content")
        os.close(fd)
        fd = deeper
    os.close(fd)
    troubles: list[str] = []
    slices = list(verify_module._slices(root, 1 << 20, troubles.append))
    assert [len(part.names) for part in slices] == [15]
    SuspectQuestion(UUID, slices[0].names)
    assert len(troubles) == 1 and "longer than a path may be" in troubles[0]
    shutil.rmtree(tmp_path / ("d" * 255))


@dataclass(frozen=True)
class Token:
    user: str = "someone"
    password: str = "word"


class Scripted(Verify):
    """A verify whose looks and transfers are told; all else is the real one."""

    def __init__(self, root: int, scratch: Path, looks: list[Look]) -> None:
        source = From("127.0.0.1", 1, Token())
        super().__init__(VerifyRequest(UUID, root, source), scratch, lambda: 0)
        self.looks = looks

    async def look(self, turn: object, progress: object) -> Look:
        return self.looks.pop(0)

    async def look_at(self, names: object, turn: object, progress: object = lambda _: None) -> Look:
        return self.looks.pop(0)


GONE = SuspectAnswer(b"a", problem="gone")


def seen(*suspects: bytes, verdict: Verdict = Verdict.COMPLETE) -> Look:
    return Look(verdict, "in words", suspects, more=False, files=3, read_bytes=30)


async def conclude(
    root: int,
    scratch: Path,
    looks: list[Look],
    *,
    fresh: bool = True,
    told: tuple[SuspectAnswer, ...] | None = (),
) -> VerifyOutcome:
    async def fresh_pass() -> bool:
        return fresh

    async def ask(question: SuspectQuestion) -> tuple[SuspectAnswer, ...] | None:
        return told

    @contextlib.asynccontextmanager
    async def turn() -> AsyncIterator[None]:
        yield

    epoch = Epoch(1, "0" * 16, Role.PRIMARY)
    helpers = Helpers(turn, fresh_pass, ask, Quarantine(root), epoch, MARK)
    return await Scripted(root, scratch, looks).run(helpers, lambda _: None)


@pytest.mark.parametrize(
    ("looks", "options", "verdict", "sentence"),
    [
        ([seen()], {}, Verdict.COMPLETE, "in words"),
        ([seen(verdict=Verdict.REFUSED)], {}, Verdict.REFUSED, "in words"),
        ([seen(b"a", verdict=Verdict.RETRY)], {}, Verdict.RETRY, "in words"),
        ([seen(b"a")], {"fresh": False}, Verdict.RETRY, "was not complete"),
        ([seen(b"a"), seen(verdict=Verdict.RETRY)], {}, Verdict.RETRY, "in words"),
        ([seen(b"a"), seen(b"a")], {"told": None}, Verdict.RETRY, "the source told nothing"),
        ([seen(b"a"), seen()], {"told": None}, Verdict.COMPLETE, "compared"),
        ([seen(b"a"), seen(b"a")], {"told": (GONE,)}, Verdict.COMPLETE, "compared"),
        ([seen(b"a"), seen(b"a")], {}, Verdict.RETRY, "the source told nothing"),
        ([seen(b"a", verdict=Verdict.INCOMPLETE), seen()], {}, Verdict.INCOMPLETE, "compared"),
    ],
)
def test_each_way_to_end_without_a_finding_is_said(
    tmp_path: Path, root: int, looks: list[Look], options: dict[str, Any], verdict: Verdict,
    sentence: str,
) -> None:  # fmt: skip
    outcome = asyncio.run(conclude(root, tmp_path, list(looks), **options))
    assert outcome.verdict is verdict and sentence in outcome.sentence, outcome
    assert outcome.findings == () and not (tmp_path / ".nfsha-quarantine").exists()


def test_what_writes_in_a_thread_is_waited_for_and_said_when_it_hangs(
    tmp_path: Path, root: int
) -> None:
    """Neither a cancelled caller nor an end forgets a thread that is still at work."""
    release, done = threading.Event(), list[bool]()

    def act() -> None:
        release.wait(5)
        done.append(True)

    async def run() -> None:
        verify = Scripted(root, tmp_path, [])
        task = asyncio.create_task(verify._writes(act))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(ChildStuckError, match="at work on the quarantine"):
            await verify.end(0.05)
        assert not done and not task.done()
        release.set()
        await verify.end(5)
        assert done == [True]
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await verify._writes(lambda: len(done)) is None

    asyncio.run(run())


def test_only_a_whole_comparison_says_that_all_is_equal() -> None:
    done = VerifyOutcome(Verdict.COMPLETE, "compared", 3, 30, 1.0)
    assert done.all_equal
    found = Finding(b"a", Kind.MISSED, "in words")
    assert replace(done, findings=(found,), repaired=(b"a",)).all_equal
    assert not replace(done, findings=(found,)).all_equal
    assert not replace(done, more=True).all_equal
    assert not replace(done, verdict=Verdict.INCOMPLETE).all_equal

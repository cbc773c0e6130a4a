"""What the other node tells: taken as it was told, or refused in one short line, whatever it is."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nfsha.peer import pages
from nfsha.replica.content import questions
from nfsha.replica.content.changed_files import ChangedError, ChangedFiles
from nfsha.replica.content.questions import question_id
from nfsha.replica.content.suspects import SuspectError, SuspectQuestion, answers_from_json
from nfsha.replica.exchange import (
    MAX_QUESTIONS,
    MAX_VOLUMES,
    ExchangeError,
    NodeFacts,
    own_facts,
    read_node,
)
from nfsha.replica.fetching.guards import RefusedError, guard_against_a_clone
from nfsha.replica.journal.published import Published, encode_published
from nfsha.replica.source.facts import read_facts
from nfsha.replica.source.listing import read_listing
from nfsha.replica.source.serving import changes_name
from nfsha.replica.volume.facts import VolumeError, as_json, epoch_as_json
from nfsha.replica.volume.marks import EVERYTHING, MarkStore
from tests.unit.test_replica_marks import EPOCH, FIRST, NOW_NS, SECOND, facts, mark

QUESTION = SuspectQuestion(FIRST, (b"folder/na\xffme",))
TOLD = {
    "nfsha_node": 1,
    "volumes": [],
    "marks": [],
    "tainted": {FIRST: "resync to epoch 7", EVERYTHING: "its file was lost"},
    "questions": [{"id": question_id(QUESTION), "question": QUESTION.to_json()}],
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    store = MarkStore(tmp_path_factory.mktemp("state") / "marks")
    store.load()
    store.put_own(mark(FIRST))
    store.taint([SECOND], "resync to epoch 7")
    asked = [{"id": question_id(QUESTION), "question": QUESTION.to_json()}]
    return own_facts([facts(FIRST), facts(SECOND, name="od\udcffd", stamp=None)], store, asked)


def test_what_one_node_tells_the_other_one_knows(told: dict[str, Any]) -> None:
    read = read_node(pages.unpack(pages.pack(told)))
    assert read.volumes == (facts(FIRST), facts(SECOND, name="od\udcffd", stamp=None))
    assert read.marks == (mark(FIRST),)
    assert read.tainted == {SECOND: "resync to epoch 7"}
    assert read.questions == (QUESTION,)
    assert read_node(TOLD).tainted == TOLD["tainted"]


def deep(levels: int) -> object:
    nested: object = 0
    for level in range(levels):
        nested = [nested] if level % 2 else {"a": nested}
    return nested


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"nfsha_node": 2}, "another version"),
        ({"nfsha_node": deep(10_000)}, "another version"),
        ({"volumes": deep(9_999)}, "volumes is {"),
        ({"volumes": [deep(10_000)]}, "lack a field"),
        ({"volumes": [0] * (MAX_VOLUMES + 1)}, "at most"),
        ({"marks": None}, "marks is None"),
        ({"tainted": [FIRST]}, "tainted is ["),
        ({"tainted": {"\x1b[2J" * 100: "why"}}, "expected a volume's UUID"),
        ({"tainted": {FIRST: ""}}, "is tainted because of ''"),
        ({"tainted": {FIRST: deep(10_000)}}, "is tainted because of"),
        ({"tainted": {FIRST: "x" * 201}}, "is tainted because of"),
        ({"questions": [deep(10_000)]}, ""),
        ({"questions": [{"question": deep(10_000)}]}, "exactly these fields"),
        ({"questions": [TOLD["questions"]] * (MAX_QUESTIONS + 1)}, "at most"),
    ],
)  # fmt: skip
def test_what_is_not_told_so_is_refused_in_one_line(changed: dict[str, object], why: str) -> None:
    assert why in refusal({**TOLD, **changed})


def refusal(told: object) -> str:
    with pytest.raises(ExchangeError) as refused:
        read_node(told)
    words = str(refused.value)
    assert words.isprintable()
    assert len(words) < 400
    return words


@pytest.mark.parametrize("key", ["name", "path", "options", "failing", "device"])
@pytest.mark.parametrize("bad", ["\ud800", "a\0b", "x" * 5000, deep(10_000), 10**400, None, 1.5])
def test_texts_of_a_volume_can_be_opened_and_printed(
    key: str, bad: object, told: dict[str, Any]
) -> None:
    volume = {**told["volumes"][0], key: bad}
    assert f"facts of a volume with {key} " in refusal({**told, "volumes": [volume]})


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
    max_leaves=20,
)


@given(ANYTHING)
def test_nothing_that_json_can_say_raises_anything_else(garbage: object) -> None:
    _read(garbage)
    for key in TOLD:
        _read({**TOLD, key: garbage})
        _read({**TOLD, key: [garbage]})


@given(st.data())
def test_nor_do_facts_in_which_one_thing_is_another(
    told: dict[str, Any], data: st.DataObject
) -> None:
    damaged = json.loads(json.dumps(told))
    place: Any = damaged
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        place = inner
    place[key] = data.draw(ANYTHING)
    _read(damaged)


def _read(told: object) -> None:
    try:
        assert isinstance(read_node(told), NodeFacts)
    except ExchangeError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 400


@given(st.binary() | st.binary().map(zlib.compress) | ANYTHING.map(json.dumps).map(str.encode))
@example(zlib.compress(b"[" * 100_000))
@example(zlib.compress(b"[" * 900 + b"]" * 900))
@example(zlib.compress(b"9" * 100_000))
@example(zlib.compress(b'"\\ud800'))
@example(zlib.compress(b'"\xff"'))
@example(zlib.compress(b"1e999"))
def test_nor_do_bytes(blob: bytes) -> None:
    try:
        _read(pages.unpack(blob))
    except pages.FactsError as error:
        assert str(error)


# --- what the passive node fetches from the source's control module -------------------------------


@given(st.binary() | ANYTHING.map(json.dumps).map(str.encode) | st.data())
@example(b"[" * 100_000)
@example(b"9" * 100_000)
def test_what_is_fetched_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, garbage: bytes | st.DataObject
) -> None:
    file = tmp_path_factory.getbasetemp() / "fetched"
    published = {
        "nfsha_facts": 1, "epoch": epoch_as_json(EPOCH), "as_of_ns": NOW_NS, "written_ns": {},
        "still_ns": {},
        "volumes": [as_json(facts())],
    }  # fmt: skip
    if not isinstance(garbage, bytes):
        key = garbage.draw(st.sampled_from(list(published)))
        garbage = json.dumps(published | {key: garbage.draw(ANYTHING)}).encode()
    file.write_bytes(garbage)
    for read, refusals in (
        (read_facts, VolumeError),
        (lambda path: answers_from_json(questions._read(path), QUESTION), SuspectError),
        (lambda path: ChangedFiles.from_json(questions._read(path)), (SuspectError, ChangedError)),
    ):
        try:
            read(file)
        except refusals as error:
            assert len(str(error)) < 400


def test_what_the_source_writes_is_read(tmp_path: Path) -> None:
    published = {
        "nfsha_facts": 1, "epoch": epoch_as_json(EPOCH), "as_of_ns": NOW_NS,
        "written_ns": {FIRST: [5, NOW_NS]}, "still_ns": {}, "volumes": [as_json(facts())],
    }  # fmt: skip
    (tmp_path / "facts").write_text(json.dumps(published))
    read = read_facts(tmp_path / "facts")
    assert (read.epoch, read.as_of_ns, read.volumes) == (EPOCH, NOW_NS, (facts(),))
    here = replace(facts(), identity=FIRST)
    with pytest.raises(RefusedError, match="a copy of it block by block"):
        guard_against_a_clone(here, read, (5, NOW_NS))
    guard_against_a_clone(here, read, (7, NOW_NS - 2))  # another one, of the same sum
    for key, huge in (("as_of_ns", 1 << 63), ("as_of_ns", True), ("written_ns", {FIRST: 1e30}),
                      ("written_ns", {FIRST: [5]}), ("still_ns", [])):  # fmt: skip
        (tmp_path / "facts").write_text(json.dumps(published | {key: huge}))
        with pytest.raises(VolumeError, match="incomplete"):
            read_facts(tmp_path / "facts")


def test_a_list_that_is_said_to_be_still_true_is_as_fresh_as_a_new_one(tmp_path: Path) -> None:
    old = Published(FIRST, "0123456789abcdef", 1, 0, 0, "", NOW_NS - 9_000, ())
    (tmp_path / changes_name(FIRST)).write_bytes(encode_published(old))
    published = {
        "nfsha_facts": 1, "epoch": epoch_as_json(EPOCH), "as_of_ns": NOW_NS, "written_ns": {},
        "volumes": [],
    }  # fmt: skip
    for still_ns, fresh in (({}, False), ({SECOND: NOW_NS}, False), ({FIRST: NOW_NS + 1}, True)):
        (tmp_path / "facts.json").write_text(json.dumps(published | {"still_ns": still_ns}))
        found = read_listing(tmp_path, [FIRST])
        assert found.is_fresh is fresh
        assert found.changes[FIRST].as_of_ns == (NOW_NS + 1 if fresh else old.as_of_ns)

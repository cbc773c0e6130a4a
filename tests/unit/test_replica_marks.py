"""Sync marks: nothing guessed, nothing lost by a cut, and takeover condition 2 case by case."""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfsha.core.model import Epoch, Role
from nfsha.replica.volume import marks as marks_module
from nfsha.replica.volume.marks import (
    EVERYTHING,
    MAX_MARKS,
    Mark,
    MarksError,
    MarkStore,
    mark_as_json,
    mark_from_json,
    wholeness,
)
from nfsha.replica.volume.volumes import VolumeFacts

EPOCH = Epoch(7, "0123456789abcdef", Role.PRIMARY)
FIRST, SECOND = (str(uuid.UUID(int=number)) for number in (1, 2))
NOW_NS = 1_800_000_000_000_000_000


def mark(volume: str = FIRST, **changed: object) -> Mark:
    one = Mark(
        volume=volume,
        epoch=EPOCH,
        started_ns=NOW_NS - 5_000_000_000,
        files=100,
        bytes=12345,
        transferred_bytes=17,
        deletions=2,
        duration_ms=321,
        walk="full",
        changes_id="0f0f",
        changes_seq=9,
    )
    return replace(one, **changed)  # type: ignore[arg-type]


def facts(identity: str | None = FIRST, **changed: object) -> VolumeFacts:
    one = VolumeFacts(
        name=f"volume-{(identity or 'none')[-1]}",
        path=Path("/nfs/x"),
        device="/dev/x",
        device_number=1,
        fstype="ext4",
        fs_uuid=None,
        size_bytes=1,
        free_bytes=1,
        inodes=1,
        free_inodes=1,
        options="rw",
        read_only=False,
        failing="",
        identity=identity,
        stamp=EPOCH,
        empty=False,
    )
    return replace(one, **changed)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> MarkStore:
    made = MarkStore(tmp_path / "marks")
    assert made.load() == ()
    return made


def again(store: MarkStore) -> tuple[MarkStore, tuple[str, ...]]:
    """The store as the next start of the daemon finds it."""
    made = MarkStore(store.path)
    return made, made.load()


# --- keeping -------------------------------------------------------------------------------------


def test_before_it_is_loaded_everything_is_tainted(tmp_path: Path) -> None:
    store = MarkStore(tmp_path / "marks")
    assert store.tainted == {EVERYTHING}
    assert store.taint_of(FIRST)


def test_a_new_store_knows_nothing_and_taints_nothing(store: MarkStore) -> None:
    assert (store.own, store.peer, store.tainted) == ({}, {}, frozenset())
    assert store.taint_of(FIRST) == ""


def test_marks_of_both_sides_survive_a_restart_apart(store: MarkStore) -> None:
    store.put_own(mark(FIRST, files=1))
    store.put_own(mark(SECOND, files=2))
    store.put_own(mark(FIRST, files=3, started_ns=0))  # the source's clock was stepped back
    store.put_peer([mark(FIRST, files=4, walk="verify")])
    found, reports = again(store)
    assert reports == ()
    assert {key: one.files for key, one in found.own.items()} == {FIRST: 3, SECOND: 2}
    assert found.peer == {FIRST: mark(FIRST, files=4, walk="verify")}
    assert found.own == store.own


def test_taints_survive_a_restart_with_their_reason(store: MarkStore) -> None:
    store.taint([FIRST, SECOND], "resync to epoch 7")
    store.taint([FIRST], "another reason")
    found, _ = again(store)
    assert found.tainted == {FIRST, SECOND}
    assert found.taint_of(FIRST) == "resync to epoch 7"
    found.untaint([FIRST])
    assert again(store)[0].tainted == {SECOND}
    found.untaint()
    assert again(store)[0].tainted == frozenset()


def test_a_pass_writes_one_small_file_whatever_the_number_of_volumes(store: MarkStore) -> None:
    for number in range(500):
        store.put_own(mark(str(uuid.UUID(int=number)), walk="folders"))
    before = {path.name: path.stat().st_mtime_ns for path in store.path.iterdir()}
    store.put_own(mark(FIRST, files=0, walk="folders"))
    after = {path.name: path.stat().st_mtime_ns for path in store.path.iterdir()}
    changed = [name for name in after if after[name] != before.get(name)]
    assert changed == [f"own-{FIRST}"]
    assert (store.path / changed[0]).stat().st_size < 1024


def test_what_the_peer_told_already_is_not_written_again(store: MarkStore) -> None:
    store.put_peer([mark(FIRST), mark(SECOND)])
    before = (store.path / f"peer-{FIRST}").stat().st_ino
    store.put_peer([mark(FIRST), mark(SECOND, files=7)])
    assert (store.path / f"peer-{FIRST}").stat().st_ino == before
    assert again(store)[0].peer[SECOND].files == 7


def test_dicts_that_were_given_out_do_not_change(store: MarkStore) -> None:
    store.put_own(mark(FIRST))
    taken = store.own
    store.put_own(mark(SECOND))
    assert taken == {FIRST: mark(FIRST)}


def test_a_volume_that_is_no_more_is_forgotten_with_all_that_was_known(store: MarkStore) -> None:
    for volume in (FIRST, SECOND):
        store.put_own(mark(volume))
    store.put_peer([mark(FIRST), mark(SECOND)])
    store.put_names({FIRST: "data", SECOND: "other"})
    store.taint([FIRST, SECOND], "a resync")
    assert store.forget(FIRST) == (
        "the last pass into this node (epoch 7)",
        "the last pass into the other node (epoch 7)",
        "when it was walked and verified",
        "its taint (a resync)",
    )
    assert [path for path in store.path.iterdir() if FIRST in path.name] == []
    for one in (store, again(store)[0]):
        assert one.own == one.peer == {SECOND: mark(SECOND)}
        assert one.names == {SECOND: "other"}
        assert one.tainted == {SECOND}
        assert ages(one) == (None, None)
        assert None not in ages(one, SECOND)
        assert one.forget(FIRST) == ()


def test_what_a_crash_left_half_forgotten_is_called_by_its_name_again(
    store: MarkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_own(mark())
    store.put_peer([mark()])
    store.put_names({FIRST: "data"})
    real = Path.unlink

    def fail(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("peer-"):
            raise OSError(errno.EIO, "the disk is gone")
        real(path, missing_ok)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "unlink", fail)
        with pytest.raises(MarksError, match="cannot remove"):
            store.forget(FIRST)
    found, reports = again(store)
    assert (reports, found.own, found.names) == ((), {}, {FIRST: "data"})
    assert found.forget(FIRST) == ("the last pass into the other node (epoch 7)",)
    assert again(store)[0].names == {}


def test_names_are_kept_as_long_as_there_is_a_mark(
    store: MarkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = "/".join(["\udcff" * 255] * 15)
    store.put_names({FIRST: "no mark, no name"})
    assert store.names == {}
    store.put_own(mark(FIRST))
    store.put_peer([mark(SECOND)])
    store.put_names({FIRST: longest, SECOND: "data"})
    assert again(store)[0].names == {FIRST: longest, SECOND: "data"}
    before = (store.path / f"name-{FIRST}").stat().st_ino
    store.put_names({FIRST: longest, SECOND: "renamed"})
    assert (store.path / f"name-{FIRST}").stat().st_ino == before
    assert again(store)[0].names[SECOND] == "renamed"
    monkeypatch.setattr(marks_module, "MAX_MARKS", 1)
    third = str(uuid.UUID(int=3))
    store.put_own(mark(third, started_ns=NOW_NS))
    store.put_names({third: "new"})
    assert store.names == {SECOND: "renamed", third: "new"}


@pytest.mark.parametrize("garbage", [b"", {"volume": FIRST}, {"volume": FIRST, "name": 7}])
def test_a_name_that_cannot_be_read_is_none(store: MarkStore, garbage: bytes | dict) -> None:  # type: ignore[type-arg]
    store.put_own(mark())
    store.put_names({FIRST: "data"})
    data = garbage if isinstance(garbage, bytes) else marks_module._encode(garbage)
    (store.path / f"name-{FIRST}").write_bytes(data)
    found, reports = again(store)
    assert (len(reports), found.own, found.names) == (1, {FIRST: mark()}, {})


def test_there_is_an_end_to_the_number_of_marks(
    store: MarkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks_module, "MAX_MARKS", 3)
    assert MAX_MARKS >= 500
    names = [str(uuid.UUID(int=number)) for number in range(5)]
    for number, name in enumerate(names):
        store.put_own(mark(name, started_ns=number))
    assert list(store.own) == names[2:]
    assert sorted(path.name for path in store.path.glob("own-*")) == [
        f"own-{name}" for name in names[2:]
    ]


# --- walks ---------------------------------------------------------------------------------------


def ages(store: MarkStore, uuid: str = FIRST) -> tuple[int | None, int | None]:
    return store.since_ms(uuid, "full", NOW_NS), store.since_ms(uuid, "verify", NOW_NS)


def test_the_last_full_walk_and_the_last_verify_outlive_the_daemon(store: MarkStore) -> None:
    assert ages(store) == (None, None)
    store.put_own(mark(started_ns=NOW_NS - 9_000_000_000))
    assert ages(store) == (9000, 9000), "what was just copied counts as verified"
    store.put_own(mark(started_ns=NOW_NS - 8_000_000_000, walk="folders"))
    assert ages(store) == (9000, 9000)
    store.put_own(mark(started_ns=NOW_NS - 7_000_000_000))
    store.note_verify(FIRST, NOW_NS - 3_000_000_000)
    store.note_verify(SECOND, NOW_NS)
    assert ages(store) == (7000, 3000)
    assert ages(store, SECOND) == (None, None)
    store, reports = again(store)
    assert (ages(store), reports) == ((7000, 3000), ())
    assert store.since_ms(FIRST, "full", 0) == 0, "a clock that was set back"


def test_walks_go_with_their_mark(store: MarkStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for volume in (FIRST, SECOND):
        store.put_own(mark(volume))
    monkeypatch.setattr(marks_module, "MAX_MARKS", 1)
    store.put_own(mark(FIRST, started_ns=NOW_NS))
    assert ages(store, SECOND) == (None, None)
    assert sorted(one.name for one in store.path.glob("walked-*")) == [f"walked-{FIRST}"]


@pytest.mark.parametrize(
    "garbage",
    [b"", b"{", b"\0" * 300, {"volume": FIRST}, {"volume": SECOND, "full_ns": 1, "verify_ns": 1},
     {"volume": FIRST, "full_ns": -1, "verify_ns": 1}, {"volume": FIRST, "full_ns": True,
     "verify_ns": 1}, {"volume": FIRST, "full_ns": 1, "verify_ns": 1, "more": 1}],
)  # fmt: skip
def test_walks_that_cannot_be_read_are_none(store: MarkStore, garbage: bytes | dict) -> None:  # type: ignore[type-arg]
    store.put_own(mark())
    data = garbage if isinstance(garbage, bytes) else marks_module._encode(garbage)
    (store.path / f"walked-{FIRST}").write_bytes(data)
    store, reports = again(store)
    assert ages(store) == (None, None)
    assert (len(reports), store.own, store.tainted) == (1, {FIRST: mark()}, frozenset())


# --- damage --------------------------------------------------------------------------------------


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def alter(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"files": 100', b'"files": 101'))


def other_version(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"nfsha_marks": 1', b'"nfsha_marks": 2'))


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def swap(path: Path) -> None:
    path.write_bytes((path.parent / f"own-{SECOND}").read_bytes())


DAMAGES: list[Callable[[Path], object]] = [
    tear,
    alter,
    other_version,
    fifo,
    swap,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"[]"),
    lambda path: path.write_bytes(b"\xff" * 100),
    lambda path: path.write_bytes(b"[" * 4000),
    lambda path: path.write_bytes(b" " * 100_000),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_mark_is_no_mark_and_is_reported_once_and_kept(
    store: MarkStore, damage: Callable[[Path], object]
) -> None:
    store.put_own(mark(FIRST))
    store.put_own(mark(SECOND))
    damage(store.path / f"own-{FIRST}")
    found, reports = again(store)
    assert len(reports) == 1
    assert str(store.path / f"own-{FIRST}") in reports[0]
    assert found.own == {SECOND: mark(SECOND)}
    assert (store.path / f"corrupt-own-{FIRST}").exists()
    assert again(store)[1] == ()
    assert wholeness([facts(FIRST)], found, EPOCH, NOW_NS, None)[0] is False


@pytest.mark.parametrize(
    "damage",
    [tear, other_version, fifo, lambda path: path.write_bytes(b"{}"), lambda path: path.unlink()],
)
def test_a_damaged_or_lost_taint_file_taints_everything_for_good(
    store: MarkStore, damage: Callable[[Path], object]
) -> None:
    store.put_own(mark(FIRST))
    damage(store.path / "taint")
    found, reports = again(store)
    assert len(reports) == 1
    assert "taint" in reports[0]
    for one in (found, again(store)[0]):  # the next start does not find a clean slate
        assert one.tainted == {EVERYTHING}
        assert "tainted" in wholeness([facts(FIRST)], one, EPOCH, NOW_NS, None)[1]
    found.untaint([FIRST])
    assert found.tainted == {EVERYTHING}
    found.untaint()
    assert again(store)[0].tainted == frozenset()
    assert again(store)[1] == ()


def test_a_taint_written_by_somebody_else_is_not_believed(store: MarkStore) -> None:
    path = store.path / "taint"
    path.write_bytes(marks_module._encode({"not a uuid": "why"}))
    assert again(store)[0].tainted == {EVERYTHING}


def test_what_a_crash_left_half_written_is_not_read(store: MarkStore) -> None:
    (store.path / f".own-{FIRST}.new").write_bytes(b"half")
    found, reports = again(store)
    assert (found.own, reports) == ({}, ())


def test_what_the_disk_refuses_is_not_seen(
    store: MarkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.taint([SECOND], "earlier")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(marks_module, "write_durably", full)
    refusals: list[Callable[[], None]] = [
        lambda: store.put_own(mark()),
        lambda: store.put_peer([mark()]),
        lambda: store.taint([FIRST], "a resync"),
        store.untaint,
    ]
    for refused in refusals:
        with pytest.raises(MarksError, match=r"cannot write .*: No space left on device"):
            refused()
    assert store.own == store.peer == {}
    assert store.tainted == {SECOND}


def test_a_disk_that_cannot_read_is_an_error_and_not_a_clean_slate(
    store: MarkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_own(mark())

    def broken(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(marks_module, "read_small", broken)
    made = MarkStore(store.path)
    with pytest.raises(MarksError, match=r"cannot read the marks in .*: Input/output error"):
        made.load()
    assert made.tainted == {EVERYTHING}
    assert (store.path / f"own-{FIRST}").exists()


def test_a_store_in_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MarksError, match="cannot read the marks"):
        MarkStore(tmp_path / "nowhere" / "marks").load()


def test_only_volumes_can_be_tainted(store: MarkStore) -> None:
    with pytest.raises(MarksError, match=r"'\.\./x' cannot be tainted"):
        store.taint(["../x"], "why")


# --- as they travel ------------------------------------------------------------------------------

numbers = st.integers(min_value=0, max_value=(1 << 63) - 1)
any_mark = st.builds(
    Mark,
    volume=st.uuids().map(str),
    epoch=st.builds(
        Epoch,
        number=st.integers(min_value=1, max_value=(1 << 63) - 1),
        id=st.from_regex(r"[0-9a-f]{16}", fullmatch=True),
        authority=st.sampled_from(Role),
    ),
    started_ns=numbers,
    files=numbers,
    bytes=numbers,
    transferred_bytes=numbers,
    deletions=numbers,
    duration_ms=numbers,
    walk=st.sampled_from(["full", "folders", "verify"]),
    changes_id=st.from_regex(r"[0-9a-z-]{0,64}", fullmatch=True),
    changes_seq=numbers,
)
garbage = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(any_mark)
def test_every_mark_travels_as_json(one: Mark) -> None:
    assert mark_from_json(json.loads(json.dumps(mark_as_json(one)))) == one


@given(st.sampled_from([one.name for one in fields(Mark)]), garbage)
def test_a_mark_with_garbage_in_one_field_is_refused_or_equal(name: str, value: object) -> None:
    document = {**mark_as_json(mark()), name: value}
    try:
        found = mark_from_json(document)
    except MarksError:
        return
    assert mark_as_json(found) == document


@given(garbage)
def test_garbage_is_no_mark(value: object) -> None:
    with pytest.raises(MarksError):
        mark_from_json(value)


def test_a_mark_with_a_field_too_many_or_too_few_is_refused() -> None:
    document = mark_as_json(mark())
    with pytest.raises(MarksError):
        mark_from_json({**document, "more": 1})
    del document["files"]
    with pytest.raises(MarksError):
        mark_from_json(document)


def test_the_age_of_a_copy_is_never_negative() -> None:
    assert mark(started_ns=NOW_NS - 1_500_000_000).age_ms(NOW_NS) == 1500
    assert mark(started_ns=NOW_NS + 10**12).age_ms(NOW_NS) == 0


# --- wholeness -----------------------------------------------------------------------------------


def test_nothing_paired_is_not_whole(store: MarkStore) -> None:
    assert wholeness([], store, EPOCH, NOW_NS, None) == (False, "no volume is paired")


def test_a_whole_replica(store: MarkStore) -> None:
    store.put_own(mark(FIRST))
    store.put_own(mark(SECOND))
    paired = [facts(FIRST), facts(SECOND)]
    expected = (True, "2 volumes copied whole in epoch 7 (01234567, authority primary)")
    assert wholeness(paired, store, EPOCH, NOW_NS, None) == expected
    assert wholeness(paired, store, EPOCH, NOW_NS, 5000) == expected
    # The sentence is the same as long as nothing happens, so that it can be reported on change.
    assert wholeness(paired, store, EPOCH, NOW_NS + 10**9, None) == expected


OTHER_ID = Epoch(7, "f" * 16, Role.PRIMARY)
OLDER = Epoch(6, "e" * 16, Role.STANDBY)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"stamp": None}, "volume-2: it holds the data of epoch (none), the authority's is 7"),
        ({"stamp": OLDER}, "volume-2: it holds the data of epoch 6 (eeeeeeee, authority standby)"),
        ({"stamp": OTHER_ID}, "volume-2: it holds the data of epoch 7 (ffffffff"),
        ({"stamp": Epoch(8, "a" * 16, Role.PRIMARY)}, "volume-2: it holds the data of epoch 8"),
        ({"failing": "cannot be read: EIO"}, "volume-2: cannot be read: EIO"),
        ({"refused": "garbage"}, "volume-2: garbage"),
        ({"identity": None}, "volume-2: it bears no identity"),
        ({"identity": FIRST}, f"{FIRST} is the identity of two volumes"),
    ],
)
@pytest.mark.parametrize("is_authority", [False, True])
def test_one_unsound_volume_spoils_all(
    store: MarkStore, changed: dict[str, object], expected: str, is_authority: bool
) -> None:
    store.put_own(mark(FIRST))
    store.put_own(mark(SECOND))
    paired = [facts(FIRST), replace(facts(SECOND), **changed)]  # type: ignore[arg-type]
    whole, why = wholeness(paired, store, EPOCH, NOW_NS, None, is_authority=is_authority)
    assert not whole
    assert expected in why


def test_without_an_own_pass_of_the_epoch_it_is_not_whole(store: MarkStore) -> None:
    store.put_own(mark(FIRST))
    paired = [facts(FIRST), facts(SECOND)]
    whole, why = wholeness(paired, store, EPOCH, NOW_NS, None)
    assert not whole
    assert why.startswith("volume-2: no pass was completed in epoch 7")
    assert why.endswith("the last one never")
    store.put_own(mark(SECOND, epoch=OLDER))
    assert "the last one in epoch 6" in wholeness(paired, store, EPOCH, NOW_NS, None)[1]
    store.put_peer([mark(SECOND)])  # the peer's copy is not ours
    assert not wholeness(paired, store, EPOCH, NOW_NS, None)[0]
    store.put_own(mark(SECOND))
    assert wholeness(paired, store, EPOCH, NOW_NS, None)[0]


def test_the_authority_needs_no_pass_and_has_no_age(store: MarkStore) -> None:
    assert wholeness([facts(FIRST)], store, EPOCH, NOW_NS, 1, is_authority=True) == (
        True,
        "1 volume of epoch 7 (01234567, authority primary), whose authority this node is",
    )


@pytest.mark.parametrize("is_authority", [False, True])
def test_a_tainted_volume_spoils_all_and_an_untainted_does_not(
    store: MarkStore, is_authority: bool
) -> None:
    store.put_own(mark(FIRST))
    store.taint([SECOND], "of a volume that is not paired")
    assert wholeness([facts(FIRST)], store, EPOCH, NOW_NS, None, is_authority=is_authority)[0]
    store.taint([FIRST], "resync to epoch 7")
    whole, why = wholeness([facts(FIRST)], store, EPOCH, NOW_NS, None, is_authority=is_authority)
    assert (whole, why) == (False, "volume-1: it is tainted (resync to epoch 7)")


def test_data_may_be_as_old_as_allowed_and_not_a_millisecond_more(store: MarkStore) -> None:
    store.put_own(mark(FIRST))
    assert wholeness([facts(FIRST)], store, EPOCH, NOW_NS, 5000)[0]
    assert wholeness([facts(FIRST)], store, EPOCH, NOW_NS, 4999) == (
        False,
        "volume-1: its copy is older than max_data_age (5.0 s)",
    )
    assert not wholeness([facts(FIRST)], store, EPOCH, NOW_NS + 10**6, 5000)[0]


def test_many_reasons_are_cut_short(store: MarkStore) -> None:
    paired = [facts(str(uuid.UUID(int=number))) for number in range(500)]
    whole, why = wholeness(paired, store, EPOCH, NOW_NS, None)
    assert not whole
    assert why.endswith("; and 497 more")
    assert len(why) < 500

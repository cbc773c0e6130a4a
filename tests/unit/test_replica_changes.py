"""The change journal without a kernel: its files, who may go by them, the bounds of the ledger."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfsha.replica.journal import changes, fanotify
from nfsha.replica.journal import ledger as ledger_module
from nfsha.replica.journal.changes import (
    ChangeJournal,
    ChangesError,
    Published,
    WalkReason,
    read_last,
    read_published,
)
from nfsha.replica.journal.handles import Tree
from nfsha.replica.journal.ledger import MAX_WANTED, Ledger
from nfsha.replica.journal.published import encode_published
from tests.unit.test_replica_fanotify import DFID_NAME, FID, handle, record

ONE = Published(
    uuid="11111111-2222-3333-4444-555555555555",
    journal_id="0123456789abcdef",
    first=11,
    last=30,
    complete_from=0,
    walk_reason="",
    as_of_ns=1_700_000_000_000_000_000,
    folders=((b".", 11), (b"a", 20), (b"a/b\n\xff", 30)),
)


def boot_ms() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


# ---- the file


def test_published_comes_back_as_it_was() -> None:
    assert read_published(encode_published(ONE)) == ONE


part = st.binary(min_size=1, max_size=20).filter(
    lambda name: not set(name) & {0, 0x2F} and name not in (b".", b"..")
)
paths = st.one_of(st.just(b"."), st.lists(part, min_size=1, max_size=4).map(b"/".join))


@given(st.dictionaries(paths, st.integers(0, 30), max_size=8))
def test_any_folders_come_back(folders: dict[bytes, int]) -> None:
    one = replace(ONE, folders=tuple(sorted(folders.items())))
    assert read_published(encode_published(one)) == one


@given(st.integers(0, len(encode_published(ONE)) - 1), st.integers(1, 255))
def test_one_altered_byte_is_refused(position: int, change: int) -> None:
    data = bytearray(encode_published(ONE))
    data[position] ^= change
    with pytest.raises(ChangesError):
        read_published(bytes(data))


@given(st.integers(0, len(encode_published(ONE)) - 1))
def test_a_torn_file_is_refused(length: int) -> None:
    with pytest.raises(ChangesError):
        read_published(encode_published(ONE)[:length])


@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ChangesError):
        read_published(data)


@pytest.mark.parametrize(
    "one",
    [
        replace(ONE, uuid="../etc"),
        replace(ONE, journal_id="x"),
        replace(ONE, first=-1),
        replace(ONE, first=True),
        replace(ONE, first=32),
        replace(ONE, last=1 << 63),
        replace(ONE, complete_from=32),
        replace(ONE, as_of_ns="now"),  # type: ignore[arg-type]
        replace(ONE, walk_reason="x" * 401),
        replace(ONE, walk_reason=None),  # type: ignore[arg-type]
        replace(ONE, folders=((b"a", 31),)),
        replace(ONE, folders=((b"a", 11), (b"a", 12))),
        replace(ONE, folders=((b"b", 11), (b"a", 12))),
        replace(ONE, folders=((b"/etc", 11),)),
        replace(ONE, folders=((b"a/../../etc", 11),)),
        replace(ONE, folders=((b"a//b", 11),)),
        replace(ONE, folders=((b"./a", 11),)),
        replace(ONE, folders=((b"a/", 11),)),
        replace(ONE, folders=((b"", 11),)),
        replace(ONE, folders=((b"a" * 4097, 11),)),
    ],
)
def test_what_cannot_be_is_refused_though_its_checksum_is_right(one: Published) -> None:
    with pytest.raises(ChangesError):
        read_published(encode_published(one))


def test_too_much_is_neither_written_nor_read() -> None:
    many = replace(ONE, folders=tuple((b"%08d" % n, 11) for n in range(200_001)))
    with pytest.raises(ValueError, match="too many"):
        encode_published(many)
    with pytest.raises(ChangesError, match="larger"):
        read_published(b"x" * ((16 << 20) + 1))


# ---- who may go by it


def test_folders_since_a_sequence() -> None:
    assert ONE.since(ONE.journal_id, 10) == ((b".", b"a", b"a/b\n\xff"), "")
    assert ONE.since(ONE.journal_id, 11) == ((b"a", b"a/b\n\xff"), "")
    assert ONE.since(ONE.journal_id, 30) == ((), "")


@pytest.mark.parametrize(
    ("journal_id", "seq", "reason"),
    [("f" * 16, 20, "anew"), ("", 0, "anew"), (ONE.journal_id, 9, "forgotten"),
     (ONE.journal_id, 31, "claims 31")],
)  # fmt: skip
def test_a_full_walk_is_asked_of_who_cannot_go_by_it(
    journal_id: str, seq: int, reason: str
) -> None:
    folders, why = ONE.since(journal_id, seq)
    assert folders is None
    assert reason in why


def test_a_full_walk_is_asked_until_one_was_made() -> None:
    one = replace(ONE, complete_from=20, walk_reason="overflow")
    assert not one.complete
    assert one.since(one.journal_id, 19) == (None, "overflow")
    assert one.since(one.journal_id, 20) == ((b"a/b\n\xff",), "")
    assert ONE.complete


# ---- what the last run left


def test_nothing_is_left_where_there_was_no_run(tmp_path: Path) -> None:
    assert read_last(tmp_path, ONE.uuid) is None


def test_what_the_last_run_left_is_never_complete(tmp_path: Path) -> None:
    (tmp_path / f"changes-{ONE.uuid}").write_bytes(encode_published(ONE))
    left = read_last(tmp_path, ONE.uuid)
    assert left is not None
    assert left.published == ONE
    assert "after 1700000000000000000 ns" in left.incomplete


def test_damage_and_other_volumes_are_refused(tmp_path: Path) -> None:
    place = tmp_path / f"changes-{ONE.uuid}"
    place.write_bytes(encode_published(replace(ONE, uuid="other")))
    with pytest.raises(ChangesError, match="about the volume other"):
        read_last(tmp_path, ONE.uuid)
    place.write_bytes(b"garbage")
    with pytest.raises(ChangesError, match="does not begin"):
        read_last(tmp_path, ONE.uuid)
    place.unlink()
    place.mkdir()
    with pytest.raises(ChangesError, match="cannot read"):
        read_last(tmp_path, ONE.uuid)
    with pytest.raises(ChangesError, match="not the identity"):
        read_last(tmp_path, "../x")


# ---- what can keep it from starting


@pytest.fixture
def journal(tmp_path: Path) -> ChangeJournal:
    return ChangeJournal(tmp_path, -1, ONE.uuid, tmp_path, boot_ms, time.time_ns)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EPERM, "CAP_SYS_ADMIN"),
        (errno.EINVAL, "Linux 5.9"),
        (errno.ENOSYS, "seccomp"),
        (errno.EMFILE, "max_user_groups"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_group_that_cannot_be_opened_is_said_in_words(
    journal: ChangeJournal, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    monkeypatch.setattr(fanotify, "open_group", _raising(number))
    with pytest.raises(ChangesError, match=words):
        journal.start()


@pytest.mark.parametrize(
    ("failing", "number", "words"),
    [
        ("mark_filesystem", errno.EPERM, "CAP_SYS_ADMIN"),
        ("mark_filesystem", errno.EOPNOTSUPP, "overlay"),
        ("mark_filesystem", errno.EXDEV, "subvolume"),
        ("mark_filesystem", errno.ENOSPC, "max_user_marks"),
        ("handle_of", errno.EOPNOTSUPP, "file handle"),
        ("open_handle", errno.EPERM, "CAP_DAC_READ_SEARCH"),
    ],
)
def test_a_volume_that_cannot_be_watched_is_said_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, number: int, words: str
) -> None:
    root_fd, group_fd = os.open(tmp_path, os.O_RDONLY), os.open("/dev/null", os.O_RDONLY)
    monkeypatch.setattr(fanotify, "open_group", lambda unlimited: fanotify.Group(group_fd, True))
    monkeypatch.setattr(fanotify, "mark_filesystem", lambda *_: None)
    monkeypatch.setattr(fanotify, "handle_of", lambda *_: (handle(1), 1))
    monkeypatch.setattr(fanotify, failing, _raising(number))
    journal = ChangeJournal(tmp_path, root_fd, ONE.uuid, tmp_path, boot_ms, time.time_ns)
    with pytest.raises(ChangesError, match=words):
        journal.start()
    os.close(root_fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(group_fd)


def test_a_journal_that_did_not_start_publishes_nothing(
    journal: ChangeJournal, tmp_path: Path
) -> None:
    journal.collect()
    with pytest.raises(ChangesError, match="was not started"):
        journal.publish(tmp_path / "list")
    with pytest.raises(ChangesError, match="does not run"):
        journal.fileno()
    assert not (tmp_path / "list").exists()


def test_a_closed_journal_vouches_for_nothing(journal: ChangeJournal, tmp_path: Path) -> None:
    journal.close()
    journal.close()
    published = journal.publish(tmp_path / "list")
    assert read_published((tmp_path / "list").read_bytes()) == published
    for seq in range(published.last + 1):
        folders, why = published.since(published.journal_id, seq)
        assert folders is None
        assert "it was closed" in why
    with pytest.raises(ChangesError, match="cannot write"):
        journal.publish(tmp_path / "missing" / "list")


def _raising(number: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


# ---- the clocks


class Clocks:
    def __init__(self) -> None:
        self.boot_ms, self.wall_ns = 1_000_000, 1_700_000_000_000_000_000

    def go(self, boot_ms: int, wall_ms: int) -> None:
        self.boot_ms += boot_ms
        self.wall_ns += wall_ms * 1_000_000


@pytest.mark.parametrize(
    ("boot", "wall", "stepped"),
    [(1000, 1000, 0), (1000, 910, 0), (1000, 900_000, 0), (1000, 500, 1), (1000, -1, 1),
     (60_000, 55_000, 0), (60_000, 50_000, 1), (0, -100, 1)],
)  # fmt: skip
def test_a_step_back_is_seen_and_a_slew_is_not(
    tmp_path: Path, boot: int, wall: int, stepped: int
) -> None:
    clocks = Clocks()
    journal = ChangeJournal(
        tmp_path, -1, ONE.uuid, tmp_path, lambda: clocks.boot_ms, lambda: clocks.wall_ns
    )
    journal.close()
    journal.publish(tmp_path / "list")
    clocks.go(boot, wall)
    journal.collect()
    assert journal.counters.full_walks.get(WalkReason.CLOCK, 0) == stepped


# ---- the ledger


class NoTree:
    """A tree in which every file has one name."""

    root_handle = handle(2)
    links = 1

    def statuses(self, folder: bytes, names: list[bytes]) -> list[os.stat_result | None]:
        return [
            os.stat_result((0o100644, hash((folder, name)), 1, self.links, 0, 0, 0, 0, 0, 0))
            for name in names
        ]

    def path_of(self, subject: bytes) -> bytes:
        return b"folder-%d" % int.from_bytes(subject[8:], "little")


def make_ledger(**bounds: int) -> tuple[Ledger, NoTree, Tree]:
    tree = NoTree()
    bounds = {"max_folders": 10, "max_entries": 100} | bounds
    return Ledger("/volume", boot_ms, **bounds), tree, tree  # type: ignore[return-value]


def entry(folder: int, name: bytes, target: int | None = None) -> bytes:
    end = b"" if target is None else record(FID, handle(target))
    return record(DFID_NAME, handle(folder), name) + end


def test_more_folders_than_allowed_are_forgotten_for_a_full_walk() -> None:
    ledger, _, tree = make_ledger(max_folders=10)
    ledger.digest(tree, {entry(n + 100, b"x"): fanotify.FAN_CREATE for n in range(10)})
    assert (len(ledger), ledger.complete_from) == (10, 0)
    ledger.digest(tree, {entry(n + 100, b"x"): fanotify.FAN_CREATE for n in range(8, 12)})
    assert ledger.complete_from == ledger.seq
    assert len(ledger) <= 4
    assert ledger.counters.full_walks == {WalkReason.TOO_MANY_FOLDERS: 1}
    assert "more than 10 folders" in ledger.walk_reason


def test_an_overflow_asks_for_a_full_walk_and_distrusts_known_paths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ledger_module, "_LOOKED_AT_AGAIN", 0)
    ledger, fake, tree = make_ledger()
    ledger.digest(tree, {entry(5, b"x"): fanotify.FAN_CREATE})
    ledger.list_folders(tree)
    assert ledger.listed() == {b"folder-5": 1}
    fake.path_of = lambda subject: b"renamed"  # type: ignore[method-assign]
    ledger.list_folders(tree)
    assert ledger.listed() == {b"folder-5": 1}
    ledger.digest(tree, {b"": fanotify.FAN_Q_OVERFLOW})
    ledger.list_folders(tree)
    assert ledger.listed() == {b"renamed": 1}
    assert ledger.complete_from == ledger.seq == 3
    assert ledger.counters.overflows == 1


def test_own_files_are_ignored_in_the_root_only() -> None:
    ledger, _, tree = make_ledger()
    ours = [entry(2, b".nfsha-stamp"), entry(2, b".nfsha-x.new"), entry(7, b".nfsha-partial")]
    ledger.digest(tree, dict.fromkeys(ours, fanotify.FAN_CREATE))
    assert len(ledger) == 0
    ledger.digest(tree, {entry(7, b".nfsha-stamp"): fanotify.FAN_CREATE})
    assert len(ledger) == 1


@pytest.mark.parametrize("path", [b".nfsha-quarantine/e/f", b"a/.nfsha-partial", b".nfsha-partial"])
def test_folders_of_our_own_are_not_listed(path: bytes) -> None:
    ledger, fake, tree = make_ledger()
    fake.path_of = lambda subject: path  # type: ignore[method-assign]
    ledger.digest(tree, {entry(7, b"x"): fanotify.FAN_CREATE})
    ledger.list_folders(tree)
    assert ledger.listed() == {}
    assert len(ledger) == 0


def test_too_many_hard_links_are_not_searched_for() -> None:
    ledger, fake, tree = make_ledger()
    fake.links = 2
    events = {entry(7, b"%d" % n): fanotify.FAN_CREATE for n in range(MAX_WANTED + 1)}
    ledger.digest(tree, events)
    assert ledger.counters.full_walks == {WalkReason.HARD_LINKS: 1}
    assert ledger.counters.hard_links == MAX_WANTED + 1


def test_too_many_moved_folders_are_not_looked_through() -> None:
    ledger, _, tree = make_ledger()
    mask = fanotify.FAN_MOVED_TO | fanotify.FAN_ONDIR
    ledger.digest(tree, {entry(7, b"%d" % n, n): mask for n in range(10_001)})
    assert ledger.counters.full_walks == {WalkReason.MOVED_FOLDER: 1}


def test_what_was_acknowledged_is_forgotten() -> None:
    ledger, _, tree = make_ledger()
    for folder in (5, 6, 5):
        ledger.digest(tree, {entry(folder, b"x"): fanotify.FAN_DELETE})
    ledger.forget(2)
    ledger.list_folders(tree)
    assert ledger.listed() == {b"folder-5": 3}


def test_a_search_that_takes_too_long_is_given_up() -> None:
    now_ms = 0

    def clock_ms() -> int:
        nonlocal now_ms
        now_ms += 1000
        return now_ms

    tree = NoTree()
    tree.links = 2
    tree.walk = lambda _: ((handle(2), None) for _ in range(10_000_000))  # type: ignore[attr-defined]
    tree.status_at = lambda _: None  # type: ignore[attr-defined]
    fake: Tree = tree  # type: ignore[assignment]
    ledger = Ledger("/volume", clock_ms, max_folders=10, max_entries=10_000_000)
    ledger.digest(fake, {entry(7, b"x"): fanotify.FAN_CREATE})
    pauses: list[int] = []
    ledger.settle(fake, lambda: pauses.append(now_ms))
    assert "takes longer than 30 s" in ledger.walk_reason
    assert 20 < len(pauses) <= 31


def test_a_long_reason_can_be_published() -> None:
    ledger, _, _ = make_ledger()
    ledger.ask_walk(WalkReason.TROUBLE, "x" * 5000)
    one = replace(ONE, walk_reason=ledger.walk_reason)
    assert read_published(encode_published(one)) == one


def test_an_unknown_record_is_no_reason_to_go_on_as_if_nothing_was() -> None:
    ledger, _, tree = make_ledger()
    with pytest.raises(fanotify.EventFormatError):
        ledger.digest(tree, {b"?" * 30: fanotify.FAN_CREATE})


def test_the_module_names_what_others_use() -> None:
    assert all(hasattr(changes, name) for name in changes.__all__)

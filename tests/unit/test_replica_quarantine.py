"""The quarantine store: what goes in comes out the same, nothing is replaced, nothing is lost."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfsha.core.model import Epoch, Role
from nfsha.replica.files import beneath
from nfsha.replica.files.beneath import from_shown, shown
from nfsha.replica.quarantine import quarantine, restoring
from nfsha.replica.quarantine.quarantine import (
    STORE,
    Entry,
    Quarantine,
    QuarantineError,
    Usage,
    over_limits,
)

EPOCH = Epoch(7, "0123456789abcdef", Role.PRIMARY)
NOON_NS = 1_790_000_000_123_000_000  # 2026-09-21T14:13:20.123Z
HOUR_NS = 3_600_000_000_000
ODD = [b"new\nline", b"\xff\xfe not utf-8", b"x" * 255, b"back\\slash", "ä".encode(), b"-rf", b" "]


class Wall:
    """A wall clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.ns = NOON_NS

    def __call__(self) -> int:
        return self.ns


@pytest.fixture
def wall() -> Wall:
    return Wall()


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    folder = tmp_path / "volume"
    folder.mkdir()
    return folder


@pytest.fixture
def store(volume: Path, wall: Wall) -> Iterator[Quarantine]:
    fd = os.open(volume, os.O_RDONLY | os.O_DIRECTORY)
    yield Quarantine(fd, clock_ns=wall)
    os.close(fd)


def begin(store: Quarantine, reason: str = "resync") -> Entry:
    return store.begin(reason, why="it was older", epoch=EPOCH, operation="pass 3", by="nfsha")


def put(volume: Path, name: bytes, content: bytes = b"content") -> Path:
    path = volume / os.fsdecode(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def kept(store: Quarantine, *names: bytes) -> Entry:
    entry = begin(store)
    assert store.keep(entry, names).names == names
    done = store.finish(entry)
    assert done is not None
    return done


def test_an_entry_tells_why_when_and_by_whom(store: Quarantine, volume: Path) -> None:
    put(volume, b"a/one", b"x" * 5000)
    entry = kept(store, b"a/one")
    (listed,) = store.list().entries
    assert listed == entry
    assert entry.name.startswith("20260921T141320.123Z-resync-")
    assert (entry.why, entry.epoch, entry.operation, entry.by) == (
        "it was older", EPOCH, "pass 3", "nfsha",
    )  # fmt: skip
    assert entry.complete and entry.files == 1 and entry.bytes == 8192
    assert (volume / entry.backup_dir / "a/one").read_bytes() == b"x" * 5000
    assert not (volume / "a/one").exists()
    for folder in (volume / STORE, volume / STORE / entry.name):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_an_entry_into_which_nothing_went_is_not_kept(store: Quarantine, volume: Path) -> None:
    assert store.finish(begin(store)) is None
    assert store.list().entries == ()
    assert list((volume / STORE).iterdir()) == []


def test_what_was_begun_and_never_finished_is_listed_and_comes_back(
    store: Quarantine, volume: Path
) -> None:
    put(volume, b"a/one")
    store.keep(begin(store), [b"a/one"])
    (entry,) = store.list().entries  # as after a crash: nobody finished it
    assert not entry.complete and entry.files is None and not entry.trouble
    assert store.usage() == Usage(1, 1, 4096, NOON_NS, 1)
    assert store.restore(entry.name).files == 1
    assert (volume / "a/one").read_bytes() == b"content"


@pytest.mark.parametrize(
    "damage", ["", "{}", "null", "[" * 9000, '{"nfsha_quarantine": 2}', '{"nfsha_quarantine": 1}']
)
def test_an_entry_with_a_damaged_record_is_listed_and_comes_back(
    store: Quarantine, volume: Path, damage: str
) -> None:
    put(volume, b"one")
    entry = kept(store, b"one")
    (volume / STORE / entry.name / "entry.json").write_text(damage)
    (listed,) = store.list().entries
    assert listed.trouble and not listed.complete
    assert (listed.name, listed.reason, listed.created_ns) == (entry.name, "resync", NOON_NS)
    assert store.usage().files == 1
    assert store.restore(entry.name).emptied
    assert (volume / "one").read_bytes() == b"content"


def test_what_others_put_into_the_store_does_not_hide_the_entries(
    store: Quarantine, volume: Path
) -> None:
    put(volume, b"one")
    entry = kept(store, b"one")
    here = volume / STORE
    (here / "20269999T999999.999Z-resync-01234567").mkdir()
    (here / "20260921T141320.123Z-file-01234567").write_text("no folder")
    (here / "20260921T141320.123Z-link-01234567").symlink_to(entry.name)
    (here / "notes").mkdir()
    listed = store.list().entries
    assert [one.name for one in listed if not one.trouble] == [entry.name]
    assert [(one.created_ns, one.complete) for one in listed if one.trouble] == [(0, False)]
    assert store.usage().files == 1


def test_the_record_of_another_entry_is_damage(store: Quarantine, volume: Path) -> None:
    put(volume, b"one")
    put(volume, b"two")
    first, second = kept(store, b"one"), kept(store, b"two")
    data = (volume / STORE / first.name / "entry.json").read_bytes()
    (volume / STORE / second.name / "entry.json").write_bytes(data)
    assert {entry.name: bool(entry.trouble) for entry in store.list().entries} == {
        first.name: False,
        second.name: True,
    }


def test_odd_names_go_in_are_shown_in_order_and_come_back(store: Quarantine, volume: Path) -> None:
    names = [b"folder " + name[:100] + b"/" + name for name in ODD]
    for name in names:
        put(volume, name, name)
    entry = kept(store, *names)
    page = store.show(entry.name)
    assert not page.more
    assert [item.name for item in page.items if item.kind == "file"] == sorted(names)
    assert all(item.shown.isprintable() for item in page.items)
    assert [from_shown(item.shown) for item in page.items] == [item.name for item in page.items]
    assert store.restore(entry.name).files == len(names)
    for name in names:
        assert (volume / os.fsdecode(name)).read_bytes() == name


@given(st.binary(min_size=1, max_size=60))
def test_a_shown_name_is_safe_and_reads_back(name: bytes) -> None:
    assert shown(name).isprintable()
    assert from_shown(shown(name)) == name
    shown(name).encode("utf-8")


@pytest.mark.parametrize("text", ["a\\", "\\n", "\\x1", "\\xG0", "\\\\"])
def test_other_backslashes_are_no_names(text: str) -> None:
    with pytest.raises(ValueError, match="backslash"):
        from_shown(text)


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_pages_hold_everything_once(store: Quarantine, volume: Path, limit: int) -> None:
    names = [b"b/z", b"a", b"b/a/x", b"b/a/y", b"b.c", b"c/d/e/f", b"c0"]
    for name in names:
        put(volume, name)
    entry = kept(store, *names)
    whole = [item.name for item in store.show(entry.name).items]
    assert whole == [
        b"a", b"b", b"b/a", b"b/a/x", b"b/a/y", b"b/z", b"b.c", b"c", b"c/d", b"c/d/e",
        b"c/d/e/f", b"c0",
    ]  # fmt: skip
    found: list[bytes] = []
    more = True
    while more:
        page = store.show(entry.name, after=found[-1] if found else None, limit=limit)
        assert len(page.items) == min(limit, len(whole) - len(found))
        found += [item.name for item in page.items]
        more = page.more
    assert found == whole


def test_a_restore_replaces_nothing_and_moves_nothing_when_one_place_is_taken(
    store: Quarantine, volume: Path
) -> None:
    for name in (b"a/one", b"a/two"):
        put(volume, name, b"old")
    entry = kept(store, b"a/one", b"a/two")
    put(volume, b"a/two", b"new")
    result = store.restore(entry.name)
    assert result.files == 0 and result.refused_count == 1
    assert [(one.name, one.why) for one in result.refused] == [
        (b"a/two", "file is in its place, a/two")
    ]
    assert not (volume / "a/one").exists()
    assert (volume / "a/two").read_bytes() == b"new"
    assert store.list().entries == (entry,)


def test_beside_writes_under_another_name(store: Quarantine, volume: Path) -> None:
    long = b"y" * 255
    for name in (b"a/one", b"a/two", long):
        put(volume, name, b"old")
    entry = kept(store, b"a/one", b"a/two", long)
    put(volume, b"a/two", b"new")
    put(volume, long, b"new")
    result = store.restore(entry.name, beside=True)
    assert result.files == 3 and result.emptied and not result.refused
    suffix = f".nfsha-restored-{entry.name}"
    cut = long[: 255 - len(suffix)] + suffix.encode()
    assert dict(result.beside) == {b"a/two": f"a/two{suffix}".encode(), long: cut}
    assert (volume / f"a/two{suffix}").read_bytes() == b"old"
    assert (volume / os.fsdecode(cut)).read_bytes() == b"old"
    assert (volume / "a/two").read_bytes() == b"new"
    assert (volume / "a/one").read_bytes() == b"old"
    assert store.list().entries == ()


def test_single_names_and_folders_can_be_restored(store: Quarantine, volume: Path) -> None:
    names = (b"a/one", b"a/b/two", b"a/b/three", b"c")
    for name in names:
        put(volume, name, name)
    entry = kept(store, *names)
    for folder in ("a/b", "a"):
        (volume / folder).rmdir()
    assert store.restore(entry.name, [b"a/b"]).files == 2
    assert (volume / "a/b/two").read_bytes() == b"a/b/two"
    assert not (volume / "a/one").exists()
    (left,) = store.list().entries
    assert left.files == 2 and left.complete
    assert [item.name for item in store.show(entry.name).items] == [b"a", b"a/one", b"c"]
    result = store.restore(entry.name, [b"c", b"a/none"])
    assert result.files == 0
    assert [(one.name, one.why) for one in result.refused] == [(b"a/none", "not in this entry")]
    assert store.restore(entry.name, [b"c", b"a/one"]).emptied
    assert store.list().entries == ()


def test_a_restore_to_another_place(store: Quarantine, volume: Path) -> None:
    put(volume, b"a/one")
    entry = kept(store, b"a/one")
    put(volume, b"a/one", b"new")
    assert store.restore(entry.name, to=b"back/here").files == 1
    assert (volume / "back/here/a/one").read_bytes() == b"content"
    assert (volume / "a/one").read_bytes() == b"new"
    assert stat.S_IMODE((volume / "back").stat().st_mode) == 0o700


@pytest.mark.parametrize("to", [b"../out", b"/out", b"a//b", b"a/./b", b"", b"a\0b", b"x" * 5000])
def test_a_place_that_is_not_inside_is_refused(store: Quarantine, volume: Path, to: bytes) -> None:
    put(volume, b"one")
    entry = kept(store, b"one")
    with pytest.raises(QuarantineError, match="cannot restore"):
        store.restore(entry.name, to=to)
    assert store.list().entries == (entry,)


def test_what_nfsha_keeps_for_itself_is_neither_kept_nor_restored_to(
    store: Quarantine, volume: Path
) -> None:
    put(volume, b".nfsha-stamp")
    put(volume, b"one")
    entry = begin(store)
    result = store.keep(entry, [b".nfsha-stamp", STORE.encode() + b"/x", b"one"])
    assert result.names == (b"one",)
    assert [one.name for one in result.refused] == [b".nfsha-stamp", STORE.encode() + b"/x"]
    assert store.restore(entry.name, to=STORE.encode()).refused_count == 1
    assert (volume / entry.backup_dir / "one").exists()


def test_a_link_in_the_way_leads_nowhere(store: Quarantine, volume: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    put(volume, b"a/one")
    entry = kept(store, b"a/one")
    (volume / "a").rmdir()
    (volume / "a").symlink_to(outside)
    for beside in (False, True):
        result = store.restore(entry.name, beside=beside)
        assert result.files == 0 and result.refused_count == 1
    assert list(outside.iterdir()) == []
    (outside / "two").write_text("outside")
    again = begin(store)
    assert store.keep(again, [b"a/two"]).names == ()
    assert (outside / "two").exists()


def test_a_client_that_changes_the_place_during_the_restore(
    store: Quarantine, volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the move, the folder becomes a link to elsewhere."""
    outside = tmp_path / "outside"
    outside.mkdir()
    put(volume, b"a/one")
    entry = kept(store, b"a/one")
    look = restoring.Restore.look

    def look_and_swap(self: restoring.Restore, tree: int, names: None) -> None:
        look(self, tree, names)
        (volume / "a").rmdir()
        (volume / "a").symlink_to(outside)

    monkeypatch.setattr(restoring.Restore, "look", look_and_swap)
    result = store.restore(entry.name)
    assert result.files == 0 and [one.name for one in result.refused] == [b"a/"]
    assert list(outside.iterdir()) == []
    assert (volume / entry.backup_dir / "a/one").exists()


def test_a_file_made_in_the_place_during_the_restore_is_not_replaced(
    store: Quarantine, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(volume, b"a/one", b"old")
    entry = kept(store, b"a/one")
    look = restoring.Restore.look

    def look_and_write(self: restoring.Restore, tree: int, names: None) -> None:
        look(self, tree, names)
        put(volume, b"a/one", b"new")

    monkeypatch.setattr(restoring.Restore, "look", look_and_write)
    result = store.restore(entry.name)
    assert result.files == 0
    assert [one.why for one in result.refused] == ["something is in its place"]
    assert (volume / "a/one").read_bytes() == b"new"
    assert (volume / entry.backup_dir / "a/one").read_bytes() == b"old"


def test_hard_links_stay_one_file(store: Quarantine, volume: Path) -> None:
    one = put(volume, b"a/one")
    (volume / "a/two").hardlink_to(one)
    inode = one.stat().st_ino
    entry = kept(store, b"a/one", b"a/two")
    assert entry.files == 2 and entry.bytes == 4096  # once
    store.restore(entry.name)
    assert [(volume / "a" / name).stat().st_ino for name in ("one", "two")] == [inode, inode]


def test_kept_in_place_the_file_is_in_both_until_it_is_replaced(
    store: Quarantine, volume: Path
) -> None:
    path = put(volume, b"a/one", b"old")
    entry = begin(store)
    assert store.keep(entry, [b"a/one"], in_place=True).names == (b"a/one",)
    assert path.read_bytes() == b"old"
    put(volume, b"a/.tmp", b"new").rename(path)
    assert (volume / entry.backup_dir / "a/one").read_bytes() == b"old"
    assert (
        store.keep(entry, [b"a/one"], in_place=True).refused[0].why == "something is in its place"
    )


def test_symlinks_pipes_and_times(store: Quarantine, volume: Path) -> None:
    (volume / "a").mkdir(mode=0o750)
    (volume / "a/link").symlink_to("/nowhere")
    os.mkfifo(volume / "a/pipe")
    path = put(volume, b"a/one")
    os.setxattr(path, "user.color", b"red")
    os.setxattr(volume / "a", "user.color", b"blue")
    os.utime(path, ns=(5, 1_000_000_007))
    os.utime(volume / "a", ns=(5, 2_000_000_009))
    entry = kept(store, b"a/link", b"a/pipe", b"a/one")
    assert [(item.name, item.kind) for item in store.show(entry.name).items] == [
        (b"a", "folder"), (b"a/link", "symlink"), (b"a/one", "file"), (b"a/pipe", "special file"),
    ]  # fmt: skip
    (volume / "a").rmdir()
    store.restore(entry.name)
    assert (volume / "a/link").readlink() == Path("/nowhere")
    assert (volume / "a/pipe").is_fifo()
    assert path.stat().st_mtime_ns == 1_000_000_007
    assert os.getxattr(path, "user.color") == b"red"
    assert os.getxattr(volume / "a", "user.color") == b"blue"
    assert stat.S_IMODE((volume / "a").stat().st_mode) == 0o750
    assert (volume / "a").stat().st_mtime_ns == 2_000_000_009


def test_folders_are_not_kept_one_by_one(store: Quarantine, volume: Path) -> None:
    put(volume, b"a/one")
    result = store.keep(begin(store), [b"a", b"a/none", b"../a"])
    assert [(one.name, one.why) for one in result.refused] == [
        (b"a", "a folder; only files are put aside one by one"),
        (b"a/none", "No such file or directory"),
        (b"../a", "not a plain name relative to the volume's root"),
    ]


def test_drop_wants_the_name_and_deletes_deep_and_wide(store: Quarantine, volume: Path) -> None:
    deep = b"/".join([b"d"] * 300 + [b"file"])
    put(volume, b"wide/one")
    entry = begin(store)
    fd = os.open(volume / entry.backup_dir, os.O_RDONLY)
    for part in deep.split(b"/")[:-1]:
        os.mkdir(part, dir_fd=fd)
        deeper = os.open(part, os.O_RDONLY, dir_fd=fd)
        os.close(os.open(b"beside", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        os.close(fd)
        fd = deeper
    os.close(fd)
    store.keep(entry, [b"wide/one"])
    with pytest.raises(QuarantineError, match="confirm"):
        store.drop(entry.name, confirm="yes")
    store.drop(entry.name, confirm=entry.name)
    assert list((volume / STORE).iterdir()) == []


def test_a_drop_that_was_cut_is_swept_up(
    store: Quarantine, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(volume, b"one")
    entry = kept(store, b"one")
    monkeypatch.setattr(quarantine, "_sweep", lambda _: None)  # the power went
    store.drop(entry.name, confirm=entry.name)
    monkeypatch.undo()
    assert store.list().entries == () and store.usage().files == 0
    assert [path.name for path in (volume / STORE).iterdir()] == [f"{entry.name}.dropped"]
    begin(store)
    assert not (volume / STORE / f"{entry.name}.dropped").exists()


def test_a_restore_that_was_cut_goes_on(
    store: Quarantine, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"a{number}/one".encode() for number in range(20)]
    for name in names:
        put(volume, name, name)
    entry = kept(store, *names)
    for name in names:
        (volume / os.fsdecode(name)).parent.rmdir()
    move, moved = restoring.Restore._move_one, list[object]()

    def move_some(self: restoring.Restore, *args: object) -> None:
        if len(moved) == 7:
            raise KeyboardInterrupt
        moved.append(args)
        move(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(restoring.Restore, "_move_one", move_some)
    with pytest.raises(KeyboardInterrupt):
        store.restore(entry.name)
    monkeypatch.undo()
    assert store.usage().files == 13  # counted anew, not what the record said before
    assert store.restore(entry.name).files == 13
    assert all((volume / os.fsdecode(name)).read_bytes() == name for name in names)


def test_limits_by_age_and_size(store: Quarantine, volume: Path, wall: Wall) -> None:
    entries = []
    for number in range(4):
        name = f"file{number}".encode()
        put(volume, name)
        entries.append(kept(store, name))
        wall.ns += HOUR_NS
    put(volume, b"cut")
    store.keep(begin(store), [b"cut"])
    usage = store.usage()
    assert usage == Usage(5, 5, 5 * 4096, NOON_NS, 1)
    assert store.expired(None, None) == ()
    assert store.expired(int(2.5 * 3_600_000), None) == tuple(entries[:2])
    assert store.expired(None, 2 * 4096) == tuple(entries[:3])
    assert len(store.expired(None, 0)) == 5  # the unfinished one is seen too
    assert store.drop_expired(None, 0) == tuple(entries)  # but only finished ones are dropped
    assert store.usage().files == 1
    assert over_limits(usage, wall.ns, 4 * 3_600_000, 5 * 4096) == ""
    assert over_limits(usage, wall.ns + 1_000_000, 4 * 3_600_000, 4096) == (
        "it holds 20,480 bytes, the limit is 4,096; its oldest entry is 4 h old, the limit is 4 h"
    )


def test_a_volume_without_a_store_has_nothing_and_is_not_written_to(
    store: Quarantine, volume: Path
) -> None:
    assert store.list().entries == () and store.usage() == Usage(0, 0, 0, None, 0)
    with pytest.raises(QuarantineError, match="has no quarantine"):
        store.show("20260921T141320.123Z-resync-01234567")
    assert list(volume.iterdir()) == []


@pytest.mark.parametrize("name", ["", "..", "../x", "x", ".", f"{STORE}", "a/b"])
def test_other_names_are_no_entries(store: Quarantine, name: str) -> None:
    begin(store)
    with pytest.raises(QuarantineError, match="is not the name of a quarantine entry"):
        store.show(name)


def test_a_store_that_is_a_link_or_a_file_is_refused(
    store: Quarantine, volume: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (volume / STORE).symlink_to(outside)
    for act in (lambda: begin(store), store.list, store.usage):
        with pytest.raises(QuarantineError, match="not a folder that nfsha made"):
            act()
    assert list(outside.iterdir()) == []
    (volume / STORE).unlink()
    (volume / STORE).write_text("a client's")
    with pytest.raises(QuarantineError, match="not a folder that nfsha made"):
        begin(store)


def test_a_store_of_somebody_else_is_refused(
    store: Quarantine, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(store)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(QuarantineError, match="belongs to user"):
        store.list()


def test_a_store_left_open_is_closed_again(store: Quarantine, volume: Path) -> None:
    begin(store)
    (volume / STORE).chmod(0o777)
    store.list()
    assert stat.S_IMODE((volume / STORE).stat().st_mode) == 0o700


def test_there_is_a_limit_of_entries(store: Quarantine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "MAX_ENTRIES", 3)
    for _ in range(3):
        begin(store)
    with pytest.raises(QuarantineError, match="restore or drop some"):
        begin(store)
    listing = store.list()
    assert len(listing.entries) == 3 and not listing.more


@pytest.mark.parametrize("reason", ["", "Resync", "a b", "../x", "-a", "a" * 33, "a\n"])
def test_a_reason_is_a_plain_word(store: Quarantine, reason: str) -> None:
    with pytest.raises(ValueError, match="is no reason"):
        begin(store, reason)


def test_no_descriptor_is_left_open(store: Quarantine, volume: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    put(volume, b"a/b/one")
    put(volume, b"a/two")
    entry = kept(store, b"a/b/one", b"a/two")
    store.show(entry.name, limit=1)
    put(volume, b"a/two")
    store.restore(entry.name)
    store.restore(entry.name, beside=True)
    with pytest.raises(QuarantineError):
        store.drop(entry.name, confirm=entry.name)
    with pytest.raises(OSError, match="No such file"):
        beneath.open_folder(store._root, b"a/none/c")
    assert len(list(Path("/proc/self/fd").iterdir())) == before

"""The journal: old or new and nothing else, whatever is cut; all else is kept aside and said."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfsha.core.model import Epoch, Journal, Role
from nfsha.host.journal import (
    MAX_BYTES,
    MAX_EPOCH,
    MAX_KEPT_ASIDE,
    MAX_PENDING_SAVES,
    JournalCorruptError,
    JournalError,
    JournalFile,
    _canonical,
    _envelope,
    decode_document,
    decode_journal,
    encode_document,
    encode_journal,
)

FULL = Journal(
    epoch=Epoch(7, "0123456789abcdef", Role.STANDBY),
    active=True,
    boot_id="6a7f4f6e-9f0e-4f5e-8a43-0d4b0f6a1c22",
    peer_promise=True,
    prepared=Epoch(7, "0123456789abcdef", Role.STANDBY),
    aborted=Epoch(5, "123456789abcdef0", Role.PRIMARY),
)
OLD = encode_journal(Journal())
NEW = encode_journal(FULL)

epochs = st.none() | st.builds(
    Epoch,
    st.integers(1, MAX_EPOCH),
    st.text("0123456789abcdef", min_size=16, max_size=16),
    st.sampled_from(Role),
)
journals = st.builds(
    Journal,
    epoch=epochs,
    active=st.booleans(),
    boot_id=st.text("0123456789abcdef-", max_size=36),
    promise=st.booleans(),
    peer_promise=st.booleans(),
    maintenance=st.booleans(),
    peer_agent_only=st.booleans(),
    prepared=epochs,
    aborted=epochs,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def load(path: Path) -> Any:
    file = JournalFile(path)
    try:
        return file.load()
    finally:
        file.close()


def save(path: Path, document: dict[str, Any]) -> None:
    file = JournalFile(path)
    try:
        file.save(document)
    finally:
        file.close()


# ------------------------------------------------------------------ what is saved is loaded


@given(journals)
def test_every_journal_returns_from_its_bytes(journal: Journal) -> None:
    assert decode_journal(decode_document(encode_document(encode_journal(journal)))) == journal


def test_saved_and_loaded(path: Path) -> None:
    save(path, OLD)
    save(path, NEW)
    loaded = load(path)
    assert decode_journal(loaded.document) == FULL
    assert (loaded.corrupt, loaded.kept_as) == (None, None)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["journal"]


def test_a_missing_file_is_no_journal_and_not_corrupt(path: Path) -> None:
    loaded = load(path)
    assert (loaded.document, loaded.corrupt, loaded.kept_as) == (None, None, None)


def test_a_missing_folder_is_not_a_missing_journal(path: Path) -> None:
    with pytest.raises(JournalError, match=r"there is no folder .*/gone"):
        load(path.parent / "gone" / "journal")


def test_what_a_crash_left_in_the_temporary_file_is_never_read_and_is_replaced(path: Path) -> None:
    save(path, OLD)
    (path.parent / ".journal.new").write_bytes(encode_document(NEW)[:100])
    assert load(path).document == OLD
    save(path, NEW)
    assert load(path).document == NEW


def test_a_link_left_under_the_temporary_name_is_not_written_through(path: Path) -> None:
    victim = path.parent / "victim"
    victim.write_text("precious")
    (path.parent / ".journal.new").symlink_to(victim)
    save(path, NEW)
    assert victim.read_text() == "precious"
    assert load(path).document == NEW


# ------------------------------------------------------------------ what is damaged is not read


def test_truncated_at_each_byte_is_kept_aside(path: Path) -> None:
    data = encode_document(NEW)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        loaded = load(path)
        assert loaded.document is None, length
        assert loaded.corrupt, length
        assert loaded.kept_as is not None
        assert loaded.kept_as.read_bytes() == data[:length]
        assert not path.exists()


def test_each_single_bit_flip_is_found() -> None:
    data = encode_document(NEW)
    for position in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << (position % 8)
        with pytest.raises(JournalCorruptError):
            decode_document(bytes(flipped))


def test_a_journal_of_before_the_handover_is_read() -> None:
    payload = {key: NEW[key] for key in NEW if key not in ("prepared", "aborted")}
    data = _canonical(_envelope(payload, 1))
    read = decode_journal(decode_document(data))
    assert read == replace(FULL, prepared=None, aborted=None)


@given(st.binary(max_size=300))
def test_random_bytes_are_corrupt_and_nothing_worse(data: bytes) -> None:
    with pytest.raises(JournalCorruptError):
        decode_document(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda text: text.replace('"nfsha_journal": 2', '"nfsha_journal": 3'),
            "unknown version 3",
        ),
        (
            lambda text: text.replace('"nfsha_journal": 2', '"nfsha_journal": 1'),
            "this version has no prepared, aborted",
        ),
        (lambda text: text.replace('"nfsha_journal": 2', '"nfsha_journal": true'), "version True"),
        (lambda text: text.replace('"nfsha_journal": 2', '"nfsha_journal": 2.0'), "version 2.0"),
        (lambda text: text.replace('"number": 5', '"number": 8'), "checksum"),
        (lambda text: text.replace('"active": true,', '"active": false, "active": true,'), "bytes"),
        (lambda text: text + " ", "bytes"),
        (lambda text: text + text, "JSON"),
        (lambda text: "", "empty"),
        (lambda text: "[]", "not a JSON object"),
        (lambda text: "[" * 100_000, "JSON"),
        (lambda text: "9" * 100_000, "JSON"),
        (lambda text: " " * (MAX_BYTES + 1), "larger than"),
        (lambda text: "{}", "unknown version None"),
    ],
)
def test_what_is_wrong_is_said(path: Path, change: Any, words: str) -> None:
    path.write_text(change(encode_document(NEW).decode()))
    loaded = load(path)
    assert loaded.document is None
    assert words in loaded.corrupt


def test_at_most_five_corrupt_ones_are_kept_and_the_newest_is_among_them(path: Path) -> None:
    newest = None
    for number in range(MAX_KEPT_ASIDE + 3):
        path.write_text(f"garbage {number}")
        newest = load(path).kept_as
    kept = sorted(path.parent.glob("journal.corrupt-*"))
    assert len(kept) == MAX_KEPT_ASIDE
    assert newest in kept
    assert [entry.read_text() for entry in kept] == [f"garbage {n}" for n in range(3, 8)]


def test_the_newest_corrupt_one_is_kept_also_when_the_wall_clock_went_back(path: Path) -> None:
    for number in range(MAX_KEPT_ASIDE):
        path.with_name(f"journal.corrupt-2999010{number}T000000.000000Z").write_text("older")
    path.write_text("the newest")
    kept_as = load(path).kept_as
    assert kept_as.read_text() == "the newest"
    assert len(list(path.parent.glob("journal.corrupt-*"))) == MAX_KEPT_ASIDE


def test_what_is_not_a_regular_file_is_refused_and_left(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(JournalError, match="not a regular file"):
        load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(JournalError, match="cannot read"):
        load(path)
    path.rmdir()
    path.symlink_to(path.parent / "elsewhere")
    with pytest.raises(JournalError, match="cannot read"):
        load(path)
    assert path.is_symlink()


# ------------------------------------------------------------------ the journal's fields


def _changed(**change: Any) -> dict[str, Any]:
    return NEW | change


def _epoch(**change: Any) -> dict[str, Any]:
    return NEW | {"epoch": NEW["epoch"] | change}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (_changed(active=1), "active is 1"),
        (_changed(promise=None), "promise is None"),
        (_changed(maintenance="true"), "maintenance is 'true'"),
        (_changed(boot_id=None), "boot_id is None"),
        (_changed(boot_id="x" * 65), "boot_id is"),
        (_changed(boot_id="a\nb"), "boot_id is"),
        (_changed(epoch=[1, "a", "primary"]), "epoch is not an object"),
        (_changed(epoch={"number": 1}), "authority, id"),
        (_changed(extra=1), "extra"),
        ({key: value for key, value in NEW.items() if key != "promise"}, "promise"),
        (_epoch(number=0), "number 0"),
        (_epoch(number=-1), "number -1"),
        (_epoch(number=True), "number True"),
        (_epoch(number=1.0), "number 1.0"),
        (_epoch(number="7"), "number '7'"),
        (_epoch(number=MAX_EPOCH + 1), "epoch has the number"),
        (_epoch(id="0123456789abcde"), "id is"),
        (_epoch(id="0123456789ABCDEF"), "id is"),
        (_epoch(id=None), "id is None"),
        (_epoch(authority="both"), "authority is 'both'"),
        (_epoch(authority=None), "authority is None"),
        ({}, "the journal lacks"),
    ],
)
def test_a_field_of_the_wrong_type_is_corruption(document: dict[str, Any], words: str) -> None:
    with pytest.raises(JournalCorruptError, match=words):
        decode_journal(json.loads(json.dumps(document)))


def test_what_json_cannot_carry_is_a_mistake_of_the_program_and_changes_nothing(path: Path) -> None:
    save(path, OLD)
    with pytest.raises(TypeError):
        save(path, {"a": object()})
    with pytest.raises(ValueError, match="nan"):
        save(path, {"a": float("nan")})
    with pytest.raises(ValueError, match="above the limit"):
        save(path, {"a": "x" * MAX_BYTES})
    assert load(path).document == OLD


# ------------------------------------------------------------------ cut at each system call

_CHILD = """
import os, signal, sys
from pathlib import Path
from nfsha.host.journal import JournalFile

path, when, count_down = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
file = JournalFile(path)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def cut(call):
    def wrapped(*args, **kwargs):
        global count_down
        count_down -= 1
        if count_down == 0 and when == "before":
            die()
        if count_down == 0 and when == "half" and call is real_write:
            call(args[0], args[1][: len(args[1]) // 2])
            die()
        result = call(*args, **kwargs)
        if count_down == 0:
            die()
        return result
    return wrapped

real_write = os.write
for name in ("open", "write", "fsync", "close"):
    setattr(os, name, cut(getattr(os, name)))
for name in ("replace", "unlink"):
    setattr(Path, name, cut(getattr(Path, name)))
file.save(NEW)
os._exit(0)
"""


@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_killed_at_each_system_call_leaves_the_old_or_the_new_one(path: Path, when: str) -> None:
    child = f"NEW = {json.loads(json.dumps(NEW))!r}\n{_CHILD}"
    seen: list[bool] = []
    for boundary in range(1, 40):
        save(path, OLD)
        argv = [sys.executable, "-c", child, str(path), when, str(boundary)]
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
        loaded = load(path)
        assert loaded.corrupt is None
        assert loaded.document in (OLD, NEW)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        seen.append(loaded.document == NEW)
    else:
        pytest.fail("the child never came to its end")
    # unlink, open, write, fsync, close, replace, open, fsync, close
    assert len(seen) == 9
    assert seen == sorted(seen), "the new one was there and went away again"
    assert {False, True} == set(seen)


def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(fd: int) -> None:
        calls.append(f"fsync {Path(f'/proc/self/fd/{fd}').readlink().name}")
        real_fsync(fd)

    def replace(self: Path, target: Path) -> Path:
        calls.append(f"rename {self.name} {target.name}")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    save(path, NEW)
    expected = ["fsync .journal.new", "rename .journal.new journal", f"fsync {path.parent.name}"]
    assert calls == expected


@pytest.mark.parametrize(("failing", "replaced"), [(1, False), (2, True)])
def test_a_failed_fsync_is_said_and_which_one_stands(
    path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, replaced: bool
) -> None:
    save(path, OLD)
    calls = 0

    def fsync(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(JournalError, match=r"journal.*: Input/output error") as caught:
        save(path, NEW)
    assert caught.value.replaced is replaced
    assert load(path).document == (NEW if replaced else OLD)
    assert not (path.parent / ".journal.new").exists()


# ------------------------------------------------------------------ the journal's thread


def test_saves_happen_in_the_order_of_the_calls(path: Path) -> None:
    seen: list[int] = []

    class Recorded(JournalFile):
        def _save_bytes(self, data: bytes) -> None:
            super()._save_bytes(data)
            seen.append(decode_document(data)["n"])

    async def main() -> None:
        file = Recorded(path)
        await asyncio.gather(*(file.save_async({"n": n}) for n in range(MAX_PENDING_SAVES)))
        await file.save_async({"n": 99})
        file.close()

    asyncio.run(main())
    assert seen == [*range(MAX_PENDING_SAVES), 99]
    assert load(path).document == {"n": 99}


def test_the_loop_turns_while_the_disk_hangs_and_the_queue_is_bounded(path: Path) -> None:
    disk = threading.Event()

    def hang() -> None:
        disk.wait(30)

    async def main() -> None:
        file = JournalFile(path, thread_setup=hang)
        document = {"n": 0}
        waiting = [asyncio.create_task(file.save_async(document))]
        await asyncio.sleep(0)
        document["n"] = 77  # too late to matter
        for n in range(1, MAX_PENDING_SAVES):
            waiting.append(asyncio.create_task(file.save_async({"n": n})))
        await asyncio.sleep(0.05)
        with pytest.raises(JournalError, match="still has 16 writes to finish"):
            await file.save_async({"n": 16})
        assert load(path).document is None
        for task in waiting[1:]:
            task.cancel()
        disk.set()
        await waiting[0]
        file.close()  # a cancelled caller stops waiting, its save still happens
        assert load(path).document == {"n": MAX_PENDING_SAVES - 1}

    asyncio.run(main())


def test_save_async_reports_what_save_would(path: Path) -> None:
    async def main() -> None:
        file = JournalFile(path.parent / "gone" / "journal")
        with pytest.raises(JournalError, match=r"gone/journal: No such file or directory"):
            await file.save_async(NEW)
        file.close()

    asyncio.run(main())

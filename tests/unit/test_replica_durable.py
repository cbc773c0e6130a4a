"""Small durable files: whole or not at all, in the order that a power cut cannot break."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from nfsha.replica.files.durable import read_small, temporary_name, write_durably, write_durably_at


def test_writes_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "mark"
    write_durably(file, b"one")
    write_durably(file, b"two", mode=0o400)
    assert file.read_bytes() == b"two"
    assert stat.S_IMODE(file.stat().st_mode) == 0o400
    assert [entry.name for entry in tmp_path.iterdir()] == ["mark"]


def test_the_mode_does_not_depend_on_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_durably(tmp_path / "mark", b"", mode=0o664)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "mark").stat().st_mode) == 0o664


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(fd: int) -> None:
        steps.append("fsync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync file")
        fsync(fd)

    def note_rename(old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        steps.append("rename")
        rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    write_durably(tmp_path / "mark", b"data")
    assert steps == ["fsync file", "rename", "fsync folder"]


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:3]))
    write_durably(tmp_path / "mark", b"0123456789")
    assert (tmp_path / "mark").read_bytes() == b"0123456789"


@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_a_failure_leaves_the_old_content_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    file = tmp_path / "mark"
    write_durably(file, b"old")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="full"):
        write_durably(file, b"new")
    monkeypatch.undo()
    assert file.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["mark"]


def test_what_lies_under_the_temporary_name_is_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / temporary_name("mark")).symlink_to(victim)
    write_durably(tmp_path / "mark", b"data")
    assert victim.read_text() == "precious"
    assert (tmp_path / "mark").read_bytes() == b"data"
    assert not (tmp_path / "mark").is_symlink()


def test_a_symbolic_link_of_the_name_is_replaced_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "mark").symlink_to(victim)
    write_durably(tmp_path / "mark", b"data")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "mark").is_symlink()


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_durably(tmp_path / "nowhere" / "mark", b"")


def test_an_open_folder_is_written_to_after_it_was_renamed(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    folder = os.open(tmp_path / "before", os.O_RDONLY | os.O_DIRECTORY)
    try:
        (tmp_path / "before").rename(tmp_path / "after")
        write_durably_at(folder, "mark", b"data")
    finally:
        os.close(folder)
    assert (tmp_path / "after" / "mark").read_bytes() == b"data"


def test_reads_up_to_the_limit_and_not_beyond(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10)
    assert read_small(tmp_path / "file", 10) == b"x" * 10
    with pytest.raises(OSError, match="more than 9 bytes") as caught:
        read_small(tmp_path / "file", 9)
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_reads_regular_files_only_and_never_waits(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "file"
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        (tmp_path / "other").touch()
        file.symlink_to("other")
    with pytest.raises(OSError, match=r"regular file|symbolic links") as caught:
        read_small(file, 10)
    assert caught.value.errno in (errno.EINVAL, errno.ELOOP)

"""The list of large files without holes: what it takes from find, and what it refuses to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from nfsha.replica.volume import dense
from nfsha.replica.volume.dense import (
    NOTHING_DENSE,
    DenseError,
    DenseFiles,
    as_bytes,
    dense_of,
    read_dense,
)

FOUND = (
    b"8 4096 whole\0"  # just as many blocks as bytes
    b"7 4096 hole\0"
    b"16 4096 a b/\n\xff more blocks than bytes\0"
    b"0 10995116277760 image\0"
    b"8 40"  # cut
)


def test_what_has_as_many_blocks_as_bytes_has_no_holes() -> None:
    found = dense_of(FOUND)
    assert found.files == ((b"whole", 4096), (b"a b/\n\xff more blocks than bytes", 4096))
    assert (found.bytes, found.largest_bytes) == (8192, 4096)
    assert dense_of(b"") == NOTHING_DENSE
    assert NOTHING_DENSE.largest_bytes == 0


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    for files in ((), ((b"a\nb", 0), (b"c d/e", (1 << 63) - 1))):
        (tmp_path / "list").write_bytes(as_bytes(DenseFiles(files)))
        assert read_dense(tmp_path / "list") == DenseFiles(files)
    assert read_dense(tmp_path / "none") == NOTHING_DENSE


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "another version"),
        (b"nfsha-dense 2\n", "another version"),
        (b"nfsha-dense 1\n5 a\0" + b"6 b", "cut"),
        (b"nfsha-dense 1\n5 ../a\0", "not a plain name"),
        (b"nfsha-dense 1\n5 /a\0", "not a plain name"),
        (b"nfsha-dense 1\n5 \0", "not a plain name"),
        (b"nfsha-dense 1\n-5 a\0", "no number"),
        (b"nfsha-dense 1\n a\0", "no number"),
        (b"nfsha-dense 1\n" + b"9" * 20 + b" a\0", "no number"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "list").write_bytes(data)
    with pytest.raises(DenseError, match=words):
        read_dense(tmp_path / "list")


def test_it_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "MAX_FILES", 2)
    assert len(dense_of(b"8 1 a\0" * 3).files) == 2
    (tmp_path / "list").write_bytes(b"nfsha-dense 1\n" + b"1 a\0" * 3)
    with pytest.raises(DenseError, match="too long"):
        read_dense(tmp_path / "list")

"""Which large files of a volume have no holes: the list that the source makes for a first copy.

Only the format. A list may be old, and lack files: what is not in it is copied as ever.

    nfsha-dense 1
    SIZE NAME<NUL>SIZE NAME<NUL>...
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nfsha.replica.files.beneath import parts_of
from nfsha.replica.files.durable import read_small

MAX_BYTES: Final = 4 << 20
MAX_FILES: Final = 20_000

_MAGIC: Final = b"nfsha-dense 1\n"
_BLOCK_BYTES: Final = 512  # as stat(2) counts, whatever the filesystem's own blocks are


class DenseError(Exception):
    """A file that is no such list; the text says why."""


@dataclass(frozen=True, slots=True)
class DenseFiles:
    """Names relative to the volume's root, each with its size in bytes."""

    files: tuple[tuple[bytes, int], ...] = ()

    @property
    def bytes(self) -> int:
        """All of them together."""
        return sum(size for _, size in self.files)

    @property
    def largest_bytes(self) -> int:
        """The largest of them; 0 without any."""
        return max((size for _, size in self.files), default=0)


NOTHING_DENSE: Final = DenseFiles()


def dense_name(uuid: str) -> str:
    """The file of one volume's list in the control module."""
    return f"dense-{uuid}"


def dense_of(found: bytes) -> DenseFiles:
    """Those without holes among `BLOCKS SIZE NAME<NUL>...`; what a cut left of the last is none."""
    whole = found.split(b"\0")[:-1]
    fields = (one.split(b" ", 2) for one in whole)
    dense = ((name, int(size)) for blocks, size, name in fields if _is_dense(blocks, size))
    return DenseFiles(tuple(dense)[:MAX_FILES])


def _is_dense(blocks: bytes, size: bytes) -> bool:
    return int(blocks) * _BLOCK_BYTES >= int(size)


def as_bytes(dense: DenseFiles) -> bytes:
    """The list as it is published."""
    return _MAGIC + b"".join(b"%d %s\0" % (size, name) for name, size in dense.files)


def read_dense(path: Path) -> DenseFiles:
    """Reads a list that was fetched; none if there is none. Raises DenseError, OSError."""
    try:
        data = read_small(path, MAX_BYTES)
    except FileNotFoundError:
        return NOTHING_DENSE
    if not data.startswith(_MAGIC):
        raise DenseError("it is of another version of nfsha")
    lines = data[len(_MAGIC) :].split(b"\0")
    if lines.pop() or len(lines) > MAX_FILES:
        raise DenseError("it is cut, or too long")
    return DenseFiles(tuple(_entries(lines)))


def _entries(lines: Iterable[bytes]) -> Iterable[tuple[bytes, int]]:
    for line in lines:
        size, _, name = line.partition(b" ")
        try:
            parts_of(name)
        except ValueError as error:
            raise DenseError(f"one name is {error}") from error
        if not (size.isdigit() and len(size) < 20):
            raise DenseError("one size is no number")
        yield name, int(size)

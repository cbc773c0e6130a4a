"""The record of one quarantine entry: why, when, which epoch, by whom; in its folder, durable.

A record that is missing, damaged or another entry's never hides the entry: it is read as far as the
entry's own name tells, and says what is wrong.
"""

from __future__ import annotations

import errno
import json
import re
import secrets
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from nfsha.core.model import Epoch, Role
from nfsha.replica.files.durable import read_small_at, write_durably_at
from nfsha.replica.files.own_names import QUARANTINE_NAME

STORE: Final = QUARANTINE_NAME
TREE: Final = b"tree"
MAX_TEXT: Final = 2000
NAME: Final = re.compile(r"(\d{8}T\d{6})\.(\d{3})Z-([a-z][a-z0-9-]{0,31})-[0-9a-f]{8}")
REASON: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")
_VERSION: Final = 1
_RECORD: Final = "entry.json"
_MAX_RECORD_BYTES: Final = 64 << 10
_TIME: Final = "%Y%m%dT%H%M%S"
_EPOCH_ID: Final = re.compile(r"[0-9a-f]{16}")
_OLDEST: Final = datetime(1970, 1, 1, tzinfo=UTC)

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """What one operation put aside.

    `created_ns` is wall clock. `files` and `bytes` (as allocated on the disk) are None until the
    entry is finished, and while a restore from it is under way. `trouble` says what is wrong with
    the record of an entry that was not written to its end; the files of it are still there.
    """

    name: str
    reason: str
    why: str
    created_ns: int
    epoch: Epoch | None
    operation: str
    by: str
    complete: bool
    files: int | None = None
    bytes: int | None = None
    trouble: str = ""

    @property
    def backup_dir(self) -> str:
        """Where its files go, relative to the volume's root: what rsync's --backup-dir takes."""
        return f"{STORE}/{self.name}/{TREE.decode()}"


def entry_name(now_ns: int, reason: str) -> str:
    """A new name: when (wall clock), why, and a short random id."""
    when = _OLDEST + timedelta(microseconds=now_ns // 1000)
    return f"{when.strftime(_TIME)}.{when.microsecond // 1000:03d}Z-{reason}-{secrets.token_hex(4)}"


def read_record(folder: int) -> bytes:
    """Nothing where there is none, or where something stands in its place that is none."""
    try:
        return read_small_at(folder, _RECORD, _MAX_RECORD_BYTES)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.EINVAL, errno.EFBIG):
            return b""
        raise


def write_record(folder: int, entry: Entry) -> None:
    """Whole or not at all, and durable."""
    document = asdict(entry)
    del document["trouble"]
    data = json.dumps({"nfsha_quarantine": _VERSION, **document}, indent=1).encode() + b"\n"
    write_durably_at(folder, _RECORD, data, mode=0o600)


def decode_record(name: str, data: bytes) -> Entry:
    """The entry of that name by its record. ValueError only if the name is no entry's."""
    matched = NAME.fullmatch(name)
    if matched is None:
        raise ValueError(f"{name!r} is not the name of an entry")
    blank = Entry(name, matched[3], "", _created_ns(matched), None, "", "", complete=False)
    if not data:
        return replace(blank, trouble="it has no record: cut when it began, or altered")
    try:
        document = json.loads(data)
        if not isinstance(document, dict):
            raise ValueError("not an object")
        return _entry_of(blank, document)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return replace(blank, trouble=f"its record is damaged ({error})"[:MAX_TEXT])


def _created_ns(matched: re.Match[str]) -> int:
    try:
        when = datetime.strptime(matched[1], _TIME).replace(tzinfo=UTC)
    except ValueError:
        return 0  # no day that there is: nfsha did not write it
    return (int((when - _OLDEST).total_seconds()) * 1000 + int(matched[2])) * 1_000_000


def _entry_of(blank: Entry, document: Document) -> Entry:
    if document.pop("nfsha_quarantine") != _VERSION:
        raise ValueError("not a version that this nfsha reads")
    epoch = document.pop("epoch")
    entry = Entry(epoch=None if epoch is None else _epoch_of(epoch), **document)
    texts = (entry.reason, entry.why, entry.operation, entry.by)
    numbers = (entry.files, entry.bytes)
    if entry.name != blank.name or entry.trouble or not all(isinstance(one, str) for one in texts):
        raise ValueError("a text is wrong")
    if type(entry.created_ns) is not int or type(entry.complete) is not bool:
        raise ValueError("the time or the mark of completeness is wrong")
    if not all(one is None or (type(one) is int and one >= 0) for one in numbers):
        raise ValueError("a count is wrong")
    return entry


def _epoch_of(document: Document) -> Epoch:
    number, identity = document["number"], document["id"]
    if type(number) is not int or number < 1 or not _EPOCH_ID.fullmatch(identity):
        raise ValueError("the epoch is wrong")
    return Epoch(number, identity, Role(document["authority"]))

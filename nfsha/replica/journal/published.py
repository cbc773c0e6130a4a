"""What the change journal tells: the file that the passive node fetches, and the one that stays.

Only the format: nothing here watches or decides when to write. A file is text and paths, with a
checksum; what is not exactly so is refused, because a wrong list is a change that never arrives.

    nfsha-changes 1 SHA-256-of-all-that-follows
    {the header, JSON in one line}
    SEQUENCE PATH<NUL>SEQUENCE PATH<NUL>...
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nfsha.replica.files.durable import read_small
from nfsha.replica.volume.facts import cut

MAX_BYTES = 16 << 20
"""The largest file: 50,000 folders with paths of 300 bytes. Above it a full walk is cheaper."""

MAX_FOLDERS = 200_000
MAX_REASON_CHARS = 400
MAX_PATH_BYTES = 4096  # PATH_MAX of linux/limits.h, and rsync's MAXPATHLEN

_MAGIC = b"nfsha-changes 1 "
_MAX_NUMBER = (1 << 63) - 1
_KEYS = {"uuid", "journal_id", "first", "last", "complete_from", "walk_reason", "as_of_ns"}
_NAME = re.compile(r"[0-9A-Za-z-]{1,64}")
_ID = re.compile(r"[0-9a-f]{16}")


class ChangesError(Exception):
    """The change journal cannot work, or a file is none of its; the text says why in words."""


@dataclass(frozen=True, slots=True)
class Published:
    """The changed folders of one volume.

    journal_id: random, new with each start of the journal. first, last: the sequence numbers that
    the journal covers. as_of_ns: the source's wall clock; every change before it is in.
    complete_from: who has applied less than this must walk the whole volume, and walk_reason says
    why. folders: path relative to the volume's root (b"." for the root itself) and the sequence at
    which it last changed, sorted by path.
    """

    uuid: str
    journal_id: str
    first: int
    last: int
    complete_from: int
    walk_reason: str
    as_of_ns: int
    folders: tuple[tuple[bytes, int], ...]

    @property
    def complete(self) -> bool:
        """Whether the list vouches for all that changed since `first`."""
        return self.complete_from < self.first

    def since(self, journal_id: str, seq: int) -> tuple[tuple[bytes, ...] | None, str]:
        """The folders to pull for who has applied `seq` of that journal; or None and the reason.

        None means that only a walk of the whole volume finds what changed.
        """
        if journal_id != self.journal_id:
            return None, "the change journal began anew, after the last pass"
        if seq > self.last:
            return None, f"the change journal is at {self.last}, the last pass claims {seq}"
        if seq < self.complete_from:
            return None, self.walk_reason
        if seq < self.first - 1:
            return None, f"the change journal has forgotten what changed before {self.first}"
        return tuple(path for path, changed in self.folders if changed > seq), ""


@dataclass(frozen=True, slots=True)
class LastRun:
    """What the journal of an earlier run knew to be changed and not yet acknowledged.

    It is never complete: what changed after it was written is not in, and `incomplete` says so.
    """

    published: Published
    incomplete: str


def encode_published(published: Published) -> bytes:
    """Returns the bytes of the file; ValueError above `MAX_BYTES` or `MAX_FOLDERS`."""
    header = {key: getattr(published, key) for key in _KEYS}
    text = json.dumps(header, sort_keys=True, ensure_ascii=True).encode("ascii")
    body = b"".join(b"%d %b\0" % (seq, path) for path, seq in published.folders)
    rest = text + b"\n" + body
    data = _MAGIC + hashlib.sha256(rest).hexdigest().encode("ascii") + b"\n" + rest
    if len(data) > MAX_BYTES or len(published.folders) > MAX_FOLDERS:
        raise ValueError(f"{len(published.folders)} folders in {len(data)} bytes are too many")
    return data


def read_published(data: bytes) -> Published:
    """Returns what a file says. ChangesError for everything that `encode_published` never wrote."""
    if len(data) > MAX_BYTES:
        raise ChangesError(f"the list of changes is larger than {MAX_BYTES} bytes")
    first_line, _, rest = data.partition(b"\n")
    if not first_line.startswith(_MAGIC):
        raise ChangesError("the list of changes does not begin as this nfsha writes it")
    digest = first_line[len(_MAGIC) :]
    if digest != hashlib.sha256(rest).hexdigest().encode("ascii"):
        raise ChangesError("the list of changes is torn: its checksum does not match")
    text, newline, body = rest.partition(b"\n")
    if not newline:
        raise ChangesError("the list of changes has no header")
    published = _with_header(_parse_header(text), _parse_folders(body))
    if encode_published(published) != data:
        raise ChangesError("the list of changes is not spelled as nfsha spells it")
    return published


def last_run_path(folder: Path, uuid: str) -> Path:
    """Where the journal of a volume keeps what is not acknowledged yet."""
    if _NAME.fullmatch(uuid) is None:
        raise ChangesError(f"{cut(uuid)} is not the identity of a volume")
    return folder / f"changes-{uuid}"


def read_last(folder: Path, uuid: str) -> LastRun | None:
    """What the last run knew, None where there was none. Blocks on the disk.

    ChangesError when the file is damaged or the disk refuses to tell.
    """
    path = last_run_path(folder, uuid)
    try:
        published = read_published(read_small(path, MAX_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ChangesError(f"cannot read {path}: {error.strerror or error}") from error
    if published.uuid != uuid:
        raise ChangesError(f"{path} is about the volume {published.uuid}")
    return LastRun(published, _why_incomplete(published))


def _why_incomplete(published: Published) -> str:
    sentence = f"what changed after {published.as_of_ns} ns is not in the list"
    if not published.complete:
        sentence += f"; and before: {published.walk_reason}"
    return sentence


def _parse_header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise ChangesError(f"the list of changes has no readable header: {error}") from error
    if not isinstance(header, dict) or set(header) != _KEYS:
        raise ChangesError("the list of changes has a header with other keys")
    return header


def _with_header(header: dict[str, Any], folders: tuple[tuple[bytes, int], ...]) -> Published:
    for key in ("first", "last", "complete_from", "as_of_ns"):
        if type(header[key]) is not int or not 0 <= header[key] <= _MAX_NUMBER:
            raise ChangesError(f"the list of changes has {key} {cut(header[key])}")
    for key, pattern in (("uuid", _NAME), ("journal_id", _ID)):
        if not isinstance(header[key], str) or pattern.fullmatch(header[key]) is None:
            raise ChangesError(f"the list of changes has {key} {cut(header[key])}")
    reason = header["walk_reason"]
    if not isinstance(reason, str) or len(reason) > MAX_REASON_CHARS:
        raise ChangesError("the list of changes has no readable reason for a full walk")
    if header["first"] > header["last"] + 1 or header["complete_from"] > header["last"] + 1:
        raise ChangesError("the list of changes has sequence numbers that cannot be")
    if any(seq > header["last"] for _, seq in folders):
        raise ChangesError("the list of changes has a folder that changed after its end")
    return Published(folders=folders, **header)


def _parse_folders(body: bytes) -> tuple[tuple[bytes, int], ...]:
    if not body:
        return ()
    if not body.endswith(b"\0") or body.count(b"\0") > MAX_FOLDERS:
        raise ChangesError("the list of changes has a torn or endless list of folders")
    folders = []
    previous: bytes | None = None
    for record in body[:-1].split(b"\0"):
        number, blank, path = record.partition(b" ")
        if not blank or not (number.isdigit() and len(number) < 19):
            raise ChangesError("the list of changes has a folder without a sequence number")
        if not is_plain_path(path) or (previous is not None and path <= previous):
            raise ChangesError(f"the list of changes has the path {path[:80]!r}")
        folders.append((path, int(number)))
        previous = path
    return tuple(folders)


def is_plain_path(path: bytes) -> bool:
    """Whether it is b"." or a relative path without empty, "." or ".." parts."""
    if path == b".":
        return True
    if not path or len(path) > MAX_PATH_BYTES or b"\0" in path:
        return False
    return all(part not in (b"", b".", b"..") for part in path.split(b"/"))

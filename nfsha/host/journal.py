"""The journal: the one small file in which this node remembers what it promised and decided.

A save is whole or not at all: a temporary file in the same folder, written and fsynced, renamed
over the old one, then an fsync of the folder. A file that is torn, altered or of an unknown version
is moved aside and reported; this module never repairs, never falls back to an older copy, and never
guesses.

A change of the fields of `nfsha.core.model.Journal` is a new `VERSION`, with the older one still
read here by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import stat
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nfsha.core.model import Epoch, Journal, Role

VERSION = 2
_WITHOUT_HANDOVER = 1
_HANDOVER_KEYS = ("prepared", "aborted")
"""The older version has not got these: it was written by an nfsha that knew no handover."""
MAX_BYTES = (
    1 << 20
)  # a real journal has about 2 KiB; anything larger was not written by this module
MAX_KEPT_ASIDE = 5
MAX_PENDING_SAVES = 16
MAX_EPOCH = (1 << 63) - 1
_ENVELOPE_KEYS = {"nfsha_journal", "sha256", "payload"}

Document = dict[str, Any]


class JournalError(Exception):
    """The disk refused the journal; the text names the file and the reason, for an operator.

    `replaced` is True in the one case in which the new content is already in place, but whether it
    would survive a power cut is unknown (the fsync of the folder failed). Else the old one stands.
    """

    def __init__(self, message: str, *, replaced: bool = False) -> None:
        super().__init__(message)
        self.replaced = replaced


class JournalCorruptError(ValueError):
    """The bytes are not a journal that this version wrote; the text says in what way."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `JournalFile.load` found.

    `document` is None where there was no file and where it was corrupt; in the latter case
    `corrupt` says why, and `kept_as` where the file is kept now.
    """

    document: Document | None
    corrupt: str | None = None
    kept_as: Path | None = None


def encode_document(document: Document) -> bytes:
    """Returns the bytes of the file: JSON with a version and the SHA-256 of the payload.

    The encoding is canonical (sorted keys, fixed indent), so that one document has one spelling.
    Raises ValueError or TypeError for what JSON cannot carry, and ValueError above `MAX_BYTES`.
    """
    data = _canonical(_envelope(document))
    if len(data) > MAX_BYTES:
        raise ValueError(f"a journal of {len(data)} bytes is above the limit of {MAX_BYTES}")
    return data


def decode_document(data: bytes) -> Document:
    """Returns the document of a file's bytes.

    Raises JournalCorruptError for everything that `encode_document` never wrote.
    """
    envelope = _parse(data)
    version = envelope.get("nfsha_journal")
    if type(version) is not int or version not in (_WITHOUT_HANDOVER, VERSION):
        raise JournalCorruptError(
            f"unknown version {version!r}, this nfsha reads {_WITHOUT_HANDOVER} and {VERSION}"
        )
    if set(envelope) != _ENVELOPE_KEYS:
        raise JournalCorruptError(
            f"has the keys {sorted(envelope)}, expected {sorted(_ENVELOPE_KEYS)}"
        )
    payload = envelope["payload"]
    if not isinstance(payload, dict):
        raise JournalCorruptError("the payload is not an object")
    if envelope["sha256"] != _checksum(payload):
        raise JournalCorruptError("the checksum does not match the payload")
    if (
        _canonical(_envelope(payload, version)) != data
    ):  # a doubled key, or an edit that JSON's reader forgives
        raise JournalCorruptError("the bytes are not the ones that nfsha wrote")
    if version == _WITHOUT_HANDOVER:
        _forbid_keys(payload, _HANDOVER_KEYS)
        payload |= dict.fromkeys(_HANDOVER_KEYS)
    return payload


def encode_journal(journal: Journal) -> Document:
    """Returns the document that `JournalFile.save` takes."""
    return asdict(journal)


def decode_journal(document: Document) -> Journal:
    """Returns the journal of a loaded document.

    Raises JournalCorruptError when a field is missing, unknown, or not of its type and form. A file
    with a sound checksum and such a content was not written by this version of nfsha.
    """
    _require_keys(document, {field.name for field in fields(Journal)}, "the journal")
    return Journal(
        epoch=_decode_epoch(document, "epoch"),
        active=_flag(document, "active"),
        boot_id=_text(document, "boot_id", r"[0-9A-Za-z-]{0,64}"),
        promise=_flag(document, "promise"),
        peer_promise=_flag(document, "peer_promise"),
        maintenance=_flag(document, "maintenance"),
        peer_agent_only=_flag(document, "peer_agent_only"),
        prepared=_decode_epoch(document, "prepared"),
        aborted=_decode_epoch(document, "aborted"),
    )


def _decode_epoch(document: Document, key: str) -> Epoch | None:
    value = document[key]
    if value is None:
        return None
    if not isinstance(value, dict):
        raise JournalCorruptError(f"{key} is not an object")
    _require_keys(value, {field.name for field in fields(Epoch)}, key)
    number = value["number"]
    if type(number) is not int or not 1 <= number <= MAX_EPOCH:
        raise JournalCorruptError(f"{key} has the number {number!r}, expected 1 to {MAX_EPOCH}")
    authority = _text(value, "authority", "|".join(Role))
    return Epoch(number=number, id=_text(value, "id", r"[0-9a-f]{16}"), authority=Role(authority))


def _forbid_keys(payload: Document, keys: tuple[str, ...]) -> None:
    found = [key for key in keys if key in payload]
    if found:
        raise JournalCorruptError(f"this version has no {', '.join(found)}")


def _require_keys(value: Document, expected: set[str], what: str) -> None:
    if set(value) != expected:
        different = ", ".join(sorted(map(str, set(value) ^ expected)))
        raise JournalCorruptError(f"{what} lacks or does not know these fields: {different}")


def _flag(document: Document, key: str) -> bool:
    value = document[key]
    if not isinstance(value, bool):
        raise JournalCorruptError(f"{key} is {value!r}, expected true or false")
    return value


def _text(document: Document, key: str, pattern: str) -> str:
    value = document[key]
    if not isinstance(value, str) or re.fullmatch(pattern, value) is None:
        raise JournalCorruptError(f"{key} is {value!r}, expected text of the form {pattern}")
    return value


class JournalFile:
    """The journal at `path`. Its folder must exist; one process, one instance per file.

    `load` and `save` block on the disk; the daemon uses `save_async`, which runs one save after the
    other in a thread of its own. `thread_setup` runs first in that thread (to raise its priority:
    what a process under SCHED_RESET_ON_FORK starts, threads too, has normal priority). It must not
    raise.
    """

    def __init__(self, path: Path, *, thread_setup: Callable[[], None] | None = None) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.new")
        self._under_way: deque[Future[None]] = deque()
        self._worker = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="nfsha-journal", initializer=thread_setup
        )

    def load(self) -> Loaded:
        """Reads the file; a corrupt one is moved to `NAME.corrupt-<UTC time>` (five are kept).

        Raises JournalError when the disk cannot tell (EIO, EACCES, not a regular file, no folder),
        or the corrupt file cannot be moved: then not even that there is no journal is known.
        """
        try:
            data = self._read()
        except FileNotFoundError:
            self._require_folder()
            return Loaded(None)
        except OSError as error:
            raise JournalError(f"cannot read {self.path}: {_words(error)}") from error
        try:
            return Loaded(decode_document(data))
        except JournalCorruptError as error:
            return Loaded(None, str(error), self._keep_aside())

    def save(self, document: Document) -> None:
        """Replaces the file durably; when this returns, the document survives a power cut.

        Raises JournalError when the disk refuses; the old content then stands (but see
        `JournalError.replaced`). Raises ValueError or TypeError as `encode_document` does: that is
        a mistake in the program.
        """
        self._save_bytes(encode_document(document))

    async def save_async(self, document: Document) -> None:
        """Runs `save` in the journal's thread; saves happen strictly in the order of the calls.

        The document is encoded at once, so later changes to the dict do not matter. A cancelled
        caller stops waiting, but its save still happens. Raises as `save` does, and JournalError
        when `MAX_PENDING_SAVES` saves are waiting for the disk already.
        """
        while self._under_way and self._under_way[0].done():
            self._under_way.popleft()
        if len(self._under_way) >= MAX_PENDING_SAVES:
            raise JournalError(
                f"cannot write {self.path}: the disk still has {MAX_PENDING_SAVES} writes to finish"
            )
        future = self._worker.submit(self._save_bytes, encode_document(document))
        self._under_way.append(future)
        await asyncio.shield(asyncio.wrap_future(future))

    def close(self) -> None:
        """Waits for the saves under way and ends the thread; no save after it. Idempotent."""
        self._worker.shutdown(wait=True)

    def _read(self) -> bytes:
        # O_NONBLOCK so that a FIFO in this place cannot stop the daemon; O_NOFOLLOW because a
        # rename would replace a symbolic link instead of the file behind it.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(self.path, flags)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file")
            return file.read(MAX_BYTES + 1)

    def _require_folder(self) -> None:
        """A missing folder (a disk that is not mounted) is not the same as a missing journal."""
        if not self.path.parent.is_dir():
            raise JournalError(f"cannot read {self.path}: there is no folder {self.path.parent}")

    def _save_bytes(self, data: bytes) -> None:
        try:
            self._write_temporary(data)
            self._temporary.replace(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)
            raise JournalError(f"cannot write {self.path}: {_words(error)}") from error
        try:
            self._sync_folder()
        except OSError as error:
            raise JournalError(
                f"wrote {self.path}, but cannot make it durable: {_words(error)}", replaced=True
            ) from error

    def _write_temporary(self, data: bytes) -> None:
        # Removed first: what a crash (or anybody else) left under this name is not written through.
        self._temporary.unlink(missing_ok=True)
        fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)

    def _sync_folder(self) -> None:
        fd = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _keep_aside(self) -> Path:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        aside = self.path.with_name(f"{self.path.name}.corrupt-{stamp}")
        try:
            self.path.rename(aside)
            self._prune_aside(aside)
            self._sync_folder()
        except OSError as error:
            raise JournalError(
                f"cannot move the corrupt {self.path} aside: {_words(error)}"
            ) from error
        return aside

    def _prune_aside(self, newest: Path) -> None:
        kept = sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.corrupt-*"))
        others = [path for path in kept if path != newest]  # the wall clock may have gone back
        for path in others[: max(0, len(others) - (MAX_KEPT_ASIDE - 1))]:
            path.unlink()


def _parse(data: bytes) -> Document:
    if len(data) > MAX_BYTES:
        raise JournalCorruptError(f"larger than {MAX_BYTES} bytes")
    if not data:
        raise JournalCorruptError("empty")
    try:
        envelope = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise JournalCorruptError(f"not the JSON that nfsha writes: {error}") from error
    if not isinstance(envelope, dict):
        raise JournalCorruptError("not a JSON object")
    return envelope


def _envelope(payload: Document, version: int = VERSION) -> Document:
    return {"nfsha_journal": version, "sha256": _checksum(payload), "payload": payload}


def _canonical(value: Document) -> bytes:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def _checksum(payload: Document) -> str:
    return hashlib.sha256(_canonical(payload)).hexdigest()


def _words(error: OSError) -> str:
    return error.strerror or str(error)

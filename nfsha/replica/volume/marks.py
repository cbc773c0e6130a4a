"""What this node knows for good of each copy: its sync marks, the peer's, and what is tainted.

A mark is the record of one complete pass. The taint says that a volume may hold a mixture of two
states (a resync began and did not end). Beside the last pass of a copy stands when all of it was
walked last, and when verified, and beside any mark what the volume was called here, for the day it
is not mounted any more. One small file for each mark and one for the taint, in one folder: a pass
of one volume writes one block, whatever the number of volumes.

Nothing is ever guessed. A mark that cannot be read is no mark; a taint file that cannot be read, or
is missing beside marks, taints everything. Decides nothing but `wholeness`, which is takeover
condition 2, and reads no clock.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeVar

from nfsha.core.model import Epoch
from nfsha.replica.files.durable import read_small, write_durably
from nfsha.replica.volume.facts import (
    VolumeError,
    VolumeFacts,
    cut,
    epoch_as_json,
    epoch_from_json,
    is_identity,
    is_text,
)

EVERYTHING: Final = "*"
"""Stands in `MarkStore.tainted` for every volume there is."""

VERSION: Final = 1
MAX_MARKS: Final = 4096
MAX_BYTES: Final = 4096  # of one mark's file; a real one has about 500
MAX_NAME_BYTES: Final = 32 << 10  # PATH_MAX bytes, each in JSON's longest spelling
MAX_TAINT_BYTES: Final = 1 << 20  # MAX_MARKS volumes, each with a short reason
MAX_WHY: Final = 200
WALKS: Final = ("full", "folders", "verify", "handover")
_NUMBER_LIMIT: Final = (1 << 63) - 1
_TAINT: Final = "taint"
_WALKED: Final = "walked"
_NAME: Final = "name"
_SHOWN_MAX: Final = 3  # reasons in one sentence

Document = dict[str, Any]
_T = TypeVar("_T")


class MarksError(Exception):
    """The marks cannot be read or written, or a mark is none; the text names the file and why."""


@dataclass(frozen=True, slots=True)
class Mark:
    """One complete pass of one volume.

    `started_ns` is the source's wall clock (Unix time): everything that was written before is in
    the copy. `walk` is one of `WALKS`. `changes_id` and `changes_seq` say up to where of which
    change journal was applied ("" and 0 without one).
    """

    volume: str
    epoch: Epoch
    started_ns: int
    files: int
    bytes: int
    transferred_bytes: int
    deletions: int
    duration_ms: int
    walk: str
    changes_id: str
    changes_seq: int

    def age_ms(self, now_ns: int) -> int:
        """How old the copy is at this wall time; 0 where the source's clock is ahead of ours."""
        return max(0, now_ns - self.started_ns) // 1_000_000


@dataclass(frozen=True, slots=True)
class Walked:
    """When all of a copy was walked last, and when verified (Unix time, by wall clock).

    The walk by the source's clock, as the mark; the verify by this node's. A copy counts as
    verified when it was made: until then there was nothing that could have rotted.
    """

    volume: str
    full_ns: int
    verify_ns: int


def mark_as_json(mark: Mark) -> Document:
    """Returns the mark as JSON can carry it."""
    document: Document = {name: getattr(mark, name) for name in _NAMES}
    return {**document, "epoch": epoch_as_json(mark.epoch)}


def mark_from_json(document: object) -> Mark:
    """Returns the mark of a document; MarksError for anything that `mark_as_json` never made."""
    if not isinstance(document, dict) or document.keys() != _NAMES:
        raise MarksError("a mark that lacks a field, or has one that is not known")
    for name in _NUMBERS:
        value = document[name]
        if type(value) is not int or not 0 <= value <= _NUMBER_LIMIT:
            raise MarksError(f"a mark with {name} {cut(value)}, expected a number from 0 on")
    if not is_identity(document["volume"]):
        raise MarksError(f"a mark of {cut(document['volume'])}, expected a volume's UUID")
    if document["walk"] not in WALKS:
        raise MarksError(f"a mark with walk {cut(document['walk'])}, expected one of {WALKS}")
    changes = document["changes_id"]
    if not isinstance(changes, str) or len(changes) > 64 or not changes.isascii():
        raise MarksError(f"a mark with changes_id {cut(changes)}, expected a short text")
    try:
        epoch = epoch_from_json(document["epoch"])
    except VolumeError as error:
        raise MarksError(f"a mark: {error}") from error
    return Mark(**{**document, "epoch": epoch})


_NAMES: Final = dict.fromkeys(one.name for one in fields(Mark)).keys()
_NUMBERS: Final = (
    "started_ns",
    "files",
    "bytes",
    "transferred_bytes",
    "deletions",
    "duration_ms",
    "changes_seq",
)


class MarkStore:
    """The marks in the folder `path`, which is made when it is missing (its parent must be there).

    `load` first. Everything that writes blocks on the disk and belongs into a thread; what it wrote
    is durable when it returns, and only then to be seen here. The properties may be read from any
    thread; the dicts that they give are never changed afterwards.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._own: dict[str, Mark] = {}
        self._peer: dict[str, Mark] = {}
        self._walked: dict[str, Walked] = {}
        self._names: dict[str, str] = {}
        # Until `load` has said otherwise nothing here is to be relied upon.
        self._taint: dict[str, str] = {EVERYTHING: "the marks were not read yet"}

    @property
    def own(self) -> dict[str, Mark]:
        """The last complete pass of each volume into this node's copy, by UUID."""
        return self._own

    @property
    def peer(self) -> dict[str, Mark]:
        """The same, as the peer told it of its copies."""
        return self._peer

    def since_ms(self, uuid: str, walk: str, now_ns: int) -> int | None:
        """How long ago all of a copy was walked ("full") or verified ("verify"); None: never.

        0 where that was after `now_ns` (a wall clock that was set).
        """
        walked = self._walked.get(uuid)
        if walked is None:
            return None
        then_ns = walked.verify_ns if walk == "verify" else walked.full_ns
        return max(0, now_ns - then_ns) // 1_000_000

    @property
    def names(self) -> dict[str, str]:
        """What each volume of which there is a mark was called here last, by UUID."""
        return self._names

    @property
    def taints(self) -> dict[str, str]:
        """Why volumes are tainted, by UUID; `EVERYTHING` stands for all of them."""
        return self._taint

    @property
    def tainted(self) -> frozenset[str]:
        """UUIDs of the volumes that may hold a mixture; `EVERYTHING` stands for all of them."""
        return frozenset(self._taint)

    def taint_of(self, uuid: str) -> str:
        """Why a volume is tainted; "" if it is not."""
        return self._taint.get(uuid) or self._taint.get(EVERYTHING, "")

    def load(self) -> tuple[str, ...]:
        """Reads everything; returns a sentence for each file that was no good and was moved aside.

        Raises MarksError when the disk cannot tell, or a bad file cannot be moved.
        """
        with self._lock:
            try:
                return tuple(self._load())
            except OSError as error:
                raise MarksError(
                    f"cannot read the marks in {self.path}: {_words(error)}"
                ) from error

    def put_own(self, mark: Mark) -> None:
        """Records a complete pass into this node's copy. MarksError when the disk refuses."""
        with self._lock:
            self._write_marks("own", [mark])
            self._own = _with(self._own, [mark])
            if mark.walk == "full":
                before = self._walked.get(mark.volume)
                verify_ns = mark.started_ns if before is None else before.verify_ns
                self._write_walked(Walked(mark.volume, mark.started_ns, verify_ns))
            self._forget_walks(self._own)

    def note_verify(self, uuid: str, at_ns: int) -> None:
        """Records that a copy was compared to its end at this wall time. MarksError if it cannot.

        One of which no complete pass is known is not recorded.
        """
        with self._lock:
            before = self._walked.get(uuid)
            if before is not None:
                self._write_walked(Walked(uuid, before.full_ns, at_ns))

    def put_peer(self, marks: Iterable[Mark]) -> None:
        """Records what the peer told of its copies; what is known already is not written again."""
        with self._lock:
            new = [mark for mark in marks if self._peer.get(mark.volume) != mark]
            self._write_marks("peer", new)
            self._peer = _with(self._peer, new)

    def taint(self, uuids: Iterable[str], why: str) -> None:
        """Taints volumes, durably: before the first write of a resync. MarksError if it cannot."""
        wanted = dict.fromkeys(uuids, why[:MAX_WHY])
        for uuid in wanted:
            if not is_identity(uuid):
                raise MarksError(f"{uuid!r:.80} cannot be tainted, expected a volume's UUID")
        with self._lock:
            self._set_taint({**wanted, **self._taint})

    def untaint(self, uuids: Collection[str] | None = None) -> None:
        """Takes the taint off these volumes, or off all, durably. MarksError if it cannot.

        Where everything is tainted because a file was lost, only taking it off all of them helps.
        """
        with self._lock:
            kept = {} if uuids is None else {k: v for k, v in self._taint.items() if k not in uuids}
            self._set_taint(kept)

    def put_names(self, names: Mapping[str, str]) -> None:
        """Records what volumes are called here, of those of which there is a mark."""
        with self._lock:
            kept = self._own.keys() | self._peer.keys()
            for uuid, name in names.items():
                if uuid in kept and self._names.get(uuid) != name:
                    self._write(f"{_NAME}-{uuid}", {"volume": uuid, "name": name})
                    self._names = {**self._names, uuid: name}
            self._forget_names(kept)

    def forget(self, uuid: str) -> tuple[str, ...]:
        """Removes all that is known of a volume that is no more; says in words what that was.

        A taint of everything stays. MarksError when the disk refuses; then say it again.
        """
        with self._lock:
            found = tuple(self._known_of(uuid))
            # The name is last: by it an operator calls again what a crash has left half forgotten.
            for side in (_WALKED, "own", "peer"):
                self._remove(f"{side}-{uuid}")
            self._walked, self._own, self._peer = (
                _without(self._walked, uuid), _without(self._own, uuid), _without(self._peer, uuid)
            )  # fmt: skip
            self._set_taint(_without(self._taint, uuid))
            self._forget_names(self._names.keys() - {uuid})
            return found

    def _known_of(self, uuid: str) -> Iterator[str]:
        if uuid in self._own:
            yield f"the last pass into this node (epoch {self._own[uuid].epoch.number})"
        if uuid in self._peer:
            yield f"the last pass into the other node (epoch {self._peer[uuid].epoch.number})"
        if uuid in self._walked:
            yield "when it was walked and verified"
        if uuid in self._taint:
            yield f"its taint ({self._taint[uuid]})"

    def _load(self) -> list[str]:
        self.path.mkdir(mode=0o755, exist_ok=True)
        names = sorted(entry.name for entry in self.path.iterdir())
        found: dict[str, dict[str, Mark]] = {"own": {}, "peer": {}}
        walked: dict[str, Walked] = {}
        called: dict[str, str] = {}
        reports = []
        for name in names:
            side, _, uuid = name.partition("-")
            if side not in (*found, _WALKED, _NAME) or not is_identity(uuid):
                continue  # the taint, what was moved aside, what a crash left half written
            limit_bytes = MAX_NAME_BYTES if side == _NAME else MAX_BYTES
            try:
                payload = _decode(read_small(self.path / name, limit_bytes))
                if payload.get("volume") != uuid:
                    raise MarksError(f"a mark of the volume {cut(payload.get('volume'))}")
                if side == _WALKED:
                    walked[uuid] = _walked_from(payload)
                elif side == _NAME:
                    called[uuid] = _name_from(payload)
                else:
                    found[side][uuid] = mark_from_json(payload)
            except (MarksError, OSError) as error:
                reports.append(f"{self._moved_aside(name, error)}; it counts as no mark")
        self._own, self._peer = _with({}, found["own"].values()), _with({}, found["peer"].values())
        self._walked = {uuid: one for uuid, one in walked.items() if uuid in self._own}
        self._names = called
        return reports + self._load_taint(bool(names))

    def _load_taint(self, was_used: bool) -> list[str]:
        try:
            self._taint = _taint_from(_decode(read_small(self.path / _TAINT, MAX_TAINT_BYTES)))
        except FileNotFoundError:
            if not was_used:
                self._set_taint({})
                return []
            why = f"{self.path / _TAINT} is missing beside marks"
        except (MarksError, OSError) as error:
            why = self._moved_aside(_TAINT, error)
        else:
            return []
        # Written down at once: the next start must not find a clean slate.
        self._set_taint({EVERYTHING: why[:MAX_WHY]})
        return [f"{why}; every volume counts as tainted until it was copied anew"]

    def _moved_aside(self, name: str, error: Exception) -> str:
        """Keeps a file for whoever wants to know; a disk that fails says so by an OSError."""
        if isinstance(error, OSError) and not _is_about_the_file(error):
            raise error
        aside = self.path / f"corrupt-{name}"
        os.replace(self.path / name, aside)  # noqa: PTH105 - one for each name, so it is bounded
        return f"{self.path / name} is not what nfsha wrote ({_words(error)}), kept as {aside.name}"

    def _write_marks(self, side: str, marks: Iterable[Mark]) -> None:
        for mark in marks:
            self._write(f"{side}-{mark.volume}", mark_as_json(mark))
        known = self._own if side == "own" else self._peer
        for uuid in known.keys() - _with(known, marks).keys():
            self._remove(f"{side}-{uuid}")

    def _write_walked(self, walked: Walked) -> None:
        self._write(f"{_WALKED}-{walked.volume}", asdict(walked))
        self._walked = {**self._walked, walked.volume: walked}

    def _forget_walks(self, known: Collection[str]) -> None:
        """Of copies that are no more."""
        for uuid in self._walked.keys() - set(known):
            self._remove(f"{_WALKED}-{uuid}")
            self._walked = _without(self._walked, uuid)

    def _forget_names(self, kept: Collection[str]) -> None:
        for uuid in self._names.keys() - set(kept):
            self._remove(f"{_NAME}-{uuid}")
            self._names = _without(self._names, uuid)

    def _set_taint(self, taint: dict[str, str]) -> None:
        if taint != self._taint:
            self._write(_TAINT, dict(sorted(taint.items())))
        self._taint = taint

    def _write(self, name: str, payload: Document) -> None:
        try:
            write_durably(self.path / name, _encode(payload))
        except OSError as error:
            raise MarksError(f"cannot write {self.path / name}: {_words(error)}") from error

    def _remove(self, name: str) -> None:
        try:
            (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise MarksError(f"cannot remove {self.path / name}: {_words(error)}") from error


def wholeness(
    paired: Sequence[VolumeFacts],
    store: MarkStore,
    epoch: Epoch,
    now_ns: int,
    max_age_ms: int | None,
    *,
    is_authority: bool = False,
) -> tuple[bool, str]:
    """Whether this node is a whole replica of the epoch (takeover condition 2), and why.

    At least one volume is paired; each is sound, bears the epoch's stamp, is untainted, and its
    last complete pass is of this epoch and not older than `max_age_ms`. `is_authority`: this node
    itself is the epoch's authority; then its data is the truth and needs no pass.
    `now_ns` is this node's wall clock. The sentence holds no moving number, so that it is equal as
    long as nothing happens.
    """
    if not paired:
        return False, "no volume is paired"
    doubts = [
        f"{facts.name}: {why}"
        for facts in paired
        if (why := _doubt(facts, store, epoch, is_authority=is_authority))
    ]
    doubts += [f"{uuid} is the identity of two volumes" for uuid in _twice(paired)]
    if doubts:
        return False, _some(doubts)
    if is_authority:
        return True, f"{_count(paired)} of epoch {epoch}, whose authority this node is"
    old = [
        f"{facts.name}: its copy is older than max_data_age ({_age(max_age_ms)})"
        for facts in paired
        if max_age_ms is not None and store.own[str(facts.identity)].age_ms(now_ns) > max_age_ms
    ]
    if old:
        return False, _some(old)
    return True, f"{_count(paired)} copied whole in epoch {epoch}"


def _doubt(facts: VolumeFacts, store: MarkStore, epoch: Epoch, *, is_authority: bool) -> str:
    if facts.refused or facts.failing:
        return facts.refused or facts.failing
    if facts.identity is None:
        return "it bears no identity"
    if facts.stamp != epoch:
        return f"it holds the data of epoch {facts.stamp or '(none)'}, the authority's is {epoch}"
    if why := store.taint_of(facts.identity):
        return f"it is tainted ({why})"
    mark = store.own.get(facts.identity)
    if is_authority or (mark is not None and mark.epoch == epoch):
        return ""
    last = "never" if mark is None else f"in epoch {mark.epoch}"
    return f"no pass was completed in epoch {epoch}, the last one {last}"


def _twice(paired: Sequence[VolumeFacts]) -> list[str]:
    counted = Counter(facts.identity for facts in paired if facts.identity is not None)
    return sorted(uuid for uuid, count in counted.items() if count > 1)


def _some(reasons: Sequence[str]) -> str:
    more = len(reasons) - _SHOWN_MAX
    return "; ".join(reasons[:_SHOWN_MAX]) + (f"; and {more} more" if more > 0 else "")


def _count(paired: Sequence[VolumeFacts]) -> str:
    return "1 volume" if len(paired) == 1 else f"{len(paired)} volumes"


def _age(age_ms: int) -> str:
    return f"{age_ms / 1000:.1f} s"


def _with(known: Mapping[str, Mark], marks: Iterable[Mark]) -> dict[str, Mark]:
    """The new dict: never more than `MAX_MARKS`, the passes that began first go first."""
    together = {**known, **{mark.volume: mark for mark in marks}}
    if len(together) <= MAX_MARKS:
        return together
    newest = sorted(together.values(), key=lambda mark: mark.started_ns)[-MAX_MARKS:]
    return {mark.volume: mark for mark in newest}


def _without(known: Mapping[str, _T], uuid: str) -> dict[str, _T]:
    return {one: kept for one, kept in known.items() if one != uuid}


def _encode(payload: Document) -> bytes:
    envelope = {"nfsha_marks": VERSION, "sha256": _checksum(payload), "payload": payload}
    return _canonical(envelope)


def _decode(data: bytes) -> Document:
    """The payload of a file's bytes; MarksError for everything that `_encode` never wrote."""
    try:
        envelope = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise MarksError(f"not the JSON that nfsha writes: {error}") from error
    if not isinstance(envelope, dict) or envelope.get("nfsha_marks") != VERSION:
        raise MarksError(f"not of version {VERSION}")
    payload = envelope.get("payload")
    if not isinstance(payload, dict) or _encode(payload) != data:
        raise MarksError("the checksum does not match")
    return payload


def _walked_from(payload: Document) -> Walked:
    names = {one.name for one in fields(Walked)}
    times = [payload.get("full_ns"), payload.get("verify_ns")]
    if set(payload) != names or not all(
        type(time) is int and 0 <= time <= _NUMBER_LIMIT for time in times
    ):
        raise MarksError("a record of walks that lacks a time, or has something else")
    return Walked(**payload)


def _name_from(payload: Document) -> str:
    name = payload.get("name")
    if set(payload) != {"volume", "name"} or not is_text(name) or not isinstance(name, str):
        raise MarksError(f"a volume's name {cut(name)}")
    return name


def _taint_from(payload: Document) -> dict[str, str]:
    for uuid, why in payload.items():
        if (uuid != EVERYTHING and not is_identity(uuid)) or not isinstance(why, str) or not why:
            raise MarksError(f"a taint of {cut(uuid)} because of {cut(why)}")
    return dict(payload)


def _canonical(value: Document) -> bytes:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def _checksum(payload: Document) -> str:
    return hashlib.sha256(_canonical(payload)).hexdigest()


def _is_about_the_file(error: OSError) -> bool:
    """Whether the file is of a wrong kind, rather than the disk broken."""
    return error.errno in (errno.EINVAL, errno.EFBIG, errno.ELOOP, errno.ENXIO)


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)

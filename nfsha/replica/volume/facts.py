"""What is known of one volume, as a value: beside the other node's, and as it travels there.

Plain values; it reads nothing and asks nobody.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from nfsha.core.model import Epoch, Role

ROOT_NAME: Final = "."
"""The name of the volume that is the NFS root's own filesystem."""

MAX_EPOCH: Final = (1 << 63) - 1
_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")

# Options with which the same data behaves differently. Each: what a client would notice.
_OPTIONS_THAT_MATTER: Final = {
    "nosuid": "setuid bits do nothing",
    "nodev": "device files do nothing",
    "noexec": "programs do not start on the server",
    "noacl": "ACLs are ignored",
    "nouser_xattr": "user xattrs are refused",
    "sync": "every write waits for the disk",
    "nobarrier": "a power cut may lose acknowledged writes",
    "barrier=0": "a power cut may lose acknowledged writes",
    "data=writeback": "a power cut may leave old blocks in new files",
    "usrquota": "users have quotas",
    "grpquota": "groups have quotas",
    "prjquota": "projects have quotas",
    "case_insensitive": "names that differ in case only are the same",
}

Document = dict[str, Any]


class VolumeError(Exception):
    """A volume that is not what it should be: the path, what was found, and what to do about it."""


@dataclass(frozen=True, slots=True)
class VolumeFacts:
    """What is known of one mounted filesystem. Sizes are bytes; `inodes` 0 means: no limit.

    `free_bytes` is what an ordinary user can still write. `device_number` is st_dev of its files.
    `options` has those of the mount and those of the filesystem. `failing` says that the storage is
    broken; `refused`, that this cannot be a volume (or that its identity or stamp cannot be read:
    then both are None, and None means nothing).
    """

    name: str
    path: Path
    device: str
    device_number: int
    fstype: str
    fs_uuid: str | None
    size_bytes: int
    free_bytes: int
    inodes: int
    free_inodes: int
    options: str
    read_only: bool
    failing: str
    identity: str | None
    stamp: Epoch | None
    empty: bool
    refused: str = ""

    @property
    def used_bytes(self) -> int:
        """What a copy of it needs, at least."""
        return self.size_bytes - self.free_bytes


def is_of_another_history(stamp: Epoch | None, epoch: Epoch) -> bool:
    """Data under this stamp is newer than the epoch, or of another one of the same number.

    None, and a lower number, are older data: they may be replaced by the epoch's.
    """
    return stamp is not None and stamp != epoch and stamp.number >= epoch.number


_SIZE_TOLERANCE: Final = 100  # one part in so many: equal disks formatted by other programs


def differences(here: VolumeFacts, there: VolumeFacts) -> tuple[str, ...]:
    """Says in sentences what is not alike on this node and the other, or wrong on either.

    Not free space (it changes all the time) and not the stamp (a copy's may be older).
    """
    found = [
        f"{side}: {why}"
        for side, facts in (("here", here), ("there", there))
        for why in (facts.refused, facts.failing, "mounted read-only" if facts.read_only else "")
        if why
    ]
    if here.name != there.name:
        found.append(f"mounted as {here.name} here and as {there.name} there")
    if here.identity != there.identity:
        found.append(
            f"the identity is {here.identity or 'missing'} here, "
            f"{there.identity or 'missing'} there"
        )
    if here.fstype != there.fstype:
        found.append(
            f"{here.fstype} here, {there.fstype} there: names, links and attributes that one of "
            f"them allows may not fit the other"
        )
    found.extend(_smaller("bytes", here.size_bytes, there.size_bytes))
    found.extend(_smaller("inodes", here.inodes, there.inodes))
    found.extend(_option_differences(here, there))
    return tuple(found)


def _smaller(what: str, here: int, there: int) -> Iterator[str]:
    if not here or not there:
        return
    for side, mine, other in (("here", here, there), ("there", there, here)):
        if mine < other - other // _SIZE_TOLERANCE:
            yield f"smaller {side}: {mine} {what}, on the other node {other}"


def _option_differences(here: VolumeFacts, there: VolumeFacts) -> Iterator[str]:
    left, right = set(here.options.split(",")), set(there.options.split(","))
    for option, effect in _OPTIONS_THAT_MATTER.items():
        if (option in left) != (option in right):
            side, other = ("here", "there") if option in left else ("there", "here")
            yield f"option {option} {side} and not {other}: {effect} {side}"


_NAMES: Final = dict.fromkeys(field.name for field in fields(VolumeFacts)).keys()
_NUMBERS: Final = ("device_number", "size_bytes", "free_bytes", "inodes", "free_inodes")
_TEXTS: Final = ("name", "device", "fstype", "options", "failing", "refused")
_FLAGS: Final = ("read_only", "empty")
_TEXT_LIMIT: Final = 4096  # PATH_MAX; a sentence is far shorter
_REPR: Final = reprlib.Repr()
_REPR.maxlevel = 3  # `repr` itself fails on what is nested deeper than Python calls
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_NUMBER_LIMIT: Final = (1 << 64) - 1


def as_json(facts: VolumeFacts) -> Document:
    """Returns the facts as JSON can carry them, to the other node or to a command."""
    document: Document = {name: getattr(facts, name) for name in _NAMES}
    document["path"] = str(facts.path)
    document["stamp"] = None if facts.stamp is None else epoch_as_json(facts.stamp)
    return document


def from_json(document: object) -> VolumeFacts:
    """Returns the facts that `as_json` made a document of; VolumeError for anything else."""
    if not isinstance(document, dict) or document.keys() != _NAMES:
        raise VolumeError("facts of a volume that lack a field, or have one that is not known")
    values: Document = dict(document)
    for name in _NUMBERS:
        _require(type(values[name]) is int and 0 <= values[name] <= _NUMBER_LIMIT, name, values)
    for name in _TEXTS:
        _require(is_text(values[name]), name, values)
    for name in _FLAGS:
        _require(isinstance(values[name], bool), name, values)
    for name in ("fs_uuid", "identity"):
        _require(values[name] is None or is_text(values[name]), name, values)
    _require(values["identity"] is None or is_identity(values["identity"]), "identity", values)
    _require(_is_relative(values["name"]), "name", values)
    _require(is_text(values["path"]) and values["path"].startswith("/"), "path", values)
    values["path"] = Path(values["path"])
    values["stamp"] = None if values["stamp"] is None else epoch_from_json(values["stamp"])
    return VolumeFacts(**values)


def epoch_as_json(epoch: Epoch) -> Document:
    """Returns an epoch as JSON can carry it."""
    return {"number": epoch.number, "id": epoch.id, "authority": str(epoch.authority)}


def epoch_from_json(document: object) -> Epoch:
    """Returns the epoch of a document; VolumeError for anything that is none."""
    if not isinstance(document, dict) or set(document) != {"number", "id", "authority"}:
        raise VolumeError(f"{cut(document)} is not an epoch")
    number, identity, authority = document["number"], document["id"], document["authority"]
    if (
        type(number) is not int
        or not 1 <= number <= MAX_EPOCH
        or not isinstance(identity, str)
        or not re.fullmatch(r"[0-9a-f]{16}", identity)
        or authority not in (Role.PRIMARY.value, Role.STANDBY.value)
    ):
        raise VolumeError(f"{cut(document)} is not an epoch")
    return Epoch(number=number, id=identity, authority=Role(authority))


def is_identity(value: object) -> bool:
    """Whether this is a volume's identity: a UUID in lower case with hyphens."""
    return isinstance(value, str) and _UUID.fullmatch(value) is not None


def is_text(value: object) -> bool:
    """Whether this is a text that a file's name, or a sentence, can be; never longer than 4096.

    A lone surrogate that stands for no byte is none: it could be neither opened nor printed.
    """
    if not isinstance(value, str) or len(value) > _TEXT_LIMIT or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def cut(value: object) -> str:
    """What somebody else sent, for a sentence: short, whatever it is and however deep."""
    return _REPR.repr(value)[:80]


def _is_relative(name: str) -> bool:
    return name == ROOT_NAME or not set(name.split("/")) & {"", ".", ".."}


def _require(good: bool, name: str, values: Document) -> None:
    if not good:
        raise VolumeError(f"facts of a volume with {name} {cut(values[name])}")

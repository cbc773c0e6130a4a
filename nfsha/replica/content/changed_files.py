"""Which files of a volume changed since a moment, by the one time that no client can set back.

A file whose size and mtime were set back after it was changed looks equal to a pass. Its ctime
tells, but rsync does not carry it: so the node that compares contents asks the source for the names
of the files whose ctime is young (`ChangedQuestion`, `answer`). What a returned node changed itself
is found in the same way. It only looks at a volume; it must not change anything there.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any, Final, Self

from nfsha.replica.content import file_names
from nfsha.replica.content.content_files import content_files
from nfsha.replica.files.own_names import STAMP_NAME

MAX_NAMES: Final = 100_000
MAX_NAMES_BYTES: Final = 5 << 20
"""In base64 less than `questions.MAX_ANSWER_BYTES`. For more, all of a volume is compared."""

SLACK_NS: Final = 60 * 10**9
"""A clock may be set while files are written, and the stamp of an epoch is written when clients
are served already: files so much older count as changed too."""

_LONGEST_MS: Final = 1 << 53
_QUESTION: Final = {"uuid", "age_ms", "asked_ms", "since_ns"}

Document = dict[str, Any]


class ChangedError(ValueError):
    """What came from the other node is no question, or no answer to ours; the text says why."""


@dataclass(frozen=True, slots=True)
class ChangedFiles:
    """Names relative to the volume's root; `more`: there were too many to be named."""

    names: tuple[bytes, ...]
    more: bool = False

    def to_json(self) -> Document:
        """What JSON can carry."""
        return {"names": [file_names.to_text(name) for name in self.names], "more": self.more}

    @classmethod
    def from_json(cls, document: object) -> Self:
        """Reads what `to_json` made. ChangedError for anything else."""
        if not isinstance(document, dict) or document.keys() != {"names", "more"}:
            raise ChangedError("not an object with the names of changed files")
        listed, more = document["names"], document["more"]
        if not isinstance(listed, list) or len(listed) > MAX_NAMES or not isinstance(more, bool):
            raise ChangedError("the names of changed files are no list of a bounded length")
        try:
            found = tuple(file_names.from_text(one) for one in listed)
            for name in found:
                file_names.require_data(name)
        except ValueError as error:
            raise ChangedError(str(error)) from error
        return cls(found, more)


@dataclass(frozen=True, slots=True)
class ChangedQuestion:
    """Asks for the files of the volume `uuid` that changed within the last `age_ms`.

    None: since the present epoch began. `since_ns`: or since then, by the clock of who is asked, if
    that is earlier: a clock that was set forward makes all files older. `asked_ms` tells one
    question from the next.
    """

    uuid: str
    age_ms: int | None
    asked_ms: int
    since_ns: int = 0

    def to_json(self) -> Document:
        """What JSON can carry."""
        return {
            "uuid": self.uuid, "age_ms": self.age_ms, "asked_ms": self.asked_ms,
            "since_ns": self.since_ns,
        }  # fmt: skip

    @classmethod
    def is_meant(cls, document: object) -> bool:
        """Whether a question of the other node is one of these."""
        return isinstance(document, dict) and "asked_ms" in document

    @classmethod
    def from_json(cls, document: object) -> Self:
        """Reads what `to_json` made. ChangedError for anything else."""
        if not isinstance(document, dict) or document.keys() != _QUESTION:
            raise ChangedError("not an object with a volume and an age")
        uuid, age_ms, asked_ms = document["uuid"], document["age_ms"], document["asked_ms"]
        if not isinstance(uuid, str) or len(uuid) > 64:
            raise ChangedError("the uuid is no short text")
        for number in (asked_ms, 0 if age_ms is None else age_ms):
            if type(number) is not int or not 0 <= number <= _LONGEST_MS:
                raise ChangedError(f"{number!r:.40} is no time in milliseconds")
        since_ns = document["since_ns"]
        if type(since_ns) is not int or not 0 <= since_ns < 1 << 63:
            raise ChangedError(f"{since_ns!r:.40} is no time in nanoseconds")
        return cls(uuid, age_ms, asked_ms, since_ns)


def answer(root_fd: int, question: ChangedQuestion) -> ChangedFiles:
    """The files asked for. Blocks: it looks at each file of the volume. Raises OSError.

    Never further back than the present epoch began: what was before, is in both copies.
    """
    began_ns = os.stat(STAMP_NAME, dir_fd=root_fd, follow_symlinks=False).st_ctime_ns
    if question.age_ms is not None:
        then_ns = time.time_ns() - question.age_ms * 1_000_000
        began_ns = max(began_ns, min(then_ns, question.since_ns))
    return changed_since(root_fd, began_ns)


def changed_since(
    root_fd: int,
    since_ns: int,
    *,
    max_names: int = MAX_NAMES,
    max_bytes: int = MAX_NAMES_BYTES,
) -> ChangedFiles:
    """The regular files with content whose ctime is not older than that, with some slack.

    Blocks. Raises OSError for a folder that cannot be read: what is in it is not known.
    """
    young: list[bytes] = []
    size = 0
    for name, found in content_files(root_fd, _unread):
        if found.st_ctime_ns < since_ns - SLACK_NS:
            continue
        young.append(name)
        size += len(name)
        if len(young) > max_names or size > max_bytes:
            return ChangedFiles((), more=True)
    return ChangedFiles(tuple(young))


def _unread(_folder: bytes, error: OSError | ValueError) -> None:
    if isinstance(error, OSError):
        raise error
    # Deeper than a path may be: no pass brings it anywhere.

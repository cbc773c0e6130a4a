"""What a command ends with: the one table of exit codes, an answer, or an error with its remedy.

Values only. Nothing here prints or ends the process (`main` does).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum


class Exit(IntEnum):
    """The exit codes of every command; `MEANINGS` is their documentation."""

    DONE = 0
    CANNOT = 1
    USAGE = 2
    REFUSED = 3
    ABORTED = 4
    INCOMPLETE = 5
    UNREACHABLE = 6
    INTERRUPTED = 130


MEANINGS: Mapping[Exit, str] = {
    Exit.DONE: "done",
    Exit.CANNOT: "it cannot be done on this machine; the message says what is wrong and what helps",
    Exit.USAGE: "wrong usage, or an error in the configuration",
    Exit.REFUSED: "refused by a rule or a guard, or not confirmed; nothing has changed",
    Exit.ABORTED: "begun, then aborted and rolled back",
    Exit.INCOMPLETE: "begun or moved, but a later step is not complete; the message says which",
    Exit.UNREACHABLE: "the daemon is not running, or does not answer",
    Exit.INTERRUPTED: "interrupted from the keyboard",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command found or did: `text` for people, `data` for programs (plain JSON types).

    A command that has printed all by itself (`events --follow`) leaves both empty.
    """

    text: str = ""
    data: Mapping[str, object] = field(default_factory=dict)
    exit: int = Exit.DONE


class CommandError(Exception):
    """A command that did not do what was asked: the exit code, what is wrong, and what helps.

    `data` goes to programs beside the message.
    """

    def __init__(
        self,
        exit_code: Exit,
        message: str,
        remedy: str = "",
        data: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self.exit = exit_code
        self.message = message
        self.remedy = remedy
        self.data = dict(data or {})

"""How anything is said to people: durations, amounts, names, and lines of 80 columns. Pure."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from nfsha.replica.files.beneath import shown

WIDTH: Final = 80
_LABEL: Final = 13
_PLAIN: Final = "\x1b[0m"
_THOUSAND: Final = 999.5
_ONE_DIGIT: Final = 9.95
_LAST_SECOND: Final = 253_402_300_799
"""The end of the year 9999, the last that `datetime` knows."""

RED: Final = "\x1b[31m"
GREEN: Final = "\x1b[32m"
YELLOW: Final = "\x1b[33m"
BOLD: Final = "\x1b[1m"

Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Style:
    """How text is shown; without colour nothing but printable characters and newlines."""

    colour: bool = False

    def paint(self, text: str, code: str) -> str:
        """The text in this colour, where colours are wanted."""
        return f"{code}{text}{_PLAIN}" if self.colour else text


def duration(ms: int | None) -> str:
    """A duration as people say it, in at most two units: `43 ms`, `2 h 3 min`; None is `never`."""
    if ms is None:
        return "never"
    if ms < 1000:
        return f"{ms} ms"
    if ms < 10_000:
        return f"{ms / 1000:.1f} s"
    total_s = ms // 1000
    if total_s < 60:
        return f"{total_s} s"
    minutes, seconds = divmod(total_s, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def ago(ms: int | None) -> str:
    """How long ago: `43 ms ago`, or `never`."""
    return "never" if ms is None else f"{duration(ms)} ago"


def printable(text: object) -> str:
    """The text with everything a terminal might obey replaced."""
    return "".join(one if one.isprintable() else "?" for one in str(text))


def spelled(name: str) -> str:
    """A volume's name, as Python has it (os.fsdecode), in the spelling that commands take back."""
    try:
        return shown(os.fsencode(name))
    except UnicodeEncodeError:  # no name that a filesystem here could have
        return printable(name)


def size(amount_bytes: float) -> str:
    """An amount of data as people say it, in decimal units: `812 B`, `1.2 MB`, `98 GB`."""
    amount, unit = float(amount_bytes), "B"
    for bigger in ("kB", "MB", "GB", "TB", "PB"):
        if amount < _THOUSAND:
            break
        amount, unit = amount / 1000, bigger
    return f"{amount:.{int(unit != 'B' and amount < _ONE_DIGIT)}f} {unit}"


def count(number: int, thing: str) -> str:
    """`1 file`, `31,204 files`; also of what ends in y."""
    if number == 1:
        return f"1 {thing}"
    return f"{number:,} {thing[:-1]}ies" if thing.endswith("y") else f"{number:,} {thing}s"


def moment(ns: int) -> str:
    """A moment of the wall clock, in UTC."""
    seconds = min(max(ns // 10**9, 0), _LAST_SECOND)
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def get(facts: Facts, *names: str) -> Any:  # noqa: ANN401 - JSON of another process
    """What stands under these names, one in the other; None where anything is missing."""
    value: Any = facts
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def epoch_text(epoch: Facts | int | None) -> str:
    """An epoch as `7 (01234567)`, `7` where only its number is known, or `none`."""
    if isinstance(epoch, Mapping) and epoch:
        return f"{epoch['number']} ({str(epoch['id'])[:8]})"
    return str(epoch) if isinstance(epoch, int) else "none"


def labelled(label: str, text: object, indent: int = 0) -> list[str]:
    """A label and its sentence, wrapped beside it; without a label it goes on below the last."""
    start = " " * indent + (f"{label}: " if label else "")
    return textwrap.wrap(
        printable(text),
        WIDTH,
        initial_indent=f"{start:<{_LABEL}}",
        subsequent_indent=" " * _LABEL,
        break_on_hyphens=False,
    )


def paragraph(text: str, indent: int = 0) -> str:
    """The text in lines of at most 80 columns, all but the first indented."""
    return textwrap.fill(
        printable(text), WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False
    )

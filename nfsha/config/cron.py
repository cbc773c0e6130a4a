"""Reads the five fields of a cron line, as strictly as three readers of it could agree on.

It must not know the time: it only says whether a line is right, and fires at all. What cron(8) and
APScheduler read differently is refused: weekdays by number (cron's 0 is Sunday, APScheduler's is
Monday) and a day of the month beside a weekday (cron fires on either, APScheduler on both).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class _Field:
    """One of the five: its name, its bounds (crontab(5)), and the words that stand for numbers."""

    name: str
    least: int
    most: int
    words: tuple[str, ...] = ()


_MONTHS: Final = (
    "jan",
    "feb",
    "mar",
    "apr",
    "may",
    "jun",
    "jul",
    "aug",
    "sep",
    "oct",
    "nov",
    "dec",
)
_WEEKDAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_FIELDS: Final = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of the month", 1, 31),
    _Field("month", 1, 12, _MONTHS),
    _Field("weekday", 0, 6, _WEEKDAYS),
)
_DAY, _MONTH, _WEEKDAY = _FIELDS[2:]
_LONGEST_MONTH: Final = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

_PART: Final = re.compile(
    r"(\*|([a-z]{3}|[0-9]{1,2})(?:-([a-z]{3}|[0-9]{1,2}))?)(?:/([0-9]{1,2}))?"
)


def fault(line: str) -> str:
    """What is wrong with this cron line, to follow `must `; empty when it is right."""
    texts = line.split(" ")
    if len(texts) != len(_FIELDS) or not all(texts):
        return 'be five fields with one blank between them, as in "*/5 * * * *"'
    values: dict[str, frozenset[int]] = {}
    for field, text in zip(_FIELDS, texts, strict=True):
        found = _values(field, text)
        if isinstance(found, str):
            return found
        values[field.name] = found
    if texts[2] != "*" and texts[4] != "*":
        return (
            "leave the day of the month or the weekday as *: programs differ on whether either"
            " or both must fit"
        )
    if not any(min(values[_DAY.name]) <= _LONGEST_MONTH[n - 1] for n in values[_MONTH.name]):
        return "name a date that exists: this one never comes"
    return ""


def _values(field: _Field, text: str) -> frozenset[int] | str:
    """The numbers that one field stands for, or what is wrong with it."""
    taken: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part)
        span = match and _span(field, match)
        if match is None or span is None:
            return _right(field)
        first, last = span
        step = int(match[4]) if match[4] else 1
        # APScheduler refuses a step that is never taken.
        if match[4] and not 1 <= step <= last - first:
            return _right(field)
        taken.update(range(first, last + 1, step))
    return frozenset(taken)


def _span(field: _Field, match: re.Match[str]) -> tuple[int, int] | None:
    """The first and last number of one part; None where it is not right."""
    whole, first_text, last_text, step = match.groups()
    if step and field is _WEEKDAY:
        return None  # counted from Sunday by cron(8), from Monday by APScheduler
    if whole == "*":
        return field.least, field.most
    if step and (last_text is None or not last_text.isdecimal()):
        return None  # crontab(5) has steps after a range; APScheduler overlooks them after words
    last_text = last_text or first_text
    if first_text.isdecimal() != last_text.isdecimal():
        return None  # APScheduler reads jan-6 as jan
    first, last = _number(field, first_text), _number(field, last_text)
    return (first, last) if first is not None and last is not None and first <= last else None


def _number(field: _Field, text: str) -> int | None:
    if text in field.words:
        return field.words.index(text) + field.least
    if field is _WEEKDAY or not text.isdecimal():
        return None
    return int(text) if field.least <= int(text) <= field.most else None


def _right(field: _Field) -> str:
    if field is _WEEKDAY:
        return (
            "have as weekday *, or names from mon to sun (numbers mean other days in other"
            ' programs), as in "mon-fri" or "sat,sun"'
        )
    words = f" or {field.words[0]} to {field.words[-1]}" if field.words else ""
    return (
        f"have as {field.name} *, or numbers from {field.least} to {field.most}{words}, as in"
        f' "*/2" or "{field.least},{field.least + 2}-{field.least + 5}"'
    )

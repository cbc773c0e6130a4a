"""How facts about a node's NFS service travel to the other node, and how what differs is said.

Plain values; it reads nothing and asks nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

Document = dict[str, Any]
_TEXT_LIMIT: Final = 4096  # PATH_MAX; a sentence is far shorter
_Item = TypeVar("_Item")


class FactsError(ValueError):
    """A document that is not the facts that it should be; the text says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Objection:
    """Why clients must not be moved now: what is wrong, what both sides show, what to do about it.

    `there` is empty where one node's facts are wrong by themselves.
    """

    what: str
    here: str
    remedy: str
    there: str = ""

    def __str__(self) -> str:
        seen = f"here {self.here}, there {self.there}" if self.there else self.here
        return f"{self.what}: {seen}; {self.remedy}"


class Fields:
    """Takes the fields out of a document that came from the other node; FactsError for garbage."""

    def __init__(self, what: str, document: object, *names: str) -> None:
        """The document must be a mapping with exactly these names."""
        if not isinstance(document, dict) or set(document) != set(names):
            raise FactsError(f"{what} that lack a field, or have one that is not known")
        self._what = what
        self._document: Document = document

    def text(self, name: str) -> str:
        """A text of at most 4096 characters."""
        value = self._document[name]
        self._require(_is_text(value), name)
        return str(value)

    def optional_text(self, name: str) -> str | None:
        """The same, or None."""
        return None if self._document[name] is None else self.text(name)

    def number(self, name: str, most: int) -> int:
        """A whole number from 0 to `most`."""
        value = self._document[name]
        self._require(type(value) is int and 0 <= value <= most, name)
        return int(value)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self._document[name]
        self._require(isinstance(value, bool), name)
        return bool(value)

    def choice(self, name: str, *allowed: str) -> str:
        """One of some words."""
        value = self._document[name]
        self._require(value in allowed, name)
        return str(value)

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """At most so many texts."""
        values = self._list(name, most)
        self._require(all(map(_is_text, values)), name)
        return tuple(values)

    def each(self, name: str, most: int, read: Callable[[object], _Item]) -> tuple[_Item, ...]:
        """At most so many documents, each read by the function."""
        return tuple(read(value) for value in self._list(name, most))

    def given(self, name: str, read: Callable[[object], _Item]) -> _Item:
        """A document, read by the function."""
        return read(self._document[name])

    def optional(self, name: str, read: Callable[[object], _Item]) -> _Item | None:
        """A document, read by the function, or None."""
        value = self._document[name]
        return None if value is None else read(value)

    def _list(self, name: str, most: int) -> list[Any]:
        values = self._document[name]
        self._require(isinstance(values, list) and len(values) <= most, name)
        return list(values)

    def _require(self, good: bool, name: str) -> None:
        if not good:
            raise FactsError(f"{self._what} with {name} {repr(self._document[name])[:80]}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _TEXT_LIMIT and "\0" not in value

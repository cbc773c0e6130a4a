"""Takes keys out of a parsed file and collects what is wrong. Knows no particular key."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeAlias, TypeVar

from nfsha.config.kinds import Finding, Kind, WrongError
from nfsha.config.problems import show_name

T = TypeVar("T")

Place: TypeAlias = tuple[str, ...]
"""Where a key stands: the names of its tables, and its own."""

_ABSENT: Final = object()


@dataclass(frozen=True, slots=True)
class Key(Generic[T]):
    """One key of the file."""

    name: str
    """With its table: `timing.hold`."""
    kind: Kind[T]
    otherwise: T
    """What holds when the key is not given (for a required key: only to go on checking)."""
    default: str
    """The default as the file would write it; empty where there is none."""
    remark: str
    """On the default, in words; `required` where there is none."""
    meaning: str
    """For the operator."""

    @property
    def required(self) -> bool:
        """The file must give it."""
        return self.remark == _REQUIRED


_REQUIRED: Final = "required"


def optional(name: str, kind: Kind[T], default: str, meaning: str, remark: str = "") -> Key[T]:
    """A key whose default is written as in the file, and read by the key's own kind."""
    otherwise = kind.read(tomllib.loads(f"it = {default}")["it"])
    return Key(name, kind, otherwise, default, remark, meaning)


def required(name: str, kind: Kind[T], placeholder: T, meaning: str) -> Key[T]:
    """A key that the file must give; the placeholder stands for it while errors are collected."""
    return Key(name, kind, placeholder, "", _REQUIRED, meaning)


def tables_of(keys: Iterable[Key[Any]]) -> frozenset[Place]:
    """The tables that these keys stand in: `timing`, `firewall`, `firewall.ports`, ..."""
    places = [tuple(key.name.split(".")) for key in keys]
    return frozenset(place[:depth] for place in places for depth in range(1, len(place)))


def flatten(
    document: Mapping[str, object], tables: Collection[Place], above: Place = ()
) -> dict[Place, object]:
    """Each key of the file with its whole place; goes down only into these tables."""
    flat: dict[Place, object] = {}
    for name, value in document.items():
        place = (*above, name)
        if isinstance(value, dict) and place in tables:
            flat |= flatten(value, tables, place)
        else:
            flat[place] = value
    return flat


class Reader:
    """Takes keys out of a flat document; collects what is wrong instead of stopping at it."""

    def __init__(self, document: Mapping[Place, object]) -> None:
        self._document = document
        self.findings: list[Finding] = []
        """What is wrong: the key's name, the value (None: nothing to show), what is right."""
        self.bad: set[str] = set()
        """Names of the keys that are wrong or missing."""

    def take(self, key: Key[T], otherwise: T | None = None) -> T:
        """The key's value; `otherwise`, or the key's own default, where it is absent or wrong."""
        default = key.otherwise if otherwise is None else otherwise
        value = self._document.get(tuple(key.name.split(".")), _ABSENT)
        if value is _ABSENT:
            if key.required:
                self.findings.append((key.name, None, f"is missing: must be {key.kind.right}"))
                self.bad.add(key.name)
            return default
        try:
            return key.kind.read(value)
        except WrongError as wrong:
            self.findings += [(key.name + place, what, why) for place, what, why in wrong.findings]
            self.bad.add(key.name)
            return default

    def given(self, table: str) -> tuple[str, ...]:
        """Names of the keys that the document gives in this table and the tables below it."""
        place = tuple(table.split("."))
        return tuple(
            ".".join(map(show_name, one)) for one in self._document if one[: len(place)] == place
        )

    def refuse_unknown(self, keys: Sequence[Key[Any]]) -> None:
        """Finds fault with every key of the document that is none of these."""
        known = {tuple(key.name.split(".")): key.name for key in keys}
        tables = tables_of(keys)
        for place, value in self._document.items():
            if place in known:
                continue
            name = ".".join(show_name(part) for part in place)
            if place in tables:
                self.findings.append((name, value, f"must be a table: write [{name}]"))
                self.bad.update(key for key in known.values() if key.startswith(f"{name}."))
            else:
                names = tables if isinstance(value, dict) else known
                self.findings.append((name, value, _unknown(place, names)))


def _unknown(place: Place, known: Collection[Place]) -> str:
    """Refuses an unknown key: names the known one of the same name elsewhere, or the nearest."""
    leaves = {one[-1]: ".".join(one) for one in known}
    near = [leaves[place[-1]]] if place[-1] in leaves else []
    if not near:
        near = difflib.get_close_matches(".".join(place), leaves.values(), n=1, cutoff=0.7)
    if not near:
        found = difflib.get_close_matches(place[-1], leaves, n=1, cutoff=0.7)
        near = [leaves[leaf] for leaf in found]
    hint = f"did you mean {near[0]}?" if near else "docs/configuration.md lists the keys"
    return f"is not a key of nfsha; {hint}"

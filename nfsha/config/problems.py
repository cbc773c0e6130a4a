"""What is wrong with a configuration, and how a value is shown in one short printable line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

SIZE_UNITS: Final[Mapping[str, int]] = {
    "TiB": 1 << 40,
    "TB": 10**12,
    "GiB": 1 << 30,
    "GB": 10**9,
    "MiB": 1 << 20,
    "MB": 10**6,
    "KiB": 1 << 10,
    "kB": 10**3,
}
"""Units of size (IEC 80000-13), the largest first."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One error of the configuration: where, what stands there, and what would be right."""

    key: str
    value: str
    """As it stands in the file, shortened; empty when there is nothing to show."""
    right: str

    def __str__(self) -> str:
        where = f"{self.key} = {self.value}" if self.value else self.key
        return f"{where}: {self.right}"


class ConfigError(Exception):
    """The configuration cannot be used; `problems` has every reason, one line each."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def show_ms(duration_ms: int) -> str:
    """A duration as the configuration writes it: `300ms`, `1s`, `2m`, `6h`, `7d`."""
    for unit_ms, unit in ((86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1000, "s")):
        if duration_ms and duration_ms % unit_ms == 0:
            return f"{duration_ms // unit_ms}{unit}"
    return f"{duration_ms}ms"


def show_size(size_bytes: int) -> str:
    """A size as the configuration writes it: `512B`, `64kB`, `16MiB`, `20MB`."""
    for unit, unit_bytes in SIZE_UNITS.items():
        if size_bytes and size_bytes % unit_bytes == 0:
            return f"{size_bytes // unit_bytes}{unit}"
    return f"{size_bytes}B"


def show_name(part: str) -> str:
    """One part of a key as TOML writes it: bare where it may be, else quoted and shortened."""
    return part if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", part) else show(part)


def show(value: object) -> str:
    """A value as the file writes it, in some 60 printable characters; None is empty.

    Lists and tables are only named: they may be deep enough to exhaust the stack. A huge integer
    cannot be written in decimal at all (`sys.set_int_max_str_digits`).
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, int) and value.bit_length() > 64:
        return "(a very large number)"
    if isinstance(value, list):
        return f"(a list of {len(value)})" if value else "[]"
    if isinstance(value, dict):
        return "(a table)"
    return str(value)

"""What is wrong with a configuration, and how a value is shown in one short printable line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass


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
    """A duration as the configuration writes it: `300ms`, `1s`, `2m`."""
    for unit_ms, unit in ((60_000, "m"), (1000, "s")):
        if duration_ms and duration_ms % unit_ms == 0:
            return f"{duration_ms // unit_ms}{unit}"
    return f"{duration_ms}ms"


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

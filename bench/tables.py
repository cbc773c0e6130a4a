"""Tables of a page, and what every page of a bench has: the machine's facts, and the bars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bench.findings import Bar

_WORDS = {True: "met", False: "**not met**", None: "not measured"}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def facts_table(facts: Mapping[str, str]) -> str:
    """What the bench ran on."""
    return table(["", ""], ([name, said] for name, said in facts.items()))


def bars_table(judged: Iterable[Bar]) -> str:
    """Each bar, what was found, and whether it is met."""
    return table(["bar", "found", ""], ([bar.text, bar.found, _WORDS[bar.met]] for bar in judged))

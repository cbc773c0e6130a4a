"""What every bench is asked for on its command line. It knows nothing of what is measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from tests.netns.labkit.place import REPOSITORY

RESULTS = REPOSITORY / "bench" / "results"

T = TypeVar("T")


def some_of(known: Iterable[T]) -> Callable[[str], tuple[T, ...]]:
    """A reader of words with commas between them, each of which is one of those that are known.

    The reader raises argparse.ArgumentTypeError that names what is unknown, and what there is.
    """
    by_word = {str(one): one for one in known}

    def read(text: str) -> tuple[T, ...]:
        words = [word.strip() for word in text.split(",")]
        unknown = [word for word in words if word not in by_word]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"no such thing: {', '.join(unknown)}; there are {', '.join(by_word)}"
            )
        return tuple(by_word[word] for word in words)

    return read


class Options:
    """The options of one bench: rounds, parts and the results' folder, and what else it adds."""

    def __init__(self, bench: str, beside: str, *, runs: int, most_runs: int) -> None:
        self._parser = argparse.ArgumentParser(prog=f"bench.{bench}", description=beside)
        self._most_runs = most_runs
        self._parser.add_argument(
            "--runs", type=int, default=runs, help=f"of each (default: {runs})"
        )
        self._parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")

    def add_choice(self, name: str, known: Iterable[T]) -> None:
        """An option that takes some of what is known; all of it when it is not given."""
        every = tuple(known)
        self._parser.add_argument(
            name,
            type=some_of(every),
            default=every,
            help=f"some of {','.join(map(str, every))} (default: all)",
        )

    def add_minutes(self, name: str, default: float, what: str) -> None:
        """An option that takes minutes."""
        self._parser.add_argument(
            name, type=float, default=default, help=f"{what} (default: {default:g})"
        )

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """What was asked for. Ends the program with code 2 and a sentence where it cannot be."""
        found = self._parser.parse_args(argv)
        if not 1 <= found.runs <= self._most_runs:
            self.refuse(f"--runs {found.runs}: 1 to {self._most_runs} is expected")
        return found

    def refuse(self, why: str) -> None:
        """Ends the program with code 2 and this sentence."""
        self._parser.error(why)

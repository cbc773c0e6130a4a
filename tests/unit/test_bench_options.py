"""The benches' command lines: what is taken, and what is refused with a sentence."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import pytest

from bench import failback, failover, replication
from bench.options import some_of


def test_words_that_are_known_are_taken_as_what_they_name() -> None:
    assert some_of((10, 200))("200, 10") == (200, 10)
    assert some_of(("death", "calm"))("calm") == ("calm",)


def test_a_word_that_is_unknown_is_named_with_what_there_is() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no such thing: 5, x; there are 10, 200"):
        some_of((10, 200))("5,10,x")


@pytest.mark.parametrize(
    ("main", "argv", "words"),
    [
        (failover.main, ["--runs", "0"], "--runs 0: 1 to 100 is expected"),
        (failover.main, ["--runs", "101"], "--runs 101: 1 to 100 is expected"),
        (failover.main, ["--calm-minutes", "0"], "--calm-minutes 0: at most"),
        (failover.main, ["--only", "quake"], "no such thing: quake; there are idle,"),
        (replication.main, ["--runs", "21"], "1 to 20 is expected"),
        (replication.main, ["--only", "calm,x"], "no such thing: x; there are"),
        (replication.main, ["--sizes", "5"], "there are 10000, 100000, 1000000"),
        (failback.main, ["--runs", "0"], "1 to 20 is expected"),
        (failback.main, ["--only", "nfsha,x"], "no such thing: x; there are nfsha, runbook"),
        (failback.main, ["--sizes", "5"], "there are 10000, 100000, 1000000"),
    ],
)
def test_refused_before_anything_is_measured(
    main: Callable[[Sequence[str]], int],
    argv: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(argv)
    assert refused.value.code == 2
    assert words in capsys.readouterr().err

"""The demo: it ends well, claims only what is so, and leaves nothing behind, also after ^C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from tests.netns import demo
from tests.netns.demo import CLAIMS, RECORDS, Copied, Home, Outcome, Paper, untrue
from tests.netns.labkit import registry
from tests.netns.labkit.place import REPOSITORY

pytestmark = pytest.mark.pairs

_LIMIT_S = 90
_FIRST_PASS = "WAITING -> RETURNED"
_CUT = "silent on all wires"


@contextmanager
def _demo() -> Iterator[subprocess.Popen[str]]:
    """The demo as people start it, in a process group of its own, as under a terminal."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.netns.demo"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _read_until(process: subprocess.Popen[str], words: str) -> str:
    assert process.stdout is not None
    read = ""
    for line in process.stdout:
        read += line
        if words in line:
            return read
    raise AssertionError(f"it ended without {words!r}:\n{read}")


def _labs_of(process: subprocess.Popen[str]) -> set[str]:
    every = registry.descriptions()
    return {one.name for one in every if one.owner is not None and one.owner.pid == process.pid}


def _assert_nothing_left(pid: int, labs: set[str]) -> None:
    deadline = time.monotonic() + 5.0
    while left := registry.leftovers(pid, labs):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_the_demo_ends_well_in_time_and_leaves_nothing() -> None:
    began = time.monotonic()
    with _demo() as process:
        head = _read_until(process, _CUT)
        labs = _labs_of(process)
        rest, errors = process.communicate(timeout=_LIMIT_S)
    assert process.returncode == 0, head + rest + errors
    assert time.monotonic() - began < _LIMIT_S
    assert errors == ""
    text = head + rest
    assert all(len(line) < 80 for line in text.splitlines())
    assert "\x1b" not in text
    summary = rest.partition("\nSummary\n")[2]
    for what in ("time in which two nodes held the VIP", "time in which two nodes answered NFS"):
        (line,) = (one for one in summary.splitlines() if what in one)
        assert line.endswith(" 0.0 ms")
    assert "P10 PASSIVE -> TAKEOVER" in text
    assert text.count(": no difference.\n") == 2
    assert "writes of the last" in rest
    assert "RETURNED -> PASSIVE" in rest
    assert "done: the primary serves" in rest
    assert len(labs) == 1
    _assert_nothing_left(process.pid, labs)


@pytest.mark.parametrize("words", [_FIRST_PASS, _CUT])
def test_ctrl_c_in_the_middle_leaves_nothing(words: str) -> None:
    with _demo() as process:
        _read_until(process, words)
        labs = _labs_of(process)
        assert registry.leftovers(process.pid, labs)
        os.killpg(process.pid, signal.SIGINT)
        rest, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert "everything that was built is gone" in rest
    assert "Summary" not in rest
    assert errors == ""
    assert len(labs) == 1
    _assert_nothing_left(process.pid, labs)


HOME = Home(
    code=0,
    stall_ms=300.0,
    acknowledged=frozenset(range(2 * RECORDS)),
    read_back=frozenset(range(3 * RECORDS)),
    on_both=frozenset(range(3 * RECORDS)),
    stale=1,
    failed=0,
    holder_overlap_ms=0.0,
    holders=frozenset({"primary"}),
    differs=(),
)

GOOD = Outcome(
    home=HOME,
    first=Copied(entries=1000, size_bytes=40_000_000, took_ms=500, differs=()),
    decided_ms=900,
    served_ms=901,
    first_answer_ms=910.0,
    outage_ms=930.0,
    stall_ms=1700.0,
    holder_overlap_ms=0.0,
    answer_overlap_ms=0.0,
    by_primary=frozenset(range(2 * RECORDS)),
    before_window=frozenset(range(RECORDS)),
    window_ms=2500,
    by_standby=frozenset(range(2 * RECORDS, 4 * RECORDS)),
    read_back=frozenset(range(RECORDS)) | frozenset(range(2 * RECORDS, 4 * RECORDS)),
    on_primary_disk=frozenset(range(2 * RECORDS)),
    quarantined=frozenset(range(2 * RECORDS)),
    resync_ms=900,
    differs=(),
    stale=1,
    failed=0,
    return_stall_ms=20.0,
    holders=frozenset({"standby"}),
    returned_by=("WAITING", "RETURNED", "PASSIVE"),
    touched=(),
    open_ports=(),
)

SPOILT = (
    replace(GOOD, first=replace(GOOD.first, differs=("a mode",))),
    replace(GOOD, decided_ms=902),
    replace(GOOD, holder_overlap_ms=0.1),
    replace(GOOD, answer_overlap_ms=0.1),
    replace(GOOD, before_window=frozenset(range(RECORDS - 1))),
    replace(GOOD, read_back=GOOD.read_back - {0}),
    replace(GOOD, by_standby=frozenset(range(2 * RECORDS, 4 * RECORDS - 1))),
    replace(GOOD, read_back=GOOD.read_back - {2 * RECORDS}),
    replace(GOOD, on_primary_disk=GOOD.on_primary_disk - {0}),
    replace(GOOD, quarantined=GOOD.quarantined - {RECORDS}),
    replace(GOOD, differs=("a size",)),
    replace(GOOD, stale=2),
    replace(GOOD, failed=1),
    replace(GOOD, holders=frozenset({"primary", "standby"})),
    replace(GOOD, returned_by=("WAITING", "ACTIVE")),
    replace(GOOD, touched=("held it",)),
    replace(GOOD, open_ports=(2049,)),
    *(
        replace(GOOD, home=replace(HOME, **spoilt))
        for spoilt in (
            {"code": 4},
            {"acknowledged": frozenset(range(RECORDS))},
            {"read_back": HOME.read_back - {0}},
            {"on_both": HOME.on_both - {0}},
            {"stale": 2},
            {"failed": 1},
            {"holder_overlap_ms": 0.1},
            {"holders": frozenset({"standby"})},
            {"differs": ("a size",)},
        )
    ),
)


def test_every_claim_can_be_untrue() -> None:
    assert untrue(GOOD) == []
    found = [untrue(spoilt) for spoilt in SPOILT]
    assert found == [[sentence] for _, sentence in CLAIMS]


@pytest.mark.parametrize(("outcome", "code"), [(GOOD, 0), (SPOILT[2], 1)])
def test_what_was_not_so_is_said_and_ends_with_1(
    outcome: Outcome, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo._conclude(Paper(colour=False), outcome, 10.0) == code
    said = capsys.readouterr()
    assert ("All of this was checked" in said.out) == (code == 0)
    assert ("NOT SO: two nodes held the VIP at once" in said.err) == (code == 1)


def test_colour_and_weight_change_no_word(capsys: pytest.CaptureFixture[str]) -> None:
    def told(colour: bool) -> str:
        Paper(colour).moment(900, "standby", "takes over: " + "nobody answers " * 9, "P10")
        return capsys.readouterr().out

    styled = told(colour=True)
    assert "\x1b[1mP10\x1b[0m" in styled
    for code in ("\x1b[1m", "\x1b[2m", "\x1b[0m"):
        styled = styled.replace(code, "")
    assert styled == told(colour=False)

"""Fixtures of the tests against the real thing: a lab per test, and nothing left at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.netns.lab import Lab
from tests.netns.labkit import registry

_SETTLE_S = 5.0  # the kernel frees loop devices a moment after the last process of a place
_live: list[Lab] = []


@pytest.fixture(scope="session", autouse=True)
def needs_root() -> None:
    """Says it once, in words, instead of a hundred failed system calls."""
    if os.geteuid() != 0:
        pytest.fail(
            "tests/netns make network namespaces and mounts: run them as root", pytrace=False
        )


@contextmanager
def _labs() -> Iterator[Callable[..., Lab]]:
    with ExitStack() as stack:

        def make(**options: object) -> Lab:
            lab = stack.enter_context(Lab(**options))  # type: ignore[arg-type]
            _live.append(lab)
            stack.callback(_live.remove, lab)
            return lab

        yield make


@pytest.fixture
def make_lab() -> Iterator[Callable[..., Lab]]:
    """Makes labs with other options than the default; they are taken down after the test."""
    with _labs() as make:
        yield make


@pytest.fixture(scope="module")
def make_module_lab() -> Iterator[Callable[..., Lab]]:
    """The same for labs that all tests of a module share."""
    with _labs() as make:
        yield make


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    """A fresh lab, in a third of a second: two nodes with NFS, client, gateway; no daemon."""
    return make_lab()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the ends of all logs of the places to the report of a failed test."""
    report = yield
    if report.failed:
        for lab in _live:
            for place in lab.places:
                for name, tail in place.log_tails():
                    report.sections.append((f"place {place.name}: {name}", tail))
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows what was left behind."""
    for line in terminalreporter.config.stash.get(_LEFT, []):
        terminalreporter.write_line(f"LEFT BEHIND: {line}", red=True)


_LEFT = pytest.StashKey[list[str]]()


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    """Fails the run when a namespace, mount, loop device, process or folder is still there."""
    yield
    deadline = time.monotonic() + _SETTLE_S
    while (left := registry.leftovers(os.getpid(), Lab.made)) and time.monotonic() < deadline:
        time.sleep(0.1)
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left"] = left  # for the process that shares the tests out
        return
    others: list[str] = session.config.stash.setdefault(_LEFT, [])
    left += others
    if left:
        session.config.stash[_LEFT] = left
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes what one of several processes has left behind (pytest-xdist)."""
    told: list[str] = getattr(node, "workeroutput", {}).get("left", [])
    stash: pytest.Stash = node.config.stash
    stash.setdefault(_LEFT, []).extend(told)

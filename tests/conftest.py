"""What holds for all tests: how properties are tried, and which tests run beside which.

`make test` runs two processes (pytest-xdist), of which each picks its share here. In one, the tests
of whole pairs follow each other: they look at times, and mostly wait. In the other, beside them,
runs all else. Without `-n` everything runs in one process. The many seeds run in processes of their
own, beside all of it, and are asked for at the end.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

from tests.sim.background import Background
from tests.sim.test_seeds import SEEDS, first_seed, revision

# A busy machine is no reason for a test to fail: single examples have no time limit of their own.
# All that matters is named: the library has other defaults where the environment has `CI`.
settings.register_profile(
    "explore", deadline=None, print_blob=True, max_examples=1000, derandomize=False
)

# The examples follow from the test itself, so that one commit has one result: a change never fails
# by an example that nobody has met before. To meet them is what `explore` is for.
settings.register_profile("same", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("same")

_LOCKS = "NFSHA_TEST_LOCKS"
"""Names the folder of locks that all processes of one run use."""
_WANTED = pytest.StashKey[bool]()
_RUNNING = pytest.StashKey[Background]()


def _of_pairs(item: pytest.Item) -> bool:
    """Does it run whole nodes, whose times it looks at?"""
    fixtures: list[str] = getattr(item, "fixturenames", [])
    return "make_lab" in fixtures or item.get_closest_marker("pairs") is not None


def _is_last(item: pytest.Item) -> bool:
    return item.get_closest_marker("last") is not None


def _shares() -> bool:
    """Is this one of several processes that share the tests?"""
    return "PYTEST_XDIST_WORKER" in os.environ


def _runs_pairs() -> bool:
    return os.environ["PYTEST_XDIST_WORKER"] == "gw0"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each process takes its share. Who asks for what runs beside comes last."""
    if _shares():
        items[:] = [item for item in items if _of_pairs(item) is _runs_pairs()]
    items.sort(key=_is_last)


def pytest_configure() -> None:
    """Before the processes that share the tests are started."""
    if not _shares():
        os.environ[_LOCKS] = tempfile.mkdtemp(prefix="nfsha-test-locks-")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Will somebody ask for the seeds?"""
    wanted = any(_is_last(item) for item in session.items)
    session.stash[_WANTED] = wanted and not session.config.option.collectonly


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The seeds begin with the first test of the process that will ask."""
    if item.session.stash[_WANTED]:
        item.session.stash[_WANTED] = False
        item.session.stash[_RUNNING] = Background(first_seed(revision()), SEEDS)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Nothing goes on after the tests, also when they were broken off."""
    running = session.stash.get(_RUNNING, None)
    if running is not None:
        running.close()
    if not _shares():
        shutil.rmtree(os.environ.pop(_LOCKS))


@pytest.fixture
def seeds(request: pytest.FixtureRequest) -> Background:
    """The seeds that run beside the other tests."""
    return request.session.stash[_RUNNING]


@contextmanager
def _held(file: Path, how: int) -> Iterator[None]:
    with file.open("w") as lock:
        fcntl.flock(lock, how)
        yield


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Who must be alone (marker) waits until no other test runs, and holds the next ones back.

    From before its first fixture, of whatever scope, to after its last one, and outside its time
    limit. The gate keeps a stream of short tests from holding it off.
    """
    gate, run = (Path(os.environ[_LOCKS]) / name for name in ("gate", "run"))
    how = fcntl.LOCK_SH if item.get_closest_marker("alone") is None else fcntl.LOCK_EX
    with ExitStack() as stack:
        with _held(gate, how):
            stack.enter_context(_held(run, how))
        return (yield)

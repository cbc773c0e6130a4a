"""The many seeds run beside all other tests, and are asked for when those are over."""

from __future__ import annotations

import pytest

from tests.sim.background import Background
from tests.sim.test_seeds import SEEDS, first_seed, revision

_RUNNING = pytest.StashKey[Background]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever waits for what runs beside the others comes after them."""
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


def pytest_runtestloop(session: pytest.Session) -> None:
    """Begins with the first test, if somebody will ask."""
    wanted = any(item.get_closest_marker("last") is not None for item in session.items)
    if wanted and not session.config.option.collectonly:
        session.stash[_RUNNING] = Background(first_seed(revision()), SEEDS)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Nothing goes on after the tests, also when they were broken off."""
    running = session.stash.get(_RUNNING, None)
    if running is not None:
        running.close()


@pytest.fixture
def seeds(request: pytest.FixtureRequest) -> Background:
    """The seeds that run beside the other tests."""
    return request.session.stash[_RUNNING]

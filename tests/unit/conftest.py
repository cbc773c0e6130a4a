"""What holds for the unit tests: event loops watch themselves.

Not in tests/netns: daemons started there must run as they will in service.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def asyncio_debug() -> Iterator[None]:
    """Loops made by unit tests are in debug mode: coroutines never awaited, calls off the loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONASYNCIODEBUG", "1")
        yield

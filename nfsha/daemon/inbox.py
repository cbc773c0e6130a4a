"""The one inbox: everything that happens becomes an input of the engine, in order of arrival."""

from __future__ import annotations

import asyncio
from collections import deque

from nfsha.core.model import Input

MAX_INPUTS = 4096
"""More than a minute of a peer's datagrams; what is beyond is dropped, the oldest first."""


class Inbox:
    """Inputs that wait for the next turn, and the bell that calls for one."""

    def __init__(self) -> None:
        self._inputs: deque[Input] = deque(maxlen=MAX_INPUTS)
        self._bell = asyncio.Event()
        self._failure: BaseException | None = None

    def put(self, what: Input) -> None:
        """Takes one input and calls for a turn."""
        self._inputs.append(what)
        self._bell.set()

    def put_quietly(self, what: Input) -> None:
        """Takes one input that changes nothing by itself: the next turn is soon enough for it."""
        self._inputs.append(what)

    def fail(self, error: BaseException) -> None:
        """Ends the daemon: something that it rests on broke, so that no turn may be trusted."""
        self._failure = self._failure or error
        self._bell.set()

    def watch(self, task: asyncio.Task[None]) -> None:
        """Takes a task's failure as the daemon's own; a cancelled task is none."""
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

    def take(self) -> list[Input]:
        """Returns all that waits, oldest first, and forgets it. Raises what `fail` was told."""
        if self._failure is not None:
            raise self._failure
        taken = list(self._inputs)
        self._inputs.clear()
        self._bell.clear()
        return taken

    async def wait(self, timeout_s: float) -> None:
        """Returns when there is something to take, or after the timeout."""
        if self._bell.is_set() or timeout_s <= 0:
            await asyncio.sleep(0)
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._bell.wait()
        except TimeoutError:
            return

    def ring(self) -> None:
        """Calls for a turn without an input."""
        self._bell.set()

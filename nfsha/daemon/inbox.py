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
        self._rung = False
        self._waiter: asyncio.Future[None] | None = None
        self._failure: BaseException | None = None

    def put(self, what: Input) -> None:
        """Takes one input and calls for a turn."""
        self._inputs.append(what)
        self.ring()

    def put_quietly(self, what: Input) -> None:
        """Takes one input that changes nothing by itself: the next turn is soon enough for it."""
        self._inputs.append(what)

    def fail(self, error: BaseException) -> None:
        """Ends the daemon: something that it rests on broke, so that no turn may be trusted."""
        self._failure = self._failure or error
        self.ring()

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
        self._rung = False
        return taken

    async def wait(self, timeout_s: float) -> None:
        """Returns when there is something to take, or after the timeout. For one waiter."""
        if self._rung or timeout_s <= 0:
            await asyncio.sleep(0)
            return
        # A bare future and timer: this runs each turn, and costs half of an Event in a timeout.
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_later(timeout_s, self._wake)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    def ring(self) -> None:
        """Calls for a turn without an input."""
        self._rung = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

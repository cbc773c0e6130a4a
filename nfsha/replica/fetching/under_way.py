"""What works on volumes now: passes, looks and verifies, and writes in threads.

So that all of it can be ended, and be proved gone, when this node's state changes. It begins
nothing.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from nfsha.replica.passes.pull import Pull
from nfsha.replica.rsync.child import ChildStuckError

_END_SHARE = 0.9  # what is left is for naming the processes that are still there
_T = TypeVar("_T")
_R = TypeVar("_R", bound="Running")


class Running(Protocol):
    """Something that may have processes at work on a volume."""

    async def end(self, within_s: float, *, at_once: bool) -> None:
        """When it returns nothing is at work any more. Raises ChildStuckError."""


class UnderWay:
    """Everything that is under way, with the identity of its volume."""

    def __init__(self) -> None:
        self._all: list[tuple[str, Running]] = []
        self._writes: set[asyncio.Future[Any]] = set()

    @contextmanager
    def noted(self, uuid: str, one: _R) -> Iterator[_R]:
        """For the length of a block: it is at work on this volume."""
        entry = (uuid, one)
        self._all.append(entry)
        try:
            yield one
        finally:
            self._all = [other for other in self._all if other is not entry]

    def pulls(self) -> tuple[tuple[str, Pull], ...]:
        """The passes and looks among them."""
        return tuple((uuid, one) for uuid, one in self._all if isinstance(one, Pull))

    async def write(self, call: Callable[..., _T], *args: Any, **more: Any) -> _T:  # noqa: ANN401
        """Writes into a volume, or beside it, in a thread that `end_writes` waits for."""
        work = asyncio.ensure_future(asyncio.to_thread(call, *args, **more))
        self._writes.add(work)
        work.add_done_callback(self._writes.discard)
        return await asyncio.shield(work)

    def close_unused(self, fd: int) -> None:
        """Closes it once no thread writes by it any more: a pass that is broken off leaves them.

        Its number would soon be another file's.
        """
        users = set(self._writes)

        def ended(work: asyncio.Future[Any]) -> None:
            users.discard(work)
            if not users:
                os.close(fd)

        if not users:
            os.close(fd)
        for work in tuple(users):
            work.add_done_callback(ended)

    async def end(self, deadline_s: float, name_of: Callable[[str], str]) -> list[str]:
        """Ends all that has processes; says what cannot be ended by then (of the loop's clock)."""
        ends = (_end_one(uuid, one, deadline_s, name_of) for uuid, one in self._all)
        return [words for words in await asyncio.gather(*ends) if words]

    async def end_writes(self, deadline_s: float) -> int:
        """Waits for the threads, which no cancelling ends; returns how many are left."""
        if self._writes:
            loop = asyncio.get_running_loop()
            await asyncio.wait(self._writes, timeout=max(0.0, deadline_s - loop.time()))
        return len(self._writes)


async def _end_one(
    uuid: str, running: Running, deadline_s: float, name_of: Callable[[str], str]
) -> str:
    within_s = deadline_s - asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(deadline_s):
            await running.end(within_s * _END_SHARE, at_once=True)
    except ChildStuckError as error:
        return f"{name_of(uuid)}: {error}"
    except TimeoutError:
        return f"{name_of(uuid)}: what runs for it does not end"
    return ""

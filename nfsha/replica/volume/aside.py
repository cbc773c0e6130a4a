"""Calls that may hang in a dead disk: each in a thread of its own, which is given up in time.

Nothing interrupts a system call on a dead disk. Who waits for one gives up after a while, and its
thread is left behind; as long as it is there nothing else begins under its name. The loop's own
threads are few, and a volume that hangs must not use them up. These are daemons: they do not keep
the process from ending. What a call is for is not known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from nfsha.replica.volume.facts import VolumeError

AT_ONCE = 16
"""So many threads at a time, those not counted that are left behind."""

_T = TypeVar("_T")


class HangsError(Exception):
    """It does not come back: the text says for how long."""


class Aside:
    """At most one call of each name at a time. `clock_s` goes on while a call hangs."""

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._calls: dict[str, tuple[asyncio.Future[Any], float]] = {}
        self._turn = asyncio.Semaphore(AT_ONCE)

    async def run(self, name: str, call: Callable[[], _T], *, within_s: float) -> _T:
        """Returns what the call returns; it may raise VolumeError and OSError, and nothing else.

        Raises HangsError when it takes longer, or when an earlier one of this name still hangs.
        """
        async with self._turn:
            await self._require_none(name, within_s)
            answer: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
            answer.add_done_callback(_heard)
            self._calls[name] = answer, self._clock_s()
            threading.Thread(
                target=_work, args=(call, answer), name="nfsha-aside", daemon=True
            ).start()
            await self._wait(name, within_s)
            return answer.result()

    def hung(self) -> dict[str, float]:
        """The calls that have not come back: for how long, in seconds. Some have just begun."""
        self._calls = {name: one for name, one in self._calls.items() if not one[0].done()}
        now_s = self._clock_s()
        return {name: now_s - since_s for name, (_, since_s) in self._calls.items()}

    async def _require_none(self, name: str, within_s: float) -> None:
        """Waits for an earlier one, whose asker may have gone, as long as for one of now."""
        if (age_s := self.hung().get(name)) is not None:
            await self._wait(name, max(0.0, within_s - age_s))

    async def _wait(self, name: str, within_s: float) -> None:
        answer, since_s = self._calls[name]
        await asyncio.wait([answer], timeout=within_s)
        if not answer.done():
            raise HangsError(f"it has hung for {self._clock_s() - since_s:.0f} s")


def _heard(answer: asyncio.Future[Any]) -> None:
    """Who asked has the failure; if nobody waits any more, nobody wants to know."""
    if not answer.cancelled():
        answer.exception()


def _work(call: Callable[[], _T], answer: asyncio.Future[_T]) -> None:
    """What the thread does. Nobody may be there any more to take the answer."""
    try:
        result = call()
    except (VolumeError, OSError) as error:
        _tell(answer, lambda error=error: answer.set_exception(error))  # type: ignore[misc]
    else:
        _tell(answer, lambda: answer.set_result(result))


def _tell(answer: asyncio.Future[_T], how: Callable[[], None]) -> None:
    def on_the_loop() -> None:
        if not answer.done():
            how()

    with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
        answer.get_loop().call_soon_threadsafe(on_the_loop)

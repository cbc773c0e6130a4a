"""The hands of the engine: what one action does to another one that is under way."""

from __future__ import annotations

import asyncio
from typing import cast

from nfsha.core import model
from nfsha.core.model import Completed, Numbered
from nfsha.daemon.executors import Executors
from nfsha.daemon.inbox import Inbox
from nfsha.daemon.world import World


class FakeWorld:
    """A world whose service closes when it is let, and whose volumes come to rest at once."""

    def __init__(self) -> None:
        self.let_close = asyncio.Event()
        self.came_to_rest = 0
        self.lease = self.announcer = self.clients = self.locks = self.replication = self

    def clock_ms(self) -> int:
        return 0

    def silence(self) -> None: ...

    def closed(self) -> None: ...

    async def close(self) -> None:
        await self.let_close.wait()

    async def come_to_rest(self) -> str:
        self.came_to_rest += 1
        return ""


def hands(world: FakeWorld, inbox: Inbox) -> Executors:
    def left(reason: str) -> None:
        raise AssertionError(reason)

    return Executors(cast("World", world), inbox, left)


async def turn() -> None:
    """Lets all that is ready run."""
    for _ in range(10):
        await asyncio.sleep(0)


async def freeze(*, thaw: bool) -> tuple[int, list[object]]:
    """A freeze that still waits for the service to be closed, and ends there or goes on."""
    world, inbox = FakeWorld(), Inbox()
    executors = hands(world, inbox)
    executors.perform(Numbered(1, model.CloseService()))
    executors.perform(Numbered(2, model.Freeze()))
    await turn()
    assert inbox.take() == []
    if thaw:
        executors.perform(Numbered(3, model.Thaw()))
        await turn()
    world.let_close.set()
    await executors.settle()
    return world.came_to_rest, list(inbox.take())


def test_the_volumes_come_to_rest_once_the_service_is_closed() -> None:
    rested, told = asyncio.run(freeze(thaw=False))
    assert rested == 1
    assert told == [Completed(2, model.Frozen(ok=True))]


def test_a_thaw_ends_a_freeze_that_still_waits_for_the_service_to_be_closed() -> None:
    rested, told = asyncio.run(freeze(thaw=True))
    assert rested == 0
    ended = model.Frozen(ok=False, detail="the freeze was ended")
    assert told == [Completed(3, model.Thawed(ok=True)), Completed(2, ended)]

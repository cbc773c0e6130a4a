"""Which files get a spare copy, and that what was made is known however its making ended."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterable
from types import SimpleNamespace
from typing import cast

import pytest

from nfsha.replica.fetching.copying import Copy
from nfsha.replica.fetching.desk import Desk
from nfsha.replica.fetching.sparing import MAX_SPARES, Sparing
from nfsha.replica.fetching.under_way import UnderWay
from nfsha.replica.passes import spares
from nfsha.replica.volume import volumes

UUID = "0d8ab111-3c0a-4d4f-9d7c-0123456789ab"
LARGE = spares.LEAST_BYTES


class Disk:
    """Makes spares at once, or not before it is let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[bytes] = []
        self.dropped: list[bytes] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.at_work = threading.Event()
        self.refuses = ""
        monkeypatch.setattr(spares, "make", self.make)
        monkeypatch.setattr(spares, "drop", self.drop)
        monkeypatch.setattr(volumes, "open_root", lambda _: os.open("/", os.O_RDONLY))

    def make(self, _root_fd: int, name: bytes, _stop: threading.Event) -> int:
        self.at_work.set()
        assert self.may_go_on.wait(10)
        if name == b"refused":
            raise OSError(28, "No space left on device")
        self.made.append(name)
        return 0 if name == b"sparse" else LARGE

    def drop(self, _root_fd: int, names: Iterable[bytes]) -> None:
        self.dropped += names


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def sparing(copy: Copy) -> tuple[Sparing, UnderWay]:
    here = SimpleNamespace(name="data", identity=UUID)
    inventory = SimpleNamespace(by_uuid=lambda _: here)
    under_way = UnderWay()
    desk = SimpleNamespace(copies={UUID: copy}, inventory=inventory, under_way=under_way)
    return Sparing(cast("Desk", desk)), under_way


def test_the_largest_files_that_changed_get_one_and_what_is_left_is_removed(disk: Disk) -> None:
    files = {b"%d" % number: LARGE + number for number in range(MAX_SPARES + 2)}
    copy = Copy(UUID, brought={**files, b"small": LARGE - 1})
    one, _ = sparing(copy)

    async def scene() -> None:
        await one.make(UUID)
        await one.make("another")
        assert disk.made == [b"%d" % number for number in range(MAX_SPARES + 1, 1, -1)]
        assert copy.spares == dict.fromkeys(disk.made, LARGE)
        await one.drop()
        assert disk.dropped == disk.made and copy.spares == {}
        await one.drop()
        assert disk.dropped == disk.made

    asyncio.run(scene())


def test_a_file_that_can_have_none_keeps_no_other_from_it(disk: Disk) -> None:
    copy = Copy(UUID, brought={b"refused": LARGE + 2, b"sparse": LARGE + 1, b"large": LARGE})
    one, _ = sparing(copy)
    asyncio.run(one.make(UUID))
    assert copy.spares == {b"large": LARGE}


def test_what_was_made_before_it_was_broken_off_is_known(disk: Disk) -> None:
    copy = Copy(UUID, brought={b"first": LARGE + 1, b"second": LARGE})
    one, under_way = sparing(copy)
    disk.may_go_on.clear()

    async def scene() -> None:
        making = asyncio.create_task(one.make(UUID))
        await asyncio.to_thread(disk.at_work.wait, 10)
        # A disk that hangs is named; a takeover does not wait for it for ever.
        deadline_s = asyncio.get_running_loop().time() + 0.05
        assert "a thread of this process" in (await under_way.end(deadline_s, str))[0]
        making.cancel()
        disk.may_go_on.set()
        await asyncio.wait({making})
        assert making.cancelled()

    asyncio.run(scene())
    assert copy.spares == {b"first": LARGE} and disk.made == [b"first"]


def test_ending_waits_for_the_piece_that_is_copied(disk: Disk) -> None:
    copy = Copy(UUID, brought={b"first": LARGE + 1, b"second": LARGE})
    one, under_way = sparing(copy)
    disk.may_go_on.clear()

    async def scene() -> None:
        making = asyncio.create_task(one.make(UUID))
        await asyncio.to_thread(disk.at_work.wait, 10)
        loop = asyncio.get_running_loop()
        loop.call_later(0.05, disk.may_go_on.set)
        assert await under_way.end(loop.time() + 10, str) == []
        assert disk.made == [b"first"]
        await making

    asyncio.run(scene())
    assert disk.made == [b"first"]

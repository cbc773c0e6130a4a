"""Who may run: a pass that came due while the source was not there is made when it is back."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nfsha.core.model import Epoch, Role
from nfsha.replica.fetching.copying import Copy
from nfsha.replica.fetching.fetching import Fetching
from nfsha.replica.fetching.finding import Finding
from nfsha.replica.fetching.schedule import Cause, Kind, Plan, Reason
from nfsha.replica.fetching.tally import Tally
from nfsha.replica.fetching.under_way import UnderWay
from nfsha.replica.journal.published import Published
from nfsha.replica.source.facts import SourceFacts
from nfsha.replica.source.listing import Listing

EPOCH = Epoch(1, "00000000000000aa", Role.PRIMARY)


class Passes(Fetching):
    """Notes the passes instead of making them."""

    def __init__(self) -> None:
        nothing = cast("Any", SimpleNamespace(bandwidth_kib_s=None, parallel=2))
        super().__init__(
            nothing, nothing, nothing, Path("/nowhere"),
            source=nothing, clocks=nothing, watch=lambda _: None, changed=lambda: None,
        )  # fmt: skip
        self.made: list[tuple[str, Kind]] = []

    def know(self, *uuids: str) -> None:
        for uuid in uuids:
            self.copies[uuid] = Copy(uuid)
            self.schedule.set(uuid, Plan(every_ms=3_600_000))

    async def _ordinary_or_full(self, copy: Copy, _epoch: Epoch, reason: Reason) -> None:
        self.made.append((copy.uuid, reason.kind))


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_what_is_late_comes_at_once_when_the_source_is_back_and_nothing_else() -> None:
    async def scene() -> list[tuple[str, Kind]]:
        passes = Passes()
        passes.start()
        passes.know("late", "not late", "removed")
        passes.begin(EPOCH)
        passes.let(start=False)
        await passes.schedule.make("late", Reason(Cause.SCHEDULE, Kind.FULL))
        await passes.schedule.make("late", Reason(Cause.SCHEDULE))
        await passes.schedule.make("removed", Reason(Cause.SCHEDULE))
        passes.schedule.remove("removed")
        del passes.copies["removed"]
        assert passes.made == []
        for _ in range(2):
            passes.let(start=True)
            await turns()
        await passes.stop()
        return passes.made

    assert asyncio.run(scene()) == [("late", Kind.FULL)]


def test_what_was_late_in_another_epoch_is_forgotten() -> None:
    async def scene() -> list[tuple[str, Kind]]:
        passes = Passes()
        passes.start()
        passes.know("late")
        passes.begin(EPOCH)
        passes.let(start=False)
        await passes.schedule.make("late", Reason(Cause.SCHEDULE))
        await passes.end()
        passes.begin(EPOCH)
        passes.let(start=True)
        await turns()
        await passes.stop()
        return passes.made

    assert asyncio.run(scene()) == []


def test_a_volume_that_goes_while_its_pass_fails_ends_no_daemon() -> None:
    class Failing(Passes):
        async def _ordinary_or_full(self, copy: Copy, _epoch: Epoch, reason: Reason) -> None:
            self.schedule.remove(copy.uuid)  # the other node unmounted it
            del self.copies[copy.uuid]
            self.made.append((copy.uuid, reason.kind))
            raise OSError("the source does not offer it")

    async def scene() -> None:
        passes = Failing()
        known = SimpleNamespace(name_of=lambda uuid: uuid, by_uuid=lambda _: None)
        passes.inventory = cast("Any", known)
        passes.start()
        passes.know("gone")
        passes.begin(EPOCH)
        assert await passes.schedule.make("gone", Reason(Cause.COMMAND))
        assert passes.made == [("gone", Kind.ORDINARY)]
        assert "not mounted here any more" in await passes.proving.compare("gone", EPOCH, (b".",))
        await passes.stop()

    asyncio.run(scene())


@pytest.mark.parametrize(("in_haste", "waits_ms"), [(True, 1250), (False, 60_000)])
def test_what_a_handover_tried_in_haste_holds_up_no_pass_after_it(
    in_haste: bool, waits_ms: int
) -> None:
    class Failing(Passes):
        async def _ordinary_or_full(self, copy: Copy, _epoch: Epoch, reason: Reason) -> None:
            raise OSError("the disk is full")

    async def scene() -> int:
        passes = Failing()
        known = SimpleNamespace(name_of=lambda uuid: uuid, by_uuid=lambda _: None)
        passes.inventory = cast("Any", known)
        passes.start()
        passes.know("full")
        passes.begin(EPOCH)
        passes.tally = Tally() if in_haste else None
        for _ in range(10):
            await passes.schedule.make("full", Reason(Cause.COMMAND))
        wait_ms = passes.schedule.next_ms("full")
        await passes.stop()
        return wait_ms or 0

    assert waits_ms / 2 < asyncio.run(scene()) <= waits_ms


def test_a_list_that_was_fetched_while_it_was_published_is_fetched_again() -> None:
    class Listed(Finding):
        def __init__(self, *as_of_ns: int) -> None:
            super().__init__(Passes())
            self.as_of_ns = list(as_of_ns)

        async def _list_once(self, epoch: Epoch, folder: str) -> Listing:
            changes = Published("v", "00000000000000cc", 1, 0, 0, "", self.as_of_ns.pop(0), ())
            return Listing(SourceFacts(epoch, 100, (), {}), {"v": changes})

    async def scene(*as_of_ns: int) -> tuple[bool, int]:
        finding = Listed(*as_of_ns)
        return (await finding.list_all(EPOCH)).is_fresh, len(finding.as_of_ns)

    assert asyncio.run(scene(100, 1)) == (True, 1)
    assert asyncio.run(scene(99, 99, 101)) == (True, 0)
    assert asyncio.run(scene(99, 99, 99, 101)) == (False, 1)


def test_what_a_thread_still_writes_by_stays_open_until_it_has_ended(tmp_path: Path) -> None:
    """A pass that is broken off leaves its thread: a number closed under it is another file's."""
    may_end = threading.Event()

    def write(fd: int) -> int:
        may_end.wait(10)
        return os.write(fd, b"kept")

    async def scene(fd: int, unused_fd: int) -> int:
        under_way = UnderWay()
        under_way.close_unused(unused_fd)
        writing = asyncio.ensure_future(under_way.write(write, fd))
        await turns()
        left = set(under_way._writes)
        writing.cancel()
        under_way.close_unused(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(unused_fd)
        os.fstat(fd)
        may_end.set()
        await asyncio.wait(left)
        await turns()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        return int(left.pop().result())

    file = tmp_path / "file"
    fds = [os.open(path, os.O_CREAT | os.O_WRONLY) for path in (file, tmp_path / "other")]
    assert asyncio.run(scene(*fds)) == 4
    assert file.read_bytes() == b"kept"

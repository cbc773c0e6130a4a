"""Calls that hang are given up and never doubled; a volume that takes no write is named."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nfsha.replica.volume import volumes, writable
from nfsha.replica.volume.aside import Aside, HangsError
from nfsha.replica.volume.facts import VolumeError, VolumeFacts
from nfsha.replica.volume.writable import Writable
from tests.unit.test_replica_serving import volume


class Disk:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.asked = 0
        self.reads = threading.Event()
        self.answers = threading.Event()

    def read(self) -> str:
        self.asked += 1
        self.reads.set()
        assert self.answers.wait(10)
        return "read"


def test_what_hangs_is_given_up_and_not_asked_again_before_it_comes_back() -> None:
    async def scene() -> None:
        aside, disk = Aside(time.monotonic), Disk()
        for _ in range(3):
            with pytest.raises(HangsError, match="hung for"):
                await aside.run("data", disk.read, within_s=0.02)
        assert await aside.run("other", lambda: 1, within_s=5) == 1
        assert disk.asked == 1 and [*aside.hung()] == ["data"]
        disk.answers.set()
        assert await aside.run("data", disk.read, within_s=5) == "read"
        assert disk.asked == 2 and aside.hung() == {}

    asyncio.run(scene())


def test_one_whose_asker_has_gone_is_waited_for() -> None:
    async def scene() -> None:
        aside, disk = Aside(time.monotonic), Disk()
        gone = asyncio.ensure_future(aside.run("data", disk.read, within_s=5))
        assert await asyncio.to_thread(disk.reads.wait, 10)
        gone.cancel()
        await asyncio.wait([gone])
        disk.answers.set()
        assert await aside.run("data", lambda: "mine", within_s=5) == "mine"

    asyncio.run(scene())


@pytest.mark.parametrize("error", [OSError(5, "I/O"), VolumeError("no volume")])
def test_what_a_call_raises_comes_to_who_asked(error: Exception) -> None:
    def fails() -> None:
        raise error

    with pytest.raises(type(error)):
        asyncio.run(Aside(time.monotonic).run("data", fails, within_s=5))


def facts(path: Path, name: str) -> VolumeFacts:
    return volume("11111111-1111-4111-8111-111111111111", path=path, name=name)


def lacking(
    monkeypatch: pytest.MonkeyPatch, root: Path, act: Callable[[int], None], *, durable: bool
) -> tuple[str, dict[str, str]]:
    """What is said of a volume whose root, when it is opened, first lets this happen."""

    @contextmanager
    def root_of(one: VolumeFacts) -> Iterator[int]:
        fd = os.open(one.path, os.O_RDONLY)
        try:
            act(fd)
            yield fd
        finally:
            os.close(fd)

    monkeypatch.setattr(volumes, "root_of", root_of)
    monkeypatch.setattr(writable, "WRITES_WITHIN_S", 0.05)

    async def scene() -> tuple[str, dict[str, str]]:
        asked = Writable(time.monotonic)
        words = await asked.lacking([facts(root, "data")], durable=durable)
        return words, asked.hung()

    return asyncio.run(scene())


def test_a_volume_that_takes_a_write_is_not_changed_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(tmp_path, ns=(1, 2))
    before = tmp_path.stat()
    for durable in (False, True):
        found = lacking(monkeypatch, tmp_path, lambda _: None, durable=durable)
        assert found == ("", {})
    after = tmp_path.stat()
    assert (after.st_mtime_ns, after.st_mode) == (before.st_mtime_ns, before.st_mode)
    assert after.st_ctime_ns > before.st_ctime_ns, "nothing was written"


def hangs(thawed: threading.Event) -> None:
    assert thawed.wait(10)


def test_a_volume_in_which_a_write_hangs_is_named_as_long_as_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thawed = threading.Event()
    try:
        words, hung = lacking(monkeypatch, tmp_path, lambda _: hangs(thawed), durable=False)
    finally:
        thawed.set()
    assert "volume data: a write to it has not come back within 0.05 s: its filesystem is" in words
    assert hung == {"data": words}


def test_a_volume_that_refuses_a_write_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(_: int) -> None:
        raise OSError(30, "Read-only file system")

    words, hung = lacking(monkeypatch, tmp_path, refuses, durable=True)
    assert words == f"volume data: nothing can be written to {tmp_path}: Read-only file system"
    assert hung == {}

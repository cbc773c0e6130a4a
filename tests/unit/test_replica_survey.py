"""A hung filesystem holds up neither the loop, nor the look at the others, nor the next look."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nfsha.replica.volume import survey as survey_module
from nfsha.replica.volume.mountinfo import Mount
from nfsha.replica.volume.survey import Survey
from nfsha.replica.volume.volumes import Place, VolumeError, VolumeFacts, unanswering

ROOT = Path("/nfs")
WITHIN_S = 0.4  # a thread that is held up for less, on a busy machine, is not taken for hung


class World:
    """Places whose looks hang as long as the test says; the names that were looked at."""

    def __init__(self, *names: str) -> None:
        self.names = [".", *names]
        self.hung: dict[str, threading.Event] = {}
        self.looks: list[str] = []

    def hang(self, *names: str) -> None:
        self.hung.update((name, threading.Event()) for name in names)

    def free(self) -> None:
        for event in self.hung.values():
            event.set()
        self.hung = {}

    def places(self, root: Path) -> tuple[Place, ...]:
        if "root" in self.hung:
            self.hung["root"].wait()
        return tuple(self._place(name) for name in self.names)

    def look(self, place: Place) -> VolumeFacts:
        self.looks.append(place.name)
        if place.name in self.hung:
            self.hung[place.name].wait()
        return unanswering(place, "")

    @staticmethod
    def _place(name: str) -> Place:
        path = ROOT / name
        device = f"/dev/{name}"
        mount = Mount(1, 0, 1, "/", str(path), ("rw",), "ext4", device, ("rw",))
        return Place(name, path, mount, None, (), "")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World("a", "b", "c", "d")
    monkeypatch.setattr(survey_module, "places", made.places)
    monkeypatch.setattr(survey_module, "look", made.look)
    yield made
    made.free()
    for thread in threading.enumerate():
        if thread.name == "nfsha-look":
            thread.join(5)


def run(test: Callable[[Survey], object]) -> None:
    asyncio.run(test(Survey(ROOT, time.monotonic, within_s=WITHIN_S)))  # type: ignore[arg-type]


def failing(found: tuple[VolumeFacts, ...]) -> dict[str, bool]:
    return {facts.name: bool(facts.failing) for facts in found}


def test_all_are_looked_at_in_one_thread(world: World) -> None:
    async def test(survey: Survey) -> None:
        threads = threading.active_count()
        found = await survey.look()
        assert failing(found) == {".": False, "a": False, "b": False, "c": False, "d": False}
        assert threading.active_count() <= threads + 1

    run(test)
    assert world.looks == [".", "a", "b", "c", "d"]


def test_hung_ones_cost_the_others_nothing_but_their_time(world: World) -> None:
    async def test(survey: Survey) -> None:
        await survey.look()
        world.hang("b", "d")
        turns = []

        async def turn() -> None:
            while True:
                turns.append(time.monotonic())
                await asyncio.sleep(0.005)

        turning = asyncio.create_task(turn())
        began = time.monotonic()
        found = await survey.look()
        assert 2 * WITHIN_S <= time.monotonic() - began < 20 * WITHIN_S
        turning.cancel()
        assert len(turns) > 8  # the loop went on turning
        assert failing(found) == {".": False, "a": False, "b": True, "c": False, "d": True}
        assert "does not answer" in found[2].failing

        # Stuck ones are not looked at again, and cost no time any more.
        world.looks.clear()
        began = time.monotonic()
        assert failing(await survey.look())["b"] is True
        assert time.monotonic() - began < WITHIN_S
        assert world.looks == [".", "a", "c"]

        world.free()
        deadline = time.monotonic() + 5
        while any(failing(await survey.look()).values()):
            assert time.monotonic() < deadline

    run(test)


def test_what_was_last_known_of_a_hung_one_is_kept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = "00000000-0000-0000-0000-000000000001"
    plain = world.look

    def look(place: Place) -> VolumeFacts:
        facts = plain(place)
        return VolumeFacts(**{**{n: getattr(facts, n) for n in facts.__slots__},
                              "identity": identity, "size_bytes": 77})  # fmt: skip

    monkeypatch.setattr(survey_module, "look", look)

    async def test(survey: Survey) -> None:
        await survey.look()
        world.hang("a")
        facts = (await survey.look())[1]
        assert (facts.name, facts.identity, facts.size_bytes) == ("a", identity, 77)
        assert facts.failing

    run(test)


def test_a_hung_root_is_an_error_and_is_tried_again_later(world: World) -> None:
    async def test(survey: Survey) -> None:
        world.hang("root")
        for _ in range(2):
            with pytest.raises(VolumeError, match=r"/nfs.*does not answer"):
                await survey.look()
        assert sum(one.name == "nfsha-look" for one in threading.enumerate()) == 1
        world.free()
        await asyncio.sleep(0.05)
        assert len(await survey.look()) == 5

    run(test)


def test_there_is_an_end_to_the_threads_left_behind(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey_module, "MAX_STUCK", 2)

    async def test(survey: Survey) -> None:
        world.hang("a", "b", "c", "d")
        assert failing(await survey.look()) == {
            ".": False, "a": True, "b": True, "c": True, "d": True,
        }  # fmt: skip
        with pytest.raises(VolumeError, match="does not answer"):
            await survey.look()
        assert sum(one.name == "nfsha-look" for one in threading.enumerate()) == 2

    run(test)


def test_a_root_that_is_no_folder_says_so() -> None:
    async def test() -> None:
        with pytest.raises(VolumeError, match="cannot look for volumes below /no/such"):
            await Survey(Path("/no/such"), time.monotonic).look()

    asyncio.run(test())


def test_one_volume_alone_is_looked_at_again(world: World) -> None:
    async def scene() -> tuple[VolumeFacts | None, VolumeFacts | None, VolumeFacts | None]:
        survey = Survey(ROOT, time.monotonic, within_s=WITHIN_S)
        await survey.look()
        world.looks.clear()
        world.hang("a")
        seen = await survey.look_again(ROOT / "b")
        world.names.remove("c")
        return seen, await survey.look_again(ROOT / "c"), await survey.look_again(ROOT / "a")

    seen, gone, hung = asyncio.run(scene())
    assert seen is not None
    assert (seen.name, seen.failing) == ("b", "")
    assert gone is None
    assert hung is not None
    assert "does not answer" in hung.failing
    assert world.looks == ["b", "a"]


def test_who_is_cancelled_as_a_look_ends_does_not_go_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`asyncio.wait_for` of Python 3.11 gives a result instead: then a daemon never ends."""

    async def look_on(survey: Survey) -> None:
        while True:
            await survey.look()

    async def scenario() -> bool:
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(look_on(Survey(ROOT, time.monotonic, within_s=WITHIN_S)))
        real = asyncio.Event.set
        asked: list[asyncio.Handle] = []

        def ends(event: asyncio.Event) -> None:
            real(event)
            if not asked:
                asked.append(loop.call_soon(task.cancel))

        monkeypatch.setattr(asyncio.Event, "set", ends)
        _, pending = await asyncio.wait([task], timeout=5)
        task.cancel()
        return not pending

    assert asyncio.run(scenario())

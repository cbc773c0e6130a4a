"""A daemon that has just begun: what operators ask before the volumes are known waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from nfsha import config
from nfsha.core.model import Epoch
from nfsha.core.replication import Fetch, Finish, Offer, Rest
from nfsha.replica import replicator as module
from nfsha.replica.exchange import own_facts
from nfsha.replica.fetching.copying import Copy, State
from nfsha.replica.fetching.fetching import END_WITHIN_S, Fetching
from nfsha.replica.fetching.schedule import Kind, Reason
from nfsha.replica.replicator import Ends, ReplicaError, Replicator
from nfsha.replica.rsync.child import ChildStuckError
from nfsha.replica.source.serving import Serving
from nfsha.replica.volume.facts import VolumeFacts
from nfsha.replica.volume.marks import MarkStore
from nfsha.replica.volume.survey import Survey
from tests.unit.test_replica_marks import EPOCH, FIRST, SECOND, facts, mark


class World:
    """What a replicator meets: volumes here, facts of the other node; it notes the passes."""

    def __init__(self, folder: Path) -> None:
        self.here: tuple[VolumeFacts, ...] = (facts(FIRST, name="data"),)
        self.passes: list[tuple[str, Kind]] = []
        self.may_look = asyncio.Event()
        self.told: list[dict[str, Any]] = []
        self._folder = folder

    @asynccontextmanager
    async def replicator(self) -> AsyncIterator[Replicator]:
        settings = config.parse(
            'role = "standby"\ninterface = "eth0"\nvip = "192.0.2.10"\nwitness = "gateway"\n'
            'links = [{local = "192.0.2.1", peer = "192.0.2.2"}, '
            '{local = "10.9.9.1", peer = "10.9.9.2"}]\n'
            f'nfs.root = "{self._folder}"\n[paths]\nstate = "{self._folder}/state"\n'
            f'runtime = "{self._folder}/run"\n'
        )
        one = Replicator(
            settings,
            bytes(32),
            Ends(ip_address("127.0.0.1"), ip_address("127.0.0.1")),
            clock_ms=lambda: time.monotonic_ns() // 1_000_000,
            report=lambda _: None,
            tell=self.told.append,
            watch=lambda _: None,
        )
        await one.start()
        try:
            yield one
        finally:
            await one.close()

    def there(self, *listed: VolumeFacts) -> dict[str, Any]:
        """What the other node tells of itself."""
        return own_facts(listed, MarkStore(self._folder / "none"), []) | {"tainted": {}}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)

    async def look(_survey: Survey) -> tuple[VolumeFacts, ...]:
        await made.may_look.wait()
        return made.here

    async def make(_fetching: Fetching, copy: Copy, _epoch: object, reason: Reason) -> None:
        made.passes.append((copy.uuid, reason.kind))
        copy.rest(State.IDLE, "up to date")

    async def verify(fetching: Fetching, copy: Copy, epoch: object) -> None:
        made.passes.append((copy.uuid, Kind.VERIFY))
        copy.rest(State.IDLE, "verified")

    monkeypatch.setattr(Survey, "look", look)
    monkeypatch.setattr(Fetching, "_ordinary_or_full", make)
    monkeypatch.setattr(Fetching, "_verify", verify)
    return made


async def turns() -> None:
    """Long enough for all that waits for nothing."""
    for _ in range(100):
        await asyncio.sleep(0)


@pytest.mark.parametrize("name", [None, "data"])
@pytest.mark.parametrize("kind", [Kind.ORDINARY, Kind.FULL, Kind.VERIFY])
def test_a_sync_waits_until_both_nodes_volumes_are_known(
    world: World, name: str | None, kind: Kind
) -> None:
    async def scene() -> None:
        async with world.replicator() as one:
            one.follow(Fetch(EPOCH, start=True), EPOCH)
            asked = asyncio.ensure_future(
                one.sync(name, full=kind is Kind.FULL, verify=kind is Kind.VERIFY, wait=True)
            )
            await turns()
            assert not asked.done(), "nothing was looked at yet"
            world.may_look.set()
            await one.inventory.looked.wait()
            await turns()
            assert not asked.done(), "the other node has not told yet"
            assert world.passes == []
            await one.heard(world.there(facts(FIRST, name="data")))
            for one_pass in await asked:
                await one_pass
            assert (FIRST, kind) in world.passes

    asyncio.run(scene())


def test_a_sync_with_a_peer_that_never_tells_is_refused_in_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOLD_WITHIN_S", 0.05)
    world.may_look.set()

    async def scene() -> None:
        async with world.replicator() as one:
            one.follow(Fetch(EPOCH, start=True), EPOCH)
            with pytest.raises(ReplicaError, match="the other node has not told its volumes"):
                await one.sync(None)
            for ask in (one.pair, one.forget):
                with pytest.raises(ReplicaError, match="the other node has not told its volumes"):
                    await ask("data")
            world.may_look.clear()
            one.inventory.looked.clear()
            with pytest.raises(ReplicaError, match="the volumes are not looked at yet"):
                await one.seen()

    asyncio.run(scene())


def test_where_nothing_is_fetched_a_sync_says_so_at_once(world: World) -> None:
    async def scene() -> None:
        async with world.replicator() as one:
            for flow, why in (
                (Fetch(EPOCH, start=False, why="the peer is silent"), "the peer is silent"),
                (Offer(EPOCH), "it serves, run this on the other node"),
            ):
                one.follow(flow, EPOCH)
                asked = asyncio.ensure_future(one.sync(None))
                await turns()
                assert asked.done()
                with pytest.raises(ReplicaError, match=why):
                    await asked
            world.may_look.set()

    asyncio.run(scene())


def test_a_sync_that_waits_is_told_when_this_node_serves_meanwhile(world: World) -> None:
    async def scene() -> None:
        async with world.replicator() as one:
            one.follow(Fetch(EPOCH, start=True), EPOCH)
            asked = asyncio.ensure_future(one.sync(None))
            await turns()
            one.follow(Fetch(EPOCH, start=False, why="the peer is silent"), EPOCH)
            world.may_look.set()
            await one.heard(world.there(facts(FIRST, name="data")))
            with pytest.raises(ReplicaError, match="the peer is silent"):
                await asked

    asyncio.run(scene())


def test_a_pairing_waits_for_the_volumes_of_both_nodes(world: World) -> None:
    async def scene() -> None:
        async with world.replicator() as one:
            asked = asyncio.ensure_future(one.pair("data"))
            await turns()
            world.may_look.set()
            await one.inventory.looked.wait()
            await turns()
            assert not asked.done()
            await one.heard(world.there(facts(FIRST, name="data")))
            assert await asked == "volume data is paired already"

    asyncio.run(scene())


def test_a_volume_that_is_gone_is_forgotten_and_holds_up_nothing_any_more(world: World) -> None:
    kept, gone = facts(FIRST, name="data"), facts(SECOND, name="old")
    world.here = (kept, gone)
    world.may_look.set()

    async def scene() -> None:
        async with world.replicator() as one:
            for uuid in (FIRST, SECOND):
                one.store.put_own(mark(uuid, started_ns=time.time_ns()))
            one.follow(Fetch(EPOCH, start=True), EPOCH)
            await one.heard(world.there(kept))
            await one._name_volumes()
            with pytest.raises(ReplicaError, match="volume old is mounted here"):
                await one.forget("old")
            world.here = (kept,)
            await one.inventory.look()
            whole, why = one._wholeness(EPOCH)
            assert not whole
            assert "not mounted here: old (if it was removed for good: `nfsha volumes fo" in why
            await one.heard(world.there(kept, gone))
            with pytest.raises(ReplicaError, match="the other node has this volume mounted"):
                await one.forget("old")
            await one.heard(world.there(kept))
            words = await one.forget("old")
            assert words.startswith(f"volume old ({SECOND}) is forgotten: the last pass into this")
            assert one._wholeness(EPOCH)[0]
            assert [told["volume"] for told in world.told[-1]["marks"]] == [FIRST]
            with pytest.raises(ReplicaError, match="nothing is known of a volume 'old'"):
                await one.forget("old")

    asyncio.run(scene())


# --- what the other node tells -------------------------------------------------------------------


def test_a_copy_that_the_other_node_calls_tainted_is_shown_so_here(world: World) -> None:
    one_volume = facts(FIRST, name="data")
    world.may_look.set()

    async def scene() -> None:
        async with world.replicator() as one:
            await one.inventory.look()
            await one.heard(world.there(one_volume) | {"tainted": {FIRST: "resync to epoch 8"}})
            one._flow = Offer(EPOCH)
            assert one.overview.facts()["volumes"][0]["tainted"] == "resync to epoch 8"
            await one.heard(world.there(one_volume) | {"tainted": {"*": "its file was lost"}})
            assert one.overview.facts()["volumes"][0]["tainted"] == "its file was lost"
            await one.heard(world.there(one_volume))
            assert one.overview.facts()["volumes"][0]["tainted"] == ""
            one._flow = Fetch(EPOCH, start=True)
            one.store.taint([FIRST], "resync to epoch 7")
            assert one.overview.facts()["volumes"][0]["tainted"] == "resync to epoch 7"

    asyncio.run(scene())


def test_garbage_changes_nothing_and_is_one_line(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    good = world.there(facts(FIRST, name="data"))
    bad = replace(facts(FIRST, name="data"), free_bytes=-1)
    deep = json.loads("[" * 900 + "]" * 900)

    async def scene() -> None:
        async with world.replicator() as one:
            await one.heard(good)
            for garbage in (world.there(bad), {**good, "tainted": deep}, deep):
                caplog.clear()
                for _ in range(3):
                    await one.heard(garbage)
                lines = [line for line in caplog.records if "facts are refused" in line.message]
                assert len(lines) == 1
                assert lines[0].levelno == logging.WARNING
                assert lines[0].exc_info is None
                assert lines[0].message.isprintable()
            assert one.inventory.there == (facts(FIRST, name="data"),)
            await one.heard(good)
            await one.heard(deep)
            assert len([1 for line in caplog.records if "another version" in line.message]) == 2
            world.may_look.set()

    asyncio.run(scene())


class Stuck:
    """A pass whose process is killed, and hangs in a dead disk."""

    async def end(self, within_s: float, *, at_once: bool) -> None:
        await asyncio.sleep(within_s)
        raise ChildStuckError("pull", ["4711 rsync (disk sleep)"])


@pytest.mark.parametrize("hangs", ["process", "thread"])
def test_clients_are_not_held_for_a_disk_that_hangs(
    world: World, monkeypatch: pytest.MonkeyPatch, hangs: str
) -> None:
    monkeypatch.setattr(module, "HELD_WITHIN_S", 0.5)
    thawed = threading.Event()

    async def scene() -> tuple[str, str]:
        async with world.replicator() as one:
            given = Epoch(EPOCH.number + 1, "00000000000000bb", EPOCH.authority.other)
            one.follow(Finish(EPOCH, given), EPOCH)
            with contextlib.ExitStack() as hanging:
                writing = None
                if hangs == "process":
                    hanging.enter_context(one.fetching.under_way.noted(FIRST, Stuck()))
                else:
                    writing = asyncio.ensure_future(one.fetching.under_way.write(thawed.wait))
                await turns()
                one.follow(Rest("it is proved"), EPOCH)
                try:
                    async with asyncio.timeout(END_WITHIN_S / 2):
                        stuck = await one.stop_receivers()
                finally:
                    thawed.set()
                if writing is not None:
                    await writing
            return stuck, await one.stop_receivers()

    stuck, gone = asyncio.run(scene())
    assert ("disk sleep" if hangs == "process" else "threads of this process") in stuck
    assert gone == ""


def test_who_serves_on_after_a_moment_without_offers_its_volumes_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A freeze that is ended takes a moment, and the conductor may be busy all through it."""
    offering: list[Epoch] = []

    async def run(serving: Serving, epoch: Epoch) -> None:
        serving.epoch = epoch
        offering.append(epoch)
        try:
            await asyncio.Event().wait()
        finally:
            offering.remove(epoch)
            serving.epoch = None

    monkeypatch.setattr(Serving, "run", run)
    world.may_look.set()

    async def scene() -> None:
        async with world.replicator() as one:
            one.follow(Offer(EPOCH), EPOCH)
            await turns()
            assert offering == [EPOCH]
            one.follow(Rest("the freeze was ended"), EPOCH)
            one.follow(Offer(EPOCH), EPOCH)
            await turns()
            assert offering == [EPOCH]

    asyncio.run(scene())

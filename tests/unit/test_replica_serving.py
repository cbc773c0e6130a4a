"""What the source publishes of volumes that wait for their first copy."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nfsha.core.model import Epoch, Role
from nfsha.replica.source import serving
from nfsha.replica.source.fresh import Coalesced
from nfsha.replica.source.serving import FACTS_NAME, Serving
from nfsha.replica.volume import volumes
from nfsha.replica.volume.facts import VolumeFacts
from nfsha.replica.volume.inventory import Inventory

EPOCH = Epoch(3, "00000000000000aa", Role.PRIMARY)
COPIED, EMPTY = "00000000-0000-4000-8000-00000000000a", "00000000-0000-4000-8000-00000000000b"


def volume(uuid: str, **changes: Any) -> VolumeFacts:
    one = VolumeFacts(
        name=uuid[-1], path=Path("/nfs") / uuid[-1], device="/dev/sda", device_number=7,
        fstype="ext4", fs_uuid=None, size_bytes=1000, free_bytes=900, inodes=100, free_inodes=90,
        options="rw", read_only=False, failing="", identity=uuid, stamp=EPOCH, empty=False,
    )  # fmt: skip
    return replace(one, **changes)


class Looked(Inventory):
    """Both nodes' volumes; each look finds a hundred bytes more, or does not come back."""

    def __init__(self, *, hangs: bool) -> None:
        super().__init__(Path("/nowhere"), lambda: 0)
        self.here = (volume(COPIED), volume(EMPTY))
        self.there = (volume(COPIED), volume(EMPTY, stamp=None, empty=True))
        self._hangs = hangs

    async def look_at(self, uuid: str) -> None:
        if self._hangs:
            await asyncio.Event().wait()
        self.here = tuple(
            replace(one, free_bytes=one.free_bytes - 100) if one.identity == uuid else one
            for one in self.here
        )


def published(folder: Path, *, hangs: bool) -> dict[str, int]:
    """The free bytes of each volume, as the other node reads them."""

    async def scene() -> None:
        one = Serving(
            Looked(hangs=hangs),
            cast("Any", SimpleNamespace(public=folder, fresh=None)),
            folder / "notes",
            token=cast("Any", None),
            clocks=cast("Any", SimpleNamespace(now_ms=lambda: 0, wall_ns=lambda: 1)),
            max_changed_folders=10,
            changed=lambda: None,
        )
        one._dense = cast("Any", SimpleNamespace(publish=listed))
        one.epoch = EPOCH
        one._offered = {uuid: volume(uuid) for uuid in (COPIED, EMPTY)}
        one._written_ns = dict.fromkeys(one._offered, (1, 1))
        await one.fresh()

    wanted: list[list[str]] = []

    async def listed(volumes: dict[str, VolumeFacts]) -> None:
        wanted.append([*volumes])

    asyncio.run(scene())
    assert wanted == [[EMPTY]]
    document = json.loads((folder / FACTS_NAME).read_text())
    return {one["identity"]: one["free_bytes"] for one in document["volumes"]}


def test_how_much_a_first_copy_will_be_is_looked_at_when_it_is_fetched(tmp_path: Path) -> None:
    assert published(tmp_path, hangs=False) == {COPIED: 900, EMPTY: 800}


def test_a_disk_that_hangs_keeps_nothing_from_being_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "SIZES_WITHIN_S", 0.01)
    assert published(tmp_path, hangs=True) == {COPIED: 900, EMPTY: 900}


@pytest.mark.parametrize("hangs", ["", "disk", "journal"])
def test_what_does_not_come_to_rest_is_named(monkeypatch: pytest.MonkeyPatch, hangs: str) -> None:
    monkeypatch.setattr(serving, "REST_WITHIN_S", 0.5)
    ended = threading.Event()

    def sync(one: VolumeFacts) -> None:
        if hangs == "disk" and one.identity == EMPTY:
            ended.wait(10)

    async def drain() -> None:
        if hangs == "journal":
            await asyncio.Event().wait()

    monkeypatch.setattr(volumes, "sync", sync)

    async def scene() -> str:
        one = Serving(
            Looked(hangs=False),
            cast("Any", SimpleNamespace(public=Path("/nowhere"), fresh=None)),
            Path("/nowhere"),
            token=cast("Any", None),
            clocks=cast("Any", SimpleNamespace(now_ms=lambda: 0, wall_ns=lambda: 1)),
            max_changed_folders=10,
            changed=lambda: None,
        )
        one._offered = {uuid: volume(uuid) for uuid in (COPIED, EMPTY)}
        counted = SimpleNamespace(counters=SimpleNamespace(events=3))
        one.journals = cast("Any", dict.fromkeys(one._offered, counted))
        one._drains = {EMPTY: Coalesced(drain)}
        try:
            return await one.come_to_rest()
        finally:
            ended.set()

    wanted = {
        "": "",
        "disk": "no rest within 0.5 s: volume b: what was written does not come to its disk",
        "journal": "no rest within 0.5 s: volume b: its change journal does not answer",
    }
    assert asyncio.run(scene()) == wanted[hangs]

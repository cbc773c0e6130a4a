"""Long lists through the real control socket: many volumes, many quarantine entries, odd names."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Sequence,
)
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nfsha.cli import client, render_volumes
from nfsha.cli.main import main
from nfsha.cli.words import Style
from nfsha.daemon import copy_answers
from nfsha.daemon.copy_answers import PART_BYTES, PART_ENTRIES, STATUS_ALARMS, CopyAnswers
from nfsha.host import control
from nfsha.replica.quarantine.quarantine import Quarantine, QuarantineError
from nfsha.replica.replicator import Replicator

Facts = dict[str, Any]
Said = pytest.CaptureFixture[str]

LONGEST = "/".join(["\\xff" * 255] * 15)
"""A path as long as can be, none of its bytes printable."""


def volume(number: int, *, state: str = "idle", names: Sequence[str] = ()) -> Facts:
    side = {
        "name": f"department-{number:04}", "path": f"/srv/nfs/department-{number:04}",
        "device": f"/dev/mapper/vg0-department--{number:04}", "device_number": 64768 + number,
        "fstype": "ext4", "fs_uuid": f"00000000-0000-0000-0000-{number:012}",
        "size_bytes": 1 << 40, "free_bytes": 1 << 39, "inodes": 1 << 26, "free_inodes": 1 << 25,
        "options": "rw,relatime,errors=remount-ro", "read_only": False, "failing": "",
        "refused": "", "identity": f"10000000-0000-0000-0000-{number:012}", "empty": False,
        "stamp": {"number": 7, "id": "0123456789abcdef", "authority": "primary"},
    }  # fmt: skip
    return {
        "name": side["name"], "path": side["path"], "uuid": side["identity"], "paired": "paired",
        "here": side, "there": side, "differs": [],
        "sync": {
            "state": state, "why": "up to date", "last": None, "age_ms": 1000, "next_ms": 2000,
            "progress": None, "full_walks": {}, "missed_by_journal": 0, "verify": None,
            "plan": {"hash": "ab" * 32, "count": len(names), "names": list(names)}
            if names else None,
        },
    }  # fmt: skip


class Many:
    """What answers need of a replicator: volumes that a test makes up."""

    def __init__(self, listed: list[Facts]) -> None:
        self.overview = self.quarantines = self
        self.listed = listed
        self.failing: list[str] = []
        self.stores: dict[str, Path] = {}
        self.inventory = SimpleNamespace(here=[], by_name=lambda _: None)
        self.looked = asyncio.Event()
        self.one_pass: Callable[[Facts], Coroutine[None, None, bool]] = self._pass

    async def seen(self) -> None:
        pass

    def facts(self) -> Facts:
        self.looked.set()
        now = [one | {"sync": one["sync"].copy()} for one in self.listed]
        return {"volumes": now, "replication": {"mode": "target", "why": ""}}

    def alarms(self) -> dict[str, str]:
        return {
            f"not-copied {one['name']}": f"volume {one['name']}: the disk is full"
            for one in self.listed
            if one["sync"]["state"] == "failed"
        }

    def chosen(self, _name: str | None) -> list[str]:
        return [one["uuid"] for one in self.listed]

    async def sync(self, _name: str | None, *, wait: bool, **_more: object) -> list[Any]:
        self.looked.clear()
        return [asyncio.ensure_future(self.one_pass(one)) for one in self.listed] if wait else []

    async def _pass(self, one: Facts) -> bool:
        one["sync"]["state"] = "running"
        if one["name"].endswith("7"):
            await self.looked.wait()
        one["sync"]["state"] = "idle"
        return True

    def results(self, chosen: Sequence[str]) -> list[Facts]:
        return [
            {"name": one["name"], "state": one["sync"]["state"], "why": one["sync"]["why"]}
            for one in self.listed
            if one["uuid"] in chosen
        ]

    def with_stores(self, stores: dict[str, Path]) -> None:
        self.stores = stores
        self.inventory.here = [SimpleNamespace(name=name, identity=name) for name in stores]

    async def ask(self, name: str, call: Callable[[Quarantine], Any]) -> object:
        if name in self.failing:
            raise QuarantineError("the disk is dead")
        root_fd = os.open(self.stores[name], os.O_RDONLY | os.O_DIRECTORY)
        try:
            return call(Quarantine(root_fd))
        finally:
            os.close(root_fd)


@pytest.fixture
def many() -> Many:
    return Many([])


@pytest.fixture
def sock(many: Many, tmp_path: Path) -> Iterator[Path]:
    """A real control socket that answers as the daemon does, in a thread."""
    answers = CopyAnswers(cast("Replicator", many), (None, None))
    path = tmp_path / "nfsha.sock"
    ready, ended = threading.Event(), threading.Event()

    async def answer(command: str, args: Facts, _who: control.Credentials) -> Facts:
        if command == "status":
            return {"status": {"copies": answers.brief(), "alarms": answers.alarms()}}
        return await answers.answer(command, args)

    async def serve() -> None:
        streams: dict[str, Callable[..., AsyncGenerator[Facts, None]]]
        streams = {"sync-wait": answers.wait}
        server = control.ControlServer(path, cast("Callable[..., Awaitable[Facts]]", answer),
                                       streams=streams)  # fmt: skip
        await server.start()
        ready.set()
        await asyncio.to_thread(ended.wait)
        await server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(10)
    yield path
    ended.set()
    thread.join(10)
    assert not thread.is_alive()


# --------------------------------------------------------------------------- volumes


def test_thousands_of_volumes_arrive_whole_and_in_order(many: Many, sock: Path) -> None:
    many.listed = [volume(number) for number in range(4096)]
    assert len(json.dumps(many.listed)) > 4 * control.MAX_ANSWER_BYTES
    found = client.volumes(sock)
    assert found["volumes"] == many.listed
    assert found["total"] == 4096
    text = render_volumes.volumes(found, Style(colour=False))
    assert text.count("paired; the copy is 1.0 s old") == 4096


def test_a_plan_of_the_longest_names_fits(many: Many, sock: Path) -> None:
    many.listed = [volume(number, state="held", names=[LONGEST] * 20) for number in range(5)]
    assert len(json.dumps(many.listed[0])) > PART_BYTES
    assert client.volumes(sock)["volumes"] == many.listed


def test_a_place_to_begin_at_is_a_number(sock: Path) -> None:
    for wrong in (-1, True, "1", 1.5, None):
        with pytest.raises(control.CommandError, match="start is"):
            control.ControlClient(sock).call("volumes", {"start": wrong})
    assert control.ControlClient(sock).call("volumes", {"start": 7})["volumes"] == []


def test_a_status_has_the_volumes_in_trouble_and_the_number_of_all(many: Many, sock: Path) -> None:
    many.listed = [volume(n, state="failed" if n >= 3000 else "idle") for n in range(4000)]
    told = client.status(sock)
    assert told["copies"]["volumes"][0]["name"] == "department-3000"
    assert told["copies"]["total"] == 4000
    brief = render_volumes.brief(told["copies"])
    assert brief[-1] == "and 3,994 volumes more: see `nfsha volumes`"
    assert len(told["alarms"]) == STATUS_ALARMS + 1
    assert told["alarms"][-1]["text"].startswith("900 more alarms")
    assert len(json.dumps(told)) < 100_000


def test_waiting_for_many_passes_tells_each_change_and_all_at_the_end(
    many: Many, sock: Path, capsys: Said
) -> None:
    many.listed = [volume(number) for number in range(1000)]
    assert main(["sync", "--wait", "--json", "--socket", str(sock)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, (json.dumps(line["volumes"]) for line in lines[:-1]))) < 2 * PART_BYTES
    running = {
        one["name"]
        for line in lines
        for one in line["volumes"]
        if one["sync"]["state"] == "running"
    }
    assert running == {f"department-{number:04}" for number in range(7, 1000, 10)}
    assert lines[-1]["done"] is True
    assert lines[-1]["volumes"] == many.listed
    told = sum(one["name"] == "department-0001" for line in lines[:-1] for one in line["volumes"])
    assert told == 2, "once as the first look found it, and once at the end"


@pytest.mark.parametrize(("state", "code"), [("idle", 0), ("failed", 5)])
def test_a_pass_is_judged_by_its_own_end(
    many: Many, sock: Path, capsys: Said, state: str, code: int
) -> None:
    quick, busy, slow = many.listed = [volume(number) for number in (1, 2, 7)]

    async def pass_and_next(one: Facts) -> bool:
        if one is slow:
            await asyncio.sleep(copy_answers.SHOW_EVERY_S)
            quick["sync"]["state"] = "running"  # the schedule's next one, that nobody waits for
        elif one is quick:
            quick["sync"]["state"] = state
        else:
            # Somebody else asked too: his pass begins as this one ends, and ends the same.
            busy["sync"]["state"] = "running"
            asyncio.get_running_loop().call_later(0.2, busy["sync"].__setitem__, "state", "idle")
        return True

    many.one_pass = pass_and_next
    assert main(["sync", "--wait", "--socket", str(sock)]) == code
    assert ("department-0001: up to date" in capsys.readouterr().err) == (code != 0)


def test_passes_that_were_asked_for_are_counted(many: Many, sock: Path, capsys: Said) -> None:
    many.listed = [volume(number) for number in range(9000)]
    assert main(["sync", "--socket", str(sock)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "department-0000: asked for"
    assert lines[-1] == f"and {9000 - len(lines) + 1:,} volumes more"


# --------------------------------------------------------------------------- quarantine


def entries(root: Path, count: int) -> list[str]:
    """So many entries that a crash left without a record: they are the cheapest to make."""
    store = root / ".nfsha-quarantine"
    store.mkdir(mode=0o700, parents=True)
    names = [f"20260102T030405.000Z-resync-{number:08x}" for number in range(count)]
    for name in names:
        (store / name / "tree").mkdir(parents=True)
    return names


def test_thousands_of_quarantine_entries_arrive_whole(
    many: Many, sock: Path, tmp_path: Path, capsys: Said
) -> None:
    counts = {"alpha": PART_ENTRIES, "beta": 0, "gamma": 3 * PART_ENTRIES + 1, "omega": 2}
    expected = {name: entries(tmp_path / name, count) for name, count in counts.items()}
    many.with_stores({name: tmp_path / name for name in counts})
    assert main(["quarantine", "list", "--json", "--socket", str(sock)]) == 0
    answer = json.loads(capsys.readouterr().out)
    found: dict[str, list[str]] = {name: [] for name in counts}
    for one in answer["entries"]:
        found[one["volume"]].append(one["name"])
    assert found == expected
    assert {one["volume"]: one["entries"] for one in answer["usage"]} == counts
    assert answer["more"] is False


def test_one_bad_disk_hides_no_other_quarantine(
    many: Many, sock: Path, tmp_path: Path, capsys: Said
) -> None:
    name = entries(tmp_path / "good", 1)[0]
    many.with_stores({"bad": tmp_path / "bad", "good": tmp_path / "good"})
    many.failing = ["bad"]
    assert main(["quarantine", "list", "--socket", str(sock)]) == 0
    told = capsys.readouterr().out
    assert "bad: CANNOT BE READ: the disk is dead" in told
    assert name in told
    assert main(["quarantine", "drop", name, "--yes", "--socket", str(sock)]) == 0
    assert main(["quarantine", "list", "--volume", "bad", "--socket", str(sock)]) != 0
    assert "the disk is dead" in capsys.readouterr().err


def test_the_longest_names_of_an_entry_come_in_parts(
    many: Many, sock: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    names = [bytes([200 + n % 50]) * 250 + b"%05d" % n for n in range(700)]
    for name in names:
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=root_fd))
    store = Quarantine(root_fd)
    entry = store.begin("resync", why="", epoch=None, operation="", by="")
    store.keep(entry, names)
    for name in names[:400]:  # something stands in their places again
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=root_fd))
    os.close(root_fd)
    many.with_stores({"data": root})
    asks = control.ControlClient(sock)
    found: list[str] = []
    more, rounds = True, 0
    while more:
        args = {"action": "show", "entry": entry.name, "after": found[-1] if found else None}
        part = asks.call("quarantine", args)
        found += [one["name"] for one in part["items"]]
        more = part["more"]
        rounds += 1
    assert len(found) == len(set(found)) == 700
    assert rounds > 2


def test_a_cursor_is_one_that_was_given(sock: Path) -> None:
    for wrong in ("x", [], ["a"], ["a", 1], {"a": 1}):
        with pytest.raises(control.CommandError, match="after is not"):
            control.ControlClient(sock).call("quarantine", {"action": "list", "after": wrong})

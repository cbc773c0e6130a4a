"""Who is told of a move: what a node remembers of lock holders, through reigns and boots."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nfsha import config
from nfsha.daemon import locks
from nfsha.daemon.inbox import Inbox
from nfsha.daemon.locks import Record, begun, heard, next_state
from nfsha.nfs import statd
from nfsha.nfs.statd import CLIENTS_MAX, STATE_MAX, Holders
from nfsha.peer import pages

X, Y, Z = "192.0.2.1", "192.0.2.2", "192.0.2.3"


def test_a_reign_begins_with_all_who_held_locks_before() -> None:
    waiting = Record(there=Holders(4, 9, (X, Y)))
    reign = begun(waiting, "5 id boot", 5)
    assert reign.pending == (X, Y)
    assert reign.mine == Holders(5, reign.state, (X, Y))  # the other node knows them at once
    assert reign.there == Holders(4, 9)


def test_a_boot_of_the_node_that_serves_counts_as_a_change_too() -> None:
    serving = Record("5 id boot", 11, Holders(5, 11, (X,)))
    again = begun(serving, "5 id other-boot", 5)
    assert again.pending == (X,)
    assert again.state > 11


def test_who_held_locks_here_is_the_other_nodes_business_once_it_reigns() -> None:
    passive = heard(Record("5 id boot", 11, Holders(5, 11, (X,))), Holders(6, 13, (X, Y)))
    assert passive.mine.clients == ()
    passive = heard(passive, Holders(6, 13, (Z,)))
    assert begun(passive, "7 id boot", 7).pending == (Z,)


def test_a_list_that_came_before_the_own_reign_takes_nothing_away() -> None:
    kept = heard(Record("5 id boot", 11, Holders(5, 11, (X,))), Holders(4, 9, (Y,)))
    assert begun(kept, "6 id boot", 6).pending == (Y, X)


def test_there_is_a_most_of_all() -> None:
    many = tuple(f"host-{number}" for number in range(CLIENTS_MAX))
    reign = begun(Record(mine=Holders(2, 5, (X,)), there=Holders(3, 7, many)), "4 id boot", 4)
    assert reign.pending == many


@pytest.mark.parametrize("epoch", [1, 2, 7])
@pytest.mark.parametrize("own", [0, 5, 8])
@pytest.mark.parametrize("there", [0, 14, 15])
def test_the_state_is_odd_and_above_all_that_was_told(epoch: int, own: int, there: int) -> None:
    state = next_state(Record(state=own, there=Holders(1, there)), epoch)
    assert state % 2 == 1
    assert state > max(own, there, 2 * epoch)
    assert state <= max(own, there, 2 * epoch) + 2
    assert next_state(Record(state=state), epoch + 1) > state


def test_the_state_stays_what_nsm_can_say() -> None:
    assert next_state(Record(state=STATE_MAX), 1) == STATE_MAX


def test_the_record_comes_back_as_it_was(tmp_path: Path) -> None:
    record = Record("5 id boot", 11, Holders(5, 11, (X, Y)), Holders(4, 9, (Z,)), (X,))
    file = tmp_path / "lock-holders"
    file.write_bytes(locks.encode(record))
    assert locks.load(file) == record
    assert locks.load(tmp_path / "none") == Record()


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"nfsha_locks": 1}', b"[]"])
def test_a_damaged_record_is_an_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "lock-holders"
    file.write_bytes(content)
    with pytest.raises(ValueError):
        locks.load(file)


def test_lists_are_taken_in_the_order_in_which_they_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpack(blob: bytes) -> object:
        document = json.loads(blob)
        time.sleep(0.1 if document["clients"] == [X] else 0)  # the first takes longer
        return document

    async def scene() -> Record:
        settings = config.parse(
            'role = "standby"\ninterface = "eth0"\nvip = "192.0.2.10"\nwitness = "gateway"\n'
            'links = [{local = "192.0.2.1", peer = "192.0.2.2"}, '
            '{local = "10.9.9.1", peer = "10.9.9.2"}]\n'
            f'[paths]\nstate = "{tmp_path}"\n'
        )
        wire: Any = SimpleNamespace(seal_page=print, open_page=print)
        links: Any = SimpleNamespace(send_page=None, route_pages=lambda *_: None)
        one = locks.Locks(settings, wire, links, Inbox(), lambda: 0, lambda: False)
        for clients in ((X,), (Y,)):
            one._told(json.dumps(statd.as_json(Holders(4, 9, clients))).encode())
        await asyncio.wait(one._tasks)
        if one._writer is not None:
            await one._writer
        await one.close()
        return locks.load(tmp_path / "lock-holders")

    monkeypatch.setattr(pages, "unpack", unpack)
    assert asyncio.run(scene()).there.clients == (Y,)

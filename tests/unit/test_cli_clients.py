"""`nfsha clients`: what an operator reads about who is connected."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfsha.cli.main import main
from nfsha.cli.render_clients import clients
from nfsha.cli.words import Style
from tests.unit.fake_daemon import Daemon, Facts

LOCKS: Facts = {
    "here": [], "saved": [], "delivered": True, "state": 5,
    "told": {"total": 0, "answered": 0, "given_up": 0},
}  # fmt: skip


def client(number: int, ports: int = 1) -> Facts:
    return {
        "client": f"10.0.0.{number}", "vip": "10.0.0.100", "port": 2049, "service": "nfs",
        "client_ports": list(range(700, 700 + ports)),
    }  # fmt: skip


def answer(*, serving: bool, listed: list[Facts], **changes: object) -> Facts:
    nobody: Facts = {"age_ms": None, "total": 0, "clients": []}
    those = {"age_ms": 640, "total": sum(len(one["client_ports"]) for one in listed)}
    here = {**those, "clients": listed} if serving else nobody
    saved = nobody if serving else {**those, "clients": listed}
    return {
        "serving": serving, "here": here | {"delivered": True}, "saved": saved,
        "ends_own_by": "SOCK_DESTROY", "tickles": 0, "ended": 3, "refused_lists": 0,
        "trouble": "", "locks": LOCKS, **changes,
    }  # fmt: skip


def test_the_serving_node_shows_who_is_connected_here() -> None:
    text = clients(answer(serving=True, listed=[client(7), client(8, ports=6)]), Style())
    assert text.splitlines() == [
        "here:        7 connections of 2 clients, seen 640 ms ago",
        "  10.0.0.7 nfs at 10.0.0.100, from port 700",
        "  10.0.0.8 nfs at 10.0.0.100, from port 700, 701, 702, 703 and 2 more",
        "other node:  has this list",
        "locks:       0 clients may hold some; the other node knows them",
        "at a move:   clients are woken by tickles (0 sent); own connections are ended by",
        "             SOCK_DESTROY (3 ended)",
    ]


def test_the_waiting_node_shows_what_it_was_told_and_how_old_that_is() -> None:
    text = clients(answer(serving=False, listed=[client(7)]), Style())
    assert text.splitlines()[:3] == [
        "here:        this node does not serve",
        "other node:  1 connection of 1 client, confirmed 640 ms ago",
        "  10.0.0.7 nfs at 10.0.0.100, from port 700",
    ]


def test_who_holds_locks_and_who_was_told_of_the_move_is_shown() -> None:
    told = {"total": 3, "answered": 2, "given_up": 0}
    locks = LOCKS | {"here": ["10.0.0.7"], "delivered": False, "told": told}
    text = clients(answer(serving=True, listed=[], locks=locks), Style())
    assert (
        "locks: 1 client may hold some; the other node does not know them yet; "
        "2 of 3 answered as they were told of the move"
    ) in " ".join(text.split())
    waiting = answer(serving=False, listed=[], locks=LOCKS | {"saved": ["10.0.0.7"]})
    assert "locks:       1 client may hold some: they are told of a move" in clients(
        waiting, Style()
    )


def test_before_anything_was_heard_it_says_so() -> None:
    facts = answer(serving=False, listed=[])
    facts["saved"]["age_ms"] = None
    assert "other node:  nothing heard yet" in clients(facts, Style())


def test_a_list_that_the_other_node_lacks_and_one_that_is_cut_are_told() -> None:
    facts = answer(serving=True, listed=[client(7)])
    facts["here"] |= {"delivered": False, "total": 5000}
    text = clients(facts, Style())
    assert "5,000 connections of 1 client (the newest 1 are listed)" in text
    assert "does not have this list yet" in text


def test_a_kernel_that_cannot_end_connections_and_trouble_are_told() -> None:
    facts = answer(
        serving=True, listed=[], ends_own_by="none: this kernel cannot", trouble="no route"
    )
    text = clients(facts, Style(colour=True))
    assert "own connections stay (none: this kernel cannot)" in text.replace("\n" + 13 * " ", " ")
    assert "\x1b[33mtrouble:     no route\x1b[0m" in text


def test_many_clients_are_cut_with_a_word_about_it() -> None:
    lines = clients(answer(serving=True, listed=[client(7)] * 300), Style()).splitlines()
    assert "  and 100 more (`--json` has all)" in lines
    assert len(lines) < 210


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path / "nfsha.sock")
    made.start()
    yield made
    made.stop()


def test_the_command_asks_the_daemon(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    facts = answer(serving=True, listed=[client(7)])
    daemon.answers["clients"] = {"clients": facts}
    assert main(["clients", "--socket", str(daemon.path)]) == 0
    assert "1 connection of 1 client" in capsys.readouterr().out
    assert main(["clients", "--json", "--socket", str(daemon.path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {key: told[key] for key in facts} == facts
    assert [name for name, _ in daemon.asked] == ["clients", "clients"]

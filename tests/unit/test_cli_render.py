"""What an operator reads: one calm screen for each of the situations that matter.

The screens stand in tests/unit/golden, to be read. `python -m tests.unit.test_cli_render` writes
them anew after a deliberate change.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nfsha.cli import render, words
from nfsha.cli.words import Style
from tests.unit import situations
from tests.unit.situations import Node, Pair

GOLDEN = Path(__file__).parent / "golden"

Screen = dict[str, Any]


def answered(pair: Pair, node: Node) -> Screen:
    """What the daemon of this node would answer to `status`."""
    facts = pair.seen(node)
    primary = facts["role"] == "primary"
    peer: Any = facts["peer"]
    return {
        **facts,
        "node": "nas1" if primary else "nas2",
        "version": "0.1.0",
        "vips": ["10.0.0.100"],
        "interface": "eth0",
        "links": [_link("lan", "10.0.0", peer), _link("cross", "10.9.9", peer)],
        "witness": {"names": ["10.0.0.1"], "last_answer_ms": None},
        "service_lease": {"backend": "nftables", "has_lease": True, "open": _is_open(facts)},
        "warnings": [],
        "scheduling": "real-time priority: yes, SCHED_RR 10; memory kept resident: yes",
        "risks": ["only a reachability witness arbitrates"],
        "uptime_ms": 8000,
    }


def _is_open(facts: Screen) -> bool:
    return bool(facts["serving"]) and facts["phase"] != "FREEZING"


def _link(name: str, network: str, peer: Screen) -> Screen:
    return {
        "name": name,
        "peer": f"{network}.2",
        "sent": 812,
        "received": 811 if peer["session_known"] else 0,
        "forged": 0,
        "from_stranger": 3 if name == "lan" else 0,
        "last_heard_ms": peer["age_ms"],
    }


def _primary(make: Callable[[], Pair]) -> Screen:
    pair = make()
    return answered(pair, pair.primary)


def _standby(make: Callable[[], Pair]) -> Screen:
    pair = make()
    return answered(pair, pair.standby)


def _alone() -> Pair:
    pair = situations.settled()
    pair.standby.on = False
    return pair.run(3000)


SCREENS: dict[str, Callable[[], Screen]] = {
    "active": lambda: _primary(situations.settled),
    "active-alone": lambda: _primary(_alone),
    "active-peer-in-maintenance": lambda: _primary(situations.in_maintenance),
    "passive": lambda: _standby(situations.settled),
    "waiting": lambda: _primary(situations.waiting),
    "isolated": lambda: _primary(situations.isolated),
    "takeover-vip-answered": lambda: _standby(lambda: situations.vip_answered(2000)),
    "takeover-vip-held": lambda: _standby(lambda: situations.vip_answered(4000)),
    "diverged": lambda: _primary(situations.diverged),
    "maintenance": lambda: _standby(situations.in_maintenance),
    "fault": lambda: _primary(situations.faulty),
    "presync": lambda: _standby(situations.approaching),
    "freezing": lambda: _primary(situations.frozen),
    "prepared": lambda: _primary(situations.prepared),
    "final-sync": lambda: _standby(situations.prepared),
}


@pytest.mark.parametrize("name", SCREENS)
def test_the_screen_is_the_one_that_was_approved(name: str) -> None:
    text = render.status(SCREENS[name](), Style())
    assert text + "\n" == (GOLDEN / f"status-{name}.txt").read_text(encoding="utf-8")


def test_no_approved_screen_is_left_over() -> None:
    found = {path.name for path in GOLDEN.glob("status-*")}
    assert found == {f"status-{name}.txt" for name in SCREENS}


@pytest.mark.parametrize("name", SCREENS)
def test_a_screen_is_one_screen(name: str) -> None:
    facts = SCREENS[name]()
    lines = render.status(facts, Style()).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 30
    assert lines[0].startswith(f"{facts['phase']} on nas")
    assert lines[-1].startswith("next:") or lines[-2].startswith("next:")
    assert "".join(lines).isprintable()


def test_colour_changes_no_word() -> None:
    for name, make in SCREENS.items():
        facts = make()
        plain, colour = render.status(facts, Style()), render.status(facts, Style(colour=True))
        assert re.sub(r"\x1b\[\d+m", "", colour) == plain
        assert colour.startswith("\x1b["), name


def test_an_alarm_is_painted_and_calm_is_not() -> None:
    red = "\x1b[31m"
    assert red not in render.status(SCREENS["active"](), Style(colour=True))
    assert f"{red}ALARMS:" in render.status(SCREENS["fault"](), Style(colour=True))


@pytest.mark.parametrize(
    ("names", "step"),
    [
        (["verify data"], "find the files in the log"),
        (["quarantine-full data", "source"], "mend what keeps the rsync daemon from running"),
        (["quarantine-full a b"], "`nfsha quarantine drop`"),
        (["not-offered data"], "mend what keeps the volume from being offered"),
        (["volumes-unseen", "verify data"], "mend what keeps the volumes from being seen"),
        (["of-a-newer-version data"], "next: nothing"),
    ],
)
def test_an_alarm_of_the_copies_has_a_step(names: list[str], step: str) -> None:
    facts = SCREENS["active"]() | {"next": "nothing"}
    facts["alarms"] = [{"name": name, "text": "says why"} for name in names]
    text = " ".join(render.status(facts, Style()).split())
    assert all(f"{name}: says why" in text for name in names)
    assert step in text[text.index("next:") :]
    facts["next"] = "mend the links"
    assert render.status(facts, Style()).endswith("next:        mend the links")


def test_what_a_terminal_would_obey_is_shown_harmless() -> None:
    facts = SCREENS["fault"]()
    facts["health"] = {"fit": False, "reason": "\x1b[2Jgone\nall is well"}
    facts["node"] = "nas\x07"
    text = render.status(facts, Style())
    assert "".join(text.splitlines()).isprintable()
    assert "?[2Jgone?all is well" in text


def test_what_an_older_daemon_does_not_say_is_left_out() -> None:
    facts = SCREENS["passive"]()
    for key in ("node", "vips", "interface", "links", "witness", "service_lease", "warnings",
                "scheduling", "risks", "replication"):  # fmt: skip
        del facts[key]
    text = render.status(facts, Style())
    assert text.startswith("PASSIVE on standby for ")
    assert "ready to take over the VIP" in text
    assert "replication: unknown" in text
    assert "links:" not in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stopping": "restart"}, "the daemon is stopping (restart)"),
        ({"phase": "STARTING"}, "looks at what a former run left"),
        ({"phase": "TAKEOVER"}, "is taking over 10.0.0.100"),
        ({"phase": "RETURNED"}, "does not serve, its data may be old"),
        ({"phase": "PRESYNC"}, "comes near to the other node's data, to serve then"),
        ({"phase": "OF-A-NEWER-VERSION"}, "does not serve"),
    ],
)
def test_the_first_line_says_it_all(change: Screen, words: str) -> None:
    facts = SCREENS["passive"]() | change
    assert render.status(facts, Style()).splitlines()[0].endswith(f": {words}")


def test_a_passive_node_that_could_not_take_over_says_so_first() -> None:
    facts = SCREENS["passive"]()
    facts["takeover"]["conditions"][2] |= {"ok": False, "reason": "not checked yet"}
    text = render.status(facts, Style())
    assert text.splitlines()[0].endswith("could not take over 10.0.0.100 now")
    assert "3 no  own service sound: not checked yet" in text
    facts["takeover"]["promised"] = True
    assert "promised not to take over 10.0.0.100" in render.status(facts, Style())


def test_a_passive_node_whose_peer_is_there_but_does_not_serve() -> None:
    facts = SCREENS["passive"]()
    facts["peer"]["serving"] = False
    first = render.status(facts, Style()).splitlines()[0]
    assert first.endswith("watches 10.0.0.100, the other node does not serve")


def test_several_vips_and_a_lost_carrier() -> None:
    facts = SCREENS["active"]()
    facts["vips"] = ["10.0.0.100", "fd00::100"]
    facts["vip"] |= {"carrier": False}
    facts["service_lease"] |= {"remaining_ms": 512}
    text = render.status(facts, Style())
    assert "serves 10.0.0.100, fd00::100" in text.splitlines()[0]
    assert "held here (eth0), no carrier" in text
    assert "open at the VIP for 512 ms more (nftables)" in text


def test_promises_and_words_that_stand() -> None:
    facts = SCREENS["isolated"]()
    facts["promise"] = {"own": "clearing", "peer": "none", "peer_down": "operator"}
    text = render.status(facts, Style())
    assert "this node's not to take over is being cleared" in text
    assert "the peer is taken to be off, by the operator's word" in text


def test_warnings_and_trouble_of_links_are_shown() -> None:
    facts = SCREENS["active"]()
    facts["warnings"] = ["NFS v4 is on"]
    facts["links"][1] |= {"forged": 7, "last_heard_ms": None}
    facts["witness"]["last_answer_ms"] = 1500
    text = render.status(facts, Style())
    assert "warnings:    NFS v4 is on" in text
    assert "cross: never heard, 812 sent, 811 received, 7 forged" in text
    assert "10.0.0.1: answered 1.5 s ago" in text


@pytest.mark.parametrize(
    ("ms", "told"),
    [
        (None, "never"), (0, "0 ms"), (999, "999 ms"), (1000, "1.0 s"), (9999, "10.0 s"),
        (10_000, "10 s"), (59_999, "59 s"), (60_000, "1 min 0 s"), (3_599_000, "59 min 59 s"),
        (7_380_000, "2 h 3 min"), (86_400_000 * 3, "3 d 0 h"),
    ],
)  # fmt: skip
def test_durations_are_said_as_people_say_them(ms: int | None, told: str) -> None:
    assert words.duration(ms) == told


def test_events_are_listed_with_their_reasons() -> None:
    one = {
        "wall": "2026-01-02T03:04:05.678Z", "at_ms": 5, "row": "A60", "phase": "ACTIVE",
        "to": "ISOLATED", "why": "nothing proves any more", "detail": "newest echo 601 ms old",
    }  # fmt: skip
    stay = one | {"row": "W90", "phase": "WAITING", "to": "WAITING", "detail": ""}
    assert render.events([one, stay]).splitlines() == [
        "2026-01-02T03:04:05.678Z A60  ACTIVE -> ISOLATED: nothing proves any more",
        "    newest echo 601 ms old",
        "2026-01-02T03:04:05.678Z W90  WAITING: nothing proves any more",
    ]
    assert render.events([]) == "no events yet"


if __name__ == "__main__":
    for each, made in SCREENS.items():
        screen = render.status(made(), Style())
        (GOLDEN / f"status-{each}.txt").write_text(screen + "\n", encoding="utf-8")

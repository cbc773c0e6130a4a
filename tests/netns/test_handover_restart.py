"""Who ended a move is told on both nodes; restarts of a daemon hold no client longer than need be.

One pair for all tests. Each takes it as the one before left it, whichever node serves by then.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from nfsha.host.control import ControlClient
from tests.netns.copies import SYNC, Copies, hanging
from tests.netns.lab import ROLES, Lab
from tests.netns.pair import BUSY_MS
from tests.netns.test_handover import MOVE_S, Moving, source_that_hangs

pytestmark = [pytest.mark.pairs, pytest.mark.timeout(90)]

SERVES_AGAIN_MS = 1000
"""So soon after an abort the giver serves again (DESIGN 6), on a machine that is not busy."""

SIDES = ("giver", "receiver")


@dataclass(frozen=True)
class Duo:
    """The pair as a test finds it, and the move that it can make."""

    copies: Copies
    giver: str
    receiver: str
    command: str
    since_ms: int

    def node_of(self, side: str) -> str:
        return self.giver if side == "giver" else self.receiver

    def name_of(self, side: str) -> str:
        """What a node calls itself."""
        return str(self.status(self.node_of(side))["node"])

    def status(self, node: str) -> dict[str, Any]:
        return dict(self.copies.lab.node(node).status())

    def wait_lets_pass(self) -> None:
        """Waits until all guards let the move pass."""
        socket = self.copies.lab.node(self.giver).path("/run/nfsha/nfsha.sock")
        daemon, to = ControlClient(socket, timeout_s=10), {"to": ROLES[self.receiver]}
        self.copies.wait(lambda: daemon.call("handover-plan", to)["ok"], "table in order")

    def move(self, watched: str) -> Moving:
        """Asks for the move, and watches it, on the node of this side."""
        return Moving(self.copies, self.node_of(watched), self.command)

    @contextmanager
    def in_presync(self, watched: str) -> Iterator[Moving]:
        """A move that cannot come near: the giver's rsync daemon does not answer."""
        with hanging(self.copies, self.giver):
            moving = self.move(watched)
            self.copies.wait_phase(self.receiver, "PRESYNC", since_ms=self.since_ms)
            self.copies.wait(lambda: self.step() == "PRESYNC", "a giver that knows of it")
            yield moving
        moving.join(MOVE_S)

    def step(self) -> object:
        return self.status(self.giver)["handover"]["step"]

    def restart(self, node: str) -> None:
        """As systemd does it: SIGTERM, and once that has ended a new one."""
        assert self.copies.daemon(node).stop(30) == 0
        self.copies.start(node)

    def moves(self, side: str) -> list[tuple[str, str]]:
        """The changes of phase of a node since the test began."""
        return self.copies.moves(self.node_of(side), self.since_ms)

    def assert_reported(self, why: str) -> None:
        """Both nodes keep the same report, which says so; and the event log of each does."""
        for node in (self.giver, self.receiver):
            self.copies.wait_event(
                node,
                lambda event: event.row == "report" and why in event.why,
                "line of the report",
                since_ms=self.since_ms,
                within_s=5,
            )
        self.copies.wait(lambda: self.report("giver") == self.report("receiver"), "same report")
        assert self.report("giver")["why"] == why

    def report(self, side: str) -> dict[str, Any]:
        """The newest report that a node keeps."""
        told = self.copies.lab.node(self.node_of(side)).nfsha("events", "--reports", "--json")
        return dict(json.loads(told.stdout)["reports"][-1])

    def assert_never_two(self) -> None:
        """Since the test began."""
        self.copies.assert_never_two(since_ns=self.since_ms * 1_000_000)


@pytest.fixture(scope="module")
def pair(make_module_lab: Callable[..., Lab]) -> Copies:
    copies = Copies(make_module_lab(), sync=SYNC, env={"NFSHA_STOP_REASON": "restart"})
    copies.settle_whole()
    return copies


@pytest.fixture
def duo(pair: Copies) -> Duo:
    def settled() -> bool:
        return {pair.phase("a"), pair.phase("b")} == {"ACTIVE", "PASSIVE"}

    pair.wait(settled, "settled pair")
    giver, receiver = ("a", "b") if pair.phase("a") == "ACTIVE" else ("b", "a")
    command = "failback" if receiver == "a" else "switchover"
    found = Duo(pair, giver, receiver, command, pair.now_ms())
    found.wait_lets_pass()
    return found


# ------------------------------------------------------------------ an operator


@pytest.mark.parametrize("watched", SIDES)
def test_an_abort_on_the_giver_is_told_as_an_operators(duo: Duo, watched: str) -> None:
    with duo.in_presync(watched) as moving:
        duo.copies.lab.node(duo.giver).nfsha("abort")
    why = f"an operator (uid 0) aborted it on {duo.name_of('giver')}"
    assert moving.code == 4, moving.told
    assert why in " ".join(moving.told.split())
    duo.assert_reported(why)
    assert duo.status(duo.receiver)["handover"]["last"]["why"] == why


# ------------------------------------------------------------------ a restart, before clients wait


@pytest.mark.parametrize(
    ("restarted", "watched"), [("giver", "giver"), ("receiver", "receiver"), ("giver", "receiver")]
)
def test_restarted_before_the_freeze_it_ends_and_says_so(
    duo: Duo, restarted: str, watched: str
) -> None:
    prober = duo.copies.lab.probe()
    prober.wait_success()
    began_ns = duo.copies.lab.now_ns()
    why = (
        f"nfsha was restarted on {duo.name_of(restarted)}; nothing has moved: repeat the command "
        "when nfsha is back there"
    )
    with duo.in_presync(watched) as moving:
        duo.restart(duo.node_of(restarted))
    assert moving.code == 4, moving.told
    assert f"the {ROLES[duo.giver]} serves: {why}" in " ".join(moving.told.split())
    assert ("does not answer; waits for its return" in moving.told) == (restarted == watched)
    duo.assert_reported(why)
    assert prober.stop().outage_ms(began_ns) < BUSY_MS  # nobody was held
    own = [("STARTING", "ACTIVE")] if restarted == "giver" else []
    assert duo.moves("giver") == own
    duo.assert_never_two()


# ------------------------------------------------------------------ a restart, while clients wait


@pytest.mark.parametrize("restarted", SIDES)
def test_restarted_in_the_freeze_the_move_is_made_first(duo: Duo, restarted: str) -> None:
    node = duo.node_of(restarted)
    moving = duo.move(restarted)
    with source_that_hangs(duo.copies, duo.giver):
        duo.copies.wait_phase(duo.receiver, "FINAL_SYNC", since_ms=duo.since_ms)
        duo.copies.daemon(node).signal(signal.SIGTERM)
        waits = "waits for the handover that is under way before it restarts"
        duo.copies.wait(lambda: waits in duo.copies.log(node), "a restart that waits")
        released_ms = duo.copies.now_ms()
    served = duo.copies.wait_phase(duo.receiver, "ACTIVE", since_ms=released_ms)
    assert duo.copies.daemon(node).wait(20) == 0
    duo.copies.start(node)
    moving.join(MOVE_S)
    assert moving.code == 0, moving.told
    back = duo.copies.wait_phase(node, _BACK[restarted], since_ms=served.at_ms + 1)
    assert back.at_ms > served.at_ms
    report = duo.report(restarted)
    assert (report["done"], report["whole"]) == (True, True)
    duo.assert_never_two()


_BACK = {"giver": "PASSIVE", "receiver": "ACTIVE"}


def test_restarted_in_a_freeze_that_comes_to_nothing_it_serves_before_it_goes(duo: Duo) -> None:
    why = f"an operator (uid 0) aborted it on {duo.name_of('receiver')}"
    moving = duo.move("giver")
    with source_that_hangs(duo.copies, duo.giver):
        duo.copies.wait_phase(duo.receiver, "FINAL_SYNC", since_ms=duo.since_ms)
        daemon = duo.copies.daemon(duo.giver)
        daemon.signal(signal.SIGTERM)
        duo.copies.wait(lambda: "before it restarts" in duo.copies.log(duo.giver), "a stop")
        aborted_ms = duo.copies.now_ms()
        duo.copies.lab.node(duo.receiver).nfsha("abort")
        served = duo.copies.wait_phase(duo.giver, "ACTIVE", since_ms=aborted_ms, within_s=5)
    assert served.row != "S20"  # by the daemon that held the clients
    assert served.at_ms - aborted_ms < 2 * SERVES_AGAIN_MS
    assert daemon.wait(20) == 0
    duo.copies.start(duo.giver)
    moving.join(MOVE_S)
    assert moving.code == 4, moving.told
    assert why in " ".join(moving.told.split())
    duo.assert_reported(why)
    assert ("STARTING", "ACTIVE") in duo.moves("giver")  # the address stayed
    duo.assert_never_two()


def test_a_final_stop_of_the_receiver_ends_it_and_says_so(duo: Duo) -> None:
    receiver = duo.copies.daemon(duo.receiver)
    why = (
        f"nfsha was stopped on {duo.name_of('receiver')}; nothing has moved: repeat the command "
        "when nfsha is back there"
    )
    receiver.stop()
    duo.copies.lab.node(duo.receiver).start_daemon({"NFSHA_STOP_REASON": "stop"})
    duo.wait_lets_pass()
    with duo.in_presync("giver") as moving:
        assert duo.copies.daemon(duo.receiver).stop() == 0
    assert moving.code == 4, moving.told
    assert why in " ".join(moving.told.split())
    duo.copies.start(duo.receiver)
    duo.assert_reported(why)
    assert duo.moves("giver") == []

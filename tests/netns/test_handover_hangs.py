"""A volume in which each write hangs, around a move of the service: it is named, clients go on.

Frozen filesystems (fsfreeze) stand for dead disks and full thin pools: what writes there is in D
state, and not even SIGKILL ends it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

from tests.netns.copies import SYNC, Copies
from tests.netns.handover_cases import RECEIVER, Action, Boundary
from tests.netns.lab import ROLES, Lab
from tests.netns.labkit.frozen import frozen
from tests.netns.stepping import Stepped
from tests.netns.test_handover_matrix import MakeLab

ANSWERS_WITHIN_S = 5.0
FROZEN_LIMIT_S = 4.0
"""Twice `handover.max_stall` of these pairs."""

LAST_PASS = Boundary(Action(RECEIVER, "Finish: last pass"), "before")
WHERE = ("its last pass has not ended", "a write to it, or the giver's list, does not come")
"""By whether clients wrote between the last pass before the freeze and the freeze."""

CONFIG = SYNC + '[handover]\nmax_stall = "2s"\n'


@contextlib.contextmanager
def asked_all_along(copies: Copies) -> Iterator[None]:
    """Each daemon is asked for its status, again and again, and answers in time."""
    ended, late = threading.Event(), list[str]()

    def ask(name: str) -> None:
        while not ended.wait(0.2):
            began_s = time.monotonic()
            copies.lab.node(name).status()
            if time.monotonic() - began_s > ANSWERS_WITHIN_S:
                late.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ROLES]
    for one in threads:
        one.start()
    try:
        yield
    finally:
        ended.set()
        for one in threads:
            one.join()
    assert not late, f"no status of {late} in time"


def alarms(copies: Copies, node: str) -> dict[str, str]:
    return {one["name"]: one["text"] for one in copies.lab.node(node).status()["alarms"]}


@pytest.mark.timeout(120)
def test_the_service_does_not_move_to_a_node_in_which_a_volume_at_rest_hangs(
    make_lab: MakeLab,
) -> None:
    names = ("data", "idle")
    copies = Copies(make_lab(volumes=names), sync=CONFIG, mounts=[f"/nfs/{n}" for n in names])
    copies.settle_whole(*names)
    writer = copies.lab.write_records(interval_ms=50, cap_s=60)
    writer.wait_acked(5)
    began_ms = copies.now_ms()
    with frozen(copies.here("b", "idle")), asked_all_along(copies):
        done = copies.lab.a.nfsha("switchover", "--yes", check=False)
        assert done.returncode == 4, done.stdout + done.stderr
        assert (
            "volume idle: a write to it has not come back within 10 s: its filesystem"
            in done.stderr
        )
        assert "fsfreeze" in alarms(copies, "b")["volume-hangs idle"]
        assert copies.moves("a", began_ms) == []
        writer.wait_acked(5)
    copies.wait(lambda: not alarms(copies, "b"), "end of the alarm")
    copies.lab.a.nfsha("switchover", "--yes")
    copies.wait_phase("b", "ACTIVE", since_ms=began_ms)
    writer.wait_acked(5)
    assert not [one for one in writer.stop().failed if not one.stale]


@pytest.mark.timeout(120)
def test_a_volume_that_hangs_in_the_last_pass_is_named_and_the_giver_serves_again(
    lab: Lab,
) -> None:
    with Stepped(lab) as pair, pair.judged("a volume that hangs in the last pass"):
        receiver, giver = pair.receiver, pair.giver
        with pair.stopped_at(LAST_PASS) as go_on, frozen(pair.here(receiver)):
            began_ms = pair.now_ms()
            go_on()
            back = pair.wait_phase(giver, "ACTIVE", since_ms=began_ms, within_s=10)
            assert back.at_ms - began_ms <= (FROZEN_LIMIT_S + 1) * 1000
            pair.writer.wait_acked(3)
            last = pair.status(receiver)["handover"]["last"]
            assert last["why"] in [
                f"not proved within 3.8 s of freeze: volume data: {w}" for w in WHERE
            ]
        pair.wait_at_rest()
        assert pair.giver == giver


@pytest.mark.timeout(120)
def test_a_volume_that_hangs_on_the_node_that_took_over_holds_up_no_other(
    make_lab: MakeLab,
) -> None:
    names = ("data", "idle")
    copies = Copies(make_lab(volumes=names), mounts=[f"/nfs/{name}" for name in names])
    copies.settle_whole(*names)
    with frozen(copies.here("b", "idle")):
        died_ms = copies.now_ms()
        copies.lab.power_cut("a")
        copies.wait_phase("b", "ACTIVE", since_ms=died_ms)
        wanted = "/nfs/idle: what nfsha writes there hangs: it has hung for "
        told = lambda: wanted in alarms(copies, "b").get("not-offered idle", "")  # noqa: E731
        copies.wait(told, "word of the volume that hangs")
        (copies.here("b") / "of-b").write_text("written after the takeover")
        copies.lab.boot("a")
        copies.start("a")
        copies.wait(lambda: "of-b" in copies.names("a"), "the copy of the other volume")
    copies.wait_phase("a", "PASSIVE", since_ms=died_ms, within_s=20)
    assert not [name for name in alarms(copies, "b") if "idle" in name]

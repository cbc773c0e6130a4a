"""Volumes that hooks mount: never served unmounted, given up after every release, tried again."""

from __future__ import annotations

import pytest

from nfsha.core import model, volumes
from nfsha.core.describe import alarms_of, explain, situation
from nfsha.core.engine import begin, decide
from nfsha.core.model import (
    CommandKind,
    CoreConfig,
    Journal,
    Phase,
    Role,
    VolumesMounted,
    VolumesUnmounted,
)
from nfsha.core.state import Flight
from nfsha.core.table import HOOK, ROWS
from tests.unit.situations import EPOCH, START_MS, Node, Pair

TIMEOUT_MS = 5000
Hook = model.MountVolumes | model.UnmountVolumes


class HookedNode(Node):
    """A node whose hooks wait for the test, or do at once what `replies` says."""

    def __init__(
        self, role: Role, journal: Journal | None, hook_timeout_ms: int = TIMEOUT_MS
    ) -> None:
        config = CoreConfig(role, boot_id="boot", hook_timeout_ms=hook_timeout_ms)
        super().__init__(config, journal)
        self.hooks: list[str] = []
        self.order: list[str] = []
        """Every action but heartbeats and questions, by name."""
        self.slow = False
        self.slow_address = False
        self.mount_fails = ""
        self.unmount_fails = ""

    def _result(self, action: model.Action, now_ms: int) -> model.Result | None:
        self.order.append(type(action).__name__)
        if isinstance(action, model.RemoveAddress) and self.slow_address:
            return None
        if not isinstance(action, Hook):
            return super()._result(action, now_ms)
        self.hooks.append("mount" if isinstance(action, model.MountVolumes) else "unmount")
        return None if self.slow else self.answer()

    def answer(self) -> model.Result:
        if self.hooks[-1] == "mount":
            return VolumesMounted(ok=not self.mount_fails, detail=self.mount_fails)
        return VolumesUnmounted(ok=not self.unmount_fails, detail=self.unmount_fails)

    def end_hook(self) -> None:
        """The hook in flight ends."""
        number = self.state.flights["volumes"].number
        self.inbox.append(model.Completed(number, self.answer()))


class HookedPair(Pair):
    """Two of them."""

    primary: HookedNode
    standby: HookedNode

    def __init__(self, primary: Journal | None = None, standby: Journal | None = None) -> None:
        super().__init__()
        self.primary = HookedNode(Role.PRIMARY, primary)
        self.standby = HookedNode(Role.STANDBY, standby)


def booted() -> HookedPair:
    return HookedPair(Journal(EPOCH), Journal(EPOCH))


def settled() -> HookedPair:
    pair = booted()
    pair.run(4000)
    assert phase_of(pair.primary) is Phase.ACTIVE
    assert phase_of(pair.standby) is Phase.PASSIVE
    return pair


def phase_of(node: Node) -> Phase:
    return node.state.phase


def exited(node: Node) -> bool:
    return node.state.exited


def before(node: HookedNode, first: str, second: str) -> bool:
    return node.order.index(first) < node.order.index(second)


# --------------------------------------------------------------------------- the ways to serve


def test_what_a_former_run_left_is_given_up_at_the_start_and_mounted_before_the_service() -> None:
    pair = settled()
    assert pair.primary.hooks == ["unmount", "mount"]
    assert before(pair.primary, "RemoveAddress", "UnmountVolumes")
    assert before(pair.primary, "MountVolumes", "AddAddress")
    assert pair.standby.hooks == ["unmount"]
    assert pair.primary.state.volumes_mounted is True
    assert pair.standby.state.volumes_mounted is False


def test_nothing_is_served_while_the_mount_hook_runs() -> None:
    pair = booted()
    pair.primary.slow = True
    pair.run(1000)
    assert pair.primary.hooks == ["unmount"]
    assert pair.primary.state.row == "W87"
    pair.primary.end_hook()
    pair.run(1000)
    assert pair.primary.hooks == ["unmount", "mount"]
    assert phase_of(pair.primary) is Phase.WAITING
    assert "AddAddress" not in pair.primary.order
    pair.primary.end_hook()
    pair.run(50)
    assert phase_of(pair.primary) is Phase.ACTIVE


def test_a_takeover_mounts_after_the_proof_and_before_its_new_epoch() -> None:
    pair = settled()
    pair.primary.on = False
    pair.standby.slow = True
    pair.run(3000)
    state = pair.standby.state
    assert phase_of(pair.standby) is Phase.TAKEOVER
    assert state.row == "T93"
    assert state.want.epoch == EPOCH, "no epoch is spent before the volumes are mounted"
    pair.standby.end_hook()
    pair.run(200)
    assert phase_of(pair.standby) is Phase.ACTIVE
    assert pair.standby.hooks == ["unmount", "mount"]


def test_the_mount_waits_for_the_proof() -> None:
    pair = settled()
    pair.primary.on = False
    pair.standby.witness = False
    pair.run(5000)
    assert phase_of(pair.standby) is Phase.TAKEOVER
    assert pair.standby.hooks == ["unmount"]


def test_activate_mounts_too() -> None:
    pair = booted()
    pair.standby.on = False
    pair.run(8000)
    assert pair.primary.hooks == ["unmount"]
    assert pair.ask(pair.primary, CommandKind.ACTIVATE).accepted
    pair.run(1000)
    assert phase_of(pair.primary) is Phase.ACTIVE
    assert pair.primary.hooks == ["unmount", "mount"]


def test_a_node_back_from_isolation_mounts_again() -> None:
    pair = settled()
    pair.linked = False
    pair.primary.witness = pair.standby.witness = False
    pair.run(1500)
    assert phase_of(pair.primary) is Phase.ISOLATED
    assert pair.primary.hooks[2:] == ["unmount"]
    pair.linked = True
    pair.run(1000)
    assert phase_of(pair.primary) is Phase.ACTIVE
    assert pair.primary.hooks[2:] == ["unmount", "mount"]


def test_a_restart_keeps_what_is_mounted() -> None:
    config = CoreConfig(Role.PRIMARY, "boot", hook_timeout_ms=TIMEOUT_MS)
    journal = Journal(EPOCH, active=True, boot_id="boot")
    state = begin(config, 7, START_MS, journal=journal, address_held=True)
    assert state.adopted
    assert state.volumes_mounted is True
    actions = decide(state, [], START_MS + 10).actions
    assert not any(isinstance(one.action, Hook) for one in actions)
    pair = settled()
    pair.ask(pair.primary, CommandKind.RESTART)
    pair.run(1500)
    assert pair.primary.state.exited
    assert pair.primary.hooks == ["unmount", "mount"]


# --------------------------------------------------------------------------- the ways out


def test_the_volumes_are_given_up_only_once_the_address_is_gone() -> None:
    pair = settled()
    pair.primary.order.clear()
    pair.primary.inbox.append(model.FitChanged(ok=False, reason="nfs: refused"))
    pair.run(100)
    assert phase_of(pair.primary) is Phase.FAULT
    assert before(pair.primary, "CloseService", "RemoveAddress")
    assert before(pair.primary, "RemoveAddress", "UnmountVolumes")


def test_an_address_that_is_slow_to_go_keeps_the_volumes_mounted() -> None:
    pair = settled()
    pair.primary.slow_address = True
    pair.primary.inbox.append(model.FitChanged(ok=False, reason="nfs: refused"))
    pair.run(1000)
    assert phase_of(pair.primary) is Phase.FAULT
    assert pair.primary.hooks == ["unmount", "mount"]
    number = pair.primary.state.flights["address"].number
    pair.primary.inbox.append(model.Completed(number, model.AddressChanged(held=False)))
    pair.run(50)
    assert pair.primary.hooks == ["unmount", "mount", "unmount"]


def test_a_stop_waits_for_the_unmount_hook() -> None:
    pair = settled()
    pair.primary.slow = True
    pair.ask(pair.primary, CommandKind.STOP)
    pair.run(4000)
    assert pair.primary.hooks[2:] == ["unmount"]
    assert not exited(pair.primary)
    pair.primary.end_hook()
    pair.run(100)
    assert exited(pair.primary)


def test_a_stop_ends_without_an_unmount_hook_that_never_does() -> None:
    pair = settled()
    pair.primary.unmount_fails = "busy"
    pair.ask(pair.primary, CommandKind.STOP)
    pair.run(TIMEOUT_MS)
    assert not exited(pair.primary)
    pair.run(1200)
    assert exited(pair.primary)
    assert pair.primary.hooks.count("unmount") > 2, "it is tried again within that time"


def test_a_failing_unmount_is_an_alarm_and_is_tried_again_ever_more_slowly() -> None:
    pair = settled()
    pair.primary.unmount_fails = "unmount hook: /etc/nfsha/unmount: exit status 32: busy"
    pair.primary.inbox.append(model.FitChanged(ok=False, reason="nfs: refused"))
    pair.run(10_000)
    state = pair.primary.state
    assert not state.address_held
    assert 4 <= pair.primary.hooks.count("unmount") - 1 <= 6
    assert alarms_of(state, pair.now_ms)["unmount-failed"] == pair.primary.unmount_fails
    pair.primary.unmount_fails = ""
    pair.run(volumes.RETRY_MOST_MS)
    assert pair.primary.state.volumes_mounted is False
    assert "unmount-failed" not in alarms_of(pair.primary.state, pair.now_ms)


def test_a_takeover_that_is_given_up_cuts_the_mount_short() -> None:
    pair = settled()
    pair.primary.on = False
    pair.standby.slow = True
    pair.run(3000)
    assert pair.standby.state.mounting
    older = pair.standby.state.flights["volumes"].number
    pair.standby.answered_by = "02:00:00:00:00:01"
    pair.run(500)
    assert phase_of(pair.standby) is Phase.PASSIVE
    assert pair.standby.hooks == ["unmount", "mount", "unmount"]
    pair.standby.inbox.append(model.Completed(older, VolumesMounted(ok=True)))
    pair.run(50)
    assert pair.standby.state.volumes_mounted is None, "the older hook's word is stale"


def test_a_missing_answer_about_the_address_does_not_cut_a_mount_short() -> None:
    pair = settled()
    pair.primary.on = False
    pair.standby.slow = True
    pair.run(3000)
    pair.now_ms += 500  # a late turn: silence counts anew
    pair.run(300)
    assert phase_of(pair.standby) is Phase.TAKEOVER
    assert pair.standby.state.mounting
    pair.standby.end_hook()
    pair.run(100)
    assert phase_of(pair.standby) is Phase.TAKEOVER, "all conditions hold once more first"
    pair.run(1500)
    assert phase_of(pair.standby) is Phase.ACTIVE
    assert pair.standby.hooks == ["unmount", "mount"]


def test_a_mount_may_take_as_long_as_the_configuration_says() -> None:
    pair = booted()
    pair.standby = HookedNode(Role.STANDBY, Journal(EPOCH), hook_timeout_ms=90_000)
    pair.run(4000)
    pair.primary.on = False
    pair.standby.slow = True
    pair.run(75_000)
    assert phase_of(pair.standby) is Phase.TAKEOVER
    assert pair.standby.state.mounting
    pair.standby.end_hook()
    pair.run(500)
    assert phase_of(pair.standby) is Phase.ACTIVE
    assert pair.standby.hooks == ["unmount", "mount"]


# --------------------------------------------------------------------------- failures


def test_a_failing_mount_serves_nothing_is_told_and_is_tried_again() -> None:
    pair = settled()
    pair.standby.mount_fails = "mount hook: /etc/nfsha/mount: exit status 1: held by the peer"
    pair.primary.on = False
    pair.run(5000)
    state = pair.standby.state
    assert phase_of(pair.standby) is Phase.TAKEOVER
    assert "AddAddress" not in pair.standby.order
    assert alarms_of(state, pair.now_ms)["mount-failed"] == pair.standby.mount_fails
    tries = pair.standby.hooks.count("mount")
    assert 2 <= tries <= 4
    pair.standby.mount_fails = ""
    pair.run(5000)
    assert phase_of(pair.standby) is Phase.ACTIVE
    assert "mount-failed" not in alarms_of(pair.standby.state, pair.now_ms)


def test_a_takeover_whose_mount_never_works_leaves_the_epoch_to_the_other_node() -> None:
    pair = settled()
    pair.standby.mount_fails = "no"
    pair.primary.on = False
    pair.run(60_000)
    tries = pair.standby.hooks.count("mount")
    pair.run(5000)
    assert pair.standby.hooks.count("mount") >= tries + 3, "a new takeover begins to try anew"
    assert pair.standby.state.epoch == EPOCH
    pair.primary = HookedNode(Role.PRIMARY, Journal(EPOCH))
    pair.primary.engine.state.session = 99
    pair.primary.engine.state.last_turn_ms = pair.now_ms
    pair.run(12_000)
    assert phase_of(pair.primary) is Phase.ACTIVE
    assert phase_of(pair.standby) is Phase.PASSIVE


@pytest.mark.parametrize("failing", ["mount", "unmount"])
def test_a_hook_that_gives_no_answer_has_failed(failing: str) -> None:
    pair = settled()
    node = pair.standby if failing == "mount" else pair.primary
    node.slow = True
    if failing == "mount":
        pair.primary.on = False
    else:
        pair.primary.inbox.append(model.FitChanged(ok=False, reason="nfs: refused"))
    pair.run(TIMEOUT_MS + 25_000)
    assert f"{failing}-failed" in alarms_of(node.state, pair.now_ms)
    assert node.hooks[-1] == failing


def test_an_authority_that_cannot_mount_cleans_up_between_slow_tries() -> None:
    pair = booted()
    pair.primary.mount_fails = "no"
    pair.standby.inbox = [model.FitChanged(ok=False)]  # it would take over
    pair.run(30_000)
    assert phase_of(pair.primary) is Phase.WAITING
    assert pair.primary.hooks[:3] == ["unmount", "mount", "mount"]
    assert pair.primary.hooks[-2:] in (["unmount", "mount"], ["mount", "unmount"])


# --------------------------------------------------------------------------- what is told


def test_the_end_of_each_hook_is_an_event_with_what_it_said() -> None:
    pair = settled()
    state = pair.primary.state.copy()
    state.phase = Phase.WAITING
    state.flights["volumes"] = Flight(4711, pair.now_ms + TIMEOUT_MS)
    failed = VolumesMounted(ok=False, detail="mount hook: exit status 1: no such device")
    decision = decide(state, [model.Completed(4711, failed)], pair.now_ms + 10)
    told = [fired for fired in decision.fired if fired.row == "H50"]
    assert len(told) == 1
    assert "no such device" in told[0].detail
    assert told[0].phase is told[0].to is Phase.WAITING


def test_hook_rows_are_explained_and_shown() -> None:
    ids = [row.id for row in ROWS if row.event == HOOK]
    assert ids == ["H10", "H20", "H50", "H52"]
    assert "the end of a hook" in explain("H50")
    pair = settled()
    assert situation(pair.primary.state, pair.now_ms)["volumes"] == {"mounted": True, "hook": None}
    plain = Pair(Journal(EPOCH), Journal(EPOCH)).run(100)
    assert situation(plain.primary.state, plain.now_ms)["volumes"] is None


def test_without_hooks_nothing_is_ordered() -> None:
    pair = Pair(Journal(EPOCH), Journal(EPOCH)).run(4000)
    assert phase_of(pair.primary) is Phase.ACTIVE
    assert pair.primary.state.volumes_mounted is None
    assert "volumes" not in pair.primary.state.flights

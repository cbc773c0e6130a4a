"""The handover's traces (3 to 7), and the further schedules of the planned move, with exact times.

As `scenarios`: one function for each, played on the production engines; the docstring tells the
schedule. A is the primary and gives, B receives. Kinds of failure: those of `scenarios`, and "I6",
"I7" of the checks that look on all the time.
"""

from __future__ import annotations

from collections.abc import Callable

from nfsha.core.model import CommandKind, Datagram, Epoch, Exclusivity, Phase, Role
from tests.sim.node import Node
from tests.sim.scenarios import (
    LOST,
    MS_US,
    SEED,
    STAYS_DOWN,
    STEP_US,
    TWO_HOLDERS,
    Scenario,
    TraceChecks,
    TraceWorld,
    epoch_of,
    expect,
)
from tests.sim.world import SECOND_US, WorldConfig

NOT_DURABLE = "I6"
NOT_ALL = "I7"

WITNESS = WorldConfig(Exclusivity.WITNESS, replication=True)
TOKEN = WorldConfig(Exclusivity.TOKEN, replication=True)

BACK_WITHIN_S = 1.0
"""After an abort the giver serves again within this time."""
TAKEN_WITHIN_S = 4.0
"""Silence, survey, token, and a second for the disk: then a takeover is done."""


class HandoverChecks(TraceChecks):
    """As the others; and it remembers which handovers were shown as aborted."""

    def __init__(self, world: HandoverWorld, only: str | None) -> None:
        super().__init__(world, only)
        self.aborted: set[Epoch] = set()

    def shown(self, node: Node, datagram: Datagram) -> None:
        """What a node says is ABORTED may never be COMMITTED."""
        super().shown(node, datagram)
        if datagram.aborted is not None:
            self.aborted.add(datagram.aborted)


class HandoverWorld(TraceWorld):
    """A settled pair, and the steps of a handover from A to B."""

    def __init__(self, only: str | None, settings: WorldConfig = WITNESS, seed: int = SEED) -> None:
        super().__init__(settings, only, seed)
        self.told = HandoverChecks(self, only)
        self.checks = self.told
        for node in self.nodes.values():
            node.volumes.freeze_takes_us = 100 * MS_US
            node.volumes.finish_takes_us = 300 * MS_US
        self.a.power_on(100 * MS_US)
        self.b.power_on(100 * MS_US)
        self.wait(10, self._is_a_copy, "B is a copy, and A serves")

    def _is_a_copy(self) -> bool:
        passive = self.b.phase() is Phase.PASSIVE
        return self.a.accepts() and passive and self.b.volumes.stamp == epoch_of(self.a)

    def begin(self, on: Node | None = None) -> None:
        """The operator moves the service to B; asked for there unless said otherwise."""
        self.disturb()
        (on or self.b).command(CommandKind.HANDOVER, to=Role.STANDBY)

    def abort(self, on: Node) -> None:
        """The operator thinks again."""
        self.disturb()
        on.command(CommandKind.ABORT)

    def come_to(self, step: str) -> None:
        """Begins, and runs up to a step of `STEPS`."""
        self.begin()
        self.wait(15, lambda: STEPS[step](self), f"the handover comes to {step}")

    def serves_all(self, node: Node, seconds: float, why: str) -> None:
        """The node serves in time (else "S"), and has every acknowledged write (else "L")."""
        self.serves_within(node, seconds, why)
        self.nothing_lost()

    def nothing_lost(self) -> None:
        """Raises "L" when who serves lacks a write that was acknowledged."""
        for node in self.nodes.values():
            missing = set(range(1, self.written + 1)) - node.volumes.holds
            if node.accepts() and missing:
                self.checks.fail(LOST, f"{node.role} serves without {sorted(missing)[:5]}")

    def one_authority(self, seconds: float = 25) -> None:
        """Healed: one node serves, the other is a copy of it, and none was ever both."""
        self.heal()
        for node in self.nodes.values():
            node.disk.failing = False
            node.disk.slow_us = 0
            node.go_on()
            if not node.powered:
                node.power_on(100 * MS_US)
            elif node.engine is None:
                node.start_daemon()
        end_us = self.now_us + int(seconds * SECOND_US)
        while not self._at_rest():
            if self.now_us >= end_us:
                phases = [f"{node.role} {node.phase()}" for node in self.nodes.values()]
                self.checks.fail(STAYS_DOWN, f"not at rest {seconds} s after all is well: {phases}")
                return
            self.run_until(self.now_us + STEP_US)
        for epoch in self.told.aborted:
            if any(epoch_of(node) == epoch for node in self.nodes.values()):
                self.checks.fail("I7", f"{epoch} was shown as aborted, and is committed")
            if any(write.epoch == epoch.id for write in self.writes):
                self.checks.fail("I7", f"{epoch} was shown as aborted, and was served")

    def _at_rest(self) -> bool:
        a, b = self.a, self.b
        if not (a.accepts() or b.accepts()) or not (a.disk.journal and b.disk.journal):
            return False
        phases = {a.phase(), b.phase()}
        return phases == {Phase.ACTIVE, Phase.PASSIVE} and epoch_of(a) == epoch_of(b)


def _prepared(world: HandoverWorld) -> bool:
    journal = world.a.disk.journal
    durable = journal is not None and journal.prepared is not None
    return world.a.phase() is Phase.PREPARED and not durable


def _commit_ordered(world: HandoverWorld) -> bool:
    engine = world.b.engine
    return engine is not None and engine.state.commit_ordered


STEPS: dict[str, Callable[[HandoverWorld], bool]] = {
    "PRESYNC": lambda world: world.b.phase() is Phase.PRESYNC,
    "FREEZING": lambda world: world.a.phase() is Phase.FREEZING,
    "PREPARED, not on the disk": _prepared,
    "FINAL_SYNC": lambda world: world.b.phase() is Phase.FINAL_SYNC,
    "RESTORING": lambda world: world.b.phase() is Phase.RESTORING and not _commit_ordered(world),
    "COMMITTED, not on the disk": lambda world: (
        _commit_ordered(world) and epoch_of(world.b).authority is Role.PRIMARY
    ),
    "COMMITTED": lambda world: (
        world.b.phase() is Phase.RESTORING and epoch_of(world.b).authority is Role.STANDBY
    ),
    "done": lambda world: world.b.accepts(),
}
"""The steps at which a schedule stops a handover, in their order."""

BEFORE_COMMIT = tuple(STEPS)[:5]
PROVED = ("RESTORING", "COMMITTED, not on the disk", "COMMITTED", "done")


def stretched(only: str | None, settings: WorldConfig = WITNESS, seed: int = SEED) -> HandoverWorld:
    """A world in which each step lasts long enough to be struck."""
    world = HandoverWorld(only, settings, seed)
    world.a.disk.slow_us = 40 * MS_US
    world.b.disk.slow_us = 40 * MS_US
    world.b.volumes.kill_takes_us = 30 * MS_US
    world.b.turn_delay_us = 3 * MS_US
    return world


# --------------------------------------------------------------------------- the traces


def trace_3(only: str | None) -> None:
    """L: a giver that forgot serves on, while the receiver commits.

    A is PREPARED for epoch 2, and its daemon is killed while B proves (1.2 s); it starts again
    200 ms later. B's datagrams still say "you are the authority at epoch 1". A must not serve: B
    commits (its disk takes 1 s), and would drop what A accepted.
    """
    world = HandoverWorld(only)
    world.b.volumes.finish_takes_us = 1_200 * MS_US
    world.come_to("FINAL_SYNC")
    world.run_for(0.1)
    world.a.crash()
    world.b.disk.slow_us = 1_000 * MS_US
    world.run_for(0.2)
    world.a.start_daemon()
    world.wait(5, lambda: epoch_of(world.b).number > 1, "B commits")
    world.b.disk.slow_us = 0
    world.run_for(1)
    world.serves_all(world.b, 3, "B committed")


def trace_4(only: str | None) -> None:
    """L: "a timeout, so the giver serves on" races COMMITTED.

    B proves at once; its disk takes 1.5 s for COMMITTED, and all that time A waits in PREPARED and
    hears nothing new.
    """
    world = HandoverWorld(only)
    world.come_to("FINAL_SYNC")
    world.b.disk.slow_us = 1_500 * MS_US
    world.wait(3, lambda: _commit_ordered(world), "COMMITTED is ordered")
    world.wait(3, lambda: epoch_of(world.b).number > 1, "B commits")
    world.b.disk.slow_us = 0
    world.run_for(1)
    world.serves_all(world.b, 3, "B committed")


def trace_5(only: str | None) -> None:
    """D: the receiver commits and stands still, and the giver takes over.

    Token. First act: COMMITTED takes 2.5 s, and B is cut off as it is ordered. A takes over after
    1.6 s with epoch 3. When B's epoch 2 is on the disk A's grant is too old: B does not serve, and
    follows once it is heard. Second act: B's daemon stands still for 1.75 s instead. A's epoch
    must lie above B's: two of one number would be two histories.
    """
    world = HandoverWorld(only, TOKEN)
    world.come_to("FINAL_SYNC")
    world.b.disk.slow_us = 2_500 * MS_US
    world.wait(3, lambda: _commit_ordered(world), "COMMITTED is ordered")
    world.cut_off(world.b)
    world.wait(2.4, world.a.accepts, "A takes over")
    world.wait(2, lambda: epoch_of(world.b).number == 2, "B commits")
    world.run_for(1)
    expect(world.b.phase() is Phase.ISOLATED, "B is ISOLATED")
    world.b.disk.slow_us = 0
    world.one_authority()
    world.serves_all(world.a, 0, "A serves epoch 3")
    _stands_still(only)


def _stands_still(only: str | None) -> None:
    world = HandoverWorld(only, TOKEN)
    world.come_to("FINAL_SYNC")
    world.wait(3, lambda: _commit_ordered(world), "COMMITTED is ordered")
    world.b.stop()
    world.run_for(1.75)
    expect(world.a.accepts(), "A has taken over")
    expect(epoch_of(world.b).number == 2, "B has committed")
    world.b.go_on()
    world.run_for(2)
    world.serves_all(world.a, 0, "two nodes have an epoch 2")
    world.one_authority()


def trace_6(only: str | None) -> None:
    """S: the receiver dies, or forgets, and the giver waits for ever.

    First act: B loses power in FINAL_SYNC and stays off. A counts as a whole replica, and takes
    over. Second act: B's daemon is killed in FINAL_SYNC, and starts again at once: it knows of no
    handover, and says so durably.
    """
    world = HandoverWorld(only)
    world.come_to("FINAL_SYNC")
    world.b.power_off()
    world.serves_all(world.a, TAKEN_WITHIN_S, "B is off, A has the data")
    expect(epoch_of(world.a).number == 3, "A's epoch lies above the one given away")
    _forgets(only)


def _forgets(only: str | None) -> None:
    world = HandoverWorld(only)
    world.come_to("FINAL_SYNC")
    world.b.crash()
    world.run_for(0.1)
    world.b.start_daemon()
    world.serves_all(world.a, 2, "B knows of no handover")
    expect(epoch_of(world.a).number == 1, "A took its authority back")


def trace_7(only: str | None) -> None:
    """S: what the receiver would serve with is wrong, and it is found out after COMMITTED.

    B's NFS service breaks in FINAL_SYNC: B ends the handover, and A serves on within a second.
    """
    world = HandoverWorld(only)
    world.come_to("FINAL_SYNC")
    world.b.set_fit(False)
    world.run_for(0.4)
    world.serves_all(world.a, BACK_WITHIN_S, "B's own service is broken")


TRACES: dict[int, Scenario] = {
    3: Scenario(LOST, trace_3),
    4: Scenario(LOST, trace_4),
    5: Scenario(TWO_HOLDERS, trace_5),
    6: Scenario(STAYS_DOWN, trace_6),
    7: Scenario(STAYS_DOWN, trace_7),
}
"""By the number of the trace."""


# --------------------------------------------------------------------------- further schedules


def the_straight_way(only: str | None) -> None:
    """There and back, asked for on either node: clients are held for less than a second."""
    world = HandoverWorld(only)
    for on, to in ((world.b, world.b), (world.b, world.a), (world.b, world.b), (world.a, world.a)):
        at_us = world.now_us
        on.command(CommandKind.HANDOVER, to=to.role)
        world.wait(15, to.accepts, f"{to.role} serves")
        held_us = world.reigns[-1].until_us if world.reigns else at_us
        expect(world.now_us - held_us < SECOND_US, "clients are held for less than a second")
        world.serves_all(to, 0, "it was asked for")
        world.wait(5, lambda: to.role.other in _passive(world), "the giver is passive")  # noqa: B023
        world.run_for(1)


def _passive(world: HandoverWorld) -> list[Role]:
    return [node.role for node in world.nodes.values() if node.phase() is Phase.PASSIVE]


def the_last_pass_comes_first(only: str | None) -> None:
    """I7: what clients wrote after the last pass of PRESYNC is on B before it commits."""
    world = HandoverWorld(only)
    world.come_to("FREEZING")
    expect(bool(world.a.volumes.holds - world.b.volumes.holds), "B lacks the newest writes")
    world.serves_all(world.b, 2, "nothing is in the way")


def clients_are_held_until_the_end(only: str | None) -> None:
    """D: the proof takes 3 s; PREPARED was ordered, so A does not serve meanwhile."""
    world = HandoverWorld(only)
    world.b.volumes.finish_takes_us = 3_000 * MS_US
    world.come_to("FINAL_SYNC")
    world.serves_all(world.b, 4, "the proof is slow, but it comes")


def nothing_is_shown_before_the_disk_has_it(only: str | None) -> None:
    """I6: PREPARED takes A's disk 400 ms, COMMITTED takes B's disk 400 ms."""
    world = HandoverWorld(only)
    world.a.disk.slow_us = world.b.disk.slow_us = 400 * MS_US
    world.come_to("FINAL_SYNC")
    world.serves_all(world.b, 3, "the disks are slow, but they work")


def aborted_at_each_step(only: str | None) -> None:
    """S: the operator ends it at any step before COMMITTED, on either node: A serves again."""
    for step in BEFORE_COMMIT:
        for role in Role:
            world = stretched(only)
            world.come_to(step)
            world.abort(world.nodes[role])
            world.run_for(0.02)
            world.serves_all(world.a, BACK_WITHIN_S, f"aborted in {step} on the {role}")
            world.one_authority()
            expect(epoch_of(world.a).number == 1 and world.a.accepts(), "A is still the authority")
            world.nothing_lost()


def aborted_while_the_freeze_hangs(only: str | None) -> None:
    """S: something on A does not come to rest for a minute; the operator, or the limit, ends it."""
    for by_operator in (True, False):
        world = HandoverWorld(only)
        world.a.volumes.freeze_takes_us = 60_000 * MS_US
        world.come_to("FREEZING")
        world.run_for(0.1)
        if by_operator:
            world.abort(world.b)
        else:
            world.run_for(4.9)
        world.run_for(0.02)
        world.serves_all(world.a, BACK_WITHIN_S, "a freeze that hangs is stopped")
        world.one_authority()


def the_disk_fails_at_the_commit(only: str | None) -> None:
    """I7: COMMITTED cannot be written: ABORTED replaces it, and only one of them is ever true.

    B's disk fails as COMMITTED is ordered: each write reports an error, and is there or not. Acts:
    it recovers after 2.5 s; B's daemon is killed meanwhile and starts again; B loses power.
    """
    for seed in range(SEED, SEED + 8):
        for act in ("recovers", "killed", "power"):
            world = HandoverWorld(only, seed=seed)
            world.come_to("FINAL_SYNC")
            world.b.disk.failing = True
            world.wait(3, lambda: _commit_ordered(world), "COMMITTED is ordered")  # noqa: B023
            world.run_for(0.2)
            if act == "killed":
                world.b.crash()
            elif act == "power":
                world.b.power_off()
            world.run_for(2.3)
            world.nothing_lost()
            world.one_authority()
            world.nothing_lost()


def the_receiver_restarts_at_the_commit(only: str | None) -> None:
    """S: B's daemon is killed while it commits, before its disk had COMMITTED, and after.

    Before: it knows of no handover, and A goes on. After: it is the authority, and serves.
    """
    for durable in (False, True):
        world = HandoverWorld(only)
        world.come_to("FINAL_SYNC")
        world.b.disk.slow_us = 200 * MS_US
        world.wait(3, lambda: _commit_ordered(world), "COMMITTED is ordered")  # noqa: B023
        if durable:
            world.b.disk.complete_silently()
        world.b.disk.forget_results()
        world.b.crash()
        world.b.disk.slow_us = 0
        world.run_for(0.1)
        world.b.start_daemon()
        serving = world.b if durable else world.a
        world.serves_all(serving, 2, "its journal says that it is the authority")
        world.one_authority()


def each_dies_at_each_step(only: str | None) -> None:
    """S, L: either machine loses power at any step, and stays off for 5 s.

    The other one serves. If the receiver died, it has every acknowledged write; if the giver did,
    it has them from the proof on; before it, those of the last pass, as after any crash, and
    nothing is destroyed (I4).
    """
    for settings in (WITNESS, TOKEN):
        for step in STEPS:
            for role in Role:
                world = stretched(only, settings)
                world.come_to(step)
                lost, kept = world.nodes[role], world.nodes[role.other]
                lost.power_off()
                world.serves_within(kept, TAKEN_WITHIN_S, f"the {role} died in {step}")
                proved = step in PROVED if role is Role.PRIMARY else step != "done"
                if proved:
                    world.nothing_lost()
                world.run_for(1)
                world.one_authority()
                expect(kept.accepts(), "the returned node follows")


def the_giver_is_deaf(only: str | None) -> None:
    """S: trace 9 in a handover. Nothing reaches A any more in PREPARED, and B hears it for ever.

    B cannot commit without A's grant, and ends the handover at its time limit. A does not hear
    that. So a peer in PREPARED holds a takeover off for 2 s only.
    """
    world = HandoverWorld(only, TOKEN)
    world.b.volumes.finish_takes_us = 1_500 * MS_US
    world.come_to("FINAL_SYNC")
    world.paths.muted.add(Role.STANDBY)
    world.network.witness_cut.add(Role.PRIMARY)
    world.a.broker().cut.add(Role.PRIMARY)
    world.serves_within(world.b, 27, "A is deaf, and is heard for ever")
    world.one_authority()


def the_givers_disk_is_full(only: str | None) -> None:
    """S: A's disk fails as PREPARED is ordered, and goes on failing: A serves on in a second.

    The receiver's ABORTED is durable; what A's disk holds may wait.
    """
    world = HandoverWorld(only)
    world.come_to("FREEZING")
    world.a.disk.failing = True
    world.wait(1, lambda: world.a.phase() is Phase.PREPARED, "PREPARED is ordered")
    world.serves_all(world.a, BACK_WITHIN_S, "A's disk is full")
    world.run_for(12)
    world.serves_all(world.a, 0, "A's disk is full, and it serves all the same")
    world.one_authority()


def the_giver_takes_back_with_a_slow_disk(only: str | None) -> None:
    """S: aborted, and A's disk takes 5 s for that: A serves at once, B does not take over.

    And A's daemon is killed while its disk still says PREPARED: it asks B again.
    """
    for killed in (False, True):
        world = HandoverWorld(only)
        world.come_to("FINAL_SYNC")
        world.a.disk.slow_us = 5_000 * MS_US
        world.abort(world.b)
        world.run_for(0.02)
        world.serves_all(world.a, BACK_WITHIN_S, "A's disk is slow")
        if killed:
            world.a.disk.forget_results()
            world.a.crash()
            world.run_for(0.3)
            world.a.start_daemon()
            world.run_for(0.01)
        world.serves_all(world.a, 2, "B says that it aborted")
        world.one_authority()
        expect(epoch_of(world.a).number == 1, "nobody took over")


def the_receivers_disk_is_full(only: str | None) -> None:
    """S: B's disk fails for good as COMMITTED is ordered: it can say neither yes nor no.

    A gives it 2 s to tell, stops granting, and takes over with an epoch above.
    """
    world = HandoverWorld(only)
    world.come_to("FINAL_SYNC")
    world.b.disk.failing = True
    world.wait(3, lambda: _commit_ordered(world), "COMMITTED is ordered")
    world.run_for(0.1)
    world.serves_all(world.a, TAKEN_WITHIN_S, "B's disk is full")
    world.one_authority()


def the_giver_was_cut_off(only: str | None) -> None:
    """L: A is cut off in PREPARED; B takes over, serves, and dies; then A's paths are well again.

    A heard nothing of that. It must not take over by silence: its data lacks B's writes. In the
    second act A's daemon stands still instead.
    """
    for settings, paused in ((WITNESS, False), (TOKEN, False), (WITNESS, True)):
        world = HandoverWorld(only, settings)
        world.b.volumes.finish_takes_us = 3_000 * MS_US
        world.come_to("FINAL_SYNC")
        if paused:
            world.a.stop()
            world.run_for(0.3)
        world.cut_off(world.a)
        world.serves_within(world.b, TAKEN_WITHIN_S, "A is cut off")
        world.run_for(3)
        world.b.power_off()
        world.heal()
        world.a.go_on()
        for _ in range(80):
            world.run_for(0.1)
            if world.a.accepts():
                world.checks.fail(LOST, "A serves without what B acknowledged")
        world.one_authority()
        expect(world.b.accepts(), "B has the newer data, and serves")


def the_receiver_was_cut_off(only: str | None) -> None:
    """S: B is cut off in FINAL_SYNC; A takes over, serves, and dies; then B's paths are well again.

    B takes over as after any crash. When A returns its epoch must lie below B's: two of one number
    are two histories, and nobody serves until the operator decides.
    """
    world = HandoverWorld(only)
    world.b.volumes.finish_takes_us = 3_000 * MS_US
    world.come_to("FINAL_SYNC")
    world.cut_off(world.b)
    world.serves_within(world.a, TAKEN_WITHIN_S, "B is cut off")
    world.run_for(3)
    world.a.power_off()
    world.heal()
    world.serves_within(world.b, TAKEN_WITHIN_S, "A is off")
    world.run_for(1)
    world.one_authority()
    expect(world.b.accepts(), "B serves")


def a_thaw_fails_in_the_takeover(only: str | None) -> None:
    """S: B is off, A takes over from PREPARED, and its volumes do not thaw at the first try."""
    world = HandoverWorld(only)
    world.come_to("FINAL_SYNC")
    world.a.volumes.thaws_to_fail = 1
    world.b.power_off()
    world.serves_all(world.a, TAKEN_WITHIN_S, "the second thaw goes well")
    expect(world.a.volumes.thaws_to_fail == 0, "a thaw failed")


def the_giver_is_stopped_in_prepared(only: str | None) -> None:
    """L: systemd stops or restarts A's daemon while B proves: only A has the last writes.

    So it stays until B has them.
    """
    for kind in (CommandKind.STOP, CommandKind.RESTART):
        world = HandoverWorld(only)
        world.b.volumes.finish_takes_us = 1_500 * MS_US
        world.come_to("FINAL_SYNC")
        world.run_for(0.1)
        world.ask(world.a, kind)
        world.serves_all(world.b, TAKEN_WITHIN_S, f"{kind} of the giver")
        world.wait(2, lambda: world.a.life > 2, "A's daemon has left")  # noqa: B023
        world.one_authority()


def it_goes_back_before_the_thaw(only: str | None) -> None:
    """Frozen volumes are not served: A thaws for 3 s, and shall serve again at once.

    B, which gives then, waits until A can.
    """
    world = HandoverWorld(only)
    world.a.volumes.thaw_takes_us = 3_000 * MS_US
    world.come_to("done")
    world.wait(1, lambda: world.a.phase() is Phase.PASSIVE, "A is passive")
    world.b.command(CommandKind.HANDOVER, to=Role.PRIMARY)
    world.serves_all(world.a, 7, "it was asked for")


def a_restart_comes_before_the_freeze(only: str | None) -> None:
    """I8: A announced its absence, and B is just near enough: A does not begin to freeze."""
    world = HandoverWorld(only)
    world.come_to("PRESYNC")
    passes = world.b.volumes.passes
    world.wait(5, lambda: world.b.volumes.passes > passes, "B is near")
    world.disturb()
    world.expect_unbroken(world.a)
    world.a.command(CommandKind.RESTART)
    world.run_for(8)
    expect(world.tally.fired["expected-I8"] > 0, "the restart was looked at")
    world.one_authority()


def the_service_breaks_but_not_the_data(only: str | None) -> None:
    """A's NFS service breaks after writes that B lacks: B fetches them before it serves."""
    world = HandoverWorld(only)
    world.run_for(1)
    expect(bool(world.a.volumes.holds - world.b.volumes.holds), "B lacks the newest writes")
    world.disturb()
    world.a.set_fit(False)
    world.serves_all(world.b, TAKEN_WITHIN_S, "B can fetch them")


def the_data_cannot_be_fetched_any_more(only: str | None) -> None:
    """A's NFS service breaks, and no pass succeeds: B takes over once A has waited its time."""
    world = HandoverWorld(only)
    world.b.volumes.approach_hangs = True
    world.disturb()
    world.a.set_fit(False)
    world.serves_within(world.b, 15, "A gives up after ten seconds")


def the_service_is_mended_at_once(only: str | None) -> None:
    """A's NFS service is back while B still comes near: nothing moves, nobody is held."""
    world = HandoverWorld(only)
    world.b.volumes.approach_hangs = True
    world.disturb()
    world.a.set_fit(False)
    world.run_for(1)
    world.a.set_fit(True)
    world.run_for(1)
    world.b.volumes.approach_hangs = False
    world.run_for(5)
    if not world.a.accepts() or epoch_of(world.a).number != 1:
        world.checks.fail("moved", "A's service was sound again before anything was held")
    world.one_authority()


FURTHER: tuple[Scenario, ...] = (
    Scenario(STAYS_DOWN, the_straight_way),
    Scenario(NOT_ALL, the_last_pass_comes_first),
    Scenario(TWO_HOLDERS, clients_are_held_until_the_end),
    Scenario(NOT_DURABLE, nothing_is_shown_before_the_disk_has_it),
    Scenario(STAYS_DOWN, aborted_at_each_step),
    Scenario(STAYS_DOWN, aborted_while_the_freeze_hangs),
    Scenario(NOT_ALL, the_disk_fails_at_the_commit),
    Scenario(STAYS_DOWN, the_receiver_restarts_at_the_commit),
    Scenario(STAYS_DOWN, each_dies_at_each_step),
    Scenario(STAYS_DOWN, the_giver_is_deaf),
    Scenario(STAYS_DOWN, the_givers_disk_is_full),
    Scenario(STAYS_DOWN, the_giver_takes_back_with_a_slow_disk),
    Scenario(STAYS_DOWN, the_receivers_disk_is_full),
    Scenario(LOST, the_giver_was_cut_off),
    Scenario(STAYS_DOWN, the_receiver_was_cut_off),
    Scenario(STAYS_DOWN, a_thaw_fails_in_the_takeover),
    Scenario(LOST, the_giver_is_stopped_in_prepared),
    Scenario("freeze", it_goes_back_before_the_thaw),
    Scenario("I8", a_restart_comes_before_the_freeze),
    Scenario(LOST, the_service_breaks_but_not_the_data),
    Scenario(STAYS_DOWN, the_data_cannot_be_fetched_any_more),
    Scenario("moved", the_service_is_mended_at_once),
)
"""Beside the traces."""

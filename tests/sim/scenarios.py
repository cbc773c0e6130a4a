"""The traces that broke simpler rules, each played again with exact times.

One function for each trace; its docstring tells the schedule. It plays the production engines and
raises `SimulationError` when what the trace is about happens: "I1" (two holders), "L" (acknowledged
writes are lost) or "S" (the pair stays down). Traces that need a handover are in `handovers`.

Times are virtual seconds. The schedule itself is checked too (`expect`): a scenario whose schedule
did not come about fails with `ScheduleError`, whatever the rules are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from nfsha import config as configuration
from nfsha.core.model import (
    CommandKind,
    Datagram,
    Epoch,
    Exclusivity,
    Phase,
    ReplicaChanged,
    Role,
)
from tests.sim.checks import Checks, SimulationError
from tests.sim.network import LINKS, Network
from tests.sim.node import DriverPause, Node
from tests.sim.world import DEFAULT, SECOND_US, World, WorldConfig

SEED = 20
MS_US = 1_000
STEP_US = 1_000
"""How finely a scenario waits for something to come about."""

TWO_HOLDERS = "I1"
LOST = "L"
STAYS_DOWN = "S"


class ScheduleError(AssertionError):
    """The schedule of the trace did not come about, so that nothing was tried."""


class TraceChecks(Checks):
    """All invariants, or only the one that the trace is about."""

    def __init__(self, world: World, only: str | None) -> None:
        super().__init__(world)
        self._only = only

    def fail(self, invariant: str, what: str) -> None:
        """Ends the simulation, unless a mutant is played and this is not the trace's kind."""
        if self._only in (None, invariant):
            raise SimulationError(invariant, what)


class TraceNetwork(Network):
    """A network on which the heartbeats alone can be silenced: ARP and the third place go on."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.muted: set[Role] = set()
        self.words_left: dict[Role, int] = {}
        """So many datagrams of this sender still pass; then it is muted."""

    def send(self, sender: Role, datagram: Datagram) -> None:
        """Sends on every link what is not silenced."""
        if sender in self.muted:
            return
        super().send(sender, datagram)
        if sender in self.words_left:
            self.words_left[sender] -= 1
            if self.words_left[sender] <= 0:
                del self.words_left[sender]
                self.muted.add(sender)


class TraceWorld(World):
    """A world in which nothing happens by chance: a daemon that ended stays so until started."""

    def __init__(self, settings: WorldConfig, only: str | None, seed: int = SEED) -> None:
        super().__init__(seed, settings)
        self.checks = TraceChecks(self, only)
        self.paths = TraceNetwork(self)
        self.network = self.paths
        for node in self.nodes.values():
            node.volumes.mishaps = False

    def stopped_finally(self, node: Node) -> None:
        """Nobody starts it but the scenario."""

    # ------------------------------------------------------------- steps of a schedule

    def settle(self) -> None:
        """A new pair: the primary serves at epoch 1, the standby is passive."""
        self.a.power_on(100 * MS_US)
        self.b.power_on(100 * MS_US)
        self.run_until(2 * SECOND_US)
        expect(self.a.accepts() and self.a.phase() is Phase.ACTIVE, "the primary serves")
        expect(self.b.phase() is Phase.PASSIVE, "the standby is passive")

    def wait(self, seconds: float, until: Callable[[], bool], what: str) -> None:
        """Runs until something has come about. Raises `ScheduleError` when it does not in time."""
        end_us = self.now_us + int(seconds * SECOND_US)
        while not until():
            expect(self.now_us < end_us, f"within {seconds} s: {what}")
            self.run_until(self.now_us + STEP_US)

    def just_renewed(self, node: Node) -> None:
        """Runs until the address lease is new, so that the kernel holds it as long as it can."""
        full_us = self.config.timings.address_lease_ms * MS_US

        def renewed() -> bool:
            return node.kernel.address_shown_us - node.local_us() > full_us - 5 * MS_US

        self.wait(1, renewed, "the address is renewed")

    def cut_links(self) -> None:
        """No heartbeat and no ARP passes between the nodes, over any link of their own."""
        self.network.cut.add(*((link, role) for link in range(LINKS) for role in Role))

    def cut_off(self, node: Node) -> None:
        """This node reaches nothing any more."""
        self.cut_links()
        self.network.witness_cut.add(node.role)
        if self.broker is not None:
            self.broker.cut.add(node.role)

    def heal(self) -> None:
        """All paths are well."""
        self.network.heal()
        self.paths.muted.clear()
        if self.broker is not None:
            self.broker.cut.clear()

    def serves_within(self, node: Node, seconds: float, why: str) -> None:
        """Raises "S" when the node does not serve in time."""
        end_us = self.now_us + int(seconds * SECOND_US)
        while not node.accepts():
            if self.now_us >= end_us:
                self.checks.fail(STAYS_DOWN, f"nobody serves for {seconds} s: {why}")
                return
            self.run_until(self.now_us + STEP_US)

    def no_epoch_lost(self) -> None:
        """Raises "L" when a write was acknowledged at a lower epoch than one before it."""
        numbers = {
            kept.epoch.id: kept.epoch.number
            for node in self.nodes.values()
            for kept in node.disk.history
            if kept.epoch is not None
        }
        highest = 0
        for write in self.writes:
            number = numbers[write.epoch]
            if number < highest:
                self.checks.fail(
                    LOST, f"{write.role} serves epoch {number}, writes of {highest} are lost"
                )
            highest = max(highest, number)


def expect(condition: bool, what: str) -> None:
    """Raises `ScheduleError` unless the schedule has come so far."""
    if not condition:
        raise ScheduleError(what)


def epoch_of(node: Node) -> Epoch:
    """The epoch on a node's disk."""
    journal = node.disk.journal
    if journal is None or journal.epoch is None:
        raise ScheduleError(f"{node.role} has no epoch")
    return journal.epoch


WITNESS = WorldConfig(Exclusivity.WITNESS)
TOKEN = WorldConfig(Exclusivity.TOKEN)
WITHOUT_LEASE = WorldConfig(
    Exclusivity.WITNESS, dataclasses.replace(DEFAULT, takeover_after_ms=3100), service_lease=False
)


# --------------------------------------------------------------------------- the traces


def trace_1(only: str | None) -> None:
    """D: the kernel of a killed daemon keeps the address.

    Token. At 2 s, just after a renewal of the address, A's daemon is killed and stays away. B's
    grants end 1 s later, and 0.6 s after that it would have held the token for `hold`; A's kernel
    keeps the address for 2.0 to 2.4 s. Two rules protect, each alone: the service lease closes at
    `hold`, and B does not go on while somebody answers for the VIP. The mutant removes both.
    """
    world = TraceWorld(TOKEN, only)
    world.settle()
    world.just_renewed(world.a)
    world.a.crash()
    world.run_for(1.5)
    expect(world.a.kernel.address_held(), "A's kernel still holds the address")
    world.run_for(0.4)
    expect(world.a.kernel.address_held(), "A's kernel holds the address when B may serve")
    world.serves_within(world.b, 2.5, "B must take over when the address is gone")


def trace_2(only: str | None) -> None:
    """D: probes of the VIP are lost while A's kernel still answers.

    Witness. A's daemon is killed just after a renewal of the address. First act: the first probe of
    B is lost, the ones after it would be answered (why there are three). Second act: B's interface
    hears nobody from 0.65 s to 1.05 s after the kill, and three probes are lost (why a survey
    counts only when somebody else was heard). The service lease protects too, so each mutant
    removes it beside its own rule.
    """
    for lost, deaf in ((1, False), (3, True)):
        world = TraceWorld(WITNESS, only)
        world.settle()
        world.just_renewed(world.a)
        world.a.crash()
        world.network.probe_losses = lost
        world.run_for(0.65)
        if deaf:
            world.network.witness_cut.add(Role.STANDBY)
        world.run_for(0.4)
        if deaf:
            world.network.witness_cut.remove(Role.STANDBY)
        expect(world.network.probe_losses == 0, "the probes were lost")
        expect(world.a.kernel.address_held(), "A's kernel still holds the address")
        world.run_for(0.3)
        world.serves_within(world.b, 2.5, "B must take over when the address is gone")


def trace_8(only: str | None) -> None:
    """D: the echo of a taker revives the holder.

    Witness. At 0 s A is cut off from everything; it is ISOLATED at 0.6 s. B's disk is slow (1.5 s):
    in TAKEOVER from 1.0 s, it waits for its new epoch until 2.5 s. From 1.5 s to 2.4 s all paths
    are well, so B's echo reaches A; then A is cut off again, and B serves. Besides "a taker grants
    nothing and its echo is no evidence" A does not return while it hears a peer in TAKEOVER; the
    mutant removes both.
    """
    world = TraceWorld(WITNESS, only)
    world.settle()
    world.b.disk.slow_us = 1_500 * MS_US
    world.cut_off(world.a)
    world.wait(1.5, lambda: world.b.phase() is Phase.TAKEOVER, "B is in TAKEOVER")
    expect(world.a.phase() is Phase.ISOLATED, "A is ISOLATED")
    world.run_for(0.5)
    world.heal()
    world.run_for(0.9)
    expect(world.b.phase() is Phase.TAKEOVER, "B still waits for its disk")
    world.cut_off(world.a)
    world.serves_within(world.b, 0.5, "B must serve when its epoch is on the disk")
    world.run_for(1)
    world.heal()
    world.b.disk.slow_us = 0
    world.run_for(3)
    expect(world.a.phase() is Phase.PASSIVE, "A follows")


def trace_9(only: str | None) -> None:
    """S: a peer that does not serve is heard for ever.

    Witness. First act: nothing of B, and no witness, reaches A: it is ISOLATED, and B hears it for
    ever. Second act: A's own service is broken: FAULT, heard for ever. B must serve within
    `hold` + 2 s + `takeover_after` and a little.
    """
    for broken in (False, True):
        world = TraceWorld(WITNESS, only)
        world.settle()
        if broken:
            world.a.set_fit(False)
        else:
            world.paths.muted.add(Role.STANDBY)
            world.network.witness_cut.add(Role.PRIMARY)
        world.wait(1, lambda: not world.a.accepts(), "A does not serve")  # noqa: B023
        expect(world.a.phase() is (Phase.FAULT if broken else Phase.ISOLATED), "A's phase")
        world.serves_within(world.b, 5, f"A is heard in {world.a.phase()} for ever")


def trace_10(only: str | None) -> None:
    """D: a restarted daemon renews the address that it finds.

    Token. At 2.0 s A's daemon is killed, just after a renewal; A is cut off at 2.5 s, so that the
    probes of B find nobody and do not hide the rule. B serves at 3.6 s. At 3.8 s A's daemon starts
    again, finds the address still there, and must not renew it without evidence.
    """
    world = TraceWorld(TOKEN, only)
    world.settle()
    world.just_renewed(world.a)
    world.a.crash()
    world.run_for(0.5)
    world.cut_off(world.a)
    world.run_for(1.3)
    expect(world.b.accepts(), "B serves")
    expect(world.a.kernel.address_held(), "A's kernel still holds the address")
    world.a.start_daemon()
    world.run_for(0.05)
    expect(world.a.phase() is Phase.STARTING, "A waits with the address that it found")
    world.run_for(2)
    expect(not world.a.kernel.address_held(), "A did not renew it")
    world.heal()
    world.run_for(2)
    expect(world.a.phase() is Phase.PASSIVE and world.b.accepts(), "A follows B")


def trace_11(only: str | None) -> None:
    """D: a thawed node comes back by the gateway's answer, or by a word and without a look.

    Witness. A's daemon is stopped at 2.0 s, and a firewall swallows the heartbeats from then on
    (ARP passes). B serves when the address has gone from A's kernel. A goes on at 6.0 s: its turns
    had a gap, it is ISOLATED, the gateway answers it. First act: nothing more. Second act: the
    operator tells A wrongly that its peer is off; A must see that somebody answers for the VIP.
    """
    for word in (False, True):
        world = TraceWorld(WITNESS, only)
        world.settle()
        world.a.stop()
        world.paths.muted.update(Role)
        world.run_for(4)
        expect(world.b.accepts(), "B serves")
        world.a.go_on()
        world.run_for(1)
        if word:
            expect(world.a.phase() is Phase.ISOLATED, "A is ISOLATED")
            world.ask(world.a, CommandKind.CONFIRM_PEER_DOWN)
        world.run_for(2)
        expect(world.a.phase() is Phase.ISOLATED, "A is still ISOLATED")
        expect(world.b.accepts(), "B still serves")


def trace_12(only: str | None) -> None:
    """L: a standby that wakes takes over from a healthy primary.

    Token. B's daemon is stopped at 3 s for 3 s; A serves on by its token. When B goes on, 3 s of
    A's datagrams wait in its sockets. A takeover from a healthy node loses what was not replicated.

    Four rules protect, and the mutant removes them all: sockets before timers; silence only over
    own consecutive turns; nobody may answer for the VIP; and what is heard of the peer before the
    new epoch is ordered ends the takeover.
    """
    world = TraceWorld(TOKEN, only)
    world.settle()
    world.run_for(1)
    world.b.stop()
    world.run_for(3)
    expect(world.a.accepts() and world.a.phase() is Phase.ACTIVE, "A serves by its token")
    world.b.go_on()
    world.run_for(3)
    if epoch_of(world.b).authority is Role.STANDBY:
        world.checks.fail(LOST, "B took over from a healthy A, and lacks its last writes")
    expect(world.a.accepts() and world.b.phase() is Phase.PASSIVE, "nothing has changed")
    expect(len(world.reigns) <= 1, "A was not interrupted")


def trace_13(only: str | None) -> None:
    """D: a node forgets its promise before the other one knows.

    Token. B is stopped for good at 2 s, with its promise; A serves on it. At 3.5 s B's daemon
    starts; its first datagram reaches A, and none after it: A echoes the new session but has heard
    nothing that counts, while B hears A and is PASSIVE. At 5.5 s A is cut off from B, broker and
    witness (not from clients). It serves on the promise, so B must not take over. A node whose
    present session the peer never echoed as a confirmed one does not take over either; the mutant
    removes both.
    """
    world = TraceWorld(TOKEN, only)
    world.settle()
    world.ask(world.b, CommandKind.STOP)
    world.wait(1, lambda: world.b.engine is None, "B has stopped")
    world.run_for(1.5)
    journal = world.a.disk.journal
    expect(journal is not None and journal.peer_promise, "A wrote B's promise down")
    expect(world.a.accepts(), "A serves on the promise")
    world.paths.words_left[Role.STANDBY] = 1
    world.b.start_daemon()
    world.run_for(2)
    expect(Role.STANDBY in world.paths.muted, "B is not heard")
    expect(world.b.phase() is Phase.PASSIVE, "B hears A")
    world.cut_off(world.a)
    world.run_for(5)
    expect(world.a.accepts() and world.b.phase() is Phase.PASSIVE, "A serves, B keeps its word")
    world.heal()
    world.run_for(2)
    kept = world.b.disk.journal
    expect(kept is not None and not kept.promise, "the promise ends by a seen exchange")


def trace_14(only: str | None) -> None:
    """L: the broker's old record permits.

    Token. A loses power at 2 s, B serves as epoch 2. At 7 s the site loses power. The broker comes
    back with an old snapshot, whose record says epoch 1 of A; A boots at 8 s, alone. It must wait
    until B is heard.
    """
    world = TraceWorld(TOKEN, only)
    world.settle()
    broker = world.a.broker()
    expect(broker.record is not None, "A has published its record")
    old = broker.record
    world.a.power_off()
    world.serves_within(world.b, 2.5, "B must take over")
    world.run_for(2.5)
    expect(epoch_of(world.b).number == 2 and broker.record != old, "B's record is published")
    world.b.power_off()
    broker.go_down()
    world.run_for(1)
    broker.come_up(restored=True)
    broker.record = old
    world.a.power_on(100 * MS_US)
    world.run_for(5)
    world.no_epoch_lost()
    expect(world.a.phase() is Phase.WAITING, "A waits")
    world.b.power_on(100 * MS_US)
    world.serves_within(world.b, 3, "B must serve when both are up")
    world.run_for(1)
    world.no_epoch_lost()


def trace_15(only: str | None) -> None:
    """D: two nodes reconnect the token in turn for ever.

    Token. First act: from 2 s on no heartbeat passes, over no link and not by the relay, nor does
    ARP; both reach the broker. B takes the token, which cuts A's connection. At each moment one
    node at most may count on it. (By the production rules they take it in turn once a second while
    that lasts, and A serves some 0.4 s of each.)

    Second act (S): as before, but B's heartbeats reach A by the relay. A, ISOLATED, leaves the
    token to the taker that it hears, so B must serve.
    """
    world = TraceWorld(TOKEN, only)
    world.settle()
    broker = world.a.broker()
    world.cut_links()
    world.paths.muted.update(Role)
    world.wait(2, lambda: broker.kicked > 0, "B takes the token from A")
    world.run_for(5)
    world.heal()
    world.run_for(4)
    expect(world.a.accepts() or world.b.accepts(), "healed, one of them serves")
    _taker_is_heard(only)


def _taker_is_heard(only: str | None) -> None:
    world = TraceWorld(TOKEN, only)
    world.settle()
    world.cut_links()
    world.paths.muted.add(Role.PRIMARY)
    world.wait(1.5, lambda: world.b.phase() is Phase.TAKEOVER, "B is in TAKEOVER")
    world.serves_within(world.b, 3, "the nodes take the token from each other")


ONE_LINK = """
role = "primary"
interface = "eth0"
vip = ["192.0.2.10"]
witness = ["gateway"]
links = [{ local = "192.0.2.1", peer = "192.0.2.2" }]
"""
ACCEPTED = '[takeover]\naccept = ["single-link-witness"]\n'


def trace_16(only: str | None) -> None:
    """D: one link and a mere witness.

    The only link is cut, and both see the gateway: two holders, with every production rule in
    force. So the configuration is refused, unless the operator accepts the risk by name: if it is
    taken all the same, the pair is built with it and the link is cut.
    """
    try:
        _cut_the_only_link(TWO_HOLDERS)
    except SimulationError as error:
        expect(error.invariant == TWO_HOLDERS, "there are two holders")
    else:
        raise ScheduleError("two holders were expected")
    configuration.parse(ONE_LINK + ACCEPTED)
    try:
        configuration.parse(ONE_LINK)
    except configuration.ConfigError as error:
        (problem,) = error.problems
        expect("links" in str(problem) and "single-link-witness" in str(problem), "it says why")
        return
    _cut_the_only_link(only)


def _cut_the_only_link(only: str | None) -> None:
    world = TraceWorld(WITNESS, only)
    world.network.cut.add((1, Role.PRIMARY), (1, Role.STANDBY))
    world.settle()
    world.network.cut.add((0, Role.PRIMARY), (0, Role.STANDBY))
    world.run_for(5)


def trace_17(only: str | None) -> None:
    """L: a node without its journal believes the peer, or begins anew over data.

    Witness. First act: B is in maintenance, with its promise. A loses power at 3 s, and comes back
    at 4 s with another system disk and old volumes (they bear stamps). B says that epoch 1 is A's.
    A must not serve by that. Second act: A loses power, B serves as epoch 2, the site loses power,
    and both come back with other system disks, over volumes that bear stamps. Nobody may begin
    epoch 1: the operator must say whose data is the truth.
    """
    _replaced_system_disk(only)
    _both_imaged_anew(only)


def _replaced_system_disk(only: str | None) -> None:
    world = TraceWorld(WITNESS, only)
    world.settle()
    world.ask(world.b, CommandKind.MAINTENANCE_ON)
    world.run_for(1)
    expect(world.b.phase() is Phase.MAINTENANCE, "B is in maintenance")
    _imaged_anew(world, world.a, 1)
    world.run_for(3)
    if world.a.accepts():
        world.checks.fail(LOST, "A serves old volumes: the peer said that they are the truth")
    expect(world.a.phase() is Phase.RETURNED, "A says that its journal is gone")


def _both_imaged_anew(only: str | None) -> None:
    world = TraceWorld(WITNESS, only)
    world.settle()
    world.a.power_off()
    world.serves_within(world.b, 2, "B must take over")
    world.run_for(1)
    expect(epoch_of(world.b).number == 2, "B serves as epoch 2")
    _imaged_anew(world, world.b, 1)
    _imaged_anew(world, world.a, 1)
    world.run_for(4)
    world.no_epoch_lost()
    expect(world.a.phase() is Phase.WAITING, "A waits for the operator")
    expect(world.b.phase() is Phase.WAITING, "B waits for the operator")


def _imaged_anew(world: TraceWorld, node: Node, seconds: float) -> None:
    """Off now, and on again with another system disk over volumes that bear stamps."""
    node.power_off()
    node.disk.replace()
    stamped = ReplicaChanged(whole=True, stamped=True)
    world.at(int(seconds * SECOND_US), node.power_on, 100 * MS_US)
    world.at(int(seconds * SECOND_US) + 100 * MS_US + 1, node.take, stamped)


def trace_18(only: str | None) -> None:
    """D: a renewal revives a dead address.

    Witness, hosts without a service lease (with one the service stays closed, whatever the address
    does). At 2 s A's daemon is stopped inside a renewal, between the look at the clock and the
    system call, for 5 s. B serves when the address has gone. When A goes on the processor is busy:
    the call comes at once, and A's next turn 40 ms later.
    """
    world = TraceWorld(WITHOUT_LEASE, only)
    world.settle()
    world.a.driver_pause = DriverPause(boundary=1, long_us=5 * SECOND_US)
    world.wait(1, lambda: world.a.stopped, "A is stopped inside a renewal")
    world.run_for(4.5)
    expect(world.b.accepts(), "B serves")
    expect(not world.a.kernel.address_held(), "A's address has gone")
    world.a.turn_delay_us = 40 * MS_US
    world.wait(1, lambda: not world.a.stopped, "A goes on")
    world.run_for(2)
    expect(world.b.accepts() and not world.a.kernel.address_held(), "B alone serves")
    world.a.turn_delay_us = 0


@dataclass(frozen=True, slots=True)
class Scenario:
    """A trace: the kind of its failure, and how it is played.

    `play(only)`: with `only`, other kinds of failures do not end it (a mutant is played).
    """

    kind: str
    play: Callable[[str | None], None]


SCENARIOS: dict[int, Scenario] = {
    1: Scenario(TWO_HOLDERS, trace_1),
    2: Scenario(TWO_HOLDERS, trace_2),
    8: Scenario(TWO_HOLDERS, trace_8),
    9: Scenario(STAYS_DOWN, trace_9),
    10: Scenario(TWO_HOLDERS, trace_10),
    11: Scenario(TWO_HOLDERS, trace_11),
    12: Scenario(LOST, trace_12),
    13: Scenario(TWO_HOLDERS, trace_13),
    14: Scenario(LOST, trace_14),
    15: Scenario(TWO_HOLDERS, trace_15),
    16: Scenario(TWO_HOLDERS, trace_16),
    17: Scenario(LOST, trace_17),
    18: Scenario(TWO_HOLDERS, trace_18),
}
"""By the number of the trace; 3 to 7 are about the handover (`handovers.TRACES`)."""

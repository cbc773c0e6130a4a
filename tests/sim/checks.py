"""The invariants of DESIGN section 3, looked at in every step of the simulation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nfsha.core import model
from nfsha.core.engine import Decision, decide
from nfsha.core.model import ADDRESS_LATE_MS, Datagram, Phase, PromiseState
from nfsha.core.state import State
from nfsha.core.table import ROWS

if TYPE_CHECKING:
    from tests.sim.node import Node
    from tests.sim.world import World

LATE_CALL_US = 1_000
"""How long a lock that a stopped driver revived may stand until the driver looks at the clock."""

RELEASE_US = 100_000
"""How long a running node that does not serve may take to close its kernel's locks."""

ROW_IDS = frozenset(row.id for row in ROWS)
COUNTERS_MAX = 64
FLIGHTS_MAX = 8
SENT_MAX = 128


class SimulationError(AssertionError):
    """An invariant is broken."""

    def __init__(self, invariant: str, what: str) -> None:
        super().__init__(f"{invariant}: {what}")
        self.invariant = invariant


class Checks:
    """Each method is called where the thing that it looks at happens."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._not_serving_us: dict[model.Role, int] = {}
        self.replays = 0

    def fail(self, invariant: str, what: str) -> None:
        """Ends the simulation."""
        raise SimulationError(invariant, what)

    # ------------------------------------------------------------- I1, I2

    def one_accepts(self, node: Node) -> None:
        """I1, when this node's locks changed or its machine was thawed; and I2."""
        self._closes_by_itself(node)
        other = self._world.nodes[node.role.other]
        if not (node.accepts() and other.accepts()):
            return
        for one in (node, other):
            until_us = self._bearable_until_us(one)
            if until_us >= self._world.now_us:
                self._world.at_us(until_us + 1, self._no_overlap)
                return
        self.fail("I1", "two nodes accept clients")

    def _bearable_until_us(self, node: Node) -> int:
        """Until when this node may still accept beside the other one, by the words of I1.

        A machine that was paused as a whole releases within one heartbeat; if its daemon was
        stopped or killed again before that, or the paths are not sound, its lease ends it. And a
        stopped driver's lock stands until the driver looks at the clock, at once after its call.
        """
        timings = self._world.config.timings
        within_ms = timings.interval_ms + 60
        undone = node.life != node.thawed_life or not node.runs() or node.late_call
        if undone or not self._world.network.clear() or node.turn_delay_us:
            within_ms = timings.hold_ms + 60
            if not self._world.config.service_lease:
                within_ms += timings.address_lease_ms + ADDRESS_LATE_MS
        until_us = node.thawed_us + within_ms * 1000
        if node.late_call and node.runs():
            until_us = max(until_us, node.resumed_us + LATE_CALL_US)
        return until_us

    def _no_overlap(self) -> None:
        first, second = self._world.nodes.values()
        if first.accepts() and second.accepts():
            now_us = self._world.now_us
            until_us = max(self._bearable_until_us(first), self._bearable_until_us(second))
            if until_us < now_us:
                self.fail("I1", "two nodes accept clients, and longer than is bearable")
            self._world.at_us(until_us + 1, self._no_overlap)

    def _closes_by_itself(self, node: Node) -> None:
        """I2: both locks are fed by turns only."""
        config = self._world.config
        bound_ms = node.last_turn_ms + config.timings.hold_ms + 25
        if not config.service_lease:
            bound_ms += config.timings.address_lease_ms + ADDRESS_LATE_MS
        extended_ms = node.extended_until_ms
        if extended_ms:
            bound_ms = max(bound_ms, extended_ms + 25)
            if not config.service_lease:
                bound_ms = max(bound_ms, extended_ms + 1000 + ADDRESS_LATE_MS)
        until_ms = node.kernel.accepts_until_us() // 1000
        if until_ms > bound_ms and not node.late_call:
            self.fail("I2", f"{node.role} accepts for {until_ms - bound_ms} ms more than its lease")

    # ------------------------------------------------------------- turns

    def turn(self, node: Node, decision: Decision) -> None:
        """I2 for a running engine, and I11."""
        state = decision.state
        if state.serving or not node.accepts():
            self._not_serving_us.pop(node.role, None)
        else:
            since_us = self._not_serving_us.setdefault(node.role, self._world.now_us)
            since_us = max(since_us, node.thawed_us, node.continued_us)
            if self._world.now_us - since_us > RELEASE_US:
                self.fail("I2", f"{node.role} is {state.phase} and its kernel accepts clients")
        if state.seq % 16 == 0:
            self._bounded(state)

    def forget(self, node: Node) -> None:
        """The daemon ended: its kernel closes by itself."""
        self._not_serving_us.pop(node.role, None)

    def _bounded(self, state: State) -> None:
        if (
            len(state.flights) > FLIGHTS_MAX
            or len(state.pending) > model.MAX_PENDING
            or len(state.sent_ms) > SENT_MAX
            or len(state.counters) > COUNTERS_MAX
        ):
            self.fail("I11", f"something grows: {state.flights} {state.pending} {state.counters}")

    def phases(self, node: Node, before: State, decision: Decision) -> None:
        """I12: each change of the phase is told, in order, by a row that exists, with a reason."""
        phase = before.phase
        for fired in decision.fired:
            if fired.phase is not phase or fired.row not in ROW_IDS or not fired.why:
                self.fail("I12", f"{node.role}: {fired} from {phase}")
            phase = fired.to
        if phase is not decision.state.phase:
            self.fail("I12", f"{node.role}: {phase} became {decision.state.phase} without a row")

    # ------------------------------------------------------------- I6

    def shown(self, node: Node, datagram: Datagram) -> None:
        """I6: what a datagram says is durable."""
        journal = node.disk.journal or model.Journal()
        epoch = datagram.epoch
        if epoch is not None:
            durable = journal.epoch
            lower = durable is None or durable.number < epoch.number
            other = durable is not None and durable.number == epoch.number and durable != epoch
            if lower or other:
                self.fail("I6", f"{node.role} shows epoch {epoch}, its disk says {durable}")
        if datagram.aborted is not None and journal.aborted != datagram.aborted:
            self.fail("I6", f"{node.role} shows an aborted handover that its disk does not know")
        prepared = datagram.phase is Phase.PREPARED and datagram.ready
        if prepared and journal.prepared != datagram.handover:
            self.fail("I6", f"{node.role} shows PREPARED, its disk says {journal.prepared}")
        if datagram.promise is PromiseState.STANDING and not journal.promise:
            self.fail("I6", f"{node.role} shows a promise that its disk does not know")
        if not datagram.peer_promise_held and journal.peer_promise:
            self.fail("I6", f"{node.role} says the peer's promise is cleared, its disk holds it")

    def stands_on_journal(self, node: Node, action: model.Action) -> None:
        """I6: who opens a lock is the authority by its disk."""
        journal = node.disk.journal or model.Journal()
        epoch, given = journal.epoch, journal.prepared
        if epoch is None or epoch.authority is not node.role:
            self.fail("I6", f"{node.role} does {action}, its disk says {journal}")
        elif (
            given is not None and given.number > epoch.number and not self._given_back(node, given)
        ):
            self.fail("I7", f"{node.role} does {action}, and gave its authority away to {given}")
        if node.volumes.frozen and isinstance(action, model.OpenService):
            self.fail("freeze", f"{node.role} serves frozen volumes")

    def _given_back(self, node: Node, given: model.Epoch) -> bool:
        """The receiver's disk has ABORTED; the giver's own may follow later."""
        theirs = self._world.nodes[node.role.other].disk.journal
        return theirs is not None and theirs.aborted == given

    # ------------------------------------------------------------- I3, I4, takeover condition 2

    def nothing_destroyed(self, gone: list[int]) -> None:
        """I4: what went from one node's volumes is on a node, or in a quarantine."""
        for number in gone:
            if not any(
                number in node.volumes.holds or number in node.volumes.quarantined
                for node in self._world.nodes.values()
            ):
                self.fail("I4", f"the acknowledged write {number} is nowhere any more")

    def takes_over_whole(self, node: Node) -> None:
        """Condition 2: by itself a node takes over only as a whole replica of its epoch."""
        engine = node.engine
        if not self._world.config.replication or engine is None or engine.state.by_operator:
            return
        epoch = node.shown_epoch()
        volumes = node.volumes
        if volumes.receiving is not None:
            self.fail("I3", f"{node.role} commits while it receives")
        own = epoch is not None and epoch.authority is node.role
        proved = engine.state.handed_over  # its volumes may be frozen still, and not stamped
        if not own and (volumes.tainted or (volumes.stamp != epoch and not proved)):
            self.fail("whole", f"{node.role} takes over with {volumes.stamp}, journal {epoch}")

    def hands_over_all(self, node: Node) -> None:
        """I7: who commits a handover has every write that the giver acknowledged."""
        giver = self._world.nodes[node.role.other]
        if giver.accepts():
            self.fail("I1", f"{node.role} commits while {giver.role} accepts clients")
        if not self._world.config.replication:
            return
        missing = sorted(giver.volumes.holds - node.volumes.holds)
        if missing:
            self.fail("I7", f"{node.role} commits without the acknowledged writes {missing[:5]}")
        if node.volumes.receiving is not None or node.volumes.tainted:
            self.fail("I3", f"{node.role} commits while it receives, or tainted")

    def serves_volumes(self, node: Node) -> None:
        """What clients write goes to the volumes, not into the folders that they are mounted on."""
        if self._world.config.hooks and not node.block.mounted:
            self.fail("volumes", f"{node.role} accepts clients, and nothing is mounted there")

    # ------------------------------------------------------------- I10

    def replay(self, node: Node, what: model.Heard) -> None:
        """I10: a recorded datagram that was heard before, or belongs to an earlier life."""
        engine = node.engine
        if engine is None:
            return
        state = engine.state
        datagram = what.datagram
        if datagram.session == state.peer_session and datagram.seq > state.peer_seq:
            return  # not heard yet: it is late, not a replay
        now_ms = node.local_ms()
        with_it = decide(state, [what], now_ms)
        without = decide(state, [], now_ms)
        self.replays += 1
        self._world.fired("replay")
        if _said(with_it) != _said(without):
            self.fail(
                "I10",
                f"{node.role}: a replay of {datagram.session:x}/{datagram.seq} changes\n"
                f"{_said(without)}\nto\n{_said(with_it)}",
            )


def _said(decision: Decision) -> tuple[object, ...]:
    """A decision but for its heartbeat (the second slot may be asked for) and counters."""
    state = decision.state
    actions = [
        numbered.action
        for numbered in decision.actions
        if not isinstance(numbered.action, model.SendHeartbeat)
    ]
    evidence = (
        state.echo_ms,
        state.heard_ms,
        state.peer_session,
        state.peer_seq,
        state.report,
        state.idle_since_ms,
        state.withhold_since_ms,
        state.peer_down,
        state.want,
        state.absence_granted_ms,
        state.promise_echoed,
        state.echoed_high,
    )
    return (state.phase, state.row, decision.fired, actions, evidence)


def may_wait(phase: Phase | None) -> bool:
    """Phases in which a node may legitimately wait for the operator."""
    return phase in (Phase.WAITING, Phase.DIVERGED, Phase.RETURNED)

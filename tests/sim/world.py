"""The world of two nodes: one virtual clock, one queue of events, one source of chance.

Times are whole microseconds. Nothing sleeps; nothing happens but by an event.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nfsha.core.model import CommandKind, Exclusivity, Fired, Phase, Role, Timings
from tests.sim.arbiters import Broker, FenceAgent
from tests.sim.block import HOOK_MOST_MS
from tests.sim.checks import Checks
from tests.sim.network import Network
from tests.sim.node import PERCENT_PPM, Node

SECOND_US = 1_000_000
LOG_MAX = 20_000
CLIENT_EVERY_US = 250_000
WRITES_KEPT = 10_000
RECEIVERS_GONE_MS = 50
"""How long it may take until a killed receiver is proved gone."""

HANDOVER_ROWS = {
    "A30": "handover-freeze",
    "A32": "rescue",
    "A34": "rescue-ended",
    "X20": "handover-done",
    "G30": "handover-unfrozen",
    "Q20": "handover-taken-back",
    "Q30": "handover-takeover",
    "Z30": "handover-aborted",
    "X32": "handover-uncommitted",
}
"""Rows that say how far a handover came."""

DEFAULT = Timings()
FAST = Timings(interval_ms=50, hold_ms=300, takeover_after_ms=450, margin_ms=50)


@dataclass(frozen=True, slots=True)
class WorldConfig:
    """What both nodes are configured with."""

    exclusivity: Exclusivity = Exclusivity.WITNESS
    timings: Timings = DEFAULT
    service_lease: bool = True
    start_alone_after_ms: int | None = None
    replication: bool = False
    hooks: bool = False
    """Somebody else replicates the blocks; hooks mount them."""

    @property
    def has_token(self) -> bool:
        """Is there a broker?"""
        return self.exclusivity in (Exclusivity.TOKEN, Exclusivity.TOKEN_AND_AGENT)

    @property
    def has_agent(self) -> bool:
        """Are there fence agents?"""
        return self.exclusivity in (Exclusivity.AGENT, Exclusivity.TOKEN_AND_AGENT)


@dataclass(frozen=True, slots=True)
class Write:
    """A write that a node acknowledged to the client."""

    at_us: int
    role: Role
    epoch: str


@dataclass(slots=True)
class Reign:
    """One stretch of time in which a node's kernel accepted clients."""

    from_us: int
    until_us: int
    role: Role


@dataclass(slots=True)
class Tally:
    """What happened, for the statistics of a run."""

    fired: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    takeovers: int = 0


class World:
    """Two nodes and all that stands around them."""

    def __init__(self, seed: int, config: WorldConfig, *, rates: tuple[int, int] = (0, 0)) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.config = config
        self.now_us = 0
        self.turns = 0
        self.tally = Tally()
        self.log: list[tuple[int, str]] = []
        self.disturbances = 0
        self.healed = False
        self.reigns: list[Reign] = []
        self.writes: list[Write] = []
        self.written = 0
        self._queue: list[tuple[int, int, Callable[..., object], tuple[Any, ...]]] = []
        self._number = 0
        self._commands = 0
        self.checks = Checks(self)
        self.network = Network(self)
        self.broker = Broker(self) if config.has_token else None
        self.fence = FenceAgent(self)
        self.nodes = {role: Node(self, role, ppm) for role, ppm in zip(Role, rates, strict=True)}
        self.a = self.nodes[Role.PRIMARY]
        self.b = self.nodes[Role.STANDBY]
        self.restart_delay_us: Callable[[], int] = self._random_restart_delay
        if any(abs(ppm) > PERCENT_PPM // 10 for ppm in rates):
            self.fired("clock-rate")
        self.at(CLIENT_EVERY_US, self._client_writes)

    # ------------------------------------------------------------- the queue

    def at(self, delay_us: int, call: Callable[..., object], *args: Any) -> None:
        """Calls something after a delay."""
        self._number += 1
        heapq.heappush(self._queue, (self.now_us + delay_us, self._number, call, args))

    def at_us(self, when_us: int, call: Callable[..., object], *args: Any) -> None:
        """Calls something at a time."""
        self._number += 1
        heapq.heappush(self._queue, (max(when_us, self.now_us), self._number, call, args))

    def run_until(self, until_us: int) -> None:
        """Runs all events up to a time. Raises what the checks raise."""
        queue = self._queue
        pop = heapq.heappop
        while queue and queue[0][0] <= until_us:
            self.now_us, _, call, args = pop(queue)
            call(*args)
        self.now_us = until_us

    def run_for(self, seconds: float) -> None:
        """Runs for so many virtual seconds."""
        self.run_until(self.now_us + int(seconds * SECOND_US))

    # ------------------------------------------------------------- what is told

    def note(self, what: str) -> None:
        """Writes one line of the trace."""
        if len(self.log) < LOG_MAX:
            self.log.append((self.now_us, what))

    def fired(self, fault: str) -> None:
        """A fault really happened."""
        self.tally.fired[fault] += 1

    def disturb(self) -> None:
        """Something happened that voids what was expected of the calm."""
        self.disturbances += 1

    def row_fired(self, node: Node, fired: Fired) -> None:
        """A row of the table fired."""
        self.tally.rows[fired.row] += 1
        if fired.to is Phase.ACTIVE and fired.phase is Phase.TAKEOVER:
            self.tally.takeovers += 1
        if fired.row == "T10":
            self.checks.takes_over_whole(node)
        if fired.row == "X10":
            self.checks.hands_over_all(node)
        if fired.row in HANDOVER_ROWS:
            self.fired(HANDOVER_ROWS[fired.row])
        arrow = f"{fired.phase} -> {fired.to}" if fired.to is not fired.phase else fired.phase
        self.note(f"{node.role} {fired.row} {arrow}: {fired.why} [{fired.detail}]")

    def accepted(self, node: Node, from_us: int, until_us: int) -> None:
        """A node accepted clients from then until then."""
        last = self.reigns[-1] if self.reigns else None
        if last is not None and last.role is node.role and from_us <= last.until_us:
            last.until_us = max(last.until_us, until_us)
        else:
            self.reigns.append(Reign(from_us, until_us, node.role))

    def next_command(self) -> int:
        """A number for the next command."""
        self._commands += 1
        return self._commands

    # ------------------------------------------------------------- the client

    def _client_writes(self) -> None:
        """One numbered write at the VIP: whoever accepts acknowledges it."""
        served_by = [node for node in self.nodes.values() if node.accepts()]
        for node in served_by:
            epoch = node.disk.journal.epoch if node.disk.journal is not None else None
            self.writes.append(Write(self.now_us, node.role, epoch.id if epoch else ""))
            self.written += 1
            node.volumes.holds.add(self.written)
        del self.writes[:-WRITES_KEPT]
        self.at(CLIENT_EVERY_US, self._client_writes)

    # ------------------------------------------------------------- life and death of daemons

    def _random_restart_delay(self) -> int:
        if self.random.random() < 0.6:
            return self.random.randrange(100_000, 1_500_000)
        return self.random.randrange(1_500_000, 10_000_000)

    def restart_later(self, node: Node) -> None:
        """Systemd starts a killed daemon again."""
        self.at(self.restart_delay_us(), node.start_daemon, node.life)

    def planned_restart_later(self, node: Node) -> None:
        """Systemd's restart: the new daemon comes soon."""
        self.at(self.random.randrange(150_000, 3_000_000), node.start_daemon, node.life)

    def stopped_finally(self, node: Node) -> None:
        """A final stop: somebody starts the daemon some time later."""
        self.at(self.random.randrange(1_000_000, 10_000_000), node.start_daemon, node.life)

    def power_lost(self, node: Node) -> None:
        """A machine is off: an expectation of I9 may begin."""
        self.expect_served_after_loss(node)

    # ------------------------------------------------------------- what is expected

    def calm(self) -> bool:
        """Is nothing wrong with the paths and the arbiters?"""
        broker = self.broker
        return (
            self.network.clear()
            and (broker is None or (broker.up and not broker.cut))
            and self.fence.mode == "works"
        )

    def takeover_bound_ms(self) -> int:
        """I9: from the loss of the active machine to the served VIP (DESIGN 4, Bounds)."""
        timings = self.config.timings
        slack_ms = 100 + timings.takeover_after_ms // 50
        if self.config.replication:
            slack_ms += RECEIVERS_GONE_MS
        if self.config.hooks:
            slack_ms += HOOK_MOST_MS
        bound_ms = timings.takeover_after_ms + slack_ms
        if self.config.has_token:
            return bound_ms + timings.hold_ms + timings.margin_ms
        if self.config.has_agent:
            return bound_ms + 1300
        return bound_ms

    def expect_served_after_loss(self, lost: Node) -> None:
        """I9: the other node is sound, and can prove that it may serve: it does, in time."""
        other = self.nodes[lost.role.other]
        engine = other.engine
        if lost.accepting_until_us < self.now_us - SECOND_US or engine is None or not other.runs():
            return
        state = engine.state
        ready = (
            state.phase is Phase.PASSIVE
            and state.fit is True
            and state.whole
            and state.known_to_peer
            and not state.want.promise
            and not state.durable.promise
            and not state.stopping
            and state.withhold_since_ms is None
            and not state.froze
            and (not self.config.hooks or state.volumes_mounted is False)
            and state.report is not None
            and state.report.phase in (Phase.ACTIVE, Phase.MAINTENANCE)
            and state.report.serving
            and state.report.absence_ms == 0
            and other.local_ms() - state.heard_ms < 2 * self.config.timings.interval_ms
            and not other.disk.failing
            and not other.disk.slow_us
            and not other.disk.cut_power_at_write
            and other.crash_in_actions is None
            and other.driver_pause is None
            and not other.turn_delay_us
        )
        if ready and self.calm() and self.network.probe_losses == 0:
            mark = self.disturbances
            self.at(self.takeover_bound_ms() * 1000, self._served, other, mark)

    def _served(self, node: Node, mark: int) -> None:
        if self.disturbances != mark:
            return
        self.fired("expected-I9")
        if not node.accepts():
            self.checks.fail("I9", f"{node.role} is sound, but does not serve within the bound")

    def expect_unbroken(self, node: Node) -> None:
        """I8: a planned restart with the peer heard interrupts no client."""
        other = self.nodes[node.role.other]
        engine = node.engine
        if engine is None or not node.accepts() or not node.runs():
            return
        state = engine.state
        peer_ready = (
            other.runs()
            and self.calm()
            and state.phase is Phase.ACTIVE
            and not state.stopping
            and node.local_ms() - state.echo_ms < 2 * self.config.timings.interval_ms
            and not other.turn_delay_us
        ) or state.durable.peer_promise
        if peer_ready and node.crash_in_actions is None and node.driver_pause is None:
            mark = self.disturbances
            self.at(7_500_000, self._unbroken, node, self.now_us, mark)

    def _unbroken(self, node: Node, since_us: int, mark: int) -> None:
        if self.disturbances != mark:
            return
        self.fired("expected-I8")
        if not node.accepts() or (node.accepting_from_us or 0) > since_us:
            self.checks.fail("I8", f"a planned restart of {node.role} interrupted the service")

    # ------------------------------------------------------------- help

    def boot_both(self) -> None:
        """Both machines get power."""
        self.a.power_on(self.random.randrange(50_000, 400_000))
        self.b.power_on(self.random.randrange(50_000, 400_000))

    def ask(self, node: Node, kind: CommandKind, *, force: bool = False) -> None:
        """A command that a fault or a scenario brings."""
        self.disturb()
        node.command(kind, force=force)

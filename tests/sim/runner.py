"""One seed: a world, faults, healing, convergence; and many seeds on all processors."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from nfsha.core.invariants import BrokenInvariantError
from nfsha.core.model import CommandKind, Exclusivity, Phase, Timings
from tests.sim.checks import SimulationError
from tests.sim.faults import MUST_FIRE, Faults, struck
from tests.sim.node import Node
from tests.sim.world import DEFAULT, FAST, SECOND_US, World, WorldConfig

FAULTS_FROM_US = 2 * SECOND_US
FAULTS_UNTIL_US = 36 * SECOND_US
HEAL_US = 38 * SECOND_US
OPERATOR_US = 51 * SECOND_US
"""What the pair has not settled by itself by then, it must ask the operator about."""
END_US = 62 * SECOND_US
CALM_US = 5 * SECOND_US
"""So long before the end nothing may change any more."""
LEAST_FAULTS = 3
HANDOVERS = 0.6
"""The share of seeds in which the service is moved whenever that may be."""

MAY_WAIT_ROWS = frozenset({"I90", "W91", "W97", "R91", "R92", "R93"})
"""Where both may wait for the operator when a journal was lost, or an operator erred before: one
has older data, or knows from a record or a stamp of a newer epoch, and the other one's journal does
not know what it was."""
LEAST_SEEDS_FOR_ALL_FAULTS = 1000

WITHOUT_LEASE_MS = {DEFAULT.hold_ms: 3100, FAST.hold_ms: 2800}
"""`takeover_after` where the firewall has no lease: hold + margin + 2.4 s, rounded up."""


@dataclass(slots=True)
class Outcome:
    """What came of one seed."""

    seed: int
    failure: str = ""
    trace: str = ""
    faults: list[str] = field(default_factory=list)
    fired: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    takeovers: int = 0
    turns: int = 0
    operator: str = ""


def make_world(seed: int) -> World:
    """A world with what this seed chooses."""
    chance = random.Random(seed ^ 0x5EED)
    exclusivity = chance.choice(list(Exclusivity))
    timings = chance.choice((DEFAULT, DEFAULT, FAST))
    service_lease = chance.random() < 0.8
    if not service_lease:
        timings = _longer(timings.hold_ms)
    rates = (0, 0)
    if chance.random() < 0.6:
        rates = (chance.randrange(-10_000, 10_001), chance.randrange(-10_000, 10_001))
    replication = chance.random() < 0.5
    hooks = not replication and chance.random() < 0.5
    config = WorldConfig(exclusivity, timings, service_lease, replication=replication, hooks=hooks)
    return World(seed, config, rates=rates)


def _longer(hold_ms: int) -> Timings:
    base = DEFAULT if hold_ms == DEFAULT.hold_ms else FAST
    return replace(base, takeover_after_ms=WITHOUT_LEASE_MS[hold_ms])


def run_seed(seed: int, *, keep_trace: bool = False) -> Outcome:
    """Runs one seed to its end or to the first broken invariant."""
    world = make_world(seed)
    faults = Faults(world)
    outcome = Outcome(seed)
    try:
        _live(world, faults, outcome)
    except (SimulationError, BrokenInvariantError, KeyError, TypeError, ValueError) as error:
        outcome.failure = f"{type(error).__name__} {error}"
    outcome.faults = faults.began
    outcome.fired = world.tally.fired
    outcome.rows = world.tally.rows
    outcome.takeovers = world.tally.takeovers
    outcome.turns = world.turns
    if outcome.failure or keep_trace:
        outcome.trace = trace(world, outcome)
    return outcome


def _live(world: World, faults: Faults, outcome: Outcome) -> None:
    world.boot_both()
    number = world.random.randrange(LEAST_FAULTS + 1, 13)
    faults.plan(FAULTS_FROM_US, FAULTS_UNTIL_US, number)
    if world.random.random() < HANDOVERS:
        faults.handovers(FAULTS_FROM_US, FAULTS_UNTIL_US)
    world.run_until(FAULTS_UNTIL_US + SECOND_US)
    faults.top_up(LEAST_FAULTS)
    world.run_until(HEAL_US)
    faults.heal()
    world.at(SECOND_US, _operator_ends_maintenance, world)
    world.run_until(OPERATOR_US)
    outcome.operator = _operator_helps(world)
    world.run_until(END_US - CALM_US)
    before = _standing(world)
    world.run_until(END_US)
    _converged(world, before)


def _operator_ends_maintenance(world: World) -> None:
    for node in world.nodes.values():
        if node.phase() is Phase.MAINTENANCE:
            node.command(CommandKind.MAINTENANCE_OFF)
    world.at(SECOND_US, _operator_ends_maintenance, world)


def _standing(world: World) -> tuple[object, ...]:
    return tuple((node.phase(), node.shown_epoch()) for node in world.nodes.values())


def _operator_helps(world: World) -> str:
    """When nobody serves, only reasons that are the operator's business are accepted."""
    serving = [node for node in world.nodes.values() if node.accepts()]
    if serving:
        return _operator_discards(world, world.nodes[serving[0].role.other])
    rows = {
        node.role: node.engine.state.row if node.engine is not None else "-"
        for node in world.nodes.values()
    }
    shown = set(rows.values())
    fired = world.tally.fired
    journals_lost = fired["disk-torn"] + fired["disk-replaced"] + fired["disk-restored"]
    words = fired["activate"] + fired["confirm-down"] + fired["peer-off-word"]
    # One node alone in D90: the other one's journal was restored or replaced, and it follows, or
    # waits for a history to follow.
    if "D90" in shown and shown <= {"D90", "P91"} | MAY_WAIT_ROWS:
        if not (words or journals_lost):
            world.checks.fail("convergence", f"two histories, and nobody made them: {rows}")
        keep = world.random.choice([role for role, row in rows.items() if row == "D90"])
        world.nodes[keep].command(CommandKind.RESOLVE, keep=keep)
        return "resolve"
    if shown <= MAY_WAIT_ROWS and (journals_lost or words):
        node = world.random.choice(list(world.nodes.values()))
        node.command(CommandKind.ACTIVATE, force=world.config.replication)
        return "activate"
    world.checks.fail(
        "convergence", f"nobody serves {_waited_s(world)} s after all is well: {rows}"
    )
    return ""


def _operator_discards(world: World, other: Node) -> str:
    """A copy of another history is not overwritten until an operator takes its stamp away."""
    stamp, epoch = other.volumes.stamp, other.shown_epoch()
    if not world.config.replication or stamp is None or epoch is None:
        return ""
    if stamp == epoch or stamp.number < epoch.number:
        return ""
    fired = world.tally.fired
    word = fired["activate"] or fired["confirm-down"] or fired["peer-off-word"]
    if not (word or fired["disk-torn"] + fired["disk-replaced"] + fired["disk-restored"]):
        world.checks.fail("convergence", f"a second history of {stamp}, and nobody made it")
    other.volumes.stamp = None
    return "discard"


def _waited_s(world: World) -> int:
    return (world.now_us - HEAL_US) // SECOND_US


def _converged(world: World, before: tuple[object, ...]) -> None:
    serving = [node for node in world.nodes.values() if node.accepts()]
    if len(serving) != 1:
        rows = [n.engine.state.row if n.engine is not None else "-" for n in world.nodes.values()]
        world.checks.fail("convergence", f"{len(serving)} nodes serve at the end: {rows}")
    if serving[0].phase() is not Phase.ACTIVE:
        world.checks.fail("convergence", f"{serving[0].role} serves in {serving[0].phase()}")
    other = world.nodes[serving[0].role.other]
    if other.phase() is not Phase.PASSIVE:
        world.checks.fail("convergence", f"{other.role} is {other.phase()} at the end")
    after = _standing(world)
    if before != after:
        world.checks.fail("convergence", f"flapping in calm: {before} became {after}")
    if struck(world) < LEAST_FAULTS:
        world.checks.fail("simulator", f"only {struck(world)} faults struck")


def trace(world: World, outcome: Outcome) -> str:
    """What happened, line by line."""
    config = world.config
    timings = config.timings
    rates = [f"{node.rate_ppm / 10_000:+.2f} %" for node in world.nodes.values()]
    lines = [
        f"seed {outcome.seed}: {config.exclusivity}, "
        f"{timings.interval_ms}/{timings.hold_ms}/{timings.takeover_after_ms} ms, "
        f"{'service lease' if config.service_lease else 'no service lease'}, "
        f"{'replication' if config.replication else 'no replication'}"
        f"{', hooks' if config.hooks else ''}, clocks {rates}",
        f"faults: {', '.join(outcome.faults)}",
    ]
    lines += [f"{at_us / SECOND_US:10.4f} {what}" for at_us, what in world.log]
    if outcome.failure:
        lines.append(f"{world.now_us / SECOND_US:10.4f} FAILED {outcome.failure}")
        lines.append(f"again: python -m tests.sim --seed {outcome.seed} -v")
    return "\n".join(lines)


# --------------------------------------------------------------------------- many


@dataclass(slots=True)
class Summary:
    """What came of many seeds."""

    seeds: int = 0
    seconds: float = 0.0
    turns: int = 0
    takeovers: int = 0
    fired: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    operator: Counter[str] = field(default_factory=Counter)
    failures: list[Outcome] = field(default_factory=list)

    def never_fired(self) -> list[str]:
        """The faults that such a run should have seen and did not."""
        if self.seeds < LEAST_SEEDS_FOR_ALL_FAULTS:
            return []
        return sorted(name for name in MUST_FIRE if not self.fired[name])

    def text(self) -> str:
        """For people."""
        rate = self.seeds / self.seconds if self.seconds else 0.0
        faults = ", ".join(f"{name} {count}" for name, count in sorted(self.fired.items()))
        return (
            f"{self.seeds} seeds in {self.seconds:.1f} s: {rate:.1f} a second; "
            f"{self.turns} turns, {self.takeovers} takeovers, "
            f"operator asked {dict(self.operator)}\nfired: {faults}"
        )


def run_many(seeds: Iterable[int], processes: int | None = None) -> Summary:
    """Runs seeds on all processors."""
    summary = Summary()
    began_s = time.monotonic()
    for outcome in _outcomes(list(seeds), processes or multiprocessing.cpu_count()):
        summary.seeds += 1
        summary.turns += outcome.turns
        summary.takeovers += outcome.takeovers
        summary.fired.update(outcome.fired)
        summary.rows.update(outcome.rows)
        if outcome.operator:
            summary.operator[outcome.operator] += 1
        if outcome.failure:
            summary.failures.append(outcome)
    summary.seconds = time.monotonic() - began_s
    return summary


def _outcomes(seeds: list[int], processes: int) -> Iterator[Outcome]:
    if processes == 1 or len(seeds) < 4:
        yield from map(run_seed, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(run_seed, seeds, chunksize=4)

"""The faults: what goes wrong, for how long, and which may come together.

A fault counts as fired when it really struck. With a mere witness the loss of all direct paths at
once is outside I1 (DESIGN 4), so there only one fault of the paths is under way at a time, and
what cuts a node off cuts it from the witness too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nfsha.core.model import CommandKind, Exclusivity, Phase, Role
from tests.sim.network import LINKS
from tests.sim.node import DriverPause, Node
from tests.sim.world import HANDOVER_ROWS, SECOND_US, World

Begin = Callable[["Faults"], bool]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault; `counted` False when something else counts it where it strikes."""

    name: str
    weight: int
    begin: Begin
    counted: bool = True
    needs: str = ""


class Faults:
    """Brings faults into a world, and heals them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.random = world.random
        self.witness_only = world.config.exclusivity is Exclusivity.WITNESS
        self.paths_busy_until_us = 0
        self.began: list[str] = []
        self.disk_changed = False

    # ------------------------------------------------------------- the plan

    def plan(self, from_us: int, until_us: int, number: int) -> None:
        """Lays out faults over a stretch of time; some close together, some alone."""
        kinds = [kind for kind in KINDS if self._possible(kind)]
        weights = [kind.weight for kind in kinds]
        at_us = from_us
        span_us = (until_us - from_us) // number
        for _ in range(number):
            kind = self.random.choices(kinds, weights)[0]
            self.world.at_us(at_us + self.random.randrange(span_us // 2), self.strike, kind)
            if self.random.random() < 0.5:
                at_us += span_us + self.random.randrange(span_us)
            else:
                at_us += self.random.randrange(span_us)

    def handovers(self, from_us: int, until_us: int) -> None:
        """Moves the service again and again over a stretch of time, beside all other faults."""
        kind = next(kind for kind in KINDS if kind.name == "handover")
        at_us = from_us + self.random.randrange(3 * SECOND_US)
        while at_us < until_us:
            self.world.at_us(at_us, self.strike, kind)
            at_us += self.random.randrange(3 * SECOND_US, 12 * SECOND_US)

    def _possible(self, kind: Kind) -> bool:
        config = self.world.config
        return {
            "": True,
            "token": config.has_token,
            "agent": config.has_agent,
            "witness": self.witness_only,
            "lease": config.service_lease,
        }[kind.needs]

    def strike(self, kind: Kind) -> None:
        """Begins one fault, or another one of the sure kind if that cannot be now."""
        world = self.world
        if world.healed:
            return
        if kind.begin(self):
            world.disturb()
            if kind.counted:
                world.fired(kind.name)
            self.began.append(f"{world.now_us / SECOND_US:.3f} {kind.name}")

    def top_up(self, least: int) -> None:
        """Brings faults that cannot fail to strike, until so many have fired."""
        sure = [kind for kind in KINDS if kind.name in ("pause", "power")]
        count = 0
        while struck(self.world) < least and count < 3 * least:
            count += 1
            self.strike(sure[count % len(sure)])

    def after(
        self, least_s: float, most_s: float, call: Callable[..., object], *args: object
    ) -> int:
        """Calls something after a while, unless all is healed by then. Returns when."""
        delay_us = int(self.random.uniform(least_s, most_s) * SECOND_US)

        def unless_healed() -> None:
            if not self.world.healed:
                call(*args)
                self.world.disturb()

        self.world.at(delay_us, unless_healed)
        return self.world.now_us + delay_us

    def any_node(self) -> Node:
        """A node; the one that serves more often."""
        nodes = list(self.world.nodes.values())
        serving = [node for node in nodes if node.accepts()]
        if serving and self.random.random() < 0.65:
            return serving[0]
        return self.random.choice(nodes)

    def paths(self) -> bool:
        """May a fault of the paths begin now?"""
        return not self.witness_only or self.world.now_us >= self.paths_busy_until_us

    def disk_may_change(self, node: Node) -> bool:
        """Two disks that lie, or one that lies to a node alone, are more than a single fault."""
        return not self.disk_changed and self.world.network.clear()

    # ------------------------------------------------------------- heal

    def heal(self) -> None:
        """Ends all faults: everything is there, and works."""
        world = self.world
        world.healed = True
        world.disturb()
        world.note("all faults are healed")
        world.network.heal()
        world.fence.mend()
        if world.broker is not None:
            world.broker.cut.clear()
            if not world.broker.up:
                world.broker.come_up(restored=False)
        for node in world.nodes.values():
            node.crash_in_actions = node.crash_at_row_in = None
            node.driver_pause = None
            node.turn_delay_us = 0
            node.disk.slow_us = 0
            node.disk.failing = False
            node.disk.cut_power_at_write = False
            node.go_on()
            node.thaw()
            if node.fit is not True:
                node.set_fit(True)
            if not node.carrier:
                node.set_carrier(True)
            if not node.powered:
                node.power_on()
            elif node.engine is None:
                world.at(500_000, node.start_daemon, node.life)


def struck(world: World) -> int:
    """How many faults really struck so far."""
    return sum(
        count for name, count in world.tally.fired.items() if not name.startswith("expected")
    )


# --------------------------------------------------------------------------- daemons, machines


def _crash(faults: Faults) -> bool:
    node = faults.any_node()
    if node.engine is None or node.frozen:
        return False
    faults.world.note(f"{node.role} is killed")
    node.crash()
    faults.world.restart_later(node)
    return True


def _crash_boundary(faults: Faults) -> bool:
    node = faults.any_node()
    if node.engine is None:
        return False
    # Near a decision with many actions: a takeover, a release.
    node.crash_in_actions = faults.random.choice((0, 1, 2, 3, 4, 5, 7, 10, 15, 25, 60))
    return True


def _crash_on_row(faults: Faults) -> bool:
    """Killed between two actions of a decision that changed the phase."""
    node = faults.random.choice(list(faults.world.nodes.values()))
    if node.engine is None:
        return False
    node.crash_at_row_in = faults.random.randrange(6)
    return True


def _restart(faults: Faults) -> bool:
    node = faults.any_node()
    if node.engine is None:
        return False
    faults.world.disturb()
    faults.world.at(1, _restart_now, faults.world, node)
    return True


def _restart_now(world: World, node: Node) -> None:
    world.expect_unbroken(node)
    node.command(CommandKind.RESTART)


def _stop(faults: Faults) -> bool:
    node = faults.any_node()
    if node.engine is None:
        return False
    node.command(CommandKind.STOP)
    return True


def _power(faults: Faults) -> bool:
    node = faults.any_node()
    if not node.powered:
        return False
    _power_cycle(faults, node)
    return True


def _power_cycle(faults: Faults, node: Node, least_s: float = 0.5, most_s: float = 12.0) -> None:
    # An expectation of I9 starts at the loss: the disturbance comes first.
    faults.world.disturb()
    faults.world.at(0, node.power_off)
    faults.after(least_s, most_s, node.power_on)


def _power_both(faults: Faults) -> bool:
    nodes = list(faults.world.nodes.values())
    if not all(node.powered for node in nodes):
        return False
    for node in nodes:
        node.power_off()
        faults.after(0.5, 10.0, node.power_on)
    return True


def _pause(faults: Faults) -> bool:
    node = faults.any_node()
    if node.engine is None or node.stopped:
        return False
    faults.world.note(f"{node.role} daemon is stopped")
    node.stop()
    faults.after(0.05, faults.random.choice((0.3, 0.7, 1.5, 5.0)), _go_on, node)
    return True


def _go_on(node: Node) -> None:
    node.world.note(f"{node.role} daemon goes on")
    node.go_on()


def _freeze_machine(faults: Faults) -> bool:
    node = faults.any_node()
    if not node.powered or node.frozen:
        return False
    faults.world.note(f"{node.role} machine is paused")
    node.freeze()
    faults.after(0.05, faults.random.choice((0.5, 2.0, 8.0)), node.thaw)
    return True


def _driver_pause(faults: Faults) -> bool:
    node = faults.any_node()
    if node.engine is None:
        return False
    long_us = int(faults.random.choice((0.05, 0.4, 0.8, 2.0, 5.0)) * SECOND_US)
    node.driver_pause = DriverPause(faults.random.choice((1, 1, 2)), long_us)
    return True


def _busy(faults: Faults) -> bool:
    node = faults.any_node()
    node.turn_delay_us = faults.random.choice((5_000, 20_000, 40_000))
    faults.after(1, 4, _idle, node)
    return node.runs()


def _idle(node: Node) -> None:
    node.turn_delay_us = 0


# --------------------------------------------------------------------------- disks


def _disk_slow(faults: Faults) -> bool:
    node = faults.any_node()
    node.disk.slow_us = faults.random.choice((50_000, 400_000, 1_500_000, 6_000_000))
    faults.after(2, 8, _disk_well, node)
    return True


def _disk_failing(faults: Faults) -> bool:
    node = faults.any_node()
    node.disk.failing = True
    faults.after(1, 8, _disk_well, node)
    return True


def _disk_well(node: Node) -> None:
    node.disk.slow_us = 0
    node.disk.failing = False


def _disk_lost(faults: Faults) -> bool:
    node = faults.random.choice(list(faults.world.nodes.values()))
    if not node.powered:
        return False
    node.disk.cut_power_at_write = True
    faults.after(8, 10, _disk_kept, node)
    faults.after(11, 14, node.power_on)
    return True


def _disk_kept(node: Node) -> None:
    node.disk.cut_power_at_write = False


def _disk_changed(change: Callable[[Node], object]) -> Begin:
    def begin(faults: Faults) -> bool:
        node = faults.any_node()
        if not node.powered or not faults.disk_may_change(node):
            return False
        faults.disk_changed = True
        node.power_off("for its disk")
        change(node)
        faults.after(1.0, 8.0, node.power_on)
        return True

    return begin


def _torn(node: Node) -> None:
    node.world.note(f"{node.role} journal is torn")
    node.disk.tear()


def _replaced(node: Node) -> None:
    node.world.note(f"{node.role} disk is replaced")
    node.disk.replace()


def _restored(node: Node) -> None:
    node.world.note(f"{node.role} disk is restored: {node.disk.restore()} {node.disk.journal}")


# --------------------------------------------------------------------------- paths


def _cut(
    faults: Faults, keys: list[tuple[int, Role]], *, witness: list[Role] | None = None
) -> None:
    network = faults.world.network
    gone = witness or []
    network.cut.add(*keys)
    network.witness_cut.add(*gone)
    faults.world.note(f"cut {[f'{link}:{role}' for link, role in keys]} witness {gone}")

    def mend() -> None:
        network.cut.remove(*keys)
        network.witness_cut.remove(*gone)
        faults.world.note(f"mended {[f'{link}:{role}' for link, role in keys]} witness {gone}")

    until_us = faults.after(0.2, faults.random.choice((1.0, 3.0, 10.0)), mend)
    faults.paths_busy_until_us = max(faults.paths_busy_until_us, until_us)


def _cut_link(faults: Faults) -> bool:
    if not faults.paths():
        return False
    link = faults.random.randrange(LINKS)
    _cut(faults, [(link, role) for role in Role])
    return True


def _cut_oneway(faults: Faults) -> bool:
    if not faults.paths():
        return False
    one = faults.random.choice(list(Role))
    if faults.random.random() < 0.3:
        _cut(faults, [(0, one), (1, one.other)])
    elif faults.witness_only or faults.random.random() < 0.3:
        _cut(faults, [(faults.random.randrange(LINKS), one)])
    else:
        _cut(faults, [(link, one) for link in range(LINKS)])
    return True


def _cut_off(faults: Faults) -> bool:
    """One node is cut off from everything."""
    if not faults.paths():
        return False
    role = faults.any_node().role
    _cut(faults, [(link, r) for link in range(LINKS) for r in Role], witness=[role])
    _cut_broker(faults, role)
    return True


def _cut_direct(faults: Faults) -> bool:
    """All direct paths, while both see the third place: not with a mere witness."""
    if faults.witness_only:
        return False
    _cut(faults, [(link, r) for link in range(LINKS) for r in Role])
    return True


def _cut_broker(faults: Faults, role: Role) -> None:
    broker = faults.world.broker
    if broker is not None:
        broker.cut.add(role)
        faults.after(0.3, faults.random.choice((1.0, 8.0)), broker.cut.remove, role)


def _broker_cut(faults: Faults) -> bool:
    _cut_broker(faults, faults.any_node().role)
    return True


def _witness_gone(faults: Faults) -> bool:
    roles = faults.random.choice(([Role.PRIMARY], [Role.STANDBY], list(Role)))
    faults.world.network.witness_cut.add(*roles)
    faults.after(0.5, 6.0, faults.world.network.witness_cut.remove, *roles)
    return True


def _loss(faults: Faults) -> bool:
    if not faults.paths():
        return False
    network = faults.world.network
    network.loss = [faults.random.uniform(0.05, 0.35) for _ in range(3)]
    _bad_until(faults, _no_loss)
    return True


def _no_loss(world: World) -> None:
    world.network.loss = [0.0, 0.0, 0.0]


def _delay(faults: Faults) -> bool:
    if not faults.paths():
        return False
    slow_us = faults.world.network.slow_us
    for link in range(3):
        slow_us[link] = faults.random.choice((0, 3_000, 30_000, 30_000, 250_000, 500_000))
    _bad_until(faults, _no_delay)
    return any(slow_us)


def _no_delay(world: World) -> None:
    world.network.slow_us = [0, 0, 0]


def _duplicate(faults: Faults) -> bool:
    faults.world.network.twice = faults.random.uniform(0.05, 0.5)
    faults.after(1.0, 8.0, _no_duplicate, faults.world)
    return True


def _no_duplicate(world: World) -> None:
    world.network.twice = 0.0


def _bad_until(faults: Faults, mend: Callable[[World], None]) -> None:
    until_us = faults.after(1.0, 8.0, mend, faults.world)
    faults.paths_busy_until_us = max(faults.paths_busy_until_us, until_us)


def _replay(faults: Faults) -> bool:
    network = faults.world.network
    sender = faults.random.choice(list(Role))
    kept = network.recorded[sender]
    if not kept:
        return False
    for _ in range(4):
        network.replay(sender, faults.random.choice(kept))
    # And its own words come back to a node.
    network.replay(sender.other, faults.random.choice(kept))
    return True


def _probe_loss(faults: Faults) -> bool:
    faults.world.network.probe_losses = 1
    return True


# --------------------------------------------------------------------------- arbiters


def _broker_down(faults: Faults) -> bool:
    broker = faults.world.broker
    if broker is None or not broker.up:
        return False
    restored = faults.random.random() < 0.5
    faults.world.note("the broker is down")
    broker.go_down()
    if restored and broker.snapshots:
        faults.world.fired("broker-restored")
    faults.after(0.3, 8.0, _broker_up, faults.world, restored)
    return True


def _broker_up(world: World, restored: bool) -> None:
    if world.broker is not None and not world.broker.up:
        world.note(f"the broker is up{' with an old snapshot' if restored else ''}")
        world.broker.come_up(restored=restored)


def _fence_bad(faults: Faults) -> bool:
    faults.world.fence.mode = faults.random.choice(("fails", "slow", "hangs"))
    faults.after(4.0, 15.0, _fence_well, faults.world)
    if faults.random.random() < 0.6:
        node = faults.any_node()
        if node.powered:
            _power_cycle(faults, node, 6.0, 15.0)
    return True


def _fence_well(world: World) -> None:
    world.fence.mend()


# --------------------------------------------------------------------------- this machine


def _unfit(faults: Faults) -> bool:
    node = faults.any_node()
    if node.fit is not True or node.engine is None:
        return False
    node.set_fit(False, storage=faults.random.random() < 0.7)
    faults.after(0.3, 6.0, node.set_fit, True)
    return True


def _carrier(faults: Faults) -> bool:
    if not faults.paths():
        return False
    node = faults.any_node()
    if not node.powered:
        return False
    node.set_carrier(False)
    keys = [(0, role) for role in Role]
    network = faults.world.network
    network.cut.add(*keys)
    network.witness_cut.add(node.role)

    def back() -> None:
        network.cut.remove(*keys)
        network.witness_cut.remove(node.role)
        node.set_carrier(True)

    until_us = faults.after(0.3, 5.0, back)
    faults.paths_busy_until_us = max(faults.paths_busy_until_us, until_us)
    return True


def _foreign_address(faults: Faults) -> bool:
    node = faults.any_node()
    if not node.kernel.address_held() or not node.runs():
        return False
    node.address.forget()
    node.kernel.drop_address()
    node.take_address_removed("somebody removed it")
    return True


def _foreign_ruleset(faults: Faults) -> bool:
    node = faults.any_node()
    if not node.kernel.service_open() or not node.runs():
        return False
    node.kernel.drop_service()
    faults.world.at(faults.random.randrange(1_000, 900_000), node.take_ruleset_lost)
    return True


# --------------------------------------------------------------------------- operators


def _activate(faults: Faults) -> bool:
    """The other one is off (then also by force), or both are heard and nobody serves."""
    nodes = list(faults.world.nodes.values())
    faults.random.shuffle(nodes)
    for node in nodes:
        other = faults.world.nodes[node.role.other]
        if not node.runs() or node.accepts() or other.accepts():
            continue
        if not other.powered:
            faults.world.fired("peer-off-word")
            node.command(CommandKind.ACTIVATE, force=faults.random.random() < 0.7)
            return True
    node = nodes[0]
    if not node.runs() or not faults.world.network.clear() or not nodes[1].runs():
        return False
    node.command(CommandKind.ACTIVATE)
    return True


def _maintenance(faults: Faults) -> bool:
    node = faults.random.choice(list(faults.world.nodes.values()))
    if not node.runs():
        return False
    node.command(CommandKind.MAINTENANCE_ON)
    faults.after(0.5, 15.0, _maintenance_off, node)
    if faults.random.random() < 0.4:
        # Then the serving one too, on the other's promise.
        faults.after(0.3, 3.0, _maintenance_on, faults.world.nodes[node.role.other])
        faults.after(4.0, 15.0, _maintenance_off, faults.world.nodes[node.role.other])
    return True


def _maintenance_on(node: Node) -> None:
    node.command(CommandKind.MAINTENANCE_ON)


def _maintenance_off(node: Node) -> None:
    if node.phase() is Phase.MAINTENANCE:
        node.command(CommandKind.MAINTENANCE_OFF)


def _confirm_down(faults: Faults) -> bool:
    """The operator says so only when it is true: the machine is off when the word is spoken."""
    node = faults.any_node()
    other = faults.world.nodes[node.role.other]
    if not node.runs():
        return False
    if other.powered:
        if faults.random.random() < 0.5:
            return False
        faults.world.at(0, other.power_off)
        faults.after(3.0, 12.0, other.power_on)
    faults.world.at(faults.random.randrange(1_000, 2_500_000), _confirm, node, other)
    return True


def _confirm(node: Node, other: Node) -> None:
    if not other.powered:
        node.world.disturb()
        node.command(CommandKind.CONFIRM_PEER_DOWN)


def _handover(faults: Faults) -> bool:
    """The service is moved, asked for on either node; sometimes the operator thinks again."""
    world = faults.world
    serving = [node for node in world.nodes.values() if node.accepts()]
    if not serving:
        return False
    to = serving[0].role.other
    node = faults.random.choice(list(world.nodes.values()))
    node.command(CommandKind.HANDOVER, to=to)
    if faults.random.random() < 0.2:
        faults.after(0.01, 4.0, _abort, faults.random.choice(list(world.nodes.values())))
    return True


def _abort(node: Node) -> None:
    node.command(CommandKind.ABORT)


KINDS = (
    Kind("crash", 8, _crash),
    Kind("crash-boundary", 8, _crash_boundary, counted=False),
    Kind("crash-boundary", 8, _crash_on_row, counted=False),
    Kind("restart", 7, _restart),
    Kind("stop", 4, _stop),
    Kind("power", 10, _power),
    Kind("power-both", 2, _power_both),
    Kind("pause", 9, _pause),
    Kind("machine-pause", 6, _freeze_machine),
    Kind("driver-pause", 6, _driver_pause, counted=False),
    Kind("busy", 3, _busy),
    Kind("disk-slow", 5, _disk_slow),
    Kind("disk-failing", 5, _disk_failing),
    Kind("disk-lost", 3, _disk_lost, counted=False),
    Kind("disk-torn", 2, _disk_changed(_torn)),
    Kind("disk-replaced", 2, _disk_changed(_replaced)),
    Kind("disk-restored", 2, _disk_changed(_restored)),
    Kind("cut-link", 5, _cut_link),
    Kind("cut-oneway", 8, _cut_oneway),
    Kind("cut-off", 8, _cut_off),
    Kind("cut-direct", 6, _cut_direct),
    Kind("broker-cut", 6, _broker_cut, needs="token"),
    Kind("witness-gone", 4, _witness_gone),
    Kind("loss", 5, _loss),
    Kind("delay", 5, _delay),
    Kind("duplicate", 3, _duplicate),
    Kind("replay", 4, _replay, counted=False),
    Kind("probe-loss", 3, _probe_loss, counted=False),
    Kind("broker-down", 8, _broker_down, needs="token"),
    Kind("fence-bad", 8, _fence_bad, needs="agent"),
    Kind("unfit", 5, _unfit),
    Kind("carrier", 4, _carrier),
    Kind("foreign-address", 2, _foreign_address),
    Kind("foreign-ruleset", 2, _foreign_ruleset, needs="lease"),
    Kind("activate", 4, _activate),
    Kind("maintenance", 5, _maintenance),
    Kind("confirm-down", 4, _confirm_down),
    Kind("handover", 30, _handover),
)
"""All kinds; a run of at least 1,000 seeds in which one never struck fails."""

MUST_FIRE = frozenset({kind.name for kind in KINDS}) | {
    "broker-restored",
    "fence-fails",
    "fence-slow",
    "fence-hangs",
    "clock-rate",
    "sync",
    "resync",
    "receiver-killed",
    "receiver-stuck",
    "presync-failed",
    "proof-failed",
    "freeze-failed",
    "thaw-failed",
    "freeze-hangs",
    "thaw-slow",
    *HANDOVER_ROWS.values(),
    "hook-failed",
    "hook-killed",
    "hook-slow",
    "mount-refused",
}
"""Every fault that such a run must have seen."""

"""What lies between the nodes: links, the VIP's own segment, the third place, recordings.

Link 0 runs on the VIP's network: what cuts it cuts the surveys too. With a token there is one link
more, the relay through the broker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from nfsha.core.model import Datagram, Heard, Role, Surveyed, WitnessAnswered

if TYPE_CHECKING:
    from tests.sim.node import Node
    from tests.sim.world import World

RECORDINGS_KEPT = 64
RECORD_EACH = 16
LINKS = 2
RELAY = 2
NAMES = ("vip-net", "cross", "relay")


Key = TypeVar("Key")


class Cuts(dict[Key, int]):
    """What is cut, and by how many faults at once."""

    def add(self, *keys: Key) -> None:
        """One more fault cuts these."""
        for key in keys:
            self[key] = self.get(key, 0) + 1

    def remove(self, *keys: Key) -> None:
        """One fault less."""
        for key in keys:
            left = self.pop(key, 0) - 1
            if left > 0:
                self[key] = left


class Network:
    """The paths, and what is wrong with them. Directions are named by their sender."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.cut: Cuts[tuple[int, Role]] = Cuts()
        self.loss = [0.0, 0.0, 0.0]
        self.slow_us = [0, 0, 0]
        """Up to so much is added to a datagram's way."""
        self.twice = 0.0
        self.witness_cut: Cuts[Role] = Cuts()
        self.probe_losses = 0
        """So many of the next probes of the VIP get lost."""
        self.recorded: dict[Role, list[Datagram]] = {role: [] for role in Role}
        self._sent = 0

    # ------------------------------------------------------------- heartbeats

    def send(self, sender: Role, datagram: Datagram) -> None:
        """Sends one datagram on every link."""
        self._sent += 1
        if self._sent % RECORD_EACH == 0:
            kept = self.recorded[sender]
            kept.append(datagram)
            del kept[:-RECORDINGS_KEPT]
        world = self._world
        broker = world.broker
        for link in range(LINKS):
            if (link, sender) not in self.cut:
                self._carry(link, sender, datagram)
        if broker is not None and broker.reaches(sender) and broker.reaches(sender.other):
            self._carry(RELAY, sender, datagram)

    def _carry(self, link: int, sender: Role, datagram: Datagram) -> None:
        random = self._world.random.random
        loss = self.loss[link]
        if loss and random() < loss:
            return
        delay_us = 80 + int(random() * 250)
        if link == RELAY:
            delay_us += 600
        if self.slow_us[link]:
            delay_us += int(random() * self.slow_us[link])
        target = self._world.nodes[sender.other]
        heard = Heard(datagram, NAMES[link])
        self._world.at(delay_us, target.take, heard)
        if self.twice and random() < self.twice:
            self._world.at(delay_us + int(random() * 50_000), target.take, heard)

    def replay(self, sender: Role, datagram: Datagram) -> None:
        """A recorded datagram comes again."""
        self._world.at(100, self._world.nodes[sender.other].take_replay, Heard(datagram, "replay"))

    def clear(self) -> bool:
        """Is nothing wrong with any path?"""
        return not (
            self.cut or any(self.loss) or any(self.slow_us) or self.twice or self.witness_cut
        )

    def heal(self) -> None:
        """Ends all that is wrong."""
        self.cut.clear()
        self.witness_cut.clear()
        self.loss = [0.0, 0.0, 0.0]
        self.slow_us = [0, 0, 0]
        self.twice = 0.0
        self.probe_losses = 0

    # ------------------------------------------------------------- the VIP's segment

    def survey(self, asker: Node, done: Callable[[Surveyed], None], rounds: int, ms: int) -> None:
        """Probes for the VIP in rounds; the answer comes `ms` after the start."""
        started_ms = asker.local_ms()
        found: list[str] = []
        heard: list[bool] = []

        def probe() -> None:
            if self.probe_losses:
                self.probe_losses -= 1
                self._world.fired("probe-loss")
            elif self._answers(asker):
                found.append("02:00:00:00:00:01")
            heard.append(self.witness_reached(asker.role))

        def end() -> None:
            done(Surveyed(started_ms, asker.local_ms(), found[0] if found else None, any(heard)))

        for number in range(rounds):
            self._world.at(ms * 1000 * number // rounds + 50, probe)
        self._world.at(ms * 1000, end)

    def _answers(self, asker: Node) -> bool:
        """Does the other node's kernel answer a probe of this one now?"""
        other = self._world.nodes[asker.role.other]
        if (0, asker.role) in self.cut or (0, other.role) in self.cut:
            return False
        random = self._world.random.random
        if self.loss[0] and (random() < self.loss[0] or random() < self.loss[0]):
            return False
        return other.powered and not other.frozen and other.kernel.address_held()

    # ------------------------------------------------------------- the third place

    def witness_reached(self, role: Role) -> bool:
        """Does the gateway answer this node now?"""
        return role not in self.witness_cut

    def ask_witness(self, node: Node) -> None:
        """One request to the gateway."""
        if self.witness_reached(node.role):
            delay_us = 300 + int(self._world.random.random() * 1500)
            self._world.at(delay_us, node.take, WitnessAnswered("gateway", node.local_ms()))

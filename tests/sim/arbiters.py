"""What stands between the nodes and proves exclusivity: the broker with its token, fence agents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nfsha.core.model import (
    Completed,
    Epoch,
    FenceReported,
    RecordRead,
    Role,
    TokenAcked,
    TokenChanged,
)
from tests.sim.network import Cuts

if TYPE_CHECKING:
    from tests.sim.node import Node
    from tests.sim.world import World

CONNECT_LIMIT_US = 1_500_000
PING_LIMIT_US = 2_000_000
SNAPSHOTS_KEPT = 16
HANG_LIMIT_US = 20_000_000
"""The driver's own limit for a fence agent."""


@dataclass(frozen=True, slots=True)
class Record:
    """The retained authority record."""

    epoch: Epoch
    nonce: int


class Broker:
    """One MQTT broker: a client id belongs to its newest connection, the older one is closed."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.up = True
        self.cut: Cuts[Role] = Cuts()
        self.holder: Connection | None = None
        self.record: Record | None = None
        self.snapshots: list[Record] = []
        self.kicked = 0

    def reaches(self, role: Role) -> bool:
        """Can this node and the broker talk?"""
        return self.up and role not in self.cut

    def connect(self, connection: Connection) -> None:
        """A connection under the authority's client id arrives."""
        older = self.holder
        self.holder = connection
        if older is not None:
            self.kicked += 1
            self._world.at(self._way_us(), older.closed_by_broker)

    def store(self, record: Record) -> None:
        """A retained message; every connected client sees it."""
        self.record = record
        self.snapshots.append(record)
        del self.snapshots[:-SNAPSHOTS_KEPT]
        for node in self._world.nodes.values():
            if self.reaches(node.role):
                self._world.at(self._way_us(), node.take, RecordRead(record.epoch))

    def go_down(self) -> None:
        """All connections end; who is reached learns it at once."""
        holder, self.holder = self.holder, None
        if holder is not None and self.reaches(holder.node.role):
            self._world.at(self._way_us(), holder.closed_by_broker)
        self.up = False

    def come_up(self, *, restored: bool) -> None:
        """The broker is back, with what it remembers."""
        self.up = True
        if restored and self.snapshots:
            self.record = self._world.random.choice(self.snapshots)
        if self.record is not None:
            for node in self._world.nodes.values():
                if self.reaches(node.role):
                    self._world.at(self._way_us(), node.take, RecordRead(self.record.epoch))

    def _way_us(self) -> int:
        return 100 + self._world.random.randrange(900)


class Connection:
    """One token connection of one node: pings each interval, and publishes the record."""

    def __init__(self, node: Node, number: int) -> None:
        self.node = node
        self._world = node.world
        self._life = node.life
        self._number = number
        self._broker = node.broker()
        self.open = False
        self._asked = True
        self._nonce = 0
        self._silent_since_us = self._world.now_us
        self._world.at(self._way_us(), self._arrive)
        self._world.at(CONNECT_LIMIT_US, self._connect_limit)

    def drop(self) -> None:
        """The own side closes it."""
        self._asked = False
        if self.open:
            self.open = False
            self._world.at(self._way_us(), self._closed_at_broker)

    def closed_by_broker(self) -> None:
        """The broker closed it: the node learns it if it can be reached."""
        if not self._mine() or not self.open:
            return
        if not self._broker.reaches(self.node.role) and self._broker.up:
            return  # found out by the missing acknowledgements
        self._lost()

    def publish(self, epoch: Epoch) -> None:
        """Publishes the record with a new nonce; its acknowledgement is a `TokenAcked`."""
        if self.open:
            self._nonce = self._world.random.getrandbits(48)
            self._send(Record(epoch, self._nonce))

    # ------------------------------------------------------------- inside

    def _way_us(self) -> int:
        return 100 + self._world.random.randrange(900)

    def _mine(self) -> bool:
        return self._life == self.node.life and self.node.token is self

    def _arrive(self) -> None:
        if not self._asked or not self._broker.reaches(self.node.role):
            return
        if self._life == self.node.life:
            self._broker.connect(self)
            self._world.at(self._way_us(), self._connected, self._broker.record)

    def _connected(self, record: Record | None) -> None:
        if not self._mine() or not self._asked or self._broker.holder is not self:
            return
        node = self.node
        self.open = True
        self._silent_since_us = self._world.now_us
        own = (
            record is not None
            and record.nonce == node.last_nonce
            and node.shown_epoch() == record.epoch
        )
        if record is not None:
            node.take(RecordRead(record.epoch))
        node.take(Completed(self._number, TokenChanged(node.local_ms(), own_record=own)))
        self._ping()

    def _connect_limit(self) -> None:
        if self._mine() and self._asked and not self.open:
            self.node.take(Completed(self._number, TokenChanged(None)))

    def _ping(self) -> None:
        if not self._mine() or not self.open:
            return
        if self._world.now_us - self._silent_since_us > PING_LIMIT_US:
            self._lost()
            return
        if self.node.runs():
            self._send(None)
        self._world.at(self.node.interval_us, self._ping)

    def _send(self, record: Record | None) -> None:
        self._world.at(self._way_us(), self._at_broker, record, self.node.local_ms())

    def _at_broker(self, record: Record | None, sent_ms: int) -> None:
        if self._broker.holder is not self or not self._broker.reaches(self.node.role):
            return
        if record is not None:
            self._broker.store(record)
        self._world.at(self._way_us(), self._acknowledged, record, sent_ms)

    def _acknowledged(self, record: Record | None, sent_ms: int) -> None:
        if not self._mine() or not self.open or not self._broker.reaches(self.node.role):
            return
        self._silent_since_us = self._world.now_us
        if record is not None:
            self.node.last_nonce = record.nonce
        self.node.take(TokenAcked(sent_ms))

    def _closed_at_broker(self) -> None:
        if self._broker.holder is self and self._broker.reaches(self.node.role):
            self._broker.holder = None

    def _lost(self) -> None:
        self.open = False
        self.node.take(TokenChanged(None))


class FenceAgent:
    """Switches the other node off; `mode` is works, fails, slow or hangs."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.mode = "works"
        self.offs = 0
        self._hanging: tuple[Node, int, int] | None = None

    def mend(self) -> None:
        """The agent works again; what hangs ends with a failure."""
        self.mode = "works"
        if self._hanging is not None:
            self._hung(self._hanging)

    def _hung(self, what: tuple[Node, int, int]) -> None:
        if what is self._hanging:
            self._hanging = None
            node, life, number = what
            if life == node.life:
                node.take(Completed(number, FenceReported(off=False, detail="no end")))

    def off(self, node: Node, number: int) -> None:
        """Runs the agent of this node."""
        random = self._world.random
        node.fencing = number
        if self.mode == "hangs":
            self._world.fired("fence-hangs")
            self._hanging = (node, node.life, number)
            self._world.at(HANG_LIMIT_US, self._hung, self._hanging)
            return
        took_us = random.randrange(150_000, 1_200_000)
        if self.mode == "slow":
            self._world.fired("fence-slow")
            took_us += random.randrange(1_000_000, 8_000_000)
        self._world.at(took_us, self._end, node, node.life, number)

    def _end(self, node: Node, life: int, number: int) -> None:
        if node.fencing != number:
            return  # it was killed, for nobody awaits its result any more
        node.fencing = None
        off = self.mode != "fails"
        if off:
            self.offs += 1
            other = self._world.nodes[node.role.other]
            if other.powered:
                self._world.note(f"{node.role} fences {node.role.other}")
                other.power_off("fenced")
                most_us = 4_000_000 if self._world.healed else 9_000_000
                back_us = self._world.random.randrange(2_000_000, most_us)
                self._world.at(back_us, other.power_on)
        else:
            self._world.fired("fence-fails")
        if life == node.life:
            node.take(
                Completed(number, FenceReported(off, "status says off" if off else "refused"))
            )

"""A node's volumes: who wrote what there, whose data it is by its stamp, and the receiver.

The data is the set of numbered client writes. A pass takes the source's set as it was at its start
and lands in two parts, so that one that is killed leaves half of it. What a resync would destroy
goes to quarantine, as the real one does. The volumes survive the loss of the system disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nfsha.core.model import (
    Completed,
    Epoch,
    FinalChanged,
    Frozen,
    PresyncChanged,
    ReceiversStopped,
    ReplicaChanged,
    Thawed,
)
from nfsha.core.replication import Approach, Fetch, Finish, Offer, flow

if TYPE_CHECKING:
    from tests.sim.node import Node

LINK = 1
"""The path that the data takes."""

PAUSE_US = 700_000
"""Between two passes."""


class Volumes:
    """One node's data, and the process that receives some."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._world = node.world
        self.holds: set[int] = set()
        self.quarantined: set[int] = set()
        self.stamp: Epoch | None = None
        self.tainted = False
        self.frozen = False
        """Read-only, until a thaw, a new daemon or a boot."""
        self.finish_takes_us: int | None = None
        self.approach_hangs = False
        """A scenario's word on how long the last pass takes; None: chance decides."""
        self.freeze_takes_us: int | None = None
        self.thaw_takes_us: int | None = None
        self.thaws_to_fail = 0
        """A scenario's: so many of the next ones."""
        self.mishaps = True
        """A pass, a proof, a freeze or a thaw may fail by chance; in a scenario none does."""
        self.receiving: Epoch | None = None
        """The epoch whose data a process of this node writes into the volumes now."""
        self._pass = 0
        self.passes = 0
        """How many were complete."""
        self._passes_at_begin = 0
        self._freezing = 0
        """The number of the freeze that is under way."""
        self._snapshot: set[int] = set()
        self._resync = False
        self._source_life = 0
        self._looked = False
        self._approached: Epoch | None = None
        self._finishing: Epoch | None = None
        self._told: ReplicaChanged | None = None
        self._next_us = 0
        self.kill_takes_us: int | None = None
        """A scenario's word on how long a kill takes; None: chance decides."""
        self.look_takes_us: int | None = None

    # ------------------------------------------------------------- the daemon's side

    def daemon_started(self) -> None:
        """A new daemon looks at the volumes a moment later."""
        self._looked = False
        self._told = None
        self.frozen = False
        self._approached = None
        self._finishing = None
        look_us = self.look_takes_us or self._world.random.randrange(1_000, 400_000)
        self._world.at(look_us, self._look, self._node.life)

    def daemon_ended(self) -> None:
        """Its children die with it, at once; or the machine is off."""
        self._stop()

    def _look(self, life: int) -> None:
        if life == self._node.life:
            self._looked = True
            self.tell()

    def tell(self) -> None:
        """Tells the engine what the volumes are, when that changed."""
        engine = self._node.engine
        if engine is None or not self._looked or not engine.state.config.replication:
            return
        epoch = engine.state.durable.epoch
        whole = self.stamp is not None and self.stamp == epoch and not self.tainted
        why = "" if whole else "as the stamp says"
        found = ReplicaChanged(whole, why, self.stamped, epoch, self.stamp)
        if found != self._told:
            self._told = found
            self._node.take(found)

    @property
    def stamped(self) -> bool:
        """Does a volume bear a stamp?"""
        return self.stamp is not None

    def turn(self) -> None:
        """After a turn of the engine: data flows as the state says."""
        engine = self._node.engine
        if engine is None:
            return
        way = flow(engine.state, self._node.local_ms())
        if isinstance(way, Offer) and not self._newer(way.epoch):
            self.stamp, self.tainted = way.epoch, False
        if not isinstance(way, Fetch | Approach | Finish) or way.epoch != self.receiving:
            self._kill_soon()
        if isinstance(way, Fetch) and way.proved and self._looked and self.stamp != way.epoch:
            self.stamp, self.tainted = way.epoch, False
        if isinstance(way, Fetch) and way.start and self._looked:
            self._begin(way.epoch)
        if isinstance(way, Approach) and self._looked and way.more and not self.approach_hangs:
            self._begin(way.epoch)
            self._approach(way)
        if isinstance(way, Finish) and self._finishing != way.handover:
            self._finishing = way.handover
            self._kill_soon()
            finish_us = self.finish_takes_us or self._world.random.randrange(20_000, 1_500_000)
            self._world.at(finish_us, self._finish, self._node.life, way)
        self.tell()

    # ------------------------------------------------------------- a handover

    def _approach(self, way: Approach) -> None:
        """Near enough once a pass that began after the handover did is complete."""
        if self._approached is None or self._approached != way.handover:
            self._approached = way.handover
            self._next_us = 0
            self._passes_at_begin = self.passes
            if self._mishap(0.05):
                self._world.fired("presync-failed")
                self._node.take(PresyncChanged(way.handover, ready=False, failed="by chance"))
        if self.passes > self._passes_at_begin and self.receiving is None:
            self._node.take(PresyncChanged(way.handover, ready=True))

    def _finish(self, life: int, way: Finish) -> None:
        """The last pass, and the proof."""
        node, world = self._node, self._world
        engine = node.engine
        if life != node.life or engine is None:
            return
        if not node.runs():
            world.at(50_000, self._finish, life, way)
            return
        if flow(engine.state, node.local_ms()) != way:
            return
        source = world.nodes[node.role.other]
        failed = "" if self._reaches(source, way.epoch) else "the source is not reached"
        if not failed and self._mishap(0.05):
            world.fired("proof-failed")
            failed = "a difference was found"
        if not failed:
            self._resync = self.tainted
            gone = sorted(self.holds - source.volumes.holds)
            self._write(gone, sorted(source.volumes.holds - self.holds))
            self.receiving = None
        node.take(FinalChanged(way.handover, proved=not failed, failed=failed))

    def freeze(self, number: int) -> None:
        """The action: waits for rest, and makes the volumes read-only."""
        random = self._world.random
        takes_us = self.freeze_takes_us or random.choice((5_000, 30_000, 200_000, 900_000))
        if self._mishap(0.04):
            self._world.fired("freeze-hangs")
            takes_us = 20_000_000
        self._freezing = number
        self._world.at(takes_us, self._froze, self._node.life, number)

    def _froze(self, life: int, number: int) -> None:
        if life != self._node.life or number != self._freezing:
            return
        if not self._node.runs():
            self._world.at(50_000, self._froze, life, number)
            return
        failed = self._mishap(0.04)
        if failed:
            self._world.fired("freeze-failed")
        self.frozen = True
        self._node.take(Completed(number, Frozen(not failed, "busy" if failed else "")))

    def thaw(self, number: int) -> None:
        """The action: the volumes take writes again."""
        self._freezing = 0
        takes_us = self.thaw_takes_us or self._world.random.randrange(500, 30_000)
        if self._mishap(0.04):
            self._world.fired("thaw-slow")
            takes_us = self._world.random.randrange(100_000, 5_000_000)
        self._world.at(takes_us, self._thawed, number)

    def _thawed(self, number: int) -> None:
        failed = self._mishap(0.04) or self.thaws_to_fail > 0
        if failed:
            self.thaws_to_fail = max(0, self.thaws_to_fail - 1)
            self._world.fired("thaw-failed")
        else:
            self.frozen = False
        self._node.take(Completed(number, Thawed(not failed, "busy" if failed else "")))

    def _mishap(self, chance: float) -> bool:
        return self._world.random.random() < chance and self.mishaps

    def stop_receivers(self, number: int) -> None:
        """The action: kills, waits, and says that all are gone."""
        delay_us = self._kill_us() if self.receiving is not None else self.kill_takes_us or 500
        self._world.at(delay_us, self._stopped, self._node.life, number)

    def _stopped(self, life: int, number: int) -> None:
        if life != self._node.life:
            return
        if not self._node.runs():
            self._world.at(50_000, self._stopped, life, number)
            return
        self._stop()
        self._node.take(Completed(number, ReceiversStopped(ok=True)))

    def _kill_soon(self) -> None:
        if self.receiving is not None:
            self._world.at(self._kill_us(), self._killed, self._pass)

    def _kill_us(self) -> int:
        """A kill is quick, but for a process that waits for its disk."""
        if self.kill_takes_us is not None:
            return self.kill_takes_us
        random = self._world.random
        if random.random() < 0.05:
            self._world.fired("receiver-stuck")
            self._world.disturb()
            return random.randrange(100_000, 15_000_000)
        return random.randrange(500, 40_000)

    def _killed(self, number: int) -> None:
        if number == self._pass:
            self._stop()

    def _stop(self) -> None:
        if self.receiving is not None:
            self._world.fired("receiver-killed")
        self.receiving = None
        self._pass += 1

    # ------------------------------------------------------------- a pass

    def _begin(self, epoch: Epoch) -> None:
        world = self._world
        if self.receiving is not None or world.now_us < self._next_us:
            return
        stamp = self.stamp
        if stamp is not None and stamp.number >= epoch.number and stamp != epoch:
            return  # newer data, or another history: nothing may be written over it
        source = world.nodes[self._node.role.other]
        if not self._reaches(source, epoch):
            self._next_us = world.now_us + PAUSE_US
            return
        self._pass += 1
        self.receiving = epoch
        self._resync = stamp != epoch
        self._snapshot = set(source.volumes.holds)
        if self._resync:
            self.tainted = True
        world.at(world.random.randrange(50_000, 900_000), self._half, self._pass)

    def _reaches(self, source: Node, epoch: Epoch) -> bool:
        """Is the source's rsync daemon there, with this epoch's secret?"""
        cut = self._world.network.cut
        if (LINK, source.role) in cut or (LINK, self._node.role) in cut:
            return False
        engine = source.engine
        if engine is None or not source.powered or source.frozen:
            return False
        way = flow(engine.state, source.local_ms())
        return isinstance(way, Offer) and way.epoch == epoch == source.volumes.stamp

    def _newer(self, epoch: Epoch) -> bool:
        """Such volumes are not offered, nor stamped: their data belongs to another history."""
        stamp = self.stamp
        return stamp is not None and stamp.number >= epoch.number and stamp != epoch

    def _half(self, number: int) -> None:
        """Half of what differs has landed."""
        if not self._goes_on(number, self._half):
            return
        gone = sorted(self.holds - self._snapshot)[::2]
        came = sorted(self._snapshot - self.holds)[::2]
        self._write(gone, came)
        world = self._world
        world.at(world.random.randrange(50_000, 900_000), self._end, number)

    def _end(self, number: int) -> None:
        if not self._goes_on(number, self._end):
            return
        epoch = self.receiving
        source = self._world.nodes[self._node.role.other]
        if epoch is None or not self._reaches(source, epoch):
            self._stop()  # cut off before the end: it reports a broken stream, and begins anew
            return
        self._write(sorted(self.holds - self._snapshot), sorted(self._snapshot - self.holds))
        self.stamp, self.tainted = epoch, False
        self.receiving = None
        self.passes += 1
        self._next_us = self._world.now_us + PAUSE_US
        self._world.fired("resync" if self._resync else "sync")
        self.tell()

    def _goes_on(self, number: int, again: object) -> bool:
        """The receiver is a process of its own: it goes on beside a stopped daemon."""
        if number != self._pass or self.receiving is None or not self._node.powered:
            return False
        if self._node.frozen:
            self._world.at(100_000, again, number)  # type: ignore[arg-type]
            return False
        return True

    def _write(self, gone: list[int], came: list[int]) -> None:
        if self.frozen:
            self._world.checks.fail("freeze", f"{self._node.role} receives into frozen volumes")
        if self._node.accepts():
            self._world.checks.fail("I3", f"{self._node.role} receives data while it serves")
        self.holds.difference_update(gone)
        self.holds.update(came)
        if self._resync:
            self.quarantined.update(gone)
        self._world.checks.nothing_destroyed(gone)

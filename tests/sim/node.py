"""One machine: its clock, kernel, disk, daemon and shell. The production engine decides.

The shell is the simplest that keeps the daemon's promises: all inputs are drained before the
timers, a decision's actions run in their order, kernel calls one after the other. It can be killed
before each action, stopped between a look at the clock and a system call, and frozen as a whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nfsha.core import model
from nfsha.core.engine import Decision, Engine, begin
from nfsha.core.model import (
    AddressChanged,
    Command,
    CommandKind,
    Completed,
    CoreConfig,
    FitChanged,
    Input,
    LeaseHeld,
    LeaseLost,
    Numbered,
    Phase,
    Role,
)
from tests.sim.arbiters import Broker, Connection
from tests.sim.block import TIMEOUT_MS, Block
from tests.sim.disk import Disk
from tests.sim.kernel import AddressDriver, Kernel, ServiceDriver
from tests.sim.replica import Volumes

if TYPE_CHECKING:
    from tests.sim.world import World

INBOX_MAX = 4096
SURVEY_ROUNDS = 3
KERNEL_ACTIONS = (
    model.AddAddress,
    model.RenewAddress,
    model.RemoveAddress,
    model.OpenService,
    model.RenewService,
    model.CloseService,
    model.ExtendLeases,
)
PERCENT_PPM = 10_000


@dataclass(slots=True)
class DriverPause:
    """A stop signal that strikes inside the next kernel call, at its n-th boundary."""

    boundary: int
    long_us: int


class Node:
    """A machine of the pair."""

    survey_rounds = SURVEY_ROUNDS
    """One in the mutant of trace 2."""

    def __init__(self, world: World, role: Role, rate_ppm: int) -> None:
        self.world = world
        self.role = role
        self.rate_ppm = rate_ppm
        self.life = 0
        self.powered = False
        self.frozen = False
        self.stopped = False
        self.engine: Engine | None = None
        self.disk = Disk(self)
        self.volumes = Volumes(self)
        self.block = Block(self)
        self.kernel = Kernel(self)
        self.address = AddressDriver(self)
        self.service = ServiceDriver(self, has_lease=world.config.service_lease)
        self.interval_us = world.config.timings.interval_ms * 1000
        self.fit: bool | None = True
        self.carrier = True
        self.token: Connection | None = None
        self.last_nonce = -1
        self.fencing: int | None = None
        """The number of the fence action whose agent runs."""
        # faults in wait
        self.crash_in_actions: int | None = None
        self.crash_at_row_in: int | None = None
        """Armed: killed so many actions after the first of a decision that changed the phase."""
        self.driver_pause: DriverPause | None = None
        self.turn_delay_us = 0
        # what the checks look at
        self.accepting_from_us: int | None = None
        self.accepting_until_us = 0
        self.thawed_us = -(10**12)
        self.thawed_life = 0
        self.resumed_us = 0
        self.continued_us = 0
        self.late_call = False
        self.extended_until_ms = 0
        self.last_turn_ms = 0
        self.released_us: int | None = None
        self.exits: str = ""
        # inside
        self._boots = 0
        self._clock_base_us = 0
        self._clock_origin_us = 0
        self._inbox: list[Input] = []
        self._turn_at_us: int | None = None
        self._calls: deque[Numbered] = deque()
        self._calling = False
        self._call: Iterator[LeaseHeld | LeaseLost | None] | None = None
        self._call_number = 0
        self._call_boundary = 0
        self._watched_us = -1

    # ------------------------------------------------------------- clock

    def local_us(self) -> int:
        """This machine's CLOCK_BOOTTIME, in microseconds."""
        if self.frozen:
            return self._clock_base_us
        passed_us = self.world.now_us - self._clock_origin_us
        return self._clock_base_us + passed_us + passed_us * self.rate_ppm // 1_000_000

    def local_ms(self) -> int:
        """The same in whole milliseconds."""
        return self.local_us() // 1000

    def world_us(self, local_us: int) -> int:
        """When this machine's clock shows `local_us`, by the world's time."""
        ahead_us = local_us - self._clock_base_us
        return self._clock_origin_us + ahead_us * 1_000_000 // (1_000_000 + self.rate_ppm) + 1

    def broker(self) -> Broker:
        """The broker; only asked where one is configured."""
        broker = self.world.broker
        if broker is None:
            raise ValueError("no broker in this world")
        return broker

    # ------------------------------------------------------------- power

    def power_on(self, daemon_after_us: int = 300_000) -> None:
        """The machine boots."""
        if self.powered:
            return
        self.powered = True
        self.frozen = self.stopped = False
        self.life += 1
        self._boots += 1
        self._clock_base_us = self.world.random.randrange(1_000_000, 4_000_000)
        self._clock_origin_us = self.world.now_us
        self.kernel.lose_power()
        self.world.at(daemon_after_us, self.start_daemon, self.life)

    def power_off(self, why: str = "power") -> None:
        """The machine is off at this instant."""
        if not self.powered:
            return
        self.world.note(f"{self.role} loses power ({why})")
        self.disk.drop_power()
        self.kernel.lose_power()
        self.volumes.frozen = False
        self.powered = self.frozen = False
        self._end_daemon()
        self.block.power_lost()
        self.locks_changed()
        self.world.power_lost(self)

    def power_off_during_write(self) -> None:
        """The power goes while the journal is being written."""
        if self.powered:
            self.world.fired("disk-lost")
            self.world.disturb()
            self.power_off("during a write")

    def freeze(self) -> None:
        """The whole machine is paused from outside, clock and all."""
        if self.powered and not self.frozen:
            self._clock_base_us = self.local_us()
            self.frozen = True
            self.locks_changed()

    def thaw(self) -> None:
        """The paused machine goes on as if nothing had been."""
        if self.powered and self.frozen:
            self._clock_origin_us = self.world.now_us
            self.frozen = False
            self.thawed_us = self.world.now_us
            self.thawed_life = self.life
            self.locks_changed()
            self._wake_up()

    # ------------------------------------------------------------- the daemon

    def boot_id(self) -> str:
        """The kernel's boot id."""
        return f"{self.role}-boot-{self._boots}"

    def runs(self) -> bool:
        """Is the daemon there, and does it get the processor?"""
        return self.engine is not None and not self.stopped and not self.frozen and self.powered

    def start_daemon(self, life: int | None = None) -> None:
        """Systemd starts the daemon."""
        if life is not None and life != self.life:
            return
        if not self.powered or self.engine is not None:
            return
        if self.frozen:
            self.world.at(200_000, self.start_daemon, life)
            return
        self.life += 1
        world = self.world
        config = world.config
        own = CoreConfig(
            role=self.role,
            boot_id=self.boot_id(),
            timings=config.timings,
            exclusivity=config.exclusivity,
            service_lease=config.service_lease,
            start_alone_after_ms=config.start_alone_after_ms,
            replication=config.replication,
            hook_timeout_ms=TIMEOUT_MS if config.hooks else None,
        )
        held = self.kernel.address_held()
        self.address = AddressDriver(self)
        if held:
            self.address.adopt()
        self.exits = ""
        self.last_turn_ms = self.local_ms()
        state = begin(
            own,
            world.random.getrandbits(63) + 1,
            self.local_ms(),
            journal=self.disk.journal,
            corrupt=self.disk.corrupt,
            address_held=held,
        )
        self.engine = Engine(state)
        world.note(f"{self.role} daemon starts, address {'held' if held else 'not held'}")
        self._inbox = [FitChanged(self.fit, "as the world says")]
        if not self.carrier:
            self._inbox.append(model.CarrierChanged(False))
        broker = world.broker
        if broker is not None and broker.record is not None and broker.reaches(self.role):
            self._inbox.append(model.RecordRead(broker.record.epoch))
        self._schedule(50)
        self.volumes.daemon_started()
        if held:
            self.watch_address()

    def crash(self) -> None:
        """Kill -9; the kernel goes on."""
        if self.engine is None:
            return
        if self.disk.in_flight() and self.world.random.random() < 0.5:
            self.disk.complete_silently()
        self._end_daemon()

    def stop(self) -> None:
        """SIGSTOP."""
        if self.engine is not None:
            self.stopped = True

    def go_on(self) -> None:
        """SIGCONT."""
        if self.stopped:
            self.stopped = False
            self.continued_us = self.world.now_us
            self._wake_up()

    def command(
        self,
        kind: CommandKind,
        *,
        force: bool = False,
        keep: Role | None = None,
        to: Role | None = None,
    ) -> None:
        """An operator, or systemd, asks."""
        words = f"{kind}{' --force' if force else ''}{f' to {to}' if to else ''}"
        self.world.note(f"{self.role} is asked: {words}")
        self.take(Command(kind, self.world.next_command(), force, keep, to))

    def _end_daemon(self) -> None:
        self.life += 1
        self.world.checks.forget(self)
        self.engine = None
        self.stopped = False
        self._inbox = []
        self.volumes.daemon_ended()
        self.block.daemon_ended()
        self._turn_at_us = None
        self._calls.clear()
        self._calling = False
        self._call = None
        self.late_call = False
        token, self.token = self.token, None
        if token is not None and self.powered:
            token.drop()
        self.last_nonce = -1
        self.disk.forget_results()

    def _wake_up(self) -> None:
        if self.engine is None or not self.runs():
            return
        if self._call is not None:
            self.world.at(120, self._resume_call, self.life)
        elif self._calling:
            self.world.at(120, self._next_call, self.life)
        self._schedule(100)

    # ------------------------------------------------------------- inputs and turns

    def take(self, what: Input) -> None:
        """Something for the daemon; lost when there is none."""
        if self.engine is None or len(self._inbox) >= INBOX_MAX:
            return
        self._inbox.append(what)
        soon = self._turn_at_us is not None and self._turn_at_us <= self.world.now_us + 200
        if not soon and not self.stopped and not self.frozen:
            self._schedule(150)

    def take_replay(self, what: model.Heard) -> None:
        """A recorded datagram: it must change nothing."""
        if self.engine is None or not self.runs():
            return
        self.world.checks.replay(self, what)
        self.take(what)

    def _schedule(self, delay_us: int) -> None:
        at_us = self.world.now_us + delay_us + self.turn_delay_us
        if self._turn_at_us is None or at_us < self._turn_at_us:
            self._turn_at_us = at_us
            self.world.at_us(at_us, self._turn, at_us)

    def _turn(self, at_us: int) -> None:
        if at_us != self._turn_at_us:
            return
        self._turn_at_us = None
        engine = self.engine
        if engine is None or self.stopped or self.frozen or not self.powered:
            return
        inputs, self._inbox = self._inbox, []
        before = engine.state
        now_ms = self.local_ms()
        decision = engine.turn(inputs, now_ms)
        world = self.world
        world.turns += 1
        if decision.fired or decision.state.phase is not before.phase:
            for fired in decision.fired:
                world.row_fired(self, fired)
            world.checks.phases(self, before, decision)
            if self.crash_at_row_in is not None and decision.state.phase is not before.phase:
                self.crash_in_actions, self.crash_at_row_in = self.crash_at_row_in, None
        self.last_turn_ms = now_ms
        world.checks.turn(self, decision)
        life = self.life
        self._execute(decision)
        if self.fencing is not None and self.life == life:
            awaited = decision.state.flights.get("fence")
            if awaited is None or awaited.number != self.fencing:
                self.fencing = None
        if self.life == life:
            self.volumes.turn()
        if self.life == life:
            wake_us = self.world_us(engine.wake_at_ms() * 1000) - world.now_us
            self._schedule(max(wake_us, 0) + 20 + int(world.random.random() * 300))

    def _execute(self, decision: Decision) -> None:
        for numbered in decision.actions:
            if self.crash_in_actions is not None and self._boundary_crash():
                return
            if isinstance(numbered.action, (*KERNEL_ACTIONS, model.Freeze)):
                self._calls.append(numbered)
            else:
                self._do(numbered)
                if self.engine is None:
                    return
        self._next_call_soon()

    def _boundary_crash(self) -> bool:
        if self.crash_in_actions is None:
            return False
        self.crash_in_actions -= 1
        if self.crash_in_actions >= 0:
            return False
        self.crash_in_actions = None
        self.world.note(f"{self.role} is killed between two actions")
        self.world.fired("crash-boundary")
        self.world.disturb()
        self.crash()
        self.world.restart_later(self)
        return True

    def _do(self, numbered: Numbered) -> None:
        world = self.world
        action = numbered.action
        match action:
            case model.SendHeartbeat(datagram):
                world.checks.shown(self, datagram)
                world.network.send(self.role, datagram)
            case model.Persist(journal):
                self.disk.write(numbered.number, journal)
            case model.AskWitness():
                world.network.ask_witness(self)
            case model.Survey():
                life, number = self.life, numbered.number
                world.network.survey(
                    self,
                    lambda result: self._completed(life, number, result),
                    self.survey_rounds,
                    world.config.timings.survey_ms,
                )
            case model.TakeToken() | model.DropToken() | model.PublishRecord():
                self._do_token(numbered.number, action)
            case model.Fence():
                world.fence.off(self, numbered.number)
            case model.StopReceivers() | model.Thaw():
                self._do_volumes(numbered.number, action)
            case model.MountVolumes() | model.UnmountVolumes():
                self.block.start(numbered.number, action)
            case model.Announce():
                other = world.nodes[self.role.other]
                if (0, self.role) not in world.network.cut:
                    world.at(200, other.take, model.VipClaimed("02:00:00:00:00:01"))
            case model.Exit(reason):
                # The kernel calls before it in the same decision come first.
                self._calls.append(numbered)
                self.exits = reason
            case _:
                raise TypeError(f"no executor for {action}")

    def _do_volumes(self, number: int, action: model.StopReceivers | model.Thaw) -> None:
        if isinstance(action, model.Thaw):
            # A freeze that waits still for the call that closes the service never begins.
            waiting = [one for one in self._calls if not isinstance(one.action, model.Freeze)]
            self._calls = deque(waiting)
            self.volumes.thaw(number)
        else:
            self.volumes.stop_receivers(number)

    def _do_token(
        self, number: int, action: model.TakeToken | model.DropToken | model.PublishRecord
    ) -> None:
        if self.token is not None:
            if isinstance(action, model.PublishRecord):
                self.token.publish(action.epoch)
                return
            self.token.drop()
        self.token = Connection(self, number) if isinstance(action, model.TakeToken) else None

    def _completed(self, life: int, number: int, result: model.Result) -> None:
        if life == self.life:
            self.take(Completed(number, result))

    # ------------------------------------------------------------- kernel calls

    def _next_call_soon(self) -> None:
        if self._calls and not self._calling:
            self._calling = True
            self.world.at(60 + int(self.world.random.random() * 200), self._next_call, self.life)

    def _next_call(self, life: int) -> None:
        if life != self.life or self._call is not None:
            return
        if not self.runs():
            return
        if not self._calls:
            self._calling = False
            return
        if self.crash_in_actions is not None and self._boundary_crash():
            return
        numbered = self._calls.popleft()
        if isinstance(numbered.action, model.Exit):
            self._exit()
            return
        if isinstance(numbered.action, model.Freeze):
            # After the call that closed the service: else a write could come after the freeze.
            self.volumes.freeze(numbered.number)
            self._calling = False
            self._next_call_soon()
            return
        self._call = self._driver(numbered.action)
        self._call_number = numbered.number
        self._call_boundary = 0
        self._run_call()

    def _driver(self, action: model.Action) -> Iterator[LeaseHeld | LeaseLost | None]:
        lease_ms = self.world.config.timings.address_lease_ms
        match action:
            case model.AddAddress(deadline_ms):
                self.world.checks.stands_on_journal(self, action)
                return self.address.add(deadline_ms, lease_ms)
            case model.RenewAddress(deadline_ms):
                return self.address.renew(deadline_ms, lease_ms)
            case model.RemoveAddress():
                return self.address.remove()
            case model.OpenService(deadline_ms):
                self.world.checks.stands_on_journal(self, action)
                return self.service.open(deadline_ms)
            case model.RenewService(deadline_ms):
                return self.service.renew(deadline_ms)
            case model.CloseService():
                return self.service.close()
            case model.ExtendLeases(deadline_ms):
                return self._extend(deadline_ms)
            case _:
                raise TypeError(f"no driver for {action}")

    def _extend(self, deadline_ms: int) -> Iterator[LeaseHeld | LeaseLost | None]:
        self.extended_until_ms = deadline_ms
        lease_ms = -(-(deadline_ms - self.local_ms()) // 1000) * 1000
        yield from self.address.renew(deadline_ms, max(1000, lease_ms))
        if self.world.config.service_lease:
            yield from self.service.renew(deadline_ms)

    def _run_call(self) -> None:
        call = self._call
        if call is None:
            return
        for result in call:
            if self._call is not call:
                return
            if result is not None:
                self._call_done(result)
                continue
            self._call_boundary += 1
            pause = self.driver_pause
            if self.late_call:
                pause = None  # once in a call: twice is more than a single fault
            if pause is not None and pause.boundary == self._call_boundary:
                self.driver_pause = None
                self.world.note(f"{self.role} is stopped inside a kernel call")
                self.world.fired("driver-pause")
                self.world.disturb()
                self.stop()
                self.late_call = True
                self.world.at(pause.long_us, self._cont, self.life)
                return
            if self.late_call:
                # The kernel call of a daemon that stood still: its next look at the clock follows.
                self.world.at(150, self._resume_call, self.life)
                return
        self.late_call = False
        self._call = None
        self._calling = False
        self._next_call_soon()

    def _cont(self, life: int) -> None:
        if life == self.life:
            self.go_on()

    def _resume_call(self, life: int) -> None:
        if life == self.life and self.runs():
            self.resumed_us = self.world.now_us
            self._run_call()

    def _call_done(self, result: LeaseHeld | LeaseLost) -> None:
        if isinstance(result, LeaseHeld):
            self._inbox.append(Completed(self._call_number, result))  # it asks for no turn
            return
        self.take(Completed(self._call_number, result))
        if result.lock == "address":
            self.take(AddressChanged(self.kernel.address_held(), result.detail))

    def watch_address(self) -> None:
        """The kernel tells when the address has gone by itself."""
        at_us = self.world_us(self.kernel.address_end_us)
        if self._watched_us < self.world.now_us:
            self._watched_us = at_us
            self.world.at_us(at_us, self._address_watch, at_us)

    def _address_watch(self, at_us: int) -> None:
        if at_us != self._watched_us or not self.powered:
            return
        self._watched_us = -1
        if self.frozen:
            self.world.at(100_000, self.watch_address)
        elif self.kernel.address_held():
            self.watch_address()
        elif self.kernel.address_end_us >= 0:
            self.address.forget()
            self.take(AddressChanged(False, "its lifetime ended"))

    def address_removed(self) -> None:
        """After a removal of ours the kernel shows it gone."""
        self.take(AddressChanged(False, "removed"))

    def _exit(self) -> None:
        restart = self.exits.startswith("restart")
        self.world.note(f"{self.role} exits: {self.exits}")
        self._end_daemon()
        if restart:
            self.world.planned_restart_later(self)
        else:
            # ExecStopPost of a final stop.
            self.kernel.lose_power()
            self.block.final_stop()
            self.locks_changed()
            self.world.stopped_finally(self)

    # ------------------------------------------------------------- who accepts clients

    def locks_changed(self) -> None:
        """Works out anew until when this machine's kernel accepts clients."""
        world = self.world
        now_us = world.now_us
        until_us = 0
        if self.powered and not self.frozen:
            end_us = self.kernel.accepts_until_us()
            if end_us > self.local_us():
                until_us = self.world_us(min(end_us, 10**13))
        was_from_us = self.accepting_from_us
        if was_from_us is not None and self.accepting_until_us <= now_us:
            world.accepted(self, was_from_us, self.accepting_until_us)
            was_from_us = None
        if until_us > now_us:
            self.accepting_from_us = now_us if was_from_us is None else was_from_us
            self.accepting_until_us = until_us
            if was_from_us is None:
                world.note(f"{self.role} accepts clients")
            world.checks.one_accepts(self)
            world.checks.serves_volumes(self)
        elif was_from_us is not None:
            world.accepted(self, was_from_us, now_us)
            world.note(f"{self.role} accepts clients no more")
            self.accepting_from_us = None
        else:
            self.accepting_from_us = None

    def accepts(self) -> bool:
        """Does this machine's kernel accept clients now?"""
        return self.accepting_from_us is not None and self.world.now_us < self.accepting_until_us

    def phase(self) -> Phase | None:
        """The daemon's phase."""
        return self.engine.state.phase if self.engine is not None else None

    def shown_epoch(self) -> model.Epoch | None:
        """The daemon's durable epoch."""
        return self.engine.state.epoch if self.engine is not None else None

    # ------------------------------------------------------------- this machine's own troubles

    def set_fit(self, ok: bool, *, storage: bool = True) -> None:
        """The own NFS service breaks or heals, with the volumes still there or not."""
        self.fit = ok
        self.take(FitChanged(ok, "as the world says", storage))

    def set_carrier(self, up: bool) -> None:
        """The VIP's interface loses or regains its carrier."""
        self.carrier = up
        self.take(model.CarrierChanged(up))

    def take_address_removed(self, detail: str) -> None:
        """Somebody else removed the address."""
        self.take(AddressChanged(False, detail))

    def take_ruleset_lost(self) -> None:
        """The driver found out that somebody flushed the rules; it has put them back, closed."""
        self.take(model.RulesetLost())

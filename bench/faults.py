"""What is done to the active or the passive node, and how long it is watched. No figures here.

All contestants get the same, in the same order, and are watched for the same time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from bench.contestants import Contestant

FAULT_S = 10.0
"""How long a freeze or a cut lasts."""


@dataclass(frozen=True)
class Fault:
    """One kind of fault. watch_s: the window of the overlaps, from the fault on.

    healed_after_s: when it ends by itself (None: never). right: who alone must hold the address
    at the end if the supervisor is right.
    """

    name: str
    title: str
    watch_s: float
    right: str
    strike: Callable[[Contestant], int]
    heal: Callable[[Contestant], None] | None = None

    @property
    def healed_after_s(self) -> float | None:
        """When the fault ends, from its beginning."""
        return FAULT_S if self.heal is not None else None


@dataclass(frozen=True)
class Times:
    """When the fault came, when it was healed (None: never), until when overlaps are counted."""

    struck_ns: int
    healed_ns: int | None
    watched_ns: int

    def windows(self) -> tuple[tuple[int, int], ...]:
        """From fault to healing, from there to the end: at most one move in each."""
        if self.healed_ns is None:
            return ((self.struck_ns, self.watched_ns),)
        return ((self.struck_ns, self.healed_ns), (self.healed_ns, self.watched_ns))


def carry_out(fault: Fault, contestant: Contestant) -> Times:
    """Strikes, heals when its time has come, and returns at the end of the watch."""
    struck_ns = fault.strike(contestant)
    healed_ns = None
    if fault.heal is not None:
        _sleep_until(struck_ns, FAULT_S, contestant)
        healed_ns = contestant.lab.now_ns()
        fault.heal(contestant)
    _sleep_until(struck_ns, fault.watch_s, contestant)
    return Times(struck_ns, healed_ns, contestant.lab.now_ns())


def _sleep_until(start_ns: int, after_s: float, contestant: Contestant) -> None:
    time.sleep(max(0.0, after_s - (contestant.lab.now_ns() - start_ns) / 1e9))


def _power_cut(contestant: Contestant) -> int:
    return contestant.lab.power_cut("a")


def _kill(contestant: Contestant) -> int:
    struck_ns = contestant.lab.now_ns()
    contestant.kill()
    return struck_ns


def _freeze(contestant: Contestant) -> int:
    struck_ns = contestant.lab.now_ns()
    contestant.freeze()
    return struck_ns


def _thaw(contestant: Contestant) -> None:
    contestant.thaw()


def _cut_active(contestant: Contestant) -> int:
    struck_ns = contestant.lab.now_ns()
    contestant.lab.cut("a")
    return struck_ns


def _cut_passive(contestant: Contestant) -> int:
    struck_ns = contestant.lab.now_ns()
    contestant.lab.cut("b")
    return struck_ns


def _heal(contestant: Contestant) -> None:
    contestant.lab.heal()


def _stop(contestant: Contestant) -> int:
    struck_ns = contestant.lab.now_ns()
    contestant.stop()
    return struck_ns


FAULTS = (
    Fault("death", "death of the active node", 4.0, "b", _power_cut),
    Fault("kill", "`kill -9` of the active daemon, not restarted", 6.0, "b", _kill),
    Fault("freeze", "SIGSTOP of the active daemon for 10 s", 13.0, "b", _freeze, _thaw),
    Fault("cut-active", "active node cut off from all for 10 s", 14.0, "b", _cut_active, _heal),
    Fault("cut-passive", "passive node cut off from all for 10 s", 14.0, "a", _cut_passive, _heal),
    Fault("stop", "clean stop of the active daemon", 4.0, "b", _stop),
)
BY_NAME = {fault.name: fault for fault in FAULTS}

"""The actions that one decision orders, numbered, with the ones in flight and their deadlines.

Each action that has a result occupies a slot; a newer order for the slot makes the older one's
result stale, and an action that outlives its deadline is answered for by the engine.
"""

from __future__ import annotations

from nfsha.core import model
from nfsha.core.model import Action, Numbered
from nfsha.core.state import Flight, State

SLOTS: dict[type, tuple[str, int]] = {
    model.Persist: ("persist", 5000),
    model.AddAddress: ("address", 2000),
    model.RenewAddress: ("address", 2000),
    model.RemoveAddress: ("address", 2000),
    model.OpenService: ("service", 2000),
    model.RenewService: ("service", 2000),
    model.Survey: ("survey", 2000),
    model.TakeToken: ("token", 5000),
    model.Fence: ("fence", 60_000),
    model.StopReceivers: ("receivers", 10_000),
    model.Freeze: ("freeze", 60_000),
    model.Thaw: ("freeze", 10_000),
    model.MountVolumes: ("volumes", 20_000),
    model.UnmountVolumes: ("volumes", 20_000),
}
"""Slot and longest time in flight, in milliseconds, of each action that has a result.

A hook's own time limit is added for the volumes: this is for the end of an older one, and its own.
"""

OVERDUE: dict[str, str] = {
    "persist": "the disk gave no answer within 5 s",
    "address": "the kernel gave no answer about the address within 2 s",
    "service": "the firewall gave no answer within 2 s",
    "receivers": "the receiving processes were not gone within 10 s",
    "freeze": "the volumes gave no answer within 10 s",
    "volumes": "the hook did not end within its time",
}


class Orders:
    """Collects what a decision orders, in order."""

    def __init__(self, state: State, now_ms: int) -> None:
        self._state = state
        self._now_ms = now_ms
        self.actions: list[Numbered] = []

    def order(self, action: Action) -> int:
        """Numbers one action and enters it as in flight, if it has a result."""
        number = self._state.next_action
        self._state.next_action = number + 1
        slot = SLOTS.get(type(action))
        if slot is not None:
            name, within_ms = slot
            if name == "volumes":
                within_ms += self._state.config.hook_timeout_ms or 0
            self._state.flights[name] = Flight(number, self._now_ms + within_ms)
        self.actions.append(Numbered(number, action))
        return number

    def cancel(self, slot: str) -> None:
        """Makes the result of what is in flight in this slot stale."""
        self._state.flights.pop(slot, None)

    def in_flight(self, slot: str) -> bool:
        """Is a result of this slot still awaited?"""
        return slot in self._state.flights

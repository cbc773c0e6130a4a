"""What one node does in a handover, each thing with a name: effects that are durable or visible.

One naming for two uses: the list is made from the decisions' table, by two engines that play a
handover (`tests/netns/stepping.py`), and the daemon of a test that is stopped at one of them asks
here what it is about to do (`stepped`). What only renews or asks, and what changes nothing (a
second closing of the same ports), has no name.
"""

from __future__ import annotations

from nfsha.core import model
from nfsha.core.engine import Decision
from nfsha.core.model import Action, Datagram, Journal
from nfsha.core.replication import Approach, Fetch, Finish, Flow, Offer, Rest
from nfsha.core.state import State

PASS = "pass"
LAST = "last pass"
PROOF = "proof"
STAMP = "stamp"

_OF_A_FLOW: dict[type, tuple[str, ...]] = {
    Approach: (PASS,),
    Finish: (LAST, PROOF),
    Fetch: (STAMP,),
    Offer: (STAMP,),
    Rest: (),
}
"""What each way of the data does that others can see or that lasts."""

_JOURNALED = ("epoch", "prepared", "aborted")


def of_flow(flow: Flow) -> tuple[str, ...]:
    """The names of what happens while data flow so. Raises KeyError for a way unknown here."""
    if isinstance(flow, Fetch) and not flow.proved:
        return ()  # a resync or an ordinary pass: no part of the handover
    return tuple(data_action(flow, what) for what in _OF_A_FLOW[type(flow)])


def data_action(flow: Flow, what: str) -> str:
    """The name of one thing that the replication does."""
    return f"{type(flow).__name__}: {what}"


class Namer:
    """Names the actions of one node, turn after turn."""

    def __init__(self) -> None:
        self._shown: Datagram | None = None

    def names(self, before: State, decision: Decision) -> list[tuple[Action, str]]:
        """The actions of one decision that have an effect, each with its name, in order."""
        found = []
        for numbered in decision.actions:
            name = self._name(before, decision.state, numbered.action)
            if name:
                found.append((numbered.action, f"{decision.state.phase}: {name}"))
        return found

    def _name(self, before: State, after: State, action: Action) -> str:
        match action:
            case model.SendHeartbeat(datagram):
                last, self._shown = self._shown, datagram
                return _shows(last, datagram)
            case model.Persist(journal):
                return _writes(after.durable, journal)
            case model.CloseService():
                return "closes the ports" if before.service_open else ""
            case model.RemoveAddress():
                return "removes the address" if before.address_held else ""
            case model.Announce():
                return "announces" if before.phase is not after.phase else ""
            case model.AddAddress():
                return "adds the address"
            case model.OpenService():
                return "opens the ports"
            case model.Freeze():
                return "comes to rest"
            case model.Thaw():
                return "thaws"
            case model.StopReceivers():
                return "ends what receives"
            case _:
                return ""


def _shows(last: Datagram | None, now: Datagram) -> str:
    """What a heartbeat says that the one before it did not."""
    if last is None or last.phase is not now.phase:
        return "shows its phase"
    if now.ready and not last.ready:
        return "shows that it is ready"
    if now.asks and now.asks != last.asks:
        return "asks the peer"
    return "shows the end" if now.aborted != last.aborted else ""


def _writes(durable: Journal, journal: Journal) -> str:
    changed = [key for key in _JOURNALED if getattr(journal, key) != getattr(durable, key)]
    if not changed and journal.active != durable.active:
        changed = ["active"]
    return f"writes {' and '.join(changed)}" if changed else ""

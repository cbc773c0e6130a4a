"""Two production engines in one process, brought into the situations that an operator meets.

Everything works at once and as asked, unless a test says otherwise: the faults are for tests/sim.
"""

from __future__ import annotations

from collections.abc import Callable

from nfsha.core import model
from nfsha.core.describe import Facts, situation
from nfsha.core.engine import Engine, begin
from nfsha.core.model import (
    Command,
    CommandKind,
    CoreConfig,
    Epoch,
    Input,
    Journal,
    Phase,
    Reply,
    Role,
)
from nfsha.core.state import State

STEP_MS = 10
START_MS = 1_000_000
EPOCH = Epoch(7, "0123456789abcdef", Role.PRIMARY)
OTHER_MAC = "52:54:00:12:34:56"


class Node:
    """One engine with a world that does what it is told."""

    def __init__(self, config: CoreConfig, journal: Journal | None, corrupt: str = "") -> None:
        session = 11 if config.role is Role.PRIMARY else 22
        self.engine = Engine(begin(config, session, START_MS, journal=journal, corrupt=corrupt))
        self.inbox: list[Input] = [model.FitChanged(ok=True)]
        self.answered_by: str | None = None
        self.witness = True
        self.persist_error = ""
        self.replies: list[Reply] = []
        self.on = True

    @property
    def state(self) -> State:
        return self.engine.state

    def turn(self, now_ms: int) -> list[model.Datagram]:
        """Takes a turn and does at once what it orders; returns what it sent."""
        inputs, self.inbox = self.inbox, []
        decision = self.engine.turn(inputs, now_ms)
        self.replies += decision.replies
        sent = []
        for numbered in decision.actions:
            if isinstance(numbered.action, model.SendHeartbeat):
                sent.append(numbered.action.datagram)
            elif isinstance(numbered.action, model.AskWitness):
                if self.witness:
                    self.inbox.append(model.WitnessAnswered("gateway", now_ms))
            else:
                result = self._result(numbered.action, now_ms)
                if result is not None:
                    self.inbox.append(model.Completed(numbered.number, result))
        return sent

    def _result(self, action: model.Action, now_ms: int) -> model.Result | None:
        match action:
            case model.Persist():
                if self.persist_error:
                    return model.PersistFailed(self.persist_error)
                return model.Persisted(action.journal)
            case model.AddAddress() | model.RenewAddress():
                return model.LeaseHeld("address")
            case model.RemoveAddress():
                return model.AddressChanged(held=False)
            case model.OpenService() | model.RenewService():
                return model.LeaseHeld("service")
            case model.Survey():
                return model.Surveyed(now_ms - 300, now_ms, self.answered_by, heard_other=True)
            case _:
                return None


class Pair:
    """A primary and a standby, and the time between them."""

    def __init__(
        self,
        primary: Journal | None = None,
        standby: Journal | None = None,
        configure: Callable[[Role], CoreConfig] | None = None,
        corrupt: str = "",
    ) -> None:
        make = configure or (lambda role: CoreConfig(role, boot_id="boot"))
        self.primary = Node(make(Role.PRIMARY), primary, corrupt)
        self.standby = Node(make(Role.STANDBY), standby)
        self.now_ms = START_MS
        self.linked = True

    def run(self, duration_ms: int) -> Pair:
        """Lets time pass."""
        end_ms = self.now_ms + duration_ms
        while self.now_ms < end_ms:
            self.now_ms += STEP_MS
            for node, other in ((self.primary, self.standby), (self.standby, self.primary)):
                if not node.on:
                    continue
                for datagram in node.turn(self.now_ms):
                    if self.linked and other.on:
                        other.inbox.append(model.Heard(datagram, "lan"))
        return self

    def ask(
        self,
        node: Node,
        kind: CommandKind,
        *,
        keep: Role | None = None,
        force: bool = False,
    ) -> Reply:
        """Gives a command and returns the answer."""
        node.inbox.append(Command(kind, len(node.replies) + 1, force=force, keep=keep))
        self.run(STEP_MS)
        return node.replies[-1]

    def seen(self, node: Node) -> Facts:
        """The node's situation now."""
        return situation(node.state, self.now_ms)


def settled() -> Pair:
    """The primary serves, the standby waits, both are well."""
    pair = Pair(Journal(EPOCH), Journal(EPOCH)).run(3000)
    assert pair.primary.state.phase is Phase.ACTIVE
    assert pair.standby.state.phase is Phase.PASSIVE
    return pair.run(5000)


def waiting() -> Pair:
    """The primary booted alone."""
    pair = Pair(Journal(EPOCH), Journal(EPOCH))
    pair.standby.on = False
    return pair.run(8000)


def isolated() -> Pair:
    """The primary is cut off from everything."""
    pair = settled()
    pair.linked = False
    pair.primary.witness = False
    pair.standby.on = False
    return pair.run(8000)


def vip_answered(silent_ms: int) -> Pair:
    """The primary's daemon is dead, and its kernel still answers for the VIP."""
    pair = settled()
    pair.primary.on = False
    pair.standby.answered_by = OTHER_MAC
    return pair.run(silent_ms)


def diverged() -> Pair:
    """Both have an epoch of the same number, and they are not the same."""
    other = Epoch(EPOCH.number, "fedcba9876543210", Role.STANDBY)
    return Pair(Journal(EPOCH), Journal(other)).run(3000)


def in_maintenance() -> Pair:
    """The standby is in maintenance."""
    pair = settled()
    assert pair.ask(pair.standby, CommandKind.MAINTENANCE_ON).accepted
    return pair.run(3000)


def faulty() -> Pair:
    """The primary's NFS service broke, and the standby took over."""
    pair = settled()
    pair.primary.inbox.append(
        model.FitChanged(ok=False, reason="NFS v3 at 127.0.0.1:2049: connection refused")
    )
    return pair.run(6000)

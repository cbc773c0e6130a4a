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
        self.freeze_error = ""
        self.thaw_error = ""
        self.unanswered: set[type[model.Action]] = set()
        """Actions whose results the test brings itself, or never."""
        self.replies: list[Reply] = []
        self.on = True
        self.deaf = False
        """Nothing of the other node reaches this one."""

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
        if type(action) in self.unanswered:
            return None
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
            case model.StopReceivers():
                return model.ReceiversStopped(ok=True)
            case model.Freeze():
                return model.Frozen(ok=not self.freeze_error, detail=self.freeze_error)
            case model.Thaw():
                return model.Thawed(ok=not self.thaw_error, detail=self.thaw_error)
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
                    if self.linked and other.on and not other.deaf:
                        other.inbox.append(model.Heard(datagram, "lan"))
        return self

    def ask(
        self,
        node: Node,
        kind: CommandKind,
        *,
        keep: Role | None = None,
        force: bool = False,
        to: Role | None = None,
    ) -> Reply:
        """Gives a command and returns the answer."""
        node.inbox.append(Command(kind, len(node.replies) + 1, force=force, keep=keep, to=to))
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


def replicating(role: Role) -> CoreConfig:
    """A node that replicates files."""
    return CoreConfig(role, boot_id="boot", replication=True)


def copied() -> Pair:
    """The primary serves, the standby is a whole replica of it."""
    pair = Pair(Journal(EPOCH), Journal(EPOCH), replicating)
    for node in (pair.primary, pair.standby):
        node.inbox.append(
            model.ReplicaChanged(whole=True, stamped=True, epoch=EPOCH, newest_stamp=EPOCH)
        )
    pair.run(3000)
    assert pair.primary.state.phase is Phase.ACTIVE
    assert pair.standby.state.phase is Phase.PASSIVE
    return pair


def approaching() -> Pair:
    """The service moves to the standby, which comes near to the primary's data."""
    pair = copied()
    assert pair.ask(pair.standby, CommandKind.HANDOVER, to=Role.STANDBY).accepted
    pair.run(200)
    assert pair.standby.state.phase is Phase.PRESYNC
    return pair


def given(pair: Pair) -> Epoch:
    """The epoch that the standby named."""
    epoch = pair.standby.state.handover
    assert epoch is not None
    return epoch


def frozen() -> Pair:
    """The standby is near enough, and the primary holds its clients; something writes still."""
    pair = approaching()
    pair.primary.unanswered.add(model.Freeze)
    pair.standby.inbox.append(model.PresyncChanged(given(pair), ready=True))
    pair.run(100)
    assert pair.primary.state.phase is Phase.FREEZING
    return pair


def prepared() -> Pair:
    """The primary gave its authority away, and the standby proves its copy."""
    pair = frozen()
    flight = pair.primary.state.flights["freeze"]
    pair.primary.inbox.append(model.Completed(flight.number, model.Frozen(ok=True)))
    pair.run(100)
    assert pair.primary.state.phase is Phase.PREPARED
    assert pair.standby.state.phase is Phase.FINAL_SYNC
    return pair


def proved() -> Pair:
    """As before, and the proof is done: the new epoch is on its way to the standby's disk."""
    pair = prepared()
    pair.standby.unanswered.add(model.Persist)
    pair.standby.inbox.append(model.FinalChanged(given(pair), proved=True))
    pair.run(50)
    assert pair.standby.state.phase is Phase.RESTORING
    assert pair.standby.state.commit_ordered
    return pair


def faulty() -> Pair:
    """The primary's NFS service broke, and the standby took over."""
    pair = settled()
    pair.primary.inbox.append(
        model.FitChanged(ok=False, reason="NFS v3 at 127.0.0.1:2049: connection refused")
    )
    return pair.run(6000)

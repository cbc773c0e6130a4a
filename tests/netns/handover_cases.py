"""The cases of the handover's matrix: actions x boundaries x faults.

The list of actions is made from the decisions' table: two production engines play a handover, and
whatever one of them orders that is durable or visible is an action. A boundary is just before or
just after one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from nfsha.core.engine import Decision, Engine
from nfsha.core.model import (
    CommandKind,
    Epoch,
    FinalChanged,
    Input,
    Phase,
    PresyncChanged,
    Role,
)
from nfsha.core.replication import flow
from nfsha.core.state import State
from tests.netns.labkit.stepped_actions import Namer, of_flow
from tests.unit import situations

GIVER, RECEIVER = "giver", "receiver"
EDGES = ("before", "after")


@dataclass(frozen=True)
class Action:
    """One durable or visible effect of a handover."""

    side: str
    name: str

    def __str__(self) -> str:
        return f"{self.side} {self.name}"


@dataclass(frozen=True)
class Boundary:
    """Just before or just after an action."""

    action: Action
    edge: str

    def __str__(self) -> str:
        return f"{self.edge} {self.action}"


class _Recorder:
    """An engine that notes what it orders."""

    def __init__(self, engine: Engine, side: str, told: list[Action], rows: set[str]) -> None:
        self._engine, self._side, self._told, self._rows = engine, side, told, rows
        self._namer = Namer()
        self._flow = flow(engine.state, engine.state.last_turn_ms)
        self._offered = self._flow
        self.records = False

    @property
    def state(self) -> State:
        return self._engine.state

    def turn(self, inputs: Sequence[Input], now_ms: int) -> Decision:
        before = self._engine.state
        decision = self._engine.turn(inputs, now_ms)
        names = [name for _, name in self._namer.names(before, decision)]
        way, self._flow = self._flow, flow(decision.state, now_ms)
        if self._flow not in (way, self._offered):  # what bears the stamp gets no other one
            names += of_flow(self._flow)
        if self.records:
            new = (Action(self._side, name) for name in names)
            self._told += [one for one in new if one not in self._told]
            self._rows |= {fired.row for fired in decision.fired}
        return decision


class _Play:
    """A handover from the primary to the standby, up to the proof, with all that is ordered."""

    def __init__(self) -> None:
        self.pair = situations.copied()
        self.actions: list[Action] = []
        self.rows: set[str] = set()
        self._recorders = []
        for side, node in ((GIVER, self.pair.primary), (RECEIVER, self.pair.standby)):
            recorder = _Recorder(node.engine, side, self.actions, self.rows)
            node.engine = recorder  # type: ignore[assignment]
            self._recorders.append(recorder)
        self.pair.run(500)

    def record(self) -> None:
        for recorder in self._recorders:
            recorder.records = True

    def to_the_proof(self) -> Epoch:
        pair = self.pair
        assert pair.ask(pair.primary, CommandKind.HANDOVER, to=Role.STANDBY).accepted
        pair.run(300)
        epoch = pair.standby.state.handover
        assert epoch is not None
        pair.standby.inbox.append(PresyncChanged(epoch, ready=True))
        pair.run(300)
        return epoch


def played() -> tuple[list[Action], set[str]]:
    """All actions of a handover that goes well, in order, and the rows of the table that fired."""
    play = _Play()
    play.record()
    epoch = play.to_the_proof()
    play.pair.standby.inbox.append(FinalChanged(epoch, proved=True))
    play.pair.run(2000)
    assert play.pair.standby.state.phase is Phase.ACTIVE
    assert play.pair.primary.state.phase is Phase.PASSIVE
    return play.actions, play.rows


def taken_back() -> tuple[list[Action], set[str]]:
    """The same of its end, where it is aborted before the proof."""
    play = _Play()
    play.to_the_proof()
    play.record()
    assert play.pair.ask(play.pair.standby, CommandKind.ABORT).accepted
    play.pair.run(2000)
    assert play.pair.primary.state.phase is Phase.ACTIVE
    assert play.pair.standby.state.phase is Phase.PASSIVE
    return play.actions, play.rows


# ------------------------------------------------------------------ faults


class Fault(StrEnum):
    """What is done at a boundary, and mended afterwards."""

    KILL_GIVER = "kill -9 of the giver"
    KILL_RECEIVER = "kill -9 of the receiver"
    DEATH_OF_GIVER = "death of the giver's node"
    DEATH_OF_RECEIVER = "death of the receiver's node"
    CUT_GIVER = "the giver cut off from all"
    CUT_RECEIVER = "the receiver cut off from all"
    CUT_DATA = "the link of the data cut"
    FULL_STATE_OF_GIVER = "the giver's state disk full"
    FULL_STATE_OF_RECEIVER = "the receiver's state disk full"
    FULL_VOLUME_OF_GIVER = "the giver's volume full"
    FULL_VOLUME_OF_RECEIVER = "the receiver's volume full"
    RSYNC_KILLED = "rsync killed"

    @property
    def of_giver(self) -> bool:
        """It befalls the giver."""
        return "giver" in self


SLOW = (Fault.DEATH_OF_GIVER, Fault.DEATH_OF_RECEIVER, Fault.CUT_DATA)
QUICK = [fault for fault in Fault if fault not in SLOW]
"""Where a few cases must do, these come more than once."""


@dataclass(frozen=True)
class Case:
    """A fault at a boundary."""

    boundary: Boundary
    fault: Fault
    back: bool = False
    """The handover is aborted before its proof, and the fault comes after that."""

    def __str__(self) -> str:
        return f"{self.fault}, {self.boundary}{' of the way back' if self.back else ''}"


def whole_product() -> list[Case]:
    """Every fault at both boundaries of every action, of the way there and of the way back."""
    ways = {False: played()[0], True: taken_back()[0]}
    return [
        Case(Boundary(action, edge), fault, back)
        for fault in Fault
        for back, actions in ways.items()
        for action in actions
        for edge in EDGES
    ]


def some_cases(seed: int) -> list[Case]:
    """Each action once, and each fault at least once: what, where, before or after, by the seed."""
    chance = random.Random(seed)
    actions, _ = played()
    faults = chance.sample(list(Fault), len(Fault))
    while len(faults) < len(actions):
        faults += chance.sample(QUICK, len(QUICK))
    chance.shuffle(actions)
    return [
        Case(Boundary(action, chance.choice(EDGES)), fault)
        for action, fault in zip(actions, faults[: len(actions)], strict=True)
    ]

"""One node's part of a planned move, as it is seen turn by turn: its steps, its end, the stall.

Pure: states and times in, a part of a report out. Nothing here decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final

from nfsha.core import lease
from nfsha.core.model import GIVING_PHASES, RECEIVING_PHASES, Epoch, Phase
from nfsha.core.state import State

SERVED_WITHIN_MS: Final = 30_000
"""So long after its end a giver looks who serves; then the stall is not known."""

Facts = dict[str, Any]

_STEPS: Final = frozenset(
    str(one) for one in (*RECEIVING_PHASES, *GIVING_PHASES, Phase.TAKEOVER, Phase.ISOLATED)
)


@dataclass(frozen=True, slots=True)
class Part:
    """What one node has to tell of a move that ended. Times in milliseconds of its own clock.

    `stall_ms` is None where this node could not see both ends of it; `stall_how` says what was
    measured. `steps`: how long each phase took.
    """

    side: str
    epoch: Epoch
    began_ns: int
    done: bool
    why: str
    took_ms: int
    stall_ms: int | None
    stall_how: str
    steps: dict[str, int]
    asked: bool = True
    """The giver was asked to freeze: so the epoch names this move, and no other one later."""

    @property
    def number(self) -> str:
        """The report's id: the same on both nodes, where both had a part."""
        named = self.epoch.id if self.asked else sha256(str(self.began_ns).encode()).hexdigest()
        return f"{self.epoch.number}-{named[:8]}"

    def as_json(self, node: str) -> Facts:
        """For the report."""
        return {
            "node": node,
            "epoch": self.epoch.number,
            "to": str(self.epoch.authority),
            "began_ns": self.began_ns,
            "done": self.done,
            "why": self.why,
            "took_ms": self.took_ms,
            "stall_ms": self.stall_ms,
            "stall_how": self.stall_how,
            "steps": self.steps,
        }


@dataclass(slots=True)
class _Course:
    """A move that is followed."""

    side: str
    epoch: Epoch
    began_ms: int
    began_ns: int
    phase: Phase
    since_ms: int
    steps: dict[str, int] = field(default_factory=dict)
    asked: bool = False
    ended_ms: int | None = None
    done: bool = False
    why: str = ""

    def step(self, phase: Phase, now_ms: int) -> None:
        """Takes the phase of this turn."""
        self.steps[str(self.phase)] = self.steps.get(str(self.phase), 0) + now_ms - self.since_ms
        self.phase, self.since_ms = phase, now_ms

    def end(self, now_ms: int, state: State) -> None:
        """Takes how it ended, by the core's word."""
        told = state.last_handover
        self.ended_ms = now_ms
        if told is not None and told.epoch == self.epoch:
            self.done, self.why = told.done, told.why
        else:
            self.why = f"ended without a word: this node is {state.phase}"


class Tracker:
    """Follows the moves of one node, one at a time."""

    def __init__(self) -> None:
        self._course: _Course | None = None

    @property
    def epoch(self) -> Epoch | None:
        """Of the move that is followed."""
        return self._course.epoch if self._course is not None else None

    def follow(self, state: State, now_ms: int, wall_ns: int) -> Part | None:
        """Takes the state after a turn; returns this node's part when the move has ended."""
        course = self._course
        if course is None:
            self._course = _begun(state, now_ms, wall_ns)
            return None
        course.step(state.phase, now_ms)
        part = (_given if course.side == "giver" else _received)(course, state, now_ms)
        if part is not None:
            self._course = None
        return part


def _begun(state: State, now_ms: int, wall_ns: int) -> _Course | None:
    if state.phase in RECEIVING_PHASES and state.handover is not None:
        return _Course("receiver", state.handover, now_ms, wall_ns, state.phase, now_ms)
    given = state.handover or state.prepared
    if state.phase in GIVING_PHASES and given is not None:
        return _Course("giver", given, now_ms, wall_ns, state.phase, now_ms)
    return None


def _received(course: _Course, state: State, now_ms: int) -> Part | None:
    if state.phase in RECEIVING_PHASES and state.handover == course.epoch:
        course.asked = course.asked or state.presync_ready
        return None
    course.end(now_ms, state)
    stall_ms, how = None, ""
    if course.done and state.serving and state.final_since_ms >= course.began_ms:
        stall_ms = now_ms - state.final_since_ms
        how = (
            "from when the receiver heard that the giver had closed, by the receiver's clock: a "
            "little less than clients saw"
        )
    return _part(course, now_ms, stall_ms, how)


def _given(course: _Course, state: State, now_ms: int) -> Part | None:
    """The giver's part is whole once somebody serves again: only it knows when clients were held.

    Both ends by one clock: those of two nodes cannot be compared.
    """
    told = state.last_handover
    ended = told is not None and told.epoch == course.epoch
    if course.ended_ms is None and (ended or state.phase in (Phase.ACTIVE, Phase.WAITING)):
        course.end(now_ms, state)
    if course.ended_ms is None:
        return None
    froze = state.froze_ms >= course.began_ms
    held_ms = now_ms - state.froze_ms if froze else None
    restarted = "" if froze else "not known: the giver's daemon was restarted meanwhile"
    if state.serving and state.phase is Phase.ACTIVE:
        how = "from the closing of the service to its opening on the same node, by its clock"
        return _part(course, now_ms, held_ms, restarted or how)
    report = state.report
    serves = report is not None and report.serving and report.phase is Phase.ACTIVE
    if serves and lease.peer_heard(state, now_ms):
        how = (
            "from the closing of the service on the giver to its hearing that the receiver serves, "
            "by the giver's clock"
        )
        return _part(course, now_ms, held_ms, restarted or how)
    if now_ms - course.ended_ms >= SERVED_WITHIN_MS:
        how = f"not known: nobody was seen to serve within {SERVED_WITHIN_MS // 1000} s"
        return _part(course, now_ms, None, how)
    return None


def _part(course: _Course, now_ms: int, stall_ms: int | None, how: str) -> Part:
    return Part(
        course.side,
        course.epoch,
        course.began_ns,
        course.done,
        course.why,
        now_ms - course.began_ms,
        stall_ms,
        how,
        {name: ms for name, ms in course.steps.items() if name in _STEPS},
        asked=course.asked or course.side == "giver",
    )

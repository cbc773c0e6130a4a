"""What the daemon says of a planned move of the service before it begins: may it be.

The table of guards shows all of them with what was found, never only the first that fails. Nothing
here decides a move: the core looks at its own conditions once more when it is asked for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from nfsha.core import lease
from nfsha.core.model import Phase, Role
from nfsha.core.state import State
from nfsha.daemon.shell import Shell
from nfsha.host.control import CommandError

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Guarded:
    """One guard: what must be so, whether it is, and what was found."""

    name: str
    ok: bool
    found: str


class HandoverAnswers:
    """Answers of one daemon about moves of the service."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    def plan(self, to: Role) -> Facts:
        """The table of guards for a move to the node of this role."""
        guards = list(self._guards(to))
        return {
            "to": str(to),
            "ok": all(one.ok for one in guards),
            "guards": [asdict(one) for one in guards],
        }

    # ------------------------------------------------------------- the guards

    def _guards(self, to: Role) -> Iterator[Guarded]:
        engine = self._shell.engine
        if engine is None:
            raise CommandError("the daemon is still starting: repeat in a moment")
        now_ms = self._shell.world.clock_ms()
        state = engine.state
        yield from _peer(state, now_ms)
        yield from _phases(state, to)
        yield from _journals(state)
        yield from _soundness(state)
        yield from self._volumes(state)

    def _volumes(self, state: State) -> Iterator[Guarded]:
        replicator = self._shell.world.replication.replicator
        if replicator is None:
            yield Guarded(
                "volumes", True, "somebody else replicates: nfsha knows nothing of their data"
            )
            return
        bad = [sentence for pair in replicator.inventory.pairs() for sentence in pair.obstacles()]
        told = replicator.inventory.there is not None
        if not told:
            bad.append("the other node has not told its volumes yet: repeat in a moment")
        count = len(replicator.inventory.pairs())
        yield Guarded(
            "volumes", not bad, "; ".join(bad) or f"{count} volumes, the same on both nodes"
        )
        paused = replicator.fetching.schedule.paused and not state.serving
        yield Guarded(
            "passes",
            not paused,
            "paused here: `nfsha sync --resume`" if paused else "not paused here",
        )


def _peer(state: State, now_ms: int) -> Iterator[Guarded]:
    heard = lease.peer_heard(state, now_ms)
    age = f"{now_ms - state.heard_ms} ms ago" if state.report is not None else "never"
    yield Guarded("other node heard", heard, f"heard {age}")


def _phases(state: State, to: Role) -> Iterator[Guarded]:
    theirs = state.report.phase if state.report is not None else None
    phases: dict[Role, Phase | None] = {state.me: state.phase, state.me.other: theirs}
    words = ", ".join(f"{role} is {phase or 'unheard'}" for role, phase in phases.items())
    yield Guarded(
        "one serves, the other waits",
        phases[to.other] is Phase.ACTIVE and phases[to] in (Phase.PASSIVE, Phase.RETURNED),
        words if phases[to] is not Phase.ACTIVE else f"{words}: it serves there already",
    )
    under_way = state.handover or state.asks or (state.report and state.report.handover)
    yield Guarded(
        "no other move",
        not under_way,
        "one is under way: `nfsha status`" if under_way else "none is under way",
    )


def _journals(state: State) -> Iterator[Guarded]:
    trouble = state.persist_error or (state.journal_corrupt if state.epoch is None else "")
    yield Guarded("journal", not trouble, trouble or "sound")
    theirs = state.report.epoch if state.report is not None else None
    same = theirs == state.epoch and state.epoch is not None
    yield Guarded("epochs", same, f"here {state.epoch}, there {theirs}")
    promised = state.durable.promise or state.durable.peer_promise
    yield Guarded(
        "no promise",
        not promised,
        "a promise not to take over is not ended yet: repeat in a moment" if promised else "none",
    )


def _soundness(state: State) -> Iterator[Guarded]:
    report = state.report
    theirs = report is not None and report.healthy
    sound = state.fit is True and theirs
    here = "sound" if state.fit else state.fitness_reason
    there = "sound" if theirs else "not sound (see `nfsha status` there)"
    yield Guarded("services and storage", sound, f"here {here}, there {there}")
    held = f"{'held' if state.address_held else 'not held'} here"
    serves_there = report is not None and report.serving
    yield Guarded(
        "VIP on the node that serves only",
        state.address_held is state.serving and state.serving is not serves_there,
        f"{held}, {'served' if serves_there else 'not served'} there",
    )
    yield Guarded(
        "time for it",
        not state.stopping and state.refuses is None,
        "the daemon is stopping" if state.stopping else "nothing else is being done",
    )

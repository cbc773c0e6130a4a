"""The nfsha daemon as it is, but that it stands still at one chosen action, before or after it.

It tells that it stands there, and goes on when it is told to; so a test can kill, cut or fill
something at that very boundary. All that it does is the production code's: the executors and the
replication are only wrapped from outside. Run in a storage node:

    python -m tests.netns.labkit.stepped FOLDER

FOLDER has `wanted` (a line "before NAME" or "after NAME", by the names of `stepped_actions`; it is
removed once it was reached), and the pipes `reached` and `go`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from nfsha.cli.main import main as nfsha
from nfsha.core.engine import Decision, Engine
from nfsha.core.model import Action, Announce, Input, Numbered, Result, SendHeartbeat
from nfsha.core.replication import Fetch, Flow, Offer, Rest
from nfsha.daemon.executors import Executors
from nfsha.replica.fetching.finding import Finding
from nfsha.replica.fetching.schedule import Cause, Reason, Schedule
from nfsha.replica.replicator import Replicator
from nfsha.replica.volume import volumes
from tests.netns.labkit.stepped_actions import LAST, PASS, PROOF, STAMP, Namer, data_action, of_flow

BEFORE, AFTER = "before", "after"
_AT_ONCE = (SendHeartbeat, Announce)
"""Done when they are handed out; all others have an executor that ends later."""


class Gate:
    """Where the daemon stands still."""

    def __init__(self, folder: Path) -> None:
        self._wanted = folder / "wanted"
        self._reached = os.open(folder / "reached", os.O_RDWR)
        self._go = os.open(folder / "go", os.O_RDWR)

    def at(self, edge: str, name: str) -> None:
        """Stands still here when this is the wanted boundary (the caller's thread does)."""
        try:
            wanted = self._wanted.read_text().strip()
        except FileNotFoundError:
            return
        if name and wanted == f"{edge} {name}":
            self._wanted.unlink()
            os.write(self._reached, b"\n")
            os.read(self._go, 1)


class Stepped:
    """Wraps what acts."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._namer = Namer()
        self._names: dict[int, tuple[Action, str]] = {}
        self._flow: Flow = Rest("the daemon is starting")
        self._lists = 0
        """How often this flow has asked for what changed."""

    def install(self) -> None:
        """From now on all engines and executors of this process are watched."""
        self._watch_decisions()
        self._watch_actions()
        self._watch_replication()

    def _watch_decisions(self) -> None:
        turn = Engine.turn

        def watched(engine: Engine, inputs: Sequence[Input], now_ms: int) -> Decision:
            before = engine.state
            decision = turn(engine, inputs, now_ms)
            named = self._namer.names(before, decision)
            # By identity: two equal actions are two. Kept alive here, so that no id comes twice.
            self._names |= {id(action): (action, name) for action, name in named}
            return decision

        _replace(Engine, "turn", watched)

    def _take_name(self, action: Action) -> str:
        return self._names.pop(id(action), (action, ""))[1]

    def _watch_actions(self) -> None:
        perform, alone, on_lock = Executors.perform, Executors._alone, Executors._on_lock

        def performed(executors: Executors, numbered: Numbered) -> None:
            name = ""
            if isinstance(numbered.action, _AT_ONCE):
                name = self._take_name(numbered.action)
            self._gate.at(BEFORE, name)
            perform(executors, numbered)
            self._gate.at(AFTER, name)

        async def between(name: str, work: Awaitable[Any]) -> Any:
            self._gate.at(BEFORE, name)
            done = await work
            self._gate.at(AFTER, name)
            return done

        def done_alone(executors: Executors, action: Any) -> Awaitable[Result]:
            return between(self._take_name(action), alone(executors, action))

        async def done_on_lock(executors: Executors, action: Any) -> Result | None:
            done: Result | None = await between(self._take_name(action), on_lock(executors, action))
            return done

        _replace(Executors, "perform", performed)
        _replace(Executors, "_alone", done_alone)
        _replace(Executors, "_on_lock", done_on_lock)

    def _watch_replication(self) -> None:
        follow, make, list_all = Replicator.follow, Schedule.make, Finding.list_all
        stamp = volumes.write_stamp

        def followed(replicator: Replicator, flow: Flow, *more: Any) -> None:
            if flow != self._flow:
                self._lists = 0
            self._flow = flow
            follow(replicator, flow, *more)

        async def made(schedule: Schedule, uuid: str, reason: Reason) -> bool:
            name = self._of_data(PASS) if reason.cause is Cause.COMMAND else ""
            self._gate.at(BEFORE, name)
            done = await make(schedule, uuid, reason)
            self._gate.at(AFTER, name)
            return done

        async def listed(finding: Finding, *args: Any) -> Any:
            # In the freeze once before the last pass, and once more for the proof.
            self._lists += 1
            name = self._of_data(LAST if self._lists == 1 else PROOF)
            self._gate.at(BEFORE, name)
            listing = await list_all(finding, *args)
            self._gate.at(AFTER, name)
            return listing

        def stamped(*args: Any) -> None:
            name = self._of_data(STAMP) if isinstance(self._flow, Offer | Fetch) else ""
            self._gate.at(BEFORE, name)
            stamp(*args)
            self._gate.at(AFTER, name)

        _replace(Replicator, "follow", followed)
        _replace(Schedule, "make", made)
        _replace(Finding, "list_all", listed)
        _replace(volumes, "write_stamp", stamped)

    def _of_data(self, what: str) -> str:
        name = data_action(self._flow, what)
        return name if name in of_flow(self._flow) else ""


def _replace(owner: object, name: str, by: Callable[..., object]) -> None:
    if not hasattr(owner, name):
        raise AttributeError(f"{owner} has no {name} any more: the test must follow the code")
    setattr(owner, name, by)


def main(run: Callable[[Sequence[str]], int] = nfsha) -> int:
    """Runs the daemon of this node, watched."""
    Stepped(Gate(Path(sys.argv[1]))).install()
    return run(["run"])


if __name__ == "__main__":
    sys.exit(main())

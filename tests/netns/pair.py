"""A pair of daemons in the lab: starts them with real files, and reads what they decided.

What a node decided comes from its event log on disk, with times of CLOCK_BOOTTIME, so that waiting
costs the nodes nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.netns.lab import ROLES, Lab
from tests.netns.labkit.network import VIP
from tests.netns.labkit.place import LabError, Process
from tests.netns.labkit.records import Records
from tests.netns.labkit.storage_node import node_config

HOLD_MS = 600
TAKEOVER_AFTER_MS = 1000
ADDRESS_LEASE_MS = 2000
ADDRESS_LATE_MS = 400
SURVEY_MS = 300
BUSY_MS = 500
"""What a machine with two busy cores may add to a bound of the design."""

FAST_TIMINGS_MS = {"hold": 300, "takeover_after": 450}


@dataclass(frozen=True)
class Event:
    """One line of a node's event log."""

    at_ms: int
    row: str
    phase: str
    to: str
    why: str
    detail: str


def assert_only_moved(records: Records, served: Event) -> None:
    """Asserts that nothing failed but, at most, the one operation under way as the service moved.

    It spans two copies that are not the same (DESIGN 8): its file was found or opened on the old
    node, and is another one, or not there, on the new one. Whatever began later goes by path.
    """
    assert len(records.failed) <= 1, records.failed
    for one in records.failed:
        assert one.sent_ns // 1_000_000 <= served.at_ms, f"began after the move: {one}"
        assert one.stale, one


class Pair:
    """Both daemons of a lab."""

    def __init__(
        self,
        lab: Lab,
        *,
        vips: Sequence[str] = (VIP,),
        mounts: Sequence[str] = ("/nfs/data",),
        profile: str | None = None,
        replication: str = "off",
        tables: str = "",
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.lab = lab
        self.env = env
        for name, role in ROLES.items():
            config = node_config(
                role,
                vips=vips,
                mounts=mounts,
                profile=profile,
                replication=replication,
                tables=tables,
            )
            lab.configure(name, config)

    def start(self, *names: str) -> None:
        """Starts the daemons of these nodes (both when none is named)."""
        for name in names or ("a", "b"):
            self.lab.node(name).start_daemon(self.env)

    def daemon(self, name: str) -> Process:
        """The daemon that was started last on a node."""
        daemon = self.lab.node(name).daemon
        if daemon is None:
            raise LabError(f"no daemon was started on {name}")
        return daemon

    def settle(self) -> None:
        """Starts both and waits until the primary serves and the standby is passive."""
        self.start()
        self.wait_phase("a", "ACTIVE")
        self.wait_phase("b", "PASSIVE")

    def events(self, name: str, since_ms: int = 0) -> list[Event]:
        """What a node decided since a time, oldest first."""
        file = self._file(name)
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        found = []
        for line in lines:
            if line.startswith("{") and line.endswith("\n"):
                facts = json.loads(line)
                facts.pop("wall")
                found.append(Event(**facts))
        return [event for event in found if event.at_ms >= since_ms]

    def moves(self, name: str, since_ms: int = 0) -> list[tuple[str, str]]:
        """The changes of phase of a node since a time."""
        return [(e.phase, e.to) for e in self.events(name, since_ms) if e.phase != e.to]

    def wait_event(
        self,
        name: str,
        wanted: Callable[[Event], bool],
        what: str,
        *,
        since_ms: int,
        within_s: float,
    ) -> Event:
        """Waits for an event since a time. Raises LabError with what came instead."""
        deadline = time.monotonic() + within_s
        while True:
            events = self.events(name, since_ms)
            for event in events:
                if wanted(event):
                    return event
            if time.monotonic() > deadline:
                told = "\n".join(f"  {e.at_ms} {e.row} {e.to}: {e.why}" for e in events)
                raise LabError(f"{name}: no {what} within {within_s} s; instead:\n{told}")
            time.sleep(0.01)

    def wait_phase(
        self, name: str, phase: str, *, since_ms: int = 0, within_s: float = 10.0
    ) -> Event:
        """Waits until a node came to a phase since a time, and returns when and why."""
        return self.wait_event(
            name, lambda e: e.to == phase, f"phase {phase}", since_ms=since_ms, within_s=within_s
        )

    def phase(self, name: str) -> str:
        """The phase that the last event of a node shows."""
        events = self.events(name)
        return events[-1].to if events else ""

    def now_ms(self) -> int:
        """The clock of the events, just after a tick: whatever was logged before bears less.

        Without the wait an event read a moment ago can bear this very millisecond, and would be
        taken for one that came after.
        """
        began_ms = self.lab.now_ns() // 1_000_000
        while self.lab.now_ns() // 1_000_000 == began_ms:
            pass
        return began_ms + 1

    def assert_never_two(self, *vips: str, since_ns: int = 0) -> None:
        """Asserts that no two nodes held a VIP at once, and that no answer of the old came late."""
        seen = self.lab.look()
        seen.require_complete()
        for vip in vips or (VIP,):
            assert seen.address_overlap_ms(vip, since_ns) == 0.0, seen.render(vip, since_ns)
            assert seen.reply_overlap_ms(vip, since_ns) == 0.0, seen.render(vip, since_ns)

    def log(self, name: str) -> str:
        """All that a node's daemon printed."""
        return self.daemon(name).output()

    def _file(self, name: str) -> Path:
        # Through the lab's folder, not through the node: a node that is off has a log too.
        return self.lab.folder / name / "lib" / "events.jsonl"

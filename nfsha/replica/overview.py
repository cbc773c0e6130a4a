"""What is known of this node's copies and its side, told: to operators, metrics and guards.

It changes nothing, and asks nobody: what it tells was found by others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nfsha.core.replication import Approach, Fetch, Finish, Flow, Offer, Rest
from nfsha.replica.fetching.copying import Copy, State
from nfsha.replica.fetching.fetching import Fetching
from nfsha.replica.handover.receiving import MAX_FAILURES
from nfsha.replica.quarantines import Quarantines
from nfsha.replica.source.serving import Serving
from nfsha.replica.volume.facts import VolumeFacts, as_json
from nfsha.replica.volume.inventory import Inventory, Pair
from nfsha.replica.volume.marks import EVERYTHING, MarkStore

FETCHES = (Fetch, Approach, Finish)
"""The ways on which this node receives."""

Facts = dict[str, Any]


class Overview:
    """The view of one node's replication."""

    def __init__(
        self,
        inventory: Inventory,
        store: MarkStore,
        fetching: Fetching,
        serving: Serving,
        quarantines: Quarantines,
        flow: Callable[[], Flow],
    ) -> None:
        """`flow`: which way data flows now."""
        self._inventory = inventory
        self._store = store
        self._fetching = fetching
        self._serving = serving
        self._quarantines = quarantines
        self._now = flow
        self.rsync = ""
        self.warnings: tuple[str, ...] = ()
        """Of the rsync that is installed here."""
        self.taints_there: Mapping[str, str] = {}
        """Why copies of the other node are mixtures, as it told."""

    @property
    def _flow(self) -> Flow:
        return self._now()

    @property
    def serves(self) -> bool:
        """This node is the source now: what is changed here is seen by clients."""
        return isinstance(self._flow, Offer)

    def hindrances(self) -> list[str]:
        """What would end a handover on this node's side, after clients were held for nothing.

        Not deletions that are held: those have a plan, which an operator accepts.
        """
        if isinstance(self._flow, Offer):
            found = [f"volume {name} is not offered: {why}" for name, why in self._not_offered()]
            if self._serving.source.trouble:
                found.append(f"the data is not offered: {self._serving.source.trouble}")
            return found
        if not isinstance(self._flow, FETCHES):
            return []
        return [
            f"volume {self._inventory.name_of(copy.uuid)}: {copy.why}"
            for copy in self._fetching.copies.values()
            if self._hinders(copy)
        ]

    @property
    def paused(self) -> bool:
        """Whether an operator holds the passes into this node back."""
        return self._fetching.schedule.paused and not self.serves

    def copied_ns(self) -> int:
        """When the oldest of the last complete passes began, by the source's clock.

        0 where nothing is copied to this node, or a volume never was, whole.
        """
        if not isinstance(self._flow, FETCHES):
            return 0
        marks = [self._store.own.get(uuid) for uuid in self._fetching.copies]
        return min((0 if mark is None else mark.started_ns for mark in marks), default=0)

    def _not_offered(self) -> list[tuple[str, str]]:
        unwatched = dict.fromkeys(self._serving.unwatched(), "it has no change journal")
        return sorted((unwatched | self._serving.troubles).items())

    def _hinders(self, copy: Copy) -> bool:
        """A resync that waits for the operator's word is none: a handover is that word."""
        if copy.state is State.REFUSED:
            return self._fetching.sync.resync == "automatic"
        return copy.state is State.FAILED and copy.attempts >= MAX_FAILURES

    # ------------------------------------------------------------- for operators

    def facts(self) -> Facts:
        """Everything that `nfsha volumes` shows."""
        return {
            "volumes": [self._volume(pair) for pair in self._inventory.pairs()],
            "replication": self.side(),
        }

    def side(self) -> Facts:
        """Which side this node is on, and why."""
        flow = self._flow
        modes = {Offer: "source", Rest: "none"}
        return {
            "mode": modes.get(type(flow), "target"),
            "why": "" if isinstance(flow, Offer) else self.why_not(),
            "source": self._serving.facts(),
            "paused": self._fetching.schedule.paused,
            "bandwidth_kib_s": self._fetching.bandwidth_kib_s,
            "rsync": self.rsync,
            "warnings": [*self.warnings, *self._troubles()],
        }

    def _troubles(self) -> list[str]:
        found = [f"volume {name}: {why}" for name, why in sorted(self._serving.troubles.items())]
        if self._inventory.trouble:
            found.append(self._inventory.trouble)
        return found

    def _volume(self, pair: Pair) -> Facts:
        copy = self._fetching.copies.get(pair.uuid or "") or Copy(pair.uuid or "")
        store = self._store.peer if isinstance(self._flow, Offer) else self._store.own
        mark = store.get(pair.uuid or "")
        age_ms = None if mark is None else max(0, (time.time_ns() - mark.started_ns) // 1_000_000)
        next_ms = (
            self._fetching.schedule.next_ms(copy.uuid) if copy.state is not State.OFF else None
        )
        one = pair.here or pair.there
        told = self._inventory.there is not None
        return {
            "name": pair.name,
            "path": str(one.path) if one is not None else "",
            "uuid": pair.uuid,
            "paired": pair.paired if told else "unknown",
            "here": as_json(pair.here) if pair.here is not None else None,
            **({"there": as_json(pair.there) if pair.there is not None else None} if told else {}),
            "differs": list(pair.differs),
            "tainted": self._taint_of(pair.uuid or ""),
            "sync": copy.as_json(mark, age_ms, next_ms),
        }

    def _taint_of(self, uuid: str) -> str:
        """Why the copy is a mixture of two states; on the source, the copy of the other node."""
        if not isinstance(self._flow, Offer):
            return self._store.taint_of(uuid)
        return self.taints_there.get(uuid) or self.taints_there.get(EVERYTHING, "")

    def alarms(self) -> dict[str, str]:
        """What is not as it should be with the copies: names, each with a sentence."""
        found: dict[str, str] = {}
        if self._inventory.trouble and self._inventory.looked_ms is not None:
            found["volumes-unseen"] = self._inventory.trouble
        for pair in self._inventory.pairs():
            found |= self._pair_alarms(pair)
        if isinstance(self._flow, FETCHES):
            for copy in self._fetching.copies.values():
                found |= self._copy_alarms(copy)
            hung = self._fetching.proving.hung()
            found |= {f"volume-hangs {name}": words for name, words in hung.items()}
        for name, over in self._quarantines.over.items():
            found[f"quarantine-full {name}"] = f"volume {name}: its quarantine {over}"
        if isinstance(self._flow, Offer):
            if self._serving.source.trouble:
                found["source"] = (
                    f"the data is not offered to the other node: {self._serving.source.trouble}"
                )
            for name, why in self._serving.troubles.items():
                found[f"not-offered {name}"] = f"volume {name} is not offered: {why}"
        return found

    def _pair_alarms(self, pair: Pair) -> dict[str, str]:
        if self._inventory.there is None or pair.paired in ("paired", "new"):
            return {}
        where = "here" if pair.paired == "unpaired-here" else "on the other node"
        return {
            f"unpaired {pair.name}": f"volume {pair.name} is a replicated one only {where}: it has "
            "no copy (see `nfsha volumes`)"
        }

    def _copy_alarms(self, copy: Copy) -> dict[str, str]:
        name = self._inventory.name_of(copy.uuid)
        found = {}
        if copy.plan is not None:
            found[f"deletes-held {name}"] = f"volume {name}: {copy.why}"
        elif copy.state in (State.FAILED, State.REFUSED):
            found[f"not-copied {name}"] = f"volume {name}: {copy.why}"
        if copy.damaged or copy.missed:
            found[f"verify {name}"] = (
                f"volume {name}: the last verify found {copy.damaged} damaged files and "
                f"{copy.missed} missed changes (the log names them)"
            )
        if copy.missed_by_journal:
            found[f"journal-missed {name}"] = (
                f"volume {name}: full walks found what the change journal had not named, "
                f"{copy.missed_by_journal} in all"
            )
        return found

    def takeover_windows(self) -> list[str]:
        """Per volume, which writes may be missing if this node takes over now."""
        now_ns = time.time_ns()
        found = []
        for one in self.paired():
            mark = self._store.own.get(one.identity or "")
            if mark is None:
                found.append(f"volume {one.name}: never copied whole")
                continue
            age_s = max(0, now_ns - mark.started_ns) / 1e9
            found.append(
                f"volume {one.name}: writes of the last {age_s:.1f} s may be missing (the last "
                f"complete pass began at {_wall(mark.started_ns)} by the source's clock)"
            )
        return found

    def why_not(self) -> str:
        """Why no pass can be asked for here now."""
        if isinstance(self._flow, Offer):
            return "it serves, run this on the other node"
        if isinstance(self._flow, Approach | Finish):
            return "a handover makes its own passes"
        return self._flow.why

    def paired(self) -> Sequence[VolumeFacts]:
        """Volumes that have a counterpart: told by the other node now, or by a pass of before."""
        known = self._store.own.keys() | self._store.peer.keys()
        told = {pair.uuid for pair in self._inventory.pairs() if pair.paired == "paired"}
        return [
            one for one in self._inventory.here if one.identity is not None
            and (one.identity in told or one.identity in known)
        ]  # fmt: skip

    def held(self) -> Facts:
        """The plans of deletions that wait for an operator here, by the volume's identity."""
        if not isinstance(self._flow, FETCHES):
            return {}
        copies = sorted(self._fetching.copies.items())
        return {uuid: copy.plan.hash for uuid, copy in copies if copy.plan is not None}


def _wall(moment_ns: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment_ns / 1e9))

"""A pair that replicates: both daemons with `replication = "rsync"`, and questions about copies."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.netns.lab import Lab
from tests.netns.labkit.place import LabError
from tests.netns.pair import Pair
from tests.netns.treewalk import differences

SYNC = '[sync]\nevery = "1s"\njitter = "0s"\n'
"""Passes come quickly; all else as shipped."""


class Copies(Pair):
    """Both daemons of a lab, with their volumes copied from the one that serves to the other."""

    def __init__(self, lab: Lab, *, sync: str = SYNC, **options: Any) -> None:
        super().__init__(lab, replication="rsync", tables=sync, **options)

    def settle_whole(self, *names: str) -> None:
        """Starts both and waits until the primary serves and the standby is a whole replica.

        `names` are the volumes that must have been copied; without any, the one of most labs.
        """
        self.start()
        self.wait_phase("a", "ACTIVE")
        self.wait_whole(*names)

    def wait_whole(self, *names: str) -> None:
        """Waits until the standby is a whole replica, as `settle_whole` does."""
        self.wait_phase("b", "PASSIVE", within_s=20)
        for name in names or ("data",):
            self.wait(lambda name=name: self.mark("b", name) is not None, "a complete pass")  # type: ignore[misc]

    def volumes(self, node: str) -> dict[str, Any]:
        """`nfsha volumes --json` of a node."""
        answer: dict[str, Any] = json.loads(self.lab.node(node).nfsha("volumes", "--json").stdout)
        return answer

    def volume(self, node: str, name: str = "data") -> dict[str, Any]:
        """One volume as a node shows it."""
        found = [one for one in self.volumes(node)["volumes"] if one["name"] == name]
        if len(found) != 1:
            raise LabError(f"{node} shows {len(found)} volumes {name}")
        return dict(found[0])

    def copy(self, node: str = "b", name: str = "data") -> dict[str, Any]:
        """How a copy stands: the part `sync` of a volume."""
        return dict(self.volume(node, name)["sync"])

    def mark(self, node: str = "b", name: str = "data") -> dict[str, Any] | None:
        """The last complete pass, as a node knows it."""
        last = self.copy(node, name)["last"]
        return None if last is None else dict(last)

    def pass_began_ns(self, name: str = "data") -> int:
        """When the last complete pass into the standby began, from its file: at no cost for it."""
        uuid = (self.here("a", name) / ".nfsha-volume").read_text().split()[0]
        file = self.lab.folder / "b" / "lib" / "marks" / f"own-{uuid}"
        return int(json.loads(file.read_bytes())["payload"]["started_ns"])

    def sync(self, *argv: str, check: bool = True) -> str:
        """`nfsha sync --wait` on the passive node; its output."""
        done = self.lab.b.nfsha("sync", "--wait", *argv, check=check, timeout_s=120)
        return done.stdout + done.stderr

    def wait(self, done: Callable[[], bool], what: str, within_s: float = 20.0) -> None:
        """Waits for something that a test asks for again and again."""
        deadline = time.monotonic() + within_s
        while not done():
            if time.monotonic() > deadline:
                raise LabError(f"no {what} within {within_s} s: {self.volumes('b')}")
            time.sleep(0.1)

    def wait_state(self, *states: str, node: str = "b", within_s: float = 20.0) -> dict[str, Any]:
        """Waits until a copy stands so, and returns it as it was then.

        Asked for once more a moment later, the next pass may run already.
        """
        seen: list[dict[str, Any]] = []

        def stands_so() -> bool:
            seen.append(self.copy(node))
            return seen[-1]["state"] in states

        self.wait(stands_so, f"copy that is {' or '.join(states)}", within_s)
        return seen[-1]

    def here(self, node: str, name: str = "data") -> Path:
        """A volume of a node, as this process reaches it."""
        return self.lab.node(node).path(f"/nfs/{name}")

    def names(self, node: str, folder: str = ".") -> list[str]:
        """What is in a folder of the first volume of a node, but for nfsha's own files."""
        found = sorted(one.name for one in (self.here(node) / folder).iterdir())
        return [name for name in found if not name.startswith((".nfsha-", "lost+found"))]

    def differences(self, name: str = "data") -> list[str]:
        """What differs between the two copies, by a walk of our own."""
        return differences(self.here("a", name), self.here("b", name))


@contextmanager
def hanging(copies: Copies, node: str) -> Iterator[None]:
    """The node's rsync daemon does not answer."""
    daemon = psutil.Process(copies.daemon(node).pid)
    stopped = [one for one in daemon.children(recursive=True) if one.name() == "rsync"]
    assert stopped
    for one in stopped:
        one.suspend()
    try:
        yield
    finally:
        for one in stopped:
            if one.is_running():
                one.resume()

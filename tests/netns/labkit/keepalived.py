"""keepalived in the lab's nodes, for the side-by-side bench; configuration in bench/keepalived/."""

from __future__ import annotations

import contextlib
import os
import signal
import string
import time

import psutil

from tests.netns.labkit.network import PLACES, VIP
from tests.netns.labkit.place import REPOSITORY, LabError, Process
from tests.netns.labkit.storage_node import StorageNode

TEMPLATE = REPOSITORY / "bench" / "keepalived" / "keepalived.conf"
_STATES = {"a": ("MASTER", 150), "b": ("BACKUP", 100)}


class Keepalived:
    """One keepalived (parent and VRRP child) in one storage node."""

    def __init__(self, node: StorageNode, *, advert_s: float, vip: str = VIP) -> None:
        """advert_s: 1 is its default; node a is MASTER, b BACKUP."""
        self.node = node
        self._advert_s = advert_s
        self._vip = vip
        self._process: Process | None = None

    def config(self) -> str:
        """The configuration file of this node."""
        state, priority = _STATES[self.node.name]
        return string.Template(TEMPLATE.read_text()).substitute(
            name=self.node.name, state=state, priority=priority, advert_s=f"{self._advert_s:g}",
            vip=self._vip, interface=PLACES[self.node.name].lan.interface,
        )  # fmt: skip

    def start(self) -> None:
        """Starts it in the foreground; its log is `keepalived.log` of the node."""
        file = self.node.folder / "keepalived.conf"
        file.write_text(self.config())
        argv = ["keepalived", "--dont-fork", "--log-console", "--vrrp", "--use-file", str(file)]
        self._process = self.node.spawn(argv, name="keepalived")

    @property
    def process(self) -> Process:
        """The parent process."""
        if self._process is None:
            raise LabError(f"keepalived was not started on {self.node.name}")
        return self._process

    def wait_holder(self, timeout_s: float = 15.0) -> None:
        """Waits until this node holds the address."""
        deadline = time.monotonic() + timeout_s
        while not self.node.holds(self._vip):
            if time.monotonic() > deadline or not self.process.alive:
                raise LabError(
                    f"keepalived of {self.node.name} did not take over\n{self.process.tail()}"
                )
            time.sleep(0.05)

    def stop(self) -> None:
        """A clean stop: it gives the address away."""
        self.process.stop()

    def kill(self) -> None:
        """SIGKILL to parent and child as if at once: the address stays on the interface.

        Stopped first: the child that sees its parent die would give the address away.
        """
        self.freeze()
        self._signal_all(signal.SIGKILL)
        self.process.wait(10.0)

    def freeze(self) -> None:
        """SIGSTOP to both."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT to both."""
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: int) -> None:
        parent = psutil.Process(self.process.pid)
        for pid in [parent.pid, *(child.pid for child in parent.children(recursive=True))]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

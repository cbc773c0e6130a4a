"""A node's block replica: which node has it mounted, and the hooks that mount it and give it up.

As DRBD with a single primary: it lets itself be mounted only while the other node, if that is
there, has it not. A hook that is cut short leaves anything behind. What is mounted survives the
daemon, not the machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nfsha.core.model import (
    Completed,
    MountVolumes,
    Result,
    UnmountVolumes,
    VolumesMounted,
    VolumesUnmounted,
)

if TYPE_CHECKING:
    from tests.sim.node import Node

TIMEOUT_MS = 5_000
"""What both nodes are configured with."""

HOOK_MOST_MS = 250
"""How long a hook takes at most when all is well."""


class Block:
    """One node's side of it."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._world = node.world
        self.mounted = False
        self._run = 0
        self._running = ""
        self.takes_us: int | None = None
        """A scenario's word on how long a hook takes; None: chance decides."""

    def power_lost(self) -> None:
        """Nothing is mounted on a machine that is off."""
        self._run += 1
        self._running = ""
        self.mounted = False

    def daemon_ended(self) -> None:
        """The hook that runs is killed with the daemon."""
        self._cut_short()

    def final_stop(self) -> None:
        """What systemd runs after a final stop gives the volumes up."""
        self.mounted = False

    def start(self, number: int, action: MountVolumes | UnmountVolumes) -> None:
        """The action: an older hook is ended, this one runs and reports."""
        self._cut_short()
        hook = "mount" if isinstance(action, MountVolumes) else "unmount"
        if hook == "unmount" and self._node.accepts():
            self._world.checks.fail("volumes", f"{self._node.role} unmounts while it serves")
        self._running = hook
        self._world.at(self._takes_us(), self._end, self._run, self._node.life, number)

    def _cut_short(self) -> None:
        self._run += 1
        if self._running:
            self._world.fired("hook-killed")
            if self._running == "mount" and not self._other_has_it():
                self.mounted = self._world.random.random() < 0.5
            elif self._running == "unmount":
                self.mounted = self.mounted and self._world.random.random() < 0.5
        self._running = ""

    def _takes_us(self) -> int:
        if self.takes_us is not None:
            return self.takes_us
        random = self._world.random
        if not self._world.healed and random.random() < 0.1:
            self._world.fired("hook-slow")
            self._world.disturb()
            return random.randrange(500_000, TIMEOUT_MS * 1000)
        return random.randrange(1_000, HOOK_MOST_MS * 1000)

    def _end(self, run: int, life: int, number: int) -> None:
        if run != self._run:
            return
        if self._node.frozen:
            self._world.at(50_000, self._end, run, life, number)
            return
        hook, self._running = self._running, ""
        result: Result = self._mount() if hook == "mount" else self._unmount()
        if life == self._node.life:
            self._node.take(Completed(number, result))

    def _mount(self) -> Result:
        if self._other_has_it():
            self._world.fired("mount-refused")
            self._world.disturb()
            return VolumesMounted(ok=False, detail="the other node has it")
        if self._fails():
            return VolumesMounted(ok=False, detail="chance")
        self.mounted = True
        return VolumesMounted(ok=True)

    def _unmount(self) -> Result:
        if self._fails():
            return VolumesUnmounted(ok=False, detail="chance")
        self.mounted = False
        return VolumesUnmounted(ok=True)

    def _fails(self) -> bool:
        if self._world.healed or self.takes_us is not None or self._world.random.random() >= 0.1:
            return False
        self._world.fired("hook-failed")
        self._world.disturb()
        return True

    def _other_has_it(self) -> bool:
        other = self._world.nodes[self._node.role.other]
        return other.powered and not other.frozen and other.block.mounted

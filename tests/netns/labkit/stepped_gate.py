"""The owner's end of the gate at which a daemon stands still; see `stepped`."""

from __future__ import annotations

import contextlib
import os
import select
from pathlib import Path


class Steps:
    """Says where the daemon of one node is to stand still, and lets it go on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in ("reached", "go"):
            os.mkfifo(folder / name)
        self._reached = os.open(folder / "reached", os.O_RDWR | os.O_NONBLOCK)
        self._go = os.open(folder / "go", os.O_RDWR | os.O_NONBLOCK)

    def close(self) -> None:
        """Lets go of the pipes."""
        os.close(self._reached)
        os.close(self._go)

    def want(self, edge: str, name: str) -> None:
        """The daemon is to stand still before or after the action of this name."""
        new = self.folder / "wanted.new"
        new.write_text(f"{edge} {name}\n")
        new.rename(self.folder / "wanted")

    def forget(self) -> None:
        """Nothing is wanted, and nothing was told: for the next case."""
        (self.folder / "wanted").unlink(missing_ok=True)
        for fd in (self._reached, self._go):
            with contextlib.suppress(BlockingIOError):
                os.read(fd, 4096)

    def reached(self, within_s: float) -> bool:
        """Waits until the daemon stands there."""
        ready, _, _ = select.select([self._reached], [], [], within_s)
        return bool(ready) and bool(os.read(self._reached, 1))

    def go_on(self) -> None:
        """Lets the daemon go on."""
        os.write(self._go, b"\n")

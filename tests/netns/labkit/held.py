"""The nfsha daemon as it is, but that it waits at two places of a handover while a test wants it.

Its loop goes on meanwhile, with heartbeats and leases. All that it does is the production code's,
only wrapped from outside. Run in a storage node:

    python -m tests.netns.labkit.held FOLDER

As long as FOLDER has a file of this name, then

- `rest`: the giver, its ports closed, has not begun to come to rest;
- `proof`: the receiver has compared what its last pass brought, and has not asked for what changed
  since;
- `journals`: no change journal reads what waits in the kernel's queue.

`NAME.reached` appears where it waits.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nfsha.cli.main import main as nfsha
from nfsha.replica.fetching.proving import Proving
from nfsha.replica.journal.changes import ChangeJournal
from nfsha.replica.source.serving import Serving

LONGEST_S = 20.0
"""A test that failed holds nobody for longer."""

LOOK_EVERY_S = 0.005


class Holding:
    """Waits while the files of a folder say so."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def install(self) -> None:
        """From now on the daemon of this process waits."""
        come_to_rest, compare = Serving.come_to_rest, Proving.compare
        drain = ChangeJournal._drain

        async def rested(serving: Serving) -> str:
            await self._wait("rest")
            return await come_to_rest(serving)

        async def compared(proving: Proving, *args: Any) -> str:
            difference = await compare(proving, *args)
            await self._wait("proof")
            return difference

        def drained(journal: ChangeJournal, *args: Any) -> None:
            until_s = time.monotonic() + LONGEST_S
            while self._is_held("journals", until_s):
                time.sleep(LOOK_EVERY_S)
            drain(journal, *args)

        _replace(Serving, "come_to_rest", rested)
        _replace(Proving, "compare", compared)
        _replace(ChangeJournal, "_drain", drained)

    async def _wait(self, name: str) -> None:
        until_s = time.monotonic() + LONGEST_S
        while self._is_held(name, until_s):  # noqa: ASYNC110 - another process ends it
            await asyncio.sleep(LOOK_EVERY_S)

    def _is_held(self, name: str, until_s: float) -> bool:
        if not (self._folder / name).exists() or time.monotonic() > until_s:
            return False
        (self._folder / f"{name}.reached").touch()
        return True


def _replace(owner: object, name: str, by: Callable[..., object]) -> None:
    if not hasattr(owner, name):
        raise AttributeError(f"{owner} has no {name} any more: the test must follow the code")
    setattr(owner, name, by)


def main(run: Callable[[Sequence[str]], int] = nfsha) -> int:
    """Runs the daemon of this node."""
    Holding(Path(sys.argv[1])).install()
    return run(["run"])


if __name__ == "__main__":
    sys.exit(main())

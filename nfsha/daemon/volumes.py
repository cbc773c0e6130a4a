"""Volumes that hooks mount and give up: runs the hook that was ordered, and looks what it did.

A hook's word alone is not enough: a volume counts as mounted when the kernel shows all of
`nfs.mounts`, and as given up when it shows none. Without hooks all of it is nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from nfsha.config import Settings
from nfsha.core.model import Epoch, VolumesMounted, VolumesUnmounted
from nfsha.host import hooks
from nfsha.host.hooks import Hooks
from nfsha.nfs.service import MountTable

log = logging.getLogger(__name__)

MOUNTS_NAMED = 3
"""So many mount points are named in a sentence."""


class HookedVolumes:
    """The volumes of this node, as far as hooks mount them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._hooks = Hooks(settings.hooks.timeout_ms)

    @property
    def unmount_within_s(self) -> float:
        """How long a stop may have to wait for the unmount hook, in seconds."""
        hooked = self._settings.hooks
        return hooked.timeout_ms / 1000 if hooked.given else 0.0

    def start(self) -> None:
        """Looks at the files. Raises HookError when one is no hook."""
        require(self._settings)

    async def mount(self, epoch: Epoch | None) -> VolumesMounted:
        """Runs the mount hook; all volumes are mounted then, or it failed."""
        trouble = await self._run("mount", self._settings.hooks.mount, epoch)
        if not trouble and (missing := await asyncio.to_thread(_unmounted, self._mounts)):
            trouble = (
                f"{self._settings.hooks.mount} ended well, but nothing is mounted at "
                f"{_named(missing)}: it must end with an error status when it could not mount"
            )
        return VolumesMounted(ok=not trouble, detail=trouble and f"mount hook: {trouble}")

    async def unmount(self, epoch: Epoch | None) -> VolumesUnmounted:
        """Runs the unmount hook; no volume is mounted then, or it failed."""
        trouble = await self._run("unmount", self._settings.hooks.unmount, epoch)
        if not trouble and (left := await asyncio.to_thread(_mounted, self._mounts)):
            trouble = (
                f"{self._settings.hooks.unmount} ended well, but something is still mounted at "
                f"{_named(left)}: who uses it? (`fuser -vm`)"
            )
        return VolumesUnmounted(ok=not trouble, detail=trouble and f"unmount hook: {trouble}")

    async def end(self) -> None:
        """Ends the hook that runs."""
        await self._hooks.end()

    async def close(self) -> None:
        """As `end`: no hook outlives the daemon. What it mounted stays."""
        await self._hooks.end()

    @property
    def _mounts(self) -> tuple[Path, ...]:
        return self._settings.nfs.mounts

    async def _run(self, name: str, path: Path | None, epoch: Epoch | None) -> str:
        if path is None:
            raise AssertionError(f"a {name} was ordered, and there is no hook")
        began_s = time.monotonic()
        log.info("%s hook: %s", name, path)
        end = await self._hooks.run(path, environment(self._settings, name, epoch))
        took_s = time.monotonic() - began_s
        log.log(
            logging.INFO if end.ok else logging.WARNING,
            "%s hook: %s after %.1f s",
            name,
            "done" if end.ok else end.words,
            took_s,
        )
        return "" if end.ok else f"{end.words}; mend that, it is run again by itself"


def require(settings: Settings) -> None:
    """Raises HookError when a configured hook cannot be used. Blocks for a moment."""
    if settings.hooks.mount is not None and settings.hooks.unmount is not None:
        hooks.require(settings.hooks.mount, settings.hooks.unmount)


def environment(settings: Settings, name: str, epoch: Epoch | None) -> dict[str, str]:
    """What a hook is told. `name`: mount or unmount. NFSHA_MOUNTS has one path in a line."""
    return {
        "NFSHA_HOOK": name,
        "NFSHA_ROLE": str(settings.role),
        "NFSHA_NAME": settings.name,
        "NFSHA_EPOCH": str(epoch.number) if epoch is not None else "",
        "NFSHA_MOUNTS": "\n".join(map(str, settings.nfs.mounts)),
        "NFSHA_TIMEOUT": str(settings.hooks.timeout_ms // 1000),
    }


def _unmounted(mounts: tuple[Path, ...]) -> list[Path]:
    table = MountTable()
    try:
        return table.missing(mounts)
    finally:
        table.close()


def _mounted(mounts: tuple[Path, ...]) -> list[Path]:
    missing = _unmounted(mounts)
    return [path for path in mounts if path not in missing]


def _named(paths: list[Path]) -> str:
    more = f" and {len(paths) - MOUNTS_NAMED} more" if len(paths) > MOUNTS_NAMED else ""
    return ", ".join(map(str, paths[:MOUNTS_NAMED])) + more

"""What nfsha reads of the NFS server of the machine that it runs on, by its own code, as JSON.

Run as a program it prints that, once: so it can look from within a unit's sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from nfsha.nfs import mountd, served, statd
from nfsha.nfs.rpc import RpcConnection
from nfsha.nfs.served import Looker, Root, Where
from nfsha.nfs.service import Service, ServiceHealth

OWN_ADDRESS: Final = "10.77.0.1"
VIPS: Final = ("10.77.0.100", "fd77::100")
VOLUME: Final = Path("/nfs/data")
OPEN_VOLUME: Final = Path("/nfs/two words")
"""Exported to clients at any port: the one whose handles an unprivileged caller is told."""
NFSHA_FILE: Final = ".nfsha-volume"
PORTS: Final = {"rpcbind": 111, "nfs": 2049, "mountd": 20048, "statd": 20049, "lockd": 20050}
_TIMEOUT_MS: Final = 3000


def look(*, whole: bool = True) -> dict[str, Any]:
    """What goes to the other node, the health that decides, and who is known to hold locks.

    `whole`: as when somebody asks; else as every half minute.
    """
    return asyncio.run(_look(whole=whole))


async def _look(*, whole: bool) -> dict[str, Any]:
    where = Where(
        check_address="127.0.0.1",
        own_address=OWN_ADDRESS,
        ports=PORTS,
        vips=[ip_address(vip) for vip in VIPS],
        own=[ip_address(OWN_ADDRESS)],
        timeout_ms=_TIMEOUT_MS,
    )
    roots = [Root(path.name, path, (NFSHA_FILE,)) for path in (VOLUME, OPEN_VOLUME)]
    return {
        "served": served.as_json(await Looker(where).look(roots, whole=whole)),
        "health": await _health(),
        "lock_holders": statd.read(),
    }


async def _health() -> dict[str, Any]:
    service = Service("127.0.0.1", mounts=(VOLUME, OPEN_VOLUME))
    asking = ServiceHealth(
        service, clock_ms=lambda: time.monotonic_ns() // 1_000_000, timeout_ms=_TIMEOUT_MS
    )
    try:
        await asking.check()
        health = await asking.check()  # a bad answer is believed when it comes twice
    finally:
        asking.close()
    return {"ok": health.ok, "signs": health.signs, "warnings": health.warnings}


async def told_handle(path: Path) -> str:
    """The handle that the server tells clients for a folder of an export, in hexadecimal."""
    with contextlib.closing(RpcConnection(OWN_ADDRESS, PORTS["mountd"])) as connection:
        handle, why = await mountd.root_handle(connection, str(path), timeout_ms=_TIMEOUT_MS)
    return handle.hex() if handle is not None else why


if __name__ == "__main__":
    print(json.dumps(look()))

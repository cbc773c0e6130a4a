"""The health of a real NFS server: nfs-ganesha in a place of the lab."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from nfsha.host.clock import now_ms
from nfsha.nfs.rpc import (
    MOUNT_PROGRAM,
    NFS_PROGRAM,
    Answered,
    ProgramMismatch,
    RpcConnection,
    TimedOut,
)
from nfsha.nfs.service import Health, MountTable, Service, ServiceHealth
from tests.netns.labkit.nfs_server import NfsServer, make_disks
from tests.netns.labkit.place import Place, Process
from tests.netns.namespaces import inside

VERSION4_ON = "version4-on: the NFS server at 127.0.0.1:2049 speaks v4, switch it off"
NFS_REFUSED = "NFS v3 at 127.0.0.1:2049: connection refused"
MOUNTD_REFUSED = "mountd v3 at 127.0.0.1:20048: connection refused"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """One storage server with one volume, /nfs/volume; nothing runs there yet."""
    disks = make_disks(tmp_path, ("server",), ("volume",), size_mib=16)
    made = Place("server", f"health-{os.getpid()}", tmp_path / "server", disks["server"])
    try:
        made.make_namespace().ip("link", "set", "lo", "up")
        made.boot()
        yield made
    finally:
        made.remove()


@pytest.fixture
def server(place: Place) -> NfsServer:
    return NfsServer(place, ["/nfs/volume"])


async def start(server: NfsServer, protocols: str = "3") -> Process:
    await asyncio.to_thread(server.start, protocols)
    assert server.ganesha is not None
    return server.ganesha


class Watch:
    """A running health check, and its reports with their times."""

    def __init__(self) -> None:
        self.reports: list[Health] = [Health(ok=None)]
        self.told = asyncio.Event()

    def report(self, health: Health) -> None:
        self.reports.append(health)
        self.told.set()

    @property
    def last(self) -> Health:
        return self.reports[-1]

    async def until(self, ok: bool, sign: str = "") -> Health:
        """Waits for such a verdict, whose first sign begins so; at most 20 s."""
        async with asyncio.timeout(20):
            while self.last.ok is not ok or not "".join(self.last.signs[:1]).startswith(sign):
                self.told.clear()
                await self.told.wait()
        return self.last


@contextlib.asynccontextmanager
async def watching(
    *, mounts: tuple[Path, ...] = (), refuse_version4: bool = True, dead_after_ms: int = 10_000
) -> AsyncIterator[Watch]:
    watch = Watch()
    health = ServiceHealth(
        Service("127.0.0.1", mounts=mounts),
        clock_ms=now_ms,
        refuse_version4=refuse_version4,
        every_ms=400,
        timeout_ms=500,
        dead_after_ms=dead_after_ms,
    )
    task = asyncio.create_task(health.run(watch.report))
    try:
        yield watch
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def test_version_3_alone_is_healthy(place: Place, server: NfsServer) -> None:
    async def main() -> None:
        async with watching() as watch:
            assert await watch.until(ok=False) == Health(False, (NFS_REFUSED, MOUNTD_REFUSED))
            await start(server)
            assert await watch.until(ok=True) == Health(ok=True)
            nfs = RpcConnection("127.0.0.1", 2049)
            assert await nfs.null_call(NFS_PROGRAM, 3, timeout_ms=2000) == Answered()
            answer = await nfs.null_call(NFS_PROGRAM, 4, timeout_ms=2000)
            assert answer == ProgramMismatch(3, 3)
            nfs.close()
            mountd = RpcConnection("127.0.0.1", 20048)
            assert await mountd.null_call(MOUNT_PROGRAM, 3, timeout_ms=2000) == Answered()
            mountd.close()

    with inside(place.namespace):
        asyncio.run(main())


def test_version_4_on_is_refused(place: Place, server: NfsServer) -> None:
    async def main() -> None:
        async with watching() as watch:
            await watch.until(ok=False)
            await start(server, "3,4")
            assert await watch.until(ok=False, sign="version4-on") == Health(False, (VERSION4_ON,))
            await asyncio.sleep(1)
            assert not any(health.ok for health in watch.reports)

    with inside(place.namespace):
        asyncio.run(main())


def test_version_4_on_is_a_warning_when_so_configured(place: Place, server: NfsServer) -> None:
    async def main() -> None:
        await start(server, "3,4")
        async with watching(refuse_version4=False) as watch:
            assert await watch.until(ok=True) == Health(True, (), (VERSION4_ON,))

    with inside(place.namespace):
        asyncio.run(main())


def test_a_stopped_server_is_busy_and_only_later_dead(place: Place, server: NfsServer) -> None:
    async def main() -> None:
        ganesha = await start(server)
        async with watching(dead_after_ms=4000) as watch:
            await watch.until(ok=True)
            stopped_ms = now_ms()
            ganesha.freeze()
            await asyncio.sleep(2)
            assert watch.last.ok is True
            assert any("no answer in time (not believed" in word for word in watch.last.warnings)
            await watch.until(ok=False, sign="NFS v3 at 127.0.0.1:2049: no answer in time")
            assert 3000 <= now_ms() - stopped_ms < 10_000
            nfs = RpcConnection("127.0.0.1", 2049)
            answer = await nfs.null_call(NFS_PROGRAM, 3, timeout_ms=300)
            assert answer == TimedOut(connected=True)  # the kernel still takes connections
            nfs.close()
            ganesha.thaw()
            await watch.until(ok=True)

    with inside(place.namespace):
        asyncio.run(main())


def test_a_short_stop_is_nothing(place: Place, server: NfsServer) -> None:
    async def main() -> None:
        ganesha = await start(server)
        async with watching() as watch:
            await watch.until(ok=True)
            first = len(watch.reports)
            ganesha.freeze()
            await asyncio.sleep(1.5)
            ganesha.thaw()
            await asyncio.sleep(2)
            assert watch.reports[first].warnings
            assert all(health.ok for health in watch.reports[first:])
            assert watch.last == Health(ok=True)

    with inside(place.namespace):
        asyncio.run(main())


def test_a_killed_server_is_dead_soon_and_well_again_when_it_is_back(
    place: Place, server: NfsServer
) -> None:
    async def main() -> None:
        ganesha = await start(server)
        async with watching() as watch:
            await watch.until(ok=True)
            killed_ms = now_ms()
            ganesha.kill()
            await watch.until(ok=False, sign=NFS_REFUSED)
            assert now_ms() - killed_ms < 3000  # every 400 ms, and 250 ms after a first sign
            await start(server)
            await watch.until(ok=True)

    with inside(place.namespace):
        asyncio.run(main())


_MOUNTS = """
import subprocess, sys
from pathlib import Path
from nfsha.nfs.service import MountTable

folder = Path(sys.argv[1])
table = MountTable()
print(table.missing([folder]))
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
print(table.missing([folder, folder / "sub"]))
subprocess.run(["umount", folder], check=True)
print(table.missing([folder]))
"""


def test_a_mount_that_comes_and_goes_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "a volume, äö\\"
    folder.mkdir()
    argv = ["unshare", "-m", "--propagation", "private", sys.executable, "-c", _MOUNTS]
    argv.append(str(folder))
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    missing, sub = repr([folder]), repr([folder / "sub"])
    assert done.stdout.splitlines() == [missing, sub, missing]


def test_looking_at_the_mounts_costs_nothing_while_they_stay() -> None:
    table = MountTable()
    before = time.process_time()
    for _ in range(1000):
        assert table.missing([Path("/")]) == []
    assert time.process_time() - before < 0.5
    table.close()

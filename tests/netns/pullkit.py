"""A plain rsync daemon as the source of a pull, on loopback, and pulls from it.

The daemon has what nfsha's own source has: one read-only module per volume, named `v-UUID`, and
the user and password of an epoch. Tests of the source itself are elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nfsha.replica.passes.pull import Pull
from nfsha.replica.passes.request import PassOutcome, PassRequest
from nfsha.replica.rsync.arguments import From
from nfsha.replica.rsync.deletions import DeleteLimits
from nfsha.replica.rsync.progress import Progress
from tests.netns.volumekit import LoopVolume

_UP_WITHIN_S = 5.0
UUID = "11111111-2222-4333-8444-555555555555"


@dataclass(frozen=True, slots=True)
class Login:
    user: str = "nfsha-1-00000000000000aa"
    password: str = "secret of epoch one"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class PlainSource:
    """The daemon; `folder` is for its files. Modules: `v-UUID` for each of `volumes`."""

    folder: Path
    volumes: dict[str, Path]
    login: Login = field(default_factory=Login)
    options: dict[str, str] = field(default_factory=dict)
    public: Path | None = None
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        secrets = self.folder / "secrets"
        secrets.write_text(f"{self.login.user}:{self.login.password}\n")
        secrets.chmod(0o600)
        lines = ["use chroot = yes", "uid = 0", "gid = 0", "numeric ids = yes", "list = no",
                 "read only = yes", f"auth users = {self.login.user}", "reverse lookup = no",
                 f"secrets file = {secrets}", f"log file = {self.folder / 'log'}",
                 *(f"{key} = {value}" for key, value in self.options.items())]  # fmt: skip
        modules = {f"v-{uuid}": path for uuid, path in self.volumes.items()}
        if self.public is not None:
            modules["nfsha"] = self.public
        for name, path in modules.items():
            lines += [f"[{name}]", f"path = {path}"]
        config = self.folder / "rsyncd.conf"
        config.write_text("\n".join(lines) + "\n")
        self.process = subprocess.Popen(
            ["rsync", "--daemon", "--no-detach", "--address=127.0.0.1", f"--port={self.port}",
             f"--config={config}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + _UP_WITHIN_S
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            if time.monotonic() > deadline:
                self.stop()
                raise RuntimeError("the rsync daemon does not come up")
            time.sleep(0.01)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Kills the daemon and the processes of its connections."""
        if self.process is not None:
            for pid in self.senders():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            self.process.kill()
            self.process.wait()
            self.process = None

    def senders(self) -> list[int]:
        """The pids of the processes that serve a connection now."""
        if self.process is None:
            return []
        pid = self.process.pid
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(each) for each in found]

    @property
    def where(self) -> From:
        return From("127.0.0.1", self.port, self.login)


def limits(**changes: Any) -> DeleteLimits:
    values: dict[str, Any] = {
        "files": 100,
        "percent": 10,
        "known_files": 0,
        "accepted_plan": None,
        "target_empty": False,
    }
    return DeleteLimits(**values | changes)


def clock_ms() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


@contextlib.contextmanager
def small_disk() -> Iterator[Path]:
    """A filesystem of the tests' own: a pass ends with a sync of all of it."""
    with LoopVolume("ext4", size_mib=256) as volume:
        yield volume.path


@contextlib.contextmanager
def root(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def ask(source: PlainSource | From, root_fd: int, **changes: Any) -> PassRequest:
    where = source if isinstance(source, From) else source.where
    values: dict[str, Any] = {
        "uuid": UUID,
        "root_fd": root_fd,
        "source": where,
        "folders": None,
        "limits": limits(),
        "timeout_s": 10,
        "connect_timeout_s": 3,
        "name": "data",
    }
    return PassRequest(**values | changes)


def pull(
    source: PlainSource | From,
    target: Path,
    scratch: Path,
    *,
    progress: Callable[[Progress], None] | None = None,
    meanwhile: Callable[[Pull], Any] | None = None,
    **changes: Any,
) -> PassOutcome:
    """One pass to its end; `meanwhile` is a coroutine function that runs beside it."""

    async def both(request: PassRequest) -> PassOutcome:
        one = Pull(request, scratch, clock_ms)
        run = asyncio.create_task(one.run(progress or (lambda _: None)))
        if meanwhile is not None:
            await meanwhile(one)
        return await run

    with root(target) as root_fd:
        return asyncio.run(both(ask(source, root_fd, **changes)))

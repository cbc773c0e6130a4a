"""The source: the rsync daemon from which the other node pulls, while this node is active.

It writes the daemon's configuration into a folder of nfsha's own, starts the daemon, starts it
again when it dies, and proves it gone at the end. It offers one read-only module for each volume
and one for what this node publishes, to the peer's address, to whoever proves the present epoch's
token. It must not write into a volume, choose what is offered, or serve without a token.

A module is served only if its root is the volume: rsync enters the volume by chroot(2), then waits
for its `pre-xfer exec` before it sends anything. That program looks at the root of the very process
that is going to send (/proc/PID/root), so no mount or unmount can come between the check and
the transfer. A path, or a check before the chroot, could be another filesystem a moment later. An
unmounted or empty volume has no identity file, and so is refused instead of sent as empty.

The control module waits in the same way until this node has published anew (`fresh`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import hmac
import logging
import os
import re
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Final

from nfsha.core.model import Epoch
from nfsha.replica.files.durable import read_small, write_durably
from nfsha.replica.files.own_names import IDENTITY_NAME
from nfsha.replica.rsync.arguments import SOCKET_OPTIONS
from nfsha.replica.rsync.child import Child, ChildError, ChildStuckError, Priority
from nfsha.replica.source.doorkeeper import admit_only
from nfsha.replica.source.fresh import Doorbell, NotFreshError

log = logging.getLogger(__name__)

RSYNC: Final = "/usr/bin/rsync"
CONTROL_MODULE: Final = "nfsha"
"""The module of `Source.public`."""

MAX_CONNECTIONS: Final = 32
UP_WITHIN_S: Final = 1.0
END_WITHIN_S: Final = 3.0
"""To the proof that all are gone. By SIGKILL: who only reads has nothing to put in order."""

RESTART_AFTER_S: Final = 0.2
RESTART_AFTER_MAX_S: Final = 30.0
HEALTHY_AFTER_MS: Final = 60_000
"""A daemon that lived so long is started again at once when it dies."""

MAX_LOG_BYTES: Final = 256 * 1024
"""The daemon's log is put aside (one older one is kept) when it is larger."""

_LOG_LOOK_EVERY_S: Final = 10.0
_IDLE_S: Final = 600  # rsyncd.conf(5), timeout: a peer that is gone does not keep its connection
_POLL_S: Final = 0.02
_GREETING: Final = b"@RSYNCD:"
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# Stands in rsyncd.conf and in a shell's command.
_PLAIN_PATH: Final = re.compile(r"/[A-Za-z0-9/._+-]+")
_MAX_IDENTITY_BYTES: Final = 4096

# The ancestors are the shell that rsync starts, rsync's helper, and the rsync that changed its
# root; numbers are those of this /proc, whatever PID namespace rsync runs in.
_CHECK: Final = f"""\
# Written by nfsha: may this connection send? Arguments: the volume's identity and device number.
own=$(stat -L -c %d:%i /) || exit 1
pid=self
for hop in 1 2 3 4 5 6 7 8; do
    parent=0
    while read -r key value; do
        case $key in PPid:) parent=$value; break ;; esac
    done <"/proc/$pid/status"
    [ "$parent" -gt 1 ] || break
    pid=$parent
    root=$(stat -L -c %d:%i "/proc/$pid/root/.") || break
    [ "$root" = "$own" ] && continue
    line=
    [ -f "/proc/$pid/root/{IDENTITY_NAME}" ] && read -r line <"/proc/$pid/root/{IDENTITY_NAME}"
    [ "${{root%%:*}}" = "$2" ] && [ "$line" = "$1" ] && exit 0
    break
done
echo "nfsha: volume $1 is not mounted at its source"
exit 1
"""


@dataclass(frozen=True, slots=True)
class EpochToken:
    """The credentials of one epoch. Its repr shows the user only."""

    user: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class SourceVolume:
    """A volume that is offered: its identity, and where it is mounted."""

    uuid: str
    path: Path

    @property
    def module(self) -> str:
        """The name by which it is asked for: whoever asks has the same volume."""
        return f"v-{self.uuid}"


def epoch_token(secret: bytes, epoch: Epoch) -> EpochToken:
    """Derives an epoch's credentials from the cluster key; both nodes come to the same.

    The id has a fixed length (16 hex digits), so that number and id cannot run into each other.
    """
    message = b"nfsha replication\0" + f"{epoch.number}{epoch.id}".encode("ascii")
    password = hmac.new(secret, message, hashlib.sha256).hexdigest()
    return EpochToken(f"nfsha-{epoch.number}-{epoch.id}", password)


class PathRefusedError(ValueError):
    """A path that rsyncd.conf cannot carry unchanged."""


def config_path(path: Path) -> bytes:
    """Returns a folder's path as it must stand in rsyncd.conf. Raises PathRefusedError.

    The final slash keeps trailing blanks, and a trailing backslash from joining the next line.
    `%NAME%` would be replaced by an environment variable and has no escape (rsync's loadparm.c,
    expand_vars: `%%` is not reduced, whatever the manual says).
    """
    raw = os.fsencode(path)
    if not path.is_absolute() or ".." in path.parts or len(raw) > 4000:
        raise PathRefusedError(f"{path}: not an absolute path that rsync can serve")
    if re.search(rb"[\x00-\x1f\x7f]", raw):
        raise PathRefusedError(f"{str(path)!r}: has a control character; mount it elsewhere")
    if re.search(rb"%[A-Z][^%]*%", raw):
        raise PathRefusedError(f"{path}: rsync would replace what is between the percent signs")
    return raw.rstrip(b"/") + b"/"


@dataclass(frozen=True, slots=True)
class _Offer:
    """What the daemon serves: the token, and each volume with its device number."""

    token: EpochToken
    volumes: Mapping[SourceVolume, int]

    def is_within(self, other: _Offer) -> bool:
        """True if whoever was let in under this offer may stay under the other."""
        return self.token == other.token and self.volumes.items() <= other.volumes.items()


class Source:
    """One rsync daemon on `listen`:`port` for `peer`. Its files are in `folder` (made if missing).

    `folder` is in nfsha's runtime folder and nobody else's. Its name stands in rsyncd.conf and in a
    shell's command, and so may have only letters, digits and ._+-. `clock_ms` is CLOCK_BOOTTIME.
    `serve` and `stop` may be called at any time, in any order.
    """

    def __init__(
        self,
        folder: Path,
        listen: IPv4Address | IPv6Address | str,
        port: int,
        peer: IPv4Address | IPv6Address | str,
        clock_ms: Callable[[], int],
        *,
        max_connections: int = MAX_CONNECTIONS,
        program: str = RSYNC,
    ) -> None:
        """Raises ValueError for what is no address, for two families, and for another name."""
        if _PLAIN_PATH.fullmatch(str(folder)) is None:
            raise ValueError(f"{folder}: only letters, digits and ._+- may be in its name")
        self.public = folder / "public"
        self.fresh: Callable[[], Awaitable[None]] | None = None
        """Publishes anew into `public`, or raises NotFreshError; a fetch from there waits for it.
        None: what lies there is sent. It must be set before the first `serve`."""
        self.trouble = ""
        """Why nothing is served although it should be; empty if all is well."""
        self.refused: Mapping[str, str] = {}
        """Volumes that are not offered, by identity, and why."""
        self.restarts = 0
        """How often the daemon died and was started again."""
        self._folder = folder
        self._listen = ip_address(listen)
        self._port = port
        self._peer = ip_address(peer)
        if self._listen.version != self._peer.version:
            raise ValueError(f"{listen} and {peer} are addresses of two families")
        self._clock_ms = clock_ms
        self._max_connections = max_connections
        self._program = program
        # Of its own: the common threads may all hang on a disk, and `stop` must not wait for that.
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nfsha-source")
        self._turn = asyncio.Lock()
        self._stops = 0
        self._warned: set[str] = set()
        self._offer: _Offer | None = None
        self._child: Child | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._doorbell = Doorbell(folder, "fresh", self._publish)
        self._enough = asyncio.Event()
        self._settled = asyncio.Event()  # it is up, or it is known why not
        self._up = False

    @property
    def running(self) -> bool:
        """True while the daemon answers to whoever has the present token."""
        return self._up

    @property
    def log_path(self) -> Path:
        """What the daemon logged: each connection, and why it was refused."""
        return self._folder / "rsyncd.log"

    async def serve(self, token: EpochToken, volumes: Sequence[SourceVolume]) -> None:
        """Serves these volumes under this token; returns when it does, or `trouble` says why not.

        Under another token, or without a volume that was offered, all connections are ended first;
        otherwise they go on. Cheap when nothing is new. Whatever fails for now is tried again until
        `stop`. Raises ChildStuckError if an earlier daemon cannot be killed.
        """
        stops = self._stops
        offer, refused = await asyncio.to_thread(_look, token, volumes)
        async with self._turn:
            if stops != self._stops:  # a disk kept us longer than the caller wanted
                return
            self.refused = refused
            if offer != self._offer or self._keeper is None or self._keeper.done():
                await self._change(offer)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(UP_WITHIN_S):
                await self._settled.wait()

    async def stop(self) -> None:
        """Ends the daemon and all connections; when it returns, all of them are proved gone.

        Raises ChildStuckError when one is not; then call it again.
        """
        self._stops += 1
        async with self._turn:
            await self._end()
            await self._doorbell.close()
            self._remove_files()
            self.trouble = ""

    # ------------------------------------------------------------- the daemon's life

    async def _change(self, offer: _Offer) -> None:
        """Serves another offer; under the same token, whoever still has a right to it goes on."""
        goes_on = self._keeper is not None and not self._keeper.done()
        if not goes_on or self._offer is None or not self._offer.is_within(offer):
            await self._end()
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._writer, self._write, offer)
            await self._doorbell.open()
        except OSError as error:
            self.trouble = f"cannot write into {self._folder}: {error.strerror}"
            self._settled.set()
            return
        self._offer = offer
        if self._keeper is None:
            self._enough.clear()
            self._settled.clear()
            self._keeper = asyncio.create_task(self._keep())

    async def _end(self) -> None:
        self._enough.set()
        if self._keeper is not None:
            # Not `await self._keeper`: whoever is cancelled here would cancel the keeper as well.
            await asyncio.wait([self._keeper])
            self._keeper = None
        self._offer = None
        if self._child is not None:  # the keeper could not end it
            await self._child.end(END_WITHIN_S, grace_s=0)
            self._child = None

    async def _keep(self) -> None:
        """Starts the daemon again and again, until it is enough."""
        after_s = RESTART_AFTER_S
        while not self._enough.is_set():
            began_ms = self._clock_ms()
            why = await self._live()
            if self._enough.is_set():
                return
            if self._clock_ms() - began_ms >= HEALTHY_AFTER_MS:
                after_s = RESTART_AFTER_S
            self.trouble = f"{why}; next start in {after_s:g} s"
            self._settled.set()
            log.error("the source of the replication: %s", self.trouble)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(after_s):
                    await self._enough.wait()
            after_s = min(2 * after_s, RESTART_AFTER_MAX_S)
            self.restarts += 1

    async def _live(self) -> str:
        """One life of the daemon, from its start to its proven end; returns why it ended."""
        why = _cannot_listen(self._listen, self._port)
        if why:
            return why
        try:
            self._child = await Child.start(
                [self._program, "--daemon", "--no-detach", f"--config={self._config_path}"],
                name="rsync-source",
                priority=Priority.NORMAL,
            )
        except ChildError as error:
            return str(error)
        try:
            if not await self._answers(self._child):
                return await self._words(self._child, "does not answer")
            self._close_to_others(self._child)
            self._up, self.trouble = True, ""
            self._settled.set()
            await self._until_it_ends(self._child)
            return await self._words(self._child, "was told to end")
        finally:
            self._up = False
            try:
                await self._child.end(END_WITHIN_S, grace_s=0)
            except ChildStuckError as error:
                self.trouble = str(error)
                log.critical("the source of the replication: %s", error)
                self._enough.set()
            else:
                self._child = None

    async def _answers(self, child: Child) -> bool:
        """Waits for the daemon's greeting."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(UP_WITHIN_S):
                while child.alive and not self._enough.is_set():
                    if await self._greets():
                        return True
                    await asyncio.sleep(_POLL_S)
        return False

    def _close_to_others(self, child: Child) -> None:
        """After the greeting: from then on not even this machine can connect."""
        try:
            admit_only(child.pid, self._port, self._peer)
        except OSError as error:
            self._limited(
                "others than the peer can open connections to the rsync daemon (and get nothing "
                f"from it): its port cannot be closed to them: {error.strerror}"
            )

    def _limited(self, words: str) -> None:
        """Warns once, not at each start."""
        if words not in self._warned:
            self._warned.add(words)
            log.warning("the source of the replication: %s", words)

    async def _greets(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection(str(self._listen), self._port)
        except OSError:
            return False
        try:
            return await reader.read(len(_GREETING)) == _GREETING
        except OSError:
            return False
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _until_it_ends(self, child: Child) -> None:
        ended = asyncio.ensure_future(child.wait())
        enough = asyncio.ensure_future(self._enough.wait())
        try:
            while not (ended.done() or enough.done()):
                self._put_log_aside()
                await asyncio.wait(
                    (ended, enough),
                    timeout=_LOG_LOOK_EVERY_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )
        finally:
            ended.cancel()
            enough.cancel()

    async def _words(self, child: Child, alive: str) -> str:
        """Why the daemon ended, with its own last word on it."""
        if child.alive:
            return f"the rsync daemon {alive} on {self._listen} port {self._port}"
        code = await child.wait()
        if code < 0:
            return f"the rsync daemon was killed by signal {-code}"
        said = b"; ".join(child.errors).decode(errors="replace")
        said = said or _last_line(self.log_path)
        return f"the rsync daemon ended with exit code {code} ({said or 'it said nothing'})"

    async def _publish(self) -> None:
        if self.fresh is None:
            raise NotFreshError("this node publishes nothing")
        await self.fresh()

    # ------------------------------------------------------------- its files

    @property
    def _config_path(self) -> Path:
        return self._folder / "rsyncd.conf"

    @property
    def _secrets_path(self) -> Path:
        return self._folder / "secrets"

    @property
    def _check_path(self) -> Path:
        return self._folder / "check-volume"

    @property
    def _ask_path(self) -> Path:
        return self._folder / "ask-fresh"

    def _write(self, offer: _Offer) -> None:
        """Writes what the daemon reads; it reads its configuration again for each connection."""
        for folder, mode in ((self._folder, 0o700), (self.public, 0o755)):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(mode)
        secret = f"{offer.token.user}:{offer.token.password}\n"
        write_durably(self._check_path, _CHECK.encode(), mode=0o600)
        write_durably(self._ask_path, self._doorbell.script(), mode=0o600)
        write_durably(self._secrets_path, secret.encode(), mode=0o600)
        write_durably(self._config_path, self._config(offer), mode=0o600)

    def _remove_files(self) -> None:
        for path in (self._config_path, self._secrets_path):
            path.unlink(missing_ok=True)

    def _config(self, offer: _Offer) -> bytes:
        lines = [
            b"# Written by nfsha; changes are lost.",
            f"address = {self._listen}".encode(),
            f"port = {self._port}".encode(),
            f"log file = {self.log_path}".encode(),
            f"lock file = {self._folder / 'lock'}".encode(),
            f"secrets file = {self._secrets_path}".encode(),
            f"auth users = {offer.token.user}".encode(),
            b"strict modes = yes",
            f"hosts allow = {self._peer}".encode(),
            b"hosts deny = *",
            b"reverse lookup = no",
            b"forward lookup = no",
            f"socket options = {SOCKET_OPTIONS}".encode(),
            f"max connections = {self._max_connections}".encode(),
            f"timeout = {_IDLE_S}".encode(),
            b"use chroot = yes",
            b"uid = 0",
            b"gid = 0",
            b"read only = yes",
            b"write only = no",
            b"list = no",
            b"numeric ids = yes",
            b"munge symlinks = no",
            b"fake super = no",
            b"ignore errors = no",
            b"ignore nonreadable = no",
            f"[{CONTROL_MODULE}]".encode(),
            b"path = " + config_path(self.public),
        ]
        if self.fresh is not None:
            lines.append(f"pre-xfer exec = /bin/sh {self._ask_path}".encode())
        for volume, device in offer.volumes.items():
            lines += [
                f"[{volume.module}]".encode(),
                b"path = " + config_path(volume.path),
                f"pre-xfer exec = /bin/sh {self._check_path} {volume.uuid} {device}".encode(),
            ]
        return b"\n".join(lines) + b"\n"

    def _put_log_aside(self) -> None:
        """The daemon opens its log anew for each connection."""
        with contextlib.suppress(OSError):
            if self.log_path.stat().st_size > MAX_LOG_BYTES:
                self.log_path.replace(self.log_path.with_suffix(".log.1"))


def _look(token: EpochToken, volumes: Sequence[SourceVolume]) -> tuple[_Offer, Mapping[str, str]]:
    """Finds each volume's device number, and what cannot be offered. It blocks."""
    fit: dict[SourceVolume, int] = {}
    refused: dict[str, str] = {}
    for volume in volumes:
        if _UUID.fullmatch(volume.uuid) is None:
            raise ValueError(f"{volume.uuid!r} is no identity of a volume")
        try:
            config_path(volume.path)
            device = volume.path.stat().st_dev
            line = read_small(volume.path / IDENTITY_NAME, _MAX_IDENTITY_BYTES).split(b"\n")[0]
        except PathRefusedError as error:
            refused[volume.uuid] = str(error)
        except FileNotFoundError:
            refused[volume.uuid] = f"{volume.path}: nothing with an identity is mounted there"
        except OSError as error:
            refused[volume.uuid] = f"{volume.path}: {error.strerror}"
        else:
            if line != volume.uuid.encode():
                refused[volume.uuid] = f"{volume.path}: another volume is mounted there"
            else:
                fit[volume] = device
    return _Offer(token, fit), refused


def _cannot_listen(address: IPv4Address | IPv6Address, port: int) -> str:
    """Why nobody can listen there now; empty if one can. rsync says it less clearly."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as rsync does
            probe.bind((str(address), port))
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"port {port} of {address} is taken by another program (`ss -ltnp` names it)"
        if error.errno == errno.EADDRNOTAVAIL:
            return f"this machine does not have the address {address}, or not ready yet"
        return f"cannot listen on {address} port {port}: {error.strerror}"
    return ""


def _last_line(path: Path) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1000))
        lines = file.read().decode(errors="replace").splitlines()
        return lines[-1] if lines else ""
    return ""

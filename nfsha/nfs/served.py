"""All that one node knows of its own NFS service at one moment: looked up, and as it travels.

Every part has its own time: a server, a file or a disk that does not answer leaves a gap with the
reason in it, and holds up nothing else. It judges nothing and changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final, TypeVar

from nfsha.nfs import clients, exports, file_handles, v3_fence
from nfsha.nfs.clients import Stray, V4ClientFacts
from nfsha.nfs.exports import UNKNOWN, ExportFacts
from nfsha.nfs.facts import Document, Fields
from nfsha.nfs.file_handles import HandleFacts, read_handles
from nfsha.nfs.v3_fence import Answers, FenceFacts, Version4

IPAddress = IPv4Address | IPv6Address

PART_WITHIN_S: Final = 3.0
"""So long each part may take; they are looked up side by side."""

STRAYS_MAX: Final = 64
_VOLUMES_MAX: Final = 4096
_STRAYS_IN_ALL_MAX: Final = 1_000_000

_Part = TypeVar("_Part")


@dataclass(frozen=True, slots=True)
class Served:
    """What one node serves, to whom, and by which file handles.

    `strays` are the first of `stray_count` clients that are connected past the VIPs; `unlisted`
    says why they could not be listed.
    """

    fence: FenceFacts
    exports: ExportFacts
    v4: V4ClientFacts
    strays: tuple[Stray, ...]
    stray_count: int
    unlisted: str
    handles: tuple[HandleFacts, ...]


@dataclass(frozen=True, slots=True)
class Where:
    """Whom to ask. `ports` are those of [firewall.ports]; `own`, the addresses of both nodes."""

    check_address: str
    own_address: str
    """One that the exports allow as a client: else the server tells no handles."""
    ports: Mapping[str, int]
    vips: Sequence[IPAddress]
    own: Sequence[IPAddress]
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class Root:
    """A volume whose file handles are wanted: its name, where it is, nfsha's own files in it."""

    volume: str
    path: Path
    files: tuple[str, ...]


class Looker:
    """Looks up one node's service. One look at a time; a disk that hangs keeps one thread only."""

    def __init__(self, where: Where) -> None:
        self._where = where
        self._stuck: threading.Thread | None = None

    async def look(self, roots: Sequence[Root], *, whole: bool) -> Served:
        """Takes some `PART_WITHIN_S` at most. Raises nothing.

        `whole`: with the handles of the exports' roots, which mountd logs that it was asked for.
        """
        where = self._where
        fence, exported, v4, (strays, count, unlisted), handles = await asyncio.gather(
            _within(
                v3_fence.prove(where.check_address, where.ports, timeout_ms=where.timeout_ms),
                _no_fence(where.check_address),
            ),
            _within(self._exports(handles=whole), ExportFacts(UNKNOWN, (), _LATE)),
            asyncio.to_thread(clients.read_v4_clients, clients.ServerFiles()),
            asyncio.to_thread(self._strays),
            self._handles(roots),
        )
        return Served(fence, exported, v4, strays, count, unlisted, handles)

    async def _exports(self, *, handles: bool) -> ExportFacts:
        where = self._where
        return await exports.read_exports(
            where.own_address,
            where.ports["mountd"],
            exports.ServerFiles(),
            timeout_ms=where.timeout_ms,
            handles=handles,
        )

    def _strays(self) -> tuple[tuple[Stray, ...], int, str]:
        where = self._where
        ports = set(where.ports.values())
        try:
            found = clients.strays(
                clients.established(ports), vips=where.vips, own=where.own, ports=ports
            )
        except OSError as error:
            return (), 0, f"{error.filename}: {error.strerror}"
        return found[:STRAYS_MAX], len(found), ""

    async def _handles(self, roots: Sequence[Root]) -> tuple[HandleFacts, ...]:
        """Those of all volumes, in a thread of their own: none can interrupt one on a dead disk."""
        if self._stuck is not None and self._stuck.is_alive():
            return tuple(HandleFacts(root.volume, (), _LATE) for root in roots)
        found: dict[str, HandleFacts] = {}
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def read() -> None:
            for root in roots:
                found[root.volume] = read_handles(root.volume, root.path, root.files)
            _tell(loop, done.set)

        # A daemon thread: it does not keep the process from ending.
        self._stuck = threading.Thread(target=read, name="file-handles", daemon=True)
        self._stuck.start()
        await _within(done.wait(), False)
        got = dict(found)
        return tuple(got.get(root.volume, HandleFacts(root.volume, (), _LATE)) for root in roots)


_LATE: Final = f"no answer within {PART_WITHIN_S:.0f} s"


def _tell(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    """From another thread, to a loop that may have ended meanwhile."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(what)


async def _within(work: Awaitable[_Part], otherwise: _Part) -> _Part:
    try:
        async with asyncio.timeout(PART_WITHIN_S):
            return await work
    except TimeoutError:
        return otherwise


def _no_fence(address: str) -> FenceFacts:
    nothing = Answers(_LATE, Version4.UNPROVED, _LATE, _LATE)
    return FenceFacts(address, nothing, None, None, _LATE)


def without_handles(facts: ExportFacts) -> ExportFacts:
    """The same exports, where the handles say nothing: the volumes are mounted on one node only."""
    why = "not compared: the volume is mounted on one node only"
    return replace(
        facts,
        exports=tuple(replace(one, root_handle=None, no_handle=why) for one in facts.exports),
    )


# --- travelling ----------------------------------------------------------------------------------


def as_json(facts: Served) -> Document:
    """Returns the facts as JSON can carry them, to the other node or to a command."""
    return {
        "fence": v3_fence.as_json(facts.fence),
        "exports": exports.as_json(facts.exports),
        "v4": clients.as_json(facts.v4),
        "strays": [clients.stray_as_json(one) for one in facts.strays],
        "stray_count": facts.stray_count,
        "unlisted": facts.unlisted,
        "handles": [file_handles.as_json(one) for one in facts.handles],
    }


def from_json(document: object) -> Served:
    """Returns the facts that `as_json` made a document of; FactsError for anything else."""
    names = ("fence", "exports", "v4", "strays", "stray_count", "unlisted", "handles")
    fields = Fields("facts of the NFS service", document, *names)
    return Served(
        fence=fields.given("fence", v3_fence.from_json),
        exports=fields.given("exports", exports.from_json),
        v4=fields.given("v4", clients.from_json),
        strays=fields.each("strays", STRAYS_MAX, clients.stray_from_json),
        stray_count=fields.number("stray_count", _STRAYS_IN_ALL_MAX),
        unlisted=fields.text("unlisted"),
        handles=fields.each("handles", _VOLUMES_MAX, file_handles.from_json),
    )

"""What each node tells the other of itself before a move: its NFS service, and what must be equal.

Every node looks at itself each `LOOK_EVERY_S`, and at once when the other one asks; the facts, and
the questions, travel in pages of their own (`nfsha.peer.pages`). A question is a number; facts that
answer it bear that number, and were looked up after it was asked. So nobody need trust that what is
old still holds. Nothing here judges: `node_guards` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from nfsha import __version__
from nfsha.config import RSYNC, IPAddress, Settings
from nfsha.core import lease
from nfsha.core.state import State
from nfsha.daemon.inbox import Inbox
from nfsha.daemon.replication import Replication
from nfsha.nfs import served
from nfsha.nfs.facts import Document, FactsError, Fields
from nfsha.nfs.served import Looker, Root, Served, Where
from nfsha.peer import pages
from nfsha.peer.keys import KeyRing
from nfsha.peer.links import Links
from nfsha.peer.pages import Pages
from nfsha.peer.wire import PageKind, Wire
from nfsha.replica.files.own_names import IDENTITY_NAME
from nfsha.replica.rsync import rsync_version
from nfsha.replica.source import source
from nfsha.vip.address import AddressDriver
from nfsha.vip.announce import Announcer
from nfsha.vip.rtnetlink import VipError

log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 30.0
"""How often a node looks at itself while nobody asks: some 20 ms of its time each."""

ANSWER_WITHIN_S: Final = 5.0
"""So long who asks waits for the facts of both nodes; an operator waits for it too."""

VOLUMES_WITHIN_S: Final = 3.0
"""So long a look waits for the filesystems; one that hangs is told as it was known."""

RPC_TIMEOUT_MS: Final = 2000

_FORMAT: Final = 1
_NUMBER_MAX: Final = (1 << 63) - 1
_DIGITS_MAX: Final = 19
_VIPS_MAX: Final = 64
_SENTENCES_MAX: Final = 4096
SETTINGS: Final = ("vip", "nfs.root", "replication", "firewall.ports")
"""The settings that have to be equal on both nodes."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a node says of itself. Only facts that answer a question have `seen` and `rsync`.

    `held` are the VIPs on its interface by the kernel's word; `seen`, who answers for them on the
    wire, by link address; `hindrances`, what would end a handover on its side (`Replicator`);
    `copied_ns`, when the oldest of the last complete passes into it began, by the source's clock;
    `paused`, whether an operator holds its passes back.
    """

    answers: int
    version: str
    key: str
    settings: Mapping[str, str]
    wall_ns: int
    link_address: str
    held: tuple[str, ...]
    seen: Mapping[str, str] | None
    rsync: str
    rsync_refused: str
    hindrances: tuple[str, ...]
    copied_ns: int
    paused: bool
    served: Served


@dataclass(frozen=True, slots=True)
class Heard:
    """The other node's facts, when they came (`at_ms`, CLOCK_BOOTTIME; `wall_ns`), and of what age.

    `answer`: they were looked up after this node had asked last, at `asked_wall_ns` of its clock.
    """

    told: Told
    at_ms: int
    wall_ns: int
    answer: bool
    asked_wall_ns: int


@dataclass(frozen=True, slots=True)
class _Came:
    told: Told
    at_ms: int
    wall_ns: int


@dataclass(frozen=True, slots=True)
class Eyes:
    """What a node looks with. `others`: who else may answer on the VIP's interface."""

    replication: Replication
    address: AddressDriver
    announcer: Announcer
    others: Callable[[], Sequence[IPAddress]]


class NfsFacts:
    """This node's facts, and the other one's."""

    def __init__(
        self,
        settings: Settings,
        ring: KeyRing,
        wire: Wire,
        links: Links,
        inbox: Inbox,
        clock_ms: Callable[[], int],
        eyes: Eyes,
    ) -> None:
        """Opens nothing, and looks at nothing, before `start`."""
        self._settings = settings
        self._key = ring.sealing.fingerprint
        self._clock_ms = clock_ms
        self._inbox = inbox
        self._eyes = eyes
        self._sessions = (0, 0)
        self._peer_heard = False
        self._pages = self._pages_of(PageKind.NFS, wire, links, self._arrived)
        self._questions = self._pages_of(PageKind.QUESTIONS, wire, links, self._asked)
        self._looker = Looker(_where(settings))
        self._own: Told | None = None
        self._own_asks = 0
        """The question of this node that its own facts are younger than."""
        self._came: _Came | None = None
        self.refused = ""
        """Why the last facts that came were not taken; "" when they were."""
        self._asks = 0
        self._asked_ms = self._asked_wall_ns = 0
        self._answers = 0
        self._bell = asyncio.Event()
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def _pages_of(
        self, kind: PageKind, wire: Wire, links: Links, arrived: Callable[[bytes], None]
    ) -> Pages:
        return Pages.over(links, wire, kind, lambda: self._sessions, self._clock_ms, arrived)

    # ------------------------------------------------------------- life

    def start(self) -> None:
        """Begins to look, once all that is looked at is open."""
        self._task = asyncio.ensure_future(self._run())
        self._inbox.watch(self._task)

    async def close(self) -> None:
        """Ends the looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def follow(self, state: State, now_ms: int) -> None:
        """Takes the sessions of both nodes after each turn, and whether the other one is heard."""
        self._sessions = (state.session, state.peer_session)
        self._peer_heard = lease.peer_heard(state, now_ms)

    def tick(self) -> None:
        """With each heartbeat: pages go out while the other node lacks them."""
        self._questions.tick()
        self._pages.tick()

    # ------------------------------------------------------------- what is known

    @property
    def own(self) -> Told | None:
        """This node's facts; None before the first look."""
        return self._own

    @property
    def heard(self) -> Heard | None:
        """The other node's facts; None before the first came."""
        came = self._came
        if came is None:
            return None
        answer = came.told.answers == self._asks != 0 and came.told.seen is not None
        return Heard(came.told, came.at_ms, came.wall_ns, answer, self._asked_wall_ns)

    async def ask(self, *, young_ms: int = 0) -> None:
        """Has both nodes look at themselves now, and waits for both; `ANSWER_WITHIN_S` at most.

        Answers to a question that was asked no longer than `young_ms` ago will do. It does not wait
        for a node that is not heard when it is asked. What did not come is as old as it was:
        `heard.answer` says so.
        """
        now_ms = self._clock_ms()
        if self._asks and now_ms - self._asked_ms < young_ms and self._settled(alone=False):
            return
        self._asked_ms = now_ms
        self._asks = secrets.randbits(62) + 1  # never that of a former life of this node
        self._asked_wall_ns = time.time_ns()
        alone = not self._peer_heard
        self._questions.publish(str(self._asks).encode())
        self._bell.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_WITHIN_S):
                while not self._settled(alone=alone):
                    await self._news.wait()

    def _settled(self, *, alone: bool) -> bool:
        """By the newest question: who asked before it waits for its answer, too."""
        came = self._came
        there = alone or (came is not None and came.told.answers == self._asks)
        return there and self._own_asks == self._asks

    def _tell_waiters(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    # ------------------------------------------------------------- looking

    async def _run(self) -> None:
        before = (0, 0)
        while True:
            self._bell.clear()
            asked = asks, answers = self._asks, self._answers
            self._own = await self._look(answers, whole=asked != before)
            before, self._own_asks = asked, asks
            self._tell_waiters()
            await self._publish(self._own)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._bell.wait()

    async def _look(self, answers: int, *, whole: bool) -> Told:
        """`whole`: somebody asked, so what costs a little more is looked at, too."""
        settings = self._settings
        await self._look_at_volumes()
        found, held, seen, rsync = await asyncio.gather(
            self._looker.look(self._roots(), whole=whole),
            self._held(),
            self._seen(whole=whole),
            self._rsync(whole=whole),
        )
        replicator = self._eyes.replication.replicator
        hindrances = replicator.overview.hindrances() if replicator is not None else []
        copied_ns = replicator.overview.copied_ns() if replicator is not None else 0
        return Told(
            answers=answers,
            version=__version__,
            key=self._key,
            settings=_equal_settings(settings),
            wall_ns=time.time_ns(),
            link_address=self._eyes.announcer.link_address,
            held=held,
            seen=seen,
            rsync=rsync.version,
            rsync_refused=rsync.refused,
            hindrances=tuple(hindrances[:_SENTENCES_MAX]),
            copied_ns=copied_ns,
            paused=replicator is not None and replicator.overview.paused,
            served=found,
        )

    async def _look_at_volumes(self) -> None:
        if self._eyes.replication.replicator is None:
            return
        looking = asyncio.ensure_future(self._eyes.replication.replicator.look())
        self._inbox.watch(looking)
        await asyncio.wait([looking], timeout=VOLUMES_WITHIN_S)

    def _roots(self) -> list[Root]:
        """The volumes of which nfsha keeps copies, as far as they answer."""
        if self._eyes.replication.replicator is None:
            return []
        here = self._eyes.replication.replicator.inventory.here
        return [Root(one.name, one.path, (IDENTITY_NAME,)) for one in here if not one.failing]

    async def _held(self) -> tuple[str, ...]:
        try:
            return tuple(sorted(map(str, await self._eyes.address.held())))
        except VipError as error:
            log.warning("the addresses of %s: %s", self._settings.interface, error)
            return ()

    async def _seen(self, *, whole: bool) -> Mapping[str, str] | None:
        if not whole:
            return None
        timing = self._settings.timing
        found = await self._eyes.announcer.survey(
            self._settings.vips, self._eyes.others(), over_ms=timing.survey_ms
        )
        return {str(vip): who for vip, who in found.answered.items()}

    async def _rsync(self, *, whole: bool) -> rsync_version.RsyncVersion:
        if not whole or self._settings.replication != RSYNC:
            return rsync_version.RsyncVersion("")
        return await rsync_version.check(source.RSYNC)

    # ------------------------------------------------------------- both ways

    async def _publish(self, told: Told) -> None:
        try:
            self._pages.publish(await asyncio.to_thread(_packed, told))
        except pages.FactsError as error:
            log.error("the other node is not told of the NFS service here: %s", error)

    def _arrived(self, blob: bytes) -> None:
        self._inbox.watch(asyncio.ensure_future(self._hear(blob)))

    async def _hear(self, blob: bytes) -> None:
        at_ms, wall_ns = self._clock_ms(), time.time_ns()
        try:
            told = await asyncio.to_thread(_unpacked, blob)
        except (pages.FactsError, FactsError) as error:
            self.refused = str(error)
            log.warning("the other node's facts of its NFS service are refused: %s", error)
            return
        if self._came is not None and at_ms < self._came.at_ms:
            return  # the threads that read them do not keep their order
        self.refused = ""
        self._came = _Came(told, at_ms, wall_ns)
        self._tell_waiters()

    def _asked(self, blob: bytes) -> None:
        """The other node asks. It has our key: what is no number is a mistake of its program."""
        if not blob.isdigit() or len(blob) > _DIGITS_MAX:
            log.warning("the other node asks with %r, which is no number", blob[:40])
            return
        self._answers = int(blob)
        self._bell.set()


def _where(settings: Settings) -> Where:
    own = [address for link in settings.links for address in (link.local, link.peer)]
    near = [link for link in settings.links if link.interface == settings.interface]
    return Where(
        check_address=str(settings.nfs.check_address),
        own_address=str((near or settings.links)[0].local),
        ports=settings.firewall.ports,
        vips=settings.vips,
        own=own,
        timeout_ms=min(RPC_TIMEOUT_MS, settings.nfs.check_timeout_ms),
    )


def _equal_settings(settings: Settings) -> dict[str, str]:
    ports = settings.firewall.ports
    return dict(
        zip(
            SETTINGS,
            (
                ", ".join(sorted(map(str, settings.vips))),
                str(settings.nfs.root),
                settings.replication,
                ", ".join(f"{name} {ports[name]}" for name in sorted(ports)),
            ),
            strict=True,
        )
    )


# --- travelling ----------------------------------------------------------------------------------


def _packed(told: Told) -> bytes:
    return pages.pack(as_json(told))


def _unpacked(blob: bytes) -> Told:
    return from_json(pages.unpack(blob))


def as_json(told: Told) -> Document:
    """Returns the facts as JSON can carry them to the other node."""
    return {
        "nfsha_nfs": _FORMAT,
        "answers": told.answers,
        "version": told.version,
        "key": told.key,
        "settings": dict(told.settings),
        "wall_ns": told.wall_ns,
        "link_address": told.link_address,
        "held": list(told.held),
        "seen": None if told.seen is None else _seen_as_json(told.seen),
        "rsync": told.rsync,
        "rsync_refused": told.rsync_refused,
        "hindrances": list(told.hindrances),
        "copied_ns": told.copied_ns,
        "paused": told.paused,
        "served": served.as_json(told.served),
    }


def from_json(document: object) -> Told:
    """Returns the facts that `as_json` made a document of; FactsError for anything else."""
    fields = Fields("facts of a node", document, "nfsha_nfs", *Told.__slots__)
    if fields.number("nfsha_nfs", _NUMBER_MAX) != _FORMAT:
        raise FactsError("facts of a node in the format of another version of nfsha")
    return Told(
        answers=fields.number("answers", _NUMBER_MAX),
        version=fields.text("version"),
        key=fields.text("key"),
        settings=fields.given("settings", _settings_from_json),
        wall_ns=fields.number("wall_ns", _NUMBER_MAX),
        link_address=fields.text("link_address"),
        held=fields.texts("held", _VIPS_MAX),
        seen=fields.optional("seen", _seen_from_json),
        rsync=fields.text("rsync"),
        rsync_refused=fields.text("rsync_refused"),
        hindrances=fields.texts("hindrances", _SENTENCES_MAX),
        copied_ns=fields.number("copied_ns", _NUMBER_MAX),
        paused=fields.flag("paused"),
        served=fields.given("served", served.from_json),
    )


def _settings_from_json(document: object) -> dict[str, str]:
    fields = Fields("settings", document, *SETTINGS)
    return {name: fields.text(name) for name in SETTINGS}


def _seen_as_json(seen: Mapping[str, str]) -> list[Document]:
    return [{"vip": vip, "by": seen[vip]} for vip in sorted(seen)]


def _seen_from_json(document: object) -> dict[str, str]:
    fields = Fields("answers for the VIP", {"seen": document}, "seen")
    return dict(fields.each("seen", _VIPS_MAX, _one_seen_from_json))


def _one_seen_from_json(document: object) -> tuple[str, str]:
    fields = Fields("an answer for the VIP", document, "vip", "by")
    return fields.text("vip"), fields.text("by")

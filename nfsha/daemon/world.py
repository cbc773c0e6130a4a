"""The drivers of this node, made from its settings, and what they tell turned into inputs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nfsha.config import RSYNC, IPAddress, Link, Settings
from nfsha.core import model
from nfsha.core.model import NEVER_MS, CoreConfig, Datagram, Journal
from nfsha.daemon.clients import Clients
from nfsha.daemon.inbox import Inbox
from nfsha.daemon.locks import Locks
from nfsha.daemon.nfs_facts import Eyes, NfsFacts
from nfsha.daemon.replication import Replication
from nfsha.daemon.volumes import HookedVolumes
from nfsha.host.clock import boot_id, now_ms
from nfsha.host.events import EventLog
from nfsha.host.journal import JournalCorruptError, JournalFile, decode_journal
from nfsha.host.scheduling import raise_this_thread
from nfsha.nfs.service import Health, Service, ServiceHealth
from nfsha.peer import keys
from nfsha.peer.limited_log import LimitedLog
from nfsha.peer.links import Links, LinkSpec
from nfsha.peer.wire import Wire
from nfsha.peer.witness import Witness
from nfsha.vip import freeze
from nfsha.vip.address import AddressDriver, AddressNotice, NoticeKind
from nfsha.vip.announce import Announcer
from nfsha.vip.freeze import Firewall, FirewallError, Guarded, ServiceLease

log = logging.getLogger(__name__)

MAX_DRAINS = 32
"""Enough for all that a socket's buffer holds after a long freeze; a flood cannot hold a turn."""

ANSWERS_FOR_MS = 2000
"""So long after a question its answers are looked for in each turn; no longer, in the calm."""

INTACT_EVERY_S = 0.8
"""How often the rules are looked at where the kernel tells of changes: the second net only."""

INTACT_UNTOLD_EVERY_S = 0.4
"""How often where it does not (iptables): a foreign flush is repaired within 1 s."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """What the journal said at the start."""

    journal: Journal | None
    corrupt: str


class World:
    """All drivers of this node. `start` opens them, `close` gives them back; leases stay."""

    def __init__(self, settings: Settings, inbox: Inbox) -> None:
        self.settings = settings
        self.clock_ms: Callable[[], int] = now_ms
        self._inbox = inbox
        state = settings.paths.state
        self.journal = JournalFile(state / "journal", thread_setup=self._thread_setup())
        self.events = EventLog(state / "events.jsonl")
        ring = keys.load(settings.paths.key)
        wire = Wire(ring, settings.role)
        self.links = Links(
            [_link_spec(link) for link in settings.links],
            wire.seal,
            wire.open,
            self._deliver,
            self.clock_ms,
        )
        self.address = AddressDriver(
            settings.interface,
            settings.vips,
            settings.timing.address_lease_ms,
            self.clock_ms,
            self._address_notice,
        )
        self.announcer = Announcer(
            settings.interface,
            settings.vips,
            self.clock_ms,
            self._claimed,
            self._may_announce,
        )
        self.may_serve: Callable[[], bool] = lambda: False
        """Does this node hold evidence at this moment? The shell knows; set by it."""
        self.serving: Callable[[], bool] = lambda: False
        """Does this node serve, by the last turn? Set by the shell."""
        self.volumes = HookedVolumes(settings)
        self.witness = Witness(
            settings.interface,
            settings.witness.hosts,
            gateway=settings.witness.gateway,
            answered=self._witness_answered,
            clock_ms=self.clock_ms,
            neighbour_window_ms=settings.timing.hold_ms // 3,
        )
        self.replication = Replication(settings, ring, wire, self.links, inbox, self.clock_ms)
        self.clients = Clients(settings, wire, self.links, inbox, self.clock_ms, self._may_announce)
        self.locks = Locks(settings, wire, self.links, inbox, self.clock_ms, self._may_announce)
        eyes = Eyes(self.replication, self.address, self.announcer, self.others)
        self.nfs_facts = NfsFacts(settings, ring, wire, self.links, inbox, self.clock_ms, eyes)
        self.health = _service_health(settings, self._wants_mounts)
        self.last_health: Health | None = None
        self._log = LimitedLog(log, self.clock_ms)
        self._newest = (0, 0)
        self._asked_ms = NEVER_MS
        self._tasks: list[asyncio.Task[None]] = []
        self._chosen: ServiceLease | None = None

    @property
    def lease(self) -> ServiceLease:
        """The service lease; there from `start` on."""
        if self._chosen is None:
            raise RuntimeError("the world is not started")
        return self._chosen

    def core_config(self) -> CoreConfig:
        """What the decisions need to know of the settings and of this boot."""
        return CoreConfig(
            role=self.settings.role,
            boot_id=boot_id(),
            timings=self.settings.timing,
            service_lease=self.settings.firewall.service_lease,
            replication=self.settings.replication == RSYNC,
            start_alone_after_ms=self.settings.takeover.start_alone_after_ms,
            final_limit_ms=2 * self.settings.handover.max_stall_ms,
            hook_timeout_ms=self.settings.hooks.timeout_ms if self.settings.hooks.given else None,
        )

    def others(self) -> Sequence[IPAddress]:
        """Who else may answer on the VIP's interface: the witnesses and the peer's addresses."""
        found = [*self.witness.addresses(), *(link.peer for link in self.settings.links)]
        return tuple(dict.fromkeys(found))

    def remember(self) -> Remembered:
        """Reads the journal. Raises JournalError when the disk cannot tell."""
        loaded = self.journal.load()
        if loaded.document is None:
            kept = f"; it is kept as {loaded.kept_as}" if loaded.kept_as else ""
            return Remembered(None, loaded.corrupt + kept if loaded.corrupt else "")
        try:
            return Remembered(decode_journal(loaded.document), "")
        except JournalCorruptError as error:
            return Remembered(None, str(error))

    async def start(self) -> bool:
        """Opens every driver, the firewall first and closed. Returns True if a VIP was adopted.

        Raises FirewallError, VipError, LinkSetupError and the like: one clear sentence each.
        """
        self.volumes.start()
        self.events.start()
        self._chosen = await freeze.choose(
            Firewall(self.settings.firewall.backend), self._guarded(), self.clock_ms
        )
        await self._chosen.install()
        await self.address.start()
        adopted = (await self.address.adopt()).held
        self._inbox.put(model.CarrierChanged(self.address.link_ready))
        await self.announcer.start()
        await self.clients.start(adopted=adopted)
        await self.locks.start()
        await self.witness.start()
        await self.links.start()
        await self.replication.start()
        self.nfs_facts.start()
        self._watch_firewall()
        self._tasks = [
            asyncio.ensure_future(self.health.run(self._health_report)),
            asyncio.ensure_future(self._keep_firewall()),
        ]
        for task in self._tasks:
            self._inbox.watch(task)
        return adopted

    def drain(self) -> None:
        """Takes what has arrived, so that no timer is looked at before it (trace 12)."""
        for _ in range(MAX_DRAINS):
            if self.links.drain():
                break
        if self.clock_ms() - self._asked_ms < ANSWERS_FOR_MS:
            self.witness.drain()

    def ask_witness(self) -> None:
        """Sends one request to each witness."""
        self._asked_ms = self.clock_ms()
        self.witness.ask()

    async def close(self) -> None:
        """Gives every driver back; what stands in the kernel stays."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._unwatch_firewall()
        await self.clients.close()
        await self.locks.close()
        await self.nfs_facts.close()
        await self.replication.close()
        await self.volumes.close()
        self.links.close()
        self.witness.close()
        self.announcer.close()
        await self.address.close()
        if self._chosen is not None:
            self._chosen.shut()
        self.journal.close()
        self.events.close()

    # ------------------------------------------------------------- what drivers tell

    def _wants_mounts(self) -> bool:
        """Volumes that hooks mount are there only while this node serves."""
        return not self.settings.hooks.given or self.serving()

    def _may_announce(self) -> bool:
        return self.may_serve()

    def _deliver(self, link: str, datagram: Datagram, at_ms: int) -> None:
        del at_ms  # the engine dates it by its own turn: later, and so on the safe side
        heard = (datagram.session, datagram.seq)
        if heard == self._newest:  # over another link: it says nothing new, and needs no turn
            self._inbox.put_quietly(model.Heard(datagram, link))
            return
        self._newest = heard
        self._inbox.put(model.Heard(datagram, link))

    def _witness_answered(self, name: str, sent_ms: int) -> None:
        self._inbox.put(model.WitnessAnswered(name, sent_ms))

    def _claimed(self, vip: IPAddress, mac: str) -> None:
        log.debug("%s announces the VIP %s as its own", mac, vip)
        self._inbox.put(model.VipClaimed(mac))

    def _address_notice(self, notice: AddressNotice) -> None:
        self._log.warning(f"address, {notice.kind}", notice.detail)
        match notice.kind:
            case NoticeKind.REMOVED:
                self._inbox.put(model.AddressChanged(held=False, detail=notice.detail))
            case NoticeKind.ADDED | NoticeKind.PERMANENT:
                self._inbox.put(model.AddressChanged(held=True, detail=notice.detail))
            case NoticeKind.CARRIER_LOST | NoticeKind.INTERFACE_GONE:
                self._inbox.put(model.CarrierChanged(up=False))
            case NoticeKind.CARRIER_BACK | NoticeKind.INTERFACE_BACK:
                self._inbox.put(model.CarrierChanged(up=True))

    def _health_report(self, health: Health) -> None:
        self.last_health = health
        self._inbox.put(model.FitChanged(health.ok, "; ".join(health.signs), health.storage))

    # ------------------------------------------------------------- the firewall

    def _guarded(self) -> Guarded:
        return Guarded(
            vips=self.settings.vips,
            peers=[link.peer for link in self.settings.links],
            ports=self.settings.firewall.ports,
        )

    def _watch_firewall(self) -> None:
        fd = self.lease.watch_fd
        if fd is not None:
            asyncio.get_running_loop().add_reader(fd, self._firewall_changed)

    def _unwatch_firewall(self) -> None:
        if self._chosen is not None and self._chosen.watch_fd is not None:
            asyncio.get_running_loop().remove_reader(self._chosen.watch_fd)

    def _firewall_changed(self) -> None:
        who = self.lease.disturbed()
        if who is not None:
            self._log.warning("firewall", who)
            self._inbox.watch(asyncio.ensure_future(self._mend_firewall()))

    async def _keep_firewall(self) -> None:
        told = self.lease.watch_fd is not None
        while True:
            await asyncio.sleep(INTACT_EVERY_S if told else INTACT_UNTOLD_EVERY_S)
            await self._mend_firewall()

    async def _mend_firewall(self) -> None:
        """Rules that somebody else removed come back closed; the engine opens them if it may."""
        try:
            if await self.lease.intact():
                return
            await self.lease.install()
        except FirewallError as error:
            self._log.warning("firewall", str(error))
            return
        self._log.warning("firewall", "somebody else took the rules away: they are back, closed")
        self._inbox.put(model.RulesetLost())

    def _thread_setup(self) -> Callable[[], None] | None:
        return raise_this_thread if self.settings.scheduling.realtime else None


def new_session() -> int:
    """A random session id of 64 bits, never 0."""
    return secrets.randbits(63) + 1


def _link_spec(link: Link) -> LinkSpec:
    return LinkSpec(link.name, str(link.local), str(link.peer), link.port, link.interface)


def _service_health(settings: Settings, wants_mounts: Callable[[], bool]) -> ServiceHealth:
    nfs = settings.nfs
    return ServiceHealth(
        Service(
            host=str(nfs.check_address),
            nfs_port=nfs.nfs_port,
            mountd_port=nfs.mountd_port if nfs.check_mountd else None,
            mounts=nfs.mounts,
        ),
        clock_ms=now_ms,
        refuse_version4=nfs.version4 == "refuse",
        every_ms=nfs.check_every_ms,
        timeout_ms=nfs.check_timeout_ms,
        wants_mounts=wants_mounts,
    )

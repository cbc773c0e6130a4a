"""The address lease: the VIPs on an interface, each with a lifetime that the kernel ends by itself.

It adds, renews, adopts and removes all VIPs as one, and tells when somebody else changed them or
the link failed. It must not decide who may hold them, announce them, or start a process.

Netlink is pyroute2's. The kernel does its work inside sendmsg(2), and up to that nothing gives the
loop back, so that no await stands between a look at the clock and the first change that rests on
it; the answers come through the loop. While another process holds the kernel's rtnl lock, the call
waits for it. One operation at a time: the next begins when the one before has returned.

Measured on Linux 6.18: the kernel removes an address 0 to 0.4 s after its lifetime ended, and a
renewal of an address that is already gone silently makes it anew. So three things guard a renewal:
events before it, the clock before and after it, and events after it (a removal that the renewal
undid is found there: the kernel queues the event when it removes). Events are not waited for:
those that the loop has not yet read are read from their socket at once.
"""

import asyncio
import errno
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from pyroute2.netlink.rtnl import RTM_DELADDR, RTM_DELLINK, RTM_NEWADDR, RTM_NEWLINK

from nfsha.vip.rtnetlink import (
    AddressEntry,
    EventSocket,
    LinkEntry,
    RouteSocket,
    Vip,
    VipError,
    VipRefused,
    address_entry,
    link_entry,
)

__all__ = [
    "AddressDriver",
    "AddressNotice",
    "LeaseResult",
    "NoticeKind",
    "Outcome",
    "Vip",
    "VipError",
    "VipRefused",
    "VipStuck",
    "kernel_clock_cs",
    "remaining_ms",
]

_LISTEN_AGAIN_S: Final = 1.0
_REMOVE_ROUNDS_MAX: Final = 3
_REPEAT_NOTICE_MS: Final = 1000  # the same foreign change is told at most this often
_TICK_MARGIN_MS: Final = 20  # two ticks of the slowest usual kernel clock (100 Hz)
_INITIAL_TICKS_S: Final = 300  # linux/jiffies.h: INITIAL_JIFFIES is 300 s before the 32-bit wrap
_KERNEL_HZ: Final = (100, 250, 300, 1000)  # kernel/Kconfig.hz
_IPV6_SETTINGS: Final = Path("/proc/sys/net/ipv6/conf")


class VipStuck(VipError):  # noqa: N818 - what happened, not that something did
    """A VIP could not be removed: the node must stop serving by other means."""


class Outcome(StrEnum):
    """How an operation on the lease ended."""

    HELD = "held"  # all VIPs are on the interface, under a lease of ours
    EXPIRED = "expired"  # the lease had run out by our clock; all VIPs were removed
    LATE = "late"  # the evidence had run out by our clock; all VIPs were removed
    LOST = "lost"  # no live lease of ours on all VIPs; what was left of a lost lease was removed
    PERMANENT = "permanent"  # somebody gave a VIP a life without end
    FAILED = "failed"  # the kernel refused; what had been added was removed


@dataclass(frozen=True, slots=True)
class LeaseResult:
    """What came of an operation on the lease, with the times (ms of the given clock) that prove it.

    `lease_end_ms` is the earliest time at which the kernel may end the lease; None unless held.
    """

    outcome: Outcome
    lease_end_ms: int | None
    started_ms: int
    ended_ms: int
    why: str

    @property
    def held(self) -> bool:
        """True if all VIPs are on the interface under a lease of ours."""
        return self.outcome is Outcome.HELD


class NoticeKind(StrEnum):
    """What happened that was not our doing."""

    REMOVED = "removed"  # a VIP under our lease is gone: by somebody, or by the end of its life
    ADDED = "added"  # somebody put a VIP on the interface while we hold none, with a finite life
    PERMANENT = "permanent"  # somebody gave a VIP a life without end
    CARRIER_LOST = "carrier-lost"
    CARRIER_BACK = "carrier-back"
    INTERFACE_GONE = "interface-gone"
    INTERFACE_BACK = "interface-back"


@dataclass(frozen=True, slots=True)
class AddressNotice:
    """One thing that happened to a VIP (or, if `vip` is None, to the interface) without us."""

    kind: NoticeKind
    vip: Vip | None
    at_ms: int
    detail: str


class AddressDriver:
    """Holds the VIPs of one interface under a lease in the kernel, all or none.

    `lease_ms` must be whole seconds, for that is the kernel's unit. `clock_ms` should be
    CLOCK_BOOTTIME. `notify` is called on the loop's thread, also from within `renew`; it must not
    block and not call back.
    """

    def __init__(
        self,
        interface: str,
        vips: Sequence[Vip],
        lease_ms: int,
        clock_ms: Callable[[], int],
        notify: Callable[[AddressNotice], None],
    ) -> None:
        if lease_ms < 1000 or lease_ms % 1000:
            raise ValueError(f"lease of {lease_ms} ms: the kernel wants whole seconds, at least 1")
        if not vips or len(set(vips)) != len(vips):
            raise ValueError("at least one VIP, none twice")
        self._interface = interface
        self._vips = tuple(vips)
        self._lease_ms = lease_ms
        self._clock_ms = clock_ms
        self._notify = notify
        self._kernel: RouteSocket | None = None
        self._events: EventSocket | None = None
        self._link: LinkEntry | None = None
        self._lease_end_ms: int | None = None
        self._lost = ""  # why the lease ended without us; empty while it did not
        self._removing = False
        self._recovery: asyncio.Task[None] | None = None  # from a loss of events
        self._listen_again: asyncio.TimerHandle | None = None
        self._noticed_ms: dict[tuple[NoticeKind, Vip], int] = {}

    @property
    def link_ready(self) -> bool:
        """True if the interface is there, up, and has carrier, by the newest event."""
        return self._link is not None and self._link.carrier

    async def start(self) -> None:
        """Opens the sockets and begins to watch; touches no address.

        Raises VipRefused if the interface does not exist, has IPv6 switched off while there is an
        IPv6 VIP, holds a VIP permanently, or if a VIP is on another interface of this machine.
        Raises VipError if the kernel gives no netlink sockets.
        """
        if self._kernel is not None:
            raise RuntimeError("started twice")
        self._kernel, self._events = RouteSocket(), EventSocket(self._on_event)
        try:
            await self._kernel.open()
            await self._events.open()
            found = await self._kernel.link(self._interface)
            self._link = self._link or found  # what an event has told meanwhile is newer
            self._refuse_unfit(await self._kernel.addresses(0))
        except VipError:
            await self.close()
            raise

    async def close(self) -> None:
        """Closes the sockets and leaves the addresses as they are. Idempotent."""
        if self._listen_again is not None:
            self._listen_again.cancel()
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.wait([self._recovery])
        for opened in (self._events, self._kernel):
            if opened is not None:
                opened.close()
        self._events = self._kernel = None

    async def held(self) -> frozenset[Vip]:
        """Which VIPs are on the interface now, whoever put them there. Raises VipError."""
        return frozenset(entry.address for entry in await self._entries())

    async def add(self, deadline_ms: int) -> LeaseResult:
        """Puts all VIPs on the interface under a new lease, and proves that they are there.

        `deadline_ms` is the time until which this node may hold them by its evidence. Leftovers
        with a finite life are replaced; a permanent one is left alone and refused.
        Raises VipStuck if what must go cannot be removed.
        """
        try:
            present = await self._entries()
        except VipError as error:
            return await self._give_up(Outcome.FAILED, self._clock_ms(), str(error))
        if entry := next((e for e in present if e.permanent), None):
            return self._result(Outcome.PERMANENT, self._clock_ms(), self._permanent(entry))
        if present and self._lease_end_ms is None:
            await self._remove_all()
        await self._catch_up()
        return await self._add(deadline_ms)

    async def _add(self, deadline_ms: int) -> LeaseResult:
        started_ms = self._clock_ms()
        if started_ms >= deadline_ms:
            return await self._give_up(Outcome.LATE, started_ms, _late(started_ms, deadline_ms))
        # What was told up to here is history; from here on a removal ends the new lease.
        self._lease_end_ms, self._lost = started_ms + self._lease_ms, ""
        try:
            await self._put_all(self._lease_ms)
            missing = await self._unusable()
        except VipError as error:
            return await self._give_up(Outcome.FAILED, started_ms, str(error))
        await self._catch_up()
        ended_ms = self._clock_ms()
        if missing:
            why = f"not usable once added: {missing}"
            return await self._give_up(Outcome.FAILED, started_ms, why)
        if refusal := self._unfit(started_ms + self._lease_ms, ended_ms, deadline_ms):
            return await self._give_up(refusal[0], started_ms, refusal[1])
        return self._hold(started_ms, ended_ms, self._lease_ms)

    async def renew(self, deadline_ms: int) -> LeaseResult:
        """Gives all VIPs a full lease again; never brings back what was gone.

        If by the clock, read again after the call, the old lease had ended or `deadline_ms` has
        come, or if an event shows that a VIP was gone meanwhile, all VIPs are removed at once.
        Without a lease of ours nothing is touched. Raises VipStuck if they cannot be removed.
        """
        return await self._refresh(self._lease_ms, deadline_ms)

    async def extend(self, lease_s: int, deadline_ms: int) -> LeaseResult:
        """Gives all VIPs one lease of `lease_s` seconds, for an announced absence; else as renew.

        `deadline_ms` is the time until which this node may hold them by its evidence of now.
        """
        if lease_s < 1:
            raise ValueError(f"lease of {lease_s} s")
        return await self._refresh(lease_s * 1000, deadline_ms)

    async def adopt(self) -> LeaseResult:
        """Takes the VIPs that an earlier run left on the interface as our lease, unrenewed.

        Its end is reckoned, never too late, from the rest that the kernel shows. Unless every VIP
        is there with a finite life, nothing is adopted and nothing is touched. Only for a driver
        that holds no lease yet.
        """
        if self._lease_end_ms is not None:
            raise RuntimeError("there is a lease already")
        started_ms = self._clock_ms()
        await self._catch_up()
        # From here on a removal ends the lease that is being adopted.
        self._lease_end_ms, self._lost = started_ms, ""
        result = await self._adopt(started_ms)
        if not result.held:
            self._lease_end_ms, self._lost = None, ""
        return result

    async def _adopt(self, started_ms: int) -> LeaseResult:
        now_cs = kernel_clock_cs()
        try:
            present = await self._entries()
        except VipError as error:
            return self._result(Outcome.FAILED, started_ms, str(error))
        ours = {e.address: e for e in present if e.prefixlen == e.address.max_prefixlen}
        if entry := next((e for e in ours.values() if e.permanent), None):
            return self._result(Outcome.PERMANENT, started_ms, self._permanent(entry))
        if missing := [str(vip) for vip in self._vips if vip not in ours]:
            why = f"not on {self._interface}: {', '.join(missing)}"
            return self._result(Outcome.LOST, started_ms, why)
        if self._lost:
            return self._result(Outcome.LOST, started_ms, self._lost)
        rest_ms = min(remaining_ms(e.valid_s, _age_cs(e, now_cs)) for e in ours.values())
        if rest_ms <= 0:
            return self._result(Outcome.EXPIRED, started_ms, "nothing certain is left of its life")
        return self._hold(started_ms, self._clock_ms(), rest_ms)

    async def remove(self) -> None:
        """Removes all VIPs, whoever put them there; they are gone when it returns. Idempotent.

        Raises VipStuck, with the remedy, if the kernel still shows one after three rounds.
        """
        await self._remove_all()

    # The lease.

    async def _refresh(self, length_ms: int, deadline_ms: int) -> LeaseResult:
        await self._catch_up()
        started_ms = self._clock_ms()
        end_ms = self._lease_end_ms
        if end_ms is None and not self._lost:
            return self._result(Outcome.LOST, started_ms, "there is no lease of ours to renew")
        if refusal := self._unfit(end_ms, started_ms, deadline_ms):
            return await self._give_up(refusal[0], started_ms, refusal[1])
        try:
            await self._put_all(length_ms)
        except VipError as error:
            return await self._give_up(Outcome.FAILED, started_ms, str(error))
        await self._catch_up()
        ended_ms = self._clock_ms()
        if refusal := self._unfit(end_ms, ended_ms, deadline_ms):
            return await self._give_up(refusal[0], started_ms, refusal[1])
        return self._hold(started_ms, ended_ms, length_ms)

    def _unfit(
        self, end_ms: int | None, now_ms: int, deadline_ms: int
    ) -> tuple[Outcome, str] | None:
        if end_ms is None or self._lost:
            return Outcome.LOST, self._lost
        if now_ms >= end_ms:
            return Outcome.EXPIRED, f"the lease ran out {now_ms - end_ms} ms ago"
        if now_ms >= deadline_ms:
            return Outcome.LATE, _late(now_ms, deadline_ms)
        return None

    def _hold(self, started_ms: int, ended_ms: int, length_ms: int) -> LeaseResult:
        self._lease_end_ms = started_ms + length_ms
        self._lost = ""
        why = f"{', '.join(map(str, self._vips))} on {self._interface}"
        return LeaseResult(Outcome.HELD, self._lease_end_ms, started_ms, ended_ms, why)

    async def _give_up(self, outcome: Outcome, started_ms: int, why: str) -> LeaseResult:
        await self._remove_all()
        return self._result(outcome, started_ms, why)

    def _result(self, outcome: Outcome, started_ms: int, why: str) -> LeaseResult:
        return LeaseResult(outcome, None, started_ms, self._clock_ms(), why)

    # The kernel.

    def _opened(self) -> RouteSocket:
        if self._kernel is None:
            raise RuntimeError("not started")
        return self._kernel

    async def _entries(self) -> list[AddressEntry]:
        kernel = self._opened()
        if self._link is None:
            return []
        return [e for e in await kernel.addresses(self._link.index) if e.address in self._vips]

    async def _put_all(self, length_ms: int) -> None:
        for vip in self._vips:
            if self._link is None:
                raise VipError(f"interface {self._interface} is gone")
            if code := await self._opened().put(self._link.index, vip, length_ms // 1000):
                raise VipError(f"{self._interface} did not take {vip}: {os.strerror(code)}")

    async def _unusable(self) -> str:
        usable = {e.address for e in await self._entries() if e.usable and not e.permanent}
        return ", ".join(str(vip) for vip in self._vips if vip not in usable)

    async def _remove_all(self) -> None:
        self._lease_end_ms, self._lost, self._removing = None, "", True
        try:
            await self._remove_in_rounds()
        finally:
            self._removing = False

    async def _remove_in_rounds(self) -> None:
        # The first round does not look first: when it is late, each moment counts.
        doomed: list[tuple[Vip, int]] = [(vip, vip.max_prefixlen) for vip in self._vips]
        trouble = "somebody adds it again"
        for _ in range(_REMOVE_ROUNDS_MAX):
            if self._link is None:  # no interface, no address
                return
            index, kernel = self._link.index, self._opened()
            try:
                codes = [await kernel.delete(index, vip, length) for vip, length in doomed]
                await self._catch_up()
                doomed = [(entry.address, entry.prefixlen) for entry in await self._entries()]
            except VipError as error:
                trouble = str(error)
                continue
            if not doomed:
                return
            trouble = next((os.strerror(c) for c in codes if c not in _ABSENT), trouble)
        what = ", ".join(f"{vip}/{length}" for vip, length in doomed)
        raise VipStuck(
            f"{what} could not be removed from {self._interface} ({trouble}): "
            f"remove it by hand: ip address del {what} dev {self._interface}"
        )

    def _refuse_unfit(self, entries: list[AddressEntry]) -> None:
        if self._link is None:
            raise VipRefused(
                f"interface {self._interface} does not exist: "
                "correct its name in the configuration, or create it before nfsha starts"
            )
        for entry in entries:
            if entry.address not in self._vips:
                continue
            if entry.index != self._link.index:
                raise VipRefused(
                    f"{entry.address} is on another interface of this machine (index "
                    f"{entry.index}, see 'ip address'), which would answer for it: remove it "
                    f"there; it belongs to nfsha on {self._interface}"
                )
            if entry.permanent:
                raise VipRefused(self._permanent(entry))
        if any(vip.version == 6 for vip in self._vips) and not _ipv6_enabled(self._interface):
            raise VipRefused(
                f"IPv6 is switched off on {self._interface}, but there is an IPv6 VIP: "
                f"set net.ipv6.conf.{self._interface}.disable_ipv6 to 0, or drop that VIP"
            )

    def _permanent(self, entry: AddressEntry) -> str:
        cidr = f"{entry.address}/{entry.prefixlen}"
        return (
            f"{self._interface} holds {cidr} permanently, so no lease could ever end: remove it "
            f"(ip address del {cidr} dev {self._interface}) and take it out of the machine's "
            "network configuration; nfsha adds it itself"
        )

    # Events.

    async def _catch_up(self) -> None:
        """Deals with everything that the kernel has told of until now."""
        if self._events is not None:
            self._events.drain()
        if self._recovery is not None:
            await asyncio.wait([self._recovery])

    def _on_event(self, message: Any) -> None:  # noqa: ANN401 - pyroute2 ships no types
        if message is None:
            self._begin_recovery()
            return
        kind = message["header"]["type"]
        if kind in (RTM_NEWLINK, RTM_DELLINK):
            self._on_link(kind, link_entry(message))
        elif kind in (RTM_NEWADDR, RTM_DELADDR):
            entry = address_entry(message)
            if entry is None or self._link is None or entry.index != self._link.index:
                return
            if entry.address not in self._vips:
                return
            if kind == RTM_DELADDR:
                self._on_removed(entry)
            else:
                self._on_added(entry)

    def _on_removed(self, entry: AddressEntry) -> None:
        # Our own removals end the lease first and are drained before the next one begins.
        if self._lease_end_ms is None:
            return
        late_ms = self._clock_ms() - self._lease_end_ms
        if entry.port:
            reason = f"removed by another program (netlink port {entry.port})"
        elif late_ms >= 0:
            reason = f"its lease ended {late_ms} ms ago, or another program removed it"
        else:
            reason = f"removed {-late_ms} ms before its lease ended: another program, or link down"
        self._lose(NoticeKind.REMOVED, entry.address, reason)

    def _on_added(self, entry: AddressEntry) -> None:
        """Somebody else's change, or, for IPv6, perhaps the echo of our own."""
        if entry.permanent:
            detail = f"made permanent by another program (netlink port {entry.port})"
            if self._lease_end_ms is not None:
                self._lose(NoticeKind.PERMANENT, entry.address, detail)
            else:
                self._tell_now_and_then(NoticeKind.PERMANENT, entry.address, detail)
        elif self._lease_end_ms is None and not self._lost and not self._removing:
            # After a lost lease it may be the echo of our own: IPv6 tells of an addition late.
            detail = f"added by another program, for {entry.valid_s} s"
            self._tell_now_and_then(NoticeKind.ADDED, entry.address, detail)

    def _lose(self, kind: NoticeKind, vip: Vip, reason: str) -> None:
        self._lease_end_ms = None
        self._lost = f"{vip}: {reason}"
        self._tell(kind, vip, reason)

    def _on_link(self, kind: int, link: LinkEntry | None) -> None:
        known = self._link
        if link is None:
            return
        if kind == RTM_DELLINK:
            if known is not None and link.index == known.index:
                self._set_link(None)
        elif link.index == known.index if known else link.name == self._interface:
            self._set_link(link)

    def _set_link(self, link: LinkEntry | None) -> None:
        known, self._link = self._link, link
        if link is None:
            if known is not None:
                if self._lease_end_ms is not None:
                    self._lease_end_ms, self._lost = None, f"interface {self._interface} is gone"
                self._tell(NoticeKind.INTERFACE_GONE, None, f"{self._interface} was removed")
        elif known is None:
            self._tell(NoticeKind.INTERFACE_BACK, None, _link_state(link))
        elif link.carrier != known.carrier:
            kind = NoticeKind.CARRIER_BACK if link.carrier else NoticeKind.CARRIER_LOST
            self._tell(kind, None, _link_state(link))

    def _begin_recovery(self) -> None:
        if self._recovery is None:
            self._recovery = asyncio.create_task(self._recover())

    async def _recover(self) -> None:
        """Events were lost: listens anew, and compares what the kernel shows with our belief."""
        try:
            await self._listen_anew()
            await self._compare()
        except VipError as error:
            if self._lease_end_ms is not None:
                self._lose(NoticeKind.REMOVED, self._vips[0], f"perhaps: {error}")
            loop = asyncio.get_running_loop()
            self._listen_again = loop.call_later(_LISTEN_AGAIN_S, self._begin_recovery)
        finally:
            self._recovery = None

    async def _listen_anew(self) -> None:
        if self._events is not None:
            self._events.close()
        self._events = EventSocket(self._on_event)
        await self._events.open()

    async def _compare(self) -> None:
        known = self._link
        link = await self._opened().link(self._interface)
        if self._link is known:  # or else an event has told it meanwhile, and knows better
            self._set_link(link)
        entries = {entry.address: entry for entry in await self._entries()}
        for vip in self._vips:
            entry = entries.get(vip)
            if entry is None and self._lease_end_ms is not None:
                self._lose(NoticeKind.REMOVED, vip, "gone, found after an overflow of events")
            elif entry is not None and entry.permanent:
                self._on_added(entry)

    def _tell_now_and_then(self, kind: NoticeKind, vip: Vip, detail: str) -> None:
        now_ms = self._clock_ms()
        last_ms = self._noticed_ms.get((kind, vip))
        if last_ms is None or now_ms - last_ms >= _REPEAT_NOTICE_MS:
            self._noticed_ms[kind, vip] = now_ms
            self._tell(kind, vip, detail)

    def _tell(self, kind: NoticeKind, vip: Vip | None, detail: str) -> None:
        self._notify(AddressNotice(kind, vip, self._clock_ms(), detail))


# What the kernel answers when there is nothing to remove: no such address, no such interface.
_ABSENT: Final = frozenset({0, errno.EADDRNOTAVAIL, errno.ENODEV})


def remaining_ms(reported_s: int, age_cs: int | None) -> int:
    """What is surely left of a lifetime that the kernel shows as `reported_s`.

    The kernel subtracts whole seconds lived (inet_fill_ifaddr in net/ipv4/devinet.c), so the truth
    lies between `reported_s - 1` and `reported_s`. The age since the lifetime was set, if known,
    gives the fraction; close after a full second it might belong to the second before.
    """
    lived_ms = 1000 if age_cs is None else age_cs * 10 % 1000
    if lived_ms < _TICK_MARGIN_MS:
        lived_ms = 1000
    return max(0, reported_s * 1000 - lived_ms - _TICK_MARGIN_MS)


def kernel_clock_cs() -> int | None:
    """The kernel's tick count since boot in 1/100 s: the clock of `AddressEntry.touched_cs`.

    times(2) returns that count, but from its odd start 300 s before a 32-bit wrap, which in
    seconds depends on the kernel's tick rate; only one rate gives a value near CLOCK_MONOTONIC.
    None if none does.
    """
    ticks_s = os.times().elapsed
    monotonic_s = time.clock_gettime(time.CLOCK_MONOTONIC)
    for rate_hz in _KERNEL_HZ:
        since_boot_s = ticks_s - (2**32 / rate_hz - _INITIAL_TICKS_S)
        if abs(since_boot_s - monotonic_s) < 60:
            return round(since_boot_s * 100)
    return None


def _age_cs(entry: AddressEntry, now_cs: int | None) -> int | None:
    if now_cs is None:
        return None
    age_cs = (now_cs - entry.touched_cs) % 2**32
    return age_cs if age_cs < 2**31 else 0  # touched a tick after `now_cs` was read


def _late(now_ms: int, deadline_ms: int) -> str:
    return f"the evidence had run out {now_ms - deadline_ms} ms before"


def _link_state(link: LinkEntry) -> str:
    state = "up" if link.up else "down"
    return f"{link.name} is {state}, {'with' if link.carrier else 'without'} carrier"


def _ipv6_enabled(interface: str) -> bool:
    try:
        return (_IPV6_SETTINGS / interface / "disable_ipv6").read_text().strip() == "0"
    except OSError:  # the kernel runs without IPv6
        return False

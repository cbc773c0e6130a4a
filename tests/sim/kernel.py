"""The two locks in a node's kernel, and the drivers that feed them (nfsha/vip does it for real).

The address ends `valid_lft` after its renewal, 0 to 390 ms late, and a renewal revives an address
that has ended; an element of the service set ends 0 to 4 ms late, and renewing an ended one fails.
A driver is a generator: it yields where another process, a stop signal or a kill can come between
a look at the clock and a system call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nfsha.core.model import LeaseHeld, LeaseLost

if TYPE_CHECKING:
    from tests.sim.node import Node

NEVER_US = -1
FOREVER_US = 10**15
ADDRESS_LATE_US = 390_000
SERVICE_LATE_US = 4_000
SLOW_MS = 20
SLOW_TRIES = 3
SERVICE_LEFT_MIN_MS = 1

Driver = Iterator[LeaseHeld | LeaseLost | None]
"""Yields None at each place where it can be interrupted, and its result as the last value."""


class Kernel:
    """The address, and the service's door. Ends are in microseconds of the node's own clock."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.address_end_us = NEVER_US
        self.address_shown_us = NEVER_US
        """When the kernel says that the address will end: it ends a little later."""
        self.service_end_us = NEVER_US

    def address_held(self) -> bool:
        """Is the address on the interface now?"""
        return self.address_end_us > self._node.local_us()

    def accepts_until_us(self) -> int:
        """Until when clients are accepted, by the node's own clock."""
        return min(self.address_end_us, self.service_end_us)

    def put_address(self, lease_ms: int) -> None:
        """Adds or renews: the kernel does not care whether it was there."""
        late_us = self._node.world.random.randrange(ADDRESS_LATE_US)
        self.address_shown_us = self._node.local_us() + lease_ms * 1000
        self.address_end_us = self.address_shown_us + late_us
        self._node.locks_changed()
        self._node.watch_address()

    def drop_address(self) -> None:
        """Removes the address."""
        self.address_end_us = NEVER_US
        self._node.locks_changed()

    def put_service(self, left_ms: int | None) -> None:
        """Opens the service for so long; None: until it is closed (no lease in this firewall)."""
        if left_ms is None:
            self.service_end_us = FOREVER_US
        else:
            late_us = self._node.world.random.randrange(SERVICE_LATE_US)
            self.service_end_us = self._node.local_us() + left_ms * 1000 + late_us
        self._node.locks_changed()

    def service_open(self) -> bool:
        """Is the element alive?"""
        return self.service_end_us > self._node.local_us()

    def drop_service(self) -> None:
        """Closes the service."""
        self.service_end_us = NEVER_US
        self._node.locks_changed()

    def lose_power(self) -> None:
        """A booted kernel knows nothing of the former one."""
        self.address_end_us = self.service_end_us = NEVER_US


class AddressDriver:
    """As nfsha.vip.address: checks the clock before and after each renewal."""

    rechecks = True
    """False in the mutant of trace 18."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._kernel = node.kernel
        self._lease_end_ms: int | None = None

    def adopt(self) -> None:
        """Takes what an earlier run left as the own lease; its end is never reckoned too late."""
        self._lease_end_ms = self._kernel.address_shown_us // 1000

    def add(self, deadline_ms: int, lease_ms: int) -> Driver:
        """Puts the address there under a new lease."""
        node = self._node
        started_ms = node.local_ms()
        if started_ms >= deadline_ms:
            yield self._give_up("the evidence ran out before the address was added")
            return
        yield None
        self._kernel.put_address(lease_ms)
        yield None
        ended_ms = node.local_ms()
        if self.rechecks and (ended_ms >= deadline_ms or ended_ms >= started_ms + lease_ms):
            yield self._give_up("the address came too late")
            return
        self._lease_end_ms = started_ms + lease_ms
        yield LeaseHeld("address")

    def renew(self, deadline_ms: int, lease_ms: int) -> Driver:
        """Gives the address a full lease again."""
        node = self._node
        started_ms = node.local_ms()
        end_ms = self._lease_end_ms
        if end_ms is None:
            yield LeaseLost("address", "there is no lease of ours to renew")
            return
        if started_ms >= min(end_ms, deadline_ms):
            yield self._give_up("the lease had ended before its renewal")
            return
        yield None
        self._kernel.put_address(lease_ms)
        yield None
        if self.rechecks and node.local_ms() >= min(end_ms, deadline_ms):
            yield self._give_up("the renewal came too late: removed")
            return
        self._lease_end_ms = started_ms + lease_ms
        yield LeaseHeld("address")

    def remove(self) -> Driver:
        """Takes the address away."""
        yield None
        self._lease_end_ms = None
        self._kernel.drop_address()
        self._node.address_removed()

    def forget(self) -> None:
        """Somebody else, or the kernel, took the address away."""
        self._lease_end_ms = None

    def _give_up(self, why: str) -> LeaseLost:
        self._lease_end_ms = None
        self._kernel.drop_address()
        return LeaseLost("address", why)


class ServiceDriver:
    """As nfsha.vip.nftables, or nfsha.vip.iptables where there is no lease."""

    rechecks = True

    def __init__(self, node: Node, *, has_lease: bool) -> None:
        self._node = node
        self._kernel = node.kernel
        self._has_lease = has_lease

    def open(self, deadline_ms: int) -> Driver:
        """Opens on own evidence, whatever was open before."""
        return self._hold(deadline_ms, renewal=False)

    def renew(self, deadline_ms: int) -> Driver:
        """Moves the deadline of what is open."""
        return self._hold(deadline_ms, renewal=True)

    def close(self) -> Driver:
        """Closes."""
        yield None
        self._kernel.drop_service()

    def _hold(self, deadline_ms: int, *, renewal: bool) -> Driver:
        node = self._node
        for _ in range(SLOW_TRIES):
            before_ms = node.local_ms()
            left_ms = deadline_ms - before_ms
            if left_ms < SERVICE_LEFT_MIN_MS:
                break
            yield None
            if renewal and not self._kernel.service_open():
                yield LeaseLost("service", "the lease had ended before the renewal came")
                return
            self._kernel.put_service(left_ms if self._has_lease else None)
            yield None
            after_ms = node.local_ms()
            if self.rechecks and after_ms >= deadline_ms:
                break
            if not self.rechecks or after_ms - before_ms <= SLOW_MS:
                yield LeaseHeld("service")
                return
        self._kernel.drop_service()
        yield LeaseLost("service", "too late, closed at once")

"""The freeze: which firewall carries the service lease on this host.

It names the backends and makes the configured one; the promises that both keep stand in
`service_lease`. It must not decide when the service is open.
"""

from collections.abc import Callable
from enum import StrEnum

from nfsha.vip.iptables import IptablesLease
from nfsha.vip.nftables import NftablesLease
from nfsha.vip.service_lease import (
    DEFAULT_PORTS,
    FirewallError,
    Guarded,
    LeaseOutcome,
    LeaseVerdict,
    ServiceLease,
)

__all__ = [
    "DEFAULT_PORTS",
    "Firewall",
    "FirewallError",
    "Guarded",
    "LeaseOutcome",
    "LeaseVerdict",
    "ServiceLease",
    "choose",
]


class Firewall(StrEnum):
    """What the operator may ask for."""

    NFTABLES = "nftables"
    IPTABLES = "iptables"


async def choose(firewall: Firewall, guarded: Guarded, clock_ms: Callable[[], int]) -> ServiceLease:
    """Returns the lease of that backend, checked on this host; it changes no packet's way.

    Raises FirewallError where the host cannot carry it.
    """
    kind = NftablesLease if firewall is Firewall.NFTABLES else IptablesLease
    return await _checked(kind(guarded, clock_ms))


async def _checked(lease: ServiceLease) -> ServiceLease:
    try:
        await lease.check()
    except FirewallError:
        lease.shut()
        raise
    return lease

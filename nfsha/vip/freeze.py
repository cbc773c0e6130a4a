"""The freeze: which firewall carries the service lease on this host.

It names the backends and chooses one; the promises that both keep stand in `service_lease`. It
must not decide when the service is open.
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

    AUTO = "auto"  # nftables, or iptables-legacy where that cannot be
    NFTABLES = "nftables"
    IPTABLES = "iptables"


async def choose(firewall: Firewall, guarded: Guarded, clock_ms: Callable[[], int]) -> ServiceLease:
    """Returns the lease that this host can carry, checked; it changes no packet's way.

    With AUTO the caller must look at `has_lease`: without it the timings must be longer.
    Raises FirewallError, which with AUTO holds both reasons.
    """
    match firewall:
        case Firewall.NFTABLES:
            return await _checked(NftablesLease(guarded, clock_ms))
        case Firewall.IPTABLES:
            return await _checked(IptablesLease(guarded, clock_ms))
        case Firewall.AUTO:
            try:
                return await _checked(NftablesLease(guarded, clock_ms))
            except FirewallError as no_nftables:
                try:
                    return await _checked(IptablesLease(guarded, clock_ms))
                except FirewallError as no_iptables:
                    raise FirewallError(f"{no_nftables}. And: {no_iptables}") from no_iptables


async def _checked(lease: ServiceLease) -> ServiceLease:
    try:
        await lease.check()
    except FirewallError:
        lease.shut()
        raise
    return lease

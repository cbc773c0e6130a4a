"""The lease without a kernel: what is left of a lifetime, what is refused, what is no event."""

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from nfsha.vip.address import AddressDriver, remaining_ms
from nfsha.vip.rtnetlink import Vip, link_entry

V4 = IPv4Address("192.0.2.9")


def test_a_bridge_port_event_is_not_a_link_event() -> None:
    port_left = ifinfmsg()
    port_left["family"] = 7  # AF_BRIDGE
    port_left["index"] = 3
    assert link_entry(port_left) is None


@given(lived_ms=st.integers(0, 9_999), lag_ms=st.integers(0, 10))
def test_the_rest_of_a_lease_is_never_overestimated(lived_ms: int, lag_ms: int) -> None:
    lease_s = 10
    reported_s = lease_s - lived_ms // 1000  # as inet_fill_ifaddr reckons
    truth_ms = lease_s * 1000 - lived_ms
    for age_cs in (None, (lived_ms + lag_ms) // 10, max(0, lived_ms - lag_ms) // 10):
        rest_ms = remaining_ms(reported_s, age_cs)
        assert 0 <= rest_ms <= truth_ms
        assert rest_ms >= truth_ms - 1050


def test_a_known_age_gives_a_close_estimate() -> None:
    assert remaining_ms(reported_s=1, age_cs=130) == 680  # of 2 s, 1.3 s lived
    assert remaining_ms(reported_s=1, age_cs=None) == 0


@pytest.mark.parametrize("lease_ms", [0, 999, 1500, -1000])
def test_a_lease_the_kernel_cannot_count_is_refused(lease_ms: int) -> None:
    with pytest.raises(ValueError, match="whole seconds"):
        AddressDriver("eth0", [V4], lease_ms, lambda: 0, print)


@pytest.mark.parametrize("vips", [[], [V4, V4]])
def test_no_vip_or_one_named_twice_is_refused(vips: list[Vip]) -> None:
    with pytest.raises(ValueError, match="VIP"):
        AddressDriver("eth0", vips, 2000, lambda: 0, print)

"""The bytes of route netlink: what is built can be read back, and nothing received can raise."""

import struct
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfsha.vip import rtnetlink
from nfsha.vip.address import AddressDriver, remaining_ms

V4 = IPv4Address("192.0.2.9")
V6 = IPv6Address("2001:db8::9")


def read_back(request: rtnetlink.Request) -> rtnetlink.AddressEntry:
    (message,) = rtnetlink.messages(rtnetlink.frame(request, 7))
    assert (message.kind, message.sequence) == (request.kind, 7)
    entry = rtnetlink.address_entry(message)
    assert entry is not None
    return entry


@pytest.mark.parametrize("vip", [V4, V6])
def test_an_address_request_reads_back(vip: rtnetlink.Vip) -> None:
    entry = read_back(rtnetlink.add_address(3, vip, 2))
    assert (entry.index, entry.address, entry.valid_s) == (3, vip, 2)
    assert entry.prefixlen == vip.max_prefixlen
    assert entry.usable
    assert not entry.permanent


def test_an_endless_address_counts_as_permanent() -> None:
    assert read_back(rtnetlink.add_address(3, V4, rtnetlink.INFINITY_S)).permanent


def test_a_bridge_port_event_is_not_a_link_event() -> None:
    port_left = struct.pack("=BxHiII", 7, 0, 3, 0, 0)  # AF_BRIDGE
    message = rtnetlink.Message(rtnetlink.RTM_DELLINK, 0, 0, 0, port_left)
    assert rtnetlink.link_entry(message) is None


@given(st.binary(max_size=300), st.sampled_from([16, 17, 20, 21, 2, 3]))
def test_garbage_never_raises(garbage: bytes, kind: int) -> None:
    framed = struct.pack("=IHHII", 16 + len(garbage), kind, 0, 0, 0) + garbage
    for buffer in (garbage, framed):
        for message in rtnetlink.messages(buffer):
            rtnetlink.address_entry(message)
            rtnetlink.link_entry(message)
            rtnetlink.error_code(message)


@given(st.ip_addresses(), st.integers(0, 120))
def test_a_cut_message_never_raises(address: rtnetlink.Vip, length: int) -> None:
    whole = rtnetlink.frame(rtnetlink.add_address(3, ip_address(address), 2), 1)
    for message in rtnetlink.messages(whole[:length]):
        rtnetlink.address_entry(message)


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
def test_no_vip_or_one_named_twice_is_refused(vips: list[rtnetlink.Vip]) -> None:
    with pytest.raises(ValueError, match="VIP"):
        AddressDriver("eth0", vips, 2000, lambda: 0, print)

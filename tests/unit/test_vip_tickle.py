"""The packets that wake clients: every byte of both IP versions, and checksums that are right."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

from hypothesis import given
from hypothesis import strategies as st

from nfsha.vip.connections import Ends
from nfsha.vip.tickle import checksum, tickle

FOUR = Ends(IPv4Address("192.0.2.100"), 2049, IPv4Address("198.51.100.7"), 700)
SIX = Ends(IPv6Address("2001:db8::100"), 2049, IPv6Address("2001:db8::7"), 700)
numbers = st.integers(0, 2**32 - 1)


def test_an_ipv4_tickle_is_a_bare_acknowledgement() -> None:
    packet = tickle(FOUR, 0x01020304, 0x05060708)
    assert packet.hex() == (
        "4500" "0028" "0000" "4000" "40" "06" "0000"  # the kernel fills in what is 0
        "c0000264" "c6336407"
        "0801" "02bc" "01020304" "05060708" "50" "10" "2000" "8864" "0000"
    )  # fmt: skip


def test_an_ipv6_tickle_is_a_bare_acknowledgement() -> None:
    packet = tickle(SIX, 1, 2)
    assert packet[:8].hex() == "6000000000140640"
    assert (packet[8:24], packet[24:40]) == (SIX.vip.packed, SIX.client.packed)
    assert packet[40:53].hex() == "080102bc000000010000000250"
    assert packet[53] == 0x10
    assert len(packet) == 60


@given(numbers, numbers, st.sampled_from((FOUR, SIX)))
def test_checksums_are_right(sequence: int, acknowledged: int, ends: Ends) -> None:
    segment = tickle(ends, sequence, acknowledged)[-20:]
    pseudo = ends.vip.packed + ends.client.packed + struct.pack("!II", len(segment), 6)
    assert checksum(pseudo + segment) == 0


def test_the_checksum_of_rfc_1071() -> None:
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2 ^ 0xFFFF
    assert checksum(b"\x01") == 0x0100 ^ 0xFFFF

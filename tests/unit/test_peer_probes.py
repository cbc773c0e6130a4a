"""The packets to and from witnesses: known bytes, and no bytes that break the reading of them."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

from hypothesis import given
from hypothesis import strategies as st

from nfsha.peer import probes

MAC = bytes.fromhex("020000000001")
TOKEN = bytes(range(16))


def test_an_arp_request_is_as_rfc_826_has_it() -> None:
    asked = probes.arp_request(MAC, IPv4Address("192.0.2.1"), IPv4Address("192.0.2.254"))
    assert asked.hex() == "0001080006040001020000000001c0000201000000000000c00002fe"
    assert probes.parse_arp_reply(asked) is None


def test_an_arp_reply_is_taken_apart_with_the_padding_of_ethernet() -> None:
    reply = bytes.fromhex("00010800060400020200000000fec00002fe020000000001c0000201") + bytes(18)
    assert probes.parse_arp_reply(reply) == probes.ArpReply(
        IPv4Address("192.0.2.254"), MAC, IPv4Address("192.0.2.1")
    )


def test_the_checksum_is_that_of_rfc_1071() -> None:
    assert probes.checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0x220D  # its section 3


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.binary(min_size=16, max_size=16))
def test_an_echo_request_of_version_4_sums_up(identity: int, sequence: int, token: bytes) -> None:
    asked = probes.echo_request(4, identity, sequence, token)
    assert probes.checksum(asked) == 0


def test_echo_replies_are_read_behind_any_header() -> None:
    reply = struct.pack("!BBHHH16s", 0, 0, 0, 7, 8, TOKEN)
    for words in (5, 6, 15):
        header = bytes([0x40 | words]) + bytes(words * 4 - 1)
        found = probes.parse_echo_reply(4, header + reply, 7)
        assert found == probes.EchoReply(8, TOKEN)
        assert probes.parse_echo_reply(4, header + reply, 6) is None
    reply6 = struct.pack("!BBHHH16s", 129, 0, 0, 7, 8, TOKEN)
    assert probes.parse_echo_reply(6, reply6, 7) == probes.EchoReply(8, TOKEN)
    assert probes.parse_echo_reply(6, reply, 7) is None


def test_a_solicitation_is_as_rfc_4861_has_it() -> None:
    target = IPv6Address("2001:db8::12:3456")
    asked = probes.solicitation(MAC, target)
    assert asked.hex() == "8700000000000000" + target.packed.hex() + "0101" + MAC.hex()
    assert probes.solicited_node(target) == IPv6Address("ff02::1:ff12:3456")


def test_only_a_solicited_advertisement_speaks_for_somebody() -> None:
    target = IPv6Address("2001:db8::1")
    solicited = struct.pack("!BBHI16s", 136, 0, 0, 0x60000000, target.packed)
    assert probes.parse_advertisement(solicited + bytes(8)) == target
    unasked = struct.pack("!BBHI16s", 136, 0, 0, 0x20000000, target.packed)
    assert probes.parse_advertisement(unasked) is None


@given(st.binary(max_size=120))
def test_no_bytes_break_the_reading(noise: bytes) -> None:
    probes.parse_arp_reply(noise)
    probes.parse_advertisement(noise)
    assert probes.parse_echo_reply(4, noise, 0x10000) is None
    assert probes.parse_echo_reply(6, noise, 0x10000) is None

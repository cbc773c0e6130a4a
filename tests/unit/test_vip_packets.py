"""ARP and neighbour discovery as bytes: right by the RFCs, and nothing received can raise."""

import struct
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfsha.vip import packets

MAC = bytes.fromhex("021122334455")
OTHER_MAC = bytes.fromhex("0266778899aa")
V4 = IPv4Address("192.0.2.9")
V6 = IPv6Address("2001:db8::9")
LOCAL = IPv6Address("fe80::1")


def passes(steps: bytes, frame: bytes) -> bool:
    """Runs a socket filter as net/core/filter.c does; a load beyond the frame rejects it."""
    program = [struct.unpack_from("=HBBI", steps, at) for at in range(0, len(steps), 8)]
    widths = {0x20: 4, 0x28: 2, 0x30: 1}
    accumulator = at = 0
    while True:
        code, if_true, if_false, operand = program[at]
        if code in widths:
            if operand + widths[code] > len(frame):
                return False
            accumulator = int.from_bytes(frame[operand : operand + widths[code]], "big")
        elif code == 0x15:
            at += if_true if accumulator == operand else if_false
        else:
            assert code == 0x06
            return bool(operand)
        at += 1


def test_gratuitous_arp_bytes() -> None:
    request, reply = packets.arp_announcements(MAC, V4)
    head = "ffffffffffff" + MAC.hex() + "0806" + "0001080006040001" + MAC.hex() + "c0000209"
    assert request.hex() == head + "000000000000" + "c0000209"
    assert reply.hex() == head.replace("06040001", "06040002") + MAC.hex() + "c0000209"


def test_a_probe_names_no_sender() -> None:
    probe = packets.arp_request(MAC, IPv4Address("0.0.0.0"), V4)
    assert probe[28:32] == bytes(4)
    said = packets.heard(probe)
    assert said is not None
    assert said.address != V4


def test_what_is_announced_is_heard() -> None:
    request, reply = packets.arp_announcements(MAC, V4)
    assert packets.heard(request) == packets.Heard(V4, MAC, answer=False)
    assert packets.heard(reply) == packets.Heard(V4, MAC, answer=True)
    advertisement = packets.unsolicited_advertisement(MAC, V6)
    assert packets.heard(advertisement) == packets.Heard(V6, MAC, answer=True)


def test_neighbour_frames_go_to_their_groups() -> None:
    advertisement = packets.unsolicited_advertisement(MAC, V6)
    assert advertisement[:6].hex() == "333300000001"
    assert advertisement[58] == 0x20  # override, not solicited, no router
    question = packets.solicitation(MAC, LOCAL, V6)
    assert question[:6].hex() == "3333ff000009"
    assert question[38:54] == IPv6Address("ff02::1:ff00:9").packed
    assert packets.heard(question) is None


def test_an_advertisement_with_a_wrong_sum_or_from_afar_is_not_heard() -> None:
    good = packets.unsolicited_advertisement(MAC, V6)
    for at in (21, 56, 57, 65):  # hop limit, checksum, checksum, target
        bad = bytearray(good)
        bad[at] ^= 0x01
        assert packets.heard(bytes(bad)) is None


def test_an_advertisement_without_option_names_its_ethernet_source() -> None:
    good = packets.unsolicited_advertisement(MAC, V6)
    short = bytearray(good[:78])
    short[18:20] = struct.pack("!H", 24)
    short[56:58] = bytes(2)
    total = packets._checksum(V6.packed, IPv6Address("ff02::1").packed, bytes(short[54:]))
    short[56:58] = struct.pack("!H", total)
    assert packets.heard(bytes(short)) == packets.Heard(V6, MAC, answer=True)


@given(st.binary(max_size=200), st.sampled_from([b"", b"\x08\x06", b"\x86\xdd"]))
def test_garbage_never_raises(garbage: bytes, kind: bytes) -> None:
    packets.heard(garbage)
    packets.heard(MAC + OTHER_MAC + kind + garbage)


@given(st.integers(0, 100), st.integers(0, 99), st.integers(0, 255))
def test_a_cut_or_damaged_frame_never_raises(length: int, at: int, value: int) -> None:
    for frame in (
        *packets.arp_announcements(MAC, V4),
        packets.unsolicited_advertisement(MAC, V6),
    ):
        bad = bytearray(frame)
        bad[at % len(bad)] = value
        packets.heard(bytes(bad[:length]))


@pytest.mark.parametrize("count", [0, 1, 2, packets.FILTER_VIPS_MAX])
def test_the_arp_filter_passes_claims_and_answers_only(count: int) -> None:
    vips = [V4 + n for n in range(count)]
    steps = packets.arp_filter(vips)
    stranger = IPv4Address("198.51.100.1")
    for vip in vips:
        assert passes(steps, packets.arp_request(MAC, vip, stranger))
        assert not passes(steps, packets.arp_request(MAC, stranger, vip))
    request, reply = packets.arp_announcements(MAC, stranger)
    assert passes(steps, reply)
    assert not passes(steps, request)
    assert not passes(steps, request[:20])


def test_the_advertisement_filter_passes_nothing_else() -> None:
    steps = packets.advertisement_filter()
    assert passes(steps, packets.unsolicited_advertisement(MAC, V6))
    assert not passes(steps, packets.solicitation(MAC, LOCAL, V6))
    tcp = bytearray(packets.unsolicited_advertisement(MAC, V6))
    tcp[20] = 6
    assert not passes(steps, bytes(tcp))

"""Lists of client connections as bytes: what is no list of ours is refused, whatever it is."""

from __future__ import annotations

import struct
import zlib
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfsha.vip.connections import (
    CONNECTIONS_MAX,
    ClientList,
    ConnectionsError,
    Ends,
    Places,
    connection,
    decode,
    encode,
    ends_of,
)

V4, V6 = IPv4Address("192.0.2.100"), IPv6Address("2001:db8::100")
PLACES = Places((V4, V6), {"nfs": 2049, "mountd": 20048, "also-nfs": 2049})


def four(number: int, port: int = 700) -> bytes:
    return connection(Ends(V4, 2049, IPv4Address(f"198.51.100.{number}"), port))


ends = st.one_of(
    st.builds(
        Ends,
        st.just(V4),
        st.sampled_from((2049, 20048)),
        st.integers(0x01000000, 0x7EFFFFFF).map(IPv4Address),
        st.integers(1, 65535),
    ),
    st.builds(
        Ends,
        st.just(V6),
        st.sampled_from((2049, 20048)),
        st.integers(1 << 120, (0xFF << 120) - 1).map(IPv6Address),
        st.integers(1, 65535),
    ),
).filter(lambda one: one.client not in (V4, V6))


@given(st.lists(ends, unique=True, max_size=20), st.integers(0, 2**63), st.integers(0, 1000))
def test_every_list_comes_back_as_it_was(listed: list[Ends], period: int, more: int) -> None:
    told = ClientList(period, tuple(map(connection, listed)), len(listed) + more)
    back = decode(encode(told), PLACES)
    assert back == told
    assert [ends_of(one) for one in back.connections] == listed


def test_the_bytes_of_a_list_stay_what_they_are() -> None:
    told = ClientList(7, (four(1),), 1)
    assert zlib.decompress(encode(told)).hex() == (
        "6e666301" "0000000000000007" "00000001"  # magic and version, period, total
        "00000000000000000000ffffc0000264" "0801"  # the VIP, IPv6-mapped, port 2049
        "00000000000000000000ffffc6336401" "02bc"  # the client, port 700
    )  # fmt: skip


def test_the_longest_list_is_taken_and_one_more_is_not() -> None:
    many = tuple(four(1, port) for port in range(1, CONNECTIONS_MAX + 2))
    longest = ClientList(1, many[:-1], CONNECTIONS_MAX + 5)
    assert decode(encode(longest), PLACES) == longest
    with pytest.raises(ConnectionsError, match="longer than allowed"):
        decode(encode(ClientList(1, many, len(many))), PLACES)


@pytest.mark.parametrize(
    ("vip", "port", "client", "client_port"),
    [
        ("192.0.2.101", 2049, "198.51.100.1", 700),  # not a VIP of ours
        ("192.0.2.100", 22, "198.51.100.1", 700),  # not a port of ours
        ("192.0.2.100", 2049, "198.51.100.1", 0),
        ("192.0.2.100", 2049, "192.0.2.100", 700),  # the VIP itself
        ("192.0.2.100", 2049, "127.0.0.1", 700),
        ("192.0.2.100", 2049, "0.0.0.0", 700),
        ("192.0.2.100", 2049, "224.0.0.1", 700),
        ("192.0.2.100", 2049, "255.255.255.255", 700),
        ("192.0.2.100", 2049, "2001:db8::1", 700),  # another family
        ("2001:db8::100", 2049, "198.51.100.1", 700),
        ("2001:db8::100", 2049, "ff02::1", 700),
        ("2001:db8::100", 2049, "::", 700),
        ("2001:db8::100", 2049, "::1", 700),
        ("2001:db8::100", 2049, "2001:db8::100", 700),
    ],
)
def test_a_list_with_one_that_cannot_be_is_refused(
    vip: str, port: int, client: str, client_port: int
) -> None:
    wrong = connection(Ends(ip_address(vip), port, ip_address(client), client_port))
    with pytest.raises(ConnectionsError, match=r"no client of|not served by this pair"):
        decode(encode(ClientList(1, (four(1), wrong), 2)), PLACES)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"nfc\x01",
        struct.pack("!4sQI", b"nfc\x02", 1, 0),
        struct.pack("!4sQI", b"nfc\x01", 1, 1) + four(1)[:-1],
        struct.pack("!4sQI", b"nfc\x01", 1, 0) + four(1),  # more than it counts
        struct.pack("!4sQI", b"nfc\x01", 1, 2) + four(1) * 2,  # twice the same
    ],
)
def test_bytes_of_another_shape_are_refused(text: bytes) -> None:
    with pytest.raises(ConnectionsError):
        decode(zlib.compress(text), PLACES)


def test_what_is_torn_doubled_or_no_zlib_is_refused() -> None:
    data = encode(ClientList(1, (four(1), four(2)), 2))
    for bad in (data[:-1], data + b"x", b"garbage", zlib.compress(bytes(1 << 24))):
        with pytest.raises(ConnectionsError):
            decode(bad, PLACES)


@given(st.binary(max_size=300))
def test_any_bytes_end_in_a_list_or_a_refusal(noise: bytes) -> None:
    head = struct.pack("!4sQI", b"nfc\x01", 1, 10)
    for text in (noise, head + noise):
        try:
            told = decode(zlib.compress(text), PLACES)
        except ConnectionsError:
            continue
        assert all(PLACES.has(one) and PLACES.has_client(one) for one in told.connections)

"""Client connections as values: which client, from which port, at which VIP and port.

Pure: opens no socket, reads no clock, decides nothing. A connection is 36 bytes and stays so on its
way from the kernel of one node to the tickles of the other: the server's address and port, then the
client's, ports in network byte order, IPv4 addresses in their IPv6-mapped form (RFC 4291 section
2.5.5.2), as a server has them that listens for both families on one socket. Ten thousand objects
would take 40 ms to make, and to nobody's use.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

from nfsha.vip.rtnetlink import Vip

CONNECTIONS_MAX: Final = 4096
"""Most connections that one node tells the other: the newest."""

CONNECTION_BYTES: Final = 36
_END_BYTES: Final = 18
_ADDRESS_BYTES: Final = 16
MAPPED: Final = bytes(10) + b"\xff\xff"
"""What an IPv4 address begins with, written as an IPv6 one."""

_HEAD: Final = struct.Struct("!4sQI")  # magic with version, period, connections in all
_MAGIC: Final = b"nfc\x01"
_LIST_BYTES_MAX: Final = _HEAD.size + CONNECTIONS_MAX * CONNECTION_BYTES


class ConnectionsError(ValueError):
    """Bytes of the other node that are no list of connections to the VIPs; the text says why."""


class Ends(NamedTuple):
    """Both ends of a connection, for people and for packets."""

    vip: Vip
    port: int
    client: Vip
    client_port: int


@dataclass(frozen=True, slots=True)
class ClientList:
    """The connections of one period of serving, oldest first.

    `period` is when the period began, in ms of its node's boot clock: two lists of one node differ
    at least there. `total` counts those that found no place in the list, too.
    """

    period: int
    connections: tuple[bytes, ...] = ()
    total: int = 0


@dataclass(frozen=True, slots=True)
class Places:
    """Where clients are served: all VIPs, each at all ports."""

    vips: Sequence[Vip]
    ports: Mapping[str, int]
    ends: frozenset[bytes] = field(init=False)
    """The first half of every connection that can be."""
    own: frozenset[bytes] = field(init=False)
    """The addresses that no client has."""

    def __post_init__(self) -> None:
        ends = (server_end(vip, port) for vip in self.vips for port in self.ports.values())
        object.__setattr__(self, "ends", frozenset(ends))
        object.__setattr__(self, "own", frozenset(mapped(vip) for vip in self.vips))

    def has(self, connection: bytes) -> bool:
        """Does it end at one of the places?"""
        return connection[:_END_BYTES] in self.ends

    def has_client(self, connection: bytes) -> bool:
        """Is its other end an ordinary address of the VIP's family, no VIP, with a port?

        A tickle to anything else would go to a crowd, to this machine, or to nobody.
        """
        client, port = connection[_END_BYTES:-2], connection[-2:]
        if port == b"\0\0" or client in self.own:
            return False
        is_ipv4 = client.startswith(MAPPED)
        if is_ipv4 != connection.startswith(MAPPED):
            return False
        first = client[len(MAPPED)] if is_ipv4 else client[0]
        if is_ipv4:  # "this network", loopback, and multicast and all above it (RFC 6890)
            return 0 < first < 224 and first != 127
        return first != 0xFF and any(client[:-1])  # multicast; unspecified and loopback


def mapped(address: Vip) -> bytes:
    """The 16 bytes of an address, IPv4 in its mapped form."""
    return MAPPED + address.packed if isinstance(address, IPv4Address) else address.packed


def server_end(vip: Vip, port: int) -> bytes:
    """The half of a connection that is the server's."""
    return mapped(vip) + port.to_bytes(2, "big")


def connection(ends: Ends) -> bytes:
    """A connection from its ends."""
    return server_end(ends.vip, ends.port) + server_end(ends.client, ends.client_port)


def ends_of(one: bytes) -> Ends:
    """The ends of a connection."""
    return Ends(*_end(one[:_END_BYTES]), *_end(one[_END_BYTES:]))


def _end(half: bytes) -> tuple[Vip, int]:
    return _address(half[:_ADDRESS_BYTES]), int.from_bytes(half[_ADDRESS_BYTES:], "big")


def _address(packed: bytes) -> Vip:
    if packed.startswith(MAPPED):
        return IPv4Address(packed[len(MAPPED) :])
    return IPv6Address(packed)


def encode(told: ClientList) -> bytes:
    """The bytes that `decode` takes. For a thread: 1 to 2 ms for the longest list."""
    body = b"".join(told.connections)
    return zlib.compress(_HEAD.pack(_MAGIC, told.period, told.total) + body, level=1)


def decode(data: bytes, places: Places) -> ClientList:
    """Reads the other node's list. Raises ConnectionsError for all that cannot be one.

    Every connection must end at a VIP and port of this node's own configuration, or it would be
    asked to send packets in any name. For a thread: up to 20 ms for the longest list.
    """
    text = _inflate(data)
    if len(text) < _HEAD.size:
        raise ConnectionsError(f"{len(text)} bytes are no list of connections")
    magic, period, total = _HEAD.unpack_from(text)
    if magic != _MAGIC:
        raise ConnectionsError("it does not begin as a list of connections")
    found = tuple(_cut(text[_HEAD.size :]))
    if total < len(found) or len(set(found)) != len(found):
        raise ConnectionsError(f"{len(found)} connections, some of them twice or not counted")
    for one in {one[:_END_BYTES] for one in found} - places.ends:
        vip, port = _end(one)
        raise ConnectionsError(f"{vip} port {port} is not served by this pair")
    for one in found:
        if not places.has_client(one):
            vip, _, client, port = ends_of(one)
            raise ConnectionsError(f"{client} port {port} is no client of {vip}")
    return ClientList(period, found, total)


def _inflate(data: bytes) -> bytes:
    inflating = zlib.decompressobj()
    try:
        text = inflating.decompress(data, _LIST_BYTES_MAX)
    except zlib.error as error:
        raise ConnectionsError(f"the list of connections cannot be read: {error}") from error
    if not inflating.eof or inflating.unused_data:
        raise ConnectionsError("the list of connections is torn, or longer than allowed")
    return text


def _cut(body: bytes) -> Iterator[bytes]:
    if len(body) % CONNECTION_BYTES:
        raise ConnectionsError(f"{len(body)} bytes are no whole number of connections")
    for start in range(0, len(body), CONNECTION_BYTES):
        yield body[start : start + CONNECTION_BYTES]

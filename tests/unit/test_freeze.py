"""The freeze without a kernel: what may be asked for, and what it says when it cannot be."""

import asyncio
import ctypes
import errno
import os
import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest

from nfsha.vip import iptables, nfnetlink, nftables
from nfsha.vip.freeze import (
    DEFAULT_PORTS,
    Firewall,
    FirewallError,
    Guarded,
    choose,
)
from nfsha.vip.iptables import IptablesLease
from nfsha.vip.nftables import NftablesLease, ruleset
from nfsha.vip.rtnetlink import Vip

VIP = IPv4Address("10.0.0.1")
GUARDED = Guarded([VIP, IPv6Address("fd00::1")], [IPv4Address("10.0.0.9")], DEFAULT_PORTS)


def no_clock_ms() -> int:
    raise AssertionError("no reason to look at the clock")


@pytest.mark.parametrize(
    ("vips", "peers", "ports", "words"),
    [
        ([], [], {"nfs": 2049}, "0 VIPs"),
        ([str(VIP + i) for i in range(65)], [], {"nfs": 2049}, "65 VIPs"),
        (["10.0.0.1"], ["10.0.0.1"], {"nfs": 2049}, "both a VIP and an address of the peer"),
        (["10.0.0.1"], [str(VIP + i) for i in range(1, 66)], {"nfs": 2049}, "65 addresses"),
        (["10.0.0.1"], [], {}, "0 ports"),
        (["10.0.0.1"], [], {f"p{port}": port for port in range(1, 34)}, "33 ports"),
        (["10.0.0.1"], [], {"nfs": 0}, "port 0 of nfs"),
        (["10.0.0.1"], [], {"nfs": 65536}, "port 65536 of nfs"),
        (["10.0.0.1"], [], {'nfs"; drop': 2049}, "no name for a service"),
        (["10.0.0.1"], [], {"": 2049}, "no name for a service"),
    ],
)
def test_what_cannot_be_guarded_is_refused(
    vips: Sequence[str], peers: Sequence[str], ports: dict[str, int], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Guarded([IPv4Address(one) for one in vips], [IPv4Address(one) for one in peers], ports)


def test_two_services_may_share_a_port() -> None:
    guarded = Guarded([VIP], [], {"statd": 4000, "lockd": 4000, "nfs": 2049})
    assert guarded.port_names() == {2049: "nfs", 4000: "lockd statd"}
    assert 'elements = { 2049 comment "nfs", 4000 comment "lockd statd" }' in ruleset(guarded, "t")


def test_the_ruleset_names_each_address_once_and_no_interface() -> None:
    peers: list[Vip] = [
        IPv6Address("fe80::1%eth0"),
        IPv6Address("fe80::1%eth1"),
        IPv4Address("10.0.0.9"),
    ]
    text = ruleset(Guarded([VIP, VIP], peers, DEFAULT_PORTS), "t")
    assert "set vips4 { type ipv4_addr; flags constant; elements = { 10.0.0.1 }; }" in text
    assert "set peers6 { type ipv6_addr; flags constant; elements = { fe80::1 }; }" in text
    assert "set vips6 { type ipv6_addr; flags constant;  }" in text


def test_a_batch_asks_for_one_acknowledgement_at_its_last_change() -> None:
    changes = [nfnetlink.flush_set("t", "s"), nfnetlink.add_elements("t", "s", [VIP.packed])]
    framed = list(nfnetlink.messages(nfnetlink.batch(changes)))
    assert [message.kind & 0xFF for message in framed] == [0x10, 14, 12, 0x11]
    assert [bool(message.flags & 4) for message in framed] == [False, False, True, False]
    assert nfnetlink.batch(changes).count(nfnetlink.TIMEOUT_MARK) == 1


def test_without_the_library_it_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(FirewallError, match=r"install the package libnftables1 \(Debian"):
        NftablesLease(GUARDED, no_clock_ms)


class NoNfnetlink(socket.socket):
    """Fails as on a kernel without CONFIG_NETFILTER_NETLINK (netlink(7))."""

    def __init__(self, family: int = -1, *arguments: Any, **named: Any) -> None:
        if family == socket.AF_NETLINK:
            raise OSError(errno.EPROTONOSUPPORT, os.strerror(errno.EPROTONOSUPPORT))
        super().__init__(family, *arguments, **named)


def test_without_nfnetlink_it_names_the_other_firewall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", NoNfnetlink)
    with pytest.raises(FirewallError, match="no nfnetlink: set the firewall to iptables"):
        NftablesLease(GUARDED, no_clock_ms)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_without_nf_tables_it_names_the_other_firewall(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(_: nfnetlink.Nfnetlink, prepared: bytes) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(nfnetlink.Nfnetlink, "change", refuse)
    lease = NftablesLease(GUARDED, no_clock_ms)
    try:
        with pytest.raises(FirewallError, match="no nf_tables: load it, or set the firewall"):
            asyncio.run(lease.check())
    finally:
        lease.shut()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"Error: Could not process rule: Operation not supported\nx\n^\n", "lacks a part of"),
        (b"Error: Could not process rule: No such file or directory\nx\n", "set the firewall to"),
        (b"Error: Could not process rule: Operation not permitted\nx\n", "CAP_NET_ADMIN"),
        (b"<cmdline>:1:2-3: Error: syntax error, unexpected x\nx\n", r"\(syntax error, unexp"),
        (b"", "no reason given"),
    ],
)
def test_a_complaint_of_the_library_is_one_sentence_with_a_remedy(said: bytes, words: str) -> None:
    with pytest.raises(FirewallError, match=words) as caught:
        raise FirewallError(nftables._complaint(said))
    assert "\n" not in str(caught.value)


def test_without_the_programs_it_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iptables, "_PATH", "/nowhere")
    with pytest.raises(FirewallError, match=r"install the package iptables \(Debian"):
        IptablesLease(GUARDED, no_clock_ms)


class _Lease:
    """Stands for a backend whose check ends as told."""

    def __init__(self, complaint: str = "") -> None:
        self._complaint = complaint
        self.is_shut = False

    async def check(self) -> None:
        if self._complaint:
            raise FirewallError(self._complaint)

    def shut(self) -> None:
        self.is_shut = True


def chosen(
    monkeypatch: pytest.MonkeyPatch, firewall: Firewall, nft: _Lease, legacy: _Lease
) -> object:
    monkeypatch.setattr("nfsha.vip.freeze.NftablesLease", lambda *_: nft)
    monkeypatch.setattr("nfsha.vip.freeze.IptablesLease", lambda *_: legacy)
    return asyncio.run(choose(firewall, GUARDED, no_clock_ms))


def test_the_named_backend_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    nft, legacy = _Lease(), _Lease()
    assert chosen(monkeypatch, Firewall.NFTABLES, nft, legacy) is nft
    assert chosen(monkeypatch, Firewall.IPTABLES, nft, legacy) is legacy
    assert not nft.is_shut


def test_one_that_the_host_cannot_carry_is_refused_and_shut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nft, legacy = _Lease("no nftables here"), _Lease()
    with pytest.raises(FirewallError, match="no nftables here"):
        chosen(monkeypatch, Firewall.NFTABLES, nft, legacy)
    assert nft.is_shut


def test_a_program_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iptables, "_CHILD_MAX_S", 0.1)

    async def body() -> None:
        lease = IptablesLease(Guarded([VIP], [], DEFAULT_PORTS), no_clock_ms)
        try:
            with pytest.raises(FirewallError, match="did not end within"):
                await lease._families[0]._run("/bin/sleep", "60")
        finally:
            lease.shut()

    asyncio.run(body())

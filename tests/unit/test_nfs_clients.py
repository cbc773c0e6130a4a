"""Clients that a move would harm: the kernel's list of v4 clients, and connections past the VIP.

The list is made of files here: it exists only where the kernel's own server runs.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from nfsha.nfs.clients import (
    ServerFiles,
    Stray,
    V4Client,
    V4ClientFacts,
    established,
    parse_info,
    plain_address,
    read_v4_clients,
    stray_objections,
    strays,
    v4_objections,
)
from nfsha.nfs.v3_fence import Answers, FenceFacts, Version4

# Two clients as Linux 6.12 shows them (fs/nfsd/nfs4state.c, client_info_show).
CONFIRMED = b"""clientid: 0x6d077c99675df2b3
address: "10.87.29.32:864"
status: confirmed
seconds from last renew: 0
name: "Linux NFSv4.2 web.example"
minor version: 2
Implementation domain: "kernel.org"
Implementation name: "Linux 4.18.0 #1 SMP x86_64"
Implementation time: [0, 0]
callback state: UP
callback address: 10.87.29.32:0
admin-revoked states: 0
"""
COURTESY = CONFIRMED.replace(b"status: confirmed", b"status: courtesy").replace(b".32", b".33")


REFUSED = Answers("answered", Version4.REFUSED, "version not supported", "answered")
FENCE = FenceFacts("127.0.0.1", REFUSED, None, None, "connection refused")
SPOKEN = replace(FENCE, tcp=replace(REFUSED, version4=Version4.SPOKEN, said4="answered"))


@pytest.fixture
def files(tmp_path: Path) -> ServerFiles:
    """The kernel's server with eight threads and an empty list, and no configuration of ganesha."""
    (tmp_path / "threads").write_text("8\n")
    (tmp_path / "clients").mkdir()
    (tmp_path / "v4_end_grace").write_text("Y\n")
    return ServerFiles(
        tmp_path / "threads",
        tmp_path / "clients",
        tmp_path / "v4_end_grace",
        tmp_path / "ganesha.conf",
    )


def add(files: ServerFiles, number: int, info: bytes) -> None:
    (files.knfsd_clients / str(number)).mkdir()
    (files.knfsd_clients / str(number) / "info").write_bytes(info)


def test_an_empty_list_is_enough_even_where_v4_is_spoken(files: ServerFiles) -> None:
    facts = read_v4_clients(files)
    assert facts == V4ClientFacts(listed=True)
    assert v4_objections(facts, SPOKEN) == ()


def test_while_the_server_waits_for_its_clients_an_empty_list_says_nothing(
    files: ServerFiles,
) -> None:
    files.knfsd_grace_ended.write_text("N\n")
    facts = read_v4_clients(files)
    assert facts == V4ClientFacts(listed=True, recovering=True)
    (objection,) = v4_objections(facts, SPOKEN)
    assert "v4_end_grace" in objection.remedy
    assert v4_objections(facts, FENCE) == ()  # where v4 is refused none can come back
    files.knfsd_grace_ended.write_text("Y\n")
    assert v4_objections(read_v4_clients(files), SPOKEN) == ()


def test_who_is_back_is_named_although_others_may_still_come(files: ServerFiles) -> None:
    files.knfsd_grace_ended.write_text("N\n")
    add(files, 3, CONFIRMED)
    (objection,) = v4_objections(read_v4_clients(files), SPOKEN)
    assert "web.example" in objection.here


def test_a_grace_period_that_cannot_be_read_is_no_proof(files: ServerFiles) -> None:
    files.knfsd_grace_ended.unlink()
    files.knfsd_grace_ended.mkdir()
    assert "Is a directory" in v4_objections(read_v4_clients(files), FENCE)[0].here


def test_every_client_counts_whatever_its_status(files: ServerFiles) -> None:
    add(files, 3, CONFIRMED)
    add(files, 12, COURTESY)
    facts = read_v4_clients(files)
    assert facts.count == 2
    assert set(facts.clients) == {
        V4Client("10.87.29.32:864", "Linux NFSv4.2 web.example", "confirmed"),
        V4Client("10.87.29.33:864", "Linux NFSv4.2 web.example", "courtesy"),
    }
    (objection,) = v4_objections(facts, FENCE)
    assert "10.87.29.33:864 (Linux NFSv4.2 web.example, courtesy)" in objection.here
    assert "vers=3" in objection.remedy


def test_a_client_that_left_meanwhile_is_none(files: ServerFiles) -> None:
    (files.knfsd_clients / "4").mkdir()
    assert read_v4_clients(files).count == 0


def test_of_many_clients_the_first_twenty_are_named(files: ServerFiles) -> None:
    for number in range(25):
        add(files, number, CONFIRMED)
    facts = read_v4_clients(files)
    assert (facts.count, len(facts.clients)) == (25, 20)
    assert v4_objections(facts, FENCE)[0].here.endswith(" and 5 more")


def test_a_list_that_cannot_be_read_is_no_proof(files: ServerFiles) -> None:
    (files.knfsd_clients / "5" / "info").mkdir(parents=True)
    facts = read_v4_clients(files)
    assert "Is a directory" in facts.trouble
    assert "Is a directory" in v4_objections(facts, FENCE)[0].here


def test_without_a_list_the_refusal_of_v4_decides(files: ServerFiles) -> None:
    files.knfsd_clients.rmdir()  # Linux before 5.3
    old_kernel = read_v4_clients(files)
    assert old_kernel == V4ClientFacts(listed=False)
    assert v4_objections(old_kernel, FENCE) == ()
    (objection,) = v4_objections(old_kernel, SPOKEN)
    assert objection.here == "no list of them, and to version 4 the server said: answered"


def test_the_list_of_a_kernel_that_does_not_serve_says_nothing(files: ServerFiles) -> None:
    files.knfsd_threads.write_text("0\n")
    files.ganesha_conf.write_text("NFS_CORE_PARAM { Protocols = 3; }")
    facts = read_v4_clients(files)
    assert facts == V4ClientFacts(listed=False)
    assert v4_objections(facts, FENCE) == ()
    assert v4_objections(facts, SPOKEN) != ()


@pytest.mark.parametrize(
    "text", ["", "NFS_CORE_PARAM { Protocols = 3, NFSv4; }", "NFS_Core_Param { NFS_Port = 2049; }"]
)
def test_a_configuration_that_brings_v4_back_is_told(files: ServerFiles, text: str) -> None:
    files.knfsd_threads.unlink()
    files.ganesha_conf.write_text(text)
    (objection,) = v4_objections(read_v4_clients(files), FENCE)
    assert objection.here == f"{files.ganesha_conf} does not say Protocols = 3"


def test_a_configuration_that_cannot_be_read_is_told(files: ServerFiles) -> None:
    files.knfsd_threads.unlink()
    files.ganesha_conf.write_text("NFS_CORE_PARAM {")
    (objection,) = v4_objections(read_v4_clients(files), FENCE)
    assert objection.here == "it ends within a block"


def test_torn_info_is_a_client_all_the_same() -> None:
    assert parse_info(b"clientid: 0x1\naddr") == V4Client("unknown", "unknown", "unknown")
    name = b'address: "[::1]:5"\nname: "a \\"quoted\\": name"\nstatus: confirmed\n'
    assert parse_info(name) == V4Client("[::1]:5", 'a \\"quoted\\": name', "confirmed")


# --- past the VIP

VIPS = [ip_address("10.77.0.100"), ip_address("fd77::100")]
OWN = [ip_address("10.77.0.1"), ip_address("10.77.0.2"), ip_address("fd77::1")]
PORTS = [111, 2049, 20048]
CLIENT = ("10.77.0.10", 900)


@pytest.mark.parametrize(
    ("local", "remote"),
    [
        (("10.77.0.100", 2049), CLIENT),
        (("::ffff:10.77.0.100", 2049), ("::ffff:10.77.0.10", 900)),
        (("fd77::100", 2049), ("fd77::10", 900)),
        (("10.77.0.1", 22), CLIENT),
        (("127.0.0.1", 2049), ("127.0.0.1", 900)),
        (("::ffff:127.0.0.1", 2049), ("::ffff:127.0.0.1", 900)),
        (("10.77.0.1", 2049), ("10.77.0.1", 900)),
        (("10.77.0.1", 2049), ("10.77.0.2", 900)),
    ],
)
def test_who_is_where_it_should_be(local: tuple[str, int], remote: tuple[str, int]) -> None:
    assert strays([(local, remote)], vips=VIPS, own=OWN, ports=PORTS) == ()


def test_clients_past_the_vip_are_found_once_each() -> None:
    connections = [
        (("10.77.0.1", 2049), CLIENT),
        (("::ffff:10.77.0.1", 2049), ("::ffff:10.77.0.10", 901)),
        (("fd77::1%eth0", 2049), ("fd77::10", 900)),
        (("10.77.0.100", 2049), CLIENT),
    ]
    found = strays(connections, vips=VIPS, own=OWN, ports=PORTS)
    assert found == (
        Stray("10.77.0.10", "10.77.0.1", 2049),
        Stray("fd77::10", "fd77::1", 2049),
    )
    (objection,) = stray_objections(found, VIPS)
    assert objection.here == "10.77.0.10 at 10.77.0.1:2049, fd77::10 at fd77::1:2049"
    assert "through 10.77.0.100 or fd77::100" in objection.remedy
    assert stray_objections((), VIPS) == ()


def test_the_tables_of_the_kernel_are_read() -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
        ends = [socket.create_connection((to, port)) for to in ("127.0.0.1", "::1")]
        served = [server.accept()[0] for _ in ends]
        clients = [end.getsockname()[1] for end in ends]
        found = established([port])
        for end in (*ends, *served):
            end.close()
    assert sorted(found) == sorted(
        [
            (("::1", port), ("::1", clients[1])),
            (("::ffff:7f00:1", port), ("::ffff:7f00:1", clients[0])),
        ]
    )


def test_many_strays_are_counted() -> None:
    many = [Stray(f"10.1.0.{number}", "10.77.0.1", 2049) for number in range(30)]
    assert stray_objections(many, VIPS)[0].here.endswith(" and 10 more")


def test_what_is_no_address_is_refused() -> None:
    assert plain_address("::ffff:1.2.3.4") == ip_address("1.2.3.4")
    with pytest.raises(ValueError, match="nonsense"):
        plain_address("nonsense")

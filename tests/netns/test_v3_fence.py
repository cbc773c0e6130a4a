"""The proof that clients stay on NFS v3, against real servers on the configuration that we ship."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nfsha.nfs import v3_fence
from nfsha.nfs.v3_fence import FenceFacts, Version4
from tests.netns.lab import Lab
from tests.netns.labkit.network import VIP
from tests.netns.labkit.nfs_server import NfsServer, make_disks
from tests.netns.labkit.place import REPOSITORY, Place
from tests.netns.labkit.storage_node import StorageNode
from tests.netns.namespaces import inside
from tests.netns.pair import Pair

PORTS = {"rpcbind": 111, "nfs": 2049, "mountd": 20048, "statd": 20049, "lockd": 20050}
OUTGOING_PORT = 20051
TCP = ((100003, 3, "tcp", 2049), (100005, 3, "tcp", 20048))
UDP = ((100003, 3, "udp", 2049), (100005, 3, "udp", 20048))
OWN = "10.9.9.1"
EXPORT = """
EXPORT { Export_Id = 1; Path = /nfs/volume; Pseudo = /nfs/volume; Access_Type = RW; Squash = none;
    SecType = sys; FSAL { Name = VFS; } }
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """One storage server with one volume; nothing runs there yet."""
    disks = make_disks(tmp_path, ("server",), ("volume",), size_mib=16)
    made = Place("server", f"fence-{os.getpid()}", tmp_path / "server", disks["server"])
    try:
        made.make_namespace().ip("addr", "add", f"{OWN}/32", "dev", "lo")
        made.boot()
        yield made
    finally:
        made.remove()


@pytest.fixture
def server(place: Place) -> NfsServer:
    return NfsServer(place, ["/nfs/volume"])


def prove(place: Place, address: str = "127.0.0.1", *, timeout_ms: int = 5000) -> FenceFacts:
    with inside(place.namespace):
        facts = asyncio.run(v3_fence.prove(address, PORTS, timeout_ms=timeout_ms))
    assert v3_fence.from_json(json.loads(json.dumps(v3_fence.as_json(facts)))) == facts
    return facts


def listed(facts: FenceFacts) -> set[tuple[int, int, str, int]]:
    return {(e.program, e.version, e.transport, e.port) for e in facts.registered or ()}


def listening(place: Place, transport: str) -> set[int]:
    """The ports on which others than this host itself can reach something."""
    lines = place.run("ss", "-Hln", transport).stdout.splitlines()
    found = [line.split()[3].rpartition(":") for line in lines]
    return {int(port) for address, _, port in found if address != "127.0.0.1"}


def await_listed(place: Place, *wanted: tuple[int, int, str, int]) -> None:
    """Waits for entries of rpcbind: ganesha registers a moment after it answers."""
    _await(lambda: listed(prove(place)) >= set(wanted))


def objections(facts: FenceFacts) -> list[str]:
    return [str(one) for one in v3_fence.objections(facts, PORTS)]


def ship(place: Place, name: str) -> None:
    """Puts a file that we ship where its own first lines say."""
    target = place.path(f"/etc/{name}")
    target.parent.mkdir(exist_ok=True)
    target.write_text((REPOSITORY / "etc" / name).read_text(encoding="utf-8"))


def test_what_we_ship_is_v3_only_on_fixed_ports(place: Place, server: NfsServer) -> None:
    server.start()  # rpcbind, and whatever else the lab needs before a server
    server.stop()
    ship(place, "nfs.conf.d/nfsha.conf")
    ship(place, "ganesha/nfsha.conf")
    conf = '%include "/etc/ganesha/nfsha.conf"\n' + EXPORT
    place.path("/etc/ganesha/ganesha.conf").write_text(conf)
    statd = place.spawn(["rpc.statd", "-F", "-d", "-L"], name="statd")
    await_listed(place, (100024, 1, "tcp", 20049), (100024, 1, "udp", 20049))
    ganesha = place.spawn(["ganesha.nfsd", "-F", "-L", place.logs / "ganesha.log"], name="shipped")
    _await(server.answers)
    await_listed(
        place,
        (100000, 2, "tcp", 111),
        (100003, 3, "tcp", 2049),
        (100005, 3, "tcp", 20048),
        (100021, 4, "tcp", 20050),
    )
    facts = prove(place)
    for address in (OWN, "::1"):
        assert replace(prove(place, address), address=facts.address) == facts
    assert objections(facts) == []
    assert facts.tcp.version4 is Version4.REFUSED
    assert facts.tcp.said4 == "version not supported (the server has 3 to 3)"
    assert facts.udp is None
    assert listening(place, "-t") == set(PORTS.values())
    assert listening(place, "-u") == {PORTS["rpcbind"], PORTS["statd"]}
    assert statd.alive
    assert ganesha.alive


def test_the_kernels_programs_read_the_file_that_we_ship(place: Place) -> None:
    ship(place, "nfs.conf.d/nfsha.conf")
    sections = _sections(place.run("nfsconf", "--dump").stdout)
    assert sections["nfsd"] == {
        "port": "2049", "vers3": "y", "vers4": "n", "tcp": "y", "udp": "n"
    }  # fmt: skip
    assert sections["mountd"]["port"] == str(PORTS["mountd"])
    assert sections["statd"] == {"port": str(PORTS["statd"]), "outgoing-port": str(OUTGOING_PORT)}
    assert sections["lockd"] == {"port": str(PORTS["lockd"]), "udp-port": str(PORTS["lockd"])}

    monitored = place.path("/var/lib/nfs/sm/192.0.2.7")  # a client that held locks, and is away
    monitored.write_text(f"0100007f 000186b5 00000003 00000010 {'0' * 32} 192.0.2.7 server\n")
    place.spawn(["sm-notify", "-f", "-d"], name="sm-notify")
    _await(lambda: f":{OUTGOING_PORT} " in place.run("ss", "-Huan").stdout)


def _sections(dump: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    section: dict[str, str] = {}
    for line in dump.splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), {})
        elif "=" in line:
            key, _, value = line.partition("=")
            section[key.strip()] = value.strip()
    return found


def test_v4_that_is_switched_on_is_told(place: Place, server: NfsServer) -> None:
    server.start("3,4")
    await_listed(place, (100003, 4, "tcp", 2049), *TCP)
    facts = prove(place)
    assert facts.tcp.version4 is Version4.SPOKEN
    assert [line.partition(";")[0] for line in objections(facts)] == [
        "NFS v4 over TCP at 127.0.0.1: it is spoken",
        "NFS v4: it is in the list of rpcbind",
    ]


def test_udp_is_proved_as_tcp_is_where_it_is_served(place: Place, server: NfsServer) -> None:
    server.start()
    await_listed(place, *TCP)
    without = prove(place)
    server.stop()
    server.udp = True
    server.start()
    await_listed(place, *TCP, *UDP)
    facts = prove(place)
    assert facts.udp == facts.tcp
    assert facts.udp is not None
    assert facts.udp.version4 is Version4.REFUSED
    assert objections(facts) == []
    assert [one.what for one in v3_fence.differences(without, facts)] == [
        "NFS over UDP",
        "nfs in the list of rpcbind",
        "mountd in the list of rpcbind",
    ]


def test_silence_refusal_and_an_answer_are_told_apart(place: Place, server: NfsServer) -> None:
    nothing = prove(place)
    assert nothing.tcp.nfs3 == nothing.tcp.said4 == nothing.rpcbind == "connection refused"
    assert nothing.tcp.version4 is Version4.UNPROVED
    assert len(objections(nothing)) == 2  # nfs and mountd
    server.start()
    assert server.ganesha is not None
    server.ganesha.freeze()
    silent = prove(place, timeout_ms=300)
    server.ganesha.thaw()
    assert silent.tcp.said4 == "no answer in time"
    assert silent.tcp.version4 is Version4.UNPROVED
    assert objections(silent)[0].startswith("NFS v3 over TCP at 127.0.0.1: no answer in time; ")
    assert objections(prove(place)) == []


def test_a_node_proves_its_service_where_clients_are_shut_out(lab: Lab) -> None:
    Pair(lab).settle()

    def proved(node: StorageNode, address: str) -> FenceFacts:
        facts = node.inside(lambda: asyncio.run(v3_fence.prove(address, PORTS, timeout_ms=5000)))
        assert objections(facts) == []
        return facts

    giver = proved(lab.a, VIP)
    for address in ("127.0.0.1", lab.b.addresses.lan.ipv4):
        assert v3_fence.differences(giver, proved(lab.b, address)) == ()
    shut_out = lab.c.inside(
        lambda: asyncio.run(v3_fence.prove(lab.b.addresses.lan.ipv4, PORTS, timeout_ms=300))
    )
    assert shut_out.tcp.said4 == shut_out.rpcbind == "no connection in time"
    assert shut_out.tcp.version4 is Version4.UNPROVED


def _await(ready: Callable[[], bool], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)

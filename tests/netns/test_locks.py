"""Clients that hold locks are told of a move: real daemons, rpcbind and rpc.statd on both sides."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from nfsha.nfs import statd
from nfsha.nfs.names import Resolver
from nfsha.nfs.nsm import OUTGOING_PORT, Teller
from nfsha.nfs.rpc import RpcResult
from tests.netns.copies import SYNC, Copies
from tests.netns.lab import Lab
from tests.netns.labkit import nsm
from tests.netns.labkit.network import PLACES, VIP
from tests.netns.labkit.nfs_server import NfsServer, ganesha_config, make_disks
from tests.netns.labkit.nsm import CALLBACK, LOCKS, STATUS, Told, calls, listen, watch
from tests.netns.labkit.place import Place, Process
from tests.netns.labkit.udp_client import UdpMount
from tests.netns.namespaces import inside

pytestmark = pytest.mark.timeout(120)

STATD_PORT = 20049
NAME = "nfs.example"
NOBODY = "10.77.0.99"
C, W = (PLACES[name].lan.ipv4 for name in ("c", "w"))
NOTIFY = 6


def wait(done: Callable[[], bool], what: str, within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def start_rpcbind(place: Place) -> Process:
    rpcbind = place.spawn(["rpcbind", "-w", "-f", "-s"], name="rpcbind")
    wait(lambda: place.path("/run/rpcbind.sock").exists(), "rpcbind")
    return rpcbind


def start_statd(place: Place, port: int = STATD_PORT) -> Process:
    daemon = place.spawn(["rpc.statd", "-F", "-d", "-L", "-p", str(port)], name="statd")
    wait(lambda: f" {port}" in place.run("rpcinfo", "-p").stdout, "statd in the list of rpcbind")
    return daemon


# ------------------------------------------------------------------ against the real programs


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place("client", f"locks-{os.getpid()}", tmp_path / "client")
    try:
        made.make_namespace().ip("addr", "add", f"{VIP}/32", "dev", "lo")
        made.boot()
        yield made
    finally:
        made.remove()


def tell(place: Place, vip: str, client: str) -> RpcResult:
    async def told() -> RpcResult:
        teller = await Teller.open(ip_address(vip), lambda: True)
        try:
            return await teller.tell(ip_address(client), vip, 7)
        finally:
            teller.close()
            await asyncio.sleep(0)

    with inside(place.namespace):
        return asyncio.run(told())


def test_real_rpcbind_and_statd_understand_it_over_both_families(place: Place) -> None:
    assert str(tell(place, VIP, "127.0.0.1")) == "no answer in time"
    start_rpcbind(place)
    unregistered = str(tell(place, VIP, "127.0.0.1"))
    assert unregistered.endswith("no statd is registered with rpcbind there")
    daemon = start_statd(place)
    for vip, client in ((VIP, "127.0.0.1"), ("::1", "::1")):
        assert str(tell(place, vip, client)) == "answered"
        wait(lambda vip=vip: f"SM_NOTIFY from {vip} " in daemon.output(), "the word of statd")  # type: ignore[misc]


def test_ganesha_has_statd_keep_the_list_and_gives_no_lock_back_after_its_grace(
    tmp_path: Path,
) -> None:
    """What docs/nfs.md and docs/limits.md rest on."""
    disks = make_disks(tmp_path, ("server",), ("volume",), size_mib=16)
    place = Place("server", f"locks-{os.getpid()}", tmp_path / "server", disks["server"])
    try:
        place.make_namespace()
        place.boot()
        server = NfsServer(place, ["/nfs/volume"])
        server.rpcbind = start_rpcbind(place)
        start_statd(place)
        config = ganesha_config(["/nfs/volume"], "3", udp=True)
        config = config.replace("Enable_NLM = false;", "Enable_NLM = true;")
        config = config.replace("Default_Log_Level=WARN;", "Default_Log_Level=EVENT;")
        place.path("/etc/ganesha/ganesha.conf").write_text(config)
        server.start_on_what_is_there()
        log = place.logs / "ganesha.log"  # the last it does before is to empty statd's list
        wait(lambda: "NFS SERVER INITIALIZED" in log.read_text(), "ganesha that has started")
        handle = place.inside(lambda: _handle("127.0.0.1", "/nfs/volume", "file"))
        assert nsm.lock(place, handle, reclaim=True) == nsm.DENIED_GRACE_PERIOD
        folder = place.path("/var/lib/nfs/sm")
        assert statd.read([folder]) == ()
        assert nsm.lock(place, handle) == nsm.GRANTED
        (holder,) = statd.read([folder])
        assert asyncio.run(Resolver().addresses_of(holder)) == (ip_address("127.0.0.1"),)
    finally:
        place.remove()


def _handle(server: str, export: str, name: str) -> bytes:
    mount = UdpMount(server, export, cap_s=20.0)
    try:
        return mount.lookup(name, create=True)
    finally:
        mount.close()


# ------------------------------------------------------------------ a pair


class Clients:
    """Two clients with locks: c notes what it is told, w has a real statd that tells its lockd."""

    def __init__(self, lab: Lab) -> None:
        for place in (lab.c, lab.w):
            start_rpcbind(place)
        self.c = listen(lab.c, STATUS, 1, 4045)
        self.w = listen(lab.w, LOCKS, 3, 4047)
        start_statd(lab.w, 4046)
        watch(lab.w, 4046, VIP)

    def told(self, above: int) -> tuple[Told, Told, Told]:
        """What both are told of a state above this one: c by two names, w by its statd."""
        found: list[Told] = []

        def came() -> bool:
            c, w = ([one for one in calls(who) if one.state > above] for who in (self.c, self.w))
            found[:] = [*c[:2], *w[:1]]
            return len(found) == 3

        wait(came, f"a notification above state {above}: {calls(self.c)}, {calls(self.w)}")
        return found[0], found[1], found[2]


def known(copies: Copies, node: str) -> dict[str, Any]:
    """The part `locks` of `nfsha clients --json`."""
    answer = json.loads(copies.lab.node(node).nfsha("clients", "--json").stdout)
    return dict(answer["locks"])


def check(told: tuple[Told, Told, Told]) -> int:
    """It came from the VIP, under both names, in one odd state; returns that."""
    by_address, by_name, called_back = told
    state = by_address.state
    assert state % 2 == 1
    assert by_address == Told(VIP, OUTGOING_PORT, NOTIFY, VIP, state)
    assert by_name == Told(VIP, OUTGOING_PORT, NOTIFY, NAME, state)
    assert (called_back.procedure, called_back.name) == (CALLBACK, VIP)
    assert called_back.state == state
    return state


def test_lock_holders_are_told_after_a_handover_and_after_a_takeover(lab: Lab) -> None:
    copies = Copies(lab, sync=SYNC)
    clients = Clients(lab)
    for node in (lab.a, lab.b):
        with node.path("/etc/hosts").open("a") as hosts:
            hosts.write(f"{VIP} {NAME}\n")
        start_statd(node)
    copies.settle_whole()
    holders = sorted([C, W, NOBODY])
    for client in holders:
        watch(lab.a, STATD_PORT, client)
    wait(lambda: known(copies, "b")["saved"] == holders, "the list on the other node")
    assert calls(clients.c) == []  # nothing moved yet

    lab.a.nfsha("switchover", "--yes", timeout_s=60)
    first = check(clients.told(above=0))
    # One that does not answer holds nothing up, and is not forgotten.
    wait(lambda: known(copies, "b")["told"]["answered"] == 2, "two answers")
    assert known(copies, "b")["told"] == {"total": 3, "answered": 2, "given_up": 0}
    copies.wait_phase("a", "PASSIVE")
    wait(lambda: sorted(known(copies, "a")["saved"]) == holders, "the list on the way back")
    copies.wait(lambda: copies.volume("a")["sync"]["state"] == "idle", "a whole replica")

    since_ms = copies.now_ms()
    lab.power_cut("b")
    copies.wait_phase("a", "ACTIVE", since_ms=since_ms)
    second = check(clients.told(above=first))
    assert second > first
    copies.assert_never_two()


def test_the_list_outlives_the_daemon_that_was_told(lab: Lab) -> None:
    copies = Copies(lab, sync=SYNC)
    start_statd(lab.a)
    copies.settle_whole()
    watch(lab.a, STATD_PORT, C)
    wait(lambda: known(copies, "b")["saved"] == [C], "the list on the other node")
    file = lab.folder / "b" / "lib" / "lock-holders"
    wait(lambda: file.exists() and C in file.read_text(), "the list on its disk")
    copies.daemon("b").kill()
    copies.daemon("b").wait(5)
    lab.power_cut("a")
    since_ms = copies.now_ms()
    copies.start("b")
    copies.wait_phase("b", "WAITING", since_ms=since_ms, within_s=20)
    assert known(copies, "b")["saved"] == [C]

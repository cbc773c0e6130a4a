"""The lab itself: each fault bites and heals, overlaps are measured, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.netns.lab import Lab
from tests.netns.labkit import kernel, registry
from tests.netns.labkit.keepalived import Keepalived
from tests.netns.labkit.network import GATEWAY, PLACES, VIP, VIP6
from tests.netns.labkit.nfs_server import rpc_null
from tests.netns.labkit.place import REPOSITORY, LabError, Place
from tests.netns.labkit.prober import NullProber

_PORT = 7000


def _pings(place: Place, address: str) -> bool:
    return place.run("ping", "-c1", "-W1", address, check=False).returncode == 0


def _reaches(place: Place, address: str) -> bool:
    """Soon: the kernel asks for a MAC once a second, and may have just asked in vain."""
    return _gone(lambda: not _pings(place, address))


def _null(place: Place, host: str, version: int = 3) -> int | None:
    return place.inside(lambda: rpc_null(host, 2049, 100003, version))


def _close_nfs(node: Place) -> None:
    """What a service lease does when it ends, both ways."""
    chain = "{{ type filter hook {0} priority 0; tcp {1} 2049 drop; }}"
    ways = (("input", "dport"), ("output", "sport"))
    chains = "\n".join(f"chain {way} {chain.format(way, port)}" for way, port in ways)
    node.run("nft", "-f", "-", stdin=f"table inet closed {{\n{chains}\n}}\n")


@contextmanager
def _receiver(place: Place) -> Iterator[socket.socket]:
    sock = place.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with closing(sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.settimeout(0.3)
        sock.bind(("0.0.0.0", _PORT))
        yield sock


def _delivered(lab: Lab, source: str, target: str, *, network: str = "lan", count: int = 20) -> int:
    """How many of `count` datagrams arrive; the neighbours know each other's MAC beforehand."""
    there = next(at for at in PLACES[target].all() if at.network == network)
    here = next(at for at in PLACES[source].all() if at.network == network)
    place = _place(lab, source)
    place.run("ip", "neigh", "replace", there.ipv4, "lladdr", there.mac, "dev", here.interface)
    with _receiver(_place(lab, target)) as receiver:
        sender = place.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        with closing(sender):
            for number in range(count):
                sender.sendto(str(number).encode(), (there.ipv4, _PORT))
        arrived = 0
        try:
            while arrived < count:
                receiver.recv(64)
                arrived += 1
        except TimeoutError:
            pass
        return arrived


def _place(lab: Lab, name: str) -> Place:
    return {place.name: place for place in lab.places}[name]


def _gone(condition: Callable[[], bool], within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# What is there


def test_two_nodes_serve_v3_and_refuse_v4(lab: Lab) -> None:
    for node in (lab.a, lab.b):
        assert node.nfs.answers(version=3)
        address = node.addresses.lan
        for host in (address.ipv4, address.ipv6):
            assert host is not None
            assert _null(lab.c, host) == 0
            assert _null(lab.c, host, version=4) == 2  # PROG_MISMATCH (RFC 5531 section 9)


def test_v4_can_be_switched_on_for_negative_tests(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(protocols="3,4")
    assert lab.a.nfs.answers(version=4)
    lab.a.nfs.stop()
    assert not lab.a.nfs.answers(version=3)
    lab.a.nfs.start(protocols="3")
    assert lab.a.nfs.answers(version=3)
    assert not lab.a.nfs.answers(version=4)


def test_places_are_machines_of_their_own(lab: Lab) -> None:
    ids = {
        place.run("cat", "/proc/sys/kernel/random/boot_id").stdout.strip() for place in lab.places
    }
    assert len(ids) == 4
    assert Path("/proc/sys/kernel/random/boot_id").read_text().strip() not in ids
    assert lab.a.run("hostname").stdout.strip() == "node-a"
    lab.a.run("touch", "/run/mark", "/etc/mark-of-a", "/var/lib/mark-of-a")
    assert lab.b.run("ls", "/run/mark", "/etc/mark-of-a", check=False).returncode != 0
    assert not Path("/etc/mark-of-a").exists()
    assert not Path("/var/lib/mark-of-a").exists()
    assert "daemon" not in lab.b.run("ps", "-e").stdout
    sleeper = lab.a.spawn(["sleep", "60"])
    assert "sleep" in lab.a.run("ps", "-e").stdout
    assert "sleep" not in lab.b.run("ps", "-e").stdout
    sleeper.kill()


def test_volumes_are_separate_filesystems_with_one_uuid(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(volumes=("data", "more"))
    uuids = {}
    for node in (lab.a, lab.b):
        for volume in lab.volumes:
            mounted = node.run("findmnt", "-no", "SOURCE,FSTYPE", f"/nfs/{volume}").stdout.split()
            device = mounted[0].partition("[")[0]
            blkid = node.run("blkid", "-p", "-s", "UUID", "-o", "value", device)
            uuids[node.name, volume] = blkid.stdout.strip()
            assert mounted[1] == "ext4"
    assert uuids["a", "data"] == uuids["b", "data"]
    assert uuids["a", "more"] == uuids["b", "more"]
    assert uuids["a", "data"] != uuids["a", "more"]
    lab.a.run("touch", "/nfs/data/only-on-a")
    assert lab.b.run("ls", "/nfs/data").stdout.split() == ["lost+found"]


def test_configuration_is_there_and_private(lab: Lab) -> None:
    lab.configure("a")
    lab.configure("b")
    assert 'role = "primary"' in lab.a.run("cat", "/etc/nfsha/nfsha.toml").stdout
    assert 'peer = "10.78.0.1"' in lab.b.run("cat", "/etc/nfsha/nfsha.toml").stdout
    mode = lab.a.run("stat", "-c", "%a", "/etc/nfsha/cluster.key").stdout.strip()
    assert mode == "600"
    keys = {node.run("cat", "/etc/nfsha/cluster.key").stdout for node in (lab.a, lab.b)}
    assert len(keys) == 1
    lab.a.wipe_state()
    assert lab.a.run("ls", "/etc/nfsha").stdout == ""


def test_a_command_that_fails_or_hangs_says_so(lab: Lab) -> None:
    with pytest.raises(LabError, match="exit 3"):
        lab.a.run("sh", "-c", "exit 3")
    with pytest.raises(LabError, match="no end after"):
        lab.a.run("sleep", "60", timeout_s=0.2)


# The client


@pytest.mark.parametrize("vip", [VIP, VIP6])
def test_work_by_path_goes_on_when_the_vip_moves_by_hand(lab: Lab, vip: str) -> None:
    lab.a.add_vip(vip)
    writer = lab.write_records(server=vip, interval_ms=5)
    before = writer.wait_acked(50)
    _close_nfs(lab.a)
    lab.a.drop_vip(vip)
    time.sleep(0.3)
    moved_ns = lab.now_ns()
    lab.b.add_vip(vip)
    writer.wait_acked(50)
    records = writer.stop()

    # An operation under way may have opened the file on the one node and written on the other.
    assert all(one.stale for one in records.failed)
    assert len(records.failed) <= 1
    assert records.longest_stall_ms >= 250
    assert records.longest_gap_ms >= 250
    stored = lab.read_records(server=vip)
    assert set(records.since(moved_ns).acked) <= set(stored)
    assert set(before.acked) & set(stored) == set()  # nothing copies yet: those are on a

    seen = lab.look()
    seen.require_complete()
    assert [hold.node for hold in seen.holds(vip)] == ["a", "b"]
    assert seen.address_overlap_ms(vip) == 0
    assert seen.reply_overlap_ms(vip) == 0
    assert {reply.node for reply in seen.replies(vip)} == {"a", "b"}
    first, last = seen.reply_span(vip, "a") or (0, 0)
    assert first < last <= moved_ns


def test_ipv6_goes_on_sending_a_reply_after_the_address_is_gone_and_it_is_seen(lab: Lab) -> None:
    """Why overlap is given by packets too: the acknowledgement of the last reply comes too late."""
    lab.a.add_vip(VIP6)
    writer = lab.write_records(server=VIP6, interval_ms=5)
    writer.wait_acked(50)
    lab.cut("c", "a", both_ways=False)
    time.sleep(0.05)
    lab.a.drop_vip(VIP6)
    gone_ns = lab.now_ns()
    lab.heal()
    time.sleep(1.0)
    late = lab.look().replies(VIP6, since_ns=gone_ns)
    writer.stop()
    assert {(reply.node, reply.again) for reply in late} == {("a", True)}


def test_an_operation_that_never_ends_is_ended_by_its_cap(lab: Lab) -> None:
    lab.a.add_vip()
    writer = lab.write_records(interval_ms=5, cap_s=1.0)
    writer.wait_acked(10)
    lab.a.drop_vip()
    time.sleep(1.5)
    lab.a.add_vip()
    writer.wait_acked(10)
    failed = writer.stop().failed
    assert failed
    assert "no answer within the cap" in (failed[0].error or "")
    assert 900 <= failed[0].took_ms <= 2500


def test_reading_what_nobody_serves_is_an_error_in_time(lab: Lab) -> None:
    started = time.monotonic()
    with pytest.raises(LabError, match="read:"):
        lab.read_records(cap_s=1.0)
    assert time.monotonic() - started < 10


def test_prober_measures_an_outage(lab: Lab) -> None:
    lab.a.add_vip()
    prober = lab.probe()
    prober.wait_success()
    start_ns = lab.now_ns()
    time.sleep(0.5)
    calm_ns = lab.now_ns()
    lab.a.drop_vip()
    time.sleep(0.4)
    lab.a.add_vip()
    time.sleep(0.6)
    probes = prober.stop()
    assert probes.outage_ms(start_ns, calm_ns) < 200
    assert 380 <= probes.outage_ms(calm_ns) < 900
    assert probes.first_success_after(calm_ns) is not None
    assert len(probes.successes) > 50


def test_prober_of_an_address_that_nobody_has_sees_only_outage(lab: Lab) -> None:
    prober = NullProber(lab.c, server=VIP)
    time.sleep(0.5)
    probes = prober.stop()
    assert probes.successes == ()
    assert probes.outage_ms() >= 500


# What is seen


def test_two_holders_are_measured(lab: Lab) -> None:
    """The address on both for a while, and both answering: one client each, told apart by MAC."""
    lab.a.add_vip()
    writer = lab.write_records(interval_ms=5)
    writer.wait_acked(20)
    lab.b.add_vip(announce=False)
    mac_of_b = PLACES["b"].lan.mac
    lab.w.run("ip", "neigh", "replace", VIP, "lladdr", mac_of_b, "dev", "eth0")
    assert _null(lab.w, VIP) == 0
    overlap_ns = lab.now_ns()
    time.sleep(0.5)
    lab.a.drop_vip()
    writer.stop()
    seen = lab.look()
    assert 500 <= seen.address_overlap_ms(VIP) < 2500
    assert 450 <= seen.reply_overlap_ms(VIP) < 2500
    assert seen.reply_overlap_ms(VIP, since_ns=overlap_ns) == 0  # b answered nobody since
    assert seen.holders(VIP) == {"b"}
    assert "overlap of holders" in seen.render(VIP)


def test_a_hold_ends_with_the_power(lab: Lab) -> None:
    lab.a.add_vip()
    lab.power_cut("a")
    cut_ns = lab.now_ns()
    (hold,) = lab.look().holds(VIP)
    assert not hold.open
    assert hold.end_ns <= cut_ns


def test_claims_and_whom_clients_address(lab: Lab) -> None:
    lab.a.add_vip()
    _null(lab.c, VIP)
    lab.b.add_vip()
    _null(lab.c, VIP)
    seen = lab.look()
    gratuitous = [claim for claim in seen.claims(VIP) if claim.gratuitous]
    assert [claim.node for claim in gratuitous] == ["a", "b"]
    assert gratuitous[0].mac == PLACES["a"].lan.mac
    assert [node for _, node in seen.addressed(VIP)] == ["a", "b"]


def test_a_refusal_is_seen(lab: Lab) -> None:
    lab.a.nfs.stop()
    address = lab.a.addresses.lan.ipv4
    assert _null(lab.c, address) is None
    assert [reply.node for reply in lab.look().refusals(address)] == ["a"]


def test_datagrams_are_kept_on_demand(lab: Lab) -> None:
    assert _delivered(lab, "a", "b", network="hb", count=1) == 1
    assert lab.look().datagrams() == []
    lab.observer.keep_datagrams()
    assert _delivered(lab, "a", "b", network="hb", count=2) == 2
    seen = lab.look().datagrams()
    assert [(one.node, one.network, one.content) for one in seen] == [
        ("a", "hb", b"0"),
        ("a", "hb", b"1"),
    ]
    assert seen[0].target_port == _PORT


def test_a_datagram_is_replayed_under_its_old_address(lab: Lab) -> None:
    lab.observer.keep_datagrams()
    assert _delivered(lab, "a", "b", count=1) == 1
    (seen,) = lab.look().datagrams()
    with _receiver(lab.b) as receiver:
        lab.inject("c", seen)
        content, source = receiver.recvfrom(64)
    assert content == b"0"
    assert source == ("10.77.0.1", seen.source_port)
    replayed = lab.look().datagrams()[1]
    assert (replayed.node, replayed.source) == ("c", "10.77.0.1")


def test_waiting_for_a_holder(lab: Lab) -> None:
    lab.b.add_vip()
    assert lab.wait_holder("b").open
    with pytest.raises(LabError, match="a does not hold"):
        lab.wait_holder("a", timeout_s=0.2)


# Faults


def test_power_cut_and_boot(lab: Lab) -> None:
    lab.a.add_vip()
    lab.configure("a")
    lab.a.run("touch", "/var/lib/nfsha/kept", "/run/lost", "/nfs/data/kept")
    old_id = lab.a.boot_id
    process = lab.a.spawn(["sleep", "1000"])
    holder = lab.a.holder_pid
    assert _reaches(lab.c, VIP)

    cut_ns = lab.power_cut("a")
    assert not process.alive
    assert kernel.start_time(holder) is None
    assert not _pings(lab.c, VIP)
    assert not _pings(lab.b, "10.78.0.1")

    lab.boot("a")
    assert lab.a.boot_id != old_id
    assert lab.a.run("cat", "/proc/sys/kernel/random/boot_id").stdout.strip() == lab.a.boot_id
    assert not lab.a.holds(VIP)
    lab.a.run("ls", "/var/lib/nfsha/kept", "/etc/nfsha/nfsha.toml", "/nfs/data/kept")
    assert lab.a.run("ls", "/run/lost", check=False).returncode != 0
    assert lab.a.nfs.answers()
    assert _reaches(lab.c, lab.a.addresses.lan.ipv4)
    assert lab.look().refusals(VIP, since_ns=cut_ns) == []


def test_a_power_cut_says_no_farewell(lab: Lab) -> None:
    """Neither FIN nor reset leaves the node: its connections just hang, as they do in life."""
    lab.a.add_vip()
    writer = lab.write_records(interval_ms=5, cap_s=1.0)
    writer.wait_acked(20)
    before_ns = lab.now_ns()
    down_ns = lab.power_cut("a")
    time.sleep(0.3)
    seen = lab.look()
    assert seen.replies(VIP, since_ns=down_ns) == []
    assert seen.refusals(VIP, since_ns=before_ns) == []
    assert writer.stop().attempts[-1].error is not None


def test_a_power_cut_is_not_foreseen(lab: Lab) -> None:
    """The node sees no link go before it dies, and falls silent on both networks at once."""
    tell = (
        "import socket, time\n"
        "sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "while True:\n"
        "    for peer in ('10.77.0.2', '10.78.0.2'):\n"
        "        carrier = open('/sys/class/net/eth0/carrier').read()\n"
        "        sock.sendto(carrier.encode(), (peer, 7000))\n"
        "    time.sleep(0.0005)\n"
    )
    lab.observer.keep_datagrams()
    with _receiver(lab.b) as receiver:
        teller = lab.a.spawn([sys.executable, "-c", tell], name="teller")
        # A teller that waits for the processor as the cut comes says nothing after these.
        heard = {receiver.recv(16) for _ in range(200)}
        dead_ns = lab.power_cut("a")
        with pytest.raises(TimeoutError):
            while True:
                heard.add(receiver.recv(16))
    assert heard == {b"1\n"}
    assert teller.output() == ""  # it ended by SIGKILL, not because something failed under it
    seen = lab.look().datagrams()
    assert {one.network for one in seen} == {"lan", "hb"}
    assert max(one.time_ns for one in seen) <= dead_ns


def test_kill_freeze_and_thaw_a_process(lab: Lab) -> None:
    process = lab.a.spawn(["sh", "-c", "while :; do echo turn; sleep 0.05; done"], name="turner")
    assert _gone(lambda: "turn" not in process.output())
    process.freeze()
    time.sleep(0.1)
    frozen = process.output()
    time.sleep(0.3)
    assert process.output() == frozen
    assert process.alive
    process.thaw()
    assert _gone(lambda: process.output() == frozen)
    process.kill()
    assert process.wait(1) == -signal.SIGKILL


def test_cut_one_way(lab: Lab) -> None:
    lab.cut("a", "b", network="hb", both_ways=False)
    assert _delivered(lab, "a", "b", network="hb") == 0
    assert _delivered(lab, "b", "a", network="hb") == 20
    assert _delivered(lab, "a", "b", network="lan") == 20
    lab.heal()
    assert _delivered(lab, "a", "b", network="hb") == 20


def test_cut_a_pair_on_all_networks(lab: Lab) -> None:
    lab.cut("a", "b")
    assert _delivered(lab, "a", "b", network="hb") == 0
    assert _delivered(lab, "b", "a", network="lan") == 0
    assert _reaches(lab.c, "10.77.0.1")
    assert _reaches(lab.c, "10.77.0.2")
    lab.heal()
    assert _reaches(lab.b, "10.77.0.1")


def test_cut_off_from_everything(lab: Lab) -> None:
    lab.cut("a")
    for address in ("10.77.0.2", "10.78.0.2", GATEWAY):
        assert not _pings(lab.a, address)
    assert lab.a.path("/sys/class/net/eth0/carrier").read_text() == "1\n"
    lab.heal()
    assert _reaches(lab.a, GATEWAY)


def test_unplugged_is_seen_as_carrier_loss(lab: Lab) -> None:
    carrier = lab.a.path("/sys/class/net/eth0/carrier")
    lab.unplug("a")
    assert _gone(lambda: carrier.read_text() == "1\n")
    assert _delivered(lab, "a", "b", network="hb") == 20
    lab.plug("a")
    assert _gone(lambda: carrier.read_text() == "0\n")
    assert _reaches(lab.c, "10.77.0.1")
    assert _reaches(lab.c, "fd77::1")


def test_loss_by_percentage_and_direction(lab: Lab) -> None:
    lab.lose("a", "b", percent=30, network="hb", both_ways=False)
    # 1,000 throws at 0.7: one in a million falls outside of 0.63 to 0.77
    assert 630 <= _delivered(lab, "a", "b", network="hb", count=1000) <= 770
    assert _delivered(lab, "b", "a", network="hb", count=100) == 100
    lab.heal()
    assert _delivered(lab, "a", "b", network="hb", count=100) == 100


def test_loss_of_heartbeats_only(lab: Lab) -> None:
    lab.cut("a", "b", udp_only=True)
    assert _delivered(lab, "a", "b") == 0
    assert _null(lab.a, "10.77.0.2") == 0
    lab.heal()
    assert _delivered(lab, "a", "b") == 20


def test_gateway_gone_and_back(lab: Lab) -> None:
    assert _reaches(lab.a, GATEWAY)
    lab.cut("a", "b", network="hb")
    lab.gateway_gone()
    assert not _pings(lab.a, GATEWAY)
    assert _reaches(lab.a, "10.77.0.2")
    lab.gateway_back()
    assert _reaches(lab.a, GATEWAY)
    assert not _pings(lab.a, "10.78.0.2")  # the other fault is still there


def _wall_ahead_s() -> float:
    return (time.time_ns() - kernel.now_ns()) / 1e9


@pytest.mark.alone
def test_wall_clock_stepped_and_put_right(lab: Lab) -> None:
    lab.a.add_vip()
    writer = lab.write_records(interval_ms=5)
    writer.wait_acked(10)
    right_s = _wall_ahead_s()
    with lab.wall_clock_stepped(90.0):
        assert _wall_ahead_s() - right_s == pytest.approx(90.0, abs=0.5)
        writer.wait_acked(10)
    assert _wall_ahead_s() == pytest.approx(right_s, abs=0.5)
    writer.wait_acked(10)
    records = writer.stop()
    assert records.longest_gap_ms < 3000
    times = [reply.time_ns for reply in lab.look().replies(VIP)]
    assert times[0] > records.attempts[0].sent_ns - 5e9
    assert times[-1] < lab.now_ns()


@pytest.mark.alone
def test_wall_clock_is_put_right_when_its_owner_is_killed() -> None:
    right_s = _wall_ahead_s()
    script = (
        "import os, signal\n"
        "from tests.netns.labkit import wall_clock\n"
        "with wall_clock.stepped(-90.0):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, timeout=30, check=False)
    assert done.returncode == -signal.SIGKILL
    assert _gone(lambda: abs(_wall_ahead_s() - right_s) > 0.5)


# The other program of the bench


def test_keepalived_takes_over_after_node_death(lab: Lab) -> None:
    first, second = (Keepalived(node, advert_s=0.1) for node in (lab.a, lab.b))
    first.start()
    first.wait_holder()
    second.start()
    time.sleep(1.0)
    assert lab.look().holders(VIP) == {"a"}
    lab.power_cut("a")
    second.wait_holder()
    assert lab.look().address_overlap_ms(VIP) == 0
    second.stop()
    assert lab.look().holders(VIP) == set()


def test_keepalived_killed_leaves_two_holders(lab: Lab) -> None:
    first, second = (Keepalived(node, advert_s=0.1) for node in (lab.a, lab.b))
    first.start()
    first.wait_holder()
    second.start()
    time.sleep(1.0)
    first.kill()
    second.wait_holder()
    time.sleep(0.2)
    seen = lab.look()
    assert seen.holders(VIP) == {"a", "b"}
    assert seen.address_overlap_ms(VIP) >= 200
    second.freeze()
    second.thaw()
    second.stop()


# Nothing is left behind

_OWNER = """
import sys, time
from tests.netns.lab import Lab
with Lab() as lab:
    lab.a.add_vip()
    lab.write_records().wait_acked(3)
    print(lab.name, lab.folder, flush=True)
    time.sleep(60)
"""


@contextmanager
def _other_owner() -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    argv = [sys.executable, "-c", _OWNER]
    owner = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=REPOSITORY, text=True
    )
    with owner:
        try:
            assert owner.stdout is not None
            name, folder = owner.stdout.readline().split()
            yield owner, name, Path(folder)
        finally:
            owner.kill()


def test_the_check_for_leftovers_finds_a_living_lab(lab: Lab) -> None:
    found = " ".join(registry.leftovers(os.getpid(), {lab.name}))
    for kind in ("namespace", "loop device", "process", "folder", "description"):
        assert kind in found


def test_after_kill_9_of_the_owner_processes_end_and_a_sweep_removes_the_rest() -> None:
    with _other_owner() as (owner, name, folder):
        assert registry.leftovers(owner.pid, {name})
        owner.kill()
        owner.wait()
        assert _gone(lambda: registry.marked_processes(name) != [])
        assert folder.exists()
        assert name in registry.sweep()
        assert _gone(lambda: registry.leftovers(owner.pid, {name}) != [])
        assert not folder.exists()


def test_after_ctrl_c_nothing_is_left() -> None:
    with _other_owner() as (owner, name, folder):
        owner.send_signal(signal.SIGINT)
        owner.wait(30)
        assert _gone(lambda: registry.leftovers(owner.pid, {name}) != [])
        assert not folder.exists()


def test_a_sweep_spares_the_living(lab: Lab) -> None:
    assert lab.name not in registry.sweep()
    assert lab.a.nfs.answers()


def test_a_lab_that_cannot_come_up_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.netns.labkit.nfs_server._START_S", 0.0)
    broken = Lab()
    with pytest.raises(LabError, match="does not serve"), broken:
        pass
    assert _gone(lambda: registry.leftovers(0, {broken.name}) != [])


def test_the_command_line_builds_a_lab_that_stays_and_takes_it_down() -> None:
    name = f"test-{os.getpid()}"

    def command(*words: str) -> str:
        argv = [sys.executable, "-m", "tests.netns.lab", "--name", name, *words]
        done = subprocess.run(
            argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        assert "the lab stands" in command("up")
        assert "stands already" in command("up")
        assert f"{name}: stays until" in command("status")
        assert command("shell", "b", "hostname") == "node-b\n"
        shown = json.loads(command("shell", "a", "ip", "-j", "addr", "show", "dev", "eth0"))
        assert shown[0]["address"] == PLACES["a"].lan.mac
        assert rpc_null("10.77.0.1", 2049, 100003, 3) is None  # not from the host
    finally:
        assert name in command("down")
    assert name not in command("status")
    assert _gone(lambda: registry.leftovers(0, {name}) != [])

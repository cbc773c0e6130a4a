"""What else goes wrong on a real node: somebody's hands, the service, the disk, the start."""

from __future__ import annotations

import json
import socket
import struct
import time

import pytest

from tests.netns.lab import Lab
from tests.netns.labkit.network import VIP
from tests.netns.labkit.nfs_server import rpc_null
from tests.netns.pair import BUSY_MS, SURVEY_MS, TAKEOVER_AFTER_MS, Pair

NFS_PROGRAM = 100003
IDLE_PEER_MS = 2000


@pytest.fixture
def pair(lab: Lab) -> Pair:
    """Two configured nodes whose daemons do not run yet."""
    return Pair(lab)


def answers(lab: Lab, address: str) -> bool:
    """Does the client get an answer of NFS v3 from this address at this moment?"""
    return lab.c.inside(lambda: rpc_null(address, 2049, NFS_PROGRAM, 3, 0.3)) == 0


def wait_answer(lab: Lab, address: str, within_s: float) -> float:
    """Waits for an answer; returns how many seconds it took."""
    began = time.monotonic()
    while not answers(lab, address):
        assert time.monotonic() - began < within_s, f"no answer of {address} in {within_s} s"
        time.sleep(0.02)
    return time.monotonic() - began


# ------------------------------------------------------------------ somebody's hands


def test_a_flushed_ruleset_is_back_within_a_second(pair: Pair) -> None:
    pair.settle()
    for name in ("a", "b"):
        pair.lab.node(name).run("nft", "flush", "ruleset")
    time.sleep(1)
    for name in ("a", "b"):
        rules = pair.lab.node(name).run("nft", "list", "table", "inet", "nfsha").stdout
        assert "drop" in rules
    assert answers(pair.lab, VIP)
    assert not answers(pair.lab, "10.77.0.2")
    assert not answers(pair.lab, "10.77.0.1")
    pair.wait_event("a", lambda e: e.row == "A20", "repair", since_ms=0, within_s=1)


def test_an_address_taken_away_by_hand_is_put_back(pair: Pair) -> None:
    pair.settle()
    writer = pair.lab.write_records()
    writer.wait_acked(20)
    taken_ms = pair.now_ms()
    pair.lab.a.drop_vip()
    pair.wait_event("a", lambda e: e.row == "A20", "repair", since_ms=taken_ms, within_s=2)
    writer.wait_acked(20)
    assert not writer.stop().failed
    assert pair.lab.a.holds()
    assert pair.moves("b", taken_ms) == []


def test_an_address_put_on_the_passive_node_by_hand_is_removed(pair: Pair) -> None:
    pair.settle()
    pair.lab.b.run("ip", "addr", "add", f"{VIP}/32", "dev", "eth0", "valid_lft", "60",
                   "preferred_lft", "60")  # fmt: skip
    deadline = time.monotonic() + 2
    while pair.lab.b.holds():
        assert time.monotonic() < deadline, "the address is still there"
        time.sleep(0.02)
    assert pair.phase("a") == "ACTIVE"
    assert answers(pair.lab, VIP)


def test_another_machine_that_claims_the_vip_is_answered(pair: Pair) -> None:
    pair.settle()
    time.sleep(3.5)  # the announcements of the start are over
    claimed_ns = pair.lab.now_ns()
    pair.lab.b.inside(_claim_from_b)
    time.sleep(0.5)
    told = [one for one in pair.lab.look().claims(VIP, claimed_ns) if one.node == "a"]
    assert [one for one in told if one.gratuitous]
    alarms = pair.lab.a.status()["alarms"]
    assert [one for one in alarms if one["name"] == "vip-claimed"]


def _claim_from_b() -> None:
    own = bytes.fromhex("027700000002")
    vip = socket.inet_aton(VIP)
    frame = b"\xff" * 6 + own + struct.pack("!HHHBBH", 0x0806, 1, 0x0800, 6, 4, 2)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind(("eth0", 0))
        sock.send(frame + own + vip + b"\xff" * 6 + vip)


# ------------------------------------------------------------------ the service


def test_a_dead_nfs_server_moves_the_service(pair: Pair) -> None:
    pair.settle()
    killed_ms = pair.now_ms()
    pair.lab.a.nfs.stop()
    fault = pair.wait_phase("a", "FAULT", since_ms=killed_ms)
    served = pair.wait_phase("b", "ACTIVE", since_ms=killed_ms)
    bound_ms = IDLE_PEER_MS + TAKEOVER_AFTER_MS + SURVEY_MS
    assert served.at_ms - fault.at_ms <= bound_ms + BUSY_MS
    pair.lab.a.nfs.start()
    pair.wait_phase("a", "PASSIVE", since_ms=killed_ms)
    pair.assert_never_two()


def test_a_server_that_speaks_v4_does_not_serve(make_lab: type[Lab]) -> None:
    lab = make_lab(protocols="3,4")
    pair = Pair(lab)
    pair.start()
    pair.wait_phase("a", "FAULT")
    status = lab.a.status()
    assert "version4-on" in str(status["health"])
    assert not lab.look().holds(VIP)


def test_a_volume_that_is_not_mounted_forbids_to_serve(lab: Lab) -> None:
    pair = Pair(lab, mounts=("/nfs/data", "/nfs/missing"))
    pair.start()
    pair.wait_phase("a", "FAULT")
    assert "/nfs/missing" in str(lab.a.status()["health"])


# ------------------------------------------------------------------ stops and starts


def test_a_clean_stop_is_taken_over_in_its_bound(pair: Pair) -> None:
    pair.settle()
    prober = pair.lab.probe()
    prober.wait_success()
    stopped_ms = pair.now_ms()
    assert pair.daemon("a").stop() == 0
    assert not pair.lab.a.holds()
    served = pair.wait_phase("b", "ACTIVE", since_ms=stopped_ms)
    released = pair.wait_event(
        "a", lambda e: e.row == "C62", "release", since_ms=stopped_ms, within_s=1
    )
    assert served.at_ms - released.at_ms <= TAKEOVER_AFTER_MS + 100 + BUSY_MS
    prober.stop()
    pair.assert_never_two()


def test_a_stopped_standby_promises_and_the_survivor_needs_no_echo(pair: Pair) -> None:
    pair.settle()
    assert pair.daemon("b").stop() == 0
    pair.lab.gateway_gone()
    stopped_ms = pair.now_ms()
    time.sleep(3)
    assert pair.moves("a", stopped_ms) == []
    assert pair.lab.a.status()["promise"]["peer"] == "standing"
    pair.lab.gateway_back()
    assert pair.daemon("a").stop() == 0
    booted_ms = pair.now_ms()
    pair.start("a")  # alone: its journal shows its own authority and the promise
    pair.wait_phase("a", "ACTIVE", since_ms=booted_ms)
    pair.start("b")
    pair.wait_phase("b", "PASSIVE", since_ms=booted_ms)
    deadline = time.monotonic() + 3
    while pair.lab.b.status()["promise"]["own"] != "none":
        assert time.monotonic() < deadline, "the promise was not cleared"
        time.sleep(0.1)


def test_maintenance_of_both_and_back(pair: Pair) -> None:
    pair.settle()
    refused = pair.lab.a.nfsha("maintenance", "on", check=False)
    assert refused.returncode == 3
    assert "on the peer first" in refused.stderr
    pair.lab.b.nfsha("maintenance", "on")
    pair.wait_phase("b", "MAINTENANCE")
    deadline = time.monotonic() + 3
    while pair.lab.a.nfsha("maintenance", "on", check=False).returncode != 0:
        assert time.monotonic() < deadline, "the promise did not arrive"
        time.sleep(0.05)
    assert answers(pair.lab, VIP)
    pair.lab.a.nfsha("maintenance", "off")
    pair.lab.b.nfsha("maintenance", "off")
    pair.wait_phase("b", "PASSIVE", since_ms=pair.now_ms() - 1000)
    assert pair.phase("a") == "ACTIVE"
    assert answers(pair.lab, VIP)


def test_a_second_daemon_on_a_node_is_refused(pair: Pair) -> None:
    pair.settle()
    second = pair.lab.a.nfsha("run", check=False)
    assert second.returncode == 1
    assert "Traceback" not in second.stderr
    assert "another nfsha daemon" in second.stderr
    assert pair.phase("a") == "ACTIVE"
    assert answers(pair.lab, VIP)


def test_a_permanent_vip_is_refused_with_the_remedy(pair: Pair) -> None:
    pair.lab.a.add_vip(announce=False)
    refused = pair.lab.a.nfsha("run", check=False)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert VIP in refused.stderr
    assert "ip addr" in refused.stderr


def test_a_key_that_others_may_read_is_refused(pair: Pair) -> None:
    pair.lab.a.run("chmod", "0644", "/etc/nfsha/cluster.key")
    refused = pair.lab.a.nfsha("run", check=False)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert "cluster.key" in refused.stderr


# ------------------------------------------------------------------ disk and clock


def test_a_corrupt_journal_is_kept_aside_and_the_node_never_serves_by_it(pair: Pair) -> None:
    pair.settle()
    for name in ("a", "b"):
        pair.lab.power_cut(name)
    journal = pair.lab.folder / "a" / "lib" / "journal"
    journal.write_bytes(journal.read_bytes()[:-20])
    booted_ms = pair.now_ms()
    for name in ("a", "b"):
        pair.lab.boot(name)
    pair.start()
    pair.wait_phase("a", "RETURNED", since_ms=booted_ms)
    served = pair.wait_phase("b", "ACTIVE", since_ms=booted_ms)
    assert "2" in served.detail
    assert list(journal.parent.glob("journal.corrupt-*"))
    pair.wait_phase("a", "PASSIVE", since_ms=served.at_ms)
    assert "ACTIVE" not in {to for _, to in pair.moves("a", booted_ms)}


def test_a_full_disk_stops_no_service_and_is_told(pair: Pair) -> None:
    pair.settle()
    pair.lab.b.run("mount", "-t", "tmpfs", "-o", "size=16k", "none", "/var/lib/nfsha")
    pair.lab.b.run("sh", "-c", "head -c 20000 /dev/zero > /var/lib/nfsha/full || true")
    asked_ms = pair.now_ms()
    pair.lab.b.nfsha("maintenance", "on")  # wants a promise on the disk
    time.sleep(1)
    alarms = {one["name"] for one in pair.lab.b.status()["alarms"]}
    assert "persist-failed" in alarms
    assert pair.lab.a.status()["promise"]["peer"] == "none"
    pair.lab.b.run("rm", "/var/lib/nfsha/full")
    deadline = time.monotonic() + 5
    while pair.lab.a.status()["promise"]["peer"] != "standing":
        assert time.monotonic() < deadline, "the promise never came"
        time.sleep(0.1)
    assert pair.moves("a", asked_ms) == []


@pytest.mark.alone
def test_a_stepped_wall_clock_changes_nothing(pair: Pair) -> None:
    pair.settle()
    stepped_ms = pair.now_ms()
    with pair.lab.wall_clock_stepped(90.0):
        time.sleep(0.5)
    time.sleep(2)
    assert pair.moves("a", stepped_ms) == []
    assert pair.moves("b", stepped_ms) == []


# ------------------------------------------------------------------ the witness


def test_without_a_witness_the_dead_peer_is_not_succeeded_and_status_says_why(pair: Pair) -> None:
    pair.settle()
    pair.lab.gateway_gone()
    quiet_ms = pair.now_ms()
    time.sleep(2)
    assert pair.moves("a", quiet_ms) == []
    died_ms = pair.now_ms()
    pair.lab.power_cut("a")
    time.sleep(4)
    assert pair.moves("b", died_ms) == []
    conditions = json.dumps(pair.lab.b.status()["takeover"])
    assert "witness" in conditions
    pair.lab.gateway_back()
    served = pair.wait_phase("b", "ACTIVE", since_ms=died_ms)
    assert served.row == "T20"

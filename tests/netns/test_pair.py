"""The pair stands: what the design promises of two daemons, on the real thing.

Real addresses, ARP, nftables, NFS. Each test breaks one thing and looks at what both nodes did.
"""

from __future__ import annotations

import random
import socket
import time
from typing import Any

import pytest

from tests.netns.lab import Lab
from tests.netns.labkit.network import VIP
from tests.netns.labkit.nfs_server import rpc_null
from tests.netns.pair import (
    ADDRESS_LATE_MS,
    ADDRESS_LEASE_MS,
    BUSY_MS,
    HOLD_MS,
    SURVEY_MS,
    TAKEOVER_AFTER_MS,
    Pair,
    assert_only_moved,
)

NFS_PROGRAM = 100003
SECOND_VIP = "10.77.0.101"
VIP6 = "fd77::100"
PORT = 7910


@pytest.fixture
def pair(lab: Lab) -> Pair:
    """Two configured nodes whose daemons do not run yet."""
    return Pair(lab)


# ------------------------------------------------------------------ 1: two fresh nodes


def test_two_fresh_nodes_serve_within_a_second(pair: Pair) -> None:
    pair.start()
    both_up_ms = max(
        pair.wait_event(n, lambda e: e.row == "S10", "start", since_ms=0, within_s=10).at_ms
        for n in ("a", "b")
    )
    served = pair.wait_phase("a", "ACTIVE")
    assert served.at_ms - both_up_ms <= 1000 + BUSY_MS
    pair.wait_phase("b", "PASSIVE")
    writer = pair.lab.write_records()
    writer.wait_acked(20)
    assert not writer.stop().failed
    assert pair.lab.look().holders(VIP) == {"a"}


def test_one_alone_never_serves_and_says_what_it_waits_for(pair: Pair) -> None:
    pair.start("a")
    pair.wait_phase("a", "WAITING")
    time.sleep(4)
    status = pair.lab.a.status()
    assert status["phase"] == "WAITING"
    assert status["row"] == "W90"
    assert "waits for the peer" in str(status["why"])
    assert not pair.lab.look().holds(VIP)


# ------------------------------------------------------------------ 2: node death


def test_node_death_is_taken_over_and_work_by_path_goes_on(pair: Pair) -> None:
    pair.settle()
    writer = pair.lab.write_records()
    writer.wait_acked(20)
    died_ms = pair.now_ms()
    pair.lab.power_cut("a")
    served = pair.wait_phase("b", "ACTIVE", since_ms=died_ms)
    assert served.at_ms - died_ms <= TAKEOVER_AFTER_MS + 100 + BUSY_MS
    writer.wait_acked(20)
    records = writer.stop()
    assert_only_moved(records, served)
    read = pair.lab.read_records()
    written_to_b = [n.number for n in records.attempts if n.sent_ns // 1_000_000 > served.at_ms]
    assert written_to_b
    assert set(written_to_b) & set(records.acked) <= set(read)
    pair.assert_never_two()


# ------------------------------------------------------------------ 3: kill -9


def test_killed_daemon_restarted_in_its_lease_goes_on(pair: Pair) -> None:
    pair.settle()
    writer = pair.lab.write_records()
    writer.wait_acked(20)
    killed_ms = pair.now_ms()
    pair.daemon("a").kill()
    pair.start("a")
    back = pair.wait_event(
        "a", lambda e: e.row == "S20", "adoption", since_ms=killed_ms, within_s=5
    )
    assert back.to == "ACTIVE"
    writer.wait_acked(20)
    records = writer.stop()
    assert not records.failed
    # Closed from `hold` until the new daemon is up; then TCP's own steps (0.2, 0.4, 0.8 s).
    assert records.longest_stall_ms <= 1000 + BUSY_MS
    assert pair.moves("b", killed_ms) == []
    assert pair.lab.look().holders(VIP) == {"a"}
    assert {hold.node for hold in pair.lab.look().holds(VIP)} == {"a"}


def test_killed_daemon_not_restarted_is_closed_by_the_kernel(pair: Pair) -> None:
    pair.settle()
    writer = pair.lab.write_records()
    writer.wait_acked(20)
    killed_ms = pair.now_ms()
    pair.daemon("a").kill()
    served = pair.wait_phase("b", "ACTIVE", since_ms=killed_ms)
    bound_ms = ADDRESS_LEASE_MS + ADDRESS_LATE_MS + SURVEY_MS
    assert served.at_ms - killed_ms <= bound_ms + BUSY_MS
    writer.wait_acked(20)
    assert_only_moved(writer.stop(), served)
    seen = pair.lab.look()
    span = seen.reply_span(VIP, "a", 0)
    assert span is not None
    assert span[1] / 1e6 - killed_ms <= HOLD_MS + BUSY_MS
    assert seen.holders(VIP) == {"b"}
    pair.assert_never_two()


# ------------------------------------------------------------------ 4: SIGSTOP


def test_frozen_daemon_thaws_and_renews_nothing(pair: Pair) -> None:
    pair.settle()
    writer = pair.lab.write_records()
    writer.wait_acked(20)
    frozen_ms = pair.now_ms()
    pair.daemon("a").freeze()
    served = pair.wait_phase("b", "ACTIVE", since_ms=frozen_ms)
    assert served.at_ms - frozen_ms <= ADDRESS_LEASE_MS + ADDRESS_LATE_MS + SURVEY_MS + BUSY_MS
    writer.wait_acked(20)
    time.sleep(max(0.0, 10 - (pair.now_ms() - frozen_ms) / 1000))
    thawed_ns = pair.lab.now_ns()
    pair.daemon("a").thaw()
    pair.wait_phase("a", "PASSIVE", since_ms=thawed_ns // 1_000_000)
    writer.wait_acked(20)
    assert_only_moved(writer.stop(), served)
    seen = pair.lab.look()
    assert not [hold for hold in seen.holds(VIP) if hold.node == "a" and hold.end_ns > thawed_ns]
    assert not [one for one in seen.claims(VIP, thawed_ns) if one.node == "a"]
    assert seen.reply_span(VIP, "a", thawed_ns) is None
    pair.assert_never_two()


# ------------------------------------------------------------------ 5: cut off


def test_cut_off_active_node_releases_and_heals_without_flapping(pair: Pair) -> None:
    pair.settle()
    writer = pair.lab.write_records()
    writer.wait_acked(20)
    cut_ms = pair.now_ms()
    pair.lab.cut("a")
    released = pair.wait_phase("a", "ISOLATED", since_ms=cut_ms)
    assert released.at_ms - cut_ms <= HOLD_MS + BUSY_MS
    served = pair.wait_phase("b", "ACTIVE", since_ms=cut_ms)
    assert served.at_ms - cut_ms <= TAKEOVER_AFTER_MS + 100 + BUSY_MS
    writer.wait_acked(20)
    healed_ns = pair.lab.now_ns()
    pair.lab.heal()
    pair.wait_phase("a", "PASSIVE", since_ms=healed_ns // 1_000_000)
    settled_ms = pair.now_ms()
    writer.wait_acked(50)
    time.sleep(3)
    assert_only_moved(writer.stop(), served)
    assert pair.moves("a", settled_ms + 1) == []
    assert pair.moves("b", settled_ms) == []
    seen = pair.lab.look()
    assert seen.holders(VIP) == {"b"}
    assert {node for _, node in seen.addressed(VIP, healed_ns)} <= {"b"}
    pair.assert_never_two()


def test_cut_off_passive_node_changes_nothing(pair: Pair) -> None:
    pair.settle()
    writer = pair.lab.write_records()
    writer.wait_acked(20)
    cut_ms = pair.now_ms()
    pair.lab.cut("b")
    time.sleep(5)
    pair.lab.heal()
    writer.wait_acked(20)
    records = writer.stop()
    assert not records.failed
    assert pair.moves("a", cut_ms) == []
    assert pair.moves("b", cut_ms) == []
    assert {hold.node for hold in pair.lab.look().holds(VIP)} == {"a"}


# ------------------------------------------------------------------ 6, 7: links


@pytest.mark.parametrize("network", ["lan", "hb"])
def test_one_of_two_links_cut_changes_nothing(pair: Pair, network: str) -> None:
    pair.settle()
    cut_ms = pair.now_ms()
    pair.lab.cut("a", "b", network=network)
    time.sleep(5)
    assert pair.moves("a", cut_ms) == []
    assert pair.moves("b", cut_ms) == []
    heard = {str(link["name"]): link for link in pair.lab.a.status()["links"]}
    silent = [name for name, link in heard.items() if link["last_heard_ms"] > 3000]
    assert len(silent) == 1


def test_a_mere_witness_is_told_for_what_it_is(pair: Pair) -> None:
    pair.settle()
    told = pair.lab.a.nfsha("check-config").stdout + pair.lab.a.nfsha("status").stdout
    assert " ".join(told.split()).count("loss of all heartbeat links at once is not") == 2


@pytest.mark.timeout(150)
def test_thirty_percent_loss_for_a_minute_changes_nothing(pair: Pair) -> None:
    pair.settle()
    began_ms = pair.now_ms()
    pair.lab.lose("a", "b", percent=30, udp_only=True)
    time.sleep(60)
    assert pair.moves("a", began_ms) == []
    assert pair.moves("b", began_ms) == []
    links = pair.lab.b.status()["links"]
    for link in links:
        assert link["received"] < 0.85 * link["sent"], "the loss did not bite"


# ------------------------------------------------------------------ 8: the old primary returns


def test_returned_primary_does_not_touch_the_vip_and_is_closed(pair: Pair) -> None:
    pair.settle()
    pair.lab.power_cut("a")
    pair.wait_phase("b", "ACTIVE")
    booted_ns = pair.lab.now_ns()
    pair.lab.boot("a")
    pair.start("a")
    pair.wait_phase("a", "RETURNED", since_ms=booted_ns // 1_000_000)
    pair.wait_phase("a", "PASSIVE", since_ms=booted_ns // 1_000_000)
    time.sleep(2)
    seen = pair.lab.look()
    assert seen.holders(VIP) == {"b"}
    assert not [one for one in seen.claims(VIP, booted_ns) if one.node == "a"]
    assert not _reaches(pair.lab, "10.77.0.1")
    assert _reaches(pair.lab, VIP)


# ------------------------------------------------------------------ 9: power cut of both


def test_older_authority_boots_alone_and_waits_for_the_operator(pair: Pair) -> None:
    pair.settle()
    pair.lab.power_cut("a")
    pair.wait_phase("b", "ACTIVE")
    pair.lab.power_cut("b")
    booted_ms = pair.now_ms()
    pair.lab.boot("a")
    pair.start("a")
    pair.wait_phase("a", "WAITING", since_ms=booted_ms)
    time.sleep(4)
    assert pair.phase("a") == "WAITING"
    answer = pair.lab.a.nfsha("activate", "--yes")
    assert answer.returncode == 0
    pair.wait_phase("a", "ACTIVE", since_ms=booted_ms)
    writer = pair.lab.write_records(path="/after-activation")
    writer.wait_acked(10)
    assert not writer.stop().failed


# ------------------------------------------------------------------ 10: hostile datagrams


@pytest.mark.parametrize("restarted", ["a", "b"])
def test_hostile_datagrams_change_nothing(pair: Pair, restarted: str) -> None:
    pair.settle()
    recorded = _record(pair.lab)
    _restart_by_force(pair, restarted)
    before = pair.lab.b.status()
    log_before = len(pair.log("b"))
    began_ms = pair.now_ms()
    _send_from_a(pair.lab, _hostile(recorded, 10_000))
    time.sleep(1)
    after = pair.lab.b.status()
    assert pair.events("b", began_ms) == []
    assert pair.moves("a", began_ms) == []
    for key in ("phase", "row", "epoch", "promise", "serving"):
        assert after[key] == before[key]
    assert _sum(after, "forged", "malformed", "other_version", "own_role") >= 5000
    # Of a session that still lives they are old; of an earlier life nobody ever confirms them.
    ignored = "datagram_unconfirmed" if restarted == "a" else "datagram_old"
    more = after["counters"].get(ignored, 0) - before["counters"].get(ignored, 0)
    assert more >= 0.9 * sum(_is_heartbeat(content) for content in recorded)
    assert len(pair.log("b")) - log_before < 20_000
    assert _reaches(pair.lab, VIP)


def _record(lab: Lab) -> list[bytes]:
    """A second of what node a really sends."""
    lab.observer.keep_datagrams()
    time.sleep(1)
    recorded = {d.content for d in lab.look().datagrams() if d.node == "a"}
    lab.observer.keep_datagrams(False)
    assert sum(map(_is_heartbeat, recorded)) >= 8
    return sorted(recorded)


def _is_heartbeat(content: bytes) -> bool:
    """Not a page of facts: by the kind, behind the magic and the version."""
    return content[5] >> 4 == 0


def _restart_by_force(pair: Pair, name: str) -> None:
    killed_ms = pair.now_ms()
    pair.daemon(name).kill()
    pair.start(name)
    pair.wait_phase(name, "ACTIVE" if name == "a" else "PASSIVE", since_ms=killed_ms)
    time.sleep(0.5)


def _sum(status: dict[str, Any], *keys: str) -> int:
    return sum(link[key] for link in status["links"] for key in keys)


def _hostile(recorded: list[bytes], count: int) -> list[bytes]:
    """Random bytes, and real datagrams of an earlier life: whole, cut short, or altered."""
    dice = random.Random(20261121)
    made = list(recorded)
    while len(made) < count:
        real = bytearray(dice.choice(recorded))
        match dice.randrange(4):
            case 0:
                made.append(dice.randbytes(dice.randrange(1, 1400)))
            case 1:
                made.append(bytes(real[: dice.randrange(len(real))]))
            case 2:
                real[dice.randrange(len(real))] ^= 1 << dice.randrange(8)
                made.append(bytes(real))
            case _:
                made.append(bytes(real) + dice.randbytes(8))
    return made


def _send_from_a(lab: Lab, datagrams: list[bytes]) -> None:
    def work() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("10.77.0.1", 0))
            for number, datagram in enumerate(datagrams):
                sock.sendto(datagram, ("10.77.0.2", PORT))
                if number % 20 == 0:
                    time.sleep(0.002)

    lab.a.inside(work)


# ------------------------------------------------------------------ 11: several VIPs


def test_two_vips_and_an_ipv6_vip_move_as_one(lab: Lab) -> None:
    vips = (VIP, SECOND_VIP, VIP6)
    pair = Pair(lab, vips=vips)
    pair.settle()
    for vip in vips:
        assert _reaches(lab, vip)
        assert lab.look().holders(vip) == {"a"}
    lab.power_cut("a")
    pair.wait_phase("b", "ACTIVE")
    for vip in vips:
        assert _reaches(lab, vip, within_s=5)
        assert lab.look().holders(vip) == {"b"}
    pair.assert_never_two(*vips)


# ------------------------------------------------------------------ without nftables

IPTABLES = """
[timing]
takeover_after = "3200ms"
[firewall]
backend = "iptables"
"""


def test_without_nftables_the_longer_wait_keeps_two_from_serving(lab: Lab) -> None:
    pair = Pair(lab, tables=IPTABLES)
    pair.settle()
    writer = lab.write_records()
    writer.wait_acked(20)
    assert not _reaches(lab, "10.77.0.2")
    killed_ms = pair.now_ms()
    pair.daemon("a").kill()
    served = pair.wait_phase("b", "ACTIVE", since_ms=killed_ms)
    assert served.at_ms - killed_ms <= 3200 + SURVEY_MS + BUSY_MS
    writer.wait_acked(20)
    assert_only_moved(writer.stop(), served)
    pair.assert_never_two()


# ------------------------------------------------------------------ 12: planned restarts


@pytest.mark.timeout(180)
def test_ten_planned_restarts_disturb_no_client(lab: Lab) -> None:
    pair = Pair(lab, env={"NFSHA_STOP_REASON": "restart"})
    pair.settle()
    writer = lab.write_records(interval_ms=5)
    writer.wait_acked(20)
    began_ms = pair.now_ms()
    for _ in range(10):
        again_ms = pair.now_ms()
        assert pair.daemon("a").stop() == 0
        pair.start("a")
        pair.wait_event("a", lambda e: e.row == "S20", "adoption", since_ms=again_ms, within_s=8)
        writer.wait_acked(20)
    records = writer.stop()
    assert not records.failed
    assert records.longest_stall_ms <= 50 + BUSY_MS
    slow = [one for one in records.attempts if one.took_ms > 50]
    assert len(slow) <= len(records.attempts) // 200, [one.took_ms for one in slow]
    assert pair.moves("b", began_ms) == []
    assert {hold.node for hold in lab.look().holds(VIP)} == {"a"}


# ------------------------------------------------------------------ 13: the passive node's address


def test_passive_nodes_own_address_answers_nothing_and_refuses_nothing(pair: Pair) -> None:
    pair.settle()
    began_ns = pair.lab.now_ns()
    assert not _reaches(pair.lab, "10.77.0.2")
    seen = pair.lab.look()
    assert not seen.refusals("10.77.0.2", began_ns)
    assert not seen.replies("10.77.0.2", began_ns)


def _reaches(lab: Lab, address: str, within_s: float = 1.0) -> bool:
    """Does the client get an answer of NFS v3 from this address?"""
    deadline = time.monotonic() + within_s
    while True:
        answer = lab.c.inside(lambda: rpc_null(address, 2049, NFS_PROGRAM, 3))
        if answer == 0 or time.monotonic() > deadline:
            return answer == 0

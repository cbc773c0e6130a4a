"""Announcements, claims and surveys between real kernels on a bridge."""

import asyncio
import json
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, IPv6Interface

import pytest

from nfsha.vip import packets
from nfsha.vip.announce import ANNOUNCE_AT_MS, Announcer
from nfsha.vip.rtnetlink import Vip, VipRefused
from tests.netns.namespaces import Namespace, connect, inside, namespaces

V4 = IPv4Address("10.77.0.9")
V6 = IPv6Address("fd77::9")
VIPS: tuple[Vip, ...] = (V4, V6)
CLIENT = (IPv4Address("10.77.0.50"), IPv6Address("fd77::50"))
ABSENT = (IPv4Address("10.77.0.99"), IPv6Address("fd77::99"))
ETH_P_ALL = 3


def boottime_ms() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class Lan:
    """Two nodes and a client, each with `e0` on one bridge."""

    def __init__(self, lan: Namespace, one: Namespace, two: Namespace, client: Namespace) -> None:
        self.lan, self.one, self.two, self.client = lan, one, two, client
        self.claims: list[tuple[Vip, str]] = []
        self.may_announce = True
        lan.ip("link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        lan.ip("link", "set", "br0", "up")
        for number, node in enumerate((one, two, client)):
            self.plug(node, number)
            if node is not client:
                self.address(node, f"10.77.0.{number + 1}/24", f"fd77::{number + 1}/64")
        self.address(client, f"{CLIENT[0]}/24", f"{CLIENT[1]}/64")

    def plug(self, node: Namespace, number: int) -> None:
        connect(self.lan, f"p{number}", node, "e0")
        self.lan.ip("link", "set", f"p{number}", "master", "br0")
        # Until duplicate address detection has ended, the link-local address cannot be used.
        node.exec("sysctl", "-q", "-w", "net.ipv6.conf.e0.accept_dad=0")
        node.ip("link", "set", "e0", "down")
        node.ip("link", "set", "e0", "up")

    def address(self, node: Namespace, v4: str, v6: str) -> None:
        node.ip("address", "add", v4, "dev", "e0")
        node.ip("address", "add", v6, "dev", "e0", "nodad")
        # The kernel listens for questions about it a moment later, by a worker (30 ms were seen).
        low = int(IPv6Interface(v6).ip) & 0xFFFFFF
        asked_at = str(IPv6Address(int(IPv6Address("ff02::1:ff00:0")) | low))
        deadline = time.monotonic() + 5
        while asked_at not in node.ip("maddress", "show", "dev", "e0").split():
            assert time.monotonic() < deadline, f"{v6} does not listen at {asked_at}"

    def hold(self, node: Namespace) -> None:
        self.address(node, f"{V4}/32", f"{V6}/128")

    def release(self, node: Namespace) -> None:
        node.ip("address", "del", f"{V4}/32", "dev", "e0")
        node.ip("address", "del", f"{V6}/128", "dev", "e0")

    def mac(self, node: Namespace) -> str:
        (link,) = json.loads(node.ip("-j", "link", "show", "dev", "e0"))
        return str(link["address"])

    def neighbours(self, node: Namespace) -> dict[str, str | None]:
        return {
            entry["dst"]: entry.get("lladdr")
            for entry in json.loads(node.ip("-j", "neigh", "show", "dev", "e0"))
        }

    def announcer(self, vips: tuple[Vip, ...] = VIPS, interface: str = "e0") -> Announcer:
        return Announcer(
            interface,
            vips,
            boottime_ms,
            lambda *claim: self.claims.append(claim),
            lambda: self.may_announce,
        )

    def run(
        self,
        body: Callable[[Announcer], Awaitable[None]],
        node: Namespace | None = None,
        vips: tuple[Vip, ...] = VIPS,
    ) -> None:
        """Runs `body` with a started announcer on a node; an error in a callback fails it."""
        errors: list[dict[str, object]] = []

        async def scene() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, what: errors.append(what))
            announcer = self.announcer(vips)
            await announcer.start()
            try:
                await body(announcer)
            finally:
                announcer.close()

        with inside(node or self.one):
            asyncio.run(scene())
        assert errors == []


@pytest.fixture
def lan() -> Iterator[Lan]:
    with namespaces("lan", "one", "two", "client") as (bridge, one, two, client):
        yield Lan(bridge, one, two, client)


class Capture:
    """All frames that arrive at a node's `e0`, each with its time."""

    def __init__(self, node: Namespace) -> None:
        with inside(node):
            self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            self.socket.bind(("e0", ETH_P_ALL))
        self.socket.setblocking(False)

    def __enter__(self) -> "Capture":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def frames(self) -> list[bytes]:
        found: list[bytes] = []
        while True:
            try:
                data, origin = self.socket.recvfrom(2048)
            except BlockingIOError:
                return found
            if origin[2] != socket.PACKET_OUTGOING:
                found.append(data)


def expected_announcements(mac: str) -> set[bytes]:
    raw = bytes.fromhex(mac.replace(":", ""))
    return {*packets.arp_announcements(raw, V4), packets.unsolicited_advertisement(raw, V6)}


def touch_vips(lan: Lan) -> None:
    """The client sends a datagram to each VIP, so that its kernel must know their links."""
    with inside(lan.client):
        for family, vip in ((socket.AF_INET, V4), (socket.AF_INET6, V6)):
            with socket.socket(family, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"?", (str(vip), 9))
    deadline = time.monotonic() + 5
    while not all(lan.neighbours(lan.client).get(str(vip)) for vip in VIPS):
        assert time.monotonic() < deadline, lan.neighbours(lan.client)
        time.sleep(0.02)


def test_announcements_reach_the_others_by_the_schedule(lan: Lan) -> None:
    wanted = expected_announcements(lan.mac(lan.one))

    async def body(announcer: Announcer) -> None:
        started = time.monotonic()
        announcer.announce()
        seen_at: dict[bytes, list[float]] = {frame: [] for frame in wanted}
        while time.monotonic() < started + ANNOUNCE_AT_MS[-1] / 1000 + 0.5:
            for frame in capture.frames():
                if frame in wanted:
                    seen_at[frame].append((time.monotonic() - started) * 1000)
            await asyncio.sleep(0.005)
        for times in seen_at.values():
            assert len(times) == len(ANNOUNCE_AT_MS), times
            for at_ms, due_ms in zip(times, ANNOUNCE_AT_MS, strict=True):
                assert due_ms - 5 <= at_ms <= due_ms + 400

    with Capture(lan.client) as capture:
        lan.run(body)


def test_silence_ends_the_schedule(lan: Lan) -> None:
    wanted = expected_announcements(lan.mac(lan.one))

    async def body(announcer: Announcer) -> None:
        announcer.announce()
        announcer.silence()
        announcer.silence()
        await asyncio.sleep(0.5)
        assert len([frame for frame in capture.frames() if frame in wanted]) == len(wanted)

    with Capture(lan.client) as capture:
        lan.run(body)


def test_a_schedule_that_outlived_its_reason_says_nothing(lan: Lan) -> None:
    wanted = expected_announcements(lan.mac(lan.one))

    async def body(announcer: Announcer) -> None:
        announcer.announce()
        lan.may_announce = False
        await asyncio.sleep(0.5)
        assert len([frame for frame in capture.frames() if frame in wanted]) == len(wanted)

    with Capture(lan.client) as capture:
        lan.run(body)


def test_the_clients_neighbour_cache_moves(lan: Lan) -> None:
    lan.hold(lan.one)
    touch_vips(lan)
    before = lan.neighbours(lan.client)
    assert before[str(V4)] == before[str(V6)] == lan.mac(lan.one)
    lan.release(lan.one)
    lan.hold(lan.two)

    async def body(announcer: Announcer) -> None:
        await asyncio.sleep(0.1)
        assert lan.neighbours(lan.client) == before  # the kernel alone does not move it
        announcer.announce()
        announcer.silence()  # one announcement is enough where none is lost
        await asyncio.sleep(0.1)
        after = lan.neighbours(lan.client)
        assert after[str(V4)] == after[str(V6)] == lan.mac(lan.two)

    lan.run(body, node=lan.two)


def test_a_survey_finds_the_holder_and_poisons_nobody(lan: Lan) -> None:
    lan.hold(lan.two)
    touch_vips(lan)

    async def body(announcer: Announcer) -> None:
        found = await announcer.survey(VIPS, CLIENT)
        assert found.answered == {V4: lan.mac(lan.two), V6: lan.mac(lan.two)}
        assert found.heard_other
        assert found.others == set(CLIENT)
        assert found.rounds == 3
        assert found.ended_ms - found.started_ms >= 299
        assert announcer.trouble is None

    lan.run(body)
    known = lan.neighbours(lan.client)
    assert known[str(V4)] == known[str(V6)] == lan.mac(lan.two)
    assert {address for address, mac in known.items() if mac == lan.mac(lan.one)} <= {
        "10.77.0.1",
        *(address for address in known if address.startswith("fe80:")),
    }


def test_one_short_round_finds_the_holder_too(lan: Lan) -> None:
    lan.hold(lan.two)

    async def body(announcer: Announcer) -> None:
        found = await announcer.survey(VIPS, CLIENT, rounds=1, over_ms=200)
        assert set(found.answered) == set(VIPS)
        assert found.heard_other

    lan.run(body)


def test_silence_about_the_vip_counts_when_another_answers(lan: Lan) -> None:
    async def body(announcer: Announcer) -> None:
        found = await announcer.survey(VIPS, [CLIENT[0], ABSENT[0]])
        assert found.answered == {}
        assert found.heard_other
        assert found.others == {CLIENT[0]}

    lan.run(body)


@pytest.mark.parametrize("others", [(), ABSENT])
def test_silence_does_not_count_when_nobody_answers(lan: Lan, others: tuple[Vip, ...]) -> None:
    async def body(announcer: Announcer) -> None:
        found = await announcer.survey(VIPS, others)
        assert found.answered == {}
        assert not found.heard_other

    lan.run(body)


def test_a_node_without_ipv4_address_can_ask(lan: Lan) -> None:
    lan.hold(lan.two)
    lan.one.ip("-4", "address", "flush", "dev", "e0")

    async def body(announcer: Announcer) -> None:
        found = await announcer.survey([V4], [CLIENT[0]])
        assert found.answered == {V4: lan.mac(lan.two)}
        assert found.others == {CLIENT[0]}

    lan.run(body, vips=(V4,))


def test_an_ipv6_question_that_cannot_be_asked_makes_silence_worthless(lan: Lan) -> None:
    lan.one.ip("-6", "address", "flush", "dev", "e0")

    async def body(announcer: Announcer) -> None:
        found = await announcer.survey(VIPS, [CLIENT[0]])
        assert found.others == {CLIENT[0]}
        assert found.rounds == 0
        assert not found.heard_other
        assert announcer.trouble == "e0 has no IPv6 address to ask from"

    lan.run(body)


def test_the_own_kernel_does_not_answer(lan: Lan) -> None:
    lan.hold(lan.one)

    async def body(announcer: Announcer) -> None:
        found = await announcer.survey(VIPS, CLIENT)
        assert found.answered == {}
        assert found.heard_other
        assert lan.claims == []

    lan.run(body)


def test_an_answer_that_was_read_late_still_counts(lan: Lan) -> None:
    lan.hold(lan.two)

    async def body(announcer: Announcer) -> None:
        asked = asyncio.ensure_future(announcer.survey(VIPS, CLIENT))
        await asyncio.sleep(0.05)  # the first questions have gone out
        time.sleep(0.6)  # noqa: ASYNC251 - the loop is frozen beyond the survey's end
        found = await asked
        assert set(found.answered) == set(VIPS)
        assert found.heard_other
        assert found.ended_ms - found.started_ms >= 600

    lan.run(body)


def test_an_answer_behind_a_heap_of_others_still_counts(lan: Lan) -> None:
    one, two = (bytes.fromhex(lan.mac(node).replace(":", "")) for node in (lan.one, lan.two))
    junk = packets.arp_announcements(two, ABSENT[0])[1]
    answer = packets.arp_announcements(two, V4)[1]

    async def body(announcer: Announcer) -> None:
        asked = asyncio.ensure_future(announcer.survey([V4], CLIENT[:1], rounds=1, over_ms=100))
        await asyncio.sleep(0)
        for frame in [junk] * 200 + [answer]:
            raw.send(one + frame[6:])
        time.sleep(0.2)  # noqa: ASYNC251 - the loop is frozen beyond the survey's end
        assert (await asked).answered == {V4: lan.mac(lan.two)}

    with inside(lan.two), Capture(lan.two) as sender:
        raw = sender.socket
        lan.run(body, vips=(V4,))


def test_a_strangers_broadcast_is_no_answer_to_us(lan: Lan) -> None:
    two = bytes.fromhex(lan.mac(lan.two).replace(":", ""))

    async def body(announcer: Announcer) -> None:
        asked = asyncio.ensure_future(announcer.survey([V4], ABSENT[:1]))
        await asyncio.sleep(0.1)
        raw.send(packets.arp_announcements(two, ABSENT[0])[1])
        found = await asked
        assert found.others == set()
        assert not found.heard_other

    with inside(lan.two), Capture(lan.two) as sender:
        raw = sender.socket
        lan.run(body)


def test_our_own_announcement_sent_back_is_no_claim(lan: Lan) -> None:
    async def body(announcer: Announcer) -> None:
        asked = asyncio.ensure_future(announcer.survey(VIPS, CLIENT))
        await asyncio.sleep(0.1)
        for frame in expected_announcements(lan.mac(lan.one)):
            raw.send(frame)
        assert (await asked).answered == {}
        assert lan.claims == []

    with inside(lan.two), Capture(lan.two) as sender:
        raw = sender.socket
        lan.run(body)


def test_a_question_never_claims_the_vip(lan: Lan) -> None:
    lan.one.ip("-4", "address", "flush", "dev", "e0")
    lan.hold(lan.one)

    async def body(announcer: Announcer) -> None:
        assert (await announcer.survey([V4], CLIENT[:1])).heard_other
        said = [packets.heard(frame) for frame in capture.frames()]
        assert len([one for one in said if one is not None]) >= 3
        assert [one for one in said if one is not None and one.address == V4] == []

    with Capture(lan.client) as capture:
        lan.run(body)


def test_a_claim_by_another_is_told_once_a_second(lan: Lan) -> None:
    claims = expected_announcements(lan.mac(lan.two))

    async def body(announcer: Announcer) -> None:
        for _ in range(50):
            for frame in claims:
                raw.send(frame)
        await asyncio.sleep(0.3)
        assert sorted(lan.claims, key=str) == [(V4, lan.mac(lan.two)), (V6, lan.mac(lan.two))]
        await asyncio.sleep(0.8)
        raw.send(next(iter(claims)))
        await asyncio.sleep(0.1)
        assert len(lan.claims) == 3

    with inside(lan.two), Capture(lan.two) as sender:
        raw = sender.socket
        lan.run(body)


def test_a_flood_of_made_up_claims_is_bounded(lan: Lan) -> None:
    async def body(announcer: Announcer) -> None:
        for number in range(400):
            raw.send(
                packets.arp_announcements(bytes([2, 0, 0, 0, number >> 8, number & 255]), V4)[0]
            )
        await asyncio.sleep(0.3)
        assert len(lan.claims) == 64

    with inside(lan.two), Capture(lan.two) as sender:
        raw = sender.socket
        lan.run(body)


def test_garbage_and_short_frames_do_no_harm(lan: Lan) -> None:
    dice = random.Random(77)
    wire = bytes.fromhex(lan.mac(lan.one).replace(":", "")) + os.urandom(6)
    good = [frame[14:] for frame in expected_announcements(lan.mac(lan.two))]

    async def body(announcer: Announcer) -> None:
        for _ in range(600):
            kind = dice.choice([b"\x08\x06", b"\x86\xdd"])
            content = bytearray(dice.choice([*good, dice.randbytes(60)]))
            content[dice.randrange(len(content))] = dice.randrange(256)
            raw.send(wire + kind + bytes(content[: dice.randrange(len(content) + 1)]))
        await asyncio.sleep(0.2)
        lan.hold(lan.two)
        assert set((await announcer.survey(VIPS, CLIENT)).answered) == set(VIPS)

    with inside(lan.two), Capture(lan.two) as sender:
        raw = sender.socket
        lan.run(body)


def test_ordinary_traffic_does_not_wake_the_daemon(
    lan: Lan, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[object] = []
    monkeypatch.setattr(Announcer, "_on_readable", lambda self, port: woken.append(port))

    async def body(announcer: Announcer) -> None:
        with inside(lan.client):
            for family, to in ((socket.AF_INET, "10.77.0.1"), (socket.AF_INET6, "fd77::1")):
                with socket.socket(family, socket.SOCK_DGRAM) as sender:
                    for _ in range(100):
                        sender.sendto(b"data", (to, 2049))
                        await asyncio.sleep(0)
        await asyncio.sleep(0.1)
        # The client asked for our links; no answer to us was among it.
        assert woken == []

    with inside(lan.one), Capture(lan.one) as capture:
        lan.run(body)
        assert len(capture.frames()) >= 200


def test_a_link_that_goes_down_and_up_is_used_again(lan: Lan) -> None:
    lan.hold(lan.two)

    async def body(announcer: Announcer) -> None:
        lan.one.ip("link", "set", "e0", "down")
        announcer.announce()
        found = await announcer.survey(VIPS, CLIENT)
        assert (found.rounds, found.heard_other, found.answered) == (0, False, {})
        assert announcer.trouble is not None
        lan.one.ip("link", "set", "e0", "up")
        await asyncio.sleep(0.2)
        found = await announcer.survey([V4], CLIENT[:1])
        assert found.answered == {V4: lan.mac(lan.two)}
        assert found.heard_other

    lan.run(body)


def test_a_cable_that_is_pulled_makes_silence_worthless(lan: Lan) -> None:
    async def body(announcer: Announcer) -> None:
        lan.lan.ip("link", "set", "p0", "down")
        found = await announcer.survey(VIPS, CLIENT)
        assert not found.heard_other
        lan.lan.ip("link", "set", "p0", "up")
        await asyncio.sleep(0.2)
        assert (await announcer.survey([V4], CLIENT[:1])).heard_other

    lan.run(body)


def test_an_interface_made_anew_is_heard_again(lan: Lan) -> None:
    async def body(announcer: Announcer) -> None:
        lan.one.ip("link", "del", "e0")
        announcer.announce()
        assert not (await announcer.survey(VIPS, CLIENT)).heard_other
        lan.plug(lan.one, 0)
        deadline = time.monotonic() + 10
        frame = packets.arp_announcements(bytes.fromhex(lan.mac(lan.two).replace(":", "")), V4)[0]
        while not lan.claims and time.monotonic() < deadline:
            raw.send(frame)
            await asyncio.sleep(0.1)
        assert lan.claims == [(V4, lan.mac(lan.two))]
        assert (await announcer.survey([V4], CLIENT[:1])).heard_other

    with inside(lan.two), Capture(lan.two) as sender:
        raw = sender.socket
        lan.run(body)


@pytest.mark.parametrize(
    ("interface", "words"), [("lo", "not Ethernet"), ("e7", "e7 does not exist")]
)
def test_an_unfit_interface_is_refused(lan: Lan, interface: str, words: str) -> None:
    async def scene() -> None:
        with pytest.raises(VipRefused, match=words):
            await lan.announcer(interface=interface).start()

    with inside(lan.one):
        asyncio.run(scene())

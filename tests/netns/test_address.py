"""The address lease against the real kernel, in namespaces of its own."""

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import IPv4Address, IPv6Address

import pytest
from pyroute2.netlink.rtnl import RTM_NEWADDR
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

from nfsha.vip.address import (
    AddressDriver,
    AddressNotice,
    LeaseResult,
    NoticeKind,
    Outcome,
    VipRefused,
)
from nfsha.vip.rtnetlink import AddressEntry, Vip
from tests.netns.namespaces import Namespace, connect, inside, namespaces

V4 = IPv4Address("10.77.0.9")
V4_SECOND = IPv4Address("10.77.0.10")
V6 = IPv6Address("fd77::9")
ALL: tuple[Vip, ...] = (V4, V4_SECOND, V6)
FAR_MS = 10**15  # a deadline that never comes
BUSY_MS = 600  # allowance for a busy machine, on upper bounds only


def boottime_ms() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class Clock:
    """The real clock, which leaps by `leap_ms` at its `at`-th reading from when that is set."""

    def __init__(self) -> None:
        self.offset_ms = 0
        self.leap_ms = 0
        self.at = 0

    def __call__(self) -> int:
        if self.at:
            self.at -= 1
            if self.at == 0:
                self.offset_ms += self.leap_ms
        return boottime_ms() + self.offset_ms


class Bench:
    """One driver on `e0` of namespace `node`, whose veth peer is in `other`."""

    def __init__(self, node: Namespace, other: Namespace) -> None:
        self.node = node
        self.other = other
        self.clock = Clock()
        self.notices: list[AddressNotice] = []

    def driver(self, vips: tuple[Vip, ...] = ALL, lease_ms: int = 2000) -> AddressDriver:
        return AddressDriver("e0", vips, lease_ms, self.clock, self.notices.append)

    def run(
        self,
        body: Callable[[AddressDriver], Awaitable[None]],
        vips: tuple[Vip, ...] = ALL,
        lease_ms: int = 2000,
    ) -> None:
        """Runs `body` with a started driver, inside the node."""

        async def scene() -> None:
            driver = self.driver(vips, lease_ms)
            await driver.start()
            try:
                await body(driver)
            finally:
                await driver.close()

        with inside(self.node):
            asyncio.run(scene())

    def shown(self, interface: str = "e0") -> dict[str, dict[str, object]]:
        """What `ip` shows of the VIPs on the interface, by address."""
        links = json.loads(self.node.ip("-j", "address", "show", "dev", interface))
        infos = [info for link in links for info in link.get("addr_info", [])]
        return {i["local"]: i for i in infos if i["local"] in set(map(str, ALL))}

    def commotion(self, events: int) -> None:
        """Makes address events that are nobody's business."""
        lines = "\n".join(
            f"address add 10.78.{n // 250}.{n % 250}/32 dev lo" for n in range(events)
        )
        self.node.exec("sh", "-c", f"printf '{lines}\n' | ip -batch -")

    async def noticed(
        self, kind: NoticeKind, vip: Vip | None, within_s: float = 3
    ) -> AddressNotice:
        """Waits for a notice, and fails if it does not come."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            for notice in self.notices:
                if (notice.kind, notice.vip) == (kind, vip):
                    return notice
            await asyncio.sleep(0.01)
        raise AssertionError(f"no {kind} for {vip} within {within_s} s, only {self.notices}")


@pytest.fixture
def bench() -> Iterator[Bench]:
    with namespaces("address", "peer") as (node, other):
        connect(node, "e0", other, "e0")
        node.ip("address", "add", "10.77.0.1/24", "dev", "e0")
        node.ip("address", "add", "fd77::1/64", "dev", "e0", "nodad")
        yield Bench(node, other)


def ended(result: LeaseResult, outcome: Outcome) -> None:
    assert result.outcome is outcome, result
    assert result.lease_end_ms is None
    assert result.why


def test_two_vips_and_an_ipv6_vip_come_and_go_as_one(bench: Bench) -> None:
    async def body(driver: AddressDriver) -> None:
        before_ms = boottime_ms()
        result = await driver.add(FAR_MS)
        assert result.held, result
        assert result.lease_end_ms is not None
        assert before_ms + 2000 <= result.lease_end_ms <= boottime_ms() + 2000
        assert await driver.held() == set(ALL)
        shown = bench.shown()
        assert {a: i["prefixlen"] for a, i in shown.items()} == {
            str(V4): 32,
            str(V4_SECOND): 32,
            str(V6): 128,
        }
        assert all(0 < int(str(i["valid_life_time"])) <= 2 for i in shown.values())
        assert shown[str(V6)].get("nodad") is True
        assert "tentative" not in shown[str(V6)]
        await driver.remove()
        assert await driver.held() == set()
        assert bench.shown() == {}
        await driver.remove()
        await asyncio.sleep(0.1)
        assert bench.notices == []

    bench.run(body)


def test_the_node_does_not_speak_from_the_vip_by_itself(bench: Bench) -> None:
    async def body(driver: AddressDriver) -> None:
        assert (await driver.add(FAR_MS)).held
        for family, far in ((socket.AF_INET, "10.77.0.2"), (socket.AF_INET6, "fd77::2")):
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((far, 9))
                assert probe.getsockname()[0] in ("10.77.0.1", "fd77::1")

    bench.run(body)


def test_the_kernel_ends_the_lease_by_itself(bench: Bench) -> None:
    async def body(driver: AddressDriver) -> None:
        start_ms = boottime_ms()
        assert (await driver.add(FAR_MS)).held
        added_ms = boottime_ms()
        gone_ms: dict[Vip, int] = {}
        while len(gone_ms) < len(ALL) and boottime_ms() < added_ms + 6000:
            held = await driver.held()
            gone_ms |= {vip: boottime_ms() for vip in ALL if vip not in held | gone_ms.keys()}
            await asyncio.sleep(0.02)
        print("life in ms:", {str(vip): at - start_ms for vip, at in gone_ms.items()})
        for vip in ALL:
            assert gone_ms[vip] >= start_ms + 2000
            assert gone_ms[vip] <= added_ms + 2400 + BUSY_MS
        notice = bench.notices[0]
        assert notice.kind is NoticeKind.REMOVED
        assert "lease ended" in notice.detail
        ended(await driver.renew(FAR_MS), Outcome.LOST)
        assert bench.shown() == {}

    bench.run(body)


def test_renewals_keep_the_address_and_make_no_notice(bench: Bench) -> None:
    async def body(driver: AddressDriver) -> None:
        result = await driver.add(FAR_MS)
        for _ in range(12):
            await asyncio.sleep(0.3)
            result = await driver.renew(boottime_ms() + 600)
            assert result.held, result
            assert await driver.held() == set(ALL)
        assert bench.notices == []

    bench.run(body)


@pytest.mark.parametrize(("reading", "case"), [(1, "before the call"), (2, "during the call")])
def test_a_renewal_after_the_lease_ran_out_removes_at_once(
    bench: Bench, reading: int, case: str
) -> None:
    async def body(driver: AddressDriver) -> None:
        assert (await driver.add(FAR_MS)).held
        bench.clock.leap_ms, bench.clock.at = 2500, reading
        ended(await driver.renew(FAR_MS), Outcome.EXPIRED)
        assert bench.shown() == {}, case
        ended(await driver.renew(FAR_MS), Outcome.LOST)
        assert bench.shown() == {}

    bench.run(body)


@pytest.mark.parametrize("reading", [1, 2])
def test_a_renewal_after_the_evidence_ran_out_removes_at_once(bench: Bench, reading: int) -> None:
    async def body(driver: AddressDriver) -> None:
        assert (await driver.add(FAR_MS)).held
        bench.clock.leap_ms, bench.clock.at = 700, reading
        ended(await driver.renew(boottime_ms() + 600), Outcome.LATE)
        assert bench.shown() == {}

    bench.run(body)


@pytest.mark.parametrize(("reading", "why"), [(1, Outcome.LATE), (2, Outcome.LATE)])
def test_an_addition_that_comes_late_leaves_nothing(
    bench: Bench, reading: int, why: Outcome
) -> None:
    async def body(driver: AddressDriver) -> None:
        bench.clock.leap_ms, bench.clock.at = 700, reading
        ended(await driver.add(boottime_ms() + 600), why)
        assert bench.shown() == {}
        await asyncio.sleep(0.1)
        assert bench.notices == []

    bench.run(body)


def test_an_addition_longer_than_its_own_lease_leaves_nothing(bench: Bench) -> None:
    async def body(driver: AddressDriver) -> None:
        bench.clock.leap_ms, bench.clock.at = 2500, 2
        ended(await driver.add(FAR_MS), Outcome.EXPIRED)
        assert bench.shown() == {}

    bench.run(body)


def test_a_frozen_daemon_revives_nothing_even_by_a_clock_that_stood_still(bench: Bench) -> None:
    async def body(driver: AddressDriver) -> None:
        assert (await driver.add(FAR_MS)).held
        time.sleep(1.6 + BUSY_MS / 1000)  # noqa: ASYNC251 - the loop itself is frozen here
        bench.clock.offset_ms -= 2200
        ended(await driver.renew(FAR_MS), Outcome.LOST)
        assert bench.shown() == {}

    bench.run(body, lease_ms=1000)


@pytest.mark.parametrize("vip", [V4, V6])
def test_a_removal_between_check_and_renewal_is_found(
    bench: Bench, vip: Vip, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(driver: AddressDriver) -> None:
        assert (await driver.add(FAR_MS)).held
        kernel = driver._opened()
        put = kernel.put

        async def gone_in_between(index: int, first: Vip, valid_s: int) -> int:
            monkeypatch.setattr(kernel, "put", put)
            bench.commotion(50)  # what comes before the removal takes the loop many turns
            bench.node.ip("address", "del", f"{vip}/{vip.max_prefixlen}", "dev", "e0")
            return await put(index, first, valid_s)

        monkeypatch.setattr(kernel, "put", gone_in_between)
        ended(await driver.renew(FAR_MS), Outcome.LOST)
        assert bench.shown() == {}

    bench.run(body)


@pytest.mark.parametrize("vip", [V4, V6])
def test_a_foreign_removal_is_noticed_and_ends_the_lease(bench: Bench, vip: Vip) -> None:
    async def body(driver: AddressDriver) -> None:
        assert (await driver.add(FAR_MS)).held
        bench.node.ip("address", "del", f"{vip}/{vip.max_prefixlen}", "dev", "e0")
        notice = await bench.noticed(NoticeKind.REMOVED, vip)
        assert "another program" in notice.detail
        assert len(bench.shown()) == 2
        ended(await driver.renew(FAR_MS), Outcome.LOST)
        assert bench.shown() == {}
        assert (await driver.add(FAR_MS)).held
        await asyncio.sleep(0.1)
        assert len(bench.notices) == 1

    bench.run(body)


@pytest.mark.parametrize("vip", [V4, V6])
def test_a_vip_made_permanent_while_held_is_noticed_and_removed(bench: Bench, vip: Vip) -> None:
    async def body(driver: AddressDriver) -> None:
        assert (await driver.add(FAR_MS)).held
        bench.node.ip("address", "change", f"{vip}/{vip.max_prefixlen}", "dev", "e0",
                      "valid_lft", "forever", "preferred_lft", "forever")  # fmt: skip
        await bench.noticed(NoticeKind.PERMANENT, vip)
        ended(await driver.renew(FAR_MS), Outcome.LOST)
        assert bench.shown() == {}

    bench.run(body)


def test_a_vip_added_by_another_while_we_hold_none_is_noticed(bench: Bench) -> None:
    async def body(driver: AddressDriver) -> None:
        bench.node.ip("address", "add", f"{V4}/32", "dev", "e0", "valid_lft", "60",
                      "preferred_lft", "60")  # fmt: skip
        await bench.noticed(NoticeKind.ADDED, V4)
        bench.node.ip("address", "add", f"{V6}/64", "dev", "e0", "nodad")
        await bench.noticed(NoticeKind.PERMANENT, V6)
        result = await driver.add(FAR_MS)
        ended(result, Outcome.PERMANENT)
        assert str(V6) in result.why
        assert set(bench.shown()) == {str(V4), str(V6)}
        await driver.remove()
        assert bench.shown() == {}

    bench.run(body)


def test_leftovers_with_other_prefixes_are_replaced(bench: Bench) -> None:
    bench.node.ip(
        "address", "add", f"{V4}/24", "dev", "e0", "valid_lft", "60", "preferred_lft", "60"
    )
    bench.node.ip("address", "add", f"{V6}/64", "dev", "e0", "valid_lft", "60",
                  "preferred_lft", "60", "nodad")  # fmt: skip

    async def body(driver: AddressDriver) -> None:
        assert (await driver.add(FAR_MS)).held
        prefixes = [i["prefixlen"] for i in bench.shown().values()]
        assert sorted(map(int, map(str, prefixes))) == [32, 32, 128]

    bench.run(body)


def refusal(bench: Bench) -> str:
    with pytest.raises(VipRefused) as refused:
        bench.run(nothing)
    return str(refused.value)


async def nothing(driver: AddressDriver) -> None:
    pass


@pytest.mark.parametrize("cidr", [f"{V4}/24", f"{V4}/32", f"{V6}/128"])
def test_a_permanent_vip_is_refused_at_start(bench: Bench, cidr: str) -> None:
    bench.node.ip("address", "add", cidr, "dev", "e0")
    message = refusal(bench)
    assert cidr in message
    assert f"ip address del {cidr} dev e0" in message
    assert len(bench.shown()) == 1


def test_a_vip_on_another_interface_is_refused_at_start(bench: Bench) -> None:
    bench.node.ip("address", "add", f"{V4}/32", "dev", "lo")
    assert f"{V4} is on another interface" in refusal(bench)


def test_an_absent_interface_is_refused_at_start(bench: Bench) -> None:
    bench.node.ip("link", "del", "e0")
    assert "e0 does not exist" in refusal(bench)


def test_an_interface_without_ipv6_is_refused_at_start(bench: Bench) -> None:
    bench.node.exec("sysctl", "-q", "-w", "net.ipv6.conf.e0.disable_ipv6=1")
    assert "IPv6 is switched off on e0" in refusal(bench)


def test_what_the_kernel_refuses_leaves_nothing_behind(bench: Bench) -> None:
    async def body(driver: AddressDriver) -> None:
        bench.node.exec("sysctl", "-q", "-w", "net.ipv6.conf.e0.disable_ipv6=1")
        result = await driver.add(FAR_MS)
        ended(result, Outcome.FAILED)
        assert str(V6) in result.why
        assert bench.shown() == {}

    bench.run(body)


@pytest.mark.parametrize("age_s", [0.05, 0.6, 1.2])
def test_a_new_daemon_adopts_the_address_and_goes_on(bench: Bench, age_s: float) -> None:
    truth_ms: list[int] = []

    async def first(driver: AddressDriver) -> None:
        result = await driver.add(FAR_MS)
        truth_ms.append(result.ended_ms + 2000)
        await asyncio.sleep(age_s)

    async def second(driver: AddressDriver) -> None:
        ended(await driver.renew(FAR_MS), Outcome.LOST)
        assert await driver.held() == set(ALL)
        result = await driver.adopt()
        assert result.held, result
        assert result.lease_end_ms is not None
        print("true end less adopted end, ms:", truth_ms[0] - result.lease_end_ms)
        assert result.lease_end_ms <= truth_ms[0]
        assert result.lease_end_ms >= truth_ms[0] - 1100
        assert (await driver.renew(FAR_MS)).held
        assert bench.notices == []

    bench.run(first)
    bench.run(second)


def test_half_a_leftover_is_not_adopted_and_not_touched(bench: Bench) -> None:
    async def first(driver: AddressDriver) -> None:
        assert (await driver.add(FAR_MS)).held
        await driver.extend(8, FAR_MS)

    async def second(driver: AddressDriver) -> None:
        result = await driver.adopt()
        ended(result, Outcome.LOST)
        assert str(V6) in result.why
        ended(await driver.renew(FAR_MS), Outcome.LOST)
        assert set(bench.shown()) == {str(V4), str(V4_SECOND)}
        await driver.remove()

    bench.run(first, vips=(V4, V4_SECOND))
    bench.run(second)


@pytest.mark.parametrize("way", ["add", "adopt"])
def test_a_removal_told_before_a_lease_is_taken_is_not_forgotten(
    bench: Bench, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel lists the VIP, somebody removes it, and the loop reads of that first."""

    async def leave_one(driver: AddressDriver) -> None:
        assert (await driver.add(FAR_MS)).held

    async def body(driver: AddressDriver) -> None:
        kernel = driver._opened()
        addresses = kernel.addresses

        async def gone_behind(index: int) -> list[AddressEntry]:
            listed = await addresses(index)
            if any(entry.address == V4 for entry in listed):
                monkeypatch.setattr(kernel, "addresses", addresses)
                bench.node.ip("address", "del", f"{V4}/32", "dev", "e0")
                await asyncio.sleep(0.02)
            return listed

        monkeypatch.setattr(kernel, "addresses", gone_behind)
        ended(await (driver.add(FAR_MS) if way == "add" else driver.adopt()), Outcome.LOST)
        assert bench.shown() == {}

    if way == "adopt":
        bench.run(leave_one, vips=(V4,))
    bench.run(body, vips=(V4,))


def test_an_announced_absence_lasts_as_long_as_it_says(bench: Bench) -> None:
    async def body(driver: AddressDriver) -> None:
        ended(await driver.extend(8, FAR_MS), Outcome.LOST)
        assert (await driver.add(FAR_MS)).held
        result = await driver.extend(8, boottime_ms() + 600)
        assert result.lease_end_ms == result.started_ms + 8000
        assert {str(i["valid_life_time"]) for i in bench.shown().values()} <= {"7", "8"}
        assert (await driver.renew(FAR_MS)).held
        assert {str(i["valid_life_time"]) for i in bench.shown().values()} <= {"1", "2"}

    bench.run(body)


def test_a_late_echo_of_our_own_addition_is_no_notice(bench: Bench) -> None:
    """A busy kernel tells of an added IPv6 address late, and never by whom: seen under load."""

    async def body(driver: AddressDriver) -> None:
        assert (await driver.add(FAR_MS)).held
        bench.node.ip("address", "del", f"{V4}/32", "dev", "e0")
        await bench.noticed(NoticeKind.REMOVED, V4)
        assert driver._link is not None
        echo = ifaddrmsg()
        echo["header"]["type"] = RTM_NEWADDR
        echo["family"], echo["prefixlen"], echo["index"] = socket.AF_INET6, 128, driver._link.index
        echo["attrs"] = [
            ("IFA_ADDRESS", str(V6)),
            ("IFA_CACHEINFO", {"ifa_preferred": 0, "ifa_valid": 2}),
        ]
        echo.encode()
        assert driver._events is not None
        driver._events.enqueue(echo.data, (0, 0))
        assert [notice.vip for notice in bench.notices] == [V4]

    bench.run(body)


def test_carrier_lost_and_back_is_noticed(bench: Bench) -> None:
    async def body(driver: AddressDriver) -> None:
        ready = [driver.link_ready]
        bench.other.ip("link", "set", "e0", "down")
        await bench.noticed(NoticeKind.CARRIER_LOST, None)
        ready.append(driver.link_ready)
        bench.other.ip("link", "set", "e0", "up")
        await bench.noticed(NoticeKind.CARRIER_BACK, None)
        ready.append(driver.link_ready)
        assert ready == [True, False, True]

    bench.run(body)


def test_a_link_set_down_loses_carrier_and_the_ipv6_vip(bench: Bench) -> None:
    async def body(driver: AddressDriver) -> None:
        assert (await driver.add(FAR_MS)).held
        bench.node.ip("link", "set", "e0", "down")
        await bench.noticed(NoticeKind.CARRIER_LOST, None)
        await bench.noticed(NoticeKind.REMOVED, V6)
        ended(await driver.renew(FAR_MS), Outcome.LOST)
        assert bench.shown() == {}

    bench.run(body)


def test_an_interface_that_goes_and_comes_back_serves_again(bench: Bench) -> None:
    async def body(driver: AddressDriver) -> None:
        assert (await driver.add(FAR_MS)).held
        bench.node.ip("link", "del", "e0")
        await bench.noticed(NoticeKind.INTERFACE_GONE, None)
        assert await driver.held() == set()
        ended(await driver.renew(FAR_MS), Outcome.LOST)
        ended(await driver.add(FAR_MS), Outcome.FAILED)
        await driver.remove()
        connect(bench.node, "e0", bench.other, "e0")
        await bench.noticed(NoticeKind.INTERFACE_BACK, None)
        assert (await driver.add(FAR_MS)).held

    bench.run(body)


@pytest.mark.parametrize("first", ["the loop", "a renewal"])
def test_a_removal_among_too_many_events_is_still_noticed(bench: Bench, first: str) -> None:
    async def body(driver: AddressDriver) -> None:
        assert (await driver.add(FAR_MS)).held
        assert driver._events is not None
        driver._events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        bench.commotion(200)
        bench.node.ip("address", "del", f"{V4}/32", "dev", "e0")
        if first == "a renewal":
            ended(await driver.renew(FAR_MS), Outcome.LOST)
        notice = await bench.noticed(NoticeKind.REMOVED, V4)
        assert "overflow" in notice.detail
        # And the next one is heard again.
        assert (await driver.add(FAR_MS)).held
        bench.node.ip("address", "del", f"{V6}/128", "dev", "e0")
        assert "another program" in (await bench.noticed(NoticeKind.REMOVED, V6)).detail

    bench.run(body)


def test_a_busy_stranger_cannot_flood_the_notices(bench: Bench) -> None:
    async def body(driver: AddressDriver) -> None:
        for _ in range(10):
            bench.node.ip("address", "add", f"{V4}/32", "dev", "e0")
            bench.node.ip("address", "del", f"{V4}/32", "dev", "e0")
        await bench.noticed(NoticeKind.PERMANENT, V4)
        await asyncio.sleep(0.1)
        assert len(bench.notices) <= 2

    bench.run(body)


def test_close_leaves_the_address_to_its_lease(bench: Bench) -> None:
    async def body(driver: AddressDriver) -> None:
        assert (await driver.add(FAR_MS)).held
        await driver.close()
        await driver.close()
        assert len(bench.shown()) == 3
        with pytest.raises(RuntimeError, match="not started"):
            await driver.held()

    bench.run(body)

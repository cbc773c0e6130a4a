"""The service lease in nftables against the real kernel: what the kernel ends by itself."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from nfsha.vip.freeze import FirewallError, Guarded, LeaseVerdict
from nfsha.vip.nftables import LEASE_MAX_MS, LEASE_MIN_MS, TABLE, NftablesLease, ruleset
from tests.netns import freezekit
from tests.netns.freezekit import (
    GUARDED,
    OWN,
    VIPS,
    Yard,
    boottime_ms,
    every,
    yard,
)
from tests.netns.namespaces import Namespace, inside, namespaces

LONG_MS = 20_000
EARLY_MS = 40  # the kernel's tick, a clock in whole ms, and a probe that waited for its turn
LATE_MS = 20


@pytest.fixture(scope="module")
def built() -> Iterator[Yard]:
    with yard() as here:
        yield here


@pytest.fixture
def place(built: Yard) -> Iterator[Yard]:
    built.node.exec("nft", "flush", "ruleset")
    yield built
    built.node.exec("nft", "flush", "ruleset")


@pytest.fixture
def bare() -> Iterator[Namespace]:
    """A namespace of its own, for rules of which no packet is the matter."""
    with namespaces("bare") as (node,):
        yield node


def play(
    node: Namespace,
    body: Callable[[NftablesLease], Awaitable[None]],
    clock_ms: Callable[[], int] = boottime_ms,
    guarded: Guarded = GUARDED,
) -> None:
    freezekit.play(node, lambda: NftablesLease(guarded, clock_ms), body)


def after_ms(duration_ms: int) -> int:
    return boottime_ms() + duration_ms


class Stream:
    """Numbered datagrams of the client to a VIP, one each millisecond, with their times."""

    def __init__(self, place: Yard) -> None:
        self._servers = place.servers
        self._times_ms: list[tuple[int, int]] = []
        self._stop = threading.Event()
        self._client = place.client
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Stream":
        self._servers.received.clear()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with inside(self._client), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ask:
            while not self._stop.is_set():
                before_ms = boottime_ms()
                ask.sendto(len(self._times_ms).to_bytes(4), (str(VIPS[0]), 2049))
                self._times_ms.append((before_ms, boottime_ms()))
                time.sleep(0.001)

    def last_arrived_ms(self) -> int:
        """The newest datagram that reached the server left no earlier than this."""
        return self._times_ms[max(int.from_bytes(data) for data in self._servers.received)][0]

    def first_dropped_ms(self, from_ms: int) -> int:
        """The first one sent after `from_ms` that never arrived had left by then."""
        arrived = {int.from_bytes(data) for data in self._servers.received}
        for number, (before_ms, after) in enumerate(self._times_ms):
            if before_ms >= from_ms and number not in arrived:
                return after
        raise AssertionError("nothing was dropped")


@pytest.mark.parametrize("renewals", [0, 5])
def test_the_kernel_closes_at_the_deadline_by_itself(place: Yard, renewals: int) -> None:
    async def body(lease: NftablesLease) -> None:
        await lease.install()
        opened_ms = boottime_ms()
        deadline_ms = after_ms(400)
        assert (await lease.open(deadline_ms)).held
        opened_ms = boottime_ms()
        with Stream(place) as stream:
            for _ in range(renewals):
                await asyncio.sleep(0.1)
                deadline_ms = after_ms(400)
                assert (await lease.renew(deadline_ms)).held
            await asyncio.sleep((deadline_ms - boottime_ms()) / 1000 + 0.3)
        assert stream.last_arrived_ms() <= deadline_ms + LATE_MS
        assert stream.first_dropped_ms(opened_ms) >= deadline_ms - EARLY_MS
        assert await lease.live() == {}
        assert await lease.intact()
        outcome = await lease.renew(after_ms(400))
        assert outcome.verdict is LeaseVerdict.LOST
        assert await lease.live() == {}
        assert (await lease.open(after_ms(400))).held

    play(place.node, body)


def test_a_killed_daemon_leaves_a_lease_that_ends_and_a_table_that_stays(place: Yard) -> None:
    program = (
        "import asyncio, time\n"
        "from nfsha.vip.nftables import NftablesLease\n"
        "from tests.netns.freezekit import GUARDED, boottime_ms\n"
        "async def main():\n"
        "    lease = NftablesLease(GUARDED, boottime_ms)\n"
        "    await lease.install()\n"
        "    deadline_ms = boottime_ms() + 600\n"
        "    assert (await lease.open(deadline_ms)).held\n"
        "    print(deadline_ms, flush=True)\n"
        "    time.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with (
        inside(place.node),
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        ) as daemon,
    ):
        try:
            assert daemon.stdout
            deadline_ms = int(daemon.stdout.readline())
            with Stream(place) as stream:
                daemon.send_signal(signal.SIGKILL)
                daemon.wait()
                time.sleep((deadline_ms - boottime_ms()) / 1000 + 0.3)
        finally:
            daemon.kill()
    assert deadline_ms - EARLY_MS - 100 <= stream.last_arrived_ms() <= deadline_ms + LATE_MS
    assert place.answers(place.client, every([*OWN, *VIPS])) == {"silence"}


def test_no_lease_is_too_short_for_the_kernels_tick(bare: Namespace) -> None:
    """Where a timeout rounds down to no ticks, older kernels would keep the element for ever."""

    async def body(lease: NftablesLease) -> None:
        await lease.install()
        for left_ms in (1, 5, LEASE_MIN_MS - 1):
            assert (await lease.open(now_ms + left_ms)).verdict is LeaseVerdict.LATE
            assert await lease.live() == {}
        assert (await lease.open(now_ms + LEASE_MIN_MS)).held
        await asyncio.sleep(0.1)
        assert await lease.live() == {}

    now_ms = boottime_ms()
    play(bare, body, clock_ms=lambda: now_ms)


def test_no_lease_is_longer_than_the_bound(bare: Namespace) -> None:
    async def body(lease: NftablesLease) -> None:
        await lease.install()
        assert (await lease.open(after_ms(10 * LEASE_MAX_MS))).held
        left = list((await lease.live()).values())
        assert all(ms is not None and LEASE_MAX_MS - 1000 <= ms <= LEASE_MAX_MS for ms in left)

    play(bare, body)


class SlowClock:
    """Each reading is `step_ms` after the one before: every change seems to take as long."""

    def __init__(self, steps_ms: list[int]) -> None:
        self._steps_ms = steps_ms
        self.now_ms = boottime_ms()

    def __call__(self) -> int:
        self.now_ms += self._steps_ms.pop(0) if self._steps_ms else 0
        return self.now_ms


def test_a_slow_change_is_done_again_with_what_is_left(bare: Namespace) -> None:
    """Else the lease would outlast its deadline by what the change took."""

    async def body(lease: NftablesLease) -> None:
        await lease.install()
        # Read at the start, before the change, after it (300 ms later), before the next, after.
        clock = SlowClock([0, 0, 300, 0, 0])
        lease_clock[0] = clock
        deadline_ms = clock.now_ms + 5000
        assert (await lease.open(deadline_ms)).held
        left = list((await lease.live()).values())
        assert all(ms is not None and ms <= 4700 for ms in left)
        lease_clock[0] = SlowClock([50] * 20)
        outcome = await lease.renew(deadline_ms)
        assert outcome.verdict is LeaseVerdict.LATE
        assert await lease.live() == {}

    lease_clock: list[Callable[[], int]] = [boottime_ms]

    def clock_ms() -> int:
        return lease_clock[0]()

    play(bare, body, clock_ms=clock_ms)


def test_several_vips_live_and_die_as_one(bare: Namespace) -> None:
    async def body(lease: NftablesLease) -> None:
        await lease.install()
        assert (await lease.open(after_ms(LONG_MS))).held
        left = await lease.live()
        assert left.keys() == set(VIPS)
        assert len({ms and ms // 20 for ms in left.values()}) <= 2  # set by one transaction
        bare.exec("nft", "delete", "element", "inet", TABLE, "open6", "{", str(VIPS[2]), "}")
        assert (await lease.renew(after_ms(LONG_MS))).verdict is LeaseVerdict.LOST
        assert await lease.live() == {}

    play(bare, body)


LEFTOVERS = {
    "empty": "table inet nfsha { }",
    "dormant": ruleset(GUARDED, TABLE, "flags dormant"),
    "a rule more": ruleset(GUARDED, TABLE) + "insert rule inet nfsha input tcp dport 2049 accept",
    "a rule less": ruleset(GUARDED, TABLE).replace("udp dport @ports goto inbound", ""),
    "a chain more": ruleset(GUARDED, TABLE)
    + "table inet nfsha { chain x { type filter hook input priority 0; accept; }; }",
    "a late priority": ruleset(GUARDED, TABLE).replace("-310", "100"),
    "other ports": ruleset(Guarded(VIPS, GUARDED.peers, {"nfs": 2049}), TABLE),
    "other peers": ruleset(Guarded(VIPS, [IPv4Address("10.91.1.2")], GUARDED.ports), TABLE),
    "open without end": ruleset(GUARDED, TABLE).replace("timeout 1s", "elements = { %s }", 1)
    % VIPS[0],
    "open to any": "table inet nfsha { set open4 { type ipv4_addr; flags interval;"
    " elements = { 0.0.0.0/0 }; }; }",
    "a set that catches all": "table inet nfsha { set s { type ipv4_addr; elements = { * }; }; }",
    "one VIP of three": ruleset(GUARDED, TABLE)
    + f"add element inet nfsha open4 {{ {VIPS[0]} timeout 1m }}",
    "open far too long": ruleset(GUARDED, TABLE)
    + f"add element inet nfsha open4 {{ {VIPS[0]} timeout 1d, {VIPS[1]} timeout 1d }}\n"
    + f"add element inet nfsha open6 {{ {VIPS[2]} timeout 1d }}",
    "a foreign address": ruleset(GUARDED, TABLE)
    + "add element inet nfsha open4 { 10.91.1.1 timeout 1m }",
}


@pytest.mark.parametrize("leftover", LEFTOVERS.values(), ids=LEFTOVERS.keys())
def test_a_leftover_of_whatever_kind_is_replaced_closed(place: Yard, leftover: str) -> None:
    set_rules(place.node, leftover)

    async def body(lease: NftablesLease) -> None:
        await lease.install()
        assert await lease.intact()
        assert await lease.live() == {}

    play(place.node, body)
    set_by_us = place.node.exec("nft", "list", "ruleset")
    place.node.exec("nft", "flush", "ruleset")
    play(place.node, body)
    assert place.node.exec("nft", "list", "ruleset") == set_by_us
    assert place.answers(place.client, every([OWN[0], VIPS[0]], [2049])) == {"silence"}


def set_rules(node: Namespace, text: str) -> None:
    subprocess.run(
        ["ip", "netns", "exec", node.name, "nft", "-f", "-"],
        input=text,
        text=True,
        check=True,
        timeout=30,
    )


@pytest.mark.parametrize(
    ("tampering", "seen"),
    [
        ("flush ruleset", True),
        ("delete table inet nfsha", True),
        ("flush chain inet nfsha inbound", True),
        ("insert rule inet nfsha input accept", True),
        ("add table inet nfsha { flags dormant; }", True),
        ("add element inet nfsha open4 { 10.91.1.1 timeout 10s }", True),
        ("table inet other { chain c { accept; }; }", False),
        ("table ip nfsha { chain c { accept; }; }", False),
    ],
)
def test_tampering_is_noticed_at_once_with_its_author(
    bare: Namespace, tampering: str, seen: bool
) -> None:
    async def body(lease: NftablesLease) -> None:
        await lease.install()
        await lease.open(after_ms(LONG_MS))
        await lease.renew(after_ms(LONG_MS))
        assert lease.disturbed() is None  # our own changes are none
        noticed = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(lease.watch_fd, noticed.set)
        try:
            bare.exec("nft", tampering)
            await asyncio.wait_for(noticed.wait(), 1)
        finally:
            loop.remove_reader(lease.watch_fd)
        sentence = lease.disturbed()
        if not seen:
            assert sentence is None
            assert await lease.intact()
            return
        assert re.fullmatch(
            r"nft \(pid \d+\) changed the nftables table inet nfsha", sentence or ""
        )
        assert lease.disturbed() is None
        assert not await lease.intact()
        await lease.install()
        assert lease.disturbed() is None
        assert await lease.intact()
        assert (await lease.open(after_ms(LONG_MS))).held
        assert (await lease.live()).keys() == set(VIPS)

    play(bare, body)


@pytest.mark.parametrize(
    "tampering",
    [
        "flush chain inet nfsha inbound",
        "flush chain inet nfsha input",
        "insert rule inet nfsha inbound accept",
        "add table inet nfsha { flags dormant; }",
    ],
)
def test_a_close_over_broken_rules_mends_them(place: Yard, tampering: str) -> None:
    async def body(lease: NftablesLease) -> None:
        await lease.install()
        assert (await lease.open(after_ms(LONG_MS))).held
        place.node.exec("nft", tampering)
        await lease.close()
        assert await lease.intact()
        assert await lease.live() == {}

    play(place.node, body)
    assert place.answers(place.client, every([OWN[0], VIPS[0]], [2049])) == {"silence"}


def test_lost_events_are_told_as_such(bare: Namespace) -> None:
    async def body(lease: NftablesLease) -> None:
        await lease.install()
        set_rules(bare, many_tables(500))
        sentences = [lease.disturbed() for _ in range(20)]
        assert any(one and "events were lost" in one for one in sentences)
        assert lease.disturbed() is None
        assert await lease.intact()

    play(bare, body)


def many_tables(number: int) -> str:
    chains = "\n".join(f"chain c{i} {{ ip saddr 10.1.1.1 accept; }}" for i in range(10 * number))
    tables = "\n".join(f"table ip t{i} {{ chain c {{ accept; }}; }}" for i in range(number))
    return f"{tables}\ntable ip many {{\n{chains}\n}}\n"


def test_renewals_do_not_slow_down_with_the_rules_of_others(bare: Namespace) -> None:
    """By libnftables, the same renewal took 0.1 ms alone and 17 ms beside 500 tables."""

    async def body(lease: NftablesLease) -> None:
        await lease.install()
        await lease.open(after_ms(LONG_MS))
        alone_ms = await median_ms(lease)
        set_rules(bare, many_tables(500))
        await lease.open(after_ms(LONG_MS))
        crowded_ms = await median_ms(lease)
        print(f"renewal: {alone_ms:.3f} ms alone, {crowded_ms:.3f} ms beside 500 tables")
        assert crowded_ms < 3 * alone_ms + 0.5

    play(bare, body)


async def median_ms(lease: NftablesLease) -> float:
    spent = []
    for _ in range(200):
        started = time.perf_counter()
        assert (await lease.renew(after_ms(LONG_MS))).held
        spent.append((time.perf_counter() - started) * 1000)
    return statistics.median(spent)


def test_a_renewal_never_leaves_a_gap(place: Yard) -> None:
    """Each packet meets the old element or the new one."""

    async def body(lease: NftablesLease) -> None:
        await lease.install()
        await lease.open(after_ms(LONG_MS))
        with Stream(place) as stream:
            until_ms = after_ms(1000)
            while boottime_ms() < until_ms:
                assert (await lease.renew(after_ms(LONG_MS))).held
                await asyncio.sleep(0)
        await asyncio.sleep(0.2)
        with pytest.raises(AssertionError, match="nothing was dropped"):
            stream.first_dropped_ms(0)

    play(place.node, body)


def test_a_check_leaves_nothing(bare: Namespace) -> None:
    async def body(lease: NftablesLease) -> None:
        await lease.check()
        assert bare.exec("nft", "list", "ruleset") == ""
        await lease.install()
        assert "nfsha_reference" not in bare.exec("nft", "list", "ruleset")

    play(bare, body)


def test_a_reference_left_by_a_crash_is_removed(bare: Namespace) -> None:
    set_rules(bare, "table inet nfsha_reference { flags dormant; chain c { drop; }; }")
    play(bare, lambda lease: lease.install())
    assert bare.exec("nft", "list", "tables").split() == ["table", "inet", TABLE]


def test_a_table_that_belongs_to_another_process_is_said_so(bare: Namespace) -> None:
    with (
        inside(bare),
        subprocess.Popen(["nft", "-i"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as owner,
    ):
        assert owner.stdin
        owner.stdin.write(b"add table inet nfsha { flags owner; }\n")
        owner.stdin.flush()
        try:
            until_s = time.monotonic() + 5
            while "nfsha" not in bare.exec("nft", "list", "tables"):
                assert time.monotonic() < until_s
                time.sleep(0.01)

            async def body(lease: NftablesLease) -> None:
                with pytest.raises(FirewallError, match="no other process may own the table"):
                    await lease.install()

            play(bare, body)
        finally:
            with contextlib.suppress(BrokenPipeError):
                owner.stdin.close()


def test_it_holds_no_more_descriptors_after_many_installs(bare: Namespace) -> None:
    async def body(lease: NftablesLease) -> None:
        await lease.install()
        before = descriptors()
        for _ in range(20):
            await lease.remove()
            await lease.install()
        assert descriptors() == before

    play(bare, body)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))

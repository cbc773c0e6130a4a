"""The schedule: whose turn it is, what is coalesced, and clocks that are set back and forth."""

from __future__ import annotations

import asyncio
import collections
import logging
import selectors
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import apscheduler.schedulers.base
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nfsha.replica.fetching import schedule as module
from nfsha.replica.fetching.schedule import (
    Cause,
    Kind,
    Plan,
    Reason,
    Schedule,
    retry_wait_ms,
)

BERLIN = ZoneInfo("Europe/Berlin")
SELDOM = Plan(every_ms=3_600_000)
COMMAND = Reason(Cause.COMMAND)
SCHEDULED = Reason(Cause.SCHEDULE)


class Waitless(selectors.DefaultSelector):
    """Instead of waiting it sets the loop's clock on: a scenario takes no time, and always as long.

    What runs is still the real loop, with real tasks and timers.
    """

    now_s = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout != 0:
            assert timeout is not None, "nothing will ever happen again"
            self.now_s += timeout
        return ready


class Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.waitless = Waitless()
        super().__init__(self.waitless)

    def time(self) -> float:
        return self.waitless.now_s


def simulated(main: Coroutine[None, None, None]) -> None:
    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(main)


def now_s() -> float:
    return asyncio.get_running_loop().time()


class Clock:
    """A wall clock that a test sets; APScheduler and the schedule look at the same one."""

    step_s = 0.0

    def now(self) -> datetime:
        return datetime(2026, 1, 1, 12, 1, tzinfo=UTC) + timedelta(seconds=now_s() + self.step_s)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()

    class FakeDatetime(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return made.now()

    monkeypatch.setattr(apscheduler.schedulers.base, "datetime", FakeDatetime)
    monkeypatch.setattr(module, "GUARD_EVERY_S", 0.05)
    return made


class Passes:
    """Passes that take as long as a test says, and remember when they ran."""

    def __init__(self, takes_s: float = 0.0) -> None:
        self.takes_s = takes_s
        self.begun: list[tuple[str, Reason]] = []
        self.at_s: list[float] = []
        self.now: collections.Counter[str] = collections.Counter()
        self.most_at_once = 0
        self.gates: dict[str, asyncio.Event] = {}

    async def run(self, uuid: str, reason: Reason) -> None:
        assert self.now[uuid] == 0, "two passes of one volume"
        self.begun.append((uuid, reason))
        self.at_s.append(now_s())
        self.now[uuid] += 1
        self.most_at_once = max(self.most_at_once, self.now.total())
        try:
            if uuid in self.gates:
                await self.gates[uuid].wait()
            await asyncio.sleep(self.takes_s)
        finally:
            self.now[uuid] -= 1

    def hold(self, uuid: str) -> asyncio.Event:
        self.gates[uuid] = asyncio.Event()
        return self.gates[uuid]

    def of(self, uuid: str) -> list[Reason]:
        return [reason for one, reason in self.begun if one == uuid]


def play(
    scenario: Callable[[Schedule, Passes], Coroutine[None, None, None]],
    *,
    parallel: int = 2,
    takes_s: float = 0.0,
    since_ms: Callable[[str, Kind], int | None] = lambda _uuid, _kind: None,
    wall: Callable[[], datetime] | None = None,
) -> None:
    async def run() -> None:
        passes = Passes(takes_s)
        failed: list[BaseException | None] = []

        def watch(task: asyncio.Task[None]) -> None:
            task.add_done_callback(note)

        def note(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                failed.append(task.exception())

        schedule = Schedule(
            passes.run,
            parallel=parallel,
            watch=watch,
            since_ms=since_ms,
            wall=wall or Clock().now,
        )
        schedule.start()
        try:
            await scenario(schedule, passes)
        finally:
            assert await schedule.stop() == ()
        assert not any(failed), failed

    simulated(run())


def ask(schedule: Schedule, uuid: str, reason: Reason) -> asyncio.Task[bool]:
    """Asks for a pass in the next turn of the loop."""
    return asyncio.ensure_future(schedule.make(uuid, reason))


# --------------------------------------------------------------------------- when


def test_passes_come_each_interval() -> None:
    async def scenario(schedule: Schedule, passes: Passes) -> None:
        schedule.set("a", Plan(every_ms=100))
        await asyncio.sleep(1.05)
        assert 6 <= len(passes.begun) <= 10
        assert set(passes.begun) == {("a", SCHEDULED)}

    play(scenario)


def test_jitter_delays_each_pass_and_not_the_ones_after_it() -> None:
    async def scenario(schedule: Schedule, passes: Passes) -> None:
        schedule.set("a", Plan(every_ms=100, jitter_ms=80))
        began_s = now_s()
        await asyncio.sleep(1.55)
        assert 12 <= len(passes.begun) <= 15  # 11 if the delays added up
        late_s = [(at_s - began_s) % 0.1 for at_s in passes.at_s]
        assert max(late_s) - min(late_s) > 0.02

    play(scenario)


def test_slower_kinds_take_the_place_of_the_ordinary_pass() -> None:
    async def scenario(schedule: Schedule, passes: Passes) -> None:
        schedule.set("a", Plan(every_ms=100, full_every_ms=250, verify_every_ms=60_000))
        await asyncio.sleep(0.45)
        kinds = [reason.kind for reason in passes.of("a")]
        assert kinds.count(Kind.FULL) == 1
        assert kinds.index(Kind.FULL) == 2
        assert 4 <= len(kinds) <= 5

    play(scenario)


# --------------------------------------------------------------------------- slower kinds


class Walks:
    """When slower passes were completed, as something durable would tell."""

    def __init__(self) -> None:
        self.at_s: dict[Kind, float] = {}

    def since_ms(self, _uuid: str, kind: Kind) -> int | None:
        at_s = self.at_s.get(kind)
        return None if at_s is None else round(1000 * (now_s() - at_s))

    def done(self, kind: Kind, ago_s: float = 0.0) -> None:
        self.at_s[kind] = now_s() - ago_s


def test_a_restart_does_not_put_off_a_slower_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LATE_MS", 50)
    walks = Walks()

    async def scenario(schedule: Schedule, passes: Passes) -> None:
        walks.done(Kind.FULL, ago_s=3599.7)
        walks.done(Kind.VERIFY, ago_s=50)
        plan = Plan(every_ms=7_200_000, full_every_ms=3_600_000, verify_every_ms=3_600_000)
        schedule.set("a", plan)
        assert passes.begun == []
        assert 100 <= (schedule.next_ms("a") or 0) <= 300
        await asyncio.sleep(0.5)
        assert passes.of("a") == [Reason(Cause.SCHEDULE, Kind.FULL)]

    play(scenario, since_ms=walks.since_ms)


def test_a_slower_pass_that_is_late_comes_soon_after_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LATE_MS", 200)
    walks = Walks()

    async def scenario(schedule: Schedule, passes: Passes) -> None:
        walks.done(Kind.VERIFY, ago_s=30 * 86_400)
        schedule.set("a", Plan(every_ms=7_200_000, verify_every_ms=3_600_000))
        assert 100 <= (schedule.next_ms("a") or 0) <= 200
        await asyncio.sleep(0.4)
        assert passes.of("a") == [Reason(Cause.SCHEDULE, Kind.VERIFY)]

    play(scenario, since_ms=walks.since_ms)


def test_a_slower_pass_that_came_to_no_end_comes_again_sooner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LATE_MS", 50)
    monkeypatch.setattr(module, "AGAIN_LEAST_MS", 100)
    monkeypatch.setattr(module, "AGAIN_PART", 10_000)
    walks = Walks()

    async def scenario(schedule: Schedule, passes: Passes) -> None:
        walks.done(Kind.FULL, ago_s=86_400)
        schedule.set("a", Plan(every_ms=7_200_000, full_every_ms=3_600_000))
        await asyncio.sleep(0.25)
        assert len(passes.begun) == 1, "refused, and the next one not at once"
        walks.done(Kind.FULL)  # the next one is completed
        await asyncio.sleep(0.5)
        assert len(passes.begun) == 1, "due by the wait, but it came meanwhile"
        assert 3_590_000 < (schedule.next_ms("a") or 0) <= 3_600_000
        walks.done(Kind.FULL, ago_s=4000)
        schedule.trigger("a", Reason(Cause.COMMAND, Kind.FULL))
        await asyncio.sleep(0.05)
        assert len(passes.begun) == 2
        assert 0 < (schedule.next_ms("a") or 0) <= 360

    play(scenario, since_ms=walks.since_ms)


def test_the_period_of_a_slower_kind_is_counted_from_the_last_one_whoever_asked_for_it() -> None:
    walks = Walks()

    async def scenario(schedule: Schedule, passes: Passes) -> None:
        walks.done(Kind.FULL, ago_s=1000)
        schedule.set("a", Plan(every_ms=7_200_000, full_every_ms=3_600_000))
        assert (schedule.next_ms("a") or 0) <= 2_600_000
        gate = passes.hold("a")
        asked = ask(schedule, "a", Reason(Cause.COMMAND, Kind.FULL))
        await asyncio.sleep(0.01)
        walks.done(Kind.FULL)
        gate.set()
        assert await asked
        assert (schedule.next_ms("a") or 0) > 3_590_000

    play(scenario, since_ms=walks.since_ms)


def test_a_verify_that_is_due_with_an_ordinary_pass_stands_for_both() -> None:
    async def scenario(schedule: Schedule, passes: Passes) -> None:
        gate = passes.hold("a")
        schedule.set("a", SELDOM)
        schedule.trigger("a", COMMAND)
        await asyncio.sleep(0.01)
        schedule.trigger("a", Reason(Cause.SCHEDULE, Kind.FULL))
        done = ask(schedule, "a", Reason(Cause.SCHEDULE, Kind.VERIFY))
        await asyncio.sleep(0)
        gate.set()
        assert await done
        await asyncio.sleep(0.01)
        assert passes.of("a") == [COMMAND, Reason(Cause.SCHEDULE, Kind.VERIFY)]

    play(scenario)


def test_what_the_operator_asked_for_does_not_wait_for_a_verify() -> None:
    async def scenario(schedule: Schedule, passes: Passes) -> None:
        gate = passes.hold("a")
        schedule.set("a", SELDOM)
        schedule.trigger("a", Reason(Cause.START))
        await asyncio.sleep(0.01)
        verified = ask(schedule, "a", Reason(Cause.SCHEDULE, Kind.VERIFY))
        schedule.trigger("a", COMMAND)
        await asyncio.sleep(0)
        gate.set()
        assert await verified
        assert passes.of("a")[1:] == [COMMAND, Reason(Cause.SCHEDULE, Kind.VERIFY)]

    play(scenario)


def test_verifies_leave_the_places_of_passes_free() -> None:
    async def scenario(schedule: Schedule, passes: Passes) -> None:
        gates = [passes.hold(uuid) for uuid in "ab"]
        for uuid in "abc":
            schedule.set(uuid, SELDOM)
        for uuid in "ab":
            schedule.trigger(uuid, Reason(Cause.SCHEDULE, Kind.VERIFY))
        await asyncio.sleep(0.01)
        assert list(schedule.running()) == ["a"]  # one verify at a time
        assert await asyncio.wait_for(schedule.make("c", COMMAND), 1)
        for gate in gates:
            gate.set()
        await asyncio.sleep(0.01)
        assert [uuid for uuid, _ in passes.begun] == ["a", "c", "b"]

    play(scenario, parallel=1)


def test_a_cron_line_fires_by_local_time() -> None:
    now = datetime(2026, 3, 2, 1, 0, tzinfo=UTC)  # 02:00 in Berlin

    async def run() -> None:
        schedule = Schedule(
            Passes().run, parallel=1, watch=lambda task: None, zone=BERLIN, wall=lambda: now
        )
        schedule.start()
        schedule.set("a", Plan(cron="30 3 * * *"))
        assert schedule.next_ms("a") == 90 * 60_000
        schedule.set("a", Plan(cron="0 4 * * sun"))
        assert schedule.next_ms("a") == (6 * 24 + 2) * 3_600_000
        await schedule.stop()

    simulated(run())


@pytest.mark.parametrize(
    ("zone", "hours", "warned"),
    [
        (None, 1, False), ("Asia/Tokyo", 9, False), (":Asia/Tokyo", 9, False), ("", 0, False),
        ("/nowhere/zone", 0, True), ("No/Where", 0, True), ("CET-1CEST", 0, True),
        ("../../etc/passwd", 0, True), ("/etc/passwd", 0, True), ("/etc", 0, True),
    ],
)  # fmt: skip
def test_the_local_zone_is_found_as_libc_does_and_none_stops_the_daemon(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    zone: str | None,
    hours: int,
    warned: bool,
) -> None:
    local = tmp_path / "localtime"
    local.symlink_to("/usr/share/zoneinfo/Europe/Berlin")
    monkeypatch.setattr(module, "LOCAL_TIME", local)
    if zone is None:
        monkeypatch.delenv("TZ", raising=False)
    else:
        monkeypatch.setenv("TZ", zone)
    found = datetime(2026, 1, 1, 12, tzinfo=module.local_zone()).utcoffset()
    assert found == timedelta(hours=hours)
    assert bool(caplog.messages) == warned


LINES = {
    "*/5 * * * *": timedelta(minutes=5),
    "7 * * * *": timedelta(hours=1),
    "30 2 * * *": timedelta(hours=25),
    "0 3 * * *": timedelta(hours=25),
    "59 1,2 * * *": timedelta(hours=25),
    "0 0 * * sat,sun": timedelta(days=6, hours=1),
}
# Summer time began at 01:00 UTC of 29 March 2026 in Berlin, and ended so on 25 October
SWITCHES = (datetime(2026, 3, 29, 1, tzinfo=UTC), datetime(2026, 10, 25, 1, tzinfo=UTC))


@given(
    st.sampled_from(sorted(LINES)), st.sampled_from(SWITCHES), st.floats(-2 * 86_400, 2 * 86_400)
)
@settings(deadline=None)
def test_cron_lines_neither_stall_nor_storm_when_summer_time_begins_or_ends(
    line: str, switch: datetime, away_s: float
) -> None:
    trigger = module._Cron(line, BERLIN, 0)
    now = switch + timedelta(seconds=away_s)
    seen = []
    for _ in range(20):
        found = trigger.get_next_fire_time(now, now)
        assert found is not None
        assert timedelta(0) < found - now <= LINES[line]
        seen.append(found)
        now = found
    assert len(set(seen)) == 20
    assert all(each.second == each.microsecond == 0 for each in seen)


@given(
    st.integers(1, 10**9), st.floats(0, 0.99), st.integers(-(10**12), 10**12),
)  # fmt: skip
def test_an_interval_fires_next_within_one_interval_whatever_the_clock_did(
    every_ms: int, jitter: float, away_ms: int
) -> None:
    anchor = datetime(2026, 1, 1, tzinfo=UTC)
    jitter_ms = int(every_ms * jitter)
    trigger = module._Every(anchor, every_ms, jitter_ms)
    now = anchor + timedelta(milliseconds=away_ms)
    found = trigger.get_next_fire_time(None, now)
    assert found > now
    if away_ms >= 0:
        assert found - now <= timedelta(milliseconds=every_ms + jitter_ms)


# --------------------------------------------------------------------------- the clock is set


@pytest.mark.parametrize("step_s", [-86_400.0, -3600.0, 3600.0, 86_400.0, 50 * 365 * 86_400.0])
def test_a_clock_that_is_set_neither_stalls_nor_storms(clock: Clock, step_s: float) -> None:
    async def scenario(schedule: Schedule, passes: Passes) -> None:
        schedule.set("a", Plan(every_ms=200, full_every_ms=3_600_000))
        await asyncio.sleep(0.5)
        before = len(passes.begun)
        clock.step_s += step_s
        began_s = time.thread_time()
        await asyncio.sleep(1.0)
        assert 3 <= len(passes.begun) - before <= 6
        assert time.thread_time() - began_s < 0.5  # years of passes are not counted one by one
        assert {reason.kind for _, reason in passes.begun} == {Kind.ORDINARY}
        due_ms = schedule.next_ms("a")
        assert due_ms is not None
        assert due_ms <= 200

    play(scenario, wall=clock.now)


def test_a_cron_line_is_met_again_after_the_clock_was_set_back_for_days(clock: Clock) -> None:
    async def scenario(schedule: Schedule, passes: Passes) -> None:
        schedule.set("a", Plan(cron="*/5 * * * *"))
        clock.step_s -= 10 * 86_400
        await asyncio.sleep(0.2)
        due_ms = schedule.next_ms("a")
        assert due_ms is not None
        assert due_ms <= 300_000
        assert passes.begun == []

    play(scenario, wall=clock.now)


def test_a_cron_line_that_the_clock_jumps_over_fires_once(clock: Clock) -> None:
    async def scenario(schedule: Schedule, passes: Passes) -> None:
        schedule.set("a", Plan(cron="*/5 * * * *"))
        clock.step_s += 10 * 86_400
        schedule.set("b", SELDOM)  # wakes APScheduler
        await asyncio.sleep(0.2)
        assert passes.of("a") == [SCHEDULED]

    play(scenario, wall=clock.now)


# --------------------------------------------------------------------------- whose turn it is


def test_never_two_of_one_volume_and_exactly_one_more_after_it() -> None:
    async def scenario(schedule: Schedule, passes: Passes) -> None:
        gate = passes.hold("a")
        schedule.set("a", SELDOM)
        first = ask(schedule, "a", Reason(Cause.START))
        await asyncio.sleep(0.01)
        more = [ask(schedule, "a", COMMAND) for _ in range(10)]
        await asyncio.sleep(0)
        assert schedule.next_ms("a") == 0
        assert not any(each.done() for each in (first, *more))
        gate.set()
        assert all(await asyncio.wait_for(asyncio.gather(first, *more), 1))
        await asyncio.sleep(0.05)
        assert passes.of("a") == [Reason(Cause.START), COMMAND]

    play(scenario)


def test_an_interval_that_is_shorter_than_its_pass_makes_no_queue() -> None:
    async def scenario(schedule: Schedule, passes: Passes) -> None:
        schedule.set("a", Plan(every_ms=50))
        await asyncio.sleep(1.0)
        assert 5 <= len(passes.begun) <= 8  # 0.12 s each, begun on the grid of 50 ms

    play(scenario, takes_s=0.12)


def test_no_more_than_so_many_side_by_side_and_everybody_gets_a_turn() -> None:
    async def scenario(schedule: Schedule, passes: Passes) -> None:
        for number in range(20):
            schedule.set(f"v{number}", Plan(every_ms=30))
        end_s = now_s() + 1.5
        while now_s() < end_s:
            schedule.trigger("v0", COMMAND)  # one that asks all the time pushes in no more
            await asyncio.sleep(0.005)
        counts = collections.Counter(uuid for uuid, _ in passes.begun)
        assert passes.most_at_once == 3
        assert len(counts) == 20
        assert min(counts.values()) > counts.total() / 20 / 2

    play(scenario, parallel=3, takes_s=0.01)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 2)), max_size=30), st.data())
@settings(max_examples=25, deadline=None)
def test_every_pass_that_is_asked_for_begins_after_it_was_asked_for(
    asked: list[tuple[str, int]], data: st.DataObject
) -> None:
    parallel = data.draw(st.integers(1, 3))

    async def scenario(schedule: Schedule, passes: Passes) -> None:
        for uuid in "abcd":
            schedule.set(uuid, SELDOM)
        waits = []
        for uuid, pause in asked:
            before = len(passes.begun)
            waits.append((uuid, before, ask(schedule, uuid, COMMAND)))
            for _ in range(pause + 1):
                await asyncio.sleep(0)
        for uuid, before, wait in waits:
            assert await asyncio.wait_for(wait, 2)
            assert uuid in [one for one, _ in passes.begun[before:]]
        assert passes.most_at_once <= parallel
        for uuid in "abcd":
            assert len(passes.of(uuid)) <= sum(one == uuid for one, _ in asked)

    play(scenario, parallel=parallel)


# --------------------------------------------------------------------------- pause, retry, end


def test_while_paused_nothing_begins_and_then_each_volume_once() -> None:
    async def scenario(schedule: Schedule, passes: Passes) -> None:
        schedule.set("a", Plan(every_ms=50))
        schedule.set("b", SELDOM)
        schedule.pause()
        assert schedule.paused
        asked = ask(schedule, "b", COMMAND)
        await asyncio.sleep(0.4)
        assert passes.begun == []
        assert schedule.next_ms("a") is None
        schedule.resume()
        assert await asyncio.wait_for(asked, 1)
        await asyncio.sleep(0.02)
        assert sorted(passes.begun) == [("a", SCHEDULED), ("b", COMMAND)]
        await asyncio.sleep(0.2)
        assert len(passes.of("a")) >= 3

    play(scenario)


def test_a_retry_comes_after_its_wait_and_meanwhile_the_schedule_keeps_still() -> None:
    async def scenario(schedule: Schedule, passes: Passes) -> None:
        schedule.set("a", Plan(every_ms=100))
        wait_ms = schedule.retry("a", 1, Kind.FULL)
        assert 1000 <= wait_ms <= 1250
        await asyncio.sleep(0.8)
        assert passes.begun == []
        due_ms = schedule.next_ms("a")
        assert due_ms is not None
        assert 100 <= due_ms <= 450
        await asyncio.sleep(due_ms / 1000 + 0.05)
        assert passes.begun[0] == ("a", Reason(Cause.RETRY, Kind.FULL))
        await asyncio.sleep(0.3)
        assert len(passes.begun) >= 3

    play(scenario)


def test_a_command_does_not_wait_for_a_retry_and_ends_it() -> None:
    async def scenario(schedule: Schedule, passes: Passes) -> None:
        schedule.set("a", SELDOM)
        schedule.retry("a", 1)
        assert await asyncio.wait_for(schedule.make("a", COMMAND), 0.5)
        await asyncio.sleep(1.4)
        assert passes.of("a") == [COMMAND]

    play(scenario)


@given(st.integers(-5, 10**6))
def test_the_wait_before_a_retry_doubles_within_its_bounds(attempt: int) -> None:
    base_ms = min(60_000, 1000 * 2 ** (min(max(attempt, 1), 20) - 1))
    wait_ms = retry_wait_ms(attempt)
    assert 1000 <= wait_ms <= 60_000
    assert 0.74 * base_ms <= wait_ms <= 1.26 * base_ms


def test_a_volume_that_is_removed_gets_no_pass_and_never_two_when_it_comes_back() -> None:
    async def scenario(schedule: Schedule, passes: Passes) -> None:
        gate = passes.hold("a")
        schedule.set("a", Plan(every_ms=50))
        schedule.trigger("a", COMMAND)
        await asyncio.sleep(0.01)
        waits = ask(schedule, "a", COMMAND)
        await asyncio.sleep(0)
        schedule.retry("a", 1)
        schedule.remove("a")
        schedule.remove("a")
        assert not await waits
        assert list(schedule.running()) == ["a"]
        schedule.set("a", Plan(every_ms=50))
        await asyncio.sleep(0.2)
        assert passes.of("a") == [COMMAND]
        gate.set()
        await asyncio.sleep(0.2)
        schedule.remove("a")
        count = len(passes.of("a"))
        assert count >= 2
        await asyncio.sleep(0.2)
        assert len(passes.of("a")) == count
        assert schedule.next_ms("a") is None
        assert schedule.volumes == frozenset()

    play(scenario)


def test_what_is_asked_for_a_volume_that_has_gone_meanwhile_is_nothing() -> None:
    async def scenario(schedule: Schedule, passes: Passes) -> None:
        gate = passes.hold("a")
        schedule.set("a", Plan(every_ms=60_000))
        schedule.trigger("a", COMMAND)
        await asyncio.sleep(0.01)
        schedule.remove("a")
        assert schedule.retry("a", 1) == 0  # as a pass does that fails because it has gone
        schedule.trigger("a", COMMAND)
        assert not await schedule.make("a", COMMAND)
        gate.set()
        await asyncio.sleep(0.05)
        assert passes.of("a") == [COMMAND]
        assert schedule.running() == {}

    play(scenario)


def test_the_same_plan_again_changes_nothing_and_another_one_does() -> None:
    async def scenario(schedule: Schedule, passes: Passes) -> None:
        for _ in range(10):
            schedule.set("a", Plan(every_ms=200))
            await asyncio.sleep(0.05)
        assert len(passes.begun) == 2
        schedule.set("a", SELDOM)
        await asyncio.sleep(0.3)
        assert len(passes.begun) == 2

    play(scenario)


def test_the_end_cancels_what_runs_and_what_waits() -> None:
    async def scenario(schedule: Schedule, passes: Passes) -> None:
        for uuid in "abc":
            passes.hold(uuid)
            schedule.set(uuid, Plan(every_ms=20))
        waits = [ask(schedule, uuid, COMMAND) for uuid in "abc"]
        await asyncio.sleep(0.05)
        began_s = now_s()
        assert await schedule.stop() == ()
        assert now_s() - began_s < 0.5
        assert passes.now.total() == 0
        assert not any(await asyncio.gather(*waits))
        await asyncio.sleep(0.1)
        assert [uuid for uuid, _ in passes.begun] == ["a", "b"]

    play(scenario)


def test_a_pass_that_does_not_end_is_named_within_a_second() -> None:
    async def run() -> None:
        release = asyncio.Event()

        async def stubborn(uuid: str, reason: Reason) -> None:
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue

        schedule = Schedule(stubborn, parallel=1, watch=lambda task: None, wall=Clock().now)
        schedule.start()
        schedule.set("a", SELDOM)
        schedule.trigger("a", COMMAND)
        await asyncio.sleep(0.01)
        began_s = now_s()
        assert await schedule.stop() == ("a",)
        assert 0.9 < now_s() - began_s < 1.3
        release.set()
        await asyncio.sleep(0.01)

    simulated(run())


def test_a_mistake_of_the_program_is_seen_and_gives_the_place_back() -> None:
    async def run() -> None:
        seen: list[BaseException | None] = []

        async def broken(uuid: str, reason: Reason) -> None:
            raise LookupError(uuid)

        schedule = Schedule(
            broken,
            parallel=1,
            watch=lambda task: task.add_done_callback(lambda t: seen.append(t.exception())),
            wall=Clock().now,
        )
        schedule.start()
        for uuid in "ab":
            schedule.set(uuid, SELDOM)
        assert [await schedule.make(uuid, COMMAND) for uuid in "ab"] == [False, False]
        assert [repr(each) for each in seen] == ["LookupError('a')", "LookupError('b')"]
        await schedule.stop()

    simulated(run())


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    yield
    assert [record for record in caplog.records if record.name != "asyncio"] == []


def test_it_logs_nothing_and_starts_no_thread(quiet: None) -> None:
    async def scenario(schedule: Schedule, passes: Passes) -> None:
        threads = threading.active_count()
        schedule.set("a", Plan(every_ms=20))
        schedule.set("b", Plan(cron="* * * * *"))
        await asyncio.sleep(0.3)
        schedule.pause()
        schedule.resume()
        schedule.remove("b")
        assert len(passes.begun) >= 5
        assert threading.active_count() == threads

    play(scenario)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"every_ms": 1, "cron": "* * * * *"},
        {"every_ms": 0},
        {"every_ms": 100, "jitter_ms": 100},
        {"every_ms": 100, "jitter_ms": -1},
        {"every_ms": 100, "full_every_ms": 0},
        {"every_ms": 100, "jitter_ms": -1},
    ],
)
def test_what_is_no_plan_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Plan(**wrong)  # type: ignore[arg-type]


def test_a_cron_line_that_cannot_be_read_is_refused_and_the_old_plan_stays() -> None:
    async def scenario(schedule: Schedule, passes: Passes) -> None:
        schedule.set("a", Plan(every_ms=50))
        with pytest.raises(ValueError, match=r"\w"):
            schedule.set("a", Plan(cron="61 * * * *"))
        await asyncio.sleep(0.2)
        assert passes.begun

    play(scenario)


def test_reasons_add_up_to_the_most() -> None:
    both = Reason(Cause.COMMAND).with_(Reason(Cause.SCHEDULE, Kind.FULL))
    assert both == Reason(Cause.COMMAND, Kind.FULL)

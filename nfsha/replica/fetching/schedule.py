"""When which volume is copied: intervals and cron lines by APScheduler, and whose turn it is.

It starts passes and never looks into them: what a pass does is the caller's `run`. Never two passes
of one volume at once, at most `parallel` side by side, first come first served. A pass that is due
while one of its volume runs is dropped, for the next one comes; one that is asked for is made once
more. Verifying goes on for hours, so it has a place of its own and keeps no other volume waiting.

APScheduler reckons in wall clock time. The triggers here fire once for all that a step of the
clock jumps over, and a guard moves what is due along with a step, so that a clock set back stalls
nothing and a clock set forward storms nothing. All else is counted by the loop's own clock.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from enum import StrEnum
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.cron import CronTrigger

log = logging.getLogger(__name__)

LOCAL_TIME = Path("/etc/localtime")
"""The machine's time zone (tzset(3), localtime(5))."""

GUARD_EVERY_S = 2.0
"""How often the wall clock is compared with the loop's: a step back stalls no longer than this."""

STEP_MS = 500
"""A difference from this on is a step; slewing (adjtime(3)) moves a clock by 0.5 ms a second."""

_EARLY_S = 1.0
"""A pass that is due so much before its time by the loop's clock is due by a step only."""

RETRY_FIRST_MS = 1000
RETRY_MOST_MS = 60_000
"""The wait before a retry doubles from the first of these to the second."""

STOP_WITHIN_S = 1.0
"""So long may a pass take to end after it was cancelled, before it is reported as stuck."""

LATE_MS = 5000
"""A slower pass that was due while the daemon was down comes so soon after its start."""

AGAIN_PART = 24
AGAIN_LEAST_MS = 60_000
"""A slower pass that did not come to its end is due again after such a part of its period."""

VERIFIES_AT_ONCE = 1
"""A verify reads every byte of both copies; two would only fight for the same disks."""

MAX_VOLUMES = 10_000

_random = secrets.SystemRandom()


class Kind(StrEnum):
    """What a pass does, from the least to the most."""

    ORDINARY = "ordinary"
    """The folders that changed, or a full walk where the change journal cannot vouch."""
    FULL = "full"
    """A full walk."""
    VERIFY = "verify"
    """A full walk that compares contents."""


class Cause(StrEnum):
    """Why a pass is made, from the least to the most pressing."""

    SCHEDULE = "schedule"
    RETRY = "retry"
    START = "start"
    COMMAND = "command"


_KINDS = tuple(Kind)
_CAUSES = tuple(Cause)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a pass is made, and what it is to do."""

    cause: Cause
    kind: Kind = Kind.ORDINARY

    def with_(self, other: Reason) -> Reason:
        """The one reason of a pass that stands for both: does the most, for the most pressing."""
        return Reason(
            max(self.cause, other.cause, key=_CAUSES.index),
            max(self.kind, other.kind, key=_KINDS.index),
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """When a volume is copied. Exactly one of `every_ms` and `cron` is given.

    `cron` has the five fields of crontab(5), by names of weekdays, in local time. The slower kinds
    come `full_every_ms` and `verify_every_ms` (None: never) after the last one that was completed,
    so that a daemon that restarts often does not put them off for ever.
    """

    every_ms: int | None = None
    cron: str | None = None
    jitter_ms: int = 0
    """Each pass begins up to so much later; the ones after it do not."""
    full_every_ms: int | None = None
    verify_every_ms: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for what is no plan."""
        if (self.every_ms is None) == (self.cron is None):
            raise ValueError("a plan has either every_ms or cron")
        periods_ms = (self.every_ms, self.full_every_ms, self.verify_every_ms)
        if any(each is not None and each <= self.jitter_ms for each in periods_ms):
            raise ValueError(f"a period must be longer than the jitter of {self.jitter_ms} ms")
        if self.jitter_ms < 0:
            raise ValueError("a time span is negative")

    def period_ms(self, kind: Kind) -> int | None:
        """The time between two passes of a slower kind; None: there is none."""
        return {Kind.FULL: self.full_every_ms, Kind.VERIFY: self.verify_every_ms}.get(kind)


@dataclass(slots=True)
class _Want:
    """A pass that is due and has not begun, and who waits for its end."""

    reason: Reason
    ended: asyncio.Future[None]


@dataclass(slots=True)
class _Lane:
    """Passes that share places: `queue` holds the volumes that want one, in order of arrival."""

    limit: int
    queue: dict[str, _Want] = field(default_factory=dict)
    running: int = 0


@dataclass(slots=True)
class _Retry:
    """A pass that waits for a better moment."""

    timer: asyncio.TimerHandle
    kind: Kind


@dataclass(frozen=True, slots=True)
class _Running:
    """A pass that goes on."""

    task: asyncio.Task[None]
    reason: Reason


@dataclass(slots=True)
class _Volume:
    """What is known of one volume."""

    plan: Plan
    jobs: dict[Kind, Any] = field(default_factory=dict)
    expected_s: dict[Kind, float] = field(default_factory=dict)
    """When each job is due, by the loop's clock."""
    retry: _Retry | None = None


class _Every(BaseTrigger):  # type: ignore[misc]  # APScheduler has no type hints
    """Fires on a grid of equal steps: at the next point after now, however many were missed."""

    def __init__(self, anchor: datetime, every_ms: int, jitter_ms: int) -> None:
        self.anchor = anchor
        self._every = timedelta(milliseconds=every_ms)
        self._jitter_ms = jitter_ms

    def get_next_fire_time(self, _previous: datetime | None, now: datetime) -> datetime:
        """Called by APScheduler."""
        steps = math.floor((now - self.anchor) / self._every) + 1
        return self.anchor + max(1, steps) * self._every + _jitter(self._jitter_ms)


class _Cron(BaseTrigger):  # type: ignore[misc]  # APScheduler has no type hints
    """Fires at the next moment after now that the cron line names, however many were missed."""

    def __init__(self, line: str, zone: tzinfo, jitter_ms: int) -> None:
        self._cron = CronTrigger.from_crontab(line, timezone=zone)
        self._jitter_ms = jitter_ms

    def get_next_fire_time(self, _previous: datetime | None, now: datetime) -> datetime | None:
        """Called by APScheduler; None when the line names no moment any more."""
        zone = self._cron.timezone
        after = (now + timedelta(microseconds=1)).astimezone(zone)
        found: datetime | None = self._cron.get_next_fire_time(None, after)
        return found and found.astimezone(UTC) + _jitter(self._jitter_ms)


class Schedule:
    """The schedule of all volumes of this node. All calls are made on one loop."""

    def __init__(
        self,
        run: Callable[[str, Reason], Awaitable[None]],
        *,
        parallel: int,
        watch: Callable[[asyncio.Task[None]], None],
        since_ms: Callable[[str, Kind], int | None] = lambda _uuid, _kind: None,
        zone: tzinfo | None = None,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Takes what makes a pass, and how many of them go side by side.

        `run(uuid, reason)` ends when the pass has ended, whatever came of it; it must end soon when
        it is cancelled. `watch` is given the task of each pass, to see to failures that are
        mistakes of the program. `since_ms(uuid, kind)` says how long ago a pass of a slower kind
        was completed, also by another run of the daemon, or for another reason than the schedule
        (None: not known). `zone` is for cron lines (None: this machine's), `wall` for tests.
        """
        if parallel < 1:
            raise ValueError(f"{parallel} passes side by side")
        self._run = run
        self._watch = watch
        self._since_ms = since_ms
        self._zone = zone
        self._wall = wall
        self._volumes: dict[str, _Volume] = {}
        self._running: dict[str, _Running] = {}
        self._passes = _Lane(parallel)
        self._verifies = _Lane(VERIFIES_AT_ONCE)
        self._paused = False
        self._scheduler: Any = None
        self._guard: asyncio.TimerHandle | None = None
        self._step_base_s = 0.0

    # ------------------------------------------------------------- the plans

    def start(self) -> None:
        """Begins to count; called on the loop, before `set`."""
        logging.getLogger("apscheduler").setLevel(logging.ERROR)  # it tells of each single job
        self._scheduler = AsyncIOScheduler(timezone=UTC)
        self._scheduler.start()
        self._step_base_s = self._offset_s()
        self._look_at_clock()

    def set(self, uuid: str, plan: Plan) -> None:
        """Takes a volume, or another plan for it; the same plan again changes nothing.

        Raises ValueError for a cron line that APScheduler cannot read, or too many volumes.
        """
        volume = self._volumes.get(uuid)
        if volume is not None and volume.plan == plan:
            return
        if volume is None:
            if len(self._volumes) >= MAX_VOLUMES:
                raise ValueError(f"more than {MAX_VOLUMES} volumes")
            volume = _Volume(plan)
        now = self._wall()
        triggers = self._triggers(uuid, plan, now)
        self._drop_jobs(volume)
        self._volumes[uuid] = volume
        volume.plan = plan
        for kind, trigger in triggers.items():
            volume.jobs[kind] = self._scheduler.add_job(
                self._due,
                trigger,
                args=(uuid, kind),
                id=f"{uuid} {kind}",
                coalesce=True,
                max_instances=1,
                misfire_grace_time=None,
                next_run_time=trigger.get_next_fire_time(None, now),
            )
            self._expect(volume, kind)

    def remove(self, uuid: str) -> None:
        """Forgets a volume and what it waits for; a pass that runs goes on to its end."""
        volume = self._volumes.pop(uuid, None)
        if volume is None:
            return
        self._drop_jobs(volume)
        self._drop_retry(volume)
        for lane in (self._passes, self._verifies):
            want = lane.queue.pop(uuid, None)
            if want is not None:
                want.ended.cancel()

    @property
    def volumes(self) -> frozenset[str]:
        """The volumes that have a plan."""
        return frozenset(self._volumes)

    @property
    def paused(self) -> bool:
        """Does no pass begin?"""
        return self._paused

    def pause(self) -> None:
        """Begins no pass any more; those that run go on."""
        self._paused = True
        self._scheduler.pause()

    def resume(self) -> None:
        """Begins passes again: each volume that was due meanwhile gets one."""
        self._paused = False
        self._scheduler.resume()
        self._begin_all()

    def hold(self) -> None:
        """Lets nothing become due by itself any more; what is asked for is made all the same."""
        self._scheduler.pause()

    def let_go(self) -> None:
        """Ends `hold`; a pause stays."""
        if not self._paused:
            self._scheduler.resume()

    # ------------------------------------------------------------- passes

    def trigger(self, uuid: str, reason: Reason) -> None:
        """Asks for a pass as soon as there is a place; while one runs, for one more after it.

        Several calls before it begins are one pass. A volume that has no plan any more gets none.
        """
        if uuid in self._volumes:
            self._ask(uuid, reason)

    async def make(self, uuid: str, reason: Reason) -> bool:
        """Asks as `trigger` does, and waits for the end of that pass.

        Returns False when it never came or was broken off: the volume was removed, or `cancel`.
        """
        if uuid not in self._volumes:
            return False
        ended = self._ask(uuid, reason).ended
        await asyncio.wait([ended])
        return not ended.cancelled()

    def _ask(self, uuid: str, reason: Reason) -> _Want:
        self._drop_retry(self._volumes[uuid])
        want = self._want(uuid, reason)
        self._begin_all()
        return want

    def retry(self, uuid: str, attempt: int, kind: Kind = Kind.ORDINARY) -> int:
        """Asks for a pass after a while that doubles with each attempt, counted from 1.

        Until then the schedule's own passes of the volume are left out; `trigger` is not held up.
        Returns the wait in milliseconds. A volume that was removed while its pass ran gets none.
        """
        volume = self._volumes.get(uuid)
        if volume is None:
            return 0
        self._drop_retry(volume)
        wait_ms = retry_wait_ms(attempt)
        timer = asyncio.get_running_loop().call_later(wait_ms / 1000, self._retry_due, uuid)
        volume.retry = _Retry(timer, kind)
        return wait_ms

    def running(self) -> dict[str, Reason]:
        """The passes that run now."""
        return {uuid: one.reason for uuid, one in self._running.items()}

    def next_ms(self, uuid: str) -> int | None:
        """In how many milliseconds the next pass of the volume is due: 0 if it waits for a place.

        None when there is none: no such volume, paused, or a cron line that names no more time.
        """
        volume = self._volumes.get(uuid)
        if volume is None or self._paused:
            return None
        if uuid in self._passes.queue or uuid in self._verifies.queue:
            return 0
        if volume.retry is not None:
            wait_s = volume.retry.timer.when() - asyncio.get_running_loop().time()
            return max(0, round(wait_s * 1000))
        dues = [job.next_run_time for job in volume.jobs.values() if job.next_run_time is not None]
        if not dues:
            return None
        due: datetime = min(dues)
        return max(0, round((due - self._wall()).total_seconds() * 1000))

    async def cancel(self) -> tuple[str, ...]:
        """Forgets all that waits and cancels all that runs, and waits for its end.

        What comes due meanwhile begins, unless it is paused first. Returns the volumes whose pass
        has not ended within `STOP_WITHIN_S`.
        """
        for volume in self._volumes.values():
            self._drop_retry(volume)
        for lane in (self._passes, self._verifies):
            for want in lane.queue.values():
                want.ended.cancel()
            lane.queue.clear()
        tasks = {one.task: uuid for uuid, one in self._running.items()}
        for task in tasks:
            task.cancel()
        if not tasks:
            return ()
        _, left = await asyncio.wait(tasks, timeout=STOP_WITHIN_S)
        return tuple(sorted(tasks[task] for task in left))

    async def stop(self) -> tuple[str, ...]:
        """Ends everything for good; returns what `cancel` does. Idempotent."""
        if self._scheduler is None:
            return ()
        self.pause()
        stuck = await self.cancel()
        if self._guard is not None:
            self._guard.cancel()
        for volume in self._volumes.values():
            self._drop_jobs(volume)
        scheduler, self._scheduler = self._scheduler, None
        scheduler.shutdown(wait=False)
        await asyncio.sleep(0)  # it shuts down in the next turn of the loop
        return stuck

    # ------------------------------------------------------------- what is due

    async def _due(self, uuid: str, kind: Kind) -> None:
        """Called by APScheduler; a coroutine, because it runs plain functions in threads."""
        volume = self._volumes.get(uuid)
        if volume is None or kind not in volume.jobs:
            return
        early_s = volume.expected_s[kind] - asyncio.get_running_loop().time()
        by_clock = isinstance(volume.jobs[kind].trigger, _Cron)
        self._follow_clock()
        self._expect(volume, kind)
        if early_s > _EARLY_S and not by_clock:  # the clock was set forward, no time has passed
            return
        left_ms = self._left_ms(uuid, volume.plan, kind)
        if left_ms is not None and left_ms > _EARLY_S * 1000:  # it came meanwhile, unscheduled
            self._due_in(volume, kind, left_ms)
            return
        if volume.retry is not None:
            volume.retry.kind = max(volume.retry.kind, kind, key=_KINDS.index)
        elif kind is not Kind.ORDINARY or uuid not in self._running:
            self._want(uuid, Reason(Cause.SCHEDULE, kind))
            self._begin_all()

    def _retry_due(self, uuid: str) -> None:
        volume = self._volumes[uuid]
        if volume.retry is not None:
            kind, volume.retry = volume.retry.kind, None
            self._want(uuid, Reason(Cause.RETRY, kind))
            self._begin_all()

    def _want(self, uuid: str, reason: Reason) -> _Want:
        lane = self._lane(reason.kind)
        want = lane.queue.get(uuid)
        if want is None:
            ended = asyncio.get_running_loop().create_future()
            want = lane.queue[uuid] = _Want(reason, ended)
        else:
            want.reason = want.reason.with_(reason)
        return want

    def _lane(self, kind: Kind) -> _Lane:
        return self._verifies if kind is Kind.VERIFY else self._passes

    def _begin_all(self) -> None:
        """Gives the free places to who waits longest and has no pass of its volume running."""
        if self._paused:
            return
        for lane in (self._verifies, self._passes):
            for uuid in list(lane.queue):
                if lane.running >= lane.limit:
                    break
                if uuid not in self._running and not (lane is self._verifies and self._asked(uuid)):
                    self._begin(lane, uuid)

    def _asked(self, uuid: str) -> bool:
        """Does a pass of the volume wait that is more than the schedule's, and so goes first?"""
        want = self._passes.queue.get(uuid)
        return want is not None and want.reason.cause is not Cause.SCHEDULE

    def _begin(self, lane: _Lane, uuid: str) -> None:
        wants = [lane.queue.pop(uuid)]
        if lane is self._verifies and uuid in self._passes.queue:
            wants.append(self._passes.queue.pop(uuid))  # a verify does all that it would do
        lane.running += 1
        task = asyncio.ensure_future(self._make(uuid, wants[0].reason))
        self._running[uuid] = _Running(task, wants[0].reason)
        task.add_done_callback(lambda task: self._ended(task, lane, uuid, wants))
        self._watch(task)

    async def _make(self, uuid: str, reason: Reason) -> None:
        await self._run(uuid, reason)

    def _ended(self, task: asyncio.Task[None], lane: _Lane, uuid: str, wants: list[_Want]) -> None:
        lane.running -= 1
        del self._running[uuid]
        went = not task.cancelled() and task.exception() is None
        for want in wants:
            if not want.ended.done():
                if went:
                    want.ended.set_result(None)
                else:
                    want.ended.cancel()
        self._plan_next(uuid, wants[0].reason.kind)
        self._begin_all()

    def _plan_next(self, uuid: str, kind: Kind) -> None:
        """After a pass of a slower kind: counts its period from its end, if it came to one."""
        volume = self._volumes.get(uuid)
        if volume is None or kind not in volume.jobs:
            return
        left_ms = self._left_ms(uuid, volume.plan, kind)
        period_ms = volume.plan.period_ms(kind)
        if left_ms is None or period_ms is None:
            return
        again_ms = min(period_ms, max(AGAIN_LEAST_MS, period_ms // AGAIN_PART))
        self._due_in(volume, kind, left_ms if left_ms > 0 else again_ms)

    # ------------------------------------------------------------- helpers

    def _triggers(self, uuid: str, plan: Plan, now: datetime) -> dict[Kind, Any]:
        found: dict[Kind, Any] = {}
        if plan.every_ms is not None:
            found[Kind.ORDINARY] = _Every(now, plan.every_ms, plan.jitter_ms)
        elif plan.cron is not None:
            self._zone = self._zone or local_zone()
            found[Kind.ORDINARY] = _Cron(plan.cron, self._zone, plan.jitter_ms)
        for kind in (Kind.FULL, Kind.VERIFY):
            period_ms = plan.period_ms(kind)
            if period_ms is not None:
                left_ms = self._left_ms(uuid, plan, kind)
                due_ms = period_ms if left_ms is None else max(left_ms, min(LATE_MS, period_ms))
                anchor = now + timedelta(milliseconds=due_ms - period_ms)
                found[kind] = _Every(anchor, period_ms, plan.jitter_ms)
        return found

    def _left_ms(self, uuid: str, plan: Plan, kind: Kind) -> int | None:
        """In how many milliseconds such a pass is due by the last one; 0 or less: it is late."""
        period_ms = plan.period_ms(kind)
        since_ms = self._since_ms(uuid, kind) if period_ms is not None else None
        return None if period_ms is None or since_ms is None else period_ms - max(0, since_ms)

    def _due_in(self, volume: _Volume, kind: Kind, wait_ms: int) -> None:
        """Moves a job of a slower kind, and the grid on which it goes on."""
        period_ms = volume.plan.period_ms(kind) or 0
        job, now = volume.jobs[kind], self._wall()
        job.trigger.anchor = now + timedelta(milliseconds=wait_ms - period_ms)
        job.modify(next_run_time=job.trigger.get_next_fire_time(None, now))
        self._expect(volume, kind)

    def _drop_jobs(self, volume: _Volume) -> None:
        for job in volume.jobs.values():
            job.remove()
        volume.jobs.clear()

    def _drop_retry(self, volume: _Volume) -> None:
        if volume.retry is not None:
            volume.retry.timer.cancel()
            volume.retry = None

    def _offset_s(self) -> float:
        return self._wall().timestamp() - asyncio.get_running_loop().time()

    def _expect(self, volume: _Volume, kind: Kind) -> None:
        """Notes when a job is due by the loop's clock, which nobody sets."""
        due: datetime | None = volume.jobs[kind].next_run_time
        wait_s = math.inf if due is None else (due - self._wall()).total_seconds()
        volume.expected_s[kind] = asyncio.get_running_loop().time() + wait_s

    def _look_at_clock(self) -> None:
        self._follow_clock()
        self._guard = asyncio.get_running_loop().call_later(GUARD_EVERY_S, self._look_at_clock)

    def _follow_clock(self) -> None:
        """After a step of the wall clock: moves what is due along with it."""
        step_s = self._offset_s() - self._step_base_s
        if abs(step_s) * 1000 < STEP_MS:
            return
        self._step_base_s += step_s
        for volume in self._volumes.values():
            for kind, job in volume.jobs.items():
                self._move(job, timedelta(seconds=step_s))
                self._expect(volume, kind)

    def _move(self, job: Any, step: timedelta) -> None:  # noqa: ANN401 - it has no type hints
        trigger = job.trigger
        if isinstance(trigger, _Every):
            trigger.anchor += step
        elif step > timedelta(0):
            return  # a moment that was jumped over is due now
        job.modify(next_run_time=trigger.get_next_fire_time(None, self._wall()))


def local_zone() -> tzinfo:
    """The time zone of this process, as tzset(3) finds it; UTC, with a warning, for any other.

    APScheduler's own way refuses a machine whose /etc/timezone and /etc/localtime disagree.
    """
    name = os.environ.get("TZ")
    if name == "":
        return UTC
    place = LOCAL_TIME if name is None else Path(name.removeprefix(":"))
    try:
        if not place.is_absolute():
            return ZoneInfo(str(place))
        with place.open("rb") as file:
            return ZoneInfo.from_file(file, key=place.name)
    except (OSError, LookupError, ValueError) as error:
        log.warning("cron lines are taken for UTC: the zone %s cannot be read: %s", place, error)
        return UTC


def retry_wait_ms(attempt: int) -> int:
    """The wait before an attempt, counted from 1: 1 s doubling to 60 s, a quarter more or less."""
    base_ms = min(RETRY_MOST_MS, RETRY_FIRST_MS << min(max(attempt, 1) - 1, 10))
    wait_ms = base_ms * _random.uniform(0.75, 1.25)
    return round(min(RETRY_MOST_MS, max(RETRY_FIRST_MS, wait_ms)))


def _jitter(most_ms: int) -> timedelta:
    return timedelta(milliseconds=_random.uniform(0, most_ms) if most_ms else 0)

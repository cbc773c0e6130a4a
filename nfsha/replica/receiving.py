"""The receiving side of a handover: near to the giver while it serves, then equal to it, proved.

`approach` makes passes, a full walk among them, until what one brings would fit the clients' stall,
and says so; `finish` runs while the giver stands still: one last pass of what its change journal
names, then a comparison of those folders by content that must find nothing to do, then a look that
the journal named nothing since. Whether a handover may go on is not decided here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from nfsha.core.model import Epoch, FinalChanged, PresyncChanged
from nfsha.core.replication import Approach, Finish, Flow
from nfsha.replica.clocks import Clocks
from nfsha.replica.copying import State
from nfsha.replica.fetching import Fetching
from nfsha.replica.marks import Mark
from nfsha.replica.schedule import Cause, Kind, Reason
from nfsha.replica.tally import Tally

log = logging.getLogger(__name__)

MAX_PASSES = 12
"""More passes than that never came near: something writes too fast."""

MAX_FAILURES = 3
"""So many passes in a row may fail while the giver serves."""

STALL_SHARE = 2
"""The last pass and its proof may take as long as this many of the passes before."""

SHRINKS_BY = 0.8
"""A pass that takes more than this share of the one before does not come nearer."""

PATIENCE = 3
"""So many passes in a row may come no nearer."""


class FarError(Exception):
    """The copy cannot come near, or is not proved equal; the text says which volume and why."""


class Receiving:
    """Both steps of one node that receives."""

    def __init__(
        self,
        fetching: Fetching,
        max_stall_ms: int,
        *,
        clocks: Clocks,
        name_of: Callable[[str], str],
        marks: Callable[[], dict[str, Mark]],
        report: Callable[[PresyncChanged | FinalChanged], None],
        watch: Callable[[asyncio.Task[None]], None],
    ) -> None:
        """`report` gives the core what it waits for."""
        self._fetching = fetching
        self._max_stall_ms = max_stall_ms
        self._clocks = clocks
        self._name_of = name_of
        self._marks = marks
        self._report = report
        self._watch = watch
        self._step: Approach | Finish | None = None
        self._task: asyncio.Task[None] | None = None
        self.passes = 0
        """How many passes this handover has made."""
        self.last_pass_ms = 0
        self.tally = Tally()
        """What this handover, or the last one, has done."""

    def follow(self, flow: Flow) -> None:
        """Takes which way data may flow, after each turn."""
        step = flow if isinstance(flow, Approach | Finish) else None
        if step == self._step:
            return
        before, self._step = self._step, step
        both = isinstance(step, Approach) and isinstance(before, Approach)
        if both and step is not None and before is not None and step.handover == before.handover:
            return  # near enough: what runs goes on
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if isinstance(step, Approach):
            self._run(self._approach(step), PresyncChanged, step.handover)
        elif isinstance(step, Finish):
            self._run(self._finish(step), FinalChanged, step.handover)
        else:
            self._fetching.tally = None
            self._fetching.schedule.let_go()

    def _run(
        self,
        work: Awaitable[None],
        answer: type[PresyncChanged] | type[FinalChanged],
        handover: Epoch,
    ) -> None:
        self._task = asyncio.ensure_future(self._answered(work, answer, handover))
        self._watch(self._task)

    async def _answered(
        self,
        work: Awaitable[None],
        answer: type[PresyncChanged] | type[FinalChanged],
        handover: Epoch,
    ) -> None:
        try:
            await work
        except FarError as error:
            log.warning("the handover cannot go on: %s", error)
            self._report(answer(handover, False, str(error)))
        else:
            self._report(answer(handover, True))

    # ------------------------------------------------------------- near

    async def _approach(self, step: Approach) -> None:
        self.passes, self.last_pass_ms = 0, 0
        self.tally = self._fetching.tally = Tally()
        stuck = await self._fetching.end()  # a verify would keep its volume for hours
        if stuck:
            raise FarError(stuck)
        self._fetching.begin(step.epoch)
        self._fetching.schedule.hold()
        failures = far = 0
        while self.passes < MAX_PASSES:
            kind = Kind.ORDINARY if self.passes or step.urgent else Kind.FULL
            before_ms, began_ms = self.last_pass_ms, self._clocks.now_ms()
            what = "changes" if self.passes else "full"
            trouble = await self._round(what, self._fetching.copies, kind)
            if trouble:
                failures += 1
                if failures >= MAX_FAILURES:
                    raise FarError(trouble)
                continue
            failures = 0
            self.passes += 1
            self.last_pass_ms = self._clocks.now_ms() - began_ms
            if kind is Kind.ORDINARY and self.last_pass_ms * STALL_SHARE <= self._max_stall_ms:
                return
            comes_nearer = self.passes < 3 or self.last_pass_ms < before_ms * SHRINKS_BY
            far = 0 if comes_nearer else far + 1
            if far >= PATIENCE:
                break
        raise FarError(
            f"a pass still takes {self.last_pass_ms / 1000:.1f} s after {self.passes} passes, and "
            f"handover.max_stall is {self._max_stall_ms / 1000:g} s: something writes too fast "
            f"(the most in {self._busiest()})"
        )

    async def _round(self, what: str, volumes: Iterable[str], kind: Kind) -> str:
        """`_passes_of`, counted."""
        began_ms, trouble = self._clocks.now_ms(), "it was broken off"
        self.tally.begin_round(what)
        try:
            trouble = await self._passes_of(volumes, kind)
        except FarError as error:
            trouble = str(error)
            raise
        finally:
            self.tally.end_round(self._clocks.now_ms() - began_ms, trouble)
        return trouble

    async def _passes_of(self, volumes: Iterable[str], kind: Kind) -> str:
        """One pass of each volume; returns what went wrong, or "". FarError for what will not."""
        wanted = list(volumes)
        reason = Reason(Cause.COMMAND, kind)
        schedule = self._fetching.schedule
        came = await asyncio.gather(*(schedule.make(uuid, reason) for uuid in wanted))
        for uuid, done in zip(wanted, came, strict=True):
            copy = self._fetching.copies.get(uuid)
            if copy is None or not done:
                return f"volume {self._name_of(uuid)}: its pass was broken off"
            if copy.state in (State.HELD, State.REFUSED):
                raise FarError(f"volume {self._name_of(uuid)}: {copy.why}")
            if copy.state is not State.IDLE:
                return f"volume {self._name_of(uuid)}: {copy.why}"
        return ""

    def _busiest(self) -> str:
        marks = self._marks()
        busiest = max(marks, key=lambda uuid: marks[uuid].duration_ms, default="")
        return f"volume {self._name_of(busiest)}" if busiest else "no volume"

    # ------------------------------------------------------------- equal

    async def _finish(self, step: Finish) -> None:
        volumes = tuple(self._fetching.copies)
        trouble = await self._round("last", volumes, Kind.ORDINARY)
        if trouble:
            raise FarError(trouble)
        await asyncio.gather(*(self._prove(uuid, step.epoch) for uuid in volumes))

    async def _prove(self, uuid: str, epoch: Epoch) -> None:
        name = self._name_of(uuid)
        mark = self._marks().get(uuid)
        if mark is None or mark.epoch != epoch:
            raise FarError(f"volume {name} is not a whole replica")
        if mark.walk != "folders":
            raise FarError(
                f"volume {name}: the giver's change journal could not vouch for the last pass"
            )
        difference = await self._fetching.prove(uuid, epoch, mark)
        if difference:
            raise FarError(f"volume {name} is not proved equal: {difference}")

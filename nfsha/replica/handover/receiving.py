"""The receiving side of a handover: near to the giver while it serves, then equal to it, proved.

`approach` walks each volume once and compares by content what changed since the takeover, then
makes passes of what the giver's change journal names, by content too, until the rest would fit the
clients' stall. `finish` runs while the giver stands still: one list of what changed since, one last
pass of it, a dry pass over the same folders by content that must find nothing, and another list:
the journal has seen no write since the first. Whether a handover may go on is not decided here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping

from nfsha.core.model import Epoch, FinalChanged, PresyncChanged
from nfsha.core.replication import Approach, Fetch, Finish, Flow, Offer
from nfsha.replica.clocks import Clocks
from nfsha.replica.fetching.copying import State
from nfsha.replica.fetching.fetching import Fetching
from nfsha.replica.fetching.guards import TROUBLES, RefusedError
from nfsha.replica.fetching.schedule import Cause, Kind, Reason
from nfsha.replica.fetching.tally import Tally
from nfsha.replica.handover.convergence import Convergence, Took
from nfsha.replica.source.listing import Listing
from nfsha.replica.volume.marks import Mark

log = logging.getLogger(__name__)

MAX_ROUNDS = 20
"""More rounds of passes than that never came near: something writes too fast."""

MAX_FAILURES = 6
"""So many rounds in a row may fail, or be refused, while the giver serves."""

RETRY_AFTER_S = 1.0
"""So long after a failed one comes the next. A giver that has only just taken over offers its
volumes a moment later, and one whose rsync daemon died has another within 5 s.
"""

HANGS_AFTER_S = 10.0
"""A pass that has not ended by then may hang in a dead disk: its volume is asked, again and again.
"""

FINISH_SHARE = 0.95
"""Of the time that the frozen part may take: what is late is named just before all of it ends."""


SPARES_GO_WITHIN_S = 5.0
"""So long ordinary passes wait, after a handover that ended, until its spare copies are removed."""


class FarError(Exception):
    """The copy cannot come near, or is not proved equal; the text says which volume and why."""


class Receiving:
    """Both steps of one node that receives."""

    def __init__(
        self,
        fetching: Fetching,
        max_stall_ms: int,
        *,
        parallel: int,
        clocks: Clocks,
        name_of: Callable[[str], str],
        marks: Callable[[], dict[str, Mark]],
        report: Callable[[PresyncChanged | FinalChanged], None],
        watch: Callable[[asyncio.Task[None]], None],
    ) -> None:
        """`parallel` volumes are proved at once; `report` gives the core what it waits for."""
        self._fetching = fetching
        self._max_stall_ms = max_stall_ms
        self._parallel = parallel
        self._clocks = clocks
        self._name_of = name_of
        self._marks = marks
        self._report = report
        self._watch = watch
        self._step: Approach | Finish | None = None
        self._hurries = False
        self._untidy = False
        """The last handover did not end in a copy: what spares it left are not removed yet."""
        self._task: asyncio.Task[None] | None = None
        self._awaited: dict[str, str] = {}
        """What the frozen part waits for, of each volume."""
        self.tally = Tally()
        """What this handover, or the last one, has done."""

    def follow(self, flow: Flow) -> None:
        """Takes which way data may flow, after each turn."""
        step = flow if isinstance(flow, Approach | Finish) else None
        if step == self._step:
            if self._untidy and isinstance(flow, Fetch | Offer):  # a takeover came between
                self._untidy = False
                self._watch(asyncio.ensure_future(self._fetching.sparing.drop()))
            return
        before, self._step = self._step, step
        goes_on = (
            isinstance(step, Approach)
            and isinstance(before, Approach)
            and step.handover == before.handover
        )
        hurries = isinstance(step, Approach) and (step.urgent or (goes_on and self._hurries))
        self._fetching.pressing = hurries or isinstance(step, Finish)
        if goes_on:
            return  # near enough: what runs goes on
        ending, self._task = self._task, None
        if ending is not None:
            ending.cancel()
        if isinstance(step, Approach):
            self._run(self._approach(step), PresyncChanged, step.handover)
        elif isinstance(step, Finish):
            self._run(self._finish(step), FinalChanged, step.handover)
        else:
            self._fetching.tally = None
            self._fetching.careful = self._fetching.thorough = False
            self._untidy = not isinstance(flow, Fetch)
            if self._untidy:
                self._fetching.schedule.let_go()
            else:  # it came to nothing, and this node stays a copy
                self._watch(asyncio.ensure_future(self._go_on(ending)))

    async def _go_on(self, ending: asyncio.Task[None] | None) -> None:
        """Ordinary passes come again, once the spares of the handover are gone."""
        dropping = asyncio.ensure_future(self._drop_after(ending))
        self._watch(dropping)
        await asyncio.wait({dropping}, timeout=SPARES_GO_WITHIN_S)  # not for a disk that hangs
        if self._step is None:
            self._fetching.schedule.let_go()

    async def _drop_after(self, ending: asyncio.Task[None] | None) -> None:
        """What is being cancelled may have made one more."""
        if ending is not None:
            await asyncio.wait({ending})
        await self._fetching.sparing.drop()

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
        self.tally = self._fetching.tally = Tally()
        stuck = await self._fetching.end()  # a verify would keep its volume for hours
        if stuck:
            raise FarError(stuck)
        self._fetching.begin(step.epoch)
        self._fetching.schedule.hold()
        await self._require_writable(self._fetching.copies)
        # What is urgent (nobody is served there any more) does with what the journals name.
        self._fetching.careful = self._fetching.thorough = not step.urgent
        self._hurries = False
        near = Convergence(self._max_stall_ms)
        walked = set(self._fetching.copies) if step.urgent else set[str]()
        failures = 0
        for _ in range(MAX_ROUNDS):
            trouble = await self._round_near(step.epoch, near, walked)
            failures = failures + 1 if trouble else 0
            if failures >= MAX_FAILURES:
                raise FarError(trouble)
            if trouble:
                await asyncio.sleep(RETRY_AFTER_S)
                continue
            if near.hopeless and not near.near:
                break
            await self._spare()
            if near.near and walked >= self._fetching.copies.keys():
                await self._require_writable(self._fetching.copies, durable=True)
                return
        raise FarError(near.sentence())

    async def _require_writable(self, uuids: Iterable[str], *, durable: bool = False) -> None:
        """FarError unless each of these volumes takes a write: a pass may have none to make."""
        if lacking := await self._fetching.proving.unwritable(uuids, durable=durable):
            raise FarError(lacking)

    async def _round_near(self, epoch: Epoch, near: Convergence, walked: set[str]) -> str:
        """One round of passes while the giver serves; returns what went wrong, or "".

        `walked`: the volumes of which all was compared, and the giver's journal knows what changed
        since. The others are walked first.
        """
        if lacking := self._fetching.proving.lacking():
            return lacking
        if not (left := self._fetching.copies.keys() - walked):
            return await self._round_of_changes(epoch, near, walked)
        if not self._hurries:
            try:
                facts = (await self._fetching.finding.list_all(epoch)).facts
            except (RefusedError, *TROUBLES) as error:
                return str(error)
            if facts.leaving:
                self._hurry()
                walked |= left
                return ""
        trouble = await self._round("full", dict.fromkeys(sorted(left), Kind.FULL))
        if not trouble:
            walked |= left
        return trouble

    def _hurry(self) -> None:
        """The giver is about to stop for good.

        It will not wait for a walk and a comparison of all that changed since the takeover, and
        would release without the last writes. Without these a copy is as good as it is for a
        takeover, and has the last writes too: what the giver's journal names is copied by content,
        and proved as ever. Where the journal does not vouch there is a walk all the same.
        """
        log.warning(
            "the other node is about to stop: what its change journals name is copied, without a "
            "walk and a comparison by content of all that changed since the takeover"
        )
        self._hurries = True
        self._fetching.thorough = False
        self._fetching.pressing = True

    async def _spare(self) -> None:
        """The large files that changed get a spare: their last pass takes a fraction then."""
        if self._fetching.careful:
            for uuid in tuple(self._fetching.copies):
                await self._fetching.sparing.make(uuid)

    async def _round_of_changes(self, epoch: Epoch, near: Convergence, walked: set[str]) -> str:
        began_ms = self._clocks.now_ms()
        try:
            listing = await self._fetching.finding.list_all(epoch)
        except (RefusedError, *TROUBLES) as error:
            return str(error)
        listed_ms = self._clocks.now_ms() - began_ms
        changed: dict[str, tuple[bytes, ...]] = {}
        for uuid in self._fetching.copies:
            folders, why = self._since_last_pass(uuid, epoch, listing)
            if folders is None:
                log.warning("volume %s is walked once more: %s", self._name_of(uuid), why)
                walked.discard(uuid)
            elif folders:
                changed[uuid] = folders
        if not walked >= self._fetching.copies.keys():
            return ""
        trouble = await self._round("changes", dict.fromkeys(changed, Kind.ORDINARY), listing)
        if not trouble:
            near.add(
                self._clocks.now_ms() - began_ms,
                self._took(changed),
                proof_ms=self._proof_ms(listed_ms, changed),
                began_ms=began_ms,
            )
        return trouble

    def _took(self, changed: Mapping[str, tuple[bytes, ...]]) -> dict[str, Took]:
        marks, found = self._marks(), {}
        for uuid, folders in changed.items():
            mark, copy = marks.get(uuid), self._fetching.copies.get(uuid)
            if mark is not None and copy is not None:
                found[self._name_of(uuid)] = Took(
                    mark.duration_ms,
                    folders,
                    mark.transferred_bytes,
                    copy.brought,
                    self._fetching.limit_of(uuid),
                )
        return found

    def _proof_ms(self, listed_ms: int, uuids: Iterable[str]) -> int | None:
        """What the proof will take: it lists, and looks by content, as this round has done.

        None where a pass did not look by content.
        """
        looks = [self._fetching.copies[uuid].looked_ms for uuid in uuids]
        known = [one for one in looks if one is not None]
        if not self._fetching.careful or len(known) < len(looks):
            return None
        return listed_ms + max(*known, sum(known) // self._parallel, 0)

    def _since_last_pass(
        self, uuid: str, epoch: Epoch, listing: Listing
    ) -> tuple[tuple[bytes, ...] | None, str]:
        """The folders that changed since the last pass of a volume, or None and why."""
        mark = self._marks().get(uuid)
        if mark is None or mark.epoch != epoch:
            return None, "it is not a whole replica"
        return listing.since(mark)

    async def _round(
        self, what: str, kinds: Mapping[str, Kind], listing: Listing | None = None
    ) -> str:
        """`_passes_of`, counted; with a listing the passes go by that."""
        began_ms, trouble = self._clocks.now_ms(), "it was broken off"
        self.tally.begin_round(what)
        self._fetching.listed = listing
        try:
            trouble = await self._passes_of(kinds)
        except FarError as error:
            trouble = str(error)
            raise
        finally:
            self._fetching.listed = None
            self.tally.end_round(self._clocks.now_ms() - began_ms, trouble)
        return trouble

    async def _passes_of(self, kinds: Mapping[str, Kind]) -> str:
        """One pass of each volume; returns what went wrong, or "". FarError for what will not."""
        for uuid, done in (await self._made(kinds)).items():
            copy = self._fetching.copies.get(uuid)
            if copy is None or not done:
                return f"volume {self._name_of(uuid)}: its pass was broken off"
            if copy.state is State.HELD:
                raise FarError(f"volume {self._name_of(uuid)}: {copy.why}")
            if copy.state is not State.IDLE:
                return f"volume {self._name_of(uuid)}: {copy.why}"
        return ""

    async def _made(self, kinds: Mapping[str, Kind]) -> dict[str, bool]:
        """Waits for a pass of each volume. FarError for a volume in which it hangs."""
        schedule = self._fetching.schedule
        making = {
            uuid: asyncio.ensure_future(schedule.make(uuid, Reason(Cause.COMMAND, kind)))
            for uuid, kind in kinds.items()
        }
        try:
            while left := [uuid for uuid, one in making.items() if not one.done()]:
                self._awaited = dict.fromkeys(left, "its last pass has not ended")
                waited = [making[uuid] for uuid in left]
                done, _ = await asyncio.wait(waited, timeout=HANGS_AFTER_S)
                if not done:
                    await self._require_writable(left)
        finally:
            for one in making.values():
                one.cancel()
        return {uuid: one.result() for uuid, one in making.items()}

    # ------------------------------------------------------------- equal

    async def _finish(self, step: Finish) -> None:
        """What is late is named: who serves again needs to know where it hung."""
        limit_s = FINISH_SHARE * 2 * self._max_stall_ms / 1000
        self._awaited.clear()
        try:
            async with asyncio.timeout(limit_s):
                await self._equal(step)
        except TimeoutError as error:
            late = sorted(self._awaited.items())
            words = "; ".join(f"volume {self._name_of(uuid)}: {what}" for uuid, what in late)
            if late:  # an alarm tells of a volume that hangs, also when all of this is over
                self._watch(
                    asyncio.ensure_future(self._fetching.proving.look_for_hangs(self._awaited))
                )
            told = words or "the giver has not told what changed"
            raise FarError(f"not proved within {limit_s:.1f} s of freeze: {told}") from error

    async def _equal(self, step: Finish) -> None:
        """One fetch for all volumes before the last passes, and one after the proof of them."""
        self._fetching.careful = self._fetching.thorough = (
            False  # the proof itself reads all that the last pass looks at
        )
        if lacking := self._fetching.proving.lacking():
            raise FarError(lacking)
        volumes = tuple(self._fetching.copies)
        frozen = await self._list(step.epoch)
        changed = {}
        for uuid in volumes:
            folders, why = self._since_last_pass(uuid, step.epoch, frozen)
            if folders is None:
                raise FarError(f"volume {self._name_of(uuid)} cannot be proved equal: {why}")
            if folders:
                changed[uuid] = folders
        trouble = await self._round("last", dict.fromkeys(changed, Kind.ORDINARY), frozen)
        if trouble:
            raise FarError(trouble)
        self._awaited = dict.fromkeys(changed, "the comparison with the giver's has not ended")
        at_once = asyncio.Semaphore(self._parallel)
        await self._fetching.sparing.drop()
        await asyncio.gather(*(self._prove(one, step.epoch, at_once) for one in changed.items()))
        # A volume that was not written to in the freeze may hang all the same.
        self._awaited = dict.fromkeys(volumes, "a write to it, or the giver's list, does not come")
        _, last = await asyncio.gather(self._require_writable(volumes), self._list(step.epoch))
        self._awaited.clear()
        alone = [one.name for one in last.facts.volumes if one.identity not in volumes]
        if alone:
            raise FarError(f"the giver has volumes without a copy here: {', '.join(alone)}")
        for uuid in volumes:
            self._refuse(uuid, await self._fetching.proving.vouch(uuid, step.epoch, last))

    async def _list(self, epoch: Epoch) -> Listing:
        try:
            return await self._fetching.finding.list_all(epoch)
        except (RefusedError, *TROUBLES) as error:
            raise FarError(str(error)) from error

    async def _prove(
        self, changed: tuple[str, tuple[bytes, ...]], epoch: Epoch, at_once: asyncio.Semaphore
    ) -> None:
        uuid, folders = changed
        async with at_once:
            self._refuse(uuid, await self._fetching.proving.compare(uuid, epoch, folders))
        del self._awaited[uuid]

    def _refuse(self, uuid: str, difference: str) -> None:
        if difference:
            raise FarError(f"volume {self._name_of(uuid)} is not proved equal: {difference}")

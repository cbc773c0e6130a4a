"""Verifies of copies: what is equal by name, size and time is compared by content, and repaired.

Ordinary passes go on meanwhile. How files are compared is `nfsha.replica.content.verify`'s.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from nfsha.core.model import Epoch
from nfsha.replica.content.changed_files import ChangedQuestion
from nfsha.replica.content.suspects import SuspectAnswer, SuspectQuestion
from nfsha.replica.content.verify import Helpers, Verify, VerifyOutcome, VerifyRequest
from nfsha.replica.fetching.copying import Copy, State
from nfsha.replica.fetching.desk import Desk
from nfsha.replica.fetching.finding import Finding, fresh_folder
from nfsha.replica.fetching.guards import RefusedError
from nfsha.replica.fetching.passing import Passing
from nfsha.replica.fetching.schedule import Cause, Reason
from nfsha.replica.files.beneath import shown
from nfsha.replica.quarantine.quarantine import Quarantine
from nfsha.replica.rsync.exits import Verdict
from nfsha.replica.volume import volumes
from nfsha.replica.volume.facts import VolumeFacts
from nfsha.replica.volume.marks import Mark

log = logging.getLogger(__name__)

VERIFY_PAUSES_MS = 300_000
"""How long a verify goes on without an ordinary pass where these come by a cron line."""


class Verifying:
    """Makes verifies; what came of each stands in its `Copy`."""

    def __init__(self, desk: Desk, finding: Finding, passing: Passing) -> None:
        self._desk = desk
        self._finding = finding
        self._passing = passing

    async def compare_changed(self, copy: Copy, epoch: Epoch) -> None:
        """Compares by content what changed since the epoch began, or was compared last.

        For what a walk cannot see: a file that was changed, with size and time set back.
        """
        copy.state, copy.why = State.RUNNING, "asks the source which files changed"
        began_ms = self._desk.clocks.now_ms()
        mark = self._desk.store.own.get(copy.uuid)
        began_ns = 0 if mark is None else mark.started_ns
        question = self._question(copy, epoch, began_ms)
        scratch = self._desk.scratch / f"{copy.uuid}-changed"
        await asyncio.to_thread(fresh_folder, scratch)
        changed = await self._desk.asking.ask_changed(
            question, lambda name: self._finding.answer(epoch, scratch, name)
        )
        if changed is None:
            self._desk.failed(copy, "the source did not tell which files changed")
            return
        log.info(
            "volume %s: %s are compared by content", self._desk.name_of(copy.uuid),
            "all files" if changed.more else f"{len(changed.names)} files that changed",
        )  # fmt: skip
        copy.rest(State.IDLE, "no file changed")
        if changed.more or changed.names:
            await self.verify(copy, epoch, None if changed.more else changed.names)
        if copy.state is State.IDLE:
            copy.compared = (epoch, began_ms, began_ns)

    def _question(self, copy: Copy, epoch: Epoch, now_ms: int) -> ChangedQuestion:
        """What changed since all was compared by content; in this epoch, if it never was."""
        if copy.compared is None or copy.compared[0] != epoch:
            return ChangedQuestion(copy.uuid, None, now_ms)
        _, then_ms, then_ns = copy.compared
        return ChangedQuestion(copy.uuid, now_ms - then_ms, now_ms, then_ns)

    async def verify(self, copy: Copy, epoch: Epoch, names: Sequence[bytes] | None = None) -> None:
        """Compares contents; ordinary passes take turns with it. What differs is repaired.

        With `names` only these, as fast as it goes.
        """
        began_ms = self._desk.clocks.now_ms()
        if names is None:
            await self._passing.make(copy, epoch, Reason(Cause.SCHEDULE))
        mark = self._desk.store.own.get(copy.uuid)
        if copy.state is not State.IDLE or mark is None:
            return
        here = self._desk.inventory.by_uuid(copy.uuid)
        if here is None:
            raise RefusedError("it is not mounted here any more")
        scratch = self._desk.scratch / f"{copy.uuid}-verify"
        await asyncio.to_thread(fresh_folder, scratch)
        root_fd = await asyncio.to_thread(volumes.open_root, here)
        try:
            outcome = await self._verified(copy, epoch, mark, root_fd, scratch, names)
        finally:
            os.close(root_fd)
        self._note_findings(copy, here, outcome, whole=names is None)
        if outcome.verdict is Verdict.KILLED and self._desk.epoch is None:
            copy.rest(State.OFF, "ended: the state of this node changed")
            return
        if outcome.verdict not in (Verdict.COMPLETE, Verdict.INCOMPLETE):
            self._desk.failed(copy, outcome.sentence)
            return
        if self._desk.careful and not outcome.all_equal:
            self._desk.failed(copy, f"not all that changed could be made equal: {outcome.sentence}")
            return
        if copy.verified_ns is not None and names is None:
            await self._desk.under_way.write(
                self._desk.store.note_verify, copy.uuid, copy.verified_ns
            )
            if outcome.all_equal:
                copy.compared = (epoch, began_ms, mark.started_ns)
        log.info("volume %s: verified: %s", here.name, outcome.sentence)
        copy.rest(State.IDLE, f"verified: {outcome.sentence}")

    def _note_findings(
        self, copy: Copy, here: VolumeFacts, outcome: VerifyOutcome, *, whole: bool
    ) -> None:
        if whole:
            copy.verified_ns = self._desk.clocks.wall_ns()
            copy.damaged, copy.missed = outcome.damaged, outcome.missed
        else:  # what the last whole verify found still stands
            copy.damaged += outcome.damaged
            copy.missed += outcome.missed
        if self._desk.tally is not None:
            self._desk.tally.put_aside(copy.uuid, here.name, len(outcome.repaired))
        for found in outcome.findings:
            log.error(
                "volume %s: %s: %s: %s", here.name, shown(found.name), found.kind, found.evidence
            )

    async def _verified(
        self,
        copy: Copy,
        epoch: Epoch,
        mark: Mark,
        root_fd: int,
        scratch: Path,
        names: Sequence[bytes] | None,
    ) -> VerifyOutcome:
        verify = Verify(
            VerifyRequest(
                copy.uuid,
                root_fd,
                self._desk.source(epoch),
                read_kib_s=None if self._desk.careful else self._desk.sync.verify_bandwidth_kib_s,
                timeout_s=self._desk.sync.timeout_s,
                connect_timeout_s=self._desk.sync.connect_timeout_s,
                expected_bytes=mark.bytes,
            ),
            scratch,
            self._desk.clocks.now_ms,
        )

        async def fresh_pass() -> bool:
            await self._passing.make(copy, epoch, Reason(Cause.SCHEDULE))
            done = copy.state is State.IDLE
            copy.state, copy.why = State.RUNNING, "verifies the contents"
            return done

        async def ask(question: SuspectQuestion) -> tuple[SuspectAnswer, ...] | None:
            return await self._desk.asking.ask(
                question, lambda name: self._finding.answer(epoch, scratch, name)
            )

        @asynccontextmanager
        async def turn() -> AsyncIterator[None]:
            now = self._desk.store.own.get(copy.uuid)
            age_ms = (
                (self._desk.clocks.wall_ns() - now.started_ns) // 1_000_000
                if now is not None
                else 0
            )
            if age_ms > (self._desk.sync.every_ms or VERIFY_PAUSES_MS):
                await fresh_pass()
            yield

        copy.state, copy.why = State.RUNNING, "verifies the contents"
        with self._desk.under_way.noted(copy.uuid, verify):
            return await verify.run(
                Helpers(turn, fresh_pass, ask, Quarantine(root_fd), epoch, mark),
                copy.take_progress,
                names=names,
            )

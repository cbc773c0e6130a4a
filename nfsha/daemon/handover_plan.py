"""The plan of a move: its guards, what it would change in numbers, and whether it still holds.

A plan has an id over what an operator approves: which move, of which epoch and volumes, which of
them are resynced (so that files go to quarantine), which deletions wait for a word, which guards
fail. New writes of clients do not change it. The numbers come from the receiver's own look at the
volumes; the giver asks it with its facts, and hears them with the receiver's. Level-triggered: a
question stands in the facts until its answer is there.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from nfsha.core import lease
from nfsha.core.model import Epoch, Role
from nfsha.daemon.handover_answers import HandoverAnswers
from nfsha.daemon.shapes import fits
from nfsha.daemon.shell import Shell
from nfsha.host.control import CommandError, Credentials
from nfsha.replica.fetching import estimate
from nfsha.replica.fetching.estimate import SHAPE, Estimate
from nfsha.replica.replicator import Replicator
from nfsha.replica.volume.inventory import Pair
from nfsha.replica.volume.marks import EVERYTHING

Facts = dict[str, Any]

REMEMBERED: Final = 32
"""So many plans that were shown are remembered, to say what changed since."""

SHOW_EVERY_S: Final = 0.5
ANSWER_WITHIN_S: Final = 10.0
"""The other node says within this time that it looks; it hears the question in some 100 ms."""

ID_DIGITS: Final = 12

ASKED: Final = "numbers_asked"
TOLD: Final = "numbers"
"""In the facts that the nodes tell each other: a question, and its answer."""

_WORDS: Final = {
    "to": "the target",
    "epoch": "the epoch",
    "volumes": "the volumes",
    "resync": "the volumes whose files may go to quarantine",
    "held": "the deletions that wait for an operator",
    "failing": "the guards that fail",
}


MAX_SHOWN: Final = 60
"""So much is repeated of the name of a plan."""


@dataclass(slots=True)
class _Question:
    """What the other node is asked; all who want to know it now wait for the one answer."""

    id: str = ""
    list: bool = False
    askers: int = 0
    answer: Facts | None = None


class Plans:
    """The plans of one daemon, and the questions of the other one."""

    def __init__(self, shell: Shell, answers: HandoverAnswers) -> None:
        self._shell = shell
        self._answers = answers
        self._replication = shell.world.replication
        self._shown: OrderedDict[str, Facts] = OrderedDict()
        self._question: _Question | None = None
        self._answering = ""
        self._task: asyncio.Task[None] | None = None

    # ------------------------------------------------------------- the plan

    async def look(self, *, young_ms: int = 0) -> None:
        """Has both nodes look at themselves, so that what is judged next is so now.

        A look of at most `young_ms` ago will do.
        """
        await self._answers.look(young_ms=young_ms)

    def plan(self, to: Role, numbers: Facts | None = None) -> Facts:
        """All guards, with the id of the plan; with the numbers what they forbid, too.

        `resync` names the volumes whose files may go to quarantine: only the numbers tell whether
        there is room for that.
        """
        plan = self._answers.plan(to)
        guards = [*plan["guards"], *self._deletions(to, numbers), *_room(numbers)]
        basis = self._basis(to, guards)
        number = _id(basis)
        self._shown[number] = basis
        self._shown.move_to_end(number)
        while len(self._shown) > REMEMBERED:
            self._shown.popitem(last=False)
        ok = all(one["ok"] for one in guards)
        return {**plan, "ok": ok, "guards": guards, "plan": number, "resync": basis["resync"]}

    def require(self, to: Role, approved: str) -> None:
        """Raises CommandError where a guard fails, or where the approved plan is not this one."""
        plan = self.plan(to)
        if not plan["ok"]:
            bad = [f"{one['name']}: {one['found']}" for one in plan["guards"] if not one["ok"]]
            raise CommandError("; ".join(bad), {"refused": True, **plan})
        if plan["plan"] == approved:
            return
        before, now = self._shown.get(approved), self._shown[plan["plan"]]
        named = approved[:MAX_SHOWN]
        changed = _changes(before, now) if before is not None else f"no plan {named!r} is known"
        raise CommandError(
            f"plan {named} was approved, the present one is {plan['plan']}: {changed}; look at "
            "it, and approve it anew",
            {"refused": True, **plan},
        )

    def _basis(self, to: Role, guards: Iterable[Facts]) -> Facts:
        """What an approval is of; the same on both nodes."""
        engine, replicator = self._shell.engine, self._replication.replicator
        epoch = engine.state.durable.epoch if engine is not None else None
        pairs = replicator.inventory.pairs() if replicator is not None else ()
        return {
            "to": str(to),
            "epoch": "none" if epoch is None else f"{epoch.number} ({epoch.id})",
            "volumes": sorted(f"{pair.name} ({pair.uuid})" for pair in pairs),
            "resync": sorted(pair.name for pair in pairs if self._resynced(to, pair, epoch)),
            "held": sorted(f"{name} ({plan[:16]})" for name, plan in self._held(to)),
            "failing": sorted(one["name"] for one in guards if not one["ok"]),
        }

    def _resynced(self, to: Role, pair: Pair, epoch: Epoch | None) -> bool:
        """Does the receiver's volume hold older data, or a mixture, and not nothing at all?"""
        here = self._receives(to)
        one = pair.here if here else pair.there
        if one is None or one.empty:
            return False
        replicator = self._replication.replicator
        told = self._replication.told.get("tainted")
        tainted = replicator.store.taints if here and replicator is not None else told
        marked = isinstance(tainted, Mapping) and (pair.uuid in tainted or EVERYTHING in tainted)
        return one.stamp != epoch or marked

    def _held(self, to: Role) -> list[tuple[str, str]]:
        """The volumes of the receiver whose deletions wait for an operator, with their plans."""
        replicator = self._replication.replicator
        if replicator is None:
            return []
        told = self._replication.told.get("held")
        held = replicator.overview.held() if self._receives(to) else told
        if not isinstance(held, Mapping) or not fits(held, {str: str}):
            return []
        names = {pair.uuid: pair.name for pair in replicator.inventory.pairs()}
        return sorted((names.get(uuid, str(uuid)), str(plan)) for uuid, plan in held.items())

    def _deletions(self, to: Role, numbers: Facts | None) -> list[Facts]:
        """The guard of what a pass deletes; by the last passes, and by the numbers if there are."""
        if self._replication.replicator is None:
            return []
        held = dict(self._held(to))
        why = {name: f"plan {plan[:16]} waits for an operator" for name, plan in held.items()}
        for one in numbers["volumes"] if numbers is not None else ():
            if one["held"]:
                why[one["name"]] = f"{one['held']}, plan {str(one['plan'])[:16]}"
        words = "; ".join(f"volume {name}: {said}" for name, said in sorted(why.items()))
        help_ = "`nfsha sync` and then `nfsha sync --accept-deletes PLAN` on the receiver"
        found = f"{words} ({help_})" if words else "none waits for an operator"
        return [{"name": "deletions", "ok": not words, "found": found}]

    def _receives(self, to: Role) -> bool:
        return self._shell.world.settings.role is to

    # ------------------------------------------------------------- the numbers

    async def numbers(
        self, _command: str, args: Facts, _who: Credentials
    ) -> AsyncGenerator[Facts, None]:
        """`handover-numbers`: how the look at the volumes goes on, then the plan with the numbers.

        The last answer is `done`; where nobody can know its `numbers` are None, and `why` says it.
        """
        to, all_names = Role(str(args.get("to"))), args.get("list") is True
        looks = self._own(all_names) if self._receives(to) else self._asked(all_names)
        async for one in looks:
            if "numbers" not in one:
                yield {"progress": one}
                continue
            await self.look()
            await self.look()  # the look at all volumes may have taken long
            yield {"done": True, "plan": self.plan(to, one["numbers"]), **one}

    async def _own(self, all_names: bool) -> AsyncGenerator[Facts, None]:
        replicator = self._replication.replicator
        why = (
            "somebody else replicates: nfsha copies nothing"
            if replicator is None
            else replicator.why_no_look_ahead()
        )
        if replicator is None or why:
            yield {"numbers": None, "why": why}
            return
        looks = replicator.estimating.begin(replicator.fetching.copies)
        while looks.took_ms is None:
            yield {"looked_at": len(looks.found), "volumes": looks.total}
            await asyncio.sleep(SHOW_EVERY_S if looks.found else SHOW_EVERY_S / 10)
        yield {"numbers": _numbers(replicator, looks, all_names), "why": ""}

    async def _asked(self, all_names: bool) -> AsyncGenerator[Facts, None]:
        """The other node's look, asked for with this one's facts."""
        if self._replication.replicator is None:
            yield {"numbers": None, "why": "somebody else replicates: nfsha copies nothing"}
            return
        clock_s = asyncio.get_running_loop().time
        began_s = clock_s()
        silent_s = began_s + ANSWER_WITHIN_S
        with self._asking(all_names) as question:
            while clock_s() < min(silent_s, began_s + estimate.WITHIN_S + ANSWER_WITHIN_S):
                told = self._told_of(question)
                if question.answer is not None:
                    yield question.answer
                    return
                if told is not None:
                    if self._heard():  # what it told stays there when it is gone
                        silent_s = clock_s() + ANSWER_WITHIN_S
                    if fits(told, {"id": str, "looked_at": int, "volumes": int}):
                        yield {key: told[key] for key in ("looked_at", "volumes")}
                await asyncio.sleep(SHOW_EVERY_S / 10)
        yield {
            "numbers": None,
            "why": f"the other node, which would receive, told nothing for {ANSWER_WITHIN_S:g} s",
        }

    @contextmanager
    def _asking(self, all_names: bool) -> Iterator[_Question]:
        """The question that stands in the facts while somebody waits for its answer.

        Who comes while it stands joins it. Where that one wants more names than were asked for it
        becomes another question: the look at the volumes goes on, and answers that one; all of
        them see the names then.
        """
        question = self._question
        if question is None or question.answer is not None:
            question = self._question = _Question()
        question.askers += 1
        if not question.id or (all_names and not question.list):
            question.id, question.list = secrets.token_hex(8), all_names
            self._replication.say(ASKED, {"id": question.id, "list": question.list})
        try:
            yield question
        finally:
            question.askers -= 1
            if not question.askers and question is self._question:
                self._question = None
                self._replication.say(ASKED, None)

    def _told_of(self, question: _Question) -> Mapping[str, Any] | None:
        """What the other node has told of it so far; its last word is kept for all who wait."""
        told = self._replication.told.get(TOLD)
        if not isinstance(told, Mapping) or told.get("id") != question.id:
            return None
        if "numbers" in told and question.answer is None:
            question.answer = _answer_of(told)
        return told

    def _heard(self) -> bool:
        engine = self._shell.engine
        return engine is not None and lease.peer_heard(engine.state, self._shell.world.clock_ms())

    def heard(self, facts: Mapping[str, Any]) -> None:
        """Takes the other node's facts: it may ask for the numbers."""
        asked = facts.get(ASKED)
        number = asked.get("id") if isinstance(asked, Mapping) else None
        if not isinstance(number, str) or not isinstance(asked, Mapping):
            if self._answering:
                self._end()
                self._replication.say(TOLD, None)
            return
        if number != self._answering:
            self._end()
            self._answering = number
            self._task = asyncio.ensure_future(self._answer(number, asked.get("list") is True))
            self._shell.inbox.watch(self._task)

    def close(self) -> None:
        """Looks at nothing for the other node any more."""
        self._end()

    def _end(self) -> None:
        self._answering = ""
        if self._task is not None:
            self._task.cancel()

    async def _answer(self, number: str, all_names: bool) -> None:
        async for one in self._own(all_names):
            self._replication.say(TOLD, {"id": number, **one})


def _room(numbers: Facts | None) -> list[Facts]:
    """The guard of the room for what a resync brings and keeps; only a look at all can tell."""
    if numbers is None:
        return []
    lacking = [f"volume {one['name']}: {one['lacking']}" for one in numbers["volumes"]]
    words = "; ".join(one for one in lacking if not one.endswith(": "))
    return [{"name": "room", "ok": not words, "found": words or "enough for what would come"}]


def _numbers(replicator: Replicator, looks: Estimate, all_names: bool) -> Facts:
    stall = estimate.stall(
        looks,
        replicator.store.own,
        rate_bytes_s=replicator.fetching.rate_bytes_s,
        parallel=replicator.parallel,
        now_ns=time.time_ns(),
    )
    names = replicator.inventory.name_of
    return estimate.as_facts(looks, names, all_names=all_names, stall=stall)


def _answer_of(told: Mapping[str, Any]) -> Facts:
    """The numbers that the other node told, if they are of the form that is shown."""
    if fits(dict(told), {"id": str, "numbers": (None, SHAPE), "why": str}):
        return {"numbers": told["numbers"], "why": told["why"]}
    return {"numbers": None, "why": "the other node told them in another form: is its nfsha newer?"}


def _id(basis: Facts) -> str:
    text = json.dumps(basis, sort_keys=True).encode()
    return hashlib.sha256(text).hexdigest()[:ID_DIGITS]


def _changes(before: Facts, now: Facts) -> str:
    """In what one plan is another than the one before, in words."""
    return "; ".join(
        f"{words}: before {_said(before[key])}, now {_said(now[key])}"
        for key, words in _WORDS.items()
        if before[key] != now[key]
    )


def _said(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)

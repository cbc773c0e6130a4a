"""`nfsha failback`, `switchover` and `abort`: the service moves, or stays, with nothing lost.

Shows the plan (all guards, and what would change) before it asks, then every step as it comes, then
the report. The move is the daemons': ^C only ends the watching.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from nfsha.cli import client, output, render_handover
from nfsha.cli.exits import Answer, CommandError, Exit
from nfsha.cli.operate import confirm
from nfsha.core.model import Role

POLL_S: Final = 0.1
BEGIN_WITHIN_S: Final = 15.0
"""Longer than a giver's request waits for the other node to begin."""

REPORT_WITHIN_S: Final = 3.0
"""The parts of both nodes are there some 200 ms after the end."""

BACK_WITHIN_S: Final = 20.0
"""A daemon that is restarted answers again within a second or two, a machine that boots later."""

LINE_EVERY_S: Final = 5.0
"""How often a long step shows how far it is, where it is not shown in place."""

LINE_COLUMNS: Final = 120
"""Longer than that no such line is, however wide the terminal. On a narrow one it must not wrap: it
could not be taken away any more."""

_CLEAR_LINE: Final = "\r\x1b[K"
_SERVED_SOON: Final = (
    "The service moves to the {to}: clients are held for seconds, not failed. What is written "
    "until then moves along; files that clients have open get ESTALE, paths go on."
)

Facts = Mapping[str, Any]
_T = TypeVar("_T")


def failback(args: argparse.Namespace) -> Answer:
    """Moves the service home to the primary."""
    return _move(args, Role.PRIMARY)


def switchover(args: argparse.Namespace) -> Answer:
    """Moves the service away to the standby."""
    return _move(args, Role.STANDBY)


def abort(args: argparse.Namespace) -> Answer:
    """Ends a move that is under way."""
    answer = client.command(client.socket_path(args), "abort", {})
    return Answer(f"accepted ({answer['row']}): {answer['why']}", answer)


def _move(args: argparse.Namespace, to: Role) -> Answer:
    path = client.socket_path(args)
    approved = _approved(args, path, to)
    if isinstance(approved, Answer):
        return approved
    before = frozenset(str(one["id"]) for one in client.reports(path))
    watching = _Watching(path, to, before, as_json=args.json)
    try:
        client.command(path, "handover", {"to": str(to), "plan": approved})
        return watching.to_the_end()
    except KeyboardInterrupt:
        watching.clear()
        raise CommandError(
            Exit.INTERRUPTED,
            "no longer watched: it goes on by itself",
            "`nfsha status --watch` shows it, `nfsha abort` ends it",
        ) from None


# --------------------------------------------------------------------------- the plan


def _approved(args: argparse.Namespace, path: Path, to: Role) -> str | Answer:
    """The plan that the operator approves; an answer where nothing is to be done."""
    if args.plan == "":  # a script's variable that is not set must not approve whatever there is
        raise CommandError(
            Exit.USAGE, "--plan '' names no plan", "--dry-run shows the plan, and its name"
        )
    if args.plan is not None and not args.dry_run:
        return str(args.plan)
    plan = dict(client.ask(path, "handover-plan", {"to": str(to)}))
    wanted = not args.yes or plan["resync"]  # is there room for what is put aside?
    if args.dry_run or (plan["ok"] and wanted):
        plan = _with_numbers(path, to, args)
    text = render_handover.plan(plan)
    if not plan["ok"]:
        raise CommandError(Exit.REFUSED, f"refused, nothing has changed\n{text}", data=plan)
    if args.dry_run:
        return Answer(text, plan)
    if not args.json:
        _show_plan(text)
    confirm(args, path, _SERVED_SOON.format(to=to))
    return str(plan["plan"])


def _show_plan(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError as error:
        output.silence()
        raise CommandError(
            Exit.CANNOT,
            f"the plan cannot be shown: {error.strerror}: nothing has changed",
            "with --yes --json it is not printed",
        ) from None


def _with_numbers(path: Path, to: Role, args: argparse.Namespace) -> dict[str, Any]:
    """The plan with what would change; for that the receiver looks at all volumes."""
    live = _Live(shown=not args.json)
    began_s = time.monotonic()
    last: Facts = {}
    for last in client.handover_numbers(path, {"to": str(to), "list": args.list}):
        now = last.get("progress")
        if now is not None:
            live.show(
                f"looks at the volumes: {now['looked_at']} of {now['volumes']}, "
                f"{time.monotonic() - began_s:.0f} s"
            )
    live.clear()
    if not last.get("done"):
        raise CommandError(Exit.UNREACHABLE, "the daemon ended before it had looked")
    found = {"numbers": last["numbers"], "why": last["why"], "clients": client.clients(path)}
    return {**last["plan"], **found}


# --------------------------------------------------------------------------- the move


class _Live:
    """A line that is written again and again on a terminal; nothing elsewhere."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown and sys.stdout.isatty()
        self._there = False

    @property
    def in_place(self) -> bool:
        """Whether what is shown replaces what was."""
        return self._shown

    def show(self, text: str) -> None:
        """Writes the line in place of the last one."""
        if self._shown:
            self._there = True
            columns = shutil.get_terminal_size((LINE_COLUMNS, 24)).columns
            output.say(f"{_CLEAR_LINE}{text[: min(columns, LINE_COLUMNS) - 1]}", end="")

    def clear(self) -> None:
        """Takes it away."""
        if self._there:
            self._there = False
            output.say(_CLEAR_LINE, end="")


@dataclass(slots=True)
class _Watching:
    """Follows a move to its end, one way or the other."""

    path: Path
    to: Role
    before: frozenset[str]
    """The reports that were there before this move."""
    as_json: bool
    began_s: float = field(default_factory=time.monotonic)
    _live: _Live = field(init=False)
    _step: str = ""
    _round: int = 0
    _line_s: float = 0.0
    _begun: bool = False

    def __post_init__(self) -> None:
        self._live = _Live(shown=not self.as_json)

    def clear(self) -> None:
        """Takes the live line away."""
        self._live.clear()

    def to_the_end(self) -> Answer:
        """Returns when the service has moved. Raises CommandError where it stayed."""
        while True:
            facts = self._asked(client.status)
            if _serves(facts) == str(self.to):
                self._live.clear()
                return self._done(facts)
            self._require_goes_on(facts)
            if not self.as_json:
                self._show(facts["handover"])
            time.sleep(POLL_S)

    def _asked(self, ask: Callable[[Path], _T]) -> _T:
        """What the daemon answers, also when it is restarted meanwhile."""
        gone_s: float | None = None
        while True:
            try:
                return ask(self.path)
            except CommandError as error:
                starts = gone_s is not None and error.exit is Exit.CANNOT
                if error.exit is not Exit.UNREACHABLE and not starts:
                    raise
            now_s = time.monotonic()
            if gone_s is None:
                gone_s = now_s
                self._begun = True  # a daemon that comes back knows nothing of what it was asked
                self._say("the daemon here does not answer; waits for its return")
            if now_s - gone_s >= BACK_WITHIN_S:
                raise CommandError(
                    Exit.UNREACHABLE,
                    f"the daemon here was gone for {BACK_WITHIN_S:.0f} s while the move was "
                    "watched: how it ended is not known here",
                    "`nfsha status` and `nfsha events --reports` on the other node say it",
                )
            time.sleep(POLL_S)

    def _say(self, words: str) -> None:
        if not self.as_json:
            self._live.clear()
            output.say(f"{time.monotonic() - self.began_s:6.1f} s  {words}")

    def _require_goes_on(self, facts: Facts) -> None:
        step = facts["handover"]["step"] or ""
        self._begun = self._begun or step not in ("", "ASKED")
        if self._begun and not step and _serves(facts) is not None:
            self._live.clear()
            raise self._aborted(facts)
        if not self._begun and time.monotonic() - self.began_s >= BEGIN_WITHIN_S:
            raise CommandError(
                Exit.ABORTED,
                "the other node did not begin: nothing has changed",
                "look at `nfsha status` there",
                {"status": facts},
            )

    def _show(self, move: Facts) -> None:
        now_s = time.monotonic()
        step = move["step"] or ""
        if not step:
            return
        far = render_handover.progress(move)
        head = f"{now_s - self.began_s:6.1f} s  {step:<10}"
        number = (move.get("progress") or {}).get("round", 0)
        news = step != self._step or number != self._round
        if step != self._step:
            self._live.clear()
            said = render_handover.STEPS.get(step, move["text"] or "")
            output.say(f"{head} {said}")
        elif far and not self._live.in_place and (news or now_s - self._line_s >= LINE_EVERY_S):
            output.say(f"{head} {far}")
            self._line_s = now_s
        if far:
            self._live.show(f"{head} {far}")
        self._step, self._round = step, number

    def _done(self, facts: Facts) -> Answer:
        report = self._report()
        told: dict[str, object] = {"ok": True, "to": str(self.to), "report": report}
        if report is None:
            took_s = time.monotonic() - self.began_s
            return Answer(f"done: the {self.to} serves (in {took_s:.1f} s; no report came)", told)
        told["took_s"] = report["took_ms"] / 1000
        held_ms = report["stall_ms"]
        told["held_s"] = None if held_ms is None else held_ms / 1000
        text = f"done: the {self.to} serves\n{render_handover.report(report)}"
        if _serves(facts) != facts["role"] or facts["health"]["fit"] is not False:
            return Answer(text, told)
        why = facts["health"]["reason"]
        return Answer(f"{text}\nbut it is not sound: {why}", told, Exit.INCOMPLETE)

    def _aborted(self, facts: Facts) -> CommandError:
        report = self._report()
        last = facts["handover"]["last"]
        why = "it ended on the other node" if last is None else last["why"]
        shown = ""
        if report is not None:
            why = report["why"]
            shown = f"\n{render_handover.report(report)}"
        return CommandError(
            Exit.ABORTED,
            f"aborted and rolled back, the {_serves(facts)} serves: {why}{shown}",
            "" if shown else "`nfsha events` on both nodes has the whole story",
            {"status": facts, "report": report},
        )

    def _report(self) -> Facts | None:
        """The report of this move; waits a moment for what is missing of it."""
        end_s = time.monotonic() + REPORT_WITHIN_S
        found: Facts | None = None
        while time.monotonic() < end_s:
            found = self._newest()
            if found is not None and found["whole"]:
                break
            time.sleep(POLL_S)
        return found

    def _newest(self) -> Facts | None:
        new = (
            str(one["id"])
            for one in reversed(self._asked(client.reports))
            if one["to"] == str(self.to) and one["id"] not in self.before
        )
        number = next(new, None)
        return self._asked(lambda path: client.report(path, number)) if number else None


def _serves(facts: Facts) -> str | None:
    """The role of the node that serves, as far as this one knows."""
    if facts["serving"] and facts["phase"] == "ACTIVE":
        return str(facts["role"])
    peer = facts["peer"]
    if peer["heard"] and peer["serving"] and peer["phase"] == "ACTIVE":
        return str(peer["role"])
    return None

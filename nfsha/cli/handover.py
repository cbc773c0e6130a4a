"""`nfsha failback`, `switchover` and `abort`: the service moves, or stays, with nothing lost.

Shows all guards before it asks, then every step as it comes. The move is the daemons': ^C only
ends the watching.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nfsha.cli import client
from nfsha.cli.exits import Answer, CommandError, Exit
from nfsha.cli.operate import confirm
from nfsha.core.model import Role

POLL_S = 0.1
BEGIN_WITHIN_S = 15.0
"""Longer than a giver's request waits for the other node to begin."""

_STEPS: Mapping[str, str] = {
    "ASKED": "waits for the other node",
    "PRESYNC": "comes near to the data, which is still served where it is",
    "FREEZING": "clients are held from now on",
    "PREPARED": "clients are held; the last changes cross over",
    "FINAL_SYNC": "clients are held; the last changes cross over, and are proved",
    "RESTORING": "proved equal; the new epoch is being written",
}

Facts = Mapping[str, Any]


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
    plan = client.ask(path, "handover-plan", {"to": str(to)})
    if not plan["ok"]:
        raise CommandError(
            Exit.REFUSED, f"refused, nothing has changed\n{_table(plan)}", data=dict(plan)
        )
    if args.dry_run:
        return Answer(_table(plan), plan)
    if not args.json:
        print(_table(plan), flush=True)
    confirm(
        args,
        path,
        f"The service moves to the {to}: clients are held for seconds, not failed. What is written "
        "until then moves along; files that clients have open get ESTALE, paths go on.",
    )
    client.command(path, "handover", {"to": str(to)})
    try:
        return _watch(path, to, as_json=args.json)
    except KeyboardInterrupt:
        raise CommandError(
            Exit.INTERRUPTED,
            "no longer watched: it goes on by itself",
            "`nfsha status` shows it, `nfsha abort` ends it",
        ) from None


def _table(plan: Facts) -> str:
    width = max(len(one["name"]) for one in plan["guards"])
    return "\n".join(
        f"  {'ok' if one['ok'] else 'NO':<3} {one['name']:<{width}}  {one['found']}"
        for one in plan["guards"]
    )


def _watch(path: Path, to: Role, *, as_json: bool) -> Answer:
    """Follows the move to its end, one way or the other."""
    began_s = time.monotonic()
    held_s = moved_s = None
    shown, begun = "", False
    while True:
        facts = client.status(path)
        now_s = time.monotonic()
        move = facts["handover"]
        step = move["step"] or ""
        if move["held_ms"] is not None and held_s is None:
            held_s = now_s
        if _serves(facts) == str(to):
            moved_s = now_s
            break
        begun = begun or step not in ("", "ASKED")
        if begun and not step and _serves(facts) is not None:
            why = move["last"]["why"] if move["last"] is not None else "it ended on the other node"
            raise CommandError(
                Exit.ABORTED,
                f"aborted and rolled back, the {_serves(facts)} serves: {why}",
                "`nfsha events` on both nodes has the whole story",
                {"status": facts},
            )
        if not begun and now_s - began_s >= BEGIN_WITHIN_S:
            raise CommandError(
                Exit.ABORTED,
                "the other node did not begin: nothing has changed",
                "look at `nfsha status` there",
                {"status": facts},
            )
        if step != shown and step and not as_json:
            print(f"{now_s - began_s:6.1f} s  {step:<10} {_STEPS.get(step, move['text'] or '')}", flush=True)
        shown = step
        time.sleep(POLL_S)
    took_s = moved_s - began_s
    stall_s = moved_s - held_s if held_s is not None else 0.0
    told = {"ok": True, "to": str(to), "took_s": round(took_s, 3), "held_s": round(stall_s, 3)}
    return Answer(
        f"done: the {to} serves (in {took_s:.1f} s; clients were held for about {stall_s:.1f} s)",
        told,
    )


def _serves(facts: Facts) -> str | None:
    """The role of the node that serves, as far as this one knows."""
    if facts["serving"] and facts["phase"] == "ACTIVE":
        return str(facts["role"])
    peer = facts["peer"]
    if peer["heard"] and peer["serving"] and peer["phase"] == "ACTIVE":
        return str(peer["role"])
    return None

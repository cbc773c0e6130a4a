r"""The commands about the copies: passes, pairs of volumes, the quarantine.

They ask the daemon, which has the guards. Names of volumes and files are bytes: they travel, are
shown and are typed in one spelling (`nfsha.replica.files.beneath.shown`), in which `\\x0a` is a
newline.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from nfsha.cli import client, render_quarantine, render_volumes, watch
from nfsha.cli.exits import Answer, CommandError, Exit
from nfsha.cli.operate import confirm
from nfsha.cli.words import count, get, printable, size, spelled
from nfsha.replica.files.beneath import from_shown, shown

DEFAULT: Final = "default"
UNLIMITED: Final = "unlimited"

_MIN_PLAN_DIGITS: Final = 8
_MAX_LISTED: Final = 100_000  # entries of a quarantine; ten volumes with as many as one can have

Facts = Mapping[str, Any]


def file_name(text: str) -> str:
    """A name as it was typed, in the spelling of the screens: backslashes are its own.

    Raises ValueError for a backslash with anything else than x and two hex digits.
    """
    safe = "".join(one if one == "\\" else shown(os.fsencode(one)) for one in text)
    from_shown(safe)
    return safe


def volume_name(text: str) -> str:
    """A volume's name as it was typed, as Python has it: the daemon compares it. ValueError."""
    return os.fsdecode(from_shown(file_name(text)))


# --------------------------------------------------------------------------- passes


def sync(args: argparse.Namespace) -> Answer:
    """Begins passes now; or pauses them, lets them go on, or changes their bandwidth."""
    path = client.socket_path(args)
    turned = args.pause or args.resume or args.bandwidth is not None
    begun = args.volume or args.wait or args.full or args.verify or args.accept_deletes
    if turned and begun:
        raise CommandError(
            Exit.USAGE, "--pause, --resume and --bandwidth are for all volumes, and begin no pass"
        )
    if args.bandwidth is not None:
        return _limit(path, args.bandwidth)
    if turned:
        return _done(client.ask(path, "sync-pause", {"on": args.pause}), "done")
    request = _request(args, path)
    return _wait(args, path, request) if args.wait else _begin(path, request)


def _limit(path: Path, bandwidth: int | str) -> Answer:
    kib_s = None if bandwidth == UNLIMITED else bandwidth
    return _done(client.ask(path, "sync-bandwidth", {"kib_s": kib_s}), "done")


def _done(answer: Facts, word: str) -> Answer:
    return Answer(f"{word}: {answer['why']}" if answer.get("why") else word, answer)


def _request(args: argparse.Namespace, path: Path) -> dict[str, object]:
    volume, plan = args.volume, args.accept_deletes
    if plan is not None:
        volume, plan = _held_plan(path, volume, plan)
    return {"volume": volume, "full": args.full, "verify": args.verify, "accept_deletes": plan}


def _held_plan(path: Path, volume: str | None, digits: str) -> tuple[str, str]:
    """The volume whose deletions are held by the plan that begins so, and the whole plan."""
    if len(digits) < _MIN_PLAN_DIGITS:
        raise CommandError(
            Exit.USAGE, f"a plan is named by at least {_MIN_PLAN_DIGITS} of its digits"
        )
    listed = client.volumes(path)["volumes"]
    plans = {
        one["name"]: str(plan["hash"])
        for one in listed
        if (plan := get(one, "sync", "plan")) and volume in (None, one["name"], one.get("path"))
    }
    found = [(name, plan) for name, plan in plans.items() if plan.startswith(digits)]
    if len(found) == 1:
        return found[0]
    held = ", ".join(f"{plan[:12]} of {spelled(name)}" for name, plan in plans.items())
    none = "no deletions are held: see `nfsha volumes`"
    if any(get(one, "sync", "state") == "running" for one in listed):
        none = "none are held yet, but a pass runs: it may make the plan, repeat when it has ended"
    raise CommandError(
        Exit.REFUSED,
        printable(f"{'several plans are' if found else 'no plan is'} named {digits}"),
        printable(f"held are: {held}") if held else none,
    )


def _begin(path: Path, request: Facts) -> Answer:
    answer = client.ask(path, "sync", request)
    lines = [f"{spelled(one['name'])}: {_begun(one)}" for one in answer["volumes"]]
    more = answer.get("total", 0) - len(lines)
    if more > 0:
        lines.append(f"and {count(more, 'volume')} more")
    return Answer("\n".join([*map(printable, lines), *_said(answer)]), answer)


def _begun(one: Facts) -> str:
    """What became of the request for one volume; a state of before it says nothing of it."""
    if one["state"] != "running":
        return "asked for"
    return f"asked for, after the one that runs ({one['why']})"


def _said(answer: Facts) -> list[str]:
    return [printable(answer["why"])] if answer.get("why") else []


def _wait(args: argparse.Namespace, path: Path, request: Facts) -> Answer:
    """Shows the passes until they have ended. ^C ends the watching only: the passes go on."""
    volumes: dict[object, Facts] = {}
    told: dict[str, str] = {}
    for answer in client.sync_and_wait(path, request):
        news = answer.get("volumes") or []
        volumes |= {one.get("uuid") or one["name"]: one for one in news}
        if answer.get("done"):
            return _waited({**answer, "volumes": list(volumes.values())})
        if args.json:
            print(json.dumps(answer), flush=True)
        elif sys.stdout.isatty():
            watch.show_again(None, render_volumes.passes([*volumes.values()], watch.style()))
        else:
            for line in _news(news, told):
                print(line, flush=True)
    raise CommandError(
        Exit.UNREACHABLE, "the daemon has ended, so how the passes end is not known here"
    )


def _news(listed: Iterable[Facts], told: dict[str, str]) -> Iterator[str]:
    """One line for each volume with which something else happens than was told."""
    for one in listed:
        state = render_volumes.state({**one, "sync": {**one["sync"], "next_ms": None}})
        if one["sync"]["state"] == "running" and told.get(one["name"]) != state:
            told[one["name"]] = state
            yield f"{spelled(one['name'])}: {printable(state)}"


def _waited(last: Facts) -> Answer:
    listed = last.get("volumes") or []
    if last["ok"]:
        lines = [render_volumes.finished(one) for one in listed]
        return Answer("\n".join([*lines, *_said(last)]) or "done", last)
    if last.get("refused") and not any(map(render_volumes.held, listed)):
        raise CommandError(Exit.REFUSED, f"refused: {last['why']}", data=last)
    steps = [step for one in listed if (step := render_volumes.step_for(one))]
    raise CommandError(
        Exit.INCOMPLETE, f"not complete: {last['why']}", steps[0] if steps else "", last
    )


# --------------------------------------------------------------------------- pairs


def pair(args: argparse.Namespace) -> Answer:
    """Makes the two volumes of one name a pair."""
    path = client.socket_path(args)
    confirm(
        args,
        path,
        f"The volumes {spelled(args.volume)} of both nodes will be one pair. The one on the node "
        "that does not serve is then made equal to the other one: what is only there, or newer "
        "there, goes to its quarantine.",
    )
    return _done(client.ask(path, "volumes-pair", {"volume": args.volume}), "done")


def forget(args: argparse.Namespace) -> Answer:
    """Forgets a volume that was removed for good."""
    path = client.socket_path(args)
    confirm(
        args,
        path,
        f"This node forgets the volume {spelled(args.volume)}: when it was copied, and that it "
        "must be mounted before this node may take over. It deletes no file of the volume. If its "
        "disk is only lost, mount it again instead.",
    )
    return _done(client.ask(path, "volumes-forget", {"volume": args.volume}), "done")


# --------------------------------------------------------------------------- quarantine


def quarantine_list(args: argparse.Namespace) -> Answer:
    """Lists what was put aside on this node."""
    answer = _listing(args)
    return Answer(render_quarantine.entries(answer), answer)


def _listing(args: argparse.Namespace) -> Facts:
    """All entries; the daemon gives so many at a time, and says where to go on."""
    entries: list[Facts] = []
    usage: dict[str, Facts] = {}
    after: list[str] | None = None
    while True:
        behind = {} if after is None else {"after": after}
        answer = _quarantine(args, "list", **behind)
        entries += answer["entries"]
        usage |= {one["volume"]: one for one in answer.get("usage") or []}
        after = answer.get("next")
        if after is None or len(entries) >= _MAX_LISTED:
            break
    return {
        **answer,
        "entries": entries,
        "usage": list(usage.values()),
        "more": bool(answer.get("more")) or after is not None,
    }


def quarantine_show(args: argparse.Namespace) -> Answer:
    """Lists the files of one entry."""
    answer = _quarantine(args, "show", entry=args.entry, after=args.after, limit=args.count)
    return Answer(render_quarantine.items(answer), answer)


def quarantine_restore(args: argparse.Namespace) -> Answer:
    """Moves files of one entry back, or to another folder of the volume."""
    answer = _quarantine(
        args, "restore", entry=args.entry, paths=args.path, to=args.to, beside=args.beside
    )
    text = render_quarantine.restored(answer)
    if not answer["refused_count"]:
        return Answer(text, answer)
    raise CommandError(
        Exit.INCOMPLETE if answer["files"] else Exit.REFUSED,
        text,
        "`--beside` restores under another name what would be overwritten",
        answer,
    )


def quarantine_drop(args: argparse.Namespace) -> Answer:
    """Deletes one entry for good."""
    path = client.socket_path(args)
    listed = _listing(args)["entries"]
    found = [one for one in listed if one["name"] == args.entry]
    if not found:
        raise CommandError(
            Exit.REFUSED, f"there is no entry {args.entry}", "see `nfsha quarantine list`"
        )
    what = "".join(f" {size(one['bytes'])} will be gone." for one in found if one.get("bytes"))
    confirm(
        args,
        path,
        f"The quarantine entry {args.entry} is deleted for good.{what} Its files were never "
        "replicated: they may exist nowhere else.",
    )
    return _done(_quarantine(args, "drop", entry=args.entry, confirm=args.entry), "done")


def _quarantine(args: argparse.Namespace, action: str, **more: object) -> Facts:
    path = client.socket_path(args)
    return client.ask(path, "quarantine", {"action": action, "volume": args.volume, **more})

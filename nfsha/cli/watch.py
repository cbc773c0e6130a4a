"""The commands that look on: status, volumes, clients and events. They change nothing."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nfsha.cli import client, render, render_clients, render_handover, render_volumes
from nfsha.cli.configuration import load_settings
from nfsha.cli.exits import Answer, CommandError, Exit
from nfsha.cli.words import Style
from nfsha.daemon.report_shape import sound
from nfsha.host.events import read_events
from nfsha.host.reports import FOLDER, as_report, read_reports

WATCH_EVERY_S = 1.0
MAX_SHOWN = 60
"""So much is repeated of a name that is none."""

_CLEAR = "\x1b[H\x1b[2J"


def style() -> Style:
    """Colour on a terminal only, and not where NO_COLOR (no-color.org) is set."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return Style(colour=wanted and sys.stdout.isatty())


def status(args: argparse.Namespace) -> Answer:
    """Says what this node does, why, and what to do next; with `--watch` again each second."""
    path = client.socket_path(args)
    return _look(args, lambda: client.status(path), render.status)


def volumes(args: argparse.Namespace) -> Answer:
    """Shows the volumes of both nodes and their copies; with `--watch` again each second."""
    path = client.socket_path(args)
    return _look(args, lambda: client.volumes(path), render_volumes.volumes)


def clients(args: argparse.Namespace) -> Answer:
    """Shows the connections of clients, as both nodes know them; with `--watch` again and again."""
    path = client.socket_path(args)
    return _look(args, lambda: client.clients(path), render_clients.clients)


def _look(
    args: argparse.Namespace,
    ask: Callable[[], Mapping[str, object]],
    show: Callable[[Mapping[str, Any], Style], str],
) -> Answer:
    if not args.watch:
        facts = ask()
        return Answer(show(facts, style()), facts)
    while True:
        try:
            facts = ask()
            text = show(facts, style())
        except CommandError as error:
            if error.exit is not Exit.UNREACHABLE:
                raise
            facts = {"ok": False, "exit": int(error.exit), "error": error.message}
            text = f"nfsha: {error}"
        show_again(facts if args.json else None, text)
        time.sleep(WATCH_EVERY_S)


def show_again(facts: Mapping[str, object] | None, text: str) -> None:
    """Shows what is there now: JSON in one line, else the text in place of the last one."""
    if facts is not None:
        print(json.dumps(facts), flush=True)
    elif sys.stdout.isatty():
        print(f"{_CLEAR}{text}", flush=True)
    else:
        print(f"{text}\n", flush=True)


def events(args: argparse.Namespace) -> Answer:
    """Lists the newest events; with `--follow` goes on with each new one."""
    path = client.socket_path(args)
    if args.report == "":  # the daemon takes no empty name
        return _report("", None)
    if args.reports or args.report:
        return _reports(args, path)
    if args.follow:
        for one in client.follow_events(path, args.count):
            print(json.dumps(one) if args.json else render.event(one), flush=True)
        raise CommandError(Exit.UNREACHABLE, "the daemon has ended, so no more events come")
    try:
        listed = client.events(path, args.count)
    except CommandError as error:
        if error.exit is not Exit.UNREACHABLE or args.socket:
            raise
        return _events_on_disk(args)
    return Answer(render.events(listed), {"ok": True, "events": listed})


def _events_on_disk(args: argparse.Namespace) -> Answer:
    folder = _readable(load_settings(args).paths.state)
    listed = [asdict(one) for one in read_events(folder / "events.jsonl", args.count)]
    text = f"{render.events(listed)}\n(the daemon is not running: read from {folder})"
    return Answer(text, {"ok": True, "events": listed, "daemon": False})


def _readable(folder: Path) -> Path:
    """The folder. CommandError for who may not look into it: it is not empty for all that."""
    if folder.exists() and not os.access(folder, os.R_OK | os.X_OK):
        raise CommandError(
            Exit.CANNOT, f"the daemon is not running, and there is no permission for {folder}",
            "be root",
        )  # fmt: skip
    return folder


def _reports(args: argparse.Namespace, path: Path) -> Answer:
    """The moves of the service that are remembered, or one of them."""
    try:
        if args.report:
            return _report(args.report, client.report(path, args.report))
        listed = client.reports(path)
    except CommandError as error:
        if error.exit is not Exit.UNREACHABLE or args.socket:
            raise
        on_disk = read_reports(_readable(load_settings(args).paths.state) / FOLDER, sound)
        every = [as_report(one) for one in on_disk]
        if args.report:
            found = (one for one in every if one["id"] == args.report)
            return _report(args.report, next(found, None))
        listed = every
    shown = listed[-args.count :] if args.count else []
    return Answer(render_handover.reports(shown), {"ok": True, "reports": shown})


def _report(number: str, found: Mapping[str, Any] | None) -> Answer:
    if found is None:
        raise CommandError(
            Exit.CANNOT,
            f"there is no report {number[:MAX_SHOWN]!r}",
            "`nfsha events --reports` lists them",
        )
    return Answer(render_handover.report(found), {"ok": True, "report": dict(found)})

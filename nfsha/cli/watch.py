"""The commands that look on: the status of this node, and its events. They change nothing."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict

from nfsha.cli import client, render
from nfsha.cli.exits import Answer, CommandError, Exit
from nfsha.cli.setup import load_settings
from nfsha.host.events import read_events

WATCH_EVERY_S = 1.0
_CLEAR = "\x1b[H\x1b[2J"


def style() -> render.Style:
    """Colour on a terminal only, and not where NO_COLOR (no-color.org) is set."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return render.Style(colour=wanted and sys.stdout.isatty())


def status(args: argparse.Namespace) -> Answer:
    """Says what this node does, why, and what to do next; with `--watch` again each second."""
    path = client.socket_path(args)
    if not args.watch:
        facts = client.status(path)
        return Answer(render.status(facts, style()), facts)
    while True:
        try:
            facts = client.status(path)
            text = render.status(facts, style())
        except CommandError as error:
            if error.exit is not Exit.UNREACHABLE:
                raise
            facts = {"ok": False, "exit": int(error.exit), "error": error.message}
            text = f"nfsha: {error}"
        _show_again(facts if args.json else None, text)
        time.sleep(WATCH_EVERY_S)


def _show_again(facts: Mapping[str, object] | None, text: str) -> None:
    if facts is not None:
        print(json.dumps(facts), flush=True)
    elif sys.stdout.isatty():
        print(f"{_CLEAR}{text}", flush=True)
    else:
        print(f"{text}\n", flush=True)


def events(args: argparse.Namespace) -> Answer:
    """Lists the newest events; with `--follow` goes on with each new one."""
    path = client.socket_path(args)
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
    folder = load_settings(args).paths.state
    listed = [asdict(one) for one in read_events(folder / "events.jsonl", args.count)]
    text = f"{render.events(listed)}\n(the daemon is not running: read from {folder})"
    return Answer(text, {"ok": True, "events": listed, "daemon": False})

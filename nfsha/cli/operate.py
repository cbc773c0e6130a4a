"""The commands by which an operator decides: they ask the daemon, which obeys by its rules.

A command is sent once and never repeated. What it means is shown before it is asked for.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nfsha.cli import client, render
from nfsha.cli.exits import Answer, CommandError, Exit
from nfsha.cli.words import Style, paragraph

POLL_S = 0.2

Facts = Mapping[str, Any]


def activate(args: argparse.Namespace) -> Answer:
    """Makes this node serve, and waits for the outcome."""
    path = client.socket_path(args)
    confirm(
        args,
        path,
        "This node will take a new epoch and serve. Its data becomes the truth: what was written "
        "at the other node since the copy was made is not in it. If the other node runs unheard, "
        "both may serve: make sure that it is off.",
    )
    answer = client.command(path, "activate", {"force": args.force})
    if args.wait == 0:
        return _done("accepted, and under way", answer)
    return _outcome(path, answer, args.wait)


def _outcome(path: Path, answer: Facts, wait_s: int) -> Answer:
    """Waits until the takeover that was accepted has ended, one way or the other."""
    end_s = time.monotonic() + wait_s
    while True:
        facts = client.status(path)
        told = {**answer, "phase": facts["phase"], "status": facts}
        if facts["serving"]:
            return Answer(f"done ({answer['row']}): this node serves", told)
        why = f"{facts['phase']}, {facts['row']} {facts['why']}"
        if facts["phase"] != "TAKEOVER":
            raise CommandError(
                Exit.ABORTED,
                f"accepted, then given up: this node is {why}",
                "`nfsha events` has the whole story",
                told,
            )
        if time.monotonic() >= end_s:
            raise CommandError(
                Exit.INCOMPLETE,
                f"accepted, but not complete after {wait_s} s: {why}",
                "it goes on by itself: see `nfsha status`",
                told,
            )
        time.sleep(POLL_S)


def confirm_peer_down(args: argparse.Namespace) -> Answer:
    """Gives the operator's word that the other node is off."""
    path = client.socket_path(args)
    confirm(
        args,
        path,
        "You give your word that the other node is off. This node may then serve without its "
        "leave. If it runs unheard, both may serve.",
    )
    return _done("done", client.command(path, "confirm-peer-down", {}))


def maintenance(args: argparse.Namespace) -> Answer:
    """Begins or ends the maintenance of this node."""
    path = client.socket_path(args)
    return _done("done", client.command(path, "maintenance", {"on": args.switch == "on"}))


def resolve(args: argparse.Namespace) -> Answer:
    """Chooses whose history counts."""
    path = client.socket_path(args)
    return _done("done", client.command(path, "resolve", {"keep": args.keep}))


def _done(word: str, answer: Facts) -> Answer:
    return Answer(f"{word} ({answer['row']}): {answer['why']}", answer)


def confirm(args: argparse.Namespace, path: Path, meaning: str) -> None:
    """Shows what it means and asks. Raises CommandError unless the answer is `yes`."""
    if args.yes:
        return
    if args.json or not sys.stdin.isatty():
        raise CommandError(
            Exit.USAGE, "this wants a confirmation, and nobody can be asked here", "add --yes"
        )
    headline = render.status(client.status(path), Style()).splitlines()[0]
    print(f"{headline}\n\n{paragraph(meaning)}\n")
    try:
        said = input("Type yes to go on: ")
    except EOFError:
        said = ""
    if said.strip().lower() != "yes":
        raise CommandError(Exit.REFUSED, "not confirmed: nothing has changed")

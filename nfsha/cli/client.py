"""Asks the daemon, and turns its answers and its silence into what a command ends with.

Blocks; each question has a time limit. It knows what the commands of the control socket are called
(`nfsha/daemon/answers.py` answers them), and nothing of what they do.
"""

from __future__ import annotations

import argparse
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nfsha.cli.configuration import load_settings
from nfsha.cli.exits import CommandError, Exit
from nfsha.host import control

SOCKET_NAME = "nfsha.sock"
TIMEOUT_S = 35.0
PROBE_TIMEOUT_S = 1.0

Facts = dict[str, Any]


def socket_path(args: argparse.Namespace) -> Path:
    """The daemon's socket: `--socket`, else the one of the configuration."""
    if args.socket:
        return Path(args.socket)
    try:
        return load_settings(args).paths.runtime / SOCKET_NAME
    except CommandError as error:
        raise CommandError(
            error.exit,
            error.message,
            "a daemon that runs all the same is reached by --socket PATH",
            error.data,
        ) from None


def status(path: Path) -> Facts:
    """The node's whole situation, with what the daemon knows beside it."""
    return dict(_call(path, "status", {})["status"])


def events(path: Path, count: int) -> list[Facts]:
    """The newest events, oldest first."""
    return list(_call(path, "events", {"n": count})["events"])


def follow_events(path: Path, count: int) -> Iterator[Facts]:
    """The newest events, then each new one, until the daemon ends."""
    try:
        yield from control.ControlClient(path, timeout_s=TIMEOUT_S).stream("follow", {"n": count})
    except control.CommandError as error:
        raise _no(error) from error
    except control.ControlError as error:
        raise _unreachable(error) from error


def command(path: Path, name: str, args: Mapping[str, object]) -> Facts:
    """Sends one command of the operator's; returns the row that accepted it, and why.

    Raises CommandError, with exit code 3 when a row refused.
    """
    answer = _call(path, name, args)
    if answer["ok"]:
        return answer
    raise CommandError(Exit.REFUSED, f"refused ({answer['row']}): {answer['why']}", data=answer)


def ask(path: Path, name: str, args: Mapping[str, object]) -> Facts:
    """Sends one command about the copies; returns what it did.

    Raises CommandError, with exit code 3 when a guard refused.
    """
    answer = _call(path, name, args)
    if answer.get("ok") is False and "why" in answer:  # else the answer says in how far
        raise CommandError(Exit.REFUSED, f"refused: {answer['why']}", data=answer)
    return answer


def volumes(path: Path) -> Facts:
    """All volumes as both nodes have them, and which way data flows.

    A daemon with many volumes answers in parts: `total` says how many there are.
    """
    answer = _call(path, "volumes", {"start": 0})
    found = list(answer["volumes"])
    while len(found) < answer.get("total", 0):
        part = _call(path, "volumes", {"start": len(found)})["volumes"]
        if not part:
            break
        found += part
    return {**answer, "volumes": found}


def clients(path: Path) -> Facts:
    """The connections of clients: those that this node sees, and those that the other one told."""
    return dict(_call(path, "clients", {})["clients"])


def reports(path: Path) -> list[Facts]:
    """The moves of the service that are remembered, oldest first."""
    return list(_call(path, "reports", {})["reports"])


def report(path: Path, number: str) -> Facts | None:
    """One of them, whole; None where there is none of this id."""
    found = _call(path, "report", {"id": number})["report"]
    return None if found is None else dict(found)


def handover_numbers(path: Path, args: Mapping[str, object]) -> Iterator[Facts]:
    """How the look at all volumes goes on; the last one is `done`, with the plan."""
    return _stream(path, "handover-numbers", args)


def sync_and_wait(path: Path, args: Mapping[str, object]) -> Iterator[Facts]:
    """Begins passes, and tells how they stand until they have ended; the last one is `done`."""
    return _stream(path, "sync-wait", args)


def _stream(path: Path, name: str, args: Mapping[str, object]) -> Iterator[Facts]:
    try:
        yield from control.ControlClient(path, timeout_s=TIMEOUT_S).stream(name, args)
    except control.CommandError as error:
        raise _no(error) from error
    except control.ControlError as error:
        raise _unreachable(error) from error


def answers(path: Path) -> bool:
    """Does a daemon live at this socket? Raises OSError where that cannot be found out."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except (BlockingIOError, TimeoutError):
            return True  # its queue is full: it lives
    return True


def _unreachable(error: control.ControlError) -> CommandError:
    denied = isinstance(error, control.NotPermittedError)
    return CommandError(Exit.CANNOT if denied else Exit.UNREACHABLE, str(error))


def _no(error: control.CommandError) -> CommandError:
    """The daemon's no: a guard's (`refused` in the details), or that it cannot."""
    if error.details.get("refused") is True:
        return CommandError(Exit.REFUSED, f"refused: {error}", data=error.details)
    return CommandError(Exit.CANNOT, str(error), data=error.details)


def _call(path: Path, name: str, args: Mapping[str, object]) -> Facts:
    try:
        return control.ControlClient(path, timeout_s=TIMEOUT_S).call(name, args)
    except control.CommandError as error:
        raise _no(error) from error
    except control.ControlError as error:
        raise _unreachable(error) from error

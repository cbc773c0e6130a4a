"""Starts and ends the daemon, and turns what can go wrong into one sentence and an exit code."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from nfsha.config import Settings, warnings
from nfsha.core.invariants import BrokenInvariantError
from nfsha.daemon.answers import Answers
from nfsha.daemon.inbox import Inbox
from nfsha.daemon.shell import Shell
from nfsha.daemon.world import World
from nfsha.host import mishap
from nfsha.host.control import ControlError
from nfsha.host.hooks import HookError
from nfsha.host.journal import JournalError
from nfsha.host.scheduling import Scheduling, apply_scheduling
from nfsha.host.systemd import Systemd
from nfsha.peer.keys import KeyFileError
from nfsha.peer.links import LinkSetupError
from nfsha.peer.witness import WitnessError
from nfsha.replica.replicator import ReplicaError
from nfsha.vip.freeze import FirewallError
from nfsha.vip.rtnetlink import VipError

log = logging.getLogger(__name__)


class DaemonError(Exception):
    """The daemon cannot run here: one sentence with the remedy."""


def run(settings: Settings) -> int:
    """Runs the daemon until it is told to end; returns the process's exit code.

    Raises DaemonError when something that it needs cannot be had.
    """
    logging.basicConfig(level=settings.log.level.upper(), format="%(levelname)s %(message)s")
    # At level debug pyroute2 would write several lines for each renewal.
    logging.getLogger("pyroute2").setLevel(logging.WARNING)
    scheduling = apply_scheduling(
        realtime=settings.scheduling.realtime, lock_memory=settings.scheduling.lock_memory
    )
    for words in (*scheduling.words, *warnings(settings)):
        log.info("%s", words)
    try:
        _make_folders(settings)
        return asyncio.run(_run(settings, scheduling))
    except (
        ControlError,
        FirewallError,
        HookError,
        JournalError,
        KeyFileError,
        LinkSetupError,
        ReplicaError,
        VipError,
        WitnessError,
        OSError,
    ) as error:
        raise DaemonError(str(error)) from error
    except BrokenInvariantError as error:
        raise DaemonError(
            f"an invariant does not hold: {error}. The daemon stops, the leases in the kernel end; "
            "please report this with the output of `nfsha events`"
        ) from error


def _make_folders(settings: Settings) -> None:
    """Under systemd they are there; a daemon started by hand makes its own."""
    settings.paths.runtime.mkdir(mode=0o755, exist_ok=True)
    settings.paths.state.mkdir(mode=0o700, exist_ok=True)


def _unforeseen(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What a callback or a control command did not foresee: one line; the engine goes on."""
    error = context.get("exception")
    if isinstance(error, BaseException):
        log.error("internal error, please report it: %s", mishap.one_line(error))
    else:
        log.error("internal error, please report it: %s", context.get("message"))


async def _run(settings: Settings, scheduling: Scheduling) -> int:
    asyncio.get_running_loop().set_exception_handler(_unforeseen)
    inbox = Inbox()
    systemd = Systemd()
    world = World(settings, inbox)
    shell = Shell(world, inbox, systemd)
    answers = Answers(shell, scheduling)
    try:
        await answers.start()
        reason = await shell.run()
        log.info("the daemon ends: %s", reason)
    finally:
        await shell.close()
        await answers.close()
        await world.close()
        systemd.close()
    return 0

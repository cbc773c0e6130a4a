"""What systemd is told of the daemon (sd_notify(3)), and what it is asked when the daemon must end.

Telling never blocks and never raises. Asking runs one `systemctl` with a time limit; it is no part
of serving or of a takeover.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from sdnotify import SystemdNotifier

UNIT = "nfsha.service"
ASK_TIMEOUT_S = 2.0
STOP_REASON_VARIABLE = "NFSHA_STOP_REASON"
_MAX_STATUS = 400
_RESTART_JOBS = frozenset({"restart", "try-restart"})


class StopReason(enum.Enum):
    """Why this unit is being ended, as far as systemd's queue of jobs tells."""

    RESTART = "restart"
    STOP = "stop"
    CRASH = "crash"
    """No job: the daemon ended by itself, and by the unit's `Restart=` systemd starts it again."""
    UNKNOWN = "unknown"


class _Notifier(Protocol):
    socket: socket.socket | None

    def notify(self, state: str) -> None: ...


class Systemd:
    """Tells systemd how the daemon does. Without `NOTIFY_SOCKET` in the environment, does nothing.

    What could not be said because systemd's queue was full is said with the next call, the latest
    word of each kind.
    """

    def __init__(self) -> None:
        self._notifier = _connect()
        self._unsaid: dict[str, str] = {}
        self._status = ""
        self._feed_every_ms = _watchdog_ms() // 4
        self._fed_ms: int | None = None

    @property
    def present(self) -> bool:
        """Somebody listens: the daemon was started by systemd with Type=notify."""
        return self._notifier is not None

    def ready(self) -> None:
        """The daemon runs: systemd goes on with what is ordered after it."""
        self._say("READY", "1")

    def status(self, text: str) -> None:
        """Sets the line that `systemctl status` shows; said only when it changed."""
        line = " ".join(text.split())[:_MAX_STATUS]
        if line != self._status:
            self._status = line
            self._say("STATUS", line)

    def watchdog(self, now_ms: int) -> None:
        """Feeds the watchdog; call it on each whole turn of the engine, and nowhere else.

        Systemd hears of it at most four times in its `WatchdogSec`; not at all where that is off.
        """
        if not self._feed_every_ms:
            return
        if self._fed_ms is None or now_ms - self._fed_ms >= self._feed_every_ms:
            self._fed_ms = now_ms
            self._say("WATCHDOG", "1")

    def stopping(self) -> None:
        """The daemon has begun to end."""
        self._say("STOPPING", "1")

    def close(self) -> None:
        """Ends the connection; nothing is said after it. Idempotent."""
        if self._notifier is not None and self._notifier.socket is not None:
            self._notifier.socket.close()
        self._notifier = None

    def _say(self, key: str, value: str) -> None:
        if self._notifier is None:
            return
        self._unsaid[key] = value
        text = "\n".join(f"{key}={value}" for key, value in self._unsaid.items())
        # sdnotify encodes as latin-1, systemd wants UTF-8: its bytes, spelled as latin-1.
        with contextlib.suppress(OSError):
            self._notifier.notify(text.encode("utf-8", "replace").decode("latin-1"))
            self._unsaid.clear()


def _connect() -> _Notifier | None:
    if not os.environ.get("NOTIFY_SOCKET"):
        return None
    try:
        notifier: _Notifier = SystemdNotifier(debug=True)  # or it would hide what fails
    except OSError:
        return None
    if notifier.socket is not None:
        notifier.socket.setblocking(False)
    return notifier


def _watchdog_ms() -> int:
    """Returns the unit's `WatchdogSec` in ms, or 0 where there is none for this process."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or (pid and pid != str(os.getpid())):
        return 0
    return int(usec) // 1000


def own_unit() -> str:
    """Returns the name of the unit that this process runs in, or `UNIT` when it runs in none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            for part in reversed(line.split("/")):
                if part.endswith(".service"):
                    return part
    return UNIT


async def stop_is_restart(unit: str) -> bool:
    """Says whether the daemon, told to end by SIGTERM, will be started again at once.

    True only when systemd has a restart job for the unit queued; anything unknown means a stop.
    """
    return await stop_reason(unit) is StopReason.RESTART


async def is_final_stop(unit: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Says, from `ExecStopPost`, whether no daemon will follow: then the VIP has to go.

    With no job queued the daemon ended by itself, whatever its `SERVICE_RESULT`: systemd starts it
    again by `Restart=always`, and until then the lease in the kernel decides, as it does when a
    restart is queued. Whatever is unknown (no `SERVICE_RESULT`: not called by systemd) is a final
    stop, because to release is always safe.
    """
    reason = await stop_reason(unit, environ)
    if reason is StopReason.CRASH:
        return not environ.get("SERVICE_RESULT")
    return reason is not StopReason.RESTART


async def stop_reason(unit: str, environ: Mapping[str, str] = os.environ) -> StopReason:
    """Asks systemd for the unit's queued job; takes at most `ASK_TIMEOUT_S`.

    `NFSHA_STOP_REASON` (`restart`, `stop`) in the environment answers instead, for a daemon that
    some other supervisor runs.
    """
    override = environ.get(STOP_REASON_VARIABLE)
    if override:
        known = {reason.value: reason for reason in StopReason}
        return known.get(override, StopReason.UNKNOWN)
    listed = await _list_jobs()
    return StopReason.UNKNOWN if listed is None else read_jobs(listed, unit)


def read_jobs(listed: str, unit: str) -> StopReason:
    """Reads the lines of `systemctl list-jobs --plain --no-legend`: number, unit, type, state."""
    for line in listed.splitlines():
        words = line.split()
        if len(words) >= 4 and words[1] == unit:
            if words[2] in _RESTART_JOBS:
                return StopReason.RESTART
            return StopReason.STOP if words[2] == "stop" else StopReason.UNKNOWN
    return StopReason.CRASH


async def _list_jobs() -> str | None:
    """Returns what systemctl printed, or None when it failed, is not there, or took too long."""
    argv = ("systemctl", "list-jobs", "--plain", "--no-legend", "--no-pager", "--full")
    quiet = asyncio.subprocess.DEVNULL
    environ = {"LC_ALL": "C", "PATH": os.environ.get("PATH", os.defpath)}
    try:
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=quiet, stdout=asyncio.subprocess.PIPE, stderr=quiet, env=environ
        )
    except OSError:
        return None
    try:
        async with asyncio.timeout(ASK_TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        return None
    return output.decode("utf-8", "replace") if process.returncode == 0 else None

"""Where and with what a bench ran: machine, versions, commit. Reads, and changes nothing."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import psutil

from nfsha import __version__
from tests.netns.labkit.place import REPOSITORY

_TIMEOUT_S = 10.0


def facts() -> dict[str, str]:
    """What the report says about the place, in the order in which it says it."""
    memory_gib = psutil.virtual_memory().total / 2**30
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "machine": f"{os.cpu_count()} cores, {_processor()}, {memory_gib:.0f} GiB",
        "load before the run": f"{os.getloadavg()[0]:.2f}",
        "kernel": f"Linux {_numbers(platform.release())}",
        "nfsha": __version__,
        "python": platform.python_version(),
        "keepalived": _version("keepalived", "--version"),
        "nfs-ganesha": _version("ganesha.nfsd", "-v"),
    }


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def _commit() -> str:
    commit = _said("git", "-C", str(REPOSITORY), "rev-parse", "--short=12", "HEAD")
    what = ("nfsha", "tests", "bench/*.py")
    changed = _said("git", "-C", str(REPOSITORY), "status", "--porcelain", "--", *what)
    return f"{commit.strip() or 'unknown'}{', with changes' if changed.strip() else ''}"


def _version(*argv: str) -> str:
    return _numbers(_said(*argv))


def _numbers(text: str) -> str:
    found = re.search(r"\d+(?:\.\d+)+", text)
    return found.group(0) if found else "unknown"


def _said(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except OSError:
        return ""
    return done.stdout + done.stderr

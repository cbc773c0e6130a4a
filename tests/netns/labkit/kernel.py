"""The few system calls of the lab that Python 3.11 does not have: namespaces, mounts, pivot_root.

Numbers are from the kernel's uapi headers (linux/sched.h, linux/mount.h) and the man pages named
below. Nothing here decides anything, and nothing here knows of labs.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 2
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}  # asm/unistd.h

_libc = ctypes.CDLL(None, use_errno=True)

_Result = TypeVar("_Result")


def _checked(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def unshare(flags: int) -> None:
    """Gives the calling thread namespaces of its own (man 2 unshare)."""
    _checked(_libc.unshare(flags), f"unshare({flags:#x})")


def setns(fd: int, flags: int) -> None:
    """Moves the calling thread into a namespace (man 2 setns)."""
    _checked(_libc.setns(fd, flags), f"setns({flags:#x})")


def mount(
    source: str | Path | None,
    target: str | Path,
    kind: str | None = None,
    *,
    flags: int = 0,
    data: str | None = None,
) -> None:
    """Mounts a filesystem (man 2 mount)."""

    def text(value: str | Path | None) -> bytes | None:
        return None if value is None else str(value).encode()

    done = _libc.mount(text(source), text(target), text(kind), ctypes.c_ulong(flags), text(data))
    _checked(done, f"mount {source} on {target}")


def detach(target: str | Path) -> None:
    """Unmounts with MNT_DETACH (man 2 umount2): out of sight now, gone when its last user is."""
    _checked(_libc.umount2(str(target).encode(), MNT_DETACH), f"umount {target}")


def pivot_root(new_root: str | Path, put_old: str | Path) -> None:
    """Makes another mount the root (man 2 pivot_root)."""
    number = _SYS_PIVOT_ROOT[os.uname().machine]
    done = _libc.syscall(number, str(new_root).encode(), str(put_old).encode())
    _checked(done, "pivot_root")


def sethostname(name: str) -> None:
    """Names this UTS namespace (man 2 sethostname)."""
    raw = name.encode()
    _checked(_libc.sethostname(raw, len(raw)), "sethostname")


def now_ns() -> int:
    """CLOCK_BOOTTIME: the only clock by which the lab dates what it sees."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def start_time(pid: int) -> int | None:
    """When a process started (field 22 of /proc/PID/stat, in ticks), or None when there is none.

    With the pid it names a process for good: a recycled pid has another start.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def in_own_thread(work: Callable[[], _Result]) -> _Result:
    """Runs work in a thread of its own, which may enter namespaces and need not come back."""
    results: list[_Result] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            errors.append(error)

    thread = threading.Thread(target=body, name="lab-namespaces")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]

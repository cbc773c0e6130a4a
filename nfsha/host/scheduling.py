"""This process's own scheduling: real-time round robin, and memory that stays resident.

Both are wishes: what the machine refuses is said in words and the daemon goes on without it.
Nothing here touches another process, and what this process starts runs at normal priority and
unlocked (SCHED_RESET_ON_FORK, sched(7); locks are not inherited, mlockall(2)).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
from dataclasses import dataclass
from pathlib import Path

PRIORITY = 10
"""Of SCHED_RR, 1 to 99: above all ordinary processes, below the threaded interrupts (50)."""

_CAP_IPC_LOCK = 14  # linux/capability.h
# MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT: asm-generic/mman.h, and arch/powerpc/include/uapi/asm/mman.h
_MCL_GENERIC = (1, 2, 4)
_MCL_POWERPC = (0x2000, 0x4000, 0x8000)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Scheduling:
    """What was had, and the same in words for the log and `nfsha status`."""

    realtime: bool
    memory_locked: bool
    words: tuple[str, ...]


def apply_scheduling(
    *, realtime: bool = True, lock_memory: bool = True, priority: int = PRIORITY
) -> Scheduling:
    """Asks for SCHED_RR for the calling thread, and for resident memory for the whole process.

    Call it in the main thread before other threads start. What is False is not asked for.
    """
    priority_words = _no_realtime(priority) if realtime else "the configuration does not ask for it"
    memory_words = _no_locked_memory() if lock_memory else "the configuration does not ask for it"
    return Scheduling(
        realtime=not priority_words,
        memory_locked=not memory_words,
        words=(
            f"real-time priority: {priority_words or f'yes, SCHED_RR {priority}'}",
            f"memory kept resident: {memory_words or 'yes'}",
        ),
    )


def raise_this_thread(priority: int = PRIORITY) -> None:
    """Asks for SCHED_RR for the calling thread; refused, it stays as it is.

    For the `thread_setup` of `JournalFile`: a thread started under SCHED_RESET_ON_FORK has normal
    priority, and a journal write stands on the takeover's path.
    """
    with contextlib.suppress(OSError):
        _set_round_robin(priority)


def _set_round_robin(priority: int) -> None:
    policy = os.SCHED_RR | os.SCHED_RESET_ON_FORK
    os.sched_setscheduler(0, policy, os.sched_param(priority))  # 0: this thread


def _no_realtime(priority: int) -> str:
    """Returns why not, or nothing when it was had."""
    try:
        _set_round_robin(priority)
    except PermissionError:
        return "no, it takes CAP_SYS_NICE (and a real-time budget, where control groups give one)"
    except OSError as error:
        return f"no, {error.strerror}"
    return ""


def _no_locked_memory() -> str:
    """Returns why not, or nothing when it was had."""
    # Under a limit MCL_FUTURE would make later allocations fail: the daemon would die of its lock.
    if not _may_lock_all():
        return "no, it takes CAP_IPC_LOCK or LimitMEMLOCK=infinity"
    powerpc = platform.machine().startswith("ppc")
    current, future, on_fault = _MCL_POWERPC if powerpc else _MCL_GENERIC
    if _libc.mlockall(current | future | on_fault) != 0:
        return f"no, {os.strerror(ctypes.get_errno())}"
    return ""


def _may_lock_all() -> bool:
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        return True
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    for line in status.splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False

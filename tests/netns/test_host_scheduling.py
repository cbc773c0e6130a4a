"""Real-time priority and resident memory, asked of the real kernel in a child of the test."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

_CHILD = """
import json, os, resource, sys, threading
from pathlib import Path
from nfsha.host.scheduling import apply_scheduling, raise_this_thread

asked = json.loads(sys.argv[1])
if asked.pop("unprivileged", False):
    os.setresuid(65534, 65534, 65534)
had = apply_scheduling(**asked)

def locked_kib():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmLck:"):
            return int(line.split()[1])

def thread(setup):
    found = []
    def run():
        setup()
        found.append(os.sched_getscheduler(0))
    worker = threading.Thread(target=run)
    worker.start()
    worker.join()
    return found[0]

reader, writer = os.pipe()
if os.fork() == 0:
    os.write(writer, f"{os.sched_getscheduler(0)} {locked_kib()}".encode())
    os._exit(0)
os.wait()
child = os.read(reader, 100).decode().split()
before = locked_kib()
filler = bytearray(8 << 20)
print(json.dumps({
    "realtime": had.realtime, "memory_locked": had.memory_locked, "words": had.words,
    "policy": os.sched_getscheduler(0), "priority": os.sched_getparam(0).sched_priority,
    "locked_kib": before, "grown_kib": locked_kib() - before,
    "child_policy": int(child[0]), "child_locked_kib": int(child[1]),
    "plain_thread": thread(lambda: None), "raised_thread": thread(raise_this_thread),
}))
"""
_OTHER, _RR_RESET = 0, 2 | 0x40000000  # linux/sched.h


def ask(**options: bool) -> dict[str, Any]:
    argv = [sys.executable, "-c", _CHILD, json.dumps(options)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_root_gets_both_and_its_children_get_neither() -> None:
    found = ask()
    assert found["words"] == [
        "real-time priority: yes, SCHED_RR 10",
        "memory kept resident: yes",
    ]
    assert (found["realtime"], found["memory_locked"]) == (True, True)
    assert (found["policy"], found["priority"]) == (_RR_RESET, 10)
    assert found["locked_kib"] > 0
    assert found["grown_kib"] >= 8 << 10  # what is allocated later is locked too
    assert (found["child_policy"], found["child_locked_kib"]) == (_OTHER, 0)
    assert (found["plain_thread"], found["raised_thread"]) == (_OTHER, _RR_RESET)


def test_what_is_refused_is_said_and_the_daemon_goes_on() -> None:
    found = ask(unprivileged=True)
    assert (found["realtime"], found["memory_locked"]) == (False, False)
    assert "no, it takes CAP_SYS_NICE" in found["words"][0]
    assert "no, it takes CAP_IPC_LOCK" in found["words"][1]
    assert (found["policy"], found["locked_kib"]) == (_OTHER, 0)
    assert found["raised_thread"] == _OTHER


def test_what_is_not_asked_for_is_not_done() -> None:
    found = ask(realtime=False, lock_memory=False)
    assert (found["policy"], found["locked_kib"]) == (_OTHER, 0)
    assert all("the configuration does not ask for it" in words for words in found["words"])

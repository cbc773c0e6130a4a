"""Network namespaces for tests: make them, wire them, run code of this thread inside one.

Everything is made by this process and removed by it; names start with `nfsha-`. Nothing here knows
about nfsha.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)
_counter = itertools.count()


def run(*argv: str, check: bool = True) -> str:
    """Runs one command to its end (at most 30 s) and returns its standard output."""
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=30)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


class Namespace:
    """One network namespace, `ip netns` style, with its loopback up."""

    def __init__(self, label: str) -> None:
        self.name = f"nfsha-{os.getpid()}-{next(_counter)}-{label}"
        run("ip", "netns", "add", self.name)
        self.ip("link", "set", "lo", "up")

    @property
    def path(self) -> Path:
        """The file that setns(2) and pyroute2 take."""
        return Path("/run/netns") / self.name

    def ip(self, *args: str) -> str:
        """Runs `ip -n NAME ARGS`."""
        return run("ip", "-n", self.name, *args)

    def exec(self, *argv: str, check: bool = True) -> str:
        """Runs a command inside the namespace to its end and returns its standard output."""
        return run("ip", "netns", "exec", self.name, *argv, check=check)

    def delete(self) -> None:
        """Removes the namespace; links in it go with it. Idempotent."""
        if self.path.exists():
            run("ip", "netns", "delete", self.name)


def connect(left: Namespace, left_if: str, right: Namespace, right_if: str) -> None:
    """Joins two namespaces by a veth pair whose ends bear the given names, both up."""
    run("ip", "link", "add", left_if, "netns", left.name, "type", "veth",
        "peer", "name", right_if, "netns", right.name)  # fmt: skip
    left.ip("link", "set", left_if, "up")
    right.ip("link", "set", right_if, "up")


@contextlib.contextmanager
def namespaces(*labels: str) -> Iterator[tuple[Namespace, ...]]:
    """Makes one namespace per label and removes them all at the end, whatever happened."""
    made: list[Namespace] = []
    try:
        made.extend(Namespace(label) for label in labels)
        yield tuple(made)
    finally:
        for namespace in made:
            namespace.delete()


@contextlib.contextmanager
def inside(namespace: Namespace) -> Iterator[None]:
    """Moves this thread into a namespace for the block: sockets opened there stay there.

    Do not `await` across threads inside; asyncio code run by `asyncio.run` in the block is fine.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(namespace.path, os.O_RDONLY)
    try:
        _setns(there)
        try:
            yield
        finally:
            _setns(home)
    finally:
        os.close(home)
        os.close(there)


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"setns: {os.strerror(error)}")

"""A prober: an RPC NULL on a fresh TCP connection every few milliseconds, to measure outages.

Run inside place c:  python -m tests.netns.labkit.prober SERVER INTERVAL_MS PROGRAM VERSION PORT
It writes one line `sent done` (CLOCK_BOOTTIME, ns) for each success, until SIGTERM, and at last a
line `tick N`: the longest time between two of its own ticks; no outage below that can be seen.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import selectors
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from types import FrameType

from tests.netns.labkit import kernel
from tests.netns.labkit.network import VIP
from tests.netns.labkit.nfs_server import NFS_PORT, null_call
from tests.netns.labkit.place import LabError, Place

_LIFE_NS = 500_000_000  # a probe that had no answer by then is given up: 100 at once at 5 ms
_FLUSH_NS = 500_000_000
_PRIORITY = 20
_REPLY_BYTES = 28  # record mark, xid, reply, accepted, verifier (two words), accept_stat
_NO_LINGER = struct.pack("ii", 1, 0)  # reset on close: no TIME_WAIT to pile up


@dataclass
class _Probe:
    sock: socket.socket
    sent_ns: int
    connected: bool = False


class _Prober:
    def __init__(self, options: argparse.Namespace) -> None:
        family = socket.AF_INET6 if ":" in options.server else socket.AF_INET
        self._family = family
        self._target = (options.server, options.port)
        self._call = null_call(options.program, options.version)
        self._interval_ns = int(options.interval_ms * 1e6)
        self._selector = selectors.DefaultSelector()
        self._waiting: dict[int, _Probe] = {}
        self._stopped = False
        self._worst_tick_ns = 0

    def stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stopped = True

    def run(self) -> None:
        """Until told to stop."""
        last_ns = kernel.now_ns()
        due_ns, flush_ns = last_ns, last_ns + _FLUSH_NS
        while not self._stopped:
            now_ns = kernel.now_ns()
            if now_ns >= due_ns:
                self._worst_tick_ns = max(self._worst_tick_ns, now_ns - last_ns)
                last_ns = now_ns
                self._give_up(now_ns - _LIFE_NS)
                self._start(now_ns)
                due_ns = max(due_ns + self._interval_ns, now_ns)
            if now_ns >= flush_ns:
                sys.stdout.flush()
                flush_ns = now_ns + _FLUSH_NS
            for key, _ in self._selector.select(max(0, due_ns - kernel.now_ns()) / 1e9):
                self._advance(key.data)
        print(f"tick {self._worst_tick_ns}", flush=True)

    def _start(self, now_ns: int) -> None:
        sock = socket.socket(self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        probe = _Probe(sock, now_ns)
        if sock.connect_ex(self._target) not in (0, errno.EINPROGRESS):
            sock.close()  # no route, no buffers: a failed probe
            return
        self._waiting[sock.fileno()] = probe
        self._selector.register(sock, selectors.EVENT_WRITE, probe)

    def _advance(self, probe: _Probe) -> None:
        try:
            if not probe.connected:
                probe.sock.send(self._call)
                probe.connected = True
                self._selector.modify(probe.sock, selectors.EVENT_READ, probe)
                return
            reply = probe.sock.recv(256)
        except OSError:
            self._end(probe)
            return
        if len(reply) >= _REPLY_BYTES and not any(reply[12:16]) and not any(reply[24:28]):
            print(probe.sent_ns, kernel.now_ns())
        self._end(probe)

    def _give_up(self, older_than_ns: int) -> None:
        for probe in list(self._waiting.values()):
            if probe.sent_ns > older_than_ns:
                return
            self._end(probe)

    def _end(self, probe: _Probe) -> None:
        del self._waiting[probe.sock.fileno()]
        self._selector.unregister(probe.sock)
        probe.sock.close()


@dataclass(frozen=True)
class Probes:
    """The successes of a prober: (sent, done) in CLOCK_BOOTTIME ns, by done."""

    successes: tuple[tuple[int, int], ...]
    started_ns: int
    stopped_ns: int
    worst_tick_ms: float

    def outage_ms(self, since_ns: int | None = None, until_ns: int | None = None) -> float:
        """The longest time without a success between the two moments, both ends included."""
        start = self.started_ns if since_ns is None else since_ns
        end = self.stopped_ns if until_ns is None else until_ns
        times = [start, *(done for _, done in self.successes if start <= done <= end), end]
        return max(later - earlier for earlier, later in pairwise(times)) / 1e6

    def first_success_after(self, since_ns: int) -> int | None:
        """When the first probe that was sent after a moment succeeded."""
        return next((done for sent, done in self.successes if sent >= since_ns), None)


class NullProber:
    """The owner's side: a prober in place c, from now until stop()."""

    def __init__(self, place: Place, *, server: str = VIP, interval_ms: float = 5.0) -> None:
        self._started_ns = kernel.now_ns()
        argv = [sys.executable, "-m", "tests.netns.labkit.prober", server, str(interval_ms)]
        self._process = place.spawn(argv, name=f"prober-{self._started_ns}")

    def wait_success(self, timeout_s: float = 10.0) -> None:
        """Waits for the first success (they are written twice a second). Raises LabError."""
        deadline = time.monotonic() + timeout_s
        while not self._process.output().strip():
            if time.monotonic() > deadline or not self._process.alive:
                raise LabError(f"no probe succeeded: {self._process.tail(5)}")
            time.sleep(0.02)

    def stop(self) -> Probes:
        """Ends it and returns what it saw."""
        stopped_ns = kernel.now_ns()
        self._process.stop()
        lines = [line.split() for line in self._process.output().splitlines()]
        if not lines or lines[-1][0] != "tick":
            raise LabError(f"the prober ended badly: {self._process.tail(5)}")
        successes = sorted((int(done), int(sent)) for sent, done in lines[:-1])
        return Probes(
            tuple((sent, done) for done, sent in successes),
            self._started_ns,
            stopped_ns,
            int(lines[-1][1]) / 1e6,
        )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server")
    parser.add_argument("interval_ms", type=float)
    parser.add_argument("--program", type=int, default=100003)
    parser.add_argument("--version", type=int, default=3)
    parser.add_argument("--port", type=int, default=NFS_PORT)
    prober = _Prober(parser.parse_args())
    signal.signal(signal.SIGTERM, prober.stop)
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(_PRIORITY))
    prober.run()


if __name__ == "__main__":
    main()

"""The other side of NSM, as small as can be: who asks a real rpc.statd to watch, and who is called.

`listen` is a program of its own, inside a place:

    python -m tests.netns.labkit.nsm --program 100024 --version 1 --port 4045

It registers with the place's rpcbind, answers each call with success and no results, and prints one
line of JSON for each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import secrets
import socket
import struct
import sys
from dataclasses import dataclass

from tests.netns.labkit.place import LabError, Place, Process

STATUS = 100024  # X/Open, XNFS 3W, chapter 11
LOCKS = 100021  # the same, chapter 10
CALLBACK = 16  # the procedure that Linux' lockd is called back by (fs/lockd/svcproc.c)
_RPCBIND, _PMAP_SET, _UDP = 100000, 1, 17  # RFC 1833, section 3
_SM_MON, _NLM_LOCK = 2, 2
LOCKD_PORT = 20050
GRANTED, DENIED_GRACE_PERIOD = 0, 4  # nlm4_stats
_PRIV = b"the test's secret"[:16]
_WITHIN_S = 10.0


@dataclass(frozen=True)
class Told:
    """One notification or callback: who says that which server is in which state."""

    source: str
    port: int
    procedure: int
    name: str
    state: int


def listen(place: Place, program: int, version: int, port: int) -> Process:
    """Starts the listener in a place where rpcbind runs."""
    module = "tests.netns.labkit.nsm"
    argv = [sys.executable, "-m", module, "--program", str(program), "--version", str(version)]
    return place.spawn([*argv, "--port", str(port)], name=f"listener-{program}")


def calls(listener: Process) -> list[Told]:
    """What it was told so far. Raises LabError when it has failed."""
    if not listener.alive:
        raise LabError(f"the listener has ended:\n{listener.tail()}")
    lines = listener.output().splitlines()
    return [Told(**json.loads(line)) for line in lines if line.startswith("{")]


def watch(place: Place, statd_port: int, whom: str) -> None:
    """Asks the statd of a place, as its lockd does, to watch a host. Raises LabError."""
    asked = _text(whom) + _text(place.name) + struct.pack(">3I", LOCKS, 3, CALLBACK) + _PRIV
    results = place.inside(lambda: _call("127.0.0.1", statd_port, STATUS, 1, _SM_MON, asked))
    if struct.unpack_from(">I", results) != (0,):
        raise LabError(f"statd of {place.name} does not watch {whom}")


def lock(place: Place, handle: bytes, *, reclaim: bool = False) -> int:
    """Asks the lock manager of a place for a lock on a whole file; its answer (NLM4_LOCK).

    X/Open, XNFS 3W, chapter 10; the version for NFS v3: RFC 1813, appendix II.
    """
    asked = _text("cookie") + struct.pack(">2I", 0, 1)  # does not wait, exclusive
    asked += _text("client") + _opaque(handle) + _text("owner") + struct.pack(">IQQ", 1, 0, 0)
    asked += struct.pack(">2I", reclaim, 1)
    results = place.inside(lambda: _call("127.0.0.1", LOCKD_PORT, LOCKS, 4, _NLM_LOCK, asked))
    return int(struct.unpack_from(">I", results, 4 + len("cookie") + 2)[0])


def _opaque(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data + bytes(-len(data) % 4)


def _text(text: str) -> bytes:
    return _opaque(text.encode())


def _call(host: str, port: int, program: int, version: int, procedure: int, args: bytes) -> bytes:
    """One call from a privileged port, which statd and rpcbind ask for; what it returned."""
    xid = secrets.randbits(32)
    # AUTH_SYS as root: stamp, no machine name, uid, gid, no groups
    root = struct.pack(">I", 1) + _opaque(struct.pack(">5I", 0, 0, 0, 0, 0)) + bytes(8)
    header = struct.pack(">6I", xid, 0, 2, program, version, procedure) + root
    with _privileged() as sock:
        sock.settimeout(_WITHIN_S)
        sock.sendto(header + args, (host, port))
        reply = sock.recv(4096)
    if struct.unpack_from(">6I", reply) != (xid, 1, 0, 0, 0, 0):
        raise LabError(f"program {program} at {host}: refused: {reply.hex()}")
    return reply[24:]


def _privileged() -> socket.socket:
    for port in itertools.count(1023, -1):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            sock.close()
            if port < 600:
                raise
        else:
            return sock
    raise AssertionError


def main() -> None:
    """Listens until it is killed."""
    parser = argparse.ArgumentParser()
    for name in ("--program", "--version", "--port"):
        parser.add_argument(name, type=int, required=True)
    args = parser.parse_args()
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", args.port))
        mapping = struct.pack(">4I", args.program, args.version, _UDP, args.port)
        _call("127.0.0.1", 111, _RPCBIND, 2, _PMAP_SET, mapping)
        while True:
            call, source = sock.recvfrom(4096)
            xid, *_, procedure, _, credentials = struct.unpack_from(">8I", call)
            at = 32 + (credentials + 3) // 4 * 4
            at += 8 + struct.unpack_from(">I", call, at + 4)[0]
            length = struct.unpack_from(">I", call, at)[0] if len(call) > at else 0
            name = call[at + 4 :][:length].decode()
            end = at + 4 + (length + 3) // 4 * 4
            state = struct.unpack_from(">i", call, end)[0] if len(call) > end else 0
            told = {"source": source[0].removeprefix("::ffff:"), "port": source[1]}
            told |= {"procedure": procedure, "name": name, "state": state}
            print(json.dumps(told), flush=True)
            sock.sendto(struct.pack(">6I", xid, 1, 0, 0, 0, 0), source)


if __name__ == "__main__":
    main()

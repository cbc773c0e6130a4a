"""An NFS v3 client over UDP, as small as can be, and a program that writes records by it.

Like a hard mount it sends a call again, under the same xid, until an answer comes: there is no
connection that could break. What turned stale it looks up again by its path.

Run inside place c:  python -m tests.netns.labkit.udp_client --server VIP --export /nfs/data ...
"""

from __future__ import annotations

import argparse
import errno
import itertools
import secrets
import signal
import socket
import struct
import sys
import time
from types import FrameType

from tests.netns.labkit import kernel
from tests.netns.labkit.nfs_client import RECORD_BYTES, Attempt, record
from tests.netns.labkit.nfs_server import MOUNTD_PORT, NFS_PORT

_NFS, _MOUNT = 100003, 100005  # RFC 1813
_MNT = 1
_LOOKUP, _READ, _WRITE, _CREATE, _COMMIT = 3, 6, 7, 8, 21
_OK, _NOENT, _STALE = 0, 2, 70
_FILE_SYNC = 2
_RESEND_S = 0.2
_READ_BYTES = 8192


class UdpError(OSError):
    """The server refused, or (ETIMEDOUT) gave no answer within the cap."""


class UdpMount:
    """One export, over one socket that is connected: it hears the address that it asked only."""

    def __init__(self, server: str, export: str, *, cap_s: float) -> None:
        """Mounts; IPv4 or IPv6. Raises UdpError."""
        self._cap_s = cap_s
        self._xids = itertools.count(secrets.randbits(31))
        mountd = self._connected(server, MOUNTD_PORT)
        self._nfs = self._connected(server, NFS_PORT)
        with mountd:
            reply = _Results(self._call(mountd, _MOUNT, _MNT, _opaque(export.encode())))
        reply.demand_ok("mount")
        self._root = reply.opaque()

    def close(self) -> None:
        """Forgets everything; the server does not care."""
        self._nfs.close()

    def lookup(self, name: str, *, create: bool = False) -> bytes:
        """The handle of a file in the root; made if it is not there. Raises UdpError."""
        where = _opaque(self._root) + _opaque(name.encode())
        reply = _Results(self._call(self._nfs, _NFS, _LOOKUP, where))
        if create and reply.status == _NOENT:
            # UNCHECKED; mode 0644 and nothing else set
            how = struct.pack(">8I", 0, 1, 0o644, 0, 0, 0, 0, 0)
            reply = _Results(self._call(self._nfs, _NFS, _CREATE, where + how))
            reply.demand_ok("create")
            if reply.number() != 1:
                raise UdpError(errno.EIO, "create: no handle")
            return reply.opaque()
        reply.demand_ok("lookup")
        return reply.opaque()

    def write(self, handle: bytes, offset: int, content: bytes) -> None:
        """Writes, stable at once, and commits as well. Raises UdpError."""
        where = _opaque(handle) + struct.pack(">QI", offset, len(content))
        reply = _Results(
            self._call(
                self._nfs, _NFS, _WRITE, where + struct.pack(">I", _FILE_SYNC) + _opaque(content)
            )
        )
        reply.demand_ok("write")
        reply.skip_wcc()
        written, committed = reply.number(), reply.number()
        if (written, committed) != (len(content), _FILE_SYNC):
            raise UdpError(errno.EIO, f"write: {written} bytes, committed {committed}")
        _Results(self._call(self._nfs, _NFS, _COMMIT, where)).demand_ok("commit")

    def read(self, handle: bytes) -> bytes:
        """The whole content of a file. Raises UdpError."""
        content = b""
        while True:
            where = _opaque(handle) + struct.pack(">QI", len(content), _READ_BYTES)
            reply = _Results(self._call(self._nfs, _NFS, _READ, where))
            reply.demand_ok("read")
            reply.skip_attributes()
            _, end = reply.number(), reply.number()
            content += reply.opaque()
            if end:
                return content

    def put(self, name: str, offset: int, content: bytes) -> None:
        """Looks up (creates), writes and commits; once more from the start where a handle broke."""
        try:
            self.write(self.lookup(name, create=True), offset, content)
        except UdpError as error:
            if error.errno != errno.ESTALE:
                raise
            self.write(self.lookup(name, create=True), offset, content)

    def _connected(self, server: str, port: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in server else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.connect((server, port))
        sock.settimeout(_RESEND_S)
        return sock

    def _call(self, sock: socket.socket, program: int, procedure: int, arguments: bytes) -> bytes:
        """The results of an accepted call (RFC 5531, section 9)."""
        xid = next(self._xids) & 0xFFFFFFFF
        # AUTH_SYS as root: stamp, no machine name, uid, gid, no groups
        root = struct.pack(">5I", 0, 0, 0, 0, 0)
        header = struct.pack(">6I", xid, 0, 2, program, 3, procedure)
        credentials = struct.pack(">I", 1) + _opaque(root) + struct.pack(">2I", 0, 0)
        deadline = time.monotonic() + self._cap_s
        while time.monotonic() < deadline:
            try:
                sock.send(header + credentials + arguments)
                while (reply := sock.recv(65536))[:4] != header[:4]:
                    pass  # late, to a call that was sent twice
            except TimeoutError:
                continue
            except ConnectionRefusedError:
                time.sleep(_RESEND_S)  # a server that starts; a hard mount goes on
                continue
            if struct.unpack_from(">5I", reply, 4) != (1, 0, 0, 0, 0):
                raise UdpError(errno.EPROTO, f"procedure {procedure}: {reply[:28].hex()}")
            return reply[24:]
        raise UdpError(errno.ETIMEDOUT, f"procedure {procedure}: no answer within the cap")


class _Results:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self.status = self.number()

    def demand_ok(self, what: str) -> None:
        if self.status != _OK:
            number = errno.ESTALE if self.status == _STALE else errno.EIO
            raise UdpError(number, f"{what}: status {self.status}")

    def number(self) -> int:
        (value,) = struct.unpack_from(">I", self._data, self._at)
        self._at += 4
        return int(value)

    def opaque(self) -> bytes:
        length = self.number()
        found = self._data[self._at : self._at + length]
        self._at += length + -length % 4
        return found

    def skip_attributes(self) -> None:
        """post_op_attr (RFC 1813, section 2.6)."""
        if self.number():
            self._at += 84

    def skip_wcc(self) -> None:
        """wcc_data (the same)."""
        if self.number():
            self._at += 24
        self.skip_attributes()


def _opaque(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data + bytes(-len(data) % 4)


class _Writer:
    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._stopped = False

    def stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stopped = True

    def run(self) -> None:
        """One line of JSON per record on standard output, until SIGTERM."""
        options = self._options
        mount = UdpMount(options.server, options.export, cap_s=options.cap_s)
        for number in itertools.count(1):
            if self._stopped:
                return
            sent_ns = kernel.now_ns()
            error = None
            try:
                mount.put(options.name, number * RECORD_BYTES, record(number, sent_ns))
            except UdpError as failed:
                error = str(failed)
            print(Attempt(number, sent_ns, kernel.now_ns(), error).dump(), flush=True)
            time.sleep(options.interval_ms / 1e3)


def main() -> None:
    """Writes until SIGTERM; see the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True)
    parser.add_argument("--export", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--cap-s", type=float, default=30.0)
    parser.add_argument("--interval-ms", type=float, default=20.0)
    writer = _Writer(parser.parse_args())
    signal.signal(signal.SIGTERM, writer.stop)
    try:
        writer.run()
    except UdpError as error:
        sys.exit(f"udp client: {error}")


if __name__ == "__main__":
    main()

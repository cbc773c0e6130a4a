"""An NFS v3 client by libnfs (4.0, ctypes), and a program that writes and reads records by it.

It drives libnfs's asynchronous calls with its own poll loop, so every operation has a cap: libnfs
by itself waits for ever, and its synchronous calls cannot be left without leaving pointers into a
dead stack behind. On a broken connection libnfs reconnects by itself (autoreconnect -1) and sends
the waiting calls again, as a hard mount does.

Run inside place c:  python -m tests.netns.labkit.nfs_client write|read ...
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import itertools
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import FrameType

from tests.netns.labkit import kernel

RECORD_BYTES = 32
_POLL_MS = 50
_BACKOFF_S = 0.01  # libnfs 4.0 reconnects at once after a refusal, in a loop without a pause
_STOP_GRACE_S = 1.0
_Callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


def _load() -> ctypes.CDLL:
    library = ctypes.CDLL("libnfs.so.13")
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    long = ctypes.c_uint64
    # nfsc/libnfs.h of 4.0; every asynchronous call ends with callback and private data
    signatures: dict[str, list[object]] = {
        "nfs_destroy_context": [pointer],
        "nfs_get_fd": [pointer],
        "nfs_which_events": [pointer],
        "nfs_service": [pointer, number],
        "nfs_set_autoreconnect": [pointer, number],
        "nfs_mount_async": [pointer, text, text, _Callback, pointer],
        "nfs_open2_async": [pointer, text, number, number, _Callback, pointer],
        "nfs_pwrite_async": [pointer, pointer, long, long, text, _Callback, pointer],
        "nfs_pread_async": [pointer, pointer, long, long, _Callback, pointer],
        "nfs_close_async": [pointer, pointer, _Callback, pointer],
        "nfs_unlink_async": [pointer, text, _Callback, pointer],
        "nfs_rename_async": [pointer, text, text, _Callback, pointer],
        "nfs_parse_url_dir": [pointer, text],
        "nfs_destroy_url": [pointer],
    }
    for name, arguments in signatures.items():
        getattr(library, name).argtypes = arguments
    for name in ("nfs_init_context", "nfs_parse_url_dir", "nfs_get_error"):
        getattr(library, name).restype = pointer if name != "nfs_get_error" else text
    library.nfs_init_context.argtypes = []
    library.nfs_get_error.argtypes = [pointer]
    return library


class NfsError(OSError):
    """An operation failed; errno as libnfs gave it (errno.ETIMEDOUT: the lab's cap ended it)."""


@dataclass
class _Reply:
    wants_bytes: bool = False
    done: bool = False
    status: int = 0
    data: int | None = None
    content: bytes = b""
    error: NfsError | None = None


class Mount:
    """One mounted export on one connection. Once it is `broken` it can only be closed."""

    def __init__(
        self,
        server: str,
        export: str,
        *,
        cap_s: float = 10.0,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Mounts server:export by NFS v3 on fixed ports; IPv6 without brackets. Raises NfsError."""
        self._nfs = _load()
        self._cap_s = cap_s
        self._should_stop = should_stop
        self.broken = False
        self._kept: list[object] = []
        self._context: int | None = self._nfs.nfs_init_context()
        # Only the arguments of a url set the ports; host and path are given to mount.
        url = b"nfs://x/x/?version=3&nfsport=2049&mountport=20048"
        parsed = self._nfs.nfs_parse_url_dir(self._context, url)
        self._nfs.nfs_destroy_url(parsed)
        self._nfs.nfs_set_autoreconnect(self._context, -1)
        try:
            self._call("nfs_mount_async", server.encode(), export.encode())
        except NfsError:
            self.close()
            raise

    def close(self) -> None:
        """Drops the connection. Idempotent."""
        if self._context is not None:
            self._nfs.nfs_destroy_context(self._context)
            self._context = None

    def open(self, path: str, flags: int = os.O_RDONLY, mode: int = 0o644) -> int:
        """Opens by path and returns libnfs's handle."""
        handle = self._call("nfs_open2_async", path.encode(), flags, mode).data
        assert handle is not None
        return handle

    def write(self, handle: int, offset: int, content: bytes) -> None:
        """Writes at an offset; not stable before close_handle."""
        written = self._call("nfs_pwrite_async", handle, offset, len(content), content).status
        if written != len(content):
            raise NfsError(errno.EIO, f"short write: {written} of {len(content)}")

    def read(self, handle: int, offset: int, count: int) -> bytes:
        """Reads at most count bytes at an offset."""
        return self._call("nfs_pread_async", handle, offset, count, wants_bytes=True).content

    def close_handle(self, handle: int) -> None:
        """Frees a handle; after writes it first sends COMMIT and waits until they are stable."""
        self._call("nfs_close_async", handle)

    def unlink(self, path: str) -> None:
        """Removes a file."""
        self._call("nfs_unlink_async", path.encode())

    def rename(self, old: str, new: str) -> None:
        """Gives a file another name, also in another folder."""
        self._call("nfs_rename_async", old.encode(), new.encode())

    def put(self, path: str, offset: int, content: bytes) -> None:
        """Open (create) by path, write, commit, close: a client that holds nothing open."""
        handle = self.open(path, os.O_CREAT | os.O_RDWR)
        self.write(handle, offset, content)
        self.close_handle(handle)

    def get(self, path: str) -> bytes:
        """The whole content of a file, opened by path."""
        handle = self.open(path)
        parts: list[bytes] = []
        while part := self.read(handle, sum(map(len, parts)), 65536):
            parts.append(part)
        self.close_handle(handle)
        return b"".join(parts)

    def _call(self, name: str, *arguments: object, wants_bytes: bool = False) -> _Reply:
        reply = _Reply(wants_bytes)

        def finished(status: int, _nfs: int, data: int | None, _private: int | None) -> None:
            reply.done, reply.status, reply.data = True, status, data
            if status < 0:  # not from data: for some calls that is a structure, not the text
                reply.error = self._failure(name, status)
            elif data and wants_bytes:
                reply.content = ctypes.string_at(data, status)

        callback = _Callback(finished)
        self._kept.append(callback)  # libnfs may call it as late as destroy_context
        if getattr(self._nfs, name)(self._context, *arguments, callback, None) != 0:
            raise NfsError(errno.EIO, f"{name}: {self._error()}")
        self._wait(name, reply)
        self._kept.remove(callback)
        if reply.error is not None:
            raise reply.error
        return reply

    def _failure(self, name: str, status: int) -> NfsError:
        text = self._error()
        # Reads and writes say EFAULT for whatever the server answered; the text has its word.
        number = errno.ESTALE if "NFS3ERR_STALE" in text else -status
        return NfsError(number, f"{name}: {text}")

    def _wait(self, name: str, reply: _Reply) -> None:
        deadline = time.monotonic() + self._cap_s
        while not reply.done:
            if self._should_stop():
                deadline = min(deadline, time.monotonic() + _STOP_GRACE_S)
                self._should_stop = lambda: False
            if time.monotonic() > deadline:
                self.broken = True
                raise NfsError(errno.ETIMEDOUT, f"{name}: no answer within the cap")
            if self._nfs.nfs_service(self._context, self._poll()) < 0:
                self.broken = True
                raise NfsError(errno.EIO, f"{name}: {self._error()}")

    def _poll(self) -> int:
        poller = select.poll()
        fd = self._nfs.nfs_get_fd(self._context)
        if fd < 0:
            time.sleep(_BACKOFF_S)
            return 0
        poller.register(fd, self._nfs.nfs_which_events(self._context))
        events = poller.poll(_POLL_MS)
        revents = events[0][1] if events else 0
        if revents & (select.POLLERR | select.POLLHUP):
            time.sleep(_BACKOFF_S)
        return revents

    def _error(self) -> str:
        raw: bytes | None = self._nfs.nfs_get_error(self._context)
        return (raw or b"").decode(errors="replace")


@dataclass(frozen=True)
class Attempt:
    """One record's fate, times by CLOCK_BOOTTIME. error None: the server said that it is stable."""

    number: int
    sent_ns: int
    ended_ns: int
    error: str | None

    @property
    def took_ms(self) -> float:
        """How long the client waited for the whole operation, however it ended."""
        return (self.ended_ns - self.sent_ns) / 1e6

    @property
    def stale(self) -> bool:
        """It began on one node and ended on the other, where its file is another one, or none.

        Mostly ESTALE of a write or commit; seen once: ENOENT of a CREATE that was sent again.
        """
        codes = (errno.ESTALE, errno.ENOENT)
        return self.error is not None and any(f"[Errno {code}]" in self.error for code in codes)

    def dump(self) -> str:
        """One JSON line."""
        return json.dumps(asdict(self))


def record(number: int, sent_ns: int) -> bytes:
    """The bytes of one record; record N stands at offset N * RECORD_BYTES."""
    return f"{number:010d} {sent_ns:020d}\n".encode()


class _Writer:
    """Writes record after record by path until told to stop, whatever becomes of each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._stopped = False
        self._mount: Mount | None = None

    def stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stopped = True

    def run(self) -> None:
        """One line of JSON per record on standard output."""
        for number in itertools.count(self._options.first):
            if self._stopped:
                return
            sent_ns = kernel.now_ns()
            error = self._attempt(number, sent_ns)
            print(Attempt(number, sent_ns, kernel.now_ns(), error).dump(), flush=True)
            self._pause(sent_ns)

    def _attempt(self, number: int, sent_ns: int) -> str | None:
        try:
            if self._mount is None:
                self._mount = Mount(
                    self._options.server,
                    self._options.export,
                    cap_s=self._options.cap_s,
                    should_stop=lambda: self._stopped,
                )
            self._mount.put(self._options.path, number * RECORD_BYTES, record(number, sent_ns))
        except NfsError as error:
            if self._mount is not None and self._mount.broken:
                self._mount.close()
                self._mount = None
            return str(error)
        return None

    def _pause(self, sent_ns: int) -> None:
        left_s = self._options.interval_ms / 1e3 - (kernel.now_ns() - sent_ns) / 1e9
        if left_s > 0 and not self._stopped:
            time.sleep(left_s)


def _read(options: argparse.Namespace) -> None:
    mount = Mount(options.server, options.export, cap_s=options.cap_s)
    content = mount.get(options.path)
    mount.close()
    numbers = []
    for number in range(len(content) // RECORD_BYTES):
        line = content[number * RECORD_BYTES : (number + 1) * RECORD_BYTES]
        if line.strip(b"\0"):
            stored, sent_ns = line.split()
            if int(stored) != number:
                raise SystemExit(f"record {number} holds {line!r}")
            numbers.append((number, int(sent_ns)))
    json.dump(numbers, sys.stdout)


def main() -> None:
    """`write` until SIGTERM, or `read` once; see the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("write", "read"))
    parser.add_argument("--server", required=True)
    parser.add_argument("--export", required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--cap-s", type=float, default=30.0)
    parser.add_argument("--interval-ms", type=float, default=20.0)
    parser.add_argument("--first", type=int, default=1)
    options = parser.parse_args()
    if options.action == "read":
        try:
            _read(options)
        except NfsError as error:
            raise SystemExit(f"read: {error}") from None
        return
    writer = _Writer(options)
    signal.signal(signal.SIGTERM, writer.stop)
    writer.run()


if __name__ == "__main__":
    main()

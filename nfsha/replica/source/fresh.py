"""What is published is published anew for whoever fetches it, before the first byte is sent.

rsync waits for the `pre-xfer exec` of a module before it sends anything. For the control module
that is a few lines of Python which ask this process over a Unix socket, wait for "fresh", and
refuse the transfer when anything else comes, or nothing in time. It starts no process, knows
nothing of what is published, and leaves nothing behind but its socket, which `close` removes.

A socket, and no FIFOs: a daemon that is gone refuses at once, a script that is killed hangs up, and
requests cannot mix. The script loads no library (10 ms in all; 30 and more with `socket`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

FRESH_WITHIN_S = 6.0
"""A publishing that takes longer makes the fetch fail: whoever fetches waits for 10 s at most."""

ANSWER_WITHIN_S = 7.0
"""Later than that the script does not believe in an answer any more."""

MAX_WAITING: Final = 64
"""More fetches than that at once are refused; the source's rsync lets 32 in."""

_MAX_WORDS: Final = 400
_FRESH: Final = b"fresh\n"

# `_socket` is what `socket` is made of: importing that one takes longer than all the rest.
_SCRIPT: Final = """\
import os, sys
from _socket import AF_UNIX, SOCK_STREAM, socket
answer = b""
try:
    os.chdir(sys.argv[1])
    line = socket(AF_UNIX, SOCK_STREAM)
    line.settimeout(float(sys.argv[3]))
    line.connect(sys.argv[2])
    answer = line.recv(1000)
    words = answer.decode("utf-8", "replace").strip() or "it hung up"
except TimeoutError:
    words = "it did not answer within " + sys.argv[3] + " s"
except OSError as error:
    words = "it does not answer: " + str(error.strerror)
if answer != b"fresh\\n":
    print("nfsha has nothing fresh to send: " + words)
    sys.exit(1)
"""


class NotFreshError(Exception):
    """Nothing could be published anew; the text says why, for the other node's operator."""


class Coalesced:
    """A call that is run once for all who ask before it begins, and never twice at a time.

    Who asks while it runs waits for the next run: that one has seen all that was before. Cancelling
    whoever waits does not end a run; so one that hangs takes one thread, however many ask.
    """

    def __init__(self, call: Callable[[], Awaitable[object]]) -> None:
        """Runs `call`; what it raises comes to all who wait for it."""
        self._call = call
        self._running: asyncio.Task[None] | None = None
        self._begun = 0
        self._done = 0

    async def __call__(self) -> None:
        """Returns when a run has ended well that began after this was called."""
        wanted = self._begun + 1
        while self._done < wanted:
            if self._running is None or self._running.done():
                self._running = asyncio.create_task(self._run())
                self._running.add_done_callback(_heard)
            await asyncio.shield(self._running)

    async def _run(self) -> None:
        self._begun += 1
        number = self._begun
        await self._call()
        self._done = number


def _heard(task: asyncio.Task[None]) -> None:
    """Who waited has the failure; if nobody did any more, nobody wants to know."""
    if not task.cancelled():
        task.exception()


class Doorbell:
    """The socket on which the source's rsync asks for what is fresh."""

    def __init__(self, folder: Path, name: str, fresh: Callable[[], Awaitable[None]]) -> None:
        """`fresh` publishes anew, or raises NotFreshError. `folder` is root's alone (0700)."""
        self._folder = folder
        self._name = name
        self._fresh = fresh
        self._server: asyncio.Server | None = None
        self._waiting: set[asyncio.Task[None]] = set()
        self._said = ""

    def script(self) -> bytes:
        """The shell's script that asks; its exit code is 0 if what lies there is fresh."""
        # -I, -S, -B: neither the environment nor any site can change what runs; nothing is written.
        python = (sys.executable, "-I", "-S", "-B", "-c", _SCRIPT)
        where = (str(self._folder), self._name, f"{ANSWER_WITHIN_S:g}")
        return b"# Written by nfsha.\nexec " + os.fsencode(shlex.join(python + where)) + b"\n"

    async def open(self) -> None:
        """Answers from now on; idempotent. The folder must be there. Raises OSError."""
        if self._server is not None:
            return
        listener = _listen(self._folder, self._name)
        try:
            # Not start_unix_server: since Python 3.13 it looks for the file by the name it was
            # bound with, which is ours for that moment only.
            self._server = await asyncio.start_server(self._serve, sock=listener)
        except BaseException:
            listener.close()
            raise

    async def close(self) -> None:
        """Answers no more; idempotent. Whoever waits is refused."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        (self._folder / self._name).unlink(missing_ok=True)
        waiting = tuple(self._waiting)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    def _serve(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._answer(writer, busy=len(self._waiting) >= MAX_WAITING))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def _answer(self, writer: asyncio.StreamWriter, *, busy: bool) -> None:
        """One answer to whoever rang; nothing that he sends is ever looked at."""
        try:
            writer.write(b"too many ask at once\n" if busy else await self._words())
            with contextlib.suppress(OSError):  # a script that was killed
                await writer.drain()
        finally:
            writer.close()

    async def _words(self) -> bytes:
        try:
            async with asyncio.timeout(FRESH_WITHIN_S):
                await self._fresh()
        except TimeoutError:
            words = f"publishing takes longer than {FRESH_WITHIN_S:g} s"
        except NotFreshError as error:
            words = str(error)
        else:
            self._said = ""
            return _FRESH
        if words != self._said:  # once, until something else is to be said
            log.warning("the other node's fetch is refused: %s", words)
        self._said = words
        return words[:_MAX_WORDS].encode(errors="replace") + b"\n"


def _listen(folder: Path, name: str) -> socket.socket:
    """Binds by the folder's descriptor: the address of a socket has 107 bytes, a path may not."""
    (folder / name).unlink(missing_ok=True)  # an earlier daemon's
    where = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(f"/proc/self/fd/{where}/{name}")
            (folder / name).chmod(0o600)
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
    finally:
        os.close(where)
    return listener

"""The control socket: how the commands talk to the daemon, both ends.

One JSON object per line. A request is `{"command": .., "args": {..}}`; its answer is one line
`{"ok": true, "result": {..}}`, or `{"ok": false, "error": "..", "details": {..}}`. A streaming
command answers any number of lines with `"more": true` and ends with one of `"more": false`. What
the commands mean is the daemon's business; this module knows only the framing, the limits and who
is asking.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import json
import os
import socket
import stat
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

DEFAULT_SOCKET = Path("/run/nfsha/nfsha.sock")
DEFAULT_GROUP = "nfsha"
MAX_REQUEST_BYTES = 64 << 10
MAX_ANSWER_BYTES = 1 << 20
MAX_CONNECTIONS = 32
_REQUEST_KEYS = {"command", "args"}
_READ_TIMEOUT_S = 10.0
_WRITE_TIMEOUT_S = 10.0

Object = dict[str, Any]


class ControlError(Exception):
    """The daemon cannot be talked to, or this socket cannot be had; the text is for an operator."""


class NotPermittedError(ControlError):
    """Whoever asks may not use this socket."""


class CommandError(ControlError):
    """The daemon understood and says no. `details` is what it adds for programs (may be empty)."""

    def __init__(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.details: Object = dict(details or {})


class FramingError(ValueError):
    """A line is not a message of this protocol; the text says in what way."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who is at the other end, from the kernel (SO_PEERCRED, unix(7))."""

    uid: int
    gid: int
    pid: int

    def __str__(self) -> str:
        return f"uid {self.uid}, pid {self.pid}"


Handler = Callable[[str, Object, Credentials], Awaitable[Object]]
StreamHandler = Callable[[str, Object, Credentials], AsyncGenerator[Object, None]]


# --------------------------------------------------------------------------- framing


def encode(message: Mapping[str, Any], limit: int = MAX_ANSWER_BYTES) -> bytes:
    """Returns one line. Raises FramingError when it is longer than the limit."""
    line = json.dumps(message, ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"
    if len(line) > limit:
        raise FramingError(f"a message of {len(line)} bytes is above the limit of {limit}")
    return line


def decode(line: bytes) -> Object:
    """Reads one line as a JSON object. Raises FramingError."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FramingError("the line is not JSON") from error
    if not isinstance(message, dict):
        raise FramingError("the line is not a JSON object")
    return message


def decode_request(line: bytes) -> tuple[str, Object]:
    """Reads one line as a request: the command and its arguments. Raises FramingError."""
    message = decode(line)
    if set(message) != _REQUEST_KEYS:
        raise FramingError("a request has the keys command and args, and no other")
    command, args = message["command"], message["args"]
    if not isinstance(command, str) or not isinstance(args, dict):
        raise FramingError("command is a text and args is an object")
    return command, args


# --------------------------------------------------------------------------- the daemon's end


class ControlServer:
    """Listens at `path` for at most `MAX_CONNECTIONS` clients at a time.

    `handler` answers one command; it raises CommandError to say no. The commands named in `streams`
    go to their stream handler instead, which is closed when the client goes away. Any other
    exception of a handler is a mistake in the program: it goes to the loop's exception handler, and
    the client sees its connection closed.
    """

    def __init__(
        self,
        path: Path,
        handler: Handler,
        *,
        streams: Mapping[str, StreamHandler] | None = None,
        group: str = DEFAULT_GROUP,
        answer_timeout_s: float = 30.0,
    ) -> None:
        self._path = path
        self._handler = handler
        self._streams = dict(streams or {})
        self._group = group
        self._answer_timeout_s = answer_timeout_s
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._inode: int | None = None
        self.access = "not listening"
        """Who may connect, in words."""

    async def start(self) -> None:
        """Starts to listen, in place of a dead daemon's socket.

        Raises ControlError when another daemon answers there, or the socket cannot be made.
        """
        try:
            _require_no_other_daemon(self._path)
            listening = self._bind()
        except OSError as error:
            raise ControlError(
                f"cannot listen at {self._path}: {error.strerror or error}"
            ) from error
        self._inode = self._path.stat().st_ino
        self._server = await asyncio.start_unix_server(
            self._welcome, sock=listening, limit=MAX_REQUEST_BYTES
        )

    async def close(self) -> None:
        """Stops listening, ends all connections and removes the socket. Idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == self._inode:  # not a successor's
                self._path.unlink()
        # Nobody can connect any more. Whom asyncio is accepting just now it would leave unclosed,
        # if the server went first: it takes one turn of the loop to accept, and one to welcome.
        for _ in range(3):
            await asyncio.sleep(0)
        server.close()
        clients = list(self._clients)
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)

    def _bind(self) -> socket.socket:
        """Makes the socket under another name and moves it into place once its access is right."""
        temporary = self._path.with_name(f".{self._path.name}.new")
        temporary.unlink(missing_ok=True)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listening.bind(os.fspath(temporary))
            self._set_access(temporary)
            listening.listen(MAX_CONNECTIONS)
            temporary.replace(self._path)
        except OSError:
            listening.close()
            temporary.unlink(missing_ok=True)
            raise
        return listening

    def _set_access(self, path: Path) -> None:
        path.chmod(0o600)
        try:
            os.chown(path, -1, grp.getgrnam(self._group).gr_gid)
        except KeyError:
            self.access = f"root only (there is no group {self._group})"
        except PermissionError:
            self.access = f"root only (not permitted to give it to the group {self._group})"
        else:
            path.chmod(0o660)
            self.access = f"root and the group {self._group}"

    def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:  # it was accepted while we closed
            writer.transport.abort()
            return
        client = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._clients.add(client)
        client.add_done_callback(lambda client: self._bid_farewell(client, writer))

    def _bid_farewell(self, client: asyncio.Task[None], writer: asyncio.StreamWriter) -> None:
        self._clients.discard(client)
        writer.close()
        if client.cancelled():  # the daemon ends, and does not wait for what is not read
            writer.transport.abort()
        elif (mistake := client.exception()) is not None:
            client.get_loop().call_exception_handler(
                {"message": "a control command failed", "exception": mistake, "task": client}
            )

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if len(self._clients) > MAX_CONNECTIONS:
                await _refuse(writer, f"busy: {MAX_CONNECTIONS} clients are connected already")
            else:
                await self._converse(reader, writer)
        except OSError:  # the client went away, or does not read (a TimeoutError is one too)
            writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        who = _credentials(writer)
        while True:
            try:
                async with asyncio.timeout(_READ_TIMEOUT_S):
                    line = await reader.readuntil(b"\n")
                command, args = decode_request(line)
            except asyncio.IncompleteReadError:
                return
            except asyncio.LimitOverrunError:
                await _refuse(writer, f"a request has at most {MAX_REQUEST_BYTES} bytes")
                return
            except FramingError as error:
                await _refuse(writer, str(error))
                return
            if command in self._streams:
                await self._stream(self._streams[command](command, args, who), reader, writer)
                return
            await _send(writer, await self._answer(command, args, who))

    async def _answer(self, command: str, args: Object, who: Credentials) -> Object:
        try:
            async with asyncio.timeout(self._answer_timeout_s):
                result = await self._handler(command, args, who)
        except TimeoutError:
            return _no(f"{command}: no answer within {self._answer_timeout_s:g} s")
        except CommandError as error:
            return _no(str(error), error.details)
        return {"ok": True, "result": result}

    async def _stream(
        self,
        results: AsyncGenerator[Object, None],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Sends each result, until the stream or the client ends."""
        gone = asyncio.ensure_future(reader.read(1))
        try:
            async with contextlib.aclosing(results):
                while (result := await _next_or_gone(results, gone)) is not None:
                    await _send(writer, {"ok": True, "result": result, "more": True})
            if not gone.done():
                await _send(writer, {"ok": True, "result": {}, "more": False})
        except CommandError as error:
            await _refuse(writer, str(error), error.details)
        finally:
            gone.cancel()


async def _next_or_gone(
    results: AsyncGenerator[Object, None], gone: asyncio.Future[bytes]
) -> Object | None:
    """Returns the next result, or None when there is none any more or the client went away."""
    result: asyncio.Future[Object | None] = asyncio.ensure_future(anext(results, None))
    either: set[asyncio.Future[Any]] = {result, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        return None
    finally:
        if not result.done():
            result.cancel()
            await asyncio.wait({result})


def _require_no_other_daemon(path: Path) -> None:
    """Raises ControlError unless nothing, or a dead daemon's socket, is in this place."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ControlError(f"cannot listen at {path}: something else than a socket is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            return
        except BlockingIOError:
            pass  # its queue is full: it lives
    raise ControlError(f"another nfsha daemon answers at {path}; stop it first")


def _credentials(writer: asyncio.StreamWriter) -> Credentials:
    sock: socket.socket = writer.get_extra_info("socket")
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", data)
    return Credentials(uid=uid, gid=gid, pid=pid)


def _no(message: str, details: Object | None = None) -> Object:
    return {"ok": False, "error": message, "details": details or {}}


async def _send(writer: asyncio.StreamWriter, message: Object) -> None:
    try:
        line = encode(message)
    except FramingError as error:
        line = encode(_no(f"the answer is too large: {error}"))
    writer.write(line)
    async with asyncio.timeout(_WRITE_TIMEOUT_S):
        await writer.drain()


async def _refuse(
    writer: asyncio.StreamWriter, message: str, details: Object | None = None
) -> None:
    """Says no and hangs up."""
    with contextlib.suppress(OSError):
        await _send(writer, _no(message, details))
    writer.close()


# --------------------------------------------------------------------------- the commands' end


class ControlClient:
    """Asks the daemon at `path`; blocks. Raises ControlError with words for an operator."""

    def __init__(self, path: Path = DEFAULT_SOCKET, *, timeout_s: float = 35.0) -> None:
        self._path = path
        self._timeout_s = timeout_s

    def call(self, command: str, args: Mapping[str, Any] | None = None) -> Object:
        """Returns the result of one command. Raises CommandError when the daemon says no."""
        with self._connected() as connection, connection.makefile("rb") as file:
            result, _ = self._answer(self._ask(connection, file, command, args))
            return result

    def stream(self, command: str, args: Mapping[str, Any] | None = None) -> Iterator[Object]:
        """Yields the results of a streaming command until it ends; between two it waits for ever.

        Raises ControlError and CommandError as `call` does.
        """
        with self._connected() as connection, connection.makefile("rb") as file:
            result, more = self._answer(self._ask(connection, file, command, args))
            connection.settimeout(None)
            while more:
                yield result
                result, more = self._answer(self._read(file))

    @contextlib.contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(self._timeout_s)
            try:
                connection.connect(os.fspath(self._path))
                yield connection
            except (FileNotFoundError, ConnectionRefusedError) as error:
                raise ControlError(
                    f"the daemon is not running (nobody answers at {self._path});"
                    " start it: systemctl start nfsha"
                ) from error
            except PermissionError as error:
                raise NotPermittedError(
                    f"no permission for {self._path}; be root or in the group {DEFAULT_GROUP}"
                ) from error
            except TimeoutError as error:
                raise ControlError(
                    f"the daemon did not answer within {self._timeout_s:g} s"
                ) from error
            except OSError as error:
                raise ControlError(f"{self._path}: {error.strerror or error}") from error

    def _ask(
        self,
        connection: socket.socket,
        file: BufferedReader,
        command: str,
        args: Mapping[str, Any] | None,
    ) -> bytes:
        try:
            request = encode({"command": command, "args": dict(args or {})}, MAX_REQUEST_BYTES)
        except FramingError as error:
            raise ControlError(str(error)) from error
        with contextlib.suppress(BrokenPipeError):  # it hung up, and may have said why
            connection.sendall(request)
        return self._read(file)

    def _read(self, file: BufferedReader) -> bytes:
        line = file.readline(MAX_ANSWER_BYTES + 1)
        if not line.endswith(b"\n"):
            raise ControlError("the daemon closed the connection without an answer; see its log")
        return line

    def _answer(self, line: bytes) -> tuple[Object, bool]:
        try:
            answer = decode(line)
        except FramingError as error:
            raise ControlError(f"{self._path} is not nfsha's: {error}") from error
        result, details = answer.get("result", {}), answer.get("details", {})
        if not isinstance(result, dict) or not isinstance(details, dict):
            raise ControlError(f"{self._path} is not nfsha's: an answer of another form")
        if answer.get("ok") is not True:
            raise CommandError(str(answer.get("error", "no reason given")), details)
        return result, answer.get("more") is True

"""The control socket, both ends: commands, streams, and everything a client can do wrong."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfsha.host import control
from nfsha.host.control import (
    MAX_CONNECTIONS,
    MAX_REQUEST_BYTES,
    CommandError,
    ControlClient,
    ControlError,
    ControlServer,
    Credentials,
    FramingError,
    decode_request,
    encode,
)

GROUP = grp.getgrgid(os.getgid()).gr_name


class Daemon:
    """A control server in a loop of its own thread, with a few commands."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loop = asyncio.new_event_loop()
        self.asked: list[tuple[str, Credentials]] = []
        self.mistakes: list[dict[str, Any]] = []
        self.streams_ended = threading.Event()
        self.server = ControlServer(
            path,
            self.handle,
            streams={"count": self.count, "for-ever": self.for_ever, "refuse": self.refuse},
            group=GROUP,
            answer_timeout_s=0.3,
        )
        self.thread = threading.Thread(target=self.loop.run_forever)

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    def start(self) -> None:
        self.loop.set_exception_handler(lambda _, context: self.mistakes.append(context))
        self.thread.start()
        self.run(self.server.start())

    def stop(self) -> None:
        self.run(self.server.close())
        self.run(asyncio.sleep(0.01))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def handle(self, command: str, args: dict[str, Any], who: Credentials) -> dict[str, Any]:
        self.asked.append((command, who))
        if command == "echo":
            return args
        if command == "hang":
            await asyncio.sleep(60)
        if command == "large":
            return {"text": "x" * (2 << 20)}
        if command == "mistake":
            raise RuntimeError("a broken assumption")
        raise CommandError(f"{command}: refused", {"found": 2})

    async def count(
        self, command: str, args: dict[str, Any], who: Credentials
    ) -> AsyncGenerator[dict[str, Any], None]:
        for number in range(args["to"]):
            yield {"number": number}

    async def for_ever(
        self, command: str, args: dict[str, Any], who: Credentials
    ) -> AsyncGenerator[dict[str, Any], None]:
        try:
            yield {"number": 0}
            await asyncio.sleep(60)
        finally:
            self.streams_ended.set()

    async def refuse(
        self, command: str, args: dict[str, Any], who: Credentials
    ) -> AsyncGenerator[dict[str, Any], None]:
        yield {"number": 0}
        raise CommandError("no more")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nfsha.sock"


@pytest.fixture
def daemon(path: Path) -> Iterator[Daemon]:
    running = Daemon(path)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def client(daemon: Daemon) -> ControlClient:
    return ControlClient(daemon.path, timeout_s=5)


@contextlib.contextmanager
def raw(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(str(path))
        yield connection


def received(connection: socket.socket) -> bytes:
    """Everything until the server hangs up."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            data += piece
    return data


def test_a_command_is_answered_and_the_daemon_knows_who_asks(
    daemon: Daemon, client: ControlClient
) -> None:
    assert client.call("echo", {"a": [1, "é\n"]}) == {"a": [1, "é\n"]}
    assert daemon.asked == [("echo", Credentials(os.getuid(), os.getgid(), os.getpid()))]


def test_another_process_is_known_by_its_own_id(daemon: Daemon) -> None:
    script = (
        "import sys; from pathlib import Path; from nfsha.host.control import ControlClient\n"
        "ControlClient(Path(sys.argv[1])).call('echo'); import os; print(os.getpid())"
    )
    argv = [sys.executable, "-c", script, str(daemon.path)]
    pid = int(subprocess.run(argv, check=True, capture_output=True, timeout=30).stdout)
    assert daemon.asked[0][1].pid == pid


def test_a_refusal_has_words_and_details(client: ControlClient) -> None:
    with pytest.raises(CommandError, match="failback: refused") as caught:
        client.call("failback")
    assert caught.value.details == {"found": 2}


def test_several_requests_on_one_connection(daemon: Daemon) -> None:
    with raw(daemon.path) as connection:
        for number in range(3):
            connection.sendall(encode({"command": "echo", "args": {"n": number}}))
        connection.shutdown(socket.SHUT_WR)
        answers = [json.loads(line) for line in received(connection).splitlines()]
    assert [answer["result"]["n"] for answer in answers] == [0, 1, 2]


def test_a_stream_ends_by_itself(client: ControlClient) -> None:
    assert [result["number"] for result in client.stream("count", {"to": 3})] == [0, 1, 2]
    assert list(client.stream("count", {"to": 0})) == []


def test_a_stream_ends_when_its_reader_goes_away(daemon: Daemon, client: ControlClient) -> None:
    stream = client.stream("for-ever")
    assert next(stream) == {"number": 0}
    assert not daemon.streams_ended.is_set()
    stream.close()  # type: ignore[attr-defined]
    assert daemon.streams_ended.wait(5)


def test_a_stream_can_refuse_half_way(client: ControlClient) -> None:
    stream = client.stream("refuse")
    assert next(stream) == {"number": 0}
    with pytest.raises(CommandError, match="no more"):
        next(stream)


def test_a_handler_has_a_time_limit(client: ControlClient) -> None:
    with pytest.raises(CommandError, match=r"hang: no answer within 0\.3 s"):
        client.call("hang")


def test_an_answer_that_is_too_large_is_refused(client: ControlClient) -> None:
    with pytest.raises(CommandError, match="too large"):
        client.call("large")


def test_a_request_that_is_too_large_is_not_even_sent(client: ControlClient) -> None:
    with pytest.raises(ControlError, match="above the limit of 65536"):
        client.call("echo", {"text": "x" * MAX_REQUEST_BYTES})


def test_a_mistake_of_the_daemon_is_not_shown_to_the_client(
    daemon: Daemon, client: ControlClient
) -> None:
    with pytest.raises(ControlError, match="closed the connection without an answer"):
        client.call("mistake")
    daemon.run(asyncio.sleep(0.01))
    assert isinstance(daemon.mistakes[0]["exception"], RuntimeError)
    assert client.call("echo", {"still": "there"}) == {"still": "there"}


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "not JSON"),
        (b"\n", "not JSON"),
        (b"\xff\xfe\n", "not JSON"),
        (b"[" * 60000 + b"\n", "not JSON"),
        (b"[]\n", "not a JSON object"),
        (b"{}\n", "has the keys command and args"),
        (b'{"command": "echo", "args": {}, "more": 1}\n', "has the keys command and args"),
        (b'{"command": 1, "args": {}}\n', "command is a text"),
        (b'{"command": "echo", "args": []}\n', "args is an object"),
        (b"x" * (MAX_REQUEST_BYTES + 10), "at most 65536 bytes"),
        (b"x" * (MAX_REQUEST_BYTES + 10) + b"\n", "at most 65536 bytes"),
    ],
)
def test_garbage_gets_one_clear_error(daemon: Daemon, sent: bytes, words: str) -> None:
    with raw(daemon.path) as connection:
        connection.sendall(sent)
        lines = received(connection).splitlines()
    assert len(lines) == 1
    answer = json.loads(lines[0])
    assert answer["ok"] is False
    assert words in answer["error"]
    assert "Traceback" not in answer["error"]
    assert daemon.asked == []
    assert daemon.mistakes == []


@given(st.binary(max_size=200))
def test_no_line_raises_anything_but_a_framing_error(line: bytes) -> None:
    with pytest.raises(FramingError):
        decode_request(line)


def test_a_client_that_hangs_up_in_the_middle_is_no_trouble(
    daemon: Daemon, client: ControlClient
) -> None:
    for sent in (b"", b'{"command": "ec', encode({"command": "large", "args": {}})):
        with raw(daemon.path) as connection:
            connection.sendall(sent)
    assert client.call("echo") == {}
    assert daemon.mistakes == []


def test_a_silent_client_is_dropped(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_READ_TIMEOUT_S", 0.1)
    with raw(daemon.path) as connection:
        assert received(connection) == b""


def test_clients_are_bounded_and_a_place_becomes_free_again(
    daemon: Daemon, client: ControlClient
) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS):
            stack.enter_context(raw(daemon.path))
        with pytest.raises(CommandError, match="busy: 32 clients"):
            client.call("echo")
    for _ in range(100):
        with contextlib.suppress(CommandError):
            assert client.call("echo") == {}
            return
    pytest.fail("no place became free")


def test_the_group_may_connect_and_nobody_else(daemon: Daemon) -> None:
    found = daemon.path.stat()
    assert stat.S_IMODE(found.st_mode) == 0o660
    assert found.st_gid == os.getgid()
    assert daemon.server.access == f"root and the group {GROUP}"


def test_without_the_group_only_root_may(path: Path) -> None:
    async def main() -> None:
        daemon = Daemon(path)
        server = ControlServer(path, daemon.handle, group="no-such-group")
        await server.start()
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600  # noqa: PTH116
        assert server.access == "root only (there is no group no-such-group)"
        await server.close()
        daemon.loop.close()

    asyncio.run(main())


def test_the_socket_of_a_dead_daemon_is_replaced_and_removed_at_the_end(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    daemon = Daemon(path)
    daemon.start()
    assert ControlClient(path).call("echo") == {}
    daemon.stop()
    assert list(path.parent.iterdir()) == []


def test_the_socket_of_a_live_daemon_is_left_to_it(
    daemon: Daemon, client: ControlClient, path: Path
) -> None:
    with pytest.raises(ControlError, match="another nfsha daemon answers at"):
        asyncio.run(ControlServer(path, daemon.handle).start())
    assert client.call("echo") == {}


def test_a_successors_socket_is_not_removed(path: Path) -> None:
    daemon = Daemon(path)
    daemon.start()
    path.unlink()
    path.write_text("a successor")
    daemon.stop()
    assert path.read_text() == "a successor"


def test_what_is_in_the_way_is_said(daemon: Daemon, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("precious")
    with pytest.raises(ControlError, match="something else than a socket"):
        asyncio.run(ControlServer(plain, daemon.handle).start())
    assert plain.read_text() == "precious"
    with pytest.raises(ControlError, match=r"gone/s: No such file"):
        asyncio.run(ControlServer(tmp_path / "gone" / "s", daemon.handle).start())
    with pytest.raises(ControlError, match="too long"):
        asyncio.run(ControlServer(tmp_path / ("x" * 120), daemon.handle).start())


def test_a_daemon_that_is_not_there_is_said_with_what_to_do(path: Path) -> None:
    client = ControlClient(path)
    with pytest.raises(ControlError, match=r"not running .*: systemctl start nfsha"):
        client.call("status")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(ControlError, match=r"not running .*: systemctl start nfsha"):
        list(client.stream("events"))


def test_no_permission_names_the_group(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(ControlError, match="be root or in the group nfsha"):
        ControlClient(path).call("status")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "closed the connection without an answer"),
        (b'{"ok": tr', "closed the connection without an answer"),
        (b"hello\n", "is not nfsha's"),
        (b'{"ok": true, "result": 5}\n', "is not nfsha's"),
        (b'{"ok": 1}\n', "no reason given"),
        (None, "did not answer within 0.2 s"),
    ],
)
def test_a_strange_daemon_is_said(path: Path, answer: bytes | None, words: str) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                if answer is None:
                    connection.recv(1)
                else:
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ControlError, match=words):
            ControlClient(path, timeout_s=0.2).call("status")
        thread.join()

"""The daemon's end of a control socket, with answers given by the test, and a node to run it on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest

from nfsha.host import control

ROOT = Path(__file__).resolve().parents[2]
Facts = dict[str, Any]


class Daemon:
    """The daemon's end of a control socket, in a thread; `asked` is what it heard."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[tuple[str, Facts]] = []
        self.answers: dict[str, Facts | Callable[[], Facts] | Exception] = {}
        self.stream: list[Facts | Exception] = []
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._end: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        assert self._end is not None
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        server = control.ControlServer(
            self.path,
            self._answer,
            streams=dict.fromkeys(("follow", "sync-wait", "handover-numbers"), self._follow),
        )
        await server.start()
        self._ready.set()
        await self._end.wait()
        await server.close()

    async def _answer(self, command: str, args: Facts, who: control.Credentials) -> Facts:
        self.asked.append((command, args))
        answer = self.answers[command]
        if isinstance(answer, Exception):
            raise answer
        return answer() if callable(answer) else answer

    async def _follow(
        self, command: str, args: Facts, who: control.Credentials
    ) -> AsyncGenerator[Facts, None]:
        self.asked.append((command, args))
        for one in self.stream:
            if isinstance(one, Exception):
                raise one
            yield one


def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a configuration whose paths are in this folder the one that commands read."""
    text = (ROOT / "etc" / "nfsha.toml").read_text(encoding="utf-8")
    for name, path in (("state", "state"), ("runtime", "run"), ("key", "cluster.key")):
        text = text.replace(f"#{name} = ", f'{name} = "{tmp_path / path}" # ')
    (tmp_path / "state").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "nfsha.toml").write_text(text, encoding="utf-8")
    monkeypatch.setenv("NFSHA_CONFIG", str(tmp_path / "nfsha.toml"))
    monkeypatch.setenv("NO_COLOR", "1")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return shown.out, shown.err

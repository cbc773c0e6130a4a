"""What systemd is told, on a real socket; and how its queue of jobs is read, with a real child."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfsha.host import systemd
from nfsha.host.systemd import (
    StopReason,
    Systemd,
    is_final_stop,
    own_unit,
    read_jobs,
    stop_is_restart,
    stop_reason,
)

UNIT = "nfsha.service"


class Manager:
    """The receiving end of sd_notify."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(5)

    def heard(self) -> list[str]:
        self.socket.setblocking(False)
        found: list[str] = []
        try:
            while True:
                found.append(self.socket.recv(4096).decode())
        except BlockingIOError:
            return found


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    listening = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "4000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    yield listening
    listening.socket.close()


@pytest.fixture
def told(manager: Manager) -> Iterator[Systemd]:
    telling = Systemd()
    yield telling
    telling.close()


def test_ready_status_and_stopping(manager: Manager, told: Systemd) -> None:
    assert told.present
    told.ready()
    told.status("ACTIVE: serves 192.0.2.10,\n  the peer is heard … 3 ms ago")
    told.stopping()
    assert manager.heard() == [
        "READY=1",
        "STATUS=ACTIVE: serves 192.0.2.10, the peer is heard … 3 ms ago",
        "STOPPING=1",
    ]


def test_a_status_is_said_only_when_it_changed_and_is_bounded(
    manager: Manager, told: Systemd
) -> None:
    for text in ("one", "one", "two", "one", "x" * 5000):
        told.status(text)
    assert manager.heard() == ["STATUS=one", "STATUS=two", "STATUS=one", f"STATUS={'x' * 400}"]


def test_the_watchdog_hears_of_turns_four_times_in_its_time(
    manager: Manager, told: Systemd
) -> None:
    for now_ms in range(10_000, 14_000, 100):
        told.watchdog(now_ms)
    assert manager.heard() == ["WATCHDOG=1"] * 4


@pytest.mark.parametrize("environ", [{"WATCHDOG_USEC": ""}, {"WATCHDOG_PID": "1"}])
def test_a_watchdog_that_is_off_or_not_ours_is_not_fed(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    told = Systemd()
    told.watchdog(10_000)
    told.close()
    assert manager.heard() == []


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    told = Systemd()
    assert not told.present
    told.ready()
    told.watchdog(1)
    told.close()


# sdnotify leaves the socket that could not connect to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_notify_socket_that_is_gone_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/notify")
    told = Systemd()
    assert not told.present
    told.ready()
    gc.collect()


def test_a_deaf_systemd_blocks_nobody_and_hears_the_latest_word_later(
    manager: Manager, told: Systemd
) -> None:
    before = time.monotonic()
    for number in range(5000):
        told.status(f"line {number}")
    told.ready()
    assert time.monotonic() - before < 2
    heard = manager.heard()
    assert 0 < len(heard) < 5000
    assert "READY=1" not in "\n".join(heard)
    told.watchdog(10_000)
    assert set(manager.heard()[0].splitlines()) == {"STATUS=line 4999", "READY=1", "WATCHDOG=1"}
    told.stopping()
    assert manager.heard() == ["STOPPING=1"]


def test_a_manager_that_went_away_is_no_trouble(manager: Manager, told: Systemd) -> None:
    manager.socket.close()
    told.ready()
    told.status("still here")


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        ("", StopReason.CRASH),
        ("12 nfsha.service restart running\n", StopReason.RESTART),
        ("  12 nfsha.service try-restart waiting\n", StopReason.RESTART),
        ("12 nfsha.service stop running\n", StopReason.STOP),
        ("12 nfsha.service start waiting\n", StopReason.UNKNOWN),
        ("12 other.service restart running\n", StopReason.CRASH),
        ("7 nfs-server.service stop waiting\n8 nfsha.service stop running\n", StopReason.STOP),
        ("nfsha.service restart", StopReason.CRASH),
    ],
)
def test_the_queued_job_is_read(listed: str, reason: StopReason) -> None:
    assert read_jobs(listed, UNIT) is reason


def fake_systemctl(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "systemctl"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("script", "restart"),
    [
        ("echo '3 nfsha.service restart running'", True),
        ("echo '3 nfsha.service stop running'", False),
        ("true", False),
        ("echo '3 nfsha.service restart running'; exit 1", False),
        ("echo Failed to connect to bus >&2; exit 1", False),
        ("printf '\\377\\376'", False),
    ],
)
def test_only_a_restart_job_is_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, restart: bool
) -> None:
    fake_systemctl(tmp_path, monkeypatch, script)
    assert asyncio.run(stop_is_restart(UNIT)) is restart


def test_a_systemctl_that_hangs_or_is_missing_means_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd, "ASK_TIMEOUT_S", 0.2)
    fake_systemctl(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid; exec sleep 60")
    before = time.monotonic()
    assert asyncio.run(stop_is_restart(UNIT)) is False
    assert time.monotonic() - before < 5
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert asyncio.run(stop_reason(UNIT)) is StopReason.UNKNOWN


def test_the_environment_can_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NFSHA_STOP_REASON", "restart")
    assert asyncio.run(stop_is_restart(UNIT)) is True
    monkeypatch.setenv("NFSHA_STOP_REASON", "perhaps")
    assert asyncio.run(stop_is_restart(UNIT)) is False


@pytest.mark.parametrize(
    ("script", "result", "final"),
    [
        ("echo '3 nfsha.service stop running'", "success", True),
        ("echo '3 nfsha.service stop running'", "timeout", True),
        ("echo '3 nfsha.service restart running'", "success", False),
        ("true", "watchdog", False),
        ("true", "signal", False),
        ("true", "success", False),
        ("true", "", True),
        ("exit 1", "signal", True),
    ],
)
def test_the_vip_goes_on_a_final_stop_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, result: str, final: bool
) -> None:
    fake_systemctl(tmp_path, monkeypatch, script)
    assert asyncio.run(is_final_stop(UNIT, {"SERVICE_RESULT": result})) is final


def test_the_own_unit_has_a_name() -> None:
    assert own_unit().endswith(".service")

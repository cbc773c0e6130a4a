"""The verdict on the NFS service: which signs are believed when, and what counts as busy."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from pathlib import Path

import pytest

from nfsha.nfs.service import (
    Finding,
    Health,
    Judge,
    Outcome,
    Service,
    ServiceHealth,
    parse_mount_points,
)

GOOD, SLOW, BAD = Outcome.GOOD, Outcome.SLOW, Outcome.BAD


class Rounds:
    """A judge, a clock, and one round a second; a round is written as `nfs=BAD, mountd=GOOD`."""

    def __init__(self) -> None:
        self.now_ms = 50_000
        self.judge = Judge(dead_after_ms=10_000, started_ms=self.now_ms)

    def __call__(self, *, after_ms: int = 1000, **outcomes: Outcome) -> Health:
        self.now_ms += after_ms
        findings = [Finding(kind, outcome, kind) for kind, outcome in outcomes.items()]
        return self.judge.round(findings, self.now_ms)


@pytest.fixture
def rounds() -> Rounds:
    return Rounds()


def test_the_first_good_round_is_healthy(rounds: Rounds) -> None:
    assert rounds(nfs=GOOD, mountd=GOOD) == Health(ok=True)


def test_a_bad_answer_is_believed_the_second_time(rounds: Rounds) -> None:
    rounds(nfs=GOOD, mountd=GOOD)
    assert rounds(nfs=BAD, mountd=GOOD) == Health(True, (), ("nfs (not believed yet)",))
    assert rounds(nfs=BAD, mountd=GOOD) == Health(False, ("nfs",))


def test_two_bad_answers_that_are_not_in_a_row_are_two_first_signs(rounds: Rounds) -> None:
    rounds(nfs=GOOD)
    for _ in range(5):
        assert rounds(nfs=BAD).ok is True
        assert rounds(nfs=GOOD).ok is True


def test_a_bad_answer_before_and_after_a_slow_one_is_in_a_row(rounds: Rounds) -> None:
    rounds(nfs=GOOD)
    assert rounds(nfs=BAD).ok is True
    assert rounds(nfs=SLOW).ok is True
    assert rounds(nfs=BAD).ok is False


def test_two_kinds_at_once_are_believed_at_once(rounds: Rounds) -> None:
    rounds(nfs=GOOD, mountd=GOOD)
    assert rounds(nfs=BAD, mountd=BAD) == Health(False, ("nfs", "mountd"))


def test_two_findings_of_one_kind_are_one_sign() -> None:
    judge = Judge(dead_after_ms=10_000, started_ms=0)
    missing = [Finding("mounts", BAD, "/nfs/a"), Finding("mounts", BAD, "/nfs/b")]
    assert judge.round(missing, 1000).ok is None
    assert judge.round(missing, 2000) == Health(False, ("/nfs/a", "/nfs/b"), storage=False)


def test_a_busy_server_is_not_dead_until_it_was_silent_for_long(rounds: Rounds) -> None:
    rounds(nfs=GOOD)
    for _ in range(9):
        assert rounds(nfs=SLOW) == Health(True, (), ("nfs (not believed yet)",))
    assert rounds(nfs=SLOW) == Health(False, ("nfs",))  # the 10th second


def test_one_answer_within_the_time_starts_the_count_anew(rounds: Rounds) -> None:
    rounds(nfs=GOOD)
    for _ in range(3):
        for _ in range(9):
            assert rounds(nfs=SLOW).ok is True
        assert rounds(nfs=GOOD).ok is True


def test_a_pause_of_this_daemon_is_no_silence_of_the_server(rounds: Rounds) -> None:
    rounds(nfs=GOOD)
    assert rounds(nfs=SLOW, after_ms=60_000).ok is True
    assert rounds(nfs=GOOD).ok is True


def test_version4_was_not_silent_while_it_was_not_asked(rounds: Rounds) -> None:
    rounds(nfs=GOOD, version4=GOOD)
    for _ in range(8):
        rounds(nfs=SLOW)
    for _ in range(8):
        assert rounds(nfs=GOOD, version4=SLOW).ok is True


def test_before_the_first_answer_nothing_is_known(rounds: Rounds) -> None:
    assert rounds(nfs=SLOW).ok is None
    assert rounds(nfs=BAD).ok is None
    assert rounds(nfs=BAD).ok is False


def test_back_to_healthy_takes_two_good_rounds(rounds: Rounds) -> None:
    rounds(nfs=BAD)
    rounds(nfs=BAD)
    assert rounds(nfs=GOOD) == Health(False, ("nfs",))
    assert rounds(nfs=BAD).ok is False
    assert rounds(nfs=GOOD).ok is False
    assert rounds(nfs=SLOW).ok is False
    assert rounds(nfs=GOOD).ok is False
    assert rounds(nfs=GOOD) == Health(True)


def test_mount_points_are_read_with_their_escapes() -> None:
    table = (
        b"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        b"36 22 253:0 / /nfs/web\\040data\\011\\134\\012 rw shared:9 - xfs /dev/mapper/a rw\n"
        b"37 22 253:1 / /nfs/caf\xc3\xa9 rw - xfs /dev/mapper/b rw\n"
        b"torn\n"
    )
    assert parse_mount_points(table) == {b"/", b"/nfs/web data\t\\\n", "/nfs/café".encode()}


async def _says_to_version4(*tail: int) -> Health:
    """The verdict of two rounds on a server that answers v3, and this to v4 (RFC 5531, 9)."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                call = struct.unpack(">11I", await reader.readexactly(44))
                said = (0,) if call[5] == 3 else tail
                body = struct.pack(f">{5 + len(said)}I", call[1], 1, 0, 0, 0, *said)
                writer.write(struct.pack(">I", 1 << 31 | len(body)) + body)
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    health = ServiceHealth(Service("127.0.0.1", port, None), clock_ms=lambda: 0)
    await health.check()
    verdict = await health.check()
    health.close()
    listening.close()
    await asyncio.sleep(0.01)
    return Health(verdict.ok, tuple(sign.partition(f":{port}")[2] for sign in verdict.signs))


@pytest.mark.parametrize(
    ("tail", "health"),
    [
        ((2, 3, 3), Health(ok=True)),
        ((2, 2, 3), Health(ok=True)),
        ((2, 3, 4), Health(False, (": version not supported (the server has 3 to 4)",))),
        ((5,), Health(False, (": the server says: system error",))),
        ((0,), Health(False, (" speaks v4, switch it off",))),
    ],
)
def test_a_server_is_fit_only_if_its_own_words_prove_that_v4_is_off(
    tail: tuple[int, ...], health: Health
) -> None:
    assert asyncio.run(_says_to_version4(*tail)) == health


def test_mounts_are_looked_at_only_while_they_are_wanted() -> None:
    async def main() -> list[tuple[str, ...]]:
        wanted = False
        service = Service("127.0.0.1", nfs_port=1, mountd_port=None, mounts=(Path("/nowhere"),))
        health = ServiceHealth(service, clock_ms=lambda: 0, wants_mounts=lambda: wanted)
        signs = []
        for wanted in (False, False, True, True):  # noqa: B007 - by the closure
            signs.append((await health.check()).signs)
        health.close()
        return signs

    refused, gone = "NFS v3 at 127.0.0.1:1: connection refused", "nothing is mounted at /nowhere"
    assert asyncio.run(main()) == [(), (refused,), (refused, gone), (refused, gone)]


def test_a_missing_mount_and_a_refused_port_are_said_in_words() -> None:
    async def main() -> tuple[Health, list[Health]]:
        gone = Path("/nonexistent/volume")
        service = Service("127.0.0.1", nfs_port=1, mountd_port=None, mounts=(Path("/"), gone))
        health = ServiceHealth(service, clock_ms=lambda: 0)
        first = await health.check()
        reports: list[Health] = []
        task = asyncio.create_task(health.run(reports.append))
        await asyncio.sleep(0.7)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return first, reports

    first, reports = asyncio.run(main())
    signs = (
        "NFS v3 at 127.0.0.1:1: connection refused",
        "nothing is mounted at /nonexistent/volume",
    )
    assert first == Health(False, signs, storage=False)
    assert reports == [first]  # one verdict, told once

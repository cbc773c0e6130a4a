"""Is this node's own NFS service there, version 3 only, with its volumes mounted?

It asks, judges and reports; it never starts, stops or repairs anything. A busy server is not a dead
one:

- A *bad* answer (refused, closed, another program, garbage, v4 switched on, a volume that is not
  mounted) is believed when it comes in two rounds in a row, or together with a bad answer of
  another kind (nfs, mountd, version4, mounts) in the same round.
- *No* answer in time is what a busy server gives, so it counts only once nothing of that kind came
  for `dead_after_ms`. It is not hurried by more frequent questions either.
- Back to healthy takes two good rounds in a row (the first verdict after the start: one).
"""

from __future__ import annotations

import asyncio
import enum
import os
import re
import select
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nfsha.nfs.rpc import (
    MOUNT_PROGRAM,
    NFS_PROGRAM,
    Answered,
    RpcConnection,
    RpcResult,
    TimedOut,
)
from nfsha.nfs.v3_fence import Version4, version4

HURRY_MS = 250
SIGNS_NEEDED = 2
MOUNTINFO = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class Health:
    """The verdict. `ok` is None until the first one: not known yet.

    `signs` say why it is not ok; `warnings` are what an operator should know while it is.
    """

    ok: bool | None
    signs: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    storage: bool = True
    """In the last round, all volumes were mounted."""


class Outcome(enum.Enum):
    """What one question of a round brought."""

    GOOD = "good"
    SLOW = "slow"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """One question's outcome. Findings of one kind (nfs, mountd, ..) count as one sign."""

    kind: str
    outcome: Outcome
    words: str


class Judge:
    """Turns the findings of each round into a verdict. Pure: it reads no clock and does no I/O."""

    def __init__(self, *, dead_after_ms: int, started_ms: int) -> None:
        self._dead_after_ms = dead_after_ms
        self._last_round_ms = started_ms
        self._silent_since_ms: dict[str, int] = {}
        self._bad_rounds: Counter[str] = Counter()
        self._good_rounds = 0
        self._ok: bool | None = None
        self._signs: tuple[str, ...] = ()

    def round(
        self, findings: Sequence[Finding], now_ms: int, warnings: Iterable[str] = ()
    ) -> Health:
        """Takes the findings of one whole round and returns the verdict."""
        believed = self._believed_kinds(findings, now_ms)
        signs = tuple(
            finding.words
            for finding in findings
            if finding.outcome is not Outcome.GOOD and finding.kind in believed
        )
        doubts = tuple(
            finding.words
            for finding in findings
            if finding.outcome is not Outcome.GOOD and finding.kind not in believed
        )
        self._good_rounds = 0 if signs or doubts else self._good_rounds + 1
        if signs:
            self._ok, self._signs = False, signs
        elif self._good_rounds >= (SIGNS_NEEDED if self._ok is False else 1):
            self._ok, self._signs = True, ()
        return Health(
            self._ok,
            self._signs,
            (*warnings, *(f"{word} (not believed yet)" for word in doubts)),
            all(one.outcome is Outcome.GOOD for one in findings if one.kind == "mounts"),
        )

    def _believed_kinds(self, findings: Sequence[Finding], now_ms: int) -> set[str]:
        bad = {finding.kind for finding in findings if finding.outcome is Outcome.BAD}
        slow = {finding.kind for finding in findings if finding.outcome is Outcome.SLOW}
        for kind in {finding.kind for finding in findings} - slow:
            self._bad_rounds[kind] = self._bad_rounds[kind] + 1 if kind in bad else 0
        before = self._silent_since_ms
        self._silent_since_ms = {kind: before.get(kind, self._last_round_ms) for kind in slow}
        self._last_round_ms = now_ms
        # Two rounds at least: the first one after a pause of this daemon proves nothing.
        dead_since_ms = now_ms - self._dead_after_ms
        silent = {kind for kind in slow if before.get(kind, now_ms) <= dead_since_ms}
        if len(bad) < SIGNS_NEEDED:
            bad = {kind for kind in bad if self._bad_rounds[kind] >= SIGNS_NEEDED}
        return bad | silent


class MountTable:
    """The mount points of this mount namespace, read again only when the kernel says they changed.

    The kernel marks the file by POLLERR and POLLPRI on a change (proc(5)).
    """

    def __init__(self, path: Path = MOUNTINFO) -> None:
        self._file = path.open("rb")
        self._poll = select.poll()
        self._poll.register(self._file, select.POLLERR | select.POLLPRI)
        self._points = self._read()

    def missing(self, wanted: Iterable[Path]) -> list[Path]:
        """Returns those of the wanted paths at which nothing is mounted. Raises OSError."""
        if self._poll.poll(0):
            self._points = self._read()
        return [path for path in wanted if os.fsencode(path) not in self._points]

    def close(self) -> None:
        """Closes the file. Idempotent."""
        self._file.close()

    def _read(self) -> frozenset[bytes]:
        self._file.seek(0)
        return parse_mount_points(self._file.read())


def parse_mount_points(mountinfo: bytes) -> frozenset[bytes]:
    """Returns field 5 of each line of a mountinfo file, its octal escapes undone (proc(5))."""
    points = (line.split(b" ", 5)[4] for line in mountinfo.splitlines() if line.count(b" ") > 4)
    return frozenset(
        re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8) & 0xFF]), point)
        for point in points
    )


@dataclass(frozen=True, slots=True)
class Service:
    """What to ask. `mountd_port` None: mountd is not asked."""

    host: str
    nfs_port: int = 2049
    mountd_port: int | None = 20048
    mounts: tuple[Path, ...] = ()


class ServiceHealth:
    """Asks the NFS service again and again, and reports what it finds.

    `refuse_version4` False: a server that speaks v4 is a warning only. `clock_ms` gives
    CLOCK_BOOTTIME. `wants_mounts` says whether the volumes have to be mounted at this moment.
    Raises OSError where /proc is not mounted.
    """

    def __init__(
        self,
        service: Service,
        *,
        clock_ms: Callable[[], int],
        refuse_version4: bool = True,
        every_ms: int = 1000,
        timeout_ms: int = 3000,
        dead_after_ms: int = 10_000,
        wants_mounts: Callable[[], bool] = lambda: True,
    ) -> None:
        self._wants_mounts = wants_mounts
        self._clock_ms = clock_ms
        self._nfs = RpcConnection(service.host, service.nfs_port)
        mountd_port = service.mountd_port
        self._mountd = None if mountd_port is None else RpcConnection(service.host, mountd_port)
        self._mounts = service.mounts
        self._table = MountTable()
        self._refuse_version4 = refuse_version4
        self._every_ms = every_ms
        self._timeout_ms = timeout_ms
        self._judge = Judge(dead_after_ms=dead_after_ms, started_ms=clock_ms())

    async def check(self) -> Health:
        """Runs one round and returns the verdict; takes at most twice the time limit."""
        return self._judged(await self._ask())

    async def run(self, report: Callable[[Health], None]) -> None:
        """Checks at once and then every `every_ms`, until cancelled; reports each changed verdict.

        While a bad answer is in doubt, or the service is not healthy, it asks every 250 ms.
        """
        told: Health | None = None
        try:
            while True:
                findings = await self._ask()
                health = self._judged(findings)
                if health != told:
                    told = health
                    report(health)
                await asyncio.sleep(self._pause_ms(health, findings) / 1000)
        finally:
            self.close()

    def close(self) -> None:
        """Drops the connections. Idempotent; no check after it."""
        self._nfs.close()
        if self._mountd is not None:
            self._mountd.close()
        self._table.close()

    def _pause_ms(self, health: Health, findings: Sequence[Finding]) -> int:
        outcomes = {finding.outcome for finding in findings}
        doubtful = Outcome.BAD in outcomes or health.ok is not True
        if doubtful and Outcome.SLOW not in outcomes:
            return min(HURRY_MS, self._every_ms)
        return self._every_ms

    def _judged(self, findings: Sequence[Finding]) -> Health:
        counted = [finding for finding in findings if self._counts(finding)]
        warnings = [finding.words for finding in findings if not self._counts(finding)]
        return self._judge.round(counted, self._clock_ms(), warnings)

    def _counts(self, finding: Finding) -> bool:
        good = finding.outcome is Outcome.GOOD
        return good or finding.kind != "version4" or self._refuse_version4

    async def _ask(self) -> list[Finding]:
        nfs, mountd = await asyncio.gather(self._ask_nfs(), self._ask_mountd())
        return [*nfs, *mountd, *self._look_at_mounts()]

    async def _ask_nfs(self) -> list[Finding]:
        result = await self._nfs.null_call(NFS_PROGRAM, 3, timeout_ms=self._timeout_ms)
        version3 = _finding("nfs", f"NFS v3 at {_where(self._nfs)}", result, Answered)
        if version3.outcome is not Outcome.GOOD:
            return [version3]  # one trouble is one sign: version 4 would only say it again
        result = await self._nfs.null_call(NFS_PROGRAM, 4, timeout_ms=self._timeout_ms)
        return [version3, _version4_finding(_where(self._nfs), result)]

    async def _ask_mountd(self) -> list[Finding]:
        if self._mountd is None:
            return []
        result = await self._mountd.null_call(MOUNT_PROGRAM, 3, timeout_ms=self._timeout_ms)
        return [_finding("mountd", f"mountd v3 at {_where(self._mountd)}", result, Answered)]

    def _look_at_mounts(self) -> list[Finding]:
        missing = self._table.missing(self._mounts)
        if not missing or not self._wants_mounts():
            return [Finding("mounts", Outcome.GOOD, "mounted")]
        return [Finding("mounts", Outcome.BAD, f"nothing is mounted at {path}") for path in missing]


def _version4_finding(where: str, result: RpcResult) -> Finding:
    match version4(result):
        case Version4.REFUSED:
            return Finding("version4", Outcome.GOOD, f"NFS v4 at {where}: refused")
        case Version4.SPOKEN:
            words = f"version4-on: the NFS server at {where} speaks v4, switch it off"
            return Finding("version4", Outcome.BAD, words)
        case Version4.UNPROVED:
            outcome = Outcome.SLOW if isinstance(result, TimedOut) else Outcome.BAD
            words = f"the proof that NFS v4 is off at {where}: {result}"
            return Finding("version4", outcome, words)


def _finding(kind: str, what: str, result: RpcResult, wanted: type[RpcResult]) -> Finding:
    if isinstance(result, wanted):
        return Finding(kind, Outcome.GOOD, f"{what}: ok")
    outcome = Outcome.SLOW if isinstance(result, TimedOut) else Outcome.BAD
    return Finding(kind, outcome, f"{what}: {result}")


def _where(connection: RpcConnection) -> str:
    host = f"[{connection.host}]" if ":" in connection.host else connection.host
    return f"{host}:{connection.port}"

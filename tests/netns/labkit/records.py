"""The owner's side of the record writer: starts it in place c, and turns its lines into figures."""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import dataclass
from itertools import pairwise

from tests.netns.labkit import kernel
from tests.netns.labkit.network import VIP
from tests.netns.labkit.nfs_client import Attempt
from tests.netns.labkit.place import LabError, Place, Process

_MODULE = "tests.netns.labkit.nfs_client"


@dataclass(frozen=True)
class Records:
    """What became of each record, in order."""

    attempts: tuple[Attempt, ...]

    @property
    def acked(self) -> tuple[int, ...]:
        """Numbers of the records that the server has made stable."""
        return tuple(one.number for one in self.attempts if one.error is None)

    @property
    def failed(self) -> tuple[Attempt, ...]:
        """Operations that ended with an error, or still waited when the writer was stopped."""
        return tuple(one for one in self.attempts if one.error is not None)

    @property
    def longest_stall_ms(self) -> float:
        """The longest wait for one whole operation (open to close), however it ended."""
        return max((one.took_ms for one in self.attempts), default=0.0)

    @property
    def longest_gap_ms(self) -> float:
        """The longest time from one acknowledgement to the next; at least the writer's interval."""
        ends = [one.ended_ns for one in self.attempts if one.error is None]
        return max((later - earlier for earlier, later in pairwise(ends)), default=0) / 1e6

    def since(self, start_ns: int) -> Records:
        """Only those sent at or after a time (CLOCK_BOOTTIME)."""
        return Records(tuple(one for one in self.attempts if one.sent_ns >= start_ns))


class RecordWriter:
    """Writes numbered records through the VIP, by path, until stopped."""

    def __init__(
        self,
        place: Place,
        *,
        server: str = VIP,
        export: str = "/nfs/data",
        path: str = "/records",
        interval_ms: float = 20.0,
        cap_s: float = 30.0,
        first: int = 1,
    ) -> None:
        self._cap_s = cap_s
        self._lines = place.logs / f"records-{kernel.now_ns()}.jsonl"
        argv = [
            sys.executable,
            "-m",
            _MODULE,
            "write",
            "--server",
            server,
            "--export",
            export,
            "--path",
            path,
            "--interval-ms",
            str(interval_ms),
            "--cap-s",
            str(cap_s),
            "--first",
            str(first),
        ]
        self._process: Process = place.spawn(argv, name=self._lines.stem)
        self._process.log.rename(self._lines)
        self._process.log = self._lines
        self._read_to = 0
        self._known: list[Attempt] = []

    def so_far(self) -> Records:
        """The records whose fate is known by now."""
        with self._lines.open("rb") as file:
            file.seek(self._read_to)
            for line in file:
                if not line.endswith(b"\n"):  # being written
                    break
                self._read_to += len(line)
                if line.startswith(b"{"):
                    self._known.append(Attempt(**json.loads(line)))
        return Records(tuple(self._known))

    def wait_acked(self, count: int, timeout_s: float = 30.0) -> Records:
        """Waits for so many more acknowledged records than now. Raises LabError after timeout_s."""
        goal = len(self.so_far().acked) + count
        deadline = time.monotonic() + timeout_s
        while len((records := self.so_far()).acked) < goal:
            if time.monotonic() > deadline or not self._process.alive:
                raise LabError(
                    f"{len(records.acked)} of {goal} records acknowledged\n{self._process.tail(5)}"
                )
            time.sleep(0.01)
        return records

    def stop(self) -> Records:
        """Ends the writer (a waiting operation gets one more second) and returns everything."""
        if self._process.alive:
            self._process.signal(signal.SIGTERM)
            self._process.wait(self._cap_s + 5.0)
        return self.so_far()


def read_records(
    place: Place,
    *,
    server: str = VIP,
    export: str = "/nfs/data",
    path: str = "/records",
    cap_s: float = 10.0,
) -> dict[int, int]:
    """Reads the records back on a new connection: number to sent_ns. Raises LabError."""
    argv = [
        sys.executable,
        "-m",
        _MODULE,
        "read",
        "--server",
        server,
        "--export",
        export,
        "--path",
        path,
        "--cap-s",
        str(cap_s),
    ]
    found: list[tuple[int, int]] = json.loads(place.run(*argv, timeout_s=4 * cap_s).stdout)
    return dict(found)

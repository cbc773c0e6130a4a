"""One trial: a fresh lab, one contestant, one fault, one sample. A process of its own.

    python -m bench.trial CONTESTANT FAULT

It says `ready` when clients work, strikes when its standard input says `go`, answers with one line
of JSON, and takes its lab down when its standard input ends. `bench.failover` drives several at
once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from bench import contestants, faults
from bench.contestants import ADDRESS, Contestant, Kind
from bench.faults import Fault, Times
from bench.measure import Gap, answers_overlap_ms, longest_gap
from tests.netns.lab import Lab
from tests.netns.labkit.observe import Observations
from tests.netns.labkit.place import LabError
from tests.netns.labkit.prober import Probes
from tests.netns.labkit.records import Records, RecordWriter

STEADY_S = 1.0
"""Clients work for so long before the fault."""
BEFORE_NS = 500_000_000
"""The window of outages begins so long before the fault: the last success is in it."""
RECOVERY_S = 12.0
"""How long the clients may need after the watch until a write succeeds again (TCP backs off)."""
_WORKS_NS = 300_000_000
_FAILED_MAX = 100


@dataclass(frozen=True)
class Sample:
    """What one trial showed. Lengths in ms; times in ms after the fault.

    overlap_addresses_ms: two nodes had the VIP (netlink). overlap_answers_ms: both answered NFS
    with new bytes; overlap_frames_ms: the same, TCP's repetitions included. recovered: writes
    worked at the end. failed_operations: sent, ended, error of writes that did not succeed.
    """

    contestant: str
    fault: str
    outage_null_ms: float
    outage_nfs_ms: float
    overlap_addresses_ms: float
    overlap_answers_ms: float
    overlap_frames_ms: float
    holders_at_end: tuple[str, ...]
    recovered: bool
    failed_operations: tuple[tuple[float, float, str], ...]
    worst_tick_ms: float
    struck_at_boottime_ns: int
    healed_after_ms: float | None
    watched_ms: float
    outage_null: tuple[float, float]
    outage_nfs: tuple[float, float]
    holds: tuple[tuple[str, float, float], ...]
    answers: tuple[tuple[str, float, float], ...]
    moves: tuple[tuple[str, float, str, str, str], ...]

    @staticmethod
    def load(facts: dict[str, Any]) -> Sample:
        """From JSON, which knows lists only. Raises TypeError when facts are missing or unknown."""
        shaped: dict[str, Any] = {key: _tuples(value) for key, value in facts.items()}
        return Sample(**shaped)


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contestant", choices=contestants.BY_NAME)
    parser.add_argument("fault", choices=faults.BY_NAME)
    options = parser.parse_args()
    kind, fault = contestants.BY_NAME[options.contestant], faults.BY_NAME[options.fault]
    try:
        with Lab() as lab:
            contestant = kind.make(lab)
            _run(kind, fault, contestant)
            sys.stdin.read()  # until all other trials of this round have their figures
    except (LabError, BrokenPipeError) as error:
        raise SystemExit(f"{kind.name}, {fault.name}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _run(kind: Kind, fault: Fault, contestant: Contestant) -> None:
    contestant.settle()
    writer = contestant.lab.write_records()
    prober = contestant.lab.probe()
    prober.wait_success()
    writer.wait_acked(20)
    time.sleep(STEADY_S)
    print("ready", flush=True)
    if sys.stdin.readline().strip() != "go":
        raise LabError("nobody waits for the sample any more")
    times = faults.carry_out(fault, contestant)
    recovered = _wait_until_writes_work(contestant.lab, writer)
    end_ns = contestant.lab.now_ns()
    probes, records = prober.stop(), writer.stop()
    sample = _sample(kind, fault, contestant, times, probes, records, recovered, end_ns)
    told = {"sample": asdict(sample), "configurations": contestant.configurations()}
    print(json.dumps(told), flush=True)


def _wait_until_writes_work(lab: Lab, writer: RecordWriter) -> bool:
    deadline_ns = lab.now_ns() + int(RECOVERY_S * 1e9)
    while (now_ns := lab.now_ns()) < deadline_ns:
        attempts = writer.so_far().attempts
        if any(one.error is None and one.ended_ns > now_ns - _WORKS_NS for one in attempts[-20:]):
            return True
        time.sleep(0.02)
    return False


def _sample(
    kind: Kind,
    fault: Fault,
    contestant: Contestant,
    times: Times,
    probes: Probes,
    records: Records,
    recovered: bool,
    end_ns: int,
) -> Sample:
    seen = contestant.lab.look()
    seen.require_complete()
    struck_ns = times.struck_ns

    def after_ms(time_ns: int) -> float:
        return round((time_ns - struck_ns) / 1e6, 3)

    def around(gap: Gap) -> tuple[float, float]:
        return after_ms(gap.start_ns), after_ms(gap.end_ns)

    start_ns = struck_ns - BEFORE_NS
    null = longest_gap((done for _, done in probes.successes), start_ns, end_ns)
    acked = (one.ended_ns for one in records.attempts if one.error is None)
    nfs = longest_gap(acked, start_ns, end_ns)
    replies = seen.replies(ADDRESS, struck_ns, times.watched_ns)
    return Sample(
        contestant=kind.name,
        fault=fault.name,
        outage_null_ms=round(null.ms, 3),
        outage_nfs_ms=round(nfs.ms, 3),
        overlap_addresses_ms=seen.address_overlap_ms(ADDRESS, struck_ns, times.watched_ns),
        overlap_answers_ms=answers_overlap_ms(replies, times.windows(), with_repeats=False),
        overlap_frames_ms=answers_overlap_ms(replies, times.windows(), with_repeats=True),
        holders_at_end=tuple(sorted(_holders(seen, times.watched_ns))),
        recovered=recovered,
        failed_operations=tuple(
            (after_ms(one.sent_ns), after_ms(one.ended_ns), one.error or "")
            for one in records.since(start_ns).failed[:_FAILED_MAX]
        ),
        worst_tick_ms=round(probes.worst_tick_ms, 3),
        struck_at_boottime_ns=struck_ns,
        healed_after_ms=None if times.healed_ns is None else after_ms(times.healed_ns),
        watched_ms=after_ms(times.watched_ns),
        outage_null=around(null),
        outage_nfs=around(nfs),
        holds=tuple(
            (one.node, after_ms(one.start_ns), after_ms(one.end_ns)) for one in seen.holds(ADDRESS)
        ),
        answers=tuple(
            (node, after_ms(span[0]), after_ms(span[1]))
            for node in ("a", "b")
            if (span := seen.reply_span(ADDRESS, node, start_ns, end_ns)) is not None
        ),
        moves=tuple(
            (one.node, after_ms(one.at_ns), one.row, one.phase, one.to)
            for one in contestant.moves(struck_ns)
        ),
    )


def _holders(seen: Observations, at_ns: int) -> set[str]:
    return {one.node for one in seen.holds(ADDRESS) if one.start_ns <= at_ns <= one.end_ns}


if __name__ == "__main__":
    main()

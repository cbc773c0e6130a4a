"""`make demo`: a pair of servers in namespaces, a power cut, and what both nodes made of it.

It tells only what it has seen: decisions from the event logs of the daemons, addresses from the
kernel's events, answers from the frames at the switch, equal trees from a walk that is no rsync.
What the summary claims is checked first (`untrue`): a demo that is not so ends with exit code 1 and
says what was not.

Exit codes: 0 all was so; 1 something was not, or the lab could not be built; 130 after ^C.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

from tests.netns.copies import Copies
from tests.netns.lab import Lab, require_root
from tests.netns.labkit import registry
from tests.netns.labkit.network import PLACES, VIP
from tests.netns.labkit.nfs_client import RECORD_BYTES
from tests.netns.labkit.observe import Observations
from tests.netns.labkit.place import LabError
from tests.netns.labkit.prober import NullProber
from tests.netns.labkit.records import Records, RecordWriter
from tests.netns.pair import Event
from tests.netns.treewalk import make_odd_tree

WIDTH = 79
NAMES = {"a": "primary", "b": "standby"}
PORTS = (2049, 20048)
RECORDS = 100
"""So many acknowledged records are waited for before and after each act."""

_INTERVAL_MS = 10
_VOLUME_MIB = 512
"""Smaller ones get blocks of 1 KiB from mkfs, too small for the extended attributes."""
_PATIENCE_S = 30.0
_SILENCE_S = 1.0
"""A port that neither answers nor refuses for so long is closed silently."""
_LEFT_S = 5.0
_WINDOW = re.compile(r"takeover: (volume data: writes of the last ([0-9.]+) s may be missing.*)")
_ROUNDED_MS = 50
"""The log rounds the window to tenths of a second."""


# --------------------------------------------------------------------------- what is claimed


@dataclass(frozen=True)
class Copied:
    """What a pass did, and how the two volumes compared after it."""

    entries: int
    size_bytes: int
    took_ms: int
    differs: tuple[str, ...]


@dataclass(frozen=True)
class Home:
    """What the guarded way home did, and what the client saw of it."""

    code: int
    """The exit code of `nfsha failback`."""
    stall_ms: float
    acknowledged: frozenset[int]
    """Records acknowledged before, while and after the service moved."""
    read_back: frozenset[int]
    """What a new connection through the VIP found at the end."""
    on_both: frozenset[int]
    """What lies on both disks at the end."""
    stale: int
    """Writes whose file was open when the service moved, and that failed."""
    failed: int
    """Writes that failed in any other way."""
    holder_overlap_ms: float
    holders: frozenset[str]
    differs: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What was measured. Times are milliseconds after the power cut."""

    home: Home
    first: Copied
    """The standby's first pass."""
    decided_ms: int
    served_ms: int
    first_answer_ms: float
    outage_ms: float
    stall_ms: float
    holder_overlap_ms: float
    answer_overlap_ms: float
    by_primary: frozenset[int]
    """Records that the primary had acknowledged before the power cut."""
    before_window: frozenset[int]
    """Of these, what was acknowledged before the window of the standby's log began."""
    window_ms: int
    """The newest writes that may be missing, as the standby's log said at the takeover."""
    by_standby: frozenset[int]
    """Records that the standby has acknowledged since."""
    read_back: frozenset[int]
    """What a new connection through the VIP found at the end."""
    on_primary_disk: frozenset[int]
    """What lay on the old primary's own disk when it had booted."""
    quarantined: frozenset[int]
    """What is in its quarantine since its resync."""
    resync_ms: int
    """Time from RETURNED to PASSIVE."""
    differs: tuple[str, ...]
    """What differs between the two volumes at the end."""
    stale: int
    """Writes that were under way at the power cut and failed."""
    failed: int
    """Writes that failed in any other way, or at any other time."""
    return_stall_ms: float
    """The client's longest wait while the old primary came back."""
    holders: frozenset[str]
    """Who has the VIP at the end."""
    returned_by: tuple[str, ...]
    """The phases that the old primary went through after its boot."""
    touched: tuple[str, ...]
    """What the old primary did with the VIP after its boot, in words."""
    open_ports: tuple[int, ...]
    """Ports of the old primary's own address that answered or refused the client."""


CLAIMS: tuple[tuple[Callable[[Outcome], bool], str], ...] = (
    (lambda o: not o.first.differs, "the first pass left the two volumes unequal"),
    (
        lambda o: 0 < o.decided_ms <= o.served_ms <= o.first_answer_ms,
        "the standby decided, served and answered out of order",
    ),
    (lambda o: o.holder_overlap_ms == 0.0, "two nodes held the VIP at once"),
    (lambda o: o.answer_overlap_ms == 0.0, "the old node answered after the new one had begun"),
    (
        lambda o: len(o.before_window) >= RECORDS,
        "too few records were acknowledged before the window of the log",
    ),
    (
        lambda o: o.before_window <= o.read_back,
        "records from before the window of the log are missing on the standby",
    ),
    (lambda o: len(o.by_standby) >= 2 * RECORDS, "the standby acknowledged too few records"),
    (
        lambda o: o.by_standby <= o.read_back,
        "records that the standby had acknowledged were not there to be read",
    ),
    (
        lambda o: o.by_primary <= o.on_primary_disk,
        "records that the primary had acknowledged are not on its disk",
    ),
    (
        lambda o: o.by_primary <= o.read_back | o.quarantined,
        "acknowledged records are neither on the standby nor in the old primary's quarantine",
    ),
    (lambda o: not o.differs, "at the end the two volumes are not equal"),
    (lambda o: o.stale <= 1, "more writes failed at the move than the one that was under way"),
    (lambda o: o.failed == 0, "writes of the client failed"),
    (lambda o: o.holders == {"standby"}, "at the end the standby is not the one holder of the VIP"),
    (
        lambda o: "RETURNED" in o.returned_by and o.returned_by[-1] == "PASSIVE",
        "the old primary did not become RETURNED and then PASSIVE",
    ),
    (lambda o: not o.touched, "the old primary touched the VIP after its boot"),
    (lambda o: not o.open_ports, "the old primary's NFS ports were not closed silently"),
    (lambda o: o.home.code == 0, "the failback did not end well"),
    (
        lambda o: len(o.home.acknowledged) >= 2 * RECORDS,
        "too few records were acknowledged while the service went home",
    ),
    (
        lambda o: o.home.acknowledged <= o.home.read_back,
        "records acknowledged while the service went home were not there to be read",
    ),
    (
        lambda o: o.home.acknowledged <= o.home.on_both,
        "records acknowledged while the service went home are not on both disks",
    ),
    (lambda o: o.home.stale <= 1, "more writes failed at the failback than the one under way"),
    (lambda o: o.home.failed == 0, "writes of the client failed at the failback"),
    (lambda o: o.home.holder_overlap_ms == 0.0, "two nodes held the VIP at the failback"),
    (lambda o: o.home.holders == {"primary"}, "after the failback the primary has not the VIP"),
    (lambda o: not o.home.differs, "after the failback the two volumes are not equal"),
)


def untrue(outcome: Outcome) -> list[str]:
    """The claims of the demo that this outcome does not bear out; empty: all is so."""
    return [sentence for holds, sentence in CLAIMS if not holds(outcome)]


def summary(o: Outcome) -> list[tuple[str, str]]:
    """The closing table: what, and how it was."""
    in_window = o.by_primary - o.before_window
    missing = o.by_primary - o.read_back
    return [
        (f"first pass of the standby ({_amount(o.first)})", f"{o.first.took_ms} ms"),
        ("takeover decided after the power cut", f"{o.decided_ms} ms"),
        ("from the decision to the first NFS answer", f"{o.first_answer_ms - o.decided_ms:.0f} ms"),
        ("outage for new connections (RPC NULL each 5 ms)", f"{o.outage_ms:.0f} ms"),
        ("longest stall of the client, at the power cut", f"{o.stall_ms:.0f} ms"),
        ("longest stall while the old primary came back", f"{o.return_stall_ms:.0f} ms"),
        ("time in which two nodes held the VIP", f"{o.holder_overlap_ms:.1f} ms"),
        ("time in which two nodes answered NFS for it", f"{o.answer_overlap_ms:.1f} ms"),
        ("window of writes that may be missing, by the standby's log", f"{o.window_ms} ms"),
        ("records acknowledged before it / on the standby", _part(o.before_window, o.read_back)),
        ("records acknowledged in it / on the standby", _part(in_window, o.read_back)),
        ("    missing there / in the old primary's quarantine", _part(missing, o.quarantined)),
        ("records acknowledged by the standby / read back", _part(o.by_standby, o.read_back)),
        ("writes under way at the power cut that failed", f"{o.stale}"),
        ("the old primary, from RETURNED to PASSIVE", f"{o.resync_ms} ms"),
        ("the old primary at the end, its ports closed", o.returned_by[-1]),
        ("differences between the two volumes then", f"{len(o.differs)}"),
        ("longest stall of the client in the failback", f"{o.home.stall_ms:.0f} ms"),
        (
            "records acknowledged meanwhile / read back",
            _part(o.home.acknowledged, o.home.read_back),
        ),
        ("    of them on both nodes' disks", _part(o.home.acknowledged, o.home.on_both)),
        ("differences between the two volumes at the end", f"{len(o.home.differs)}"),
    ]


def _part(records: frozenset[int], found: frozenset[int]) -> str:
    return f"{len(records)} / {len(records & found)}"


def _amount(copied: Copied) -> str:
    return f"{copied.entries:,} entries, {copied.size_bytes / 1e6:.0f} MB"


# --------------------------------------------------------------------------- how it is told


class Paper:
    """Plain text in 80 columns; a little weight and colour where a person looks on."""

    def __init__(self, colour: bool) -> None:
        self._colour = colour

    def _styled(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour and text else text

    def line(self, text: str = "") -> None:
        """One line as it is."""
        print(text, flush=True)

    def heading(self, text: str) -> None:
        """Begins an act."""
        self.line()
        self.line(self._styled("1", text))

    def text(self, text: str) -> None:
        """A paragraph, wrapped."""
        self.line(textwrap.fill(" ".join(text.split()), WIDTH))

    def block(self, text: str, hang: int = 0) -> None:
        """What a file or a command says, set off; the rest of a long line hangs so far in."""
        for one in text.splitlines():
            indent = " " * max(4 + hang, 4 + len(one) - len(one.lstrip()))
            wrapped = textwrap.fill(f"    {one}", WIDTH, subsequent_indent=indent)
            self.line(wrapped.rstrip())

    def moment(self, at_ms: float, who: str, text: str, row: str = "") -> None:
        """Something that happened: when, who, what."""
        first, *rest = textwrap.wrap(f"{row} {text}".strip(), WIDTH - 22)
        if row:
            first = self._styled("1", row) + first[len(row) :]
        when = self._styled("2", f"{at_ms:7.0f} ms")
        self.line(f"{when}  {who:<8}  {first}")
        for one in rest:
            self.line(" " * 22 + one)

    def result(self, what: str, how: str) -> None:
        """One row of the summary."""
        self.line(f"  {what:<58}{self._styled('1', f'{how:>14}')}")

    def good(self, text: str) -> None:
        """The verdict, when all was so."""
        self.line(self._styled("32", text))

    def bad(self, text: str) -> None:
        """What was not so; to standard error."""
        print(self._styled("31", textwrap.fill(text, WIDTH)), file=sys.stderr, flush=True)


class Teller:
    """Follows the decisions of both daemons and tells each as it happens."""

    def __init__(self, pair: Copies, paper: Paper) -> None:
        self._pair = pair
        self._paper = paper
        self._told = {"a": 0, "b": 0}
        self.zero_ms = pair.now_ms()

    def begin(self, zero_ms: int) -> None:
        """From now on times count from here."""
        self.zero_ms = zero_ms

    def until(self, done: Callable[[], bool], what: str, *, stays: bool) -> None:
        """Tells decisions until done; stays: also those that change no phase. Raises LabError."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            finished = done()
            self._tell(stays)
            if finished:
                return
            if time.monotonic() > deadline:
                raise LabError(f"{what} did not happen within {_PATIENCE_S:.0f} s{self._ended()}")
            time.sleep(0.01)

    def _ended(self) -> str:
        """The last words of daemons that do not run, for a message."""
        nodes = [self._pair.lab.node(name) for name in NAMES]
        return "".join(
            f"\nthe daemon of the {NAMES[node.name]} has ended:\n{node.daemon.tail(5)}"
            for node in nodes
            if node.daemon is not None and not node.daemon.alive
        )

    def _tell(self, stays: bool) -> None:
        fresh = []
        for name, told in self._told.items():
            events = self._pair.events(name)
            self._told[name] = len(events)
            fresh += [(event, name) for event in events[told:]]
        for event, name in sorted(fresh, key=lambda one: one[0].at_ms):
            if event.phase != event.to or (stays and event.row not in _AT_REST):
                self._paper.moment(
                    event.at_ms - self.zero_ms, NAMES[name], _words(event), event.row
                )


_AT_REST = ("A90", "P90")
"""Rows that say no more than the change of phase before them."""


def _words(event: Event) -> str:
    if event.phase == event.to:
        return f"{event.phase}: {event.why}"
    return f"{event.phase} -> {event.to}: {event.why}"


# --------------------------------------------------------------------------- the play


def config(role: str) -> str:
    """The configuration of a node: five settings, and passes that come quickly."""
    here, there = ("a", "b") if role == "primary" else ("b", "a")
    pairs = zip(PLACES[here].all(), PLACES[there].all(), strict=True)
    links = "".join(f'    {{ local = "{x.ipv4}", peer = "{y.ipv4}" }},\n' for x, y in pairs)
    return (
        f'role = "{role}"\n'
        'interface = "eth0"\n'
        f'vip = "{VIP}"\n'
        'witness = "gateway"\n'
        f"links = [\n{links}]\n"
        "[sync]\n"
        'every = "3s"\n'
        'jitter = "0s"\n'
    )


def records_in(file: Path) -> frozenset[int]:
    """Numbers of the records in a file of the client; none where there is no such file."""
    content = file.read_bytes() if file.exists() else b""
    lines = (content[at : at + RECORD_BYTES] for at in range(0, len(content), RECORD_BYTES))
    return frozenset(int(line.split()[0]) for line in lines if line.strip(b"\0"))


_NOT_YET = Home(-1, 0.0, frozenset(), frozenset(), frozenset(), 0, 0, 0.0, frozenset(), ())


class Demo:
    """The acts, in order; each leaves what the next one needs."""

    def __init__(self, lab: Lab, paper: Paper) -> None:
        self.lab = lab
        self.paper = paper
        self.pair = Copies(lab)
        self.teller = Teller(self.pair, paper)
        self.prober: NullProber | None = None
        self._from_wall_ns = lab.now_ns() - time.time_ns()
        self.dead_ns = 0
        self.booted_ns = 0
        self.window_ms = 0
        self.on_primary_disk: frozenset[int] = frozenset()

    def play(self) -> Outcome:
        """Everything; returns what was measured. Raises LabError when an act fails."""
        self.configure()
        self.start()
        first = self.first_pass()
        before = self.power_cut(self.copied_while_written())
        self.read_back(before)
        after = self.old_primary_returns(before)
        self.all_is_equal_again(before, after)
        outcome = self.outcome(first, before, after)
        return replace(outcome, home=self.goes_home(len(before.attempts) + len(after.attempts)))

    def configure(self) -> None:
        """Writes both files and shows one, as it is on the node."""
        for name, role in NAMES.items():
            self.lab.configure(name, config(role))
        self.paper.heading("1. Configuration: five settings, /etc/nfsha/nfsha.toml on the primary")
        self.paper.block(self.lab.a.path("/etc/nfsha/nfsha.toml").read_text())
        self.paper.text(
            'On the standby `role` is "standby", and `local` and `peer` change places. Both have '
            "the same key, with which every heartbeat is sealed. Without [sync] there is a pass "
            "each 30 s; the demo is in a hurry."
        )

    def start(self) -> None:
        """Starts both daemons on a volume with data and an empty one; tells until both are fit."""
        self.paper.heading("2. Both daemons start; the standby copies what the primary has")
        make_odd_tree(self.pair.here("a") / "odd")
        self.paper.text(
            "The primary's volume holds everything odd: hard links, holes, ACLs, devices, names "
            "that are no text. The standby's is empty. No node serves before it has heard the "
            "other, and none is a whole replica before a complete pass."
        )
        self.paper.line()
        self.teller.begin(self.pair.now_ms())
        self.pair.start()
        self.teller.until(
            lambda: self.pair.phase("a") == "ACTIVE" and self.pair.phase("b") == "PASSIVE",
            "the primary ACTIVE and the standby PASSIVE",
            stays=False,
        )
        self.lab.wait_holder("a")

    def first_pass(self) -> Copied:
        """What the standby's first pass did; whether the volumes are equal; both statuses."""
        mark = self._mark("b")
        differs = tuple(self.pair.differences())
        copied = Copied(mark["files"], mark["bytes"], mark["duration_ms"], differs)
        self.paper.line()
        self.paper.text(
            f"The first pass: {_amount(copied)}, in {copied.took_ms} ms. The demo walks both "
            "volumes by itself and compares type, owner, mode, times, contents, attributes, ACLs, "
            f"hard links and holes: {_told(differs)}."
        )
        for name in NAMES:
            self.paper.line()
            self._show_status(name)
        return copied

    def _mark(self, name: str) -> dict[str, Any]:
        """The last complete pass, as a node shows it."""
        mark = self.pair.mark(name)
        if mark is None:
            raise LabError(f"the {NAMES[name]} knows of no complete pass")
        return mark

    def _wait_pass(self, name: str, since_ns: int) -> dict[str, Any]:
        """Waits for a complete pass that began since a time (CLOCK_BOOTTIME) and returns it."""
        deadline = time.monotonic() + _PATIENCE_S
        while not since_ns < self._began_ns(mark := self._mark(name)) < self.lab.now_ns():
            if time.monotonic() > deadline:
                raise LabError(f"no complete pass on the {NAMES[name]} within {_PATIENCE_S:.0f} s")
            time.sleep(0.05)
        return mark

    def _began_ns(self, mark: dict[str, Any]) -> int:
        """When a pass began, by CLOCK_BOOTTIME; a mark has the wall clock.

        What is added is always the same: should somebody set the clock meanwhile, the marks made
        before that are still told rightly.
        """
        return int(mark["started_ns"]) + self._from_wall_ns

    def _show_status(self, name: str) -> None:
        """`nfsha status`, down to the line about the ports, and what it says of the copy."""
        lines = self.lab.node(name).nfsha("status").stdout.splitlines()
        ports = next((n for n, line in enumerate(lines) if line.startswith("NFS ports")), 8)
        copy = next((n for n, line in enumerate(lines) if line.startswith("replication")), ports)
        end = next((n for n in range(copy + 1, len(lines)) if lines[n][:1] != " "), len(lines))
        shown = [*lines[: ports + 1], "...", *lines[copy:end], "..."]
        self.paper.block("\n".join([f"{NAMES[name]}$ nfsha status", *shown]), hang=13)

    def copied_while_written(self) -> RecordWriter:
        """Lets the client write until a pass has copied enough, and asks the standby's disk."""
        self.paper.heading("3. A client mounts through the VIP and writes; passes copy it")
        writer = self.lab.write_records(interval_ms=_INTERVAL_MS)
        self.prober = self.lab.probe()
        self.prober.wait_success()
        written = writer.wait_acked(RECORDS)
        mark = self._wait_pass("b", written.attempts[-1].ended_ns)
        copy = records_in(self.pair.here("b") / "records")
        began_ns = self._began_ns(mark)
        known = [one for one in writer.so_far().attempts if not one.error]
        older = {one.number for one in known if one.ended_ns < began_ns}
        if older - copy:
            raise LabError(f"{len(older - copy)} records are missing after the pass {mark}")
        self.paper.text(
            f"The client writes numbered records by path: {len(known)} so far, each made stable by "
            "the server before the next one. The last complete pass on the standby began when "
            f"{len(older)} were acknowledged, and took {mark['duration_ms']} ms. On the standby's "
            f"disk are {len(older & copy)} of them."
        )
        return writer

    def power_cut(self, writer: RecordWriter) -> Records:
        """Cuts the primary's power, and waits until the client goes on."""
        self.paper.heading("4. A power cut; times count from here")
        writer.wait_acked(RECORDS // 2)
        self.dead_ns = self.lab.power_cut("a")
        dead_ms = self.dead_ns // 1_000_000
        self.paper.moment(0, "primary", "silent on all wires at once, all its processes killed")
        self.teller.begin(dead_ms)
        self.teller.until(
            lambda: self.pair.phase("b") == "ACTIVE", "the takeover by the standby", stays=True
        )
        writer.wait_acked(RECORDS)
        records = writer.stop()
        self._tell_wires(records)
        self._tell_window()
        return records

    def _tell_window(self) -> None:
        """What the standby's log says of the writes that may be missing."""
        said = _WINDOW.search(self.pair.log("b"))
        if said is None:
            raise LabError("the standby's log does not say which writes may be missing")
        self.window_ms = round(1000 * float(said[2]))
        self.paper.line()
        idle_ms = self._served().at_ms - self.dead_ns // 1_000_000
        self.paper.text(
            f"The standby's log at its takeover: {said[1]}. In the last {idle_ms / 1000:.1f} s of "
            "these nobody served."
        )

    def _served(self) -> Event:
        """When the standby took over."""
        return self.pair.wait_phase("b", "ACTIVE", since_ms=self.dead_ns // 1_000_000)

    def _tell_wires(self, records: Records) -> None:
        """What the kernel, the switch and the client saw of the takeover."""
        seen = self.lab.look()
        held = next(hold for hold in seen.holds(VIP) if hold.node == "b")
        self._moment(held.start_ns, "VIP", "on the standby (the kernel's address event)")
        self._moment(self._first_answer_ns(seen), "switch", "first NFS answer for the VIP since")
        waited = max(records.attempts, key=lambda one: one.took_ms)
        words = "ended with an error" if waited.stale else "succeeded"
        self._moment(
            waited.ended_ns,
            "client",
            f"its waiting write {words} after {waited.took_ms:.0f} ms (TCP sends again after 0.2, "
            "0.4, 0.8 s and so on, so an open connection notices late)",
        )

    def _moment(self, at_ns: int, who: str, text: str) -> None:
        self.paper.moment((at_ns - self.dead_ns) / 1e6, who, text)

    def _first_answer_ns(self, seen: Observations) -> int:
        span = seen.reply_span(VIP, "b", self.dead_ns)
        if span is None:
            raise LabError("no NFS answer of the standby was seen at the switch")
        return span[0]

    def read_back(self, records: Records) -> None:
        """Reads on a new connection what the client wrote, and says what is not there."""
        self.paper.heading("5. The client reads back on a new connection")
        read = frozenset(self.lab.read_records())
        old, new = self._by_node(records)
        before = self._before_window(records, old)
        for what, how in (
            ("acknowledged by the primary before that window / read back", _part(before, read)),
            ("acknowledged by the primary in that window / read back", _part(old - before, read)),
            ("acknowledged by the standby / read back", _part(new, read)),
        ):
            self.paper.result(what, how)
        missing = len(old - read)
        self.paper.line()
        self.paper.text(
            f"{missing} acknowledged records are missing: the primary died before a pass had read "
            "them. A copy in passes can lose the newest writes; it says since when."
            if missing
            else "No record is missing: a pass had read the last one just before the power cut."
        )
        if any(one.stale for one in records.failed):
            self.paper.line()
            self.paper.text(
                "One write was under way: the file opened on the primary, written on the standby. "
                "It ended with an error, as what is under way does when it moves to a copy. Work "
                "by path goes on, because both filesystems bear the same UUID."
            )

    def _before_window(self, records: Records, old: frozenset[int]) -> frozenset[int]:
        """Of the primary's records those that, by the standby's log, cannot be missing."""
        began_ns = (self._served().at_ms - self.window_ms - _ROUNDED_MS) * 1_000_000
        return old & {one.number for one in records.attempts if one.ended_ns < began_ns}

    def _by_node(self, records: Records) -> tuple[frozenset[int], frozenset[int]]:
        """Numbers of the records that the primary, and that the standby acknowledged."""
        first_ns = self._first_answer_ns(self.lab.look())
        acked = (one for one in records.attempts if not one.error)
        old = frozenset(one.number for one in acked if one.ended_ns < first_ns)
        return old, frozenset(records.acked) - old

    def old_primary_returns(self, before: Records) -> Records:
        """Boots the old primary while the client writes on; tells until it is whole again."""
        self.paper.heading("6. The old primary gets its power back, while the client writes on")
        first = len(before.attempts) + 1
        writer = self.lab.write_records(interval_ms=_INTERVAL_MS, first=first)
        writer.wait_acked(RECORDS // 2)
        self.booted_ns = self.lab.now_ns()
        self.lab.boot("a")
        self.teller.begin(self.booted_ns // 1_000_000)
        self.paper.moment(0, "primary", "boots; times count from here")
        self._tell_old_disk(before)
        self.pair.start("a")
        self.teller.until(
            lambda: (
                self.pair.moves("a", self.booted_ns // 1_000_000)[-1:] == [("RETURNED", "PASSIVE")]
            ),
            "the return of the old primary",
            stays=True,
        )
        writer.wait_acked(RECORDS)
        return writer.stop()

    def _tell_old_disk(self, before: Records) -> None:
        """What is on the old primary's disk before its nfsha runs."""
        old, _ = self._by_node(before)
        self.on_primary_disk = records_in(self.pair.here("a") / "records")
        alone = (old & self.on_primary_disk) - records_in(self.pair.here("b") / "records")
        self.paper.moment(
            (self.lab.now_ns() - self.booted_ns) / 1e6,
            "its disk",
            f"holds {len(old & self.on_primary_disk)} of the {len(old)} records that it "
            f"acknowledged; {len(alone)} of them are nowhere else",
        )

    def all_is_equal_again(self, before: Records, after: Records) -> None:
        """Waits for a pass with all that was written, and shows what became of the old data."""
        self._wait_pass("a", max(one.ended_ns for one in after.attempts))
        self.paper.line()
        self._show_status("a")
        self.paper.line()
        listed = self.lab.a.nfsha("quarantine", "list").stdout
        self.paper.block("primary$ nfsha quarantine list")
        self.paper.block(_paragraphs(listed))
        self.paper.line()
        quarantined = self._quarantined()
        missing = self._by_node(before)[0] - records_in(self.pair.here("b") / "records")
        self.paper.text(
            f"In quarantine is the old primary's whole file, with {len(quarantined)} records; of "
            f"the {len(missing)} that are missing at the VIP it has {len(missing & quarantined)}. "
            "They are set aside, not merged and not lost. After one more pass the demo walks both "
            f"volumes again: {_told(self.pair.differences())}."
        )

    def goes_home(self, written: int) -> Home:
        """The guarded failback, while the client writes on; tells what both nodes decide."""
        self.paper.heading("7. The service goes home, while the client writes on")
        writer = self.lab.write_records(interval_ms=_INTERVAL_MS, first=written + 1)
        writer.wait_acked(RECORDS)
        began_ms = self.pair.now_ms()
        self.teller.begin(began_ms)
        self.paper.block("primary$ nfsha failback --yes")
        done = self.lab.a.nfsha("failback", "--yes", check=False, timeout_s=_PATIENCE_S)
        self.paper.block(done.stdout + done.stderr)
        self.paper.line()
        self.teller.until(
            lambda: self.pair.phase("b") == "PASSIVE" and self.pair.phase("a") == "ACTIVE",
            "the failback",
            stays=False,
        )
        writer.wait_acked(RECORDS)
        records = writer.stop()
        read = frozenset(self.lab.read_records())
        self.pair.wait(
            lambda: (self.pair.mark("b") or {}).get("walk") != "handover", "a pass of the new epoch"
        )
        self.pair.sync()
        disks = [records_in(self.pair.here(node) / "records") for node in NAMES]
        seen = self.lab.look()
        seen.require_complete()
        stale = [one for one in records.failed if one.stale]
        self.paper.line()
        self.paper.text(
            f"The client waited for {records.longest_stall_ms:.0f} ms at most. What it wrote until "
            "the standby's ports closed was copied and compared by content before the primary "
            "took the VIP; the standby is its copy now."
        )
        return Home(
            code=done.returncode,
            stall_ms=records.longest_stall_ms,
            acknowledged=frozenset(records.acked),
            read_back=read,
            on_both=disks[0] & disks[1],
            stale=len(stale),
            failed=len(records.failed) - len(stale),
            holder_overlap_ms=seen.address_overlap_ms(VIP, began_ms * 1_000_000),
            holders=frozenset(NAMES[name] for name in seen.holders(VIP)),
            differs=tuple(self.pair.differences()),
        )

    def _quarantined(self) -> frozenset[int]:
        """Numbers of the records in the old primary's quarantine."""
        files = (self.pair.here("a") / ".nfsha-quarantine").rglob("records")
        return frozenset[int]().union(*map(records_in, files))

    def outcome(self, first: Copied, before: Records, after: Records) -> Outcome:
        """Asks everything that the summary claims."""
        if self.prober is None:
            raise LabError("the prober does not run")
        open_ports = self._open_ports()
        probes = self.prober.stop()
        seen = self.lab.look()
        seen.require_complete()
        old, new = self._by_node(before)
        dead_ms = self.dead_ns // 1_000_000
        decided = self.pair.wait_phase("b", "TAKEOVER", since_ms=dead_ms)
        first_ns = self._first_answer_ns(seen)
        stale = [
            one
            for one in before.failed
            if one.stale and one.sent_ns <= self.dead_ns <= one.ended_ns
        ]
        boot_ms = self.booted_ns // 1_000_000
        returned = self.pair.wait_phase("a", "RETURNED", since_ms=boot_ms)
        passive = self.pair.wait_phase("a", "PASSIVE", since_ms=boot_ms)
        return Outcome(
            home=_NOT_YET,
            first=first,
            decided_ms=decided.at_ms - dead_ms,
            served_ms=self._served().at_ms - dead_ms,
            first_answer_ms=(first_ns - self.dead_ns) / 1e6,
            outage_ms=probes.outage_ms(self.dead_ns - 1_000_000_000),
            stall_ms=before.longest_stall_ms,
            holder_overlap_ms=seen.address_overlap_ms(VIP),
            answer_overlap_ms=seen.reply_overlap_ms(VIP),
            by_primary=old,
            before_window=self._before_window(before, old),
            window_ms=self.window_ms,
            by_standby=new | frozenset(after.acked),
            read_back=frozenset(self.lab.read_records()),
            on_primary_disk=self.on_primary_disk,
            quarantined=self._quarantined(),
            resync_ms=passive.at_ms - returned.at_ms,
            differs=tuple(self.pair.differences()),
            stale=len(stale),
            failed=len(before.failed) - len(stale) + len(after.failed),
            return_stall_ms=after.longest_stall_ms,
            holders=frozenset(NAMES[name] for name in seen.holders(VIP)),
            returned_by=tuple(to for _, to in self.pair.moves("a", boot_ms)),
            touched=self._touched(seen),
            open_ports=open_ports,
        )

    def _open_ports(self) -> tuple[int, ...]:
        """Which NFS ports of the old primary's own address do anything but keep silent."""
        here = PLACES["a"].lan.ipv4
        if not self.lab.c.inside(lambda: _speaks(VIP, PORTS[0])):
            raise LabError("the client reaches nobody at the VIP")
        return tuple(
            port for port in PORTS if self.lab.c.inside(functools.partial(_speaks, here, port))
        )

    def _touched(self, seen: Observations) -> tuple[str, ...]:
        """What the old primary did with the VIP since its boot."""
        held = any(hold.node == "a" and hold.end_ns > self.booted_ns for hold in seen.holds(VIP))
        claimed = any(one.node == "a" for one in seen.claims(VIP, self.booted_ns))
        answered = seen.reply_span(VIP, "a", self.booted_ns) is not None
        found = {"held it": held, "claimed it by ARP": claimed, "answered NFS for it": answered}
        return tuple(words for words, so in found.items() if so)


def _paragraphs(text: str) -> str:
    """The same with paragraphs, told apart by their indent, in single lines."""
    every = itertools.groupby(text.splitlines(), lambda line: len(line) - len(line.lstrip()))
    return "\n".join(" " * indent + " ".join(map(str.strip, lines)) for indent, lines in every)


def _told(differs: Sequence[str]) -> str:
    """How a comparison ended, in words."""
    return f"{len(differs)} differences, first {differs[0]}" if differs else "no difference"


def _speaks(address: str, port: int) -> bool:
    """Whether a TCP connection is accepted, refused or called unreachable; False: silence."""
    try:
        socket.create_connection((address, port), timeout=_SILENCE_S).close()
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


# --------------------------------------------------------------------------- the frame


class _Stopped(BaseException):
    """Told to end by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _deaf(*_: object) -> None:
    """From now on signals are ignored: what was built is being taken down."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _heed_signals() -> None:
    def stop(number: int, _frame: FrameType | None) -> None:
        _deaf()
        raise _Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


def _show(paper: Paper) -> Outcome:
    lab = Lab(volume_mib=_VOLUME_MIB)
    try:
        try:
            began = time.monotonic()
            paper.line("nfsha: two NFS servers, one floating address (VIP), never two holders")
            paper.line()
            lab.up()
            _introduce(paper, time.monotonic() - began)
            return Demo(lab, paper).play()
        finally:
            _deaf()
    finally:
        lab.close()
        _require_nothing_left(lab.name)


def _introduce(paper: Paper, took_s: float) -> None:
    paper.text(
        f"Four machines in this one, as network namespaces; built in {took_s:.1f} s. Addresses, "
        "ARP, firewall, NFS servers and filesystems are real. The two volumes are separate "
        "filesystems made with one UUID, so that a client's mount holds on both."
    )
    paper.line()
    for place, what in (
        ("a", "primary: nfs-ganesha (v3 only) and nfsha"),
        ("b", "standby: the same"),
        ("c", f"client: mounts {VIP}:/nfs/data"),
        ("w", "gateway and witness: who reaches it is not cut off"),
    ):
        paper.line(f"    {PLACES[place].lan.ipv4:<13} {what}")
    paper.line(f"    {VIP:<13} the VIP")


def _require_nothing_left(name: str) -> None:
    """Raises LabError when the lab left a trace on this machine."""
    deadline = time.monotonic() + _LEFT_S
    while left := registry.leftovers(os.getpid(), {name}):
        if time.monotonic() > deadline:
            raise LabError(f"left behind: {'; '.join(left)}")
        time.sleep(0.05)


def _conclude(paper: Paper, outcome: Outcome, took_s: float) -> int:
    paper.heading("Summary")
    for what, how in summary(outcome):
        paper.result(what, how)
    paper.line()
    broken = untrue(outcome)
    for sentence in broken:
        paper.bad(f"NOT SO: {sentence}")
    if broken:
        for one in fields(outcome):
            paper.bad(f"measured: {one.name} = {_brief(getattr(outcome, one.name))}")
        return 1
    paper.good(f"All of this was checked. {took_s:.0f} s; nothing is left behind.")
    return 0


def _brief(value: object) -> str:
    """A measured value; the numbers of records as spans."""
    if not isinstance(value, frozenset) or not all(isinstance(one, int) for one in value):
        return str(value)
    spans = itertools.groupby(enumerate(sorted(value)), lambda pair: pair[1] - pair[0])
    return ", ".join(_span([number for _, number in one]) for _, one in spans) or "none"


def _span(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def main() -> int:
    """Shows everything; returns the exit code."""
    _heed_signals()
    paper = Paper(sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    began = time.monotonic()
    try:
        require_root()
        return _conclude(paper, _show(paper), time.monotonic() - began)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads any more
        return 1
    except _Stopped as stop:
        paper.line()
        paper.line("Stopped; everything that was built is gone.")
        return 128 + stop.number
    except (LabError, OSError, subprocess.SubprocessError) as error:
        paper.bad(f"The demo failed: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())

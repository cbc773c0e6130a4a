"""`make demo`: a pair of servers in namespaces, a power cut, and what both nodes made of it.

It tells only what it has seen: decisions from the event logs of the daemons, addresses from the
kernel's events, answers from the frames at the switch. What the summary claims is checked first
(`untrue`): a demo that is not so ends with exit code 1 and says what was not.

Exit codes: 0 all was so; 1 something was not, or the lab could not be built; 130 after ^C.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from tests.netns.lab import Lab, require_root
from tests.netns.labkit import registry
from tests.netns.labkit.network import PLACES, VIP
from tests.netns.labkit.nfs_client import RECORD_BYTES
from tests.netns.labkit.observe import Observations
from tests.netns.labkit.place import LabError
from tests.netns.labkit.prober import NullProber
from tests.netns.labkit.records import Records
from tests.netns.pair import Event, Pair

WIDTH = 79
NAMES = {"a": "primary", "b": "standby"}
PORTS = (2049, 20048)
RECORDS = 100
"""So many acknowledged records are waited for before and after each act."""

_INTERVAL_MS = 10
_PATIENCE_S = 10.0
_SILENCE_S = 1.0
"""A port that neither answers nor refuses for so long is closed silently."""
_LEFT_S = 5.0


# --------------------------------------------------------------------------- what is claimed


@dataclass(frozen=True)
class Outcome:
    """What was measured. Times are milliseconds after the power cut."""

    decided_ms: int
    served_ms: int
    first_answer_ms: float
    outage_ms: float
    stall_ms: float
    holder_overlap_ms: float
    answer_overlap_ms: float
    by_primary: frozenset[int]
    """Records that the primary had acknowledged before the power cut."""
    by_standby: frozenset[int]
    """Records that the standby has acknowledged since."""
    read_back: frozenset[int]
    """What a new connection through the VIP found at the end."""
    on_primary_disk: frozenset[int]
    """What lies on the old primary's own disk."""
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
    (
        lambda o: 0 < o.decided_ms <= o.served_ms <= o.first_answer_ms,
        "the standby decided, served and answered out of order",
    ),
    (lambda o: o.holder_overlap_ms == 0.0, "two nodes held the VIP at once"),
    (lambda o: o.answer_overlap_ms == 0.0, "the old node answered after the new one had begun"),
    (lambda o: len(o.by_primary) >= RECORDS, "the primary acknowledged too few records"),
    (lambda o: len(o.by_standby) >= 2 * RECORDS, "the standby acknowledged too few records"),
    (
        lambda o: o.by_standby <= o.read_back,
        "records that the standby had acknowledged were not there to be read",
    ),
    (
        lambda o: o.by_primary <= o.on_primary_disk,
        "records that the primary had acknowledged are not on its disk",
    ),
    (lambda o: o.stale <= 1, "more writes failed at the move than the one that was under way"),
    (lambda o: o.failed == 0, "writes of the client failed"),
    (lambda o: o.holders == {"standby"}, "at the end the standby is not the one holder of the VIP"),
    (
        lambda o: "RETURNED" in o.returned_by and o.returned_by[-1] == "PASSIVE",
        "the old primary did not become RETURNED and then PASSIVE",
    ),
    (lambda o: not o.touched, "the old primary touched the VIP after its boot"),
    (lambda o: not o.open_ports, "the old primary's NFS ports were not closed silently"),
)


def untrue(outcome: Outcome) -> list[str]:
    """The claims of the demo that this outcome does not bear out; empty: all is so."""
    return [sentence for holds, sentence in CLAIMS if not holds(outcome)]


def summary(o: Outcome) -> list[tuple[str, str]]:
    """The closing table: what, and how it was."""
    lost = len(o.by_primary & o.read_back)
    return [
        ("takeover decided after the power cut", f"{o.decided_ms} ms"),
        ("from the decision to the first NFS answer", f"{o.first_answer_ms - o.decided_ms:.0f} ms"),
        ("outage for new connections (RPC NULL each 5 ms)", f"{o.outage_ms:.0f} ms"),
        ("longest stall of the client, at the power cut", f"{o.stall_ms:.0f} ms"),
        ("longest stall while the old primary came back", f"{o.return_stall_ms:.0f} ms"),
        ("time in which two nodes held the VIP", f"{o.holder_overlap_ms:.1f} ms"),
        ("time in which two nodes answered NFS for it", f"{o.answer_overlap_ms:.1f} ms"),
        (
            "records acknowledged by the standby / read back",
            f"{len(o.by_standby)} / {len(o.by_standby & o.read_back)}",
        ),
        (
            "records acknowledged by the primary / on its disk",
            f"{len(o.by_primary)} / {len(o.by_primary & o.on_primary_disk)}",
        ),
        ("    of these on the standby (nobody copied them)", f"{lost}"),
        ("writes under way at the power cut that failed", f"{o.stale}"),
        ("the old primary after its boot", f"{o.returned_by[-1]}, ports closed"),
    ]


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

    def block(self, text: str) -> None:
        """What a file or a command says, set off."""
        for one in text.splitlines():
            self.line(f"    {one}".rstrip())

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
        self.line(f"  {what:<52}{self._styled('1', f'{how:>20}')}")

    def good(self, text: str) -> None:
        """The verdict, when all was so."""
        self.line(self._styled("32", text))

    def bad(self, text: str) -> None:
        """What was not so; to standard error."""
        print(self._styled("31", textwrap.fill(text, WIDTH)), file=sys.stderr, flush=True)


class Teller:
    """Follows the decisions of both daemons and tells each as it happens."""

    def __init__(self, pair: Pair, paper: Paper) -> None:
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
    """The configuration of a node: five settings."""
    here, there = ("a", "b") if role == "primary" else ("b", "a")
    pairs = zip(PLACES[here].all(), PLACES[there].all(), strict=True)
    links = "".join(f'    {{ local = "{x.ipv4}", peer = "{y.ipv4}" }},\n' for x, y in pairs)
    return (
        f'role = "{role}"\n'
        'interface = "eth0"\n'
        f'vip = "{VIP}"\n'
        'witness = "gateway"\n'
        f"links = [\n{links}]\n"
    )


class Demo:
    """The acts, in order; each leaves what the next one needs."""

    def __init__(self, lab: Lab, paper: Paper) -> None:
        self.lab = lab
        self.paper = paper
        self.pair = Pair(lab)
        self.teller = Teller(self.pair, paper)
        self.prober: NullProber | None = None
        self.dead_ns = 0
        self.booted_ns = 0

    def play(self) -> Outcome:
        """Everything; returns what was measured. Raises LabError when an act fails."""
        self.configure()
        self.start()
        before = self.power_cut()
        self.read_back(before)
        after = self.old_primary_returns(len(before.attempts) + 1)
        return self.outcome(before, after)

    def configure(self) -> None:
        """Writes both files and shows one, as it is on the node."""
        for name, role in NAMES.items():
            self.lab.configure(name, config(role))
        self.paper.heading("1. Configuration: five settings, /etc/nfsha/nfsha.toml on the primary")
        self.paper.block(self.lab.a.path("/etc/nfsha/nfsha.toml").read_text())
        self.paper.text(
            'On the standby `role` is "standby", and `local` and `peer` change places. Both have '
            "the same key, with which every heartbeat is sealed."
        )

    def start(self) -> None:
        """Starts both daemons; shows what each decided and the top of its status."""
        self.paper.heading("2. Both daemons start; no node serves before it has heard the other")
        self.teller.begin(self.pair.now_ms())
        self.pair.start()
        self.teller.until(
            lambda: self.pair.phase("a") == "ACTIVE" and self.pair.phase("b") == "PASSIVE",
            "the primary ACTIVE and the standby PASSIVE",
            stays=False,
        )
        self.lab.wait_holder("a")
        for name in NAMES:
            self.paper.line()
            self._show_status(name)

    def _show_status(self, name: str) -> None:
        """`nfsha status`, down to the line about the ports."""
        lines = self.lab.node(name).nfsha("status").stdout.splitlines()
        last = next((n for n, line in enumerate(lines) if line.startswith("NFS ports")), 8)
        self.paper.block("\n".join([f"{NAMES[name]}$ nfsha status", *lines[: last + 1], "..."]))

    def power_cut(self) -> Records:
        """Lets the client write, cuts the primary's power, and waits until the client goes on."""
        self.paper.heading("3. A client mounts through the VIP and writes; then a power cut")
        writer = self.lab.write_records(interval_ms=_INTERVAL_MS)
        self.prober = self.lab.probe()
        self.prober.wait_success()
        written = writer.wait_acked(RECORDS)
        self.paper.text(
            f"The client writes numbered records by path: {len(written.acked)} so far, each made "
            "stable by the server before the next one. Times count from the power cut."
        )
        self.paper.line()
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
        return records

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
        self.paper.heading("4. The client reads back on a new connection")
        read = set(self.lab.read_records())
        old, new = self._by_node(records)
        self.paper.text(
            f"Acknowledged by the standby: {len(new)}, read back: {len(new & read)}. "
            f"Acknowledged by the primary before the power cut: {len(old)}, on the standby: "
            f"{len(old & read)}. Nobody copied them: the copy is not nfsha's business here "
            '(replication = "off"), somebody else does it, and answers for its age.'
        )
        if any(one.stale for one in records.failed):
            self.paper.line()
            self.paper.text(
                "One write was under way: the file opened on the primary, written on the standby. "
                "It ended with an error, as what is under way does when it moves to a copy. Work "
                "by path goes on, because both filesystems bear the same UUID."
            )

    def _by_node(self, records: Records) -> tuple[set[int], set[int]]:
        """Numbers of the records that the primary, and that the standby acknowledged."""
        first_ns = self._first_answer_ns(self.lab.look())
        old = {one.number for one in records.attempts if not one.error and one.ended_ns < first_ns}
        return old, set(records.acked) - old

    def old_primary_returns(self, first: int) -> Records:
        """Boots the old primary while the client writes on."""
        self.paper.heading("5. The old primary gets its power back")
        writer = self.lab.write_records(interval_ms=_INTERVAL_MS, first=first)
        writer.wait_acked(RECORDS // 2)
        self.booted_ns = self.lab.now_ns()
        self.lab.boot("a")
        self.teller.begin(self.booted_ns // 1_000_000)
        self.paper.moment(0, "primary", "boots; times count from here")
        self.pair.start("a")
        self.teller.until(
            lambda: (
                self.pair.moves("a", self.booted_ns // 1_000_000)[-1:] == [("RETURNED", "PASSIVE")]
            ),
            "the return of the old primary",
            stays=True,
        )
        writer.wait_acked(RECORDS)
        self.paper.line()
        self._show_status("a")
        records = writer.stop()
        missing = len(set(self.lab.read_records()) - self._on_primary_disk())
        self.paper.line()
        self.paper.text(
            f"It would take over if the standby died; {missing} records that the standby has are "
            "not on its disk. Whoever copies the data has to bring them there first: with "
            'replication = "off" nfsha cannot know.'
        )
        return records

    def outcome(self, before: Records, after: Records) -> Outcome:
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
        served = self.pair.wait_phase("b", "ACTIVE", since_ms=dead_ms)
        first_ns = self._first_answer_ns(seen)
        stale = [
            one
            for one in before.failed
            if one.stale and one.sent_ns <= self.dead_ns <= one.ended_ns
        ]
        boot_ms = self.booted_ns // 1_000_000
        return Outcome(
            decided_ms=decided.at_ms - dead_ms,
            served_ms=served.at_ms - dead_ms,
            first_answer_ms=(first_ns - self.dead_ns) / 1e6,
            outage_ms=probes.outage_ms(self.dead_ns - 1_000_000_000),
            stall_ms=before.longest_stall_ms,
            holder_overlap_ms=seen.address_overlap_ms(VIP),
            answer_overlap_ms=seen.reply_overlap_ms(VIP),
            by_primary=frozenset(old),
            by_standby=frozenset(new | set(after.acked)),
            read_back=frozenset(self.lab.read_records()),
            on_primary_disk=self._on_primary_disk(),
            stale=len(stale),
            failed=len(before.failed) - len(stale) + len(after.failed),
            return_stall_ms=after.longest_stall_ms,
            holders=frozenset(NAMES[name] for name in seen.holders(VIP)),
            returned_by=tuple(to for _, to in self.pair.moves("a", boot_ms)),
            touched=self._touched(seen),
            open_ports=open_ports,
        )

    def _on_primary_disk(self) -> frozenset[int]:
        """Numbers of the records in the old primary's own file."""
        content = self.lab.a.path("/nfs/data/records").read_bytes()
        lines = (content[at : at + RECORD_BYTES] for at in range(0, len(content), RECORD_BYTES))
        return frozenset(int(line.split()[0]) for line in lines if line.strip(b"\0"))

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
    lab = Lab()
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
        paper.bad(f"measured: {outcome}")
        return 1
    paper.good(f"All of this was checked. {took_s:.0f} s; nothing is left behind.")
    return 0


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

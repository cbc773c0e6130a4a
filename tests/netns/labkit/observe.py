"""What the observer saw, as figures: who held an address when, who answered NFS when, overlaps.

Two overlaps, given apart because they mean different things: `address_overlap_ms` is how long two
nodes had the address at once, by the kernel's address events; `reply_overlap_ms` is how long the
old node went on answering NFS clients after the first answer of the new one, by the frames that
left their ports. Serving is what the second shows.
"""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from tests.netns.labkit import kernel
from tests.netns.labkit.place import MARK, REPOSITORY, LabError

_ANSWER_S = 20.0
_NFS_PORT = 2049

Event = dict[str, Any]


@dataclass(frozen=True)
class Hold:
    """One node had the address from start to end (CLOCK_BOOTTIME, ns); `open`: it still has."""

    node: str
    start_ns: int
    end_ns: int
    open: bool = False


@dataclass(frozen=True)
class Reply:
    """One frame with NFS data that a node sent from port 2049 of an address.

    again: the same bytes of the connection had left the node before (TCP sent them again). IPv6
    goes on doing that for minutes after the address is gone; IPv4 does not.
    """

    node: str
    time_ns: int
    source: str
    client: str
    client_port: int
    again: bool = False


@dataclass(frozen=True)
class Claim:
    """One ARP packet or neighbour advertisement whose sender says that it is at the address."""

    node: str
    time_ns: int
    mac: str
    gratuitous: bool


@dataclass(frozen=True)
class Datagram:
    """One UDP datagram that a place sent."""

    node: str
    time_ns: int
    network: str
    source: str
    source_port: int
    target: str
    target_port: int
    content: bytes


class Observations:
    """Everything seen up to `now_ns`, in order of time. Windows are [since_ns, until_ns]."""

    def __init__(self, events: list[Event], now_ns: int) -> None:
        self._events = _of_the_living(sorted(events, key=lambda event: int(event["t"])))
        self.now_ns = now_ns

    def _of(self, kind: str, since_ns: int, until_ns: int | None) -> Iterator[Event]:
        end_ns = self.now_ns if until_ns is None else until_ns
        for event in self._events:
            if event["k"] == kind and since_ns <= event["t"] <= end_ns:
                yield event

    def require_complete(self) -> None:
        """Raises LabError when the kernel dropped frames that should have been seen."""
        lost = sum(event["frames"] for event in self._events if event["k"] == "lost")
        if lost:
            raise LabError(f"the observer lost {lost} frames: figures of packets are worth nothing")

    def holds(self, address: str) -> list[Hold]:
        """Who had the address when, by start."""
        started: dict[str, int] = {}
        holds = []
        for event in self._events:
            node = event["node"]
            ends = event["k"] == "gone" or (event["k"] == "addr" and event["op"] == "del")
            if event["k"] == "addr" and event["address"] != address:
                continue
            if event["k"] == "addr" and event["op"] == "add":
                started.setdefault(node, event["t"])
            elif ends and node in started:
                holds.append(Hold(node, started.pop(node), event["t"]))
        holds += [Hold(node, start, self.now_ns, open=True) for node, start in started.items()]
        return sorted(holds, key=lambda hold: hold.start_ns)

    def holders(self, address: str) -> set[str]:
        """Who has it now."""
        return {hold.node for hold in self.holds(address) if hold.open}

    def address_overlap_ms(
        self, address: str, since_ns: int = 0, until_ns: int | None = None
    ) -> float:
        """How long two nodes had the address at once."""
        end_ns = self.now_ns if until_ns is None else until_ns
        total_ns = 0
        for one, other in combinations(self.holds(address), 2):
            if one.node != other.node:
                start = max(one.start_ns, other.start_ns, since_ns)
                total_ns += max(0, min(one.end_ns, other.end_ns, end_ns) - start)
        return total_ns / 1e6

    def replies(self, address: str, since_ns: int = 0, until_ns: int | None = None) -> list[Reply]:
        """NFS replies sent from the address, by whichever node."""
        ends: dict[tuple[str, str, int], int] = {}
        replies = []
        for event in self._of("tcp", 0, until_ns):
            if event["source"] != address:
                continue
            reply = _reply(event)
            connection = (reply.node, reply.client, reply.client_port)
            end = event["seq"] + event["payload"]
            if not event["payload"]:  # SYN or reset: sequence numbers start anew
                ends.pop(connection, None)
            elif event["t"] >= since_ns:
                replies.append(replace(reply, again=_behind(end, ends.get(connection))))
            if event["payload"] and not _behind(end, ends.get(connection)):
                ends[connection] = end
        return replies

    def refusals(self, address: str, since_ns: int = 0, until_ns: int | None = None) -> list[Reply]:
        """TCP resets sent from port 2049 of the address."""
        return [
            _reply(event)
            for event in self._of("tcp", since_ns, until_ns)
            if event["flags"] & 0x04 and event["source"] == address
        ]

    def reply_overlap_ms(
        self, address: str, since_ns: int = 0, until_ns: int | None = None
    ) -> float:
        """How long the node that answered first went on after the first reply of another one.

        For one move in the window. 0 when it never did; then no reply of the old node is later
        than the first of the new one.
        """
        replies = self.replies(address, since_ns, until_ns)
        if not replies:
            return 0.0
        old = replies[0].node
        new = [reply.time_ns for reply in replies if reply.node != old]
        if not new:
            return 0.0
        last_of_old = max(reply.time_ns for reply in replies if reply.node == old)
        return max(0, last_of_old - new[0]) / 1e6

    def reply_span(
        self, address: str, node: str, since_ns: int = 0, until_ns: int | None = None
    ) -> tuple[int, int] | None:
        """Times of the first and last NFS reply of a node from the address, or None."""
        times = [
            one.time_ns for one in self.replies(address, since_ns, until_ns) if one.node == node
        ]
        return (times[0], times[-1]) if times else None

    def claims(self, address: str, since_ns: int = 0, until_ns: int | None = None) -> list[Claim]:
        """ARP packets and neighbour advertisements that say where the address is."""
        kind = "na" if ":" in address else "arp"
        return [
            Claim(
                event["node"],
                event["t"],
                event["mac"],
                kind == "na" or event["sender"] == event["target"],
            )
            for event in self._of(kind, since_ns, until_ns)
            if event["sender"] == address
        ]

    def addressed(
        self, address: str, since_ns: int = 0, until_ns: int | None = None
    ) -> list[tuple[int, str]]:
        """(time, node) of each SYN to NFS at an IPv4 address: to whose MAC it went."""
        return [
            (event["t"], event["to"])
            for event in self._of("syn", since_ns, until_ns)
            if event["target"] == address
        ]

    def datagrams(self, since_ns: int = 0, until_ns: int | None = None) -> list[Datagram]:
        """UDP datagrams seen while Observer.keep_datagrams was on."""
        return [
            Datagram(
                event["node"],
                event["t"],
                event["network"],
                event["source"],
                event["sport"],
                event["target"],
                event["dport"],
                bytes.fromhex(event["data"]),
            )
            for event in self._of("udp", since_ns, until_ns)
        ]

    def render(self, address: str, origin_ns: int = 0) -> str:
        """A few lines for people: holds, replies, both overlaps; times in seconds after origin."""

        def at(time_ns: int) -> str:
            return f"{(time_ns - origin_ns) / 1e9:.3f}"

        lines = [f"{address}:"]
        for hold in self.holds(address):
            end = "now" if hold.open else f"{at(hold.end_ns)} s"
            lines.append(f"  {hold.node} held it from {at(hold.start_ns)} s to {end}")
        for node in sorted({reply.node for reply in self.replies(address, origin_ns)}):
            span = self.reply_span(address, node, origin_ns)
            if span:
                lines.append(f"  {node} answered NFS from {at(span[0])} s to {at(span[1])} s")
        lines.append(
            f"  overlap of holders {self.address_overlap_ms(address, origin_ns):.1f} ms, "
            f"of answers {self.reply_overlap_ms(address, origin_ns):.1f} ms"
        )
        return "\n".join(lines)


def _of_the_living(events: list[Event]) -> list[Event]:
    """Without what was seen of a node between its power cut and its next boot."""
    dead: set[str] = set()
    living = []
    for event in events:
        if event["k"] == "watch":
            dead.discard(event["node"])
        if event["node"] not in dead:
            living.append(event)
        if event["k"] == "gone":
            dead.add(event["node"])
    return living


def _reply(event: Event) -> Reply:
    return Reply(event["node"], event["t"], event["source"], event["target"], event["dport"])


def _behind(end: int, highest: int | None) -> bool:
    """Whether a sequence number is not beyond the highest (modulo 2**32, RFC 9293 section 3.4)."""
    return highest is not None and (highest - end) % 2**32 < 2**31


class Observer:
    """The owner's side of the observing process."""

    def __init__(self, lab_name: str, switch: Path, file: Path) -> None:
        self._file = file
        self._read_to = 0
        self._events: list[Event] = []
        self._commands = 0
        self._log = file.with_name("observer.log").open("a")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.netns.labkit.observer", str(switch), str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=REPOSITORY,
            text=True,
            bufsize=1,
            env={"PATH": "/usr/bin:/bin", MARK: lab_name},
            start_new_session=True,
        )
        self._expect("ready")

    def watch(self, node: str, netns: Path) -> None:
        """Listens to the address events of a node from now on; what it has now counts from now."""
        self._command(do="watch", node=node, netns=str(netns))

    def forget(self, node: str, at_ns: int) -> None:
        """The node is gone since then: its holds end, what its ports still show went nowhere."""
        self._command(do="forget", node=node, at=at_ns)

    def keep_datagrams(self, on: bool = True) -> None:
        """Keeps the contents of UDP datagrams (heartbeats) too: some 100 kB a second."""
        self._command(do="datagrams", on=on)

    def look(self) -> Observations:
        """Everything that was seen until this moment."""
        now_ns = kernel.now_ns()
        self._command(do="sync")
        with self._file.open("rb") as file:
            file.seek(self._read_to)
            self._events += [json.loads(line) for line in file]
            self._read_to = file.tell()
        return Observations(self._events, now_ns)

    def stop(self) -> None:
        """Ends the process. Idempotent."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
            self._process.wait(_ANSWER_S)
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._log.close()

    def _command(self, **command: object) -> None:
        if self._process.stdin is None:
            raise LabError("the observer has no standard input")
        self._commands += 1
        self._process.stdin.write(json.dumps({"id": self._commands, **command}) + "\n")
        self._process.stdin.flush()
        self._expect(str(self._commands))

    def _expect(self, word: str) -> None:
        stdout = self._process.stdout
        if stdout is None:
            raise LabError("the observer has no standard output")
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if not selector.select(_ANSWER_S):
                raise LabError(f"the observer did not answer within {_ANSWER_S} s")
        line = stdout.readline().strip()
        if line != word:
            said = Path(self._log.name).read_text()
            raise LabError(f"the observer said {line!r} instead of {word!r}\n{said}")

"""A move of the service with a fault at a chosen boundary, and the look at what is in the end.

At the boundary a real daemon stands still (`labkit/stepped`) while the fault is done; then all is
mended, as an administrator and systemd would, and the pair must find its way by itself.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from nfsha.host.control import CommandError, ControlClient, ControlError
from tests.netns.copies import SYNC, Copies
from tests.netns.handover_cases import GIVER, RECEIVER, Action, Boundary, Case, Fault
from tests.netns.lab import ROLES, Lab
from tests.netns.labkit.network import PLACES, VIP
from tests.netns.labkit.nfs_client import RECORD_BYTES
from tests.netns.labkit.nfs_server import NFS_PORT, rpc_null
from tests.netns.labkit.place import LabError
from tests.netns.labkit.records import RecordWriter
from tests.netns.labkit.stepped_gate import Steps
from tests.netns.labkit.storage_node import STATE

CONFIG = SYNC + '[handover]\nmax_stall = "2s"\n'

PROOF = Boundary(Action(RECEIVER, "Finish: proof"), "before")

REACHED_WITHIN_S = 20.0
AT_REST_WITHIN_S = 40.0
ASKED_WITHIN_S = 10.0
TAKEN_WITHIN_S = 4.0
"""So long one node is left alone, or cut off: a takeover needs about two seconds."""
ILL_S = (1.5, 6.0)
"""At least and at most so long a disk stays full or a link is cut: until the move has ended."""
RSYNC_DIES_FOR_S = 0.5
"""From the boundary on so long each rsync is killed: a pass that is about to begin has one."""
SYSTEMD_RESTARTS_AFTER_S = 0.1
"""RestartSec= of systemd/nfsha.service."""

NFS_PROGRAM = 100003


class Stepped(Copies):
    """A pair whose daemons can be stopped at each action, and a client that writes all the time.

    Enter it as a context: at its end the writer is stopped and the pipes are closed.
    """

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab, sync=CONFIG)
        self.steps = {name: Steps(lab.folder / f"step-{name}") for name in ROLES}
        self.receiver = "b"
        self._writer: RecordWriter | None = None
        self._told = dict.fromkeys(ROLES, 0)
        self._since_ns = 0
        self._receives = "b"
        self._plan = ""
        self._answers: list[str] = []
        self._asking: list[threading.Thread] = []
        self._excused: set[int] = set()

    def __enter__(self) -> Stepped:
        self.settle_whole()
        self._writer = self.lab.write_records(interval_ms=50, cap_s=90)
        self._writer.wait_acked(5)
        self.wait_at_rest()
        return self

    def __exit__(self, *error: object) -> None:
        for one in self.steps.values():
            one.close()

    @property
    def writer(self) -> RecordWriter:
        """The client."""
        if self._writer is None:
            raise LabError("nobody writes yet")
        return self._writer

    @property
    def giver(self) -> str:
        """The node that serves before the move."""
        return "b" if self.receiver == "a" else "a"

    def node_of(self, side: str) -> str:
        """The node on this side of the move."""
        return self.giver if side == GIVER else self.receiver

    def start(self, *names: str) -> None:
        """As `Pair.start`, but daemons that can be stopped at a boundary."""
        for name in names or tuple(ROLES):
            node = self.lab.node(name)
            if node.daemon is not None and node.daemon.alive:
                raise LabError(f"the daemon of {name} runs already")
            node.path("/run/nfsha").mkdir(mode=0o750, exist_ok=True)
            module = "tests.netns.labkit.stepped"
            argv = [sys.executable, "-m", module, str(self.steps[name].folder)]
            node.daemon = node.spawn(argv, name="daemon")

    def _file(self, name: str) -> Path:
        return self.lab.node(name).path(f"{STATE}/events.jsonl")

    def ask(self, name: str, command: str, **args: str) -> dict[str, Any]:
        """One command to the daemon of a node. Raises ControlError and CommandError."""
        socket = self.lab.node(name).path("/run/nfsha/nfsha.sock")
        return dict(ControlClient(socket, timeout_s=ASKED_WITHIN_S).call(command, args))

    def status(self, name: str) -> dict[str, Any]:
        """How a node stands; nothing when its daemon does not answer."""
        if not self.lab.node(name).up:
            return {}
        try:
            return dict(self.ask(name, "status")["status"])
        except (ControlError, CommandError, OSError):
            return {}

    def printed(self, name: str) -> str:
        """What the daemons of a node printed since the case began."""
        log = self.lab.folder / name / "log" / "daemon.log"
        with log.open("rb") as file:
            file.seek(self._told[name])
            return file.read().decode(errors="replace")

    # -------------------------------------------------------------- at rest

    def at_rest(self) -> bool:
        """One node serves, the other is a whole replica, and a move would be possible.

        Keeps the id of the plan that an operator would approve.
        """
        found = {name: self.status(name) for name in ROLES}
        phases = {name: one.get("phase") for name, one in found.items()}
        if sorted(map(str, phases.values())) != ["ACTIVE", "PASSIVE"]:
            return False
        receiver = next(name for name, phase in phases.items() if phase == "PASSIVE")
        giver = next(name for name in ROLES if name != receiver)
        try:
            plan = self.ask(giver, "handover-plan", to=ROLES[receiver])
        except (ControlError, CommandError):
            return False
        self.receiver, self._plan = receiver, plan["plan"]
        return bool(plan["ok"])

    def wait_at_rest(self) -> None:
        """Waits for that. Raises LabError with what both nodes say instead."""
        deadline = time.monotonic() + AT_REST_WITHIN_S
        while not self.at_rest():
            if time.monotonic() > deadline:
                raise LabError(f"not at rest within {AT_REST_WITHIN_S} s: {self._said()}")
            time.sleep(0.1)

    def _said(self) -> str:
        words = []
        for name in ROLES:
            one = self.status(name)
            words.append(f"{name}: {one.get('phase')} {one.get('row')}: {one.get('why')}")
            with contextlib.suppress(ControlError, CommandError, OSError):
                plan = self.ask(name, "handover-plan", to=ROLES[self.receiver])
                words += [f"  {g['name']}: {g['found']}" for g in plan["guards"] if not g["ok"]]
        return "\n".join(words)

    def assert_equal(self) -> None:
        """Ends the writing; after one more pass both trees are equal by a walk of our own."""
        self.writer.stop()
        done = self.lab.node(self.receiver).nfsha("sync", "--wait", check=False, timeout_s=60)
        assert done.returncode == 0, done.stdout + done.stderr
        assert self.differences() == []

    # -------------------------------------------------------------- one case

    def play(self, case: Case) -> None:
        """Moves the service, with the fault at the boundary; then looks at what is in the end.

        Raises AssertionError and LabError with what was wrong, and with all that both printed.
        """
        with self.judged(str(case)):
            if case.back:
                self._abort_and_want(case.boundary)
            else:
                self._want(case.boundary)
                self._ask_for_a_move()
            with self._stands_at(case.boundary) as go_on:
                self._do(case.fault, go_on)

    @contextlib.contextmanager
    def judged(self, what: str) -> Iterator[None]:
        """What is done inside ends well: the pair comes to rest, with all that it must have.

        Raises AssertionError with what was wrong, and with all that both printed.
        """
        self._begin()
        try:
            yield
            self._end_asking()
            self.wait_at_rest()
            self._look()
        except (AssertionError, LabError, ControlError, CommandError) as error:
            raise AssertionError(f"{what}: {error}\n{self._story()}") from error

    def wait_asked(self, within_s: float = 20.0) -> None:
        """Asks the giver for a move until it takes it."""
        deadline = time.monotonic() + within_s
        while True:
            try:
                to = ROLES[self.receiver]
                plan = self.ask(self.giver, "handover-plan", to=to)
                answer = str(plan["guards"])
                if plan["ok"]:
                    asked = self.ask(self.giver, "handover", to=to, plan=plan["plan"])
                    answer = str(asked)
                    if asked["ok"]:
                        return
            except (ControlError, CommandError) as error:
                answer = str(error)
            if time.monotonic() > deadline:
                raise LabError(f"no move within {within_s} s: {answer}")
            time.sleep(0.01)

    def _end_asking(self) -> None:
        for one in self._asking:
            one.join(2 * ASKED_WITHIN_S)
            assert not one.is_alive(), "a command hangs"
        self._asking.clear()

    def _begin(self) -> None:
        for name in ROLES:
            self._told[name] = (self.lab.folder / name / "log" / "daemon.log").stat().st_size
            self.steps[name].forget()
        self._since_ns = self.lab.now_ns()
        self._receives = self.receiver
        self._answers.clear()

    def _story(self) -> str:
        return "\n".join(f"--- {name} ---\n{self.printed(name)}" for name in ROLES)

    @contextlib.contextmanager
    def stopped_at(self, boundary: Boundary) -> Iterator[Callable[[], None]]:
        """Asks for a move, and comes back when the daemon stands at the boundary.

        What it gives lets the daemon go on; the end of the block does it too.
        """
        self._want(boundary)
        self._ask_for_a_move()
        with self._stands_at(boundary) as go_on:
            yield go_on

    def _want(self, boundary: Boundary) -> None:
        name = self.node_of(boundary.action.side)
        self.steps[name].want(boundary.edge, boundary.action.name)

    def _ask_for_a_move(self) -> None:
        giver, to, plan = self.giver, ROLES[self.receiver], self._plan
        self._beside(lambda: self._approve(giver, to, plan))

    def _beside(self, ask: Callable[[], dict[str, Any]]) -> None:
        """Beside the test: the daemon that is asked may stand still, or be killed, first."""

        def asked() -> None:
            try:
                self._answers.append(str(ask()))
            except (ControlError, CommandError) as error:
                self._answers.append(str(error))

        self._asking.append(threading.Thread(target=asked))
        self._asking[-1].start()

    def _approve(self, giver: str, to: str, plan: str) -> dict[str, Any]:
        """As the operator that was shown this plan; one that has changed since, but holds, anew."""
        try:
            return self.ask(giver, "handover", to=to, plan=plan)
        except CommandError as error:
            if not error.details.get("ok"):
                raise
            return self.ask(giver, "handover", to=to, plan=str(error.details["plan"]))

    def _abort_and_want(self, boundary: Boundary) -> None:
        """Moves as far as the proof, and aborts there; then this boundary is to be stopped at."""
        with self.stopped_at(PROOF) as go_on:
            self._want(boundary)
            go_on()
            receiver = self.receiver
            self._beside(lambda: self.ask(receiver, "abort"))

    @contextlib.contextmanager
    def _stands_at(self, boundary: Boundary) -> Iterator[Callable[[], None]]:
        name = self.node_of(boundary.action.side)
        steps, daemon = self.steps[name], self.daemon(name)
        if not steps.reached(REACHED_WITHIN_S):
            raise LabError(f"that boundary was never reached (asked: {self._answers})")
        gone_on = False

        def go_on() -> None:
            nonlocal gone_on
            if not gone_on and daemon.alive:
                steps.go_on()
            gone_on = True

        try:
            yield go_on
        finally:
            go_on()

    def _do(self, fault: Fault, go_on: Callable[[], None]) -> None:
        giver, receiver = self.giver, self.receiver
        name, other = (giver, receiver) if fault.of_giver else (receiver, giver)
        match fault:
            case Fault.KILL_GIVER | Fault.KILL_RECEIVER:
                self._kill(name, go_on)
            case Fault.DEATH_OF_GIVER | Fault.DEATH_OF_RECEIVER:
                self._power(name, other, go_on)
            case Fault.CUT_GIVER | Fault.CUT_RECEIVER:
                self._cut_off(name, other, go_on)
            case Fault.CUT_DATA:
                self._cut_data(go_on)
            case Fault.FULL_STATE_OF_GIVER | Fault.FULL_STATE_OF_RECEIVER:
                self._fill(name, STATE, go_on)
            case Fault.FULL_VOLUME_OF_GIVER | Fault.FULL_VOLUME_OF_RECEIVER:
                self._fill(name, "/nfs/data/lost+found", go_on)
            case Fault.RSYNC_KILLED:
                self._kill_rsync(go_on)

    def _kill(self, name: str, go_on: Callable[[], None]) -> None:
        self.daemon(name).kill()
        go_on()
        time.sleep(SYSTEMD_RESTARTS_AFTER_S)
        self.start(name)

    def _power(self, name: str, other: str, go_on: Callable[[], None]) -> None:
        stopped = self.daemon(name)
        self.lab.power_cut(name)
        assert not stopped.alive
        go_on()
        self._until(lambda: self.status(other).get("phase") == "ACTIVE", TAKEN_WITHIN_S)
        self.steps[name].forget()
        self.lab.boot(name)
        self.start(name)

    def _cut_off(self, name: str, other: str, go_on: Callable[[], None]) -> None:
        self.lab.cut(name)
        go_on()
        served = lambda: self.status(other).get("phase") == "ACTIVE"  # noqa: E731
        self._until(served, TAKEN_WITHIN_S)
        self.lab.heal()

    def _cut_data(self, go_on: Callable[[], None]) -> None:
        self.lab.cut("a", "b", network="hb")  # heartbeats go on over the other one
        go_on()
        self._until_the_move_ended()
        self.lab.heal()

    def _fill(self, name: str, folder: str, go_on: Callable[[], None]) -> None:
        file = self.lab.node(name).path(folder) / "fill"
        try:
            fill(file)
            go_on()
            self._until_the_move_ended()
        finally:
            file.unlink(missing_ok=True)

    def _kill_rsync(self, go_on: Callable[[], None]) -> None:
        self._kill_each_rsync()
        go_on()
        deadline = time.monotonic() + RSYNC_DIES_FOR_S
        while time.monotonic() < deadline:
            self._kill_each_rsync()
            time.sleep(0.01)

    def _kill_each_rsync(self) -> None:
        for name in ROLES:
            with contextlib.suppress(psutil.NoSuchProcess):
                daemon = psutil.Process(self.daemon(name).pid)
                for one in daemon.children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        if one.name() == "rsync":
                            one.kill()

    def no_move(self) -> bool:
        """Neither node works on a handover, or was asked for one."""
        found = [self.status(name) for name in ROLES]
        return all(one and one["handover"]["step"] is None for one in found)

    def _until_the_move_ended(self) -> None:
        least_s, most_s = ILL_S
        begun_s = time.monotonic()
        self._until(lambda: time.monotonic() - begun_s > least_s and self.no_move(), most_s)

    @staticmethod
    def _until(done: Callable[[], bool], within_s: float) -> None:
        """Waits for that, or so long."""
        deadline = time.monotonic() + within_s
        while not done() and time.monotonic() < deadline:
            time.sleep(0.05)

    # -------------------------------------------------------------- what is in the end

    def _look(self) -> None:
        acked = set(self.writer.wait_acked(3).acked)
        self._assert_never_two()
        self._assert_one_authority()
        self._assert_closed(self.receiver)
        self._assert_all_records(acked)
        for name in ROLES:
            for sign in ("Traceback", "internal error", "an invariant"):
                assert sign not in self.printed(name), f"{name} printed {sign!r}"

    def _assert_never_two(self) -> None:
        seen = self.lab.look()
        overlap_ms = seen.address_overlap_ms(VIP, self._since_ns)
        assert overlap_ms == 0.0, seen.render(VIP, self._since_ns)

    def _assert_one_authority(self) -> None:
        journals = [self._journal(name) for name in ROLES]
        epochs = [one["epoch"] for one in journals]
        assert epochs[0] == epochs[1], journals
        assert epochs[0]["authority"] == ROLES[self.giver], journals
        for one in journals:
            given = one["prepared"]
            assert given is None or given["number"] <= epochs[0]["number"], journals

    def _journal(self, name: str) -> dict[str, Any]:
        content = self.lab.node(name).path(f"{STATE}/journal").read_bytes()
        return dict(json.loads(content)["payload"])

    def _assert_closed(self, name: str) -> None:
        address = PLACES[name].lan.ipv4
        answer = self.lab.c.inside(lambda: rpc_null(address, NFS_PORT, NFS_PROGRAM, 3, 0.2))
        assert answer is None, f"{name} serves clients at its own address"

    def _assert_all_records(self, acked: set[int]) -> None:
        """All are served. Where a copy had to take over from a dead source: or they are kept."""
        missing = acked - set(self.lab.read_records())
        kept = self._kept() if missing else set()
        assert missing <= kept, f"acknowledged, and neither served nor kept: {some(missing - kept)}"
        self._excused |= missing if self._a_copy_took_over() else set()
        lost = missing - self._excused
        assert not lost, f"in quarantine though no copy had to take over: {some(lost)}"

    def _kept(self) -> set[int]:
        found: set[int] = set()
        for name in ROLES:
            for file in (self.here(name) / ".nfsha-quarantine").rglob("records"):
                found |= numbers_in(file)
        return found

    def _a_copy_took_over(self) -> bool:
        """Did a node have to take over what another had served last? What it lacked is kept then.

        The receiver without the proof; or the giver, once the receiver had served.
        """
        receiver = self._receives
        giver = next(name for name in ROLES if name != receiver)
        served = " X20 " in self.printed(receiver)
        return " T20 " in self.printed(receiver) or (served and " T20 " in self.printed(giver))


def some(numbers: set[int]) -> str:
    """How many, and the first and last."""
    return f"{len(numbers)} records ({min(numbers)} to {max(numbers)})"


def numbers_in(file: Path) -> set[int]:
    """The numbers of the records in a file."""
    content = file.read_bytes()
    return {
        number
        for number in range(len(content) // RECORD_BYTES)
        if content[number * RECORD_BYTES :][:RECORD_BYTES].strip(b"\0")
    }


def fill(file: Path) -> None:
    """Takes every free block of the filesystem, the ones kept for root too."""
    with file.open("wb") as out:
        at, step = 0, 1 << 30
        while step >= 512:
            try:
                os.posix_fallocate(out.fileno(), at, step)
                at += step
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                step //= 2

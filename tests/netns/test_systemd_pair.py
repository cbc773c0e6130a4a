"""The unit as shipped, on two machines with a real systemd: what it can do, and how it ends.

One pair for all tests of this file. Each test takes it as the one before left it, whichever node
serves by then, and begins when one serves and the other is a whole replica.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.netns.copies import SYNC, Copies, hanging
from tests.netns.labkit.network import VIP
from tests.netns.labkit.nfs_server import NFS_PORT, rpc_null
from tests.netns.labkit.place import LabError
from tests.netns.labkit.records import Records, RecordWriter
from tests.netns.nspawn import Machine, MachineLab, cgroups_left
from tests.netns.pair import BUSY_MS, Event
from tests.netns.test_handover import Moving, source_that_hangs
from tests.netns.treewalk import differences, make_odd_tree

pytestmark = [pytest.mark.pairs, pytest.mark.timeout(90)]

UNIT_FILE = Path(__file__).parents[2] / "systemd" / "nfsha.service"
_SETTLED_S = 20.0
MAX_STALL_MS = 10_000
"""`handover.max_stall` as shipped."""

HAND_OVER_WITHIN_S = 40
"""So long a stop tries to hand over; `TimeoutStopSec=` of the unit is more than twice that."""


@dataclass(frozen=True)
class Duo:
    """The pair, and who served as the test began."""

    copies: Copies
    active: Machine
    passive: Machine
    began_ms: int

    def wait_move(self, machine: Machine, to: str) -> Event:
        """Waits until a machine came to a phase from another one, since the test began."""
        return self.copies.wait_event(
            machine.name,
            lambda event: event.to == to != event.phase,
            f"move to {to}",
            since_ms=self.began_ms,
            within_s=_SETTLED_S,
        )

    def wait_roles(self, active: Machine, passive: Machine) -> None:
        """Waits until one came to serve, and the other to be a whole replica."""
        self.wait_move(active, "ACTIVE")
        self.wait_move(passive, "PASSIVE")

    def moves(self, machine: Machine) -> list[tuple[str, str]]:
        """Its changes of phase since the test began."""
        return self.copies.moves(machine.name, self.began_ms)

    def move(self) -> Moving:
        """Asks the active node to move the service to the passive one, and watches that."""
        for machine in (self.active, self.passive):  # the guards look where it is installed
            machine.run("mkdir", "-p", "/etc/ganesha")
            machine.run("ln", "-sf", "/etc/nfsha/ganesha.conf", "/etc/ganesha/ganesha.conf")
        command = "switchover" if self.active.name == "a" else "failback"
        return Moving(self.copies, self.active.name, command)

    def sync(self, *argv: str) -> None:
        """`nfsha sync --wait` on the passive node."""
        self.passive.nfsha("sync", "--wait", *argv, timeout_s=60)

    def folder(self, machine: Machine, volume: str = "data") -> Path:
        """A volume, as this process reaches it."""
        return self.copies.here(machine.name, volume)

    def differences(self, volume: str = "data") -> list[str]:
        """What differs between the two copies."""
        return differences(self.folder(self.active, volume), self.folder(self.passive, volume))

    def lock_holders(self) -> dict[str, Any]:
        """Who holds locks, as the node knows that was passive when the test began."""
        answer = json.loads(self.passive.nfsha("clients", "--json").stdout)
        return dict(answer["locks"])

    def write(self, name: str) -> Writing:
        """Begins to write numbered records through the VIP, into a file of this name."""
        records = self.copies.lab.write_records(path=f"/{name}")
        records.wait_acked(20)
        return Writing(self, name, records)

    def assert_never_two(self) -> None:
        """Since the test began."""
        self.copies.assert_never_two(since_ns=self.began_ms * 1_000_000)


@dataclass(frozen=True)
class Writing:
    """A client that writes while a test goes on."""

    duo: Duo
    name: str
    records: RecordWriter

    def end(self, *, moves: int) -> Records:
        """Ends it when it writes again; nothing acknowledged may be missing on the serving node.

        An operation that had its file open at a move may have failed: its handle was stale.
        """
        self.records.wait_acked(20)
        found = self.records.stop()
        assert all("NFS3ERR_STALE" in (one.error or "") for one in found.failed), found.failed
        assert len(found.failed) <= moves, found.failed
        kept = self.duo.copies.lab.read_records(path=f"/{self.name}")
        assert set(found.acked) <= set(kept)
        print(f"{self.name}: the longest stall was {found.longest_stall_ms:.0f} ms")
        return found


class UnitPair(Copies):
    """The pair of this file. `ruined`: it did not settle after some test."""

    ruined = False


def wait(done: Callable[[], bool], what: str, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not done():
        if time.monotonic() > deadline:
            raise LabError(f"no {what} within {within_s} s")
        time.sleep(0.02)


@pytest.fixture(scope="module")
def pair() -> Iterator[UnitPair]:
    """Set up as docs/install.md says, and started; the volume `late` is mounted by nobody."""
    with MachineLab(unmounted=("late",), volume_mib=600) as lab:
        copies = UnitPair(lab, sync=SYNC)
        for name in ("a", "b"):
            lab.machine(name).install_unit()
        copies.start()
        yield copies
    assert cgroups_left() == []


@pytest.fixture
def duo(pair: UnitPair) -> Iterator[Duo]:
    lab = pair.lab
    assert isinstance(lab, MachineLab)
    assert not pair.ruined, "a test before this one left a pair that does not settle"
    machines = [lab.machine("a"), lab.machine("b")]
    try:
        pair.ruined = True
        wait(lambda: _settled(pair, machines), "settled pair", _SETTLED_S)
        pair.ruined = False
        if pair.phase("a") != "ACTIVE":
            machines.reverse()
        for one in machines:  # each test stops and starts: the start limit is not what is tested
            one.systemctl("reset-failed", "nfsha")
        active, passive = machines
        yield Duo(pair, active, passive, pair.now_ms())
    finally:
        for machine in (lab.machine("a"), lab.machine("b")):
            for name, tail in machine.log_tails(60):  # pytest shows it when the test failed
                print(f"--- {machine.name}: {name}\n{tail}")


def _settled(pair: Copies, machines: list[Machine]) -> bool:
    phases = sorted(pair.phase(one.name) for one in machines)
    return phases == ["ACTIVE", "PASSIVE"] and all(
        one.show("ActiveState") == "active" for one in machines
    )


# ------------------------------------------------------------------ what the unit lets it do


def test_everything_is_copied_found_changed_verified_and_put_aside(duo: Duo) -> None:
    make_odd_tree(duo.folder(duo.active) / "odd", many=100)
    duo.sync("data")
    assert duo.differences() == []
    before = duo.copies.copy(duo.passive.name)
    (duo.folder(duo.active) / "odd" / "later").write_bytes(b"found by the journal of changes")
    duo.sync("data")
    after = duo.copies.copy(duo.passive.name)
    assert after["last"]["walk"] == "folders"
    assert after["full_walks"] == before["full_walks"]
    rotten = duo.folder(duo.passive) / "odd" / "later"
    times = rotten.stat()
    rotten.write_bytes(b"x" * times.st_size)
    os.utime(rotten, ns=(times.st_atime_ns, times.st_mtime_ns))
    duo.sync("data", "--verify")
    assert duo.differences() == []
    listed = json.loads(duo.passive.nfsha("quarantine", "list", "--json").stdout)
    (entry,) = [one["name"] for one in listed["entries"]]
    duo.passive.nfsha("sync", "--pause")
    duo.passive.nfsha("quarantine", "restore", entry, "odd/later", "--to", "seen")
    found = duo.folder(duo.passive) / "seen" / "odd" / "later"
    assert found.read_bytes() == b"x" * times.st_size
    shutil.rmtree(duo.folder(duo.passive) / "seen")
    duo.passive.nfsha("sync", "--resume")
    for machine in (duo.active, duo.passive):
        refused = r"^(?:WARNING|ERROR) .*(?:CAP_|permitted|denied|read-only|cannot be closed).*"
        assert re.findall(refused, machine.journal(), re.MULTILINE | re.IGNORECASE) == []


def test_the_daemon_has_the_powers_that_the_unit_names_and_no_more(duo: Duo) -> None:
    pid = duo.copies.daemon(duo.active.name).pid
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    powers = " ".join(
        re.findall(r"^CapabilityBoundingSet=(.*)", UNIT_FILE.read_text(), re.MULTILINE)
    )
    assert int(status["CapEff"], 16) == sum(1 << _CAPABILITIES[one] for one in powers.split())
    # A process of the unit may make device nodes and open none.
    group = "/sys/fs/cgroup/system.slice/nfsha.service/cgroup.procs"
    opens = f"echo $$ > {group} && head -c 1 /dev/nfsha-data"
    assert "Operation not permitted" in duo.active.run("sh", "-c", opens, check=False).stderr
    assert duo.active.run("head", "-c", "1", "/dev/nfsha-data", check=False).returncode == 0


_CAPABILITIES = {  # linux/capability.h
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_FOWNER": 3,
    "CAP_FSETID": 4,
    "CAP_SETGID": 6,
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_IPC_LOCK": 14,
    "CAP_SYS_CHROOT": 18,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_NICE": 23,
    "CAP_MKNOD": 27,
    "CAP_SETFCAP": 31,
}


# ------------------------------------------------------------------ ends of the daemon


def test_after_a_kill_systemd_starts_it_again_and_no_rsync_is_left(duo: Duo) -> None:
    daemon = duo.copies.daemon(duo.active.name)
    pid = daemon.pid
    children = [one for one in duo.active.processes_of_unit() if one.pid != pid]
    assert any(one.name() == "rsync" for one in children)
    daemon.signal(signal.SIGKILL)
    wait(lambda: not any(one.is_running() for one in children), "end of the children")
    # Back within its lease it goes on; on a machine too busy for that the other one takes over.
    back = duo.copies.wait_event(
        duo.active.name,
        lambda event: event.to in ("ACTIVE", "PASSIVE") and event.to != event.phase,
        "return",
        since_ms=duo.began_ms,
        within_s=_SETTLED_S,
    )
    assert duo.moves(duo.passive) == ([] if back.to == "ACTIVE" else TAKEOVER)
    duo.assert_never_two()


TAKEOVER = [("PASSIVE", "TAKEOVER"), ("TAKEOVER", "ACTIVE")]


def test_a_kill_in_the_middle_of_a_pass_leaves_no_rsync(duo: Duo) -> None:
    duo.passive.nfsha("sync", "--bandwidth", "1MB")
    (duo.folder(duo.active) / "large").write_bytes(os.urandom(16 << 20))
    wait(lambda: _is_received(duo.folder(duo.passive), "large"), "transfer under way")
    main = duo.copies.daemon(duo.passive.name).pid
    children = [one for one in duo.passive.processes_of_unit() if one.pid != main]
    assert children
    duo.copies.daemon(duo.passive.name).signal(signal.SIGKILL)
    wait(lambda: not any(one.is_running() for one in children), "end of the children")
    assert not (duo.folder(duo.passive) / "large").exists()
    duo.wait_move(duo.passive, "PASSIVE")
    duo.sync("data")
    assert duo.differences() == []
    assert duo.moves(duo.active) == []


def _is_received(volume: Path, name: str) -> bool:
    """Whether rsync's temporary file is there: beside its place, or in the folder for such.

    Only the first has a dot in front (rsync: receiver.c, get_tmpname).
    """
    return any(volume.glob(f".{name}.*")) or any(volume.glob(f".nfsha-incoming/{name}.*"))


def test_a_daemon_that_was_ended_by_hand_is_started_again(duo: Duo) -> None:
    duo.copies.daemon(duo.passive.name).signal(signal.SIGTERM)
    duo.wait_move(duo.passive, "PASSIVE")
    assert duo.moves(duo.active) == []


def test_a_daemon_that_hangs_is_ended_by_the_watchdog(duo: Duo) -> None:
    duo.copies.daemon(duo.active.name).freeze()
    duo.wait_roles(duo.passive, duo.active)
    assert "Watchdog timeout" in duo.active.journal()
    duo.assert_never_two()


# ------------------------------------------------------------------ stop and restart


def test_a_stop_and_a_start_of_the_passive_one_disturb_no_client(duo: Duo) -> None:
    prober = duo.copies.lab.probe()
    prober.wait_success()  # the prober's own start is no outage
    began_ns = duo.copies.lab.now_ns()
    duo.passive.systemctl("stop", "nfsha")
    time.sleep(2)  # longer than any evidence but the promise lasts
    duo.passive.systemctl("start", "nfsha")
    duo.wait_move(duo.passive, "PASSIVE")
    assert prober.stop().outage_ms(began_ns) < BUSY_MS
    assert duo.moves(duo.active) == []


def test_a_restart_of_the_active_one_keeps_the_address(duo: Duo) -> None:
    prober = duo.copies.lab.probe()
    prober.wait_success()
    writing = duo.write("restarted")
    began_ns = duo.copies.lab.now_ns()
    duo.active.systemctl("restart", "nfsha")
    duo.wait_move(duo.active, "ACTIVE")
    assert prober.stop().outage_ms(began_ns) < BUSY_MS
    assert writing.end(moves=0).failed == ()
    assert duo.moves(duo.passive) == []
    (hold,) = [hold for hold in duo.copies.lab.look().holds(VIP) if hold.open]
    assert (hold.node, hold.start_ns < duo.began_ms * 1_000_000) == (duo.active.name, True)


def test_a_restart_of_the_giver_ends_a_move_that_holds_nobody_yet(duo: Duo) -> None:
    writing = duo.write("not-moved")
    with hanging(duo.copies, duo.active.name):
        moving = duo.move()
        duo.wait_move(duo.passive, "PRESYNC")
        duo.active.systemctl("restart", "nfsha")
    moving.join(_SETTLED_S)
    assert moving.code == 4, moving.told
    assert "nothing has moved: repeat the command" in " ".join(moving.told.split())
    assert writing.end(moves=0).longest_stall_ms < BUSY_MS
    assert duo.moves(duo.active) == [("STARTING", "ACTIVE")]
    assert duo.moves(duo.passive) == [("PASSIVE", "PRESYNC"), ("PRESYNC", "PASSIVE")]


def test_a_restart_of_the_giver_waits_for_a_move_that_holds_clients(duo: Duo) -> None:
    writing = duo.write("moved")
    moving = duo.move()
    with source_that_hangs(duo.copies, duo.active.name):
        duo.active.systemctl("restart", "--no-block", "nfsha")
        words = "waits for the handover that is under way before it restarts"
        wait(lambda: words in duo.active.journal("--lines=40"), "restart that waits")
    duo.wait_roles(duo.passive, duo.active)
    moving.join(_SETTLED_S)
    assert moving.code == 0, moving.told
    assert writing.end(moves=1).longest_stall_ms < MAX_STALL_MS
    moved = [one.row for one in duo.copies.events(duo.passive.name, duo.began_ms)]
    assert "X20" in moved
    assert "T20" not in moved
    duo.assert_never_two()


def test_a_stop_of_the_active_one_gives_the_address_to_the_other(duo: Duo) -> None:
    writing = duo.write("stopped")
    holds_locks = f"10.77.0.{99 if duo.active.name == 'a' else 98}"  # statd keeps a file for it
    duo.active.path(f"/var/lib/nfs/sm/{holds_locks}").touch()
    wait(lambda: holds_locks in duo.lock_holders()["saved"], "list of lock holders there")
    duo.active.systemctl("stop", "nfsha")
    assert holds_locks in duo.lock_holders()["here"]
    assert "told to claim them again: " in duo.passive.journal()
    assert "not told of the move" not in duo.passive.journal()  # no socket at the VIP, or the like
    lab = duo.copies.lab
    assert writing.end(moves=1).longest_stall_ms < MAX_STALL_MS
    assert duo.active.name not in lab.look().holders(VIP)
    assert "hands over before it stops" in duo.active.journal("--lines=40")
    moved = [one.row for one in duo.copies.events(duo.passive.name, duo.began_ms)]
    assert "X20" in moved
    assert "T20" not in moved
    closed = duo.active.addresses.lan.ipv4
    assert lab.c.inside(lambda: rpc_null(closed, NFS_PORT, 100003, 3)) is None
    duo.active.systemctl("start", "nfsha")
    duo.wait_roles(duo.passive, duo.active)
    duo.active.nfsha("sync", "--wait", "data", timeout_s=60)  # what was written while it was away
    assert duo.differences() == []
    duo.assert_never_two()


@pytest.mark.slow
def test_a_stop_that_has_no_time_to_hand_over_is_a_release(duo: Duo) -> None:
    writing = duo.write("released")
    duo.passive.nfsha("sync", "--bandwidth", "1MB")
    large = duo.folder(duo.active) / "too-large"
    large.write_bytes(os.urandom(60 << 20))
    began_s = time.monotonic()
    duo.active.systemctl("stop", "nfsha")
    took_s = time.monotonic() - began_s
    assert HAND_OVER_WITHIN_S <= took_s < 1.5 * HAND_OVER_WITHIN_S, took_s
    assert duo.active.show("Result") == "success"
    told = duo.active.journal("--lines=60")
    assert "the handover takes too long for a stop" in told
    assert "stops without having handed over: " in told
    duo.wait_move(duo.passive, "ACTIVE")
    moved = [one.row for one in duo.copies.events(duo.passive.name, duo.began_ms)]
    assert "T20" in moved
    writing.records.wait_acked(20)
    writing.records.stop()
    duo.passive.nfsha("sync", "--bandwidth", "default")
    large.unlink()
    duo.active.systemctl("start", "nfsha")
    duo.wait_roles(duo.passive, duo.active)
    duo.assert_never_two()


def test_no_address_stays_where_the_daemon_was_killed_in_its_stop(duo: Duo) -> None:
    # The lease is made long, so that nothing but ExecStopPost can have ended it.
    forever = f"ip address change {VIP}/32 dev eth0 valid_lft 600 preferred_lft 600"
    with duo.active.drop_in(f"ExecStop=+/bin/sh -c 'kill -KILL $MAINPID; {forever}'"):
        duo.active.systemctl("stop", "nfsha")
        assert f"removed {VIP} from eth0" in duo.active.journal("--lines=20")
        assert duo.active.name not in duo.copies.lab.look().holders(VIP)
    duo.wait_move(duo.passive, "ACTIVE")
    duo.active.systemctl("start", "nfsha")
    duo.wait_roles(duo.passive, duo.active)


def test_an_error_in_the_configuration_is_told_once_and_is_all_to_mend(duo: Duo) -> None:
    file = duo.passive.path("/etc/nfsha/nfsha.toml")
    good = file.read_text()
    duo.passive.systemctl("stop", "nfsha")
    file.write_text(good + "[nsf]\n")
    try:
        done = duo.passive.systemctl("start", "nfsha", check=False)
        assert "Job for nfsha.service failed" in done.stderr
        time.sleep(1)  # ten times RestartSec
        assert duo.passive.journal().count("nsf = ") == 1
        assert (duo.passive.show("ActiveState"), duo.passive.show("NRestarts")) == ("failed", "0")
    finally:
        file.write_text(good)
    duo.passive.systemctl("start", "nfsha")
    duo.wait_move(duo.passive, "PASSIVE")


# ------------------------------------------------------------------ machines


def test_a_power_cut_is_a_takeover_and_the_machine_comes_back_by_itself(duo: Duo) -> None:
    duo.copies.lab.power_cut(duo.active.name)
    duo.wait_move(duo.passive, "ACTIVE")
    duo.copies.lab.boot(duo.active.name)
    duo.active.follow()
    duo.wait_roles(duo.passive, duo.active)
    duo.assert_never_two()


def test_a_shutdown_hands_over_and_the_machine_comes_back(duo: Duo) -> None:
    writing = duo.write("shut-down")
    duo.active.shut_down()
    given = [one.row for one in duo.copies.events(duo.active.name, duo.began_ms)]
    assert "Q10" in given
    duo.wait_move(duo.passive, "ACTIVE")
    assert writing.end(moves=1).longest_stall_ms < MAX_STALL_MS
    moved = [one.row for one in duo.copies.events(duo.passive.name, duo.began_ms)]
    assert "X20" in moved
    assert "T20" not in moved
    duo.copies.lab.power_cut(duo.active.name)  # only tidies up: it is off
    duo.copies.lab.boot(duo.active.name)
    duo.active.follow()
    duo.wait_roles(duo.passive, duo.active)
    duo.assert_never_two()


# ------------------------------------------------------------------ volumes that come and go


def test_a_volume_that_is_mounted_later_is_copied_and_can_be_unmounted(duo: Duo) -> None:
    """The last test: without a volume that once was paired, no node is a whole replica."""
    for machine in (duo.active, duo.passive):
        machine.run("mount", "--mkdir", "/dev/nfsha-late", "/nfs/late")
    (duo.folder(duo.active, "late") / "file").write_text("content")
    arrived = duo.folder(duo.passive, "late") / "file"
    wait(arrived.exists, "copy of the volume that came later", _SETTLED_S)
    duo.sync("late")  # to the end: its stamp is written last
    assert duo.differences("late") == []
    for machine in (duo.active, duo.passive):
        machine.run("umount", "--lazy", "/nfs/late")  # a pass may be looking at it
        wait(lambda machine=machine: _nowhere_mounted(machine), "end of the mount in the unit")  # type: ignore[misc]


def _nowhere_mounted(machine: Machine) -> bool:
    """The kernel opens a device so only when it is mounted nowhere, in no namespace."""
    alone = "import os; os.open('/dev/nfsha-late', os.O_RDONLY | os.O_EXCL)"
    return machine.run("/opt/nfsha/bin/python3", "-c", alone, check=False).returncode == 0

"""Each guard of a planned move, provoked for real on one pair: refused, and nothing has changed.

The standby serves, so that the move is a failback. The tests of a module share the pair, one after
the other; what a test breaks it mends, and the next one begins with a table that is all in order.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from nfsha.config import load
from nfsha.daemon.node_guards import GUARDS
from nfsha.host.control import ControlClient
from nfsha.replica.source.source import RSYNC
from tests.netns.copies import SYNC, Copies, hanging
from tests.netns.lab import STORAGE, Lab
from tests.netns.labkit.network import PLACES, VIP
from tests.netns.labkit.nfs_server import ganesha_config
from tests.netns.pair import Pair

pytestmark = pytest.mark.timeout(120)

GIVER, RECEIVER = "b", "a"
MOVE_S = 60.0
FILES = 150
"""More than may be deleted without a word (`sync.max_deletes`)."""
# A server that speaks v4 must not make its node unfit here: else another guard would say it too.
TABLES = 'version4 = "warn"\n[sync]\nevery = "1h"\njitter = "0s"\n'
"""Passes come by a command only, so that what one of them finds is there when a test looks."""

MOVING = frozenset(
    {"ACTIVE", "PRESYNC", "FREEZING", "PREPARED", "FINAL_SYNC", "RESTORING", "TAKEOVER", "ISOLATED"}
)
"""A refused move leads to none of these phases, nor out of one."""

FACTS = frozenset({"facts of the other node", *GUARDS})
"""The guards that cannot be judged without what the other node tells of itself."""
ILL = frozenset({"services and storage", "one serves, the other waits"})

_STRAY = """
import socket, sys
kept = socket.create_connection((sys.argv[1], 2049))
print("connected", flush=True)
kept.recv(1)
"""

_THIEF = """
import socket, sys, time
while True:
    try:
        taken = socket.create_server((sys.argv[1], int(sys.argv[2])))
        break
    except OSError:
        time.sleep(0.001)
print("taken", flush=True)
time.sleep(120)
"""

# Another release of nfsha, on a host whose wall clock is an hour ahead.
_OTHER = """
import time
import nfsha
nfsha.__version__ = "0.0.9"
_right = time.time_ns
time.time_ns = lambda: _right() + 3_600_000_000_000
"""


@dataclass(frozen=True)
class Asked:
    """What a move was answered: its exit code, and the table of guards by name."""

    code: int
    guards: dict[str, dict[str, Any]]
    answer: dict[str, Any]

    @property
    def failing(self) -> set[str]:
        return {name for name, one in self.guards.items() if not one["ok"]}

    def found(self, name: str) -> str:
        return str(self.guards[name]["found"])


def ask(copies: Pair, *argv: str, on: str = RECEIVER, command: str = "failback") -> Asked:
    """Asks for a move on a node."""
    done = copies.lab.node(on).nfsha(command, "--json", *argv, check=False, timeout_s=MOVE_S)
    answer = json.loads(done.stdout)
    table = {one["name"]: one for one in answer.get("guards", ())}
    return Asked(done.returncode, table, answer)


def ready(copies: Copies) -> None:
    """Waits until every guard lets the move pass."""
    copies.wait(lambda: ask(copies, "--dry-run").code == 0, "table that is all in order")


def standing(copies: Copies) -> dict[str, object]:
    """All of both nodes that a refused move must leave as it is."""
    found: dict[str, object] = {}
    for name in ("a", "b"):
        node = copies.lab.node(name)
        addresses = json.loads(node.run("ip", "-j", "addr").stdout)
        found[f"addresses of {name}"] = {
            (one["ifname"], entry["local"]) for one in addresses for entry in one["addr_info"]
        }
        rules = node.run("nft", "-s", "list", "ruleset").stdout
        found[f"ruleset of {name}"] = re.sub(r"timeout \d+ms", "timeout", rules)  # the lease runs
        journal = copies.lab.folder / name / "lib" / "journal"
        found[f"journal of {name}"] = journal.read_bytes()
        found[f"tree of {name}"] = tree(node.path("/nfs/data"))
        steps = [move for move in copies.moves(name) if MOVING & {*move}]
        found[f"steps of {name}"] = steps
    return found


def tree(root: Path) -> dict[str, tuple[int, ...] | bytes]:
    """What is in a folder: kind and mode, owner, size, time, content. nfsha writes in its root."""
    found: dict[str, tuple[int, ...] | bytes] = {}
    for folder, _, files in os.walk(root):
        for path in (Path(folder), *(Path(folder) / name for name in files)):
            status = path.lstat()
            kept = (
                status.st_mode,
                status.st_uid,
                status.st_gid,
                status.st_size,
                status.st_mtime_ns,
            )
            name = str(path.relative_to(root))
            found[name] = kept if path != root else kept[:3]
            if path.is_file() and not path.is_symlink():
                found[f"{name} holds"] = path.read_bytes()
    return found


@dataclass(frozen=True)
class Tried:
    """A move that was asked for, and what stood before and after it."""

    before: dict[str, object]
    asked: Asked
    after: dict[str, object]

    def assert_refused(self, wanted: AbstractSet[str]) -> None:
        """Exit 3, exactly these guards fail, and nothing has changed."""
        assert self.asked.code == 3, self.asked.answer
        said = {one: self.asked.found(one) for one in self.asked.failing}
        assert self.asked.failing == wanted, said
        for what, was in self.before.items():
            assert self.after[what] == was, what


def tried(copies: Copies, on: str = RECEIVER, command: str = "failback") -> Tried:
    """Asks for the move, on a pair where it must be refused."""
    before = standing(copies)
    asked = ask(copies, "--yes", on=on, command=command)
    return Tried(before, asked, standing(copies))


@pytest.fixture(scope="module")
def copies(make_module_lab: Callable[..., Lab]) -> Copies:
    """The standby serves, and the primary is a whole replica."""
    lab = make_module_lab()
    copies = Copies(lab, sync=TABLES)
    other = os.urandom(32).hex()
    for name in STORAGE:  # two keys on both: the second one only opens
        key_file = lab.node(name).path("/etc/nfsha/cluster.key")
        key_file.write_text(key_file.read_text() + other + "\n")
    folder = copies.here("a") / "folder"
    folder.mkdir()
    for number in range(FILES):
        (folder / f"file-{number}").write_text(f"{number}")
    copies.settle_whole()
    moved = ask(copies, "--yes", command="switchover")
    assert moved.code == 0, moved.answer
    copies.wait_phase("a", "PASSIVE", since_ms=0, within_s=20)
    return copies


# ------------------------------------------------------------------ what breaks, and is mended


@contextmanager
def paused(copies: Copies) -> Iterator[None]:
    node = copies.lab.node(RECEIVER)
    node.nfsha("sync", "--pause")
    yield
    node.nfsha("sync", "--resume")


@contextmanager
def without_identity(copies: Copies) -> Iterator[None]:
    file = copies.here(RECEIVER) / ".nfsha-volume"
    content = file.read_bytes()
    file.unlink()
    yield
    file.write_bytes(content)


@contextmanager
def unmounted(copies: Copies) -> Iterator[None]:
    node = copies.lab.node(RECEIVER)
    since_ms = copies.now_ms()
    node.run("umount", "-l", "/nfs/data")
    copies.wait_phase(RECEIVER, "FAULT", since_ms=since_ms)
    yield
    image = copies.lab.folder / f"{RECEIVER}-data.img"
    node.run("mount", "-o", "loop", image, "/nfs/data")


@contextmanager
def read_only(copies: Copies) -> Iterator[None]:
    node = copies.lab.node(RECEIVER)
    node.run("mount", "-o", "remount,ro", "/nfs/data")
    yield
    node.run("mount", "-o", "remount,rw", "/nfs/data")


@contextmanager
def another_server(copies: Copies) -> Iterator[None]:
    """It speaks v4, over UDP too, and another number stands in its file handles."""
    nfs = copies.lab.node(RECEIVER).nfs
    nfs.stop()
    wrong = ganesha_config(nfs.mountpoints, "3,4", udp=True).replace("Export_Id=1;", "Export_Id=2;")
    nfs.place.path("/etc/ganesha/ganesha.conf").write_text(wrong)
    nfs.start_on_what_is_there()
    yield
    nfs.stop()
    nfs.start()


@contextmanager
def no_server(copies: Copies) -> Iterator[None]:
    nfs = copies.lab.node(RECEIVER).nfs
    nfs.stop()
    copies.wait_phase(RECEIVER, "FAULT", since_ms=copies.now_ms() - 1000)
    yield
    nfs.start()


@contextmanager
def v4_in_the_file(copies: Copies) -> Iterator[None]:
    """The server on the giver refuses v4 now, and will speak it when it starts next."""
    file = copies.lab.node(GIVER).path("/etc/ganesha/ganesha.conf")
    text = file.read_text()
    file.write_text(text.replace("Protocols = 3;", "Protocols = 3, 4;"))
    yield
    file.write_text(text)


@contextmanager
def no_rsync(copies: Copies) -> Iterator[None]:
    node = copies.lab.node(RECEIVER)
    node.run("mount", "--bind", "/bin/true", RSYNC)
    yield
    node.run("umount", RSYNC)


@contextmanager
def another_holder(copies: Copies) -> Iterator[None]:
    """A third machine answers for the VIP."""
    interface = PLACES["w"].lan.interface
    copies.lab.w.run("ip", "addr", "add", f"{VIP}/32", "dev", interface)
    yield
    copies.lab.w.run("ip", "addr", "del", f"{VIP}/32", "dev", interface)


@contextmanager
def in_maintenance(copies: Copies) -> Iterator[None]:
    node = copies.lab.node(RECEIVER)
    node.nfsha("maintenance", "on")
    yield
    node.nfsha("maintenance", "off")


@contextmanager
def port_taken(copies: Copies) -> Iterator[None]:
    """Another program has the port of the giver's rsync daemon, which was killed."""
    node = copies.lab.node(GIVER)
    settings = load(node.path("/etc/nfsha/nfsha.toml"))
    where = [str(settings.sync_link.local), str(settings.sync.port)]
    thief = node.spawn([sys.executable, "-c", _THIEF, *where], name="thief")
    for one in psutil.Process(copies.daemon(GIVER).pid).children(recursive=True):
        if one.name() == "rsync":
            one.kill()
    copies.wait(lambda: "taken" in thief.output(), "taken port")
    copies.wait(lambda: "source" in str(node.status()["alarms"]), "alarm of the source")
    yield
    thief.kill()


@contextmanager
def journal_unwritable(copies: Copies) -> Iterator[None]:
    """What the journal writes first is a folder, which no write replaces."""
    node = copies.lab.node(RECEIVER)
    blocked = node.path("/var/lib/nfsha/.journal.new")
    blocked.mkdir()
    node.nfsha("maintenance", "on", check=False)
    copies.wait(lambda: "journal" in str(node.status()["alarms"]), "alarm of the journal")
    yield
    blocked.rmdir()
    node.nfsha("maintenance", "off", check=False)


@contextmanager
def large_packets_lost(copies: Copies) -> Iterator[None]:
    """Heartbeats pass, what is longer does not: the wrong MTU somewhere on the way."""
    node = copies.lab.node(GIVER)
    node.run("nft", "add table inet narrow")
    node.run("nft", "add chain inet narrow way { type filter hook output priority 0; }")
    node.run("nft", "add rule inet narrow way udp length > 600 drop")
    yield
    node.run("nft", "delete table inet narrow")


@contextmanager
def many_deleted(copies: Copies) -> Iterator[None]:
    """More deletions than are made without an operator's word."""
    node = copies.lab.node(RECEIVER)
    for number in range(FILES):
        (copies.here(GIVER) / "folder" / f"file-{number}").unlink()
    node.nfsha("sync", "--wait", check=False)
    assert copies.copy(RECEIVER)["state"] == "held"
    yield
    plan = copies.copy(RECEIVER)["plan"]["hash"]
    node.nfsha("sync", "--wait", "data", "--accept-deletes", plan)


@contextmanager
def newer_stamp(copies: Copies) -> Iterator[None]:
    """Of a reign of the receiver's own, which its journal forgot: the system disk was restored."""
    with restamped(copies, ahead=1, authority="primary"):
        yield


@contextmanager
def stamp_of_another_history(copies: Copies) -> Iterator[None]:
    """Two pairs have made an epoch of this number: the volume was mounted in the other one."""
    with restamped(copies, ahead=0, authority="standby"):
        yield


@contextmanager
def restamped(copies: Copies, ahead: int, authority: str) -> Iterator[None]:
    node, stamp = copies.lab.node(RECEIVER), copies.here(RECEIVER) / ".nfsha-stamp"
    content = stamp.read_text()
    since_ms = copies.now_ms()
    stamp.write_text(f"{int(content.split()[0]) + ahead} {'f' * 16} {authority}\n")
    copies.wait_phase(RECEIVER, "RETURNED", since_ms=since_ms)
    node.nfsha("sync", "--wait", check=False)
    yield
    stamp.write_text(content)
    node.nfsha("sync", "--wait")


@contextmanager
def behind(copies: Copies) -> Iterator[None]:
    """The giver made a new epoch while the receiver was down, and that one cannot write it."""
    node = copies.lab.node(RECEIVER)
    copies.daemon(RECEIVER).kill()
    assert copies.daemon(GIVER).stop() == 0
    since_ms = copies.now_ms()
    copies.start(GIVER)
    copies.wait_phase(GIVER, "WAITING", since_ms=since_ms)
    copies.lab.node(GIVER).nfsha("activate", "--yes")
    copies.wait_phase(GIVER, "ACTIVE", since_ms=since_ms)
    blocked = node.path("/var/lib/nfsha/.journal.new")
    blocked.mkdir()
    copies.start(RECEIVER)
    copies.wait_phase(RECEIVER, "RETURNED", since_ms=since_ms)
    copies.wait(lambda: "journal" in str(node.status()["alarms"]), "alarm of the journal")
    yield
    blocked.rmdir()


def _provoked() -> Iterator[Any]:
    for how, wanted, words in (
        (paused, {"passes"}, "--resume"),
        (v4_in_the_file, {"NFS v4 clients"}, "say Protocols = 3 there"),
        (another_holder, {"VIP on the node that serves only"}, "find that machine"),
        (in_maintenance, {"one serves, the other waits", "no promise"}, "MAINTENANCE"),
        (without_identity, {"volumes"}, "identity"),
        (read_only, {"volumes"}, "read-only"),
        (no_rsync, {"rsync"}, "no rsync's version"),
        (journal_unwritable, {"journal", "one serves, the other waits"}, "mend the disk"),
        (port_taken, {"copies"}, "the data is not offered"),
        (many_deleted, {"deletions"}, "--accept-deletes"),
        (large_packets_lost, FACTS, "loses large packets"),
        (newer_stamp, {"volumes", "copies"}, "newer than"),
        (stamp_of_another_history, {"volumes", "copies"}, "of another history"),
        (behind, {"epochs", "journal"}, "there 3"),
        (
            another_server,
            {"NFS v3 only on the receiver", "exports", "ports and transports"},
            "switch v4 off",
        ),
        (
            no_server,
            {"NFS v3 only on the receiver", "exports", "ports and transports", *ILL},
            "start the NFS server",
        ),
        (unmounted, {"volumes", *ILL}, "volume data"),
    ):
        yield pytest.param(how, wanted, words, id=how.__name__)


Breaks = Callable[[Copies], AbstractContextManager[None]]


@pytest.mark.parametrize(("how", "wanted", "words"), list(_provoked()))
def test_refused_and_nothing_changed(
    copies: Copies, how: Breaks, wanted: AbstractSet[str], words: str
) -> None:
    with how(copies):
        found = tried(copies)
    found.assert_refused(wanted)
    assert words in " ".join(found.asked.found(name) for name in wanted)
    ready(copies)


def test_another_nfsha_key_clock_or_configuration(copies: Copies, tmp_path: Path) -> None:
    node = copies.lab.node(RECEIVER)
    copies.daemon(RECEIVER).kill()
    copies.wait(lambda: not copies.lab.node(GIVER).status()["peer"]["heard"], "silence")
    found = tried(copies, on=GIVER)
    found.assert_refused({"other node heard"} | FACTS)
    assert "start nfsha there" in found.asked.found("other node heard")
    assert "what it told last is" in found.asked.found("facts of the other node")

    (tmp_path / "sitecustomize.py").write_text(_OTHER)
    config, key = (node.path(f"/etc/nfsha/{name}") for name in ("nfsha.toml", "cluster.key"))
    right = {file: file.read_text() for file in (config, key)}
    config.write_text(right[config] + "[firewall.ports]\nstatd = 20099\n")
    key.write_text("\n".join(reversed(right[key].split())) + "\n")
    since_ms = copies.now_ms()
    node.start_daemon({"PYTHONPATH": str(tmp_path)})
    copies.wait_phase(RECEIVER, "PASSIVE", since_ms=since_ms)
    copies.wait(lambda: copies.copy(RECEIVER)["state"] == "refused", "pass with another key")
    found = tried(copies, on=GIVER)
    found.assert_refused({"nfsha", "key", "clocks", "configuration", "copies"})
    asked = found.asked
    assert asked.found("nfsha").startswith("0.1.0 here, 0.0.9 there; ")
    assert "time servers" in asked.found("clocks")
    assert "statd 20099" in asked.found("configuration")

    copies.daemon(RECEIVER).kill()
    for file, text in right.items():
        file.write_text(text)
    node.start_daemon()
    ready(copies)


# ------------------------------------------------------------------ while a move is under way


def test_while_a_move_is_under_way_and_while_its_end_is(copies: Copies) -> None:
    since_ms = copies.now_ms()
    giver, receiver = copies.lab.node(GIVER), copies.daemon(RECEIVER)
    with hanging(copies, GIVER):
        moving = Moving(copies, GIVER, "failback")
        copies.wait_phase(RECEIVER, "PRESYNC", since_ms=since_ms)
        for on in STORAGE:
            found = tried(copies, on=on)
            found.assert_refused({"one serves, the other waits", "no other move"})
            assert "`nfsha abort` ends it" in found.asked.found("no other move")
        receiver.freeze()
        try:
            giver.nfsha("abort")
            copies.wait(lambda: not giver.status()["peer"]["heard"], "silence")
            found = tried(copies, on=GIVER)
        finally:
            receiver.thaw()
    silent = {"other node heard", *FACTS}
    ended = {"one serves, the other waits", "no other move", "time for it"}
    found.assert_refused(silent | ended)
    assert "the last move is still being ended" in found.asked.found("time for it")
    assert moving.ended().code == 4, moving.asked.answer
    ready(copies)


def test_two_who_ask_the_giver_for_the_numbers_at_once_get_them(copies: Copies) -> None:
    daemon = ControlClient(copies.lab.node(GIVER).path("/run/nfsha/nfsha.sock"), timeout_s=MOVE_S)
    waits = [threading.Event(), threading.Event()]
    found: list[dict[str, Any]] = []

    def look(waiting: threading.Event) -> None:
        for one in daemon.stream("handover-numbers", {"to": "primary"}):
            waiting.set()
            if one.get("done"):
                found.append(one)

    asking = [threading.Thread(target=look, args=(one,)) for one in waits]
    with hanging(copies, GIVER):
        for thread, waiting in zip(asking, waits, strict=True):
            thread.start()
            assert waiting.wait(MOVE_S)
    for thread in asking:
        thread.join(MOVE_S)
    assert [(one["why"], one["numbers"]["sum"]["volumes"]) for one in found] == [("", 1)] * 2


# ------------------------------------------------------------------ it goes, whatever else goes on


class Moving(threading.Thread):
    """A move that is asked for, and watched by its command, beside the test."""

    def __init__(self, copies: Copies, on: str, command: str) -> None:
        super().__init__()
        self._copies, self._on, self._command = copies, on, command
        self.asked = Asked(-1, {}, {})
        self.start()

    def run(self) -> None:
        self.asked = ask(self._copies, "--yes", on=self._on, command=self._command)

    def ended(self) -> Asked:
        self.join(MOVE_S)
        return self.asked


def turns(copies: Copies) -> tuple[str, str, str]:
    """Who serves, who waits, and the command that changes that."""
    giver, receiver = ("a", "b") if copies.phase("a") == "ACTIVE" else ("b", "a")
    copies.wait_phase(receiver, "PASSIVE")
    return giver, receiver, "failback" if receiver == "a" else "switchover"


def test_from_both_nodes_at_once_and_twice_in_a_row(copies: Copies) -> None:
    _, receiver, command = turns(copies)
    since_ms = copies.now_ms()
    both = [Moving(copies, on, command) for on in STORAGE]
    codes = [one.ended().code for one in both]
    assert 0 in codes, [one.asked.answer for one in both]
    assert set(codes) <= {0, 3}, [one.asked.answer for one in both]
    assert [to for _, to in copies.moves(receiver, since_ms)].count("ACTIVE") == 1
    again = ask(copies, "--yes", command=command)
    assert again.code == 3
    assert "it serves there already" in again.found("one serves, the other waits")
    copies.assert_never_two()


@pytest.mark.parametrize("kind", ["--full", "--verify"])
def test_while_a_pass_runs(copies: Copies, kind: str) -> None:
    """The pass is ended: one that hangs, or takes hours, holds no move up."""
    giver, receiver, command = turns(copies)
    copies.lab.node(receiver).nfsha("sync", "--wait")
    with hanging(copies, giver):
        copies.lab.node(receiver).nfsha("sync", kind)
        copies.wait(lambda: copies.copy(receiver)["state"] == "running", "pass under way")
        since_ms = copies.now_ms()
        moving = Moving(copies, receiver, command)
        copies.wait_phase(receiver, "PRESYNC", since_ms=since_ms)
    assert moving.ended().code == 0, moving.asked.answer
    copies.wait_phase(giver, "PASSIVE", since_ms=since_ms)
    assert copies.differences() == []


# ------------------------------------------------------------------ the proof before it opens


def test_v4_switched_on_while_the_service_moves_rolls_it_back(lab: Lab) -> None:
    # The check of each second would see it too; here it comes too late.
    copies = Copies(lab, sync='check_every = "60s"\n' + SYNC)
    copies.settle_whole()
    moving = Moving(copies, "b", "switchover")
    copies.wait_phase("a", "FREEZING", within_s=20)
    with hanging(copies, "a"):
        copies.wait_phase("b", "FINAL_SYNC")
        lab.b.nfs.stop()
        lab.b.nfs.start("3,4")
        freed_ms = copies.now_ms()
    assert moving.ended().code == 4, moving.asked.answer
    copies.wait_phase("a", "ACTIVE", since_ms=freed_ms)
    (ended,) = (one for one in copies.events("b") if one.row == "Z30")
    assert "NFS v4 at 127.0.0.1 is not refused (answered): switch it off" in ended.detail
    copies.assert_never_two()


# ------------------------------------------------------------------ a copy of blocks


def test_a_clone_of_blocks_and_a_client_past_the_vip(lab: Lab) -> None:
    own = lab.a.addresses.lan.ipv4
    stray = lab.c.spawn([sys.executable, "-c", _STRAY, own], name="stray")
    copies = Copies(lab, sync=TABLES)
    copies.wait(lambda: "connected" in stray.output(), "connection")
    (copies.here("a") / "folder").mkdir()
    copies.settle_whole()
    node = copies.lab.b
    copies.daemon("b").kill()
    node.nfs.stop()
    node.run("umount", "/nfs/data")
    lab.a.run("fsfreeze", "--freeze", "/nfs/data")
    images = [lab.folder / f"{name}-data.img" for name in STORAGE]
    lab.a.run("cp", "--sparse=always", *images)
    lab.a.run("fsfreeze", "--unfreeze", "/nfs/data")
    node.run("mount", "-o", "loop", images[1], "/nfs/data")
    node.nfs.start()
    since_ms = copies.now_ms()
    copies.start("b")
    copies.wait_phase("b", "PASSIVE", since_ms=since_ms)
    copies.wait(lambda: copies.copy("b")["state"] == "refused", "refused pass")
    found = tried(copies, "b", "switchover")
    found.assert_refused({"file handles", "clients past the VIP", "copies"})
    assert "cloned block by block" in found.asked.found("file handles")
    there = f"{PLACES['c'].lan.ipv4} at {own}:2049"
    assert there in found.asked.found("clients past the VIP")


# ------------------------------------------------------------------ a smaller disk


def test_a_smaller_volume_and_a_stamp_that_is_newer(lab: Lab) -> None:
    _make_smaller(lab)
    copies = Copies(lab)
    copies.settle_whole()
    for on, where in (("a", "there"), ("b", "here")):
        found = tried(copies, on, "switchover")
        found.assert_refused({"volumes"})
        for what in ("bytes", "inodes"):
            words = rf"volume data {where}: \d+ {what}, on the other node \d+: make it as large"
            assert re.search(words, found.asked.found("volumes"))

    # Of a reign that both journals forgot. No guard need look at that: nobody serves any more,
    # until an operator has said whose data is the truth.
    since_ms = copies.now_ms()
    stamp = copies.here("b") / ".nfsha-stamp"
    (copies.here("b") / "newer").write_bytes(b"of the reign that was forgotten")
    stamp.write_text(f"7 {'f' * 16} primary\n")
    for on in STORAGE:
        copies.wait_phase(on, "RETURNED", since_ms=since_ms)
    copies.wait(lambda: not lab.look().holders(VIP), "released address")
    none = {"one serves, the other waits", "VIP on the node that serves only", "epochs"}
    for on in STORAGE:
        tried(copies, on, "switchover").assert_refused({*none, "volumes"})
    assert (copies.here("b") / "newer").exists()


def _make_smaller(lab: Lab) -> None:
    """The disk of the standby, before anything runs."""
    node, image = lab.b, lab.folder / "b-data.img"
    found = lab.a.run("blkid", "-o", "value", "-s", "UUID", lab.folder / "a-data.img")
    node.nfs.stop()
    node.run("umount", "/nfs/data")
    with image.open("wb") as file:
        file.truncate(48 << 20)
    node.run("mkfs.ext4", "-q", "-U", found.stdout.strip(), image)
    node.run("mount", "-o", "loop", image, "/nfs/data")
    node.nfs.start()

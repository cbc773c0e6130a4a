"""The verify on real filesystems, with a real rsync daemon: rot, missed changes, and neither."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import mmap
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from nfsha.core.model import Epoch, Role
from nfsha.replica.content.suspects import (
    Kind,
    SuspectAnswer,
    SuspectQuestion,
    answer,
    answers_from_json,
    answers_to_json,
)
from nfsha.replica.content.verify import Helpers, Verify, VerifyOutcome, VerifyRequest
from nfsha.replica.files.own_names import INCOMING
from nfsha.replica.quarantine.quarantine import STORE, Quarantine
from nfsha.replica.rsync.arguments import From
from nfsha.replica.rsync.exits import Verdict
from nfsha.replica.rsync.progress import Progress
from tests.netns.namespaces import run
from tests.netns.treewalk import OWN_NAMES, differences
from tests.netns.volumekit import LoopVolume, loop_volumes

UUID = "0d8ab111-3c0a-4d4f-9d7c-0123456789ab"
EPOCH = Epoch(3, "0123456789abcdef", Role.PRIMARY)
ODD = [b"#hash", b"; semi", b"new\nline", b"\xff\xfe not utf-8", b"tab\t\\#123", b"x" * 255]
CONFIG = """\
port = {port}
address = 127.0.0.1
use chroot = no
log file = {folder}/log
[v-{uuid}]
path = {source}
read only = yes
auth users = someone
secrets file = {folder}/secrets
"""


@dataclass(frozen=True)
class Token:
    user: str = "someone"
    password: str = "right"


@dataclass(frozen=True)
class Times:
    started_ns: int
    duration_ms: int


@dataclass
class Two:
    """A source and its copy, and what a daemon would do around a verify."""

    source: LoopVolume
    copy: LoopVolume
    port: int
    daemon: subprocess.Popen[bytes]
    scratch: Path
    mark: Times = Times(0, 0)
    turns: int = 0
    before_fresh_pass: Callable[[], None] = lambda: None
    before_ask: Callable[[], None] = lambda: None
    after_ask: Callable[[], None] = lambda: None
    password: str = "right"
    progress: list[Progress] = field(default_factory=list)

    def at_source(self, name: bytes) -> Path:
        return self.source.path / os.fsdecode(name)

    def at_copy(self, name: bytes) -> Path:
        return self.copy.path / os.fsdecode(name)

    def ordinary_pass(self) -> Times:
        """Not by nfsha's own puller: what is true of a plain rsync is what counts here."""
        started_ns = time.time_ns()
        url = f"rsync://someone@127.0.0.1:{self.port}/v-{UUID}/"
        subprocess.run(
            ["rsync", "-aHAXS", "--numeric-ids", "--delete", "--modify-window=-1",
             "--exclude=/.nfsha-*", "--exclude=/lost+found", url, f"{self.copy.path}/"],
            check=True, timeout=60, env={**os.environ, "RSYNC_PASSWORD": "right"},
        )  # fmt: skip
        self.mark = Times(started_ns, (time.time_ns() - started_ns) // 1_000_000)
        return self.mark

    def verify(self, read_kib_s: int | None = None, *, repair: bool = True) -> VerifyOutcome:
        return asyncio.run(self._verify(read_kib_s, repair=repair))

    async def _verify(self, read_kib_s: int | None, *, repair: bool) -> VerifyOutcome:
        with self.opened() as (source_fd, copy_fd):
            verify = Verify(self.request(copy_fd, read_kib_s), self.scratch, _now_ms)
            return await verify.run(
                self.helpers(source_fd, copy_fd), self.progress.append, repair=repair
            )

    def request(self, copy_fd: int, read_kib_s: int | None = None) -> VerifyRequest:
        source = From("127.0.0.1", self.port, Token(password=self.password))
        return VerifyRequest(UUID, copy_fd, source, read_kib_s)

    def helpers(self, source_fd: int, copy_fd: int) -> Helpers:
        async def ask(question: SuspectQuestion) -> tuple[SuspectAnswer, ...]:
            self.before_ask()
            carried = SuspectQuestion.from_json(json.loads(json.dumps(question.to_json())))
            told = await asyncio.to_thread(answer, source_fd, carried)
            self.after_ask()
            return answers_from_json(json.loads(json.dumps(answers_to_json(told))), question)

        async def fresh_pass() -> bool:
            self.before_fresh_pass()
            await asyncio.to_thread(self.ordinary_pass)
            return True

        return Helpers(self._turn, fresh_pass, ask, Quarantine(copy_fd), EPOCH, self.mark)

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        self.turns += 1
        yield

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[int, int]]:
        source_fd = os.open(self.source.path, os.O_RDONLY | os.O_DIRECTORY)
        copy_fd = os.open(self.copy.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield source_fd, copy_fd
        finally:
            os.close(source_fd)
            os.close(copy_fd)

    def kept(self, outcome: VerifyOutcome) -> dict[bytes, bytes]:
        """What is in the quarantine entry of this verify."""
        assert outcome.entry is not None
        tree = os.fsencode(self.copy.path / STORE / outcome.entry / "tree")
        found = {}
        for folder, _, names in os.walk(tree):
            for name in names:
                path = folder + b"/" + name
                found[path.removeprefix(tree + b"/")] = Path(os.fsdecode(path)).read_bytes()
        return found


def _now_ms() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


both = pytest.mark.parametrize("two", ["ext4", "xfs"], indirect=True)


@pytest.fixture
def two(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Two]:
    with loop_volumes(tmp_path, "source", "copy", fstype=getattr(request, "param", "ext4")) as (
        source,
        copy,
    ):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (tmp_path / "secrets").write_text("someone:right\n")
        (tmp_path / "secrets").chmod(0o600)
        config = tmp_path / "rsyncd.conf"
        config.write_text(CONFIG.format(port=port, folder=tmp_path, uuid=UUID, source=source.path))
        argv = ["rsync", "--daemon", "--no-detach", f"--config={config}"]
        daemon = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        try:
            _await_port(port)
            yield Two(source, copy, port, daemon, tmp_path)
        finally:
            daemon.kill()
            daemon.wait(10)


def _await_port(port: int) -> None:
    for _ in range(200):
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        time.sleep(0.02)
    raise AssertionError("no rsync daemon")


def fill(two: Two, files: int = 60) -> list[bytes]:
    """Files in folders with odd names among them, copied; a sentinel outside stays as it is."""
    chance = random.Random(7)
    names = [f"folder{number % 20}/deep/file{number}".encode() for number in range(files)]
    names += [b"odd/" + name for name in ODD] + ODD
    for name in names:
        path = two.at_source(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(chance.randbytes(chance.randrange(9000, 12000)))
    two.at_source(b"empty").touch()
    two.at_source(b"link").symlink_to("odd")
    two.ordinary_pass()
    return names


def write_back(path: Path, data: bytes, at: int = 5000) -> None:
    """Writes into a file by its own descriptor and sets its times back."""
    found = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def states(root: Path) -> dict[str, tuple[int, ...]]:
    """Inode, ctime and mtime of every file: who was touched, and who was not."""
    found: dict[str, tuple[int, ...]] = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".nfsha-")]
        for name in names:
            status = os.lstat(f"{folder}/{name}")
            found[f"{folder}/{name}"] = (status.st_ino, status.st_ctime_ns, status.st_mtime_ns)
    return found


@both
def test_rot_and_missed_changes_are_told_apart_repaired_and_kept(two: Two) -> None:
    names = fill(two, 2000)
    early_rot, early_change = b"folder1/deep/file1", b"folder2/deep/file2"
    write_back(two.at_copy(early_rot), b"ROT")
    write_back(two.at_source(early_change), b"CHANGE")
    two.ordinary_pass()  # sees nothing, but is later than both
    time.sleep(0.05)  # the kernel's times of files go by its tick
    rotten = [early_rot, b"odd/" + ODD[0], b"odd/" + ODD[2], ODD[3], b"folder4/deep/file4"]
    changed = [early_change, b"odd/" + ODD[5], b"odd/" + ODD[4], ODD[1], b"folder4/deep/file24"]
    for name in rotten[1:]:
        write_back(two.at_copy(name), b"ROT")
    for name in changed[1:]:
        write_back(two.at_source(name), b"CHANGE")
    old = {name: two.at_copy(name).read_bytes() for name in rotten + changed}
    before = states(two.copy.path)
    assert len(differences(two.source.path, two.copy.path)) == 10

    outcome = two.verify()

    assert outcome.verdict is Verdict.COMPLETE, outcome
    found = {one.name: one.kind for one in outcome.findings}
    assert found == dict.fromkeys(rotten, Kind.DAMAGED) | dict.fromkeys(changed, Kind.MISSED)
    assert (outcome.damaged, outcome.missed, outcome.unrepaired) == (5, 5, ())
    assert outcome.files == len(names) and outcome.dropped == ()
    assert outcome.read_bytes == sum(two.at_source(name).stat().st_size for name in names)
    assert differences(two.source.path, two.copy.path) == []
    assert two.kept(outcome) == old
    after = states(two.copy.path)
    touched = {path for path in before if before[path] != after[path]}
    assert touched == {str(two.at_copy(name)) for name in old}
    assert before.keys() == after.keys()
    evidence = {one.name: one.evidence for one in outcome.findings}
    assert "not changed since it was copied" in evidence[early_rot]
    assert "written on this node after the last complete pass" in evidence[ODD[3]]
    assert "changed after it was copied" in evidence[early_change]
    assert "changed after the last complete pass began" in evidence[ODD[1]]

    again = two.verify()
    assert (again.verdict, again.findings, again.entry) == (Verdict.COMPLETE, (), None)


def rot_on_disk(volume: LoopVolume, path: Path) -> None:
    """Turns one bit of a file's first block behind the filesystem's back."""
    whole = path.read_bytes()
    run("sync", "-f", str(path))
    with volume.image.open("r+b") as image, mmap.mmap(image.fileno(), 0) as disk:
        at = disk.find(whole[:4096])
        assert at > 0 and disk.find(whole[:4096], at + 1) < 0
        disk[at + 100] ^= 1
    assert path.read_bytes() == whole  # the kernel still has it in memory


@pytest.mark.parametrize("two", ["ext4", "xfs", "btrfs"], indirect=True)
def test_rot_below_the_filesystem_is_damage(two: Two) -> None:
    """The block changes on the disk: no write, no ctime. btrfs finds it by its own checksums."""
    fill(two)
    name = b"folder3/deep/file3"
    rot_on_disk(two.copy, two.at_copy(name))
    outcome = two.verify()
    assert [(one.name, one.kind) for one in outcome.findings] == [(name, Kind.DAMAGED)]
    btrfs = two.copy.fstype == "btrfs"
    why = "the copy cannot be read" if btrfs else "not changed since it was copied"
    assert why in outcome.findings[0].evidence
    assert outcome.repaired == (name,)
    assert differences(two.source.path, two.copy.path) == []


def test_rot_after_a_move_is_damage_though_the_source_is_the_younger_file(two: Two) -> None:
    """The authority moved: what is the copy now was the source when the file was copied."""
    name = fill(two)[0]
    two.source, two.copy = two.copy, two.source
    config = CONFIG.format(port=two.port, folder=two.scratch, uuid=UUID, source=two.source.path)
    (two.scratch / "rsyncd.conf").write_text(config)  # read anew for each connection
    time.sleep(0.05)
    two.at_source(b".nfsha-stamp").write_text("4")
    two.ordinary_pass()
    rot_on_disk(two.copy, two.at_copy(name))
    assert two.at_source(name).stat().st_ctime_ns > two.at_copy(name).stat().st_ctime_ns
    outcome = two.verify()
    assert [(one.name, one.kind) for one in outcome.findings] == [(name, Kind.DAMAGED)]
    assert "neither was written since" in outcome.findings[0].evidence
    assert differences(two.source.path, two.copy.path) == []


@both
def test_all_names_of_a_file_are_repaired_together(two: Two) -> None:
    fill(two, 10)
    first = two.at_source(b"folder1/deep/file1")
    (first.parent / "second").hardlink_to(first)
    two.at_source(b"third").hardlink_to(first)
    two.ordinary_pass()
    write_back(two.at_copy(b"third"), b"ROT")
    outcome = two.verify()
    assert {one.name for one in outcome.findings} == {
        b"folder1/deep/file1", b"folder1/deep/second", b"third",
    }  # fmt: skip
    assert outcome.unrepaired == () and outcome.verdict is Verdict.COMPLETE
    assert differences(two.source.path, two.copy.path) == []
    assert len(two.kept(outcome)) == 3
    tree = two.copy.path / STORE / str(outcome.entry) / "tree"
    assert (tree / "third").stat().st_nlink == 3


@both
def test_what_changes_or_goes_during_the_verify_is_no_finding(two: Two) -> None:
    names = fill(two)
    early, late, gone_early, gone_late = names[:4]
    for name in (early, late, gone_early, gone_late):
        write_back(two.at_source(name), b"CHANGE")
    two.at_source(names[4]).write_bytes(b"an ordinary write before it, which is no suspect at all")

    def between_the_looks() -> None:
        two.at_source(early).write_bytes(b"an ordinary write")
        two.at_source(gone_early).unlink()

    def before_the_question() -> None:
        two.at_source(late).write_bytes(b"an ordinary write")
        two.at_source(gone_late).unlink()

    two.before_fresh_pass, two.before_ask = between_the_looks, before_the_question
    outcome = two.verify()
    assert outcome.verdict is Verdict.COMPLETE and outcome.findings == ()
    assert dict(outcome.dropped) == {
        early: "equal after the next pass",
        gone_early: "equal after the next pass",
        late: "changed meanwhile: the next pass copies it",
        gone_late: "gone from the source",
    }
    assert outcome.entry is None and not (two.copy.path / STORE).exists()


def test_a_file_that_is_written_before_its_repair_arrives_as_it_is_then(two: Two) -> None:
    name = fill(two)[0]
    write_back(two.at_source(name), b"CHANGE")

    def write() -> None:
        two.at_source(name).write_bytes(b"the newest")

    two.after_ask = write
    outcome = two.verify()
    assert outcome.repaired == (name,)
    assert two.at_copy(name).read_bytes() == b"the newest"
    assert differences(two.source.path, two.copy.path) == []


def test_a_client_that_writes_all_the_time_is_no_finding(two: Two) -> None:
    names = fill(two, 400)
    rotten = names[100]
    write_back(two.at_copy(rotten), b"ROT")
    stop = threading.Event()

    def write() -> None:
        chance = random.Random(3)
        busy = names[200:230]
        while not stop.is_set():
            path = two.at_source(chance.choice(busy))
            with path.open("r+b") as file:
                file.seek(chance.randrange(8000))
                file.write(chance.randbytes(100))
            time.sleep(0.001)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        outcome = two.verify()
    finally:
        stop.set()
        writer.join()
    assert [(one.name, one.kind) for one in outcome.findings] == [(rotten, Kind.DAMAGED)]
    assert outcome.repaired == (rotten,)
    two.ordinary_pass()
    assert differences(two.source.path, two.copy.path) == []


def test_without_repair_it_only_tells(two: Two) -> None:
    name = fill(two)[0]
    write_back(two.at_copy(name), b"ROT")
    before = states(two.copy.path)
    outcome = two.verify(repair=False)
    assert outcome.damaged == 1 and outcome.unrepaired == (name,) and outcome.repaired == ()
    assert states(two.copy.path) == before
    assert not (two.copy.path / STORE).exists()


def test_a_source_that_dies_before_the_repair_leaves_each_old_copy_in_its_place(two: Two) -> None:
    name = fill(two)[0]
    write_back(two.at_source(name), b"CHANGE")
    old = two.at_copy(name).read_bytes()

    def die() -> None:
        two.daemon.kill()
        two.daemon.wait(10)

    two.after_ask = die
    outcome = two.verify()
    assert outcome.verdict is Verdict.RETRY, outcome
    assert outcome.unrepaired == (name,) and outcome.missed == 1
    assert two.at_copy(name).read_bytes() == old
    assert two.kept(outcome) == {name: old}


def test_a_source_that_is_not_there_or_refuses_is_said(two: Two) -> None:
    fill(two)
    two.password = "wrong"
    outcome = two.verify()
    assert outcome.verdict is Verdict.REFUSED and outcome.files == 0, outcome
    two.daemon.kill()
    two.daemon.wait(10)
    outcome = two.verify()
    assert outcome.verdict is Verdict.RETRY and outcome.files == 0, outcome


def test_a_limited_rate_holds_and_ordinary_passes_take_turns(two: Two) -> None:
    for number in range(3):
        two.at_source(f"big{number}".encode()).write_bytes(random.Random(number).randbytes(1 << 20))
    two.ordinary_pass()
    began = time.monotonic()
    outcome = two.verify(read_kib_s=2048)
    took = time.monotonic() - began
    assert outcome.verdict is Verdict.COMPLETE
    assert took > 1.4, took  # 3 MiB at 2 MiB/s
    assert 0.9 * took < outcome.seconds <= took
    assert two.progress[-1].bytes == 3 << 20 and two.progress[-1].files == 3


def test_many_slices_compare_everything_once(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nfsha.replica.content.verify.SLICE_FILES", 20)
    names = fill(two)
    rotten = names[::9]
    for name in rotten:
        write_back(two.at_copy(name), b"ROT")
    outcome = two.verify()
    assert outcome.files == len(names)
    assert {one.name for one in outcome.findings} == set(rotten) == set(outcome.repaired)
    assert two.turns > len(names) // 20
    assert [one.files for one in two.progress] == [*range(20, len(names), 20), len(names)]
    assert differences(two.source.path, two.copy.path) == []


def test_more_suspects_than_one_verify_takes_are_left_to_the_next(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nfsha.replica.content.verify.MAX_SUSPECTS", 5)
    monkeypatch.setattr("nfsha.replica.content.verify.SLICE_FILES", 10)
    names = fill(two)
    for name in names[:8]:
        write_back(two.at_copy(name), b"ROT")
    first, second = two.verify(), two.verify()
    assert first.more and len(first.repaired) == 5
    assert not second.more and len(second.repaired) == 3
    assert differences(two.source.path, two.copy.path) == []


def test_ended_in_the_middle_nothing_runs_and_nothing_is_written(two: Two) -> None:
    names = fill(two, 300)
    for name in names[:200]:
        write_back(two.at_copy(name), b"ROT")

    async def run() -> VerifyOutcome:
        with two.opened() as (source_fd, copy_fd):
            compared = asyncio.Event()
            verify = Verify(two.request(copy_fd, 256), two.scratch, _now_ms)
            task = asyncio.create_task(
                verify.run(two.helpers(source_fd, copy_fd), lambda _: compared.set())
            )
            async with asyncio.timeout(10):
                await compared.wait()
            await verify.end()
            await verify.end()
            return await asyncio.wait_for(task, 2)

    before = states(two.copy.path)
    outcome = asyncio.run(run())
    assert outcome.verdict is Verdict.KILLED and 0 < outcome.files < len(names)
    assert states(two.copy.path) == before
    two.copy.unmount()  # nobody is in it


def test_ended_while_the_source_says_nothing(two: Two) -> None:
    fill(two, 1)
    two.daemon.send_signal(signal.SIGSTOP)

    async def run() -> VerifyOutcome:
        with two.opened() as (source_fd, copy_fd):
            verify = Verify(two.request(copy_fd), two.scratch, _now_ms)
            task = asyncio.create_task(
                verify.run(two.helpers(source_fd, copy_fd), two.progress.append)
            )
            await asyncio.sleep(0.3)
            assert not task.done()
            began = time.monotonic()
            await verify.end()
            assert time.monotonic() - began < 3
            assert not processes_with(copy_fd, two.copy.path)
            return await asyncio.wait_for(task, 2)

    try:
        assert asyncio.run(run()).verdict is Verdict.KILLED
    finally:
        two.daemon.send_signal(signal.SIGCONT)


def processes_with(fd: int, path: Path) -> list[str]:
    """Other processes that have the folder open as this descriptor."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(folder.name) != os.getpid() and (folder / "fd" / str(fd)).readlink() == path:
                found.append((folder / "cmdline").read_text())
    return found


@pytest.mark.parametrize("delay_ms", [0, 20, 150])
def test_ended_at_any_moment_of_a_repair(two: Two, delay_ms: int) -> None:
    names = fill(two, 200)
    old = {}
    for name in names[:50]:
        write_back(two.at_source(name), b"CHANGE")
        old[name] = two.at_copy(name).read_bytes()
    asked = asyncio.Event()
    two.after_ask = asked.set

    async def run() -> None:
        with two.opened() as (source_fd, copy_fd):
            verify = Verify(two.request(copy_fd), two.scratch, _now_ms)
            task = asyncio.create_task(
                verify.run(two.helpers(source_fd, copy_fd), two.progress.append)
            )
            await asked.wait()
            await asyncio.sleep(delay_ms / 1000)
            await verify.end()
            before = states(two.copy.path)
            outcome = await asyncio.wait_for(task, 5)
            assert states(two.copy.path) == before
            assert outcome.verdict in (Verdict.KILLED, Verdict.COMPLETE)
            store = Quarantine(copy_fd)
            kept = {
                item.name: two.copy.path / entry.backup_dir / os.fsdecode(item.name)
                for entry in store.list().entries
                for item in store.show(entry.name).items
                if item.kind == "file"
            }
            for name, content in old.items():  # no file is ever without its old content somewhere
                path = two.at_copy(name)
                assert path.read_bytes() == content or kept[name].read_bytes() == content

    asyncio.run(run())
    two.ordinary_pass()
    two.after_ask = lambda: None
    assert two.verify().verdict is Verdict.COMPLETE
    left = OWN_NAMES | {INCOMING}  # the next pass clears it
    assert differences(two.source.path, two.copy.path, ignore=left) == []


def test_the_answer_tells_what_is_there_and_follows_no_link(two: Two, tmp_path: Path) -> None:
    fill(two, 1)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    two.at_source(b"away").symlink_to(outside)
    os.mkfifo(two.at_source(b"pipe"))
    os.mknod(two.at_source(b"device"), 0o600 | 0o020000, os.makedev(1, 3))
    names = (b"folder0/deep/file0", b"link", b"away/secret", b"pipe", b"device", b"folder0", b"no")
    with two.opened() as (source_fd, _):
        told = answer(source_fd, SuspectQuestion(UUID, names))
        small = answer(source_fd, SuspectQuestion(UUID, names[:1]), max_file_bytes=100)
    found = two.at_source(names[0]).stat()
    assert replace(told[0], told_ns=0) == SuspectAnswer(
        names[0], found.st_size, found.st_mtime_ns, found.st_ctime_ns, 1,
        hashlib.sha256(two.at_source(names[0]).read_bytes()).hexdigest(),
    )  # fmt: skip
    assert [one.problem for one in told[1:]] == ["gone"] * 6
    assert small[0].sha256 is None and small[0].size == found.st_size

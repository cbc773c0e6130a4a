"""Replication by real daemons when something goes wrong, and what operators do about it."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import pytest

from nfsha.core.model import Epoch, Role
from nfsha.replica.source.source import epoch_token
from tests.netns.copies import SYNC, Copies
from tests.netns.lab import Lab
from tests.netns.labkit.network import PLACES

pytestmark = pytest.mark.timeout(90)

SOURCE_PORT = 7911


@pytest.fixture
def copies(lab: Lab) -> Copies:
    return Copies(lab)


def receivers(copies: Copies) -> list[psutil.Process]:
    """The rsync processes of the passive node's daemon."""
    found = psutil.Process(copies.daemon("b").pid).children(recursive=True)
    return [one for one in found if one.name() == "rsync"]


def slow(make_lab: Callable[..., Lab]) -> Copies:
    """A pair whose transfers take a while, with a file that takes half a minute."""
    copies = Copies(make_lab(volume_mib=512), sync=SYNC + 'bandwidth = "2MB"\n')
    copies.settle_whole()
    (copies.here("a") / "big").write_bytes(os.urandom(64 << 20))
    copies.wait(lambda: bool(receivers(copies)) and progress(copies) > 0, "bytes under way")
    return copies


def progress(copies: Copies) -> int:
    """So many bytes of the pass under way have come."""
    now = copies.copy()["progress"]
    return 0 if now is None else int(now["bytes"])


# ------------------------------------------------------------------ who must not


def test_a_node_of_an_older_epoch_gets_and_gives_nothing(copies: Copies) -> None:
    copies.settle_whole()
    first = copies.lab.a.status()["epoch"]
    uuid = copies.volume("a")["uuid"]
    died_ms = copies.now_ms()
    copies.lab.power_cut("a")
    copies.wait_phase("b", "ACTIVE", since_ms=died_ms)
    (copies.here("b") / "second").write_text("of the second reign")
    copies.lab.boot("a")  # with its key, its configuration, its volumes; its daemon stays down
    token = epoch_token(
        bytes.fromhex(copies.lab.key), Epoch(first["number"], first["id"], Role.PRIMARY)
    )
    address = next(at.ipv4 for at in PLACES["b"].all() if at.network == "hb")
    place = f"rsync://{token.user}@{address}:{SOURCE_PORT}/v-{uuid}/"
    for argv in (
        ["rsync", "-a", place, "/tmp/got/"],
        ["rsync", "-a", "--delete", "/nfs/data/", place],
        ["rsync", place],
    ):
        done = copies.lab.a.run("env", f"RSYNC_PASSWORD={token.password}", *argv, check=False)
        assert done.returncode == 5, done.stderr
        assert "auth failed" in done.stderr
    assert copies.names("b") == ["second"]
    assert not copies.lab.a.path("/tmp/got").exists()


# ------------------------------------------------------------------ processes and wires


def test_a_killed_rsync_is_no_harm_and_the_pass_comes_again(
    make_lab: Callable[..., Lab],
) -> None:
    copies = slow(make_lab)
    for one in receivers(copies):
        with suppress(psutil.NoSuchProcess):  # one takes the others with it
            one.kill()
    # By the log: it is tried again in a second, and a busy machine may not look in between.
    copies.wait(lambda: "the pass failed: " in copies.log("b"), "the end of the pass")
    assert "big" not in copies.names("b")
    copies.lab.b.nfsha("sync", "--bandwidth", "unlimited")
    copies.wait(lambda: "big" in copies.names("b"), "the file after all")
    copies.sync()
    assert copies.differences() == []


def test_another_bandwidth_counts_for_the_transfer_that_runs(
    make_lab: Callable[..., Lab],
) -> None:
    copies = slow(make_lab)
    began_s = time.monotonic()
    copies.lab.b.nfsha("sync", "--bandwidth", "unlimited")
    copies.wait(lambda: "big" in copies.names("b"), "the whole file", within_s=15)
    assert time.monotonic() - began_s < 20, "at 2 MB/s it would take 30 s"


def test_a_target_unmounted_in_the_middle_gets_nothing_beneath(
    make_lab: Callable[..., Lab],
) -> None:
    copies = slow(make_lab)
    copies.lab.b.nfs.stop()
    copies.lab.b.run("umount", "-l", "/nfs/data")
    time.sleep(3)
    assert list(copies.here("b").iterdir()) == []


def test_a_source_unmounted_in_the_middle_deletes_nothing(
    make_lab: Callable[..., Lab],
) -> None:
    copies = slow(make_lab)
    (copies.here("b") / "was-here").write_text("kept")  # as if it had been copied before
    copies.lab.a.nfs.stop()
    copies.lab.a.run("umount", "-l", "/nfs/data")
    time.sleep(4)
    assert (copies.here("b") / "was-here").read_text() == "kept"


def test_both_daemons_end_when_asked_and_leave_no_process(copies: Copies) -> None:
    copies.settle_whole()
    for node in "ba":
        daemon = copies.daemon(node)
        children = psutil.Process(daemon.pid).children(recursive=True)
        daemon.stop(5.0)
        assert [one for one in children if one.is_running()] == []


def test_one_filesystem_on_both_nodes_is_refused(copies: Copies) -> None:
    (copies.here("a") / "kept").write_text("kept")
    copies.settle_whole()
    device = copies.volume("a")["here"]["device"]
    copies.daemon("b").stop(5.0)
    copies.lab.b.nfs.stop()
    copies.lab.b.run("umount", "/nfs/data")
    copies.lab.b.run("mount", device, "/nfs/data")
    copies.lab.b.nfs.start()
    began_ms = copies.now_ms()
    copies.start("b")
    copies.wait_event("b", lambda _: True, "any event", since_ms=began_ms, within_s=10)
    copies.wait(lambda: "the same filesystem" in copies.copy()["why"], "a refusal")
    assert copies.names("a") == ["kept"]


# ------------------------------------------------------------------ disks


def test_a_full_copy_says_what_is_missing_and_recovers(copies: Copies) -> None:
    copies.settle_whole()
    filler = copies.here("b") / ".nfsha-quarantine"
    filler.mkdir(mode=0o700, exist_ok=True)
    with (filler / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 40 << 20)
    (copies.here("a") / "large").write_bytes(os.urandom(30 << 20))
    why = copies.wait_state("failed", "refused")["why"]
    assert "is full" in why
    assert "MiB are free" in why
    assert copies.names("b") == []
    (filler / "filler").unlink()
    copies.wait(lambda: "large" in copies.names("b"), "the file after all", within_s=40)
    copies.sync()
    assert copies.differences() == []


# ------------------------------------------------------------------ changes


def test_a_renamed_folder_of_ten_thousand_files_moves_without_a_full_walk(
    make_lab: Callable[..., Lab],
) -> None:
    copies = Copies(make_lab(volume_mib=256))
    folder = copies.here("a") / "many"
    folder.mkdir()
    for number in range(10_000):
        (folder / f"{number:05}").touch()
    (copies.here("a") / "other").mkdir()
    for number in range(100_000 // 10):
        (copies.here("a") / "other" / f"{number:05}").touch()
    copies.settle_whole()
    before = copies.copy()["full_walks"]
    folder.rename(copies.here("a") / "other" / "moved")
    copies.wait(lambda: "many" not in copies.names("b"), "the folder's old name gone", within_s=40)
    copies.sync()
    found = copies.copy()
    assert found["state"] != "held" or found["plan"] is None
    assert found["full_walks"] == before
    assert copies.differences() == []


def test_what_the_journal_could_not_see_is_found_by_a_full_walk_and_counted(
    copies: Copies,
) -> None:
    (copies.here("a") / "folder").mkdir()
    mapped, copied = (copies.here(node) / "folder" / "mapped" for node in "ab")
    mapped.write_bytes(bytes(4096))
    copies.settle_whole()
    with mapped.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        copies.sync()
        memory[:4] = b"seen"  # by a memory mapping on the server: the kernel gives no event
        memory.flush()
        (copies.here("a") / "ordinary").write_text("ordinary")
        copies.sync()
        assert (copies.here("b") / "ordinary").exists()
        assert copied.read_bytes() == bytes(4096)
        assert (copies.copy()["missed_by_journal"], _alarms(copies)) == (0, [])
        (copies.here("a") / "named").write_text("the list names this one, so the walk finds it not")
        copies.sync("--full")
        found = copies.copy()
        assert found["missed_by_journal"] == 1
        assert copied.read_bytes()[:4] == b"seen"
        assert copies.differences() == []
        (alarm,) = _alarms(copies)
        assert alarm["name"] == "journal-missed data"
        assert "what the change journal had not named, 1 in all" in alarm["text"]
        said = " ".join(copies.lab.b.nfsha("volumes").stdout.split())
        assert "1 change found by full walks only" in said
        copies.sync("--full")
    assert copies.copy()["missed_by_journal"] == 1
    assert copies.copy()["full_walks"]["the schedule's full walk"] == 2


def _alarms(copies: Copies) -> list[dict[str, Any]]:
    return list(copies.lab.b.status()["alarms"])


def test_more_changed_folders_than_the_journal_holds_are_a_full_walk(lab: Lab) -> None:
    copies = Copies(lab, sync=SYNC + "max_changed_folders = 1000\n")
    copies.settle_whole()
    # No pass may come in between: what it has applied the journal forgets, and never overflows.
    copies.lab.b.nfsha("sync", "--pause")
    for number in range(1500):
        (copies.here("a") / f"folder{number}").mkdir()
        (copies.here("a") / f"folder{number}" / "file").write_text("x")
    copies.lab.b.nfsha("sync", "--resume")
    copies.wait(lambda: len(copies.names("b")) == 1500, "all folders")
    copies.sync()
    assert any("folders" in why for why in copies.copy()["full_walks"])
    assert copies.differences() == []


@pytest.mark.alone
def test_a_source_clock_stepped_back_loses_nothing(copies: Copies) -> None:
    copies.settle_whole()
    (copies.here("a") / "before").write_text("before")
    with copies.lab.wall_clock_stepped(-120.0):
        (copies.here("a") / "during").write_text("during")
        time.sleep(2)
    (copies.here("a") / "after").write_text("after")
    copies.wait(lambda: copies.names("b") == ["after", "before", "during"], "all three")
    copies.sync()
    assert copies.differences() == []


# ------------------------------------------------------------------ operators


def test_paused_means_that_nothing_is_copied_until_resumed(copies: Copies) -> None:
    copies.settle_whole()
    copies.lab.b.nfsha("sync", "--pause")
    (copies.here("a") / "later").write_text("later")
    time.sleep(3)
    assert copies.names("b") == []
    copies.lab.b.nfsha("sync", "--resume")
    copies.wait(lambda: copies.names("b") == ["later"], "the file")


def test_a_verify_finds_and_mends_a_damaged_copy(copies: Copies) -> None:
    for number in range(20):
        (copies.here("a") / f"file{number}").write_bytes(os.urandom(5000))
    copies.settle_whole()
    rotten = copies.here("b") / "file7"
    times = rotten.stat()
    with rotten.open("r+b") as file:
        file.seek(1000)
        file.write(b"rot")
    os.utime(rotten, ns=(times.st_atime_ns, times.st_mtime_ns))
    damaged = rotten.read_bytes()
    copies.sync("data", "--verify")
    found = copies.copy()["verify"]
    assert (found["damaged"], found["missed"]) == (1, 0)
    assert copies.differences() == []
    kept = list((copies.here("b") / ".nfsha-quarantine").rglob("file7"))
    assert [one.read_bytes() for one in kept] == [damaged]


def test_a_copy_with_data_of_its_own_is_paired_by_an_operator_and_loses_nothing(
    copies: Copies,
) -> None:
    (copies.here("a") / "truth").write_text("of a")
    (copies.here("b") / "truth").write_text("of b, another")
    (copies.here("b") / "only-b").write_text("only here")
    copies.start()
    copies.wait_phase("a", "ACTIVE")
    copies.wait(lambda: copies.volume("b")["paired"] == "unpaired-there", "an unpaired volume")
    time.sleep(2)
    assert (copies.here("b") / "truth").read_text() == "of b, another"
    copies.lab.b.nfsha("volumes", "pair", "data", "--yes")
    copies.wait_phase("b", "PASSIVE", within_s=20)
    assert copies.differences() == []
    listed = copies.lab.b.nfsha("quarantine", "list", "--json").stdout
    kept = {
        one.name: one.read_text()
        for one in (copies.here("b") / ".nfsha-quarantine").rglob("*")
        if one.name in ("truth", "only-b")
    }
    assert kept == {"truth": "of b, another", "only-b": "only here"}
    assert "resync" in listed

"""What a crash or a slip leaves behind, with both real daemons: nothing is lost, all recovers."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import psutil
import pytest

from tests.netns.copies import SYNC, Copies
from tests.netns.lab import Lab

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def copies(lab: Lab) -> Copies:
    return Copies(lab)


def test_a_receiver_killed_in_the_middle_of_a_pass_goes_on_after_its_restart(
    make_lab: Callable[..., Lab],
) -> None:
    copies = Copies(make_lab(volume_mib=128), sync=SYNC + 'bandwidth = "4MB"\n')
    (copies.here("a") / "small").write_text("old")
    copies.settle_whole()
    copies.lab.b.nfsha("sync", "--pause")
    (copies.here("a") / "big").write_bytes(os.urandom(16 << 20))
    copies.lab.b.nfsha("sync", "--resume")
    copies.wait(lambda: (copies.copy()["progress"] or {}).get("bytes", 0) > 0, "bytes under way")
    began_ns = copies.pass_began_ns()
    children = psutil.Process(copies.daemon("b").pid).children(recursive=True)
    assert "rsync" in [one.name() for one in children]
    died_ms = copies.now_ms()
    copies.daemon("b").kill()
    _, alive = psutil.wait_procs(children, timeout=2)
    assert alive == []
    assert copies.names("b") == ["small"]
    assert copies.pass_began_ns() == began_ns, "a cut pass is no pass"
    copies.start("b")
    copies.wait_phase("b", "PASSIVE", since_ms=died_ms)
    copies.wait(lambda: "big" in copies.names("b"), "the file after all", within_s=30)
    copies.sync()
    assert copies.differences() == []
    assert not (copies.here("b") / ".nfsha-incoming").exists()


def test_a_restore_that_is_killed_loses_nothing_and_is_ended_by_the_next(
    make_lab: Callable[..., Lab],
) -> None:
    many = 6000
    copies = Copies(make_lab(volume_mib=128))
    (copies.here("a") / "truth").write_text("of a")
    (copies.here("b") / "many").mkdir()
    for number in range(many):
        (copies.here("b") / "many" / f"{number:05}").touch()
    copies.start()
    copies.wait_phase("a", "ACTIVE")
    copies.wait(lambda: copies.volume("b")["paired"] == "unpaired-there", "an unpaired volume")
    copies.lab.b.nfsha("volumes", "pair", "data", "--yes")
    copies.wait_phase("b", "PASSIVE", within_s=20)
    listed = json.loads(copies.lab.b.nfsha("quarantine", "list", "--json").stdout)
    (entry,) = [one["name"] for one in listed["entries"]]
    copies.lab.b.nfsha("sync", "--pause")  # a pass would delete what comes back
    place = copies.here("b") / "found" / "many"
    ended: list[CompletedProcess[str]] = []
    restore = ("quarantine", "restore", entry, "--to", "found")
    thread = threading.Thread(
        target=lambda: ended.append(copies.lab.b.nfsha(*restore, check=False))
    )
    thread.start()
    copies.wait(lambda: place.exists() and len(_names(place)) > 200, "files")
    copies.daemon("b").kill()
    thread.join()
    assert ended[0].returncode != 0
    back = _names(place)
    kept = _names(copies.here("b") / ".nfsha-quarantine" / entry / "tree" / "many")
    assert len(back) < many, "it was killed before its end"
    assert len(back) + len(kept) == len(back | kept) == many
    died_ms = copies.now_ms()
    copies.start("b")  # what came back is too much to be deleted by the pass that is due now
    copies.wait_phase("b", "PASSIVE", since_ms=died_ms)
    copies.lab.b.nfsha("sync", "--pause")
    copies.lab.b.nfsha(*restore)
    assert not (copies.here("b") / ".nfsha-quarantine" / entry).exists()


def _names(folder: Path) -> set[str]:
    return {one.name for one in folder.iterdir()}


def test_a_copy_without_inodes_says_so_and_recovers(make_lab: Callable[..., Lab]) -> None:
    copies = Copies(make_lab(inodes=2000))
    copies.settle_whole()
    filler = copies.here("b") / ".nfsha-quarantine"
    filler.mkdir(mode=0o700, exist_ok=True)
    with pytest.raises(OSError, match="No space left"):
        for number in range(3000):
            (filler / f"filler{number}").touch()
    (copies.here("a") / "new").write_text("new")
    copies.wait(lambda: "hardly an inode is left" in copies.copy()["why"], "a failed pass")
    assert copies.names("b") == []
    for one in filler.iterdir():
        one.unlink()
    copies.wait(lambda: copies.names("b") == ["new"], "the file after all", within_s=30)


def test_marks_that_are_lost_or_damaged_are_made_anew_by_a_pass(copies: Copies) -> None:
    (copies.here("a") / "kept").write_text("kept")
    copies.settle_whole()
    folder = copies.lab.folder / "b" / "lib" / "marks"
    own = next(folder.glob("own-*"))
    for damaged in (own, folder / "taint"):
        copies.daemon("b").stop(5.0)
        damaged.write_bytes(b"\0garbage")
        began_ms = copies.now_ms()
        copies.start("b")
        back = copies.wait_phase("b", "RETURNED", since_ms=began_ms)
        copies.wait_phase("b", "PASSIVE", since_ms=back.at_ms)
        assert f"{damaged.name} is not what nfsha wrote" in copies.log("b")
        assert (folder / f"corrupt-{damaged.name}").read_bytes() == b"\0garbage"
        copies.wait(own.exists, "a mark")
        assert copies.differences() == []


def test_a_spoiled_identity_stops_the_copy_on_either_side_and_nothing_else(
    copies: Copies,
) -> None:
    (copies.here("a") / "kept").write_text("kept")
    copies.settle_whole()
    for node in "ba":
        file = copies.here(node) / ".nfsha-volume"
        right = file.read_bytes()
        file.write_bytes(b"garbage\xff\n")
        copies.wait(
            lambda node=node: "garbage" in copies.lab.node(node).nfsha("volumes").stdout,  # type: ignore[misc]
            "word of it",
        )
        copies.wait(lambda: copies.copy()["state"] == "refused", "a refusal")
        new = copies.here("a") / f"while-{node}-was-spoiled"
        new.write_text("new")
        time.sleep(1.5)
        assert "kept" in copies.names("b")
        assert new.name not in copies.names("b")
        assert copies.phase("a") == "ACTIVE"
        file.write_bytes(right)
        copies.wait(lambda new=new: new.name in copies.names("b"), "the file", within_s=30)  # type: ignore[misc]
    copies.sync()
    assert copies.differences() == []


def test_many_who_ask_for_a_pass_at_once_all_get_one(copies: Copies) -> None:
    copies.settle_whole()
    (copies.here("a") / "new").write_bytes(os.urandom(1 << 20))
    ended: list[CompletedProcess[str]] = []
    threads = [
        threading.Thread(
            target=lambda argv=argv: ended.append(
                copies.lab.b.nfsha("sync", "--wait", *argv, check=False)
            )
        )
        for argv in ((), (), ("--full",), ("--verify",))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(one.returncode, one.stderr) for one in ended] == [(0, "")] * 4
    assert copies.differences() == []

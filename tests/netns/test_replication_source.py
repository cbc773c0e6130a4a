"""Who may be copied from, and since when; and an old primary that returns: both real daemons."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.netns.copies import Copies
from tests.netns.lab import Lab
from tests.netns.labkit.network import PLACES
from tests.netns.labkit.place import Place
from tests.netns.labkit.storage_node import cluster_key

pytestmark = pytest.mark.timeout(90)

SOURCE_PORT = 7911
LOOK_EVERY_S = 0.01
ANSWER_WITHIN_S = 0.5
UP_WITHIN_MS = 1000
"""The bar of the requirement, from the decision to serve."""


@pytest.fixture
def copies(lab: Lab) -> Copies:
    return Copies(lab)


class Door(threading.Thread):
    """Knocks at a node's rsync port from the other node, again and again, until the end."""

    def __init__(self, of: str, place: Place) -> None:
        super().__init__()
        self._address = next(at.ipv4 for at in PLACES[of].all() if at.network == "hb")
        self._place = place
        self._end = threading.Event()
        self.seen: list[tuple[int, int, str]] = []
        """When it knocked and had its answer (CLOCK_BOOTTIME, ms), and whether it was `open`,
        `refused` or `silent`."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self.join()

    def run(self) -> None:
        self._place.inside(self._knock_on)

    def _knock_on(self) -> None:
        while not self._end.wait(LOOK_EVERY_S):
            began_ms = Lab.now_ns() // 1_000_000
            found = self._knock()
            self.seen.append((began_ms, Lab.now_ns() // 1_000_000, found))

    def _knock(self) -> str:
        try:
            with socket.create_connection((self._address, SOURCE_PORT), ANSWER_WITHIN_S) as line:
                line.settimeout(ANSWER_WITHIN_S)
                return "open" if line.recv(8) == b"@RSYNCD:" else "silent"
        except ConnectionRefusedError:
            return "refused"
        except OSError:
            return "silent"

    def knocked(self, found: str) -> list[int]:
        """When it knocked and found it so."""
        return [began_ms for began_ms, _, answer in self.seen if answer == found]

    def first_ms(self, found: str, since_ms: int = 0) -> int:
        """When it knew first, since a time, that it is so."""
        return next(at for began, at, answer in self.seen if answer == found and began >= since_ms)


def test_the_source_is_up_within_a_second_and_gone_before_the_other_node_serves(
    copies: Copies,
) -> None:
    lab = copies.lab
    with Door("a", lab.b) as door:
        copies.start()
        served = copies.wait_phase("a", "ACTIVE")
        copies.wait(lambda: bool(door.knocked("open")), "an open port")
        assert min(door.knocked("open")) >= served.at_ms, "before it had the right to"
        assert door.first_ms("open") - served.at_ms < UP_WITHIN_MS
        copies.wait_whole()
        cut_ms = copies.now_ms()
        # Its evidence goes; what has no datagrams, so the knocking too, goes on.
        lab.cut("a", "b", udp_only=True)
        lab.cut("a", "w")
        left = copies.wait_phase("a", "ISOLATED", since_ms=cut_ms)
        taken = copies.wait_phase("b", "ACTIVE", since_ms=cut_ms)
        copies.wait(lambda: door.seen[-1][0] > taken.at_ms + 500, "more knocking")
    assert {answer for began, _, answer in door.seen if began > taken.at_ms} == {"refused"}
    gone_ms = door.first_ms("refused", cut_ms)
    assert max(door.knocked("open")) < gone_ms < taken.at_ms, "once gone it stays so"
    assert gone_ms - left.at_ms < UP_WITHIN_MS


# ------------------------------------------------------------------ who must not


def touched(root: Path) -> dict[str, tuple[int, int]]:
    """Inode and ctime of all there is: whatever is written, renamed or set changes one of them."""
    found = {".": root}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder) / name
            found[str(path.relative_to(root))] = path
    return {name: (path.lstat().st_ino, path.lstat().st_ctime_ns) for name, path in found.items()}


def test_an_old_primary_whose_schedule_goes_on_writes_nothing_into_what_is_newer(
    copies: Copies,
) -> None:
    lab = copies.lab
    (copies.here("a") / "common").write_text("common")
    copies.settle_whole()
    lab.b.nfsha("sync", "--pause")
    (copies.here("a") / "common").write_text("acknowledged, never copied")
    (copies.here("a") / "only-there").write_text("acknowledged, never copied")
    died_ms = copies.now_ms()
    lab.power_cut("a")
    copies.wait_phase("b", "ACTIVE", since_ms=died_ms)
    (copies.here("b") / "second").write_text("of the second reign")
    copies.wait(lambda: copies.volume("b")["here"]["stamp"]["number"] == 2, "its own last write")
    newer = touched(copies.here("b"))
    lab.boot("a")
    older = touched(copies.here("a"))
    config = (lab.a.path("/etc/nfsha") / "nfsha.toml").read_text()

    # With a key of before: nobody hears it. Its passes are due each second, and none is made.
    lab.a.write_config(config, cluster_key())
    began_ms = copies.now_ms()
    copies.start("a")
    copies.wait_phase("a", "WAITING", since_ms=began_ms)
    for argv in (
        ("sync", "--wait"), ("sync", "--full", "--wait"), ("sync", "--verify", "--wait"),
        ("volumes", "pair", "data", "--yes"), ("failback", "--yes"),
    ):  # fmt: skip
        assert lab.a.nfsha(*argv, check=False).returncode != 0, argv
    assert copies.copy("a")["state"] == "off"
    assert copies.phase("a") == "WAITING"
    copies.daemon("a").stop(5.0)
    assert touched(copies.here("a")) == older
    assert touched(copies.here("b")) == newer

    # With the pair's key: it is made equal to what is newer, and goes on copying from there.
    lab.a.write_config(config, lab.key)
    began_ms = copies.now_ms()
    copies.start("a")
    copies.wait_phase("a", "RETURNED", since_ms=began_ms)
    copies.wait_phase("a", "PASSIVE", since_ms=began_ms, within_s=30)
    for _ in range(3):
        lab.a.nfsha("sync", "--full", "--wait")
    assert copies.mark("a")
    assert copies.differences() == []
    assert touched(copies.here("b")) == newer
    assert "ACTIVE" not in {event.to for event in copies.events("a", died_ms)}

"""The command lines of a pull, and what tells a transfer that hangs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nfsha.replica.rsync.arguments import Course, From, fetch, folder_list
from nfsha.replica.rsync.stall import Activity, StallWatch, activity


@dataclass(frozen=True)
class Login:
    user: str = "nfsha-1-aa"
    password: str = "secret"


def course(**changes: Any) -> Course:
    values: dict[str, Any] = {
        "source": From("192.0.2.1", 873, Login()),
        "module": "v-1",
        "target": "/proc/self/fd/9/",
        "timeout_s": 60,
        "connect_timeout_s": 5,
        "list_path": None,
        "backup": None,
        "checksum": False,
    }
    return Course(**values | changes)


def every_line(one: Course) -> list[list[str]]:
    return [
        one.plan(),
        one.copy(make_way=0, bandwidth_kib_s=None),
        one.copy(make_way=7, bandwidth_kib_s=100),
        one.settle(None, deletions=7),
        one.settle("/list", deletions=None),
    ]


@pytest.mark.parametrize("list_path", [None, "/list"])
def test_what_no_line_may_have_and_what_each_has(list_path: str | None) -> None:
    for line in every_line(course(list_path=list_path)):
        words = " ".join(line)
        for never in (" -u", "--update", "--ignore-errors", "--inplace", "--delete-excluded"):
            assert never not in words
        for always in ("--numeric-ids", " -x ", "--modify-window=-1", "--exclude=/.nfsha-volume",
                       "--exclude=/.nfsha-stamp", "--exclude=/.nfsha-quarantine", "--timeout=60",
                       "--contimeout=5", "--sockopts=TCP_NODELAY",
                       "--partial-dir=.nfsha-partial"):  # fmt: skip
            assert always in words
        assert "secret" not in words
        assert line[-2:] == ["rsync://nfsha-1-aa@192.0.2.1:873/v-1/", "/proc/self/fd/9/"]


def test_only_the_run_for_it_deletes() -> None:
    one = course(list_path="/list")
    assert "-n" in one.plan()
    copying = one.copy(make_way=0, bandwidth_kib_s=None)
    assert not [word for word in copying if "delete" in word or word == "--force"]
    forced = one.copy(make_way=7, bandwidth_kib_s=None)
    assert [word for word in forced if "delete" in word] == ["--max-delete=7"]
    settled = one.settle("/list", deletions=None)
    assert not [word for word in settled if "delete" in word]
    deleting = one.settle("/list", deletions=7)
    assert {"--delete-after", "--max-delete=7", "--existing", "--max-size=0"} <= {*deleting}


def test_a_resync_keeps_what_it_overwrites() -> None:
    one = course(backup=".nfsha-quarantine/1")
    for line in (one.copy(make_way=1, bandwidth_kib_s=None), one.settle(None, deletions=1)):
        assert "--backup-dir=.nfsha-quarantine/1" in line
    assert "--backup" not in one.plan()


def test_addresses() -> None:
    assert From("2001:db8::1", 1873, Login()).url("nfsha") == (
        "rsync://nfsha-1-aa@[2001:db8::1]:1873/nfsha/"
    )
    bound = course(source=From("192.0.2.1", 873, Login(), bind="192.0.2.2"))
    assert "--address=192.0.2.2" in bound.plan()
    with pytest.raises(ValueError, match="IPv4 or IPv6"):
        From("-oProxyCommand=x", 873, Login()).url("nfsha")


def test_lists() -> None:
    assert folder_list([b".", b"a/b", b"#odd\n/"]) == b"./\0./a/b/\0./#odd\n/\0"
    assert folder_list([b"a"], [b".", b"b"]) == b"./a/\0./.nfsha-volume\0./b\0"


def test_fetching_takes_the_named_files_only() -> None:
    line = fetch(From("192.0.2.1", 873, Login()), "/into/", ["facts.json"], 1000)
    assert line.index("--include=/facts.json") < line.index("--exclude=*")
    assert "--max-size=1000" in line


# --- a transfer that hangs -----------------------------------------------------------------------


def test_it_hangs_when_nothing_moves_for_the_limit() -> None:
    watch = StallWatch(1000, 0)
    assert not watch.stalled(Activity(5000, 0, 0), 500)
    # Waiting takes some time too, and keep-alives are read.
    assert not watch.stalled(Activity(5100, 0, 4), 1400)
    assert watch.stalled(Activity(5100, 0, 4), 1500)


@pytest.mark.parametrize(
    "moved", [Activity(2058, 5, 5), Activity(10, 2053, 5), Activity(10, 5, 10)]
)
def test_it_lives_when_it_reads_or_writes_or_computes(moved: Activity) -> None:
    watch = StallWatch(1000, 0)
    watch.stalled(Activity(10, 5, 5), 0)
    assert not watch.stalled(moved, 5000)
    assert watch.stalled(moved, 6000)


def test_slow_computing_adds_up() -> None:
    watch = StallWatch(1000, 0)
    assert not any(watch.stalled(Activity(0, 0, tick), tick * 190) for tick in range(30))


def test_the_kernel_counts_what_this_process_reads() -> None:
    before = activity([os.getpid()])
    Path("/proc/self/maps").read_bytes()
    after = activity([os.getpid()])
    assert after.read_bytes > before.read_bytes
    assert activity([1 << 30]) == Activity(0, 0, 0)

"""The commands about the copies: what they show, what they send, how they end.

The screens stand in tests/unit/golden (volumes-*, quarantine-*), to be read.
`python -m tests.unit.test_cli_replication` writes them anew after a deliberate change.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nfsha.cli import render, render_quarantine, render_volumes, replicate, words
from nfsha.cli.arguments import parser
from nfsha.cli.exits import Exit
from nfsha.cli.main import main
from nfsha.cli.words import Style
from nfsha.host import control
from nfsha.replica.files.beneath import from_shown, shown
from tests.unit import situations
from tests.unit.fake_daemon import Daemon, Facts, configure, said

GOLDEN = Path(__file__).parent / "golden"
STARTED_NS = 1_767_323_045_678_000_000
EPOCH = {"number": 7, "id": "0123456789abcdef", "authority": "primary"}
PLAN = {"hash": "1a2b3c4d5e6f" + 52 * "0", "count": 1204, "names": ["a", "b\\x0a", "c c", "d", "e"]}
ENTRY = "20260102T030405.678Z-resync-0123abcd"

# --------------------------------------------------------------------------- what a daemon says


def place(**changes: object) -> Facts:
    """One node's volume."""
    return {
        "name": "data", "path": "/nfs/data", "device": "/dev/vg/data", "device_number": 64769,
        "fstype": "ext4", "fs_uuid": "u", "size_bytes": 100 * 10**9, "free_bytes": 61 * 10**9,
        "inodes": 6_553_600, "free_inodes": 6_500_000, "options": "rw,relatime",
        "read_only": False, "failing": "", "refused": "", "identity": "i", "stamp": EPOCH,
        "empty": False, **changes,
    }  # fmt: skip


def volume(name: str = "data", **sync: object) -> Facts:
    """A pair that is as it should be, but for what is changed in its `sync`."""
    last = {
        "started_ns": STARTED_NS, "epoch": 7, "files": 31_204, "bytes": 38_700_000_000,
        "transferred_bytes": 1_234_567, "deletions": 3, "duration_ms": 312, "walk": "folders",
    }  # fmt: skip
    return {
        "name": name, "path": f"/nfs/{name}", "uuid": "i", "paired": "paired",
        "here": place(name=name), "there": place(name=name, free_bytes=60_400_000_000),
        "differs": [],
        "sync": {
            "state": "idle", "why": "", "last": last, "age_ms": 12_300, "next_ms": 18_000,
            "progress": None, "plan": None,
            "full_walks": {"the first pass of epoch 7": 1, "the schedule's full walk": 12},
            "missed_by_journal": 0, "verify": {"last_ns": STARTED_NS, "damaged": 0, "missed": 0},
            **sync,
        },
    }  # fmt: skip


def answer(*listed: Facts, **way: object) -> Facts:
    """What the daemon answers to `volumes`."""
    replication = {
        "mode": "target", "why": "", "source": {"running": False, "trouble": ""}, "paused": False,
        "bandwidth_kib_s": None, "rsync": "3.5.0", "warnings": [], **way,
    }  # fmt: skip
    return {"volumes": list(listed), "replication": replication}


def running() -> Facts:
    progress = {
        "stage": "copy", "bytes": 1_204_000_000, "total_bytes": 2_400_000_000, "files": 31_000,
        "rate_bytes_s": 98_000_000, "eta_s": 12.4, "percent": 50.2,
    }  # fmt: skip
    return volume("db/pg", state="running", progress=progress, next_ms=None)


def held() -> Facts:
    return volume(
        "mail store", state="held", plan=PLAN, age_ms=95_000,
        why="1,204 of 5,000 files would be deleted, more than 100 and 10 %",
    )  # fmt: skip


def unpaired() -> Facts:
    one = volume("new", state="refused", why="identities differ", last=None, age_ms=None)
    one |= {"paired": "unpaired-here", "differs": ["here is ext4, there is xfs"]}
    one["here"] = place(name="new", stamp=None, read_only=True, identity=None)
    one["sync"] |= {"full_walks": {}, "verify": None, "next_ms": None}
    return one


def lonely(side: str) -> Facts:
    one = volume(f"only-{side}", state="off", last=None, age_ms=None, next_ms=None, verify=None)
    one |= {"paired": f"unpaired-{side}", "there" if side == "here" else "here": None}
    one["sync"]["full_walks"] = {}
    return one


def source() -> Facts:
    """A node that was the target before: what its own passes left is not of interest."""
    trouble = "rsync ended with 10: the port is in use"
    way = {"source": {"running": False, "trouble": trouble}, "paused": True, "bandwidth_kib_s": 9}
    return answer(held(), mode="source", **way)


LISTING = {
    "entries": [
        {
            "volume": "data", "name": ENTRY, "reason": "resync", "created_ns": STARTED_NS,
            "why": "resync to epoch 8 of what this node wrote in epoch 7", "epoch": EPOCH,
            "operation": "resync", "by": "nfsha", "complete": True, "files": 12,
            "bytes": 3_400_000, "trouble": "",
        },
        {
            "volume": "data", "name": "20260103T030405.678Z-verify-00000000", "reason": "verify",
            "created_ns": STARTED_NS, "why": "damage found by checksum", "epoch": None,
            "operation": "verify", "by": "", "complete": False, "files": None, "bytes": None,
            "trouble": "its record is cut off",
        },
    ],
    "usage": [
        {"volume": "data", "entries": 2, "files": 12, "bytes": 3_400_000,
         "oldest_ns": STARTED_NS, "unfinished": 1, "over": "older than 90 d"},
        {"volume": "mail", "entries": 0, "files": 0, "bytes": 0, "oldest_ns": None,
         "unfinished": 0, "over": ""},
    ],
    "more": False,
}  # fmt: skip
ITEMS = {
    "volume": "data",
    "entry": LISTING["entries"][0],  # type: ignore[index]
    "items": [
        {"name": "docs", "kind": "folder", "size": 4096, "mtime_ns": STARTED_NS, "mode": 0o40755,
         "uid": 0, "gid": 0, "links": 2},
        {"name": "docs/a\\x0ab\\xff", "kind": "file", "size": 812, "mtime_ns": STARTED_NS,
         "mode": 0o104711, "uid": 1000, "gid": 100, "links": 1},
    ],
    "more": True,
}  # fmt: skip

SCREENS: dict[str, Callable[[], str]] = {
    "volumes-target": lambda: render_volumes.volumes(answer(volume(), running()), Style()),
    "volumes-trouble": lambda: render_volumes.volumes(
        answer(volume(), held(), unpaired(), lonely("here"), lonely("there")), Style()
    ),
    "volumes-source": lambda: render_volumes.volumes(source(), Style()),
    "volumes-off": lambda: render_volumes.volumes(answer(mode="off"), Style()),
    "quarantine-list": lambda: render_quarantine.entries(LISTING),
    "quarantine-show": lambda: render_quarantine.items(ITEMS),
}

# --------------------------------------------------------------------------- screens


@pytest.mark.parametrize("name", SCREENS)
def test_the_screen_is_the_one_that_was_approved(name: str) -> None:
    text = SCREENS[name]()
    assert text + "\n" == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 80
    assert "".join(text.splitlines()).isprintable()


def test_no_approved_screen_is_left_over() -> None:
    found = {path.stem for path in GOLDEN.iterdir() if not path.name.startswith("status-")}
    assert found == set(SCREENS)


def test_colour_changes_no_word_and_marks_trouble() -> None:
    listed = answer(volume(), held())
    plain = render_volumes.volumes(listed, Style())
    colour = render_volumes.volumes(listed, Style(colour=True))
    assert re.sub(r"\x1b\[\d+m", "", colour) == plain
    assert "\x1b[31mmail store\x1b[0m:" in colour
    assert "\x1b[31mdata" not in colour


@pytest.mark.parametrize(
    ("one", "step"),
    [
        (volume(), ""),
        (running(), ""),
        (held(), "`nfsha sync 'mail store' --accept-deletes 1a2b3c4d5e6f`"),
        (unpaired(), "if both belong together, on the other node: `nfsha volumes pair new`"),
        (volume(state="failed", why="exit 11: no space left"), "`nfsha sync data --wait`"),
        (lonely("here"), "mount it at only-here there"),
        (lonely("there"), "mount it at only-there here"),
        (volume() | {"paired": "unpaired-there"}, "here: `nfsha volumes pair data`"),
        (
            volume(state="off") | {"here": place(refused=".nfsha-volume holds garbage")},
            "mend what keeps data from being a volume",
        ),
        (volume() | {"uuid": None, "here": place(refused="tmpfs loses its content")}, ""),
    ],
)
def test_what_to_do_about_a_volume(one: Facts, step: str) -> None:
    assert step in render_volumes.step_for(one)
    assert bool(step) == bool(render_volumes.step_for(one))
    for command in re.findall(r"`nfsha ([^`]+)`", render_volumes.step_for(one)):
        plain = re.sub(r"'[^']*'", "data", command)
        assert parser().parse_args(plain.split()).do is not None


@pytest.mark.parametrize(
    ("way", "said_so"),
    [
        ({"paused": True}, "PAUSED: no pass begins until `nfsha sync --resume`"),
        ({"bandwidth_kib_s": 48_828}, "each transfer is limited to 50 MB per second"),
        ({"warnings": ["rsync 3.2.7 has a known hole"]}, "warning: rsync 3.2.7 has a known hole"),
        ({"mode": "none", "why": "the peer is silent"}, "no data flows (the peer is silent)"),
        (
            {"mode": "target", "source": {"running": True, "trouble": "not reachable"}},
            "not reachable",
        ),
    ],
)
def test_what_holds_of_all_volumes(way: Facts, said_so: str) -> None:
    assert said_so in render_volumes.volumes(answer(volume(), **way), Style())


def test_the_most_pressing_comes_last_and_once() -> None:
    calm = render_volumes.volumes(answer(volume()), Style())
    assert calm.endswith("nothing: passes come by themselves")
    for one in (volume(), held(), volume(state="failed", why="no room")):
        paused = render_volumes.volumes(answer(one, paused=True), Style())
        assert paused.endswith("`nfsha sync --resume` when the work is done")
        assert "--resume" not in render_volumes.first_step(answer(one, paused=True, mode="source"))


def test_held_deletions_are_told_while_a_pass_runs_too() -> None:
    one = held()
    one["sync"] |= {"state": "running", "why": "a pass by schedule"}
    assert render_volumes.state(one) == "DELETIONS HELD, a pass runs"
    assert "--accept-deletes 1a2b3c4d5e6f" in render_volumes.first_step(answer(one))


def test_what_cannot_be_a_volume_says_why() -> None:
    one = volume(".") | {"here": place(refused="tmpfs loses its content at a reboot")}
    told = render_volumes.volumes(answer(one), Style())
    assert ".: cannot be a volume: tmpfs loses its content at a reboot;" in told
    assert render_volumes.brief(answer(one | {"uuid": None})) == []
    assert len(render_volumes.brief(answer(one))) == 1


def test_a_pass_that_compares_has_no_figures_yet() -> None:
    none = {"stage": "plan", "bytes": 0, "total_bytes": None, "files": 0, "rate_bytes_s": 0,
            "eta_s": None, "percent": None}  # fmt: skip
    one = volume(state="running", progress=none)
    assert render_volumes.brief_line(one) == "data: the copy is 12 s old, compares"
    assert "progress" not in render_volumes.volumes(answer(one), Style())


def test_two_volumes_of_one_name_with_different_identities() -> None:
    here, there = lonely("here"), lonely("there")
    text = render_volumes.volumes(answer(here | {"name": "x"}, there | {"name": "x"}), Style())
    assert text.count("x: UNPAIRED, the volumes of this name have different identities") == 2
    assert "that does not serve: remove .nfsha-volume in the volume's root, then `nfsha" in (
        " ".join(text.split())
    )


def test_an_answer_that_lacks_what_a_newer_one_has() -> None:
    text = render_volumes.volumes({"volumes": [{"name": "data"}]}, Style())
    assert "data: not known whether it is a pair; state unknown" in text
    assert render_volumes.progress({}) == "0 B"
    bare = {"name": "data", "paired": "new", "here": {}, "there": {}, "sync": {"verify": {}}}
    assert "unknown filesystem, stamp none" in render_volumes.volumes(answer(bare), Style())
    verify = {"last_ns": None, "damaged": 0, "missed": 0}
    assert "verified:  not yet" in render_volumes.volumes(answer(volume(verify=verify)), Style())


def test_what_a_terminal_would_obey_is_shown_harmless() -> None:
    one = volume("\x1b[2Jx", state="failed", why="bad\nline\x07")
    text = render_volumes.volumes(answer(one, why="\x1b]0;x"), Style())
    assert "".join(text.splitlines()).isprintable()
    assert "".join(render_volumes.passes([one], Style()).splitlines()).isprintable()
    assert "".join(render_volumes.finished(one).splitlines()).isprintable()


def test_status_has_one_line_for_each_volume_and_trouble_first() -> None:
    pair = situations.settled()
    facts = pair.seen(pair.standby)
    listed = [volume(f"v{number}") for number in range(8)]
    facts["copies"] = answer(*listed, running(), held(), bandwidth_kib_s=48_828)
    lines = render.status(facts, Style()).splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("replication:"))
    text = " ".join(" ".join(lines[start:]).split())
    assert "each transfer is limited to 50 MB per second" in text
    assert text.index("mail store: the copy is 1 min 35 s old, DELETIONS HELD") < text.index("v0:")
    assert text.endswith("rightly: `nfsha sync 'mail store' --accept-deletes 1a2b3c4d5e6f`")
    facts["copies"] = answer(volume(), held(), paused=True)
    assert render.status(facts, Style()).endswith("`nfsha sync --resume` when the work is done")
    facts["copies"] = answer(*listed, running(), held())
    facts["next"] = "mend the links"
    assert render.status(facts, Style()).endswith("next:        mend the links")
    assert "v0: the copy is 12 s old, idle, next pass in 18 s" in text
    assert "and 4 volumes more: see `nfsha volumes`" in text
    facts["copies"] = answer(running())
    text = " ".join(render.status(facts, Style()).split())
    assert (
        "db/pg: the copy is 12 s old, copies [##########----------] 50 %, 1.2 GB of 2.4 GB,"
        " 98 MB per second, 12 s left" in text
    )


@pytest.mark.parametrize(
    ("amount", "told"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (9949, "9.9 kB"), (9951, "10 kB"),
        (999_499, "999 kB"), (999_500, "1.0 MB"), (1.5e9, "1.5 GB"), (98e12, "98 TB"),
        (3e18, "3000 PB"),
    ],
)  # fmt: skip
def test_amounts_are_said_as_people_say_them(amount: float, told: str) -> None:
    assert words.size(amount) == told


def test_counts_moments_and_bars() -> None:
    assert words.count(1, "file") == "1 file"
    assert words.count(1204, "entry") == "1,204 entries"
    assert words.moment(STARTED_NS) == "2026-01-02 03:04:05Z"
    assert words.moment(10**30) == "9999-12-31 23:59:59Z"
    assert words.moment(-1) == "1970-01-01 00:00:00Z"
    assert [render_volumes.bar(percent).count("#") for percent in (-5, 0, 50, 99, 100, 250)] == [
        0, 0, 10, 20, 20, 20,
    ]  # fmt: skip


@given(st.text(st.characters(codec="utf-8")) | st.binary().map(os.fsdecode))
@example("a\nb\\c\x1b")
@example("\udcff")
def test_a_name_is_taken_back_as_it_was_shown(name: str) -> None:
    assert words.spelled(name).isprintable()
    assert replicate.volume_name(words.spelled(name)) == os.fsdecode(os.fsencode(name))
    assert from_shown(replicate.file_name(shown(os.fsencode(name)))) == os.fsencode(name)
    if "\\" not in name:  # what the shell's completion types is taken too
        assert from_shown(replicate.file_name(name)) == os.fsencode(name)


def test_a_name_that_no_file_can_have_is_shown_all_the_same() -> None:
    assert words.spelled("a\ud800") == "a?"


# --------------------------------------------------------------------------- commands


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return configure(tmp_path, monkeypatch)


@pytest.fixture
def daemon(node: Path) -> Iterator[Daemon]:
    one = Daemon(node / "run" / "nfsha.sock")
    pair = situations.settled()
    one.answers["status"] = {"status": pair.seen(pair.standby)}
    one.answers["volumes"] = answer(volume(), held())
    one.start()
    yield one
    one.stop()


Said = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    "command",
    [
        ["volumes"], ["volumes", "pair", "data", "--yes"], ["sync"], ["sync", "--wait"],
        ["volumes", "forget", "data", "--yes"],
        ["sync", "--pause"], ["sync", "--accept-deletes", "12345678"], ["quarantine", "list"],
        ["quarantine", "drop", ENTRY, "--yes"],
    ],
)  # fmt: skip
def test_without_a_daemon_commands_end_with_six(
    command: list[str], node: Path, capsys: Said
) -> None:
    assert main(command) == Exit.UNREACHABLE
    assert said(capsys)[1].startswith("nfsha: the daemon is not running")


def test_volumes_for_people_and_for_programs(daemon: Daemon, capsys: Said) -> None:
    assert main(["volumes"]) == Exit.DONE
    assert "mail store: paired; the copy is 1 min 35 s old; DELETIONS HELD" in said(capsys)[0]
    assert main(["volumes", "--json"]) == Exit.DONE
    assert json.loads(said(capsys)[0]) == answer(volume(), held())
    assert daemon.asked == [("volumes", {"start": 0})] * 2


def test_many_volumes_come_in_parts(daemon: Daemon, capsys: Said) -> None:
    everything = [volume(f"v{number}") for number in range(5)]

    def part() -> Facts:
        start = daemon.asked[-1][1]["start"]
        return answer(*everything[start : start + 2]) | {"total": 6}

    daemon.answers["volumes"] = part
    assert main(["volumes", "--json"]) == Exit.DONE
    assert json.loads(said(capsys)[0])["volumes"] == everything
    assert [args["start"] for _, args in daemon.asked] == [0, 2, 4, 5]


def test_volumes_are_watched(daemon: Daemon, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    def sleep(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nfsha.cli.watch.time.sleep", sleep)
    assert main(["volumes", "--watch"]) == Exit.INTERRUPTED
    assert said(capsys)[0].startswith("replication: this node copies from the one that serves\n")


NOTHING = {"volume": None, "full": False, "verify": False, "accept_deletes": None}
BEGUN = {
    "ok": True, "why": "",
    "volumes": [
        {"name": "data", "state": "refused", "why": "of before: `nfsha sync` begins the resync"},
        {"name": "mail", "state": "running", "why": "a pass by schedule"},
        {"name": "old", "state": "held", "why": "of before"},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "sent"),
    [
        (["sync"], NOTHING),
        (["sync", "data"], NOTHING | {"volume": "data"}),
        (["sync", "--full", "--verify"], NOTHING | {"full": True, "verify": True}),
        (["sync", "a\nb\\x5c\\xff"], NOTHING | {"volume": "a\nb\\\udcff"}),
        (
            ["sync", "--accept-deletes", "1a2b3c4d"],
            NOTHING | {"volume": "mail store", "accept_deletes": PLAN["hash"]},
        ),
        (
            ["sync", "mail store", "--accept-deletes", str(PLAN["hash"])],
            NOTHING | {"volume": "mail store", "accept_deletes": PLAN["hash"]},
        ),
    ],
)
def test_passes_are_begun(daemon: Daemon, command: list[str], sent: Facts, capsys: Said) -> None:
    daemon.answers["sync"] = BEGUN
    assert main(command) == Exit.DONE
    assert said(capsys)[0] == (
        "data: asked for\nmail: asked for, after the one that runs (a pass by schedule)\n"
        "old: asked for\n"
    )
    assert daemon.asked[-1] == ("sync", sent)


def test_passes_that_are_refused(daemon: Daemon, capsys: Said) -> None:
    daemon.answers["sync"] = {"ok": False, "why": "this node is the source", "volumes": []}
    assert main(["sync"]) == Exit.REFUSED
    assert said(capsys) == ("", "nfsha: refused: this node is the source\n")


def test_while_paused_no_pass_is_asked_for(daemon: Daemon, capsys: Said) -> None:
    paused = "passes are paused: `nfsha sync --resume` lets them go on"
    daemon.answers["sync"] = control.CommandError(paused, {"refused": True})
    assert main(["sync"]) == Exit.REFUSED
    assert said(capsys) == ("", f"nfsha: refused: {paused}\n")
    assert main(["sync", "--json"]) == Exit.REFUSED
    assert json.loads(said(capsys)[0])["error"] == f"refused: {paused}"


def test_a_guard_of_the_daemon_is_a_refusal(daemon: Daemon, capsys: Said) -> None:
    no = control.CommandError("it serves, run this on the other node", {"refused": True})
    daemon.answers["sync"] = no
    assert main(["sync"]) == Exit.REFUSED
    assert said(capsys)[1] == "nfsha: refused: it serves, run this on the other node\n"
    daemon.stream = [no]
    assert main(["sync", "--wait"]) == Exit.REFUSED
    daemon.answers["sync"] = control.CommandError("still starting")
    assert main(["sync"]) == Exit.CANNOT


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["--accept-deletes", "00000000"], "no plan is named 00000000; held are: 1a2b3c4d5e6f of"),
        (["data", "--accept-deletes", "1a2b3c4d"], "no plan is named 1a2b3c4d"),
    ],
)
def test_only_a_plan_that_holds_now_is_accepted(
    daemon: Daemon, command: list[str], told: str, capsys: Said
) -> None:
    assert main(["sync", *command]) == Exit.REFUSED
    assert told in said(capsys)[1]
    assert [name for name, _ in daemon.asked] == ["volumes"]


def test_a_plan_of_two_volumes_wants_the_volume(daemon: Daemon, capsys: Said) -> None:
    daemon.answers["volumes"] = answer(held(), held() | {"name": "other"})
    assert main(["sync", "--accept-deletes", "1a2b3c4d"]) == Exit.REFUSED
    assert "several plans are named 1a2b3c4d" in said(capsys)[1]
    daemon.answers["volumes"] = answer(volume())
    assert main(["sync", "--accept-deletes", "1a2b3c4d"]) == Exit.REFUSED
    assert "no deletions are held" in said(capsys)[1]
    daemon.answers["volumes"] = answer(volume(), running())
    assert main(["sync", "--accept-deletes", "1a2b3c4d"]) == Exit.REFUSED
    assert "a pass runs: it may make the plan, repeat when it has ended" in said(capsys)[1]
    assert main(["sync", "--accept-deletes", "1a2b3c4"]) == Exit.USAGE


@pytest.mark.parametrize(
    ("command", "sent"),
    [
        (["--pause"], ("sync-pause", {"on": True})),
        (["--resume"], ("sync-pause", {"on": False})),
        (["--bandwidth", "50MB"], ("sync-bandwidth", {"kib_s": 48_828})),
        (["--bandwidth", "unlimited"], ("sync-bandwidth", {"kib_s": None})),
        (["--bandwidth", "default"], ("sync-bandwidth", {"kib_s": "default"})),
    ],
)
def test_all_passes_are_turned(
    daemon: Daemon, command: list[str], sent: tuple[str, Facts], capsys: Said
) -> None:
    daemon.answers[sent[0]] = {"ok": True, "why": "from the next pass on"}
    assert main(["sync", *command]) == Exit.DONE
    assert said(capsys)[0] == "done: from the next pass on\n"
    assert daemon.asked == [sent]
    assert main(["sync", "data", *command]) == Exit.USAGE
    assert "begin no pass" in said(capsys)[1]


def stream(*last: Facts | Exception) -> list[Facts | Exception]:
    calm = volume(state="running")
    return [{"volumes": [calm]}, {"volumes": [calm]}, {"volumes": [running()]}, *last]


def test_waiting_tells_each_change_once(daemon: Daemon, capsys: Said) -> None:
    daemon.stream = stream({"done": True, "ok": True, "why": "", "volumes": [volume()]})
    assert main(["sync", "--wait", "data"]) == Exit.DONE
    out = said(capsys)[0]
    assert out.splitlines()[:2] == ["data: a pass runs", "db/pg: copies"]
    assert "idle" not in out
    assert "data: 2026-01-02 03:04:05Z in epoch 7, the changed folders" in out
    assert daemon.asked == [("sync-wait", NOTHING | {"volume": "data"})]
    assert main(["sync", "--wait", "--json"]) == Exit.DONE
    lines = [json.loads(line) for line in said(capsys)[0].splitlines()]
    assert len(lines) == 4
    assert lines[-1]["done"] is True


def test_waiting_on_a_terminal_shows_the_progress(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    daemon.stream = stream({"done": True, "ok": True, "why": "all are equal"})
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["sync", "--wait"]) == Exit.DONE
    out = said(capsys)[0]
    assert "\x1b[H\x1b[2Jdb/pg: the copy is 12 s old, copies [##########----------] 50 %" in out
    assert out.endswith("all are equal\n")


@pytest.mark.parametrize(
    ("last", "code", "told"),
    [
        (
            {
                "done": True,
                "ok": False,
                "refused": True,
                "why": "deletions are held",
                "volumes": [held()],
            },
            Exit.INCOMPLETE,
            "nfsha: not complete: deletions are held; find out who deleted these files",
        ),
        (
            {"done": True, "ok": False, "refused": True, "why": "it is not paired"},
            Exit.REFUSED,
            "nfsha: refused: it is not paired",
        ),
        (control.CommandError("no such volume"), Exit.CANNOT, "nfsha: no such volume"),
        ({"volumes": []}, Exit.UNREACHABLE, "nfsha: the daemon has ended"),
    ],
)
def test_waiting_ends_as_the_passes_do(
    daemon: Daemon, last: Facts | Exception, code: Exit, told: str, capsys: Said
) -> None:
    daemon.stream = stream(last)
    assert main(["sync", "--wait"]) == code
    assert said(capsys)[1].startswith(told)


def test_a_pair_is_made(daemon: Daemon, capsys: Said) -> None:
    daemon.answers["volumes-pair"] = {"ok": True, "why": "both are i now", "uuid": "i"}
    assert main(["volumes", "pair", "data", "--yes"]) == Exit.DONE
    assert said(capsys)[0] == "done: both are i now\n"
    assert daemon.asked == [("volumes-pair", {"volume": "data"})]
    assert main(["volumes", "pair", "data"]) == Exit.USAGE
    assert "add --yes" in said(capsys)[1]
    assert main(["volumes", "pair", "data", "--yes", "--json"]) == Exit.DONE
    assert json.loads(said(capsys)[0])["uuid"] == "i"


def test_a_volume_is_forgotten_when_it_was_confirmed(daemon: Daemon, capsys: Said) -> None:
    daemon.answers["volumes-forget"] = {"ok": True, "why": "volume a\\x0ab (i) is forgotten"}
    assert main(["volumes", "forget", "a\\x0ab"]) == Exit.USAGE
    assert daemon.asked == []
    assert "add --yes" in said(capsys)[1]
    assert main(["volumes", "forget", "a\\x0ab", "--yes"]) == Exit.DONE
    assert said(capsys)[0] == "done: volume a\\x0ab (i) is forgotten\n"
    assert daemon.asked == [("volumes-forget", {"volume": "a\nb"})]
    daemon.answers["volumes-forget"] = control.CommandError("it is mounted", {"refused": True})
    assert main(["volumes", "forget", "i", "--yes"]) == Exit.REFUSED
    assert "it is mounted" in said(capsys)[1]


def test_a_copy_that_is_half_of_another_state_is_told_on_both_nodes() -> None:
    one = volume() | {"tainted": "resync to epoch 8"}
    for way in ({}, {"mode": "source", "source": {"running": True}}):
        text = " ".join(render_volumes.volumes(answer(one, **way), Style()).split())
        assert "data: paired; the copy is 12 s old; NO WHOLE COPY (resync to epoch 8); " in text
        assert "NO WHOLE COPY (resync to epoch 8)" in render_volumes.brief(answer(one, **way))[0]
    assert "NO WHOLE COPY" not in render_volumes.brief_line(volume() | {"tainted": ""})


# --------------------------------------------------------------------------- quarantine


def test_the_quarantine_is_listed_and_shown(daemon: Daemon, capsys: Said) -> None:
    daemon.answers["quarantine"] = LISTING
    assert main(["quarantine", "list", "--volume", "data"]) == Exit.DONE
    assert ENTRY in said(capsys)[0]
    assert daemon.asked[-1] == ("quarantine", {"action": "list", "volume": "data"})
    daemon.answers["quarantine"] = ITEMS
    assert main(["quarantine", "show", ENTRY, "--after", "docs", "-n", "2"]) == Exit.DONE
    assert "docs/a\\x0ab\\xff" in said(capsys)[0]
    assert daemon.asked[-1][1] == {
        "action": "show", "volume": None, "entry": ENTRY, "after": "docs", "limit": 2,
    }  # fmt: skip


def test_an_empty_quarantine() -> None:
    assert "nothing is in quarantine" in render_quarantine.entries({"entries": [], "usage": []})
    assert render_quarantine.items({"items": []}) == "it holds nothing"
    assert "--volume" in render_quarantine.entries(LISTING | {"more": True})


RESTORED = {"ok": True, "files": 2, "beside": [], "refused": [], "refused_count": 0,
            "emptied": True}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ([], {"paths": [], "to": None, "beside": False}),
        (["docs", "a\\x0ab"], {"paths": ["docs", "a\\x0ab"], "to": None, "beside": False}),
        (["--to", "found"], {"paths": [], "to": "found", "beside": False}),
        (["--beside"], {"paths": [], "to": None, "beside": True}),
    ],
)
def test_files_are_restored(daemon: Daemon, options: list[str], sent: Facts, capsys: Said) -> None:
    daemon.answers["quarantine"] = RESTORED
    assert main(["quarantine", "restore", ENTRY, *options]) == Exit.DONE
    assert said(capsys)[0] == "restored 2 files\nthe entry is empty, and gone\n"
    assert daemon.asked == [
        ("quarantine", {"action": "restore", "volume": None, "entry": ENTRY, **sent})
    ]


def test_a_restore_that_would_overwrite(daemon: Daemon, capsys: Said) -> None:
    refused = [{"name": f"f{number}", "why": "something is there"} for number in range(25)]
    blocked = RESTORED | {
        "ok": False,
        "files": 0,
        "refused": refused,
        "refused_count": 40,
        "emptied": False,
    }
    daemon.answers["quarantine"] = blocked
    assert main(["quarantine", "restore", ENTRY]) == Exit.REFUSED
    error = said(capsys)[1]
    assert "f19: something is there\n  and 20 more; `--beside` restores" in error
    daemon.answers["quarantine"] = blocked | {"files": 1, "beside": [["a", "a.nfsha-restored"]]}
    assert main(["quarantine", "restore", ENTRY, "--beside"]) == Exit.INCOMPLETE
    assert "  a as a.nfsha-restored" in said(capsys)[1]
    daemon.answers["quarantine"] = {"ok": False, "why": "this node is passive: give --to"}
    assert main(["quarantine", "restore", ENTRY]) == Exit.REFUSED
    assert said(capsys)[1] == "nfsha: refused: this node is passive: give --to\n"


def test_an_entry_is_dropped_by_its_name(daemon: Daemon, capsys: Said) -> None:
    def either() -> Facts:
        dropped = {"ok": True, "why": "12 files are gone"}
        return LISTING if daemon.asked[-1][1]["action"] == "list" else dropped

    daemon.answers["quarantine"] = either
    assert main(["quarantine", "drop", ENTRY, "--yes"]) == Exit.DONE
    assert said(capsys)[0] == "done: 12 files are gone\n"
    assert daemon.asked[-1][1] == {
        "action": "drop", "volume": None, "entry": ENTRY, "confirm": ENTRY,
    }  # fmt: skip
    assert main(["quarantine", "drop", "other", "--yes"]) == Exit.REFUSED
    assert "there is no entry other" in said(capsys)[1]
    assert main(["quarantine", "drop", ENTRY]) == Exit.USAGE
    assert [args["action"] for _, args in daemon.asked] == ["list", "drop", "list", "list"]


@pytest.mark.parametrize(
    "command",
    [
        ["sync", "--pause", "--resume"], ["sync", "--bandwidth", "50"], ["sync", "a\\b"],
        ["sync", "--bandwidth", "1kB"], ["quarantine", "show"], ["volumes", "pair"],
        ["quarantine", "restore", ENTRY, "--to", "x", "--beside"], ["quarantine", "show", "e", "-n",
        "0"], ["quarantine", "restore", ENTRY, "a\\xZZ"],
    ],
)  # fmt: skip
def test_wrong_usage(command: list[str], capsys: Said) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(command)
    assert ended.value.code == 2
    assert "error: " in said(capsys)[1]


def test_a_backslash_is_explained(capsys: Said) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["sync", "a\\b"])
    assert "a backslash itself as \\x5c" in said(capsys)[1]


if __name__ == "__main__":
    for each, made in SCREENS.items():
        (GOLDEN / f"{each}.txt").write_text(made() + "\n", encoding="utf-8")

"""The reports of moves on the disk: whole, bounded, and what is none is none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nfsha.daemon.report_shape import sound
from nfsha.host import reports
from nfsha.host.reports import ReportError, ReportStore, as_report, read_reports


def part(**other: Any) -> dict[str, Any]:
    return {
        "node": "n", "epoch": 8, "to": "primary", "began_ns": 5, "done": False, "why": "cut",
        "took_ms": 1000, "stall_ms": None, "stall_how": "", "steps": {}, **other,
    }  # fmt: skip


def test_what_is_put_is_there_in_the_next_life(tmp_path: Path) -> None:
    folder = tmp_path / "handovers"
    store = ReportStore(folder, sound)
    store.load()
    assert store.all() == []
    assert store.put("8-0123abcd", "giver", part())
    assert not store.put("8-0123abcd", "giver", part())
    assert store.put("8-0123abcd", "receiver", part(began_ns=4, rounds=[], volumes=[]))
    again = ReportStore(folder, sound)
    again.load()
    assert again.all() == store.all() == read_reports(folder, sound)
    assert again.get("8-0123abcd") == store.get("8-0123abcd")
    assert [path.name for path in folder.iterdir()] == ["8-0123abcd.json"]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = ReportStore(tmp_path / "handovers", sound, kept=3)
    for number in range(5):
        store.put(f"{number}-0123abcd", "giver", part(began_ns=number))
    assert [one["id"] for one in store.all()] == ["2-0123abcd", "3-0123abcd", "4-0123abcd"]
    assert len(list((tmp_path / "handovers").iterdir())) == 3


@pytest.mark.parametrize("number", ["../x", "8", "8-0123ABCD", "8-0123abcd0"])
def test_an_id_that_is_none_is_refused(number: str, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no report is called"):
        ReportStore(tmp_path, sound).put(number, "giver", part())


def test_what_is_too_large_or_cannot_be_written_is_refused(tmp_path: Path) -> None:
    store = ReportStore(tmp_path / "handovers", sound)
    with pytest.raises(ReportError, match="bytes, allowed are"):
        store.put("8-0123abcd", "giver", part(why="x" * reports.MAX_BYTES))
    (tmp_path / "handovers").write_text("a file in its place")
    with pytest.raises(ReportError, match="is not kept"):
        store.put("8-0123abcd", "giver", part())
    assert store.all() == []


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b'{"nfsha_report": 2, "id": "8-0123abcd"}', b'{"nfsha_report": 1}'],
)
def test_a_file_that_is_none_is_left_out(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "8-0123abcd.json").write_bytes(content)
    assert read_reports(tmp_path, sound) == []


REPORT = {"nfsha_report": 1, "id": "8-0123abcd"}


@pytest.mark.parametrize(
    "other",
    [
        {}, {"giver": 5}, {"giver": {}}, {"receiver": part()}, {"giver": {**part(), "more": 1}},
        {"giver": part(took_ms="x")}, {"giver": part(steps={"x": []}), "receiver": None},
        {"giver": part(began_ns=1 << 70)}, {"giver": part(), "receiver": part(rounds=[{}])},
    ],
)  # fmt: skip
def test_a_part_of_another_form_is_no_report(other: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "8-0123abcd.json"
    file.write_text(json.dumps({**REPORT, "giver": part()}))
    assert len(read_reports(tmp_path, sound)) == 1
    file.write_text(json.dumps({**REPORT, **other}))
    assert read_reports(tmp_path, sound) == []


@pytest.mark.timeout(20)
def test_what_is_no_file_holds_nobody_up(tmp_path: Path) -> None:
    folder = tmp_path / "handovers"
    store = ReportStore(folder, sound)
    store.put("8-0123abcd", "giver", part())
    (tmp_path / "elsewhere.json").write_bytes((folder / "8-0123abcd.json").read_bytes())
    os.mkfifo(folder / "8-00000001.json")
    (folder / "8-00000002.json").mkdir()
    (folder / "8-00000003.json").symlink_to("/dev/zero")
    (folder / "8-00000004.json").symlink_to(tmp_path / "elsewhere.json")
    with (folder / "8-00000005.json").open("wb") as file:
        file.truncate(1 << 40)
    again = ReportStore(folder, sound)
    again.load()
    assert again.all() == store.all()


def test_the_reason_is_that_of_the_side_which_ended_it(tmp_path: Path) -> None:
    stored = {
        "id": "8-0123abcd",
        "receiver": part(why="the giver ended it", steps={"FINAL_SYNC": 5}),
        "giver": part(why="clients do not come to rest", stall_ms=400),
    }
    report = as_report(stored)
    assert report["why"] == "clients do not come to rest"
    assert report["stall_ms"] == 400
    assert "ended after 1.0 s" in report["summary"]
    assert not as_report({"id": "8-0123abcd", "receiver": stored["receiver"]})["whole"]
    assert as_report({"id": "8-0123abcd", "receiver": part()})["whole"]  # nobody froze
    assert json.dumps(report)

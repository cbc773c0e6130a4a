"""The list of rpc.statd: what in its folder is a client, and how the list travels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nfsha.nfs import statd
from nfsha.nfs.facts import FactsError
from nfsha.nfs.statd import Holders

HOLDERS = Holders(3, 7, ("192.0.2.7", "2001:db8::7", "web-1.example"))


def test_files_are_clients_but_what_statd_writes_aside_and_hides_is_none(tmp_path: Path) -> None:
    for name in ("192.0.2.7", "web-1.example", "192.0.2.8.new", ".hidden", "with blank", "-x"):
        (tmp_path / name).touch()
    assert statd.read([tmp_path]) == ("192.0.2.7", "web-1.example")


def test_lists_of_both_places_are_one_and_a_missing_one_is_empty(tmp_path: Path) -> None:
    for folder in ("debian", "redhat"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "192.0.2.7").touch()
    (tmp_path / "redhat" / "192.0.2.6").touch()
    folders = [tmp_path / "debian", tmp_path / "redhat", tmp_path / "none"]
    assert statd.read(folders) == ("192.0.2.6", "192.0.2.7")


def test_a_list_comes_back_as_it_was() -> None:
    assert statd.from_json(json.loads(json.dumps(statd.as_json(HOLDERS)))) == HOLDERS


@pytest.mark.parametrize(
    "change",
    [
        {"clients": ["../etc/passwd"]},
        {"clients": [""]},
        {"clients": ["x\n"]},
        {"clients": ["a"] * (statd.CLIENTS_MAX + 1)},
        {"clients": "192.0.2.7"},
        {"state": 1 << 31},
        {"epoch": -1},
        {"more": 1},
    ],
)
def test_what_is_no_list_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(FactsError):
        statd.from_json(statd.as_json(HOLDERS) | change)

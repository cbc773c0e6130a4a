"""Facts about the NFS service: judged, told in words, and refused when they are garbage."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfsha.daemon import nfs_facts
from nfsha.daemon.nfs_facts import Told
from nfsha.nfs import clients, exports, file_handles, portmap, served, v3_fence
from nfsha.nfs.clients import Stray, V4Client, V4ClientFacts
from nfsha.nfs.exports import Configured, Export, ExportFacts
from nfsha.nfs.facts import FactsError, Objection
from nfsha.nfs.file_handles import Handle, HandleFacts
from nfsha.nfs.portmap import Registered
from nfsha.nfs.served import Served
from nfsha.nfs.v3_fence import Answers, FenceFacts, Version4

ANSWERS = Answers("answered", Version4.REFUSED, "version not supported", "answered")
FENCE = FenceFacts("127.0.0.1", ANSWERS, None, (Registered(100003, 3, "tcp", 2049),), "answered")
NO_LIST = FenceFacts("10.0.0.1", ANSWERS, ANSWERS, None, "connection refused")
V4 = V4ClientFacts(
    True, 21, (V4Client("10.0.0.5:700", "Linux NFSv4.2 web", "confirmed"),), recovering=True
)
EXPORTS = ExportFacts(
    "ganesha",
    (
        Export("/nfs/a", ("10.0.0.0/8",), Configured(("everybody: rw",), "Export_Id=1"), "43"),
        Export("/nfs/b", (), None, None, "the server says: this host may not mount it"),
    ),
)
HANDLES = HandleFacts("data", (Handle(".nfsha-volume", "08", 17), Handle("web\udcff", "09", 0)))
STRAY = Stray("10.0.0.5", "10.0.0.1", 2049)
SERVED = Served(FENCE, EXPORTS, V4, (STRAY,), 70, "", (HANDLES,))
TOLD = Told(
    answers=7,
    version="0.1.0",
    key="1122aabb",
    settings=dict.fromkeys(nfs_facts.SETTINGS, "a"),
    wall_ns=1_700_000_000_000_000_000,
    link_address="02:00:00:00:00:01",
    held=("10.0.0.100",),
    seen={"10.0.0.100": "02:00:00:00:00:01"},
    rsync="3.2.7",
    rsync_refused="",
    hindrances=("volume data: held",),
    copied_ns=1,
    paused=False,
    served=SERVED,
)

TRAVELLERS = [
    (FENCE, v3_fence.as_json, v3_fence.from_json),
    (NO_LIST, v3_fence.as_json, v3_fence.from_json),
    (V4, clients.as_json, clients.from_json),
    (STRAY, clients.stray_as_json, clients.stray_from_json),
    (EXPORTS, exports.as_json, exports.from_json),
    (HANDLES, file_handles.as_json, file_handles.from_json),
    (Registered(100003, 3, "udp", 2049), portmap.as_json, portmap.from_json),
    (SERVED, served.as_json, served.from_json),
    (TOLD, nfs_facts.as_json, nfs_facts.from_json),
    (replace(TOLD, seen=None), nfs_facts.as_json, nfs_facts.from_json),
]
travellers = pytest.mark.parametrize(("facts", "write", "read"), TRAVELLERS)


@travellers
def test_facts_arrive_as_they_left(
    facts: object, write: Callable[[Any], Any], read: Callable[[object], object]
) -> None:
    assert read(json.loads(json.dumps(write(facts)))) == facts


def _places(document: object) -> list[tuple[Any, Any]]:
    """Each field of a document, at any depth, as (container, key)."""
    items = (
        list(document.items())
        if isinstance(document, dict)
        else list(enumerate(document))
        if isinstance(document, list)
        else []
    )
    return [(document, key) for key, _ in items] + [
        place for _, value in items for place in _places(value)
    ]


@travellers
@pytest.mark.parametrize("garbage", [-1, 1.5, {}, {"a": 1}, "x" * 5000, "a\0b", [[]]])
def test_garbage_in_any_field_is_refused(
    facts: object, write: Callable[[Any], Any], read: Callable[[object], object], garbage: object
) -> None:
    count = len(_places(write(facts)))
    assert count
    for number in range(count):
        document = json.loads(json.dumps(write(facts)))
        container, key = _places(document)[number]
        container[key] = garbage
        with pytest.raises(FactsError):
            read(document)


@travellers
def test_a_missing_and_an_unknown_field_are_refused(
    facts: object, write: Callable[[Any], Any], read: Callable[[object], object]
) -> None:
    for name in write(facts):
        document = write(facts)
        del document[name]
        with pytest.raises(FactsError):
            read(document)
    with pytest.raises(FactsError):
        read(write(facts) | {"more": 1})
    wholes: tuple[object, ...] = (None, [], 7, "facts")
    for whole in wholes:
        with pytest.raises(FactsError):
            read(whole)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)


@given(_json)
def test_nothing_else_than_facts_errors_come_from_any_document(document: object) -> None:
    for _, _, read in TRAVELLERS:
        with pytest.raises(FactsError):
            read(document)


def test_an_objection_shows_both_sides() -> None:
    one = Objection("export /nfs/a", "exported", "export it on both", "missing")
    assert str(one) == "export /nfs/a: here exported, there missing; export it on both"
    assert str(replace(one, there="")) == "export /nfs/a: exported; export it on both"

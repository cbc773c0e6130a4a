"""A volume that is to be forgotten: only when it is gone from both nodes, and then all of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from nfsha.replica import forgetting
from nfsha.replica.forgetting import NotForgottenError
from nfsha.replica.volume.facts import VolumeFacts
from nfsha.replica.volume.inventory import Inventory
from nfsha.replica.volume.marks import EVERYTHING, MarkStore
from tests.unit.test_replica_marks import FIRST, SECOND, facts, mark


@pytest.fixture
def store(tmp_path: Path) -> MarkStore:
    made = MarkStore(tmp_path / "marks")
    made.load()
    made.put_own(mark(FIRST))
    made.put_peer([mark(SECOND)])
    made.put_names({FIRST: "data", SECOND: "other"})
    return made


def inventory(
    *here: VolumeFacts, there: Sequence[VolumeFacts] | None = (), trouble: str = ""
) -> Inventory:
    made = Inventory(Path("/nowhere"), lambda: 0)
    made.here, made.trouble = here, trouble
    if there is not None:
        made.hear(tuple(there))
    return made


def test_by_name_or_by_identity(store: MarkStore) -> None:
    for wanted, found in (("data", FIRST), (FIRST, FIRST), ("other", SECOND), (SECOND, SECOND)):
        assert forgetting.choose(wanted, inventory(), store) == found


def test_a_new_volume_of_the_old_name_is_not_meant(store: MarkStore) -> None:
    new = facts("10000000-0000-0000-0000-000000000009", name="data")
    assert forgetting.choose("data", inventory(new, there=[new]), store) == FIRST
    with pytest.raises(NotForgottenError, match="mounted here"):
        forgetting.choose("data", inventory(facts(FIRST, name="data"), new), store)


@pytest.mark.parametrize("wanted", ["data", FIRST, "/nfs/x"])
def test_what_is_mounted_here_is_not_forgotten(store: MarkStore, wanted: str) -> None:
    with pytest.raises(NotForgottenError, match=r"volume data is mounted here: unmount it first"):
        forgetting.choose(wanted, inventory(facts(FIRST, name="data")), store)


@pytest.mark.parametrize("wanted", ["data", FIRST])
def test_what_the_other_node_has_may_be_a_disk_that_is_lost_here(
    store: MarkStore, wanted: str
) -> None:
    there = facts(FIRST, name="there/data")
    with pytest.raises(NotForgottenError, match="the other node has this volume mounted, as there"):
        forgetting.choose(wanted, inventory(there=[there]), store)


def test_what_is_not_seen_is_not_forgotten(store: MarkStore) -> None:
    with pytest.raises(NotForgottenError, match="the other node has not told"):
        forgetting.choose("data", inventory(there=None), store)
    with pytest.raises(NotForgottenError, match="the disk hangs"):
        forgetting.choose("data", inventory(trouble="the disk hangs"), store)


def test_two_of_one_name_are_told_apart_by_the_operator(store: MarkStore) -> None:
    store.put_names({SECOND: "data"})
    with pytest.raises(NotForgottenError, match=f"by its UUID, {FIRST}, {SECOND}"):
        forgetting.choose("data", inventory(), store)
    assert forgetting.choose(SECOND, inventory(), store) == SECOND


@pytest.mark.parametrize("wanted", ["unknown", EVERYTHING, "", "../own"])
def test_what_nobody_knows_is_said(store: MarkStore, wanted: str) -> None:
    store.taint([FIRST], "a resync")
    with pytest.raises(NotForgottenError, match="nothing is known of a volume"):
        forgetting.choose(wanted, inventory(), store)


def test_all_of_it_goes_and_is_named(store: MarkStore, tmp_path: Path) -> None:
    notes = tmp_path / "changes"
    notes.mkdir()
    for one in (FIRST, SECOND):
        (notes / f"changes-{one}").write_bytes(b"what changed")
    assert forgetting.forget(FIRST, store, notes) == (
        "the last pass into this node (epoch 7)",
        "when it was walked and verified",
        "its list of changed folders",
    )
    assert [path.name for path in notes.iterdir()] == [f"changes-{SECOND}"]
    assert (store.own, store.peer, store.names) == ({}, {SECOND: mark(SECOND)}, {SECOND: "other"})
    assert forgetting.forget(FIRST, store, notes) == ()

"""Passes against a real rsync daemon, on real filesystems, compared by an independent walk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nfsha.replica.exits import Verdict
from tests.netns.pullkit import UUID, PlainSource, limits, pull
from tests.netns.treewalk import differences, make_odd_tree
from tests.netns.volumekit import LoopVolume, make_volume

__all__ = ["make_volume"]


@pytest.mark.parametrize(("here", "there"), [("ext4", "ext4"), ("xfs", "xfs"), ("ext4", "xfs")])
def test_everything_arrives_equal_by_a_full_walk(
    make_volume: Callable[..., LoopVolume], tmp_path: Path, here: str, there: str
) -> None:
    source, target = make_volume(here), make_volume(there)
    make_odd_tree(source.path / "odd")
    with PlainSource(tmp_path / "source", {UUID: source.path}) as daemon:
        outcome = pull(daemon, target.path, tmp_path, limits=limits(target_empty=True))
        assert outcome.verdict is Verdict.COMPLETE, outcome
        assert differences(source.path, target.path) == []
        again = pull(daemon, target.path, tmp_path, limits=limits(known_files=outcome.files))
    assert (again.verdict, again.transferred_files) == (Verdict.COMPLETE, 0), again
    assert again.sentence == "data: nothing differed, or only attributes did"
    assert again.files == outcome.files
    assert not (target.path / ".nfsha-incoming").exists()

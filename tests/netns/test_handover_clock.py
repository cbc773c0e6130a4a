"""A move after the giver's wall clock was set back: what was written then is found all the same."""

from __future__ import annotations

import pytest

from tests.netns.copies import Copies
from tests.netns.lab import Lab
from tests.netns.test_handover import rewrite_unseen

BACK_S = 180.0
"""More than the slack with which changed files are looked for (changed_files.SLACK_NS)."""


@pytest.mark.alone
@pytest.mark.timeout(120)
def test_what_was_written_while_the_clock_was_behind_is_compared_by_content(lab: Lab) -> None:
    copies = Copies(lab)
    (copies.here("a") / "alike").write_bytes(b"first")
    copies.settle_whole()
    copies.sync()
    with lab.wall_clock_stepped(-BACK_S):
        copies.wait(lambda: "the wall clock was set back by 1" in copies.log("a"), "word of that")
        rewrite_unseen(copies.here("a") / "alike", b"other")
    copies.sync()
    assert (copies.here("b") / "alike").read_bytes() == b"first", "an ordinary pass sees it"
    copies.lab.a.nfsha("switchover", "--yes")
    assert (copies.here("b") / "alike").read_bytes() == b"other"
    assert copies.differences() == []

"""A move of the service with each fault at each boundary: real daemons, NFS, rsync and journals.

What must be in the end: one authority, never two holders of the address, all acknowledged records
served (or, where a copy had to take over from a dead node, kept), and nothing mended by hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest

from nfsha.core.table import ROWS
from tests.netns.handover_cases import (
    EDGES,
    Case,
    Fault,
    played,
    some_cases,
    taken_back,
    whole_product,
)
from tests.netns.lab import Lab
from tests.netns.stepping import Stepped
from tests.sim.test_seeds import first_seed, revision

MakeLab = Callable[..., Lab]


def play(make_lab: MakeLab, cases: Sequence[Case], most_failures: int) -> list[str]:
    """Plays the cases one after the other, in one lab as long as it is well; returns failures."""
    failures: list[str] = []
    left = list(cases)
    while left and len(failures) < most_failures:
        lab = make_lab(state_mib=8)
        with Stepped(lab) as pair:
            while left:
                case, began_s = left.pop(0), time.monotonic()
                try:
                    pair.play(case)
                except AssertionError as error:
                    failures.append(str(error))
                    break
                finally:
                    print(f"{time.monotonic() - began_s:5.1f} s  {case}", flush=True)
            else:
                pair.assert_equal()
        lab.close()
    return failures


def tell(cases: Sequence[Case]) -> None:
    """Prints how many cases there are, and how many of them are played."""
    actions = {(case.boundary.action, case.back) for case in whole_product()}
    print(
        f"{len(actions)} actions x {len(EDGES)} boundaries x {len(Fault)} faults = "
        f"{len(whole_product())} cases; played here: {len(cases)}"
    )


def test_the_list_has_every_row_of_both_ways() -> None:
    there, fired_there = played()
    back, fired_back = taken_back()
    assert {"C83", "P60", "A30", "G10", "Y10", "Z10", "X10", "X20", "Q10", "R10"} <= fired_there
    assert {"C87", "Z30", "Q20", "I20"} <= fired_back
    assert fired_there | fired_back <= {row.id for row in ROWS}
    for actions in (there, back):
        print("\n".join(map(str, actions)))
        assert len(actions) == len(set(actions)) > 7


@pytest.mark.timeout(600)
def test_some_cases_with_each_action_and_each_fault(make_lab: MakeLab) -> None:
    seed = first_seed(revision())
    cases = some_cases(seed)
    assert {case.boundary.action for case in cases} == set(played()[0])
    assert {case.fault for case in cases} == set(Fault)
    print(f"seed {seed}")
    tell(cases)
    failures = play(make_lab, cases, most_failures=1)
    assert not failures, failures[0]


@pytest.mark.timeout(120)
def test_a_receiver_that_is_just_back_copies_before_it_says_that_it_is_near(lab: Lab) -> None:
    with Stepped(lab) as pair, pair.judged("asked at once"):
        receiver = pair.receiver
        pair.daemon(receiver).kill()
        pair.start(receiver)
        pair.wait_asked()
        pair.wait(lambda: pair.status(receiver).get("phase") == "ACTIVE", "end of the move")
        told = pair.printed(receiver)
        begun, full, near = (told.index(sign) for sign in (" P60 ", "a full walk", " Y10 "))
        assert begun < full < near, told


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", list(Fault), ids=lambda fault: fault.name.lower())
def test_the_whole_product(make_lab: MakeLab, fault: Fault) -> None:
    cases = [case for case in whole_product() if case.fault is fault]
    tell(cases)
    failures = play(make_lab, cases, most_failures=len(cases))
    assert not failures, f"{len(failures)} of {len(cases)} cases:\n" + "\n".join(failures)

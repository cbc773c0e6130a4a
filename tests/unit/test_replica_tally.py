"""The counts of a handover's receiver."""

from __future__ import annotations

from nfsha.replica.fetching import tally
from nfsha.replica.fetching.tally import Round, Tally

ONE = "11111111-2222-4333-8444-555555555555"
TWO = "22222222-2222-4333-8444-555555555555"


def test_passes_add_up_per_volume_and_per_round() -> None:
    counted = Tally()
    counted.begin_round("full")
    assert counted.running == "full"
    counted.add(TWO, "b", copied_files=3, copied_bytes=30, deleted=2, quarantined=1)
    counted.add(ONE, "a", copied_files=1, copied_bytes=10, deleted=0)
    counted.end_round(500)
    counted.begin_round("changes")
    counted.add(TWO, "b", copied_files=1, copied_bytes=5, deleted=0)
    counted.end_round(40, "broken off")
    assert counted.running == ""
    assert counted.as_json() == {
        "volumes": [
            {
                "name": "a",
                "passes": 1,
                "copied_files": 1,
                "copied_bytes": 10,
                "deleted": 0,
                "quarantined": 0,
            },
            {
                "name": "b",
                "passes": 2,
                "copied_files": 4,
                "copied_bytes": 35,
                "deleted": 2,
                "quarantined": 1,
            },
        ],
        "rounds": [
            {
                "what": "full",
                "took_ms": 500,
                "copied_files": 4,
                "copied_bytes": 40,
                "trouble": "",
            },
            {
                "what": "changes",
                "took_ms": 40,
                "copied_files": 1,
                "copied_bytes": 5,
                "trouble": "broken off",
            },
        ],
    }


def test_rounds_are_bounded_and_the_newest_are_kept() -> None:
    counted = Tally()
    for number in range(tally.MAX_ROUNDS + 5):
        counted.begin_round("changes")
        counted.end_round(number)
    assert len(counted.rounds) == tally.MAX_ROUNDS
    assert counted.rounds[-1] == Round("changes", tally.MAX_ROUNDS + 4, 0, 0)


def test_what_a_comparison_by_content_replaced_is_kept_and_is_no_pass() -> None:
    counted = Tally()
    counted.put_aside(ONE, "a", 0)
    assert counted.volumes == {}
    counted.put_aside(ONE, "a", 2)
    one = counted.volumes[ONE]
    assert (one.passes, one.copied_files, one.quarantined) == (0, 2, 2)

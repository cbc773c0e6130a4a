"""What the two nodes tell each other of their volumes: read with care, refused as a whole or taken.

The other node has the key of the pair, but its program may be another version, or broken: nothing
that it says may raise anything but ExchangeError here, or take more memory than it takes itself.
Only the form: nothing here decides what follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from nfsha.replica.content.changed_files import ChangedError
from nfsha.replica.content.questions import Question, question_from_json
from nfsha.replica.content.suspects import SuspectError
from nfsha.replica.volume.facts import (
    VolumeError,
    VolumeFacts,
    as_json,
    cut,
    from_json,
    is_identity,
    is_text,
)
from nfsha.replica.volume.marks import (
    EVERYTHING,
    MAX_MARKS,
    MAX_WHY,
    Mark,
    MarksError,
    MarkStore,
    mark_as_json,
    mark_from_json,
)

VERSION: Final = 1
MAX_VOLUMES: Final = 4096
MAX_QUESTIONS: Final = 64

Facts = dict[str, Any]


class ExchangeError(Exception):
    """What the other node told is not what nfsha tells; the text says what of it."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What the other node told of itself. `tainted`: why, by UUID (or `marks.EVERYTHING`)."""

    volumes: tuple[VolumeFacts, ...]
    marks: tuple[Mark, ...]
    tainted: Mapping[str, str]
    questions: tuple[Question, ...]


def own_facts(here: Sequence[VolumeFacts], store: MarkStore, questions: list[Facts]) -> Facts:
    """This node's facts, as JSON can carry them; `questions` as `Asking.as_json` gives them."""
    return {
        "nfsha_node": VERSION,
        "volumes": [as_json(one) for one in here],
        "marks": [mark_as_json(mark) for mark in store.own.values()],
        "tainted": store.taints,
        "questions": questions,
    }


def read_node(facts: object) -> NodeFacts:
    """Reads what `own_facts` made. ExchangeError for anything else. For a thread: 10 ms for 250."""
    if not isinstance(facts, dict) or facts.get("nfsha_node") != VERSION:
        raise ExchangeError("they are of another version of nfsha")
    try:
        return NodeFacts(
            volumes=tuple(from_json(one) for one in _listed(facts, "volumes", MAX_VOLUMES)),
            marks=tuple(mark_from_json(one) for one in _listed(facts, "marks", MAX_MARKS)),
            tainted=_tainted(facts.get("tainted")),
            questions=tuple(map(_question, _listed(facts, "questions", MAX_QUESTIONS))),
        )
    except (VolumeError, MarksError, SuspectError, ChangedError) as error:
        raise ExchangeError(str(error)) from error


def _listed(facts: Facts, name: str, limit: int) -> list[object]:
    found = facts.get(name)
    if not isinstance(found, list):
        raise ExchangeError(f"{name} is {cut(found)}, expected a list")
    if len(found) > limit:
        raise ExchangeError(f"{name} has {len(found)} entries, at most {limit} are taken")
    return found


def _tainted(found: object) -> Mapping[str, str]:
    if not isinstance(found, dict) or len(found) > MAX_VOLUMES:
        raise ExchangeError(f"tainted is {cut(found)}, expected an object of a bounded size")
    for uuid, why in found.items():
        if uuid != EVERYTHING and not is_identity(uuid):
            raise ExchangeError(f"tainted is {cut(uuid)}, expected a volume's UUID")
        if not is_text(why) or not 0 < len(why) <= MAX_WHY:
            raise ExchangeError(f"{uuid} is tainted because of {cut(why)}")
    return dict(found)


def _question(one: object) -> Question:
    if not isinstance(one, dict):
        raise SuspectError(f"{cut(one)} is no question")
    return question_from_json(one.get("question"))

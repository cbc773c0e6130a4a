"""How the passive node asks the active one about files, and how that one answers.

A question travels with the asker's facts, under an id that is its digest; the
answer lies in the source's control module under a name with that id. Level-triggered: who hears a
question that is answered already does nothing, who sees no answer asks on until it is too late.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, Final, TypeVar

from nfsha.replica.content import changed_files, suspects
from nfsha.replica.content.changed_files import ChangedError, ChangedFiles, ChangedQuestion
from nfsha.replica.content.suspects import SuspectAnswer, SuspectError, SuspectQuestion
from nfsha.replica.files.durable import names_after, read_small, write_durably
from nfsha.replica.volume import volumes
from nfsha.replica.volume.facts import VolumeError, VolumeFacts

log = logging.getLogger(__name__)

MAX_OPEN: Final = 4
ANSWER_WITHIN_S: Final = 120.0
ASK_FIRST_S: Final = 0.2
ASK_EVERY_S: Final = 1.0
"""How long to wait before the first look for an answer; twice as long each time, up to this."""
CHANGED_WITHIN_S: Final = 600.0
"""To look at each file of a volume takes about 10 s for a million that the kernel knows, and
minutes where the disk must be read."""
MAX_ANSWER_BYTES: Final = 8 << 20
_PREFIX: Final = "answer-"

Question = SuspectQuestion | ChangedQuestion
_Answer = TypeVar("_Answer")


def question_id(question: Question) -> str:
    """The same question has the same id."""
    text = json.dumps(question.to_json(), sort_keys=True).encode()
    return hashlib.sha256(text).hexdigest()[:32]


def answer_name(number: str) -> str:
    """The file of an answer in the control module."""
    return f"{_PREFIX}{number}"


class Asking:
    """The questions of the passive node that are not answered yet."""

    def __init__(self, changed: Callable[[], None]) -> None:
        """`changed`: the facts for the other node say something else now."""
        self._changed = changed
        self._open: dict[str, Question] = {}

    def as_json(self) -> list[dict[str, Any]]:
        """For the facts."""
        return [
            {"id": number, "question": question.to_json()}
            for number, question in sorted(self._open.items())
        ]

    async def ask(
        self,
        question: SuspectQuestion,
        fetch: Callable[[str], Awaitable[Path | None]],
    ) -> tuple[SuspectAnswer, ...] | None:
        """Asks, and waits for the answer; None when none came. `fetch` gets a published file."""
        return await self._ask(
            question,
            fetch,
            lambda document: suspects.answers_from_json(document, question),
            ANSWER_WITHIN_S,
        )

    async def ask_changed(
        self,
        question: ChangedQuestion,
        fetch: Callable[[str], Awaitable[Path | None]],
    ) -> ChangedFiles | None:
        """The same for the files that changed."""
        return await self._ask(question, fetch, ChangedFiles.from_json, CHANGED_WITHIN_S)

    async def _ask(
        self,
        question: Question,
        fetch: Callable[[str], Awaitable[Path | None]],
        read: Callable[[object], _Answer],
        within_s: float,
    ) -> _Answer | None:
        number = question_id(question)
        self._open[number] = question
        self._changed()
        pause_s = ASK_FIRST_S
        try:
            async with asyncio.timeout(within_s):
                while True:
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, ASK_EVERY_S)
                    path = await fetch(answer_name(number))
                    if path is not None:
                        return await asyncio.to_thread(lambda file: read(_read(file)), path)
        except TimeoutError:
            return None
        except (SuspectError, ChangedError) as error:
            log.warning("the source's answer is refused: %s", error)
            return None
        finally:
            self._open.pop(number, None)
            self._changed()


def _read(path: Path) -> object:
    try:
        return json.loads(read_small(path, MAX_ANSWER_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise SuspectError(f"it cannot be read: {error}") from error


def question_from_json(document: object) -> Question:
    """Reads either kind. SuspectError or ChangedError for anything else."""
    if ChangedQuestion.is_meant(document):
        return ChangedQuestion.from_json(document)
    return SuspectQuestion.from_json(document)


class Answering:
    """The active node's answers, in its control module."""

    def __init__(self, public: Path) -> None:
        self._public = public
        self._busy: set[str] = set()

    async def heard(
        self,
        questions: Iterable[Question],
        volume: Callable[[str], VolumeFacts | None],
    ) -> None:
        """Answers what is asked and not answered yet, and forgets what is asked no more.

        `volume` gives the volume here that bears an identity.
        """
        asked = {question_id(question): question for question in questions}
        for name in await asyncio.to_thread(names_after, self._public, _PREFIX):
            if name not in asked:
                with contextlib.suppress(FileNotFoundError):
                    (self._public / answer_name(name)).unlink()
        for number, question in list(asked.items())[:MAX_OPEN]:
            if number not in self._busy and not (self._public / answer_name(number)).exists():
                await self._answer(number, question, volume(question.uuid))

    async def _answer(self, number: str, question: Question, one: VolumeFacts | None) -> None:
        if one is None:
            return
        self._busy.add(number)
        try:
            await asyncio.to_thread(_write, self._public / answer_name(number), one, question)
        except (VolumeError, OSError) as error:
            log.warning("volume %s: what the other node asked stays open: %s", one.name, error)
        finally:
            self._busy.discard(number)


def _write(path: Path, one: VolumeFacts, question: Question) -> None:
    document: object
    with volumes.root_of(one) as root_fd:
        if isinstance(question, ChangedQuestion):
            document = changed_files.answer(root_fd, question).to_json()
        else:
            document = suspects.answers_to_json(suspects.answer(root_fd, question))
    write_durably(path, json.dumps(document).encode())

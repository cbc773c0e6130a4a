"""What the source published of all its volumes at one moment, as the other node fetched it.

One fetch for all of them: while clients are held, each session with the source is time that they
wait. It fetches nothing itself and decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nfsha.replica.files.durable import read_small
from nfsha.replica.journal.published import MAX_BYTES, Published, read_published
from nfsha.replica.source.facts import SourceFacts, read_facts
from nfsha.replica.source.serving import FACTS_NAME, changes_name
from nfsha.replica.volume.marks import Mark


@dataclass(frozen=True, slots=True)
class Listing:
    """The source's facts, and what its change journals named, by the volume's identity."""

    facts: SourceFacts
    changes: Mapping[str, Published]

    @property
    def is_fresh(self) -> bool:
        """Whether each list was made anew for this fetch."""
        return all(one.as_of_ns >= self.facts.as_of_ns for one in self.changes.values())

    def since(self, mark: Mark) -> tuple[tuple[bytes, ...] | None, str]:
        """The folders of one volume that changed since a pass; None, and why nobody knows.

        A list that was not made anew for this fetch (the source leaves one that takes too long as
        it is) knows nothing either: what changed last may be missing in it.
        """
        found = self.changes.get(mark.volume)
        if found is None:
            return None, "the source has no change journal"
        if found.as_of_ns < self.facts.as_of_ns:
            return None, "the source's change journal could not tell the newest changes in time"
        return found.since(mark.changes_id, mark.changes_seq)


def names_in(uuids: Iterable[str]) -> list[str]:
    """The files of the control module that a listing of these volumes is made of."""
    return [FACTS_NAME, *(changes_name(uuid) for uuid in uuids)]


def read_listing(folder: Path, uuids: Iterable[str]) -> Listing:
    """Reads what was fetched into a folder. Blocks. OSError, VolumeError, ChangesError."""
    facts = read_facts(folder / FACTS_NAME)
    changes = {}
    for uuid in uuids:
        path = folder / changes_name(uuid)
        if path.exists():
            found = read_published(read_small(path, MAX_BYTES))
            still_ns = max(found.as_of_ns, facts.still_ns.get(uuid, 0))
            changes[uuid] = replace(found, as_of_ns=still_ns)
    return Listing(facts, changes)

"""What the source published of itself and of its volumes, as the other node read it.

The form that `nfsha.replica.source.serving` writes. It fetches nothing and judges nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from nfsha.core.model import Epoch
from nfsha.replica.files.durable import read_small
from nfsha.replica.volume.facts import VolumeError, VolumeFacts, epoch_from_json, from_json

MAX_FACTS_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """What the source published: its epoch, since when all is in, and its volumes."""

    epoch: Epoch
    as_of_ns: int
    volumes: tuple[VolumeFacts, ...]
    written_ns: Mapping[str, tuple[int, int]]
    """The ctimes of each volume's identity and stamp, by identity: no other filesystem has both."""
    still_ns: Mapping[str, int] = field(default_factory=dict)
    """Up to when a list of changes, published earlier, is still all; by identity, not for all."""
    leaving: bool = False
    """The source is about to stop for good: there is no time for what can be left out."""

    def of(self, uuid: str) -> VolumeFacts | None:
        """The volume of this identity."""
        return next((one for one in self.volumes if one.identity == uuid), None)

    def used_bytes(self, uuid: str) -> int:
        """What its filesystem has in use there; 0 for one that is not offered."""
        there = self.of(uuid)
        return 0 if there is None else there.used_bytes


def read_facts(path: Path) -> SourceFacts:
    """Reads what the source published. Raises OSError or VolumeError for anything else."""
    try:
        document = json.loads(read_small(path, MAX_FACTS_BYTES))
    except (ValueError, RecursionError) as error:
        raise VolumeError(f"the source's facts are no JSON: {error}") from error
    if not isinstance(document, dict) or document.get("nfsha_facts") != 1:
        raise VolumeError("the source's facts are of another version of nfsha")
    as_of_ns, listed = document.get("as_of_ns"), document.get("volumes")
    written_ns, still_ns = document.get("written_ns"), document.get("still_ns", {})
    leaving = document.get("leaving", False)
    if (
        not _is_time(as_of_ns)
        or not isinstance(listed, list)
        or not _are_pairs(written_ns)
        or not _are_times(still_ns)
        or not isinstance(leaving, bool)
    ):
        raise VolumeError("the source's facts are incomplete")
    return SourceFacts(
        epoch_from_json(document.get("epoch")),
        as_of_ns,
        tuple(from_json(one) for one in listed),
        {uuid: (identity_ns, stamp_ns) for uuid, (identity_ns, stamp_ns) in written_ns.items()},
        still_ns,
        leaving,
    )


def _are_times(value: object) -> TypeGuard[dict[str, int]]:
    return isinstance(value, dict) and all(map(_is_time, value.values()))


def _are_pairs(value: object) -> TypeGuard[dict[str, list[int]]]:
    return isinstance(value, dict) and all(
        isinstance(one, list) and len(one) == 2 and all(map(_is_time, one))
        for one in value.values()
    )


def _is_time(value: object) -> TypeGuard[int]:
    """Nanoseconds since 1970, as a mark can keep them."""
    return type(value) is int and 0 <= value < 1 << 63

"""The form of one node's part of a report, as the nodes tell it, and as it stands on the disk."""

from __future__ import annotations

from typing import Final

from nfsha.daemon.shapes import Shape, fits
from nfsha.replica.fetching import tally

GIVER: Final[Shape] = {
    "node": str,
    "epoch": int,
    "to": str,
    "began_ns": int,
    "done": bool,
    "why": str,
    "took_ms": int,
    "stall_ms": (int, None),
    "stall_how": str,
    "steps": {str: int},
}
RECEIVER: Final[Shape] = {**GIVER, **tally.SHAPE}


def sound(side: str, part: object) -> bool:
    """Whether this can be shown as the part of that side: `giver` or `receiver`."""
    return fits(part, RECEIVER if side == "receiver" else GIVER)

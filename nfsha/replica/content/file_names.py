"""Names of files, as the two nodes ask each other for them: bytes, carried by JSON."""

from __future__ import annotations

import base64
import binascii
from typing import Final

from nfsha.replica.files import beneath
from nfsha.replica.files.own_names import OWN_PREFIX
from nfsha.replica.volume.facts import cut

_MOST_CHARS: Final = 2 * beneath.MAX_NAME_BYTES
"""Base64 makes four characters of three bytes."""


def to_text(name: bytes) -> str:
    """A name as JSON can carry it."""
    return base64.b64encode(name).decode("ascii")


def from_text(text: object) -> bytes:
    """Reads what `to_text` made. Raises ValueError, with words for an operator, for all else."""
    if not isinstance(text, str) or len(text) > _MOST_CHARS:
        raise ValueError("a name is no text, or too long")
    try:
        name = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"a name is not base64: {error}") from error
    if to_text(name) != text:
        raise ValueError("a name is not spelled as nfsha spells it")
    return name


def require_data(name: bytes) -> None:
    """Raises ValueError for what is no name of data: it leads elsewhere, or is nfsha's own."""
    called = cut(beneath.shown(name))
    try:
        parts = beneath.parts_of(name)
    except ValueError as error:
        raise ValueError(f"{called}: {error}") from error
    if parts[0].startswith(OWN_PREFIX):
        raise ValueError(f"{called}: a name that nfsha keeps for itself")

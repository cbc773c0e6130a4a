"""The names of what nfsha itself puts into a volume: none of it is data, none is copied."""

from __future__ import annotations

import os
from typing import Final

from nfsha.replica.files.durable import temporary_name

OWN_PREFIX: Final = b".nfsha-"
"""In a volume's root all that begins so is nfsha's."""

IDENTITY_NAME: Final = ".nfsha-volume"
STAMP_NAME: Final = ".nfsha-stamp"
QUARANTINE_NAME: Final = ".nfsha-quarantine"
PARTIAL_NAME: Final = ".nfsha-partial"
"""rsync's parts of files, in any folder."""
INCOMING_NAME: Final = ".nfsha-incoming"

PARTIAL: Final = os.fsencode(PARTIAL_NAME)
INCOMING: Final = os.fsencode(INCOMING_NAME)

OWN_NAMES: Final = frozenset(
    {
        IDENTITY_NAME,
        temporary_name(IDENTITY_NAME),
        STAMP_NAME,
        temporary_name(STAMP_NAME),
        QUARANTINE_NAME,
        PARTIAL_NAME,
        INCOMING_NAME,
    }
)
"""What may lie in a volume's root."""

LOST_AND_FOUND: Final = "lost+found"

OWN_ROOT_NAMES: Final = tuple(
    map(os.fsencode, (IDENTITY_NAME, STAMP_NAME, QUARANTINE_NAME, INCOMING_NAME, LOST_AND_FOUND))
)
"""In a volume's root these are not data: never sent, never deleted."""

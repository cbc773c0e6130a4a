"""Which clients hold locks at this node's server: the list of its rpc.statd; and how it travels.

The lock manager (the kernel's lockd, or nfs-ganesha) has statd watch each client that takes a lock;
statd keeps a file for each in its folder `sm`, under the client's address or name (statd(8)). Only
the names are read: what is in the files is for the lock manager. Nothing here is changed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nfsha.nfs.facts import Document, FactsError, Fields

FOLDERS: Final = (Path("/var/lib/nfs/sm"), Path("/var/lib/nfs/statd/sm"))
"""Where the lists are: on Debian and SUSE, and on Red Hat's systems."""

CLIENTS_MAX: Final = 4096
"""Most clients that one node tells the other; what is beyond them is not told."""

STATE_MAX: Final = (1 << 31) - 1
"""NSM's state is a signed int."""

_ENTRIES_MAX: Final = 65_536
# An address or a host's name. statd writes a file aside under `.new` first (support/nsm/file.c).
_CLIENT: Final = re.compile(r"[0-9A-Za-z:][0-9A-Za-z.:%_-]{0,254}")
_EPOCH_MAX: Final = (1 << 53) - 1


@dataclass(frozen=True, slots=True)
class Holders:
    """Who may hold locks at the server of a reign: `epoch` is its number, 0 for none.

    `state` is the number under which clients were told of a change last, by either node.
    """

    epoch: int = 0
    state: int = 0
    clients: tuple[str, ...] = ()


def read(folders: Sequence[Path] = FOLDERS) -> tuple[str, ...]:
    """Returns the clients that statd watches, sorted; a folder that is not there has none.

    Blocks for as long as the folder's disk does. Raises OSError.
    """
    found: set[str] = set()
    for folder in folders:
        try:
            with os.scandir(folder) as entries:
                names = (entry.name for _, entry in zip(range(_ENTRIES_MAX), entries, strict=False))
                found.update(name for name in names if is_client(name))
        except FileNotFoundError:
            continue
    return tuple(sorted(found))


def is_client(name: str) -> bool:
    """Whether this is an address or a host's name."""
    return _CLIENT.fullmatch(name) is not None and not name.endswith(".new")


def as_json(holders: Holders) -> Document:
    """Returns the list as JSON can carry it: to the other node, or to the disk."""
    return {"epoch": holders.epoch, "state": holders.state, "clients": [*holders.clients]}


def from_json(document: object) -> Holders:
    """Returns the list that `as_json` made a document of; FactsError for anything else."""
    fields = Fields("lock holders", document, "epoch", "state", "clients")
    clients = fields.texts("clients", CLIENTS_MAX)
    for one in clients:
        if not is_client(one):
            raise FactsError(f"lock holders with a client {one[:80]!r}")
    return Holders(fields.number("epoch", _EPOCH_MAX), fields.number("state", STATE_MAX), clients)

"""Forgets a volume that was removed for good.

A volume that was copied and is not mounted may as well be a disk that is lost: what this node still
knows of it keeps it from taking over. So it asks first: a volume that is mounted here, or that the
other node has, is not forgotten.
"""

from __future__ import annotations

from pathlib import Path

from nfsha.replica.journal.published import last_run_path
from nfsha.replica.volume.inventory import Inventory
from nfsha.replica.volume.marks import EVERYTHING, MarkStore


class NotForgottenError(Exception):
    """The volume may not be forgotten, or is not known; the text says why, and what to do."""


def choose(wanted: str, inventory: Inventory, store: MarkStore) -> str:
    """The identity of the volume that is called so, or bears it. NotForgottenError.

    `inventory` must have been looked at a moment ago.
    """
    if inventory.trouble:
        raise NotForgottenError(f"what is mounted here is not known now: {inventory.trouble}")
    if inventory.there is None:
        raise NotForgottenError(
            "the other node has not told its volumes, and may still have this one: see "
            "`nfsha status`, and repeat when it is heard"
        )
    uuid = _identity(wanted, inventory, store)
    _require_gone(uuid, inventory)
    return uuid


def _identity(wanted: str, inventory: Inventory, store: MarkStore) -> str:
    known = (store.own.keys() | store.peer.keys() | store.taints.keys()) - {EVERYTHING}
    if wanted in known:
        return wanted
    mounted = {one.identity for one in inventory.here}
    gone = sorted(uuid for uuid in known - mounted if store.names.get(uuid) == wanted)
    if len(gone) > 1:
        raise NotForgottenError(
            f"several volumes were called {wanted!r}: name one by its UUID, {', '.join(gone)}"
        )
    if gone:
        return gone[0]
    here = inventory.by_name(wanted)
    if here is not None:
        raise NotForgottenError(_is_mounted(here.name))
    raise NotForgottenError(
        f"nothing is known of a volume {wanted!r}; `nfsha status` names those that are missing"
    )


def _is_mounted(name: str) -> str:
    return f"volume {name} is mounted here: unmount it first, on both nodes, if it is to go"


def _require_gone(uuid: str, inventory: Inventory) -> None:
    here = [one.name for one in inventory.here if one.identity == uuid]
    if here:
        raise NotForgottenError(_is_mounted(here[0]))
    there = [one.name for one in inventory.there or () if one.identity == uuid]
    if there:
        raise NotForgottenError(
            f"the other node has this volume mounted, as {there[0]}: mount its copy here, or, if "
            "it is to go, unmount it there, then repeat this on both nodes"
        )


def forget(uuid: str, store: MarkStore, notes: Path) -> tuple[str, ...]:
    """Removes all that is known of it, durably; says in words what that was. It blocks.

    `notes`: the folder of the change journals. Raises MarksError and OSError.
    """
    journal = last_run_path(notes, uuid)
    found = ["its list of changed folders"] if journal.exists() else []
    journal.unlink(missing_ok=True)
    return (*store.forget(uuid), *found)

"""What forbids a pass: both sides of a volume, as they are now, looked at before a byte is written.

It looks at values only, and changes nothing. What is refused is asked again when the next pass is
due; what failed (`TROUBLES`) is tried again soon.
"""

from __future__ import annotations

from nfsha.core.model import Epoch
from nfsha.replica.files.own_names import STAMP_NAME
from nfsha.replica.journal.published import ChangesError
from nfsha.replica.quarantine.quarantine import QuarantineError
from nfsha.replica.rsync.child import ChildError
from nfsha.replica.source.facts import SourceFacts
from nfsha.replica.volume.facts import VolumeError, VolumeFacts, is_of_another_history
from nfsha.replica.volume.marks import MarksError

TROUBLES = (VolumeError, ChangesError, QuarantineError, ChildError, MarksError, OSError)
"""What the world can do to a pass: it failed, and is tried again."""


class RefusedError(Exception):
    """A guard forbids a pass; the text says what was found on both sides and what to do."""


def guard(uuid: str, epoch: Epoch, here: VolumeFacts | None, facts: SourceFacts) -> VolumeFacts:
    """Everything that must be so before a byte is written (I3, I5). Raises RefusedError."""
    if facts.epoch != epoch:
        raise RefusedError(
            f"the source offers epoch {facts.epoch}, this node follows epoch {epoch}"
        )
    there = facts.of(uuid)
    if here is None:
        raise RefusedError("it is not mounted here, or its identity file is missing: mount it")
    if there is None:
        raise RefusedError("the source does not offer it: see `nfsha volumes` on the other node")
    if there.stamp != epoch:
        raise RefusedError(f"the source's volume bears the stamp {there.stamp}, not {epoch}")
    if here.failing or here.read_only:
        what = here.failing or "it is mounted read-only"
        raise RefusedError(f"the copy at {here.path} cannot be written: {what}")
    if is_of_another_history(here.stamp, epoch):
        raise RefusedError(
            f"the copy at {here.path} bears the stamp {here.stamp}, the source {there.stamp}: "
            "what lies here is newer, or of another history. If the source's data is the "
            f"truth, remove {here.path}/{STAMP_NAME} here: what differs then goes to "
            "quarantine. If this node's is: stop nfsha on the other one, and run "
            "`nfsha activate --force` here"
        )
    if there.used_bytes > here.size_bytes:
        raise RefusedError(
            f"the source uses {there.used_bytes} bytes, the copy's filesystem at {here.path} "
            f"has {here.size_bytes} in all: make it larger"
        )
    return here


def guard_against_a_clone(
    here: VolumeFacts, facts: SourceFacts, written_ns: tuple[int, int]
) -> None:
    """`written_ns`: as `written_at_ns` says it of the volume here. Raises RefusedError."""
    if here.identity is not None and written_ns == facts.written_ns.get(here.identity):
        raise RefusedError(
            f"{here.path} is the same filesystem as the source's, or a copy of it block by "
            "block: give this node a filesystem of its own"
        )

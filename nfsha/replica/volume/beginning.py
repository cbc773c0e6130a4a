"""When a volume's epoch began, by the clock that stamps its files: also after that was set back.

The ctime of the stamp says it, and what has a younger ctime changed since then. A clock that is set
back writes files that look older than the epoch: then the stamp is touched, and is as old as they.
"""

from __future__ import annotations

import logging
import os

from nfsha.replica.files.own_names import STAMP_NAME
from nfsha.replica.volume import volumes
from nfsha.replica.volume.facts import VolumeFacts

log = logging.getLogger(__name__)


def follow_clock(one: VolumeFacts, now_ns: int) -> bool:
    """Touches the stamp if it was written later than now. It blocks. VolumeError, OSError.

    Called every few seconds; what was written between the step and that is within the slack of who
    asks for changed files. Returns whether the clock was set back.
    """
    with volumes.root_of(one) as root_fd:
        found = os.stat(STAMP_NAME, dir_fd=root_fd, follow_symlinks=False)
        if found.st_ctime_ns <= now_ns:
            return False
        times = (found.st_atime_ns, found.st_mtime_ns)
        os.utime(STAMP_NAME, ns=times, dir_fd=root_fd, follow_symlinks=False)
    log.warning(
        "volume %s: the wall clock was set back by %.0f s or more since this epoch began",
        one.name,
        (found.st_ctime_ns - now_ns) / 1e9,
    )
    return True

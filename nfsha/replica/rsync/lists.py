"""The short-lived files from which rsync reads what to look at."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO


class ScratchError(Exception):
    """The folder for short-lived files cannot be used; the text says why."""


def listed(scratch: Path, data: bytes) -> IO[bytes]:
    """A file for rsync, gone when it is closed; it blocks. Raises ScratchError.

    With a name, because rsync 3.5 does not open one that has none by /proc/self/fd.
    """
    try:
        file = tempfile.NamedTemporaryFile(  # noqa: SIM115 - the caller closes it
            dir=scratch, prefix="folders-"
        )
        file.write(data)
        file.flush()
    except OSError as error:
        raise ScratchError(f"cannot write into {scratch}: {error.strerror}") from error
    return file

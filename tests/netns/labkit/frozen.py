"""A filesystem in which each write hangs, uninterruptible, as in a dead disk (ioctl FIFREEZE)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

FIFREEZE = 0xC0045877  # linux/fs.h
FITHAW = 0xC0045878


@contextlib.contextmanager
def frozen(folder: Path, most_s: float = 60.0) -> Iterator[None]:
    """Freezes the filesystem that the folder is on, for the block, and for `most_s` at most.

    Processes that write meanwhile cannot even be killed: a test that hangs itself would leave them.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.ioctl(fd, FIFREEZE, 0)
    late = threading.Timer(most_s, lambda: _thaw(fd))
    late.daemon = True
    late.start()
    try:
        yield
    finally:
        late.cancel()
        late.join()
        _thaw(fd)
        os.close(fd)


def _thaw(fd: int) -> None:
    with contextlib.suppress(OSError):  # EINVAL: it is thawed already
        fcntl.ioctl(fd, FITHAW, 0)

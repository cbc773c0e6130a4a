"""Whether it is the kernel's own NFS server that serves this node. It only looks."""

from __future__ import annotations

from pathlib import Path
from typing import Final

THREADS: Final = Path("/proc/fs/nfsd/threads")


def serves(threads: Path = THREADS) -> bool:
    """Whether nfsd has threads (nfsd(7)). Its files may be there although another server runs."""
    try:
        return int(threads.read_text(encoding="ascii")) > 0
    except (OSError, ValueError):
        return False

"""Whether a volume has room for what a resync brings, while it keeps all that it replaces.

Pure. What is put aside stays on the same filesystem: nothing becomes free before all has come.
"""

from __future__ import annotations

from typing import Final

BLOCK_BYTES: Final = 4096
"""Each file takes a whole number of these (ext4, XFS and btrfs as they are made by default)."""


def lacking(
    copy_files: int,
    copy_bytes: int,
    *,
    used_there_bytes: int,
    free_bytes: int,
    free_inodes: int | None,
) -> str:
    """What is missing for a copy of so many files, in words; "" where there is room.

    `copy_bytes` are the sizes of these files, as a dry run tells them. They may have holes: they
    can need no more than the source's filesystem has in use, as it was told (some seconds ago: what
    came since may still fill this volume, and the pass ends then). `free_inodes` None: no limit.
    """
    need_bytes = min(copy_bytes + copy_files * BLOCK_BYTES, used_there_bytes)
    if need_bytes > free_bytes:
        return (
            f"{copy_files} files with {copy_bytes} bytes are to come, and what they replace is "
            f"kept in the quarantine: {need_bytes} bytes are needed, {free_bytes} are free. Make "
            "the filesystem larger, or drop old entries of the quarantine"
        )
    if free_inodes is not None and copy_files > free_inodes:
        return (
            f"{copy_files} files are to come, and what they replace is kept in the quarantine: "
            f"{free_inodes} inodes are free. Drop old entries of the quarantine, or move files away"
        )
    return ""

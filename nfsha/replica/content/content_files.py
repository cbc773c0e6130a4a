"""The files of a volume that comparisons by content are about, by a walk that changes nothing.

What cannot be looked into goes to the caller, who knows what it means for its comparison.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator

from nfsha.replica.files import beneath
from nfsha.replica.files.own_names import OWN_PREFIX, OWN_ROOT_NAMES, PARTIAL


def content_files(
    root_fd: int, unread: Callable[[bytes, OSError | ValueError], None]
) -> Iterator[tuple[bytes, os.stat_result]]:
    """Each regular file that has content and is not nfsha's own, by its name below the root.

    `unread(folder, error)` is told of a folder that cannot be read, or (ValueError) lies deeper
    than a path may be. What is gone meanwhile, or another filesystem, is left out.
    """
    pending = [b""]
    while pending:
        folder = pending.pop()
        try:
            with beneath.folder_at(root_fd, folder.rstrip(b"/")) as fd, os.scandir(fd) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    if name == PARTIAL or (not folder and _is_own(name)):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(folder + name + b"/")
                    elif entry.is_file(follow_symlinks=False):
                        yield from _looked_at(folder, name, fd)
        except (FileNotFoundError, NotADirectoryError):
            continue  # gone meanwhile
        except ValueError as error:
            unread(folder, error)
        except OSError as error:
            if error.errno != errno.EXDEV:  # another filesystem is a volume of its own
                unread(folder, error)


def _is_own(name: bytes) -> bool:
    return name in OWN_ROOT_NAMES or name.startswith(OWN_PREFIX)


def _looked_at(folder: bytes, name: bytes, fd: int) -> Iterator[tuple[bytes, os.stat_result]]:
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if found.st_size and len(folder) + len(name) <= beneath.MAX_NAME_BYTES:
            yield folder + name, found

"""The journal on a disk that is really full, or read-only: a tmpfs in a child's mount namespace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_CHILD = """
import os, subprocess, sys
from pathlib import Path
from nfsha.host.journal import JournalError, JournalFile

folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", folder], check=True)
file = JournalFile(folder / "journal")
file.save({"n": 1})

with open(folder / "filler", "wb", buffering=0) as filler:
    try:
        while True:
            filler.write(bytes(1024))
    except OSError as error:
        print("full:", error.strerror)
try:
    file.save({"n": 2})
except JournalError as error:
    print("save:", error, error.replaced)
print("kept:", file.load().document, sorted(entry.name for entry in folder.iterdir()))

(folder / "filler").unlink()
file.save({"n": 3})
print("after:", file.load().document)

subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
try:
    file.save({"n": 4})
except JournalError as error:
    print("read-only:", error)
print("still:", file.load().document)
subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
(folder / "journal").write_text("torn")
subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
try:
    file.load()
except JournalError as error:
    print("corrupt:", error)
file.close()
"""


def test_a_full_disk_leaves_the_old_journal_and_is_said(tmp_path: Path) -> None:
    argv = [
        "unshare",
        "-m",
        "--propagation",
        "private",
        sys.executable,
        "-c",
        _CHILD,
        str(tmp_path),
    ]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    journal = tmp_path / "journal"
    assert done.stdout.splitlines() == [
        "full: No space left on device",
        f"save: cannot write {journal}: No space left on device False",
        "kept: {'n': 1} ['filler', 'journal']",
        "after: {'n': 3}",
        f"read-only: cannot write {journal}: Read-only file system",
        "still: {'n': 3}",
        f"corrupt: cannot move the corrupt {journal} aside: Read-only file system",
    ]

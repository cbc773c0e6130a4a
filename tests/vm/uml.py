"""A machine with a kernel of its own for a test: User Mode Linux, on this machine's own tree.

Its root is made of this machine's folders, read-only, beside empty ones in memory (`guest_root`):
no image has to be built, it is up in two seconds, and takes no more than a process. It has no
network but its own loopback and what it makes itself. Nothing here knows about nfsha.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
_ROOT_PROGRAM = Path(__file__).with_name("guest_root.py")
_KERNEL = "linux.uml"
_LOG_LINES_SHOWN = 60
_DISK_SIZE = "24M"
_GONE_S = 10.0


class UmlError(Exception):
    """The machine did not come to the end of its program; the text has the end of its console."""


def run(
    program: str, folder: Path, disks: Mapping[str, Mapping[str, str]], *, limit_s: int
) -> dict[str, Any]:
    """Boots a machine, has it run a module of this tree as its program, and returns what that told.

    `folder` is empty, and keeps the console and the disks. `disks` are ext4 filesystems by name,
    and the files in each by path (with a folder for each path that ends in `/`); the guest has them
    as /dev/ubda, /dev/ubdb and so on. What the program leaves in /results, NAME.json each, is
    returned by name. It has to switch the machine off within `limit_s` seconds, else that is
    killed. Raises UmlError.
    """
    results, console = folder / "results", folder / "console"
    results.mkdir()
    images = [_disk(folder / name, files) for name, files in disks.items()]
    with console.open("wb") as log, _machine(_argv(program, folder, images), limit_s, log) as guest:
        code = guest.wait()
    told = list(results.glob("*.json"))
    if code != 0 or not told:
        # The end of the first process is a panic, whose many words say nothing more.
        said = console.read_text(errors="replace").partition("Kernel panic")[0]
        lines = said.splitlines()[-_LOG_LINES_SHOWN:]
        what = f"{program} was not done within {limit_s} s, or failed: exit {code}; its console:"
        raise UmlError("\n".join([what, *lines]))
    return {file.stem: json.loads(file.read_text()) for file in told}


def _disk(image: Path, files: Mapping[str, str]) -> Path:
    """An ext4 filesystem in a file, with its content: nothing is mounted here."""
    tree = image.with_suffix(".tree")
    tree.mkdir()
    for name, text in files.items():
        if name.endswith("/"):
            (tree / name).mkdir(parents=True)
        else:
            (tree / name).write_text(text)
    argv = ("mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(image), _DISK_SIZE)
    subprocess.run(argv, check=True, timeout=30)
    return image


def _argv(program: str, folder: Path, images: list[Path]) -> list[str]:
    """The kernel's command line: what follows `--` is for its first process."""
    return [
        _KERNEL,
        "mem=256M",
        f"uml_dir={folder}",
        "umid=machine",
        *(f"ubd{number}={image}" for number, image in enumerate(images)),
        "rootfstype=hostfs",
        "rootflags=/",
        "ro",
        f"init={sys.executable}",
        # Its console is our log; it reads nothing from this terminal, and opens no windows.
        "con0=null,fd:1",
        "con=null",
        "ssl=null",
        "quiet",
        "--",
        "-B",
        str(_ROOT_PROGRAM),
        str(REPOSITORY),
        str(folder / "results"),
        program,
    ]


@contextlib.contextmanager
def _machine(argv: list[str], limit_s: int, log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Its processes are a PID namespace, which is gone at the end whatever happens.

    It is many processes, and they leave every process group and session. `timeout` ends them even
    where this process is killed. Each of them has the pipe open for as long as it lives.
    """
    alone = ["unshare", "--pid", "--fork", "--kill-child=KILL", "prlimit", "--core=0", *argv]
    limited = ["timeout", "--signal=KILL", str(limit_s), *alone]
    gone, alive = os.pipe()
    try:
        guest = subprocess.Popen(
            limited,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(alive,),
        )
    finally:
        os.close(alive)
    try:
        yield guest
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(guest.pid, signal.SIGKILL)
        guest.wait()
        left = not select.select([gone], [], [], _GONE_S)[0]
        os.close(gone)
        if left:
            raise UmlError(f"processes of {_KERNEL} are left {_GONE_S:.0f} s after their end")

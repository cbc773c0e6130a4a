"""The first process of a place of the lab (a machine, so to speak): makes its root, then stays.

It is pid 1 of its own pid namespace: when it ends, the kernel kills everything in the place and
unmounts its disks. It ends when its standard input does, so a lab whose owner was killed goes too
(`stay`: only when it is killed). It serves nobody and must not need anything of the host beyond its
files.

The root is a tmpfs with the host's folders bound into it, /etc and /var as overlays, so that
nothing a place writes there reaches the host or the other place; /run, /proc and /sys are its own.
/etc/nfsha and /var/lib/nfsha are folders of the lab: they outlive the place, as a disk does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from tests.netns.labkit import kernel

_STAGE = Path("/run")  # nothing below it is wanted from the host, so the new root is built on top
_OWN = {"run", "proc", "sys", "nfs", "old_root", "lost+found"}
_OVERLAID = ("etc", "var")


@dataclass(frozen=True)
class Disk:
    """One filesystem image and where the place mounts it."""

    image: str
    mountpoint: str


@dataclass(frozen=True)
class Spec:
    """What the holder builds; handed over as JSON on its command line."""

    hostname: str
    folder: str
    boot_id: str
    disks: tuple[Disk, ...] = ()
    stay: bool = False

    def dump(self) -> str:
        """As the one argument of the holder."""
        return json.dumps(asdict(self))

    @staticmethod
    def load(text: str) -> Spec:
        """The inverse of dump."""
        raw = json.loads(text)
        raw["disks"] = tuple(Disk(**disk) for disk in raw["disks"])
        return Spec(**raw)


def _build_root() -> None:
    kernel.mount("tmpfs", _STAGE, "tmpfs", data="mode=755")
    for entry in sorted(Path("/").iterdir()):
        target = _STAGE / entry.name
        if entry.is_symlink():
            target.symlink_to(entry.readlink())
        elif entry.is_dir() and entry.name not in _OWN | set(_OVERLAID):
            target.mkdir()
            kernel.mount(entry, target, flags=kernel.MS_BIND | kernel.MS_REC)
    for name in _OVERLAID:
        _overlay(name)
    for name in ("run", "proc", "sys", "nfs", ".old"):
        (_STAGE / name).mkdir()
    kernel.mount("tmpfs", _STAGE / "run", "tmpfs", data="mode=755")
    kernel.mount("proc", _STAGE / "proc", "proc")
    kernel.mount("sysfs", _STAGE / "sys", "sysfs")
    kernel.pivot_root(_STAGE, _STAGE / ".old")
    os.chdir("/")
    kernel.detach("/.old")


def _overlay(name: str) -> None:
    upper = _STAGE / ".overlay" / name / "upper"
    work = _STAGE / ".overlay" / name / "work"
    target = _STAGE / name
    for folder in (upper, work, target):
        folder.mkdir(parents=True)
    kernel.mount(
        "overlay", target, "overlay", data=f"lowerdir=/{name},upperdir={upper},workdir={work}"
    )


def _name_everybody(hostname: str) -> None:
    """Names come from a file: else ganesha and rpcbind wait 10 s for a DNS that is not there."""
    Path("/etc/hosts").write_text(f"127.0.0.1 localhost {hostname}\n::1 localhost {hostname}\n")
    Path("/etc/nsswitch.conf").write_text(
        "passwd: files\ngroup: files\nhosts: files\nrpc: files\nservices: files\n"
    )


def _bind_kept_folders(folder: Path) -> None:
    for inside, kept in (("/etc/nfsha", "etc"), ("/var/lib/nfsha", "lib")):
        (folder / kept).mkdir(exist_ok=True)
        Path(inside).mkdir(parents=True, exist_ok=True)
        kernel.mount(folder / kept, inside, flags=kernel.MS_BIND)


def _set_boot_id(spec: Spec) -> None:
    file = Path(spec.folder) / "boot_id"
    file.write_text(spec.boot_id + "\n")
    kernel.mount(file, "/proc/sys/kernel/random/boot_id", flags=kernel.MS_BIND)


def _mount_disks(disks: tuple[Disk, ...]) -> None:
    for disk in disks:
        Path(disk.mountpoint).mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-o", "loop", disk.image, disk.mountpoint], check=True, timeout=30)


def _reap(_number: int, _frame: FrameType | None) -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def main() -> None:
    """Builds the place, says `ready` on standard output, and stays until standard input ends."""
    spec = Spec.load(sys.argv[1])
    kernel.sethostname(spec.hostname)
    _build_root()
    _name_everybody(spec.hostname)
    _bind_kept_folders(Path(spec.folder))
    _set_boot_id(spec)
    _mount_disks(spec.disks)
    signal.signal(signal.SIGCHLD, _reap)
    print("ready", flush=True)
    if spec.stay:
        while True:
            signal.pause()
    sys.stdin.read()


if __name__ == "__main__":
    main()

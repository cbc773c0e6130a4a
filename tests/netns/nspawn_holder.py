"""The process that keeps a machine with a real systemd: makes its root, starts nspawn, stays.

It is pid 1 of a pid namespace around the machine's own: when it ends, the kernel kills everything
in the machine, as a power cut does. It ends when its standard input does, so a lab whose owner was
killed goes too. All mounts are in a mount namespace of its own.

The root is a tmpfs with the host's /usr bound into it, read-only; /etc and /var are overlays, and
/etc/systemd/system holds what the machine was given and nothing of the host's. /etc/nfsha and
/var/lib/nfsha are folders of the lab: they outlive the machine, as a disk does.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.netns.labkit import kernel
from tests.netns.labkit.place import MARK

TARGET = "nfsha-machine.target"
CGROUP_PREFIX = "nfsha-machine-"
_BOOT_S = 30.0
_TAKEN = {"usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32"}
_EMPTY = ("run", "proc", "sys", "dev", "tmp", "nfs", "opt", "root", "home")
_OVERLAID = ("etc", "var")
_CGROUPS = Path("/sys/fs/cgroup")
_MS_RDONLY, _MS_REMOUNT = 0x1, 0x20  # linux/mount.h


@dataclass(frozen=True)
class MachineDisk:
    """A filesystem image, where the machine mounts it, and whether by itself."""

    image: str
    mountpoint: str
    at_boot: bool = True

    @property
    def device(self) -> str:
        """Its block device in the machine."""
        return f"/dev/nfsha-{Path(self.mountpoint).name}"


@dataclass(frozen=True)
class MachineSpec:
    """What the holder builds; handed over as JSON on its command line."""

    name: str
    hostname: str
    folder: str
    netns: str
    opt: str
    repository: str
    units: dict[str, str]
    wanted: tuple[str, ...]
    disks: tuple[MachineDisk, ...] = ()

    def dump(self) -> str:
        """As the one argument of the holder."""
        return json.dumps(asdict(self))

    @staticmethod
    def load(text: str) -> MachineSpec:
        """The inverse of dump."""
        raw = json.loads(text)
        raw["disks"] = tuple(MachineDisk(**disk) for disk in raw["disks"])
        raw["wanted"] = tuple(raw["wanted"])
        return MachineSpec(**raw)


def _build_root(spec: MachineSpec, root: Path) -> None:
    root.mkdir(exist_ok=True)
    kernel.mount("tmpfs", root, "tmpfs", data="mode=755")
    for entry in sorted(Path("/").iterdir()):
        if entry.name in _TAKEN and entry.is_symlink():
            (root / entry.name).symlink_to(entry.readlink())
        elif entry.name in _TAKEN:
            _bind(entry, root / entry.name, read_only=True)
    for name in _EMPTY:
        (root / name).mkdir()
    for name in _OVERLAID:
        _overlay(root, name)
    _bind(Path(spec.opt), root / "opt" / "nfsha", read_only=True)
    for inside, kept in (("etc/nfsha", "etc"), ("var/lib/nfsha", "lib")):
        (Path(spec.folder) / kept).mkdir(mode=0o700, exist_ok=True)
        _bind(Path(spec.folder) / kept, root / inside)


def _bind(source: Path, target: Path, *, read_only: bool = False) -> None:
    target.mkdir(parents=True, exist_ok=True)
    kernel.mount(source, target, flags=kernel.MS_BIND)
    if read_only:  # only now: mount(2) takes no other flags together with MS_BIND
        kernel.mount(None, target, flags=kernel.MS_BIND | _MS_REMOUNT | _MS_RDONLY)


def _overlay(root: Path, name: str) -> None:
    upper, work, target = (root / ".overlay" / name / part for part in ("upper", "work", "merged"))
    for folder in (upper, work, target):
        folder.mkdir(parents=True)
    if name == "etc":
        units = upper / "systemd" / "system"
        units.mkdir(parents=True)
        os.setxattr(units, "trusted.overlay.opaque", b"y")  # nothing of the host's is started
    kernel.mount(
        "overlay", target, "overlay", data=f"lowerdir=/{name},upperdir={upper},workdir={work}"
    )
    (root / name).mkdir()
    kernel.mount(target, root / name, flags=kernel.MS_BIND)


def _write_etc(spec: MachineSpec, etc: Path) -> None:
    """Names come from a file: else ganesha and rpcbind wait 10 s for a DNS that is not there."""
    hosts = f"127.0.0.1 localhost {spec.hostname}\n::1 localhost {spec.hostname}\n"
    names = "passwd: files\ngroup: files\nhosts: files\nrpc: files\nservices: files\n"
    files = {"hosts": hosts, "nsswitch.conf": names, "hostname": f"{spec.hostname}\n", "fstab": ""}
    for name, text in files.items():
        (etc / name).write_text(text)
    system = etc / "systemd" / "system"
    for name, text in spec.units.items():
        (system / name).write_text(text)
    for name in spec.wanted:
        wants = system / f"{TARGET}.wants"
        wants.mkdir(exist_ok=True)
        (wants / name).symlink_to(f"../{name}")


def _attach(disks: tuple[MachineDisk, ...], folder: Path) -> list[str]:
    """Gives each image a loop device that is freed with the last user: this process, or a mount."""
    place = folder / "attach"
    place.mkdir(exist_ok=True)
    binds = []
    for disk in disks:
        subprocess.run(["mount", "-o", "loop", disk.image, place], check=True, timeout=30)
        device = f"/dev/loop{os.minor(place.stat().st_dev)}"
        os.open(device, os.O_RDONLY | os.O_CLOEXEC)  # open until this process ends
        subprocess.run(["umount", place], check=True, timeout=30)
        binds.append(f"--bind={device}:{disk.device}")
    return binds


def _enter_cgroup(name: str) -> None:
    """A systemd manages the group that it finds itself in: one for each machine."""
    if _filesystem_type(_CGROUPS) != "cgroup2fs":
        kernel.mount("cgroup2", _CGROUPS, "cgroup2")
    group = _CGROUPS / f"{CGROUP_PREFIX}{name}"
    group.mkdir(exist_ok=True)
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _filesystem_type(path: Path) -> str:
    argv = ["stat", "--file-system", "--format=%T", str(path)]
    return subprocess.run(
        argv, check=True, capture_output=True, text=True, timeout=30
    ).stdout.strip()


def _start(
    spec: MachineSpec, root: Path, binds: list[str], notify: Path
) -> subprocess.Popen[bytes]:
    argv = [
        "systemd-nspawn",
        f"--directory={root}",
        f"--machine={spec.hostname}",
        "--boot",
        "--register=no",
        "--keep-unit",
        "--notify-ready=yes",
        "--capability=all",
        f"--network-namespace-path={spec.netns}",
        "--link-journal=no",
        "--resolv-conf=off",
        "--timezone=off",
        "--console=read-only",
        f"--setenv={MARK}={os.environ[MARK]}",
        *binds,
        f"--bind-ro={spec.repository}",
        f"systemd.unit={TARGET}",
        "systemd.show_status=no",
    ]
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        stderr=sys.stderr,
        env={**os.environ, "NOTIFY_SOCKET": str(notify), "SYSTEMD_SECCOMP": "0"},
    )


def _wait_booted(listener: socket.socket, machine: subprocess.Popen[bytes]) -> None:
    """Until the machine's systemd says that it has started all."""
    deadline = time.monotonic() + _BOOT_S
    while machine.poll() is None and time.monotonic() < deadline:
        heard = select.select([listener], [], [], 0.1)[0]
        if heard and "READY=1" in listener.recv(65536).decode().splitlines():
            return
    raise SystemExit("the machine did not come up")


def main() -> None:
    """Boots the machine, says `ready` on standard output, stays until it or the input ends."""
    spec = MachineSpec.load(sys.argv[1])
    folder = Path(spec.folder)
    kernel.mount("proc", "/proc", "proc")
    kernel.mount("tmpfs", "/run/systemd", "tmpfs")  # what nspawn notes there need not stay
    root = folder / "root"
    _build_root(spec, root)
    _write_etc(spec, root / "etc")
    binds = _attach(spec.disks, folder)
    _enter_cgroup(spec.name)
    notify = folder / "notify"
    notify.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(notify))
        machine = _start(spec, root, binds, notify)
        _wait_booted(listener, machine)
    print("ready", flush=True)
    select.select([os.pidfd_open(machine.pid), sys.stdin], [], [])


if __name__ == "__main__":
    main()

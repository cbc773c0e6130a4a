"""The first process of a guest: makes a root in memory around the host's programs, and goes there.

Run by the kernel as `guest_root.py REPOSITORY RESULTS MODULE`, with the host's whole tree as a
read-only root (hostfs). From that it takes /usr and this tree; the rest is new and empty, so that
neither the host's settings nor its daemons' files are seen, and all can be written. The tree is in
/opt/tree and its environment in /opt/nfsha, where docs/install.md puts it. Then it becomes MODULE.

It needs nothing but the standard library, and never returns.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

_PYTHON = "/opt/nfsha/bin/python"
_ROOT = Path("/mnt")  # any folder that every host has
_FOLDERS = (
    "etc/nfs.conf.d",
    "etc/systemd/system",
    "modules/lib",
    "nfs",
    "root",
    "run/rpc_pipefs",
    "run/rpcbind",
    "run/sendsigs.omit.d",
    "tmp",
    "var/lib/nfs/nfsdcld",
    "var/lib/nfs/sm",
    "var/lib/nfs/sm.bak",
    "var/log",
    "var/tmp",
)
_FILES = ("group", "ld.so.cache", "netconfig", "nsswitch.conf", "passwd", "protocols", "rpc")
_FILES_MAYBE = ("localtime", "services")
# Where the kernel looks for modules is the host's; those of this kernel are elsewhere.
_MODPROBE = '#!/bin/sh\nexec /sbin/modprobe -d /modules "$@"\n'
_MACHINE_ID = "4f1c7c2f6d0b4d0c9a55d2a2a4cbb3a1\n"


def _mount(where: str, *options: str) -> None:
    target = _ROOT / where
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", *options, str(target)], check=True)


def _make_root(repository: str, results: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "root", str(_ROOT)], check=True)
    for name in _FOLDERS:
        (_ROOT / name).mkdir(parents=True)
    for where, kind in (("proc", "proc"), ("sys", "sysfs"), ("dev", "devtmpfs")):
        _mount(where, "-t", kind, kind)
    _mount("usr", "--bind", "/usr")
    for name in ("bin", "lib", "lib64", "sbin"):
        (_ROOT / name).symlink_to(f"usr/{name}")
    _mount("opt/tree", "--bind", repository)
    _mount("opt/nfsha", "--bind", sys.prefix)
    if not Path(sys.base_prefix).is_relative_to("/usr"):
        _mount(sys.base_prefix.lstrip("/"), "--bind", sys.base_prefix)
    _mount("results", "-t", "hostfs", "results", "-o", results)


def _fill_root() -> None:
    for name in _FILES:
        shutil.copy(f"/etc/{name}", _ROOT / "etc")
    for name in _FILES_MAYBE:
        if Path("/etc", name).exists():
            shutil.copy(f"/etc/{name}", _ROOT / "etc")
    (_ROOT / "etc/machine-id").write_text(_MACHINE_ID)
    (_ROOT / "var/run").symlink_to("/run")
    (_ROOT / "modules/lib/modules").symlink_to("/usr/lib/uml/modules")
    (_ROOT / "modules/modprobe").write_text(_MODPROBE)
    (_ROOT / "modules/modprobe").chmod(0o755)


def _go_there() -> None:
    """As switch_root(8) does: who enters this mount namespace later is there, too."""
    os.chdir(_ROOT)
    subprocess.run(["mount", "--no-mtab", "--move", ".", "/"], check=True)
    os.chroot(".")
    os.chdir("/")
    Path("/proc/sys/kernel/modprobe").write_text("/modules/modprobe")


def main() -> None:
    """Makes the root, and becomes the module that is named last."""
    repository, results, module = sys.argv[1:4]  # this kernel appends words of its own
    os.environ.clear()
    os.environ.update(
        {
            "PATH": "/usr/sbin:/usr/bin",
            "LANG": "C.UTF-8",
            "PYTHONPATH": "/opt/tree",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
    )
    _make_root(repository, results)
    _fill_root()
    _go_there()
    os.execv(_PYTHON, [_PYTHON, "-m", module])


if __name__ == "__main__":
    main()

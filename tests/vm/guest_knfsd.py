"""The guest's program: knfsd as on a Debian server, its clients, and what nfsha reads of both.

Stage after stage, each looked at by nfsha's own code (`guest_look`). The client is the kernel's
own, in a network namespace. The last look is from within the unit that is shipped, under a real
systemd, which this program becomes at its end.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from tests.vm.guest_look import OPEN_VOLUME, OWN_ADDRESS, VIPS, VOLUME, look, told_handle

_RESULTS: Final = Path("/results")
_TREE: Final = Path("/opt/tree")
_MOUNTS: Final = Path("/clients")
_NFSD: Final = Path("/proc/fs/nfsd")
_GRACE: Final = (_NFSD / "v4_end_grace", Path("/proc/fs/lockd/nlm_end_grace"))
_CONF: Final = Path("/etc/nfs.conf.d/nfsha.conf")
_WAIT_S: Final = 30.0
_EXPORTS: Final = f"""\
{VOLUME} 10.77.0.0/24(rw,sync,no_subtree_check,no_root_squash,fsid=7) \
fd77::/64(rw,sync,no_subtree_check,no_root_squash,fsid=7)
"{OPEN_VOLUME}" 10.77.0.0/24(ro,sync,no_subtree_check,insecure,fsid=8)
"""
_HOSTS: Final = f"127.0.0.1 localhost\n{OWN_ADDRESS} server\n10.77.0.2 client\n"
_CLIENT: Final = """\
mount -t tmpfs run /run
mount -t tmpfs nfs /var/lib/nfs
mkdir -p /run/rpcbind /var/lib/nfs/sm /var/lib/nfs/sm.bak
echo 1 >/proc/sys/net/ipv6/conf/all/keep_addr_on_down
ip link set lo up
ip addr add 10.77.0.2/24 dev lan
ip link set lan up
ip addr add fd77::2/64 dev lan nodad
rpcbind -w
rpc.statd --no-notify
"""
# Keeps a file open, and locked if so told, until it is killed.
_HOLDER: Final = """\
exec 3>"$1"
if [ "$2" = lock ]; then flock 3; fi
echo held
exec sleep infinity
"""
# To nfsha.service as it is shipped: its program looks once, and the machine is off afterwards.
_DROP_IN: Final = """\
[Unit]
DefaultDependencies=no
[Service]
Type=exec
Restart=no
RestartForceExitStatus=
WatchdogSec=0
ExecStartPre=
ExecStart=
ExecStart=/opt/nfsha/bin/python -m tests.vm.guest_look
ExecStopPost=
ExecStopPost=+/bin/sh -c 'echo o >/proc/sysrq-trigger'
Environment=PYTHONPATH=/opt/tree PYTHONDONTWRITEBYTECODE=1
StandardOutput=file:/results/unit.json
"""
_TARGET: Final = """\
[Unit]
DefaultDependencies=no
AllowIsolate=yes
Requires=nfsha.service
"""


def _run(*argv: str, check: bool = True) -> str:
    """Runs a command to its end, tells the console of it, and returns all that it said."""
    began_s = time.monotonic()
    done = subprocess.run(
        argv,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_WAIT_S,
    )
    took_s = time.monotonic() - began_s
    said = done.stdout.strip()
    what = " ".join(argv)
    print(f"[{began_s:.1f}] {what}: exit {done.returncode}, {took_s:.1f} s: {said}", flush=True)
    if check and done.returncode != 0:
        raise RuntimeError(f"{what}: exit {done.returncode}: {said}")
    return said


def _until(what: str, true: Callable[[], bool]) -> None:
    end_s = time.monotonic() + _WAIT_S
    while not true():
        if time.monotonic() > end_s:
            raise RuntimeError(f"not within {_WAIT_S:.0f} s: {what}")
        time.sleep(0.02)


def _end(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()


class Syslog:
    """What the daemons log: nobody else takes it here."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("/dev/log")
        self._lines: list[str] = []
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        while True:
            self._lines.append(self._socket.recv(8192).decode(errors="replace"))

    def of(self, program: str) -> list[str]:
        """The lines of one program, after a mark of ours has come through behind them."""
        mark = f"mark {time.monotonic_ns()}"
        _run("logger", "--socket", "/dev/log", mark)
        _until("the mark in the log", lambda: any(mark in line for line in self._lines))
        return [line for line in list(self._lines) if f" {program}[" in line]


# --- the client ----------------------------------------------------------------------------------


class Client:
    """Another host as far as NFS can tell: its own network, rpcbind and statd; mounts by label."""

    def __init__(self) -> None:
        own = Path("/proc/self/ns/mnt").readlink()
        self._holder = subprocess.Popen(["unshare", "--net", "--mount", "sleep", "infinity"])
        theirs = Path(f"/proc/{self._holder.pid}/ns/mnt")
        _until("the client's namespaces", lambda: theirs.readlink() != own)
        self._enter = ("nsenter", "--target", str(self._holder.pid), "--net", "--mount")
        pid = str(self._holder.pid)
        _run("ip", "link", "add", "lan", "type", "veth", "peer", "name", "lan", "netns", pid)
        self.run("sh", "-ec", _CLIENT)

    def run(self, *argv: str, check: bool = True) -> str:
        """Runs a command there."""
        return _run(*self._enter, *argv, check=check)

    def mount(self, label: str, server: str, options: str, *, check: bool = True) -> str:
        """Mounts the volume from one address of the server."""
        where = _MOUNTS / label
        where.mkdir(parents=True, exist_ok=True)
        host = f"[{server}]" if ":" in server else server
        source = f"{host}:{VOLUME}"
        return self.run("mount", "-t", "nfs", "-o", options, source, str(where), check=check)

    def umount(self, *labels: str) -> None:
        """Unmounts these."""
        self.run("umount", *(str(_MOUNTS / label) for label in labels))

    def hold(self, label: str, how: str) -> subprocess.Popen[str]:
        """Starts a program that keeps a file open there; `how`: "lock" or "open"."""
        script = ("sh", "-ec", _HOLDER, "holder", str(_MOUNTS / label / "held"), how)
        holder = subprocess.Popen([*self._enter, *script], stdout=subprocess.PIPE, text=True)
        if holder.stdout is None or holder.stdout.readline() != "held\n":
            raise RuntimeError(f"no file held open on {label}")
        return holder

    def link(self, state: str) -> None:
        """Pulls the cable (`down`), or puts it back (`up`)."""
        self.run("ip", "link", "set", "lan", state)


# --- the server ----------------------------------------------------------------------------------


def _bring_up() -> None:
    """All but the daemons."""
    for module in ("ipv6", "nfsd", "nfsv3", "nfsv4"):
        _run("modprobe", "-d", "/modules", module)
    _run("hostname", "server")
    _run("ip", "link", "set", "lo", "up")
    for device, path in (("ubda", VOLUME), ("ubdb", OPEN_VOLUME)):
        path.mkdir()
        _run("mount", f"/dev/{device}", str(path))
    _run("mount", "-t", "nfsd", "nfsd", str(_NFSD))
    _run("mount", "-t", "rpc_pipefs", "sunrpc", "/run/rpc_pipefs")
    Path("/etc/hosts").write_text(_HOSTS)
    Path("/etc/exports").write_text(_EXPORTS)
    shutil.copy("/usr/share/nfs-common/conffiles/nfs.conf", "/etc/nfs.conf")
    shutil.copy(_TREE / "etc/nfs.conf.d/nfsha.conf", _CONF)


def _join_the_lan() -> None:
    for address in (f"{OWN_ADDRESS}/24", f"{VIPS[0]}/32"):
        _run("ip", "addr", "add", address, "dev", "lan")
    _run("ip", "link", "set", "lan", "up")
    _run("ip", "addr", "add", f"{VIPS[1]}/64", "dev", "lan", "nodad")


def _start_server() -> str:
    """In the order of Debian's units; returns what the programs had to say."""
    said = [_run("rpcbind", "-w"), _run("rpc.statd", "--no-notify"), _run("nfsdcld")]
    said += [_run("exportfs", "-r"), _run("rpc.nfsd"), _run("rpc.mountd")]
    return "\n".join(one for one in said if one)


def _restart_nfsd() -> None:
    _run("rpc.nfsd", "0")
    _run("rpc.nfsd")


def _end_grace() -> None:
    """Nobody has anything to claim back.

    lockd always waits, 50 s. nfsd waits for 90 s where nfsdcld was too busy to tell it within a
    second of its start that there is nobody; then new locks wait too, those of v3 as well.
    """
    for file in _GRACE:
        if file.read_text().startswith("N"):
            file.write_text("Y")


def _listening() -> dict[str, list[int]]:
    """The ports that a client can reach, by transport."""
    found = {}
    for transport in ("tcp", "udp"):
        lines = _run("ss", "--no-header", "--numeric", "--listening", f"--{transport}").splitlines()
        ends = {line.split()[3] for line in lines if not line.split()[3].startswith("127.")}
        found[transport] = sorted({int(end.rpartition(":")[2]) for end in ends})
    return found


def _clients() -> list[str]:
    return [file.read_text() for file in sorted(_NFSD.glob("clients/*/info"))]


# --- stage after stage ---------------------------------------------------------------------------


def _with_v3(client: Client, syslog: Syslog) -> dict[str, Any]:
    """The configuration that nfsha ships is in place."""
    results: dict[str, Any] = {"started": _start_server(), "listening": _listening()}
    _end_grace()
    before = len(syslog.of("rpc.mountd"))
    results["not asked"] = look(whole=False)
    results["logged when not asked"] = syslog.of("rpc.mountd")[before:]
    results["v3 only"] = look()
    results["logged when asked"] = syslog.of("rpc.mountd")[before:]
    results["v4 mount"] = client.mount("refused", VIPS[0], "vers=4.2", check=False)
    client.mount("v3", VIPS[0], "vers=3")
    client.mount("stray", OWN_ADDRESS, "vers=3,nolock")
    locking = client.hold("v3", "lock")
    results["v3 client"] = look()
    results["handle"] = asyncio.run(told_handle(OPEN_VOLUME / "folder"))
    _end(locking)
    client.umount("v3", "stray")
    return results


def _with_v4(client: Client) -> dict[str, Any]:
    """The same server without it."""
    _CONF.unlink()
    _restart_nfsd()
    _end_grace()
    results: dict[str, Any] = {"v4 spoken": look()}
    for label, server, version in (
        ("v42", VIPS[0], "4.2"),
        ("v40", VIPS[0], "4.0"),
        ("v41", VIPS[1], "4.1"),
    ):
        client.mount(label, server, f"vers={version}")
    opener = client.hold("v42", "open")
    results["v4 clients"] = look()
    results["info"] = _clients()

    # The server's own list is empty when it starts: its clients of before have not come back yet.
    client.link("down")
    _restart_nfsd()
    results["started anew"] = look()
    client.link("up")
    client.run("ls", *(str(_MOUNTS / label) for label in ("v42", "v40", "v41")))
    results["back"] = look()
    _end_grace()

    _end(opener)
    client.umount("v42", "v40", "v41")
    results["left"] = look()

    # One that is gone for good stays in the list, until the remedy that nfsha tells.
    client.mount("gone", VIPS[0], "vers=4.2")
    client.link("down")
    results["gone"] = look()
    for ctl in _NFSD.glob("clients/*/ctl"):
        ctl.write_text("expire\n")
    results["expired"] = look()

    client.link("up")
    client.run("ls", str(_MOUNTS / "gone"))
    results["at the end"] = look()
    return results


def _become_systemd() -> None:
    """It starts the unit as it is shipped, and that ends the machine."""
    units = Path("/etc/systemd/system")
    shutil.copy(_TREE / "systemd/nfsha.service", units)
    (units / "nfsha.service.d").mkdir()
    (units / "nfsha.service.d/look.conf").write_text(_DROP_IN)
    (units / "default.target").write_text(_TARGET)
    os.execv("/lib/systemd/systemd", ["systemd", "--log-target=console", "--show-status=no"])


def _give_up(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Off, with nothing written. Where the first process just ends, this kernel may hang."""
    traceback.print_exception(kind, error, trace)
    Path("/proc/sysrq-trigger").write_text("o")
    time.sleep(_WAIT_S)


def main() -> None:
    """Goes through the stages, and writes what was found."""
    sys.excepthook = _give_up
    _bring_up()
    client = Client()
    _join_the_lan()
    results = _with_v3(client, Syslog()) | _with_v4(client)
    (_RESULTS / "stages.json").write_text(json.dumps(results))
    _become_systemd()


if __name__ == "__main__":
    main()

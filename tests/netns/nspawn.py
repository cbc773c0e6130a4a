"""Machines with a real systemd: a lab whose two storage nodes are booted, and run the unit shipped.

Wires, client, third place, observer and faults are the lab's (tests/netns/lab.py); nfsha is
installed and set up in each node as docs/install.md says. Needs root, systemd-container, and
cgroups of version 2 (or of both versions side by side).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import psutil

from tests.netns.lab import Lab
from tests.netns.labkit import kernel
from tests.netns.labkit.holder import Disk
from tests.netns.labkit.network import PLACES, Switch
from tests.netns.labkit.nfs_server import NfsServer, ganesha_config, make_disks
from tests.netns.labkit.observe import Observer
from tests.netns.labkit.place import REPOSITORY, LabError, Place, Process
from tests.netns.labkit.storage_node import StorageNode
from tests.netns.nspawn_holder import CGROUP_PREFIX, MachineDisk, MachineSpec

UNIT = "nfsha.service"
PROGRAM = "/opt/nfsha/bin/nfsha"
_STOP_S = 30.0
_GONE_S = 10.0

_TARGET = """[Unit]
Requires=basic.target
After=basic.target
AllowIsolate=yes
"""
_MOUNT = """[Unit]
Before=local-fs.target
[Mount]
What={device}
Where={mountpoint}
Type=ext4
[Install]
RequiredBy=local-fs.target
"""
_RPCBIND = """[Unit]
Description=rpcbind of the test
[Service]
Type=notify
ExecStart=/sbin/rpcbind -w -f -s
"""
_LISTED = """[Unit]
Description=/dev/disk/by-uuid, as udev makes it on a server
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=mkdir -p /dev/disk/by-uuid
"""
_GANESHA = """[Unit]
Description=NFS server of the test
Requires=rpcbind.service disks-by-uuid.service
After=rpcbind.service disks-by-uuid.service
ConditionPathExists=/etc/nfsha/ganesha.conf
[Service]
ExecStart=ganesha.nfsd -F -f /etc/nfsha/ganesha.conf -L /run/ganesha.log -p /run/ganesha.pid
"""


def install(target: Path) -> None:
    """Puts nfsha with what runtime.lock names into a venv that is used as /opt/nfsha.

    It has what pip would put there by docs/install.md, without asking an index: the packages are
    taken from the environment that runs the tests.
    """
    venv.create(target, with_pip=False, symlinks=True)
    site = next((target / "lib").glob("python3*")) / "site-packages"
    lock = (REPOSITORY / "requirements" / "runtime.lock").read_text().splitlines()
    for line in lock:
        name, equals, rest = line.partition("==")
        if equals and "win32" not in rest:
            _copy_distribution(name, site)
    shutil.copytree(
        REPOSITORY / "nfsha", site / "nfsha", ignore=shutil.ignore_patterns("__pycache__")
    )
    argv = [sys.executable, "-m", "compileall", "-q", str(site / "nfsha")]
    subprocess.run(argv, check=True, timeout=60)
    program = target / "bin" / "nfsha"
    program.write_text(
        "#!/opt/nfsha/bin/python3\nimport sys\nfrom nfsha.cli.main import main\nsys.exit(main())\n"
    )
    program.chmod(0o755)


def _copy_distribution(name: str, site: Path) -> None:
    for file in metadata.distribution(name).files or ():
        if ".." not in file.parts and Path(str(file.locate())).is_file():
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            # With its times: else Python holds what is compiled for stale.
            shutil.copy2(str(file.locate()), site / file)


class UnitDaemon(Process):
    """The daemon of a machine, whichever process it is now; its log is the unit's journal."""

    def __init__(self, machine: Machine, follower: Process) -> None:
        super().__init__("nfsha", follower._popen, follower.log)
        self._machine = machine

    @property
    def pid(self) -> int:
        """The main process as the host numbers it. Raises LabError when there is none."""
        main = int(self._machine.show("MainPID"))
        if not main:
            raise LabError(f"{self._machine.name}: {UNIT} has no main process")
        return self._machine.host_pid(main)

    @property
    def alive(self) -> bool:
        """Whether systemd has a main process of the unit."""
        return self._machine.show("MainPID") != "0"

    def signal(self, number: int) -> None:
        """Sends a signal to the main process alone, as somebody outside of systemd would."""
        os.kill(self.pid, number)


class UnitNfs(NfsServer):
    """ganesha and rpcbind as units of a machine."""

    def __init__(self, machine: Machine, mountpoints: list[str], protocols: str) -> None:
        super().__init__(machine, mountpoints, protocols)
        self._machine = machine

    def start(self, protocols: str | None = None) -> None:
        """Starts both and waits until NFS answers a NULL call (at most 30 s, else LabError)."""
        self.protocols = protocols or self.protocols
        config = self._machine.path("/etc/nfsha/ganesha.conf")
        config.write_text(ganesha_config(self.mountpoints, self.protocols))
        self._machine.systemctl("start", "nfs-ganesha")
        deadline = time.monotonic() + _STOP_S
        while not self.answers():
            if time.monotonic() > deadline:
                raise LabError(f"ganesha of {self._machine.name} does not serve")
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends ganesha; rpcbind stays."""
        self._machine.systemctl("stop", "nfs-ganesha")


class Machine(StorageNode):
    """Node a or b, booted by its own systemd. `boot` and `kill_all` are power on and power cut."""

    def __init__(
        self, name: str, lab_name: str, folder: Path, disks: tuple[MachineDisk, ...], opt: Path
    ) -> None:
        super().__init__(name, lab_name, folder, ())
        self.machine_disks = disks
        self._opt = opt
        self._leader = 0
        exported = [disk.mountpoint for disk in disks if disk.at_boot]
        self.nfs = UnitNfs(self, exported, "3")

    @property
    def holder_pid(self) -> int:
        """The machine's systemd, as the host numbers it."""
        if not self._leader or self._holder is None:
            raise LabError(f"machine {self.name} is off")
        return self._leader

    @property
    def up(self) -> bool:
        """True between boot and power cut."""
        return bool(self._leader) and super().up

    def boot(self) -> None:
        """Power on; returns when systemd has started all. Raises LabError."""
        self.boots += 1
        spec = MachineSpec(
            name=f"{self._lab_name}-{self.name}",
            hostname=f"node-{self.name}",
            folder=str(self.folder),
            netns=str(self.namespace.path),
            opt=str(self._opt),
            repository=str(REPOSITORY),
            units={
                "nfsha-machine.target": _TARGET,
                "rpcbind.service": _RPCBIND,
                "disks-by-uuid.service": _LISTED + "".join(self._links_by_uuid()),
                "nfs-ganesha.service": _GANESHA,
                **self._installed_units(),
            },
            wanted=("nfs-ganesha.service", *self._enabled_units()),
            disks=self.machine_disks,
        )
        log = self.logs / "holder.log"
        with log.open("ab") as errors:
            self._holder = kernel.in_own_thread(
                lambda: _start_holder(
                    [sys.executable, "-m", "tests.netns.nspawn_holder", spec.dump()],
                    errors.fileno(),
                    self.environment(),
                )
            )
        stdout = self._holder.stdout
        if stdout is None or stdout.readline() != b"ready\n":
            raise LabError(f"machine {self.name} did not come up:\n{log.read_text()}")
        self._leader = _pid_in(self._holder.pid, 1)

    def _installed_units(self) -> dict[str, str]:
        units = {UNIT: (REPOSITORY / "systemd" / UNIT).read_text()}
        for disk in self.machine_disks:
            name = f"nfs-{Path(disk.mountpoint).name}.mount"
            units[name] = _MOUNT.format(device=disk.device, mountpoint=disk.mountpoint)
        return units

    def _enabled_units(self) -> tuple[str, ...]:
        mounts = [disk.mountpoint for disk in self.machine_disks if disk.at_boot]
        daemon = [UNIT] if self.boots > 1 else []
        return (*daemon, *(f"nfs-{Path(one).name}.mount" for one in mounts))

    def _links_by_uuid(self) -> Iterator[str]:
        """Before the NFS server starts: without them its handles name the device, not the UUID."""
        for disk in self.machine_disks:
            argv = ["blkid", "-p", "-s", "UUID", "-o", "value", disk.image]
            done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=30)
            link = f"/dev/disk/by-uuid/{done.stdout.strip()}"
            yield f"ExecStart=ln -sfn ../../{Path(disk.device).name} {link}\n"

    def kill_all(self) -> None:
        """SIGKILL to everything in the machine, as far as it is on. Idempotent."""
        self._leader = 0
        super().kill_all()
        remove_cgroup(f"{self._lab_name}-{self.name}")

    # systemd

    def systemctl(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs systemctl in the machine."""
        return self.run("systemctl", *argv, check=check, timeout_s=100.0)

    def show(self, name: str, unit: str = UNIT) -> str:
        """One property of a unit."""
        return self.systemctl("show", "--value", "--property", name, unit).stdout.strip()

    @contextlib.contextmanager
    def drop_in(self, *lines: str, unit: str = UNIT) -> Iterator[None]:
        """More lines for a unit's [Service], inside the block."""
        file = self.path(f"/run/systemd/system/{unit}.d/test.conf")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(["[Service]", *lines, ""]))
        self.systemctl("daemon-reload")
        try:
            yield
        finally:
            file.unlink()
            self.systemctl("daemon-reload")

    def shut_down(self) -> None:
        """`systemctl poweroff`; returns when the machine is off (power_cut tidies up after it)."""
        if self._holder is None:
            raise LabError(f"machine {self.name} is off")
        self.systemctl("poweroff", "--no-block")
        for process in self.processes:  # no child of the machine's: it would wait for them in vain
            process.kill()
        try:
            self._holder.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            raise LabError(f"machine {self.name} does not shut down") from None

    def journal(self, *argv: str) -> str:
        """What the unit and systemd about it said in this boot."""
        return self.run("journalctl", "--output=cat", "--no-pager", "--unit", UNIT, *argv).stdout

    def host_pid(self, pid: int) -> int:
        """The host's number of a process that the machine calls `pid`."""
        return _pid_in(self.holder_pid, pid)

    def processes_of_unit(self, unit: str = UNIT) -> list[psutil.Process]:
        """All processes in the unit's control group, by the kernel's own list."""
        found = []
        for process in psutil.Process(self.holder_pid).children(recursive=True):
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if f"/{unit}" in Path(f"/proc/{process.pid}/cgroup").read_text():
                    found.append(process)
        return found

    # nfsha

    def install_unit(self) -> None:
        """What docs/install.md says under `nfsha`, but for pip and the link."""
        system = "/etc/systemd/system"
        self.run("install", "-m", "644", REPOSITORY / "systemd" / UNIT, f"{system}/{UNIT}")
        self.run("groupadd", "--system", "nfsha")
        self.systemctl("daemon-reload")

    def start_daemon(self, env: Mapping[str, str] | None = None) -> Process:
        """`systemctl enable --now nfsha`; returns when the daemon said that it is ready."""
        if env:
            raise LabError("a unit's environment is its own")
        self.systemctl("enable", "--now", "--quiet", "--no-block", "nfsha")
        return self.follow()

    def follow(self) -> Process:
        """Copies the unit's journal to this machine's logs, as it grows."""
        argv = ["journalctl", "--follow", "--lines=all", "--output=cat", "--unit", UNIT]
        self.daemon = UnitDaemon(self, self.spawn(argv, name=f"nfsha-boot-{self.boots}"))
        return self.daemon

    def nfsha(
        self, *argv: str, check: bool = True, timeout_s: float = 30.0
    ) -> subprocess.CompletedProcess[str]:
        """Runs the installed nfsha in the machine."""
        return self.run(PROGRAM, *argv, check=check, timeout_s=timeout_s)


def _pid_in(ancestor: int, pid: int) -> int:
    """The host's number of the descendant that the machine's own pid namespace calls `pid`."""
    for process in [psutil.Process(ancestor), *psutil.Process(ancestor).children(recursive=True)]:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            numbers = next(line for line in lines if line.startswith("NSpid:")).split()[1:]
            if len(numbers) > 2 and int(numbers[2]) == pid:
                return process.pid
    raise LabError(f"no process {pid} below {ancestor}")


def _start_holder(argv: list[str], errors: int, env: dict[str, str]) -> subprocess.Popen[bytes]:
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWPID)
    kernel.mount(None, "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    return subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        cwd=REPOSITORY,
        env=env,
        start_new_session=True,
    )


def _cgroup_root() -> Path:
    unified = Path("/sys/fs/cgroup/unified")
    return unified if unified.is_dir() else Path("/sys/fs/cgroup")


def remove_cgroup(name: str) -> None:
    """Removes the control groups of a machine that is off, as soon as the kernel lets them go."""
    top = _cgroup_root() / f"{CGROUP_PREFIX}{name}"
    deadline = time.monotonic() + _GONE_S
    while top.exists():
        try:
            for folder in [*sorted(top.rglob("*/"), reverse=True), top]:
                folder.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def sweep_cgroups() -> None:
    """Removes the control groups of machines whose maker is dead (and they with it)."""
    for group in _cgroup_root().glob(f"{CGROUP_PREFIX}*"):
        name = group.name.removeprefix(CGROUP_PREFIX)
        if kernel.start_time(int(name.split("-")[0])) is None:
            remove_cgroup(name)


def cgroups_left() -> list[Path]:
    """Control groups of machines that this process made."""
    return list(_cgroup_root().glob(f"{CGROUP_PREFIX}{os.getpid()}-*"))


class MachineLab(Lab):
    """A lab whose nodes a and b are machines. `unmounted`: volumes that no boot mounts."""

    def __init__(self, *, unmounted: tuple[str, ...] = (), volume_mib: int = 64) -> None:
        super().__init__(volumes=("data", *unmounted), volume_mib=volume_mib)
        self._unmounted = unmounted

    def _make(self, folder: Path) -> None:
        sweep_cgroups()
        opt = folder / "opt"
        install(opt)
        made = make_disks(folder, ("a", "b"), self.volumes, self._volume_mib)
        self._switch = Switch.make()
        self._record("switch", self._switch.namespace.name)
        for name in PLACES:
            if name in made:
                disks = tuple(self._disk(disk) for disk in made[name])
                self._places[name] = Machine(name, self.name, folder / name, disks, opt)
            else:
                self._places[name] = Place(name, self.name, folder / name)
        self._observer = Observer(self.name, self._switch.namespace.path, folder / "events.jsonl")
        for name in PLACES:
            self.boot(name)

    def _disk(self, disk: Disk) -> MachineDisk:
        late = Path(disk.mountpoint).name in self._unmounted
        return MachineDisk(disk.image, disk.mountpoint, at_boot=not late)

    def machine(self, name: str) -> Machine:
        """Machine a or b."""
        place = self._places[name]
        if not isinstance(place, Machine):
            raise LabError(f"{name} is no machine")
        return place

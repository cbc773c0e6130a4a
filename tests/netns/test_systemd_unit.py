"""The unit as systemd sees it: nothing to complain of, and no more exposed than was promised."""

from __future__ import annotations

import os
import re
import shutil
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from nfsha.cli.exits import Exit
from tests.netns.treewalk import acl, differences

REPOSITORY = Path(__file__).parents[2]
UNIT = REPOSITORY / "systemd" / "nfsha.service"
DROP_IN = REPOSITORY / "systemd" / "iptables.conf"
PAGE = REPOSITORY / "docs" / "systemd.md"
MAX_EXPOSURE = 4.5


@pytest.fixture(params=["alone", "with the drop-in for iptables"])
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy whose program exists on this machine: verify looks for it."""
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/nfsha/bin/nfsha", "/bin/true"))
    if request.param != "alone":
        folder = tmp_path / f"{UNIT.name}.d"
        folder.mkdir()
        shutil.copy(DROP_IN, folder)
        if not Path("/sbin/modprobe").exists():  # a container's root needs none
            text = DROP_IN.read_text().replace("/sbin/modprobe", "/bin/true")
            (folder / DROP_IN.name).write_text(text)
    return copy


def analyze(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *argv],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0"},
    )


def settings(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def capabilities() -> list[str]:
    return " ".join(settings(UNIT)["CapabilityBoundingSet"]).split()


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(ms|s)", text).groups()  # type: ignore[union-attr]
    return int(number) / (1000 if unit == "ms" else 1)


def test_systemd_has_nothing_to_complain_of(unit: Path) -> None:
    done = analyze("verify", "--man=no", str(unit))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_systemd_does_complain_of_a_mistake(unit: Path) -> None:
    unit.write_text(unit.read_text().replace("WatchdogSec=5s", "WatchdogSecs=5s"))
    assert "WatchdogSecs" in analyze("verify", "--man=no", str(unit)).stderr


def test_the_exposure_is_no_higher_than_promised(unit: Path) -> None:
    done = analyze("security", "--offline=true", "--no-pager", str(unit))
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None, done.stderr
    assert 0 < float(found[1]) <= MAX_EXPOSURE


def test_each_concession_is_explained() -> None:
    page = PAGE.read_text()
    found = settings(UNIT)
    for capability in capabilities():
        assert f"`{capability}`" in page
    for family in found["RestrictAddressFamilies"][0].split():
        assert f"`{family}`" in page
    # What systemd-analyze counts against the unit, by the name that it gives it.
    done = analyze("security", "--offline=true", "--no-pager", str(UNIT))
    conceded = re.findall(r"^✗ ([A-Za-z]+)=", done.stdout, re.MULTILINE)
    assert conceded
    assert [name for name in conceded if f"`{name}=`" not in page] == []


def test_a_restart_fits_into_the_lease_and_a_crash_loop_ends() -> None:
    found = settings(UNIT)
    assert found["Type"] == ["notify"]
    assert found["Restart"] == ["on-abnormal"]
    # After every end but that for an error in the configuration: clean ones, Python's own, signals
    # that systemd takes for clean (systemd.service(5)).
    forced = set(found["RestartForceExitStatus"][0].split())
    ends = {str(int(code)) for code in (Exit.DONE, Exit.CANNOT, Exit.INTERRUPTED)}
    assert forced == ends | {"120", "SIGHUP", "SIGINT", "SIGPIPE", "SIGTERM"}
    assert str(int(Exit.USAGE)) not in forced
    lease_s = 2.0
    restart_s = seconds(found["RestartSec"][0])
    assert restart_s <= lease_s / 10  # the rest is for three starts of Python
    # The limit is met even if each life hangs until the watchdog ends it.
    life_s = seconds(found["WatchdogSec"][0]) + restart_s
    starts = int(found["StartLimitBurst"][0])
    assert life_s * starts < seconds(found["StartLimitIntervalSec"][0])
    assert any("release --if-stopped" in value for value in found["ExecStopPost"])
    assert any("check-config" in value for value in found["ExecStartPre"])
    assert found["RuntimeDirectoryPreserve"] == ["restart"]


def test_the_powers_that_are_left_suffice_for_a_copy_of_everything(tmp_path: Path) -> None:
    """A source and a pull with the unit's capabilities, on files of others and of every sort."""
    here, there = tmp_path / "here", tmp_path / "there"
    script = tmp_path / "script.py"
    script.write_text(COPY)
    bounding = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in capabilities())
    for place in (here, there):
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "nfsha-test", place], check=True)
    try:
        make_files_of_others(here)
        done = subprocess.run(
            ["setpriv", "--no-new-privs", f"--bounding-set=-all,{bounding}", "unshare", "--net",
             sys.executable, script, here, there, tmp_path / "runtime"],
            check=False, capture_output=True, text=True, timeout=60, cwd=REPOSITORY,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert differences(here, there) == []
        assert os.getxattr(there / "theirs" / "file", "trusted.nfsha") == b"x"
        assert os.getxattr(there / "theirs" / "file", "security.capability")
        assert stat.S_ISBLK((there / "block").stat().st_mode)
        assert (there / "theirs" / "file").stat().st_mode & 0o7777 == 0o6400
    finally:
        for place in (here, there):
            subprocess.run(["umount", place], check=True)


def system_calls(name: str) -> set[str]:
    """The system calls of a group, with the groups that it contains."""
    if not name.startswith("@"):
        return {name}
    lines = [line.strip() for line in analyze("syscall-filter", name).stdout.splitlines()[1:]]
    members = [line for line in lines if line and not line.startswith("#")]
    return set().union(*map(system_calls, members))


def test_the_filter_lets_the_children_through() -> None:
    """Found by running them under it: setpriv(1) calls capset, whatever it is asked for."""
    allowed: set[str] = set()
    for value in settings(UNIT)["SystemCallFilter"]:
        names = set().union(*map(system_calls, value.removeprefix("~").split()))
        allowed = allowed - names if value.startswith("~") else allowed | names
    wrapper = {"prctl", "capset", "unshare", "ioprio_set", "sched_setscheduler", "setpriority"}
    daemon = {"chroot", "pidfd_getfd", "setgid", "setuid", "setgroups", "bind", "listen"}
    copying = {"mknodat", "fchownat", "fchmod", "setxattr", "lsetxattr", "utimensat", "fsync"}
    changes = {"fanotify_init", "fanotify_mark", "open_by_handle_at", "name_to_handle_at"}
    assert wrapper | daemon | copying | changes <= allowed
    assert not {"mount", "init_module", "reboot", "add_key", "bpf"} & allowed


COPY = """
import asyncio, subprocess, sys, time
from pathlib import Path
from nfsha.core.model import Epoch, Role
from nfsha.replica.rsync.child import Child
from nfsha.replica.source.source import Source, SourceVolume, epoch_token

UUID = "12345678-1234-1234-1234-123456789abc"
here, there, runtime = map(Path, sys.argv[1:])

async def main():
    token = epoch_token(b"k" * 32, Epoch(1, "0" * 16, Role.PRIMARY))
    source = Source(runtime, "127.0.0.1", 7911, "127.0.0.1", lambda: time.monotonic_ns() // 10**6)
    await source.serve(token, [SourceVolume(UUID, here)])
    try:
        assert source.running, source.trouble
        url = f"rsync://{token.user}@127.0.0.1:7911/v-{UUID}/"
        pull = await Child.start(
            ["rsync", "-aHAXS", "--numeric-ids", "--fsync", "--modify-window=-1", url, f"{there}/"],
            name="pull", env={"RSYNC_PASSWORD": token.password},
        )
        code = await pull.wait()
        assert code == 0, (code, pull.errors)
    finally:
        await source.stop()

subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
asyncio.run(main())
"""


def make_files_of_others(root: Path) -> None:
    (root / ".nfsha-volume").write_text("12345678-1234-1234-1234-123456789abc\n")
    theirs = root / "theirs"
    theirs.mkdir(mode=0o700)
    file = theirs / "file"
    file.write_text("content")
    (theirs / "same").hardlink_to(file)
    for path in (file, theirs):
        os.chown(path, 1234, 4321)
    file.chmod(0o6400)
    os.setxattr(file, "trusted.nfsha", b"x")
    # linux/capability.h, vfs_cap_data version 2: CAP_NET_RAW, permitted and effective
    os.setxattr(file, "security.capability", struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0))
    os.setxattr(theirs, "system.posix_acl_access", acl(rwx=7, user=(777, 6), mask=6, other=0))
    os.mknod(root / "block", stat.S_IFBLK | 0o600, os.makedev(7, 250))
    os.mknod(root / "char", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mkfifo(root / "fifo")
    (root / "link").symlink_to("/nowhere")

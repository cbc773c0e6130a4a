"""Mount and unmount hooks under the unit as shipped, on two machines with a real systemd.

The volume of each machine stands for its side of a block replica. What is looked at here is what
the unit's limits could keep from the machine; tests/netns/test_hooks.py has the rules by which
hooks run.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.netns.nspawn import Machine, MachineLab, cgroups_left
from tests.netns.pair import Pair

pytestmark = [pytest.mark.pairs, pytest.mark.timeout(90)]

VOLUME = "/nfs/late"
HOOKS = """
[hooks]
mount = "/etc/nfsha/mount"
unmount = "/etc/nfsha/unmount"
"""
MOUNT = f"""#!/bin/sh -e
mountpoint -q {VOLUME} || mount --mkdir /dev/nfsha-late {VOLUME}
echo "$NFSHA_ROLE mounts $NFSHA_MOUNTS" >> /etc/nfsha/hooks.log
"""
UNMOUNT = f"""#!/bin/sh -e
! mountpoint -q {VOLUME} || umount {VOLUME}
echo "$NFSHA_ROLE unmounts $NFSHA_MOUNTS" >> /etc/nfsha/hooks.log
"""


def test_hooks_mount_for_the_machine_and_unmount_even_in_its_shutdown() -> None:
    with MachineLab(unmounted=("late",)) as lab:
        pair = Pair(lab, mounts=(VOLUME,), tables=HOOKS)
        a, b = lab.machine("a"), lab.machine("b")
        for machine in (a, b):
            machine.install_unit()
            for name, text in (("mount", MOUNT), ("unmount", UNMOUNT)):
                hook = machine.path(f"/etc/nfsha/{name}")
                hook.write_text(text)
                hook.chmod(0o755)
        pair.settle()
        assert (_mounted(a), _seen_by_the_daemon(a)) == (True, True)
        assert (_mounted(b), _seen_by_the_daemon(b)) == (False, False)

        stopped_ms = pair.now_ms()
        a.systemctl("stop", "nfsha")
        assert not _mounted(a)
        pair.wait_phase("b", "ACTIVE", since_ms=stopped_ms)
        assert (_mounted(b), _seen_by_the_daemon(b)) == (True, True)
        a.systemctl("start", "nfsha")
        pair.wait_phase("a", "PASSIVE", since_ms=stopped_ms)

        off_ms = pair.now_ms()
        before = _log(lab, "b")
        b.shut_down()
        assert "standby unmounts /nfs/late" in _log(lab, "b")[len(before) :]
        pair.wait_phase("a", "ACTIVE", since_ms=off_ms)
        assert _mounted(a)
        pair.assert_never_two()
    assert cgroups_left() == []


def _mounted(machine: Machine) -> bool:
    return machine.run("mountpoint", "-q", VOLUME, check=False).returncode == 0


def _seen_by_the_daemon(machine: Machine) -> bool:
    pid = machine.host_pid(int(machine.show("MainPID")))
    return f" {VOLUME} " in Path(f"/proc/{pid}/mountinfo").read_text()


def _log(lab: MachineLab, node: str) -> list[str]:
    return (lab.folder / node / "etc" / "hooks.log").read_text().splitlines()

"""The unit as systemd sees it: nothing to complain of, and no more exposed than was promised."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

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
    for capability in found["CapabilityBoundingSet"][0].split():
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
    assert found["Restart"] == ["always"]
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

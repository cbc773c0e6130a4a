"""The configuration: what is read, what is refused and in which words."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from apscheduler.triggers.cron import CronTrigger
from hypothesis import example, given
from hypothesis import strategies as st

from nfsha import config
from nfsha.config import ConfigError, Settings, cron, kinds
from nfsha.config.keys import EACH_TABLE_OF, KEYS, LINK_KEYS, TIMING_KEYS, describe_keys
from nfsha.config.problems import show_size
from nfsha.config.relations import RELATIONS
from nfsha.config.settings import PROFILES
from nfsha.core.model import Role, Timings

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "etc").glob("**/*.toml"))
INVALID = sorted((ROOT / "tests" / "invalid_config").glob("*.toml"))

MINIMAL = """
role = "primary"
interface = "eth0"
vip = ["192.0.2.10"]
witness = ["gateway"]
links = [{ local = "192.0.2.1", peer = "192.0.2.2" }, { local = "10.9.9.1", peer = "10.9.9.2" }]
"""
ONE_LINK = """
role = "primary"
interface = "eth0"
vip = ["192.0.2.10"]
witness = ["gateway"]
links = [{ local = "192.0.2.1", peer = "192.0.2.2" }]
"""


SYNC = config.Sync(
    link="link2",
    port=7911,
    every_ms=30_000,
    cron=None,
    jitter_ms=2000,
    full_every_ms=6 * 3_600_000,
    verify_every_ms=7 * 86_400_000,
    verify_bandwidth_kib_s=19_531,
    bandwidth_kib_s=None,
    parallel=2,
    timeout_s=60,
    connect_timeout_s=5,
    max_deletes=100,
    max_deletes_percent=10,
    max_data_age_ms=None,
    resync="automatic",
    quarantine_max_age_ms=None,
    quarantine_max_bytes=None,
    quarantine_drop=False,
    max_changed_folders=50_000,
    volumes=(),
)
"""How volumes are copied where the file does not say it."""


def problems_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.parse(text)
    return [str(problem) for problem in caught.value.problems]


# --------------------------------------------------------------------------- what is read


def test_five_lines_are_enough() -> None:
    settings = config.parse(MINIMAL)
    assert settings.role is Role.PRIMARY
    assert settings.name == "primary"
    assert settings.interface == "eth0"
    assert settings.vips == (ip_address("192.0.2.10"),)
    assert settings.witness == config.Witness(gateway=True, hosts=())
    assert settings.links == (
        config.Link("link1", ip_address("192.0.2.1"), ip_address("192.0.2.2"), 7910, None),
        config.Link("link2", ip_address("10.9.9.1"), ip_address("10.9.9.2"), 7910, None),
    )
    assert settings.timing == Timings()
    assert settings.firewall.ports == {
        "rpcbind": 111,
        "nfs": 2049,
        "mountd": 20048,
        "statd": 20049,
        "lockd": 20050,
    }
    assert settings.firewall.service_lease
    assert settings.takeover == config.Takeover(start_alone_after_ms=None, accept=())
    assert settings.paths.key == Path("/etc/nfsha/cluster.key")
    assert settings.replication == config.RSYNC
    assert settings.sync == SYNC
    assert settings.sync_link.name == "link2"
    assert settings.hooks == config.Hooks(None, None, 30_000)
    assert not settings.hooks.given


def test_every_key_reaches_its_setting() -> None:
    settings = config.parse(
        """
role = "standby"
name = "store-b"
interface = "bond0.7"
vip = "2001:db8::10"
witness = ["192.0.2.254", "gateway", "2001:db8::fe"]
replication = "off"
control_group = "storage"
[[links]]
name = "san"
local = "10.9.9.2"
peer = "10.9.9.1"
port = 7911
interface = "eth1"
[[links]]
local = "fe80::2%bond0"
peer = "fe80::1%bond0"
[timing]
profile = "fast"
interval = "60ms"
hold = "400ms"
takeover_after = "2m"
margin = "70ms"
address_lease = "3s"
renew_every = "1s"
absence = "5s"
idle_peer = "4s"
[nfs]
root = "/srv"
mounts = ["/srv/a", "/srv"]
nfs_port = 12049
mountd_port = 12048
check_address = "::1"
check_every = "2s"
check_timeout = "700ms"
check_mountd = false
version4 = "warn"
[firewall]
backend = "iptables"
[firewall.ports]
rpcbind = 112
statd = 113
lockd = 114
[hooks]
mount = "/etc/nfsha/mount"
unmount = "/etc/nfsha/unmount"
timeout = "2m"
[takeover]
start_alone_after = "10m"
accept = ["single-link-witness"]
[handover]
max_stall = "3s"
[scheduling]
realtime = false
lock_memory = false
[log]
level = "debug"
[paths]
state = "/a"
runtime = "/b"
key = "/c"
"""
    )
    assert settings == Settings(
        role=Role.STANDBY,
        name="store-b",
        interface="bond0.7",
        vips=(ip_address("2001:db8::10"),),
        links=(
            config.Link("san", ip_address("10.9.9.2"), ip_address("10.9.9.1"), 7911, "eth1"),
            config.Link(
                "link2", ip_address("fe80::2%bond0"), ip_address("fe80::1%bond0"), 7910, None
            ),
        ),
        witness=config.Witness(
            gateway=True, hosts=(ip_address("192.0.2.254"), ip_address("2001:db8::fe"))
        ),
        profile="fast",
        timing=Timings(
            interval_ms=60,
            hold_ms=400,
            takeover_after_ms=120_000,
            margin_ms=70,
            address_lease_ms=3000,
            renew_every_ms=1000,
            absence_ms=5000,
            idle_peer_ms=4000,
        ),
        nfs=config.Nfs(
            root=Path("/srv"),
            mounts=(Path("/srv/a"), Path("/srv")),
            nfs_port=12049,
            mountd_port=12048,
            check_address=ip_address("::1"),
            check_every_ms=2000,
            check_timeout_ms=700,
            check_mountd=False,
            version4="warn",
        ),
        firewall=config.Firewall(
            "iptables", {"rpcbind": 112, "nfs": 12049, "mountd": 12048, "statd": 113, "lockd": 114}
        ),
        replication="off",
        sync=SYNC,
        hooks=config.Hooks(Path("/etc/nfsha/mount"), Path("/etc/nfsha/unmount"), 120_000),
        takeover=config.Takeover(600_000, ("single-link-witness",)),
        handover=config.Handover(max_stall_ms=3000),
        scheduling=config.Scheduling(realtime=False, lock_memory=False),
        log=config.Log("debug"),
        paths=config.Paths(Path("/a"), Path("/b"), Path("/c")),
        control_group="storage",
    )


def test_every_key_of_the_copy_reaches_its_setting() -> None:
    settings = config.parse(
        MINIMAL
        + """
[sync]
link = "link1"
port = 17911
every = "10m"
jitter = "0ms"
full_every = "1d"
verify_every = "never"
verify_bandwidth = "unlimited"
bandwidth = "16MiB"
parallel = 16
timeout = "2m"
connect_timeout = "1s"
max_deletes = 0
max_deletes_percent = 0
max_data_age = "20m"
resync = "on-failback"
quarantine_max_age = "90d"
quarantine_max_size = "1TB"
quarantine_drop = true
max_changed_folders = 1000
[[sync.volumes]]
path = "/nfs/a"
cron = "0,30 8-18 * * mon-fri"
[[sync.volumes]]
path = "/nfs/b/c"
every = "5s"
bandwidth = "unlimited"
[[sync.volumes]]
path = "/nfs"
bandwidth = "1024kB"
"""
    )
    assert settings.sync == config.Sync(
        link="link1",
        port=17_911,
        every_ms=600_000,
        cron=None,
        jitter_ms=0,
        full_every_ms=86_400_000,
        verify_every_ms=None,
        verify_bandwidth_kib_s=None,
        bandwidth_kib_s=16_384,
        parallel=16,
        timeout_s=120,
        connect_timeout_s=1,
        max_deletes=0,
        max_deletes_percent=0,
        max_data_age_ms=1_200_000,
        resync="on-failback",
        quarantine_max_age_ms=90 * 86_400_000,
        quarantine_max_bytes=10**12,
        quarantine_drop=True,
        max_changed_folders=1000,
        volumes=(
            config.SyncVolume(Path("/nfs/a"), None, "0,30 8-18 * * mon-fri", 16_384),
            config.SyncVolume(Path("/nfs/b/c"), 5000, None, None),
            config.SyncVolume(Path("/nfs"), 600_000, None, 1000),
        ),
    )
    assert settings.sync_link == settings.links[0]
    assert settings.sync.of(Path("/nfs/b/c")).every_ms == 5000
    assert settings.sync.of(Path("/nfs/b")) == config.SyncVolume(
        Path("/nfs/b"), 600_000, None, 16_384
    )


def test_passes_by_the_clock_end_those_by_the_interval() -> None:
    sync = config.parse(f'{MINIMAL}[sync]\ncron = "*/5 * * * *"\n').sync
    assert (sync.every_ms, sync.cron) == (None, "*/5 * * * *")
    own = f'{MINIMAL}[sync]\ncron = "*/5 * * * *"\n[[sync.volumes]]\npath = "/nfs"\nevery = "4s"'
    assert config.parse(own).sync.volumes == (config.SyncVolume(Path("/nfs"), 4000, None, None),)


@pytest.mark.parametrize(
    "line",
    [
        "* * * * *", "*/5 * * * *", "0 3 * * sun", "0 3 1,15 * *", "0-30/10,45 */2 * jan-mar,dec *",
        "59 23 29 2 *", "0 0 * * mon-fri,sun", "0 0 31 1,2 *", "5-6 0 1 1 *",
    ],
)  # fmt: skip
def test_cron_lines_that_are_right_are_right_for_the_scheduler_too(line: str) -> None:
    assert cron.fault(line) == ""
    trigger = CronTrigger.from_crontab(line, timezone="UTC")
    assert trigger.get_next_fire_time(None, datetime(2026, 1, 1, tzinfo=UTC)) is not None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("* * * *", "five fields"), ("* * * * * *", "five fields"), (" * * * * *", "five fields"),
        ("*  * * * *", "five fields"), ("*\t* * * *", "five fields"), ("@daily", "five fields"),
        ("60 * * * *", "minute"), ("a * * * *", "minute"), ("*/0 * * * *", "minute"),
        ("*/60 * * * *", "minute"), ("30-10 * * * *", "minute"), ("5/10 * * * *", "minute"),
        ("1,,2 * * * *", "minute"), (", * * * *", "minute"), ("\u0661 * * * *", "minute"),
        ("* 24 * * *", "hour"), ("* * 0 * *", "day of the month"),
        ("* * L * *", "day of the month"),
        ("* * last * *", "day of the month"), ("* * * 13 *", "month"), ("* * * jan-6 *", "month"),
        ("* * * jan-jun/2 *", "month"), ("* * * * 0", "weekday"), ("* * * * 1-5", "weekday"),
        ("* * * * */2", "weekday"), ("* * * * fri-mon", "weekday"), ("* * * * xyz", "weekday"),
        ("0 0 1 * mon", "either or both"), ("0 0 30 2 *", "never comes"),
        ("0 0 31 apr,jun *", "never comes"),
    ],
)  # fmt: skip
def test_cron_lines_that_are_wrong_or_read_in_two_ways(line: str, words: str) -> None:
    (found,) = problems_of(f"{MINIMAL}[sync]\ncron = {json.dumps(line)}\n")
    assert found.startswith("sync.cron = ")
    assert words in found


@given(
    st.lists(
        st.sampled_from(
            ["*", "*/2", "0", "1", "3-7", "1-31/5", "59", "7,9", "feb", "mon", "2-mon"]
        ),
        min_size=5,
        max_size=5,
    )
)
def test_no_cron_line_passes_that_the_scheduler_would_refuse(fields: list[str]) -> None:
    line = " ".join(fields)
    if not cron.fault(line):
        trigger = CronTrigger.from_crontab(line, timezone="UTC")
        assert trigger.get_next_fire_time(None, datetime(2026, 1, 1, tzinfo=UTC)) is not None


def test_settings_cannot_be_changed() -> None:
    settings = config.parse(MINIMAL)
    for part in [settings, *(getattr(settings, field.name) for field in fields(settings))]:
        if is_dataclass(part) and not isinstance(part, type):
            with pytest.raises(AttributeError):
                setattr(part, fields(part)[0].name, None)
    ports: Any = settings.firewall.ports
    with pytest.raises(TypeError):
        ports["nfs"] = 1


def test_the_fast_profile_and_what_overrides_it() -> None:
    assert PROFILES["fast"].interval_ms == 50
    assert PROFILES["fast"].hold_ms == 300
    assert PROFILES["fast"].takeover_after_ms == 450
    settings = config.parse(f'{MINIMAL}[timing]\nprofile = "fast"\nhold = "250ms"\n')
    assert settings.timing.interval_ms == 50
    assert settings.timing.hold_ms == 250
    assert settings.timing.margin_ms == 50


@pytest.mark.parametrize(
    ("written", "expected_ms"), [("300ms", 300), ("1s", 1000), ("2m", 120_000), ("090ms", 90)]
)
def test_durations(written: str, expected_ms: int) -> None:
    assert TIMING_KEYS["takeover_after_ms"].kind.read("300ms") == 300
    settings_key = next(key for key in KEYS if key.name == "takeover.start_alone_after")
    key = TIMING_KEYS["hold_ms"] if expected_ms <= 60_000 else settings_key
    assert key.kind.read(written) == expected_ms


@given(st.integers(0, 10**9))
def test_a_shown_duration_reads_back(duration_ms: int) -> None:
    shown = config.show_ms(duration_ms)
    amount, unit = re.fullmatch(r"([0-9]+)(ms|s|m|h|d)", shown, re.ASCII).groups()  # type: ignore[union-attr]
    units_ms = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
    assert int(amount) * units_ms[unit] == duration_ms


@given(
    st.integers(64, 10**6), st.sampled_from(["kB", "KiB", "MB", "MiB", "GB", "GiB", "TB", "TiB"])
)
def test_a_shown_size_reads_back(amount: int, unit: str) -> None:
    read = kinds.size(1, 1 << 80).read
    size_bytes = read(f"{amount}{unit}")
    assert read(show_size(size_bytes)) == size_bytes


def test_each_bound_is_allowed() -> None:
    exact = f'{MINIMAL}[timing]\ntakeover_after = "900ms"\nrenew_every = "666ms"\n'
    assert config.parse(exact).timing.takeover_after_ms == 900
    slow = '[timing]\ntakeover_after = "3100ms"\n[firewall]\nbackend = "iptables"\n'
    assert config.parse(MINIMAL + slow).firewall.backend == "iptables"


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_each_invalid_configuration_fails_with_the_expected_words(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    expected = [line.removeprefix("# expect: ") for line in lines if line.startswith("# expect: ")]
    assert expected, f"{path} does not say what to expect"
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    for words in expected:
        assert any(words in str(problem) for problem in caught.value.problems), str(caught.value)
    # Nothing else is complained about: one mistake is not reported as two.
    assert len(caught.value.problems) == len(expected), str(caught.value)


def test_there_are_invalid_configurations_for_every_relation() -> None:
    messages = "\n".join(path.read_text(encoding="utf-8").split("\nrole")[0] for path in INVALID)
    for words in (
        "2 x timing.interval",
        "= timing.interval",
        "must be at least 900ms",
        "a third of timing.address_lease",
        "share no address",
        "third machine",
        "firewall.ports.nfs (2049)",
        "firewall.ports.statd (20049)",
        "under nfs.root",
        "hooks.unmount: is missing",
        "half of sync.every",
        "beside sync.every",
        "one of links: ",
        "sync.port = 111",
        "2 x sync.every",
        "neither quarantine_max_age nor quarantine_max_size",
        "sync.volumes[1].path",
    ):
        assert words in messages
    assert len(RELATIONS) == 16


def test_relations_of_a_broken_key_are_left_out() -> None:
    found = problems_of(f'{MINIMAL}[timing]\ninterval = "soon"\nmargin = "20ms"\n')
    assert len(found) == 1
    assert found[0].startswith('timing.interval = "soon"')


def test_no_more_problems_than_a_screen_holds() -> None:
    found = problems_of(MINIMAL + "".join(f"unknown{number} = 1\n" for number in range(1000)))
    assert len(found) == config.MAX_PROBLEMS + 1
    assert found[-1] == "configuration: has 950 more problems"


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda path: None, "cannot be read: No such file or directory"),
        (Path.mkdir, "is not a regular file"),
        (os.mkfifo, "is not a regular file"),
        (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
        (lambda path: path.write_bytes(b"role = '\xff'"), "is not UTF-8 (at byte 8)"),
        (lambda path: path.write_bytes(b"#" * ((1 << 20) + 1)), "is larger than 1048576 bytes"),
        (lambda path: path.write_text("a = " + "[" * 100_000), "is nested too deeply"),
        (lambda path: path.write_text("a = " + "9" * 10_000), "is not TOML"),
        (lambda path: path.write_text("a = 1\na = 2\n\x1b[31m"), "is not TOML"),
    ],
)
def test_unusable_files(tmp_path: Path, prepare: Callable[[Path], None], expected: str) -> None:
    path = tmp_path / "nfsha.toml"
    prepare(path)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    (problem,) = caught.value.problems
    assert str(problem).startswith(f"{path}: {expected}")
    assert str(problem).isprintable()


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "nfsha.toml"
    path.write_text(MINIMAL, encoding="utf-8")
    path.chmod(0)
    # Root may read it all the same: a process without privileges tries.
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents[:2]:
        folder.chmod(folder.stat().st_mode | 0o055)
    script = (
        "import os, sys\n"
        "from nfsha import config\n"
        "os.getuid() or os.setresuid(65534, 65534, 65534)\n"
        "try: config.load(sys.argv[1])\n"
        "except config.ConfigError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == f"{path}: cannot be read: Permission denied\n"


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["primary", "gateway", "never", "192.0.2.1", "::1", "1s", "/nfs", "eth0"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from([key.name for key in KEYS]) | st.text()
LINKS = st.lists(
    st.dictionaries(st.sampled_from([key.name for key in LINK_KEYS]) | st.text(), VALUES),
    max_size=3,
)


@given(st.binary(max_size=2000) | st.text().map(str.encode))
@example(b"a = 0x" + b"f" * 10_000)
@example(b"a." * 900 + b"a = 1")
@example(b"[timing]\n" * 2)
def test_no_bytes_raise_anything_else(content: bytes) -> None:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return
    with pytest.raises(ConfigError) as caught:
        config.parse(text)
    assert caught.value.problems


@given(st.dictionaries(NAMES, VALUES, max_size=8), LINKS)
def test_no_values_raise_anything_else(values: dict[str, Any], links: list[dict[str, Any]]) -> None:
    document = tomllib.loads(MINIMAL) | {"links": links}
    for name, value in values.items():
        *tables, leaf = name.split(".")
        place: Any = document
        for table in tables:
            place = place.setdefault(table, {}) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place[leaf] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tomllib, "loads", lambda text: document)
        try:
            config.parse("")
        except ConfigError as error:
            assert error.problems
            for problem in error.problems:
                assert str(problem).isprintable()
                assert len(str(problem)) < 600


# --------------------------------------------------------------------------- what is accepted


def test_a_mere_witness_is_always_named() -> None:
    (warning,) = config.warnings(config.parse(MINIMAL))
    assert "the loss of all heartbeat links at once is not covered" in warning


def test_a_single_link_wants_its_risk_accepted() -> None:
    settings = config.parse(f'{ONE_LINK}[takeover]\naccept = ["single-link-witness"]\n')
    assert not settings.disjoint_links
    assert any("single-link-witness" in warning for warning in config.warnings(settings))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('[nfs]\nversion4 = "warn"', "NFS v4 lose state"),
        ('[takeover]\nstart_alone_after = "5m"', 'start_alone_after is "5m"'),
        ('[timing]\nprofile = "fast"\n[scheduling]\nrealtime = false', "scheduling.realtime"),
        ('[firewall]\nbackend = "iptables"\n[timing]\ntakeover_after = "4s"', "address lease ends"),
        ('[sync]\nevery = "2h"', 'sync.every is "2h"'),
        ('[sync]\nfull_every = "2d"', 'sync.full_every is "2d"'),
        ('[sync]\nverify_every = "never"', "damage on a copy"),
        ("[sync]\nmax_deletes_percent = 100", "no number of deletions is held"),
        ('[sync]\nresync = "on-failback"', "no replica until `nfsha sync`"),
        (
            '[sync]\nquarantine_drop = true\nquarantine_max_size = "9GB"',
            "files that exist nowhere else are deleted",
        ),
        (
            'replication = "off"\n[nfs]\nmounts = ["/nfs/a"]\n[hooks]\nmount = "/a"\n'
            'unmount = "/b"\ntimeout = "2m"',
            'hooks.timeout is "2m": a stop of the daemon waits so long',
        ),
    ],
)
def test_other_accepted_risks_are_named(lines: str, words: str) -> None:
    found = config.warnings(config.parse(MINIMAL + lines))
    assert len(found) == 2
    assert words in found[1]


# --------------------------------------------------------------------------- the docs


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    assert config.load(path).links


def test_the_commented_default_has_every_key_with_its_default() -> None:
    text = (ROOT / "etc" / "nfsha.toml").read_text(encoding="utf-8")
    plain = config.parse(text)
    assert plain == config.parse(re.sub(r"(?m)^#(?=[a-z_0-9]+ = )", "", text))
    for key in KEYS:
        assert re.search(rf"(?m)^#?{key.name.rpartition('.')[2]} = ", text), key.name


def test_defaults_in_words_are_the_defaults_in_force() -> None:
    for field, key in TIMING_KEYS.items():
        assert key.otherwise == getattr(Timings(), field), key.name
    assert len({key.name for key in KEYS}) == len(KEYS)
    assert len(describe_keys()) == len(KEYS) + sum(map(len, EACH_TABLE_OF.values()))


def test_relations_name_keys_that_exist() -> None:
    names = {key.name for key in KEYS}
    tables = {name.rpartition(".")[0] for name in names}
    for relation in RELATIONS:
        assert set(relation.keys) <= names | tables, relation.rule


def test_what_is_generated_is_fresh() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "render_configuration.py"), "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_jitter_that_nobody_gave_fits_every_period() -> None:
    own = '[sync]\nevery = "10s"\nvolumes = [{ path = "/nfs/a", every = "1s" }]\n'
    assert config.parse(MINIMAL + own).sync.jitter_ms == 500
    assert config.parse(MINIMAL).sync.jitter_ms == 2000

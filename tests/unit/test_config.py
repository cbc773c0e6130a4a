"""The configuration: what is read, what is refused and in which words."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nfsha import config
from nfsha.config import ConfigError, Settings
from nfsha.config.keys import KEYS, LINK_KEYS, TIMING_KEYS, describe_keys
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
[takeover]
start_alone_after = "10m"
accept = ["single-link-witness"]
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
        takeover=config.Takeover(600_000, ("single-link-witness",)),
        scheduling=config.Scheduling(realtime=False, lock_memory=False),
        log=config.Log("debug"),
        paths=config.Paths(Path("/a"), Path("/b"), Path("/c")),
        control_group="storage",
    )


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
    amount, unit = re.fullmatch(r"([0-9]+)(ms|s|m)", shown, re.ASCII).groups()  # type: ignore[union-attr]
    assert int(amount) * {"ms": 1, "s": 1000, "m": 60_000}[unit] == duration_ms


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
    ):
        assert words in messages
    assert len(RELATIONS) == 9


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
    assert len(describe_keys()) == len(KEYS) + len(LINK_KEYS)


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

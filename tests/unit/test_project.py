"""The tree itself: what it promises to newcomers, and what must never be in it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

TARGETS = [
    "help",
    "setup",
    "demo",
    "test",
    "test-all",
    "test-versions",
    "check",
    "sim",
    "bench-failover",
    "bench-replication",
    "bench-failback",
    "lab-up",
    "lab-shell",
    "lab-down",
    "lock",
    "docs",
    "clean",
]

KNOWN_HOSTS = {
    "datatracker.ietf.org",
    "docs.kernel.org",
    "git.kernel.org",
    "github.com",
    "man7.org",
    "prometheus.io",
    "systemd.io",
    "toml.io",
    "www.freedesktop.org",
    "www.kernel.org",
    "www.rfc-editor.org",
}
"""Sites that documentation may point at. An index of packages is none of them, on purpose."""


def tracked_texts() -> Iterator[tuple[Path, str]]:
    """Every text file of the tree, without what tools leave in it."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if (not name.startswith(".") or name == ".ci")
            and name not in {"__pycache__", "build", "dist"}
            and not name.endswith(".egg-info")
        ]
        for name in names:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink() and path.suffix != ".pyc":
                try:
                    yield path.relative_to(ROOT), path.read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    continue


def test_no_file_points_at_an_unknown_host_or_a_developers_folder() -> None:
    found = []
    own_folder = re.compile(r"(?<![\w.~-])/" + r"(?:work|root|home)/[\w.]")
    for path, text in tracked_texts():
        for number, line in enumerate(text.splitlines(), start=1):
            hosts = re.findall(r"\bhttps?://([^/\s:\"'`)>\]]+)", line)
            if set(hosts) - KNOWN_HOSTS or own_folder.search(line):
                found.append(f"{path}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


# --------------------------------------------------------------------------- locks


def locked(path: Path) -> dict[str, tuple[str, list[str]]]:
    """Name to version and hashes of one lock file; anything else in the file is an error."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    packages = {}
    for line in text.splitlines():
        if line.lstrip().startswith("#") or not line.strip():
            continue
        match = re.fullmatch(
            r"([a-z0-9-]+)==(\S+)(?: ; [^#]*?)?((?:\s+--hash=sha256:[0-9a-f]{64})+)\s*", line
        )
        assert match, f"{path.name}: {line[:100]}"
        packages[match[1]] = (match[2], match[3].split())
    return packages


def test_there_are_locks_for_building_running_and_developing() -> None:
    assert [path.stem for path in LOCKS] == ["build", "dev", "runtime"]


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_locks_pin_every_version_with_hashes_and_name_no_index(path: Path) -> None:
    packages = locked(path)
    assert packages
    assert all(hashes for _, hashes in packages.values())
    text = path.read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"(?m)^\s*(-i|-f|--(?!hash=))", text)
    assert "index" not in text
    assert "find-links" not in text


def test_locks_satisfy_what_the_project_asks_for() -> None:
    build, dev, runtime = (locked(path) for path in LOCKS)
    groups = PROJECT["dependency-groups"]
    for wanted, packages in (
        (PROJECT["project"]["dependencies"], runtime),
        (PROJECT["project"]["dependencies"] + groups["dev"], dev),
        (groups["build"] + PROJECT["build-system"]["requires"], build),
    ):
        for requirement in map(Requirement, wanted):
            assert packages[requirement.name][0] in requirement.specifier, str(requirement)


def test_what_is_tested_is_what_runs() -> None:
    _, dev, runtime = (locked(path) for path in LOCKS)
    assert {name: dev[name] for name in runtime} == runtime


# --------------------------------------------------------------------------- rules and targets


def test_the_entry_point_resolves() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="nfsha")
    assert script.value == "nfsha.cli.main:main"
    assert callable(script.load())


def test_what_the_core_may_not_use_is_banned_in_both_linters() -> None:
    rules = tomllib.loads((ROOT / "nfsha" / "core" / "ruff.toml").read_text(encoding="utf-8"))
    banned = set(rules["lint"]["flake8-tidy-imports"]["banned-api"])
    (contract,) = (
        one for one in PROJECT["tool"]["importlinter"]["contracts"] if one["id"] == "pure-core"
    )
    assert {"time", "asyncio", "random", "os", "socket"} <= banned
    assert banned <= set(contract["forbidden_modules"])


@pytest.mark.parametrize("target", TARGETS)
def test_make_has_the_target(target: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", target],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"(?m)^{target}:.*## \S", makefile), f"{target} is not listed by make help"


def test_ci_checks_and_tests() -> None:
    script = ROOT / ".ci" / "run"
    lines = script.read_text(encoding="utf-8").splitlines()
    assert os.access(script, os.X_OK)
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert lines[-2:] == ["make check", "make test"]


def test_the_list_of_debian_packages_is_sorted() -> None:
    text = (ROOT / "scripts" / "debian-packages.txt").read_text(encoding="utf-8")
    packages = [line for line in text.splitlines() if not line.startswith("#")]
    assert packages == sorted(set(packages))


# --------------------------------------------------------------------------- set-up


@pytest.fixture
def machine() -> Iterator[Path]:
    """A copy of the set-up with a PATH of its own: `bin` has only harmless tools."""
    with tempfile.TemporaryDirectory(prefix="nfsha-setup-") as name:
        tree = Path(name)
        (tree / "bin").mkdir()
        (tree / "scripts").mkdir()
        for script in ("setup.sh", "debian-packages.txt"):
            source = ROOT / "scripts" / script
            (tree / "scripts" / script).write_text(source.read_text(encoding="utf-8"))
        for tool in ("dirname", "mktemp", "rm", "grep", "cat", "tail"):
            (tree / "bin" / tool).symlink_to(f"/usr/bin/{tool}")
        pretend(tree, "uname", "echo Linux")
        pretend(tree, "id", "echo 0")
        yield tree


def pretend(tree: Path, tool: str, script: str) -> None:
    path = tree / "bin" / tool
    path.write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


def refusal(tree: Path) -> str:
    done = subprocess.run(
        ["/bin/bash", str(tree / "scripts" / "setup.sh"), "machine"],
        env={"PATH": str(tree / "bin"), "TMPDIR": str(tree)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr


def test_set_up_refuses_who_is_not_root(machine: Path) -> None:
    pretend(machine, "id", "echo 1000")
    assert refusal(machine) == (
        "setup: must be root (network namespaces, mounts, packages); run it as: sudo make ...\n"
    )


def test_set_up_refuses_what_is_not_linux(machine: Path) -> None:
    pretend(machine, "uname", "echo Darwin")
    assert refusal(machine) == (
        "setup: nfsha runs on Linux only (this is Darwin); use a Debian 12 machine\n"
    )


def test_set_up_refuses_a_machine_without_apt(machine: Path) -> None:
    assert refusal(machine) == (
        "setup: needs apt-get for its test peers; use a machine with Debian 12\n"
    )


def test_set_up_names_the_package_that_cannot_be_had(machine: Path) -> None:
    pretend(machine, "dpkg-query", "case $4 in make|rsync) ;; *) echo -n installed ;; esac")
    pretend(machine, "apt-get", '[ "$1" = update ] || [ "${@: -1}" = make ]')
    assert refusal(machine) == (
        "setup: cannot be had from this machine's package sources: rsync;"
        " use Debian 12 with 'main' in /etc/apt/sources.list*\n"
    )


def test_set_up_says_when_the_package_lists_cannot_be_fetched(machine: Path) -> None:
    pretend(machine, "dpkg-query", "exit 1")
    pretend(machine, "apt-get", "echo 'no network' >&2; exit 100")
    assert refusal(machine) == (
        "no network\n"
        "setup: apt-get update failed; check this machine's network and /etc/apt/sources.list*\n"
    )

"""`nfsha release` and the real kernel: what a stopped daemon left is gone, in the safe order."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest

from nfsha.host.clock import now_ms
from nfsha.vip.freeze import DEFAULT_PORTS, Firewall, Guarded, choose
from tests.netns.namespaces import Namespace, connect, inside, namespaces

VIP = "192.0.2.10"
VIP6 = "2001:db8::10"
CONFIGURATION = """
role = "primary"
interface = "eth0"
vip = ["192.0.2.10", "2001:db8::10"]
witness = ["192.0.2.254"]
links = [{{ local = "192.0.2.1", peer = "192.0.2.2" }}, {{ local = "10.9.9.1", peer = "10.9.9.2" }}]
firewall.backend = "{backend}"
timing.takeover_after = "5s"
paths.runtime = "{folder}"
"""


@dataclass(frozen=True)
class Host:
    """A machine whose daemon has just been killed while it served."""

    space: Namespace
    folder: Path
    backend: str

    def release(self, *words: str, reason: str = "stop") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["ip", "netns", "exec", self.space.name, "env", f"NFSHA_STOP_REASON={reason}",
             sys.executable, "-c",
             "import sys; from nfsha.cli.main import main; sys.exit(main())",
             "release", "--config", str(self.folder / "nfsha.toml"), *words],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip

    def holds_vip(self) -> bool:
        shown = self.space.ip("address", "show", "dev", "eth0")
        assert (VIP in shown) == (VIP6 in shown), shown
        return VIP in shown

    def rules(self) -> str:
        if self.backend == "nftables":
            return self.space.exec("nft", "list", "ruleset")
        saved = self.space.exec("iptables-legacy-save", "-t", "filter")
        return "\n".join(line for line in saved.splitlines() if "nfsha" in line.lower())


@pytest.fixture(params=["nftables", "iptables"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    with namespaces("node", "lan") as (node, lan):
        connect(node, "eth0", lan, "eth0")
        text = CONFIGURATION.format(backend=request.param, folder=tmp_path)
        (tmp_path / "nfsha.toml").write_text(text, encoding="utf-8")
        _put_addresses(node, "add", "60")
        with inside(node):
            asyncio.run(_open(request.param))
        one = Host(node, tmp_path, request.param)
        assert one.holds_vip()
        assert one.rules()
        yield one


def _put_addresses(node: Namespace, verb: str, life: str) -> None:
    for address in (f"{VIP}/32", f"{VIP6}/128"):
        node.ip("address", verb, address, "dev", "eth0", "nodad", "valid_lft", life,
                "preferred_lft", life)  # fmt: skip


def _guarded() -> Guarded:
    vips = [ip_address(VIP), ip_address(VIP6)]
    return Guarded(vips, [ip_address("192.0.2.2"), ip_address("10.9.9.2")], DEFAULT_PORTS)


async def _open(backend: str) -> None:
    lease = await choose(Firewall(backend), _guarded(), now_ms)
    try:
        await lease.install()
        outcome = await lease.open(now_ms() + 60_000)
        assert outcome.held, outcome.why
    finally:
        lease.shut()


async def _live(backend: str) -> bool:
    lease = await choose(Firewall(backend), _guarded(), now_ms)
    try:
        return bool(await lease.live())
    finally:
        lease.shut()


def test_release_takes_the_address_and_the_rules_away(host: Host) -> None:
    done = host.release("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout) == {"ok": True, "removed": [VIP, VIP6], "rules": "removed"}
    assert not host.holds_vip()
    assert host.rules() == ""
    again = host.release()
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("the VIP was not held; ")


def test_a_final_stop_takes_the_address_away_and_keeps_the_ports_closed(host: Host) -> None:
    done = host.release("--if-stopped")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not host.holds_vip()
    assert host.rules()
    with inside(host.space):
        assert not asyncio.run(_live(host.backend))


def test_a_restart_changes_nothing(host: Host) -> None:
    done = host.release("--if-stopped", reason="restart")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("nothing to do")
    assert host.holds_vip()
    with inside(host.space):
        assert asyncio.run(_live(host.backend))


def test_rules_stay_while_the_address_cannot_go(host: Host) -> None:
    _put_addresses(host.space, "change", "forever")
    rules = host.rules()
    done = host.release()
    assert done.returncode == 1
    assert "permanently" in done.stderr
    assert done.stderr.count("\n") == 1
    assert host.holds_vip()
    assert host.rules().split("expires")[0] == rules.split("expires")[0]

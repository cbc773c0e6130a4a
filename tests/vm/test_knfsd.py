"""What nfsha reads of the kernel's own NFS server, and concludes: a real knfsd, real clients.

One machine is booted for all of it (`uml`), and goes through its stages (`guest_knfsd`); what was
read at each is judged here, as the other node would judge it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from nfsha.daemon import nfs_facts, node_guards
from nfsha.daemon.nfs_facts import Heard, Told
from nfsha.daemon.node_guards import Both, Guarded
from nfsha.nfs import exports, served
from nfsha.nfs.exports import KERNEL
from nfsha.nfs.portmap import Registered
from nfsha.nfs.served import Served
from nfsha.nfs.v3_fence import LOCK_PROGRAM, STATUS_PROGRAM, Version4
from nfsha.vip.service_lease import DEFAULT_PORTS
from tests.vm import guest_look, uml

pytestmark = pytest.mark.timeout(150)  # the first test has the boot: 15 s on an idle machine

LIMIT_S = 120
DISKS = {"data": {".nfsha-volume": "of the test\n", "folder/": ""}, "words": {"folder/": ""}}
DOCS = Path(uml.REPOSITORY / "docs" / "nfs.md")
V4_CLIENTS, V3_ONLY = "NFS v4 clients", "NFS v3 only on the receiver"


@dataclass(frozen=True)
class Look:
    """One stage: the facts, as they came out of the guest, and the rest that was read there."""

    facts: Served
    health: dict[str, Any]
    lock_holders: list[str]


class Machine:
    """What the machine left."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.said: dict[str, Any] = results["stages"]
        self._looks = {**results["stages"], "in the unit": results["unit"]}

    def at(self, stage: str) -> Look:
        """What was read at a stage."""
        found = self._looks[stage]
        facts = served.from_json(found["served"])
        return Look(facts, found["health"], found["lock_holders"])


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    folder = tmp_path_factory.mktemp("vm")
    return Machine(uml.run("tests.vm.guest_knfsd", folder, DISKS, limit_s=LIMIT_S))


def guard(name: str, look: Look) -> Guarded:
    """The row of the guards' table, for a pair of which both nodes told these facts."""
    told = Told(
        answers=1,
        version="",
        key="",
        settings=dict.fromkeys(nfs_facts.SETTINGS, ""),
        wall_ns=1,
        link_address="",
        held=(),
        seen={},
        rsync="",
        rsync_refused="",
        hindrances=(),
        copied_ns=0,
        paused=False,
        served=look.facts,
    )
    both = Both(
        here=told,
        heard=Heard(told, 0, 0, answer=True, asked_wall_ns=0),
        receives=False,
        vips=[ip_address(vip) for vip in guest_look.VIPS],
        ports=DEFAULT_PORTS,
        hooks=False,
        copies=True,
    )
    return node_guards.GUARDS[name](both)


# --- the configuration that is shipped


def test_the_programs_take_the_shipped_configuration_without_a_word(machine: Machine) -> None:
    assert machine.said["started"] == ""


def test_with_it_the_server_refuses_v4_and_the_proof_says_so(machine: Machine) -> None:
    look = machine.at("v3 only")
    assert look.facts.fence.tcp.version4 is Version4.REFUSED
    assert look.facts.fence.tcp.nfs3 == look.facts.fence.tcp.mountd3 == "answered"
    assert look.facts.fence.udp is None
    assert look.health == {"ok": True, "signs": [], "warnings": []}
    assert guard(V3_ONLY, look).ok
    assert machine.said["v4 mount"] == "mount.nfs: Protocol not supported"


def test_all_listen_on_the_promised_ports_and_on_no_others(machine: Machine) -> None:
    rows = re.findall(r"^\| (\w+) \| (\d+) \|", DOCS.read_text(), flags=re.MULTILINE)
    promised = {name: int(port) for name, port in rows}
    assert promised == DEFAULT_PORTS == guest_look.PORTS
    assert machine.said["listening"] == {
        "tcp": sorted(promised.values()),
        "udp": [promised["rpcbind"], promised["statd"], promised["lockd"]],
    }
    look = machine.at("v3 only")
    assert guard("ports and transports", look).ok
    listed = set(look.facts.fence.registered or ())
    assert Registered(STATUS_PROGRAM, 1, "tcp", promised["statd"]) in listed
    assert Registered(LOCK_PROGRAM, 4, "tcp", promised["lockd"]) in listed


def test_without_it_v4_answers_and_the_proof_says_so(machine: Machine) -> None:
    look = machine.at("v4 spoken")
    assert look.facts.fence.tcp.version4 is Version4.SPOKEN
    assert look.facts.fence.tcp.nfs3 == "answered"
    assert look.health["ok"] is False
    assert "speaks v4" in look.health["signs"][0]
    refused = guard(V3_ONLY, look)
    assert not refused.ok
    assert "NFS v4 over TCP at 127.0.0.1: it is spoken" in refused.found
    assert "it is in the list of rpcbind" in refused.found


# --- clients


def test_v3_clients_are_no_v4_clients(machine: Machine) -> None:
    look = machine.at("v3 client")
    assert look.facts.v4.listed
    assert guard(V4_CLIENTS, look) == Guarded(
        V4_CLIENTS, ok=True, found="none in the list of the kernel's server"
    )


def test_a_client_past_the_vip_is_named(machine: Machine) -> None:
    refused = guard("clients past the VIP", machine.at("v3 client"))
    assert not refused.ok
    assert "10.77.0.2 at 10.77.0.1:2049" in refused.found
    assert "10.77.0.100:2049" not in refused.found
    assert guard("clients past the VIP", machine.at("v3 only")).ok


def test_who_holds_a_lock_is_read_from_statd(machine: Machine) -> None:
    assert machine.at("v3 only").lock_holders == []
    assert machine.at("v3 client").lock_holders == ["client"]  # by its name, as statd resolved it


def test_v4_clients_of_each_minor_version_are_named_and_forbid_the_move(machine: Machine) -> None:
    look = machine.at("v4 clients")
    assert look.facts.v4.count == 3
    found = {(one.address.rpartition(":")[0], one.name) for one in look.facts.v4.clients}
    assert found == {
        ("10.77.0.2", "Linux NFSv4.2 server"),
        ("10.77.0.2", "Linux NFSv4.0 server/10.77.0.100"),
        ("[fd77::2]", "Linux NFSv4.1 server"),
    }
    assert {one.status for one in look.facts.v4.clients} == {"confirmed"}
    refused = guard(V4_CLIENTS, look)
    assert not refused.ok
    for address, name in found:
        assert re.search(
            rf"{re.escape(address)}:\d+ \({re.escape(name)}, confirmed\)", refused.found
        )


def test_a_server_that_started_anew_waits_for_its_clients(machine: Machine) -> None:
    """Its list is empty, but they have files open and come back within its grace period."""
    look = machine.at("started anew")
    assert look.facts.v4.count == 0
    assert look.facts.fence.tcp.version4 is Version4.SPOKEN
    refused = guard(V4_CLIENTS, look)
    assert not refused.ok
    assert "v4_end_grace" in refused.found
    back = machine.at("back")
    assert "Linux NFSv4.2 server" in {one.name for one in back.facts.v4.clients}
    assert not guard(V4_CLIENTS, back).ok


def test_once_they_have_unmounted_the_move_is_free(machine: Machine) -> None:
    assert guard(V4_CLIENTS, machine.at("left")).ok


def test_one_that_is_gone_for_good_forbids_it_until_the_remedy_that_is_told(
    machine: Machine,
) -> None:
    refused = guard(V4_CLIENTS, machine.at("gone"))
    assert not refused.ok
    assert "`echo expire > /proc/fs/nfsd/clients/N/ctl`" in refused.found
    assert guard(V4_CLIENTS, machine.at("expired")).ok


# --- exports and handles


def test_exports_are_read_from_mountd_and_the_servers_own_table(machine: Machine) -> None:
    found = machine.at("v3 only").facts.exports
    assert (found.server, found.trouble, found.unread) == (KERNEL, "", "")
    data, words = found.exports
    assert (data.path, data.clients) == ("/nfs/data", ("10.77.0.0/24", "fd77::/64"))
    assert (words.path, words.clients) == ("/nfs/two words", ("10.77.0.0/24",))
    assert data.configured is not None
    assert data.configured.fsid == "fsid=7"
    assert [one.partition(":")[0] for one in data.configured.options] == ["10.77.0.0/24", "fd77"]
    assert words.configured is not None
    assert words.configured.fsid == "fsid=8"
    assert "ro," in words.configured.options[0]
    assert exports.differences(found, found) == ()


def test_mountd_has_nothing_to_log_while_nobody_asks(machine: Machine) -> None:
    """It logs who asks for a handle: nfsha looks each half minute, at each export."""
    assert machine.said["logged when not asked"] == []
    assert "mount request" in machine.said["logged when asked"][0]
    often, asked = machine.at("not asked").facts, machine.at("v3 only").facts
    assert {one.no_handle for one in often.exports.exports} == {"not asked for"}
    assert replace(often, exports=asked.exports) == asked


def test_a_root_handle_is_the_fsid(machine: Machine) -> None:
    """Where the export is `secure`, mountd tells none to a port of 1024 or above."""
    data, words = machine.at("v3 only").facts.exports.exports
    fsid = (8).to_bytes(4, "little").hex()
    assert words.root_handle == f"01000100{fsid}"  # include/uapi/linux/nfsd/nfsfh.h: version, types
    assert data.root_handle is None
    assert data.no_handle == "the server says: this host may not mount it"


def test_a_handle_that_is_compared_is_what_clients_hold(machine: Machine) -> None:
    """After the fsid, the inode's number and generation: as `file_handles` reads them."""
    by_volume = {one.volume: one for one in machine.at("v3 client").facts.handles}
    folder = next(one for one in by_volume["two words"].handles if one.name == "folder")
    header_digits = 2 * 8  # struct file_handle: its size and type
    assert machine.said["handle"].endswith(folder.handle[header_digits:])
    names = [one.name for one in by_volume["data"].handles]
    assert names == [".nfsha-volume", "folder"]


# --- within the unit


def test_the_unit_that_is_shipped_hides_none_of_it(machine: Machine) -> None:
    """Its sandbox has a /proc of its own, and few powers."""
    outside, inside = machine.at("at the end").facts, machine.at("in the unit").facts
    assert inside.exports.server == KERNEL
    assert inside.v4.count == 1
    assert inside == outside

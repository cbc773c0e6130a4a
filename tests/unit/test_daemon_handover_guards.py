"""The guards of a move, on facts that no lab can make: each fails alone, in words with a remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from nfsha.core.model import CommandKind, Epoch, Role
from nfsha.daemon import handover_guards, nfs_facts, node_guards
from nfsha.daemon.handover_guards import Copies, View
from nfsha.daemon.nfs_facts import Heard, Told
from nfsha.nfs.clients import Stray, V4Client, V4ClientFacts
from nfsha.nfs.exports import Configured, Export, ExportFacts
from nfsha.nfs.file_handles import Handle, HandleFacts
from nfsha.nfs.portmap import Registered
from nfsha.nfs.served import Served
from nfsha.nfs.v3_fence import Answers, FenceFacts, Version4
from nfsha.replica.volume.facts import VolumeFacts, differences
from nfsha.replica.volume.inventory import Pair
from tests.unit.situations import EPOCH, copied, settled

VIP = "10.0.0.100"
MACS = {Role.PRIMARY: "02:00:00:00:00:01", Role.STANDBY: "02:00:00:00:00:02"}
PORTS = {"rpcbind": 111, "nfs": 2049, "mountd": 20048, "statd": 20049, "lockd": 20050}
UUID = "5ba0947b-f2e7-4356-88c8-ac1c38d24e22"
SECOND_NS = 1_000_000_000
NOW_NS = 1_700_000_000 * SECOND_NS


def served(role: Role) -> Served:
    answers = Answers("answered", Version4.REFUSED, "version not supported", "answered")
    fence = FenceFacts(
        "127.0.0.1", answers, None, (Registered(100003, 3, "tcp", 2049),), "answered"
    )
    export = Export("/nfs/data", (), Configured(("everybody: rw",), "fsid=1"), "43")
    handles = (Handle(".nfsha-volume", f"{role}-1", 7), Handle("folder", f"{role}-2", 8))
    return Served(
        fence, ExportFacts("knfsd", (export,)), V4ClientFacts(True), (), 0, "",
        (HandleFacts("data", handles),),
    )  # fmt: skip


def told(role: Role) -> Told:
    giver = role is Role.PRIMARY
    return Told(
        answers=5,
        version="0.1.0",
        key="1122aabb",
        settings=dict.fromkeys(nfs_facts.SETTINGS, "a"),
        wall_ns=NOW_NS,
        link_address=MACS[role],
        held=(VIP,) if giver else (),
        seen={} if giver else {VIP: MACS[Role.PRIMARY]},
        rsync="3.2.7",
        rsync_refused="",
        hindrances=(),
        copied_ns=0 if giver else NOW_NS - 3 * SECOND_NS,
        paused=False,
        served=served(role),
    )


def volume(**other: object) -> VolumeFacts:
    facts = VolumeFacts(
        name="data", path=Path("/nfs/data"), device="/dev/vdb", device_number=1, fstype="ext4",
        fs_uuid=None, size_bytes=1 << 30, free_bytes=1 << 29, inodes=1 << 16, free_inodes=1 << 15,
        options="rw", read_only=False, failing="", identity=UUID, stamp=EPOCH, empty=False,
    )  # fmt: skip
    return replace(facts, **other)  # type: ignore[arg-type]


def pair(here: VolumeFacts | None, there: VolumeFacts | None, paired: str = "paired") -> Pair:
    differs = differences(here, there) if here is not None and there is not None else ()
    return Pair("data", UUID, here, there, paired, differs)


def view() -> View:
    """A move to the standby that nothing forbids, as the primary sees it."""
    found = copied()
    heard = Heard(told(Role.STANDBY), found.now_ms - 300, NOW_NS, True, NOW_NS - SECOND_NS)
    return View(
        state=found.primary.state,
        now_ms=found.now_ms,
        to=Role.STANDBY,
        vips=(ip_address(VIP),),
        ports=PORTS,
        hooks=False,
        own=told(Role.PRIMARY),
        heard=heard,
        refused="",
        copies=Copies((pair(volume(), volume()),), told=True),
    )


def failing(seen: View) -> dict[str, str]:
    return {one.name: one.found for one in handover_guards.guards(seen) if not one.ok}


def with_there(seen: View, change: Callable[[Told], Told]) -> View:
    assert seen.heard is not None
    return replace(seen, heard=replace(seen.heard, told=change(seen.heard.told)))


def with_here(seen: View, change: Callable[[Told], Told]) -> View:
    assert seen.own is not None
    return replace(seen, own=change(seen.own))


def with_pair(seen: View, here: VolumeFacts | None, there: VolumeFacts | None) -> View:
    return replace(seen, copies=Copies((pair(here, there),), told=True))


def test_nothing_forbids_and_each_guard_says_what_it_found() -> None:
    assert failing(view()) == {}
    table = {one.name: one.found for one in handover_guards.guards(view())}
    assert len(table) == len(list(handover_guards.guards(view())))
    assert table["copies"] == "the last whole copy is 3 s old, nothing holds them up"
    assert table["NFS v4 clients"] == "none in the list of the kernel's server"


def test_the_same_facts_from_the_other_node_say_here_and_there_the_other_way() -> None:
    seen = view()
    assert seen.own is not None
    assert seen.heard is not None
    turned = replace(
        seen,
        state=copied().standby.state,
        own=replace(seen.heard.told, version="0.2.0"),
        heard=replace(seen.heard, told=seen.own),
    )
    assert failing(turned)["nfsha"].startswith("0.2.0 here, 0.1.0 there; ")


def test_epochs_that_differ() -> None:
    seen = view()
    other = Epoch(EPOCH.number + 1, "fedcba9876543210", Role.STANDBY)
    assert seen.state.report is not None
    seen.state.report = replace(seen.state.report, epoch=other)
    assert "what they wait for" in failing(seen)["epochs"]


def test_a_daemon_that_stops() -> None:
    seen = view()
    seen.state.stopping = "stop"
    assert "time for it" in failing(seen)


def test_where_somebody_else_replicates_there_is_nothing_to_judge_of_copies() -> None:
    found = settled()
    seen = replace(view(), state=found.primary.state, now_ms=found.now_ms, copies=None, hooks=True)
    assert seen.own is not None
    same = seen.own.served.handles
    # Equal handles are what clients of a block replica need; and one node only has it mounted.
    seen = with_there(
        seen,
        lambda one: replace(
            one,
            served=replace(
                one.served,
                handles=same,
                exports=replace(
                    one.served.exports,
                    exports=(replace(one.served.exports.exports[0], root_handle="99"),),
                ),
            ),
        ),
    )
    assert failing(seen) == {}


@pytest.mark.parametrize(
    ("here", "there", "words"),
    [
        (volume(), volume(size_bytes=1 << 29), "536870912 bytes, on the other node 1073741824"),
        (volume(), volume(inodes=99), "99 inodes"),
        (volume(), volume(refused="it holds another volume"), "it holds another volume"),
        (
            volume(),
            volume(stamp=Epoch(EPOCH.number, "fedcba9876543210", Role.STANDBY)),
            "of another history",
        ),
        (volume(), volume(stamp=replace(EPOCH, number=EPOCH.number + 1)), "newer than"),
        (volume(), volume(name="web"), "mounted as web there"),
        (volume(failing="mounted read-only by the kernel"), volume(), "by the kernel"),
    ],
)
def test_volumes_that_cannot_take_over(here: VolumeFacts, there: VolumeFacts, words: str) -> None:
    found = failing(with_pair(view(), here, there))
    assert found.keys() == {"volumes"}
    assert words in found["volumes"]


def test_what_can_be_no_volume_is_not_to_be_mounted_on_the_other_node_too() -> None:
    alone = volume(refused="fuse is a program's filesystem", identity=None)
    assert [*pair(alone, None, "unpaired-here").obstacles()] == [
        "volume data has no copy: what is mounted here cannot be one: fuse is a program's "
        "filesystem; unmount it, or mount it elsewhere than below nfs.root"
    ]
    (words,) = pair(volume(), None, "unpaired-here").obstacles()
    assert "it is not mounted there: mount it" in words


def test_a_larger_or_older_copy_is_none_of_them() -> None:
    older = volume(size_bytes=1 << 31, stamp=replace(EPOCH, number=EPOCH.number - 1))
    assert failing(with_pair(view(), volume(), older)) == {}


def test_without_volumes_or_before_they_are_told() -> None:
    seen = replace(view(), copies=Copies((), told=False))
    assert failing(seen)["volumes"] == (
        "the other node has not told its volumes: repeat in a moment; "
        "there is none: mount one below nfs.root on both nodes"
    )


def test_a_newer_look_than_the_lists_of_volumes_counts() -> None:
    def without(one: Told) -> Told:
        return replace(one, served=replace(one.served, handles=()))

    assert "not mounted any more" in failing(with_there(view(), without))["volumes"]
    assert "not mounted any more" in failing(with_here(view(), without))["volumes"]


def test_one_disk_that_hangs_forbids() -> None:
    def hung(one: Told) -> Told:
        stuck = (HandleFacts("data", (), "no answer within 3 s"),)
        return replace(one, served=replace(one.served, handles=stuck))

    assert "no answer within 3 s" in failing(with_there(view(), hung))["file handles"]


def test_v4_clients_of_the_kernels_server_on_the_giver_only() -> None:
    def has(one: Told) -> Told:
        client = V4Client("10.0.0.5:700", "Linux NFSv4.2 web", "confirmed")
        return replace(one, served=replace(one.served, v4=V4ClientFacts(True, 1, (client,))))

    found = failing(with_here(view(), has))
    assert found.keys() == {"NFS v4 clients"}
    assert found["NFS v4 clients"].startswith("here: NFS v4 clients of the kernel's server: 10.0")
    assert failing(with_there(view(), has)) == {}


def test_clients_past_the_vip_on_the_giver_only() -> None:
    def has(one: Told) -> Told:
        strays = (Stray("10.0.0.5", "10.0.0.1", 2049),)
        return replace(one, served=replace(one.served, strays=strays, stray_count=80))

    found = failing(with_here(view(), has))
    assert found.keys() == {"clients past the VIP"}
    assert "10.0.0.5 at 10.0.0.1:2049 and 79 more" in found["clients past the VIP"]
    assert failing(with_there(view(), has)) == {}
    unlisted = with_here(
        view(), lambda one: replace(one, served=replace(one.served, unlisted="/proc: not there"))
    )
    assert "/proc: not there" in failing(unlisted)["clients past the VIP"]


@pytest.mark.parametrize(
    ("giver", "receiver", "words"),
    [
        ({"held": ()}, {}, f"{VIP} is not on the interface here"),
        ({}, {"held": (VIP,)}, f"{VIP} is on the interface there"),
        ({}, {"seen": {}}, f"nobody answers for {VIP} on the wire, asked from there"),
        ({}, {"seen": {VIP: "02:99:00:00:00:00"}}, "02:99:00:00:00:00 answers for"),
        ({"seen": {VIP: "02:99:00:00:00:00"}}, {}, "answers for 10.0.0.100 too, seen here"),
    ],
)
def test_the_vip_by_netlink_and_on_the_wire(
    giver: dict[str, object], receiver: dict[str, object], words: str
) -> None:
    seen = with_here(view(), lambda one: replace(one, **giver))  # type: ignore[arg-type]
    seen = with_there(seen, lambda one: replace(one, **receiver))  # type: ignore[arg-type]
    found = failing(seen)
    assert found.keys() == {"VIP on the node that serves only"}
    assert words in found["VIP on the node that serves only"]


def test_nobody_is_told_to_take_the_vip_from_the_node_that_serves_already() -> None:
    seen = view()
    there = replace(seen, to=seen.to.other)
    found = failing(there)
    assert "it serves there already" in found["one serves, the other waits"]
    assert found["VIP on the node that serves only"] == "not looked at: here it serves already"


@pytest.mark.parametrize(
    ("ahead_ms", "words"),
    [(0, ""), (1900, ""), (-1900, ""), (2100, "2100 ms apart"), (-2100, "2100 ms apart")],
)
def test_clocks_are_judged_by_what_is_certain(ahead_ms: int, words: str) -> None:
    """Asked a second before the answer came: the other clock was read somewhere in between."""
    seen = view()
    at_ns = NOW_NS if ahead_ms >= 0 else NOW_NS - SECOND_NS
    seen = with_there(seen, lambda one: replace(one, wall_ns=at_ns + ahead_ms * 1_000_000))
    found = failing(seen).get("clocks", "")
    assert found.startswith(words)
    assert bool(found) is bool(words)


def test_facts_that_do_not_answer_are_not_gone_by() -> None:
    seen = view()
    assert seen.heard is not None
    old = replace(seen.heard, answer=False, at_ms=seen.now_ms - 73_000)
    found = failing(replace(seen, heard=old))
    assert found.keys() == {"facts of the other node", *node_guards.GUARDS}
    assert "what it told last is 73 s old; " in found["facts of the other node"]
    never = failing(replace(seen, heard=None))["facts of the other node"]
    assert never.startswith("it never told any; ")
    refused = failing(replace(seen, heard=None, refused="facts of a node with key 7"))
    assert refused["facts of the other node"].startswith("refused: facts of a node with key 7; ")
    assert "repeat" in failing(replace(seen, own=None))["facts of the other node"]


def test_passes_that_the_receiver_holds_back_are_seen_from_both_nodes() -> None:
    seen = with_there(view(), lambda one: replace(one, paused=True))
    assert failing(seen) == {"passes": "paused there: `nfsha sync --resume` there"}
    assert failing(with_here(view(), lambda one: replace(one, paused=True))) == {}


def test_a_long_list_is_cut() -> None:
    seen = with_there(view(), lambda one: replace(one, hindrances=("volume x: held",) * 100))
    assert failing(seen)["copies"].count("volume x") == node_guards.SENTENCES_SHOWN
    assert failing(seen)["copies"].endswith("; and 81 more")


def test_a_promise_of_maintenance() -> None:
    found = copied()
    assert found.ask(found.standby, CommandKind.MAINTENANCE_ON).accepted
    found.run(500)
    seen = replace(view(), state=found.primary.state, now_ms=found.now_ms)
    assert "end the maintenance" in failing(seen)["no promise"]

"""Exports and file handles of two real nodes: equal, or told in what they differ."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from nfsha.nfs import exports, file_handles
from nfsha.nfs.clients import Stray, strays
from nfsha.nfs.exports import ExportFacts
from nfsha.nfs.file_handles import clone_objections, read_handles
from tests.netns.lab import Lab
from tests.netns.labkit.holder import Disk
from tests.netns.labkit.network import PLACES, VIP
from tests.netns.labkit.nfs_server import make_disks
from tests.netns.labkit.place import Place
from tests.netns.labkit.storage_node import StorageNode

IDENTITY = ".nfsha-volume"

_READ = """
import asyncio, json, sys
from nfsha.nfs import exports
facts = asyncio.run(
    exports.read_exports(sys.argv[1], 20048, exports.ServerFiles(), timeout_ms=5000)
)
print(json.dumps(exports.as_json(facts)))
"""


def read(node: StorageNode) -> ExportFacts:
    """The node's own view, as it travels to the other one."""
    done = node.run(sys.executable, "-c", _READ, node.addresses.lan.ipv4)
    return exports.from_json(json.loads(done.stdout))


def told(here: ExportFacts, there: ExportFacts) -> list[str]:
    return [one.what for one in exports.differences(here, there)]


def change(node: StorageNode, old: str, new: str) -> None:
    """Other configuration, and the server started anew on it."""
    ganesha = node.nfs.ganesha
    assert ganesha is not None
    node.nfs.stop()
    config = node.path("/etc/ganesha/ganesha.conf")
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    node.nfs.start_on_what_is_there()


def test_exports_of_two_nodes_are_compared(lab: Lab) -> None:
    here, there = read(lab.a), read(lab.b)
    assert here.server == "ganesha"
    assert [one.path for one in here.exports] == ["/nfs/data"]
    (mine,), (other,) = here.exports, there.exports
    assert mine.root_handle
    assert mine.root_handle == other.root_handle  # two filesystems, made with one UUID
    assert mine.configured is not None
    assert mine.configured.fsid == "Export_Id=1"
    assert told(here, there) == []

    change(lab.b, "Export_Id=1;", "Export_Id=2;")
    assert told(here, read(lab.b)) == [
        "the root handle of export /nfs/data",
        "fsid of export /nfs/data",
    ]
    change(lab.b, "Export_Id=2;", "Export_Id=1;")
    limited = "CLIENT { Clients = 10.77.0.0/24; Access_Type = RO; } FSAL {"
    change(lab.b, "FSAL {", limited)
    objections = exports.differences(here, read(lab.b))
    assert [one.what for one in objections] == [
        "clients of export /nfs/data",
        "options of export /nfs/data",
    ]
    assert (objections[0].here, objections[0].there) == ("everybody", "10.77.0.0/24")
    assert "access_type=ro" in objections[1].there
    lab.b.nfs.stop()
    assert told(here, read(lab.b)) == ["the export list"]


_ESTABLISHED = """
import json
from nfsha.nfs.clients import established
print(json.dumps(established([2049, 20048])))
"""


def test_a_client_past_the_vip_is_found(lab: Lab) -> None:
    lab.a.add_vip()
    own = lab.a.addresses.lan.ipv4
    client = "import socket, sys; kept = socket.create_connection((sys.argv[1], 2049)); "
    client += "print('connected', flush=True); kept.recv(1)"
    for to in (VIP, own):
        process = lab.c.spawn([sys.executable, "-c", client, to], name=f"client-{to}")
        while "connected" not in process.output():
            assert process.alive
            time.sleep(0.01)
    connections = json.loads(lab.a.run(sys.executable, "-c", _ESTABLISHED).stdout)
    assert len(connections) == 2
    found = strays(connections, vips=[ip_address(VIP)], own=[ip_address(own)], ports=[2049, 20048])
    assert found == (Stray(PLACES["c"].lan.ipv4, own, 2049),)


# --- file handles


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Three volumes: one with files, its clone block by block, and a copy of the files."""
    disks = make_disks(tmp_path, ("server", "other"), ("data",), size_mib=16)
    (source,), (copy,) = disks["server"], disks["other"]
    home = tmp_path / "server"
    first = Place("server", f"handles-{os.getpid()}", home, (source,))
    try:
        first.make_namespace()
        first.boot()
        root = first.path("/nfs/data")
        (root / IDENTITY).write_text("an identity\n")
        for name in ("web", "mail"):
            (root / name).mkdir()
        first.run("umount", "/nfs/data")
    finally:
        first.remove()
    shutil.copyfile(source.image, tmp_path / "clone.img")
    three = (source, Disk(str(tmp_path / "clone.img"), "/nfs/clone"), Disk(copy.image, "/nfs/copy"))
    second = Place("server", f"handles-{os.getpid()}", tmp_path / "again", three)
    try:
        second.make_namespace()
        second.boot()
        second.run("cp", "-a", "/nfs/data/.", "/nfs/copy/")
        yield second
    finally:
        second.remove()


def test_a_clone_of_blocks_is_told_from_a_copy_of_files(place: Place) -> None:
    def handles(name: str) -> file_handles.HandleFacts:
        return read_handles("data", place.path(f"/nfs/{name}"), [IDENTITY])

    source = handles("data")
    assert [one.name for one in source.handles] == [IDENTITY, "mail", "web"]
    assert clone_objections(source, handles("copy")) == ()
    (objection,) = clone_objections(source, handles("clone"))
    assert objection.here == "those of '.nfsha-volume', 'mail', 'web'"

    # Also where only folders tell it: the identity was written after the clone was made.
    identity = place.path(f"/nfs/clone/{IDENTITY}")
    identity.unlink()
    identity.write_text("an identity\n")
    (objection,) = clone_objections(source, handles("clone"))
    assert objection.here == "those of 'mail', 'web'"

    # What is mounted in it belongs to another volume.
    place.run("mount", "-t", "tmpfs", "tmpfs", "/nfs/data/web")
    assert [one.name for one in handles("data").handles] == [IDENTITY, "mail"]

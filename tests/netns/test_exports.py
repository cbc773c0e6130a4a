"""Exports and file handles of two real nodes: equal, or told in what they differ."""

from __future__ import annotations

import json
import os
import sys
import time
from ipaddress import ip_address
from pathlib import Path

import pytest

from nfsha.nfs import exports, file_handles
from nfsha.nfs.clients import Stray, strays
from nfsha.nfs.exports import ExportFacts
from nfsha.nfs.file_handles import HandleFacts, clone_objections
from tests.netns.lab import Lab
from tests.netns.labkit.network import PLACES, VIP
from tests.netns.labkit.storage_node import StorageNode
from tests.netns.namespaces import run

IDENTITY = ".nfsha-volume"

_READ = """
import asyncio, json, sys
from nfsha.nfs import exports
facts = asyncio.run(
    exports.read_exports(
        sys.argv[1], 20048, exports.ServerFiles(), timeout_ms=5000, handles=True
    )
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

SIZE_MIB = {"ext4": 16, "xfs": 310, "btrfs": 120}
MKFS = {"ext4": ["-q"], "xfs": ["-q"], "btrfs": ["-q", "--mixed"]}


@pytest.fixture(params=SIZE_MIB)
def images(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    """Three sparse images of one kind: with files, its clone block by block, and an empty one."""
    kind = request.param
    paths = [tmp_path / f"{name}.img" for name in ("data", "clone", "copy")]
    data, clone, copy = paths
    for image in (data, copy):
        image.touch()
        os.truncate(image, SIZE_MIB[kind] << 20)
        run(f"mkfs.{kind}", *MKFS[kind], str(image))
    run("unshare", "-m", "bash", "-ec", _FILL, "fill", str(data), str(tmp_path))
    run("cp", "--sparse=always", str(data), str(clone))
    return paths


_FILL = """
mkdir "$2/mnt"
mount -o loop "$1" "$2/mnt"
echo "an identity" > "$2/mnt/.nfsha-volume"
mkdir "$2/mnt/web" "$2/mnt/mail"
umount "$2/mnt"
"""

_HANDLES = """
import json, sys
from pathlib import Path
from nfsha.nfs.file_handles import as_json, read_handles
print(json.dumps(as_json(read_handles("data", Path(sys.argv[1]), [".nfsha-volume"]))))
"""


_LOOK = """
mount -o loop "$1" "$2/mnt"
(cd "$2/mnt" && eval "$3")
"$4" -c "$5" "$2/mnt"
umount -R "$2/mnt"
"""


def look(image: Path, before: str = ":") -> HandleFacts:
    """Mounts an image, alone, for a command of the shell in it and a look at its handles."""
    argv = [str(image), str(image.parent), before, sys.executable, _HANDLES]
    done = run("unshare", "-m", "bash", "-ec", _LOOK, "look", *argv)
    return file_handles.from_json(json.loads(done))


def test_a_clone_of_blocks_is_told_from_a_copy_of_files(images: list[Path]) -> None:
    data, clone, copy = images
    source = look(data)
    assert [one.name for one in source.handles] == [IDENTITY, "mail", "web"]
    assert clone_objections(source, look(copy, "mkdir mail web; echo x > .nfsha-volume")) == ()
    (objection,) = clone_objections(source, look(clone))
    assert objection.here == "those of '.nfsha-volume', 'mail', 'web'"

    # Also where only folders tell it: the identity was written after the clone was made.
    late = "rm .nfsha-volume; echo x > .nfsha-volume"
    (objection,) = clone_objections(source, look(clone, late))
    assert objection.here == "those of 'mail', 'web'"

    # What is mounted in it belongs to another volume.
    inner = look(data, "mount -t tmpfs tmpfs web")
    assert [one.name for one in inner.handles] == [IDENTITY, "mail"]

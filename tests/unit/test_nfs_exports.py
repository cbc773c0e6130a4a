"""What servers export: read from what they keep and say, and compared over both nodes."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfsha.nfs import exports, ganesha_conf, mountd
from nfsha.nfs.exports import Configured, Export, ExportFacts, ganesha_exports, parse_etab
from nfsha.nfs.ganesha_conf import GaneshaConfError
from nfsha.nfs.mountd import Listed
from nfsha.nfs.xdr import XdrError, opaque

ROOT = Path(__file__).resolve().parents[2]

# --- the kernel's server


def test_etab_is_read_with_its_escapes_and_several_clients() -> None:
    content = (
        b"/nfs/web\\040data\t10.0.0.0/8(rw,sync,no_subtree_check,fsid=7,sec=sys,rw)\n"
        b"/nfs/web\\040data\t*.example(ro,sync,fsid=7)\n"
        b"/nfs/plain\t*(rw,sync)\n"
        b"torn\n"
    )
    assert parse_etab(content) == {
        "/nfs/web data": Configured(
            ("*.example: ro,sync", "10.0.0.0/8: no_subtree_check,rw,sec=sys,sync"), "fsid=7"
        ),
        "/nfs/plain": Configured(("*: rw,sync",), None),
    }


@given(st.binary(max_size=200))
def test_any_etab_is_read(content: bytes) -> None:
    parse_etab(content)


# --- ganesha

CONF = """
# a comment with a } in it
NFS_Core_Param { Protocols = 3; mount_path_pseudo = true; }
EXPORT_DEFAULTS { SecType = sys; Squash = None; }
EXPORT
{
    Export_Id = 12; # of its own
    Path = "/srv/data; with # marks";
    Pseudo = /nfs/data;
    Access_Type = RO;
    FSAL { Name = VFS; }
    CLIENT { Clients = 10.0.0.0/8, host1; Access_Type = RW; }
}
"""


def test_ganeshas_options_are_those_of_defaults_export_and_client() -> None:
    (path,) = found = ganesha_exports(ganesha_conf.parse(CONF))
    assert path == "/nfs/data"
    assert found[path].fsid == "Export_Id=12"
    assert [line.partition(":")[0] for line in found[path].options] == [
        "10.0.0.0/8",
        "everybody",
        "host1",
    ]
    mine, everybody, _ = found[path].options
    assert "access_type=rw" in mine
    assert "access_type=ro" in everybody
    assert "squash=no_root_squash" in everybody
    assert "sectype=sys" in everybody
    assert "privilegedport=false" in everybody  # said by nobody


def test_without_mount_path_pseudo_clients_mount_the_path() -> None:
    conf = ganesha_conf.parse(CONF.replace("mount_path_pseudo = true;", ""))
    assert list(ganesha_exports(conf)) == ["/srv/data; with # marks"]


def test_two_words_for_one_squash_are_equal() -> None:
    one, two = (
        ganesha_exports(ganesha_conf.parse(f"EXPORT {{ Path=/a; Squash={word}; }}"))
        for word in ("none", "No_Root_Squash")
    )
    assert one == two


def test_included_files_are_read_in_their_places(tmp_path: Path) -> None:
    (tmp_path / "more.d").mkdir()
    (tmp_path / "more.d" / "1.conf").write_text("EXPORT { Path = /a; }")
    (tmp_path / "more.d" / "2.conf").write_text("EXPORT { Path = /b; }")
    (tmp_path / "core.conf").write_text("NFS_CORE_PARAM { NFS_Port = 2049; }")
    main = tmp_path / "ganesha.conf"
    main.write_text(f'%include "{tmp_path}/core.conf"\n%dir more.d\nLOG {{ }}\n')
    whole = ganesha_conf.read(main)
    assert [block.name for block in whole.blocks] == ["nfs_core_param", "export", "export", "log"]
    assert [one.options["path"] for one in whole.all("export")] == [("/a",), ("/b",)]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("%url rados://pool/x", "kept elsewhere"),
        ("%include gone.conf", "No such file"),
        ("%dir gone.d", "No such file"),
        ("%include ganesha.conf", "files deep"),
        ("EXPORT { Path = /a;", "within a block"),
        ("EXPORT { Path = /a; } }", "did not begin"),
        ("EXPORT { Path /a; }", "no option"),
        ("EXPORT { Path = ; }", "no option"),
        ("{ }", "begins after ''"),
        ('EXPORT { Path = "/a; }', "quotation without an end"),
    ],
)
def test_a_configuration_that_cannot_be_understood_is_refused(
    tmp_path: Path, text: str, why: str
) -> None:
    main = tmp_path / "ganesha.conf"
    main.write_text(text)
    with pytest.raises(GaneshaConfError, match=why):
        ganesha_conf.read(main)


@given(st.text(alphabet="aB={};,\"'# \n%", max_size=60))
def test_any_text_is_a_configuration_or_refused(text: str) -> None:
    with contextlib.suppress(GaneshaConfError):
        ganesha_exports(ganesha_conf.parse(text))


def test_the_shipped_fragment_says_what_nfsha_needs() -> None:
    (core,) = ganesha_conf.read(ROOT / "etc" / "ganesha" / "nfsha.conf").all("nfs_core_param")
    wanted = {
        "protocols": "3",
        "nfs_port": "2049",
        "mnt_port": "20048",
        "nlm_port": "20050",
        "enable_rquota": "false",
    }
    assert {key: ",".join(core.options[key]) for key in wanted} == wanted


# --- mountd


def export(path: str, *clients: str) -> bytes:
    groups = b"".join(struct.pack(">I", 1) + opaque(name.encode()) for name in clients)
    return struct.pack(">I", 1) + opaque(path.encode()) + groups + bytes(4)


def test_the_export_list_is_read() -> None:
    content = export("/nfs/b") + export("/nfs/a", "host2", "10.0.0.0/8") + bytes(4)
    assert mountd.decode_exports(content) == (
        Listed("/nfs/a", ("10.0.0.0/8", "host2")),
        Listed("/nfs/b", ()),
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        export("/a"),  # no end
        struct.pack(">I", 7),
        export("/" * 1025) + bytes(4),
        export("/a", "h" * 256) + bytes(4),
        export("/a", *["h"] * 1025) + bytes(4),
        export("/a") * 2049 + bytes(4),
    ],
)
def test_an_export_list_that_is_torn_or_too_long_is_refused(content: bytes) -> None:
    with pytest.raises(XdrError):
        mountd.decode_exports(content)


# --- both nodes

HERE = ExportFacts(
    "knfsd",
    (
        Export("/nfs/a", ("10.0.0.0/8",), Configured(("10.0.0.0/8: rw,sync",), "fsid=1"), None),
        Export("/nfs/b", (), Configured(("*: ro",), "fsid=2"), None),
    ),
)
A, B = HERE.exports


def told(there: ExportFacts, here: ExportFacts = HERE) -> list[tuple[str, str, str]]:
    return [(one.what, one.here, one.there) for one in exports.differences(here, there)]


def with_a(**changes: object) -> ExportFacts:
    return replace(HERE, exports=(replace(A, **changes), B))  # type: ignore[arg-type]


def test_equal_exports_do_not_differ() -> None:
    assert told(HERE) == []
    handles = with_a(root_handle="43ab", configured=Configured(("10.0.0.0/8: rw,sync",), None))
    assert told(handles, handles) == []  # the server itself told equal handles


def test_what_differs_is_said_with_both_sides() -> None:
    assert told(replace(HERE, exports=(A,))) == [("export /nfs/b", "exported", "missing")]
    assert told(with_a(clients=())) == [("clients of export /nfs/a", "10.0.0.0/8", "everybody")]
    fsid = Configured(("10.0.0.0/8: rw,sync",), "fsid=9")
    assert told(with_a(configured=fsid)) == [("fsid of export /nfs/a", "fsid=1", "fsid=9")]
    options = Configured(("10.0.0.0/8: ro,sync",), "fsid=1")
    assert told(with_a(configured=options)) == [
        ("options of export /nfs/a", "10.0.0.0/8: rw,sync", "10.0.0.0/8: ro,sync")
    ]
    assert told(with_a(configured=None)) == [("options of export /nfs/a", "read", "missing")]
    assert told(with_a(root_handle="02"), with_a(root_handle="01")) == [
        ("the root handle of export /nfs/a", "01", "02")
    ]
    assert told(replace(HERE, server="ganesha"))[0] == ("the NFS server", "knfsd", "ganesha")


def test_an_fsid_that_is_missing_on_both_is_no_equality() -> None:
    bare = with_a(configured=Configured(("10.0.0.0/8: rw,sync",), None))
    assert told(bare, bare) == [("fsid of export /nfs/a", "none", "none")]


def test_what_could_not_be_read_is_no_equality() -> None:
    gone = replace(HERE, exports=(), trouble="connection refused")
    assert told(gone) == [("the export list", "listed", "connection refused")]
    unread = replace(HERE, unread="etab: Permission denied")
    assert told(HERE, unread) == [("the options of exports", "etab: Permission denied", "read")]

"""What a node's NFS server exports, to whom and how, and whether clients find the same on both.

What clients may mount comes from mountd, which every server has and which cannot be out of date.
Options come from where the server keeps them: the kernel's in /var/lib/nfs/etab (/proc/fs/nfsd/
exports lists only what was used lately), ganesha's in its configuration. It changes no export.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from nfsha.nfs import ganesha_conf, knfsd, mountd
from nfsha.nfs.facts import Document, Fields, Objection
from nfsha.nfs.ganesha_conf import Block, GaneshaConfError
from nfsha.nfs.mountd import Listed
from nfsha.nfs.rpc import RpcConnection

ETAB: Final = Path("/var/lib/nfs/etab")
KERNEL, GANESHA, UNKNOWN = "knfsd", "ganesha", "unknown"
_ETAB_MAX_BYTES: Final = 4 << 20
_OPTIONS_MAX: Final = 1024

# ganesha-export-config(8): what an export has that does not say it
_GANESHA_DEFAULTS: Final = {
    "access_type": "none",
    "squash": "root_squash",
    "sectype": "none,sys",
    "anonymous_uid": "-2",
    "anonymous_gid": "-2",
    "privilegedport": "false",
    "manage_gids": "false",
    "transports": "udp,tcp",
}
_GANESHA_SQUASH: Final = {
    "root": "root_squash",
    "rootsquash": "root_squash",
    "rootid": "root_id_squash",
    "rootidsquash": "root_id_squash",
    "all": "all_squash",
    "allsquash": "all_squash",
    "all_anonymous": "all_squash",
    "allanonymous": "all_squash",
    "none": "no_root_squash",
    "noidsquash": "no_root_squash",
}


@dataclass(frozen=True, slots=True)
class Configured:
    """What a server's own files say of one export.

    `options` has one text for each client: its name and what holds for it. `fsid` is what the
    file handles begin with: the kernel's `fsid=` or `uuid=`, ganesha's `Export_Id`; None: the
    server makes one up from the disk.
    """

    options: tuple[str, ...]
    fsid: str | None


@dataclass(frozen=True, slots=True)
class Export:
    """One export as clients meet it. `configured` None: the server's files do not have it.

    `root_handle` is what clients hold of its root, in hexadecimal; None: the server told it not,
    and `no_handle` is why.
    """

    path: str
    clients: tuple[str, ...]
    configured: Configured | None
    root_handle: str | None
    no_handle: str = ""


@dataclass(frozen=True, slots=True)
class ExportFacts:
    """What one node exports. `trouble` says why there is no list; `unread`, why no options."""

    server: str
    exports: tuple[Export, ...]
    trouble: str = ""
    unread: str = ""


# --- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerFiles:
    """Where the servers keep what is read here; the defaults are those of Debian."""

    knfsd_threads: Path = knfsd.THREADS
    etab: Path = ETAB
    ganesha_conf: Path = ganesha_conf.GANESHA_CONF


async def read_exports(
    address: str, mountd_port: int, files: ServerFiles, *, timeout_ms: int, handles: bool
) -> ExportFacts:
    """Asks mountd at an address of this node, and reads the files. Raises nothing.

    Use an address that the exports allow as a client, else the server gives no handles. `handles`
    False: it is not asked for them. mountd logs that question twice for each export.
    """
    server, configured, unread = await asyncio.to_thread(_read_files, files)
    with contextlib.closing(RpcConnection(address, mountd_port)) as connection:
        listed = await mountd.export_list(connection, timeout_ms=timeout_ms)
        if isinstance(listed, str):
            return ExportFacts(server, (), listed, unread)
        found = [_export(one, configured) for one in listed]
        if handles:
            found = [await _with_handle(connection, one, timeout_ms) for one in found]
    return ExportFacts(server, tuple(found), "", unread)


def _export(listed: Listed, configured: Mapping[str, Configured]) -> Export:
    path = listed.path
    return Export(path, listed.clients, configured.get(path), None, "not asked for")


async def _with_handle(connection: RpcConnection, export: Export, timeout_ms: int) -> Export:
    handle, why = await mountd.root_handle(connection, export.path, timeout_ms=timeout_ms)
    return replace(export, root_handle=None if handle is None else handle.hex(), no_handle=why)


def _read_files(files: ServerFiles) -> tuple[str, dict[str, Configured], str]:
    """The kind of server, what its files say of each path, and why they could not be read."""
    if knfsd.serves(files.knfsd_threads):
        try:
            with files.etab.open("rb") as file:
                return KERNEL, parse_etab(file.read(_ETAB_MAX_BYTES)), ""
        except OSError as error:
            return KERNEL, {}, f"{files.etab}: {error.strerror}"
    if not files.ganesha_conf.exists():
        return UNKNOWN, {}, f"neither the kernel's server runs nor is {files.ganesha_conf} there"
    try:
        return GANESHA, ganesha_exports(ganesha_conf.read(files.ganesha_conf)), ""
    except GaneshaConfError as error:
        return GANESHA, {}, str(error)


def parse_etab(content: bytes) -> dict[str, Configured]:
    r"""Reads what exportfs(8) keeps: `path\tclient(option,option)`, octal escapes in the path."""
    options: dict[str, list[str]] = {}
    fsids: dict[str, str | None] = {}
    for line in content.decode("utf-8", "surrogateescape").splitlines():
        match = re.fullmatch(r"(\S+)\s+([^\s(]+)\(([^)]*)\)", line.strip())
        if match is None:
            continue
        path = _unescaped(match[1])
        said = match[3].split(",")
        rest = sorted(set(said) - {one for one in said if one.startswith(("fsid=", "uuid="))})
        options.setdefault(path, []).append(f"{match[2]}: {','.join(rest)}")
        fsid = next((one for one in said if one.startswith(("fsid=", "uuid="))), None)
        fsids[path] = fsid or fsids.get(path)
    return {path: Configured(tuple(sorted(options[path])), fsids[path]) for path in options}


def _unescaped(path: str) -> str:
    raw = re.sub(
        rb"\\([0-7]{3})",
        lambda octal: bytes([int(octal[1], 8) & 0xFF]),
        path.encode("utf-8", "surrogateescape"),
    )
    return raw.decode("utf-8", "surrogateescape")


def ganesha_exports(conf: Block) -> dict[str, Configured]:
    """Returns what ganesha's configuration exports over v3, by the path that clients mount."""
    core, defaults = Block(""), Block("")
    for block in conf.blocks:
        if block.name == "nfs_core_param":
            core = block
        elif block.name == "export_defaults":
            defaults = block
    name = "pseudo" if _flag(core.options.get("mount_path_pseudo")) else "path"
    found = {}
    for export in conf.all("export"):
        path = _joined(export.options.get(name) or export.options.get("path"))
        holds = _GANESHA_DEFAULTS | _said(defaults) | _said(export)
        lines = [f"everybody: {_shown(holds)}"]
        for client in export.all("client"):
            said = _shown(holds | _said(client))
            lines += [f"{one}: {said}" for one in client.options.get("clients", ())]
        number = _joined(export.options.get("export_id"))
        found[path] = Configured(tuple(sorted(lines)), f"Export_Id={number}" if number else None)
    return found


def _said(block: Block) -> dict[str, str]:
    """Those options of a block that decide what clients may do."""
    found = {}
    for key in _GANESHA_DEFAULTS:
        if key in block.options:
            value = ",".join(sorted(one.lower() for one in block.options[key]))
            found[key] = _GANESHA_SQUASH.get(value, value) if key == "squash" else value
    return found


def _shown(holds: Mapping[str, str]) -> str:
    return " ".join(f"{key}={holds[key]}" for key in sorted(holds))


def _flag(values: tuple[str, ...] | None) -> bool:
    return _joined(values).lower() in {"true", "yes"}


def _joined(values: tuple[str, ...] | None) -> str:
    return ",".join(values or ())


# --- judging -------------------------------------------------------------------------------------


def differences(here: ExportFacts, there: ExportFacts) -> tuple[Objection, ...]:
    """Says in what clients would not find on one node what they have on the other."""
    for facts, side in ((here, "here"), (there, "there")):
        if facts.trouble:
            remedy = f"start mountd {side}: without its list nobody knows what is exported"
            sides = [one.trouble or "listed" for one in (here, there)]
            return (Objection("the export list", sides[0], remedy, sides[1]),)
    if here.unread or there.unread:
        remedy = "make the server's files readable: they tell the options and fsid of each export"
        sides = [facts.unread or "read" for facts in (here, there)]
        return (Objection("the options of exports", sides[0], remedy, sides[1]),)
    found: list[Objection] = []
    if here.server != there.server:
        remedy = "run the same server on both: file handles of one mean nothing to the other"
        found.append(Objection("the NFS server", here.server, remedy, there.server))
    left = {one.path: one for one in here.exports}
    right = {one.path: one for one in there.exports}
    for path in sorted(left.keys() | right.keys()):
        mine, other = left.get(path), right.get(path)
        if mine is None or other is None:
            sides = ["missing" if one is None else "exported" for one in (mine, other)]
            found.append(Objection(f"export {path}", sides[0], "export it on both", sides[1]))
        else:
            found += _of_export(mine, other)
    return tuple(found)


def _of_export(here: Export, there: Export) -> Iterator[Objection]:
    if here.clients != there.clients:
        remedy = "allow the same clients on both nodes: others get access denied after the move"
        what = f"clients of export {here.path}"
        yield Objection(what, _clients(here), remedy, _clients(there))
    handles = (here.root_handle, there.root_handle)
    if handles[0] != handles[1] and None not in handles:
        remedy = (
            "give the export the same fsid= (ganesha: the same Export_Id, and filesystems made with"
            " the same UUID) on both nodes: each client would have to mount again"
        )
        what = f"the root handle of export {here.path}"
        yield Objection(what, str(handles[0]), remedy, str(handles[1]))
    yield from _of_files(here, there, proved=None not in handles)


def _of_files(here: Export, there: Export, *, proved: bool) -> Iterator[Objection]:
    """`proved`: the server itself told handles, so that a missing fsid says nothing more."""
    mine, other = here.configured, there.configured
    if mine is None or other is None:
        sides = ["missing" if one is None else "read" for one in (mine, other)]
        remedy = "name the export in the server's files on both nodes, and make them readable"
        yield Objection(f"options of export {here.path}", sides[0], remedy, sides[1])
        return
    if mine.fsid != other.fsid or (mine.fsid is None and not proved):
        remedy = f"export {here.path} with the same fsid= (ganesha: Export_Id) on both nodes"
        sides = [one.fsid or "none" for one in (mine, other)]
        yield Objection(f"fsid of export {here.path}", sides[0], remedy, sides[1])
    if mine.options != other.options:
        here_only, there_only = (
            "; ".join(sorted(set(one) - set(two))) or "nothing more"
            for one, two in ((mine.options, other.options), (other.options, mine.options))
        )
        remedy = "export it with the same options on both nodes"
        yield Objection(f"options of export {here.path}", here_only, remedy, there_only)


def _clients(export: Export) -> str:
    return ", ".join(export.clients) or "everybody"


# --- travelling ----------------------------------------------------------------------------------


def as_json(facts: ExportFacts) -> Document:
    """Returns the facts as JSON can carry them, to the other node or to a command."""
    return {
        "server": facts.server,
        "exports": [_export_as_json(one) for one in facts.exports],
        "trouble": facts.trouble,
        "unread": facts.unread,
    }


def from_json(document: object) -> ExportFacts:
    """Returns the facts that `as_json` made a document of; FactsError for anything else."""
    fields = Fields("facts of exports", document, "server", "exports", "trouble", "unread")
    return ExportFacts(
        server=fields.choice("server", KERNEL, GANESHA, UNKNOWN),
        exports=fields.each("exports", mountd.EXPORTS_MAX, _export_from_json),
        trouble=fields.text("trouble"),
        unread=fields.text("unread"),
    )


def _export_as_json(export: Export) -> Document:
    configured = export.configured
    return {
        "path": export.path,
        "clients": list(export.clients),
        "configured": (
            None
            if configured is None
            else {"options": list(configured.options), "fsid": configured.fsid}
        ),
        "root_handle": export.root_handle,
        "no_handle": export.no_handle,
    }


def _export_from_json(document: object) -> Export:
    fields = Fields(
        "an export", document, "path", "clients", "configured", "root_handle", "no_handle"
    )
    return Export(
        path=fields.text("path"),
        clients=fields.texts("clients", mountd.GROUPS_MAX),
        configured=fields.optional("configured", _configured_from_json),
        root_handle=fields.optional_text("root_handle"),
        no_handle=fields.text("no_handle"),
    )


def _configured_from_json(document: object) -> Configured:
    fields = Fields("options of an export", document, "options", "fsid")
    return Configured(fields.texts("options", _OPTIONS_MAX), fields.optional_text("fsid"))

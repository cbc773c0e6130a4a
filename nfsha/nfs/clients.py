"""Which clients a move would harm: those that use NFS v4, and those connected past the VIP.

It lists and judges; it disconnects nobody.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Final

from nfsha.nfs import ganesha_conf, knfsd
from nfsha.nfs.facts import Document, Fields, Objection
from nfsha.nfs.ganesha_conf import GaneshaConfError
from nfsha.nfs.v3_fence import FenceFacts, Version4

IPAddress = IPv4Address | IPv6Address
End = tuple[str, int]
"""One end of a connection: address and port."""

TCP_TABLES: Final = (Path("/proc/thread-self/net/tcp"), Path("/proc/thread-self/net/tcp6"))
_ESTABLISHED: Final = "01"  # include/net/tcp_states.h
_CONNECTIONS_MAX: Final = 1_000_000

_SHOWN_MAX: Final = 20
_CLIENTS_MAX: Final = 100_000
_INFO_MAX_BYTES: Final = 16_384  # a client's name alone may be 1024 bytes, quoted four times that


@dataclass(frozen=True, slots=True)
class V4Client:
    """One client that the kernel's server keeps v4 state for, in the kernel's words.

    `status` is `confirmed`, `unconfirmed`, or since Linux 5.19 `courtesy` or `expirable`: gone, but
    its state is kept. All of them would lose it.
    """

    address: str
    name: str
    status: str


@dataclass(frozen=True, slots=True)
class V4ClientFacts:
    """Who uses v4 on a node. `clients` are the first twenty of `count`.

    `listed` False: no server here has a list. It is not the kernel's, or that is older than Linux
    5.3: then only the refusal of v4 can tell. `recovering`: the server started lately, and waits
    for clients of its former life, which are not in the list before they come back. `trouble` says
    why a list that is there could not be read; `configured`, what would bring v4 back when the
    server starts next, or why that could not be read.
    """

    listed: bool
    count: int = 0
    clients: tuple[V4Client, ...] = ()
    recovering: bool = False
    trouble: str = ""
    configured: str = ""


@dataclass(frozen=True, slots=True)
class ServerFiles:
    """Where the servers keep what is read here; the defaults are those of Debian."""

    knfsd_threads: Path = knfsd.THREADS
    knfsd_clients: Path = Path("/proc/fs/nfsd/clients")
    knfsd_grace_ended: Path = Path("/proc/fs/nfsd/v4_end_grace")
    ganesha_conf: Path = ganesha_conf.GANESHA_CONF


def read_v4_clients(files: ServerFiles) -> V4ClientFacts:
    """Reads the list of the kernel's server where that serves, ganesha's configuration elsewhere.

    Raises nothing. It reads files of /proc and /etc only, but many where there are many clients.
    """
    if knfsd.serves(files.knfsd_threads):
        return _read_kernels(files)
    conf = files.ganesha_conf
    if not conf.exists():
        return V4ClientFacts(listed=False)
    try:
        speaks = ganesha_conf.speaks_v4(ganesha_conf.read(conf))
    except GaneshaConfError as error:
        return V4ClientFacts(listed=False, configured=str(error))
    found = f"{conf} does not say Protocols = 3" if speaks else ""
    return V4ClientFacts(listed=False, configured=found)


def _read_kernels(files: ServerFiles) -> V4ClientFacts:
    """First whether all are back, then who is there: one that comes between the two is seen."""
    try:
        # "Y" or "N" (fs/nfsd/nfsctl.c, write_v4_end_grace). Where there is a list, it is there.
        waits = files.knfsd_grace_ended.read_text(encoding="ascii").strip() != "Y"
    except FileNotFoundError:
        waits = False
    except OSError as error:
        trouble = f"{files.knfsd_grace_ended}: {error.strerror}"
        return V4ClientFacts(listed=True, trouble=trouble)
    return replace(_read_list(files.knfsd_clients), recovering=waits)


def _read_list(folder: Path) -> V4ClientFacts:
    """Only v4 clients are in it (nfsd(7); fs/nfsd/nfs4state.c, client_info_show)."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except FileNotFoundError:
        return V4ClientFacts(listed=False)
    except OSError as error:
        return V4ClientFacts(listed=True, trouble=f"{folder}: {error.strerror}")
    clients: list[V4Client] = []
    count = 0
    for name in names[:_CLIENTS_MAX]:
        try:
            with (folder / name / "info").open("rb") as file:
                info = file.read(_INFO_MAX_BYTES)
        except FileNotFoundError:
            continue  # it left meanwhile
        except OSError as error:
            trouble = f"{folder / name}: {error.strerror}"
            return V4ClientFacts(True, count, tuple(clients), trouble=trouble)
        count += 1
        if len(clients) < _SHOWN_MAX:
            clients.append(parse_info(info))
    return V4ClientFacts(True, count, tuple(clients))


def parse_info(info: bytes) -> V4Client:
    """Reads /proc/fs/nfsd/clients/N/info: lines of `key: value` (fs/nfsd/nfs4state.c)."""
    values: dict[str, str] = {}
    for line in info.decode(errors="replace").splitlines():
        key, colon, value = line.partition(": ")
        if colon:
            values.setdefault(key, re.sub(r'^"(.*)"$', r"\1", value.strip()))
    return V4Client(*(values.get(key, "unknown")[:256] for key in ("address", "name", "status")))


def v4_objections(facts: V4ClientFacts, fence: FenceFacts) -> tuple[Objection, ...]:
    """Says why clients must not be moved off this node (the one that serves now).

    `fence` is the same node's. An empty list of the kernel's server is enough, once those of its
    former life are back or can come no more; without a list the server must refuse v4, and go on to
    do so when it starts next.
    """
    if facts.listed:
        return _of_list(facts, fence)
    if fence.tcp.version4 is not Version4.REFUSED:
        remedy = "switch v4 off there: this server does not tell whether it has v4 clients"
        said = f"no list of them, and to version 4 the server said: {fence.tcp.said4}"
        return (Objection("NFS v4 clients", said, remedy),)
    if facts.configured:
        remedy = "say Protocols = 3 there, else v4 is back when the server starts next"
        return (Objection("NFS v4 in the configuration", facts.configured, remedy),)
    return ()


def _of_list(facts: V4ClientFacts, fence: FenceFacts) -> tuple[Objection, ...]:
    what = "NFS v4 clients of the kernel's server"
    if facts.trouble:
        remedy = "without the list nobody knows that there is none: make it readable for root"
        return (Objection(what, facts.trouble, remedy),)
    if facts.count == 0 and facts.recovering and fence.tcp.version4 is not Version4.REFUSED:
        said = "none in the list yet, but the server started lately, and waits for those of before"
        remedy = (
            "repeat when `cat /proc/fs/nfsd/v4_end_grace` says Y there (by default 90 s after the"
            " start at most), or switch v4 off"
        )
        return (Objection(what, said, remedy),)
    if facts.count == 0:
        return ()
    shown = [f"{one.address} ({one.name}, {one.status})" for one in facts.clients]
    more = facts.count - len(shown)
    found = ", ".join(shown) + (f" and {more} more" if more > 0 else "")
    remedy = (
        "let them unmount and mount again with vers=3; one that is gone for good stays in the list"
        " until `echo expire > /proc/fs/nfsd/clients/N/ctl`, or until the server starts anew"
    )
    return (Objection(what, found, remedy),)


# --- clients past the VIP ------------------------------------------------------------------------


@dataclass(frozen=True, order=True, slots=True)
class Stray:
    """A client that is connected to an address of this node which will not move."""

    client: str
    address: str
    port: int


def established(
    ports: Collection[int], tables: Sequence[Path] = TCP_TABLES
) -> tuple[tuple[End, End], ...]:
    """Returns the connections of this network namespace to these local ports: local, remote end.

    The kernel's own server has its there too. Some 5 ms for each thousand connections of any kind:
    for a thread. Raises OSError where /proc is not mounted.
    """
    found = []
    for table in tables:
        with table.open(encoding="ascii") as file:
            next(file, None)  # the heading
            for line in itertools.islice(file, _CONNECTIONS_MAX):
                _, local, remote, state, _ = line.split(maxsplit=4)
                if state == _ESTABLISHED and int(local.rpartition(":")[2], 16) in ports:
                    found.append((_end(local), _end(remote)))
    return tuple(found)


def _end(text: str) -> End:
    """Reads an address as words of 32 bits in the host's order, a colon, the port (proc(5))."""
    address, _, port = text.partition(":")
    words = (int(address[at : at + 8], 16) for at in range(0, len(address), 8))
    packed = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
    return str(ip_address(packed)), int(port, 16)


def strays(
    connections: Iterable[tuple[End, End]],
    *,
    vips: Collection[IPAddress],
    own: Collection[IPAddress],
    ports: Collection[int],
) -> tuple[Stray, ...]:
    """Returns who is connected to a service port at an address that is no VIP, each once, sorted.

    `connections` are established ones, local end first. `own` are the addresses of this node and
    the peer: the checks of both come from there. Over UDP nothing is connected: those clients are
    not seen. Raises ValueError for what is no address.
    """
    found: set[Stray] = set()
    vip_set, own_set = set(vips), set(own)
    for (local, port), (remote, _) in connections:
        at, client = plain_address(local), plain_address(remote)
        if port not in ports or at in vip_set:
            continue
        if client.is_loopback or client in own_set or client == at:
            continue
        found.add(Stray(str(client), str(at), port))
    return tuple(sorted(found))


def plain_address(text: str) -> IPAddress:
    """Returns an address without its zone, and the IPv4 one that an IPv4-mapped one stands for.

    A server that listens on `::` shows its IPv4 clients so (RFC 4291, 2.5.5.2). Raises ValueError.
    """
    found = ip_address(text.partition("%")[0])
    return (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found


def stray_objections(
    found: Collection[Stray], vips: Collection[IPAddress], count: int = 0
) -> tuple[Objection, ...]:
    """Says why clients must not be moved off this node: these would stay behind.

    `count`: how many there are, where that is more than those given.
    """
    if not found:
        return ()
    shown = [f"{one.client} at {one.address}:{one.port}" for one in sorted(found)[:_SHOWN_MAX]]
    more = max(len(found), count) - len(shown)
    named = " or ".join(str(vip) for vip in vips)
    return (
        Objection(
            "clients connected to an address that does not move",
            ", ".join(shown) + (f" and {more} more" if more > 0 else ""),
            f"let them unmount and mount again through {named}",
        ),
    )


# --- travelling ----------------------------------------------------------------------------------


def as_json(facts: V4ClientFacts) -> Document:
    """Returns the facts as JSON can carry them, to the other node or to a command."""
    return {
        "listed": facts.listed,
        "count": facts.count,
        "clients": [
            {"address": one.address, "name": one.name, "status": one.status}
            for one in facts.clients
        ],
        "recovering": facts.recovering,
        "trouble": facts.trouble,
        "configured": facts.configured,
    }


def from_json(document: object) -> V4ClientFacts:
    """Returns the facts that `as_json` made a document of; FactsError for anything else."""
    names = ("listed", "count", "clients", "recovering", "trouble", "configured")
    fields = Fields("facts of v4 clients", document, *names)
    return V4ClientFacts(
        listed=fields.flag("listed"),
        count=fields.number("count", _CLIENTS_MAX),
        clients=fields.each("clients", _SHOWN_MAX, _client_from_json),
        recovering=fields.flag("recovering"),
        trouble=fields.text("trouble"),
        configured=fields.text("configured"),
    )


def _client_from_json(document: object) -> V4Client:
    fields = Fields("a v4 client", document, "address", "name", "status")
    return V4Client(fields.text("address"), fields.text("name"), fields.text("status"))


def stray_as_json(stray: Stray) -> Document:
    """Returns one as JSON can carry it."""
    return {"client": stray.client, "address": stray.address, "port": stray.port}


def stray_from_json(document: object) -> Stray:
    """Returns what `stray_as_json` made a document of; FactsError for anything else."""
    fields = Fields("a client past the VIP", document, "client", "address", "port")
    return Stray(fields.text("client"), fields.text("address"), fields.number("port", 65_535))

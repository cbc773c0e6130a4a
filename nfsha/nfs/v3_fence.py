"""Proof that a server keeps clients on NFS v3: v3 answers, v4 is refused, rpcbind leads there.

A v4 server keeps state for each client that a move would lose. That v4 is off is believed on the
server's own refusal only: PROG_MISMATCH, with a range of versions that 4 is not in. Silence proves
nothing, nor does any other answer. It asks and judges; it switches nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from nfsha.nfs import portmap
from nfsha.nfs.facts import Document, Fields, Objection
from nfsha.nfs.portmap import RPCBIND_PROGRAM, Registered
from nfsha.nfs.rpc import (
    MOUNT_PROGRAM,
    NFS_PROGRAM,
    Answered,
    ProgramMismatch,
    Refused,
    RpcConnection,
    RpcResult,
    null_call_by_udp,
)

LOCK_PROGRAM: Final = 100021  # nlockmgr: Protocols for Interworking: XNFS, chapter 10
STATUS_PROGRAM: Final = 100024  # statd: the same, chapter 11

# The services of [firewall.ports], and the version of each that v3 clients use.
_SERVICES: Final = {
    "rpcbind": (RPCBIND_PROGRAM, 2),
    "nfs": (NFS_PROGRAM, 3),
    "mountd": (MOUNT_PROGRAM, 3),
    "statd": (STATUS_PROGRAM, 1),
    "lockd": (LOCK_PROGRAM, 4),
}
_REGISTERED_MAX: Final = 64
_ANSWERED: Final = str(Answered())


class Version4(enum.Enum):
    """What is known of NFS v4 on a server."""

    REFUSED = "refused"
    SPOKEN = "spoken"
    UNPROVED = "unproved"


def version4(result: RpcResult) -> Version4:
    """Judges the answer to a NULL call of NFS version 4."""
    match result:
        case Answered():
            return Version4.SPOKEN
        case ProgramMismatch(low, high) if not low <= 4 <= high:
            return Version4.REFUSED
        case _:
            return Version4.UNPROVED


@dataclass(frozen=True, slots=True)
class Answers:
    """What the server said over one transport. The texts are "answered", or say why not.

    `said4` are the words that the judgement about v4 rests on.
    """

    nfs3: str
    version4: Version4
    said4: str
    mountd3: str


@dataclass(frozen=True, slots=True)
class FenceFacts:
    """What one node's server proves, at one address of it.

    `udp` None: nobody listens there, which is the default of today's servers. `registered` are the
    entries of rpcbind for NFS's programs; None: there is no list, and `rpcbind` says why.
    """

    address: str
    tcp: Answers
    udp: Answers | None
    registered: tuple[Registered, ...] | None
    rpcbind: str


# --- asking --------------------------------------------------------------------------------------


async def prove(address: str, ports: Mapping[str, int], *, timeout_ms: int) -> FenceFacts:
    """Asks the server at an address of this node: loopback, its own, or the VIP while it is here.

    `ports` are those of [firewall.ports]. Takes at most four times the time limit.
    """
    tcp, udp, found = await asyncio.gather(
        _by_tcp(address, ports, timeout_ms),
        _by_udp(address, ports, timeout_ms),
        _registered(address, ports["rpcbind"], timeout_ms),
    )
    programs = {program for program, _ in _SERVICES.values()}
    if isinstance(found, str):
        return FenceFacts(address, tcp, udp, None, found)
    ours = tuple(entry for entry in found if entry.program in programs)
    return FenceFacts(address, tcp, udp, ours[:_REGISTERED_MAX], _ANSWERED)


async def not_fenced(address: str, port: int, *, refuses4: bool, timeout_ms: int) -> str:
    """Asks the server once more, just before clients are led to it; returns what is wrong, or "".

    `refuses4` False: the operator lets it speak v4. Takes at most twice the time limit.
    """
    with contextlib.closing(RpcConnection(address, port)) as nfs:
        nfs3 = await nfs.null_call(NFS_PROGRAM, 3, timeout_ms=timeout_ms)
        if not isinstance(nfs3, Answered):
            return f"NFS v3 at {address}: {nfs3}"
        if not refuses4:
            return ""
        nfs4 = await nfs.null_call(NFS_PROGRAM, 4, timeout_ms=timeout_ms)
    if version4(nfs4) is Version4.REFUSED:
        return ""
    return f"NFS v4 at {address} is not refused ({nfs4}): switch it off"


async def _by_tcp(address: str, ports: Mapping[str, int], timeout_ms: int) -> Answers:
    nfs, mountd = (RpcConnection(address, ports[name]) for name in ("nfs", "mountd"))
    with contextlib.closing(nfs), contextlib.closing(mountd):
        nfs3 = await nfs.null_call(NFS_PROGRAM, 3, timeout_ms=timeout_ms)
        nfs4 = await nfs.null_call(NFS_PROGRAM, 4, timeout_ms=timeout_ms)
        mountd3 = await mountd.null_call(MOUNT_PROGRAM, 3, timeout_ms=timeout_ms)
    return _answers(nfs3, nfs4, mountd3)


async def _by_udp(address: str, ports: Mapping[str, int], timeout_ms: int) -> Answers | None:
    async def ask(name: str, program: int, version: int) -> RpcResult:
        return await null_call_by_udp(address, ports[name], program, version, timeout_ms=timeout_ms)

    nfs3, nfs4 = await ask("nfs", NFS_PROGRAM, 3), await ask("nfs", NFS_PROGRAM, 4)
    if isinstance(nfs3, Refused) and isinstance(nfs4, Refused):
        return None
    return _answers(nfs3, nfs4, await ask("mountd", MOUNT_PROGRAM, 3))


def _answers(nfs3: RpcResult, nfs4: RpcResult, mountd3: RpcResult) -> Answers:
    return Answers(str(nfs3), version4(nfs4), str(nfs4), str(mountd3))


async def _registered(address: str, port: int, timeout_ms: int) -> tuple[Registered, ...] | str:
    with contextlib.closing(RpcConnection(address, port)) as rpcbind:
        return await portmap.registered(rpcbind, timeout_ms=timeout_ms)


# --- judging -------------------------------------------------------------------------------------


def objections(facts: FenceFacts, ports: Mapping[str, int]) -> tuple[Objection, ...]:
    """Says why clients must not be led to this node's server; `ports` as configured.

    That locks are not served (no lockd, no statd) is none: clients may mount with nolock.
    """
    found = [*_of_transport(facts.tcp, f"TCP at {facts.address}")]
    if facts.udp is not None:
        found += _of_transport(facts.udp, f"UDP at {facts.address}")
    if facts.registered is not None:
        found += _of_rpcbind(facts.registered, ports)
    return tuple(found)


def differences(here: FenceFacts, there: FenceFacts) -> tuple[Objection, ...]:
    """Says what clients use on one node and would miss on the other."""
    found = []
    if (here.udp is None) != (there.udp is None):
        sides = ["not served" if facts.udp is None else "served" for facts in (here, there)]
        remedy = "switch NFS over UDP on or off on both nodes, else its clients hang on one"
        found.append(Objection("NFS over UDP", sides[0], remedy, sides[1]))
    for name, (program, version) in _SERVICES.items():
        left, right = _where(here, program, version), _where(there, program, version)
        if left != right:
            remedy = f"start {name} on both nodes, on the same port and over the same transports"
            found.append(Objection(f"{name} in the list of rpcbind", left, remedy, right))
    return tuple(found)


def _of_transport(answers: Answers, where: str) -> Iterator[Objection]:
    if answers.nfs3 != _ANSWERED:
        yield Objection(f"NFS v3 over {where}", answers.nfs3, "start the NFS server there")
    if answers.version4 is Version4.SPOKEN:
        remedy = (
            "switch v4 off (vers4=n in /etc/nfs.conf.d, or Protocols = 3 in ganesha.conf) and start"
            " the NFS server anew: its clients would lose their state in the move"
        )
        yield Objection(f"NFS v4 over {where}", "it is spoken", remedy)
    elif answers.version4 is Version4.UNPROVED and answers.nfs3 == _ANSWERED:
        remedy = "see why the server does not refuse version 4 in so many words"
        yield Objection(f"the proof that NFS v4 is off, over {where}", answers.said4, remedy)
    if answers.mountd3 != _ANSWERED:
        remedy = "start mountd there, on the port of nfs.mountd_port"
        yield Objection(f"mountd v3 over {where}", answers.mountd3, remedy)


def _of_rpcbind(registered: Iterable[Registered], ports: Mapping[str, int]) -> Iterator[Objection]:
    entries = tuple(registered)
    names = {program: name for name, (program, _) in _SERVICES.items()}
    wrong = {
        (names[entry.program], entry.port)
        for entry in entries
        if entry.port != ports[names[entry.program]]
    }
    for name, port in sorted(wrong):
        remedy = (
            f"give it the port {ports[name]} on both nodes, or say firewall.ports.{name} ="
            f" {port}: another port is not closed while this node does not serve"
        )
        yield Objection(f"the port of {name} in the list of rpcbind", str(port), remedy)
    if any(entry.program == NFS_PROGRAM and entry.version >= 4 for entry in entries):
        remedy = "start the NFS server anew without v4, so that rpcbind forgets it"
        yield Objection("NFS v4", "it is in the list of rpcbind", remedy)


def _where(facts: FenceFacts, program: int, version: int) -> str:
    if facts.registered is None:
        return f"no list ({facts.rpcbind})"
    places = [
        f"{entry.transport} {entry.port}"
        for entry in facts.registered
        if (entry.program, entry.version) == (program, version)
    ]
    return " and ".join(places) or "missing"


# --- travelling ----------------------------------------------------------------------------------


def as_json(facts: FenceFacts) -> Document:
    """Returns the facts as JSON can carry them, to the other node or to a command."""
    entries = facts.registered
    return {
        "address": facts.address,
        "tcp": _answers_as_json(facts.tcp),
        "udp": None if facts.udp is None else _answers_as_json(facts.udp),
        "registered": None if entries is None else [portmap.as_json(entry) for entry in entries],
        "rpcbind": facts.rpcbind,
    }


def from_json(document: object) -> FenceFacts:
    """Returns the facts that `as_json` made a document of; FactsError for anything else."""
    what = "facts of NFS v3"
    fields = Fields(what, document, "address", "tcp", "udp", "registered", "rpcbind")
    missing = fields.optional("registered", lambda value: value) is None
    return FenceFacts(
        address=fields.text("address"),
        tcp=fields.given("tcp", _answers_from_json),
        udp=fields.optional("udp", _answers_from_json),
        registered=(
            None if missing else fields.each("registered", _REGISTERED_MAX, portmap.from_json)
        ),
        rpcbind=fields.text("rpcbind"),
    )


def _answers_as_json(answers: Answers) -> Document:
    return {
        "nfs3": answers.nfs3,
        "version4": answers.version4.value,
        "said4": answers.said4,
        "mountd3": answers.mountd3,
    }


def _answers_from_json(document: object) -> Answers:
    fields = Fields("answers of NFS v3", document, "nfs3", "version4", "said4", "mountd3")
    known = fields.choice("version4", *(kind.value for kind in Version4))
    return Answers(
        fields.text("nfs3"), Version4(known), fields.text("said4"), fields.text("mountd3")
    )

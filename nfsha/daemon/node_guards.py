"""Those guards of a planned move that rest on what both nodes told of themselves (`nfs_facts`).

Pure judgements, in words that say `here` and `there` as the reader of this node sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from nfsha.daemon.nfs_facts import SETTINGS, Heard, Told
from nfsha.nfs import clients, exports, file_handles, v3_fence
from nfsha.nfs.clients import IPAddress
from nfsha.nfs.facts import Objection
from nfsha.nfs.served import without_handles

CLOCKS_APART_MS = 2000
"""Two hosts that keep time differ by milliseconds. Files get their times from the server that
writes them, and the age of a copy is the difference of two readings, one of each host."""

SENTENCES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Guarded:
    """One guard: what must be so, whether it is, and what was found."""

    name: str
    ok: bool
    found: str


@dataclass(frozen=True, slots=True)
class Both:
    """What both nodes told. `receives`: this node is the receiver; `heard`, the other's facts.

    `ports` are those of [firewall.ports]. `hooks`: programs mount the volumes, on the node that
    serves only. `copies`: nfsha makes the copies. `serves`: the receiver serves already.
    """

    here: Told
    heard: Heard
    receives: bool
    vips: Sequence[IPAddress]
    ports: Mapping[str, int]
    hooks: bool
    copies: bool
    serves: bool = False

    @property
    def there(self) -> Told:
        """The other node."""
        return self.heard.told

    @property
    def receiver(self) -> Told:
        """The node that will serve."""
        return self.here if self.receives else self.there

    @property
    def giver(self) -> Told:
        """The node that serves now."""
        return self.there if self.receives else self.here

    @property
    def receiving(self) -> str:
        """Where the receiver is."""
        return "here" if self.receives else "there"

    @property
    def giving(self) -> str:
        """Where the giver is."""
        return "there" if self.receives else "here"


def judged(name: str, bad: Iterable[object], good: str) -> Guarded:
    """A guard that fails if anything is bad; the first `SENTENCES_SHOWN` of it are told."""
    words = [str(one) for one in bad]
    more = len(words) - SENTENCES_SHOWN
    shown = words[:SENTENCES_SHOWN] + ([f"and {more} more"] if more > 0 else [])
    return Guarded(name, not words, "; ".join(shown) or good)


def _version(both: Both) -> Guarded:
    here, there = both.here, both.there
    same = here.version == there.version
    remedy = "" if same else "; bring both to the same version (a restart of nfsha holds no client)"
    return Guarded("nfsha", same, f"{here.version} here, {there.version} there{remedy}")


def _key(both: Both) -> Guarded:
    here, there = both.here, both.there
    same = here.key == there.key
    remedy = (
        ""
        if same
        else "; the first key of the file seals: bring its rotation to an end on both nodes, and "
        "restart nfsha there"
    )
    return Guarded("key", same, f"{here.key} here, {there.key} there{remedy}")


def _clocks(both: Both) -> Guarded:
    apart_ms = _apart_ms(both)
    ok = abs(apart_ms) <= CLOCKS_APART_MS
    found = f"{abs(apart_ms)} ms apart at least" if apart_ms else "no difference seen"
    remedy = (
        "" if ok else f", allowed are {CLOCKS_APART_MS} ms; have both follow the same time servers"
    )
    return Guarded("clocks", ok, found + remedy)


def _apart_ms(both: Both) -> int:
    """How far the other wall clock is ahead (behind: negative) at least.

    It was read some time after this node asked and before the answer was here.
    """
    ahead_ns = both.heard.told.wall_ns - both.heard.wall_ns
    behind_ns = both.heard.told.wall_ns - both.heard.asked_wall_ns
    apart_ns = ahead_ns if ahead_ns > 0 else min(behind_ns, 0)
    return int(apart_ns / 1_000_000)


def _settings(both: Both) -> Guarded:
    here, there = both.here, both.there
    bad = [
        Objection(
            name, here.settings[name], "say the same in nfsha.toml on both", there.settings[name]
        )
        for name in SETTINGS
        if here.settings[name] != there.settings[name]
    ]
    return judged("configuration", bad, f"the same {', '.join(SETTINGS)}")


def _vip(both: Both) -> Guarded:
    """By netlink on both nodes, and by who answers on the wire."""
    name = "VIP on the node that serves only"
    if both.serves:  # it is where it belongs: nobody must be told to remove it
        return Guarded(name, ok=False, found=f"not looked at: {both.receiving} it serves already")
    bad: list[str] = []
    wanted = {str(vip) for vip in both.vips}
    giving, receiving = both.giving, both.receiving
    giver, receiver = both.giver, both.receiver
    for vip in sorted(wanted - set(giver.held)):
        bad.append(f"{vip} is not on the interface {giving}, on the node that serves")
    for vip in sorted(wanted & set(receiver.held)):
        bad.append(
            f"{vip} is on the interface {receiving}, on the node that waits: something else adds "
            "it there (keepalived, ifupdown)? Remove it"
        )
    for vip in sorted(wanted):
        who = (receiver.seen or {}).get(vip)
        if who is None:
            bad.append(f"nobody answers for {vip} on the wire, asked from {receiving}: cabling?")
        elif who != giver.link_address:
            bad.append(
                f"{who} answers for {vip} on the wire, and the node that serves is "
                f"{giver.link_address}: find that machine, and take the address from it"
            )
        if vip in (giver.seen or {}):
            bad.append(
                f"{(giver.seen or {})[vip]} answers for {vip} too, seen {giving}: find that "
                "machine, and take the address from it"
            )
    good = f"held {giving} and not {receiving}; on the wire {giver.link_address} alone answers"
    return judged(name, bad, good)


def _rsync(both: Both) -> Guarded:
    if not both.copies:
        return Guarded("rsync", ok=True, found="not used")
    here, there = both.here, both.there
    bad = [
        f"{where}: {one.rsync_refused}"
        for where, one in (("here", here), ("there", there))
        if one.rsync_refused
    ]
    return judged("rsync", bad, f"{here.rsync} here, {there.rsync} there")


def _passes(both: Both) -> Guarded:
    paused = both.receiver.paused
    words = f"paused {both.receiving}: `nfsha sync --resume` {both.receiving}"
    return Guarded("passes", not paused, words if paused else f"not paused {both.receiving}")


def _hindrances(both: Both) -> Guarded:
    here, there = both.here, both.there
    bad = [
        f"{words} ({where})"
        for where, one in (("here", here), ("there", there))
        for words in one.hindrances
    ]
    if bad:
        bad.append("see `nfsha volumes`")
    age_s = (both.giver.wall_ns - both.receiver.copied_ns) / 1e9
    last = (
        f"the last whole copy is {age_s:.0f} s old" if both.receiver.copied_ns else "none whole yet"
    )
    return judged("copies", bad, f"{last}, nothing holds them up")


def _v3_only(both: Both) -> Guarded:
    found = v3_fence.objections(both.receiver.served.fence, both.ports)
    bad = [f"{both.receiving}: {one}" for one in found]
    good = f"v3 answers {both.receiving}, and v4 is refused: {both.receiver.served.fence.tcp.said4}"
    return judged("NFS v3 only on the receiver", bad, good)


def _ports(both: Both) -> Guarded:
    here, there = both.here, both.there
    bad = v3_fence.differences(here.served.fence, there.served.fence)
    return judged("ports and transports", bad, "the same on both nodes, by their rpcbind")


def _v4_clients(both: Both) -> Guarded:
    found = clients.v4_objections(both.giver.served.v4, both.giver.served.fence)
    bad = [f"{both.giving}: {one}" for one in found]
    good = (
        "none in the list of the kernel's server"
        if both.giver.served.v4.listed
        else f"none can be: {both.giver.served.fence.tcp.said4}"
    )
    return judged("NFS v4 clients", bad, good)


def _strays(both: Both) -> Guarded:
    facts = both.giver.served
    if facts.unlisted:
        remedy = "without the list nobody knows whom the move would leave behind"
        found: tuple[Objection, ...] = (Objection("client connections", facts.unlisted, remedy),)
    else:
        found = clients.stray_objections(facts.strays, both.vips, facts.stray_count)
    bad = [f"{both.giving}: {one}" for one in found]
    return judged("clients past the VIP", bad, f"none {both.giving}")


def _exports(both: Both) -> Guarded:
    here, there = (one.served.exports for one in (both.here, both.there))
    if both.hooks:
        here, there = without_handles(here), without_handles(there)
    count = len(here.exports)
    return judged("exports", exports.differences(here, there), f"{count}, the same on both nodes")


def _handles(both: Both) -> Guarded:
    if not both.copies:
        return Guarded("file handles", ok=True, found="not nfsha's copies: equal ones are wanted")
    here, there = (
        {one.volume: one for one in told.served.handles} for told in (both.here, both.there)
    )
    bad = [
        objection
        for name in sorted(here.keys() & there.keys())
        for objection in file_handles.clone_objections(here[name], there[name])
    ]
    return judged("file handles", bad, "no volume was cloned block by block")


GUARDS: Mapping[str, Callable[[Both], Guarded]] = {
    "VIP on the node that serves only": _vip,
    "nfsha": _version,
    "key": _key,
    "clocks": _clocks,
    "configuration": _settings,
    "NFS v3 only on the receiver": _v3_only,
    "ports and transports": _ports,
    "NFS v4 clients": _v4_clients,
    "clients past the VIP": _strays,
    "exports": _exports,
    "file handles": _handles,
    "rsync": _rsync,
    "passes": _passes,
    "copies": _hindrances,
}

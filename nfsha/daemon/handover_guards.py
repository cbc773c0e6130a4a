"""The guards of a planned move: what must be so on both nodes before it may begin.

Pure judgements of what both nodes know of themselves. Each guard says what was found on either
side and, where it fails, what to do about it. All of them are always judged, never only the first
that fails. Nothing here decides a move: the core looks at its own conditions when it is asked.

What is looked at here, and hardly ever seen, because another mechanism comes first:
- a VIP on the receiver, or missing on the giver: each node removes it, or puts it back, within half
  a second. The guard sees who does so again and again, and other machines;
- a receiver's stamp of a higher epoch: where its authority is the other node, that one ceases to
  serve at once (`lease.recorded_epoch`: its own journal is a restored one), and nobody serves until
  an operator decides. Where it is the receiver itself, the guard sees it;
- a giver that is not sound: it gives the service away, or releases it (rows A32, A50);
- a daemon that is stopping: it answers for a second at most, or as long as an unmount hook runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from nfsha.core import lease
from nfsha.core.model import Epoch, Phase, Role
from nfsha.core.state import State
from nfsha.daemon import node_guards
from nfsha.daemon.nfs_facts import Heard, Told
from nfsha.daemon.node_guards import Both, Guarded, judged
from nfsha.nfs.clients import IPAddress
from nfsha.nfs.file_handles import HandleFacts
from nfsha.replica.files.own_names import IDENTITY_NAME
from nfsha.replica.volume.facts import VolumeFacts, is_of_another_history
from nfsha.replica.volume.inventory import Pair

SIZE_TOLERANCE = 100
"""One part in so many: equal disks formatted by other programs (as in `volume_facts`)."""


@dataclass(frozen=True, slots=True)
class Copies:
    """What this node knows of the volumes of both; `told`: the other one has told its own."""

    pairs: Sequence[Pair]
    told: bool


@dataclass(frozen=True, slots=True)
class View:
    """All that the guards look at, at one moment. `copies` None: somebody else replicates.

    `ports` are those of [firewall.ports]. `hooks`: programs mount the volumes, on the node that
    serves only.
    """

    state: State
    now_ms: int
    to: Role
    vips: Sequence[IPAddress]
    ports: Mapping[str, int]
    hooks: bool
    own: Told | None
    heard: Heard | None
    refused: str
    copies: Copies | None

    def side(self, role: Role) -> Told | None:
        """The facts of the node of this role."""
        if role is self.state.me:
            return self.own
        return self.heard.told if self.heard is not None else None

    def where(self, role: Role) -> str:
        """The node of this role, as seen by who reads it here."""
        return "here" if role is self.state.me else "there"


def guards(view: View) -> Iterator[Guarded]:
    """All guards, in the order in which an operator would look."""
    yield from _peer(view.state, view.now_ms)
    yield from _phases(view.state, view.to)
    yield from _journals(view.state)
    yield from _soundness(view.state)
    yield from _volumes(view)
    stale = _stale(view)
    yield Guarded("facts of the other node", not stale, stale or _told_ago(view))
    both = None if stale else _both(view)
    for name, judge in node_guards.GUARDS.items():
        if both is None:
            yield Guarded(name, ok=False, found="not known without the facts of both nodes")
        else:
            yield judge(both)


def _both(view: View) -> Both | None:
    if view.own is None or view.heard is None:
        return None
    return Both(
        serves=_phase_of(view.state, view.to) is Phase.ACTIVE,
        here=view.own,
        heard=view.heard,
        receives=view.to is view.state.me,
        vips=view.vips,
        ports=view.ports,
        hooks=view.hooks,
        copies=view.copies is not None,
    )


# --- by the heartbeats and the journals ----------------------------------------------------------


def _peer(state: State, now_ms: int) -> Iterator[Guarded]:
    heard = lease.peer_heard(state, now_ms)
    age = f"{now_ms - state.heard_ms} ms ago" if state.report is not None else "never"
    remedy = "" if heard else "; start nfsha there, and look at the links in `nfsha status`"
    yield Guarded("other node heard", heard, f"heard {age}{remedy}")


def _phase_of(state: State, role: Role) -> Phase | None:
    if role is state.me:
        return state.phase
    return state.report.phase if state.report is not None else None


def _phases(state: State, to: Role) -> Iterator[Guarded]:
    phases = {role: _phase_of(state, role) for role in (state.me, state.me.other)}
    words = ", ".join(f"{role} is {phase or 'unheard'}" for role, phase in phases.items())
    ready = phases[to.other] is Phase.ACTIVE and phases[to] in (Phase.PASSIVE, Phase.RETURNED)
    if phases[to] is Phase.ACTIVE:
        words += ": it serves there already"
    elif not ready:
        words += f"; `nfsha status` on both says what they wait for: the {to} must be PASSIVE or "
        words += f"RETURNED, and the {to.other} ACTIVE"
    yield Guarded("one serves, the other waits", ready, words)
    under_way = state.handover or state.asks or (state.report and state.report.handover)
    yield Guarded(
        "no other move",
        not under_way,
        "one is under way: `nfsha status` shows it, `nfsha abort` ends it"
        if under_way
        else "none is under way",
    )


def _journals(state: State) -> Iterator[Guarded]:
    trouble = state.persist_error or (state.journal_corrupt if state.epoch is None else "")
    remedy = "; mend the disk of /var/lib/nfsha, and see `nfsha status`"
    yield Guarded("journal", not trouble, trouble + remedy if trouble else "sound")
    theirs = state.report.epoch if state.report is not None else None
    same = theirs == state.epoch and state.epoch is not None
    remedy = "" if same else "; `nfsha status` on both says what they wait for"
    yield Guarded("epochs", same, f"here {state.epoch}, there {theirs}{remedy}")
    promised = state.durable.promise or state.durable.peer_promise
    yield Guarded(
        "no promise",
        not promised,
        "a promise not to take over is not ended yet: repeat in a moment, or end the maintenance"
        if promised
        else "none",
    )


def _soundness(state: State) -> Iterator[Guarded]:
    report = state.report
    theirs = report is not None and report.healthy
    sound = state.fit is True and theirs
    here = "sound" if state.fit else state.fitness_reason
    there = "sound" if theirs else "not sound (see `nfsha status` there)"
    yield Guarded("services and storage", sound, f"here {here}, there {there}")
    yield Guarded(
        "time for it",
        not state.stopping and state.refuses is None,
        "the daemon is stopping, or the last move is still being ended: repeat in a moment"
        if state.stopping or state.refuses is not None
        else "nothing else is being done",
    )


# --- the volumes ---------------------------------------------------------------------------------


def _volumes(view: View) -> Iterator[Guarded]:
    copies, epoch = view.copies, view.state.epoch
    if copies is None:
        yield Guarded(
            "volumes", ok=True, found="somebody else replicates: nfsha knows nothing of their data"
        )
        return
    bad = [] if copies.told else ["the other node has not told its volumes: repeat in a moment"]
    for pair in copies.pairs:
        bad += pair.obstacles()
        bad += _of_receiver(view, pair, epoch)
    if not copies.pairs:
        bad.append("there is none: mount one below nfs.root on both nodes")
    bad += _unmounted(view, copies.pairs)
    count = len(copies.pairs)
    yield judged("volumes", bad, f"{count} volumes, the same on both nodes")


def _of_receiver(view: View, pair: Pair, epoch: Epoch | None) -> Iterator[str]:
    """What the receiver's filesystem must be, beside a copy of the giver's."""
    here = view.to is view.state.me
    receiver, giver = (pair.here, pair.there) if here else (pair.there, pair.here)
    if receiver is None or giver is None:
        return  # an obstacle already
    where = view.where(view.to)
    if receiver.refused:
        yield f"volume {pair.name} {where}: {receiver.refused}"
    if receiver.name != giver.name:
        yield (
            f"volume {pair.name}: mounted as {receiver.name} {where}, as {giver.name} on the other "
            "node: mount it at the same place on both"
        )
    yield from _smaller(pair.name, where, receiver, giver)
    if epoch is not None and is_of_another_history(receiver.stamp, epoch):
        yield (
            f"volume {pair.name} {where}: bears the stamp {receiver.stamp}, newer than {epoch} or "
            "of another history: see `nfsha volumes`, and docs/replication.md about stamps"
        )


def _smaller(name: str, where: str, receiver: VolumeFacts, giver: VolumeFacts) -> Iterator[str]:
    for what, mine, other in (
        ("bytes", receiver.size_bytes, giver.size_bytes),
        ("inodes", receiver.inodes, giver.inodes),
    ):
        if mine and mine < other - other // SIZE_TOLERANCE:
            yield (
                f"volume {name} {where}: {mine} {what}, on the other node {other}: make it as large"
            )


def _unmounted(view: View, pairs: Iterable[Pair]) -> Iterator[str]:
    """By the newest look of each node, which the lists of volumes may lag behind."""
    for role in Role:
        told = view.side(role)
        if told is None:
            continue
        handles = {one.volume: one for one in told.served.handles}
        for pair in pairs:
            facts = pair.here if role is view.state.me else pair.there
            if facts is None or facts.identity is None or facts.failing:
                continue
            found = handles.get(facts.name)
            if found is None:
                yield (
                    f"volume {pair.name} {view.where(role)}: not mounted any more at {facts.path}"
                )
            elif not found.trouble and not _has_identity(found):
                yield (
                    f"volume {pair.name} {view.where(role)}: {facts.path}/{IDENTITY_NAME} is gone: "
                    "put it back, or `nfsha volumes pair` if this is the right filesystem"
                )


def _has_identity(found: HandleFacts) -> bool:
    return any(one.name == IDENTITY_NAME for one in found.handles)


# --- are the facts of both nodes good for a judgement? --------------------------------------------


def _stale(view: View) -> str:
    """Why the facts of both nodes cannot be gone by; "" when they can."""
    if view.own is None:
        return "this node has not looked at itself yet: repeat in a moment"
    heard = view.heard
    if heard is not None and heard.answer:
        return ""
    remedy = (
        "; `nfsha status` shows the links (a path that loses large packets lets heartbeats through,"
        " but not these facts), and both nodes must run the same nfsha"
    )
    if view.refused:
        return f"refused: {view.refused}{remedy}"
    if heard is None:
        return f"it never told any{remedy}"
    age_s = (view.now_ms - heard.at_ms) / 1000
    return f"it does not answer; what it told last is {age_s:.0f} s old{remedy}"


def _told_ago(view: View) -> str:
    age_ms = view.now_ms - view.heard.at_ms if view.heard is not None else 0
    return f"looked up for this question, told {age_ms} ms ago"

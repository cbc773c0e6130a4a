"""All transitions, in one table. Nothing else assigns a phase.

A row matches when its phase, its event and its guard match; a guard is named by the phase's
classifier in `guards`, which names exactly one, so at most one row matches and their order
means nothing. Ids are sparse, stable and never reused: they stand in the log, in the events and in
the runbook. A row whose target is its own phase says why the node stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nfsha.core import effects
from nfsha.core.guards import Guard
from nfsha.core.model import CommandKind, Phase
from nfsha.core.orders import Orders
from nfsha.core.state import State

Effect = Callable[[State, Orders, int], None]

TURN = "turn"
"""The event of a row that is looked at in every turn of the engine."""

HOOK = "hook"
"""The event of a row that tells of the end of a mount or unmount hook."""

C = CommandKind
P = Phase
G = Guard
E = effects

ALL = tuple(Phase)


@dataclass(frozen=True, slots=True)
class Row:
    """One transition. `to` None means that the phase stays; `refuses` marks a refused command."""

    id: str
    phases: tuple[Phase, ...]
    event: str
    guard: Guard
    effect: Effect
    to: Phase | None
    why: str
    refuses: bool = False


def _turn(row: str, phase: Phase, guard: Guard, effect: Effect, to: Phase | None, why: str) -> Row:
    return Row(row, (phase,), TURN, guard, effect, to, why)


def _stay(row: str, phase: Phase, guard: Guard, why: str) -> Row:
    return Row(row, (phase,), TURN, guard, effects.nothing, None, why)


def _accept(
    row: str,
    phases: tuple[Phase, ...],
    command: CommandKind,
    effect: Effect,
    to: Phase | None,
    why: str,
    guard: Guard = Guard.ALLOWED,
) -> Row:
    return Row(row, phases, command, guard, effect, to, why)


def _refuse(
    row: str, command: CommandKind, guard: Guard, why: str, phases: tuple[Phase, ...] = ALL
) -> Row:
    return Row(row, phases, command, guard, effects.nothing, None, why, refuses=True)


def _disown(row: str, phase: Phase) -> Row:
    return _turn(row, phase, G.DISOWNED, E.disown, None,
                 "the peer gave its authority away to a handover that nobody here works on: "
                 "it is recorded that it will never be")  # fmt: skip


_STARTING = (
    _turn("S10", P.STARTING, G.NOT_ADOPTED, E.release, P.WAITING,
          "nothing of a former run can be adopted: what was left is removed"),
    _turn("S12", P.STARTING, G.IN_MAINTENANCE, E.release, P.MAINTENANCE,
          "the journal says maintenance"),
    _turn("S14", P.STARTING, G.PREPARED, E.release, P.PREPARED,
          "the journal says that the authority was given away: only the receiver's word, or a "
          "takeover, ends that"),
    _turn("S20", P.STARTING, G.EVIDENCE, E.adopt, P.ACTIVE,
          "the address of the former run still stands and this session has evidence of its own"),
    _turn("S22", P.STARTING, G.EVIDENCE_MAINTENANCE, E.adopt, P.MAINTENANCE,
          "the address still stands, this session has evidence, the journal says maintenance"),
    _turn("S30", P.STARTING, G.ADDRESS_GONE, E.release, P.WAITING,
          "the lease of the former run ended before this session had evidence"),
    _turn("S40", P.STARTING, G.CONFLICT, E.isolate, P.DIVERGED,
          "the peer has another epoch of the same number: two histories"),
    _turn("S42", P.STARTING, G.HIGHER, E.follow, P.RETURNED,
          "a higher epoch exists, and this node is not a whole replica of it"),
    _stay("S90", P.STARTING, G.NO_EVIDENCE,
          "keeps the address of the former run and renews nothing until the peer is heard"),
)  # fmt: skip

_WAITING = (
    _turn("W10", P.WAITING, G.BOTH_BLANK, E.first_epoch, None,
          "a new pair: both journals are missing and no volume bears a stamp; epoch 1 is ordered"),
    _turn("W20", P.WAITING, G.EVIDENCE, E.serve, P.ACTIVE,
          "the authority of the highest epoch known, and the peer grants it"),
    _turn("W22", P.WAITING, G.STANDING, E.serve, P.ACTIVE,
          "the authority, the peer cannot take over, and nobody answers for the VIP"),
    _turn("W24", P.WAITING, G.START_ALONE, E.activate, P.TAKEOVER,
          "start_alone_after has passed without a word from the peer"),
    _turn("W26", P.WAITING, G.MOUNT, E.mount, None,
          "may serve: the mount hook is run first"),
    _turn("W30", P.WAITING, G.PEER_IS_AUTHORITY, E.enter_passive, P.PASSIVE,
          "the peer is heard, and is the authority"),
    _turn("W40", P.WAITING, G.CONFLICT, E.isolate, P.DIVERGED,
          "the peer has another epoch of the same number: two histories"),
    _turn("W42", P.WAITING, G.HIGHER, E.follow, P.RETURNED,
          "a higher epoch exists, and this node is not a whole replica of it"),
    _turn("W50", P.WAITING, G.UNFIT, E.nothing, P.FAULT,
          "the authority, but its own service or storage is broken"),
    _disown("W70", P.WAITING),
    _stay("W86", P.WAITING, G.THAWING, "may serve; the volumes are still frozen"),
    _stay("W90", P.WAITING, G.PEER_UNHEARD,
          "waits for the peer: a node that boots never serves alone "
          "(`nfsha activate` if the peer is gone for good)"),
    _stay("W91", P.WAITING, G.NO_EVIDENCE,
          "the authority, but the peer grants nothing yet"),
    _stay("W92", P.WAITING, G.FIT_UNKNOWN,
          "waits for the first answer of the own NFS service"),
    _stay("W93", P.WAITING, G.VIP_ANSWERED,
          "may serve, but another machine still answers for the VIP"),
    _stay("W94", P.WAITING, G.VIP_UNKNOWN,
          "may serve, and asks whether anybody answers for the VIP"),
    _stay("W95", P.WAITING, G.ORDERED, "the new epoch is on its way to the disk"),
    _stay("W96", P.WAITING, G.AWAITS_FIRST_EPOCH,
          "a new pair: waits for the primary to begin epoch 1"),
    _stay("W97", P.WAITING, G.JOURNAL_LOST,
          "a journal is missing or corrupt on a node that is not new: the operator must say whose "
          "data is the truth (`nfsha activate` there)"),
    _stay("W87", P.WAITING, G.MOUNTING,
          "may serve, but not before the mount hook has mounted the volumes"),
    _stay("W89", P.WAITING, G.COOLING,
          "a lease in the kernel was lost a moment ago: tries again within a second"),
    _stay("W88", P.WAITING, G.VOLUMES_UNSEEN,
          "the peer is the authority; waits for the first look at the own volumes"),
    _stay("W98", P.WAITING, G.STOPPING, "the daemon is stopping"),
)  # fmt: skip

_PASSIVE = (
    _turn("P10", P.PASSIVE, G.MAY_TAKE, E.begin_takeover, P.TAKEOVER,
          "every grant ran out, this node is whole and sound, and nobody answers for the VIP"),
    _turn("P40", P.PASSIVE, G.CONFLICT, E.isolate, P.DIVERGED,
          "the peer has another epoch of the same number: two histories"),
    _turn("P42", P.PASSIVE, G.HIGHER, E.follow, P.RETURNED,
          "a higher epoch exists: this node is not a whole replica of it yet"),
    _turn("P44", P.PASSIVE, G.RESYNC, E.nothing, P.RETURNED,
          "this node is not a whole replica any more"),
    _turn("P50", P.PASSIVE, G.UNFIT, E.nothing, P.FAULT,
          "the own service or storage is broken: this node could not take over"),
    _disown("P70", P.PASSIVE),
    _turn("P60", P.PASSIVE, G.ASKED, E.begin_receiving, P.PRESYNC,
          "the giver asks for a handover to this node"),
    _stay("P90", P.PASSIVE, G.PEER_SERVES, "the peer serves"),
    _stay("P91", P.PASSIVE, G.PEER_IDLE,
          "the peer is heard but does not serve; it has 2 s to return before this node takes over"),
    _stay("P92", P.PASSIVE, G.PEER_SILENT,
          "the peer is silent; what this node granted it has not run out yet"),
    _stay("P93", P.PASSIVE, G.OBSTACLE,
          "the peer is gone, but this node must not take over"),
    _stay("P94", P.PASSIVE, G.VIP_ANSWERED,
          "the peer is silent, but its kernel still answers for the VIP"),
    _stay("P95", P.PASSIVE, G.VIP_UNKNOWN,
          "the peer is silent; asks whether anybody answers for the VIP "
          "(and whether this interface hears anybody at all)"),
    _stay("P98", P.PASSIVE, G.STOPPING, "the daemon is stopping"),
)  # fmt: skip

_TAKEOVER = (
    _turn("T10", P.TAKEOVER, G.EXCLUSIVE, E.commit, None,
          "proved that the other node cannot serve: the new epoch is ordered, no way back"),
    _turn("T12", P.TAKEOVER, G.MOUNT, E.mount, None,
          "proved that the other node cannot serve: the mount hook is run before the new epoch"),
    _turn("T20", P.TAKEOVER, G.EVIDENCE, E.serve, P.ACTIVE,
          "the new epoch is on the disk: takes the address and serves"),
    _turn("T30", P.TAKEOVER, G.PEER_SERVES, E.give_up_takeover, P.PASSIVE,
          "the peer was heard in time: it serves"),
    _turn("T32", P.TAKEOVER, G.CONDITIONS_LOST, E.give_up_takeover, P.PASSIVE,
          "a condition of the takeover does not hold any more: starts anew"),
    _turn("T34", P.TAKEOVER, G.GATHERED_TOO_LONG, E.give_up_takeover, P.PASSIVE,
          "no proof within a minute: starts anew, so that the peer hears an echo again"),
    _turn("T35", P.TAKEOVER, G.OPERATOR_FAILED, E.give_up_takeover, P.WAITING,
          "what the operator asked for cannot be: the peer serves, somebody else holds the VIP, or "
          "the mount hook fails"),
    _turn("T36", P.TAKEOVER, G.STOPPING, E.give_up_takeover, P.WAITING,
          "the daemon is stopping: nothing was ordered yet"),
    _turn("T38", P.TAKEOVER, G.STILL_PREPARED, E.give_up_takeover, P.PREPARED,
          "the takeover is given up; that the authority was given away still stands"),
    _turn("T40", P.TAKEOVER, G.CONFLICT, E.isolate, P.DIVERGED,
          "the peer has another epoch of the same number: two histories"),
    _turn("T42", P.TAKEOVER, G.HIGHER, E.follow, P.RETURNED,
          "a higher epoch exists, and this node is not a whole replica of it"),
    _turn("T50", P.TAKEOVER, G.UNFIT, E.give_up_takeover, P.FAULT,
          "the own service or storage broke during the takeover"),
    _turn("T60", P.TAKEOVER, G.TURN_GAP, E.isolate, P.ISOLATED,
          "this node stood still after its new epoch reached the disk"),
    _turn("T62", P.TAKEOVER, G.NO_EVIDENCE, E.isolate, P.ISOLATED,
          "the new epoch is on the disk, but the evidence to serve it ran out"),
    _stay("T90", P.TAKEOVER, G.GATHERING, "gathers the proof that the other node cannot serve"),
    _stay("T93", P.TAKEOVER, G.MOUNTING,
          "may serve, but not before the mount hook has mounted the volumes"),
    _stay("T91", P.TAKEOVER, G.PERSISTING, "the new epoch is on its way to the disk"),
    _stay("T92", P.TAKEOVER, G.RECORDING, "the new epoch is on the disk; waits for its evidence"),
)  # fmt: skip

_ACTIVE = (
    _turn("A20", P.ACTIVE, G.REPAIR, E.repair, None,
          "somebody else took away what this node serves with: it is put back"),
    _turn("A30", P.ACTIVE, G.RECEIVER_READY, E.begin_freeze, P.FREEZING,
          "the receiver is near enough: clients are held from now on"),
    _turn("A32", P.ACTIVE, G.RESCUE, E.rescue, None,
          "the own service is broken, the volumes are not: the other node is asked to fetch the "
          "last writes before it takes over"),
    _turn("A34", P.ACTIVE, G.RESCUE_OFF, E.end_rescue, None,
          "the own service is sound again: it stays here"),
    _turn("A40", P.ACTIVE, G.CONFLICT, E.isolate, P.DIVERGED,
          "the peer has another epoch of the same number: two histories, both release"),
    _turn("A42", P.ACTIVE, G.HIGHER, E.follow, P.RETURNED,
          "a higher epoch exists: this node releases at once"),
    _turn("A50", P.ACTIVE, G.UNFIT, E.isolate, P.FAULT,
          "the own service or storage is broken: the peer may take over"),
    _turn("A60", P.ACTIVE, G.EVIDENCE_LOST, E.isolate, P.ISOLATED,
          "nothing proves any more that the peer may not take over"),
    _turn("A62", P.ACTIVE, G.TURN_GAP, E.isolate, P.ISOLATED,
          "this node stood still for longer than its lease"),
    _turn("A64", P.ACTIVE, G.LEASE_LOST, E.isolate, P.ISOLATED,
          "a lease in the kernel ended or could not be had"),
    _stay("A90", P.ACTIVE, G.EVIDENCE, "serves"),
    _stay("A92", P.ACTIVE, G.RESCUING,
          "the own service is broken; the other node fetches the last writes"),
    _stay("A98", P.ACTIVE, G.STOPPING, "serves on while its absence is announced to the peer"),
)  # fmt: skip

_RETURNED = (
    _turn("R10", P.RETURNED, G.RECORDED, E.enter_passive, P.PASSIVE,
          "the peer's epoch is recorded, and this node is a whole replica of it"),
    _turn("R20", P.RETURNED, G.HIGHER_UNRECORDED, E.record_epoch, None,
          "the peer's epoch is ordered into the journal"),
    _turn("R40", P.RETURNED, G.CONFLICT, E.isolate, P.DIVERGED,
          "the peer has another epoch of the same number: two histories"),
    _turn("R60", P.RETURNED, G.ASKED, E.begin_receiving, P.PRESYNC,
          "the giver asks for a handover to this node"),
    _disown("R70", P.RETURNED),
    _stay("R90", P.RETURNED, G.ORDERED, "the peer's epoch is on its way to the disk"),
    _stay("R91", P.RETURNED, G.RESYNC, "not a whole replica yet: waits for a complete resync"),
    _stay("R92", P.RETURNED, G.JOURNAL_LOST,
          "the peer says that this node was the authority, but its own journal does not know: "
          "its disk was replaced or restored, and it never serves by that"),
    _stay("R93", P.RETURNED, G.PEER_UNHEARD, "waits to hear the peer"),
    _stay("R98", P.RETURNED, G.STOPPING, "the daemon is stopping"),
)  # fmt: skip

_ISOLATED = (
    _turn("I20", P.ISOLATED, G.EVIDENCE, E.serve, P.ACTIVE,
          "the peer grants again, and knows no higher epoch"),
    _turn("I22", P.ISOLATED, G.STANDING, E.serve, P.ACTIVE,
          "the peer cannot take over, and nobody answers for the VIP"),
    _turn("I26", P.ISOLATED, G.MOUNT, E.mount, None,
          "may serve again: the mount hook is run first"),
    _turn("I40", P.ISOLATED, G.CONFLICT, E.isolate, P.DIVERGED,
          "the peer has another epoch of the same number: two histories"),
    _turn("I42", P.ISOLATED, G.HIGHER, E.follow, P.RETURNED,
          "a higher epoch exists: the peer took over meanwhile"),
    _turn("I50", P.ISOLATED, G.UNFIT, E.nothing, P.FAULT, "the own service or storage is broken"),
    _disown("I70", P.ISOLATED),
    _stay("I91", P.ISOLATED, G.THAWING, "may serve; the volumes are still frozen"),
    _stay("I90", P.ISOLATED, G.NO_EVIDENCE,
          "the authority without evidence: waits for an echo of the peer "
          "(`nfsha confirm-peer-down` if it is known to be off)"),
    _stay("I92", P.ISOLATED, G.FIT_UNKNOWN, "waits for an answer of the own NFS service"),
    _stay("I93", P.ISOLATED, G.VIP_ANSWERED,
          "may serve, but another machine answers for the VIP"),
    _stay("I94", P.ISOLATED, G.VIP_UNKNOWN,
          "may serve, and asks whether anybody answers for the VIP"),
    _stay("I97", P.ISOLATED, G.MOUNTING,
          "may serve again, but not before the mount hook has mounted the volumes"),
    _stay("I96", P.ISOLATED, G.COOLING,
          "a lease in the kernel was lost a moment ago: tries again within a second"),
    _stay("I95", P.ISOLATED, G.ORDERED, "what was decided is on its way to the disk"),
    _stay("I98", P.ISOLATED, G.STOPPING, "the daemon is stopping"),
)  # fmt: skip

_DIVERGED = (
    _turn("D10", P.DIVERGED, G.HIGHER, E.follow, P.RETURNED,
          "the operator kept the other node's history"),
    _stay("D90", P.DIVERGED, G.CONFLICT,
          "two histories of one epoch number: the operator decides "
          "(`nfsha resolve --keep` on the node to be kept)"),
    _stay("D98", P.DIVERGED, G.STOPPING, "the daemon is stopping"),
)  # fmt: skip

_MAINTENANCE = (
    _turn("M20", P.MAINTENANCE, G.REPAIR, E.repair, None,
          "somebody else took away what this node serves with: it is put back"),
    _turn("M24", P.MAINTENANCE, G.HIGHER_UNRECORDED, E.record_epoch, None,
          "the peer's epoch is ordered into the journal"),
    _turn("M40", P.MAINTENANCE, G.CONFLICT, E.isolate, P.DIVERGED,
          "the peer has another epoch of the same number: two histories"),
    _turn("M42", P.MAINTENANCE, G.HIGHER, E.follow, P.RETURNED,
          "a higher epoch exists: this node releases at once"),
    _turn("M60", P.MAINTENANCE, G.EVIDENCE_LOST, E.isolate, P.ISOLATED,
          "nothing proves any more that the peer may not take over"),
    _turn("M62", P.MAINTENANCE, G.TURN_GAP, E.isolate, P.ISOLATED,
          "this node stood still for longer than its lease"),
    _turn("M64", P.MAINTENANCE, G.LEASE_LOST, E.isolate, P.ISOLATED,
          "a lease in the kernel ended or could not be had"),
    _disown("M70", P.MAINTENANCE),
    _stay("M90", P.MAINTENANCE, G.EVIDENCE, "serves, and starts nothing by itself"),
    _stay("M91", P.MAINTENANCE, G.IN_MAINTENANCE,
          "starts nothing by itself (`nfsha maintenance off` ends it)"),
    _stay("M98", P.MAINTENANCE, G.STOPPING, "the daemon is stopping"),
)  # fmt: skip

_FAULT = (
    _turn("F10", P.FAULT, G.FIT_AUTHORITY, E.nothing, P.ISOLATED,
          "sound again; the authority needs evidence to serve"),
    _turn("F12", P.FAULT, G.FIT_REPLICA, E.enter_passive, P.PASSIVE, "sound again"),
    _turn("F14", P.FAULT, G.FIT_UNHEARD, E.nothing, P.WAITING, "sound again; the peer is unheard"),
    _turn("F40", P.FAULT, G.CONFLICT, E.isolate, P.DIVERGED,
          "the peer has another epoch of the same number: two histories"),
    _turn("F42", P.FAULT, G.HIGHER, E.follow, P.RETURNED,
          "a higher epoch exists: the peer took over meanwhile"),
    _disown("F70", P.FAULT),
    _stay("F90", P.FAULT, G.UNFIT, "the own service or storage is broken"),
    _stay("F98", P.FAULT, G.STOPPING, "the daemon is stopping"),
)  # fmt: skip

_FREEZING = (
    _turn("G10", P.FREEZING, G.FROZEN, E.prepare, P.PREPARED,
          "nothing writes any more: the address goes, and the authority is given away"),
    _turn("G30", P.FREEZING, G.HANDOVER_OFF, E.end_freeze, P.ISOLATED,
          "the handover ends before anything was given away: this node serves on at once"),
    _turn("G40", P.FREEZING, G.CONFLICT, E.isolate, P.DIVERGED,
          "the peer has another epoch of the same number: two histories"),
    _turn("G42", P.FREEZING, G.HIGHER, E.follow, P.RETURNED,
          "a higher epoch exists: this node releases at once"),
    _turn("G60", P.FREEZING, G.EVIDENCE_LOST, E.end_freeze, P.ISOLATED,
          "nothing proves any more that the peer may not take over"),
    _turn("G62", P.FREEZING, G.TURN_GAP, E.end_freeze, P.ISOLATED,
          "this node stood still for longer than its lease"),
    _turn("G64", P.FREEZING, G.LEASE_LOST, E.end_freeze, P.ISOLATED,
          "a lease in the kernel ended or could not be had"),
    _stay("G90", P.FREEZING, G.FREEZING, "waits until nothing writes any more"),
)  # fmt: skip

_PREPARED = (
    _turn("Q10", P.PREPARED, G.HANDED_OVER, E.follow, P.RETURNED,
          "the receiver has the authority: this node holds the same data"),
    _turn("Q20", P.PREPARED, G.ABORTED, E.take_back, P.ISOLATED,
          "the receiver's journal says that it will never take what was given to it"),
    _turn("Q30", P.PREPARED, G.MAY_TAKE, E.begin_takeover, P.TAKEOVER,
          "the receiver is gone: a takeover with an epoch above the one given away"),
    _turn("Q40", P.PREPARED, G.CONFLICT, E.isolate, P.DIVERGED,
          "the peer has another epoch of the same number: two histories"),
    _turn("Q42", P.PREPARED, G.HIGHER, E.follow, P.RETURNED,
          "a higher epoch than the one given away exists"),
    _stay("Q90", P.PREPARED, G.RECEIVER_WORKS,
          "gave its authority away; waits for the receiver's word"),
    _stay("Q91", P.PREPARED, G.PERSISTING, "that the authority is given away goes to the disk"),
    _stay("Q92", P.PREPARED, G.PEER_SILENT,
          "the receiver is silent; what this node granted it has not run out yet"),
    _stay("Q93", P.PREPARED, G.OBSTACLE, "the receiver is gone, but this node must not take over"),
    _stay("Q94", P.PREPARED, G.VIP_ANSWERED,
          "the receiver is silent, but its kernel answers for the VIP"),
    _stay("Q95", P.PREPARED, G.VIP_UNKNOWN,
          "the receiver is silent; asks whether anybody answers for the VIP"),
    _stay("Q96", P.PREPARED, G.PEER_IDLE,
          "the receiver is heard, but works on it no more and does not say how it ended; it has "
          "2 s for that before this node takes over"),
    _stay("Q98", P.PREPARED, G.STOPPING, "the daemon is stopping"),
)  # fmt: skip

_PRESYNC = (
    _turn("Y10", P.PRESYNC, G.GIVER_PREPARED, E.finish_receiving, P.FINAL_SYNC,
          "the giver is prepared: last pass and proof"),
    _turn("Y30", P.PRESYNC, G.HANDOVER_OFF, E.abort_receiving, P.PASSIVE,
          "the handover ends here; the giver serves on"),
    _turn("Y40", P.PRESYNC, G.CONFLICT, E.isolate, P.DIVERGED,
          "the peer has another epoch of the same number: two histories"),
    _turn("Y42", P.PRESYNC, G.HIGHER, E.follow, P.RETURNED,
          "a higher epoch exists, and this node is not a whole replica of it"),
    _stay("Y90", P.PRESYNC, G.APPROACHING, "comes near to the giver's data, which still serves"),
    _stay("Y91", P.PRESYNC, G.GIVER_ASKED, "near enough: asks the giver to hold its clients"),
)  # fmt: skip

_FINAL_SYNC = (
    _turn("Z10", P.FINAL_SYNC, G.PROVED, E.restore, P.RESTORING,
          "both copies are proved equal"),
    _turn("Z30", P.FINAL_SYNC, G.HANDOVER_OFF, E.abort_receiving, P.PASSIVE,
          "the handover ends here; the giver takes its authority back"),
    _turn("Z40", P.FINAL_SYNC, G.CONFLICT, E.isolate, P.DIVERGED,
          "the peer has another epoch of the same number: two histories"),
    _turn("Z42", P.FINAL_SYNC, G.HIGHER, E.follow, P.RETURNED,
          "a higher epoch exists, and this node is not a whole replica of it"),
    _stay("Z90", P.FINAL_SYNC, G.PROVING, "last pass and proof; clients are held"),
)  # fmt: skip

_RESTORING = (
    _turn("X10", P.RESTORING, G.EXCLUSIVE, E.commit_handover, None,
          "the giver is bound and nothing is received: the new epoch is ordered, no way back"),
    _turn("X12", P.RESTORING, G.MOUNT, E.mount, None,
          "the giver is bound and nothing is received: the mount hook is run before the new epoch"),
    _turn("X20", P.RESTORING, G.EVIDENCE, E.serve, P.ACTIVE,
          "the new epoch is on the disk: takes the address and serves"),
    _turn("X30", P.RESTORING, G.HANDOVER_OFF, E.abort_receiving, P.PASSIVE,
          "the handover ends here; the giver takes its authority back"),
    _turn("X32", P.RESTORING, G.PERSIST_FAILED, E.abort_receiving, P.PASSIVE,
          "the new epoch cannot be written: its end is written instead, before it is shown"),
    _turn("X40", P.RESTORING, G.CONFLICT, E.isolate, P.DIVERGED,
          "the peer has another epoch of the same number: two histories"),
    _turn("X42", P.RESTORING, G.HIGHER, E.follow, P.RETURNED,
          "a higher epoch exists, and this node is not a whole replica of it"),
    _turn("X60", P.RESTORING, G.TURN_GAP, E.isolate, P.ISOLATED,
          "this node stood still after its new epoch reached the disk"),
    _turn("X62", P.RESTORING, G.NO_EVIDENCE, E.isolate, P.ISOLATED,
          "the new epoch is on the disk, but the giver's grant ran out"),
    _stay("X90", P.RESTORING, G.RECEIVERS_END, "waits until no process receives any more"),
    _stay("X94", P.RESTORING, G.MOUNTING,
          "may serve, but not before the mount hook has mounted the volumes"),
    _stay("X91", P.RESTORING, G.GIVER_UNBOUND, "waits for a young grant of the giver"),
    _stay("X92", P.RESTORING, G.PERSISTING, "the new epoch is on its way to the disk"),
    _stay("X93", P.RESTORING, G.RECORDING, "the new epoch is on the disk; waits for its evidence"),
)  # fmt: skip

_HOOKS = tuple(
    Row(row, ALL, HOOK, guard, E.nothing, None, why)
    for row, guard, why in (
        ("H10", G.MOUNTED, "the mount hook has mounted the volumes"),
        ("H20", G.UNMOUNTED, "the unmount hook has given the volumes up"),
        ("H50", G.MOUNT_FAILED,
         "the mount hook failed: without the volumes this node does not serve; it tries again as "
         "long as it may"),
        ("H52", G.UNMOUNT_FAILED,
         "the unmount hook failed: the other node may not get the volumes before it is done; it is "
         "tried again"),
    )
)  # fmt: skip

_RESTS = (P.WAITING, P.PASSIVE, P.RETURNED, P.ISOLATED, P.FAULT)
_SERVING = (P.ACTIVE, P.MAINTENANCE)
_NOT_SERVING = tuple(phase for phase in ALL if phase is not P.ACTIVE)
_RECEIVING = (P.PRESYNC, P.FINAL_SYNC, P.RESTORING)
_GIVING = (P.FREEZING, P.PREPARED)

_COMMANDS = (
    _accept("C10", (*_RESTS, P.TAKEOVER, P.MAINTENANCE, P.PREPARED), C.ACTIVATE, E.activate,
            P.TAKEOVER, "the operator says that this node shall serve"),
    _refuse("C11", C.ACTIVATE, G.SERVES, "this node serves already", (*_SERVING, P.FREEZING)),
    _refuse("C12", C.ACTIVATE, G.REPEATED, "this node is taking over already", (P.TAKEOVER,)),
    _refuse("C13", C.ACTIVATE, G.DIVERGED,
            "there are two histories: choose one with `nfsha resolve --keep`", (P.DIVERGED,)),
    _refuse("C14", C.ACTIVATE, G.PEER_SERVES, "the peer is heard and serves, or is taking over"),
    _refuse("C15", C.ACTIVATE, G.UNFIT,
            "the own NFS service or storage is not sound: mend it first (see `nfsha status`)"),
    _refuse("C16", C.ACTIVATE, G.PROMISED,
            "this node promised the peer not to take over, and the peer is not heard: it may serve "
            "on that promise. Make sure that it is off, then repeat with --force"),
    _refuse("C18", C.ACTIVATE, G.NOT_WHOLE,
            "this node is not a whole replica: writes that the other node acknowledged are missing "
            "here (see `nfsha volumes`). If that one is gone for good, repeat with --force"),
    _refuse("C17", C.ACTIVATE, G.SETTLING, "the daemon is still starting: repeat in a moment",
            (P.STARTING,)),
    _refuse("C19", C.ACTIVATE, G.HANDOVER,
            "a handover to this node is under way: watch it, or end it with `nfsha abort`",
            _RECEIVING),
    _accept("C20", (*_RESTS, P.ACTIVE), C.MAINTENANCE_ON, E.enter_maintenance, P.MAINTENANCE,
            "the operator wants no decision of this node's own"),
    _refuse("C21", C.MAINTENANCE_ON, G.REPEATED, "in maintenance already", (P.MAINTENANCE,)),
    _refuse("C22", C.MAINTENANCE_ON, G.SETTLING, "a decision is under way: repeat in a moment",
            (P.STARTING, P.TAKEOVER)),
    _refuse("C23", C.MAINTENANCE_ON, G.DIVERGED,
            "there are two histories: choose one with `nfsha resolve --keep`", (P.DIVERGED,)),
    _refuse("C24", C.MAINTENANCE_ON, G.NO_PEER_PROMISE,
            "this node serves, and the peer has not promised to stay passive: run "
            "`nfsha maintenance on` on the peer first", (P.ACTIVE,)),
    _refuse("C25", C.MAINTENANCE_ON, G.HANDOVER,
            "a handover is under way: watch it, or end it with `nfsha abort`",
            (*_RECEIVING, *_GIVING)),
    _accept("C30", (P.MAINTENANCE,), C.MAINTENANCE_OFF, E.leave_maintenance, P.WAITING,
            "the operator ends the maintenance"),
    _accept("C32", (P.MAINTENANCE,), C.MAINTENANCE_OFF, E.leave_maintenance, P.ACTIVE,
            "the operator ends the maintenance; this node serves on", G.SERVES),
    _refuse("C31", C.MAINTENANCE_OFF, G.NOT_IN_MAINTENANCE, "this node is not in maintenance"),
    _accept("C40", ALL, C.CONFIRM_PEER_DOWN, E.confirm_peer_down, None,
            "the operator says that the peer is off: that holds until it is heard again"),
    _refuse("C41", C.CONFIRM_PEER_DOWN, G.PEER_HEARD,
            "the peer is not off: it is heard at this moment"),
    _accept("C50", (P.DIVERGED,), C.RESOLVE, E.resolve, P.ISOLATED,
            "the operator keeps this node's history: a new epoch is ordered above both"),
    _refuse("C51", C.RESOLVE, G.NOT_KEPT_HERE,
            "run this on the node whose history is to be kept", (P.DIVERGED,)),
    _refuse("C52", C.RESOLVE, G.NOT_DIVERGED, "there is nothing to resolve: one history only"),
    _accept("C60", _NOT_SERVING, C.STOP, E.begin_stop, None, "a final stop was asked for"),
    _accept("C62", _SERVING, C.STOP, E.stop_serving, P.WAITING,
            "a final stop was asked for: this node releases, and the peer may take over",
            G.SERVES),
    _accept("C70", _NOT_SERVING, C.RESTART, E.begin_restart, None,
            "a planned restart was asked for"),
    _accept("C72", _SERVING, C.RESTART, E.restart_serving, None,
            "a planned restart was asked for: the absence is announced", G.SERVES),
    _refuse("C77", C.ABORT, G.TOO_LATE,
            "the new epoch is ordered into the journal: there is no way back (move the service "
            "home again when it is done)", (P.RESTORING,)),
    _refuse("C78", C.ABORT, G.NOT_POSSIBLE, "no handover is under way"),
    _refuse("C80", C.STOP, G.REPEATED, "the daemon is stopping already"),
    _refuse("C81", C.RESTART, G.REPEATED, "the daemon is stopping already"),
    _accept("C82", (P.PASSIVE, P.RETURNED), C.HANDOVER, E.begin_receiving, P.PRESYNC,
            "the operator moves the service to this node"),
    _accept("C83", (P.ACTIVE,), C.HANDOVER, E.ask_peer, None,
            "the operator moves the service to the other node, which is asked to begin", G.SERVES),
    _refuse("C84", C.HANDOVER, G.HANDOVER,
            "a handover is under way: watch it, or end it with `nfsha abort`",
            (P.ACTIVE, *_RECEIVING, *_GIVING)),
    _refuse("C85", C.HANDOVER, G.THERE_ALREADY, "that node serves already",
            (P.ACTIVE, P.PASSIVE, P.RETURNED)),
    _refuse("C86", C.HANDOVER, G.NOT_POSSIBLE,
            "a handover needs one node that serves and one that waits, both sound and heard, "
            "without a promise that is not ended yet (see `nfsha status`)"),
    _accept("C87", _RECEIVING, C.ABORT, E.abort_here, None, "the operator ends the handover"),
    _accept("C88", (P.ACTIVE, *_GIVING), C.ABORT, E.abort_giving, None,
            "the operator ends the handover: the receiver is told", G.GIVES),
    *(
        _refuse(f"C9{digit}", command, G.STOPPING, "the daemon is stopping")
        for digit, command in enumerate(
            (
                C.ACTIVATE, C.MAINTENANCE_ON, C.MAINTENANCE_OFF, C.CONFIRM_PEER_DOWN, C.RESOLVE,
                C.HANDOVER, C.ABORT,
            )
        )
    ),
)  # fmt: skip

ROWS: tuple[Row, ...] = (
    *_STARTING, *_WAITING, *_PASSIVE, *_TAKEOVER, *_ACTIVE, *_RETURNED, *_ISOLATED,
    *_DIVERGED, *_MAINTENANCE, *_FAULT, *_PRESYNC, *_FINAL_SYNC, *_RESTORING, *_FREEZING,
    *_PREPARED, *_HOOKS, *_COMMANDS,
)  # fmt: skip
"""The table."""


def _index(rows: tuple[Row, ...]) -> dict[tuple[Phase, str, Guard], Row]:
    index: dict[tuple[Phase, str, Guard], Row] = {}
    for row in rows:
        for phase in row.phases:
            key = (phase, str(row.event), row.guard)
            if key in index:
                raise ValueError(f"rows {index[key].id} and {row.id} match the same cell {key}")
            index[key] = row
    return index


INDEX = _index(ROWS)
"""Every row by its cell: phase, event, guard."""

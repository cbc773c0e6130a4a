"""Named guards: for each phase and event, one function says which single guard holds now.

Each classifier returns exactly one `Guard`, so that at most one row of the table can match, and the
order of the table carries no meaning. Guards read one frozen state and a time; they change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from nfsha.core import handover, lease, volumes
from nfsha.core.model import GIVING_PHASES, RECEIVING_PHASES, Command, CommandKind, Phase, Role
from nfsha.core.state import State


class Guard(StrEnum):
    """Everything that a row can rest on."""

    # what the peer's, or the broker's, epoch says
    CONFLICT = "conflicting-epoch"
    HIGHER = "higher-epoch"
    HIGHER_UNRECORDED = "higher-epoch-unrecorded"
    # own condition
    UNFIT = "unfit"
    FIT_UNKNOWN = "fitness-unknown"
    FIT_AUTHORITY = "fit-authority"
    FIT_REPLICA = "fit-replica"
    FIT_UNHEARD = "fit-unheard"
    STOPPING = "stopping"
    TURN_GAP = "turn-gap"
    LEASE_LOST = "lease-lost"
    EVIDENCE_LOST = "evidence-lost"
    EVIDENCE = "evidence"
    EVIDENCE_MAINTENANCE = "evidence-in-maintenance"
    STANDING = "standing-evidence"
    NO_EVIDENCE = "no-evidence"
    NOT_ADOPTED = "nothing-to-adopt"
    IN_MAINTENANCE = "journal-in-maintenance"
    ADDRESS_GONE = "address-gone"
    REPAIR = "repair-needed"
    COOLING = "lease-just-lost"
    # boot
    BOTH_BLANK = "both-blank"
    ORDERED = "epoch-ordered"
    AWAITS_FIRST_EPOCH = "awaits-first-epoch"
    START_ALONE = "start-alone"
    JOURNAL_LOST = "journal-lost"
    PEER_UNHEARD = "peer-unheard"
    PEER_IS_AUTHORITY = "peer-is-authority"
    VIP_ANSWERED = "vip-answered"
    VIP_UNKNOWN = "vip-not-surveyed"
    # takeover
    PEER_SERVES = "peer-serves"
    PEER_IDLE = "peer-idle"
    PEER_SILENT = "peer-silent"
    OBSTACLE = "obstacle"
    MAY_TAKE = "may-take"
    CONDITIONS_LOST = "conditions-lost"
    GATHERING = "gathering"
    GATHERED_TOO_LONG = "gathered-too-long"
    OPERATOR_FAILED = "operator-failed"
    EXCLUSIVE = "exclusive"
    PERSISTING = "persisting"
    RECORDING = "recording"
    # volumes that hooks mount
    MOUNT = "volumes-not-mounted"
    MOUNTING = "mounting"
    MOUNTED = "mounted"
    UNMOUNTED = "unmounted"
    MOUNT_FAILED = "mount-failed"
    UNMOUNT_FAILED = "unmount-failed"
    # replica
    RECORDED = "peer-epoch-recorded"
    RESYNC = "resync-needed"
    VOLUMES_UNSEEN = "volumes-unseen"
    # handover
    THAWING = "still-frozen"
    ASKED = "handover-asked"
    DISOWNED = "handover-disowned"
    RECEIVER_READY = "receiver-ready"
    RESCUE = "rescue"
    RESCUING = "rescuing"
    RESCUE_OFF = "rescue-off"
    HANDOVER_OFF = "handover-off"
    FREEZING = "freezing"
    FROZEN = "frozen"
    PREPARED = "prepared"
    STILL_PREPARED = "still-prepared"
    HANDED_OVER = "handed-over"
    ABORTED = "handover-aborted"
    RECEIVER_WORKS = "receiver-works"
    APPROACHING = "approaching"
    GIVER_ASKED = "giver-asked"
    GIVER_PREPARED = "giver-prepared"
    PROVING = "proving"
    PROVED = "proved"
    GIVER_UNBOUND = "giver-unbound"
    RECEIVERS_END = "receivers-end"
    PERSIST_FAILED = "persist-failed"
    # commands
    HANDOVER = "handover-under-way"
    THERE_ALREADY = "there-already"
    NOT_POSSIBLE = "not-possible"
    GIVES = "gives"
    TOO_LATE = "too-late"
    ALLOWED = "allowed"
    SERVES = "serves"
    PEER_HEARD = "peer-heard"
    PROMISED = "promised"
    NOT_WHOLE = "not-whole"
    NO_PEER_PROMISE = "no-peer-promise"
    NOT_KEPT_HERE = "not-kept-here"
    NOT_DIVERGED = "not-diverged"
    NOT_IN_MAINTENANCE = "not-in-maintenance"
    DIVERGED = "diverged"
    SETTLING = "settling"
    REPEATED = "repeated"


GATHER_LIMIT_MS = 60_000
"""The longest TAKEOVER without a proof: longer than a fence agent's own limit. Then PASSIVE again,
so that the peer hears an echo."""

LEASE_RETRY_MS = 1000
"""How long a node whose lease in the kernel could not be had waits before it tries again."""

COMMIT_EVIDENCE_HOLDS = 1
"""How many `hold` a committed taker waits for its first evidence before it is ISOLATED."""


# --------------------------------------------------------------------------- a turn, by phase


def starting(state: State, now_ms: int) -> Guard:
    """STARTING is left at once, but for an adopted address that waits for evidence."""
    if state.prepared is not None:
        return Guard.PREPARED
    if not state.adopted:
        return Guard.IN_MAINTENANCE if state.durable.maintenance else Guard.NOT_ADOPTED
    epoch = _epoch_guard(state)
    if epoch is not None:
        return epoch
    if not state.address_held:
        return Guard.ADDRESS_GONE
    if now_ms < lease.return_deadline_ms(state, now_ms) or lease.standing_evidence(state):
        return Guard.EVIDENCE_MAINTENANCE if state.durable.maintenance else Guard.EVIDENCE
    return Guard.NO_EVIDENCE


def waiting(state: State, now_ms: int) -> Guard:
    """WAITING: the boot rule."""
    if state.stopping:
        return Guard.STOPPING
    epoch = _epoch_guard(state)
    if epoch is not None:
        return epoch
    if state.want.epoch != state.durable.epoch:
        return Guard.ORDERED
    if handover.disowned(state, now_ms) is not None:
        return Guard.DISOWNED
    if state.epoch is None:
        return _waiting_without_epoch(state, now_ms)
    if state.is_authority:
        return _waiting_authority(state, now_ms)
    if not lease.peer_heard(state, now_ms):
        return Guard.PEER_UNHEARD
    return Guard.PEER_IS_AUTHORITY if state.volumes_seen else Guard.VOLUMES_UNSEEN


def _waiting_without_epoch(state: State, now_ms: int) -> Guard:
    if not lease.peer_heard(state, now_ms) or state.report is None:
        return Guard.PEER_UNHEARD
    if not state.blank or not state.report.blank:
        return Guard.JOURNAL_LOST
    return Guard.BOTH_BLANK if state.me is Role.PRIMARY else Guard.AWAITS_FIRST_EPOCH


def _waiting_authority(state: State, now_ms: int) -> Guard:
    returning = _returning(state, now_ms)
    if returning is not Guard.NO_EVIDENCE:
        return returning
    alone_ms = state.config.start_alone_after_ms
    if (
        alone_ms is not None
        and state.peer_session == 0
        and now_ms - state.started_ms >= alone_ms
        and state.fit is True
    ):
        return Guard.START_ALONE
    return Guard.PEER_UNHEARD if not lease.peer_heard(state, now_ms) else Guard.NO_EVIDENCE


def _returning(state: State, now_ms: int) -> Guard:
    """May an authority that does not serve begin to (WAITING, ISOLATED)?"""
    if state.fit is False:
        return Guard.UNFIT
    if state.fit is None:
        return Guard.FIT_UNKNOWN
    if state.froze:
        return Guard.THAWING
    if now_ms - state.lease_lost_ms < LEASE_RETRY_MS:
        return Guard.COOLING
    if now_ms < lease.return_deadline_ms(state, now_ms) and not lease.peer_serves(state, now_ms):
        return _mounts_first(state, now_ms) or Guard.EVIDENCE
    if not lease.standing_evidence(state):
        return Guard.NO_EVIDENCE
    if lease.vip_unanswered(state, now_ms):
        return _mounts_first(state, now_ms) or Guard.STANDING
    return Guard.VIP_ANSWERED if _answered(state, now_ms) else Guard.VIP_UNKNOWN


def _mounts_first(state: State, now_ms: int) -> Guard | None:
    """Nothing is served before the mount hook has mounted the volumes."""
    if volumes.ready(state):
        return None
    return Guard.MOUNT if volumes.mount_due(state, now_ms) else Guard.MOUNTING


def passive(state: State, now_ms: int) -> Guard:
    """PASSIVE: takeover conditions 1 to 4."""
    if state.stopping:
        return Guard.STOPPING
    epoch = _epoch_guard(state)
    if epoch is not None:
        return epoch
    if handover.disowned(state, now_ms) is not None:
        return Guard.DISOWNED
    if handover.asked(state, now_ms):
        return Guard.ASKED
    if not state.whole:
        return Guard.RESYNC
    if state.fit is False:
        return Guard.UNFIT
    if lease.peer_serves(state, now_ms):
        return Guard.PEER_SERVES
    if not lease.grants_ended(state, now_ms):
        return Guard.PEER_IDLE if lease.peer_heard(state, now_ms) else Guard.PEER_SILENT
    return _may_take(state, now_ms)


def _may_take(state: State, now_ms: int) -> Guard:
    if lease.takeover_obstacle(state):
        return Guard.OBSTACLE
    if lease.vip_unanswered(state, now_ms):
        return Guard.MAY_TAKE
    return Guard.VIP_ANSWERED if _answered(state, now_ms) else Guard.VIP_UNKNOWN


_GIVEN_UP = frozenset(
    {
        Guard.STOPPING,
        Guard.UNFIT,
        Guard.PEER_SERVES,
        Guard.OPERATOR_FAILED,
        Guard.CONDITIONS_LOST,
        Guard.GATHERED_TOO_LONG,
    }
)
"""What ends a takeover that has ordered nothing yet."""


def takeover(state: State, now_ms: int) -> Guard:
    """TAKEOVER: gathers condition 5, orders the new epoch, waits for the disk and for evidence."""
    if state.commit_ordered:
        return _takeover_committed(state, now_ms)
    guard = _takeover_uncommitted(state, now_ms)
    return Guard.STILL_PREPARED if guard in _GIVEN_UP and state.prepared is not None else guard


def _takeover_uncommitted(state: State, now_ms: int) -> Guard:
    if state.stopping:
        return Guard.STOPPING
    epoch = _epoch_guard(state)
    if epoch is not None and not _operator_knows(state):
        return epoch
    if state.fit is False:
        return Guard.UNFIT
    if lease.peer_serves(state, now_ms):
        return Guard.OPERATOR_FAILED if state.by_operator else Guard.PEER_SERVES
    return _takeover_gathering(state, now_ms)


def _operator_knows(state: State) -> bool:
    """The higher epoch is one of this node's own that its journal lost: who else could end that?"""
    if lease.conflicting_epoch(state) is not None:
        return False
    higher = lease.higher_epoch(state)
    return state.by_operator and higher is not None and higher.authority is state.me


def _takeover_gathering(state: State, now_ms: int) -> Guard:
    ready = lease.grants_ended(state, now_ms) and lease.vip_unanswered(state, now_ms)
    # A question without an answer yet, or a late turn of our own, is no reason to cut a mount
    # short: all is asked once more before the new epoch is ordered.
    mounts = state.mounting or state.volumes_mounted is True
    ended = _answered(state, now_ms) if mounts else not ready
    lost = ended or _peer_came_back(state, now_ms) or lease.takeover_obstacle(state)
    if lost and not state.by_operator:
        return Guard.CONDITIONS_LOST
    if now_ms - state.phase_since_ms >= GATHER_LIMIT_MS and not state.mounting:
        return Guard.OPERATOR_FAILED if state.by_operator else Guard.GATHERED_TOO_LONG
    if ready and state.receivers_stopped and not state.froze and lease.exclusive(state, now_ms):
        return _mounts_first(state, now_ms) or Guard.EXCLUSIVE
    return Guard.GATHERING


def _peer_came_back(state: State, now_ms: int) -> bool:
    """The peer was silent, and is heard again, but does not serve: it has its 2 s to return."""
    return (
        lease.peer_heard(state, now_ms)
        and state.idle_since_ms is not None
        and state.idle_since_ms >= state.phase_since_ms
    )


def _takeover_committed(state: State, now_ms: int) -> Guard:
    if not state.committed:
        return Guard.PERSISTING
    epoch = _epoch_guard(state)
    if epoch is not None:
        return epoch
    hold_ms = state.config.timings.hold_ms
    if state.turn_gap_ms > hold_ms:
        return Guard.TURN_GAP
    if _needs_record(state, now_ms):
        late = now_ms - state.commit_durable_ms >= 4 * hold_ms
        return Guard.NO_EVIDENCE if late else Guard.RECORDING
    if now_ms < lease.serve_deadline_ms(state, now_ms):
        return Guard.EVIDENCE
    if now_ms - state.commit_durable_ms >= COMMIT_EVIDENCE_HOLDS * hold_ms:
        return Guard.NO_EVIDENCE
    return Guard.RECORDING


def _needs_record(state: State, now_ms: int) -> bool:
    """Where the token is the proof, the record is acknowledged before the address is added."""
    return (
        state.config.has_token
        and not lease.standing_evidence(state)
        and lease.token_exclusive(state, now_ms)
        and state.token_acked_ms < state.commit_durable_ms
    )


def active(state: State, now_ms: int) -> Guard:
    """ACTIVE: serves while its evidence lasts."""
    epoch = _epoch_guard(state)
    if epoch is not None:
        return epoch
    lost = _serving_lost(state, now_ms)
    if lost is not None:
        return lost
    if state.fit is False and not handover.rescuable(state, now_ms):
        return Guard.UNFIT
    if state.fit is True and state.rescue_since_ms is not None:
        return Guard.RESCUE_OFF
    if handover.receiver_ready(state, now_ms) and not state.repair:
        return Guard.RECEIVER_READY
    if state.fit is False:
        return Guard.RESCUE if state.rescue_since_ms is None else Guard.RESCUING
    return _serving_on(state, now_ms)


def _serving_on(state: State, now_ms: int) -> Guard:
    if state.repair and now_ms - state.repaired_ms >= state.config.timings.interval_ms:
        return Guard.REPAIR
    return Guard.STOPPING if state.stopping else Guard.EVIDENCE


def _serving_lost(state: State, now_ms: int) -> Guard | None:
    if state.absence_granted_ms > state.started_ms:
        return None
    if state.turn_gap_ms > state.config.timings.hold_ms:
        return Guard.TURN_GAP
    if now_ms >= lease.serve_deadline_ms(state, now_ms):
        return Guard.EVIDENCE_LOST
    if state.lease_lost:
        return Guard.LEASE_LOST
    return None


def returned(state: State, now_ms: int) -> Guard:
    """RETURNED: records the peer's epoch, then waits to be a whole replica."""
    if state.stopping:
        return Guard.STOPPING
    if lease.conflicting_epoch(state) is not None:
        return Guard.CONFLICT
    higher = lease.higher_epoch(state)
    if higher is not None and higher.authority is state.me:
        return Guard.JOURNAL_LOST
    if higher is not None:
        return Guard.ORDERED if state.want.epoch == higher else Guard.HIGHER_UNRECORDED
    if state.is_authority or state.epoch is None:
        return Guard.JOURNAL_LOST
    if handover.disowned(state, now_ms) is not None:
        return Guard.DISOWNED
    if handover.asked(state, now_ms):
        return Guard.ASKED
    if not state.whole:
        return Guard.RESYNC
    return Guard.RECORDED if lease.peer_heard(state, now_ms) else Guard.PEER_UNHEARD


def isolated(state: State, now_ms: int) -> Guard:
    """ISOLATED: the authority without evidence."""
    if state.stopping:
        return Guard.STOPPING
    if state.want.epoch != state.durable.epoch or state.prepared is not None:
        return Guard.ORDERED  # `resolve` orders it; until then the two histories still meet
    epoch = _epoch_guard(state)
    if epoch is not None:
        return epoch
    if handover.disowned(state, now_ms) is not None:
        return Guard.DISOWNED
    return _returning(state, now_ms)


def diverged(state: State, now_ms: int) -> Guard:
    """DIVERGED: only a higher epoch, or the operator, ends it."""
    if state.stopping:
        return Guard.STOPPING
    return Guard.HIGHER if lease.higher_epoch(state) is not None else Guard.CONFLICT


def maintenance(state: State, now_ms: int) -> Guard:
    """MAINTENANCE: starts nothing by itself; a serving node still obeys its evidence."""
    if lease.conflicting_epoch(state) is not None:
        return Guard.CONFLICT
    higher = lease.higher_epoch(state)
    if state.maintenance_serving:
        if higher is not None:
            return Guard.HIGHER
        lost = _serving_lost(state, now_ms)
        if lost is not None:
            return lost
        return _serving_on(state, now_ms)
    if higher is not None and higher.authority is not state.me and state.want.epoch != higher:
        return Guard.HIGHER_UNRECORDED
    if handover.disowned(state, now_ms) is not None:
        return Guard.DISOWNED
    return Guard.STOPPING if state.stopping else Guard.IN_MAINTENANCE


def fault(state: State, now_ms: int) -> Guard:
    """FAULT: left when the own service and storage are sound again."""
    if state.stopping:
        return Guard.STOPPING
    epoch = _epoch_guard(state)
    if epoch is not None:
        return epoch
    if handover.disowned(state, now_ms) is not None:
        return Guard.DISOWNED
    if state.fit is not True:
        return Guard.UNFIT
    if state.is_authority:
        return Guard.FIT_AUTHORITY
    heard = state.peer_session != 0
    return Guard.FIT_REPLICA if heard and state.epoch is not None else Guard.FIT_UNHEARD


# --------------------------------------------------------------------------- handover: the giver


def freezing(state: State, now_ms: int) -> Guard:
    """FREEZING: the clients are held; until PREPARED is ordered this node may serve on."""
    epoch = _epoch_guard(state)
    if epoch is not None:
        return epoch
    lost = _serving_lost(state, now_ms)
    if lost is not None:
        return lost
    if handover.freeze_off(state, now_ms):
        return Guard.HANDOVER_OFF
    return Guard.FROZEN if state.frozen else Guard.FREEZING


def prepared(state: State, now_ms: int) -> Guard:
    """PREPARED: only the receiver's word ends it, or a takeover with a still higher epoch."""
    if lease.conflicting_epoch(state) is not None:
        return Guard.CONFLICT
    higher = lease.higher_epoch(state)
    if higher is not None:
        return Guard.HANDED_OVER if higher == state.prepared else Guard.HIGHER
    if handover.aborted_by_receiver(state):
        return Guard.ABORTED
    if state.stopping:
        return Guard.STOPPING
    if not handover.settled(state):
        return Guard.PERSISTING
    if handover.receiver_works(state, now_ms) or lease.peer_serves(state, now_ms):
        return Guard.RECEIVER_WORKS
    if not lease.grants_ended(state, now_ms):
        return Guard.PEER_IDLE if lease.peer_heard(state, now_ms) else Guard.PEER_SILENT
    return _may_take(state, now_ms)


# --------------------------------------------------------------------------- handover: the receiver


def presync(state: State, now_ms: int) -> Guard:
    """PRESYNC: comes near to the giver's data while that one serves."""
    epoch = _epoch_guard(state)
    if epoch is not None:
        return epoch
    if handover.receiving_off(state, now_ms):
        return Guard.HANDOVER_OFF
    if not state.presync_ready:
        return Guard.APPROACHING
    return Guard.GIVER_PREPARED if handover.giver_prepared(state) else Guard.GIVER_ASKED


def final_sync(state: State, now_ms: int) -> Guard:
    """FINAL_SYNC: the last pass and the proof; the clients are held."""
    epoch = _epoch_guard(state)
    if epoch is not None:
        return epoch
    if handover.receiving_off(state, now_ms):
        return Guard.HANDOVER_OFF
    return Guard.PROVED if state.final_proved else Guard.PROVING


def restoring(state: State, now_ms: int) -> Guard:
    """RESTORING: COMMITTED, while the giver is bound; then serves."""
    if state.commit_ordered:
        return _restoring_committed(state, now_ms)
    epoch = _epoch_guard(state)
    if epoch is not None:
        return epoch
    if handover.receiving_off(state, now_ms):
        return Guard.HANDOVER_OFF
    if not state.receivers_stopped:
        return Guard.RECEIVERS_END
    if not handover.giver_bound(state, now_ms) or state.persist_error or state.unsure:
        return Guard.GIVER_UNBOUND
    return _mounts_first(state, now_ms) or Guard.EXCLUSIVE


def _restoring_committed(state: State, now_ms: int) -> Guard:
    if not state.committed:
        return Guard.PERSIST_FAILED if state.persist_error else Guard.PERSISTING
    found = _takeover_committed(state, now_ms)
    bound = handover.giver_bound(state, now_ms) or lease.standing_evidence(state)
    if found is not Guard.EVIDENCE or bound:
        return found
    # A witness keeps a node in service; that the giver does not take over, only its echo says.
    late = now_ms - state.commit_durable_ms >= state.config.timings.hold_ms
    return Guard.NO_EVIDENCE if late else Guard.RECORDING


def on_hook(state: State, now_ms: int) -> Guard:
    """The end of a hook: which one, and did it go well?"""
    match state.hook_news:
        case "mounted":
            return Guard.MOUNTED
        case "unmounted":
            return Guard.UNMOUNTED
        case "mount-failed":
            return Guard.MOUNT_FAILED
        case _:
            return Guard.UNMOUNT_FAILED


def _epoch_guard(state: State) -> Guard | None:
    if lease.conflicting_epoch(state) is not None:
        return Guard.CONFLICT
    return Guard.HIGHER if lease.higher_epoch(state) is not None else None


def _answered(state: State, now_ms: int) -> bool:
    return lease.survey_fresh(state, now_ms) and state.survey.answered_by is not None


TURN_GUARDS: dict[Phase, Callable[[State, int], Guard]] = {
    Phase.STARTING: starting,
    Phase.WAITING: waiting,
    Phase.PASSIVE: passive,
    Phase.TAKEOVER: takeover,
    Phase.ACTIVE: active,
    Phase.RETURNED: returned,
    Phase.ISOLATED: isolated,
    Phase.DIVERGED: diverged,
    Phase.MAINTENANCE: maintenance,
    Phase.FAULT: fault,
    Phase.FREEZING: freezing,
    Phase.PREPARED: prepared,
    Phase.PRESYNC: presync,
    Phase.FINAL_SYNC: final_sync,
    Phase.RESTORING: restoring,
}
"""The classifier of a turn in each phase."""


# --------------------------------------------------------------------------- commands


def on_command(state: State, command: Command, now_ms: int) -> Guard:
    """The single guard that holds for an operator's command."""
    if state.stopping and command.kind not in (CommandKind.STOP, CommandKind.RESTART):
        return Guard.STOPPING
    return _COMMAND_GUARDS[command.kind](state, command, now_ms)


def _on_activate(state: State, command: Command, now_ms: int) -> Guard:
    if state.phase is Phase.STARTING:
        return Guard.SETTLING
    if state.serving:
        return Guard.SERVES
    if state.phase in RECEIVING_PHASES:
        return Guard.HANDOVER
    if state.phase is Phase.TAKEOVER and (state.commit_ordered or state.by_operator):
        return Guard.REPEATED
    if state.phase is Phase.DIVERGED:
        return Guard.DIVERGED
    if lease.peer_serves(state, now_ms):
        return Guard.PEER_SERVES
    if state.fit is not True:
        return Guard.UNFIT
    heard = lease.peer_heard(state, now_ms)
    if state.durable.promise and not heard and not command.force:
        return Guard.PROMISED
    if not state.whole and not command.force:
        return Guard.NOT_WHOLE
    return Guard.ALLOWED


def _on_maintenance(state: State, command: Command, now_ms: int) -> Guard:
    if state.phase is Phase.MAINTENANCE:
        return Guard.REPEATED
    if state.phase in RECEIVING_PHASES | GIVING_PHASES:
        return Guard.HANDOVER
    if state.phase in (Phase.STARTING, Phase.TAKEOVER):
        return Guard.SETTLING
    if state.phase is Phase.DIVERGED:
        return Guard.DIVERGED
    if state.phase is Phase.ACTIVE and lease.standing_evidence(state) != "promise":
        return Guard.NO_PEER_PROMISE
    return Guard.ALLOWED


def _on_maintenance_off(state: State, command: Command, now_ms: int) -> Guard:
    if state.phase is not Phase.MAINTENANCE:
        return Guard.NOT_IN_MAINTENANCE
    return Guard.SERVES if state.maintenance_serving else Guard.ALLOWED


def _on_confirm(state: State, command: Command, now_ms: int) -> Guard:
    return Guard.PEER_HEARD if lease.peer_heard(state, now_ms) else Guard.ALLOWED


def _on_resolve(state: State, command: Command, now_ms: int) -> Guard:
    if state.phase is not Phase.DIVERGED:
        return Guard.NOT_DIVERGED
    return Guard.ALLOWED if command.keep is state.me else Guard.NOT_KEPT_HERE


def _on_stop(state: State, command: Command, now_ms: int) -> Guard:
    if state.stopping:
        return Guard.REPEATED
    serves = state.serving and state.phase not in (Phase.STARTING, Phase.FREEZING)
    return Guard.SERVES if serves else Guard.ALLOWED


def _on_handover(state: State, command: Command, now_ms: int) -> Guard:
    if state.phase in RECEIVING_PHASES | GIVING_PHASES or state.asks:
        return Guard.HANDOVER
    if state.phase is Phase.ACTIVE:
        if command.to is state.me:
            return Guard.THERE_ALREADY
        could = handover.peer_could_receive(state, now_ms)
        return Guard.SERVES if could else Guard.NOT_POSSIBLE
    if state.phase not in (Phase.PASSIVE, Phase.RETURNED):
        return Guard.NOT_POSSIBLE
    if not handover.possible(state, now_ms):
        return Guard.NOT_POSSIBLE
    return Guard.ALLOWED if command.to is state.me else Guard.THERE_ALREADY


def _on_abort(state: State, command: Command, now_ms: int) -> Guard:
    if state.phase in RECEIVING_PHASES:
        return Guard.TOO_LATE if state.commit_ordered else Guard.ALLOWED
    if state.phase in GIVING_PHASES or state.asks:
        return Guard.GIVES
    report = state.report
    if state.phase is Phase.ACTIVE and report is not None and report.handover is not None:
        return Guard.GIVES
    return Guard.NOT_POSSIBLE


_COMMAND_GUARDS: dict[CommandKind, Callable[[State, Command, int], Guard]] = {
    CommandKind.ACTIVATE: _on_activate,
    CommandKind.MAINTENANCE_ON: _on_maintenance,
    CommandKind.MAINTENANCE_OFF: _on_maintenance_off,
    CommandKind.CONFIRM_PEER_DOWN: _on_confirm,
    CommandKind.RESOLVE: _on_resolve,
    CommandKind.STOP: _on_stop,
    CommandKind.RESTART: _on_stop,
    CommandKind.HANDOVER: _on_handover,
    CommandKind.ABORT: _on_abort,
}

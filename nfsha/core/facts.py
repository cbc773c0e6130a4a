"""Takes in what happened: each input changes facts of the state, and nothing else.

What follows from the facts is decided afterwards, once, by the table.
"""

from __future__ import annotations

from functools import singledispatch

from nfsha.core import handover, lease, model
from nfsha.core.model import (
    MAX_PENDING,
    NEVER_MS,
    Datagram,
    Echo,
    Phase,
    PromiseState,
)
from nfsha.core.state import State, SurveyResult


@singledispatch
def absorb(what: object, state: State, now_ms: int) -> None:
    """Changes the facts by one input. Raises TypeError for an input that has no rule."""
    raise TypeError(f"no rule for input {type(what).__name__}")


# --------------------------------------------------------------------------- the peer


@absorb.register
def _(what: model.Heard, state: State, now_ms: int) -> None:
    datagram = what.datagram
    if datagram.role is not state.me.other:
        state.count("datagram_wrong_role")
        return
    echo = _echo_of_ours(state, datagram)
    if echo is not None and echo.seq > state.seq:
        state.count("datagram_impossible_echo")
        return
    if not _counts(state, datagram, echo) or echo is None:
        return
    _take_report(state, datagram, echo, now_ms)
    _take_handover(state, datagram, echo, now_ms)
    _take_evidence(state, datagram, echo)
    _take_promises(state, datagram, echo, now_ms)


def _echo_of_ours(state: State, datagram: Datagram) -> Echo | None:
    if datagram.echo is not None and datagram.echo.session == state.session:
        return datagram.echo
    for echo in datagram.pending:
        if echo.session == state.session:
            return echo
    return None


def _counts(state: State, datagram: Datagram, echo: Echo | None) -> bool:
    """Does this datagram say anything? Only if it echoes this very session (I10)."""
    if datagram.session == state.peer_session:
        if datagram.seq <= state.peer_seq:
            # The same one over another link is how it should be; an older one is late or replayed.
            same = datagram.seq == state.peer_seq
            state.count("datagram_doubled" if same else "datagram_old")
            return False
        if echo is None:
            state.count("datagram_unechoed")
        return echo is not None
    if echo is None or echo.seq <= state.echoed_high:
        _remember_pending(state, datagram)
        return False
    state.peer_session = datagram.session
    state.peer_seq = 0
    state.idle_since_ms = None
    state.pending = tuple(kept for kept in state.pending if kept.session != datagram.session)
    state.send_soon = True
    state.count("peer_sessions")
    return True


def _remember_pending(state: State, datagram: Datagram) -> None:
    """A session not confirmed yet is echoed in the second slot, which grants nothing."""
    state.count("datagram_unconfirmed")
    known = {echo.session: echo for echo in state.pending}
    older = known.pop(datagram.session, None)
    if older is not None and older.seq >= datagram.seq:
        return
    if older is None:
        state.send_soon = True
    kept = tuple(known.values())[-(MAX_PENDING - 1) :]
    state.pending = (*kept, Echo(datagram.session, datagram.seq))


def _take_report(state: State, datagram: Datagram, echo: Echo, now_ms: int) -> None:
    if state.serving and not lease.peer_heard(state, now_ms):
        state.announced_ms = NEVER_MS  # a cut healed: caches beyond it may point elsewhere
    state.peer_seq = datagram.seq
    state.heard_ms = now_ms
    state.report = datagram
    if echo is datagram.echo:
        state.known_to_peer = True
    state.echoed_high = max(state.echoed_high, echo.seq)
    touch_ms = state.out_of_touch_ms
    if touch_ms is not None and sent_at_ms(state, echo.seq) > touch_ms:
        state.out_of_touch_ms = None  # it shows what it is now, not what it was
    if not _sent_before_the_fence(state, datagram, now_ms):
        state.peer_down = ""
    idle = not datagram.serving and datagram.phase in lease.IDLE_PHASES
    if state.phase is Phase.PREPARED:
        idle = not handover.receiver_works(state, now_ms)
    if not idle:
        state.idle_since_ms = None
        state.withhold_since_ms = None
    elif state.idle_since_ms is None:
        state.idle_since_ms = now_ms


def _take_handover(state: State, datagram: Datagram, echo: Echo, now_ms: int) -> None:
    """What was asked of the peer, or refused to it, is said until it is seen to know.

    A request that was withdrawn may have been heard: then what the peer began by it is refused.
    """
    if state.refuses is not None and datagram.handover != state.refuses:
        state.refuses = None
    if state.withdrawn_from_seq and datagram.handover is not None:
        state.refuses = datagram.handover
        state.send_soon = True
    if datagram.handover is not None or echo.seq >= state.withdrawn_from_seq:
        state.withdrawn_from_seq = 0
    waited = now_ms - state.asked_ms >= handover.ANSWER_MS
    if state.asks and (datagram.handover is not None or not state.serving or waited):
        state.asks = 0


def _sent_before_the_fence(state: State, datagram: Datagram, now_ms: int) -> bool:
    """Was this datagram on its way when the agent proved its sender off?

    A node that was off is back in another session; and nothing stays on its way for longer than
    `takeover_after`, so an agent that lied is found out.
    """
    return (
        state.peer_down == "fence"
        and datagram.session == state.fence_session
        and now_ms - state.fence_proved_ms < state.config.timings.takeover_after_ms
    )


def _take_evidence(state: State, datagram: Datagram, echo: Echo) -> None:
    """An echo is a grant, unless its sender is past the point where it could keep it.

    A taker's grants have ended, by its own word: a machine that was paused together with its clock
    would count on them still.
    """
    if datagram.phase is Phase.TAKEOVER:
        state.echo_ms = NEVER_MS
    if (
        echo is not datagram.echo
        or not datagram.echo_grants
        or datagram.serving
        or datagram.phase in lease.NO_EVIDENCE_PHASES
    ):
        return
    if not lease.timings_suffice(state, datagram):
        state.count("echo_short_timings")
        return
    sent_ms = sent_at_ms(state, echo.seq)
    state.echo_ms = max(state.echo_ms, sent_ms)
    if state.absence_from_seq and echo.seq >= state.absence_from_seq:
        state.absence_granted_ms = max(state.absence_granted_ms, sent_ms)


def sent_at_ms(state: State, seq: int) -> int:
    """When the own datagram `seq` was sent; NEVER_MS when that is too long ago."""
    back = state.seq - seq
    if back < 0 or back >= len(state.sent_ms):
        return NEVER_MS
    return state.sent_ms[-1 - back]


def _take_promises(state: State, datagram: Datagram, echo: Echo, now_ms: int) -> None:
    own_reign = state.is_authority
    state.journal_if(
        peer_promise=own_reign and _promise_counts(state, datagram, now_ms),
        peer_agent_only=own_reign and datagram.agent_only,
    )
    if state.promise_from_seq and echo.seq >= state.promise_from_seq:
        state.promise_echoed = True
    cleared = (
        state.clearing_from_seq
        and echo.seq >= state.clearing_from_seq
        and not datagram.peer_promise_held
    )
    if cleared and state.promise_state is PromiseState.CLEARING:
        state.journal_if(promise=False)


def _promise_counts(state: State, datagram: Datagram, now_ms: int) -> bool:
    """Is the peer's promise to be counted on after this datagram?

    A peer that wants to end its promise is bound until this node shows that it knows. A serving
    node says so only once it has other evidence: else the first word of a returned peer would
    interrupt the service, for its first grant comes one exchange later (I8).
    """
    if datagram.promise is not PromiseState.CLEARING:
        return datagram.promise is PromiseState.STANDING
    fresh_echo = now_ms - state.echo_ms < state.config.timings.hold_ms
    return state.serving and state.want.peer_promise and not fresh_echo


# --------------------------------------------------------------------------- witnesses, token


@absorb.register
def _(what: model.WitnessAnswered, state: State, now_ms: int) -> None:
    state.witness_ms = max(state.witness_ms, min(what.sent_ms, now_ms))


@absorb.register
def _(what: model.TokenChanged, state: State, now_ms: int) -> None:
    state.token_since_ms = what.since_ms
    state.token_own_record = what.own_record
    if what.since_ms is None:
        state.token_acked_ms = NEVER_MS


@absorb.register
def _(what: model.TokenAcked, state: State, now_ms: int) -> None:
    if state.token_since_ms is not None:
        state.token_acked_ms = max(state.token_acked_ms, min(what.sent_ms, now_ms))


@absorb.register
def _(what: model.RecordRead, state: State, now_ms: int) -> None:
    if state.record_epoch is None or what.epoch.number > state.record_epoch.number:
        state.record_epoch = what.epoch


@absorb.register
def _(what: model.FenceReported, state: State, now_ms: int) -> None:
    if not what.off:
        state.fence_failed_ms = now_ms
    elif state.peer_session == state.fence_session:
        state.peer_down = "fence"  # else it has booted since the agent was started
        state.fence_proved_ms = now_ms


# --------------------------------------------------------------------------- this node


@absorb.register
def _(what: model.FitChanged, state: State, now_ms: int) -> None:
    state.service_fit = what.ok
    state.service_reason = what.reason
    state.storage_fit = what.storage


@absorb.register
def _(what: model.ReplicaChanged, state: State, now_ms: int) -> None:
    state.replica_whole = what.whole
    state.replica_epoch = what.epoch
    state.replica_reason = what.reason
    state.stamped = what.stamped
    state.volumes_seen = True
    state.newest_stamp = what.newest_stamp
    if what.whole and state.handed_over and what.epoch == state.durable.epoch:
        state.journal_if(prepared=None)  # the stamps say it from now on


@absorb.register
def _(what: model.PresyncChanged, state: State, now_ms: int) -> None:
    if what.handover != state.handover or state.phase is not Phase.PRESYNC:
        return
    if what.failed:
        state.handover_off = what.failed
    if what.ready and not state.presync_ready:
        state.presync_ready = True
        state.ready_since_ms = now_ms
        state.send_soon = True


@absorb.register
def _(what: model.FinalChanged, state: State, now_ms: int) -> None:
    if what.handover != state.handover or state.phase is not Phase.FINAL_SYNC:
        return
    if what.failed:
        state.handover_off = what.failed
    state.final_proved = what.proved and not what.failed


@absorb.register
def _(what: model.AddressChanged, state: State, now_ms: int) -> None:
    state.address_held = what.held
    if not what.held:
        state.leftover = ()
    if not what.held and state.serving and state.phase is not Phase.STARTING:
        state.repair = _with(state.repair, "address")


@absorb.register
def _(what: model.RulesetLost, state: State, now_ms: int) -> None:
    if state.serving and state.phase is not Phase.STARTING:
        state.repair = _with(state.repair, "ruleset")


@absorb.register
def _(what: model.CarrierChanged, state: State, now_ms: int) -> None:
    state.carrier = what.up


@absorb.register
def _(what: model.VipClaimed, state: State, now_ms: int) -> None:
    if state.serving:  # else it is the rightful holder who announces
        state.claimed_by = what.mac
        state.claimed_ms = now_ms
        state.count("vip_claimed")
        state.announced_ms = NEVER_MS


def _with(repair: str, lock: str) -> str:
    return repair if lock in repair else (f"{repair} {lock}").strip()


# --------------------------------------------------------------------------- results


@absorb.register
def _(what: model.Persisted, state: State, now_ms: int) -> None:
    state.durable = what.journal
    state.unsure = False
    state.unsure_promise_kept = True
    state.unsure_peer_promise = False
    state.unsure_prepared = None
    state.persist_error = ""
    if state.commit_ordered and what.journal.epoch == state.want.epoch:
        state.commit_durable_ms = now_ms


@absorb.register
def _(what: model.PersistFailed, state: State, now_ms: int) -> None:
    state.unsure = True
    state.unsure_promise_kept = state.unsure_promise_kept and state.writing.promise
    state.unsure_peer_promise = state.unsure_peer_promise or state.writing.peer_promise
    state.unsure_prepared = state.writing.prepared or state.unsure_prepared
    state.persist_error = what.reason
    state.persist_failed_ms = now_ms
    if state.phase is Phase.PREPARED and not handover.settled(state):
        state.refuses = state.prepared  # it will not be: clients are held no longer than needed
    state.count("persist_failed")


@absorb.register
def _(what: model.Surveyed, state: State, now_ms: int) -> None:
    state.survey = SurveyResult(what.started_ms, what.ended_ms, what.answered_by, what.heard_other)
    if what.answered_by is None:
        state.vip_answered_since_ms = None
    elif state.vip_answered_since_ms is None:
        state.vip_answered_since_ms = what.started_ms


@absorb.register
def _(what: model.ReceiversStopped, state: State, now_ms: int) -> None:
    state.receivers_stopped = what.ok
    state.receivers_stuck = "" if what.ok else what.detail


@absorb.register
def _(what: model.Frozen, state: State, now_ms: int) -> None:
    if state.phase is not Phase.FREEZING:
        return
    state.frozen = what.ok
    if not what.ok:
        state.handover_off = what.detail


@absorb.register
def _(what: model.Thawed, state: State, now_ms: int) -> None:
    state.froze = not what.ok
    state.stuck_frozen = "" if what.ok else what.detail


@absorb.register
def _(what: model.VolumesMounted, state: State, now_ms: int) -> None:
    state.mounting = False
    state.mount_ended_ms = now_ms
    state.volumes_mounted = True if what.ok else None
    state.mount_trouble = "" if what.ok else what.detail
    state.mount_failures = 0 if what.ok else state.mount_failures + 1
    state.hook_news = "mounted" if what.ok else "mount-failed"
    if what.ok:
        state.unmount_trouble = ""
        state.unmount_failures = 0


@absorb.register
def _(what: model.VolumesUnmounted, state: State, now_ms: int) -> None:
    state.unmount_ended_ms = now_ms
    state.volumes_mounted = False if what.ok else None
    state.unmount_trouble = "" if what.ok else what.detail
    state.unmount_failures = 0 if what.ok else state.unmount_failures + 1
    state.hook_news = "unmounted" if what.ok else "unmount-failed"


@absorb.register
def _(what: model.LeaseLost, state: State, now_ms: int) -> None:
    if what.lock == "address":
        state.address_held = False
    if state.serving:
        state.lease_lost = f"{what.lock}: {what.detail}"
        state.lease_lost_ms = now_ms


@absorb.register
def _(what: model.LeaseHeld, state: State, now_ms: int) -> None:
    if what.lock == "address":
        state.address_held = True
    if what.lock in state.leftover:
        state.leftover = tuple(lock for lock in state.leftover if lock != what.lock)


@absorb.register
def _(what: model.Completed, state: State, now_ms: int) -> None:
    for slot, flight in state.flights.items():
        if flight.number == what.action:
            del state.flights[slot]
            if what.result is not None:
                absorb(what.result, state, now_ms)
            return
    state.count("stale_results")

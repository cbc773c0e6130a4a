"""What a phase does in every turn, besides its rows: heartbeats, renewals, questions, the journal.

Level-triggered: each duty looks at what is and orders what is missing, so nothing that was lost
needs a special case.
"""

from __future__ import annotations

from nfsha.core import handover, lease, volumes
from nfsha.core.model import (
    GIVING_PHASES,
    NEVER_MS,
    RECEIVING_PHASES,
    Announce,
    AskWitness,
    Datagram,
    Echo,
    Epoch,
    Exclusivity,
    Exit,
    ExtendLeases,
    Fence,
    Persist,
    Phase,
    PromiseState,
    PublishRecord,
    RemoveAddress,
    RenewAddress,
    RenewService,
    SendHeartbeat,
    StopReceivers,
    Survey,
    TakeToken,
    Thaw,
    UnmountVolumes,
)
from nfsha.core.orders import Orders
from nfsha.core.state import SENT_KEPT, State

PERSIST_RETRY_MS = 1000
TOKEN_RETRY_MS = 1000
FENCE_RETRY_MS = 10_000
FENCE_DELAY_MS = 5000
RECORD_EVERY_MS = 10_000
RECEIVERS_RETRY_MS = 1000
THAW_RETRY_MS = 1000

_MAY_TAKE_OVER = RECEIVING_PHASES | {Phase.PASSIVE, Phase.PREPARED}
"""Who takes over, or does so as soon as it is PASSIVE again, when the peer falls silent."""


def all_duties(state: State, orders: Orders, now_ms: int) -> None:
    """Orders all that is due now."""
    if state.exited:
        return
    persist(state, orders, now_ms)
    touch(state, now_ms)
    withhold(state, now_ms)
    if state.serving and state.phase is not Phase.STARTING:
        renew(state, orders, now_ms)
    elif state.address_held and state.phase is not Phase.STARTING:
        remove_leftover(state, orders, now_ms)
    end_receivers(state, orders, now_ms)
    thaw(state, orders, now_ms)
    unmount(state, orders, now_ms)
    survey(state, orders, now_ms)
    ask_witness(state, orders, now_ms)
    prove(state, orders, now_ms)
    heartbeat(state, orders, now_ms)
    leave(state, orders, now_ms)


def persist(state: State, orders: Orders, now_ms: int) -> None:
    """Writes the journal when it shall say something else (one write at a time, in order).

    And again after a failed write, even when nothing is to be changed any more: nobody knows which
    of the two the disk holds.
    """
    known = state.want == state.durable and not state.unsure
    if known or orders.in_flight("persist"):
        return
    if state.persist_error and now_ms - state.persist_failed_ms < PERSIST_RETRY_MS:
        return
    state.writing = state.want
    orders.order(Persist(state.want))


def touch(state: State, now_ms: int) -> None:
    """A giver that hears neither the receiver nor a witness for `hold` may be the one cut off."""
    hold_ms = state.config.timings.hold_ms
    if state.prepared is None:
        state.out_of_touch_ms = None
    elif now_ms - max(state.heard_ms, state.witness_ms) >= hold_ms or state.turn_gap_ms > hold_ms:
        state.out_of_touch_ms = now_ms


def withhold(state: State, now_ms: int) -> None:
    """A node that could take over stops echoing a peer that is heard but has not served for 2 s.

    Only while it could really take over; else the peer needs the echo to come back (trace 9). After
    a takeover's time without one it echoes again for another round.
    """
    if state.want.aborted != state.durable.aborted and state.idle_since_ms is not None:
        state.idle_since_ms = now_ms  # the giver cannot go on before it is told
    since_ms = state.idle_since_ms
    if (
        state.phase not in (Phase.PASSIVE, Phase.PREPARED)
        or state.stopping
        or since_ms is None
        or lease.takeover_obstacle(state)
        or not _could_prove(state, now_ms)
    ):
        state.withhold_since_ms = None
        return
    timings = state.config.timings
    if state.withhold_since_ms is None:
        if now_ms - since_ms >= timings.idle_peer_ms:
            state.withhold_since_ms = now_ms
            state.send_soon = True
    elif now_ms - state.withhold_since_ms >= lease.takeover_wait_ms(state) + timings.idle_peer_ms:
        state.withhold_since_ms = None
        state.idle_since_ms = now_ms


def _could_prove(state: State, now_ms: int) -> bool:
    """Is there hope for takeover condition 5? A witness that is silent proves nothing."""
    if state.config.exclusivity is not Exclusivity.WITNESS or state.peer_down:
        return True
    return now_ms - state.witness_ms < state.config.timings.hold_ms


def renew(state: State, orders: Orders, now_ms: int) -> None:
    """Feeds both locks from this turn's evidence, and announces from time to time."""
    timings = state.config.timings
    deadline_ms = lease.serve_deadline_ms(state, now_ms)
    if deadline_ms <= now_ms or state.lease_lost or state.absence_granted_ms != NEVER_MS:
        return
    if (
        state.config.service_lease
        and state.phase is not Phase.FREEZING
        and not orders.in_flight("service")
        and deadline_ms - state.service_until_ms >= timings.interval_ms // 2
    ):
        orders.order(RenewService(deadline_ms))
        state.service_until_ms = deadline_ms
    if (
        not orders.in_flight("address")
        and now_ms - state.address_renewed_ms >= timings.renew_every_ms
        and not state.repair
    ):
        orders.order(RenewAddress(deadline_ms))
        state.address_renewed_ms = now_ms
    if now_ms - state.announced_ms >= timings.announce_every_ms:
        orders.order(Announce("from time to time, and when another machine claimed the VIP"))
        state.announced_ms = now_ms


def remove_leftover(state: State, orders: Orders, now_ms: int) -> None:
    """A node that does not serve takes the address away until the kernel shows it gone."""
    if orders.in_flight("address"):
        return
    if now_ms - state.address_removed_ms >= state.config.timings.renew_every_ms:
        orders.order(RemoveAddress())
        state.address_removed_ms = now_ms


def end_receivers(state: State, orders: Orders, now_ms: int) -> None:
    """Tries again to end a process that could not be ended: until then this node is in FAULT."""
    if not state.receivers_stuck or orders.in_flight("receivers"):
        return
    if now_ms - state.receivers_tried_ms >= RECEIVERS_RETRY_MS:
        orders.order(StopReceivers())
        state.receivers_tried_ms = now_ms


def thaw(state: State, orders: Orders, now_ms: int) -> None:
    """Ends a freeze that nobody needs any more, and tries again until it is seen to have ended.

    In PREPARED too where a takeover failed by it: else none could be begun again.
    """
    if not state.froze or state.phase is Phase.STARTING:
        return
    if state.phase in GIVING_PHASES and not state.stuck_frozen:
        return
    if not orders.in_flight("freeze") and now_ms - state.thaw_tried_ms >= THAW_RETRY_MS:
        orders.order(Thaw())
        state.thaw_tried_ms = now_ms


def unmount(state: State, orders: Orders, now_ms: int) -> None:
    """Gives the volumes up when this node neither serves nor is about to; a mount is cut short."""
    if not volumes.unmount_due(state, now_ms):
        return
    state.mounting = False
    state.volumes_mounted = None
    orders.order(UnmountVolumes(state.epoch))


def survey(state: State, orders: Orders, now_ms: int) -> None:
    """Asks who answers for the VIP, so that the answer is there when the grants end."""
    if orders.in_flight("survey") or state.stopping:
        return
    if _wants_survey(state, now_ms):
        orders.order(Survey())


def survey_begins_ms(state: State) -> int:
    """When a passive node begins to survey: so that it ends as its grants do."""
    timings = state.config.timings
    begin_ms = lease.takeover_wait_ms(state) - timings.survey_ms
    if state.withhold_since_ms is not None:
        return max(state.granted_ms, state.chain_since_ms) + begin_ms
    return lease.silence_since_ms(state) + begin_ms


def _wants_survey(state: State, now_ms: int) -> bool:
    if state.phase is Phase.TAKEOVER:
        return not state.commit_ordered
    if state.phase in _MAY_TAKE_OVER:
        return now_ms >= survey_begins_ms(state) and not lease.peer_serves_now(state, now_ms)
    if state.phase in (Phase.WAITING, Phase.ISOLATED):
        return state.is_authority and bool(lease.standing_evidence(state))
    return False


def ask_witness(state: State, orders: Orders, now_ms: int) -> None:
    """Asks the witnesses when the echo is late, or a takeover may come; never in the calm."""
    timings = state.config.timings
    if (
        state.config.exclusivity is not Exclusivity.WITNESS
        or now_ms - state.witness_asked_ms < timings.interval_ms
    ):
        return
    late_ms = 2 * timings.interval_ms
    if state.serving:
        wanted = now_ms - state.echo_ms > late_ms
    elif state.phase in _MAY_TAKE_OVER:
        idle = state.idle_since_ms is not None and state.phase not in RECEIVING_PHASES
        wanted = idle or now_ms - state.heard_ms > late_ms
    else:
        wanted = state.phase is Phase.TAKEOVER
    if wanted:
        orders.order(AskWitness())
        state.witness_asked_ms = now_ms


def prove(state: State, orders: Orders, now_ms: int) -> None:
    """Takes the token and runs the fence agent where the rules let this node touch them."""
    config = state.config
    if config.has_token and _may_take_token(state, now_ms):
        orders.order(TakeToken())
        state.token_tried_ms = now_ms
    if (
        config.has_agent
        and state.phase is Phase.TAKEOVER
        and not state.commit_ordered
        and not orders.in_flight("fence")
        and now_ms - state.fence_failed_ms >= FENCE_RETRY_MS
        and not lease.exclusive(state, now_ms)
        and (not config.has_token or now_ms - state.phase_since_ms >= 2 * config.timings.hold_ms)
        and now_ms - state.phase_since_ms >= _fence_delay_ms(state)
    ):
        orders.order(Fence())
        state.fence_session = state.peer_session
    if config.has_token and state.token_since_ms is not None and state.epoch is not None:
        _publish(state, orders, now_ms)


def _fence_delay_ms(state: State) -> int:
    """When both would fence the other, the giver of a handover goes first: it has all writes."""
    gave = state.report is not None and state.report.phase in GIVING_PHASES
    return FENCE_DELAY_MS if gave else 0


def _may_take_token(state: State, now_ms: int) -> bool:
    """Who lost the token connects again only by rule, never by itself (trace 15).

    An ISOLATED authority leaves it to a peer that is heard in TAKEOVER: else both would cut each
    other off in turn, and neither would hold it for `hold`.
    """
    if (
        state.token_since_ms is not None
        or "token" in state.flights
        or now_ms - state.token_tried_ms < TOKEN_RETRY_MS
    ):
        return False
    if state.phase is Phase.TAKEOVER:
        return not state.commit_ordered
    if state.phase is Phase.ISOLATED:
        return state.is_authority and not lease.peer_serves(state, now_ms)
    fresh_echo = now_ms - state.echo_ms < state.config.timings.hold_ms
    return (
        state.serving
        and state.phase is not Phase.STARTING
        and (fresh_echo or state.durable.peer_promise)
    )


def _publish(state: State, orders: Orders, now_ms: int) -> None:
    owed = state.phase is Phase.TAKEOVER and state.committed
    due_ms = state.config.timings.interval_ms if owed else RECORD_EVERY_MS
    if (owed or state.serving) and now_ms - state.published_ms >= due_ms and state.epoch:
        orders.order(PublishRecord(state.epoch))
        state.published_ms = now_ms


# --------------------------------------------------------------------------- heartbeat


def heartbeat(state: State, orders: Orders, now_ms: int) -> None:
    """Sends the whole public state each interval, and at once when it changes."""
    timings = state.config.timings
    since_ms = now_ms - state.last_sent_ms
    shown = _public(state)
    due = since_ms >= timings.interval_ms or shown != state.shown
    if not due and not (state.send_soon and since_ms >= timings.interval_ms // 4):
        return
    state.seq += 1
    state.sent_ms = (*state.sent_ms[-(SENT_KEPT - 1) :], now_ms)
    state.last_sent_ms = now_ms
    state.shown = shown
    state.send_soon = False
    datagram = _datagram(state)
    if datagram.echo is not None and datagram.echo_grants:
        state.granted_ms = state.heard_ms
    _mark_promise(state, datagram)
    orders.order(SendHeartbeat(datagram))


def _public(state: State) -> tuple[object, ...]:
    return (
        state.phase,
        state.serving,
        state.epoch,
        state.promise_state,
        _peer_promise_held(state),
        state.fit,
        state.whole,
        lease.grants(state),
        state.absence_from_seq,
        state.leftover,
        _handover(state),
        _ready(state),
        _shown_aborted(state),
        state.refuses,
        state.asks,
    )


def _handover(state: State) -> Epoch | None:
    return state.prepared if state.phase is Phase.PREPARED else state.handover


def _ready(state: State) -> bool:
    if state.phase is Phase.PREPARED:
        given = handover.settled(state) and volumes.given_up(state)
        return given and not state.address_held
    return state.phase is Phase.PRESYNC and state.presync_ready


def _shown_aborted(state: State) -> Epoch | None:
    return None if state.unsure else state.durable.aborted


def _peer_promise_held(state: State) -> bool:
    return state.durable.peer_promise or state.want.peer_promise or state.unsure_peer_promise


def _datagram(state: State) -> Datagram:
    config = state.config
    timings = config.timings
    echo = Echo(state.peer_session, state.peer_seq) if state.peer_session else None
    # A former run may have extended its leases for an absence; until this run has renewed or
    # removed them, the peer must wait as long as if this one were absent too.
    absent = bool(state.leftover) or (state.absence_from_seq != 0 and state.stopping == "restart")
    return Datagram(
        role=state.me,
        session=state.session,
        seq=state.seq,
        echo=echo,
        echo_grants=echo is not None and lease.grants(state),
        pending=state.pending,
        phase=state.phase,
        serving=state.serving,
        epoch=state.epoch,
        blank=state.blank,
        promise=state.promise_state,
        peer_promise_held=_peer_promise_held(state),
        healthy=state.fit is True,
        whole=state.whole,
        service_lease=config.service_lease,
        agent_only=config.agent_only,
        interval_ms=timings.interval_ms,
        hold_ms=timings.hold_ms,
        takeover_after_ms=timings.takeover_after_ms,
        address_lease_ms=timings.address_lease_ms,
        absence_ms=timings.absence_ms if absent else 0,
        known_number=handover.highest_number(state),
        handover=_handover(state),
        ready=_ready(state),
        aborted=_shown_aborted(state),
        refuses=state.refuses,
        asks=state.asks,
    )


def _mark_promise(state: State, datagram: Datagram) -> None:
    """Remembers from which datagram on the promise, or its clearing, was shown."""
    standing = datagram.promise is PromiseState.STANDING
    clearing = datagram.promise is PromiseState.CLEARING
    if not standing:
        state.promise_from_seq = 0
        state.promise_echoed = False
    elif not state.promise_from_seq:
        state.promise_from_seq = state.seq
    if not clearing:
        state.clearing_from_seq = 0
    elif not state.clearing_from_seq:
        state.clearing_from_seq = state.seq


# --------------------------------------------------------------------------- leaving


def leave(state: State, orders: Orders, now_ms: int) -> None:
    """A stopping node exits when the peer knows what it must, or when the wait is over."""
    if not state.stopping:
        return
    late = now_ms >= state.stop_by_ms
    if _receiver_needs_it(state, now_ms):
        return
    if state.serving and state.stopping == "restart":
        _leave_serving(state, orders, now_ms, late=late)
        return
    if orders.in_flight("persist") and not late:
        return
    if _gives_up_volumes(state, now_ms):
        return
    if state.froze and state.phase not in GIVING_PHASES and not late:
        return
    unseen = state.durable.promise and not state.promise_echoed
    if unseen and lease.peer_heard(state, now_ms) and not late:
        return
    _exit(state, orders, f"{state.stopping}: nothing is held here any more")


def _gives_up_volumes(state: State, now_ms: int) -> bool:
    """The unmount hook has as long as it may run; then the daemon ends without it."""
    if state.serving or volumes.given_up(state):
        return False
    return now_ms < state.stop_by_ms + (state.config.hook_timeout_ms or 0)


def _receiver_needs_it(state: State, now_ms: int) -> bool:
    """Who gives its authority away stays for the proof: only it has the last writes."""
    if state.phase is Phase.FREEZING:
        return True  # its limit is near
    if state.phase is not Phase.PREPARED or not handover.receiver_works(state, now_ms):
        return False
    limit_ms = state.config.freeze_limit_ms + state.config.final_limit_ms
    return now_ms < state.stop_by_ms + limit_ms


def _leave_serving(state: State, orders: Orders, now_ms: int, *, late: bool) -> None:
    timings = state.config.timings
    if state.durable.peer_promise:
        until_ms = now_ms + timings.hold_ms + timings.absence_ms
    elif state.absence_granted_ms != NEVER_MS:
        until_ms = state.absence_granted_ms + timings.hold_ms + timings.absence_ms
    elif late:
        _exit(state, orders, "restart: the peer did not echo the absence; the leases stay short")
        return
    else:
        return
    orders.order(ExtendLeases(until_ms))
    _exit(state, orders, "restart: both leases are extended for the announced absence")


def _exit(state: State, orders: Orders, reason: str) -> None:
    state.exited = True
    orders.order(Exit(reason))


# --------------------------------------------------------------------------- when next


def wake_at_ms(state: State, now_ms: int) -> int:
    """When the next turn is due at the latest, if nothing happens before."""
    timings = state.config.timings
    times = [state.last_sent_ms + timings.interval_ms, now_ms + timings.interval_ms]
    if state.send_soon:
        times.append(state.last_sent_ms + timings.interval_ms // 4)
    if state.serving:
        times.append(lease.serve_deadline_ms(state, now_ms))
    elif state.phase in _MAY_TAKE_OVER or state.phase is Phase.TAKEOVER:
        times.append(survey_begins_ms(state))
        times.append(survey_begins_ms(state) + timings.survey_ms)
        if state.idle_since_ms is not None and state.withhold_since_ms is None:
            times.append(state.idle_since_ms + timings.idle_peer_ms)
    if state.token_since_ms is not None:
        times.append(state.token_since_ms + timings.hold_ms)
    future = [at_ms for at_ms in times if at_ms > now_ms]
    return min(future)

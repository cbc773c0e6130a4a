"""Evidence and grants: until when this node may serve, and since when the other one may not.

Pure functions of a state and a time. DESIGN section 4, "Grants" and "Takeover by the passive node".
"""

from __future__ import annotations

from nfsha.core.model import (
    NEVER_MS,
    Datagram,
    Epoch,
    Exclusivity,
    Phase,
)
from nfsha.core.state import State

NO_EVIDENCE_PHASES = frozenset(
    {
        Phase.TAKEOVER,
        Phase.ACTIVE,
        Phase.DIVERGED,
        Phase.FREEZING,
        Phase.FINAL_SYNC,
        Phase.RESTORING,
    }
)
"""An echo sent from one of these phases grants nothing."""

ABOUT_TO_SERVE = frozenset({Phase.TAKEOVER, Phase.FINAL_SYNC, Phase.RESTORING})
"""A peer that is heard in one of these may serve at any moment."""

IDLE_PHASES = frozenset(
    {
        Phase.STARTING,
        Phase.WAITING,
        Phase.RETURNED,
        Phase.ISOLATED,
        Phase.FAULT,
        Phase.MAINTENANCE,
        Phase.PREPARED,
    }
)
"""A peer that is heard in one of these, and does not serve, holds a takeover off for 2 s only."""


def timings_suffice(state: State, peer: Datagram) -> bool:
    """Does the peer wait long enough for this node's own `hold` and locks?"""
    needed_ms = state.config.timings.required_takeover_after_ms(
        service_lease=state.config.service_lease
    )
    return peer.takeover_after_ms >= needed_ms


def peer_heard(state: State, now_ms: int) -> bool:
    """A counted datagram arrived within the last `takeover_after`."""
    return now_ms - state.heard_ms < state.config.timings.takeover_after_ms


def peer_serves(state: State, now_ms: int) -> bool:
    """The peer is heard and serves, or is about to: by a takeover, or a handover to it."""
    report = state.report
    return (
        report is not None
        and peer_heard(state, now_ms)
        and (report.serving or report.phase in ABOUT_TO_SERVE)
    )


def peer_serves_now(state: State, now_ms: int) -> bool:
    """As `peer_serves`, but by a datagram of the last three intervals: it needs no question."""
    recent = now_ms - state.heard_ms <= 3 * state.config.timings.interval_ms
    return recent and peer_serves(state, now_ms)


def recorded_epoch(state: State) -> Epoch | None:
    """The highest epoch known from the authority record, or from a stamp on a volume here.

    A stamp is written after the journal: one above it means that the system disk was restored.
    Both can only forbid.
    """
    known = [epoch for epoch in (state.record_epoch, state.newest_stamp) if epoch is not None]
    return max(known, key=lambda epoch: epoch.number, default=None)


def higher_epoch(state: State) -> Epoch | None:
    """The highest epoch known from the peer or the authority record, if above the own one."""
    best: Epoch | None = None
    if state.report is not None:
        best = state.report.epoch
    record = recorded_epoch(state)
    if record is not None and (best is None or record.number > best.number):
        best = record
    if best is not None and best.number > state.epoch_number:
        return best
    return None


def conflicting_epoch(state: State) -> Epoch | None:
    """The peer's epoch, if it has the own number but is another one: two histories."""
    own = state.epoch
    theirs = state.report.epoch if state.report is not None else None
    if own is None or theirs is None or theirs.number != own.number or theirs == own:
        return None
    return theirs


# --------------------------------------------------------------------------- the holder's side


def standing_evidence(state: State) -> str:
    """Evidence that does not age: the peer's promise, a proof that it is off, or agent-only.

    Agent-only counts only in the boot in which the journal says that this node served: at another
    boot nobody knows what happened meanwhile.
    """
    if state.durable.peer_promise and state.want.peer_promise:
        return "promise"
    if state.peer_down:
        return state.peer_down
    if (
        state.durable.peer_agent_only
        and state.want.peer_agent_only
        and state.durable.boot_id == state.config.boot_id
    ):
        return "agent-only"
    return ""


def token_return_ms(state: State, now_ms: int) -> int:
    """Evidence by the token for a node that does not serve yet (DESIGN 4, the token)."""
    timings = state.config.timings
    if (
        state.token_since_ms is None
        or not state.token_own_record
        or now_ms - state.token_since_ms < timings.hold_ms
    ):
        return NEVER_MS
    return state.token_acked_ms + timings.hold_ms


def return_deadline_ms(state: State, now_ms: int) -> int:
    """Until when a node that does not serve may begin to, but for standing evidence.

    A reachability witness never brings a node back (trace 11).
    """
    deadline_ms = state.echo_ms + state.config.timings.hold_ms
    return max(deadline_ms, token_return_ms(state, now_ms))


def serve_deadline_ms(state: State, now_ms: int) -> int:
    """Until when this node, serving, may go on: the newest evidence plus `hold`."""
    hold_ms = state.config.timings.hold_ms
    if standing_evidence(state):
        return now_ms + hold_ms
    newest_ms = state.echo_ms
    if state.token_since_ms is not None:
        newest_ms = max(newest_ms, state.token_acked_ms)
    if state.config.exclusivity is Exclusivity.WITNESS and not taker_seen(state):
        newest_ms = max(newest_ms, state.witness_ms)
    return newest_ms + hold_ms


def taker_seen(state: State) -> bool:
    """The peer, when last heard, was taking over: only it can say that it gave that up."""
    return state.report is not None and state.report.phase is Phase.TAKEOVER


# --------------------------------------------------------------------------- the taker's side


def takeover_wait_ms(state: State) -> int:
    """How long a grant of this node binds it: `takeover_after` and an announced absence."""
    absence_ms = state.report.absence_ms if state.report is not None else 0
    return state.config.timings.takeover_after_ms + absence_ms


def silence_since_ms(state: State) -> int:
    """Since when nothing was heard, over own consecutive turns only (trace 12)."""
    return max(state.heard_ms, state.chain_since_ms)


def grants_ended(state: State, now_ms: int) -> bool:
    """Takeover condition 1: every grant of this node has run out."""
    wait_ms = takeover_wait_ms(state)
    if now_ms - silence_since_ms(state) >= wait_ms:
        return True
    if state.withhold_since_ms is None and state.phase is not Phase.TAKEOVER:
        return False
    return now_ms - max(state.granted_ms, state.chain_since_ms) >= wait_ms


def survey_fresh(state: State, now_ms: int) -> bool:
    """The last survey is complete, young, and not older than the current chain of turns."""
    survey = state.survey
    return (
        now_ms - survey.ended_ms <= state.config.timings.survey_ms + state.config.timings.margin_ms
        and survey.started_ms >= state.chain_since_ms
    )


def vip_unanswered(state: State, now_ms: int) -> bool:
    """Takeover condition 4: nobody answers for the VIP, on an interface that hears others."""
    survey = state.survey
    if not survey_fresh(state, now_ms) or survey.answered_by is not None:
        return False
    return survey.heard_other or state.forced


def exclusive(state: State, now_ms: int) -> bool:
    """Takeover condition 5: a proof that the other node cannot serve."""
    hold_ms = state.config.timings.hold_ms
    if state.by_operator or state.peer_down:
        return True
    if state.config.exclusivity is Exclusivity.WITNESS:
        return now_ms - state.witness_ms < hold_ms
    return token_exclusive(state, now_ms)


def token_exclusive(state: State, now_ms: int) -> bool:
    """The token is held, alive, and `hold` has passed since it was got."""
    hold_ms = state.config.timings.hold_ms
    return (
        state.config.has_token
        and state.token_since_ms is not None
        and now_ms - state.token_since_ms >= hold_ms
        and now_ms - state.token_acked_ms < hold_ms
    )


def takeover_obstacle(state: State) -> str:
    """Which of takeover conditions 2 and 3, or the promise, forbids a takeover; "" when none.

    Who gave its authority away and then was cut off is no replica of what the receiver may have
    taken over with meanwhile. A token's record tells of that, and who is fenced is off.
    """
    if state.durable.promise or state.want.promise:
        return "promised"
    if not state.known_to_peer:
        return "unknown-to-peer"
    if not state.whole:
        return "not-whole"
    if state.fit is not True:
        return "unfit"
    witness_only = state.config.exclusivity is Exclusivity.WITNESS
    if witness_only and state.prepared is not None and state.out_of_touch_ms is not None:
        return "out-of-touch"
    return ""


def known_number(state: State) -> int:
    """The highest epoch number known here: journaled, recorded, or on a volume's stamp."""
    record = recorded_epoch(state)
    return max(state.epoch_number, record.number if record is not None else 0)


def peer_is_behind(state: State) -> bool:
    """The peer's epoch is below one that this node knows, be it only from the authority record."""
    theirs = state.report.epoch if state.report is not None else None
    return theirs is not None and theirs.number < known_number(state)


def grants(state: State) -> bool:
    """Does the echo in this node's next datagram grant anything?

    Not before the stamps are known: a node whose journal was restored would grant the service to
    older data than lies on its own volumes.
    """
    return (
        state.phase not in NO_EVIDENCE_PHASES
        and not state.serving
        and not peer_is_behind(state)
        and state.volumes_seen
        and state.withhold_since_ms is None
    )

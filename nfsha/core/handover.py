"""The planned move of the authority: what one node makes of what the other one shows.

Pure functions of a state and a time. DESIGN section 6. The receiver names the epoch, the giver
freezes and journals PREPARED, the receiver proves its copy and journals COMMITTED (the epoch with
itself as authority) or ABORTED, never both; only that ends PREPARED, or a takeover with a still
higher epoch.
"""

from __future__ import annotations

from nfsha.core import lease
from nfsha.core.model import GIVING_PHASES, RECEIVING_PHASES, Epoch, Phase, PromiseState
from nfsha.core.state import State

ANSWER_MS = 10_000
"""How long one node waits for the other to do what it asks for: to begin, or to freeze."""


GIVER_ENDED = "the giver ended it"
"""All that a receiver knows of why, by the heartbeats."""


def highest_number(state: State) -> int:
    """The highest epoch number known here, be it only of a handover that was begun."""
    numbers = [lease.known_number(state)]
    for journal in (state.durable, state.want):
        numbers += [epoch.number for epoch in (journal.prepared, journal.aborted) if epoch]
    if state.handover is not None:
        numbers.append(state.handover.number)
    return max(numbers)


def possible(state: State, now_ms: int) -> bool:
    """May this node become the receiver of a handover: is there a giver, and nothing unsettled?"""
    report = state.report
    return (
        report is not None
        and lease.peer_heard(state, now_ms)
        and report.phase is Phase.ACTIVE
        and report.epoch == state.durable.epoch
        and state.want.epoch == state.durable.epoch
        and not state.durable.promise
        and not state.want.promise
        and not state.unsure
        and state.fit is True
        and state.volumes_seen
        and not state.froze
        and not state.stopping
    )


def asked(state: State, now_ms: int) -> bool:
    """Does the giver ask for a handover that this node has not looked at yet?"""
    report = state.report
    if report is None or not report.asks:
        return False
    return (report.session, report.asks) != state.asked_by and possible(state, now_ms)


def peer_could_receive(state: State, now_ms: int) -> bool:
    """Is the peer heard, waiting, and free of a promise that only an exchange can end?"""
    report = state.report
    return (
        report is not None
        and lease.peer_heard(state, now_ms)
        and report.phase in (Phase.PASSIVE, Phase.RETURNED)
        and report.promise is PromiseState.NONE
        and report.epoch == state.durable.epoch
        and report.healthy
    )


def under_way(state: State, now_ms: int) -> bool:
    """Is a handover asked for, or worked on here, or by a peer that is heard?"""
    if state.phase in RECEIVING_PHASES | GIVING_PHASES:
        return True
    report = state.report
    if report is None or not lease.peer_heard(state, now_ms):
        return False
    return bool(state.asks) or report.phase in RECEIVING_PHASES


# --------------------------------------------------------------------------- the giver


def rescuable(state: State, now_ms: int) -> bool:
    """May this serving node, whose service is broken, give its data away before it releases?

    Its volumes can still be read, and the peer could take over, but lacks the last writes. Not for
    longer than `ANSWER_MS`: no client is served meanwhile.
    """
    report = state.report
    since_ms = state.rescue_since_ms
    if (
        report is None
        or not state.config.replication
        or not state.carrier
        or state.stuck
        or not state.storage_fit
        or state.stopping
    ):
        return False
    if since_ms is not None and now_ms - since_ms >= ANSWER_MS:
        return False
    ready = report.phase is Phase.PASSIVE and peer_could_receive(state, now_ms)
    if since_ms is None:
        return ready or receiving(state, now_ms)
    return (ready and state.asks != 0) or receiving(state, now_ms)


def receiver_ready(state: State, now_ms: int) -> bool:
    """Does the peer ask this serving node to freeze, for a handover that may be?

    Not while the disk is in doubt: PREPARED must reach it; nor while this node is about to leave.
    """
    report = state.report
    if report is None or not receiving(state, now_ms) or state.unsure or state.stopping:
        return False
    given = report.handover
    return (
        given is not None
        and report.ready
        and given.authority is state.me.other
        and given.number > highest_number(state)
        and given != state.refuses
        and settled(state)
        and now_ms < state.echo_ms + state.config.timings.hold_ms
    )


def receiver_gone(state: State, now_ms: int) -> str:
    """Why the freeze is for nothing; "" while the receiver waits for its end."""
    report = state.report
    if report is None or not lease.peer_heard(state, now_ms):
        return "the receiver is not heard any more"
    if not receiving(state, now_ms) or report.handover != state.handover or not report.ready:
        return f"the receiver does not work on it any more: it is {report.phase}"
    return ""


def receiving(state: State, now_ms: int) -> bool:
    """Is the peer heard at work on a handover to itself, before it is given anything?"""
    report = state.report
    heard = lease.peer_heard(state, now_ms)
    return report is not None and heard and report.phase is Phase.PRESYNC


def freeze_off(state: State, now_ms: int) -> str:
    """Why the giver ends its freeze and serves on; "" while it goes on."""
    if state.handover_off:
        return state.handover_off
    if now_ms - state.phase_since_ms >= state.config.freeze_limit_ms:
        return f"nothing came to rest within {state.config.freeze_limit_ms} ms"
    return receiver_gone(state, now_ms)


def receiver_works(state: State, now_ms: int) -> bool:
    """Is the receiver heard at work on the epoch that this node gave away to it?"""
    report = state.report
    return (
        report is not None
        and lease.peer_heard(state, now_ms)
        and report.phase in RECEIVING_PHASES
        and report.handover == state.prepared
    )


def aborted_by_receiver(state: State) -> bool:
    """Does the receiver durably say that the epoch given away to it will never be?"""
    given = state.prepared
    report = state.report
    return given is not None and report is not None and report.aborted == given


def settled(state: State) -> bool:
    """Is the disk's word on what was given away the wanted one?"""
    return state.durable.prepared == state.want.prepared and not state.unsure


# --------------------------------------------------------------------------- the receiver


def disowned(state: State, now_ms: int) -> Epoch | None:
    """A handover to this node that the giver is PREPARED for, and nobody here works on.

    Not where this node might have committed it in a life that its journal forgot: a stamp or the
    record would know.
    """
    report = state.report
    if report is None or report.phase is not Phase.PREPARED or report.handover is None:
        return None
    given = report.handover
    known = given in (state.handover, state.want.aborted) or given.authority is not state.me
    settled_here = (
        state.epoch is not None
        and state.volumes_seen
        and not state.commit_ordered
        and state.want.epoch == state.durable.epoch
        and given.number > lease.known_number(state)
    )
    if known or not settled_here or not lease.peer_heard(state, now_ms):
        return None
    return given


def receiving_off(state: State, now_ms: int) -> str:
    """Why the receiver ends what it works on; "" while it goes on."""
    if state.handover_off:
        return state.handover_off
    if state.stopping:
        return "the daemon is stopping"
    if state.fit is False:
        return state.fitness_reason
    report = state.report
    if report is None or not lease.peer_heard(state, now_ms):
        return "the giver is not heard any more"
    if report.refuses == state.handover:
        return GIVER_ENDED
    if state.phase is Phase.PRESYNC:
        return _presync_off(state, now_ms)
    if report.phase is not Phase.PREPARED or report.handover != state.handover:
        return f"the giver is not prepared for it any more: it is {report.phase}"
    if now_ms - state.final_since_ms >= state.config.final_limit_ms:
        return f"not proved within {state.config.final_limit_ms} ms of freeze"
    return ""


def _presync_off(state: State, now_ms: int) -> str:
    report = state.report
    if report is None:
        return "the giver is not heard any more"
    ours = report.handover == state.handover
    if report.phase is Phase.ACTIVE:
        late = state.presync_ready and now_ms - state.ready_since_ms >= ANSWER_MS
        return "the giver did not freeze" if late else ""
    if report.phase in (Phase.FREEZING, Phase.PREPARED) and ours:
        late = now_ms - state.ready_since_ms >= ANSWER_MS + state.config.freeze_limit_ms
        return "the giver did not come to rest" if late else ""
    return f"the giver does not serve any more: it is {report.phase}"


def why_off(state: State, now_ms: int) -> str:
    """Why the handover that this node works on ends; "" while it goes on."""
    return freeze_off(state, now_ms) if state.serving else receiving_off(state, now_ms)


def giver_prepared(state: State) -> bool:
    """Does the giver durably say that it gave its authority away to this node's handover?"""
    report = state.report
    return (
        report is not None
        and report.phase is Phase.PREPARED
        and report.ready
        and report.handover == state.handover
    )


def giver_bound(state: State, now_ms: int) -> bool:
    """Is the giver's grant young: will it not take over for at least `takeover_after`?"""
    return now_ms < state.echo_ms + state.config.timings.hold_ms

"""What a row does besides changing the phase: changes of the state, and actions to order.

An effect never chooses: everything that it needs was decided by the guard. Nothing outside the
table calls one.
"""

from __future__ import annotations

import hashlib

from nfsha.core import handover, lease
from nfsha.core.model import (
    NEVER_MS,
    AddAddress,
    Announce,
    CloseService,
    DropToken,
    Epoch,
    Freeze,
    MountVolumes,
    OpenService,
    Phase,
    RemoveAddress,
    RenewAddress,
    StopReceivers,
    TakeToken,
)
from nfsha.core.orders import Orders
from nfsha.core.state import HandoverEnd, State

STOP_WAIT_MS = 1000
"""How long a stopping node waits for the peer to echo its promise or its announced absence."""


def new_epoch(state: State) -> Epoch:
    """The next epoch, with this node as its authority.

    The id is derived from the session, which is random and new at each start; a number rises within
    a session, so the same id never comes twice.
    """
    theirs = state.report.known_number if state.report is not None else 0
    higher = lease.higher_epoch(state)
    number = max(handover.highest_number(state), higher.number if higher else 0, theirs) + 1
    if state.want.epoch is not None:
        number = max(number, state.want.epoch.number + 1)
    if state.report is not None and state.report.phase in (Phase.TAKEOVER, Phase.PREPARED):
        number += (
            1  # the peer may have taken the next one unheard: two of a number are two histories
        )
    seed = f"{state.me}:{state.session}:{number}".encode()
    return Epoch(number, hashlib.sha256(seed).hexdigest()[:16], state.me)


def nothing(state: State, orders: Orders, now_ms: int) -> None:
    """The row only changes, or explains, the phase."""


def release(state: State, orders: Orders, now_ms: int) -> None:
    """Closes the service, takes the address away, and gives the token back."""
    state.adopted = False
    state.maintenance_serving = False
    state.service_open = False
    state.lease_lost = ""
    state.repair = ""
    state.commit_ordered = False
    state.absence_granted_ms = NEVER_MS
    state.absence_from_seq = 0
    state.asks = 0
    state.rescue_since_ms = None
    _end_handover(state)
    orders.cancel("address")
    orders.cancel("service")
    if state.phase is Phase.FREEZING:
        orders.cancel("freeze")  # nobody needs its end any more: a thaw stops it
    orders.order(CloseService())
    orders.order(RemoveAddress())
    state.address_removed_ms = now_ms
    if state.config.has_token:
        state.token_since_ms = None
        orders.order(DropToken())
    if state.want.active:
        state.journal(active=False)


def isolate(state: State, orders: Orders, now_ms: int) -> None:
    """Releases; a proof or word that the peer is off must be gained anew."""
    if state.commit_ordered and state.handover is not None:
        _ended(state, state.handover, now_ms, "moved, but this node could not serve at once", True)
    release(state, orders, now_ms)
    state.peer_down = ""
    _leave_takeover(state, orders)


def follow(state: State, orders: Orders, now_ms: int) -> None:
    """Releases, and records the higher epoch."""
    higher, given = lease.higher_epoch(state), state.prepared
    if given is not None and higher is not None:
        done = higher == given
        _ended(state, given, now_ms, "done" if done else f"epoch {higher} came instead", done)
    release(state, orders, now_ms)
    _leave_takeover(state, orders)
    record_epoch(state, orders, now_ms)


def record_epoch(state: State, orders: Orders, now_ms: int) -> None:
    """Orders the higher epoch into the journal.

    But not one of this node's own that its journal does not know: once written there, the next
    daemon would take this node for the authority that it was before its disk was replaced.
    """
    higher = lease.higher_epoch(state)
    if higher is not None and higher.authority is not state.me:
        given = higher if higher == state.want.prepared else None
        state.journal(epoch=higher, peer_promise=False, peer_agent_only=False, prepared=given)


def first_epoch(state: State, orders: Orders, now_ms: int) -> None:
    """Orders epoch 1 of a new pair."""
    state.journal(epoch=new_epoch(state))


def enter_passive(state: State, orders: Orders, now_ms: int) -> None:
    """Begins to wait with nothing withheld."""
    _leave_takeover(state, orders)


def begin_takeover(state: State, orders: Orders, now_ms: int) -> None:
    """Stops echoing and receiving, and touches the token where there is one."""
    state.withhold_since_ms = None
    state.send_soon = True
    state.fence_failed_ms = NEVER_MS
    state.mount_failures = 0
    if state.config.replication:
        state.receivers_stopped = False
        orders.order(StopReceivers())
    if state.config.has_token:
        orders.order(TakeToken())
        state.token_tried_ms = now_ms


def activate(state: State, orders: Orders, now_ms: int) -> None:
    """Begins a takeover on the operator's word (`forced` was set with the command)."""
    state.by_operator = True
    if state.want.maintenance:
        state.journal(maintenance=False)
    if not lease.peer_heard(state, now_ms):
        state.peer_down = "operator"
    begin_takeover(state, orders, now_ms)


def give_up_takeover(state: State, orders: Orders, now_ms: int) -> None:
    """Ends a takeover that has ordered nothing yet; the token goes back."""
    if state.config.has_token:
        state.token_since_ms = None
        orders.order(DropToken())
    _leave_takeover(state, orders)


def mount(state: State, orders: Orders, now_ms: int) -> None:
    """Runs the mount hook: nothing is served before the volumes are mounted."""
    state.mounting = True
    state.volumes_mounted = None
    orders.order(MountVolumes(state.epoch))


def commit(state: State, orders: Orders, now_ms: int) -> None:
    """Orders the new epoch into the journal: from here there is no way back."""
    if state.prepared is not None:
        _ended(state, state.prepared, now_ms, "the receiver was gone: this node took over")
    state.journal(
        epoch=new_epoch(state),
        active=True,
        boot_id=state.config.boot_id,
        promise=False,
        peer_promise=False,
        peer_agent_only=state.report is not None and state.report.agent_only,
        maintenance=False,
        prepared=None,
    )
    state.commit_ordered = True
    orders.cancel("fence")


def begin_receiving(state: State, orders: Orders, now_ms: int) -> None:
    """Names the epoch of a handover to this node, and begins to come near to the giver's data."""
    _leave_takeover(state, orders)
    if state.report is not None:
        state.asked_by = (state.report.session, state.report.asks)
    state.handover = new_epoch(state)
    state.handover_off = ""
    state.presync_ready = not state.config.replication
    state.ready_since_ms = now_ms
    state.final_proved = False
    state.final_since_ms = NEVER_MS
    state.send_soon = True


def ask_peer(state: State, orders: Orders, now_ms: int) -> None:
    """Asks the peer to begin a handover to itself."""
    state.asks = state.seq + 1
    state.asked_ms = now_ms
    state.withdrawn_from_seq = 0
    state.refuses = None
    state.send_soon = True


def rescue(state: State, orders: Orders, now_ms: int) -> None:
    """The service is broken, the data is not: the peer shall have all of it before it serves."""
    state.rescue_since_ms = now_ms
    if not state.asks and not handover.receiving(state, now_ms):
        ask_peer(state, orders, now_ms)


def end_rescue(state: State, orders: Orders, now_ms: int) -> None:
    """The service works again before it was held for the peer: nothing has to move."""
    state.rescue_since_ms = None
    abort_giving(state, orders, now_ms)


def finish_receiving(state: State, orders: Orders, now_ms: int) -> None:
    """The giver is prepared: the last pass and the proof are due."""
    state.final_since_ms = now_ms
    state.final_proved = not state.config.replication
    state.echo_ms = NEVER_MS  # only what the giver grants from now on binds it


def restore(state: State, orders: Orders, now_ms: int) -> None:
    """Proved: nothing may write here any more but the clients."""
    state.mount_failures = 0
    if state.config.replication:
        state.receivers_stopped = False
        orders.order(StopReceivers())


def commit_handover(state: State, orders: Orders, now_ms: int) -> None:
    """Orders COMMITTED into the journal."""
    state.journal(
        epoch=state.handover,
        active=True,
        boot_id=state.config.boot_id,
        promise=False,
        peer_promise=False,
        peer_agent_only=state.report is not None and state.report.agent_only,
        prepared=None,
    )
    state.commit_ordered = True


def abort_receiving(state: State, orders: Orders, now_ms: int) -> None:
    """Ends a handover to this node. Once the giver was asked to freeze, ABORTED is journaled.

    COMMITTED may be on its way to the disk, or on it: then ABORTED replaces it, and is shown only
    once the disk has it.
    """
    if state.handover is not None:
        _ended(state, state.handover, now_ms, _why_receiving_ended(state, now_ms))
    if state.presync_ready:
        state.journal(
            epoch=state.durable.epoch,
            active=state.durable.active,
            boot_id=state.durable.boot_id,
            aborted=state.handover,
        )
    state.commit_ordered = False
    _end_handover(state)


def disown(state: State, orders: Orders, now_ms: int) -> None:
    """Journals ABORTED for a handover that nobody here works on."""
    given = handover.disowned(state, now_ms)
    if given is not None:
        state.journal(aborted=given)


def begin_freeze(state: State, orders: Orders, now_ms: int) -> None:
    """Closes the service: clients are held from here on."""
    state.handover = state.report.handover if state.report is not None else None
    state.handover_off = ""
    state.asks = 0
    state.frozen = False
    state.froze = True
    state.froze_ms = now_ms
    state.service_open = False
    state.send_soon = True
    orders.cancel("service")
    orders.order(CloseService())
    orders.order(Freeze())


def end_freeze(state: State, orders: Orders, now_ms: int) -> None:
    """The giver ends its freeze; it serves again on fresh evidence, as soon as it is thawed."""
    state.refuses = state.handover
    if state.handover is not None:
        why = handover.freeze_off(state, now_ms) or state.lease_lost or "the evidence ran out"
        _ended(state, state.handover, now_ms, why)
    isolate(state, orders, now_ms)


def prepare(state: State, orders: Orders, now_ms: int) -> None:
    """Gives the authority away: the address goes, PREPARED is ordered. No way back from here."""
    given = state.handover
    release(state, orders, now_ms)
    state.peer_down = ""
    state.journal(prepared=given)


def take_back(state: State, orders: Orders, now_ms: int) -> None:
    """The receiver's ABORTED ends PREPARED: at once, for it stands in that one's journal."""
    given = state.prepared
    if given is not None:
        _ended(state, given, now_ms, "the other node ended it (its `nfsha status` says why)")
    state.given_back = given
    state.journal(prepared=None)


def abort_giving(state: State, orders: Orders, now_ms: int) -> None:
    """The operator ends a handover on the giver's side: the receiver is told."""
    if state.asks:
        state.withdrawn_from_seq = state.seq + 1
    state.asks = 0
    if state.phase is Phase.PREPARED:
        state.refuses = state.prepared
    elif state.report is not None:
        state.refuses = state.report.handover
    if state.phase is Phase.FREEZING:
        state.handover_off = "the operator ended it"
    state.send_soon = True


def abort_here(state: State, orders: Orders, now_ms: int) -> None:
    """The operator ends a handover on the receiver's side."""
    state.handover_off = "the operator ended it"


def resolve(state: State, orders: Orders, now_ms: int) -> None:
    """Orders a new epoch above both histories; service comes with the peer's echo."""
    state.journal(epoch=new_epoch(state), promise=False, peer_promise=False, prepared=None)


def serve(state: State, orders: Orders, now_ms: int) -> None:
    """Takes the address, opens the service, and announces, in this order."""
    deadline_ms = lease.serve_deadline_ms(state, now_ms)
    _forget_attempt(state)
    orders.order(AddAddress(deadline_ms))
    orders.order(OpenService(deadline_ms))
    _served(state, orders, now_ms, "this node serves now")
    state.service_until_ms = deadline_ms


def adopt(state: State, orders: Orders, now_ms: int) -> None:
    """Goes on with the address that a former run of this daemon left in the kernel."""
    deadline_ms = lease.serve_deadline_ms(state, now_ms)
    state.adopted = False
    state.maintenance_serving = state.durable.maintenance
    orders.order(RenewAddress(deadline_ms))
    orders.order(OpenService(deadline_ms))
    _served(state, orders, now_ms, "the daemon was restarted")
    state.service_until_ms = deadline_ms


def repair(state: State, orders: Orders, now_ms: int) -> None:
    """Puts back what somebody else took away."""
    deadline_ms = lease.serve_deadline_ms(state, now_ms)
    if "address" in state.repair:
        orders.order(AddAddress(deadline_ms))
        state.address_renewed_ms = now_ms
    if "ruleset" in state.repair:
        orders.order(OpenService(deadline_ms))
        state.service_until_ms = deadline_ms
    orders.order(Announce("put back: " + state.repair))
    state.announced_ms = now_ms
    state.repaired_ms = now_ms
    state.repair = ""


def enter_maintenance(state: State, orders: Orders, now_ms: int) -> None:
    """Remembers maintenance, and promises unless this node is the authority."""
    state.maintenance_serving = state.serving
    state.withhold_since_ms = None
    state.journal(maintenance=True)
    if _may_promise(state):
        state.journal(promise=True)


def leave_maintenance(state: State, orders: Orders, now_ms: int) -> None:
    """Forgets maintenance; the promise ends only by a seen exchange."""
    state.maintenance_serving = False
    state.journal(maintenance=False)


def confirm_peer_down(state: State, orders: Orders, now_ms: int) -> None:
    """Takes the operator's word, until the peer is heard again."""
    state.peer_down = "operator"


def begin_stop(state: State, orders: Orders, now_ms: int) -> None:
    """A final stop of a node that does not serve: it promises, unless it is the authority."""
    if state.adopted:
        release(state, orders, now_ms)
    state.stopping = "stop"
    _promise_and_wait(state, now_ms)


def stop_serving(state: State, orders: Orders, now_ms: int) -> None:
    """A final stop of the serving node: it releases; an authority promises nothing."""
    state.stopping = "stop"
    state.stop_by_ms = now_ms + STOP_WAIT_MS
    release(state, orders, now_ms)


def begin_restart(state: State, orders: Orders, now_ms: int) -> None:
    """A planned restart of a node that does not serve: as a stop, with the promise shown."""
    state.stopping = "restart"
    _promise_and_wait(state, now_ms)


def restart_serving(state: State, orders: Orders, now_ms: int) -> None:
    """A planned restart of the serving node: announces its absence."""
    state.stopping = "restart"
    state.stop_by_ms = now_ms + STOP_WAIT_MS
    state.absence_from_seq = state.seq + 1
    state.send_soon = True


def _promise_and_wait(state: State, now_ms: int) -> None:
    state.stop_by_ms = now_ms + STOP_WAIT_MS
    state.withhold_since_ms = None
    state.send_soon = True
    if state.epoch is not None and not state.commit_ordered and _may_promise(state):
        state.journal(promise=True)


def _may_promise(state: State) -> bool:
    """Not an authority; nor one that knows of newer data than the peer would then serve."""
    behind = lease.known_number(state) > state.epoch_number
    return not state.is_authority and not behind and state.volumes_seen


def _served(state: State, orders: Orders, now_ms: int, reason: str) -> None:
    state.address_renewed_ms = now_ms
    state.service_open = True
    if state.handover is not None:
        _ended(state, state.handover, now_ms, "done", done=True)
    _end_handover(state)
    state.lease_lost = ""
    state.repair = ""
    state.commit_ordered = False
    orders.order(Announce(reason))
    state.announced_ms = now_ms
    if state.stopping == "restart":
        restart_serving(state, orders, now_ms)  # asked for while the new epoch was ordered
    if not state.want.active or state.want.boot_id != state.config.boot_id:
        state.journal(active=True, boot_id=state.config.boot_id)


def _ended(state: State, epoch: Epoch, now_ms: int, why: str, done: bool = False) -> None:
    state.last_handover = HandoverEnd(now_ms, epoch, done, why)


def _why_receiving_ended(state: State, now_ms: int) -> str:
    if state.commit_ordered and state.persist_error:
        return f"the new epoch could not be written: {state.persist_error}"
    return handover.receiving_off(state, now_ms)


def _end_handover(state: State) -> None:
    state.handover = None
    state.handover_off = ""
    state.presync_ready = False
    state.final_proved = False
    state.frozen = False


def _forget_attempt(state: State) -> None:
    state.by_operator = False
    state.forced = False
    state.withhold_since_ms = None


def _leave_takeover(state: State, orders: Orders) -> None:
    _forget_attempt(state)
    state.commit_ordered = False
    orders.cancel("fence")

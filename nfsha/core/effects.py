"""What a row does besides changing the phase: changes of the state, and actions to order.

An effect never chooses: everything that it needs was decided by the guard. Nothing outside the
table calls one.
"""

from __future__ import annotations

import hashlib

from nfsha.core import lease
from nfsha.core.model import (
    NEVER_MS,
    AddAddress,
    Announce,
    CloseService,
    DropToken,
    Epoch,
    MountVolumes,
    OpenService,
    RemoveAddress,
    RenewAddress,
    StopReceivers,
    TakeToken,
)
from nfsha.core.orders import Orders
from nfsha.core.state import State

STOP_WAIT_MS = 1000
"""How long a stopping node waits for the peer to echo its promise or its announced absence."""


def new_epoch(state: State) -> Epoch:
    """The next epoch, with this node as its authority.

    The id is derived from the session, which is random and new at each start; a number rises within
    a session, so the same id never comes twice.
    """
    theirs = state.report.known_number if state.report is not None else 0
    higher = lease.higher_epoch(state)
    number = max(lease.known_number(state), higher.number if higher else 0, theirs) + 1
    if state.want.epoch is not None:
        number = max(number, state.want.epoch.number + 1)
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
    orders.cancel("address")
    orders.cancel("service")
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
    release(state, orders, now_ms)
    state.peer_down = ""
    _leave_takeover(state, orders)


def follow(state: State, orders: Orders, now_ms: int) -> None:
    """Releases, and records the higher epoch."""
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
        state.journal(epoch=higher, peer_promise=False, peer_agent_only=False)


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
    state.journal(
        epoch=new_epoch(state),
        active=True,
        boot_id=state.config.boot_id,
        promise=False,
        peer_promise=False,
        peer_agent_only=state.report is not None and state.report.agent_only,
        maintenance=False,
    )
    state.commit_ordered = True
    orders.cancel("fence")


def resolve(state: State, orders: Orders, now_ms: int) -> None:
    """Orders a new epoch above both histories; service comes with the peer's echo."""
    state.journal(epoch=new_epoch(state), promise=False, peer_promise=False)


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
    state.lease_lost = ""
    state.repair = ""
    state.commit_ordered = False
    orders.order(Announce(reason))
    state.announced_ms = now_ms
    if not state.want.active or state.want.boot_id != state.config.boot_id:
        state.journal(active=True, boot_id=state.config.boot_id)


def _forget_attempt(state: State) -> None:
    state.by_operator = False
    state.forced = False
    state.withhold_since_ms = None


def _leave_takeover(state: State, orders: Orders) -> None:
    _forget_attempt(state)
    state.commit_ordered = False
    orders.cancel("fence")

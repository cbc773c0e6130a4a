"""When the hooks mount and give up the volumes of a block replica (`replication = "off"`).

Somebody else replicates the blocks (DRBD), and lets one node only have them mounted. So a node
mounts before it serves, gives them up once it does not serve any more, and runs one hook at a time.
Pure judgements of a state and a time; where there are no hooks, the volumes are simply there.
"""

from __future__ import annotations

from nfsha.core import lease
from nfsha.core.model import Phase
from nfsha.core.state import State

RETRY_FIRST_MS = 500
RETRY_MOST_MS = 30_000
"""The pause after a hook that failed; it doubles with each failure, up to the second number."""

MOUNTED_FOR_MS = 2000
"""So long after the mount hook's end an authority keeps what it mounted to serve, while its
evidence has a gap, or until the hook is tried again."""


def ready(state: State) -> bool:
    """This node may serve what lies on its volumes: they are mounted, or no hook mounts them."""
    return not state.config.has_hooks or state.volumes_mounted is True


def given_up(state: State) -> bool:
    """No hook has anything left to give up."""
    return not state.config.has_hooks or state.volumes_mounted is False


def mount_due(state: State, now_ms: int) -> bool:
    """May the mount hook be run now? No hook runs, and the pause after a failure is over."""
    if "volumes" in state.flights:
        return False
    return now_ms - state.mount_ended_ms >= _pause_ms(state.mount_failures)


def unmount_due(state: State, now_ms: int) -> bool:
    """Has the node to give its volumes up now? Only once neither lock of its own stands."""
    if given_up(state) or kept(state, now_ms):
        return False
    if state.address_held or "address" in state.flights or "service" in state.flights:
        return False
    if state.mounting:
        return True
    if "volumes" in state.flights:
        return False
    return now_ms - state.unmount_ended_ms >= _pause_ms(state.unmount_failures)


def kept(state: State, now_ms: int) -> bool:
    """Shall what is mounted, or is being mounted, stay?

    A gap in the evidence of a node that is about to serve is no reason to unmount at once; that the
    other one serves or takes over is.
    """
    if state.serving or state.phase in (Phase.TAKEOVER, Phase.RESTORING):
        return True
    if (
        state.phase not in (Phase.WAITING, Phase.ISOLATED)
        or not state.is_authority
        or state.stopping
        or lease.peer_serves(state, now_ms)
    ):
        return False
    return state.mounting or now_ms - state.mount_ended_ms < MOUNTED_FOR_MS


def _pause_ms(failures: int) -> int:
    if not failures:
        return 0
    return min(RETRY_FIRST_MS << min(failures - 1, 16), RETRY_MOST_MS)

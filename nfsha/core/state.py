"""All that one node's decisions rest on, in one value.

`decide` works on a copy of its own (`State.copy`), so that a state once returned never changes.
Nothing here decides: the rules stand in `guards`, `effects` and `duties`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from operator import attrgetter

from nfsha.core.model import (
    NEVER_MS,
    CoreConfig,
    Datagram,
    Echo,
    Epoch,
    Journal,
    Phase,
    PromiseState,
    Role,
)

SENT_KEPT = 128
"""How many sending times are kept: an echo older than these is older than any lease."""


@dataclass(frozen=True, slots=True)
class Flight:
    """An action whose result is still awaited."""

    number: int
    deadline_ms: int


@dataclass(frozen=True, slots=True)
class SurveyResult:
    """The last complete answer to "does anybody answer for the VIP"."""

    started_ms: int = NEVER_MS
    ended_ms: int = NEVER_MS
    answered_by: str | None = None
    heard_other: bool = False


@dataclass(frozen=True, slots=True)
class HandoverEnd:
    """How the last handover that this run knows of ended, for the operator."""

    at_ms: int
    epoch: Epoch
    done: bool
    """The receiver has the authority."""
    why: str


@dataclass(slots=True)
class State:
    """One node, as its engine sees it. Times in milliseconds of its own CLOCK_BOOTTIME."""

    config: CoreConfig
    session: int
    started_ms: int
    phase: Phase = Phase.STARTING
    phase_since_ms: int = NEVER_MS
    row: str = ""
    why: str = ""
    row_since_ms: int = NEVER_MS

    # journal
    durable: Journal = field(default_factory=Journal)
    want: Journal = field(default_factory=Journal)
    journal_missing: bool = False
    journal_corrupt: str = ""
    writing: Journal = field(default_factory=Journal)
    """What the newest write of the journal says."""
    unsure: bool = False
    """A write failed: the disk may hold it, or what was there before, until one succeeds."""
    unsure_promise_kept: bool = True
    """All that the disk may hold says that this node promised, as `durable` does."""
    unsure_peer_promise: bool = False
    """Something that the disk may hold says that the peer promised."""
    unsure_prepared: Epoch | None = None
    """Something that the disk may hold says that the authority was given away to this epoch."""
    persist_error: str = ""
    persist_failed_ms: int = NEVER_MS

    # own turns
    last_turn_ms: int = NEVER_MS
    turn_gap_ms: int = 0
    chain_since_ms: int = NEVER_MS
    """Since when the own turns are at most two intervals apart."""

    # sending
    seq: int = 0
    sent_ms: tuple[int, ...] = ()
    """Sending times of the newest datagrams, the newest last."""
    last_sent_ms: int = NEVER_MS
    shown: tuple[object, ...] = ()
    send_soon: bool = False
    granted_ms: int = NEVER_MS
    """When the newest datagram that this node granted was received."""

    # the peer
    peer_session: int = 0
    peer_seq: int = 0
    heard_ms: int = NEVER_MS
    report: Datagram | None = None
    echoed_high: int = 0
    """The newest own datagram that any counted datagram echoed."""
    idle_since_ms: int | None = None
    """Since when the peer is heard, but neither serves nor is about to."""
    pending: tuple[Echo, ...] = ()
    known_to_peer: bool = False
    """The peer echoed this session as a confirmed one: it knows that this node is up."""
    record_epoch: Epoch | None = None

    # evidence
    echo_ms: int = NEVER_MS
    witness_ms: int = NEVER_MS
    witness_asked_ms: int = NEVER_MS
    token_since_ms: int | None = None
    token_own_record: bool = False
    token_acked_ms: int = NEVER_MS
    token_tried_ms: int = NEVER_MS
    published_ms: int = NEVER_MS
    peer_down: str = ""
    """Proof or word that the peer is off: "", "fence" or "operator"."""

    # the world
    service_fit: bool | None = None
    service_reason: str = "not checked yet"
    storage_fit: bool = True
    """The volumes are mounted; only with `service_fit` False it says something."""
    rescue_since_ms: int | None = None
    """Since when this serving node, whose service is broken, waits for the peer to receive."""
    replica_whole: bool = False
    replica_epoch: Epoch | None = None
    """The epoch that `replica_whole` was found for."""
    replica_reason: str = "the volumes were not looked at yet"
    stamped: bool = False
    newest_stamp: Epoch | None = None
    """The highest epoch that a volume here bears now."""
    volumes_seen: bool = True
    """The stamps of this node's volumes are known, or nobody uses them."""
    receivers_stopped: bool = True
    """Nothing receives data, as far as a takeover asked for it."""
    receivers_stuck: str = ""
    """Why a receiving process cannot be ended."""
    receivers_tried_ms: int = NEVER_MS
    volumes_mounted: bool | None = None
    """By the hooks: mounted, given up, or not known (None: a former run's, or a hook failed)."""
    mounting: bool = False
    """The mount hook runs."""
    mount_ended_ms: int = NEVER_MS
    mount_failures: int = 0
    """How many runs of the mount hook failed since the last good one."""
    mount_trouble: str = ""
    """What the last run of the mount hook failed with; "" after a good one."""
    unmount_ended_ms: int = NEVER_MS
    unmount_failures: int = 0
    unmount_trouble: str = ""
    hook_news: str = ""
    """What a hook's end is called until its row has fired."""
    carrier: bool = True
    address_held: bool = False
    leftover: tuple[str, ...] = ()
    """Locks that a former run left in the kernel, for how long nobody knows: not yet renewed by
    this run."""
    address_renewed_ms: int = NEVER_MS
    address_removed_ms: int = NEVER_MS
    service_open: bool = False
    service_until_ms: int = NEVER_MS
    lease_lost: str = ""
    lease_lost_ms: int = NEVER_MS
    repair: str = ""
    """What somebody else took away: "", "address", "ruleset" or both."""
    repaired_ms: int = NEVER_MS
    claimed_by: str = ""
    claimed_ms: int = NEVER_MS
    announced_ms: int = NEVER_MS
    survey: SurveyResult = field(default_factory=SurveyResult)
    vip_answered_since_ms: int | None = None

    # takeover
    adopted: bool = False
    withhold_since_ms: int | None = None
    by_operator: bool = False
    forced: bool = False
    commit_ordered: bool = False
    commit_durable_ms: int = NEVER_MS
    fence_session: int = 0
    """The peer's session when the fence agent was started."""
    fence_proved_ms: int = NEVER_MS
    """When the agent proved the peer off."""
    fence_failed_ms: int = NEVER_MS

    # handover
    handover: Epoch | None = None
    """The epoch of the handover that this node works on."""
    handover_off: str = ""
    """Why this node ends the handover that it works on."""
    presync_ready: bool = False
    ready_since_ms: int = NEVER_MS
    """Since when the giver is asked to freeze."""
    final_since_ms: int = NEVER_MS
    """Since when the giver is known to be prepared: the clients are held."""
    final_proved: bool = False
    frozen: bool = False
    """Nothing writes any more, and all is on the disk."""
    froze: bool = False
    """A freeze was begun, and its end is not proved yet."""
    stuck_frozen: str = ""
    """Why a freeze cannot be ended."""
    out_of_touch_ms: int | None = None
    """Since when a giver in PREPARED cannot know whether the receiver took over and is gone."""
    froze_ms: int = NEVER_MS
    """When the last freeze was begun."""
    thaw_tried_ms: int = NEVER_MS
    last_handover: HandoverEnd | None = None
    given_back: Epoch | None = None
    """An epoch given away that the receiver durably said will never be. The disk may still say
    otherwise: then the next daemon asks the receiver again."""
    refuses: Epoch | None = None
    """A handover of the peer that this node wants ended."""
    asks: int = 0
    """This node asks the peer to begin a handover."""
    asked_ms: int = NEVER_MS
    withdrawn_from_seq: int = 0
    """The first own datagram that does not ask any more; 0 once the peer is seen to know."""
    asked_by: tuple[int, int] = (0, 0)
    """The peer's session and number of the last request that was looked at."""

    # maintenance, stop
    maintenance_serving: bool = False
    stopping: str = ""
    stop_by_ms: int = NEVER_MS
    absence_from_seq: int = 0
    absence_granted_ms: int = NEVER_MS
    promise_from_seq: int = 0
    promise_echoed: bool = False
    clearing_from_seq: int = 0
    exited: bool = False

    # in flight
    next_action: int = 1
    flights: dict[str, Flight] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)

    def copy(self) -> State:
        """A copy that may be changed without changing this one."""
        twin = State(*_VALUES(self))
        twin.flights = dict(self.flights)
        twin.counters = dict(self.counters)
        return twin

    def count(self, what: str) -> None:
        """Counts one occurrence for the metrics."""
        self.counters[what] = self.counters.get(what, 0) + 1

    def journal(self, **changes: object) -> None:
        """Changes what the journal shall say; a duty writes it."""
        self.want = replace(self.want, **changes)  # type: ignore[arg-type]

    def journal_if(self, **changes: object) -> None:
        """As `journal`, but makes no new value where nothing changes (each datagram comes here)."""
        if any(getattr(self.want, name) != value for name, value in changes.items()):
            self.journal(**changes)

    # ------------------------------------------------------------- derived

    @property
    def me(self) -> Role:
        """This node's role."""
        return self.config.role

    @property
    def epoch(self) -> Epoch | None:
        """The durable epoch: the only one that may be shown or stood on."""
        return self.durable.epoch

    @property
    def epoch_number(self) -> int:
        """The durable epoch's number; 0 when there is none."""
        return self.durable.epoch.number if self.durable.epoch else 0

    @property
    def is_authority(self) -> bool:
        """The durable journal says that this node's data is the truth."""
        return self.durable.epoch is not None and self.durable.epoch.authority is self.me

    @property
    def serving(self) -> bool:
        """This node accepts clients, or holds the address: by an adoption, or in a freeze."""
        return (
            self.phase is Phase.ACTIVE
            or (self.phase is Phase.MAINTENANCE and self.maintenance_serving)
            or (self.phase is Phase.STARTING and self.adopted)
            or self.phase is Phase.FREEZING
        )

    @property
    def whole(self) -> bool:
        """This node's data may be served as that of the journaled epoch.

        An authority's own data is the truth. Where somebody else replicates, it is taken as given.
        """
        if not self.config.replication or self.is_authority or self.handed_over:
            return True
        return self.replica_whole and self.replica_epoch == self.durable.epoch

    @property
    def handed_over(self) -> bool:
        """The journaled epoch began with the proof that the volumes here hold its data.

        Not where a stamp here knows of a later epoch: then the journal is a restored one, and what
        was proved once was written over since.
        """
        epoch, stamp = self.durable.epoch, self.newest_stamp
        if epoch is None or self.durable.prepared != epoch:
            return False
        return stamp is None or stamp.number < epoch.number or stamp == epoch

    @property
    def prepared(self) -> Epoch | None:
        """The epoch to which this node gave its authority away, and which it has not seen begin.

        As soon as it is ordered, and as long as the disk may have it, unless the receiver gave it
        back.
        """
        on_its_way = self.writing.prepared if "persist" in self.flights else None
        for given in (self.want.prepared, self.durable.prepared, on_its_way, self.unsure_prepared):
            if given not in (None, self.given_back) and given.number > self.epoch_number:
                return given
        return None

    @property
    def whole_reason(self) -> str:
        """Why this node is not whole."""
        if self.replica_whole and self.replica_epoch != self.durable.epoch:
            return "the volumes hold the data of another epoch"
        return self.replica_reason

    @property
    def fit(self) -> bool | None:
        """Own service, storage and the VIP's carrier: sound, broken, or not known yet (None)."""
        return self.service_fit if self.carrier and not self.stuck else False

    @property
    def stuck(self) -> str:
        """What of a former decision cannot be undone, and forbids to serve; "" when nothing."""
        if self.receivers_stuck:
            return f"a receiving process cannot be ended: {self.receivers_stuck}"
        if self.stuck_frozen:
            return f"the volumes stay frozen: {self.stuck_frozen}"
        return ""

    @property
    def fitness_reason(self) -> str:
        """Why `fit` is as it is."""
        if self.stuck:
            return self.stuck
        return self.service_reason if self.carrier else "the VIP's interface has no carrier"

    @property
    def blank(self) -> bool:
        """A new node: its journal is missing, not corrupt, and no volume bears a stamp."""
        return self.journal_missing and self.durable.epoch is None and not self.stamped

    @property
    def promise_state(self) -> PromiseState:
        """The own promise, as it may be shown: durable first."""
        if not self.durable.promise:
            return PromiseState.NONE
        if not self.unsure_promise_kept:
            return PromiseState.CLEARING
        if self.phase is Phase.MAINTENANCE or self.stopping or self.phase is Phase.STARTING:
            return PromiseState.STANDING
        return PromiseState.CLEARING

    @property
    def committed(self) -> bool:
        """The epoch ordered by this takeover is on the disk."""
        return self.commit_ordered and self.durable.epoch == self.want.epoch


_VALUES = attrgetter(*(one.name for one in fields(State)))
"""All fields in the order of the constructor: the quickest copy (one is made each turn)."""

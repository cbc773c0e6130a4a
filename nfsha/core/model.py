"""The words of the decisions: roles, phases, epochs, journal, datagrams, inputs and actions.

Plain values only. Nothing here decides, reads a clock, or touches the world. All times are
whole milliseconds of CLOCK_BOOTTIME of this node; a rounding of one millisecond is covered by the
configured margin (at least one heartbeat interval).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

NEVER_MS = -(10**15)
"""A moment before all others: evidence that was never had."""

ADDRESS_LATE_MS = 400
"""How late the kernel removes an address whose lifetime ended (measured: 0 to 390 ms)."""


class Role(StrEnum):
    """The fixed role of a node; it never changes at run time, and names the node in epochs."""

    PRIMARY = "primary"
    STANDBY = "standby"

    @property
    def other(self) -> Role:
        """The role of the other node of the pair."""
        return Role.STANDBY if self is Role.PRIMARY else Role.PRIMARY


class Phase(StrEnum):
    """Where a node's state machine stands."""

    STARTING = "STARTING"
    WAITING = "WAITING"
    PASSIVE = "PASSIVE"
    TAKEOVER = "TAKEOVER"
    ACTIVE = "ACTIVE"
    RETURNED = "RETURNED"
    ISOLATED = "ISOLATED"
    DIVERGED = "DIVERGED"
    MAINTENANCE = "MAINTENANCE"
    FAULT = "FAULT"
    PRESYNC = "PRESYNC"
    FINAL_SYNC = "FINAL_SYNC"
    RESTORING = "RESTORING"
    FREEZING = "FREEZING"
    PREPARED = "PREPARED"


RECEIVING_PHASES = frozenset({Phase.PRESYNC, Phase.FINAL_SYNC, Phase.RESTORING})
"""Phases of the node that shall serve after a handover."""

GIVING_PHASES = frozenset({Phase.FREEZING, Phase.PREPARED})
"""Phases of the node that serves before a handover."""


class Exclusivity(StrEnum):
    """What this pair has to prove that the other node cannot serve (takeover condition 5)."""

    WITNESS = "witness"
    TOKEN = "token"  # noqa: S105 - an arbiter, not a password
    AGENT = "agent"
    TOKEN_AND_AGENT = "token+agent"  # noqa: S105


class PromiseState(StrEnum):
    """A node's promise not to take over, as its datagrams show it."""

    NONE = "none"
    STANDING = "standing"
    CLEARING = "clearing"


@dataclass(frozen=True, slots=True)
class Epoch:
    """One reign: a number that only rises, a random id (16 hex digits), and who has the truth."""

    number: int
    id: str
    authority: Role

    def __str__(self) -> str:
        return f"{self.number} ({self.id[:8]}, authority {self.authority})"


@dataclass(frozen=True, slots=True)
class Journal:
    """What a node must remember across restarts and boots. Durable before it is visible (I6)."""

    epoch: Epoch | None = None
    active: bool = False
    """This node was serving when the journal was written; counts only within `boot_id`."""
    boot_id: str = ""
    promise: bool = False
    """This node promised not to take over."""
    peer_promise: bool = False
    """The peer showed its promise, and has not asked to clear it."""
    maintenance: bool = False
    peer_agent_only: bool = False
    """The peer's datagrams showed that a fence agent is its only way to take over."""
    prepared: Epoch | None = None
    """This node gave its authority away to this epoch: it never again serves an older one, but
    for the peer's `aborted`. Once it is `epoch`, the volumes here hold its data, by the proof."""
    aborted: Epoch | None = None
    """The newest handover to this node that will never be: it excludes `epoch`."""


@dataclass(frozen=True, slots=True)
class Timings:
    """The timers of the pair, all in milliseconds (DESIGN sections 4 and 9)."""

    interval_ms: int = 100
    hold_ms: int = 600
    takeover_after_ms: int = 1000
    margin_ms: int = 100
    address_lease_ms: int = 2000
    renew_every_ms: int = 300
    absence_ms: int = 8000
    idle_peer_ms: int = 2000
    survey_ms: int = 300
    announce_every_ms: int = 60_000

    def required_takeover_after_ms(self, *, service_lease: bool) -> int:
        """The smallest `takeover_after` of the peer under which this node may serve."""
        needed_ms = self.hold_ms + self.margin_ms
        if service_lease:
            return needed_ms + 2 * self.interval_ms
        return needed_ms + self.address_lease_ms + ADDRESS_LATE_MS


@dataclass(frozen=True, slots=True)
class Echo:
    """The newest datagram heard from a session: a grant when the sender says so."""

    session: int
    seq: int


@dataclass(frozen=True, slots=True)
class Datagram:
    """A node's whole public state, as one heartbeat carries it.

    `session` and `seq` are unsigned 64-bit; a session is random and never 0. `echo` is of the
    receiver's confirmed session, and counts as a grant only when `echo_grants`. `pending` holds at
    most `MAX_PENDING` sessions heard but not confirmed yet; they grant nothing.
    """

    role: Role
    session: int
    seq: int
    echo: Echo | None
    echo_grants: bool
    pending: tuple[Echo, ...]
    phase: Phase
    serving: bool
    epoch: Epoch | None
    blank: bool
    """The journal is missing (not corrupt) and no volume bears a stamp: a new node."""
    promise: PromiseState
    peer_promise_held: bool
    """The sender still counts on the receiver's promise (in memory or on disk)."""
    healthy: bool
    whole: bool
    """The sender is a whole replica of its epoch."""
    service_lease: bool
    agent_only: bool
    interval_ms: int
    hold_ms: int
    takeover_after_ms: int
    address_lease_ms: int
    absence_ms: int
    """Announced absence of a planned restart; 0 when none."""
    known_number: int = 0
    """The highest epoch number that the sender knows of, be it only from the authority record, a
    volume's stamp or a handover that was begun: a new epoch must lie above it."""
    handover: Epoch | None = None
    """The epoch of the handover that the sender works on."""
    ready: bool = False
    """Of a receiver: the giver may freeze. Of a giver: PREPARED is durable, the address gone."""
    aborted: Epoch | None = None
    """The newest handover to the sender that durably will never be."""
    refuses: Epoch | None = None
    """The giver wants this handover ended."""
    asks: int = 0
    """The giver asks for a handover; another number is another request, 0 none."""


MAX_PENDING = 4


# --------------------------------------------------------------------------- inputs: facts


@dataclass(frozen=True, slots=True)
class Heard:
    """A sealed and well-formed datagram arrived."""

    datagram: Datagram
    link: str = ""


@dataclass(frozen=True, slots=True)
class WitnessAnswered:
    """A reachability witness answered a request that was sent at `sent_ms`."""

    name: str
    sent_ms: int


@dataclass(frozen=True, slots=True)
class TokenChanged:
    """The token connection: held since `since_ms`, or lost (`since_ms` None).

    `own_record` says that the authority record read on this very connection shows this node's own
    epoch and its last nonce.
    """

    since_ms: int | None
    own_record: bool = False


@dataclass(frozen=True, slots=True)
class TokenAcked:
    """The broker acknowledged on the token connection what was sent at `sent_ms`."""

    sent_ms: int


@dataclass(frozen=True, slots=True)
class RecordRead:
    """The retained authority record names this epoch. It can only forbid."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class FenceReported:
    """A fence agent ended: `off` only when a following status said off in words."""

    off: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class FitChanged:
    """This node's own service and storage: ok, broken, or not known yet (None), and why."""

    ok: bool | None
    reason: str = ""
    storage: bool = True
    """The volumes are as they should be: what is broken, if anything, is the service only."""


@dataclass(frozen=True, slots=True)
class ReplicaChanged:
    """Is this node a whole replica of `epoch` (takeover condition 2), and why not.

    It counts only while `epoch` is the journaled one. `stamped`: a volume here bears a stamp;
    `newest_stamp` is the highest of them.
    """

    whole: bool
    reason: str = ""
    stamped: bool = False
    epoch: Epoch | None = None
    newest_stamp: Epoch | None = None


@dataclass(frozen=True, slots=True)
class PresyncChanged:
    """The receiver's copy: so near to the giver's that the rest fits a freeze, or why it fails."""

    handover: Epoch
    ready: bool
    failed: str = ""


@dataclass(frozen=True, slots=True)
class FinalChanged:
    """The receiver's copy is proved equal to the frozen giver's, or why that failed."""

    handover: Epoch
    proved: bool
    failed: str = ""


@dataclass(frozen=True, slots=True)
class AddressChanged:
    """The kernel says whether the VIP is on the interface; not caused by an action of ours."""

    held: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class RulesetLost:
    """Somebody else flushed the firewall's rules."""


@dataclass(frozen=True, slots=True)
class CarrierChanged:
    """The VIP's interface lost or regained its carrier."""

    up: bool


@dataclass(frozen=True, slots=True)
class VipClaimed:
    """Another machine announced the VIP as its own, with this hardware address."""

    mac: str


# --------------------------------------------------------------------------- inputs: results


@dataclass(frozen=True, slots=True)
class Persisted:
    """A journal write reached the disk."""

    journal: Journal


@dataclass(frozen=True, slots=True)
class PersistFailed:
    """A journal write failed; what stands on the disk is the old one or the new one."""

    reason: str


@dataclass(frozen=True, slots=True)
class Surveyed:
    """The answer to "does anybody answer for the VIP": probes of `survey_ms`, three rounds."""

    started_ms: int
    ended_ms: int
    answered_by: str | None
    heard_other: bool


@dataclass(frozen=True, slots=True)
class ReceiversStopped:
    """No process of this node receives data any more, or one cannot be ended (`ok` False)."""

    ok: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Frozen:
    """The freeze ended: nothing writes any more, all is on the disk; or why that cannot be."""

    ok: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class VolumesMounted:
    """The mount hook ended, and the volumes are mounted; or why not (`ok` False)."""

    ok: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Thawed:
    """The volumes take writes again; or why they do not (`ok` False)."""

    ok: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class VolumesUnmounted:
    """The unmount hook ended, and the volumes are given up; or why not (`ok` False)."""

    ok: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """A lease in the kernel could not be taken or renewed, or came too late."""

    lock: str
    detail: str


@dataclass(frozen=True, slots=True)
class LeaseHeld:
    """A lease in the kernel was taken or renewed in time."""

    lock: str


# --------------------------------------------------------------------------- inputs: commands


class CommandKind(StrEnum):
    """What an operator, or the service manager, can ask of the daemon."""

    ACTIVATE = "activate"
    MAINTENANCE_ON = "maintenance-on"
    MAINTENANCE_OFF = "maintenance-off"
    CONFIRM_PEER_DOWN = "confirm-peer-down"
    RESOLVE = "resolve"
    STOP = "stop"
    RESTART = "restart"
    HANDOVER = "handover"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Command:
    """One request; `number` returns in the `Reply`. `force`, `keep` and `to` go with some kinds.

    `keep`: whose history is kept. `to`: who shall serve after the handover.
    """

    kind: CommandKind
    number: int
    force: bool = False
    keep: Role | None = None
    to: Role | None = None


Fact = (
    Heard
    | WitnessAnswered
    | TokenChanged
    | TokenAcked
    | RecordRead
    | FenceReported
    | FitChanged
    | ReplicaChanged
    | PresyncChanged
    | FinalChanged
    | AddressChanged
    | RulesetLost
    | CarrierChanged
    | VipClaimed
)
Result = (
    Persisted
    | PersistFailed
    | Surveyed
    | ReceiversStopped
    | Frozen
    | Thawed
    | VolumesMounted
    | VolumesUnmounted
    | LeaseLost
    | LeaseHeld
    | AddressChanged
    | FenceReported
    | TokenChanged
)


@dataclass(frozen=True, slots=True)
class Completed:
    """The result of the action with this number."""

    action: int
    result: Result | None


Input = Fact | Completed | Command


# --------------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class SendHeartbeat:
    """Sends one datagram on every link; no result."""

    datagram: Datagram


@dataclass(frozen=True, slots=True)
class Persist:
    """Writes the journal durably: `Persisted` or `PersistFailed`."""

    journal: Journal


@dataclass(frozen=True, slots=True)
class AddAddress:
    """Puts the VIP on the interface with a lease: `LeaseHeld` or `LeaseLost`."""

    deadline_ms: int


@dataclass(frozen=True, slots=True)
class RenewAddress:
    """Renews the VIP's lease: `LeaseHeld` or `LeaseLost` (then the address is already gone)."""

    deadline_ms: int


@dataclass(frozen=True, slots=True)
class RemoveAddress:
    """Takes the VIP off the interface: `AddressChanged`; repeated until it is gone."""


@dataclass(frozen=True, slots=True)
class OpenService:
    """Opens the service lease on this session's own evidence: `LeaseHeld` or `LeaseLost`."""

    deadline_ms: int


@dataclass(frozen=True, slots=True)
class RenewService:
    """Renews the service lease; fails when it has ended: `LeaseHeld` or `LeaseLost`."""

    deadline_ms: int


@dataclass(frozen=True, slots=True)
class CloseService:
    """Closes the service lease; no result."""


@dataclass(frozen=True, slots=True)
class ExtendLeases:
    """Extends both leases to `deadline_ms`, once, for an announced absence; no result."""

    deadline_ms: int


@dataclass(frozen=True, slots=True)
class Announce:
    """Starts the schedule of gratuitous ARP and unsolicited NA; no result."""

    reason: str


@dataclass(frozen=True, slots=True)
class Survey:
    """Asks three times whether anybody answers for the VIP: `Surveyed`."""


@dataclass(frozen=True, slots=True)
class AskWitness:
    """Sends one request to each witness; answers arrive as `WitnessAnswered`."""


@dataclass(frozen=True, slots=True)
class TakeToken:
    """Connects under the authority's client id: `TokenChanged`."""


@dataclass(frozen=True, slots=True)
class DropToken:
    """Closes the token connection; no result."""


@dataclass(frozen=True, slots=True)
class PublishRecord:
    """Publishes the authority record (on the token connection where there is one); no result."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Fence:
    """Runs the fence agents in order: `FenceReported`.

    The executor kills them as soon as no flight awaits the result: a takeover that was given up
    must not switch off a peer that serves again.
    """


@dataclass(frozen=True, slots=True)
class StopReceivers:
    """Kills every process that receives data, and proves it gone: `ReceiversStopped` (I3)."""


@dataclass(frozen=True, slots=True)
class Freeze:
    """Waits until no request is under way, then puts all on the disk: `Frozen`.

    And makes the volumes read-only, where it can.
    """


@dataclass(frozen=True, slots=True)
class Thaw:
    """Ends a freeze, or stops one that is under way: `Thawed`."""


@dataclass(frozen=True, slots=True)
class MountVolumes:
    """Runs the mount hook, and looks whether the volumes are mounted: `VolumesMounted`.

    A hook of an older order is ended first.
    """

    epoch: Epoch | None


@dataclass(frozen=True, slots=True)
class UnmountVolumes:
    """Runs the unmount hook, and looks whether they are gone: `VolumesUnmounted`. Ends as well."""

    epoch: Epoch | None


@dataclass(frozen=True, slots=True)
class Exit:
    """The daemon may end now; nothing of the core runs after it."""

    reason: str


Action = (
    SendHeartbeat
    | Persist
    | AddAddress
    | RenewAddress
    | RemoveAddress
    | OpenService
    | RenewService
    | CloseService
    | ExtendLeases
    | Announce
    | Survey
    | AskWitness
    | TakeToken
    | DropToken
    | PublishRecord
    | Fence
    | StopReceivers
    | Freeze
    | Thaw
    | MountVolumes
    | UnmountVolumes
    | Exit
)


@dataclass(frozen=True, slots=True)
class Numbered:
    """An action on its way to its executor; its result comes back as `Completed(number, ..)`."""

    number: int
    action: Action


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a command: accepted or refused, by which row, and why."""

    number: int
    accepted: bool
    row: str
    why: str


@dataclass(frozen=True, slots=True)
class Fired:
    """A row of the table that fired: what the log, the events and the operator see."""

    at_ms: int
    row: str
    phase: Phase
    to: Phase
    why: str
    detail: str = ""


# --------------------------------------------------------------------------- configuration


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """What the decisions need to know of the configuration and of this boot."""

    role: Role
    boot_id: str
    timings: Timings = field(default_factory=Timings)
    exclusivity: Exclusivity = Exclusivity.WITNESS
    service_lease: bool = True
    replication: bool = False
    start_alone_after_ms: int | None = None
    freeze_limit_ms: int = 5_000
    """The longest that the giver may take until nothing writes any more."""
    final_limit_ms: int = 20_000
    """The longest from the giver's word that it is prepared to the proof of equal data."""
    hook_timeout_ms: int | None = None
    """How long a mount or unmount hook may run; None: there are none."""

    @property
    def has_hooks(self) -> bool:
        """Hooks mount and give up the volumes; a node that does not serve has them unmounted."""
        return self.hook_timeout_ms is not None

    @property
    def agent_only(self) -> bool:
        """A fence agent is this node's only way to take over."""
        return self.exclusivity is Exclusivity.AGENT

    @property
    def has_token(self) -> bool:
        """A token is configured."""
        return self.exclusivity in (Exclusivity.TOKEN, Exclusivity.TOKEN_AND_AGENT)

    @property
    def has_agent(self) -> bool:
        """A fence agent is configured."""
        return self.exclusivity in (Exclusivity.AGENT, Exclusivity.TOKEN_AND_AGENT)

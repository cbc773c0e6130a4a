"""A datagram on the wire: `Datagram` to sealed bytes, and sealed bytes back to `Datagram`.

Pure computing: no socket, no clock, no log. What is forged, torn, foreign or nonsense ends as one
of the `Refused`, whatever the bytes; nothing is guessed or repaired. Whether a well-formed datagram
counts (sessions, sequence numbers, replay) is decided by the core, not here.

Layout, all numbers in network byte order:

    envelope  magic "nfsh" | version 1 byte | sender's role 1 byte | key hint 4 bytes
    payload   by version; version 1 is `_BODY` and then 0 to MAX_PENDING of `_ECHO`
    seal      HMAC-SHA256 (RFC 2104, FIPS 180-4), 32 bytes, over everything before it

The envelope and the seal stay the same in all versions. So the seal is checked first, and "another
version" is the word of the real peer, not of somebody who flipped a bit. A given state has exactly
one encoding: what is absent is all zeros, and unknown bits are refused.
"""

from __future__ import annotations

import hmac
import struct
from enum import StrEnum
from typing import TypeVar

from nfsha.core.model import MAX_PENDING, Datagram, Echo, Epoch, Phase, PromiseState, Role
from nfsha.peer.keys import HINT_BYTES, KeyRing

VERSION = 1
"""Version of the payload. A change of the layout or of a code below takes the next number."""

MAX_BYTES = 1400
"""Upper bound of a sealed datagram: Ethernet's 1,500 less headers and a tunnel's share."""

MAX_TIMING_MS = 3_600_000
"""An hour: no timer of a heartbeat is near it, and sums of a few stay far from any overflow."""

_T = TypeVar("_T")

_MAGIC = b"nfsh"
_ENVELOPE = struct.Struct(f"!4sBB{HINT_BYTES}s")
_SEAL_BYTES = 32
_HASH = "sha256"

# flags, phase, promise, pending; session, seq; echo; epoch's number, id, authority; five timings
_BODY = struct.Struct("!HBBB QQ QQ Q8sB 5I")
_ECHO = struct.Struct("!QQ")

# Codes on the wire: a place in these tuples, counted from 0. Append only, never sort or reuse.
_ROLES = (Role.PRIMARY, Role.STANDBY)
_PROMISES = (PromiseState.NONE, PromiseState.STANDING, PromiseState.CLEARING)
_PHASES = (
    Phase.STARTING,
    Phase.WAITING,
    Phase.PASSIVE,
    Phase.TAKEOVER,
    Phase.ACTIVE,
    Phase.RETURNED,
    Phase.ISOLATED,
    Phase.DIVERGED,
    Phase.MAINTENANCE,
    Phase.FAULT,
    Phase.PRESYNC,
    Phase.FINAL_SYNC,
    Phase.RESTORING,
    Phase.FREEZING,
    Phase.PREPARED,
)
_ROLE_CODES = {role: code for code, role in enumerate(_ROLES)}
_PROMISE_CODES = {promise: code for code, promise in enumerate(_PROMISES)}
_PHASE_CODES = {phase: code for code, phase in enumerate(_PHASES)}

_HAS_ECHO = 1 << 0
_ECHO_GRANTS = 1 << 1
_SERVING = 1 << 2
_HAS_EPOCH = 1 << 3
_BLANK = 1 << 4
_PEER_PROMISE_HELD = 1 << 5
_HEALTHY = 1 << 6
_WHOLE = 1 << 7
_SERVICE_LEASE = 1 << 8
_AGENT_ONLY = 1 << 9
_KNOWN_FLAGS = (1 << 10) - 1

_NO_ECHO = (0, 0)
_NO_EPOCH = (0, bytes(8), 0)


class Refusal(StrEnum):
    """Why bytes were not taken; also the names of the counters."""

    MALFORMED = "malformed"
    FORGED = "forged"
    OTHER_VERSION = "other-version"
    OWN_ROLE = "own-role"


class Refused(Exception):  # noqa: N818 - a refusal is an answer, not an error
    """Bytes that are no datagram of the peer. `kind` says which sort, `reason` what was found."""

    kind: Refusal

    def __init__(self, reason: str) -> None:
        """Keeps the reason: one clause without secrets, fit for a log line."""
        super().__init__(reason)
        self.reason = reason


class Malformed(Refused):
    """Not a datagram of ours at all, or sealed by the peer but with impossible contents."""

    kind = Refusal.MALFORMED


class Forged(Refused):
    """Sealed with no key that we accept, or changed after it was sealed."""

    kind = Refusal.FORGED


class OtherVersion(Refused):
    """Sealed with our key, but of a version that this nfsha does not speak."""

    kind = Refusal.OTHER_VERSION


class OwnRole(Refused):
    """Sealed with our key by a node of our own role: both configured alike, or our own datagram."""

    kind = Refusal.OWN_ROLE


class Wire:
    """Seals this node's datagrams and opens the peer's."""

    def __init__(self, keys: KeyRing, role: Role) -> None:
        """Takes the accepted keys and this node's own role."""
        self._role = role
        self.use(keys)

    def use(self, keys: KeyRing) -> None:
        """Takes another set of keys from now on: the key file was changed by a rotation."""
        sealing = keys.sealing
        self._secret = sealing.secret
        self._hint = sealing.hint
        self._secrets = {key.hint: key.secret for key in keys.keys}

    def seal(self, datagram: Datagram) -> bytes:
        """Encodes and seals a datagram of this node.

        Raises ValueError for a datagram that cannot be said on the wire, or is of the other role:
        those are mistakes of the program.
        """
        if datagram.role is not self._role:
            raise ValueError(f"a datagram of {datagram.role} on a node that is {self._role}")
        envelope = _ENVELOPE.pack(_MAGIC, VERSION, _ROLE_CODES[datagram.role], self._hint)
        sealed = envelope + encode(datagram)
        sealed += hmac.digest(self._secret, sealed, _HASH)
        if len(sealed) > MAX_BYTES:
            raise ValueError(f"a datagram of {len(sealed)} bytes, allowed are {MAX_BYTES}")
        return sealed

    def open(self, sealed: bytes) -> Datagram:
        """Checks the seal and decodes. Raises one of the `Refused`, and nothing else."""
        if not _ENVELOPE.size + _SEAL_BYTES <= len(sealed) <= MAX_BYTES:
            raise Malformed(f"{len(sealed)} bytes")
        magic, version, role_code, hint = _ENVELOPE.unpack_from(sealed)
        if magic != _MAGIC:
            raise Malformed("does not begin as a datagram of nfsha")
        # The hint is public; it only picks the key, so that one HMAC per datagram is computed.
        secret = self._secrets.get(hint)
        if secret is None:
            raise Forged(f"sealed with a key that is not in the key file ({hint.hex()})")
        seal = hmac.digest(secret, sealed[:-_SEAL_BYTES], _HASH)
        if not hmac.compare_digest(seal, sealed[-_SEAL_BYTES:]):
            raise Forged("the seal does not fit")
        if version != VERSION:
            raise OtherVersion(f"version {version}, this node speaks {VERSION}")
        role = _pick(_ROLES, role_code, "role")
        if role is self._role:
            raise OwnRole(f"comes from a node whose role is {role} too")
        return decode(role, sealed[_ENVELOPE.size : -_SEAL_BYTES])


def encode(datagram: Datagram) -> bytes:
    """Encodes a datagram's payload (all but the role, which the envelope carries).

    Raises ValueError for what has no encoding: a negative or too large number, a wrong epoch id.
    """
    echo = datagram.echo
    epoch = datagram.epoch
    if len(datagram.pending) > MAX_PENDING:
        raise ValueError(f"{len(datagram.pending)} pending sessions, allowed are {MAX_PENDING}")
    try:
        body = _BODY.pack(
            _flags(datagram),
            _PHASE_CODES[datagram.phase],
            _PROMISE_CODES[datagram.promise],
            len(datagram.pending),
            datagram.session,
            datagram.seq,
            *(_NO_ECHO if echo is None else (echo.session, echo.seq)),
            *(_NO_EPOCH if epoch is None else _epoch_fields(epoch)),
            datagram.interval_ms,
            datagram.hold_ms,
            datagram.takeover_after_ms,
            datagram.address_lease_ms,
            datagram.absence_ms,
        )
        return body + b"".join([_ECHO.pack(each.session, each.seq) for each in datagram.pending])
    except struct.error as error:
        raise ValueError(f"a datagram that has no encoding ({error}): {datagram}") from error


def decode(role: Role, payload: bytes) -> Datagram:
    """Decodes a payload of `VERSION` from a sender of this role. Raises only Malformed."""
    if len(payload) < _BODY.size:
        raise Malformed(f"a payload of {len(payload)} bytes, at least {_BODY.size} wanted")
    (
        flags,
        phase_code,
        promise_code,
        pending_count,
        session,
        seq,
        echo_session,
        echo_seq,
        epoch_number,
        epoch_id,
        authority_code,
        *timings_ms,
    ) = _BODY.unpack_from(payload)
    if flags & ~_KNOWN_FLAGS:
        raise Malformed(f"unknown flags {flags:#06x}")
    if session == 0:
        raise Malformed("session 0")
    _check_timings(timings_ms)
    interval_ms, hold_ms, takeover_after_ms, address_lease_ms, absence_ms = timings_ms
    return Datagram(
        role=role,
        session=session,
        seq=seq,
        echo=_decode_echo(bool(flags & _HAS_ECHO), echo_session, echo_seq),
        echo_grants=bool(flags & _ECHO_GRANTS),
        pending=_decode_pending(payload, pending_count),
        phase=_pick(_PHASES, phase_code, "phase"),
        serving=bool(flags & _SERVING),
        epoch=_decode_epoch(bool(flags & _HAS_EPOCH), epoch_number, epoch_id, authority_code),
        blank=bool(flags & _BLANK),
        promise=_pick(_PROMISES, promise_code, "promise"),
        peer_promise_held=bool(flags & _PEER_PROMISE_HELD),
        healthy=bool(flags & _HEALTHY),
        whole=bool(flags & _WHOLE),
        service_lease=bool(flags & _SERVICE_LEASE),
        agent_only=bool(flags & _AGENT_ONLY),
        interval_ms=interval_ms,
        hold_ms=hold_ms,
        takeover_after_ms=takeover_after_ms,
        address_lease_ms=address_lease_ms,
        absence_ms=absence_ms,
    )


def _flags(datagram: Datagram) -> int:
    return (
        _HAS_ECHO * (datagram.echo is not None)
        | _ECHO_GRANTS * datagram.echo_grants
        | _SERVING * datagram.serving
        | _HAS_EPOCH * (datagram.epoch is not None)
        | _BLANK * datagram.blank
        | _PEER_PROMISE_HELD * datagram.peer_promise_held
        | _HEALTHY * datagram.healthy
        | _WHOLE * datagram.whole
        | _SERVICE_LEASE * datagram.service_lease
        | _AGENT_ONLY * datagram.agent_only
    )


def _epoch_fields(epoch: Epoch) -> tuple[int, bytes, int]:
    try:
        epoch_id = bytes.fromhex(epoch.id)
    except ValueError:
        epoch_id = b""
    # bytes.fromhex takes capitals and blanks, which would not come back as they were.
    if len(epoch_id) != 8 or epoch_id.hex() != epoch.id:
        raise ValueError(f"an epoch id has 16 lower case hex digits, this is {epoch.id!r}")
    return epoch.number, epoch_id, _ROLE_CODES[epoch.authority]


def _pick(known: tuple[_T, ...], code: int, word: str) -> _T:
    if code >= len(known):
        raise Malformed(f"unknown {word} {code}")
    return known[code]


def _check_timings(timings_ms: list[int]) -> None:
    if max(timings_ms) > MAX_TIMING_MS:
        raise Malformed(f"a timing of {max(timings_ms)} ms, at most {MAX_TIMING_MS} allowed")
    # The last one, the announced absence, is 0 most of the time.
    if min(timings_ms[:-1]) == 0:
        raise Malformed("a timing of 0 ms")


def _decode_echo(present: bool, session: int, seq: int) -> Echo | None:
    if present:
        if session == 0:
            raise Malformed("an echo of session 0")
        return Echo(session, seq)
    if (session, seq) != _NO_ECHO:
        raise Malformed("an echo that says it is absent")
    return None


def _decode_pending(payload: bytes, count: int) -> tuple[Echo, ...]:
    if count > MAX_PENDING:
        raise Malformed(f"{count} pending sessions, at most {MAX_PENDING} allowed")
    wanted = _BODY.size + count * _ECHO.size
    if len(payload) != wanted:
        raise Malformed(f"a payload of {len(payload)} bytes, exactly {wanted} wanted")
    if count == 0:
        return ()
    pending = tuple(Echo(*fields) for fields in _ECHO.iter_unpack(payload[_BODY.size :]))
    if any(each.session == 0 for each in pending):
        raise Malformed("a pending session 0")
    return pending


def _decode_epoch(present: bool, number: int, epoch_id: bytes, authority: int) -> Epoch | None:
    if present:
        return Epoch(number, epoch_id.hex(), _pick(_ROLES, authority, "authority"))
    if (number, epoch_id, authority) != _NO_EPOCH:
        raise Malformed("an epoch that says it is absent")
    return None

"""A datagram on the wire: `Datagram` or `Page` to sealed bytes, and sealed bytes back to it.

Pure computing: no socket, no clock, no log. What is forged, torn, foreign or nonsense ends as one
of the `Refused`, whatever the bytes; nothing is guessed or repaired. Whether a well-formed datagram
counts (sessions, sequence numbers, replay) is decided by the core, not here.

Layout, all numbers in network byte order:

    envelope  magic "nfsh" | version 1 byte | kind and sender's role 1 byte | key hint 4 bytes
    payload   by version and kind; in version 1 a heartbeat is `_BODY` and then 0 to MAX_PENDING
              of `_ECHO`, a page is `_PAGE_HEAD` and then a chunk
    seal      HMAC-SHA256 (RFC 2104, FIPS 180-4), 32 bytes, over everything before it

The envelope and the seal stay the same in all versions. So the seal is checked first, and "another
version" is the word of the real peer, not of somebody who flipped a bit. A given state has exactly
one encoding: what is absent is all zeros, and unknown bits are refused.

The kind is the upper half of the role's byte: 0 for a heartbeat, 1 for a page of facts, 2 for a
page of client connections, 3 for a page of lock holders, 4 for a page of facts about the NFS
service, 5 for the question for them. An nfsha that does not know a kind takes such a byte for an
unknown role, and refuses it.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import TypeVar

from nfsha.core.model import MAX_PENDING, Datagram, Echo, Epoch, Phase, PromiseState, Role
from nfsha.peer.keys import HINT_BYTES, KeyRing

VERSION = 3
"""Version of the payload. A change of the layout or of a code below takes the next number."""

MAX_BYTES = 1400
"""Upper bound of a sealed datagram: Ethernet's 1,500 less headers and a tunnel's share."""

DIGEST_BYTES = 16
"""Length of a digest of facts: SHA-256 cut to it, far from any chance of two alike."""

NO_DIGEST = bytes(DIGEST_BYTES)
"""The digest of no facts at all."""

CHUNK_BYTES = 1280
"""Length of each page's chunk but the last one's; with the rest it stays under `MAX_BYTES`."""

MAX_PAGES = (1 << 20) // CHUNK_BYTES + 1
"""Most pages of one node's facts: 1 MiB."""

MAX_TIMING_MS = 3_600_000
"""An hour: no timer of a heartbeat is near it, and sums of a few stay far from any overflow."""

_T = TypeVar("_T")

_MAGIC = b"nfsh"
_ENVELOPE = struct.Struct(f"!4sBB{HINT_BYTES}s")
_SEAL_BYTES = 32
_HASH = "sha256"

# flags, phase, promise, pending; session, seq; echo; number, id, authority of the epoch, of the
# handover, of what was aborted and of what is refused; what is asked; highest epoch number known;
# five timings
_BODY = struct.Struct("!HBBB QQ QQ Q8sB Q8sB Q8sB Q8sB QQ 5I")
_ECHO = struct.Struct("!QQ")

# session, peer_session, counter; have, digest; pages, number
_PAGE_HEAD = struct.Struct(f"!QQQ {DIGEST_BYTES}s{DIGEST_BYTES}s HH")

_HEARTBEAT_KIND = 0 << 4
_KIND_SHIFT = 4
_KIND_OFFSET = 5

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
_HAS_HANDOVER = 1 << 10
_READY = 1 << 11
_HAS_ABORTED = 1 << 12
_HAS_REFUSES = 1 << 13
_KNOWN_FLAGS = (1 << 14) - 1

_NO_ECHO = (0, 0)
_NO_EPOCH = (0, bytes(8), 0)


class PageKind(IntEnum):
    """What the facts are about that a page belongs to; each kind is counted on its own."""

    FACTS = 1
    CLIENTS = 2
    LOCKS = 3
    NFS = 4
    QUESTIONS = 5


_PAGE_KINDS = {int(kind): kind for kind in PageKind}


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


@dataclass(frozen=True, slots=True)
class Page:
    """One piece of the sender's facts, and what it holds of the receiver's (`nfsha.peer.pages`).

    Without a chunk it is a bare status: no piece, number 0.
    """

    session: int
    """The sender's session, never 0."""
    peer_session: int
    """The receiver's session as the sender has confirmed it, never 0."""
    counter: int
    """Rises with each page of a session."""
    have: bytes
    """The digest of the receiver's facts that the sender holds; `NO_DIGEST`: none."""
    digest: bytes
    """The digest of the sender's facts that the chunk belongs to; `NO_DIGEST`: it has none."""
    pages: int
    """In how many pages those facts travel."""
    number: int
    """Which of them this is, from 0."""
    chunk: bytes
    """`CHUNK_BYTES` of them, in the last page 1 to `CHUNK_BYTES`."""


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
        return self._seal(_HEARTBEAT_KIND, encode(datagram))

    def open(self, sealed: bytes) -> Datagram:
        """Checks the seal and decodes. Raises one of the `Refused`, and nothing else."""
        role, payload = self._unseal(_HEARTBEAT_KIND, sealed)
        return decode(role, payload)

    def seal_page(self, page: Page, kind: PageKind = PageKind.FACTS) -> bytes:
        """Encodes and seals a page of this node. Raises ValueError for what is no page."""
        return self._seal(kind << _KIND_SHIFT, encode_page(page))

    def open_page(self, sealed: bytes, kind: PageKind = PageKind.FACTS) -> Page:
        """Checks the seal and decodes. Raises one of the `Refused`, and nothing else."""
        _, payload = self._unseal(kind << _KIND_SHIFT, sealed)
        return decode_page(payload)

    def _seal(self, kind: int, payload: bytes) -> bytes:
        role_code = kind | _ROLE_CODES[self._role]
        sealed = _ENVELOPE.pack(_MAGIC, VERSION, role_code, self._hint) + payload
        sealed += hmac.digest(self._secret, sealed, _HASH)
        if len(sealed) > MAX_BYTES:
            raise ValueError(f"a datagram of {len(sealed)} bytes, allowed are {MAX_BYTES}")
        return sealed

    def _unseal(self, kind: int, sealed: bytes) -> tuple[Role, bytes]:
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
        role = _pick(_ROLES, role_code ^ kind, "role")
        if role is self._role:
            raise OwnRole(f"comes from a node whose role is {role} too")
        return role, sealed[_ENVELOPE.size : -_SEAL_BYTES]


def page_kind(sealed: bytes) -> PageKind | None:
    """What kind of page it says it is, if one: unproved before its seal is checked."""
    if len(sealed) <= _KIND_OFFSET:
        return None
    return _PAGE_KINDS.get(sealed[_KIND_OFFSET] >> _KIND_SHIFT)


def encode_page(page: Page) -> bytes:
    """Encodes a page's payload. Raises ValueError for what `decode_page` would refuse."""
    problem = _page_problem(page)
    if problem:
        raise ValueError(problem)
    try:
        head = _PAGE_HEAD.pack(
            page.session,
            page.peer_session,
            page.counter,
            page.have,
            page.digest,
            page.pages,
            page.number,
        )
    except struct.error as error:
        raise ValueError(f"a page that has no encoding ({error})") from error
    return head + page.chunk


def decode_page(payload: bytes) -> Page:
    """Decodes a page's payload of `VERSION`. Raises only Malformed."""
    if len(payload) < _PAGE_HEAD.size:
        raise Malformed(f"a page of {len(payload)} bytes, at least {_PAGE_HEAD.size} wanted")
    session, peer_session, counter, have, digest, pages, number = _PAGE_HEAD.unpack_from(payload)
    chunk = payload[_PAGE_HEAD.size :]
    page = Page(session, peer_session, counter, have, digest, pages, number, chunk)
    problem = _page_problem(page)
    if problem:
        raise Malformed(problem)
    return page


def _page_problem(page: Page) -> str:
    """Says what cannot be, or nothing."""
    length = len(page.chunk)
    last = page.number == page.pages - 1
    if page.session == 0 or page.peer_session == 0:
        return "a page of session 0, or for session 0"
    if len(page.have) != DIGEST_BYTES or len(page.digest) != DIGEST_BYTES:
        return "a digest of a wrong length"
    if page.pages > MAX_PAGES or (page.pages == 0) != (page.digest == NO_DIGEST):
        return f"facts {page.digest.hex()} in {page.pages} pages"
    if length == 0:
        return "" if page.number == 0 else f"page {page.number} without a chunk"
    if page.number >= page.pages:
        return f"page {page.number} of {page.pages}"
    if length > CHUNK_BYTES or (length < CHUNK_BYTES and not last):
        return f"page {page.number} of {page.pages} with {length} bytes"
    return ""


def encode(datagram: Datagram) -> bytes:
    """Encodes a datagram's payload (all but the role, which the envelope carries).

    Raises ValueError for what has no encoding: a negative or too large number, a wrong epoch id.
    """
    echo = datagram.echo
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
            *_epoch_fields(datagram.epoch),
            *_epoch_fields(datagram.handover),
            *_epoch_fields(datagram.aborted),
            *_epoch_fields(datagram.refuses),
            datagram.asks,
            datagram.known_number,
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
        *rest,
    ) = _BODY.unpack_from(payload)
    epochs, (asks, known_number), timings_ms = rest[:12], rest[12:14], rest[14:]
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
        epoch=_decode_epoch(bool(flags & _HAS_EPOCH), *epochs[0:3]),
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
        known_number=known_number,
        handover=_decode_epoch(bool(flags & _HAS_HANDOVER), *epochs[3:6]),
        ready=bool(flags & _READY),
        aborted=_decode_epoch(bool(flags & _HAS_ABORTED), *epochs[6:9]),
        refuses=_decode_epoch(bool(flags & _HAS_REFUSES), *epochs[9:12]),
        asks=asks,
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
        | _HAS_HANDOVER * (datagram.handover is not None)
        | _READY * datagram.ready
        | _HAS_ABORTED * (datagram.aborted is not None)
        | _HAS_REFUSES * (datagram.refuses is not None)
    )


def _epoch_fields(epoch: Epoch | None) -> tuple[int, bytes, int]:
    if epoch is None:
        return _NO_EPOCH
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

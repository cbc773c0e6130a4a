"""Pages: how a node's facts reach the other node when they do not fit into a heartbeat.

Facts are one blob of bytes, at most `MAX_BLOB_BYTES`, under a digest. Each side says over all links
which digest it holds of the other, and sends pages of its own facts while the other one holds
another. There is no acknowledgement beside that, so lost, doubled and reordered pages need no
special case, and a restart of either side neither. A peer that holds what is said costs one small
datagram a second.

Nothing here decides anything, opens a socket or knows what the facts say. A page counts only
between two present sessions that have confirmed each other, and only once (its counter is in a
sliding window, RFC 4303 section 3.4.3), so that a recording changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

from nfsha.peer.links import Links
from nfsha.peer.wire import CHUNK_BYTES, DIGEST_BYTES, NO_DIGEST, Page, PageKind, Wire

MAX_BLOB_BYTES = 1 << 20
"""Upper bound of a blob: some ten thousand volumes, and the memory for one that arrives."""

MAX_UNPACKED_BYTES = 16 << 20
"""Upper bound of the JSON in a blob: zlib makes a thousandth of what is all alike."""

PAGES_A_TICK = 8
"""Most pages sent at once: 0.2 ms of the loop, and far from filling the peer's socket buffer."""

STATUS_EVERY_MS = 1000
"""How often a bare status says what is held, when there is nothing else to send."""

SILENT_AFTER_MS = 5 * STATUS_EVERY_MS
"""A peer of which no page came for so long gets no more pages, only statuses."""


_WINDOW = 8 * PAGES_A_TICK
"""How far behind the newest a page may come: links are read one after the other."""


class FactsError(ValueError):
    """Facts that do not travel, or bytes that are none; the text says why, for an operator."""


def pack(facts: object) -> bytes:
    """Makes a blob of what JSON can say: the same facts are always the same bytes.

    Raises FactsError above a bound. Takes about 20 ms for each MiB of JSON: for a thread.
    """
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MAX_UNPACKED_BYTES:
        raise FactsError(_too_large(f"{len(text)} bytes", MAX_UNPACKED_BYTES))
    blob = zlib.compress(text, level=6)
    if len(blob) > MAX_BLOB_BYTES:
        raise FactsError(_too_large(f"{len(blob)} bytes compressed", MAX_BLOB_BYTES))
    return blob


def unpack(blob: bytes) -> object:
    """Returns what `pack` was given, as JSON gives it back. Raises FactsError. For a thread."""
    inflate = zlib.decompressobj()
    try:
        text = inflate.decompress(blob, MAX_UNPACKED_BYTES)
        if not inflate.eof or inflate.unused_data:
            raise FactsError("the other node's facts are torn, or larger than allowed")
        facts: object = json.loads(text)
    except (zlib.error, RecursionError) as error:
        raise FactsError(f"the other node's facts cannot be read: {error}") from error
    except ValueError as error:
        if isinstance(error, FactsError):
            raise
        raise FactsError(f"the other node's facts are no JSON: {error}") from error
    return facts


@dataclass(frozen=True, slots=True)
class _Blob:
    """Facts to be sent, with the digest and the number of pages that they take."""

    data: bytes
    digest: bytes
    pages: int


@dataclass(slots=True)
class _Assembly:
    """The peer's facts as far as they have arrived: never more than one blob of bounded size."""

    digest: bytes
    pages: int
    chunks: dict[int, bytes]


_NOTHING = _Blob(b"", NO_DIGEST, 0)


@dataclass(slots=True)
class PageCounters:
    """What became of the pages that were opened, since the start."""

    accepted: int = 0
    doubled: int = 0
    """Taken before over another link, a recording, or too late to tell."""
    other_session: int = 0
    """Of another session than the peer's present one, or for another one than ours."""
    damaged: int = 0
    """Whole blobs whose digest did not fit: a mistake of the sender's program."""
    blobs: int = 0
    """Blobs that arrived whole."""


class Pages:
    """Sends this node's facts and collects the peer's. All calls are made on one loop."""

    def __init__(
        self,
        seal: Callable[[Page], bytes],
        send: Callable[[bytes], None],
        sessions: Callable[[], tuple[int, int]],
        clock_ms: Callable[[], int],
        changed: Callable[[bytes], None],
    ) -> None:
        """Takes how to seal and send, and who is told.

        `sessions` returns this node's own session and the peer's confirmed one, 0 while there is
        none. `changed(blob)` is called once for each new blob of the peer, whole and with the right
        digest; it must only take note of it.
        """
        self.counters = PageCounters()
        self._seal = seal
        self._send = send
        self._sessions = sessions
        self._clock_ms = clock_ms
        self._changed = changed
        self._own = self._peer = 0
        self._counter = 0
        self._latest = self._sending = _NOTHING
        self._chunks_sent = 0
        self._status_due_ms = 0
        self._peer_holds: bytes | None = None
        self._heard_session = 0
        self._newest, self._taken = 0, 0
        self._heard_ms = 0
        self._announced = NO_DIGEST
        self._held = NO_DIGEST
        self._assembly: _Assembly | None = None

    @classmethod
    def over(
        cls,
        links: Links,
        wire: Wire,
        kind: PageKind,
        sessions: Callable[[], tuple[int, int]],
        clock_ms: Callable[[], int],
        changed: Callable[[bytes], None],
    ) -> Self:
        """Facts of this kind, over these links; the rest as above."""
        seal = partial(wire.seal_page, kind=kind)
        made = cls(seal, links.send_page, sessions, clock_ms, changed)
        links.route_pages(partial(wire.open_page, kind=kind), made.received, kind)
        return made

    @property
    def fresh(self) -> bool:
        """Do we hold what the peer's present session last said to be its facts?"""
        self._look_at_sessions()
        return self._held == self._announced != NO_DIGEST

    @property
    def heard_ms(self) -> int:
        """When the peer last said what its facts are, by our clock; it stays when it falls silent.

        0 before the first time.
        """
        return self._heard_ms

    @property
    def delivered(self) -> bool:
        """Has the peer's present session said that it holds what was published last?"""
        self._look_at_sessions()
        return self._peer_holds == self._latest.digest

    def publish(self, blob: bytes) -> None:
        """Takes these as this node's facts from now on; sent from the next `tick` on.

        Facts that are on their way are sent to the end first: else facts that change often would
        never arrive. Raises FactsError above `MAX_BLOB_BYTES` and for no bytes at all. Hashes the
        blob, at about 1 ms a MiB.
        """
        if len(blob) > MAX_BLOB_BYTES:
            raise FactsError(_too_large(f"{len(blob)} bytes compressed", MAX_BLOB_BYTES))
        if not blob:
            raise FactsError("facts of no bytes")
        digest = _digest(blob)
        if digest != self._latest.digest:
            self._latest = _Blob(blob, digest, -(-len(blob) // CHUNK_BYTES))

    def tick(self) -> None:
        """To be called after each heartbeat: sends what is due, a few pages or a status."""
        self._look_at_sessions()
        if self._peer == 0:
            return
        now_ms = self._clock_ms()
        if self._peer_lacks() and now_ms - self._heard_ms < SILENT_AFTER_MS:
            for _ in range(min(PAGES_A_TICK, self._sending.pages)):
                self._send_chunk()
        elif now_ms >= self._status_due_ms:
            self._send_page(self._latest, 0, b"")
        else:
            return
        self._status_due_ms = now_ms + STATUS_EVERY_MS

    def received(self, page: Page) -> None:
        """Takes a page of the peer whose seal was good. What is out of date changes nothing."""
        self._look_at_sessions()
        if self._peer == 0 or (page.session, page.peer_session) != (self._peer, self._own):
            self.counters.other_session += 1
            return
        if not self._first_time(page.counter):
            self.counters.doubled += 1
            return
        self.counters.accepted += 1
        if page.counter == self._newest:
            self._heard_ms = self._clock_ms()
            self._peer_holds = page.have
            self._announced = page.digest
        if page.chunk and page.digest == self._announced != self._held:
            self._collect(page)

    def _first_time(self, counter: int) -> bool:
        """Notes the counter, and says whether it may be taken: bit n of `_taken` is newest - n."""
        ahead = counter - self._newest
        if ahead > 0:
            self._taken = (self._taken << min(ahead, _WINDOW) | 1) & ((1 << _WINDOW) - 1)
            self._newest = counter
            return True
        bit = 1 << -ahead if ahead > -_WINDOW else 0
        fresh = bit != 0 and not self._taken & bit
        self._taken |= bit
        return fresh

    def _look_at_sessions(self) -> None:
        """A new session of either side knows nothing of what the one before said."""
        own, peer = self._sessions()
        if (own, peer) == (self._own, self._peer):
            return
        if peer not in (0, self._heard_session):  # one that comes back has its recordings
            self._heard_session = peer
            self._newest, self._taken = 0, 0
        self._own, self._peer = own, peer
        self._peer_holds = None
        self._announced = NO_DIGEST
        self._assembly = None
        self._start(self._latest)
        self._status_due_ms = 0

    # ------------------------------------------------------------- sending

    def _peer_lacks(self) -> bool:
        """Is there something to send? Goes on to the latest facts once those before arrived."""
        if self._peer_holds is None:  # it will say so within a second
            return False
        known = (self._sending.digest, self._latest.digest)
        if self._chunks_sent == 0 or self._peer_holds in known:
            self._start(self._latest)
        return self._sending.pages > 0 and self._peer_holds != self._sending.digest

    def _start(self, blob: _Blob) -> None:
        if blob is not self._sending:
            self._sending = blob
            self._chunks_sent = 0

    def _send_chunk(self) -> None:
        number = self._chunks_sent % self._sending.pages
        start = number * CHUNK_BYTES
        self._send_page(self._sending, number, self._sending.data[start : start + CHUNK_BYTES])
        self._chunks_sent += 1

    def _send_page(self, blob: _Blob, number: int, chunk: bytes) -> None:
        self._counter += 1
        page = Page(
            session=self._own,
            peer_session=self._peer,
            counter=self._counter,
            have=self._held,
            digest=blob.digest,
            pages=blob.pages,
            number=number,
            chunk=chunk,
        )
        self._send(self._seal(page))

    # ------------------------------------------------------------- collecting

    def _collect(self, page: Page) -> None:
        """Takes one chunk. Another digest begins anew: what it replaces is out of date."""
        assembly = self._assembly
        if assembly is None or (assembly.digest, assembly.pages) != (page.digest, page.pages):
            assembly = self._assembly = _Assembly(page.digest, page.pages, {})
        assembly.chunks[page.number] = page.chunk
        if len(assembly.chunks) < assembly.pages:
            return
        self._assembly = None
        blob = b"".join(assembly.chunks[number] for number in range(assembly.pages))
        if _digest(blob) != assembly.digest:
            self.counters.damaged += 1
            return
        self._held = assembly.digest
        self._status_due_ms = 0
        self.counters.blobs += 1
        self._changed(blob)


def _digest(blob: bytes) -> bytes:
    return hashlib.sha256(blob).digest()[:DIGEST_BYTES]


def _too_large(what: str, limit: int) -> str:
    return (
        f"this node's facts (volumes, marks, client connections) have {what}, at most {limit} can "
        "be told to the other node"
    )

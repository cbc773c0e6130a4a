"""Pages of facts: what is published arrives whole, whatever the links do, and nothing else does."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import random
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nfsha.core.model import Role
from nfsha.peer import pages as pages_module
from nfsha.peer.keys import Key, KeyRing
from nfsha.peer.pages import (
    MAX_BLOB_BYTES,
    PAGES_A_TICK,
    STATUS_EVERY_MS,
    FactsError,
    Pages,
    pack,
    unpack,
)
from nfsha.peer.wire import (
    CHUNK_BYTES,
    MAX_BYTES,
    MAX_PAGES,
    NO_DIGEST,
    Forged,
    Malformed,
    OwnRole,
    Page,
    PageKind,
    Refused,
    Wire,
    page_kind,
)

OURS = Key(bytes(range(32)))
INTERVAL_MS = 100
primary = Wire(KeyRing((OURS,)), Role.PRIMARY)
standby = Wire(KeyRing((OURS,)), Role.STANDBY)

STATUS = Page(
    session=0x0123456789ABCDEF,
    peer_session=0xFEDCBA9876543210,
    counter=7,
    have=NO_DIGEST,
    digest=bytes(range(16)),
    pages=2,
    number=0,
    chunk=b"",
)
LAST = dataclasses.replace(STATUS, number=1, chunk=b"last")

u64 = st.integers(1, 2**64 - 1)
digests = st.binary(min_size=16, max_size=16)


@st.composite
def pages(draw: st.DrawFn) -> Page:
    digest = draw(digests)
    total = 0 if digest == NO_DIGEST else draw(st.integers(1, MAX_PAGES))
    number, chunk = 0, b""
    if total and draw(st.booleans()):
        number = draw(st.integers(0, total - 1))
        length = draw(st.integers(1, CHUNK_BYTES)) if number == total - 1 else CHUNK_BYTES
        chunk = draw(st.binary(min_size=1, max_size=1)) * length
    return Page(
        draw(u64), draw(u64), draw(st.integers(0, 2**64 - 1)), draw(digests), digest,
        total, number, chunk,
    )  # fmt: skip


# --------------------------------------------------------------------------- on the wire


@given(pages())
def test_every_page_comes_back_as_it_was(page: Page) -> None:
    sealed = primary.seal_page(page)
    assert len(sealed) <= MAX_BYTES
    assert page_kind(sealed) is PageKind.FACTS
    assert standby.open_page(sealed) == page


def test_the_bytes_of_a_page_of_version_3_stay_what_they_are() -> None:
    assert primary.seal_page(LAST).hex() == (
        "6e667368" "03" "10" "630dcd29"  # magic, version, kind and role, key hint
        "0123456789abcdef" "fedcba9876543210" "0000000000000007"  # sessions, counter
        "00000000000000000000000000000000" "000102030405060708090a0b0c0d0e0f"  # have, digest
        "0002" "0001" "6c617374"  # pages, number, chunk
        + hmac.new(
            OURS.secret,
            primary.seal_page(LAST)[:-32],
            hashlib.sha256,
        ).hexdigest()
    )  # fmt: skip


def test_neither_kind_is_taken_for_the_other() -> None:
    """A node that knows no pages refuses them too: its `open` is the same as this one."""
    with pytest.raises(Malformed, match="unknown role 16"):
        standby.open(primary.seal_page(LAST))
    heartbeat = bytes.fromhex("6e6673680300630dcd29") + bytes(74)
    heartbeat += hmac.new(OURS.secret, heartbeat, hashlib.sha256).digest()
    assert page_kind(heartbeat) is None
    with pytest.raises(Malformed, match="unknown role"):
        standby.open_page(heartbeat)


def test_pages_of_clients_are_their_own_kind() -> None:
    sealed = primary.seal_page(LAST, PageKind.CLIENTS)
    assert page_kind(sealed) is PageKind.CLIENTS
    assert standby.open_page(sealed, PageKind.CLIENTS) == LAST
    with pytest.raises(Malformed, match="unknown role"):
        standby.open_page(sealed)
    with pytest.raises(Malformed, match="unknown role"):
        standby.open_page(primary.seal_page(LAST), PageKind.CLIENTS)


@pytest.mark.parametrize(
    "change",
    [
        {"session": 0},
        {"peer_session": 0},
        {"counter": -1},
        {"counter": 2**64},
        {"have": b"short"},
        {"digest": bytes(17)},
        {"digest": NO_DIGEST},
        {"pages": 0},
        {"pages": MAX_PAGES + 1},
        {"number": 2},
        {"number": 0},
        {"number": -1},
        {"chunk": b""},
        {"chunk": bytes(CHUNK_BYTES + 1)},
    ],
)
def test_what_is_no_page_is_not_sealed(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        primary.seal_page(dataclasses.replace(LAST, **change))  # type: ignore[arg-type]


@given(pages(), st.data())
def test_a_page_with_some_bytes_changed_is_refused_or_canonical(
    page: Page, data: st.DataObject
) -> None:
    plain = bytearray(primary.seal_page(page)[:-32])
    for _ in range(data.draw(st.integers(1, 3))):
        plain[data.draw(st.integers(10, len(plain) - 1))] = data.draw(st.integers(0, 255))
    sealed = bytes(plain) + hmac.new(OURS.secret, bytes(plain), hashlib.sha256).digest()
    try:
        opened = standby.open_page(sealed)
    except Refused as refused:
        assert refused.reason
    else:
        assert primary.seal_page(opened) == sealed


@given(st.binary(max_size=MAX_BYTES + 100))
def test_random_bytes_are_no_page(noise: bytes) -> None:
    page_kind(noise)
    with pytest.raises(Refused):
        standby.open_page(noise)


@given(pages(), st.data())
def test_a_flipped_bit_is_refused(page: Page, data: st.DataObject) -> None:
    sealed = bytearray(primary.seal_page(page))
    bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises((Forged, Malformed)):
        standby.open_page(bytes(sealed))


def test_a_page_of_the_same_role_is_told() -> None:
    with pytest.raises(OwnRole):
        primary.open_page(primary.seal_page(LAST))


# --------------------------------------------------------------------------- packed


@given(st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=9))
def test_facts_come_back_as_they_were(facts: object) -> None:
    assert unpack(pack(facts)) == facts


def test_equal_facts_are_equal_bytes() -> None:
    assert pack({"a": 1, "b": 2}) == pack({"b": 2, "a": 1})


def test_facts_that_are_too_large_are_refused_in_words() -> None:
    noise = random.Random(1).randbytes(2 << 20).hex()
    with pytest.raises(FactsError, match="compressed, at most 1048576 can be told to the other"):
        pack(noise)
    with pytest.raises(FactsError, match="at most 16777216 can be told"):
        pack("a" * (16 << 20))


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"noise",
        zlib.compress(b"{"),
        zlib.compress(b'"\xff"'),
        zlib.compress(b"[" * 100_000),
        zlib.compress(bytes(17 << 20)),
        zlib.compress(b"1")[:-1],
        zlib.compress(b"1") + b"more",
    ],
    ids=["empty", "noise", "torn", "no text", "deep", "bomb", "cut", "trailing"],
)
def test_what_is_no_packed_facts_is_refused(blob: bytes) -> None:
    with pytest.raises(FactsError, match="the other node's facts"):
        unpack(blob)


# --------------------------------------------------------------------------- between two sides


class Side:
    """One end: what it has sent since it was last asked, and the blobs that arrived."""

    def __init__(self, role: Role, session: int) -> None:
        self.wire = Wire(KeyRing((OURS,)), role)
        self.session = session
        self.confirmed = 0
        self.now_ms = 0
        self.sent: list[bytes] = []
        self.got: list[bytes] = []
        self.restart(session)

    def restart(self, session: int) -> None:
        self.session = session
        self.got = []
        self.pages = Pages(
            self.wire.seal_page,
            self.sent.append,
            lambda: (self.session, self.confirmed),
            lambda: self.now_ms,
            self.got.append,
        )


class Pair:
    """Two sides on one clock, with links that lose, double and reorder."""

    def __init__(self, *, loss: float = 0.0, links: int = 1, seed: int = 0) -> None:
        self.one = Side(Role.PRIMARY, 11)
        self.two = Side(Role.STANDBY, 22)
        self.loss, self.links, self.random = loss, links, random.Random(seed)
        self.recorded: list[bytes] = []
        self.now_ms = 0
        self.meet()

    def meet(self) -> None:
        self.one.confirmed, self.two.confirmed = self.two.session, self.one.session

    def step(self) -> int:
        """One interval; returns how many datagrams were sent."""
        self.now_ms += INTERVAL_MS
        count = 0
        for here, there in ((self.one, self.two), (self.two, self.one)):
            here.now_ms = self.now_ms
            here.sent.clear()
            here.pages.tick()
            count += len(here.sent)
            self.carry(here.sent, there)
        return count

    def carry(self, sent: list[bytes], there: Side) -> None:
        self.recorded += sent
        arriving = [
            sealed
            for sealed in sent
            for _ in range(self.links)
            if self.random.random() >= self.loss
        ]
        if self.loss:
            self.random.shuffle(arriving)
        for sealed in arriving:
            there.pages.received(there.wire.open_page(sealed))

    def run(self, limit: int = 5000) -> int:
        """Steps until both hold what the other published; returns how many it took."""
        for number in range(1, limit + 1):
            self.step()
            if self.one.pages.delivered and self.two.pages.delivered:
                return number
        raise AssertionError(f"nothing settled in {limit} intervals")


def noise(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


@pytest.mark.parametrize(
    "length", [1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 200 << 10, MAX_BLOB_BYTES]
)
def test_facts_arrive_whole_and_once(length: int) -> None:
    pair = Pair()
    blob = noise(length)
    pair.one.pages.publish(blob)
    steps = pair.run()
    # one interval to learn what the peer holds, one for its last word
    assert steps <= -(-length // (CHUNK_BYTES * PAGES_A_TICK)) + 3
    assert pair.two.got == [blob]
    assert pair.two.pages.fresh
    assert pair.one.got == []
    assert not pair.one.pages.fresh


@given(
    st.integers(0, 40 << 10), st.integers(0, 40 << 10), st.sampled_from([0.0, 0.3, 0.7]),
    st.integers(1, 3), st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_facts_of_both_arrive_over_links_that_lose_double_and_reorder(
    first: int, second: int, loss: float, links: int, seed: int
) -> None:
    pair = Pair(loss=loss, links=links, seed=seed)
    blobs = [noise(first + 1, 1), noise(second + 1, 2)]
    pair.one.pages.publish(blobs[0])
    pair.two.pages.publish(blobs[1])
    pair.run()
    assert (pair.two.got, pair.one.got) == ([blobs[0]], [blobs[1]])


def test_in_the_calm_one_status_a_second_goes_each_way() -> None:
    pair = Pair()
    pair.one.pages.publish(noise(5000))
    pair.run()
    pair.step()
    pair.step()
    intervals = 10 * STATUS_EVERY_MS // INTERVAL_MS
    assert sum(pair.step() for _ in range(intervals)) == 2 * 10
    assert all(len(sealed) == 102 for sealed in pair.recorded[-20:])


def test_few_pages_go_at_once() -> None:
    pair = Pair()
    pair.one.pages.publish(noise(MAX_BLOB_BYTES))
    pair.two.pages.publish(noise(MAX_BLOB_BYTES, 1))
    assert max(pair.step() for _ in range(20)) <= 2 * PAGES_A_TICK


def test_without_a_confirmed_peer_nothing_is_sent_or_taken() -> None:
    pair = Pair()
    pair.one.confirmed = 0
    pair.one.pages.publish(b"facts")
    assert sum(pair.step() for _ in range(50)) == 5  # the other one's statuses
    assert pair.one.pages.counters.other_session == 5
    assert not pair.one.pages.delivered


def test_a_peer_that_answers_nothing_gets_statuses_only() -> None:
    pair = Pair()
    pair.one.pages.publish(noise(MAX_BLOB_BYTES))
    pair.step()
    pair.step()
    pair.two.confirmed = 0  # it hears, and says nothing
    for _ in range(pages_module.SILENT_AFTER_MS // INTERVAL_MS):
        pair.step()
    assert [pair.step() for _ in range(30)].count(1) == 3


def test_new_facts_take_the_place_of_the_old_ones() -> None:
    pair = Pair()
    for number in range(5):
        pair.one.pages.publish(noise(9000, number))
        pair.run()
    pair.one.pages.publish(noise(9000, 4))
    assert pair.run() == 1
    assert pair.two.got == [noise(9000, number) for number in range(5)]


def test_facts_that_change_all_the_time_still_arrive() -> None:
    pair = Pair(loss=0.3)
    for number in range(600):
        pair.one.pages.publish(noise(50_000, number))
        pair.step()
    assert len(pair.two.got) >= 10
    pair.run()
    assert pair.two.got[-1] == noise(50_000, 599)


def test_a_restart_of_the_receiver_gets_the_facts_again() -> None:
    pair = Pair()
    pair.one.pages.publish(noise(9000))
    pair.run()
    pair.two.restart(23)
    pair.meet()
    assert not pair.one.pages.delivered
    pair.run()
    assert pair.two.got == [noise(9000)]


def test_a_restart_of_the_sender_sends_nothing_that_the_peer_has() -> None:
    pair = Pair()
    pair.one.pages.publish(noise(9000))
    pair.run()
    pair.one.restart(12)
    pair.meet()
    assert not pair.two.pages.fresh
    pair.one.pages.publish(noise(9000))
    sent = [pair.step() for _ in range(20)]
    assert sum(sent) < 8
    assert pair.two.got == [noise(9000)]
    assert pair.two.pages.fresh


def test_a_restart_in_the_middle_leaves_nothing_half() -> None:
    pair = Pair()
    pair.one.pages.publish(noise(100_000, 1))
    for _ in range(5):
        pair.step()
    pair.one.restart(12)
    pair.meet()
    pair.one.pages.publish(noise(100_000, 2))
    pair.run()
    assert pair.two.got == [noise(100_000, 2)]


def test_replayed_pages_change_nothing() -> None:
    pair = Pair()
    pair.one.pages.publish(noise(9000, 1))
    pair.run()
    pair.one.pages.publish(noise(9000, 2))
    pair.run()
    recorded = list(pair.recorded)
    before = list(pair.two.got)
    for session in (0, 11):  # the link is lost, and the same session is heard again
        pair.two.confirmed = session
        pair.step()
        for sealed in recorded:
            replay(pair.two, sealed)
    assert pair.two.got == before
    pair.run()
    # Pages of an earlier life of either side
    pair.one.restart(12)
    pair.two.restart(23)
    pair.meet()
    for sealed in recorded:
        replay(pair.two, sealed)
        replay(pair.one, sealed)
    assert pair.two.got == pair.one.got == []
    assert not pair.two.pages.fresh


def replay(side: Side, sealed: bytes) -> None:
    try:
        page = side.wire.open_page(sealed)
    except OwnRole:
        return
    side.pages.received(page)


def test_a_blob_under_a_wrong_digest_is_never_given() -> None:
    """Only a peer with a broken program could send it."""
    pair = Pair()
    pair.step()
    lie = Page(11, 22, 1000, NO_DIGEST, bytes(range(16)), 1, 0, b"lie")
    pair.two.pages.received(lie)
    assert pair.two.got == []
    assert pair.two.pages.counters.damaged == 1
    assert not pair.two.pages.fresh


def test_what_is_collected_is_bounded() -> None:
    """Sealed by the peer, and hostile: a new digest each time, never whole."""
    pair = Pair()
    pair.step()
    for number in range(5000):
        digest = number.to_bytes(16, "big").replace(b"\0", b"\1")
        page = Page(11, 22, 1000 + number, NO_DIGEST, digest, MAX_PAGES, 0, bytes(CHUNK_BYTES))
        pair.two.pages.received(page)
    assembly = pair.two.pages._assembly  # what it keeps is what the test is about
    assert assembly is not None
    assert len(assembly.chunks) == 1
    assert pair.two.got == []


def test_facts_that_do_not_travel_are_refused_in_words() -> None:
    one = Pair().one
    with pytest.raises(FactsError, match="at most 1048576 can be told to the other node"):
        one.pages.publish(bytes(MAX_BLOB_BYTES + 1))
    with pytest.raises(FactsError, match="no bytes"):
        one.pages.publish(b"")
    assert json.loads(zlib.decompress(pack([1]))) == [1]


@given(st.lists(st.integers(1, 200), max_size=300))
def test_each_page_is_taken_once_and_none_that_is_much_too_late(counters: list[int]) -> None:
    pair = Pair()
    two = pair.two.pages
    taken: set[int] = set()
    for counter in counters:
        before = two.counters.accepted
        two.received(Page(11, 22, counter, NO_DIGEST, NO_DIGEST, 0, 0, b""))
        expected = counter not in taken and counter > max(taken, default=0) - 8 * PAGES_A_TICK
        assert two.counters.accepted - before == expected
        if expected:
            taken.add(counter)


def test_a_late_page_does_not_bring_back_what_was_said_before() -> None:
    pair = Pair()
    two = pair.two.pages
    digest = bytes(range(16))
    two.received(Page(11, 22, 9, digest, digest, 1, 0, b""))
    assert not two.delivered
    two.received(Page(11, 22, 8, NO_DIGEST, NO_DIGEST, 0, 0, b""))
    assert two.counters.accepted == 2
    assert not two.delivered  # the late one said that it held what we publish: nothing

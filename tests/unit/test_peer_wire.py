"""The wire: every datagram comes back as it was, and no bytes do anything but be refused."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfsha.core.model import MAX_PENDING, Datagram, Echo, Epoch, Phase, PromiseState, Role
from nfsha.peer import keys, wire
from nfsha.peer.keys import Key, KeyRing
from nfsha.peer.wire import Forged, Malformed, OtherVersion, OwnRole, Refusal, Refused, Wire
from tests.datagrams import SERVING

OURS = Key(bytes(range(32)))
NEXT = Key(bytes(range(1, 33)))
THEIRS = Key(bytes(range(2, 34)))
ENVELOPE_BYTES = 10

primary = Wire(KeyRing((OURS,)), Role.PRIMARY)
standby = Wire(KeyRing((OURS,)), Role.STANDBY)

u64 = st.integers(0, 2**64 - 1)
sessions = st.integers(1, 2**64 - 1)
timings_ms = st.integers(1, wire.MAX_TIMING_MS)
echoes = st.builds(Echo, session=sessions, seq=u64)
epochs = st.builds(
    Epoch,
    number=u64,
    id=st.binary(min_size=8, max_size=8).map(bytes.hex),
    authority=st.sampled_from(Role),
)
datagrams = st.builds(
    Datagram,
    role=st.just(Role.PRIMARY),
    session=sessions,
    seq=u64,
    echo=st.none() | echoes,
    pending=st.lists(echoes, max_size=MAX_PENDING).map(tuple),
    phase=st.sampled_from(Phase),
    epoch=st.none() | epochs,
    promise=st.sampled_from(PromiseState),
    interval_ms=timings_ms,
    hold_ms=timings_ms,
    takeover_after_ms=timings_ms,
    address_lease_ms=timings_ms,
    absence_ms=st.integers(0, wire.MAX_TIMING_MS),
    known_number=u64,
    handover=st.none() | epochs,
    ready=st.booleans(),
    aborted=st.none() | epochs,
    refuses=st.none() | epochs,
    asks=u64,
)


GOLDEN = (
    "6e667368" "03" "00" "630dcd29"  # magic, version, role, key hint
    "3dcf" "04" "00" "00"  # flags, phase, promise, pending
    "0123456789abcdef" "000000000000004d"  # session, seq
    "fedcba9876543210" "000000000000004e"  # echo
    "0000000000000003" "00112233445566ff" "00"  # epoch
    "0000000000000005" "1122334455667788" "01"  # handover
    "0000000000000002" "2233445566778899" "00"  # aborted
    "0000000000000004" "33445566778899aa" "01"  # refused
    "000000000000004c"  # what is asked
    "0000000000000004"  # highest epoch number known
    "00000064" "00000258" "000003e8" "000007d0" "00000000"  # timings
    "98658d627f493fd7d589ffc7010ee212938e982d1e946464dd2adab29d08f470"  # seal
)  # fmt: skip


def resealed(envelope_and_payload: bytes, key: Key = OURS) -> bytes:
    """What somebody who has the key could send."""
    seal = hmac.new(key.secret, envelope_and_payload, hashlib.sha256).digest()
    return envelope_and_payload + seal


def unsealed(datagram: Datagram = SERVING) -> bytearray:
    return bytearray(primary.seal(datagram)[:-32])


@given(datagrams)
def test_every_datagram_comes_back_as_it_was(datagram: Datagram) -> None:
    sealed = primary.seal(datagram)
    assert len(sealed) < wire.MAX_BYTES
    assert standby.open(sealed) == datagram


@pytest.mark.parametrize(
    "field", [each.name for each in dataclasses.fields(Datagram) if each.name != "role"]
)
def test_each_field_is_on_the_wire(field: str) -> None:
    changes: dict[str, Any] = {
        "echo": None,
        "epoch": None,
        "handover": None,
        "aborted": None,
        "refuses": None,
        "pending": (Echo(5, 6),),
        "phase": Phase.PASSIVE,
        "promise": PromiseState.STANDING,
    }
    if field in changes:
        change = {field: changes[field]}
    else:
        old = getattr(SERVING, field)
        change = {field: not old if isinstance(old, bool) else old + 1}
    other = dataclasses.replace(SERVING, **change)
    assert standby.open(primary.seal(other)) == other
    assert primary.seal(other) != primary.seal(SERVING)


def test_each_member_of_each_enum_has_a_code() -> None:
    said = [dataclasses.replace(SERVING, phase=phase) for phase in Phase]
    said += [dataclasses.replace(SERVING, promise=promise) for promise in PromiseState]
    said += [dataclasses.replace(SERVING, epoch=Epoch(1, "0" * 16, role)) for role in Role]
    assert [wire.decode(Role.PRIMARY, wire.encode(each)) for each in said] == said


def test_the_bytes_of_version_3_stay_what_they_are() -> None:
    """Two nodes of different releases meet during an upgrade: this must not change by accident."""
    assert primary.seal(SERVING).hex() == GOLDEN


def test_even_the_largest_datagram_is_small() -> None:
    largest = dataclasses.replace(SERVING, pending=(Echo(1, 1),) * MAX_PENDING)
    assert len(primary.seal(largest)) <= 256


@given(st.binary(max_size=wire.MAX_BYTES + 100))
def test_random_bytes_are_refused(noise: bytes) -> None:
    with pytest.raises(Refused):
        standby.open(noise)


@given(st.binary(max_size=300), st.integers(0, 255), st.integers(0, 255))
def test_random_bytes_under_a_true_seal_are_refused_or_canonical(
    noise: bytes, version: int, role: int
) -> None:
    envelope = b"nfsh" + bytes([version, role]) + OURS.hint
    sealed = resealed(envelope + noise)
    try:
        datagram = standby.open(sealed)
    except Refused as refused:
        assert refused.reason
    else:
        assert primary.seal(datagram) == sealed


@given(datagrams, st.data())
def test_a_payload_with_some_bytes_changed_is_refused_or_canonical(
    datagram: Datagram, data: st.DataObject
) -> None:
    plain = unsealed(datagram)
    for _ in range(data.draw(st.integers(1, 3))):
        plain[data.draw(st.integers(ENVELOPE_BYTES, len(plain) - 1))] = data.draw(
            st.integers(0, 255)
        )
    sealed = resealed(bytes(plain))
    try:
        opened = standby.open(sealed)
    except Refused as refused:
        assert refused.kind is Refusal.MALFORMED
    else:
        assert primary.seal(opened) == sealed


@given(datagrams, st.data())
def test_a_flipped_bit_anywhere_is_refused(datagram: Datagram, data: st.DataObject) -> None:
    sealed = bytearray(primary.seal(datagram))
    bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises((Forged, Malformed)):
        standby.open(bytes(sealed))


@given(datagrams, st.data())
def test_a_truncated_datagram_is_refused(datagram: Datagram, data: st.DataObject) -> None:
    sealed = primary.seal(datagram)
    with pytest.raises((Forged, Malformed)):
        standby.open(sealed[: data.draw(st.integers(0, len(sealed) - 1))])


@given(st.binary(min_size=1, max_size=50))
def test_trailing_bytes_are_refused(more: bytes) -> None:
    with pytest.raises(Forged):
        standby.open(primary.seal(SERVING) + more)
    with pytest.raises(Malformed, match="exactly"):
        standby.open(resealed(bytes(unsealed()) + more))


@given(datagrams)
def test_another_key_is_forged(datagram: Datagram) -> None:
    stranger = Wire(KeyRing((THEIRS,)), Role.PRIMARY)
    with pytest.raises(Forged, match="not in the key file"):
        standby.open(stranger.seal(datagram))


def test_another_key_under_our_hint_is_forged() -> None:
    with pytest.raises(Forged, match="does not fit"):
        standby.open(resealed(bytes(unsealed()), THEIRS))


def test_keys_rotate_without_a_gap() -> None:
    """Each step on one node while the other stands at the step before or after it."""
    steps = [(OURS,), (OURS, NEXT), (NEXT, OURS), (NEXT,)]
    for index, here in enumerate(steps):
        for there in steps[max(0, index - 1) : index + 2]:
            sealed = Wire(KeyRing(here), Role.PRIMARY).seal(SERVING)
            assert Wire(KeyRing(there), Role.STANDBY).open(sealed) == SERVING


def test_new_keys_can_be_taken_while_running() -> None:
    receiver = Wire(KeyRing((OURS,)), Role.STANDBY)
    sealed = Wire(KeyRing((NEXT,)), Role.PRIMARY).seal(SERVING)
    with pytest.raises(Forged):
        receiver.open(sealed)
    receiver.use(KeyRing((OURS, NEXT)))
    assert receiver.open(sealed) == SERVING


def test_another_version_of_the_real_peer_is_told_from_a_forged_one() -> None:
    plain = unsealed()
    plain[4] = wire.VERSION + 1
    with pytest.raises(OtherVersion, match="version 4, this node speaks 3") as caught:
        standby.open(resealed(bytes(plain)))
    assert caught.value.kind is Refusal.OTHER_VERSION
    with pytest.raises(Forged):
        standby.open(bytes(plain) + primary.seal(SERVING)[-32:])


def test_a_datagram_of_the_same_role_is_told() -> None:
    with pytest.raises(OwnRole, match="role is primary too"):
        primary.open(primary.seal(SERVING))


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (5, b"\x02", "unknown role 2"),
        (10, b"\x40", "unknown flags"),
        (12, b"\x0f", "unknown phase 15"),
        (13, b"\x03", "unknown promise 3"),
        (14, b"\x05", "5 pending sessions"),
        (14, b"\x01", "exactly"),
        (15, bytes(8), "session 0"),
        (31, bytes(8), "an echo of session 0"),
        (63, b"\x02", "unknown authority 2"),
        (131, bytes(4), "a timing of 0 ms"),
        (143, b"\x7f\0\0\0", "a timing of 2130706432 ms"),
        (147, b"\x7f\0\0\0", "a timing of 2130706432 ms"),
    ],
)
def test_sealed_nonsense_is_malformed_with_a_reason(offset: int, value: bytes, words: str) -> None:
    plain = unsealed()
    plain[offset : offset + len(value)] = value
    with pytest.raises(Malformed, match=words):
        standby.open(resealed(bytes(plain)))


@pytest.mark.parametrize("absent", ["echo", "epoch"])
def test_what_is_absent_carries_nothing(absent: str) -> None:
    without: dict[str, Any] = {absent: None}
    plain = unsealed(dataclasses.replace(SERVING, **without))
    plain[40 if absent == "echo" else 50] = 1
    with pytest.raises(Malformed, match=f"an {absent} that says it is absent"):
        standby.open(resealed(bytes(plain)))


def test_a_pending_session_of_0_is_malformed() -> None:
    plain = unsealed(dataclasses.replace(SERVING, pending=(Echo(1, 2), Echo(3, 4))))
    plain[-16:-8] = bytes(8)
    with pytest.raises(Malformed, match="a pending session 0"):
        standby.open(resealed(bytes(plain)))


@pytest.mark.parametrize(
    "change",
    [
        {"seq": -1},
        {"seq": 2**64},
        {"session": 2**64},
        {"hold_ms": 2**32},
        {"echo": Echo(-1, 0)},
        {"pending": (Echo(1, 1),) * (MAX_PENDING + 1)},
        {"epoch": Epoch(-1, "0" * 16, Role.PRIMARY)},
        {"epoch": Epoch(1, "0" * 15, Role.PRIMARY)},
        {"epoch": Epoch(1, "ABCDEF0123456789", Role.PRIMARY)},
        {"epoch": Epoch(1, "not hexadecimal!", Role.PRIMARY)},
        {"role": Role.STANDBY},
    ],
)
def test_what_cannot_be_said_is_not_sealed(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        primary.seal(dataclasses.replace(SERVING, **change))


def test_the_seal_is_plain_hmac_sha256() -> None:
    """So that any tool can check it: RFC 2104 with FIPS 180-4, over all bytes before it."""
    sealed = primary.seal(SERVING)
    assert sealed == resealed(sealed[:-32])
    assert sealed[6:10] == hashlib.sha256(OURS.secret).digest()[: keys.HINT_BYTES]

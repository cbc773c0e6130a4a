"""The bytes of fanotify events: merged by their records, parsed strictly, never past the end."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfsha.replica.journal.fanotify import (
    FAN_CREATE,
    FAN_MODIFY,
    FAN_Q_OVERFLOW,
    EventFormatError,
    Subject,
    merge_events,
    parse_subject,
)

FID, DFID_NAME, DFID, PIDFD = 1, 2, 3, 4


def handle(number: int) -> bytes:
    return struct.pack("=IiQ", 8, 1, number)


def record(kind: int, subject: bytes, name: bytes | None = None) -> bytes:
    tail = b"" if name is None else name + b"\0" * (4 - len(name) % 4)
    return struct.pack("=BxH8s", kind, 12 + len(subject) + len(tail), b"fsid") + subject + tail


def event(mask: int, *records: bytes, version: int = 3) -> bytes:
    rest = b"".join(records)
    return struct.pack("=IBxHQii", 24 + len(rest), version, 24, mask, -1, 42) + rest


def test_equal_records_become_one_with_all_masks() -> None:
    subject = record(DFID_NAME, handle(1), b"name") + record(FID, handle(2))
    other = record(DFID_NAME, handle(1), b"other")
    seen: dict[bytes, int] = {}
    data = event(FAN_CREATE, subject) + event(FAN_CREATE, other) + event(FAN_MODIFY, subject)
    assert merge_events(data, seen) == 3
    assert seen == {subject: FAN_CREATE | FAN_MODIFY, other: FAN_CREATE}


def test_overflow_has_no_records() -> None:
    seen: dict[bytes, int] = {}
    assert merge_events(event(FAN_Q_OVERFLOW), seen) == 1
    assert seen == {b"": FAN_Q_OVERFLOW}


def test_longer_header_of_a_later_kernel_is_skipped() -> None:
    subject = record(FID, handle(1))
    data = struct.pack("=IBxHQii", 32 + len(subject), 3, 32, FAN_MODIFY, -1, 42) + bytes(8)
    seen: dict[bytes, int] = {}
    merge_events(data + subject, seen)
    assert seen == {subject: FAN_MODIFY}


@pytest.mark.parametrize(
    "data",
    [
        event(FAN_CREATE)[:10],
        event(FAN_CREATE)[:23],
        event(FAN_CREATE, record(FID, handle(1)))[:-1],
        event(FAN_CREATE, version=2),
        struct.pack("=IBxHQii", 0, 3, 24, 0, -1, 0),
        struct.pack("=IBxHQii", 16, 3, 24, 0, -1, 0),
        struct.pack("=IBxHQii", 24, 3, 8, 0, -1, 0),
    ],
    ids=["torn", "cut", "cut record", "version", "no length", "short length", "short header"],
)
def test_what_is_no_event_is_refused(data: bytes) -> None:
    with pytest.raises(EventFormatError):
        merge_events(data, {})


def test_subject_of_an_entry_with_its_target() -> None:
    records = record(DFID_NAME, handle(1), b"a name\n") + record(FID, handle(2))
    assert parse_subject(records) == Subject(handle(1), b"a name\n", handle(2))


def test_subject_of_an_entry_without_target() -> None:
    longest = b"x" * 255
    subject = parse_subject(record(DFID_NAME, handle(1), longest))
    assert subject == Subject(handle(1), longest, None)


def test_subject_that_the_kernel_has_no_folder_for() -> None:
    assert parse_subject(record(FID, handle(7))) == Subject(None, b"", handle(7))


def test_subject_that_is_the_folder_itself() -> None:
    assert parse_subject(record(DFID, handle(7))) == Subject(handle(7), b".", None)


@pytest.mark.parametrize(
    "records",
    [
        record(FID, handle(1))[:-1],
        record(FID, handle(1))[:3],
        record(PIDFD, handle(1)),
        record(DFID_NAME, handle(1)),
        record(FID, struct.pack("=IiQ", 400, 1, 1)),
        record(FID, struct.pack("=Ii", 136, 1) + bytes(136)),
        struct.pack("=BxH8s", FID, 0, b"fsid") + handle(1),
    ],
    ids=["torn", "stub", "unknown", "no name", "handle ends outside", "huge handle", "no length"],
)
def test_what_is_no_record_is_refused(records: bytes) -> None:
    with pytest.raises(EventFormatError):
        parse_subject(records)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for read in (lambda: merge_events(data, {}), lambda: parse_subject(data)):
        try:
            read()
        except EventFormatError as error:
            assert str(error)


@given(st.binary(max_size=60), st.integers(0, 400), st.sampled_from([FID, DFID_NAME, DFID, 9]))
def test_any_record_is_read_or_refused(rest: bytes, length: int, kind: int) -> None:
    data = struct.pack("=BxH8sIi", kind, length, b"fsid", len(rest), 1) + rest
    try:
        subject = parse_subject(data)
    except EventFormatError:
        return
    assert (subject.folder or subject.target or b"") in data

"""What rsync's codes and messages mean; that they really come so is tested in tests/netns."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nfsha.replica.rsync.exits import (
    MAX_LINES,
    MAX_VANISHED,
    Complaints,
    Verdict,
    decode_name,
    judge,
)

NO_ROOM = b'rsync: [receiver] write failed on "/x" (in v-1): No space left on device (28)'
NO_INODE = b'rsync: [receiver] mkstemp "/.x" failed: No space left on device (28)'
UNREADABLE = b'rsync: [sender] opendir "/e" (in v-1) failed: Permission denied (13)'
GONE = b'rsync: [sender] link_stat "/g" (in v-1) failed: No such file or directory (2)'
REPLACED = (
    b'rsync: [sender] send_files failed to open "/1/f" (in v-1): '
    b"Too many levels of symbolic links (40)"
)
SUMMARY = b"rsync error: some files/attrs were not transferred (see previous errors) (code 23)"


def said(*lines: bytes) -> Complaints:
    found = Complaints()
    found.take(lines)
    return found


@pytest.mark.parametrize(
    ("code", "lines", "verdict"),
    [
        (0, [], Verdict.COMPLETE),
        (1, [b"rsync: --foo: unknown option"], Verdict.FAILED),
        (2, [], Verdict.FAILED),
        (5, [b"@ERROR: auth failed on module v-1"], Verdict.REFUSED),
        (5, [b"@ERROR: Unknown module 'v-1'"], Verdict.REFUSED),
        (5, [b"@ERROR: max connections (4) reached -- try again later"], Verdict.RETRY),
        (10, [b"rsync: failed to connect to ::1: Connection refused (111)"], Verdict.RETRY),
        (10, [b"pre-xfer exec returned failure (256)"], Verdict.REFUSED),
        (
            10,
            [
                b"pre-xfer exec returned failure (256):",
                b"nfsha has nothing fresh to send: publishing takes longer than 6 s",
            ],
            Verdict.RETRY,
        ),
        (11, [NO_ROOM], Verdict.FAILED),
        (12, [], Verdict.RETRY),
        (12, [NO_ROOM], Verdict.FAILED),
        (20, [], Verdict.KILLED),
        (-9, [], Verdict.KILLED),
        (137, [], Verdict.KILLED),
        (23, [UNREADABLE, SUMMARY], Verdict.FAILED),
        (23, [NO_INODE, SUMMARY], Verdict.FAILED),
        (23, [GONE, SUMMARY], Verdict.INCOMPLETE),
        (23, [GONE, UNREADABLE, SUMMARY], Verdict.FAILED),
        (23, [GONE, REPLACED, SUMMARY], Verdict.INCOMPLETE),
        (23, [b"could not make way for new symlink: a", SUMMARY], Verdict.INCOMPLETE),
        (24, [b'file has vanished: "/a" (in v-1)'], Verdict.INCOMPLETE),
        (25, [], Verdict.STOPPED),
        (30, [], Verdict.RETRY),
        (35, [], Verdict.RETRY),
        (99, [], Verdict.FAILED),
    ],
)
def test_verdicts(code: int, lines: list[bytes], verdict: Verdict) -> None:
    ending = judge(code, said(*lines))
    assert (ending.verdict, ending.code) == (verdict, code)
    assert ending.reason


@given(st.integers(-64, 255), st.lists(st.binary(max_size=80), max_size=5))
def test_every_code_has_a_verdict_and_only_0_is_complete(code: int, lines: list[bytes]) -> None:
    assert (judge(code, said(*lines)).verdict is Verdict.COMPLETE) == (code == 0)


def test_a_full_disk_is_told_from_the_source_s() -> None:
    assert said(NO_ROOM).full
    assert not said(NO_ROOM.replace(b"[receiver]", b"[sender]")).full
    assert said(NO_ROOM.replace(b"No space left on device (28)", b"quota (122)")).full


def test_the_first_message_is_told() -> None:
    reason = judge(23, said(UNREADABLE, b"other", SUMMARY)).reason
    assert reason.startswith("2 things could not be copied, the first: rsync: [sender] opendir")


def test_vanished_names_are_exact() -> None:
    found = said(
        b'file has vanished: "/z/odd \\#377\\#012\\#134#012" (in v-1)',
        b'directory has vanished: "/a"b" (in v-1)',
        b'rsync: [sender] file has vanished: "/c"',
    )
    assert found.vanished == [b"z/odd \xff\n\\#012", b'a"b', b"c"]
    assert found.count == 0


def test_all_is_bounded() -> None:
    found = said(*[b"message %d" % number for number in range(1000)])
    found.take(b'file has vanished: "/%d"' % number for number in range(MAX_VANISHED + 5))
    assert len(found.lines) == MAX_LINES
    assert len(found.vanished) == MAX_VANISHED
    assert (found.count, found.vanished_count) == (1000, MAX_VANISHED + 5)


def test_a_message_cannot_carry_control_characters_into_the_log() -> None:
    assert said(b"a\x1b[31mb\x07").lines == ["a\\x1b[31mb\\x07"]


def as_rsync_prints(name: bytes) -> bytes:
    """Rsync's log.c, filtered_fwrite, in the C locale."""
    out = bytearray()
    for at, byte in enumerate(name):
        looks_escaped = byte == ord("\\") and re.match(rb"\\#[0-9]{3}", name[at:])
        odd = byte != ord("\t") and (byte < 0x20 or byte > 0x7E)
        out += b"\\#%03o" % byte if odd or looks_escaped else bytes((byte,))
    return bytes(out)


@given(st.binary(max_size=300))
@example(b"\\#134#012")
@example(b"\\\\#012")
@example(b"\\#999")
@example(b"\\#\n")
def test_names_come_back_exactly(name: bytes) -> None:
    assert decode_name(as_rsync_prints(name)) == name


@given(st.text(alphabet="\\#0189a\n", max_size=20))
def test_names_that_look_escaped_come_back_exactly(text: str) -> None:
    assert decode_name(as_rsync_prints(text.encode())) == text.encode()

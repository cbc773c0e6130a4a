"""Progress and counts, read from what rsync prints."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfsha.replica.rsync.progress import ProgressReader, Stage, Stats, StatsError, parse_stats

COUNTS = b"""\
Number of files: 1021 (reg: 815, dir: 206)
Number of created files: 20 (reg: 15, dir: 5)
Number of deleted files: 3 (reg: 2, dir: 1)
Number of regular files transferred: 15
Total file size: 1234567890123 bytes
Total transferred file size: 18 bytes
Literal data: 0 bytes
Matched data: 0 bytes
File list size: 442
File list generation time: 0.001 seconds
File list transfer time: 0.000 seconds
Total bytes sent: 141
Total bytes received: 525

sent 141 bytes  received 525 bytes  1332.00 bytes/sec
total size is 18  speedup is 0.03
"""


def test_counts() -> None:
    assert parse_stats(COUNTS) == Stats(
        entries=1021,
        folders=206,
        created=20,
        created_folders=5,
        deleted=3,
        transferred=15,
        transferred_bytes=18,
        total_bytes=1234567890123,
        wire_bytes=666,
    )


def test_counts_without_kinds() -> None:
    text = COUNTS.replace(b" (reg: 2, dir: 1)", b"").replace(
        b"deleted files: 3", b"deleted files: 0"
    )
    assert parse_stats(text).deleted == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"Number of files: 1021", b"Number of files: 1,021"),
        (b"Total bytes sent: 141", b"Total bytes sent: 1.41K"),
        (b"Total bytes sent: 141\n", b""),
        (b"Number of deleted files: 3 (reg: 2, dir: 1)\n", b""),
        (b"files transferred: 15", b"files transferred: many"),
        (b"Total file size", b"Total size"),
    ],
)
def test_counts_of_another_form_are_refused(old: bytes, new: bytes) -> None:
    assert old in COUNTS
    with pytest.raises(StatsError, match="counts"):
        parse_stats(COUNTS.replace(old, new))


def test_counts_that_come_twice_are_refused() -> None:
    with pytest.raises(StatsError):
        parse_stats(COUNTS + COUNTS)


def line(done: int, percent: int, end: bytes = b"") -> bytes:
    return b"%15d %3d%%   34.50MB/s    0:00:10%s" % (done, percent, end)


def test_the_total_of_a_plan_gives_percentage_and_eta() -> None:
    reader = ProgressReader(Stage.COPY, 10_000, 0)
    news = reader.take(line(2_000, 1, b"  "), 1_000)
    assert news is not None
    assert (news.bytes, news.total_bytes, news.percent) == (2_000, 10_000, 20)
    assert (news.rate_bytes_s, news.eta_s) == (2_000, 4)


def test_files_are_counted_from_the_last_finished_one() -> None:
    reader = ProgressReader(Stage.COPY, 10_000, 0)
    reader.take(line(2_000, 1, b" (xfr#7, ir-chk=1000/1021)"), 0)
    assert reader.last.files == 7
    news = reader.take(line(3_000, 1, b"  "), 1_000)
    assert news is not None
    assert news.files == 7


def test_without_a_plan_the_percentage_waits_for_the_whole_list() -> None:
    reader = ProgressReader(Stage.COPY, None, 0)
    early = reader.take(line(500, 50, b" (xfr#1, ir-chk=10/20)"), 0)
    late = reader.take(line(600, 60, b" (xfr#2, to-chk=9/20)"), 1_000)
    assert early is not None
    assert late is not None
    assert (early.percent, late.percent) == (None, 60)
    assert (late.total_bytes, late.eta_s) == (None, None)


def test_a_filesystem_that_grows_gives_percentage_rate_and_eta_too() -> None:
    reader = ProgressReader(Stage.COPY, 10_000, 0)
    news = reader.grown(2_000, 7, 1_000)
    assert (news.bytes, news.files, news.percent) == (2_000, 7, 20)
    assert (news.rate_bytes_s, news.eta_s) == (2_000, 4)
    assert ProgressReader(Stage.COPY, None, 0).grown(2_000, 7, 1_000).percent is None


def test_news_come_five_times_a_second_and_the_numbers_stay_exact() -> None:
    reader = ProgressReader(Stage.COPY, None, 0)
    news = [reader.take(line(at, 1, b" (xfr#%d, to-chk=0/1)" % at), at) for at in range(1, 1001)]
    assert sum(each is not None for each in news) == 5
    assert (reader.last.bytes, reader.last.files) == (1000, 1000)


def test_the_rate_is_of_the_last_seconds() -> None:
    reader = ProgressReader(Stage.COPY, None, 0)
    for second in range(1, 11):
        reader.take(line(1_000_000 * second, 1, b"  "), second * 1000)
    for second in range(11, 21):
        reader.take(line(10_000_000 + 1_000 * (second - 10), 1, b"  "), second * 1000)
    assert reader.last.rate_bytes_s == 1_000


def test_what_is_no_progress_is_kept_for_the_counts() -> None:
    reader = ProgressReader(Stage.COPY, None, 0)
    for each in COUNTS.splitlines():
        assert reader.take(each, 0) is None
    assert reader.rest.stats().entries == 1021


@given(st.binary(max_size=200))
def test_no_line_is_too_odd(data: bytes) -> None:
    ProgressReader(Stage.COPY, 1, 0).take(data, 0)

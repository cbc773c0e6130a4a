"""The stamp is as old as the files of its epoch, also after the clock was set back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nfsha.replica.files.own_names import STAMP_NAME
from nfsha.replica.volume import volumes
from nfsha.replica.volume.beginning import follow_clock
from nfsha.replica.volume.facts import VolumeFacts
from tests.unit.test_replica_serving import COPIED, volume


@pytest.mark.parametrize(("ahead_ns", "touched"), [(0, False), (1, False), (-1, True)])
def test_a_stamp_from_the_future_is_touched_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead_ns: int, *, touched: bool
) -> None:
    @contextmanager
    def root_of(one: VolumeFacts) -> Iterator[int]:
        fd = os.open(one.path, os.O_RDONLY)
        yield fd
        os.close(fd)

    monkeypatch.setattr(volumes, "root_of", root_of)
    stamp = tmp_path / STAMP_NAME
    stamp.write_text("as it was")
    os.utime(stamp, ns=(1, 2))
    before = stamp.stat()
    told_ns = before.st_ctime_ns + ahead_ns
    assert follow_clock(volume(COPIED, path=tmp_path), told_ns) is touched
    after = stamp.stat()
    while touched and after.st_ctime_ns == before.st_ctime_ns:  # within one tick of the clock
        follow_clock(volume(COPIED, path=tmp_path), told_ns)
        after = stamp.stat()
    assert (after.st_ctime_ns > before.st_ctime_ns) is touched
    assert (after.st_mtime_ns, stamp.read_text()) == (2, "as it was")

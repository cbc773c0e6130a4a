"""The machines of these tests leave nothing behind, also where they do not end by themselves."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.vm import uml


def test_a_machine_that_is_not_done_in_time_is_gone_with_all_its_processes(tmp_path: Path) -> None:
    with pytest.raises(uml.UmlError, match="not done within 2 s"):
        uml.run("tests.vm.guest_knfsd", tmp_path, {"data": {}, "words": {}}, limit_s=2)
    assert (tmp_path / "machine").is_dir()  # it was there
    running = psutil.process_iter(["cmdline", "status"])
    assert not [
        process
        for process in running
        if f"uml_dir={tmp_path}" in (process.info["cmdline"] or ())
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]

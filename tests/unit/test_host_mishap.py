"""The last line of defence against tracebacks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nfsha.host.mishap import one_line


def test_one_line_names_kind_words_and_places() -> None:
    with pytest.raises(ValueError, match="number") as raised:
        int("no\nnumber")
    told = one_line(raised.value)
    assert told.startswith("ValueError: ")
    assert "\n" not in told
    assert "test_host_mishap.py:" in told


def test_an_unforeseen_error_of_a_command_is_one_line_and_exit_code_1() -> None:
    broken = (
        "import nfsha.cli.main as m, nfsha.cli.arguments as a\n"
        "def burst(): raise LookupError('nobody foresaw this')\n"
        "a.parser = burst\n"
        "m.main(['version'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", broken], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "internal error" in done.stderr
    assert "nobody foresaw this" in done.stderr

"""Properties are tried on the same examples in each run of a commit, and explored elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

from hypothesis import settings

MAKEFILE = Path(__file__).parents[2] / "Makefile"


def recipe_of(target: str) -> str:
    found = re.search(rf"(?m)^{target}:.*\n((?:\t.*\n)+)", MAKEFILE.read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def test_what_must_pass_repeats_itself_and_the_rest_explores() -> None:
    assert settings.get_profile("same").derandomize
    assert not settings.get_profile("explore").derandomize
    assert "hypothesis" not in recipe_of("test")
    assert "--hypothesis-profile=explore" in recipe_of("test-all")


def test_the_ordinary_profile_is_the_one_that_repeats_itself() -> None:
    conftest = (Path(__file__).parents[1] / "conftest.py").read_text(encoding="utf-8")
    assert re.findall(r'(?m)^settings\.load_profile\("(\w+)"\)', conftest) == ["same"]

"""What people read is so: links lead somewhere, and commands, options, targets and rules exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nfsha.cli.arguments import groups
from nfsha.config import parse
from nfsha.core.table import ROWS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = {one.words: " ".join(one.usage_parts) for _, every in groups() for one in every}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def _code(page: Path) -> list[str]:
    """Lines of code blocks, and code within text."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"(?ms)^```\w*\n(.*?)^```$", text)
    prose = re.sub(r"(?ms)^```.*?^```$", "", text)
    return [
        *(line for block in blocks for line in block.splitlines()),
        *re.findall(r"`([^`]+)`", prose),
    ]


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"(?m)^#+ (.+)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_links_within_the_tree_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name) if name else page
        assert there.exists(), target
        assert not anchor or anchor in _anchors(there), target


@pages
def test_commands_and_their_options_exist(page: Path) -> None:
    for code in _code(page):
        match = re.match(r"(?:/opt/nfsha/bin/)?nfsha ([a-z].*)", code)
        if match is None:
            continue
        asked = match[1].partition("|")[0].split()
        words = next((n for n in COMMANDS if asked[: len(n.split())] == n.split()), None)
        assert words is not None, code
        for option in asked:
            assert not option.startswith("-") or option in COMMANDS[words], code


@pages
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for code in _code(page):
        for target in re.findall(r"^(?:sudo )?make ([a-z-]+)", code):
            assert re.search(rf"(?m)^{target}:", makefile), code


@pages
def test_rules_that_are_named_exist(page: Path) -> None:
    ids = {row.id for row in ROWS}
    for found in re.findall(r"\b[ACDFIMPRSTW]\d\d\b", page.read_text(encoding="utf-8")):
        assert found in ids, found


CONFIGURED = ["README.md", "docs/install.md", "docs/configuration.md", "docs/replication.md"]


@pytest.mark.parametrize("name", CONFIGURED)
def test_configurations_that_are_shown_are_right(name: str) -> None:
    blocks = re.findall(r"(?ms)^```toml\n(.*?)^```$", (ROOT / name).read_text(encoding="utf-8"))
    assert blocks
    whole = next((block for block in blocks if block.startswith("role")), "")
    for block in blocks:
        parse(block if block.startswith("role") else f"{whole or SMALLEST}\n{block}")


SMALLEST = """role = "primary"
interface = "eth0"
vip = ["192.0.2.10"]
witness = ["gateway"]
links = [{ local = "192.0.2.1", peer = "192.0.2.2" }, { local = "10.9.9.1", peer = "10.9.9.2" }]
"""

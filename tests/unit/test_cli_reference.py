"""The parser, the help and docs/: all from one table, and none behind it."""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from nfsha.cli import arguments
from nfsha.cli.arguments import COMMANDS, Command
from nfsha.cli.exits import MEANINGS, Exit

ROOT = Path(__file__).resolve().parents[2]


def fill(command: Command) -> list[str]:
    """The command's words with the least that it wants."""
    words = command.words.split()
    for option in command.options:
        if option.optional:
            continue
        choices = option.parse.get("choices")
        value = choices[0] if choices else "P93"
        words += [value] if not option.names[-1].startswith("-") else [option.names[-1], value]
    return words


def test_the_generated_pages_are_what_the_tables_say() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "render_cli.py", "--check"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_page_that_is_behind_is_found() -> None:
    renew = runpy.run_path(str(ROOT / "scripts" / "render_cli.py"))["state_machine"]
    page = (ROOT / "docs" / "state-machine.md").read_text(encoding="utf-8")
    assert renew(page) == page
    assert renew(page.replace("PASSIVE --> TAKEOVER", "PASSIVE -> X")) == page
    with pytest.raises(ValueError, match="lacks the markers"):
        renew(page.replace("<!-- end of table -->", ""))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.words)
def test_every_command_has_json_an_example_and_a_line_of_help(command: Command) -> None:
    parser = arguments.parser()
    asked = parser.parse_args([*fill(command), "--json"])
    assert asked.json is True
    assert asked.do is command.do
    assert parser.parse_args(fill(command)).json is False
    assert parser.parse_args(command.example.split()[1:]).do is command.do
    assert command.help[0].islower()
    assert not command.help.endswith(".")
    assert len(command.help) <= 59


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.words)
def test_help_fits_eighty_columns(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments.parser().parse_args([*command.words.split(), "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"example: {command.example}" in shown
    assert shown.startswith(f"usage: nfsha {command.words}")
    assert max(map(len, shown.splitlines())) <= 80
    for option in command.all_options:
        assert option.names[-1] in shown or str(option.parse.get("metavar")) in shown


def test_the_overview_groups_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments.parser().parse_args(["--help"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for name, commands in arguments.groups():
        assert f"\n{name}:\n" in shown
        for command in commands:
            assert f"\n  {command.words} " in shown
    for code in Exit:
        assert f"\n  {code.value} " in shown


def test_the_exit_codes_are_the_promised_ones() -> None:
    assert {code.name: code.value for code in Exit} == {
        "DONE": 0, "CANNOT": 1, "USAGE": 2, "REFUSED": 3, "ABORTED": 4, "INCOMPLETE": 5,
        "UNREACHABLE": 6, "INTERRUPTED": 130,
    }  # fmt: skip
    assert set(MEANINGS) == set(Exit)


@pytest.mark.parametrize(
    "words",
    [
        ["bogus"],
        ["maintenance", "perhaps"],
        ["maintenance"],
        ["resolve"],
        ["resolve", "--keep", "both"],
        ["events", "-n", "-1"],
        ["events", "-n", "1001"],
        ["events", "-n", "9" * 5000],
        ["events", "--fol"],
        ["keygen", "--add", "--show"],
        ["fsm", "explain"],
        ["activate", "--wait", "soon"],
    ],
)
def test_wrong_usage_ends_with_two_and_one_message(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments.parser().parse_args(words)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "error: " in said
    assert "Traceback" not in said


def test_a_family_without_a_command_shows_its_members() -> None:
    asked = arguments.parser().parse_args(["fsm"])
    assert asked.do is None
    assert isinstance(asked.shown, argparse.ArgumentParser)
    assert "fsm explain" in asked.shown.format_help()

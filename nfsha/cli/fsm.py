"""The commands that print the state machine: as a table, as a diagram, or one row explained."""

from __future__ import annotations

import argparse

from nfsha.cli.exits import Answer, CommandError, Exit
from nfsha.core import describe


def table(args: argparse.Namespace) -> Answer:
    """Prints every row of the table of transitions."""
    del args
    return Answer(describe.table_text(), {"ok": True, "rows": describe.rows()})


def mermaid(args: argparse.Namespace) -> Answer:
    """Prints the diagram of the transitions in the language of Mermaid."""
    del args
    text = describe.mermaid()
    return Answer(text, {"ok": True, "mermaid": text})


def explain(args: argparse.Namespace) -> Answer:
    """Explains one row: the id that the log, the events and `nfsha status` name."""
    try:
        return Answer(describe.explain(args.row), {"ok": True, **describe.row(args.row)})
    except describe.UnknownRowError as error:
        raise CommandError(Exit.USAGE, str(error), "`nfsha fsm table` lists them all") from error

"""The commands that print the state machine: as a table, as a diagram, or one row explained.

They load the table themselves: no other command needs it, and all of them load this module.
"""

from __future__ import annotations

import argparse

from nfsha.cli.exits import Answer, CommandError, Exit


def table(args: argparse.Namespace) -> Answer:
    """Prints every row of the table of transitions."""
    from nfsha.core import describe  # noqa: PLC0415

    del args
    return Answer(describe.table_text(), {"ok": True, "rows": describe.rows()})


def mermaid(args: argparse.Namespace) -> Answer:
    """Prints the diagram of the transitions in the language of Mermaid."""
    from nfsha.core import describe  # noqa: PLC0415

    del args
    text = describe.mermaid()
    return Answer(text, {"ok": True, "mermaid": text})


def explain(args: argparse.Namespace) -> Answer:
    """Explains one row: the id that the log, the events and `nfsha status` name."""
    from nfsha.core import describe  # noqa: PLC0415

    try:
        return Answer(describe.explain(args.row), {"ok": True, **describe.row(args.row)})
    except describe.UnknownRowError as error:
        raise CommandError(Exit.USAGE, str(error), "`nfsha fsm table` lists them all") from error

"""The entry point: parses, does what was asked, and prints one answer or one error.

Nothing here knows what the commands do. No traceback reaches an operator: an error of the system
that no command foresaw becomes one line and exit code 1.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence

from nfsha.cli import arguments
from nfsha.cli.exits import Answer, CommandError, Exit
from nfsha.host import mishap


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code (`exits.MEANINGS`).

    Raises SystemExit (0 or 2) where argparse shows help or a usage error.
    """
    sys.excepthook = _last_words
    args = arguments.parser().parse_args(argv)
    if args.do is None:
        args.shown.print_help(sys.stderr)
        return Exit.USAGE
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may have any character
    code: int = Exit.DONE
    try:
        code = _carry_out(args)
        print(end="", flush=True)
    except BrokenPipeError:
        # Who reads has enough, as in `nfsha events | head`. Python would flush again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
    return code


def _carry_out(args: argparse.Namespace) -> int:
    """Does it, shows the answer or the error, and returns the exit code."""
    try:
        answer = args.do(args)
    except CommandError as error:
        _complain(error, as_json=args.json)
        return error.exit
    except BrokenPipeError:
        raise
    except OSError as error:
        _complain(CommandError(Exit.CANNOT, _words(error)), as_json=args.json)
        return Exit.CANNOT
    _show(answer, as_json=args.json)
    return int(answer.exit)


def _last_words(_kind: type[BaseException], error: BaseException, _trace: object) -> None:
    """What nobody foresaw: one line. The process ends with exit code 1, as by Python's own hook."""
    told = f"nfsha: internal error, please report it: {mishap.one_line(error)}"
    print(told, file=sys.stderr)


def _show(answer: Answer, *, as_json: bool) -> None:
    if as_json and answer.data:
        print(json.dumps(answer.data))
    elif not as_json and answer.text:
        print(answer.text)


def _complain(error: CommandError, *, as_json: bool) -> None:
    if as_json:
        told = {"ok": False, "exit": int(error.exit), "error": error.message}
        print(json.dumps({**error.data, **told, "remedy": error.remedy}))
        return
    print(end="", flush=True)
    print(f"nfsha: {error}", file=sys.stderr)


def _words(error: OSError) -> str:
    named = f"{error.filename}: " if error.filename else ""
    return named + (error.strerror or str(error) or type(error).__name__)

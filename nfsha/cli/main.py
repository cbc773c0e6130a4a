"""The entry point: parses, does what was asked, and prints one answer or one error.

Nothing here knows what the commands do. No traceback reaches an operator: an error of the system
that no command foresaw becomes one line and exit code 1.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence

from nfsha.cli import arguments, output
from nfsha.cli.exits import Answer, CommandError, Exit
from nfsha.host import mishap


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code (`exits.MEANINGS`).

    Raises SystemExit (0 or 2) where argparse shows help or a usage error.
    """
    sys.excepthook = _last_words
    output.complete()
    try:
        args = arguments.parser().parse_args(argv)
    except SystemExit:
        if _brought_out(Exit.DONE) != Exit.DONE:
            raise SystemExit(Exit.CANNOT) from None
        raise
    except OSError:  # the help is longer than what is kept back
        return _brought_out(Exit.DONE)
    if args.do is None:
        args.shown.print_help(sys.stderr)
        return Exit.USAGE
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may have any character
    code: int = Exit.DONE
    try:
        code = _carry_out(args)
    except BrokenPipeError:  # who reads has enough
        output.silence()
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
    return _brought_out(code)


def _brought_out(code: int) -> int:
    """The exit code, once all that was printed is where it goes; 1 where only that failed."""
    if words := output.trouble():
        output.complain(f"nfsha: {words}")
    return code or (Exit.CANNOT if words else Exit.DONE)


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
        _complain(CommandError(Exit.CANNOT, output.trouble() or _words(error)), as_json=args.json)
        return Exit.CANNOT
    try:
        _show(answer, as_json=args.json)
    except BrokenPipeError:
        output.silence()
    except OSError:
        return _brought_out(int(answer.exit))
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
    words = output.trouble()  # first what was printed before
    output.complain(f"nfsha: {error}" + (f"\nnfsha: {words}" if words else ""))


def _words(error: OSError) -> str:
    named = f"{error.filename}: " if error.filename else ""
    return named + (error.strerror or str(error) or type(error).__name__)

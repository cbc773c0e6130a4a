"""The entry point: parses, does what was asked, and prints one answer or one error.

Nothing here knows what the commands do. No traceback reaches an operator: an error of the system
that no command foresaw becomes one line and exit code 1.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from nfsha.cli import arguments
from nfsha.cli.exits import Answer, CommandError, Exit


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code (`exits.MEANINGS`).

    Raises SystemExit (0 or 2) where argparse shows help or a usage error.
    """
    args = arguments.parser().parse_args(argv)
    if args.do is None:
        args.shown.print_help(sys.stderr)
        return Exit.USAGE
    code: int = Exit.CANNOT
    try:
        try:
            answer = args.do(args)
            code = answer.exit
            _show(answer, as_json=args.json)
        except CommandError as error:
            code = error.exit
            _complain(error, as_json=args.json)
        except BrokenPipeError:
            code = Exit.DONE
            raise
        except OSError as error:
            code = Exit.CANNOT
            _complain(CommandError(Exit.CANNOT, _words(error)), as_json=args.json)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who reads has enough, as in `nfsha events | head`. Python would flush again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
    return code


def _show(answer: Answer, *, as_json: bool) -> None:
    if as_json and answer.data:
        print(json.dumps(answer.data))
    elif not as_json and answer.text:
        print(answer.text)


def _complain(error: CommandError, *, as_json: bool) -> None:
    if as_json:
        told = {"ok": False, "exit": int(error.exit), "error": error.message}
        print(json.dumps({**told, "remedy": error.remedy, **error.data}))
        return
    sys.stdout.flush()
    print(f"nfsha: {error}", file=sys.stderr)


def _words(error: OSError) -> str:
    named = f"{error.filename}: " if error.filename else ""
    return named + (error.strerror or str(error) or type(error).__name__)

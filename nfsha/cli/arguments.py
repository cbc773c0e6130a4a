"""The commands and their options: one table, from which the parser and docs/cli.md are made.

It knows which function does what, and does nothing itself.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import nfsha
from nfsha.cli import fsm, handover, operate, replicate, setup, watch
from nfsha.cli.configuration import CONFIG_VARIABLE, DEFAULT_CONFIG
from nfsha.cli.exits import MEANINGS, Answer
from nfsha.config.kinds import WrongError, bandwidth

WIDTH = 80
_GLUE = "\N{NO-BREAK SPACE}"
DESCRIPTION = "One floating address for a pair of NFS servers, never two holders."

Handler = Callable[[argparse.Namespace], Answer]


@dataclass(frozen=True, slots=True)
class Option:
    """One option or argument, with what argparse wants to know of it.

    Options of one `alternative` exclude each other.
    """

    names: tuple[str, ...]
    help: str
    parse: Mapping[str, Any] = field(default_factory=dict)
    alternative: str = ""

    @property
    def usage(self) -> str:
        """How it is written: `--count N`, `--json`, `ROW`."""
        longest = self.names[-1]
        if not longest.startswith("-"):
            several = "..." if self.parse.get("nargs") == "*" else ""
            return f"{self.parse.get('metavar', longest)}{several}"
        if self.parse.get("action") == "store_true":
            return longest
        choices = self.parse.get("choices")
        word = "|".join(map(str, choices)) if isinstance(choices, tuple) else None
        return f"{longest} {self.parse.get('metavar') or word}"

    @property
    def optional(self) -> bool:
        """It may be left out."""
        if self.parse.get("nargs") in ("?", "*"):
            return True
        return self.names[-1].startswith("-") and not self.parse.get("required")


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its words (`fsm table`), what it is for, an example, and what does it."""

    words: str
    group: str
    help: str
    example: str
    do: Handler
    options: tuple[Option, ...] = ()
    more: str = ""
    """What else one should know, in a sentence or two."""

    @property
    def all_options(self) -> tuple[Option, ...]:
        """Its own options, then the ones that every command has."""
        return (*self.options, JSON)

    @property
    def usage_parts(self) -> list[str]:
        """The command and each of its options, as one types it."""
        return [f"nfsha {self.words}", *_usages(self.all_options)]


def _usages(options: Sequence[Option]) -> Iterator[str]:
    for alternative, members in groupby(options, key=lambda option: option.alternative):
        if alternative:
            yield f"[{' | '.join(member.usage for member in members)}]"
        else:
            yield from (one.usage if not one.optional else f"[{one.usage}]" for one in members)


FLAG: Mapping[str, Any] = {"action": "store_true"}

JSON = Option(("--json",), "answer, and report errors, as JSON for programs", FLAG)
CONFIG = Option(
    ("--config",),
    f"the configuration (default: ${CONFIG_VARIABLE}, else {DEFAULT_CONFIG})",
    {"metavar": "PATH"},
)
SOCKET = Option(
    ("--socket",),
    "the daemon's socket (default: the one that the configuration names)",
    {"metavar": "PATH"},
)
DRY_RUN = Option(
    ("--dry-run",), "show the plan: the guards, and what would change; change nothing", FLAG
)
LIST = Option(("--list",), "name all files that would go to quarantine, not only the first", FLAG)
PLAN = Option(
    ("--plan",), "approve the plan that --dry-run named so; refused if it is another one by now",
    {"metavar": "PLAN"},
)  # fmt: skip
YES = Option(("--yes",), "do not ask for confirmation", FLAG)


def _number(least: int, most: int) -> Callable[[str], int]:
    """A whole number within bounds, for argparse. Its ValueError becomes a usage error."""

    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text[:10]) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to {most}")
        return int(text)

    return number


def _rate(text: str) -> int | str:
    """A bandwidth in KiB per second, or one of two words, for argparse."""
    if text in (replicate.DEFAULT, replicate.UNLIMITED):
        return text
    kind = bandwidth()
    try:
        return kind.read(text)
    except WrongError:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not "{replicate.UNLIMITED}", "{replicate.DEFAULT}" or {kind.right}'
        ) from None


def _named(read: Callable[[str], str]) -> Callable[[str], str]:
    """A name in the spelling of the screens, for argparse."""

    def name(text: str) -> str:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"{error}: names are typed as they are shown, a backslash itself as \\x5c"
            ) from None

    return name


_FILE = _named(replicate.file_name)
_VOLUME = _named(replicate.volume_name)


VOLUME = Option(("--volume",), "of this volume only", {"metavar": "VOLUME", "type": _VOLUME})
ENTRY = Option(("entry",), "the entry, as `quarantine list` names it", {"metavar": "ENTRY"})

LOOK = "Look"
COPY = "Copy the data"
DECIDE = "Decide"
SET_UP = "Set up and run"
EXPLAIN = "Understand"

COMMANDS: tuple[Command, ...] = (
    Command(
        "status", LOOK, "say what this node does, why, and what to do next",
        "nfsha status --watch", watch.status,
        (Option(("--watch",), "show it again each second, until ^C", FLAG), CONFIG, SOCKET),
    ),
    Command(
        "events", LOOK, "list the newest decisions, each with its rule and reason",
        "nfsha events --follow", watch.events,
        (
            Option(("--follow",), "go on with each new one, until ^C", FLAG),
            Option(
                ("-n", "--count"), "how many (default: 20)",
                {"metavar": "N", "type": _number(0, 1000), "default": 20},
            ),
            Option(("--reports",), "list the moves of the service instead", FLAG, "what"),
            Option(
                ("--report",), "show the report of one move", {"metavar": "ID"}, "what"
            ),
            CONFIG, SOCKET,
        ),
        "While no daemon runs, they are read from its files.",
    ),
    Command(
        "volumes", LOOK, "show the volumes of both nodes and how old the copy is",
        "nfsha volumes --watch", watch.volumes,
        (Option(("--watch",), "show it again each second, until ^C", FLAG), CONFIG, SOCKET),
        "Sizes are decimal, times are UTC.",
    ),
    Command(
        "clients", LOOK, "list the connections of clients, as both nodes know them",
        "nfsha clients", watch.clients,
        (Option(("--watch",), "show it again each second, until ^C", FLAG), CONFIG, SOCKET),
        "The node that serves tells the other one who is connected, and who may hold locks: so it "
        "can have them connect anew at once, and claim their locks again, if it takes over.",
    ),
    Command(
        "volumes pair", COPY, "make the volumes of one name on both nodes a pair",
        "nfsha volumes pair data", replicate.pair,
        (
            Option(("volume",), "its path below nfs.root, as `nfsha volumes` shows it",
                   {"metavar": "VOLUME", "type": _VOLUME}),
            YES, CONFIG, SOCKET,
        ),
        "For volumes that hold data on both nodes; an empty one is paired by itself.",
    ),
    Command(
        "volumes forget", COPY, "forget a volume that was removed for good",
        "nfsha volumes forget data", replicate.forget,
        (
            Option(("volume",), "what it was called, or its UUID, as `nfsha status` names it",
                   {"metavar": "VOLUME", "type": _VOLUME}),
            YES, CONFIG, SOCKET,
        ),
        "A node that has copied a volume does not take over without it. Unmount it on both nodes, "
        "then say this on both; it is refused while either has it mounted.",
    ),
    Command(
        "sync", COPY, "copy now, without waiting for the schedule",
        "nfsha sync data --wait", replicate.sync,
        (
            Option(("volume",), "only this one", {"metavar": "VOLUME", "nargs": "?",
                                                  "type": _VOLUME}),
            Option(("--wait",), "show the passes until they have ended", FLAG),
            Option(("--full",), "look at every folder, not only at those that changed", FLAG),
            Option(("--verify",), "compare all contents by checksum, too", FLAG),
            Option(
                ("--accept-deletes",), "let the deletions that are held by this plan happen",
                {"metavar": "PLAN"},
            ),
            Option(("--pause",), "begin no pass until --resume", FLAG, "turn"),
            Option(("--resume",), "let passes come by themselves again", FLAG, "turn"),
            Option(
                ("--bandwidth",),
                'bytes per second of each transfer, such as 50MB, or "unlimited"; "default" is '
                "the configuration's. It holds until the daemon ends",
                {"metavar": "RATE", "type": _rate}, "turn",
            ),
            CONFIG, SOCKET,
        ),
        "On the node that does not serve; refused while passes are paused. It begins a resync that "
        "waits, too. ^C ends the waiting, not the passes.",
    ),
    Command(
        "quarantine list", COPY, "list what was put aside instead of being lost",
        "nfsha quarantine list", replicate.quarantine_list, (VOLUME, CONFIG, SOCKET),
    ),
    Command(
        "quarantine show", COPY, "list the files of one quarantine entry",
        "nfsha quarantine show ENTRY", replicate.quarantine_show,
        (
            ENTRY,
            Option(("-n", "--count"), "how many (default: 1000)",
                   {"metavar": "N", "type": _number(1, 1000), "default": 1000}),
            Option(("--after",), "go on behind this path", {"metavar": "PATH", "type": _FILE}),
            VOLUME, CONFIG, SOCKET,
        ),
    ),
    Command(
        "quarantine restore", COPY, "move files back from the quarantine",
        "nfsha quarantine restore ENTRY docs/plan.txt --to found",
        replicate.quarantine_restore,
        (
            ENTRY,
            Option(("path",), "only these (a folder: all below it), spelled as they are shown",
                   {"metavar": "PATH", "nargs": "*", "type": _FILE}),
            Option(("--to",), "below this folder of the same volume, not at their own places",
                   {"metavar": "FOLDER", "type": _FILE}, "place"),
            Option(("--beside",), "under another name where something has come in their place",
                   FLAG, "place"),
            VOLUME, CONFIG, SOCKET,
        ),
        "Nothing is ever overwritten. On the node that does not serve the next pass would delete "
        "what came back: there --to is needed.",
    ),
    Command(
        "quarantine drop", COPY, "delete one quarantine entry for good",
        "nfsha quarantine drop ENTRY", replicate.quarantine_drop,
        (ENTRY, YES, VOLUME, CONFIG, SOCKET),
    ),
    Command(
        "failback", DECIDE, "move the service home to the primary, with nothing lost",
        "nfsha failback --dry-run", handover.failback,
        (DRY_RUN, LIST, YES, PLAN, CONFIG, SOCKET),
        "Runs on either node. The plan is shown before it asks, and an approval is for this plan "
        "only. Clients are held for seconds; ^C ends the watching only.",
    ),
    Command(
        "switchover", DECIDE, "move the service away to the standby, for maintenance",
        "nfsha switchover --yes", handover.switchover,
        (DRY_RUN, LIST, YES, PLAN, CONFIG, SOCKET),
        "As `failback`, the other way.",
    ),
    Command(
        "abort", DECIDE, "end a failback or switchover that is under way",
        "nfsha abort", handover.abort, (CONFIG, SOCKET),
        "Until the new epoch is ordered: then the node that served before serves on within a "
        "second.",
    ),
    Command(
        "activate", DECIDE, "make this node serve although the peer cannot agree",
        "nfsha activate", operate.activate,
        (
            Option(
                ("--force",),
                "also where this node promised not to take over, its copy is not whole, or its "
                "interface hears nobody",
                FLAG,
            ),
            YES,
            Option(
                ("--wait",), "how long to wait for the outcome (default: 15; 0: not at all)",
                {"metavar": "SECONDS", "type": _number(0, 600), "default": 15},
            ),
            CONFIG, SOCKET,
        ),
        "For when the other node is gone for good, or no node knows whose data is the truth.",
    ),
    Command(
        "confirm-peer-down", DECIDE, "give your word that the other node is off",
        "nfsha confirm-peer-down", operate.confirm_peer_down, (YES, CONFIG, SOCKET),
        "It holds until the other node is heard again.",
    ),
    Command(
        "maintenance", DECIDE, "stop this node from deciding by itself, or let it again",
        "nfsha maintenance on", operate.maintenance,
        (
            Option(("switch",), "`on` or `off`", {"choices": ("on", "off"), "metavar": "on|off"}),
            CONFIG, SOCKET,
        ),
        "A node that does not serve promises not to take over; on the node that serves it needs "
        "the other one in maintenance first.",
    ),
    Command(
        "resolve", DECIDE, "choose whose history counts after both nodes served",
        "nfsha resolve --keep primary", operate.resolve,
        (
            Option(
                ("--keep",), "the node whose data is the truth; run it there",
                {"choices": ("primary", "standby"), "required": True},
            ),
            CONFIG, SOCKET,
        ),
    ),
    Command(
        "run", SET_UP, "run the daemon (systemd does)",
        "nfsha run --config /etc/nfsha/nfsha.toml", setup.run, (CONFIG,),
    ),
    Command(
        "check-config", SET_UP, "check the configuration, and list what it risks",
        "nfsha check-config --config ./nfsha.toml", setup.check_config, (CONFIG,),
    ),
    Command(
        "keygen", SET_UP, "make the cluster key, or replace it step by step",
        "nfsha keygen", setup.keygen,
        (
            Option(("--path",), "the key file (default: the configuration's)", {"metavar": "PATH"}),
            Option(("--add",), "add a new key that opens only: a rotation's first step", FLAG,
                   "step"),
            Option(("--use",), "seal with this key from now on: the second step",
                   {"metavar": "FINGERPRINT"}, "step"),
            Option(("--drop",), "forget this key: the last step", {"metavar": "FINGERPRINT"},
                   "step"),
            Option(("--show",), "only list the fingerprints, to compare both nodes", FLAG, "step"),
            CONFIG,
        ),
        "It never shows a secret, and never overwrites a key file.",
    ),
    Command(
        "release", SET_UP, "take the VIP and the firewall rules away (daemon stopped)",
        "nfsha release", setup.release,
        (
            Option(
                ("--if-stopped",),
                "for systemd: nothing where a restart follows; else the VIP goes, and the NFS "
                "ports stay closed",
                FLAG,
            ),
            CONFIG,
        ),
        "Afterwards clients reach the NFS service on this machine's own addresses. Volumes that "
        "hooks mount are given up too, by the unmount hook.",
    ),
    Command(
        "fsm table", EXPLAIN, "list every rule by which nfsha decides",
        "nfsha fsm table", fsm.table,
    ),
    Command(
        "fsm mermaid", EXPLAIN, "draw the state machine, for Mermaid",
        "nfsha fsm mermaid", fsm.mermaid,
    ),
    Command(
        "fsm explain", EXPLAIN, "explain one rule, by the id that log and status name",
        "nfsha fsm explain P93", fsm.explain,
        (Option(("row",), "the rule's id, such as P93", {"metavar": "ROW"}),),
    ),
    Command(
        "version", EXPLAIN, "say which nfsha this is",
        "nfsha version", setup.version,
    ),
)  # fmt: skip


def groups() -> Iterator[tuple[str, tuple[Command, ...]]]:
    """The commands by group, in the order of the table."""
    for name, members in groupby(COMMANDS, key=lambda command: command.group):
        yield name, tuple(members)


def parser() -> argparse.ArgumentParser:
    """The parser. What it parsed has `do`, the command's function.

    Where no command was named `do` is None, and `shown` is the parser whose help is wanted.
    """
    top = argparse.ArgumentParser(
        prog="nfsha",
        usage="nfsha COMMAND [OPTION...]",
        description=f"{DESCRIPTION}\n\n{overview()}",
        epilog="`nfsha COMMAND --help` has its options and an example.",
        formatter_class=_formatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"nfsha {nfsha.__version__}")
    top.set_defaults(do=None, json=False, shown=top)
    branches = {"": top.add_subparsers(prog="nfsha", metavar="COMMAND", help=argparse.SUPPRESS)}
    leaves: dict[str, argparse.ArgumentParser] = {}
    for command in COMMANDS:
        family, _, word = command.words.rpartition(" ")
        if family not in branches:
            trunk = leaves.get(family) or _trunk(branches[""], family)
            branches[family] = trunk.add_subparsers(
                prog=f"nfsha {family}", metavar="COMMAND", help=argparse.SUPPRESS
            )
        leaf = leaves[command.words] = branches[family].add_parser(
            word,
            usage=_wrapped_usage(command),
            description=described(command),
            epilog=f"example: {command.example}",
            formatter_class=_formatter,
            allow_abbrev=False,
        )
        leaf.set_defaults(do=command.do)
        _add_options(leaf, command.all_options)
    return top


def _trunk(
    branch: argparse._SubParsersAction[argparse.ArgumentParser], family: str
) -> argparse.ArgumentParser:
    """The first word of a family that is no command by itself: it shows its members."""
    members = [one for one in COMMANDS if one.words.startswith(f"{family} ")]
    trunk = branch.add_parser(
        family,
        usage=f"nfsha {family} COMMAND [OPTION...]",
        description=_listed(members),
        formatter_class=_formatter,
        allow_abbrev=False,
    )
    trunk.set_defaults(shown=trunk)
    return trunk


def _add_options(leaf: argparse.ArgumentParser, options: tuple[Option, ...]) -> None:
    alternatives: dict[str, argparse._MutuallyExclusiveGroup] = {}
    for option in options:
        if option.alternative and option.alternative not in alternatives:
            alternatives[option.alternative] = leaf.add_mutually_exclusive_group()
        holder = alternatives.get(option.alternative, leaf)
        holder.add_argument(*option.names, help=option.help, **dict(option.parse))


def overview() -> str:
    """The commands by group, and the exit codes: what `nfsha --help` shows."""
    parts = [f"{name}:\n{_listed(members)}" for name, members in groups()]
    codes = "\n".join(
        textwrap.fill(meaning, WIDTH, initial_indent=f"  {code:<6}", subsequent_indent=" " * 8)
        for code, meaning in MEANINGS.items()
    )
    return "\n\n".join([*parts, f"Exit codes:\n{codes}"])


def _listed(commands: Sequence[Command]) -> str:
    return "\n".join(f"  {one.words:<18} {one.help}" for one in commands)


def described(command: Command) -> str:
    """What the command is for, in a sentence or two, wrapped."""
    sentences = f"{command.help[0].upper()}{command.help[1:]}. {command.more}".strip()
    return textwrap.fill(sentences, WIDTH)


def _wrapped_usage(command: Command) -> str:
    """The usage in lines that break between options only."""
    whole = command.usage_parts
    glued = " ".join(part.replace(" ", _GLUE) for part in whole)
    indent = " " * (len("usage: ") + len(whole[0]) + 1)
    lines = textwrap.wrap(glued, WIDTH, initial_indent=" " * 7, subsequent_indent=indent)
    return "\n".join(lines).replace(_GLUE, " ").removeprefix(" " * 7)


def _formatter(prog: str) -> argparse.HelpFormatter:
    """One width everywhere, so that the help reads the same on every terminal."""
    return argparse.RawDescriptionHelpFormatter(prog, width=WIDTH, max_help_position=26)

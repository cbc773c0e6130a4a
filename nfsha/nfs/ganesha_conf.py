"""Reads nfs-ganesha's configuration: blocks, options and included files (ganesha-config(8)).

It reads text and says what stands there; whether ganesha runs with it is another question, and what
an option means is for others to say. Names are in lower case: ganesha takes any.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

GANESHA_CONF: Final = Path("/etc/ganesha/ganesha.conf")
_TOTAL_MAX_BYTES: Final = 4 << 20
_DEPTH_MAX: Final = 8
_FILES_MAX: Final = 2048

_INCLUDE: Final = re.compile(r'\s*%(include|dir|url)\s+(?:"([^"]+)"|(\S+))\s*')
_PIECE: Final = re.compile(r"""\s*(?:\#.*|("[^"]*"|'[^']*'|[{}=;,]|[^\s{}=;,"'\#]+))""")
_SPECIAL: Final = frozenset("{}=;,")


class GaneshaConfError(Exception):
    """The configuration cannot be read; the text says where and why."""


@dataclass(slots=True)
class Block:
    """A block: its options, each with its list of values, and the blocks in it."""

    name: str
    options: dict[str, tuple[str, ...]] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)

    def all(self, name: str) -> tuple[Block, ...]:
        """The blocks of this name in it."""
        return tuple(block for block in self.blocks if block.name == name)


def read(path: Path = GANESHA_CONF) -> Block:
    """Returns a block without a name that holds all others. Raises GaneshaConfError."""
    budget = _Budget()
    return parse("\n".join(_lines(path, budget, 0)))


def parse(text: str) -> Block:
    """The same, of text whose includes were followed. Raises GaneshaConfError."""
    whole = Block("")
    open_blocks = [whole]
    words: list[str] = []  # since the last `{`, `}` or `;`
    for piece in _pieces(text):
        if piece == "{":
            if len(words) != 1 or words[0] in _SPECIAL:
                raise GaneshaConfError(f"a block begins after {' '.join(words)!r}")
            block = Block(words[0].lower())
            open_blocks[-1].blocks.append(block)
            open_blocks.append(block)
        elif piece in {";", "}"}:
            if words:
                _set(open_blocks[-1], words)
            if piece == "}":
                if len(open_blocks) == 1:
                    raise GaneshaConfError("a block ends that did not begin")
                open_blocks.pop()
        else:
            words.append(piece)
            continue
        words = []
    if words or len(open_blocks) > 1:
        raise GaneshaConfError("it ends within a block")
    return whole


def speaks_v4(whole: Block) -> bool:
    """Whether ganesha would speak v4 on its next start (ganesha-core-config(8), Protocols)."""
    protocols: tuple[str, ...] = ("3", "4", "9P")  # the default
    for core in whole.all("nfs_core_param"):
        protocols = core.options.get("protocols", protocols)
    return any(one.lower() in {"4", "nfs4", "v4", "nfsv4"} for one in protocols)


def _set(block: Block, words: list[str]) -> None:
    values = words[2:]
    if len(words) < 3 or words[1] != "=" or any(value in "{}=;" for value in values):
        raise GaneshaConfError(f"{' '.join(words)[:80]!r} is no option with its value")
    block.options[words[0].lower()] = tuple(value.strip("\"'") for value in values if value != ",")


def _pieces(text: str) -> Iterator[str]:
    at = 0
    end = len(text.rstrip())
    while at < end:
        match = _PIECE.match(text, at)
        if match is None:
            raise GaneshaConfError(f"a quotation without an end: {text[at : at + 40].strip()!r}")
        if match[1] is not None:
            yield match[1]
        at = match.end()


@dataclass(slots=True)
class _Budget:
    """What may still be read."""

    left_bytes: int = _TOTAL_MAX_BYTES
    left_files: int = _FILES_MAX

    def take(self, path: Path) -> str:
        self.left_files -= 1
        try:
            with path.open("rb") as file:
                content = file.read(self.left_bytes + 1)
        except OSError as error:
            raise GaneshaConfError(f"{path}: {error.strerror}") from error
        self.left_bytes -= len(content)
        if self.left_bytes < 0 or self.left_files < 0:
            raise GaneshaConfError(f"{path}: more configuration than {_TOTAL_MAX_BYTES} bytes")
        return content.decode("utf-8", "surrogateescape")


def _lines(path: Path, budget: _Budget, depth: int) -> Iterator[str]:
    """The lines of a file, with those of the files that it includes in their places."""
    if depth > _DEPTH_MAX:
        raise GaneshaConfError(f"{path}: included more than {_DEPTH_MAX} files deep")
    for line in budget.take(path).splitlines():
        included = _INCLUDE.fullmatch(line)
        if included is None:
            yield line
            continue
        kind, name = included[1], included[2] or included[3]
        target = path.parent / name
        if kind == "url":
            raise GaneshaConfError(f"{path}: {name} is kept elsewhere, and cannot be read here")
        files = [target]
        if kind == "dir":
            try:
                files = sorted(one for one in target.iterdir() if one.is_file())
            except OSError as error:
                raise GaneshaConfError(f"{target}: {error.strerror}") from error
        for one in files:
            yield from _lines(one, budget, depth + 1)

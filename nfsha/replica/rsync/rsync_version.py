"""Which rsync is installed: can it do what a copy needs, and which known holes has it?

It runs `rsync --version`, and asks dpkg for the package where there is one, because distributions
mend an old version without changing its number. It must not run rsync for anything else. A hole is
a warning, for the two nodes trust each other's data anyway; a missing ability is a refusal.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nfsha.replica.rsync.child import Child, ChildError

ANSWER_WITHIN_S: Final = 10.0
MIN_VERSION: Final = (3, 2, 4)
"""The first one that has `--fsync` (rsync's NEWS.md)."""

MIN_PROTOCOL: Final = 31
"""Of 3.1.0: nanoseconds, and a list of files that is built while files are sent already."""

_DPKG_QUERY: Final = "/usr/bin/dpkg-query"
_DPKG: Final = "/usr/bin/dpkg"
_FIRST_LINE: Final = re.compile(r"rsync +version +v?(\d+)\.(\d+)\.(\d+)\S* +protocol version (\d+)")
_NEEDED: Final = {
    "64-bit files": "files above 2 GiB",
    "64-bit timestamps": "times after 2038",
    "hardlinks": "hard links",
    "symlinks": "symbolic links",
    "symtimes": "times of symbolic links",
    "ACLs": "access control lists",
    "xattrs": "extended attributes",
    "IPv6": "IPv6",
}

Version = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Hole:
    """A hole that a peer, or who has its token, can use on the ways that nfsha takes.

    `mended_packages`: per older version that a distribution still carries, the first package
    without the hole (from Debian's changelog of rsync). `mended_protocol`: a protocol that only
    mended programs speak, whatever their number.
    """

    names: str
    what: str
    mended: Version
    mended_packages: tuple[str, ...] = ()
    mended_protocol: int | None = None


# Left out: holes of options that nfsha does not use (chroot off, daemon chroot, proxy, rsync-ssl,
# rrsync, name converter, fake super, an open module, a local user who races with symbolic links).
HOLES: Final = (
    Hole(
        "CVE-2024-12084 to 12088, CVE-2024-12747",
        "the sender can run code in the receiver or read its files, and the other way round",
        (3, 4, 0),
        ("3.2.7-1+deb12u1",),
        mended_protocol=32,  # raised for that purpose; distributions took it over with the patches
    ),
    Hole(
        "CVE-2025-10158",
        "the receiver can crash the sender",
        (3, 4, 2),
        ("3.2.7-1+deb12u4", "3.4.1+ds1-5+deb13u1"),
    ),
    Hole(
        "CVE-2026-43618, CVE-2026-43620",
        "the sender can read the receiver's memory, or crash it",
        (3, 4, 3),
        ("3.2.7-1+deb12u5", "3.4.1+ds1-5+deb13u3"),
    ),
    Hole(
        "CVE-2026-70456, 70458, 70461",
        "either side can write outside of the other's memory",
        (3, 5, 0),
    ),
    Hole(
        "CVE-2026-70464",
        "whoever reaches the port can keep connections open for ever",
        (3, 5, 0),
    ),
    Hole(
        "CVE-2026-53789",
        "the sender can make the receiver delete in folders that it should not look at",
        (3, 5, 0),
    ),
    Hole(
        "CVE-2026-53797, 53799, 53801",
        "a local user who swaps folders for symbolic links while they are copied gets at files "
        "that are not his",
        (3, 5, 0),
    ),
)


@dataclass(frozen=True, slots=True)
class RsyncVersion:
    """What was found: the version (empty if unknown), the holes, and why it cannot be used.

    `refused` is empty if it can.
    """

    version: str
    warnings: tuple[str, ...] = ()
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Abilities:
    """What `rsync --version` said."""

    version: Version
    protocol: int
    names: frozenset[str]


async def check(program: str) -> RsyncVersion:
    """Asks the program, and the package manager; two or a few short-lived children."""
    try:
        text = await _said_by(program, "--version")
    except ChildError as error:
        return RsyncVersion("", refused=f'{error}: install rsync, or set replication = "off"')
    abilities = parse(text)
    if abilities is None:
        line = text.partition("\n")[0][:80]
        return RsyncVersion("", refused=f"{program} says {line!r}, which is no rsync's version")
    version = _dotted(abilities.version)
    refused = missing(abilities)
    if refused:
        return RsyncVersion(version, refused=f"{program} {version} {refused}")
    package = await _package(abilities.version)
    mended = await _mended_by(package)
    return RsyncVersion(version, warnings(abilities, package, mended))


def parse(text: str) -> Abilities | None:
    """Reads the output of `rsync --version`; None if it is no rsync's."""
    first = _FIRST_LINE.search(text)
    listed = re.search(r"^Capabilities:\n((?:[ \t]+.*\n?)*)", text, re.MULTILINE)
    if first is None or listed is None:
        return None
    names = (" ".join(name.split()) for name in listed[1].replace("\n", " ").split(","))
    version = int(first[1]), int(first[2]), int(first[3])
    return Abilities(version, int(first[4]), frozenset(names))


def missing(abilities: Abilities) -> str:
    """Why this rsync cannot make an equal copy; empty if it can."""
    if abilities.version < MIN_VERSION:
        return f"has no --fsync: at least {_dotted(MIN_VERSION)} is needed"
    if abilities.protocol < MIN_PROTOCOL:
        return f"speaks protocol {abilities.protocol}: at least {MIN_PROTOCOL} is needed"
    lacking = [words for name, words in _NEEDED.items() if name not in abilities.names]
    return f"was built without {', '.join(lacking)}" if lacking else ""


def warnings(abilities: Abilities, package: str, mended: Sequence[Hole]) -> tuple[str, ...]:
    """One sentence with all holes that neither the program nor the package is known to have mended.

    None if there are none.
    """
    left = [hole for hole in HOLES if _is_open(hole, abilities) and hole not in mended]
    if not left:
        return ()
    holes = "; ".join(f"{hole.names}: {hole.what}" for hole in left)
    first = _dotted(max(hole.mended for hole in left))
    maybe = "" if package else ", unless your distribution mended it under the old number"
    return (
        f"rsync {package or _dotted(abilities.version)} has known holes ({holes}); "
        f"install {first} or later{maybe}",
    )


def _is_open(hole: Hole, abilities: Abilities) -> bool:
    if hole.mended_protocol is not None and abilities.protocol >= hole.mended_protocol:
        return False
    return abilities.version < hole.mended


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


async def _package(version: Version) -> str:
    """The version of Debian's package, if that is what runs; else empty."""
    if not await asyncio.to_thread(Path(_DPKG_QUERY).exists):
        return ""
    try:
        text = await _said_by(_DPKG_QUERY, "--show", "--showformat=${Version}", "rsync")
    except ChildError:
        return ""
    package = text.strip()
    return package if _upstream(package) == version else ""


async def _mended_by(package: str) -> list[Hole]:
    """The holes that this package mended without another number of rsync's own."""
    if not package:
        return []
    mended = []
    for hole in HOLES:
        for first in hole.mended_packages:
            if _upstream(first) == _upstream(package) and await _is_at_least(package, first):
                mended.append(hole)
    return mended


def _upstream(package: str) -> Version | None:
    """The number of rsync itself in a package's version: `[epoch:]3.4.1[+ds1][-revision]`."""
    found = re.match(r"(?:\d+:)?(\d+)\.(\d+)\.(\d+)(?=$|[^0-9])", package)
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


async def _is_at_least(package: str, first: str) -> bool:
    """Compares two packages of the same distribution; an unlike one counts as older."""
    distribution = re.search(r"\+deb\d+u", first)
    if distribution is None or distribution[0] not in package:
        return False
    try:
        await _said_by(_DPKG, "--compare-versions", package, "ge", first)
    except ChildError:
        return False
    return True


async def _said_by(*argv: str) -> str:
    """What a program printed. Raises ChildError when it fails or takes too long."""
    name = Path(argv[0]).name
    child = await Child.start(argv, name="rsync-version")
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            code = await child.wait()
    except TimeoutError as error:
        raise ChildError(f"{name} did not answer within {ANSWER_WITHIN_S:g} s") from error
    finally:
        await child.end(ANSWER_WITHIN_S)
    if code != 0:
        words = b"; ".join(child.errors).decode(errors="replace")
        raise ChildError(f"{name} failed with exit code {code} ({words})")
    return b"\n".join(child.output).decode(errors="replace")

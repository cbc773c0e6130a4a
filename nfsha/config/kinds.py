"""What a key may take: one kind for each sort of value, in words and as a reader. Knows no key."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path, PurePosixPath
from typing import Final, Generic, TypeAlias, TypeVar

from nfsha.config import cron
from nfsha.config.problems import SIZE_UNITS, show_ms, show_size
from nfsha.config.settings import IPAddress, Witness
from nfsha.core.model import Role

T = TypeVar("T")

Finding: TypeAlias = tuple[str, object, str]
"""What is wrong: what to append to the key's name, the value, and what would be right."""


class WrongError(Exception):
    """A value is not of its kind."""

    def __init__(self, *findings: Finding) -> None:
        self.findings = findings
        super().__init__()


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """What a key takes: in words, and as a reader that raises `WrongError`."""

    right: str
    read: Callable[[object], T]


def kind(right: str, accept: Callable[[object], T | None]) -> Kind[T]:
    """A kind whose only complaint is that the value is not `right`: `accept` returns None then."""

    def read(value: object) -> T:
        accepted = accept(value)
        if accepted is None:
            raise WrongError(("", value, f"must be {right}"))
        return accepted

    return Kind(right, read)


def choice(*options: str) -> Kind[str]:
    """One of these words."""
    right = " or ".join(f'"{option}"' for option in options)
    return kind(right, lambda value: value if isinstance(value, str) and value in options else None)


def matching(pattern: re.Pattern[str], right: str) -> Kind[str]:
    """A text that the pattern matches whole."""
    return kind(
        right, lambda value: value if isinstance(value, str) and pattern.fullmatch(value) else None
    )


_UNITS_MS: Final = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION: Final = re.compile(r"([0-9]{1,9})(ms|s|m|h|d)")
_SIZE: Final = re.compile(rf"([0-9]{{1,9}})({'|'.join(SIZE_UNITS)})")


def _as_duration_ms(value: object, least_ms: int, most_ms: int) -> int | None:
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    duration_ms = int(match[1]) * _UNITS_MS[match[2]]
    return duration_ms if least_ms <= duration_ms <= most_ms else None


def duration(least_ms: int, most_ms: int) -> Kind[int]:
    """A time span in its unit, read as milliseconds; both bounds are allowed."""
    right = f'a duration from "{show_ms(least_ms)}" to "{show_ms(most_ms)}"'
    return kind(right, lambda value: _as_duration_ms(value, least_ms, most_ms))


def duration_s(least_s: int, most_s: int) -> Kind[int]:
    """A time span of whole seconds, read as seconds."""
    right = f'a duration of whole seconds from "{show_ms(1000 * least_s)}" to' + (
        f' "{show_ms(1000 * most_s)}"'
    )

    def accept(value: object) -> int | None:
        duration_ms = _as_duration_ms(value, 1000 * least_s, 1000 * most_s)
        return None if duration_ms is None or duration_ms % 1000 else duration_ms // 1000

    return kind(right, accept)


def word_or(word: str, other: Kind[T]) -> Kind[T | None]:
    """What the other kind takes, or one word that is read as None."""
    right = f'"{word}" or {other.right}'

    def read(value: object) -> T | None:
        if value == word:
            return None
        try:
            return other.read(value)
        except WrongError:
            raise WrongError(("", value, f"must be {right}")) from None

    return Kind(right, read)


def duration_or_never(least_ms: int, most_ms: int) -> Kind[int | None]:
    """The same, or `never`, read as None."""
    return word_or("never", duration(least_ms, most_ms))


def size(least_bytes: int, most_bytes: int) -> Kind[int]:
    """An amount of data with its unit, read as bytes; both bounds are allowed."""
    right = f'a size from "{show_size(least_bytes)}" to "{show_size(most_bytes)}"'

    def accept(value: object) -> int | None:
        match = _SIZE.fullmatch(value) if isinstance(value, str) else None
        size_bytes = int(match[1]) * SIZE_UNITS[match[2]] if match else -1
        return size_bytes if least_bytes <= size_bytes <= most_bytes else None

    return kind(right, accept)


def bandwidth() -> Kind[int]:
    """Bytes per second with their unit, read as whole KiB per second: rsync(1) counts so."""
    written = size(64_000, 100 * 10**9)
    return Kind(written.right, lambda value: written.read(value) // 1024)


def number(least: int, most: int) -> Kind[int]:
    """A whole number; both bounds are allowed."""

    def accept(value: object) -> int | None:
        if not isinstance(value, int) or isinstance(value, bool):
            return None
        return value if least <= value <= most else None

    return kind(f"a number from {least} to {most}", accept)


def list_of(element: Kind[T], least: int, most: int) -> Kind[tuple[T, ...]]:
    """A list without repetitions."""
    count = f"at most {most}" if least == 0 else f"{least} to {most}"
    right = f"a list of {count}, each {element.right}"

    def read(value: object) -> tuple[T, ...]:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise WrongError(("", value, f"must be {right}"))
        taken, findings = _read_each(element, value)
        if not findings:
            findings = [
                (f"[{number}]", value[number - 1], "must not be given twice")
                for number, one in enumerate(taken, start=1)
                if one in taken[: number - 1]
            ]
        if findings:
            raise WrongError(*findings)
        return tuple(taken)

    return Kind(right, read)


def one_or_more(element: Kind[T], most: int) -> Kind[tuple[T, ...]]:
    """A list of at least one, or a single text without the brackets."""
    several = list_of(element, 1, most)
    right = f"{element.right}, or a list of such"
    return Kind(
        right,
        lambda value: several.read([value] if isinstance(value, str) else value),
    )


def _read_each(element: Kind[T], values: list[object]) -> tuple[list[T], list[Finding]]:
    taken: list[T] = []
    findings: list[Finding] = []
    for number, value in enumerate(values, start=1):
        try:
            taken.append(element.read(value))
        except WrongError as wrong:
            findings += [(f"[{number}]{where}", what, why) for where, what, why in wrong.findings]
    return taken, findings


# linux/if.h: IFNAMSIZ is 16 with the closing NUL. net/core/dev.c, dev_valid_name: no "/", no ":",
# no blank, not "." or "..".
_INTERFACE: Final = re.compile(r"(?!\.{1,2}$)[!-.0-9;-~]{1,15}")


def _as_address(value: object) -> IPAddress | None:
    """An address that one machine can have: not unspecified, broadcast, multicast or mapped."""
    if not isinstance(value, str):
        return None
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        return None
    broadcast = address == IPv4Address("255.255.255.255")
    if address.is_unspecified or address.is_multicast or broadcast:
        return None
    if isinstance(address, IPv6Address) and (address.ipv4_mapped or not _is_zone_fit(address)):
        return None
    return address


def _is_zone_fit(address: IPv6Address) -> bool:
    """A zone (RFC 4007) goes with link-local addresses only, and is an interface here."""
    if address.scope_id is None:
        return True
    return address.is_link_local and _INTERFACE.fullmatch(address.scope_id) is not None


def _as_host(value: object) -> IPAddress | None:
    address = _as_address(value)
    return None if address is None or address.is_loopback else address


def _as_vip(value: object) -> IPAddress | None:
    address = _as_host(value)
    return None if address is None or address.is_link_local else address


def _as_port(value: object) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65535:
        return value
    return None


def _as_flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _as_path(value: object) -> Path | None:
    # limits.h: PATH_MAX is 4096 with the closing NUL.
    if not isinstance(value, str) or not value.isprintable() or len(value.encode()) > 4095:
        return None
    path = PurePosixPath(value)
    normal = path.is_absolute() and ".." not in path.parts and not value.startswith("//")
    return Path(path) if normal else None


def _read_cron(value: object) -> str | None:
    if value == "":
        return None
    fault = cron.fault(value) if isinstance(value, str) else f"be {_CRON_RIGHT}"
    if fault or not isinstance(value, str):
        raise WrongError(("", value, f"must {fault}"))
    return value


def _as_role(value: object) -> Role | None:
    return Role(value) if isinstance(value, str) and value in {*Role} else None


def _as_witness(value: object) -> IPAddress | str | None:
    return "gateway" if value == "gateway" else _as_host(value)


def _read_witnesses(value: object) -> Witness:
    names = _WITNESSES.read(value)
    hosts = tuple(name for name in names if not isinstance(name, str))
    return Witness(gateway="gateway" in names, hosts=hosts)


_CRON_RIGHT: Final = '"" (none) or five fields as in crontab(5), with names as weekdays'

FLAG: Final[Kind[bool]] = kind("true or false", _as_flag)
PORT: Final[Kind[int]] = kind("a port from 1 to 65535", _as_port)
CRON: Final[Kind[str | None]] = Kind(_CRON_RIGHT, _read_cron)
PATH: Final[Kind[Path]] = kind('an absolute path without ".."', _as_path)
OWN_ADDRESS: Final[Kind[IPAddress]] = kind("an IPv4 or IPv6 address of this machine", _as_address)
HOST: Final[Kind[IPAddress]] = kind(
    "the IPv4 or IPv6 address of one machine (not loopback or multicast)", _as_host
)
VIP: Final[Kind[IPAddress]] = kind(
    "an IPv4 or IPv6 address without prefix length (not loopback, link-local or multicast)",
    _as_vip,
)
INTERFACE: Final[Kind[str]] = matching(
    _INTERFACE, "the name of a network interface (1 to 15 characters)"
)
NAME: Final[Kind[str]] = matching(
    re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"),
    "a name of 1 to 63 letters, digits, dots or dashes",
)
# useradd(8), "CAVEATS": such names only, at most 32 characters.
GROUP: Final[Kind[str]] = matching(re.compile(r"[a-z_][a-z0-9_-]{0,31}"), "the name of a group")
ROLE: Final[Kind[Role]] = kind('"primary" or "standby"', _as_role)
_WITNESSES: Final[Kind[tuple[IPAddress | str, ...]]] = one_or_more(
    kind(f'"gateway" or {HOST.right}', _as_witness), 16
)
WITNESS: Final[Kind[Witness]] = Kind(_WITNESSES.right, _read_witnesses)

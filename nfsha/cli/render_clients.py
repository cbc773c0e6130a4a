"""Shows the connections of clients, as plain text. Pure, like `render`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from nfsha.cli.words import YELLOW, Facts, Style, ago, count, labelled, paragraph, printable

_SHOWN: Final = 200
_PORTS_SHOWN: Final = 4


def clients(answer: Facts, style: Style) -> str:
    """What this node sees, what the other one told, and what it is good for."""
    here, saved = answer["here"], answer["saved"]
    lines: list[str] = []
    if answer["serving"]:
        age = "not looked yet" if here["age_ms"] is None else f"seen {ago(here['age_ms'])}"
        lines += labelled("here", f"{_amount(here)}, {age}")
        lines += _table(here["clients"])
        told = "has this list" if here["delivered"] else "does not have this list yet"
        lines += labelled("other node", told)
    else:
        lines += labelled("here", "this node does not serve")
        heard = "nothing heard yet"
        if saved["age_ms"] is not None:
            heard = f"{_amount(saved)}, confirmed {ago(saved['age_ms'])}"
        lines += labelled("other node", heard)
        lines += _table(saved["clients"])
    lines += labelled("locks", _locks(answer["locks"], serving=answer["serving"]))
    lines += labelled("at a move", _means(answer))
    if answer["trouble"]:
        lines += [style.paint(line, YELLOW) for line in labelled("trouble", answer["trouble"])]
    return "\n".join(lines)


def _amount(listed: Facts) -> str:
    addresses = {one["client"] for one in listed["clients"]}
    told = sum(len(one["client_ports"]) for one in listed["clients"])
    text = f"{count(listed['total'], 'connection')} of {count(len(addresses), 'client')}"
    return text if told >= listed["total"] else f"{text} (the newest {told:,} are listed)"


def _means(answer: Facts) -> str:
    means = answer["ends_own_by"]
    woken = f"clients are woken by tickles ({answer['tickles']:,} sent)"
    ended = f"own connections are ended by {means} ({answer['ended']:,} ended)"
    if means.startswith("none"):
        ended = f"own connections stay ({means}): the way back may stall clients"
    return f"{woken}; {ended}"


def _locks(locks: Facts, *, serving: bool) -> str:
    if not serving:
        return f"{count(len(locks['saved']), 'client')} may hold some: they are told of a move"
    known = "knows them" if locks["delivered"] else "does not know them yet"
    text = f"{count(len(locks['here']), 'client')} may hold some; the other node {known}"
    told = locks["told"]
    if told["total"]:
        text += (
            f"; {told['answered']:,} of {told['total']:,} answered as they were told of the move"
        )
    return text


def _table(listed: list[Mapping[str, Any]]) -> Iterator[str]:
    for one in listed[:_SHOWN]:
        ports = one["client_ports"]
        shown = ", ".join(map(str, ports[:_PORTS_SHOWN]))
        more = f" and {len(ports) - _PORTS_SHOWN:,} more" if len(ports) > _PORTS_SHOWN else ""
        where = f"{one['service'] or one['port']} at {one['vip']}"
        yield paragraph(printable(f"  {one['client']} {where}, from port {shown}{more}"), indent=4)
    if len(listed) > _SHOWN:
        yield f"  and {len(listed) - _SHOWN:,} more (`--json` has all)"

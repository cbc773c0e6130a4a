"""Shows a planned move of the service: its plan, its progress, its report. Plain text, pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from nfsha.cli.words import Facts, count, duration, get, labelled, moment, printable, size, spelled

STEPS: Final[Mapping[str, str]] = {
    "ASKED": "waits for the other node",
    "PRESYNC": "comes near to the data, which is still served where it is",
    "FREEZING": "clients are held from now on",
    "PREPARED": "clients are held; the last changes cross over",
    "FINAL_SYNC": "clients are held; the last changes cross over, and are proved",
    "RESTORING": "proved equal; the new epoch is being written",
}
_ROUNDS: Final[Mapping[str, str]] = {
    "full": "full walk",
    "changes": "what changed",
    "last": "last pass",
}
_VOLUMES_SHOWN: Final = 50
_CLIENTS_SHOWN: Final = 20


# --------------------------------------------------------------------------- the plan


def plan(facts: Facts) -> str:
    """All guards with what was found; with the numbers also what would change."""
    lines = list(_guards(facts))
    if "numbers" in facts:
        lines += ["", *_numbers(facts["numbers"], str(facts.get("why") or ""))]
    if "clients" in facts:
        lines += labelled("clients", _clients(facts["clients"]))
    lines += labelled("plan", facts["plan"])
    return "\n".join(lines)


def _guards(facts: Facts) -> Iterator[str]:
    width = max(len(one["name"]) for one in facts["guards"])
    for one in facts["guards"]:
        word = "ok" if one["ok"] else "NO"
        yield printable(f"  {word:<3} {one['name']:<{width}}  {one['found']}")


def _numbers(numbers: Facts | None, why: str) -> Iterator[str]:
    if numbers is None:
        yield from labelled("changes", f"not known: {why}")
        return
    total = numbers["sum"]
    unknown = f"; {count(total['unknown'], 'volume')} not known" if total["unknown"] else ""
    yield from labelled(
        "changes",
        f"{_amounts(total)} in {count(total['volumes'], 'volume')}{unknown} "
        f"(looked at in {duration(numbers['took_ms'])})",
    )
    listed = numbers["volumes"]
    for one in listed[:_VOLUMES_SHOWN]:
        yield from _volume(one)
    more = total["volumes"] - min(len(listed), _VOLUMES_SHOWN)
    if more > 0:
        yield f"  and {count(more, 'more volume')} (`--json` has more)"
    yield from labelled("stall", _stall(numbers["stall"]))


def _amounts(one: Facts) -> str:
    files = count(one["copy_files"], "file")
    put_aside = count(one["quarantine"], "file")
    return (
        f"{files} to copy ({size(one['copy_bytes'])}), {one['deletions']:,} to delete, "
        f"{put_aside} to quarantine"
    )


def _volume(one: Facts) -> Iterator[str]:
    name = spelled(one["name"])
    if one["trouble"]:
        yield from labelled(f"  {name}", f"not known: {one['trouble']}")
        return
    how = f"all was walked: {one['why_full']}" if one["walk"] == "full" else "by its change journal"
    note = f"; {one['note']}" if one["note"] else ""
    yield from labelled(f"  {name}", f"{_amounts(one)} ({how}{note})")
    for put_aside in one["names"]:
        yield printable(f"    to quarantine: {put_aside}")
    more = one["quarantine"] - len(one["names"])
    if more > 0:
        yield f"    and {more:,} more to quarantine"


def _stall(stall: Facts) -> str:
    rate, writes = stall["rate_bytes_s"], stall["writes_bytes_s"]
    text = (
        f"about {duration(stall['ms'])}: the freeze, and twice a pass, which took "
        f"{duration(stall['pass_ms'])} now; clients write {size(writes)}/s"
    )
    if rate:
        text += f", which cross over at the {size(rate)}/s that the last large pass reached"
    elif writes:
        text += " (no pass was large enough to measure how fast that crosses over)"
    if stall["large_bytes"]:
        text += f"; large files of {size(stall['large_bytes'])} change, and are read as a whole"
    if stall["unmeasured"]:
        text += (
            f"; {count(stall['unmeasured'], 'volume')} could not be measured before all of it "
            "is walked"
        )
    return text


def _clients(answer: Facts) -> str:
    """Who is connected, by address; as the node that serves sees it, or told the other one."""
    side = answer["here"] if answer["serving"] else answer["saved"]
    listed = side["clients"]
    if not listed:
        return "none is connected"
    connections: dict[str, int] = {}
    for one in listed:
        address = str(one["client"])
        connections[address] = connections.get(address, 0) + len(one["client_ports"])
    shown = [f"{name} ({number})" for name, number in sorted(connections.items())]
    more = len(shown) - _CLIENTS_SHOWN
    rest = f", and {more:,} more (`nfsha clients`)" if more > 0 else ""
    return (
        f"{count(side['total'], 'connection')} of {count(len(shown), 'client')}: "
        f"{', '.join(shown[:_CLIENTS_SHOWN])}{rest}"
    )


# --------------------------------------------------------------------------- progress


def progress(move: Facts) -> str:
    """How far the step is, in one line: the pass, its bytes, what is left; "" where unknown."""
    now = move.get("progress") or {}
    parts = []
    if now.get("round") and now.get("what"):
        what = _ROUNDS.get(str(now["what"]), str(now["what"]))
        volumes = count(now.get("volumes", 0), "volume")
        parts.append(f"pass {now['round']} ({printable(what)}, {volumes})")
    elif now.get("round"):
        parts.append(f"pass {now['round']} has ended")
    if now.get("bytes"):
        total = f" of {size(now['total_bytes'])}" if now.get("total_bytes") else ""
        parts.append(f"{size(now['bytes'])}{total}")
    if now.get("eta_s") is not None:
        parts.append(f"{duration(now['eta_s'] * 1000)} left")
    if move.get("held_ms") is not None:
        parts.append(f"clients held for {duration(move['held_ms'])}")
    return ", ".join(parts)


# --------------------------------------------------------------------------- the report


def reports(listed: Sequence[Mapping[str, Any]]) -> str:
    """The moves that are remembered, newest last, one line each."""
    return "\n".join(_headline(one) for one in listed) or "no move of the service is remembered"


def _headline(one: Facts) -> str:
    return printable(f"{moment(one['began_ns'])} {one['id']}  {one['summary']}")


def report(one: Facts) -> str:
    """One move, from begin to end."""
    lines = [_headline(one)]
    lines += labelled("outcome", "done" if one["done"] else f"ended: {one['why']}", 2)
    lines += labelled("duration", duration(one["took_ms"]), 2)
    if one["stall_ms"] is not None:
        lines += labelled("stall", f"{duration(one['stall_ms'])}: {one['stall_how']}", 2)
    for side in ("receiver", "giver"):
        part = one.get(side)
        if part:
            took = part["steps"]
            names = [*filter(took.__contains__, STEPS), *sorted(took.keys() - STEPS.keys())]
            steps = ", ".join(f"{name} {duration(took[name])}" for name in names)
            ended = "" if part["done"] else f"; ended: {part['why']}"
            lines += labelled(side, f"{part['node']}: {steps or 'no step'}{ended}", 2)
    for number, made in enumerate(get(one, "receiver", "rounds") or [], start=1):
        what = _ROUNDS.get(made["what"], made["what"])
        copied = f"{count(made['copied_files'], 'file')} ({size(made['copied_bytes'])})"
        bad = f"; not complete: {made['trouble']}" if made["trouble"] else ""
        lines += labelled(
            f"pass {number}", f"{what}, {duration(made['took_ms'])}, {copied}{bad}", 2
        )
    for made in get(one, "receiver", "volumes") or []:
        lines += labelled(
            spelled(made["name"]),
            f"{count(made['copied_files'], 'file')} copied ({size(made['copied_bytes'])}), "
            f"{made['deleted']:,} deleted, {made['quarantined']:,} in quarantine",
            2,
        )
    return "\n".join(lines)

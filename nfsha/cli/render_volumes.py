"""Shows the volumes of both nodes and how their copies stand, as plain text of 80 columns.

Pure, like `render`: takes what the daemon answered to `volumes`, returns text. What an answer lacks
is left out.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from nfsha.cli.words import (
    BOLD,
    RED,
    Facts,
    Style,
    count,
    duration,
    epoch_text,
    get,
    labelled,
    moment,
    paragraph,
    printable,
    size,
    spelled,
)

MEND_SOURCE: Final = "mend what keeps the rsync daemon from running; it is started again by itself"

_BAR: Final = 20
_PLAN_DIGITS: Final = 12
"""So much of a plan's hash is shown and typed; `nfsha sync` finds the whole one by it."""
_NAMES: Final = 5
_BRIEF: Final = 6
"""So many volumes the screen of `status` has room for."""

_TROUBLE: Final = ("held", "failed", "refused")

_MODES: Final[Mapping[str, str]] = {
    "source": "this node is the source: the other one copies from here",
    "target": "this node copies from the one that serves",
    "off": "off: somebody else keeps the copies equal",
    "none": "no data flows",
}
_STRANGERS: Final = "strangers"
_PAIRED: Final[Mapping[str, str]] = {
    "paired": "paired",
    "new": "new, not paired yet",
    "unpaired-here": "UNPAIRED, only this node's volume has an identity",
    "unpaired-there": "UNPAIRED, only the other node's volume has an identity",
    _STRANGERS: "UNPAIRED, the volumes of this name have different identities",
}
_OFFERED: Final = "offered"
_STATES: Final[Mapping[str, str]] = {
    _OFFERED: "offered to the other node",
    "idle": "idle",
    "held": "DELETIONS HELD",
    "failed": "FAILED",
    "refused": "REFUSED",
    "off": "no pass runs here",
}
_STAGES: Final[Mapping[str, str]] = {
    "plan": "compares",
    "copy": "copies",
    "check": "finishes",
}
_WALKS: Final[Mapping[str, str]] = {
    "full": "a full walk",
    "folders": "the changed folders",
    "verify": "a comparison of all contents",
}


def bar(percent: float) -> str:
    """A bar of twenty signs."""
    full = round(_BAR * min(max(percent, 0.0), 100.0) / 100)
    return f"[{'#' * full}{'-' * (_BAR - full)}]"


# --------------------------------------------------------------------------- the whole screen


def volumes(answer: Facts, style: Style) -> str:
    """All volumes, each as it is on both nodes, with what differs and what to do."""
    listed = _told_apart(_listed(answer))
    lines = list(_way(answer.get("replication") or {}))
    for one in listed:
        lines += ["", *_volume(one, style)]
    if not listed and get(answer, "replication", "mode") != "off":
        lines += ["", "no volumes: nothing is mounted at or under nfs.root"]
    lines += ["", *labelled("next", _next(answer))]
    return "\n".join(lines)


def _listed(answer: Facts) -> Sequence[Facts]:
    """The volumes; on the source without what is left of passes that it made before it served."""
    listed: Sequence[Facts] = answer.get("volumes") or []
    if get(answer, "replication", "mode") != "source":
        return listed
    return [{**one, "sync": _offered(one)} for one in listed]


def _offered(one: Facts) -> Facts:
    kept = {key: get(one, "sync", key) for key in ("last", "age_ms")}
    return {"state": _OFFERED if one.get("paired") == "paired" else "off", **kept}


def _told_apart(listed: Sequence[Facts]) -> list[Facts]:
    """Two volumes of one name, each on one node only, are strangers: both have an identity."""
    names = Counter(one["name"] for one in listed)
    return [{**one, "paired": _STRANGERS} if names[one["name"]] > 1 else one for one in listed]


def _way(facts: Facts) -> Iterator[str]:
    words = _MODES.get(str(facts.get("mode")), "unknown")
    if facts.get("why"):
        words += f" ({facts['why']})"
    for number, sentence in enumerate([words, *_remarks(facts)]):
        yield from labelled("replication" if number == 0 else "", sentence)


def _remarks(facts: Facts) -> Iterator[str]:
    """What holds of all volumes and is not as always."""
    source = facts.get("source") or {}
    if facts.get("mode") == "source" and not source.get("running"):
        yield f"ITS RSYNC DAEMON DOES NOT RUN: {source.get('trouble') or 'not started yet'}"
    elif source.get("trouble"):
        yield str(source["trouble"])
    if _paused(facts):
        yield "PAUSED: no pass begins until `nfsha sync --resume`"
    if facts.get("bandwidth_kib_s") is not None and facts.get("mode") != "source":
        yield f"each transfer is limited to {size(1024 * facts['bandwidth_kib_s'])} per second"
    yield from (f"warning: {warning}" for warning in facts.get("warnings") or [])


def _paused(facts: Facts) -> bool:
    """No pass begins; on the source it would not matter."""
    return bool(facts.get("paused")) and facts.get("mode") != "source"


def _volume(one: Facts, style: Style) -> Iterator[str]:
    name = spelled(one["name"])
    first, *rest = paragraph(f"{name}: {'; '.join(_gist(one))}", indent=2).splitlines()
    colour = BOLD + (RED if _in_trouble(one) else "")
    yield style.paint(first[: len(name)], colour) + first[len(name) :]
    yield from rest
    for label, sentence in _lines(one):
        yield from labelled(label, sentence, indent=2)


def _gist(one: Facts) -> Iterator[str]:
    """Whether it is a pair, how old the copy is, what happens now."""
    yield pairing(one)
    if one.get("paired") == "paired":
        age_ms = get(one, "sync", "age_ms")
        yield (
            "no complete pass is known" if age_ms is None else f"the copy is {duration(age_ms)} old"
        )
    if one.get("tainted"):
        yield f"NO WHOLE COPY ({one['tainted']})"
    yield state(one)


def pairing(one: Facts) -> str:
    """Whether both nodes' volumes of this name belong together."""
    refused = get(one, "here", "refused") or get(one, "there", "refused")
    if refused:
        return f"cannot be a volume: {refused}"
    paired = one.get("paired")
    if "here" in one and one["here"] is None and paired != _STRANGERS:
        return "UNPAIRED, only the other node has it"
    if "there" in one and one["there"] is None and paired not in ("paired", _STRANGERS):
        return "UNPAIRED, only this node has it"
    return _PAIRED.get(str(paired), "not known whether it is a pair")


def state(one: Facts) -> str:
    """What happens with the volume now, in words."""
    sync = one.get("sync") or {}
    if sync.get("state") == "running":
        words = "DELETIONS HELD, " if sync.get("plan") else ""
        return words + _STAGES.get(str(get(sync, "progress", "stage")), "a pass runs")
    words = _STATES.get(str(sync.get("state")), "state unknown")
    if sync.get("why"):
        words += f": {sync['why']}"
    if sync.get("next_ms") is not None:
        words += f", next pass in {duration(sync['next_ms'])}"
    return words


def held(one: Facts) -> bool:
    """Deletions wait for the operator; also while a pass of the volume runs."""
    return get(one, "sync", "state") == "held" or bool(get(one, "sync", "plan"))


def _in_trouble(one: Facts) -> bool:
    if "UNPAIRED" in pairing(one) or held(one) or _spoiled(one):
        return True
    return get(one, "sync", "state") in _TROUBLE


def _spoiled(one: Facts) -> bool:
    """It has an identity on one node, so it was a volume, and cannot be one on the other."""
    refused = get(one, "here", "refused") or get(one, "there", "refused")
    return bool(refused) and one.get("uuid") is not None


def _lines(one: Facts) -> Iterator[tuple[str, str]]:
    for label in ("here", "there"):
        if label in one:
            yield label, _place(one[label])
    sync = one.get("sync") or {}
    if _moves(sync.get("progress")):
        yield "progress", progress(sync["progress"])
    if sync.get("last"):
        yield "last pass", _pass(sync["last"])
    if sync.get("plan"):
        yield "held", _plan(sync["plan"])
    if sync.get("verify"):
        yield "verified", _verified(sync["verify"])
    journal = _journal(sync)
    if journal:
        yield "journal", journal
    for sentence in one.get("differs") or []:
        yield "differs", sentence


def _place(facts: Facts | None) -> str:
    """One node's volume: filesystem, room, state, stamp."""
    if facts is None:
        return "no such volume"
    words = [str(facts.get("fstype") or "unknown filesystem")]
    if facts.get("size_bytes") is not None:
        words.append(f"{size(facts['size_bytes'])}, {size(facts.get('free_bytes') or 0)} free")
    if facts.get("free_inodes") is not None and facts.get("inodes"):
        words.append(f"{facts['free_inodes']:,} inodes free")
    if facts.get("read_only"):
        words.append("READ-ONLY")
    if facts.get("failing"):
        words.append(f"FAILING: {facts['failing']}")
    if facts.get("refused"):
        words.append("REFUSED")
    words.append(f"stamp {epoch_text(facts.get('stamp'))}")
    return ", ".join(words)


def _moves(facts: Facts | None) -> bool:
    """There is something to see of it: a pass that compares has no figures yet."""
    return facts is not None and any(facts.get(key) for key in ("bytes", "files", "percent"))


def progress(facts: Facts) -> str:
    """A running pass: bar, how much, how fast, how long yet."""
    words = []
    if facts.get("percent") is not None:
        words.append(f"{bar(facts['percent'])} {facts['percent']:.0f} %")
    amount = size(facts.get("bytes") or 0)
    if facts.get("total_bytes") is not None:
        amount += f" of {size(facts['total_bytes'])}"
    words.append(amount)
    if facts.get("files") is not None:
        words.append(count(facts["files"], "file"))
    if facts.get("rate_bytes_s") is not None:
        words.append(f"{size(facts['rate_bytes_s'])} per second")
    if facts.get("eta_s") is not None:
        words.append(f"{duration(1000 * round(facts['eta_s']))} left")
    return ", ".join(words)


def _pass(last: Facts) -> str:
    walk = _WALKS.get(str(last.get("walk")), "a pass")
    words = [f"{moment(last['started_ns'])} in epoch {epoch_text(last.get('epoch'))}, {walk}"]
    words.append(f"{count(last.get('files') or 0, 'file')}, {size(last.get('bytes') or 0)}")
    words.append(f"{size(last.get('transferred_bytes') or 0)} sent")
    words.append(f"{last.get('deletions') or 0:,} deleted")
    return f"{', '.join(words)}, in {duration(last.get('duration_ms') or 0)}"


def _plan(plan: Facts) -> str:
    names = [printable(name) for name in plan.get("names") or []][:_NAMES]
    more = plan["count"] - len(names)
    tail = f" and {more:,} more" if more > 0 and names else ""
    return (
        f"{count(plan['count'], 'deletion')}, plan {plan['hash'][:_PLAN_DIGITS]}:"
        f" {', '.join(names)}{tail}"
    )


def _verified(verify: Facts) -> str:
    if not verify.get("last_ns"):
        return "not yet"
    found = f"{verify.get('damaged') or 0:,} damaged here, {verify.get('missed') or 0:,} missed"
    return f"{moment(verify['last_ns'])}: {found}"


def _journal(sync: Facts) -> str:
    walks: Mapping[str, int] = sync.get("full_walks") or {}
    words = [f"{reason} ({number:,})" for reason, number in sorted(walks.items()) if number]
    told = [f"full walks: {', '.join(words)}"] if words else []
    if sync.get("missed_by_journal"):
        told.append(f"{count(sync['missed_by_journal'], 'change')} found by full walks only")
    return "; ".join(told)


# --------------------------------------------------------------------------- what to do


def _next(answer: Facts) -> str:
    """The most pressing thing to do, in one sentence."""
    step = first_step(answer)
    if step:
        return step
    if get(answer, "replication", "source", "trouble"):
        return MEND_SOURCE
    idle = get(answer, "replication", "mode") in ("off", "none")
    return "nothing" if idle else "nothing: passes come by themselves"


def step_for(one: Facts) -> str:
    """What an operator should do about this volume; empty when nothing."""
    name = word(one)
    if held(one):
        plan = get(one, "sync", "plan") or {}
        return (
            f"find out who deleted these files; if rightly: `nfsha sync {name} --accept-deletes"
            f" {str(plan.get('hash') or 'PLAN')[:_PLAN_DIGITS]}`"
        )
    if "UNPAIRED" in pairing(one):
        return _pairing_step(one, name)
    if _spoiled(one):
        return f"mend what keeps {name} from being a volume: it has no copy now"
    if get(one, "sync", "state") in ("failed", "refused"):
        return f"mend what it says, if anything, then `nfsha sync {name} --wait`"
    return ""


def _pairing_step(one: Facts, name: str) -> str:
    if one.get("paired") == _STRANGERS:
        return (
            "if both belong together, on the node that does not serve: remove .nfsha-volume in "
            f"the volume's root, then `nfsha volumes pair {name}`"
        )
    if one.get("here", one) is None:
        return f"make a volume of at least the same size and mount it at {name} here"
    if one.get("there", one) is None:
        return f"make a volume of at least the same size and mount it at {name} there"
    where = "on the other node" if one.get("paired") == "unpaired-here" else "here"
    return f"if both belong together, {where}: `nfsha volumes pair {name}`"


def word(one: Facts) -> str:
    """The volume's name as one types it in a shell."""
    return shlex.quote(spelled(one["name"]))


# --------------------------------------------------------------------------- in brief


def brief(answer: Facts) -> list[str]:
    """What is not as always, and one line for each volume, those in trouble first: for `status`."""
    told = _listed(answer)
    listed = [one for one in told if not _is_none(one)]
    ordered = sorted(listed, key=lambda one: not _in_trouble(one))[:_BRIEF]
    lines = [*_remarks(answer.get("replication") or {}), *map(brief_line, ordered)]
    # Of many volumes a status has only those that matter most, and how many there are.
    untold = max(0, answer.get("total", 0) - len(told))
    more = untold + len(listed) - len(ordered)
    if more:
        lines.append(f"and {count(more, 'volume')} more: see `nfsha volumes`")
    return lines


def _is_none(one: Facts) -> bool:
    """A filesystem that cannot be a volume, and never was one."""
    return one.get("uuid") is None and bool(get(one, "here", "refused"))


def first_step(answer: Facts) -> str:
    """What an operator should do about the volumes first; empty when nothing.

    While passes are paused none can be asked for, and each volume's own step may need one.
    """
    if _paused(answer.get("replication") or {}):
        return "`nfsha sync --resume` when the work is done"
    listed = [one for one in _told_apart(_listed(answer)) if not _is_none(one)]
    return next((step for one in listed if (step := step_for(one))), "")


def brief_line(one: Facts) -> str:
    """One volume in one sentence."""
    words = list(_gist(one))
    if one.get("paired") == "paired":
        words = words[1:]
    told = f"{spelled(one['name'])}: {', '.join(words)}"
    running = get(one, "sync", "progress")
    if _moves(running):
        told += f" {progress({**running, 'files': None})}"
    return told


def passes(listed: Sequence[Facts], style: Style) -> str:
    """The passes that are waited for, as they stand."""
    lines = []
    for one in listed:
        text = paragraph(brief_line(one), indent=2)
        lines.append(style.paint(text, RED) if _in_trouble(one) else text)
    return "\n".join(lines)


def finished(one: Facts) -> str:
    """How the pass of a volume that was waited for has ended."""
    name, last = spelled(one["name"]), get(one, "sync", "last")
    if _in_trouble(one) or not last:
        return paragraph(brief_line(one), indent=2)
    return paragraph(f"{name}: {_pass(last)}", indent=2)

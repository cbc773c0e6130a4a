"""Shows a node's status and its events as plain text of 80 columns, for people.

Pure: takes what the daemon answered (nfsha/core/describe.py and the daemon say what is in it),
returns text. Whatever is missing in an answer is left out: daemon and command may differ by one
version while nfsha is upgraded.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from nfsha.cli import render_volumes
from nfsha.cli.words import (
    BOLD,
    GREEN,
    RED,
    WIDTH,
    YELLOW,
    Facts,
    Style,
    ago,
    duration,
    epoch_text,
    get,
    labelled,
    printable,
)

_COLOURS = {
    "ACTIVE": GREEN,
    "PASSIVE": GREEN,
    "ISOLATED": RED,
    "DIVERGED": RED,
    "FAULT": RED,
}

_NEXT_BY_ALARM: Final[Mapping[str, str]] = {
    "volumes-unseen": "mend what keeps the volumes from being seen",
    "volume-hangs": "thaw it (`fsfreeze -u`), end the snapshot, or look at the disk",
    "source": render_volumes.MEND_SOURCE,
    "not-offered": "mend what keeps the volume from being offered",
    "verify": "find the files in the log (they are repaired where that was possible); if one is "
    "damaged, look at the disks of both nodes",
    "quarantine-full": "find out what of it is wanted (`nfsha quarantine list`); the rest: `nfsha "
    "quarantine drop`",
}
"""What an operator does about an alarm of the copies, by its first word, the most pressing first.
Those that follow from a volume's state have their step there (`render_volumes.step_for`)."""

_LINK_TROUBLE = ("forged", "malformed", "other_version", "own_role", "from_stranger", "errors")
"""Counters of a link (`nfsha.peer.links.LinkCounters`) that are shown only when not 0."""


# --------------------------------------------------------------------------- status


def status(facts: Facts, style: Style) -> str:
    """One screen: what this node does, why, what it rests on, and what to do next."""
    lines = [_headline(facts, style)]
    for label, sentences in _sections(facts):
        for number, sentence in enumerate(sentences):
            lines += labelled(label if number == 0 else "", sentence)
    lines += _alarms(facts, style)
    lines += labelled("next", _next(facts))
    return "\n".join(lines)


def _next(facts: Facts) -> str:
    """What the node says; where it has nothing to ask for, what a volume wants."""
    told = str(facts.get("next", ""))
    if not told.startswith("nothing"):
        return told
    step = render_volumes.first_step(facts.get("copies") or {})
    return step or (_alarm_step(facts) if told == "nothing" else "") or told


def _alarm_step(facts: Facts) -> str:
    kinds = {str(alarm["name"]).partition(" ")[0] for alarm in facts["alarms"]}
    return next((step for kind, step in _NEXT_BY_ALARM.items() if kind in kinds), "")


def _headline(facts: Facts, style: Style) -> str:
    phase = printable(facts["phase"])
    name = printable(facts.get("node", facts["role"]))
    text = f"on {name} for {duration(facts['since_ms'])}: {_gist(facts)}"
    painted = style.paint(phase, BOLD + _COLOURS.get(phase, YELLOW))
    first, *rest = textwrap.wrap(text, WIDTH - len(phase) - 1) or [""]
    more = textwrap.wrap(" ".join(rest), WIDTH - 2)
    return "\n".join([f"{painted} {first}", *(f"  {line}" for line in more)])


def _gist(facts: Facts) -> str:
    vips = _vips(facts)
    if facts.get("stopping"):
        return f"the daemon is stopping ({facts['stopping']})"
    if facts["phase"] == "FREEZING":
        return f"holds the clients of {vips}, to hand the service over"
    if facts["serving"]:
        return f"serves {vips}"
    if facts["phase"] == "PASSIVE":
        return _passive_gist(facts, vips)
    gists = {
        "STARTING": "looks at what a former run left",
        "WAITING": "does not serve, cannot prove yet who may",
        "TAKEOVER": f"is taking over {vips}",
        "RETURNED": "does not serve, its data may be old",
        "ISOLATED": f"does not serve, lost the proof that it may hold {vips}",
        "DIVERGED": "does not serve, there are two histories",
        "MAINTENANCE": "does not serve, decides nothing by itself",
        "PRESYNC": "comes near to the other node's data, to serve then",
        "FINAL_SYNC": "clients are held, the last changes cross over to this node",
        "RESTORING": f"clients are held, this node is about to serve {vips}",
        "PREPARED": "clients are held, the last changes cross over to the other node",
        "FAULT": "does not serve, its own service or storage is broken",
    }
    return gists.get(str(facts["phase"]), "does not serve")


def _passive_gist(facts: Facts, vips: str) -> str:
    conditions = get(facts, "takeover", "conditions") or []
    able = all(one["ok"] for one in conditions if one["number"] in (2, 3))
    if get(facts, "takeover", "promised"):
        return f"promised not to take over {vips}"
    if not able:
        return f"could not take over {vips} now"
    if not get(facts, "peer", "heard"):
        return f"watches {vips}, the other node is silent"
    if not get(facts, "peer", "serving"):
        return f"watches {vips}, the other node does not serve"
    return f"ready to take over {vips}"


def _handover_lines(facts: Facts) -> list[str]:
    """How far a move of the service is; without one, how the last one ended."""
    now = facts.get("handover") or {}
    if now.get("side") is not None:
        held = now.get("held_ms")
        stall = f"; held for {duration(held)}" if held is not None else ""
        return [f"to the {now['to']}, {now['step']}: {now['text']}{stall}"]
    last = now.get("last")
    if last is None:
        return []
    how = "done" if last["done"] else f"ended: {printable(last['why'])}"
    return [f"the last one, to the {last['to']}, {ago(last['age_ms'])}: {how}"]


def _vips(facts: Facts) -> str:
    return printable(", ".join(map(str, facts.get("vips") or ["the VIP"])))


def _sections(facts: Facts) -> Iterator[tuple[str, list[str]]]:
    yield "why", [f"{facts['row']} {facts['why']}" if facts.get("row") else "starting"]
    yield "epoch", [_epoch_line(facts)]
    yield "evidence", _evidence_lines(facts)
    yield "takeover", _takeover_lines(facts)
    yield "handover", _handover_lines(facts)
    yield "peer", [_peer_line(facts)]
    yield "promises", _promise_lines(facts)
    yield "VIP", [_vip_line(facts)]
    yield "NFS ports", _service_lines(facts)
    yield "links", [_link_line(one) for one in facts.get("links") or []]
    yield "witness", _witness_lines(facts)
    yield "health", [_health_line(facts)]
    yield "warnings", list(facts.get("warnings") or [])
    yield "maintenance", ["on (`nfsha maintenance off` ends it)"] if facts["maintenance"] else []
    yield (
        "replication",
        [
            get(facts, "replication", "text") or "unknown",
            *render_volumes.brief(facts.get("copies") or {}),
        ],
    )
    yield "scheduling", [facts["scheduling"]] if facts.get("scheduling") else []
    yield "risks", list(facts.get("risks") or [])


def _epoch_line(facts: Facts) -> str:
    if not facts["epoch"]:
        return "none yet"
    here = facts["authority"] == facts["role"]
    whose = "this node has the truth" if here else f"the {facts['authority']} has the truth"
    return f"{epoch_text(facts['epoch'])}, {whose}"


def _evidence_lines(facts: Facts) -> list[str]:
    """Only of the node that has the truth: no other one needs evidence."""
    if facts["authority"] != facts["role"]:
        return []
    fresh = [one for one in facts["evidence"] if one["fresh"]]
    lines = [", ".join(map(_evidence_text, fresh or facts["evidence"]))]
    if facts["lease_remaining_ms"] is not None:
        lines.append(f"lets it serve for {duration(facts['lease_remaining_ms'])} more")
    return lines


def _evidence_text(one: Facts) -> str:
    """One kind of evidence; what is fresh and has no age stands until it is taken back."""
    age = "stands" if one["fresh"] and one["age_ms"] is None else ago(one["age_ms"])
    return f"{one['kind']} {age}{' (counts)' if one['counts'] else ''}"


def _takeover_lines(facts: Facts) -> list[str]:
    """The conditions, where there is something to see: the peer is not serving as it should."""
    conditions = get(facts, "takeover", "conditions") or []
    calm = get(facts, "peer", "heard") and get(facts, "peer", "serving")
    if calm and all(one["ok"] for one in conditions if one["number"] in (2, 3)):
        return []
    return [
        f"{one['number']} {'yes' if one['ok'] else 'no '} {one['name']}: {one['reason']}"
        for one in conditions
    ]


def _peer_line(facts: Facts) -> str:
    peer = facts["peer"]
    if peer["age_ms"] is None:
        return f"{peer['role']}, not heard since this daemon started"
    age = duration(peer["age_ms"])
    heard = f"heard {age} ago:" if peer["heard"] else f"SILENT for {age}; before:"
    health = "healthy" if peer["healthy"] else "not healthy"
    serves = ", serves" if peer["serving"] else ""
    epoch = epoch_text(peer["epoch"])
    return f"{peer['role']}, {heard} {peer['phase']}{serves}, {health}, epoch {epoch}"


def _promise_lines(facts: Facts) -> list[str]:
    promise = facts["promise"]
    lines = []
    if promise["own"] != "none":
        word = "stands" if promise["own"] == "standing" else "is being cleared"
        lines.append(f"this node's not to take over {word}")
    if promise["peer"] == "standing":
        lines.append("the peer's not to take over stands")
    if promise["peer_down"]:
        lines.append(f"the peer is taken to be off, by the {promise['peer_down']}'s word")
    return lines


def _vip_line(facts: Facts) -> str:
    vip = facts["vip"]
    words = [f"{_vips(facts)} {'held here' if vip['held'] else 'not held here'}"]
    if facts.get("interface"):
        words[0] += f" ({facts['interface']})"
    if not vip["carrier"]:
        words.append("no carrier")
    if vip["answered_by"]:
        words.append(f"{vip['answered_by']} answers for it")
    return ", ".join(words)


def _service_lines(facts: Facts) -> list[str]:
    service = facts.get("service_lease")
    if not service:
        return []
    text = "open at the VIP" if service.get("open") else "closed"
    if service.get("open") and service.get("remaining_ms") is not None:
        text += f" for {duration(service['remaining_ms'])} more"
    if service.get("backend"):
        text += f" ({service['backend']})"
    return [text]


def _link_line(link: Facts) -> str:
    name = printable(link["name"])[:12]
    last_ms = link.get("last_heard_ms")
    heard = "never heard" if last_ms is None else f"heard {ago(last_ms)}"
    counts = [
        f"{count} {key.replace('_', ' ')}"
        for key, count in link.items()
        if key in ("sent", "received") or (key in _LINK_TROUBLE and count)
    ]
    return ", ".join([f"{name}: {heard}", *counts])


def _witness_lines(facts: Facts) -> list[str]:
    witness = facts.get("witness")
    if not witness:
        return []
    names = ", ".join(map(str, witness.get("names") or [])) or "the gateway"
    if witness.get("last_answer_ms") is None:
        return [f"{names}: no answer yet (asked only when the peer falls silent)"]
    return [f"{names}: answered {ago(witness['last_answer_ms'])}"]


def _health_line(facts: Facts) -> str:
    fit, reason = facts["health"]["fit"], facts["health"]["reason"]
    if fit:
        return "own NFS service and storage are sound"
    return f"{'NOT SOUND' if fit is False else 'not known yet'}: {reason}"


def _alarms(facts: Facts, style: Style) -> list[str]:
    alarms = facts["alarms"]
    if not alarms:
        return labelled("alarms", "none")
    lines: list[str] = []
    for number, alarm in enumerate(alarms):
        wrapped = labelled("ALARMS" if number == 0 else "", f"{alarm['name']}: {alarm['text']}")
        lines += [style.paint(line, RED) for line in wrapped]
    return lines


# --------------------------------------------------------------------------- events, answers


def events(listed: Iterable[Facts]) -> str:
    """The events, oldest first, each with its time, rule, change and reason."""
    return "\n".join(event(one) for one in listed) or "no events yet"


def event(one: Facts) -> str:
    """One event: the first line says what, the second (if there is one) the numbers behind it."""
    change = f"{one['phase']} -> {one['to']}" if one["phase"] != one["to"] else str(one["phase"])
    lines = [printable(f"{one['wall']} {one['row']:<4} {change}: {one['why']}")]
    if one.get("detail"):
        lines.append(printable(f"    {one['detail']}"))
    return "\n".join(lines)

"""Says in words what the table contains, and what one node's state amounts to.

For people and programs that look on. It decides nothing: every judgement here asks the same
functions (`lease`, `guards`) as the decisions do. Plain JSON types come out, ages and remaining
times in milliseconds.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable, Mapping

from nfsha.core import effects, handover, lease
from nfsha.core.model import (
    ADDRESS_LATE_MS,
    GIVING_PHASES,
    RECEIVING_PHASES,
    Epoch,
    Exclusivity,
    Phase,
    PromiseState,
)
from nfsha.core.state import State
from nfsha.core.table import ALL, HOOK, ROWS, TURN, Row

Facts = dict[str, object]
"""A part of a situation: plain JSON types only."""

REPLICATION_OFF = "off (somebody else replicates; nfsha does not know how old the copy is)"

UNSERVED_AFTER_MS = 5000
"""Longer than any takeover of the shipped profiles: then `unserved` is an alarm."""

CLAIM_SHOWN_MS = 120_000
"""So long after the last claim on the VIP the alarm stands: two refreshes of a rightful holder."""

_WIDTH = 96

_EVENTS = {TURN: "each turn", HOOK: "the end of a hook"}


# --------------------------------------------------------------------------- the table


class UnknownRowError(LookupError):
    """No row has this id; the text names the nearest ones."""

    def __str__(self) -> str:
        return str(self.args[0])


def rows() -> list[Facts]:
    """The whole table."""
    return [_as_facts(one) for one in ROWS]


def row(row_id: str) -> Facts:
    """One row: id, phases, event, guard, effect, what it does, to (None: stays), why, refuses.

    Raises UnknownRowError. Capitals do not matter.
    """
    return _as_facts(_find(row_id))


def explain(row_id: str) -> str:
    """One row in words. Raises UnknownRowError. Capitals do not matter."""
    found = _find(row_id)
    facts = {
        "phase": _phases(found),
        "event": _EVENTS.get(found.event, f"command {found.event}"),
        "guard": str(found.guard),
        "effect": f"{found.effect.__name__}: {_first_sentence(found)}" if _acts(found) else "none",
        "to": _target(found),
        "why": found.why,
    }
    return "\n".join([found.id, *(_fill(text, f"  {name:<7} ") for name, text in facts.items())])


def table_text() -> str:
    """The table as text: by phase, then hooks and commands; under each row its reason."""
    parts: list[str] = []
    for title, members in _chapters():
        parts.append(title)
        for one in members:
            parts += [_fill(_summary(one), f"  {one.id}  "), _fill(one.why, " " * 7)]
        parts.append("")
    return "\n".join(parts).rstrip()


def _summary(found: Row) -> str:
    """A row in one line: what makes it match, where it leads, what it does, and where it holds."""
    turn = found.event == TURN
    cause = str(found.guard) if turn else f"{found.event}: {found.guard}"
    effect = f"  ({found.effect.__name__})" if _acts(found) else ""
    phases = _phases(found)
    place = "" if turn or phases == "any" else f"  [{phases}]"
    return f"{cause} -> {_target(found)}{effect}{place}"


def _fill(text: str, start: str) -> str:
    """The text in lines that begin below each other."""
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_on_hyphens=False,
    )


def mermaid() -> str:
    """The diagram of the transitions (stateDiagram-v2), labelled by the ids of their rows."""
    edges: dict[tuple[Phase, Phase], list[str]] = {}
    for one in ROWS:
        for phase in one.phases:
            if one.to is not None and one.to is not phase:
                edges.setdefault((phase, one.to), []).append(one.id)
    lines = [f"    {start} --> {end}: {' '.join(ids)}" for (start, end), ids in edges.items()]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {Phase.STARTING}", *lines])


def _find(row_id: str) -> Row:
    wanted = row_id.strip().upper()
    known = {one.id: one for one in ROWS}
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    hint = f"; the nearest are {', '.join(sorted(near))}" if near else ""
    raise UnknownRowError(f"there is no row {row_id[:20]!r}{hint}")


def _as_facts(found: Row) -> Facts:
    return {
        "id": found.id,
        "phases": [str(phase) for phase in found.phases],
        "event": str(found.event),
        "guard": str(found.guard),
        "effect": found.effect.__name__,
        "does": _first_sentence(found),
        "to": str(found.to) if found.to else None,
        "why": found.why,
        "refuses": found.refuses,
    }


def _chapters() -> Iterable[tuple[str, list[Row]]]:
    for phase in ALL:
        yield str(phase), [one for one in ROWS if one.event == TURN and phase in one.phases]
    yield "Hooks", [one for one in ROWS if one.event == HOOK]
    yield "Commands", [one for one in ROWS if one.event not in _EVENTS]


def _acts(found: Row) -> bool:
    return found.effect is not effects.nothing


def _phases(found: Row) -> str:
    missing = [phase for phase in ALL if phase not in found.phases]
    if len(missing) > len(ALL) // 2:
        return ", ".join(map(str, found.phases))
    return f"any but {', '.join(map(str, missing))}" if missing else "any"


def _target(found: Row) -> str:
    if found.refuses:
        return "refused"
    return str(found.to) if found.to else "stays"


def _first_sentence(found: Row) -> str:
    return " ".join((found.effect.__doc__ or "").split("\n\n")[0].split())


# --------------------------------------------------------------------------- one node's state


def situation(state: State, now_ms: int) -> Facts:
    """Everything that an operator or a program wants to know of one node, as plain JSON types.

    Ages and remaining times are in milliseconds; None stands for "never" or "does not apply".
    `since_ms` is how long the phase lasts. docs/state-machine.md lists the rows that `row` names.
    """
    alarms = alarms_of(state, now_ms)
    return {
        "role": str(state.me),
        "phase": str(state.phase),
        "since_ms": _age(state.phase_since_ms, now_ms),
        "row": state.row,
        "row_since_ms": _age(state.row_since_ms, now_ms),
        "why": state.why,
        "next": next_step(state, now_ms),
        "epoch": _epoch(state.epoch),
        "authority": str(state.epoch.authority) if state.epoch else None,
        "serving": state.serving,
        "evidence": _evidence(state, now_ms),
        "lease_remaining_ms": _lease_remaining_ms(state, now_ms),
        "peer": _peer(state, now_ms),
        "takeover": _takeover(state, now_ms),
        "handover": _handover(state, now_ms),
        "health": {"fit": state.fit, "reason": state.fitness_reason},
        "promise": {
            "own": str(state.promise_state),
            "peer": str(PromiseState.STANDING if state.durable.peer_promise else PromiseState.NONE),
            "peer_down": state.peer_down or None,
        },
        "maintenance": state.durable.maintenance,
        "stopping": state.stopping or None,
        "replication": _replication(state),
        "volumes": _volumes(state),
        "vip": {
            "held": state.address_held,
            "carrier": state.carrier,
            "answered_by": _answered_by(state, now_ms),
            "claimed_by": state.claimed_by if _claimed(state, now_ms) else None,
        },
        "alarms": [{"name": name, "text": text} for name, text in alarms.items()],
        "counters": dict(sorted(state.counters.items())),
    }


def _age(at_ms: int | None, now_ms: int) -> int | None:
    """How long ago; None for a moment that never was (NEVER_MS lies before every boot)."""
    return None if at_ms is None or at_ms < 0 else max(0, now_ms - at_ms)


def _epoch(epoch: Epoch | None) -> Facts | None:
    if epoch is None:
        return None
    return {"number": epoch.number, "id": epoch.id, "authority": str(epoch.authority)}


def _replication(state: State) -> Facts:
    if not state.config.replication:
        return {"mode": "off", "whole": state.whole, "text": REPLICATION_OFF}
    text = "a whole replica" if state.whole else f"not a whole replica: {state.whole_reason}"
    return {"mode": "on", "whole": state.whole, "text": text}


def _volumes(state: State) -> Facts | None:
    """What the hooks have mounted (None: not known), and which one runs; None without hooks."""
    if not state.config.has_hooks:
        return None
    running = "mount" if state.mounting else "unmount" if "volumes" in state.flights else None
    return {"mounted": state.volumes_mounted, "hook": running}


def _answered_by(state: State, now_ms: int) -> str | None:
    return state.survey.answered_by if lease.survey_fresh(state, now_ms) else None


# --------------------------------------------------------------------------- evidence


def _evidence(state: State, now_ms: int) -> list[Facts]:
    """Each kind of evidence that this node can have; `counts` marks the one that it stands on."""
    standing = lease.standing_evidence(state)
    dated = {"echo": state.echo_ms}
    if state.config.has_token:
        dated["token"] = _token_ms(state, now_ms)
    if state.config.exclusivity is Exclusivity.WITNESS:
        dated["witness"] = state.witness_ms
    hold_ms = state.config.timings.hold_ms
    fresh = {kind: at_ms for kind, at_ms in dated.items() if now_ms - at_ms < hold_ms}
    # A witness keeps a node in service, but never brings it there (DESIGN 4, evidence 4).
    able = [kind for kind in fresh if state.serving or kind != "witness"]
    best = standing or max(able, key=lambda kind: fresh[kind], default="")
    found: list[Facts] = [
        {
            "kind": kind,
            "age_ms": _age(at_ms, now_ms),
            "fresh": kind in fresh,
            "counts": kind == best,
        }
        for kind, at_ms in dated.items()
    ]
    if standing:
        found.append({"kind": standing, "age_ms": None, "fresh": True, "counts": True})
    return found


def _token_ms(state: State, now_ms: int) -> int:
    """The date of the token's evidence: by another rule for a node that does not serve yet."""
    if state.serving and state.token_since_ms is not None:
        return state.token_acked_ms
    return lease.token_return_ms(state, now_ms) - state.config.timings.hold_ms


def _lease_remaining_ms(state: State, now_ms: int) -> int | None:
    if not state.serving or state.phase is Phase.STARTING:
        return None
    return max(0, lease.serve_deadline_ms(state, now_ms) - now_ms)


# --------------------------------------------------------------------------- the peer


def _peer(state: State, now_ms: int) -> Facts:
    report = state.report
    facts: Facts = {
        "role": str(state.me.other),
        "heard": lease.peer_heard(state, now_ms),
        "age_ms": _age(state.heard_ms, now_ms),
        "session_known": state.peer_session != 0,
        "phase": None,
        "serving": None,
        "epoch": None,
        "healthy": None,
        "whole": None,
        "promise": None,
        "takeover_after_ms": None,
        "timings_suffice": None,
    }
    if report is not None:
        facts |= {
            "phase": str(report.phase),
            "serving": report.serving,
            "epoch": _epoch(report.epoch),
            "healthy": report.healthy,
            "whole": report.whole,
            "promise": str(report.promise),
            "takeover_after_ms": report.takeover_after_ms,
            "timings_suffice": lease.timings_suffice(state, report),
        }
    return facts


# --------------------------------------------------------------------------- takeover


def _takeover(state: State, now_ms: int) -> Facts | None:
    """The five conditions of DESIGN 4, for a node that could take over; None for any other."""
    if state.phase not in (Phase.PASSIVE, Phase.PREPARED, Phase.TAKEOVER):
        return None
    told = (
        ("the peer is silent", *_silence(state, now_ms)),
        ("a whole replica", *_wholeness(state)),
        ("own service sound", state.fit is True, state.fitness_reason or "sound"),
        ("nobody answers for the VIP", *_vip_free(state, now_ms)),
        ("the peer cannot serve", *_exclusivity(state, now_ms)),
    )
    return {
        "conditions": [
            {"number": number, "name": name, "ok": ok, "reason": reason}
            for number, (name, ok, reason) in enumerate(told, start=1)
        ],
        "obstacle": lease.takeover_obstacle(state) or None,
        "promised": state.durable.promise or state.want.promise,
    }


def _silence(state: State, now_ms: int) -> tuple[bool, str]:
    heard = f"heard {now_ms - state.heard_ms} ms ago"
    if state.prepared is not None and handover.receiver_works(state, now_ms):
        return False, f"the peer works on the handover ({heard})"
    if lease.peer_serves(state, now_ms):
        return False, f"the peer serves ({heard})"
    if lease.grants_ended(state, now_ms):
        return True, "everything that this node granted the peer has run out"
    if lease.peer_heard(state, now_ms):
        return False, f"the peer does not serve, but is there ({heard})"
    silent_ms = now_ms - lease.silence_since_ms(state)
    return False, f"silent for {silent_ms} of {lease.takeover_wait_ms(state)} ms"


def _wholeness(state: State) -> tuple[bool, str]:
    if not state.config.replication:
        return state.whole, "taken as given: replication is off"
    return state.whole, state.whole_reason or "whole"


def _vip_free(state: State, now_ms: int) -> tuple[bool, str]:
    if not lease.survey_fresh(state, now_ms):
        return False, "not asked now: only when the peer falls silent"
    if state.survey.answered_by is not None:
        return False, f"{state.survey.answered_by} answers for it"
    if lease.vip_unanswered(state, now_ms):
        return True, "three questions, no answer"
    return False, "no answer, but this interface hears nobody else either"


def _exclusivity(state: State, now_ms: int) -> tuple[bool, str]:
    ok = lease.exclusive(state, now_ms)
    if state.by_operator or state.peer_down:
        return (
            ok,
            "a fence agent proved it" if state.peer_down == "fence" else "the operator's word",
        )
    if state.config.exclusivity is not Exclusivity.WITNESS:
        return ok, "the token is held" if ok else "asked for only in the takeover itself"
    if ok:
        return ok, f"the witness answered {now_ms - state.witness_ms} ms ago"
    return ok, "the witness has not answered lately (asked only when the peer falls silent)"


# --------------------------------------------------------------------------- handover

_STEPS: Mapping[Phase, str] = {
    Phase.PRESYNC: "comes near to the other node's data, which still serves",
    Phase.FREEZING: "clients are held; waits until nothing writes any more",
    Phase.PREPARED: "gave its authority away; waits for the other node's word",
    Phase.FINAL_SYNC: "last pass and proof; clients are held",
    Phase.RESTORING: "both copies are proved equal; the new epoch goes to the disk",
    Phase.TAKEOVER: "the receiver is gone: takes over with an epoch above the one given away",
}
"""What a node does in each step of a handover."""

_ASKED = "the other node is asked to begin"
_NEAR = "near enough: the other node is asked to hold its clients"
_WATCHED = "the other node comes near to this one's data, and this one serves on"


def _handover(state: State, now_ms: int) -> Facts:
    """The planned move of the authority, and how the last one of this run ended.

    `side` is this node's: "receiver", "giver", or None when none is under way. `step` is a phase or
    "ASKED". `held_ms`: how long clients are held by now, as far as this node knows.
    """
    side, step, epoch, text = _handover_now(state, now_ms)
    ended = state.last_handover
    return {
        "side": side,
        "step": step,
        "to": str(state.me if side == "receiver" else state.me.other) if side else None,
        "epoch": epoch.number if epoch is not None else None,
        "text": text,
        "since_ms": _handover_since(state, now_ms) if side else None,
        "held_ms": _held_ms(state, now_ms),
        "last": None
        if ended is None
        else {
            "epoch": ended.epoch.number,
            "to": str(ended.epoch.authority),
            "done": ended.done,
            "why": ended.why,
            "age_ms": _age(ended.at_ms, now_ms),
        },
    }


def _handover_now(
    state: State, now_ms: int
) -> tuple[str | None, str | None, Epoch | None, str | None]:
    phase = state.phase
    if phase in RECEIVING_PHASES:
        near = phase is Phase.PRESYNC and state.presync_ready
        return "receiver", str(phase), state.handover, _NEAR if near else _STEPS[phase]
    if phase in GIVING_PHASES or (phase is Phase.TAKEOVER and state.prepared is not None):
        return "giver", str(phase), state.handover or state.prepared, _STEPS[phase]
    report = state.report if lease.peer_heard(state, now_ms) else None
    if state.serving and report is not None and report.phase is Phase.PRESYNC:
        return "giver", str(report.phase), report.handover, _WATCHED
    if state.asks:
        return "giver", "ASKED", None, _ASKED
    return None, None, None, None


def _handover_since(state: State, now_ms: int) -> int | None:
    """How long this step lasts; a giver that still serves does not know when PRESYNC began."""
    if state.phase is not Phase.ACTIVE:
        return _age(state.phase_since_ms, now_ms)
    return _age(state.asked_ms, now_ms) if state.asks else None


def _held_ms(state: State, now_ms: int) -> int | None:
    if state.phase in (Phase.FINAL_SYNC, Phase.RESTORING):
        return _age(state.final_since_ms, now_ms)
    gives = state.phase in GIVING_PHASES or state.prepared is not None
    return _age(state.froze_ms, now_ms) if gives else None


# --------------------------------------------------------------------------- alarms


def alarms_of(state: State, now_ms: int) -> dict[str, str]:
    """What is not as it should be: names, each with a sentence. Names are stable."""
    told = {
        "diverged": _diverged(state),
        "vip-held": _vip_held(state, now_ms),
        "vip-claimed": _vip_claimed(state, now_ms),
        "unfit": state.fitness_reason if state.fit is False else "",
        "timings-short": _timings_short(state, now_ms),
        "persist-failed": state.persist_error and f"the journal: {state.persist_error}",
        "journal-corrupt": _journal_corrupt(state),
        "witness-silent": _witness_silent(state, now_ms),
        "unserved": _unserved(state, now_ms),
        "peer-silent": _peer_silent(state, now_ms),
        "peer-unable": _peer_unable(state, now_ms),
        "mount-failed": _mount_failed(state, now_ms),
        "unmount-failed": state.unmount_trouble,
    }
    return {name: text for name, text in told.items() if text}


def _diverged(state: State) -> str:
    theirs = lease.conflicting_epoch(state)
    if theirs is not None:
        return f"two histories: here epoch {state.epoch}, at the peer epoch {theirs}"
    if state.phase is Phase.DIVERGED:
        return "two histories: both nodes have served since they last agreed"
    return ""


def _vip_held(state: State, now_ms: int) -> str:
    """Who answers for longer than a dead daemon's address can live renews it: it is alive."""
    since_ms = state.vip_answered_since_ms
    mac = _answered_by(state, now_ms)
    if mac is None or since_ms is None:
        return ""
    timings = state.config.timings
    lease_ms, absence_ms = timings.address_lease_ms, 0
    if state.report is not None:
        lease_ms, absence_ms = state.report.address_lease_ms, state.report.absence_ms
    if not lease.peer_heard(state, now_ms):
        since_ms = lease.silence_since_ms(state)
    if now_ms - since_ms <= lease_ms + absence_ms + ADDRESS_LATE_MS + timings.margin_ms:
        return ""
    return f"{mac} answers for the VIP for longer than a dead daemon's address can live"


def _claimed(state: State, now_ms: int) -> bool:
    """Lately: who goes on claiming is heard again, and who stopped is no trouble any more."""
    return now_ms - state.claimed_ms < CLAIM_SHOWN_MS


def _vip_claimed(state: State, now_ms: int) -> str:
    if not state.serving or not _claimed(state, now_ms):
        return ""
    ago_s = (now_ms - state.claimed_ms) // 1000
    return f"another machine ({state.claimed_by}) announced the VIP as its own {ago_s} s ago"


def _timings_short(state: State, now_ms: int) -> str:
    report = state.report
    if report is None or not lease.peer_heard(state, now_ms):
        return ""
    if lease.timings_suffice(state, report):
        return ""
    needed_ms = state.config.timings.required_takeover_after_ms(
        service_lease=state.config.service_lease
    )
    return (
        f"the peer's takeover_after is {report.takeover_after_ms} ms, but this node needs "
        f"{needed_ms} ms to serve by its echo: give both nodes the same timings"
    )


def _journal_corrupt(state: State) -> str:
    if not state.journal_corrupt:
        return ""
    if state.durable.epoch is None:
        return f"the journal cannot be used: {state.journal_corrupt}"
    return (
        f"the journal could not be used at the start, a new one is written: {state.journal_corrupt}"
    )


def _witness_silent(state: State, now_ms: int) -> str:
    """Asked for at least `hold` (it is asked when the peer falls silent), and no answer."""
    timings = state.config.timings
    asked_ms = now_ms - state.witness_asked_ms
    missed_ms = state.echo_ms if state.serving else state.heard_ms
    asking = asked_ms <= 3 * timings.interval_ms
    long = now_ms - missed_ms > timings.hold_ms + 3 * timings.interval_ms
    if not (asking and long) or now_ms - state.witness_ms < timings.hold_ms:
        return ""
    return "no reachability witness answers: this node may be the one that is cut off"


def _unserved(state: State, now_ms: int) -> str:
    """Clients wait: neither this node serves, nor is the other one known to, for some seconds."""
    if state.serving or lease.peer_serves(state, now_ms) or _answered_by(state, now_ms):
        return ""
    if state.phase in RECEIVING_PHASES:
        return ""  # the giver serves, or clients are held on purpose, and not for long
    served = state.report is not None and state.report.serving
    since_ms = max(state.phase_since_ms, state.heard_ms) if served else state.phase_since_ms
    if now_ms - since_ms < UNSERVED_AFTER_MS:
        return ""
    return "no node is known to serve the VIP: clients wait"


def _peer_silent(state: State, now_ms: int) -> str:
    if not state.serving or lease.peer_heard(state, now_ms):
        return ""
    if lease.standing_evidence(state) == "promise":
        return ""
    return "the other node is not heard: nobody could take over from this one"


def _peer_unable(state: State, now_ms: int) -> str:
    report = state.report
    if report is None or not state.serving or not lease.peer_heard(state, now_ms):
        return ""
    able = RECEIVING_PHASES | {Phase.PASSIVE, Phase.MAINTENANCE}
    if report.phase in able and report.healthy:
        return ""
    condition = "" if report.healthy else ", its NFS service or storage not sound"
    return f"the other node could not take over now: it is {report.phase}{condition}"


def _mount_failed(state: State, now_ms: int) -> str:
    """Once the other node serves it is no trouble any more: that one had not given them up yet."""
    return "" if lease.peer_serves(state, now_ms) else state.mount_trouble


# --------------------------------------------------------------------------- what to do next

_NOTHING = "nothing"

_SECONDS = "nothing for now: decides within seconds"
_IF_FROZEN = (
    "nothing for now; if it stays, the volumes do not thaw: see the alarms and `nfsha events`"
)
_IF_DISK = "nothing for now; if it stays, mend the disk that holds the journal (see the alarms)"
_WATCH = "nothing for now: watch it with `nfsha status`, or end it with `nfsha abort`"

_NEXT_BY_ROW: Mapping[str, str] = {
    "S90": "nothing for now: it goes on as soon as the peer is heard, or the lease ends",
    "W90": "start the other node or its nfsha, or mend the links; if it is gone for good, and "
    "this data is good enough: `nfsha activate` here",
    "W86": _IF_FROZEN,
    "W91": "look at `nfsha status` on the other node: it is heard, but grants nothing",
    "W93": "find the machine that answers for the VIP, and take the address away there",
    "W97": "on the node whose data is the truth: `nfsha activate`",
    "P91": "nothing for now: this node takes over if the other one does not return within seconds",
    "P92": _SECONDS,
    "P94": "nothing for now: the address of a dead daemon ends by itself within seconds",
    "P95": _SECONDS,
    "T90": "nothing for now; if the other node is known to be off: `nfsha confirm-peer-down`",
    "R91": "nothing for now if a resync runs: `nfsha volumes` shows it, or what holds it up",
    "R92": "on the node whose data is the truth: `nfsha activate`",
    "R93": "start the other node or its nfsha, or mend the links",
    "I90": "mend the links between the nodes; if the other one is off for certain: "
    "`nfsha confirm-peer-down`",
    "I91": _IF_FROZEN,
    "I95": _IF_DISK,
    "I93": "find the machine that answers for the VIP, and take the address away there",
    "M90": "when the work is done: `nfsha maintenance off`",
    "M91": "when the work is done: `nfsha maintenance off`",
    "G90": _WATCH,
    "Q90": _WATCH,
    "Q91": _IF_DISK,
    "Q92": "nothing for now: this node takes over within seconds, or the receiver is heard again",
    "Q94": "nothing for now: the address of a dead daemon ends by itself within seconds",
    "Q95": "nothing for now if it decides within seconds; else this node hears nobody: mend its "
    "links",
    "Q96": "nothing for now: this node takes over within seconds; then look at the alarms of the "
    "other node (the disk of its journal?)",
    "Y90": _WATCH,
    "Y91": "nothing for now: it goes on, or gives up by itself after some seconds",
    "Z90": _WATCH,
    "X90": "nothing for now; if it stays, a receiving process waits for its disk: see the alarms",
    "X91": "nothing for now; if it stays, mend the links: this node does not hear its own words "
    "come back from the giver",
    "X92": _IF_DISK,
    "X93": _SECONDS,
    "X94": "nothing for now; if it stays, the mount hook fails: see the alarms",
}
"""What an operator does about a row; rows that need nothing are missing."""

_NEXT_PEER_DEAF = (
    "the other node is heard, but seems not to hear this one: mend the links; or stop nfsha there: "
    "then this node serves by its promise"
)

_HOOK_FAILED = "mend what the hook says (alarms, `nfsha events`); it is run again by itself"

_NEXT_BY_ALARM: Mapping[str, str] = {
    "timings-short": "give both nodes the same [timing], and restart nfsha",
    "mount-failed": _HOOK_FAILED,
    "unmount-failed": _HOOK_FAILED,
}
"""What an operator does about an alarm, whatever the row."""

_NEXT_BY_OBSTACLE: Mapping[str, str] = {
    "promised": "start the other node; if it is off for certain: `nfsha activate --force` here",
    "not-whole": "start the other node; if it is gone for good, and this data is good enough: "
    "`nfsha activate --force` here",
    "unknown-to-peer": "start the other node; if it is off for certain: `nfsha activate` here",
    "unfit": "nothing for now: waits for the first answer of the own NFS service",
    "out-of-touch": "start the other node: it may have taken over while this one was cut off; "
    "if it is gone for good, and this data is good enough: `nfsha activate` here",
}


def _next_without_peer(state: State) -> str:
    if lease.standing_evidence(state):
        return "start the other node or its nfsha, or mend the links"
    return (
        "start the other node or mend the links; if it stays off, say so: `nfsha confirm-peer-down`"
    )


def next_step(state: State, now_ms: int) -> str:
    """What to do next, in words; "nothing" when all is as it should be."""
    if state.stopping:
        return "nothing: the daemon is stopping"
    if state.phase is Phase.DIVERGED:
        return (
            f"on the node to be kept: `nfsha resolve --keep {state.me}` (here) or `--keep "
            f"{state.me.other}` (there)"
        )
    if state.fit is False:
        return f"mend the own service or storage: {state.fitness_reason}"
    alarms = alarms_of(state, now_ms)
    if "vip-held" in alarms:
        return (
            "look at the machine that answers for the VIP: its nfsha is alive but not heard "
            "here, or it is no nfsha at all"
        )
    for name, step in _NEXT_BY_ALARM.items():
        if name in alarms:
            return step
    if state.row in ("P93", "Q93"):
        return _NEXT_BY_OBSTACLE.get(lease.takeover_obstacle(state), _NOTHING)
    if state.row in _NEXT_BY_ROW:
        deaf = state.row == "I90" and lease.peer_heard(state, now_ms)
        return _NEXT_PEER_DEAF if deaf else _NEXT_BY_ROW[state.row]
    if "peer-silent" in alarms:
        return _next_without_peer(state)
    if "peer-unable" in alarms:
        return "look at `nfsha status` on the other node"
    return _NOTHING

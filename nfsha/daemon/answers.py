"""Serves the control socket: what operators ask, and what they are told.

Every answer is plain JSON. Commands that change something go through the engine, as any other
input; who gave them is logged from the kernel's word (SO_PEERCRED).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Any

from nfsha import __version__
from nfsha.config import warnings
from nfsha.core.describe import situation
from nfsha.core.model import CommandKind, Role
from nfsha.daemon import copy_answers
from nfsha.daemon.copy_answers import CopyAnswers
from nfsha.daemon.handover_answers import HandoverAnswers
from nfsha.daemon.handover_plan import Plans
from nfsha.daemon.shell import Shell
from nfsha.host.control import CommandError, ControlServer, Credentials
from nfsha.host.scheduling import Scheduling

log = logging.getLogger(__name__)

SOCKET_NAME = "nfsha.sock"
MAX_EVENTS = 1000
CONTROL_TIMEOUT_S = 10.0
APPROVED_AT_ONCE_MS = 2000
"""A plan that is approved so soon (`--yes`) rests on the look that was made for it."""

Facts = dict[str, Any]


class Answers:
    """The control socket of one daemon."""

    def __init__(self, shell: Shell, scheduling: Scheduling) -> None:
        self._shell = shell
        self._scheduling = scheduling
        settings = shell.world.settings
        sync = settings.sync
        self._copies = CopyAnswers(
            shell.world.replication.replicator,
            (sync.quarantine_max_age_ms, sync.quarantine_max_bytes),
        )
        self._plans = Plans(shell, HandoverAnswers(shell))
        shell.world.replication.listeners += [self._plans.heard, shell.moves.heard]
        self._started_ms = shell.world.clock_ms()
        self._server = ControlServer(
            settings.paths.runtime / SOCKET_NAME,
            self._answer,
            streams={
                "follow": self._follow,
                "sync-wait": self._copies.wait,
                "handover-numbers": self._numbers,
            },
            group=settings.control_group,
            answer_timeout_s=CONTROL_TIMEOUT_S,
        )

    async def start(self) -> None:
        """Begins to listen. Raises ControlError when another daemon lives here."""
        await self._server.start()
        log.info("the control socket is open for %s", self._server.access)

    async def close(self) -> None:
        """Ends all conversations."""
        self._plans.close()
        await self._server.close()

    async def _answer(self, command: str, args: Facts, who: Credentials) -> Facts:
        match command:
            case "status":
                return {"status": self._status()}
            case "clients":
                world = self._shell.world
                return {"clients": await world.clients.facts() | {"locks": world.locks.facts()}}
            case "events":
                return {"events": self._events(args)}
            case "activate":
                return await self._obey(who, CommandKind.ACTIVATE, force=_flag(args, "force"))
            case "maintenance":
                on = _flag(args, "on")
                kind = CommandKind.MAINTENANCE_ON if on else CommandKind.MAINTENANCE_OFF
                return await self._obey(who, kind)
            case "confirm-peer-down" | "resolve":
                keep = _role(args, "keep") if command == "resolve" else None
                return await self._obey(who, CommandKind(command), keep=keep)
            case "handover-plan" | "handover" | "abort" | "reports" | "report":
                return await self._move(command, args, who)
            case _ if command in copy_answers.COMMANDS:
                if command != "volumes":
                    log.info("%s asks for %s %s", who, command, args)
                return await self._copies.answer(command, args)
            case _:
                raise CommandError(f"the daemon knows no command {command[:40]!r}")

    async def _move(self, command: str, args: Facts, who: Credentials) -> Facts:
        moves = self._shell.moves
        if command == "abort":
            node = self._shell.world.settings.name
            await moves.ending(f"an operator (uid {who.uid}) aborted it on {node}")
            answer = await self._obey(who, CommandKind.ABORT)
            if not answer["ok"]:
                moves.goes_on()
            return answer
        if command in ("reports", "report"):
            await moves.known()
            if command == "reports":
                return {"reports": moves.reports()}
            return {"report": moves.report(_text(args, "id"))}
        to = _role(args, "to")
        if command == "handover-plan":
            await self._plans.look()
            return self._plans.plan(to)
        await self._plans.look(young_ms=APPROVED_AT_ONCE_MS)
        self._plans.require(to, _text(args, "plan"))
        return await self._obey(who, CommandKind.HANDOVER, to=to)

    async def _obey(self, who: Credentials, kind: CommandKind, **options: object) -> Facts:
        if self._shell.engine is None:
            raise CommandError("the daemon is still starting: repeat in a moment")
        reply = await self._shell.command(kind, **options)
        word = "accepted" if reply.accepted else "refused"
        log.warning("%s asked for %s: %s, %s (%s)", who, kind, word, reply.why, reply.row)
        return {"ok": reply.accepted, "row": reply.row, "why": reply.why}

    def _events(self, args: Facts) -> list[Facts]:
        count = args.get("n", 50)
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MAX_EVENTS:
            raise CommandError(f"n is {count!r}: a number from 0 to {MAX_EVENTS} is expected")
        return [asdict(event) for event in self._shell.world.events.tail(count)]

    async def _follow(
        self, _command: str, args: Facts, _who: Credentials
    ) -> AsyncGenerator[Facts, None]:
        self._events(args)  # refuses a bad count before anything is sent
        try:
            async for event in self._shell.world.events.follow(int(args.get("n", 0))):
                yield asdict(event)
        except ValueError as error:
            raise CommandError(str(error)) from error

    async def _numbers(
        self, command: str, args: Facts, who: Credentials
    ) -> AsyncGenerator[Facts, None]:
        _role(args, "to")  # refuses before anything is looked at
        async for one in self._plans.numbers(command, args, who):
            yield one

    def _status(self) -> Facts:
        engine = self._shell.engine
        if engine is None:
            raise CommandError("the daemon is still starting: repeat in a moment")
        world = self._shell.world
        settings = world.settings
        now_ms = world.clock_ms()
        health = world.last_health
        facts = situation(engine.state, now_ms)
        move = facts["handover"]
        if isinstance(move, dict):
            moves = self._shell.moves
            move["progress"] = moves.progress(move["side"])
            last = move["last"]
            if last is not None and not last["done"] and moves.last_why:
                last["why"] = moves.last_why  # the core may only know that it was ended
        return {
            **facts,
            "alarms": [*_listed(facts["alarms"]), *self._copies.alarms()],
            "node": settings.name,
            "version": __version__,
            "vips": [str(vip) for vip in settings.vips],
            "interface": settings.interface,
            "links": self._links(now_ms),
            "witness": self._witness(now_ms),
            "service_lease": {
                "backend": settings.firewall.backend,
                "has_lease": settings.firewall.service_lease,
                "open": engine.state.service_open,
            },
            "warnings": list(health.warnings) if health is not None else [],
            "scheduling": "; ".join(self._scheduling.words),
            "risks": list(warnings(settings)),
            "copies": self._copies.brief(),
            "uptime_ms": now_ms - self._started_ms,
        }

    def _links(self, now_ms: int) -> list[Facts]:
        counters = self._shell.world.links.counters()
        found = []
        for link in self._shell.world.settings.links:
            facts = asdict(counters[link.name])
            heard_ms = facts["last_heard_ms"]
            facts["last_heard_ms"] = None if heard_ms is None else now_ms - heard_ms
            found.append({"name": link.name, "peer": str(link.peer), **facts})
        return found

    def _witness(self, now_ms: int) -> Facts:
        engine = self._shell.engine
        counters = self._shell.world.witness.counters()
        answered_ms = engine.state.witness_ms if engine is not None else -1
        return {
            "names": list(counters),
            "asked": {name: asdict(one) for name, one in counters.items()},
            "last_answer_ms": now_ms - answered_ms if answered_ms >= 0 else None,
        }


def _listed(alarms: object) -> list[Facts]:
    return alarms if isinstance(alarms, list) else []


def _flag(args: Facts, key: str) -> bool:
    value = args.get(key, False)
    if not isinstance(value, bool):
        raise CommandError(f"{key} is {value!r}: true or false is expected")
    return value


def _text(args: Facts, key: str) -> str:
    value = args.get(key)
    if not isinstance(value, str) or not value:
        raise CommandError(f"{key} is {value!r:.40}: a text is expected")
    return value


def _role(args: Facts, key: str) -> Role:
    value = args.get(key)
    if value not in set(Role):
        raise CommandError(f"{key} is {value!r}: primary or standby is expected")
    return Role(str(value))

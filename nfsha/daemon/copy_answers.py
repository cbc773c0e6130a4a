"""The control commands about the copies: volumes, passes, pairs, the quarantine.

Each answer is plain JSON; what the operator asked and cannot have is a CommandError with a reason.
Long lists go in parts, each of which the socket can carry: who asks goes on where a part ended.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from nfsha.host.control import CommandError, Credentials
from nfsha.replica.files.beneath import from_shown, shown
from nfsha.replica.quarantine.quarantine import (
    Listing,
    Quarantine,
    QuarantineError,
    Usage,
    over_limits,
)
from nfsha.replica.replicator import ReplicaError, Replicator
from nfsha.replica.volume.volumes import VolumeError

Facts = dict[str, Any]
_T = TypeVar("_T")

SHOW_EVERY_S = 0.5

PART_BYTES = 256 << 10
"""Of one list in one answer, or one element if it is larger; the socket carries 1 MiB at once."""

STATUS_VOLUMES = 20
STATUS_ALARMS = 100
"""So many volumes and alarms of the copies are in a node's status; `volumes` has them all."""

PART_ENTRIES = 500
"""Quarantine entries in one answer: each is a file to be read."""

_SAID = 5

COMMANDS = frozenset(
    {
        "volumes",
        "sync",
        "sync-pause",
        "sync-bandwidth",
        "volumes-pair",
        "volumes-forget",
        "quarantine",
    }
)


class CopyAnswers:
    """Answers for one daemon; `replicator` is None where replication is off."""

    def __init__(
        self, replicator: Replicator | None, limits: tuple[int | None, int | None]
    ) -> None:
        """`limits`: of a quarantine, by age in milliseconds and by bytes."""
        self._replicator = replicator
        self._limits = limits

    def _there(self) -> Replicator:
        if self._replicator is None:
            raise CommandError('replication is "off" in the configuration: nfsha copies nothing')
        return self._replicator

    def brief(self) -> Facts | None:
        """For `nfsha status`: `volumes` of those in trouble first, and their `total` number.

        None where replication is off.
        """
        if self._replicator is None:
            return None
        facts = self._replicator.overview.facts()
        first = sorted(facts["volumes"], key=_is_calm)[:STATUS_VOLUMES]
        return {**facts, "volumes": _part(first), "total": len(facts["volumes"])}

    def alarms(self) -> list[Facts]:
        """What is not as it should be with the copies."""
        if self._replicator is None:
            return []
        alarms = [
            {"name": name, "text": text}
            for name, text in self._replicator.overview.alarms().items()
        ]
        found = _part(alarms[:STATUS_ALARMS])
        more = len(alarms) - len(found)
        if more:
            text = f"{more} more alarms of the copies: see `nfsha volumes`"
            found.append({"name": "more", "text": text})
        return found

    async def answer(self, command: str, args: Facts) -> Facts:
        """One command of `COMMANDS`."""
        try:
            return await self._answer(command, args)
        except ReplicaError as error:
            raise CommandError(str(error), {"refused": True}) from error
        except (QuarantineError, VolumeError, OSError) as error:
            raise CommandError(str(error)) from error

    async def _answer(self, command: str, args: Facts) -> Facts:
        if self._replicator is None and command == "volumes":
            return {"volumes": [], "replication": {"mode": "off", "why": "by the configuration"}}
        there = self._there()
        match command:
            case "volumes":
                await there.seen()
                facts = there.overview.facts()
                part = _part(facts["volumes"], _number(args, "start"))
                return {**facts, "volumes": part, "total": len(facts["volumes"])}
            case "sync":
                chosen, _ = await self._begin(args, wait=False)
                begun = there.results(chosen)
                return {"ok": True, "why": "", "volumes": _part(begun), "total": len(begun)}
            case "sync-pause":
                there.pause(on=_flag(args, "on"))
                return {"ok": True, "why": "paused" if args["on"] else "goes on"}
            case "sync-bandwidth":
                return await self._bandwidth(args)
            case "volumes-pair":
                return {"ok": True, "why": await there.pair(_text(args, "volume"))}
            case "volumes-forget":
                return {"ok": True, "why": await there.forget(_text(args, "volume"))}
            case _:
                return await self._quarantine(args)

    async def _begin(
        self, args: Facts, *, wait: bool
    ) -> tuple[list[str], list[asyncio.Task[bool]]]:
        there = self._there()
        volume = _maybe_text(args, "volume")
        passes = await there.sync(
            volume,
            full=_flag(args, "full"),
            verify=_flag(args, "verify"),
            accept_deletes=_maybe_text(args, "accept_deletes"),
            wait=wait,
        )
        return there.chosen(volume), passes

    async def wait(
        self, _command: str, args: Facts, _who: Credentials
    ) -> AsyncGenerator[Facts, None]:
        """`sync-wait`: how the passes go, until all have ended.

        Each answer has the volumes of which there is news, as many as it carries; the last ones
        have all of them once more, and then one says that it is `done`.
        """
        try:
            chosen, passes = await self._begin(args, wait=True)
        except ReplicaError as error:
            raise CommandError(str(error), {"refused": True}) from error
        told: dict[str, Facts] = {}
        ends = [
            asyncio.ensure_future(self._end_of(uuid, one))
            for uuid, one in zip(chosen, passes, strict=True)
        ]
        try:
            pending = set(ends)
            while pending:
                _, pending = await asyncio.wait(pending, timeout=SHOW_EVERY_S)
                for part in _parts(self._news(chosen, told if pending else {})):
                    yield {"volumes": part}
        finally:
            for end in ends:
                end.cancel()
        bad = [one for end in ends for one in end.result() if one["state"] != "idle"]
        refused = bool(bad) and all(one["state"] in ("refused", "held") for one in bad)
        yield {"done": True, "ok": not bad, "refused": refused, "why": _some(bad)}

    async def _end_of(self, uuid: str, one_pass: asyncio.Task[bool]) -> list[Facts]:
        """How the copy stands after this pass: by the time that the others end, more may run.

        If the next one has begun at once, its end tells.
        """
        await asyncio.wait([one_pass])
        while True:
            found = self._there().results([uuid])
            if all(one["state"] != "running" for one in found):
                return found
            await asyncio.sleep(SHOW_EVERY_S)

    def _news(self, chosen: list[str], told: dict[str, Facts]) -> list[Facts]:
        """The volumes with which something else happens than was told."""
        wanted = frozenset(chosen)
        found = []
        for one in self._there().overview.facts()["volumes"]:
            if one["uuid"] in wanted:
                now = {key: one["sync"][key] for key in ("state", "why", "progress", "plan")}
                if told.get(one["uuid"]) != now:
                    told[one["uuid"]] = now
                    found.append(one)
        return found

    async def _bandwidth(self, args: Facts) -> Facts:
        kib_s = args.get("kib_s")
        if kib_s == "default":
            await self._there().set_bandwidth(None, default=True)
            return {"ok": True, "why": "as configured"}
        if kib_s is not None and (
            not isinstance(kib_s, int) or isinstance(kib_s, bool) or kib_s < 1
        ):
            raise CommandError(f"kib_s is {kib_s!r}: a number from 1, null or default is expected")
        await self._there().set_bandwidth(kib_s, default=False)
        return {"ok": True, "why": "unlimited" if kib_s is None else f"{kib_s} KiB/s"}

    # ------------------------------------------------------------- quarantine

    async def _quarantine(self, args: Facts) -> Facts:
        await self._there().seen()
        volume = _maybe_text(args, "volume")
        match args.get("action"):
            case "list":
                return await self._list(volume, args)
            case "show":
                return await self._show(volume, args)
            case "restore":
                return await self._restore(volume, args)
            case "drop":
                entry, confirm = _text(args, "entry"), _text(args, "confirm")
                where = await self._volume_of(volume, entry)
                await self._there().quarantines.ask(
                    where, lambda one: one.drop(entry, confirm=confirm)
                )
                return {"ok": True, "why": f"{entry} is deleted"}
            case other:
                raise CommandError(f"the quarantine knows no action {str(other)[:40]!r}")

    def _with_quarantine(self, volume: str | None) -> list[str]:
        """The volumes that are meant: the named one, or all that have an identity."""
        inventory = self._there().inventory
        if volume is None:
            return sorted(one.name for one in inventory.here if one.identity is not None)
        one = inventory.by_name(volume)
        return [one.name if one is not None else volume]

    async def _list(self, volume: str | None, args: Facts) -> Facts:
        """The entries by volume and name, so many as one answer carries, and where to go on."""
        begin, after = _after(args)
        entries: list[Facts] = []
        usage: list[Facts] = []
        go_on: list[str] | None = None
        for name in self._with_quarantine(volume):
            if name < begin:
                continue
            if len(entries) >= PART_ENTRIES:
                go_on = [name, ""]
                break
            behind = after if name == begin else ""
            try:
                part = await self._list_one(name, behind, PART_ENTRIES - len(entries))
            except (ReplicaError, QuarantineError, VolumeError, OSError) as error:
                if volume is not None:
                    raise
                usage.append(_unread(name, str(error)))  # one bad disk hides no other volume
                continue
            usage += part["usage"]
            entries += part["entries"]
            if part["more"] and part["entries"]:
                go_on = [name, entries[-1]["name"]]
                break
        carried = _part(entries)
        if len(carried) < len(entries):
            go_on = [carried[-1]["volume"], carried[-1]["name"]]
        return {"entries": carried, "usage": usage, "next": go_on}

    async def _list_one(self, volume: str, after: str, limit: int) -> Facts:
        """Entries of one volume; before the first of them what all of them take."""
        age_ms, size = self._limits

        def call(one: Quarantine) -> tuple[Listing, Usage | None]:
            return one.list(after=after, limit=limit), None if after else one.usage()

        listing, usage = await self._there().quarantines.ask(volume, call)
        entries = [
            {"volume": volume, **asdict(entry), "epoch": entry.epoch and entry.epoch.number}
            for entry in listing.entries
        ]
        used = []
        if usage is not None:
            over = over_limits(usage, time.time_ns(), age_ms, size)
            used = [
                {"volume": volume, "entries": usage.entries, "bytes": usage.bytes, "over": over}
            ]
        return {"entries": entries, "usage": used, "more": listing.more}

    async def _volume_of(self, volume: str | None, entry: str) -> str:
        names = []
        for name in self._with_quarantine(volume):
            try:
                if await self._there().quarantines.ask(name, lambda one: one.holds(entry)):
                    names.append(name)
            except (QuarantineError, VolumeError, OSError):
                if volume is not None:
                    raise
                continue  # one bad disk hides no other volume
        if len(names) != 1:
            raise CommandError(f"there is no entry {entry[:80]!r}: see `nfsha quarantine list`")
        return names[0]

    async def _show(self, volume: str | None, args: Facts) -> Facts:
        entry = _text(args, "entry")
        after = _maybe_text(args, "after")
        where = await self._volume_of(volume, entry)
        limit = args.get("limit", 1000)
        if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= 1000:
            raise CommandError(f"limit is {limit!r}: a number from 1 to 1000 is expected")
        start = _name(after) if after is not None else None
        page = await self._there().quarantines.ask(
            where, lambda one: one.show(entry, after=start, limit=limit)
        )
        items = _part([one.as_json() for one in page.items])
        return {
            "entry": {"name": entry, "volume": where},
            "items": items,
            "more": page.more or len(items) < len(page.items),
        }

    async def _restore(self, volume: str | None, args: Facts) -> Facts:
        there = self._there()
        entry = _text(args, "entry")
        listed = args.get("paths") or []
        if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
            raise CommandError("paths is no list of names")
        names = [_name(one) for one in listed] or None
        to = _maybe_text(args, "to")
        if to is None and not there.overview.serves:
            raise CommandError(
                "this node does not serve, so the next pass would undo a restore in place: pause "
                "the passes (`nfsha sync --pause`), restore with --to into another folder, and "
                "copy from there to the serving node"
            )
        folder = _name(to) if to is not None else None
        beside = _flag(args, "beside")
        where = await self._volume_of(volume, entry)
        call: Callable[[Quarantine], Any] = lambda one: one.restore(  # noqa: E731
            entry, names, to=folder, beside=beside
        )
        done = await there.quarantines.ask(where, call)
        return {
            "ok": not done.refused_count, "files": done.files, "emptied": done.emptied,
            "beside": _part([[shown(old), shown(new)] for old, new in done.beside]),
            "refused_count": done.refused_count,
            "refused": _part([
                {"name": shown(one.name), "why": one.why}
                for one in done.refused
            ]),
        }  # fmt: skip


def _part(things: Sequence[_T], start: int = 0) -> list[_T]:
    """So many of them as one answer carries; at least one, where there is one."""
    found: list[_T] = []
    size = 0
    for one in things[start:]:
        size += len(json.dumps(one))
        if found and size > PART_BYTES:
            break
        found.append(one)
    return found


def _parts(things: Sequence[_T]) -> Iterator[list[_T]]:
    """All of them, so many at a time; once nothing, where there is nothing."""
    start = 0
    while True:
        part = _part(things, start)
        yield part
        start += len(part)
        if start >= len(things):
            return


def _unread(volume: str, why: str) -> Facts:
    return {"volume": volume, "entries": 0, "bytes": 0, "over": "", "trouble": why}


def _some(bad: list[Facts]) -> str:
    """What is the matter with volumes, in one sentence that stays short."""
    words = "; ".join(f"{one['name']}: {one['why']}" for one in bad[:_SAID])
    return words + (f"; and {len(bad) - _SAID} more volumes" if len(bad) > _SAID else "")


def _is_calm(one: Facts) -> bool:
    """Nobody has to look at this volume."""
    sync = one["sync"]
    paired = one["paired"] in ("paired", "new", "unknown")
    return paired and sync["plan"] is None and sync["state"] not in ("held", "failed", "refused")


def _number(args: Facts, key: str) -> int:
    value = args.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CommandError(f"{key} is {value!r:.40}: a number from 0 on is expected")
    return value


def _after(args: Facts) -> tuple[str, str]:
    """Volume and entry behind which a list goes on."""
    value = args.get("after")
    if value is None:
        return "", ""
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(v, str) for v in value):
        raise CommandError("after is not what an answer gave as next")
    return value[0], value[1]


def _flag(args: Facts, key: str) -> bool:
    value = args.get(key, False)
    if not isinstance(value, bool):
        raise CommandError(f"{key} is {value!r}: true or false is expected")
    return value


def _text(args: Facts, key: str) -> str:
    value = args.get(key)
    if not isinstance(value, str) or not value:
        raise CommandError(f"{key} is {value!r}: a text is expected")
    return value


def _maybe_text(args: Facts, key: str) -> str | None:
    return None if args.get(key) is None else _text(args, key)


def _name(text: str) -> bytes:
    try:
        return from_shown(text)
    except ValueError as error:
        raise CommandError(str(error)) from error

"""The control commands about the copies: volumes, passes, pairs, the quarantine.

Each answer is plain JSON; what the operator asked and cannot have is a CommandError with a reason.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict
from typing import Any

from nfsha.host.control import CommandError, Credentials
from nfsha.replica.beneath import from_shown, shown
from nfsha.replica.quarantine import Quarantine, QuarantineError, over_limits
from nfsha.replica.replicator import ReplicaError, Replicator
from nfsha.replica.volumes import VolumeError

Facts = dict[str, Any]

SHOW_EVERY_S = 0.5

COMMANDS = frozenset(
    {"volumes", "sync", "sync-pause", "sync-bandwidth", "volumes-pair", "quarantine"}
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
        """For `nfsha status`: the same as `volumes`, None where replication is off."""
        return self._replicator.facts() if self._replicator is not None else None

    def alarms(self) -> list[Facts]:
        """What is not as it should be with the copies."""
        if self._replicator is None:
            return []
        return [{"name": name, "text": text} for name, text in self._replicator.alarms().items()]

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
                return there.facts()
            case "sync":
                chosen, _ = await self._begin(args, wait=False)
                return {"ok": True, "why": "", "volumes": there.results(chosen)}
            case "sync-pause":
                there.pause(on=_flag(args, "on"))
                return {"ok": True, "why": "paused" if args["on"] else "goes on"}
            case "sync-bandwidth":
                return await self._bandwidth(args)
            case "volumes-pair":
                return {"ok": True, "why": await there.pair(_text(args, "volume"))}
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
        """`sync-wait`: how the passes go, until all have ended."""
        there = self._there()
        try:
            chosen, passes = await self._begin(args, wait=True)
        except ReplicaError as error:
            raise CommandError(str(error), {"refused": True}) from error
        pending = set(passes)
        while pending:
            _, pending = await asyncio.wait(pending, timeout=SHOW_EVERY_S)
            yield {"volumes": self._shown(chosen)}
        bad = [one for one in there.results(chosen) if one["state"] != "idle"]
        why = "; ".join(f"{one['name']}: {one['why']}" for one in bad)
        refused = bool(bad) and all(one["state"] in ("refused", "held") for one in bad)
        yield {
            "done": True, "ok": not bad, "refused": refused, "why": why,
            "volumes": self._shown(chosen),
        }  # fmt: skip

    def _shown(self, chosen: list[str]) -> list[Facts]:
        return [one for one in self._there().facts()["volumes"] if one["uuid"] in chosen]

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
        volume = _maybe_text(args, "volume")
        match args.get("action"):
            case "list":
                return await self._list(volume)
            case "show":
                return await self._show(volume, args)
            case "restore":
                return await self._restore(volume, args)
            case "drop":
                entry, confirm = _text(args, "entry"), _text(args, "confirm")
                where = await self._volume_of(volume, entry)
                await self._there().quarantine(where, lambda one: one.drop(entry, confirm=confirm))
                return {"ok": True, "why": f"{entry} is deleted"}
            case other:
                raise CommandError(f"the quarantine knows no action {str(other)[:40]!r}")

    async def _list(self, volume: str | None) -> Facts:
        age_ms, size = self._limits

        def call(one: Quarantine) -> tuple[Any, Any, str]:
            usage = one.usage()
            return one.list(), usage, over_limits(usage, time.time_ns(), age_ms, size)

        found = await self._there().quarantine(volume, call)
        entries = [
            {"volume": name, **asdict(entry), "epoch": entry.epoch and entry.epoch.number}
            for name, (listing, _, _) in found.items()
            for entry in listing.entries
        ]
        return {
            "entries": sorted(entries, key=lambda one: (one["volume"], one["name"])),
            "more": any(listing.more for listing, _, _ in found.values()),
            "usage": [
                {"volume": name, "entries": usage.entries, "bytes": usage.bytes, "over": over}
                for name, (_, usage, over) in found.items()
            ],
        }

    async def _volume_of(self, volume: str | None, entry: str) -> str:
        found = await self._there().quarantine(volume, lambda one: one.list())
        names = [
            name for name, listing in found.items()
            if any(one.name == entry for one in listing.entries)
        ]  # fmt: skip
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
        found = await self._there().quarantine(
            where, lambda one: one.show(entry, after=start, limit=limit)
        )
        page = found[where]
        return {
            "entry": {"name": entry, "volume": where},
            "items": [one.as_json() for one in page.items],
            "more": page.more,
        }

    async def _restore(self, volume: str | None, args: Facts) -> Facts:
        there = self._there()
        entry = _text(args, "entry")
        listed = args.get("paths") or []
        if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
            raise CommandError("paths is no list of names")
        names = [_name(one) for one in listed] or None
        to = _maybe_text(args, "to")
        if to is None and not there.serves:
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
        done = (await there.quarantine(where, call))[where]
        return {
            "ok": not done.refused_count, "files": done.files, "emptied": done.emptied,
            "beside": [[shown(old), shown(new)] for old, new in done.beside],
            "refused_count": done.refused_count,
            "refused": [
                {"name": shown(one.name), "why": one.why}
                for one in done.refused
            ],
        }  # fmt: skip


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

"""Takes away what a stopped daemon may have left: the VIP, hooked volumes, the firewall's rules.

It changes nothing while a daemon lives. The VIP goes first: as long as it is on the interface, the
rules that close the NFS ports stay (I2). Volumes that hooks mount are given up last, by the unmount
hook, so that the other node can mount them: one that fails keeps nothing else from going.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence

from nfsha.cli import client
from nfsha.cli.configuration import load_settings
from nfsha.cli.exits import Answer, CommandError, Exit
from nfsha.config import IPAddress, Settings
from nfsha.host import clock, systemd
from nfsha.vip.address import AddressDriver, AddressNotice, VipError
from nfsha.vip.freeze import Firewall, FirewallError, Guarded, choose


def release(args: argparse.Namespace) -> Answer:
    """Removes the VIP and nfsha's own rules; with `--if-stopped` the VIP, on a final stop only.

    Volumes that hooks mount are given up either way.
    """
    settings = _load_settings(args)
    path = settings.paths.runtime / client.SOCKET_NAME
    if args.if_stopped and not asyncio.run(systemd.is_final_stop(systemd.own_unit())):
        text = "nothing to do: the daemon starts again, and until then its leases decide"
        return Answer(text, {"ok": True, "removed": [], "rules": "kept"})
    if client.answers(path):
        raise CommandError(
            Exit.REFUSED,
            f"the daemon runs (it answers at {path}); nothing has changed",
            "stop it first: systemctl stop nfsha",
        )
    try:
        removed = asyncio.run(_release(settings, keep_rules=args.if_stopped))
    except VipError as error:
        raise CommandError(
            Exit.CANNOT, str(error), "the NFS ports stay closed until the VIP is gone"
        ) from error
    except FirewallError as error:
        raise CommandError(
            Exit.CANNOT, f"the VIP is not on {settings.interface}, but the rules stay: {error}"
        ) from error
    answer = _answer(settings, removed, keep_rules=args.if_stopped)
    if not settings.hooks.given:
        return answer
    if trouble := asyncio.run(_give_up_volumes(settings)):
        raise CommandError(Exit.CANNOT, f"{answer.text}; the volumes are not given up: {trouble}")
    data = {**(answer.data or {}), "volumes": "given up"}
    return Answer(f"{answer.text}; the volumes are given up", data)


def _load_settings(args: argparse.Namespace) -> Settings:
    try:
        return load_settings(args)
    except CommandError as error:
        if not args.if_stopped:
            raise
        # Where the start was refused for it, all of it stands in the journal already.
        raise CommandError(
            error.exit,
            "the configuration cannot be used: what a daemon left ends with its leases",
            "nfsha check-config",
            error.data,
        ) from None


def _answer(settings: Settings, removed: Sequence[IPAddress], *, keep_rules: bool) -> Answer:
    gone = ", ".join(map(str, removed))
    vip = f"removed {gone} from {settings.interface}" if gone else "the VIP was not held"
    rules = (
        "the NFS ports stay closed (`nfsha release` opens them)"
        if keep_rules
        else "nfsha's firewall rules are gone: this machine's own NFS ports are open"
    )
    data = {
        "ok": True,
        "removed": [str(vip) for vip in removed],
        "rules": "kept" if keep_rules else "removed",
    }
    return Answer(f"{vip}; {rules}", data)


async def _release(settings: Settings, *, keep_rules: bool) -> list[IPAddress]:
    removed = await _remove_address(settings)
    await _close_or_remove_rules(settings, keep_rules=keep_rules)
    return removed


async def _give_up_volumes(settings: Settings) -> str:
    """Runs the unmount hook; returns why the volumes are not given up, or ""."""
    # Here and not above: all of the daemon's parts take long to load, and few pairs have hooks.
    from nfsha.daemon.volumes import HookedVolumes  # noqa: PLC0415

    return (await HookedVolumes(settings).unmount(None)).detail


async def _remove_address(settings: Settings) -> list[IPAddress]:
    driver = AddressDriver(
        settings.interface,
        settings.vips,
        settings.timing.address_lease_ms,
        clock.now_ms,
        _ignore,
    )
    await driver.start()
    try:
        held = await driver.held()
        await driver.remove()
    finally:
        await driver.close()
    return sorted(held, key=str)


def _ignore(notice: AddressNotice) -> None:
    """Nobody has to be told of changes while the addresses are removed."""
    del notice


async def _close_or_remove_rules(settings: Settings, *, keep_rules: bool) -> None:
    peers = sorted({link.peer for link in settings.links}, key=str)
    guarded = Guarded(settings.vips, peers, settings.firewall.ports)
    lease = await choose(Firewall(settings.firewall.backend), guarded, clock.now_ms)
    try:
        if not keep_rules:
            await lease.remove()
        elif await lease.live():
            await lease.close()
    finally:
        lease.shut()

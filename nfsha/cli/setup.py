"""The commands that need no daemon: the configuration is checked, keys are made, the daemon is run.

They read and write this machine's own files; they never talk to a running daemon.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import nfsha
from nfsha.cli.configuration import CONFIG_VARIABLE, DEFAULT_CONFIG, config_path, load_settings
from nfsha.cli.exits import Answer, CommandError, Exit
from nfsha.config import Settings, warnings
from nfsha.host import hooks
from nfsha.peer import keys

DEFAULT_KEY = Path("/etc/nfsha/cluster.key")


def run(args: argparse.Namespace) -> Answer:
    """Runs the daemon in the foreground until it is stopped."""
    settings = load_settings(args)
    try:
        # Here and not above: all of the daemon's parts would make every short command slower.
        from nfsha import daemon  # noqa: PLC0415
    except ImportError as error:
        raise CommandError(
            Exit.CANNOT, f"nfsha is not completely installed: {error}", "install it again"
        ) from error
    try:
        return Answer(exit=daemon.run(settings))
    except daemon.DaemonError as error:
        raise CommandError(Exit.CANNOT, str(error)) from error


def release(args: argparse.Namespace) -> Answer:
    """Takes away what a stopped daemon left in the kernel."""
    # Here and not above: pyroute2 alone takes longer to load than any short command takes to run.
    from nfsha.cli.release import release as take_away  # noqa: PLC0415

    return take_away(args)


def _require_hooks(settings: Settings) -> None:
    """Raises CommandError (exit 2) when a configured hook is not there, or others may change it."""
    if settings.hooks.mount is None or settings.hooks.unmount is None:
        return
    try:
        hooks.require(settings.hooks.mount, settings.hooks.unmount)
    except hooks.HookError as error:
        raise CommandError(Exit.USAGE, str(error)) from None


def check_config(args: argparse.Namespace) -> Answer:
    """Says whether the configuration is right, with everything that the operator has accepted."""
    path = config_path(args)
    settings = load_settings(args)
    _require_hooks(settings)
    risks = warnings(settings)
    vips = ", ".join(map(str, settings.vips))
    name = "" if settings.name == settings.role else f" ({settings.name})"
    lines = [f"OK: {path}: the {settings.role}{name}, {vips} on {settings.interface}"]
    lines += [f"warning: {risk}" for risk in risks]
    data = {
        "ok": True,
        "path": str(path),
        "name": settings.name,
        "role": str(settings.role),
        "warnings": list(risks),
    }
    return Answer("\n".join(lines), data)


def version(args: argparse.Namespace) -> Answer:
    """Says which nfsha this is."""
    del args
    return Answer(f"nfsha {nfsha.__version__}", {"ok": True, "version": nfsha.__version__})


# --------------------------------------------------------------------------- keys


def keygen(args: argparse.Namespace) -> Answer:
    """Makes the cluster key, or takes one step of a rotation. Never shows a secret."""
    path = _key_path(args)
    try:
        return _keygen(args, path)
    except keys.KeyFileError as error:
        raise key_trouble(error) from error


def _keygen(args: argparse.Namespace, path: Path) -> Answer:
    copy_it = f"Copy {path} to the other node (mode 0600)"
    if args.show:
        return _key_answer(path, keys.load(path), "")
    if args.add:
        ring = keys.add_key(path, keys.generate(), seals=False)
        step = f"{copy_it}, restart nfsha on both, then `nfsha keygen --use {_last(ring)}`."
        return _key_answer(path, ring, step)
    if args.use:
        ring = keys.add_key(path, _named(path, args.use), seals=True)
        others = " or ".join(f"`nfsha keygen --drop {key.fingerprint}`" for key in ring.keys[1:])
        step = f"{copy_it}, restart nfsha on both" + (f", then {others}." if others else ".")
        return _key_answer(path, ring, step)
    if args.drop:
        ring = keys.remove_key(path, args.drop)
        return _key_answer(path, ring, f"{copy_it} and restart nfsha on both.")
    key = keys.generate()
    keys.write_new(path, key)
    return _key_answer(path, keys.KeyRing((key,)), f"{copy_it}: both need the same one.")


def _key_path(args: argparse.Namespace) -> Path:
    if args.path:
        return Path(args.path)
    # A key is made before there is a configuration, too.
    unnamed = not args.config and not os.environ.get(CONFIG_VARIABLE)
    if unnamed and not DEFAULT_CONFIG.exists():
        return DEFAULT_KEY
    return load_settings(args).paths.key


def _named(path: Path, fingerprint: str) -> keys.Key:
    ring = keys.load(path)
    for key in ring.keys:
        if key.fingerprint == fingerprint:
            return key
    known = ", ".join(key.fingerprint for key in ring.keys)
    raise keys.KeyFileError(path, f"holds no key {fingerprint}", f"it holds {known}")


def _last(ring: keys.KeyRing) -> str:
    return ring.keys[-1].fingerprint


def _key_answer(path: Path, ring: keys.KeyRing, step: str) -> Answer:
    prints = [key.fingerprint for key in ring.keys]
    lines = [f"{path}: {prints[0]} seals" + "".join(f", {one} opens" for one in prints[1:])]
    data = {"ok": True, "path": str(path), "seals": prints[0], "opens": prints, "next": step}
    return Answer("\n".join([*lines, *filter(None, [step])]), data)


def key_trouble(error: keys.KeyFileError) -> CommandError:
    """A key file that cannot be used, as the error of a command."""
    return CommandError(
        Exit.CANNOT, f"{error.path}: {error.problem}", error.remedy, {"path": str(error.path)}
    )

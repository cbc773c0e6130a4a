"""The configuration that a command goes by: which file it is, read, and refused in words."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nfsha.cli.exits import CommandError, Exit
from nfsha.config import ConfigError, Settings, load

DEFAULT_CONFIG = Path("/etc/nfsha/nfsha.toml")
CONFIG_VARIABLE = "NFSHA_CONFIG"


def config_path(args: argparse.Namespace) -> Path:
    """The configuration file that was asked for: `--config`, else `NFSHA_CONFIG`, else /etc."""
    return Path(args.config or os.environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG)


def load_settings(args: argparse.Namespace) -> Settings:
    """Reads the configuration. Raises CommandError (exit 2) with every problem it has."""
    path = config_path(args)
    try:
        return load(path)
    except ConfigError as error:
        problems = [
            {"key": one.key, "value": one.value, "right": one.right} for one in error.problems
        ]
        count = len(problems)
        raise CommandError(
            Exit.USAGE,
            f"{path}: {count} problem{'s' if count > 1 else ''}\n"
            + "\n".join(f"  {problem}" for problem in error.problems),
            data={"path": str(path), "problems": problems},
        ) from None

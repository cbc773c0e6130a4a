"""Writes what is generated from the table of keys: the reference and the commented configurations.

`--check` writes nothing and fails when a file is not what it should be.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from nfsha.config import show_ms
from nfsha.config.keys import EACH_TABLE_OF, TIMING_KEYS, Description, describe_keys
from nfsha.config.relations import RELATIONS, SYNC_PLACE
from nfsha.config.settings import PROFILES

ROOT = Path(__file__).resolve().parent.parent

MINIMAL = {
    "role": '"primary"',
    "interface": '"eth0"',
    "vip": '["192.0.2.10"]',
    "witness": '["gateway"]',
    "links": (
        '[{ local = "192.0.2.1", peer = "192.0.2.2" }, { local = "10.9.9.1", peer = "10.9.9.2" }]'
    ),
}
"""The smallest configuration: what every pair has to say for itself."""

SAMPLES = {"name": '"primary"', "sync.link": '"link2"'}
"""What stands in the commented configuration for keys whose default is not a value."""


def reference() -> str:
    """The text of docs/configuration.md."""
    return "\n".join(
        [
            "# Configuration",
            "",
            "<!-- Made by `make docs` from the table of keys; do not edit. -->",
            "",
            "`/etc/nfsha/nfsha.toml`, in [TOML](https://toml.io). Five lines are enough:",
            "",
            "```toml",
            *(f"{name} = {value}" for name, value in MINIMAL.items()),
            "```",
            "",
            "On the other node `role`, and `local` and `peer` of each link, change places.",
            '`etc/nfsha.toml` has every key with its default. Durations are written `"300ms"`,',
            '`"1s"`, `"2m"`, `"6h"` or `"7d"`, sizes `"64kB"`, `"20MB"` or `"16MiB"`.',
            "`nfsha check-config` lists all errors at once, each with the key, its value and what",
            "would be right. A key that nfsha does not know is an error.",
            "",
            *_tables(),
            *_profiles(),
            "## What must fit together",
            "",
            f"- {SYNC_PLACE}",
            *(f"- {relation.rule}" for relation in RELATIONS),
            "",
        ]
    )


def _tables() -> Iterator[str]:
    for table, keys in groupby(describe_keys(), key=lambda key: key.table):
        yield f"## {_title(table)}"
        yield ""
        yield "| key | value | default | meaning |"
        yield "| --- | --- | --- | --- |"
        for key in keys:
            default = " ".join(filter(None, [key.default and f"`{key.default}`", key.remark]))
            yield f"| `{key.name}` | {key.right} | {default} | {key.meaning} |"
        yield ""


def _title(table: str) -> str:
    if table in EACH_TABLE_OF:
        return f"Each table of `{table}`"
    return f"[{table}]" if table else "At the top"


def _profiles() -> Iterator[str]:
    yield "## Profiles of [timing]"
    yield ""
    yield f"| key | {' | '.join(PROFILES)} |"
    yield f"| --- |{' --- |' * len(PROFILES)}"
    for field, key in TIMING_KEYS.items():
        values = [show_ms(getattr(timings, field)) for timings in PROFILES.values()]
        yield f"| `{key.name}` | {' | '.join(values)} |"
    yield ""


def commented(profile: str) -> str:
    """The text of etc/nfsha.toml, or the same with another profile of timings chosen."""
    lines = [
        "# The configuration of nfsha. `nfsha check-config` says whether it is right.",
        "# What is commented out shows the default. On the other node change the role,",
        "# and let local and peer change places in each link.",
    ]
    keys = [key for key in describe_keys() if key.table not in EACH_TABLE_OF]
    for table, group in groupby(keys, key=lambda key: key.table):
        if table:
            lines += ["", "", f"[{table}]"]
        for key in group:
            lines += [
                "",
                *_comment(key.meaning),
            ]
            lines += _setting(key, profile)
    return "\n".join(lines) + "\n"


def _comment(sentence: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(sentence, 90, break_on_hyphens=False)]


def _setting(key: Description, profile: str) -> Iterator[str]:
    field = f"{key.name}_ms"
    if key.table == "timing" and key.name == "profile" and profile != "default":
        yield f'profile = "{profile}"'
    elif key.name == "links":
        yield f"# Optional in each: {', '.join(_options(key.name))}."
        yield "links = ["
        for link in MINIMAL["links"].strip("[]").split("}, {"):
            yield f"    {{ {link.strip(' {}')} }},"
        yield "]"
    elif not key.table and key.name in MINIMAL:
        yield f"{key.name} = {MINIMAL[key.name]}"
    elif key.table == "timing" and field in TIMING_KEYS:
        yield f'#{key.name} = "{show_ms(getattr(PROFILES[profile], field))}"'
    else:
        path = f"{key.table}.{key.name}".lstrip(".")
        if path in EACH_TABLE_OF:
            yield f"# Optional in each beside path: {', '.join(_options(path))}."
        yield f"#{key.name} = {key.default or SAMPLES[path]}"


def _options(table: str) -> Iterator[str]:
    for key in describe_keys():
        if key.table == table and key.remark != "required":
            yield f"{key.name} ({key.default or key.remark})"


def main() -> int:
    """Writes the files, or with `--check` compares them; returns the exit code."""
    files = {
        ROOT / "docs" / "configuration.md": reference(),
        ROOT / "etc" / "nfsha.toml": commented("default"),
        ROOT / "etc" / "nfsha-fast.toml": commented("fast"),
    }
    if "--check" not in sys.argv[1:]:
        for path, text in files.items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return 0
    stale = [path for path, text in files.items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} is not what the table of keys says: run `make docs`")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())

"""Shows what the quarantine of this node's volumes holds, as plain text. Pure, like `render`.

Names arrive in a spelling that is safe to print and that the commands take back.
"""

from __future__ import annotations

import shlex
import stat
from collections.abc import Iterator
from typing import Final

from nfsha.cli.words import Facts, count, moment, paragraph, printable, size, spelled

_SHOWN: Final = 20


def entries(answer: Facts) -> str:
    """All entries, the oldest first, by volume, with what each volume's quarantine takes."""
    lines: list[str] = []
    for used in answer.get("usage") or []:
        mine = [one for one in answer["entries"] if one["volume"] == used["volume"]]
        lines += _volume(used, mine)
    if not answer["entries"]:
        return "\n".join(lines or ["nothing is in quarantine on this node"])
    if answer.get("more"):
        lines.append("(there are more: `--volume` lists those of one volume)")
    return "\n".join(lines)


def _volume(used: Facts, listed: list[Facts]) -> Iterator[str]:
    if used.get("trouble"):
        yield paragraph(f"{spelled(used['volume'])}: CANNOT BE READ: {used['trouble']}", indent=2)
    if not listed and not used.get("over"):
        return
    amount = f"{count(used['entries'], 'entry')}, {size(used['bytes'])}"
    yield paragraph(f"{spelled(used['volume'])}: {amount}", indent=2)
    if used.get("over"):
        yield paragraph(f"  OVER ITS LIMIT: {used['over']}", indent=4)
    for one in listed:
        yield printable(f"  {one['name']}")
        yield paragraph(f"    {_entry(one)}", indent=4)


def _entry(one: Facts) -> str:
    amount = "not counted yet"
    if one.get("files") is not None:
        amount = f"{count(one['files'], 'file')}, {size(one['bytes'])}"
    why = f": {one['why']}" if one.get("why") else ""
    words = [f"{moment(one['created_ns'])}, {amount}{why}"]
    if one.get("by"):
        words.append(f"by {one['by']}")
    if not one.get("complete", True):
        words.append("not finished")
    if one.get("trouble"):
        words.append(str(one["trouble"]))
    return "; ".join(words)


def items(answer: Facts) -> str:
    """The files of one entry: mode, owner, size, time, path."""
    lines = [_item(one) for one in answer["items"]]
    if answer.get("more") and answer["items"]:
        last = shlex.quote(printable(answer["items"][-1]["name"]))
        lines.append(f"(more: go on with --after {last})")
    return "\n".join(lines) or "it holds nothing"


def _item(one: Facts) -> str:
    mode = stat.filemode(one["mode"])
    owner = f"{one['uid']}:{one['gid']}"
    when = moment(one["mtime_ns"])
    return printable(f"{mode} {owner:<11} {size(one['size']):>7} {when} {one['name']}")


def restored(answer: Facts) -> str:
    """What a restore did and did not."""
    lines = [f"restored {count(answer['files'], 'file')}"]
    lines += [f"  {old} as {new}" for old, new in (answer.get("beside") or [])[:_SHOWN]]
    refused = answer["refused_count"]
    if refused:
        lines.append(f"left in quarantine {count(refused, 'file')}:")
        lines += [f"  {one['name']}: {one['why']}" for one in answer["refused"][:_SHOWN]]
        if refused > _SHOWN:
            lines.append(f"  and {refused - _SHOWN:,} more")
    if answer.get("emptied"):
        lines.append("the entry is empty, and gone")
    return "\n".join(map(printable, lines))

"""What mountd says: the export list, and the handle of an export's root (RFC 1813, appendix I).

Both kinds of server answer it. It mounts nothing that stays: after asking for a handle it says that
it has unmounted.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from nfsha.nfs import xdr
from nfsha.nfs.rpc import MOUNT_PROGRAM, Answered, Call, RpcConnection
from nfsha.nfs.xdr import Reader, XdrError

_VERSION, _MNT, _UMNT, _EXPORT = 3, 1, 3, 5  # section 5.2
_PATH_MAX, _NAME_MAX, _HANDLE_MAX = 1024, 255, 64  # section 5.1.1
_LIST_MAX_BYTES: Final = 1 << 22
EXPORTS_MAX: Final = 2048
GROUPS_MAX: Final = 1024
# section 5.2.1; what servers say to those who ask for a handle
_REFUSALS: Final = {
    1: "not the owner",
    2: "no such folder",
    5: "I/O error",
    13: "this host may not mount it",
    20: "not a folder",
    22: "invalid argument",
    63: "name too long",
    10004: "not supported",
    10006: "server fault",
}


@dataclass(frozen=True, order=True, slots=True)
class Listed:
    """One line of the export list: a path and the clients that may mount it (none: everybody)."""

    path: str
    clients: tuple[str, ...]


async def export_list(connection: RpcConnection, *, timeout_ms: int) -> tuple[Listed, ...] | str:
    """Returns what the server exports, by path; a text says why there is no list."""
    call = Call(MOUNT_PROGRAM, _VERSION, _EXPORT, max_bytes=_LIST_MAX_BYTES)
    result = await connection.call(call, timeout_ms=timeout_ms)
    if not isinstance(result, Answered):
        return str(result)
    try:
        return decode_exports(result.results)
    except XdrError as error:
        return f"not an export list: {error}"


async def root_handle(
    connection: RpcConnection, path: str, *, timeout_ms: int
) -> tuple[bytes | None, str]:
    """Returns the handle that clients get for an export, or None and why the server gave none.

    A server may refuse this host, or a port of 1024 and above (knfsd with `secure`).
    """
    name = xdr.opaque(os.fsencode(path))
    mnt = Call(MOUNT_PROGRAM, _VERSION, _MNT, name)
    result = await connection.call(mnt, timeout_ms=timeout_ms)
    if not isinstance(result, Answered):
        return None, str(result)
    reader = Reader(result.results)
    try:
        status = reader.number()
        if status != 0:
            return None, f"the server says: {_REFUSALS.get(status, f'status {status}')}"
        handle = reader.opaque(_HANDLE_MAX)
    except XdrError as error:
        return None, f"not a file handle: {error}"
    # Else the server lists this host among its clients for ever; its answer says nothing.
    await connection.call(Call(MOUNT_PROGRAM, _VERSION, _UMNT, name), timeout_ms=timeout_ms)
    return handle, ""


def decode_exports(results: bytes) -> tuple[Listed, ...]:
    """Reads an exports list (section 5.2.5). Raises XdrError."""
    reader = Reader(results)
    found: list[Listed] = []
    while reader.more():
        if len(found) == EXPORTS_MAX:
            raise XdrError(f"more than {EXPORTS_MAX} exports")
        path = reader.text(_PATH_MAX)
        clients: list[str] = []
        while reader.more():
            if len(clients) == GROUPS_MAX:
                raise XdrError(f"more than {GROUPS_MAX} clients of {path[:80]}")
            clients.append(reader.text(_NAME_MAX))
        found.append(Listed(path, tuple(sorted(clients))))
    return tuple(sorted(found))

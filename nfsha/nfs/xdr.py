"""Reads and writes the few types of XDR that answers of rpcbind and mountd are made of (RFC 4506).

It takes bytes and gives values; it bounds everything, since the bytes come from a server.
"""

from __future__ import annotations

import struct


class XdrError(ValueError):
    """The bytes are not what the procedure returns; the text says where they end or exceed."""


class Reader:
    """Takes values off the front of some bytes, one after the other. Raises XdrError."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self) -> int:
        """An unsigned int of 32 bits (section 4.2)."""
        return int.from_bytes(self._take(4))

    def more(self) -> bool:
        """Whether another entry of a linked list follows (section 4.19, optional-data)."""
        value = self.number()
        if value > 1:
            raise XdrError(f"{value} where 0 or 1 says whether an entry follows")
        return value == 1

    def opaque(self, most: int) -> bytes:
        """Bytes of variable length, at most so many (section 4.10)."""
        length = self.number()
        if length > most:
            raise XdrError(f"{length} bytes where at most {most} may be")
        found = self._take(length)
        self._take(-length % 4)
        return found

    def text(self, most: int) -> str:
        """A string (section 4.11); bytes that are not UTF-8 are kept as surrogates (PEP 383)."""
        return self.opaque(most).decode("utf-8", "surrogateescape")

    def _take(self, count: int) -> bytes:
        found = self._data[self._at : self._at + count]
        if len(found) < count:
            raise XdrError(f"it ends after {len(self._data)} bytes")
        self._at += count
        return found


def opaque(data: bytes) -> bytes:
    """Returns bytes of variable length as XDR has them (section 4.10)."""
    return struct.pack(">I", len(data)) + data + bytes(-len(data) % 4)

"""Names and addresses of hosts, as the resolver of this machine has them.

A resolver without its servers hangs for half a minute, and no thread can be ended: so each question
has a thread of its own that neither the loop nor the end of the daemon waits for, two at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, TypeVar

IPAddress = IPv4Address | IPv6Address
_T = TypeVar("_T")

WITHIN_S: Final = 5.0
"""How long an answer is waited for."""

_AT_ONCE: Final = 2


class Resolver:
    """Asks the resolver; whoever does not answer in time knows nothing."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(_AT_ONCE)

    async def addresses_of(self, host: str) -> tuple[IPAddress, ...]:
        """The address that the text is, or the first of each family that the name has; or none."""
        with contextlib.suppress(ValueError):
            return (_plain(host),)
        return await self._ask(lambda: _addresses_of(host), ())

    async def name_of(self, address: IPAddress) -> str:
        """The name of an address, or ""."""
        return await self._ask(lambda: _name_of(address), "")

    async def _ask(self, question: Callable[[], _T], unknown: _T) -> _T:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_T] = loop.create_future()

        def take(found: _T) -> None:
            self._free.release()
            if not answer.done():
                answer.set_result(found)

        def work() -> None:
            found = question()
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(take, found)

        try:
            async with asyncio.timeout(WITHIN_S):
                await self._free.acquire()
                threading.Thread(target=work, name="nfsha-names", daemon=True).start()
                return await answer
        except TimeoutError:
            return unknown


def _addresses_of(host: str) -> tuple[IPAddress, ...]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return ()
    firsts: dict[int, IPAddress] = {}
    for *_, place in found:
        address = _plain(str(place[0]))
        firsts.setdefault(address.version, address)
    return tuple(firsts.values())


def _plain(text: str) -> IPAddress:
    """Without a zone; the IPv4 address that a mapped one stands for (RFC 4291, 2.5.5.2)."""
    found = ip_address(text.partition("%")[0])
    return (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found


def _name_of(address: IPAddress) -> str:
    try:
        name, _ = socket.getnameinfo((str(address), 0), socket.NI_NAMEREQD)
    except OSError:
        return ""
    return name if name.isascii() else ""

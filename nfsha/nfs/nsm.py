"""Tells a client that its server changed, so that it claims its locks again: NSM's SM_NOTIFY.

The call (X/Open, Protocols for Interworking: XNFS, version 3W, chapter 11) goes by UDP from the
VIP to the status monitor (statd) of the client, whose port the client's rpcbind tells, as those of
sm-notify(8) do. A client knows its server by the address that it comes from, or by the name in it.

It tells who it is asked to tell; who holds locks, `statd` knows. Nothing here decides.
"""

from __future__ import annotations

import asyncio
import errno
import re
import secrets
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final, Self

from nfsha.nfs.names import IPAddress, Resolver
from nfsha.nfs.portmap import RPCBIND_PROGRAM
from nfsha.nfs.rpc import (
    Answered,
    Call,
    RpcResult,
    TimedOut,
    Unreachable,
    decode_reply,
    encode_call,
)
from nfsha.nfs.statd import STATE_MAX
from nfsha.nfs.v3_fence import STATUS_PROGRAM
from nfsha.nfs.xdr import Reader, XdrError, opaque

OUTGOING_PORT: Final = 20051
"""As `outgoing-port` in etc/nfs.conf.d/nfsha.conf: what a firewall in between has to let pass.

Where rpc.statd holds that port for all addresses, any other is taken.
"""

ANSWER_MS: Final = 1000
"""How long an answer of rpcbind or statd is waited for; sm-notify(8) waits for two seconds."""

_VERSION, _NOTIFY = 1, 6  # XNFS, chapter 11: SM_VERS, SM_NOTIFY
_NAME_MAX: Final = 1024  # the same: SM_MAXSTRLEN
_GETPORT: Final = 3  # RFC 1833, section 3.2: PMAPPROC_GETPORT; 2.2.1: RPCBPROC_GETADDR
_UDP: Final = 17
_RPCBIND_PORT: Final = 111
_ADDRESS_TEXT_MAX: Final = 255


# --- the calls -----------------------------------------------------------------------------------


def notify_call(name: str, state: int) -> Call:
    """SM_NOTIFY: the server `name` is in state `state`, an odd number (it is up) that only rises.

    Raises ValueError for what the call cannot say.
    """
    if not 0 < len(name.encode()) <= _NAME_MAX or not 0 < state <= STATE_MAX or state % 2 == 0:
        raise ValueError(f"no notification: {name[:80]!r}, state {state}")
    arguments = opaque(name.encode()) + struct.pack(">i", state)
    return Call(STATUS_PROGRAM, _VERSION, _NOTIFY, arguments)


def port_call(family: int) -> Call:
    """Asks rpcbind for statd's UDP port: by version 2 for IPv4, which all have, by 4 for IPv6."""
    if family == 4:
        asked = struct.pack(">4I", STATUS_PROGRAM, _VERSION, _UDP, 0)
        return Call(RPCBIND_PROGRAM, 2, _GETPORT, asked)
    asked = struct.pack(">2I", STATUS_PROGRAM, _VERSION)
    asked += opaque(b"udp6") + opaque(b"") + opaque(b"")
    return Call(RPCBIND_PROGRAM, 4, _GETPORT, asked)


def decode_port(results: bytes, family: int) -> int:
    """The port in rpcbind's answer to `port_call`; 0: no statd runs there. Raises XdrError."""
    reader = Reader(results)
    if family == 4:
        port = reader.number()
    else:
        address = reader.text(_ADDRESS_TEXT_MAX)
        found = re.search(r"\.(\d{1,3})\.(\d{1,3})$", address)
        if address and found is None:
            raise XdrError(f"an address {address!r} without a port")
        port = int(found[1]) * 256 + int(found[2]) if found else 0
    if port > 0xFFFF:
        raise XdrError(f"a port {port}")
    return port


# --- asking from a VIP ---------------------------------------------------------------------------


class NsmError(Exception):
    """Nothing can be sent from the VIP; the text says why."""


class Teller(asyncio.DatagramProtocol):
    """One socket at a VIP, for calls to any number of clients side by side.

    `allowed` is asked before each datagram: whether this node may speak as the VIP.
    """

    def __init__(self, vip: IPAddress, allowed: Callable[[], bool]) -> None:
        self.vip = vip
        self._allowed = allowed
        self._transport: asyncio.DatagramTransport | None = None
        self._waiting: dict[int, tuple[IPAddress, asyncio.Future[RpcResult]]] = {}

    @classmethod
    async def open(cls, vip: IPAddress, allowed: Callable[[], bool]) -> Self:
        """Opens the socket. Raises NsmError, when the VIP is not on this node among others."""
        try:
            return await cls._open(vip, OUTGOING_PORT, allowed)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise NsmError(f"no socket at {vip}: {error.strerror}") from error
        try:
            return await cls._open(vip, 0, allowed)
        except OSError as error:
            raise NsmError(f"no socket at {vip}: {error.strerror}") from error

    @classmethod
    async def _open(cls, vip: IPAddress, port: int, allowed: Callable[[], bool]) -> Self:
        transport, made = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: cls(vip, allowed), local_addr=(str(vip), port)
        )
        made._transport = transport
        return made

    def close(self) -> None:
        """Closes the socket; whoever still waits for an answer gets none. Idempotent."""
        if self._transport is not None:
            self._transport.abort()

    async def tell(self, client: IPAddress, name: str, state: int) -> RpcResult:
        """Asks a client's rpcbind for its statd, and notifies that: Answered when it took note.

        Takes twice `ANSWER_MS` at most; nothing is sent again.
        """
        found = await self._ask(client, _RPCBIND_PORT, port_call(client.version))
        if not isinstance(found, Answered):
            return found
        try:
            port = decode_port(found.results, client.version)
        except XdrError as error:
            return Unreachable(f"rpcbind there: {error}")
        if port == 0:
            return Unreachable("no statd is registered with rpcbind there")
        return await self._ask(client, port, notify_call(name, state))

    async def _ask(self, client: IPAddress, port: int, call: Call) -> RpcResult:
        if self._transport is None or self._transport.is_closing() or not self._allowed():
            return Unreachable("this node may not speak for the VIP now")
        xid = secrets.randbits(32)
        answer: asyncio.Future[RpcResult] = asyncio.get_running_loop().create_future()
        self._waiting[xid] = (client, answer)
        try:
            self._transport.sendto(encode_call(xid, call), (str(client), port))
            async with asyncio.timeout(ANSWER_MS / 1000):
                return await answer
        except TimeoutError:
            return TimedOut(connected=True)
        finally:
            del self._waiting[xid]

    # asyncio's side

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Takes an answer to a call that waits for it, from the client that it went to."""
        client, answer = self._waiting.get(int.from_bytes(data[:4]), (None, None))
        if answer is None or answer.done() or ip_address(addr[0].partition("%")[0]) != client:
            return
        answer.set_result(decode_reply(data, int.from_bytes(data[:4])))

    def error_received(self, exc: Exception) -> None:
        """A datagram could not leave: its call goes without an answer, and is tried again."""


# --- all of them, again and again ----------------------------------------------------------------

TRY_AT_S: Final = (0, 1, 3, 7, 15, 30, 60, 120, 240, 480, 900)
"""When a client that has not answered is told again, from the begin. sm-notify(8): 15 minutes."""

_APART_S: Final = 0.001
"""One client after the other: a thousand a second, each at less than 0.2 ms of the loop."""


@dataclass(slots=True)
class Tally:
    """How far the telling is."""

    total: int = 0
    answered: int = 0
    given_up: int = 0


class Round:
    """Tells clients of one change: each until it answers, or its tries are over."""

    def __init__(
        self,
        tellers: Sequence[Teller],
        state: int,
        names: Mapping[IPAddress, str],
        resolver: Resolver,
        *,
        try_at_s: Sequence[float] = TRY_AT_S,
    ) -> None:
        """`state` is the number that the calls carry, `names` what the VIPs are called besides."""
        self._tellers = tellers
        self._state = state
        self._resolver = resolver
        self._try_at_s = try_at_s
        self._names = names
        self.tally = Tally()

    async def tell_all(self, clients: Sequence[str]) -> None:
        """Returns when each has answered, or will not. Others may be told meanwhile."""
        self.tally.total += len(clients)
        async with asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(self._tell(client))
                await asyncio.sleep(_APART_S)

    async def _tell(self, client: str) -> None:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        left: list[_Notice] = []
        for at_s in self._try_at_s:
            await asyncio.sleep(max(0.0, began_s + at_s - loop.time()))
            left = left or self._notices(await self._resolver.addresses_of(client))
            if not left:
                continue  # a name that nobody knows, or an address of another family
            left = [notice for notice in left if not await self._answers(notice)]
            if not left:
                self.tally.answered += 1
                return
        self.tally.given_up += 1

    def _notices(self, addresses: Sequence[IPAddress]) -> list[_Notice]:
        """From each VIP of the address's family: which one the client mounted, it alone knows."""
        return [
            _Notice(teller, address, name)
            for address in addresses
            for teller in self._tellers
            if teller.vip.version == address.version
            for name in (str(teller.vip), self._names.get(teller.vip, ""))
            if name
        ]

    async def _answers(self, notice: _Notice) -> bool:
        result = await notice.teller.tell(notice.client, notice.name, self._state)
        return isinstance(result, Answered)


@dataclass(frozen=True, slots=True)
class _Notice:
    """One call that a client has to answer."""

    teller: Teller
    client: IPAddress
    name: str

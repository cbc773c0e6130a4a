"""The two route netlink sockets: one asks and is answered at once, one hears what changes.

It carries messages and turns refusals into `VipError`; it knows no lease and decides nothing.
Neither socket ever waits for data: route netlink does its work inside sendmsg(2), and the answer
is queued when that returns.
"""

import errno
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Final

from nfsha.vip import rtnetlink
from nfsha.vip.rtnetlink import AddressEntry, LinkEntry, Message, Request

_BUFFER_BYTES: Final = 65536
_ANSWERS_MAX: Final = 65536  # datagrams read for one request; a dump of all addresses is far below
_DUMP_TRIES_MAX: Final = 3


class VipError(Exception):
    """The kernel could not do, or could not prove, what was asked; the message says what to do."""


class VipRefused(VipError):  # noqa: N818 - what happened, not that something did
    """The interface cannot carry the VIPs as it is: an operator has to change something first."""


class RouteSocket:
    """The request socket: opening it raises OSError, its methods raise VipError."""

    def __init__(self) -> None:
        self._socket = _netlink_socket(0)
        self._socket.setsockopt(rtnetlink.SOL_NETLINK, rtnetlink.NETLINK_GET_STRICT_CHK, 1)
        self._sequence = 0

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()

    def change(self, requests: Sequence[Request]) -> list[int]:
        """Sends requests that want an acknowledgement, in one call; returns an errno for each."""
        first = self._send(requests)
        codes: dict[int, int] = {}
        for message in self._answers(first):
            if message.kind == rtnetlink.NLMSG_ERROR:
                codes[message.sequence] = rtnetlink.error_code(message)
            if len(codes) == len(requests):
                break
        return [codes[first + offset] for offset in range(len(requests))]

    def addresses(self, index: int) -> list[AddressEntry]:
        """All addresses of one interface, or of all for 0; none if it does not exist."""
        for _ in range(_DUMP_TRIES_MAX):
            entries, whole = self._dump(index)
            if whole:
                return entries
        raise VipError("the kernel's list of addresses changes faster than it can be read")

    def _dump(self, index: int) -> tuple[list[AddressEntry], bool]:
        entries: list[AddressEntry] = []
        whole = True
        for message in self._answers(self._send([rtnetlink.dump_addresses(index)])):
            whole = whole and not message.flags & rtnetlink.NLM_F_DUMP_INTR
            if message.kind in (rtnetlink.NLMSG_ERROR, rtnetlink.NLMSG_DONE):
                code = rtnetlink.error_code(message)
                if code not in (0, errno.ENODEV):
                    raise VipError(f"addresses cannot be listed: {os.strerror(code)}")
                break
            entry = rtnetlink.address_entry(message)
            if entry is not None and index in (0, entry.index):
                entries.append(entry)
        return entries, whole

    def link(self, name: str) -> LinkEntry | None:
        """The interface of that name, None if there is none."""
        found: LinkEntry | None = None
        for message in self._answers(self._send([rtnetlink.get_link(name)])):
            if message.kind == rtnetlink.RTM_NEWLINK:
                found = rtnetlink.link_entry(message)
            elif message.kind == rtnetlink.NLMSG_ERROR:
                code = rtnetlink.error_code(message)
                if code not in (0, errno.ENODEV):
                    raise VipError(f"interface {name} cannot be looked up: {os.strerror(code)}")
                break
        return found

    def _send(self, requests: Sequence[Request]) -> int:
        first = self._sequence + 1
        self._sequence += len(requests)
        frames = [rtnetlink.frame(request, first + n) for n, request in enumerate(requests)]
        try:
            self._socket.send(b"".join(frames))
        except OSError as error:
            raise VipError(f"netlink request not sent: {error}") from error
        return first

    def _answers(self, first: int) -> Iterator[Message]:
        """The answers to the newest requests, whose sequence numbers begin at `first`."""
        for _ in range(_ANSWERS_MAX):
            try:
                data = self._socket.recv(_BUFFER_BYTES)
            except OSError as error:  # would block, too: the kernel answers before send returns
                raise VipError(f"netlink answer not received: {error}") from error
            yield from (m for m in rtnetlink.messages(data) if m.sequence >= first)
        raise VipError("a netlink answer without an end")


class EventSocket:
    """The event socket: address and link events of this network namespace. Raises OSError."""

    def __init__(self) -> None:
        self._socket = _netlink_socket(rtnetlink.EVENT_GROUPS)

    def fileno(self) -> int:
        """The descriptor to watch for reading."""
        return self._socket.fileno()

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()

    def read(self) -> list[Message]:
        """The next datagram's events; empty when there is none. Raises OSError on overflow."""
        try:
            return list(rtnetlink.messages(self._socket.recv(_BUFFER_BYTES)))
        except BlockingIOError:
            return []


def _netlink_socket(groups: int) -> socket.socket:
    opened = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    )
    opened.setblocking(False)
    opened.bind((0, groups))
    return opened

"""The process that watches the lab: frames at the switch's ports and address events of the nodes.

It runs apart from the lab's owner and with real-time scheduling, so that a busy test does not blur
its times. All times are CLOCK_BOOTTIME: frames bear the kernel's own receive time, address events
the time at which they were read. It only writes what it saw; observe.py makes figures of it.

Commands are JSON lines on standard input, each with an `id` that is printed when it is done. It
ends with its standard input:
  {"do": "watch", "node": "a", "netns": PATH}   listen to the address events of a node
  {"do": "forget", "node": "a", "at": NS}       the node is gone, and all its addresses with it
  {"do": "datagrams", "on": true}               keep the contents of UDP datagrams too
  {"do": "sync"}                                drain and flush
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import json
import os
import selectors
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from tests.netns.labkit import kernel
from tests.netns.labkit.network import PLACES, port

_RECEIVE_BUFFER = 32 << 20
_PRIORITY = 30
_SNAP = 2048

# tcpdump -y EN10MB -s 2048 -dd 'arp or icmp6 or udp or (tcp src port 2049) or (ip and tcp dst port
# 2049 and tcp[tcpflags] & tcp-syn != 0)': what is cheap to refuse in the kernel is refused there.
_FILTER = (
    (0x28, 0, 0, 0x0C), (0x15, 24, 0, 0x0806), (0x15, 0, 10, 0x86DD), (0x30, 0, 0, 0x14),
    (0x15, 21, 0, 0x3A), (0x15, 0, 3, 0x2C), (0x30, 0, 0, 0x36), (0x15, 18, 0, 0x3A),
    (0x15, 17, 18, 0x11), (0x15, 16, 0, 0x11), (0x15, 0, 16, 0x06), (0x28, 0, 0, 0x36),
    (0x15, 13, 14, 0x0801), (0x15, 0, 13, 0x0800), (0x30, 0, 0, 0x17), (0x15, 10, 0, 0x11),
    (0x15, 0, 10, 0x06), (0x28, 0, 0, 0x14), (0x45, 8, 0, 0x1FFF), (0xB1, 0, 0, 0x0E),
    (0x48, 0, 0, 0x0E), (0x15, 4, 0, 0x0801), (0x48, 0, 0, 0x10), (0x15, 0, 3, 0x0801),
    (0x50, 0, 0, 0x1B), (0x45, 0, 1, 0x02), (0x06, 0, 0, _SNAP), (0x06, 0, 0, 0),
)  # fmt: skip

# asm-generic/socket.h, linux/if_packet.h, linux/if_ether.h
_SO_ATTACH_FILTER = 26
_SO_RCVBUFFORCE = 33
_SO_TIMESTAMPNS = 35
_SOL_PACKET = 263
_PACKET_STATISTICS = 6
_PACKET_IGNORE_OUTGOING = 23
_ETH_P_ALL = 3

# linux/rtnetlink.h, linux/if_addr.h
_RTMGRP_IPV4_IFADDR = 0x10
_RTMGRP_IPV6_IFADDR = 0x100
_RTM_NEWADDR = 20
_RTM_DELADDR = 21
_RTM_GETADDR = 22
_NLM_F_REQUEST_DUMP = 0x301
_IFA_ADDRESS = 1
_IFA_LOCAL = 2

Event = dict[str, object]


def _boottime_offset_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_REALTIME) - kernel.now_ns()


class _Stamps:
    """Turns the kernel's receive times (wall clock) into CLOCK_BOOTTIME, also across a step.

    A frame was received between the last time that the socket was empty and now; of the offsets
    before and after a step only one puts it there.
    """

    _SLACK_NS = 50_000_000

    def __init__(self) -> None:
        self._offset_ns = self._older_ns = _boottime_offset_ns()
        self._empty_ns = kernel.now_ns()

    def emptied(self) -> None:
        self._empty_ns = kernel.now_ns()

    def boottime(self, wall_ns: int) -> int:
        now_ns = kernel.now_ns()
        offset_ns = _boottime_offset_ns()
        if abs(offset_ns - self._offset_ns) > self._SLACK_NS:
            self._older_ns = self._offset_ns
        self._offset_ns = offset_ns
        for candidate in (self._offset_ns, self._older_ns):
            if self._empty_ns - self._SLACK_NS <= wall_ns - candidate <= now_ns + self._SLACK_NS:
                return min(wall_ns - candidate, now_ns)
        return now_ns


class _Frames:
    """What the places send into their ports: what a place lets out, not what arrives."""

    def __init__(self, switch: str) -> None:
        self.keep_datagrams = False
        self._stamps = _Stamps()
        self._ports = {
            port(place, at.network): (place, at.network)
            for place, addresses in PLACES.items()
            for at in addresses.all()
        }
        self._macs = {at.mac: place for place, all_of in PLACES.items() for at in all_of.all()}
        self.socket = _in_namespace(
            switch,
            lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)),
        )
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self.socket.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        self._attach_filter()

    def _attach_filter(self) -> None:
        code = b"".join(struct.pack("HBBI", *line) for line in _FILTER)
        kept = ctypes.create_string_buffer(code)
        program = struct.pack("HL", len(_FILTER), ctypes.addressof(kept))
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)

    def read(self) -> Iterator[Event]:
        """Everything that waits in the socket."""
        while True:
            try:
                frame, ancillary, _, address = self.socket.recvmsg(_SNAP, 64)
            except BlockingIOError:
                self._stamps.emptied()
                return
            where = self._ports.get(address[0])
            if where is None or not ancillary:
                continue
            seconds, nanoseconds = struct.unpack("qq", ancillary[0][2][:16])
            event = self._decode(frame, *where)
            if event is not None:
                wall_ns = seconds * 1_000_000_000 + nanoseconds
                yield {"t": self._stamps.boottime(wall_ns), "node": where[0], **event}

    def lost(self) -> int:
        """Frames that the kernel dropped for want of room since the last call."""
        raw = self.socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
        return int(struct.unpack("II", raw)[1])

    def _decode(self, frame: bytes, place: str, network: str) -> Event | None:
        kind = int.from_bytes(frame[12:14], "big")
        if kind == 0x0806:
            return _arp(frame)
        if kind == 0x0800:
            start = 14 + 4 * (frame[14] & 15)
            end = 14 + int.from_bytes(frame[16:18], "big")
            source, target = frame[26:30], frame[30:34]
            protocol = frame[23]
        elif kind != 0x86DD:
            return None
        else:
            start, end = 54, 54 + int.from_bytes(frame[18:20], "big")
            source, target = frame[22:38], frame[38:54]
            protocol = frame[20]
        if protocol == 58:
            return _neighbour_advertisement(frame)
        ends: Event = {"source": _text(source), "target": _text(target)}
        if protocol == 6:
            return self._tcp(frame, start, end, ends)
        return self._udp(frame, start, network, ends) if self.keep_datagrams else None

    def _tcp(self, frame: bytes, start: int, end: int, ends: Event) -> Event | None:
        source_port, target_port = struct.unpack_from("!HH", frame, start)
        flags = frame[start + 13]
        payload = end - start - 4 * (frame[start + 12] >> 4)
        if target_port == 2049:
            to = self._macs.get(frame[:6].hex(":"), "?")
            return {"k": "syn", "to": to, **ends} if not flags & 0x10 else None
        if not payload and not flags & 0x06:  # neither data nor SYN nor RST: of no interest
            return None
        sequence = int.from_bytes(frame[start + 4 : start + 8], "big")
        return {
            "k": "tcp",
            "sport": source_port,
            "dport": target_port,
            "flags": flags,
            "seq": sequence,
            "payload": payload,
            **ends,
        }

    def _udp(self, frame: bytes, start: int, network: str, ends: Event) -> Event:
        source_port, target_port, length = struct.unpack_from("!HHH", frame, start)
        content = frame[start + 8 : start + length]
        return {"k": "udp", "network": network, "sport": source_port, "dport": target_port,
                "data": content.hex(), **ends}  # fmt: skip


def _text(address: bytes) -> str:
    return str(ipaddress.ip_address(address))


def _arp(frame: bytes) -> Event | None:
    """An Ethernet ARP packet for IPv4 (RFC 826)."""
    if len(frame) < 42:
        return None
    operation = int.from_bytes(frame[20:22], "big")
    mac, sender, target = frame[22:28].hex(":"), _text(frame[28:32]), _text(frame[38:42])
    return {"k": "arp", "op": operation, "mac": mac, "sender": sender, "target": target}


def _neighbour_advertisement(frame: bytes) -> Event | None:
    """An ICMPv6 message of type 136 (RFC 4861 section 4.4)."""
    if len(frame) < 78 or frame[54] != 136:
        return None
    return {"k": "na", "mac": frame[6:12].hex(":"), "sender": _text(frame[62:78])}


class _Addresses:
    """The address events of one node, by route netlink (man 7 rtnetlink)."""

    def __init__(self, node: str, netns: str) -> None:
        self._node = node
        self.socket = _in_namespace(
            netns, lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        )
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
        self.socket.bind((0, _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR))
        # What is there already arrives as if it were added now.
        request = struct.pack("IHHII", 24, _RTM_GETADDR, _NLM_F_REQUEST_DUMP, 1, 0) + bytes(8)
        self.socket.send(request)

    def read(self) -> Iterator[Event]:
        """Everything that waits in the socket."""
        while True:
            try:
                block = self.socket.recv(1 << 16)
            except BlockingIOError:
                return
            now_ns = kernel.now_ns()
            for kind, body in _messages(block):
                if kind in (_RTM_NEWADDR, _RTM_DELADDR) and (address := _address_of(body)):
                    operation = "add" if kind == _RTM_NEWADDR else "del"
                    yield {"k": "addr", "t": now_ns, "node": self._node, "op": operation,
                           "address": address}  # fmt: skip


def _messages(block: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + 16 <= len(block):
        length, kind = struct.unpack_from("IH", block, offset)
        yield kind, block[offset + 16 : offset + length]
        offset += (max(length, 16) + 3) & ~3


def _address_of(body: bytes) -> str | None:
    found: dict[int, bytes] = {}
    offset = 8  # struct ifaddrmsg
    while offset + 4 <= len(body):
        length, kind = struct.unpack_from("HH", body, offset)
        found[kind] = body[offset + 4 : offset + length]
        offset += (max(length, 4) + 3) & ~3
    raw = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
    return _text(raw) if raw else None


def _in_namespace(netns: str, make: Callable[[], socket.socket]) -> socket.socket:
    def work() -> socket.socket:
        with Path(netns).open("rb") as file:
            kernel.setns(file.fileno(), kernel.CLONE_NEWNET)
        return make()

    return kernel.in_own_thread(work)


class _Observer:
    """The loop: commands in, events out."""

    def __init__(self, switch: str, output: IO[str]) -> None:
        self._output = output
        self._selector = selectors.DefaultSelector()
        self._frames = _Frames(switch)
        self._nodes: dict[str, _Addresses] = {}
        self._selector.register(self._frames.socket, selectors.EVENT_READ, self._frames)
        os.set_blocking(sys.stdin.fileno(), False)
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ, None)
        self._pending = b""

    def run(self) -> None:
        """Until standard input ends."""
        while True:
            for key, _ in self._selector.select():
                if key.data is not None:
                    self._drain(key.data)
                elif not self._commands():
                    return

    def _drain(self, source: _Frames | _Addresses) -> None:
        for event in source.read():
            self._write(event)

    def _write(self, event: Event) -> None:
        self._output.write(json.dumps(event) + "\n")

    def _commands(self) -> bool:
        block = os.read(sys.stdin.fileno(), 1 << 16)
        *lines, self._pending = (self._pending + block).split(b"\n")
        for line in lines:
            self._command(json.loads(line))
        return bool(block)

    def _command(self, command: dict[str, object]) -> None:
        match command["do"]:
            case "watch":
                self._watch(str(command["node"]), str(command["netns"]))
            case "forget":
                self._forget(str(command["node"]))
                self._write({"k": "gone", "t": command["at"], "node": command["node"]})
            case "datagrams":
                self._frames.keep_datagrams = bool(command["on"])
            case "sync":
                self._sync()
            case unknown:
                raise ValueError(f"no such command: {unknown}")
        print(command["id"], flush=True)

    def _watch(self, node: str, netns: str) -> None:
        self._forget(node)
        self._write({"k": "watch", "t": kernel.now_ns(), "node": node})
        source = _Addresses(node, netns)
        self._nodes[node] = source
        self._selector.register(source.socket, selectors.EVENT_READ, source)

    def _forget(self, node: str) -> None:
        source = self._nodes.pop(node, None)
        if source is not None:
            self._drain(source)
            self._selector.unregister(source.socket)
            source.socket.close()

    def _sync(self) -> None:
        sources: list[_Frames | _Addresses] = [self._frames, *self._nodes.values()]
        for source in sources:
            self._drain(source)
        lost = self._frames.lost()
        if lost:
            self._write({"k": "lost", "t": kernel.now_ns(), "node": "switch", "frames": lost})
        self._output.flush()


def main() -> None:
    """observer.py SWITCH-NETNS EVENTS-FILE: see the module."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(_PRIORITY))
    with Path(sys.argv[2]).open("a") as output:
        observer = _Observer(sys.argv[1], output)
        print("ready", flush=True)
        observer.run()


if __name__ == "__main__":
    main()

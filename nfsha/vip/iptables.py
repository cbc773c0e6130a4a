"""The freeze by iptables-legacy, for hosts without nftables: the same service, without the lease.

Own chains NFSHA-IN and NFSHA-OUT hang first in INPUT and OUTPUT of the table `filter`, in IPv4 and
IPv6. What is allowed returns to everybody else's rules, it is never accepted past them; what is
closed is dropped, in both directions, established connections too. No other rule or chain is
touched. Nothing here ends by itself: when the daemon dies the chains stay as they are, so the
address lease alone must end the service (DESIGN 4).

Changes go by iptables-legacy-restore(8) as a child process, one commit for each IP version. The
steady state starts none: whether anybody changed the rules is told by their number and size.
"""

import asyncio
import contextlib
import ctypes
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from nfsha.vip.rtnetlink import Vip
from nfsha.vip.service_lease import FirewallError, Guarded, LeaseOutcome, LeaseVerdict

CHAIN_IN: Final = "NFSHA-IN"
CHAIN_OUT: Final = "NFSHA-OUT"
_CHAIN_TRY: Final = "NFSHA-TRY"  # hangs nowhere; there for a moment, to see if the kernel takes it
_CHILD_MAX_S: Final = 10
_LOCK_WAIT_S: Final = 5  # for the xtables lock, while other programs change rules
_PORTS_PER_RULE: Final = 15  # XT_MULTI_PORTS, linux/netfilter/xt_multiport.h
_PATH: Final = "/usr/sbin:/sbin:/usr/bin:/bin"
_GET_INFO: Final = 64  # IPT_SO_GET_INFO and IP6T_SO_GET_INFO
_INFO: Final = struct.Struct(
    "=32s13I"
)  # ipt_getinfo: table, hooks, entries, underflows, count, size
_libc: Final = ctypes.CDLL(None)
_IPV6_PRESENT: Final = Path("/proc/net/if_inet6")


class IptablesLease:
    """A ServiceLease (which see) that only this process ends.

    `clock_ms` must count as CLOCK_BOOTTIME does. Everything belongs to the network namespace of
    the thread that makes it, and must be called from there. Changes take tens of milliseconds, in
    child processes that do not block the loop; renew and intact about 0.01 ms.
    """

    has_lease: Final = False

    def __init__(self, guarded: Guarded, clock_ms: Callable[[], int]) -> None:
        """Raises FirewallError where iptables-legacy is not installed."""
        self._clock_ms = clock_ms
        self._families = [_Family(4, guarded)]
        # A kernel started with ipv6.disable=1 has neither IPv6 nor rules for it.
        if _IPV6_PRESENT.exists() or any(vip.version == 6 for vip in guarded.vips):
            self._families.append(_Family(6, guarded))
        self._one_at_a_time = asyncio.Lock()

    @property
    def watch_fd(self) -> None:
        """None: iptables announces no changes; ask intact()."""
        return

    def disturbed(self) -> None:
        """Knows nothing; intact() does."""
        return

    async def check(self) -> None:
        """Proves that this host can read and set such rules; sets none."""
        for family in self._families:
            await family.check()

    async def install(self) -> None:
        """Puts the chains there, closed; if they are right, they stay, and so does what is open."""
        async with self._one_at_a_time:
            states = [await family.state() for family in self._families]
            with_vips = {
                state for family, state in zip(self._families, states, strict=True) if family.vips
            }
            if None in states or len(with_vips) != 1:
                await self._set(opened=False)
                return
            for family in self._families:
                family.take_for(opened=True in with_vips)

    async def open(self, deadline_ms: int) -> LeaseOutcome:
        """Opens all VIPs; only the next renew or close ends it."""
        async with self._one_at_a_time:
            started_ms = self._clock_ms()
            if started_ms >= deadline_ms:
                return await self._late(started_ms)
            if None in [await family.state() for family in self._families]:
                return self._broken(started_ms)
            await self._set(opened=True)
            return await self._checked(started_ms, deadline_ms)

    async def renew(self, deadline_ms: int) -> LeaseOutcome:
        """Checks that the rules are there and open, and that the deadline has not passed."""
        async with self._one_at_a_time:
            started_ms = self._clock_ms()
            if started_ms >= deadline_ms:
                return await self._late(started_ms)
            if not await self._intact():
                return self._broken(started_ms)
            if not all(family.opened for family in self._families):
                why = "the service had been closed before the renewal came"
                return LeaseOutcome(LeaseVerdict.LOST, started_ms, self._clock_ms(), why)
            return await self._checked(started_ms, deadline_ms)

    async def close(self) -> None:
        """Closes all VIPs and verifies it."""
        async with self._one_at_a_time:
            await self._set(opened=False)

    async def intact(self) -> bool:
        """True if nobody changed our chains; reads all rules only when their number or size did."""
        async with self._one_at_a_time:
            return await self._intact()

    async def live(self) -> dict[Vip, int | None]:
        """The VIPs that are open, all without end."""
        async with self._one_at_a_time:
            states = [(family, await family.state()) for family in self._families]
            return {vip: None for family, opened in states if opened for vip in family.vips}

    async def remove(self) -> None:
        """Deletes our chains and the jumps to them; that they are not there is fine."""
        async with self._one_at_a_time:
            for family in self._families:
                await family.remove()

    def shut(self) -> None:
        """Closes the sockets; the chains stay."""
        for family in self._families:
            family.shut()

    async def _set(self, *, opened: bool) -> None:
        # All of them, also when the first fails: what can be closed is closed.
        done = await asyncio.gather(
            *(family.set(opened=opened) for family in self._families), return_exceptions=True
        )
        failures = [result for result in done if result is not None]
        if failures and opened:
            await self._set(opened=False)  # open everywhere or nowhere
        for failure in failures:
            raise failure

    async def _intact(self) -> bool:
        return all([await family.intact() for family in self._families])

    async def _checked(self, started_ms: int, deadline_ms: int) -> LeaseOutcome:
        ended_ms = self._clock_ms()
        if ended_ms >= deadline_ms:
            return await self._late(started_ms)
        return LeaseOutcome(
            LeaseVerdict.HELD, started_ms, ended_ms, "open, without an end of its own (iptables)"
        )

    async def _late(self, started_ms: int) -> LeaseOutcome:
        await self._set(opened=False)
        why = "closed at once, because the deadline had passed"
        return LeaseOutcome(LeaseVerdict.LATE, started_ms, self._clock_ms(), why)

    def _broken(self, started_ms: int) -> LeaseOutcome:
        why = (
            f"the chains {CHAIN_IN} and {CHAIN_OUT} of iptables-legacy are missing or were changed"
        )
        return LeaseOutcome(LeaseVerdict.BROKEN, started_ms, self._clock_ms(), why)


class _Family:
    """The chains of one IP version."""

    def __init__(self, version: int, guarded: Guarded) -> None:
        prefix = "iptables" if version == 4 else "ip6tables"
        self._name = f"{prefix}-legacy"
        self._save = _program(f"{self._name}-save")
        self._restore = _program(f"{self._name}-restore")
        self._level = socket.IPPROTO_IP if version == 4 else socket.IPPROTO_IPV6
        self._socket = socket.socket(
            socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM
        )
        self._ports = list(guarded.port_names())
        self._peers = dict.fromkeys(_bare(one) for one in guarded.peers if one.version == version)
        self.vips = list(dict.fromkeys(vip for vip in guarded.vips if vip.version == version))
        self.opened = False
        self.set_to = False
        self._proved = b""  # the kernel's figures when the rules were last right

    async def check(self) -> None:
        """Proves by a chain that hangs nowhere, removed at once, that the rules are possible."""
        rules = [rule.split(maxsplit=2)[2] for rule in self._rules(opened=False)]
        lines = [
            "*filter",
            f":{_CHAIN_TRY} - [0:0]",
            *(f"-A {_CHAIN_TRY} {rule}" for rule in rules),
            "COMMIT",
            "*filter",
            *_emptied([_CHAIN_TRY]),
            "COMMIT\n",
        ]
        await self._put("\n".join(lines))

    def take_for(self, *, opened: bool) -> None:
        """Without a VIP, open and closed look alike: this says which of them it is."""
        if not self.vips:
            self.set_to = self.opened = opened

    async def set(self, *, opened: bool) -> None:
        """Puts the chains there and verifies it."""
        self.set_to = opened
        await self._put(self._script(await self._saved(), opened=opened))
        if await self.state() is not opened:
            raise FirewallError(
                f"the rules of {self._name} were changed by another program as soon as they were"
                f" set: make that program leave {CHAIN_IN} and {CHAIN_OUT} alone"
            )

    async def state(self) -> bool | None:
        """True if the chains are there and open, False if there and closed, None otherwise.

        Without a VIP of this IP version both look alike, and count as what was set last.
        """
        figures = self._figures()
        saved = await self._saved()
        ours = [line for line in saved if _appended(line) in (CHAIN_IN, CHAIN_OUT)]
        found: bool | None = None
        if self._jumps_first(saved):
            # What was set last comes last: it is the answer where both look alike.
            looks = {tuple(self._rules(opened=one)): one for one in (not self.set_to, self.set_to)}
            found = looks.get(tuple(ours))
        self.opened = bool(found)
        self._proved = b"" if found is None else figures
        return found

    async def intact(self) -> bool:
        """True if the figures are those of the last full reading, or a new one is right too."""
        if self._proved and self._figures() == self._proved:
            return True
        return await self.state() is not None

    async def remove(self) -> None:
        """Deletes our chains and every jump to them, in one commit."""
        saved = await self._saved()
        ours = (CHAIN_IN, CHAIN_OUT, _CHAIN_TRY)
        chains = [name for name in ours if any(line.startswith(f":{name} ") for line in saved)]
        self.opened, self._proved = False, b""
        if chains:
            lines = ["*filter", *_unhooked(saved), *_emptied(chains), "COMMIT\n"]
            await self._put("\n".join(lines))

    def shut(self) -> None:
        self._socket.close()

    def _script(self, saved: list[str], *, opened: bool) -> str:
        # A chain that is declared here is emptied first, or made (iptables-restore(8)).
        lines = ["*filter", f":{CHAIN_IN} - [0:0]", f":{CHAIN_OUT} - [0:0]"]
        lines += self._rules(opened=opened)
        if not self._jumps_first(saved):
            lines += _unhooked(saved)
            lines += [f"-I INPUT 1 -j {CHAIN_IN}", f"-I OUTPUT 1 -j {CHAIN_OUT}"]
        return "\n".join([*lines, "COMMIT\n"])

    def _rules(self, *, opened: bool) -> list[str]:
        # Written as iptables-save prints them, for they are compared with what it prints.
        rules = [
            *self._chain(CHAIN_IN, "-i lo", "-m addrtype --src-type LOCAL", opened=opened),
            *self._chain(CHAIN_OUT, "-o lo", "-m addrtype --dst-type LOCAL", opened=opened),
        ]
        return [f"-A {rule}" for rule in rules]

    def _chain(self, chain: str, loopback: str, own: str, *, opened: bool) -> Iterator[str]:
        inward = chain == CHAIN_IN
        near, far, ports = ("-d", "-s", "--dports") if inward else ("-s", "-d", "--sports")
        yield f"{chain} {loopback} -j RETURN"
        yield f"{chain} {own} -j RETURN"
        for vip in self.vips:
            address = f"{near} {_bare(vip)}/{vip.max_prefixlen}"
            if opened:
                yield f"{chain} {address} -j RETURN"
            else:
                yield from self._dropped(f"{chain} {address}", ports)
        for peer in self._peers:
            yield f"{chain} {far} {peer}/{self._prefixlen} -j RETURN"
        yield from self._dropped(chain, ports)

    def _dropped(self, match: str, ports: str) -> Iterator[str]:
        for protocol in ("tcp", "udp"):
            for start in range(0, len(self._ports), _PORTS_PER_RULE):
                some = ",".join(str(port) for port in self._ports[start : start + _PORTS_PER_RULE])
                yield f"{match} -p {protocol} -m multiport {ports} {some} -j DROP"

    @property
    def _prefixlen(self) -> int:
        return 32 if self._level == socket.IPPROTO_IP else 128

    def _jumps_first(self, saved: list[str]) -> bool:
        jumps = [line for line in saved if _jumps_to_us(line)]
        hooked = [f"-A INPUT -j {CHAIN_IN}", f"-A OUTPUT -j {CHAIN_OUT}"]
        return sorted(jumps) == hooked and all(
            next((line for line in saved if _appended(line) == _appended(jump)), "") == jump
            for jump in hooked
        )

    def _figures(self) -> bytes:
        """The kernel's own figures of the table: entry points, number of rules, their bytes.

        Empty if it tells none; the full reading then says why.
        """
        return _table_info(self._socket, self._level)

    async def _saved(self) -> list[str]:
        return (await self._run(self._save, "-t", "filter")).splitlines()

    async def _put(self, script: str) -> None:
        await self._run(self._restore, "--noflush", "--wait", str(_LOCK_WAIT_S), text=script)

    async def _run(self, program: str, *arguments: str, text: str = "") -> str:
        """Runs one program to its end, at most 10 s; raises FirewallError with its complaint."""
        child = await asyncio.create_subprocess_exec(
            program,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": _PATH, "LC_ALL": "C"},
        )
        try:
            async with asyncio.timeout(_CHILD_MAX_S):
                output, complaint = await child.communicate(text.encode())
        except TimeoutError as error:
            raise FirewallError(
                f"{program} did not end within {_CHILD_MAX_S} s: see who holds /run/xtables.lock"
            ) from error
        finally:
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
                await child.wait()
        if child.returncode != 0:
            said = " ".join(complaint.decode(errors="replace").split()) or "it gave no reason"
            raise FirewallError(
                f"{self._name} could not read or set its rules ({said}): it needs CAP_NET_ADMIN,"
                " and the kernel's table filter with the matches multiport and addrtype"
            )
        return output.decode(errors="replace")


def _program(name: str) -> str:
    found = shutil.which(name, path=_PATH)
    if found is None:
        raise FirewallError(
            f"{name} is not on this machine: install the package iptables (Debian, Ubuntu) or"
            " iptables-legacy (Fedora), or set the firewall to nftables"
        )
    return found


def _table_info(link: socket.socket, level: int) -> bytes:
    # By ctypes, because the kernel wants the table's name in the buffer that it fills.
    buffer = ctypes.create_string_buffer(b"filter", _INFO.size)
    length = ctypes.c_uint32(_INFO.size)
    status = _libc.getsockopt(link.fileno(), level, _GET_INFO, buffer, ctypes.byref(length))
    return buffer.raw if status == 0 else b""


def _appended(line: str) -> str:
    """The chain that a saved rule belongs to, empty for other lines."""
    words = line.split(maxsplit=2)
    return words[1] if len(words) > 1 and words[0] == "-A" else ""


def _jumps_to_us(line: str) -> bool:
    return bool(_appended(line)) and line.endswith((f" {CHAIN_IN}", f" {CHAIN_OUT}"))


def _unhooked(saved: list[str]) -> list[str]:
    """Lines that delete every jump to our chains, wherever it is."""
    return [f"-D{line.removeprefix('-A')}" for line in saved if _jumps_to_us(line)]


def _emptied(chains: list[str]) -> list[str]:
    """Lines that delete chains with their rules."""
    return [f"-{command} {chain}" for command in "FX" for chain in chains]


def _bare(address: Vip) -> str:
    # Without the %interface of a link-local address: packets do not carry it.
    return str(type(address)(address.packed))

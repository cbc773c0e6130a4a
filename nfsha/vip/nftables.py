"""The service lease in nftables: one own table `inet nfsha`, whose set elements the kernel ends.

It must not touch any other table, and it starts no process: the table is set by libnftables
(nft_run_cmd_from_buffer(3)), everything that may come ten times a second goes by nfnetlink.

How it closes: `tcp|udp dport @ports` on input and `sport @ports` on output are dropped for every
address, except traffic within the node, traffic with the peer at this node's own addresses, and
traffic with a VIP whose element in the set `open4` or `open6` lives. There is no look at
connections: an established one falls silent with the next packet, in both directions, so not even
the kernel's own retransmission of a reply leaves. Both chains hook in before conntrack and before
everybody's filters (priority raw - 10), so nobody else's rule can answer with a reject; on input
rather than prerouting, because there IPv4 fragments are whole again (and of IPv6 ones the first,
which must carry the port by RFC 7112, is dropped, so the rest never become a packet).

The table has no owner process and outlives the daemon: what is open then ends by its timeout.
"""

import ctypes
import errno
from collections.abc import Callable, Iterable
from typing import Final

from nfsha.vip import nfnetlink
from nfsha.vip.nfnetlink import TIMEOUT_MARK, Nfnetlink, NftablesEvents, TablePicture
from nfsha.vip.rtnetlink import Vip
from nfsha.vip.service_lease import FirewallError, Guarded, LeaseOutcome, LeaseVerdict

TABLE: Final = "nfsha"
LEASE_MIN_MS: Final = 20
"""A shorter lease is not taken: older kernels round a timeout below one tick (10 ms at 100 Hz)
down to 0, which means an element without end (nf_msecs_to_jiffies64)."""
LEASE_MAX_MS: Final = 60_000
"""No lease is longer, whatever the deadline: the longest announced absence is 8 s."""

_REFERENCE: Final = "nfsha_reference"  # dormant, there for a moment, to compare ours with
_DORMANT: Final = 1  # NFT_TABLE_F_DORMANT
_PRIORITY: Final = -310  # raw (-300) - 10
_CHAINS: Final = ("input", "output", "inbound", "outbound")
_OPEN_SETS: Final = {4: "open4", 6: "open6"}
# The kernel counts the timeout from when it works, we from when we read the clock before: the
# lease may outlast the deadline by as much as the change took, so a slow change is done again
# with what is left by then, and closed when nothing is.
_SLOW_MS: Final = 10
_SLOW_TRIES_MAX: Final = 3
_NOT_PERMITTED: Final = "it needs CAP_NET_ADMIN, and no other process may own the table"


def ruleset(guarded: Guarded, table: str, flags: str = "") -> str:
    """The whole table, closed, in the language of nft(8); `flags` is empty or `flags dormant`."""
    ports = ", ".join(f'{port} comment "{name}"' for port, name in guarded.port_names().items())
    return f"""table inet {table} {{
  {flags}
  set ports {{ type inet_service; flags constant; elements = {{ {ports} }}; }}
  set vips4 {{ type ipv4_addr; flags constant; {_listed(guarded.vips, 4)} }}
  set vips6 {{ type ipv6_addr; flags constant; {_listed(guarded.vips, 6)} }}
  set peers4 {{ type ipv4_addr; flags constant; {_listed(guarded.peers, 4)} }}
  set peers6 {{ type ipv6_addr; flags constant; {_listed(guarded.peers, 6)} }}
  set open4 {{ type ipv4_addr; flags timeout; timeout 1s; }}
  set open6 {{ type ipv6_addr; flags timeout; timeout 1s; }}
  chain inbound {{
    iif "lo" accept
    fib saddr type local accept
    ip daddr @open4 accept
    ip6 daddr @open6 accept
    ip daddr @vips4 drop
    ip6 daddr @vips6 drop
    ip saddr @peers4 accept
    ip6 saddr @peers6 accept
    drop
  }}
  chain outbound {{
    oif "lo" accept
    fib daddr type local accept
    ip saddr @open4 accept
    ip6 saddr @open6 accept
    ip saddr @vips4 drop
    ip6 saddr @vips6 drop
    ip daddr @peers4 accept
    ip6 daddr @peers6 accept
    drop
  }}
  chain input {{
    type filter hook input priority {_PRIORITY}; policy accept;
    tcp dport @ports goto inbound
    udp dport @ports goto inbound
  }}
  chain output {{
    type filter hook output priority {_PRIORITY}; policy accept;
    tcp sport @ports goto outbound
    udp sport @ports goto outbound
  }}
}}
"""


class NftablesLease:
    """A ServiceLease (which see) that the kernel ends by itself, 0 to 20 ms around the deadline.

    `clock_ms` must count as CLOCK_BOOTTIME does. Everything belongs to the network namespace of
    the thread that makes it, and must be called from there. Nothing awaits: each call is done when
    it returns. Measured on Linux 6.18 with three VIPs: renew 0.03 ms; open, close and intact
    0.4 ms; setting the table anew 5 to 25 ms (the kernel waits until the old one is gone), 150 ms
    where others have 500 tables.
    """

    has_lease: Final = True

    def __init__(self, guarded: Guarded, clock_ms: Callable[[], int]) -> None:
        """Raises FirewallError where libnftables or the kernel's nftables is missing."""
        self._guarded = guarded
        self._clock_ms = clock_ms
        self._library = _load_libnftables()
        self._reference: TablePicture | None = None
        self._vips = {_OPEN_SETS[vip.version] + vip.packed.hex(): vip for vip in guarded.vips}
        keys = {
            name: [vip.packed for vip in self._vips.values() if vip.version == version]
            for version, name in _OPEN_SETS.items()
        }
        held = {name: found for name, found in keys.items() if found}
        flush = [nfnetlink.flush_set(TABLE, name) for name in _OPEN_SETS.values()]
        delete = [nfnetlink.delete_elements(TABLE, name, held[name]) for name in held]
        add = [nfnetlink.add_elements(TABLE, name, held[name]) for name in held]
        # Prepared once; only the timeouts change. A flush takes what there is, alive or not; a
        # delete wants all of it alive and fails the whole transaction otherwise.
        self._opening = nfnetlink.batch(flush + add)
        self._renewal = nfnetlink.batch(delete + add)
        self._closing = nfnetlink.batch(flush)
        try:
            self._link = Nfnetlink()
            self._events = NftablesEvents(TABLE, self._link.port)
        except OSError as error:
            raise _refused("cannot talk to nftables", error) from error

    @property
    def watch_fd(self) -> int:
        """Turns readable when anything in nftables changes."""
        return self._events.fileno()

    def disturbed(self) -> str | None:
        """Who else touched our table since the last call, None if nobody did."""
        return self._events.read()

    async def check(self) -> None:
        """Proves on a dormant copy of the table, removed at once, that this host can carry it."""
        self._wanted()

    async def install(self) -> None:
        """Puts the table there, closed; one that is equal stays, and with it what is open."""
        if not (self._equal() and self._sound()):
            self._replace()

    async def open(self, deadline_ms: int) -> LeaseOutcome:
        """Opens all VIPs until the deadline, in one transaction, whatever was open before."""
        if not self._equal():
            now_ms = self._clock_ms()
            why = f"the nftables table inet {TABLE} is missing or was changed"
            return LeaseOutcome(LeaseVerdict.BROKEN, now_ms, now_ms, why)
        return self._hold(self._opening, deadline_ms)

    async def renew(self, deadline_ms: int) -> LeaseOutcome:
        """Moves the deadline of all VIPs, in one transaction that fails if one has closed."""
        return self._hold(self._renewal, deadline_ms)

    async def close(self) -> None:
        """Closes all VIPs and verifies it; restores the table if it is not there."""
        self._close()

    async def intact(self) -> bool:
        """True if every chain, rule and set is as we made it, and nothing but VIPs is open."""
        return self._equal() and self._only_vips(self._open_elements())

    async def live(self) -> dict[Vip, int | None]:
        """The VIPs that are open, with their remaining ms; empty also if there is no table."""
        open_now = self._open_elements()
        return {vip: open_now[key] for key, vip in self._vips.items() if key in open_now}

    async def remove(self) -> None:
        """Deletes our table; that it is not there is fine."""
        for table in (TABLE, _REFERENCE):
            self._delete(table)
        self._events.discard()

    def shut(self) -> None:
        """Closes the sockets; the table stays."""
        self._link.shut()
        self._events.shut()

    def _hold(self, prepared: bytes, deadline_ms: int) -> LeaseOutcome:
        started_ms = self._clock_ms()
        for _ in range(_SLOW_TRIES_MAX):
            before_ms = self._clock_ms()
            left_ms = min(deadline_ms - before_ms, LEASE_MAX_MS)
            if left_ms < LEASE_MIN_MS:
                return self._late(started_ms, f"{left_ms} ms were left to the deadline")
            try:
                self._link.change(prepared.replace(TIMEOUT_MARK, left_ms.to_bytes(8)))
            except OSError as error:
                return self._failed(started_ms, error)
            after_ms = self._clock_ms()
            # One that came after the deadline took LEASE_MIN_MS at least: it is slow as well.
            if after_ms - before_ms <= _SLOW_MS:
                why = f"open for {left_ms} ms"
                return LeaseOutcome(LeaseVerdict.HELD, started_ms, after_ms, why)
        return self._late(
            started_ms, f"the kernel took more than {_SLOW_MS} ms, {_SLOW_TRIES_MAX} times in a row"
        )

    def _late(self, started_ms: int, why: str) -> LeaseOutcome:
        self._close()
        return LeaseOutcome(
            LeaseVerdict.LATE, started_ms, self._clock_ms(), f"closed at once, because {why}"
        )

    def _failed(self, started_ms: int, error: OSError) -> LeaseOutcome:
        if error.errno != errno.ENOENT:
            verdict, why = LeaseVerdict.BROKEN, f"the kernel refused: {error.strerror}"
        elif not self._equal():
            verdict = LeaseVerdict.BROKEN
            why = f"the nftables table inet {TABLE} is missing or was changed"
        else:
            self._close()  # of several VIPs some may still be open
            verdict, why = LeaseVerdict.LOST, "the lease had ended before the renewal came"
        return LeaseOutcome(verdict, started_ms, self._clock_ms(), why)

    def _close(self) -> None:
        try:
            self._link.change(self._closing)
        except FileNotFoundError:
            self._replace()
        except OSError as error:
            raise _refused("cannot close the service", error) from error
        if not self._equal() or self._open_elements():
            self._replace()

    def _equal(self) -> bool:
        wanted = self._wanted()
        found = self._picture(TABLE)
        return found is not None and found.flags == 0 and found.body == wanted.body

    def _sound(self) -> bool:
        # All VIPs are open under a lease of bearable length, or none is.
        open_now = self._open_elements()
        return self._only_vips(open_now) and len(open_now) in (0, len(self._vips))

    def _only_vips(self, open_now: dict[str, int | None]) -> bool:
        timed = all(left is not None and left <= LEASE_MAX_MS for left in open_now.values())
        return timed and open_now.keys() <= self._vips.keys()

    def _open_elements(self) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        for name in _OPEN_SETS.values():
            try:
                elements = self._link.elements(TABLE, name)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise _refused("cannot read what is open", error) from error
            found.update({name + key.hex(): left for key, left in elements.items()})
        return found

    def _wanted(self) -> TablePicture:
        if self._reference is None:
            self._delete(_REFERENCE)
            self._library.run(ruleset(self._guarded, _REFERENCE, "flags dormant"))
            try:
                self._reference = self._picture(_REFERENCE)
            finally:
                self._delete(_REFERENCE)
        if self._reference is None or self._reference.flags != _DORMANT:
            self._reference = None
            raise FirewallError(
                f"the nftables table inet {_REFERENCE} was changed by another program while it was"
                " made: find that program (nft monitor) and make it leave nfsha's tables alone"
            )
        return self._reference

    def _replace(self) -> None:
        fresh = f"add table inet {TABLE}\ndelete table inet {TABLE}\n"
        self._library.run(fresh + ruleset(self._guarded, TABLE))
        self._events.discard()
        if not self._equal() or self._open_elements():
            raise FirewallError(
                f"the nftables table inet {TABLE} was changed by another program as soon as it was"
                " set: find that program (nft monitor) and make it leave nfsha's table alone"
            )

    def _picture(self, table: str) -> TablePicture | None:
        try:
            return self._link.picture(table, _CHAINS)
        except OSError as error:
            raise _refused(f"cannot read the nftables table inet {table}", error) from error

    def _delete(self, table: str) -> None:
        try:
            self._link.change(nfnetlink.batch([nfnetlink.delete_table(table)]))
        except FileNotFoundError:
            return
        except OSError as error:
            raise _refused(f"cannot delete the nftables table inet {table}", error) from error


class _Libnftables:
    """libnftables by ctypes: runs commands in this process (libnftables(3))."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer = ctypes.c_void_p
        self._new = library.nft_ctx_new
        self._new.argtypes, self._new.restype = [ctypes.c_uint32], pointer
        self._free = library.nft_ctx_free
        self._free.argtypes, self._free.restype = [pointer], None
        self._buffer_error = library.nft_ctx_buffer_error
        self._buffer_error.argtypes, self._buffer_error.restype = [pointer], ctypes.c_int
        self._run = library.nft_run_cmd_from_buffer
        self._run.argtypes, self._run.restype = [pointer, ctypes.c_char_p], ctypes.c_int
        self._error = library.nft_ctx_get_error_buffer
        self._error.argtypes, self._error.restype = [pointer], ctypes.c_char_p

    def run(self, commands: str) -> None:
        """Runs commands as one transaction; raises FirewallError with the first complaint."""
        # A context keeps what it has read of everybody's rules: it lives for one call only.
        context = self._new(0)
        if not context:
            raise FirewallError("libnftables could not start: the machine may be out of memory")
        try:
            if self._buffer_error(context) != 0:
                raise FirewallError("libnftables has no memory for its messages")
            if self._run(context, commands.encode()) != 0:
                raise FirewallError(_complaint(self._error(context) or b""))
        finally:
            self._free(context)


def _load_libnftables() -> _Libnftables:
    try:
        return _Libnftables(ctypes.CDLL("libnftables.so.1"))
    except OSError as error:
        raise FirewallError(
            "libnftables.so.1 is not on this machine: install the package libnftables1 (Debian,"
            " Ubuntu) or nftables (Fedora, RHEL), or set the firewall to iptables"
        ) from error


def _complaint(errors: bytes) -> str:
    lines = errors.decode(errors="replace").splitlines() or ["no reason given"]
    first = lines[0].rpartition("Error: ")[2]
    if "Operation not permitted" in first:
        remedy = _NOT_PERMITTED
    elif "not supported" in first or "No such file" in first:
        remedy = (
            "this kernel lacks a part of nftables (nf_tables, nf_tables_inet, nft_fib_inet):"
            " load it, or set the firewall to iptables"
        )
    else:
        remedy = "see `nft list ruleset`"
    return f"the nftables table inet {TABLE} could not be set ({first}): {remedy}"


def _refused(what: str, error: OSError) -> FirewallError:
    remedies = {
        errno.EPERM: _NOT_PERMITTED,
        errno.EPROTONOSUPPORT: "this kernel has no nfnetlink: set the firewall to iptables",
        errno.EINVAL: "this kernel has no nf_tables: load it, or set the firewall to iptables",
        errno.EOPNOTSUPP: "this kernel has no nf_tables: load it, or set the firewall to iptables",
    }
    remedy = remedies.get(error.errno or 0, "see the kernel's log and `nft list ruleset`")
    return FirewallError(f"{what} ({error.strerror}): {remedy}")


def _listed(addresses: Iterable[Vip], version: int) -> str:
    chosen = sorted({address.packed: address for address in addresses}.items())
    shown = ", ".join(_bare(address) for _, address in chosen if address.version == version)
    return f"elements = {{ {shown} }};" if shown else ""


def _bare(address: Vip) -> str:
    # Without the %interface of a link-local address: packets do not carry it.
    return str(type(address)(address.packed))

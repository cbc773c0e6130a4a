"""The lab's wires: a namespace that is the switch, with bridges `lan` and `hb`, and the faults.

Faults are nftables rules of the bridge family on the forward hook, so the places see nothing of
them: their links stay up. A port pulled (`unplug`) is seen as carrier loss. Nothing here knows what
the places run.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tests.netns.labkit.place import LabError
from tests.netns.namespaces import Namespace, inside

VIP = "10.77.0.100"
VIP2 = "10.77.0.101"
VIP6 = "fd77::100"
GATEWAY = "10.77.0.254"
ANY = "*"


@dataclass(frozen=True)
class Address:
    """Where a place is on one network."""

    network: str
    interface: str
    mac: str
    ipv4: str
    ipv6: str | None = None


@dataclass(frozen=True)
class PlaceAddresses:
    """All addresses of one place; the first is on `lan`."""

    lan: Address
    hb: Address | None = None

    def all(self) -> tuple[Address, ...]:
        """Every network that the place is on."""
        return (self.lan,) if self.hb is None else (self.lan, self.hb)


def _place(host: int, heartbeat: bool = False) -> PlaceAddresses:
    lan = Address("lan", "eth0", f"02:77:00:00:00:{host:02x}", f"10.77.0.{host}", f"fd77::{host}")
    if not heartbeat:
        return PlaceAddresses(lan)
    return PlaceAddresses(
        lan, Address("hb", "eth1", f"02:78:00:00:00:{host:02x}", f"10.78.0.{host}")
    )


#: a and b store; c is the client; w is the third place and the gateway.
PLACES = {"a": _place(1, True), "b": _place(2, True), "c": _place(10), "w": _place(254)}
NETWORKS = ("lan", "hb")


def port(place: str, network: str) -> str:
    """Name of the switch's port that leads to a place."""
    return f"{place}-{network}"


@dataclass(frozen=True)
class _Fault:
    source: str
    target: str
    network: str
    what: str  # "all" or "udp"


@dataclass
class Switch:
    """The two bridges. `attach` wires a place, `detach` takes its wires; the rest is faults."""

    namespace: Namespace
    _faults: dict[_Fault, int] = field(default_factory=dict)
    _silenced: set[str] = field(default_factory=set)

    @staticmethod
    def make() -> Switch:
        """Makes the namespace with both bridges, no port yet."""
        namespace = Namespace("lan")
        with inside(namespace):
            _write(
                "/proc/sys/net/ipv6/conf/all/disable_ipv6", "1"
            )  # the switch itself must not speak
            _write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")
        lines = []
        for name in NETWORKS:
            lines.append(
                f"link add {name} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"
            )
            lines.append(f"link set {name} up")
        _batch(namespace, lines)
        return Switch(namespace)

    def attach(self, place: str, namespace: Namespace) -> None:
        """Wires a place's namespace to its networks; gives it its addresses and default route."""
        addresses = PLACES[place].all()
        with inside(namespace):
            for family in ("all", "default"):
                for key, value in _IPV6_SETTINGS.items():
                    _write(f"/proc/sys/net/ipv6/conf/{family}/{key}", value)
        wires, inner = [], []
        for address in addresses:
            name = port(place, address.network)
            wires.append(
                f"link add {name} type veth peer name {address.interface}"
                f" address {address.mac} netns {namespace.name}"
            )
            wires.append(f"link set {name} master {address.network} up")
            inner.append(f"addr add {address.ipv4}/24 dev {address.interface}")
            if address.ipv6:
                inner.append(f"addr add {address.ipv6}/64 dev {address.interface} nodad")
            inner.append(f"link set {address.interface} up")
        if addresses[0].ipv4 != GATEWAY:
            inner.append(f"route add default via {GATEWAY}")
        if place in self._silenced:
            self._silenced.remove(place)
            self._apply()
        _batch(self.namespace, wires)
        _batch(namespace, inner)

    def silence(self, place: str) -> None:
        """Nothing that the place sends arrives any more, on all networks at once.

        It sees nothing of it, so it cannot say with its last breath that a link went down. Ends
        when it is wired again.
        """
        self._silenced.add(place)
        self._apply()

    def detach(self, place: str) -> None:
        """Takes the wires of a place away."""
        names = [port(place, address.network) for address in PLACES[place].all()]
        _batch(self.namespace, [f"link del {name}" for name in names])

    def unplug(self, place: str, network: str = "lan") -> None:
        """Takes the carrier from a place's interface."""
        self.namespace.ip("link", "set", port(place, network), "down")

    def plug(self, place: str, network: str = "lan") -> None:
        """Gives the carrier back."""
        self.namespace.ip("link", "set", port(place, network), "up")

    def lose(
        self,
        source: str,
        target: str = ANY,
        *,
        percent: int = 100,
        network: str | None = None,
        both_ways: bool = True,
        what: str = "all",
    ) -> None:
        """Loses percent of the frames from source to target (`*`: anybody), on one network or all.

        what: "all", or "udp": between two storage nodes that is their heartbeat, as NFS is TCP.
        """
        if what not in ("all", "udp") or not 0 < percent <= 100:
            raise LabError(f"no such fault: what={what} percent={percent}")
        pairs = [(source, target), (target, source)] if both_ways else [(source, target)]
        for one, other in pairs:
            for name in (network,) if network else NETWORKS:
                self._faults[_Fault(one, other, name, what)] = percent
        self._apply()

    def mend(self, place: str) -> None:
        """Ends the losses between a place and everybody (`*`), and no other."""
        for fault in [one for one in self._faults if {one.source, one.target} == {place, ANY}]:
            del self._faults[fault]
        self._apply()

    def heal(self) -> None:
        """Ends every loss; unplugged ports stay unplugged."""
        if self._faults:
            self._faults.clear()
            self._apply()

    def _apply(self) -> None:
        rules = [_rule(fault, percent) for fault, percent in self._faults.items()]
        for place in self._silenced:
            for network in NETWORKS:
                rules.append(_rule(_Fault(place, ANY, network, "all"), 100))
                rules.append(_rule(_Fault(ANY, place, network, "all"), 100))
        ruleset = "\n".join(
            [
                "table bridge faults",
                "delete table bridge faults",
                "table bridge faults {",
                "chain forwarding { type filter hook forward priority 0; policy accept;",
                *rules,
                "}",
                "}",
                "",
            ]
        )
        argv = ["ip", "netns", "exec", self.namespace.name, "nft", "-f", "-"]
        done = subprocess.run(
            argv, input=ruleset, text=True, capture_output=True, timeout=30, check=False
        )
        if done.returncode != 0:
            raise LabError(f"nft: {done.stderr}\n{ruleset}")


# No duplicate address detection (it takes a second), nothing learnt from routers: there are none.
_IPV6_SETTINGS = {
    "accept_dad": "0",
    "dad_transmits": "0",
    "accept_ra": "0",
    "router_solicitations": "0",
}


def _rule(fault: _Fault, percent: int) -> str:
    words = []
    if fault.source != ANY:
        words.append(f'iifname "{port(fault.source, fault.network)}"')
    if fault.target != ANY:
        words.append(f'oifname "{port(fault.target, fault.network)}"')
    if fault.what == "udp":
        words.append("meta l4proto udp")
    if percent < 100:
        words.append(f"numgen random mod 100 < {percent}")
    return " ".join([*words, "drop"])


def _batch(namespace: Namespace, lines: list[str]) -> None:
    argv = ["ip", "-n", namespace.name, "-batch", "-"]
    text = "\n".join(lines) + "\n"
    done = subprocess.run(argv, input=text, text=True, capture_output=True, timeout=30, check=False)
    if done.returncode != 0:
        raise LabError(f"ip -batch in {namespace.name}: {done.stderr}\n{text}")


def _write(path: str, value: str) -> None:
    Path(path).write_text(value)

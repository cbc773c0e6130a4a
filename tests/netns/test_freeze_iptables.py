"""The freeze by iptables-legacy against the real kernel: its place among the rules of others."""

import asyncio
import resource
from collections.abc import Awaitable, Callable, Iterator

import pytest

from nfsha.vip.freeze import Guarded, LeaseVerdict
from nfsha.vip.iptables import CHAIN_IN, CHAIN_OUT, IptablesLease
from tests.netns import freezekit
from tests.netns.freezekit import GUARDED, PEERS, VIPS, boottime_ms
from tests.netns.namespaces import Namespace, inside, namespaces

LONG_MS = 20_000
FIRST = ["-A INPUT -j NFSHA-IN", "-A OUTPUT -j NFSHA-OUT"]


@pytest.fixture
def bare() -> Iterator[Namespace]:
    with namespaces("bare") as (node,):
        yield node


def play(
    node: Namespace,
    body: Callable[[IptablesLease], Awaitable[None]],
    guarded: Guarded = GUARDED,
) -> None:
    freezekit.play(node, lambda: IptablesLease(guarded, boottime_ms), body)


def saved(node: Namespace, program: str = "iptables-legacy") -> list[str]:
    lines = node.exec(f"{program}-save").splitlines()
    return [line for line in lines if line.startswith("-A")]


@pytest.mark.parametrize("program", ["iptables-legacy", "ip6tables-legacy"])
@pytest.mark.parametrize(
    "tampering",
    [
        ["-F", CHAIN_IN],
        ["-F", "INPUT"],
        ["-I", "INPUT", "-p", "tcp", "-j", "ACCEPT"],
        ["-I", CHAIN_OUT, "-j", "RETURN"],
        ["-D", "OUTPUT", "-j", CHAIN_OUT],
        ["-A", "FORWARD", "-j", CHAIN_IN],
        ["-D", CHAIN_IN, "-i", "lo", "-j", "RETURN"],
    ],
    ids=" ".join,
)
def test_tampering_is_noticed_and_repaired(
    bare: Namespace, program: str, tampering: list[str]
) -> None:
    async def body(lease: IptablesLease) -> None:
        await lease.install()
        assert (await lease.open(boottime_ms() + LONG_MS)).held
        bare.exec(program, *tampering)
        assert not await lease.intact()
        outcome = await lease.renew(boottime_ms() + LONG_MS)
        assert outcome.verdict is LeaseVerdict.BROKEN
        await lease.install()
        assert await lease.intact()
        assert await lease.live() == {}
        ours = [line for line in saved(bare, program) if line.endswith((CHAIN_IN, CHAIN_OUT))]
        assert ours == FIRST
        assert saved(bare, program)[0] == FIRST[0]

    play(bare, body)


def test_a_rule_of_others_that_changes_nothing_for_us_is_let_be(bare: Namespace) -> None:
    async def body(lease: IptablesLease) -> None:
        await lease.install()
        await lease.open(boottime_ms() + LONG_MS)
        bare.exec("iptables-legacy", "-A", "INPUT", "-p", "tcp", "-j", "ACCEPT")
        assert await lease.intact()
        assert (await lease.renew(boottime_ms() + LONG_MS)).held

    play(bare, body)


def test_old_hooks_of_any_form_are_taken_out(bare: Namespace) -> None:
    for arguments in (
        ["-N", CHAIN_IN],
        ["-A", "INPUT", "-p", "tcp", "-j", CHAIN_IN],
        ["-A", "INPUT", "-j", CHAIN_IN],
        ["-A", "INPUT", "-j", CHAIN_IN],
        ["-A", "FORWARD", "-s", "10.0.0.0/8", "-g", CHAIN_IN],
        ["-A", CHAIN_IN, "-j", "ACCEPT"],
    ):
        bare.exec("iptables-legacy", *arguments)

    async def body(lease: IptablesLease) -> None:
        await lease.install()
        others = [line for line in saved(bare) if not line.startswith("-A NFSHA-")]
        assert others == FIRST
        await lease.remove()
        assert saved(bare) == []

    play(bare, body)


def test_more_ports_than_one_rule_can_hold(bare: Namespace) -> None:
    many = Guarded(VIPS, PEERS, {f"service-{port}": port for port in range(3000, 3032)})

    async def body(lease: IptablesLease) -> None:
        await lease.check()
        await lease.install()
        assert await lease.intact()
        closed = [line for line in saved(bare) if line.endswith("DROP") and "tcp" in line]
        named = {
            port
            for line in closed
            if line.startswith(f"-A {CHAIN_IN} -p tcp")
            for port in line.split("--dports ")[1].split()[0].split(",")
        }
        assert named == {str(port) for port in range(3000, 3032)}

    play(bare, body, many)


def test_a_renewal_starts_no_process(bare: Namespace) -> None:
    async def body(lease: IptablesLease) -> None:
        await lease.install()
        await lease.open(boottime_ms() + LONG_MS)
        # The first fault of memory is counted for a child as soon as somebody has waited for it.
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
        for _ in range(200):
            assert (await lease.renew(boottime_ms() + LONG_MS)).held
        assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt == before

    play(bare, body)


def test_a_check_leaves_nothing(bare: Namespace) -> None:
    async def body(lease: IptablesLease) -> None:
        await lease.check()
        for program in ("iptables-legacy", "ip6tables-legacy"):
            assert "NFSHA" not in bare.exec(f"{program}-save")

    play(bare, body)


def test_what_fails_in_one_ip_version_is_open_in_none(bare: Namespace) -> None:
    async def body(lease: IptablesLease) -> None:
        await lease.install()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lease._families[1], "set", closes_only(lease))
            with pytest.raises(RuntimeError, match="no IPv6 today"):
                await lease.open(boottime_ms() + LONG_MS)
        assert await lease.live() == {}
        assert await lease.intact()

    play(bare, body)


def closes_only(lease: IptablesLease) -> Callable[..., Awaitable[None]]:
    real = lease._families[1].set

    async def set_(*, opened: bool) -> None:
        if opened:
            raise RuntimeError("no IPv6 today")
        await real(opened=False)

    return set_


def test_one_ip_version_alone_opens_and_closes(bare: Namespace) -> None:
    guarded = Guarded(vips=VIPS[:1], peers=PEERS, ports=GUARDED.ports)

    async def body() -> None:
        lease = IptablesLease(guarded, boottime_ms)
        again = IptablesLease(guarded, boottime_ms)
        try:
            await lease.install()
            assert (await lease.open(boottime_ms() + 5000)).held
            await again.install()  # a restarted daemon leaves open what is open
            assert (await again.renew(boottime_ms() + 5000)).held
            await again.close()
            assert await again.live() == {}
            assert not (await again.renew(boottime_ms() + 5000)).held
        finally:
            lease.shut()
            again.shut()

    with inside(bare):
        asyncio.run(body())

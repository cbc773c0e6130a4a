"""Telling clients that their server changed: the bytes of NSM, and who is told how often."""

from __future__ import annotations

import asyncio
import struct
from ipaddress import ip_address
from typing import Any, cast

import pytest

from nfsha.nfs import nsm
from nfsha.nfs.names import IPAddress, Resolver
from nfsha.nfs.nsm import Round, Teller, decode_port, notify_call, port_call
from nfsha.nfs.rpc import Answered, RpcResult, TimedOut, encode_call
from nfsha.nfs.xdr import XdrError

VIP4, VIP6 = ip_address("192.0.2.10"), ip_address("2001:db8::10")
SILENT = TimedOut(connected=True)


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


# ------------------------------------------------------------------ bytes


def test_a_notification_is_what_xnfs_chapter_11_says() -> None:
    sent = encode_call(0x01020304, notify_call("192.0.2.10", 77))
    # RFC 5531: xid, CALL, version 2, SM_PROG, SM_VERS, SM_NOTIFY, AUTH_NONE twice
    header = words(0x01020304, 0, 2, 100024, 1, 6, 0, 0, 0, 0)
    # stat_chge: string mon_name<1024>, int state
    assert sent == header + words(10) + b"192.0.2.10\0\0" + words(77)


@pytest.mark.parametrize(
    ("name", "state"),
    [("", 1), ("x" * 1025, 1), ("x", 2), ("x", 0), ("x", -1), ("x", (1 << 31) + 1)],
)
def test_what_nsm_cannot_say_is_refused(name: str, state: int) -> None:
    with pytest.raises(ValueError, match="no notification"):
        notify_call(name, state)


def test_the_port_is_asked_as_each_family_has_it() -> None:
    # RFC 1833, section 3.1: struct mapping of PMAPPROC_GETPORT, IPPROTO_UDP
    header = words(1, 0, 2, 100000, 2, 3, 0, 0, 0, 0)
    assert encode_call(1, port_call(4)) == header + words(100024, 1, 17, 0)
    # Section 2.1: struct rpcb of RPCBPROC_GETADDR: program, version, netid, address, owner
    header = words(1, 0, 2, 100000, 4, 3, 0, 0, 0, 0)
    rpcb = words(100024, 1, 4) + b"udp6" + words(0, 0)
    assert encode_call(1, port_call(6)) == header + rpcb


def test_the_port_is_read_as_each_family_tells_it() -> None:
    assert decode_port(words(20049), 4) == 20049
    assert decode_port(words(0), 4) == 0
    assert decode_port(words(8) + b"::.78.81", 6) == 20049
    assert decode_port(words(0), 6) == 0
    for results, family in ((b"", 4), (words(70000), 4), (words(4) + b"what", 6)):
        with pytest.raises(XdrError):
            decode_port(results, family)


# ------------------------------------------------------------------ who is told, and how often


class FakeTeller:
    """Notes who is told, and answers what it is given for each client, the last for ever."""

    def __init__(self, vip: IPAddress, **answers: list[RpcResult]) -> None:
        self.vip = vip
        self.told: list[tuple[str, str, int]] = []
        self._answers = answers

    async def tell(self, client: IPAddress, name: str, state: int) -> RpcResult:
        self.told.append((str(client), name, state))
        answers = self._answers.get(f"host{str(client).rpartition('.')[2]}", [Answered()])
        return answers.pop(0) if len(answers) > 1 else answers[0]


class FakeResolver:
    """Knows `later` when it is asked a second time."""

    def __init__(self) -> None:
        self.asked = 0

    async def addresses_of(self, host: str) -> tuple[IPAddress, ...]:
        if host != "later":
            return await Resolver().addresses_of(host)
        self.asked += 1
        return (ip_address("192.0.2.3"),) if self.asked > 1 else ()


def told(
    tellers: list[FakeTeller], clients: list[str], names: dict[IPAddress, str] | None = None
) -> Round:
    async def tell() -> Round:
        resolver: Any = FakeResolver()
        made = Round(cast("list[Teller]", tellers), 7, names or {}, resolver, try_at_s=(0, 0, 0.01))
        await made.tell_all(clients)
        return made

    return asyncio.run(tell())


def test_each_is_told_until_it_answers_and_no_longer_than_the_schedule() -> None:
    teller = FakeTeller(VIP4, host1=[SILENT, Answered()], host2=[SILENT])
    made = told([teller], ["192.0.2.1", "192.0.2.2", "192.0.2.9"])
    counts = [teller.told.count((f"192.0.2.{n}", "192.0.2.10", 7)) for n in (1, 2, 9)]
    assert counts == [2, 3, 1]
    assert (made.tally.total, made.tally.answered, made.tally.given_up) == (3, 2, 1)


def test_a_client_is_told_from_the_vips_of_its_family_under_all_their_names() -> None:
    four, six = FakeTeller(VIP4), FakeTeller(VIP6)
    told([four, six], ["::ffff:192.0.2.1", "2001:db8::1"], {VIP4: "nfs.example"})
    assert four.told == [("192.0.2.1", "192.0.2.10", 7), ("192.0.2.1", "nfs.example", 7)]
    assert six.told == [("2001:db8::1", "2001:db8::10", 7)]


def test_what_was_answered_is_not_told_again() -> None:
    teller = FakeTeller(VIP4, host1=[Answered(), SILENT, Answered()])
    told([teller], ["192.0.2.1"], {VIP4: "nfs.example"})
    assert [name for _, name, _ in teller.told] == ["192.0.2.10", "nfs.example", "nfs.example"]


def test_a_name_that_nobody_knows_yet_is_looked_up_again() -> None:
    teller = FakeTeller(VIP4)
    assert told([teller], ["later"]).tally.answered == 1
    assert teller.told == [("192.0.2.3", "192.0.2.10", 7)]


def test_the_tries_are_bounded_and_end_when_those_of_sm_notify_do() -> None:
    assert nsm.TRY_AT_S[-1] == 15 * 60
    assert list(nsm.TRY_AT_S) == sorted(nsm.TRY_AT_S)


def test_without_the_right_to_speak_nothing_is_sent() -> None:
    async def tell() -> RpcResult:
        teller = await Teller.open(ip_address("127.0.0.1"), lambda: False)
        try:
            return await teller.tell(ip_address("127.0.0.1"), "x", 1)
        finally:
            teller.close()
            await asyncio.sleep(0)  # it is closed in the next turn of the loop

    assert str(asyncio.run(tell())).endswith("this node may not speak for the VIP now")


def test_no_socket_where_the_vip_is_not() -> None:
    with pytest.raises(nsm.NsmError, match=r"^no socket at 192\.0\.2\.10: "):
        asyncio.run(Teller.open(VIP4, lambda: True))

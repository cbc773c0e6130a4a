"""What stands in rsyncd.conf, whose credentials are whose, and who shares a publishing."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfsha.core.model import Epoch, Role
from nfsha.replica.source.doorkeeper import filter_for
from nfsha.replica.source.fresh import Coalesced, NotFreshError
from nfsha.replica.source.source import (
    EpochToken,
    PathRefusedError,
    Source,
    SourceVolume,
    _Offer,
    config_path,
    epoch_token,
)

EPOCH = Epoch(7, "0123456789abcdef", Role.STANDBY)
UUID = "12345678-1234-1234-1234-123456789abc"
OTHER = "22345678-1234-1234-1234-123456789abc"


def test_a_token_is_the_epochs_and_the_keys() -> None:
    token = epoch_token(b"k" * 32, EPOCH)
    assert token.user == "nfsha-7-0123456789abcdef"
    message = b"nfsha replication\x007" + b"0123456789abcdef"
    assert token.password == hmac.new(b"k" * 32, message, hashlib.sha256).hexdigest()
    others = [
        epoch_token(b"K" * 32, EPOCH),
        epoch_token(b"k" * 32, Epoch(8, EPOCH.id, EPOCH.authority)),
        epoch_token(b"k" * 32, Epoch(7, "0123456789abcdee", EPOCH.authority)),
    ]
    assert len({token.password, *(other.password for other in others)}) == 4
    assert token.password not in repr(token)


@pytest.mark.parametrize(
    ("path", "written"),
    [
        ("/nfs/a", b"/nfs/a/"),
        ("/nfs/two words ", b"/nfs/two words /"),
        ("/nfs/back\\", b"/nfs/back\\/"),
        ("/nfs/#no comment", b"/nfs/#no comment/"),
        ("/nfs/100%", b"/nfs/100%/"),
        ("/nfs/[x]", b"/nfs/[x]/"),
        ("/nfs/\udcff", b"/nfs/\xff/"),
    ],
)
def test_odd_paths_are_written_so_that_rsync_reads_them_back(path: str, written: bytes) -> None:
    assert config_path(Path(path)) == written


@pytest.mark.parametrize(
    "path",
    ["/nfs/a\nb", "/nfs/a\rb", "/nfs/\x7f", "nfs", "/nfs/../etc", "/nfs/%HOME%", "/" + "x" * 4001],
)
def test_paths_that_rsync_would_read_otherwise_are_refused(path: str) -> None:
    with pytest.raises(PathRefusedError):
        config_path(Path(path))


@given(st.text(max_size=60))
def test_no_path_can_add_a_line(name: str) -> None:
    try:
        written = config_path(Path("/nfs") / name.replace("\0", ""))
    except (PathRefusedError, UnicodeEncodeError):
        return
    assert len((b"path = " + written).splitlines()) == 1
    assert written.strip(b" \t") == written
    assert not written.endswith(b"\\")


@pytest.mark.parametrize("folder", ["/run/two words", "/run/$(x)", "relative", "/run/%HOME%"])
def test_a_folder_that_a_shell_would_read_otherwise_is_refused(folder: str) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        Source(Path(folder), "127.0.0.1", 7911, "127.0.0.2", lambda: 0)


@pytest.mark.parametrize("peer", ["*", "example.org", "10.0.0.0/8", ""])
def test_the_peer_is_one_address(peer: str) -> None:
    with pytest.raises(ValueError, match="address"):
        Source(Path("/run/x"), "127.0.0.1", 7911, peer, lambda: 0)


def test_both_ends_are_of_one_family() -> None:
    with pytest.raises(ValueError, match="two families"):
        Source(Path("/run/x"), "127.0.0.1", 7911, "::1", lambda: 0)


@given(st.ip_addresses(), st.integers(0, 2**128 - 1))
def test_the_filter_lets_the_peer_through_and_nobody_else(
    peer: IPv4Address | IPv6Address, number: int
) -> None:
    other = type(peer)(number % 2**peer.max_prefixlen)
    assert admits(filter_for(peer), peer)
    assert admits(filter_for(peer), other) == (other == peer)


def admits(
    instructions: list[tuple[int, int, int, int]], source: IPv4Address | IPv6Address
) -> bool:
    """Runs a socket filter on the network header of a packet from there."""
    header = bytes(12 if source.version == 4 else 8) + source.packed
    at = word = 0
    while True:
        code, if_true, if_false, constant = instructions[at]
        match code:
            case 0x20:
                offset = (constant + 0x100000) & 0xFFFFFFFF
                word = int.from_bytes(header[offset : offset + 4], "big")
            case 0x15:
                at += if_true if word == constant else if_false
            case _:
                return constant > 0
        at += 1


def test_only_a_larger_offer_under_the_same_token_lets_connections_go_on() -> None:
    token, later = EpochToken("a", "b"), EpochToken("c", "d")
    one, two = SourceVolume(UUID, Path("/nfs/a")), SourceVolume(OTHER, Path("/nfs/b"))
    moved = SourceVolume(UUID, Path("/nfs/c"))
    small, large = _Offer(token, {one: 7}), _Offer(token, {one: 7, two: 8})
    assert small.is_within(small)
    assert small.is_within(large)
    assert not large.is_within(small)
    assert not small.is_within(_Offer(later, {one: 7}))
    assert not small.is_within(_Offer(token, {one: 9}))
    assert not small.is_within(_Offer(token, {moved: 7}))


class Publishing:
    """A call that ends when it is told to."""

    def __init__(self) -> None:
        self.begun = self.ended = 0
        self._may_end = asyncio.Semaphore(0)
        self.fails = False
        self.end_one = self._may_end.release

    async def __call__(self) -> None:
        assert self.begun == self.ended, "two at a time"
        self.begun += 1
        await self._may_end.acquire()
        self.ended += 1
        if self.fails:
            raise NotFreshError("no room")


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_who_asks_while_it_is_published_gets_the_next_and_all_share_it() -> None:
    async def main() -> None:
        call = Publishing()
        fresh = Coalesced(call)
        first = [asyncio.ensure_future(fresh()) for _ in range(3)]
        await turns()
        assert call.begun == 1
        later = [asyncio.ensure_future(fresh()) for _ in range(3)]
        await turns()
        call.end_one()
        await turns()
        assert (call.begun, call.ended) == (2, 1)
        assert [each.done() for each in (*first, *later)] == [True] * 3 + [False] * 3
        call.end_one()
        await asyncio.gather(*first, *later)
        call.end_one()
        await fresh()
        assert (call.begun, call.ended) == (3, 3)

    asyncio.run(main())


def test_who_gives_up_ends_nothing_and_a_failure_reaches_all_who_wait() -> None:
    async def main() -> None:
        call = Publishing()
        fresh = Coalesced(call)
        waiting = [asyncio.ensure_future(fresh()) for _ in range(3)]
        await turns()
        waiting.pop().cancel()
        await turns()
        assert (call.begun, call.ended) == (1, 0)
        call.fails = True
        call.end_one()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert [str(each) for each in found] == ["no room"] * 2
        call.fails = False
        call.end_one()
        await fresh()
        assert call.ended == 2

    asyncio.run(main())

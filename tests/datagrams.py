"""Datagrams with every field said, for tests of what carries them."""

from __future__ import annotations

from nfsha.core.model import Datagram, Echo, Epoch, Phase, PromiseState, Role

SERVING = Datagram(
    role=Role.PRIMARY,
    session=0x0123456789ABCDEF,
    seq=77,
    echo=Echo(0xFEDCBA9876543210, 78),
    echo_grants=True,
    pending=(),
    phase=Phase.ACTIVE,
    serving=True,
    epoch=Epoch(3, "00112233445566ff", Role.PRIMARY),
    blank=False,
    promise=PromiseState.NONE,
    peer_promise_held=False,
    healthy=True,
    whole=True,
    service_lease=True,
    agent_only=False,
    interval_ms=100,
    hold_ms=600,
    takeover_after_ms=1000,
    address_lease_ms=2000,
    absence_ms=0,
    known_number=4,
    handover=Epoch(5, "1122334455667788", Role.STANDBY),
    ready=True,
    aborted=Epoch(2, "2233445566778899", Role.PRIMARY),
    refuses=Epoch(4, "33445566778899aa", Role.STANDBY),
    asks=76,
)
"""A primary that serves, with its echo of a peer that it hears."""

WAITING = Datagram(
    role=Role.PRIMARY,
    session=7,
    seq=0,
    echo=None,
    echo_grants=False,
    pending=(),
    phase=Phase.WAITING,
    serving=False,
    epoch=None,
    blank=True,
    promise=PromiseState.NONE,
    peer_promise_held=False,
    healthy=True,
    whole=False,
    service_lease=True,
    agent_only=False,
    interval_ms=100,
    hold_ms=600,
    takeover_after_ms=1000,
    address_lease_ms=2000,
    absence_ms=0,
)
"""A new primary that has heard nobody."""

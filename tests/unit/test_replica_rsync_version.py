"""What `rsync --version` says, what is missing, and which holes are left."""

from __future__ import annotations

import pytest

from nfsha.replica.rsync.rsync_version import HOLES, Abilities, _upstream, missing, parse, warnings

DEBIAN_12 = """\
rsync  version 3.2.7  protocol version 31
Copyright (C) 1996-2022 by Andrew Tridgell, Wayne Davison, and others.
Capabilities:
    64-bit files, 64-bit inums, 64-bit timestamps, 64-bit long ints,
    socketpairs, symlinks, symtimes, hardlinks, hardlink-specials,
    hardlink-symlinks, IPv6, atimes, batchfiles, inplace, append, ACLs,
    xattrs, optional secluded-args, iconv, prealloc, stop-at, no crtimes
Optimizations:
    SIMD-roll, no asm-roll, openssl-crypto, no asm-MD5
"""
BARE = DEBIAN_12.replace("ACLs", "no ACLs").replace("xattrs", "no xattrs")


def parsed(text: str) -> Abilities:
    found = parse(text)
    assert found is not None
    return found


def speaking(version: tuple[int, int, int], protocol: int = 31) -> Abilities:
    return Abilities(version, protocol, frozenset())


def test_an_old_number_with_the_protocol_of_the_mended_ones_is_believed() -> None:
    (sentence,) = warnings(speaking((3, 2, 7), 32), "", ())
    assert "CVE-2024-12084" not in sentence
    assert "CVE-2025-10158" in sentence


def test_debian_12_is_read_and_can_do_all() -> None:
    found = parsed(DEBIAN_12)
    assert (found.version, found.protocol) == ((3, 2, 7), 31)
    assert {"64-bit files", "ACLs", "xattrs", "no crtimes", "stop-at"} <= found.names
    assert not any("openssl" in name or "\n" in name for name in found.names)
    assert missing(found) == ""


@pytest.mark.parametrize("said", ["3.4.0pre2", "v3.5.1dev", "3.10.0"])
def test_versions_that_are_no_plain_release_are_read(said: str) -> None:
    found = parsed(DEBIAN_12.replace("3.2.7", said))
    assert found.version > (3, 3, 9)


@pytest.mark.parametrize("text", ["", "ls (GNU coreutils) 9.1", DEBIAN_12.split("Capab", 1)[0]])
def test_another_program_is_none(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (DEBIAN_12.replace("3.2.7", "3.2.3"), "has no --fsync: at least 3.2.4 is needed"),
        (DEBIAN_12.replace("sion 31", "sion 30"), "speaks protocol 30: at least 31 is needed"),
        (BARE, "was built without access control lists, extended attributes"),
        (DEBIAN_12.replace(" hardlinks,", " no hardlinks,"), "was built without hard links"),
        (DEBIAN_12.replace("64-bit files", "32-bit files"), "files above 2 GiB"),
    ],
)
def test_what_is_missing_is_refused_in_words(text: str, why: str) -> None:
    assert why in missing(parsed(text))


def test_an_old_rsync_has_all_holes_and_a_new_one_none() -> None:
    (sentence,) = warnings(speaking((3, 2, 7)), "", ())
    assert all(hole.names in sentence for hole in HOLES)
    assert "unless your distribution mended it" in sentence
    assert "install 3.5.0 or later" in sentence
    assert warnings(speaking((3, 5, 0), 32), "", ()) == ()


def test_a_mended_package_keeps_the_holes_that_it_did_not_mend() -> None:
    (sentence,) = warnings(speaking((3, 2, 7)), "3.2.7-1+deb12u2", HOLES[:1])
    assert "rsync 3.2.7-1+deb12u2 has known holes" in sentence
    assert "CVE-2024-12084" not in sentence
    assert "CVE-2025-10158" in sentence
    assert "unless" not in sentence


def test_only_a_hole_of_its_own_time_is_named() -> None:
    (sentence,) = warnings(speaking((3, 4, 2), 32), "", ())
    assert "CVE-2024-12084" not in sentence
    assert "CVE-2026-43618" in sentence


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("3.2.7-1+deb12u2", (3, 2, 7)),
        ("1:3.4.1+ds1-5", (3, 4, 1)),
        ("3.5.0", (3, 5, 0)),
        ("3.2.70-1", (3, 2, 70)),
        ("rsync", None),
        ("", None),
    ],
)
def test_the_number_of_rsync_in_that_of_a_package(
    package: str, version: tuple[int, int, int] | None
) -> None:
    assert _upstream(package) == version


def test_each_mended_package_belongs_to_an_older_version() -> None:
    for hole in HOLES:
        for package in hole.mended_packages:
            own = _upstream(package)
            assert own is not None
            assert own < hole.mended

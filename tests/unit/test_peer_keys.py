"""The key file: what is accepted, what is refused and with which words, and rotation."""

from __future__ import annotations

import base64
import os
import stat
from pathlib import Path

import pytest

from nfsha.peer import keys
from nfsha.peer.keys import Key, KeyFileError, KeyRing

FIRST = Key(bytes(range(32)))
SECOND = Key(bytes(range(1, 33)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cluster.key"


def put(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def test_a_new_file_is_private_and_is_read_back(path: Path) -> None:
    old_umask = os.umask(0o277)
    try:
        keys.write_new(path, FIRST)
    finally:
        os.umask(old_umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.load(path) == KeyRing((FIRST,))


def test_a_key_file_is_never_overwritten(path: Path) -> None:
    keys.write_new(path, FIRST)
    with pytest.raises(KeyFileError, match=r"there is a key file already") as caught:
        keys.write_new(path, SECOND)
    assert caught.value.path == path
    assert keys.load(path).sealing == FIRST


def test_a_symbolic_link_is_not_followed_when_writing(path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KeyFileError):
        keys.write_new(path, FIRST)
    assert not (tmp_path / "elsewhere").exists()


def test_hexadecimal_base64_and_comments_are_read_in_order(path: Path) -> None:
    padded = base64.b64encode(SECOND.secret).decode()
    third = Key(bytes(range(2, 34)))
    bare = base64.b64encode(third.secret).decode().rstrip("=")
    put(path, f"# keys\n\n{FIRST.secret.hex().upper()} # old\n  {padded}\n{bare}\n")
    ring = keys.load(path)
    assert ring.keys == (FIRST, SECOND, third)
    assert ring.sealing == FIRST


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o601, 0o610, 0o602])
def test_a_file_that_others_can_touch_is_refused(path: Path, mode: int) -> None:
    put(path, FIRST.secret.hex(), mode)
    with pytest.raises(KeyFileError, match=rf"mode {mode:04o}.*chmod 0600"):
        keys.load(path)


def test_a_file_of_another_user_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(path, FIRST.secret.hex())
    regular = os.stat_result((0o100600, 1, 1, 1, 12345, 0, 64, 0, 0, 0))
    monkeypatch.setattr(os, "fstat", lambda _descriptor: regular)
    with pytest.raises(KeyFileError, match=r"belongs to user 12345.*chown root"):
        keys.load(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds 0 keys"),
        ("# nothing but a comment\n", "holds 0 keys"),
        ("abcd\n", r"line 1 is not a key \(4 characters\)"),
        (FIRST.secret.hex() + "\n" + FIRST.secret.hex()[:-1] + "\n", "line 2 is not a key"),
        (FIRST.secret.hex() + "\n" + FIRST.secret.hex() + "\n", "same key twice"),
        ("00" * 32 + "\n", "one repeated byte"),
        ("A" * 43 + "=\n", "one repeated byte"),
        ("\u00e4" * 64 + "\n", "ASCII"),
        ("#" * 20_000, "larger than"),
        ("\n".join(bytes([n, *range(31)]).hex() for n in range(40, 49)), "holds 9 keys"),
    ],
)
def test_an_unusable_file_is_refused_with_words(path: Path, text: str, words: str) -> None:
    put(path, text)
    with pytest.raises(KeyFileError, match=words) as caught:
        keys.load(path)
    assert caught.value.path == path
    assert caught.value.remedy


def test_no_message_shows_a_secret(path: Path) -> None:
    secret = FIRST.secret.hex()
    put(path, secret[:-2] + "zz\n")
    with pytest.raises(KeyFileError) as caught:
        keys.load(path)
    assert secret[:16] not in str(caught.value)
    assert secret[:16] not in repr(FIRST)
    assert repr(FIRST.secret) not in repr(FIRST)


def test_a_missing_file_a_folder_and_a_fifo_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"there is no key file.*nfsha keygen"):
        keys.load(path)
    with pytest.raises(KeyFileError, match=r"not a regular file"):
        keys.load(tmp_path)
    os.mkfifo(path, 0o600)
    with pytest.raises(KeyFileError, match=r"not a regular file"):
        keys.load(path)


def test_a_rotation_goes_through_last_first_and_removal(path: Path) -> None:
    keys.write_new(path, FIRST)
    assert keys.add_key(path, SECOND, seals=False).keys == (FIRST, SECOND)
    assert keys.load(path).sealing == FIRST
    assert keys.add_key(path, SECOND, seals=True).keys == (SECOND, FIRST)
    assert keys.load(path).sealing == SECOND
    assert keys.remove_key(path, FIRST.fingerprint).keys == (SECOND,)
    assert keys.load(path) == KeyRing((SECOND,))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_last_key_and_an_unknown_key_are_not_removed(path: Path) -> None:
    keys.write_new(path, FIRST)
    with pytest.raises(KeyFileError, match=r"holds no key"):
        keys.remove_key(path, SECOND.fingerprint)
    with pytest.raises(KeyFileError, match=r"holds 0 keys"):
        keys.remove_key(path, FIRST.fingerprint)
    assert keys.load(path) == KeyRing((FIRST,))


def test_too_many_keys_are_not_added(path: Path) -> None:
    keys.write_new(path, keys.generate())
    for _ in range(keys.MAX_KEYS - 1):
        keys.add_key(path, keys.generate(), seals=False)
    with pytest.raises(KeyFileError, match=r"holds 9 keys"):
        keys.add_key(path, keys.generate(), seals=False)
    assert len(keys.load(path).keys) == keys.MAX_KEYS


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"cannot be written.*must exist"):
        keys.write_new(tmp_path / "absent" / "cluster.key", FIRST)


def test_generated_keys_differ() -> None:
    assert len({keys.generate().secret for _ in range(100)}) == 100


@pytest.mark.parametrize("secret", [b"", b"x" * 31, bytes(range(33)), b"\x07" * 32])
def test_a_key_of_a_wrong_kind_cannot_be_made(secret: bytes) -> None:
    with pytest.raises(ValueError, match=r"a key"):
        Key(secret)

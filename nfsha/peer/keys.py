"""The cluster keys: the secrets that both nodes hold, and by which they know each other.

Reads and writes the key file, and nothing else: it seals nothing (`nfsha.peer.wire` does), it never
logs or prints a secret, and it never repairs a file whose mode or owner is wrong (somebody may have
read it).

The file holds one key of 32 bytes per line, in hexadecimal or base64; `#` begins a comment. The
first key seals, all of them open. So a rotation interrupts nothing: add the new key last on both
nodes, then move it first on both (`add_key(..., seals=True)` moves a key that is already there),
then drop the old one.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import re
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

KEY_BYTES = 32
"""Length of a key: the output size of SHA-256; RFC 2104 section 3 advises no shorter one."""

HINT_BYTES = 4
"""Length of a key's hint, the beginning of its SHA-256: enough to tell a few keys apart."""

MAX_KEYS = 8
"""More accepted keys than any rotation needs; a bound on what a receiver has to try or remember."""

_MAX_FILE_BYTES = 16 * 1024
_KEY_FILE_MODE = 0o600
_HEX = re.compile(r"[0-9A-Fa-f]{64}")
_BASE64 = re.compile(r"[A-Za-z0-9+/]{43}=?")
_MAKE_ANOTHER = "make one with `nfsha keygen`, and copy the same file to both nodes"


class KeyFileError(Exception):
    """A key file that cannot be used: where, what is wrong, what the operator can do about it."""

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        """Keeps the three parts apart, so that a caller can render them as it likes."""
        super().__init__(f"{path}: {problem}; {remedy}")
        self.path = path
        self.problem = problem
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Key:
    """One secret of `KEY_BYTES` bytes with its public hint. Its repr shows only the hint."""

    secret: bytes = field(repr=False)
    hint: bytes = field(init=False)

    def __post_init__(self) -> None:
        """Derives the hint. Raises ValueError for a wrong length and for one repeated byte."""
        if len(self.secret) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, this one has {len(self.secret)}")
        if len(set(self.secret)) == 1:
            raise ValueError("a key of one repeated byte is no secret")
        object.__setattr__(self, "hint", hashlib.sha256(self.secret).digest()[:HINT_BYTES])

    @property
    def fingerprint(self) -> str:
        """The hint in hexadecimal: safe to show, so that an operator can compare the two nodes."""
        return self.hint.hex()


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The accepted keys in the order of the file: the first seals, all open."""

    keys: tuple[Key, ...]

    def __post_init__(self) -> None:
        """Raises ValueError for no key, too many keys, or two keys with one hint."""
        if not 1 <= len(self.keys) <= MAX_KEYS:
            raise ValueError(f"holds {len(self.keys)} keys, needs 1 to {MAX_KEYS}")
        if len({key.hint for key in self.keys}) != len(self.keys):
            raise ValueError("holds the same key twice")

    @property
    def sealing(self) -> Key:
        """The key that seals."""
        return self.keys[0]


def generate() -> Key:
    """Makes a new key from the kernel's random source (getrandom(2))."""
    return Key(secrets.token_bytes(KEY_BYTES))


def load(path: Path) -> KeyRing:
    """Reads the key file. Raises KeyFileError for everything that makes it unusable or unsafe."""
    text = _read_checked(path)
    keys: list[Key] = []
    for number, line in enumerate(text.splitlines(), start=1):
        word = line.partition("#")[0].strip()
        if word:
            keys.append(_parse(path, number, word))
    try:
        return KeyRing(tuple(keys))
    except ValueError as error:
        raise KeyFileError(path, str(error), _MAKE_ANOTHER) from error


def write_new(path: Path, key: Key) -> None:
    """Creates the key file with one key, mode 0600, durable on return. Never overwrites (O_EXCL).

    Raises KeyFileError when the file is there already or cannot be written.
    """
    try:
        _create(path, (key,))
    except FileExistsError as error:
        remedy = "to change keys without an interruption add one; or move the old file away first"
        raise KeyFileError(path, "there is a key file already", remedy) from error
    except OSError as error:
        raise _unwritable(path, error) from error


def add_key(path: Path, key: Key, *, seals: bool) -> KeyRing:
    """Adds a key to the file for a rotation and returns the new ring. Atomic and durable.

    With `seals` the key comes first (it seals from now on; a key that is there already moves to the
    front), otherwise last (it only opens). Comments in the file are not kept. Raises KeyFileError.
    """
    ring = load(path)
    others = tuple(old for old in ring.keys if old != key)
    return _replace(path, (key, *others) if seals else (*others, key))


def remove_key(path: Path, fingerprint: str) -> KeyRing:
    """Drops the key with this fingerprint, the last step of a rotation. Atomic and durable.

    Raises KeyFileError when there is no such key, or no other one.
    """
    ring = load(path)
    kept = tuple(key for key in ring.keys if key.fingerprint != fingerprint)
    if len(kept) == len(ring.keys):
        known = ", ".join(key.fingerprint for key in ring.keys)
        raise KeyFileError(path, f"holds no key {fingerprint}", f"it holds {known}")
    return _replace(path, kept)


def _replace(path: Path, keys: tuple[Key, ...]) -> KeyRing:
    """Writes the keys beside the file and renames: a crash leaves the old file or the new one."""
    try:
        ring = KeyRing(keys)
    except ValueError as error:
        remedy = f"a key file holds 1 to {MAX_KEYS} keys"
        raise KeyFileError(path, f"would not be usable: {error}", remedy) from error
    beside = path.with_name(f".{path.name}.new-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        _create(beside, ring.keys)
        try:
            beside.rename(path)
        except OSError:
            beside.unlink()
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    return ring


def _read_checked(path: Path) -> str:
    try:
        # O_NONBLOCK: a FIFO by that name must be refused, not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise KeyFileError(path, "there is no key file", _MAKE_ANOTHER) from error
    except OSError as error:
        problem = f"cannot be opened: {error.strerror}"
        raise KeyFileError(path, problem, "the daemon's user must be able to read it") from error
    try:
        _check_status(path, os.fstat(descriptor))
        raw = os.read(descriptor, _MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(path, f"cannot be read: {error.strerror}", _MAKE_ANOTHER) from error
    finally:
        os.close(descriptor)
    if len(raw) > _MAX_FILE_BYTES:
        raise KeyFileError(path, f"is larger than {_MAX_FILE_BYTES} bytes", _MAKE_ANOTHER)
    try:
        return raw.decode("ascii")
    except UnicodeDecodeError as error:
        raise KeyFileError(path, "is not a text file of ASCII characters", _MAKE_ANOTHER) from error


def _check_status(path: Path, status: os.stat_result) -> None:
    """Judges the opened file, not its name: a symbolic link in the way makes no difference."""
    if not stat.S_ISREG(status.st_mode):
        raise KeyFileError(path, "is not a regular file", _MAKE_ANOTHER)
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        remedy = f"`chmod 0600 {path}`, and make a new key if others may have read it"
        raise KeyFileError(path, f"is open to others (mode {mode:04o})", remedy)
    if status.st_uid not in (0, os.geteuid()):
        problem = f"belongs to user {status.st_uid}, neither root nor the user who runs this"
        raise KeyFileError(path, problem, f"`chown root {path}`")


def _parse(path: Path, number: int, word: str) -> Key:
    # The secret itself, even a mistyped one, must not come into the message.
    wanted = "a key is 32 bytes: 64 hexadecimal digits, or 43 base64 characters and `=`"
    try:
        if _HEX.fullmatch(word):
            return Key(bytes.fromhex(word))
        if _BASE64.fullmatch(word):
            return Key(base64.b64decode(word.rstrip("=") + "=", validate=True))
    except (ValueError, binascii.Error) as error:
        raise KeyFileError(path, f"line {number}: {error}", _MAKE_ANOTHER) from error
    raise KeyFileError(path, f"line {number} is not a key ({len(word)} characters)", wanted)


def _create(path: Path, keys: tuple[Key, ...]) -> None:
    """Writes a file that must not exist yet, and makes it and its name durable."""
    lines = ["# nfsha cluster keys: the first one seals, all of them open. Keep this file secret."]
    lines += [f"{key.secret.hex()}  # {key.fingerprint}" for key in keys]
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, _KEY_FILE_MODE)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            os.fchmod(descriptor, _KEY_FILE_MODE)  # whatever the umask took away
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(descriptor)
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: Path, error: OSError) -> KeyFileError:
    remedy = f"{path.parent} must exist and be writable for the user who runs this"
    return KeyFileError(path, f"cannot be written: {error.strerror}", remedy)

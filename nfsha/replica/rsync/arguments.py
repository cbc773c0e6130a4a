"""The command lines of rsync: each option that the replica uses, and why.

Pure. It must not start anything. All is for rsync 3.2.7 and later; what an option does, and what
was seen when it was missing, stands beside it. Never used: `-u`, `--ignore-errors`, `--inplace`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Final, Protocol

from nfsha.replica.files.own_names import INCOMING, OWN_ROOT_NAMES, PARTIAL

__all__ = ["Course", "From", "Token", "fetch", "folder_list"]

CONTROL_MODULE: Final = "nfsha"
FETCH_TIMEOUT_S: Final = 10
SOCKET_OPTIONS: Final = "TCP_NODELAY"
"""Both sides answer each other in small pieces: without it they wait 40 ms three times in a session
for acknowledgements that are delayed (170 ms in all instead of 40, seen with a list of 2 files)."""

"""In the root while a copy runs: the files that are being received, never visible elsewhere."""


class Token(Protocol):
    """What the source asks for: good for one epoch only."""

    @property
    def user(self) -> str:
        """The name that rsync sends."""

    @property
    def password(self) -> str:
        """What it proves to know; never in an argument, for all to see."""


@dataclass(frozen=True, slots=True)
class From:
    """Where the source's rsync listens, and as whom to ask. `bind` is this side's address."""

    host: str
    port: int
    token: Token
    bind: str | None = None

    def url(self, module: str) -> str:
        """The place of a module. ValueError if the host is no address."""
        address = ip_address(self.host)
        host = f"[{address}]" if isinstance(address, IPv6Address) else str(address)
        return f"rsync://{self.token.user}@{host}:{self.port}/{module}/"


_SAME: Final = (
    # -a without -r, and hard links, ACLs, extended attributes
    "-lptgoDHAX",
    "--numeric-ids",
    "-x",  # a filesystem mounted inside is a volume of its own, here and there
    "--modify-window=-1",  # nanoseconds count: without it a change within one second is missed
    # xfs shows each ACL a second time under these names; from ext4 they would seem surplus, and
    # taking them away takes the folder's default ACL. A filter of -X drops rsync's own exception
    # for system.*, so that one is said too.
    "--filter=-x trusted.SGI_ACL_*",
    "--filter=-x system.*",
    *(f"--exclude=/{name.decode()}" for name in OWN_ROOT_NAMES),
    "--no-motd",
    "--no-human-readable",
)

# Looks for holes in all that it writes: in pieces of 1 KiB, 0.8 s of CPU time for a GiB.
_HOLES: Final = "-S"

# What was received of a large file is kept by a run that is cut; the next one goes on with it.
_PARTS: Final = (f"--partial-dir={PARTIAL.decode()}",)
# In its own place where no client can see it yet: a folder for each file's parts is looked for when
# the file comes and when it has come, a seventh of all system calls. (Above, the exclusion is
# implied.)
_PARTS_IN_PLACE: Final = ("--partial", f"--exclude={PARTIAL.decode()}/")

# A partial file whose original is gone would stay for ever, for rsync protects its folder. In these
# runs it is hidden there and may be deleted here, after the run that could have used it.
_OLD_PARTS: Final = tuple(f"--filter={kind} {PARTIAL.decode()}/" for kind in "HR")


@dataclass(frozen=True, slots=True)
class Course:
    """What all runs of one pass have in common."""

    source: From
    module: str
    target: str
    """The open root of the volume, as /proc/self/fd/N/."""
    timeout_s: int
    connect_timeout_s: int
    list_path: str | None
    """Where rsync reads the folders to compare, one level deep; None for everything."""
    backup: str | None
    checksum: bool
    again: bool = False
    """All that is listed is known to differ: it is not compared first."""

    def plan(self) -> list[str]:
        """Compares, and names what would be done. Changes nothing."""
        says = ("-n", "--delete", "--out-format=%i %n %l %M", "--info=stats2", *_OLD_PARTS)
        return self._line(*says, *self._reads(), *self._scope(self.list_path))

    def copy(
        self,
        *,
        make_way: int,
        bandwidth_kib_s: int | None,
        aside: bool = True,
        dense_up_to_bytes: int | None = None,
        sparse: bool = True,
    ) -> list[str]:
        """Copies what differs and deletes nothing.

        Except with `make_way` above 0: then folders may be emptied, of so many things at most,
        where the source has something else than a folder now. With `aside` files are received in
        the folder `INCOMING`, and how far it is is told; else they are received beside their
        places under rsync's own temporary names (a sixth faster with small files), and nothing is
        told (a line for each file: as much as this process, at its priority, can read).
        With `dense_up_to_bytes` no holes are looked for, and no file above that size is copied;
        without `sparse` neither, whatever the size.

        No --fsync: it syncs files one by one (30,000 small ones took 66 s instead of 5), but
        neither folders nor renames, so that the pass ends with syncfs(2) all the same.
        """
        way = ("--force", f"--max-delete={make_way}") if make_way else ()
        limit = () if bandwidth_kib_s is None else (f"--bwlimit={bandwidth_kib_s}",)
        holes = (_HOLES,) if sparse else ()
        if dense_up_to_bytes is not None:
            holes = (f"--max-size={dense_up_to_bytes}",)
        says = (*holes, *way, *limit, *self._kept(), *self._reads())
        scope = self._scope(self.list_path, at_once=not aside)
        if not aside:
            return self._line(*says, "--info=stats2", *scope, parts=_PARTS_IN_PLACE)
        incoming = f"--temp-dir={INCOMING.decode()}"
        return self._line(*says, incoming, "--info=progress2,stats2", *scope)

    def settle(self, list_path: str | None, *, deletions: int | None) -> list[str]:
        """Deletes, at most so many, and sets folders' attributes right; sends no file's content.

        A run of its own, because a deletion must rest on a list that is known to be whole:
        rsync with --delete-delay, fed folder by folder, has been seen to delete before it heard
        of an I/O error in a later folder. After --delete-after the whole list comes first.

        Not --ignore-existing: with it a link that stands here where the source has a folder by now
        would stay, and rsync 3.2.7 would look into the folder behind the link, and delete there.
        """
        nothing = () if deletions is None else ("--delete-after", f"--max-delete={deletions}")
        says = ("--existing", "--max-size=0", *nothing, *self._kept(), "--info=stats2")
        says += _OLD_PARTS
        return self._line(*says, *self._scope(list_path))

    def _reads(self) -> tuple[str, ...]:
        if self.again:
            return ("--ignore-times",)
        return ("--checksum",) if self.checksum else ()

    def _kept(self) -> tuple[str, ...]:
        return () if self.backup is None else ("--backup", f"--backup-dir={self.backup}")

    def _scope(self, list_path: str | None, *, at_once: bool = False) -> tuple[str, ...]:
        if list_path is None:
            # The whole list first: fed folder by folder, rsync with -H has been seen to wait for
            # itself for ever when the source changed meanwhile. `at_once` takes that risk, for a
            # first copy: it would be ended, and the next pass is none.
            return ("-r",) if at_once else ("-r", "--no-inc-recursive")
        # --trust-sender: else each name is compared with each listed folder, one after the other.
        # Ignore what is missing: the removal of a folder is a change of its parent, which is in the
        # list too. (--delete-missing-args ends Debian's 3.2.7-1+deb12u6 with "invalid file mode".)
        listed = f"--files-from={list_path}"
        return ("-d", "--from0", listed, "--trust-sender", "--ignore-missing-args")

    def _line(self, *options: str, parts: Sequence[str] = _PARTS) -> list[str]:
        session = _session(self.source, self.timeout_s, self.connect_timeout_s)
        url = self.source.url(self.module)
        return ["rsync", *_SAME, *parts, *session, *options, url, self.target]


def _session(source: From, timeout_s: int, connect_timeout_s: int) -> tuple[str, ...]:
    bind = () if source.bind is None else (f"--address={source.bind}",)
    wait = (f"--timeout={timeout_s}", f"--contimeout={connect_timeout_s}")
    return (*wait, f"--sockopts={SOCKET_OPTIONS}", *bind)


# The root by its name would come with its contents. But rsync sends the folders on the way to a
# name, without contents, and then leaves out this name itself, because it is excluded.
_ONLY_THE_ROOT: Final = OWN_ROOT_NAMES[0]


def folder_list(contents: Iterable[bytes], themselves: Iterable[bytes] = ()) -> bytes:
    """The list that rsync reads with --from0: folders with their contents, others without.

    `./` stands first, because rsync takes names that begin with `#` or `;` for remarks.
    """
    lines = [_listed(name) for name in contents]
    lines += [b"./" + (_ONLY_THE_ROOT if name == b"." else name) for name in themselves]
    return b"".join(line + b"\0" for line in lines)


def _listed(name: bytes) -> bytes:
    return b"./" if name in (b"", b".") else b"./" + name.rstrip(b"/") + b"/"


def fetch(source: From, into: str, names: Sequence[str], max_bytes: int) -> list[str]:
    """Fetches plain files by name from the control module; each is there whole or not at all."""
    wanted = (*(f"--include=/{name}" for name in names), "--exclude=*")
    plain = ("-rtc", "--chmod=D700,F600", f"--max-size={max_bytes}", "--delete")
    session = _session(source, FETCH_TIMEOUT_S, FETCH_TIMEOUT_S)
    url = source.url(CONTROL_MODULE)
    return ["rsync", *plain, *wanted, "--no-motd", *session, url, into]

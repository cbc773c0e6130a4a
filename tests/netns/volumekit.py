"""Filesystems for tests: a sparse image, made, loop-mounted, filled or broken, and always removed.

Everything of one volume is in a folder /tmp/nfsha-volume-PID-N-..., also when it is mounted
elsewhere, so what a killed test left is found and removed by the next one. Nothing here knows about
nfsha.

Use it as `with LoopVolume("xfs") as volume:`, several at once by `loop_volumes`, or import the
fixture `make_volume`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.netns.namespaces import run

# mkfs.xfs refuses anything below 300 MiB (xfsprogs 5.19); the images are sparse.
_DEFAULT_MIB = {"ext4": 64, "xfs": 320, "btrfs": 160}
_PREFIX = "nfsha-volume-"
_MNT_DETACH = 2  # sys/mount.h
_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32): EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN
_SHUTDOWN_NOLOGFLUSH = 2  # fs/ext4/ext4.h, fs/xfs/libxfs/xfs_fs.h
_ROUNDS_MAX = 5
_libc = ctypes.CDLL(None, use_errno=True)
_counter = itertools.count()


class LoopVolume:
    """One filesystem in an image of its own, mounted at `path` from entering to leaving.

    `at` is where to mount it (made when it is missing); without it, a folder of its own.
    `inodes` is exact for ext4; for xfs it is rounded up to whole percents of the space.
    `options` go to mount(8).
    """

    def __init__(
        self,
        fstype: str = "ext4",
        *,
        at: Path | None = None,
        size_mib: int | None = None,
        inodes: int | None = None,
        fs_uuid: str | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self.fstype = fstype
        self.size_mib = size_mib or _DEFAULT_MIB[fstype]
        self.inodes = inodes
        self.fs_uuid = fs_uuid or str(uuid.uuid4())
        self.device = ""  # /dev/loopN while it is mounted, and the last one after that
        self._options = tuple(options)
        self._at = at
        self._folder: Path | None = None

    @property
    def path(self) -> Path:
        """Where it is, or was, or will be again, mounted."""
        return self._at or self._own / "mnt"

    @property
    def image(self) -> Path:
        """The file behind the loop device."""
        return self._own / "image"

    def __enter__(self) -> Self:
        sweep()
        name = f"{_PREFIX}{os.getpid()}-{next(_counter)}-"
        self._folder = Path(tempfile.mkdtemp(prefix=name, dir="/tmp"))
        try:
            with self.image.open("xb") as image:
                image.truncate(self.size_mib << 20)
            run(*self._mkfs())
            self.mount()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Unmounts (lazily, if somebody is still in it) and removes everything. Idempotent."""
        if self._folder is None:
            return
        _unmount_images_in(self._folder)
        shutil.rmtree(self._folder)
        self._folder = None

    def mount(self, *options: str) -> None:
        """Mounts it (again). The kernel frees the loop device with the last unmount."""
        self.path.mkdir(parents=True, exist_ok=True)
        extra = ["nouuid"] if self.fstype == "xfs" else []
        wanted = ",".join(["loop", *extra, *self._options, *options])
        run("mount", "-t", self.fstype, "-o", wanted, str(self.image), str(self.path))
        self.device = device_at(self.path)

    def unmount(self, *, lazy: bool = False) -> None:
        """Unmounts it. OSError EBUSY while somebody is in it, unless `lazy`."""
        _unmount(self.path, _MNT_DETACH if lazy else 0)

    def remount_ro(self) -> None:
        """Makes it read-only, as an operator would."""
        run("mount", "-o", "remount,ro", str(self.path))

    def remount_rw(self) -> None:
        """Makes it writable again."""
        run("mount", "-o", "remount,rw", str(self.path))

    def fill(self, leave_bytes: int = 0, *, name: str = "filler") -> Path:
        """Takes all space but about `leave_bytes` (at most that) by one file, whose path it gives.

        A second call with the same name goes on with that file. Free it again by unlinking.
        """
        filler = self.path / name
        with filler.open("ab") as file:
            for step in (1 << 30, 1 << 24, 1 << 20, 1 << 16, 1 << 12):
                while (spare := self.free_bytes - leave_bytes) > 0:
                    size = os.fstat(file.fileno()).st_size
                    try:
                        os.posix_fallocate(file.fileno(), size, min(step, spare))
                    except OSError as error:
                        if error.errno != errno.ENOSPC:
                            raise
                        break
            os.fsync(file.fileno())
        return filler

    def fill_inodes(self, leave: int = 0, *, name: str = "inodes") -> Path:
        """Takes all inodes but `leave` by empty files in a folder, whose path it gives."""
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        with contextlib.suppress(OSError):  # ENOSPC: none is left
            for number in itertools.count():
                if os.statvfs(self.path).f_favail <= leave:
                    break
                (folder / str(number)).touch(exist_ok=False)
        return folder

    @property
    def free_bytes(self) -> int:
        """What an ordinary user can still write."""
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    def shut_down(self) -> None:
        """Ends the filesystem as a lost disk does: it stays mounted, and everything gives EIO.

        ext4 and xfs. Only mounting it again brings it back, when it is unmounted in all mount
        namespaces (a new namespace has a copy of every mount).
        """
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, _SHUTDOWN_NOLOGFLUSH.to_bytes(4, "little"))
        finally:
            os.close(fd)

    def count_an_error(self) -> None:
        """Lets ext4 find an error (kernel: ext4/sysfs.c, trigger_fs_error)."""
        name = Path(self.device).name
        Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("a test wanted it")

    def lose_content(self, keep_bytes: int = 4 << 20) -> None:
        """Cuts the image: what lies behind cannot be read any more (EIO). Nobody may be in it.

        Mounted anew before the cut, so that nothing of it is in the kernel's caches.
        """
        self.unmount()
        self.mount()
        os.truncate(self.image, keep_bytes)

    @property
    def _own(self) -> Path:
        if self._folder is None:
            raise RuntimeError("this volume is not there: enter it first")
        return self._folder

    def _mkfs(self) -> list[str]:
        image = str(self.image)
        if self.fstype == "ext4":
            count = ["-N", str(self.inodes)] if self.inodes else []
            return ["mkfs.ext4", "-q", "-F", "-b", "4096", "-I", "256", "-m", "0", "-U",
                    self.fs_uuid, "-E", "nodiscard,lazy_itable_init=1", *count, image]  # fmt: skip
        if self.fstype == "xfs":
            percent = (self.inodes or 0) * 512 * 100 // (self.size_mib << 20) + 1
            count = ["-i", f"maxpct={percent}"] if self.inodes else []
            return ["mkfs.xfs", "-q", "-K", "-m", f"uuid={self.fs_uuid}", *count, image]
        return ["mkfs.btrfs", "-q", "-K", "-U", self.fs_uuid, image]


@contextlib.contextmanager
def loop_volumes(root: Path, *names: str, fstype: str = "ext4") -> Iterator[list[LoopVolume]]:
    """Mounts one volume per name below `root`; all are gone at the end, whatever happened."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(LoopVolume(fstype, at=root / name)) for name in names]


@pytest.fixture
def make_volume() -> Iterator[Callable[..., LoopVolume]]:
    """Makes mounted volumes (arguments of LoopVolume) that are gone after the test."""
    with contextlib.ExitStack() as stack:

        def make(*args: object, **options: object) -> LoopVolume:
            return stack.enter_context(LoopVolume(*args, **options))  # type: ignore[arg-type]

        yield make


def device_at(path: Path) -> str:
    """The source of the topmost mount at `path`, as the kernel tells it."""
    return run("findmnt", "-n", "-o", "SOURCE", "--mountpoint", str(path)).split()[-1]


def sweep() -> None:
    """Removes what tests that are dead left behind."""
    for folder in Path("/tmp").glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            _unmount_images_in(folder)
            shutil.rmtree(folder, ignore_errors=True)


def left_behind() -> list[str]:
    """Mounts and loop devices that this process made and that would stay for ever.

    Not: a loop device that the kernel frees by itself, as soon as a mount namespace that somebody
    made meanwhile (and that has a copy of the mount) is gone.
    """
    mine = f"/tmp/{_PREFIX}{os.getpid()}-"
    mounts = _lines("/proc/self/mountinfo")
    devices = {device for device, file in _loop_files() if mine in file}
    found = [f"mount {line}" for line in mounts if devices & set(line.split()) or mine in line]
    return found + [f"loop device {device}" for device in devices if not _goes_by_itself(device)]


def _goes_by_itself(device: str) -> bool:
    flag = Path("/sys/block", Path(device).name, "loop", "autoclear")
    return not flag.exists() or flag.read_text().strip() == "1"


def _loop_files() -> list[tuple[str, str]]:
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # detached meanwhile
            found.append((f"/dev/{backing.parts[3]}", backing.read_text().strip()))
    return found


def _unmount(path: Path, flags: int) -> None:
    if _libc.umount2(os.fsencode(path), flags) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), str(path))


def _unmount_images_in(folder: Path) -> None:
    """By the image, not by the place: the place may be another volume's by now, and bound twice."""
    for _ in range(_ROUNDS_MAX):  # more than one when something is mounted on top of it
        mine = {device for device, backing in _loop_files() if backing.startswith(f"{folder}/")}
        targets = [target for device in mine for target in _targets_of(device)]
        if not targets:
            return
        for target in targets:
            with contextlib.suppress(OSError):
                _unmount_if_of(target, folder)


def _unmount_if_of(target: Path, folder: Path) -> None:
    """Another process may have been given the freed loop device meanwhile: so look and hold.

    As long as the descriptor is open, its mount keeps its device.
    """
    fd = os.open(target, os.O_PATH | os.O_DIRECTORY)
    try:
        mount_id = _after(f"/proc/self/fdinfo/{fd}", "mnt_id:")
        device = _after("/proc/self/mountinfo", f"{mount_id} ").split()[1]  # "PARENT 7:N ..."
        backing = Path(f"/sys/dev/block/{device}/loop/backing_file")
        ours = backing.exists() and backing.read_text().startswith(f"{folder}/")
        if ours or not device.startswith("7:"):  # or what a test mounted on top of it
            _unmount(Path(f"/proc/self/fd/{fd}"), _MNT_DETACH)
    finally:
        os.close(fd)


def _after(file: str, begin: str) -> str:
    found = (line.removeprefix(begin) for line in _lines(file) if line.startswith(begin))
    return next(found, "- -").strip()


def _lines(file: str) -> list[str]:
    return os.fsdecode(Path(file).read_bytes()).split("\n")  # mount points may have any byte


def _targets_of(device: str) -> list[Path]:
    found = run("findmnt", "-rn", "-o", "TARGET", "--source", device, check=False)
    return [Path(line.encode().decode("unicode_escape")) for line in found.splitlines()[::-1]]

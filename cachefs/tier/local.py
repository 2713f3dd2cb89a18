"""The local tier: sparse blobs under one directory, written with O_DIRECT from page-aligned buffers.

What was just fetched is served from its buffer, so page cache for it would only cost: O_DIRECT takes
0.04-0.09 CPU-s/GiB.
"""

import contextlib
import fcntl
import os
import re
import signal
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from cachefs.tier import NO_SIZE, BlobStat

BLOCK_BYTES = 4096
"""Alignment that O_DIRECT asks of offset, length and memory on every file system that we know."""

_BLOB_NAME = re.compile(r"[0-9a-f]{32}")
_NO_BLOB = BlobStat(0, 0, NO_SIZE, 0, 0)


class LocalTier:
    """Blobs as `directory/ab/abcdef...`, names being 32 hex digits. Stateless: any thread may call anything."""

    name = "local"

    def __init__(self, directory: Path, *, capacity_bytes: int, free_fraction_min: float = 0.05) -> None:
        self.directory = directory
        self.capacity_bytes = capacity_bytes
        self.free_fraction_min = free_fraction_min
        with contextlib.suppress(OSError):  # scan() says what is wrong
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        return self.directory / name[:2] / name

    def write(self, name: str, size: int, offset: int, data: memoryview, *, create: bool) -> BlobStat:
        path = self.path(name)
        fd = self._open_sized(path, size, create)
        try:
            aligned = len(data) // BLOCK_BYTES * BLOCK_BYTES
            direct = _write_direct(path, data[:aligned], offset) if aligned else 0
            # The tail that is no multiple of the block, and all of it where O_DIRECT is refused.
            _write_all(fd, data[direct:], offset + direct)
            return blob_stat(os.fstat(fd))
        finally:
            os.close(fd)

    def _open_sized(self, path: Path, size: int, create: bool) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
        try:
            fd = os.open(path, flags, 0o600)
        except FileNotFoundError:
            if not create:
                raise
            path.parent.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(path, flags, 0o600)
        try:
            # INVARIANT: a blob with bytes in it has exactly its object's size (passthrough serves all it has).
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise FileNotFoundError(f"{path} is no file")
            if found.st_size != size:
                if not create:
                    raise FileNotFoundError(f"{path} does not have {size} bytes")
                os.ftruncate(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def sync(self, names: Sequence[str], new_names: Sequence[str]) -> dict[str, BlobStat]:
        found: dict[str, BlobStat] = {}
        for name in names:
            try:
                fd = self.open(name)
            except FileNotFoundError:
                continue
            try:
                os.fdatasync(fd)
                found[name] = blob_stat(os.fstat(fd))
            finally:
                os.close(fd)
        for directory in {self.path(name).parent for name in new_names}:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        return found

    def open(self, name: str) -> int:
        path = self.path(name)
        # Found without being opened, for opening a FIFO waits for its writer. Then opened plainly by what was found:
        # the keeper refuses descriptors with O_NOFOLLOW or O_NONBLOCK, which also fails while is_unused() has a lease.
        found = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(found).st_mode):
                raise FileNotFoundError(f"{path} is no file")
            return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(found)

    def stat(self, name: str) -> BlobStat | None:
        try:
            found = os.lstat(self.path(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return blob_stat(found) if stat.S_ISREG(found.st_mode) else None

    def unlink(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(self.path(name))

    def is_unused(self, name: str) -> bool:
        try:
            fd = self.open(name)
        except FileNotFoundError:
            return True
        try:
            # Whoever opens the blob in the next microseconds makes the kernel signal us. SIGURG is ignored by
            # default; the usual SIGIO would end the process.
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
            # A write lease is given only when nobody else has the file open or mapped, also through passthrough.
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except BlockingIOError:
            return False
        except OSError:
            return True  # no leases on this file system; there is no passthrough on those either
        finally:
            os.close(fd)
        return True

    def scan(self) -> Iterator[tuple[str, BlobStat]]:
        for directory in sorted(os.listdir(self.directory)):
            try:
                names = sorted(os.listdir(self.directory / directory))
            except OSError:
                continue
            for name in names:
                if _BLOB_NAME.fullmatch(name) is None:
                    continue
                try:
                    found = os.lstat(self.path(name))
                except FileNotFoundError:
                    continue
                except OSError:
                    yield name, _NO_BLOB  # an inode that the disk has lost
                else:
                    yield name, blob_stat(found) if stat.S_ISREG(found.st_mode) else _NO_BLOB

    def free_bytes(self) -> tuple[int, int]:
        found = os.statvfs(self.directory)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def read_into(fd: int, view: memoryview, offset: int) -> int:
    """Read until `view` is full or the file ends; how much was read. Blocks on the disk."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def _write_direct(path: Path, data: memoryview, offset: int) -> int:
    """How much was written: all of it, or 0 where the file system refuses O_DIRECT."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT | os.O_NOFOLLOW)
    except OSError:
        return 0
    try:
        done = os.pwrite(fd, data, offset)
    except OSError:
        return 0  # a full disk says so again in the buffered write
    finally:
        os.close(fd)
    return done // BLOCK_BYTES * BLOCK_BYTES


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def blob_stat(found: os.stat_result) -> BlobStat:
    # A blob that was unlinked meanwhile takes nothing that we could give back.
    disk_bytes = found.st_blocks * 512 if found.st_nlink else 0
    return BlobStat(found.st_dev, found.st_ino, found.st_size, disk_bytes, found.st_ctime_ns)

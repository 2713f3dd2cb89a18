"""What a file must be before the keeper lets the kernel read it on a server's word."""

import ctypes
import fcntl
import os
import stat
import struct
from collections.abc import Iterable

from cachefs.kernel import wire
from cachefs.kernel.session import Backing

BACKINGS_MAX = 1_000_000
LOST_LOOK_BACK = 1_000_000
"""About a second; only what was lost longer ago than so many registrations stays."""

O_PATH = 0o10000000
# What may be set on an O_RDONLY descriptor beside the access mode: O_LARGEFILE (0o100000, always on 64 bit),
# O_NONBLOCK, O_NOATIME. O_PATH must not: such a descriptor needs no right to read the file.
FLAGS_ALLOWED = os.O_RDONLY | 0o100000 | os.O_NONBLOCK | os.O_NOATIME


class BackingRefused(Exception):
    """This descriptor may not become a backing file; the message says why."""


def device_of(descriptor: int) -> int:
    """st_dev without asking the file system: fstat() of a file on the server's own mount would wait for the server.

    statx(2) with AT_EMPTY_PATH and AT_STATX_DONT_SYNC; struct statx has stx_dev_major at byte 136 (linux/stat.h).
    Raises OSError.
    """
    buffer = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statx(descriptor, b"", 0x1000 | 0x4000, 0, buffer):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return os.makedev(*struct.unpack_from("=II", buffer, 136))


def check_backing(descriptor: int, *, directory: str, device: int, uid: int) -> os.stat_result:
    """Raises BackingRefused unless this is a regular file that the server itself could have opened for reading.

    It must be owned by `uid` (the server's), lie on `device` below `directory` (its real path, without symlinks), and
    be open read-only without O_PATH: an O_PATH descriptor of root's file would otherwise be readable by everybody.
    """
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if flags & O_PATH:
        raise BackingRefused("an O_PATH descriptor")
    if flags & os.O_ACCMODE != os.O_RDONLY or flags & ~FLAGS_ALLOWED:
        raise BackingRefused(f"not a plain read-only descriptor (flags {flags:#o})")
    if device_of(descriptor) != device:
        raise BackingRefused("not on the file system of the state directory")
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise BackingRefused("not a regular file")
    if status.st_uid != uid:
        raise BackingRefused(f"owned by uid {status.st_uid}, not by the server's uid {uid}")
    if status.st_nlink == 0:
        raise BackingRefused("a deleted file")
    path = os.readlink(f"/proc/self/fd/{descriptor}")
    if not path.startswith(directory.rstrip("/") + "/"):
        raise BackingRefused("not below the state directory")
    return status


def trusted_program(path: str, uid: int) -> bool:
    """Whether only root and `uid` can change this program or what its path leads to: may the keeper start it?"""
    if not os.path.isabs(path) or not os.access(path, os.X_OK):
        return False
    for one in {os.path.normpath(path), os.path.realpath(path)}:
        while True:
            status = os.lstat(one)
            others_write = status.st_mode & 0o022 and not stat.S_ISLNK(status.st_mode)
            sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
            if status.st_uid not in (0, uid) or (others_write and not sticky):
                return False
            if one == "/":
                break
            one = os.path.dirname(one)
    return os.path.isfile(path)


class Backings:
    """The backing files of one mount: at most one for an inode, or its next open would get EIO."""

    # INVARIANT: _nodes holds exactly (backing.node, backing_id) of every value in _by_id.

    def __init__(self, fuse_fd: int, state_dir: str, backings: Iterable[Backing]) -> None:
        self._fuse_fd = fuse_fd
        self._directory = os.path.realpath(state_dir)
        self._by_id = {backing.backing_id: backing for backing in backings}
        self._nodes = {backing.node: backing.backing_id for backing in self._by_id.values()}

    def all(self) -> tuple[Backing, ...]:
        """In the order of registration."""
        return tuple(self._by_id.values())

    def register(self, node: int, descriptor: int, object_key: str, *, uid: int) -> Backing:
        """Check the file and give it to the kernel; for the same inode and file again, what there is.

        Raises BackingRefused, and OSError when the kernel refuses.
        """
        if node <= 0 or len(self._by_id) >= BACKINGS_MAX:
            raise BackingRefused("no such inode, or too many backing files")
        device = os.stat(self._directory).st_dev
        status = check_backing(descriptor, directory=self._directory, device=device, uid=uid)
        known = self._by_id.get(self._nodes.get(node, -1))
        if known is not None:
            if (known.device, known.inode) != (status.st_dev, status.st_ino):
                raise BackingRefused(f"inode {node} has another backing file")
            return known
        backing_id = wire.open_backing(self._fuse_fd, descriptor)
        backing = Backing(node, backing_id, status.st_dev, status.st_ino, object_key)
        self._by_id[backing_id] = backing
        self._nodes[node] = backing_id
        return backing

    def close(self, backing_id: int) -> None:
        """An id that is not ours is left alone. Raises OSError when the kernel does not know it."""
        backing = self._by_id.pop(backing_id, None)
        if backing is not None:
            del self._nodes[backing.node]
            wire.close_backing(self._fuse_fd, backing_id)

    def close_lost(self) -> int:
        """Close every id that nobody knows of, and return how many there were: the last keeper died between making
        one and telling the server, or before it read that one is not needed any more. The blob would be in use for
        ever. Ids are given out in ascending order (idr_alloc_cyclic), so a new one bounds them.
        """
        descriptor = os.open(os.path.join(self._directory, "lock"), os.O_RDONLY | os.O_CLOEXEC)
        try:
            newest = wire.open_backing(self._fuse_fd, descriptor)
        finally:
            os.close(descriptor)
        lost = -1  # the new one is closed as well
        for backing_id in range(max(1, newest - LOST_LOOK_BACK), newest + 1):
            if backing_id in self._by_id:
                continue
            try:
                wire.close_backing(self._fuse_fd, backing_id)
            except OSError:
                continue  # there is none
            lost += 1
        return lost

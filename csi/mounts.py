"""Mounting by file descriptor: open_tree, mount_setattr, move_mount, umount2 (ctypes; no fork, no helper program).

Sources: open_tree(2), move_mount(2), mount_setattr(2), umount2(2); the numbers are those of every 64-bit Linux
architecture (asm-generic/unistd.h, and x86-64 alike). No path of a pod is ever resolved a second time: the source and
the target are descriptors that were opened component by component.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cachefs.kernel.mounts import Mount, read_mounts
from csi.failure import BadRequest, Broken, NotAllowedNow, Unreachable

SYS_OPEN_TREE = 428
SYS_MOVE_MOUNT = 429
SYS_MOUNT_SETATTR = 442
AT_EMPTY_PATH = 0x1000
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_EMPTY_PATH = 0x40
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT = 32
MS_BIND = 4096
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

WALK_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
PATH_BYTES_MAX = 4095
NAME_BYTES_MAX = 255
STACKED_MOUNTS_MAX = 64


class Kernel:
    """The system calls. Each raises OSError."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.syscall.restype = ctypes.c_long

    def _checked(self, result: int) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result

    def bind(self, source_fd: int, parent_fd: int, name: str, *, noexec: bool) -> None:
        """Bind the directory `source_fd` onto the directory `name` in `parent_fd`, read-only and with its flags from
        the first moment on. `name` is not followed when it is a symlink."""
        target_fd = os.open(name, WALK_FLAGS, dir_fd=parent_fd)
        try:
            self._bind_detached(source_fd, target_fd, noexec)
        except OSError as exc:
            if exc.errno != errno.ENOSYS:
                raise
            # Before Linux 5.12 there is no mount_setattr: bind, then remount with the flags.
            self._bind_by_mount(source_fd, target_fd, parent_fd, name, noexec)
        finally:
            os.close(target_fd)

    def _bind_detached(self, source_fd: int, target_fd: int, noexec: bool) -> None:
        empty = ctypes.c_char_p(b"")
        flags = ctypes.c_uint(OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH)
        tree_fd = self._checked(self._libc.syscall(SYS_OPEN_TREE, source_fd, empty, flags))
        try:
            attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | (MOUNT_ATTR_NOEXEC * noexec)
            argument = struct.pack("=QQQQ", attributes, 0, 0, 0)
            size = ctypes.c_size_t(len(argument))
            self._checked(self._libc.syscall(SYS_MOUNT_SETATTR, tree_fd, empty, AT_EMPTY_PATH, argument, size))
            how = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
            self._checked(self._libc.syscall(SYS_MOVE_MOUNT, tree_fd, empty, target_fd, empty, how))
        finally:
            os.close(tree_fd)

    def _bind_by_mount(self, source_fd: int, target_fd: int, parent_fd: int, name: str, noexec: bool) -> None:
        source, target = f"/proc/self/fd/{source_fd}".encode(), f"/proc/self/fd/{target_fd}".encode()
        self._checked(self._libc.mount(source, target, None, ctypes.c_ulong(MS_BIND), None))
        flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | (MS_NOEXEC * noexec)
        mounted_fd = os.open(name, WALK_FLAGS, dir_fd=parent_fd)
        try:
            mounted = f"/proc/self/fd/{mounted_fd}".encode()
            self._checked(self._libc.mount(None, mounted, None, ctypes.c_ulong(flags), None))
        except OSError:
            self.unmount(parent_fd, name)
            raise
        finally:
            os.close(mounted_fd)

    def unmount(self, parent_fd: int, name: str) -> None:
        """Take the topmost mount off `name` in `parent_fd`; lazily: a reader that is still in it keeps it."""
        path = f"/proc/self/fd/{parent_fd}/{name}".encode()
        self._checked(self._libc.umount2(path, MNT_DETACH | UMOUNT_NOFOLLOW))


def path_parts(path: str, base: Path) -> tuple[str, ...]:
    """The components of `path` below `base`, as strings; nothing is looked up. BadRequest for everything that is not
    plainly below it."""
    if "\0" in path or not path.startswith("/") or len(path.encode(errors="replace")) > PATH_BYTES_MAX:
        raise BadRequest("the path is not absolute, is too long or has a NUL in it")
    parts = tuple(part for part in path.split("/") if part)
    if any(part in (".", "..") or len(part.encode(errors="replace")) > NAME_BYTES_MAX for part in parts):
        raise BadRequest("the path has `.`, `..` or a name that is too long in it")
    base_parts = base.parts[1:]
    if parts[: len(base_parts)] != base_parts or len(parts) == len(base_parts):
        raise BadRequest("the path is not below the kubelet's directory (--kubelet-dir)")
    return parts[len(base_parts) :]


@contextmanager
def walk(base: Path, parts: Sequence[str]) -> Iterator[int]:
    """An O_PATH descriptor of the directory base/parts. `base` is the admin's and may be a symlink; below it none is
    followed. Raises FileNotFoundError, BadRequest for a symlink or a file on the way."""
    fd = os.open(base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts:
            try:
                deeper = os.open(part, WALK_FLAGS, dir_fd=fd)
            except OSError as exc:
                if exc.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise BadRequest("the path has a symlink or a file in it") from None
                raise
            os.close(fd)
            fd = deeper
        yield fd
    finally:
        os.close(fd)


def mount_id(fd: int) -> int:
    """Of the mount that `fd` is in (proc(5), fdinfo); asks no file system."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "mnt_id":
            return int(value)
    raise Broken("the kernel tells no mount id")


class Targets:
    """Target paths below the kubelet's directory, and the views below the FUSE root."""

    def __init__(self, kubelet_dir: Path, mount_root: Path, kernel: Kernel) -> None:
        self._kubelet_dir = kubelet_dir
        self._mount_root = mount_root
        self._kernel = kernel

    def normal(self, path: str) -> str:
        """The path without empty components. Raises BadRequest."""
        return str(self._kubelet_dir.joinpath(*path_parts(path, self._kubelet_dir)))

    def mounts_at(self, target: str) -> list[Mount]:
        """What is mounted there, the topmost last; from mountinfo: a hung mount is not touched."""
        parts = path_parts(target, self._kubelet_dir)
        real = os.path.join(os.path.realpath(self._kubelet_dir), *parts)
        return [mount for mount in read_mounts() if str(mount.mountpoint) == real]

    def root_device(self) -> str:
        """major:minor of the FUSE root; "" while nothing is mounted there."""
        real = os.path.realpath(self._mount_root.parent)
        root = os.path.join(real, self._mount_root.name)
        found = [mount for mount in read_mounts() if str(mount.mountpoint) == root]
        return str(found[-1].major_minor) if found else ""

    def make_directory(self, target: str) -> None:
        """Make the last component. Raises NotAllowedNow when the kubelet has not made the one before it."""
        *parents, name = path_parts(target, self._kubelet_dir)
        try:
            with walk(self._kubelet_dir, parents) as parent_fd:
                try:
                    os.mkdir(name, 0o750, dir_fd=parent_fd)
                except FileExistsError:
                    with walk(self._kubelet_dir, [*parents, name]):
                        pass
        except FileNotFoundError:
            raise NotAllowedNow("the directory that the target path is in does not exist") from None

    def bind(self, root: str, target: str, *, noexec: bool) -> None:
        """Bind the view `root` (as the server named it) onto the target."""
        *parents, name = path_parts(target, self._kubelet_dir)
        parts = tuple(root.split("/"))
        if not all(parts) or any(part in (".", "..") or "\0" in part for part in parts) or len(parts) > 8:
            raise Broken("the server named a view's directory that is none")
        try:
            with walk(self._mount_root, ()) as root_fd, walk(self._mount_root, parts) as source_fd:
                # INVARIANT: what is bound lies in the FUSE mount. The server has no privileges and is not believed.
                if mount_id(source_fd) != mount_id(root_fd) or not self.root_device():
                    raise Broken("the view's directory is not in the FUSE mount")
                with walk(self._kubelet_dir, parents) as parent_fd:
                    self._kernel.bind(source_fd, parent_fd, name, noexec=noexec)
        except BadRequest:
            raise Broken("the view or the target became a symlink or a file") from None
        except OSError as exc:
            if exc.errno in (errno.ENOTCONN, errno.ECONNABORTED):
                raise Unreachable("the FUSE mount is not served") from None
            raise Broken(f"the bind mount failed ({os.strerror(exc.errno or 0)})") from None

    def parent_exists(self, target: str) -> bool:
        """Whether the directory that the target is in is there: the kubelet removes it with the pod."""
        *parents, _name = path_parts(target, self._kubelet_dir)
        try:
            with walk(self._kubelet_dir, parents):
                return True
        except FileNotFoundError:
            return False

    def release(self, target: str, devices: frozenset[str]) -> bool:
        """Take off our mounts (of `devices`), then the empty directory. False: something foreign is mounted there and
        was left alone. What does not exist is no error."""
        *parents, name = path_parts(target, self._kubelet_dir)
        try:
            with walk(self._kubelet_dir, parents) as parent_fd:
                for _ in range(STACKED_MOUNTS_MAX):
                    mounts = self.mounts_at(target)
                    if not mounts:
                        break
                    if str(mounts[-1].major_minor) not in devices and mounts[-1].fstype != "fuse.cachefs":
                        return False
                    self._kernel.unmount(parent_fd, name)
                try:
                    os.rmdir(name, dir_fd=parent_fd)
                except OSError as exc:
                    if exc.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.ENOTDIR):
                        raise
        except FileNotFoundError:
            return True
        except OSError as exc:
            raise Broken(f"the unmount failed ({os.strerror(exc.errno or 0)})") from None
        return True

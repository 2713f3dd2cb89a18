"""Mounting and unmounting, as root by mount(2) and otherwise by fusermount3, and what /proc/self/mountinfo says."""

import ctypes
import errno
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import msgspec

from cachefs.errors import CachefsError, UsageError
from cachefs.kernel.session import receive_descriptors

FSTYPE = "fuse.cachefs"
MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
MNT_FORCE, MNT_DETACH = 1, 2
FUSERMOUNT_TIMEOUT_S = 15.0
PROBE_TIMEOUT_S = 5.0
_OCTAL = re.compile(r"\\([0-7]{3})")


class Mount(msgspec.Struct, frozen=True):
    """One line of mountinfo, as proc(5) names its fields; `options` are the mount's own and the file system's."""

    mount_id: int
    parent_id: int
    major_minor: str
    root: str
    mountpoint: str
    fstype: str
    source: str
    options: tuple[str, ...]


def parse_mountinfo(text: str) -> list[Mount]:
    """The mounts in the order of the file: of two on one directory, the later one is what a path leads to."""
    mounts = []
    for line in text.splitlines():
        own, _, filesystem = line.partition(" - ")
        mount_id, parent_id, major_minor, root, mountpoint, options, *_ = own.split(" ")
        fstype, source, more = filesystem.split(" ", 2)
        names = tuple(dict.fromkeys([*options.split(","), *more.split(",")]))
        mounts.append(
            Mount(
                int(mount_id),
                int(parent_id),
                major_minor,
                _plain(root),
                _plain(mountpoint),
                fstype,
                _plain(source),
                names,
            )
        )
    return mounts


def read_mounts() -> list[Mount]:
    """All mounts of this mount namespace."""
    return parse_mountinfo(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))


def find_mount(mountpoint: Path | str) -> Mount | None:
    """The mount that covers exactly this directory (an absolute path without symlinks), or None."""
    found = [mount for mount in read_mounts() if mount.mountpoint == str(mountpoint)]
    return found[-1] if found else None


def open_device() -> int:
    """A new, non-blocking descriptor of /dev/fuse. Raises UsageError."""
    try:
        return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError as exc:
        raise UsageError("cannot open /dev/fuse: permission denied; give this user access to it") from exc
    except OSError as exc:
        raise UsageError(
            f"cannot open /dev/fuse ({exc.strerror}): load the kernel module with `modprobe fuse`"
        ) from exc


def mount_as_root(mountpoint: Path, *, allow_other: bool) -> int:
    """mount(2), and the device's descriptor. Raises UsageError."""
    fuse_fd = open_device()
    options = f"fd={fuse_fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},default_permissions"
    if allow_other:
        options += ",allow_other"
    try:
        _libc_call(
            "mount",
            b"cachefs",
            os.fsencode(mountpoint),
            FSTYPE.encode(),
            ctypes.c_ulong(MS_NOSUID | MS_NODEV | MS_RDONLY),
            options.encode(),
        )
    except OSError as exc:
        os.close(fuse_fd)
        hint = "; it needs CAP_SYS_ADMIN" if isinstance(exc, PermissionError) else ""
        raise UsageError(f"cannot mount at {mountpoint}: {exc.strerror}{hint}") from exc
    return fuse_fd


def mount_by_fusermount(mountpoint: Path, *, allow_other: bool) -> int:
    """Mount through the set-uid helper fusermount3, which sends the device's descriptor. Raises UsageError."""
    options = "ro,nosuid,nodev,fsname=cachefs,subtype=cachefs,default_permissions"
    if allow_other:
        options += ",allow_other"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [_fusermount(), "-o", options, "--", str(mountpoint)]
        environment = {**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}
        try:
            done = subprocess.run(
                command,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=FUSERMOUNT_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as exc:
            raise UsageError(f"cannot mount at {mountpoint}: fusermount3 does not end") from exc
        if done.returncode:
            raise UsageError(f"cannot mount at {mountpoint}: {_one_line(done.stderr)}")
        theirs.close()
        _, descriptors, _ = receive_descriptors(ours, 16)
    if not descriptors:
        raise UsageError(f"cannot mount at {mountpoint}: fusermount3 sent no descriptor")
    os.set_blocking(descriptors[0], False)
    return descriptors[0]


def unmount(mountpoint: Path | str, *, as_root: bool) -> bool:
    """Unmount, lazily when it is busy. False: it was busy, and lives on for those who have files open.

    Raises CachefsError when it cannot be unmounted.
    """
    if not as_root:
        return _unmount_by_fusermount(mountpoint)
    try:
        _libc_call("umount2", os.fsencode(mountpoint), 0)
    except OSError:
        try:
            _libc_call("umount2", os.fsencode(mountpoint), MNT_DETACH)
        except OSError as exc:
            raise CachefsError(f"cannot unmount {mountpoint}: {exc.strerror}") from exc
        return False
    return True


def unmount_device(major_minor: str, *, as_root: bool) -> list[str]:
    """Unmount every mount of a file system in this mount namespace, binds included; returns where they were.

    Tries them all, then raises CachefsError for one that could not be unmounted.
    """
    gone = []
    failure: CachefsError | None = None
    for mount in reversed(read_mounts()):
        if mount.major_minor == major_minor and mount.fstype == FSTYPE:
            try:
                unmount(mount.mountpoint, as_root=as_root)
                gone.append(mount.mountpoint)
            except CachefsError as exc:
                failure = exc
    if failure is not None:
        raise failure
    return gone


def abort(major_minor: str, mountpoint: Path | str, *, as_root: bool) -> bool:
    """Abort a connection: every request in flight fails, and nothing hangs on it any more. False: not allowed to.

    Through fusectl where it is mounted (also not root, for one's own mounts), else by a forced umount (root).
    """
    switch = Path("/sys/fs/fuse/connections") / major_minor.partition(":")[2] / "abort"
    try:
        switch.write_text("1")
    except OSError:
        if not as_root:
            return False
    else:
        return True
    try:
        _libc_call("umount2", os.fsencode(mountpoint), MNT_FORCE)
    except OSError as exc:
        return exc.errno == errno.EBUSY  # aborted all the same, only still mounted
    return True


def recover_dead_mount(
    mountpoint: Path | str, *, unsupervised: bool = False, probe_timeout_s: float = PROBE_TIMEOUT_S
) -> list[str]:
    """Unmount what a cachefs whose keeper and server both died left at this directory, binds included.

    Does nothing when no cachefs mount is there or it answers. With `unsupervised` (the caller knows that neither
    keeper nor server lives) one that does not answer is aborted too. Returns what was unmounted.
    """
    mount = find_mount(mountpoint)
    if mount is None or mount.fstype != FSTYPE:
        return []
    state = probe(mountpoint, probe_timeout_s)
    if state == "alive" or (state == "hangs" and not unsupervised):
        return []
    as_root = os.geteuid() == 0
    found = [one.mountpoint for one in read_mounts() if one.major_minor == mount.major_minor]
    if state == "hangs" and not abort(mount.major_minor, mountpoint, as_root=as_root):
        return []
    unmount_device(mount.major_minor, as_root=as_root)
    return found  # a forced umount has already taken one of them


def probe(mountpoint: Path | str, timeout_s: float = PROBE_TIMEOUT_S) -> str:
    """Whether a mount is "alive", "dead" (its connection is closed) or "hangs" (no answer in time).

    By statvfs, which the kernel never answers from a cache, and in a process of its own: one that waits for a hung
    server may be unkillable.
    """
    script = "import os, sys\ntry:\n os.statvfs(sys.argv[1])\nexcept OSError as exc:\n sys.exit(exc.errno)"
    command = [sys.executable, "-I", "-S", "-c", script, str(mountpoint)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        number = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            process.returncode = -9  # it ends when the mount does
        return "hangs"
    return "dead" if number in (errno.ENOTCONN, errno.ECONNABORTED, errno.ENODEV) else "alive"


def check_mountpoint(mountpoint: Path) -> None:
    """Raises UsageError unless this is an empty directory on which nothing is mounted."""
    mount = find_mount(mountpoint)
    if mount is not None:
        raise UsageError(f"{mountpoint} is busy: a {mount.fstype} file system is mounted there")
    try:
        with os.scandir(mountpoint) as entries:
            first = next(entries, None)
    except FileNotFoundError as exc:
        raise UsageError(f"the mount point {mountpoint} does not exist: make it with mkdir") from exc
    except NotADirectoryError as exc:
        raise UsageError(f"the mount point {mountpoint} is not a directory") from exc
    except OSError as exc:
        raise UsageError(f"cannot use the mount point {mountpoint}: {exc.strerror}") from exc
    if first is not None:
        raise UsageError(f"the mount point {mountpoint} is not empty: choose an empty directory")


def raise_readahead(major_minor: str, kib: int = 1024) -> bool:
    """Let the kernel ask for 1 MiB per READ (INIT cannot; the default is 128 KiB). Needs root; False: not allowed."""
    try:
        Path(f"/sys/class/bdi/{major_minor}/read_ahead_kb").write_text(str(kib))
    except OSError:
        return False
    return True


def _libc_call(name: str, *arguments: object) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    if function(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _fusermount() -> str:
    import shutil  # 3 ms, for who is not root

    found = shutil.which("fusermount3")
    if found is None:
        raise UsageError("fusermount3 is not installed: install the package fuse3, or run as root")
    return found


def _unmount_by_fusermount(mountpoint: Path | str) -> bool:
    message = ""
    for flags in (["-u"], ["-u", "-z"]):
        try:
            done = subprocess.run(
                [_fusermount(), *flags, "--", str(mountpoint)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=FUSERMOUNT_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            message = "fusermount3 does not end"
            continue
        if done.returncode == 0:
            return "-z" not in flags
        message = _one_line(done.stderr)
    raise CachefsError(f"cannot unmount {mountpoint}: {message}")


def _one_line(output: bytes) -> str:
    return " ".join(output.decode(errors="replace").split()) or "fusermount3 failed"


def _plain(field: str) -> str:
    """mountinfo writes space, tab, newline and backslash as \\ooo."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)

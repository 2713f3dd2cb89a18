"""Bind mounts of volumes, and unmounting them without a fallback: what is busy stays and is told."""

import ctypes
import errno
import os
import subprocess
from pathlib import Path

from cachefs.errors import UsageError
from cachefs.kernel.mounts import (
    FSTYPE,
    FUSERMOUNT_TIMEOUT_S,
    MNT_DETACH,
    MS_NODEV,
    MS_NOSUID,
    MS_RDONLY,
    Mount,
    find_mount,
)

MS_REMOUNT, MS_BIND = 32, 4096


def _call(name: str, *arguments: object) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    if function(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def bind(source: Path, mountpoint: Path) -> None:
    """Show the directory `source` at `mountpoint`, read-only. Raises UsageError; then nothing is mounted there."""
    old, new = os.fsencode(source), os.fsencode(mountpoint)
    try:
        _call("mount", old, new, None, ctypes.c_ulong(MS_BIND), None)
    except OSError as exc:
        raise UsageError(f"cannot mount on {mountpoint}: {exc.strerror}") from exc
    try:
        # The kernel ignores these flags in the first call (mount(2)).
        flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV
        _call("mount", b"none", new, None, ctypes.c_ulong(flags), None)
    except OSError as exc:
        _call("umount2", new, MNT_DETACH)
        raise UsageError(f"cannot mount on {mountpoint}: {exc.strerror}") from exc


def unmount_at(mountpoint: Path, *, as_root: bool, lazy: bool) -> None:
    """Unmount what is on top there. Raises UsageError when it is busy (never if `lazy`) or not ours to unmount."""
    if as_root:
        try:
            _call("umount2", os.fsencode(mountpoint), MNT_DETACH if lazy else 0)
        except OSError as exc:
            if exc.errno == errno.EBUSY:
                raise UsageError(
                    f"{mountpoint} is busy: close the files and leave the directories there, or use --lazy"
                ) from exc
            raise UsageError(f"cannot unmount {mountpoint}: {exc.strerror}") from exc
        return
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(mountpoint)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=FUSERMOUNT_TIMEOUT_S, check=False)
    except FileNotFoundError as exc:
        raise UsageError("fusermount3 is not installed: install the package fuse3") from exc
    except subprocess.TimeoutExpired as exc:
        raise UsageError(f"cannot unmount {mountpoint}: fusermount3 does not end") from exc
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise UsageError(f"cannot unmount {mountpoint} ({said}): close the files there, or use --lazy")


def ours_at(mountpoint: Path) -> Mount | None:
    """The cachefs mount that this directory leads to, or None."""
    found = find_mount(mountpoint)
    return found if found is not None and found.fstype == FSTYPE else None

"""Run a program as uid 65534 without capabilities in a mount namespace of its own, where the interpreter is readable.

    python as_nobody.py UID HIDE PROGRAM ARGUMENT...      with root's rights

On many machines the interpreter lies below root's 0700 home. In this namespace such a directory is replaced by one that
shows only what is on the way. What is mounted at HIDE (the FUSE root) is taken away, as in the server's container.
The standard library only; started by its path.
"""

import ctypes
import os
import sys
from pathlib import Path

CLONE_NEWNS = 0x20000
MS_BIND, MS_REC, MS_SLAVE = 4096, 16384, 1 << 19
MNT_DETACH = 2
LIBC = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raises OSError for a failed call."""
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: Path, kind: str, flags: int, data: str = "") -> None:
    """mount(2)."""
    options = data.encode() if data else None
    check(LIBC.mount(source.encode(), bytes(target), kind.encode(), ctypes.c_ulong(flags), options), f"mount {target}")


def expose(path: Path) -> None:
    """Let everybody reach `path`: of a directory on the way that is closed, only the way is shown."""
    for directory in reversed(path.parents):
        if directory.stat().st_mode & 0o001:
            continue
        child = directory / path.relative_to(directory).parts[0]
        descriptor = os.open(child, os.O_PATH)
        mount("tmpfs", directory, "tmpfs", 0, "mode=755,size=64k")
        child.mkdir()
        mount(f"/proc/self/fd/{descriptor}", child, "", MS_BIND | MS_REC)
        os.close(descriptor)


def main() -> None:
    """See the module's docstring."""
    uid, hide = int(sys.argv[1]), sys.argv[2]
    check(LIBC.unshare(CLONE_NEWNS), "unshare")
    mount("none", Path("/"), "", MS_REC | MS_SLAVE)
    for path in {Path(sys.base_prefix), Path(sys.prefix), Path(__file__).resolve().parents[2]}:
        expose(path)
    LIBC.umount2(hide.encode(), MNT_DETACH)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    os.chdir("/")
    os.execv(sys.argv[3], sys.argv[3:])


if __name__ == "__main__":
    main()

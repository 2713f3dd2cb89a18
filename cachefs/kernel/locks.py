"""Lock files that may be unlinked, and the runtime directory that they lie in, removed when nobody uses it.

A lock is an flock of the file that a path names. Only who holds it may unlink the file, and whoever has got an flock
looks again whether the path still names that file: if not, it opens anew. So there is never a second holder.

The runtime directory has mount.lock (held while a command mounts) and keeper.lock (held by the keeper for as long as
it lives); the server holds STATE/lock. Who waits for several takes them in this order; who removes the directory
waits for none of the first and the last, so it may come with the keeper's already in hand.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from cachefs.errors import is_disk_failure

MOUNT_LOCK, KEEPER_LOCK = "mount.lock", "keeper.lock"
ROOT_NAME = "root"
STATE_LOCK = "lock"
SPILL_NAME = "spill"
"""The directory for what the state directory's disk does not take: see cachefs/spill.py. With NEW while it is made."""
NEW = ".new"
SOCKET_NAME = "control.sock"
FAILURE_NAME = "failure"
FAILURE_BYTES_MAX = 2000
PAUSE_S = 0.02
PROBE_S = 0.2
"""`status` looks for microseconds whether keeper.lock is held, a keeper that has let the directory be ends at once."""
OPENED_MAX = 1000
"""How often a lock file may vanish under who locks it: each time somebody else has had it and has gone."""


def lock_file(path: Path, *, wait_s: float, make: Callable[[], None] | None = None, create: bool = True) -> int:
    """Hold an exclusive flock of the file at `path`, made if it is not there: its descriptor. It ends with that.

    `make` makes its directory, again if it was removed meanwhile. Without `create` a file that is not there is a
    FileNotFoundError, and one on a disk that has become read-only can be held all the same, but not be written.
    Raises BlockingIOError when somebody else holds it for longer than `wait_s`, and OSError.
    """
    deadline_s = time.monotonic() + wait_s
    for _ in range(OPENED_MAX):
        try:
            descriptor = _open(path, create=create)
        except FileNotFoundError:
            if make is None:
                raise
            make()
            continue
        held = False
        try:
            while not (locked := _try_flock(descriptor)) and is_at(path, descriptor):
                if time.monotonic() >= deadline_s:
                    raise BlockingIOError(f"{path} is held")
                time.sleep(PAUSE_S)
            held = locked and is_at(path, descriptor)
        finally:
            if not held:
                os.close(descriptor)
        if held:
            return descriptor
    raise BlockingIOError(f"{path} was removed {OPENED_MAX} times")


def _open(path: Path, *, create: bool) -> int:
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    if create:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o600)
    try:
        return os.open(path, os.O_RDWR | flags)
    except OSError as exc:
        if not is_disk_failure(exc.errno):
            raise
        return os.open(path, os.O_RDONLY | flags)  # enough for flock(2), but not over NFS: so it is the second choice


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock at `path`; nothing is made. Raises OSError but for a missing file."""
    try:
        os.close(lock_file(path, wait_s=0.0, create=False))
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def is_at(path: Path, descriptor: int) -> bool:
    """Whether `path` names the file behind the descriptor."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _try_flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def runtime_name(state_dir: str) -> str:
    """The name of a state directory's runtime directory, unless the user chose one. `state_dir` is a real path."""
    import hashlib  # it loads OpenSSL, and a keeper needs this at its end only

    return hashlib.blake2b(os.fsencode(state_dir), digest_size=6).hexdigest()


def write_owner(keeper_fd: int, state_dir: str) -> None:
    """Into keeper.lock, by who holds it: its pid, and whose runtime directory this is."""
    with contextlib.suppress(OSError):  # no space: the lock holds all the same
        os.ftruncate(keeper_fd, 0)
        os.pwrite(keeper_fd, b"%d\n%s\n" % (os.getpid(), os.fsencode(state_dir)), 0)


def note_failure(runtime_dir: Path, text: str) -> None:
    """Why no server comes up, by the keeper, for the commands that wait for one; "" when one has. Never fails."""
    path = runtime_dir / FAILURE_NAME
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        if text:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(descriptor, "w", errors="replace") as file:
                file.write(text[:FAILURE_BYTES_MAX])


def failure_of(runtime_dir: Path) -> str:
    """What the keeper has noted."""
    try:
        with open(runtime_dir / FAILURE_NAME, errors="replace") as file:
            return file.read(FAILURE_BYTES_MAX)
    except OSError:
        return ""


def _owner(keeper_fd: int) -> str:
    """The state directory; empty when no keeper has said it."""
    _, _, rest = os.pread(keeper_fd, 8192, 0).partition(b"\n")
    return os.fsdecode(rest[:-1]) if rest.endswith(b"\n") else ""


def owner_of(runtime_dir: Path) -> str:
    """The real path of the state directory whose keeper was the last one there; empty when nobody has said it."""
    try:
        descriptor = os.open(runtime_dir / KEEPER_LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return _owner(descriptor)
    except OSError:
        return ""
    finally:
        os.close(descriptor)


def remove_runtime_dir(runtime_dir: Path, *, keeper_fd: int = -1, ours: bool = False) -> None:
    """Remove what a session left there, and the directory; nothing at all while anybody uses it. Never fails.

    `keeper_fd`: keeper.lock, where the caller holds it. A directory that the user chose stays, but for `ours`.
    """
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError, ImportError):  # busy, gone; no Python any more
        found = runtime_dir.stat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            return  # no session was here, and others may have put anything under our names
        mount_fd = lock_file(runtime_dir / MOUNT_LOCK, wait_s=0.0)
        stack.callback(os.close, mount_fd)
        if keeper_fd < 0:
            keeper_fd = lock_file(runtime_dir / KEEPER_LOCK, wait_s=PROBE_S)
            stack.callback(os.close, keeper_fd)
        elif not is_at(runtime_dir / KEEPER_LOCK, keeper_fd):
            return
        state_dir = _owner(keeper_fd)
        if state_dir:
            _hold_state(Path(state_dir), stack)  # a server lives on for a while whose keeper was killed
        elif (runtime_dir / SOCKET_NAME).exists():
            return
        with contextlib.suppress(FileNotFoundError):
            (runtime_dir / ROOT_NAME).rmdir()  # EBUSY while it is mounted: then all stays
        for name in (SPILL_NAME, SPILL_NAME + NEW):
            remove_flat(runtime_dir / name)
        for name in (SOCKET_NAME, FAILURE_NAME, KEEPER_LOCK, MOUNT_LOCK):
            (runtime_dir / name).unlink(missing_ok=True)
        # From here on others may come: then it is not empty, or they make it again.
        if ours or (state_dir and runtime_dir.name == runtime_name(state_dir)):
            runtime_dir.rmdir()


def remove_flat(directory: Path) -> None:
    """A directory with files in it, if it is there. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(directory):
            (directory / name).unlink()
        directory.rmdir()


def _hold_state(state_dir: Path, stack: contextlib.ExitStack) -> None:
    """Hold the state directory's lock if there is one. Raises OSError when a server or command has it."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        stack.callback(os.close, lock_file(state_dir / STATE_LOCK, wait_s=0.0, create=False))

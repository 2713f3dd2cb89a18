"""The state directory and who holds it: one server, or one command without a server, at a time."""

import contextlib
import errno
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from cachefs.errors import StateBusy, StateUnwritable, UsageError, is_disk_failure
from cachefs.kernel.locks import STATE_LOCK, lock_file

SIZE_NAME = "cache_bytes_max"


@contextlib.contextmanager
def file_lock(
    path: Path, *, wait_s: float, busy: str, make: Callable[[], None] | None = None, create: bool = True
) -> Iterator[int]:
    """Hold a lock file; gives its descriptor. `make` and `create` as for lock_file().

    Raises StateBusy with `busy` and the holder, StateUnwritable, UsageError if unusable.
    """
    try:
        descriptor = lock_file(path, wait_s=wait_s, make=make, create=create)
    except BlockingIOError as exc:
        raise StateBusy(busy.format(holder=_holder(path))) from exc
    except OSError as exc:
        if exc.errno == errno.ENOLCK:
            raise UsageError("the file system of the state directory has no locks: give another --state-dir") from exc
        kind = StateUnwritable if is_disk_failure(exc.errno) else UsageError
        raise kind(f"{path} cannot be written ({exc.strerror}): give another --state-dir") from exc
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(32).decode(errors="replace").partition("\n")[0].strip() or "unknown"
    except OSError:
        return "unknown"


def make_state_dir(state_dir: Path) -> None:
    """Make it, with STATE/log. Raises UsageError when it cannot be used, StateUnwritable when its disk is why."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        (state_dir / "log").mkdir(mode=0o700, exist_ok=True)
        read_only = os.statvfs(state_dir).f_flag & os.ST_RDONLY
    except OSError as exc:
        kind = StateUnwritable if is_disk_failure(exc.errno) else UsageError
        raise kind(
            f"the state directory {state_dir} is not usable ({exc.strerror}): give another one with --state-dir"
        ) from exc
    if read_only or not os.access(state_dir, os.W_OK | os.X_OK):
        kind = StateUnwritable if read_only else UsageError
        raise kind(f"the state directory {state_dir} cannot be written: give another one with --state-dir")


def remove_state_dir(state_dir: Path) -> None:
    """Remove one that nothing is in but its lock and an empty log directory; not while anybody holds it."""
    with contextlib.suppress(OSError):
        descriptor = lock_file(state_dir / STATE_LOCK, wait_s=0.0)
        try:
            with contextlib.suppress(FileNotFoundError):
                (state_dir / "log").rmdir()
            if [entry.name for entry in state_dir.iterdir()] == [STATE_LOCK]:
                (state_dir / STATE_LOCK).unlink()
                state_dir.rmdir()
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def state_lock(state_dir: Path, *, wait_s: float = 0.0, resumes: bool = False) -> Iterator[str]:
    """Hold the state directory. Raises StateBusy when another live process does for longer than `wait_s`.

    Gives "", or for who `resumes` (a mount lives, whose bytes may all be there) why its disk takes no writes: then
    nothing is made or written. Without `resumes` that is StateUnwritable.
    """
    busy = (
        f"the state directory {state_dir} is in use by another server or command (process {{holder}}): "
        "unmount it first, or give another one with --state-dir"
    )
    make = functools.partial(make_state_dir, state_dir)
    trouble = ""
    with contextlib.ExitStack() as stack:
        try:
            make()
            descriptor = stack.enter_context(file_lock(state_dir / STATE_LOCK, wait_s=wait_s, busy=busy, make=make))
        except StateUnwritable:
            if not resumes or not (state_dir / STATE_LOCK).exists():
                raise
            trouble = f"the state directory {state_dir} cannot be written"
            stack.enter_context(file_lock(state_dir / STATE_LOCK, wait_s=wait_s, busy=busy, create=False))
        else:
            with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
                length = os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                os.ftruncate(descriptor, length)
        yield trouble


def remember_size(state_dir: Path, cache_bytes_max: int) -> None:
    """What the last server was told to keep at most; a command without a server must not evict down to less."""
    if remembered_size(state_dir) == cache_bytes_max:
        return
    new = state_dir / (SIZE_NAME + ".new")
    try:
        new.write_text(f"{cache_bytes_max}\n")
        new.replace(state_dir / SIZE_NAME)
    except OSError as exc:  # a full disk must not keep a mount from coming back
        import logging  # 3 ms, and commands import this module

        logging.getLogger(__name__).warning("%s cannot be written: %s", state_dir / SIZE_NAME, exc.strerror)


def remembered_size(state_dir: Path) -> int | None:
    """In bytes; None when no server has run."""
    try:
        return int((state_dir / SIZE_NAME).read_text())
    except (OSError, ValueError):
        return None

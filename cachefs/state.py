"""The state directory and who holds it: one server, or one command without a server, at a time."""

import contextlib
import errno
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from cachefs.errors import StateBusy, UsageError
from cachefs.kernel.locks import STATE_LOCK, lock_file

SIZE_NAME = "cache_bytes_max"


@contextlib.contextmanager
def file_lock(path: Path, *, wait_s: float, busy: str, make: Callable[[], None] | None = None) -> Iterator[int]:
    """Hold a lock file; gives its descriptor. `make` makes its directory, if that was removed meanwhile.

    Raises StateBusy with `busy` and the holder, UsageError if unusable.
    """
    try:
        descriptor = lock_file(path, wait_s=wait_s, make=make)
    except BlockingIOError as exc:
        raise StateBusy(busy.format(holder=_holder(path))) from exc
    except OSError as exc:
        if exc.errno == errno.ENOLCK:
            raise UsageError("the file system of the state directory has no locks: give another --state-dir") from exc
        raise UsageError(f"{path} cannot be written ({exc.strerror}): give another --state-dir") from exc
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
    """Make it, with STATE/log. Raises UsageError when it cannot be used."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        (state_dir / "log").mkdir(mode=0o700, exist_ok=True)
    except OSError as exc:
        raise UsageError(
            f"the state directory {state_dir} is not usable ({exc.strerror}): give another one with --state-dir"
        ) from exc
    if not os.access(state_dir, os.W_OK | os.X_OK) or os.statvfs(state_dir).f_flag & os.ST_RDONLY:
        raise UsageError(f"the state directory {state_dir} cannot be written: give another one with --state-dir")


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
def state_lock(state_dir: Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the state directory. Raises StateBusy when another live process does for longer than `wait_s`."""
    make_state_dir(state_dir)
    busy = (
        f"the state directory {state_dir} is in use by another server or command (process {{holder}}): "
        "unmount it first, or give another one with --state-dir"
    )
    make = functools.partial(make_state_dir, state_dir)
    with file_lock(state_dir / STATE_LOCK, wait_s=wait_s, busy=busy, make=make) as descriptor:
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            length = os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            os.ftruncate(descriptor, length)
        yield


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

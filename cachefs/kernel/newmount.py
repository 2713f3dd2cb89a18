"""How a mount begins: mounted, the kernel's INIT answered, one keeper for a runtime directory."""

import contextlib
import fcntl
import os

from cachefs.config import MountConfig
from cachefs.errors import CachefsError, StateBusy, UsageError
from cachefs.kernel import mounts, wire
from cachefs.kernel.locks import KEEPER_LOCK, lock_file, write_owner
from cachefs.kernel.process import log
from cachefs.kernel.session import Session

INIT_TIMEOUT_S = 10.0
LEDGER_BYTES = 4 << 20
LEDGER_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def mount(config: MountConfig, *, python: str, server_module: str, foreground: bool) -> Session:
    """Mount, answer the kernel's INIT, and return the session of the first server. Raises UsageError."""
    as_root = os.geteuid() == 0
    how = mounts.mount_as_root if as_root else mounts.mount_by_fusermount
    place = os.path.realpath(config.mountpoint)  # before it is mounted: nobody answers a GETATTR yet
    fuse_fd = how(config.mountpoint, allow_other=config.server.allow_other)
    try:
        init = wire.read_init(fuse_fd, INIT_TIMEOUT_S)
        request = wire.parse_init(init)
        if request.minor < wire.MINOR_MIN:
            raise UsageError(f"this kernel speaks FUSE 7.{request.minor}; 7.{wire.MINOR_MIN} (Linux 5.4) is needed")
        os.write(fuse_fd, wire.init_answer(request, config.server.kernel_disable))
        found = mounts.find_mount(place)
        if found is None or found.fstype != mounts.FSTYPE:
            raise UsageError(f"{config.mountpoint} was unmounted at once")
    except (CachefsError, ValueError, OSError) as exc:
        mounts.unmount(config.mountpoint, as_root=as_root)
        os.close(fuse_fd)
        if isinstance(exc, CachefsError):
            raise
        raise UsageError(f"cannot mount at {config.mountpoint}: {exc}") from exc
    if "readahead" not in config.server.kernel_disable and not mounts.raise_readahead(found.major_minor):
        log("read_ahead_kb stays at the kernel's default: not allowed to raise it")
    ledger_fd = make_ledger()
    used = sorted(wire.features(init, config.server.kernel_disable))
    log(f"mounted {config.mountpoint} (device {found.major_minor}, FUSE 7.{request.minor}: {', '.join(used)})")
    return Session(
        fuse_fd=fuse_fd,
        init=init,
        restarted=False,
        generation=0,
        backings=(),
        config=config,
        keeper_pid=os.getpid(),
        ledger_fd=ledger_fd,
        device=found.major_minor,
        server_module=server_module,
        python=python,
        foreground=foreground,
    )


def make_ledger() -> int:
    """The memory file that all servers of a mount share; its size cannot change, so mapping it is never SIGBUS."""
    ledger_fd = os.memfd_create("cachefs-ledger", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(ledger_fd, LEDGER_BYTES)
    fcntl.fcntl(ledger_fd, fcntl.F_ADD_SEALS, LEDGER_SEALS | fcntl.F_SEAL_SEAL)
    return ledger_fd


def serving_descriptor(session: Session) -> int:
    """What a server reads requests from: where the kernel cannot send requests again, a clone that dies with it.

    Then the requests that it had taken fail; on the keeper's own descriptor they would hang for ever.
    """
    if "resend" not in wire.features(session.init, session.config.server.kernel_disable):
        try:
            return wire.clone_device(session.fuse_fd)
        except OSError as exc:
            log(f"cannot clone the device ({exc.strerror}): requests that a dying server has taken will hang")
    return os.dup(session.fuse_fd)


def hold_lock(config: MountConfig, timeout_s: float) -> int:
    """One keeper for a runtime directory: a lock that ends with this process. Raises StateBusy."""
    runtime_dir = config.server.runtime_dir

    def make() -> None:
        with contextlib.suppress(FileExistsError):
            runtime_dir.mkdir(0o700)  # a keeper takes over, and who saw none has removed the directory

    try:
        lock_fd = lock_file(runtime_dir / KEEPER_LOCK, wait_s=timeout_s, make=make)
    except BlockingIOError as exc:
        raise StateBusy(f"another cachefs keeper uses {runtime_dir}") from exc
    write_owner(lock_fd, os.path.realpath(config.server.state_dir))
    return lock_fd


def warn_about_timeouts() -> None:
    """A system-wide limit on requests aborts the mount when a READ waits longer for the network than that."""
    try:
        with open("/proc/sys/fs/fuse/max_request_timeout") as file:
            limit_s = int(file.read())
    except (OSError, ValueError):
        return
    if limit_s:
        log(f"sysctl fs.fuse.max_request_timeout is {limit_s} s: a read that waits longer aborts the mount")

"""Start a keeper and wait until its mount answers; for the command line. Only the standard library and msgspec."""

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from cachefs.config import (
    CREDENTIALS_FD_MIN,
    CREDENTIALS_FD_VARIABLE,
    MountConfig,
    encode,
    without_credentials,
    write_credentials,
)
from cachefs.errors import CachefsError, StateBusy, UsageError, WorkFailed
from cachefs.kernel.locks import KEEPER_LOCK, failure_of, is_locked
from cachefs.kernel.mounts import check_mountpoint, recover_dead_mount
from cachefs.kernel.process import open_server_log
from cachefs.kernel.session import close_all, packet_pair
from cachefs.kernel.spawn import python_command

READY_TIMEOUT_S = 120.0
END_TIMEOUT_S = 10.0


class KeeperProcess(msgspec.Struct, frozen=True):
    """A mount that answers. `process` is set for a keeper in the foreground: wait for it."""

    keeper_pid: int
    server_pid: int
    process: subprocess.Popen[bytes] | None = None


def start_keeper(
    config: MountConfig,
    *,
    foreground: bool = False,
    server_module: str = "cachefs.daemon",
    timeout_s: float = READY_TIMEOUT_S,
) -> KeeperProcess:
    """Mount, and return when the server serves. A dead mount of our own at the mount point is removed first.

    In the background keeper and server log to STATE/log/. Raises UsageError (exit code 2) or WorkFailed (1) with the
    line that says what is wrong; then nothing is left mounted.
    """
    server = config.server
    _make_directories((server.state_dir, server.state_dir / "log", server.runtime_dir))
    _clear_mountpoint(config)
    ready, process = _start_process(config, server_module, foreground=foreground)
    try:
        _send_config(process, config)
        if not foreground:
            process.wait()  # it has forked: the keeper itself is nobody's child
        line = _read_line(ready, timeout_s)
    except BaseException:
        if foreground:
            process.send_signal(signal.SIGTERM)
            process.wait()
        raise
    finally:
        os.close(ready)  # a keeper whose server is not ready yet sees this, unmounts and ends
    if "error" in line:
        _wait_for_end(config.server.runtime_dir)
    return _started(line, process if foreground else None, config)


def _start_process(config: MountConfig, server_module: str, *, foreground: bool) -> tuple[int, subprocess.Popen[bytes]]:
    """Start server and keeper (first_start.py): the pipe for its line, and the process, whose stdin is for `config`."""
    log: int | None = None
    if foreground:
        server_log = os.dup(2)
    else:
        log = open_log(config.server.state_dir)
        server_log = open_server_log(config.server.state_dir, otherwise=log)
    ready, ready_for_keeper = os.pipe2(os.O_CLOEXEC)
    link, server_link = packet_pair()
    credentials = _credentials()
    descriptors = [ready_for_keeper, credentials, link.fileno(), server_link.fileno(), server_log]
    words = [*map(str, descriptors), server_module, "foreground" if foreground else "background"]
    try:
        process = subprocess.Popen(
            python_command(sys.executable, "-m", "cachefs.first_start", *words),
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**without_credentials(os.environ), CREDENTIALS_FD_VARIABLE: str(credentials)},
            pass_fds=descriptors,
            start_new_session=not foreground,
        )
    except OSError as exc:
        os.close(ready)
        raise WorkFailed(f"cannot start the keeper: {exc}") from exc
    finally:
        link.close()
        server_link.close()
        close_all([ready_for_keeper, credentials, server_log, *([] if log is None else [log])])
    return ready, process


def _credentials() -> int:
    """A new memfd with the secrets of the environment, for servers: the keeper starts without them."""
    memory_fd = os.memfd_create("cachefs-credentials", os.MFD_CLOEXEC)
    try:
        write_credentials(memory_fd, os.environ)
        return fcntl.fcntl(memory_fd, fcntl.F_DUPFD_CLOEXEC, CREDENTIALS_FD_MIN)
    finally:
        os.close(memory_fd)


def open_log(state_dir: Path) -> int:
    """STATE/log/keeper.log for appending; at 1 MiB the last one is kept as keeper.log.1."""
    path = state_dir / "log" / "keeper.log"
    try:
        if path.exists() and path.stat().st_size > 1 << 20:
            path.rename(path.with_name("keeper.log.1"))
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise UsageError(f"cannot write {path}: {exc.strerror}") from exc


def is_supervised(runtime_dir: Path) -> bool:
    """Whether a keeper lives that uses this runtime directory (it holds a lock there)."""
    return is_locked(runtime_dir / KEEPER_LOCK)


def no_answer(state_dir: Path, runtime_dir: Path) -> StateBusy:
    """For a command that has waited for the server of a keeper that lives: why there is none, if the keeper knows."""
    unmount = "or unmount with `cachefs umount --all --lazy`"
    if reason := failure_of(runtime_dir):
        return StateBusy(f"no server of {state_dir} comes up: {reason}; mend that, its keeper tries again, {unmount}")
    return StateBusy(
        f"the server of {state_dir} does not answer, and its keeper lives: see {state_dir}/log/server.log, {unmount}"
    )


def _wait_for_end(runtime_dir: Path) -> None:
    """A keeper that has said why it ends does so at once: whoever tries again must not find the directory in use."""
    deadline_s = time.monotonic() + END_TIMEOUT_S
    while is_supervised(runtime_dir) and time.monotonic() < deadline_s:
        time.sleep(0.01)


def _make_directories(directories: tuple[Path, ...]) -> None:
    for directory in directories:
        try:
            directory.mkdir(0o700, parents=True, exist_ok=True)
        except FileExistsError as exc:
            raise UsageError(f"{directory} is not a directory") from exc
        except OSError as exc:
            raise UsageError(f"cannot make the directory {directory}: {exc.strerror}") from exc


def _clear_mountpoint(config: MountConfig) -> None:
    supervised = is_supervised(config.server.runtime_dir)
    recover_dead_mount(config.mountpoint, unsupervised=not supervised)
    if supervised:
        raise StateBusy(f"{config.server.state_dir} is in use by another cachefs mount: unmount it first")
    if config.as_root:  # only after the recovery: nothing can be made on, or asked of, a dead mount
        _make_directories((config.mountpoint,))
    check_mountpoint(config.mountpoint)


def _send_config(process: subprocess.Popen[bytes], config: MountConfig) -> None:
    assert process.stdin is not None
    with process.stdin as stdin:
        try:
            stdin.write(encode(config))
        except BrokenPipeError:
            return  # it ended at once; the missing line says so


def _read_line(ready: int, timeout_s: float) -> dict[str, object]:
    """The keeper's one line; empty when it ended without one."""
    poller = select.poll()
    poller.register(ready, select.POLLIN)
    deadline_s = time.monotonic() + timeout_s
    data = b""
    while not data.endswith(b"\n"):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not poller.poll(left_s * 1000):
            raise WorkFailed(f"the mount does not answer after {timeout_s:.0f} s; it was given up")
        part = os.read(ready, 65536)
        if not part:
            return {}
        data += part
    line = json.loads(data)
    assert isinstance(line, dict)
    return line


def _started(line: dict[str, object], process: subprocess.Popen[bytes] | None, config: MountConfig) -> KeeperProcess:
    if line.get("ok"):
        return KeeperProcess(int(str(line["keeper_pid"])), int(str(line["server_pid"])), process)
    message = str(line.get("error") or f"the keeper ended; see {config.server.state_dir}/log/keeper.log")
    kind: type[CachefsError] = UsageError if line.get("exit_code") == UsageError.exit_code else WorkFailed
    raise kind(message)

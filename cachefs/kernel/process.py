"""Starting and watching processes: pidfds, how a process ended, who is at the other end of a socket."""

import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence

from cachefs.config import CREDENTIALS_FD_VARIABLE, without_credentials
from cachefs.kernel import spawn as spawning

PEERCRED = struct.Struct("=iII")  # struct ucred of socket(7): pid, uid, gid

JOURNAL = "/dev/log"
"""Where journald or a syslogd listens."""


def spawn(command: Sequence[str], *, link: int, stderr: int, stdin: int = -1, credentials: int = -1) -> int:
    """As spawn.spawn(), without the secrets of this environment; `credentials` is a memfd with what it lacks."""
    environment = without_credentials(os.environ)
    environment.pop(CREDENTIALS_FD_VARIABLE, None)
    if credentials >= 0:
        environment[CREDENTIALS_FD_VARIABLE] = str(credentials)
    return spawning.spawn(command, environment, link=link, stderr=stderr, stdin=stdin, inherit=credentials)


def how_it_ended(pidfd: int) -> tuple[int | None, str]:
    """Reap the process behind a readable pidfd: (exit status or minus the signal, words for the log).

    The status is None for a process that is not our child (after a takeover).
    """
    try:
        info = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:
        return None, "status unknown: it was started by an earlier keeper"
    assert info is not None
    if info.si_code == os.CLD_EXITED:
        return info.si_status, f"exit status {info.si_status}"
    try:
        name = signal.Signals(info.si_status).name
    except ValueError:
        name = str(info.si_status)
    dumped = ", core dumped" if info.si_code == os.CLD_DUMPED else ""
    return -info.si_status, f"killed by {name}{dumped}"


def kill(pidfd: int, number: signal.Signals) -> None:
    """Send a signal by pidfd; a process that has ended is no error."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the process that made the other end, as the kernel saw it."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEERCRED.size)
    pid, uid, gid = PEERCRED.unpack(data)
    return pid, uid, gid


def log(text: str) -> None:
    """One line to stderr, which is STATE/log/keeper.log in the background. What servers say may be in it."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text[:2000])
    line = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} keeper[{os.getpid()}] {plain}\n"
    try:
        sys.stderr.write(line)
        sys.stderr.flush()
    except (OSError, ValueError):
        to_journal(plain)  # a full disk or a closed terminal must not end the keeper


def to_journal(text: str) -> None:
    """One line for the system's log, where our own cannot be written: its disk is full, read-only or gone.

    Never waits, never fails. RFC 3164, facility daemon, severity error.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(f"<27>cachefs[{os.getpid()}]: {text[:2000]}".encode(errors="replace"), JOURNAL)
    except OSError:
        return  # no such log here, or it is full


def open_server_log(state_dir: str | os.PathLike[str], otherwise: int = 2) -> int:
    """STATE/log/server.log for appending; a copy of `otherwise`, our stderr, if it cannot be opened: a failing disk."""
    path = os.path.join(state_dir, "log", "server.log")
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        log(f"cannot open {path}: {exc.strerror}")
        return os.dup(otherwise)

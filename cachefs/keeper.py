"""The keeper: holds the mount and its backing files, and starts a new server when one dies.

Small on purpose: no network, no cache, no threads, and of cachefs it imports kernel, config and errors only.
One loop over a handful of descriptors; what it is told by a server it checks.

    python -m cachefs.keeper --takeover FD    started by a server, or by itself; `cachefs mount` starts first_start.py
"""

import json
import math
import os
import select
import signal
import socket
import sys
import time

import msgspec

from cachefs.config import credentials_fd, decode
from cachefs.errors import CachefsError, StateBusy, UsageError, WorkFailed
from cachefs.kernel import mounts, wire
from cachefs.kernel.backing import Backings, trusted_program
from cachefs.kernel.locks import note_failure, remove_runtime_dir
from cachefs.kernel.newmount import hold_lock, mount, serving_descriptor, warn_about_timeouts
from cachefs.kernel.process import how_it_ended, kill, log, open_server_log, peer_credentials, spawn
from cachefs.kernel.session import (
    Message,
    Session,
    close_all,
    pack_session,
    packet_pair,
    receive_message,
    send_message,
    unpack_session,
    unpack_volumes,
)
from cachefs.kernel.spawn import python_command
from cachefs.kernel.supervised import Server, close_backing, register_backing

LOCK_TIMEOUT_S = 10.0
LOOP_S = 1.0
"""How long an unmount may go unnoticed. The device is looked at, not polled: each request would wake the poll."""
STOP_GRACE_S = 15.0
HAND_OVER_GRACE_S = 10.0
UPGRADE_READY_S = 20.0
BACKOFF_READY_S_MAX = 0.2
BACKOFF_FAILED_S_MAX = 5.0
STEADY_S = 1.0
"""A server that was ready and lived so long is started again without a pause."""
FIRST_STARTS_MAX = 3
MESSAGES_PER_TURN = 64


class Keeper:
    """The state of one mount. run() returns the exit status when mount and server have ended.

    `waiting`: a server that runs already and waits for its session, and the socket to it.
    """

    def __init__(self, session: Session, ready_fd: int, waiting: tuple[int, socket.socket] | None = None) -> None:
        self._session = session
        self._config = session.config
        self._ready_fd = ready_fd
        self._state_dir = os.path.realpath(self._config.server.state_dir)
        self._backings = Backings(session.fuse_fd, self._state_dir, session.backings)
        self._server: Server | None = None
        self._waiting = waiting
        self._served = ready_fd < 0  # some server of this mount was ready once
        self._starts = 0
        self._failures = 0
        self._restart_at_s = math.inf
        self._no_service_since_s = time.monotonic()  # not reset by a server that a resent request ends at once
        self._next_python = ""  # an upgrade waits for the old server to end
        self._last_python = ""  # an upgrade's new server is not ready yet; this is what to go back to
        self._stopping = False
        self._ended = False
        self._exit_status = 0
        self._wakeup_fd, wakeup_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))

    def adopt(self, server: Server) -> None:
        """Supervise a server that an earlier keeper started."""
        server.ready = self._session.server_ready
        self._server = server
        self._starts = 1
        server.send(Message("adopted"))

    def close_lost_backings(self) -> None:
        """What the last keeper was about to say or to do when it died."""
        try:
            if lost := self._backings.close_lost():
                log(f"closed {lost} backing files that nobody knew of")
        except OSError:
            return  # no passthrough here

    def run(self) -> int:
        """Until the mount and the server have ended."""
        if self._server is None:
            self._start_server()
        while not self._ended:
            self._turn()
        self._report({"error": "the mount was ended before it answered", "exit_code": 1})
        return self._exit_status

    def _turn(self) -> None:
        poller = select.poll()
        poller.register(self._wakeup_fd, select.POLLIN)
        if self._ready_fd >= 0:
            poller.register(self._ready_fd, 0)
        server = self._server
        if server is not None:
            poller.register(server.pidfd, select.POLLIN)
            if server.sock is not None:
                poller.register(server.sock, select.POLLIN)
        until_s = min(self._restart_at_s, server.kill_at_s if server else math.inf)
        timeout_s = min(LOOP_S, max(0.0, until_s - time.monotonic()))
        events = {fd for fd, _ in poller.poll(math.ceil(timeout_s * 1000))}
        if self._wakeup_fd in events:
            numbers = {signal.Signals(number).name for number in os.read(self._wakeup_fd, 4096)}
            self._stop(f"got {', '.join(sorted(numbers))}")
        if self._ready_fd in events and not self._stopping:
            self._stop("the command that waited for the mount is gone")
        if server is not None:
            if server.sock is not None and server.sock.fileno() in events:
                self._receive(server)
            if server.pidfd in events:
                self._server_ended(server)
        if not self._ended:
            self._look_at_mount()
        if not self._ended:
            self._look_at_clock()

    # Starting and restarting

    def _start_server(self) -> None:
        self._restart_at_s = math.inf
        session = self._session
        if self._starts:
            session.generation += 1
        self._starts += 1
        session.restarted = session.generation > 0
        session.never_served = not self._served
        session.backings = self._backings.all()
        session.keeper_pid = os.getpid()
        memory_fd = pack_session(session)
        serving_fd = serving_descriptor(session)
        # Sent before it starts, so that a server has its session even if this keeper dies now.
        handed = [serving_fd, session.ledger_fd, memory_fd, session.fuse_fd]
        try:
            pid, sock = self._hand_to_waiting(handed) or self._spawn_server(handed)
        except OSError as exc:
            log(f"cannot start a server: {exc}")
            self._start_failed(f"cannot start {session.python}: {exc.strerror}")
            return
        finally:
            close_all([memory_fd, serving_fd])
        self._server = Server(sock, os.pidfd_open(pid), pid, os.geteuid())
        if self._last_python:
            self._server.kill_at_s = time.monotonic() + UPGRADE_READY_S
        log(f"started server {pid} (generation {session.generation}, {len(session.backings)} backing files)")

    def _hand_to_waiting(self, handed: list[int]) -> tuple[int, socket.socket] | None:
        """The server that waits, with its session now; None without one. One that has ended took no request: the next
        one is of the same generation."""
        if self._waiting is None:
            return None
        (pid, sock), self._waiting = self._waiting, None
        try:
            send_message(sock, Message("session"), handed)
        except ConnectionError:
            sock.close()
            status = _end_child(pid)
            log(f"server {pid} ended before it had its session (status {os.waitstatus_to_exitcode(status)})")
            return None
        return pid, sock

    def _spawn_server(self, handed: list[int]) -> tuple[int, socket.socket]:
        session = self._session
        ours, theirs = packet_pair()
        log_fd = os.dup(2) if session.foreground else open_server_log(self._state_dir)
        try:
            send_message(ours, Message("session"), handed)
            command = python_command(session.python, "-m", session.server_module, "3")
            pid = spawn(command, link=theirs.fileno(), stderr=log_fd, credentials=credentials_fd(os.environ))
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(log_fd)
        return pid, ours

    def _start_failed(self, reason: str) -> None:
        """No server came up: roll an upgrade back, or try again later."""
        if self._last_python:
            self._roll_back(reason)
        elif not self._served:
            self._fail(reason, WorkFailed.exit_code)
        else:
            self._failures += 1
            backoff_s = min(BACKOFF_FAILED_S_MAX, 0.1 * 2 ** min(self._failures, 10))
            self._restart_at_s = time.monotonic() + backoff_s
            note_failure(self._config.server.runtime_dir, reason)
            log(f"no server: {reason}")
            log(f"the next server starts in {backoff_s:.1f} s")

    def _server_ended(self, server: Server) -> None:
        self._receive(server)
        status, words = how_it_ended(server.pidfd)
        log(f"server {server.pid} ended: {words}")
        server.close_socket()
        os.close(server.pidfd)
        self._server = None
        if server.ready and time.monotonic() - server.started_s > STEADY_S:
            self._no_service_since_s = time.monotonic()
        if self._stopping or not wire.is_connected(self._session.fuse_fd):
            self._finish()
        elif self._next_python:
            self._last_python, self._session.python = self._session.python, self._next_python
            self._next_python = ""
            self._session.upgrade_result = "ok"
            self._start_server()
        elif server.ready:
            lived_s = time.monotonic() - server.started_s
            self._failures = 0 if lived_s > STEADY_S else self._failures + 1
            self._restart_at_s = time.monotonic() + min(BACKOFF_READY_S_MAX, 0.05 * self._failures)
        elif not self._served and server.failure:
            self._fail(server.failure, server.failure_code)
        elif not self._served and status is not None and status < 0 and self._starts < FIRST_STARTS_MAX:
            self._restart_at_s = time.monotonic()
        else:
            where = "" if self._session.foreground else f"; see {self._state_dir}/log/server.log"
            self._start_failed(server.failure or f"the server ended before it was ready: {words}{where}")

    def _fail(self, text: str, exit_code: int) -> None:
        """The first start failed: leave nothing behind, and tell the command that waits."""
        log(f"the first start failed: {text}")
        self._exit_status = exit_code
        self._unmount()
        self._report({"error": text, "exit_code": exit_code})
        self._ended = True

    def _server_is_ready(self, server: Server) -> None:
        server.ready = True
        server.kill_at_s = math.inf
        self._served = True
        note_failure(self._config.server.runtime_dir, "")
        log(f"server {server.pid} is ready after {time.monotonic() - server.started_s:.2f} s")
        self._report({"ok": True, "keeper_pid": os.getpid(), "server_pid": server.pid})
        if self._last_python:
            self._last_python = ""
            log(f"upgraded to {self._session.python}")
            self._become_next_version(server)

    def _report(self, line: dict[str, object]) -> None:
        """Answer the command that waits for the mount, once."""
        if self._ready_fd < 0:
            return
        try:
            os.write(self._ready_fd, json.dumps(line).encode() + b"\n")
        except OSError as exc:
            log(f"nobody waits for the mount any more: {exc.strerror}")
        os.close(self._ready_fd)
        self._ready_fd = -1

    # Upgrading

    def _upgrade(self, server: Server, message: Message) -> None:
        python = message.text
        reason = ""
        if self._next_python or self._last_python or self._stopping:
            reason = "an upgrade or the end of the mount is under way"
        elif python != self._session.python and not trusted_program(python, os.geteuid()):
            reason = f"{python} is no program that only root and this user can change"
        if reason:
            log(f"refused an upgrade: {reason}")
            server.send(Message("refused", request=message.request, text=reason))
            return
        log(f"handing over to {python}")
        self._next_python = python
        server.send(Message("upgrading", request=message.request))
        server.send(Message("stop", text="hand_over"))
        server.kill_at_s = time.monotonic() + HAND_OVER_GRACE_S

    def _roll_back(self, reason: str) -> None:
        log(f"the upgrade failed ({reason}): going back to {self._last_python}")
        self._session.upgrade_result = f"rolled back: {reason}"
        self._session.python, self._last_python = self._last_python, ""
        self._start_server()

    def _become_next_version(self, server: Server) -> None:
        """Replace this program by the new version's keeper, under the same pid; the server notices nothing."""
        assert server.sock is not None
        session = self._session
        session.backings = self._backings.all()
        session.server_pid = server.pid
        session.server_ready = True
        ours, theirs = packet_pair()
        memory_fd = pack_session(session)
        handed = [session.fuse_fd, session.ledger_fd, memory_fd, server.pidfd, server.sock.fileno()]
        send_message(ours, Message("session"), handed)
        os.close(memory_fd)
        os.set_inheritable(theirs.fileno(), True)
        _inherit_credentials(True)
        # Stays blocked over exec, until the new keeper has its handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        command = python_command(session.python, "-m", "cachefs.keeper", "--takeover", str(theirs.fileno()))
        try:
            os.execv(session.python, command)
        except OSError as exc:
            log(f"this keeper stays: cannot execute {session.python}: {exc.strerror}")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
        ours.close()
        theirs.close()

    # Ending

    def _stop(self, reason: str) -> None:
        """Unmount, let the server drain, end. Asked a second time: do not wait for the server."""
        server = self._server
        if self._stopping:
            if server is not None:
                server.kill_at_s = time.monotonic()
            return
        log(f"unmounting: {reason}")
        self._stopping = True
        self._unmount()
        if server is None:
            self._finish()
        else:
            server.send(Message("stop", text="unmount"))
            server.kill_at_s = time.monotonic() + STOP_GRACE_S

    def _unmount(self) -> None:
        session = self._session
        if not wire.is_connected(session.fuse_fd):
            # Aborted, then it is still there; or unmounted by somebody else, and then the kernel may have given the
            # device number to another file system already, which is none of ours.
            place = self._config.mountpoint
            root = mounts.find_mount(os.path.join(os.path.realpath(place.parent), place.name))
            if root is None or root.major_minor != session.device:
                return
        try:
            mounts.unmount_device(session.device, as_root=os.geteuid() == 0)
        except CachefsError as exc:
            log(str(exc))

    def _finish(self) -> None:
        log("the mount has ended")
        self._ended = True

    def _look_at_mount(self) -> None:
        """Unmounted by somebody else, or aborted: nothing will ever be asked again."""
        if self._stopping or wire.is_connected(self._session.fuse_fd):
            return
        log("the file system was unmounted")
        self._stopping = True
        self._unmount()  # an aborted connection is still mounted
        if self._server is None:
            self._finish()
        else:
            self._server.send(Message("stop", text="unmount"))
            self._server.kill_at_s = time.monotonic() + STOP_GRACE_S

    def _look_at_clock(self) -> None:
        now_s = time.monotonic()
        server = self._server
        if server is not None and now_s >= server.kill_at_s:
            server.kill_at_s = math.inf
            log(f"server {server.pid} has not {'ended' if server.ready else 'become ready'} in time: killing it")
            kill(server.pidfd, signal.SIGKILL)
        if server is None and now_s >= self._restart_at_s:
            self._start_server()
        give_up_s = self._config.server.keeper_give_up_s
        serves = server is not None and server.ready
        if not self._stopping and not serves and now_s - self._no_service_since_s > give_up_s > 0:
            log(f"no server for {give_up_s:.0f} s: aborting the mount, so that nobody hangs on it")
            self._exit_status = 1
            mounts.abort(self._session.device, self._config.mountpoint, as_root=os.geteuid() == 0)
            self._stopping = True
            self._unmount()
            if server is None:
                self._finish()
            else:
                kill(server.pidfd, signal.SIGKILL)

    # What servers say

    def _receive(self, server: Server) -> None:
        for _ in range(MESSAGES_PER_TURN):
            if server.sock is None:
                return
            try:
                packet = receive_message(server.sock)
            except BlockingIOError:
                return
            except msgspec.DecodeError as exc:
                log(f"server {server.pid} sent nonsense: {exc}")
                continue
            if packet is None:
                server.close_socket()
                return
            message, descriptors = packet
            try:
                self._handle(server, message, descriptors)
            finally:
                close_all(descriptors)

    def _handle(self, server: Server, message: Message, descriptors: list[int]) -> None:
        match message.kind:
            case "ready":
                self._server_is_ready(server)
            case "failed":
                server.failure, server.failure_code = message.text or "the server failed", message.exit_code
                log(f"server {server.pid} failed: {message.text}")
            case "register":
                server.send(register_backing(self._backings, server.pid, server.uid, message, descriptors))
            case "close":
                close_backing(self._backings, message.backing_id)
                server.send(Message("closed", request=message.request))
            case "volumes":
                self._set_volumes(server, descriptors)
            case "unmount":
                if not self._stopping:
                    self._stop("the server asked for it")
            case "upgrade":
                self._upgrade(server, message)
            case _:
                log(f"server {server.pid} sent {message.kind!r}, which is not a server's to say")

    def _set_volumes(self, server: Server, descriptors: list[int]) -> None:
        """Only the volumes: what a server says never changes which directory its backing files must lie in."""
        try:
            volumes = unpack_volumes(descriptors[0])
        except (msgspec.DecodeError, ValueError, OSError, IndexError) as exc:
            log(f"server {server.pid} sent no volumes: {exc}")
            return
        self._session.config = msgspec.structs.replace(self._session.config, volumes=volumes)


def _inherit_credentials(inherit: bool) -> None:
    """Whether a program that is executed gets the memfd with the environment's secrets, which no keeper reads."""
    if (descriptor := credentials_fd(os.environ)) >= 0:
        os.set_inheritable(descriptor, inherit)


def _end_child(pid: int) -> int:
    """Its wait status. It was not waited for yet: the pid is its own."""
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def start(ready_fd: int, server_module: str, *, foreground: bool, waiting_pid: int, link: int) -> int:
    """A new mount, for a command that reads one line from ready_fd; `link` is the socket to a server that waits.

    `waiting_pid` is -1 when that one could not be started.
    """
    sock = socket.socket(fileno=link)
    data = sys.stdin.buffer.read()
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)
    try:
        config = decode(data)
        lock_fd = hold_lock(config, 0.0)
        warn_about_timeouts()
        session = mount(config, python=sys.executable, server_module=server_module, foreground=foreground)
    except (CachefsError, msgspec.DecodeError, OSError) as exc:
        log(f"cannot mount: {exc}")
        if waiting_pid > 0:
            _end_child(waiting_pid)
        exit_code = exc.exit_code if isinstance(exc, CachefsError) else UsageError.exit_code
        os.write(ready_fd, json.dumps({"error": str(exc), "exit_code": exit_code}).encode() + b"\n")
        return exit_code
    status = Keeper(session, ready_fd, (waiting_pid, sock) if waiting_pid > 0 else None).run()
    remove_runtime_dir(config.server.runtime_dir, keeper_fd=lock_fd)
    os.close(lock_fd)
    return status


def take_over(link_fd: int) -> int:
    """Supervise a live server whose keeper has died, or (after an upgrade) go on as the new version's keeper."""
    os.set_inheritable(link_fd, False)
    _inherit_credentials(False)
    sock = socket.socket(fileno=link_fd)
    packet = receive_message(sock)
    if packet is None or packet[0].kind != "session" or len(packet[1]) < 4:
        log("no session to take over")
        return 1
    fuse_fd, ledger_fd, memory_fd, pidfd, *link = packet[1]
    session = unpack_session(memory_fd, fuse_fd=fuse_fd, ledger_fd=ledger_fd)
    os.close(memory_fd)
    if link:
        sock.close()
        sock = socket.socket(fileno=link[0])
    session.keeper_pid = os.getpid()
    session.python = session.python or sys.executable
    lock_fd = hold_lock(session.config, LOCK_TIMEOUT_S)
    keeper = Keeper(session, -1)
    keeper.adopt(Server(sock, pidfd, session.server_pid, peer_credentials(sock)[1]))
    if not link:
        keeper.close_lost_backings()
    log(f"took over server {session.server_pid} with {len(session.backings)} backing files")
    status = keeper.run()
    remove_runtime_dir(session.config.server.runtime_dir, keeper_fd=lock_fd)
    os.close(lock_fd)
    return status


def main(arguments: list[str]) -> int:
    """See the module's docstring."""
    match arguments:
        case ["--takeover", number]:
            try:
                return take_over(int(number))
            except StateBusy as exc:
                log(str(exc))
                return exc.exit_code
        case _:
            log(f"this program is for cachefs itself: {' '.join(arguments)}")
            return UsageError.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The keeper of node mode: holds the FUSE root of a node, for a server that it neither starts nor trusts.

    python -m cachefs.node_keeper --node-dir D [--server-uid 65534]

Root, in a container of its own (D shared, Bidirectional). It mounts D/root and listens at D/run/keeper.sock. A server
(another container, uid 65534) connects and is given the session, the next one after its death again. A keeper that
was started again takes the mount back from the server that holds it, after checking what it is offered.
SIGTERM ends the keeper, not the mount: the next keeper takes it over.
"""

import argparse
import contextlib
import math
import os
import secrets
import select
import signal
import socket
import sys
import time
from pathlib import Path

import msgspec

from cachefs.config import MountConfig, ServerConfig
from cachefs.errors import CachefsError, StateBusy, UsageError
from cachefs.kernel import mounts, wire
from cachefs.kernel.adopt import OfferRefused, check_device, check_ledger, check_memory
from cachefs.kernel.backing import BACKINGS_MAX, Backings
from cachefs.kernel.locks import KEEPER_LOCK, lock_file
from cachefs.kernel.newmount import mount, serving_descriptor, warn_about_timeouts
from cachefs.kernel.process import log, peer_credentials
from cachefs.kernel.session import (
    Message,
    Session,
    close_all,
    pack_session,
    receive_message,
    send_message,
    unpack_session,
)
from cachefs.kernel.supervised import close_backing, register_backing

ROOT_NAME, RUN_NAME, CACHE_NAME = "root", "run", "cache"
SOCKET_NAME = "keeper.sock"
LOOP_S = 1.0
HELD_S = 10.0
"""For the keeper that ends: the next one may have been started already."""
ADOPT_S = 30.0
"""Somebody holds the old mount's device, or the mount would answer with ENOTCONN: supervisors come within a second."""
GIVE_UP_S = 3600.0
"""An image that cannot be pulled must not end running pods; and nothing may hang for ever. 0: never give up."""
CLIENTS_MAX = 8
MESSAGES_PER_TURN = 64
GREETING_S = 10.0


class _Client:
    """One connection of a server."""

    def __init__(self, sock: socket.socket, pid: int, uid: int) -> None:
        self.sock = sock
        self.pid = pid
        self.uid = uid
        self.since_s = time.monotonic()

    def send(self, message: Message, descriptors: list[int] | None = None) -> bool:
        """False when it is gone or does not read."""
        try:
            send_message(self.sock, message, descriptors or [])
        except OSError as exc:
            log(f"server {self.pid} takes no messages ({exc.strerror}): {message.kind} was dropped")
            return False
        return True


class NodeKeeper:
    """The state of one node's mount. run() ends by a signal, and leaves the mount."""

    def __init__(self, config: MountConfig, listener: socket.socket, server_uid: int) -> None:
        self._config = config
        self._listener = listener
        self._server_uid = server_uid
        self._clients: list[_Client] = []
        self._serving: _Client | None = None
        self._session: Session | None = None
        self._backings: Backings | None = None
        self._root_fd = -1
        self._orphan = ""  # the device of a mount that an earlier keeper made, while it waits for an offer
        self._orphan_until_s = math.inf
        self._no_service_since_s = time.monotonic()
        self._handed_out = 0
        self._wakeup_fd, wakeup_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)

    def begin(self) -> None:
        """Mount, or find the mount of an earlier keeper. Raises UsageError."""
        found = mounts.find_mount(os.path.realpath(self._config.mountpoint))
        if found is None:
            self._mount()
        elif found.fstype != mounts.FSTYPE:
            raise UsageError(f"{self._config.mountpoint} is busy: a {found.fstype} file system is mounted there")
        elif mounts.probe(self._config.mountpoint) == "dead":
            log(f"the mount of an earlier keeper (device {found.major_minor}) is dead: mounting anew")
            self._unmount()
            self._mount()
        else:
            self._orphan = found.major_minor
            self._orphan_until_s = time.monotonic() + ADOPT_S
            log(f"an earlier keeper's mount lives (device {found.major_minor}): waiting for who holds it")

    def run(self) -> int:
        """Until SIGTERM or SIGINT."""
        while True:
            poller = select.poll()
            poller.register(self._wakeup_fd, select.POLLIN)
            poller.register(self._listener, select.POLLIN)
            for client in self._clients:
                poller.register(client.sock, select.POLLIN)
            events = {fd for fd, _ in poller.poll(LOOP_S * 1000)}
            if self._wakeup_fd in events:
                log("ending; the mount stays for the next keeper")
                return 0
            if self._listener.fileno() in events:
                self._accept()
            for client in list(self._clients):
                if client.sock.fileno() in events:
                    self._receive(client)
            self._look()

    # The mount

    def _mount(self) -> None:
        config = msgspec.structs.replace(self._config, session=secrets.token_hex(8))
        session = mount(config, python=sys.executable, server_module="", foreground=False)
        self._take(session)

    def _take(self, session: Session) -> None:
        self._session = session
        self._backings = Backings(session.fuse_fd, os.path.realpath(self._config.server.state_dir), session.backings)
        # O_PATH: nobody needs to answer. The server, which may see nothing of D, checks its work through it.
        self._root_fd = os.open(self._config.mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._orphan = ""
        self._orphan_until_s = math.inf

    def _let_go(self) -> None:
        if self._session is not None:
            close_all([self._session.fuse_fd, self._session.ledger_fd, self._root_fd])
        self._session = None
        self._backings = None
        self._handed_out = 0

    def _unmount(self) -> None:
        """Only the root: binds in pods are the driver's, which tells their owners."""
        place = os.path.realpath(self._config.mountpoint)
        while (found := mounts.find_mount(place)) is not None and found.fstype == mounts.FSTYPE:
            mounts.unmount(place, as_root=True)

    def _look(self) -> None:
        now_s = time.monotonic()
        if self._session is not None and not wire.is_connected(self._session.fuse_fd):
            log("the file system was unmounted or aborted: mounting anew")
            self._mount_anew()
        elif self._session is None and now_s > self._orphan_until_s:
            log("nobody holds the mount of the earlier keeper: mounting anew")
            mounts.abort(self._orphan, self._config.mountpoint, as_root=True)
            self._mount_anew()
        give_up_s = self._config.server.keeper_give_up_s
        if self._session is not None and self._serving is None and now_s - self._no_service_since_s > give_up_s > 0:
            log(f"no server for {give_up_s:.0f} s: aborting the mount, so that nobody hangs on it")
            mounts.abort(self._session.device, self._config.mountpoint, as_root=True)
            self._no_service_since_s = now_s
            self._mount_anew()
        for client in list(self._clients):
            if client is not self._serving and now_s - client.since_s > GREETING_S:
                self._drop(client)

    def _mount_anew(self) -> None:
        for client in list(self._clients):
            client.send(Message("stop", text="hand_over"))
            self._drop(client)
        self._let_go()
        try:
            self._unmount()
            self._mount()
        except (CachefsError, OSError) as exc:
            log(f"cannot mount: {exc}")
            self._orphan_until_s = time.monotonic() + 5.0  # try again

    # Servers

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as exc:  # who connected is gone, or there are no descriptors left
            log(f"cannot accept a connection: {exc.strerror}")
            return
        sock.setblocking(False)
        pid, uid, _gid = peer_credentials(sock)
        if uid not in (0, self._server_uid) or len(self._clients) >= CLIENTS_MAX:
            log(f"refused a connection of process {pid}, uid {uid}")
            sock.close()
            return
        self._clients.append(_Client(sock, pid, uid))

    def _drop(self, client: _Client) -> None:
        client.sock.close()
        self._clients.remove(client)
        if client is self._serving:
            log(f"server {client.pid} is gone")
            self._serving = None
            self._no_service_since_s = time.monotonic()

    def _receive(self, client: _Client) -> None:
        for _ in range(MESSAGES_PER_TURN):
            try:
                packet = receive_message(client.sock)
            except BlockingIOError:
                return
            except msgspec.DecodeError as exc:
                log(f"server {client.pid} sent nonsense: {exc}")
                self._drop(client)
                return
            if packet is None:
                self._drop(client)
                return
            message, descriptors = packet
            try:
                self._handle(client, message, descriptors)
            finally:
                close_all(descriptors)
            if client not in self._clients:
                return

    def _handle(self, client: _Client, message: Message, descriptors: list[int]) -> None:
        if message.kind == "hello":
            self._greet(client, message, descriptors)
        elif client is not self._serving:
            log(f"server {client.pid} says {message.kind!r} before it has the session")
            self._drop(client)
        elif message.kind == "ready":
            log(f"server {client.pid} is ready after {time.monotonic() - client.since_s:.2f} s")
        elif message.kind == "register":
            assert self._backings is not None  # who has the session came after them
            client.send(register_backing(self._backings, client.pid, client.uid, message, descriptors))
        elif message.kind == "close":
            assert self._backings is not None
            close_backing(self._backings, message.backing_id)
            client.send(Message("closed", request=message.request))
        elif message.kind == "failed":
            log(f"server {client.pid} failed: {message.text[:500]!r}")
        elif message.kind == "upgrade":
            text = "in node mode the server is upgraded by starting another one"
            client.send(Message("refused", request=message.request, text=text))
        else:
            log(f"server {client.pid} sent {message.kind!r}, which is not a server's to say in node mode")

    def _greet(self, client: _Client, message: Message, descriptors: list[int]) -> None:
        """Give the session, once to one at a time; who finds no place comes again."""
        serves = message.text == "serving"
        if self._serving is not None and self._serving is not client:
            log(f"server {client.pid} must wait: {self._serving.pid} has the session")
            self._drop(client)
            return
        if self._session is None and descriptors:
            self._adopt(client, descriptors)
        session = self._session
        if session is None:
            self._drop(client)
            return
        if serves and not self._same_mount(descriptors):
            log(f"server {client.pid} serves another mount than this one")
            client.send(Message("stop", text="hand_over"))
            self._drop(client)
            return
        self._serving = client
        if serves:
            log(f"server {client.pid} goes on with this keeper")
            client.send(Message("adopted"))
            return
        self._hand_out(client, session)

    def _same_mount(self, descriptors: list[int]) -> bool:
        assert self._session is not None
        try:
            check_device(descriptors[0], self._session.device)
        except (OfferRefused, OSError, IndexError):
            return False
        return True

    def _adopt(self, client: _Client, descriptors: list[int]) -> None:
        """Take the mount back: of the offer only the device, the ledger, INIT and the backing ids are used."""
        session: Session | None = None
        try:
            if len(descriptors) != 3:
                raise OfferRefused(f"{len(descriptors)} descriptors")
            fuse_fd, ledger_fd, memory_fd = descriptors
            check_device(fuse_fd, self._orphan)
            check_ledger(ledger_fd)
            check_memory(memory_fd)
            session = unpack_session(memory_fd, fuse_fd=-1, ledger_fd=-1)
            wire.parse_init(session.init)
            if len(session.backings) > BACKINGS_MAX or any(not 0 < b.backing_id < 2**31 for b in session.backings):
                raise OfferRefused("backing files that no kernel gives")
            config = msgspec.structs.replace(self._config, session=session.config.session[:64])
            session = msgspec.structs.replace(
                session,
                fuse_fd=os.dup(fuse_fd),
                ledger_fd=os.dup(ledger_fd),
                config=config,
                device=self._orphan,
                keeper_pid=os.getpid(),
                root_path="",
            )
        except (OfferRefused, msgspec.MsgspecError, ValueError, OSError) as exc:
            log(f"refused what server {client.pid} offers: {exc}")
            return
        self._take(session)
        self._handed_out = session.generation + 1
        log(f"took the mount back (device {session.device}) with {len(session.backings)} backing files")

    def _hand_out(self, client: _Client, session: Session) -> None:
        assert self._backings is not None
        session.generation = self._handed_out
        session.restarted = session.generation > 0
        session.never_served = session.generation == 0
        session.backings = self._backings.all()
        session.keeper_pid = os.getpid()
        memory_fd = pack_session(session)
        serving_fd = serving_descriptor(session)
        try:
            handed = [serving_fd, session.ledger_fd, memory_fd, session.fuse_fd, self._root_fd]
            if client.send(Message("session"), handed):
                self._handed_out += 1
                log(f"server {client.pid} has the session (generation {session.generation})")
        finally:
            close_all([memory_fd, serving_fd])


def prepare(node_dir: Path, server_uid: int) -> None:
    """The directories of a node: root (the mount), run and cache (the server's). Raises UsageError."""
    try:
        node_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        node_fd = os.open(node_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name, uid in ((ROOT_NAME, 0), (RUN_NAME, server_uid), (CACHE_NAME, server_uid)):
                if name == ROOT_NAME and mounts.find_mount(os.path.realpath(node_dir / name)) is not None:
                    continue  # what is asked of a mount may wait for its server
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=node_fd)
                # Of an inner directory only itself: what the server made below it is the server's.
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                descriptor = os.open(name, flags, dir_fd=node_fd)
                try:
                    if uid:
                        os.fchown(descriptor, uid, uid)
                    os.fchmod(descriptor, 0o700)
                finally:
                    os.close(descriptor)
        finally:
            os.close(node_fd)
    except OSError as exc:
        raise UsageError(f"the node directory {node_dir} cannot be used: {exc.strerror}") from exc


def hold_node(node_dir: Path) -> int:
    """One keeper for a node directory; the lock ends with this process. Raises StateBusy."""
    return _hold(node_dir, create=True)


def _hold(node_dir: Path, *, create: bool) -> int:
    try:
        return lock_file(node_dir / KEEPER_LOCK, wait_s=HELD_S, create=create)
    except BlockingIOError:
        raise StateBusy(f"another cachefs keeper holds {node_dir}") from None


def unmount_node(node_dir: Path) -> None:
    """What an earlier keeper mounted, if there is something; nothing is made. Raises StateBusy while a keeper lives."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # then no keeper lives here
            stack.callback(os.close, _hold(node_dir, create=False))
        root = node_dir / ROOT_NAME
        found = mounts.find_mount(root)
        if found is not None and found.fstype == mounts.FSTYPE:
            mounts.unmount(root, as_root=True)


def listen(path: Path) -> socket.socket:
    """The socket for servers. Its directory is the server's: so it is never chowned by name, and SO_PEERCRED says
    who connects."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        path.unlink(missing_ok=True)
        before = os.umask(0)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(CLIENTS_MAX)
    except OSError as exc:
        listener.close()
        raise UsageError(f"cannot listen at {path}: {exc.strerror}") from exc
    return listener


def main() -> int:
    """Parse the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="cachefs keeper", description="Hold the FUSE root of a node (node mode).")
    parser.add_argument("--node-dir", type=Path, required=True, help="holds root (the mount), run and cache")
    parser.add_argument("--server-uid", type=int, default=65534, help="whom the server runs as (65534)")
    parser.add_argument("--state-dir", type=Path, help="where the server's files must lie (NODE_DIR/cache)")
    parser.add_argument("--give-up", type=float, default=GIVE_UP_S, metavar="SECONDS", help="abort without a server")
    parser.add_argument("--kernel-disable", default="", metavar="FEATURES", help="kernel features not to use")
    parser.add_argument("--unmount", action="store_true", help="unmount what an earlier keeper mounted, and end")
    arguments = parser.parse_args()
    node_dir = Path(os.path.realpath(arguments.node_dir))
    try:
        if os.geteuid() != 0:
            raise UsageError("the keeper of a node needs root")
        if arguments.unmount:
            unmount_node(node_dir)
            return 0
        prepare(node_dir, arguments.server_uid)
        lock_fd = hold_node(node_dir)
        server = ServerConfig(
            state_dir=arguments.state_dir or node_dir / CACHE_NAME,
            runtime_dir=node_dir / RUN_NAME,
            cache_bytes_max=0,
            allow_other=True,
            keeper_give_up_s=arguments.give_up,
            kernel_disable=tuple(item for item in arguments.kernel_disable.split(",") if item),
        )
        config = MountConfig(server=server, volumes=(), mountpoint=node_dir / ROOT_NAME, as_root=True, session="")
        warn_about_timeouts()
        keeper = NodeKeeper(config, listen(node_dir / RUN_NAME / SOCKET_NAME), arguments.server_uid)
        keeper.begin()
        status = keeper.run()
        os.close(lock_fd)
        return status
    except CachefsError as exc:
        log(str(exc))
        return exc.exit_code


if __name__ == "__main__":
    sys.exit(main())

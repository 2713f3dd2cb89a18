"""The server's side of node mode: its keeper is reached by a path and started by others, its supervisor keeps for it
what must survive its death."""

import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Sequence

import msgspec
import trio

from cachefs.config import NodeConfig, VolumeConfig, decode_node
from cachefs.errors import CachefsError
from cachefs.kernel.process import peer_credentials
from cachefs.kernel.session import (
    Backing,
    Message,
    Session,
    close_all,
    pack_session,
    read_memory_file,
    receive_descriptors,
    receive_message,
    send_message,
    unpack_session,
)
from cachefs.kernel.wire import is_connected
from cachefs.link import KeeperLink

CONNECT_AGAIN_S = 0.2
GREETING_S = 5.0
ALONE_AFTER_S = 1.0
"""No keeper for so long: a server that was handed the mount by its supervisor serves without one."""
PR_SET_PDEATHSIG = 1

logger = logging.getLogger(__name__)


class KeeperAbsent(CachefsError):
    """Nobody answers at the keeper's socket, or has the mount for us yet."""


class Keep:
    """The supervisor's end: descriptors that it keeps under names."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._sock = socket.socket(fileno=descriptor)
        self._sock.setblocking(True)
        data, descriptors, _ = receive_descriptors(self._sock, 65536)
        head = json.loads(data)
        self.kept: dict[str, int] = dict(zip(head["kept"], descriptors, strict=True))
        self.starts = int(head["starts"])
        # Nobody would start this server again, and its successor would wait for it.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        with contextlib.suppress(OSError):
            self._sock.send(b"{}")  # EPIPE: it died before that

    def read(self, name: str) -> bytes:
        """The memory file of this name; empty when there is none."""
        descriptor = self.kept.get(name)
        return b"" if descriptor is None else read_memory_file(descriptor)

    def keep(self, **descriptors: int) -> None:
        """Replace what is kept under these names. The caller keeps its descriptors."""
        with contextlib.suppress(OSError):
            socket.send_fds(self._sock, [json.dumps({"keep": list(descriptors)}).encode()], list(descriptors.values()))

    def say(self, **message: object) -> None:
        """Without descriptors. A supervisor that is gone takes us with it."""
        with contextlib.suppress(OSError):
            self._sock.send(json.dumps(message).encode())


class NodeLink(KeeperLink):
    """As KeeperLink, but a dead keeper is waited for, and the mount never ends at a server's word."""

    keeper_backoff_s_max = 0.5
    last_stop_kind = "hand_over"
    on_node = True

    def __init__(
        self, sock: socket.socket | None, session: Session, mount_fd: int, config: NodeConfig, keep: Keep
    ) -> None:
        super().__init__(sock, session, mount_fd)
        self._keeper_seen = True
        self.node = config
        self.keep = keep
        memory_fd = pack_session(msgspec.structs.replace(session, backings=self.backings()))
        keep.keep(session=memory_fd, mount=mount_fd, ledger=session.ledger_fd)
        os.close(memory_fd)

    @classmethod
    def begin(cls, descriptor: int) -> "NodeLink":
        """Block until there is a session: the keeper's, or what the last server of this supervisor left."""
        keep = Keep(descriptor)
        config = decode_node(keep.read("config"))
        left = _left_session(keep)
        started_s = time.monotonic()
        while True:
            try:
                sock = _connect(config)
                session, mount_fd = _ask(sock, left)
                break
            except (KeeperAbsent, OSError) as exc:
                if left is not None and time.monotonic() - started_s > ALONE_AFTER_S:
                    logger.warning("no keeper (%s): serving what the last server had", exc)
                    sock, session, mount_fd = None, left, keep.kept["mount"]
                    session.generation += 1
                    session.restarted = True
                    session.never_served = False
                    break
                time.sleep(CONNECT_AGAIN_S)
        disabled = session.config.server.kernel_disable
        server = msgspec.structs.replace(config.server, kernel_disable=disabled)
        session.config = msgspec.structs.replace(session.config, server=server, volumes=(), as_root=True)
        return cls(sock, session, mount_fd, config, keep)

    def ready(self) -> None:
        """Say that this server serves."""
        super().ready()
        self.keep.say(ready=True)

    def failed(self, error: CachefsError) -> None:
        """The supervisor sees the exit status."""

    def request_unmount(self) -> None:
        """A server of node mode never ends the mount."""

    def set_volumes(self, volumes: Sequence[VolumeConfig]) -> None:
        """What is published is in the index."""

    async def close_backing(self, backing_id: int) -> None:
        """See KeeperLink."""
        self.keep.say(note={"close": backing_id})
        await super().close_backing(backing_id)

    def _note(self, answer: Message, node: int, object_key: str) -> None:
        super()._note(answer, node, object_key)
        self.keep.say(note={"backing": msgspec.to_builtins(self._backings[answer.backing_id])})

    async def _note_death(self) -> None:
        self.close()
        for question in self._questions.values():
            question.answered.set()
        await trio.lowlevel.checkpoint()

    def _no_keeper(self, error: OSError) -> None:
        if self._keeper_seen:
            logger.warning("the keeper is gone (%s): serving without one until it is back", error)
        self._keeper_seen = False

    def _start_keeper(self) -> None:
        """Not started but found: give the session to the keeper that listens now. Raises OSError."""
        sock = _connect(self.node)
        session = msgspec.structs.replace(self.session, backings=self.backings())
        try:
            _offer(sock, session, self._mount_fd, text="serving")
        except OSError:
            sock.close()
            raise
        sock.setblocking(False)
        self._sock = sock
        self._keeper_seen = True
        logger.warning("connected to a keeper (pid %d)", peer_credentials(sock)[0])
        if self._ready:
            self._tell(Message("ready"))


def _connect(config: NodeConfig) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(GREETING_S)
        sock.connect(str(config.keeper_socket))
        uid = peer_credentials(sock)[1]
        if uid != config.keeper_uid:
            raise PermissionError(1, f"the process at {config.keeper_socket} has uid {uid}")
    except OSError:
        sock.close()
        raise
    return sock


def _offer(sock: socket.socket, session: Session, mount_fd: int, *, text: str) -> None:
    memory_fd = pack_session(session)
    try:
        send_message(sock, Message("hello", text=text), [mount_fd, session.ledger_fd, memory_fd])
    finally:
        os.close(memory_fd)


def _ask(sock: socket.socket, left: Session | None) -> tuple[Session, int]:
    """The keeper's session and the descriptor to keep. Raises KeeperAbsent, OSError; then the socket is closed."""
    try:
        if left is None:
            send_message(sock, Message("hello"))
        else:
            _offer(sock, left, left.fuse_fd, text="")
        packet = receive_message(sock)
        if packet is None:
            raise KeeperAbsent("the keeper has no mount for us yet")
        message, descriptors = packet
        if message.kind != "session" or len(descriptors) != 5:
            close_all(descriptors)
            raise KeeperAbsent(f"the keeper sent {message.kind!r} with {len(descriptors)} descriptors")
    except BaseException:
        sock.close()
        raise
    fuse_fd, ledger_fd, memory_fd, mount_fd, root_fd = descriptors
    session = unpack_session(memory_fd, fuse_fd=fuse_fd, ledger_fd=ledger_fd)
    os.close(memory_fd)
    # Readable by the process that checks passthrough: the mount itself may lie in no directory that we can see.
    session.root_path = f"/proc/{os.getpid()}/fd/{root_fd}"
    return session, mount_fd


def _left_session(keep: Keep) -> Session | None:
    """What the last server of this supervisor held, if its mount still lives."""
    if not {"session", "mount", "ledger"} <= keep.kept.keys():
        return None
    mount_fd = keep.kept["mount"]
    if not is_connected(mount_fd):
        return None
    session = unpack_session(keep.kept["session"], fuse_fd=mount_fd, ledger_fd=keep.kept["ledger"])
    backings = {backing.backing_id: backing for backing in session.backings}
    for note in json.loads(keep.read("notes") or b"[]"):
        if "close" in note:
            backings.pop(note["close"], None)
        else:
            backing = msgspec.convert(note["backing"], Backing)
            backings[backing.backing_id] = backing
    session.backings = tuple(backings.values())
    session.root_path = ""
    return session

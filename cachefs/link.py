"""The server's side of the socket to its keeper: the session, backing files, a new keeper for a dead one."""

import itertools
import logging
import os
import select
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
import trio

from cachefs.config import VolumeConfig, credentials_fd
from cachefs.errors import CachefsError, UsageError, WorkFailed
from cachefs.kernel.process import how_it_ended, spawn
from cachefs.kernel.session import (
    Backing,
    Message,
    Session,
    close_all,
    pack_session,
    pack_volumes,
    packet_pair,
    receive_message,
    send_message,
    unpack_session,
)
from cachefs.kernel.spawn import python_command

REGISTER_DEADLINE_S = 10.0
KEEPER_BACKOFF_S_MAX = 5.0
logger = logging.getLogger(__name__)


class PassthroughRefused(CachefsError):
    """The kernel or the keeper will not read this blob by itself; the message says why. Open it cached."""


class _Question:
    """One request that waits for the keeper's answer; `answer` stays None when the keeper dies."""

    def __init__(self, message: Message) -> None:
        self.message = message
        self.answered = trio.Event()
        self.answer: Message | None = None


class KeeperLink:
    """What the server knows of its keeper. Everything but receive() is for the trio thread.

    run() should be started before the server is ready: a keeper may die at any time.
    """

    keeper_backoff_s_max = KEEPER_BACKOFF_S_MAX
    last_stop_kind = "unmount"
    """After this stop no keeper is needed any more."""
    on_node = False
    """Node mode: the mount outlives this server and its keeper."""

    def __init__(self, sock: socket.socket | None, session: Session, mount_fd: int) -> None:
        if sock is not None:
            sock.setblocking(False)
        self.session = session
        self._mount_fd = mount_fd  # session.fuse_fd, or what that is a clone of: this is what a keeper holds
        self.stop_kind: Literal["", "unmount", "hand_over"] = ""
        """Set before `on_stop`: "unmount" drains, "hand_over" gives handlers 0.5 s (RESEND brings the rest back)."""
        self._sock: socket.socket | None = sock
        self._keeper_pidfd = -1
        self._numbers = itertools.count(1)
        self._questions: dict[int, _Question] = {}
        self._backings = {backing.backing_id: backing for backing in session.backings}
        self._ready = False
        self._adopted = True
        self._unmount_wanted = False

    @classmethod
    def receive(cls, fd: int) -> "KeeperLink":
        """Block until the keeper's session is here. Raises WorkFailed when the keeper is gone before that."""
        os.set_inheritable(fd, False)
        if (descriptor := credentials_fd(os.environ)) >= 0:
            os.set_inheritable(descriptor, False)  # for us and for a new keeper, not for other children
        sock = socket.socket(fileno=fd)
        sock.setblocking(True)
        packet = receive_message(sock)
        if packet is None:
            raise WorkFailed("the keeper ended before it handed over the mount")
        message, descriptors = packet
        if message.kind != "session" or len(descriptors) != 4:
            close_all(descriptors)
            raise WorkFailed(f"the keeper sent {message.kind!r} with {len(descriptors)} descriptors, not a session")
        fuse_fd, ledger_fd, memory_fd, mount_fd = descriptors
        session = unpack_session(memory_fd, fuse_fd=fuse_fd, ledger_fd=ledger_fd)
        os.close(memory_fd)
        return cls(sock, session, mount_fd)

    def ready(self) -> None:
        """Say that this server serves; a command that waits for the mount returns."""
        self._ready = True
        self._tell(Message("ready"))

    def failed(self, error: CachefsError) -> None:
        """Say why this server fails, then exit. After the first start the keeper unmounts, and the waiting command
        prints the error; later it notes it for `status`, and tries again."""
        self._tell(Message("failed", text=str(error), exit_code=error.exit_code))

    def request_unmount(self) -> None:
        """Ask for the end of mount, keeper and server; `on_stop` is called when the keeper has unmounted."""
        self._unmount_wanted = True
        self._tell(Message("unmount"))

    def set_volumes(self, volumes: Sequence[VolumeConfig]) -> None:
        """The volumes that every later server of this mount shall have."""
        self.session.config = msgspec.structs.replace(self.session.config, volumes=tuple(volumes))
        memory_fd = pack_volumes(volumes)
        try:
            self._tell(Message("volumes"), [memory_fd])
        finally:
            os.close(memory_fd)

    def backings(self) -> tuple[Backing, ...]:
        """All backing ids of this mount, those that earlier servers registered included."""
        return tuple(self._backings.values())

    async def register(self, node: int, fd: int, object_key: str) -> int:
        """The backing id for a blob that was opened O_RDONLY, for the inode `node`. Raises PassthroughRefused."""
        number = next(self._numbers)
        message = Message("register", request=number, node=node, object_key=object_key)
        answer = await self._ask(message, [fd])
        if answer.kind != "registered":
            raise PassthroughRefused(answer.text)
        return answer.backing_id

    async def close_backing(self, backing_id: int) -> None:
        """Give a backing id back; files that are open through it go on. An unknown id is no error."""
        self._backings.pop(backing_id, None)
        await self._ask(Message("close", request=next(self._numbers), backing_id=backing_id))

    async def request_upgrade(self, python: str) -> None:
        """Ask the keeper to hand over to the cachefs of another interpreter. Raises UsageError when it refuses.

        When this returns, a stop with `stop_kind` "hand_over" follows; the next server's `session.upgrade_result`
        says what came of it.
        """
        answer = await self._ask(Message("upgrade", request=next(self._numbers), text=python))
        if answer.kind != "upgrading":
            raise UsageError(answer.text)

    async def run(self, on_stop: Callable[[], None]) -> None:
        """Handle the keeper's messages until it has unmounted; start a new keeper when it dies before that."""
        backoff_s = 0.0
        while True:
            await self._listen(on_stop)
            await self._note_death()
            if self.stop_kind == self.last_stop_kind:
                return
            # One that came as far as to supervise is replaced at once: until then this server has nobody.
            backoff_s = 0.0 if self._adopted else min(self.keeper_backoff_s_max, 2 * backoff_s + 0.1)
            self._adopted = False
            await trio.sleep(backoff_s)
            try:
                self._start_keeper()
            except OSError as exc:
                self._no_keeper(exc)

    def close(self) -> None:
        """Close the socket; a keeper takes that for the end of this server's life as a talker, not of its process."""
        if self._sock is not None:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()
            self._sock = None

    async def _listen(self, on_stop: Callable[[], None]) -> None:
        while (sock := self._sock) is not None:
            await trio.lowlevel.wait_readable(sock)
            try:
                packet = receive_message(sock)
            except BlockingIOError:
                continue
            if packet is None:
                return
            message, descriptors = packet
            close_all(descriptors)
            if message.kind == "stop":
                self.stop_kind = "hand_over" if message.text == "hand_over" else "unmount"
                on_stop()
            elif message.kind == "adopted":
                self._adopted = True
            elif question := self._questions.get(message.request):
                if message.kind == "registered":
                    # Before anything else runs: a new keeper closes what it is not told of.
                    self._note(message, question.message.node, question.message.object_key)
                question.answer = message
                question.answered.set()
            elif message.kind == "registered":
                # Its asker was cancelled, or the id would be nobody's for the life of the mount.
                self._tell(Message("close", backing_id=message.backing_id))

    async def _note_death(self) -> None:
        self.close()
        for question in self._questions.values():
            question.answered.set()
        if self._keeper_pidfd >= 0:  # our own child, from an earlier death
            with trio.move_on_after(1):
                await trio.lowlevel.wait_readable(self._keeper_pidfd)
                how_it_ended(self._keeper_pidfd)
            os.close(self._keeper_pidfd)
            self._keeper_pidfd = -1
        if self.stop_kind != self.last_stop_kind:
            logger.warning("the keeper (pid %d) is gone: starting a new one", self.session.keeper_pid)

    def _start_keeper(self) -> None:
        """Hand the session to a new keeper before it starts, so that it has all even if this server dies now."""
        ours, theirs = packet_pair()
        with theirs:
            ours.setblocking(False)
            session = msgspec.structs.replace(
                self.session, backings=self.backings(), server_pid=os.getpid(), server_ready=self._ready
            )
            memory_fd = pack_session(session)
            own_pidfd = os.pidfd_open(os.getpid())
            log_fd = self._open_log()
            try:
                handed = [self._mount_fd, self.session.ledger_fd, memory_fd, own_pidfd]
                send_message(ours, Message("session"), handed)
                command = python_command(sys.executable, "-m", "cachefs.keeper", "--takeover", "3")
                pid = spawn(command, link=theirs.fileno(), stderr=log_fd, credentials=credentials_fd(os.environ))
            except OSError:
                ours.close()
                raise
            finally:
                close_all([memory_fd, own_pidfd, log_fd])
        self._keeper_pidfd = os.pidfd_open(pid)
        self.session.keeper_pid = pid
        self._sock = ours
        logger.warning("started a new keeper, pid %d", pid)
        if self._unmount_wanted:
            self._tell(Message("unmount"))

    def _no_keeper(self, error: OSError) -> None:
        logger.error("cannot start a new keeper: %s", error)

    def _open_log(self) -> int:
        if self.session.foreground:
            return os.dup(2)
        path = self.session.config.server.state_dir / "log" / "keeper.log"
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    async def _ask(self, message: Message, descriptors: Sequence[int] = ()) -> Message:
        """The keeper's answer; a refusal when there is no keeper or it does not answer."""
        question = self._questions[message.request] = _Question(message)
        try:
            with trio.move_on_after(REGISTER_DEADLINE_S):
                await self._send(message, descriptors)
                await question.answered.wait()
        finally:
            del self._questions[message.request]
        return question.answer or Message("refused", text="the keeper does not answer")

    def _note(self, answer: Message, node: int, object_key: str) -> None:
        backing = Backing(node, answer.backing_id, answer.device, answer.inode, object_key)
        self._backings[answer.backing_id] = backing

    async def _send(self, message: Message, descriptors: Sequence[int]) -> None:
        while (sock := self._sock) is not None:
            try:
                send_message(sock, message, descriptors)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(sock)
            except ConnectionError:
                break
            else:
                return
        self._questions[message.request].answered.set()

    def _tell(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send what needs no answer. A dead keeper is no error: run() starts a new one, which learns it all anew."""
        if self._sock is None:
            return
        poller = select.poll()
        poller.register(self._sock, select.POLLOUT)
        for _ in range(2):
            try:
                send_message(self._sock, message, descriptors)
            except BlockingIOError:
                poller.poll(1000)  # the keeper has a hundred unread packets: it is about to read them
            except ConnectionError:
                return
            else:
                return
        logger.error("the keeper takes no messages: %s was not sent", message.kind)

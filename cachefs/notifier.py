"""Tell the kernel which names to forget, and ask it which inodes it has.

The kernel takes the lock of a directory for that, and waits for every LOOKUP in it without a way to be killed. In a
thread of the server such a wait would outlive SIGKILL: the server would stay as a zombie that holds the device, and
the mount would hang. So small processes of their own do it, started when they are first needed.
"""

import errno
import logging
import os
import select
import signal
import socket
import sys
from pathlib import Path

import trio

from cachefs.kernel.process import how_it_ended, kill, spawn
from cachefs.kernel.session import packet_pair
from cachefs.kernel.wire import forget_attributes_message, forget_entry_message

WORKERS_MAX = 4
"""So many directories may be held up by waiting LOOKUPs before a further notification has to wait."""
ATTEMPTS_MAX = 3
REAP_S = 0.2
logger = logging.getLogger(__name__)


class _Job:
    """One notification; `number` is the errno of its write, 0 for none."""

    def __init__(self, message: bytes) -> None:
        self.message = message
        self.attempts = 0
        self.number = 0
        self.done = trio.Event()


class _Worker:
    """One process that writes one notification at a time."""

    def __init__(self, fuse_fd: int) -> None:
        script = Path(__file__).parent / "kernel" / "notify_worker.py"
        self._sock, theirs = packet_pair()
        self._sock.setblocking(False)
        with theirs:
            command = [sys.executable, "-I", "-S", str(script)]
            try:
                self.pid = spawn(command, link=fuse_fd, stderr=2, stdin=theirs.fileno())
            except OSError:
                self._sock.close()
                raise
        self._pidfd = os.pidfd_open(self.pid)

    async def write(self, message: bytes) -> int:
        """The errno that the kernel answered with, 0 for success. Raises ConnectionError when the process is gone."""
        self._sock.send(message, socket.MSG_NOSIGNAL)
        await trio.lowlevel.wait_readable(self._sock)
        answer = self._sock.recv(4)
        if not answer:
            raise ConnectionError(f"the notifier process {self.pid} ended")
        return int.from_bytes(answer, "little")

    def close(self) -> None:
        """End the process. One that waits in the kernel stays until its LOOKUP is answered, and is left alone."""
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()
        kill(self._pidfd, signal.SIGKILL)
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        if poller.poll(REAP_S * 1000):
            how_it_ended(self._pidfd)
        os.close(self._pidfd)


class Notifier:
    """A queue of notifications and up to WORKERS_MAX processes. For the trio thread; run() delivers.

    The queue holds each notification once, so it is bounded by the names that the kernel can know.
    """

    def __init__(self, fuse_fd: int) -> None:
        self._fuse_fd = fuse_fd
        self._queue: dict[bytes, _Job] = {}
        self._idle: list[_Worker] = []
        self._workers: list[_Worker] = []
        self._kick = trio.Event()

    def forget_entry(self, parent: int, name: bytes) -> None:
        """The next use of this name asks the server again. Never blocks; order is kept per name, not between names."""
        self._put(forget_entry_message(parent, name))

    async def is_known(self, node: int) -> bool:
        """Whether the kernel still has this inode (open, mapped, or just remembered). Needs run()."""
        job = self._put(forget_attributes_message(node))
        await job.done.wait()
        return job.number != errno.ENOENT

    async def run(self) -> None:
        """Deliver until cancelled; then the processes are ended."""
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    await self._kick.wait()
                    self._kick = trio.Event()
                    while self._queue and (worker := self._free_worker()):
                        job = self._queue.pop(next(iter(self._queue)))
                        nursery.start_soon(self._deliver, worker, job)
        finally:
            self.close()

    def close(self) -> None:
        """End the processes; what was not delivered is dropped."""
        while self._workers:
            self._workers.pop().close()
        self._idle.clear()

    def _put(self, message: bytes) -> _Job:
        job = self._queue.setdefault(message, _Job(message))
        self._kick.set()
        return job

    def _free_worker(self) -> _Worker | None:
        if self._idle:
            return self._idle.pop()
        if len(self._workers) >= WORKERS_MAX:
            return None
        try:
            worker = _Worker(self._fuse_fd)
        except OSError as exc:
            logger.error("cannot start a notifier process: %s", exc)
            return None
        self._workers.append(worker)
        return worker

    async def _deliver(self, worker: _Worker, job: _Job) -> None:
        job.attempts += 1
        try:
            job.number = await worker.write(job.message)
        except ConnectionError as exc:
            self._workers.remove(worker)
            worker.close()
            if job.attempts < ATTEMPTS_MAX:
                # An equal job that came meanwhile says the same, and this one must still answer its waiter.
                self._queue.setdefault(job.message, job)
                if self._queue[job.message] is not job:
                    job.done.set()
            else:
                logger.error("a name could not be invalidated: %s", exc)
                job.number = errno.EIO
                job.done.set()
        else:
            if job.number not in (0, errno.ENOENT, errno.ENOTDIR, errno.ENOTCONN, errno.ENODEV):
                logger.warning("the kernel refused a notification: %s", os.strerror(job.number))
            self._idle.append(worker)
            job.done.set()
        self._kick.set()

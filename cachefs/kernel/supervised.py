"""One server process as its keeper sees it, and what every keeper answers to a server about backing files."""

import math
import socket
import time
from collections.abc import Sequence

from cachefs.kernel.backing import BackingRefused, Backings
from cachefs.kernel.process import log
from cachefs.kernel.session import Message, send_message


class Server:
    """One server process and the socket to it."""

    def __init__(self, sock: socket.socket, pidfd: int, pid: int, uid: int) -> None:
        sock.setblocking(False)
        self.sock: socket.socket | None = sock
        self.pidfd = pidfd
        self.pid = pid
        self.uid = uid
        self.ready = False
        self.started_s = time.monotonic()
        self.kill_at_s = math.inf
        self.failure = ""
        """What it said before it gave up, with `failure_code` for the command that waits."""
        self.failure_code = 1

    def send(self, message: Message) -> None:
        """A server that is gone, or does not read, misses it: what follows is its end anyway."""
        if self.sock is None:
            return
        try:
            send_message(self.sock, message)
        except ConnectionError:
            return  # its end is about to be noticed
        except OSError as exc:
            log(f"server {self.pid} takes no messages ({exc.strerror}): {message.kind} was dropped")

    def close_socket(self) -> None:
        """Stop listening to it."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None


def register_backing(backings: Backings, pid: int, uid: int, message: Message, descriptors: Sequence[int]) -> Message:
    """The answer to "register": the file is checked, then given to the kernel; or why it is not."""
    try:
        if len(descriptors) != 1:
            raise BackingRefused(f"{len(descriptors)} descriptors")
        known = backings.register(message.node, descriptors[0], message.object_key, uid=uid)
    except BackingRefused as exc:
        log(f"refused a backing file of server {pid}: {exc}")
        return Message("refused", request=message.request, text=f"the keeper refused the file: {exc}")
    except OSError as exc:
        return Message("refused", request=message.request, text=f"the kernel refused the file: {exc.strerror}")
    return Message(
        "registered",
        request=message.request,
        backing_id=known.backing_id,
        device=known.device,
        inode=known.inode,
    )


def close_backing(backings: Backings, backing_id: int) -> None:
    """An id that the kernel does not know any more is no failure of anybody's."""
    try:
        backings.close(backing_id)
    except OSError as exc:
        log(f"cannot close backing file {backing_id}: {exc.strerror}")

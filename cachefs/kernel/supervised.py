"""One server process as its keeper sees it."""

import math
import socket
import time

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

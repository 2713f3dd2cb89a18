"""A peer that speaks whatever bytes a test has for it: for what no HTTP server would ever send."""

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

Say = Callable[["RawPeer", socket.socket, bytes], None]


class RawPeer:
    """A context manager. Each request's head (without a body) is read and given to `say` with the connection.

    `heads` are the heads so far; `end` is set when the test is over. A connection is closed when `say` raises OSError,
    or by the caller.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        self.heads: list[bytes] = []
        self.end = threading.Event()
        self._stack = contextlib.ExitStack()
        self._listener = self._stack.enter_context(socket.socket())
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.address: tuple[str, int] = self._listener.getsockname()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.address[1]}"

    def drip(self, connection: socket.socket, what: bytes, *, every_s: float = 0.1) -> None:
        """Sends `what` again and again until the test is over or nobody listens."""
        while not self.end.wait(every_s):
            connection.sendall(what)

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._stack.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while True:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    byte = connection.recv(1)
                    if not byte:
                        return
                    head += byte
                self.heads.append(head)
                self._say(self, connection, head)


def join(peer: RawPeer, caller: socket.socket, head: bytes) -> None:
    """What a proxy does that is asked to CONNECT: joins the caller with where it wants to go, until either ends."""
    host, _, port = head.split()[1].decode().rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port))) as called:
        caller.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
        back = threading.Thread(target=_copy, args=(called, caller), daemon=True)
        back.start()
        _copy(caller, called)
        back.join()
    raise ConnectionResetError("the connection is used up")


def _copy(here: socket.socket, there: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := here.recv(1 << 16):
            there.sendall(data)
    with contextlib.suppress(OSError):
        there.shutdown(socket.SHUT_WR)


def answer(body: bytes, *, status: str = "200 OK", headers: str = "") -> bytes:
    """One whole answer."""
    return f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def listing(*entries: str, declared: str = "") -> bytes:
    """A LIST's body with these entries as they are; `declared` is what stands before it."""
    return f"{declared}<ListBucketResult>{''.join(entries)}</ListBucketResult>".encode()


def entry(key: str, size: int) -> str:
    """One entry of it, as version "v"."""
    stamp = "<LastModified>2024-05-06T07:08:09Z</LastModified>"
    return f"<Contents><Key>{key}</Key><Size>{size}</Size><ETag>v</ETag>{stamp}</Contents>"

"""Connections for http.client whose large receives are one system call each."""

import http.client
import socket
import ssl
import struct
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CONNECT_SECONDS = (0.3, 1.0, 10.0)
"""How long each attempt to connect may take. A SYN that is lost is sent again after 1 s by the kernel; when many
connections start at once some are lost (a full accept queue), and a reader waits for just that chunk."""
WHOLE_BYTES_MIN = 64 * 1024
"""Receives of this size wait for all of their bytes; smaller ones (answer headers) take what is there."""


class WholeSocket(socket.socket):
    """A blocking socket, so that MSG_WAITALL works: the kernel gathers a piece while the GIL is free.

    With a timeout of Python's a receive is a poll and a copy of what has just arrived, some 30 times per MiB. Here
    the timeout is the kernel's (SO_RCVTIMEO).
    """

    def recv_into(self, buffer: "WriteableBuffer", nbytes: int = 0, flags: int = 0) -> int:
        """Raises TimeoutError when nothing came for the whole timeout; what came before it is returned first."""
        size = nbytes or memoryview(buffer).nbytes
        try:
            return super().recv_into(buffer, nbytes, flags | (socket.MSG_WAITALL if size >= WHOLE_BYTES_MIN else 0))
        except BlockingIOError as error:
            raise TimeoutError("no byte in time") from error


def set_timeout(connection: socket.socket, timeout_s: float) -> None:
    """How long each wait for a byte may take, in seconds."""
    if not isinstance(connection, WholeSocket):
        connection.settimeout(timeout_s)
        return
    timeval = struct.pack("@ll", int(timeout_s), max(1, int(timeout_s % 1 * 1e6)))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


class _PlainConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        plain: socket.socket = self.sock
        plain.settimeout(None)
        self.sock = WholeSocket(plain.family, plain.type, plain.proto, fileno=plain.detach())


def connect(host: str, proxy: str | None, tls: ssl.SSLContext | None, timeout_s: float) -> http.client.HTTPConnection:
    """An open connection to `host` (with its port), by a proxy if there is one. Raises OSError."""
    end_s = time.monotonic() + timeout_s
    for attempt_s in CONNECT_SECONDS:
        left_s = max(end_s - time.monotonic(), 0.001)
        try:
            fresh = _connect(host, proxy, tls, min(left_s, attempt_s))
        except TimeoutError:
            if left_s <= attempt_s or attempt_s == CONNECT_SECONDS[-1]:
                raise
        else:
            set_timeout(fresh.sock, timeout_s)
            return fresh
    raise AssertionError("unreachable")


def _connect(host: str, proxy: str | None, tls: ssl.SSLContext | None, connect_s: float) -> http.client.HTTPConnection:
    fresh: http.client.HTTPConnection
    if tls is not None:
        fresh = http.client.HTTPSConnection(proxy or host, timeout=connect_s, context=tls)
        if proxy:
            fresh.set_tunnel(host)
    else:
        fresh = _PlainConnection(proxy or host, timeout=connect_s)
    try:
        fresh.connect()
    except BaseException:
        fresh.close()
        raise
    return fresh

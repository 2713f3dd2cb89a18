"""Connections for http.client whose large receives are one system call each."""

import http.client
import socket
import ssl
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CONNECT_TIMEOUT_S = 10.0
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
    connect_s = min(timeout_s, CONNECT_TIMEOUT_S)
    fresh: http.client.HTTPConnection
    if tls is not None:
        fresh = http.client.HTTPSConnection(proxy or host, timeout=connect_s, context=tls)
        if proxy:
            fresh.set_tunnel(host)
    else:
        fresh = _PlainConnection(proxy or host, timeout=connect_s)
    try:
        fresh.connect()
        set_timeout(fresh.sock, timeout_s)
    except BaseException:
        fresh.close()
        raise
    return fresh

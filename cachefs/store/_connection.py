"""Connections for http.client whose large receives are one system call each, and answers that can be waited for."""

import http.client
import io
import math
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


class Ear(io.RawIOBase):
    """What comes in on a connection.

    While `patient`, a receive ends with None, which loses no byte, and can be gone on with, in two cases: no byte came
    in time (`set_timeout`), then it was `silent`; or it is `look_up_s` (monotonic), then it `looked_up`. Not patient:
    the first of them is a TimeoutError, the other nothing. `ended`: the last receive met the end.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        # An answer may still be read when its connection was closed: the file holds the socket open.
        self._file = connection.makefile("rb", buffering=0)
        self.patient = True
        self.look_up_s = math.inf
        self.silent = self.looked_up = self.ended = False
        self._overdue = False
        """The last receive gave bytes and then met a silence, which the next one tells."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int | None:
        self.silent, self._overdue = self._overdue, False
        if self.silent:
            return None
        self.looked_up = self.patient and time.monotonic() >= self.look_up_s
        if self.looked_up:
            return None
        try:
            got = self._receive(memoryview(buffer))
            self.ended = got == 0
            return got
        except TimeoutError:
            if not self.patient:
                raise
            self.silent = True
            return None

    def _receive(self, view: memoryview) -> int:
        connection = self.connection
        filled = got = connection.recv_into(view)
        if not isinstance(connection, ssl.SSLSocket) or len(view) < WHOLE_BYTES_MIN:
            return filled
        # A record of TLS has 16 KiB at most. In this loop 65536 of them, 1 GiB, take 0.3 CPU-s less than one by one.
        try:
            while got and filled < len(view) and not (self.patient and time.monotonic() >= self.look_up_s):
                got = connection.recv_into(view[filled:], len(view) - filled)
                filled += got
        except TimeoutError:
            if not self.patient:
                raise
            self._overdue = True
        return filled

    def close(self) -> None:
        self._file.close()
        super().close()

    def makefile(self, mode: str) -> io.BufferedReader:
        """As a socket's: what http.client asks for."""
        return io.BufferedReader(self)


class Answer(http.client.HTTPResponse):
    """The answer to a request that was sent; unlike http.client's it is there before its head has come."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self.ear = Ear(connection.sock)
        super().__init__(self.ear, method="GET")  # type: ignore[arg-type]
        self._of = connection

    def heard(self) -> bool:
        """Waits for a byte of the head or the body: whether one came. True as well when the connection has ended."""
        return bool(self.fp.peek(1)) or not self.ear.silent

    def read_head(self) -> None:
        """Waits for status and headers. Raises OSError, HTTPException."""
        self.ear.patient = False  # http.client would take a pause for the end
        self._of.response_class = lambda *_, **__: self  # type: ignore[assignment]
        try:
            self._of.getresponse()
        finally:
            del self._of.response_class

    def receive_into(self, buffer: memoryview) -> int:
        """How many bytes came, as many as the buffer holds unless the answer pauses (`ear.silent`) or ends."""
        if self.chunked:
            return self.readinto(buffer)
        got = self.fp.readinto(buffer) or 0
        if self.length is not None:
            self.length -= got
        return got

    def has_more(self) -> bool:
        """Whether a byte follows what was received; waits for the end of the answer."""
        self.ear.patient = False
        return bool(self.read(1))

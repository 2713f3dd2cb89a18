"""Connections for http.client whose large receives are one system call each, and answers that can be waited for."""

import contextlib
import http.client
import io
import math
import os
import select
import socket
import ssl
import struct
import time
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CONNECT_SECONDS = (0.3, 1.0, 10.0)
"""How long each attempt to connect may take. A SYN that is lost is sent again after 1 s by the kernel; when many
connections start at once some are lost (a full accept queue), and a reader waits for just that chunk."""
ANSWER_SECONDS_MIN = 2.0
"""So long a proxy's answer and then a handshake may take at least: over a round trip of 0.3 s TLS 1.2 needs 0.6, and
what was begun is not to be thrown away."""
HEAD_START_SECONDS = 0.3
"""An address that has not answered by then is no longer waited for alone: the next one is tried beside it (RFC 8305
does so after 0.25 s). From the other side of the world a SYN is answered within it."""
ADDRESSES_MAX = 16
"""Of one name: S3 gives eight. So many sockets are open at a time."""
SECONDS_MIN = 0.001
WHOLE_BYTES_MIN = 64 * 1024
"""Receives of this size wait for all of their bytes; smaller ones (answer headers) take what is there."""


def until(end_s: float) -> float:
    """How many seconds are left until `end_s` (monotonic); never none, which would mean for ever."""
    return max(end_s - time.monotonic(), SECONDS_MIN)


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


class _Connection(http.client.HTTPConnection):
    """TCP may take `step_s`, a proxy's answer and TLS as long each or ANSWER_SECONDS_MIN; none goes on after `end_s`
    (monotonic).

    http.client gives the whole timeout to each address of a name, then to the proxy and then to the handshake.
    """

    step_s = math.inf
    end_s = math.inf

    def connect(self) -> None:
        step_s, end_s = self.step_s, self.end_s
        answer_s = max(step_s, ANSWER_SECONDS_MIN)

        def create(place: tuple[str, int], *_: object) -> socket.socket:
            connected = dial(*place, step_s, end_s)
            connected.settimeout(min(answer_s, until(end_s)))  # for the proxy's answer
            return connected

        # http.client has no other hook. What is hung in must not hold the connection: nothing would free that.
        self._create_connection = create
        super().connect()
        self.sock.settimeout(min(answer_s, until(end_s)))  # for the handshake, which takes it as its whole time


class _PlainConnection(_Connection):
    def connect(self) -> None:
        super().connect()
        plain: socket.socket = self.sock
        plain.settimeout(None)
        self.sock = WholeSocket(plain.family, plain.type, plain.proto, fileno=plain.detach())


class _TlsConnection(http.client.HTTPSConnection, _Connection):
    """HTTPSConnection makes the handshake after what _Connection does."""


def connect(host: str, proxy: str | None, tls: ssl.SSLContext | None, end_s: float) -> http.client.HTTPConnection:
    """An open connection to `host` (with its port), by a proxy if there is one, handshake and all by `end_s`.

    `end_s` is monotonic; only the resolver keeps to times of its own. The caller sets the timeout of what follows.
    Raises OSError.
    """
    for attempt_s in CONNECT_SECONDS:
        try:
            return _connect(host, proxy, tls, attempt_s, end_s)
        except TimeoutError:
            if attempt_s == CONNECT_SECONDS[-1] or time.monotonic() >= end_s:
                raise
    raise AssertionError("unreachable")


def _connect(
    host: str, proxy: str | None, tls: ssl.SSLContext | None, step_s: float, end_s: float
) -> http.client.HTTPConnection:
    fresh: _PlainConnection | _TlsConnection
    if tls is not None:
        fresh = _TlsConnection(proxy or host, context=tls)
        if proxy:
            fresh.set_tunnel(host)
    else:
        fresh = _PlainConnection(proxy or host)
    fresh.step_s, fresh.end_s = step_s, end_s
    try:
        fresh.connect()
    except BaseException:
        fresh.close()
        raise
    return fresh


def dial(host: str, port: int, step_s: float, end_s: float) -> socket.socket:
    """A connection to the first address of `host` that answers; each has at least `step_s`, but none after `end_s`.

    All are tried before `end_s` (monotonic): each begins a moment after the one before it, which goes on. Raises
    TimeoutError, or the OSError of the last one when all were refused.
    """
    left = deque(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[:ADDRESSES_MAX])
    racing: dict[int, socket.socket] = {}
    failure = OSError("the name has no address")
    poll = select.poll()
    try:
        while left or racing:
            if left:
                try:
                    one = _begin(*left.popleft())
                except OSError as error:
                    failure = error
                    continue
                racing[one.fileno()] = one
                poll.register(one, select.POLLOUT)
            left_s = end_s - time.monotonic()
            wait_s = min(HEAD_START_SECONDS, left_s / (len(left) + 1)) if left else min(step_s, left_s)
            ready = poll.poll(max(0.0, wait_s) * 1000)
            if not ready and (not left or left_s <= 0):
                raise TimeoutError("no connection in time")
            for number, _ in ready:
                poll.unregister(number)
                one = racing.pop(number)
                code = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not code:
                    return one
                one.close()
                failure = OSError(code, os.strerror(code))
        raise failure
    finally:
        for one in racing.values():
            one.close()


def _begin(family: int, kind: int, protocol: int, name: str, address: Any) -> socket.socket:
    """A connection on its way to one address, as getaddrinfo gave it. Raises OSError."""
    one = socket.socket(family, kind, protocol)
    try:
        one.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            one.connect(address)
    except BaseException:
        one.close()
        raise
    return one


def is_over(connection: socket.socket) -> bool:
    """Whether a connection on which nothing is due has something to say: its end, or what no request asked for."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


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

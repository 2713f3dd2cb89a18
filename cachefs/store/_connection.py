"""Connections for http.client whose large receives are one system call each, and answers that can be waited for."""

import http.client
import io
import math
import select
import socket
import ssl
import struct
import time
from typing import TYPE_CHECKING, NamedTuple

from cachefs.store._dial import SECONDS_MIN, Addresses, BadHostName, Proxy, dial, tunnel, until

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CONNECT_SECONDS = (0.3, 1.0, 10.0)
"""How long each attempt to connect may take. A SYN that is lost is sent again after 1 s by the kernel; when many
connections start at once some are lost (a full accept queue), and a reader waits for just that chunk."""
ANSWER_SECONDS_MIN = 2.0
"""So long a proxy's answer and then a handshake may take at least: over a round trip of 0.3 s TLS 1.2 needs 0.6, and
what was begun is not to be thrown away."""
GONE = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)
"""How a request finds that its connection had ended."""
END_SECONDS = 1.0
"""For the end of an answer whose bytes are all there: a chunk without bytes, or the end of the connection. It comes
with the last byte; who never sends it costs this much per GET and a new connection."""
INTERIM_MAX = 5
"""Answers 1xx before the real one. S3 sends none to a GET, a proxy may send a few."""
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


class _Connection(http.client.HTTPConnection):
    """TCP may take `step_s`, a proxy's answer and TLS as long each or ANSWER_SECONDS_MIN; none goes on after `end_s`
    (monotonic). `address` is whom it was connected to.

    http.client gives the whole timeout to each address of a name, then to each byte of a proxy's answer and then to
    the handshake.
    """

    way: "Way"
    joins = False
    """Whether a proxy is asked to join the connection with the host; else it takes whole requests."""
    step_s = math.inf
    end_s = math.inf
    address: tuple[str, int] | None = None

    def connect(self) -> None:
        step_s, end_s, way, joins = self.step_s, self.end_s, self.way, self.joins
        answer_s = max(step_s, ANSWER_SECONDS_MIN)
        reached: list[tuple[str, int]] = []

        def create(place: tuple[str, int], *_: object) -> socket.socket:
            proxy = way.proxy
            connected, address = dial(*((proxy.host, proxy.port) if proxy else place), step_s, end_s, way.addresses)
            reached.append(address)
            try:
                if proxy and joins:
                    tunnel(connected, proxy, *place, min(time.monotonic() + answer_s, end_s))
                # For the handshake, which takes it as its whole time.
                connected.settimeout(min(answer_s, until(end_s)))
            except BaseException:
                connected.close()
                raise
            return connected

        # http.client has no other hook. What is hung in must not hold the connection: nothing would free that.
        self._create_connection = create
        try:
            super().connect()
        finally:
            self.address = reached[0] if reached else None


class _PlainConnection(_Connection):
    def connect(self) -> None:
        super().connect()
        plain: socket.socket = self.sock
        plain.settimeout(None)
        self.sock = WholeSocket(plain.family, plain.type, plain.proto, fileno=plain.detach())


class _TlsConnection(http.client.HTTPSConnection, _Connection):
    """HTTPSConnection makes the handshake after what _Connection does."""

    joins = True


class Way(NamedTuple):
    """How a store is reached: what is known of its addresses (or its proxy's), by which proxy, with TLS or without."""

    addresses: Addresses
    proxy: Proxy | None = None
    tls: ssl.SSLContext | None = None


def connect(host: str, way: Way, end_s: float) -> http.client.HTTPConnection:
    """An open connection to `host` (with its port), by a proxy if there is one, handshake and all by `end_s`.

    `end_s` is monotonic. The caller sets the timeout of what follows.
    Raises OSError, of them BadHostName and ProxyRefused.
    """
    for attempt_s in CONNECT_SECONDS:
        try:
            return _connect(host, way, attempt_s, end_s)
        except TimeoutError:
            if attempt_s == CONNECT_SECONDS[-1] or time.monotonic() >= end_s:
                raise
    raise AssertionError("unreachable")


def address_of(connection: http.client.HTTPConnection) -> tuple[str, int] | None:
    """Whom it was connected to, also when it is closed."""
    assert isinstance(connection, _Connection)
    return connection.address


def _connect(host: str, way: Way, step_s: float, end_s: float) -> http.client.HTTPConnection:
    fresh: _PlainConnection | _TlsConnection
    fresh = _TlsConnection(host, context=way.tls) if way.tls is not None else _PlainConnection(host)
    fresh.way, fresh.step_s, fresh.end_s = way, step_s, end_s
    try:
        fresh.connect()
    except UnicodeError as error:
        fresh.close()
        raise BadHostName(f"{host!r} is no name of a host") from error
    except BaseException as error:
        if isinstance(error, (TimeoutError, *GONE)):
            way.addresses.suspect(fresh.address)
        fresh.close()
        raise
    return fresh


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

    `end_s` (monotonic): what is read until it is set to math.inf again has to be there by then, however many receives
    it takes; for who is not patient. It sets the timeout as well.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        # An answer may still be read when its connection was closed: the file holds the socket open.
        self._file = connection.makefile("rb", buffering=0)
        self.patient = True
        self.look_up_s = self.end_s = math.inf
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
            self._hurry()
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
                self._hurry()
                got = connection.recv_into(view[filled:], len(view) - filled)
                filled += got
        except TimeoutError:
            if not self.patient:
                raise
            self._overdue = True
        return filled

    def _hurry(self) -> None:
        # A timeout alone begins anew with each receive: who sends a byte a second would never be late.
        if self.end_s == math.inf:
            return
        left_s = self.end_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("not whole in time")
        set_timeout(self.connection, max(left_s, SECONDS_MIN))

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
        self.wait_s = math.inf
        """How long a byte of a body in chunks may take, with all that is said of its chunk."""

    def heard(self) -> bool:
        """Waits for a byte of the head or the body: whether one came. True as well when the connection has ended."""
        return bool(self.fp.peek(1)) or not self.ear.silent

    def read_head(self) -> None:
        """Waits for status and headers, until `ear.end_s`. Raises OSError, HTTPException."""
        self.ear.patient = False  # http.client would take a pause for the end
        self._of.response_class = lambda *_, **__: self  # type: ignore[assignment]
        try:
            self._of.getresponse()
        finally:
            del self._of.response_class

    def _read_status(self) -> tuple[str, int, str]:
        # http.client passes over 100 without a limit, and takes other answers 1xx for the real one.
        for _ in range(INTERIM_MAX + 1):
            found: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
            if not 100 <= found[1] < 200:
                return found
            http.client.parse_headers(self.fp)
        raise http.client.HTTPException("more answers 1xx than any request has")

    def receive_into(self, buffer: memoryview) -> int:
        """How many bytes came, as many as the buffer holds unless the answer pauses (`ear.silent`) or ends."""
        if self.chunked:
            return self._receive_chunked(buffer)
        got = self.fp.readinto(buffer) or 0
        if self.length is not None:
            self.length -= got
        return got

    def _receive_chunked(self, buffer: memoryview) -> int:
        filled = 0
        while filled < len(buffer):
            self.ear.end_s = time.monotonic() + self.wait_s
            part = self.read1(len(buffer) - filled)
            if not part:
                break
            buffer[filled : filled + len(part)] = part
            filled += len(part)
        self.ear.end_s = math.inf
        return filled

    def has_more(self) -> bool:
        """Whether a byte follows what was received; waits for the end of the answer, END_SECONDS at most.

        An answer without an end stays open (`isclosed`): its connection cannot be used again.
        """
        self.ear.patient = False
        self.ear.end_s = time.monotonic() + END_SECONDS
        try:
            return bool(self.read(1))
        except TimeoutError:
            return False

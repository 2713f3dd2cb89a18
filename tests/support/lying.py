"""An S3 server of our own that counts requests and lies when told to: it stands in for broken servers and links.

It speaks real HTTP to real clients: ListObjectsV2 (prefix, delimiter, pages, url encoding), GET and HEAD with one
range and If-Match. Signatures are not checked. It runs in threads of the test's process and stops with it.
"""

import contextlib
import hashlib
import http.server
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.support.s3 import ACCESS_KEY, REGION, SECRET_KEY
from tests.support.servers import wait_until

Lie = Literal[
    "short body",  # Content-Length and body are shorter than the range that Content-Range claims
    "long body",  # ... longer
    "wrong range",  # 206 with the bytes and the Content-Range of another place
    "no range",  # 206 without Content-Range
    "whole object",  # 200 and everything, though a range was asked for
    "other etag",  # the right range, as another version
    "other size",  # Content-Range with another total
    "cut",  # the connection ends in the middle of the body (a LIST without Content-Length: in the middle of the XML)
    "hang",  # no answer until the lie is taken back
    "hang in body",  # half of the body, then nothing until the lie is taken back
    "hang after head",  # status and headers, then nothing until the lie is taken back
    "hang up",  # no answer but the end of the connection
    "hang, then cut",  # no answer; when the lie is taken back, the end of the connection
    "crawl",  # a quarter of the body, then 1 KiB every 20 ms until the lie is taken back
    "503",
    "429",
    "403",
    "404",
    "412",
    "garbage",  # 200 with a body that is no XML
    "truncated",  # a LIST page that says IsTruncated and gives no token
    "same page",  # a LIST page whose token leads to itself
    "301",  # the bucket is in another region
]
OTHER_REGION = "eu-central-7"
CODES: dict[str, str] = {
    "503": "SlowDown",
    "429": "TooManyRequests",
    "403": "AccessDenied",
    "404": "NoSuchKey",
    "412": "PreconditionFailed",
}
"""Lies that are nothing but a status, and the code of each."""


class Request(NamedTuple):
    """One request that was received; `target` is the path and query as sent."""

    method: str
    bucket: str
    key: str
    prefix: str
    range: str
    if_match: str
    signed: bool
    target: str


class Told(NamedTuple):
    """One lie: for requests to `key` (a LIST: the prefix; None: all), the next `times` of them after `skip`."""

    lie: Lie
    operation: Literal["GET", "LIST"]
    key: str | None
    left: list[int]
    skip: list[int]
    over: threading.Event


class LyingServer:
    """A context manager; use `put`, then `lie`, then look at `requests`, `gets`, `lists`."""

    def __init__(self, *, page_size: int = 1000, latency_s: float = 0.0, tls: tuple[Path, Path] | None = None) -> None:
        """`tls`: (certificate, key) as PEM files."""
        self.access_key, self.secret_key, self.region = ACCESS_KEY, SECRET_KEY, REGION
        self.page_size = page_size
        self.latency_s = latency_s
        self.retry_after: str | None = None
        """The Retry-After of answers with 503 and 429."""
        self.handshake_s = 0.0
        """How long a new connection waits before it is read from (with TLS: before its handshake)."""
        self._tls = tls
        self.connections_total = 0
        self.waiting = 0
        """How many requests hang now."""
        self._objects: dict[tuple[str, str], bytes | Path] = {}
        self._etags: dict[tuple[str, str], str] = {}
        self._buckets: set[str] = set()
        self._requests: list[Request] = []
        self._lies: list[Told] = []
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self.deaf: set[socket.socket] = set()
        self.end = threading.Event()
        self._server: http.server.ThreadingHTTPServer | None = None
        self.port = 0

    @property
    def endpoint_url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    # --- contents

    def put(self, bucket: str, key: str, data: bytes | Path) -> str:
        """Stores an object (of bytes, or a file that is served from where it is); returns its etag unquoted."""
        if isinstance(data, Path):
            etag = hashlib.md5(f"{data} {data.stat()}".encode()).hexdigest()
        else:
            etag = hashlib.md5(data).hexdigest()
        with self._lock:
            self._buckets.add(bucket)
            self._objects[bucket, key] = data
            self._etags[bucket, key] = etag
        return etag

    def make_bucket(self, bucket: str) -> None:
        with self._lock:
            self._buckets.add(bucket)

    def delete(self, bucket: str, key: str) -> None:
        with self._lock:
            self._objects.pop((bucket, key), None)

    # --- lies

    def lie(
        self,
        lie: Lie,
        *,
        operation: Literal["GET", "LIST"] = "GET",
        key: str | None = None,
        times: int = 1_000_000,
        skip: int = 0,
    ) -> None:
        """From now on; `times` and `skip` count requests that the lie fits."""
        with self._lock:
            self._lies.append(Told(lie, operation, key, [times], [skip], threading.Event()))

    def tell_the_truth(self) -> None:
        """Takes all lies back; what hangs is answered."""
        with self._lock:
            told, self._lies = self._lies, []
        for one in told:
            one.over.set()

    @property
    def lies_left(self) -> int:
        """How many more requests are lied to."""
        with self._lock:
            return sum(told.left[0] for told in self._lies)

    def _lie_for(self, operation: str, key: str) -> Told | None:
        with self._lock:
            for told in self._lies:
                if told.operation != operation or told.key not in (None, key) or told.left[0] <= 0:
                    continue
                if told.skip[0] > 0:
                    told.skip[0] -= 1
                    continue
                told.left[0] -= 1
                return told
        return None

    def wait_waiting(self, count: int, *, deadline_s: float = 60.0) -> None:
        """Until `count` requests hang."""
        wait_until(
            lambda: self.waiting >= count, what=f"{count} requests hang ({self.waiting} do)", deadline_s=deadline_s
        )

    # --- what was asked

    @property
    def requests(self) -> tuple[Request, ...]:
        with self._lock:
            return tuple(self._requests)

    def forget_requests(self) -> None:
        with self._lock:
            self._requests.clear()

    def gets(self, key: str | None = None) -> int:
        """GETs of objects so far (of one key, in any bucket)."""
        return sum(r.method == "GET" and r.key != "" and key in (None, r.key) for r in self.requests)

    def lists(self, prefix: str | None = None) -> int:
        """LISTs so far (of one prefix, which ends in a slash but for the root)."""
        return sum(r.method == "GET" and r.key == "" and prefix in (None, r.prefix) for r in self.requests)

    # --- life

    def start(self) -> None:
        """Listens; on the same port again after stop()."""
        handler = type("Handler", (_Handler,), {"origin": self})
        server = _Server(("127.0.0.1", self.port), handler)
        self.port = server.server_address[1]
        self._server = server
        if self._tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self._tls)
            # The handshake is made by the connection's own thread, with its first read.
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True, name="lying-server").start()

    def stop(self) -> None:
        """Refuses and cuts all connections, as a server does that is gone. Contents and lies stay."""
        server, self._server = self._server, None
        if server is None:
            return
        server.shutdown()
        server.server_close()
        self.hang_up()

    def hang_up(self) -> None:
        """Ends all connections of now, as a server does with idle ones."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def go_deaf(self) -> None:
        """No request on a connection of now is answered any more, as when a firewall forgot them without a word."""
        with self._lock:
            self.deaf |= self._connections

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self.end.set()
        self.tell_the_truth()

    # --- for the handler

    def note(self, request: Request) -> None:
        with self._lock:
            self._requests.append(request)

    def find(self, bucket: str, key: str) -> tuple[bytes | Path, str] | None:
        with self._lock:
            data = self._objects.get((bucket, key))
            return None if data is None else (data, self._etags[bucket, key])

    def has_bucket(self, bucket: str) -> bool:
        with self._lock:
            return bucket in self._buckets

    def keys(self, bucket: str) -> list[tuple[str, int, str]]:
        """(key, size, etag) in order."""
        with self._lock:
            found = [(key, _size(data), self._etags[b, key]) for (b, key), data in self._objects.items() if b == bucket]
        return sorted(found)

    @contextlib.contextmanager
    def hanging(self, told: Told) -> Iterator[None]:
        with self._lock:
            self.waiting += 1
        try:
            told.over.wait(600)
            yield
        finally:
            with self._lock:
                self.waiting -= 1

    @contextlib.contextmanager
    def connected(self, connection: socket.socket) -> Iterator[None]:
        with self._lock:
            self._connections.add(connection)
            self.connections_total += 1
        try:
            yield
        finally:
            with self._lock:
                self._connections.discard(connection)
                self.deaf.discard(connection)


def _size(data: bytes | Path) -> int:
    return data.stat().st_size if isinstance(data, Path) else len(data)


def _slice(data: bytes | Path, start: int, stop: int) -> bytes:
    if isinstance(data, Path):
        with data.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)
    return data[start:stop]


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 1024

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    origin: LyingServer

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        # Without this a 40 ms delayed acknowledgement sits between header and body.
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def handle(self) -> None:
        with self.origin.connected(self.connection):
            if self.origin.handshake_s:
                time.sleep(self.origin.handshake_s)
            super().handle()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit("x://x" + self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        bucket, _, key = parts.path[1:].partition("/")
        bucket, key = unquote(bucket), unquote(key)
        prefix = query.get("prefix", "")
        asked = self.headers.get("range", ""), self.headers.get("if-match", ""), "authorization" in self.headers
        self.origin.note(Request(self.command, bucket, key, prefix, *asked, self.path))
        if self.connection in self.origin.deaf:
            self.origin.end.wait(600)
        if self.origin.latency_s:
            time.sleep(self.origin.latency_s)
        if not self.origin.has_bucket(bucket):
            self._error(404, "NoSuchBucket")
        elif key == "":
            self._list(bucket, query)
        else:
            self._object(bucket, key)

    # --- objects

    def _object(self, bucket: str, key: str) -> None:
        told = self.origin._lie_for("GET", key)
        if told is not None and self._common_lie(told):
            return None
        lie = told.lie if told is not None else None
        found = self.origin.find(bucket, key)
        if found is None:
            return self._error(404, "NoSuchKey")
        data, etag = found
        size = _size(data)
        if self.headers.get("if-match", "*").strip('"') not in ("*", etag):
            return self._error(412, "PreconditionFailed")
        start, stop, status = 0, size, 200
        if "range" in self.headers:
            first, _, last = self.headers["range"].removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(size, int(last or size) + 1), 206
            if start >= size:
                return self._error(416, "InvalidRange")
        if lie == "whole object":
            start, stop, status = 0, size, 200
        if lie == "wrong range":
            start, stop = (start - 1, stop - 1) if start > 0 else (start + 1, min(stop + 1, size))
        headers = {"ETag": f'"{etag if lie != "other etag" else "0" * 32}"', "Content-Type": "binary/octet-stream"}
        if status == 206 and lie != "no range":
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size + (lie == 'other size')}"
        body = _slice(data, start, stop)
        if lie == "short body":
            body = body[: len(body) // 2]
        elif lie == "long body":
            body += b"0123456789"
        self._answer(status, headers, body, told)
        return None

    # --- lists

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        told = self.origin._lie_for("LIST", prefix)
        if told is not None and self._common_lie(told):
            return
        lie = told.lie if told is not None else None
        encoded = query.get("encoding-type") == "url"
        limit = min(self.origin.page_size, int(query.get("max-keys", "1000")))
        after = unquote(query.get("continuation-token", ""))
        entries: dict[str, str] = {}
        for key, size, etag in self.origin.keys(bucket):
            if not key.startswith(prefix):
                continue
            name = quote(key, safe="/") if encoded else escape(key)
            xml = (
                f"<Contents><Key>{name}</Key><Size>{size}</Size><ETag>&quot;{etag}&quot;</ETag>"
                f"<LastModified>2024-05-06T07:08:09.000Z</LastModified></Contents>"
            )
            if delimiter and delimiter in key[len(prefix) :]:
                key = key[: key.index(delimiter, len(prefix)) + 1]
                name = quote(key, safe="/") if encoded else escape(key)
                xml = f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>"
            if key > after or not after:
                entries.setdefault(key, xml)
        page = sorted(entries)[:limit]
        more = len(page) < len(entries) or lie in ("truncated", "same page")
        token = quote(page[-1], safe="") if page and lie != "truncated" else ""
        if lie == "same page":
            token = "again"
        body = (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
            f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>"
            + ("<EncodingType>url</EncodingType>" if encoded else "")
            + (f"<NextContinuationToken>{token}</NextContinuationToken>" if more and token else "")
            + "".join(entries[key] for key in page)
            + "</ListBucketResult>"
        )
        self._answer(200, {"Content-Type": "application/xml"}, body.encode(), told, framed=lie != "cut")

    # --- answers

    def _common_lie(self, told: Told) -> bool:
        """True when the lie is the whole answer."""
        if told.lie in ("hang", "hang, then cut"):
            with self.origin.hanging(told):
                pass
        if told.lie in ("hang up", "hang, then cut"):
            self._cut()
            return True
        if told.lie in CODES:
            pause = self.origin.retry_after if told.lie in ("503", "429") else None
            self._error(int(told.lie), CODES[told.lie], {"Retry-After": pause} if pause else None)
            return True
        if told.lie == "301":
            self._error(301, "PermanentRedirect", {"x-amz-bucket-region": OTHER_REGION})
            return True
        if told.lie == "garbage":
            self._answer(200, {"Content-Type": "text/html"}, b"<html><p>Sign in to this network", None)
            return True
        return False

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        body = f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()
        self._answer(status, {"Content-Type": "application/xml", **(headers or {})}, body, None)

    def _answer(
        self, status: int, headers: dict[str, str], body: bytes, told: Told | None, *, framed: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if framed:
            self.send_header("Content-Length", str(len(body)))
        else:
            # A body that the end of the connection ends: a cut cannot be told from the end by HTTP.
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        if told is not None and told.lie in ("cut", "hang in body"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if told.lie == "cut":
                self._cut()
                return
            with self.origin.hanging(told):
                pass
            body = body[len(body) // 2 :]
        if told is not None and told.lie == "hang after head":
            self.wfile.flush()
            with self.origin.hanging(told):
                pass
        if told is not None and told.lie == "crawl":
            sent = len(body) // 4
            self.wfile.write(body[:sent])
            while sent < len(body) and not told.over.wait(0.02):
                self.wfile.write(body[sent : sent + 1024])
                sent += 1024
            body = body[sent:]
        self.wfile.write(body)

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

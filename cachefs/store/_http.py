"""A small S3 client over http.client: signed LIST and GET, one error class per cause, keys exactly as they are.

It receives straight into the caller's buffer: half of the processor time of obstore's stream. And obstore's paths
cannot hold every key (empty parts, `.`, `..`), its listing strips and rejects such keys, and all that is not 403,
404 or 412 is one GenericError there. Here the cause is known by type: a broken certificate, a store that lies, a
connection that was cut.
"""

import http.client
import re
import ssl
import threading
import time
import urllib.request
import xml.etree.ElementTree as ET
from collections import deque
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from cachefs.chunk import MIB, ObjectId
from cachefs.errors import CachefsError, IntegrityError, StoreUnavailable, UsageError
from cachefs.store._aws import UNRESERVED, Credentials, sign
from cachefs.store._connection import connect, set_timeout
from cachefs.store._s3 import Location, RawPage, check_range, parse_list, status_error

FIRST_PIECE_BYTES = MIB // 8
"""A reader of a few KiB does not wait for more than this."""
PIECE_BYTES = MIB
"""A READ of the kernel's: a reader of a whole file wakes at once for each. Fewer wake-ups are less work."""
IDLE_CONNECTIONS_MAX = 64
IDLE_SECONDS_MAX = 15.0
"""Stores close idle connections after about 20 s, and firewalls forget them without a word."""
LIST_BYTES_MAX = 32 * MIB
"""1000 keys of 1024 bytes, each byte written as %XX, twice over, are 6 MB."""
ERROR_BYTES_MAX = 64 * 1024
CODE = re.compile(r"[A-Za-z0-9.]{1,80}")


class Service(NamedTuple):
    """Where S3 is and as whom it is asked.

    `credentials` None: requests are not signed; `static_credentials`: they are plain keys that never expire;
    `ca_file` None: the system's certificates.
    """

    location: Location
    endpoint: str
    region: str
    credentials: Callable[[], Credentials] | None
    static_credentials: bool
    ca_file: str | None


class S3Client:
    """Thread-safe; connections are kept and used again."""

    def __init__(self, service: Service) -> None:
        self._idle: deque[tuple[http.client.HTTPConnection, float]] = deque()
        self._lock = threading.Lock()
        self._closed = False
        self._service = service
        self._endpoint = urlsplit(service.endpoint)
        self._tls = ssl.create_default_context(cafile=service.ca_file) if self._endpoint.scheme == "https" else None
        self._proxy = self._find_proxy()

    def _find_proxy(self) -> str | None:
        host = self._endpoint.hostname or ""
        proxy = urllib.request.getproxies().get(self._endpoint.scheme)
        if not proxy or urllib.request.proxy_bypass(host):
            return None
        return urlsplit(proxy if "://" in proxy else f"http://{proxy}").netloc

    # --- requests

    def list(self, prefix: str, *, delimiter: str, token: str | None, limit: int, timeout_s: float) -> RawPage:
        """One ListObjectsV2. Raises what status_error and parse_list say, StoreUnavailable for a broken connection."""
        query = {"list-type": "2", "encoding-type": "url", "max-keys": str(limit), "prefix": prefix}
        if delimiter:
            query["delimiter"] = delimiter
        if token is not None:
            query["continuation-token"] = token
        where = f"s3://{self._service.location.bucket}/{prefix}"
        try:
            with _Exchange(self, "", query, {}, timeout_s, where) as answer:
                answer.raise_for_status(200)
                body = answer.response.read(LIST_BYTES_MAX + 1)
        except (OSError, http.client.HTTPException) as error:
            raise self._translate(error, where) from error
        if len(body) > LIST_BYTES_MAX:
            raise IntegrityError(f"{where}: the listing has no end")
        return parse_list(body, where)

    def get_into(
        self,
        buffer: memoryview,
        object_id: ObjectId,
        start: int,
        stop: int,
        progress: Callable[[int], None],
        timeout_s: float,
    ) -> None:
        """See Store.fetch_into; `timeout_s` bounds each wait for a byte."""
        where = f"s3://{self._service.location.bucket}/{object_id.path}"
        headers = {"range": f"bytes={start}-{stop - 1}", "if-match": f'"{object_id.version}"'}
        size = stop - start
        try:
            with _Exchange(self, object_id.path, {}, headers, timeout_s, where) as answer:
                answer.raise_for_status(206, 200)
                response = answer.response
                check_range(
                    object_id,
                    start,
                    stop,
                    status=response.status,
                    content_range=response.getheader("content-range", ""),
                    length=response.length,
                    etag=response.getheader("etag", ""),
                )
                filled = 0
                while filled < size:
                    piece = PIECE_BYTES - filled % PIECE_BYTES if filled else FIRST_PIECE_BYTES
                    got = response.readinto(buffer[filled : min(size, filled + piece)])
                    if got == 0:
                        raise StoreUnavailable(f"{where}: the answer was cut after {filled} of {size} bytes")
                    filled += got
                    if filled < size:
                        progress(filled)
                if response.read(1):
                    raise IntegrityError(f"{where}: the store sent more than the {size} bytes of the part")
        except (OSError, http.client.HTTPException) as error:
            raise self._translate(error, where) from error
        progress(size)

    def _translate(self, error: Exception, where: str) -> CachefsError:
        host = self._endpoint.netloc
        if isinstance(error, ssl.SSLCertVerificationError):
            reason = error.verify_message
            return UsageError(f"the certificate of {host} is not trusted ({reason}): set AWS_CA_BUNDLE to its CA file")
        if isinstance(error, TimeoutError):
            return StoreUnavailable(f"{where}: {host} does not answer in time")
        if isinstance(error, http.client.IncompleteRead):
            return StoreUnavailable(f"{where}: the answer was cut")
        return StoreUnavailable(
            f"{where}: {host} cannot be reached ({error or type(error).__name__}): check --endpoint-url"
        )

    # --- connections

    def path(self, key: str) -> str:
        """The request's path, encoded as S3 signs it: everything but unreserved characters and slashes."""
        return f"{self._endpoint.path.rstrip('/')}/{self._service.location.bucket}" + (
            f"/{quote(key, safe='/' + UNRESERVED)}" if key else ""
        )

    def send(
        self, connection: http.client.HTTPConnection, key: str, query: dict[str, str], headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        """Signs and sends one GET; returns when the answer's header is there."""
        path = self.path(key)
        raw_query = urlencode(sorted(query.items()), quote_via=quote, safe=UNRESERVED)
        given = {"host": self._endpoint.netloc, **headers}
        if self._service.credentials is not None:
            keys = self._service.credentials()
            given |= sign("GET", path, raw_query, given, credentials=keys, region=self._service.region)
        target = path + (f"?{raw_query}" if raw_query else "")
        if self._proxy and self._tls is None:
            target = f"http://{self._endpoint.netloc}{target}"
        connection.putrequest("GET", target, skip_host=True, skip_accept_encoding=True)
        for name, value in given.items():
            connection.putheader(name, value)
        connection.endheaders()
        return connection.getresponse()

    def connection(self, timeout_s: float) -> tuple[http.client.HTTPConnection, bool]:
        """An open connection, and whether it was used before (then the store may have closed it meanwhile)."""
        with self._lock:
            idle, kept_s = self._idle.pop() if self._idle else (None, 0.0)
        if idle is not None and time.monotonic() - kept_s > IDLE_SECONDS_MAX:
            idle.close()
            self.forget_idle()  # the others are older
        elif idle is not None and idle.sock is not None:
            set_timeout(idle.sock, timeout_s)
            return idle, True
        return connect(self._endpoint.netloc, self._proxy, self._tls, timeout_s), False

    def keep(self, connection: http.client.HTTPConnection) -> None:
        """Takes back a connection whose answer was read to its end."""
        with self._lock:
            if not self._closed and len(self._idle) < IDLE_CONNECTIONS_MAX:
                self._idle.append((connection, time.monotonic()))
                return
        connection.close()

    def forget_idle(self) -> None:
        """Closes all idle connections: one of them was dead, so the others are likely to be."""
        with self._lock:
            idle, self._idle = self._idle, deque()
        for connection, _ in idle:
            connection.close()

    def __del__(self) -> None:
        # A store that nobody closed (its volume could not be added) leaves no sockets behind.
        self.close()

    def close(self) -> None:
        """Closes idle connections; those in use are closed when they come back."""
        self._closed = True
        self.forget_idle()

    def error_for(self, response: http.client.HTTPResponse, where: str) -> CachefsError:
        """The error that an answer means; reads its body for the code."""
        try:
            code = ET.fromstring(response.read(ERROR_BYTES_MAX)).findtext("{*}Code") or ""
        except (ET.ParseError, OSError, http.client.HTTPException):
            code = ""
        return status_error(
            response.status,
            code if CODE.fullmatch(code) else "",
            bucket=self._service.location.bucket,
            what=where,
            region=self._service.region,
            actual_region=response.getheader("x-amz-bucket-region"),
        )


class _Exchange:
    """One request and its answer; the connection goes back to the pool only when the answer was read to its end."""

    response: http.client.HTTPResponse

    def __init__(
        self,
        client: S3Client,
        key: str,
        query: dict[str, str],
        headers: dict[str, str],
        timeout_s: float,
        where: str,
    ) -> None:
        self._client = client
        self._request = (key, query, headers)
        self._timeout_s = timeout_s
        self._where = where

    def __enter__(self) -> "_Exchange":
        while True:
            self._connection, used = self._client.connection(self._timeout_s)
            try:
                self.response = self._client.send(self._connection, *self._request)
                return self
            except (ConnectionError, http.client.BadStatusLine):
                self._connection.close()
                if not used:
                    raise
                # An idle connection that the store had closed: not a failure of the store.
                self._client.forget_idle()
            except BaseException:
                self._connection.close()
                raise

    def raise_for_status(self, *expected: int) -> None:
        """Raises what the answer means unless its status is one of `expected`."""
        if self.response.status not in expected:
            raise self._client.error_for(self.response, self._where)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        answered = error is None or (isinstance(error, CachefsError) and self.response.length == 0)
        whole = answered and self.response.isclosed() and not self.response.will_close
        self.response.close()
        if whole:
            self._client.keep(self._connection)
        else:
            self._connection.close()

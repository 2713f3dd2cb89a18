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
import xml.etree.ElementTree as ET
from collections import deque
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from cachefs.chunk import MIB
from cachefs.errors import CachefsError, IntegrityError, StoreUnavailable, UsageError, printable
from cachefs.store._aws import UNRESERVED, Credentials, sign
from cachefs.store._connection import GONE, Answer, Way, address_of, connect, is_over, set_timeout
from cachefs.store._dial import Addresses, BadHostName, ProxyRefused, find_proxy, until
from cachefs.store._resolve import NameServersSilent
from cachefs.store._s3 import Location, RawPage, parse_list, retry_after_s, status_error

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
        """Raises UsageError for a proxy in the environment that cannot be used."""
        self._idle: deque[tuple[http.client.HTTPConnection, float]] = deque()
        self._lock = threading.Lock()
        self._closed = False
        self._service = service
        self._endpoint = urlsplit(service.endpoint)
        self._tls = ssl.create_default_context(cafile=service.ca_file) if self._endpoint.scheme == "https" else None
        self._proxy = find_proxy(self._endpoint.scheme, self._endpoint.hostname or "")
        self._addresses = Addresses()
        self._way = Way(self._addresses, self._proxy, self._tls)

    # --- requests

    def list(self, prefix: str, *, delimiter: str, token: str | None, limit: int, timeout_s: float) -> RawPage:
        """One ListObjectsV2, whole within `timeout_s`.

        Raises what status_error and parse_list say, StoreUnavailable for a broken connection.
        """
        query = {"list-type": "2", "encoding-type": "url", "max-keys": str(limit), "prefix": prefix}
        if delimiter:
            query["delimiter"] = delimiter
        if token is not None:
            query["continuation-token"] = token
        where = self.where(prefix)
        try:
            with Exchange(self, "", query, {}, timeout_s, where) as exchange:
                exchange.ask()
                if self._addresses.untried:
                    # It may take connections and stay silent; half of the time is for another one.
                    exchange.due(exchange.end_s - timeout_s / 2)
                exchange.read_head()
                exchange.answer.ear.end_s = exchange.end_s
                exchange.raise_for_status(200)
                body = exchange.answer.read(LIST_BYTES_MAX + 1)
        except (OSError, http.client.HTTPException) as error:
            raise self.translate(error, where) from error
        if len(body) > LIST_BYTES_MAX:
            raise IntegrityError(f"{where}: the listing has no end")
        return parse_list(body, where)

    def where(self, key: str) -> str:
        """What a message calls an object."""
        return f"s3://{self._service.location.bucket}/{key}"

    def translate(self, error: Exception, where: str) -> CachefsError:
        """What an OSError or HTTPException of a request means."""
        host = self._endpoint.netloc
        by = f" by the proxy {self._proxy}" if self._proxy else ""
        if isinstance(error, BadHostName):
            return UsageError(f"{host!r} is no name of a host: check --endpoint-url and --region")
        if isinstance(error, ProxyRefused) and error.status == 407:
            return self._proxy_denies()
        if isinstance(error, ssl.SSLCertVerificationError):
            reason = error.verify_message
            return UsageError(f"the certificate of {host} is not trusted ({reason}): set AWS_CA_BUNDLE to its CA file")
        if isinstance(error, NameServersSilent):
            name = self._proxy.host if self._proxy else self._endpoint.hostname
            return StoreUnavailable(f"{where}: no name server tells the address of {name} in time")
        if isinstance(error, TimeoutError):
            return StoreUnavailable(f"{where}: {host} does not answer in time{by}")
        if isinstance(error, http.client.IncompleteRead):
            return StoreUnavailable(f"{where}: the answer was cut")
        advice = f"check {self._proxy.variable} and NO_PROXY" if self._proxy else "check --endpoint-url"
        reason = printable(str(error)) or type(error).__name__
        return StoreUnavailable(f"{where}: {host} cannot be reached{by} ({reason}): {advice}")

    def _proxy_denies(self) -> UsageError:
        assert self._proxy is not None
        name = self._proxy.variable
        return UsageError(
            f"the proxy {self._proxy} wants another user and password (407): set {name} to "
            "http://USER:PASSWORD@HOST:PORT, or the store's host in NO_PROXY"
        )

    # --- connections

    def path(self, key: str) -> str:
        """The request's path, encoded as S3 signs it: everything but unreserved characters and slashes."""
        return f"{self._endpoint.path.rstrip('/')}/{self._service.location.bucket}" + (
            f"/{quote(key, safe='/' + UNRESERVED)}" if key else ""
        )

    def ask(
        self, connection: http.client.HTTPConnection, key: str, query: dict[str, str], headers: dict[str, str]
    ) -> Answer:
        """Signs and sends one GET."""
        path = self.path(key)
        raw_query = urlencode(sorted(query.items()), quote_via=quote, safe=UNRESERVED)
        given = {"host": self._endpoint.netloc, **headers}
        if self._service.credentials is not None:
            keys = self._service.credentials()
            given |= sign("GET", path, raw_query, given, credentials=keys, region=self._service.region)
        target = path + (f"?{raw_query}" if raw_query else "")
        if self._proxy and self._tls is None:
            target = f"http://{self._endpoint.netloc}{target}"
            if self._proxy.authorization is not None:
                given["proxy-authorization"] = self._proxy.authorization
        connection.putrequest("GET", target, skip_host=True, skip_accept_encoding=True)
        for name, value in given.items():
            connection.putheader(name, value)
        connection.endheaders()
        return Answer(connection)

    def connection(self, end_s: float, *, fresh: bool = False) -> tuple[http.client.HTTPConnection, bool]:
        """An open connection, and whether it was used before (then the store may have closed it meanwhile).

        A new one is made by `end_s` (monotonic) or never. The caller sets its timeout.
        """
        idle = None if fresh else self._take_idle()
        if idle is not None:
            return idle, True
        return connect(self._endpoint.netloc, self._way, end_s), False

    def _take_idle(self) -> http.client.HTTPConnection | None:
        """The one that was used last of those that, as far as the kernel knows, are open."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                idle, kept_s = self._idle.pop()
            if time.monotonic() - kept_s > IDLE_SECONDS_MAX:
                idle.close()
                self.forget_idle()  # the others are older
                return None
            # 0.7 us; without it a GET is sent in vain, and its reader waits for a round trip more.
            if idle.sock is not None and not is_over(idle.sock):
                return idle
            idle.close()

    def keep(self, connection: http.client.HTTPConnection) -> None:
        """Takes back a connection whose answer was read to its end."""
        self._addresses.trust(address_of(connection))
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

    def suspect(self, connection: http.client.HTTPConnection) -> None:
        """An answer on it did not come in time: the next connection goes to another address, if there is one."""
        self._addresses.suspect(address_of(connection))

    def __del__(self) -> None:
        # A store that nobody closed (its volume could not be added) leaves no sockets behind.
        self.close()

    def close(self) -> None:
        """Closes idle connections; those in use are closed when they come back."""
        self._closed = True
        self.forget_idle()

    def error_for(self, response: http.client.HTTPResponse, where: str) -> CachefsError:
        """The error that an answer means; reads its body for the code."""
        if response.status == 407 and self._proxy is not None:
            return self._proxy_denies()
        try:
            code = ET.fromstring(response.read(ERROR_BYTES_MAX)).findtext("{*}Code") or ""
        except (ET.ParseError, LookupError, ValueError, OSError, http.client.HTTPException):
            code = ""
        return status_error(
            response.status,
            code if CODE.fullmatch(code) else "",
            bucket=self._service.location.bucket,
            what=where,
            region=self._service.region,
            actual_region=response.getheader("x-amz-bucket-region"),
            retry_after_s=retry_after_s(response.getheader("retry-after"), time.time()),
        )


class Exchange:
    """One request and its answer; the connection goes back to the pool only when the answer was read to its end.

    `ask`, perhaps `heard`, `read_head`, and then what `answer` gives. A context manager; or `finish` ends it.

    Connection and first byte are due `timeout_s` after its making, at `end_s` (monotonic), also when an idle connection
    turns out to be dead and is replaced; so is the head and the body of an error, whole, unless `due` says another
    time. `listen` says how long each later wait may take.
    """

    answer: Answer
    asked_s: float
    """When it was sent (monotonic), the last time if it had to be sent again."""

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
        self.end_s = time.monotonic() + timeout_s
        self._listen_s = timeout_s
        self._due_s = self.end_s
        self._where = where
        self._connection: http.client.HTTPConnection | None = None
        self._used = False
        self.has_head = False

    def ask(self, *, fresh: bool = False) -> None:
        """Sends the request; `fresh`: on a connection that was never used."""
        while True:
            # Not what `listen` said: that may be the short wait before a hedge.
            connection, self._used = self._client.connection(self.end_s, fresh=fresh)
            try:
                set_timeout(connection.sock, min(self._listen_s, until(self.end_s)))
                self.asked_s = time.monotonic()
                self.answer = self._client.ask(connection, *self._request)
            except GONE:
                connection.close()
                if not self._used:
                    self._client.suspect(connection)
                    raise
                # An idle connection that the store had closed: not a failure of the store.
                self._client.forget_idle()
            except BaseException:
                connection.close()
                raise
            else:
                self._connection = connection
                return

    def listen(self, timeout_s: float) -> None:
        """How long each wait for a byte may take from here on, in seconds."""
        self._listen_s = timeout_s
        self.answer.wait_s = timeout_s
        set_timeout(self.answer.ear.connection, timeout_s)

    def due(self, end_s: float) -> None:
        """The head, and the body of an error, are due by `end_s` (monotonic), in however many pieces they come."""
        self._due_s = end_s

    def heard(self) -> bool:
        """Waits for a byte of the head or the body: whether one came, or without a head the end of the connection."""
        while True:
            try:
                heard = self.answer.heard()
            except GONE:
                if self.has_head or not self._used:
                    raise
                self._ask_anew()
            else:
                if not self.answer.ear.ended:
                    return heard
                if self.has_head:
                    raise http.client.IncompleteRead(b"")
                if not self._used:
                    return heard
                self._ask_anew()

    def suspect(self) -> None:
        """It is late: who is asked next is to be another address."""
        if self._connection is not None:
            self._client.suspect(self._connection)

    def stay(self) -> None:
        """From here on it is a failure when the connection ends, also if it was an idle one."""
        self._used = False

    def _ask_anew(self) -> None:
        """An idle connection was one that the store had closed: not a failure of the store."""
        assert self._connection is not None
        self._connection.close()
        self._client.forget_idle()
        self.ask()

    def read_head(self) -> None:
        """Waits for status and headers, which nobody has checked then. What is read next is due by the same time."""
        while True:
            self.answer.ear.end_s = self._due_s
            try:
                self.answer.read_head()
            except (*GONE, http.client.BadStatusLine):
                if not self._used:
                    raise
                self._ask_anew()
            else:
                self.has_head = True
                return

    def raise_for_status(self, *expected: int) -> None:
        """Raises what the answer means unless its status is one of `expected`."""
        if self.answer.status not in expected:
            raise self._client.error_for(self.answer, self._where)

    def finish(self, error: BaseException | None) -> None:
        """The end, with the error that was the reason, if any."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if isinstance(error, (TimeoutError, *GONE)):
            self._client.suspect(connection)
        if isinstance(error, TimeoutError):
            # It may have died without a word, and idle ones with it: what is asked next is not to wait for those.
            self._client.forget_idle()
        answered = error is None or (isinstance(error, CachefsError) and self.answer.length == 0)
        whole = answered and self.has_head and self.answer.isclosed() and not self.answer.will_close
        self.answer.close()
        if whole:
            self._client.keep(connection)
        else:
            connection.close()

    def __enter__(self) -> "Exchange":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.finish(error)

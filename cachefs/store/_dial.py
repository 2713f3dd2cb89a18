"""Ways to a store: the addresses of its name, and a proxy if the environment names one."""

import base64
import contextlib
import os
import re
import select
import socket
import threading
import time
import urllib.request
from collections import deque
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes, urlsplit

from cachefs.errors import UsageError
from cachefs.store._resolve import Resolver

HEAD_START_SECONDS = 0.3
"""An address that has not answered by then is no longer waited for alone: the next one is tried beside it (RFC 8305
does so after 0.25 s). From the other side of the world a SYN is answered within it."""
ADDRESSES_MAX = 16
"""Of one name: S3 gives eight. So many sockets are open at a time."""
SECONDS_MIN = 0.001
PROXY_HEAD_BYTES_MAX = 16 * 1024
PROXY_PORT = 80
PROXY_STATUS = re.compile(rb"HTTP/1\.[0-9] ([0-9]{3})\b")


def until(end_s: float) -> float:
    """How many seconds are left until `end_s` (monotonic); never none, which would mean for ever."""
    return max(end_s - time.monotonic(), SECONDS_MIN)


class BadHostName(OSError):
    """What cannot be any host's name (an empty label, one of more than 63 characters), whoever is asked."""


class ProxyRefused(OSError):
    """A proxy answered CONNECT with `status`, or with what is no answer (None)."""

    def __init__(self, status: int | None) -> None:
        super().__init__(f"it answered {status}" if status is not None else "its answer is not HTTP")
        self.status = status


class Proxy(NamedTuple):
    """Where a proxy is; `variable` names it in the environment, `authorization` is the header that it wants, if any."""

    host: str
    port: int
    variable: str
    authorization: str | None

    def __repr__(self) -> str:
        return f"Proxy({self})"

    def __str__(self) -> str:
        return f"{bracketed(self.host)}:{self.port} ({self.variable})"


def bracketed(host: str) -> str:
    """As it is written before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def find_proxy(scheme: str, host: str) -> Proxy | None:
    """The proxy that the environment names for `scheme` and `host`. Raises UsageError for one that cannot be used.

    Messages hold nothing of it but its scheme: a password may be anywhere in what is written wrong.
    """
    text = urllib.request.getproxies().get(scheme)
    if not text or urllib.request.proxy_bypass(host):
        return None
    variable = f"{scheme.upper()}_PROXY"
    advice = f"set {variable} to http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, or the store's host in NO_PROXY"
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        name, port = parts.hostname, parts.port
    except ValueError:
        raise UsageError(f"{variable} is no URL of a proxy: {advice}") from None
    if parts.scheme != "http":
        raise UsageError(f"{variable} is a proxy by {parts.scheme[:20]}://, which is not known here: {advice}")
    if not name or not name.isprintable() or port == 0:
        raise UsageError(f"{variable} is no URL of a proxy: {advice}")
    authorization = None
    if parts.username is not None:
        pair = unquote_to_bytes(parts.username) + b":" + unquote_to_bytes(parts.password or "")
        authorization = f"Basic {base64.b64encode(pair).decode('ascii')}"
    return Proxy(name, port or PROXY_PORT, variable, authorization)


def tunnel(connection: socket.socket, proxy: Proxy, host: str, port: int, end_s: float) -> None:
    """Has the proxy join `connection` with `host`, by `end_s` (monotonic) whole.

    Raises TimeoutError, ProxyRefused, UnicodeError for a name that is none, OSError.
    """
    place = f"{bracketed(host.encode('idna').decode('ascii'))}:{port}"
    lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}"]
    if proxy.authorization is not None:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    connection.settimeout(until(end_s))
    connection.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
    head = bytearray()
    while not head.endswith((b"\r\n\r\n", b"\n\n")):
        if time.monotonic() >= end_s:
            raise TimeoutError("the proxy's answer is not whole in time")
        connection.settimeout(until(end_s))
        # One by one, some hundred: what follows the head is the store's.
        byte = connection.recv(1)
        head += byte
        if not byte or len(head) > PROXY_HEAD_BYTES_MAX:
            raise ProxyRefused(None)
    match = PROXY_STATUS.match(head)
    if match is None or not match[1].startswith(b"2"):
        raise ProxyRefused(int(match[1]) if match else None)


class Addresses:
    """What is known of the addresses of one store: who was silent last is tried last. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._resolver = Resolver()
        self._silent: deque[tuple[str, int]] = deque(maxlen=ADDRESSES_MAX)
        self._known = 0

    @property
    def untried(self) -> bool:
        """Whether nobody was silent so far, and the name has more than one address."""
        return not self._silent and self._known > 1

    def resolve(self, host: str, port: int, end_s: float) -> list[Any]:
        """As Resolver: those that were not silent, then the others, the one that was silent last at the end."""
        found = self._resolver.resolve(host, port, end_s)
        with self._lock:
            rank: dict[Any, int] = {address: place for place, address in enumerate(self._silent)}
        if rank:
            found.sort(key=lambda one: rank.get(one[4][:2], -1))
        self._known = len(found)
        return found[:ADDRESSES_MAX]

    def suspect(self, address: tuple[str, int] | None) -> None:
        """It takes connections, and a request was not answered in time."""
        if address is None:
            return
        with self._lock:
            with contextlib.suppress(ValueError):
                self._silent.remove(address)
            self._silent.append(address)

    def trust(self, address: tuple[str, int] | None) -> None:
        """It has answered."""
        if not self._silent or address is None:
            return  # nearly always, and this is called for each GET
        with self._lock, contextlib.suppress(ValueError):
            self._silent.remove(address)


def dial(
    host: str, port: int, step_s: float, end_s: float, addresses: Addresses
) -> tuple[socket.socket, tuple[str, int]]:
    """A connection to the first address of `host` that answers; each has at least `step_s`, but none after `end_s`.

    All are tried before `end_s` (monotonic): each begins a moment after the one before it, which goes on. Raises
    TimeoutError, UnicodeError for what is no name, or the OSError of the last one when all were refused.
    """
    left = deque(addresses.resolve(host, port, end_s))
    racing: dict[int, tuple[socket.socket, tuple[str, int]]] = {}
    failure = OSError("the name has no address")
    poll = select.poll()
    try:
        while left or racing:
            if left:
                found = left.popleft()
                try:
                    one = _begin(*found)
                except OSError as error:
                    failure = error
                    continue
                racing[one.fileno()] = one, found[4][:2]
                poll.register(one, select.POLLOUT)
            left_s = end_s - time.monotonic()
            wait_s = min(HEAD_START_SECONDS, left_s / (len(left) + 1)) if left else min(step_s, left_s)
            ready = poll.poll(max(0.0, wait_s) * 1000)
            if not ready and (not left or left_s <= 0):
                raise TimeoutError("no connection in time")
            for number, _ in ready:
                poll.unregister(number)
                one, address = racing.pop(number)
                code = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not code:
                    return one, address
                one.close()
                failure = OSError(code, os.strerror(code))
        raise failure
    finally:
        for one, _ in racing.values():
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

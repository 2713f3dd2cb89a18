"""The addresses of a name, in time. The system's resolver keeps to deadlines of its own: 10 s for each name server
that is silent, and it cannot be interrupted, so a thread asks it and whoever needs the answer waits as long as he may.
"""

import contextlib
import socket
import threading
import time
from typing import Any

PATIENCE_SECONDS = 1.0
"""After that a name that was resolved before has the addresses that it had: nearly always it still has them, and a
name server that is silent for a while is no reason for a GET to wait."""

STUCK_SECONDS = 60.0
"""A question that has no answer by then is asked anew, by one more thread."""

STUCK_MAX = 4
"""So many threads may be lost to the resolver (a name service whose daemon hangs)."""

KNOWN_SECONDS = 3600.0
"""So long. Later an address may belong to somebody else."""


class NameServersSilent(TimeoutError):
    """Nobody told the addresses of a name in time."""


class _Lookup:
    """One question to the resolver, for all who ask meanwhile."""

    def __init__(self) -> None:
        self.begun_s = time.monotonic()
        self.ended = threading.Event()
        self.found: list[Any] = []
        self.error: Exception | None = None


class Resolver:
    """getaddrinfo with a deadline. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lookups: dict[tuple[str, int], _Lookup] = {}
        self._stuck = 0
        self._known: dict[tuple[str, int], tuple[list[Any], float]] = {}

    def resolve(self, host: str, port: int, end_s: float) -> list[Any]:
        """As getaddrinfo for streams, by `end_s` (monotonic).

        Raises NameServersSilent, UnicodeError for what is no name, OSError.
        """
        with contextlib.suppress(socket.gaierror):
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        known, known_s = self._known.get((host, port), ([], 0.0))
        if known and time.monotonic() > known_s + KNOWN_SECONDS:
            known = []
        try:
            lookup = self._lookup(host, port)
        except RuntimeError as exc:
            if known:
                return list(known)
            raise OSError(f"there is no thread to ask for the addresses of {host}") from exc
        wait_until_s = min(end_s, lookup.begun_s + PATIENCE_SECONDS) if known else end_s
        if not lookup.ended.wait(max(0.0, wait_until_s - time.monotonic())):
            if known:
                return list(known)
            raise NameServersSilent
        error = lookup.error
        if error is None:
            return list(lookup.found)
        if known and isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
            return list(known)
        raise type(error)(*error.args) from error

    def _lookup(self, host: str, port: int) -> _Lookup:
        """The one that runs, or a new one. Raises RuntimeError when there is no thread for it."""
        place = host, port
        with self._lock:
            lookup = self._lookups.get(place)
            stuck = lookup is not None and time.monotonic() > lookup.begun_s + STUCK_SECONDS
            if lookup is None or (stuck and self._stuck < STUCK_MAX):
                lookup = _Lookup()
                threading.Thread(target=self._run, args=(place, lookup), name="resolve", daemon=True).start()
                self._stuck += stuck
                self._lookups[place] = lookup
        return lookup

    def _run(self, place: tuple[str, int], lookup: _Lookup) -> None:
        try:
            lookup.found = socket.getaddrinfo(*place, type=socket.SOCK_STREAM)
        except Exception as exc:
            lookup.error = exc
        with self._lock:
            if self._lookups.get(place) is lookup:
                del self._lookups[place]
            else:
                self._stuck -= 1
            if lookup.error is None:
                self._known[place] = lookup.found, time.monotonic()
        lookup.ended.set()

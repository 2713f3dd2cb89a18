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
        self._known: dict[tuple[str, int], tuple[list[Any], float]] = {}

    def resolve(self, host: str, port: int, end_s: float) -> list[Any]:
        """As getaddrinfo for streams, by `end_s` (monotonic).

        Raises NameServersSilent, UnicodeError for what is no name, OSError.
        """
        with contextlib.suppress(socket.gaierror):
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        lookup = self._lookup(host, port)
        known, known_s = self._known.get((host, port), ([], 0.0))
        if known and time.monotonic() > known_s + KNOWN_SECONDS:
            known = []
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
        """The one that runs, or a new one."""
        place = host, port
        with self._lock:
            lookup = self._lookups.get(place)
            if lookup is None:
                lookup = _Lookup()
                try:
                    threading.Thread(target=self._run, args=(place, lookup), name="resolve", daemon=True).start()
                except RuntimeError as exc:
                    raise OSError(f"there is no thread to ask for the addresses of {host}") from exc
                self._lookups[place] = lookup
        return lookup

    def _run(self, place: tuple[str, int], lookup: _Lookup) -> None:
        try:
            lookup.found = socket.getaddrinfo(*place, type=socket.SOCK_STREAM)
        except Exception as exc:
            lookup.error = exc
        with self._lock:
            del self._lookups[place]
            if lookup.error is None:
                self._known[place] = lookup.found, time.monotonic()
        lookup.ended.set()

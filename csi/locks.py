"""One request at a time per key; the second does not wait, it is told to come again (CSI asks for ABORTED)."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from csi.failure import Busy


class KeyLocks:
    """The keys that are being worked on. Bounded by the number of worker threads of the gRPC server."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._held: set[str] = set()

    @contextmanager
    def hold(self, key: str) -> Iterator[None]:
        """Raises Busy when another thread holds `key`."""
        with self._mutex:
            if key in self._held:
                raise Busy("another request for this target is in progress")
            self._held.add(key)
        try:
            yield
        finally:
            with self._mutex:
                self._held.remove(key)

"""The S3 store that is used unless another is asked for: the small client in _http, with retries.

16 parallel GETs of 8 MiB took 0.24 CPU-s/GiB, against 0.53 of obstore, at the same speed.
"""

import random
import threading
import time
from collections.abc import Callable

from cachefs.chunk import ObjectId
from cachefs.errors import AccessDenied, StoreUnavailable
from cachefs.store._http import S3Client, Service
from cachefs.store._s3 import RawPage, S3Store

ATTEMPTS = 5
BACKOFF_SECONDS = 0.05
"""Before the second attempt, then twice as much each time; any part of it, by chance (a reader may be waiting).
An answer that was cut goes on at once: that is no sign of a store that has too much to do."""

QUIET_SECONDS = (3.0, 6.0)
"""How long the first attempts wait for a byte; the ones after them wait for all that is left of `get_timeout_s`. A
connection that died without a word, or an answer that is far behind all others, is asked for again after 3 s."""

RETRY_TOKENS = 64.0
"""Retries that all readers of a store may take at a time. One that fails is gone, one that helps comes back."""
TOKENS_PER_SUCCESS = 0.5
"""What an answer at the first attempt gives back: a store that fails a fifth of all requests never runs out."""


class RetryBudget:
    """A token bucket that the threads of one store share: a store that is down is not asked five times as often."""

    def __init__(self, tokens: float = RETRY_TOKENS) -> None:
        self._tokens = self._tokens_max = tokens
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Whether one more retry is allowed."""
        with self._lock:
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True

    def succeeded(self, retries: int) -> None:
        """A request was answered after so many retries."""
        with self._lock:
            self._tokens = min(self._tokens_max, self._tokens + (retries or TOKENS_PER_SUCCESS))


class _Progress:
    """What has come so far, over all attempts. `heard_s` is when (monotonic seconds)."""

    def __init__(self, told: Callable[[int], None]) -> None:
        self._told = told
        self.base = 0
        self.filled = 0
        self.heard_s = time.monotonic()
        self.given_up = False

    def __call__(self, count: int) -> None:
        self.filled = self.base + count
        self.heard_s = time.monotonic()
        try:
            self._told(self.filled)
        except BaseException:
            self.given_up = True
            raise


class DirectStore(S3Store):
    """`s3://` by the small client. Threads may share it."""

    def __init__(self, service: Service, *, get_timeout_s: float, list_timeout_s: float) -> None:
        super().__init__(service.location, list_timeout_s)
        self._client = S3Client(service)
        self._get_timeout_s = get_timeout_s
        self._budget = RetryBudget()

    def _list(self, prefix: str, *, delimiter: str, token: str | None, limit: int, timeout_s: float) -> RawPage:
        return self._client.list(prefix, delimiter=delimiter, token=token, limit=limit, timeout_s=timeout_s)

    def fetch_into(
        self,
        buffer: memoryview,
        object_id: ObjectId,
        start: int,
        stop: int,
        progress: Callable[[int], None],
    ) -> None:
        """See Store. What passes is tried again, from where it broke off, until no byte came for `get_timeout_s`."""
        assert 0 <= start <= stop <= object_id.size, (start, stop, object_id)
        assert len(buffer) >= stop - start, (len(buffer), start, stop)
        if start == stop:
            progress(0)
            return
        so_far = _Progress(progress)
        for attempt in range(ATTEMPTS):
            base = so_far.base = so_far.filled
            try:
                left_s = self._get_timeout_s - (time.monotonic() - so_far.heard_s)
                quiet_s = QUIET_SECONDS[attempt] if attempt < len(QUIET_SECONDS) else left_s
                timeout_s = max(min(left_s, quiet_s), 0.001)
                self._client.get_into(buffer[base:], object_id, start + base, stop, so_far, timeout_s)
            except (StoreUnavailable, AccessDenied) as error:
                # A 403 is looked at twice: it may be the credentials' service that failed, which passes.
                last = attempt == (1 if isinstance(error, AccessDenied) else ATTEMPTS - 1)
                pause_s = 0.0 if so_far.filled > base else BACKOFF_SECONDS * 2**attempt * random.random()
                over_s = so_far.heard_s + self._get_timeout_s
                if so_far.given_up or last or time.monotonic() + pause_s >= over_s or not self._budget.take():
                    raise
                time.sleep(pause_s)
            else:
                self._budget.succeeded(attempt)
                return

    def close(self) -> None:
        """See Store."""
        self._client.close()

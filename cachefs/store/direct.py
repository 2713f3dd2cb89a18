"""The S3 store that is used unless another is asked for: the small client in _http, with retries and hedges.

16 parallel GETs of 8 MiB took 0.24 CPU-s/GiB, against 0.53 of obstore, at the same speed.
"""

import random
import threading
import time
from collections.abc import Callable

from cachefs.chunk import ObjectId
from cachefs.errors import AccessDenied, StoreUnavailable
from cachefs.store._get import get_into
from cachefs.store._http import S3Client, Service
from cachefs.store._s3 import RawPage, S3Store
from cachefs.store._straggler import Stragglers

ATTEMPTS = 5
BACKOFF_SECONDS = 0.05
"""Before the second attempt, then twice as much each time; any part of it, by chance (a reader may be waiting).
An answer that was cut goes on at once: that is no sign of a store that has too much to do."""

QUIET_SECONDS = 6.0
"""How long the first attempt waits for a byte, connecting and its hedge included; the ones after it wait for all that
is left of `get_timeout_s`. Both connections may have died without a word."""

RETRY_TOKENS = 64.0
"""Retries that all readers of a store may take at a time. One that fails is gone, one that helps comes back."""
TOKENS_PER_SUCCESS = 0.5
"""What an answer at the first attempt gives back: a store that fails a fifth of all requests never runs out."""
HEDGE_TOKENS = 6.0
"""What a hedge takes, for good: of many GETs one in twelve (8 %) can be hedged, also at a store that is slow for all.
Only what is above half of the bucket is for hedges (five at a time): retries go first."""


def backoff_s(attempt: int, retry_after_s: float | None, chance: float) -> float:
    """PURE. The pause after a failed attempt (0 is the first), in seconds; `chance` is from 0 to 1.

    All that were refused together are told the same `retry_after_s`: what is added by chance parts them.
    """
    return BACKOFF_SECONDS * (1 << attempt) * chance + (retry_after_s or 0.0)


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

    def take_hedge(self) -> bool:
        """Whether a hedge is allowed."""
        with self._lock:
            if self._tokens - HEDGE_TOKENS < self._tokens_max / 2:
                return False
            self._tokens -= HEDGE_TOKENS
            return True

    def succeeded(self, retries: int) -> None:
        """A request was answered after so many retries."""
        with self._lock:
            self._tokens = min(self._tokens_max, self._tokens + (retries or TOKENS_PER_SUCCESS))


class StoreHedges:
    """Hedges of one store (see _get.Hedges). Threads may share it."""

    def __init__(self, budget: RetryBudget, count: Callable[[str], None]) -> None:
        """`count` is told of each hedge, in the thread of its GET: "started", "won"."""
        self._budget = budget
        self._count = count
        self._stragglers = Stragglers()
        self._lock = threading.Lock()

    @property
    def delay_s(self) -> float:
        return self._stragglers.delay_s

    @property
    def crawl_bytes_per_s(self) -> float:
        return self._stragglers.crawl_bytes_per_s

    def start(self) -> bool:
        allowed = self._budget.take_hedge()
        if allowed:
            self._count("started")
        return allowed

    def won(self) -> None:
        self._count("won")

    def note(self, wait_s: float) -> None:
        with self._lock:
            self._stragglers.note(wait_s)

    def note_body(self, count: int, seconds: float) -> None:
        with self._lock:
            self._stragglers.note_body(count, seconds)


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

    def __init__(
        self,
        service: Service,
        *,
        get_timeout_s: float,
        list_timeout_s: float,
        count_hedge: Callable[[str], None] = lambda result: None,
    ) -> None:
        super().__init__(service.location, list_timeout_s)
        self._client = S3Client(service)
        self._get_timeout_s = get_timeout_s
        self._budget = RetryBudget()
        self._hedges = StoreHedges(self._budget, count_hedge)

    def _list(self, prefix: str, *, delimiter: str, token: str | None, limit: int, timeout_s: float) -> RawPage:
        return self._client.list(prefix, delimiter=delimiter, token=token, limit=limit, timeout_s=timeout_s)

    def _fetch_range(
        self, buffer: memoryview, object_id: ObjectId, start: int, progress: Callable[[int], None]
    ) -> None:
        """What passes is tried again, from where it broke off, until no byte came for `get_timeout_s`."""
        so_far = _Progress(progress)
        for attempt in range(ATTEMPTS):
            base = so_far.base = so_far.filled
            try:
                left_s = self._get_timeout_s - (time.monotonic() - so_far.heard_s)
                timeout_s = max(min(left_s, QUIET_SECONDS) if attempt == 0 else left_s, 0.001)
                get_into(self._client, buffer[base:], object_id, start + base, so_far, timeout_s, self._hedges)
            except (StoreUnavailable, AccessDenied) as error:
                # A 403 is looked at twice: it may be the credentials' service that failed, which passes.
                last = attempt >= (1 if isinstance(error, AccessDenied) else ATTEMPTS - 1)
                asked_s = error.retry_after_s if isinstance(error, StoreUnavailable) else None
                pause_s = 0.0 if so_far.filled > base else backoff_s(attempt, asked_s, random.random())
                over_s = so_far.heard_s + self._get_timeout_s
                if so_far.given_up or last or time.monotonic() + pause_s >= over_s or not self._budget.take():
                    raise
                time.sleep(pause_s)
            else:
                self._budget.succeeded(attempt)
                return
        raise AssertionError("unreachable")

    def close(self) -> None:
        """See Store."""
        self._client.close()

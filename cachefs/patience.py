"""How long one reader waits for a store that does not answer, and how it waits between its tries."""

import random
from typing import NoReturn

import trio

from cachefs.config import ServerConfig
from cachefs.errors import CachefsError, StoreTimeout, StoreUnavailable

RETRY_SECONDS_MIN = 0.2
RETRY_SECONDS_MAX = 5.0


class Patience:
    """How long one reader waits: until `read_timeout_s` from its start (0: for ever), with growing pauses."""

    def __init__(self, config: ServerConfig) -> None:
        self._seconds = config.read_timeout_s
        self._deadline_s = trio.current_time() + self._seconds if self._seconds else float("inf")
        self._pause_s = RETRY_SECONDS_MIN

    def limit(self) -> trio.CancelScope:
        return trio.CancelScope(deadline=self._deadline_s)

    @property
    def over(self) -> bool:
        return trio.current_time() >= self._deadline_s

    def give_up(self, exc: CachefsError) -> NoReturn:
        if isinstance(exc, StoreUnavailable):
            raise StoreTimeout(f"no answer from the store for {self._seconds:g} s: {exc}") from exc
        raise type(exc)(*exc.args) from exc

    async def pause(self, answered: trio.Event, exc: CachefsError) -> None:
        """Wait a moment, less when the source answers somebody. Raises StoreTimeout at the deadline."""
        wake_s = trio.current_time() + self._pause_s * random.uniform(0.5, 1.0)
        self._pause_s = min(self._pause_s * 2, RETRY_SECONDS_MAX)
        with trio.CancelScope(deadline=min(wake_s, self._deadline_s)):
            await answered.wait()
        if self.over:
            self.give_up(exc)

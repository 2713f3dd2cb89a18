"""The only way into a thread. Each kind of work has its own bound, so that a hung store cannot stop the disk."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import trio

P = ParamSpec("P")
T = TypeVar("T")


class Offload:
    """Four limiters: `store` (network), `disk` (local tier), `index` (LMDB writes; LMDB has one writer), `match`."""

    def __init__(
        self, *, store_threads: int = 64, disk_threads: int = 8, index_threads: int = 1, match_threads: int = 2
    ) -> None:
        self._store = trio.CapacityLimiter(store_threads)
        self._disk = trio.CapacityLimiter(disk_threads)
        self._index = trio.CapacityLimiter(index_threads)
        self._match = trio.CapacityLimiter(match_threads)

    async def store(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a store request. Cancelling abandons the wait, not the request: its deadline ends it."""
        call = functools.partial(function, *args, **kwargs)
        return await trio.to_thread.run_sync(call, limiter=self._store, abandon_on_cancel=True)

    async def disk(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run work on the local tier. Not cancellable: a half-done write would go on into a reused buffer."""
        call = functools.partial(function, *args, **kwargs)
        return await trio.to_thread.run_sync(call, limiter=self._disk)

    async def index(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run an index transaction that syncs."""
        call = functools.partial(function, *args, **kwargs)
        return await trio.to_thread.run_sync(call, limiter=self._index)

    async def match(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what only computes, and for long: it shares the processor with the trio thread, but not the loop."""
        call = functools.partial(function, *args, **kwargs)
        return await trio.to_thread.run_sync(call, limiter=self._match)

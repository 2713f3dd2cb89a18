"""Background fills: readahead per handle. It says what would be good to have and never waits for it.

The cache has the budget (`prefetch_bytes` over everything, a share per source) and says no when it is used up;
what was refused is offered again. Readers take turns, a chunk each, so that none of them starves another.
"""

import collections
from typing import Protocol

import trio

from cachefs.chunk import ObjectId
from cachefs.readahead import Readahead
from cachefs.store import Store

RETRY_S = 0.005
"""A chunk takes 8 ms at 1 GB/s: a freed place in the budget is used before the next one is free."""


class Fills(Protocol):
    """The part of ChunkCache that prefetch uses."""

    def offer(self, store: Store, object_id: ObjectId, index: int) -> bool: ...


class _Reader:
    def __init__(self, store: Store, object_id: ObjectId) -> None:
        self.store = store
        self.object_id = object_id
        self.readahead = Readahead()
        self.queue: collections.deque[int] = collections.deque()


class Prefetcher:
    """Windows of all open handles. Run `run` in a nursery; the other methods never block."""

    def __init__(self, cache: Fills) -> None:
        self._cache = cache
        self._readers: dict[int, _Reader] = {}
        self._turn: dict[int, _Reader] = {}
        """Readers with something to offer, by handle, in the order of their turns."""
        self._wake = trio.Event()

    def note_read(self, handle: int, store: Store, object_id: ObjectId, offset: int, length: int) -> None:
        """A READ came. Its own chunks are the cache's business; the ones after them are queued."""
        reader = self._readers.get(handle)
        if reader is None:
            reader = self._readers[handle] = _Reader(store, object_id)
        if not reader.readahead.advance(offset, length, object_id.size):
            return
        reader.queue = collections.deque(reader.readahead.wanted())
        if reader.queue:
            self._turn[handle] = reader
            self._wake.set()
        else:
            self._turn.pop(handle, None)

    def forget(self, handle: int) -> None:
        """The handle was released: its window is offered no more. What is in flight goes on."""
        self._readers.pop(handle, None)
        self._turn.pop(handle, None)

    async def run(self) -> None:
        """Offer what is queued until cancelled. It runs when readers wait or are answered: demand goes first."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._turn:
                if self._offer_round():
                    await trio.lowlevel.checkpoint()
                else:
                    with trio.move_on_after(RETRY_S):
                        await self._wake.wait()
                        self._wake = trio.Event()

    def _offer_round(self) -> bool:
        """One chunk of each reader. False when none was taken."""
        taken = False
        for handle, reader in list(self._turn.items()):
            if self._cache.offer(reader.store, reader.object_id, reader.queue[0]):
                reader.queue.popleft()
                taken = True
            if not reader.queue:
                del self._turn[handle]
        return taken

"""Background fills: readahead per handle. It says what would be good to have and never waits for it.

The cache has the budget (`prefetch_bytes` over everything, a share of it for each source in any case) and says no when
it is used up; what was refused is offered again. Readers take turns, a chunk each, so that none starves another. What
nobody waits for comes after all of that: the rest of files that are being loaded, and what whole volumes fetch
(`fetch`, for ahead.py).
"""

import collections
from typing import NamedTuple, Protocol

import trio

from cachefs.chunk import ObjectId, chunk_count
from cachefs.formats import Layout
from cachefs.readahead import Readahead
from cachefs.store import Store

RETRY_S = 0.005
"""A chunk takes 8 ms at 1 GB/s: a freed place in the budget is used before the next one is free."""

FIRST_S = 0.002
"""By so much a file's first READ goes before its window. On two cores the GETs of the window slowed it down: its first
4 KiB took 1.5 to 20 ms on loopback. It is a fifteenth of a round trip of 30 ms."""

RETRY_S_MAX = 0.05
"""Between two tries of a volume's fetch that is long refused: a hundred of them cost nothing."""

STALLED_S = 5.0
"""Readers that got nothing for so long (their source hangs) do not hold up what nobody waits for."""

SPARE_LOOKS = 256
"""Local chunks that are passed over at a time."""


class Fills(Protocol):
    """The part of ChunkCache that prefetch uses."""

    def offer(self, store: Store, object_id: ObjectId, index: int, *, spare: bool = False) -> bool: ...
    def has(self, object_id: ObjectId, index: int) -> bool: ...


class Known(Protocol):
    """The part of Hints that prefetch uses."""

    def layout(self, object_id: ObjectId) -> Layout | None: ...
    def header_bytes(self, object_id: ObjectId) -> int: ...
    def is_here(self, object_id: ObjectId, length: int) -> bool: ...
    async def learn(self, object_id: ObjectId, length: int) -> int: ...
    async def following(self, directory: int, name: str) -> ObjectId | None: ...


class Place(NamedTuple):
    """Where a file is: its directory's inode and its name."""

    directory: int
    name: str


class _Reader:
    def __init__(self, store: Store, object_id: ObjectId) -> None:
        self.store = store
        self.object_id = object_id
        self.readahead = Readahead()
        self.queue: collections.deque[tuple[ObjectId, int]] = collections.deque()
        self.from_s = trio.current_time() + FIRST_S
        """Nothing is offered before."""
        self.header_bytes = 0
        """How much of the file's start it takes to learn more of its layout; 0: no more is to be learned."""
        self.learning = False
        self.place: Place | None = None
        self.following: ObjectId | None = None
        self.asked_following = False


class Prefetcher:
    """Windows of all open handles. Run `run` in a nursery; the other methods but fetch() never block."""

    def __init__(self, cache: Fills, hints: Known | None = None) -> None:
        self._cache = cache
        self._hints = hints
        self._readers: dict[int, _Reader] = {}
        self._turn: dict[int, _Reader] = {}
        """Readers with something to offer, by handle, in the order of their turns."""
        self._loads: dict[int, _Reader] = {}
        """Readers with spare chunks."""
        self._wake = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._taken_s = 0.0
        """When a reader's chunk was last taken, or one was offered after there was none."""

    # -- readers

    def note_read(
        self, handle: int, store: Store, object_id: ObjectId, offset: int, length: int, place: Place | None = None
    ) -> None:
        """A READ came. Its own chunks are the cache's business; the ones after them are queued."""
        reader = self._readers.get(handle)
        layout = None
        if reader is None:
            reader = self._readers[handle] = _Reader(store, object_id)
            reader.place = place
            if self._hints is not None:
                reader.header_bytes = self._hints.header_bytes(object_id)
        if self._hints is not None:
            layout = self._hints.layout(object_id)
        if reader.readahead.advance(offset, length, object_id.size, layout):
            self._queue(handle, reader)
        if handle not in self._loads and reader.readahead.spare(object_id.size) is not None:
            self._add_load(handle, reader)

    def note_served(self, handle: int) -> None:
        """A READ was answered: maybe the header is here now."""
        reader = self._readers.get(handle)
        if reader is None or not reader.header_bytes or reader.learning or self._hints is None:
            return
        if self._nursery is not None and self._hints.is_here(reader.object_id, reader.header_bytes):
            reader.learning = True
            self._nursery.start_soon(self._learn, handle, reader, self._hints)

    def forget(self, handle: int) -> None:
        """The handle was released: its window is offered no more. What is in flight goes on."""
        self._readers.pop(handle, None)
        self._turn.pop(handle, None)
        self._loads.pop(handle, None)

    def _queue(self, handle: int, reader: _Reader) -> None:
        reader.queue = collections.deque((reader.object_id, index) for index in reader.readahead.wanted())
        if beyond := reader.readahead.beyond():
            self._ask_following(handle, reader)
            if reader.following is not None:
                for index in range(min(beyond, chunk_count(reader.following.size))):
                    if not self._cache.has(reader.following, index):
                        reader.queue.append((reader.following, index))
        if reader.queue:
            if not self._turn:
                self._taken_s = trio.current_time()
            self._turn[handle] = reader
            self._wake.set()
        else:
            self._turn.pop(handle, None)

    def _add_load(self, handle: int, reader: _Reader) -> None:
        self._ask_following(handle, reader)
        self._loads[handle] = reader
        self._wake.set()

    async def _learn(self, handle: int, reader: _Reader, hints: Known) -> None:
        reader.header_bytes = await hints.learn(reader.object_id, reader.header_bytes)
        reader.learning = False
        layout = hints.layout(reader.object_id)
        if layout is None or self._readers.get(handle) is not reader:
            return
        if reader.readahead.learned(reader.object_id.size, layout):
            self._queue(handle, reader)

    def _ask_following(self, handle: int, reader: _Reader) -> None:
        if reader.asked_following or reader.place is None or self._hints is None or self._nursery is None:
            return
        reader.asked_following = True
        self._nursery.start_soon(self._find_following, handle, reader, reader.place, self._hints)

    async def _find_following(self, handle: int, reader: _Reader, place: Place, hints: Known) -> None:
        following = await hints.following(place.directory, place.name)
        # Only bytes of the same source: they come from the same store.
        if following is None or following.source != reader.object_id.source or self._readers.get(handle) is not reader:
            return
        reader.following = following
        if reader.readahead.beyond():
            self._queue(handle, reader)

    # -- what nobody waits for

    async def fetch(self, store: Store, object_id: ObjectId, index: int) -> None:
        """Start the fill of a chunk as soon as no reader has a use for the room."""
        retry_s = RETRY_S
        started_s = trio.current_time()
        while self._readers_want() or not self._cache.offer(store, object_id, index, spare=True):
            await trio.sleep(retry_s)
            if trio.current_time() - started_s > STALLED_S:
                retry_s = RETRY_S_MAX
        await trio.lowlevel.checkpoint()

    def _readers_want(self) -> bool:
        return bool(self._turn) and trio.current_time() - self._taken_s < STALLED_S

    # -- offering

    async def run(self) -> None:
        """Offer what is queued until cancelled. It runs when readers wait or are answered: demand goes first."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await self._offer_all()
            finally:
                self._nursery = None

    async def _offer_all(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._turn or self._loads:
                if self._offer_round() or self._offer_spare():
                    await trio.lowlevel.checkpoint()
                else:
                    with trio.move_on_after(RETRY_S):
                        await self._wake.wait()
                        self._wake = trio.Event()

    def _offer_round(self) -> bool:
        """One chunk of each reader. False when none was taken."""
        taken = False
        now_s = trio.current_time()
        for handle, reader in list(self._turn.items()):
            if now_s < reader.from_s:
                continue
            if self._cache.offer(reader.store, *reader.queue[0]):
                reader.queue.popleft()
                taken = True
            if not reader.queue:
                del self._turn[handle]
        if taken:
            self._taken_s = trio.current_time()
        return taken

    def _offer_spare(self) -> bool:
        """One chunk of the rest of each file that is being loaded. False: nothing was taken, or is left to look at."""
        taken = False
        for handle, reader in list(self._loads.items()):
            taken |= self._offer_spare_of(reader)
            if reader.readahead.spare(reader.object_id.size) is None:
                del self._loads[handle]
        return taken

    def _offer_spare_of(self, reader: _Reader) -> bool:
        for _ in range(SPARE_LOOKS):
            index = reader.readahead.spare(reader.object_id.size)
            if index is None:
                return False
            target = self._target(reader, index)
            if target is not None and not self._cache.has(*target):
                if not self._cache.offer(reader.store, *target):
                    return False
                reader.readahead.spare_done(started=True)
                return True
            reader.readahead.spare_done(started=False)
        return True

    def _target(self, reader: _Reader, index: int) -> tuple[ObjectId, int] | None:
        """A chunk by its number from the start of the reader's file; behind its end those of the next file."""
        behind = index - chunk_count(reader.object_id.size)
        if behind < 0:
            return reader.object_id, index
        if reader.following is None or behind >= chunk_count(reader.following.size):
            return None
        return reader.following, behind

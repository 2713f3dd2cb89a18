"""A fill: one chunk on its way into a buffer, and the readers that wait for parts of it.

It comes from the store (a fetch) or from the blob (a load, to check its digest the first time in this process).
All runs on the trio thread but `progress`, which the store's thread calls.
"""

import enum
import sys
import time

import trio

from cachefs.buffers import Buffer
from cachefs.chunk import ChunkSpan, ObjectId
from cachefs.errors import CachefsError, StoreUnavailable
from cachefs.store import Store


class Phase(enum.Enum):
    QUEUED = "waits for a buffer"
    FILLING = "bytes arrive"
    FULL = "all bytes are in the buffer, the blob is being written"
    KEPT = "nothing more to do; the buffer is held for readers"
    FAILED = "the error is in `error`"


class Want(enum.IntEnum):
    """Who wants the fill; also the priority of its wait for a buffer."""

    LOAD = 0
    DEMAND = 1
    BACKGROUND = 2


_NOBODY = sys.maxsize


class Fill:
    """`length` is the chunk's, in bytes. `arrived` counts the bytes that readers may have.

    With `split` (not 0) the bytes from there on are fetched first, by a GET of their own, for a reader who came for
    the end of the object; `tail_arrived` counts those.
    """

    def __init__(self, store: Store, object_id: ObjectId, index: int, length: int, token: trio.lowlevel.TrioToken):
        self.store = store
        self.object_id = object_id
        self.index = index
        self.length = length
        self.phase = Phase.QUEUED
        self.buffer: Buffer | None = None
        self.arrived = 0
        self.split = 0
        self.tail_arrived = 0
        self.error: CachefsError | None = None
        self.fetched = False
        """The bytes came from the store, not from the blob."""
        self.kept = False
        """The chunk is in the blob."""
        self.served_bytes = 0
        self.consumed = False
        """Read to its end (or wanted by no reader): the buffer is free once the blob is written."""
        self.readers = 0
        """Those who wait or are about to take(); the buffer stays while there are any. Theirs to count."""
        self.asks = False
        """Counted among the chunks that are asked for."""
        self.background_bytes = 0
        """What it takes of the budget of background fills."""
        self.held = False
        """The pool may reclaim the buffer."""
        self.started = False
        """It got its buffer: an error is that of the store or the disk."""
        self.abandoned = False
        self.first_byte_s: float | None = None
        self._token = token
        self._waiting: list[tuple[ChunkSpan, trio.Event]] = []
        self._done = trio.Event()
        self._wake_at = _NOBODY
        self._wake_pending = False

    # -- the store's thread

    def progress(self, count: int) -> None:
        """`count` bytes are in place. Raises StoreUnavailable when nobody wants the rest (the cache shuts down)."""
        self._alive()
        # Order matters: `arrived` before the look at `_wake_at`; wait() sets `_wake_at` before its look at `arrived`.
        self.arrived = count
        self._wake_for(count)

    def tail_progress(self, count: int) -> None:
        """The same for the bytes from `split` on."""
        self._alive()
        self.tail_arrived = count
        self._wake_for(self.split + count)

    def _alive(self) -> None:
        if self.abandoned:
            raise StoreUnavailable("the fetch was given up: the cache shuts down")
        if self.first_byte_s is None:
            self.first_byte_s = time.monotonic()

    def _wake_for(self, count: int) -> None:
        if count >= self._wake_at and not self._wake_pending:
            self._wake_pending = True
            self._token.run_sync_soon(self._wake)

    # -- the trio thread

    def _wake(self) -> None:
        self._wake_pending = False
        over = self.phase is Phase.FAILED or self.phase is Phase.KEPT
        waiting, self._waiting = self._waiting, []
        for span, event in waiting:
            if over or self._arrived(span):
                event.set()
            else:
                self._waiting.append((span, event))
        self._wake_at = min((span.stop for span, _ in self._waiting), default=_NOBODY)

    def _arrived(self, span: ChunkSpan) -> bool:
        return span.stop <= self.arrived or 0 < self.split <= span.start <= span.stop <= self.split + self.tail_arrived

    def has(self, span: ChunkSpan) -> bool:
        return self.buffer is not None and self.phase is not Phase.FAILED and self._arrived(span)

    async def wait(self, span: ChunkSpan) -> None:
        """Until has(span), or the fill failed, or its buffer was given up. The caller looks which."""
        event = trio.Event()
        self._waiting.append((span, event))
        try:
            self._wake_at = min(self._wake_at, span.stop)
            if self._arrived(span) or self.phase in (Phase.FAILED, Phase.KEPT):
                event.set()
            await event.wait()
        finally:
            self._waiting = [(wanted, other) for wanted, other in self._waiting if other is not event]

    async def wait_done(self) -> None:
        """Until the chunk is kept, or known not to be, or the fill failed."""
        await self._done.wait()

    def restart(self) -> None:
        """The bytes so far cannot be trusted: the same buffer is filled once more."""
        self.arrived = self.tail_arrived = 0

    def full(self) -> None:
        self.arrived = self.length
        self.phase = Phase.FULL
        self._wake()

    def finish(self) -> None:
        """The write is over, whether the chunk was kept or not."""
        self.phase = Phase.KEPT
        self._done.set()
        self._wake()

    def fail(self, error: CachefsError) -> None:
        self.error = error
        self.phase = Phase.FAILED
        self._done.set()
        self._wake()

    def take(self, span: ChunkSpan) -> memoryview:
        """The bytes of a span that has arrived, valid until the caller's next await."""
        assert self.buffer is not None
        assert self._arrived(span)
        self.served_bytes += span.length
        if span.stop == self.length:
            self.consumed = True
        return self.buffer.view[span.start : span.stop]

"""A fixed pool of page-aligned buffers, one chunk each, in which chunks are fetched, served and written.

Fresh memory is what costs (page faults): with a buffer per chunk made anew the cold path measured 0.30 GB/s,
with this pool 0.76. Buffers are made at first use and then kept. All methods run on the trio thread.
"""

import contextlib
import logging
import mmap
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable

import trio

log = logging.getLogger(__name__)

BUFFERS = 34
"""272 MiB in all: 24 GETs in flight, some being written, and some for readers of other sources."""

OWNER_SHARE = 0.75
"""Most that one owner takes of what is free, its own or being written: 24 of 34 for a hung source, 6 more for a second
one."""

RESERVE_SHARE = 1 / 12
"""2 of 34 are left for chunks that come from the disk, however many sources hang, and 2 more for owners that have none,
however many chunks wait for the disk."""

WRITES = "writes"
"""The owner of what waits for the disk; no source's identity. Who is only slow to be written takes nothing of a share:
at 30 ms and 90 MB/s a connection 24 GETs were not in flight for want of buffers, 1.16 GB/s instead of 1.11."""


class Buffer:
    """`view` is the whole memory, page-aligned. `owner` is the source that it is charged to, None for the disk."""

    __slots__ = ("owner", "view")

    def __init__(self, buffer_bytes: int) -> None:
        memory = mmap.mmap(-1, buffer_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            # Huge pages: O_DIRECT from them measured 4 GB/s at 0.02 CPU-s/GiB, from 4 KiB pages 2 GB/s at 0.07.
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(memory)
        self.owner: str | None = None

    def populate(self) -> None:
        """Give it its memory now. For a thread: the GIL is free meanwhile. Raises OSError."""
        with open("/dev/zero", "rb", buffering=0) as zeros:
            zeros.readinto(self.view)


class _Waiter:
    __slots__ = ("buffer", "event", "owner")

    def __init__(self, owner: str | None) -> None:
        self.owner = owner
        self.event = trio.Event()
        self.buffer: Buffer | None = None


class BufferPool:
    """Free buffers, held ones (filled, kept for a reader until somebody needs them) and taken ones.

    INVARIANT: free + held + taken == count, and waiters exist only while none of them may be served.
    """

    def __init__(self, buffer_bytes: int, count: int = BUFFERS) -> None:
        self.count = count
        self._buffer_bytes = buffer_bytes
        self._made = 0
        self._free: list[Buffer] = []  # last in, first out: the warmest memory again
        self._held: OrderedDict[Buffer, Callable[[], None]] = OrderedDict()  # least recently used first
        self._taken: Counter[str | None] = Counter()
        # Chunks from the disk first (they end soon), then readers, then background work.
        self._waiting: tuple[deque[_Waiter], ...] = (deque(), deque(), deque())

    @property
    def available(self) -> int:
        """Free ones, ones not made yet, and held ones that may be reclaimed."""
        return self.count - sum(self._taken.values())

    def _allows(self, owner: str | None) -> bool:
        available = self.available
        if owner is None:
            return available > 0
        reserve = int(self.count * RESERVE_SHARE)
        available -= reserve
        if available <= 0:
            return False
        mine = self._taken[owner]
        # At least one each, so that a tiny pool still works.
        return mine == 0 or (available > reserve and mine < OWNER_SHARE * (available + mine + self._taken[WRITES]))

    def take_nowait(self, owner: str | None) -> Buffer | None:
        """A buffer, or None when the owner may have none now. The longest held buffer is reclaimed if need be."""
        if not self._allows(owner):
            return None
        if self._free:
            buffer = self._free.pop()
        elif self._made < self.count:
            self._made += 1
            buffer = Buffer(self._buffer_bytes)
        else:
            buffer, reclaimed = self._held.popitem(last=False)
            reclaimed()
        buffer.owner = owner
        self._taken[owner] += 1
        return buffer

    async def take(self, owner: str | None, priority: int) -> Buffer:
        """Wait for a buffer; 0 goes before 1 before 2, within one priority in order, owners at their share passed."""
        if not any(self._waiting[: priority + 1]):
            buffer = self.take_nowait(owner)
            if buffer is not None:
                return buffer
        waiter = _Waiter(owner)
        self._waiting[priority].append(waiter)
        self._serve()
        try:
            await waiter.event.wait()
        except trio.Cancelled:
            if waiter.buffer is None:
                self._waiting[priority].remove(waiter)
            else:
                self.give_back(waiter.buffer)
            raise
        assert waiter.buffer is not None
        return waiter.buffer

    async def prepare(self, in_thread: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        """Give the first buffer its memory before somebody reads.

        Else the kernel finds and clears its pages while the first bytes are received: a fraction of a millisecond,
        but 5 to 14 of them in one mount of five. Does nothing when all are taken; readers are here already then.
        """
        buffer = self.take_nowait(None)
        if buffer is None:
            return
        try:
            await in_thread(buffer.populate)
        except OSError as exc:  # a root without /dev/zero
            log.debug("no buffer has its memory before the first read: %s", exc)
        finally:
            self.give_back(buffer)

    def give_back(self, buffer: Buffer) -> None:
        """The buffer is free; the first waiter that may have it gets it."""
        if self._held.pop(buffer, None) is None:
            self._untake(buffer)
        self._free.append(buffer)
        self._serve()

    def charge(self, buffer: Buffer, owner: str | None) -> None:
        """A taken buffer goes on the account of `owner`, even beyond its share."""
        self._untake(buffer)
        buffer.owner = owner
        self._taken[owner] += 1
        self._serve()

    def discard(self, buffer: Buffer) -> None:
        """A thread may still write into this buffer: never use it again, make a new one when one is needed."""
        self._untake(buffer)
        self._made -= 1
        self._serve()

    def hold(self, buffer: Buffer, reclaimed: Callable[[], None]) -> None:
        """Keep a filled buffer for readers, until somebody needs it: `reclaimed` is called when it goes."""
        self._untake(buffer)
        self._held[buffer] = reclaimed
        self._serve()

    def touch(self, buffer: Buffer) -> None:
        """A held buffer was used."""
        self._held.move_to_end(buffer)

    def _untake(self, buffer: Buffer) -> None:
        assert self._taken[buffer.owner] > 0
        self._taken[buffer.owner] -= 1
        if not self._taken[buffer.owner]:
            del self._taken[buffer.owner]

    def _serve(self) -> None:
        for queue in self._waiting:
            for waiter in list(queue):
                if not self.available:
                    return
                buffer = self.take_nowait(waiter.owner)
                if buffer is not None:
                    queue.remove(waiter)
                    waiter.buffer = buffer
                    waiter.event.set()

    def check_invariants(self) -> None:
        taken = sum(self._taken.values())
        assert all(count > 0 for count in self._taken.values())
        assert self._made <= self.count
        assert len(self._free) + len(self._held) + taken == self._made
        for queue in self._waiting:
            assert not any(self._allows(waiter.owner) for waiter in queue)

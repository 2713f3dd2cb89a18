"""What the local tier holds, in memory: one CachedObject per object that is local, open or being fetched.

All runs on the trio thread. State changes without an await inside; whoever awaited a thread that read a blob
compares `generation` before it believes the bytes.
"""

import mmap
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

import msgspec
import trio

from cachefs import chunk
from cachefs.cached import Header, Seal
from cachefs.chunk import ObjectId
from cachefs.fill import Fill
from cachefs.index import Table, Write
from cachefs.tier import Tier

ABSENT = 0
COMMITTED = 1  # durable, its record too; its digest was not yet checked in this process
CHECKED = 2  # the same, and checked
WRITTEN = 3  # in the blob and right, its record not yet committed

DIGEST_BYTES = 16
OPEN_BLOBS_MAX = 128
INLINE_BYTES = 1024 * 1024  # the kernel never asks for more per READ (256 pages)


class CachedObject:
    """One object. A chunk's state and digest are packed: 17 bytes per chunk, 218 KB for 100 GB."""

    __slots__ = (
        "busy",
        "chunks",
        "digests",
        "disk_bytes",
        "dropping",
        "fills",
        "generation",
        "had_backing",
        "has_header",
        "key",
        "local_bytes",
        "name",
        "object_id",
        "opens",
        "present",
        "seal",
        "states",
        "suspect",
        "uncommitted",
        "used_s",
    )

    def __init__(self, object_id: ObjectId, used_s: float) -> None:
        self.object_id = object_id
        self.key = object_id.key
        self.name = self.key.hex()
        self.chunks = chunk.chunk_count(object_id.size)
        self.states = bytearray(self.chunks)
        self.digests = bytearray(self.chunks * DIGEST_BYTES)
        self.used_s = used_s
        self.present = 0  # INVARIANT: chunks whose state is not ABSENT
        self.uncommitted = 0  # INVARIANT: chunks whose state is WRITTEN
        self.local_bytes = 0  # INVARIANT: sum of the lengths of the present chunks
        self.disk_bytes = 0
        self.opens = 0
        self.busy = 0  # work in threads that needs the blob to stay
        self.fills: dict[int, Fill] = {}  # chunk index -> its fill, in flight or holding a buffer
        self.generation = 0  # grows when the blob is given up
        self.dropping: trio.Event | None = None  # set once the old blob is unlinked
        self.has_header = False  # the index has a Header
        self.seal: Seal | None = None
        self.suspect = False  # sealed, but the blob must be verified before passthrough
        self.had_backing = False

    @property
    def complete(self) -> bool:
        return 0 < self.chunks == self.present and not self.uncommitted

    @property
    def idle(self) -> bool:
        """Nothing in flight, nobody has it open."""
        return not (self.opens or self.busy or self.fills or self.uncommitted or self.dropping is not None)

    def length(self, index: int) -> int:
        return chunk.chunk_length(self.object_id.size, index)

    def digest(self, index: int) -> bytes:
        return bytes(self.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES])

    def set_present(self, index: int, state: int, digest: bytes) -> None:
        """ABSENT -> COMMITTED (loaded from the index) or WRITTEN."""
        assert self.states[index] == ABSENT
        assert len(digest) == DIGEST_BYTES
        self.states[index] = state
        self.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES] = digest
        self.present += 1
        self.uncommitted += state == WRITTEN
        self.local_bytes += self.length(index)

    def set_absent(self, index: int) -> None:
        assert self.states[index] != ABSENT
        self.uncommitted -= self.states[index] == WRITTEN
        self.states[index] = ABSENT
        self.present -= 1
        self.local_bytes -= self.length(index)
        self.seal = None

    def clear(self) -> None:
        """The blob is given up."""
        self.states = bytearray(self.chunks)
        self.present = self.uncommitted = self.local_bytes = 0
        self.seal = None
        self.suspect = self.had_backing = self.has_header = False
        self.generation += 1

    def header(self, seal: Seal | None) -> Write:
        value = Header(self.object_id, self.used_s, seal, self.had_backing)
        return Write(Table.OBJECTS, self.key, msgspec.msgpack.encode(value))

    def chunk_key(self, index: int) -> bytes:
        return self.key + index.to_bytes(4, "big")

    def delete(self) -> list[Write]:
        """The writes that make the index forget all of it."""
        chunks = [Write(Table.CHUNKS, self.chunk_key(index), None) for index, state in enumerate(self.states) if state]
        return [Write(Table.OBJECTS, self.key, None), *chunks]


class _OpenBlob:
    __slots__ = ("fd", "forgotten", "users")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.users = 0
        self.forgotten = False


class OpenBlobs:
    """Descriptors for reading, least recently used closed first. One that is used in a thread is closed after that."""

    def __init__(self, tier: Tier, limit: int = OPEN_BLOBS_MAX) -> None:
        self._tier = tier
        self._limit = limit
        self._open: OrderedDict[str, _OpenBlob] = OrderedDict()
        self._scratch = memoryview(mmap.mmap(-1, INLINE_BYTES))

    def _get(self, name: str) -> _OpenBlob:
        blob = self._open.get(name)
        if blob is None:
            blob = self._open[name] = _OpenBlob(self._tier.open(name))
            while len(self._open) > self._limit:
                self._close(*self._open.popitem(last=False))
        else:
            self._open.move_to_end(name)
        return blob

    def _close(self, name: str, blob: _OpenBlob) -> None:
        blob.forgotten = True
        if not blob.users:
            os.close(blob.fd)

    def acquire(self, name: str) -> _OpenBlob:
        """For a thread; release() it afterwards. Raises FileNotFoundError."""
        blob = self._get(name)
        blob.users += 1
        return blob

    def release(self, blob: _OpenBlob) -> None:
        blob.users -= 1
        if blob.forgotten and not blob.users:
            os.close(blob.fd)

    def read_now(self, name: str, offset: int, length: int) -> memoryview | None:
        """The bytes if the page cache has all of them, valid until the next call; else None."""
        if length > INLINE_BYTES:
            return None
        view = self._scratch[:length]
        try:
            # 9 us inline against 125-160 us through a thread.
            count = os.preadv(self._get(name).fd, [view], offset, os.RWF_NOWAIT)
        except OSError:  # would block, or a file system without RWF_NOWAIT, or no such blob: the thread finds out
            return None
        return view if count == length else None

    def forget(self, name: str) -> None:
        blob = self._open.pop(name, None)
        if blob is not None:
            self._close(name, blob)

    def close(self) -> None:
        while self._open:
            self._close(*self._open.popitem())


class Blobs:
    """All CachedObjects, least recently used first, and what they take on disk."""

    def __init__(self, tier: Tier, clock: Callable[[], float] = time.time) -> None:
        self.tier = tier
        self.files = OpenBlobs(tier)
        self._clock = clock
        self._objects: OrderedDict[ObjectId, CachedObject] = OrderedDict()
        self.used_bytes = 0  # INVARIANT: sum of disk_bytes of all objects and of what could not be deleted
        self.stuck: dict[str, int] = {}  # names of blobs that could not be deleted: never used again; their disk bytes
        self.reserved_bytes = 0  # of chunks that are being written
        self.touched: dict[ObjectId, None] = {}  # objects whose access time is newer than their Header

    def find(self, object_id: ObjectId) -> CachedObject | None:
        return self._objects.get(object_id)

    def use(self, object_id: ObjectId) -> CachedObject:
        """The object, made known if need be, as the most recently used one."""
        cached = self._objects.get(object_id)
        if cached is None:
            cached = self._objects[object_id] = CachedObject(object_id, self._clock())
            return cached
        self._objects.move_to_end(object_id)
        cached.used_s = self._clock()
        if cached.has_header:
            self.touched[object_id] = None
        return cached

    def add(self, cached: CachedObject) -> None:
        """An object that was found at start; in order of use."""
        self._objects[cached.object_id] = cached
        self.used_bytes += cached.disk_bytes

    def set_disk_bytes(self, cached: CachedObject, disk_bytes: int) -> None:
        self.used_bytes += disk_bytes - cached.disk_bytes
        cached.disk_bytes = disk_bytes

    def set_stuck(self, name: str, disk_bytes: int | None) -> None:
        """A blob could not be deleted, and takes so much. None: it is deleted now."""
        self.used_bytes -= self.stuck.pop(name, 0)
        if disk_bytes is not None:
            self.stuck[name] = disk_bytes
            self.used_bytes += disk_bytes

    def forget_if_empty(self, cached: CachedObject) -> None:
        """Memory is for objects of which something is local, open or in flight."""
        if cached.idle and not cached.present and not cached.disk_bytes:
            self._objects.pop(cached.object_id, None)
            self.touched.pop(cached.object_id, None)

    def __iter__(self) -> Iterator[CachedObject]:
        """Least recently used first."""
        return iter(self._objects.values())

    def __len__(self) -> int:
        return len(self._objects)

    def check_invariants(self) -> None:
        assert self.used_bytes == sum(cached.disk_bytes for cached in self) + sum(self.stuck.values())
        assert self.reserved_bytes >= 0
        for cached in self:
            assert cached.name not in self.stuck or not (cached.present or cached.disk_bytes)
            present = [index for index, state in enumerate(cached.states) if state != ABSENT]
            assert cached.present == len(present)
            assert cached.local_bytes == sum(cached.length(index) for index in present)
            assert cached.uncommitted == sum(state == WRITTEN for state in cached.states)
            assert cached.seal is None or cached.complete
            assert cached.opens >= 0
            assert cached.busy >= 0

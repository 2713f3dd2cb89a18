"""ChunkCache: reads of objects, served from the local tier and filled from the store. The parts do the work.

cache = ChunkCache(index=index, tier=tier, offload=offload, metrics=metrics, config=config)
await cache.recover()
await nursery.start(cache.run)
data = await cache.read(store, object_id, offset, length)
"""

import time
from collections.abc import Callable, Iterable, Iterator

import msgspec
import trio

from cachefs import chunk, recovery
from cachefs.blobs import ABSENT, CHECKED, COMMITTED, WRITTEN, Blobs, CachedObject
from cachefs.buffers import BUFFERS, Buffer, BufferPool
from cachefs.cached import EvictReport, GcReport, ObjectRecord, Pin, Usage, VerifyReport
from cachefs.chunk import ChunkSpan, ObjectId
from cachefs.committer import TOUCH_SECONDS, Committer
from cachefs.config import ServerConfig
from cachefs.errors import NoSpace, StoreUnavailable
from cachefs.fetch import Fills
from cachefs.fill import Fill, Phase, Want
from cachefs.index import Index, Table, Write
from cachefs.metrics import Metrics
from cachefs.offload import Offload
from cachefs.patience import Patience
from cachefs.sealing import Sealing
from cachefs.space import Space
from cachefs.store import Store
from cachefs.tier import Tier

DRAIN_SECONDS = 5.0
PIECE_BYTES = chunk.MIB  # the kernel never asks for more per READ (256 pages)
JOIN_PIECES = 16
"""Kept memory for READs over the border of two chunks, one in eight. Fresh memory for each of them was a quarter of the
server's processor time in page faults and copies, and without a bound 240 MiB with 300 readers: a READ has its piece
while it waits for its chunks. A source gets 12, for 24 chunks: as many as are asked for at a time."""

READERS_STAY_S = 1.0
"""So long after its last chunk a source counts as one that is read from: a GET takes 0.1 s, and a reader works too."""

DISK_PIECES = 8
"""For spans that a thread reads from the blob, one per thread. As fresh bytes they left 20 to 60 MiB to malloc."""

LOCAL = ""
"""Has the pieces of READs whose bytes are all here; no source's identity."""


class ChunkCache:
    """All methods run on the trio thread. `on_sealed` and `on_read` are for the owner to set."""

    def __init__(
        self,
        *,
        index: Index,
        tier: Tier,
        offload: Offload,
        metrics: Metrics,
        config: ServerConfig,
        clock: Callable[[], float] = time.time,
        buffers: int = BUFFERS,
        hook: Callable[[str], None] = lambda step: None,
    ) -> None:
        """`clock` gives seconds since 1970; `hook` is told each step of fills and evictions (crash tests)."""
        self.on_sealed: Callable[[ObjectId], None] = lambda object_id: None
        self.on_read: Callable[[bool, int], None] = lambda hit, count: None
        """Told of every span served: whether it was local, and its bytes. Bytes of the store count once as a miss."""
        self._join_pieces = BufferPool(PIECE_BYTES, JOIN_PIECES)
        self._disk_pieces = BufferPool(PIECE_BYTES, DISK_PIECES)
        self._joined = memoryview(bytearray(PIECE_BYTES))
        self._index = index
        self._offload = offload
        self._metrics = metrics
        self._config = config
        self._tier = tier
        self._blobs = Blobs(tier, clock)
        self._space = Space(self._blobs, index, offload, metrics, hook)
        self._committer = Committer(self._blobs, index, offload, metrics, hook, self._sealed)
        pool = BufferPool(chunk.CHUNK_BYTES, buffers)
        self._fills = Fills(self._blobs, self._space, self._committer, pool, offload, metrics, config, hook)
        self._sealing = Sealing(
            self._blobs, self._space, self._committer, self._fills, index, offload, metrics, self._sealed
        )
        self._space.release_held = self._fills.release_held
        self._hits = metrics.read_bytes.labels("local", "hit")
        self._misses = metrics.read_bytes.labels("store", "miss")
        self._uncached = metrics.read_bytes.labels("store", "uncached")
        metrics.used_bytes.labels(tier.name).set_function(lambda: self._blobs.used_bytes)
        metrics.capacity_bytes.labels(tier.name).set(tier.capacity_bytes)

    def _sealed(self, object_id: ObjectId) -> None:
        self.on_sealed(object_id)

    # -- life

    async def recover(self) -> None:
        """At start, before run(): what the state directory holds becomes known, leftovers of a crash are deleted."""
        await recovery.recover(self._space, self._blobs, self._index, self._offload)
        self._committer.epoch = await self._offload.index(recovery.begin_session, self._index)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fills, commits and housekeeping, until cancelled: then whatever is in flight is abandoned."""
        try:
            async with trio.open_nursery() as nursery:
                self._fills.open(nursery)
                self._sealing.open(nursery)
                nursery.start_soon(self._committer.run)
                nursery.start_soon(self._keep_house)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._fills.close()
            self._blobs.files.close()

    async def _keep_house(self) -> None:
        while True:
            await self._space.make_room()
            await trio.sleep(TOUCH_SECONDS)
            await self._space.unlink_stuck()
            await self._committer.persist_access_times()

    async def prepare(self) -> None:
        """Before somebody reads: see BufferPool.prepare()."""
        await self._fills.pool.prepare(self._offload.disk)

    async def drain(self, fills_s: float = DRAIN_SECONDS) -> None:
        """At shutdown, before run() is cancelled: fills in flight end (`fills_s` at most), commit, note a clean end."""
        with trio.move_on_after(fills_s):
            await self._fills.drained()
        with trio.move_on_after(DRAIN_SECONDS):
            await self._committer.flush()
        await self._committer.persist_access_times()
        try:
            await self._offload.index(recovery.end_session, self._index)
        except NoSpace as exc:
            self._count(exc)

    def _count(self, exc: Exception) -> None:
        self._metrics.errors.labels(type(exc).__name__).inc()

    # -- reading

    async def read(self, store: Store, object_id: ObjectId, offset: int, length: int) -> bytes | memoryview:
        """Bytes `offset` to `offset + length`, short only at the end of the object; valid until the next await.

        Raises ObjectChanged, NotFound, AccessDenied, IntegrityError of the store; StoreTimeout after
        `read_timeout_s`; StoreUnavailable with `on_unreachable="error"`; Offline.
        """
        spans = list(chunk.chunk_spans(object_id.size, offset, length))
        if not spans:
            return b""
        if len(spans) == 1:
            return await self._read_span(store, object_id, spans[0], Patience(self._config))
        return self._join_now(object_id, spans) or await self._join(store, object_id, spans)

    def _join_now(self, object_id: ObjectId, spans: list[ChunkSpan]) -> memoryview | None:
        """The bytes if buffers have them all: with nothing to wait for, one piece of memory is enough for everybody."""
        cached = self._blobs.use(object_id)
        ready = [
            (fill, span) for span in spans if (fill := cached.fills.get(span.index)) is not None and fill.has(span)
        ]
        if len(ready) < len(spans) or sum(span.length for span in spans) > PIECE_BYTES:
            return None
        filled = 0
        for fill, span in ready:
            self._joined[filled : filled + span.length] = self._take(fill, span)
            filled += span.length
        for fill, _ in ready:  # only now: the pool may give the next one's buffer away
            self._fills.settle(fill, cached)
        return self._joined[:filled]

    async def _join(self, store: Store, object_id: ObjectId, spans: list[ChunkSpan]) -> memoryview:
        """The bytes in a piece of memory. Until there is one for us, no chunk is asked for."""
        patience = Patience(self._config)
        cached = self._blobs.use(object_id)
        owner = LOCAL if all(_is_here(cached, span) for span in spans) else object_id.source
        piece: Buffer | None = None
        with patience.limit():
            piece = await self._join_pieces.take(owner, Want.DEMAND)
        if piece is None:
            patience.give_up(StoreUnavailable(f"{object_id.path}: too many reads wait for the same source"))
        try:
            length, filled = sum(span.length for span in spans), 0
            view = piece.view if length <= PIECE_BYTES else memoryview(bytearray(length))
            cached = self._blobs.use(object_id)
            for span in spans:
                if cached.states[span.index] == ABSENT and span.index not in cached.fills:
                    self._fills.start(store, cached, span.index, Want.DEMAND)
            for span in spans:
                if owner == LOCAL and not _is_here(cached, span):  # it was evicted meanwhile
                    owner = object_id.source
                    self._join_pieces.charge(piece, owner)
                view[filled : filled + span.length] = await self._read_span(store, object_id, span, patience)
                filled += span.length
            return view[:filled]
        finally:
            self._join_pieces.give_back(piece)  # whoever gets it runs after the caller's next await

    async def _read_span(
        self, store: Store, object_id: ObjectId, span: ChunkSpan, patience: Patience
    ) -> bytes | memoryview:
        while True:
            cached = self._blobs.use(object_id)
            fill = cached.fills.get(span.index)
            if fill is None and cached.states[span.index] in (CHECKED, WRITTEN):
                data = await self._read_blob(cached, span)
                if data is not None:
                    self._hits.inc(span.length)
                    self.on_read(True, span.length)
                    return data
                continue
            if fill is None:
                fill = self._fills.start(store, cached, span.index, Want.DEMAND, first=span.start)
            if fill.has(span):
                data = self._take(fill, span)
                self._fills.settle(fill, cached)
                return data
            fill.readers += 1
            try:
                with patience.limit():
                    await fill.wait(span)
                if fill.has(span):
                    return self._take(fill, span)
            finally:
                fill.readers -= 1
                self._fills.settle(fill, cached)
            await self._retry_or_raise(fill, patience)

    def _take(self, fill: Fill, span: ChunkSpan) -> memoryview:
        """The bytes of a fill. What came from the store is a miss until as much was served as was fetched."""
        hit = fill.served_bytes >= fill.length or (fill.phase is Phase.KEPT and not fill.fetched)
        data = fill.take(span)
        if hit:
            self._hits.inc(span.length)
        elif fill.phase is Phase.KEPT and not fill.kept:
            self._uncached.inc(span.length)
        else:
            self._misses.inc(span.length)
        self.on_read(hit, span.length)
        return data

    async def _read_blob(self, cached: CachedObject, span: ChunkSpan) -> bytes | memoryview | None:
        """From the page cache inline, else from the disk in a thread. None: it changed under us, look again."""
        offset = chunk.chunk_offset(span.index) + span.start
        found = self._blobs.files.read_now(cached.name, offset, span.length)
        if found is not None:
            return found
        piece = await self._disk_pieces.take(None, Want.LOAD)
        try:
            view = piece.view[: span.length] if span.length <= PIECE_BYTES else memoryview(bytearray(span.length))
            if cached.states[span.index] not in (CHECKED, WRITTEN):
                return None
            generation = cached.generation
            complete = await self._fills.read_span(cached, offset, view)
            if cached.generation != generation or cached.states[span.index] not in (CHECKED, WRITTEN):
                return None
        finally:
            self._disk_pieces.give_back(piece)  # whoever gets it runs after the caller's next await
        if complete:
            return view
        # Short or failing: whatever is wrong with the blob, the bytes are fetched again.
        await self._committer.wait(cached, span.index)
        await self._space.drop_chunk(cached, span.index)
        return None

    async def _retry_or_raise(self, fill: Fill, patience: Patience) -> None:
        """The fill did not give the bytes: raise its error, or wait before the next try."""
        if patience.over:
            exc = fill.error or StoreUnavailable(f"{fill.object_id.path}: no answer")
            patience.give_up(exc)
        error = fill.error
        if error is None:
            return  # its buffer was given up before we ran; look again
        if not isinstance(error, StoreUnavailable):
            raise type(error)(*error.args) from error
        if not fill.started:
            return  # it never asked the store
        if self._config.on_unreachable == "error":
            raise StoreUnavailable(*error.args) from error
        await patience.pause(self._fills.source(fill.object_id.source).answered, error)

    # -- background

    def offer(self, store: Store, object_id: ObjectId, index: int, *, spare: bool = False) -> bool:
        """Start a background fill of a chunk. False: no room for one now. True: local, in flight, or started.

        `spare`: nobody is about to read it; few are in flight until the source has shown that it takes more.
        """
        cached = self._blobs.find(object_id)
        if cached is None:
            cached = self._blobs.use(object_id)
        if index in cached.fills or cached.states[index] in (CHECKED, WRITTEN):
            return True
        started = self._fills.offer(store, cached, index, spare=spare)
        self._blobs.forget_if_empty(cached)
        return started

    async def ensure(self, store: Store, object_id: ObjectId, index: int, *, committed: bool = True) -> None:
        """Wait until a chunk is local and, if `committed`, its record is. Raises as read() does, and NoSpace."""
        patience = Patience(self._config)
        while True:
            cached = self._blobs.use(object_id)
            if cached.states[index] in (COMMITTED, CHECKED):
                return
            if cached.states[index] == WRITTEN:
                if not committed:
                    return
                await self._committer.wait(cached, index)
                if cached.states[index] == ABSENT:
                    raise NoSpace(f"{object_id.path}: chunk {index} could not be kept")
                continue
            fill = cached.fills.get(index)
            joined = fill is not None
            if fill is None:
                fill = self._fills.start(store, cached, index, Want.BACKGROUND)
            elif fill.held:
                # Served uncached from a held buffer: try once more to keep it.
                fill.consumed = True
                self._fills.settle(fill, cached)
                continue
            fill.readers += 1
            try:
                with patience.limit():
                    await fill.wait_done()
            finally:
                fill.readers -= 1
                self._fills.settle(fill, cached)
            if fill.phase is Phase.KEPT and not fill.kept and not joined:
                raise NoSpace(f"{object_id.path}: there is no room for chunk {index}")
            if fill.phase is not Phase.KEPT:
                await self._retry_or_raise(fill, patience)

    async def flush(self) -> None:
        """Wait until what is written is committed, or is not local any more because that failed."""
        await self._committer.flush()

    def has_readers(self, source: str) -> bool:
        """Whether somebody has just asked the source for what he reads, or is about to read."""
        return trio.current_time() - self._fills.source(source).read_s < READERS_STAY_S

    # -- what is local

    def is_local(self, object_id: ObjectId, index: int) -> bool:
        cached = self._blobs.find(object_id)
        return cached is not None and cached.states[index] != ABSENT

    def has(self, object_id: ObjectId, index: int) -> bool:
        """Local, or on its way."""
        cached = self._blobs.find(object_id)
        return cached is not None and (cached.states[index] != ABSENT or index in cached.fills)

    def is_filling(self, object_id: ObjectId, index: int) -> bool:
        """On its way: the fill has not come to its end."""
        cached = self._blobs.find(object_id)
        fill = cached.fills.get(index) if cached is not None else None
        return fill is not None and not fill.held

    def is_here(self, object_id: ObjectId, offset: int, length: int) -> bool:
        """Whether read() has these bytes without the store: each chunk's are in a buffer or in the blob."""
        cached = self._blobs.find(object_id)
        return cached is not None and all(
            _is_here(cached, span) for span in chunk.chunk_spans(object_id.size, offset, length)
        )

    async def peek(self, object_id: ObjectId, length: int) -> bytes | None:
        """A copy of the first `length` bytes if all are here, for hints: no read that counts, never a request.

        What comes from the blob is not checked against its digest.
        """
        parts: list[bytes | bytearray] = []
        for span in chunk.chunk_spans(object_id.size, 0, length):
            cached = self._blobs.find(object_id)
            if cached is None or not _is_here(cached, span):
                return None
            fill = cached.fills.get(span.index)
            if fill is not None and fill.buffer is not None and fill.has(span):
                parts.append(bytes(fill.buffer.view[span.start : span.stop]))
                continue
            generation = cached.generation
            data = bytearray(span.length)
            offset = chunk.chunk_offset(span.index) + span.start
            if not await self._fills.read_span(cached, offset, memoryview(data)) or cached.generation != generation:
                return None
            parts.append(data)
        return b"".join(parts)

    def local_bytes(self, object_id: ObjectId) -> int:
        cached = self._blobs.find(object_id)
        return cached.local_bytes if cached is not None else 0

    def note_open(self, object_id: ObjectId) -> None:
        """Open objects are never evicted."""
        self._blobs.use(object_id).opens += 1

    def note_close(self, object_id: ObjectId) -> None:
        """A close without its open is one of a handle that was opened before a restart: nothing to do."""
        cached = self._blobs.find(object_id)
        if cached is not None and cached.opens:
            cached.opens -= 1
            self._blobs.forget_if_empty(cached)

    def is_sealed(self, object_id: ObjectId) -> bool:
        """Every chunk is local, checked and durable, and nothing is known against the blob."""
        return self._sealing.is_sealed(object_id)

    async def open_sealed(self, object_id: ObjectId) -> int | None:
        """A read-only descriptor of the blob, the caller's to close; None: not sealed, or to be verified first.

        Compares device, inode, size, blocks and ctime with the seal. After a mismatch, or at the first open after
        an unclean boot, the digests are verified in the background, and `on_sealed` follows when all is right.
        """
        return await self._sealing.open_sealed(object_id)

    async def note_backing(self, object_id: ObjectId) -> None:
        """The blob has had a backing id: it is only ever unlinked whole. open_sealed() notes it by itself."""
        await self._sealing.note_backing(object_id)

    def objects(self) -> Iterator[ObjectRecord]:
        """Everything of which something is local or open, least recently used first."""
        for cached in list(self._blobs):
            yield ObjectRecord(
                object=cached.object_id,
                local_bytes=cached.local_bytes,
                disk_bytes=cached.disk_bytes,
                sealed=cached.seal is not None,
                open=cached.opens > 0,
                pinned=self._space.is_pinned(cached.object_id),
                used_s=cached.used_s,
            )

    def usage(self) -> Usage:
        free_bytes, trouble = self._space.look_at_disk()
        return Usage(
            used_bytes=self._blobs.used_bytes,
            capacity_bytes=self._tier.capacity_bytes,
            free_bytes=free_bytes,
            objects_total=sum(cached.present > 0 for cached in self._blobs),
            objects_sealed=sum(cached.seal is not None for cached in self._blobs),
            trouble=trouble,
        )

    def room(self) -> tuple[int, dict[ObjectId, int]]:
        """The bytes that objects may take in all, and those on disk of each that is open or pinned."""
        return self._space.room_bytes(), self._space.staying()

    # -- keeping and letting go

    def touch(self, object_id: ObjectId) -> None:
        """As used just now, if anything of it is local."""
        if self.local_bytes(object_id):
            self._blobs.use(object_id)

    async def evict(self, object_ids: Iterable[ObjectId] | None, *, bytes_needed: int | None = None) -> EvictReport:
        """Evict objects (None: all, least recently used first) that are not open, pinned or in use.

        With `bytes_needed` it stops once so much is freed.
        """
        await self._committer.flush()
        return await self._space.evict(object_ids, bytes_needed)

    async def pin(self, pin: Pin) -> None:
        """Exempt what the pin covers from eviction, now and later. Raises NoSpace."""
        self._space.pins[pin.pin_id] = pin
        write = Write(Table.PINS, pin.pin_id.encode(), msgspec.msgpack.encode(pin))
        await self._offload.index(self._index.apply, [write], durable=True)

    async def unpin(self, pin_id: str) -> bool:
        """False: there is no such pin."""
        await self._offload.index(self._index.apply, [Write(Table.PINS, pin_id.encode(), None)], durable=True)
        return self._space.pins.pop(pin_id, None) is not None

    def pins(self) -> tuple[Pin, ...]:
        return tuple(self._space.pins.values())

    async def verify(
        self,
        object_ids: Iterable[ObjectId] | None,
        *,
        repair: bool = False,
        rebuild: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> VerifyReport:
        """Check local chunks against their digests; `progress` gets (bytes done, bytes in all).

        `repair` drops wrong chunks, so that they are fetched again; `rebuild` also drops records without a blob
        and blobs without a record, and seals anew.
        """
        return await self._sealing.verify(object_ids, repair=repair, rebuild=rebuild, progress=progress)

    async def gc(self, dry_run: bool, *, referenced: Callable[[ObjectId], bool] = lambda object_id: True) -> GcReport:
        """Delete what nothing refers to: blobs without a record, records without a blob, objects not `referenced`."""
        await self._committer.flush()
        records, blobs, freed = await self._sealing.sweep(dry_run=dry_run)
        unwanted = [
            record
            for record in self.objects()
            if not (record.open or record.pinned or referenced(record.object)) and record.disk_bytes
        ]
        if dry_run:
            return GcReport(True, blobs, records + len(unwanted), freed + sum(item.disk_bytes for item in unwanted))
        report = await self._space.evict([record.object for record in unwanted], None)
        return GcReport(False, blobs, records + report.evicted_objects, freed + report.evicted_bytes)

    def check_invariants(self) -> None:
        """Assert what must hold between any two steps; for tests."""
        self._blobs.check_invariants()
        self._fills.pool.check_invariants()
        self._join_pieces.check_invariants()
        self._disk_pieces.check_invariants()
        for cached in self._blobs:
            for index, fill in cached.fills.items():
                assert fill.index == index
                assert fill.phase is not Phase.FAILED
                assert not fill.held or (fill.phase is Phase.KEPT and fill.buffer is not None)
            if cached.uncommitted or cached.dropping is not None:
                continue
            rows = {int.from_bytes(key[16:], "big"): value for key, value in self._index.scan(Table.CHUNKS, cached.key)}
            assert rows == {i: cached.digest(i) for i, state in enumerate(cached.states) if state != ABSENT}


def _is_here(cached: CachedObject, span: ChunkSpan) -> bool:
    """In a buffer or in the blob."""
    fill = cached.fills.get(span.index)
    return cached.states[span.index] != ABSENT or (fill is not None and fill.has(span))

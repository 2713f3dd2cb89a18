"""Runs fills: a buffer, the bytes (from the store, or from the blob to be checked), the digest, the write."""

import logging
import math
import time
from collections.abc import Callable
from typing import TypeVar

import trio
import xxhash

from cachefs import chunk
from cachefs.blobs import ABSENT, CHECKED, COMMITTED, WRITTEN, Blobs, CachedObject
from cachefs.buffers import WRITES, Buffer, BufferPool
from cachefs.committer import Committer
from cachefs.config import ServerConfig
from cachefs.errors import CachefsError, IntegrityError, ObjectChanged, Offline, StoreUnavailable, WorkFailed
from cachefs.fill import Fill, Phase, Want
from cachefs.metrics import Metrics
from cachefs.offload import Offload
from cachefs.pace import SPARE_START, Pace
from cachefs.space import Space
from cachefs.store import Store
from cachefs.tier import BlobStat, Tier
from cachefs.tier.local import read_into

log = logging.getLogger(__name__)
T = TypeVar("T")

SPLIT_BYTES_MIN = 2 * chunk.MIB
"""A reader who starts so far into the last chunk came for the end of the object (an index, a footer). It would wait
for the whole chunk, 90 ms at 90 MB/s: the end is fetched first, by a GET of its own."""

SPLIT_ALIGN_BYTES = 256 * 1024
"""3 ms more at 90 MB/s, for the reads just before that one."""

SOURCE_SHARE = 1 / 4
"""Of `prefetch_bytes`: 6 chunks of 24, as many as the pool leaves a second source (buffers.OWNER_SHARE)."""

QUIET_SECONDS = 1.0
"""After a failure of a source no prefetch is tried for so long; readers ask at their own pace."""


class Source:
    """What is known of one source's health."""

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self.ill_since_s: float | None = None
        self.answered = trio.Event()
        """Set, and replaced, when the source gives bytes: readers that wait to try again need not wait longer."""
        self.quiet_until_s = 0.0
        self.pace = Pace()
        self.spare_pace = Pace(SPARE_START)
        self.fetching = 0
        """Chunks that are asked for or waiting for a buffer."""
        self.background_bytes = 0
        """What its fills take of the budget of background fills."""
        self.read_s = -math.inf
        """When a reader last wanted a chunk of it, or its window one."""

    def is_well(self) -> None:
        if self.ill_since_s is not None:
            log.warning("%s answers again after %.0f s", self.identity, trio.current_time() - self.ill_since_s)
            self.ill_since_s = None
        self.quiet_until_s = 0.0
        self.answered.set()
        self.answered = trio.Event()

    def is_ill(self, exc: StoreUnavailable) -> None:
        if self.ill_since_s is None:  # once per outage, not per request
            log.warning("%s does not answer: %s", self.identity, exc)
            self.ill_since_s = trio.current_time()
        self.quiet_until_s = trio.current_time() + QUIET_SECONDS


class Fills:
    """Starts fills and owns their buffers. A fill is in `cached.fills` from its start until its buffer is given up.

    Cancelling a reader never cancels a fill: fills run in the cache's own nursery.
    """

    def __init__(
        self,
        blobs: Blobs,
        space: Space,
        committer: Committer,
        pool: BufferPool,
        offload: Offload,
        metrics: Metrics,
        config: ServerConfig,
        hook: Callable[[str], None],
    ) -> None:
        self._blobs = blobs
        self._space = space
        self._committer = committer
        self._offload = offload
        self._metrics = metrics
        self._config = config
        self._hook = hook
        self.pool = pool
        self._sources: dict[str, Source] = {}
        self._nursery: trio.Nursery | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._background_bytes = 0
        self.running = 0
        self._idle = trio.Event()
        self._warned_full = False

    def open(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()

    def close(self) -> None:
        """No fill starts from here on."""
        self._nursery = None

    def source(self, identity: str) -> Source:
        source = self._sources.get(identity)
        if source is None:
            source = self._sources[identity] = Source(identity)
        return source

    async def drained(self) -> None:
        """Until no fill runs."""
        while self.running:
            self._idle = trio.Event()
            await self._idle.wait()

    # -- starting

    def start(self, store: Store, cached: CachedObject, index: int, want: Want, first: int = 0) -> Fill:
        """A fill that waits for its buffer if it must. The reader waits for bytes from `first` on. Raises Offline."""
        loads = cached.states[index] == COMMITTED
        if self._config.offline and not loads:
            raise Offline(f"{cached.object_id.path}: these bytes are not local, and the mount is offline")
        if self._nursery is None:
            raise WorkFailed("the cache is shutting down")
        fill = self._new(store, cached, index)
        fill.consumed = want is Want.BACKGROUND
        if want is Want.DEMAND and not loads:
            self.source(cached.object_id.source).read_s = trio.current_time()
        if first >= SPLIT_BYTES_MIN and index == cached.chunks - 1 and not loads:
            fill.split = first // SPLIT_ALIGN_BYTES * SPLIT_ALIGN_BYTES
        self._spawn(fill, cached, Want.LOAD if loads else want)
        return fill

    def offer(self, store: Store, cached: CachedObject, index: int, *, spare: bool = False) -> bool:
        """Start a background fill if there is room for one now. `spare`: nobody is about to read it."""
        loads = cached.states[index] == COMMITTED
        length = cached.length(index)
        if (self._config.offline and not loads) or not self._config.prefetch_bytes:
            return True  # nothing is fetched in the background: not now and not later
        # Who waits for a buffer waits for the last ones, or at his source's share: neither is taken from him here.
        if self._nursery is None or self.pool.available < 2:
            return False
        source = self.source(cached.object_id.source)
        if not (spare or loads):
            source.read_s = trio.current_time()
        if not self._has_budget(source, length):
            return False
        owner = None if loads else source.identity
        if owner is not None:
            pace = source.spare_pace if spare else source.pace
            if trio.current_time() < source.quiet_until_s or source.fetching >= pace.limit:
                return False
        cached.busy += 1  # the buffer may be reclaimed from a chunk of this very object, which must stay known
        buffer = self.pool.take_nowait(owner)
        cached.busy -= 1
        if buffer is None:
            return False
        fill = self._new(store, cached, index)
        fill.buffer = buffer
        fill.background_bytes = length
        source.background_bytes += length
        self._background_bytes += length
        self._spawn(fill, cached, Want.BACKGROUND)
        return True

    def _has_budget(self, source: Source, length: int) -> bool:
        """The budget is for all, but a share of it each source has in any case: one that hangs keeps what it has."""
        budget = self._config.prefetch_bytes
        if not self._background_bytes or self._background_bytes + length <= budget:
            return True
        return source.background_bytes + length <= budget * SOURCE_SHARE

    def _new(self, store: Store, cached: CachedObject, index: int) -> Fill:
        assert self._token is not None
        assert index not in cached.fills
        fill = Fill(store, cached.object_id, index, cached.length(index), self._token)
        cached.fills[index] = fill
        return fill

    def _spawn(self, fill: Fill, cached: CachedObject, want: Want) -> None:
        assert self._nursery is not None
        self.running += 1
        if want is not Want.LOAD and cached.states[fill.index] != COMMITTED:
            fill.asks = True
            self.source(fill.object_id.source).fetching += 1
        self._nursery.start_soon(self._run, fill, cached, want)

    # -- running

    async def _run(self, fill: Fill, cached: CachedObject, want: Want) -> None:
        loads = want is Want.LOAD or cached.states[fill.index] == COMMITTED
        try:
            if fill.buffer is None:
                fill.buffer = await self.pool.take(None if loads else cached.object_id.source, want)
                if not fill.readers:
                    fill.fail(StoreUnavailable("nobody wanted the chunk any more"))
                    return
            fill.started = True
            fill.phase = Phase.FILLING
            if loads and await self._load(fill, cached):
                fill.kept = True
                fill.full()
            else:
                # The bytes come from the source, on whose account the buffer goes.
                self.pool.charge(fill.buffer, fill.object_id.source)
                await self._fetch(fill)
                self._release_budget(fill)
                self.pool.charge(fill.buffer, WRITES)
                fill.full()
                await self._keep(fill, cached)
            fill.finish()
        except CachefsError as exc:
            self._metrics.errors.labels(type(exc).__name__).inc()
            fill.fail(exc)
        except Exception as exc:
            log.exception("a fill of %s failed unexpectedly", fill.object_id.path)
            self._metrics.errors.labels(type(exc).__name__).inc()
            fill.fail(WorkFailed(f"{fill.object_id.path}: {exc!r}"))
        finally:
            if fill.phase is not Phase.KEPT and fill.error is None:
                fill.fail(WorkFailed("the cache is shutting down"))  # cancelled
            self._release_budget(fill)
            self.running -= 1
            if not self.running:
                self._idle.set()
            self.settle(fill, cached)

    def _release_budget(self, fill: Fill) -> None:
        """Its bytes are here, so that the link is free for the next one; the pool bounds what is being written."""
        source = self.source(fill.object_id.source)
        self._background_bytes -= fill.background_bytes
        source.background_bytes -= fill.background_bytes
        fill.background_bytes = 0
        if fill.asks:
            fill.asks = False
            source.fetching -= 1

    def settle(self, fill: Fill, cached: CachedObject) -> None:
        """After the end of the fill and after each reader: give the buffer back, or hold it for later readers."""
        buffer = fill.buffer
        if fill.phase is Phase.FAILED:
            if buffer is not None:
                fill.buffer = None
                self.pool.give_back(buffer)
        elif fill.phase is not Phase.KEPT or buffer is None or fill.readers:
            return
        elif not fill.consumed:
            if fill.held:
                self.pool.touch(buffer)
            else:
                fill.held = True
                self.pool.hold(buffer, lambda: self._forget(fill, cached))
            return
        else:
            # Whoever read it to its end has it: holding it 2 s longer cost half of the throughput.
            fill.buffer = None
            self.pool.give_back(buffer)
        self._forget(fill, cached)

    def _forget(self, fill: Fill, cached: CachedObject) -> None:
        fill.buffer = None
        if cached.fills.get(fill.index) is fill:
            del cached.fills[fill.index]
        self._blobs.forget_if_empty(cached)

    def release_held(self, cached: CachedObject) -> None:
        """The object is dropped: nothing is held for its readers."""
        for fill in [fill for fill in cached.fills.values() if fill.held]:
            fill.consumed = True
            self.settle(fill, cached)

    # -- from the blob

    async def _load(self, fill: Fill, cached: CachedObject) -> bool:
        """Read the whole chunk and check its digest. False: it was wrong or gone; it is dropped, to be fetched."""
        if cached.states[fill.index] not in (COMMITTED, CHECKED):
            return False
        generation = cached.generation
        view = _view(fill)
        found = await self.read_blob(cached, chunk.chunk_offset(fill.index), view)
        if cached.generation != generation or cached.states[fill.index] not in (COMMITTED, CHECKED):
            return False
        if found == cached.digest(fill.index):
            cached.states[fill.index] = CHECKED
            return True
        log.warning("chunk %d of %s does not match its digest on disk", fill.index, fill.object_id.path)
        self._metrics.errors.labels(IntegrityError.__name__).inc()
        await self._space.drop_chunk(cached, fill.index)
        if self._config.offline:
            raise Offline(f"{fill.object_id.path}: the local copy was damaged, and the mount is offline")
        return False

    async def read_blob(self, cached: CachedObject, offset: int, view: memoryview) -> bytes | None:
        """Fill `view` from the blob in a thread; the digest of what was read, None if it was short or failed."""
        return await self._in_blob(cached, lambda fd: _read_and_digest(fd, offset, view))

    async def read_span(self, cached: CachedObject, offset: int, view: memoryview) -> bool:
        """Fill `view` from the blob in a thread; False if there are fewer bytes or the disk fails."""
        return await self._in_blob(cached, lambda fd: read_into(fd, view, offset)) == len(view)

    async def _in_blob(self, cached: CachedObject, read: Callable[[int], T]) -> T | None:
        """`read` with a descriptor of the blob, in a thread; None if there is no blob or the disk fails."""
        try:
            blob = self._blobs.files.acquire(cached.name)
        except OSError:
            await self._blob_is_gone(cached)
            return None
        try:
            return await self._offload.disk(read, blob.fd)
        except OSError as exc:
            log.warning("reading the blob of %s failed: %s", cached.object_id.path, exc)
            return None
        finally:
            self._blobs.files.release(blob)

    async def _blob_is_gone(self, cached: CachedObject) -> None:
        """Somebody deleted it. All of its chunks are lost, not just the one that was asked for."""
        if cached.dropping is None and cached.present:
            log.warning("the blob of %s is gone", cached.object_id.path)
            await self._space.drop(cached)

    # -- from the store

    async def _fetch(self, fill: Fill) -> None:
        """One GET; after an answer that lies one more, then the error."""
        source = self.source(fill.object_id.source)
        started_s = time.monotonic()
        in_flight = source.fetching
        self._metrics.fills_in_flight.inc()
        try:
            try:
                await self._get(fill, "retry")
            except IntegrityError:
                fill.restart()
                await self._get(fill, "error")
        except StoreUnavailable as exc:
            source.is_ill(exc)
            raise
        finally:
            self._metrics.fills_in_flight.dec()
        source.is_well()
        fill.fetched = True
        self._metrics.store_bytes.inc(fill.length)
        seconds = time.monotonic() - started_s
        self._metrics.fill_seconds.observe(seconds)
        if fill.length == chunk.CHUNK_BYTES and not fill.split:
            for pace in (source.pace, source.spare_pace):
                pace.note(seconds, in_flight)
        if fill.first_byte_s is not None:
            self._metrics.first_byte_seconds.observe(fill.first_byte_s - started_s)
        self._hook("fill:fetched")

    async def _get(self, fill: Fill, result_when_wrong: str) -> None:
        """The chunk: one GET, or the end that somebody waits for and then the rest."""
        if fill.split:
            await self._get_part(fill, fill.split, fill.length, fill.tail_progress, result_when_wrong)
            await self._get_part(fill, 0, fill.split, fill.progress, result_when_wrong)
        else:
            await self._get_part(fill, 0, fill.length, fill.progress, result_when_wrong)

    async def _get_part(
        self, fill: Fill, first: int, stop: int, progress: Callable[[int], None], result_when_wrong: str
    ) -> None:
        offset = chunk.chunk_offset(fill.index)
        buffer = _buffer(fill)
        view = buffer.view[first:stop]
        requests = self._metrics.store_requests
        try:
            await self._offload.store(
                fill.store.fetch_into, view, fill.object_id, offset + first, offset + stop, progress
            )
            # INVARIANT: what no store has told of is neither served nor kept: the buffer has older bytes there.
            if (told := fill.tail_arrived if first else fill.arrived) != stop - first:
                raise IntegrityError(
                    f"{fill.object_id.path}: the store ended a part of {stop - first} bytes after {told}"
                )
        except trio.Cancelled:
            # The thread goes on until its deadline and may still write: this buffer is lost to the pool.
            fill.abandoned = True
            fill.buffer = None
            fill.phase = Phase.FAILED
            self.pool.discard(buffer)
            raise
        except IntegrityError:
            self._metrics.errors.labels(IntegrityError.__name__).inc()
            requests.labels("get", result_when_wrong).inc()
            raise
        except CachefsError as exc:
            requests.labels("get", "error").inc()
            if isinstance(exc, ObjectChanged):
                log.info("%s changed in the store", fill.object_id.path)
            raise
        requests.labels("get", "ok").inc()

    # -- into the blob

    async def _keep(self, fill: Fill, cached: CachedObject) -> None:
        """Write the chunk; one that cannot be kept was served all the same. Counted; warned about once."""
        while cached.dropping is not None:
            await cached.dropping.wait()
        if cached.states[fill.index] != ABSENT:
            fill.kept = True
            return
        if cached.name in self._blobs.stuck:
            self._not_kept(fill, "its old blob could not be deleted")
            return
        if not await self._space.reserve(fill.length):
            trouble = self._space.look_at_disk()[1]
            self._not_kept(fill, trouble or "there is no room: everything else is open, pinned or in use")
            return
        generation = cached.generation
        digest, gone = None, False
        cached.busy += 1
        try:
            if cached.dropping is not None or cached.name in self._blobs.stuck:
                self._not_kept(fill, "the object is being dropped")
                return
            digest, stat = await self._offload.disk(
                _digest_and_write,
                self._blobs.tier,
                cached.name,
                cached.object_id.size,
                chunk.chunk_offset(fill.index),
                _view(fill),
                not cached.present,
            )
        except FileNotFoundError as exc:
            self._not_kept(fill, str(exc))
            gone = True
        except OSError as exc:
            self._not_kept(fill, str(exc))
        finally:
            cached.busy -= 1
            self._space.unreserve(fill.length)
        if digest is None or cached.generation != generation:
            if gone and cached.generation == generation:
                await self._blob_is_gone(cached)
            await self._tidy_after_failed_write(cached)
            return
        self._blobs.set_disk_bytes(cached, stat.disk_bytes)
        self._hook("fill:written")
        cached.set_present(fill.index, WRITTEN, digest)
        fill.kept = True
        self._committer.add(cached, fill.index)

    async def _tidy_after_failed_write(self, cached: CachedObject) -> None:
        """Part of a chunk may be on disk: it counts as used; a blob with nothing else in it goes."""
        try:
            stat = await self._offload.disk(self._blobs.tier.stat, cached.name)
        except OSError as exc:
            log.warning("what the blob of %s takes cannot be seen: %s", cached.object_id.path, exc)
            return
        if cached.name in self._blobs.stuck:
            return  # dropped meanwhile; what it takes is counted there
        self._blobs.set_disk_bytes(cached, stat.disk_bytes if stat is not None else 0)
        if not (cached.present or cached.busy or cached.dropping is not None):
            await self._space.drop(cached)

    def _not_kept(self, fill: Fill, why: str) -> None:
        self._metrics.tier_write_errors.inc()
        level = logging.DEBUG if self._warned_full else logging.WARNING
        self._warned_full = True
        log.log(level, "a chunk of %s is served without being kept: %s", fill.object_id.path, why)


def _buffer(fill: Fill) -> Buffer:
    assert fill.buffer is not None
    return fill.buffer


def _view(fill: Fill) -> memoryview:
    return _buffer(fill).view[: fill.length]


def _read_and_digest(fd: int, offset: int, view: memoryview) -> bytes | None:
    if read_into(fd, view, offset) != len(view):
        return None
    return xxhash.xxh3_128_digest(view)


def _digest_and_write(
    tier: Tier, name: str, size: int, offset: int, view: memoryview, create: bool
) -> tuple[bytes, BlobStat]:
    digest: bytes = xxhash.xxh3_128_digest(view)
    return digest, tier.write(name, size, offset, view, create=create)

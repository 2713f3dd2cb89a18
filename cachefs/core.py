"""The cache without FUSE: index, local tier, chunk cache, snapshots, stores, and the work that commands ask for.

The server builds one and serves it; a command without a server takes the state directory's lock and builds one
for itself. So `warm`, `evict`, ... are the same code in both.
"""

import contextlib
import functools
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import trio

from cachefs.cache import DRAIN_SECONDS, ChunkCache
from cachefs.cached import ObjectRecord, Pin
from cachefs.chunk import ObjectId, chunk_count, chunk_length
from cachefs.config import GIB, ServerConfig, VolumeConfig
from cachefs.errors import AccessDenied, CachefsError, NotFound, Offline, StoreUnavailable, UsageError, WorkFailed
from cachefs.index import Index
from cachefs.metrics import Metrics
from cachefs.offload import Offload
from cachefs.snapshot import Entry, Snapshots, Volume, join
from cachefs.store import ObjectInfo, Store
from cachefs.store.open import open_store
from cachefs.tier.local import LocalTier

log = logging.getLogger(__name__)

_PROBE_NAME = "x"
WARM_CHUNKS = 22
"""Chunks that one warm has in flight: at 30 ms and 90 MB/s per connection 24 bring 1.24 GB/s, 16 bring 0.85."""

WARM_CHUNKS_BESIDE = 16
"""While somebody reads from the same source, which would have no window otherwise (pace.LIMIT_START counts all)."""

WARM_YIELD_S = 0.05

Progress = Callable[[dict[str, Any]], None]


def first_error(error: BaseException) -> BaseException:
    """The reason inside the groups that nurseries raise: one of ours if there is one."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [first_error(inner) for inner in error.exceptions]
    return next((leaf for leaf in leaves if isinstance(leaf, CachefsError)), leaves[0])


class Source(msgspec.Struct, frozen=True):
    """What SOURCE[/PATH] on the command line means in terms of ObjectId: objects at or under `path`."""

    store: Store
    config: VolumeConfig
    path: str
    """The key of the prefix, without slashes at its ends; "" is the whole bucket."""

    def covers(self, object_id: ObjectId) -> bool:
        if object_id.source != self.store.identity:
            return False
        return not self.path or object_id.path == self.path or object_id.path.startswith(self.path + "/")


class Core:
    """Everything that needs no FUSE. Built by open_core(). Its methods run on the trio thread."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        index: Index,
        tier: LocalTier,
        offload: Offload,
        cache: ChunkCache,
        snapshots: Snapshots,
        metrics: Metrics,
    ) -> None:
        self.config = config
        self.index = index
        self.tier = tier
        self.offload = offload
        self.cache = cache
        self.snapshots = snapshots
        self.metrics = metrics
        self.volumes: dict[str, Volume] = {}
        """By name; the server adds and removes them."""
        self.drain_s = DRAIN_SECONDS
        """How long the end waits for fills in flight."""
        self._stores: dict[VolumeConfig, Store] = {}
        self._token = trio.lowlevel.current_trio_token()

    def open_store(self, config: VolumeConfig) -> Store:
        """The store of a source; the same one for the same options. Raises UsageError for what makes no sense."""
        key = msgspec.structs.replace(config, name="", include=(), exclude=(), uid=0, gid=0, prefetch="auto")
        store = self._stores.get(key)
        if store is None:
            store = self._stores[key] = open_store(
                key,
                get_timeout_s=self.config.get_timeout_s,
                list_timeout_s=self.config.list_timeout_s,
                count_hedge=self.count_hedge,
            )
        return store

    def count_hedge(self, result: str) -> None:
        """For stores, in any of their threads: a hedge was "started", or has "won"."""
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self.metrics.store_hedges.labels(result).inc)

    def close(self) -> None:
        """Let go of stores and index."""
        for store in self._stores.values():
            with contextlib.suppress(CachefsError):
                store.close()
        self.index.close()

    def volume_of(self, source: str) -> VolumeConfig | None:
        """The options of the mounted volume that `source` is, or lies in."""
        for volume in self.volumes.values():
            if source == volume.config.source or source.startswith(volume.config.source.rstrip("/") + "/"):
                return volume.config
        return None

    def source(self, config: VolumeConfig) -> Source:
        """SOURCE[/PATH] with its options; a mounted volume lends the options that were not given."""
        mounted = self.volume_of(config.source)
        plain = VolumeConfig(name="", source=config.source)
        if mounted is not None and msgspec.structs.replace(config, name="", uid=0, gid=0, prefetch="auto") == plain:
            config = msgspec.structs.replace(mounted, source=config.source, include=(), exclude=())
        store = self.open_store(config)
        probe = store.object_id(ObjectInfo(_PROBE_NAME, 0, "", 0.0))
        return Source(store, config, probe.path.removesuffix(_PROBE_NAME).strip("/"))

    # -- what is there ------------------------------------------------------------------------------------------

    def tiers(self) -> list[dict[str, Any]]:
        """`status`'s tiers[]; also sets the gauges."""
        usage = self.cache.usage()
        self.metrics.used_bytes.labels("local").set(usage.used_bytes)
        self.metrics.capacity_bytes.labels("local").set(usage.capacity_bytes)
        return [
            {
                "name": "local",
                "directory": str(self.tier.directory),
                "used_bytes": usage.used_bytes,
                "capacity_bytes": usage.capacity_bytes,
                "free_bytes": usage.free_bytes,
                "objects_total": usage.objects_total,
                "objects_sealed": usage.objects_sealed,
                "trouble": usage.trouble or self.index.trouble,
            }
        ]

    async def volume_totals(self, volume: Volume) -> dict[str, Any]:
        """Sums over the directories that are frozen so far; `listing_complete` says whether those are all."""
        local = {
            (record.object.path, record.object.version, record.object.size): record
            for record in self.cache.objects()
            if record.object.source == volume.store.identity
        }
        # In a thread: 1,000,000 entries take over a second, and readers must not wait for that.
        return await self.offload.disk(self._sums, volume, local)

    def _sums(self, volume: Volume, local: Mapping[tuple[str, str, int], ObjectRecord]) -> dict[str, Any]:
        totals = dict.fromkeys(("bytes_total", "bytes_local", "objects_total", "objects_sealed"), 0)
        frozen: set[str] = set()
        named = {""}
        for directory, listing in self.snapshots.known(volume):
            frozen.add(directory)
            for entry in listing.entries:
                if entry.is_directory:
                    named.add(join(directory, entry.key_name))
                    continue
                totals["bytes_total"] += entry.size
                totals["objects_total"] += 1
                if not local and entry.size:
                    continue
                object_id = self.snapshots.object_id(volume, directory, entry)
                record = local.get((object_id.path, object_id.version, object_id.size))
                totals["bytes_local"] += record.local_bytes if record else 0
                totals["objects_sealed"] += bool(record and record.sealed) or entry.size == 0
        return {**totals, "listing_complete": named <= frozen}

    def list_objects(self, source: Source | None) -> list[dict[str, Any]]:
        """What is cached, most recently used first."""
        records = [record for record in self.cache.objects() if source is None or source.covers(record.object)]
        records.sort(key=lambda record: (-record.used_s, record.object.path))
        return [
            {
                "source": record.object.source,
                "path": record.object.path,
                "url": object_url(record.object),
                "version": record.object.version,
                "size_bytes": record.object.size,
                "local_bytes": record.local_bytes,
                "sealed": record.sealed,
                "pinned": record.pinned,
                "open": record.open,
                "used_s": record.used_s,
            }
            for record in records
        ]

    # -- work -----------------------------------------------------------------------------------------------------

    async def warm(self, source: Source, *, pin: bool, progress: Progress) -> dict[str, Any]:
        """Fetch everything under a source. Raises UsageError when there is nothing, WorkFailed when some failed."""
        started = trio.current_time()
        if self.index.read_only:
            raise WorkFailed(f"{source.config.source}: nothing can be kept: {self.index.trouble}")
        try:
            await self._probe_unknown(source)
            objects = [item async for item in self._listed(source)]
        except (AccessDenied, StoreUnavailable, Offline) as exc:
            raise UsageError(f"{source.config.source} cannot be listed: {exc}") from exc
        if not objects:
            raise UsageError(f"{source.config.source} has no objects: check bucket, prefix and --include")
        if pin:
            await self.pin(source)
        total = sum(object_id.size for object_id in objects)
        if total > self.cache.usage().capacity_bytes:
            log.warning("%s has %d bytes, more than the cache may hold", source.config.source, total)
        done = already = sum(self.cache.local_bytes(object_id) for object_id in objects)
        progress({"done_bytes": done, "total_bytes": total})

        def fetched(count: int) -> None:
            nonlocal done
            done += count
            progress({"done_bytes": done, "total_bytes": total})

        failed = await self._fetch_missing(source.store, objects, fetched)
        lost = total - sum(self.cache.local_bytes(object_id) for object_id in objects)
        capacity = self.cache.usage().capacity_bytes
        if lost and total > capacity:
            raise WorkFailed(
                f"{source.config.source} has {total / GIB:.3g} GiB, the cache holds at most {capacity / GIB:.3g} GiB: "
                "a part is local; give a larger --cache-size, or warm less (--include)"
            )
        if failed:
            path, error = failed[0]
            raise WorkFailed(f"{len(failed)} chunks could not be fetched, the first of {path}: {error}") from error
        if lost:
            raise WorkFailed(
                f"{lost / GIB:.3g} GiB of {source.config.source} were fetched and could not be kept: "
                "`cachefs status` shows what the disk holds, and its trouble if it has any"
            )
        return {
            "source": source.config.source,
            "objects_total": len(objects),
            "bytes_total": total,
            "fetched_bytes": done - already,
            "pinned": pin,
            "seconds": trio.current_time() - started,
        }

    async def _fetch_missing(
        self, store: Store, objects: Sequence[ObjectId], fetched: Callable[[int], None]
    ) -> list[tuple[str, CachefsError]]:
        """Every chunk that is not local; `fetched` gets the bytes of each. Paths and errors of those that failed."""
        failed: list[tuple[str, CachefsError]] = []
        chunks = ((object_id, index) for object_id in objects for index in range(chunk_count(object_id.size)))
        missing = ((object_id, index) for object_id, index in chunks if not self.cache.is_local(object_id, index))
        over = False

        async def worker(*, yields: bool) -> None:
            nonlocal over
            while not over:
                if yields and self.cache.has_readers(store.identity):
                    await trio.sleep(WARM_YIELD_S)
                    continue
                found = next(missing, None)
                if found is None:
                    over = True
                    return
                object_id, index = found
                try:
                    # Who waited for its commit too had a GET less in flight meanwhile: 0.95 GB/s, not 1.24.
                    await self.cache.ensure(store, object_id, index, committed=False)
                except CachefsError as exc:
                    failed.append((object_id.path, exc))
                    continue
                fetched(chunk_length(object_id.size, index))

        async with trio.open_nursery() as nursery:
            for number in range(WARM_CHUNKS):
                nursery.start_soon(functools.partial(worker, yields=number >= WARM_CHUNKS_BESIDE))
        await self.cache.flush()
        return failed

    async def _probe_unknown(self, source: Source) -> None:
        """A wrong endpoint is told after 4 s, not when the listing's retries are over (60 s)."""
        if not self.config.offline and not self.snapshots.is_known(Volume(source.config, source.store), ""):
            with contextlib.suppress(NotFound, UsageError):  # one object, or the listing says it too
                await self.offload.store(source.store.probe)

    async def _listed(self, source: Source) -> AsyncIterator[ObjectId]:
        """Every object under a source, also when it names one object and no prefix."""
        found = False
        for volume in self._views(source.config):
            with contextlib.suppress(NotFound):
                async for directory, entry in self._files(volume, deep=volume.config.source == source.config.source):
                    object_id = self.snapshots.object_id(volume, directory, entry)
                    if source.covers(object_id):
                        found = True
                        yield object_id
            if found:
                return

    async def _files(self, volume: Volume, *, deep: bool) -> AsyncIterator[tuple[str, Entry]]:
        if deep:
            async for item in self.snapshots.walk(volume):
                yield item
            return
        for entry in (await self.snapshots.freeze(volume, "")).entries:
            if not entry.is_directory:
                yield "", entry

    def _views(self, config: VolumeConfig) -> Iterator[Volume]:
        """The source as a directory; then the directory that it is an object of."""
        for source in (config.source, config.source.rpartition("/")[0]):
            if re.match(r"[a-z0-9]+://.", source):
                mounted = next((v for v in self.volumes.values() if v.config.source == source), None)
                here = msgspec.structs.replace(config, source=source)
                yield mounted or Volume(here, self.open_store(here))

    async def pin(self, source: Source) -> dict[str, Any]:
        """Exempt what is at or under a source from eviction, also what is fetched later."""
        pin = Pin(_pin_id(source), source.store.identity, source.path, time.time())
        await self.cache.pin(pin)
        return {"source": source.config.source, "pinned": True}

    async def unpin(self, source: Source) -> dict[str, Any]:
        """Take the pins at or under a source back; none is no error.

        Raises UsageError, and takes nothing back, when a pin of a directory above goes on holding it.
        """
        whole = Pin("", source.store.identity, source.path, 0.0)
        pins = []
        for pin in self.cache.pins():
            here = ObjectId(pin.source, pin.path, 0, "")
            if pin.source == whole.source and (pin.path == whole.path or whole.covers(here)):
                pins.append(pin)
            elif pin.covers(ObjectId(whole.source, whole.path, 0, "")):
                raise UsageError(f"{source.config.source} is pinned as a part of {object_url(here)}: unpin that")
        for pin in pins:
            await self.cache.unpin(pin.pin_id)
        return {"source": source.config.source, "pinned": False, "pins": len(pins)}

    def _covered(self, source: Source | None) -> list[ObjectId] | None:
        if source is None:
            return None
        return [record.object for record in self.cache.objects() if source.covers(record.object)]

    async def evict(self, source: Source) -> dict[str, Any]:
        """Drop what is local of a source and neither open nor pinned."""
        report = await self.cache.evict(self._covered(source))
        return {
            "source": source.config.source,
            "evicted_objects": report.evicted_objects,
            "evicted_bytes": report.evicted_bytes,
            "skipped": [{"path": object_id.path, "reason": reason} for object_id, reason in report.skipped],
        }

    async def verify(self, source: Source | None, *, repair: bool, rebuild: bool, progress: Progress) -> dict[str, Any]:
        """Compare every local chunk with its digest."""
        report = await self.cache.verify(
            self._covered(source),
            repair=repair,
            rebuild=rebuild,
            progress=lambda done, total: progress({"done_bytes": done, "total_bytes": total}),
        )
        return {
            "objects": report.objects,
            "chunks": report.chunks,
            "bytes": report.bytes,
            "bad": [
                {
                    "path": key.object.path,
                    "source": key.object.source,
                    "url": object_url(key.object),
                    "chunk": key.index,
                }
                for key in report.bad
            ],
            "dropped_chunks": report.dropped_chunks,
            "dropped_records": report.dropped_records,
            "deleted_blobs": report.deleted_blobs,
        }

    async def gc(self, *, dry_run: bool) -> dict[str, Any]:
        """Delete what nothing refers to."""
        builtins: dict[str, Any] = msgspec.to_builtins(await self.cache.gc(dry_run))
        return builtins


def object_url(object_id: ObjectId) -> str:
    """What names it on the command line: the identity without its endpoint (`s3://bucket@http://host`)."""
    scheme, _, rest = object_id.source.partition("://")
    return f"{scheme}://{rest.partition('@')[0] if scheme == 's3' else rest}/{object_id.path}"


def _pin_id(source: Source) -> str:
    return ObjectId(source.store.identity, source.path, 0, "").key.hex()


@contextlib.asynccontextmanager
async def open_core(
    config: ServerConfig, metrics: Metrics, *, session: str, index: Index | None = None
) -> AsyncIterator[Core]:
    """A running core; the caller holds the state directory's lock. Fills in flight are finished at the end.

    `index` is the state's, opened; it is closed at the end.
    """
    offload = Offload()
    index = index or Index(config.state_dir / "index")
    core: Core | None = None
    try:
        tier = LocalTier(
            config.state_dir / "blobs",
            capacity_bytes=config.cache_bytes_max,
            free_fraction_min=config.free_fraction_min,
        )
        cache = ChunkCache(index=index, tier=tier, offload=offload, metrics=metrics, config=config, clock=time.time)
        snapshots = Snapshots(index, offload, time.time, session=session, offline=config.offline, metrics=metrics)
        core = Core(config, index=index, tier=tier, offload=offload, cache=cache, snapshots=snapshots, metrics=metrics)
        await cache.recover()
        async with trio.open_nursery() as nursery:
            await nursery.start(cache.run)
            await nursery.start(snapshots.run)
            try:
                yield core
            finally:
                with trio.CancelScope(shield=True):
                    await cache.drain(core.drain_s)
                nursery.cancel_scope.cancel()
    finally:
        if core is not None:
            core.close()
        else:
            index.close()

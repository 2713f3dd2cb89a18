"""Making room: eviction of whole objects, reservations for chunks that are being written, and dropping bad chunks.

Order on the way out: the record is gone for good (committed and synced), then the blob is unlinked. A crash in
between leaves a blob without a record, which the next start deletes; never a record of bytes that are not there.
"""

from collections.abc import Callable, Iterable, Sequence

import trio

from cachefs import policy
from cachefs.blobs import ABSENT, WRITTEN, Blobs, CachedObject
from cachefs.cached import EvictReport, Pin, Skip
from cachefs.chunk import ObjectId
from cachefs.errors import NoSpace
from cachefs.index import Index, Table, Write
from cachefs.metrics import Metrics
from cachefs.offload import Offload

EVICTED_TOGETHER = 64
"""Objects that a command's eviction drops at once: one by one, 10,000 small objects take a minute of commits."""


class Space:
    """Who may stay and who must go. `hook` is called with the name of each step (crash tests)."""

    def __init__(
        self,
        blobs: Blobs,
        index: Index,
        offload: Offload,
        metrics: Metrics,
        hook: Callable[[str], None],
    ) -> None:
        self._blobs = blobs
        self._tier = blobs.tier
        self._index = index
        self._offload = offload
        self._metrics = metrics
        self._hook = hook
        self._evicting = trio.Lock()
        self._committing = trio.Lock()
        self._deletions: list[tuple[list[Write], trio.Event]] = []
        self.pins: dict[str, Pin] = {}
        self.release_held: Callable[[CachedObject], None] = lambda cached: None
        """Set by the cache: gives back the buffers that are held for readers of an object."""

    # -- what may go

    def is_pinned(self, object_id: ObjectId) -> bool:
        return any(pin.covers(object_id) for pin in self.pins.values())

    def _reason_to_stay(self, cached: CachedObject) -> Skip | None:
        if cached.opens:
            return Skip.OPEN
        if self.is_pinned(cached.object_id):
            return Skip.PINNED
        if cached.busy or cached.uncommitted or cached.dropping is not None or self._in_flight(cached):
            return Skip.BUSY
        return None

    @staticmethod
    def _in_flight(cached: CachedObject) -> bool:
        return any(not fill.held for fill in cached.fills.values())

    def _candidates(self) -> Iterable[policy.Candidate]:
        for cached in self._blobs:
            if self._reason_to_stay(cached) is None:
                yield policy.Candidate(cached.object_id, cached.disk_bytes)

    # -- room for a chunk

    def shortfall_bytes(self, add_bytes: int) -> int:
        free_bytes, disk_bytes = self._tier.free_bytes()
        return policy.shortfall_bytes(
            add_bytes=add_bytes,
            used_bytes=self._blobs.used_bytes + self._blobs.reserved_bytes,
            capacity_bytes=self._tier.capacity_bytes,
            free_bytes=free_bytes - self._blobs.reserved_bytes,
            disk_bytes=disk_bytes,
            free_fraction_min=self._tier.free_fraction_min,
        )

    def room_bytes(self) -> int:
        """What objects could fill if all others went: within the capacity, and with the disk's reserve left free."""
        free_bytes, disk_bytes = self._tier.free_bytes()
        on_disk = self._blobs.used_bytes + free_bytes - int(disk_bytes * self._tier.free_fraction_min)
        return min(self._tier.capacity_bytes, on_disk)

    def staying(self) -> dict[ObjectId, int]:
        """What is open or pinned, and its bytes on disk."""
        return {
            cached.object_id: cached.disk_bytes
            for cached in self._blobs
            if cached.opens or self.is_pinned(cached.object_id)
        }

    async def reserve(self, chunk_bytes: int) -> bool:
        """Room for a chunk, evicting if need be; the caller takes the reservation back after its write."""
        if self.shortfall_bytes(chunk_bytes) > 0:
            async with self._evicting:
                await self._evict_lru(self.shortfall_bytes(chunk_bytes))
                if self.shortfall_bytes(chunk_bytes) > 0:
                    return False
                self._blobs.reserved_bytes += chunk_bytes
                return True
        self._blobs.reserved_bytes += chunk_bytes
        return True

    def unreserve(self, chunk_bytes: int) -> None:
        self._blobs.reserved_bytes -= chunk_bytes

    async def make_room(self) -> None:
        """Back under the capacity and the free reserve (a smaller --cache-size, a disk that others filled)."""
        async with self._evicting:
            short = self.shortfall_bytes(0)
            while short > 0:
                if not await self._evict_lru(short) and not await self._evict_lru(1):
                    return
                short = self.shortfall_bytes(0)

    async def _evict_lru(self, need_bytes: int) -> int:
        """Evict until so much is freed; what was freed. Victims that turn out to be in use are passed over."""
        freed = 0
        refused: set[ObjectId] = set()
        while freed < need_bytes:
            candidates = (found for found in self._candidates() if found.object not in refused)
            victims = policy.select_victims(candidates, need_bytes - freed)
            if not victims:
                break
            for object_id in victims:
                gained, reason = await self._evict(object_id)
                freed += gained
                if reason is not None:
                    refused.add(object_id)
        return freed

    # -- eviction

    async def evict(self, object_ids: Iterable[ObjectId] | None, bytes_needed: int | None) -> EvictReport:
        """Evict these objects, or all; with `bytes_needed` only so many of them as it takes."""
        if object_ids is None:
            wanted = [cached.object_id for cached in self._blobs if cached.disk_bytes]
        else:
            wanted = list(object_ids)
        objects = freed = 0
        skipped: list[tuple[ObjectId, str]] = []
        together = EVICTED_TOGETHER if bytes_needed is None else 1
        for start in range(0, len(wanted), together):
            if bytes_needed is not None and freed >= bytes_needed:
                break
            for object_id, gained, reason in await self._evict_all(wanted[start : start + together]):
                freed += gained
                objects += reason is None
                if reason is not None:
                    skipped.append((object_id, reason.value))
        return EvictReport(objects, freed, tuple(skipped))

    async def _evict_all(self, object_ids: Sequence[ObjectId]) -> list[tuple[ObjectId, int, Skip | None]]:
        """All at once: their records share commits. Fills that need room wait for one batch only."""
        outcomes: list[tuple[ObjectId, int, Skip | None]] = []

        async def one(object_id: ObjectId) -> None:
            outcomes.append((object_id, *await self._evict(object_id)))

        async with self._evicting, trio.open_nursery() as nursery:
            for object_id in object_ids:
                nursery.start_soon(one, object_id)
        return outcomes

    async def _evict(self, object_id: ObjectId) -> tuple[int, Skip | None]:
        """(bytes freed, None), or (0, why it stays)."""
        cached = self._blobs.find(object_id)
        if cached is None or not (cached.present or cached.disk_bytes):
            return 0, Skip.ABSENT
        reason = self._reason_to_stay(cached)
        if reason is not None:
            return 0, reason
        self._blobs.files.forget(cached.name)
        unused = await self._offload.disk(self._tier.is_unused, cached.name)
        if not unused:
            return 0, Skip.IN_USE
        reason = self._reason_to_stay(cached)  # it may have been opened meanwhile
        if reason is not None:
            return 0, reason
        freed = cached.disk_bytes
        await self.drop(cached)
        self._metrics.evicted_objects.inc()
        self._metrics.evicted_bytes.inc(freed)
        return freed, None

    async def drop(self, cached: CachedObject) -> None:
        """Give up the blob, whoever uses it. Fills of the object wait until the old blob is gone."""
        assert cached.dropping is None
        dropping = cached.dropping = trio.Event()
        writes = cached.delete()
        cached.clear()
        self._hook("evict:begun")
        self.release_held(cached)
        self._blobs.files.forget(cached.name)
        try:
            # A cancelled command must not leave the blob between its record and its end.
            with trio.CancelScope(shield=True):
                await self._delete_records(writes)
                self._hook("evict:recorded")
                await self._offload.disk(self._tier.unlink, cached.name)
                self._hook("evict:unlinked")
        finally:
            self._blobs.set_disk_bytes(cached, 0)
            cached.dropping = None
            dropping.set()
            self._blobs.forget_if_empty(cached)

    async def drop_chunk(self, cached: CachedObject, index: int) -> None:
        """A chunk is wrong on disk. A blob that ever had a backing id is never rewritten: it goes as a whole."""
        if cached.dropping is not None or cached.states[index] in (ABSENT, WRITTEN):
            return
        if cached.had_backing:
            await self.drop(cached)
            return
        cached.set_absent(index)
        writes = [Write(Table.CHUNKS, cached.chunk_key(index), None), cached.header(None)]
        with trio.CancelScope(shield=True):
            await self._apply_anyway(writes)

    async def _delete_records(self, writes: list[Write]) -> None:
        """Durably; whoever comes while a commit runs shares the next one. Runs shielded."""
        applied = trio.Event()
        self._deletions.append((writes, applied))
        async with self._committing:
            if applied.is_set():
                return
            batch, self._deletions = self._deletions, []
            await self._apply_anyway([write for each, _ in batch for write in each])
            for _, event in batch:
                event.set()

    async def _apply_anyway(self, writes: list[Write]) -> None:
        """Deletions need room too in a full index: the records then stay, and the next start finds no blob for them."""
        try:
            await self._offload.index(self._index.apply, writes, durable=True)
        except NoSpace as exc:
            self._metrics.errors.labels(type(exc).__name__).inc()

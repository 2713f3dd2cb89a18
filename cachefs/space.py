"""Making room: eviction of whole objects, reservations for chunks that are being written, and dropping bad chunks.

Order on the way out: the record is gone for good (committed and synced), then the blob is unlinked. A crash in
between leaves a blob without a record, which the next start deletes; never a record of bytes that are not there.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import trio

from cachefs import policy
from cachefs.blobs import ABSENT, WRITTEN, Blobs, CachedObject
from cachefs.cached import EvictReport, Pin, Remark, Skip
from cachefs.chunk import ObjectId
from cachefs.errors import NoSpace
from cachefs.index import Index, Table, Write
from cachefs.metrics import Metrics
from cachefs.offload import Offload
from cachefs.tier import Tier

log = logging.getLogger(__name__)

EVICTED_TOGETHER = 64
"""Objects that a command's eviction drops at once: one by one, 10,000 small objects take a minute of commits."""

STUCK_IN_A_ROW_MAX = 3
"""After so many blobs that could not be deleted, one after the other, nothing is evicted for a chunk until the next
try: on a disk that has become read-only all that is local would be given up, and no room be gained."""


class Stuck(NamedTuple):
    """A blob that could not be deleted: why, and what it takes."""

    error: OSError
    disk_bytes: int


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
        self._stuck_in_a_row = 0
        self._closed = ""
        """Why nothing is kept in this process."""
        self._deletions: list[tuple[list[Write], trio.Event]] = []
        self.pins: dict[str, Pin] = {}
        self.release_held: Callable[[CachedObject], None] = lambda cached: None
        """Set by the cache: gives back the buffers that are held for readers of an object."""

    def keep_nothing(self, why: str) -> None:
        """From here on in this process. What is known may be served."""
        self._closed = why

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

    def _shortfall_bytes(self, add_bytes: int) -> int:
        """Raises OSError when the tier is gone."""
        free_bytes, disk_bytes = self._tier.free_bytes()
        return policy.shortfall_bytes(
            add_bytes=add_bytes,
            used_bytes=self._blobs.used_bytes + self._blobs.reserved_bytes,
            capacity_bytes=self._tier.capacity_bytes,
            free_bytes=free_bytes - self._blobs.reserved_bytes,
            disk_bytes=disk_bytes,
            free_fraction_min=self._tier.free_fraction_min,
        )

    def look_at_disk(self) -> tuple[int, str]:
        """What is free, and why nothing can be kept there, or ""."""
        try:
            return self._tier.free_bytes()[0], self._closed
        except OSError as exc:
            return 0, self._closed or str(exc)

    def room_bytes(self) -> int:
        """What objects could fill if all others went: within the capacity, and with the disk's reserve left free."""
        try:
            free_bytes, disk_bytes = self._tier.free_bytes()
        except OSError:
            return 0
        if self._closed:
            return 0
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
        """Room for a chunk, evicting if need be; the caller takes the reservation back after its write.

        A tier that is gone has no room, and evicting would make none.
        """
        if self._closed:
            return False
        try:
            if self._shortfall_bytes(chunk_bytes) > 0:
                async with self._evicting:
                    await self._evict_lru(self._shortfall_bytes(chunk_bytes))
                    if self._shortfall_bytes(chunk_bytes) > 0:
                        return False
                    self._blobs.reserved_bytes += chunk_bytes
                    return True
        except OSError:
            return False
        self._blobs.reserved_bytes += chunk_bytes
        return True

    def unreserve(self, chunk_bytes: int) -> None:
        self._blobs.reserved_bytes -= chunk_bytes

    async def make_room(self) -> None:
        """Back under the capacity and the free reserve (a smaller --cache-size, a disk that others filled)."""
        async with self._evicting:
            with contextlib.suppress(OSError):  # the tier is gone: there is nothing to make room in
                while (short := self._shortfall_bytes(0)) > 0:
                    if not await self._evict_lru(short) and not await self._evict_lru(1):
                        return

    async def _evict_lru(self, need_bytes: int) -> int:
        """Evict until so much is freed; what was freed. Victims that turn out to be in use are passed over."""
        freed = 0
        refused: set[ObjectId] = set()
        if self._index.read_only:
            return 0
        while freed < need_bytes and self._stuck_in_a_row < STUCK_IN_A_ROW_MAX:
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
        if self._index.read_only:  # it would be given up, and no room be gained
            return 0, Skip.STUCK
        reason = self._reason_to_stay(cached)
        if reason is not None:
            return 0, reason
        self._blobs.files.forget(cached.name)
        try:
            if not await self._offload.disk(self._tier.is_unused, cached.name):
                return 0, Skip.IN_USE
        except OSError as exc:
            log.warning("whether the blob of %s is in use cannot be seen: %s", cached.object_id.path, exc)
            return 0, Skip.STUCK
        reason = self._reason_to_stay(cached)  # it may have been opened meanwhile
        if reason is not None:
            return 0, reason
        freed = cached.disk_bytes
        if not await self.drop(cached):
            self._stuck_in_a_row += 1
            return 0, Skip.STUCK
        self._stuck_in_a_row = 0
        self._metrics.evicted_objects.inc()
        self._metrics.evicted_bytes.inc(freed)
        return freed, None

    async def drop(self, cached: CachedObject) -> bool:
        """Give up the blob, whoever uses it. Fills of the object wait until the old blob is gone.

        False: it could not be deleted. It takes room, and the object is not kept until a later try deletes it.
        """
        assert cached.dropping is None
        dropping = cached.dropping = trio.Event()
        writes = cached.delete()
        cached.clear()
        self._hook("evict:begun")
        self.release_held(cached)
        self._blobs.files.forget(cached.name)
        stuck: Mapping[str, Stuck] = {}
        try:
            # A cancelled command must not leave the blob between its record and its end.
            with trio.CancelScope(shield=True):
                await self._delete_records(writes)
                self._hook("evict:recorded")
                stuck = await self.unlink({cached.name: cached.disk_bytes})
                self._hook("evict:unlinked")
                if stuck and self._index.get(Table.OBJECTS, cached.key) is not None:
                    await self._remark_bad(cached)
        finally:
            self._blobs.set_disk_bytes(cached, 0)
            cached.dropping = None
            dropping.set()
            self._blobs.forget_if_empty(cached)
        return not stuck

    async def unlink(self, disk_bytes: Mapping[str, int]) -> Mapping[str, Stuck]:
        """Delete blobs, of names and what they take. The answer has those that stay: they are never used again.

        INVARIANT: who comes here has given up the records, so nothing is read from a blob that stays.
        """
        stuck = await self._offload.disk(_unlink_all, self._tier, disk_bytes)
        for name in disk_bytes:
            found = stuck.get(name)
            if found is not None and name not in self._blobs.stuck:  # told once, not at each try
                self._metrics.tier_unlink_errors.inc()
                log.warning("a blob cannot be deleted, and is not used any more: %s", found.error)
            self._blobs.set_stuck(name, found.disk_bytes if found is not None else None)
        return stuck

    async def unlink_stuck(self) -> None:
        """Try again, and let the next chunk that needs room try one more."""
        await self.unlink(dict(self._blobs.stuck))
        self._stuck_in_a_row = min(self._stuck_in_a_row, STUCK_IN_A_ROW_MAX - 1)

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
            if not await self._apply_anyway(writes):
                await self._remark_bad(cached)

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

    async def _apply_anyway(self, writes: list[Write]) -> bool:
        """Deletions need room too in a full index: the records then stay, and the next start finds no blob for them."""
        try:
            await self._offload.index(self._index.apply, writes, durable=True)
        except NoSpace as exc:
            self._metrics.errors.labels(type(exc).__name__).inc()
            return False
        return True

    async def _remark_bad(self, cached: CachedObject) -> None:
        """Neither its record nor its blob went, on a read-only disk: the next server must not believe the seal."""
        remark = Write(Table.REMARKS, cached.key, Remark.BAD.value)
        with contextlib.suppress(NoSpace):
            await self._offload.index(self._index.apply, [remark], durable=False)


def _unlink_all(tier: Tier, disk_bytes: Mapping[str, int]) -> dict[str, Stuck]:
    """Delete blobs, of names and what they took when last seen; those that stay. Blocks: for a thread."""
    stuck: dict[str, Stuck] = {}
    for name, taken_bytes in disk_bytes.items():
        try:
            tier.unlink(name)
        except OSError as exc:
            stuck[name] = Stuck(exc, _taken_bytes(tier, name, taken_bytes))
    return stuck


def _taken_bytes(tier: Tier, name: str, last_seen_bytes: int) -> int:
    try:
        stat = tier.stat(name)
    except OSError:
        return last_seen_bytes
    return stat.disk_bytes if stat is not None else 0

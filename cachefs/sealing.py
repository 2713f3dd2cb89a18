"""Sealed objects: which blobs may be handed to the kernel as they are, and the verification of chunks.

A seal is believed while the blob looks exactly as it did when it was sealed and no boot ended uncleanly since.
Otherwise the blob is verified first, in the background, and opens are served from the cache meanwhile.
"""

import logging
import os
from collections.abc import Callable, Iterable

import trio

from cachefs import chunk, recovery
from cachefs.blobs import CHECKED, COMMITTED, Blobs, CachedObject
from cachefs.cached import Remark, Seal, VerifyReport
from cachefs.chunk import ChunkKey, ObjectId
from cachefs.committer import Committer
from cachefs.errors import IndexUnwritable, IntegrityError, NoSpace, WorkFailed
from cachefs.fetch import Fills
from cachefs.index import Index, Table, Write
from cachefs.metrics import Metrics
from cachefs.offload import Offload
from cachefs.space import Space
from cachefs.tier import BlobStat
from cachefs.tier.local import blob_stat

log = logging.getLogger(__name__)

VERIFY_PRIORITY = 2
"""Readers get buffers before verification does."""


class Sealing:
    def __init__(
        self,
        blobs: Blobs,
        space: Space,
        committer: Committer,
        fills: Fills,
        index: Index,
        offload: Offload,
        metrics: Metrics,
        on_sealed: Callable[[ObjectId], None],
    ) -> None:
        self._blobs = blobs
        self._space = space
        self._committer = committer
        self._fills = fills
        self._index = index
        self._offload = offload
        self._metrics = metrics
        self._on_sealed = on_sealed
        self._nursery: trio.Nursery | None = None
        self._verifying: set[ObjectId] = set()

    def open(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    def is_sealed(self, object_id: ObjectId) -> bool:
        cached = self._blobs.find(object_id)
        return cached is not None and cached.seal is not None and not cached.suspect

    async def open_sealed(self, object_id: ObjectId) -> int | None:
        """A read-only descriptor of the whole blob, the caller's to close; None: serve from the cache for now."""
        cached = self._blobs.find(object_id)
        if cached is None or cached.seal is None or cached.suspect or cached.dropping is not None:
            return None
        generation = cached.generation
        cached.busy += 1  # no eviction between here and the caller's open count
        try:
            fd, stat = await self._offload.disk(self._open, cached.name)
            good = cached.generation == generation and cached.seal == Seal(stat, self._committer.epoch)
            if good and not cached.had_backing:
                good = await self._note_backing(cached)
        except OSError as exc:
            log.warning("the blob of %s cannot be opened: %s", object_id.path, exc)
            return None
        finally:
            cached.busy -= 1
        if good and cached.generation == generation and cached.seal is not None:
            return fd
        os.close(fd)
        self._suspect(cached)
        return None

    def _open(self, name: str) -> tuple[int, BlobStat]:
        fd = self._blobs.tier.open(name)
        return fd, blob_stat(os.fstat(fd))

    async def _note_backing(self, cached: CachedObject) -> bool:
        """Remember for good, before anybody gets the blob, that it must never be rewritten."""
        cached.had_backing = True
        try:
            await self._offload.index(self._note, cached.header(cached.seal), cached.key)
        except NoSpace:
            return False
        return True

    def _note(self, header: Write, key: bytes) -> None:
        """The header, or where the disk takes none, the remark: passthrough is what a read-only disk still has."""
        try:
            self._index.apply([header], durable=False)
        except IndexUnwritable:
            self._index.apply([Write(Table.REMARKS, key, Remark.BACKED.value)], durable=False)

    async def note_backing(self, object_id: ObjectId) -> None:
        cached = self._blobs.find(object_id)
        if cached is not None and not cached.had_backing:
            await self._note_backing(cached)

    def _suspect(self, cached: CachedObject) -> None:
        """Verify in the background; sealed anew when all is right."""
        if cached.seal is None or self._nursery is None or cached.object_id in self._verifying:
            return
        cached.suspect = True
        for index, state in enumerate(cached.states):
            if state == CHECKED:  # what was read before it looked different says nothing: readers check again
                cached.states[index] = COMMITTED
        self._verifying.add(cached.object_id)
        self._nursery.start_soon(self._verify_suspect, cached)

    async def _verify_suspect(self, cached: CachedObject) -> None:
        log.info("%s is verified before it is served from its blob directly", cached.object_id.path)
        try:
            before = await self._stat(cached)
            bad = await self._verify_and_drop(cached)
            if not bad:
                await self._reseal(cached, before)
        finally:
            self._verifying.discard(cached.object_id)

    async def _stat(self, cached: CachedObject) -> BlobStat | None:
        """None: there is no such blob, or the disk has lost it."""
        try:
            return await self._offload.disk(self._blobs.tier.stat, cached.name)
        except OSError as exc:
            log.warning("the blob of %s cannot be looked at: %s", cached.object_id.path, exc)
            return None

    async def _verify_and_drop(self, cached: CachedObject) -> list[int]:
        """Give up chunks that are wrong, unless a reader who met one has given up the whole blob meanwhile."""
        generation = cached.generation
        bad = await self.verify_object(cached, lambda count: None)
        for index in bad:
            if cached.generation == generation:
                await self._space.drop_chunk(cached, index)
        return bad

    async def _reseal(self, cached: CachedObject, before: BlobStat | None) -> None:
        """Every chunk was just checked: the blob is the sealed one, if it still looks as it did before the check."""
        generation = cached.generation
        stat = await self._stat(cached)
        if cached.generation != generation or cached.dropping is not None:
            return
        if stat is None or stat.size != cached.object_id.size:
            await self._space.drop(cached)
            return
        if not cached.complete:
            return
        if stat != before:
            cached.suspect = False  # its seal does not fit: the next open has it verified again
            return
        cached.seal = Seal(stat, self._committer.epoch)
        cached.suspect = False
        try:
            await self._offload.index(self._index.apply, [cached.header(cached.seal)], durable=False)
        except NoSpace as exc:
            log.warning("the new seal of %s could not be recorded: %s", cached.object_id.path, exc)
        if cached.seal is not None:
            self._on_sealed(cached.object_id)

    # -- verification

    async def verify_object(self, cached: CachedObject, progress: Callable[[int], None]) -> list[int]:
        """Read every committed chunk and compare its digest; the numbers of those that are wrong.

        `progress` is called with the bytes of each chunk that was read.
        """
        bad: list[int] = []
        self._blobs.files.forget(cached.name)  # a descriptor may be of another file than the one of that name now
        cached.busy += 1
        try:
            for index in range(cached.chunks):
                if cached.states[index] not in (COMMITTED, CHECKED):
                    continue
                right = await self._verify_chunk(cached, index)
                if right is False:
                    bad.append(index)
                progress(cached.length(index))
        finally:
            cached.busy -= 1
            self._blobs.forget_if_empty(cached)
        return bad

    async def _verify_chunk(self, cached: CachedObject, index: int) -> bool | None:
        """None: the chunk went away meanwhile."""
        generation = cached.generation
        buffer = await self._fills.pool.take(None, VERIFY_PRIORITY)
        try:
            view = buffer.view[: cached.length(index)]
            found = await self._fills.read_blob(cached, chunk.chunk_offset(index), view)
        finally:
            self._fills.pool.give_back(buffer)
        if cached.generation != generation or cached.states[index] not in (COMMITTED, CHECKED):
            return None
        if found == cached.digest(index):
            cached.states[index] = CHECKED
            return True
        self._metrics.errors.labels(IntegrityError.__name__).inc()
        log.warning("chunk %d of %s does not match its digest on disk", index, cached.object_id.path)
        cached.states[index] = COMMITTED  # the next reader checks it again, and drops it
        cached.suspect = cached.seal is not None
        return False

    async def verify(
        self,
        object_ids: Iterable[ObjectId] | None,
        *,
        repair: bool,
        rebuild: bool,
        progress: Callable[[int, int], None],
    ) -> VerifyReport:
        """Check what is local against its digests. `progress` gets (bytes done, bytes in all)."""
        dropped_records, deleted_blobs = (await self.sweep(dry_run=False))[:2] if rebuild else (0, 0)
        wanted = None if object_ids is None else set(object_ids)
        chosen = [cached for cached in self._blobs if cached.present and (wanted is None or cached.object_id in wanted)]
        total = sum(cached.local_bytes for cached in chosen)
        done = chunks = dropped = 0
        bad: list[ChunkKey] = []

        def advance(count: int) -> None:
            nonlocal done, chunks
            done += count
            chunks += 1
            progress(done, max(total, done))

        for cached in chosen:
            before = await self._stat(cached)
            generation = cached.generation
            wrong = await self.verify_object(cached, advance)
            bad.extend(ChunkKey(cached.object_id, index) for index in wrong)
            if repair or rebuild:
                present = cached.present
                for index in wrong:
                    if cached.generation == generation:
                        await self._space.drop_chunk(cached, index)
                dropped += present - cached.present
            if not wrong and cached.complete and (cached.suspect or cached.seal is None):
                await self._reseal(cached, before)
        return VerifyReport(len(chosen), chunks, done, tuple(bad), dropped, dropped_records, deleted_blobs)

    async def sweep(self, *, dry_run: bool) -> tuple[int, int, int]:
        """Drop records without a usable blob and blobs without a record: (records, blobs, bytes)."""
        try:
            found = await self._offload.disk(recovery.look, self._index, self._blobs.tier)
        except OSError as exc:
            raise WorkFailed(f"the blobs cannot be listed, so nothing is deleted: {exc}") from exc
        known = {cached.name for cached in self._blobs}
        blobs = [(name, size) for name, size in found.orphans if name not in known]
        local = {cached.object_id for cached in found.objects}
        lost = [cached for cached in self._blobs if cached.has_header and cached.object_id not in local]
        lost = [cached for cached in lost if not (cached.busy or cached.uncommitted or cached.dropping is not None)]
        if not dry_run:
            for cached in lost:
                if cached.dropping is None:
                    await self._space.drop(cached)
            for name, size in list(blobs):
                if name not in {cached.name for cached in self._blobs} and await self._space.unlink({name: size}):
                    blobs.remove((name, size))
        return len(lost), len(blobs), sum(size for _, size in blobs)

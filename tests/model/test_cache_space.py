"""ChunkCache and its room: eviction, pins, leases, full disks, sealing, verification, gc."""

import errno
import itertools
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trio

from cachefs import chunk, recovery
from cachefs.cache import ChunkCache
from cachefs.cached import Pin
from cachefs.chunk import ChunkKey, ObjectId
from cachefs.errors import NoSpace, Offline
from cachefs.index import Index, Write
from cachefs.tier import BlobStat
from cachefs.tier.local import LocalTier
from tests.support.caches import content, opened_cache, run, until
from tests.support.memory_store import MemoryStore

CHUNK = 16 * 1024


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", CHUNK)


def ticking() -> Callable[[], float]:
    """A clock that goes on by a second at each look."""
    ticks = itertools.count(1_700_000_000)
    return lambda: float(next(ticks))


def blob_of(state: Path, object_id: ObjectId) -> Path:
    name = object_id.key.hex()
    return state / "blobs" / name[:2] / name


def damage(path: Path, offset: int = 100) -> None:
    with path.open("r+b") as blob:
        blob.seek(offset)
        blob.write(b"damage")


async def fill(cache: ChunkCache, store: MemoryStore, *paths: str) -> None:
    for path in paths:
        object_id = store.id_of(path)
        for index in range(chunk.chunk_count(object_id.size)):
            await cache.ensure(store, object_id, index)


def local(cache: ChunkCache, store: MemoryStore) -> str:
    return "".join(path for path in sorted(store.objects) if cache.local_bytes(store.id_of(path)))


def store_of(paths: str, chunks: int = 2) -> MemoryStore:
    return MemoryStore({path: content(chunks * CHUNK, seed) for seed, path in enumerate(paths)})


def test_least_recently_used_whole_objects_go_first(tmp_path: Path) -> None:
    store = store_of("abcd")

    async def scenario() -> None:
        async with opened_cache(tmp_path, cache_bytes_max=6 * CHUNK, clock=ticking()) as cache:
            await fill(cache, store, "a", "b", "c")
            await cache.read(store, store.id_of("a"), 0, 1)
            await fill(cache, store, "d")
            assert local(cache, store) == "acd"
            assert not blob_of(tmp_path, store.id_of("b")).exists()
            assert cache.usage().used_bytes <= 6 * CHUNK
            cache.check_invariants()

    run(scenario)


def test_access_times_and_pins_survive_a_restart(tmp_path: Path) -> None:
    store = store_of("abcd")
    clock = ticking()

    async def scenario() -> None:
        async with opened_cache(tmp_path, cache_bytes_max=6 * CHUNK, clock=clock) as cache:
            await fill(cache, store, "a", "b", "c")
            await cache.read(store, store.id_of("b"), 0, 1)
            await cache.pin(Pin("1", store.identity, "prefix/a", 0.0))
        async with opened_cache(tmp_path, cache_bytes_max=6 * CHUNK, clock=clock) as cache:
            assert [pin.pin_id for pin in cache.pins()] == ["1"]
            await fill(cache, store, "d")
            assert local(cache, store) == "abd"
            assert await cache.unpin("1")
            assert not await cache.unpin("1")
        async with opened_cache(tmp_path, cache_bytes_max=2 * CHUNK, clock=clock) as cache:
            await until(lambda: cache.usage().used_bytes <= 2 * CHUNK)
            assert local(cache, store) == "d"
            cache.check_invariants()

    run(scenario)


def test_open_and_pinned_objects_stay_and_what_finds_no_room_is_served_uncached(tmp_path: Path) -> None:
    store = store_of("abc")

    async def scenario() -> None:
        async with opened_cache(tmp_path, cache_bytes_max=4 * CHUNK) as cache:
            await fill(cache, store, "a", "b")
            cache.note_open(store.id_of("a"))
            await cache.pin(Pin("1", store.identity, "", 0.0))
            assert bytes(await cache.read(store, store.id_of("c"), 0, 2 * CHUNK)) == store.objects["c"][0]
            with pytest.raises(NoSpace):
                await cache.ensure(store, store.id_of("c"), 0)
            assert local(cache, store) == "ab"
            report = await cache.evict(None)
            assert dict(report.skipped) == {store.id_of("a"): "open", store.id_of("b"): "pinned"}
            await cache.unpin("1")
            cache.note_close(store.id_of("a"))
            report = await cache.evict(None)
            assert (report.evicted_objects, report.skipped) == (2, ())
            assert cache.usage().used_bytes == 0
            cache.check_invariants()

    run(scenario)


def test_evict_with_bytes_needed_stops_when_they_are_freed(tmp_path: Path) -> None:
    store = store_of("abc")

    async def scenario() -> None:
        async with opened_cache(tmp_path, clock=ticking()) as cache:
            await fill(cache, store, "a", "b", "c")
            report = await cache.evict(None, bytes_needed=CHUNK)
            assert (report.evicted_objects, report.evicted_bytes) == (1, 2 * CHUNK)
            assert local(cache, store) == "bc"
            report = await cache.evict([store.id_of("c"), store.id_of("a")])
            assert (report.evicted_objects, report.skipped) == (1, ((store.id_of("a"), "not local"),))
            # Nothing is served from memory either.
            store.unavailable = True
            with trio.move_on_after(0.3) as scope:
                await cache.read(store, store.id_of("c"), 0, 1)
            assert scope.cancelled_caught

    run(scenario)


def test_a_blob_that_is_mapped_is_not_evicted(tmp_path: Path) -> None:
    store = store_of("ab")
    object_id = store.id_of("a")

    async def scenario() -> None:
        async with opened_cache(tmp_path) as cache:
            await fill(cache, store, "a", "b")
            fd = await cache.open_sealed(object_id)
            assert fd is not None
            with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
                os.close(fd)
                report = await cache.evict(None)
                assert report.evicted_objects == 1
                assert report.skipped == ((object_id, "in use"),)
                assert mapped[:] == store.objects["a"][0]
            assert (await cache.evict(None)).evicted_objects == 1
            cache.check_invariants()

    run(scenario)


def test_part_of_the_disk_is_always_left_free(tmp_path: Path) -> None:
    store = store_of("abc")
    tier = _SmallDisk(tmp_path / "blobs", capacity_bytes=100 * CHUNK, free_fraction_min=0.05)

    async def scenario() -> None:
        async with opened_cache(tmp_path, tier=tier, clock=ticking()) as cache:
            await fill(cache, store, "a", "b")
            tier.others_bytes = _SmallDisk.DISK_BYTES - 6 * CHUNK
            await fill(cache, store, "c")
            assert local(cache, store) == "bc"
            cache.check_invariants()

    run(scenario)


class _SmallDisk(LocalTier):
    """A disk of 40 chunks of which others take `others_bytes`; writes fail once `failing` is set."""

    DISK_BYTES = 40 * CHUNK
    others_bytes = 0
    failing: OSError | None = None
    partly = False

    def free_bytes(self) -> tuple[int, int]:
        used = sum(stat.disk_bytes for _, stat in self.scan())
        return self.DISK_BYTES - self.others_bytes - used, self.DISK_BYTES

    def write(self, name: str, size: int, offset: int, data: memoryview, *, create: bool) -> BlobStat:
        if self.failing is not None:
            if self.partly:
                super().write(name, size, offset, data[: len(data) // 2], create=create)
            raise self.failing
        return super().write(name, size, offset, data, create=create)


@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("code", ["ENOSPC", "EIO"])
def test_a_full_or_failing_disk_never_fails_a_read(
    tmp_path: Path, code: str, partly: bool, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_of("ab", chunks=3)
    tier = _SmallDisk(tmp_path / "blobs", capacity_bytes=100 * CHUNK)
    tier.free_fraction_min = 0.0

    async def scenario() -> None:
        async with opened_cache(tmp_path, tier=tier) as cache:
            await cache.ensure(store, store.id_of("a"), 0)
            tier.failing, tier.partly = OSError(getattr(errno, code), "injected"), partly
            for path in "ab":
                for _ in range(2):
                    assert bytes(await cache.read(store, store.id_of(path), 0, 3 * CHUNK)) == store.objects[path][0]
            await until(lambda: not blob_of(tmp_path, store.id_of("b")).exists())
            assert local(cache, store) == "a"
            tier.failing = None
            await cache.evict([])
            await fill(cache, store, "a", "b")
            cache.check_invariants()
        assert sum("without being kept" in record.message for record in caplog.records) == 1

    run(scenario)


def test_the_object_is_sealed_with_its_last_chunk_and_opens_as_its_blob(tmp_path: Path) -> None:
    store = store_of("a", chunks=3)
    object_id = store.id_of("a")

    async def scenario() -> None:
        sealed: list[ObjectId] = []
        async with opened_cache(tmp_path) as cache:
            cache.on_sealed = sealed.append
            await cache.ensure(store, object_id, 0)
            await cache.ensure(store, object_id, 2)
            assert not cache.is_sealed(object_id)
            assert await cache.open_sealed(object_id) is None
            await cache.ensure(store, object_id, 1)
            assert sealed == [object_id]
            assert cache.is_sealed(object_id)
            cache.check_invariants()
        async with opened_cache(tmp_path) as cache:
            assert cache.is_sealed(object_id)
            fd = await cache.open_sealed(object_id)
            assert fd is not None
            assert os.pread(fd, 10 * CHUNK, 0) == store.objects["a"][0]
            os.close(fd)

    run(scenario)


def test_a_sealed_blob_that_was_touched_is_verified_before_it_is_handed_out(tmp_path: Path) -> None:
    store = store_of("ab", chunks=3)

    async def scenario() -> None:
        async with opened_cache(tmp_path) as cache:
            await fill(cache, store, "a", "b")
        os.utime(blob_of(tmp_path, store.id_of("a")))  # another ctime, the same bytes
        damage(blob_of(tmp_path, store.id_of("b")))
        sealed: list[ObjectId] = []
        async with opened_cache(tmp_path) as cache:
            cache.on_sealed = sealed.append
            for path in "ab":
                assert await cache.open_sealed(store.id_of(path)) is None
            await until(lambda: sealed == [store.id_of("a")])
            await until(lambda: not cache.is_local(store.id_of("b"), 0))
            fd = await cache.open_sealed(store.id_of("a"))
            assert fd is not None
            os.close(fd)
            for path in "ab":
                assert bytes(await cache.read(store, store.id_of(path), 0, 3 * CHUNK)) == store.objects[path][0]
            await until(lambda: cache.is_sealed(store.id_of("b")))
            cache.check_invariants()

    run(scenario)


@pytest.mark.parametrize("clean", [True, False])
def test_after_an_unclean_boot_sealed_blobs_are_verified_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: bool
) -> None:
    store = store_of("a")
    object_id = store.id_of("a")
    boot = tmp_path / "boot_id"
    monkeypatch.setattr(recovery, "BOOT_ID", boot)

    async def scenario() -> None:
        sealed: list[ObjectId] = []
        boot.write_text("first")
        async with opened_cache(tmp_path, drain=clean) as cache:
            await fill(cache, store, "a")
        boot.write_text("second")
        async with opened_cache(tmp_path) as cache:
            cache.on_sealed = sealed.append
            fd = await cache.open_sealed(object_id)
            assert (fd is not None) is clean
            if fd is None:
                await until(lambda: sealed == [object_id])
                fd = await cache.open_sealed(object_id)
            assert fd is not None
            os.close(fd)

    run(scenario)


def test_a_damaged_chunk_is_noticed_at_its_first_read_and_fetched_again(tmp_path: Path) -> None:
    store = store_of("a", chunks=3)
    object_id = store.id_of("a")

    async def scenario() -> None:
        async with opened_cache(tmp_path) as cache:
            await fill(cache, store, "a")
        damage(blob_of(tmp_path, object_id), CHUNK + 5)
        store.get_counts.clear()
        async with opened_cache(tmp_path) as cache:
            assert bytes(await cache.read(store, object_id, 0, 3 * CHUNK)) == store.objects["a"][0]
            assert set(store.get_counts) == {("a", CHUNK, 2 * CHUNK)}
            cache.check_invariants()
        damage(blob_of(tmp_path, object_id), CHUNK + 5)
        async with opened_cache(tmp_path, offline=True) as cache:
            with pytest.raises(Offline):
                await cache.read(store, object_id, CHUNK, 1)
            assert bytes(await cache.read(store, object_id, 0, 10)) == store.objects["a"][0][:10]
            cache.check_invariants()

    run(scenario)


def test_a_damaged_blob_that_was_handed_to_the_kernel_is_never_rewritten(tmp_path: Path) -> None:
    store = store_of("a", chunks=3)
    object_id = store.id_of("a")

    async def scenario() -> None:
        async with opened_cache(tmp_path) as cache:
            await fill(cache, store, "a")
            fd = await cache.open_sealed(object_id)
            assert fd is not None
        damage(blob_of(tmp_path, object_id))
        with os.fdopen(fd, "rb") as held:
            before = held.read()
            async with opened_cache(tmp_path) as cache:
                assert bytes(await cache.read(store, object_id, 0, 3 * CHUNK)) == store.objects["a"][0]
                await until(lambda: cache.is_sealed(object_id))
                cache.check_invariants()
            held.seek(0)
            assert held.read() == before
            assert os.fstat(held.fileno()).st_nlink == 0

    run(scenario)


@pytest.mark.parametrize("truncated", [False, True])
def test_a_blob_that_somebody_deletes_never_gives_zeros(tmp_path: Path, truncated: bool) -> None:
    store = store_of("a", chunks=4)
    object_id = store.id_of("a")

    async def scenario() -> None:
        async with opened_cache(tmp_path) as cache:
            for index in (0, 1, 2):
                await cache.ensure(store, object_id, index)
            if truncated:
                os.truncate(blob_of(tmp_path, object_id), CHUNK)
            else:
                blob_of(tmp_path, object_id).unlink()
            for _ in range(2):
                for index in (3, 2, 1, 0):
                    got = bytes(await cache.read(store, object_id, index * CHUNK, CHUNK))
                    assert got == store.objects["a"][0][index * CHUNK :][:CHUNK]
            await fill(cache, store, "a")
            cache.check_invariants()
        assert blob_of(tmp_path, object_id).read_bytes() == store.objects["a"][0]

    run(scenario)


def test_verify_names_wrong_chunks_and_repair_drops_them(tmp_path: Path) -> None:
    store = store_of("ab", chunks=3)
    seen: list[tuple[int, int]] = []

    async def scenario() -> None:
        async with opened_cache(tmp_path) as cache:
            await fill(cache, store, "a", "b")
            damage(blob_of(tmp_path, store.id_of("a")), 2 * CHUNK)
            report = await cache.verify(None, progress=lambda done, total: seen.append((done, total)))
            assert (report.objects, report.chunks, report.bytes) == (2, 6, 6 * CHUNK)
            assert report.bad == (ChunkKey(store.id_of("a"), 2),)
            assert seen[-1] == (6 * CHUNK, 6 * CHUNK)
            assert not cache.is_sealed(store.id_of("a"))
            report = await cache.verify([store.id_of("a")], repair=True)
            assert (report.dropped_chunks, report.objects) == (1, 1)
            assert not cache.is_local(store.id_of("a"), 2)
            assert (await cache.verify(None)).bad == ()
            assert bytes(await cache.read(store, store.id_of("a"), 0, 3 * CHUNK)) == store.objects["a"][0]
            cache.check_invariants()

    run(scenario)


def test_gc_and_rebuild_delete_what_has_no_counterpart(tmp_path: Path) -> None:
    store = store_of("abc")

    async def scenario() -> None:
        async with opened_cache(tmp_path) as cache:
            await fill(cache, store, "a", "b", "c")
            orphan = blob_of(tmp_path, ObjectId("s", "p", 1, "1"))
            orphan.parent.mkdir(exist_ok=True)
            orphan.write_bytes(bytes(8192))
            blob_of(tmp_path, store.id_of("a")).unlink()
            report = await cache.gc(True, referenced=lambda object_id: not object_id.path.endswith("c"))
            assert (report.blobs, report.objects) == (1, 2)
            assert orphan.exists()
            report = await cache.gc(False, referenced=lambda object_id: not object_id.path.endswith("c"))
            assert (report.blobs, report.objects) == (1, 2)
            assert not orphan.exists()
            assert local(cache, store) == "b"
            blob_of(tmp_path, store.id_of("b")).unlink()
            assert (await cache.verify(None, rebuild=True)).dropped_records == 1
            cache.check_invariants()

    run(scenario)


def test_a_start_tidies_what_a_crash_left(tmp_path: Path) -> None:
    store = store_of("abc")

    async def scenario() -> None:
        async with opened_cache(tmp_path) as cache:
            await fill(cache, store, "a", "b", "c")
        orphan = blob_of(tmp_path, ObjectId("s", "p", 1, "1"))
        orphan.parent.mkdir(exist_ok=True)
        orphan.write_bytes(b"x")
        blob_of(tmp_path, store.id_of("a")).unlink()
        os.truncate(blob_of(tmp_path, store.id_of("b")), 5)
        async with opened_cache(tmp_path) as cache:
            assert local(cache, store) == "c"
            assert not orphan.exists()
            assert not blob_of(tmp_path, store.id_of("b")).exists()
            cache.check_invariants()
            for path in "abc":
                assert bytes(await cache.read(store, store.id_of(path), 0, 2 * CHUNK)) == store.objects[path][0]

    run(scenario)


def test_many_objects_are_evicted_with_few_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{number:03d}" for number in range(200)]
    store = MemoryStore({name: content(1000, seed) for seed, name in enumerate(names)})
    commits: list[int] = []
    apply = Index.apply

    def counted(self: Index, writes: Sequence[Write], *, durable: bool) -> None:
        commits.append(len(writes))
        apply(self, writes, durable=durable)

    async def scenario() -> None:
        async with opened_cache(tmp_path, buffers=64) as cache:
            await fill(cache, store, *names)
            monkeypatch.setattr(Index, "apply", counted)
            report = await cache.evict(None)
            assert (report.evicted_objects, report.skipped) == (200, ())
            assert len(commits) < 100
            cache.check_invariants()
        assert [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()] == []
        async with opened_cache(tmp_path) as cache:
            assert list(cache.objects()) == []

    run(scenario)

"""ChunkCache on a real directory with a store in memory: reads, single flight, commits, warm restarts."""

import functools
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs import chunk
from cachefs.cache import ChunkCache
from cachefs.chunk import ObjectId
from cachefs.errors import (
    AccessDenied,
    CachefsError,
    IntegrityError,
    NotFound,
    ObjectChanged,
    Offline,
    StoreTimeout,
    StoreUnavailable,
    WorkFailed,
)
from cachefs.index import RESERVE_BYTES
from cachefs.pace import LIMIT_START, SPARE_START
from tests.support.caches import content, opened_cache, run, until
from tests.support.memory_store import MemoryStore

CHUNK = 16 * 1024


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", CHUNK)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, CHUNK, CHUNK + 1, 5 * CHUNK + 777])
def test_reads_return_the_bytes_of_the_store_and_a_restart_needs_no_get(tmp_path: Path, size: int) -> None:
    data = content(size)
    store = MemoryStore({"a": data})
    object_id = store.id_of("a")

    async def scenario() -> None:
        for _ in range(2):
            async with opened_cache(tmp_path) as cache:
                assert bytes(await cache.read(store, object_id, 0, size + 10)) == data
                for offset in range(0, size, 3001):
                    assert bytes(await cache.read(store, object_id, offset, 5000)) == data[offset : offset + 5000]
                assert bytes(await cache.read(store, object_id, size, 10)) == b""
                cache.check_invariants()
        assert store.get_count == chunk.chunk_count(size)

    run(scenario)


def test_fifty_readers_of_a_cold_object_cause_one_get_per_chunk(tmp_path: Path) -> None:
    data = content(8 * CHUNK + 5)
    store = MemoryStore({"a": data})
    object_id = store.id_of("a")

    async def scenario() -> None:
        async with opened_cache(tmp_path, buffers=4) as cache:

            async def reader(number: int) -> None:
                for n in range(0, len(data), 1024):
                    offset = (n + number * 4096) % len(data)
                    assert bytes(await cache.read(store, object_id, offset, 1024)) == data[offset : offset + 1024]

            async with trio.open_nursery() as nursery:
                for number in range(50):
                    nursery.start_soon(reader, number)
            cache.check_invariants()
        assert set(store.get_counts.values()) == {1}
        assert store.get_count == 9

    run(scenario)


def test_many_readers_of_a_chunk_that_cannot_be_kept_cause_one_get(tmp_path: Path) -> None:
    data = content(CHUNK)
    store = MemoryStore({"a": data})
    object_id = store.id_of("a")

    async def scenario() -> None:
        async with opened_cache(tmp_path, cache_bytes_max=0, buffers=1) as cache, trio.open_nursery() as nursery:

            async def reader(offset: int) -> None:
                assert bytes(await cache.read(store, object_id, offset, 1024)) == data[offset : offset + 1024]

            with store.gets.held():
                for offset in range(CHUNK - 1024, -1, -1024):  # the end of the chunk first
                    nursery.start_soon(reader, offset)
                await until(lambda: store.gets.waiting == 1)
                await trio.testing.wait_all_tasks_blocked()
        assert store.get_count == 1

    run(scenario)


def test_cancelled_reader_does_not_cancel_the_shared_fill(tmp_path: Path) -> None:
    data = content(CHUNK)
    store = MemoryStore({"a": data})
    object_id = store.id_of("a")

    async def scenario() -> None:
        async with opened_cache(tmp_path) as cache:
            store.gets.close()
            async with trio.open_nursery() as nursery:
                got: list[bytes] = []

                async def reader() -> None:
                    got.append(bytes(await cache.read(store, object_id, 100, 50)))

                with trio.CancelScope() as first:
                    nursery.start_soon(reader)
                    await until(lambda: store.gets.waiting == 1)
                    first.cancel()
                    await cache.read(store, object_id, 0, 10)
                assert first.cancelled_caught
                store.gets.open()
            assert got == [data[100:150]]
            cache.check_invariants()
        assert store.get_count == 1

    run(scenario)


def test_bytes_are_served_before_the_whole_chunk_has_arrived(tmp_path: Path) -> None:
    data = content(CHUNK)
    store = _SlowTail({"a": data})
    object_id = store.id_of("a")

    async def scenario() -> None:
        async with opened_cache(tmp_path) as cache:
            assert bytes(await cache.read(store, object_id, 10, 1000)) == data[10:1010]
            assert not cache.is_local(object_id, 0)
            store.tail.set()
            assert bytes(await cache.read(store, object_id, 0, CHUNK)) == data
        assert store.get_count == 1

    run(scenario)


class _SlowTail(MemoryStore):
    """Gives the second half of each GET only once `tail` is set."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        super().__init__(objects)
        self.tail = threading.Event()

    def fetch_into(
        self, buffer: memoryview, object_id: ObjectId, start: int, stop: int, progress: Callable[[int], None]
    ) -> None:
        half = (stop - start) // 2
        data = self.objects["a"][0]
        self.get_count += 1
        buffer[:half] = data[start : start + half]
        progress(half)
        assert self.tail.wait(60.0)
        buffer[half : stop - start] = data[start + half : stop]
        progress(stop - start)


@pytest.mark.parametrize("lie", [False, True])
def test_who_comes_for_the_end_of_an_object_waits_for_no_more_than_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: bool
) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 4 * chunk.MIB)
    size = 8 * chunk.MIB - 1000
    data = content(4096) * 2048
    store = _SlowHead({"a": data[:size]}, head=4 * chunk.MIB)
    store.lies = lie
    object_id = store.id_of("a")

    async def scenario() -> None:
        async with opened_cache(tmp_path) as cache:
            assert bytes(await cache.read(store, object_id, size - 10, 100)) == data[size - 10 : size]
            assert not cache.is_local(object_id, 1)
            got: list[bytes] = []

            async def reader() -> None:
                got.append(bytes(await cache.read(store, object_id, 4 * chunk.MIB, 1000)))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader)
                await until(lambda: store.waiting)
                assert got == []
                store.go_on.set()
            assert got == [data[4 * chunk.MIB : 4 * chunk.MIB + 1000]]
            assert bytes(await cache.read(store, object_id, 0, size)) == data[:size]
            cache.check_invariants()
        assert sum(stop - start for _, start, stop in store.get_counts) == size
        assert len(store.get_counts) == 3

    run(scenario)


class _SlowHead(MemoryStore):
    """Gives what starts at `head` only once `go_on` is set, and fails it once with a lie if it `lies`."""

    def __init__(self, objects: dict[str, bytes], head: int) -> None:
        super().__init__(objects)
        self.head = head
        self.lies = False
        self.waiting = False
        self.go_on = threading.Event()

    def fetch_into(
        self, buffer: memoryview, object_id: ObjectId, start: int, stop: int, progress: Callable[[int], None]
    ) -> None:
        if start == self.head:
            self.waiting = True
            assert self.go_on.wait(60.0)
            if self.lies:
                self.lies = False
                raise IntegrityError("short body")
        super().fetch_into(buffer, object_id, start, stop, progress)


@pytest.mark.parametrize("error", [ObjectChanged, NotFound, AccessDenied, IntegrityError])
def test_failure_reaches_every_waiter_and_is_not_remembered(tmp_path: Path, error: type[CachefsError]) -> None:
    data = content(CHUNK)
    store = MemoryStore({"a": data})
    object_id = store.id_of("a")
    store.get_errors.extend([error("no"), error("no")] if error is IntegrityError else [error("no")])

    async def scenario() -> None:
        failures: list[CachefsError] = []

        async def reader() -> None:
            with pytest.raises(error) as caught:
                await cache.read(store, object_id, 0, 10)
            failures.append(caught.value)

        async with opened_cache(tmp_path) as cache:
            store.gets.close()
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(reader)
                await until(lambda: store.gets.waiting == 1)
                await trio.testing.wait_all_tasks_blocked()
                store.gets.open()
            assert len(set(map(id, failures))) == 5
            assert bytes(await cache.read(store, object_id, 0, 10)) == data[:10]
            cache.check_invariants()

    run(scenario)


def test_one_answer_that_lies_is_fetched_again(tmp_path: Path) -> None:
    data = content(CHUNK)
    store = MemoryStore({"a": data})
    store.get_errors.append(IntegrityError("short body"))

    async def scenario() -> None:
        async with opened_cache(tmp_path) as cache:
            assert bytes(await cache.read(store, store.id_of("a"), 0, CHUNK)) == data

    run(scenario)


def test_reader_waits_for_an_unreachable_store_and_goes_on_when_it_is_back(tmp_path: Path) -> None:
    data = content(CHUNK)
    store = MemoryStore({"a": data})
    object_id = store.id_of("a")

    async def scenario() -> None:
        async with opened_cache(tmp_path) as cache, trio.open_nursery() as nursery:
            store.unavailable = True
            got: list[bytes] = []

            async def reader() -> None:
                got.append(bytes(await cache.read(store, object_id, 0, CHUNK)))

            for _ in range(3):
                nursery.start_soon(reader)
            await until(lambda: store.get_count >= 2)
            store.unavailable = False
            await until(lambda: got == [data] * 3)
            cache.check_invariants()

    run(scenario)


def test_reader_gives_up_at_its_deadline_also_when_the_store_only_hangs(tmp_path: Path) -> None:
    store = MemoryStore({"a": content(CHUNK), "b": content(CHUNK)})

    async def scenario() -> None:
        async with opened_cache(tmp_path, read_timeout_s=0.5) as cache:
            store.unavailable = True
            with pytest.raises(StoreTimeout):
                await cache.read(store, store.id_of("a"), 0, 1)
            store.unavailable = False
            with store.gets.held(), pytest.raises(StoreTimeout):
                await cache.read(store, store.id_of("b"), 0, 1)

    run(scenario)


def test_on_unreachable_error_and_offline_fail_at_once_but_serve_what_is_local(tmp_path: Path) -> None:
    data = content(2 * CHUNK)
    store = MemoryStore({"a": data})
    object_id = store.id_of("a")

    async def scenario() -> None:
        async with opened_cache(tmp_path, on_unreachable="error") as cache:
            await cache.ensure(store, object_id, 0)
            store.unavailable = True
            with pytest.raises(StoreUnavailable):
                await cache.read(store, object_id, CHUNK, 1)
        async with opened_cache(tmp_path, offline=True) as cache:
            assert bytes(await cache.read(store, object_id, 0, CHUNK)) == data[:CHUNK]
            with pytest.raises(Offline):
                await cache.read(store, object_id, CHUNK, 1)
            with pytest.raises(Offline):
                await cache.read(store, object_id, 0, 2 * CHUNK)
            cache.check_invariants()

    run(scenario)


def test_two_hundred_readers_of_a_hung_origin_delay_nobody_else(tmp_path: Path) -> None:
    hung = MemoryStore({"a": content(200 * CHUNK)}, bucket="hung")
    well = MemoryStore({"b": content(4 * CHUNK, 2)}, bucket="well")
    local = MemoryStore({"c": content(CHUNK, 3)}, bucket="hung")

    async def scenario() -> None:
        async with opened_cache(tmp_path) as cache:
            await cache.ensure(local, local.id_of("c"), 0)
            hung.gets.close()
            async with trio.open_nursery() as nursery:
                for n in range(200):
                    nursery.start_soon(cache.read, hung, hung.id_of("a"), n * CHUNK, 10)
                await trio.testing.wait_all_tasks_blocked()
                assert bytes(await cache.read(well, well.id_of("b"), 0, 4 * CHUNK)) == content(4 * CHUNK, 2)
                assert bytes(await cache.read(local, local.id_of("c"), 0, CHUNK)) == content(CHUNK, 3)
                cache.check_invariants()
                assert hung.gets.waiting <= 18
                hung.gets.open()
        assert set(hung.get_counts.values()) == {1}

    run(scenario)


def test_offer_fills_in_the_background_within_its_budget(tmp_path: Path) -> None:
    store = MemoryStore({"a": content(30 * CHUNK)})
    object_id = store.id_of("a")

    async def scenario() -> None:
        async with opened_cache(tmp_path, prefetch_bytes=4 * CHUNK) as cache:
            with store.gets.held():
                answers = [cache.offer(store, object_id, index) for index in range(6)]
                assert answers == [True] * 4 + [False] * 2
                assert cache.offer(store, object_id, 0)
            await until(lambda: cache.is_local(object_id, 3))
            for index in range(4, 30):
                await until(functools.partial(cache.offer, store, object_id, index))
            await until(lambda: all(cache.is_local(object_id, index) for index in range(30)))
            cache.check_invariants()
        assert store.get_count == 30

    run(scenario)


def test_prefetch_asks_a_source_for_no_more_at_a_time_than_its_pace_allows(tmp_path: Path) -> None:
    store = MemoryStore({"a": content(40 * CHUNK)})
    object_id = store.id_of("a")

    async def scenario() -> None:
        async with opened_cache(tmp_path, buffers=34) as cache:
            with store.gets.held():
                # Of what nobody is about to read only a few come first: a reader's chunk has not to share with many.
                assert sum(cache.offer(store, object_id, index, spare=True) for index in range(40)) == SPARE_START
                assert sum(cache.offer(store, object_id, index) for index in range(40)) == LIMIT_START
                async with trio.open_nursery() as nursery:
                    # Readers are not held back by it, and count.
                    nursery.start_soon(cache.read, store, object_id, 39 * CHUNK, 10)
                    await until(lambda: store.gets.waiting == LIMIT_START + 1)
                    assert not cache.offer(store, object_id, 38)
                    store.gets.open()
            for index in range(40):
                await until(functools.partial(cache.offer, store, object_id, index))
            await until(lambda: all(cache.is_local(object_id, index) for index in range(40)))
            cache.check_invariants()
        assert store.get_count == 40

    run(scenario)


def test_a_budget_of_nothing_is_no_background_fill(tmp_path: Path) -> None:
    store = MemoryStore({"a": content(2 * CHUNK)})

    async def scenario() -> None:
        async with opened_cache(tmp_path, prefetch_bytes=0) as cache:
            assert cache.offer(store, store.id_of("a"), 1)  # nobody need ask again
            assert bytes(await cache.read(store, store.id_of("a"), 0, 10)) == content(10)
        assert store.get_count == 1

    run(scenario)


def test_who_reads_from_a_source_is_known_and_who_only_fills_is_no_reader(tmp_path: Path) -> None:
    store, other = MemoryStore({"a": content(4 * CHUNK)}), MemoryStore({"b": content(CHUNK)}, bucket="other")

    async def scenario() -> None:
        async with opened_cache(tmp_path) as cache:
            source = store.id_of("a").source
            await cache.ensure(store, store.id_of("a"), 0, committed=False)
            assert cache.offer(store, store.id_of("a"), 1, spare=True)
            assert not cache.has_readers(source)
            assert cache.offer(store, store.id_of("a"), 2)
            assert cache.has_readers(source)
            await cache.read(other, other.id_of("b"), 0, 10)
            assert cache.has_readers(other.id_of("b").source)
            await until(lambda: not cache.has_readers(source))

    run(scenario)


def test_chunks_are_held_for_readers_only_until_they_have_read_them(tmp_path: Path) -> None:
    data = content(6 * CHUNK)
    store = MemoryStore({"a": data})
    object_id = store.id_of("a")

    async def scenario() -> None:
        async with opened_cache(tmp_path, buffers=3) as cache:
            for _ in range(2):
                for offset in range(0, len(data), 4096):
                    assert bytes(await cache.read(store, object_id, offset, 4096)) == data[offset : offset + 4096]
                    cache.check_invariants()
        assert store.get_count == 6

    run(scenario)


def test_hits_and_misses_are_counted_by_where_the_bytes_came_from(tmp_path: Path) -> None:
    data = content(2 * CHUNK)
    store = MemoryStore({"a": data})
    object_id = store.id_of("a")

    async def scenario() -> None:
        counts = {True: 0, False: 0}

        def on_read(hit: bool, count: int) -> None:
            counts[hit] += count

        async with opened_cache(tmp_path) as cache:
            cache.on_read = on_read
            assert cache.offer(store, object_id, 0)
            await until(lambda: cache.is_local(object_id, 0))
            await cache.read(store, object_id, 0, 2 * CHUNK)
            assert counts == {True: 0, False: 2 * CHUNK}
            await cache.read(store, object_id, 0, 2 * CHUNK)
            assert counts == {True: 2 * CHUNK, False: 2 * CHUNK}

    run(scenario)


def test_ensure_waits_for_the_committed_record(tmp_path: Path) -> None:
    data = content(3 * CHUNK)
    store = MemoryStore({"a": data})
    object_id = store.id_of("a")

    async def scenario() -> None:
        async with opened_cache(tmp_path, drain=False) as cache, trio.open_nursery() as nursery:
            for index in range(3):
                nursery.start_soon(cache.ensure, store, object_id, index)
        store.unavailable = True
        async with opened_cache(tmp_path) as cache:
            assert cache.local_bytes(object_id) == len(data)
            assert bytes(await cache.read(store, object_id, 0, len(data))) == data

    run(scenario)


def test_readers_that_wait_while_the_cache_ends_are_answered(tmp_path: Path) -> None:
    store = MemoryStore({"a": content(CHUNK)})

    async def scenario() -> None:
        async with trio.open_nursery() as nursery:

            async def reader(cache: ChunkCache) -> None:
                with pytest.raises(WorkFailed):
                    await cache.read(store, store.id_of("a"), 0, 1)

            store.gets.close()
            async with opened_cache(tmp_path, drain=False) as cache:
                nursery.start_soon(reader, cache)
                await until(lambda: store.gets.waiting == 1)
        store.gets.open()

    run(scenario)


class _Zeros(MemoryStore):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.object = ObjectId(self.identity, "huge", size, "1")

    def fetch_into(
        self, buffer: memoryview, object_id: ObjectId, start: int, stop: int, progress: Callable[[int], None]
    ) -> None:
        buffer[: stop - start] = bytes(stop - start)
        progress(stop - start)


def test_a_hundred_gigabyte_object_needs_small_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 8 * 1024**2)
    size = 100 * 1024**3
    store = _Zeros(size)

    async def scenario() -> None:
        async with opened_cache(tmp_path, cache_bytes_max=64 * 8 * 1024**2) as cache:
            for offset in (0, size // 2, size - 4096):
                assert bytes(await cache.read(store, store.object, offset, 4096)) == bytes(4096)
            await cache.evict([])
            blobs: list[Path] = []
            await until(lambda: bool(blobs.extend((tmp_path / "blobs").glob("*/*")) or blobs))
            assert blobs[0].stat().st_size == size
            assert cache.usage().used_bytes <= 4 * 8 * 1024**2
        assert (tmp_path / "index" / "data.mdb").stat().st_blocks * 512 < RESERVE_BYTES + 1024**2

    run(scenario)

"""A state machine over ChunkCache against a dict of bytes: reads, offers, evictions, pins, crashes, overwrites, full
disks and damaged chunks in any order. Never a wrong byte, never a lost committed chunk, all invariants after each step.
"""

import shutil
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cachefs import chunk
from cachefs.cache import ChunkCache
from cachefs.cached import Pin
from cachefs.chunk import ObjectId
from cachefs.errors import NoSpace, ObjectChanged
from cachefs.tier import BlobStat
from cachefs.tier.local import LocalTier
from tests.support.caches import TIMEOUT_S, content, opened_cache
from tests.support.memory_store import MemoryStore

T = TypeVar("T")
CHUNK = 8192
CAPACITY = 10 * CHUNK
PATHS = ("a", "b", "c", "d/e")
SIZES = st.sampled_from([0, 1, CHUNK - 1, CHUNK, 2 * CHUNK + 100, 4 * CHUNK, 5 * CHUNK + 1, 12 * CHUNK])
PATH = st.sampled_from(PATHS)
INDEX = st.integers(0, 12)


class _Tier(LocalTier):
    full = False

    def write(self, name: str, size: int, offset: int, data: memoryview, *, create: bool) -> BlobStat:
        if self.full:
            super().write(name, size, offset, data[: len(data) // 3], create=create)
            raise OSError(28, "injected")
        return super().write(name, size, offset, data, create=create)


class _Loop:
    """A trio loop in a thread, and at most one open cache in it."""

    def __init__(self) -> None:
        started = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main, started))
        self._thread.start()
        assert started.wait(TIMEOUT_S)

    async def _main(self, started: threading.Event) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        async with trio.open_nursery() as self._nursery:
            started.set()
            await self._stop.wait()
            self._nursery.cancel_scope.cancel()

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        async def bounded() -> T:
            with trio.fail_after(TIMEOUT_S):
                return await function()

        return trio.from_thread.run(bounded, trio_token=self._token)

    def open(self, state: Path, tier: _Tier, hook: Callable[[str], None]) -> ChunkCache:
        async def hold(task_status: trio.TaskStatus[ChunkCache]) -> None:
            try:
                with self._crash:
                    async with opened_cache(state, tier=tier, hook=hook, buffers=4, cache_bytes_max=CAPACITY) as cache:
                        task_status.started(cache)
                        await self._clean_end.wait()
            finally:
                self._closed.set()

        async def start() -> ChunkCache:
            self._crash, self._clean_end, self._closed = trio.CancelScope(), trio.Event(), trio.Event()
            return await self._nursery.start(hold)

        return self.call(start)

    def close_cache(self, *, crash: bool) -> None:
        async def end() -> None:
            if crash:
                self._crash.cancel()
            else:
                self._clean_end.set()
            await self._closed.wait()

        self.call(end)

    def stop(self) -> None:
        trio.from_thread.run_sync(self._stop.set, trio_token=self._token)
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()


class CacheMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.chunk_bytes_before = chunk.CHUNK_BYTES
        chunk.CHUNK_BYTES = CHUNK
        self.state = Path(tempfile.mkdtemp(prefix="cachefs-machine-"))
        self.tier = _Tier(self.state / "blobs", capacity_bytes=CAPACITY, free_fraction_min=0.0)
        self.store = MemoryStore()
        self.model: dict[ObjectId, bytes] = {}
        self.old: list[ObjectId] = []
        self.opens: list[ObjectId] = []
        self.durable: dict[tuple[ObjectId, int], int] = {}  # chunks that ensure() promised -> evictions until then
        self.pinned = False
        self.evictions = 0
        self.loop = _Loop()
        self.cache = self.loop.open(self.state, self.tier, self.note_step)

    def teardown(self) -> None:
        try:
            self.loop.close_cache(crash=True)
        finally:
            self.loop.stop()
            chunk.CHUNK_BYTES = self.chunk_bytes_before
            shutil.rmtree(self.state)

    def note_step(self, step: str) -> None:
        self.evictions += step == "evict:begun"

    # -- the store

    def put(self, path: str, size: int) -> None:
        if path in self.store.objects:
            self.old.append(self.store.id_of(path))
        self.store.put(path, content(size, len(self.model) + 1))
        self.model[self.store.id_of(path)] = self.store.objects[path][0]

    @initialize(sizes=st.tuples(*[SIZES] * len(PATHS)))
    def fill_store(self, sizes: tuple[int, ...]) -> None:
        for path, size in zip(PATHS, sizes, strict=True):
            self.put(path, size)

    @rule(path=PATH, size=SIZES)
    def overwrite(self, path: str, size: int) -> None:
        self.put(path, size)

    # -- reading

    def read(self, object_id: ObjectId, offset: int, length: int) -> None:
        async def read() -> bytes:
            return bytes(await self.cache.read(self.store, object_id, offset, length))

        try:
            data = self.loop.call(read)
        except ObjectChanged:
            assert object_id in self.old
            return
        assert data == self.model[object_id][offset : offset + length]

    @rule(path=PATH, offset=st.integers(0, 6 * CHUNK), length=st.integers(0, 3 * CHUNK))
    def read_current(self, path: str, offset: int, length: int) -> None:
        self.read(self.store.id_of(path), offset, length)

    @rule(path=PATH)
    def read_whole(self, path: str) -> None:
        self.read(self.store.id_of(path), 0, 100 * CHUNK)

    @precondition(lambda self: self.old)
    @rule(data=st.data(), offset=st.integers(0, 3 * CHUNK))
    def read_old_version(self, data: st.DataObject, offset: int) -> None:
        self.read(data.draw(st.sampled_from(self.old)), offset, 2 * CHUNK)

    @rule(pieces=st.lists(st.tuples(PATH, st.integers(0, 5 * CHUNK), st.integers(1, CHUNK)), min_size=2, max_size=8))
    def read_at_once(self, pieces: list[tuple[str, int, int]]) -> None:
        async def read_all() -> None:
            async def one(object_id: ObjectId, offset: int, length: int) -> None:
                data = bytes(await self.cache.read(self.store, object_id, offset, length))
                assert data == self.model[object_id][offset : offset + length]

            async with trio.open_nursery() as nursery:
                for path, offset, length in pieces:
                    nursery.start_soon(one, self.store.id_of(path), offset, length)

        self.loop.call(read_all)

    @rule(path=PATH, index=INDEX)
    def offer(self, path: str, index: int) -> None:
        object_id = self.store.id_of(path)
        if index < chunk.chunk_count(object_id.size):

            async def offer() -> None:
                self.cache.offer(self.store, object_id, index)

            self.loop.call(offer)

    @rule(path=PATH, index=INDEX)
    def ensure(self, path: str, index: int) -> None:
        object_id = self.store.id_of(path)
        if index >= chunk.chunk_count(object_id.size):
            return

        async def ensure() -> None:
            await self.cache.ensure(self.store, object_id, index)
            assert self.cache.is_local(object_id, index)

        try:
            self.loop.call(ensure)
        except NoSpace:
            return
        self.durable[object_id, index] = self.evictions

    # -- room

    @rule(full=st.booleans())
    def fill_disk(self, full: bool) -> None:
        self.tier.full = full

    @rule(path=PATH, everything=st.booleans())
    def evict(self, path: str, everything: bool) -> None:
        object_id = self.store.id_of(path)

        async def evict() -> None:
            before = self.cache.local_bytes(object_id)
            report = await self.cache.evict(None if everything else [object_id])
            if object_id in self.opens or (self.pinned and path == PATHS[0]):
                assert self.cache.local_bytes(object_id) >= before
            elif report.skipped == ():
                assert not self.cache.local_bytes(object_id) or everything

        self.loop.call(evict)

    @rule()
    def pin(self) -> None:
        async def pin() -> None:
            await self.cache.pin(Pin("p", self.store.identity, "prefix/" + PATHS[0], 0.0))

        self.loop.call(pin)
        self.pinned = True

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self) -> None:
        async def unpin() -> bool:
            return await self.cache.unpin("p")

        assert self.loop.call(unpin)
        self.pinned = False

    @rule(path=PATH)
    def open_file(self, path: str) -> None:
        object_id = self.store.id_of(path)

        async def note() -> None:
            self.cache.note_open(object_id)

        self.loop.call(note)
        self.opens.append(object_id)

    @precondition(lambda self: self.opens)
    @rule()
    def close_file(self) -> None:
        object_id = self.opens.pop()

        async def note() -> None:
            self.cache.note_close(object_id)

        self.loop.call(note)

    # -- ends

    def reopen(self, *, crash: bool, damage: tuple[ObjectId, int] | None = None) -> None:
        self.loop.close_cache(crash=crash)
        self.opens.clear()
        if damage is not None:
            path = self.tier.path(damage[0].key.hex())
            if path.exists():
                with path.open("r+b") as blob:
                    blob.seek(chunk.chunk_offset(damage[1]))
                    blob.write(b"!")
        self.cache = self.loop.open(self.state, self.tier, self.note_step)
        assert bool(self.cache.pins()) == self.pinned

    @rule()
    def crash(self) -> None:
        self.reopen(crash=True)

    @rule()
    def restart(self) -> None:
        self.reopen(crash=False)

    @rule(choice=st.integers(0, 100), clean=st.booleans())
    def damage_on_disk(self, choice: int, clean: bool) -> None:
        present = [
            (object_id, index)
            for object_id in map(self.store.id_of, PATHS)
            for index in range(chunk.chunk_count(object_id.size))
            if self.cache.is_local(object_id, index)
        ]
        # What is local depends on timing, and the choice of rules must not: the cache is opened anew in any case.
        chosen = present[choice % len(present)] if present else None
        if chosen is not None:
            self.durable.pop(chosen, None)  # it is dropped and fetched again, perhaps not yet committed
        self.reopen(crash=not clean, damage=chosen)
        if chosen is not None:
            self.read(chosen[0], chunk.chunk_offset(chosen[1]), 10)

    @rule()
    def verify(self) -> None:
        async def verify() -> None:
            await self.cache.verify(None, repair=True)

        self.loop.call(verify)

    def nothing_is_lost(self) -> None:
        """What ensure() promised is local while nothing was evicted since (fills in flight may evict at any time)."""
        lost = {key for key in self.durable if not self.cache.is_local(*key)}
        lost = {key for key in lost if self.durable[key] == self.evictions}
        assert not lost, f"committed chunks were lost: {lost}"

    @invariant()
    def all_holds(self) -> None:
        async def check() -> None:
            self.cache.check_invariants()
            self.nothing_is_lost()
            assert self.cache.usage().used_bytes <= CAPACITY + 4 * CHUNK
            for record in self.cache.objects():
                if record.sealed:
                    assert record.local_bytes == record.object.size

        self.loop.call(check)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=50,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)

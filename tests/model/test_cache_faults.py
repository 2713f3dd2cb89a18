"""ChunkCache on a tier whose blobs, directories and system calls are broken: reads go on, and so do all tasks."""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachefs import cache as cache_module
from cachefs import chunk, space
from cachefs.cache import ChunkCache
from cachefs.chunk import ObjectId
from cachefs.errors import WorkFailed
from cachefs.tier import BlobStat
from cachefs.tier.local import LocalTier
from tests.model.test_cache_space import CHUNK, blob_of, damage, fill, local, store_of
from tests.support.caches import opened_cache, run, until
from tests.support.memory_store import MemoryStore


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", CHUNK)


class _FailingTier(LocalTier):
    """Calls whose names are in `failing` raise EIO."""

    def __init__(self, directory: Path, capacity_bytes: int = 1000 * CHUNK) -> None:
        super().__init__(directory, capacity_bytes=capacity_bytes, free_fraction_min=0.0)
        self.failing: set[str] = set()

    def _check(self, call: str) -> None:
        if call in self.failing:
            raise OSError(errno.EIO, f"{call} failed on purpose")

    def open(self, name: str) -> int:
        self._check("open")
        return super().open(name)

    def stat(self, name: str) -> BlobStat | None:
        self._check("stat")
        return super().stat(name)

    def unlink(self, name: str) -> None:
        self._check("unlink")
        super().unlink(name)

    def is_unused(self, name: str) -> bool:
        self._check("is_unused")
        return super().is_unused(name)

    def scan(self) -> Iterator[tuple[str, BlobStat]]:
        self._check("scan")
        return super().scan()

    def free_bytes(self) -> tuple[int, int]:
        self._check("free_bytes")
        return super().free_bytes()


async def read_all(cache: ChunkCache, store: MemoryStore, path: str) -> bytes:
    """The bytes, once the cache has tried to keep them."""
    object_id = store.id_of(path)
    data = bytes(await cache.read(store, object_id, 0, object_id.size))
    await cache._fills.drained()
    await cache._committer.flush()
    return data


def stuck_blobs(cache: ChunkCache) -> float:
    return cache._metrics.tier_unlink_errors.total()


def test_a_damaged_blob_that_cannot_be_deleted_ends_nothing_and_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "TOUCH_SECONDS", 0.01)  # tries again in the background
    store = store_of("ab", chunks=3)
    tier = _FailingTier(tmp_path / "blobs")
    blob = blob_of(tmp_path, store.id_of("a"))

    async def scenario() -> None:
        async with opened_cache(tmp_path, tier=tier) as cache:
            await fill(cache, store, "a")
            fd = await cache.open_sealed(store.id_of("a"))
            assert fd is not None
            os.close(fd)
            damage(blob)
            wrong = blob.read_bytes()
            tier.failing = {"unlink"}
            assert await cache.open_sealed(store.id_of("a")) is None  # it is verified, and found to be wrong
            await until(lambda: stuck_blobs(cache) == 1)
            for path in "aba":
                assert await read_all(cache, store, path) == store.objects[path][0]
            await until(lambda: cache.is_sealed(store.id_of("b")))
            assert local(cache, store) == "b"
            assert await cache.open_sealed(store.id_of("a")) is None
            assert blob.read_bytes() == wrong
            assert cache.usage().used_bytes == sum(stat.disk_bytes for _, stat in tier.scan())
            cache.check_invariants()
        async with opened_cache(tmp_path, tier=tier) as cache:
            assert (stuck_blobs(cache), local(cache, store)) == (1, "b")
            assert cache.usage().used_bytes == sum(stat.disk_bytes for _, stat in tier.scan())
            assert await read_all(cache, store, "a") == store.objects["a"][0]
            assert (await cache.gc(False)).blobs == 0
            assert blob.read_bytes() == wrong
            cache.check_invariants()
            tier.failing = set()
            await until(lambda: not blob.exists())
            await fill(cache, store, "a")
            assert blob.read_bytes() == store.objects["a"][0]
            cache.check_invariants()

    run(scenario)


def _make_directory(path: Path) -> None:
    path.mkdir()
    (path / "x").touch()


def _make_link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


@pytest.mark.parametrize("restart", [False, True], ids=["running", "started"])
@pytest.mark.parametrize("make", [_make_directory, os.mkfifo, _make_link], ids=["directory", "fifo", "link"])
def test_what_is_no_file_under_a_blobs_name_is_a_blob_that_is_gone(tmp_path: Path, make: object, restart: bool) -> None:
    assert callable(make)
    store = store_of("ab", chunks=3)
    blob = blob_of(tmp_path, store.id_of("a"))
    stays = make is _make_directory

    async def replaced(cache: ChunkCache) -> None:
        assert await cache.open_sealed(store.id_of("a")) is None
        for path in "ab":
            assert await read_all(cache, store, path) == store.objects[path][0]
        assert stuck_blobs(cache) == stays
        if not stays:
            await fill(cache, store, "a")
            assert blob.read_bytes() == store.objects["a"][0]
        assert (await cache.verify(None, rebuild=True)).bad == ()
        assert local(cache, store) == ("b" if stays else "ab")
        cache.check_invariants()

    async def scenario() -> None:
        async with opened_cache(tmp_path) as cache:
            await fill(cache, store, "a", "b")
            cache._blobs.files.close()
            blob.unlink()
            make(blob)
            if not restart:
                await replaced(cache)
        if restart:
            async with opened_cache(tmp_path) as cache:
                await replaced(cache)

    run(scenario)


@pytest.mark.parametrize("calls", ["open", "stat", "unlink", "is_unused", "free_bytes", "stat unlink open is_unused"])
def test_no_error_of_the_tier_ends_a_task_or_a_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: str
) -> None:
    monkeypatch.setattr(cache_module, "TOUCH_SECONDS", 0.01)
    store = store_of("abcd", chunks=3)
    tier = _FailingTier(tmp_path / "blobs", capacity_bytes=7 * CHUNK)  # two objects: others must go

    async def scenario() -> None:
        async with opened_cache(tmp_path, tier=tier) as cache:
            await fill(cache, store, "a", "b")
            damage(blob_of(tmp_path, store.id_of("a")))
            os.utime(blob_of(tmp_path, store.id_of("b")))
            cache._blobs.files.close()
            tier.failing = set(calls.split())
            for path in "ab":
                assert await cache.open_sealed(store.id_of(path)) is None
            for path in "abcdab":
                assert await read_all(cache, store, path) == store.objects[path][0]
            await cache.evict([store.id_of(path) for path in "cd"])
            await cache.verify(None, repair=True)
            cache.usage()
            cache.room()
            await until(lambda: not cache._sealing._verifying)
            tier.failing = set()
            await until(lambda: not cache._blobs.stuck)
            await cache.evict(None)
            await fill(cache, store, "a", "b")
            cache.check_invariants()
            assert cache.is_sealed(store.id_of("a"))

    run(scenario)


def test_a_disk_that_deletes_nothing_does_not_lose_all_that_is_local(tmp_path: Path) -> None:
    store = store_of("abcdefgh", chunks=1)
    tier = _FailingTier(tmp_path / "blobs", capacity_bytes=6 * CHUNK)

    async def scenario() -> None:
        async with opened_cache(tmp_path, tier=tier) as cache:
            await fill(cache, store, *"abcdef")
            tier.failing = {"unlink"}
            for _ in range(5):
                for path in "gh":
                    assert await read_all(cache, store, path) == store.objects[path][0]
            assert len(local(cache, store)) == 6 - space.STUCK_IN_A_ROW_MAX
            tier.failing = set()
            await cache._space.unlink_stuck()
            await fill(cache, store, "g", "h")
            cache.check_invariants()

    run(scenario)


def test_blobs_that_cannot_be_listed_are_known_again_at_the_next_start(tmp_path: Path) -> None:
    store = store_of("ab")
    tier = _FailingTier(tmp_path / "blobs")

    async def scenario() -> None:
        async with opened_cache(tmp_path, tier=tier) as cache:
            await fill(cache, store, "a")
            tier.failing = {"scan"}
            with pytest.raises(WorkFailed, match="cannot be listed"):
                await cache.gc(False)
        async with opened_cache(tmp_path, tier=tier) as cache:
            for path in "ab":
                assert await read_all(cache, store, path) == store.objects[path][0]
            assert local(cache, store) == ""
            assert "scan failed" in cache.usage().trouble
            assert cache.room()[0] == 0
        tier.failing = set()
        async with opened_cache(tmp_path, tier=tier) as cache:
            assert local(cache, store) == "a"
            assert cache.is_sealed(store.id_of("a"))
            assert cache.usage().trouble == ""
            cache.check_invariants()

    run(scenario)


def test_a_directory_of_blobs_that_cannot_be_read_costs_only_what_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of("ab")
    blob = blob_of(tmp_path, store.id_of("a"))
    listdir = os.listdir

    def failing(path: Path) -> list[str]:
        if path == blob.parent:
            raise OSError(errno.EIO, "failed on purpose")
        return listdir(path)

    async def scenario() -> None:
        tier = _FailingTier(tmp_path / "blobs")
        async with opened_cache(tmp_path, tier=tier) as cache:
            await fill(cache, store, "a", "b")
        monkeypatch.setattr(os, "listdir", failing)
        tier.failing = {"unlink"}
        before = blob.read_bytes()
        async with opened_cache(tmp_path, tier=tier) as cache:
            assert local(cache, store) == "b"
            assert await read_all(cache, store, "a") == store.objects["a"][0]
            assert local(cache, store) == "b"  # a blob that may have been the kernel's is not written into
            cache.check_invariants()
        assert blob.read_bytes() == before

    run(scenario)


def test_without_its_directory_the_tier_keeps_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_of("abc", chunks=3)

    async def scenario() -> None:
        async with opened_cache(tmp_path) as cache:
            await fill(cache, store, "a", "b")
            cache._blobs.files.close()
            shutil.rmtree(tmp_path / "blobs")
            for path in "abcabc":
                assert await read_all(cache, store, path) == store.objects[path][0]
            assert local(cache, store) == ""
            assert "No such file" in cache.usage().trouble
            assert cache.room()[0] == 0
            await cache._space.make_room()
            cache.check_invariants()
            (tmp_path / "blobs").mkdir()
            await fill(cache, store, "a")
            assert cache.usage().trouble == ""
        assert sum("without being kept: [Errno 2]" in record.message for record in caplog.records) == 1

    run(scenario)


def test_a_blob_is_opened_plainly_for_the_kernel_takes_no_other_descriptor(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path / "blobs", capacity_bytes=CHUNK)
    name = ObjectId("s", "p", 1, "1").key.hex()
    tier.write(name, 1, 0, memoryview(b"x"), create=True)
    with os.fdopen(tier.open(name), "rb") as blob, tier.path(name).open("rb") as plain:
        assert fcntl.fcntl(blob, fcntl.F_GETFL) == fcntl.fcntl(plain, fcntl.F_GETFL)


def test_whoever_opens_a_blob_that_is_looked_at_waits_for_it(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path / "blobs", capacity_bytes=CHUNK)
    name = ObjectId("s", "p", 1, "1").key.hex()
    tier.write(name, 1, 0, memoryview(b"x"), create=True)
    opened: list[int] = []
    holder = tier.open(name)
    broken = threading.Event()

    def release(number: int, frame: object) -> None:
        broken.set()
        fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    before = signal.signal(signal.SIGURG, release)
    try:
        fcntl.fcntl(holder, fcntl.F_SETSIG, signal.SIGURG)
        try:
            fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except BlockingIOError:
            raise
        except OSError as exc:
            pytest.skip(f"no leases here: {exc}")
        thread = threading.Thread(target=lambda: opened.append(tier.open(name)))
        thread.start()
        thread.join(60)
        assert broken.is_set()
        assert len(opened) == 1
    finally:
        signal.signal(signal.SIGURG, before)
        for fd in (holder, *opened):
            with contextlib.suppress(OSError):
                os.close(fd)

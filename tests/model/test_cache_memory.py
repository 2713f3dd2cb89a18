"""Many readers, a hung source, a busy disk: memory and buffers stay within a bound, and others have their share."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from cachefs import chunk
from cachefs.cache import DISK_PIECES, JOIN_PIECES, ChunkCache
from cachefs.errors import StoreTimeout
from tests.model import memory_child
from tests.support.caches import BusyDisk, content, opened_cache, run, until
from tests.support.memory_store import MemoryStore

ROOT = Path(__file__).parents[2]
READERS = 300
SLACK_MIB = 60
"""For threads and malloc; without a bound the readers' bytes take READERS MiB."""
CHUNK = 16 * 1024


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", CHUNK)


def test_memory_does_not_grow_with_the_readers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.model.memory_child", os.fspath(tmp_path), str(READERS)]
    environment = {**os.environ, "PYTHONPATH": os.fspath(ROOT)}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert child.returncode == 0, child.stderr
    buffers_mib = memory_child.CHUNKS * memory_child.CHUNK_BYTES // chunk.MIB
    assert int(child.stdout) < (buffers_mib + JOIN_PIECES + DISK_PIECES + SLACK_MIB) * chunk.MIB


@pytest.mark.usefixtures("small_chunks")
def test_borders_of_a_hung_source_hold_up_no_other_border(tmp_path: Path) -> None:
    hung = MemoryStore({"a": content(200 * CHUNK)}, bucket="hung")
    well = MemoryStore({"b": content(4 * CHUNK, 2)}, bucket="well")
    local = MemoryStore({"c": content(2 * CHUNK, 3)}, bucket="hung")

    async def scenario() -> None:
        async with opened_cache(tmp_path) as cache:
            for index in range(2):
                await cache.ensure(local, local.id_of("c"), index)
            with hung.gets.held():
                async with trio.open_nursery() as nursery:
                    for n in range(1, 200):
                        nursery.start_soon(cache.read, hung, hung.id_of("a"), n * CHUNK - 5, 10)
                    await until(lambda: hung.gets.waiting > 0)
                    await trio.testing.wait_all_tasks_blocked()
                    assert bytes(await cache.read(well, well.id_of("b"), 0, 4 * CHUNK)) == content(4 * CHUNK, 2)
                    assert bytes(await cache.read(local, local.id_of("c"), 0, 2 * CHUNK)) == content(2 * CHUNK, 3)
                    cache.check_invariants()
                    hung.gets.open()
            assert bytes(await cache.read(hung, hung.id_of("a"), 0, 2 * CHUNK)) == content(200 * CHUNK)[: 2 * CHUNK]
            cache.check_invariants()

    run(scenario)


@pytest.mark.usefixtures("small_chunks")
def test_who_waits_behind_other_borders_gives_up_at_its_deadline_too(tmp_path: Path) -> None:
    store = MemoryStore({"a": content(40 * CHUNK)})
    gave_up = 0

    async def read(cache: ChunkCache, n: int) -> None:
        nonlocal gave_up
        with pytest.raises(StoreTimeout):
            await cache.read(store, store.id_of("a"), n * CHUNK - 5, 10)
        gave_up += 1

    async def scenario() -> None:
        async with opened_cache(tmp_path, read_timeout_s=0.5) as cache:
            with store.gets.held():
                async with trio.open_nursery() as nursery:
                    for n in range(1, 40):
                        nursery.start_soon(read, cache, n)
            assert gave_up == 39
            cache.check_invariants()

    run(scenario)


@pytest.mark.usefixtures("small_chunks")
def test_a_hung_source_leaves_the_others_a_share_of_prefetch(tmp_path: Path) -> None:
    hung = MemoryStore({"a": content(60 * CHUNK)}, bucket="hung")
    well = MemoryStore({"b": content(4 * CHUNK, 2)}, bucket="well")
    of_hung, of_well = hung.id_of("a"), well.id_of("b")

    async def scenario() -> None:
        async with opened_cache(tmp_path, buffers=34, prefetch_bytes=16 * CHUNK) as cache:
            with hung.gets.held():
                while cache.offer(hung, of_hung, hung.gets.waiting):
                    await trio.testing.wait_all_tasks_blocked(0.01)
                async with trio.open_nursery() as nursery:
                    for n in range(30, 60):  # they wait for buffers, at their source's share
                        nursery.start_soon(cache.read, hung, of_hung, n * CHUNK, 10)
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    for index in range(4):
                        assert cache.offer(well, of_well, index)
                        await until(functools.partial(cache.is_local, of_well, index))
                    cache.check_invariants()
                    hung.gets.open()

    run(scenario)


@pytest.mark.usefixtures("small_chunks")
def test_chunks_that_are_being_written_take_nothing_of_what_is_in_flight(tmp_path: Path) -> None:
    store = MemoryStore({"a": content(60 * CHUNK)})
    disk = BusyDisk(tmp_path / "blobs")

    async def scenario() -> None:
        async with opened_cache(tmp_path, buffers=34, tier=disk) as cache:
            disk.writes.clear()
            for n in range(6):
                await cache.read(store, store.id_of("a"), n * CHUNK, 10)
            with store.gets.held():
                async with trio.open_nursery() as nursery:
                    for n in range(6, 60):
                        nursery.start_soon(cache.read, store, store.id_of("a"), n * CHUNK, 10)
                    await until(lambda: store.gets.waiting == 24)
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    assert store.gets.waiting == 24
                    cache.check_invariants()
                    disk.writes.set()
                    store.gets.open()
            cache.check_invariants()

    run(scenario)

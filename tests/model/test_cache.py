"""ChunkCache on a real directory with a store in memory: reads, single flight, commits, warm restarts."""

import functools
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import trio

from cachefs import chunk
from tests.support.caches import opened_cache
from tests.support.memory_store import MemoryStore

CHUNK = 16 * 1024
TIMEOUT_S = 60.0


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", CHUNK)


def content(size: int, seed: int = 1) -> bytes:
    """Bytes of which no two aligned pieces are equal."""
    return b"".join((seed * 1_000_003 + n).to_bytes(8, "big") for n in range(size // 8 + 1))[:size]


def run(function: Callable[..., Coroutine[Any, Any, None]], *args: object) -> None:
    async def bounded() -> None:
        with trio.fail_after(TIMEOUT_S):
            await function(*args)

    trio.run(bounded)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.sleep(0.005)


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

"""A store that comes back without all bytes: an error or another GET, never what was in the buffer before."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cachefs import chunk
from cachefs.chunk import ObjectId
from cachefs.errors import IntegrityError
from cachefs.store import Store
from tests.store.conftest import listing, open_with
from tests.support.caches import content, opened_cache, run
from tests.support.lying import LyingServer
from tests.support.memory_store import MemoryStore

SIZE = 3 * chunk.MIB
"""One chunk, whose end is a GET of its own for a reader who begins there."""
DATA = content(SIZE)


class Short:
    """Another store, of whose parts the first `times` end early, with the bytes in place up to there told of."""

    def __init__(self, inner: Store, times: int, part: Callable[[int], int]) -> None:
        self.identity, self.url = inner.identity, inner.url
        self.probe, self.list_directory, self.object_id = inner.probe, inner.list_directory, inner.object_id
        self.close = inner.close
        self._inner = inner
        self._part = part
        self.times = times
        self.gets = 0

    def fetch_into(
        self, buffer: memoryview, object_id: ObjectId, start: int, stop: int, progress: Callable[[int], None]
    ) -> None:
        self.gets += 1
        if self.times:
            self.times -= 1
            stop = start + self._part(stop - start)
            if stop == start:
                return
        self._inner.fetch_into(buffer, object_id, start, stop, progress)


parts = pytest.mark.parametrize(
    "part", [lambda size: 0, lambda size: size // 2, lambda size: size - 1], ids=["nothing", "half", "all but one byte"]
)


@parts
@pytest.mark.parametrize("offset", [0, SIZE - 100])
def test_a_part_that_ends_early_is_fetched_again(tmp_path: Path, part: Callable[[int], int], offset: int) -> None:
    inner = MemoryStore({"a": DATA})
    store = Short(inner, 1, part)
    object_id = inner.id_of("a")

    async def scenario() -> None:
        async with opened_cache(tmp_path) as cache:
            assert bytes(await cache.read(store, object_id, offset, SIZE)) == DATA[offset:]
            assert bytes(await cache.read(store, object_id, 0, SIZE)) == DATA
            cache.check_invariants()

    run(scenario)


@parts
@pytest.mark.parametrize("offset", [0, SIZE - 100])
def test_a_store_that_always_ends_early_is_an_error_and_nothing_is_kept(
    tmp_path: Path, part: Callable[[int], int], offset: int
) -> None:
    inner = MemoryStore({"a": DATA})
    store = Short(inner, 2, part)
    object_id = inner.id_of("a")

    async def scenario() -> None:
        async with opened_cache(tmp_path) as cache:
            with pytest.raises(IntegrityError):
                await cache.read(store, object_id, offset, SIZE)
            assert store.gets == 2
            assert not cache.is_local(object_id, 0)
            cache.check_invariants()
        async with opened_cache(tmp_path) as cache:
            assert not cache.is_local(object_id, 0)
            assert bytes(await cache.read(store, object_id, 0, SIZE)) == DATA
            cache.check_invariants()

    run(scenario)


@pytest.mark.parametrize("library", ["auto", "obstore", "fsspec"])
def test_so_it_is_with_stores_over_http_and_those_that_give_all_are_believed(
    tmp_path: Path, origin: LyingServer, library: str
) -> None:
    origin.put("bucket", "a", DATA)
    inner = open_with("s3://bucket", endpoint_url=origin.endpoint_url, store=library)
    store = Short(inner, 1, lambda size: size // 2)
    object_id = inner.object_id(listing(inner)[0]["a"])

    async def scenario() -> None:
        async with opened_cache(tmp_path) as cache:
            assert bytes(await cache.read(store, object_id, 0, SIZE)) == DATA
            assert store.gets == 2
            cache.check_invariants()

    try:
        run(scenario)
    finally:
        store.close()

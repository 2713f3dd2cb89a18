"""ChunkCache over an index that can only be read: nothing is kept or given up, and what the next server must know of
what could not be written down it does know."""

import os
from pathlib import Path

import msgspec
import pytest

from cachefs import chunk
from cachefs.cached import Header
from cachefs.chunk import ObjectId
from cachefs.index import Index, Table
from cachefs.recovery import begin_session
from cachefs.spill import SpillingIndex
from tests.model.test_cache_faults import _FailingTier, read_all
from tests.model.test_cache_space import CHUNK, blob_of, damage, fill, local, store_of
from tests.support.caches import opened_cache, run


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", CHUNK)


def index_of(state: Path, read_only: str) -> Index:
    """Of the next server of one mount."""
    (state / "run").mkdir(exist_ok=True)
    return SpillingIndex(state / "index", state / "run" / "spill", session="s", read_only=read_only)


def header(state: Path, object_id: ObjectId) -> Header:
    index = Index(state / "index")
    value = index.get(Table.OBJECTS, object_id.key)
    assert value is not None
    assert not list(index.scan(Table.REMARKS))
    index.close()
    return msgspec.msgpack.decode(value, type=Header)


def test_a_blob_that_the_kernel_got_meanwhile_is_known_to_have_had_a_backing_id(tmp_path: Path) -> None:
    store = store_of("ab")
    object_id = store.id_of("a")

    async def scenario() -> None:
        async with opened_cache(tmp_path, index=index_of(tmp_path, "")) as cache:
            await fill(cache, store, "a")
        assert not header(tmp_path, object_id).had_backing
        for _ in range(2):
            async with opened_cache(tmp_path, index=index_of(tmp_path, "the disk is gone")) as cache:
                descriptor = await cache.open_sealed(object_id)
                assert descriptor is not None
                os.close(descriptor)
                assert await read_all(cache, store, "b") == store.objects["b"][0]
                assert (await cache.evict(None)).evicted_objects == 0
                assert local(cache, store) == "a"
                assert cache.usage().trouble == "the disk is gone"
        async with opened_cache(tmp_path, index=index_of(tmp_path, "")) as cache:
            await fill(cache, store, "b")
            assert local(cache, store) == "ab"
        assert header(tmp_path, object_id).had_backing
        assert header(tmp_path, object_id).seal is not None

    run(scenario)


@pytest.mark.parametrize("had_backing", [False, True])
def test_a_blob_that_was_found_to_be_wrong_is_not_sealed_for_the_next_server(tmp_path: Path, had_backing: bool) -> None:
    store = store_of("a", chunks=3)
    object_id = store.id_of("a")

    async def scenario() -> None:
        tier = _FailingTier(tmp_path / "blobs")
        async with opened_cache(tmp_path, tier=tier, index=index_of(tmp_path, "")) as cache:
            await fill(cache, store, "a")
            if had_backing:
                await cache.note_backing(object_id)
        damage(blob_of(tmp_path, object_id), 1)
        tier.failing = {"unlink"}
        for number in range(2):
            async with opened_cache(tmp_path, tier=tier, index=index_of(tmp_path, "the disk is gone")) as cache:
                assert cache.is_sealed(object_id) == (number == 0)
                assert await read_all(cache, store, "a") == store.objects["a"][0]
        tier.failing = set()
        async with opened_cache(tmp_path, tier=tier, index=index_of(tmp_path, "")) as cache:
            assert not cache.is_sealed(object_id)
            for _ in range(2):
                assert await read_all(cache, store, "a") == store.objects["a"][0]
            assert cache.is_sealed(object_id)

    run(scenario)


def test_a_boot_that_ended_uncleanly_stays_so_until_it_can_be_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot = tmp_path / "boot"
    monkeypatch.setattr("cachefs.recovery.BOOT_ID", boot)
    boot.write_text("1")
    index = index_of(tmp_path, "")
    assert begin_session(index) == 0
    index.close()
    boot.write_text("2")
    for read_only in ("the disk is gone", "the disk is gone", "", ""):
        index = index_of(tmp_path, read_only)
        assert begin_session(index) == 1
        index.close()
    boot.write_text("3")
    index = index_of(tmp_path, "")
    assert begin_session(index) == 2
    index.close()

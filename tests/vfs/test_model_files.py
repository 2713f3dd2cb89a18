"""Readahead that knows the layout of files: over a real tree, cache and fills; the fills are noted as they start."""

import json
import os
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from cachefs.chunk import CHUNK_BYTES, chunk_count
from cachefs.readahead import WINDOWS
from tests.support.memory_store import MemoryStore
from tests.support.model_files import gguf_header, safetensors_file
from tests.vfs.stage import Mount, Stage

MIB = 1024 * 1024
TENSORS = {f"t{number}": 3 * CHUNK_BYTES for number in range(5)}


@pytest.fixture
def mount(tmp_path) -> Iterator[Mount]:
    mount = Mount(tmp_path)
    yield mount
    os.close(mount.ledger_fd)


def notes_of(stage: Stage) -> list[tuple[str, int]]:
    """(name, chunk) of each fill from now on, in the order of their starts."""
    started: list[tuple[str, int]] = []
    fills = stage.cache._fills
    new = fills._new

    def noting(store, cached, index):
        started.append((cached.object_id.path.rpartition("/")[2], index))
        return new(store, cached, index)

    fills._new = noting  # type: ignore[method-assign]
    return started


async def until(condition) -> None:
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.005)


def is_known(stage: Stage, store: MemoryStore, name: str):
    return lambda: stage.hints.layout(store.id_of(name)) is not None


def is_idle(stage: Stage):
    return lambda: not stage.cache._fills.running


def test_jump_to_a_tensor_fetches_its_chunks_and_nothing_else(mount):
    store = MemoryStore({"m.safetensors": safetensors_file(TENSORS)})

    async def main():
        async with mount.server(store) as stage:
            started = notes_of(stage)
            _, handle = await stage.open("m.safetensors")
            await stage.vfs.read(handle, 0, 4096)
            await until(is_known(stage, store, "m.safetensors"))
            await until(lambda: len(started) >= 3)
            await until(is_idle(stage))
            assert started == [("m.safetensors", index) for index in range(3)]
            layout = stage.hints.layout(store.id_of("m.safetensors"))
            start, stop = layout.spans()[3]
            await stage.vfs.read(handle, start, 4096)
            wanted = [("m.safetensors", index) for index in range(start // CHUNK_BYTES, chunk_count(stop))]
            await until(lambda: len(started) >= 3 + len(wanted))
            await until(is_idle(stage))
            assert started[3:] == wanted
            assert len(wanted) == 4

    trio.run(main)


def test_second_jump_brings_the_rest_of_the_file_after_its_own_tensor(mount):
    store = MemoryStore({"m.safetensors": safetensors_file(TENSORS)})

    async def main():
        async with mount.server(store) as stage:
            started = notes_of(stage)
            _, handle = await stage.open("m.safetensors")
            await stage.vfs.read(handle, 0, 4096)
            await until(is_known(stage, store, "m.safetensors"))
            layout = stage.hints.layout(store.id_of("m.safetensors"))
            await stage.vfs.read(handle, layout.spans()[3][0], 4096)
            await until(lambda: len(started) >= 7)
            await until(is_idle(stage))
            before = len(started)
            await stage.vfs.read(handle, layout.spans()[1][0] + 4096, 4096)
            object_id = store.id_of("m.safetensors")
            await until(lambda: all(stage.cache.is_local(object_id, index) for index in range(16)))
            own = [index for _, index in started[before:] if 3 <= index <= 6]
            assert own == [3, 4, 5, 6]
            assert started[before : before + 4] == [("m.safetensors", index) for index in own]
            assert len(started) == len(set(started)) == 16

    trio.run(main)


def test_header_that_goes_over_several_chunks_is_learned_as_the_reader_gets_on(mount):
    head, spans = gguf_header([("a", CHUNK_BYTES), ("b", 2 * CHUNK_BYTES)], words=600_000)
    assert CHUNK_BYTES < len(head) < 2 * CHUNK_BYTES
    store = MemoryStore({"m.gguf": head + bytes(spans[-1][1] - len(head))})

    async def main():
        async with mount.server(store) as stage:
            _, handle = await stage.open("m.gguf")
            for offset in range(0, len(head) + MIB, MIB):
                await stage.vfs.read(handle, offset, MIB)
            await until(is_known(stage, store, "m.gguf"))
            assert stage.hints.layout(store.id_of("m.gguf")).spans() == spans

    trio.run(main)


@pytest.mark.parametrize("name", ["m.safetensors", "m.gguf"])
def test_hostile_header_changes_nothing_for_its_reader(mount, name):
    head = b"\xff" * 7 + b"\0" if name == "m.safetensors" else b"GGUF" + b"\xff" * 100
    data = head + bytes(2 * CHUNK_BYTES)
    store = MemoryStore({name: data})

    async def main():
        async with mount.server(store) as stage:
            _, handle = await stage.open(name)
            assert await stage.read_all(handle, len(data)) == data
            assert stage.hints.layout(store.id_of(name)) is None
            assert max(store.get_counts.values()) == 1

    trio.run(main)


NAMES = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
SHARD = bytes(6 * CHUNK_BYTES)


def test_end_of_a_shard_opens_the_window_of_the_next_one(mount):
    store = MemoryStore(dict.fromkeys(NAMES, SHARD))

    async def main():
        async with mount.server(store) as stage:
            started = notes_of(stage)
            _, handle = await stage.open(NAMES[0])
            await stage.read_all(handle, 2 * CHUNK_BYTES)
            # The reader is in the second chunk: all of the next file lies in the window, and nothing of the third.
            await until(lambda: len(started) == 12)
            await until(is_idle(stage))
            assert started == [(name, index) for name in NAMES[:2] for index in range(6)]
            for name in NAMES:
                _, handle = await stage.open(name)
                assert await stage.read_all(handle, len(SHARD)) == SHARD
            assert len(started) == len(set(started)) == 18
            assert len(store.get_counts) == 18
            assert set(store.get_counts.values()) == {1}

    trio.run(main)


def test_shards_that_are_read_backwards_are_fetched_once(mount):
    store = MemoryStore(dict.fromkeys(NAMES, SHARD))

    async def main():
        async with mount.server(store) as stage:
            for name in reversed(NAMES):
                _, handle = await stage.open(name)
                assert await stage.read_all(handle, len(SHARD)) == SHARD
                await stage.vfs.release(handle)
            await until(is_idle(stage))
            assert set(store.get_counts.values()) == {1}
            assert store.get_count == 18

    trio.run(main)


def test_load_of_one_shard_fetches_a_window_of_the_next_at_most(mount):
    store = MemoryStore({NAMES[0]: bytes(2 * CHUNK_BYTES), NAMES[1]: bytes(40 * CHUNK_BYTES)})

    async def main():
        async with mount.server(store) as stage:
            started = notes_of(stage)
            _, handle = await stage.open(NAMES[0])
            await stage.read_all(handle, 2 * CHUNK_BYTES)
            await until(lambda: (NAMES[1], WINDOWS[-1] - 1) in started)
            await until(is_idle(stage))
            assert sum(name == NAMES[1] for name, _ in started) == WINDOWS[-1]

    trio.run(main)


def test_index_that_was_read_says_what_follows_names_that_do_not_count(mount):
    index = json.dumps({"weight_map": {"a": "first.safetensors", "b": "second.safetensors"}}).encode()
    shard = bytes(2 * CHUNK_BYTES)
    store = MemoryStore(
        {"model.safetensors.index.json": index, "first.safetensors": shard, "second.safetensors": shard}
    )

    async def main():
        async with mount.server(store) as stage:
            _, handle = await stage.open("model.safetensors.index.json")
            assert await stage.read_all(handle, len(index)) == index
            _, handle = await stage.open("first.safetensors")
            assert await stage.read_all(handle, len(shard)) == shard
            second = store.id_of("second.safetensors")
            await until(lambda: all(stage.cache.is_local(second, index) for index in range(2)))

    trio.run(main)


def test_index_that_nobody_read_is_not_fetched(mount):
    index = json.dumps({"weight_map": {"a": "first.safetensors", "b": "second.safetensors"}}).encode()
    store = MemoryStore(
        {"model.safetensors.index.json": index, "first.safetensors": SHARD, "second.safetensors": SHARD}
    )

    async def main():
        async with mount.server(store) as stage:
            _, handle = await stage.open("first.safetensors")
            assert await stage.read_all(handle, len(SHARD)) == SHARD
            await trio.testing.wait_all_tasks_blocked()
            await until(is_idle(stage))
            assert {path for path, _, _ in store.get_counts} == {"first.safetensors"}

    trio.run(main)


def test_two_readers_go_on_while_the_source_of_a_third_hangs(tmp_path):
    mount = Mount(tmp_path, at_root=True)
    hung, fine = MemoryStore({"x.safetensors": SHARD}, bucket="hung"), MemoryStore(bucket="fine")
    for name in NAMES[1:]:
        fine.put(name, SHARD)

    async def main():
        async with mount.server(hung, fine) as stage, trio.open_nursery() as nursery:
            _, stuck = await stage.open("v0/x.safetensors")
            with hung.gets.held():
                nursery.start_soon(stage.vfs.read, stuck, 0, 4 * MIB)
                await until(lambda: hung.gets.waiting >= 3)
                handles = [(await stage.open(f"v1/{name}"))[1] for name in NAMES[1:]]

                async def read(handle):
                    assert await stage.read_all(handle, len(SHARD)) == SHARD

                with trio.fail_after(60):
                    async with trio.open_nursery() as readers:
                        for handle in handles:
                            readers.start_soon(read, handle)
                assert hung.gets.waiting >= 3

    trio.run(main)
    os.close(mount.ledger_fd)

"""Run by test_cache_memory.py, for a resident size of its own: many readers at once of borders between chunks.

    python -m tests.model.memory_child STATE READERS

They all wait for the store at first. Then each reads its place again, from the blob. Prints by how many bytes the
process grew at most, from the moment at which the objects' bytes were there.
"""

import os
import re
import sys
from pathlib import Path

import trio
import trio.testing

from cachefs.chunk import CHUNK_BYTES, MIB
from tests.support.caches import opened_cache, run
from tests.support.memory_store import MemoryStore

CHUNKS = 9


def status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


async def many_readers(state: Path, readers: int) -> None:
    data = os.urandom(CHUNKS * CHUNK_BYTES)
    store = MemoryStore({"a": data})
    object_id = store.id_of("a")
    before = status_bytes("VmRSS")
    right = 0

    async def read(number: int) -> None:
        nonlocal right
        border = (1 + number % (CHUNKS - 1)) * CHUNK_BYTES
        offset = border - MIB + 4096 * (1 + number % 255)
        view = await cache.read(store, object_id, offset, MIB)
        assert len(view) == MIB
        assert view == memoryview(data)[offset : offset + MIB]
        right += 1

    async with opened_cache(state) as cache:
        with store.gets.held():
            async with trio.open_nursery() as nursery:
                for number in range(readers):
                    nursery.start_soon(read, number)
                await trio.testing.wait_all_tasks_blocked()
                assert right == 0
                store.gets.open()
        for index in range(CHUNKS):
            await cache.ensure(store, object_id, index)
            await cache.read(store, object_id, (index + 1) * CHUNK_BYTES - 1, 1)  # gives its buffer back
        async with trio.open_nursery() as nursery:
            for number in range(readers):
                nursery.start_soon(read, number)
        assert right == 2 * readers
        assert store.get_count == CHUNKS
        cache.check_invariants()
    print(status_bytes("VmHWM") - before)


if __name__ == "__main__":
    run(many_readers, Path(sys.argv[1]), int(sys.argv[2]))
